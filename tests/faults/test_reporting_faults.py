"""Faults 66 to 72: tables, TensorBoard and the terminal when something is late, dead or odd."""

import csv
import errno
import io
import json
import logging
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tensorboardX.record_writer
from rich.console import Console

import tuneapp.terminal as terminal
from tests.conftest import SMALL_SPACE, read_ledger
from tests.test_tracking import HISTORY, scalars, track
from tests.test_trial import CLOCKED, SMALL, ignore, interrupt_after, table, timeless
from tuneapp import summary
from tuneapp.checkpoint import Row
from tuneapp.cli import main
from tuneapp.config import RunSettings, TrialConfig
from tuneapp.ledger import Ledger, read_events
from tuneapp.records import flat
from tuneapp.rundir import cell
from tuneapp.tracking import TensorBoardTracker
from tuneapp.trial import TrialRun, run_trial

pytestmark = pytest.mark.timeout(120)

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def small(config: TrialConfig) -> TrialConfig:
    """The head of a small network, which trains in no time."""
    return replace(config, model=SMALL)


@pytest.fixture
def words(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`train` of two epochs, in the folder of the test, also for another process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.py").write_text(SMALL_SPACE.replace("epochs=4", "epochs=2"))
    return ["train", "space.py", "--data", str(photos), "--name", "x"]


def epochs_in_ledger(run: Path) -> list[int]:
    return [e["row"]["epoch"] for e in read_ledger(run) if e["event"] == "epoch"]


def ends_in_ledger(run: Path) -> list[str]:
    return [e["state"] for e in read_ledger(run) if e["event"] == "ended"]


# --- 66, 67: what is there late, or not yet -------------------------------------------------------


def test_fault_66_a_metric_that_first_appears_in_epoch_3_has_its_column(
    small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    # A stage that is unfrozen in the third epoch has a learning rate from then on.
    config = replace(small, epochs=4, unfreeze_at={3: 4})
    run_trial(config, replace(run, folder=tmp_path), ignore)
    rows = table(tmp_path / "epochs.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["lr/layer4"]) for row in rows] == [False, False, True, True]
    assert [bool(row["lr/head"]) for row in rows] == [True] * 4
    frame = pd.read_csv(tmp_path / "epochs.csv")
    assert list(frame["lr/layer4"].isna()) == [True, True, False, False]
    in_events = scalars(tmp_path)
    assert [step for step, _ in in_events["lr/layer4"]] == [3, 4]
    assert [step for step, _ in in_events["lr/head"]] == [1, 2, 3, 4]


KILLED_IN_ITS_FIRST_STEP = """
import os, signal, sys
from tuneapp.loop import CountingScaler
def scale(scaler, loss):
    os.kill(os.getpid(), signal.SIGKILL)
CountingScaler.scale = scale
from tuneapp.cli import main
main(sys.argv[1:])
"""


def test_fault_67_a_kill_before_any_report_leaves_an_unfinished_trial_and_whole_tables(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", KILLED_IN_ITS_FIRST_STEP, *words]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "runs/x"
    assert epochs_in_ledger(run) == []
    assert not (run / "trials/t0001/epochs.csv").exists()  # rather none than one without a header
    assert main(["summary", "runs/x"]) == 0
    assert "unfinished" in capsys.readouterr().out
    (row,) = table(run / "trials.csv")
    assert (row["trial"], row["state"], row["epochs"]) == ("t0001", "unfinished", "0")
    assert list(summary.epochs_frame(run).columns)[:2] == ["trial", "epoch"]
    assert summary.epochs_frame(run).empty
    # And it goes on, to the numbers of one that was left alone.
    assert main(["resume", "runs/x"]) == 0
    assert main([*words[:-1], "straight"]) == 0
    both = [
        [e["row"] for e in read_ledger(tmp_path / "runs" / name) if e["event"] == "epoch"]
        for name in ("x", "straight")
    ]
    assert timeless(both[0]) == timeless(both[1])
    assert len(both[0]) == 2


# --- 68, 69: TensorBoard --------------------------------------------------------------------------


class FullDisk(io.FileIO):
    """An event file on a disk that has room for so many bytes."""

    def __init__(self, path: str, room: int) -> None:
        super().__init__(path, "wb")
        self.room = room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("room", [0, 10, 300, 1500])
def test_fault_68_a_full_disk_under_tensorboard_warns_once_and_the_training_goes_on(
    room: int,
    small: TrialConfig,
    run: TrialRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = replace(small, epochs=6)
    straight: list[Row] = []
    run_trial(config, replace(run, folder=tmp_path / "straight"), straight.append)
    caplog.clear()
    rows: list[Row] = []
    with monkeypatch.context() as patch:
        opened = tensorboardX.record_writer
        patch.setattr(opened, "open_file", lambda path: FullDisk(path, room))
        run_trial(config, replace(run, folder=tmp_path / "full"), rows.append)
    assert timeless(rows) == timeless(straight)
    (said,) = warnings_in(caplog)
    assert "TensorBoard" in said
    assert "No space left" in said
    assert len(table(tmp_path / "full/epochs.csv")) == 6
    # Once there is room, the next look at the trial makes the file again, from its history.
    run_trial(config, replace(run, folder=tmp_path / "full"), ignore, tmp_path / "full/checkpoints")
    made, wanted = scalars(tmp_path / "full"), scalars(tmp_path / "straight")
    for tag in CLOCKED:
        del made[tag], wanted[tag]
    assert made == wanted


def test_fault_68_a_folder_that_takes_no_event_file_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The tests may run as root, whom no mode keeps out: a file in the place of the folder does.
    (tmp_path / "t0001").write_text("not a folder")
    tracker = TensorBoardTracker(tmp_path / "t0001", {"lr": 0.1}, RunSettings(), HISTORY[:2])
    for row in HISTORY[2:]:
        tracker.epoch(row)
    tracker.close()
    assert len(warnings_in(caplog)) == 1
    assert (tmp_path / "t0001").read_text() == "not a folder"


def test_fault_68_what_an_epoch_told_tensorboard_survives_a_kill(tmp_path: Path) -> None:
    # Nothing waits in a queue: when `epoch` returns, another process can read it.
    code = """
import os, signal, sys
from pathlib import Path
from tests.test_tracking import HISTORY, PARAMS
from tuneapp.config import RunSettings
from tuneapp.tracking import TensorBoardTracker
tracker = TensorBoardTracker(Path(sys.argv[1]), PARAMS, RunSettings(), [])
for row in HISTORY:
    tracker.epoch(row)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "killed"], cwd=root)
    assert killed.returncode == -signal.SIGKILL
    track(tmp_path / "straight", history=[], more=HISTORY)
    assert scalars(tmp_path / "killed") == scalars(tmp_path / "straight")


def test_fault_69_after_five_resumes_no_step_is_there_twice_with_different_values(
    small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(small, epochs=6)
    place = replace(run, folder=tmp_path / "resumed")
    run_trial(config, replace(run, folder=tmp_path / "straight"), ignore)
    interrupt_after(config, place, 1)
    for last in (2, 2, 4, 5):  # one of them was killed again before it came to a new epoch

        def report(row: Row, last: int = last) -> None:
            if row["epoch"] == last:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            run_trial(config, place, report, tmp_path / "resumed/checkpoints")
        # A reader between two attempts sees no step twice, either.
        for values in scalars(tmp_path / "resumed").values():
            assert len({step for step, _ in values}) == len(values)
    run_trial(config, place, ignore, tmp_path / "resumed/checkpoints")
    made, wanted = scalars(tmp_path / "resumed"), scalars(tmp_path / "straight")
    assert made.keys() == wanted.keys()
    for tag, values in made.items():
        assert [step for step, _ in values] == [1, 2, 3, 4, 5, 6], tag
        assert tag in CLOCKED or values == wanted[tag], tag
    told = [float(row["val/loss"]) for row in table(tmp_path / "resumed/epochs.csv")]
    assert [value for _, value in made["val/loss"]] == pytest.approx(told, rel=1e-6)


def test_fault_69_metrics_whose_names_tensorboard_makes_equal_stay_apart(tmp_path: Path) -> None:
    # It knows few characters: `a,b`, `a b` and `a_b` are one class to it.
    names = ["val/recall/a,b", "val/recall/a b", "val/recall/a_b"]
    rows = [{**row, **{name: (i + 1) / 8 for i, name in enumerate(names)}} for row in HISTORY]
    track(tmp_path, history=rows[:3], more=rows[3:])
    series = [values for tag, values in scalars(tmp_path).items() if "recall" in tag]
    assert sorted(value for values in series for _, value in values) == [
        (i + 1) / 8 for i in range(3) for _ in HISTORY
    ]
    assert all([step for step, _ in values] == [1, 2, 3, 4, 5] for values in series)


# --- 70, 71: tables -------------------------------------------------------------------------------

PIECES = [
    "=cmd()", "+1", "-1", "@x", "\t=1", "'=1", "''", "a,b", 'a"b', "a\nb", "a\r\nb", "\r", ";", " ",
    "Größe", "\u2028", "\x1b[31m", "\x00"[:0], "NaN", "inf", "1e-320", "None", "[red]", "\\n",
]  # fmt: skip
RUN = ("=", "+", "-", "@", "\t", "\r")
NUMBERS = [1e-320, 5e-324, -0.0, 1.7976931348623157e308, 0.1, 1 / 3, 0, -1, 10**18]


def drawn_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 3)))


def drawn_number(rng: random.Random) -> float:
    number: float = struct.unpack("<d", rng.randbytes(8))[0]
    return rng.choice([*NUMBERS, number if math.isfinite(number) else 0.5])


def as_written(text: str) -> str:
    """Undo what keeps a spreadsheet from running a cell."""
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(RUN) else text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run of one trial of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    space = folder / "space.py"
    space.write_text(SMALL_SPACE)
    words = ["train", str(space), "--data", str(photos), "--epochs", "1", "--name", "x"]
    assert main([*words, "--runs-dir", str(folder)]) == 0
    return folder / "x"


def copied(run: Path, to: Path) -> Path:
    subprocess.run(["cp", "-a", run, to], check=True)
    return to


def test_fault_70_whatever_values_hold_the_tables_are_valid_and_read_back_the_same(
    trained: Path, tmp_path: Path
) -> None:
    run = copied(trained, tmp_path / "x")
    rng = random.Random(70)  # hypothesis is no dependency: two hundred seeded draws
    wanted: dict[str, dict[str, Any]] = {}
    with Ledger(run / "ledger.jsonl") as ledger:
        for number in range(2, 202):
            trial = f"t{number:04d}"
            params = {f"p{i}": rng.choice([drawn_text, drawn_number])(rng) for i in range(3)}
            applied = {"lr": {"head": drawn_number(rng)}, "note": drawn_text(rng)}
            row = {"epoch": 1, "train/loss": drawn_number(rng), "val/loss": drawn_number(rng)}
            row |= {"val/accuracy": rng.random(), f"val/recall/{drawn_text(rng)}": rng.random()}
            cause = drawn_text(rng)
            ledger.append("proposed", trial=trial, origin="search", params=params, epochs=1)
            ledger.append("applied", trial=trial, applied=applied)
            ledger.append("epoch", trial=trial, row=row)
            ledger.append("ended", trial=trial, state="finished", cause=cause, told=0.5)
            metrics = {k: v for k, v in row.items() if k != "epoch"}
            named = {f"params/{k}": v for k, v in params.items()}
            named |= {f"applied/{k}": v for k, v in flat(applied).items()}
            wanted[trial] = {**metrics, **named, "cause": cause}
    text = summary.write_trials_table(run).read_bytes().decode("utf-8")
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows) == 1 + 201
    cells = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    for trial, values in wanted.items():
        for name, value in values.items():
            shown = cells[trial][name]
            if isinstance(value, str):
                assert as_written(shown) == value, (trial, name)
                assert shown[:1] not in RUN
            else:
                assert float(shown) == value, (trial, name)
    # The ledger is plain JSON, without the NaN that other readers refuse.
    for line in (run / "ledger.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert [e for e in read_events(run / "ledger.jsonl") if e["event"] == "epoch"]
    with Ledger(run / "ledger.jsonl") as ledger, pytest.raises(ValueError, match="not JSON"):
        ledger.append("epoch", trial="t0001", row={"epoch": 2, "val/loss": math.nan})


def test_fault_70_a_cell_tells_its_text_again() -> None:
    rng = random.Random(7)
    for _ in range(5_000):
        text = drawn_text(rng)
        assert as_written(cell(text)) == text
        assert cell(text)[:1] not in RUN
    for number in (*NUMBERS, None, True):
        assert cell(number) is number


def test_fault_71_a_summary_at_any_time_of_a_training_and_after_its_crash_is_whole(
    words: list[str], tuneapp: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.py").write_text(SMALL_SPACE.replace("epochs=4", "epochs=300"))
    process = tuneapp(*words, cwd=tmp_path)
    run, deadline = tmp_path / "runs/x", time.monotonic() + 60
    seen: list[int] = []
    try:
        while len(set(seen)) < 4 and time.monotonic() < deadline:
            if process.poll() is not None:
                pytest.fail(process.communicate()[1])
            if not (run / "ledger.jsonl").exists():
                time.sleep(0.01)
                continue
            before = (run / "ledger.jsonl").read_bytes()
            assert main(["summary", "runs/x"]) == 0
            assert (run / "ledger.jsonl").read_bytes().startswith(before)  # it only reads
            rows = table(run / "trials.csv")
            assert all(None not in row and None not in row.values() for row in rows)
            seen += [int(row["epochs"]) for row in rows]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(set(seen)) >= 4, "the training was over too soon to prove anything"
    assert seen == sorted(seen)
    capsys.readouterr()
    assert main(["summary", "runs/x"]) == 0
    assert "unfinished" in capsys.readouterr().out
    (row,) = table(run / "trials.csv")
    assert (row["state"], int(row["epochs"])) == ("unfinished", len(epochs_in_ledger(run)))
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".trials")) == []


# --- 72: the terminal -----------------------------------------------------------------------------


def broken_pipe() -> Any:
    """A pipe that nobody reads any more."""
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w")


def full_disk() -> Any:
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


def closed_file() -> Any:
    with Path(os.devnull).open("w") as file:
        return file


TERMINALS: dict[str, Callable[[], Any]] = {
    "broken pipe": broken_pipe,
    "full disk": full_disk,
    "closed before": lambda: None,
    "closed since": closed_file,
}


def test_fault_72_a_pipe_that_ends_early_does_not_end_the_training(
    words: list[str], tmp_path: Path
) -> None:
    line = " ".join([sys.executable, "-m", "tuneapp", *words])
    done = subprocess.run(
        ["bash", "-c", f"setsid -w {line} 2> /dev/full | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LANG": "C", "LC_ALL": "C", "COLUMNS": "20"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("space ")
    assert done.stdout.count("\n") == 1
    run = tmp_path / "runs/x"
    assert epochs_in_ledger(run) == [1, 2]
    assert ends_in_ledger(run) == ["finished"]
    assert len(table(run / "trials.csv")) == 1


@pytest.mark.parametrize("opened", TERMINALS.values(), ids=TERMINALS.keys())
def test_fault_72_a_training_goes_on_when_its_terminal_is_gone(
    opened: Callable[[], Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", opened())
    monkeypatch.setattr(sys, "stderr", opened())
    assert main(words) == 0
    assert main(["summary", "runs/x"]) == 0
    assert main(["summary", "no/run"]) == 2
    for file in (sys.stdout, sys.stderr):
        if file is not None and not file.closed:
            file.close()  # as at the end of the process: what is still buffered does not matter
    assert epochs_in_ledger(Path("runs/x")) == [1, 2]
    assert ends_in_ledger(Path("runs/x")) == ["finished"]


def test_fault_72_twenty_columns_and_an_ascii_terminal_are_enough(
    words: list[str],
    make_photos: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos = make_photos(tmp_path / "größen")
    (photos / "blue").rename(photos / "blåu")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setenv("COLUMNS", "20")
    metric = ["--metric", "val/recall/blåu"]
    assert main([*words[:3], "größen", *words[4:], *metric]) == 0
    shown.flush()
    said = shown.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"bl\\xe5u" in said
    assert b"val/recall/bl" in said
    assert ends_in_ledger(Path("runs/x")) == ["finished"]
    # The files are UTF-8, whatever the terminal is.
    assert {row["class"] for row in table(Path("runs/x/split.csv"))} == {"blåu", "green", "red"}


def test_fault_72_a_live_table_goes_on_when_its_terminal_is_gone(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        tried = 0

        def write(self, text: str) -> int:
            self.tried += 1
            if self.tried > 3:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

        def isatty(self) -> bool:
            return True

    gone = Gone()
    monkeypatch.setattr(sys, "stdout", gone)
    shown = Console(file=terminal.out._file, force_terminal=True, width=20)
    monkeypatch.setattr(terminal, "out", shown)
    assert main(words) == 0
    assert gone.tried > 3
    assert ends_in_ledger(Path("runs/x")) == ["finished"]
