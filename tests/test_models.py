import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer
from torchvision.ops import StochasticDepth

from tuneapp.anatomy import read_anatomy
from tuneapp.config import AdamW, Sgd, TrialConfig
from tuneapp.data.examples import ImageSet
from tuneapp.effective import config_hash
from tuneapp.errors import ConfigError
from tuneapp.families import FAMILIES, FAMILY_NAMES
from tuneapp.fit import check_image_size, check_model, skeleton
from tuneapp.models import (
    apply_freezing,
    build_network,
    build_staged,
    count_parameters,
    dropout_layers,
    find_family,
    freeze_depth_in,
    read_dropout,
    seed_everything,
    set_dropout,
    stage_lrs,
    stochastic_depth_layers,
    trained_parameters,
)
from tuneapp.prepare import _mistakes_with
from tuneapp.staged import StagedModel
from tuneapp.timm_models import find_timm
from tuneapp.trial import TrialRun, run_trial

AUX = ("googlenet", "inception_v3")
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
    apply_freezing(net, config_of(freeze_depth=3, frozen_batchnorm="train"))
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


def test_frozen_batchnorms_are_those_that_stand_still() -> None:
    net = staged()
    assert net.frozen_batchnorms() == []
    net.freeze(2)
    of_stages = [m for n, m in norms_of(net).items() if f"{n}.".startswith(prefixes_below(2))]
    own_net = net.network
    assert len(of_stages) == 5
    assert of_stages == net.frozen_batchnorms()
    net.freeze_matching(["layer2.0.bn1.*", "layer3.1.bn2.weight", "layer4.*"])
    of_layer4 = [m for n, m in norms_of(net).items() if n.startswith("layer4.")]
    assert net.frozen_batchnorms() == [own_net.layer2[0].bn1, *of_layer4]


def test_by_name_too_the_statistics_of_what_is_frozen_can_go_on(pictures: Tensor) -> None:
    net = staged()
    apply_freezing(net, config_of(freeze=["layer1.*", "layer2.0.bn1.*"], frozen_batchnorm="train"))
    assert all(module.training for module in norms_of(net.train()).values())
    assert {"layer1.0.bn1.running_mean", "layer2.0.bn1.running_var"} <= step(net, pictures)


