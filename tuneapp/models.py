"""Networks from their configuration: built, frozen, with a learning rate for each stage."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import StochasticDepth

from tuneapp.config import TrialConfig, is_reference
from tuneapp.errors import ConfigError, say_cause
from tuneapp.families import FAMILIES, FAMILY_NAMES, Family
from tuneapp.own import find_own
from tuneapp.staged import Stage, StagedModel, matches
from tuneapp.timm_models import (
    PREFIX,
    build_timm,
    find_timm,
    is_of_timm,
    is_timm,
    read_timm_dropout,
)


def find_family(model: str) -> Family | None:
    """Return the family of a classifier of torchvision or timm; None for a custom network.

    Raises:
        ConfigError: the name is unknown, or timm is not installed.
    """
    if is_timm(model):
        return find_timm(model)
    if is_reference(model):
        return None
    if model in FAMILIES:
        return FAMILIES[model]
    raise ConfigError(f"model {model!r} is {_what_is_wrong_with(model)}")


def _what_is_wrong_with(model: str) -> str:
    """Return why this is no name of a classifier, and what to write instead."""
    if model in torchvision.models.list_models():
        plain = model.removeprefix("quantized_")
        if plain != model:
            return f"a quantized network, which cannot be trained; write {plain!r}"
        kind = torchvision.models.get_model_builder(model).__module__.split(".")[2]
        return f"not an image classifier: it belongs to torchvision.models.{kind}"
    name, _, _ = model.partition(".")
    if _timm_has(name):
        return f"unknown to torchvision; timm has it: write '{PREFIX}{name}'"
    near = get_close_matches(model.lower(), FAMILIES, n=3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    hint += f" (also near: {', '.join(map(repr, near[1:]))})" if near[1:] else ""
    return (
        f"unknown{hint}; families: {', '.join(FAMILY_NAMES)} (their members are torchvision's); "
        f"'{PREFIX}NAME' for a network of timm; or the import path of a function, such as "
        "'package.module:build'. See: python -m tuneapp show --help"
    )


def _timm_has(name: str) -> bool:
    try:
        find_timm(PREFIX + name)
    except ConfigError:  # or timm is not installed
        return False
    return True


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
        image_size: pixels, for networks that are made for one size; None is their default.
        aux: with the auxiliary classifiers, where it has some.
        dropout: as in `TrialConfig.dropout`.
        stochastic_depth: as in `TrialConfig.stochastic_depth`.

    Raises:
        ConfigError: the name is unknown, there is no such function, or it does not return a
            network.
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
        return _build_own(model, num_classes)
    options = {**family.options, "num_classes": num_classes}
    if family.aux:
        options["aux_logits"] = aux
    if family.size_argument and image_size is not None:
        # MaxViT takes height and width, ViT one number.
        both = (image_size, image_size)
        options[family.size_argument] = both if family.size_argument == "input_size" else image_size
    built: nn.Module = torchvision.models.get_model(model, weights=None, **options)
    return built


def _build_own(model: str, num_classes: int) -> nn.Module:
    """Return a custom network, and say in one line what is wrong with it."""
    build = find_own(model, "model")
    try:
        network = _call(build, num_classes)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"model {model!r}: building it for {num_classes} classes failed: {say_cause(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        function = model.partition(":")[2]
        got = "None (a missing return?)" if network is None else type(network).__name__
        raise ConfigError(
            f"model {model!r}: {function}(num_classes) must return an nn.Module, got {got}"
        )
    problem = _unusable(network)
    if problem:
        raise ConfigError(f"model {model!r}: {problem}")
    return network


def _call(build: Callable[..., Any], num_classes: int) -> Any:
    """Call the user's function, by keyword if it has a parameter `num_classes`.

    It may also take it in its `**kwargs`, as torchvision's do, whose first argument is another.
    """
    try:
        parameters = list(inspect.signature(build).parameters.values())
    except (TypeError, ValueError):  # it says nothing of itself
        return build(num_classes)
    kinds = {p.kind for p in parameters}
    named = any(p.name == "num_classes" and p.kind is not p.POSITIONAL_ONLY for p in parameters)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # A first parameter without a default, or with a number as default, is the number of classes.
    takes_number = bool(positional) and (
        positional[0].default is inspect.Parameter.empty or type(positional[0].default) is int
    )
    takes_rest = inspect.Parameter.VAR_KEYWORD in kinds
    takes_any = takes_number or inspect.Parameter.VAR_POSITIONAL in kinds
    return build(num_classes=num_classes) if named or takes_rest > takes_any else build(num_classes)


def _unusable(network: nn.Module) -> str | None:
    """Return why a custom network cannot be trained stage by stage, or None."""
    if isinstance(network, torch.jit.ScriptModule):
        return (
            "it is scripted by torch.jit, so its layers cannot be told apart; return it unscripted"
        )
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f"it is wrapped in {type(network).__name__}; return the network inside it"
    if isinstance(network, torch._dynamo.OptimizedModule):
        return "it is wrapped by torch.compile; return the network inside it"
    lazy = [name for name, tensor in network.named_parameters() if is_lazy(tensor)]
    if lazy:
        return f"{lazy[0]} has no size yet; initialise lazy modules in build, by calling it once"
    return None


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


def dropout_layers(network: nn.Module) -> list[nn.Module]:
    """Return the layers whose dropout `TrialConfig.dropout` sets, in torchvision and custom ones.

    DenseNet's layers and Swin's attention call torch's function, with a probability of their own.
    """
    return [layer for layer in network.modules() if _dropout_field(layer) is not None]


def _dropout_field(layer: nn.Module) -> str | None:
    """Return the name of the attribute that is a layer's probability of dropout, if it has one."""
    if isinstance(layer, _DropoutNd):
        return "p"
    if isinstance(layer, ShiftedWindowAttention):  # Swin v2's is a subclass
        return "dropout"
    return "drop_rate" if isinstance(getattr(layer, "drop_rate", None), int | float) else None


