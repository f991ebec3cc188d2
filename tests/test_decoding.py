import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from tuneapp.data import decoding
from tuneapp.data.decoding import Task, decode_chunk, in_parallel, measure_chunk


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three images of 20 x 10, 10 x 30 and 5 x 5 pixels, with a text between them."""
    names = []
    for i, (width, height) in enumerate([(20, 10), (10, 30), (5, 5)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        names.append(str(tmp_path / f"{i}.png"))
    (tmp_path / "text.png").write_text("no image")
    return [names[0], str(tmp_path / "text.png"), *names[1:]]


def test_files_are_measured_as_torchvision_resizes_them(files: list[str]) -> None:
    assert measure_chunk(files, 10) == [(10, 20), "is not an image", (30, 10), (10, 10)]
    assert measure_chunk(files, 7) == [(7, 14), "is not an image", (21, 7), (7, 7)]


def task_of(files: list[str], out: Path | None) -> Task:
    shapes = [[10, 20], [0, 0], [30, 10], [10, 10]]
    return Task(files, shapes, [0, 600, 600, 1500], 10, "bilinear", out and str(out))


def test_each_file_is_decoded_into_its_place(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "pixels.bin"
    out.write_bytes(bytes(1800))
    results = decode_chunk(task_of(files, out))
    pixels = []
    for file, size in ((files[0], (20, 10)), (files[2], (10, 30)), (files[3], (10, 10))):
        with Image.open(file) as image:
            pixels.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR)).tobytes())
    assert out.read_bytes() == b"".join(pixels)
    assert [r.shape for r in results] == [(10, 20), (0, 0), (30, 10), (10, 10)]
    digests = [blake2b(Path(f).read_bytes(), digest_size=16).hexdigest() for f in files]
    assert [r.digest for r in results] == digests
    assert [r.cause for r in results] == [""] * 4


def test_without_a_place_for_the_pixels_files_are_only_checked(files: list[str]) -> None:
    content = Path(files[2]).read_bytes()
    Path(files[2]).write_bytes(content[:-40])
    results = decode_chunk(task_of(files, None))
    assert [bool(r.cause) for r in results] == [False, False, True, False]
    assert results[2].digest == blake2b(content[:-40], digest_size=16).hexdigest()


def test_a_write_that_the_system_does_in_parts_is_whole(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, in_parts = tmp_path / "whole.bin", tmp_path / "parts.bin"
    decode_chunk(task_of(files, whole if whole.write_bytes(b"") == 0 else None))
    in_parts.write_bytes(b"")
    really = decoding.os.pwrite
    monkeypatch.setattr(decoding.os, "pwrite", lambda fd, b, at: really(fd, bytes(b)[:77], at))
    decode_chunk(task_of(files, in_parts))
    assert in_parts.read_bytes() == whole.read_bytes()
    assert len(whole.read_bytes()) == 1800


def sizes_of_files(files: list[str], number: int) -> tuple[int, list[int]]:
    return number, [Path(file).stat().st_size for file in files]


@pytest.mark.parametrize("with_processes", [False, True])
def test_every_file_is_done_once_under_its_own_index(
    with_processes: bool, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "CHUNK", 3)
    monkeypatch.setattr(decoding, "PROCESSES_FROM", 5 if with_processes else 100)
    many = (files * 3)[:10]
    got: dict[int, list[int]] = {}

    def take(start: int, result: tuple[int, list[int]]) -> None:
        assert result[0] == start
        got.update(enumerate(result[1], start))

    done: list[int] = []
    in_parallel(sizes_of_files, many, lambda start, part: (part, start), take, done.append)
    assert [got[i] for i in range(10)] == [Path(file).stat().st_size for file in many]
    assert done[-1] == 10
    assert sorted(done) == done
    assert len(done) == 4


def test_few_files_start_no_process() -> None:
    with decoding._executor(decoding.PROCESSES_FROM - 1) as executor:
        assert isinstance(executor, ThreadPoolExecutor)


def test_what_has_not_begun_when_one_task_fails_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "CHUNK", 1)
    monkeypatch.setattr(decoding, "_executor", lambda _: ThreadPoolExecutor(1))
    begun: list[str] = []
    failed = threading.Event()

    def work(files: list[str]) -> None:
        begun.append(files[0])
        if files[0] == "2":
            raise MemoryError
        if files[0] == "3":
            failed.wait(10)

    executor_shutdown = ThreadPoolExecutor.shutdown

    def shutdown(self: ThreadPoolExecutor, **options: bool) -> None:
        if options.get("cancel_futures"):
            executor_shutdown(self, wait=False, cancel_futures=True)
            failed.set()
        executor_shutdown(self, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    names = [str(i) for i in range(100)]
    with pytest.raises(MemoryError):
        in_parallel(work, names, lambda start, part: (part,), lambda *_: None, lambda _: None)
    assert len(begun) < 10


STOP_IN_THE_MIDDLE = """
import sys, time
from tuneapp.data import decoding

def stop(done):
    print("in the middle", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    decoding.PROCESSES_FROM, decoding.CHUNK = 2, 1
    arguments = lambda start, part: (part, 10)
    decoding.in_parallel(decoding.measure_chunk, sys.argv[1:], arguments, print, stop)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_asked_however_it_ends(
    sent: signal.Signals, files: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "stop.py"
    script.write_text(STOP_IN_THE_MIDDLE)
    process = subprocess.Popen(
        [sys.executable, str(script), *files * 3],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "in the middle\n":
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(sent)
    process.wait(30)
    process.stdout.close()
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_a_worker_leaves_ctrl_c_to_the_process_that_asked(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PROCESSES_FROM", 1)
    with decoding._executor(1) as executor:
        assert executor.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
