import copy
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode

import tuneapp.loop as loop
from tuneapp.average import WeightAverage
from tuneapp.config import (
    AdamW,
    BceDice,
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    Focal,
    Iou,
    Loss,
    Optimizer,
    RmsProp,
    Sgd,
    TrialConfig,
)
from tuneapp.errors import DataError, Diverged
from tuneapp.families import RESNET
from tuneapp.loop import EpochMetrics, Evaluation, Precision, evaluate, train_one_epoch
from tuneapp.losses import build_loss
from tuneapp.metrics import measure
from tuneapp.optim import build_optimizer
from tuneapp.staged import StagedModel, WithAux

PLAIN = Precision("cpu", torch.float32)
Batch = tuple[Tensor, Tensor]


def batches_of(*sizes: int, features: int = 4, classes: int = 3, seed: int = 0) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, features, generator=draw),
            torch.randint(classes, (size,), generator=draw),
        )
        for size in sizes
    ]


def linear(features: int = 4, classes: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(features, classes)


def train(
    model: nn.Module,
    batches: object,
    *,
    lr: float = 0.1,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: LRScheduler | None = None,
    scaler: GradScaler | None = None,
    precision: Precision = PLAIN,
    loss: Loss | None = None,
    aux_weight: float = 0.0,
    **options: Any,
) -> EpochMetrics:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    return train_one_epoch(
        model,
        batches,
        build_loss(loss or CrossEntropy(), [1, 1, 1], aux_weight),
        optimizer,
        schedule or ConstantLR(optimizer, factor=1.0, total_iters=0),
        scaler or PLAIN.scaler(),
        precision,
        **{"epoch": 1, **options},
    )


def accuracy_of(scores: Evaluation) -> float:
    names = [str(label) for label in range(scores.logits.shape[1])]
    return measure(scores.logits.numpy(), scores.targets.numpy(), names)["val/accuracy"]


def moved_by(before: nn.Module, after: nn.Module) -> Tensor:
    """The change of all parameters in one vector; with SGD at rate 1, minus the gradient."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(b - a).detach().flatten() for b, a in pairs])


def small_model(depth: int) -> StagedModel:
    """A network with the six stages of a ResNet, BatchNorm in two of them."""
    torch.manual_seed(0)
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    net.relu, net.maxpool = nn.ReLU(), nn.MaxPool2d(2)
    for i in range(1, 5):
        setattr(net, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
    model = StagedModel(net, RESNET)
    model.freeze(depth)
    return model


def pictures(*sizes: int) -> list[Batch]:
    flat = batches_of(*sizes, features=3 * 12 * 12)
    return [(images.view(-1, 3, 12, 12), labels) for images, labels in flat]


# --- What an epoch does ---------------------------------------------------------------------------


def test_the_loss_falls_on_classes_that_a_line_separates() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = F.one_hot(labels, 4).float() + 0.1 * torch.randn(60, 4, generator=draw)
    batches = list(zip(images.split(10), labels.split(10), strict=True))
    model = linear()
    losses = [train(model, batches, lr=1.0).loss for _ in range(10)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.7
    assert losses[-1] < 0.15
    assert accuracy_of(evaluate(model, batches, PLAIN)) == 1.0


def test_an_epoch_is_the_textbook_loop() -> None:
    model = linear()
    twin = copy.deepcopy(model)
    batches = batches_of(5, 5, 3)
    train(model, batches, lr=0.3)
    weight, bias = twin.weight.detach().double(), twin.bias.detach().double()
    for images, labels in batches:
        x = images.double()
        error = torch.softmax(x @ weight.T + bias, dim=1) - F.one_hot(labels, 3)
        weight = weight - 0.3 * error.T @ x / len(labels)
        bias = bias - 0.3 * error.mean(dim=0)
    assert torch.allclose(model.weight.double(), weight, atol=1e-6)
    assert torch.allclose(model.bias.double(), bias, atol=1e-6)


def test_the_schedule_is_stepped_after_each_optimizer_step() -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    train(model, batches_of(2, 2, 2), optimizer=optimizer, schedule=schedule)
    assert optimizer.param_groups[0]["lr"] == 0.125


WEIGHTED = CrossEntropy(class_weights=[1.0, 5.0, 30.0])
LOSSES: list[Loss] = [
    CrossEntropy(),
    WEIGHTED,
    CrossEntropy(class_weights=[1.0, 5.0, 30.0], label_smoothing=0.2),
    Focal(),
    BinaryCrossEntropy(pos_weight=3.0),
    Dice(),
    BceDice(),
    Iou(),
]


@pytest.mark.parametrize("size", [8, 7, 4])
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_computed_in_parts_has_the_gradients_of_the_whole(
    size: int, parts: int, loss: Loss, mixed: bool
) -> None:
    batches = probabilities_of(size) if mixed else batches_of(size)
    start = nn.Sequential(linear(4, 6), nn.Tanh(), linear(6, 3))
    whole, in_parts = copy.deepcopy(start), copy.deepcopy(start)
    once = train(whole, batches, lr=1.0, loss=loss)
    accumulated = train(in_parts, batches, lr=1.0, loss=loss, accumulation_steps=parts)
    assert torch.allclose(moved_by(start, in_parts), moved_by(start, whole), atol=1e-6)
    assert moved_by(start, whole).norm() > 0.01
    assert accumulated.steps == once.steps == 1
    assert accumulated.loss == pytest.approx(once.loss, rel=1e-6)
    assert accumulated.grad_norm == pytest.approx(once.grad_norm, rel=1e-5)


def test_the_loss_of_a_batch_is_divided_by_the_class_weights_of_all_its_parts() -> None:
    # Logits 0: each example costs log 3. The third is of the heavy class.
    labels = torch.tensor([0, 0, 2, 0])
    batch = (torch.eye(4), labels)
    model = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(model.weight)
    before = copy.deepcopy(model)
    metrics = train(model, [batch], lr=1.0, loss=WEIGHTED, accumulation_steps=2)
    assert metrics.loss == pytest.approx(math.log(3))
    weights = torch.tensor([1.0, 1.0, 30.0, 1.0]) / 33
    gradient = ((1 / 3 - F.one_hot(labels, 3)) * weights[:, None]).T
    assert torch.allclose(moved_by(before, model), gradient.flatten(), atol=1e-6)


def test_the_parts_of_a_batch_are_computed_one_after_the_other() -> None:
    seen: list[int] = []
    model = linear()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    train(model, batches_of(8, 7), accumulation_steps=4)
    assert seen == [2, 2, 2, 2, 3, 2, 2]  # none of a single example, which BatchNorm cannot take


# --- Mixed labels, auxiliary classifiers, averages ------------------------------------------------


def probabilities_of(*sizes: int, classes: int = 3) -> list[Batch]:
    """Batches whose labels are class probabilities, as mixing makes them."""
    draw = torch.Generator().manual_seed(5)
    return [
        (images, torch.rand(len(images), classes, generator=draw).softmax(dim=1))
        for images, _ in batches_of(*sizes)
    ]


def mean_cost(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy by its definition: minus the sum of target times log probability."""
    probabilities = torch.softmax(model(images).double(), dim=1)
    return -(targets.double() * probabilities.log()).sum() / len(images)


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_class_probabilities_are_trained_on_in_parts_as_in_the_whole(size: int, parts: int) -> None:
    model = linear()
    before = copy.deepcopy(model)
    batches = probabilities_of(size)
    cost = mean_cost(before, *batches[0])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(cost, before.parameters())])
    metrics = train(model, batches, lr=1.0, accumulation_steps=parts)
    assert torch.allclose(moved_by(before, model), gradient, atol=1e-6)
    assert gradient.norm() > 0.1
    assert metrics.loss == pytest.approx(float(cost.detach()), rel=1e-6)
    assert (metrics.steps, metrics.largest_batch) == (1, size)


