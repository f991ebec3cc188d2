import dataclasses
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

from tests.states import ONE_STAGE, OWN
from tuneapp import effective as effective_module
from tuneapp import own as own_code
from tuneapp.config import (
    Adam,
    AdamW,
    BceDice,
    BinaryCrossEntropy,
    Constant,
    Cosine,
    CrossEntropy,
    Dice,
    Focal,
    Iou,
    OwnLoss,
    OwnSchedule,
    Preprocess,
    RmsProp,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.effective import config_hash, effective
from tuneapp.errors import ConfigError
from tuneapp.fit import skeleton
from tuneapp.models import apply_freezing, stage_lrs
from tuneapp.space import SearchSpace
from tuneapp.staged import StagedModel

POOLED = f"{__name__}:WithDrop"


class WithDrop(nn.Module):
    """Its second stage has no parameters."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.drop = nn.Conv2d(3, 4, 3), nn.Dropout(0.5)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.drop(self.first(x)).mean((2, 3)))

    def stages(self):
        return {"first": self.first, "drop": self.drop, "head": self.head}


WITH_FIXED = f"{__name__}:WithFixed"


def floor(epoch, config):
    return max(0.5**epoch, 1e-4 / config.optimizer.lr)


class WithFixed(nn.Module):
    """Its BatchNorm has parameters that are never trained, and statistics."""

    def __init__(self, classes):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).requires_grad_(False))
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


def config_of(**changes):
    base = {"model": "resnet18", "optimizer": AdamW(lr=0.01, weight_decay=0.05), "weights": None}
    return TrialConfig(**base | changes)


def are_equal(one, other):
    same = config_hash(one) == config_hash(other)
    assert same == (effective(one) == effective(other))
    return same


def test_the_names_of_the_stages_are_what_these_tests_take_them_for():
    assert [stage.name for stage in skeleton("resnet18").stages] == STAGES


# --- What makes no difference --------------------------------------------------------------------

TWO_FROZEN = {"freeze_depth": 2, "lr_ratio": 0.5}
MAPPED = {name: 0.5**below for below, name in enumerate(reversed(STAGES))}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Only the head trains: how much slower other stages would learn does not matter.
        ({"freeze_depth": 5, "lr_ratio": 0.1}, {"freeze_depth": 5, "lr_ratio": 0.9}),
        ({"freeze_depth": 5}, {"freeze_depth": -1}),
        ({"freeze_depth": 2}, {"freeze_depth": -4}),
        ({"freeze_depth": 0}, {"freeze_depth": -6}),
        (
            {"freeze_depth": 5, "unfreeze_at": {3: 2}},
            {"freeze_depth": -1, "unfreeze_at": {3: -4}},
        ),
        ({"lr_ratio": 0.5}, {"lr_ratio": MAPPED}),
        ({"lr_ratio": 1.0}, {"lr_ratio": dict.fromkeys(STAGES, 1)}),
        (
            {"lr_ratio": 0.5, "freeze_depth": 4},
            {"lr_ratio": {"layer4": 0.5, "head": 1.0}, "freeze_depth": 4},
        ),
        # The head's rate may be reached in two ways.
        (
            {"optimizer": Sgd(lr=0.01), "head_lr_factor": 4.0, "freeze_depth": 5},
            {"optimizer": Sgd(lr=0.04), "freeze_depth": 5},
        ),
        (
            {"optimizer": AdamW(lr=0.01, weight_decay=0.0)},
            {"optimizer": AdamW(lr=0.01, weight_decay=0.0), "decay_norms_and_biases": False},
        ),
        ({"replacement": True}, {"replacement": False}),
        ({"frozen_batchnorm": "eval"}, {"frozen_batchnorm": "train"}),
        ({"freeze_depth": -6}, {"freeze_depth": 0, "frozen_batchnorm": "train"}),
        # Patterns that freeze the same parameters.
        ({"freeze": ["layer1.*"]}, {"freeze": ["layer1.1.*", "layer1.0.*"]}),
        ({"freeze": ["layer1.*", "bn1.*"]}, {"freeze": ["bn1.*", "layer1.?.*", "bn1.weight"]}),
        # A depth, written as patterns.
        ({"freeze": ["conv1.*", "bn1.*"]}, {"freeze_depth": 1}),
        ({"freeze": ["conv1.*", "bn1.*", "layer1.*"], "lr_ratio": 0.5}, TWO_FROZEN),
        (
            {"freeze": ["conv1.*", "bn1.*", "layer1.*"], "frozen_batchnorm": "train"},
            {"freeze_depth": 2, "frozen_batchnorm": "train"},
        ),
        ({"freeze": ["[!f]*"]}, {"freeze_depth": -1}),
        ({"freeze": ["none"]}, {}),
    ],
)
def test_what_trains_in_the_same_way_is_the_same_trial(one, other):
    assert config_of(**one) != config_of(**other)
    assert are_equal(config_of(**one), config_of(**other))


# --- What does -----------------------------------------------------------------------------------

# For each field, another value than the default's; a field that is not here fails the test below.
CHANGES = {
    "model": "resnet34",
    "optimizer": AdamW(lr=0.02, weight_decay=0.05),
    "schedule": Cosine(),
    "loss": Focal(),
    "epochs": 11,
    "batch_size": 33,
    "weights": "DEFAULT",
    "partial_weights": True,
    "freeze_depth": 1,
    "freeze": ["layer1.*"],
    "unfreeze_at": {2: 1},  # with something frozen
    "frozen_batchnorm": "train",  # with something frozen
    "lr_ratio": 0.5,
    "head_lr_factor": 2.0,
    "decay_norms_and_biases": False,
    "dropout": 0.1,
    "stochastic_depth": 0.1,
    "aux_weight": 0.3,  # of a network that has some
    "augment": "strong",
    "sampling": "weighted",
    "replacement": False,  # without a plain shuffle
    "num_samples": 100,  # without a plain shuffle
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "image_size": 64,
    "preprocess": Preprocess(interpolation="nearest"),
    "clip_norm": 1.0,
    "clip_value": 0.5,
    "accumulation_steps": 2,
    "ema_decay": 0.99,
    "amp": "off",
    "channels_last": True,
    "seed": 1,
}
# What another field must be for a change to matter.
WITH = {
    "unfreeze_at": {"freeze_depth": 3},
    "frozen_batchnorm": {"freeze_depth": 3},
    "aux_weight": {"model": "googlenet"},
    "replacement": {"sampling": "balanced"},
    "num_samples": {"sampling": "weighted"},
}


@pytest.mark.parametrize("name", [field.name for field in fields(TrialConfig)])
def test_every_field_can_make_another_trial(name):
    base = config_of(**WITH.get(name, {}))
    changed = dataclasses.replace(base, **{name: CHANGES[name]})
    assert not are_equal(base, changed)
    assert are_equal(base, dataclasses.replace(changed, **{name: getattr(base, name)}))


def test_a_batchnorm_that_the_network_fixed_counts_though_nothing_is_frozen():
    updated = config_of(model=WITH_FIXED, frozen_batchnorm="train")
    assert not are_equal(updated, config_of(model=WITH_FIXED, frozen_batchnorm="eval"))


def test_patterns_are_a_depth_though_the_network_fixed_parameters_above_it():
    depth = config_of(model=WITH_FIXED, freeze_depth=1)
    assert are_equal(depth, config_of(model=WITH_FIXED, freeze=["first.*"]))
    assert not are_equal(depth, config_of(model=WITH_FIXED, freeze=["first.*", "second.0.bias"]))


def test_a_schedule_of_ones_own_may_read_the_learning_rate():
    # The head learns at 0.1 in both, but a factor of `1e-4 / config.optimizer.lr` is another.
    own = {"freeze_depth": 5, "schedule": OwnSchedule(factor=f"{__name__}:floor")}
    one = config_of(**own, optimizer=AdamW(lr=0.1))
    other = config_of(**own, optimizer=AdamW(lr=0.01), head_lr_factor=10.0)
    assert effective(one)["lrs"] == pytest.approx(effective(other)["lrs"])
    assert not are_equal(one, other)


def test_where_patterns_freeze_the_batchnorm_counts_too():
    base = config_of(freeze=["layer1.*"])
    assert not are_equal(base, dataclasses.replace(base, frozen_batchnorm="train"))
    assert not are_equal(base, config_of(freeze=["layer2.*"]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"freeze_depth": 4, "lr_ratio": 0.1}, {"freeze_depth": 4, "lr_ratio": 0.9}),
        # Frozen at first only: its rate matters from the third epoch on.
        (
            {"freeze_depth": 5, "unfreeze_at": {3: 4}, "lr_ratio": 0.1},
            {"freeze_depth": 5, "unfreeze_at": {3: 4}, "lr_ratio": 0.9},
        ),
        ({"lr_ratio": MAPPED}, {"lr_ratio": {**MAPPED, "stem": 0.1}}),
        ({"freeze_depth": 5, "unfreeze_at": {3: 2}}, {"freeze_depth": 5, "unfreeze_at": {4: 2}}),
        ({"freeze_depth": 5, "unfreeze_at": {3: 2}}, {"freeze_depth": 5, "unfreeze_at": {3: 1}}),
        ({"freeze_depth": 5, "unfreeze_at": {3: 2}}, {"freeze_depth": 4, "unfreeze_at": {3: 2}}),
        ({"sampling": "weighted", "num_samples": 9}, {"sampling": "weighted", "num_samples": 10}),
        ({"optimizer": Sgd(lr=0.01)}, {"optimizer": Sgd(lr=0.02), "lr_ratio": 0.5}),
        ({"freeze": ["conv1.*"]}, {"freeze_depth": 1}),
        ({"freeze": ["conv1.*", "bn1.*", "layer2.*"]}, {"freeze_depth": 1}),
        ({"freeze": ["layer1.*"]}, {"freeze_depth": 2}),
        # Both train parts of the same stages.
        ({"freeze": ["conv1.*", "bn1.*", "layer2.0.bn1.bias"]}, {"freeze_depth": 1}),
        ({"freeze": ["layer1.*"]}, {"freeze": ["layer1.*", "layer2.0.bn1.bias"]}),
        ({"freeze": ["conv1.*", "bn1.*"], "frozen_batchnorm": "train"}, {"freeze_depth": 1}),
    ],
)
def test_what_trains_in_another_way_is_another_trial(one, other):
    assert not are_equal(config_of(**one), config_of(**other))


OPTIONS = [
    AdamW(lr=0.01),
    Adam(lr=0.01),
    Sgd(lr=0.01),
    RmsProp(lr=0.01),
    Cosine(),
    Step(every_epochs=3),
    CrossEntropy(),
    Focal(),
    Dice(),
    Iou(),
    BceDice(),
    BinaryCrossEntropy(),
    OwnLoss(loss="x:y"),
    Preprocess(),
]
FIELDS = {"Cosine": "schedule", "Step": "schedule", "Preprocess": "preprocess"}
FIELDS |= dict.fromkeys(("AdamW", "Adam", "Sgd", "RmsProp"), "optimizer")


def another(value):
    """Return other values that may be allowed."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value / 2, value + 0.25, value + 0.05]
    if value is None:
        return [(0.4, 0.4, 0.4), 32, "bicubic", 0.25, "balanced"]
    if isinstance(value, str):
        return ["cos", "linear", "iou", "sum", "u:v", value + "x"]
    return [{"x": 1}]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: type(option).__name__)
