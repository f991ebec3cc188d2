import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import StochasticDepth

from tuneapp.config import AdamW, Sgd, TrialConfig
from tuneapp.errors import ConfigError
from tuneapp.fit import check_image_size, check_model, skeleton
from tuneapp.models import (
    build_network,
    build_staged,
    count_parameters,
    find_family,
    freeze_as,
    freeze_depth_in,
    seed_everything,
    set_dropout,
    stage_lrs,
)
from tuneapp.staged import StagedModel

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


def on_meta(model: str) -> nn.Module:
    with torch.device("meta"):
        return build_network(model, 3)


@pytest.fixture
def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def config_of(**values: object) -> TrialConfig:
    return TrialConfig(**{"model": "resnet18", "optimizer": AdamW(lr=0.1), **values})


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def prefixes_below(depth: int) -> tuple[str, ...]:
    return tuple(prefix for name in NAMES[:depth] for prefix in PREFIXES[name])


def trained_names(net: StagedModel) -> set[str]:
    return {name for name, p in net.network.named_parameters() if p.requires_grad}


def norms_of(net: StagedModel) -> dict[str, nn.Module]:
    found = {n: m for n, m in net.network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(found) == 20
    return found


# --- Stages ---------------------------------------------------------------------------------------


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


def names_of(model: str) -> list[str]:
    return [stage.name for stage in skeleton(model).stages]


def test_a_networks_stages_are_named_without_its_numbers() -> None:
    assert names_of("resnet18") == list(NAMES)
    assert names_of("googlenet") == ["stem", "inception3", "inception4", "inception5", "head"]


# --- Freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(6))
def test_freezing_freezes_the_first_stages_and_nothing_else(depth: int) -> None:
    net = staged()
    net.freeze(depth)
    for name, parameter in net.network.named_parameters():
        assert parameter.requires_grad == (not name.startswith(prefixes_below(depth))), name
    assert [net.is_frozen(stage) for stage in net.stages] == [i < depth for i in range(6)]


def test_freezing_less_thaws() -> None:
    net = staged()
    net.freeze(5)
    net.freeze(2)
    assert [s.parameters()[0].requires_grad for s in net.stages] == [False] * 2 + [True] * 4
    assert [m.training for m in net.network.children()][4:] == [False, True, True, True, True, True]


def test_the_trained_parameters_of_a_stage_are_those_not_frozen() -> None:
    net = staged()
    net.freeze_matching(["layer1.0.*"])
    trained = {id(p) for p in net.stages[1].trained_parameters()}
    own_names = {n for n, p in net.network.named_parameters() if id(p) in trained}
    assert own_names == {f"layer1.1.{n}" for n, _ in net.network.layer1[1].named_parameters()}


@pytest.mark.parametrize("depth", range(6))
def test_frozen_stages_stay_in_eval_mode_whatever_train_is_told(depth: int) -> None:
    net = staged()
    net.freeze(depth)
    net.eval()
    net.train()
    for name, module in norms_of(net).items():
        assert module.training == (not f"{name}.".startswith(prefixes_below(depth))), name
    net.eval()
    assert not any(module.training for module in norms_of(net).values())


def test_nothing_drops_out_in_frozen_stages() -> None:
    net = StagedModel(on_meta("alexnet"), find_family("alexnet"))
    net.train()
    net.freeze(6)  # all but `fc7` and the head
    assert [net.network.classifier[i].training for i in (0, 3)] == [False, True]
    net.freeze(0)
    assert [net.network.classifier[i].training for i in (0, 3)] == [True, True]


def step(net: StagedModel, pictures: Tensor) -> set[str]:
    """Train by one step; return what it changed."""
    net.train()
    before = snapshot(net.network)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(pictures).square().sum().backward()
    optimizer.step()
    return changed(before, net.network.state_dict())


def test_a_training_step_leaves_frozen_stages_and_their_statistics_alone(
    pictures: Tensor,
) -> None:
    net = staged()
    net.freeze(3)
    moved = step(net, pictures)
    frozen = prefixes_below(3)
    assert moved == {name for name in net.network.state_dict() if not name.startswith(frozen)}
    assert "layer3.0.bn1.running_mean" in moved


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_statistics_of_frozen_stages_can_go_on_following_the_data(pictures: Tensor) -> None:
    net = staged()
    freeze_as(net, config_of(freeze_depth=3, frozen_batchnorm="train"))
    moved = step(net, pictures)
    frozen = prefixes_below(3)
    assert moved == {
        name
        for name in net.network.state_dict()
        if not name.startswith(frozen) or is_statistic(name)
    }
    assert not any(module.training for module in norms_of(net.eval()).values())


# --- Freezing by name -----------------------------------------------------------------------------


def test_patterns_freeze_the_parameters_that_match_and_no_others(pictures: Tensor) -> None:
    net = staged()
    net.freeze_matching(["layer1.*", "*.bn?.*", "layer4.[1-9].conv1.weight"])
    names = {name for name, _ in net.network.named_parameters()}
    frozen = {n for n in names if n.startswith("layer1.") or ".bn1." in n or ".bn2." in n}
    frozen.add("layer4.1.conv1.weight")
    assert trained_names(net) == names - frozen
    assert {"bn1.weight", "layer2.0.downsample.1.weight"} <= trained_names(net)
    assert [stage.name for stage in net.stages if net.is_frozen(stage)] == ["layer1"]
    assert net.freeze_depth == 0
    # A BatchNorm whose own parameters are frozen keeps its statistics, wherever it stands.
    still = {f"{n}.weight" in frozen: [] for n in norms_of(net)}
    for name, module in norms_of(net.train()).items():
        still[f"{name}.weight" in frozen].append(module.training)
    assert still == {True: [False] * 16, False: [True] * 4}
    statistics = {n for n in net.network.state_dict() if is_statistic(n)}
    kept = {n for n in statistics if f"{n.rpartition('.')[0]}.weight" in frozen}
    assert step(net, pictures) == (names - frozen) | (statistics - kept)


def test_by_name_too_the_statistics_of_what_is_frozen_can_go_on(pictures: Tensor) -> None:
    net = staged()
    freeze_as(net, config_of(freeze=["layer1.*", "layer2.0.bn1.*"], frozen_batchnorm="train"))
    assert all(module.training for module in norms_of(net.train()).values())
    assert {"layer1.0.bn1.running_mean", "layer2.0.bn1.running_var"} <= step(net, pictures)


@pytest.mark.parametrize(
    ("patterns", "depth"),
    [
        (["layer1.*"], 0),
        (["conv1.*", "bn1.*"], 1),
        (["conv1.*", "bn1.*", "layer1.*", "layer3.*"], 2),
        (["[!f]*"], 5),
        (["conv1.*", "bn1.weight"], 0),
    ],
)
def test_the_depth_of_patterns_counts_the_stages_below_the_first_trained_parameter(
    patterns: list[str], depth: int
) -> None:
    net = staged()
    net.freeze_matching(patterns)
    assert net.freeze_depth == depth


def test_other_patterns_and_depths_thaw_what_was_frozen() -> None:
    net = staged()
    net.freeze_matching(["layer*"])
    net.freeze_matching(["conv1.*"])
    assert {n for n, _ in net.network.named_parameters()} - trained_names(net) == {"conv1.weight"}
    net.freeze(0)
    assert trained_names(net) == {n for n, _ in net.network.named_parameters()}
    assert all(module.training for module in norms_of(net).values())


# --- Freezing by configuration and epoch ----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "depths"),
    [
        ({}, [0, 0, 0, 0, 0]),
        ({"freeze_depth": 4}, [4, 4, 4, 4, 4]),
        ({"freeze_depth": -1}, [5, 5, 5, 5, 5]),
        ({"freeze_depth": -6}, [0, 0, 0, 0, 0]),
        ({"freeze_depth": 5, "unfreeze_at": {4: 0, 2: 3}}, [5, 3, 3, 0, 0]),
        ({"freeze_depth": -1, "unfreeze_at": {3: -2, 5: -5}}, [5, 5, 4, 4, 1]),
    ],
)
def test_each_epoch_has_its_depth(values: dict[str, Any], depths: list[int]) -> None:
    config = config_of(epochs=5, **values)
    assert [freeze_depth_in(config, 6, epoch) for epoch in range(1, 6)] == depths
    net = staged()
    before = 0
    for epoch, depth in enumerate(depths, start=1):
        assert freeze_as(net, config, epoch) == (depth != before)
        assert net.freeze_depth == depth
        frozen = {n for n, p in net.network.named_parameters() if not p.requires_grad}
        assert frozen == {
            n for n, _ in net.network.named_parameters() if n.startswith(prefixes_below(depth))
        }
        before = depth