class NormAct(nn.BatchNorm2d):
    """BatchNorm with dropout and an activation inside, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class WithNormAct(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


def test_what_is_inside_of_a_frozen_batchnorm_stays_as_its_stage_is() -> None:
    net = small(WithNormAct)
    apply_freezing(net, config_of(freeze_depth=1, frozen_batchnorm="train"))
    norm = net.train().network.stem[1]
    assert norm.training
    assert not norm.drop.training and not norm.act.training


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
        assert apply_freezing(net, config, epoch) == (depth != before)
        assert net.freeze_depth == depth
        frozen = {n for n, p in net.network.named_parameters() if not p.requires_grad}
        assert frozen == {
            n for n, _ in net.network.named_parameters() if n.startswith(prefixes_below(depth))
        }
        before = depth


def test_freezing_by_name_changes_something_the_first_time() -> None:
    net = staged()
    config = config_of(freeze=["layer2.*"])
    assert [apply_freezing(net, config, epoch) for epoch in (1, 2)] == [True, False]
    assert apply_freezing(net, config_of(freeze=["layer2.*", "layer3.*"]), 2)
    assert freeze_depth_in(config, 6) == 0


# --- What is trained, without changing the network ------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"freeze_depth": 3},
        {"freeze_depth": -1},
        {"freeze_depth": -1, "unfreeze_at": {2: 3, 4: 1}},
        {"freeze": ["layer1.*", "*.bn1.bias", "conv1.weight"]},
    ],
)
def test_what_is_trained_is_what_freezing_leaves(values: dict[str, Any]) -> None:
    net, config = staged(), config_of(epochs=4, **values)
    for epoch in range(1, 5):
        trained = trained_parameters(net, config, epoch)
        assert all(p.requires_grad for p in net.parameters())
        frozen = copy.deepcopy(net)
        apply_freezing(frozen, config, epoch)
        assert set(trained) == trained_names(frozen)
        named = dict(net.network.named_parameters())
        assert all(trained[name] is named[name] for name in trained)
    assert set(trained_parameters(net, config)) == set(trained_parameters(net, config, 1))


@pytest.mark.parametrize("model", ["resnet18", "tests.states:OwnNet", "timm:resnet18"])
def test_the_shared_network_is_left_as_it_is_by_every_check(model: str) -> None:
    if model.startswith("timm:"):
        pytest.importorskip("timm")
    shared = skeleton(model)
    modes = {m: m.training for m in shared.modules()}
    before = snapshot(shared) if model.startswith("tests") else {}
    config = config_of(model=model, freeze_depth=1, frozen_batchnorm="train", batch_size=1)
    for checked in (config, config_of(model=model, freeze=["*"], batch_size=1)):
        check_model(checked)
        check_image_size(checked, 64)
        config_hash(checked)
    read_anatomy(model, 64)
    assert skeleton(model) is shared
    assert {m: m.training for m in shared.modules()} == modes
    assert all(p.requires_grad for p in shared.parameters())
    assert (shared.freeze_depth, shared.frozen_batchnorm) == (0, "eval")
    assert changed(before, shared.state_dict()) == set()
    if model == "resnet18":
        assert all(m.training for m in skeleton(model, 64).modules())


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
    assert dropout_layers(network) == [network.classifier[0], network.classifier[3]]
    assert stochastic_depth_layers(network) == []
    set_dropout(network, 0.2, None)
    assert [network.classifier[i].p for i in (0, 3)] == [0.2, 0.2]
    set_dropout(network, None, None)
    assert [network.classifier[i].p for i in (0, 3)] == [0.2, 0.2]


def test_dropout_is_set_in_the_layers_of_a_densenet() -> None:
    network = torchvision.models.DenseNet(4, (1, 2, 1, 1), 8, num_classes=3)
    assert read_dropout(network) == ((0.0,), None)
    set_dropout(network, 0.6, None)
    assert len(dropout_layers(network)) == 5
    assert read_dropout(network) == ((0.6,), None)
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
    assert len(dropout_layers(network)) == 15
    assert len(stochastic_depth_layers(network)) == 5
    set_dropout(network, None, 0.4)
    assert read_dropout(network) == ((0.0,), 0.4)
    assert rise(network) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4], abs=1e-12)
    assert rise(network) == pytest.approx(rise(a_swin(0.4)), abs=1e-12)
    assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.0}
    set_dropout(network, None, 0.0)
    assert rise(network) == [0.0] * 5
    # The rise is lost: then it is linear.
    set_dropout(network, None, 0.8)
    assert rise(network) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], abs=1e-12)


def test_the_highest_stochastic_depth_becomes_the_value_wherever_it_is() -> None:
    network = nn.Sequential(*(StochasticDepth(p, "row") for p in (0.1, 0.4, 0.2)))
    assert read_dropout(network) == ((), 0.4)
    set_dropout(network, None, 0.8)
    assert rise(network) == pytest.approx([0.2, 0.8, 0.4], abs=1e-12)
    assert read_dropout(network) == ((), 0.8)


def test_one_block_alone_gets_the_value_itself_only_if_it_had_one() -> None:
    network = nn.Sequential(StochasticDepth(0.3, "row"))
    set_dropout(network, None, 0.5)
    assert rise(network) == [0.5]


# Of torchvision: the smallest member of each family, and what its constructor calls dropout.
DROPOUT = {
    **{"alexnet": "dropout", "densenet121": "drop_rate", "efficientnet_b0": "dropout"},
    **{"googlenet": "dropout", "inception_v3": "dropout", "mnasnet0_5": "dropout"},
    **{"mobilenet_v2": "dropout", "mobilenet_v3_small": "dropout", "squeezenet1_1": "dropout"},
    **{"swin_t": "dropout", "swin_v2_t": "dropout", "vgg11": "dropout", "vit_b_32": "dropout"},
}
WITHOUT_DROPOUT = (
    *("convnext_tiny", "maxvit_t", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
)


def test_every_family_is_compared_with_its_constructor() -> None:
    families = [find_family(name) for name in (*DROPOUT, *WITHOUT_DROPOUT)]
    assert [name for name, family in FAMILIES.items() if family not in families] == []


def probabilities(network: nn.Module) -> dict[str, dict[str, float]]:
    """Return every number with drop in its name, and every `p`, of each layer."""
    return {
        name: {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, float) and ("drop" in key or key == "p")
        }
        for name, module in network.named_modules()
        if name  # a ViT notes its constructor's arguments
    }


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_what_the_constructor_of_the_family_sets(name: str) -> None:
    options = {"aux_logits": False, "init_weights": False} if name in AUX else {}
    with torch.device("meta"):
        wanted = torchvision.models.get_model(name, **{DROPOUT[name]: 0.375}, **options)
        plain = torchvision.models.get_model(name, **options)
    network = on_meta(name)
    set_dropout(network, 0.375, None)
    assert probabilities(network) == probabilities(wanted) != probabilities(plain)
    assert read_dropout(network)[0] == (0.375,)


@pytest.mark.parametrize("name", ["convnext_tiny", "resnet18", "shufflenet_v2_x0_5"])
def test_networks_without_dropout_have_no_layers_of_it(name: str) -> None:
    assert dropout_layers(on_meta(name)) == []


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
def test_half_of_the_dropout_of_a_swin_is_read_too(name: str) -> None:
    network = on_meta(name)
    next(m for m in network.modules() if isinstance(m, ShiftedWindowAttention)).dropout = 0.1
    assert read_dropout(network)[0] == (0.0, 0.1)


def test_a_convnext_and_an_efficientnet_get_what_torchvision_would_give_them() -> None:
    network = on_meta("convnext_tiny")
    set_dropout(network, None, 0.3)
    assert (len(dropout_layers(network)), len(stochastic_depth_layers(network))) == (0, 18)
    with torch.device("meta"):
        wanted = torchvision.models.convnext_tiny(stochastic_depth_prob=0.3)
    assert rise(network) == pytest.approx(rise(wanted), abs=1e-12)
    # Torchvision divides by the number of blocks here, so that the last one has less than is asked.
    network = on_meta("efficientnet_b0")
    set_dropout(network, 0.5, 0.3)
    assert (len(dropout_layers(network)), len(stochastic_depth_layers(network))) == (1, 16)
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


@pytest.mark.parametrize("model", ["resnet18 ", "resnet81", "package.module", "", "nothing_near"])
def test_an_unknown_model_is_refused_with_every_way_to_name_one(model: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_family(model)
    message = str(error.value)
    assert message.startswith(f"model {model!r} is unknown; ")
    assert f"; families: {', '.join(FAMILY_NAMES)} (" in message
    assert "'timm:NAME'" in message
    assert "such as 'package.module:build'" in message
    assert message.endswith("See: python -m tuneapp show --help")
    assert len(message) < 500
    near = [name for name in FAMILIES if f"'{name}'" in message]
    assert len(near) == (3 if model.startswith("resnet") else 0)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("fcn_resnet50", "not an image classifier: it belongs to torchvision.models.segmentation"),
        (
            "fasterrcnn_resnet50_fpn",
            "not an image classifier: it belongs to torchvision.models.detection",
        ),
        ("r3d_18", "not an image classifier: it belongs to torchvision.models.video"),
        (
            "quantized_resnet18",
            "a quantized network, which cannot be trained; write 'resnet18'",
        ),
        ("resnet50d", "unknown to torchvision; timm has it: write 'timm:resnet50d'"),
        ("resnet50d.ra2_in1k", "unknown to torchvision; timm has it: write 'timm:resnet50d'"),
    ],
)
def test_a_network_of_another_kind_is_refused_as_that(model: str, told: str) -> None:
    if "timm" in told:
        pytest.importorskip("timm")
    with pytest.raises(ConfigError) as error:
        find_family(model)
    assert str(error.value) == f"model {model!r} is {told}"


def test_without_timm_none_of_its_networks_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    find_timm.cache_clear()
    with pytest.raises(ConfigError, match="model 'resnet50d' is unknown; did you mean 'resnet50'"):
        find_family("resnet50d")


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
        (
            {"freeze_depth": -7},
            ["freeze_depth -7 is out of range", "resnet18", "0 to 5", "-1 to -6 counted from"],
        ),
        ({"freeze_depth": 5, "unfreeze_at": {2: 6}}, ["unfreeze_at epoch 2: depth 6", "0 to 5"]),
        (
            {"freeze_depth": 3, "unfreeze_at": {2: 3}},
            ["unfreeze_at epoch 2: depth 3 must be less than the 3 before it"],
        ),
        ({"unfreeze_at": {2: -1}}, ["epoch 2: nothing is frozen before it; set freeze_depth"]),
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
        # In the order of the network, not of the alphabet.
        ({"lr_ratio": {"layer2": 1.0}}, ["missing: stem, layer1, layer3, layer4, head"]),
        ({"freeze": ["layer1"]}, ["freeze 'layer1' matches", "did you mean 'layer1.*'?"]),
        ({"freeze": ["layer1.9.*"]}, ["did you mean 'layer1.1.*'?"]),
        ({"freeze": ["lyer3.*"]}, ["did you mean 'layer3.*'?"]),
        ({"freeze": ["layer1.0.conv1"]}, ["did you mean 'layer1.0.conv1.*'?"]),
        ({"freeze": ["fc.weight"]}, ["freezes fc.weight, but the head (stage 'head') is new"]),
        ({"freeze": ["layer1.*", "*.bias"]}, ["freezes fc.bias, but the head"]),
        (
            {"freeze": ["layer1.*", "layer5.0.conv1.weight"]},
            [
                "'layer5.0.conv1.weight' matches no parameter",
                "did you mean 'layer4.0.conv1.weight'?",
            ],
        ),
        ({"freeze": ["block9*"]}, ["freeze 'block9*' matches", "such as 'conv1.weight'"]),
        ({"freeze": ["fc.*"]}, ["freeze ['fc.*'] freezes fc.weight, but the head"]),
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
    for stages in (None, [net.stages[1].name]):
        with pytest.raises(ConfigError, match=r"^first_stage must be 0, got 1: .* from its begin"):
            net(pictures, first_stage=1, stages=stages)


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


class Empty(nn.Module):
    def stages(self) -> Mapping[str, nn.Module]:
        return {"all": nn.ReLU()}


class NoMapping(Small):
    def stages(self) -> object:
        return [self.first, self.second, self.top]


class NoModule(Small):
    def stages(self) -> object:
        return {"first": None}


class EmptyHead(Small):
    def stages(self) -> Mapping[str, object]:
        return {"body": [self.first, self.second], "top": self.top, "out": nn.LogSoftmax(1)}


class OneName(Small):
    def stages(self) -> object:
        return {1: self.first, "1": self.top}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            LeavesOut,
            "LeavesOut: every parameter must belong to exactly one stage; second.weight "
            "belongs to none; give it a method stages",
        ),
        (Twice, "Twice: every .* one stage; second.weight belongs to body and head; "),
        (Tied, "Tied: every .* one stage; one.weight belongs to one and two; give it a method"),
        (Empty, "^Empty has no parameters: nothing to train$"),
        (NoMapping, r"NoMapping: stages\(\) must return a dict .*, got list of Sequential, Conv"),
        (EmptyHead, "EmptyHead: the last stage, 'out', is the head, but has no parameters; put"),
        (OneName, r"OneName: stages\(\) has two stages of one name: 1, '1'$"),
        (NoModule, r"NoModule: stages\(\) must return a dict .*, got {'first': None}"),
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


@pytest.mark.parametrize("make", [lambda: small().eval(), lambda: staged().eval()])
def test_stages_must_be_a_list_with_at_least_one_name(
    make: Callable[[], StagedModel], pictures: Tensor
) -> None:
    net = make()
    name = net.stages[1].name
    with pytest.raises(ConfigError, match=rf"stages must be a list, such as \['{name}'\]; there"):
        net(pictures, stages=name)
    with pytest.raises(ConfigError, match="stages is empty: name at least one of "):
        net(pictures, stages=[])


def test_a_stage_without_an_output_is_told(pictures: Tensor) -> None:
    net = small(NeverCalled).eval()
    with pytest.raises(ConfigError, match=r"^stage 'spare' is never called, so it has no output$"):
        net(pictures, stages=["spare"])
    net = staged().eval()
    with pytest.raises(ConfigError, match=r"^stage 'stem' is before first_stage, so it has no"):
        net(pictures, first_stage=1, stages=["stem", "layer2"])


class NeverCalled(Small):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


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


class InPlace(nn.Module):
    """What comes after its stages, in none of them, overwrites what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.head(self.second(x).mul_(3).mean((2, 3)))

    def stages(self) -> dict[str, nn.Module]:
        return {"first": self.first, "second": self.second, "head": self.head}


