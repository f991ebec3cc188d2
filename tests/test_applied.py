import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

import tuneapp.trial as trial
from tuneapp.applied import Applied, read_back, require_applied, require_batches
from tuneapp.config import (
    Adam,
    AdamW,
    Constant,
    Cosine,
    OneCycle,
    Optimizer,
    Schedule,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.data.views import Batch, Batches
from tuneapp.errors import AppliedValueError
from tuneapp.loop import EpochMetrics, Precision
from tuneapp.models import StagedModel, build_network, find_family
from tuneapp.optim import build_optimizer, build_schedule, warmup_steps
from tuneapp.trial import TrialRun, run_trial

CPU = torch.device("cpu")
PLAIN = Precision("cpu", torch.float32)

# Counted by hand from the ResNet paper's table: convolutions without bias, two numbers a channel
# for each BatchNorm, three classes.
LAYER4 = (
    (256 * 512 * 9 + 512 * 512 * 9 + 256 * 512 + 3 * 2 * 512)  # the block that halves the image
    + (2 * 512 * 512 * 9 + 2 * 2 * 512)
)
HEAD = 512 * 3 + 3
WHOLE = 11_689_512 - (512 * 1000 + 1000) + HEAD  # torchvision's own count has 1,000 classes


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet18", 3)


def config_of(**values: Any) -> TrialConfig:
    return TrialConfig(
        **{"model": "resnet18", "optimizer": AdamW(lr=0.1), "epochs": 4, "weights": None, **values}
    )


def staged(network: nn.Module, depth: int) -> StagedModel:
    model = StagedModel(copy.deepcopy(network), find_family("resnet18"))
    model.freeze(depth)
    return model


def applied_to(
    model: StagedModel, config: TrialConfig, precision: Precision = PLAIN, weights: str = "random"
) -> Applied:
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps_per_epoch=5)
    return read_back(model, optimizer, schedule, config.batch_size, precision, weights)


def test_what_is_applied_is_read_back_field_by_field(network: nn.Module) -> None:
    config = config_of(
        optimizer=AdamW(lr=0.1, weight_decay=0.05),
        schedule=Cosine(warmup_fraction=0.3),
        freeze_depth=4,
        lr_ratio=0.5,
        batch_size=24,
        amp="bf16",
    )
    model = staged(network, 4)
    applied = applied_to(model, config, Precision("cpu", torch.bfloat16), "IMAGENET1K_V1")
    assert applied.as_dict() == {
        "lr": pytest.approx({"layer4": 0.05, "head": 0.1}, rel=1e-12),
        "optimizer": "AdamW",
        "options": {"betas": (0.9, 0.999), "weight_decay": 0.05},
        "schedule": "CosineAnnealingLR",
        "warmup_steps": 6,
        "trainable_parameters": LAYER4 + HEAD,
        "frozen_parameters": WHOLE - LAYER4 - HEAD,
        "frozen_held": 0,
        "frozen_training": (),
        "batch_size": 24,
        "device": "cpu",
        "precision": "bfloat16",
        "weights": "IMAGENET1K_V1",
    }
    require_applied(applied, config, model, CPU, 6)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(Sgd(lr=0.1, weight_decay=0.2), "SGD"), (Adam(lr=0.1), "Adam"), (AdamW(lr=0.1), "AdamW")],
)
@pytest.mark.parametrize(
    ("schedule", "kind", "warmup"),
    [
        (Constant(), "ConstantLR", 0),
        (Constant(warmup_fraction=0.1), "ConstantLR", 2),
        (Step(every_epochs=1, warmup_fraction=0.5), "StepLR", 10),
        (Cosine(), "CosineAnnealingLR", 0),
        (OneCycle(), "OneCycleLR", 0),
    ],
)
def test_every_choice_of_optimizer_and_schedule_passes_as_itself(
    optimizer: Optimizer, name: str, schedule: Schedule, kind: str, warmup: int, network: nn.Module
) -> None:
    config = config_of(optimizer=optimizer, schedule=schedule, freeze_depth=5)
    model = staged(network, 5)
    applied = applied_to(model, config)
    assert (applied.optimizer, applied.schedule, applied.warmup_steps) == (name, kind, warmup)
    # The peak, though a warm-up and OneCycle both begin far below it.
    assert applied.lr == pytest.approx({"head": 0.1}, rel=1e-12)
    assert applied.options["weight_decay"] == optimizer.weight_decay
    require_applied(applied, config, model, CPU, warmup)


@pytest.mark.parametrize("depth", range(6))
def test_every_freeze_depth_passes(depth: int, network: nn.Module) -> None:
    config = config_of(freeze_depth=depth, lr_ratio=0.7)
    model = staged(network, depth)
    applied = applied_to(model, config)
    require_applied(applied, config, model, CPU, 0)
    assert applied.trainable_parameters + applied.frozen_parameters == WHOLE
    assert list(applied.lr) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"][depth:]


