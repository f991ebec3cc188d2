import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tuneapp.config import Adam, AdamW, Optimizer, RmsProp, Sgd, TrialConfig
from tuneapp.families import FAMILIES, RESNET
from tuneapp.fit import skeleton
from tuneapp.models import apply_freezing, build_network, find_family
from tuneapp.optim import build_optimizer, rebuild_optimizer, undecayed_names
from tuneapp.staged import StagedModel

NAMES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")


def small_model(depth: int = 0) -> StagedModel:
    """A network with the six stages of a ResNet and a handful of numbers; layer2 has no bias."""
    torch.manual_seed(0)
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    net.relu, net.maxpool = nn.ReLU(), nn.Identity()
    for i in range(1, 5):
        setattr(net, f"layer{i}", nn.Conv2d(4, 4, 1, bias=i != 2))
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
    model = StagedModel(net, RESNET)
    model.freeze(depth)
    return model


def config_of(**values: Any) -> TrialConfig:
    return TrialConfig(**{"model": "resnet18", "optimizer": Sgd(lr=1.0), **values})


def names_in(model: StagedModel, optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    """Return the names of the parameters of each group, by the group's own name."""
    names = {id(p): name for name, p in model.network.named_parameters()}
    return {
        group["name"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups
    }


# --- Groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(6))
def test_each_trained_stage_is_a_group_of_its_own_with_its_name_and_rate(depth: int) -> None:
    model = small_model(depth)
    config = config_of(freeze_depth=depth, lr_ratio=0.5, optimizer=AdamW(lr=0.32))
    optimizer = build_optimizer(model, config)
    groups = optimizer.param_groups
    assert [group["name"] for group in groups] == list(NAMES[depth:])
    assert [group["stage"] for group in groups] == list(NAMES[depth:])
    rates = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32][depth:]
    assert [group["lr"] for group in groups] == pytest.approx(rates, rel=1e-12)
    held = {
        "stem": ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"],
        "layer1": ["layer1.weight", "layer1.bias"],
        "layer2": ["layer2.weight"],
        "layer3": ["layer3.weight", "layer3.bias"],
        "layer4": ["layer4.weight", "layer4.bias"],
        "head": ["fc.weight", "fc.bias"],
    }
    assert names_in(model, optimizer) == {name: held[name] for name in NAMES[depth:]}


def test_the_head_alone_learns_at_its_factor() -> None:
    config = config_of(lr_ratio=0.5, head_lr_factor=10, optimizer=Sgd(lr=0.32), freeze_depth=2)
    groups = build_optimizer(small_model(2), config).param_groups
    rates = {group["stage"]: group["lr"] for group in groups}
    assert rates == pytest.approx({"layer2": 0.04, "layer3": 0.08, "layer4": 0.16, "head": 3.2})


def test_a_mapping_gives_each_stage_its_own_factor() -> None:
    factors = {"layer3": 3.0, "layer4": 0.5, "head": 2.0}
    config = config_of(lr_ratio=factors, optimizer=Sgd(lr=0.1), freeze_depth=3)
    groups = build_optimizer(small_model(3), config).param_groups
    rates = {group["stage"]: group["lr"] for group in groups}
    assert rates == pytest.approx({"layer3": 0.3, "layer4": 0.05, "head": 0.2})


@pytest.mark.parametrize(
    ("patterns", "held"),
    [
        (
            ["*.bias", "layer[13].*", "conv1.*"],
            {
                "stem": ["bn1.weight"],
                "layer2": ["layer2.weight"],
                "layer4": ["layer4.weight"],
                "head": ["fc.weight"],
            },
        ),
        (["layer?.*", "bn1.*", "conv1.*"], {"head": ["fc.weight", "fc.bias"]}),
        # The head too may be frozen, as long as something is trained.
        (
            ["fc.*", "layer*", "bn1.weight"],
            {"stem": ["conv1.weight", "conv1.bias", "bn1.bias"]},
        ),
    ],
)
def test_what_patterns_freeze_is_in_no_group(
    patterns: list[str], held: dict[str, list[str]]
) -> None:
    model, config = small_model(), config_of(freeze=patterns, lr_ratio=0.5)
    apply_freezing(model, config)
    optimizer = build_optimizer(model, config)
    assert names_in(model, optimizer) == held
    # A stage learns at its own rate, whatever is frozen around it.
    rates = dict(zip(NAMES, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), strict=True))
    assert {g["stage"]: g["lr"] for g in optimizer.param_groups} == {n: rates[n] for n in held}


