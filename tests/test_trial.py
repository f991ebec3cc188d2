import csv
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import tuneapp.training as training
import tuneapp.trial as trial
from tuneapp import config as c
from tuneapp.average import WeightAverage
from tuneapp.checkpoint import Row, TrainState, read_best, validated_weights
from tuneapp.config import (
    Adam,
    AdamW,
    Constant,
    Cosine,
    CrossEntropy,
    Data,
    Loss,
    OneCycle,
    Optimizer,
    OwnLoss,
    OwnSchedule,
    Plateau,
    RmsProp,
    RunSettings,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.data.batches import Batches
from tuneapp.data.examples import ImageSet
from tuneapp.data.sampling import InOrder, Shuffled
from tuneapp.data.source import read_images
from tuneapp.data.store import open_store
from tuneapp.data.views import evaluation_view, mixing, training_view
from tuneapp.errors import AppliedValueError, CheckpointError, ConfigError, Diverged
from tuneapp.models import build_network
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel
from tuneapp.statedict import read_state_dict
from tuneapp.training import begin_training
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
            "average": None if state.average is None else state.average.state_dict(),
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


class SmallNetwork(nn.Module):
    """A network of one's own with a ResNet's stages, which trains in no time."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        for i in range(1, 5):
            block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            setattr(self, f"layer{i}", block)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        logits: Tensor = self.fc(self.dropout(self.layer4(self.layer3(x)).mean([2, 3])))
        return logits

    def stages(self) -> Mapping[str, nn.Module]:
        layers = {f"layer{i}": getattr(self, f"layer{i}") for i in range(1, 5)}
        return {"stem": self.stem, **layers, "head": self.fc}


SMALL = f"{__name__}:SmallNetwork"


@pytest.fixture
def small(config: TrialConfig) -> TrialConfig:
    """Two epochs of the head of the small network."""
    return replace(config, model=SMALL)


@pytest.fixture
def deep_small(deep: TrialConfig) -> TrialConfig:
    """Three epochs of three stages and the head of the small network."""
    return replace(deep, model=SMALL, freeze_depth=2)


class Flat(nn.Module):
    """Without a convolution of more than a pixel: both memory formats are one."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).relu().mean([2, 3]))
        return logits


def test_a_network_whose_formats_are_one_may_be_asked_for_either(
    config: TrialConfig, run: TrialRun
) -> None:
    rows: list[Row] = []
    asked = replace(config, model=f"{__name__}:Flat", freeze_depth=0, channels_last=True)
    run_trial(asked, run, rows.append)
    assert len(rows) == config.epochs


@pytest.fixture
def with_dropout(config: TrialConfig) -> TrialConfig:
    """The end of a MobileNetV3, whose dropout draws from the global generator."""
    return replace(config, model="mobilenet_v3_small", freeze_depth=-2, dropout=0.5)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images of every forward pass."""
    images: list[Tensor] = []
    really = StagedModel.forward

    def forward(model: StagedModel, x: Tensor, *args: Any, **options: Any) -> Any:
        images.append(x.clone(memory_format=torch.preserve_format))
        return really(model, x, *args, **options)

    monkeypatch.setattr(StagedModel, "forward", forward)
    return images


def batches_of(config: TrialConfig, run: TrialRun, split: str, mixed: bool = False) -> Batches:
    """The batches of a trial, opened apart from it."""
    preprocessing = preprocessing_of(config, None)
    is_training = split == "train"
    store = open_store(run.images, preprocessing)
    seed = run.settings.seed
    return Batches(
        store,
        Shuffled(store, config, seed) if is_training else InOrder(store, split),
        view=training_view(config.augment, preprocessing)
        if is_training
        else evaluation_view(preprocessing),
        preprocessing=preprocessing,
        batch_size=config.batch_size,
        device=torch.device("cpu"),
        join_single=is_training,
        mix_seed=seed,
        mix=mixing(config.mixup_alpha, config.cutmix_alpha, 3) if mixed and is_training else None,
    )


# --- Resume ---------------------------------------------------------------------------------------


def without_applied(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "applied"} for row in timeless(rows)]


def require_exact_resume(config: TrialConfig, run: TrialRun, folder: Path, *done: int) -> list[Row]:
    """Interrupt a trial after each of the epochs `done`, and compare with one that went through.

    Returns:
        The rows of that one.
    """
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
        assert without_applied(rows) == without_applied(straight_rows)
        assert [row["epoch"] for row in rows] == list(range(1, config.epochs + 1))
        for row, wanted in zip(rows, straight_rows, strict=True):
            if row["epoch"] >= epoch or not config.unfreeze_at:
                assert row["applied"] == wanted["applied"]
    return straight_rows


OPTIMIZERS: list[Optimizer] = [
    Sgd(lr=0.02, momentum=0.9, weight_decay=1e-2),
    Adam(lr=2e-3, weight_decay=1e-2),
    AdamW(lr=2e-3),
    RmsProp(lr=2e-3, momentum=0.9, centered=True),
]
SCHEDULES: list[c.Schedule] = [
    Constant(),
    Constant(warmup_fraction=0.5),
    Step(every_epochs=1),
    Step(every_epochs=1, warmup_fraction=0.3),
    c.MultiStep(milestones=[1, 2], gamma=0.5),
    c.Exponential(gamma=0.5),
    c.Polynomial(power=2),
    Cosine(),
    Cosine(warmup_fraction=0.2),
    c.CosineRestarts(first_epochs=1, multiplier=2),
    OneCycle(),
    c.Cyclic(up_epochs=1, mode="triangular2"),
    Plateau(patience=0, threshold=0.9),
    Plateau(patience=0, threshold=0.9, monitor="val/accuracy", warmup_fraction=0.2),
    OwnSchedule(factor=f"{__name__}:halved"),
]


def halved(epoch: int, config: TrialConfig) -> float:
    """A schedule of one's own."""
    return float(0.5**epoch)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_an_interrupted_schedule_goes_on_to_the_same_bits(
    schedule: c.Schedule, deep_small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    require_exact_resume(replace(deep_small, schedule=schedule), run, tmp_path, 1, 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_an_interrupted_optimizer_goes_on_to_the_same_bits(
    optimizer: Optimizer, deep_small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    for schedule in (Cosine(warmup_fraction=0.2), OneCycle()):
        config = replace(deep_small, optimizer=optimizer, schedule=schedule)
        require_exact_resume(config, run, tmp_path / type(schedule).__name__, 1, 2)


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [(Sgd(lr=0.02), Cosine(warmup_fraction=0.2)), (AdamW(lr=2e-3), OneCycle())],
)
def test_an_interrupted_resnet_goes_on_to_the_same_bits(
    optimizer: Optimizer, schedule: c.Schedule, deep: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(deep, optimizer=optimizer, schedule=schedule)
    require_exact_resume(config, run, tmp_path, 1)


def test_an_interrupted_network_with_dropout_goes_on_to_the_same_bits(
    with_dropout: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    require_exact_resume(replace(with_dropout, augment="standard"), run, tmp_path, 1)


CRAFTS: dict[str, dict[str, Any]] = {
    "average": {"ema_decay": 0.9},
    "mixing": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
    "clip_value": {"clip_value": 1e-3},
    "frozen BatchNorm that follows": {"frozen_batchnorm": "train"},
    "norms that do not decay": {
        "optimizer": AdamW(lr=2e-3, weight_decay=0.1),
        "decay_norms_and_biases": False,
    },
    "patterns": {"freeze_depth": 0, "freeze": ["stem.*", "layer?.1.*"]},
    "float16": {"amp": "fp16"},
}


@pytest.mark.parametrize("craft", CRAFTS.values(), ids=CRAFTS.keys())
def test_whatever_else_is_asked_an_interrupted_trial_goes_on_to_the_same_bits(
    craft: dict[str, Any], deep_small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    require_exact_resume(replace(deep_small, **craft), run, tmp_path, 1, 2)


UNFREEZINGS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": Sgd(lr=0.02), "schedule": Cosine(warmup_fraction=0.2)},
    "adamw": {"optimizer": AdamW(lr=2e-3), "schedule": OneCycle()},
    "plateau": {"optimizer": RmsProp(lr=2e-3), "schedule": Plateau(patience=0, threshold=0.9)},
    "average": {"optimizer": Sgd(lr=0.02), "ema_decay": 0.9, "frozen_batchnorm": "train"},
}


@pytest.mark.parametrize("chosen", UNFREEZINGS.values(), ids=UNFREEZINGS.keys())
def test_an_interruption_before_at_and_after_an_unfreezing_changes_no_bit(
    chosen: dict[str, Any], deep_small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(
        deep_small, epochs=5, freeze_depth=-1, unfreeze_at={2: 3, 4: 0}, lr_ratio=0.5, **chosen
    )
    rows = require_exact_resume(config, run, tmp_path, 1, 2, 3, 4)
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    for row, depth in zip(rows, (5, 3, 3, 0, 0), strict=True):
        rates = {name: row.get(f"lr/{name}") for name in names}
        assert [name for name, rate in rates.items() if rate is not None] == names[depth:]
        for index in range(depth, 6):
            wanted = row["lr/head"] * 0.5 ** (5 - index)
            assert rates[names[index]] == pytest.approx(wanted, rel=1e-9)
        assert list(row["applied"]["lr"]) == names[depth:]


def test_an_unfrozen_resnet_goes_on_to_the_same_bits(
    deep: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(deep, epochs=2, freeze_depth=5, unfreeze_at={2: 4})
    require_exact_resume(config, run, tmp_path, 1)


def test_a_plateau_lowers_the_rates_by_hand_and_after_an_interruption(
    deep_small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(
        deep_small,
        epochs=5,
        optimizer=RmsProp(lr=2e-3),
        schedule=Plateau(factor=0.5, patience=0, threshold=0.05),
    )
    rows = require_exact_resume(config, run, tmp_path, 2, 3)
    factor, best = 1.0, math.inf
    for row in rows:
        assert row["lr/head"] == pytest.approx(2e-3 * factor)
        assert row["lr/layer3"] == pytest.approx(2e-3 * 0.3**2 * factor)
        if row["val/loss"] < best * (1 - 0.05):
            best = row["val/loss"]
        else:
            factor *= 0.5
    assert factor < 1


def forget(owner: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, lambda *_: None)


FORGOTTEN = {
    "model": (forget(nn.Module, "load_state_dict"), "train/loss"),
    "average": (forget(WeightAverage, "load_state_dict"), "val/loss"),
    "generator": (forget(torch, "set_rng_state"), "train/loss"),
}


@pytest.mark.parametrize(("forgotten", "seen_in"), FORGOTTEN.values(), ids=FORGOTTEN.keys())
def test_a_resume_that_forgot_a_piece_would_be_seen(
    forgotten: Callable[[pytest.MonkeyPatch], None],
    seen_in: str,
    deep_small: TrialConfig,
    run: TrialRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(
        deep_small, epochs=2, optimizer=Sgd(lr=0.02), schedule=Cosine(), ema_decay=0.99
    )
    straight = outcome(run_trial(config, run, ignore))
    interrupt_after(config, replace(run, folder=tmp_path), 1)
    with monkeypatch.context() as patch:
        forgotten(patch)
        resumed = run_trial(config, run, ignore, resume_from=tmp_path / "checkpoints")
    assert f"/history/1/{seen_in}" in differences(outcome(resumed), straight)


@pytest.mark.parametrize("forgotten", [torch.optim.Optimizer, Schedule], ids=lambda c: c.__name__)
def test_a_resume_that_forgot_the_learning_rates_is_stopped(
    forgotten: type,
    deep_small: TrialConfig,
    run: TrialRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(deep_small, epochs=2, optimizer=Sgd(lr=0.02), schedule=Cosine())
    interrupt_after(config, replace(run, folder=tmp_path), 1)
    forget(forgotten, "load_state_dict")(monkeypatch)
    with pytest.raises(AppliedValueError, match=r"lr of .* was .* at update"):
        run_trial(config, run, ignore, resume_from=tmp_path / "checkpoints")


def test_a_finished_trial_is_reported_again_and_not_trained_again(
    small: TrialConfig, run: TrialRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(run, folder=tmp_path)
    first: list[Row] = []
    finished = outcome(run_trial(small, run, first.append))
    monkeypatch.setattr(training, "train_one_epoch", None)
    again: list[Row] = []
    state = run_trial(small, run, again.append, resume_from=tmp_path / "checkpoints")
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


def test_a_trial_after_another_one_is_the_trial_alone(
    with_dropout: TrialConfig, run: TrialRun
) -> None:
    config = replace(with_dropout, epochs=1, augment="standard")
    alone = outcome(run_trial(config, run, ignore))
    other = replace(config, freeze_depth=-1, batch_size=5, seed=3, optimizer=Sgd(lr=0.1))
    assert differences(outcome(run_trial(other, run, ignore)), alone) != []
    assert differences(outcome(run_trial(config, run, ignore)), alone) == []


def test_the_state_of_the_process_does_not_matter(with_dropout: TrialConfig, run: TrialRun) -> None:
    torch.manual_seed(1)
    wanted = outcome(run_trial(with_dropout, run, ignore))
    torch.manual_seed(2)
    torch.rand(5)
    torch.set_num_threads(2)
    assert differences(outcome(run_trial(with_dropout, run, ignore)), wanted) == []
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


@pytest.mark.parametrize("mix", [{}, {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}])
@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("trial_seed", [0, 1])
def test_all_trials_of_a_run_see_the_same_views_in_the_same_order(
    trial_seed: int,
    seed: int,
    mix: dict[str, float],
    small: TrialConfig,
    run: TrialRun,
    seen: list[Tensor],
) -> None:
    run = replace(run, settings=RunSettings(seed=seed))
    config = replace(small, seed=trial_seed, augment="standard", **mix)
    run_trial(config, run, ignore)
    wanted = [
        images
        for epoch in (1, 2)
        for split in ("train", "val")
        for images, _ in batches_of(config, run, split, mixed=bool(mix)).epoch(epoch)
    ]
    assert len(seen) == len(wanted) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


def test_writing_files_changes_nothing_of_the_training(
    small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    wanted = outcome(run_trial(small, run, ignore))
    written = run_trial(small, replace(run, folder=tmp_path), ignore)
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
        names = {"epoch", "applied", "train/loss", "train/grad_norm", "lr/layer4", "lr/head"}
        scores = {"loss", "accuracy", "balanced_accuracy", "macro_f1", "auroc"}
        scores |= {f"recall/{name}" for name in run.images.classes}
        assert set(row) == {*names, *CLOCKED, *(f"val/{name}" for name in scores)}


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
    config: TrialConfig, run: TrialRun, seen: list[Tensor]
) -> None:
    run_trial(replace(config, epochs=1, accumulation_steps=4), run, ignore)
    sizes = [len(images) for images in seen]
    assert sizes == [2] * 8 + [2, 2, 2] + [4]  # 8 + 8 + 6 for training, 4 for validation


# --- What is frozen -------------------------------------------------------------------------------


def test_patterns_freeze_what_they_match_as_a_depth_would(deep: TrialConfig, run: TrialRun) -> None:
    config = replace(deep, epochs=2, optimizer=Sgd(lr=0.05), lr_ratio=1.0)
    by_depth = run_trial(config, run, ignore)
    patterns = ["conv1.*", "bn1.*", "layer[1-3].*"]
    by_pattern = run_trial(replace(config, freeze_depth=0, freeze=patterns), run, ignore)
    assert differences(outcome(by_pattern), outcome(by_depth)) == []


def test_a_pattern_may_freeze_parts_of_stages(deep: TrialConfig, run: TrialRun) -> None:
    config = replace(deep, epochs=1, optimizer=Sgd(lr=0.05, weight_decay=0.1), freeze_depth=0)
    config = replace(config, freeze=["bn1.*", "*.bn?.*", "*.downsample.1.*", "fc.bias"])
    start = begin_training(config, run).state.model.state_dict()
    state = run_trial(config, run, ignore)
    norms = {
        name for name, module in state.model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    for name, tensor in state.model.state_dict().items():
        is_norm = name.rpartition(".")[0] in norms
        # Frozen BatchNorm keeps its statistics, too.
        assert torch.equal(tensor, start[name]) == (is_norm or name.endswith("fc.bias")), name
    assert len(norms) == 20


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("how", [{"freeze_depth": 4}, {"freeze_depth": 0, "freeze": ["layer?.*"]}])
def test_the_statistics_of_frozen_batchnorm_stay_or_follow_the_data(
    how: dict[str, Any], mode: Any, deep: TrialConfig, run: TrialRun
) -> None:
    config = replace(deep, epochs=1, frozen_batchnorm=mode, **how)
    start = begin_training(config, run).state.model.state_dict()
    rows: list[Row] = []
    state = run_trial(config, run, rows.append)
    assert rows[0]["applied"]["frozen_batchnorm"] == mode
    parameters = dict(state.model.named_parameters())
    for name, tensor in state.model.state_dict().items():
        owner = name.rpartition(".")[0]
        if f"{owner}.weight" in parameters and parameters[f"{owner}.weight"].requires_grad:
            continue
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == (3 if mode == "train" else 0)  # three steps, and no validation
        else:
            follows = mode == "train" and ".running_" in name
            assert torch.equal(tensor, start[name]) != follows, name


# --- Mixing, averages, losses ---------------------------------------------------------------------


def test_only_the_images_that_are_trained_on_are_mixed(
    small: TrialConfig, run: TrialRun, seen: list[Tensor]
) -> None:
    plain = run_trial(replace(small, epochs=1), run, ignore)
    unmixed = list(seen)
    seen.clear()
    config = replace(small, epochs=1, mixup_alpha=0.4, cutmix_alpha=1.0)
    mixed = run_trial(config, run, ignore)
    same = [torch.equal(a, b) for a, b in zip(seen, unmixed, strict=True)]
    assert same == [False, False, False, True]  # three batches, and that of the validation
    assert plain.history[0]["train/loss"] != mixed.history[0]["train/loss"]


def test_three_colours_are_learned_from_mixtures(config: TrialConfig, run: TrialRun) -> None:
    config = replace(config, epochs=6, mixup_alpha=0.4, cutmix_alpha=1.0)
    state = run_trial(config, run, ignore)
    assert state.history[state.best_epoch - 1]["val/accuracy"] == 1.0


def test_the_loss_of_mixtures_is_the_cross_entropy_of_their_shares(
    config: TrialConfig, run: TrialRun
) -> None:
    # Nothing is learned at this rate, and a frozen backbone is in evaluation.
    config = replace(config, epochs=1, optimizer=Sgd(lr=1e-30), mixup_alpha=0.4)
    state = run_trial(config, run, ignore)
    total, count = 0.0, 0
    with torch.no_grad():
        for images, shares in batches_of(config, run, "train", mixed=True).epoch(1):
            logs = state.model.eval()(images).double().log_softmax(dim=1)
            total -= float((shares * logs).sum())
            count += len(images)
    assert state.history[0]["train/loss"] == pytest.approx(total / count, rel=1e-5)


def scores_by_hand(model: StagedModel, config: TrialConfig, run: TrialRun) -> tuple[float, float]:
    """Loss and accuracy of a model on the validation images."""
    losses, right = [], []
    with torch.no_grad():
        for images, labels in batches_of(config, run, "val").epoch(1):
            probabilities = model.eval()(images).double().softmax(dim=1)
            losses += [-math.log(p[label]) for p, label in zip(probabilities, labels, strict=True)]
            right += (probabilities.argmax(dim=1) == labels).tolist()
    return sum(losses) / len(losses), sum(right) / len(right)


def test_what_is_validated_and_kept_is_the_average(
    deep: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(deep, epochs=2, optimizer=Sgd(lr=0.05), ema_decay=0.5)
    rows: list[Row] = []
    state = run_trial(config, replace(run, folder=tmp_path), rows.append)
    assert state.average is not None
    loss, accuracy = scores_by_hand(state.average.model, config, run)
    assert rows[-1]["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[-1]["val/accuracy"] == accuracy
    trained_loss, _ = scores_by_hand(state.model, config, run)
    assert trained_loss != pytest.approx(loss, rel=1e-3)
    assert rows[0]["applied"]["ema_decay"] == 0.5

    file = tmp_path / "checkpoints" / f"epoch-{state.epoch:04d}.pt"
    kept = read_state_dict(file, file.stat().st_mtime_ns)
    averaged = state.average.model.state_dict()
    assert all(torch.equal(kept[f"module.{n}"], t) for n, t in averaged.items())
    best = state.model
    best.load_state_dict(validated_weights(read_best(tmp_path / "checkpoints")))
    best_row = state.history[state.best_epoch - 1]
    assert best_row["val/loss"] == pytest.approx(scores_by_hand(best, config, run)[0], rel=1e-5)


def test_an_average_changes_what_is_validated_and_nothing_that_is_trained(
    deep_small: TrialConfig, run: TrialRun
) -> None:
    plain = run_trial(deep_small, run, ignore)
    averaged = run_trial(replace(deep_small, ema_decay=0.9), run, ignore)
    for a, b in zip(plain.history, averaged.history, strict=True):
        assert a["train/loss"] == b["train/loss"]
    assert plain.history[-1]["val/loss"] != averaged.history[-1]["val/loss"]
    assert differences(leaves(plain.model.state_dict()), leaves(averaged.model.state_dict())) == []


def own_loss(logits: Tensor, targets: Tensor, power: float) -> Tensor:
    """A loss of one's own: what the true class lacks to certainty, to a power."""
    return (1 - logits.softmax(dim=1).gather(1, targets.unsqueeze(1))).pow(power).mean()


LOSSES: list[Loss] = [
    CrossEntropy(label_smoothing=0.1),
    CrossEntropy(class_weights=[1.0, 2.0, 0.5]),
    c.Focal(),
    c.BinaryCrossEntropy(pos_weight=2.0),
    c.Dice(),
    c.BceDice(),
    c.Iou(),
    OwnLoss(loss=f"{__name__}:own_loss", options={"power": 2.0}),
]


def test_every_loss_is_tried() -> None:
    assert {type(loss) for loss in LOSSES} == set(c.Loss.__args__)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_three_colours_are_learned_by_every_loss(
    loss: Loss, config: TrialConfig, run: TrialRun
) -> None:
    config = replace(config, epochs=6, loss=loss)
    state = run_trial(config, run, ignore)
    losses = [row["train/loss"] for row in state.history]
    assert losses[-1] < 0.8 * losses[0]
    best = state.history[state.best_epoch - 1]
    assert best["val/accuracy"] == 1.0
    # Validation is plain cross-entropy, in nats, whatever is minimised.
    last_loss, last_accuracy = scores_by_hand(state.model, config, run)
    assert state.history[-1]["val/loss"] == pytest.approx(last_loss, rel=1e-5)
    assert state.history[-1]["val/accuracy"] == last_accuracy


@pytest.fixture
def uneven(photos: Path, tmp_path: Path) -> ImageSet:
    """The photos, of which few greens and fewer reds are trained on."""
    for split in ("train", "val"):
        shutil.copytree(photos, tmp_path / split)
    for name, kept in (("green", 6), ("red", 4)):
        for file in sorted((tmp_path / "train" / name).iterdir())[kept:]:
            file.unlink()
    return read_images(Data(source=str(tmp_path)), seed=0)


def test_balanced_weights_make_all_classes_count_alike(
    uneven: ImageSet, config: TrialConfig, run: TrialRun
) -> None:
    run = replace(run, images=uneven)
    config = replace(
        config,
        epochs=1,
        batch_size=64,  # all of them
        optimizer=Sgd(lr=1e-30),
        loss=CrossEntropy(class_weights="balanced"),
    )
    state = run_trial(config, run, ignore)
    ((images, labels),) = batches_of(config, run, "train").epoch(1)
    with torch.no_grad():
        losses = F.cross_entropy(state.model.eval()(images), labels, reduction="none").double()
    of_class = [losses[labels == label] for label in range(3)]
    assert [len(part) for part in of_class] == [10, 6, 4]
    # Weighted by one over the number of its examples, each class has a third of the mean.
    wanted = sum(float(part.mean()) for part in of_class) / 3
    assert state.history[0]["train/loss"] == pytest.approx(wanted, rel=1e-5)
    assert float(losses.mean()) != pytest.approx(wanted, rel=1e-3)


def test_the_gradients_are_cut_at_the_asked_value(config: TrialConfig, run: TrialRun) -> None:
    config = replace(config, epochs=1, optimizer=Sgd(lr=1.0, momentum=0.0), clip_value=1e-4)
    start = begin_training(config, run).state.model.state_dict()
    state = run_trial(config, run, ignore)
    moved = (state.model.network.fc.weight - start["network.fc.weight"]).detach().abs()
    # Three steps, each of a ten-thousandth at most: as far as most of them go.
    assert float(moved.max()) == pytest.approx(3e-4, rel=1e-3)
    assert float(moved.median()) > 0.9e-4
    free = run_trial(replace(config, clip_value=None), run, ignore)
    free_moved = (free.model.network.fc.weight - start["network.fc.weight"]).detach().abs()
    assert float(free_moved.max()) > 3e-3


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "depth"),
    [
        *((model, -1) for model in ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small")),
        *((model, 2) for model in ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small")),
        ("mnasnet0_5", 0),
    ],
)
def test_other_families_train_above_what_is_frozen(
    model: str, depth: int, config: TrialConfig, run: TrialRun
) -> None:
    config = replace(config, model=model, epochs=1, freeze_depth=depth, lr_ratio=0.5)
    config = replace(config, optimizer=Sgd(lr=0.01))
    start = begin_training(config, run).state.model.state_dict()
    rows: list[Row] = []
    state = run_trial(config, run, rows.append)
    names = {id(p): name for name, p in state.model.named_parameters()}
    frozen = [s.name for s in state.model.stages[:depth]]
    for stage in state.model.stages:
        weights = [p for p in stage.parameters() if p.ndim > 1]
        same = [torch.equal(p, start[names[id(p)]]) for p in weights]
        assert all(same) if stage.name in frozen else not all(same), stage.name
    assert [name for name in rows[0] if name.startswith("lr/")] == [
        f"lr/{stage.name}" for stage in state.model.stages if stage.name not in frozen
    ]


def test_channels_last_is_another_layout_of_the_same_training(
    config: TrialConfig, run: TrialRun, seen: list[Tensor]
) -> None:
    config = replace(config, epochs=1, freeze_depth=4, mixup_alpha=0.4, optimizer=Sgd(lr=0.01))
    plain = run_trial(config, run, ignore)
    assert all(images.is_contiguous() for images in seen)
    seen.clear()
    rows: list[Row] = []
    other = run_trial(replace(config, channels_last=True), run, rows.append)
    assert rows[0]["applied"]["channels_last"]
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in seen)
    kernel = other.model.network.layer4[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    # The same sums in another order.
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        assert other.history[0][name] == pytest.approx(plain.history[0][name], rel=1e-3)


def test_a_network_a_loss_and_a_schedule_of_ones_own_train_together(
    small: TrialConfig, run: TrialRun
) -> None:
    config = replace(
        small,
        freeze_depth=0,
        loss=OwnLoss(loss=f"{__name__}:own_loss", options={"power": 1.0}),
        schedule=OwnSchedule(factor=f"{__name__}:halved"),
        epochs=3,
        lr_ratio=0.5,
    )
    rows: list[Row] = []
    state = run_trial(config, run, rows.append)
    assert isinstance(state.model.network, SmallNetwork)
    assert [row["lr/head"] for row in rows] == pytest.approx([1e-2, 5e-3, 2.5e-3])
    assert [row["lr/stem"] for row in rows] == pytest.approx(
        [f * 1e-2 * 0.5**5 for f in (1, 0.5, 0.25)]
    )
    # What the true class lacks to certainty lies in [0, 1].
    assert all(0 < row["train/loss"] < 1 for row in rows)
    assert rows[0]["applied"]["schedule"] == "LambdaLR"


def test_dropout_and_stochastic_depth_are_those_that_were_asked_for(
    config: TrialConfig, run: TrialRun
) -> None:
    config = replace(config, model="efficientnet_b0", epochs=1, freeze_depth=-2)
    config = replace(config, dropout=0.45, stochastic_depth=0.3)
    state = run_trial(config, run, ignore)
    drops = [m.p for m in state.model.modules() if isinstance(m, nn.Dropout)]
    skips = [m.p for m in state.model.modules() if isinstance(m, StochasticDepth)]
    assert drops == [0.45]
    # A linear rise over the blocks, as in torchvision's own.
    assert skips == pytest.approx([0.3 * i / (len(skips) - 1) for i in range(len(skips))])
    own = build_network("efficientnet_b0", 3)
    theirs = [m.p for m in own.modules() if isinstance(m, StochasticDepth)]
    assert len(theirs) == len(skips) > 10
    # Nothing is dropped in validation.
    loss, _ = scores_by_hand(state.model, config, run)
    assert state.history[0]["val/loss"] == pytest.approx(loss, rel=1e-5)


def test_auxiliary_classifiers_are_trained_beside_the_head(
    config: TrialConfig, run: TrialRun
) -> None:
    config = replace(
        config,
        model="googlenet",
        epochs=1,
        batch_size=64,  # all of them
        freeze_depth=-1,
        aux_weight=0.3,
        dropout=0.0,
        optimizer=Sgd(lr=1e-30),
    )
    state = run_trial(config, run, ignore)
    ((images, labels),) = batches_of(config, run, "train").epoch(1)
    with torch.no_grad():
        outputs = state.model.train()(images)
        costs = [float(F.cross_entropy(logits, labels)) for logits in (outputs[0], *outputs[1])]
    assert len(costs) == 3
    wanted = costs[0] + 0.3 * (costs[1] + costs[2])
    assert state.history[0]["train/loss"] == pytest.approx(wanted, rel=1e-5)
    assert state.model.network.aux1.fc2.weight.requires_grad
    # Validation knows of the head only.
    loss, _ = scores_by_hand(state.model, config, run)
    assert state.history[0]["val/loss"] == pytest.approx(loss, rel=1e-5)


def test_another_dropout_is_another_training(with_dropout: TrialConfig, run: TrialRun) -> None:
    losses = {
        dropout: run_trial(replace(with_dropout, epochs=1, dropout=dropout), run, ignore).history[
            0
        ]["train/loss"]
        for dropout in (None, 0.2, 0.5, 0.0)
    }
    assert losses[None] == losses[0.2]  # MobileNetV3's own
    assert len(set(losses.values())) == 3


# --- Where and how precisely ----------------------------------------------------------------------


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


def test_a_trials_folder_holds_its_files(small: TrialConfig, run: TrialRun, tmp_path: Path) -> None:
    config = replace(small, epochs=3)
    params = {"optimizer": "adamw", "adamw.lr": 1e-2}
    state = run_trial(config, replace(run, folder=tmp_path / "t0001", params=params), ignore)
    folder = tmp_path / "t0001"
    (events,) = folder.glob("events.out.tfevents.*")
    names = {"config.json", "epochs.csv", "checkpoints", events.name}
    assert {p.name for p in folder.iterdir()} == names

    said = json.loads((folder / "config.json").read_text())
    assert said.pop("preprocessing")["crop_size"] == 32
    assert said == {"params": params, **config.as_dict()}
    # The numbers of the table are the history's to the last bit.
    assert [{k: float(v) for k, v in row.items()} for row in table(folder / "epochs.csv")] == [
        {k: float(v) for k, v in row.items()} for row in state.history
    ]
    manifest = json.loads((folder / "checkpoints" / "manifest.json").read_text())
    assert (manifest["last"]["epoch"], manifest["best"]["epoch"]) == (3, state.best_epoch)
    frozen = {path for entry in manifest.values() for path in entry["parts"]}
    kept = {entry["file"] for entry in manifest.values()} | frozen | {"manifest.json"}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == kept


@pytest.mark.parametrize("unfreeze_at", [{}, {2: 3, 3: 0}], ids=repr)
@pytest.mark.parametrize("done", [1, 2])
def test_after_a_resume_the_files_are_those_of_an_uninterrupted_trial(
    done: int, unfreeze_at: dict[int, int], small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(small, epochs=3, unfreeze_at=unfreeze_at)
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


def test_an_epoch_is_on_disk_before_it_is_reported(
    small: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    seen = []

    def report(row: Row) -> None:
        manifest = json.loads((tmp_path / "checkpoints" / "manifest.json").read_text())
        seen.append((row["epoch"], manifest["last"]["epoch"], len(table(tmp_path / "epochs.csv"))))

    run_trial(small, replace(run, folder=tmp_path), report)
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


class Counting(nn.Module):
    """A loss that remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(logits, targets) * self.calls


counting = Counting()


@pytest.mark.parametrize("name", ["Counting", "counting"])
def test_a_loss_with_a_state_goes_on_with_it(
    name: str, config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    config = replace(config, loss=OwnLoss(loss=f"{__name__}:{name}"), epochs=2)
    whole: list[Row] = []
    run_trial(config, run, whole.append)

    class StopError(Exception):
        pass

    def stop(row: Row) -> None:
        raise StopError

    placed = replace(run, folder=tmp_path)
    again: list[Row] = []
    with pytest.raises(StopError):
        run_trial(config, placed, stop)
    run_trial(config, placed, again.append, resume_from=tmp_path / "checkpoints")
    assert [row["train/loss"] for row in again] == [row["train/loss"] for row in whole]
    assert float(counting.calls) == 0  # a trial has a copy of its own


def test_batches_of_one_example_are_batches_of_one(config: TrialConfig, run: TrialRun) -> None:
    rows: list[Row] = []
    run_trial(replace(config, batch_size=1, epochs=1, freeze_depth=5), run, rows.append)
    assert rows[0]["applied"]["batch_size"] == 1


def test_weights_of_a_trial_come_with_the_way_its_images_were_prepared(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    theirs = replace(
        config, epochs=1, preprocess=c.Preprocess(mean=(0.1, 0.2, 0.3), interpolation="bicubic")
    )
    run_trial(theirs, replace(run, folder=tmp_path / "t0001"), lambda row: None)
    for folder in (tmp_path / "t0001", tmp_path / "t0001" / "checkpoints"):
        ours = replace(config, weights=str(folder), image_size=None)
        assert preprocessing_of(ours, None) == preprocessing_of(theirs, None)
