"""Sweeps whose driver is killed again and again come to what they would have come to."""

import json
import os
import random
from pathlib import Path

import pytest

from tests.killing import (
    DIED,
    Figures,
    RealSweep,
    compare,
    compare_with_witness,
    die_at,
    end_of,
    events_of,
    forked,
    kill_a_real_sweep,
    kill_a_sweep,
    plan,
    require_no_acknowledged_event_lost,
    witnessed,
    work,
)
from tuneapp.ledger import read_events
from tuneapp.records import best_record, read_records
from tuneapp.rundir import RunDir

SWEEPS = 8


@pytest.mark.timeout(300)
def test_fault_36_a_driver_killed_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    found = Figures()
    states: set[str] = set()
    for seed in range(SWEEPS):
        sweep, folder = plan(seed), tmp_path / str(seed)
        found.add(kill_a_sweep(folder, sweep, random.Random(seed)))
        whole, killed = RunDir(folder / "whole"), RunDir(folder / "killed")
        # There are no clocks in a ledger: all suggestions, stops, causes and values at once.
        assert killed.ledger.read_bytes() == whole.ledger.read_bytes()
        records = read_records(read_events(killed.ledger)).values()
        best = best_record(records, sweep.settings)
        assert best is not None
        assert best[1]["val/accuracy"] == max(
            row["val/accuracy"] for _, _, row in witnessed(killed)
        )
        states |= {record.kind or record.state for record in records}
    assert (found.lost, found.doubled, found.differing) == (0, 0, 0)
    assert found.repeated <= found.kills
    assert found.most_repeated_per_kill <= 1
    assert found.kills >= 8 * SWEEPS, found
    assert len(found.phases) >= 5, found.phases  # they hit different things
    assert {"finished", "stopped", "diverged", "out of memory", "bug", "process died"} <= states


def test_a_second_and_a_third_resume_of_a_finished_sweep_change_nothing(tmp_path: Path) -> None:
    run, log = RunDir(tmp_path / "run"), tmp_path / "error.txt"
    run.path.mkdir()
    sweep = plan(0, trials=6)
    seen = []
    for _ in range(3):
        assert end_of(forked(lambda: work(run, sweep), log), log) == 0
        seen.append((run.ledger.read_bytes(), witnessed(run)))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("half_written", [False, True])
def test_a_crash_at_each_call_that_writes_leaves_the_old_or_the_new_state(
    tmp_path: Path, half_written: bool
) -> None:
    sweep, log = plan(3, trials=4, max_epochs=2, share=0.0), tmp_path / "error.txt"
    whole = RunDir(tmp_path / "whole")
    whole.path.mkdir()
    assert end_of(forked(lambda: work(whole, sweep), log), log) == 0
    number, code = 0, DIED
    while code == DIED:
        number += 1
        run = RunDir(tmp_path / str(number))
        run.path.mkdir()

        def crash(run: RunDir = run, number: int = number) -> None:
            die_at(number, half_written=half_written)
            work(run, sweep)

        code = end_of(forked(crash, log), log)
        require_no_acknowledged_event_lost(run)
        for checkpoint in run.path.glob("trials/*/checkpoint.json"):  # whole, or not there
            epochs = [row["epoch"] for row in json.loads(checkpoint.read_text())]
            assert epochs in ([1], [1, 2])

        def go_on(run: RunDir = run) -> None:
            os.fsync = lambda handle: None  # the moments were before; this one is about the end
            work(run, sweep)

        assert end_of(forked(go_on, log), log) == 0
        assert run.ledger.read_bytes() == whole.ledger.read_bytes(), f"crash at call {number}"
        found = Figures()
        compare(whole, run, found)
        compare_with_witness(run, found)
        assert found.lost == found.doubled == found.differing == 0
        assert found.repeated <= 1
    assert code == 0
    # Each event is a write and a sync; a checkpoint is a sync, a rename and a sync more.
    assert number - 1 >= len(events_of(whole)) * (1 if half_written else 2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fault_37_a_real_sweep_killed_and_at_once_resumed_comes_to_what_it_would_have(
    tmp_path: Path, photos: Path
) -> None:
    sweep = RealSweep(tmp_path, data=str(photos))
    found = kill_a_real_sweep(sweep, random.Random(1), kills=3)
    assert found.kills == 3
    assert "while Ray starts" in found.phases
    assert (found.lost, found.doubled, found.differing) == (0, 0, 0)
    settings = plan(0).settings
    best = [
        best_record(read_records(read_events(sweep.run(name).ledger)).values(), settings)
        for name in ("whole", "killed")
    ]
    assert best[0] is not None and best[1] is not None
    assert best[0][0].trial_id == best[1][0].trial_id
    assert best[0][1]["epoch"] == best[1][1]["epoch"]
