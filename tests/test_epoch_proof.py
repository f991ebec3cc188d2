"""A trial whose parts are right when it begins, and that then trains something else."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

import tuneapp.models as models
import tuneapp.schedules as schedules
import tuneapp.training as training
from tuneapp.average import WeightAverage
from tuneapp.checkpoint import TrainState
from tuneapp.config import (
    AdamW,
    Constant,
    Cosine,
    Cyclic,
    OneCycle,
    Optimizer,
    Plateau,
    RmsProp,
    Schedule,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.data.batches import Batches
from tuneapp.epoch_proof import WantedFactors, require_kept
from tuneapp.errors import AppliedValueError
from tuneapp.loop import CountingScaler, Precision, train_one_epoch
from tuneapp.models import build_network
from tuneapp.observed import Witness
from tuneapp.schedules import Schedule as Running
from tuneapp.training import TrialRun
from tuneapp.trial import run_trial

Patch = Callable[[pytest.MonkeyPatch], None]


def small(config: TrialConfig, **values: Any) -> TrialConfig:
    """The last stage and the head of a ResNet-18 at 32 pixels, for two epochs of three steps."""
    return replace(config, **{"epochs": 2, "freeze_depth": 4, "lr_ratio": 0.5, **values})


def in_loop(**changed: object) -> Patch:
    """Let the loop be called with other arguments than the configuration's."""
    return lambda patch: patch.setattr(
        training, "train_one_epoch", lambda *a, **kw: train_one_epoch(*a, **{**kw, **changed})
    )


def state_with(change: Callable[[TrainState], object]) -> Patch:
    def build(*args: Any) -> TrainState:
        state = really(*args)
        change(state)
        return state

    really = training._begin
    return lambda patch: patch.setattr(training, "_begin", build)


def optimizer_with(**option: object) -> Patch:
    """Give the optimizer another flag than torch's default; no configuration speaks of it."""
    return state_with(lambda s: [group.update(option) for group in s.optimizer.param_groups])


def schedule_of(**options: object) -> Patch:
    """Let the schedule that trains, but no other, be built with other options."""

    def build(optimizer: torch.optim.Optimizer, config: TrialConfig, steps: int) -> Running:
        other = replace(config, schedule=replace(config.schedule, **options))
        return Running(optimizer, other, steps)

    return lambda patch: patch.setattr(training, "Schedule", build)


def batches_with(**values: object) -> Patch:
    return lambda patch: patch.setattr(
        training, "Batches", lambda *a, **kw: Batches(*a, **{**kw, **values})
    )


def stepped_twice(state: TrainState) -> None:
    really = state.schedule.step

    def twice() -> None:
        really()
        really()

    state.schedule.step = twice


def faster_from_epoch_2(patch: pytest.MonkeyPatch) -> None:
    def train(model: Any, batches: Any, loss_fn: Any, optimizer: Any, *args: Any, **kw: Any) -> Any:
        for group in optimizer.param_groups:
            group["lr"] *= 100 if kw["epoch"] == 2 else 1
        return train_one_epoch(model, batches, loss_fn, optimizer, *args, **kw)

    patch.setattr(training, "train_one_epoch", train)


def labels_not_mixed(self: Batches, images: Tensor, labels: Tensor, *args: object) -> Any:
    return images, labels


def upside_down(config: TrialConfig, names: Any) -> dict[str, float]:
    return {name: config.optimizer.lr * 0.5**distance for distance, name in enumerate(names)}


def upside_down_everywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(models, "stage_lrs", upside_down)
    patch.setattr("tuneapp.optim.stage_lrs", upside_down)


def smaller_images(patch: pytest.MonkeyPatch) -> None:
    really = training.training_view

    def view(augment: Any, preprocessing: Any) -> Any:
        return v2.Compose([*really(augment, preprocessing).transforms, v2.Resize(24)])

    patch.setattr(training, "training_view", view)


MIXED = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}
SGD = Sgd(lr=0.01)

