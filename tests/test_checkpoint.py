import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tuneapp
from tuneapp import checkpoint
from tuneapp import config as c
from tuneapp.average import WeightAverage
from tuneapp.checkpoint import (
    MANIFEST,
    TrainState,
    bytes_of,
    drop,
    frozen_parts,
    keep_only_best,
    read_best,
    validated_weights,
)
from tuneapp.config import Cosine, Plateau, Sgd, TrialConfig
from tuneapp.errors import CheckpointError, WeightsError
from tuneapp.families import RESNET
from tuneapp.models import apply_freezing
from tuneapp.optim import build_optimizer
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel
from tuneapp.statedict import read_state_dict
from tuneapp.training import TrialRun
from tuneapp.trial import run_trial

CONFIG = TrialConfig(
    model="resnet18",
    optimizer=Sgd(lr=0.1, momentum=0.9),
    schedule=Cosine(warmup_fraction=0.2),
    epochs=5,
    freeze_depth=3,
)
STEPS = 2  # of an epoch


def fresh(config: TrialConfig = CONFIG, seed: int = 0) -> TrainState:
    """The state before the first epoch, of a network with six stages and a handful of numbers."""
    torch.manual_seed(seed)
    net = nn.Module()
    net.conv1, net.bn1, net.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    net.maxpool = nn.MaxPool2d(2)
    for i in range(1, 5):
        setattr(net, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
    model = StagedModel(net, RESNET)
    apply_freezing(model, config)
    optimizer = build_optimizer(model, config)
    return TrainState(
        model=model,
        optimizer=optimizer,
        schedule=Schedule(optimizer, config, STEPS),
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3),
        config=config,
        steps_per_epoch=STEPS,
        average=None if config.ema_decay is None else WeightAverage(model, config.ema_decay),
    )


def train(state: TrainState, *, is_best: bool) -> None:
    """One epoch of two steps, whose images are drawn from the global generator."""
    state.enter(state.epoch + 1)
    state.model.train()
    rates = {f"lr/{g['stage']}": g["lr"] for g in state.optimizer.param_groups}
    total = 0.0
    for _ in range(STEPS):
        state.optimizer.zero_grad()
        logits = state.model(torch.randn(4, 3, 8, 8))
        loss = F.cross_entropy(F.dropout(logits), torch.tensor([0, 1, 2, 0]))
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.schedule.step()
        if state.average is not None:
            state.average.update(state.model)
        total += float(loss.detach())
    # A plateau, which looks at it, finds no improvement in the epochs 2, 4 and 5.
    val_loss = [1.0, 1.0, 0.5, 0.5, 0.5][state.epoch]
    row = {"epoch": state.epoch + 1, "train/loss": total / STEPS, "val/loss": val_loss, **rates}
    state.schedule.end_epoch(row)
    state.history.append(row)
    if is_best:
        state.best_epoch = state.epoch


def trained(
    folder: Path,
    *,
    epochs: int,
    best: int,
    frozen: Path | None = None,
    config: TrialConfig = CONFIG,
) -> TrainState:
    """Train and save each epoch; `best` is the last epoch that was better than those before."""
    state = fresh(config)
    for epoch in range(1, epochs + 1):
        train(state, is_best=epoch in (1, best))
        state.save(folder, frozen)
    return state


