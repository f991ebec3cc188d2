import math
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tuneapp.checkpoint import Row
from tuneapp.config import Metric, RunSettings
from tuneapp.tracking import NoTracker, TensorBoardTracker, _as_hparam

PARAMS: dict[str, Any] = {
    "optimizer": "sgd",
    "sgd.lr": 0.01,
    "freeze_depth": 3,
    "nesterov": True,
    "weights": None,
}
ACCURACIES = [0.5, 0.75, 0.625, 0.875, 0.25]
LOSSES = [1.0, 0.5, 0.75, 2.0, 0.25]
HISTORY: list[Row] = [
    {
        "epoch": i + 1,
        "val/accuracy": a,
        "val/loss": x,
        "train/loss": 2 * x,
        "lr/head": 0.1 / (i + 1),
    }
    for i, (a, x) in enumerate(zip(ACCURACIES, LOSSES, strict=True))
]


def track(
    folder: Path, *, history: list[Row], more: list[Row], metric: Metric = "val/accuracy"
) -> None:
    tracker = TensorBoardTracker(folder, PARAMS, RunSettings(metric=metric), history)
    for row in more:
        tracker.epoch(row)
    tracker.close()


def read(folder: Path) -> EventAccumulator:
    """Read with TensorBoard's own reader, keeping every event."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = read(folder)
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_every_number_of_a_row_is_one_value_at_its_epoch(tmp_path: Path) -> None:
    track(tmp_path, history=[], more=HISTORY)
    got = scalars(tmp_path)
    assert set(got) == {"val/accuracy", "val/loss", "train/loss", "lr/head", "best/val/accuracy"}
    for tag in ("val/accuracy", "val/loss", "train/loss", "lr/head"):
        assert [step for step, _ in got[tag]] == [1, 2, 3, 4, 5]
        wanted = [row[tag] for row in HISTORY]
        assert [value for _, value in got[tag]] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("val/accuracy", [0.5, 0.75, 0.75, 0.875, 0.875]),
        ("val/loss", [1.0, 0.5, 0.5, 0.5, 0.25]),
    ],
)
def test_the_best_value_so_far_is_told_by_the_mode_of_the_metric(
    metric: Metric, best: list[float], tmp_path: Path
) -> None:
    track(tmp_path, history=[], more=HISTORY, metric=metric)
    assert scalars(tmp_path)[f"best/{metric}"] == list(enumerate(best, start=1))


@pytest.mark.parametrize("done", range(6))
def test_after_a_resume_no_epoch_is_there_twice_and_none_is_missing(
    done: int, tmp_path: Path
) -> None:
    track(tmp_path / "straight", history=[], more=HISTORY)
    # The interrupted run was one epoch further than its last checkpoint.
    track(tmp_path / "resumed", history=[], more=HISTORY[: done + 1])
    # Event files are named after the second: the old one is of another.
    (old,) = (tmp_path / "resumed").iterdir()
    old.rename(old.with_name("events.out.tfevents.1000000000.here"))
    track(tmp_path / "resumed", history=HISTORY[:done], more=HISTORY[done:])
    assert scalars(tmp_path / "resumed") == scalars(tmp_path / "straight")
    assert len(list((tmp_path / "resumed").iterdir())) == 1


def test_only_event_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "epochs.csv").write_text("epoch\n")
    track(tmp_path, history=[], more=HISTORY)
    track(tmp_path, history=HISTORY, more=[])
    assert (tmp_path / "epochs.csv").read_text() == "epoch\n"


def test_the_parameters_and_the_metric_are_there_for_hparams(tmp_path: Path) -> None:
    track(tmp_path, history=[], more=HISTORY)
    contents = read(tmp_path).PluginTagToContent("hparams")
    said = {tag: HParamsPluginData.FromString(content) for tag, content in contents.items()}
    experiment = said["_hparams_/experiment"].experiment
    start = said["_hparams_/session_start_info"].session_start_info
    assert {info.name for info in experiment.hparam_infos} == set(PARAMS)
    assert [info.name.tag for info in experiment.metric_infos] == ["best/val/accuracy"]
    values = {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()}
    assert values == {**PARAMS, "weights": "None"}


def test_a_parameter_that_a_file_cannot_hold_is_text() -> None:
    assert _as_hparam(2**64) == "18446744073709551616"
    assert _as_hparam("caf\udce9") == "caf\\udce9"
    assert [_as_hparam(v) for v in (True, 3, 0.5, "a", None)] == [True, 3, 0.5, "a", "None"]


def test_a_value_that_is_no_number_does_not_stop_the_log(tmp_path: Path) -> None:
    track(tmp_path, history=[], more=[{**HISTORY[0], "val/loss": math.nan}, HISTORY[1]])
    (first, second) = scalars(tmp_path)["val/loss"]
    assert math.isnan(first[1])
    assert second == (2, 0.5)


def test_the_silent_twin_takes_the_same_calls(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = NoTracker()
    for row in HISTORY:
        tracker.epoch(row)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_an_epoch_can_be_seen_soon_after_it_was_written(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, {}, RunSettings(), [])
    for epoch in (1, 2, 3):
        tracker.epoch({"epoch": epoch, "val/accuracy": 0.1 * epoch})
    deadline = time.monotonic() + 20
    seen = 0
    while seen < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
        events = EventAccumulator(str(tmp_path)).Reload()
        seen = (
            len(events.Scalars("val/accuracy")) if "val/accuracy" in events.Tags()["scalars"] else 0
        )
    tracker.close()
    assert seen == 3
