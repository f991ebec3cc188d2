import json
import pickle
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray import cloudpickle
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tuneapp import search
from tuneapp.config import RunSettings
from tuneapp.errors import RayDied
from tuneapp.failures import MAX_RETRIES
from tuneapp.ledger import Ledger, read_events
from tuneapp.ray_session import OwnRay
from tuneapp.search import Driver, Proposer, Stopper, Until
from tuneapp.space import SearchSpace
from tuneapp.study import Study
from tuneapp.trainable import MESSAGE, SCORE

SPACE = """
from tuneapp.config import AdamW, TrialConfig


def search_space(trial):
    return TrialConfig(
        model="resnet18",
        optimizer=AdamW(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)),
        epochs=trial.suggest_categorical("epochs", [9, 5, 3]),
    )
"""
GO, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP
LONG = ({"epochs": 9}, "search")
RECIPE = ({"epochs": 9}, "recipe")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    # That events reach the disk is tested with the ledger.
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def started(tmp_path):
    """Return a maker of a study and its stopper, both from the ledger's file as it is."""
    ledgers = []

    def start(first=(), *, max_epochs=9, metric="val/accuracy", propose=True):
        for ledger in ledgers:  # the last process is gone
            ledger.close()
        ledgers[:] = [Ledger(tmp_path / "ledger.jsonl")]
        settings = RunSettings(metric=metric, max_epochs=max_epochs)
        space = SearchSpace(SPACE, tmp_path / "space.py")
        study = Study(space, ledgers[0], settings, list(first))
        if first and propose:
            study.want(len(first))
            while study.propose() is not None:
                pass
        stopper = Stopper(Driver(study, str(tmp_path)), max_epochs, settings.mode)
        stopper.replay(list(ledgers[0].events))
        return study, stopper

    yield start
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def events(tmp_path):
    return lambda: read_events(tmp_path / "ledger.jsonl")


def ray_trial(trial_id):
    # Ray's own id is another one: ours travels in the assignment.
    return SimpleNamespace(trial_id=f"ray-{trial_id}", config={"trial_id": trial_id})


def result(**message):
    told = {**message, "warnings": message.get("warnings", [])}
    return {MESSAGE: json.dumps(told), SCORE: 0.0, "training_iteration": 1}


def failed(kind, cause, can_pass=False):
    return result(failed={"kind": kind, "cause": cause, "can_pass": can_pass})


def report(stopper, trial_id, epoch, value):
    row = {
        "epoch": epoch,
        "val/accuracy": value,
        "val/loss": value,
        "applied": {"lr": {"head": 0.1}},
    }
    return stopper.on_trial_result(None, ray_trial(trial_id), result(row=row))


def report_up_to(stopper, trial_id, epoch, value):
    """Report epochs 1 to `epoch`, all of the same value; return what was said to the last."""
    return [report(stopper, trial_id, e, value) for e in range(1, epoch + 1)][-1]


def rungs(stopper):
    return {milestone: dict(recorded) for milestone, recorded in stopper._brackets[0]._rungs}


# --- Rungs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_epochs", "milestones"),
    [
        # The first lies at a quarter, rounded up; each next one at three times the last.
        (1, [1]),
        (2, [1]),
        (3, [1, 3]),
        (4, [1, 3]),
        (5, [2]),
        (6, [2, 6]),
        (9, [3, 9]),
        (12, [3, 9]),
        (16, [4, 12]),
        (100, [25, 75]),
    ],
)
def test_rungs_begin_after_a_quarter_and_lie_three_times_apart(started, max_epochs, milestones):
    _, stopper = started(max_epochs=max_epochs)
    assert sorted(rungs(stopper)) == milestones


@pytest.mark.parametrize(("value", "said"), [(0.69, STOP), (0.71, GO), (0.7000001, GO)])
def test_a_trial_outside_the_better_third_is_stopped_at_the_first_rung(started, value, said):
    study, stopper = started([LONG] * 4)
    for trial_id, shown in (("t0001", 0.3), ("t0002", 0.6), ("t0003", 0.9)):
        assert report_up_to(stopper, trial_id, 3, shown) == GO
    # Two thirds of the way through 0.3, 0.6, 0.9 lies 0.6 + (0.9 - 0.6) / 3 = 0.7.
    assert report(stopper, "t0004", 1, value) == GO
    assert report(stopper, "t0004", 2, value) == GO
    assert report(stopper, "t0004", 3, value) == said
    assert rungs(stopper) == {
        3: {"t0001": 0.3, "t0002": 0.6, "t0003": 0.9, "t0004": value},
        9: {},
    }
    assert study.records["t0004"].state == ("stopped" if said == STOP else "unfinished")