def everything(state: TrainState) -> bytes:
    """All that the next epoch depends on, as bytes that are equal only if all of it is."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
        if isinstance(value, dict):
            return [(repr(k), plain(v)) for k, v in value.items()]
        return [plain(v) for v in value] if isinstance(value, list | tuple) else repr(value)

    parts = (state.model, state.optimizer, state.schedule, state.scaler, state.average)
    trained = [p.requires_grad for p in state.model.parameters()]
    modes = [m.training for m in state.model.train().modules()]
    rest = (state.history, state.best_epoch, torch.get_rng_state(), trained, modes)
    states = [None if part is None else plain(part.state_dict()) for part in parts]
    return repr(states + [plain(r) for r in rest]).encode()


PART = re.compile(r"[0-9a-f]{32}\.pt")


def checkpoints(folder: Path) -> list[str]:
    """All files but those with what is frozen."""
    return sorted(p.name for p in folder.iterdir() if not PART.fullmatch(p.name))


def parts_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if PART.fullmatch(p.name))


def sha256(file: Path) -> str:
    done = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def entries(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def epoch_file(folder: Path, kind: str) -> Path:
    return folder / str(entries(folder)[kind]["file"])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


# --- Saving and loading ---------------------------------------------------------------------------


def test_a_state_that_was_read_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    straight = fresh()
    for epoch in range(1, 6):
        train(straight, is_best=epoch in (1, 2))
    wanted = everything(straight)

    for done in range(1, 5):
        folder = tmp_path / str(done)
        trained(folder, epochs=done, best=2)
        state = fresh(seed=99)
        assert everything(state) != wanted
        assert state.load(folder)
        assert state.epoch == done
        for epoch in range(done + 1, 6):
            train(state, is_best=epoch in (1, 2))
        assert everything(state) == wanted, f"after {done} epochs"


def test_what_was_read_is_what_was_saved(tmp_path: Path) -> None:
    saved = everything(trained(tmp_path, epochs=3, best=3))
    torch.randn(7)
    state = fresh(seed=99)
    assert state.load(tmp_path)
    assert everything(state) == saved
    assert (state.epoch, state.best_epoch) == (3, 3)


@pytest.mark.parametrize(
    ("epochs", "best", "kept"),
    [
        (1, 1, ["epoch-0001.pt"]),
        (2, 2, ["epoch-0001.pt", "epoch-0002.pt"]),
        (4, 2, ["epoch-0002.pt", "epoch-0004.pt"]),
        (4, 1, ["epoch-0001.pt", "epoch-0004.pt"]),
        (4, 4, ["epoch-0003.pt", "epoch-0004.pt"]),
    ],
)
def test_the_last_and_the_best_epoch_are_kept_and_the_one_before_where_they_are_one(
    epochs: int, best: int, kept: list[str], tmp_path: Path
) -> None:
    trained(tmp_path, epochs=epochs, best=best)
    assert checkpoints(tmp_path) == [*kept, MANIFEST]
    said = entries(tmp_path)
    assert (said["last"]["epoch"], said["best"]["epoch"]) == (epochs, best)
    assert ("previous" in said) == (epochs == best > 1)
    for entry in said.values():
        assert entry["sha256"] == sha256(tmp_path / entry["file"])


def test_the_best_epoch_is_read_as_it_was_then(tmp_path: Path) -> None:
    wanted = everything_of_model(trained(tmp_path / "to_two", epochs=2, best=2))
    trained(tmp_path / "to_four", epochs=4, best=2)
    content = read_best(tmp_path / "to_four")
    assert len(content["history"]) == content["best_epoch"] == 2
    state = fresh(seed=99)
    state.model.load_state_dict(content["model"])
    assert everything_of_model(state) == wanted


def everything_of_model(state: TrainState) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in state.model.state_dict().values()]


def test_saving_goes_on_after_a_load(tmp_path: Path) -> None:
    trained(tmp_path, epochs=3, best=2)
    state = fresh()
    state.load(tmp_path)
    train(state, is_best=False)
    state.save(tmp_path)
    assert checkpoints(tmp_path) == ["epoch-0002.pt", "epoch-0004.pt", MANIFEST]
    assert len(read_best(tmp_path)["history"]) == 2


def test_a_checkpoint_is_plain_tensors_and_values(tmp_path: Path) -> None:
    trained(tmp_path, epochs=1, best=1)
    content = torch.load(tmp_path / "epoch-0001.pt", weights_only=True)
    assert json.loads(content["config"]) == CONFIG.as_dict()
    assert content["history"][0]["epoch"] == 1


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_folder_is_no_checkpoint(made: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    if made:
        folder.mkdir()
    state = fresh()
    before = everything(state)
    assert not state.load(folder)
    assert everything(state) == before
    with pytest.raises(CheckpointError, match="no intact best checkpoint"):
        read_best(folder)


# --- Stages that are unfrozen, and the average of the weights -------------------------------------

# Two of the six stages are trained at first, three from epoch 2 on, and all from epoch 4 on.
GRADUAL = replace(CONFIG, freeze_depth=4, unfreeze_at={2: 3, 4: -6}, lr_ratio=0.5)
UNFREEZINGS = {
    "sgd with momentum": GRADUAL,
    "weight decay": replace(GRADUAL, optimizer=Sgd(lr=0.1, weight_decay=0.1)),
    "no decay of norms": replace(
        GRADUAL, optimizer=c.AdamW(lr=0.01, weight_decay=0.1), decay_norms_and_biases=False
    ),
    "adam": replace(GRADUAL, optimizer=c.Adam(lr=0.01)),
    "rmsprop": replace(GRADUAL, optimizer=c.RmsProp(lr=0.01, momentum=0.9, centered=True)),
    "plateau": replace(GRADUAL, schedule=Plateau(patience=0, factor=0.5)),
    "plateau of adam, warmed up": replace(
        GRADUAL,
        optimizer=c.AdamW(lr=0.01),
        schedule=Plateau(patience=0, factor=0.5, cooldown=1, warmup_fraction=0.3),
    ),
    "one cycle": replace(GRADUAL, schedule=c.OneCycle()),
    "cyclic": replace(GRADUAL, schedule=c.Cyclic(up_epochs=1, warmup_fraction=0.1)),
    "cosine with restarts": replace(GRADUAL, schedule=c.CosineRestarts(first_epochs=2)),
    "multi-step": replace(GRADUAL, schedule=c.MultiStep(milestones=[1, 4], gamma=0.5)),
    "exponential": replace(GRADUAL, schedule=c.Exponential(gamma=0.5)),
    "polynomial": replace(GRADUAL, schedule=c.Polynomial(power=0.9)),
    "average": replace(GRADUAL, ema_decay=0.9),
    "batchnorm that follows": replace(GRADUAL, frozen_batchnorm="train"),
    "all at once": replace(
        GRADUAL,
        optimizer=c.AdamW(lr=0.01),
        schedule=Plateau(patience=0),
        ema_decay=0.9,
        frozen_batchnorm="train",
    ),
}
every_unfreezing = pytest.mark.parametrize("config", UNFREEZINGS.values(), ids=UNFREEZINGS.keys())


@every_unfreezing
def test_unfreezing_survives_an_interruption_after_each_epoch(
    config: TrialConfig, tmp_path: Path
) -> None:
    straight = fresh(config)
    for _ in range(5):
        train(straight, is_best=False)
    wanted = everything(straight)

    state = fresh(config)
    for done in range(1, 5):
        train(state, is_best=False)
        saved = everything(state)
        folder = tmp_path / str(done)
        state.save(folder)
        other = fresh(config, seed=99)
        assert other.load(folder)
        assert everything(other) == saved, f"as read after epoch {done}"
        for _ in range(done, 5):
            train(other, is_best=False)
        assert everything(other) == wanted, f"interrupted after epoch {done}"
        # And one that is interrupted after each and every epoch.
        state = fresh(config, seed=98)
        state.load(folder)


def test_stages_are_unfrozen_in_their_epochs_and_stay_so_after_a_load(tmp_path: Path) -> None:
    wanted = {1: 4, 2: 3, 3: 3, 4: 0, 5: 0}
    state = fresh(GRADUAL)
    for epoch, depth in wanted.items():
        assert state.enter(epoch) == (epoch in (2, 4))
        assert not state.enter(epoch)
        train(state, is_best=False)
        state.save(tmp_path)
        read = fresh(GRADUAL, seed=99)
        read.load(tmp_path)
        for each in (state, read):
            trained = [all(p.requires_grad for p in s.parameters()) for s in each.model.stages]
            assert trained == [index >= depth for index in range(6)]
            assert len(each.optimizer.param_groups) == 6 - depth


class Twin:
    """The training of `fresh(GRADUAL)` in plain torch: one optimizer and schedule throughout.

    All stages are in it from the beginning. What is frozen has no gradient, and torch's optimizers
    pass over that, so its state begins with its first gradient.
    """

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], lr: float) -> None:
        self.model = fresh(GRADUAL).model
        stages = self.model.stages
        self.optimizer = make(
            [
                {"params": stage.parameters(), "lr": lr * 0.5 ** (5 - index)}
                for index, stage in enumerate(stages)
            ]
        )
        rise = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.01, total_iters=2)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=8)
        self.schedule = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [rise, fall], [2])

    def train(self, depth: int) -> None:
        for index, stage in enumerate(self.model.stages):
            stage.module.train(index >= depth)
        for _ in range(STEPS):
            self.optimizer.zero_grad()
            logits = self.model(torch.randn(4, 3, 8, 8))
            F.cross_entropy(F.dropout(logits), torch.tensor([0, 1, 2, 0])).backward()
            for stage in self.model.stages[:depth]:
                for parameter in stage.parameters():
                    parameter.grad = None
            self.optimizer.step()
            self.schedule.step()


@pytest.mark.parametrize(
    ("chosen", "make", "lr"),
    [
        (Sgd(lr=0.1), lambda groups: torch.optim.SGD(groups, momentum=0.9), 0.1),
        (
            c.AdamW(lr=0.01, weight_decay=0.1),
            lambda groups: torch.optim.AdamW(groups, weight_decay=0.1, fused=True),
            0.01,
        ),
        (
            c.RmsProp(lr=0.01, momentum=0.9),
            lambda groups: torch.optim.RMSprop(groups, momentum=0.9),
            0.01,
        ),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
def test_unfreezing_trains_as_one_optimizer_would_that_had_all_stages_from_the_beginning(
    chosen: c.Optimizer, make: Callable[[Any], torch.optim.Optimizer], lr: float
) -> None:
    twin = Twin(make, lr)
    for stage in twin.model.stages:
        stage.module.requires_grad_(True)
    for depth in (4, 3, 3, 0, 0):
        twin.train(depth)

    state = fresh(replace(GRADUAL, optimizer=chosen))
    start = copy.deepcopy(state.model)
    for _ in range(5):
        train(state, is_best=False)
    for name, tensor in state.model.state_dict().items():
        assert torch.allclose(tensor, twin.model.state_dict()[name], rtol=1e-4, atol=1e-5), name
        is_weight = tensor.ndim > 1  # a bias before BatchNorm has hardly a gradient
        assert not (is_weight and torch.equal(tensor, start.state_dict()[name])), name


@pytest.mark.parametrize(
    ("optimizer", "remembered"),
    [(Sgd(lr=0.1), {"momentum_buffer"}), (c.Adam(lr=0.01), {"step", "exp_avg", "exp_avg_sq"})],
    ids=["sgd", "adam"],
)
def test_what_was_trained_already_keeps_its_momentum_and_what_is_new_has_none(
    optimizer: c.Optimizer, remembered: set[str]
) -> None:
    state = fresh(replace(GRADUAL, optimizer=optimizer))
    train(state, is_best=False)
    head, layer3 = state.model.stages[5].parameters(), state.model.stages[3].parameters()
    before = [copy.deepcopy(state.optimizer.state[p]) for p in head]
    assert state.enter(2)
    for parameter, was in zip(head, before, strict=True):
        now = state.optimizer.state[parameter]
        assert set(now) == remembered
        assert all(torch.equal(now[name], was[name]) for name in remembered)
        assert all(bool(now[name].any()) for name in remembered)
    assert all(parameter not in state.optimizer.state for parameter in layer3)
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert held >= {id(p) for p in layer3}


@every_unfreezing
def test_a_stage_that_is_unfrozen_is_where_the_schedule_of_the_others_is(
    config: TrialConfig,
) -> None:
    # At a ratio of 1/2, each rate is half of that above it, in every epoch.
    state = fresh(config)
    for _ in range(5):
        train(state, is_best=False)
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    for row, depth in zip(state.history, (4, 3, 3, 0, 0), strict=True):
        rates = [row[f"lr/{name}"] for name in names[depth:]]
        assert {name for name in row if name.startswith("lr/")} == {
            f"lr/{name}" for name in names[depth:]
        }
        assert all(a == pytest.approx(b / 2, rel=1e-9, abs=1e-12) for a, b in pairwise(rates))


def test_the_average_is_what_was_validated(tmp_path: Path) -> None:
    state = fresh(replace(GRADUAL, ema_decay=0.9))
    for _ in range(3):
        train(state, is_best=True)
    state.save(tmp_path)
    assert state.average is not None
    content = read_best(tmp_path)
    read = validated_weights(content)
    averaged = state.average.model.state_dict()
    assert read.keys() == averaged.keys() == state.model.state_dict().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in averaged.items())
    assert any(not torch.equal(read[name], content["model"][name]) for name in averaged)


def test_without_an_average_the_model_is_what_was_validated(tmp_path: Path) -> None:
    state = trained(tmp_path, epochs=2, best=2)
    read = validated_weights(read_best(tmp_path))
    own = state.model.state_dict()
    assert read.keys() == own.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in own.items())


# --- What is frozen -------------------------------------------------------------------------------

STAGES = ["conv1 bn1", "layer1", "layer2", "layer3", "layer4", "fc"]


def frozen_by_hand(depth: int) -> set[str]:
    """Names in the first stages of the network of `fresh`, which has nothing but BatchNorm."""
    modules = " ".join(STAGES[:depth]).split()
    names = fresh().model.state_dict()
    return {name for name in names if name.split(".")[1] in modules}


def left_out(content: dict[str, Any], of: str = "model") -> set[str]:
    return {name for name, tensor in content[of].items() if tensor is None}


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("depth", range(6))
def test_an_epoch_holds_only_what_is_trained_and_each_frozen_stage_has_a_file(
    depth: int, ema_decay: float | None, tmp_path: Path
) -> None:
    config = replace(CONFIG, freeze_depth=depth, ema_decay=ema_decay)
    trained(tmp_path, epochs=1, best=1, config=config)
    content = torch.load(tmp_path / "epoch-0001.pt", weights_only=True)
    wanted = frozen_by_hand(depth)
    assert left_out(content) == wanted
    if ema_decay is not None:
        assert left_out(content, "ema") == {f"module.{name}" for name in wanted}
    held = [set(torch.load(file, weights_only=True)) for file in parts_in(tmp_path)]
    assert len(held) == depth
    assert set().union(*held) == wanted
    assert sum(map(len, held)) == len(wanted)


def test_buffers_that_follow_the_data_stay_in_the_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, epochs=1, best=1, config=replace(CONFIG, frozen_batchnorm="train"))
    parameters = {name for name, _ in fresh().model.named_parameters()}
    content = torch.load(tmp_path / "epoch-0001.pt", weights_only=True)
    assert left_out(content) == frozen_by_hand(3) & parameters


def test_parameters_that_are_frozen_by_name_go_with_their_batchnorm(tmp_path: Path) -> None:
    config = replace(CONFIG, freeze_depth=0, freeze=("*layer2.1.*", "*layer3.0.weight", "bn1.bias"))
    trained(tmp_path, epochs=2, best=2, config=config)
    content = torch.load(tmp_path / "epoch-0002.pt", weights_only=True)
    norm = {f"network.layer2.1.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    assert left_out(content) == norm | {
        "network.layer2.1.num_batches_tracked",
        "network.layer3.0.weight",
        "network.bn1.bias",  # whose BatchNorm trains its weight, and so follows the data
    }
    assert len(parts_in(tmp_path)) == 3


class Counter(nn.Module):
    """It counts in `eval()`, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


