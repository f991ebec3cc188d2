"""What Ray runs: an assignment to a trial of a run directory, and reports back.

Checkpoints do not travel through Ray: a trial finds its own in its folder, so that a trial that is
run again, by whomever, goes on from there.
"""

import json
import traceback
from pathlib import Path
from typing import Any

from filelock import FileLock
from ray import tune

from tuneapp.checkpoint import Row
from tuneapp.errors import Diverged, say_cause
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
    """Run the trial `assignment["trial_id"]` of `assignment["run_dir"]`, reporting to Ray Tune."""
    run, record = open_run(Path(assignment["run_dir"]))
    trial_id = assignment["trial_id"]
    gpus = tune.get_context().get_trial_resources().required_resources.get("GPU", 0)
    folder = run.trial(trial_id)
    folder.mkdir(parents=True, exist_ok=True)

    def report(row: Row) -> None:
        tune.report({MESSAGE: json.dumps(row), SCORE: row[record.settings.metric]})

    def report_end(state: str, cause: str) -> None:
        tune.report({MESSAGE: json.dumps({"ended": state, "cause": cause}), SCORE: 0.0})

    try:
        with FileLock(folder / ".lock", timeout=LOCK_WAIT_S), log_to(folder / "log.txt"):
            config, trial_run = assemble(
                run, record, trial_id, assignment["params"], has_gpu=gpus > 0
            )
            run_whole(config, trial_run, report)
    except Diverged as error:
        report_end("diverged", str(error))
    except Exception as error:
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        report_end("failed", say_cause(error))
        raise  # so that Ray does not use this process again