class InPlaceShared(SharedReLU):
    """Its one activation, kept in a later stage, is called in both and then overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(self.second, self.act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x)).mul_(3)
        return self.head(self.second(x).mul_(3).mean((2, 3)))

    def stages(self) -> dict[str, nn.Module]:
        return {"first": self.first, "second": self.second, "head": self.head}


def test_what_is_done_later_in_place_does_not_change_an_output(pictures: Tensor) -> None:
    net = small(InPlace)
    first, second = net(pictures, stages=["first", "second"])
    assert torch.equal(first, net.network.first(pictures))
    assert torch.equal(second, net.network.second(first.relu()))
    (second.sum() + first.sum()).backward()
    assert net.network.first.weight.grad is not None
    net = small(InPlaceShared)
    first, second = net(pictures, stages=["first", "second"])
    assert torch.equal(first, net.network.first(pictures).relu())
    assert torch.equal(second, net.network.second(first * 3))
    (alone,) = net(pictures, stages=["first"])
    assert torch.equal(alone, first)


@pytest.mark.parametrize("first_stage", [-1, 7, 99])
def test_a_first_stage_that_is_not_there_is_told(first_stage: int, pictures: Tensor) -> None:
    told = rf"^first_stage must be 0 to 6, got {first_stage}; the stages are stem, layer1, "
    for stages in (None, ["head"]):
        with pytest.raises(ConfigError, match=told):
            staged().eval()(pictures, first_stage=first_stage, stages=stages)


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


class Fixed(nn.Module):
    """Its filters, a position embedding and a table of whole numbers are never to be trained."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False)
        self.body = nn.Conv2d(4, 5, 3)
        self.body.position = nn.Parameter(torch.ones(5, 1, 1), requires_grad=False)
        self.body.order = nn.Parameter(torch.tensor([4, 2, 0, 1, 3]), requires_grad=False)
        self.top = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.filters(x)) + self.body.position
        return self.top(x.mean((2, 3))[:, self.body.order])