def test_a_buffer_of_ones_own_in_a_frozen_stage_is_not_taken_for_frozen(tmp_path: Path) -> None:
    def begin() -> TrainState:
        state = fresh()
        state.model.network.layer1.append(Counter())
        state.model.stages[1].module[0] = state.model.network.layer1
        return state

    state = begin()
    for _ in range(2):
        train(state, is_best=True)
        state.save(tmp_path)
    read = begin()
    assert read.load(tmp_path)
    assert read.model.network.layer1[2].calls == state.model.network.layer1[2].calls == 2 * STEPS


def test_trials_share_what_they_freeze_and_the_files_lie_in_the_folder_of_the_run(
    tmp_path: Path,
) -> None:
    frozen = tmp_path / "frozen"
    for depth in (2, 5, 3):
        config = replace(CONFIG, freeze_depth=depth, seed=depth)
        trained(tmp_path / str(depth), epochs=2, best=2, frozen=frozen, config=config)
        assert not parts_in(tmp_path / str(depth))
        needed = frozen_parts(tmp_path / str(depth))
        assert len(needed) == depth
        assert needed <= set(frozen.iterdir())
        for entry in entries(tmp_path / str(depth)).values():
            assert len(entry["parts"]) == depth
            for path, said in entry["parts"].items():
                assert not Path(path).is_absolute()
                assert said == sha256(tmp_path / str(depth) / path)
    assert len(list(frozen.iterdir())) == 5


