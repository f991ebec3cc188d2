"""Ray Tune's two questions, answered from our study: what to try next, and whether to stop.

`Proposer` is a Ray searcher over `study.Study`, `Stopper` Ray's ASHA over the same study. Neither
keeps state of its own that could be lost: after a restart both are made again from the ledger.
"""

import json
import math
import time
from typing import Any, Literal, NamedTuple

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuneapp.ledger import Event
from tuneapp.study import Study
from tuneapp.trainable import MESSAGE, SCORE

REDUCTION_FACTOR = 3
"""The better third of the trials goes on at each rung."""
GRACE_SHARE = 0.25
"""No trial is stopped in the first quarter of the longest training: warm-ups lie there."""


class Driver:
    """Keeps the study in the driver's process: Ray pickles searchers and schedulers now and then.

    Its copies are never read (a resumed sweep is built from the ledger), so they hold nothing.
    """

    def __init__(self, study: Study, run_dir: str) -> None:
        self.study = study
        self.run_dir = run_dir

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class Proposer(Searcher):
    """Hands Ray the study's proposals as assignments for `trainable.train_trial`."""

    def __init__(self, driver: Driver, mode: str) -> None:
        super().__init__(metric=SCORE, mode=mode)
        self._driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next assignment; Ray's own trial id plays no part in it."""
        proposal = self._driver.study.propose()
        if proposal is None:
            return str(Searcher.FINISHED)
        return {
            "run_dir": self._driver.run_dir,
            "trial_id": proposal.trial_id,
            "params": dict(proposal.params),
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the stopper hears of every end, and of every result before it."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: a resumed sweep makes a new proposer from the ledger."""


class _Named(NamedTuple):
    """What ASHA reads of a trial, under our id instead of Ray's."""

    trial_id: str


class Stopper(AsyncHyperBandScheduler):
    """ASHA over our records: judges a trial by its best epoch so far, never stops a recipe.

    It is also where every result of a trial arrives first, and so where epochs and ends enter the
    ledger: an epoch is written down before it is judged.

    Source: L. Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
    """

    def __init__(
        self, driver: Driver, max_epochs: int, mode: str, step: Literal["epoch", "fold"] = "epoch"
    ) -> None:
        """Rebuild the rungs from the epochs in the ledger, and stop what should have been.

        Args:
            driver: the study.
            max_epochs: the longest training of any trial, in what is reported.
            mode: whether a larger or a smaller score is better.
            step: what is reported: one fold alone says too little to stop a trial by it.
        """
        super().__init__(
            time_attr="epoch",
            metric=SCORE,
            mode=mode,
            max_t=max_epochs,
            grace_period=max(1 if step == "epoch" else 2, math.ceil(GRACE_SHARE * max_epochs)),
            reduction_factor=REDUCTION_FACTOR,
        )
        self._driver = driver
        self._step = step

    def replay(self, events: list[Event]) -> None:
        """Judge the epochs of a ledger again, in their order."""
        for event in events:
            if event["event"] == "epoch":
                self._judge(event["trial"], event["row"]["epoch"])

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: a trial enters the rungs with its first epoch."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Write the epoch down, and say whether the trial goes on."""
        study, trial_id = self._driver.study, trial.config["trial_id"]
        message = json.loads(result[MESSAGE])
        if "ended" in message:
            study.end(trial_id, message["ended"], message["cause"])
        elif study.record_epoch(trial_id, message):
            return self._judge(trial_id, message["epoch"])
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Take that the trial's function has returned, or was stopped."""
        self._driver.study.complete(trial.config["trial_id"])

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Take that the trial raised (which it has told already), or that its process died."""
        cause = "the trial's process died; see its log.txt, and the kernel's log for out of memory"
        self._driver.study.end(trial.config["trial_id"], "failed", cause)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: the rungs keep what a trial has shown."""

    def _judge(self, trial_id: str, epoch: int) -> str:
        """Ask ASHA about a trial at an epoch, and write down a stop."""
        study, named = self._driver.study, _Named(trial_id)
        record = study.records[trial_id]
        best = record.best(study.settings, up_to=epoch)
        assert best is not None
        if trial_id not in self._trial_info:
            super().on_trial_add(None, named)
        score = best[study.settings.metric]
        action = super().on_trial_result(None, named, {"epoch": epoch, SCORE: score})
        may_stop = record.origin == "search" and epoch < record.epochs
        if action == TrialScheduler.STOP and may_stop:
            rung = max(m for m, _ in self._brackets[0]._rungs if m <= epoch)
            cause = (
                f"{study.settings.metric} {score:.4f} was not in the better third at "
                f"{self._step} {rung:g}"
            )
            study.end(trial_id, "stopped", cause)
            return str(action)
        return str(TrialScheduler.CONTINUE)


class Until(tune.Stopper):
    """Ends the whole sweep at a deadline, or when every trial fails for the same cause."""

    def __init__(self, driver: Driver, deadline: float | None) -> None:
        """Take a deadline in seconds of `time.monotonic`; None is none."""
        self._driver = driver
        self._deadline = deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial: that is the stopper's work."""
        return False

    def stop_all(self) -> bool:
        """Say whether the sweep is over."""
        return self.is_late or self._driver.study.common_failure is not None

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self._deadline is not None and time.monotonic() >= self._deadline
