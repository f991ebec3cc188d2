"""Decode every image once, for all trials on a machine; beyond a budget of bytes, at each use.

A store is one flat file of uint8 pixels and an index. Each image is stored at the size to which the
evaluation preprocessing resizes it (short side, with its aspect ratio), so that a centre crop of
the stored pixels is exactly torchvision's own preprocessing of the file. Trials map the file
read-only and share its pages in memory.

If the pixels would not fit the budget, only the index is made: every image is decoded once, to know
before any training which ones cannot be read, and again at each use.

Both hold only the examples of the training and validation splits: trials cannot read others.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from tuneapp.data.cache import cache_dir
from tuneapp.data.decode import DECODER, PASSING, Unreadable, digest, read_bytes
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.making import Watch, copy_objects, decode_files
from tuneapp.data.pixels import USED, Preprocessing, StoredPixels, StreamedPixels
from tuneapp.data.reading import read_example
from tuneapp.errors import DataError

_FORMAT = 2  # to be raised when the stored bytes change, so that older stores are not used
_PROBES = 16  # images of a Dataset whose pixels identify its store
_IDLE_S = 24 * 3600.0  # a store not opened for this long may be removed to make room for a new one


class Store:
    """The examples that trials may use, and their pixels.

    Attributes:
        pixels: reads the pixels of each example.
        labels: int64 (N,); of a multi-label set, float32 (N, classes) of 0 and 1.
        weights: float64 (N,), how often each example is drawn with weighted sampling.
        bad: whether each example cannot be read, bool (N,).
    """

    def __init__(self, folder: Path, images: ImageSet, preprocessing: Preprocessing) -> None:
        """Open the store that `open_store` made in `folder`."""
        examples = images.of(*USED)
        self.folder = folder
        self.is_streamed = not (folder / "pixels.bin").exists()
        self.pixels: StoredPixels | StreamedPixels = (
            StreamedPixels(images, preprocessing) if self.is_streamed else StoredPixels(folder)
        )
        self.labels = _labels(examples, images)
        self.weights = np.array([e.weight for e in examples])
        self.causes: dict[int, str] = {
            int(index): cause
            for index, cause in json.loads((folder / "bad.json").read_text()).items()
        }
        # Also examples that another preprocessing of the same run cannot use (such as a long
        # strip), so that all trials have the same examples.
        self.bad = np.array([bool(e.bad) for e in examples])
        self.bad[list(self.causes)] = True
        splits = np.array([e.split for e in examples])
        self._of = {s: np.flatnonzero(splits == s) for s in USED}

    def image(self, index: int) -> torch.Tensor:
        """Return one image, uint8 (3, H, W)."""
        return self.pixels.image(index)

    def indices(self, split: str) -> npt.NDArray[np.intp]:
        """Return the indices of the readable examples of `train` or `val`."""
        indices = self._of[split]
        return np.asarray(indices[~self.bad[indices]])

    def bad_indices(self, split: str) -> npt.NDArray[np.intp]:
        """Return the indices of the examples of `train` or `val` that cannot be read."""
        indices = self._of[split]
        return np.asarray(indices[self.bad[indices]])

    def stamped(self, images: ImageSet) -> ImageSet:
        """Return the set with the digests of its examples, and the causes of unreadable ones."""
        digests = np.load(self.folder / "digests.npy").tolist()
        index = 0
        examples = []
        for example in images.examples:
            if example.split in USED:
                bad = example.bad or self.causes.get(index, "")
                example = replace(example, digest=digests[index].decode(), bad=bad)
                index += 1
            examples.append(example)
        return replace(images, examples=tuple(examples))


def _labels(examples: Sequence[Example], images: ImageSet) -> torch.Tensor:
    if not images.is_multilabel:
        return torch.tensor([e.label for e in examples], dtype=torch.int64)
    labels = torch.zeros(len(examples), len(images.classes))
    for row, example in zip(labels, examples, strict=True):
        row[list(example.labels)] = 1
    return labels


def open_store(
    images: ImageSet,
    preprocessing: Preprocessing,
    budget: int | None = None,
    watch: Watch = lambda what, done, total: None,
    accept_index: bool = False,
) -> Store:
    """Return the store of these images at this size, making it if this machine has none yet.

    Of several processes at once, one makes it and the others wait.

    Args:
        images: already split.
        preprocessing: gives the size.
        budget: bytes that all stores of this machine may take together; if these images would
            not fit, they are streamed. None is half of the disk's free space.
        watch: is called with the progress.
        accept_index: stream if an index exists, even if there is room by now: a trial uses what its
            sweep began with.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    key = _key(images, preprocessing)
    stored, indexed = (cache_dir() / f"{kind}-{key}" for kind in ("store", "index"))
    try:
        made = [place for place in (stored, indexed) if accept_index and place.is_dir()]
        folder = made[0] if made else _existing(stored, indexed, budget)
        if folder is not None and not accept_index and _has_healed(folder, images):
            shutil.rmtree(folder)
            folder = None
        if folder is None:
            cache_dir().mkdir(parents=True, exist_ok=True)
            with FileLock(cache_dir() / f"store-{key}.lock"):
                folder = _existing(stored, indexed, budget)
                if folder is None:
                    folder = _make(stored, indexed, images, preprocessing, budget, watch)
        with contextlib.suppress(OSError):  # it may belong to another user
            os.utime(folder)  # used just now, so not idle
        return Store(folder, images, preprocessing)
    except OSError as error:
        raise DataError(
            f"cannot store the decoded images in {cache_dir()}: {error.strerror or error}; free "
            "some space there, or set TUNEAPP_CACHE to another folder"
        ) from None