def test_the_same_numbers_are_one_file_whatever_their_layout_in_memory(tmp_path: Path) -> None:
    for place, layout in enumerate((torch.contiguous_format, torch.channels_last)):
        state = fresh()
        state.model.to(memory_format=layout)
        train(state, is_best=True)
        state.save(tmp_path / str(place), tmp_path / "frozen")
    assert len(list((tmp_path / "frozen").iterdir())) == 3


def test_a_run_directory_can_be_moved(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    wanted = everything(trained(run / "t1/checkpoints", epochs=2, best=2, frozen=run / "frozen"))
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    run.rename(tmp_path / "elsewhere/deep/b")
    state = fresh(seed=99)
    folder = tmp_path / "elsewhere/deep/b/t1/checkpoints"
    assert state.load(folder)
    assert everything(state) == wanted
    assert frozen_parts(folder) == set((tmp_path / "elsewhere/deep/b/frozen").iterdir())


def test_a_trial_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "far/away/disk").mkdir(parents=True)
    (tmp_path / "t1").symlink_to(tmp_path / "far/away/disk")
    wanted = everything(trained(tmp_path / "t1", epochs=2, best=2, frozen=tmp_path / "frozen"))
    state = fresh(seed=99)
    assert state.load(tmp_path / "t1")
    assert everything(state) == wanted


def test_what_is_frozen_is_written_once_and_again_where_a_stage_is_unfrozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[set[str]] = []
    really = checkpoint._write_part

    def write(tensors: Any, folder: Path) -> str:
        written.append(set(tensors))
        return really(tensors, folder)

    monkeypatch.setattr(checkpoint, "_write_part", write)
    state = fresh(GRADUAL)
    for epoch, depth in ((1, 4), (2, 3), (3, 3), (4, 0), (5, 0)):
        written.clear()
        train(state, is_best=epoch == 1)
        state.save(tmp_path / "a", tmp_path / "frozen")
        assert len(written) == (depth if epoch in (1, 2) else 0)
        content = torch.load(tmp_path / f"a/epoch-{epoch:04d}.pt", weights_only=True)
        assert left_out(content) == frozen_by_hand(depth)
    assert len(list((tmp_path / "frozen").iterdir())) == 4


def test_a_stage_that_was_trained_and_is_frozen_again_is_kept_as_it_is_then(
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, unfreeze_at={2: 0, 3: 3})
    state = fresh(config)
    for epoch in range(1, 4):
        train(state, is_best=epoch == 1)
        if epoch != 2:
            state.save(tmp_path)
    read = fresh(config, seed=99)
    assert read.load(tmp_path)
    assert everything(read) == everything(state)


def test_what_was_read_replaces_what_was_written_before(tmp_path: Path) -> None:
    trained(tmp_path / "a", epochs=1, best=1)
    state = fresh(seed=99)
    train(state, is_best=True)
    state.save(tmp_path / "b", tmp_path / "frozen")
    state.load(tmp_path / "a")
    state.save(tmp_path / "b", tmp_path / "frozen")
    read = fresh()
    assert read.load(tmp_path / "b")
    assert everything(read) == everything(state)


