"""A finished sweep that goes on: with more trials, and in a changed space."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL_SPACE, read_ledger
from tests.test_sweep import ends_of, rows_of
from tuneapp.cli import main
from tuneapp.records import read_records
from tuneapp.rundir import open_run
from tuneapp.space import SearchSpace
from tuneapp.sweep import outside

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NARROWER = SMALL_SPACE.replace(
    'suggest_int("freeze_depth", 4, 5)', 'suggest_int("freeze_depth", 5, 5)'
)


@pytest.fixture
def run(finished_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished sweep of one's own."""
    shutil.copytree(finished_sweep["run"], tmp_path / "runs" / "x")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "x"


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