def stochastic_depth_layers(network: nn.Module) -> list[StochasticDepth]:
    """Return the layers that skip a residual block, from stem to head."""
    return [layer for layer in network.modules() if isinstance(layer, StochasticDepth)]


def set_dropout(network: nn.Module, dropout: float | None, stochastic_depth: float | None) -> None:
    """Give the network's dropout and stochastic-depth layers other probabilities.

    Stochastic depth keeps its rise over the blocks, linear in torchvision (Huang et al. 2016); the
    highest becomes the value itself. None leaves the layers as they are.
    """
    if dropout is not None:
        for layer in dropout_layers(network):
            setattr(layer, str(_dropout_field(layer)), dropout)
    if stochastic_depth is not None:
        skips = stochastic_depth_layers(network)
        highest = max((skip.p for skip in skips), default=0.0)
        for index, skip in enumerate(skips):
            rise = skip.p / highest if highest else index / max(len(skips) - 1, 1)
            skip.p = stochastic_depth * rise


def read_dropout(network: nn.Module) -> tuple[tuple[float, ...], float | None]:
    """Return the probabilities of dropout, without repeats, and the highest of stochastic depth."""
    if is_of_timm(network):
        return read_timm_dropout(network)
    drops = {float(getattr(m, str(_dropout_field(m)))) for m in dropout_layers(network)}
    skips = [float(skip.p) for skip in stochastic_depth_layers(network)]
    return tuple(sorted(drops)), max(skips, default=None)


def trained_parameters(
    model: StagedModel, config: TrialConfig, epoch: int = 1
) -> dict[str, nn.Parameter]:
    """Return the parameters that `config` trains in `epoch`, by name; `model` is not changed."""
    named = {n: p for n, p in model.network.named_parameters() if n not in model.fixed_names}
    if config.freeze:
        return {name: p for name, p in named.items() if not matches(name, config.freeze)}
    depth = freeze_depth_in(config, len(model.stages), epoch)
    frozen = {id(p) for stage in model.stages[:depth] for p in stage.parameters()}
    return {name: p for name, p in named.items() if id(p) not in frozen}


def apply_freezing(model: StagedModel, config: TrialConfig, epoch: int = 1) -> bool:
    """Freeze what `config` freezes in `epoch`; return whether that changed anything."""
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
    """Return the peak learning rate of each stage, by name, as if all were trained.

    With a ratio r, a stage that is d stages below the head learns at `lr * r ** d`: the head at
    `lr * head_lr_factor`, the stage below it at lr * r, and so on. Freezing does not change this.

    Args:
        config: the configuration.
        names: the network's stages, from stem to head; a mapping as `lr_ratio` may omit some.
    """
    lr, ratio = config.optimizer.lr, config.lr_ratio
    if isinstance(ratio, Mapping):
        return {name: lr * ratio[name] for name in names if name in ratio}
    head = len(names) - 1
    lrs = {name: lr * math.pow(ratio, head - index) for index, name in enumerate(names)}
    lrs[names[head]] *= config.head_lr_factor
    return lrs


def count_parameters(stages: Sequence[Stage]) -> int:
    """Return the number of parameters of these stages."""
    return sum(p.numel() for stage in stages for p in stage.parameters())


def seed_everything(seed: int, trial_seed: int) -> None:
    """Seed the generators from which head weights and dropout are drawn."""
    mixed = np.random.SeedSequence([seed, trial_seed]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))