def test_the_loss_on_class_probabilities_averages_over_examples_and_not_over_batches() -> None:
    batches = probabilities_of(6, 2)
    model = linear()
    costs = [float(mean_cost(model, *batch).detach()) for batch in batches]
    metrics = train(model, batches, lr=0.0)
    assert metrics.loss == pytest.approx((6 * costs[0] + 2 * costs[1]) / 8, rel=1e-6)


class ThreeHeads(nn.Module):
    """Three linear classifiers, two of them auxiliary, which answer in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.aux1, self.aux2 = linear(), linear(), linear()
        with torch.no_grad():
            self.aux1.weight *= -1
            self.aux2.weight *= 2

    def forward(self, x: Tensor) -> Tensor | WithAux:
        logits = self.head(x)
        return WithAux(logits, (self.aux1(x), self.aux2(x))) if self.training else logits


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_auxiliary_classifiers_add_their_weighted_losses_to_training_and_not_to_evaluation(
    mixed: bool, parts: int
) -> None:
    model = ThreeHeads()
    before = copy.deepcopy(model)
    (batch,) = probabilities_of(6) if mixed else batches_of(6)
    heads = (before.head, before.aux1, before.aux2)
    costs = [F.cross_entropy(head(batch[0]), batch[1]) for head in heads]
    total = costs[0] + 0.3 * (costs[1] + costs[2])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, before.parameters())])
    metrics = train(model, [batch], lr=1.0, aux_weight=0.3, accumulation_steps=parts)
    assert metrics.loss == pytest.approx(float(total.detach()), rel=1e-6)
    assert torch.allclose(moved_by(before, model), gradient, atol=1e-6)
    labels = batches_of(6)[0][1]
    wanted = float(F.cross_entropy(before.head(batch[0]), labels).detach())
    assert evaluate(before, [(batch[0], labels)], PLAIN).loss == pytest.approx(wanted, rel=1e-6)


def test_the_average_takes_in_the_weights_after_each_step() -> None:
    model = small_model(depth=2)
    average = WeightAverage(model, 0.15)
    twin = copy.deepcopy(model)
    batches = pictures(5, 5, 3)
    train(model, batches, lr=0.3, average=average)
    steps = []
    for batch in batches:
        train(twin, [batch], lr=0.3)
        steps.append([p.detach().double().clone() for p in twin.parameters()])
    # The first step as it is, then by a decay of min(0.15, (1 + n) / (10 + n)).
    wanted = steps[0]
    for step in steps[1:]:
        wanted = [0.15 * w + 0.85 * s for w, s in zip(wanted, step, strict=True)]
    for got, by_hand in zip(average.model.parameters(), wanted, strict=True):
        assert torch.allclose(got.double(), by_hand, atol=1e-6)
    assert torch.equal(model.network.fc.weight, twin.network.fc.weight)
    assert not torch.equal(average.model.network.fc.weight, model.network.fc.weight)


def test_following_the_weights_changes_nothing_of_the_training() -> None:
    alone, followed = small_model(depth=2), small_model(depth=2)
    average = WeightAverage(followed, 0.9)
    metrics = train(alone, pictures(5, 3))
    assert train(followed, pictures(5, 3), average=average).loss == metrics.loss
    for name, tensor in alone.state_dict().items():
        assert torch.equal(followed.state_dict()[name], tensor), name


# --- Means over examples --------------------------------------------------------------------------


def logits(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows)


# By hand: -log softmax is log 2 for equal logits, and log(1 + e^-d) and log(1 + e^d) for a
# difference d of the logits in favour of the right and of the wrong class.
UNEVEN: list[Batch] = [
    (logits((0.0, 0.0), (3.0, 0.0), (0.0, 1.0)), torch.tensor([0, 0, 1])),
    (logits((0.0, 5.0)), torch.tensor([0])),
]
UNEVEN_LOSS = (math.log(2) + sum(math.log1p(math.exp(-d)) for d in (3, 1, -5))) / 4


class Bend(nn.Module):
    """Returns its input, which are the logits, plus something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_evaluation_averages_over_examples_and_not_over_batches() -> None:
    scores = evaluate(nn.Identity(), UNEVEN, PLAIN)
    assert scores.loss == pytest.approx(UNEVEN_LOSS, rel=1e-6)
    assert accuracy_of(scores) == 3 / 4
    assert torch.equal(scores.logits, torch.cat([rows for rows, _ in UNEVEN]))
    assert torch.equal(scores.targets, torch.cat([labels for _, labels in UNEVEN]))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_training_loss_averages_over_examples_and_not_over_batches(parts: int) -> None:
    metrics = train(Bend(), UNEVEN, lr=0.0, accumulation_steps=parts)
    assert metrics.loss == pytest.approx(UNEVEN_LOSS, rel=1e-6)
    assert (metrics.steps, metrics.largest_batch) == (2, 3)


