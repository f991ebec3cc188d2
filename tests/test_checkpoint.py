import copy
import json
import logging
import os
import pickle
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
from tuneapp import config as c
from tuneapp.average import WeightAverage
from tuneapp.checkpoint import MANIFEST, TrainState, read_best, validated_weights
from tuneapp.config import Cosine, Plateau, Sgd, TrialConfig
from tuneapp.errors import CheckpointError
from tuneapp.families import RESNET
from tuneapp.models import freeze_as
from tuneapp.optim import build_optimizer
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel

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
    freeze_as(model, config)
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


def trained(folder: Path, *, epochs: int, best: int) -> TrainState:
    """Train and save each epoch; `best` is the last epoch that was better than those before."""
    state = fresh()
    for epoch in range(1, epochs + 1):
        train(state, is_best=epoch in (1, best))
        state.save(folder)
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


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def epoch_file(folder: Path, kind: str) -> Path:
    return folder / json.loads((folder / MANIFEST).read_text())[kind]["file"]


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
        (2, 2, ["epoch-0002.pt"]),
        (4, 2, ["epoch-0002.pt", "epoch-0004.pt"]),
        (4, 1, ["epoch-0001.pt", "epoch-0004.pt"]),
        (4, 4, ["epoch-0004.pt"]),
    ],
)
def test_only_the_last_and_the_best_epoch_are_kept(
    epochs: int, best: int, kept: list[str], tmp_path: Path
) -> None:
    trained(tmp_path, epochs=epochs, best=best)
    assert checkpoints(tmp_path) == [*kept, MANIFEST]


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
    assert "falling back" in warning


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
    for file in {epoch_file(tmp_path, kind) for kind in ("last", "best")}:
        spoil(file)
    state = fresh()
    before = everything(state)
    with caplog.at_level(logging.WARNING, logger="tuneapp.checkpoint"):
        assert not state.load(tmp_path)
    assert everything(state) == before
    assert "starts from its beginning" in caplog.messages[-1]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"last": '])
def test_a_damaged_manifest_is_no_checkpoint(text: str, tmp_path: Path) -> None:
    trained(tmp_path, epochs=2, best=2)
    (tmp_path / MANIFEST).write_text(text)
    assert not fresh().load(tmp_path)


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
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        sha256 = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True)
        for entry in manifest.values():
            entry["sha256"] = sha256.stdout.split()[0]
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
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
import os, signal, sys
from pathlib import Path
from tests.test_checkpoint import everything, fresh, train, trained

root = Path(sys.argv[1])
wanted = {n: everything(trained(root / f"to_{n}", epochs=n, best=2)) for n in (2, 3)}
NAMES = ("fsync", "replace", "unlink", "open", "close", "write")
survived = False
killed_at = 0
while not survived:
    folder = root / str(killed_at)
    state = trained(folder, epochs=2, best=2)
    train(state, is_best=False)
    child = os.fork()
    if child == 0:
        calls = [0]
        for name in NAMES:
            def call(*args, really=getattr(os, name), **kwargs):
                calls[0] += 1
                if calls[0] > killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return really(*args, **kwargs)
            setattr(os, name, call)
        state.save(folder)
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


def test_a_save_that_is_killed_anywhere_leaves_a_whole_state(tmp_path: Path) -> None:
    # A new interpreter forks the processes that are killed, each one system call later.
    done = subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, str(tmp_path)],
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
