"""Draw the augmented versions of images: each image by a seed of its own."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from tuneapp.config import is_reference
from tuneapp.data.pixels import Preprocessing, StoredPixels, StreamedPixels
from tuneapp.errors import ConfigError, say_cause
from tuneapp.own import find_own, offered_text
from tuneapp.space import SearchSpace

View = Callable[[Tensor], Tensor]
Key = tuple[int, int | None]
"""Index of an example and the seed of its view; None is the view that has nothing random."""


def training_view(augment: str, preprocessing: Preprocessing) -> View:
    """Return the random transform of one stored uint8 image to (3, crop_size, crop_size).

    The 35 % of `standard` is fastai's usual `min_scale`: fine-tuning starts from a network that
    knows whole objects, and torchvision's 8 % are meant for training from scratch. `strong` is
    what torchvision's newer recipes add: TrivialAugment (Mueller & Hutter 2021) and random erasing
    (Zhong et al. 2020) of a tenth of the images, here with the mean colour, which normalisation
    makes the zeros of torchvision's references.

    Args:
        augment: `none`, `light`, `standard`, `strong`, or the import path of a function
            `build(image_size)` that returns a transform of uint8 tensors.
        preprocessing: says the size that comes out.

    Raises:
        ConfigError: the user's own transform cannot be had.
    """
    size = preprocessing.crop_size
    if is_reference(augment):
        return _own_view(augment, size)
    if augment == "none":
        return evaluation_view(preprocessing)
    smallest = {"light": 0.8, "standard": 0.35, "strong": 0.35}[augment]
    crop = v2.RandomResizedCrop(size, scale=(smallest, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    steps: list[v2.Transform] = [crop]
    if augment in ("standard", "strong"):
        steps.append(v2.RandomHorizontalFlip())
    if augment == "strong":
        mean = [round(255 * value) for value in preprocessing.mean]
        steps += [
            v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR, fill=mean),
            v2.RandomErasing(p=0.1, value=mean),
        ]
    view: View = v2.Compose(steps)
    return view


def evaluation_view(preprocessing: Preprocessing) -> View:
    """Return torchvision's centre crop of a stored image to (3, crop_size, crop_size)."""
    view: View = v2.CenterCrop(preprocessing.crop_size)
    return view


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


def check_augment(augment: str, image_size: int) -> list[str]:
    """Return what is wrong with the user's own transform, after trying it on one image.

    Args:
        augment: as in a configuration; the named ones are right.
        image_size: what must come out.
    """
    if not is_reference(augment):
        return []
    image = torch.randint(
        0, 256, (3, image_size + 9, image_size + 31), generator=torch.Generator().manual_seed(0)
    ).to(torch.uint8)
    try:
        view = _own_view(augment, image_size)
        first, again = (draw_view(view, image, 7) for _ in range(2))
    except ConfigError as error:
        return [str(error)]
    except Exception as error:
        return [f"augment {augment!r}: trying it on an image failed: {say_cause(error)}"]
    wanted = (3, image_size, image_size)
    if not isinstance(first, Tensor) or first.dtype != torch.uint8 or first.shape != wanted:
        got = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, Tensor) else type(first)
        return [f"augment {augment!r}: it must return uint8 {wanted}, and returned {got}"]
    if not torch.equal(first, again):
        return [
            f"augment {augment!r}: it returned two different images for one seed; draw from "
            "torch's, numpy's or Python's own global generator, whose seeds are set for each image"
        ]
    return []


def draw_view(view: View, image: Tensor, seed: int | None) -> Tensor:
    """Return the view of one image that a seed stands for; None is the one without a draw."""
    if seed is None:
        return view(image)
    with _kept_generators():
        return _seeded(view, image, seed)


class KeyedViews(Dataset[Tensor]):
    """Views by their keys, in this process or in a worker: the same key gives the same view."""

    def __init__(self, pixels: StoredPixels | StreamedPixels, view: View) -> None:
        self._pixels = pixels
        self._view = view

    def __getitem__(self, key: Key) -> Tensor:
        """Return one view, uint8 (3, H, W)."""
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Tensor]:
        """Return the views of a batch, which torch's DataLoader asks for at once."""
        views = []
        # The transforms draw from global generators; the training's own states are put back.
        with _kept_generators():
            for index, seed in keys:
                image = self._pixels.image(index)
                view = self._view
                views.append(view(image) if seed is None else _seeded(view, image, seed))
        return views


def _seeded(view: View, image: Tensor, seed: int) -> Tensor:
    torch.default_generator.manual_seed(seed)
    if isinstance(view, _Own):
        # torchvision draws from torch alone; what the user's own draws from, nobody knows.
        random.seed(seed)
        np.random.seed(seed % 2**32)
    return view(image)


@contextmanager
def _kept_generators() -> Iterator[None]:
    """Put the CPU generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _Own:
    """The user's own transform; pickled by its import path, so that workers build it anew.

    What a space's file defines itself is pickled with the text that was executed.
    """

    def __init__(self, reference: str, image_size: int) -> None:
        self._made_from = (reference, image_size)
        build = find_own(reference, "augment")
        self._transform = build(image_size)
        if not callable(self._transform):
            raise ConfigError(
                f"augment {reference!r}: it must return a transform, and returned "
                f"{type(self._transform).__name__}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (*self._made_from, offered_text(self._made_from[0]))

    def __call__(self, image: Tensor) -> Tensor:
        view: Tensor = self._transform(image)
        return view


def _rebuilt(reference: str, image_size: int, space: tuple[str, Path] | None) -> _Own:
    if space is not None:
        SearchSpace(*space)  # which offers what it defines
    return _Own(reference, image_size)


def _own_view(reference: str, image_size: int) -> View:
    return _Own(reference, image_size)
