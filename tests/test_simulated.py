"""Whole sweeps without training: interrupted everywhere, poisoned, and many of them."""

import math
import statistics
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState

from tests.killing import poisoned
from tuneapp import search, study
from tuneapp.config import RunSettings
from tuneapp.failures import Failure
from tuneapp.ledger import Events, Ledger, read_events
from tuneapp.records import TrialRecord, read_records
from tuneapp.simulated import (
    MADE_UP_SPACE,
    Curve,
    Played,
    curves_of_records,
    made_up_curves,
    play,
    recorded_curves,
)
from tuneapp.space import SearchSpace

EPOCHS = 9
RECIPES = 'FIRST_TRIALS = [{"optimizer": "sgd"}, {"freeze_depth": 5}]\n'
FEW_VALUES = """
from tuneapp.config import AdamW, Sgd, TrialConfig

FIRST_TRIALS = [{"freeze_depth": 2}]


def search_space(trial):
    depth = trial.suggest_int("freeze_depth", 0, 5)
    if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "adamw":
        optimizer = AdamW(lr=trial.suggest_categorical("adamw.lr", [1e-4, 1e-3, 1e-2]))
    else:
        optimizer = Sgd(lr=trial.suggest_categorical("sgd.lr", [1e-3, 1e-2]))
    return TrialConfig(model="resnet18", freeze_depth=depth, optimizer=optimizer, epochs=9)
"""


def space(text=MADE_UP_SPACE + RECIPES):
    return SearchSpace(text, Path("simulated.py"))


def events_again(events):
    """Return a ledger that holds these events, as another process finds them."""
    ledger = Events()
    ledger.events = list(events)
    return ledger


def states_of(played):
    return {record.kind or record.state for record in played.records.values()}


# --- Playing --------------------------------------------------------------------------------------


def test_a_sweep_is_played_to_its_end_and_again_the_same():
    played = play(space(), RunSettings(seed=1), made_up_curves(1), 24, concurrent=3)
    again = play(space(), RunSettings(seed=1), made_up_curves(1), 24, concurrent=3)
    assert played.ledger.events == again.ledger.events
    assert (played.epochs, played.seconds) == (again.epochs, again.seconds)
    other = play(space(), RunSettings(seed=2), made_up_curves(1), 24, concurrent=3)
    assert played.ledger.events != other.ledger.events
    assert len(played.records) == 24
    assert {r.state for r in played.records.values()} == {"finished", "stopped"}
    assert played.epochs == sum(len(r.rows) for r in played.records.values()) < 24 * EPOCHS


def test_slots_run_side_by_side_by_a_clock_of_their_own():
    def curve(params):
        return Curve((0.5,) * EPOCHS, seconds=2.0)

    one = play(space(), RunSettings(), curve, 8)
    four = play(space(), RunSettings(), curve, 8, concurrent=4)
    # Nobody is worse than the others: all run in full.
    assert (one.seconds, four.seconds) == (8 * EPOCHS * 2.0, 2 * EPOCHS * 2.0)


def test_a_longer_training_than_the_curve_stays_at_its_last_value():
    played = play(space(), RunSettings(), lambda params: Curve((0.2, 0.4)), 1)
    rows = played.records["t0001"].rows
    assert [row["val/accuracy"] for row in rows] == [0.2, *[0.4] * 8]


def test_a_curve_without_values_must_end():
    with pytest.raises(ValueError, match="without values"):
        Curve(())
    with pytest.raises(ValueError, match="without values"):
        Curve((), failure=Failure("process died", "gone", can_pass=True))
    Curve((), failure=Failure("bug", "KeyError"))


def test_a_process_that_dies_is_tried_again_from_where_it_was():
    died = Failure("process died", "its process died", can_pass=True)
    whole = play(space(), RunSettings(), lambda params: Curve((0.1, 0.2, 0.3)), 1)
    for times, state in ((1, "finished"), (2, "finished"), (3, "failed")):
        played = play(
            space(),
            RunSettings(),
            lambda params, times=times: Curve((0.1, 0.2, 0.3), 1.0, died, 2, times),
            1,
        )
        record = played.records["t0001"]
        assert record.state == state
        assert record.rows == whole.records["t0001"].rows[: len(record.rows)]
        assert len(record.rows) == (EPOCHS if state == "finished" else 2)
        retried = [e for e in played.ledger.events if e["event"] == "retried"]
        assert len(retried) == min(times, 2)


