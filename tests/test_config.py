import dataclasses
import inspect
import json
import math
from types import MappingProxyType

import pytest
import torch

from tuneapp.config import (
    Adam,
    AdamW,
    Constant,
    Cosine,
    CrossEntropy,
    OneCycle,
    RunSettings,
    Sgd,
    Step,
    TrialConfig,
    canonical_json,
    is_better,
)
from tuneapp.errors import ConfigError

NAN, INF = float("nan"), float("inf")
ABOVE_ZERO, AT_LEAST_ZERO = "a number > 0", "a number >= 0"
FRACTION = "a number in [0, 1)"
SHARE = "a share of the training in [0, 1)"
GOOD = {
    Sgd: {"lr": 0.1},
    Adam: {"lr": 0.1},
    AdamW: {"lr": 0.1},
    Constant: {},
    Step: {"every_epochs": 2},
    Cosine: {},
    OneCycle: {},
    CrossEntropy: {},
    TrialConfig: {"model": "resnet18", "optimizer": Sgd(lr=0.1)},
    RunSettings: {},
}
NOT_ABOVE_ZERO = [0, -1e-9, NAN, INF, -INF, True, "0.1", None]
NOT_AT_LEAST_ZERO = [-1e-9, NAN, INF, False, "0", None]
NOT_A_FRACTION = [-0.1, 1, 1.5, NAN, False, "0", None]

