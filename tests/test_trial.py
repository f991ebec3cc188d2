import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import tuneapp.trial as trial
from tuneapp.checkpoint import Row, TrainState
from tuneapp.config import (
    Adam,
    AdamW,
    Constant,
    Cosine,
    OneCycle,
    Optimizer,
    RunSettings,
    Schedule,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.data.store import open_store
from tuneapp.data.views import Batches, evaluation_view, training_view
from tuneapp.errors import CheckpointError, ConfigError, Diverged
from tuneapp.models import build_network
from tuneapp.trial import TrialRun, run_trial
from tuneapp.weights import preprocessing_of

CLOCKED = ("train/images_per_s", "train/data_wait")


def timeless(rows: list[Row]) -> list[Row]:
    """The rows without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def leaves(value: Any, name: str = "") -> dict[str, object]:
    """Every tensor and number of a nested state by its path, as what is equal only to itself."""
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes())}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in leaves(part, f"{name}/{key}").items()}
    return {name: repr(value)}


def outcome(state: TrainState) -> dict[str, object]:
    """All of a trained state, and the random state in which it leaves the process."""
    return leaves(
        {
            "history": timeless(state.history),
            "best_epoch": state.best_epoch,
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "schedule": state.schedule.state_dict(),
            "scaler": state.scaler.state_dict(),
            "generator": torch.get_rng_state(),
        }
    )


def differences(a: dict[str, object], b: dict[str, object]) -> list[str]:
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


class InterruptedHere(Exception):  # noqa: N818 - it is no error
    pass


def interrupt_after(config: TrialConfig, run: TrialRun, epoch: int) -> None:
    """Run a trial until it has reported this epoch."""

    def report(row: Row) -> None:
        if row["epoch"] == epoch:
            raise InterruptedHere

    with pytest.raises(InterruptedHere):
        run_trial(config, run, report)


def ignore(_: Row) -> None:
    pass


@pytest.fixture
def deep(config: TrialConfig) -> TrialConfig:
    """Trains the last block and the head, for three epochs of three steps."""
    return replace(config, freeze_depth=4, lr_ratio=0.3, epochs=3, augment="standard")


def with_dropout(network: nn.Module) -> nn.Module:
    """Let the head drop half of its features, drawn from the global generator."""
    network.fc = nn.Sequential(nn.Dropout(0.5), network.fc)
    return network


@pytest.fixture
def dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "build_network", lambda *args: with_dropout(build_network(*args)))


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network with a ResNet's stages, BatchNorm and dropout, which trains in no time."""

    def build(model: str, num_classes: int) -> nn.Module:
        network = nn.Module()
        network.conv1, network.bn1 = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        network.relu, network.maxpool = nn.ReLU(), nn.MaxPool2d(2)
        for i in range(1, 5):
            block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            setattr(network, f"layer{i}", block)
        network.avgpool, network.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, num_classes)
        return with_dropout(network)

    monkeypatch.setattr(trial, "build_network", build)


# --- Resume ---------------------------------------------------------------------------------------


def require_exact_resume(config: TrialConfig, run: TrialRun, folder: Path, *done: int) -> None:
    """Interrupt a trial after each of the epochs `done`, and compare with one that went through."""
    straight_rows: list[Row] = []
    straight = outcome(run_trial(config, run, straight_rows.append))
    for epoch in done:
        place = folder / f"after_{epoch}"
        interrupt_after(config, replace(run, folder=place), epoch)
        torch.manual_seed(77)  # the process is another one
        rows: list[Row] = []
        resumed = run_trial(config, run, rows.append, resume_from=place / "checkpoints")
        assert differences(outcome(resumed), straight) == []
        # A listener who comes anew is told of every epoch, with what was applied.
        assert timeless(rows) == timeless(straight_rows)
        assert [row["epoch"] for row in rows] == list(range(1, config.epochs + 1))
        assert all(row["applied"] == rows[0]["applied"] for row in rows)


