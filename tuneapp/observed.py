"""What an epoch of training is seen to do, from outside the loop that does it.

Hooks of torch's own on the network, the loss and the optimizer take notes while `train_one_epoch`
runs: the learning rates at each update, what of the first batch went through the network, and which
gradients the first update had. `epoch_proof.py` compares the notes with the configuration.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tuneapp.average import WeightAverage
from tuneapp.data.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What one epoch did.

    Attributes:
        lrs: learning rates at each call of `optimizer.step`, one of each parameter group.
        parts: forward passes of the first batch.
        examples: examples in them.
        image_size: height and width in pixels of the first images.
        dtype: what autocast computed the first forward pass in; float32 without autocast.
        has_probabilities: whether the first targets were class probabilities, not labels.
        grad_norm: total 2-norm of the gradients of the first update, after clipping.
        largest_gradient: their largest absolute value.
        averaged: updates that the average of the weights followed.
    """

    lrs: tuple[tuple[float, ...], ...]
    parts: int
    examples: int
    image_size: tuple[int, ...]
    dtype: torch.dtype
    has_probabilities: bool
    grad_norm: float
    largest_gradient: float
    averaged: int


class Witness:
    """Takes notes of one epoch.

        with Witness(model, loss_fn, optimizer) as witness:
            train_one_epoch(model, witness.watched(batches), loss_fn, optimizer, ...)

    Nothing waits for the device while the epoch runs.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        optimizer: Optimizer,
        average: WeightAverage | None = None,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._average = average
        self._averaged_before = 0 if average is None else average.steps
        self._batches = 0
        self._lrs: list[tuple[float, ...]] = []
        self._parts = 0
        self._examples = 0
        self._image_size: tuple[int, ...] = ()
        self._dtype = torch.float32
        self._has_probabilities = False
        self._norm: Tensor | None = None
        self._largest: Tensor | None = None
        self._hooks: tuple[RemovableHandle, ...] = ()

    def __enter__(self) -> Self:
        self._hooks = (
            self._model.register_forward_pre_hook(self._see_images),
            self._loss_fn.register_forward_pre_hook(self._see_targets),
            self._optimizer.register_step_pre_hook(self._see_update),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, to know which is the first.

        An update does not tell: with float16, the first are skipped if their gradients overflow.
        """
        for batch in batches:
            self._batches += 1
            yield batch

    def observed(self) -> Observed:
        """Return the notes; this waits for the device."""
        return Observed(
            lrs=tuple(self._lrs),
            parts=self._parts,
            examples=self._examples,
            image_size=self._image_size,
            dtype=self._dtype,
            has_probabilities=self._has_probabilities,
            grad_norm=0.0 if self._norm is None else float(self._norm),
            largest_gradient=0.0 if self._largest is None else float(self._largest),
            averaged=0 if self._average is None else self._average.steps - self._averaged_before,
        )

    def _see_images(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._batches > 1:
            return
        images = inputs[0]
        if self._parts == 0:
            device = images.device.type
            if torch.is_autocast_enabled(device):
                self._dtype = torch.get_autocast_dtype(device)
            self._image_size = tuple(images.shape[-2:])
        self._parts += 1
        self._examples += len(images)

    def _see_targets(self, loss_fn: nn.Module, inputs: tuple[Any, Tensor]) -> None:
        if self._batches == 1:
            self._has_probabilities = inputs[1].is_floating_point()

    def _see_update(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        groups = optimizer.param_groups
        if not self._lrs:
            gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if gradients:
                self._norm = get_total_norm(gradients)
                self._largest = get_total_norm(gradients, norm_type=torch.inf)
        self._lrs.append(tuple(float(group["lr"]) for group in groups))
