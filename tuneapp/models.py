"""Networks from their configuration: built, frozen, with a learning rate for each stage."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from tuneapp.config import TrialConfig, is_reference
from tuneapp.errors import ConfigError, did_you_mean
from tuneapp.families import FAMILIES, Family
from tuneapp.own import find_own
from tuneapp.staged import Stage, StagedModel
from tuneapp.timm_models import (
    build_timm,
    find_timm,
    is_of_timm,
    is_timm,
    read_timm_dropout,
)


def find_family(model: str) -> Family | None:
    """Return the family of a torchvision classifier or one of timm's; None for the user's own.

    Raises:
        ConfigError: the name is unknown, or timm is not installed.
    """
    if is_timm(model):
        return find_timm(model)
    if is_reference(model):
        return None
    if model in FAMILIES:
        return FAMILIES[model]
    raise ConfigError(
        f"model {model!r} is unknown{did_you_mean(model, FAMILIES)}; known: {', '.join(FAMILIES)}; "
        "'timm:' and a name of timm's; or the import path of a function, such as "
        "'package.module:build'"
    )


def build_network(
    model: str,
    num_classes: int,
    *,
    image_size: int | None = None,
    aux: bool = False,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
) -> nn.Module:
    """Return the network with random weights and a head for `num_classes`.

    The draws come from torch's global generator: seed it before.

    Args:
        model: as in `TrialConfig.model`.
        num_classes: size of the head.
        image_size: pixels, for networks that are made for one size; None is their usual one.
        aux: with the auxiliary classifiers, where it has some.
        dropout: as in `TrialConfig.dropout`.
        stochastic_depth: as in `TrialConfig.stochastic_depth`.

    Raises:
        ConfigError: the name is unknown, there is no such function, or it returns no network.
    """
    if is_timm(model):
        return build_timm(
            model, num_classes, image_size, dropout=dropout, stochastic_depth=stochastic_depth
        )
    network = _build(model, num_classes, image_size, aux)
    set_dropout(network, dropout, stochastic_depth)
    return network


def _build(model: str, num_classes: int, image_size: int | None, aux: bool) -> nn.Module:
    family = find_family(model)
    if family is None:
        network = find_own(model, "model")(num_classes)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"model {model!r} returned {type(network).__name__}, no nn.Module")
        own: nn.Module = network
        return own
    options = {**family.options, "num_classes": num_classes}
    if family.aux:
        options["aux_logits"] = aux
    if family.size_argument and image_size is not None:
        # MaxViT wants height and width, ViT one number.
        both = (image_size, image_size)
        options[family.size_argument] = both if family.size_argument == "input_size" else image_size
    built: nn.Module = torchvision.models.get_model(model, weights=None, **options)
    return built


def build_staged(
    config: TrialConfig, num_classes: int, image_size: int | None = None
) -> StagedModel:
    """Return the network of a configuration, in stages, with random weights and nothing frozen."""
    network = build_network(
        config.model,
        num_classes,
        image_size=image_size,
        aux=config.aux_weight > 0,
        dropout=config.dropout,
        stochastic_depth=config.stochastic_depth,
    )
    return StagedModel(network, find_family(config.model))


def set_dropout(
    network: nn.Module, dropout: float | None, stochastic_depth: float | None
) -> tuple[int, int]:
    """Give the network's dropout and stochastic-depth layers other probabilities.

    Stochastic depth keeps its rise over the blocks, linear in torchvision (Huang et al. 2016); the
    last block gets the value itself.

    Returns:
        How many layers there are of each kind.
    """
    drops = [m for m in network.modules() if isinstance(m, _DropoutNd) or hasattr(m, "drop_rate")]
    skips = [m for m in network.modules() if isinstance(m, StochasticDepth)]
    if dropout is not None:
        for layer in drops:
            # DenseNet's layers call the function, with a field of their own.
            setattr(layer, "p" if isinstance(layer, _DropoutNd) else "drop_rate", dropout)
    if stochastic_depth is not None:
        highest = max((skip.p for skip in skips), default=0.0)
        for index, skip in enumerate(skips):
            rise = skip.p / highest if highest else index / max(len(skips) - 1, 1)
            skip.p = stochastic_depth * rise
    return len(drops), len(skips)


def read_dropout(network: nn.Module) -> tuple[tuple[float, ...], float | None]:
    """Return the probabilities of the dropout layers, and that of the last stochastic depth."""
    if is_of_timm(network):
        return read_timm_dropout(network)
    drops = {m.p for m in network.modules() if isinstance(m, _DropoutNd)}
    layers: list[Any] = [m for m in network.modules() if hasattr(m, "drop_rate")]
    drops |= {float(layer.drop_rate) for layer in layers}
    skips = [float(m.p) for m in network.modules() if isinstance(m, StochasticDepth)]
    return tuple(sorted(drops)), skips[-1] if skips else None


def freeze_as(model: StagedModel, config: TrialConfig, epoch: int = 1) -> bool:
    """Freeze what `config` wants frozen in `epoch`; return whether that changed anything."""
    model.frozen_batchnorm = config.frozen_batchnorm
    if config.freeze:
        before = model.freeze_depth, [p.requires_grad for p in model.parameters()]
        model.freeze_matching(config.freeze)
        return before != (model.freeze_depth, [p.requires_grad for p in model.parameters()])
    depth = freeze_depth_in(config, len(model.stages), epoch)
    changed = depth != model.freeze_depth
    model.freeze(depth)
    return changed


def freeze_depth_in(config: TrialConfig, num_stages: int, epoch: int = 1) -> int:
    """Return how many stages are frozen in `epoch`, counted from 1."""
    begun = [at for at in config.unfreeze_at if at <= epoch]
    depth = config.unfreeze_at[max(begun)] if begun else config.freeze_depth
    return depth + num_stages if depth < 0 else depth


def stage_lrs(config: TrialConfig, names: Sequence[str]) -> dict[str, float]:
    """Return the peak learning rate of each stage, by name, were it trained.

    With a ratio r, a stage learns at `lr * r ** d`, d being how many stages it lies below the
    head: the head at `lr * head_lr_factor`, the stage under it at lr * r, and so on. What is frozen
    changes nothing.

    Args:
        config: the configuration.
        names: the network's stages, from stem to head; a mapping may leave frozen ones out.
    """
    lr, ratio = config.optimizer.lr, config.lr_ratio
    if isinstance(ratio, Mapping):
        return {name: lr * ratio[name] for name in names if name in ratio}
    head = len(names) - 1
    lrs = {name: lr * math.pow(ratio, head - index) for index, name in enumerate(names)}
    lrs[names[head]] *= config.head_lr_factor
    return lrs


def count_parameters(stages: Sequence[Stage]) -> int:
    """Return how many numbers the parameters of these stages hold."""
    return sum(p.numel() for stage in stages for p in stage.parameters())


def seed_everything(seed: int, trial_seed: int) -> None:
    """Seed the generators from which head weights and dropout are drawn."""
    mixed = np.random.SeedSequence([seed, trial_seed]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))
