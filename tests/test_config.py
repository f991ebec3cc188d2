import dataclasses
import inspect
import json
import math
from types import MappingProxyType
from typing import get_args

import numpy as np
import pytest
import torch
import torchvision

import tuneapp.config
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
    Preprocess,
    RmsProp,
    RunSettings,
    Schedule,
    Sgd,
    Step,
    TrialConfig,
    canonical_json,
    is_better,
    is_reference,
)
from tuneapp.errors import ConfigError
from tuneapp.families import FAMILIES

NAN, INF = float("nan"), float("inf")
ABOVE_ZERO, AT_LEAST_ZERO = "a number > 0", "a number >= 0"
FRACTION = "a number in [0, 1)"
NOT_TINY = "a number >= 1e-06"
SHARE = "a share of the training in [0, 1)"
BETWEEN, SHARE_OF_ONE = "a number in (0, 1)", "a number in (0, 1]"
WHOLE = "a whole number >= 1"
PATH = "an import path such as 'package.module:name'"
GOOD = {
    Sgd: {"lr": 0.1},
    Adam: {"lr": 0.1},
    AdamW: {"lr": 0.1},
    RmsProp: {"lr": 0.1},
    Constant: {},
    Step: {"every_epochs": 2},
    MultiStep: {"milestones": [2, 3]},
    Exponential: {"gamma": 0.9},
    Polynomial: {},
    Cosine: {},
    CosineRestarts: {"first_epochs": 2},
    OneCycle: {},
    Cyclic: {"up_epochs": 2},
    Plateau: {},
    OwnSchedule: {"factor": "mine.schedules:halving"},
    CrossEntropy: {},
    Focal: {},
    BinaryCrossEntropy: {},
    Dice: {},
    BceDice: {},
    Iou: {},
    OwnLoss: {"loss": "mine:loss"},
    Preprocess: {},
    TrialConfig: {"model": "resnet18", "optimizer": Sgd(lr=0.1)},
    RunSettings: {},
}
WARMED_UP = [
    *(Constant, Step, MultiStep, Exponential, Polynomial, Cosine, CosineRestarts, Cyclic, Plateau),
    OwnSchedule,
]
NOT_ABOVE_ZERO = [0, -1e-9, NAN, INF, -INF, True, "0.1", None]
NOT_AT_LEAST_ZERO = [-1e-9, NAN, INF, False, "0", None]
NOT_A_FRACTION = [-0.1, 1, 1.5, NAN, False, "0", None]
NOT_BETWEEN = [0, 1, -0.1, 1.1, NAN, True, "0.5", None]
NOT_A_SHARE = [0, -0.1, 1.1, NAN, INF, True, "1", None]
NOT_COUNTED = [0, -1, 1.0, True, "1", None]
NOT_FROM_ZERO = [-1, 0.0, False, "0", None]
NOT_A_SWITCH = [0, 1, "yes", None]
NOT_A_PATH = [
    "halving",
    "mine.halving",
    "mine:",
    ":f",
    "a b:f",
    "mine:f:g",
    "mine:f.g",
    1,
    None,
    "",
]

