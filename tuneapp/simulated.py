"""A sweep without training: recorded learning curves, played through the real search and stopper.

What a setting of the search is worth, and whether an interrupted sweep ends the same way, are
questions about thousands of trials. Here a trial is a known curve, and the machine is a number of
slots with a simulated clock; the study, the stopper and the ledger are those of a real sweep. So
thousands of trials take seconds, and the same call gives the same sweep.
"""

import bisect
import heapq
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tuneapp.config import RunSettings, canonical_json
from tuneapp.failures import Failure
from tuneapp.ledger import Event, Events, read_events
from tuneapp.records import Origin, TrialRecord, best_record, read_records, trials_wanted
from tuneapp.rundir import open_run
from tuneapp.space import SearchSpace
from tuneapp.study import Study

# First, as in sweep.py: it sets what Ray reads when it is imported.
import tuneapp.ray_session  # noqa: F401  # isort: skip
from tuneapp.search import Driver, Stopper  # isort: skip
from tuneapp.trainable import MESSAGE, SCORE  # isort: skip

MADE_UP_SPACE = """
from tuneapp.config import AdamW, Sgd, TrialConfig


def search_space(trial):
    depth = trial.suggest_int("freeze_depth", 0, 5)
    if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "adamw":
        optimizer = AdamW(lr=trial.suggest_float("adamw.lr", 1e-5, 1e-1, log=True))
    else:
        optimizer = Sgd(lr=trial.suggest_float("sgd.lr", 1e-4, 1.0, log=True))
    return TrialConfig(model="resnet18", freeze_depth=depth, optimizer=optimizer, epochs=9)
"""
"""A space for which `made_up_curves` knows the curves: nine epochs, with a conditional part."""


@dataclass(frozen=True)
class Curve:
    """What a trial would show, epoch by epoch, and what would come between.

    Attributes:
        values: of the run's metric after each epoch; of a longer training, the last one stays.
        seconds: what an epoch takes, by the clock of the simulated machine.
        failure: what happens instead of the epoch after `fails_after`; None is nothing.
        fails_after: epochs done before that.
        times: how many attempts end this way, for a transient failure.
    """

    values: tuple[float, ...]
    seconds: float = 1.0
    failure: Failure | None = None
    fails_after: int = 0
    times: int = 1

    def __post_init__(self) -> None:
        if not self.values and (self.failure is None or self.failure.can_pass):
            raise ValueError("a curve without values must end in a failure that does not pass")

    def at(self, epoch: int) -> float:
        """Return the value after `epoch` epochs."""
        return self.values[min(epoch, len(self.values)) - 1]

    def failure_after(self, epochs: int, retries: int) -> Failure | None:
        """Return the failure after `epochs` epochs; None if the next epoch follows."""
        if self.failure is None or epochs != self.fails_after:
            return None
        has_passed = self.failure.can_pass and retries >= self.times
        return None if has_passed else self.failure


CurveOf = Callable[[Mapping[str, Any]], Curve]
"""From the values of a trial's parameters to what it would show."""


@dataclass(frozen=True)
class Played:
    """A sweep that was played, to its end or to where it was interrupted.

    Attributes:
        settings: the metric by which its trials were judged.
        ledger: everything that happened; pass it to `play` again to continue the sweep.
        study: its final state; None if it was interrupted.
        epochs: how many were computed in this call.
        seconds: of simulated time, in this call.
    """

    settings: RunSettings
    ledger: Events
    study: Study | None
    epochs: int
    seconds: float

    @property
    def records(self) -> dict[str, TrialRecord]:
        """The trials, as the ledger tells them."""
        return read_records(self.ledger.events)

    @property
    def best(self) -> tuple[TrialRecord, dict[str, Any]] | None:
        """The best trial and the row of its best epoch; None before the first epoch."""
        return best_record(self.records.values(), self.settings)