# --- One difference at a time ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("lr", {"layer4": 0.05, "head": 0.2}, "lr of head is 0.2, not 0.1"),
        ("lr", {"layer4": 0.05001, "head": 0.1}, "lr of layer4 is 0.05001, not 0.05"),
        ("lr", {"head": 0.1}, r"the trained stages are \['head'\], not \['layer4', 'head'\]"),
        ("optimizer", "Adam", "optimizer is 'Adam', not 'AdamW'"),
        ("options", {"betas": (0.9, 0.999)}, r"options is \{'betas': .*\}, not .*0\.01\}"),
        ("precision", "bfloat16", "precision is bfloat16, with amp='auto'"),
        ("schedule", "StepLR", "schedule is 'StepLR', not 'ConstantLR'"),
        ("warmup_steps", 3, "warmup_steps is 3, not 0"),
        ("trainable_parameters", HEAD, f"trainable_parameters is {HEAD}, not {LAYER4 + HEAD}"),
        ("frozen_parameters", 0, f"frozen_parameters is 0, not {WHOLE - LAYER4 - HEAD}"),
        ("frozen_training", ("layer1",), r"frozen_training is \('layer1',\), not \(\)"),
        ("batch_size", 31, "batch_size is 31, not 32"),
        ("device", "cuda", "device is 'cuda', not 'cpu'"),
    ],
)
def test_a_difference_in_any_field_is_refused_by_name(
    field: str, value: object, told: str, network: nn.Module
) -> None:
    config = config_of(freeze_depth=4, lr_ratio=0.5)
    model = staged(network, 4)
    applied = applied_to(model, config)
    require_applied(applied, config, model, CPU, 0)
    with pytest.raises(AppliedValueError, match=f"{told}$"):
        require_applied(replace(applied, **{field: value}), config, model, CPU, 0)


def test_all_differences_are_told_at_once(network: nn.Module) -> None:
    config = config_of(freeze_depth=4)
    model = staged(network, 4)
    wrong = replace(applied_to(model, config), optimizer="SGD", schedule="StepLR", lr={"head": 3.0})
    with pytest.raises(AppliedValueError, match=r"optimizer .*; schedule .*; the trained stages"):
        require_applied(wrong, config, model, CPU, 0)


def metrics_of(largest_batch: int, steps: int) -> EpochMetrics:
    return EpochMetrics(
        loss=1.0,
        grad_norm=1.0,
        steps=steps,
        largest_batch=largest_batch,
        images_per_s=1.0,
        data_wait=0.0,
    )


