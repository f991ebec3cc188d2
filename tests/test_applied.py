import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tuneapp.training as training
from tuneapp.applied import Applied, read_back
from tuneapp.average import WeightAverage
from tuneapp.checkpoint import TrainState
from tuneapp.config import (
    Adam,
    AdamW,
    BceDice,
    BinaryCrossEntropy,
    Constant,
    Cosine,
    CosineRestarts,
    CrossEntropy,
    Cyclic,
    Dice,
    Exponential,
    Focal,
    Iou,
    Loss,
    MultiStep,
    OneCycle,
    Optimizer,
    OwnLoss,
    OwnSchedule,
    Plateau,
    Polynomial,
    RmsProp,
    Schedule,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.data.batches import Batch, Batches
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.views import mixing, training_view
from tuneapp.epoch_proof import require_batches
from tuneapp.errors import AppliedValueError
from tuneapp.families import RESNET
from tuneapp.fit import skeleton
from tuneapp.loop import EpochMetrics, Precision
from tuneapp.losses import build_loss
from tuneapp.models import apply_freezing, build_network
from tuneapp.optim import build_optimizer, rebuild_optimizer, undecayed_names
from tuneapp.proof import _wanted_undecayed, require_applied, require_defaults
from tuneapp.schedules import Schedule as Running
from tuneapp.schedules import warmup_steps
from tuneapp.staged import StagedModel
from tuneapp.training import TrialRun
from tuneapp.trial import run_trial

CPU = torch.device("cpu")
PLAIN = Precision("cpu", torch.float32)

# Counted by hand from the ResNet paper's table: convolutions without bias, two numbers a channel
# for each BatchNorm, three classes.
LAYER4_NORMS = 5 * 2 * 512
LAYER4 = (
    (256 * 512 * 9 + 512 * 512 * 9 + 256 * 512)  # the block that halves the image
    + (2 * 512 * 512 * 9)
    + LAYER4_NORMS
)
HEAD = 512 * 3 + 3
WHOLE = 11_689_512 - (512 * 1000 + 1000) + HEAD  # torchvision's own count has 1,000 classes
NORMS = 2 * (64 + 4 * 64 + 5 * 128 + 5 * 256) + LAYER4_NORMS


def own_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.square().mean()


def halving(epoch: int, config: TrialConfig) -> float:
    return 0.5**epoch


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("resnet18", 3)


def config_of(**values: Any) -> TrialConfig:
    return TrialConfig(
        **{"model": "resnet18", "optimizer": AdamW(lr=0.1), "epochs": 4, "weights": None, **values}
    )


def begin(network: nn.Module, config: TrialConfig, epoch: int = 1) -> TrainState:
    """What a trial of this configuration has in this epoch, with 5 steps each."""
    model = StagedModel(copy.deepcopy(network), RESNET)
    apply_freezing(model, config, epoch)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    return TrainState(
        model=model,
        optimizer=optimizer,
        schedule=Running(optimizer, config, 5),
        scaler=PLAIN.scaler(),
        config=config,
        steps_per_epoch=5,
        average=None if config.ema_decay is None else WeightAverage(model, config.ema_decay),
    )


def applied_to(state: TrainState) -> Applied:
    loss_fn = build_loss(state.config.loss, [1, 2, 3], state.config.aux_weight)
    return read_back(state, loss_fn, batches_of(state.config), PLAIN, "random")


@dataclasses.dataclass(frozen=True)
class Said:
    """What is read of batches, without the images of a store."""

    view: object
    mix: object
    batch_size: int
    is_streamed: bool = False
    workers: int = 0


def batches_of(config: TrialConfig) -> Any:
    preprocessing = Preprocessing(36, 32, "bilinear", (0.5,) * 3, (0.2,) * 3)
    view = training_view(config.augment, preprocessing)
    return Said(view, mixing(config.mixup_alpha, config.cutmix_alpha, 3), config.batch_size)


def require(applied: Applied, state: TrainState, epoch: int = 1) -> None:
    require_applied(applied, state.config, state.model, CPU, 5, epoch, [1, 2, 3])
    require_defaults(state.optimizer)


def test_what_is_applied_is_read_back_field_by_field(network: nn.Module) -> None:
    config = config_of(
        optimizer=AdamW(lr=0.1, weight_decay=0.05),
        schedule=Cosine(warmup_fraction=0.3),
        freeze_depth=4,
        lr_ratio=0.5,
        batch_size=24,
        amp="bf16",
        decay_norms_and_biases=False,
        ema_decay=0.99,
        channels_last=True,
        loss=Focal(gamma=1.0),
        aux_weight=0.5,
        augment="strong",
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
    )
    state = begin(network, config)
    loss_fn = build_loss(config.loss, [1, 2, 3], aux_weight=0.5)
    precision = Precision("cpu", torch.bfloat16)
    applied = read_back(state, loss_fn, batches_of(config), precision, "IMAGENET1K_V1")
    assert applied.as_dict() == {
        "lr": pytest.approx({"layer4": 0.05, "head": 0.1}, rel=1e-12),
        "optimizer": "AdamW",
        "options": {"betas": (0.9, 0.999), "eps": 1e-8},
        "weight_decay": 0.05,
        "undecayed_parameters": LAYER4_NORMS + 3,
        "schedule": "CosineAnnealingLR",
        "schedule_options": {"T_max": 14, "eta_min": 0.0, "warmup_start": 0.01},
        "warmup_steps": 6,
        "trainable_parameters": LAYER4 + HEAD,
        "frozen_parameters": WHOLE - LAYER4 - HEAD,
        "frozen_held": 0,
        "frozen_training": (),
        "frozen_batchnorm": "eval",
        "dropout": (),
        "stochastic_depth": None,
        "loss": "focal",
        "loss_options": {"gamma": 1.0, "alpha": 0.25},
        "aux_weight": 0.5,
        "ema_decay": 0.99,
        "channels_last": True,
        "batch_size": 24,
        "device": "cpu",
        "precision": "bfloat16",
        "weights": "IMAGENET1K_V1",
        "view": (
            "RandomResizedCrop(scale=0.35)",
            "RandomHorizontalFlip",
            "TrivialAugmentWide",
            "RandomErasing",
        ),
        "mixing": {"MixUp": 0.2, "CutMix": 1.0},
        "images": "stored",
        "workers": 0,
    }
    require(applied, state)


SGD = {"momentum": 0.9, "nesterov": False}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
OPTIMIZERS: list[tuple[Optimizer, str, dict[str, object]]] = [
    (Sgd(lr=0.1, weight_decay=0.2, nesterov=True), "SGD", {"momentum": 0.9, "nesterov": True}),
    (Adam(lr=0.1), "Adam", ADAM),
    (AdamW(lr=0.1), "AdamW", ADAM),
    (
        RmsProp(lr=0.1, alpha=0.9, momentum=0.8, eps=0.0316, centered=True),
        "RMSprop",
        {"alpha": 0.9, "momentum": 0.8, "eps": 0.0316, "centered": True},
    ),
]


@pytest.mark.parametrize(("optimizer", "name", "options"), OPTIMIZERS, ids=repr)
@pytest.mark.parametrize(
    ("schedule", "kind", "warmup"),
    [
        (Constant(), "ConstantLR", 0),
        (Constant(warmup_fraction=0.1), "ConstantLR", 2),
        (Step(every_epochs=1, warmup_fraction=0.5), "StepLR", 10),
        (MultiStep(milestones=[1, 2]), "MultiStepLR", 0),
        (Exponential(gamma=0.5), "ExponentialLR", 0),
        (Polynomial(warmup_fraction=0.1), "PolynomialLR", 2),
        (Cosine(), "CosineAnnealingLR", 0),
        (CosineRestarts(first_epochs=1), "CosineAnnealingWarmRestarts", 0),
        (OneCycle(), "OneCycleLR", 0),
        # As they are sampled: with more digits than a quotient keeps.
        (OneCycle(div_factor=23.456789012345, final_div_factor=9876.54321098765), "OneCycleLR", 0),
        (Cyclic(up_epochs=1, base_factor=0.123456789012345), "CyclicLR", 0),
        (Cyclic(up_epochs=1), "CyclicLR", 0),
        (Cyclic(up_epochs=1, warmup_fraction=0.2, mode="triangular2"), "CyclicLR", 4),
        (Plateau(), "ReduceLROnPlateau", 0),
        (Plateau(warmup_fraction=0.3), "ReduceLROnPlateau", 6),
        (OwnSchedule(factor=f"{__name__}:halving"), "LambdaLR", 0),
    ],
    ids=repr,
)
def test_every_choice_of_optimizer_and_schedule_passes_as_itself(
    optimizer: Optimizer,
    name: str,
    options: Mapping[str, object],
    schedule: Schedule,
    kind: str,
    warmup: int,
    network: nn.Module,
) -> None:
    state = begin(network, config_of(optimizer=optimizer, schedule=schedule, freeze_depth=5))
    applied = applied_to(state)
    assert (applied.optimizer, applied.schedule, applied.warmup_steps) == (name, kind, warmup)
    # The peak, though a warm-up and the cycles begin far below it.
    assert applied.lr == pytest.approx({"head": 0.1}, rel=1e-12)
    assert applied.options == options
    assert applied.weight_decay == optimizer.weight_decay
    require(applied, state)
    # And later, wherever the schedule is by then.
    state.schedule.replay([{"val/loss": 1.0, "val/accuracy": 0.5}] * 4)
    assert applied_to(state) == applied


@pytest.mark.parametrize(
    ("loss", "name", "options"),
    [
        (CrossEntropy(), "CrossEntropyLoss", {"label_smoothing": 0.0, "class_weights": None}),
        (
            CrossEntropy(label_smoothing=0.1, class_weights="balanced"),
            "CrossEntropyLoss",
            # Of 1, 2 and 3 examples: a mean of two.
            {"label_smoothing": 0.1, "class_weights": [2.0, 1.0, 0.666667]},
        ),
        (
            CrossEntropy(class_weights=[0.1, 1, 10]),
            "CrossEntropyLoss",
            {"label_smoothing": 0.0, "class_weights": [0.1, 1.0, 10.0]},
        ),
        (Focal(gamma=0.5, alpha=None), "focal", {"gamma": 0.5, "alpha": None}),
        (
            BinaryCrossEntropy(pos_weight=2.0, label_smoothing=0.1),
            "binary_cross_entropy",
            {"pos_weight": 2.0, "label_smoothing": 0.1},
        ),
        (Dice(smooth=0.5), "dice", {"smooth": 0.5}),
        (BceDice(dice_weight=0.3), "bce_dice", {"dice_weight": 0.3, "smooth": 1.0}),
        (Iou(smooth=2.0), "iou", {"smooth": 2.0}),
        (OwnLoss(loss=f"{__name__}:own_loss"), f"{__name__}:own_loss", {}),
    ],
    ids=repr,
)
def test_every_loss_passes_as_itself_and_as_no_other(
    loss: Loss, name: str, options: Mapping[str, object], network: nn.Module
) -> None:
    state = begin(network, config_of(loss=loss, freeze_depth=5))
    applied = applied_to(state)
    assert (applied.loss, applied.loss_options) == (name, options)
    require(applied, state)
    other = replace(loss, smooth=7.0) if isinstance(loss, Dice | Iou) else Dice(smooth=7.0)
    with pytest.raises(AppliedValueError, match="loss"):
        require(applied_to(begin(network, config_of(loss=other, freeze_depth=5))), state)


@pytest.mark.parametrize("num_classes", [3, 37, 100])
def test_balanced_weights_of_any_data_set_pass(num_classes: int, network: nn.Module) -> None:
    config = config_of(loss=CrossEntropy(class_weights="balanced"), freeze_depth=5)
    state, batches = begin(network, config), batches_of(config)
    for seed in range(20):
        counts = np.random.default_rng(seed).integers(20, 500, num_classes).tolist()
        applied = read_back(state, build_loss(config.loss, counts), batches, PLAIN, "random")
        require_applied(applied, config, state.model, CPU, 5, class_counts=counts)
    counts[0] += 1
    with pytest.raises(AppliedValueError, match="class_weights"):
        require_applied(applied, config, state.model, CPU, 5, class_counts=counts)


STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


@pytest.mark.parametrize("depth", range(-6, 6))
def test_every_freeze_depth_passes(depth: int, network: nn.Module) -> None:
    state = begin(network, config_of(freeze_depth=depth, lr_ratio=0.7))
    applied = applied_to(state)
    require(applied, state)
    assert applied.trainable_parameters + applied.frozen_parameters == WHOLE
    assert list(applied.lr) == STAGES[depth:]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, {"undecayed_parameters": 0, "weight_decay": 0.01, "frozen_batchnorm": "none"}),
        (
            {"decay_norms_and_biases": False},
            {"undecayed_parameters": NORMS + 3, "weight_decay": 0.01},
        ),
        (
            {"optimizer": Sgd(lr=0.1)},
            {"undecayed_parameters": WHOLE, "weight_decay": 0.0},
        ),
        (
            {"optimizer": Sgd(lr=0.1), "decay_norms_and_biases": False},
            {"undecayed_parameters": WHOLE, "weight_decay": 0.0},
        ),
        # Biases and norms alone are trained: nothing is decayed.
        (
            {"freeze": ["*conv*", "*downsample*", "fc.weight"], "decay_norms_and_biases": False},
            {
                "trainable_parameters": NORMS + 3 - 2 * (128 + 256 + 512),
                "undecayed_parameters": NORMS + 3 - 2 * (128 + 256 + 512),
                "weight_decay": 0.0,
                "lr": dict.fromkeys(STAGES, 0.1),
            },
        ),
        (
            {"freeze": ["layer[123].*", "*1.weight"], "lr_ratio": 0.5},
            {
                "lr": {"stem": 0.1 / 32, "layer4": 0.05, "head": 0.1},
                # The stem's bias; of layer4: each second convolution and norm, the biases of the
                # first norms, the convolution and norm of the shortcut (whose norm is its `1`).
                "trainable_parameters": HEAD
                + 64
                + 2 * (512 * 512 * 9 + 2 * 512)
                + 2 * 512
                + (256 * 512 + 512),
            },
        ),
        ({"freeze_depth": 4, "frozen_batchnorm": "train"}, {"frozen_batchnorm": "train"}),
        ({"freeze_depth": 4, "frozen_batchnorm": "eval"}, {"frozen_batchnorm": "eval"}),
        ({"freeze": ["*.bn?.*"], "frozen_batchnorm": "train"}, {"frozen_batchnorm": "train"}),
        ({"freeze": ["*bn?.*"]}, {"frozen_batchnorm": "eval"}),
        # Frozen by half, a norm still learns, and follows the data.
        ({"freeze": ["*bn?.weight"]}, {"frozen_batchnorm": "none"}),
        ({"freeze": ["*bn?.bias"]}, {"frozen_batchnorm": "none"}),
        ({"ema_decay": 0.9}, {"ema_decay": 0.9}),
        ({"channels_last": True}, {"channels_last": True}),
        ({"channels_last": False}, {"channels_last": False}),
        (
            {"head_lr_factor": 5.0, "freeze_depth": 4, "lr_ratio": 0.5},
            {"lr": {"layer4": 0.05, "head": 0.5}},
        ),
        (
            {"lr_ratio": {"layer4": 0.3, "head": 2.0}, "freeze_depth": 4},
            {"lr": {"layer4": 0.03, "head": 0.2}},
        ),
    ],
    ids=repr,
)
def test_what_a_configuration_asks_for_is_read_back_and_passes(
    values: dict[str, Any], wanted: dict[str, Any], network: nn.Module
) -> None:
    state = begin(network, config_of(**values))
    applied = applied_to(state)
    read = {name: getattr(applied, name) for name in wanted}
    assert read.pop("lr", {}) == pytest.approx(wanted.pop("lr", {}), rel=1e-12)
    assert read == wanted
    require(applied, state)


