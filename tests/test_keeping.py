import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import tuneapp
from tests.test_checkpoint import fresh, train
from tuneapp import checkpoint
from tuneapp.config import Data, RunSettings
from tuneapp.errors import CheckpointError, ConfigError
from tuneapp.keeping import Keeper, ranked
from tuneapp.records import TrialRecord, best_record
from tuneapp.rundir import RunDir

LOSS = RunSettings(metric="val/loss")
ACCURACY = RunSettings(metric="val/accuracy")
FOLDS = RunSettings(metric="val/loss", data=Data(folds=3))


class Sweep:
    """A run directory with real checkpoints, and the trials that its ledger would tell of."""

    def __init__(self, path: Path, settings: RunSettings = LOSS) -> None:
        self.run = RunDir(path)
        self.settings = settings
        self.records: dict[str, TrialRecord] = {}
        self.said: list[str] = []

    def keeper(self, keep_best: int = 1, disk_budget: int | None = None) -> Keeper:
        return Keeper(self.run, self.settings, keep_best, disk_budget, self.said.append)

    def trial(
        self,
        *scores: float,
        state: Any = "finished",
        folders: tuple[str, ...] = ("checkpoints",),
        best: int = 2,
        shares: bool = True,
    ) -> str:
        """Add a trial with a row of each score and, in each folder, four epochs of training."""
        trial_id = f"t{len(self.records) + 1:04d}"
        metric = self.settings.metric
        rows = [{"epoch": n, metric: score} for n, score in enumerate(scores, start=1)]
        self.records[trial_id] = TrialRecord(
            trial_id, "search", {}, len(rows), rows=rows, state=state
        )
        for name in folders:
            training = fresh()
            for epoch in range(1, 5):
                train(training, is_best=epoch in (1, best))
                training.save(self.folder(trial_id, name), self.run.frozen if shares else None)
        trial = self.run.trial(trial_id)
        trial.mkdir(parents=True, exist_ok=True)
        for name in ("epochs.csv", "log.txt", "config.json", "events.out.tfevents.1"):
            (trial / name).write_text(trial_id)
        return trial_id

    def folder(self, trial_id: str, name: str = "checkpoints") -> Path:
        return self.run.trial(trial_id) / name

    def epochs(self, trial_id: str, name: str = "checkpoints") -> list[int]:
        """The epochs of which there is a file."""
        files = self.folder(trial_id, name).glob("epoch-*.pt")
        return sorted(int(file.stem.removeprefix("epoch-")) for file in files)

    def all_epochs(self) -> list[list[int]]:
        return [self.epochs(trial_id) for trial_id in self.records]

    def disk_use(self) -> int:
        """Bytes of all files of tensors, counted by the system."""
        found = subprocess.run(
            ["find", str(self.run.path), "-name", "*.pt", "-printf", "%s\n"],
            capture_output=True,
            text=True,
            check=True,
        )
        return sum(map(int, found.stdout.split()))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "run")


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(trial: Path) -> Iterator[None]:
    """Hold a trial's folder as its process does, in a process of its own."""
    words = [sys.executable, "-c", HOLD, str(trial / ".lock")]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.stdin.close()


@contextmanager
def counted(patch: pytest.MonkeyPatch, *names: str) -> Iterator[list[str]]:
    """Count the calls of functions of `checkpoint`, which do their work."""
    calls: list[str] = []
    with patch.context() as inner:
        for name in names:
            really = getattr(checkpoint, name)

            def call(folder: Path, name: str = name, really: Any = really) -> Any:
                calls.append(f"{name} {folder.parent.name}")
                return really(folder)

            inner.setattr(checkpoint, name, call)
        yield calls


# --- Which stay -----------------------------------------------------------------------------------


def test_only_the_best_ended_trials_keep_a_checkpoint_and_only_of_their_best_epoch(
    sweep: Sweep,
) -> None:
    for score in (0.3, 0.1, 0.4, 0.2):
        sweep.trial(score)
    before = sweep.all_epochs()
    assert before == [[2, 4]] * 4
    sweep.keeper(keep_best=2).tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2], [], [2]]
    for trial_id in ("t0002", "t0004"):
        content = checkpoint.read_best(sweep.folder(trial_id))
        assert len(content["history"]) == 2
        assert all(tensor is not None for tensor in content["model"].values())
    with pytest.raises(CheckpointError, match="keep-best"):
        checkpoint.read_best(sweep.folder("t0001"))
    assert sweep.said == []


