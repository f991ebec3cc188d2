"""Faults 39 and 42 to 46: processes that die or hang in the middle, and what goes on after them."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import read_ledger
from tests.faults.refusal import after_epochs, files_below, numbers, write_space
from tests.killing import DIED, Plan, die_at, end_of, events_of, forked, plan
from tests.test_batches import SMALL as PREPROCESSING
from tests.test_batches import batches_of, workers_of
from tests.test_checkpoint import everything, fresh, train, trained
from tests.test_trial import table
from tuneapp.cli import main
from tuneapp.config import Data
from tuneapp.data import batches as batches_module
from tuneapp.data.batches import Batches, WorkerLost
from tuneapp.data.source import read_images
from tuneapp.data.store import open_store
from tuneapp.failures import classify
from tuneapp.ledger import Events, Ledger
from tuneapp.rundir import RunDir
from tuneapp.simulated import Played, play
from tuneapp.study import Study

from tuneapp.search import Driver, Stopper  # isort: skip

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def words(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`train` of two epochs of a network of a few kilobytes, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    return ["train", write_space(), "--data", str(photos), "--name"]


def rows_of(name: str) -> list[dict[str, Any]]:
    return [e["row"] for e in read_ledger(Path("runs", name)) if e["event"] == "epoch"]


def ends_of(name: str) -> list[str]:
    return [e["state"] for e in read_ledger(Path("runs", name)) if e["event"] == "ended"]


# --- 39: processes that make batches --------------------------------------------------------------


@pytest.fixture
def after_first_epoch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Return what does something to the process that makes batches after the first epoch."""
    made: list[Batches] = []
    struck: list[psutil.Process] = []
    really = Batches.epoch

    def epoch(self: Batches, number: int) -> Any:
        made.append(self)
        return really(self, number)

    def arrange(do: Callable[[psutil.Process], object]) -> None:
        def strike(row: Any) -> None:
            if row["epoch"] == 1 and not struck:
                training = next(batches for batches in made if batches.workers)
                loader = training._loader
                assert loader.timeout >= batches_module.WORKER_TIMEOUT_S == 120
                loader._iterator._timeout = 3.0  # type: ignore[union-attr]
                struck.extend(workers_of(training))
                for worker in struck:
                    do(worker)

        after_epochs(monkeypatch, strike)

    monkeypatch.setattr(Batches, "epoch", epoch)
    yield arrange
    for worker in struck:
        if worker.is_running():
            worker.kill()


@pytest.mark.parametrize(
    ("strike", "told"),
    [
        (psutil.Process.kill, "ended unexpectedly"),
        (psutil.Process.suspend, "timed out after 3.0 seconds"),
    ],
    ids=["killed", "hung"],
)
def test_fault_39_a_worker_that_dies_or_hangs_is_told_in_a_line_and_resume_goes_on(
    strike: Callable[[psutil.Process], object],
    told: str,
    words: list[str],
    after_first_epoch: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*words, "straight"]) == 0
    with monkeypatch.context() as patch:
        after_first_epoch(strike)
        capsys.readouterr()
        assert main([*words, "x", "--workers", "1", "--store-budget", "0"]) == 2
        patch.undo()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    # Documented: it is noticed when no batch has come for so long, and nobody else makes them.
    assert error.startswith("tuneapp: error: a DataLoader worker"), error
    assert told in error
    assert (len(rows_of("x")), ends_of("x")) == (1, [])
    assert main(["resume", "runs/x"]) == 0
    assert numbers(rows_of("x")) == numbers(rows_of("straight"))
    assert ends_of("x") == ["finished"]


@pytest.mark.parametrize("torchs", ["DataLoader worker (pid 7) is killed", "DataLoader timed out"])
def test_fault_39_under_a_sweep_such_a_trial_is_tried_again(
    torchs: str, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*words: Any) -> Iterator[Any]:
        raise RuntimeError(torchs)

    images = read_images(Data(source=str(photos)), seed=0)
    batches = batches_of(open_store(images, PREPROCESSING))
    monkeypatch.setattr(type(batches._loader), "__iter__", fail)
    with pytest.raises(WorkerLost) as caught:
        list(batches.epoch(1))
    failure = classify(caught.value, tmp_path)
    assert (failure.kind, failure.can_pass) == ("process died", True)
    assert torchs in failure.cause


# --- 42, 43: at the end ---------------------------------------------------------------------------

KILLED_AFTER_ITS_LAST_EPOCH = """
import os, signal, sys
from tuneapp.study import Study
Study.complete = lambda *words: os.kill(os.getpid(), signal.SIGKILL)
from tuneapp.cli import main
main(sys.argv[1:])
"""


