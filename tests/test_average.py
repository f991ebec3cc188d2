import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tuneapp.average import WeightAverage
from tuneapp.config import Sgd, TrialConfig
from tuneapp.families import FAMILIES, RESNET
from tuneapp.models import apply_freezing
from tuneapp.staged import StagedModel

CONFIG = TrialConfig(model="resnet18", optimizer=Sgd(lr=0.1), freeze_depth=4, unfreeze_at={2: 2})


def staged(config: TrialConfig = CONFIG) -> StagedModel:
    """A network with the six stages of a ResNet, BatchNorm and its counters in five of them."""
    torch.manual_seed(0)
    net = nn.Module()
    net.conv1, net.bn1, net.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    net.maxpool = nn.MaxPool2d(2)
    for i in range(1, 5):
        setattr(net, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
    model = StagedModel(net, RESNET)
    apply_freezing(model, config)
    return model


def step(model: StagedModel, draw: torch.Generator) -> dict[str, Tensor]:
    """Change everything that training changes; return what it is now."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.randn(tensor.shape, generator=draw)
            else:
                tensor += 7  # batches that BatchNorm has seen
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_hand(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The recursion in float64: the first step as it is, then blended in with a rising decay.

    Whole numbers are those of the last step.
    """
    average = {name: tensor.double() for name, tensor in steps[0].items()}
    for n, now in enumerate(steps[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        for name, tensor in now.items():
            blended = d * average[name] + (1 - d) * tensor.double()
            average[name] = blended if tensor.is_floating_point() else tensor.double()
    return average


def bytes_of(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@pytest.mark.parametrize("decay", [0.15, 0.5, 0.999])
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_the_average_is_the_recursion_with_its_rising_decay(decay: float, count: int) -> None:
    model = staged()
    average = WeightAverage(model, decay)
    draw = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(count):
        steps.append(step(model, draw))
        average.update(model)
    wanted = by_hand(steps, decay)
    got = average.model.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert tensor.dtype == steps[0][name].dtype, name
        assert torch.allclose(tensor.double(), wanted[name], rtol=1e-5, atol=1e-5), name


def test_the_statistics_of_batchnorm_are_averaged_and_its_counters_copied() -> None:
    model = staged()
    average = WeightAverage(model, 0.999)
    norm, averaged = model.network.bn1, average.model.network.bn1
    for mean, counter in ((10.0, 100), (20.0, 200)):
        norm.running_mean.fill_(mean)
        norm.num_batches_tracked.fill_(counter)
        average.update(model)
    # The second step is blended in by 1 - (1 + 1) / (10 + 1).
    assert averaged.running_mean.tolist() == pytest.approx([10 * 2 / 11 + 20 * 9 / 11] * 4)
    assert averaged.num_batches_tracked.dtype == torch.int64
    assert int(averaged.num_batches_tracked) == 200


def test_what_does_not_change_is_its_own_average_to_the_last_bit() -> None:
    model = staged()
    with torch.no_grad():
        model.network.conv1.weight /= 3
    average = WeightAverage(model, 0.97)
    before = bytes_of(model.state_dict())
    for _ in range(30):
        average.update(model)
    assert bytes_of(average.model.state_dict()) == before


def test_the_asked_decay_is_reached_and_never_exceeded() -> None:
    # (1 + n) / (10 + n) is 1/2 at n = 8; from then on each step takes half of what is new.
    model = staged()
    average = WeightAverage(model, 0.5)
    weight, averaged = model.network.fc.bias, average.model.network.fc.bias
    shares = []
    for n in range(12):
        before = averaged.clone()
        with torch.no_grad():
            weight.copy_(before + 1)
        average.update(model)
        shares.append(float((averaged - before).detach().mean()))
        wanted = 1.0 if n == 0 else max(0.5, 1 - (1 + n) / (10 + n))
        assert shares[-1] == pytest.approx(wanted, abs=1e-5), n
    assert shares == sorted(shares, reverse=True)


def test_an_average_goes_on_from_its_state_to_the_same_bits() -> None:
    model = staged()
    average = WeightAverage(model, 0.9)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        step(model, draw)
        average.update(model)
    saved = copy.deepcopy(average.state_dict())
    other = WeightAverage(staged(), 0.9)
    step(other.model, torch.Generator().manual_seed(9))
    other.load_state_dict(saved)
    assert bytes_of(other.state_dict()) == bytes_of(saved)
    for _ in range(3):
        step(model, draw)
        average.update(model)
        other.update(model)
    assert bytes_of(other.state_dict()) == bytes_of(average.state_dict())
    assert bytes_of(other.state_dict()) != bytes_of(saved)


def test_the_state_is_the_model_under_a_prefix_and_the_number_of_steps() -> None:
    model = staged()
    average = WeightAverage(model, 0.9)
    for _ in range(4):
        average.update(model)
    state = average.state_dict()
    assert {f"module.{name}" for name in model.state_dict()} | {"n_averaged"} == set(state)
    assert int(state["n_averaged"]) == 4


def test_the_average_shares_nothing_with_the_model_and_is_not_trained() -> None:
    model = staged()
    average = WeightAverage(model, 0.9)
    assert average.model is not model
    own = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert all(t.data_ptr() not in own for t in average.model.parameters())
    assert all(t.data_ptr() not in own for t in average.model.buffers())
    # The stages of the copy are pieces of the copy.
    parts = {id(p) for stage in average.model.stages for p in stage.parameters()}
    assert parts == {id(p) for p in average.model.network.parameters()}

    before = bytes_of(average.model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert bytes_of(average.model.state_dict()) == before
    average.update(model)
    assert bytes_of(average.model.state_dict()) != before
    assert all(p.grad is None for p in average.model.parameters())


def test_an_update_leaves_the_model_its_modes_and_its_gradients_as_they_are() -> None:
    model = staged()
    average = WeightAverage(model, 0.9)
    model.train()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    before = bytes_of(model.state_dict())
    modes = [m.training for m in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    for _ in range(3):
        average.update(model)
    assert bytes_of(model.state_dict()) == before
    assert [m.training for m in model.modules()] == modes
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("frozen_batchnorm", ["eval", "train"])
def test_the_average_follows_what_is_unfrozen_later_and_stays_in_evaluation(
    frozen_batchnorm: str,
) -> None:
    config = TrialConfig(
        model="resnet18",
        optimizer=Sgd(lr=0.1),
        freeze_depth=4,
        unfreeze_at={2: 2},
        frozen_batchnorm=frozen_batchnorm,  # type: ignore[arg-type]
    )
    model = staged(config)
    average = WeightAverage(model, 0.9)
    average.update(model)
    assert apply_freezing(model, config, epoch=2)
    with torch.no_grad():
        for stage in model.stages[2:]:
            for parameter in stage.parameters():
                parameter += 1.0
    before = copy.deepcopy(average.model.state_dict())
    average.update(model)
    for index, stage in enumerate(average.model.stages):
        for parameter in stage.parameters():
            (name,) = [n for n, p in average.model.named_parameters() if p is parameter]
            moved = (parameter - before[name]).detach()
            # 1 - (1 + 1) / (10 + 1) of the one by which it changed.
            assert torch.allclose(moved, torch.full_like(moved, 9 / 11 if index >= 2 else 0.0))
    # As it is evaluated: nothing of it takes statistics of the validation images.
    average.model.eval()
    assert not any(m.training for m in average.model.modules())
    seen = bytes_of(average.model.state_dict())
    average.model(torch.randn(4, 3, 8, 8))
    assert bytes_of(average.model.state_dict()) == seen


def test_tables_of_positions_stay_what_they_are() -> None:
    # Swin looks its biases up by them; an average that rounds 2.9999 down would mix them up.
    torch.manual_seed(0)
    model = StagedModel(torchvision.models.swin_t(num_classes=3), FAMILIES["swin_t"])
    average = WeightAverage(model, 0.99)
    for _ in range(50):
        average.update(model)
    tables = {n: b for n, b in model.named_buffers() if b.dtype == torch.int64}
    assert len(tables) == 12
    averaged = dict(average.model.named_buffers())
    assert all(torch.equal(averaged[name], table) for name, table in tables.items())
