import json
import logging

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tuneapp.config import RunSettings
from tuneapp.failures import Failure
from tuneapp.ledger import Events
from tuneapp.mirror import StudyMirror
from tuneapp.space import SearchSpace
from tuneapp.study import Study

SPACE = """
from tuneapp.config import AdamW, TrialConfig


def search_space(trial):
    return TrialConfig(
        model="resnet18",
        freeze_depth=trial.suggest_int("freeze_depth", 0, 3),
        batch_size=trial.suggest_categorical("batch_size", [16, 32, 64]),
        optimizer=AdamW(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)),
        epochs=3,
    )
"""
A = ({"freeze_depth": 0, "batch_size": 16, "lr": 0.01}, "recipe")
DIED = Failure("process died", "its process died", can_pass=True)
MEMORY = Failure("out of memory", "OutOfMemoryError: 3 GB")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "study.log"


@pytest.fixture
def opened(tmp_path, file):
    """Return a maker of studies with a mirror, over events that outlive them."""
    events = Events()

    def open_study(name="run", events=events, metric="val/accuracy", first=(A, A, A), **more):
        space = SearchSpace(SPACE, tmp_path / "space.py")
        mirror = StudyMirror(file, name)
        settings = RunSettings(metric=metric)
        return Study(space, events, settings, list(first), mirror=mirror, **more)

    return open_study


def row(epoch, value):
    return {"epoch": epoch, "val/accuracy": value, "val/loss": 1 - value, "applied": {}}


def plain(trial):
    return {
        "number": trial.number,
        "state": trial.state,
        "values": trial.values,
        "params": trial.params,
        "distributions": trial.distributions,
        "curve": trial.intermediate_values,
        "constraints": trial.constraints,
        "attributes": trial.user_attrs,
    }


def read_back(file, name="run"):
    """Return what another process that opens the file with Optuna sees."""
    storage = JournalStorage(JournalFileBackend(str(file)))
    study = optuna.load_study(study_name=name, storage=storage)
    return study.direction, [plain(trial) for trial in study.get_trials()]


def known(study):
    return [plain(trial) for trial in study.frozen_trials()]


def steps(study):
    """Do a study's work, with everything that can happen; yield after each thing that happens."""
    study.want(8)
    yield
    ends = ["finished", "memory", "stopped", "diverged", "failed", "at once", "memory at once"]
    for end in ends:
        proposal = study.propose()
        yield
        trial_id = proposal.trial_id
        if end == "memory at once":
            study.fail(trial_id, MEMORY)
        elif end == "at once":
            study.end(trial_id, "failed", "a bug", "bug")
        for epoch in (1, 2, 3):
            study.record_epoch(trial_id, row(epoch, 0.1 * epoch))
            yield
            if epoch == 2 and end == "memory":
                study.fail(trial_id, MEMORY)
            elif epoch == 2 and end == "diverged":
                study.fail(trial_id, Failure("diverged", "loss became nan"))
            elif epoch == 1 and end == "finished":
                study.fail(trial_id, DIED)
                assert study.propose().trial_id == trial_id
            elif epoch == 1 and end in ("stopped", "failed"):
                study.end(trial_id, end, "why", "bug" if end == "failed" else "")
            yield
        study.complete(trial_id)
        yield
    study.propose()
    yield


@pytest.mark.parametrize("metric", ["val/accuracy", "val/loss"])
def test_after_every_event_the_file_holds_what_the_study_knows(opened, file, metric):
    study = opened(metric=metric)
    for _ in steps(study):
        direction, trials = read_back(file)
        assert trials == known(study)
    assert direction.name == ("MAXIMIZE" if metric == "val/accuracy" else "MINIMIZE")
    # Everything came up; two trials are duplicates of the first, and one still runs.
    assert {t["state"] for t in trials} == {
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.RUNNING,
    }
    assert [t["constraints"] for t in trials].count({"memory": 1.0}) == 2
    assert [t["values"] for t in trials[:3]] == [trials[0]["values"]] * 3
    assert trials[0]["values"] is not None
    assert [t["attributes"] for t in trials] == [{"trial_id": t} for t in study.records]


