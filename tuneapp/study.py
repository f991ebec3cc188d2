"""Optuna's study and the ledger, kept in step: what to try next, and its result.

The ledger is written first and is the truth; the study is fed from it, live and after a restart
alike. This module knows nothing of Ray, so search logic is tested without it.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuneapp.config import RunSettings, TrialConfig, canonical_json
from tuneapp.errors import ConfigError, SpaceError
from tuneapp.failures import MAX_RETRIES, Failure, would_repeat
from tuneapp.ledger import Event, Events
from tuneapp.mirror import StudyMirror
from tuneapp.records import (
    Origin,
    State,
    TrialRecord,
    is_exhausted,
    read_records,
    take,
    trials_to_go,
    trials_wanted,
)
from tuneapp.space import SearchSpace

SAME_BUG_LIMIT = 3
"""If this many first trials fail for the same cause, the sweep stops."""
STARTUP_TRIALS = 8
"""Ended trials, recipes included, from which TPE begins to model; before, it samples at random.
Optuna's ten would leave a sweep of sixteen trials with hardly any model."""
MEMORY = "memory"
"""Name of the constraint that a trial violates by running out of memory."""
_OUTSIDE = "it lies outside the space as refined"
"""Why a trial that was unfinished when its run was refined has ended."""


@dataclass(frozen=True)
class Proposal:
    """A trial to run: a new one, or an unfinished one to resume."""

    trial_id: str
    params: Mapping[str, Any]
    space: int = 1


