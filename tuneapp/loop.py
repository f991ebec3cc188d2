"""The canonical loop: train one epoch, evaluate. No files, no Ray, no printing.

Nothing inside a step waits for the device: losses and gradient norms stay there as tensors and are
read once per `READ_EVERY` steps, which is also when a loss that is not finite is noticed. (Only
float16 with an optimizer that is not fused waits, in torch's GradScaler, whether to skip the step.)
"""

import contextlib
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from tuneapp.average import WeightAverage
from tuneapp.data.batches import Batch
from tuneapp.errors import DataError, Diverged, TrialError
from tuneapp.losses import TrainingLoss
from tuneapp.staged import StagedModel

READ_EVERY = 50
"""Optimizer steps between two readings of the device."""
MAX_SKIPPED = 20
"""Steps in a row that may overflow float16: each halves the scale, so twenty end at a sixteenth."""


class Steps(Protocol):
    """What is stepped after each optimizer step."""

    def step(self) -> object:
        """Go on by one step."""


class CountingScaler(GradScaler):
    """A gradient scaler that keeps, in checkpoints too, how many steps in a row were skipped."""

    skipped_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and the count; nothing where the scaler does nothing."""
        state = super().state_dict()
        return state and {**state, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; one of torch's own scaler has no count.

        It is empty if the training has so far been in another precision, on another device.
        """
        if not state_dict:
            return
        super().load_state_dict(state_dict)
        self.skipped_in_a_row = state_dict.get("skipped_in_a_row", 0)


@dataclass(frozen=True)
class Precision:
    """Automatic mixed precision on one device type.

    Attributes:
        device_type: `cpu` or `cuda`.
        dtype: what autocast computes in; float32 is no autocast.
    """

    device_type: str
    dtype: torch.dtype

    @property
    def is_mixed(self) -> bool:
        """Whether autocast does anything."""
        return self.dtype is not torch.float32

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass; the CPU path in float32 runs the same lines."""
        dtype = self.dtype if self.is_mixed else torch.bfloat16
        return torch.autocast(self.device_type, dtype=dtype, enabled=self.is_mixed)

    def scaler(self) -> CountingScaler:
        """Return the gradient scaler, which does nothing but for float16."""
        return CountingScaler(self.device_type, enabled=self.dtype is torch.float16)


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of training was.

    Attributes:
        loss: mean over examples, nats.
        grad_norm: mean over steps of the total 2-norm before clipping.
        steps: optimizer steps.
        largest_batch: examples of the largest batch seen.
        images_per_s: examples trained on per second.
        data_wait: share in [0, 1] of the time spent waiting for the next batch.
        skipped: steps that the scaler skipped, because their gradients overflowed float16.
    """

    loss: float
    grad_norm: float
    steps: int
    largest_batch: int
    images_per_s: float
    data_wait: float
    skipped: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What a network says of every example, in their order.

    Attributes:
        loss: mean over examples, nats: cross-entropy; of multi-label targets the binary one, mean
            over classes.
        logits: float32 (N, classes), on the CPU.
        targets: labels, int64 (N,), or 0 and 1, float32 (N, classes), likewise.
    """

    loss: float
    logits: Tensor
    targets: Tensor


@contextlib.contextmanager
def _quiet_about_skipped_steps() -> Iterator[None]:
    """A first step that overflows float16 is skipped; torch then blames the order of the calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        yield