def test_where_less_is_better_the_higher_ones_are_stopped(started):
    study, stopper = started([LONG] * 5, metric="val/loss")
    for trial_id, shown in (("t0001", 0.9), ("t0002", 0.6), ("t0003", 0.3)):
        assert report_up_to(stopper, trial_id, 3, shown) == GO
    # Seen from the other side: the third that is better ends at 0.3 + (0.6 - 0.3) * 2 / 3 = 0.5.
    assert report_up_to(stopper, "t0004", 3, 0.51) == STOP
    # Now 0.3, 0.51, 0.6, 0.9: one third of the way from the best lies 0.51.
    assert report_up_to(stopper, "t0005", 3, 0.50) == GO
    states = [record.state for record in study.records.values()]
    assert states == [*["unfinished"] * 3, "stopped", "unfinished"]
    assert rungs(stopper)[3]["t0004"] == -0.51


def percentile(values, share):
    place = (len(values) - 1) * share
    below, part = int(place), place - int(place)
    ordered = sorted(values)
    above = ordered[min(below + 1, len(ordered) - 1)]
    return ordered[below] + part * (above - ordered[below])


def test_what_is_stopped_is_what_a_second_implementation_stops(started):
    count = 40
    study, stopper = started([LONG] * count)
    rng = random.Random(1)
    shown = {t: [rng.random() for _ in range(9)] for t in study.records}
    running = dict.fromkeys(shown, 0)
    expected, got, at_rung = {}, {}, []
    while running:
        trial_id = rng.choice(sorted(running))
        running[trial_id] += 1
        epoch = running[trial_id]
        said = report(stopper, trial_id, epoch, shown[trial_id][epoch - 1])
        should = GO
        if epoch == 3:
            best = max(shown[trial_id][:3])
            if at_rung and best < percentile(at_rung, 2 / 3):
                should = STOP
            at_rung.append(best)
        if should == STOP or said == STOP or epoch == 9:
            expected[trial_id], got[trial_id] = (epoch, should), (epoch, said)
            del running[trial_id]
            stopper.on_trial_complete(None, ray_trial(trial_id), {})
    assert got == expected
    stopped = {t for t, (_, verdict) in expected.items() if verdict == STOP}
    assert 10 < len(stopped) < count
    assert {t for t, r in study.records.items() if r.state == "stopped"} == stopped
    assert all(r.state == "finished" for t, r in study.records.items() if t not in stopped)


def test_a_recipe_is_never_stopped_but_counts(started):
    study, stopper = started([RECIPE, RECIPE, LONG])
    assert report_up_to(stopper, "t0001", 3, 0.9) == GO
    assert report_up_to(stopper, "t0002", 3, 0.1) == GO
    assert rungs(stopper)[3] == {"t0001": 0.9, "t0002": 0.1}
    # Two thirds of the way from 0.1 to 0.9 lies 0.63.
    assert report_up_to(stopper, "t0003", 3, 0.6) == STOP
    assert [r.state for r in study.records.values()] == ["unfinished", "unfinished", "stopped"]


def test_the_last_epoch_is_never_a_stop(started):
    study, stopper = started([LONG, LONG])
    report_up_to(stopper, "t0001", 9, 0.5)
    assert report_up_to(stopper, "t0002", 8, 0.6) == GO
    assert report(stopper, "t0002", 9, 0.1) == GO
    for trial_id in study.records:
        assert study.records[trial_id].state == "unfinished"
        stopper.on_trial_complete(None, ray_trial(trial_id), {})
        assert study.records[trial_id].state == "finished"


def test_a_trial_longer_than_any_that_was_foreseen_is_not_stopped_for_that(started, tmp_path):
    # Branches are tried at the ends of ranges; between them a trial may have more epochs.
    study, _ = started([LONG])
    stopper = Stopper(Driver(study, str(tmp_path)), 4, "max")
    assert [report(stopper, "t0001", epoch, 0.5) for epoch in range(1, 9)] == [GO] * 8


@pytest.mark.parametrize("max_epochs", [9, 1])  # the first rung lies at 3, and at 1
def test_a_training_that_ends_at_a_rung_is_finished_there(started, max_epochs):
    short = ({"epochs": 3}, "search")
    study, stopper = started([LONG, short], max_epochs=max_epochs)
    last = min(3, max_epochs)
    assert report_up_to(stopper, "t0001", last, 0.9) == GO
    assert report_up_to(stopper, "t0002", last, 0.1) == GO
    stopper.on_trial_complete(None, ray_trial("t0002"), {})
    assert study.records["t0002"].state == "finished"