def test_freezing_by_name_changes_something_the_first_time() -> None:
    net = staged()
    config = config_of(freeze=["layer2.*"])
    assert [freeze_as(net, config, epoch) for epoch in (1, 2)] == [True, False]
    assert freeze_as(net, config_of(freeze=["layer2.*", "layer3.*"]), 2)
    assert freeze_depth_in(config, 6) == 0


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
# lr 0.3 and ratio 1/10.
TENTHS = {
    "block1": 0.00000003,
    "block2": 0.0000003,
    "block3": 0.000003,
    "block4": 0.00003,
    "block5": 0.0003,
    "fc6": 0.003,
    "fc7": 0.03,
    "head": 0.3,
}


@pytest.mark.parametrize("depth", [*range(6), -1, -3])
def test_each_stage_learns_slower_than_the_one_above_it_by_the_ratio(depth: int) -> None:
    lrs = stage_lrs(config_of(lr_ratio=0.5, freeze_depth=depth), NAMES)
    assert list(lrs) == list(NAMES)
    assert lrs == pytest.approx(HALVED, rel=1e-12)


@pytest.mark.parametrize("depth", range(8))
def test_in_a_vgg_too_at_every_depth(depth: int) -> None:
    config = config_of(model="vgg11", optimizer=Sgd(lr=0.3), lr_ratio=0.1, freeze_depth=depth)
    lrs = stage_lrs(config, names_of("vgg11"))
    assert list(lrs) == list(TENTHS)
    assert lrs == pytest.approx(TENTHS, rel=1e-12)