def test_labels_are_smoothed_in_training_only() -> None:
    # With smoothing s of two classes, a right answer at log-odds d costs
    # (1 - s / 2) log(1 + e^-d) + s / 2 log(1 + e^d).
    batches = [(logits((2.0, 0.0)), torch.tensor([0]))]
    trained = train(Bend(), batches, lr=0.0, loss=CrossEntropy(label_smoothing=0.2))
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert trained.loss == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-6)
    assert evaluate(nn.Identity(), batches, PLAIN).loss == pytest.approx(right, rel=1e-6)


# --- Clipping and scaling -------------------------------------------------------------------------


def gradient_of(model: nn.Module, batch: Batch) -> Tensor:
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    return torch.cat([p.grad.flatten() for p in twin.parameters()])


@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("share", [0.25, 4.0])
def test_clipping_bounds_the_norm_after_the_scale_is_taken_out(
    share: float, scale: float | None
) -> None:
    model = linear()
    before = copy.deepcopy(model)
    (batch,) = batches_of(6)
    gradient = gradient_of(model, batch)
    norm = float(gradient.norm())
    scaler = GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    metrics = train(model, [batch], lr=1.0, scaler=scaler, clip_norm=share * norm)
    assert torch.allclose(moved_by(before, model), min(1.0, share) * gradient, atol=1e-5)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("share", [0.25, 4.0])