BAD = [
    *[
        (kind, name, value, allowed)
        for kind, name, allowed, values in [
            (Sgd, "lr", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (Sgd, "weight_decay", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (Sgd, "momentum", FRACTION, [-0.1, 1, NAN]),
            (Sgd, "nesterov", "True or False, and False when momentum is 0", NOT_A_SWITCH),
            (Adam, "lr", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (Adam, "beta1", FRACTION, NOT_A_FRACTION),
            (Adam, "beta2", FRACTION, NOT_A_FRACTION),
            (Adam, "weight_decay", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (AdamW, "lr", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (AdamW, "beta1", FRACTION, NOT_A_FRACTION),
            (AdamW, "weight_decay", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (RmsProp, "lr", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (RmsProp, "alpha", FRACTION, NOT_A_FRACTION),
            (RmsProp, "eps", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (RmsProp, "momentum", FRACTION, NOT_A_FRACTION),
            (RmsProp, "centered", "True or False", NOT_A_SWITCH),
            (RmsProp, "weight_decay", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            *[(kind, "warmup_fraction", SHARE, NOT_A_FRACTION) for kind in WARMED_UP],
            (Step, "every_epochs", WHOLE, NOT_COUNTED),
            (Step, "gamma", SHARE_OF_ONE, NOT_A_SHARE),
            (
                MultiStep,
                "milestones",
                "rising whole numbers >= 1, such as [3, 6]",
                [[], (), [0], [2, 2], [3, 2], [1.0], [True, 2], ["1"], 3, "12", None, {1: 2}, {1}],
            ),
            (MultiStep, "gamma", SHARE_OF_ONE, NOT_A_SHARE),
            (Exponential, "gamma", SHARE_OF_ONE, NOT_A_SHARE),
            (Polynomial, "power", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (CosineRestarts, "first_epochs", WHOLE, NOT_COUNTED),
            (CosineRestarts, "multiplier", WHOLE, NOT_COUNTED),
            (OneCycle, "pct_start", BETWEEN, NOT_BETWEEN),
            (OneCycle, "div_factor", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (OneCycle, "final_div_factor", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (Cyclic, "up_epochs", WHOLE, NOT_COUNTED),
            (Cyclic, "base_factor", BETWEEN, NOT_BETWEEN),
            (
                Cyclic,
                "mode",
                "one of 'triangular', 'triangular2'",
                ["exp_range", "triangular3", None, 2, ["triangular"]],
            ),
            (Plateau, "factor", BETWEEN, NOT_BETWEEN),
            (Plateau, "patience", "a whole number >= 0", NOT_FROM_ZERO),
            (Plateau, "threshold", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (Plateau, "cooldown", "a whole number >= 0", NOT_FROM_ZERO),
            (
                Plateau,
                "monitor",
                "one of 'val/accuracy', 'val/balanced_accuracy', 'val/loss', 'val/macro_f1'",
                ["loss", "train/loss", None, 1],
            ),
            (Plateau, "min_factor", FRACTION, NOT_A_FRACTION),
            (OwnSchedule, "factor", PATH, [*NOT_A_PATH, len]),
            (CrossEntropy, "label_smoothing", FRACTION, NOT_A_FRACTION),
            (
                CrossEntropy,
                "class_weights",
                "None, 'balanced', or a list with a number > 0 for each class",
                [
                    "Balanced",
                    np.array([1.0, 2.0]),
                    [],
                    [1, 0],
                    [1, -1.0],
                    [1, NAN],
                    [1, True],
                    ["1"],
                    1.0,
                    {0: 1.0},
                    True,
                ],
            ),
            (Focal, "gamma", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (Focal, "alpha", FRACTION, [-0.1, 1, NAN, False, "0"]),
            (BinaryCrossEntropy, "label_smoothing", FRACTION, NOT_A_FRACTION),
            (BinaryCrossEntropy, "pos_weight", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (Dice, "smooth", NOT_TINY, [*NOT_ABOVE_ZERO, 9.9e-7]),
            (BceDice, "dice_weight", FRACTION, NOT_A_FRACTION),
            (BceDice, "smooth", NOT_TINY, [*NOT_ABOVE_ZERO, 9.9e-7]),
            (Iou, "smooth", NOT_TINY, [*NOT_ABOVE_ZERO, 9.9e-7]),
            (OwnLoss, "loss", PATH, [*NOT_A_PATH, len]),
            (
                OwnLoss,
                "options",
                "a mapping name -> value, of numbers, strings, lists and mappings",
                [None, [1], {1: 2}, "gamma=2"],
            ),
            (
                Preprocess,
                "mean",
                "None or three numbers in [0, 1]",
                [
                    *(0.5, [0.5], [0.5] * 4, [0.5, 0.5, NAN], [0.5, 0.5, "0"], "abc", {1, 2, 3}),
                    [0.5, 0.5, -0.1],
                ],
            ),
            (
                Preprocess,
                "std",
                "None or three numbers in (0, 1]",
                [0.5, [0.5] * 2, [0.5, 0.5, 0], [0.5, -1, 0.5], [0.5, 0.5, INF]],
            ),
            (
                Preprocess,
                "interpolation",
                "None or one of 'nearest', 'bilinear', 'bicubic'",
                ["lanczos", "", 2, ["bicubic"]],
            ),
            (Preprocess, "resize_size", "None or a whole number >= 16", [15, 0, 32.0, "32", True]),
            (TrialConfig, "model", "a name or an import path", ["", None, 18, len]),
            (TrialConfig, "epochs", WHOLE, [0, -1, 2.0, True, "2", None]),
            (TrialConfig, "batch_size", WHOLE, [0, -1, 2.0, True]),
            (TrialConfig, "partial_weights", "True or False", NOT_A_SWITCH),
            (TrialConfig, "freeze_depth", "a whole number", [1.0, True, "1", None]),
            (
                TrialConfig,
                "freeze",
                "a list of patterns of parameter names",
                ["layer1.*", [1], [""], ["a", None], None, {"layer1.*"}],
            ),
            (
                TrialConfig,
                "unfreeze_at",
                "a mapping epoch (from 2) -> freeze depth",
                [None, [2], 3, {1: 0}, {0: 0}, {"2": 0}, {2.0: 0}, {2: 1.0}, {2: "0"}, {True: 0}],
            ),
            (
                TrialConfig,
                "frozen_batchnorm",
                "one of 'eval', 'train'",
                ["frozen", None, True, ["eval"]],
            ),
            (TrialConfig, "head_lr_factor", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (TrialConfig, "decay_norms_and_biases", "True or False", NOT_A_SWITCH),
            (TrialConfig, "dropout", FRACTION, [-0.1, 1, 1.5, NAN, False, "0"]),
            (TrialConfig, "stochastic_depth", FRACTION, [-0.1, 1, 1.5, NAN, False, "0"]),
            (TrialConfig, "aux_weight", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (TrialConfig, "mixup_alpha", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (TrialConfig, "cutmix_alpha", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (TrialConfig, "seed", "a whole number >= 0", NOT_FROM_ZERO),
            (
                TrialConfig,
                "augment",
                "one of 'none', 'light', 'standard', 'strong', or an import path such as "
                "'package.module:build'",
                ["lite", None, 1],
            ),
            (TrialConfig, "amp", "one of 'auto', 'bf16', 'fp16', 'off'", ["on", None, True]),
            (TrialConfig, "image_size", "None or a whole number >= 16", [15, 0, 32.0, "32"]),
            (TrialConfig, "weights", "None, a name or a path", ["", 1, False]),
            (TrialConfig, "clip_norm", "None or a number > 0", [0, -1, NAN, INF, True, "1"]),
            (TrialConfig, "clip_value", "None or a number > 0", [0, -1, NAN, INF, True, "1"]),
            (TrialConfig, "ema_decay", "None or a number in (0, 1)", [0, 1, -0.1, NAN, True, "0"]),
            (TrialConfig, "channels_last", "True or False", NOT_A_SWITCH),
            (
                TrialConfig,
                "accumulation_steps",
                "a whole number from 1 to half of batch_size (each part has at least 2 examples)",
                [0, -1, 17, 1.5, "2", True],
            ),
            (
                TrialConfig,
                "lr_ratio",
                "a number in (0, 1], or a mapping stage -> factor",
                [0, -0.5, 1.1, NAN, INF, True, "0.5", None],
            ),
            (RunSettings, "seed", "a whole number >= 0", [-1, 0.5, True, None]),
            (
                RunSettings,
                "metric",
                "one of val/accuracy, val/auroc, val/average_precision, val/balanced_accuracy, "
                "val/loss, val/macro_f1, val/recall/CLASS",
                ["accuracy", None, "val/recall/", "loss"],
            ),
            (RunSettings, "device", "one of 'auto', 'cpu', 'cuda'", ["gpu", "cuda:0", None]),
            (RunSettings, "max_epochs", WHOLE, [0, -1, 1.5, True]),
            (RunSettings, "image_size", "a whole number >= 16", [15, 0, 32.5, "32"]),
        ]
        for value in values
    ]
]


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_the_good_values_of_these_tests_are_allowed(kind):
    # Otherwise the tables of bad values would prove nothing.
    kind(**GOOD[kind])


@pytest.mark.parametrize(
    ("kind", "name", "value", "allowed"),
    BAD,
    ids=[f"{kind.__name__}-{name}-{value!r}" for kind, name, value, _ in BAD],
)
def test_a_wrong_value_is_named_with_its_field_and_what_is_allowed(kind, name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        kind(**{**GOOD[kind], name: value})
    begin, _, mistakes = str(caught.value).partition(": ")
    assert begin == kind.__name__
    assert f"{name} must be {allowed}, got {value!r}" in mistakes.split("; ")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Sgd, "momentum", 0),
        (Sgd, "weight_decay", 0),
        (Sgd, "lr", 1),
        (Adam, "beta1", 0.0),
        (Constant, "warmup_fraction", 0.999),
        (Step, "gamma", 1),
        (Step, "every_epochs", 1),
        (RmsProp, "alpha", 0),
        (RmsProp, "eps", 1e-30),
        (MultiStep, "milestones", [1]),
        (MultiStep, "milestones", (1, 2, 1000)),
        (Exponential, "gamma", 1),
        (Polynomial, "power", 1e-9),
        (CosineRestarts, "first_epochs", 1),
        (Cyclic, "base_factor", 1e-9),
        (Cyclic, "mode", "triangular2"),
        (Plateau, "patience", 0),
        (Plateau, "min_factor", 0.999),
        (Plateau, "threshold", 0),
        (Plateau, "factor", 0.999),
        (Plateau, "monitor", "val/accuracy"),
        (OwnSchedule, "factor", "a.b_2._c:_d9"),
        (CrossEntropy, "class_weights", [1e-9, 1000]),
        (CrossEntropy, "class_weights", (1, 2)),
        (CrossEntropy, "class_weights", "balanced"),
        (Focal, "gamma", 0),
        (Focal, "alpha", None),
        (Focal, "alpha", 0),
        (BceDice, "dice_weight", 0),
        (Dice, "smooth", 1e-6),
        (OwnLoss, "options", {"gamma": 2, "words": ["any"]}),
        (Preprocess, "mean", (0, 0.5, 1)),
        (Preprocess, "std", [1e-3, 1, 0.5]),
        (Preprocess, "interpolation", "nearest"),
        (Preprocess, "resize_size", 16),
        (OneCycle, "pct_start", 1e-9),
        (TrialConfig, "epochs", 1),
        (TrialConfig, "freeze_depth", 0),
        (TrialConfig, "freeze_depth", -1),
        (TrialConfig, "freeze", ("layer1.*", "*.bn?.[wb]*")),
        (TrialConfig, "freeze", []),
        (TrialConfig, "unfreeze_at", {2: 0, 10: -3}),
        (TrialConfig, "head_lr_factor", 100),
        (TrialConfig, "dropout", 0),
        (TrialConfig, "stochastic_depth", 0.999),
        (TrialConfig, "ema_decay", 0.99999),
        (TrialConfig, "model", "mine.nets:build"),
        (TrialConfig, "clip_value", 1e-9),
        (TrialConfig, "image_size", 16),
        (TrialConfig, "weights", None),
        (TrialConfig, "clip_norm", 1e-9),
        (TrialConfig, "accumulation_steps", 16),
        (TrialConfig, "batch_size", 1),
        (TrialConfig, "lr_ratio", 1),
        (TrialConfig, "lr_ratio", {"head": 7}),
        (RunSettings, "max_epochs", 1),
        (RunSettings, "image_size", 16),
    ],
)
def test_the_ends_of_the_allowed_ranges_are_allowed(kind, name, value):
    assert getattr(kind(**{**GOOD[kind], name: value}), name) == value


def test_nesterov_wants_momentum():
    with pytest.raises(ConfigError, match="and False when momentum is 0, got True"):
        Sgd(lr=0.1, momentum=0.0, nesterov=True)
    assert Sgd(lr=0.1, momentum=0.5, nesterov=True).nesterov


@pytest.mark.parametrize(
    ("name", "value", "interval"),
    [("mean", [123.7, 116.3, 103.5], "[0, 1]"), ("std", (58.4, 57.1, 57.4), "(0, 1]")],
)
def test_statistics_of_pixels_up_to_255_are_told_to_be_divided(name, value, interval):
    with pytest.raises(ConfigError) as caught:
        Preprocess(**{name: value})
    assert str(caught.value) == (
        f"Preprocess: {name} must be None or three numbers in {interval}, got {value!r}: "
        "pixels are in [0, 1]; divide by 255"
    )


@pytest.mark.parametrize("entry", ["DEFAULT", "IMAGENET1K_V1", "IMAGENET1K_V2"])
def test_an_entry_of_torchvision_s_weights_stands_for_its_name(entry):
    given = torchvision.models.ResNet50_Weights[entry]
    config = TrialConfig(model="resnet50", optimizer=Sgd(lr=0.1), weights=given)
    written = TrialConfig(model="resnet50", optimizer=Sgd(lr=0.1), weights=given.name)
    assert config == written
    assert type(config.weights) is str
    assert canonical_json(config.as_dict()) == canonical_json(written.as_dict())
    assert dataclasses.replace(config, epochs=3).weights == given.name


@pytest.mark.parametrize("model", FAMILIES)
def test_the_entries_of_every_network_of_torchvision_are_known(model):
    entry = torchvision.models.get_model_weights(model).DEFAULT
    assert TrialConfig(model=model, optimizer=Sgd(lr=0.1), weights=entry).weights == entry.name


@pytest.mark.parametrize(
    "entry",
    [
        torchvision.models.ResNet50_Weights.IMAGENET1K_V2,
        torchvision.models.quantization.ResNet18_QuantizedWeights.DEFAULT,
    ],
)
def test_an_entry_of_another_network_s_weights_is_refused(entry):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {"weights": entry})
    assert str(caught.value) == (
        f"TrialConfig: weights {entry} are not those of resnet18; write weights={entry.name!r}"
    )


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("freeze", "freeze must be a list of patterns of parameter names"),
        ("augment", "augment must be one of 'none', "),
        ("sampling", "sampling must be one of 'shuffle', "),
        ("replacement", "replacement must be True or False"),
        ("amp", "amp must be one of 'auto', "),
        ("lr_ratio", "lr_ratio must be a number in (0, 1]"),
        ("head_lr_factor", "head_lr_factor must be a number > 0"),
        ("unfreeze_at", "unfreeze_at must be a mapping"),
        ("weights", "weights must be None, a name or a path"),
        ("model", "model must be a name or an import path"),
        ("mixup_alpha", "mixup_alpha must be a number >= 0"),
        ("schedule", "schedule must be one of Constant, "),
        ("preprocess", "preprocess must be a Preprocess(...)"),
        ("epochs", "epochs must be a whole number >= 1"),
    ],
)
@pytest.mark.parametrize("array", [np.ones(1000), torch.ones(30, 30)], ids=["numpy", "torch"])
def test_an_array_is_a_mistake_like_any_other(field, told, array):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {"batch_size": 1, field: array})
    assert str(caught.value).startswith(f"TrialConfig: {told}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["mean", "std", "interpolation", "resize_size"])
def test_an_array_as_preprocessing_is_a_mistake_like_any_other(name):
    with pytest.raises(ConfigError, match=f"^Preprocess: {name} must be None or "):
        Preprocess(**{name: np.ones(3)})


def test_stages_by_number_are_a_mistake():
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {"lr_ratio": {0: 1.0, "head": 0.5}})
    assert str(caught.value) == (
        "TrialConfig: lr_ratio must be a mapping from names of stages, got [0]"
    )


@pytest.mark.parametrize("factor", [0, -1.0, NAN, "0.5", True, None])
def test_a_wrong_factor_of_a_stage_is_named_and_a_right_one_is_not(factor):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {"lr_ratio": {"head": 2.0, "stem": factor}})
    assert str(caught.value) == (
        f"TrialConfig: lr_ratio must be a number > 0 for each stage, got {{'stem': {factor!r}}}"
    )


CHOICES = {
    "optimizer": "Sgd, Adam, AdamW, RmsProp",
    "schedule": "Constant, Step, MultiStep, Exponential, Polynomial, Cosine, CosineRestarts, "
    "OneCycle, Cyclic, Plateau, OwnSchedule",
    "loss": "CrossEntropy, Focal, BinaryCrossEntropy, Dice, BceDice, Iou, OwnLoss",
}


@pytest.mark.parametrize(("name", "known"), CHOICES.items())
@pytest.mark.parametrize(
    "value", [None, {"lr": 0.1}, RunSettings, Preprocess(), torch.nn.CrossEntropyLoss(), 3]
)
def test_the_parts_of_a_trial_must_be_objects_of_ours(name, known, value):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {name: value})
    assert str(caught.value) == (
        f"TrialConfig: {name} must be one of {known} from tuneapp.config, got {value!r}"
    )


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("optimizer", "AdaW", "AdamW(lr=...)"),
        ("optimizer", "adamw", "AdamW(lr=...)"),
        ("optimizer", "Rmsprop", "RmsProp(lr=...)"),
        ("optimizer", "quantum", None),
        ("schedule", "OneCycleLR", "OneCycle()"),
        ("schedule", "cosine", "Cosine()"),
        ("schedule", "MultiStepLR", "MultiStep(milestones=...)"),
        ("schedule", "zigzag", None),
        ("loss", "CrossEntropyLoss", "CrossEntropy()"),
        ("loss", "FocalLoss", "Focal()"),
    ],
)
def test_a_name_instead_of_an_object_is_met_with_the_nearest_one(name, value, meant):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {name: value})
    hint = f"; did you mean {meant}?" if meant else ""
    assert str(caught.value).endswith(f" from tuneapp.config, got {value!r}{hint}")


@pytest.mark.parametrize(
    ("name", "kind", "call"),
    [
        ("schedule", Cosine, "Cosine()"),
        ("schedule", CosineRestarts, "CosineRestarts(first_epochs=...)"),
        ("optimizer", AdamW, "AdamW(lr=...)"),
        ("loss", CrossEntropy, "CrossEntropy()"),
    ],
)
def test_a_class_instead_of_an_object_is_met_with_its_brackets(name, kind, call):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {name: kind})
    assert str(caught.value).endswith(
        f" from tuneapp.config, got {kind!r}; did you forget the brackets: {call}?"
    )


@pytest.mark.parametrize(
    ("value", "hint"),
    [({"mean": [0.5] * 3}, ""), (None, ""), (Preprocess, "; did you forget the brackets?")],
)
def test_a_preprocessing_must_be_an_object_of_ours(value, hint):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {"preprocess": value})
    assert str(caught.value) == (
        f"TrialConfig: preprocess must be a Preprocess(...), got {value!r}{hint}"
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("helpers.py:build", "helpers:build"),
        ("./helpers.py:build", "helpers:build"),
        ("search_spaces/own_network.py:build", "search_spaces.own_network:build"),
        ("search_spaces/own_network:build", "search_spaces.own_network:build"),
        ("/home/me/helpers.py:build", "helpers:build"),
        ("../helpers.py:build", "helpers:build"),
        ("my-code/helpers.py:build", "helpers:build"),
    ],
)
def test_a_file_instead_of_an_import_path_is_told_what_to_write(written, meant):
    for kind, name in (
        (TrialConfig, "model"),
        (TrialConfig, "augment"),
        (OwnLoss, "loss"),
        (OwnSchedule, "factor"),
    ):
        with pytest.raises(ConfigError) as caught:
            kind(**{**GOOD[kind], name: written})
        assert str(caught.value) == (
            f"{kind.__name__}: {name} {written!r} is a path of a file; write an import path: "
            f"{meant}"
        )


def test_a_single_pattern_is_told_to_be_put_into_a_list():
    with pytest.raises(ConfigError, match=r"got 'layer1\.\*'; write \['layer1\.\*'\]$"):
        TrialConfig(**GOOD[TrialConfig] | {"freeze": "layer1.*"})


def test_several_wrong_parts_are_told_at_once():
    with pytest.raises(ConfigError, match=r"optimizer must .*; schedule must .*; loss must "):
        TrialConfig(model="resnet18", optimizer=1, schedule=2, loss=3)


def test_a_schedule_is_not_an_optimizer():
    with pytest.raises(ConfigError, match=r"optimizer must be one of Sgd, .*got Cosine\(warm"):
        TrialConfig(model="resnet18", optimizer=Cosine())


# --- Freezing, clipping ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"freeze": ["layer1.*"], "freeze_depth": 1},
            "give either freeze, or freeze_depth and unfreeze_at, not both",
        ),
        (
            {"freeze": ["layer1.*"], "unfreeze_at": {2: 0}},
            "give either freeze, or freeze_depth and unfreeze_at, not both",
        ),
        (
            {"lr_ratio": {"head": 1.0}, "head_lr_factor": 2.0},
            "head_lr_factor needs a number as lr_ratio; with a mapping, set the factor of the "
            "head in it",
        ),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "give either clip_norm or clip_value, not both"),
        (
            {"freeze_depth": 4, "epochs": 4, "unfreeze_at": {2: 3, 5: 2, 9: 1}},
            "unfreeze_at epochs 5, 9 are after the last of 4 epochs",
        ),
        (
            {"freeze_depth": 4, "epochs": 2, "unfreeze_at": {5: 2}},
            "unfreeze_at epoch 5 is after the last of 2 epochs",
        ),
    ],
)
def test_what_does_not_go_together_is_told(values, told):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | values)
    assert str(caught.value) == f"TrialConfig: {told}"