def play(
    space: SearchSpace,
    settings: RunSettings,
    curve_of: CurveOf,
    trials: int,
    *,
    concurrent: int = 1,
    ledger: Events | None = None,
    stop_after_events: int | None = None,
) -> Played:
    """Play a sweep to its end, or continue one that was interrupted.

    With one trial at a time, an interrupted sweep continues exactly as if nothing had happened.
    With several, those that ran restart together, so another one may end first.

    Args:
        space: where trials come from; its recipes come first.
        settings: seed and metric.
        curve_of: says what a trial with these values of the parameters shows.
        trials: how many in all.
        concurrent: trials at once.
        ledger: of an interrupted sweep, or an empty one; None keeps the events in memory.
        stop_after_events: interrupt the sweep after this many more events; None: never.
    """
    ledger = Events() if ledger is None else ledger
    machine = _Machine(curve_of, concurrent)
    countdown = _Countdown(stop_after_events)
    study: Study | None = None
    try:
        recipes: list[tuple[Mapping[str, Any], Origin]] = [
            (p, "recipe") for p in space.first_trials
        ]
        study = Study(space, ledger, settings, recipes, countdown)
        stopper = _stopper(space, settings, study)
        stopper.replay(list(ledger.events))
        if trials_wanted(ledger.events) < trials:
            study.want(trials)
        machine.run(study, stopper)
    except _Interrupted:
        study = None
    return Played(settings, ledger, study, machine.epochs, machine.now)


def recorded_curves(run_path: Path) -> CurveOf:
    """Return the curves of a run, to ask how its sweep would have gone with another stopper.

    For given values, this is the curve of the nearest recorded trial: parameters that
    differ, or that only one of the two has, count 1, and numbers by how many of the recorded ones
    lie between them (as a share), so that the scale of none of them matters. A trial that was
    stopped is taken to have stayed at its last value. All epochs take one second.

    Raises:
        TuneappError: it is no run directory, or no trial of it has a result.
    """
    run, record = open_run(run_path)
    records = list(read_records(read_events(run.ledger)).values())
    return curves_of_records(records, record.settings)


def curves_of_records(records: Sequence[TrialRecord], settings: RunSettings) -> CurveOf:
    """Like `recorded_curves`, of trials that were read already.

    Raises:
        ValueError: none of them shows anything.
    """
    known = [(r.params, _recorded(r, settings)) for r in records if r.rows or r.kind]
    if not known:
        raise ValueError("no trial has an epoch or a failure: there is no curve to play")
    numbers: dict[str, list[float]] = {}
    for params, _ in known:
        for name, value in params.items():
            if _is_number(value):
                bisect.insort(numbers.setdefault(name, []), float(value))

    def nearest(params: Mapping[str, Any]) -> Curve:
        return min(known, key=lambda pair: _distance(params, pair[0], numbers))[1]

    return nearest


def made_up_curves(seed: int) -> CurveOf:
    """Return curves for `MADE_UP_SPACE`: one best corner, drawn by the seed, and some noise.

    Small learning rates learn slowly, so that curves cross: a stopper can be wrong.
    """
    drawn = random.Random(seed)
    best: dict[str, Any] = {
        "optimizer": drawn.choice(["adamw", "sgd"]),
        "freeze_depth": drawn.randint(0, 5),
        "adamw.lr": drawn.uniform(-4.0, -2.0),
        "sgd.lr": drawn.uniform(-3.0, -1.0),
    }

    def curve(params: Mapping[str, Any]) -> Curve:
        optimizer = params["optimizer"]
        log_lr = math.log10(params[f"{optimizer}.lr"])
        off = log_lr - best[f"{optimizer}.lr"]
        final = 0.95 - 0.08 * off**2 - 0.03 * abs(params["freeze_depth"] - best["freeze_depth"])
        final -= 0.05 * (optimizer != best["optimizer"])
        pace = 1.0 + max(0.0, -off)
        noise = random.Random(f"{seed} {canonical_json(params)}")
        shown = [
            max(0.05, final) * (1 - 0.7 * math.exp(-epoch / pace)) + noise.gauss(0, 0.01)
            for epoch in range(1, 10)
        ]
        return Curve(tuple(min(max(value, 0.0), 1.0) for value in shown), noise.uniform(0.5, 2.0))

    return curve


class _Interrupted(Exception):  # noqa: N818 - it is no error
    """The sweep was to end here, whatever it was doing."""


class _Countdown:
    """Hears the events of a study, and interrupts it after some of them."""

    def __init__(self, events: int | None) -> None:
        self._left = events

    def __call__(self, event: Event) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                raise _Interrupted


