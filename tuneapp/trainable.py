"""What Ray runs: an assignment to a trial of a run directory, and reports back.

Checkpoints do not travel through Ray: a trial finds its own in its folder, so that a trial that is
run again, by whomever, goes on from there.
"""

import json
import logging
import os
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ray import tune

from tuneapp.checkpoint import Row
from tuneapp.failures import Failure, classify
from tuneapp.folds import run_whole
from tuneapp.prepare import assemble
from tuneapp.rundir import log_to, open_run

SCORE = "score"
"""The value that Ray wants with every report; our stopper judges by our records instead."""
MESSAGE = "message"
"""What is really told, as JSON: Ray flattens nested dicts, and joins their keys by `/`."""

LOCK_WAIT_S = 30.0
"""A trial of a killed sweep can live on for some seconds; the next attempt waits for its end."""


def train_trial(assignment: dict[str, Any]) -> None:
    """Run the trial `assignment["trial_id"]` of `assignment["run_dir"]`, reporting to Ray Tune.

    What is told: `{"began": process id}`, then `{"row": ...}` for each epoch, and where it cannot
    go on `{"failed": ...}`; beside each, under `warnings`, what was logged as one.
    """
    run, record = open_run(Path(assignment["run_dir"]))
    trial_id = assignment["trial_id"]
    gpus = tune.get_context().get_trial_resources().required_resources.get("GPU", 0)
    folder = run.trial(trial_id)
    folder.mkdir(parents=True, exist_ok=True)
    warnings = _Warnings()

    def tell(score: float = 0.0, **message: Any) -> None:
        tune.report({MESSAGE: json.dumps({**message, "warnings": warnings.take()}), SCORE: score})

    def report(row: Row) -> None:
        tell(row[record.settings.metric], row=row)

    def report_failure(failure: Failure) -> None:
        tell(
            failed={"kind": failure.kind, "cause": failure.cause, "can_pass": failure.can_pass},
        )

    tell(began=os.getpid())
    try:
        with (
            FileLock(folder / ".lock", timeout=LOCK_WAIT_S),
            log_to(folder / "log.txt"),
            warnings,
        ):
            config, trial_run = assemble(
                run,
                record,
                trial_id,
                assignment["params"],
                has_gpu=gpus > 0,
                space=assignment["space"],
            )
            run_whole(config, trial_run, report)
    except Timeout:
        cause = f"an earlier process of this trial did not end within {LOCK_WAIT_S:.0f} s"
        report_failure(Failure("process died", cause, can_pass=True))
    except Exception as error:
        failure = classify(error, folder)
        report_failure(failure)
        if failure.state == "failed":
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            raise  # so that Ray does not use this process again


class _Warnings(logging.Handler):
    """Collects what a trial logs as a warning, while it is open, for the driver to tell."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())

    def take(self) -> list[str]:
        """Return what came since the last time."""
        texts, self._texts = self._texts, []
        return texts

    def __enter__(self) -> None:
        logging.getLogger("tuneapp").addHandler(self)

    def __exit__(self, *exit_reason: object) -> None:
        logging.getLogger("tuneapp").removeHandler(self)
