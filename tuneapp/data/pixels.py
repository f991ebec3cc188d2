"""The pixels of images at the size that trials use: from a file, or decoded at each use."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tuneapp.data.decode import Unreadable, decode, digest, read_bytes, resize
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.reading import read_example
from tuneapp.errors import DataError

USED = ("train", "val")
"""The splits that trials may read."""


@dataclass(frozen=True)
class Preprocessing:
    """How the weights were evaluated: resize the short side, crop the centre, normalise.

    Attributes:
        resize_size: short side in pixels after resizing.
        crop_size: height and width in pixels of the network's input.
        interpolation: torchvision's name, such as `bilinear`.
        mean: of each channel, for values in [0, 1].
        std: likewise.
    """

    resize_size: int
    crop_size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class StoredPixels:
    """Decoded images in a file, mapped read-only. A pickled copy maps the same file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: npt.NDArray[np.int64] = np.load(folder / "shapes.npy")
        self._ends = np.cumsum(self._shapes[:, 0] * self._shapes[:, 1] * 3)
        self._pixels: npt.NDArray[np.uint8] = (
            np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
            if self._ends[-1]
            else np.empty(0, dtype=np.uint8)  # no image can be read, and an empty file not mapped
        )

    def __reduce__(self) -> tuple[type["StoredPixels"], tuple[Path]]:
        return StoredPixels, (self._folder,)

    def image(self, index: int) -> torch.Tensor:
        """Return one image, uint8 (3, H, W): a copy, so that the shared file is not written to."""
        height, width = self._shapes[index]
        end = int(self._ends[index])
        flat = np.array(self._pixels[end - int(height) * int(width) * 3 : end])
        return torch.from_numpy(flat.reshape(height, width, 3)).permute(2, 0, 1)


class StreamedPixels:
    """Images that are decoded at each use."""

    def __init__(self, images: ImageSet, preprocessing: Preprocessing) -> None:
        self._images = replace(images, examples=())
        self._examples = images.of(*USED)
        self._preprocessing = preprocessing

    def image(self, index: int) -> torch.Tensor:
        """Return one image, uint8 (3, H, W), equal to the stored one.

        Raises:
            DataError: its file is missing or has changed since the sweep began; the message names
                it.
        """
        example = self._examples[index]
        wanted = self._preprocessing
        try:
            pixels = resize(self._open(example), wanted.resize_size, wanted.interpolation)
        except Unreadable as cause:
            raise DataError(f"{self._images.name_of(example)} {cause}") from None
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def _open(self, example: Example) -> Image.Image:
        if self._images.root is None:
            return read_example(self._images, example)
        content = read_bytes(self._images.root / example.path)
        if example.digest and digest(content) != example.digest:
            raise Unreadable("has changed since the run began; restore it, or start a new run")
        return decode(content)