def test_every_option_of_a_choice_can_make_another_trial(option):
    where = FIELDS.get(type(option).__name__, "loss")
    base = config_of(**{where: option})
    for field in fields(option):
        tried = 0
        for value in another(getattr(option, field.name)):
            try:
                changed = dataclasses.replace(option, **{field.name: value})
                config = dataclasses.replace(base, **{where: changed})
            except (ValueError, TypeError):
                continue
            if value == getattr(option, field.name):
                continue
            tried += 1
            assert not are_equal(base, config), field.name
        assert tried, f"no other value of {field.name} was found"


def test_all_configurations_of_a_grid_are_told_apart_but_those_that_train_alike():
    # Told apart in another way: by the rates of the stages that train, epoch by epoch.
    grid = [
        config_of(
            epochs=4, freeze_depth=depth, unfreeze_at=plan, lr_ratio=ratio, frozen_batchnorm=norm
        )
        for depth in (-1, 4, 5, 0)
        for plan in ({}, {3: 4}, {3: -2}, {3: 0})
        for ratio in (0.5, 1.0)
        for norm in ("eval", "train")
        if depth == 5 or depth == -1 or not plan
    ]

    def trains(config):
        seen = []
        for epoch in range(1, 5):
            depth = config.freeze_depth
            for at, after in config.unfreeze_at.items():
                depth = after if at <= epoch else depth
            trained = STAGES[depth % 6 :]
            rates = stage_lrs(config, STAGES)
            seen.append(tuple((name, rates[name]) for name in trained))
        frozen_first = len(seen[0]) < 6
        return (tuple(seen), config.frozen_batchnorm if frozen_first else None)

    by_hash, by_training = {}, {}
    for number, config in enumerate(grid):
        by_hash.setdefault(config_hash(config), set()).add(number)
        by_training.setdefault(trains(config), set()).add(number)
    assert sorted(map(sorted, by_hash.values())) == sorted(map(sorted, by_training.values()))
    assert 1 < len(by_hash) < len(grid)


