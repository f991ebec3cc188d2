import copy
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import regnet
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from tuneapp.errors import ConfigError
from tuneapp.families import FAMILIES
from tuneapp.fit import skeleton
from tuneapp.models import build_network, find_family
from tuneapp.staged import StagedModel, WithAux

MEMBERS = torchvision.models.list_models(module=torchvision.models)
AUX = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


# --- The cuts, written by hand --------------------------------------------------------------------

# For each stage, what the names of its parameters and buffers begin with, and the module of the
# network whose output is the stage's (the head's is the network's own).
Cuts = dict[str, tuple[str, str]]


def in_features(stages: str, ends: str, **rest: tuple[str, str]) -> Cuts:
    """Children of `features`: for each stage, those with parameters, and the one that it ends with.

    `stages` is such as "stem:0 layer1:1,2"; `ends` has a number for each.
    """
    cuts = {}
    for words, end in zip(stages.split(), ends.split(), strict=True):
        name, numbers = words.split(":")
        prefixes = " ".join(f"features.{number}." for number in numbers.split(","))
        cuts[name] = (prefixes, f"features.{end}")
    return cuts | rest


def vit(blocks: int) -> Cuts:
    layer = "encoder.layers.encoder_layer_"
    return {
        "embedding": ("class_token encoder.pos_embedding conv_proj.", "encoder.dropout"),
        **{f"block{i}": (f"{layer}{i - 1}.", f"{layer}{i - 1}") for i in range(1, blocks)},
        f"block{blocks}": (f"{layer}{blocks - 1}. encoder.ln.", "encoder.ln"),
        "head": ("heads.", ""),
    }


