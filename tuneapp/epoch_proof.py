"""Proof that an epoch trained what was asked: what it was seen to do against the configuration.

A difference stops the trial. `proof.py` compares the objects that train; here it is what they did.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tuneapp.config import TrialConfig
from tuneapp.loop import EpochMetrics, Precision
from tuneapp.observed import Observed
from tuneapp.proof import raise_if, wanted_lrs
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel
from tuneapp.statedict import State


class WantedFactors:
    """The factors by which a schedule alone multiplies learning rates, update by update.

    A schedule of its own, of a single rate of 1, that nothing else touches: neither a resume, nor
    an unfreezing, nor the loop.
    """

    def __init__(self, config: TrialConfig, steps_per_epoch: int) -> None:
        self._optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        self._schedule = Schedule(self._optimizer, config, steps_per_epoch)
        self._steps_per_epoch = steps_per_epoch

    def skip(self, history: Sequence[Mapping[str, float]]) -> None:
        """Leave out the epochs that were trained before."""
        self._schedule.replay(history)

    def of_epoch(self) -> list[float]:
        """Return the factor of each update of the next epoch."""
        factors = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(self._steps_per_epoch):
                factors.append(float(self._optimizer.param_groups[0]["lr"]))
                self._schedule.step()
        return factors

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Report the metrics of the epoch, for a schedule that follows them."""
        self._schedule.end_epoch(row)


def require_batches(metrics: EpochMetrics, config: TrialConfig, examples: int, steps: int) -> None:
    """Check the batches that an epoch was trained on.

    Args:
        metrics: of the epoch.
        config: what was asked for.
        examples: of one epoch.
        steps: optimizer steps of one epoch.

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
    raise_if(wrong)


def require_observed(
    seen: Observed,
    trained: EpochMetrics,
    config: TrialConfig,
    precision: Precision,
    image_size: int,
    is_multilabel: bool,
) -> None:
    """Check what the loop did with the batches of an epoch.

    Args:
        seen: notes of the epoch.
        trained: its metrics.
        config: what was asked for.
        precision: of the forward pass.
        image_size: height and width of the images in pixels.
        is_multilabel: whether targets are class probabilities without mixing, too.

    Raises:
        AppliedValueError: something else than `config` says; the message names every difference.
    """
    parts = max(1, min(config.accumulation_steps, seen.examples // 2))
    updates = len(seen.lrs)
    wrong = []
    # Where float16 overflows, the scaler skips the update; a fused optimizer is called anyway.
    if not trained.steps - trained.skipped <= updates <= trained.steps:
        wrong.append(f"the optimizer was stepped {updates} times in {trained.steps} steps")
    if seen.parts != parts:
        wrong.append(f"a batch was computed in {seen.parts} parts, not {parts}")
    if seen.image_size != (image_size, image_size):
        wrong.append(f"images are {seen.image_size}, not {image_size} x {image_size}")
    if seen.dtype != precision.dtype:
        wrong.append(f"the forward pass computed in {seen.dtype}, not {precision.dtype}")
    if seen.has_probabilities != (config.is_mixed or is_multilabel):
        wrong.append("images were mixed" if seen.has_probabilities else "images were not mixed")
    if config.ema_decay is not None and seen.averaged != trained.steps:
        wrong.append(f"the average followed {seen.averaged} of {trained.steps} steps")
    raise_if(wrong + _clipping_mistakes(seen, config))


def _clipping_mistakes(seen: Observed, config: TrialConfig) -> list[str]:
    """Compare the gradients of the first update with the limits; rounding may exceed them a bit."""
    if not math.isfinite(seen.grad_norm):  # float16 overflowed, and the update was skipped
        return []
    if config.clip_norm is not None and seen.grad_norm > config.clip_norm * 1.001:
        return [f"the norm of gradients is {seen.grad_norm:g}, above clip_norm {config.clip_norm}"]
    if config.clip_value is not None and seen.largest_gradient > config.clip_value * 1.001:
        return [f"a gradient is {seen.largest_gradient:g}, above clip_value {config.clip_value}"]
    return []


def require_rates(
    seen: Observed,
    trained: EpochMetrics,
    factors: Sequence[float],
    model: StagedModel,
    optimizer: Optimizer,
    config: TrialConfig,
) -> None:
    """Check the learning rate of each parameter group at each update.

    Args:
        seen: notes of the epoch.
        trained: its metrics.
        factors: what the schedule alone would multiply by, update by update.
        model: whose stages the groups belong to.
        optimizer: as it trained.
        config: what was asked for.

    Raises:
        AppliedValueError: a rate was another; the message names the first one.
    """
    if trained.skipped and len(seen.lrs) < len(factors):
        return  # nobody knows which updates were skipped
    peaks = wanted_lrs(config, [stage.name for stage in model.stages])
    stage_of = {id(p): stage.name for stage in model.stages for p in stage.parameters()}
    stages = [stage_of[id(group["params"][0])] for group in optimizer.param_groups]
    for update, (lrs, factor) in enumerate(zip(seen.lrs, factors, strict=True), start=1):
        for stage, lr in zip(stages, lrs, strict=True):
            wanted = peaks[stage] * factor
            if not math.isclose(lr, wanted, rel_tol=1e-6, abs_tol=1e-9 * peaks[stage]):
                raise_if([f"lr of {stage} was {lr!r} at update {update}, not {wanted!r}"])


def require_kept(before: Mapping[Tensor, Mapping[str, object]], optimizer: Optimizer) -> None:
    """Check that an optimizer still knows what it knew of the parameters before an unfreezing.

    Args:
        before: its state then, by parameter.
        optimizer: after the unfreezing.

    Raises:
        AppliedValueError: momentum or the like was lost, or made up.
    """
    now = optimizer.state
    lost = [
        p
        for p, state in before.items()
        if any(now.get(p, {}).get(key) is not value for key, value in state.items())
    ]
    made_up = [p for p in now if p not in before]
    wrong = []
    if lost:
        wrong.append(f"the optimizer's state of {len(lost)} parameters was lost by unfreezing")
    if made_up:
        wrong.append(f"{len(made_up)} parameters that were frozen have an optimizer's state")
    raise_if(wrong)


def require_weights(model: StagedModel, state: State, file: str) -> None:
    """Check that tensors of a file are in the network, before its first update.

    One that is found bit for bit is enough: the others are the business of `load_weights`, and
    tensors as they were drawn at random are in no file.

    Args:
        model: with the weights loaded.
        state: the tensors of the file.
        file: its name, for the error.

    Raises:
        AppliedValueError: no tensor of the network is in the file.
    """
    are_drawn = False
    for parameter in model.network.parameters():
        tensor = parameter.detach().cpu()
        if bool((tensor == tensor.flatten()[0]).all()):
            continue  # scales begin at 1 and biases at 0, in any network and in any file
        are_drawn = True
        alike = (other for other in state.values() if other.shape == tensor.shape)
        if any(torch.equal(other.to(tensor.dtype), tensor) for other in alike):
            return
    if are_drawn:
        raise_if([f"the weights of {file} are not in the network"])
