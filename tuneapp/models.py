"""Classifiers as stages: named, ordered pieces of a network, from the stem to the head.

A family says in one function what its stages are, as the network's own modules in the order in
which its forward calls them. Freezing, learning rates and feature extraction all speak in stages.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from tuneapp.config import TrialConfig
from tuneapp.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """A named piece of a network.

    Attributes:
        name: the family's own word for it, such as `layer3`.
        module: modules of the network, called one after the other.
    """

    name: str
    module: nn.Sequential

    def parameters(self) -> list[nn.Parameter]:
        """Return its parameters."""
        return list(self.module.parameters())


@dataclass(frozen=True)
class Family:
    """How the members of one torchvision family are cut into stages and get a new head.

    Attributes:
        stage_names: from the stem to the head; the same for every member.
        stages: the network's modules of each stage, in the order in which they are called.
        replace_head: puts a fresh classification layer for so many classes into the network.
        head_prefix: what the names of the classification layer's parameters begin with.
    """

    stage_names: tuple[str, ...]
    stages: Callable[[nn.Module], Sequence[Sequence[nn.Module]]]
    replace_head: Callable[[nn.Module, int], None]
    head_prefix: str


def _resnet_stages(net: nn.Module) -> Sequence[Sequence[nn.Module]]:
    return (
        (net.conv1, net.bn1, net.relu, net.maxpool),
        (net.layer1,),
        (net.layer2,),
        (net.layer3,),
        (net.layer4,),
        (net.avgpool, nn.Flatten(1), net.fc),
    )  # type: ignore[return-value]


def _resnet_head(net: nn.Module, num_classes: int) -> None:
    assert isinstance(net.fc, nn.Linear)
    net.fc = nn.Linear(net.fc.in_features, num_classes)


RESNET = Family(
    stage_names=("stem", "layer1", "layer2", "layer3", "layer4", "head"),
    stages=_resnet_stages,
    replace_head=_resnet_head,
    head_prefix="fc.",
)

_RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)

FAMILIES: Mapping[str, Family] = MappingProxyType(dict.fromkeys(_RESNETS, RESNET))


class StagedModel(nn.Module):
    """A classifier that is called, frozen and trained stage by stage.

    The torchvision network is `network`, with its own parameter names; the stages are views of its
    modules. Frozen stages stay in `eval()` mode whatever `train()` is told, so that their BatchNorm
    statistics stay put.
    """

    def __init__(self, network: nn.Module, family: Family) -> None:
        super().__init__()
        self.network = network
        modules = family.stages(network)
        # A tuple, which nn.Module does not register: the parameters are counted once, in `network`.
        self.stages = tuple(
            Stage(name, nn.Sequential(*parts))
            for name, parts in zip(family.stage_names, modules, strict=True)
        )
        self.freeze_depth = 0

    def forward(self, x: Tensor, first_stage: int = 0) -> Tensor:
        """Return the logits, float (B, classes).

        Args:
            x: images, float32 (B, 3, H, W) normalised; or, with `first_stage` k, what the first k
                stages made of them.
            first_stage: index of the stage to begin with.
        """
        for stage in self.stages[first_stage:]:
            x = stage.module(x)
        return x

    def freeze(self, depth: int) -> None:
        """Freeze the first `depth` stages and train the rest."""
        self.freeze_depth = depth
        for index, stage in enumerate(self.stages):
            stage.module.requires_grad_(index >= depth)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the stages that train; the frozen ones stay in `eval()`."""
        super().train(mode)
        for stage in self.stages[: self.freeze_depth]:
            stage.module.eval()
        return self


def find_family(model: str) -> Family:
    """Return the family of a torchvision classifier.

    Raises:
        ConfigError: the name is unknown, or its family has no stages here yet.
    """
    if model in FAMILIES:
        return FAMILIES[model]
    hint = did_you_mean(model, FAMILIES)
    unknown = model not in torchvision.models.list_models(module=torchvision.models)
    raise ConfigError(
        f"model {model!r} {'is unknown' if unknown else 'has no stages in tuneapp yet'}{hint}; "
        f"known: {', '.join(FAMILIES)}"
    )


def build_network(model: str, num_classes: int) -> nn.Module:
    """Return torchvision's network with random weights and a head for `num_classes`.

    The draws come from torch's global generator: seed it before.
    """
    family = find_family(model)
    network: nn.Module = torchvision.models.get_model(model, weights=None)
    family.replace_head(network, num_classes)
    return network


def check_model(config: TrialConfig) -> list[str]:
    """Return what is wrong with the parts of `config` that speak of the model and its stages."""
    try:
        names = find_family(config.model).stage_names
    except ConfigError as error:
        return [str(error)]
    mistakes = []
    deepest = len(names) - 1
    if config.freeze_depth > deepest:
        mistakes.append(
            f"freeze_depth {config.freeze_depth} is too deep for {config.model}: 0 to {deepest} "
            f"({', '.join(names)}; the head is always trained)"
        )
    elif isinstance(config.lr_ratio, Mapping):
        trained = set(names[config.freeze_depth :])
        unknown, missing = set(config.lr_ratio) - set(names), trained - set(config.lr_ratio)
        if unknown or missing:
            mistakes.append(
                f"lr_ratio must name the trained stages of {config.model}: {', '.join(names)}; "
                f"unknown: {', '.join(sorted(unknown)) or 'none'}; "
                f"missing: {', '.join(sorted(missing)) or 'none'}"
            )
    return mistakes


def stage_lrs(config: TrialConfig) -> dict[str, float]:
    """Return the peak learning rate of each trained stage, by name.

    With a ratio r, a stage learns at `lr * r ** d`, d being how many stages it lies below the
    head: the head at lr, the stage under it at lr * r, and so on. Frozen stages change nothing.
    """
    names = find_family(config.model).stage_names
    lr, ratio = config.optimizer.lr, config.lr_ratio
    if isinstance(ratio, Mapping):
        return {name: lr * ratio[name] for name in names[config.freeze_depth :]}
    head = len(names) - 1
    return {
        name: lr * math.pow(ratio, head - index)
        for index, name in enumerate(names)
        if index >= config.freeze_depth
    }


def count_parameters(stages: Sequence[Stage]) -> int:
    """Return how many numbers the parameters of these stages hold."""
    return sum(p.numel() for stage in stages for p in stage.parameters())


def seed_everything(seed: int, trial_seed: int) -> None:
    """Seed the generators from which head weights and dropout are drawn."""
    mixed = np.random.SeedSequence([seed, trial_seed]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))