def test_each_epoch_is_held_against_what_is_unfrozen_by_then(network: nn.Module) -> None:
    config = config_of(freeze_depth=5, unfreeze_at={2: -2, 4: 0})
    trained = [HEAD, LAYER4 + HEAD, LAYER4 + HEAD, WHOLE]
    for epoch, numbers in enumerate(trained, start=1):
        state = begin(network, config, epoch)
        applied = applied_to(state)
        assert applied.trainable_parameters == numbers
        for other, of_other in enumerate(trained, start=1):
            if of_other == numbers:
                require(applied, state, other)
            else:
                with pytest.raises(AppliedValueError, match=f"is {numbers}, not {of_other}"):
                    require(applied, state, other)


@pytest.mark.parametrize(
    ("amp", "device", "allowed"),
    [
        ("auto", "cpu", {"float32"}),
        ("auto", "cuda", {"bfloat16", "float16"}),
        ("off", "cuda", {"float32"}),
        ("bf16", "cpu", {"bfloat16"}),
        ("fp16", "cuda", {"float16"}),
    ],
)
def test_each_way_of_mixing_allows_its_precisions(
    amp: str, device: str, allowed: set[str], network: nn.Module
) -> None:
    state = begin(network, config_of(freeze_depth=5, amp=amp))
    applied = replace(applied_to(state), device=device)
    for precision in ("float32", "bfloat16", "float16", "float64"):
        said = replace(applied, precision=precision)
        arguments = said, state.config, state.model, torch.device(device), 5
        if precision in allowed:
            require_applied(*arguments)
        else:
            with pytest.raises(AppliedValueError, match=f"precision is {precision}, with amp="):
                require_applied(*arguments)