# --- Networks of one's own -----------------------------------------------------------------------


def own(**changes):
    return config_of(**{"model": OWN, **changes})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"freeze_depth": 2}, {"freeze_depth": -1}, True),
        ({"freeze_depth": 2, "lr_ratio": 0.1}, {"freeze_depth": 2, "lr_ratio": 0.9}, True),
        ({"lr_ratio": 0.5}, {"lr_ratio": {"stem": 0.25, "body": 0.5, "head": 1}}, True),
        ({"lr_ratio": 0.5}, {"lr_ratio": {"stem": 0.5, "body": 0.5, "head": 1}}, False),
        ({"freeze_depth": 1}, {"freeze_depth": 2}, False),
        ({}, {"model": ONE_STAGE}, False),
        ({"model": ONE_STAGE, "lr_ratio": 0.5}, {"model": ONE_STAGE}, True),
    ],
)
def test_a_custom_network_has_its_own_stages(one, other, same):
    assert are_equal(own(**one), own(**other)) == same


@pytest.mark.parametrize("model", ["resnet18", OWN])
@pytest.mark.parametrize(
    "changes",
    [{"freeze_depth": -1}, {"freeze_depth": 2}, {"freeze_depth": 2, "frozen_batchnorm": "train"}],
)
def test_the_network_that_all_share_is_left_as_it_was(model, changes):
    shared = skeleton(model)
    shared.freeze(0)
    wanted = [p.requires_grad for p in shared.parameters()]
    assert all(wanted)
    config_hash(config_of(model=model, **changes))
    assert skeleton(model) is shared
    assert [p.requires_grad for p in shared.parameters()] == wanted
    assert shared.freeze_depth == 0
    assert all(stage.trained_parameters() for stage in shared.stages)