@pytest.mark.parametrize(
    "values",
    [
        {"freeze": ["layer1.*"]},
        {"freeze": [], "freeze_depth": 1, "unfreeze_at": {2: 0}},
        {"lr_ratio": {"head": 1.0}, "head_lr_factor": 1},
        {"lr_ratio": 0.5, "head_lr_factor": 2.0},
        {"clip_norm": 1.0},
        {"clip_value": 1.0},
        {"epochs": 4, "unfreeze_at": {2: 3, 4: 2}},
    ],
)
def test_what_goes_together_is_allowed(values):
    config = TrialConfig(**GOOD[TrialConfig] | values)
    assert {name: getattr(config, name) for name in values} == values


def test_wrong_epochs_are_not_blamed_on_the_unfreezing():
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {"epochs": "4", "unfreeze_at": {9: 0}})
    assert str(caught.value) == "TrialConfig: epochs must be a whole number >= 1, got '4'"


@pytest.mark.parametrize(
    ("value", "is_one"),
    [("mine:f", True), ("a.b.c:_f1", True), *((v, False) for v in NOT_A_PATH), ("1a:f", False)],
)
def test_an_import_path_is_a_module_a_colon_and_a_name(value, is_one):
    assert is_reference(value) is is_one


# --- All together ---------------------------------------------------------------------------------