def numbers(model: StagedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def test_a_step_leaves_what_is_frozen_as_it_was() -> None:
    for values in ({"freeze_depth": 4}, {"freeze": ["layer[123].*", "conv1.weight", "bn1.*"]}):
        config = config_of(optimizer=Sgd(lr=0.1, weight_decay=0.5), **values)
        model = small_model()
        apply_freezing(model, config)
        optimizer, before = build_optimizer(model, config), numbers(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        changed = {name for name, now in numbers(model).items() if (now != before[name]).any()}
        trained = {"layer4.weight", "layer4.bias", "fc.weight", "fc.bias"}
        assert changed == trained | ({"conv1.bias"} if "freeze" in values else set())


# --- Without decay of norms and biases ------------------------------------------------------------


@pytest.mark.parametrize("kind", [Sgd, Adam, AdamW, RmsProp])
def test_norms_and_biases_stand_in_a_second_group_of_their_stage(
    kind: Callable[..., Optimizer],
) -> None:
    model = small_model()
    config = config_of(
        optimizer=kind(lr=0.32, weight_decay=0.1), decay_norms_and_biases=False, lr_ratio=0.5
    )
    optimizer = build_optimizer(model, config)
    assert names_in(model, optimizer) == {
        "stem": ["conv1.weight"],
        "stem (norms, biases)": ["conv1.bias", "bn1.weight", "bn1.bias"],
        "layer1": ["layer1.weight"],
        "layer1 (norms, biases)": ["layer1.bias"],
        "layer2": ["layer2.weight"],
        "layer3": ["layer3.weight"],
        "layer3 (norms, biases)": ["layer3.bias"],
        "layer4": ["layer4.weight"],
        "layer4 (norms, biases)": ["layer4.bias"],
        "head": ["fc.weight"],
        "head (norms, biases)": ["fc.bias"],
    }
    rates = dict(zip(NAMES, (0.01, 0.02, 0.04, 0.08, 0.16, 0.32), strict=True))
    for group in optimizer.param_groups:
        stage, _, second = group["name"].partition(" ")
        assert group["stage"] == stage
        assert group["lr"] == pytest.approx(rates[stage], rel=1e-12)
        assert group["weight_decay"] == (0.0 if second else 0.1)


def test_a_stage_of_which_only_norms_and_biases_are_trained_has_the_second_group_alone() -> None:
    model = small_model()
    config = config_of(
        freeze=["layer*", "*.weight"],
        decay_norms_and_biases=False,
        optimizer=Sgd(lr=1.0, weight_decay=0.1),
    )
    apply_freezing(model, config)
    assert names_in(model, build_optimizer(model, config)) == {
        "stem (norms, biases)": ["conv1.bias", "bn1.bias"],
        "head (norms, biases)": ["fc.bias"],
    }


@pytest.mark.parametrize("decays_all", [True, False])
@pytest.mark.parametrize(
    "chosen", [Sgd(lr=0.2, momentum=0.9, weight_decay=0.3), AdamW(lr=0.2, weight_decay=0.3)]
)
def test_without_gradients_a_step_shrinks_what_is_decayed_and_nothing_else(
    chosen: Optimizer, decays_all: bool
) -> None:
    config = config_of(optimizer=chosen, decay_norms_and_biases=decays_all, lr_ratio=0.5)
    model = small_model()
    optimizer, before = build_optimizer(model, config), numbers(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Two stages of the six: x - lr * decay * x.
    for name, rate in (("fc", 0.2), ("layer4", 0.1)):
        after = numbers(model)[f"{name}.weight"]
        torch.testing.assert_close(after, before[f"{name}.weight"] * (1 - rate * 0.3))
    for name in ("conv1.bias", "bn1.weight", "bn1.bias", "layer3.bias", "fc.bias"):
        rate = {"fc": 0.2, "layer3": 0.05}.get(name.partition(".")[0], 0.2 / 32)
        shrunk = before[name] * (1 - rate * 0.3)
        torch.testing.assert_close(numbers(model)[name], shrunk if decays_all else before[name])


# Of one member of each family: patterns, written by hand, of what is not decayed: its biases and
# normalisation layers, and what else its authors leave out.
UNDECAYED = {
    "alexnet": ["*.bias"],
    "convnext_tiny": [
        *("*.bias", "features.0.1.weight", "features.[246].0.weight", "*.block.2.weight"),
        *("*.layer_scale", "classifier.0.weight"),
    ],
    "densenet121": ["*.bias", "*norm*.weight"],
    "efficientnet_b0": ["*.bias", "features.[08].1.weight", "*.block.?.1.weight"],
    "googlenet": ["*.bias", "*.bn.weight"],
    "inception_v3": ["*.bias", "*.bn.weight"],
    "maxvit_t": [
        *(
            "*.bias",
            "*.relative_position_bias_table",
            "stem.0.1.weight",
            "*.layers.pre_norm.weight",
        ),
        *("*.layers.conv_[ab].1.weight", "*.attn_layer.0.weight", "*.mlp_layer.0.weight"),
        "classifier.2.weight",
    ],
    "mnasnet0_5": [
        "*.bias",
        "layers.1.weight",
        "layers.4.weight",
        "layers.7.weight",
        "layers.15.weight",
        "layers.*.layers.[147].weight",
    ],
    "mobilenet_v2": [
        "*.bias",
        "features.0.1.weight",
        "features.18.1.weight",
        "features.1.conv.0.1.weight",
        "features.1.conv.2.weight",
        "features.*.conv.[01].1.weight",
        "features.*.conv.3.weight",
    ],
    "mobilenet_v3_small": [
        "*.bias",
        "features.0.1.weight",
        "features.12.1.weight",
        "features.*.block.?.1.weight",
    ],
    "regnet_y_400mf": ["*.bias", "stem.1.weight", "*.proj.1.weight", "*.f.[abc].1.weight"],
    "resnet18": ["*.bias", "bn1.weight", "*.bn?.weight", "*.downsample.1.weight"],
    "shufflenet_v2_x0_5": [
        *("*.bias", "conv[15].1.weight", "*.branch1.[13].weight", "*.branch2.[146].weight"),
    ],
    "squeezenet1_0": ["*.bias"],
    "swin_t": ["*.bias", "*norm*.weight", "features.0.2.weight", "*.relative_position_bias_table"],
    "swin_v2_t": ["*.bias", "*norm*.weight", "features.0.2.weight", "*.logit_scale"],
    "vgg11_bn": [
        *("*.bias", "features.1.weight", "features.5.weight", "features.9.weight"),
        *("features.12.weight", "features.16.weight", "features.19.weight", "features.23.weight"),
        "features.26.weight",
    ],
    "vit_b_32": [
        *("*.bias", "*.in_proj_bias", "*.ln*.weight", "class_token", "encoder.pos_embedding"),
    ],
    "timm:vit_tiny_patch16_224": ["*.bias", "*norm*.weight", "cls_token", "pos_embed"],
    "timm:swinv2_tiny_window8_256": [
        *("*.bias", "*norm*.weight", "*.logit_scale", "*.cpb_mlp.*", "*.[qv]_bias"),
    ],
    "timm:convnext_atto": [
        "*.bias",
        "*norm.weight",
        "stem.1.weight",
        "*.downsample.0.weight",
        "*.gamma",
    ],
}


def test_a_member_of_every_family_is_written_here() -> None:
    written = [find_family(name) for name in UNDECAYED if not name.startswith("timm:")]
    assert [name for name, family in FAMILIES.items() if family not in written] == []


@pytest.mark.parametrize("model", UNDECAYED)
def test_what_is_not_decayed_is_what_is_written_here_for_the_family(model: str) -> None:
    if model.startswith("timm:"):
        pytest.importorskip("timm")
    network = skeleton(model, aux=True).network
    names = [name for name, _ in network.named_parameters()]
    patterns = UNDECAYED[model]
    wanted = {name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    assert undecayed_names(network) == wanted
    assert all(any(fnmatch.fnmatchcase(name, p) for name in names) for p in patterns)


class Custom(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            [nn.LayerNorm((4, 8, 8)), nn.RMSNorm((8, 8)), nn.GroupNorm(2, 4)]
        )
        self.conv = nn.Conv2d(1, 1, (1, 8))  # one dimension, but no scale
        self.offset = nn.Module()
        self.offset.bias = nn.Parameter(torch.zeros(1, 4, 8, 8))
        self.position_embeddings = nn.Embedding(9, 4)
        self.embedding = nn.Embedding(9, 4)
        self.blocks = nn.Module()
        self.blocks.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.blocks.gamma_1 = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.blocks.layer_scale = nn.Parameter(torch.zeros(4, 4))  # a matrix
        self.blocks.token = nn.Parameter(torch.zeros(1, 4))
        self.blocks.temperature = nn.Parameter(torch.zeros(()))
        self.act = nn.PReLU(4)
        self.fc = nn.Linear(4, classes)


def test_a_custom_network_is_read_by_its_modules_and_names() -> None:
    assert undecayed_names(Custom()) == {
        *("norms.0.weight", "norms.0.bias", "norms.1.weight", "norms.2.weight", "norms.2.bias"),
        *("conv.bias", "offset.bias", "position_embeddings.weight", "blocks.cls_token"),
        *("blocks.gamma_1", "blocks.temperature", "act.weight", "fc.bias"),
    }


class Says(Custom):
    def no_weight_decay(self) -> set[str]:
        return {"embedding.weight", "blocks.t*", "no.such"}


class HasAsField(Custom):
    no_weight_decay = ("fc.weight",)


def test_what_a_network_itself_leaves_out_is_left_out_too() -> None:
    assert undecayed_names(Says()) - undecayed_names(Custom()) == {
        "embedding.weight",
        "blocks.token",
    }
    assert undecayed_names(HasAsField()) == undecayed_names(Custom())


def test_the_optimizer_does_not_decay_them() -> None:
    model = skeleton("vit_b_32")
    config = config_of(optimizer=Sgd(lr=1, weight_decay=0.1), decay_norms_and_biases=False)
    optimizer = build_optimizer(model, config)
    names = {id(p): name for name, p in model.network.named_parameters()}
    left_out = {
        names[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]
    }
    assert left_out == undecayed_names(model.network)
    assert {"class_token", "encoder.pos_embedding"} <= left_out
    everything = build_optimizer(model, replace(config, decay_norms_and_biases=True))
    assert {g["weight_decay"] for g in everything.param_groups} == {0.1}


# --- Steps by hand --------------------------------------------------------------------------------


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
        (
            RmsProp(lr=0.1),
            torch.optim.RMSprop,
            {"alpha": 0.99, "eps": 1e-8, "momentum": 0, "centered": False, "weight_decay": 0},
        ),
        (
            RmsProp(lr=0.1, alpha=0.9, eps=0.0316, momentum=0.8, centered=True, weight_decay=1e-5),
            torch.optim.RMSprop,
            {
                "alpha": 0.9,
                "eps": 0.0316,
                "momentum": 0.8,
                "centered": True,
                "weight_decay": 1e-5,
            },
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


def sgd_by_hand(c: Sgd, x: float, gradients: Sequence[float]) -> float:
    velocity = 0.0
    for g in gradients:
        d = g + c.weight_decay * x
        velocity = c.momentum * velocity + d
        x -= c.lr * (d + c.momentum * velocity if c.nesterov else velocity)
    return x


def adam_by_hand(c: Adam, x: float, gradients: Sequence[float]) -> float:
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        d = g
        if isinstance(c, AdamW):
            x -= c.lr * c.weight_decay * x
        else:
            d += c.weight_decay * x
        m, v = c.beta1 * m + (1 - c.beta1) * d, c.beta2 * v + (1 - c.beta2) * d * d
        x -= c.lr * (m / (1 - c.beta1**t)) / (math.sqrt(v / (1 - c.beta2**t)) + 1e-8)
    return x


def rmsprop_by_hand(c: RmsProp, x: float, gradients: Sequence[float]) -> float:
    square = mean = velocity = 0.0
    for g in gradients:
        d = g + c.weight_decay * x
        square = c.alpha * square + (1 - c.alpha) * d * d
        mean = c.alpha * mean + (1 - c.alpha) * d
        variance = square - mean * mean if c.centered else square
        velocity = c.momentum * velocity + d / (math.sqrt(variance) + c.eps)
        x -= c.lr * velocity
    return x


BY_HAND: dict[type, Callable[..., float]] = {
    Sgd: sgd_by_hand,
    Adam: adam_by_hand,
    AdamW: adam_by_hand,
    RmsProp: rmsprop_by_hand,
}


def three_by_hand(chosen: Optimizer, gradients: Sequence[Sequence[float]]) -> list[float]:
    """Return what becomes of the three numbers of START."""
    columns = zip(*gradients, strict=True)
    return [BY_HAND[type(chosen)](chosen, x, g) for x, g in zip(START, columns, strict=True)]


CHOSEN = [
    Sgd(lr=0.1, momentum=0.8, weight_decay=0.03),
    Sgd(lr=0.1, momentum=0.8, weight_decay=0.03, nesterov=True),
    Sgd(lr=0.1, momentum=0.0),
    Adam(lr=0.1, beta1=0.8, beta2=0.95, weight_decay=0.3),
    AdamW(lr=0.1, beta1=0.8, beta2=0.95, weight_decay=0.3),
    RmsProp(lr=0.1),
    RmsProp(lr=0.1, alpha=0.8, eps=0.03, weight_decay=0.3),
    RmsProp(lr=0.1, alpha=0.9, momentum=0.7),
    RmsProp(lr=0.1, alpha=0.9, eps=0.1, momentum=0.7, centered=True, weight_decay=0.1),
    RmsProp(lr=0.01, alpha=0.9, eps=0.1, centered=True),
]
# One for each number of the head's bias, and each step.
GRADIENTS = [[0.3, -0.7, 0.1], [-0.2, -0.7, 0.5], [0.3, 0.4, 0.1], [0.9, -0.1, -0.2], [0.0, 1, 2]]
START = [0.5, -1.0, 2.0]


@pytest.mark.parametrize("chosen", CHOSEN, ids=repr)
def test_five_steps_of_each_optimizer_are_those_of_its_paper(chosen: Optimizer) -> None:
    model = small_model(depth=5)
    optimizer = build_optimizer(model, config_of(freeze_depth=5, optimizer=chosen))
    bias = model.network.fc.bias
    with torch.no_grad():
        bias.copy_(torch.tensor(START))
    for gradient in GRADIENTS:
        bias.grad = torch.tensor(gradient)
        optimizer.step()
    assert bias.tolist() == pytest.approx(three_by_hand(chosen, GRADIENTS), rel=1e-5, abs=1e-6)


# --- Rebuilt for what is unfrozen -----------------------------------------------------------------


@pytest.mark.parametrize("decays_all", [True, False])
@pytest.mark.parametrize("chosen", CHOSEN, ids=repr)
def test_rebuilt_it_goes_on_with_what_was_trained_and_begins_with_the_rest(
    chosen: Optimizer, decays_all: bool
) -> None:
    config = config_of(
        freeze_depth=5,
        unfreeze_at={2: 4},
        optimizer=chosen,
        decay_norms_and_biases=decays_all,
        epochs=2,
    )
    model = small_model()
    # Of four and three numbers; both begin with the same three.
    young, old = model.network.layer4.bias, model.network.fc.bias
    with torch.no_grad():
        old.copy_(torch.tensor(START))
        young.copy_(torch.tensor([*START, 0.0]))
    apply_freezing(model, config, epoch=1)
    optimizer = build_optimizer(model, config)
    for number, gradient in enumerate(GRADIENTS):
        if number == 3:
            assert apply_freezing(model, config, epoch=2)
            first, optimizer = optimizer, rebuild_optimizer(optimizer, model, config)
            assert type(optimizer) is type(first)
            stages = {group["stage"] for group in optimizer.param_groups}
            assert stages == {"layer4", "head"}
            assert young not in optimizer.state
        old.grad = torch.tensor(gradient)
        young.grad = torch.tensor([*gradient, 0.0])
        optimizer.step()
    if not decays_all:
        chosen = replace(chosen, weight_decay=0.0)
    for parameter, since in ((old, 0), (young, 3)):
        wanted = three_by_hand(chosen, GRADIENTS[since:])
        assert parameter.tolist()[:3] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_rebuilt_it_stands_at_the_rates_of_the_configuration_with_all_that_is_trained_now() -> None:
    config = config_of(freeze_depth=5, unfreeze_at={2: 3}, lr_ratio=0.5, optimizer=Adam(lr=0.4))
    model = small_model(5)
    optimizer = build_optimizer(model, config)
    optimizer.param_groups[0]["lr"] = 1e-9  # where a schedule had brought it
    apply_freezing(model, config, epoch=2)
    rebuilt = rebuild_optimizer(optimizer, model, config)
    assert names_in(model, rebuilt) == {
        "layer3": ["layer3.weight", "layer3.bias"],
        "layer4": ["layer4.weight", "layer4.bias"],
        "head": ["fc.weight", "fc.bias"],
    }
    assert [group["lr"] for group in rebuilt.param_groups] == pytest.approx([0.1, 0.2, 0.4])
    assert all(group["betas"] == (0.9, 0.999) for group in rebuilt.param_groups)


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