FIXED = {"filters.weight", "body.position", "body.order"}


@pytest.mark.parametrize("depth", [2, 1, 0])
def test_what_a_network_fixed_itself_is_never_trained(depth: int, pictures: Tensor) -> None:
    net = copy.deepcopy(small(Fixed))
    assert net.fixed_names == FIXED
    net.freeze(2)
    net.freeze(depth)
    assert not trained_names(net) & FIXED
    free = ["body.weight", "body.bias"] if depth < 2 else []
    assert step(net, pictures) == {*free, "top.weight", "top.bias"}
    net.freeze_matching(["body.bias"])
    assert step(net, pictures) == {"body.weight", "top.weight", "top.bias"}
    assert net.freeze_depth == 1
    assert net.is_frozen(net.stages[0])


FIXED_MODEL = f"{__name__}:Fixed"


def test_a_stage_of_fixed_parameters_needs_no_learning_rate() -> None:
    assert set(trained_parameters(small(Fixed), config_of())) == {
        *("body.weight", "body.bias", "top.weight", "top.bias"),
    }
    config = config_of(model=FIXED_MODEL, lr_ratio={"body": 0.5, "top": 1.0})
    assert check_model(config) == []
    (mistake,) = check_model(config_of(model=FIXED_MODEL, lr_ratio={"top": 1.0}))
    assert mistake.endswith("unknown: none; missing: body")
    assert check_model(config_of(model=FIXED_MODEL, freeze=["filters.*", "*.order"])) == []


