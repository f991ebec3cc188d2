"""Optuna's study and the ledger, kept in step: what to try next, and what came of it.

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

from tuneapp.config import RunSettings, canonical_json
from tuneapp.errors import ConfigError, SpaceError
from tuneapp.ledger import Event, Ledger
from tuneapp.records import Origin, State, TrialRecord, read_records, trials_wanted
from tuneapp.space import SearchSpace

SAME_BUG_LIMIT = 3
"""When the first so many trials fail for one and the same cause, the sweep stops."""
STARTUP_TRIALS = 8
"""Ended trials, recipes included, from which TPE begins to model; before, it draws at random.
Optuna's ten would leave a sweep of sixteen trials with hardly any model at all."""


@dataclass(frozen=True)
class Proposal:
    """A trial to run: a new one, or an unfinished one that goes on."""

    trial_id: str
    params: Mapping[str, Any]


class Study:
    """Proposes trials, takes their epochs and ends, and remembers all of it in the ledger."""

    def __init__(
        self,
        space: SearchSpace,
        ledger: Ledger,
        settings: RunSettings,
        first: Sequence[tuple[Mapping[str, Any], Origin]],
        listen: Callable[[Event], None] = lambda event: None,
    ) -> None:
        """Take up the study where the ledger left it.

        Args:
            space: where trials come from.
            ledger: open for writing; its events are replayed.
            settings: the metric and the seed.
            first: parameter values to try before the sampler is asked, in order; those that lack
                some get them from the sampler.
            listen: called with each event as it is written.
        """
        self._space = space
        self._ledger = ledger
        self.settings = settings
        self._first = list(first)
        self._listen = listen
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(direction=_direction(settings))
        self._live: dict[str, optuna.Trial] = {}
        self._unfinished: deque[Proposal] = deque()
        self._ended_here: list[str] = []
        self.records = read_records(ledger.events)
        for record in self.records.values():
            self._take_up(record)

    @property
    def wanted(self) -> int:
        """Trials that the run shall have in all."""
        return trials_wanted(self._ledger.events)

    @property
    def remaining(self) -> int:
        """Trials that are still to run: unfinished ones, and ones not proposed yet."""
        open_trials = sum(r.state == "unfinished" for r in self.records.values())
        return open_trials + max(self.wanted - len(self.records), 0)

    @property
    def common_failure(self) -> str | None:
        """The cause for which all of the first trials failed since this study was taken up.

        Causes are one when their kind and their place in the code are: messages name trials.
        """
        ended = [self.records[trial_id] for trial_id in self._ended_here]
        all_failed = len(ended) >= SAME_BUG_LIMIT and all(r.state == "failed" for r in ended)
        places = {(r.cause.partition(":")[0], r.cause.rpartition("(")[2]) for r in ended}
        return ended[0].cause if all_failed and len(places) == 1 else None

    def want(self, trials: int) -> None:
        """Write down how many trials the run shall have in all."""
        self._write("sweep", trials=trials)

    def propose(self) -> Proposal | None:
        """Return the next trial to run; None when there is none left."""
        while self._unfinished:
            proposal = self._unfinished.popleft()
            if self.records[proposal.trial_id].state == "unfinished":
                return proposal
        while len(self.records) < self.wanted:
            new = self._propose_new()
            if new is not None:
                return new
        return None

    def record_epoch(self, trial_id: str, row: Mapping[str, Any]) -> bool:
        """Take an epoch of a trial; return False for one that is known already.

        Args:
            trial_id: whose epoch.
            row: its metrics, and what was applied under `applied`.
        """
        record = self.records[trial_id]
        if record.state != "unfinished" or row["epoch"] <= len(record.rows):
            return False
        plain = {k: v for k, v in row.items() if k != "applied"}
        applied = dict(row["applied"])
        if canonical_json(record.applied) != canonical_json(applied):  # unfreezing changes it
            self._write("applied", trial=trial_id, applied=applied)
        self._write("epoch", trial=trial_id, row=plain)
        self._live[trial_id].report(row[self.settings.metric], step=row["epoch"])
        return True

    def end(self, trial_id: str, state: State, cause: str = "") -> None:
        """Take the end of a trial; one that has ended already stays as it is."""
        record = self.records[trial_id]
        if record.state != "unfinished":
            return
        told = self._value_to_tell(record, state)
        self._write("ended", trial=trial_id, state=state, cause=cause, told=told)
        self._ended_here.append(trial_id)
        optuna_state, values = _as_optuna(record)
        self._study.tell(self._live.pop(trial_id), values, state=optuna_state)

    def complete(self, trial_id: str) -> None:
        """Take that a trial's function has returned: it finished, if all of its epochs are here."""
        record = self.records[trial_id]
        if len(record.rows) == record.epochs:
            self.end(trial_id, "finished")

    def frozen_trials(self) -> list[FrozenTrial]:
        """Return Optuna's view of the trials, in their order."""
        return self._study.get_trials(deepcopy=False)

    def _propose_new(self) -> Proposal | None:
        number = len(self.records)
        trial_id = f"t{number + 1:04d}"
        params, origin = self._first[number] if number < len(self._first) else ({}, "search")
        self._study.sampler = self._sampler(number)
        if params:
            self._study.enqueue_trial(dict(params))
        trial = self._study.ask()
        trial.set_user_attr("trial_id", trial_id)
        self._live[trial_id] = trial
        try:
            config = self.settings.applied_to(self._space(trial))
            # With folds, what is reported of a trial is its folds.
            epochs, mistake = self.settings.data.folds or config.epochs, ""
        except (SpaceError, ConfigError) as error:  # a corner that the probe did not see
            epochs, mistake = 0, str(error)
        self._write(
            "proposed", trial=trial_id, origin=origin, params=dict(trial.params), epochs=epochs
        )
        if mistake:
            self.end(trial_id, "failed", mistake)
            return None
        return Proposal(trial_id, dict(trial.params))

    def _sampler(self, number: int) -> BaseSampler:
        """Return the sampler of suggestion `number`: a resumed study does not repeat itself.

        The first trials need no model of the space.
        """
        seed = int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0])
        return (
            RandomSampler(seed=seed)
            if number < len(self._first)
            else TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        )

    def _take_up(self, record: TrialRecord) -> None:
        """Put a trial of the ledger into the study as if it had just been told."""
        attrs = {"trial_id": record.trial_id}
        if record.state == "unfinished":
            self._study.sampler = RandomSampler(seed=0)  # every value is given: it draws nothing
            self._study.enqueue_trial(record.params, user_attrs=attrs)
            trial = self._study.ask()
            self._live[record.trial_id] = trial
            self._unfinished.append(Proposal(record.trial_id, record.params))
            try:
                self._space(trial)
            except (SpaceError, ConfigError) as error:  # killed before its end was written down
                self.end(record.trial_id, "failed", str(error))
            for row in record.rows:
                trial.report(row[self.settings.metric], step=row["epoch"])
            return
        state, value = _as_optuna(record)
        try:
            distributions = self._space.replay(record.params).distributions
        except (SpaceError, ConfigError):  # it failed for that: the study learns nothing from it
            distributions = {}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                # What Optuna itself gives a pruned trial: its last value.
                value=record.rows[-1][self.settings.metric] if state.name == "PRUNED" else value,
                params={k: v for k, v in record.params.items() if k in distributions},
                distributions=distributions,
                intermediate_values={r["epoch"]: r[self.settings.metric] for r in record.rows},
                user_attrs=attrs,
            )
        )

    def _value_to_tell(self, record: TrialRecord, state: State) -> float | None:
        """Return what the sampler shall think of a trial.

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
        trial_id = fields.get("trial")
        if event == "proposed":
            self.records |= read_records([written])
        elif trial_id is not None:
            self.records[trial_id].apply(written)
        self._listen(written)


def _direction(settings: RunSettings) -> StudyDirection:
    return StudyDirection.MAXIMIZE if settings.mode == "max" else StudyDirection.MINIMIZE


def _as_optuna(record: TrialRecord) -> tuple[TrialState, float | None]:
    """Return the state and value under which Optuna knows an ended trial."""
    if record.state == "finished":
        return TrialState.COMPLETE, record.told
    if record.state == "stopped":
        last = record.rows[-1] if record.rows else None
        return TrialState.PRUNED if last else TrialState.FAIL, None
    if record.state == "diverged" and record.told is not None and math.isfinite(record.told):
        return TrialState.COMPLETE, record.told
    return TrialState.FAIL, None


def parameter_importances(
    space: SearchSpace, records: Sequence[TrialRecord], settings: RunSettings
) -> dict[str, float]:
    """Return Optuna's PED-ANOVA importances over the trials that have a score.

    Stopped trials count by their best epoch: without them, little is left of a sweep.

    Raises:
        SpaceError: fewer than two trials have a score.
    """
    study = optuna.create_study(direction=_direction(settings))
    for record in records:
        best = record.best(settings)
        if best is not None:
            study.add_trial(
                optuna.trial.create_trial(
                    params=record.params,
                    distributions=space.replay(record.params).distributions,
                    value=best[settings.metric],
                )
            )
    if len(study.trials) < 2:
        raise SpaceError("importances need at least two trials with a score")
    return optuna.importance.get_param_importances(study)