def test_a_trial_is_judged_by_its_best_epoch_so_far(started):
    study, stopper = started([LONG] * 3)
    report_up_to(stopper, "t0001", 3, 0.5)
    for epoch, value in ((1, 0.9), (2, 0.2)):
        report(stopper, "t0002", epoch, value)
    assert report(stopper, "t0002", 3, 0.1) == GO
    for epoch, value in ((1, 0.1), (2, 0.2)):
        report(stopper, "t0003", epoch, value)
    assert report(stopper, "t0003", 3, 0.3) == STOP
    assert rungs(stopper)[3] == {"t0001": 0.5, "t0002": 0.9, "t0003": 0.3}
    assert study.frozen_trials()[1].intermediate_values == {1: 0.9, 2: 0.2, 3: 0.1}


def test_a_stop_is_in_the_ledger_with_its_cause_after_its_last_epoch(started, events):
    _, stopper = started([LONG, LONG])
    report_up_to(stopper, "t0001", 3, 0.75)
    report_up_to(stopper, "t0002", 3, 0.25)
    epoch, ended = events()[-2:]
    assert (epoch["event"], epoch["trial"], epoch["row"]["epoch"]) == ("epoch", "t0002", 3)
    assert {k: v for k, v in ended.items() if k != "seq"} == {
        "event": "ended",
        "trial": "t0002",
        "state": "stopped",
        "cause": "val/accuracy 0.2500 was not in the better third at epoch 3",
        "kind": "",
        "told": None,
    }


# --- Messages -------------------------------------------------------------------------------------


def test_an_epoch_that_is_known_counts_once(started, events):
    study, stopper = started([LONG, LONG])
    report_up_to(stopper, "t0001", 3, 0.9)
    before, recorded = events(), rungs(stopper)
    for epoch in (1, 2, 3):  # a resumed trial begins with the epochs of its checkpoint
        assert report(stopper, "t0001", epoch, 0.1) == GO
    assert events() == before
    assert rungs(stopper) == recorded
    assert [row["val/accuracy"] for row in study.records["t0001"].rows] == [0.9] * 3


def test_a_result_after_a_stop_changes_nothing(started, events):
    study, stopper = started([LONG, LONG])
    report_up_to(stopper, "t0001", 3, 0.9)
    assert report_up_to(stopper, "t0002", 3, 0.1) == STOP
    before = events()
    assert report(stopper, "t0002", 4, 1.0) == GO
    stopper.on_trial_complete(None, ray_trial("t0002"), {})
    stopper.on_trial_error(None, ray_trial("t0002"))
    assert events() == before
    assert study.records["t0002"].state == "stopped"


@pytest.mark.parametrize(("kind", "state"), [("diverged", "diverged"), ("bug", "failed")])
def test_an_end_that_a_trial_tells_is_written_down_with_its_cause(started, kind, state):
    study, stopper = started([LONG])
    report(stopper, "t0001", 1, 0.5)
    told = failed(kind, "loss became nan in epoch 2, step 7")
    assert stopper.on_trial_result(None, ray_trial("t0001"), told) == GO
    record = study.records["t0001"]
    said = (state, kind, "loss became nan in epoch 2, step 7")
    assert (record.state, record.kind, record.cause) == said
    stopper.on_trial_error(None, ray_trial("t0001"))  # what Ray says of it comes second
    assert (record.state, record.kind, record.cause) == said


def test_a_trial_whose_process_died_again_and_again_has_failed(started, events):
    study, stopper = started([LONG])
    report(stopper, "t0001", 1, 0.5)
    record = study.records["t0001"]
    for _ in range(MAX_RETRIES):  # it is tried again first
        stopper.on_trial_error(None, ray_trial("t0001"))
        assert record.state == "unfinished"
        assert study.propose().trial_id == "t0001"
    stopper.on_trial_error(None, ray_trial("t0001"))
    assert (record.state, record.kind) == ("failed", "process died")
    assert "process died" in record.cause
    assert len(record.rows) == 1
    assert study.propose() is None
    assert [e["event"] for e in events()[-3:]] == ["retried", "retried", "ended"]