ALEXNET = in_features(
    "conv1:0 conv2:3 conv3:6 conv4:8 conv5:10",
    "2 5 7 9 12",
    fc6=("classifier.1.", "classifier.2"),
    fc7=("classifier.4.", "classifier.5"),
    head=("classifier.6.", ""),
)
CONVNEXT = in_features(
    "stem:0 stage1:1 stage2:2,3 stage3:4,5",
    "0 1 3 5",
    stage4=("features.6. features.7. classifier.0.", "classifier.0"),
    head=("classifier.2.", ""),
)
DENSENET = {
    "stem": ("features.conv0. features.norm0.", "features.pool0"),
    "block1": ("features.denseblock1. features.transition1.", "features.transition1"),
    "block2": ("features.denseblock2. features.transition2.", "features.transition2"),
    "block3": ("features.denseblock3. features.transition3.", "features.transition3"),
    "block4": ("features.denseblock4. features.norm5.", "features.norm5"),
    "head": ("classifier.", ""),
}
EFFICIENTNET = in_features(
    "stem:0 stage1:1 stage2:2 stage3:3 stage4:4 stage5:5 stage6:6 stage7:7 last_conv:8",
    "0 1 2 3 4 5 6 7 8",
    head=("classifier.1.", ""),
)
EFFICIENTNET_V2_S = in_features(
    "stem:0 stage1:1 stage2:2 stage3:3 stage4:4 stage5:5 stage6:6 last_conv:7",
    "0 1 2 3 4 5 6 7",
    head=("classifier.1.", ""),
)
GOOGLENET = {
    "stem": ("conv1. conv2. conv3.", "maxpool2"),
    "inception3": ("inception3a. inception3b.", "maxpool3"),
    "inception4": (" ".join(f"inception4{letter}." for letter in "abcde"), "maxpool4"),
    "inception5": ("inception5a. inception5b.", "inception5b"),
    "head": ("fc. aux1. aux2.", ""),
}
INCEPTION_V3 = {
    "stem": (
        "Conv2d_1a_3x3. Conv2d_2a_3x3. Conv2d_2b_3x3. Conv2d_3b_1x1. Conv2d_4a_3x3.",
        "maxpool2",
    ),
    "mixed5": ("Mixed_5b. Mixed_5c. Mixed_5d.", "Mixed_5d"),
    "mixed6": (" ".join(f"Mixed_6{letter}." for letter in "abcde"), "Mixed_6e"),
    "mixed7": ("Mixed_7a. Mixed_7b. Mixed_7c.", "Mixed_7c"),
    "head": ("fc. AuxLogits.", ""),
}
MAXVIT = {
    "stem": ("stem.", "stem"),
    **{f"block{i}": (f"blocks.{i - 1}.", f"blocks.{i - 1}") for i in range(1, 5)},
    "pool": ("classifier.2. classifier.3.", "classifier.4"),
    "head": ("classifier.5.", ""),
}
MNASNET = {
    "stem": (" ".join(f"layers.{i}." for i in (0, 1, 3, 4, 6, 7)), "layers.7"),
    **{f"stage{i}": (f"layers.{i + 7}.", f"layers.{i + 7}") for i in range(1, 7)},
    "last_conv": ("layers.14. layers.15.", "layers.16"),
    "head": ("classifier.1.", ""),
}
MOBILENET_V2 = in_features(
    "stem:0 stage1:1 stage2:2,3 stage3:4,5,6 stage4:7,8,9,10,11,12,13 stage5:14,15,16,17 "
    "last_conv:18",
    "0 1 3 6 13 17 18",
    head=("classifier.1.", ""),
)
MOBILENET_V3_SMALL = in_features(
    "stem:0 stage1:1 stage2:2,3 stage3:4,5,6,7,8 stage4:9,10,11 last_conv:12",
    "0 1 3 8 11 12",
    fc=("classifier.0.", "classifier.2"),
    head=("classifier.3.", ""),
)
MOBILENET_V3_LARGE = in_features(
    "stem:0 stage1:1 stage2:2,3 stage3:4,5,6 stage4:7,8,9,10,11,12 stage5:13,14,15 last_conv:16",
    "0 1 3 6 12 15 16",
    fc=("classifier.0.", "classifier.2"),
    head=("classifier.3.", ""),
)
REGNET = {
    "stem": ("stem.", "stem"),
    **{f"block{i}": (f"trunk_output.block{i}.", f"trunk_output.block{i}") for i in range(1, 5)},
    "head": ("fc.", ""),
}
RESNET = {
    "stem": ("conv1. bn1.", "maxpool"),
    **{f"layer{i}": (f"layer{i}.", f"layer{i}") for i in range(1, 5)},
    "head": ("fc.", ""),
}
SHUFFLENET = {
    "stem": ("conv1.", "maxpool"),
    **{f"stage{i}": (f"stage{i}.", f"stage{i}") for i in range(2, 5)},
    "conv5": ("conv5.", "conv5"),
    "head": ("fc.", ""),
}
SQUEEZENET1_0 = in_features(
    "stem:0 fires1:3,4,5 fires2:7,8,9,10 fires3:12", "2 6 11 12", head=("classifier.1.", "")
)
SQUEEZENET1_1 = in_features(
    "stem:0 fires1:3,4 fires2:6,7 fires3:9,10,11,12", "2 5 8 12", head=("classifier.1.", "")
)
SWIN = in_features(
    "embedding:0 stage1:1 stage2:2,3 stage3:4,5",
    "0 1 3 5",
    stage4=("features.6. features.7. norm.", "norm"),
    head=("head.", ""),
)
VGG_LAST = {
    "fc6": ("classifier.0.", "classifier.2"),
    "fc7": ("classifier.3.", "classifier.5"),
    "head": ("classifier.6.", ""),
}
VGG11 = in_features(
    "block1:0 block2:3 block3:6,8 block4:11,13 block5:16,18", "2 5 10 15 20", **VGG_LAST
)
VGG11_BN = in_features(
    "block1:0,1 block2:4,5 block3:8,9,11,12 block4:15,16,18,19 block5:22,23,25,26",
    "3 7 14 21 28",
    **VGG_LAST,
)

# Small members of every family: their cuts, and the pixels of the images that they are tried with.
SMALL: dict[str, tuple[Cuts, int]] = {
    "alexnet": (ALEXNET, 64),
    "convnext_tiny": (CONVNEXT, 64),
    "densenet121": (DENSENET, 64),
    "efficientnet_b0": (EFFICIENTNET, 64),
    "efficientnet_v2_s": (EFFICIENTNET_V2_S, 32),
    "googlenet": (GOOGLENET, 64),
    "inception_v3": (INCEPTION_V3, 75),
    "maxvit_t": (MAXVIT, 224),
    "mnasnet0_5": (MNASNET, 64),
    "mobilenet_v2": (MOBILENET_V2, 64),
    "mobilenet_v3_large": (MOBILENET_V3_LARGE, 64),
    "mobilenet_v3_small": (MOBILENET_V3_SMALL, 64),
    "regnet_x_400mf": (REGNET, 64),
    "regnet_y_400mf": (REGNET, 64),
    "resnet18": (RESNET, 64),
    "resnext50_32x4d": (RESNET, 32),
    "shufflenet_v2_x0_5": (SHUFFLENET, 64),
    "squeezenet1_0": (SQUEEZENET1_0, 64),
    "squeezenet1_1": (SQUEEZENET1_1, 64),
    "swin_t": (SWIN, 64),
    "swin_v2_t": (SWIN, 64),
    "vgg11_bn": (VGG11_BN, 32),
    "vit_b_32": (vit(12), 64),
}


