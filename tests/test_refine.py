"""A finished sweep that goes on: with more trials, and in a changed space."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL_SPACE, read_ledger
from tests.test_sweep import ends_of, rows_of
from tuneapp import own, sweep
from tuneapp.cli import main
from tuneapp.config import Data, RunSettings
from tuneapp.records import read_records
from tuneapp.rundir import RunDir, RunRecord, open_run
from tuneapp.space import SearchSpace
from tuneapp.study import Study
from tuneapp.sweep import Outcome, SweepOptions, outside, refine_sweep, start_sweep

pytestmark = pytest.mark.timeout(300)

NARROWER = SMALL_SPACE.replace(
    'suggest_int("freeze_depth", 4, 5)', 'suggest_int("freeze_depth", 5, 5)'
)


@pytest.fixture
def run(finished_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished sweep of one's own."""
    shutil.copytree(finished_sweep["run"], tmp_path / "runs" / "x")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "x"


@pytest.mark.ray
def test_a_sweep_goes_on_with_more_trials_and_then_in_a_narrower_space(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_ledger(run)
    assert main(["extend", str(run), "--trials", "1"]) == 0
    extended = read_ledger(run)
    assert extended[: len(before)] == before
    (new,) = [e for e in extended[len(before) :] if e["event"] == "proposed" and not e["twin"]]
    depths = {e["trial"]: e["params"]["freeze_depth"] for e in extended if e["event"] == "proposed"}

    Path("narrower.py").write_text(NARROWER)
    assert main(["refine", str(run), "narrower.py", "--trials", "1"]) == 0
    after = read_ledger(run)
    assert after[: len(extended)] == extended
    (refined,) = [e for e in after if e["event"] == "refined"]
    assert refined["space"] == 2
    # Depth 4 is outside; what the other trials have is what they have.
    assert set(refined["history"]) == {t for t, depth in depths.items() if depth == 4}
    newest = [e for e in after[len(extended) :] if e["event"] == "proposed"]
    assert {e["params"]["freeze_depth"] for e in newest} == {5}
    assert {e["space"] for e in newest} == {2}
    # The recipes are known: they are not run again, and nothing that was tried is.
    ran = [e for e in after if e["event"] == "proposed" and not e["twin"]]
    assert len({e["config_hash"] for e in ran}) == len(ran) == 10
    assert len(set(ends_of(after))) == len([e for e in after if e["event"] == "proposed"])
    for rows in rows_of(after).values():
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert (run / "space.py").read_text() == SMALL_SPACE
    assert (run / "space-2.py").read_text() == NARROWER
    assert new["trial"] == "t0009"

    # A trial is trained again in the space that it came from, whichever that is.
    capsys.readouterr()
    for trial_id in ("t0001", newest[-1]["trial"]):
        assert main(["train", "--from", str(run), "--trial", trial_id]) == 0
    assert main(["summary", str(run)]) == 0
    assert "lie outside the space as refined" in capsys.readouterr().out


@pytest.mark.ray
def test_what_is_inside_another_space_is_what_would_be_the_same_trial(run: Path) -> None:
    opened, record = open_run(run)
    records = read_records(read_ledger(run))

    def inside(text: str) -> set[str]:
        space = SearchSpace(text, run.parent / "other.py")
        return set(records) - set(outside(opened, record, space, records))

    adamw = {t for t, r in records.items() if r.params["optimizer"] == "adamw"}
    depth_5 = {t for t, r in records.items() if r.params["freeze_depth"] == 5}
    assert inside(SMALL_SPACE) == set(records)
    assert inside(NARROWER) == depth_5
    assert inside(SMALL_SPACE.replace("epochs=4", "epochs=5")) == set()  # other trainings
    # A value that is not asked for any more, and is now a constant.
    constant = SMALL_SPACE.replace(
        'trial.suggest_categorical("optimizer", ["adamw", "sgd"])', '"adamw"'
    )
    assert inside(constant) == adamw
    # A value that nobody has given yet.
    more = SMALL_SPACE.replace(
        "batch_size=8", 'batch_size=trial.suggest_categorical("batch_size", [8])'
    )
    assert inside(more) == set()


@pytest.mark.ray
def test_what_does_not_fit_is_refused_and_the_run_is_as_it_was(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    other_data = SMALL_SPACE.replace(
        "FIRST_TRIALS", "DATA = Data(source='elsewhere')\nFIRST_TRIALS", 1
    )
    other_data = other_data.replace("import AdamW, Cosine", "import AdamW, Cosine, Data")
    for text, said in (
        (other_data, "start a new sweep for other images"),
        (SMALL_SPACE.replace("resnet18", "resnet19"), "resnet19"),
        (SMALL_SPACE.replace('"freeze_depth", 4, 5', '"freeze_depth", 4, 9'), "too deep"),
    ):
        Path("other.py").write_text(text)
        assert main(["refine", str(run), "other.py"]) == 2
        assert said in capsys.readouterr().err
    for words in (["extend", str(run), "--trials", "0"], ["refine", str(run), "gone.py"]):
        assert main(words) == 2
    lock = open_run(run)[0].lock()
    try:
        for command in (["resume", str(run)], ["extend", str(run)]):
            assert main(command) == 75
    finally:
        lock.release()
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == files
    assert json.loads(after[run / "run.json"])["format"] == 2


# --- Code in the space's own file, without Ray ----------------------------------------------------

OWN_CODE = """
from torch import nn
from torch.nn.functional import cross_entropy

from tuneapp.config import OwnLoss, Sgd, TrialConfig

FIRST_TRIALS = [{"lr": 0.25}, {"lr": 0.5}]
SCALE = 1.0


def build(classes):
    layers = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)]
    return nn.Sequential(*layers)


def loss(logits, labels):
    return SCALE * cross_entropy(logits, labels)


def search_space(trial):
    lr = trial.suggest_float("lr", 0.1, 0.7)
    return TrialConfig(
        model="net:build", weights=None, image_size=32, epochs=1, batch_size=8,
        optimizer=Sgd(lr=lr), loss=OwnLoss(loss="net:loss"),
    )
"""


class Driven:
    """A sweep in `runs/x`, whose trials end at once; `text` is what `net:...` stood for in each."""

    def __init__(self, photos: Path) -> None:
        self.path = Path("runs/x").absolute()
        self._settings = RunSettings(data=Data(source=str(photos)))
        self._options = SweepOptions(trials=2, runs_dir=Path("runs"), name="x", concurrent=1)
        self.text: dict[str, str] = {}

    def start(self, text: str) -> None:
        space = SearchSpace(text, Path("net.py"))
        start_sweep(space, self._settings, self._options, print, _no_listener, _no_watch)

    def refine(self, text: str) -> None:
        space = SearchSpace(text, Path("net.py"))
        refine_sweep(self.path, space, 2, print, _no_listener, _no_watch)

    def drive(
        self, run: RunDir, record: RunRecord, space: SearchSpace, study: Study, *_: object
    ) -> Outcome:
        while (proposal := study.propose()) is not None:
            offered = own.offered_text("net:build")
            assert offered is not None
            self.text[proposal.trial_id] = offered[0]
            row = {"epoch": 1, "train/loss": 1.0, "val/loss": 1.0, "val/accuracy": 0.5}
            study.record_epoch(proposal.trial_id, {**row, "applied": {}})
            study.complete(proposal.trial_id)
        return Outcome(run, None, False, None, study.remaining)


def _no_listener(run: RunDir, record: RunRecord) -> sweep.Listen:
    return lambda event: None


def _no_watch(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def driven(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driven:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own, "_spaces", {})
    monkeypatch.setattr(own, "_texts", {})
    monkeypatch.setattr("sys.path", [*sys.path])
    found = Driven(photos)
    monkeypatch.setattr(sweep, "_drive", found.drive)
    found.start(OWN_CODE)
    return found


def test_a_changed_space_is_prepared_and_driven_with_the_code_of_its_own_text(
    driven: Driven,
) -> None:
    renamed = OWN_CODE.replace("def build(", "def build2(").replace("net:build", "net:build2")
    driven.refine(renamed)
    assert driven.text == {
        "t0001": OWN_CODE, "t0002": OWN_CODE, "t0003": renamed, "t0004": renamed,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("was", "becomes"),
    [("SCALE * cross", "2 * SCALE * cross"), ("SCALE = 1.0", "SCALE = 2.0"), ("4, 3)", "4, 5)")],
)
def test_trials_of_changed_code_are_history_and_their_recipes_are_trained_again(
    driven: Driven, was: str, becomes: str
) -> None:
    assert was in OWN_CODE
    changed = OWN_CODE.replace(was, becomes)
    driven.refine(changed)
    records = read_records(read_ledger(driven.path))
    assert [r.is_history for r in records.values()] == [True, True, False, False]
    assert [r.params["lr"] for r in records.values()] == [0.25, 0.5, 0.25, 0.5]
    # Back to the first text: each is compared by the code of its own space.
    driven.refine(OWN_CODE)
    records = read_records(read_ledger(driven.path))
    history = [t for t, r in records.items() if r.is_history]
    assert history == ["t0003", "t0004"]
    assert len(driven.text) == 6


def test_trials_beside_unchanged_code_are_known_in_another_range(driven: Driven) -> None:
    driven.refine(OWN_CODE.replace("0.1, 0.7", "0.2, 0.7"))
    records = read_records(read_ledger(driven.path))
    assert not any(r.is_history for r in records.values())
    assert [r.origin for r in records.values()] == ["recipe", "recipe", "search", "search"]
