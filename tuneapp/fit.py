"""Whether a configuration fits its network: stages, depths, patterns, layers, image size.

Nothing is computed: networks are built without their numbers, on the `meta` device.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tuneapp.config import TrialConfig, is_reference
from tuneapp.errors import ConfigError, did_you_mean
from tuneapp.models import (
    build_network,
    find_family,
    freeze_as,
    freeze_depth_in,
    set_dropout,
)
from tuneapp.own import find_own
from tuneapp.staged import Stage, StagedModel, matches
from tuneapp.timm_models import is_timm, takes_dropout


def skeleton(model: str, image_size: int | None = None, aux: bool = False) -> StagedModel:
    """Return the network without its numbers (on the `meta` device), in stages, with 1000 classes.

    A network of the user's own is built as it is, since its code may need numbers.
    """
    family = find_family(model)
    if family is None:
        return _own_skeleton(find_own(model, "model"), model)
    return _skeleton(model, image_size, aux)


class _NoNumbers(TorchFunctionMode):
    """Makes `torch.empty`, by which layers make their parameters, answer from the meta device.

    `torch.device("meta")` would do for all families but RegNet, which computes its widths with
    tensors while it is built.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)


@lru_cache(maxsize=128)
def _skeleton(model: str, image_size: int | None, aux: bool) -> StagedModel:
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("meta") if is_timm(model) else _NoNumbers(),
    ):
        network = build_network(model, 1000, image_size=image_size, aux=aux)
    return StagedModel(network.to("meta"), find_family(model))


@lru_cache(maxsize=8)
def _own_skeleton(build: Callable[[int], Any], model: str) -> StagedModel:
    with torch.random.fork_rng(devices=[]):
        try:
            return StagedModel(build_network(model, 10))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model {model!r}: building it for 10 classes failed: "
                f"{type(error).__name__}: {error}"
            ) from error


def check_model(config: TrialConfig) -> list[str]:
    """Return what is wrong with the parts of `config` that speak of the model and its stages."""
    try:
        model = skeleton(config.model, aux=config.aux_weight > 0)
    except ConfigError as error:
        return [str(error)]
    names = [stage.name for stage in model.stages]
    return [
        *_depth_mistakes(config, names),
        *_pattern_mistakes(config, model),
        *_ratio_mistakes(config, model, names),
        *_layer_mistakes(config, model),
    ]


def _depth_mistakes(config: TrialConfig, names: Sequence[str]) -> list[str]:
    deepest = len(names) - 1
    asked = {"freeze_depth": config.freeze_depth}
    asked |= {f"unfreeze_at epoch {e}: depth": d for e, d in config.unfreeze_at.items()}
    mistakes = [
        f"{field} {depth} is too deep for {config.model}: 0 to {deepest} "
        f"({', '.join(names)}; the head is always trained), or -1 to -{len(names)} from the head"
        for field, depth in asked.items()
        if not -len(names) <= depth <= deepest
    ]
    if mistakes:
        return mistakes
    depth = freeze_depth_in(config, len(names))
    for epoch in sorted(config.unfreeze_at):
        after = freeze_depth_in(config, len(names), epoch)
        if depth == 0:
            return [f"unfreeze_at epoch {epoch}: nothing is frozen by then; set freeze_depth"]
        if after >= depth:
            return [
                f"unfreeze_at epoch {epoch}: depth {after} must be less than the {depth} before it"
            ]
        depth = after
    return []


def _pattern_mistakes(config: TrialConfig, model: StagedModel) -> list[str]:
    names = [name for name, _ in model.network.named_parameters()]
    mistakes = []
    for pattern in config.freeze:
        if not any(matches(name, [pattern]) for name in names):
            tops = {name.partition(".")[0]: None for name in names}
            hint = (
                did_you_mean(pattern.partition(".")[0], tops)
                or f"; its names are such as {names[0]!r}"
            )
            mistakes.append(f"freeze {pattern!r} matches no parameter of {config.model}{hint}")
    head = _parameter_names(model, model.stages[-1])
    if config.freeze and all(matches(name, config.freeze) for name in names):
        mistakes.append(f"freeze {list(config.freeze)} leaves nothing of {config.model} to train")
    elif config.freeze and all(matches(name, config.freeze) for name in head):
        mistakes.append(f"freeze {list(config.freeze)} freezes the head, which is new: {head[0]}")
    return mistakes