def stage_of(name: str, cuts: Cuts) -> str:
    """Return the one stage to which a parameter or buffer belongs."""
    (found,) = [s for s, (prefixes, _) in cuts.items() if name.startswith(tuple(prefixes.split()))]
    return found


def pictures(size: int, count: int = 2, device: str = "cpu") -> Tensor:
    if device == "meta":
        return torch.empty(count, 3, size, size, device="meta")
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# --- Every member, without its numbers ------------------------------------------------------------


def test_every_classifier_of_torchvision_has_a_family() -> None:
    assert sorted(FAMILIES) == sorted(MEMBERS)
    assert len(MEMBERS) == 80


def test_every_family_has_a_small_member_whose_cuts_are_written_here() -> None:
    assert {FAMILIES[name].stages for name in SMALL} == {f.stages for f in FAMILIES.values()}


@pytest.mark.parametrize("name", MEMBERS)
def test_the_stages_share_out_all_parameters_and_buffers(name: str) -> None:
    model = skeleton(name, aux=True)
    names = [stage.name for stage in model.stages]
    assert len(names) == len(set(names)) >= 5
    assert names[0] in ("stem", "embedding", "conv1", "block1")
    assert names[-1] == "head"
    held = [
        id(tensor)
        for stage in model.stages
        for tensor in (*stage.module.parameters(), *stage.module.buffers())
    ]
    own = tensors_of(model.network)
    assert sorted(held) == sorted(map(id, own.values()))
    assert len(set(held)) == len(held)
    assert all(stage.parameters() for stage in model.stages)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_head_is_the_classification_layer_and_the_auxiliary_classifiers(name: str) -> None:
    model = skeleton(name, aux=True)
    of_head = {id(p) for p in model.stages[-1].parameters()}
    names = {n for n, p in model.network.named_parameters() if id(p) in of_head}
    aux = {n for n, _ in model.network.named_parameters() if n.startswith(AUX.get(name, ("?",)))}
    layer = model.network.get_submodule(FAMILIES[name].classifier)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    assert layer.weight.shape[0] == 1000
    last = {f"{FAMILIES[name].classifier}.{n}" for n, _ in layer.named_parameters()}
    assert names == last | aux
    assert bool(aux) == (name in AUX)


def on_meta(monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> nn.Module:
    """Build a member by torchvision itself, on the meta device.

    A RegNet computes its widths with tensors before it makes layers: only that comes first.
    """
    if not name.startswith("regnet"):
        with torch.device("meta"):
            return torchvision.models.get_model(name, **options)
    build = regnet._regnet

    def build_on_meta(*args: object, **kwargs: object) -> nn.Module:
        with torch.device("meta"):
            return build(*args, **kwargs)

    monkeypatch.setattr(regnet, "_regnet", build_on_meta)
    return torchvision.models.get_model(name, **options)


@pytest.mark.parametrize("name", MEMBERS)
def test_all_but_the_size_of_the_head_is_torchvisions_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"init_weights": False} if name in AUX else {}  # else torchvision warns
    wanted = on_meta(monkeypatch, name, num_classes=7, **options).state_dict()
    ours = skeleton(name, aux=True).network.state_dict()
    assert list(ours) == list(wanted)
    different = {n for n in ours if ours[n].shape != wanted[n].shape}
    family = FAMILIES[name]
    sized = [family.classifier, "aux1.fc2", "aux2.fc2", "AuxLogits.fc"]
    assert different == {f"{p}.{end}" for p in sized for end in ("weight", "bias")} & set(ours)
    for n in different:
        assert (ours[n].shape[0], wanted[n].shape[0]) == (1000, 7)
        assert ours[n].shape[1:] == wanted[n].shape[1:]


