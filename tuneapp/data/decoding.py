"""Many files in parallel, on all cores: measured by their headers, decoded into one file.

The code of the workers imports only Pillow and numpy, so that processes pay off from a few thousand
files. Threads would not: Pillow decodes without Python's lock, but for small files most of the time
is spent in code that holds it (`benchmarks/decoding.py`).
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
"""Files per task: few enough that its memory, and waiting for the last task, do not matter."""
PROCESSES_FROM = 10_000
"""Fewer files are processed by threads: processes take a second or two to start."""

Sizes = list[tuple[int, int] | str]
"""Height and width of each image after resizing, or why it cannot be read."""


class Task(NamedTuple):
    """Files to decode.

    Attributes:
        files: their paths.
        shapes: height and width of each after resizing; 0, 0 for those known to be unreadable.
        offsets: at which the pixels of each begin in `out`.
        short_side: in pixels after resizing.
        interpolation: torchvision's name.
        out: the file for the pixels; None only checks that the files can be decoded.
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
    """Decode files, each to its offset."""
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
                    # Width and height may be exchanged: EXIF at the end of a file also turns it.
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
    """Write all of `content`: one call may write less."""
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
        work: a function of this module, so that processes can import it.
        files: to be processed.
        arguments: returns those of `work`, given the index of a chunk's first file and its files.
        take: is called with that index and the result when a chunk is done, in any order.
        watch: is called with the number of files done.
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
                "a process that was decoding images has died, perhaps for lack of memory; free "
                "some memory and try again"
            ) from None
        except BaseException:  # also Ctrl-C: tasks that have not begun must not begin
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
    """Leave Ctrl-C to the parent process, which ends its workers; end with it in any case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent: after a kill, it would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