def test_a_study_taken_up_at_any_point_brings_the_file_up_to_date(opened, file):
    study = opened()
    work, done = steps(study), 0
    events = study._ledger
    contents = [b""]
    for _ in work:
        contents.append(file.read_bytes())
    whole = list(events.events)
    for kept in range(1, len(whole), 3):
        # The newest file, one from some events ago, one from the future: the ledger is the truth.
        for content in {contents[0], contents[min(kept // 2, len(contents) - 1)], contents[-1]}:
            file.write_bytes(content)
            part = Events()
            part.events = whole[:kept]
            again = opened(events=part)
            assert read_back(file)[1] == known(again)
            done += 1
    assert done > 15


def test_a_study_that_is_taken_up_does_not_write_again_what_the_file_has(opened, file):
    study = opened()
    for _ in steps(study):
        pass
    before = file.read_bytes()
    opened()
    after = file.read_bytes()
    # Of the trial that still runs, how it was asked for is told; and once only.
    assert after.startswith(before)
    assert after[len(before) :].count(b"\n") <= 1
    opened()
    assert file.read_bytes() == after


def test_a_file_that_was_deleted_is_made_again(opened, file):
    study = opened()
    for number, _ in enumerate(steps(study)):
        if number == 12:
            file.unlink()
            study = opened()
            break
    assert read_back(file)[1] == known(study)
    study.record_epoch(study.propose().trial_id, row(3, 0.9))
    assert read_back(file)[1] == known(study)


def worked_off(opened):
    study = opened()
    for _ in steps(study):
        pass
    return study


def cuts(size, count):
    return [0, 1, size - 1, *range(2, size, max(size // count, 1))]


def torn_at(opened, file, caplog, count):
    """Return the cuts of the whole file after which the mirror is not what the study knows."""
    worked_off(opened)
    whole = file.read_bytes()
    wrong = []
    for cut in cuts(len(whole), count):
        file.write_bytes(whole[:cut])
        caplog.clear()
        study = opened()
        trial_id = study.propose().trial_id
        study._mirror.update(study.frozen_trials()[int(trial_id[1:]) - 1])
        try:
            is_kept = read_back(file)[1] == known(study)
        except Exception:  # however reading fails, that cut counts as wrong
            is_kept = False
        if not is_kept or caplog.records:
            wrong.append(cut)
    return wrong


def test_a_file_that_was_torn_anywhere_is_mended(opened, file, caplog):
    with caplog.at_level(logging.WARNING):
        assert torn_at(opened, file, caplog, 60) == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage\nmore of it\n",
        b"\x00" * 4096,
        b"[]\n[]\n",
        b"\xff\xfe\n\n",
        b"{}\n{}\n",
        b'{"op_code": 99, "worker_id": "x"}\n' * 2,
    ],
)
def test_what_is_no_journal_is_replaced(opened, file, garbage, caplog):
    study = worked_off(opened)
    file.write_bytes(garbage)
    with caplog.at_level(logging.WARNING):
        again = opened()
    assert read_back(file)[1] == known(again)
    assert known(again) == known(study)
    assert not caplog.records


def test_a_file_of_another_sweep_of_that_name_is_written_anew(opened, file):
    worked_off(opened)
    other = opened(events=Events(), first=())
    assert read_back(file)[1] == []
    other.want(2)
    other.record_epoch(other.propose().trial_id, row(1, 0.5))
    assert read_back(file)[1] == known(other)


@pytest.mark.parametrize("what", ["params", "curve", "state", "more"])
def test_a_file_that_tells_something_else_is_written_anew(opened, file, what):
    study = worked_off(opened)
    storage = JournalStorage(JournalFileBackend(str(file)))
    number = storage.get_study_id_from_name("run")
    if what == "more":
        storage.create_new_trial(number)
    else:
        lines = file.read_text().splitlines(keepends=True)
        wrong = {
            "params": ('"freeze_depth":0', '"freeze_depth":1'),
            "curve": ('"intermediate_value":0.1', '"intermediate_value":0.9'),
            "state": ('"state":1', '"state":3'),
        }[what]
        place = next(i for i, line in enumerate(lines) if wrong[0] in line.replace(" ", ""))
        lines[place] = lines[place].replace(" ", "").replace(*wrong, 1)
        file.write_text("".join(lines))
    assert read_back(file)[1] != known(study)
    again = opened()
    assert read_back(file)[1] == known(again) == known(study)


@pytest.mark.parametrize("target", ["nothing", "study.log"])
def test_the_lock_of_a_process_that_was_killed_is_no_obstacle(opened, file, target):
    study = opened()
    study.want(2)
    study.propose()
    lock = file.with_name("study.log.lock")
    lock.symlink_to(target)
    again = opened()
    again.record_epoch(again.propose().trial_id, row(1, 0.5))
    assert read_back(file)[1] == known(again)
    assert not lock.is_symlink()


def test_a_file_may_hold_other_studies_and_keeps_them(opened, file):
    first = worked_off(opened)
    second = opened("run, space 2", events=Events())
    second.want(3)
    second.record_epoch(second.propose().trial_id, row(1, 0.75))
    assert read_back(file)[1] == known(first)
    assert read_back(file, "run, space 2")[1] == known(second)
    opened("run, space 2", events=Events())  # another sweep of that name
    assert read_back(file)[1] == known(first)
    assert read_back(file, "run, space 2")[1] == []


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_mirror_that_cannot_be_written_warns_once_and_the_study_goes_on(
    opened, file, when, monkeypatch, caplog, tmp_path
):
    if when == "at once":
        file.mkdir()  # even root cannot write into a folder
    with caplog.at_level(logging.WARNING, logger="tuneapp"):
        study = opened()
        if when == "later":
            study.want(1)
            assert study.propose().trial_id == "t0001"
            assert len(read_back(file)[1]) == 1

            def refuse(*words):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(JournalFileBackend, "append_logs", refuse)
            study.record_epoch("t0001", row(1, 0.1))
            study.end("t0001", "stopped", "slow")
        for _ in steps(study):
            pass
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert str(file) in caplog.text
    assert "the sweep continues" in caplog.text
    assert len(study.records) > 7
    # The events are whole: without the mirror, the study is the same.
    without = Study(SearchSpace(SPACE, tmp_path / "s.py"), study._ledger, RunSettings(), [A, A, A])
    assert known(without) == known(study)


def test_without_a_study_opened_nothing_is_written(opened, file):
    StudyMirror(file, "run")
    assert not file.exists()
    study = opened()
    mirror = StudyMirror(file.with_name("other.log"), "run")
    study.want(1)
    study.propose()
    mirror.update(study.frozen_trials()[0])
    assert not file.with_name("other.log").exists()
    assert json.loads(file.read_text().splitlines()[0])["study_name"] == "run"