def test_with_a_ratio_of_one_all_stages_learn_alike() -> None:
    assert stage_lrs(config_of(optimizer=Sgd(lr=0.3)), NAMES) == dict.fromkeys(NAMES, 0.3)


@pytest.mark.parametrize(("ratio", "below"), [(1.0, dict.fromkeys(NAMES, 0.1)), (0.5, HALVED)])
def test_the_factor_of_the_head_is_the_heads_alone(ratio: float, below: dict[str, float]) -> None:
    lrs = stage_lrs(config_of(lr_ratio=ratio, head_lr_factor=20.0), NAMES)
    assert lrs == pytest.approx({**below, "head": 2.0}, rel=1e-12)


@pytest.mark.parametrize("depth", range(6))
def test_a_mapping_gives_each_stage_its_own_share(depth: int) -> None:
    shares = dict(zip(NAMES, (0.1, 0.2, 0.5, 2.0, 3.0, 10.0), strict=True))
    wanted = {"stem": 0.01, "layer1": 0.02, "layer2": 0.05, "layer3": 0.2, "layer4": 0.3, "head": 1}
    lrs = stage_lrs(config_of(lr_ratio=shares, freeze_depth=depth), NAMES)
    assert list(lrs) == list(NAMES)
    assert lrs == pytest.approx(wanted, rel=1e-12)


def test_a_mapping_may_leave_frozen_stages_out() -> None:
    lrs = stage_lrs(config_of(lr_ratio={"head": 2, "layer4": 0.5}, freeze_depth=4), NAMES)
    assert lrs == pytest.approx({"layer4": 0.05, "head": 0.2}, rel=1e-12)
    assert list(lrs) == ["layer4", "head"]


# --- Dropout --------------------------------------------------------------------------------------


def test_dropout_is_set_in_every_dropout_layer() -> None:
    network = on_meta("alexnet")
    assert set_dropout(network, 0.2, None) == (2, 0)
    assert [network.classifier[i].p for i in (0, 3)] == [0.2, 0.2]
    assert set_dropout(network, None, None) == (2, 0)
    assert [network.classifier[i].p for i in (0, 3)] == [0.2, 0.2]


def test_dropout_is_set_in_the_layers_of_a_densenet() -> None:
    network = torchvision.models.DenseNet(4, (1, 2, 1, 1), 8, num_classes=3)
    assert set_dropout(network, 0.6, None) == (5, 0)
    wanted = torchvision.models.DenseNet(4, (1, 2, 1, 1), 8, drop_rate=0.6, num_classes=3)
    wanted.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 32, 32)
    outputs = []
    for net in (network, wanted):
        torch.manual_seed(3)
        outputs.append(net.train()(x))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], network(x))  # which draws anew