# What the configuration asks for, what is broken, what is reported, and after how many epochs.
BROKEN: dict[str, tuple[dict[str, Any], Patch, str, int]] = {
    "optimizer never stepped": (
        {},
        lambda patch: patch.setattr(CountingScaler, "step", lambda self, optimizer: None),
        "the optimizer was stepped 0 times in 3 steps",
        0,
    ),
    "schedule never stepped": (
        {"schedule": Cosine()},
        state_with(lambda s: setattr(s.schedule, "step", lambda: None)),
        "lr of layer4 was 0.005 at update 2, not 0.00466",
        0,
    ),
    "schedule stepped twice": (
        {"schedule": Cosine()},
        state_with(stepped_twice),
        "lr of layer4 was 0.0037.* at update 2, not 0.0046",
        0,
    ),
    "plateau never told": (
        {"schedule": Plateau(patience=0, threshold=10.0), "epochs": 3},
        state_with(lambda s: setattr(s.schedule, "end_epoch", lambda row: None)),
        "lr of layer4 was 0.005 at update 1, not 0.0005",
        1,
    ),
    "another rate from epoch 2 on": (
        {},
        faster_from_epoch_2,
        "lr of layer4 was 0.5 at update 1, not 0.005",
        1,
    ),
    "formula of the rates upside down": (
        {},
        upside_down_everywhere,
        "lr of layer4 is 0.000625, not 0.005; lr of head is 0.0003125, not 0.01",
        0,
    ),
    "norm not clipped": (
        {"clip_norm": 1e-3},
        in_loop(clip_norm=None),
        "the norm of gradients is .*, above clip_norm 0.001",
        0,
    ),
    "norm clipped at another limit": (
        {"clip_norm": 1e-3},
        in_loop(clip_norm=1e-2),
        "the norm of gradients is 0.01, above clip_norm 0.001",
        0,
    ),
    "values not clipped": (
        {"clip_value": 1e-4},
        in_loop(clip_value=None),
        "a gradient is .*, above clip_value 0.0001",
        0,
    ),
    "accumulation ignored": (
        {"accumulation_steps": 4},
        in_loop(accumulation_steps=1),
        "a batch was computed in 1 parts, not 4",
        0,
    ),
    "accumulation though not asked": (
        {},
        in_loop(accumulation_steps=2),
        "a batch was computed in 2 parts, not 1",
        0,
    ),
    "average not updated": (
        {"ema_decay": 0.9},
        lambda patch: patch.setattr(WeightAverage, "update", lambda self, model: None),
        "the average followed 0 of 3 steps",
        0,
    ),
    "average not passed on": (
        {"ema_decay": 0.9},
        in_loop(average=None),
        "the average followed 0 of 3 steps",
        0,
    ),
    "autocast never entered": (
        {"amp": "bf16"},
        lambda patch: patch.setattr(Precision, "autocast", lambda self: nullcontext()),
        "the forward pass computed in torch.float32, not torch.bfloat16",
        0,
    ),
    "mixing forgotten": (
        MIXED,
        lambda patch: patch.setattr(training, "mixing", lambda *args: None),
        r"mixing is \{\}, not \{'MixUp': 0.4, 'CutMix': 1.0\}",
        0,
    ),
    "mixing not done": (
        MIXED,
        lambda patch: patch.setattr(Batches, "_mixed", labels_not_mixed),
        "images were not mixed",
        0,
    ),
    "mixed more": (
        {"mixup_alpha": 0.4},
        lambda patch: patch.setattr(
            training, "mixing", lambda *a: v2.RandomChoice([v2.MixUp(alpha=4.0, num_classes=3)])
        ),
        r"mixing is \{'MixUp': 4.0\}, not \{'MixUp': 0.4\}",
        0,
    ),
    "mixed though not asked": (
        {},
        lambda patch: patch.setattr(
            training, "mixing", lambda *a: v2.RandomChoice([v2.MixUp(alpha=4.0, num_classes=3)])
        ),
        r"mixing is \{'MixUp': 4.0\}, not \{\}",
        0,
    ),
    "other views": (
        {"augment": "strong"},
        batches_with(view=v2.CenterCrop(32)),
        r"view is \('CenterCrop',\), not \('RandomResizedCrop\(scale=0.35\)', .*'RandomErasing'\)",
        0,
    ),
    "smaller images": ({"augment": "standard"}, smaller_images, "view is .*, 'Resize'\\), not", 0),
    "uphill": ({}, optimizer_with(maximize=True), "maximize of layer4 is True, not False", 0),
    "amsgrad": ({}, optimizer_with(amsgrad=True), "amsgrad of layer4 is True, not False", 0),
    "decay inside the gradient": (
        {},
        optimizer_with(decoupled_weight_decay=False),
        "decoupled_weight_decay of layer4 is False, not True",
        0,
    ),
    "dampening": (
        {"optimizer": SGD},
        optimizer_with(dampening=0.5),
        "dampening of layer4 is 0.5, not 0",
        0,
    ),
    "fused SGD": ({"optimizer": SGD}, optimizer_with(fused=True), "fused of .* True, not None", 0),
    "rise of one cycle": (
        {"schedule": OneCycle(pct_start=0.5)},
        schedule_of(pct_start=0.8),
        "'peak_step': 3.8.*, not .*'peak_step': 2.0",
        0,
    ),
    "beginning of one cycle": (
        {"schedule": OneCycle(div_factor=20)},
        schedule_of(div_factor=5),
        "'div_factor': 5.0.*, not .*'div_factor': 20",
        0,
    ),
    "end of one cycle": (
        {"schedule": OneCycle(final_div_factor=100)},
        schedule_of(final_div_factor=10),
        "'final_div_factor': 10.0.*, not .*'final_div_factor': 100",
        0,
    ),
    "foot of a cycle": (
        {"schedule": Cyclic(up_epochs=1, base_factor=0.1)},
        schedule_of(base_factor=0.3),
        "'base_factor': 0.3.*, not .*'base_factor': 0.1",
        0,
    ),
    "metric of a plateau": (
        {"schedule": Plateau(monitor="val/loss")},
        schedule_of(monitor="val/accuracy"),
        "'monitor': 'val/accuracy'.*, not .*'monitor': 'val/loss'",
        0,
    ),
    "beginning of a warm-up": (
        {"schedule": Cosine(warmup_fraction=0.4)},
        lambda patch: patch.setattr(schedules, "WARMUP_START", 0.5),
        "'warmup_start': 0.5}, not .*'warmup_start': 0.01}",
        0,
    ),
}


