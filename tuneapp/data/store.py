"""Decode every image once, for all trials of a machine; beyond a budget of bytes, at each use.

A store is one flat file of uint8 pixels and an index. Each image is kept at the size to which the
evaluation preprocessing resizes it (short side, aspect kept), so that a centre crop of the stored
pixels is exactly torchvision's own preprocessing of the file. Trials map the file read-only; its
pages are shared by all of them.

The index alone is made where the pixels would not fit the budget: every image is decoded once, to
know before any training which ones cannot be read, and again whenever it is used.

Both hold the examples of the training and validation splits only: what is not in them, no trial
can read.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from PIL import Image

from tuneapp.data.cache import cache_dir
from tuneapp.data.decode import Unreadable, decode, digest, read_bytes, resize
from tuneapp.data.decoding import Decoded, Sizes, Task, decode_chunk, in_parallel, measure_chunk
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.reading import read_example
from tuneapp.errors import DataError

USED = ("train", "val")
_FORMAT = 2  # raise it when the stored bytes change, so that older stores are made anew
_PROBES = 16  # images of a Dataset by whose pixels its store is found again
_IDLE_S = 24 * 3600.0  # a store that nothing opened for so long may be removed for a new one

Watch = Callable[[str, int, int], None]
"""Told what is being done, how many images are done, and how many there are."""


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


class StoredPixels:
    """Decoded images in a file, mapped read-only. A pickled copy maps the same file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: npt.NDArray[np.int64] = np.load(folder / "shapes.npy")
        self._ends = np.cumsum(self._shapes[:, 0] * self._shapes[:, 1] * 3)
        self._pixels: npt.NDArray[np.uint8] = (
            np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="r")
            if self._ends[-1]
            else np.empty(0, dtype=np.uint8)  # not one image can be read; nothing cannot be mapped
        )

    def __reduce__(self) -> tuple[type["StoredPixels"], tuple[Path]]:
        return StoredPixels, (self._folder,)

    def image(self, index: int) -> torch.Tensor:
        """Return one image, uint8 (3, H, W): a copy, so that nobody can write to the shared one."""
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
            DataError: its file is gone or has changed since the sweep began; the message names it.
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
            raise Unreadable("has changed since the run began; restore it, or begin a new run")
        return decode(content)


class Store:
    """The examples that trials may use, and their pixels.

    Attributes:
        pixels: where they come from.
        labels: int64 (N,); of a multi-label set, float32 (N, classes) of 0 and 1.
        weights: float64 (N,), how often each is to be drawn where sampling is weighted.
        bad: whether each example cannot be read, bool (N,).
    """

    def __init__(self, folder: Path, images: ImageSet, preprocessing: Preprocessing) -> None:
        """Open what `open_store` made in `folder`."""
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
        # Also what another preprocessing of the same run cannot use (a strip too long for it), so
        # that all trials have the same examples.
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
        """Return the set with the digests of its contents, and what of it cannot be read."""
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

    Of several processes that ask at once, one makes it and the others wait.

    Args:
        images: split.
        preprocessing: says the size.
        budget: bytes that all stores of this machine may take together; if these images would
            not fit, they are streamed. None is half of the disk's free space.
        watch: told how far it is.
        accept_index: stream where that was decided before, even if there is room by now: a trial
            takes what its sweep began with.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    key = _key(images, preprocessing)
    stored, indexed = (cache_dir() / f"{kind}-{key}" for kind in ("store", "index"))
    try:
        made = [place for place in (stored, indexed) if accept_index and place.is_dir()]
        folder = made[0] if made else _existing(stored, indexed, budget)
        if folder is None:
            cache_dir().mkdir(parents=True, exist_ok=True)
            with FileLock(cache_dir() / f"store-{key}.lock"):
                folder = _existing(stored, indexed, budget)
                if folder is None:
                    folder = _make(stored, indexed, images, preprocessing, budget, watch)
        os.utime(folder)  # used just now: not to be removed for another
        return Store(folder, images, preprocessing)
    except OSError as error:
        raise DataError(
            f"cannot store the decoded images in {cache_dir()}: {error.strerror or error}; free "
            "some space there, or set TUNEAPP_CACHE to another folder"
        ) from None


def _existing(stored: Path, indexed: Path, budget: int | None) -> Path | None:
    """Return the store, or an index whose pixels do not fit the budget, if there is one."""
    if stored.is_dir():
        return stored
    if indexed.is_dir() and _num_bytes(np.load(indexed / "shapes.npy")) > _room(budget):
        return indexed
    return None


def _num_bytes(shapes: npt.NDArray[np.int64]) -> int:
    return int((shapes[:, 0] * shapes[:, 1] * 3).sum())


def _room(budget: int | None) -> int:
    """Return how many bytes a new store may take, once all idle ones are removed."""
    if budget is None:
        return shutil.disk_usage(cache_dir()).free // 2
    return budget - sum(_size(folder) for folder in _stores() if not _is_idle(folder))