def test_clipping_by_value_cuts_each_number_after_the_scale_is_taken_out(
    share: float, scale: float | None
) -> None:
    model = linear()
    before = copy.deepcopy(model)
    (batch,) = batches_of(6)
    gradient = gradient_of(model, batch)
    limit = share * float(gradient.abs().max())
    by_hand = torch.tensor([min(max(g, -limit), limit) for g in gradient.tolist()])
    assert torch.equal(by_hand, gradient) == (share > 1)
    scaler = GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    metrics = train(model, [batch], lr=1.0, scaler=scaler, clip_value=limit)
    assert torch.allclose(moved_by(before, model), by_hand, atol=1e-5)
    assert metrics.grad_norm == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_clipping_by_value_is_of_the_gradients_of_the_whole_batch() -> None:
    # Two halves that pull in opposite directions: each alone would be cut, their sum is not.
    images = torch.tensor([[10.0, 0.0], [10.0, 0.0], [-9.0, 0.0], [-9.0, 0.0]])
    batch = (images, torch.zeros(4, dtype=torch.int64))
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    before = copy.deepcopy(model)
    gradient = gradient_of(model, batch)
    assert 0 < float(gradient.abs().max()) < 0.5
    train(model, [batch], lr=1.0, clip_value=0.5, accumulation_steps=2)
    assert torch.allclose(moved_by(before, model), gradient, atol=1e-6)