def test_the_same_bug_in_the_first_trials_ends_it_as_it_ends_a_sweep():
    played = play(space(), RunSettings(), lambda p: Curve((), failure=Failure("bug", "E: x")), 9)
    assert len(played.records) == study.SAME_BUG_LIMIT
    assert played.study.common_failure == "E: x"
    assert played.best is None


# --- Interrupted ----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_sweep_interrupted_after_each_of_its_events_comes_to_the_same_end():
    settings, curve_of = RunSettings(seed=5), poisoned(made_up_curves(5), 0.3)
    whole = play(space(FEW_VALUES), settings, curve_of, 24)
    assert states_of(whole) >= {"finished", "stopped", "diverged", "out of memory", "duplicate"}
    assert any(e["event"] == "retried" for e in whole.ledger.events)
    for count in range(1, len(whole.ledger.events)):
        ledger = events_again(whole.ledger.events[:count])
        # To its end now and then; else for some trials more, which takes a third of the time.
        more = None if count % 6 == 0 else 30
        again = play(
            space(FEW_VALUES), settings, curve_of, 24, ledger=ledger, stop_after_events=more
        )
        # Every suggestion, stop, cause and value, in the same order.
        expected = whole.ledger.events[: None if more is None else count + more]
        assert again.ledger.events == expected, f"interrupted after event {count}"
        if more is None:
            assert again.records == whole.records
            assert again.best == whole.best


def test_a_play_can_be_interrupted_after_so_many_events():
    settings, curve_of = RunSettings(seed=5), poisoned(made_up_curves(5), 0.3)
    whole = play(space(), settings, curve_of, 6)
    for count in range(1, len(whole.ledger.events)):
        cut = play(space(), settings, curve_of, 6, stop_after_events=count)
        assert cut.study is None
        assert cut.ledger.events == whole.ledger.events[:count]


def test_a_sweep_interrupted_at_every_event_in_turn_comes_to_the_same_end(tmp_path):
    settings, curve_of = RunSettings(seed=6), poisoned(made_up_curves(6), 0.3)
    whole = play(space(), settings, curve_of, 16)
    for _ in whole.ledger.events:  # one event in each life
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            play(space(), settings, curve_of, 16, ledger=ledger, stop_after_events=1)
    assert read_events(tmp_path / "ledger.jsonl") == whole.ledger.events
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        again = play(space(), settings, curve_of, 16, ledger=ledger)
    assert again.ledger.events == whole.ledger.events
    assert again.epochs == 0


@pytest.mark.timeout(300)
def test_several_trials_at_once_lose_and_double_nothing_when_interrupted():
    settings, curve_of = RunSettings(seed=7), poisoned(made_up_curves(7), 0.3)
    whole = play(space(), settings, curve_of, 24, concurrent=4)
    for count in range(1, len(whole.ledger.events)):
        ledger = events_again(whole.ledger.events[:count])
        again = play(space(), settings, curve_of, 24, concurrent=4, ledger=ledger)
        events = again.ledger.events
        assert events[:count] == whole.ledger.events[:count]
        assert [e["seq"] for e in events] == list(range(len(events)))
        proposed = [e["trial"] for e in events if e["event"] == "proposed"]
        assert proposed == [f"t{n:04d}" for n in range(1, 25)]
        assert Counter(e["trial"] for e in events if e["event"] == "ended") == Counter(proposed)
        for record in again.records.values():
            curve = curve_of(record.params)
            expected = [{"epoch": n, "val/accuracy": curve.at(n)} for n in range(1, 10)]
            assert record.rows == expected[: len(record.rows)]
        assert not running_in_optuna(again)


# --- Poisoned -------------------------------------------------------------------------------------


def running_in_optuna(played):
    return [t.number for t in played.study.frozen_trials() if not t.state.is_finished()]