# --- One difference at a time ---------------------------------------------------------------------

DIFFERENT: list[tuple[str, object, str]] = [
    ("lr", {"layer4": 0.05, "head": 0.2}, "lr of head is 0.2, not 0.1"),
    ("lr", {"layer4": 0.05001, "head": 0.1}, "lr of layer4 is 0.05001, not 0.05"),
    ("lr", {"layer4": 0.05, "head": float("nan")}, "lr of head is nan, not 0.1"),
    ("lr", {"head": 0.1}, r"the trained stages are \['head'\], not \['layer4', 'head'\]"),
    ("optimizer", "Adam", "optimizer is 'Adam', not 'AdamW'"),
    ("options", {"betas": (0.9, 0.99)}, r"options is \{'betas': .*\}, not .*'eps': 1e-08\}"),
    ("weight_decay", 0.02, "weight_decay is 0.02, not 0.01"),
    ("weight_decay", float("nan"), "weight_decay is nan, not 0.01"),
    ("undecayed_parameters", 3, "undecayed_parameters is 3, not 0"),
    ("precision", "bfloat16", "precision is bfloat16, with amp='auto'"),
    ("schedule", "StepLR", "schedule is 'StepLR', not 'ConstantLR'"),
    ("loss", "focal", "loss is 'focal', not 'CrossEntropyLoss'"),
    (
        "loss_options",
        {"label_smoothing": 0.1, "class_weights": None},
        r"loss_options is \{'label_smoothing': 0.1, .*\}, not \{'label_smoothing': 0.0, .*\}",
    ),
    ("aux_weight", 0.3, "aux_weight is 0.3, not 0.0"),
    ("schedule_options", {"factor": 0.5}, r"schedule_options is .*, not \{'factor': 1.0, .*\}"),
    ("dropout", (0.1, 0.2), r"dropout is \(0.1, 0.2\), not 0.2"),
    ("stochastic_depth", 0.5, "stochastic_depth is 0.5, not 0.3"),
    ("warmup_steps", 3, "warmup_steps is 3, not 0"),
    ("trainable_parameters", HEAD, f"trainable_parameters is {HEAD}, not {LAYER4 + HEAD}"),
    ("frozen_parameters", 0, f"frozen_parameters is 0, not {WHOLE - LAYER4 - HEAD}"),
    ("frozen_held", 7, "frozen_held is 7, not 0"),
    ("frozen_training", ("layer1",), r"frozen_training is \('layer1',\), not \(\)"),
    ("frozen_batchnorm", "train", "frozen_batchnorm is 'train', not 'eval'"),
    ("frozen_batchnorm", "mixed", "frozen_batchnorm is 'mixed', not 'eval'"),
    ("ema_decay", None, "ema_decay is None, not 0.9"),
    ("ema_decay", 0.99, "ema_decay is 0.99, not 0.9"),
    ("channels_last", False, "channels_last is False, not True"),
    ("batch_size", 31, "batch_size is 31, not 32"),
    ("view", ("CenterCrop",), r"view is \('CenterCrop',\), not \('RandomResizedCrop.*"),
    ("mixing", {"MixUp": 0.2}, r"mixing is \{'MixUp': 0.2\}, not \{\}"),
    ("device", "cuda", "device is 'cuda', not 'cpu'"),
]