def test_several_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        TrialConfig(
            model="resnet18",
            optimizer=Sgd(lr=0.1),
            epochs=0,
            augment="wild",
            clip_norm=-1,
            image_size=3,
            lr_ratio=2,
        )
    message = str(caught.value)
    assert message.count("must be") == 5
    for field in ("epochs", "augment", "clip_norm", "image_size", "lr_ratio"):
        assert f"{field} must be" in message
    with pytest.raises(ConfigError, match=r"lr must be .*; momentum must be .*; weight_decay must"):
        Sgd(lr=0, momentum=2, weight_decay=-1)
    with pytest.raises(ConfigError, match=r"seed must be .*; metric must be .*; device must be"):
        RunSettings(seed=-1, metric="loss", device="gpu")


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_an_unknown_keyword_is_a_type_error(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        kind(**GOOD[kind], learning_rate=0.1)


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_a_configuration_takes_no_positional_value_and_never_changes(kind):
    with pytest.raises(TypeError, match="positional"):
        kind(*GOOD[kind].values(), 1)
    made = kind(**GOOD[kind])
    assert kind(**GOOD[kind]) == made
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (Sgd(lr=1), torch.optim.SGD, {"nesterov": "nesterov", "weight_decay": "weight_decay"}),
        (Adam(lr=1), torch.optim.Adam, {"weight_decay": "weight_decay"}),
        (AdamW(lr=1), torch.optim.AdamW, {"weight_decay": "weight_decay"}),
        (
            RmsProp(lr=1),
            torch.optim.RMSprop,
            {name: name for name in ("alpha", "eps", "momentum", "centered", "weight_decay")},
        ),
        (Step(every_epochs=1), torch.optim.lr_scheduler.StepLR, {"gamma": "gamma"}),
        (MultiStep(milestones=[1]), torch.optim.lr_scheduler.MultiStepLR, {"gamma": "gamma"}),
        (Polynomial(), torch.optim.lr_scheduler.PolynomialLR, {"power": "power"}),
        (
            CosineRestarts(first_epochs=1),
            torch.optim.lr_scheduler.CosineAnnealingWarmRestarts,
            {"multiplier": "T_mult"},
        ),
        (Cyclic(up_epochs=1), torch.optim.lr_scheduler.CyclicLR, {"mode": "mode"}),
        (
            Plateau(),
            torch.optim.lr_scheduler.ReduceLROnPlateau,
            {name: name for name in ("factor", "threshold", "cooldown")},
        ),
        (
            OneCycle(),
            torch.optim.lr_scheduler.OneCycleLR,
            {name: name for name in ("pct_start", "div_factor", "final_div_factor")},
        ),
        (
            CrossEntropy(),
            torch.nn.CrossEntropyLoss,
            {"label_smoothing": "label_smoothing", "class_weights": "weight"},
        ),
        (Focal(), torchvision.ops.sigmoid_focal_loss, {"gamma": "gamma", "alpha": "alpha"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_defaults_are_those_of_torch(ours, theirs, names):
    defaults = inspect.signature(theirs).parameters
    assert {n: getattr(ours, n) for n in names} == {
        n: defaults[theirs_n].default for n, theirs_n in names.items()
    }


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_default_betas_are_those_of_torch(kind):
    theirs = inspect.signature(getattr(torch.optim, kind.__name__)).parameters["betas"].default
    assert (kind(lr=1).beta1, kind(lr=1).beta2) == theirs


# Every choice, away from its defaults.
OPTIMIZERS = [
    Sgd(lr=0.1, momentum=0.5, nesterov=True, weight_decay=1e-4),
    Adam(lr=1e-3, beta1=0.8),
    AdamW(lr=1e-4, beta2=0.99),
    RmsProp(lr=1e-2, alpha=0.9, eps=0.0316, momentum=0.9, centered=True),
]
SCHEDULES = [
    Constant(warmup_fraction=0.5),
    Step(every_epochs=3),
    MultiStep(milestones=[3, 6], gamma=0.3, warmup_fraction=0.1),
    Exponential(gamma=0.9),
    Polynomial(power=2),
    Cosine(warmup_fraction=0.1),
    CosineRestarts(first_epochs=2, multiplier=2),
    OneCycle(pct_start=0.2),
    Cyclic(up_epochs=2, base_factor=0.2, mode="triangular2"),
    Plateau(monitor="val/accuracy", patience=1, cooldown=2),
    OwnSchedule(factor="mine:halving"),
]
LOSSES = [
    CrossEntropy(label_smoothing=0.1, class_weights=[1.0, 2.0]),
    CrossEntropy(class_weights="balanced"),
    Focal(gamma=1.0, alpha=None),
    BinaryCrossEntropy(pos_weight=3.0),
    Dice(smooth=0.5),
    BceDice(dice_weight=0.3),
    Iou(),
    OwnLoss(loss="mine:loss", options={"gamma": 2, "names": ["a", "b"]}),
]


@pytest.mark.parametrize(
    ("listed", "union"),
    [(OPTIMIZERS, Optimizer), (SCHEDULES, Schedule), (LOSSES, Loss)],
    ids=["optimizers", "schedules", "losses"],
)
def test_these_tests_know_every_choice(listed, union):
    assert {type(choice) for choice in listed} == set(get_args(union))
    assert all(kind in GOOD for kind in get_args(union))
    assert all(kind.__name__ in tuneapp.config.__all__ for kind in get_args(union))


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        *(("optimizer", choice) for choice in OPTIMIZERS),
        *(("schedule", choice) for choice in SCHEDULES),
        *(("loss", choice) for choice in LOSSES),
    ],
    ids=repr,
)
def test_every_choice_has_a_plain_form_that_json_keeps(name, choice):
    config = TrialConfig(**GOOD[TrialConfig] | {name: choice})
    plain = config.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) == {field.name for field in dataclasses.fields(TrialConfig)}
    for part, chosen in (
        ("optimizer", config.optimizer),
        ("schedule", config.schedule),
        ("loss", config.loss),
    ):
        expected = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
        assert plain[part] == {"kind": type(chosen).__name__, **expected}
    # Nothing is lost: the plain form makes the same object again.
    again = dict(plain[name])
    assert getattr(tuneapp.config, again.pop("kind"))(**again) == choice