def test_patterns_are_a_depth_only_if_every_layer_is_in_the_same_mode():
    # A stage without parameters after the frozen ones counts as frozen by name, not by depth.
    by_name = effective(config_of(model=POOLED, freeze=["first.*"]))
    assert (by_name["freeze_depth"], by_name["freeze"]) == (2, [])
    for depth, same in ((1, False), (2, True)):
        by_depth = config_of(model=POOLED, freeze_depth=depth)
        assert are_equal(by_depth, config_of(model=POOLED, freeze=["first.*"])) == same
        net, wanted = StagedModel(WithDrop(3)), StagedModel(WithDrop(3))
        apply_freezing(net.train(), by_depth)
        apply_freezing(wanted.train(), config_of(model=POOLED, freeze=["first.*"]))
        modes = [[m.training for m in each.modules()] for each in (net, wanted)]
        assert (modes[0] == modes[1]) == same


@pytest.mark.parametrize("pattern", ["layer1.*", "*.bn?.*", "*"])
def test_patterns_leave_nothing_frozen_either(pattern):
    shared = skeleton("resnet18")
    try:
        config_hash(config_of(freeze=[pattern]))
    finally:
        assert all(p.requires_grad for p in shared.parameters())
    plain = config_hash(config_of())
    config_hash(config_of(freeze=[pattern]))
    assert config_hash(config_of()) == plain


