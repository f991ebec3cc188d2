"""Proof that a trial trains what was asked: what was read back against the configuration.

A difference stops the trial.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tuneapp import config as c
from tuneapp.applied import Applied
from tuneapp.checkpoint import TrainState
from tuneapp.config import METRIC_MODES, Amp, Optimizer, TrialConfig
from tuneapp.errors import AppliedValueError
from tuneapp.loop import EpochMetrics
from tuneapp.models import count_parameters, freeze_depth_in, stage_lrs
from tuneapp.schedules import warmup_steps
from tuneapp.staged import StagedModel

_SCHEDULE_CLASSES: Mapping[type[c.Schedule], str] = {
    c.Constant: "ConstantLR",
    c.Step: "StepLR",
    c.MultiStep: "MultiStepLR",
    c.Exponential: "ExponentialLR",
    c.Polynomial: "PolynomialLR",
    c.Cosine: "CosineAnnealingLR",
    c.CosineRestarts: "CosineAnnealingWarmRestarts",
    c.OneCycle: "OneCycleLR",
    c.Cyclic: "CyclicLR",
    c.Plateau: "ReduceLROnPlateau",
    c.OwnSchedule: "LambdaLR",
}
_OPTIMIZER_CLASSES: Mapping[type[Optimizer], str] = {
    c.Sgd: "SGD",
    c.Adam: "Adam",
    c.AdamW: "AdamW",
    c.RmsProp: "RMSprop",
}
_LOSSES: Mapping[type[c.Loss], str] = {
    c.CrossEntropy: "CrossEntropyLoss",
    c.Focal: "focal",
    c.BinaryCrossEntropy: "binary_cross_entropy",
    c.Dice: "dice",
    c.BceDice: "bce_dice",
    c.Iou: "iou",
}


def require_applied(
    applied: Applied,
    config: TrialConfig,
    model: StagedModel,
    device: torch.device,
    steps_per_epoch: int,
    epoch: int = 1,
) -> None:
    """Compare what is applied with what `config` asks for in `epoch`.

    Raises:
        AppliedValueError: they differ; the message names every difference.
    """
    trained = _wanted_trained(config, model, epoch)
    by_stage = {s.name: [p for p in s.parameters() if id(p) in trained] for s in model.stages}
    numbers = sum(p.numel() for p in trained.values())
    one_dimensional = sum(p.numel() for p in trained.values() if p.ndim <= 1)
    decay = config.optimizer.weight_decay
    kind = type(config.loss)
    undecayed = 0 if config.decay_norms_and_biases else one_dimensional
    wanted = {
        "optimizer": _OPTIMIZER_CLASSES[type(config.optimizer)],
        "options": _wanted_options(config.optimizer),
        "weight_decay": decay if numbers > undecayed else 0.0,
        "undecayed_parameters": undecayed if decay > 0 else numbers,
        "schedule": _SCHEDULE_CLASSES[type(config.schedule)],
        "schedule_options": _wanted_schedule_options(config, steps_per_epoch),
        "warmup_steps": warmup_steps(config, steps_per_epoch),
        "trainable_parameters": numbers,
        "frozen_parameters": count_parameters(model.stages) - numbers,
        "frozen_held": 0,
        "frozen_training": (),
        "loss": config.loss.loss if isinstance(config.loss, c.OwnLoss) else _LOSSES[kind],
        "loss_options": _wanted_loss_options(config.loss),
        "aux_weight": config.aux_weight,
        "ema_decay": config.ema_decay,
        "batch_size": config.batch_size,
        "device": device.type,
    }
    got = applied.as_dict()
    wrong = [f"{k} is {got[k]!r}, not {v!r}" for k, v in wanted.items() if got[k] != v]
    if applied.precision not in _allowed_precisions(config.amp, device):
        wrong.append(f"precision is {applied.precision}, with amp={config.amp!r}")
    if applied.frozen_batchnorm not in ("none", config.frozen_batchnorm):
        wrong.append(
            f"frozen_batchnorm is {applied.frozen_batchnorm!r}, not {config.frozen_batchnorm!r}"
        )
    if config.dropout is not None and applied.dropout != (config.dropout,):
        wrong.append(f"dropout is {applied.dropout}, not {config.dropout}")
    if config.stochastic_depth not in (None, applied.stochastic_depth):
        wrong.append(
            f"stochastic_depth is {applied.stochastic_depth}, not {config.stochastic_depth}"
        )
    if config.channels_last and not applied.channels_last:
        wrong.append("channels_last is False, not True")
    lrs = stage_lrs(config, list(by_stage))
    lrs = {name: lrs[name] for name, parameters in by_stage.items() if parameters}
    if applied.lr.keys() != lrs.keys():
        wrong.append(f"the trained stages are {list(applied.lr)}, not {list(lrs)}")
    else:
        wrong += [
            f"lr of {stage} is {applied.lr[stage]!r}, not {lr!r}"
            for stage, lr in lrs.items()
            if not math.isclose(applied.lr[stage], lr, rel_tol=1e-9)
        ]
    _raise(wrong)


def _wanted_trained(config: TrialConfig, model: StagedModel, epoch: int) -> dict[int, Tensor]:
    """Return the parameters that `config` wants trained, whatever the model says of itself."""
    if config.freeze:
        return {
            id(p): p
            for name, p in model.network.named_parameters()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in config.freeze)
        }
    depth = freeze_depth_in(config, len(model.stages), epoch)
    return {id(p): p for stage in model.stages[depth:] for p in stage.parameters()}


def require_trained(state: TrainState, config: TrialConfig, epoch: int) -> None:
    """Check, parameter by parameter, that the optimizer holds what is to be trained.

    Raises:
        AppliedValueError: it does not; the message names the first ones.
    """
    names = {id(p): name for name, p in state.model.network.named_parameters()}
    wanted = _wanted_trained(config, state.model, epoch).keys()
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    missing = [names[key] for key in wanted - held]
    extra = [names.get(key, "a stranger") for key in held - wanted]
    _raise(
        [f"{name} is not trained" for name in sorted(missing)[:3]]
        + [f"{name} is trained" for name in sorted(extra)[:3]]
    )


def require_batches(metrics: EpochMetrics, config: TrialConfig, examples: int, steps: int) -> None:
    """Check, after the first epoch, the batches that were really trained on.

    Raises:
        AppliedValueError: their size or number is not what was asked.
    """
    # A single leftover example joins the batch before it.
    leftover = examples > config.batch_size and examples % config.batch_size == 1
    wrong = []
    if metrics.largest_batch != min(config.batch_size, examples) + leftover:
        wrong.append(f"batch_size is {metrics.largest_batch}, not {config.batch_size}")
    if metrics.steps != steps:
        wrong.append(f"an epoch took {metrics.steps} steps, not {steps}")
    _raise(wrong)


def _wanted_schedule_options(  # noqa: C901 - one flat case for each schedule
    config: TrialConfig, steps_per_epoch: int
) -> dict[str, Any]:
    chosen, n = config.schedule, steps_per_epoch
    rest = config.epochs * n - warmup_steps(config, n)
    match chosen:
        case c.Step():
            return {"step_size": chosen.every_epochs * n, "gamma": chosen.gamma}
        case c.MultiStep():
            return {"milestones": [m * n for m in chosen.milestones], "gamma": chosen.gamma}
        case c.Exponential():
            return {"gamma": chosen.gamma ** (1 / n)}
        case c.Polynomial():
            return {"total_iters": rest, "power": chosen.power}
        case c.Cosine():
            return {"T_max": rest, "eta_min": 0.0}
        case c.CosineRestarts():
            return {"T_0": chosen.first_epochs * n, "T_mult": chosen.multiplier, "eta_min": 0.0}
        case c.OneCycle():
            return {"total_steps": rest}
        case c.Cyclic():
            return {"total_size": 2 * chosen.up_epochs * n, "mode": chosen.mode, "gamma": 1.0}
        case c.Plateau():
            names = ("factor", "patience", "threshold", "cooldown")
            options = {name: getattr(chosen, name) for name in names}
            return {**options, "mode": METRIC_MODES[chosen.monitor]}
        case c.Constant():
            return {"factor": 1.0, "total_iters": 0}
        case c.OwnSchedule():
            return {}


def _wanted_options(optimizer: Optimizer) -> dict[str, Any]:
    match optimizer:
        case c.Sgd():
            return {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
        case c.Adam():
            return {"betas": (optimizer.beta1, optimizer.beta2), "eps": 1e-8}
        case c.RmsProp():
            return {
                "momentum": optimizer.momentum,
                "alpha": optimizer.alpha,
                "eps": optimizer.eps,
                "centered": optimizer.centered,
            }


def _wanted_loss_options(loss: c.Loss) -> dict[str, Any]:
    match loss:
        case c.CrossEntropy():
            weighted = loss.class_weights is not None
            return {"label_smoothing": loss.label_smoothing, "weighted": weighted}
        case c.OwnLoss():
            return {}  # they went into an object that is not ours to look into
        case _:
            return asdict(loss)


def _allowed_precisions(amp: Amp, device: torch.device) -> tuple[str, ...]:
    if amp == "auto":
        return ("float32",) if device.type == "cpu" else ("bfloat16", "float16")
    return ({"bf16": "bfloat16", "fp16": "float16", "off": "float32"}[amp],)


def _raise(wrong: list[str]) -> None:
    if wrong:
        raise AppliedValueError("the trial does not train what was asked: " + "; ".join(wrong))