def test_every_field_of_a_trial_has_a_plain_form_that_json_keeps():
    given = {
        "model": "mine:build",
        "optimizer": Sgd(lr=0.1),
        "freeze_depth": -1,
        "unfreeze_at": {2: 3, 5: 0},
        "frozen_batchnorm": "train",
        "head_lr_factor": 10.0,
        "decay_norms_and_biases": False,
        "dropout": 0.3,
        "stochastic_depth": 0.1,
        "aux_weight": 0.3,
        "mixup_alpha": 0.2,
        "cutmix_alpha": 1.0,
        "preprocess": Preprocess(mean=[0.5] * 3, std=[0.2] * 3, interpolation="bicubic"),
        "clip_value": 0.5,
        "ema_decay": 0.999,
        "channels_last": True,
        "weights": "mine.pth",
        "partial_weights": True,
    }
    plain = TrialConfig(**given).as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["unfreeze_at"] == {"2": 3, "5": 0}  # JSON has no other keys
    assert plain["preprocess"] == {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bicubic",
        "resize_size": None,
    }
    same = set(given) - {"optimizer", "unfreeze_at", "preprocess"}
    assert {name: plain[name] for name in same} == {name: given[name] for name in same}


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ({"freeze": ("layer1.*", "*.bias")}, {"freeze": ["layer1.*", "*.bias"]}),
        (
            {"schedule": MultiStep(milestones=(3, 6))},
            {"schedule": MultiStep(milestones=[3, 6])},
        ),
        (
            {"loss": CrossEntropy(class_weights=(1.0, 2.0))},
            {"loss": CrossEntropy(class_weights=[1.0, 2.0])},
        ),
        (
            {"loss": OwnLoss(loss="mine:loss", options=MappingProxyType({"sizes": (1, 2)}))},
            {"loss": OwnLoss(loss="mine:loss", options={"sizes": [1, 2]})},
        ),
        (
            {"preprocess": Preprocess(mean=(0.5, 0.4, 0.3), std=(1, 1, 1))},
            {"preprocess": Preprocess(mean=[0.5, 0.4, 0.3], std=[1, 1, 1])},
        ),
        ({"unfreeze_at": MappingProxyType({2: 0})}, {"unfreeze_at": {2: 0}}),
        ({"lr_ratio": MappingProxyType({"head": 1.0})}, {"lr_ratio": {"head": 1.0}}),
    ],
    ids=lambda values: "-".join(values),
)
def test_tuples_and_other_mappings_are_written_as_lists_and_dicts_are(written, same):
    one, other = (TrialConfig(**GOOD[TrialConfig] | values) for values in (written, same))
    assert canonical_json(one.as_dict()) == canonical_json(other.as_dict())


