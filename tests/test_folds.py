import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tuneapp.checkpoint import Row
from tuneapp.cli import main
from tuneapp.config import Data, RunSettings, TrialConfig
from tuneapp.data.source import read_images
from tuneapp.errors import CheckpointError
from tuneapp.folds import fold_folder, run_whole
from tuneapp.records import TrialRecord, best_record, spread_of
from tuneapp.training import TrialRun
from tuneapp.trial import run_trial

CLOCKED = {"train/images_per_s", "train/data_wait", "applied"}


@pytest.fixture
def folded(photos: Path) -> TrialRun:
    """Runs a trial over three folds of the photos."""
    data = Data(source=str(photos), folds=3)
    images = read_images(data, seed=0).sealed()
    return TrialRun(settings=RunSettings(data=data), images=images, params={"lr": 0.01})


def unclocked(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def test_a_fold_trains_and_validates_as_a_trial_of_its_own_split_would(
    folded: TrialRun, config: TrialConfig, tmp_path: Path
) -> None:
    rows: list[Row] = []
    run_whole(config, replace(folded, folder=tmp_path), rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    best = []
    for number in (1, 2, 3):
        alone: list[Row] = []
        state = run_trial(config, replace(folded, images=folded.images.fold(number)), alone.append)
        best.append(state.history[state.best_epoch - 1])
    for number, row in enumerate(rows, start=1):
        assert row["fold/val/accuracy"] == best[number - 1]["val/accuracy"]
        for name in ("val/accuracy", "val/loss", "train/loss", "val/recall/red"):
            mean = sum(b[name] for b in best[:number]) / number
            assert row[name] == pytest.approx(mean, rel=1e-12)


def test_every_image_is_validated_on_once(folded: TrialRun) -> None:
    seen = [e.path for n in (1, 2, 3) for e in folded.images.fold(n).of("val")]
    assert sorted(seen) == sorted(e.path for e in folded.images.examples)
    for number in (1, 2, 3):
        fold = folded.images.fold(number)
        assert not {e.path for e in fold.of("val")} & {e.path for e in fold.of("train")}


@pytest.mark.parametrize("done", [1, 3, 4])
def test_a_trial_interrupted_in_a_fold_goes_on_to_the_same_numbers(
    done: int, folded: TrialRun, config: TrialConfig, tmp_path: Path
) -> None:
    straight: list[Row] = []
    run_whole(config, replace(folded, folder=tmp_path / "straight"), straight.append)

    run = replace(folded, folder=tmp_path / "broken")
    saved = torch.save
    count = 0

    def stop_after(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        if count == done:
            raise KeyboardInterrupt
        count += 1
        saved(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", stop_after)
        run_whole(config, run, lambda row: None)
    torch.manual_seed(77)
    resumed: list[Row] = []
    run_whole(config, run, resumed.append)
    assert unclocked(resumed) == unclocked(straight)
    for number in (1, 2, 3):
        assert (fold_folder(tmp_path / "broken", number) / "epochs.csv").exists()


def test_a_trial_without_folds_reports_its_epochs(
    run: TrialRun, config: TrialConfig, tmp_path: Path
) -> None:
    rows: list[Row] = []
    run_whole(config, replace(run, folder=tmp_path), rows.append)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert not any(name.startswith("fold/") for row in rows for name in row)


def test_a_trial_over_folds_counts_by_its_mean_and_only_when_it_has_as_many_folds() -> None:
    settings = RunSettings(data=Data(folds=3))

    def record(trial_id: str, *means: float) -> TrialRecord:
        rows = [{"epoch": n, "val/accuracy": mean} for n, mean in enumerate(means, start=1)]
        return TrialRecord(trial_id, "search", {}, 3, rows)

    lucky_first = record("t0001", 0.9, 0.7, 0.6)
    stopped = record("t0002", 0.8, 0.75)
    steady = record("t0003", 0.6, 0.64, 0.65)
    best = lucky_first.best(settings)
    assert best is not None
    assert best["val/accuracy"] == 0.6
    assert lucky_first.best(settings, up_to=2) == lucky_first.rows[1]
    found = best_record([lucky_first, stopped, steady], settings)
    assert found is not None
    assert found[0].trial_id == "t0003"


def test_the_spread_over_folds_is_the_standard_deviation_of_a_sample() -> None:
    assert spread_of([0.5, 0.7, 0.9]) == pytest.approx(math.sqrt((0.04 + 0 + 0.04) / 2))


def test_folds_of_a_sweeps_folder_have_their_own_checkpoints(
    folded: TrialRun, config: TrialConfig, tmp_path: Path
) -> None:
    run_whole(config, replace(folded, folder=tmp_path), lambda row: None)
    files = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("manifest.json")}
    assert files == {"fold1", "fold2", "fold3"}
    assert any(tmp_path.glob("events.out.tfevents.*"))  # of the means


def test_a_checkpoint_of_before_there_was_sampling_is_gone_on_with(
    run: TrialRun, config: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = TrialConfig.as_dict
    later = ("sampling", "replacement", "num_samples")
    with monkeypatch.context() as patch:
        patch.setattr(
            TrialConfig,
            "as_dict",
            lambda self: {k: v for k, v in new(self).items() if k not in later},
        )
        run_trial(replace(config, epochs=2), replace(run, folder=tmp_path), lambda row: None)
    rows: list[Row] = []
    run_trial(config, run, rows.append, resume_from=tmp_path / "checkpoints")
    assert [row["epoch"] for row in rows] == [1, 2]
    with pytest.raises(CheckpointError, match="another configuration"):
        balanced = replace(config, sampling="balanced")
        run_trial(balanced, run, rows.append, resume_from=tmp_path / "checkpoints")


def test_sampling_is_checked_on_the_images_of_a_fold(
    photos: Path,
    small_space: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(photos.glob("*/*"))
    rows = [f"{file},{file.parent.name},{1 + number % 3}" for number, file in enumerate(files)]
    Path("photos.csv").write_text("\n".join(["path,label,weight", *rows]))
    sampling = "sampling='weighted', replacement=False, num_samples=20,"
    text = small_space.read_text().replace("epochs=4,", f"epochs=4, {sampling}")
    Path("weighted.py").write_text(text)
    # Enough of all 26, but not of the two thirds of them that a fold trains on.
    assert main(["train", "weighted.py", "--data", "photos.csv", "--folds", "3"]) == 2
    said = capsys.readouterr().err
    assert "num_samples=20 without replacement: there are 17 training images to draw" in said
    assert not Path("runs").exists()
