"""Many files at once, on all cores: measured by their headers, decoded into their places.

What the workers run imports Pillow and numpy only, so that a process of its own pays even for a few
thousand files. Threads would not: Pillow decodes without Python's lock, but for small files most
of the time goes into what holds it (`benchmarks/decoding.py`).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from tuneapp.data.decode import (
    Unreadable,
    decode,
    digest,
    quiet,
    read_bytes,
    read_header,
    resize,
    resized_size,
)
from tuneapp.errors import DataError

CHUNK = 64
"""Files of one task: few enough that memory and a late task do not matter."""
PROCESSES_FROM = 10_000
"""Fewer files are done by threads: processes take a second or two to start."""

Sizes = list[tuple[int, int] | str]
"""Height and width of each image after resizing, or why it cannot be read."""


class Task(NamedTuple):
    """Files to decode.

    Attributes:
        files: their paths.
        shapes: height and width of each after resizing; 0, 0 for those known to be unreadable.
        offsets: where each one's pixels begin in `out`.
        short_side: in pixels after resizing.
        interpolation: torchvision's name.
        out: the file for the pixels; None checks only that they can be decoded.
    """

    files: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    short_side: int
    interpolation: str
    out: str | None


def measure_chunk(files: list[str], short_side: int) -> Sizes:
    """Return the size of each file's image after its short side is resized."""
    sizes: Sizes = []
    for file in files:
        try:
            header = read_header(Path(file))
            width, height = resized_size(header.width, header.height, short_side)
            sizes.append((height, width))
        except Unreadable as cause:
            sizes.append(str(cause))
    return sizes


class Decoded(NamedTuple):
    """One file that was decoded, or could not be.

    Attributes:
        digest: of its content; empty where there is none.
        shape: height and width after resizing.
        cause: why it cannot be read; empty if it can.
    """

    digest: str
    shape: tuple[int, int]
    cause: str


def decode_chunk(task: Task) -> list[Decoded]:
    """Decode files, each into its place."""
    out = None if task.out is None else os.open(task.out, os.O_WRONLY)
    results = []
    try:
        for file, shape, offset in zip(task.files, task.shapes, task.offsets, strict=True):
            content, cause, found = b"", "", (0, 0)
            try:
                content = read_bytes(Path(file))
                if shape != [0, 0]:
                    pixels = resize(decode(content), task.short_side, task.interpolation)
                    found = pixels.shape[:2]
                    # The same pixels on another side: EXIF at the end of a file turns it, too.
                    if sorted(found) != sorted(shape):
                        raise Unreadable("is of another size than its header says")
                    if out is not None:
                        _write(out, pixels.tobytes(), offset)
            except Unreadable as error:
                cause = str(error)
            results.append(Decoded(digest(content) if content else "", found, cause))
    finally:
        if out is not None:
            os.close(out)
    return results


def _write(out: int, content: bytes, offset: int) -> None:
    """Write all of it: a call may write less than it was given."""
    left = memoryview(content)
    while left:
        written = os.pwrite(out, left, offset)
        left, offset = left[written:], offset + written


def in_parallel(
    work: Callable[..., Any],
    files: Sequence[str],
    arguments: Callable[[int, list[str]], tuple[Any, ...]],
    take: Callable[[int, Any], None],
    watch: Callable[[int], None],
) -> None:
    """Run `work` over chunks of `files` on all cores.

    Args:
        work: a function of this module, so that processes can find it.
        files: what is to be done.
        arguments: of `work`, from the index of a chunk's first file and its files.
        take: given that index and the result, as chunks end, in any order.
        watch: told how many files are done.
    """
    starts = range(0, len(files), CHUNK)
    done = 0
    with quiet(), _executor(len(files)) as executor:
        try:
            futures = {}
            for start in starts:
                part = list(files[start : start + CHUNK])
                futures[executor.submit(work, *arguments(start, part))] = (start, len(part))
            for future in as_completed(futures):
                start, count = futures.pop(future)
                take(start, future.result())
                done += count
                watch(done)
        except BrokenProcessPool:
            raise DataError(
                "a process that was decoding images has died, perhaps for lack of memory; try "
                "again with more of it free"
            ) from None
        except BaseException:  # Ctrl-C, too: what has not begun shall not
            executor.shutdown(wait=True, cancel_futures=True)
            raise


def usable_cores() -> int:
    """Return the CPU cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _executor(num_files: int) -> Executor:
    workers = usable_cores()
    if num_files < PROCESSES_FROM:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
    )


def _begin_worker() -> None:
    """Leave Ctrl-C to the process that asked, which ends its workers; end with it in any case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, the workers of a process that was killed wait for their next task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