def _existing(stored: Path, indexed: Path, budget: int | None) -> Path | None:
    """Return the existing store, or an index whose pixels do not fit the budget, if any."""
    if stored.is_dir():
        return stored
    if indexed.is_dir() and _num_bytes(np.load(indexed / "shapes.npy")) > _room(budget):
        return indexed
    return None


def _has_healed(folder: Path, images: ImageSet) -> bool:
    """Whether a file that the disk, the network or permissions made unreadable can now be read.

    Such a file is unchanged, so its store, in which it is unreadable, would be used forever.
    """
    if images.root is None:
        return False
    examples = images.of(*USED)
    causes = json.loads((folder / "bad.json").read_text(encoding="utf-8"))
    for index, cause in causes.items():
        if cause.startswith(PASSING):
            with contextlib.suppress(Unreadable):
                read_bytes(images.root / examples[int(index)].path)
                return True
    return False


def _num_bytes(shapes: npt.NDArray[np.int64]) -> int:
    return int((shapes[:, 0] * shapes[:, 1] * 3).sum())


def _room(budget: int | None) -> int:
    """Return how many bytes a new store may take, once all idle ones are removed."""
    if budget is None:
        return shutil.disk_usage(cache_dir()).free // 2
    return budget - sum(_size(folder) for folder in _stores() if not _is_idle(folder))


def _stores() -> list[Path]:
    """Return the stores of this machine, the least recently used first."""
    return sorted(cache_dir().glob("store-*/"), key=lambda folder: folder.stat().st_mtime)


def _size(folder: Path) -> int:
    return (folder / "pixels.bin").stat().st_size


def _is_idle(folder: Path) -> bool:
    return time.time() - folder.stat().st_mtime > _IDLE_S


def _make_room(needed: int, budget: int | None) -> None:
    """Remove idle stores, the oldest first, until a new one of `needed` bytes fits the budget."""
    if budget is None:
        return
    folders = _stores()
    taken = sum(map(_size, folders))
    for folder in folders:
        if taken + needed <= budget:
            return
        if _is_idle(folder):
            taken -= _size(folder)
            shutil.rmtree(folder)


