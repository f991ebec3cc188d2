import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import read_ledger
from tuneapp import summary
from tuneapp.config import RunSettings
from tuneapp.errors import RunError
from tuneapp.ledger import Ledger
from tuneapp.rundir import RunDir, RunRecord, write_record

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def hand_made(tmp_path: Path) -> Path:
    """A run of three trials whose every number was chosen by hand."""
    write_record(
        RunDir(tmp_path),
        RunRecord(
            kind="sweep",
            space_paths=("hand.py",),
            settings=RunSettings(),
            image_root=None,
            classes=("a", "b"),
            weights={},
        ),
    )
    (tmp_path / "split.csv").write_text(
        "path,class,split,bytes\n" + "".join(f"{i}.png,a,val,0\n" for i in range(100))
    )
    applied = {"lr": {"head": 0.1}, "optimizer": "SGD", "frozen_training": []}
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append("sweep", trials=4)
        for trial, origin, params, accuracies in (
            ("t0001", "recipe", {"lr": 0.1, "kind": "=SUM(A1)"}, [0.5, 0.8, 0.7]),
            ("t0002", "search", {"lr": 0.2}, [0.6, 0.9, 0.9]),
            ("t0003", "search", {"lr": 0.3}, []),
        ):
            ledger.append("proposed", trial=trial, origin=origin, params=params, epochs=3)
            if accuracies:
                ledger.append("applied", trial=trial, applied=applied)
            for epoch, accuracy in enumerate(accuracies, start=1):
                row = {"epoch": epoch, "train/loss": 1.0, "val/loss": 2.0 - accuracy}
                ledger.append("epoch", trial=trial, row={**row, "val/accuracy": accuracy})
        ledger.append("ended", trial="t0001", state="finished", cause="", told=0.8)
        ledger.append("ended", trial="t0002", state="stopped", cause="too slow", told=None)
    return tmp_path


def test_trials_are_ranked_by_their_best_epoch(hand_made: Path) -> None:
    frame = summary.trials_frame(hand_made)
    assert list(frame.index) == ["t0002", "t0001", "t0003"]
    assert frame.loc["t0002", "val/accuracy"] == 0.9
    assert frame.loc["t0002", "best_epoch"] == 2  # the earlier of two equals
    assert frame.loc["t0001", "best_epoch"] == 2
    assert frame.loc["t0001", "val/loss"] == 1.2  # of the best epoch, not of the last
    assert list(frame["state"]) == ["stopped", "finished", "unfinished"]
    assert pd.isna(frame.loc["t0003", "val/accuracy"])
    assert frame.loc["t0001", "applied/lr/head"] == 0.1


def test_epochs_are_a_row_each(hand_made: Path) -> None:
    frame = summary.epochs_frame(hand_made)
    assert list(frame["trial"]) == ["t0001"] * 3 + ["t0002"] * 3
    assert list(frame["val/accuracy"]) == [0.5, 0.8, 0.7, 0.6, 0.9, 0.9]


def test_the_gain_is_over_the_best_recipe_and_open_trials_are_counted(hand_made: Path) -> None:
    read = summary.read_summary(hand_made)
    assert read.best is not None
    assert read.best_recipe is not None
    assert read.best[0].trial_id == "t0002"
    assert read.best_recipe[0].trial_id == "t0001"
    assert read.num_open == 2  # t0003 unfinished, a fourth not proposed
    assert read.standard_error(0.9) == pytest.approx(0.03)  # sqrt(.9 * .1 / 100)


def test_the_table_file_has_no_cell_that_a_spreadsheet_would_run(hand_made: Path) -> None:
    file = summary.write_trials_table(hand_made)
    with file.open(newline="") as text:
        rows = {row["trial"]: row for row in csv.DictReader(text)}
    assert rows["t0001"]["params/kind"] == "'=SUM(A1)"
    assert rows["t0002"]["params/kind"] == ""  # not asked for: empty, not stale
    assert float(rows["t0002"]["val/accuracy"]) == 0.9


def test_a_run_without_a_trial_yet_has_empty_tables(hand_made: Path) -> None:
    (hand_made / "ledger.jsonl").write_text("")
    assert summary.trials_frame(hand_made).empty
    assert summary.epochs_frame(hand_made).empty
    assert summary.read_summary(hand_made).best is None


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run directory: it has no run\.json"):
        summary.read_summary(tmp_path)


@pytest.mark.ray
def test_the_tables_of_a_real_sweep_hold_what_its_ledger_says(
    finished_sweep: dict[str, Any],
) -> None:
    run = finished_sweep["run"]
    events = read_ledger(run)
    frame = summary.trials_frame(run)
    assert len(frame) == 8
    for trial in frame.index:
        values = [
            e["row"]["val/accuracy"]
            for e in events
            if e["event"] == "epoch" and e["trial"] == trial
        ]
        assert frame.loc[trial, "val/accuracy"] == max(values)
        assert frame.loc[trial, "epochs"] == len(values)
    lrs = frame["params/adamw.lr"].fillna(frame["params/sgd.lr"])
    assert list(frame["applied/lr/head"]) == pytest.approx(list(lrs))
    importances = summary.importances(run)
    assert importances.sum() == pytest.approx(1.0)
    assert {"freeze_depth", "lr_ratio"} <= set(importances.index)


@pytest.mark.ray
def test_summaries_are_the_same_whether_or_not_the_caches_are_there(
    finished_sweep: dict[str, Any],
) -> None:
    run = finished_sweep["run"]
    first = summary.write_trials_table(run).read_bytes()
    (run / "trials.csv").unlink()
    assert summary.write_trials_table(run).read_bytes() == first
