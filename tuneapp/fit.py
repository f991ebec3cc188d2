"""Whether a configuration fits its network: stages, depths, patterns, layers, image size.

Networks are built on the `meta` device, without memory or computation; only custom ones are built
and called as they are. They are shared, and nothing here changes them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tuneapp.config import TrialConfig, is_reference
from tuneapp.errors import ConfigError, did_you_mean, first_line, say_cause
from tuneapp.models import (
    apply_freezing,
    build_network,
    dropout_layers,
    find_family,
    freeze_depth_in,
    stochastic_depth_layers,
    trained_parameters,
)
from tuneapp.own import find_own
from tuneapp.staged import Stage, StagedModel, matches
from tuneapp.timm_models import is_timm, takes_dropout

_UNUSUAL_CLASSES = 7
"""For how many classes a custom network is tried where the data are unknown; no usual default."""


def skeleton(model: str, image_size: int | None = None, aux: bool = False) -> StagedModel:
    """Return the network in stages, for 1000 classes, on the `meta` device: without numbers.

    A custom network is built for 10 classes as it is, since its code may need numbers. All callers
    get the same object: to change it, copy it.
    """
    family = find_family(model)
    if family is None:
        return _own_skeleton(find_own(model, "model"), model)
    return _skeleton(model, image_size, aux)


class _NoNumbers(TorchFunctionMode):
    """Makes `torch.empty`, with which layers create their parameters, use the meta device.

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
def _own_skeleton(build: Callable[..., Any], model: str) -> StagedModel:
    return _own_staged(model, 10)


def _own_staged(model: str, num_classes: int) -> StagedModel:
    with torch.random.fork_rng(devices=[]):
        network = build_network(model, num_classes)
        try:
            return StagedModel(network)
        except ConfigError as error:
            raise ConfigError(f"model {model!r}: {error}") from error
        except (Exception, SystemExit) as error:  # of its own stages()
            raise ConfigError(
                f"model {model!r}: asking it for its stages failed: {say_cause(error)}"
            ) from error


def check_model(config: TrialConfig) -> list[str]:
    """Return the mistakes in the fields of `config` that refer to the model and its stages."""
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
        f"{field} {depth} is {'too deep' if depth > 0 else 'out of range'} for {config.model}: "
        f"0 to {deepest} ({', '.join(names)}; the head is always trained), or -1 to -{len(names)} "
        "counted from the head"
        for field, depth in asked.items()
        if not -len(names) <= depth <= deepest
    ]
    if mistakes:
        return mistakes
    depth = freeze_depth_in(config, len(names))
    for epoch in sorted(config.unfreeze_at):
        after = freeze_depth_in(config, len(names), epoch)
        if depth == 0:
            return [f"unfreeze_at epoch {epoch}: nothing is frozen before it; set freeze_depth"]
        if after >= depth:
            return [
                f"unfreeze_at epoch {epoch}: depth {after} must be less than the {depth} before it"
            ]
        depth = after
    return []


def _pattern_mistakes(config: TrialConfig, model: StagedModel) -> list[str]:
    names = [name for name, _ in model.network.named_parameters()]
    unmatched = [p for p in config.freeze if not any(matches(name, [p]) for name in names)]
    mistakes = [
        f"freeze {p!r} matches no parameter of {config.model}{_nearest_pattern(p, names)}"
        for p in unmatched
    ]
    head = model.stages[-1]
    frozen = [
        name
        for name in _parameter_names(model, head)
        if name not in model.fixed_names and matches(name, config.freeze)
    ]
    is_possible = freeze_depth_in(config, len(model.stages)) in range(len(model.stages))
    if is_possible and not trained_parameters(model, config):
        chosen = "freeze" if config.freeze else "freeze_depth"
        value = list(config.freeze) if config.freeze else config.freeze_depth
        mistakes.append(f"{chosen} {value} leaves nothing of {config.model} to train")
    elif frozen:
        mistakes.append(
            f"freeze {list(config.freeze)} freezes {frozen[0]}, but the head (stage {head.name!r}) "
            "is new and must be trained"
        )
    return mistakes


def _nearest_pattern(pattern: str, names: Sequence[str]) -> str:
    """Return a hint at the name of a parameter, or `path.*`, that is nearest to a pattern."""
    paths = {
        f"{name[:end]}.*": None for name in names for end, char in enumerate(name) if char == "."
    }
    return did_you_mean(pattern, [*paths, *names]) or f"; its names are such as {names[0]!r}"


def _ratio_mistakes(config: TrialConfig, model: StagedModel, names: Sequence[str]) -> list[str]:
    if not isinstance(config.lr_ratio, Mapping):
        return []
    trained = {n for e in (1, config.epochs) for n in trained_parameters(model, config, e)}
    needed = [s.name for s in model.stages if trained.intersection(_parameter_names(model, s))]
    unknown = [name for name in config.lr_ratio if name not in names]
    missing = [name for name in needed if name not in config.lr_ratio]
    if not unknown and not missing:
        return []
    return [
        f"lr_ratio must name the trained stages of {config.model}: {', '.join(names)}; "
        f"unknown: {', '.join(unknown) or 'none'}; "
        f"missing: {', '.join(missing) or 'none'}"
    ]


