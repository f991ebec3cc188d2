"""Ray Tune's two decisions, made by our study: what to try next, and whether to stop.

`Proposer` is a Ray searcher over `study.Study`, `Stopper` Ray's ASHA over the same study. Neither
keeps state that could be lost: after a restart both are rebuilt from the ledger.
"""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuneapp.failures import Failure
from tuneapp.keeping import Keeper
from tuneapp.ledger import Event
from tuneapp.ray_session import OwnRay
from tuneapp.room import free_bytes, say_bytes
from tuneapp.study import Study
from tuneapp.trainable import MESSAGE, SCORE
from tuneapp.watchdog import Watchdog, kernel_memory_kills, why_it_died

log = logging.getLogger(__name__)

REDUCTION_FACTOR = 3
"""The better third of the trials continues at each rung."""
GRACE_SHARE = 0.25
"""No trial is stopped in the first quarter of the longest training, where most warm-ups lie."""


class Driver:
    """Keeps the study in the driver's process: Ray pickles searchers and schedulers at times.

    Its copies are never read (a resumed sweep is built from the ledger), so they hold nothing.
    """

    def __init__(
        self, study: Study, run_dir: str, min_free: int = 0, keeper: Keeper | None = None
    ) -> None:
        """Take a run's study, and how many bytes of its disk must be free for trials to start.

        Args:
            study: of the run.
            run_dir: its directory.
            min_free: bytes; below it the sweep pauses.
            keeper: of the checkpoints; None keeps all.
        """
        self.study = study
        self.run_dir = run_dir
        self.watchdog = Watchdog()
        self.ray: OwnRay | None = None
        self.is_stopping = False
        self._min_free = min_free
        self._keeper = keeper
        self._is_paused = False
        self._memory_kills = kernel_memory_kills()

    def has_room(self) -> bool:
        """Whether the disk has room for trials to start; logs when that changes."""
        free = free_bytes(Path(self.run_dir))
        if (free < self._min_free) != self._is_paused:
            self._is_paused = not self._is_paused
            has = f"{say_bytes(free)} free for {self.run_dir}"
            if self._is_paused:
                self.tidy()  # what could not be removed before may be removable now
                log.warning("disk      %s: waiting for %s", has, say_bytes(self._min_free))
            else:
                log.warning("disk      %s: continuing", has)
        return not self._is_paused

    def stop(self) -> None:
        """Start no further trial."""
        self.is_stopping = True

    def no_longer_runs(self, ray_id: str) -> None:
        """Record that a trial has stopped running: its checkpoints may not be needed any more.

        Args:
            ray_id: Ray's own id, different for each attempt at a trial.
        """
        self.watchdog.ended(ray_id)
        self.tidy()

    def tidy(self) -> None:
        """Remove checkpoints that are not needed any more."""
        if self._keeper is not None:
            self._keeper.tidy(self.study.records)

    def new_memory_kills(self) -> int:
        """Return how many processes the kernel ended for lack of memory since the last call."""
        before, self._memory_kills = self._memory_kills, kernel_memory_kills()
        return self._memory_kills - before

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class Proposer(Searcher):
    """Hands Ray the study's proposals as assignments for `trainable.train_trial`."""

    def __init__(self, driver: Driver, mode: str) -> None:
        super().__init__(metric=SCORE, mode=mode)
        self._driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next assignment; Ray's own trial id is not used.

        None means "not now": the disk is full, or all remaining trials are running, and may have
        to be run again.
        """
        study = self._driver.study
        if study.remaining == 0 or self._driver.is_stopping:
            return str(Searcher.FINISHED)
        if not self._driver.has_room():
            return None
        proposal = study.propose()
        if proposal is None:
            return None if study.remaining else str(Searcher.FINISHED)
        return {
            "run_dir": self._driver.run_dir,
            "trial_id": proposal.trial_id,
            "params": dict(proposal.params),
            "space": proposal.space,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record that a trial has stopped running; the stopper knows how it ended."""
        self._driver.no_longer_runs(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: a resumed sweep makes a new proposer from the ledger."""


class _Named(NamedTuple):
    """The part of a trial that ASHA reads, with our id instead of Ray's."""

    trial_id: str


class Stopper(AsyncHyperBandScheduler):
    """ASHA over our records: judges a trial by its best epoch so far, never stops a recipe.

    Every result of a trial arrives here first, so epochs and ends enter the ledger here: an epoch
    is recorded before it is judged.

    Source: L. Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
    """

    def __init__(
        self, driver: Driver, max_epochs: int, mode: str, step: Literal["epoch", "fold"] = "epoch"
    ) -> None:
        """Rebuild the rungs from the epochs in the ledger, and stop trials that should have been.

        Args:
            driver: the study.
            max_epochs: the longest training of any trial, in what is reported.
            mode: whether a larger or a smaller score is better.
            step: what is reported: one fold alone is too little evidence to stop a trial.
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
        self._told_failures: set[str] = set()
        """Ray's ids of trials that have reported a failure, and are about to raise or return."""

    def replay(self, events: list[Event]) -> None:
        """Judge the epochs of a ledger again, in order."""
        records = self._driver.study.records
        for event in events:
            if event["event"] == "epoch" and not records[event["trial"]].is_history:
                self._judge(event["trial"], event["row"]["epoch"])

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: a trial enters the rungs with its first epoch."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Record the epoch, and decide whether the trial continues."""
        study, trial_id = self._driver.study, trial.config["trial_id"]
        message = json.loads(result[MESSAGE])
        if "began" in message:
            self._driver.watchdog.began(trial.trial_id, message["began"], trial_id)
        elif "failed" in message:
            failure = Failure(**message["failed"])
            study.fail(trial_id, failure)
            if failure.state == "failed":
                self._told_failures.add(trial.trial_id)
        else:
            self._driver.watchdog.heard(trial.trial_id)
            row = message["row"]
            if study.record_epoch(trial_id, row, message["warnings"]):
                return self._judge(trial_id, row["epoch"])
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Record that the trial's function has returned."""
        study, trial_id = self._driver.study, trial.config["trial_id"]
        if trial.trial_id in self._told_failures:
            self._told_failures.remove(trial.trial_id)
            return
        study.complete(trial_id)
        if study.records[trial_id].state == "unfinished":
            study.fail(trial_id, Failure("bug", "it returned before its last epoch"))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Record that the trial raised (which it reported before), or that its process died."""
        trial_id = trial.config["trial_id"]
        stalled = self._driver.watchdog.ended(trial.trial_id)
        if trial.trial_id in self._told_failures:
            self._told_failures.remove(trial.trial_id)
            return
        memory_kills = self._driver.new_memory_kills()
        self._driver.study.fail(
            trial_id, stalled or why_it_died(_what_ray_says(trial), memory_kills)
        )

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: the rungs keep a trial's scores."""

    def _judge(self, trial_id: str, epoch: int) -> str:
        """Ask ASHA about a trial at an epoch, and record a stop."""
        study, named = self._driver.study, _Named(trial_id)
        record = study.records[trial_id]
        best = record.best(study.settings, up_to=epoch)
        assert best is not None
        if trial_id not in self._trial_info:
            super().on_trial_add(None, named)
        score = best[study.settings.metric]
        action = super().on_trial_result(None, named, {"epoch": epoch, SCORE: score})
        # At its last rung ASHA ends every trial; one may be longer than any that was foreseen.
        may_stop = record.origin == "search" and epoch < min(record.epochs, self._max_t)
        if action == TrialScheduler.STOP and may_stop:
            rung = max(m for m, _ in self._brackets[0]._rungs if m <= epoch)
            cause = (
                f"{study.settings.metric} {score:.4f} was not in the better third at "
                f"{self._step} {rung:g}"
            )
            study.end(trial_id, "stopped", cause)
            return str(action)
        return str(TrialScheduler.CONTINUE)


def _what_ray_says(trial: Any) -> str:
    """Return Ray's message on a trial's error; empty if there is none."""
    file = getattr(trial, "error_file", None)
    try:
        return "" if file is None else Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class Until(tune.Stopper):
    """Ends the whole sweep at a deadline, or when every trial fails for the same cause.

    Ray calls it several times a second, so it also watches the sweep's processes.
    """

    def __init__(self, driver: Driver, deadline: float | None) -> None:
        """Take a deadline in seconds of `time.monotonic`; None: no deadline."""
        self._driver = driver
        self._deadline = deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial: the stopper does that."""
        return False

    def stop_all(self) -> bool:
        """Return whether the sweep is over.

        Raises:
            RayDied: one of Ray's own processes has ended.
        """
        driver = self._driver
        if driver.ray is not None:
            driver.ray.require_alive()
        driver.watchdog.look(excused=not driver.has_room())
        is_over = self.is_late or driver.study.common_failure is not None
        if is_over:
            driver.stop()
        return is_over

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self._deadline is not None and time.monotonic() >= self._deadline