def test_an_existing_file_is_relied_on_and_not_written_again(tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    trained(tmp_path / "a", epochs=1, best=1, frozen=frozen)
    before = {file: file.stat().st_ino for file in frozen.iterdir()}
    trained(tmp_path / "b", epochs=2, best=2, frozen=frozen)
    assert {file: file.stat().st_ino for file in frozen.iterdir()} == before


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_file_with_what_is_frozen_is_written_again_by_the_next_trial(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    frozen = tmp_path / "frozen"
    wanted = everything(trained(tmp_path / "a", epochs=2, best=2, frozen=frozen))
    before = {file: file.read_bytes() for file in frozen.iterdir()}
    spoil(sorted(before)[1])
    assert not fresh().load(tmp_path / "a")
    trained(tmp_path / "b", epochs=1, best=1, frozen=frozen)
    assert {file: file.read_bytes() for file in frozen.iterdir()} == before
    state = fresh(seed=99)
    assert state.load(tmp_path / "a")
    assert everything(state) == wanted


def test_a_file_that_was_removed_while_a_trial_ran_comes_back_with_its_next_epoch(
    tmp_path: Path,
) -> None:
    state = trained(tmp_path / "a", epochs=1, best=1, frozen=tmp_path / "frozen")
    for file in frozen_parts(tmp_path / "a"):
        file.unlink()
    train(state, is_best=False)
    state.save(tmp_path / "a", tmp_path / "frozen")
    assert fresh().load(tmp_path / "a")


def test_beside_the_checkpoints_lies_what_they_need_and_nothing_else(tmp_path: Path) -> None:
    state = fresh(GRADUAL)
    for epoch, files in ((1, 4), (2, 4), (3, 3), (4, 3), (5, 0)):
        train(state, is_best=epoch != 2)
        state.save(tmp_path)
        assert len(parts_in(tmp_path)) == files  # the deepest of the epochs that are kept
        assert frozen_parts(tmp_path) == set(parts_in(tmp_path))


def test_the_average_of_what_is_frozen_is_kept_to_the_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, ema_decay=0.9)

    def begin(seed: int) -> TrainState:
        state = fresh(config, seed)
        with torch.no_grad():  # the average makes 0.0 of it
            state.model.network.conv1.weight.fill_(-0.0)
        return replace(state, average=WeightAverage(state.model, 0.9))

    straight = begin(0)
    for epoch in range(1, 6):
        train(straight, is_best=epoch == 1)
    assert straight.average is not None
    averaged = straight.average.model.network
    assert averaged.conv1.weight.detach().numpy().tobytes().strip(b"\0") == b""

    state = begin(0)
    for epoch in range(1, 5):
        train(state, is_best=epoch == 1)
        saved = everything(state)
        state.save(tmp_path)
    read = fresh(config, seed=99)
    assert read.load(tmp_path)
    assert everything(read) == saved
    train(read, is_best=False)
    assert everything(read) == everything(straight)


def test_the_names_of_a_checkpoint_come_in_the_order_of_the_network(tmp_path: Path) -> None:
    state = trained(tmp_path, epochs=1, best=1)
    assert list(read_best(tmp_path)["model"]) == list(state.model.state_dict())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_weights_of_a_checkpoint_are_whole(ema_decay: float | None, tmp_path: Path) -> None:
    config = replace(CONFIG, ema_decay=ema_decay)
    state = trained(tmp_path / "a", epochs=2, best=2, frozen=tmp_path / "frozen", config=config)
    file = tmp_path / "a/epoch-0002.pt"
    weights = read_state_dict(file, file.stat().st_mtime_ns)
    validated = state.model if state.average is None else state.average.model
    for name, tensor in validated.state_dict().items():
        (given,) = [t for n, t in weights.items() if n.removeprefix("module.") == name]
        assert torch.equal(given, tensor)


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, Path.unlink])
def test_weights_of_a_checkpoint_with_a_damaged_part_are_refused(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    trained(tmp_path, epochs=1, best=1)
    part = parts_in(tmp_path)[1]
    spoil(part)
    file = tmp_path / "epoch-0001.pt"
    with pytest.raises(WeightsError, match=f"{part.name}, a part of a checkpoint, "):
        read_state_dict(file, file.stat().st_mtime_ns)


def test_other_files_may_have_a_key_of_the_same_name(tmp_path: Path) -> None:
    file = tmp_path / "other.pt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "frozen_parts": {}, "model": 3}, file)
    assert list(read_state_dict(file, 1)) == ["w"]
    torch.save({"w": torch.ones(1), "frozen_parts": torch.ones(1)}, file)
    assert list(read_state_dict(file, 2)) == ["w", "frozen_parts"]
    torch.save({"model": {"w": torch.ones(1), "v": None}, "frozen_parts": {}}, file)
    with pytest.raises(WeightsError, match=r"v is neither in .* nor in its parts"):
        read_state_dict(file, 3)


def in_the_old_form(folder: Path, *, epochs: int, best: int) -> TrainState:
    """As `trained`, but written as it was before what is frozen had files of its own."""
    folder.mkdir()
    state, manifest = fresh(replace(CONFIG, ema_decay=0.9)), {}
    for epoch in range(1, epochs + 1):
        train(state, is_best=epoch in (1, best))
        assert state.average is not None
        file = folder / f"epoch-{epoch:04d}.pt"
        content = {
            "config": json.dumps(state.config.as_dict(), sort_keys=True),
            "model": state.model.state_dict(),
            "loss": {},
            "ema": state.average.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "schedule": state.schedule.state_dict(),
            "scaler": state.scaler.state_dict(),
            "history": state.history,
            "best_epoch": state.best_epoch,
            "generators": {"cpu": torch.get_rng_state(), "cuda": None},
        }
        torch.save(content, file)
        manifest["last"] = {"file": file.name, "epoch": epoch, "sha256": sha256(file)}
        if state.best_epoch == epoch:
            manifest["best"] = manifest["last"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return state


def test_a_checkpoint_of_before_there_were_parts_is_gone_on_with(tmp_path: Path) -> None:
    state = in_the_old_form(tmp_path / "a", epochs=3, best=2)
    wanted = everything(state)
    read = fresh(state.config, seed=99)
    assert read.load(tmp_path / "a")
    assert everything(read) == wanted
    assert frozen_parts(tmp_path / "a") == set()
    assert len(read_best(tmp_path / "a")["history"]) == 2
    train(read, is_best=False)
    read.save(tmp_path / "a")
    assert checkpoints(tmp_path / "a") == ["epoch-0002.pt", "epoch-0004.pt", MANIFEST]
    wanted = everything(in_the_old_form(tmp_path / "b", epochs=4, best=2))
    again = fresh(state.config, seed=98)
    assert again.load(tmp_path / "a")
    assert everything(again) == wanted


def test_a_trial_keeps_what_is_frozen_where_its_run_says(
    config: TrialConfig, run: TrialRun, tmp_path: Path
) -> None:
    placed = replace(run, folder=tmp_path / "t0001", frozen_folder=tmp_path / "frozen")
    run_trial(replace(config, epochs=1), placed, lambda row: None)
    parts = set((tmp_path / "frozen").iterdir())
    assert len(parts) == 5
    assert frozen_parts(tmp_path / "t0001/checkpoints") == parts
    assert not parts_in(tmp_path / "t0001/checkpoints")


# --- Damage ---------------------------------------------------------------------------------------


def test_a_fall_back_to_before_an_unfreezing_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    straight = fresh(GRADUAL)
    for epoch in range(1, 6):
        train(straight, is_best=epoch == 1)
    wanted = everything(straight)
    state = fresh(GRADUAL)
    for epoch in range(1, 5):
        train(state, is_best=epoch == 1)
        state.save(tmp_path)
    flip_a_bit(epoch_file(tmp_path, "last"))
    read = fresh(GRADUAL, seed=99)
    assert read.load(tmp_path)
    assert read.epoch == 1
    for _ in range(2, 6):
        train(read, is_best=False)
    assert everything(read) == wanted


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_last_checkpoint_falls_back_to_the_best_and_says_so(
    spoil: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = everything(trained(tmp_path / "to_two", epochs=2, best=2))
    trained(tmp_path / "to_four", epochs=4, best=2)
    spoil(epoch_file(tmp_path / "to_four", "last"))
    state = fresh(seed=99)
    with caplog.at_level(logging.WARNING, logger="tuneapp.checkpoint"):
        assert state.load(tmp_path / "to_four")
    assert everything(state) == wanted
    (warning,) = caplog.messages
    assert "epoch-0004.pt" in warning
    assert "falling back, to resume after epoch 2" in warning


def test_after_a_fall_back_the_lost_epochs_are_trained_and_saved_again(tmp_path: Path) -> None:
    wanted = everything(trained(tmp_path / "whole", epochs=4, best=2))
    trained(tmp_path / "damaged", epochs=4, best=2)
    flip_a_bit(epoch_file(tmp_path / "damaged", "last"))
    state = fresh(seed=99)
    state.load(tmp_path / "damaged")
    for _ in (3, 4):
        train(state, is_best=False)
        state.save(tmp_path / "damaged")
    assert everything(state) == wanted
    assert checkpoints(tmp_path / "damaged") == ["epoch-0002.pt", "epoch-0004.pt", MANIFEST]


def test_a_damaged_best_checkpoint_does_not_keep_the_last_from_being_read(tmp_path: Path) -> None:
    wanted = everything(trained(tmp_path, epochs=4, best=2))
    flip_a_bit(epoch_file(tmp_path, "best"))
    state = fresh(seed=99)
    assert state.load(tmp_path)
    assert everything(state) == wanted
    with pytest.raises(CheckpointError, match="no intact best"):
        read_best(tmp_path)


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("best", [2, 4])
def test_with_no_intact_checkpoint_the_training_begins_anew_and_says_so(
    spoil: Callable[[Path], object], best: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, epochs=4, best=best)
    files = {epoch_file(tmp_path, kind) for kind in entries(tmp_path)}
    assert len(files) == 2
    for file in files:
        spoil(file)
    state = fresh()
    before = everything(state)
    with caplog.at_level(logging.WARNING, logger="tuneapp.checkpoint"):
        assert not state.load(tmp_path)
    assert everything(state) == before
    *causes, last = caplog.messages
    assert "starts from its beginning" in last
    assert all(any(str(file) in cause for cause in causes) for file in files)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"last": ',
        "{}",
        '{"kept": "much"}',
        '{"last": null}',
        '{"last": {"file": "epoch-0002.pt", "epoch": 2}}',
        '{"last": {"file": "epoch-0002.pt", "epoch": "two", "sha256": ""}}',
        '{"last": {"file": "epoch-0002.pt", "epoch": 2, "sha256": "", "parts": 3}}',
    ],
)
def test_a_damaged_manifest_is_no_checkpoint(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, epochs=2, best=2)
    (tmp_path / MANIFEST).write_text(text)
    caplog.clear()
    assert not fresh().load(tmp_path)
    (warning,) = caplog.messages
    assert f"{MANIFEST} is damaged" in warning
    with pytest.raises(CheckpointError, match="no intact best"):
        read_best(tmp_path)
    assert frozen_parts(tmp_path) == set()
    keep_only_best(tmp_path)
    assert (tmp_path / MANIFEST).read_text() == text


def test_a_manifest_that_cannot_be_read_is_an_error_and_nothing_is_written_over(
    tmp_path: Path,
) -> None:
    state = trained(tmp_path, epochs=2, best=2)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).mkdir()  # as good as a disk that does not answer
    before = checkpoints(tmp_path)
    train(state, is_best=True)
    for use in (state.save, fresh().load, read_best, keep_only_best, frozen_parts):
        with pytest.raises(CheckpointError, match=f"{MANIFEST} cannot be read: "):
            use(tmp_path)
    assert checkpoints(tmp_path) == before