@pytest.mark.parametrize(
    ("examples", "largest", "steps", "told"),
    [
        (20, 8, 3, None),
        (17, 9, 2, None),  # 8 and 8 + 1
        (5, 5, 1, None),
        (20, 10, 3, "batch_size is 10, not 8"),
        (20, 7, 3, "batch_size is 7, not 8"),
        (20, 8, 2, "an epoch took 2 steps, not 3"),
    ],
)
def test_the_batches_really_seen_are_compared_with_those_asked(
    examples: int, largest: int, steps: int, told: str | None
) -> None:
    config, wanted_steps = config_of(batch_size=8), -(-examples // 8) - (examples % 8 == 1)
    metrics = metrics_of(largest, steps)
    if told is None:
        require_batches(metrics, config, examples, wanted_steps)
    else:
        with pytest.raises(AppliedValueError, match=f"{told}$"):
            require_batches(metrics, config, examples, wanted_steps)


# --- Builders that do something else --------------------------------------------------------------


def changed_optimizer(change: Callable[[torch.optim.Optimizer], object]) -> dict[str, object]:
    def build(model: StagedModel, config: TrialConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        change(optimizer)
        return optimizer

    return {"build_optimizer": build}


def changed_config(part: str, **values: object) -> dict[str, object]:
    """Let the builder of `part` see another configuration than the trial's."""
    really = getattr(trial, part)
    return {
        part: lambda first, config, *a, **kw: really(first, replace(config, **values), *a, **kw)
    }


def changed_model(change: Callable[[StagedModel], object]) -> dict[str, object]:
    really = trial._build_model

    def build(config: TrialConfig, run: TrialRun) -> StagedModel:
        model = really(config, run)
        change(model)
        return model

    return {"_build_model": build}


def other_batches(**values: object) -> dict[str, object]:
    return {"Batches": lambda *a, **kw: Batches(*a, **{**kw, **values})}


def changed_epochs(change: Callable[[Iterator[Batch]], Iterator[Batch]]) -> dict[str, object]:
    """Let an epoch hold other batches than `Batches` says of itself."""

    def make(*args: Any, **kwargs: Any) -> Batches:
        batches = Batches(*args, **kwargs)
        really = batches.epoch
        batches.epoch = lambda epoch: change(really(epoch))
        return batches

    return {"Batches": make}


def halved(batches: Iterator[Batch]) -> Iterator[Batch]:
    for images, labels in batches:
        yield from zip(images.chunk(2), labels.chunk(2), strict=True)


def train_frozen(model: StagedModel) -> None:
    model.train = lambda mode=True: nn.Module.train(model, mode)  # forgets what is frozen
    model.train()


def forget_layer4(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[0]


def copy_parameters(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]


def swap_parameters(optimizer: torch.optim.Optimizer) -> None:
    first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
    first["params"], last["params"] = last["params"], first["params"]


def hold_frozen(model: StagedModel) -> None:
    # Frozen by its flag, yet in a group of the optimizer, whose weight decay would change it.
    model.network.layer4[1].conv2.weight.requires_grad_(False)


def set_rate(optimizer: torch.optim.Optimizer, group: int, lr: float) -> None:
    optimizer.param_groups[group]["lr"] = lr


BROKEN = {
    "rate of the head": (changed_optimizer(lambda o: set_rate(o, 1, 0.02)), "lr of head is 0.02"),
    "one rate for all": (changed_optimizer(lambda o: set_rate(o, 0, 0.01)), "lr of layer4 is 0.01"),
    "ratio ignored": (changed_config("build_optimizer", lr_ratio=1.0), "lr of layer4"),
    "group forgotten": (changed_optimizer(forget_layer4), r"stages are \['head'\].*layer4"),
    "copies of the parameters": (changed_optimizer(copy_parameters), "trainable_parameters is 0"),
    "other optimizer": (
        changed_config("build_optimizer", optimizer=Adam(lr=0.01)),
        "optimizer is 'Adam', not 'AdamW'; options is .*'weight_decay': 0.0}, not .*0.01}",
    ),
    "momentum of one stage": (
        changed_optimizer(lambda o: o.param_groups[0].update(betas=(0.5, 0.999))),
        r"options is \{'betas': \[\(0.5, 0.999\), \(0.9, 0.999\)\]",
    ),
    "rates of two stages swapped": (
        changed_optimizer(swap_parameters),
        "lr of layer4 is 0.01, not 0.005; lr of head is 0.005, not 0.01",
    ),
    "frozen parameter in a group": (changed_model(hold_frozen), "frozen_held is 2359296, not 0"),
    "other schedule": (changed_config("build_schedule", schedule=Constant()), "'ConstantLR'"),
    "warm-up forgotten": (changed_config("build_schedule", schedule=Cosine()), "warmup_steps is 0"),
    "stage thawed": (changed_model(lambda m: m.freeze(3)), "frozen_parameters"),
    "stage frozen": (changed_model(lambda m: m.freeze(5)), "trainable_parameters"),
    "parameter frozen": (
        changed_model(lambda m: m.network.fc.bias.requires_grad_(False)),
        f"trainable_parameters is {LAYER4 + HEAD - 3}",
    ),
    "frozen stage trains": (changed_model(train_frozen), r"frozen_training is \('stem', 'layer1'"),
    "smaller batches": (other_batches(batch_size=4), "batch_size is 4, not 8"),
    "larger batches": (other_batches(batch_size=16), "batch_size is 16, not 8"),
    "halves of batches": (changed_epochs(halved), "batch_size is 4, not 8; an epoch took 6 steps"),
    "fewer batches": (changed_epochs(lambda it: islice(it, 2)), "an epoch took 2 steps, not 3"),
}


@pytest.mark.parametrize(("broken", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_a_trial_that_would_train_something_else_is_stopped(
    broken: dict[str, object],
    told: str,
    config: TrialConfig,
    run: TrialRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(
        config, epochs=2, freeze_depth=4, lr_ratio=0.5, schedule=Cosine(warmup_fraction=0.3)
    )
    for name, builder in broken.items():
        monkeypatch.setattr(trial, name, builder)
    rows: list[object] = []
    with pytest.raises(AppliedValueError, match=told):
        run_trial(config, run, rows.append)
    assert rows == []


def test_the_same_trial_with_its_own_builders_goes_through(
    config: TrialConfig, run: TrialRun
) -> None:
    config = replace(
        config, epochs=1, freeze_depth=4, lr_ratio=0.5, schedule=Cosine(warmup_fraction=0.3)
    )
    rows: list[dict[str, Any]] = []
    run_trial(config, run, rows.append)
    (row,) = rows
    assert row["applied"]["lr"] == pytest.approx({"layer4": 0.005, "head": 0.01})
    assert row["applied"]["warmup_steps"] == warmup_steps(config, 3) == 1
    assert row["applied"]["trainable_parameters"] == LAYER4 + HEAD
    assert (row["applied"]["device"], row["applied"]["precision"]) == ("cpu", "float32")