def test_a_metric_that_is_to_be_large_is_ranked_so(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, ACCURACY)
    for score in (0.3, 0.1, 0.4):
        sweep.trial(score)
    sweep.keeper().tidy(sweep.records)
    assert sweep.all_epochs() == [[], [], [2]]


def test_a_trial_is_judged_by_its_best_epoch_and_of_equals_the_earlier_one_stays(
    sweep: Sweep,
) -> None:
    for scores in ((0.3, 0.9), (0.1, 0.9), (0.9, 0.1), (0.2, 0.2)):
        sweep.trial(*scores)
    sweep.keeper().tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2], [], []]


def test_an_unfinished_trial_keeps_all_and_takes_no_place_of_an_ended_one(sweep: Sweep) -> None:
    sweep.trial(0.1, state="unfinished")
    sweep.trial(0.2)
    sweep.trial(0.3)
    sweep.trial(0.9, state="unfinished")
    sweep.trial(state="unfinished")
    keeper = sweep.keeper(disk_budget=1)
    for _ in range(2):
        keeper.tidy(sweep.records)
    assert sweep.all_epochs() == [[2, 4], [2], [], [2, 4], [2, 4]]


@pytest.mark.parametrize("state", ["stopped", "diverged", "failed"])
def test_whatever_a_trial_ended_by_its_best_epoch_counts(state: str, sweep: Sweep) -> None:
    sweep.trial(0.2)
    sweep.trial(0.1, state=state)
    sweep.keeper().tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2]]


def test_a_trial_without_a_row_keeps_nothing(sweep: Sweep) -> None:
    sweep.trial(state="failed")
    sweep.trial(0.1)
    sweep.keeper(keep_best=5).tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2]]


def test_a_trial_that_never_had_a_folder_or_a_checkpoint_is_nothing_to_do(
    sweep: Sweep, caplog: pytest.LogCaptureFixture
) -> None:
    sweep.trial(0.1)
    no_folder = sweep.trial(state="duplicate", folders=())
    shutil.rmtree(sweep.run.trial(no_folder))
    no_checkpoint = sweep.trial(state="failed", folders=())
    keeper = sweep.keeper()
    keeper.tidy(sweep.records)
    keeper.tidy_frozen()
    assert not sweep.run.trial(no_folder).exists()
    assert not sweep.folder(no_checkpoint).exists()
    assert caplog.messages == []


def test_nothing_else_of_a_trial_is_touched(sweep: Sweep) -> None:
    def others() -> dict[Path, str]:
        files = sweep.run.path.glob("trials/*/*")
        return {f: f.read_text() for f in files if f.is_file() and f.name != ".lock"}

    for score in (0.1, 0.2):
        sweep.trial(score)
    before = others()
    assert len(before) == 8
    keeper = sweep.keeper(disk_budget=1)
    keeper.tidy(sweep.records)
    keeper.tidy_frozen()
    assert others() == before


def test_with_folds_the_checkpoints_of_each_fold_are_kept_or_dropped(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, FOLDS)
    names = tuple(f"fold{n}/checkpoints" for n in (1, 2))
    for scores in ((0.1,), (0.4, 0.3), (0.1, 0.35), (0.2, 0.9)):
        sweep.trial(*scores, folders=names)
    sweep.keeper().tidy(sweep.records)
    kept = [[sweep.epochs(trial_id, name) for name in names] for trial_id in sweep.records]
    assert kept == [[[], []], [[2], [2]], [[], []], [[], []]]