def test_a_trial_that_returns_early_is_not_finished_but_a_bug(started):
    study, stopper = started([LONG])
    report_up_to(stopper, "t0001", 8, 0.5)
    stopper.on_trial_complete(None, ray_trial("t0001"), {})
    record = study.records["t0001"]
    assert (record.state, record.kind) == ("failed", "bug")


# --- Restarts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["val/accuracy", "val/loss"])
def test_rungs_replayed_from_the_ledger_are_those_of_the_live_sweep(started, metric):
    first = [RECIPE] * 2 + [LONG] * 12
    study, stopper = started(first, metric=metric)
    rng = random.Random(2)
    running = dict.fromkeys(study.records, 0)
    for _ in range(70):
        trial_id = rng.choice(sorted(running))
        running[trial_id] += 1
        epoch = running[trial_id]
        if report(stopper, trial_id, epoch, rng.random()) == STOP or epoch == 9:
            del running[trial_id]
            stopper.on_trial_complete(None, ray_trial(trial_id), {})
    ends = {t: (r.state, r.cause) for t, r in study.records.items()}
    assert {state for state, _ in ends.values()} == {"unfinished", "finished", "stopped"}
    study_again, stopper_again = started(first, metric=metric, propose=False)
    assert rungs(stopper_again) == rungs(stopper)
    assert {t: (r.state, r.cause) for t, r in study_again.records.items()} == ends


@pytest.mark.parametrize("killed", [True, False])
def test_a_stop_that_was_not_written_down_in_time_is_made_up_for(started, tmp_path, killed):
    study, stopper = started([LONG, LONG])
    report_up_to(stopper, "t0001", 3, 0.75)
    report_up_to(stopper, "t0002", 3, 0.25)
    cause, recorded = study.records["t0002"].cause, rungs(stopper)
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    if killed:  # between the epoch and the end
        lines = whole.splitlines(keepends=True)
        assert b'"ended"' in lines[-1]
        path.write_bytes(b"".join(lines[:-1]))
    again, stopper_again = started([LONG, LONG], propose=False)
    assert path.read_bytes() == whole
    assert (again.records["t0002"].state, again.records["t0002"].cause) == ("stopped", cause)
    assert rungs(stopper_again) == recorded
    assert again.propose().trial_id == "t0001"
    assert again.propose() is None


def test_a_replayed_stopper_judges_new_epochs_by_the_old_ones(started):
    _, stopper = started([LONG] * 5)
    for trial_id, shown in (("t0001", 0.3), ("t0002", 0.6), ("t0003", 0.9)):
        report_up_to(stopper, trial_id, 3, shown)
    report_up_to(stopper, "t0004", 2, 0.5)
    study, stopper = started([LONG] * 5, propose=False)
    assert report(stopper, "t0004", 3, 0.69) == STOP
    assert report_up_to(stopper, "t0005", 3, 0.75) == GO
    assert study.records["t0004"].cause.endswith("at epoch 3")


# --- The other pieces that Ray holds --------------------------------------------------------------


def test_the_proposer_hands_out_assignments_until_none_is_left(started, tmp_path):
    study, _ = started([RECIPE, LONG], propose=False)
    study.want(2)
    proposer = Proposer(Driver(study, str(tmp_path)), "max")
    assignments = [proposer.suggest("a"), proposer.suggest("b")]
    assert assignments == [
        {"run_dir": str(tmp_path), "trial_id": t, "params": study.records[t].params, "space": 1}
        for t in ("t0001", "t0002")
    ]
    assert json.loads(json.dumps(assignments)) == assignments
    # Not yet the end: one of those that run may have to be run again.
    assert proposer.suggest("c") is None
    for trial_id in ("t0001", "t0002"):
        study.end(trial_id, "stopped", "no matter")
    assert proposer.suggest("d") == Searcher.FINISHED
    before = dict(study.records)
    proposer.on_trial_complete("a", {SCORE: 1.0})
    proposer.on_trial_complete("b", error=True)
    assert study.records == before
    assert (proposer.metric, proposer.mode) == (SCORE, "max")


def test_the_study_stays_in_its_process_when_ray_pickles_what_it_holds(started, tmp_path):
    study, stopper = started([LONG])
    driver = Driver(study, str(tmp_path))
    assert type(pickle.loads(cloudpickle.dumps(driver))) is object  # noqa: S301
    for holder in (Proposer(driver, "max"), stopper, Until(driver, None)):
        copy = pickle.loads(cloudpickle.dumps(holder))  # noqa: S301
        assert type(copy) is type(holder)
        assert type(copy._driver) is object
        assert isinstance(holder._driver, Driver)


