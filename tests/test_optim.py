import io
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from tuneapp.config import (
    Adam,
    AdamW,
    Constant,
    Cosine,
    OneCycle,
    Optimizer,
    Schedule,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.errors import ConfigError
from tuneapp.models import RESNET, StagedModel, build_network
from tuneapp.optim import build_optimizer, build_schedule, warmup_steps

NAMES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")


def small_model(depth: int = 0) -> StagedModel:
    """A network with the six stages of a ResNet and a handful of numbers."""
    torch.manual_seed(0)
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    net.relu, net.maxpool = nn.ReLU(), nn.Identity()
    for i in range(1, 5):
        setattr(net, f"layer{i}", nn.Conv2d(4, 4, 1))
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
    model = StagedModel(net, RESNET)
    model.freeze(depth)
    return model


def config_of(**values: object) -> TrialConfig:
    return TrialConfig(**{"model": "resnet18", "optimizer": Sgd(lr=1.0), **values})


# --- Groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(6))
def test_each_trained_stage_is_a_group_of_its_own_with_its_name_and_rate(depth: int) -> None:
    model = small_model(depth)
    config = config_of(freeze_depth=depth, lr_ratio=0.5, optimizer=AdamW(lr=0.32))
    groups = build_optimizer(model, config).param_groups
    assert [group["name"] for group in groups] == list(NAMES[depth:])
    rates = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32][depth:]
    assert [group["lr"] for group in groups] == pytest.approx(rates, rel=1e-12)
    for group, name in zip(groups, NAMES[depth:], strict=True):
        modules = ["conv1", "bn1"] if name == "stem" else ["fc"] if name == "head" else [name]
        own = [p for m in modules for p in getattr(model.network, m).parameters()]
        assert [id(p) for p in group["params"]] == [id(p) for p in own]


@pytest.mark.parametrize(
    ("chosen", "kind", "wanted"),
    [
        (
            Sgd(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.03),
            torch.optim.SGD,
            {"momentum": 0.8, "nesterov": True, "weight_decay": 0.03, "dampening": 0},
        ),
        (
            Sgd(lr=0.1, momentum=0.0),
            torch.optim.SGD,
            {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
        ),
        (
            Adam(lr=0.1, beta1=0.8, beta2=0.95, weight_decay=0.03),
            torch.optim.Adam,
            {"betas": (0.8, 0.95), "weight_decay": 0.03, "decoupled_weight_decay": False},
        ),
        (
            AdamW(lr=0.1, beta1=0.7, beta2=0.9),
            torch.optim.AdamW,
            {"betas": (0.7, 0.9), "weight_decay": 0.01, "decoupled_weight_decay": True},
        ),
    ],
)
def test_the_optimizer_has_the_hyper_parameters_of_its_configuration(
    chosen: Optimizer, kind: type[torch.optim.Optimizer], wanted: dict[str, object]
) -> None:
    optimizer = build_optimizer(small_model(), config_of(optimizer=chosen))
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert {name: group[name] for name in wanted} == wanted


def sgd_by_hand(
    x: float, g: float, steps: int, *, lr: float, momentum: float, decay: float, nesterov: bool
) -> float:
    velocity = 0.0
    for _ in range(steps):
        d = g + decay * x
        velocity = momentum * velocity + d
        x -= lr * (d + momentum * velocity if nesterov else velocity)
    return x


def adam_by_hand(
    x: float, g: float, steps: int, *, lr: float, b1: float, b2: float, decay: float, coupled: bool
) -> float:
    m = v = 0.0
    for t in range(1, steps + 1):
        d = g + decay * x if coupled else g
        x -= 0.0 if coupled else lr * decay * x
        m, v = b1 * m + (1 - b1) * d, b2 * v + (1 - b2) * d * d
        x -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + 1e-8)
    return x


@pytest.mark.parametrize(
    ("chosen", "by_hand"),
    [
        (
            Sgd(lr=0.1, momentum=0.8, weight_decay=0.03, nesterov=nesterov),
            lambda x, g, nesterov=nesterov: sgd_by_hand(
                x, g, 4, lr=0.1, momentum=0.8, decay=0.03, nesterov=nesterov
            ),
        )
        for nesterov in (False, True)
    ]
    + [
        (
            kind(lr=0.1, beta1=0.8, beta2=0.95, weight_decay=0.3),
            lambda x, g, kind=kind: adam_by_hand(
                x, g, 4, lr=0.1, b1=0.8, b2=0.95, decay=0.3, coupled=kind is Adam
            ),
        )
        for kind in (Adam, AdamW)
    ],
)
def test_four_steps_of_each_optimizer_are_those_of_its_paper(
    chosen: Optimizer, by_hand: Callable[[float, float], float]
) -> None:
    model = small_model(depth=5)
    optimizer = build_optimizer(model, config_of(freeze_depth=5, optimizer=chosen))
    bias = model.network.fc.bias
    with torch.no_grad():
        bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    gradient = [0.3, -0.7, 0.1]
    for _ in range(4):
        bias.grad = torch.tensor(gradient)
        model.network.fc.weight.grad = torch.zeros_like(model.network.fc.weight)
        optimizer.step()
    wanted = [by_hand(x, g) for x, g in zip([0.5, -1.0, 2.0], gradient, strict=True)]
    assert bias.tolist() == pytest.approx(wanted, rel=1e-5)