class FixedHead(Fixed):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self.top.requires_grad_(False)


def test_a_depth_that_leaves_nothing_to_train_is_refused() -> None:
    model = f"{__name__}:FixedHead"
    assert check_model(config_of(model=model, freeze_depth=1)) == []
    (mistake,) = check_model(config_of(model=model, freeze_depth=2))
    assert mistake == f"freeze_depth 2 leaves nothing of {model} to train"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"freeze_depth": -1, "unfreeze_at": {2: 0}},
        {"freeze": ["body.bias"]},
        {"ema_decay": 0.9},
    ],
)
def test_a_trial_leaves_what_a_network_fixed_as_it_was(
    config: TrialConfig, run: TrialRun, values: dict[str, Any]
) -> None:
    values = {"model": FIXED_MODEL, "freeze_depth": 0, **values}
    state = run_trial(replace(config, **values), run, lambda row: None)
    order = state.model.network.body.order
    assert order.tolist() == [4, 2, 0, 1, 3]
    assert torch.equal(state.model.network.body.position, torch.ones(5, 1, 1))
    applied = state.applied_in(2)
    frozen = 5 if "freeze" in values else 0
    assert applied["frozen_parameters"] == 4 * 27 + 5 + 5 + frozen
    assert set(applied["lr"]) == {"body", "top"}
    stages = read_anatomy(FIXED_MODEL, 32).stages
    assert [s.trainable for s in stages] == [5 * 4 * 9 + 5 + 60, 5 * 4 * 9 + 5 + 60, 60]
    assert [s.parameters for s in stages] == [4 * 27, 5 * 4 * 9 + 5 + 10, 60]