def test_the_state_of_torchs_generator_is_left_alone():
    effective_module.skeleton.__globals__["_own_skeleton"].cache_clear()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    config_hash(own())
    config_hash(config_of(model="alexnet"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_hash_is_sixteen_digits_and_the_same_in_every_process():
    # Written down once: a resumed run compares with what an earlier process wrote.
    found = config_hash(config_of(schedule=Constant()))
    assert len(found) == 16
    assert set(found) <= set("0123456789abcdef")
    assert found == config_hash(config_of(schedule=Constant()))


def test_learning_rates_of_what_trains_are_those_that_the_optimizer_gets():
    config = config_of(freeze_depth=3, lr_ratio=0.5, head_lr_factor=3.0)
    expected = {"layer3": 0.01 * 0.25, "layer4": 0.01 * 0.5, "head": 0.03}
    assert effective(config)["lrs"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [({"clip_norm": 1}, {"clip_norm": 1.0}), ({"dropout": 0}, {"dropout": 0.0})],
)
def test_numbers_that_are_equal_make_no_other_trial(one, other):
    # A space in which a constant is only spelt in another way would lose all of its trials.
    assert config_of(**one) == config_of(**other)
    assert are_equal(config_of(**one), config_of(**other))


def test_a_mapping_of_rates_that_lacks_a_stage_is_an_error_on_purpose():
    with pytest.raises(ConfigError):
        config_hash(config_of(lr_ratio={"head": 1.0}))


# --- Code of the space's own file ----------------------------------------------------------------

CODE = """
from torch import nn
from torch.nn.functional import cross_entropy

SCALE = 1.0


def build(classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9))


def loss(logits, labels):
    return SCALE * cross_entropy(logits, labels)


def factor(epoch, config):
    return 0.5


def augment(image_size):
    return nn.Identity()


def search_space(trial):
    return trial.suggest_float("lr", 0.1, 0.7)
"""
WITH_CODE = {
    "build": {"model": "a_space:build"},
    "loss": {"loss": OwnLoss(loss="a_space:loss")},
    "factor": {"schedule": OwnSchedule(factor="a_space:factor")},
    "augment": {"augment": "a_space:augment"},
}


@pytest.fixture
def hash_in(monkeypatch, tmp_path):
    """Return the hash that a configuration has while a text is that of the space `a_space`."""
    monkeypatch.setattr(own_code, "_spaces", {})
    monkeypatch.setattr(own_code, "_texts", {})
    monkeypatch.setattr("sys.path", [*sys.path])

    def hash_in(text, **changes):
        SearchSpace(text, tmp_path / "a_space.py")
        return config_hash(config_of(**changes))

    return hash_in


@pytest.mark.parametrize(
    ("name", "was", "becomes"),
    [
        ("build", "Conv2d(3, 4, 3)", "Conv2d(3, 4, 5)"),
        ("loss", "cross_entropy(logits", "cross_entropy(2 * logits"),
        ("loss", "SCALE = 1.0", "SCALE = 2.0"),
        ("factor", "return 0.5", "return 0.25"),
        ("augment", "Identity()", "Identity(1)"),
    ],
)
def test_changed_code_of_the_space_makes_another_trial_of_those_that_use_it(
    hash_in, name, was, becomes
):
    assert was in CODE
    for used, changes in WITH_CODE.items():
        same = hash_in(CODE, **changes) == hash_in(CODE.replace(was, becomes), **changes)
        assert same == (used != name), used


@pytest.mark.parametrize("changes", WITH_CODE.values(), ids=WITH_CODE)
def test_a_changed_range_beside_own_code_makes_no_other_trial(hash_in, changes):
    assert hash_in(CODE, **changes) == hash_in(CODE.replace("0.1, 0.7", "0.2, 0.7"), **changes)


def test_without_code_of_the_space_a_hash_is_that_of_the_effective_configuration_alone(hash_in):
    # Written down once, before code counted: older runs must recognise their trials.
    assert hash_in(CODE, schedule=Constant()) == "4b3de1f1a3634b59"
    assert (
        hash_in(CODE, loss=OwnLoss(loss="torch.nn.functional:cross_entropy")) == "659d1e03f83d510b"
    )