def test_what_ray_saves_and_restores_changes_nothing(started, tmp_path):
    study, _ = started([LONG])
    proposer = Proposer(Driver(study, str(tmp_path)), "max")
    before = sorted(Path(tmp_path).iterdir())
    proposer.save(str(tmp_path / "saved"))
    proposer.restore(str(tmp_path / "saved"))
    assert sorted(Path(tmp_path).iterdir()) == before


def test_a_sweep_is_over_at_its_deadline(started, tmp_path, monkeypatch):
    study, _ = started([LONG])
    now = [100.0]
    monkeypatch.setattr(search.time, "monotonic", lambda: now[0])
    until, endless = (Until(Driver(study, str(tmp_path)), d) for d in (105.0, None))
    for at, late in ((100.0, False), (104.999, False), (105.0, True), (1e9, True)):
        now[0] = at
        assert (until.is_late, until.stop_all()) == (late, late)
        assert (endless.is_late, endless.stop_all()) == (False, False)
    assert until("t0001", {SCORE: 0.0}) is False  # no single trial is its business


def test_a_sweep_is_over_when_all_first_trials_fail_alike(started, tmp_path):
    study, stopper = started([LONG] * 4)
    until = Until(Driver(study, str(tmp_path)), None)
    for number in range(1, 5):
        assert until.stop_all() == (number > 3)
        told = failed("bug", "KeyError: 'x' (loop.py:3)")
        stopper.on_trial_result(None, ray_trial(f"t000{number}"), told)
    assert until.stop_all()
    assert not until.is_late


# --- What can pass --------------------------------------------------------------------------------


def test_what_a_trial_tells_that_can_pass_lets_it_be_tried_again(started):
    study, stopper = started([LONG])
    told = failed("disk full", "OSError: no space", can_pass=True)
    assert stopper.on_trial_result(None, ray_trial("t0001"), told) == GO
    assert study.records["t0001"].state == "unfinished"
    assert study.propose().trial_id == "t0001"
    stopper.on_trial_error(None, ray_trial("t0001"))  # it has said so itself: counted once
    assert study.records["t0001"].retries == 1
    assert study.propose() is None


def test_a_process_that_dies_after_a_failure_was_dealt_with_is_a_failure_of_its_own(started):
    study, stopper = started([LONG])
    for retries in (1, 2):
        told = failed("disk full", "OSError: no space", can_pass=True)
        stopper.on_trial_result(None, ray_trial("t0001"), told)
        stopper.on_trial_error(None, ray_trial("t0001"))
        assert study.records["t0001"].retries == retries
        assert study.propose().trial_id == "t0001"
    stopper.on_trial_error(None, ray_trial("t0001"))
    assert study.records["t0001"].state == "failed"


def test_a_trial_that_told_a_failure_and_returned_can_still_fail_later(started, tmp_path):
    study, stopper = started([LONG])
    told = failed("process died", "an earlier process of this trial did not end", can_pass=True)
    stopper.on_trial_result(None, ray_trial("t0001"), told)
    stopper.on_trial_complete(None, ray_trial("t0001"), {})  # as trainable.py does
    assert study.propose().trial_id == "t0001"
    stopper.on_trial_error(None, ray_trial("t0001"))  # now it dies without a word
    # Or else it is neither running nor proposed again, and the sweep waits for it for ever.
    assert study.propose() is not None


def test_what_a_trial_warns_of_is_in_the_ledger(started, events):
    study, stopper = started([LONG])
    row = {"epoch": 1, "val/accuracy": 0.5, "val/loss": 0.5, "applied": {}}
    for _ in range(2):
        stopper.on_trial_result(None, ray_trial("t0001"), result(row=row, warnings=["slow", "old"]))
    assert study.records["t0001"].warnings == ["slow", "old"]
    assert [e["text"] for e in events() if e["event"] == "warned"] == ["slow", "old"]


@pytest.mark.parametrize(
    ("said", "kills", "kind"),
    [
        ("", 0, "process died"),
        ("killed due to the node running low on memory", 0, "out of memory"),
        ("", 1, "out of memory"),
        ("its node has died", 0, "node lost"),
    ],
)
def test_why_a_process_died_is_what_ray_and_the_kernel_say(
    started, events, tmp_path, monkeypatch, said, kills, kind
):
    counted = [5]
    monkeypatch.setattr(search, "kernel_memory_kills", lambda: counted[0])
    _, stopper = started([LONG])
    counted[0] += kills
    trial = ray_trial("t0001")
    trial.error_file = str(tmp_path / "error.txt")
    Path(trial.error_file).write_text(said)
    stopper.on_trial_error(None, trial)
    assert events()[-1]["event"] == "retried"
    assert events()[-1]["kind"] == kind
    if kills:  # of the next one, they are not the cause
        stopper.on_trial_error(None, ray_trial("t0001"))
        assert events()[-1]["kind"] == "process died"