def test_a_damaged_last_checkpoint_that_is_the_best_falls_back_to_the_epoch_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = everything(trained(tmp_path / "whole", epochs=5, best=4))
    trained(tmp_path / "damaged", epochs=4, best=4)
    flip_a_bit(epoch_file(tmp_path / "damaged", "last"))
    state = fresh(seed=99)
    assert state.load(tmp_path / "damaged")
    assert state.epoch == 3
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(r"epoch-0004\.pt is damaged .* to resume after epoch 3$", warning)
    for epoch in (4, 5):
        train(state, is_best=epoch == 4)
        state.save(tmp_path / "damaged")
    assert everything(state) == wanted
    assert checkpoints(tmp_path / "damaged") == checkpoints(tmp_path / "whole")


def test_checkpoints_are_tried_from_the_newest_to_the_oldest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, manifest = {}, {}
    for epoch, kind in ((1, "best"), (3, "previous"), (4, "last")):
        wanted[epoch] = everything(trained(tmp_path / str(epoch), epochs=epoch, best=1))
        epoch_file(tmp_path / str(epoch), "last").rename(tmp_path / f"epoch-000{epoch}.pt")
        for part in parts_in(tmp_path / str(epoch)):
            part.rename(tmp_path / part.name)
        manifest[kind] = entries(tmp_path / str(epoch))["last"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    for epoch, damaged in ((4, []), (3, [4]), (1, [4, 3])):
        caplog.clear()
        state = fresh(seed=99)
        assert state.load(tmp_path)
        assert everything(state) == wanted[epoch]
        warnings = [m for m in caplog.messages if "goes on" not in m]
        assert len(warnings) == len(damaged)
        for number, warning in zip(damaged, warnings, strict=True):
            assert f"epoch-000{number}.pt" in warning
            assert f"after epoch {epoch}" in warning
        flip_a_bit(tmp_path / f"epoch-000{epoch}.pt")
    assert not fresh().load(tmp_path)


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, Path.unlink])
def test_a_checkpoint_with_a_damaged_part_is_a_damaged_checkpoint(
    spoil: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Epoch 1 needs the frozen stage that epoch 2 trains.
    state = fresh(GRADUAL)
    for epoch in (1, 2):
        train(state, is_best=epoch == 1)
        state.save(tmp_path)
    wanted = everything(state)
    only = {tmp_path / p for p in entries(tmp_path)["best"]["parts"]}
    only -= {tmp_path / p for p in entries(tmp_path)["last"]["parts"]}
    (part,) = only
    spoil(part)
    read = fresh(GRADUAL, seed=99)
    assert read.load(tmp_path)
    assert everything(read) == wanted
    with pytest.raises(CheckpointError, match=f"no intact best.*epoch-0001.*{part.name}"):
        read_best(tmp_path)
    shared = next(iter(entries(tmp_path)["last"]["parts"]))
    spoil(tmp_path / shared)
    caplog.clear()
    assert not fresh(GRADUAL).load(tmp_path)
    assert sum(shared in message for message in caplog.messages) >= 1
    assert "starts from its beginning" in caplog.messages[-1]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"garbage",
        b"PK\x03\x04 and no more",
        pickle.dumps([1, 2]),
        pickle.dumps(range),
        b"\x80\x02}q\x00",
        b"\x80\x02(",
        bytes(range(256)),
    ],
    ids=repr,
)
def test_garbage_that_the_manifest_vouches_for_is_a_damaged_checkpoint(
    garbage: bytes, tmp_path: Path
) -> None:
    wanted = everything(trained(tmp_path / "to_two", epochs=2, best=2))
    trained(tmp_path / "to_four", epochs=4, best=2)
    file = epoch_file(tmp_path / "to_four", "last")
    file.write_bytes(garbage)
    vouch_for(file)
    state = fresh(seed=99)
    assert state.load(tmp_path / "to_four")
    assert everything(state) == wanted


