"""The learning-rate range test: which learning rates are worth searching.

The learning rates of all stages rise together, exponentially, from far too small to far too large,
while the training loss is watched (L. N. Smith, Cyclical Learning Rates for Training Neural
Networks, 2017). The ratios between the stages stay what the configuration says.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch

from tuneapp.config import Constant, TrialConfig
from tuneapp.data.batches import Batch, Batches
from tuneapp.errors import ConfigError, Diverged
from tuneapp.loop import train_one_epoch
from tuneapp.training import Training, TrialRun, begin_training

WINDOW = 0.04
"""Share of all steps to either side over which the loss is averaged. Steps after a learning rate
count as much as those before it: an average of the past alone would show its minimum too late."""
BLOWN_UP = 4.0
"""A seed ends where its smoothed loss is this many times its smallest."""
BEGUN = 0.1
"""Share of the whole fall of the loss after which a learning rate counts as large enough."""


@dataclass(frozen=True)
class LrRange:
    """What the test saw, and what it proposes.

    Attributes:
        lrs: the `lr` of each step that all seeds reached, rising.
        losses: training loss of each seed at these steps.
        smoothed: their mean, smoothed by `smooth`.
        low: the smallest learning rate worth trying; None where the loss never fell.
        high: where the smoothed loss is smallest.
        steepest: between them, where it falls fastest over the logarithm of the learning rate.
    """

    lrs: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    smoothed: tuple[float, ...]
    low: float | None
    high: float | None
    steepest: float | None


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

    Each seed has a network, an optimizer and batches of its own, made from nothing; torch's random
    generators and number of threads are left as they were, and no file is written.

    Args:
        config: what to train; its schedule is not used, nor the size of its `lr`.
        run: where and how.
        steps: optimizer steps of each seed.
        seeds: draws of head weights, of dropout and of batches, which are averaged.
        lowest: `lr` in the first step; the stages have their shares of it.
        highest: and in the last.
    """
    lrs = [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]
    threads = torch.get_num_threads()
    gpus = list(range(torch.cuda.device_count())) if run.has_gpu else []
    try:
        with torch.random.fork_rng(devices=gpus):
            curves = [_one_seed(replace(config, seed=seed), run, lrs) for seed in range(seeds)]
    finally:
        torch.set_num_threads(threads)
    return propose(lrs, curves)


def propose(lrs: list[float], curves: list[list[float]]) -> LrRange:
    """Average and smooth the losses of the seeds, and read the bounds off the curve.

    Args:
        lrs: of every step.
        curves: training losses of each seed; shorter where it blew up.

    Raises:
        ConfigError: a seed has no loss at all.
    """
    reached = min(len(curve) for curve in curves)
    if reached == 0:
        raise ConfigError(f"the loss is not finite at the lowest learning rate, {lrs[0]:g}")
    losses = tuple(tuple(curve[:reached]) for curve in curves)
    mean = [math.fsum(column) / len(column) for column in zip(*losses, strict=True)]
    smoothed = smooth(mean)
    low, steepest, high = _bounds(lrs, smoothed)
    return LrRange(tuple(lrs[:reached]), losses, tuple(smoothed), low, high, steepest)


def smooth(values: list[float]) -> list[float]:
    """Return the mean of each value and its neighbours; there are fewer of them at the ends."""
    reach = max(2, round(WINDOW * len(values)))
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def _bounds(
    lrs: list[float], smoothed: list[float]
) -> tuple[float | None, float | None, float | None]:
    """Return the low bound, the steepest point and the high bound, or nothing."""
    bottom = min(range(len(smoothed)), key=smoothed.__getitem__)
    top = max(range(bottom + 1), key=smoothed.__getitem__)  # before it begins to fall for good
    fall = smoothed[top] - smoothed[bottom]
    if bottom - top < 2:
        return None, None, None
    enough = smoothed[top] - BEGUN * fall
    begun = next(i for i in range(top, bottom + 1) if smoothed[i] <= enough)
    steepest = min(range(top + 1, bottom + 1), key=lambda i: smoothed[i] - smoothed[i - 1])
    return lrs[begun], lrs[max(steepest, begun)], lrs[bottom]


class _Still:
    """A schedule that does nothing: the range test sets the learning rates itself."""

    def step(self) -> None:
        pass


def _one_seed(config: TrialConfig, run: TrialRun, lrs: list[float]) -> list[float]:
    # Whatever the schedule begins with: its warm-up is not waited for.
    config = replace(config, schedule=Constant())
    training = begin_training(config, run)
    groups = training.state.optimizer.param_groups
    shares = [group["lr"] / config.optimizer.lr for group in groups]
    losses: list[float] = []
    batches = _endless(training.train_batches, first_epoch=1 + config.seed * len(lrs))
    for lr, batch in zip(lrs, islice(batches, len(lrs)), strict=True):
        for group, share in zip(groups, shares, strict=True):
            group["lr"] = share * lr
        try:
            losses.append(_step(training, batch, config))
        except Diverged:
            break
        smoothed = smooth(losses)
        if smoothed[-1] > BLOWN_UP * min(smoothed):
            break
    return losses


def _step(training: Training, batch: Batch, config: TrialConfig) -> float:
    """Train one step as every trial does; return its loss."""
    state = training.state
    return train_one_epoch(
        state.model,
        [batch],
        training.loss_fn,
        state.optimizer,
        _Still(),
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