# --- The order of one's own stages ----------------------------------------------------------------


class HeadFirst(Small):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        first, second = self.first, self.second
        del self.first, self.second
        self.second, self.first = second, first


class SaidInDisorder(Small):
    def stages(self) -> dict[str, nn.Module]:
        return {"top": self.top, "second": self.second, "first": self.first}


class WithSpare(Small):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self.spare = nn.Linear(2, 2)


class InTraining(WithSpare):
    """Calls one stage only while it is trained, and another one twice."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self.spare = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.first[0].weight.new_zeros(1) + x)
        x = self.spare(x) if self.training else x
        return self.top(self.second(x).mean((2, 3)) + self.second(x).mean((2, 3)))


class ByFunction(Small):
    """Uses the parameters of its first stage and of its head without calling them."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.first[0].weight)
        return nn.functional.linear(self.second(x).mean((2, 3)), self.top.weight)


class NoGradient(Small):
    """Its features are computed without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.second(self.first(x))
        return self.top(x.mean((2, 3)))


DISORDER = (
    "its stages are called in the order first, second, top, but listed top, second, first; give it "
    "a method stages() that returns them in that order"
)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (SaidInDisorder, DISORDER),
        (HeadFirst, DISORDER),
        (
            WithSpare,
            "its stage spare is never called; leave it out of the network, or give it a method "
            "stages() that puts it into another stage",
        ),
    ],
)
def test_stages_in_another_order_than_that_of_the_data_are_told(
    kind: type[nn.Module], told: str
) -> None:
    model = f"{__name__}:{kind.__name__}"
    assert check_model(config_of(model=model)) == []
    assert check_image_size(config_of(model=model), 32) == [f"model {model!r}: {told}"]


@pytest.mark.parametrize("kind", [Small, Fixed, InTraining, ByFunction, NoGradient])
def test_stages_are_in_order_though_called_twice_or_in_training_or_by_functions(
    kind: type[nn.Module],
) -> None:
    assert check_image_size(config_of(model=f"{__name__}:{kind.__name__}"), 32) == []


def test_noting_calls_leaves_no_hooks(pictures: Tensor) -> None:
    net = small()
    with net.noting_calls() as called:
        net(pictures)
    net(pictures)
    assert called == ["first", "second", "top"]
    assert not any(module._forward_pre_hooks for module in net.modules())


# --- Networks of one's own, by import path --------------------------------------------------------

OWN = """
import warnings