def test_fault_42_a_kill_between_the_last_report_and_the_end_counts_the_trial_once(
    words: list[str],
) -> None:
    command = [sys.executable, "-c", KILLED_AFTER_ITS_LAST_EPOCH, *words, "x"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = Path("runs/x/ledger.jsonl").read_bytes()
    assert ([row["epoch"] for row in rows_of("x")], ends_of("x")) == ([1, 2], [])
    assert main(["resume", "runs/x"]) == 0
    # Nothing was trained, or written down, again.
    after = Path("runs/x/ledger.jsonl").read_bytes()
    assert after.startswith(before)
    assert after[len(before) :].count(b"\n") == 1
    assert ends_of("x") == ["finished"]
    (row,) = table(Path("runs/x/trials.csv"))
    assert (row["trial"], row["state"], row["epochs"]) == ("t0001", "finished", "2")


def test_fault_43_a_second_resume_of_a_finished_training_changes_no_byte(words: list[str]) -> None:
    assert main([*words, "x"]) == 0
    assert main(["resume", "runs/x"]) == 0
    before = files_below(Path("runs/x"))
    assert main(["resume", "runs/x"]) == 0
    assert files_below(Path("runs/x")) == before
    assert ends_of("x") == ["finished"]


# --- 44: a commit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("half_written", [False, True])
def test_fault_44_a_crash_at_each_call_of_a_commit_leaves_the_old_or_the_new_state(
    half_written: bool, tmp_path: Path
) -> None:
    # An epoch is committed by its checkpoint, and then by its line in the ledger.
    before, log = tmp_path / "before", tmp_path / "error.txt"
    state = trained(before / "checkpoints", epochs=2, best=2)
    wanted = {2: everything(state)}
    train(state, is_best=False)
    wanted[3] = everything(state)
    generator = torch.get_rng_state()
    rows = [{"trial": "t0001", "row": {"epoch": epoch}} for epoch in (1, 2, 3)]
    with Ledger(before / "ledger.jsonl") as ledger:
        for row in rows[:2]:
            ledger.append("epoch", **row)
    number, code, seen = 0, DIED, []
    while code == DIED:
        number += 1
        run = RunDir(tmp_path / str(number))
        shutil.copytree(before, run.path)

        def commit(run: RunDir = run, number: int = number) -> None:
            torch.set_rng_state(generator)
            ledger = Ledger(run.ledger)
            die_at(number, half_written=half_written)
            state.save(run.path / "checkpoints", run.frozen)
            ledger.append("epoch", **rows[2])

        code = end_of(forked(commit, log), log)
        read = fresh(seed=99)
        assert read.load(run.path / "checkpoints"), number
        assert everything(read) == wanted[read.epoch], number
        events = events_of(run)
        seen.append((read.epoch, len(events)))
        with Ledger(run.ledger) as ledger:  # and it goes on
            assert len(ledger.events) == len(events)
            for row in rows[len(events) :]:
                ledger.append("epoch", **row)
        assert [e["row"]["epoch"] for e in events_of(run)] == [1, 2, 3]
    assert code == 0
    # What is in the ledger can be loaded: never is the line there before the checkpoint.
    assert set(seen) == ({(3, 2), (3, 3)} if half_written else {(2, 2), (3, 2), (3, 3)})
    assert seen == sorted(seen)
    assert number >= 2 if half_written else number > 10


# --- 45, 46: the search ---------------------------------------------------------------------------


def played(
    sweep: Plan, ledger: Events | None = None, more: int | None = None, **options: Any
) -> Played:
    return play(
        sweep.space,
        sweep.settings,
        sweep.curve_of,
        sweep.trials,
        ledger=ledger,
        stop_after_events=more,
        **options,
    )


def cut_off(whole: Played, count: int) -> Events:
    """Return the ledger as it was after so many events."""
    ledger = Events()
    ledger.events = whole.ledger.events[:count]
    return ledger


def test_fault_45_rungs_are_rebuilt_and_the_same_trials_are_stopped() -> None:
    sweep = plan(5, trials=24, share=0.0)
    whole = played(sweep)
    stopped = {r.trial_id for r in whole.records.values() if r.state == "stopped"}
    assert 3 <= len(stopped) <= 20
    at_a_rung = [
        number
        for number, event in enumerate(whole.ledger.events, start=1)
        if event["event"] == "epoch" and event["row"]["epoch"] in (3, 9)
    ]
    for count in at_a_rung[::3]:  # the epoch is written down, and was not judged
        ledger = cut_off(whole, count)
        study = Study(sweep.space, cut_off(whole, count), sweep.settings, [])
        stopper = Stopper(Driver(study, "."), 9, sweep.settings.mode)
        stopper.replay(list(ledger.events))
        curves: dict[str, list[float]] = {}
        for event in ledger.events:
            if event["event"] == "epoch":
                curves.setdefault(event["trial"], []).append(event["row"]["val/accuracy"])
        # Each trial's best up to the rung, of those that came so far; at the end none is judged.
        by_hand = {t: max(shown[:3]) for t, shown in curves.items() if len(shown) >= 3}
        rungs = {int(rung): kept for rung, kept in stopper._brackets[0]._rungs}
        assert rungs == {3: by_hand, 9: {}}
        again = played(sweep, ledger)
        assert again.ledger.events == whole.ledger.events, f"interrupted after event {count}"
        assert {r.trial_id for r in again.records.values() if r.state == "stopped"} == stopped


@pytest.mark.parametrize("seed", [1, 2])
def test_fault_46_suggestions_are_the_same_whatever_was_interrupted_and_none_comes_twice(
    seed: int,
) -> None:
    sweep, draws = plan(seed, trials=20), random.Random(seed)
    whole = played(sweep)
    wanted = [record.params for record in whole.records.values()]
    assert len({str(sorted(params.items())) for params in wanted}) == len(wanted) == 20
    ledger, lives = Events(), 1
    while played(sweep, ledger, draws.randint(1, 25)).study is None:
        lives += 1
    assert lives > 5
    assert ledger.events == whole.ledger.events
    # Of several at once, what ends first may be another one: then still none comes twice.
    ledger, lives = Events(), 1
    while (last := played(sweep, ledger, draws.randint(10, 40), concurrent=3)).study is None:
        lives += 1
    params = [str(sorted(record.params.items())) for record in last.records.values()]
    assert len(set(params)) == len(params) == 20
    assert lives > 3