@pytest.mark.parametrize(("values", "broken", "told", "epochs"), BROKEN.values(), ids=BROKEN)
def test_a_trial_that_does_something_else_is_stopped(
    values: dict[str, Any],
    broken: Patch,
    told: str,
    epochs: int,
    config: TrialConfig,
    run: TrialRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch)
    rows: list[object] = []
    with pytest.raises(AppliedValueError, match=told):
        run_trial(small(config, **values), run, rows.append)
    assert len(rows) == epochs


EVERYTHING = {
    "clip_norm": 1e-3,
    "accumulation_steps": 3,
    "ema_decay": 0.9,
    "amp": "bf16",
    "augment": "strong",
    "decay_norms_and_biases": False,
    "freeze_depth": 5,
    "unfreeze_at": {2: 4, 3: 3},
    "epochs": 4,
    **MIXED,
}
# Every kind of schedule, and every optimizer twice.
PAIRS: list[tuple[Schedule, Optimizer]] = [
    (Constant(warmup_fraction=0.3), SGD),
    (Step(every_epochs=1), AdamW(lr=0.01)),
    (Cosine(warmup_fraction=0.1), RmsProp(lr=0.001)),
    (OneCycle(), SGD),
    (Cyclic(up_epochs=1, mode="triangular2"), RmsProp(lr=0.001)),
    (Plateau(patience=0, threshold=10.0, warmup_fraction=0.3), AdamW(lr=0.01)),
]


@pytest.mark.parametrize(("schedule", "optimizer"), PAIRS, ids=repr)
def test_a_trial_with_everything_passes_and_so_does_its_resume(
    schedule: Schedule,
    optimizer: Optimizer,
    config: TrialConfig,
    run: TrialRun,
    tmp_path: Path,
) -> None:
    asked = small(config, schedule=schedule, optimizer=optimizer, **EVERYTHING)
    run = replace(run, folder=tmp_path)
    rows: list[dict[str, Any]] = []

    def interrupt(row: dict[str, Any]) -> None:
        rows.append(row)
        if row["epoch"] == 2 and len(rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(asked, run, interrupt)
    run_trial(asked, run, interrupt, resume_from=tmp_path / "checkpoints")
    assert [row["epoch"] for row in rows] == [1, 2, 1, 2, 3, 4]
    # Reported again, an epoch has what was applied in it, not in the one that was resumed.
    assert [len(row["applied"]["lr"]) for row in rows] == [1, 2, 1, 2, 3, 3]


def test_weights_that_were_not_loaded_are_noticed(
    config: TrialConfig, run: TrialRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    file = tmp_path / "weights.pth"
    torch.save(build_network("resnet18", 3).state_dict(), file)
    asked = small(config, weights=str(file), epochs=1)
    run = replace(run, weights_file=file, weights_name="file")
    run_trial(asked, run, lambda row: None)
    monkeypatch.setattr(training, "load_weights", lambda *args: None)
    with pytest.raises(AppliedValueError, match=r"weights of .*weights\.pth are not in"):
        run_trial(asked, run, lambda row: None)


def test_what_an_optimizer_forgets_or_invents_by_unfreezing_is_noticed(config: TrialConfig) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = dict(optimizer.state)
    require_kept(before, optimizer)
    forgetful = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(AppliedValueError, match="state of 4 parameters was lost"):
        require_kept(before, forgetful)
    with pytest.raises(AppliedValueError, match="2 parameters that were frozen have"):
        require_kept({p: before[p] for p in network[0].parameters()}, optimizer)


def test_the_wanted_factors_are_those_of_the_schedule_alone(config: TrialConfig) -> None:
    factors = WantedFactors(replace(config, epochs=3, schedule=Step(every_epochs=1, gamma=0.1)), 2)
    assert factors.of_epoch() == [1.0, 1.0]
    factors.end_epoch({"val/loss": 1.0})
    assert factors.of_epoch() == pytest.approx([0.1, 0.1])
    factors = WantedFactors(replace(config, epochs=3, schedule=Step(every_epochs=1, gamma=0.1)), 2)
    factors.skip([{"val/loss": 1.0}, {"val/loss": 1.0}])
    assert factors.of_epoch() == pytest.approx([0.01, 0.01])


def test_a_witness_leaves_no_hook_behind(config: TrialConfig) -> None:
    network, loss = nn.Linear(2, 2), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt), Witness(network, loss, optimizer):
        raise KeyboardInterrupt
    assert not network._forward_pre_hooks
    assert not loss._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
