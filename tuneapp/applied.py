"""Proof that a trial trains with what was asked: read back, compared, and recorded.

What is read comes from the objects that train (optimizer, schedule, parameters, batches); what it
is compared with comes from the configuration. A difference stops the trial.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CyclicLR

from tuneapp import config as c
from tuneapp.checkpoint import TrainState
from tuneapp.config import Amp, Optimizer, TrialConfig
from tuneapp.errors import AppliedValueError
from tuneapp.loop import EpochMetrics, Precision
from tuneapp.losses import TrainingLoss
from tuneapp.models import StagedModel, count_parameters, freeze_depth_in, stage_lrs
from tuneapp.schedules import Schedule, warmup_steps

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
_OPTIONS = ("momentum", "nesterov", "betas", "alpha", "eps", "centered")
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


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a trial really trains with.

    Attributes:
        lr: peak learning rate of each trained stage.
        optimizer: class name.
        options: momentum, betas and the like, by torch's names; a list where the groups differ,
            which they must not.
        weight_decay: of all that is decayed; NaN where it differs.
        undecayed_parameters: trained numbers without weight decay.
        schedule: class name of what follows the warm-up.
        warmup_steps: optimizer steps of the warm-up.
        trainable_parameters: numbers that the optimizer changes.
        frozen_parameters: numbers that stay.
        frozen_held: frozen numbers that the optimizer holds all the same; must be 0.
        frozen_training: names of frozen stages that are not in `eval()` mode, apart from their
            BatchNorm; must be empty.
        frozen_batchnorm: mode of the frozen BatchNorm layers: `eval`, `train`, `mixed` or `none`.
        loss: torch's class, our function, or the import path of the user's.
        loss_options: what it is called with, by the names of the configuration.
        aux_weight: of the losses of auxiliary classifiers.
        ema_decay: of the average of the weights; None where there is none.
        channels_last: whether the weights of convolutions lie in this memory format.
        batch_size: examples of one optimizer step; checked against the first epoch's batches.
        device: `cpu` or `cuda`.
        precision: what the forward pass computes in.
        weights: torchvision's name, `file` or `random`.
    """

    lr: dict[str, float]
    optimizer: str
    options: dict[str, Any]
    weight_decay: float
    undecayed_parameters: int
    schedule: str
    warmup_steps: int
    trainable_parameters: int
    frozen_parameters: int
    frozen_held: int
    frozen_training: tuple[str, ...]
    frozen_batchnorm: str
    loss: str
    loss_options: dict[str, Any]
    aux_weight: float
    ema_decay: float | None
    channels_last: bool
    batch_size: int
    device: str
    precision: str
    weights: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def read_back(
    state: TrainState, loss_fn: TrainingLoss, batch_size: int, precision: Precision, weights: str
) -> Applied:
    """Read what the trial will train with from the objects themselves, before they do."""
    model, optimizer, schedule = state.model, state.optimizer, state.schedule
    loss, loss_options = loss_fn.describe()
    groups = optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    parameters = list(model.parameters())
    decays = {float(g["weight_decay"]) for g in groups}
    return Applied(
        lr=_stage_rates(model, groups, schedule),
        optimizer=type(optimizer).__name__,
        options={
            name: _common([g[name] for g in groups]) for name in _OPTIONS if name in groups[0]
        },
        weight_decay=max(decays) if len(decays - {0.0}) <= 1 else math.nan,
        undecayed_parameters=sum(
            p.numel() for g in groups if g["weight_decay"] == 0 for p in g["params"]
        ),
        schedule=type(schedule.main).__name__,
        warmup_steps=schedule.warmup_steps,
        trainable_parameters=sum(
            p.numel() * held.count(id(p)) for p in parameters if p.requires_grad
        ),
        frozen_parameters=sum(p.numel() for p in parameters if not p.requires_grad),
        frozen_held=sum(p.numel() for p in parameters if id(p) in held and not p.requires_grad),
        frozen_training=_frozen_training(model),
        frozen_batchnorm=_frozen_batchnorm(model),
        loss=loss,
        loss_options=loss_options,
        aux_weight=loss_fn.aux_weight,
        ema_decay=None if state.average is None else state.average.decay,
        channels_last=_is_channels_last(parameters),
        batch_size=batch_size,
        device=parameters[0].device.type,
        precision=str(precision.dtype).removeprefix("torch."),
        weights=weights,
    )


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


def _stage_rates(
    model: StagedModel, groups: list[dict[str, Any]], schedule: Schedule
) -> dict[str, float]:
    """Return the peak learning rate of each stage that has one, by its own parameters.

    The names of the groups are not believed. A stage whose trained parameters have several rates,
    or of which some have none, gets NaN, which equals nothing.
    """
    peaks = [float(g.get("max_lr", g["initial_lr"])) for g in groups]
    if isinstance(schedule.main, CyclicLR):  # it keeps its peaks to itself
        peaks = [float(peak) for peak in schedule.main.max_lrs]
    rates = {id(p): peak for g, peak in zip(groups, peaks, strict=True) for p in g["params"]}
    found: dict[str, float] = {}
    for stage in model.stages:
        of_stage = {rates.get(id(p)) for p in stage.parameters() if p.requires_grad}
        of_stage |= {rates[id(p)] for p in stage.parameters() if id(p) in rates}
        if of_stage - {None}:
            rate = of_stage.pop()
            found[stage.name] = rate if rate is not None and not of_stage else math.nan
    return found


def _frozen_training(model: StagedModel) -> tuple[str, ...]:
    return tuple(
        stage.name
        for stage in model.stages
        if model.is_frozen(stage)
        and any(m.training for m in stage.module.modules() if not isinstance(m, _BatchNorm))
    )


def _frozen_batchnorm(model: StagedModel) -> str:
    modes = {
        m.training
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.affine and not m.weight.requires_grad
    }
    if len(modes) == 2:
        return "mixed"
    return "none" if not modes else "train" if modes.pop() else "eval"


def _is_channels_last(parameters: list[nn.Parameter]) -> bool:
    # One pixel, or one channel, lies in both formats.
    wide = [p for p in parameters if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return bool(wide) and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


def _common(values: list[Any]) -> Any:
    """Return the one value of all groups, or else all values."""
    return values[0] if all(v == values[0] for v in values) else values


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
