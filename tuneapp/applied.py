"""Proof that a trial trains with what was asked: read back, compared, and recorded.

What is read comes from the objects that train (optimizer, schedule, parameters, batches); what it
is compared with comes from the configuration. A difference stops the trial.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import optim
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from tuneapp.config import (
    Amp,
    Constant,
    Cosine,
    OneCycle,
    Optimizer,
    Schedule,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.errors import AppliedValueError
from tuneapp.loop import EpochMetrics, Precision
from tuneapp.models import StagedModel, count_parameters, stage_lrs

_SCHEDULE_CLASSES: dict[type[Schedule], str] = {
    Constant: "ConstantLR",
    Step: "StepLR",
    Cosine: "CosineAnnealingLR",
    OneCycle: "OneCycleLR",
}
_OPTIONS = ("momentum", "nesterov", "betas", "weight_decay")
_OPTIMIZER_CLASSES = {"Sgd": "SGD", "Adam": "Adam", "AdamW": "AdamW"}


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a trial really trains with.

    Attributes:
        lr: peak learning rate of each trained stage.
        optimizer: class name.
        options: momentum, betas, weight decay and the like, by torch's names; a list where the
            groups differ, which they must not.
        schedule: class name of what follows the warm-up.
        warmup_steps: optimizer steps of the warm-up.
        trainable_parameters: numbers that the optimizer changes.
        frozen_parameters: numbers that stay.
        frozen_held: frozen numbers that the optimizer holds all the same; must be 0.
        frozen_training: names of frozen stages that are not in `eval()` mode; must be empty.
        batch_size: examples of one optimizer step; checked against the first epoch's batches.
        device: `cpu` or `cuda`.
        precision: what the forward pass computes in.
        weights: torchvision's name, `file` or `random`.
    """

    lr: dict[str, float]
    optimizer: str
    options: dict[str, Any]
    schedule: str
    warmup_steps: int
    trainable_parameters: int
    frozen_parameters: int
    frozen_held: int
    frozen_training: tuple[str, ...]
    batch_size: int
    device: str
    precision: str
    weights: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def read_back(
    model: StagedModel,
    optimizer: optim.Optimizer,
    schedule: LRScheduler,
    batch_size: int,
    precision: Precision,
    weights: str,
) -> Applied:
    """Read what the trial will train with from the objects themselves, before the first step."""
    groups = optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    parameters = list(model.parameters())
    main, warmup = schedule, 0
    if isinstance(schedule, SequentialLR):
        main, warmup = schedule._schedulers[-1], schedule._milestones[0]
    frozen = model.stages[: model.freeze_depth]
    return Applied(
        lr=_stage_rates(model, groups),
        optimizer=type(optimizer).__name__,
        options={
            name: _common([g[name] for g in groups]) for name in _OPTIONS if name in groups[0]
        },
        schedule=type(main).__name__,
        warmup_steps=warmup,
        trainable_parameters=sum(
            p.numel() * held.count(id(p)) for p in parameters if p.requires_grad
        ),
        frozen_parameters=sum(p.numel() for p in parameters if not p.requires_grad),
        frozen_held=sum(p.numel() for p in parameters if id(p) in held and not p.requires_grad),
        frozen_training=tuple(
            s.name for s in frozen if any(m.training for m in s.module.modules())
        ),
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
    warmup_steps: int,
) -> None:
    """Compare what is applied with what `config` asks.

    Raises:
        AppliedValueError: they differ; the message names every difference.
    """
    kind = type(config.optimizer).__name__
    trained = model.stages[config.freeze_depth :]
    frozen = model.stages[: config.freeze_depth]
    wanted = {
        "optimizer": _OPTIMIZER_CLASSES[kind],
        "options": _wanted_options(config.optimizer),
        "schedule": _SCHEDULE_CLASSES[type(config.schedule)],
        "warmup_steps": warmup_steps,
        "trainable_parameters": count_parameters(trained),
        "frozen_parameters": count_parameters(frozen),
        "frozen_held": 0,
        "frozen_training": (),
        "batch_size": config.batch_size,
        "device": device.type,
    }
    got = applied.as_dict()
    wrong = [f"{k} is {got[k]!r}, not {v!r}" for k, v in wanted.items() if got[k] != v]
    if applied.precision not in _allowed_precisions(config.amp, device):
        wrong.append(f"precision is {applied.precision}, with amp={config.amp!r}")
    lrs = stage_lrs(config)
    if applied.lr.keys() != lrs.keys():
        wrong.append(f"the trained stages are {list(applied.lr)}, not {list(lrs)}")
    else:
        wrong += [
            f"lr of {stage} is {applied.lr[stage]!r}, not {lr!r}"
            for stage, lr in lrs.items()
            if not math.isclose(applied.lr[stage], lr, rel_tol=1e-9)
        ]
    _raise(wrong)


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


def _stage_rates(model: StagedModel, groups: list[dict[str, Any]]) -> dict[str, float]:
    """Return the peak learning rate of each stage that has one, by its own parameters.

    The names of the groups are not believed. A stage whose parameters have several rates, or of
    which some have none, gets NaN, which equals nothing.
    """
    rates = {id(p): float(g.get("max_lr", g["initial_lr"])) for g in groups for p in g["params"]}
    found: dict[str, float] = {}
    for stage in model.stages:
        of_stage = {rates.get(id(p)) for p in stage.parameters()}
        if of_stage != {None}:
            rate = of_stage.pop()
            found[stage.name] = rate if rate is not None and not of_stage else math.nan
    return found


def _common(values: list[Any]) -> Any:
    """Return the one value of all groups, or else all values."""
    return values[0] if all(v == values[0] for v in values) else values


def _wanted_options(optimizer: Optimizer) -> dict[str, Any]:
    if isinstance(optimizer, Sgd):
        return {
            "momentum": optimizer.momentum,
            "nesterov": optimizer.nesterov,
            "weight_decay": optimizer.weight_decay,
        }
    betas = (optimizer.beta1, optimizer.beta2)
    return {"betas": betas, "weight_decay": optimizer.weight_decay}


def _allowed_precisions(amp: Amp, device: torch.device) -> tuple[str, ...]:
    if amp == "auto":
        return ("float32",) if device.type == "cpu" else ("bfloat16", "float16")
    return ({"bf16": "bfloat16", "fp16": "float16", "off": "float32"}[amp],)


def _raise(wrong: list[str]) -> None:
    if wrong:
        raise AppliedValueError("the trial does not train what was asked: " + "; ".join(wrong))
