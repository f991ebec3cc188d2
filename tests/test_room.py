import csv
import errno
import json
import os
import random
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tuneapp import room
from tuneapp.room import free_bytes, is_full, say_bytes, write_patiently
from tuneapp.rundir import write_atomically, write_json

MB, GB = 10**6, 10**9
Usage = namedtuple("Usage", "total used free")


def error_of(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def caught(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


class Disk:
    """A disk that exists in the tests only, and a clock by which room comes and goes on it."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.said: list[str] = []
        self.sleeps: list[float] = []
        self.attempts: list[int] = []
        self.after: dict[int, int] = {}

    def usage(self, path: object) -> Usage:
        return Usage(100 * GB, 100 * GB - self.free, self.free)

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        assert len(self.sleeps) < 1000, "waits for ever"
        self.free = self.after.get(len(self.sleeps), self.free)

    def write(self, size: int) -> None:
        """Write a file; a failure leaves nothing behind, as of one that is written aside."""
        self.attempts.append(self.free)
        if size > self.free:
            raise error_of(errno.ENOSPC)
        self.free -= size

    def write_patiently(self, floor: int, size: int, **values: float) -> None:
        write_patiently(
            Path("/there"),
            floor,
            lambda: self.write(size),
            self.said.append,
            sleep=self.sleep,
            **values,
        )


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(free=10 * GB)
    monkeypatch.setattr(shutil, "disk_usage", made.usage)
    return made


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(words).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    status = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - leave))
    return folder / "filler"


# --- How much there is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (99, "99 B"),
        (100, "0.1 KB"),
        (12_000, "12 KB"),
        (460_000_000, "0.46 GB"),
        (1_500_000_000, "1.5 GB"),
        (99_960_000, "100 MB"),
        (123_456_000_000, "0.123 TB"),
        (12_345_000_000_000, "12.3 TB"),
        (5_000_000_000_000_000, "5000 TB"),
    ],
)
def test_bytes_are_said_in_powers_of_ten(count: int, words: str) -> None:
    assert say_bytes(count) == words


def test_the_room_of_a_folder_is_that_of_its_file_system(tiny: Path) -> None:
    df = subprocess.run(
        ["df", "--output=avail", "-B1", str(tiny)], capture_output=True, text=True, check=True
    )
    assert free_bytes(tiny) == int(df.stdout.split()[1]) == 4 * 2**20


def test_the_room_of_a_folder_to_come_is_that_of_its_nearest_parent(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny / "file").write_bytes(b"")
    assert free_bytes(tiny / "a" / "b") == 4 * 2**20
    assert free_bytes(tiny / "file" / "b") == 4 * 2**20
    with monkeypatch.context() as patch:
        patch.chdir(tiny)
        assert free_bytes(Path("a/b")) == 4 * 2**20


# --- Whether an error came of it ------------------------------------------------------------------

OBJECT = {f"a{i}": torch.zeros(100_000) for i in range(20)}  # 8 MB


def save_to_file(file: Path) -> None:
    with file.open("wb") as out:
        torch.save(OBJECT, out)


def write_csv(file: Path) -> None:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([i] for i in range(1_000_000))


@pytest.mark.parametrize("leave", [0, 8192, 2 * MB])
@pytest.mark.parametrize(
    "write",
    [
        lambda file: torch.save(OBJECT, file),
        lambda file: torch.save(OBJECT, file, _use_new_zipfile_serialization=False),
        lambda file: write_atomically(file, lambda aside: torch.save(OBJECT, aside)),
        save_to_file,
        lambda file: write_json(file, list(range(1_000_000))),
        lambda file: file.write_bytes(bytes(5 * MB)),
        write_csv,
    ],
    ids=["torch", "torch, old format", "torch, aside", "torch, open file", "json", "bytes", "csv"],
)
def test_what_really_is_raised_on_a_full_disk_is_recognised(
    write: Callable[[Path], object], leave: int, tiny: Path
) -> None:
    fill(tiny, leave)
    assert is_full(caught(lambda: write(tiny / "new")), tiny)


@pytest.mark.parametrize("leave", [0, 8192])
def test_an_object_of_any_size_that_torch_cannot_write_is_recognised(
    leave: int, tiny: Path
) -> None:
    """The last bytes are written when the file is closed, and another error comes of that."""
    fill(tiny, leave)
    for count in (10, 1000, 2000, 3000, 100_000):
        try:
            torch.save(torch.zeros(count), tiny / "new")
        except RuntimeError as error:
            assert is_full(error, tiny), (count, error)
        (tiny / "new").unlink()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_used_up_quota_count_however_much_is_free(
    number: int, disk: Disk
) -> None:
    disk.free = 90 * GB
    assert is_full(error_of(number), Path("/there"))


@pytest.mark.parametrize(
    "error",
    [
        error_of(errno.EFBIG),
        error_of(errno.EIO),
        error_of(errno.EROFS),
        OSError("no number"),
        ValueError("[Errno 28] No space left on device"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        KeyError("unexpected pos"),
    ],
    ids=repr,
)
def test_other_errors_do_not_count_even_where_nothing_is_free(error: Exception, disk: Disk) -> None:
    disk.free = 0
    assert not is_full(error, Path("/there"))


def test_a_missing_folder_is_no_full_disk(tiny: Path) -> None:
    fill(tiny, 0)
    error = caught(lambda: torch.save(OBJECT, tiny / "no" / "file"))
    assert isinstance(error, RuntimeError)
    assert not is_full(error, tiny)


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0",
        "basic_ios::clear: iostream error",
        "[enforce fail at inline_container.cc:595] . PytorchStreamWriter failed writing file data/0"
        ": file write failed",
    ],
)
def test_an_error_of_torch_without_its_cause_counts_where_little_is_free(
    words: str, disk: Disk
) -> None:
    disk.free = 11 * GB
    assert is_full(RuntimeError(words), Path("/there"))
    disk.free = 13 * GB
    assert not is_full(RuntimeError(words), Path("/there"))


def test_an_error_of_torch_that_names_the_cause_counts_however_much_is_free(disk: Disk) -> None:
    disk.free = 90 * GB
    words = "write(): fd 3 failed with No space left on device"
    assert is_full(RuntimeError(words), Path("/there"))


def test_what_an_error_came_of_counts(disk: Disk) -> None:
    def in_turn(*, cause: bool) -> None:
        try:
            raise error_of(errno.ENOSPC)
        except OSError as full:
            try:
                raise KeyError("closing") from (full if cause else None)
            except KeyError:
                raise RuntimeError("saving") from None

    for cause in (False, True):
        assert is_full(caught(lambda cause=cause: in_turn(cause=cause)), Path("/there"))
    named = RuntimeError("saving")
    named.__cause__ = error_of(errno.ENOSPC)
    assert is_full(named, Path("/there"))


def test_errors_that_came_of_each_other_in_a_circle_are_looked_at_once(disk: Disk) -> None:
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one
    assert not is_full(one, Path("/there"))


# --- Waiting --------------------------------------------------------------------------------------


def test_where_there_is_room_nothing_is_said(disk: Disk) -> None:
    disk.write_patiently(floor=10 * GB, size=1 * GB)
    assert (disk.attempts, disk.said, disk.sleeps) == ([10 * GB], [], [])


def test_below_the_floor_nothing_is_written_until_there_is_that_much(disk: Disk) -> None:
    disk.free = 200 * MB
    disk.after = {3: 499 * MB, 5: 500 * MB}
    disk.write_patiently(floor=500 * MB, size=1 * MB)
    assert disk.attempts == [500 * MB]
    assert len(disk.sleeps) == 5
    assert disk.said == [
        "disk      0.2 GB free on /there: waiting for 0.5 GB",
        "disk      0.499 GB free on /there: continuing",
    ]


def test_attempts_are_far_apart_and_not_in_step(disk: Disk) -> None:
    disk.free = 0
    disk.after = {400: 1 * GB}
    random.seed(1)
    before = random.getstate()
    disk.write_patiently(floor=1 * GB, size=0, pause_s=2.0)
    assert all(2 <= seconds <= 3 for seconds in disk.sleeps)
    assert len(set(disk.sleeps)) > 100
    assert random.getstate() == before
    disk.sleeps.clear()
    disk.free, disk.after = 0, {1: 1 * GB}
    disk.write_patiently(floor=1 * GB, size=0)
    assert disk.sleeps[0] >= 5


@pytest.mark.parametrize("floor", [0, 1 * GB])
def test_after_a_failure_it_waits_for_more_than_was_free(floor: int, disk: Disk) -> None:
    disk.free = 2 * GB
    disk.after = {2: 2 * GB + 1000, 4: 4 * GB}
    disk.write_patiently(floor=floor, size=3 * GB)
    assert disk.attempts == [2 * GB, 4 * GB]
    assert len(disk.sleeps) == 4
    first, last = disk.said
    assert first.startswith("disk      2 GB free on /there: too little")
    assert last == "disk      1 GB free on /there: continuing"


def test_room_that_was_free_again_when_it_was_measured_is_not_waited_for_in_vain(
    disk: Disk,
) -> None:
    """Two trials fail together, and what each left is gone when the other one looks."""
    calls = []

    def write() -> None:
        calls.append(len(disk.sleeps))
        if len(calls) < 4:
            raise error_of(errno.EDQUOT)

    write_patiently(Path("/there"), 0, write, disk.said.append, sleep=disk.sleep)
    assert calls == [0, 12, 24, 36]
    assert len(disk.said) == 2


def test_an_attempt_without_more_room_still_has_the_floor(disk: Disk) -> None:
    disk.free = 2 * GB
    disk.after = {1: 1 * GB, 50: 3 * GB}
    disk.write_patiently(floor=2 * GB, size=2 * GB + 1)
    assert disk.attempts == [2 * GB, 3 * GB]
    assert len(disk.sleeps) == 50


@pytest.mark.parametrize("error", [error_of(errno.EIO), ValueError("x"), KeyboardInterrupt()])
def test_any_other_error_passes_at_once(error: BaseException, disk: Disk) -> None:
    def write() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        write_patiently(Path("/there"), 0, write, disk.said.append, sleep=disk.sleep)
    assert raised.value is error
    assert (disk.said, disk.sleeps) == ([], [])


def test_an_interruption_while_the_disk_is_full_is_one(disk: Disk) -> None:
    def write() -> None:
        try:
            raise error_of(errno.ENOSPC)
        finally:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_patiently(Path("/there"), 0, write, disk.said.append, sleep=disk.sleep)


def test_on_a_really_full_disk_a_file_is_whole_once_there_is_room(tiny: Path) -> None:
    filler = fill(tiny, 4096)
    said: list[str] = []
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            filler.unlink()

    content = {"a": torch.arange(300_000)}
    write_patiently(
        tiny,
        0,
        lambda: write_atomically(tiny / "new.pt", lambda aside: torch.save(content, aside)),
        said.append,
        sleep=sleep,
    )
    assert torch.equal(torch.load(tiny / "new.pt", weights_only=True)["a"], content["a"])
    assert [file.name for file in tiny.iterdir()] == ["new.pt"]
    assert len(slept) == 3
    assert len(said) == 2
    assert said[0].startswith(f"disk      4.1 KB free on {tiny}: too little")


def test_a_real_floor_is_waited_for(tiny: Path) -> None:
    filler = fill(tiny, 100 * 1024)
    said: list[str] = []
    write_patiently(
        tiny,
        1 * MB,
        lambda: write_json(tiny / "new.json", [1]),
        said.append,
        sleep=lambda seconds: filler.unlink(),
    )
    assert json.loads((tiny / "new.json").read_text()) == [1]
    assert said[0] == f"disk      0.102 MB free on {tiny}: waiting for 1 MB"


def test_no_classifier_of_torchvision_has_a_larger_checkpoint() -> None:
    # With Adam's two moments and an average; the numbers are those of torchvision's weights.
    from torchvision.models import get_model_weights, list_models

    most = max(
        weights.meta["num_params"] for name in list_models() for weights in get_model_weights(name)
    )
    assert most * 4 * 4 < room.LARGEST_CHECKPOINT_BYTES < most * 4 * 5
