"""Optimizers and learning-rate schedules from their configuration: torch's own classes.

One parameter group per trained stage, named after it, at the learning rate that `stage_lrs` says.
Every schedule is stepped once after each optimizer step; what torch counts in epochs is given to
it in steps. Adam and AdamW are torch's fused ones (`benchmarks/optimizer_step.py` says why). SGD is
not: where float16 overflows in its first step, the fused one leaves its momentum uninitialised.
"""

import math
from typing import assert_never

from torch import optim
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from tuneapp.config import Adam, AdamW, Constant, Cosine, OneCycle, Sgd, Step, TrialConfig
from tuneapp.errors import ConfigError
from tuneapp.models import StagedModel, stage_lrs

WARMUP_START = 0.01
"""Share of the learning rate at which a warm-up begins."""


def build_optimizer(model: StagedModel, config: TrialConfig) -> optim.Optimizer:
    """Return the optimizer over the trained stages of `model`."""
    lrs = stage_lrs(config)
    groups = [
        {"name": stage.name, "params": stage.parameters(), "lr": lrs[stage.name]}
        for stage in model.stages[config.freeze_depth :]
    ]
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
        case _:
            assert_never(chosen)


def build_schedule(
    optimizer: optim.Optimizer, config: TrialConfig, steps_per_epoch: int
) -> LRScheduler:
    """Return the schedule over all `config.epochs * steps_per_epoch` optimizer steps."""
    total = config.epochs * steps_per_epoch
    chosen = config.schedule
    if isinstance(chosen, OneCycle):
        if total < 3:
            raise ConfigError(
                f"schedule OneCycle needs 3 optimizer steps, this training has {total}"
            )
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total,
            # Its rise divides by its steps less one.
            pct_start=chosen.pct_start if chosen.pct_start * total > 1 else 2 / total,
            div_factor=chosen.div_factor,
            final_div_factor=chosen.final_div_factor,
            cycle_momentum=False,
        )
    warmup = warmup_steps(config, steps_per_epoch)
    main = _main_schedule(optimizer, chosen, total - warmup, steps_per_epoch)
    if warmup == 0:
        return main
    # LinearLR reaches the full rate at its step `total_iters`, the first step of the main part.
    rise = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup)
    return SequentialLR(optimizer, [rise, main], milestones=[warmup])


def warmup_steps(config: TrialConfig, steps_per_epoch: int) -> int:
    """Return how many optimizer steps the linear warm-up takes, rounded up."""
    fraction = getattr(config.schedule, "warmup_fraction", 0.0)
    total = config.epochs * steps_per_epoch
    return min(math.ceil(fraction * total - 1e-9), total - 1)  # 0.07 * 100 is a bit above 7


def _main_schedule(
    optimizer: optim.Optimizer,
    chosen: Constant | Step | Cosine,
    steps: int,
    steps_per_epoch: int,
) -> LRScheduler:
    match chosen:
        case Constant():
            return ConstantLR(optimizer, factor=1.0, total_iters=0)
        case Step():
            step_size = chosen.every_epochs * steps_per_epoch
            return StepLR(optimizer, step_size=step_size, gamma=chosen.gamma)
        case Cosine():
            return CosineAnnealingLR(optimizer, T_max=steps)
        case _:
            assert_never(chosen)