def _stores() -> list[Path]:
    """Return the stores of this machine, the one that was not used for longest first."""
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
    """Name the bytes of a store: the files as they were when the run began, and what is done."""
    examples = images.of(*USED)
    said = hashlib.sha256(
        json.dumps(
            [
                _FORMAT,
                str(images.root),
                "" if images.root else [images.data.source, images.data.data_root],
                preprocessing.resize_size,
                preprocessing.interpolation,
            ]
        ).encode()
    )
    for e in examples:
        said.update(f"{e.path!r} {e.num_bytes} {e.modified_ns}\n".encode())
    if images.data.is_dataset:
        for e in _probes(examples):
            said.update((e.digest or _pixel_digest(images, e)).encode())
    return said.hexdigest()[:20]


def require_same_pixels(images: ImageSet) -> None:
    """Check, by some images of it, that a Dataset gives what it gave when the run began.

    Raises:
        DataError: it does not; the message names the first example.
    """
    if not images.data.is_dataset:
        return
    for example in _probes(images.of(*USED)):
        if example.digest and _pixel_digest(images, example) != example.digest:
            raise DataError(
                f"{images.name_of(example)} is another image than when this run began; restore "
                "the data, or begin a new run"
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
    """Make a store, or the index alone where the pixels do not fit the budget; return it."""
    for left in stored.parent.glob(f".{stored.name}.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(dir=stored.parent, prefix=f".{stored.name}."))
    try:
        if images.root is None:
            made = _copy_objects(aside, images, preprocessing, _room(budget), watch)
        else:
            made = _decode_files(aside, images, preprocessing, _room(budget), watch)
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
            file.chmod(0o444)  # nobody is to write to what all share
        folder = stored if pixels.exists() else indexed
        aside.chmod(0o755)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


Made = tuple[npt.NDArray[np.int64], list[str], dict[int, str]]
"""Height and width of each image, (0, 0) for one that cannot be read; digests; causes."""


def _decode_files(
    aside: Path, images: ImageSet, preprocessing: Preprocessing, room: int, watch: Watch
) -> Made:
    """Measure every file by its header, then decode each into its place; on all cores."""
    assert images.root is not None
    examples = images.of(*USED)
    files = [str(images.root / e.path) for e in examples]
    shapes = np.zeros((len(files), 2), dtype=np.int64)
    causes: dict[int, str] = {}

    def measured(start: int, sizes: Sizes) -> None:
        for index, size in enumerate(sizes, start):
            if isinstance(size, str):
                causes[index] = size
            else:
                shapes[index] = size

    short_side = preprocessing.resize_size
    in_parallel(
        measure_chunk, files, lambda start, part: (part, short_side), measured,
        lambda done: watch("images measured", done, len(files)),
    )  # fmt: skip
    ends = np.cumsum(shapes[:, 0] * shapes[:, 1] * 3)
    out = str(aside / "pixels.bin") if ends[-1] <= room else None
    if out is not None:
        with Path(out).open("wb") as file:
            file.truncate(int(ends[-1]))
    digests = [""] * len(files)

    def decoded(start: int, results: list[Decoded]) -> None:
        for index, result in enumerate(results, start):
            digests[index] = result.digest
            if result.cause:
                causes[index] = result.cause
            elif index not in causes:
                shapes[index] = result.shape

    def task(start: int, part: list[str]) -> tuple[Task]:
        stop = start + len(part)
        shapes_here = shapes[start:stop].tolist()
        offsets = (ends[start:stop] - shapes[start:stop].prod(axis=1) * 3).tolist()
        return (Task(part, shapes_here, offsets, short_side, preprocessing.interpolation, out),)

    in_parallel(
        decode_chunk, files, task, decoded,
        lambda done: watch("images decoded" if out else "images checked", done, len(files)),
    )  # fmt: skip
    return shapes, digests, causes


def _copy_objects(
    aside: Path, images: ImageSet, preprocessing: Preprocessing, room: int, watch: Watch
) -> Made:
    """Ask a Dataset for every image, one after the other: nobody knows whether it bears threads."""
    examples = images.of(*USED)
    shapes = np.zeros((len(examples), 2), dtype=np.int64)
    digests, causes = [], {}
    written = 0
    path = aside / "pixels.bin"
    with path.open("wb") as out:
        for index, example in enumerate(examples):
            try:
                image = read_example(images, example)
                pixels = resize(image, preprocessing.resize_size, preprocessing.interpolation)
            except Unreadable as cause:
                causes[index] = str(cause)
                digests.append("")
                continue
            digests.append(digest(image.tobytes()))
            shapes[index] = pixels.shape[:2]
            written += pixels.nbytes
            if written <= room:
                out.write(pixels.tobytes())
            watch("images decoded", index + 1, len(examples))
    if written > room:
        path.unlink()
    return shapes, digests, causes


def digest_files(images: ImageSet, split: str) -> ImageSet:
    """Return the set with the digests of the files of a split, which are read and not decoded."""
    if images.root is None:
        return images
    root = images.root

    def digested(example: Example) -> Example:
        if example.split != split:
            return example
        try:
            return replace(example, digest=digest(read_bytes(root / example.path)))
        except Unreadable as cause:
            return replace(example, bad=str(cause))

    return replace(images, examples=tuple(map(digested, images.examples)))
