"""Decode every image once, for all trials of a machine.

A store is one flat file of uint8 pixels and an index. Each image is kept at the size to which the
evaluation preprocessing resizes it (short side, aspect kept), resized by torchvision on the PIL
image, so that a centre crop of the stored pixels is exactly torchvision's own preprocessing of the
file. Trials map the file read-only; its pages are shared by all of them.

A store holds the examples of the training and validation splits only: what is not in it, no trial
can read.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from tuneapp.data.source import Example, ImageSet
from tuneapp.errors import DataError

SPLITS = ("train", "val")
_FORMAT = 1  # raise it when the stored bytes change, so that older stores are made anew
_CHUNK = 256  # images decoded at once


@dataclass(frozen=True)
class Preprocessing:
    """How the weights were evaluated: resize the short side, crop the centre, normalise.

    Attributes:
        resize_size: short side in pixels after resizing.
        crop_size: height and width in pixels that the network sees.
        interpolation: torchvision's name, such as `bilinear`.
        mean: of each channel, for values in [0, 1].
        std: likewise.
    """

    resize_size: int
    crop_size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Store:
    """Decoded images, mapped read-only."""

    def __init__(self, folder: Path, examples: Sequence[Example]) -> None:
        """Open the store in `folder`, made by `open_store`."""
        self._pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
        self._shapes: npt.NDArray[np.int64] = np.load(folder / "shapes.npy")
        areas = self._shapes[:, 0] * self._shapes[:, 1] * 3
        self._ends = np.cumsum(areas)
        self.labels = torch.tensor([e.label for e in examples], dtype=torch.int64)
        splits = np.array([e.split for e in examples])
        self._of = {s: np.flatnonzero(splits == s) for s in SPLITS}

    def indices(self, split: str) -> npt.NDArray[np.intp]:
        """Return the indices of the examples of `train` or `val`."""
        return self._of[split]

    def image(self, index: int) -> torch.Tensor:
        """Return one image, uint8 (3, H, W): a copy, so that nobody can write to the shared one."""
        height, width = self._shapes[index]
        end = int(self._ends[index])
        flat = np.array(self._pixels[end - int(height) * int(width) * 3 : end])
        return torch.from_numpy(flat.reshape(height, width, 3)).permute(2, 0, 1)


def cache_dir() -> Path:
    """Return where stores are kept: `$TUNEAPP_CACHE`, else `~/.cache/tuneapp`."""
    asked = os.environ.get("TUNEAPP_CACHE")
    if asked:
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tuneapp"


def open_store(images: ImageSet, preprocessing: Preprocessing) -> Store:
    """Return the store of these images at this size, making it if this machine has none yet.

    Of several processes that ask at once, one makes it and the others wait.

    Raises:
        DataError: some images cannot be decoded (the message names them), or the disk is full.
    """
    examples = images.of(*SPLITS)
    folder = cache_dir() / f"store-{_key(images, examples, preprocessing)}"
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.is_dir():
                    _make(folder, images, examples, preprocessing)
        return Store(folder, examples)
    except OSError as error:
        raise DataError(
            f"cannot store the decoded images in {folder.parent}: {error.strerror}; free some "
            "space there, or set TUNEAPP_CACHE to another folder"
        ) from None


def _key(images: ImageSet, examples: Sequence[Example], preprocessing: Preprocessing) -> str:
    """Name the bytes of a store: the files as they are now, and what is done to them."""
    said = hashlib.sha256(
        json.dumps(
            [_FORMAT, str(images.root), preprocessing.resize_size, preprocessing.interpolation]
        ).encode()
    )
    for e in examples:
        try:
            changed_ns = 0 if images.root is None else (images.root / e.path).stat().st_mtime_ns
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None
        said.update(f"{e.path!r} {e.num_bytes} {changed_ns}\n".encode())
    return said.hexdigest()[:20]


def _make(
    folder: Path, images: ImageSet, examples: Sequence[Example], preprocessing: Preprocessing
) -> None:
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    interpolation = TF.InterpolationMode(preprocessing.interpolation)
    failures: list[str] = []

    def decode(example: Example) -> npt.NDArray[np.uint8] | None:
        try:
            image = images.open(example)
        except DataError as error:
            failures.append(str(error))
            return None
        resized: Image.Image = TF.resize(image, [preprocessing.resize_size], interpolation)
        return np.asarray(resized)

    shapes: list[tuple[int, int]] = []
    try:
        # Threads: Pillow decodes and resizes without Python's lock. Chunks bound the memory.
        with (aside / "pixels.bin").open("wb") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(examples), _CHUNK):
                for pixels in pool.map(decode, examples[start : start + _CHUNK]):
                    if pixels is not None:
                        out.write(pixels.tobytes())
                        shapes.append((pixels.shape[0], pixels.shape[1]))
            out.flush()
            os.fsync(out.fileno())
        if failures:
            raise DataError(
                f"{len(failures)} of {len(examples)} images cannot be read: "
                f"{'; '.join(failures[:3])}; mend or remove them"
            )
        np.save(aside / "shapes.npy", np.array(shapes, dtype=np.int64))
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
