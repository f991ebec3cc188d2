"""The learning-rate range test: which learning rates are worth searching.

The learning rates of all stages rise together, exponentially, from far too small to far too large,
while the training loss is watched (L. N. Smith, Cyclical Learning Rates for Training Neural
Networks, 2017). The ratios between the stages stay what the configuration says.

A curve that does not fall still has a largest and a smallest value. So bounds are proposed only if
the loss falls by more than noise alone can explain. The range is then the whole fall, from its
beginning to the smallest loss. fastai's `lr_find` suggests one rate to train with instead: where
the curve is steepest (`steep`), or a point well inside its longest fall (`valley`). A search needs
both ends.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean, median, stdev
from typing import Literal

import torch

from tuneapp.config import Constant, TrialConfig
from tuneapp.data.batches import Batch, Batches
from tuneapp.errors import ConfigError, TrialError
from tuneapp.loop import train_one_epoch
from tuneapp.training import Training, TrialRun, begin_training

WINDOW = 0.05
"""Share of all steps to either side over which the loss is averaged. Steps after a learning rate
count as much as those before it: an average of the past alone would show its minimum too late."""
SPIKE = 8.0
"""A loss is a spike if it is this many times further from its neighbours than losses usually are;
in normally distributed noise, that is one in 10 million."""
BLOWN_UP = 4.0
"""A seed ends where its smoothed loss is this many times its smallest, and above its first."""
BEGUN = 0.1
"""Share of the whole fall of the loss after which a learning rate counts as large enough."""
FLAT = 0.4
"""Share of the largest fall that noise explains, by which the flat part of a curve may lie below
its largest value. In simulated curves, 0.5 puts the low bound late, and 0.3 at times early."""
MIN_FALL = 0.03
"""A fall by a smaller share of the loss is too little to search by."""
NOISE_SDS = 5.0
"""How many standard deviations of a difference of two smoothed losses a fall must have. Two given
points would need 2. The largest of a whole curve's differences is below 3.8 in 95 % of curves that
are nothing but noise, and below 5 where the noise triples or each step keeps 0.3 of the last."""
SEED_SDS = 2.0
"""How many standard errors the fall must have over the seeds: they must agree about it."""
MIN_STEPS = 10
"""A shorter curve says too little about its own noise."""

End = Literal["reached the end", "diverged", "blew up"]


@dataclass(frozen=True)
class SeedCurve:
    """One seed of the test.

    Attributes:
        losses: training loss of each step, in nats for cross-entropy, up to where the seed ended.
        end: why it ended. "diverged": the next loss is not finite. "blew up": see `BLOWN_UP`.
    """

    losses: tuple[float, ...]
    end: End


@dataclass(frozen=True)
class LrRange:
    """What the test saw, and what it proposes.

    Attributes:
        lrs: the planned `lr` of each step, rising.
        curves: of each seed; shorter than `lrs` where the seed ended early.
        averaged: how many seeds are in the mean: those that got furthest, at least half of them.
        smoothed: their mean, without spikes, smoothed by `smooth`, as far as all of these seeds go.
        fall: by how much it falls, in units of the loss.
        noise: the largest fall that noise alone explains, in units of the loss.
        low: the smallest learning rate worth trying; None where there is nothing to propose.
        high: where the smoothed loss is smallest.
        steepest: between them, where it falls fastest over the logarithm of the learning rate.
    """

    lrs: tuple[float, ...]
    curves: tuple[SeedCurve, ...]
    averaged: int
    smoothed: tuple[float, ...]
    fall: float
    noise: float
    low: float | None = None
    high: float | None = None
    steepest: float | None = None

    @property
    def is_still_falling(self) -> bool:
        """Whether the loss is smallest at the last `lr` that was planned."""
        # The last whole window ends with the last step, and is around this one. A curve that ends
        # earlier has its last window, and so its smallest loss, before it.
        last = self.lrs[-1 - reach_of(len(self.lrs))]
        return self.high is not None and self.high >= last

    @property
    def ended_at_once(self) -> bool:
        """Whether most seeds ended before there was a curve to read."""
        half = sorted(len(curve.losses) for curve in self.curves)[len(self.curves) // 2]
        return half < len(self.lrs) and half < max(MIN_STEPS, len(self.lrs) // 4)

    def last_lr(self, curve: SeedCurve) -> float:
        """Return the `lr` of the last step that a seed made."""
        return self.lrs[max(len(curve.losses), 1) - 1]


def find_lr_range(
    config: TrialConfig,
    run: TrialRun,
    *,
    steps: int = 100,
    seeds: int = 3,
    lowest: float = 1e-6,
    highest: float = 1.0,
) -> LrRange:
    """Raise the learning rate from `lowest` to `highest`, once for each seed.

    Each seed builds a new network, optimizer and batches; torch's random generators and number of
    threads are left as they were, and no file is written. What trains is what trains in epoch 1:
    `unfreeze_at` is not tested.

    Args:
        config: what to train; its schedule is not used, nor the size of its `lr`.
        run: where and how.
        steps: optimizer steps of each seed.
        seeds: number of draws of head weights, dropout and batches, which are averaged; they are
            `config.seed` and those after it.
        lowest: `lr` in the first step; the stages have their shares of it.
        highest: `lr` in the last step.
    """
    lrs = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
    threads = torch.get_num_threads()
    gpus = list(range(torch.cuda.device_count())) if run.has_gpu else []
    curves: list[SeedCurve] = []
    try:
        with torch.random.fork_rng(devices=gpus):
            for draw in range(seeds):
                seeded = replace(config, seed=config.seed + draw)
                # Batches depend on the run's seed and the epoch only. A seed uses at most one epoch
                # for each step, so no other seed has its epochs: their noise is independent, and
                # their mean has less of it.
                curves.append(_one_seed(seeded, run, lrs, first_epoch=1 + draw * steps))
    finally:
        torch.set_num_threads(threads)
    return propose(lrs, curves)


# --- Reading the curves ---------------------------------------------------------------------------


def propose(lrs: Sequence[float], curves: Sequence[SeedCurve]) -> LrRange:
    """Average and smooth the losses of the seeds, and read the bounds off the curve.

    Seeds differ in their level, so a seed that leaves the mean would shift it, which looks like a
    fall. The mean is therefore of the same seeds from its first step to its last: the `n` that got
    furthest, as far as all of them got. `n` is the largest with a whole fall in the curve, and at
    least half of the seeds: a few that end early do not cut the fall off.

    Args:
        lrs: of every planned step.
        curves: one for each seed.

    Raises:
        ConfigError: more than half of the seeds have no loss at all.
    """
    longest = sorted((curve.losses for curve in curves), key=len, reverse=True)
    half = (len(curves) + 1) // 2
    if not longest[half - 1]:
        raise ConfigError("the loss of the first batch is not finite, before any step was made")
    counts = [n for n in range(len(curves), half - 1, -1) if longest[n - 1]]
    readings = [_read(longest[:n]) for n in counts]
    read = next((r for r in readings if r.is_whole), None) or max(readings, key=_stands_out)
    found = LrRange(
        lrs=tuple(lrs),
        curves=tuple(curves),
        averaged=read.seeds,
        smoothed=tuple(read.smoothed),
        fall=read.fall,
        noise=max(read.noise, read.disagreement),
    )
    if found.fall <= found.noise or found.fall < MIN_FALL * abs(read.smoothed[read.top]):
        return found
    low, steepest, high = _bounds(read)
    return replace(found, low=lrs[low], high=lrs[high], steepest=lrs[steepest])


@dataclass(frozen=True)
class _Reading:
    """The mean of some seeds, smoothed, and the largest fall in it.

    Attributes:
        seeds: how many.
        smoothed: their mean.
        top: the step with the largest loss before `bottom`.
        bottom: the step with the smallest loss.
        noise: the largest fall that the noise of the steps explains.
        disagreement: the same for the differences between the seeds; 0 for a single one.
    """

    seeds: int
    smoothed: list[float]
    top: int
    bottom: int
    noise: float
    disagreement: float

    @property
    def fall(self) -> float:
        return self.smoothed[self.top] - self.smoothed[self.bottom]

    @property
    def is_whole(self) -> bool:
        """Whether the loss falls by more than noise, and not until the last step."""
        last = len(self.smoothed) - 1 - reach_of(len(self.smoothed))
        return self.fall > self.noise and self.bottom < last


def _stands_out(read: _Reading) -> float:
    return read.fall / read.noise if read.noise else math.inf


def _read(losses: Sequence[Sequence[float]]) -> _Reading:
    """Find the fall in the mean of the seeds, as far as the shortest of them goes."""
    steps = min(map(len, losses))
    mean = without_spikes([fmean(column) for column in zip(*losses, strict=False)])
    smoothed = smooth(mean)
    bottom = min(range(steps), key=smoothed.__getitem__)
    top = max(range(bottom + 1), key=smoothed.__getitem__)
    falls = [s[top] - s[bottom] for s in (smooth(without_spikes(seed[:steps])) for seed in losses)]
    return _Reading(
        seeds=len(losses),
        smoothed=smoothed,
        top=top,
        bottom=bottom,
        noise=_noise(mean, smoothed, bottom),
        disagreement=SEED_SDS * stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0,
    )


def _noise(mean: Sequence[float], smoothed: Sequence[float], bottom: int) -> float:
    """Return the largest fall of the smoothed loss that the noise of single steps explains."""
    if len(mean) < MIN_STEPS:
        return math.inf
    # An explosion after the smallest loss says nothing about the noise before it.
    window = 2 * reach_of(len(mean)) + 1
    known = max(bottom + window, len(mean) // 3)
    pairs = zip(mean[:known], smoothed[:known], strict=True)
    # A step is in its own window, which takes that share from the variance of what is left.
    variance = fmean((value - level) ** 2 for value, level in pairs) / (1 - 1 / window)
    return NOISE_SDS * math.sqrt(variance * 2 / window)


def _bounds(read: _Reading) -> tuple[int, int, int]:
    """Return the steps of the low bound, of the steepest fall and of the high bound."""
    smoothed, top, bottom = read.smoothed, read.top, read.bottom
    # The top is the largest of many noisy values: the flat part lies below it. The fall begins with
    # the last crossing; noise may have made earlier ones.
    margin = min(max(BEGUN * read.fall, FLAT * read.noise), read.fall / 2)
    flat = (i for i in range(top, bottom) if smoothed[i] > smoothed[top] - margin)
    begun = max(flat) + 1
    reach, last = reach_of(len(smoothed)), len(smoothed) - 1
    steepest = min(
        range(begun, bottom + 1),
        key=lambda i: smoothed[min(i + reach, last)] - smoothed[max(i - reach, 0)],
    )
    return begun, steepest, bottom


def reach_of(steps: int) -> int:
    """Return how many steps to either side are averaged in a curve of `steps` steps."""
    return max(2, round(WINDOW * steps))


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours.

    Every window has the same number of values, so that no point has more noise than another; at the
    ends, windows are those of the nearest points that have all their neighbours.
    """
    return [fmean(window) for window in _windows(values)]