@pytest.mark.parametrize("settings", [LOSS, ACCURACY, FOLDS], ids=["min", "max", "folds"])
def test_the_first_of_the_ranking_is_the_best_trial_of_the_summary(settings: RunSettings) -> None:
    curves: list[list[float]] = [[], [0.5], [0.2, 0.5], [0.5, 0.2], [0.2, 0.2], [0.5, 0.9], []]
    metric = settings.metric
    left = {
        f"t{i}": TrialRecord(
            f"t{i}", "search", {}, 2, [{"epoch": n, metric: s} for n, s in enumerate(scores, 1)]
        )
        for i, scores in enumerate(curves)
    }
    order = []
    while (best := best_record(left.values(), settings)) is not None:
        order.append(best[0].trial_id)
        everyone = list(left.values())
        assert ranked(everyone, settings)[0] == order[-1]
        del left[order[-1]]
    assert len(order) == 5


@pytest.mark.parametrize("count", [0, -1])
def test_keeping_no_trial_at_all_is_refused(count: int, sweep: Sweep) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        sweep.keeper(keep_best=count)


# --- One end after the other ----------------------------------------------------------------------


def test_a_better_trial_takes_the_place_of_the_worst_that_was_kept(sweep: Sweep) -> None:
    keeper = sweep.keeper(keep_best=2)
    seen = []
    for score in (0.5, 0.4, 0.9, 0.3, 0.1):
        sweep.trial(score)
        keeper.tidy(sweep.records)
        seen.append([t for t in sweep.records if sweep.epochs(t)])
    assert seen == [
        ["t0001"],
        ["t0001", "t0002"],
        ["t0001", "t0002"],
        ["t0002", "t0004"],
        ["t0004", "t0005"],
    ]


def test_what_was_done_is_not_done_again(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for score in (0.1, 0.2, 0.3):
        sweep.trial(score)
    keeper = sweep.keeper(keep_best=2)
    with counted(monkeypatch, "drop", "keep_only_best", "bytes_of") as calls:
        keeper.tidy(sweep.records)
        done = [call for call in calls if not call.startswith("bytes_of")]
        assert done == ["keep_only_best t0001", "keep_only_best t0002", "drop t0003"]
        calls.clear()
        keeper.tidy(sweep.records)
        assert calls == []


@pytest.mark.parametrize("budget", [None, 1])
def test_after_a_restart_nothing_changes(budget: int | None, sweep: Sweep) -> None:
    def files() -> dict[Path, bytes]:
        return {f: f.read_bytes() for f in sweep.run.path.rglob("*") if f.is_file()}

    for score in (0.1, 0.2, 0.3):
        sweep.trial(score)
    sweep.keeper(2, budget).tidy(sweep.records)
    before = files()
    sweep.keeper(2, budget).tidy(sweep.records)
    assert files() == before


def test_a_dropped_trial_is_not_touched_after_a_restart(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    for score in (0.1, 0.2):
        sweep.trial(score)
    sweep.keeper().tidy(sweep.records)
    with counted(monkeypatch, "drop") as calls:
        sweep.keeper().tidy(sweep.records)
    assert calls == []


def test_a_trial_whose_process_may_still_write_is_left_for_later(sweep: Sweep) -> None:
    sweep.trial(0.2)
    sweep.trial(0.1)
    keeper = sweep.keeper()
    with held(sweep.run.trial("t0001")):
        keeper.tidy(sweep.records)
        assert sweep.all_epochs() == [[2, 4], [2]]
    keeper.tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2]]