class Study:
    """Proposes trials, takes their epochs and ends, and records all of it in the ledger."""

    def __init__(
        self,
        space: SearchSpace,
        ledger: Events,
        settings: RunSettings,
        first: Sequence[tuple[Mapping[str, Any], Origin]],
        listen: Callable[[Event], None] = lambda event: None,
        *,
        hash_of: Callable[[TrialConfig], str] | None = None,
        mirror: StudyMirror | None = None,
        space_number: int = 1,
    ) -> None:
        """Continue the study from the ledger.

        Args:
            space: where trials come from.
            ledger: open for writing; its events are replayed.
            settings: the metric and the seed.
            first: parameter values to try before the sampler is asked, in order; those that lack
                some get them from the sampler.
            listen: called with each event as it is written.
            hash_of: of equal texts for two configurations, the second is a duplicate; None goes
                by all of their fields.
            mirror: a file for `optuna-dashboard`, kept in step.
            space_number: of `space` within the run; larger than 1 after it was refined.
        """
        self._space = space
        self._ledger = ledger
        self.settings = settings
        self._listen = listen
        self._hash_of = hash_of or _hash_of_all
        self._mirror = mirror
        self._space_number = space_number
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(direction=_direction(settings))
        self._live: dict[str, optuna.Trial] = {}
        self._unfinished: deque[Proposal] = deque()
        self._bugs: list[str] = []
        self._has_other_ends = False
        self._wanted = trials_wanted(ledger.events)
        self.records = read_records(ledger.events)
        self._by_hash: dict[str, str] = {}
        self._first = self._not_known(first)
        for record in self.records.values():
            self._take_up(record)
        for record in self.records.values():
            if record.twin and record.state == "unfinished":
                self._settle_twins(self.records[record.twin])
        if mirror is not None:
            mirror.open(self.frozen_trials(), _direction(settings))

    @property
    def wanted(self) -> int:
        """Trials that the run is to have in total."""
        return self._wanted

    @property
    def remaining(self) -> int:
        """Trials that are still to run: unfinished ones, and ones not proposed yet."""
        exhausted = is_exhausted(self._ledger.events)
        return trials_to_go(self.records.values(), self.wanted, exhausted=exhausted)

    @property
    def common_failure(self) -> str | None:
        """The cause for which all of the first trials failed since this study was opened.

        Causes are one when their kind and their place in the code are: messages name trials.
        """
        if self._has_other_ends or len(self._bugs) < SAME_BUG_LIMIT:
            return None
        places = {(cause.partition(":")[0], cause.rpartition("(")[2]) for cause in self._bugs}
        return self._bugs[0] if len(places) == 1 else None

    def want(self, trials: int) -> None:
        """Record how many trials the run is to have in total."""
        self._write("sweep", trials=trials)
        self._wanted = trials

    def propose(self) -> Proposal | None:
        """Return the next trial to run; None if there is none now.

        Until `remaining` is 0 there may be one later: a trial that runs may have to be run again.
        """
        while self._unfinished:
            proposal = self._unfinished.popleft()
            if self.records[proposal.trial_id].state == "unfinished":
                return proposal
        while self._may_propose_new():
            new = self._propose_new()
            if new is not None:
                return new
        return None

    def record_epoch(
        self, trial_id: str, row: Mapping[str, Any], warnings: Sequence[str] = ()
    ) -> bool:
        """Take an epoch of a trial; return False for one that is known already.

        Args:
            trial_id: whose epoch.
            row: its metrics, and what was applied under `applied`.
            warnings: what the user should know of how it came about.
        """
        record = self.records[trial_id]
        for text in warnings:
            if text not in record.warnings:
                self._write("warned", trial=trial_id, text=text)
        if record.state != "unfinished" or row["epoch"] <= len(record.rows):
            return False
        plain = {k: v for k, v in row.items() if k != "applied"}
        applied = dict(row["applied"])
        # Unfreezing changes it; an older version's checkpoint lacks it.
        if applied and canonical_json(record.applied) != canonical_json(applied):
            self._write("applied", trial=trial_id, applied=applied)
        self._write("epoch", trial=trial_id, row=plain)
        self._live[trial_id].report(row[self.settings.metric], step=row["epoch"])
        self._show(self._live[trial_id].number)
        return True

    def end(self, trial_id: str, state: State, cause: str = "", kind: str = "") -> None:
        """Take the end of a trial; one that has ended already stays as it is."""
        record = self.records[trial_id]
        if record.state != "unfinished":
            return
        told = self._value_to_tell(record, state)
        self._write("ended", trial=trial_id, state=state, cause=cause, kind=kind, told=told)
        if not record.is_history:
            # Running out of memory depends on the configuration: the search learns from it.
            is_bug = state == "failed" and kind != "out of memory"
            self._bugs += [cause] if is_bug else []
            self._has_other_ends |= not is_bug
        self._tell(record)
        self._settle_twins(record)

    def fail(self, trial_id: str, failure: Failure) -> None:
        """Record that a trial failed: it is retried if that may help, or ends."""
        record = self.records[trial_id]
        if record.state != "unfinished":
            return
        if failure.can_pass and record.retries < MAX_RETRIES:
            self._write("retried", trial=trial_id, kind=failure.kind, cause=failure.cause)
            self._unfinished.appendleft(Proposal(trial_id, record.params, record.space))
            return
        self.end(trial_id, failure.state, failure.cause, failure.kind)

    def put_back(self) -> None:
        """Record that no trial is running: those that have not ended are proposed again first."""
        self._unfinished = deque(
            Proposal(r.trial_id, r.params, r.space)
            for r in self.records.values()
            if r.state == "unfinished" and not r.twin
        )

    def complete(self, trial_id: str) -> None:
        """Record that a trial's function has returned: it finished if it has all epochs."""
        record = self.records[trial_id]
        if len(record.rows) == record.epochs:
            self.end(trial_id, "finished")

    def frozen_trials(self) -> list[FrozenTrial]:
        """Return Optuna's view of the trials, in their order."""
        return self._study.get_trials(deepcopy=False)

    def _may_propose_new(self) -> bool:
        num_run = sum(not record.twin for record in self.records.values())
        return num_run < self.wanted and not is_exhausted(self._ledger.events)

    def _propose_new(self) -> Proposal | None:
        trial_id = f"t{len(self.records) + 1:04d}"
        place = sum(r.space == self._space_number for r in self.records.values())
        params, origin = self._first[place] if place < len(self._first) else ({}, "search")
        self._study.sampler = self._sampler(len(self.records), is_given=place < len(self._first))
        if params:
            self._study.enqueue_trial(dict(params))
        trial = self._study.ask()
        trial.set_user_attr("trial_id", trial_id)
        self._live[trial_id] = trial
        config_hash, epochs, mistake = "", 0, ""
        try:
            config = self.settings.applied_to(self._space(trial))
            # With folds, what is reported of a trial is its folds.
            epochs = self.settings.data.folds or config.epochs
            config_hash = self._hash_of(config)
        except (SpaceError, ConfigError) as error:  # a corner case that the probe did not reach
            mistake = str(error)
        twin = "" if mistake else self._twin_of(config_hash)
        self._write(
            "proposed",
            trial=trial_id,
            origin=origin,
            params=dict(trial.params),
            epochs=epochs,
            config_hash=config_hash,
            twin=twin,
            space=self._space_number,
        )
        self._show(trial.number)
        if mistake:
            self.end(trial_id, "failed", mistake, "refused")
            return None
        if twin:
            self._settle_twins(self.records[twin])
            return None
        self._by_hash[config_hash] = trial_id
        return Proposal(trial_id, dict(trial.params), self._space_number)

    def _twin_of(self, config_hash: str) -> str:
        """Return the earlier trial of this configuration whose result can be reused."""
        twin = self._by_hash.get(config_hash, "")
        if not twin or (record := self.records[twin]).state != "failed":
            return twin
        return twin if would_repeat(record.kind) else ""

    def _settle_twins(self, record: TrialRecord) -> None:
        """End the duplicates of a trial that has ended, with its result."""
        if record.state == "unfinished":
            return
        for other in self.records.values():
            if other.twin == record.trial_id and other.state == "unfinished":
                cause = f"the same as {record.trial_id}: not run again"
                self._write(
                    "ended", trial=other.trial_id, state="duplicate", cause=cause, kind="",
                    told=record.told,
                )  # fmt: skip
                self._tell(other)

    def _tell(self, record: TrialRecord) -> None:
        """Tell Optuna the end of a trial that it knows as running."""
        trial = self._live.pop(record.trial_id, None)
        if trial is None:  # of an earlier space
            return
        shown = self.records[record.twin] if record.twin else record
        if record.twin:
            for row in shown.rows:
                trial.report(row[self.settings.metric], step=row["epoch"])
        state, value = _as_optuna(shown)
        if shown.kind == "out of memory":
            trial.set_constraint(MEMORY, 1.0)
        self._study.tell(trial, value, state=state)
        self._show(trial.number)

    def _show(self, number: int) -> None:
        if self._mirror is not None:
            self._mirror.update(self.frozen_trials()[number])

    def _not_known(
        self, first: Sequence[tuple[Mapping[str, Any], Origin]]
    ) -> list[tuple[Mapping[str, Any], Origin]]:
        """Return the recipes, without those that earlier spaces of the run have tried."""
        known = set()
        for record in self.records.values():
            shown = self.records[record.twin] if record.twin else record
            is_tried = shown.state != "failed" or would_repeat(shown.kind)
            if record.space < self._space_number and is_tried and not _is_cut_short(shown):
                known.add(record.config_hash)
        if not known:
            return list(first)
        return [
            (params, origin) for params, origin in first if self._hash_or_none(params) not in known
        ]

    def _hash_or_none(self, params: Mapping[str, Any]) -> str | None:
        try:
            return self._hash_of(self.settings.applied_to(self._space.config(params)))
        except (SpaceError, ConfigError):  # values are missing: only the sampler knows which
            return None

    def _sampler(self, number: int, is_given: bool) -> BaseSampler:
        """Return the sampler of suggestion `number`: a resumed study does not repeat itself.

        Values that are given need no model of the space.
        """
        seed = int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0])
        if is_given:
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)

    def _take_up(self, record: TrialRecord) -> None:
        """Add a trial of the ledger to the study as if it had just been reported."""
        if record.config_hash and not record.twin and not _is_cut_short(record):
            self._by_hash[record.config_hash] = record.trial_id
        if record.is_history:
            if record.state == "unfinished":
                self.end(record.trial_id, "stopped", _OUTSIDE)
            return
        if record.state == "unfinished":
            self._take_up_unfinished(record)
            return
        shown = self.records[record.twin] if record.twin else record
        state, value = _as_optuna(shown)
        try:
            distributions = self._space.covered(record.params).distributions
        except (SpaceError, ConfigError):  # so it failed: the study learns nothing from it
            distributions = {}
        if state is TrialState.PRUNED:  # as Optuna itself does: its last value
            value = shown.rows[-1][self.settings.metric] if shown.rows else None
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=value,
                params={k: v for k, v in record.params.items() if k in distributions},
                distributions=distributions,
                intermediate_values={r["epoch"]: r[self.settings.metric] for r in shown.rows},
                user_attrs={"trial_id": record.trial_id},
                constraints={MEMORY: 1.0} if shown.kind == "out of memory" else None,
            )
        )

    def _take_up_unfinished(self, record: TrialRecord) -> None:
        self._study.sampler = RandomSampler(seed=0)  # every value is given: it samples nothing
        self._study.enqueue_trial(record.params, user_attrs={"trial_id": record.trial_id})
        trial = self._study.ask()
        self._live[record.trial_id] = trial
        if not record.twin:
            self._unfinished.append(Proposal(record.trial_id, record.params, record.space))
        try:
            self._hash_of(self.settings.applied_to(self._space(trial)))
        except (SpaceError, ConfigError) as error:  # killed before its end was recorded
            self.end(record.trial_id, "failed", str(error), "refused")
        for row in record.rows:
            trial.report(row[self.settings.metric], step=row["epoch"])

    def _value_to_tell(self, record: TrialRecord, state: State) -> float | None:
        """Return how the sampler is to see a trial.

        A finished trial counts by its best epoch, a diverged one as the worst that was seen: a
        failure of the search's own making that it must learn from.
        """
        best = record.best(self.settings)
        if state == "finished":
            assert best is not None
            return float(best[self.settings.metric])
        if state != "diverged":
            return None
        seen = [r[self.settings.metric] for t in self.records.values() for r in t.rows]
        if not seen:
            return None
        return float(min(seen) if self.settings.mode == "max" else max(seen))

    def _write(self, event: str, **fields: Any) -> None:
        written = self._ledger.append(event, **fields)
        take(self.records, written)
        self._listen(written)


