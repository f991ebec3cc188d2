"""Faults 47 to 55: files that are damaged, a disk that is full or refuses, folders that move.

Each of them is brought about in a real file; what must be there afterwards is known from a training
that was left alone.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.storages.journal import JournalFileSymlinkLock

import tuneapp.trial as trial
from tests import test_room
from tests.conftest import read_ledger
from tests.faults.refusal import (
    after_epochs,
    files_below,
    interrupt_after,
    numbers,
    write_space,
)
from tests.killing import end_of, forked
from tests.test_checkpoint import (
    entries,
    epoch_file,
    everything,
    fresh,
    parts_in,
    sha256,
    train,
    trained,
)
from tests.test_mirror import SPACE as MIRRORED
from tests.test_mirror import A, known, read_back, row
from tests.test_room import fill
from tests.test_trial import SMALL, timeless
from tuneapp import ledger as ledger_module
from tuneapp import room, summary
from tuneapp.checkpoint import MANIFEST, Row, frozen_parts, read_best, read_last
from tuneapp.cli import main
from tuneapp.config import RunSettings, TrialConfig
from tuneapp.errors import CheckpointError
from tuneapp.ledger import Events, Ledger, read_events
from tuneapp.mirror import StudyMirror
from tuneapp.rundir import log_to
from tuneapp.space import SearchSpace
from tuneapp.study import Study
from tuneapp.trial import TrialRun, run_trial

pytestmark = pytest.mark.timeout(120)

tiny = test_room.tiny


@pytest.fixture
def words(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`train` of two epochs of a network of a few kilobytes, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    return ["train", write_space(), "--data", str(photos), "--name"]


@pytest.fixture
def interrupted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training that was interrupted after its first epoch; `runs/straight` was left alone."""
    assert main([*words, "straight"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert main([*words, "x"]) == 130
    return Path("runs/x")


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [e["row"] for e in read_ledger(run) if e["event"] == "epoch"]


def ends_of(run: Path) -> list[str]:
    return [e["state"] for e in read_ledger(run) if e["event"] == "ended"]


def require_goes_on(run: Path) -> None:
    """Check that `resume` comes to what the training that was left alone has come to."""
    assert main(["resume", str(run)]) == 0
    assert numbers(rows_of(run)) == numbers(rows_of(Path("runs/straight")))
    assert ends_of(run) == ["finished"]


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must end with exit code 5 and one line; return that line."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 5
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert line.startswith("tuneapp: error: ")
    return line


# --- 47: checkpoints ------------------------------------------------------------------------------


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """64 truncations, to nothing too, and 256 flips of one bit; the same at every call."""
    draws = random.Random(47)
    for cut in [0, len(content) - 1, *(draws.randrange(1, len(content)) for _ in range(62))]:
        yield f"cut at {cut}", content[:cut]
    for _ in range(256):
        place, bit = draws.randrange(len(content)), draws.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(flipped)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, bytes]]:
    """Checkpoints of three epochs, of which the second was the best, and all of each state."""
    torch.set_num_threads(1)  # as in each test
    root = tmp_path_factory.mktemp("saved")
    wanted = {}
    for epochs in (2, 3, 4):
        wanted[epochs] = everything(trained(root / str(epochs), epochs=epochs, best=2))
    return root / "3", wanted