@_quiet_about_skipped_steps()
def train_one_epoch(
    model: StagedModel,
    batches: Iterable[Batch],
    loss_fn: TrainingLoss,
    optimizer: Optimizer,
    schedule: Steps,
    scaler: GradScaler,
    precision: Precision,
    *,
    epoch: int,
    average: WeightAverage | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    accumulation_steps: int = 1,
) -> EpochMetrics:
    """Train `model` on every batch once, stepping the schedule after each optimizer step.

    Args:
        batches: images, float32 (B, 3, H, W) normalised, and labels, int64 (B,), or class
            probabilities, float (B, classes), on the device.
        loss_fn: the model's outputs, and labels, to their mean loss.
        epoch: from 1; only told in errors.
        average: follows the weights after each step.
        clip_norm: largest total 2-norm of the gradients; None does not clip.
        clip_value: largest absolute value of each number of the gradients; None does not clip.
        accumulation_steps: parts in which each batch is computed, with the same loss and gradients
            as in one; fewer where they would hold less than two examples.

    Raises:
        Diverged: the loss became NaN or infinite.
        TrialError: the scaler skipped `MAX_SKIPPED` steps in a row.
        DataError: `batches` held no example.
    """
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    meter = _Meter(epoch, scaler, precision.device_type)
    for images, labels in meter.timed(batches):
        optimizer.zero_grad(set_to_none=True)
        batch_loss = torch.zeros((), device=labels.device)
        # Two examples at least in a part: BatchNorm cannot be trained on one with one pixel left.
        num_parts = max(1, min(accumulation_steps, len(labels) // 2))
        parts = zip(images.tensor_split(num_parts), labels.tensor_split(num_parts), strict=True)
        whole = loss_fn.normalizer(labels)
        for part, part_labels in parts:
            with precision.autocast():
                # Weighted by what its mean was divided by, so the sum is the loss of the batch.
                weight = loss_fn.normalizer(part_labels) / whole
                loss = loss_fn(model(part), part_labels) * weight
            scaler.scale(loss).backward()
            batch_loss += loss.detach()
        scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip_norm is not None:
            clip_grads_with_norm_(parameters, clip_norm, norm)
        if clip_value is not None:
            clip_grad_value_(parameters, clip_value)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if average is not None:
            average.update(model)
        meter.add(batch_loss, norm, len(labels))
    return meter.result()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], precision: Precision) -> Evaluation:
    """Ask `model` about every example of `batches` exactly once.

    The loss is an average over examples, not batches, so a short last batch does not count double;
    it is plain cross-entropy (binary for several labels), whatever the training minimises. Answers
    stay on the device until the end. The model's mode is restored on return.

    Args:
        batches: as for `train_one_epoch`.

    Raises:
        DataError: `batches` held no example.
    """
    was_training = model.training
    model.eval()
    loss_sum: Tensor | float = 0.0
    answers: list[Tensor] = []
    targets: list[Tensor] = []
    for images, labels in batches:
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        loss_sum = loss_sum + _summed_loss(logits, labels).double()
        answers.append(logits)
        targets.append(labels)
    model.train(was_training)
    if not answers:
        raise DataError("there is no example to evaluate on")
    every = torch.cat(answers).cpu()
    return Evaluation(float(loss_sum) / len(every), every, torch.cat(targets).cpu())


def _summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over examples; labels that are floating point are of several classes each."""
    if not labels.is_floating_point():
        return nn.functional.cross_entropy(logits, labels, reduction="sum")
    losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return losses / labels.shape[1]


class _Meter:
    """Adds up an epoch on the device, and reads it rarely."""

    def __init__(self, epoch: int, scaler: GradScaler, device_type: str) -> None:
        self._epoch = epoch
        self._is_on_gpu = device_type == "cuda"
        self._scaler = scaler
        self._skipped = 0
        self._in_a_row: int = getattr(scaler, "skipped_in_a_row", 0)
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._sizes: list[int] = []
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._wait_s = 0.0
        self._start = time.perf_counter()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, counting the seconds that each was waited for."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            # A GPU that still computes was not kept waiting: the host was ahead of it.
            if not self._is_on_gpu or torch.cuda.current_stream().query():
                self._wait_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, norm: Tensor, size: int) -> None:
        self._unread.append((loss, norm))
        self._sizes.append(size)
        if len(self._unread) == READ_EVERY:
            self._read()

    def result(self) -> EpochMetrics:
        if not self._sizes:
            raise DataError("there is no example to train on")
        self._read()
        seconds = time.perf_counter() - self._start
        examples = sum(self._sizes)
        weighted = (loss * size for loss, size in zip(self._losses, self._sizes, strict=True))
        return EpochMetrics(
            loss=math.fsum(weighted) / examples,
            grad_norm=self._mean_norm(),
            steps=len(self._sizes),
            largest_batch=max(self._sizes),
            images_per_s=examples / seconds,
            data_wait=self._wait_s / seconds,
            skipped=self._skipped,
        )

    def _mean_norm(self) -> float:
        """Leave out steps that the scaler skipped because float16 overflowed."""
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        return math.fsum(finite) / len(finite) if finite else 0.0

    def _read(self) -> None:
        if not self._unread:
            return
        losses, norms = zip(*self._unread, strict=True)
        self._unread.clear()
        for loss in torch.stack(losses).tolist():
            self._losses.append(loss)
            if not math.isfinite(loss):
                raise Diverged(self._epoch, step=len(self._losses), value=loss)
        for norm in torch.stack(norms).tolist():
            self._norms.append(norm)
            if self._scaler.is_enabled():
                self._count(is_skipped=not math.isfinite(norm))
        if isinstance(self._scaler, CountingScaler):
            self._scaler.skipped_in_a_row = self._in_a_row

    def _count(self, *, is_skipped: bool) -> None:
        """The scaler skips a step with a gradient that is not finite; its norm is not, either."""
        self._skipped += is_skipped
        self._in_a_row = self._in_a_row + 1 if is_skipped else 0
        if self._in_a_row == MAX_SKIPPED:
            raise TrialError(
                f"mixed precision: {MAX_SKIPPED} steps in a row were skipped, the last in epoch "
                f"{self._epoch}: their gradients overflow float16, however small the loss is "
                "scaled; use amp='bf16' or amp='off'"
            )
