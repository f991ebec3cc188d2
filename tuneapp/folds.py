"""A trial over folds: trained once for each, validated each time on another part of the images."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tuneapp.checkpoint import Row
from tuneapp.config import TrialConfig
from tuneapp.records import FOLD_SCORE
from tuneapp.tracking import open_tracker
from tuneapp.training import TrialRun
from tuneapp.trial import Report, run_trial


def run_whole(config: TrialConfig, run: TrialRun, report: Report) -> None:
    """Train a trial of a run to its end: once, or once for each fold of its images.

    Either goes on from the checkpoints in the trial's folder, where there are some. Without folds,
    each epoch is reported; with folds, each fold as it ends: a row of the means over the folds so
    far, each at its best epoch, under `epoch` their number.

    Args:
        config: what to train.
        run: where and how; it has a folder.
        report: called with each row.

    Raises:
        Diverged: the loss became NaN or infinite, in some fold.
    """
    assert run.folder is not None
    if not run.images.num_folds:
        run_trial(config, run, report, resume_from=run.folder / "checkpoints")
        return
    best_rows: list[Row] = []
    tracker = open_tracker(run.folder, run.params, run.settings, ())
    try:
        for number in range(1, run.images.num_folds + 1):
            folder = fold_folder(run.folder, number)
            fold_run = replace(run, images=run.images.fold(number), folder=folder)
            applied: list[Row] = []
            state = run_trial(config, fold_run, applied.append, folder / "checkpoints")
            best_rows.append(state.history[state.best_epoch - 1])
            row = _means(best_rows, run.settings.metric)
            tracker.epoch(row)
            report({**row, "applied": applied[-1]["applied"]})
    finally:
        tracker.close()


def fold_folder(trial_folder: Path, number: int) -> Path:
    """Return the folder of one fold of a trial."""
    return trial_folder / f"fold{number}"


def _means(rows: Sequence[Row], metric: str) -> Row:
    """Return the means over these rows of what all of them have, and the last one's own score."""
    shared = [name for name in rows[0] if name != "epoch" and all(name in row for row in rows)]
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in shared}
    return {"epoch": len(rows), **means, FOLD_SCORE + metric: rows[-1][metric]}