@pytest.mark.parametrize("clip", [{"clip_norm": 1e-3}, {"clip_value": 1e-3}])
def test_the_gradient_norm_is_the_mean_over_steps_before_clipping(clip: dict[str, float]) -> None:
    model = linear()
    batches = batches_of(6, 6, 2)
    norms = [float(gradient_of(model, batch).norm()) for batch in batches]
    metrics = train(model, batches, lr=0.0, **clip)
    assert metrics.grad_norm == pytest.approx(sum(norms) / 3, rel=1e-5)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_a_step_does_things_in_the_only_correct_order(
    clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def spy(owner: object, name: str, told: str) -> None:
        really = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            calls.append(told)
            return really(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = ConstantLR(optimizer, factor=1.0, total_iters=0)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    average = WeightAverage(model, 0.9)
    model.register_forward_hook(lambda *_: calls.append("forward"))
    spy(optimizer, "zero_grad", "zero_grad")
    for name in ("scale", "unscale_", "step", "update"):
        spy(scaler, name, f"scaler.{name}")
    spy(Tensor, "backward", "backward")
    spy(loop, "get_total_norm", "norm")
    spy(loop, "clip_grads_with_norm_", "clip")
    spy(loop, "clip_grad_value_", "clip")
    spy(schedule, "step", "schedule.step")
    spy(average, "update", "average.update")
    options = {"optimizer": optimizer, "schedule": schedule, "scaler": scaler, "average": average}
    limit = {f"clip_{clip}": 1.0}
    train(model, batches_of(4, 4), **options, **limit, accumulation_steps=2)
    part = ["forward", "scaler.scale", "backward"]
    last = ["scaler.unscale_", "norm", "clip", "scaler.step", "scaler.update"]
    told = ["schedule.step", "average.update"]
    assert calls == ["zero_grad", *part, *part, *last, *told] * 2


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 1.0}, {"clip_value": 1.0}])
@pytest.mark.parametrize("chosen", [Sgd(lr=0.1), AdamW(lr=0.1), RmsProp(lr=0.1)])
def test_a_step_whose_scaled_gradients_overflow_is_skipped(
    chosen: Optimizer, clip: dict[str, float]
) -> None:
    model = small_model(depth=5)
    config = TrialConfig(model="resnet18", optimizer=chosen, freeze_depth=5)
    optimizer = build_optimizer(model, config)
    before = copy.deepcopy(model)
    # The largest float32 is 3.4e38: a loss of about 1 overflows when it is scaled by 2 ** 127.
    scaler = GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    batches = pictures(8)
    images, labels = batches[0]
    options = {"optimizer": optimizer, "scaler": scaler, **clip}
    skipped = train(model, [(images * 1e3, labels)], **options)
    assert float(moved_by(before, model).abs().max()) == 0
    assert scaler.get_scale() == 2.0**126
    assert math.isfinite(skipped.loss)
    assert skipped.grad_norm == 0.0  # there is none to speak of

    scaler.update(2.0**10)
    trained = train(model, batches, **options)
    assert float(moved_by(before, model).abs().max()) > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert trained.grad_norm > 0


# --- Divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("logit", "loss"), [(math.nan, "nan"), (-math.inf, "inf")])
@pytest.mark.parametrize("step", [1, 7, 50, 51, 100, 119, 120])
def test_a_loss_that_is_not_finite_is_told_with_its_epoch_and_step(
    step: int, logit: float, loss: str
) -> None:
    # The right class has this logit: log 0 is what a probability of 0 costs.
    batches = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)) for _ in range(120)]
    batches[step - 1][0][0, 0] = logit
    with pytest.raises(Diverged) as caught:
        train(Bend(), batches, lr=1e-3, epoch=4)
    assert (caught.value.epoch, caught.value.step) == (4, step)
    assert str(caught.value) == f"loss became {loss} in epoch 4, step {step}"


def test_a_divergence_is_noticed_before_the_epoch_is_over() -> None:
    taken = []

    def endless() -> Iterator[Batch]:
        images, labels = batches_of(2)[0]
        while True:
            taken.append(1)
            yield images * float("nan"), labels

    with pytest.raises(Diverged):
        train(linear(), endless())
    assert len(taken) == loop.READ_EVERY


# --- Evaluation, modes, precision -----------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_puts_the_models_mode_back(mode: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5), linear())
    model.train(mode)
    modes = []
    model.register_forward_hook(lambda m, *_: modes.append((m.training, m[0].training)))
    evaluate(model, batches_of(3, 2), PLAIN)
    assert modes == [(False, False)] * 2
    assert (model.training, model[0].training) == (mode, mode)


