"""Learning-rate schedules: torch's own classes, in epochs and shares of the training.

All but `OneCycle`, whose rise is its warm-up, may begin with a linear warm-up. What a schedule
counts in epochs, it counts from the end of the warm-up, as torchvision's reference training does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tuneapp.config.checks import (
    MONITORS,
    Checked,
    Metric,
    above_zero,
    at_least_zero,
    in_interval,
    is_number,
    is_whole,
    one_of,
    reference,
    require,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class _WarmedUp(Checked):
    """Schedules that may begin with a linear warm-up.

    Attributes:
        warmup_fraction: share of all steps during which the learning rate rises linearly from a
            hundredth of its value. A share and not a count, so that a shorter training
            (`--epochs`) keeps its shape, and no warm-up is longer than its training.
    """

    warmup_fraction: float = 0.0

    def _mistakes(self) -> list[str]:
        value = self.warmup_fraction
        ok = is_number(value) and 0 <= value < 1
        return require(ok, "warmup_fraction", value, "a share of the training in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Constant(_WarmedUp):
    """`torch.optim.lr_scheduler.ConstantLR`: one learning rate throughout."""


@dataclass(frozen=True, kw_only=True)
class Step(_WarmedUp):
    """`torch.optim.lr_scheduler.StepLR`: multiply by `gamma` after every `every_epochs` epochs."""

    every_epochs: int
    gamma: float = 0.1

    def _mistakes(self) -> list[str]:
        return [
            *super()._mistakes(),
            *whole("every_epochs", self.every_epochs, 1),
            *in_interval("gamma", self.gamma, "(0, 1]"),
        ]


@dataclass(frozen=True, kw_only=True)
class MultiStep(_WarmedUp):
    """`torch.optim.lr_scheduler.MultiStepLR`: multiply by `gamma` after each of `milestones`.

    Attributes:
        milestones: numbers of epochs, rising.
        gamma: the factor, in (0, 1].
    """

    milestones: Sequence[int]
    gamma: float = 0.1

    def _mistakes(self) -> list[str]:
        listed = list(self.milestones) if isinstance(self.milestones, list | tuple) else []
        ok = bool(listed) and all(is_whole(m, 1) for m in listed)
        ok = ok and all(a < b for a, b in pairwise(listed))
        return [
            *super()._mistakes(),
            *require(
                ok, "milestones", self.milestones, "rising whole numbers >= 1, such as [3, 6]"
            ),
            *in_interval("gamma", self.gamma, "(0, 1]"),
        ]


@dataclass(frozen=True, kw_only=True)
class Exponential(_WarmedUp):
    """`torch.optim.lr_scheduler.ExponentialLR`: smaller at each step, by `gamma` in an epoch.

    torch documents it per epoch; per step it is smooth within an epoch and has the same values at
    the ends of epochs.
    """

    gamma: float

    def _mistakes(self) -> list[str]:
        return [*super()._mistakes(), *in_interval("gamma", self.gamma, "(0, 1]")]


@dataclass(frozen=True, kw_only=True)
class Polynomial(_WarmedUp):
    """`torch.optim.lr_scheduler.PolynomialLR`: down to zero as `(1 - t) ** power`.

    torch documents it per epoch; per step it is smooth within an epoch and has the same values at
    the ends of epochs.
    """

    power: float = 1.0

    def _mistakes(self) -> list[str]:
        return [*super()._mistakes(), *above_zero("power", self.power)]


@dataclass(frozen=True, kw_only=True)
class Cosine(_WarmedUp):
    """`torch.optim.lr_scheduler.CosineAnnealingLR`: one half cosine down to zero.

    torch documents it per epoch; per step it is smooth within an epoch and has the same values at
    the ends of epochs. There is no `eta_min`: torch's is one number for all parameter groups, which
    would change the ratios between the stages.
    """


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(_WarmedUp):
    """`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`: half cosines, each from the top.

    It is stepped after each optimizer step, which torch documents too. There is no `eta_min`, for
    the reason given at `Cosine`.

    Attributes:
        first_epochs: length of the first one (torch's `T_0`).
        multiplier: how much longer each is than the one before it (torch's `T_mult`).
    """

    first_epochs: int
    multiplier: int = 1

    def _mistakes(self) -> list[str]:
        return [
            *super()._mistakes(),
            *whole("first_epochs", self.first_epochs, 1),
            *whole("multiplier", self.multiplier, 1),
        ]


@dataclass(frozen=True, kw_only=True)
class OneCycle(Checked):
    """`torch.optim.lr_scheduler.OneCycleLR`: up to `lr`, its peak, and down to almost nothing.

    The rise takes `pct_start` of all steps, and at least two, so that the peak is reached.

    The momentum (Adam: beta1) stays where the optimizer's configuration puts it.
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def _mistakes(self) -> list[str]:
        return [
            *in_interval("pct_start", self.pct_start, "(0, 1)"),
            *above_zero("div_factor", self.div_factor),
            *above_zero("final_div_factor", self.final_div_factor),
        ]


@dataclass(frozen=True, kw_only=True)
class Cyclic(_WarmedUp):
    """`torch.optim.lr_scheduler.CyclicLR`: up from `base_factor * lr` to `lr` and down again.

    The momentum (Adam: beta1) stays where the optimizer's configuration puts it.

    Attributes:
        up_epochs: epochs of each rise, and of each fall.
        base_factor: where a rise begins, as a share of `lr`, in (0, 1).
        mode: `triangular`, or `triangular2`, which halves the height with each cycle.
    """

    up_epochs: int
    base_factor: float = 0.1
    mode: Literal["triangular", "triangular2"] = "triangular"

    def _mistakes(self) -> list[str]:
        return [
            *super()._mistakes(),
            *whole("up_epochs", self.up_epochs, 1),
            *in_interval("base_factor", self.base_factor, "(0, 1)"),
            *one_of("mode", self.mode, ("triangular", "triangular2")),
        ]


@dataclass(frozen=True, kw_only=True)
class Plateau(_WarmedUp):
    """`torch.optim.lr_scheduler.ReduceLROnPlateau`: multiply by `factor` when nothing improves.

    It looks at `monitor` after each epoch that ends after the warm-up.

    Attributes:
        factor: in (0, 1).
        patience: this many epochs without improvement are tolerated.
        threshold: only a relative improvement by more than this counts.
        cooldown: epochs after a reduction that do not count.
        monitor: `val/loss` (lower is better), which is cross-entropy whatever is minimised; or
            `val/accuracy`, `val/balanced_accuracy` or `val/macro_f1` (higher is better), which suit
            losses of each class against the rest.
        min_factor: in [0, 1): no stage falls below this share of its own learning rate (torch's
            `min_lr` for each parameter group).
    """

    factor: float = 0.1
    patience: int = 2
    threshold: float = 1e-4
    cooldown: int = 0
    monitor: Metric = "val/loss"
    min_factor: float = 0.0

    def _mistakes(self) -> list[str]:
        return [
            *super()._mistakes(),
            *in_interval("factor", self.factor, "(0, 1)"),
            *whole("patience", self.patience, 0),
            *at_least_zero("threshold", self.threshold),
            *whole("cooldown", self.cooldown, 0),
            *one_of("monitor", self.monitor, MONITORS),
            *in_interval("min_factor", self.min_factor, "[0, 1)"),
        ]


@dataclass(frozen=True, kw_only=True)
class OwnSchedule(_WarmedUp):
    """`torch.optim.lr_scheduler.LambdaLR` over a custom function.

    Attributes:
        factor: import path, such as `package.module:name`, of a function
            `factor(epoch, config) -> float`: what the learning rates are multiplied by in this
            epoch, counted from 0 at the end of the warm-up.
    """

    factor: str

    def _mistakes(self) -> list[str]:
        return [*super()._mistakes(), *reference("factor", self.factor)]


Schedule = (
    Constant
    | Step
    | MultiStep
    | Exponential
    | Polynomial
    | Cosine
    | CosineRestarts
    | OneCycle
    | Cyclic
    | Plateau
    | OwnSchedule
)