def rise(network: nn.Module) -> list[float]:
    return [m.p for m in network.modules() if isinstance(m, StochasticDepth)]


def a_swin(stochastic_depth: float) -> nn.Module:
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=[2, 2],
        stochastic_depth_prob=stochastic_depth,
    )


def test_stochastic_depth_rises_linearly_to_the_last_block() -> None:
    network = a_swin(0.2)
    assert set_dropout(network, None, 0.4) == (10, 5)
    assert rise(network) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=1e-12)
    assert rise(network) == pytest.approx(rise(a_swin(0.4)), abs=1e-12)
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.0}
    set_dropout(network, None, 0.0)
    assert rise(network) == [0.0] * 5


def test_a_convnext_and_an_efficientnet_get_what_torchvision_would_give_them() -> None:
    network = on_meta("convnext_tiny")
    assert set_dropout(network, None, 0.3) == (0, 18)
    with torch.device("meta"):
        wanted = torchvision.models.convnext_tiny(stochastic_depth_prob=0.3)
    assert rise(network) == pytest.approx(rise(wanted), abs=1e-12)
    # Torchvision divides by the number of blocks here, so that the last one has less than is asked.
    network = on_meta("efficientnet_b0")
    assert set_dropout(network, 0.5, 0.3) == (1, 16)
    assert rise(network) == pytest.approx([0.02 * i for i in range(16)], abs=1e-12)
    assert network.classifier[0].p == 0.5


def a_maxvit(stochastic_depth: float) -> nn.Module:
    return torchvision.models.MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 8, 16, 16],
        block_layers=[1, 1, 2, 1],
        head_dim=8,
        stochastic_depth_prob=stochastic_depth,
    )


def test_the_three_parts_of_a_maxvit_layer_share_a_probability_as_in_torchvision() -> None:
    network = a_maxvit(0.2)
    set_dropout(network, None, 0.4)
    layers = [0.0] * 2 + [0.1] * 3 + [0.2] * 3 + [0.3] * 3 + [0.4] * 3  # the first has two
    assert rise(a_maxvit(0.4)) == pytest.approx(layers, abs=1e-12)
    assert rise(network) == pytest.approx(layers, abs=1e-12)


def test_a_configuration_decides_the_dropout_of_its_network() -> None:
    config = config_of(model="mobilenet_v3_small", dropout=0.05)
    net = build_staged(config, 4)
    assert net.network.classifier[2].p == 0.05
    assert net.network.classifier[3].out_features == 4
    config = config_of(model="mobilenet_v3_small")
    assert build_staged(config, 4).network.classifier[2].p == 0.2  # torchvision's
    assert rise(build_staged(config_of(model="efficientnet_b0", stochastic_depth=0.15), 4).network)[
        -1
    ] == pytest.approx(0.15)


@pytest.mark.parametrize(("weight", "heads"), [(0.0, set()), (0.4, {"aux1", "aux2"})])
def test_auxiliary_classifiers_are_built_if_they_weigh_something(
    weight: float, heads: set[str]
) -> None:
    net = build_staged(config_of(model="googlenet", aux_weight=weight), 4)
    assert {n for n, _ in net.network.named_children() if n.startswith("aux")} == heads
    assert all(net.network.get_submodule(name).fc2.out_features == 4 for name in heads)


# --- Sizes of images ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size", "told"),
    [
        ("alexnet", 32, "; 64 is possible (--image-size 64)"),
        ("vgg11", 16, "; 32 is possible (--image-size 32)"),
        ("inception_v3", 64, "; 96 is possible (--image-size 96)"),
        (
            "vit_b_16",
            100,
            "(Input shape indivisible by patch size!); 128 is possible (--image-size 128)",
        ),
        ("maxvit_t", 64, "; 224 is possible (--image-size 224)"),
        ("vit_h_14", 225, "(Input shape indivisible by patch size!)"),
    ],
)
def test_a_network_that_cannot_take_the_images_says_which_size_it_takes(
    model: str, size: int, told: str
) -> None:
    (mistake,) = check_image_size(config_of(model=model), size)
    assert mistake.startswith(f"{model} cannot take images of {size} x {size} pixels (")
    assert mistake.endswith(told)