class _Machine:
    """Slots and a clock: what Ray and the trials' processes are in a real sweep."""

    def __init__(self, curve_of: CurveOf, slots: int) -> None:
        self.now = 0.0
        self.epochs = 0
        self._curve_of = curve_of
        self._slots = slots
        self._curves: dict[str, Curve] = {}
        self._due: list[tuple[float, str]] = []
        """When the next thing happens to each trial that runs."""

    def run(self, study: Study, stopper: Stopper) -> None:
        """Work off what the study proposes."""
        while study.common_failure is None:
            while len(self._due) < self._slots and (proposal := study.propose()) is not None:
                self._begin(study, stopper, proposal.trial_id)
            if not self._due:
                return
            self.now, trial_id = heapq.heappop(self._due)
            if self._goes_on(study, stopper, trial_id):
                self._wait_for(study.records[trial_id])

    def _begin(self, study: Study, stopper: Stopper, trial_id: str) -> None:
        """Start a trial; one that has a checkpoint reports the epochs that it holds again."""
        record = study.records[trial_id]
        self._curves[trial_id] = self._curve_of(record.params)
        for epoch in range(1, len(record.rows) + 1):
            self._report(study, stopper, trial_id, epoch)
        self._wait_for(record)

    def _wait_for(self, record: TrialRecord) -> None:
        is_over = len(record.rows) == record.epochs
        seconds = 0.0 if is_over else self._curves[record.trial_id].seconds
        heapq.heappush(self._due, (self.now + seconds, record.trial_id))

    def _goes_on(self, study: Study, stopper: Stopper, trial_id: str) -> bool:
        """Let the next thing happen to a trial; return whether it still runs."""
        record = study.records[trial_id]
        done = len(record.rows)
        failure = self._curves[trial_id].failure_after(done, record.retries)
        if done < record.epochs and failure is not None:
            tell_failure(study, stopper, trial_id, failure)
            return False
        if done < record.epochs:
            self.epochs += 1
            self._report(study, stopper, trial_id, done + 1)
            if record.state == "unfinished" and done + 1 < record.epochs:
                return True
        tell_return(stopper, trial_id)
        return False

    def _report(self, study: Study, stopper: Stopper, trial_id: str, epoch: int) -> None:
        value = self._curves[trial_id].at(epoch)
        tell_epoch(stopper, trial_id, {"epoch": epoch, study.settings.metric: value, "applied": {}})


def tell_epoch(stopper: Stopper, trial_id: str, row: Mapping[str, Any]) -> None:
    """Let the stopper hear of an epoch as it does from a trial under Ray."""
    _tell(stopper, trial_id, row=row)


def tell_failure(study: Study, stopper: Stopper, trial_id: str, failure: Failure) -> None:
    """Let a trial tell its failure and raise; one that can pass is a process that vanishes."""
    if failure.can_pass:
        study.fail(trial_id, failure)  # past the stopper: it would ask the machine why
        return
    _tell(stopper, trial_id, failed=asdict(failure))
    if failure.state == "failed":
        stopper.on_trial_error(None, _as_ray(trial_id))
    else:
        tell_return(stopper, trial_id)


def tell_return(stopper: Stopper, trial_id: str) -> None:
    """Let the stopper hear that a trial's function has returned, or was stopped."""
    stopper.on_trial_complete(None, _as_ray(trial_id), {})


def _tell(stopper: Stopper, trial_id: str, **message: Any) -> None:
    told = json.dumps({**message, "warnings": []})
    stopper.on_trial_result(None, _as_ray(trial_id), {MESSAGE: told, SCORE: 0.0})


def _as_ray(trial_id: str) -> Any:
    """Return the part of a Ray trial that the stopper reads."""
    return SimpleNamespace(trial_id=trial_id, config={"trial_id": trial_id})


def _stopper(space: SearchSpace, settings: RunSettings, study: Study) -> Stopper:
    """Return the stopper that a real sweep would have."""
    driver, folds = Driver(study, run_dir="."), settings.data.folds
    if folds is not None:
        return Stopper(driver, folds, settings.mode, step="fold")
    longest = max(settings.applied_to(branch.config).epochs for branch in space.branches())
    return Stopper(driver, longest, settings.mode)


def _recorded(record: TrialRecord, settings: RunSettings) -> Curve:
    failure = Failure(record.kind, record.cause) if record.kind else None
    values = tuple(row[settings.metric] for row in record.rows)
    return Curve(values, failure=failure, fails_after=len(values))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _distance(
    a: Mapping[str, Any], b: Mapping[str, Any], numbers: Mapping[str, Sequence[float]]
) -> float:
    total = 0.0
    for name in {**a, **b}:
        if name not in a or name not in b:
            total += 1.0
        elif _is_number(a[name]) and _is_number(b[name]) and name in numbers:
            total += abs(_rank(a[name], numbers[name]) - _rank(b[name], numbers[name]))
        else:
            total += a[name] != b[name]
    return total


def _rank(value: float, among: Sequence[float]) -> float:
    """Return the place of a value among others, between 0 and 1; of equals, the middle."""
    return (bisect.bisect_left(among, value) + bisect.bisect_right(among, value)) / 2 / len(among)