def test_a_trial_that_the_watchdog_has_ended_is_stalled(started, monkeypatch):
    study, stopper = started([LONG])
    began = result(began=1)
    assert stopper.on_trial_result(None, ray_trial("t0001"), began) == GO
    stopper._driver.watchdog._silences["ray-t0001"] = 301.0
    stopper.on_trial_error(None, ray_trial("t0001"))
    record = study.records["t0001"]
    assert (record.state, record.kind, record.retries) == ("failed", "stalled", 0)


def test_the_watchdog_hears_of_beginnings_epochs_and_ends(started, monkeypatch):
    _, stopper = started([LONG, LONG])
    heard = []
    dog = stopper._driver.watchdog
    monkeypatch.setattr(dog, "began", lambda *words: heard.append(("began", *words)))
    monkeypatch.setattr(dog, "heard", lambda *words: heard.append(("heard", *words)))
    monkeypatch.setattr(dog, "ended", lambda *words: heard.append(("ended", *words)))
    stopper.on_trial_result(None, ray_trial("t0001"), result(began=123))
    report(stopper, "t0001", 1, 0.5)
    report(stopper, "t0001", 1, 0.5)  # known, and yet a sign of life
    proposer = Proposer(stopper._driver, "max")
    proposer.on_trial_complete("ray-t0001")  # which Ray calls however a trial ends
    stopper.on_trial_error(None, ray_trial("t0002"))
    assert heard == [
        ("began", "ray-t0001", 123, "t0001"),
        ("heard", "ray-t0001"),
        ("heard", "ray-t0001"),
        ("ended", "ray-t0001"),
        ("ended", "ray-t0002"),
    ]


def test_while_the_disk_is_full_no_trial_begins(started, tmp_path, monkeypatch, caplog):
    study, _ = started([RECIPE, LONG], propose=False)
    study.want(2)
    free = [10**9]
    monkeypatch.setattr(search, "free_bytes", lambda folder: free[0])
    driver = Driver(study, str(tmp_path), min_free=10**9)
    proposer = Proposer(driver, "max")
    looks = []
    monkeypatch.setattr(driver.watchdog, "look", lambda *, excused: looks.append(excused))
    until = Until(driver, None)
    with caplog.at_level("WARNING"):
        assert proposer.suggest("a")["trial_id"] == "t0001"
        free[0] -= 1
        assert [proposer.suggest("b") for _ in range(3)] == [None] * 3
        assert not until.stop_all()
        free[0] += 1
        assert proposer.suggest("b")["trial_id"] == "t0002"
        assert not until.stop_all()
    assert looks == [True, False]  # trials may have to wait, too
    said = [r.message for r in caplog.records]
    assert len(said) == 2
    assert "waiting for 1 GB" in said[0]
    assert "continuing" in said[1]


def test_when_one_of_rays_processes_is_dead_the_sweep_says_so(started, tmp_path):
    study, _ = started([LONG])
    driver = Driver(study, str(tmp_path))
    until = Until(driver, None)
    sleeper = subprocess.Popen(["/bin/sleep", "60"])
    driver.ray = OwnRay(tmp_path, {"raylet": psutil.Process(sleeper.pid)})
    assert not until.stop_all()
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(RayDied, match="raylet"):
        until.stop_all()


def test_a_sweep_that_is_to_stop_begins_no_trial(started, tmp_path):
    study, _ = started([LONG, LONG], propose=False)
    study.want(2)
    driver = Driver(study, str(tmp_path))
    driver.stop()
    assert Proposer(driver, "max").suggest("a") == Searcher.FINISHED
    assert not study.records


def test_history_does_not_count_in_the_rungs(started, tmp_path):
    study, stopper = started([LONG] * 3)
    for trial_id, shown in (("t0001", 0.3), ("t0002", 0.9)):
        report_up_to(stopper, trial_id, 3, shown)
    study._ledger.append("refined", space=2, history=["t0002"])
    _, again = started([LONG] * 3, propose=False)
    assert rungs(again)[3] == {"t0001": 0.3}