import torch
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.25), nn.Linear(4, num_classes),
    )

def wrong(num_classes):
    return num_classes

def forgot(num_classes):
    nn.Linear(3, num_classes)

def hollow(num_classes):
    return nn.ReLU()

def broken(num_classes):
    raise ValueError("at home only")

def large(num_classes):
    return nn.Sequential(nn.Conv2d(3, 10, 40), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def map(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3))

def always_ten(num_classes):
    return build(10)

def by_name(*, num_classes):
    return build(num_classes)

def named_second(pretrained=False, num_classes=1000):
    assert pretrained is False
    return build(num_classes)

def in_the_rest(weights=None, **kwargs):
    assert weights is None
    return build(kwargs["num_classes"])

def only_by_name(*, weights=None, **kwargs):
    return in_the_rest(weights, **kwargs)

def by_place(n, /, width=8):
    return build(n)

def with_rest(n, **kwargs):
    assert not kwargs
    return build(n)

def with_number(classes=10, **kwargs):
    assert not kwargs
    return build(classes)

def wrapped(*args, **kwargs):
    return by_place(*args, **kwargs)

class AsModule(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(*build(num_classes))

class AsModuleNamed(nn.Sequential):
    def __init__(self, *, width=4, num_classes):
        super().__init__(*build(num_classes))

def quits(num_classes):
    raise SystemExit("no licence")

def wordy(num_classes):
    raise ValueError("first line\\nsecond line")

def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(num_classes))

def scripted(num_classes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(build(num_classes))

def compiled(num_classes):
    return torch.compile(build(num_classes))

def parallel(num_classes):
    return nn.DataParallel(build(num_classes))

class AsList(nn.Sequential):
    def stages(self):
        return [self[0], self[1]]

def as_list(num_classes):
    return AsList(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes)))

class AsPairs(AsList):
    def stages(self):
        return [("a", self[0]), ("b", self[1])]

def as_pairs(num_classes):
    return AsPairs(nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes))

class Nowhere(AsList):
    def stages(self):
        return None

def nowhere(num_classes):
    return Nowhere(nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes))

class AsTensors(AsList):
    def stages(self):
        return {"a": self[0].weight, "b": "1"}

def as_tensors(num_classes):
    return AsTensors(nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes))

class Fails(AsList):
    def stages(self):
        return {"a": self.nothing}