def without_spikes(values: Sequence[float]) -> list[float]:
    """Return the values with the median of its neighbours in the place of each spike."""
    usual = [median(window) for window in _windows(values)]
    distances = [abs(value - middle) for value, middle in zip(values, usual, strict=True)]
    limit = SPIKE * median(distances)
    return [
        middle if distance > limit else value
        for value, middle, distance in zip(values, usual, distances, strict=True)
    ]


def _windows(values: Sequence[float]) -> Iterator[Sequence[float]]:
    """Yield each value with its neighbours, always the same number of them."""
    reach = reach_of(len(values))
    last_start = max(len(values) - (2 * reach + 1), 0)
    for i in range(len(values)):
        start = min(max(i - reach, 0), last_start)
        yield values[start : start + 2 * reach + 1]


# --- Training -------------------------------------------------------------------------------------


class _NoSchedule:
    """A schedule that does nothing: the range test sets the learning rates itself."""

    def step(self) -> None:
        pass


def _one_seed(
    config: TrialConfig, run: TrialRun, lrs: Sequence[float], first_epoch: int
) -> SeedCurve:
    """Train one network with a rising learning rate, until the last `lr` or until it fails."""
    # A schedule may begin far below `lr`, in a warm-up; the shares of the stages are wanted.
    config = replace(config, schedule=Constant())
    training = begin_training(config, run)
    groups = training.state.optimizer.param_groups
    shares = [group["lr"] / config.optimizer.lr for group in groups]
    losses: list[float] = []
    recent: list[float] = []
    width = 2 * reach_of(len(lrs)) + 1
    batches = _endless(training.train_batches, first_epoch)
    for lr, batch in zip(lrs, islice(batches, len(lrs)), strict=True):
        for group, share in zip(groups, shares, strict=True):
            group["lr"] = share * lr
        try:
            losses.append(_step(training, batch, config))
        except TrialError:  # no finite loss, or gradients that overflow float16 at any scale
            return SeedCurve(tuple(losses), "diverged")
        recent.append(fmean(losses[-width:]))
        if recent[-1] > max(BLOWN_UP * min(recent), recent[0]):
            return SeedCurve(tuple(losses), "blew up")
    return SeedCurve(tuple(losses), "reached the end")


def _step(training: Training, batch: Batch, config: TrialConfig) -> float:
    """Train one step as every trial does; return its loss."""
    state = training.state
    return train_one_epoch(
        state.model,
        [batch],
        training.loss_fn,
        state.optimizer,
        _NoSchedule(),
        state.scaler,
        training.precision,
        epoch=1,
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
        accumulation_steps=config.accumulation_steps,
    ).loss


def _endless(batches: Batches, first_epoch: int) -> Iterator[Batch]:
    epoch = first_epoch
    while True:
        yield from batches.epoch(epoch)
        epoch += 1