def test_a_folder_is_held_while_it_is_tidied_and_free_after(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.trial(0.1)
    was_held = []

    def keep_only_best(folder: Path) -> None:
        lock = FileLock(folder.parent / ".lock")
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            was_held.append(folder.parent.name)

    monkeypatch.setattr(checkpoint, "keep_only_best", keep_only_best)
    sweep.keeper().tidy(sweep.records)
    assert was_held == ["t0001"]
    with FileLock(sweep.run.trial("t0001") / ".lock", timeout=0):
        pass


# --- Under a budget -------------------------------------------------------------------------------


def unit_of(tmp_path: Path) -> tuple[int, int]:
    """Return the bytes of one trial's best checkpoint, and of the frozen parts."""
    one = Sweep(tmp_path / "one")
    trial_id = one.trial(0.1)
    one.keeper().tidy(one.records)
    size = (one.folder(trial_id) / "epoch-0002.pt").stat().st_size
    frozen = sum(file.stat().st_size for file in one.run.frozen.iterdir())
    assert frozen > 0
    return size, frozen


@pytest.mark.parametrize("fitting", [1, 2, 3, 4])
def test_under_a_budget_the_worst_go_first_and_no_more_than_must(
    fitting: int, sweep: Sweep, tmp_path: Path
) -> None:
    size, frozen = unit_of(tmp_path)
    for score in (0.3, 0.1, 0.4, 0.2):
        sweep.trial(score)
    budget = fitting * size + frozen
    sweep.keeper(4, budget).tidy(sweep.records)
    best_first = ["t0002", "t0004", "t0001", "t0003"]
    assert [t for t in best_first if sweep.epochs(t)] == best_first[:fitting]
    assert sweep.disk_use() == budget
    assert sweep.said == []


def test_a_byte_less_is_a_trial_less(sweep: Sweep, tmp_path: Path) -> None:
    size, frozen = unit_of(tmp_path)
    for score in (0.3, 0.1):
        sweep.trial(score)
    sweep.keeper(4, 2 * size + frozen - 1).tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2]]


def test_checkpoints_of_unfinished_trials_count_in_the_budget(sweep: Sweep, tmp_path: Path) -> None:
    size, frozen = unit_of(tmp_path)
    sweep.trial(0.2)
    sweep.trial(0.1)
    sweep.trial(0.3, state="unfinished")
    sweep.keeper(4, 3 * size + frozen).tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2], [2, 4]]


def test_the_best_trial_stays_whatever_the_budget_and_that_is_said_once(sweep: Sweep) -> None:
    sweep.trial(0.2)
    sweep.trial(0.1)
    keeper = sweep.keeper(4, 1)
    for _ in range(3):
        keeper.tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2]]
    (line,) = sweep.said
    assert line.startswith("disk      checkpoints take ")
    assert " may take 1 B" in line


def test_a_trial_that_the_budget_took_leaves_its_place_empty(sweep: Sweep, tmp_path: Path) -> None:
    size, frozen = unit_of(tmp_path)
    sweep.trial(0.1)
    sweep.trial(0.2)
    keeper = sweep.keeper(2, size + frozen)
    keeper.tidy(sweep.records)
    sweep.trial(0.3)
    keeper.tidy(sweep.records)
    assert sweep.all_epochs() == [[2], [], []]


def test_what_a_trial_has_before_it_is_trimmed_costs_no_other_one_its_place(
    sweep: Sweep, tmp_path: Path
) -> None:
    """Its process holds the folder yet when its end is known, and there are two checkpoints."""
    size, frozen = unit_of(tmp_path)
    sweep.trial(0.1)
    sweep.trial(0.3)
    sweep.trial(0.2)
    keeper = sweep.keeper(3, 3 * size + frozen)
    with held(sweep.run.trial("t0003")):
        keeper.tidy(sweep.records)
        assert sweep.all_epochs() == [[2], [2], [2, 4]]
    keeper.tidy(sweep.records)
    assert sweep.all_epochs() == [[2], [2], [2]]


def test_the_worst_that_is_held_goes_later_and_no_better_one_for_it(
    sweep: Sweep, tmp_path: Path
) -> None:
    size, frozen = unit_of(tmp_path)
    for score in (0.1, 0.2, 0.3):
        sweep.trial(score)
    sweep.keeper(3).tidy(sweep.records)
    keeper = sweep.keeper(3, 2 * size + frozen)
    with held(sweep.run.trial("t0003")):
        keeper.tidy(sweep.records)
        assert sweep.all_epochs() == [[2], [2], [2]]
    keeper.tidy(sweep.records)
    assert sweep.all_epochs() == [[2], [2], []]


# --- What trials share ----------------------------------------------------------------------------


