"""What a trial really trains with, read back from the objects that train.

Optimizer, schedule, loss, parameters and batches are asked, never the configuration; `proof.py`
compares the two.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torchvision.transforms import v2

from tuneapp.checkpoint import TrainState
from tuneapp.data.batches import Batches
from tuneapp.loop import Precision
from tuneapp.losses import TrainingLoss
from tuneapp.models import read_dropout
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel

_SCHEDULE_OPTIONS = (
    *("step_size", "milestones", "gamma", "total_iters", "power", "T_max", "eta_min", "T_0"),
    *("T_mult", "total_steps", "total_size", "mode", "factor", "patience", "threshold", "cooldown"),
)
_OPTIONS = ("momentum", "nesterov", "betas", "alpha", "eps", "centered")


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
        schedule_options: what it counts with, by torch's names; epochs in steps, and learning
            rates as shares of the peak.
        dropout: probabilities of the dropout layers, without repeats.
        stochastic_depth: highest probability of a block; None without any.
        loss: torch's class, our function, or the import path of the user's.
        loss_options: what it is called with, by the names of the configuration; class weights as
            the numbers themselves.
        aux_weight: of the losses of auxiliary classifiers.
        ema_decay: of the average of the weights; None where there is none.
        channels_last: whether the weights of convolutions lie in this memory format.
        batch_size: examples of one optimizer step; checked against the first epoch's batches.
        device: `cpu` or `cuda`.
        precision: what the forward pass computes in.
        weights: torchvision's or timm's name, `file`, `checkpoint` or `random`.
        view: transforms of each training image, by torchvision's names; the smallest share of the
            area for random crops.
        mixing: transforms of each training batch, with their alphas.
        images: `stored`, decoded once for all, or `streamed`, decoded at each use.
        workers: processes that make the batches.
    """

    lr: dict[str, float]
    optimizer: str
    options: dict[str, Any]
    weight_decay: float
    undecayed_parameters: int
    schedule: str
    schedule_options: dict[str, Any]
    warmup_steps: int
    trainable_parameters: int
    frozen_parameters: int
    frozen_held: int
    frozen_training: tuple[str, ...]
    frozen_batchnorm: str
    dropout: tuple[float, ...]
    stochastic_depth: float | None
    loss: str
    loss_options: dict[str, Any]
    aux_weight: float
    ema_decay: float | None
    channels_last: bool
    batch_size: int
    device: str
    precision: str
    weights: str
    view: tuple[str, ...]
    mixing: dict[str, float]
    images: str
    workers: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def read_back(
    state: TrainState, loss_fn: TrainingLoss, batches: Batches, precision: Precision, weights: str
) -> Applied:
    """Read what the trial will train with from the objects themselves, before they do."""
    model, optimizer, schedule = state.model, state.optimizer, state.schedule
    loss, loss_options = loss_fn.describe()
    if loss_options.get("class_weights") is not None:  # float32
        loss_options["class_weights"] = [float(f"{w:.6g}") for w in loss_options["class_weights"]]
    groups = optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    parameters = list(model.parameters())
    dropout, stochastic_depth = read_dropout(model.network)
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
        schedule_options=_schedule_options(schedule),
        warmup_steps=schedule.warmup_steps,
        trainable_parameters=sum(
            p.numel() * held.count(id(p)) for p in parameters if p.requires_grad
        ),
        frozen_parameters=sum(p.numel() for p in parameters if not p.requires_grad),
        frozen_held=sum(p.numel() for p in parameters if id(p) in held and not p.requires_grad),
        frozen_training=_frozen_training(model),
        frozen_batchnorm=_frozen_batchnorm(model),
        dropout=dropout,
        stochastic_depth=stochastic_depth,
        loss=loss,
        loss_options=loss_options,
        aux_weight=loss_fn.aux_weight,
        ema_decay=None if state.average is None else state.average.decay,
        channels_last=_is_channels_last(parameters),
        batch_size=batches.batch_size,
        device=parameters[0].device.type,
        precision=str(precision.dtype).removeprefix("torch."),
        weights=weights,
        view=_names_of(batches.view),
        mixing=_alphas_of(batches.mix),
        images="streamed" if batches.is_streamed else "stored",
        workers=batches.workers,
    )


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
        if isinstance(m, _BatchNorm)
        and m.affine
        and not any(p.requires_grad for p in m.parameters())
    }
    if len(modes) == 2:
        return "mixed"
    return "none" if not modes else "train" if modes.pop() else "eval"


def _is_channels_last(parameters: list[nn.Parameter]) -> bool:
    # One pixel, or one channel, lies in both formats.
    wide = [p for p in parameters if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return bool(wide) and all(p.is_contiguous(memory_format=torch.channels_last) for p in wide)


def _schedule_options(schedule: Schedule) -> dict[str, Any]:
    found = {n: v for n, v in vars(schedule.main).items() if n in _SCHEDULE_OPTIONS}
    if "milestones" in found:
        found["milestones"] = sorted(found["milestones"])  # torch counts them
    if isinstance(schedule.main, OneCycleLR | CyclicLR):
        found |= _cycle_options(schedule.main)
    if schedule.monitor is not None:
        found["monitor"] = schedule.monitor
    if schedule.rise is not None:
        found["warmup_start"] = schedule.rise.start_factor
    return found


def _cycle_options(main: OneCycleLR | CyclicLR) -> dict[str, Any]:
    """Return what the cycling schedules keep in their groups and private lists, as shares."""
    if isinstance(main, CyclicLR):
        shares = {b / top for b, top in zip(main.base_lrs, main.max_lrs, strict=True) if top}
        return {"base_factor": _common([_rounded(s) for s in sorted(shares)])}
    groups = [g for g in main.optimizer.param_groups if g["max_lr"]]
    return {
        "peak_step": _rounded(main._schedule_phases[0]["end_step"]),
        "div_factor": _common([_rounded(g["max_lr"] / g["initial_lr"]) for g in groups]),
        "final_div_factor": _common([_rounded(g["initial_lr"] / g["min_lr"]) for g in groups]),
    }


def _rounded(value: float) -> float:
    """Return a quotient without the last digits, in which rounding shows."""
    return float(f"{value:.9g}")


def _names_of(view: Any) -> tuple[str, ...]:
    """Return the names of a view's transforms; custom ones by their class."""
    steps = view.transforms if isinstance(view, v2.Compose) else [view]
    return tuple(
        f"{type(step).__name__}(scale={step.scale[0]:g})"
        if isinstance(step, v2.RandomResizedCrop)
        else type(step).__name__
        for step in steps
    )


def _alphas_of(mix: Any) -> dict[str, float]:
    """Return the alpha of each transform that may mix a batch, by torchvision's names."""
    return {} if mix is None else {type(m).__name__: float(m.alpha) for m in mix.transforms}


def _common(values: list[Any]) -> Any:
    """Return the one value of all groups, or else all values."""
    return values[0] if all(v == values[0] for v in values) else values