def _key(images: ImageSet, preprocessing: Preprocessing) -> str:
    """Return the key of a store: a hash of its files as the run found them, and the resizing."""
    examples = images.of(*USED)
    key = hashlib.sha256(
        json.dumps(
            [
                _FORMAT,
                DECODER,
                str(images.root),
                "" if images.root else [images.data.source, images.data.data_root],
                preprocessing.resize_size,
                preprocessing.interpolation,
            ]
        ).encode()
    )
    for e in examples:
        key.update(f"{e.path!r} {e.num_bytes} {e.modified_ns}\n".encode())
    if images.data.is_dataset:
        for e in _probes(examples):
            key.update((e.digest or _pixel_digest(images, e)).encode())
    return key.hexdigest()[:20]


def require_repeatable(images: ImageSet) -> None:
    """Check with some images that a Dataset gives the same image each time.

    Raises:
        DataError: it does not; one random draw would be frozen into the store.
    """
    if not images.data.is_dataset:
        return
    for example in _probes(images.of(*USED)):
        if _pixel_digest(images, example) != _pixel_digest(images, example):
            raise DataError(
                f"{images.name_of(example)} is another image each time it is loaded; remove the "
                "random transforms from the Dataset, and give them as augment="
            )


def require_same_pixels(images: ImageSet) -> None:
    """Check with some images that a Dataset gives the same images as when the run began.

    Raises:
        DataError: it does not; the message names the first example.
    """
    if not images.data.is_dataset:
        return
    for example in _probes(images.of(*USED)):
        if example.digest and _pixel_digest(images, example) != example.digest:
            raise DataError(
                f"{images.name_of(example)} is another image than when this run began; restore "
                "the data, or start a new run"
            )


def _probes(examples: Sequence[Example]) -> Sequence[Example]:
    return examples[:: max(1, len(examples) // _PROBES)]


def _pixel_digest(images: ImageSet, example: Example) -> str:
    try:
        return digest(read_example(images, example).tobytes())
    except Unreadable as cause:
        return str(cause)


# --- Making one -----------------------------------------------------------------------------------


def _make(
    stored: Path,
    indexed: Path,
    images: ImageSet,
    preprocessing: Preprocessing,
    budget: int | None,
    watch: Watch,
) -> Path:
    """Make a store, or only the index if the pixels do not fit the budget; return its folder."""
    for left in stored.parent.glob(f".{stored.name}.*"):  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(dir=stored.parent, prefix=f".{stored.name}."))
    try:
        if images.root is None:
            made = copy_objects(aside, images, preprocessing, _room(budget), watch)
        else:
            made = decode_files(aside, images, preprocessing, _room(budget), watch)
        shapes, digests, causes = made
        np.save(aside / "shapes.npy", shapes)
        np.save(aside / "digests.npy", np.array([d.encode() for d in digests], dtype="S32"))
        (aside / "bad.json").write_text(json.dumps(causes))
        pixels = aside / "pixels.bin"
        if pixels.exists():
            _make_room(pixels.stat().st_size, budget)
            with pixels.open("rb") as written:
                os.fsync(written.fileno())
        for file in aside.iterdir():
            file.chmod(0o444)  # all trials share it: nobody must write to it
        folder = stored if pixels.exists() else indexed
        aside.chmod(0o755)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def checked_apart(
    images: ImageSet, preprocessing: Preprocessing, split: str, watch: Watch
) -> ImageSet:
    """Return the set with the digests of a split, and the causes of its unreadable images.

    Its images are decoded for that; none of their pixels are stored.
    """
    if not images.of(split):
        return images
    apart = replace(images, examples=tuple(replace(e, split="val") for e in images.of(split)))
    stamped = iter(open_store(apart, preprocessing, 0, watch).stamped(apart).examples)
    examples = tuple(
        replace(next(stamped), split=split) if e.split == split else e for e in images.examples
    )
    return replace(images, examples=examples)
