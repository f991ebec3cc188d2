"""Learning-rate schedules from their configuration: torch's own classes, after a linear warm-up.

Every schedule is stepped after each optimizer step, and what torch counts in epochs is given to it
in steps; only a plateau, which looks at a metric, is stepped after each epoch.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, assert_never

from torch import Tensor, optim
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from tuneapp import config as c
from tuneapp.config import TrialConfig, metric_mode
from tuneapp.data.sampling import num_batches
from tuneapp.errors import ConfigError, say_cause
from tuneapp.own import find_own

ONE_CYCLE_STEPS = 3
"""The fewest steps in which OneCycleLR can rise and fall."""
WARMUP_START = 0.01
"""Share of the learning rate at which a warm-up begins."""


class Schedule:
    """How the learning rates of all parameter groups change over a training.

    Attributes:
        main: torch's schedule; after the warm-up, where there is one.
        monitor: the metric that a plateau looks at, or None.
        rise: the linear warm-up, or None.
    """

    def __init__(self, optimizer: optim.Optimizer, config: TrialConfig, steps_per_epoch: int):
        """Begin the schedule over all `config.epochs * steps_per_epoch` optimizer steps.

        Raises:
            ConfigError: the training is too short for it, or a function of the user's own fails.
        """
        self._steps_per_epoch = steps_per_epoch
        self._steps_done = 0
        self.monitor: str | None = getattr(config.schedule, "monitor", None)
        warmup = warmup_steps(config, steps_per_epoch)
        self.main = _build_main(optimizer, config, steps_per_epoch, warmup)
        # A plateau does not note it by itself; cycles must do so themselves, by another value.
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.rise = None
        self._each_step: LRScheduler | None = None
        if warmup > 0:
            # LinearLR reaches the full rate at its step `total_iters`, the first of the main part.
            self.rise = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup)
        if isinstance(self.main, ReduceLROnPlateau):
            self._each_step = self.rise
        elif self.rise is None:
            self._each_step = self.main
        else:
            self._each_step = SequentialLR(optimizer, [self.rise, self.main], milestones=[warmup])

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return 0 if self.rise is None else int(self.rise.total_iters)

    def step(self) -> None:
        """Go on by one optimizer step."""
        self._steps_done += 1
        if self._each_step is not None:
            self._each_step.step()

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Tell the metrics of an epoch; only a plateau looks at them, after its warm-up."""
        if isinstance(self.main, ReduceLROnPlateau) and self._steps_done > self.warmup_steps:
            assert self.monitor is not None
            self.main.step(row[self.monitor])

    def replay(self, history: Sequence[Mapping[str, float]]) -> None:
        """Go on by these epochs at once, without a training."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for row in history:
                for _ in range(self._steps_per_epoch):
                    self.step()
                self.end_epoch(row)

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes."""
        parts = {"main": self.main, "each_step": self._each_step}
        return {
            "steps_done": self._steps_done,
            **{name: part.state_dict() for name, part in parts.items() if part is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of the same schedule."""
        self._steps_done = state["steps_done"]
        self.main.load_state_dict(state["main"])
        if self._each_step is not None:
            self._each_step.load_state_dict(state["each_step"])


def warmup_steps(config: TrialConfig, steps_per_epoch: int) -> int:
    """Return how many optimizer steps the linear warm-up takes, rounded up."""
    fraction = getattr(config.schedule, "warmup_fraction", 0.0)
    total = config.epochs * steps_per_epoch
    return min(math.ceil(fraction * total - 1e-9), total - 1)  # 0.07 * 100 is a bit above 7


def check_schedule(config: TrialConfig) -> list[str]:
    """Return what is wrong with a schedule of the user's own."""
    if not isinstance(config.schedule, c.OwnSchedule):
        return []
    try:
        factor = _own_factor(config.schedule, config)
        for epoch in range(config.epochs):
            factor(epoch)
    except ConfigError as error:
        return [str(error)]
    return []


def check_steps(config: TrialConfig, num_examples: int) -> list[str]:
    """Return whether a training on so many examples is too short for the schedule."""
    steps = config.epochs * num_batches(num_examples, config.batch_size)
    if isinstance(config.schedule, c.OneCycle) and steps < ONE_CYCLE_STEPS:
        return [_too_short(steps)]
    return []


def idle_choices(configs: Iterable[TrialConfig]) -> list[str]:
    """Return values of schedules that never act because the training ends before, one for a field.

    They are legal: a search may meet them, above all with `--epochs`.
    """
    found: dict[tuple[type, str], str] = {}
    for config in configs:
        idle = _idle_choice(config)
        if idle is not None:
            field, value, consequence = idle
            kind = type(config.schedule)
            epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
            words = f"schedule {kind.__name__}: {field}={value} in {epochs}: {consequence}"
            found.setdefault((kind, field), words)
    return list(found.values())


def _idle_choice(config: TrialConfig) -> tuple[str, object, str] | None:
    """Return a field whose value has no effect in this training, the value, and what follows."""
    schedule, falls = config.schedule, "the learning rate never falls"
    warmup = getattr(schedule, "warmup_fraction", 0.0) * config.epochs
    rest = round(config.epochs - warmup, 6)
    match schedule:
        case c.Step(every_epochs=every) if every >= rest:
            return "every_epochs", every, falls
        case c.MultiStep(milestones=milestones) if milestones[-1] >= rest:
            late = [milestone for milestone in milestones if milestone >= rest]
            return "milestones", late, "they lie after the training"
        case c.CosineRestarts(first_epochs=first) if first > rest:
            return "first_epochs", first, "the first cosine does not end"
        case c.Cyclic(up_epochs=up) if up > rest:
            return "up_epochs", up, "the first rise does not end"
        # The first epoch sets the best value, `patience + 1` more fail to improve it, and the rate
        # falls for one after those. Only epochs that end after the warm-up count.
        case c.Plateau(patience=patience) if math.ceil(rest) < patience + 3:
            return "patience", patience, falls
        case _:
            return None


def _too_short(steps: int) -> str:
    return (
        f"schedule OneCycle needs {ONE_CYCLE_STEPS} optimizer steps, this training has {steps}; "
        "give more epochs, or a smaller batch_size"
    )


def _build_main(  # noqa: C901 - one flat case for each schedule
    optimizer: optim.Optimizer, config: TrialConfig, steps_per_epoch: int, warmup: int
) -> LRScheduler | ReduceLROnPlateau:
    chosen = config.schedule
    steps = config.epochs * steps_per_epoch - warmup
    match chosen:
        case c.Constant():
            return ConstantLR(optimizer, factor=1.0, total_iters=0)
        case c.Step():
            step_size = chosen.every_epochs * steps_per_epoch
            return StepLR(optimizer, step_size=step_size, gamma=chosen.gamma)
        case c.MultiStep():
            milestones = [epoch * steps_per_epoch for epoch in chosen.milestones]
            return MultiStepLR(optimizer, milestones=milestones, gamma=chosen.gamma)
        case c.Exponential():
            return ExponentialLR(optimizer, gamma=chosen.gamma ** (1 / steps_per_epoch))
        case c.Polynomial():
            return PolynomialLR(optimizer, total_iters=steps, power=chosen.power)
        case c.Cosine():
            return CosineAnnealingLR(optimizer, T_max=steps)
        case c.CosineRestarts():
            first = chosen.first_epochs * steps_per_epoch
            return CosineAnnealingWarmRestarts(optimizer, T_0=first, T_mult=chosen.multiplier)
        case c.OneCycle():
            return _one_cycle(optimizer, chosen, steps)
        case c.Cyclic():
            return _cyclic(optimizer, chosen, steps_per_epoch)
        case c.Plateau():
            return ReduceLROnPlateau(
                optimizer,
                mode=metric_mode(chosen.monitor),
                factor=chosen.factor,
                patience=chosen.patience,
                threshold=chosen.threshold,
                cooldown=chosen.cooldown,
                min_lr=[chosen.min_factor * group["lr"] for group in optimizer.param_groups],
                eps=0.0,  # or else the rates of low stages stay where those of high ones fall
            )
        case c.OwnSchedule():
            factor = _own_factor(chosen, config)
            last = config.epochs - 1  # torch asks after the last step, too
            return LambdaLR(optimizer, lambda step: factor(min(step // steps_per_epoch, last)))
        case _:
            assert_never(chosen)


def _one_cycle(optimizer: optim.Optimizer, chosen: c.OneCycle, total: int) -> OneCycleLR:
    if total < ONE_CYCLE_STEPS:
        raise ConfigError(_too_short(total))
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total,
        # Its peak is at step `pct_start * total_steps - 1`, counted from 0: step 1 at the earliest.
        pct_start=max(chosen.pct_start * total, 2) / total,
        div_factor=chosen.div_factor,
        final_div_factor=chosen.final_div_factor,
        cycle_momentum=False,
    )


def _cyclic(optimizer: optim.Optimizer, chosen: c.Cyclic, steps_per_epoch: int) -> CyclicLR:
    tops = [group["lr"] for group in optimizer.param_groups]
    return CyclicLR(
        optimizer,
        base_lr=[chosen.base_factor * top for top in tops],
        max_lr=tops,
        step_size_up=chosen.up_epochs * steps_per_epoch,
        mode=chosen.mode,
        cycle_momentum=False,
    )


def _own_factor(chosen: c.OwnSchedule, config: TrialConfig) -> Callable[[int], float]:
    """Return the custom function of the epoch, which says what is wrong with its results."""
    function = find_own(chosen.factor, "schedule")

    def factor(epoch: int) -> float:
        call = f"schedule {chosen.factor!r}: in epoch {epoch} it"
        try:
            value = function(epoch, config)
            number = _number(value)
        except Exception as error:
            raise ConfigError(f"{call} failed: {say_cause(error)}") from error
        if not 0 <= number < math.inf:
            shown = " ".join(repr(value).split())
            raise ConfigError(f"{call} returned {shown}; it must be a number >= 0 and finite")
        return number

    return factor


def _number(value: object) -> float:
    """Return a number, of Python, numpy or torch, as a float; NaN for all else."""
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    return float(value)
