"""Every torchvision classifier as stages: for each family, its own modules in forward order.

A stage is a part that the family's paper, or torchvision itself, names, usually of one resolution;
in transformers without such a pyramid, one encoder block. Functions that a forward pass
calls (flatten, mean, ReLU) are represented by modules without parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

Pieces = Mapping[str, Sequence[nn.Module]]


@dataclass(frozen=True)
class Family:
    """How the members of one family are divided into stages.

    Attributes:
        stages: network -> name of each stage, from stem to head, -> its modules, which are called
            one after the other.
        classifier: path of the last layer, whose size is the number of classes; or the paths of
            several such layers.
        size_argument: the constructor's argument for the image size, where it has one.
        aux: auxiliary classifiers -> the modules whose outputs they classify.
        options: arguments with which every member is built.
        is_chain: whether calling the stages one after the other is the network.
    """

    stages: Callable[[Any], Pieces]
    classifier: str | tuple[str, ...]
    size_argument: str | None = None
    aux: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    is_chain: bool = True

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the modules that are new when the number of classes changes."""
        last = (self.classifier,) if isinstance(self.classifier, str) else self.classifier
        return (*last, *self.aux)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self._function(x)


class Beside(nn.Module):
    """Makes a module part of a stage although the main path does not call it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


def _mean_over_pixels(x: Tensor) -> Tensor:
    return x.mean([2, 3])


def _class_token(x: Tensor) -> Tensor:
    return x[:, 0]


class _VitEmbedding(nn.Module):
    """The part of `VisionTransformer.forward` before the encoder blocks, with its parameters."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.conv_proj = net.conv_proj
        self.class_token = net.class_token
        self.pos_embedding = net.encoder.pos_embedding
        self.dropout = net.encoder.dropout
        self._patches = net._process_input

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens, float (B, 1 + patches, hidden)."""
        patches = self._patches(x)
        token = self.class_token.expand(len(x), -1, -1)
        tokens: Tensor = self.dropout(torch.cat([token, patches], dim=1) + self.pos_embedding)
        return tokens


def _split_after(modules: nn.Sequential, kind: type[nn.Module]) -> list[list[nn.Module]]:
    """Split a sequence after each module of this kind."""
    pieces: list[list[nn.Module]] = [[]]
    for module in modules:
        pieces[-1].append(module)
        if isinstance(module, kind):
            pieces.append([])
    return [piece for piece in pieces if piece]


def _split_at_strides(blocks: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Split a sequence of blocks before each one that halves the resolution."""
    pieces: list[list[nn.Module]] = [[]]
    for block in blocks:
        halves = any(m.stride == (2, 2) for m in block.modules() if isinstance(m, nn.Conv2d))
        if halves and pieces[-1]:
            pieces.append([])
        pieces[-1].append(block)
    return pieces


def _numbered(name: str, pieces: Sequence[Sequence[nn.Module]]) -> dict[str, Sequence[nn.Module]]:
    return {f"{name}{number}": piece for number, piece in enumerate(pieces, start=1)}


def _alexnet(net: Any) -> Pieces:
    conv = net.features
    blocks = [conv[0:3], conv[3:6], conv[6:8], conv[8:10], conv[10:13]]
    return {
        **_numbered("conv", blocks),
        "fc6": [net.avgpool, nn.Flatten(1), *net.classifier[0:3]],
        "fc7": net.classifier[3:6],
        "head": net.classifier[6:],
    }


def _convnext(net: Any) -> Pieces:
    f = net.features  # the downsampling of a stage comes before its blocks
    return {
        "stem": f[0:1],
        "stage1": f[1:2],
        "stage2": f[2:4],
        "stage3": f[4:6],
        "stage4": [*f[6:8], net.avgpool, net.classifier[0]],
        "head": net.classifier[1:],
    }


def _densenet(net: Any) -> Pieces:
    f = net.features
    return {
        "stem": [f.conv0, f.norm0, f.relu0, f.pool0],
        "block1": [f.denseblock1, f.transition1],
        "block2": [f.denseblock2, f.transition2],
        "block3": [f.denseblock3, f.transition3],
        "block4": [f.denseblock4, f.norm5],
        "head": [nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1), net.classifier],
    }


def _efficientnet(net: Any) -> Pieces:
    return {
        "stem": net.features[:1],
        **_numbered("stage", [[stage] for stage in net.features[1:-1]]),
        "last_conv": net.features[-1:],
        "head": [net.avgpool, nn.Flatten(1), net.classifier],
    }


def _googlenet(net: Any) -> Pieces:
    renormalise = Function(net._transform_input)
    aux = [module for module in (net.aux1, net.aux2) if module is not None]
    return {
        "stem": [renormalise, net.conv1, net.maxpool1, net.conv2, net.conv3, net.maxpool2],
        "inception3": [net.inception3a, net.inception3b, net.maxpool3],
        "inception4": [
            *(net.inception4a, net.inception4b, net.inception4c, net.inception4d),
            *(net.inception4e, net.maxpool4),
        ],
        "inception5": [net.inception5a, net.inception5b],
        "head": [net.avgpool, nn.Flatten(1), net.dropout, net.fc, *map(Beside, aux)],
    }


def _inception_v3(net: Any) -> Pieces:
    renormalise = Function(net._transform_input)
    aux = [] if net.AuxLogits is None else [net.AuxLogits]
    return {
        "stem": [
            *(renormalise, net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.maxpool1),
            *(net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, net.maxpool2),
        ],
        "mixed5": [net.Mixed_5b, net.Mixed_5c, net.Mixed_5d],
        "mixed6": [net.Mixed_6a, net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e],
        "mixed7": [net.Mixed_7a, net.Mixed_7b, net.Mixed_7c],
        "head": [net.avgpool, net.dropout, nn.Flatten(1), net.fc, *map(Beside, aux)],
    }