@pytest.mark.parametrize(
    ("model", "size"), [("resnet18", 16), ("alexnet", 64), ("vit_b_16", 32), ("swin_t", 32)]
)
def test_a_network_that_takes_the_images_has_no_mistakes(model: str, size: int) -> None:
    assert check_image_size(config_of(model=model), size) == []


def test_auxiliary_classifiers_may_want_larger_images() -> None:
    assert check_image_size(config_of(model="inception_v3"), 128) == []
    (mistake,) = check_image_size(config_of(model="inception_v3", aux_weight=0.4), 128)
    assert mistake.endswith("; 299 is possible (--image-size 299)")


def test_asking_about_a_network_draws_nothing() -> None:
    skeleton.__globals__["_skeleton"].cache_clear()
    state = torch.get_rng_state()
    check_image_size(config_of(model="shufflenet_v2_x0_5"), 32)
    check_model(config_of(model="swin_t", dropout=0.1))
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.device.type for p in skeleton("regnet_y_400mf").parameters()} == {"meta"}


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


@pytest.mark.parametrize("model", ["fasterrcnn_resnet50_fpn", "resnet18 ", "package.module", ""])
def test_what_is_no_classifier_is_refused_with_the_way_to_ones_own(model: str) -> None:
    with pytest.raises(ConfigError, match=r"known: alexnet, .* such as 'package.module:build'$"):
        find_family(model)


def test_an_import_path_has_no_family() -> None:
    assert find_family("package.module:build") is None


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"freeze_depth": 5},
        {"freeze_depth": -1},
        {"freeze_depth": -6},
        {"lr_ratio": dict.fromkeys(NAMES, 1.0)},
        {"freeze_depth": 4, "lr_ratio": {"layer4": 0.1, "head": 1.0}},
        # The share of a frozen stage cannot matter, so it may be given.
        {"freeze_depth": 5, "lr_ratio": {"layer4": 0.1, "head": 1.0}},
        {"freeze_depth": -1, "lr_ratio": {"head": 1.0}},
        {"freeze_depth": -1, "unfreeze_at": {3: 4}, "lr_ratio": {"layer4": 0.1, "head": 1.0}},
        {"freeze_depth": 5, "unfreeze_at": {7: 0, 2: -2, 4: 2}},
        {"freeze": ["layer1.*", "*.bn1.weight"]},
        {"freeze": ["[!f]*"], "lr_ratio": {"head": 1.0}},
        {"model": "googlenet", "aux_weight": 0.3, "dropout": 0.1},
        {"model": "swin_t", "stochastic_depth": 0.1},
        {"model": "densenet121", "dropout": 0.1},
    ],
)
def test_configurations_that_fit_the_model_have_no_mistakes(values: dict[str, object]) -> None:
    assert check_model(config_of(**values)) == []


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"freeze_depth": 6}, ["freeze_depth 6", "resnet18", "0 to 5", *NAMES, "-1 to -6"]),
        ({"freeze_depth": -7}, ["freeze_depth -7", "resnet18", "0 to 5", "-1 to -6"]),
        ({"freeze_depth": 5, "unfreeze_at": {2: 6}}, ["unfreeze_at epoch 2: depth 6", "0 to 5"]),
        (
            {"freeze_depth": 3, "unfreeze_at": {2: 3}},
            ["unfreeze_at epoch 2: depth 3 must be less than the 3 before it"],
        ),
        ({"unfreeze_at": {2: -1}}, ["epoch 2: nothing is frozen by then; set freeze_depth"]),
        (
            {"freeze_depth": 5, "unfreeze_at": {6: 2, 4: 1}},
            ["epoch 6: depth 2 must be less than the 1 before it"],
        ),
        (
            {"lr_ratio": {**dict.fromkeys(NAMES, 1.0), "layer5": 1.0}},
            ["unknown: layer5;", "missing: none"],
        ),
        (
            {"freeze_depth": 3, "lr_ratio": {"head": 1.0, "Layer3": 1.0}},
            ["unknown: Layer3;", "missing: layer3, layer4"],
        ),
        (
            {"freeze_depth": 5, "unfreeze_at": {4: 3}, "lr_ratio": {"head": 1.0, "layer3": 1.0}},
            ["unknown: none;", "missing: layer4"],
        ),
        (
            {"freeze": ["layer*", "conv1.*"], "lr_ratio": {"head": 1.0}},
            ["unknown: none;", "missing: stem"],
        ),
        (
            {"freeze": ["layer1.*", "layer5.0.conv1.weight"]},
            ["'layer5.0.conv1.weight' matches no parameter", "did you mean 'layer"],
        ),
        ({"freeze": ["block9*"]}, ["freeze 'block9*' matches", "such as 'conv1.weight'"]),
        ({"freeze": ["fc.*"]}, ["freeze ['fc.*'] freezes the head, which is new: fc.weight"]),
        ({"freeze": ["*.weight", "*.bias"]}, ["['*.weight', '*.bias'] leaves nothing"]),
        ({"dropout": 0.1}, ["dropout: resnet18 has no dropout layers"]),
        ({"stochastic_depth": 0.0}, ["stochastic_depth: resnet18 has none", "ConvNeXt"]),
        ({"aux_weight": 0.1}, ["aux_weight: resnet18 has no auxiliary", "googlenet"]),
    ],
)
def test_what_does_not_fit_the_model_is_named_with_what_does(
    values: dict[str, object], told: list[str]
) -> None:
    (mistake,) = check_model(config_of(**values))
    assert all(words in mistake for words in told)