def test_frozen_parts_go_when_no_checkpoint_needs_them_and_only_when_asked(sweep: Sweep) -> None:
    sweep.trial(0.1)
    needed = {file.name for file in sweep.run.frozen.iterdir()}
    (sweep.run.frozen / "of_nobody.pt").write_bytes(b"x")
    (sweep.run.frozen / ".half.pt.1-ab").write_bytes(b"x")
    keeper = sweep.keeper()
    keeper.tidy(sweep.records)
    assert {file.name for file in sweep.run.frozen.iterdir()} > needed
    keeper.tidy_frozen()
    assert {file.name for file in sweep.run.frozen.iterdir()} == needed
    checkpoint.read_best(sweep.folder("t0001"))
    checkpoint.drop(sweep.folder("t0001"))
    keeper.tidy_frozen()
    assert list(sweep.run.frozen.iterdir()) == []


def test_frozen_parts_that_any_fold_or_trial_needs_stay(sweep: Sweep) -> None:
    dropped = sweep.trial(0.9)
    fold = "fold2/checkpoints"
    trial_id = sweep.trial(0.1, folders=(fold,))
    del sweep.records[trial_id]  # in the run directory all the same
    keeper = sweep.keeper()
    checkpoint.drop(sweep.folder(dropped))
    keeper.tidy_frozen()
    checkpoint.read_best(sweep.folder(trial_id, fold))


def test_frozen_parts_in_a_run_that_was_moved_stay(tmp_path: Path) -> None:
    Sweep(tmp_path / "before").trial(0.1)
    (tmp_path / "before").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for name in ("moved", "link"):
        Sweep(tmp_path / name).keeper().tidy_frozen()
    checkpoint.read_best(tmp_path / "moved/trials/t0001/checkpoints")


def test_while_a_process_lives_on_no_frozen_part_goes(sweep: Sweep) -> None:
    trial_id = sweep.trial(0.1)
    (sweep.run.frozen / "of_nobody_yet.pt").write_bytes(b"x")
    with held(sweep.run.trial(trial_id)):
        sweep.keeper().tidy_frozen()
    assert (sweep.run.frozen / "of_nobody_yet.pt").exists()
    sweep.keeper().tidy_frozen()
    assert not (sweep.run.frozen / "of_nobody_yet.pt").exists()


def test_asking_whether_a_process_lives_on_leaves_no_trace_and_no_stray_file_is_one(
    sweep: Sweep,
) -> None:
    trial_id = sweep.trial(0.1)
    (sweep.run.path / "trials" / "notes.txt").write_text("of the user's own")
    (sweep.run.frozen / "of_nobody.pt").write_bytes(b"x")
    sweep.keeper().tidy_frozen()
    assert not (sweep.run.frozen / "of_nobody.pt").exists()
    assert not (sweep.run.trial(trial_id) / ".lock").exists()


def test_where_a_manifest_cannot_be_read_no_frozen_part_goes(
    sweep: Sweep, caplog: pytest.LogCaptureFixture
) -> None:
    trial_id = sweep.trial(0.1)
    manifest = sweep.folder(trial_id) / checkpoint.MANIFEST
    text = manifest.read_text()
    manifest.unlink()
    manifest.mkdir()
    (sweep.run.frozen / "of_nobody.pt").write_bytes(b"x")
    keeper = sweep.keeper()
    keeper.tidy_frozen()
    keeper.tidy_frozen()
    keeper.tidy(sweep.records)
    assert (sweep.run.frozen / "of_nobody.pt").exists()
    assert len(caplog.messages) == 1
    assert sweep.epochs(trial_id) == [2, 4]
    manifest.rmdir()
    manifest.write_text(text)
    keeper.tidy_frozen()
    assert not (sweep.run.frozen / "of_nobody.pt").exists()


# --- Faults ---------------------------------------------------------------------------------------


def refuse(patch: pytest.MonkeyPatch, is_refused: Callable[[Path], bool]) -> None:
    really = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if is_refused(path):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        really(path, missing_ok)

    patch.setattr(Path, "unlink", unlink)