@pytest.fixture
def copied(saved: tuple[Path, dict[int, bytes]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copied"))


def test_fault_47_a_damaged_epoch_is_never_loaded_and_the_one_before_is_used(
    copied: Path, saved: tuple[Path, dict[int, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    file, wanted = epoch_file(copied, "last"), saved[1]
    for name, content in damages(file.read_bytes()):
        file.write_bytes(content)
        caplog.clear()
        read = fresh(seed=99)
        assert read.load(copied), name
        assert (read.epoch, everything(read) == wanted[2]) == (2, True), name
        assert [str(file) in text for text in caplog.messages] == [True], name
    train(read, is_best=False)  # and it goes on to the same bytes
    assert everything(read) == wanted[3]


def test_fault_47_a_damaged_frozen_part_is_never_loaded_and_the_training_begins_anew(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = parts_in(copied)[0]  # of all epochs
    untouched = everything(fresh(seed=99))
    for name, content in damages(file.read_bytes()):
        file.write_bytes(content)
        caplog.clear()
        read = fresh(seed=99)
        assert not read.load(copied), name
        assert everything(read) == untouched, name
        *causes, last = caplog.messages
        assert len(causes) == 2, name
        assert all(file.name in text for text in causes), name
        assert "starts from its beginning" in last, name


def test_fault_47_a_damaged_manifest_loses_nothing_in_silence(
    copied: Path, saved: tuple[Path, dict[int, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    file, wanted = copied / MANIFEST, saved[1]
    intact, parts, silent = file.read_bytes(), frozen_parts(copied), 0
    for name, content in damages(intact):
        file.write_bytes(content)
        caplog.clear()
        read = fresh(seed=99)
        if read.load(copied):
            assert everything(read) == wanted[read.epoch], name
        if caplog.messages:  # it names what is not used
            assert any(str(copied) in text for text in caplog.messages), name
            continue
        silent += 1  # what was changed means nothing: all that was there is there
        assert read.epoch == 3, name
        assert frozen_parts(copied) == parts, name  # which the keeper of a sweep goes by
        assert len(read_last(copied)["history"]) == 3, name
        before = files_below(copied)
        train(read, is_best=False)
        read.save(copied)
        assert everything(read) == wanted[4], name
        caplog.clear()
        try:
            assert len(read_best(copied)["history"]) == 2, name
        except CheckpointError as error:  # nor is it lost in silence
            assert "epoch-0002.pt is damaged" in str(error), name
        shutil.rmtree(copied)
        copied.mkdir()
        for path, kept in before.items():
            Path(path).write_bytes(kept)
    assert silent < 160  # the rest of hashes that are elsewhere, too


def test_fault_47_with_every_checkpoint_damaged_a_training_comes_to_the_same_numbers(
    interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = sorted(interrupted.glob("trials/t0001/checkpoints/epoch-*.pt"))
    assert files
    for file in files:
        file.write_bytes(b"")
    require_goes_on(interrupted)
    for file in files:
        assert any(str(file.absolute()) in text for text in caplog.messages)
    assert any("starts from its beginning" in text for text in caplog.messages)


# --- 48: the ledger -------------------------------------------------------------------------------


def test_fault_48_a_ledger_cut_at_any_byte_of_its_last_record_goes_on(
    words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*words, "x"]) == 0
    file = Path("runs/x/ledger.jsonl")
    whole, events = file.read_bytes(), read_events(file)
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start, len(whole)):
        file.write_bytes(whole[:cut])
        assert read_events(file) == events[:-1]
        assert summary.read_summary(Path("runs/x")).trials[0].state == "unfinished"
    for cut in (start, start + 1, len(whole) - 1):
        file.write_bytes(whole[:cut])
        caplog.clear()
        assert main(["resume", "runs/x"]) == 0
        assert file.read_bytes() == whole
        warned = f"cut off {cut - start} bytes of a torn line" in caplog.text
        assert warned == (cut > start)


def test_fault_48_a_flipped_byte_amid_the_ledger_is_told_with_its_line_and_left_alone(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, draws = interrupted / "ledger.jsonl", random.Random(48)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    for command in (["resume"], ["summary"], ["train", "--from"], ["final-test"]):
        number = draws.randrange(len(lines) - 2)
        line = bytearray(lines[number])
        line[line.index(b'"event"') + draws.randrange(7)] ^= 1 << draws.randrange(5)
        damaged = b"".join([*lines[:number], bytes(line), *lines[number + 1 :]])
        file.write_bytes(damaged)
        error = told(capsys, *command, interrupted)
        assert f"{file}, line {number + 1}: damaged" in error.replace(f"{Path.cwd()}/", "")
        assert file.read_bytes() == damaged
    file.write_bytes(b"".join(lines))
    require_goes_on(interrupted)


def test_fault_48_line_ends_of_windows_are_read_and_gone_on_with(interrupted: Path) -> None:
    file = interrupted / "ledger.jsonl"
    events = read_events(file)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_events(file) == events
    require_goes_on(interrupted)


def test_fault_48_an_empty_ledger_begins_anew(interrupted: Path) -> None:
    (interrupted / "ledger.jsonl").write_bytes(b"")
    assert summary.read_summary(interrupted).trials == ()
    # The checkpoint is still there: its epoch is told again, and not trained again.
    require_goes_on(interrupted)


# --- 49: a full disk ------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens at a pause of whoever waits for room, in turn; the last one again and again."""
    steps: list[Callable[[], object]] = [lambda: None]

    def sleep(seconds: float) -> None:
        (steps.pop(0) if len(steps) > 1 else steps[0])()

    patient = partial(room.write_patiently, sleep=sleep)
    for module in (trial, ledger_module, summary):
        monkeypatch.setattr(module, "write_patiently", patient)
    return steps


@pytest.fixture
def small(config: TrialConfig) -> TrialConfig:
    return replace(config, model=SMALL, epochs=3, freeze_depth=2)


def reported(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "applied"} for row in timeless(rows)]


def test_fault_49_on_a_really_full_disk_a_training_waits_and_comes_to_the_same(
    small: TrialConfig,
    run: TrialRun,
    tiny: Path,
    pauses: list[Callable[[], object]],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    straight: list[Row] = []
    run_trial(small, run, straight.append)
    waits: list[str] = []

    def make_room() -> None:
        waits.append(caplog.messages[-1])
        (tiny / "filler").unlink(missing_ok=True)

    def refill(leave: int) -> None:
        (tiny / "filler").unlink(missing_ok=True)
        fill(tiny, leave)

    pauses[:] = [make_room]
    rows: list[Row] = []
    place = replace(run, folder=tiny / "t0001", frozen_folder=tiny / "frozen")
    (tiny / "t0001").mkdir()
    with Ledger(tiny / "ledger.jsonl") as ledger, log_to(tiny / "t0001/log.txt"):

        def report(row: Row) -> None:
            rows.append(row)
            refill(0)
            for _ in range(10):  # more than what is left of the file's last block
                ledger.append("epoch", trial="t0001", row=reported([row])[0])
            refill(8192)  # and again for the next checkpoint

        run_trial(small, place, report)
    assert reported(rows) == reported(straight)
    assert len(waits) >= 3 + 2
    assert all("waiting for" in text or "too little" in text for text in waits)
    events = [json.loads(line) for line in (tiny / "ledger.jsonl").read_text().splitlines()]
    assert [e["row"] for e in events] == [row for row in reported(rows) for _ in range(10)]
    # All of what is there is whole, and nothing half-written is left.
    state = run_trial(small, place, lambda row: None, tiny / "t0001/checkpoints")
    assert state.epoch == 3
    assert len((tiny / "t0001/epochs.csv").read_text().splitlines()) == 4
    assert [p for p in tiny.rglob(".*") if p.name != ".lock"] == []
    error = capsys.readouterr().err
    assert "Logging error" not in error
    assert "Traceback" not in error


def test_fault_49_a_disk_that_is_full_now_and_then_changes_nothing(
    small: TrialConfig,
    run: TrialRun,
    tmp_path: Path,
    pauses: list[Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As above without mounting: calls that write fail at random.
    straight, rows, draws, failed = [], [], random.Random(49), []
    run_trial(small, run, straight.append)
    with Ledger(tmp_path / "ledger.jsonl") as ledger, monkeypatch.context() as patch:
        for name in ("write", "fsync", "replace"):

            def call(*words: Any, really: Any = getattr(os, name), name: str = name) -> Any:
                if draws.random() < 0.15:
                    failed.append(name)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return really(*words)

            patch.setattr(os, name, call)

        def report(row: Row) -> None:
            rows.append(row)
            for _ in range(5):
                ledger.append("epoch", row=reported([row])[0])

        # What comes before the first epoch is written at once: there, a full disk is an error.
        with patch.context() as before:
            before.setattr(draws, "random", lambda: 1.0)
            opened = trial._open_folder
            patch.setattr(trial, "_open_folder", lambda *words: (opened(*words), before.undo())[0])
            run_trial(small, replace(run, folder=tmp_path / "t0001"), report)
    assert set(failed) == {"write", "fsync", "replace"}
    assert reported(rows) == reported(straight)
    wanted = [row for row in reported(rows) for _ in range(5)]
    assert [e["row"] for e in read_events(tmp_path / "ledger.jsonl")] == wanted
    assert len((tmp_path / "t0001/epochs.csv").read_text().splitlines()) == 4
    assert len(read_last(tmp_path / "t0001/checkpoints")["history"]) == 3
    assert list(tmp_path.rglob(".*")) == []


def test_fault_49_a_summary_waits_for_room_and_its_table_is_old_or_new(
    words: list[str], pauses: list[Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*words, "x"]) == 0
    file = Path("runs/x/trials.csv")
    whole = file.read_bytes()
    file.write_bytes(b"of before")
    seen: list[bytes] = []
    with monkeypatch.context() as patch:
        pauses[:] = [lambda: seen.append(file.read_bytes()) or patch.undo()]
        pauses.append(lambda: None)
        patch.setattr(os, "fsync", refuse_for_room)
        assert main(["summary", "runs/x"]) == 0
    assert seen == [b"of before"]
    assert file.read_bytes() == whole
    assert list(Path("runs/x").glob(".trials*")) == []


def refuse_for_room(*words: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- 50, 51, 52: a disk that refuses --------------------------------------------------------------


def test_fault_50_a_read_only_disk_is_told_with_the_path(
    interrupted: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(interrupted, tiny / "x"))
    plain = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**plain, "min_free": 0}))  # it has 4 MB in all
    before = files_below(run)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    for command in ("resume", "summary"):
        assert str(run) in told(capsys, command, run)
    assert files_below(run) == before
    subprocess.run(["mount", "-o", "remount,rw", str(tiny)], check=True)
    require_goes_on(run)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO])
@pytest.mark.parametrize("lasts", [False, True])
def test_fault_50_a_disk_that_fails_under_a_training_ends_it_unfinished(
    lasts: bool,
    code: int,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*words, "straight"]) == 0
    with monkeypatch.context() as patch:
        really, failed = os.fsync, []

        def fsync(handle: int) -> None:
            if lasts or not failed:
                failed.append(handle)
                raise OSError(code, os.strerror(code))
            really(handle)

        def break_it(row: Any) -> None:
            if row["epoch"] == 1:
                patch.setattr(os, "fsync", fsync)

        after_epochs(patch, break_it)
        line = told(capsys, *words, "x")
    assert str(Path("runs/x").absolute()) in line
    assert os.strerror(code) in line
    run = Path("runs/x")
    assert (len(rows_of(run)), ends_of(run)) == (1, [])  # a failed save is not reported as saved
    require_goes_on(run)


def test_fault_50_a_run_folder_that_is_removed_under_a_training_is_told(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def remove(row: Any) -> None:
        if row["epoch"] == 1:
            shutil.rmtree("runs/x")

    after_epochs(monkeypatch, remove)
    assert str(Path("runs/x").absolute()) in told(capsys, *words, "x")
    # One that was never there is a mistake of the command line, which is exit code 2.
    capsys.readouterr()
    assert main(["resume", "runs/nowhere"]) == 2
    assert "runs/nowhere is not a run directory" in capsys.readouterr().err


def test_fault_50_a_ledger_that_cannot_be_read_is_told(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = interrupted / "ledger.jsonl"
    content = file.read_bytes()
    file.unlink()
    file.mkdir()  # as good as a disk that does not answer: even root cannot read it
    for command in ("summary", "resume"):
        assert "ledger.jsonl" in told(capsys, command, interrupted)
    file.rmdir()
    file.write_bytes(content)
    require_goes_on(interrupted)


def test_fault_51_temporary_files_lie_beside_their_targets(
    words: list[str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tiny, 0)
    monkeypatch.setenv("TMPDIR", str(tiny))
    monkeypatch.setattr(tempfile, "tempdir", str(tiny))
    moved: list[tuple[Path, Path]] = []
    really = os.replace

    def spy(source: Any, target: Any) -> None:
        moved.append((Path(source).parent.absolute(), Path(target).parent.absolute()))
        really(source, target)

    monkeypatch.setattr(os, "replace", spy)
    assert main([*words, "x"]) == 0
    assert main(["summary", "runs/x"]) == 0
    assert len(moved) > 5
    assert all(source == target for source, target in moved)
    assert [file.name for file in tiny.iterdir()] == ["filler"]


def test_fault_52_a_kill_between_the_manifest_and_the_removal_leaves_both_and_loses_none(
    saved: tuple[Path, dict[int, bytes]], copied: Path, tmp_path: Path
) -> None:
    wanted, old = saved[1], epoch_file(copied, "last")
    state = fresh(seed=99)
    assert state.load(copied)
    train(state, is_best=False)

    def save() -> None:
        os.unlink = lambda path, **options: (  # type: ignore[assignment]
            os.kill(os.getpid(), signal.SIGKILL) if Path(path).name.startswith("epoch-") else None
        )
        state.save(copied)

    log = tmp_path / "error.txt"
    assert end_of(forked(save, log), log) == -signal.SIGKILL
    # What the manifest points at is there, and so is, still, what it pointed at before.
    assert epoch_file(copied, "last").name == "epoch-0004.pt"
    for entry in entries(copied).values():
        assert sha256(copied / entry["file"]) == entry["sha256"]
        assert all((copied / part).is_file() for part in entry["parts"])
    assert old.is_file()
    state = fresh(seed=98)
    assert state.load(copied)
    assert everything(state) == wanted[4]
    train(state, is_best=False)
    state.save(copied)
    assert not old.exists()
    assert len(read_best(copied)["history"]) == 2


# --- 53: Optuna's view ----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["locked by somebody else", "unwritable", "locked and removed"])
def test_fault_53_the_study_goes_on_whatever_becomes_of_its_mirror(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "study.log"
    made = JournalFileSymlinkLock.__init__

    def short(self: JournalFileSymlinkLock, path: str, grace_period: int | None = 30) -> None:
        made(self, path, grace_period)
        self.grace_period = 0.3  # type: ignore[assignment]

    monkeypatch.setattr(JournalFileSymlinkLock, "__init__", short)
    events, space = Events(), SearchSpace(MIRRORED, tmp_path / "space.py")
    study = Study(space, events, RunSettings(), [A], mirror=StudyMirror(file, "run"))
    study.want(3)
    for number in range(3):
        proposal = study.propose()
        assert proposal is not None
        if number == 1 and fault == "unwritable":
            file.unlink()
            file.mkdir()
        elif number == 1:
            file.with_name("study.log.lock").symlink_to(file)
            if fault == "locked and removed":
                file.unlink()
        for epoch in (1, 2, 3):
            study.record_epoch(proposal.trial_id, row(epoch, 0.1 * epoch + 0.01 * number))
        study.complete(proposal.trial_id)
    assert [record.state for record in study.records.values()] == ["finished"] * 3
    without = Study(space, events, RunSettings(), [A])
    assert known(without) == known(study)
    if fault == "locked by somebody else":  # who held it for so long is taken for dead
        assert read_back(file)[1] == known(study)
    elif fault == "unwritable":
        assert "the sweep continues" in caplog.text


# --- 54, 55: folders of elsewhere and of before ---------------------------------------------------


def test_fault_54_a_run_that_was_moved_goes_on(interrupted: Path, tmp_path: Path) -> None:
    moved = tmp_path / "another place" / "y"
    moved.parent.mkdir()
    shutil.copytree(interrupted, tmp_path / "copy")
    shutil.move(interrupted, moved)
    require_goes_on(moved)
    require_goes_on(tmp_path / "copy")
    assert not interrupted.exists()  # nothing was written to where it had been


def of_format_1(run: Path) -> None:
    """Make of a run what tuneapp left before there was a format 2: without its newer fields."""
    plain = json.loads((run / "run.json").read_text())
    (plain["space_path"],) = plain.pop("space_paths")
    for new in ("keep_best", "disk_budget", "min_free", "import_from", "code", "is_multilabel"):
        del plain[new]
    (run / "run.json").write_text(json.dumps({**plain, "format": 1}))
    lines = []
    for event in read_ledger(run):
        for new in ("crc", "config_hash", "twin", "space", "kind"):
            event.pop(new, None)
        text = json.dumps(event, sort_keys=True)
        lines.append(json.dumps({**event, "crc": f"{zlib.crc32(text.encode()):08x}"}) + "\n")
    (run / "ledger.jsonl").write_text("".join(lines))
    # Whole models: what is frozen lay in the file of each epoch.
    folder = run / "trials/t0001/checkpoints"
    manifest = json.loads((folder / MANIFEST).read_text())
    for file in {folder / entry["file"] for entry in manifest.values()}:
        content = torch.load(file, weights_only=True)
        for part in content.pop("frozen_parts"):
            for name, tensor in torch.load(folder / part, weights_only=True).items():
                content["model"][name] = tensor
        torch.save(content, file)
    for entry in manifest.values():
        del entry["parts"]
        entry["sha256"] = sha256(folder / entry["file"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    shutil.rmtree(run / "frozen")
    (run / "study.log").unlink(missing_ok=True)


def test_fault_55_a_run_of_format_1_opens_and_goes_on(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_format_1(interrupted)
    assert main(["summary", str(interrupted)]) == 0
    assert "unfinished" in capsys.readouterr().out
    done = len(rows_of(interrupted))
    require_goes_on(interrupted)
    assert done == 1
    assert main(["summary", str(interrupted)]) == 0
    frame = summary.trials_frame(interrupted)
    assert list(frame["state"]) == ["finished"]
    best = max(row["val/accuracy"] for row in rows_of(Path("runs/straight")))
    assert list(frame["val/accuracy"]) == [best]


def test_fault_55_a_run_of_a_newer_format_is_refused_and_left_alone(
    interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = json.loads((interrupted / "run.json").read_text())
    plain |= {"format": 3, "unheard_of": True}
    plain["versions"]["tuneapp"] = "9.8.7"
    (interrupted / "run.json").write_text(json.dumps(plain))
    before = files_below(interrupted)
    for command in ("resume", "summary"):
        capsys.readouterr()
        assert main([command, str(interrupted)]) == 2  # documented: what the user can mend
        assert "was made by a newer tuneapp (9.8.7); update this one" in capsys.readouterr().err
    assert files_below(interrupted) == before