def _parameter_names(model: StagedModel, stage: Stage) -> list[str]:
    held = {id(p) for p in stage.parameters()}
    return [name for name, p in model.network.named_parameters() if id(p) in held]


def _layer_mistakes(config: TrialConfig, model: StagedModel) -> list[str]:
    mistakes = []
    has_dropout, has_stochastic_depth = _regularised_by(config.model, model)
    if config.dropout is not None and not has_dropout:
        none = "takes none in timm" if is_timm(config.model) else "has no dropout layers"
        mistakes.append(f"dropout: {config.model} {none}; leave it None")
    if config.stochastic_depth is not None and not has_stochastic_depth:
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


def _regularised_by(name: str, model: StagedModel) -> tuple[bool, bool]:
    """Return whether a network has dropout, and stochastic depth, that can be set."""
    if is_timm(name):
        return takes_dropout(name)
    network = model.network
    return bool(dropout_layers(network)), bool(stochastic_depth_layers(network))


def check_image_size(
    config: TrialConfig, size: int, num_classes: int = _UNUSUAL_CLASSES
) -> list[str]:
    """Return the mistake if the network cannot take images of `size` x `size` pixels, else none.

    Args:
        config: whose network, with its own default of `dropout` and the like, is meant.
        size: height and width.
        num_classes: of the data, which the logits of a custom network must fit.
    """
    if is_reference(config.model):
        build = find_own(config.model, "model")
        failure = _own_failure(build, config.model, size, num_classes)
    else:
        failure = _failure(config.model, size, config.aux_weight > 0)
    if failure is None:
        return _failure_of_one(config, size) if config.batch_size == 1 else []
    if is_reference(config.model):
        return [failure]
    common = (32, 48, 64, 96, 128, 160, 192, 224, 256, 299, 384)
    aux = config.aux_weight > 0
    larger = (s for s in common if s > size)
    taken = next((s for s in larger if _failure(config.model, s, aux) is None), None)
    way_out = f"; {taken} is possible (--image-size {taken})" if taken else ""
    return [f"{config.model} cannot take images of {size} x {size} pixels ({failure}){way_out}"]


@lru_cache(maxsize=256)
def _failure(model: str, size: int, aux: bool) -> str | None:
    """Return the error of a forward pass at this size, or None."""
    try:
        staged = copy.deepcopy(skeleton(model, size, aux)).train()
        with torch.no_grad():
            staged(torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        return first_line(error)
    return None


@lru_cache(maxsize=32)
def _own_failure(build: Callable[..., Any], model: str, size: int, num_classes: int) -> str | None:
    """Return what is wrong with a custom network at this size, for so many classes, or None."""
    try:
        staged = _own_staged(model, num_classes)
    except ConfigError as error:
        return str(error)
    called = []
    for training in (False, True):
        with staged.noting_calls() as in_order:
            failure = _own_forward(staged.train(training), size, num_classes)
        if failure is not None:
            when = "while training, " if training else ""
            return f"model {model!r}: images of {size} x {size} pixels: {when}{failure}"
        called.append(in_order)
    failure = _stages_failure(staged, size, *called)
    return None if failure is None else f"model {model!r}: {failure}"


def _stages_failure(
    staged: StagedModel, size: int, called: Sequence[str], called_training: Sequence[str]
) -> str | None:
    """Return what is wrong if freezing by depth would freeze something else than the first stages.

    Args:
        staged: in training mode.
        size: of its images.
        called: its stages, in the order of the data in evaluation.
        called_training: the same in training; some may be called only then.
    """
    listed = [stage.name for stage in staged.stages if stage.name in called]
    if listed != called:
        return (
            f"its stages are called in the order {', '.join(called)}, but listed "
            f"{', '.join(listed)}; give it a method stages() that returns them in that order"
        )
    for stage in staged.stages:
        is_called = stage.name in called or stage.name in called_training
        if not is_called and stage.trained_parameters() and not _is_used(staged, stage, size):
            return (
                f"its stage {stage.name} is never called; leave it out of the network, or give it "
                "a method stages() that puts it into another stage"
            )
    return None


def _is_used(staged: StagedModel, stage: Stage, size: int) -> bool:
    """Whether the logits depend on a stage though no module of it is called; True if unknown."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        logits = staged(torch.zeros(2, 3, size, size))
        if not logits.requires_grad:
            return True
        parameters = stage.trained_parameters()
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


def _own_forward(staged: StagedModel, size: int, num_classes: int) -> str | None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            logits = staged(torch.zeros(2, 3, size, size))
        except (Exception, SystemExit) as error:
            return first_line(error)
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        return (
            f"for two of them and {num_classes} classes it returned {got}, not logits "
            f"(2, {num_classes})"
        )
    return None


def _failure_of_one(config: TrialConfig, size: int) -> list[str]:
    """Return the mistake if the trained part cannot be trained on one image at a time.

    BatchNorm may not be able to. Larger batches never leave a single image over.
    """
    staged = copy.deepcopy(skeleton(config.model, size, config.aux_weight > 0))
    apply_freezing(staged, config, config.epochs)
    device = "cpu" if is_reference(config.model) else "meta"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            staged.train()(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:
        return [
            f"batch_size 1: {config.model} cannot be trained on one image of {size} x {size} "
            f"pixels at a time ({first_line(error)}); give at least 2"
        ]
    return []
