"""One trial, from its configuration to its last epoch: the page to read first.

`run_trial` knows nothing of Ray: the same function runs in a sweep (its `report` goes to Ray), in
`tuneapp train` (to the ledger and a printed line) and in a test (`list.append`).
"""

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tuneapp.checkpoint import Row, TrainState
from tuneapp.config import RunSettings, TrialConfig, is_better
from tuneapp.data.findings import describe_bad
from tuneapp.errors import Diverged, TrialError
from tuneapp.loop import EpochMetrics, Evaluation
from tuneapp.metrics import measure
from tuneapp.room import write_patiently
from tuneapp.rundir import write_atomically, write_json
from tuneapp.tracking import NoTracker, Tracker, open_tracker
from tuneapp.training import TrialRun, begin_training
from tuneapp.weights import preprocessing_of

log = logging.getLogger(__name__)

Report = Callable[[Row], None]


def run_trial(
    config: TrialConfig, run: TrialRun, report: Report, resume_from: Path | None = None
) -> TrainState:
    """Train one configuration, and report each epoch.

    State is built from nothing: what ran before in this process does not matter. Epochs that a
    checkpoint holds already are reported again first, so that a listener who missed some has all.

    Args:
        config: what to train.
        run: where and how.
        report: called after each epoch with its row of metrics and, under `applied`, with what the
            trial really trains with.
        resume_from: a checkpoint folder to go on from, where it holds an intact one.

    Returns:
        The state after the last epoch.

    Raises:
        Diverged: the loss became NaN or infinite.
        AppliedValueError: the trial would train something else than `config`.
    """
    training = begin_training(config, run)
    if resume_from is not None:
        training.resume(resume_from)
    state = training.state
    for row in state.history:
        report({**row, "applied": state.applied_in(row["epoch"])})

    tracker = _open_folder(run, config, state)
    try:
        for epoch in range(state.epoch + 1, config.epochs + 1):
            training.enter(epoch)
            lrs = {f"lr/{group['stage']}": group["lr"] for group in state.optimizer.param_groups}
            trained = training.train(epoch)
            row = _row(epoch, trained, training.validate(epoch), lrs, run)
            _require_finite(epoch, row, trained.steps)
            training.end_epoch(row)
            _record(state, row, run)
            tracker.epoch(row)
            report({**row, "applied": state.applied_in(epoch)})
    finally:
        tracker.close()
    return state


def score_of(row: Row, settings: RunSettings) -> float:
    """Return the value that a row of metrics is judged by."""
    return float(row[settings.metric])


def _row(
    epoch: int,
    trained: EpochMetrics,
    answers: Evaluation,
    lrs: Mapping[str, float],
    run: TrialRun,
) -> Row:
    # Before anything is counted: answers that are no numbers have no place in a ranking.
    _require_finite(epoch, {"val/loss": answers.loss}, trained.steps)
    scores = measure(
        answers.logits.numpy(), answers.targets.numpy(), run.images.classes, run.settings.metric
    )
    if run.settings.metric not in {"val/loss", *scores}:
        raise TrialError(f"{run.settings.metric} is not defined for these validation images")
    return {
        "epoch": epoch,
        "train/loss": trained.loss,
        "val/loss": answers.loss,
        **scores,
        "train/grad_norm": trained.grad_norm,
        "train/images_per_s": trained.images_per_s,
        "train/data_wait": trained.data_wait,
        **lrs,
    }


def _open_folder(run: TrialRun, config: TrialConfig, state: TrainState) -> Tracker:
    if run.folder is None:
        return NoTracker()
    run.folder.mkdir(parents=True, exist_ok=True)
    preprocessing = asdict(preprocessing_of(config, run.images.native_size))
    plain = {"params": dict(run.params), **config.as_dict(), "preprocessing": preprocessing}
    write_json(run.folder / "config.json", plain)
    if state.history:  # the table may lack the epoch in which the trial was interrupted
        _write_table(run.folder / "epochs.csv", state.history)
    text = describe_bad(run.images)
    if text:
        log.info("%s", text)
    return open_tracker(run.folder, run.params, run.settings, state.history, text)


def _require_finite(epoch: int, row: Row, step: int) -> None:
    """A step's loss was checked already; that of the validation can leave the numbers by itself."""
    for name, value in row.items():
        if not math.isfinite(value):
            raise Diverged(epoch, step, value, what=name)


def _record(state: TrainState, row: Row, run: TrialRun) -> None:
    """Add an epoch to the state, and write the checkpoint and the trial's table of epochs."""
    best = state.history[state.best_epoch - 1] if state.best_epoch else None
    score = None if best is None else score_of(best, run.settings)
    state.history.append(row)
    if is_better(score_of(row, run.settings), score, run.settings.mode):
        state.best_epoch = row["epoch"]
    if run.folder is None:
        return
    folder = run.folder

    def write() -> None:
        state.save(folder / "checkpoints", run.frozen_folder)
        _write_table(folder / "epochs.csv", state.history)

    write_patiently(folder, run.min_free, write, log.warning)


def _write_table(file: Path, history: Sequence[Row]) -> None:
    def write(aside: Path) -> None:
        # The name of a class may be a folder's, of any bytes.
        with aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            # Stages that were unfrozen later have learning rates in later rows only.
            names = dict.fromkeys(name for row in history for name in row)
            rows = csv.DictWriter(out, fieldnames=list(names))
            rows.writeheader()
            rows.writerows(history)

    write_atomically(file, write)