def test_every_mistake_is_told_at_once() -> None:
    mistakes = check_model(config_of(freeze_depth=9, dropout=0.1, lr_ratio={"heart": 1.0}))
    assert [mistake.split()[0] for mistake in mistakes] == ["freeze_depth", "lr_ratio", "dropout:"]


# --- Networks of one's own ------------------------------------------------------------------------


class Small(nn.Module):
    """Its children are in the order of the data; two of them have no parameters."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.blur = nn.AvgPool2d(2)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.act = nn.ReLU()
        self.second = nn.Conv2d(4, 5, 3)
        self.top = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.second(self.act(self.first(self.blur(x)))).mean((2, 3)))


class Said(Small):
    """Says its stages: by a name and a number, a module and several."""

    def stages(self) -> Mapping[object, nn.Module | Sequence[nn.Module]]:
        return {"body": [self.first, self.act, self.second], 2: self.top}


def small(kind: type[nn.Module] = Small) -> StagedModel:
    torch.manual_seed(0)
    return StagedModel(kind())


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        (
            Small,
            {
                "first": {"first.0.weight", "first.0.bias", "first.1.weight", "first.1.bias"},
                "second": {"second.weight", "second.bias"},
                "top": {"top.weight", "top.bias"},
            },
        ),
        (
            Said,
            {
                "body": {
                    *("first.0.weight", "first.0.bias", "first.1.weight", "first.1.bias"),
                    *("second.weight", "second.bias"),
                },
                "2": {"top.weight", "top.bias"},
            },
        ),
    ],
)
def test_a_network_of_ones_own_has_its_children_or_what_it_says_as_stages(
    kind: type[nn.Module], stages: dict[str, set[str]]
) -> None:
    net = small(kind)
    names = {id(p): name for name, p in net.network.named_parameters()}
    assert [s.name for s in net.stages] == list(stages)
    assert {s.name: {names[id(p)] for p in s.parameters()} for s in net.stages} == stages


def test_children_without_parameters_belong_to_the_stage_before_them() -> None:
    net = small()
    own_net = net.network
    wanted = [[own_net.blur, own_net.first, own_net.act], [own_net.second], [own_net.top]]
    assert [list(stage.module) for stage in net.stages] == wanted


@pytest.mark.parametrize("kind", [Small, Said])
def test_a_network_of_ones_own_is_called_as_it_is(kind: type[nn.Module], pictures: Tensor) -> None:
    net = small(kind).eval()
    assert torch.equal(net(pictures), net.network(pictures))
    with pytest.raises(AssertionError, match="from its beginning"):
        net(pictures, first_stage=1)


@pytest.mark.parametrize("depth", range(3))
def test_a_network_of_ones_own_is_frozen_stage_by_stage(depth: int, pictures: Tensor) -> None:
    net = small()
    net.freeze(depth)
    moved = step(net, pictures)
    frozen = [("first.",), ("second.",), ("top.",)][:depth]
    flat = tuple(prefix for prefixes in frozen for prefix in prefixes)
    wanted = {n for n in net.network.state_dict() if not n.startswith(flat)}
    # Only the mean of what a BatchNorm gets depends on the bias before it.
    assert moved | {"first.0.bias"} == wanted | {"first.0.bias"}


class WithToken(Small):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.second(self.first(x)).mean((2, 3)) + self.token)


class SaysWithToken(WithToken):
    def stages(self) -> Mapping[str, nn.Module | Sequence[nn.Module]]:
        return {"one": self.first, "rest": [self.second, self.top]}


@pytest.mark.parametrize("kind", [WithToken, SaysWithToken])
def test_parameters_of_the_network_itself_are_of_its_first_stage(
    kind: type[nn.Module], pictures: Tensor
) -> None:
    net = small(kind)
    held = [{id(p) for p in stage.parameters()} for stage in net.stages]
    assert [id(net.network.token) in ids for ids in held] == [True] + [False] * (len(held) - 1)
    assert sum(map(len, held)) == len(list(net.network.parameters())) == 9
    assert "token" in step(net, pictures)
    net.freeze(1)
    assert "token" not in step(net, pictures)
    before = net.eval()(pictures)
    net.double()
    assert torch.allclose(net(pictures.double()).float(), before)
    assert net.stages[0].parameters()[0] is net.network.token


class PlacesToken(WithToken):
    def stages(self) -> Mapping[str, Sequence[nn.Module]]:
        last = [nn.ParameterList([self.token]), self.top]
        return {"one": [self.first], "two": [self.second], "three": last}


def test_parameters_of_the_network_itself_can_be_put_into_another_stage() -> None:
    net = small(PlacesToken)
    assert [len(stage.parameters()) for stage in net.stages] == [4, 2, 3]


class LeavesOut(Small):
    def stages(self) -> Mapping[str, nn.Module]:
        return {"body": self.first, "head": self.top}


class Twice(Small):
    def stages(self) -> Mapping[str, object]:
        return {"body": [self.first, self.second], "head": [self.top, self.second]}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (LeavesOut, "LeavesOut: .* but second.weight is in none; give it a method stages"),
        (Twice, "Twice: .* but one is in two"),
        (Tied, "Tied: .* but one is in two"),
    ],
)
def test_stages_that_are_not_the_network_are_refused(kind: type[nn.Module], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        small(kind)


def test_the_outputs_of_ones_own_stages_are_those_of_their_last_modules(pictures: Tensor) -> None:
    net = small().eval()
    first = net.network.act(net.network.first(net.network.blur(pictures)))
    second = net.network.second(first)
    outputs = net(pictures, stages=["top", "first", "second", "top"])
    wanted = [net.network(pictures), first, second, net.network(pictures)]
    for output, want in zip(outputs, wanted, strict=True):
        assert torch.equal(output, want)
    with pytest.raises(ConfigError, match="stage 'fist' is unknown; did you mean 'first'"):
        net(pictures, stages=["fist"])


def test_watching_ones_own_stages_leaves_no_hooks(pictures: Tensor) -> None:
    net = small()
    net(pictures, stages=["first"])
    with pytest.raises(RuntimeError, match="channels"):
        net(pictures[:, :1], stages=["first"])
    assert not any(module._forward_hooks for module in net.modules())


class SharedReLU(nn.Module):
    """Its one activation is called after each layer, as in many hand-written networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(self.act(self.first(x)))).mean((2, 3)))