@pytest.mark.parametrize(("field", "value", "told"), DIFFERENT)
def test_a_difference_in_any_field_is_refused_by_name(
    field: str, value: object, told: str, network: nn.Module
) -> None:
    config = config_of(
        freeze_depth=4,
        lr_ratio=0.5,
        ema_decay=0.9,
        channels_last=True,
        dropout=0.2,
        stochastic_depth=0.3,
    )
    state = begin(network, config)
    # Said of a network that has them.
    applied = replace(applied_to(state), dropout=(0.2,), stochastic_depth=0.3)
    require(applied, state)
    with pytest.raises(AppliedValueError, match=f"asked: {told}$"):
        require(replace(applied, **{field: value}), state)


def test_these_tests_know_every_field() -> None:
    # The weights are checked where they are loaded; where batches are made changes none of them.
    fields = {field.name for field in dataclasses.fields(Applied)}
    assert fields - {"weights", "images", "workers"} == {field for field, _, _ in DIFFERENT}


def test_all_differences_are_told_at_once(network: nn.Module) -> None:
    state = begin(network, config_of(freeze_depth=4))
    wrong = replace(applied_to(state), optimizer="SGD", schedule="StepLR", lr={"head": 3.0})
    with pytest.raises(AppliedValueError, match=r"optimizer .*; schedule .*; the trained stages"):
        require(wrong, state)


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

