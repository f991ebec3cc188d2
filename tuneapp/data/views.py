"""Draw the augmented versions of images, and put batches of them on the device.

Every draw is a function of (seed, epoch, index of the example), and the order of an epoch one of
(seed, epoch). Nothing depends on what was drawn before: not on the batch size, the trial, the
process, or where a training was resumed.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import v2

from tuneapp.config import Augment
from tuneapp.data.store import Preprocessing, Store

Batch = tuple[Tensor, Tensor]

# What a number is drawn for: two purposes never share a stream.
_ORDER, _VIEW, _MIX = 0, 1, 2


def _stream(seed: int, purpose: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, purpose, epoch])))


def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.intp]:
    """Return the order of `count` examples in this epoch."""
    return _stream(seed, _ORDER, epoch).permutation(count)


def view_seeds(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return a seed for the view of each of the first `count` examples of the store.

    A prefix of a longer list: example 7 has the same seed in a set of 10 and of 10,000.
    """
    return _stream(seed, _VIEW, epoch).integers(0, 2**63 - 1, size=count, dtype=np.int64)


def training_view(augment: Augment, preprocessing: Preprocessing) -> v2.Transform:
    """Return the random transform of one stored uint8 image to (3, crop_size, crop_size).

    The 35 % of `standard` is fastai's usual `min_scale`: fine-tuning starts from a network that
    knows whole objects, and torchvision's 8 % are meant for training from scratch.
    """
    if augment == "none":
        return evaluation_view(preprocessing)
    smallest = 0.8 if augment == "light" else 0.35
    crop = v2.RandomResizedCrop(
        preprocessing.crop_size, scale=(smallest, 1.0), ratio=(3 / 4, 4 / 3), antialias=True
    )
    mirror = [v2.RandomHorizontalFlip()] if augment == "standard" else []
    return v2.Compose([crop, *mirror])


def evaluation_view(preprocessing: Preprocessing) -> v2.Transform:
    """Return torchvision's centre crop of a stored image to (3, crop_size, crop_size)."""
    return v2.CenterCrop(preprocessing.crop_size)


def mixing(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> v2.Transform | None:
    """Return torchvision's transform that mixes the images of a batch, and their labels.

    Args:
        mixup_alpha: > 0 blends each image with its neighbour (Zhang et al. 2018).
        cutmix_alpha: > 0 pastes a rectangle of the neighbour (Yun et al. 2019); with both, each
            batch gets one or the other, as in torchvision's references.
        num_classes: width of the labels that come out, float (B, num_classes).
    """
    mixes: list[v2.Transform] = []
    if mixup_alpha > 0:
        mixes.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
    if cutmix_alpha > 0:
        mixes.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
    return v2.RandomChoice(mixes) if mixes else None


class Batches:
    """The examples of one split, as normalised batches on the device, epoch by epoch."""

    def __init__(
        self,
        store: Store,
        split: str,
        *,
        view: v2.Transform,
        preprocessing: Preprocessing,
        batch_size: int,
        device: torch.device,
        shuffle_seed: int | None = None,
        mix: v2.Transform | None = None,
        channels_last: bool = False,
    ) -> None:
        """Take the examples of `split`: in random order and views, or as they are without seed."""
        self._store = store
        self._indices = store.indices(split)
        self._view = view
        self._device = device
        self._seed = shuffle_seed
        self._mix = mix
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.batch_size = batch_size
        self._mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)

    @property
    def num_examples(self) -> int:
        """Examples of one epoch."""
        return len(self._indices)

    def class_counts(self, num_classes: int) -> list[int]:
        """Return how many examples each class has."""
        labels = self._store.labels[torch.from_numpy(self._indices)]
        counts: list[int] = torch.bincount(labels, minlength=num_classes).tolist()
        return counts

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self._bounds())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield images, float32 (B, 3, H, W) normalised, and labels.

        Labels are int64 (B,); where images are mixed, float (B, classes).
        """
        order, seeds = self._indices, None
        if self._seed is not None:
            order = order[epoch_order(self._seed, epoch, len(order))]
            seeds = view_seeds(self._seed, epoch, len(self._store.labels))
        for number, (start, end) in enumerate(self._bounds()):
            chosen = order[start:end]
            views = self._views(chosen, None if seeds is None else seeds[chosen])
            # Divided first, as torchvision does: a validation image is its own to the last bit.
            images = self._send(views).float().div_(255)
            images = images.sub_(self._mean).div_(self._std).contiguous(memory_format=self._layout)
            labels = self._send(self._store.labels[torch.from_numpy(chosen)])
            yield self._mixed(images, labels, epoch, number)

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, number: int) -> Batch:
        """Mix a batch as its seed, epoch and number say."""
        if self._mix is None or self._seed is None:
            return images, labels
        seed = np.random.SeedSequence([self._seed, _MIX, epoch, number]).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            mixed: Batch = self._mix(images, labels)
        return mixed

    def _send(self, tensor: Tensor) -> Tensor:
        """Put a tensor on the device; from pinned memory, a GPU's work is not waited for."""
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _bounds(self) -> list[tuple[int, int]]:
        """Cut an epoch into batches; a single leftover joins the batch before it.

        BatchNorm cannot be trained on a batch of one example with one pixel left.
        """
        count = len(self._indices)
        starts = list(range(0, count, self.batch_size))
        is_single = count - starts[-1] == 1 and self.batch_size > 1
        if self._seed is not None and len(starts) > 1 and is_single:
            starts.pop()
        return list(zip(starts, [*starts[1:], count], strict=True))

    def _views(self, chosen: npt.NDArray[np.intp], seeds: npt.NDArray[np.int64] | None) -> Tensor:
        images = (self._store.image(int(index)) for index in chosen)
        if seeds is None:
            return torch.stack([self._view(image) for image in images])
        views = []
        # The transforms draw from torch's CPU generator; the training's own state is put back.
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(images, seeds, strict=True):
                torch.default_generator.manual_seed(int(seed))
                views.append(self._view(image))
        return torch.stack(views)