@pytest.mark.parametrize("value", [object(), NAN, {1, 2}, len, {1: 2}, [INF]])
def test_options_that_no_file_can_hold_are_a_mistake_of_the_configuration(value):
    with pytest.raises(ConfigError, match=r"^OwnLoss: options must be "):
        OwnLoss(loss="mine:loss", options={"option": value})


def test_the_plain_form_of_a_mapping_of_factors_is_a_dict():
    factors = MappingProxyType({"layer4": 0.1, "head": 1.0})
    config = TrialConfig(model="resnet18", optimizer=Sgd(lr=0.1), lr_ratio=factors)
    assert config.as_dict()["lr_ratio"] == {"layer4": 0.1, "head": 1.0}
    assert json.dumps(config.as_dict())


@pytest.mark.parametrize(
    ("asked", "ceiling", "trained"), [(10, None, 10), (10, 3, 3), (10, 10, 10), (2, 5, 2)]
)
def test_the_ceiling_lowers_the_epochs_and_never_raises_them(asked, ceiling, trained):
    config = TrialConfig(model="resnet18", optimizer=Sgd(lr=0.1), epochs=asked, seed=4)
    under = RunSettings(max_epochs=ceiling).applied_to(config)
    assert under == dataclasses.replace(config, epochs=trained)
    assert config.epochs == asked