BAD = [
    *[
        (kind, name, value, allowed)
        for kind, name, allowed, values in [
            (Sgd, "lr", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (Sgd, "weight_decay", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (Sgd, "momentum", FRACTION, [-0.1, 1, NAN]),
            (Adam, "lr", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (Adam, "beta1", FRACTION, NOT_A_FRACTION),
            (Adam, "beta2", FRACTION, NOT_A_FRACTION),
            (Adam, "weight_decay", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (AdamW, "lr", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (AdamW, "beta1", FRACTION, NOT_A_FRACTION),
            (AdamW, "weight_decay", AT_LEAST_ZERO, NOT_AT_LEAST_ZERO),
            (Constant, "warmup_fraction", SHARE, NOT_A_FRACTION),
            (Cosine, "warmup_fraction", SHARE, NOT_A_FRACTION),
            (Step, "warmup_fraction", SHARE, NOT_A_FRACTION),
            (Step, "every_epochs", "a whole number >= 1", [0, -1, 1.0, True, "1", None]),
            (Step, "gamma", "in (0, 1]", [0, -0.1, 1.1, NAN, True, "1", None]),
            (OneCycle, "pct_start", "a number in (0, 1)", [0, 1, -0.1, NAN, "0.5", None]),
            (OneCycle, "div_factor", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (OneCycle, "final_div_factor", ABOVE_ZERO, NOT_ABOVE_ZERO),
            (CrossEntropy, "label_smoothing", FRACTION, NOT_A_FRACTION),
            (TrialConfig, "epochs", "a whole number >= 1", [0, -1, 2.0, True, "2", None]),
            (TrialConfig, "batch_size", "a whole number >= 1", [0, -1, 2.0, True]),
            (TrialConfig, "freeze_depth", "a whole number", [1.0, True, "1", None]),
            (TrialConfig, "seed", "a whole number >= 0", [-1, 0.0, False, "0", None]),
            (TrialConfig, "augment", "one of 'none', 'light', 'standard'", ["lite", None, 1]),
            (TrialConfig, "amp", "one of 'auto', 'bf16', 'fp16', 'off'", ["on", None, True]),
            (TrialConfig, "image_size", "None or a whole number >= 16", [15, 0, 32.0, "32"]),
            (TrialConfig, "weights", "None, a name or a path", ["", 1, False]),
            (TrialConfig, "clip_norm", "None or a number > 0", [0, -1, NAN, INF, True, "1"]),
            (
                TrialConfig,
                "accumulation_steps",
                "a whole number from 1 to batch_size",
                [0, -1, 33, 1.5, "2", True],
            ),
            (
                TrialConfig,
                "lr_ratio",
                "in (0, 1], or a mapping stage -> factor",
                [0, -0.5, 1.1, NAN, INF, True, "0.5", None],
            ),
            (RunSettings, "seed", "a whole number >= 0", [-1, 0.5, True, None]),
            (RunSettings, "metric", "one of 'val/accuracy', 'val/loss'", ["accuracy", None]),
            (RunSettings, "device", "one of 'auto', 'cpu', 'cuda'", ["gpu", "cuda:0", None]),
            (RunSettings, "max_epochs", "a whole number >= 1", [0, -1, 1.5, True]),
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
    said = name.removeprefix("max_")  # the flag is --epochs
    begin, _, mistakes = str(caught.value).partition(": ")
    assert begin == kind.__name__
    assert f"{said} must be {allowed}, got {value!r}" in mistakes.split("; ")


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
        (OneCycle, "pct_start", 1e-9),
        (TrialConfig, "epochs", 1),
        (TrialConfig, "freeze_depth", 0),
        (TrialConfig, "image_size", 16),
        (TrialConfig, "weights", None),
        (TrialConfig, "clip_norm", 1e-9),
        (TrialConfig, "accumulation_steps", 32),
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


@pytest.mark.parametrize("factor", [0, -1.0, NAN, "0.5", True, None])
def test_a_wrong_factor_of_a_stage_is_named_and_a_right_one_is_not(factor):
    with pytest.raises(ConfigError) as caught:
        TrialConfig(**GOOD[TrialConfig] | {"lr_ratio": {"head": 2.0, "stem": factor}})
    assert str(caught.value) == (
        f"TrialConfig: lr_ratio must be a number > 0 for each stage, got {{'stem': {factor!r}}}"
    )


@pytest.mark.parametrize("name", ["optimizer", "schedule", "loss"])
@pytest.mark.parametrize("value", ["adamw", None, {"lr": 0.1}, AdamW])
def test_the_parts_of_a_trial_must_be_objects_of_ours(name, value):
    with pytest.raises(ConfigError, match="optimizer, schedule and loss must be objects from"):
        TrialConfig(**GOOD[TrialConfig] | {name: value})


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
    for field in dataclasses.fields(made):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (Sgd(lr=1), torch.optim.SGD, {"nesterov": "nesterov", "weight_decay": "weight_decay"}),
        (Adam(lr=1), torch.optim.Adam, {"weight_decay": "weight_decay"}),
        (AdamW(lr=1), torch.optim.AdamW, {"weight_decay": "weight_decay"}),
        (Step(every_epochs=1), torch.optim.lr_scheduler.StepLR, {"gamma": "gamma"}),
        (
            OneCycle(),
            torch.optim.lr_scheduler.OneCycleLR,
            {name: name for name in ("pct_start", "div_factor", "final_div_factor")},
        ),
        (CrossEntropy(), torch.nn.CrossEntropyLoss, {"label_smoothing": "label_smoothing"}),
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


@pytest.mark.parametrize(
    "schedule",
    [Constant(), Step(every_epochs=3), Cosine(warmup_fraction=0.1), OneCycle(pct_start=0.2)],
    ids=lambda schedule: type(schedule).__name__,
)
@pytest.mark.parametrize(
    "optimizer",
    [Sgd(lr=0.1, momentum=0.5), Adam(lr=1e-3, beta1=0.8), AdamW(lr=1e-4)],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_every_optimizer_and_schedule_has_a_plain_form_that_json_keeps(optimizer, schedule):
    config = TrialConfig(model="resnet18", optimizer=optimizer, schedule=schedule)
    plain = config.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) == {field.name for field in dataclasses.fields(TrialConfig)}
    for name, part in (("optimizer", optimizer), ("schedule", schedule), ("loss", config.loss)):
        expected = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        assert plain[name] == {"kind": type(part).__name__, **expected}


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