def test_a_module_that_is_called_again_later_does_not_change_the_output_of_its_stage(
    pictures: Tensor,
) -> None:
    net = small(SharedReLU)
    (first,) = net(pictures, stages=["first"])
    assert torch.equal(first, net.network.act(net.network.first(pictures)))


class WithList(nn.Module):
    """A list of modules is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def test_a_stage_that_is_a_list_of_modules_puts_out_what_its_last_one_does(
    pictures: Tensor,
) -> None:
    net = small(WithList)
    (layers,) = net(pictures, stages=["layers"])
    assert torch.equal(layers, net.network.layers[1](net.network.layers[0](pictures)))


class StagesAreModules(nn.Module):
    """Like RegNets and ConvNeXts elsewhere: `stages` is a part of the network, no method."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stages = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def test_a_part_of_a_network_that_is_called_stages_is_a_stage() -> None:
    assert [stage.name for stage in small(StagesAreModules).stages] == ["stem", "stages", "head"]


# --- Networks of one's own, by import path --------------------------------------------------------

OWN = """
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.25), nn.Linear(4, num_classes),
    )

def wrong(num_classes):
    return num_classes

def broken(num_classes):
    raise ValueError("at home only")

def large(num_classes):
    return nn.Sequential(nn.Conv2d(3, 10, 40), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def map(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3))

class Odd(nn.Sequential):
    def stages(self):
        return {"head": self[1]}

def odd(num_classes):
    return Odd(nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes))
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return the import path of a function in a file of the user's own."""
    name = f"networks_{tmp_path.name}"  # imported once in a process
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda function: f"{name}:{function}"


