"""A run directory as tidy tables: compute first, render elsewhere.

Reads only the ledger, so any run works: finished, interrupted, or still running. "Best" is
always the best epoch of the run's metric.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tuneapp.data.split import read_split
from tuneapp.errors import StorageError
from tuneapp.ledger import Event, read_events
from tuneapp.prepare import read_run_space
from tuneapp.records import (
    TrialRecord,
    best_record,
    current_space,
    flat,
    is_exhausted,
    read_records,
    trials_to_go,
    trials_wanted,
)
from tuneapp.room import write_patiently
from tuneapp.rundir import RunDir, RunRecord, cell, open_run, write_atomically
from tuneapp.study import parameter_importances

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """A run, read.

    Attributes:
        run: its directory.
        record: its settings.
        trials: every trial proposed so far, in that order.
        wanted: trials that the run is to have in total.
        num_val: validation images that the scores are fractions of.
        bad: images that cannot be read, each with its cause.
        test_results: for each time that the test split was opened: the trial, and its scores (a
            row for each fold's model); no scores if that was interrupted.
        space: number of the space that trials come from now; 1 unless the run was refined.
        is_exhausted: whether every trial of the space was run.
    """

    run: RunDir
    record: RunRecord
    trials: tuple[TrialRecord, ...]
    wanted: int
    num_val: int
    bad: tuple[tuple[str, str], ...] = ()
    test_results: tuple[tuple[str, list[dict[str, float]]], ...] = ()
    space: int = 1
    is_exhausted: bool = False

    @property
    def best(self) -> tuple[TrialRecord, dict[str, Any]] | None:
        """The best trial and the row of its best epoch; None before the first epoch."""
        return best_record(self.trials, self.record.settings)

    @property
    def best_recipe(self) -> tuple[TrialRecord, dict[str, Any]] | None:
        """The same among the recipes."""
        recipes = [t for t in self.trials if t.origin == "recipe"]
        return best_record(recipes, self.record.settings)

    @property
    def num_open(self) -> int:
        """Trials still to run: unfinished, or not proposed yet."""
        return trials_to_go(self.trials, self.wanted, exhausted=self.is_exhausted)

    @property
    def ranked(self) -> list[TrialRecord]:
        """The trials, best first; those without an epoch last."""
        settings = self.record.settings
        sign = -1 if settings.mode == "max" else 1

        def place(trial: TrialRecord) -> tuple[int, float]:
            row = trial.best(settings)
            score = math.inf if row is None else sign * float(row[settings.metric])
            # Means over different folds are not compared: those with more come first.
            return (0 if settings.data.folds is None else -len(trial.rows), score)

        return sorted(self.trials, key=place)

    def standard_error(self, accuracy: float) -> float:
        """Return how much an accuracy on `num_val` images varies by chance alone (binomial)."""
        return math.sqrt(accuracy * (1 - accuracy) / self.num_val)


def read_summary(path: Path) -> Summary:
    """Read the run directory at `path`.

    Raises:
        RunError: it is not a run directory, or it is damaged.
    """
    run, record = open_run(path)
    events = read_events(run.ledger)
    root = None if record.image_root is None else Path(record.image_root)
    images = read_split(
        run.split_file, root, record.classes, record.settings.data, record.is_multilabel
    )
    # With folds, every image that is not for testing is in the validation part of one of them.
    validated = images.of("train" if images.num_folds else "val")
    return Summary(
        run,
        record,
        tuple(read_records(events).values()),
        trials_wanted(events),
        num_val=sum(not e.bad for e in validated),
        bad=tuple((e.path, e.bad) for e in images.examples if e.bad),
        test_results=_test_results(events),
        space=current_space(events),
        is_exhausted=is_exhausted(events),
    )


def _test_results(events: Sequence[Event]) -> tuple[tuple[str, list[dict[str, float]]], ...]:
    results: list[tuple[str, list[dict[str, float]]]] = []
    for event in events:
        if event["event"] == "test_opened":
            results.append((event["trial"], []))
        elif event["event"] == "test_result":
            results[-1] = (event["trial"], event["scores"])
    return tuple(results)


def trials_frame(path: Path) -> pd.DataFrame:
    """Return a row for each trial, best first, indexed by trial id.

    Columns: origin, state, cause, epochs (done), best_epoch, the metrics of the best epoch,
    `params/<name>` (empty if the trial does not have the parameter) and `applied/<name>`.
    """
    return _trials_frame(read_summary(path))


def epochs_frame(path: Path) -> pd.DataFrame:
    """Return a row for each epoch of each trial: trial, epoch, metrics."""
    rows = [
        {"trial": t.trial_id, **_named(row)} for t in read_summary(path).trials for row in t.rows
    ]
    columns = ["trial", "epoch", "train/loss", "val/loss", "val/accuracy"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def write_trials_table(path: Path) -> Path:
    """Write `trials.csv` into the run directory, and return its path; waits while the disk is full.

    Raises:
        StorageError: it cannot be written.
    """
    summary = read_summary(path)
    frame = _trials_frame(summary)
    # The csv module's line ends: with others, pandas does not quote text that contains them.
    table = summary.run.trials_table

    def write() -> None:
        write_atomically(table, lambda aside: frame.to_csv(aside, lineterminator="\r\n"))

    try:
        write_patiently(path, 0, write, log.warning)
    except OSError as error:
        raise StorageError(f"{table} cannot be written: {error.strerror or error}") from None
    return table


def importances(path: Path) -> pd.Series:
    """Return how much each parameter matters for the score, from 0 to 1, by PED-ANOVA.

    Conditional parameters are included. Meaningful from about a dozen trials on.

    Source: S. Watanabe et al., PED-ANOVA, IJCAI 2023, as implemented by Optuna.
    """
    summary = read_summary(path)
    space = read_run_space(summary.run, summary.record, summary.space)
    inside = [trial for trial in summary.trials if not trial.is_history]
    values = parameter_importances(space, inside, summary.record.settings)
    return pd.Series(values, name="importance", dtype=float)


def _trials_frame(summary: Summary) -> pd.DataFrame:
    settings = summary.record.settings
    rows = [_trial_row(trial, trial.best(settings)) for trial in summary.ranked]
    frame = pd.DataFrame(rows, columns=None if rows else ["trial", "origin", "state"])
    return frame.set_index("trial")


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row under names that pandas accepts: a class may be a folder of any bytes."""
    return {name.encode("utf-8", "backslashreplace").decode(): value for name, value in row.items()}


def _trial_row(trial: TrialRecord, best: dict[str, Any] | None) -> dict[str, Any]:
    metrics = {k: v for k, v in (best or {}).items() if k != "epoch" and not k.startswith("lr/")}
    return {
        "trial": trial.trial_id,
        "origin": trial.origin,
        "state": trial.state,
        "cause": cell(trial.cause),
        "failure": trial.kind or None,
        "same_as": trial.twin or None,
        "space": trial.space,
        "epochs": len(trial.rows),
        "best_epoch": None if best is None else best["epoch"],
        **_named(metrics),
        **{f"params/{name}": cell(value) for name, value in trial.params.items()},
        **{f"applied/{name}": cell(v) for name, v in flat(trial.applied).items()},
    }