def test_evaluation_changes_nothing_and_computes_no_gradient() -> None:
    model = small_model(depth=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    needed = []
    model.register_forward_hook(lambda *args: needed.append(args[2].requires_grad))
    evaluate(model, pictures(4, 3), PLAIN)
    assert needed == [False, False]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("call", [train, lambda model, none: evaluate(model, none, PLAIN)])
def test_no_examples_are_an_error(call: Any) -> None:
    with pytest.raises(DataError, match="no example"):
        call(linear(), [])


def test_training_sets_the_training_mode_and_keeps_frozen_stages_out_of_it() -> None:
    model = small_model(depth=3)
    model.eval()
    seen = []
    model.register_forward_hook(
        lambda *_: seen.append([s.parameters()[0].requires_grad for s in model.stages])
    )
    modes = []
    for stage in model.stages:
        stage.module[0].register_forward_hook(lambda m, *_: modes.append(m.training))
    train(model, pictures(4), optimizer=sgd_of(model))
    assert seen == [[False] * 3 + [True] * 3]
    assert modes == [False] * 3 + [True] * 3


def sgd_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("depth", range(6))
def test_an_epoch_leaves_frozen_stages_untouched_and_moves_the_rest(depth: int) -> None:
    model = small_model(depth)
    config = TrialConfig(model="resnet18", optimizer=AdamW(lr=0.1), freeze_depth=depth)
    before = [
        {name: tensor.clone() for name, tensor in s.module.state_dict().items()}
        for s in model.stages
    ]
    train(model, pictures(4, 4, 4), optimizer=build_optimizer(model, config))
    for index, (stage, was) in enumerate(zip(model.stages, before, strict=True)):
        same = [torch.equal(was[name], t) for name, t in stage.module.state_dict().items()]
        assert all(same) if index < depth else not any(same), stage.name


@pytest.mark.parametrize(
    ("dtype", "computed_in"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_the_forward_pass_computes_in_the_asked_precision_and_parameters_stay_whole(
    dtype: torch.dtype, computed_in: torch.dtype
) -> None:
    model = small_model(depth=2)
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    precision = Precision("cpu", dtype)
    options = {"optimizer": sgd_of(model), "precision": precision, "scaler": precision.scaler()}
    metrics = train(model, pictures(6, 5), **options)
    scores = evaluate(model, pictures(6), precision)
    assert seen == [computed_in] * 3
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert math.isfinite(metrics.loss)
    assert math.isfinite(scores.loss)


@pytest.mark.parametrize(
    ("dtype", "is_mixed", "scales"),
    [(torch.float32, False, False), (torch.bfloat16, True, False), (torch.float16, True, True)],
)
def test_only_half_precision_needs_a_scale(
    dtype: torch.dtype, is_mixed: bool, scales: bool
) -> None:
    precision = Precision("cpu", dtype)
    assert (precision.is_mixed, precision.scaler().is_enabled()) == (is_mixed, scales)


# --- Not waiting for the device -------------------------------------------------------------------


class Readings(TorchDispatchMode):
    """Counts the operations that hand a number from the device to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.step = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "nonzero", "is_nonzero"):
            self.steps.append(self.step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.1}, {"clip_value": 0.1}])
@pytest.mark.parametrize(
    "chosen", [Sgd(lr=0.01, nesterov=True), AdamW(lr=0.01), RmsProp(lr=0.01, momentum=0.9)]
)
def test_no_step_waits_for_the_device_between_two_readings(
    chosen: Optimizer, clip: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = Readings()

    def read(name: str) -> None:
        really = getattr(Tensor, name)

        def spy(tensor: Tensor, *args: object) -> object:
            readings.steps.append(readings.step)
            return really(tensor, *args)

        monkeypatch.setattr(Tensor, name, spy)

    for name in ("tolist", "item", "numpy", "cpu", "__float__", "__int__", "__bool__"):
        read(name)

    def counted(batches: list[Batch]) -> Iterator[Batch]:
        for batch in batches:
            readings.step += 1
            yield batch

    model = small_model(depth=4)
    config = TrialConfig(model="resnet18", optimizer=chosen, freeze_depth=4)
    optimizer = build_optimizer(model, config)
    batches = pictures(*[4] * 120)
    with readings:
        metrics = train(model, counted(batches), optimizer=optimizer, **clip, accumulation_steps=2)
    assert metrics.steps == 120
    assert set(readings.steps) == {50, 100, 120}


def test_evaluation_reads_the_device_once_at_the_end() -> None:
    readings = Readings()

    def counted() -> Iterator[Batch]:
        for batch in pictures(*[4] * 20):
            readings.step += 1
            yield batch

    model = small_model(depth=0)
    with readings:
        evaluate(model, counted(), PLAIN)
    assert set(readings.steps) == {20}


# --- Times ----------------------------------------------------------------------------------------


def test_images_per_second_and_the_wait_for_data_are_told_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow_data() -> Iterator[Batch]:
        for batch in batches_of(6, 4):
            now[0] += 1
            yield batch

    def slow_forward(*_: object) -> None:
        now[0] += 3

    model = linear()
    model.register_forward_hook(slow_forward)
    metrics = train(model, slow_data())
    # 10 images in 2 * (1 + 3) seconds, a quarter of them spent on data.
    assert metrics.images_per_s == pytest.approx(10 / 8)
    assert metrics.data_wait == pytest.approx(0.25)