def test_a_network_of_ones_own_is_built_for_the_classes(own_model: Callable[[str], str]) -> None:
    model = own_model("build")
    net = build_staged(config_of(model=model, dropout=0.75), 7)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert [stage.name for stage in net.stages] == ["0", "5"]
    assert net.network[4].p == 0.75
    assert names_of(model) == ["0", "5"]
    assert check_model(config_of(model=model, freeze_depth=-1, dropout=0.1)) == []
    assert check_image_size(config_of(model=model), 32) == []
    assert stage_lrs(config_of(model=model, lr_ratio=0.5), ("0", "5")) == {"0": 0.05, "5": 0.1}


def test_a_network_of_ones_own_is_asked_without_drawing(own_model: Callable[[str], str]) -> None:
    state = torch.get_rng_state()
    check_model(config_of(model=own_model("build")))
    check_image_size(config_of(model=own_model("build")), 32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("function", "values", "told"),
    [
        ("build", {"freeze_depth": 2}, r"freeze_depth 2 is too deep for .*: 0 to 1 \(0, 5; "),
        ("build", {"freeze": ["1.*"]}, "matches no parameter .*such as '0.weight'"),
        ("build", {"aux_weight": 0.1}, "has no auxiliary classifiers"),
        ("build", {"stochastic_depth": 0.1}, "stochastic_depth: .* has none"),
        ("biuld", {}, "has no biuld; did you mean 'build'"),
        ("wrong", {}, "returned int, no nn.Module"),
        ("broken", {}, "building it for 10 classes failed: ValueError: at home only"),
        ("odd", {}, "Odd: .* but 0.weight is in none; give it"),
    ],
)
def test_what_does_not_fit_a_network_of_ones_own_is_told(
    own_model: Callable[[str], str], function: str, values: dict[str, Any], told: str
) -> None:
    (mistake,) = check_model(config_of(model=own_model(function), **values))
    with pytest.raises(ConfigError, match=told):
        raise ConfigError(mistake)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("large", "images of 32 x 32 pixels: .*[Kk]ernel size"),
        ("map", r"for two of them and 10 classes it returned \(2, 10, 30, 30\), not logits"),
    ],
)
def test_images_that_ones_own_network_cannot_take_are_told(
    own_model: Callable[[str], str], function: str, told: str
) -> None:
    (mistake,) = check_image_size(config_of(model=own_model(function)), 32)
    with pytest.raises(ConfigError, match=told):
        raise ConfigError(mistake)


def test_a_copy_of_ones_own_network_has_stages_of_its_own(pictures: Tensor) -> None:
    net = small(Said)
    other = copy.deepcopy(net)
    other.freeze(1)
    assert all(p.requires_grad for p in net.parameters())
    assert [p.requires_grad for p in other.network.parameters()] == [False] * 6 + [True] * 2
    assert torch.equal(other.eval()(pictures), net.eval()(pictures))


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


class WithPool(nn.Module):
    """A stage that has nothing to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.first(x)).mean((2, 3)))

    def stages(self) -> dict[str, nn.Module]:
        return {"first": self.first, "pool": self.pool, "head": self.head}


def test_a_stage_without_parameters_puts_out_what_it_computes(pictures: Tensor) -> None:
    net = small(WithPool)
    first, pool = net(pictures, stages=["first", "pool"])
    assert torch.equal(first, net.network.first(pictures))
    assert torch.equal(pool, net.network.pool(first))


def test_every_kind_of_dropout_layer_gets_the_probability() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Dropout3d(0.5))
    assert set_dropout(network, 0.1, None) == (3, 0)
    assert [layer.p for layer in network] == [0.1, 0.1, 0.1]