# --- Schedules as sequences of numbers ------------------------------------------------------------


def rates(config: TrialConfig, steps_per_epoch: int) -> list[list[float]]:
    """The learning rate of every group at each optimizer step."""
    optimizer = build_optimizer(small_model(config.freeze_depth), config)
    schedule = build_schedule(optimizer, config, steps_per_epoch)
    seen = []
    for _ in range(config.epochs * steps_per_epoch):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def rise(lr: float, steps: int) -> list[float]:
    """A linear warm-up from a hundredth of `lr`, which is reached after the last of `steps`."""
    return [lr * (0.01 + 0.99 * t / steps) for t in range(steps)]


ROOT_HALF = math.sqrt(0.5)

# Every number by hand, for lr 1: what each kind makes of a few steps.
BY_HAND: list[tuple[Schedule, int, int, list[float]]] = [
    (Constant(), 2, 3, [1.0] * 6),
    (Constant(warmup_fraction=0.5), 2, 2, [0.01, 0.505, 1.0, 1.0]),
    (Step(every_epochs=1), 3, 2, [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]),
    (Step(every_epochs=2, gamma=0.5), 5, 1, [1.0, 1.0, 0.5, 0.5, 0.25]),
    # The steps of the warm-up come before the first epoch of the staircase.
    (
        Step(every_epochs=1, gamma=0.5, warmup_fraction=0.25),
        4,
        2,
        [0.01, 0.505, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25],
    ),
    (Cosine(), 2, 2, [1.0, (1 + ROOT_HALF) / 2, 0.5, (1 - ROOT_HALF) / 2]),
    (
        Cosine(warmup_fraction=1 / 3),
        3,
        2,
        [0.01, 0.505, 1.0, (1 + ROOT_HALF) / 2, 0.5, (1 - ROOT_HALF) / 2],
    ),
    # 3 steps up from 1 / 4 and 3 down to 1 / 4 / 10, half a cosine each.
    (
        OneCycle(pct_start=0.5, div_factor=4, final_div_factor=10),
        3,
        2,
        [0.25, 0.625, 1.0, 0.025 + 0.975 * 0.75, 0.025 + 0.975 * 0.25, 0.025],
    ),
]


@pytest.mark.parametrize(("schedule", "epochs", "steps_per_epoch", "wanted"), BY_HAND)
def test_schedules_are_these_numbers(
    schedule: Schedule, epochs: int, steps_per_epoch: int, wanted: list[float]
) -> None:
    config = config_of(schedule=schedule, epochs=epochs, freeze_depth=5)
    assert [lr for (lr,) in rates(config, steps_per_epoch)] == pytest.approx(wanted, abs=1e-9)


def formula(schedule: Schedule, lr: float, epochs: int, steps_per_epoch: int) -> list[float]:
    """What the documentation of each kind says, in closed form."""
    total = epochs * steps_per_epoch
    if isinstance(schedule, OneCycle):
        top = schedule.pct_start * total - 1
        start = lr / schedule.div_factor
        end = start / schedule.final_div_factor
        numbers = []
        for t in range(total):
            low, share = (
                (start, t / top) if t <= top else (end, (total - 1 - t) / (total - 1 - top))
            )
            numbers.append(low + (lr - low) * (1 - math.cos(math.pi * share)) / 2)
        return numbers
    warmup = {0.0: 0, 0.1: math.ceil(total / 10), 0.3: math.ceil(3 * total / 10)}[
        schedule.warmup_fraction
    ]
    rest = total - warmup
    if isinstance(schedule, Constant):
        main = [lr] * rest
    elif isinstance(schedule, Step):
        length = schedule.every_epochs * steps_per_epoch
        main = [lr * schedule.gamma ** (u // length) for u in range(rest)]
    else:
        main = [lr * (1 + math.cos(math.pi * u / rest)) / 2 for u in range(rest)]
    return rise(lr, warmup) + main


SHAPES = [(3, 4), (2, 5), (1, 7), (6, 1), (10, 13)]
KINDS: list[Schedule] = [
    Constant(),
    Constant(warmup_fraction=0.3),
    Step(every_epochs=2, gamma=0.3),
    Step(every_epochs=1, gamma=0.5, warmup_fraction=0.1),
    Cosine(),
    Cosine(warmup_fraction=0.1),
    Cosine(warmup_fraction=0.3),
    OneCycle(),
    OneCycle(pct_start=0.4, div_factor=5, final_div_factor=100),
]


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), SHAPES)
@pytest.mark.parametrize("schedule", KINDS, ids=repr)
def test_every_stage_follows_the_formula_of_its_schedule_at_its_own_rate(
    schedule: Schedule, epochs: int, steps_per_epoch: int
) -> None:
    config = config_of(schedule=schedule, epochs=epochs, freeze_depth=3, lr_ratio=0.2)
    seen = rates(config, steps_per_epoch)
    assert len(seen) == epochs * steps_per_epoch
    for column, peak in zip(zip(*seen, strict=True), (0.04, 0.2, 1.0), strict=True):
        wanted = formula(schedule, peak, epochs, steps_per_epoch)
        assert column == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", KINDS, ids=repr)