@pytest.mark.parametrize("concurrent", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_a_third_of_all_trials_may_break_and_the_search_goes_on(seed, concurrent):
    curve_of = poisoned(made_up_curves(seed), 0.3)
    played = play(space(), RunSettings(seed=seed), curve_of, 60, concurrent=concurrent)
    assert len(played.records) == 60
    assert not running_in_optuna(played)
    states = Counter(record.state for record in played.records.values())
    assert states["unfinished"] == 0
    assert states["diverged"] + states["failed"] >= 5
    assert states["stopped"] >= 10
    _, best = played.best
    assert math.isfinite(best["val/accuracy"])
    told = [t for t in played.study.frozen_trials() if t.state is TrialState.COMPLETE]
    assert all(math.isfinite(t.value) for t in told)


# --- Many sweeps ----------------------------------------------------------------------------------


def best_within(played: Played, epochs: int) -> float:
    """Return the best value among the first so many epochs of a sweep, or all that it took."""
    rows = [event["row"] for event in played.ledger.events if event["event"] == "epoch"]
    return max(row["val/accuracy"] for row in rows[:epochs])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_search_and_stopper_find_more_with_the_same_epochs_than_chance(monkeypatch):
    trials, seeds = 20, 100
    budget = trials * EPOCHS
    empty = space(MADE_UP_SPACE)
    ours = [
        best_within(play(empty, RunSettings(seed=seed), made_up_curves(seed), 28), budget)
        for seed in range(seeds)
    ]
    monkeypatch.setattr(study, "STARTUP_TRIALS", 10**9)  # the sampler never begins to model
    monkeypatch.setattr(search, "GRACE_SHARE", 1.0)  # nobody is stopped
    chance = [play(empty, RunSettings(seed=s), made_up_curves(s), trials) for s in range(seeds)]
    assert all(played.epochs == budget for played in chance)
    by_chance = [best_within(played, budget) for played in chance]
    better = sum(a > b for a, b in zip(ours, by_chance, strict=True))
    gain = statistics.fmean(ours) - statistics.fmean(by_chance)
    # Of a fair coin, 66 or more of 100 come up once in a thousand times.
    assert better >= 66, f"better in {better} of {seeds}, by {gain:.4f} on average"
    assert gain > 0


# --- Recorded -------------------------------------------------------------------------------------


def record(trial_id, params, values, **more):
    rows = [{"epoch": n, "val/accuracy": v} for n, v in enumerate(values, start=1)]
    return TrialRecord(trial_id, "search", params, EPOCHS, rows, **more)


def test_recorded_curves_are_those_of_the_nearest_trial():
    records = [
        record("t0001", {"optimizer": "sgd", "sgd.lr": 1e-3}, [0.1, 0.2]),
        record("t0002", {"optimizer": "sgd", "sgd.lr": 1e-1}, [0.3, 0.4]),
        record("t0003", {"optimizer": "adamw", "adamw.lr": 1e-3}, [0.5], kind="bug", cause="E: x"),
        record("t0004", {"optimizer": "adamw", "adamw.lr": 1e-1}, []),  # was never run
    ]
    curve_of = curves_of_records(records, RunSettings())
    assert curve_of({"optimizer": "sgd", "sgd.lr": 2e-4}).values == (0.1, 0.2)
    assert curve_of({"optimizer": "sgd", "sgd.lr": 0.5}).values == (0.3, 0.4)
    failing = curve_of({"optimizer": "adamw", "adamw.lr": 1.0})
    assert failing.values == (0.5,)
    assert failing.failure_after(1, 0) == Failure("bug", "E: x")
    with pytest.raises(ValueError, match="no trial"):
        curves_of_records(records[3:], RunSettings())


def test_a_sweep_played_on_its_own_curves_is_that_sweep():
    played = play(space(), RunSettings(seed=3), poisoned(made_up_curves(3), 0.2), 24)
    curve_of = curves_of_records(list(played.records.values()), RunSettings(seed=3))
    again = play(space(), RunSettings(seed=3), curve_of, 24)
    told = [{k: v for k, v in e.items() if k != "seq"} for e in played.ledger.events]
    without_retries = [e for e in told if e["event"] != "retried"]
    assert [{k: v for k, v in e.items() if k != "seq"} for e in again.ledger.events] == (
        without_retries
    )


@pytest.mark.ray
def test_the_curves_of_a_real_run_can_be_played_again(finished_sweep, small_space):
    run = finished_sweep["run"]
    records = read_records(read_events(run / "ledger.jsonl"))
    played = play(SearchSpace.read(small_space), RunSettings(), recorded_curves(run), len(records))
    shown = {row["val/accuracy"] for r in records.values() for row in r.rows}
    assert {row["val/accuracy"] for r in played.records.values() for row in r.rows} <= shown