@pytest.mark.parametrize("name", MEMBERS)
def test_freezing_freezes_exactly_the_first_stages(name: str) -> None:
    model = skeleton(name, aux=True)
    index = {
        id(tensor): i
        for i, stage in enumerate(model.stages)
        for tensor in (*stage.module.parameters(), *stage.module.buffers())
    }
    norms = [m for m in model.network.modules() if isinstance(m, nn.BatchNorm2d)]
    model.train()
    try:
        for depth in (*range(len(model.stages) + 1), 2, 0):
            model.freeze(depth)
            assert all(p.requires_grad == (index[id(p)] >= depth) for p in model.parameters())
            assert all(m.training == (index[id(m.weight)] >= depth) for m in norms)
    finally:
        model.freeze(0)


class Like:
    """A tensor without its numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self._as = tensor.shape, tensor.stride(), tensor.dtype

    def make(self) -> Tensor:
        size, stride, dtype = self._as
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")


class Recorder(TorchDispatchMode):
    """Notes each operation: its name, its numbers, and the shape and origin of each of its tensors.

    The origin is the name of a parameter or buffer, or the number of the operation that made it.
    """

    # An operation on such tensors -> what it made, without its numbers; to work it out anew takes
    # most of the time.
    _made: ClassVar[dict[str, tuple[bool, list[Like]]]] = {}

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.seen: list[tuple[str, object]] = []
        self._origin: dict[int, object] = {id(t): n for n, t in tensors_of(network).items()}
        self._origin[id(x)] = "the images"
        self._kept: list[object] = []  # so that no id is given twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        origins = []

        def say(value: object) -> object:
            if isinstance(value, Tensor):
                origins.append(self._origin.get(id(value), "?"))
                return tuple(value.shape), value.stride(), value.dtype
            return [say(v) for v in value] if isinstance(value, list | tuple) else value

        said = f"{func} {say(args)} {kwargs}"
        if func.overloadpacket.__name__.endswith("_"):  # in place
            several, outs = False, [args[0]]
        elif said not in self._made:
            out = func(*args, **(kwargs or {}))
            several = isinstance(out, list | tuple)
            outs = list(out) if several else [out]
            self._made[said] = several, [Like(tensor) for tensor in outs]
        else:
            several, likes = self._made[said]
            outs = [like.make() for like in likes]
        self._origin.update(dict.fromkeys(map(id, outs), len(self.seen)))
        self._kept.append(outs)
        # DenseNet ends with a ReLU in place, its stages with another one: the same to this.
        self.seen.append((said.replace("relu_", "relu"), origins))
        return outs if several else outs[0]


def operations(call: nn.Module, network: nn.Module, size: int) -> list[object]:
    x = pictures(size, device="meta")
    with torch.no_grad(), Recorder(network, x) as recorder:
        call(x)
    return recorder.seen


@pytest.mark.parametrize("name", MEMBERS)
def test_the_stages_do_what_the_network_does_operation_for_operation(name: str) -> None:
    model = skeleton(name, aux=True)
    size = 299 if name == "inception_v3" else 224
    for training in (False, True) if name in SMALL else (False,):
        model.train(training)
        in_stages = operations(model, model.network, size)
        assert len(in_stages) > 15
        assert in_stages == operations(model.network, model.network, size)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_without_auxiliary_classifiers_none_are_built(name: str) -> None:
    names = {n for n, _ in skeleton(name).network.named_parameters()}
    with_aux = {n for n, _ in skeleton(name, aux=True).network.named_parameters()}
    assert {n for n in with_aux if not n.startswith(AUX[name])} == names
    assert names < with_aux


# --- Small members, with numbers ------------------------------------------------------------------


def as_if_trained(model: StagedModel) -> StagedModel:
    """Draw what a fresh network has as zeros, ones or 1e-6: it could stand anywhere, or not count.

    So are the weights, in proportion to what they sum over; the huge ones of two families stay.
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in tensors_of(model.network).items():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif "coords_table" not in name and tensor.is_floating_point() and len(tensor) < 4096:
                inputs = tensor[0].numel() if tensor.dim() > 1 else 16
                tensor.normal_(0, inputs**-0.5, generator=generator)
    return model


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest) -> tuple[str, StagedModel]:
    """A small member with auxiliary classifiers, for three classes, in evaluation."""
    name = request.param
    torch.manual_seed(0)
    size = SMALL[name][1] if name.startswith("vit") else None
    network = build_network(name, 3, aux=True, image_size=size)
    return name, as_if_trained(StagedModel(network, find_family(name))).eval()