def fails(num_classes):
    return Fails(nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes))

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
        ("build", {"freeze": ["block"]}, "matches no parameter .*such as '0.weight'"),
        ("build", {"aux_weight": 0.1}, "has no auxiliary classifiers"),
        ("build", {"stochastic_depth": 0.1}, "stochastic_depth: .* has none"),
        ("biuld", {}, "has no biuld; did you mean 'build'"),
        ("wrong", {}, r": wrong\(num_classes\) must return an nn.Module, got int$"),
        ("forgot", {}, r": forgot\(num_classes\) must return an nn.Module, got None \(a missing "),
        ("hollow", {}, "ReLU has no parameters: nothing to train"),
        (
            "broken",
            {},
            r"building it for 10 classes failed: ValueError: at home only \(.*py:\d+\)$",
        ),
        ("wordy", {}, r": building it for 10 classes failed: ValueError: first line \(.*\)$"),
        ("quits", {}, r": building it for 10 classes failed: SystemExit: no licence \(.*\)$"),
        ("lazy", {}, r": 0\.weight has no size yet; initialise lazy modules in build, by calling"),
        ("scripted", {}, ": it is scripted by torch.jit, so its layers cannot be told apart; ret"),
        ("compiled", {}, ": it is wrapped by torch.compile; return the network inside it$"),
        ("parallel", {}, ": it is wrapped in DataParallel; return the network inside it$"),
        ("as_list", {}, r"must return a dict .*, got list of Conv2d, Sequential$"),
        ("as_pairs", {}, r"got list of tuple of 'a', Conv2d, tuple of 'b', Linear$"),
        ("nowhere", {}, "must return a dict name -> module, .*, got None$"),
        ("as_tensors", {}, r"must return a dict .*, got {'a': Parameter, 'b': '1'}$"),
        ("fails", {}, r": asking it for its stages failed: AttributeError: 'Fails' object has no"),
        ("odd", {}, "Odd: .* one stage; 0.weight belongs to none; give it"),
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
        ("map", r"for two of them and 7 classes it returned \(2, 7, 30, 30\), not logits"),
        ("always_ten", r"and 7 classes it returned \(2, 10\), not logits \(2, 7\)$"),
    ],
)
def test_images_that_ones_own_network_cannot_take_are_told(
    own_model: Callable[[str], str], function: str, told: str
) -> None:
    (mistake,) = check_image_size(config_of(model=own_model(function)), 32)
    with pytest.raises(ConfigError, match=told):
        raise ConfigError(mistake)


def test_ones_own_network_must_have_as_many_logits_as_the_data_have_classes(
    own_model: Callable[[str], str], images: ImageSet
) -> None:
    for classes in (3, 12):
        assert check_image_size(config_of(model=own_model("build")), 32, classes) == []
    model = own_model("always_ten")
    assert check_image_size(config_of(model=model), 32, 10) == []
    (mistake,) = check_image_size(config_of(model=model), 32, 12)
    assert mistake.endswith("two of them and 12 classes it returned (2, 10), not logits (2, 12)")
    config = config_of(model=model, image_size=32, batch_size=4)
    (mistake,) = _mistakes_with(config, images)
    assert mistake.endswith("and 3 classes it returned (2, 10), not logits (2, 3)")
    assert _mistakes_with(replace(config, model=own_model("build")), images) == []


@pytest.mark.parametrize(
    "function",
    [
        *("build", "by_name", "named_second", "in_the_rest", "only_by_name", "by_place"),
        *("with_rest", "with_number", "wrapped", "AsModule", "AsModuleNamed"),
    ],
)
def test_the_number_of_classes_reaches_the_argument_that_is_meant(
    own_model: Callable[[str], str], function: str
) -> None:
    network = build_network(own_model(function), 6)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 6)


def test_a_function_of_torchvision_can_be_an_import_path() -> None:
    model = "torchvision.models:resnet18"
    assert build_network(model, 10).fc.out_features == 10
    assert check_model(config_of(model=model)) == []
    assert check_image_size(config_of(model=model), 32, 10) == []


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


class WithoutParameters(nn.Module):
    """Two of its stages have nothing to learn, but behave otherwise in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.first(x)).mean((2, 3))))

    def stages(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in ("first", "norm", "drop", "head")}


@pytest.mark.parametrize("depth", range(4))
def test_a_frozen_stage_without_parameters_is_in_eval_mode(depth: int, pictures: Tensor) -> None:
    net = small(WithoutParameters)
    net.freeze(depth)
    net.train()
    assert [stage.module[0].training for stage in net.stages] == [i >= depth for i in range(4)]
    assert [net.is_frozen(stage) for stage in net.stages] == [i < depth for i in range(4)]
    moved = step(net, pictures)
    assert ("norm.running_mean" in moved) == (depth < 2)


def test_every_kind_of_dropout_layer_gets_the_probability() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Dropout3d(0.5))
    set_dropout(network, 0.1, None)
    assert [layer.p for layer in network] == [0.1, 0.1, 0.1]