def test_best_weights_that_were_lost_are_not_replaced_by_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # On a GPU, epoch 4 need not turn out twice as the best, and epoch 1 is gone.
    trained(tmp_path, epochs=4, best=4)
    flip_a_bit(epoch_file(tmp_path, "last"))
    state = fresh()
    assert state.load(tmp_path)
    assert (state.epoch, state.best_epoch) == (3, 1)
    train(state, is_best=False)
    caplog.clear()
    state.save(tmp_path)
    assert caplog.messages == ["the weights of the best epoch, 1, are lost"]
    assert checkpoints(tmp_path) == ["epoch-0003.pt", "epoch-0004.pt", MANIFEST]
    with pytest.raises(CheckpointError, match="no intact best"):
        read_best(tmp_path)
    keep_only_best(tmp_path)  # there is none
    assert fresh().load(tmp_path)
    flip_a_bit(epoch_file(tmp_path, "last"))
    read = fresh()
    assert read.load(tmp_path)
    assert read.epoch == 3
    train(state, is_best=True)
    state.save(tmp_path)
    assert len(read_best(tmp_path)["history"]) == 5


@pytest.mark.parametrize(
    "other",
    [
        replace(CONFIG, optimizer=Sgd(lr=0.2)),
        replace(CONFIG, seed=1),
        replace(CONFIG, ema_decay=0.9),
        replace(CONFIG, unfreeze_at={2: 1}),
    ],
    ids=["optimizer", "seed", "ema_decay", "unfreeze_at"],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    other: TrialConfig, tmp_path: Path
) -> None:
    trained(tmp_path, epochs=2, best=2)
    state = fresh(other)
    before = everything(state)
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}.*another configuration"):
        state.load(tmp_path)
    assert everything(state) == before


def vouch_for(file: Path) -> None:
    """Give the manifest the hash that a file has now."""
    manifest = entries(file.parent)
    for entry in manifest.values():
        if entry["file"] == file.name:
            entry["sha256"] = sha256(file)
    (file.parent / MANIFEST).write_text(json.dumps(manifest))


class Touch:
    """Unpickled as code, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("write", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x))])
@pytest.mark.parametrize("is_named_in_manifest", [False, True])
def test_code_in_a_checkpoint_is_never_run(
    write: Callable[[object, Path], object], is_named_in_manifest: bool, tmp_path: Path
) -> None:
    trained(tmp_path, epochs=1, best=1)
    marker, file = tmp_path / "marker", tmp_path / "epoch-0001.pt"
    content = torch.load(file, weights_only=True)
    write({**content, "extra": Touch(marker)}, file)
    if is_named_in_manifest:
        vouch_for(file)
    state = fresh()
    # How it is refused is not the point here, and differs with where the code is noticed.
    with suppress(Exception):
        assert not state.load(tmp_path)
    assert state.epoch == 0
    assert not marker.exists()


# --- Faults and kills -----------------------------------------------------------------------------


class DiskError(OSError):
    pass


@pytest.mark.parametrize("best", [2, 3])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
def test_a_save_that_fails_anywhere_leaves_a_whole_state(
    call: str, after: bool, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch 3 is saved over epochs 1 and 2, and the disk fails at each call in turn."""
    really = getattr(os, call)
    failed_at = 0
    while True:
        folder = tmp_path / f"fails_at_{failed_at}"
        state = trained(folder, epochs=2, best=2)
        wanted = {2: everything(state)}
        train(state, is_best=best == 3)
        wanted[3] = everything(state)
        calls = [0]

        def fail(*args: Any, calls: list[int] = calls, at: int = failed_at, **kw: Any) -> Any:
            calls[0] += 1
            if calls[0] == at + 1:
                if after:
                    really(*args, **kw)
                raise DiskError(28, "No space left on device")
            return really(*args, **kw)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with suppress(DiskError):
                state.save(folder)
        read = fresh(seed=99)
        assert read.load(folder), f"{call} number {failed_at}"
        assert everything(read) == wanted[read.epoch]
        if calls[0] <= failed_at:
            assert read.epoch == 3
            break
        failed_at += 1
    assert failed_at > 0


KILL_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from tests.test_checkpoint import everything, fresh, train, trained

root, moves = Path(sys.argv[1]), sys.argv[2] == "moves"
wanted = {n: everything(trained(root / f"to_{n}", epochs=n, best=2)) for n in (2, 3)}
state = trained(root / "before", epochs=2, best=2)
train(state, is_best=False)
generator = torch.get_rng_state()
NAMES = ("fsync", "replace", "unlink", "open", "close", "write")
survived = False
killed_at = 0
while not survived:
    folder = root / str(killed_at)
    shutil.copytree(root / "before", folder)
    child = os.fork()
    if child == 0:
        torch.set_rng_state(generator)
        calls = [0]
        for name in NAMES:
            def call(*args, really=getattr(os, name), **kwargs):
                calls[0] += 1
                if calls[0] > killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return really(*args, **kwargs)
            setattr(os, name, call)
        state.save(folder, root / f"frozen_{killed_at}" if moves else None)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    survived = status == 0
    read = fresh(seed=99)
    assert read.load(folder), killed_at
    assert everything(read) == wanted[read.epoch], killed_at
    print(read.epoch)
    killed_at += 1
