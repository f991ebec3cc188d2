"""Decode all images of a set, into a file or only to find out which can be read."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tuneapp.data.decode import Unreadable, digest, resize
from tuneapp.data.decoding import Decoded, Sizes, Task, decode_chunk, in_parallel, measure_chunk
from tuneapp.data.examples import ImageSet
from tuneapp.data.pixels import USED, Preprocessing
from tuneapp.data.reading import read_example

Watch = Callable[[str, int, int], None]
"""Is called with what is being done, the number of images done, and the number of all images."""

Made = tuple[npt.NDArray[np.int64], list[str], dict[int, str]]
"""Height and width of each image, (0, 0) for an unreadable one; digests; causes by index."""


def decode_files(
    aside: Path, images: ImageSet, preprocessing: Preprocessing, room: int, watch: Watch
) -> Made:
    """Measure every file by its header, then decode each to its offset; on all cores."""
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
    if out is not None and not _reserve(Path(out), int(ends[-1])):
        out = None
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


def _reserve(file: Path, num_bytes: int) -> bool:
    """Make a file of this size; return whether the disk has room for all of it."""
    with file.open("wb") as out:
        try:
            if num_bytes:
                os.posix_fallocate(out.fileno(), 0, num_bytes)
        except OSError:
            file.unlink()
            return False
    return True


def copy_objects(
    aside: Path, images: ImageSet, preprocessing: Preprocessing, room: int, watch: Watch
) -> Made:
    """Load every image of a Dataset, one after the other: it need not be thread-safe."""
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