OPTIMIZERS: list[Optimizer] = [
    Sgd(lr=0.02, momentum=0.9, weight_decay=1e-2),
    Adam(lr=2e-3, weight_decay=1e-2),
    AdamW(lr=2e-3),
]
SCHEDULES: list[Schedule] = [
    Constant(),
    Constant(warmup_fraction=0.5),
    Step(every_epochs=1),
    Step(every_epochs=1, warmup_fraction=0.3),
    Cosine(),
    Cosine(warmup_fraction=0.2),
    OneCycle(),
]


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_an_interrupted_trial_goes_on_to_the_same_bits(
    optimizer: Optimizer, schedule: Schedule, deep: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(deep, freeze_depth=2, optimizer=optimizer, schedule=schedule)
    require_exact_resume(config, run, tmp_path, 1, 2)


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [(Sgd(lr=0.02), Cosine(warmup_fraction=0.2)), (AdamW(lr=2e-3), OneCycle())],
)
def test_an_interrupted_resnet_goes_on_to_the_same_bits(
    optimizer: Optimizer, schedule: Schedule, deep: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(deep, optimizer=optimizer, schedule=schedule)
    require_exact_resume(config, run, tmp_path, 1)


@pytest.mark.usefixtures("dropout")
def test_an_interrupted_resnet_with_dropout_goes_on_to_the_same_bits(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    require_exact_resume(replace(config, augment="standard"), run, tmp_path, 1)


def forget(owner: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, lambda *_: None)


FORGOTTEN = {
    "model": forget(nn.Module, "load_state_dict"),
    "optimizer": forget(torch.optim.Optimizer, "load_state_dict"),
    "schedule": forget(torch.optim.lr_scheduler.LRScheduler, "load_state_dict"),
    "generator": forget(torch, "set_rng_state"),
}


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("forgotten", FORGOTTEN.values(), ids=FORGOTTEN.keys())
def test_a_resume_that_forgot_a_piece_would_be_seen(
    forgotten: Callable[[pytest.MonkeyPatch], None],
    deep: TrialConfig,
    run: TrialRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(deep, epochs=2, optimizer=Sgd(lr=0.02), schedule=Cosine())
    straight = outcome(run_trial(config, run, ignore))
    interrupt_after(config, replace(run, folder=tmp_path), 1)
    with monkeypatch.context() as patch:
        forgotten(patch)
        resumed = run_trial(config, run, ignore, resume_from=tmp_path / "checkpoints")
    assert "/history/1/train/loss" in differences(outcome(resumed), straight)


@pytest.mark.usefixtures("small_network")
def test_a_finished_trial_is_reported_again_and_not_trained_again(
    config: TrialConfig, run: TrialRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(run, folder=tmp_path)
    first: list[Row] = []
    finished = outcome(run_trial(config, run, first.append))
    monkeypatch.setattr(trial, "train_one_epoch", None)
    again: list[Row] = []
    state = run_trial(config, run, again.append, resume_from=tmp_path / "checkpoints")
    assert again == first
    assert differences(outcome(state), finished) == []


def test_a_trial_without_a_checkpoint_begins_at_its_beginning(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    wanted = outcome(run_trial(config, run, ignore))
    state = run_trial(config, run, ignore, resume_from=tmp_path / "nowhere")
    assert differences(outcome(state), wanted) == []


def test_the_checkpoint_of_another_configuration_is_refused(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    interrupt_after(config, replace(run, folder=tmp_path), 1)
    with pytest.raises(CheckpointError, match="another configuration"):
        run_trial(replace(config, seed=1), run, ignore, resume_from=tmp_path / "checkpoints")


# --- Nothing but the configuration and the run matter ---------------------------------------------


@pytest.mark.usefixtures("dropout")
def test_a_trial_after_another_one_is_the_trial_alone(deep: TrialConfig, run: TrialRun) -> None:
    config = replace(deep, epochs=1)
    alone = outcome(run_trial(config, run, ignore))
    other = replace(config, freeze_depth=3, batch_size=5, seed=3, optimizer=Sgd(lr=0.1))
    assert differences(outcome(run_trial(other, run, ignore)), alone) != []
    assert differences(outcome(run_trial(config, run, ignore)), alone) == []


@pytest.mark.usefixtures("dropout")
def test_the_state_of_the_process_does_not_matter(config: TrialConfig, run: TrialRun) -> None:
    torch.manual_seed(1)
    wanted = outcome(run_trial(config, run, ignore))
    torch.manual_seed(2)
    torch.rand(5)
    torch.set_num_threads(2)
    assert differences(outcome(run_trial(config, run, ignore)), wanted) == []
    assert torch.get_num_threads() == 1


def test_a_trial_has_the_threads_of_its_run(config: TrialConfig, run: TrialRun) -> None:
    run_trial(replace(config, epochs=1), replace(run, num_threads=2), ignore)
    assert torch.get_num_threads() == 2


def test_seeds_of_trial_and_run_make_other_trainings(config: TrialConfig, run: TrialRun) -> None:
    config = replace(config, epochs=1)
    others = [
        (config, run),
        (replace(config, seed=1), run),
        (config, replace(run, settings=RunSettings(seed=1))),
    ]
    losses = [run_trial(c, r, ignore).history[0]["train/loss"] for c, r in others]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("trial_seed", [0, 1])
def test_all_trials_of_a_run_see_the_same_views_in_the_same_order(
    trial_seed: int, seed: int, config: TrialConfig, run: TrialRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def build(model: str, num_classes: int) -> nn.Module:
        network = build_network(model, num_classes)
        network.conv1.register_forward_hook(lambda _, args, __: seen.append(args[0].clone()))
        return network

    monkeypatch.setattr(trial, "build_network", build)
    run = replace(run, settings=RunSettings(seed=seed))
    run_trial(replace(config, seed=trial_seed, augment="standard"), run, ignore)

    preprocessing = preprocessing_of("resnet18", None, 32, None)
    kinds = {
        "train": (training_view("standard", preprocessing), seed),
        "val": (evaluation_view(preprocessing), None),
    }
    wanted = []
    for epoch in (1, 2):
        for split, (view, shuffle_seed) in kinds.items():
            batches = Batches(
                open_store(run.images, preprocessing),
                split,
                view=view,
                preprocessing=preprocessing,
                batch_size=8,
                device=torch.device("cpu"),
                shuffle_seed=shuffle_seed,
            )
            wanted += [images for images, _ in batches.epoch(epoch)]
    assert len(seen) == len(wanted) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


@pytest.mark.usefixtures("small_network")
def test_writing_files_changes_nothing_of_the_training(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    wanted = outcome(run_trial(config, run, ignore))
    written = run_trial(config, replace(run, folder=tmp_path), ignore)
    assert differences(outcome(written), wanted) == []


# --- What is trained ------------------------------------------------------------------------------


def test_three_colours_are_learned(config: TrialConfig, run: TrialRun) -> None:
    state = run_trial(replace(config, epochs=6), run, ignore)
    losses = [row["train/loss"] for row in state.history]
    assert losses[-1] < 0.5 * losses[0]
    assert state.history[state.best_epoch - 1]["val/accuracy"] == 1.0


def test_a_row_holds_the_metrics_and_the_rates_of_its_epoch(
    deep: TrialConfig, run: TrialRun
) -> None:
    rows: list[Row] = []
    run_trial(replace(deep, optimizer=Sgd(lr=0.01), schedule=Cosine()), run, rows.append)
    # Nine steps in all; the rates are those of each epoch's first one.
    for epoch, row in enumerate(rows, start=1):
        share = (1 + math.cos(math.pi * 3 * (epoch - 1) / 9)) / 2
        assert row["epoch"] == epoch
        assert row["lr/head"] == pytest.approx(0.01 * share)
        assert row["lr/layer4"] == pytest.approx(0.003 * share)
        assert 0 <= row["val/accuracy"] <= 1
        assert row["val/accuracy"] * 4 == int(row["val/accuracy"] * 4)  # of four images
        assert row["train/images_per_s"] > 0
        assert 0 <= row["train/data_wait"] <= 1
        assert row["train/grad_norm"] > 0
        names = {"epoch", "applied", "train/loss", "val/loss", "val/accuracy", "train/grad_norm"}
        assert set(row) == {*names, *CLOCKED, "lr/layer4", "lr/head"}


@pytest.mark.parametrize(("metric", "choose"), [("val/accuracy", max), ("val/loss", min)])
def test_the_best_epoch_is_the_first_best_by_the_metric_and_its_mode(
    metric: Any, choose: Any, config: TrialConfig, run: TrialRun
) -> None:
    # A rate at which the values go up and down.
    config = replace(config, epochs=6, optimizer=Sgd(lr=0.5))
    state = run_trial(config, replace(run, settings=RunSettings(metric=metric)), ignore)
    values = [row[metric] for row in state.history]
    assert values != sorted(values, reverse=metric == "val/loss")
    assert state.best_epoch == values.index(choose(values)) + 1


def test_weights_from_a_file_are_what_the_training_starts_from(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    donor = build_network("resnet18", 1000).state_dict()
    torch.save(donor, tmp_path / "donor.pt")
    rows: list[Row] = []
    run = replace(run, weights_file=tmp_path / "donor.pt", weights_name="file")
    state = run_trial(replace(config, epochs=1), run, rows.append)
    for name, tensor in state.model.network.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, donor[name]), name
    assert rows[0]["applied"]["weights"] == "file"


def test_the_gradients_are_clipped_at_the_asked_norm(config: TrialConfig, run: TrialRun) -> None:
    config = replace(config, epochs=1, optimizer=Sgd(lr=1.0, momentum=0.0), clip_norm=1e-3)
    state = run_trial(config, run, ignore)
    # From the same seeds, as steps at a rate of nearly nothing left it.
    start = run_trial(replace(config, optimizer=Sgd(lr=1e-30, momentum=0.0)), run, ignore)
    moved = [
        (a - b).detach().flatten()
        for a, b in zip(state.model.parameters(), start.model.parameters(), strict=True)
    ]
    # Three steps, each of a thousandth.
    assert 1e-3 < float(torch.cat(moved).norm()) <= 3.001e-3


def test_a_batch_is_computed_in_the_asked_number_of_parts(
    config: TrialConfig, run: TrialRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def build(model: str, num_classes: int) -> nn.Module:
        network = build_network(model, num_classes)
        network.conv1.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
        return network

    monkeypatch.setattr(trial, "build_network", build)
    run_trial(replace(config, epochs=1, accumulation_steps=4), run, ignore)
    assert sizes == [2] * 8 + [2, 2, 2] + [4]  # 8 + 8 + 6 for training, 4 for validation


@pytest.mark.parametrize(
    ("amp", "precision"),
    [("auto", "float32"), ("off", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")],
)
def test_every_precision_trains_on_a_cpu(
    amp: Any, precision: str, config: TrialConfig, run: TrialRun
) -> None:
    rows: list[Row] = []
    run_trial(replace(config, epochs=1, amp=amp), run, rows.append)
    assert rows[0]["applied"]["precision"] == precision
    assert math.isfinite(rows[0]["train/loss"])


def test_a_gpu_that_is_not_there_is_an_error(config: TrialConfig, run: TrialRun) -> None:
    rows: list[Row] = []
    with pytest.raises(ConfigError, match=r"--device cuda: there is no GPU .*use auto or cpu"):
        run_trial(config, replace(run, settings=RunSettings(device="cuda")), rows.append)
    assert rows == []


@pytest.mark.parametrize(("device", "has_gpu"), [("auto", False), ("cpu", False), ("cpu", True)])
def test_without_a_gpu_or_without_asking_for_it_the_cpu_trains(
    device: Any, has_gpu: bool, config: TrialConfig, run: TrialRun
) -> None:
    rows: list[Row] = []
    run = replace(run, settings=RunSettings(device=device), has_gpu=has_gpu)
    run_trial(replace(config, epochs=1), run, rows.append)
    assert rows[0]["applied"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("batch_size", "step", "what"),
    [
        (8, 2, "loss"),
        # One step in an epoch: its loss is of the weights before it, so validation is the first
        # to see what it did.
        (32, 1, "val/loss"),
    ],
)
def test_a_learning_rate_out_of_all_measure_ends_as_divergence(
    batch_size: int, step: int, what: str, config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(config, batch_size=batch_size, optimizer=Sgd(lr=1e38))
    rows: list[Row] = []
    with pytest.raises(Diverged, match=f"^{what} became") as caught:
        run_trial(config, replace(run, folder=tmp_path), rows.append)
    assert caught.value.epoch == 1
    assert caught.value.step >= step
    assert rows == []
    assert not (tmp_path / "checkpoints").exists()


# --- Files ----------------------------------------------------------------------------------------


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.usefixtures("small_network")
def test_a_trials_folder_holds_its_files(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(config, epochs=3)
    params = {"optimizer": "adamw", "adamw.lr": 1e-2}
    state = run_trial(config, replace(run, folder=tmp_path / "t0001", params=params), ignore)
    folder = tmp_path / "t0001"
    (events,) = folder.glob("events.out.tfevents.*")
    names = {"config.json", "epochs.csv", "checkpoints", events.name}
    assert {p.name for p in folder.iterdir()} == names

    said = json.loads((folder / "config.json").read_text())
    assert said == {"params": params, **config.as_dict()}
    # The numbers of the table are the history's to the last bit.
    assert [{k: float(v) for k, v in row.items()} for row in table(folder / "epochs.csv")] == [
        {k: float(v) for k, v in row.items()} for row in state.history
    ]
    manifest = json.loads((folder / "checkpoints" / "manifest.json").read_text())
    assert (manifest["last"]["epoch"], manifest["best"]["epoch"]) == (3, state.best_epoch)
    kept = {manifest["last"]["file"], manifest["best"]["file"], "manifest.json"}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == kept


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("done", [1, 2])
def test_after_a_resume_the_files_are_those_of_an_uninterrupted_trial(
    done: int, config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(config, epochs=3)
    run_trial(config, replace(run, folder=tmp_path / "straight"), ignore)
    resumed = replace(run, folder=tmp_path / "resumed")
    interrupt_after(config, resumed, done)
    run_trial(config, resumed, ignore, resume_from=tmp_path / "resumed" / "checkpoints")

    def content(folder: Path) -> dict[str, object]:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag not in CLOCKED]
        manifest = json.loads((folder / "checkpoints" / "manifest.json").read_text())
        return {
            "config": (folder / "config.json").read_text(),
            "epochs": timeless(table(folder / "epochs.csv")),
            "events": {t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags},
            "manifest": {kind: entry["file"] for kind, entry in manifest.items()},
            "checkpoints": sorted(p.name for p in (folder / "checkpoints").iterdir()),
        }

    assert content(tmp_path / "resumed") == content(tmp_path / "straight")
    assert len(content(tmp_path / "straight")["events"]["val/loss"]) == 3


@pytest.mark.usefixtures("small_network")
def test_an_epoch_is_on_disk_before_it_is_reported(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    seen = []

    def report(row: Row) -> None:
        manifest = json.loads((tmp_path / "checkpoints" / "manifest.json").read_text())
        seen.append((row["epoch"], manifest["last"]["epoch"], len(table(tmp_path / "epochs.csv"))))

    run_trial(config, replace(run, folder=tmp_path), report)
    assert seen == [(1, 1, 1), (2, 2, 2)]


def test_a_trial_without_a_folder_leaves_no_file(
    config: TrialConfig, run: TrialRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_trial(replace(config, epochs=1), run, ignore)
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_epochs_is_whole_after_a_kill_between_checkpoint_and_table(
    config: TrialConfig, run: TrialRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(file: Path, history: object) -> None:
        raise KeyboardInterrupt

    in_folder = replace(run, folder=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trial, "_write_table", killed)
        run_trial(config, in_folder, lambda row: None)
    run_trial(config, in_folder, lambda row: None, resume_from=tmp_path / "checkpoints")
    assert len((tmp_path / "epochs.csv").read_text().splitlines()) == 1 + config.epochs
