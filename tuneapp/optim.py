"""Optimizers from their configuration: torch's own classes.

One parameter group per trained stage, at the learning rate that `stage_lrs` says; two, where biases
and norms are not decayed. Adam and AdamW are torch's fused ones (`benchmarks/optimizer_step.py`
says why). SGD and RMSprop are not: where float16 overflows in its first step, the fused SGD leaves
its momentum uninitialised, and torch has no fused RMSprop.
"""

from collections.abc import Sequence
from typing import Any, assert_never

from torch import nn, optim

from tuneapp.config import Adam, AdamW, RmsProp, Sgd, TrialConfig
from tuneapp.models import stage_lrs
from tuneapp.staged import StagedModel


def build_optimizer(model: StagedModel, config: TrialConfig) -> optim.Optimizer:
    """Return the optimizer over what of `model` is not frozen."""
    groups = _groups(model, config)
    chosen = config.optimizer
    match chosen:
        case Sgd():
            return optim.SGD(
                groups,
                lr=chosen.lr,
                momentum=chosen.momentum,
                nesterov=chosen.nesterov,
                weight_decay=chosen.weight_decay,
            )
        case AdamW() | Adam():  # AdamW is an Adam: its own class must be asked for first
            kind = optim.AdamW if isinstance(chosen, AdamW) else optim.Adam
            return kind(
                groups,
                lr=chosen.lr,
                betas=(chosen.beta1, chosen.beta2),
                weight_decay=chosen.weight_decay,
                fused=True,
            )
        case RmsProp():
            return optim.RMSprop(
                groups,
                lr=chosen.lr,
                alpha=chosen.alpha,
                eps=chosen.eps,
                momentum=chosen.momentum,
                centered=chosen.centered,
                weight_decay=chosen.weight_decay,
            )
        case _:
            assert_never(chosen)


def rebuild_optimizer(
    old: optim.Optimizer, model: StagedModel, config: TrialConfig
) -> optim.Optimizer:
    """Return the optimizer over what of `model` is trained now, with what `old` knows of it."""
    new = build_optimizer(model, config)
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]
    return new


def is_decayed(parameter: nn.Parameter, config: TrialConfig) -> bool:
    """Whether weight decay shrinks a parameter; one of a single dimension is a bias or a scale."""
    return config.decay_norms_and_biases or parameter.ndim > 1


def _groups(model: StagedModel, config: TrialConfig) -> list[dict[str, Any]]:
    lrs = stage_lrs(config, [stage.name for stage in model.stages])
    groups = []
    for stage in model.stages:
        trained = stage.trained_parameters()
        decayed = [p for p in trained if is_decayed(p, config)]
        others = [p for p in trained if not is_decayed(p, config)]
        parts: Sequence[tuple[str, list[nn.Parameter], dict[str, float]]] = (
            (stage.name, decayed, {}),
            (f"{stage.name} (norms, biases)", others, {"weight_decay": 0.0}),
        )
        for name, parameters, own in parts:
            if parameters:
                group = {"name": name, "stage": stage.name, "params": parameters}
                groups.append({**group, "lr": lrs[stage.name], **own})
    return groups