def test_the_stages_hold_what_was_written_by_hand(small: tuple[str, StagedModel]) -> None:
    name, model = small
    cuts, _ = SMALL[name]
    assert [stage.name for stage in model.stages] == list(cuts)
    held = {
        id(tensor): stage.name
        for stage in model.stages
        for tensor in tensors_of(stage.module).values()
    }
    assert {n: held[id(t)] for n, t in tensors_of(model.network).items()} == {
        n: stage_of(n, cuts) for n in tensors_of(model.network)
    }


def test_the_stages_compute_what_the_network_computes_to_the_last_bit(
    small: tuple[str, StagedModel],
) -> None:
    name, model = small
    x = pictures(SMALL[name][1])
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(logits, model.network(x))
    assert logits.shape == (2, 3)
    assert not torch.equal(logits[0], logits[1])  # else any order would be as good


def test_the_outputs_of_stages_are_those_of_the_networks_own_modules(
    small: tuple[str, StagedModel],
) -> None:
    name, model = small
    cuts, size = SMALL[name]
    x = pictures(size)
    wanted: dict[str, Tensor] = {}

    def note(stage: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            wanted[stage] = output.clone()  # the next module may work in place

        return hook

    hooks = [
        model.network.get_submodule(end).register_forward_hook(note(stage))
        for stage, (_, end) in cuts.items()
        if end
    ]
    with torch.no_grad():
        wanted["head"] = model.network(x)
        for hook in hooks:
            hook.remove()
        asked = [*reversed(cuts)]
        outputs = model(x, stages=asked)
    for stage, output in zip(asked, outputs, strict=True):
        assert torch.equal(output, wanted[stage]), stage
    # Nor does a later stage work in place on what an earlier one has put out.
    with torch.no_grad():
        for index, stage in enumerate(cuts):
            (x,) = model(x, first_stage=index, stages=[stage])
            assert torch.equal(x, wanted[stage]), stage


# --- Learning: every family in a size that learns within a second ---------------------------------


def with_narrow_layers(name: str) -> nn.Module:
    """Build an AlexNet or VGG whose fully connected layers are 16 wide, for 4096."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    network.features.to_empty(device="cpu")  # which is drawn soon
    linear = [i for i, m in enumerate(network.classifier) if isinstance(m, nn.Linear)]
    for i, outputs in zip(linear, (16, 16, 3), strict=True):
        inputs = network.classifier[i].in_features if i == linear[0] else 16
        network.classifier[i] = nn.Linear(inputs, outputs)
    return network


def a_convnext() -> nn.Module:
    widths = [8, 16, 24, 32]
    blocks = [CNBlockConfig(a, b, 1) for a, b in zip(widths, [*widths[1:], None], strict=True)]
    return ConvNeXt(blocks, num_classes=3)


def a_swin(**options: Any) -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "window_size": [2, 2]}
    return SwinTransformer(
        **sizes, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], num_classes=3, **options
    )


def a_maxvit() -> nn.Module:
    return torchvision.models.MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 8, 16, 16],
        block_layers=[1, 1, 1, 1],
        head_dim=8,
        stochastic_depth_prob=0.2,
        num_classes=3,
    )


def a_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=64,
        patch_size=16,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=3,
    )


# member -> its cuts, how it, or one like it but smaller, is built
LEARNERS: dict[str, tuple[Cuts, Callable[[], nn.Module]]] = {
    "alexnet": (ALEXNET, lambda: with_narrow_layers("alexnet")),
    "convnext_tiny": (CONVNEXT, a_convnext),
    "densenet121": (
        DENSENET,
        lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=3),
    ),
    "maxvit_t": (MAXVIT, a_maxvit),
    "swin_t": (SWIN, a_swin),
    "swin_v2_t": (
        SWIN,
        lambda: a_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    ),
    "vgg11": (VGG11, lambda: with_narrow_layers("vgg11")),
    "vit_b_16": (vit(3), a_vit),
    **{
        name: (SMALL[name][0], lambda name=name: build_network(name, 3, aux=name == "googlenet"))
        for name in (
            *("efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2"),
            *("mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
            *("squeezenet1_1",),
        )
    },
}


def learner(name: str) -> StagedModel:
    torch.manual_seed(0)
    model = as_if_trained(StagedModel(LEARNERS[name][1](), FAMILIES[name]))
    for module in model.modules():
        if isinstance(module, nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0  # what is dropped has no gradient
    return model


def test_every_family_learns_here() -> None:
    assert {FAMILIES[name].stages for name in LEARNERS} == {f.stages for f in FAMILIES.values()}


def one_step(model: StagedModel, x: Tensor) -> None:
    # What stands before a BatchNorm may have no gradient, where only the mean changes: it decays.
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)
    out = model.train()(x)
    heads = [out.logits, *out.aux] if isinstance(out, WithAux) else [out]
    labels = torch.arange(len(x)) % 3
    loss = sum(cross_entropy(logits, labels) for logits in heads)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", LEARNERS)
def test_one_step_at_every_depth_changes_the_trained_stages_and_nothing_else(name: str) -> None:
    model = learner(name)
    cuts, _ = LEARNERS[name]
    x = pictures(75 if name == "inception_v3" else 64, count=4)
    at_first = copy.deepcopy(model.network.state_dict())
    fixed = {n for n in at_first if re.search("relative_(position_index|coords_table)$", n)}
    for depth in range(len(cuts)):
        model.network.load_state_dict(at_first)
        model.freeze(depth)
        model.zero_grad()
        one_step(model, x)
        after = model.network.state_dict()
        trained = {n for n in at_first if stage_of(n, cuts) in [*cuts][depth:]} - fixed
        assert {n for n in after if not torch.equal(after[n], at_first[n])} == trained, depth
        for n, p in model.network.named_parameters():
            assert (p.grad is not None) == (n in trained), n
            assert p.grad is None or p.dim() == 1 or p.grad.any(), n


# --- Outputs of stages ----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_the_outputs_of_stages_come_in_the_order_asked_frozen_or_not(depth: int) -> None:
    model = learner("resnet18").eval()
    model.freeze(depth)
    x = pictures(64)
    one, three = model(x, stages=["layer1", "layer3"])
    again = model(x, stages=["layer3", "stem", "layer1", "layer3"])
    net = model.network
    stem = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    layer1 = net.layer1(stem)
    layer3 = net.layer3(net.layer2(layer1))
    assert [torch.equal(*pair) for pair in [(one, layer1), (three, layer3)]] == [True, True]
    wanted = [layer3, stem, layer1, layer3]
    assert [torch.equal(*pair) for pair in zip(again, wanted, strict=True)] == [True] * 4
    assert three.requires_grad == (depth <= 3)


def test_outputs_can_begin_with_what_earlier_stages_made() -> None:
    model = learner("shufflenet_v2_x0_5").eval()
    with torch.no_grad():
        (two, three) = model(pictures(64), stages=["stage2", "stage3"])
        (again,) = model(two, first_stage=2, stages=["stage3"])
    assert torch.equal(again, three)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "googlenet", "mobilenet_v3_small"])
def test_stages_after_the_last_one_asked_for_are_not_computed(name: str) -> None:
    model = learner(name)
    cuts, _ = LEARNERS[name]
    second, *later = [*cuts][1:]

    def fail(module: nn.Module, args: object) -> None:
        raise AssertionError("computed")

    for path, module in model.network.named_modules():
        if path and stage_or_none(f"{path}.", cuts) in later:
            module.register_forward_pre_hook(fail)
    (output,) = model(pictures(64), stages=[second])
    assert len(output) == 2
    with pytest.raises(AssertionError, match="computed"):
        model(pictures(64), stages=[second, later[0]])


def stage_or_none(name: str, cuts: Cuts) -> str | None:
    try:
        return stage_of(name, cuts)
    except ValueError:  # such as `encoder.`, which has parts in several
        return None


@pytest.mark.parametrize(
    ("name", "asked", "hint"),
    [
        ("resnet18", ["stem", "layer5"], "did you mean 'layer4'?"),
        ("vit_b_16", ["blok2"], "did you mean 'block2'?"),
        ("swin_t", ["head", "stage9", "embeding"], "'stage9' is unknown; did you mean 'stage"),
    ],
)
def test_an_unknown_stage_is_refused_with_the_nearest_name(
    name: str, asked: list[str], hint: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(hint)) as error:
        learner(name)(pictures(64), stages=asked)
    assert str(error.value).endswith(f"; there are {', '.join(LEARNERS[name][0])}")


# --- Auxiliary classifiers ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 299)])
def test_auxiliary_logits_are_torchvisions_in_the_order_of_the_stages(name: str, size: int) -> None:
    torch.manual_seed(0)
    network = build_network(name, 3, aux=True)
    model = as_if_trained(StagedModel(network, FAMILIES[name])).train()
    x = pictures(size)
    with torch.no_grad():
        torch.manual_seed(5)  # dropout
        ours = model(x)
        torch.manual_seed(5)
        theirs = network(x)
        plain = model.eval()(x)
        assert torch.equal(plain, network(x))
    assert isinstance(ours, WithAux)
    if name == "googlenet":
        wanted = [theirs.logits, theirs.aux_logits1, theirs.aux_logits2]
    else:
        wanted = [theirs.logits, theirs.aux_logits]
    assert len(ours.aux) == len(wanted) - 1
    for our, their in zip([ours.logits, *ours.aux], wanted, strict=True):
        assert our.shape == (2, 3)
        assert torch.equal(our, their)
    assert not torch.equal(ours.logits, ours.aux[0])


IMAGENET = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("aux", [False, True])
def test_inceptions_get_the_range_of_numbers_that_their_weights_were_trained_on(
    name: str, aux: bool
) -> None:
    torch.manual_seed(0)
    network = build_network(name, 3, aux=aux)
    assert network.transform_input is True
    model = StagedModel(network, FAMILIES[name]).eval()
    normalised = torch.tensor([1.5, -0.5, 0.25])
    # Back to a pixel between 0 and 1, and from there to one between -1 and 1.
    wanted = torch.tensor(
        [2 * (x * std + mean) - 1 for x, (mean, std) in zip(normalised, IMAGENET, strict=True)]
    )
    x, inputs = (values.view(1, 3, 1, 1).expand(1, 3, 96, 96) for values in (normalised, wanted))
    _, *rest = model.stages[0].module
    with torch.no_grad():
        (stem,) = model(x, stages=["stem"])
        assert torch.allclose(stem, nn.Sequential(*rest)(inputs), atol=1e-5)
        assert not torch.allclose(stem, nn.Sequential(*rest)(x), atol=1e-3)


@pytest.mark.parametrize(("name", "tapped"), [("googlenet", 2), ("inception_v3", 2)])
def test_training_cannot_begin_above_what_an_auxiliary_classifier_sees(
    name: str, tapped: int
) -> None:
    torch.manual_seed(0)
    model = StagedModel(build_network(name, 3, aux=True), FAMILIES[name]).train()
    x = pictures(128 if name == "googlenet" else 299)
    below = [stage.name for stage in model.stages][:tapped]
    with torch.no_grad():
        *_, features = model(x, stages=below)
        assert isinstance(model(features, first_stage=tapped), WithAux)
        told = rf"^first_stage {tapped + 1} leaves out '{model.stages[tapped].name}', whose output"
        with pytest.raises(ConfigError, match=told):
            model(features, first_stage=tapped + 1)
        model.eval()
        *_, features = model(x, stages=[*below, model.stages[tapped].name])
        assert torch.equal(model(features, first_stage=tapped + 1), model(x))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "resnet18"])
def test_without_auxiliary_classifiers_training_returns_the_logits(name: str) -> None:
    torch.manual_seed(0)
    model = StagedModel(build_network(name, 3), FAMILIES[name])
    with torch.no_grad():
        out = model.train()(pictures(75))
    assert isinstance(out, Tensor)
    assert out.shape == (2, 3)


# --- Copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_b_16", "googlenet", "densenet121", "mnasnet0_5"])
def test_a_copy_computes_with_numbers_of_its_own(name: str) -> None:
    model = learner(name).eval()
    x = pictures(75 if name == "inception_v3" else 64)
    with torch.no_grad():
        before = model(x)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        assert torch.equal(model(x), before)
        assert torch.equal(other(x), other.network(x))
        assert not torch.equal(other(x), before)


@pytest.mark.parametrize("name", ["vit_b_16", "googlenet", "densenet121"])
def test_the_stages_follow_the_network_to_another_precision(name: str) -> None:
    model = learner(name).eval().double()
    x = pictures(64).double()
    with torch.no_grad():
        assert model(x).dtype == torch.float64
        assert torch.equal(model(x), model.network(x))