"""


@pytest.mark.parametrize("parts", ["stays", "moves"])
def test_a_save_that_is_killed_anywhere_leaves_a_whole_state(parts: str, tmp_path: Path) -> None:
    # What is frozen lies there already, or is written with the epoch, to another folder. A new
    # interpreter forks the processes that are killed, each one system call later.
    done = subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, str(tmp_path), parts],
        cwd=Path(tuneapp.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    epochs = [int(line) for line in done.stdout.split()]
    # Killed early it is the state before, killed late the one after, and never one from elsewhere.
    assert epochs == sorted(epochs)
    assert epochs.count(2) > 3
    assert epochs.count(3) > 1


# --- What a keeper of many trials asks for --------------------------------------------------------


class KillError(BaseException):
    pass


def kill_at(number: int, patch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Die at the call of this number that puts a file in place or removes one."""
    for name in ("replace", "unlink"):

        def call(*args: Any, really: Any = getattr(os, name), **kw: Any) -> Any:
            calls.append("called")
            if len(calls) > number:
                raise KillError
            return really(*args, **kw)

        patch.setattr(os, name, call)


def test_the_bytes_of_a_folder_are_those_of_its_checkpoints(tmp_path: Path) -> None:
    trained(tmp_path / "beside", epochs=4, best=2)
    trained(tmp_path / "shared", epochs=4, best=2, frozen=tmp_path / "frozen")
    epochs = ["epoch-0002.pt", "epoch-0004.pt"]
    assert bytes_of(tmp_path / "shared") == sum(
        len((tmp_path / "shared" / name).read_bytes()) for name in epochs
    )
    assert bytes_of(tmp_path / "beside") == sum(
        len(file.read_bytes()) for file in (tmp_path / "beside").glob("*.pt")
    )
    assert bytes_of(tmp_path / "nowhere") == 0


def test_a_folder_that_changes_while_it_is_measured_has_the_bytes_of_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, epochs=2, best=1)
    rest = bytes_of(tmp_path) - len((tmp_path / "epoch-0001.pt").read_bytes())
    really = Path.iterdir

    def iterdir(folder: Path) -> list[Path]:
        files = list(really(folder))
        (folder / "epoch-0001.pt").unlink()
        return files

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert bytes_of(tmp_path) == rest


@pytest.mark.parametrize("frozen", [None, "frozen"])
@pytest.mark.parametrize("best", [2, 4])
def test_what_is_left_of_a_trial_is_its_best_epoch_wherever_the_keeper_is_killed(
    best: int, frozen: str | None, tmp_path: Path
) -> None:
    shared = None if frozen is None else tmp_path / frozen
    wanted = everything(trained(tmp_path / "best", epochs=best, best=best))
    killed_at, calls = 0, ["called"]
    while calls:
        folder = tmp_path / str(killed_at)
        last = everything(trained(folder, epochs=4, best=best, frozen=shared))
        calls = []
        with pytest.MonkeyPatch.context() as patch, suppress(KillError):
            kill_at(killed_at, patch, calls)
            keep_only_best(folder)
            calls = []  # it came to its end
        assert len(read_best(folder)["history"]) == best
        state = fresh(seed=99)
        assert state.load(folder)
        assert everything(state) in (wanted, last)
        keep_only_best(folder)
        assert checkpoints(folder) == [f"epoch-000{best}.pt", MANIFEST]
        assert list(entries(folder)) == ["best"]
        assert len(frozen_parts(folder)) == 3
        assert all(part.is_file() for part in frozen_parts(folder))
        state = fresh(seed=99)
        assert state.load(folder)
        assert everything(state) == wanted
        killed_at += 1
    assert killed_at > 2


def test_a_trial_of_which_only_the_best_was_kept_can_go_on(tmp_path: Path) -> None:
    wanted = everything(trained(tmp_path / "straight", epochs=4, best=2))
    trained(tmp_path / "kept", epochs=4, best=2)
    keep_only_best(tmp_path / "kept")
    state = fresh(seed=99)
    state.load(tmp_path / "kept")
    for _ in (3, 4):
        train(state, is_best=False)
        state.save(tmp_path / "kept")
    assert everything(state) == wanted
    assert checkpoints(tmp_path / "kept") == checkpoints(tmp_path / "straight")


@pytest.mark.parametrize("frozen", [None, "frozen"])
def test_what_was_dropped_is_gone_wherever_the_keeper_is_killed(
    frozen: str | None, tmp_path: Path
) -> None:
    shared = None if frozen is None else tmp_path / frozen
    killed_at, calls = 0, ["called"]
    while calls:
        folder = tmp_path / str(killed_at)
        wanted = everything(trained(folder, epochs=4, best=2, frozen=shared))
        calls = []
        with pytest.MonkeyPatch.context() as patch, suppress(KillError):
            kill_at(killed_at, patch, calls)
            drop(folder)
            calls = []
        state = fresh(seed=99)
        if state.load(folder):  # nothing or all of it
            assert everything(state) == wanted
            assert len(read_best(folder)["history"]) == 2
        drop(folder)
        assert [p.name for p in folder.iterdir()] == [MANIFEST]
        assert bytes_of(folder) == 0
        assert frozen_parts(folder) == set()
        killed_at += 1
    assert killed_at > 2
    if shared is not None:
        assert len(list(shared.iterdir())) == 3


def test_what_was_dropped_is_not_read_and_the_way_out_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, epochs=2, best=2)
    drop(tmp_path)
    caplog.clear()
    with pytest.raises(CheckpointError, match="were not kept; raise --keep-best, or train it ag"):
        read_best(tmp_path)
    keep_only_best(tmp_path)
    state = fresh()
    assert not state.load(tmp_path)
    assert caplog.messages == []
    train(state, is_best=True)
    state.save(tmp_path)
    assert fresh().load(tmp_path)
    assert len(read_best(tmp_path)["history"]) == 1


def test_of_a_trial_without_a_checkpoint_there_is_nothing_to_drop(tmp_path: Path) -> None:
    drop(tmp_path / "nowhere")
    keep_only_best(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    assert frozen_parts(tmp_path / "nowhere") == set()
    with pytest.raises(CheckpointError, match="no intact best"):
        read_best(tmp_path / "nowhere")
