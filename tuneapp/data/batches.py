"""Views as normalised batches on the device, made here or by worker processes, one batch ahead."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tuneapp.data.pixels import Preprocessing
from tuneapp.data.sampling import Draw, batch_seed, num_batches
from tuneapp.data.store import Store
from tuneapp.data.views import Key, KeyedViews, View
from tuneapp.errors import DataError, TrialError

Batch = tuple[Tensor, Tensor]

PREFETCH = 4
"""Batches that each worker process makes in advance."""
WORKER_TIMEOUT_S = 120.0
"""After this time without a batch, a worker counts as hung; later if batches are large."""
SLOW_IMAGE_S = 5.0


class WorkerLost(TrialError, RuntimeError):  # noqa: N818 - it is what happened
    """A process that makes batches has died, or hangs; the same trial may succeed later."""


class Sampler(Protocol):
    """Chooses the examples of each epoch."""

    @property
    def num_examples(self) -> int:
        """Examples of one epoch."""

    def draw(self, epoch: int) -> Draw:
        """Return the examples of an epoch."""


class Batches:
    """The examples of one split, as normalised batches on the device, epoch by epoch."""

    def __init__(
        self,
        store: Store,
        sampler: Sampler,
        *,
        view: View,
        preprocessing: Preprocessing,
        batch_size: int,
        device: torch.device,
        join_single: bool = False,
        mix: v2.Transform | None = None,
        mix_seed: int = 0,
        channels_last: bool = False,
        workers: int = 0,
    ) -> None:
        """Make batches of the examples that `sampler` draws.

        Args:
            store: labels and pixels.
            sampler: the examples, and their order.
            view: makes the view of each image.
            preprocessing: how views are normalised.
            batch_size: examples of a batch.
            device: device of the batches.
            join_single: let a single leftover example join the batch before it, as `num_batches`
                counts; for training.
            mix: mixes the images of a batch, and their labels.
            mix_seed: seed of that.
            channels_last: the memory format of the images.
            workers: processes that make the views; 0 makes them here.
        """
        self._store = store
        self._sampler = sampler
        self._device = device
        self._join_single = join_single
        self.view = view
        self.mix = mix
        self._mix_seed = mix_seed
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.batch_size = batch_size
        self.workers = workers
        self._mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
        if device.type == "cuda":  # one for all epochs: each stream has separate memory
            self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._keys = _Keys()
        self._loader = DataLoader(
            KeyedViews(store.pixels, view),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=torch.stack,
            pin_memory=device.type == "cuda",
            multiprocessing_context=_worker_context() if workers else None,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            timeout=max(WORKER_TIMEOUT_S, SLOW_IMAGE_S * batch_size) if workers else 0,
            # Not torch's, from which the training draws.
            generator=torch.Generator(),
        )

    @property
    def num_examples(self) -> int:
        """Examples of one epoch."""
        return self._sampler.num_examples

    @property
    def is_streamed(self) -> bool:
        """Whether images are decoded at each use."""
        return self._store.is_streamed

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self._bounds())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield images, float32 (B, 3, H, W) normalised, and labels.

        Labels are int64 (B,); of multi-label sets, or where images are mixed, float (B, classes).
        """
        draw = self._sampler.draw(epoch)
        indices = draw.indices.tolist()
        seeds = [None] * len(indices) if draw.seeds is None else draw.seeds.tolist()
        keys = list(zip(indices, seeds, strict=True))
        self._keys.batches = [keys[start:end] for start, end in self._bounds()]
        labels = (
            self._store.labels[torch.from_numpy(draw.indices[start:end])]
            for start, end in self._bounds()
        )
        batches = self._on_device(zip(self._views(), labels, strict=True))
        for number, (images, labels_here) in enumerate(batches):
            yield self._mixed(images, labels_here, epoch, number)

    def _views(self) -> Iterator[Tensor]:
        """Make the views; a worker's error becomes the one line that it is without workers."""
        try:
            yield from self._loader
        except DataError as error:
            _, _, line = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")
            raise DataError(line.strip()) from None
        except RuntimeError as error:  # torch has no class for these
            if "DataLoader worker" in str(error):
                how = "ended unexpectedly; the kernel's log says whether memory ran out"
            elif "DataLoader timed out" in str(error):
                how = "hangs"
            else:
                raise
            # `failures.py` recognises it by these words.
            raise WorkerLost(f"a DataLoader worker, which makes batches, {how} ({error})") from None

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Normalise batches on the device; on a GPU, one ahead of the training."""
        if self._device.type != "cuda":
            for views, labels in batches:
                yield self._normalised(views), labels
            return
        ready: tuple[Batch, torch.cuda.Event] | None = None
        for views, labels in batches:
            with torch.cuda.stream(self._aside):
                ahead = (self._normalised(views), self._send(labels))
                sent = self._aside.record_event()
            if ready is not None:
                yield self._taken_over(*ready)
            ready = (ahead, sent)
        if ready is not None:
            yield self._taken_over(*ready)

    def _taken_over(self, batch: Batch, sent: torch.cuda.Event) -> Batch:
        """Make the training's stream wait for a batch, and keep its memory from being reused."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(sent)
        for tensor in batch:
            tensor.record_stream(stream)
        return batch

    def _normalised(self, views: Tensor) -> Tensor:
        # Divided first, as torchvision does: validation images are equal to its own, bit by bit.
        images = self._send(views).float().div_(255)
        return images.sub_(self._mean).div_(self._std).contiguous(memory_format=self._layout)

    def _send(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the device; from pinned memory, without waiting for the GPU."""
        if self._device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, number: int) -> Batch:
        """Mix a batch; the draw depends on its seed, epoch and number."""
        if self.mix is None:
            return images, labels
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(batch_seed(self._mix_seed, epoch, number))
            mixed: Batch = self.mix(images, labels)
        return mixed

    def _bounds(self) -> list[tuple[int, int]]:
        """Return the first and the last position, exclusive, of each batch of an epoch."""
        count = self.num_examples
        starts = range(0, count, self.batch_size)
        if self._join_single:
            starts = starts[: num_batches(count, self.batch_size)]
        return list(zip(starts, [*starts[1:], count], strict=True))


def _worker_context() -> BaseContext:
    """Return how worker processes are started.

    A server imports torch once and forks them: a process with threads, such as a trial of Ray,
    must not be forked itself, and importing torch takes seconds in each new process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuneapp.data.views"])
    return context


class _Keys:
    """The keys of each batch of the next epoch; persistent workers read them in every epoch."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