@pytest.mark.parametrize(
    ("ceiling", "left"),
    [
        (None, {2: 3, 4: 2, 9: 0}),
        (10, {2: 3, 4: 2, 9: 0}),
        (9, {2: 3, 4: 2, 9: 0}),
        (8, {2: 3, 4: 2}),
        (4, {2: 3, 4: 2}),
        (3, {2: 3}),
        (1, {}),
    ],
)
def test_what_was_to_be_unfrozen_beyond_the_ceiling_does_not_come(ceiling, left):
    config = TrialConfig(
        **GOOD[TrialConfig], freeze_depth=5, unfreeze_at={2: 3, 4: 2, 9: 0}, epochs=10
    )
    under = RunSettings(max_epochs=ceiling).applied_to(config)
    assert under == dataclasses.replace(config, epochs=ceiling or 10, unfreeze_at=left)


@pytest.mark.parametrize(
    ("asked", "given", "seen"), [(None, None, None), (64, None, 64), (64, 32, 32), (None, 32, 32)]
)
def test_the_image_size_of_a_run_replaces_that_of_its_trials(asked, given, seen):
    config = TrialConfig(model="resnet18", optimizer=Sgd(lr=0.1), image_size=asked)
    assert RunSettings(image_size=given).applied_to(config) == dataclasses.replace(
        config, image_size=seen
    )


