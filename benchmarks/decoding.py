"""How fast a data set is decoded, by threads and by processes; what a trial then waits for.

    python benchmarks/decoding.py [--files 4000] [--pixels 64] [--store 100000]

Writes that many small JPEG files of noise into a temporary folder and decodes them alternately with
threads and with processes, on all cores. Prints medians of the rates as ratios to one thread, the
cores that were kept busy (CPU seconds per second), then what a view costs from the store and by
decoding the file. With `--store N` it makes the store of N files once, and says how busy the cores
and how large the largest process were.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tuneapp.data import decoding
from tuneapp.data.decoding import Task, decode_chunk, in_parallel

ROUNDS = 3
SHORT_SIDE = 48


def make_files(folder: Path, count: int, pixels: int) -> list[str]:
    """Write JPEG files of noise in two class folders; return their paths."""
    random = np.random.default_rng(0)
    drawn = [random.integers(0, 256, (pixels, pixels + 16, 3), dtype=np.uint8) for _ in range(64)]
    files = []
    for index in range(count):
        place = folder / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        shifted = np.roll(drawn[index % 64], index // 64, axis=0)
        file = place / f"{index:07d}.jpg"
        Image.fromarray(shifted).save(file, quality=90)
        files.append(str(file))
    return files


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def decoded_by(processes_from: int, files: list[str]) -> tuple[float, float]:
    """Decode files by threads or processes; return files per second and cores kept busy.

    Args:
        processes_from: as many files are decoded by processes, fewer by threads; 0 by this thread.
        files: their paths.
    """
    shape = [SHORT_SIDE, int(SHORT_SIDE * (64 + 16) / 64)]

    def task(start: int, part: list[str]) -> tuple[Task]:
        return (Task(part, [shape] * len(part), [0] * len(part), SHORT_SIDE, "bilinear", None),)

    start, cpu = time.perf_counter(), cpu_seconds()
    if processes_from == 0:
        decode_chunk(*task(0, files))
    else:
        decoding.PROCESSES_FROM = processes_from
        in_parallel(decode_chunk, files, task, lambda index, result: None, lambda done: None)
    seconds = time.perf_counter() - start
    return len(files) / seconds, (cpu_seconds() - cpu) / seconds


def compare(files: list[str]) -> None:
    """Print what each way of decoding makes of the cores."""
    ways = {"one thread": 0, "threads": len(files) + 1, "processes": 1}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, processes_from in ways.items():
            seen[name].append(decoded_by(processes_from, files))
    base = [rate for rate, _ in seen["one thread"]]
    for name, pairs in seen.items():
        ratios = [rate / by for (rate, _), by in zip(pairs, base, strict=True)]
        busy = statistics.median(cores_busy for _, cores_busy in pairs)
        print(
            f"{name:<14} {statistics.median(ratios):5.2f} x one thread "
            f"({min(ratios):.2f}-{max(ratios):.2f}), {busy:.2f} cores busy"
        )


def compare_views(folder: str) -> None:
    """Print what it costs to read an image from the store, and to decode it."""
    # Not at the head: worker processes import this file, too, and torch would slow their start.
    from tuneapp.config import Data
    from tuneapp.data.pixels import Preprocessing, StreamedPixels
    from tuneapp.data.source import read_images
    from tuneapp.data.store import open_store

    images = read_images(Data(source=folder), seed=0)
    seen = Preprocessing(SHORT_SIDE, 40, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    stored, streamed = open_store(images, seen).pixels, StreamedPixels(images, seen)
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for pixels in (stored, streamed):
            start = time.perf_counter()
            for index in range(500):
                pixels.image(index)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    print(f"decoding an image takes {statistics.median(ratios):.1f} x reading it from the store")


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=4000)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--store", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TUNEAPP_CACHE"] = f"{scratch}/cache"
        if asked.store:
            make_one_store(Path(scratch), asked.store, asked.pixels)
            return
        files = make_files(Path(scratch) / "files", asked.files, asked.pixels)
        print(f"{len(files)} files of {asked.pixels} pixels, {ROUNDS} rounds, medians")
        compare(files)
        compare_views(f"{scratch}/files")


_STORE = """
import os, resource, sys, time
from tuneapp.config import Data
from tuneapp.data.source import read_images
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.store import open_store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
t = os.times()
USED = t.user + t.system
start = time.perf_counter()
images = read_images(Data(source=sys.argv[1]), seed=0)
listed = time.perf_counter() - start
open_store(images, Preprocessing(48, 40, "bilinear", (0.5,) * 3, (0.2,) * 3))
seconds = time.perf_counter() - start
t = os.times()
largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"listed and split in {listed:.1f} s, all in {seconds:.1f} s, "
      f"{len(images.examples) / seconds:.0f} files/s; "
      f"memory of this process {largest:.0f} MB, {before:.0f} MB before")
used = t.children_user + t.children_system + t.user + t.system
print(f"{(used - USED) / seconds:.2f} cores busy")
"""


def make_one_store(scratch: Path, count: int, pixels: int) -> None:
    """Make the store of many files in a process of its own, and say what it took."""
    make_files(scratch / "files", count, pixels)
    print(f"{count} files:")
    subprocess.run([sys.executable, "-c", _STORE, str(scratch / "files")], check=True)


if __name__ == "__main__":
    main()