def _ratio_mistakes(config: TrialConfig, model: StagedModel, names: Sequence[str]) -> list[str]:
    if not isinstance(config.lr_ratio, Mapping):
        return []
    if config.freeze:
        trained = {
            name
            for name, stage in zip(names, model.stages, strict=True)
            if not all(matches(n, config.freeze) for n in _parameter_names(model, stage))
        }
    else:
        shallowest = min(freeze_depth_in(config, len(names), e) for e in (1, config.epochs))
        trained = set(names[max(shallowest, 0) :])
    unknown, missing = set(config.lr_ratio) - set(names), trained - set(config.lr_ratio)
    if not unknown and not missing:
        return []
    return [
        f"lr_ratio must name the trained stages of {config.model}: {', '.join(names)}; "
        f"unknown: {', '.join(sorted(unknown)) or 'none'}; "
        f"missing: {', '.join(sorted(missing)) or 'none'}"
    ]


def _parameter_names(model: StagedModel, stage: Stage) -> list[str]:
    held = {id(p) for p in stage.parameters()}
    return [name for name, p in model.network.named_parameters() if id(p) in held]


def _layer_mistakes(config: TrialConfig, model: StagedModel) -> list[str]:
    mistakes = []
    takes_drops, takes_skips = (
        takes_dropout(config.model)
        if is_timm(config.model)
        else map(bool, set_dropout(model.network, None, None))
    )
    if config.dropout is not None and not takes_drops:
        mistakes.append(f"dropout: {config.model} has no dropout layers; leave it None")
    if config.stochastic_depth is not None and not takes_skips:
        mistakes.append(
            f"stochastic_depth: {config.model} has none; leave it None, or take a ConvNeXt, "
            "EfficientNet, MaxViT or Swin"
        )
    family = find_family(config.model)
    if config.aux_weight > 0 and not (family and family.aux):
        mistakes.append(
            f"aux_weight: {config.model} has no auxiliary classifiers; leave it 0, or take "
            "googlenet or inception_v3"
        )
    return mistakes


def check_image_size(config: TrialConfig, size: int) -> list[str]:
    """Return whether the network cannot take images of `size` x `size` pixels, and which it can."""
    failure = _failure_at(config, size)
    if failure is None:
        return _failure_of_one(config, size) if config.batch_size == 1 else []
    if is_reference(config.model):
        return [f"model {config.model!r}: images of {size} x {size} pixels: {failure}"]
    usual = (32, 48, 64, 96, 128, 160, 192, 224, 256, 299, 384)
    taken = next((s for s in usual if s > size and _failure_at(config, s) is None), None)
    way_out = f"; {taken} is possible (--image-size {taken})" if taken else ""
    return [f"{config.model} cannot take images of {size} x {size} pixels ({failure}){way_out}"]


def _failure_at(config: TrialConfig, size: int) -> str | None:
    """Return what goes wrong in a forward pass at this size, or None."""
    if is_reference(config.model):
        return _own_failure(find_own(config.model, "model"), config.model, size)
    return _failure(config.model, size, config.aux_weight > 0)


@lru_cache(maxsize=256)
def _failure(model: str, size: int, aux: bool) -> str | None:
    try:
        staged = skeleton(model, size, aux)
        with torch.no_grad():
            staged.train()(torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        return _first_line(error)
    return None


@lru_cache(maxsize=32)
def _own_failure(build: Callable[[int], Any], model: str, size: int) -> str | None:
    staged = _own_skeleton(build, model)
    for training in (False, True):
        failure = _own_forward(copy.deepcopy(staged).train(training), size)
        if failure is not None:
            return f"while training, {failure}" if training else failure
    return None


def _own_forward(staged: StagedModel, size: int) -> str | None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            logits = staged(torch.zeros(2, 3, size, size))
        except Exception as error:
            return _first_line(error)
    if not isinstance(logits, Tensor) or logits.shape != (2, 10):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        return f"for two of them and 10 classes it returned {got}, not logits (2, 10)"
    return None


def _failure_of_one(config: TrialConfig, size: int) -> list[str]:
    """Return whether what is trained cannot be trained on one image at a time, as BatchNorm can't.

    Larger batches never leave a single image over.
    """
    staged = copy.deepcopy(skeleton(config.model, size, config.aux_weight > 0))
    freeze_as(staged, config, config.epochs)
    device = "cpu" if is_reference(config.model) else "meta"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            staged.train()(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:
        return [
            f"batch_size 1: {config.model} cannot be trained on one image of {size} x {size} "
            f"pixels at a time ({_first_line(error)}); give at least 2"
        ]
    return []


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