Broken = dict[str, object]
"""What stands in the place of what, by names in `tuneapp.training` or by whole paths."""


def changed_optimizer(change: Callable[[torch.optim.Optimizer], object]) -> Broken:
    def build(model: StagedModel, config: TrialConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        change(optimizer)
        return optimizer

    return {"build_optimizer": build}


def changed_config(part: str, **values: object) -> Broken:
    """Let the builder of `part` see another configuration than the trial's."""
    really = getattr(training, part)

    def build(*args: Any) -> Any:
        changed = (replace(a, **values) if isinstance(a, TrialConfig) else a for a in args)
        return really(*changed)

    return {part: build}


def changed_model(change: Callable[[StagedModel], object]) -> Broken:
    really = training._build_model

    def build(*args: Any) -> StagedModel:
        model = really(*args)
        change(model)
        return model

    return {"_build_model": build}


def changed_state(change: Callable[[TrainState], object]) -> Broken:
    really = training._begin

    def build(*args: Any) -> TrainState:
        state = really(*args)
        change(state)
        return state

    return {"_begin": build}


def other_batches(**values: object) -> Broken:
    return {"Batches": lambda *a, **kw: Batches(*a, **{**kw, **values})}


def changed_epochs(change: Callable[[Iterator[Batch]], Iterator[Batch]]) -> Broken:
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


def follow_data(model: StagedModel) -> None:
    model.frozen_batchnorm = "train"
    model.train()


def hold_data(model: StagedModel) -> None:
    model.frozen_batchnorm = "eval"
    model.train()


def forget_layer4(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[0]


def copy_parameters(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]


def swap_parameters(optimizer: torch.optim.Optimizer) -> None:
    first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
    first["params"], last["params"] = last["params"], first["params"]


def hold_frozen(optimizer: torch.optim.Optimizer) -> None:
    # Frozen by its flag, yet in a group of the optimizer, whose weight decay would change it.
    (weight,) = (p for p in optimizer.param_groups[-1]["params"] if p.ndim == 2)
    weight.requires_grad_(False)


def hold_twice(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[0]["params"][0])


def set_rate(optimizer: torch.optim.Optimizer, group: int, lr: float) -> None:
    optimizer.param_groups[group]["lr"] = lr


def set_option(optimizer: torch.optim.Optimizer, **option: object) -> None:
    optimizer.param_groups[0].update(option)


UNDECAYED = LAYER4_NORMS + 3
RMSPROP = RmsProp(lr=0.01, alpha=0.9, momentum=0.5)

# What else the configuration asks for, what is broken, and what is told.
BROKEN: dict[str, tuple[dict[str, Any], Broken, str]] = {
    "rate of the head": (
        {},
        changed_optimizer(lambda o: set_rate(o, 1, 0.02)),
        "lr of head is 0.02, not 0.01",
    ),
    "one rate for all": (
        {},
        changed_optimizer(lambda o: set_rate(o, 0, 0.01)),
        "lr of layer4 is 0.01, not 0.005",
    ),
    "ratio ignored": (
        {},
        changed_config("build_optimizer", lr_ratio=1.0),
        "lr of layer4 is 0.01, not 0.005",
    ),
    "factor of the head ignored": (
        {"head_lr_factor": 10.0},
        changed_config("build_optimizer", head_lr_factor=1.0),
        "lr of head is 0.01, not 0.1",
    ),
    "group forgotten": (
        {},
        changed_optimizer(forget_layer4),
        r"stages are \['head'\], not \['layer4', 'head'\]",
    ),
    "second group of a stage forgotten": (
        {"decay_norms_and_biases": False},
        changed_optimizer(lambda o: o.param_groups.pop(1)),
        f"trainable_parameters is {LAYER4 + HEAD - LAYER4_NORMS}, .*; lr of layer4 is nan",
    ),
    "second group of a stage at another rate": (
        {"decay_norms_and_biases": False},
        changed_optimizer(lambda o: set_rate(o, 1, 0.01)),
        "lr of layer4 is nan, not 0.005",
    ),
    "copies of the parameters": (
        {},
        changed_optimizer(copy_parameters),
        "trainable_parameters is 0",
    ),
    "parameter held twice": (
        {},
        changed_optimizer(hold_twice),
        f"trainable_parameters is {LAYER4 + HEAD + 256 * 512 * 9}, not {LAYER4 + HEAD}",
    ),
    "other optimizer": (
        {},
        changed_config("build_optimizer", optimizer=Adam(lr=0.01)),
        "optimizer is 'Adam', not 'AdamW'; weight_decay is 0.0, not 0.01; undecayed_parameters",
    ),
    "momentum of one stage": (
        {},
        changed_optimizer(lambda o: set_option(o, betas=(0.5, 0.999))),
        r"options is \{'betas': \[\(0.5, 0.999\), \(0.9, 0.999\)\]",
    ),
    "alpha": (
        {"optimizer": RMSPROP},
        changed_config("build_optimizer", optimizer=replace(RMSPROP, alpha=0.99)),
        "options is .*'alpha': 0.99.*, not .*'alpha': 0.9,",
    ),
    "centered": (
        {"optimizer": RMSPROP},
        changed_config("build_optimizer", optimizer=replace(RMSPROP, centered=True)),
        "options is .*'centered': True.*, not .*'centered': False",
    ),
    "nesterov ignored": (
        {"optimizer": Sgd(lr=0.01, nesterov=True)},
        changed_config("build_optimizer", optimizer=Sgd(lr=0.01)),
        "options is .*'nesterov': False}, not .*'nesterov': True",
    ),
    "weight decay": (
        {},
        changed_config("build_optimizer", optimizer=AdamW(lr=0.01, weight_decay=0.1)),
        "weight_decay is 0.1, not 0.01$",
    ),
    "weight decay of one stage": (
        {},
        changed_optimizer(lambda o: set_option(o, weight_decay=0.1)),
        "weight_decay is nan, not 0.01$",
    ),
    "weight decay of one stage forgotten": (
        {},
        changed_optimizer(lambda o: set_option(o, weight_decay=0.0)),
        f"undecayed_parameters is {LAYER4}, not 0$",
    ),
    "norms decayed though not asked": (
        {"decay_norms_and_biases": False},
        changed_config("build_optimizer", decay_norms_and_biases=True),
        f"undecayed_parameters is 0, not {UNDECAYED}$",
    ),
    "norms not decayed though asked": (
        {},
        changed_config("build_optimizer", decay_norms_and_biases=False),
        f"undecayed_parameters is {UNDECAYED}, not 0$",
    ),
    "rates of two stages swapped": (
        {},
        changed_optimizer(swap_parameters),
        "lr of layer4 is 0.01, not 0.005; lr of head is 0.005, not 0.01",
    ),
    "frozen parameter in a group": (
        {},
        changed_optimizer(hold_frozen),
        f"frozen_held is {3 * 512}, not 0",
    ),
    "other schedule": (
        {},
        changed_config("Schedule", schedule=Constant()),
        "schedule is 'ConstantLR', not 'CosineAnnealingLR'; .*warmup_steps is 0, not 2",
    ),
    "warm-up forgotten": (
        {},
        changed_config("Schedule", schedule=Cosine()),
        "warmup_steps is 0, not 2$",
    ),
    "warm-up before a plateau forgotten": (
        {"schedule": Plateau(warmup_fraction=0.3)},
        changed_config("Schedule", schedule=Plateau(warmup_fraction=0.1)),
        "warmup_steps is 1, not 2$",
    ),
    "other loss": (
        {"loss": Focal(gamma=1.0)},
        {"build_loss": lambda *a: build_loss(Dice(), [8, 8, 8])},
        "loss is 'dice', not 'focal'; loss_options is",
    ),
    "other gamma of the loss": (
        {"loss": Focal(gamma=1.0)},
        {"build_loss": lambda *a: build_loss(Focal(gamma=2.0), [8, 8, 8])},
        "asked: loss_options is .*'gamma': 2.0.*, not .*'gamma': 1.0",
    ),
    "class weights ignored": (
        {"loss": CrossEntropy(class_weights="balanced")},
        {"build_loss": lambda *a: build_loss(CrossEntropy(), [8, 8, 8])},
        r"'class_weights': None}, not .*'class_weights': \[1.047619\d*, 1.047619\d*, 0.91666\d*\]}",
    ),
    "class weights of other classes": (
        {"loss": CrossEntropy(class_weights=[1, 2, 3])},
        {"build_loss": lambda *a: build_loss(CrossEntropy(class_weights=[3, 2, 1]), [8, 8, 8])},
        r"'class_weights': \[3.0, 2.0, 1.0\]}, not .*'class_weights': \[1.0, 2.0, 3.0\]}",
    ),
    "auxiliary classifiers ignored": (
        {"aux_weight": 0.5},
        {"build_loss": lambda config, counts, aux: build_loss(config, counts)},
        "aux_weight is 0.0, not 0.5",
    ),
    "other gamma of the schedule": (
        {"schedule": Step(every_epochs=1, gamma=0.5)},
        changed_config("Schedule", schedule=Step(every_epochs=1, gamma=0.1)),
        "schedule_options is .*'gamma': 0.1}, not .*'gamma': 0.5}$",
    ),
    "schedule over another number of epochs": (
        {},
        changed_config("Schedule", epochs=3),
        "schedule_options is .*'T_max': 6, .*not .*'T_max': 4, .*; warmup_steps is 3, not 2$",
    ),
    "dropout ignored": (
        {"model": "mobilenet_v3_small", "freeze_depth": -1, "dropout": 0.5},
        changed_config("build_staged", dropout=None),
        r"dropout is \(0.2,\), not 0.5",
    ),
    "stochastic depth ignored": (
        {"model": "efficientnet_b0", "freeze_depth": -1, "stochastic_depth": 0.5},
        changed_config("build_staged", stochastic_depth=None),
        "stochastic_depth is 0.18.*, not 0.5",
    ),
    "other parameters of the same size": (
        {"freeze_depth": 0, "freeze": ["layer[123].*", "layer4.1.conv1.*"]},
        changed_config("apply_freezing", freeze=["layer[123].*", "layer4.1.conv2.*"]),
        "asked: layer4.1.conv2.weight is not trained; layer4.1.conv1.weight is trained$",
    ),
    "stage thawed": ({}, changed_model(lambda m: m.freeze(3)), "frozen_parameters is .*, not"),
    "stage frozen": ({}, changed_model(lambda m: m.freeze(5)), "trainable_parameters is .*, not"),
    "nothing frozen": (
        {},
        changed_config("apply_freezing", freeze_depth=0),
        f"trainable_parameters is {WHOLE}, not {LAYER4 + HEAD}",
    ),
    "patterns ignored": (
        {"freeze_depth": 0, "freeze": ["layer[123].*", "*.bn?.*"]},
        changed_config("apply_freezing", freeze=[]),
        f"trainable_parameters is {WHOLE}, not",
    ),
    "one pattern ignored": (
        {"freeze_depth": 0, "freeze": ["layer[123].*", "layer4.1.bn2.*"]},
        changed_config("apply_freezing", freeze=["layer[123].*"]),
        "frozen_parameters is .*, not",
    ),
    "parameter frozen": (
        {},
        changed_model(lambda m: m.network.fc.bias.requires_grad_(False)),
        f"trainable_parameters is {LAYER4 + HEAD - 3}, not {LAYER4 + HEAD}",
    ),
    "frozen stage trains": (
        {},
        changed_model(train_frozen),
        r"frozen_training is \('stem', 'layer1', 'layer2', 'layer3'\), not \(\)",
    ),
    "frozen BatchNorm follows the data": (
        {},
        changed_model(follow_data),
        "frozen_batchnorm is 'train', not 'eval'$",
    ),
    "frozen BatchNorm stays": (
        {"frozen_batchnorm": "train"},
        changed_model(hold_data),
        "frozen_batchnorm is 'eval', not 'train'$",
    ),
    "frozen BatchNorm ignored": (
        {"frozen_batchnorm": "train"},
        changed_config("apply_freezing", frozen_batchnorm="eval"),
        "frozen_batchnorm is 'eval', not 'train'$",
    ),
    "one frozen BatchNorm follows the data": (
        {},
        changed_model(lambda m: m.network.layer1[0].bn2.train()),
        "frozen_batchnorm is 'mixed', not 'eval'$",
    ),
    "average forgotten": (
        {"ema_decay": 0.9},
        changed_state(lambda s: setattr(s, "average", None)),
        "ema_decay is None, not 0.9$",
    ),
    "average though not asked": (
        {},
        changed_config("_begin", ema_decay=0.9),
        "ema_decay is 0.9, not None$",
    ),
    "other average": (
        {"ema_decay": 0.9},
        {"WeightAverage": lambda model, decay: WeightAverage(model, decay / 2)},
        "ema_decay is 0.45, not 0.9$",
    ),
    "channels_last ignored": (
        {"channels_last": True},
        changed_config("_build_model", channels_last=False),
        "channels_last is False, not True$",
    ),
    "smaller batches": ({}, other_batches(batch_size=4), "batch_size is 4, not 8"),
    "larger batches": ({}, other_batches(batch_size=16), "batch_size is 16, not 8"),
    "halves of batches": (
        {},
        changed_epochs(halved),
        "batch_size is 4, not 8; an epoch took 6 steps, not 3",
    ),
    "fewer batches": (
        {},
        changed_epochs(lambda it: islice(it, 2)),
        "an epoch took 2 steps, not 3",
    ),
}


def small(config: TrialConfig, **values: Any) -> TrialConfig:
    """Two stages of a ResNet-18 trained at 32 pixels, for two epochs of three steps."""
    schedule = Cosine(warmup_fraction=0.3)
    return replace(
        config, **{"epochs": 2, "freeze_depth": 4, "lr_ratio": 0.5, "schedule": schedule, **values}
    )


def put_in_place(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, builder in broken.items():
        monkeypatch.setattr(name if "." in name else f"tuneapp.training.{name}", builder)


@pytest.mark.parametrize(("values", "broken", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_a_trial_that_would_train_something_else_is_stopped(
    values: dict[str, Any],
    broken: Broken,
    told: str,
    config: TrialConfig,
    run: TrialRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_in_place(broken, monkeypatch)
    rows: list[object] = []
    with pytest.raises(AppliedValueError, match=told):
        run_trial(small(config, **values), run, rows.append)
    assert rows == []


def keep_the_old(old: torch.optim.Optimizer, *args: object) -> torch.optim.Optimizer:
    return old


def at_one_rate(
    old: torch.optim.Optimizer, model: StagedModel, config: TrialConfig
) -> torch.optim.Optimizer:
    return rebuild_optimizer(old, model, replace(config, lr_ratio=1.0))


def without_warm_up(
    optimizer: torch.optim.Optimizer, config: TrialConfig, steps_per_epoch: int
) -> Running:
    return Running(optimizer, replace(config, schedule=Cosine()), steps_per_epoch)


def unfreeze_all(model: StagedModel, config: TrialConfig, epoch: int) -> bool:
    model.freeze(0)
    return True


def unfreeze_nothing(model: StagedModel, config: TrialConfig, epoch: int) -> bool:
    return False


def forget_momentum(
    old: torch.optim.Optimizer, model: StagedModel, config: TrialConfig
) -> torch.optim.Optimizer:
    return build_optimizer(model, config)


class NoReplay(Running):
    def replay(self, history: object) -> None:
        pass


BROKEN_UNFREEZING: dict[str, tuple[Broken, str]] = {
    "momentum forgotten": (
        {"tuneapp.checkpoint.rebuild_optimizer": forget_momentum},
        "the optimizer's state of 2 parameters was lost by unfreezing",
    ),
    "schedule begun anew": (
        {"tuneapp.checkpoint.Schedule": NoReplay},
        "lr of layer4 was 5e-05 at update 1, not 0.00",
    ),
    "optimizer not rebuilt": (
        {"tuneapp.checkpoint.rebuild_optimizer": keep_the_old},
        f"trainable_parameters is {HEAD}, not {LAYER4 + HEAD}",
    ),
    "rebuilt at other rates": (
        {"tuneapp.checkpoint.rebuild_optimizer": at_one_rate},
        "lr of layer4 is 0.01, not 0.005$",
    ),
    "schedule without its warm-up": (
        {"tuneapp.checkpoint.Schedule": without_warm_up},
        "warmup_steps is 0, not 2$",
    ),
    "more unfrozen than asked": (
        {"tuneapp.checkpoint.apply_freezing": unfreeze_all},
        f"trainable_parameters is {WHOLE}, not ({HEAD}|{LAYER4 + HEAD});",
    ),
    "nothing unfrozen": (
        {"tuneapp.checkpoint.apply_freezing": unfreeze_nothing},
        f"trainable_parameters is {HEAD}, not {LAYER4 + HEAD}",
    ),
}


@pytest.mark.parametrize(
    ("broken", "told"), BROKEN_UNFREEZING.values(), ids=BROKEN_UNFREEZING.keys()
)
def test_a_trial_that_would_train_something_else_once_unfrozen_is_stopped(
    broken: Broken,
    told: str,
    config: TrialConfig,
    run: TrialRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_in_place(broken, monkeypatch)
    rows: list[dict[str, Any]] = []
    with pytest.raises(AppliedValueError, match=told):
        run_trial(small(config, freeze_depth=5, unfreeze_at={2: 4}), run, rows.append)
    assert len(rows) <= 1


def test_the_same_trial_with_its_own_builders_goes_through(
    config: TrialConfig, run: TrialRun
) -> None:
    config = small(config, freeze_depth=5, unfreeze_at={2: 4}, ema_decay=0.9, channels_last=True)
    rows: list[dict[str, Any]] = []
    run_trial(config, run, rows.append)
    first, second = (row["applied"] for row in rows)
    assert first["lr"] == pytest.approx({"head": 0.01})
    assert second["lr"] == pytest.approx({"layer4": 0.005, "head": 0.01})
    assert first["trainable_parameters"] == HEAD
    assert second["trainable_parameters"] == LAYER4 + HEAD
    for applied in (first, second):
        assert applied["warmup_steps"] == warmup_steps(config, 3) == 2
        assert (applied["device"], applied["precision"]) == ("cpu", "float32")
        assert (applied["ema_decay"], applied["channels_last"]) == (0.9, True)


@pytest.mark.parametrize(
    "model",
    [
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "maxvit_t"),
        *("inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"),
        *("resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn"),
        *("vit_b_16", "timm:convnext_atto", "timm:vit_tiny_patch16_224"),
        *("timm:swinv2_tiny_window8_256", "timm:levit_128s"),
    ],
)
def test_both_rules_of_what_is_not_decayed_agree(model: str) -> None:
    network = skeleton(model).network
    by_name = dict(network.named_parameters())
    built = {id(by_name[name]) for name in undecayed_names(network)}
    assert built == _wanted_undecayed(network)
    assert 0 < len(built) < len(by_name)