def test_a_schedule_that_was_stored_and_read_goes_on_to_the_same_numbers(
    schedule: Schedule,
) -> None:
    config = config_of(schedule=schedule, epochs=3, freeze_depth=4, lr_ratio=0.5)
    whole = rates(config, 4)
    for done in range(12):
        optimizer = build_optimizer(small_model(4), config)
        running = build_schedule(optimizer, config, 4)
        for _ in range(done):
            optimizer.step()
            running.step()
        stored = io.BytesIO()
        torch.save([optimizer.state_dict(), running.state_dict()], stored)

        stored.seek(0)
        optimizer_state, schedule_state = torch.load(stored, weights_only=True)
        optimizer = build_optimizer(small_model(4), config)
        running = build_schedule(optimizer, config, 4)
        optimizer.load_state_dict(optimizer_state)
        running.load_state_dict(schedule_state)
        rest = []
        for _ in range(12 - done):
            rest.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            running.step()
        assert rest == whole[done:], f"stored after {done} steps"


def test_one_cycle_leaves_the_momentum_as_it_was_asked() -> None:
    for chosen, name in ((Sgd(lr=1.0, momentum=0.7), "momentum"), (AdamW(lr=1.0), "betas")):
        config = config_of(optimizer=chosen, schedule=OneCycle(), epochs=3)
        optimizer = build_optimizer(small_model(), config)
        schedule = build_schedule(optimizer, config, 4)
        asked = 0.7 if name == "momentum" else (0.9, 0.999)
        for _ in range(12):
            assert [group[name] for group in optimizer.param_groups] == [asked] * 6
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(
    ("schedule", "epochs", "steps_per_epoch", "wanted"),
    [
        (Cosine(), 10, 10, 0),
        (Cosine(warmup_fraction=0.1), 1, 10, 1),
        (Cosine(warmup_fraction=0.1), 1, 11, 2),  # 1.1 is rounded up
        (Step(every_epochs=1, warmup_fraction=0.25), 5, 2, 3),
        (Constant(warmup_fraction=0.001), 1, 10, 1),
        (Constant(warmup_fraction=0.99), 1, 3, 2),  # a step is left for the rest
        (Constant(warmup_fraction=0.99), 1, 1, 0),
        (OneCycle(), 10, 10, 0),
    ],
)
def test_the_warm_up_takes_its_share_of_all_steps_rounded_up(
    schedule: Schedule, epochs: int, steps_per_epoch: int, wanted: int
) -> None:
    config = config_of(schedule=schedule, epochs=epochs)
    assert warmup_steps(config, steps_per_epoch) == wanted


def test_momentum_is_whole_after_a_first_step_that_float16_skipped(config: TrialConfig) -> None:
    model = StagedModel(build_network("resnet18", 3), RESNET)
    model.freeze(5)
    optimizer = build_optimizer(model, replace(config, optimizer=Sgd(lr=0.1)))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))  # the scaler begins with its first use
    for parameter in model.stages[-1].parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    for state in optimizer.state.values():
        buffer = state.get("momentum_buffer")
        assert buffer is None or torch.isfinite(buffer).all()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (2, 5), (1, 3), (10, 1)])
def test_one_cycle_can_be_as_short_as_one_likes(
    epochs: int, steps: int, config: TrialConfig
) -> None:
    model = StagedModel(build_network("resnet18", 3), RESNET)
    model.freeze(5)
    short = replace(config, epochs=epochs, schedule=OneCycle(pct_start=0.1))
    optimizer = build_optimizer(model, short)
    schedule = build_schedule(optimizer, short, steps)
    rates = []
    for _ in range(epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.01)
    assert rates[0] == pytest.approx(0.01 / 25)
    with pytest.raises(ConfigError, match="OneCycle needs 3 optimizer steps, this training has 2"):
        build_schedule(optimizer, replace(short, epochs=2), 1)


def test_a_warm_up_of_seven_hundredths_of_a_hundred_steps_takes_seven() -> None:
    config = TrialConfig(
        model="resnet18", optimizer=Sgd(lr=1), epochs=10, schedule=Cosine(warmup_fraction=0.07)
    )
    assert warmup_steps(config, 10) == 7