def _hash_of_all(config: TrialConfig) -> str:
    return canonical_json(config.as_dict())


def _is_cut_short(record: TrialRecord) -> bool:
    """Whether a trial has no result only because it lies outside the space as refined."""
    if record.state == "unfinished":
        return record.is_history  # it is about to be ended
    return record.state == "stopped" and record.cause == _OUTSIDE


def _direction(settings: RunSettings) -> StudyDirection:
    return StudyDirection.MAXIMIZE if settings.mode == "max" else StudyDirection.MINIMIZE


def _as_optuna(record: TrialRecord) -> tuple[TrialState, float | None]:
    """Return the state and value under which Optuna knows an ended trial."""
    if record.state == "finished":
        return TrialState.COMPLETE, record.told
    if record.kind == "out of memory":  # with a violated constraint: infeasible
        return TrialState.PRUNED, None
    if record.state == "stopped":
        return TrialState.PRUNED if record.rows else TrialState.FAIL, None
    if record.state == "diverged" and record.told is not None and math.isfinite(record.told):
        return TrialState.COMPLETE, record.told
    return TrialState.FAIL, None


def parameter_importances(
    space: SearchSpace, records: Sequence[TrialRecord], settings: RunSettings
) -> dict[str, float]:
    """Return Optuna's PED-ANOVA importances over the trials that have a score.

    Stopped trials count by their best epoch: without them, few trials would remain.

    Raises:
        SpaceError: fewer than two trials have a score.
    """
    study = optuna.create_study(direction=_direction(settings))
    for record in records:
        best = record.best(settings)
        if best is not None:
            asked = space.covered(record.params)
            study.add_trial(
                optuna.trial.create_trial(
                    params=asked.params,
                    distributions=asked.distributions,
                    value=best[settings.metric],
                )
            )
    if len(study.trials) < 2:
        raise SpaceError("importances need at least two trials with a score")
    return optuna.importance.get_param_importances(study)