@pytest.mark.parametrize("refused", ["t0001", "t0002"])
def test_what_cannot_be_removed_is_warned_of_once_and_tried_again(
    refused: str,
    sweep: Sweep,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for score in (0.1, 0.2, 0.3):
        sweep.trial(score)
    keeper = sweep.keeper()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        refuse(patch, lambda path: refused in path.parts and path.suffix == ".pt")
        for _ in range(3):
            keeper.tidy(sweep.records)
    (warning,) = caplog.messages
    assert refused in warning
    assert "Permission denied" in warning
    assert sweep.all_epochs()[2] == []
    keeper.tidy(sweep.records)
    assert sweep.all_epochs() == [[2], [], []]


def test_one_fold_that_cannot_be_removed_keeps_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(tmp_path, FOLDS)
    names = tuple(f"fold{n}/checkpoints" for n in (1, 2))
    sweep.trial(0.9, folders=names)
    sweep.trial(0.1, folders=names)
    keeper = sweep.keeper()
    with monkeypatch.context() as patch:
        refuse(patch, lambda path: {"t0001", "fold1"} <= set(path.parts))
        keeper.tidy(sweep.records)
    assert [bool(sweep.epochs("t0001", name)) for name in names] == [True, False]
    keeper.tidy(sweep.records)
    assert not any(sweep.epochs("t0001", name) for name in names)


def test_a_frozen_part_that_cannot_be_removed_keeps_no_other_one(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweep.run.frozen.mkdir(parents=True)
    for name in "abc":
        (sweep.run.frozen / name).write_bytes(b"x")
    keeper = sweep.keeper()
    refuse(monkeypatch, lambda path: path.name in ("a", "b"))
    keeper.tidy_frozen()
    keeper.tidy_frozen()
    assert sorted(file.name for file in sweep.run.frozen.iterdir()) == ["a", "b"]
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("call", ["bytes_of", "drop", "keep_only_best"])
def test_a_disk_that_answers_nothing_ends_no_sweep(
    call: str, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for score, state in ((0.1, "finished"), (0.2, "finished"), (0.3, "unfinished")):
        sweep.trial(score, state=state)
    monkeypatch.setattr(checkpoint, call, fail)
    keeper = sweep.keeper(1, 10**9)
    for _ in range(2):
        keeper.tidy(sweep.records)
    assert len(caplog.messages) == len(set(caplog.messages)) > 0


def test_a_folder_that_cannot_be_locked_ends_no_sweep(
    sweep: Sweep, caplog: pytest.LogCaptureFixture
) -> None:
    for score in (0.1, 0.2):
        sweep.trial(score)
    (sweep.run.trial("t0002") / ".lock").mkdir()
    (sweep.run.frozen / "of_nobody.pt").write_bytes(b"x")
    keeper = sweep.keeper()
    for _ in range(2):
        keeper.tidy(sweep.records)
        keeper.tidy_frozen()
    assert sweep.all_epochs() == [[2], [2, 4]]
    assert (sweep.run.frozen / "of_nobody.pt").exists()
    assert len(caplog.messages) == 1


KILL = """
import os, signal, sys
from pathlib import Path
from tests.test_keeping import Sweep

sweep = Sweep(Path(sys.argv[1]))
sweep.trial(0.2)
sweep.trial(0.1)
calls, at = [0], int(sys.argv[2])
for name in ("fsync", "replace", "unlink"):
    def call(*args, really=getattr(os, name), **kwargs):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return really(*args, **kwargs)
    setattr(os, name, call)
sweep.keeper().tidy(sweep.records)
"""


@pytest.mark.parametrize("at", [3, 6])
def test_a_driver_that_was_killed_while_tidying_finishes_the_next_time(
    at: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), str(at)],
        cwd=Path(tuneapp.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    sweep = Sweep(tmp_path)
    for trial_id, score in (("t0001", 0.2), ("t0002", 0.1)):
        rows = [{"epoch": 1, "val/loss": score}]
        sweep.records[trial_id] = TrialRecord(
            trial_id, "search", {}, 1, rows=rows, state="finished"
        )
    sweep.keeper().tidy(sweep.records)
    assert sweep.all_epochs() == [[], [2]]
    files = {file.name for file in sweep.folder("t0002").iterdir()}
    assert files == {"epoch-0002.pt", checkpoint.MANIFEST}
    manifest = json.loads((sweep.folder("t0002") / checkpoint.MANIFEST).read_text())
    assert list(manifest) == ["best"]
    checkpoint.read_best(sweep.folder("t0002"))
