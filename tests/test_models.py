from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tuneapp.config import AdamW, Sgd, TrialConfig
from tuneapp.errors import ConfigError
from tuneapp.models import (
    FAMILIES,
    StagedModel,
    build_network,
    check_model,
    count_parameters,
    find_family,
    seed_everything,
    stage_lrs,
)

NAMES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")

# What the names of a ResNet's parameters in each stage begin with.
PREFIXES = {
    "stem": ("conv1.", "bn1."),
    "layer1": ("layer1.",),
    "layer2": ("layer2.",),
    "layer3": ("layer3.",),
    "layer4": ("layer4.",),
    "head": ("fc.",),
}


def staged(model: str = "resnet18", classes: int = 3) -> StagedModel:
    torch.manual_seed(0)
    return StagedModel(build_network(model, classes), find_family(model))


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def config_of(**values: object) -> TrialConfig:
    return TrialConfig(**{"model": "resnet18", "optimizer": AdamW(lr=0.1), **values})


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- Stages ---------------------------------------------------------------------------------------


def as_if_trained(net: StagedModel) -> StagedModel:
    """A fresh BatchNorm does nothing in evaluation: it could stand anywhere."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_the_stages_compute_what_the_network_computes_to_the_last_bit(
    model: str, pictures: Tensor
) -> None:
    net = as_if_trained(staged(model)).eval()
    with torch.no_grad():
        assert torch.equal(net(pictures), net.network(pictures))


@pytest.mark.parametrize("model", FAMILIES)
def test_the_stages_of_every_member_share_out_its_parameters_and_buffers(model: str) -> None:
    with torch.device("meta"):
        network = build_network(model, 7)
    net = StagedModel(network, find_family(model))
    assert [stage.name for stage in net.stages] == list(NAMES)
    of_stage = {
        id(tensor): stage.name
        for stage in net.stages
        for tensor in (*stage.module.parameters(), *stage.module.buffers())
    }
    own = [*network.named_parameters(), *network.named_buffers()]
    assert len(of_stage) == len(own)
    for name, tensor in own:
        assert name.startswith(PREFIXES[of_stage[id(tensor)]]), name
    assert sum(len(stage.parameters()) for stage in net.stages) == len(list(net.parameters()))


@pytest.mark.parametrize("model", FAMILIES)
def test_the_head_of_every_member_has_the_size_of_the_classes(model: str) -> None:
    family = find_family(model)
    with torch.device("meta"):
        wanted = torchvision.models.get_model(model, num_classes=7).state_dict()
        network = build_network(model, 7)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in wanted.items()}
    assert {n for n in shapes if n.startswith(family.head_prefix)} == {"fc.weight", "fc.bias"}
    assert shapes["fc.bias"] == (7,)


def test_every_resnet_of_torchvision_has_stages() -> None:
    named = {m for m in torchvision.models.list_models(torchvision.models) if "resne" in m}
    assert set(FAMILIES) == named


def test_parameters_are_counted_as_in_the_papers_network() -> None:
    stages = staged(classes=1000).stages
    assert count_parameters(stages) == 11_689_512  # torchvision's table of weights
    assert count_parameters(stages[5:]) == 512 * 1000 + 1000
    assert count_parameters(stages[:1]) == 3 * 64 * 7 * 7 + 2 * 64


@pytest.mark.parametrize("depth", range(7))
def test_the_later_stages_go_on_from_what_the_earlier_ones_made(
    depth: int, pictures: Tensor
) -> None:
    net = staged().eval()
    with torch.no_grad():
        features = pictures
        for stage in net.stages[:depth]:
            features = stage.module(features)
        assert torch.equal(net(features, first_stage=depth), net.network(pictures))


# --- Freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(6))
def test_freezing_freezes_the_first_stages_and_nothing_else(depth: int) -> None:
    net = staged()
    net.freeze(depth)
    frozen = tuple(prefix for name in NAMES[:depth] for prefix in PREFIXES[name])
    for name, parameter in net.network.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen)), name


def test_freezing_less_thaws() -> None:
    net = staged()
    net.freeze(5)
    net.freeze(2)
    assert [s.parameters()[0].requires_grad for s in net.stages] == [False] * 2 + [True] * 4
    assert [m.training for m in net.network.children()][4:] == [False, True, True, True, True, True]


@pytest.mark.parametrize("depth", range(6))
def test_frozen_stages_stay_in_eval_mode_whatever_train_is_told(depth: int) -> None:
    net = staged()
    net.freeze(depth)
    net.eval()
    net.train()
    frozen = tuple(prefix for name in NAMES[:depth] for prefix in PREFIXES[name])
    norms = [
        (name, module)
        for name, module in net.network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    assert len(norms) == 20
    for name, module in norms:
        assert module.training == (not f"{name}.".startswith(frozen)), name
    net.eval()
    assert not any(module.training for _, module in norms)


def test_a_training_step_leaves_frozen_stages_and_their_statistics_alone(
    pictures: Tensor,
) -> None:
    net = staged()
    net.freeze(3)
    net.train()
    before = snapshot(net.network)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(pictures).square().sum().backward()
    optimizer.step()
    frozen = tuple(prefix for name in NAMES[:3] for prefix in PREFIXES[name])
    moved = changed(before, net.network.state_dict())
    assert moved == {name for name in before if not name.startswith(frozen)}
    assert "layer3.0.bn1.running_mean" in moved


# --- Learning rates -------------------------------------------------------------------------------

# lr 0.1 and ratio 1/2: halved for each stage below the head.
HALVED = {
    "stem": 0.003125,
    "layer1": 0.00625,
    "layer2": 0.0125,
    "layer3": 0.025,
    "layer4": 0.05,
    "head": 0.1,
}


@pytest.mark.parametrize("depth", range(6))
def test_each_stage_learns_slower_than_the_one_above_it_by_the_ratio(depth: int) -> None:
    lrs = stage_lrs(config_of(lr_ratio=0.5, freeze_depth=depth))
    assert list(lrs) == list(NAMES[depth:])
    assert lrs == pytest.approx({name: HALVED[name] for name in NAMES[depth:]}, rel=1e-12)


def test_with_a_ratio_of_one_all_stages_learn_alike() -> None:
    assert stage_lrs(config_of(optimizer=Sgd(lr=0.3))) == dict.fromkeys(NAMES, 0.3)


@pytest.mark.parametrize("depth", range(6))
def test_a_mapping_gives_each_stage_its_own_share(depth: int) -> None:
    shares = dict(zip(NAMES, (0.1, 0.2, 0.5, 2.0, 3.0, 10.0), strict=True))
    wanted = {"stem": 0.01, "layer1": 0.02, "layer2": 0.05, "layer3": 0.2, "layer4": 0.3, "head": 1}
    lrs = stage_lrs(config_of(lr_ratio=shares, freeze_depth=depth))
    assert lrs == pytest.approx({name: wanted[name] for name in NAMES[depth:]}, rel=1e-12)


# --- Names and mistakes ---------------------------------------------------------------------------


def check_model_or_raise(name: str) -> None:
    mistakes = check_model(config_of(model=name))
    assert len(mistakes) == 1
    raise ConfigError(mistakes[0])


@pytest.mark.parametrize(
    "find", [find_family, lambda name: build_network(name, 3), check_model_or_raise]
)
def test_an_unknown_model_is_refused_with_the_nearest_name(
    find: Callable[[str], object],
) -> None:
    with pytest.raises(ConfigError, match=r"'resnet81' is unknown; did you mean 'resnet18'\?"):
        find("resnet81")


@pytest.mark.parametrize("model", ["vit_b_16", "mobilenet_v3_small", "convnext_tiny"])
def test_a_model_whose_family_has_no_stages_yet_is_told_apart_from_a_typo(model: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{model}' has no stages .*known: resnet18, "):
        find_family(model)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"freeze_depth": 5},
        {"lr_ratio": dict.fromkeys(NAMES, 1.0)},
        {"freeze_depth": 4, "lr_ratio": {"layer4": 0.1, "head": 1.0}},
        # The share of a frozen stage cannot matter, so it may be given.
        {"freeze_depth": 5, "lr_ratio": {"layer4": 0.1, "head": 1.0}},
    ],
)
def test_configurations_that_fit_the_model_have_no_mistakes(values: dict[str, object]) -> None:
    assert check_model(config_of(**values)) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"freeze_depth": 6}, ["freeze_depth 6", "resnet18", "0 to 5", "stem", "head"]),
        (
            {"lr_ratio": {**dict.fromkeys(NAMES, 1.0), "layer5": 1.0}},
            ["unknown: layer5;", "missing: none"],
        ),
        (
            {"freeze_depth": 3, "lr_ratio": {"head": 1.0, "Layer3": 1.0}},
            ["unknown: Layer3;", "missing: layer3, layer4"],
        ),
    ],
)
def test_what_does_not_fit_the_model_is_named_with_what_does(
    values: dict[str, object], told: list[str]
) -> None:
    (mistake,) = check_model(config_of(**values))
    assert all(words in mistake for words in told)


# --- Seeds ----------------------------------------------------------------------------------------


def head_of(seed: int, trial_seed: int) -> bytes:
    seed_everything(seed, trial_seed)
    return torch.randn(8).numpy().tobytes()


def test_seeds_of_the_run_and_of_the_trial_do_not_stand_in_for_each_other() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1)]
    assert len({head_of(*pair) for pair in pairs}) == len(pairs)


def test_the_same_seeds_draw_the_same_whatever_was_drawn_before() -> None:
    first = head_of(3, 4)
    torch.manual_seed(99)
    torch.randn(5)
    assert head_of(3, 4) == first


def test_a_network_is_drawn_from_the_seeds_alone() -> None:
    def draw(seed: int) -> dict[str, Tensor]:
        seed_everything(0, seed)
        return build_network("resnet18", 3).state_dict()

    first = draw(0)
    assert changed(first, draw(0)) == set()
    assert {"fc.weight", "conv1.weight"} <= changed(first, draw(1))