def test_accuracy_is_to_grow_and_loss_to_shrink():
    assert RunSettings(metric="val/accuracy").mode == "max"
    assert RunSettings(metric="val/loss").mode == "min"


@pytest.mark.parametrize(
    ("value", "than", "if_max", "if_min"),
    [
        (0.5, None, True, True),
        (0.5, 0.5, False, False),  # of equals, the first stays
        (math.nextafter(0.5, 1), 0.5, True, False),
        (math.nextafter(0.5, 0), 0.5, False, True),
        (0.0, -0.0, False, False),
    ],
)
def test_better_is_strictly_better(value, than, if_max, if_min):
    assert is_better(value, than, "max") is if_max
    assert is_better(value, than, "min") is if_min


def test_canonical_json_has_one_spelling_and_no_nan():
    assert canonical_json({"b": [1, 2.5], "a": {"z": None, "y": True}}) == (
        '{"a":{"y":true,"z":null},"b":[1,2.5]}'
    )
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": NAN})


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": "32"}, {"batch_size": 0}, {"batch_size": "32", "accumulation_steps": "2"}],
)
def test_a_wrong_batch_size_is_not_blamed_on_the_accumulation(wrong):
    with pytest.raises(ConfigError, match="batch_size must be a whole number >= 1") as caught:
        TrialConfig(**{**GOOD[TrialConfig], **wrong})
    named = "accumulation_steps must" in str(caught.value)
    assert named == ("accumulation_steps" in wrong)


@pytest.mark.parametrize("wrong", [{"nesterov": "no"}, {"momentum": "x", "nesterov": True}])
def test_wrong_types_in_sgd_are_mistakes_of_the_configuration(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sgd(lr=0.1, **wrong)


@pytest.mark.parametrize("mix", [{"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}])
def test_a_batch_of_one_image_cannot_be_mixed(mix):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig], batch_size=1, **mix)
    assert str(caught.value) == (
        "TrialConfig: mixup_alpha and cutmix_alpha mix a batch: batch_size must be >= 2"
    )
    assert TrialConfig(**GOOD[TrialConfig], batch_size=2, **mix).is_mixed


@pytest.mark.parametrize(("batch_size", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_each_part_of_a_batch_has_two_examples(batch_size, most):
    for steps in range(1, most + 1):
        TrialConfig(**GOOD[TrialConfig], batch_size=batch_size, accumulation_steps=steps)
    with pytest.raises(ConfigError, match=f"half of batch_size .*got {most + 1}$"):
        TrialConfig(**GOOD[TrialConfig], batch_size=batch_size, accumulation_steps=most + 1)