def _maxvit(net: Any) -> Pieces:
    return {
        "stem": [net.stem],
        **_numbered("block", [[block] for block in net.blocks]),
        "pool": net.classifier[0:5],
        "head": net.classifier[5:],
    }


def _mnasnet(net: Any) -> Pieces:
    return {
        "stem": net.layers[0:8],
        **_numbered("stage", [[stack] for stack in net.layers[8:14]]),
        "last_conv": net.layers[14:17],
        "head": [Function(_mean_over_pixels), net.classifier],
    }


def _mobilenet_v2(net: Any) -> Pieces:
    return {
        "stem": net.features[:1],
        **_numbered("stage", _split_at_strides(net.features[1:-1])),
        "last_conv": net.features[-1:],
        "head": [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1), net.classifier],
    }


def _mobilenet_v3(net: Any) -> Pieces:
    return {
        "stem": net.features[:1],
        **_numbered("stage", _split_at_strides(net.features[1:-1])),
        "last_conv": net.features[-1:],
        "fc": [net.avgpool, nn.Flatten(1), *net.classifier[0:3]],
        "head": net.classifier[3:],
    }


def _regnet(net: Any) -> Pieces:
    return {
        "stem": [net.stem],
        **_numbered("block", [[block] for block in net.trunk_output]),
        "head": [net.avgpool, nn.Flatten(1), net.fc],
    }


def _resnet(net: Any) -> Pieces:
    return {
        "stem": [net.conv1, net.bn1, net.relu, net.maxpool],
        "layer1": [net.layer1],
        "layer2": [net.layer2],
        "layer3": [net.layer3],
        "layer4": [net.layer4],
        "head": [net.avgpool, nn.Flatten(1), net.fc],
    }


def _shufflenet(net: Any) -> Pieces:
    return {
        "stem": [net.conv1, net.maxpool],
        "stage2": [net.stage2],
        "stage3": [net.stage3],
        "stage4": [net.stage4],
        "conv5": [net.conv5],
        "head": [Function(_mean_over_pixels), net.fc],
    }


def _squeezenet(net: Any) -> Pieces:
    stem, *fires = _split_after(net.features, nn.MaxPool2d)
    return {
        "stem": stem,
        **_numbered("fires", fires),
        "head": [net.classifier, nn.Flatten(1)],
    }


def _swin(net: Any) -> Pieces:
    f = net.features  # the merging of patches comes before the blocks of a stage
    return {
        "embedding": f[0:1],
        "stage1": f[1:2],
        "stage2": f[2:4],
        "stage3": f[4:6],
        "stage4": [*f[6:8], net.norm],
        "head": [net.permute, net.avgpool, net.flatten, net.head],
    }


def _vgg(net: Any) -> Pieces:
    return {
        **_numbered("block", _split_after(net.features, nn.MaxPool2d)),
        "fc6": [net.avgpool, nn.Flatten(1), *net.classifier[0:3]],
        "fc7": net.classifier[3:6],
        "head": net.classifier[6:],
    }


def _vit(net: Any) -> Pieces:
    *blocks, last = net.encoder.layers
    return {
        "embedding": [_VitEmbedding(net)],
        **_numbered("block", [*([block] for block in blocks), [last, net.encoder.ln]]),
        "head": [Function(_class_token), net.heads],
    }


RESNET = Family(_resnet, classifier="fc")
# `transform_input` converts ImageNet's normalisation to inputs in [-1, 1], on which both were
# trained; torchvision sets it with pretrained weights.
_INCEPTION_OPTIONS = {"transform_input": True, "init_weights": True}

_BY_PREFIX: Mapping[str, Family] = {
    "alexnet": Family(_alexnet, classifier="classifier.6"),
    "convnext": Family(_convnext, classifier="classifier.2"),
    "densenet": Family(_densenet, classifier="classifier"),
    "efficientnet": Family(_efficientnet, classifier="classifier.1"),
    "googlenet": Family(
        _googlenet,
        classifier="fc",
        aux={"aux1": "inception4a", "aux2": "inception4d"},
        options=_INCEPTION_OPTIONS,
    ),
    "inception_v3": Family(
        _inception_v3,
        classifier="fc",
        aux={"AuxLogits": "Mixed_6e"},
        options=_INCEPTION_OPTIONS,
    ),
    "maxvit": Family(_maxvit, classifier="classifier.5", size_argument="input_size"),
    "mnasnet": Family(_mnasnet, classifier="classifier.1"),
    "mobilenet_v2": Family(_mobilenet_v2, classifier="classifier.1"),
    "mobilenet_v3": Family(_mobilenet_v3, classifier="classifier.3"),
    "regnet": Family(_regnet, classifier="fc"),
    "resnet": RESNET,
    "resnext": RESNET,
    "shufflenet": Family(_shufflenet, classifier="fc"),
    "squeezenet": Family(_squeezenet, classifier="classifier.1"),
    "swin": Family(_swin, classifier="head"),
    "vgg": Family(_vgg, classifier="classifier.6"),
    "vit": Family(_vit, classifier="heads.head", size_argument="image_size"),
    "wide_resnet": RESNET,
}

FAMILY_NAMES = tuple(_BY_PREFIX)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        name: family
        for name in torchvision.models.list_models(module=torchvision.models)
        for prefix, family in _BY_PREFIX.items()
        if name.startswith(prefix)
    }
)
