"""Learning rates as sequences of numbers: by hand, or by a formula of plain arithmetic."""

import copy
import io
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tuneapp.config import (
    Adam,
    AdamW,
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    MultiStep,
    OneCycle,
    Optimizer,
    OwnSchedule,
    Plateau,
    Polynomial,
    RmsProp,
    Schedule,
    Sgd,
    Step,
    TrialConfig,
)
from tuneapp.errors import ConfigError
from tuneapp.optim import build_optimizer
from tuneapp.schedules import Schedule as Running
from tuneapp.schedules import check_schedule, check_steps, idle_choices, warmup_steps
from tuneapp.staged import StagedModel

Row = Mapping[str, float]

RATIO = 0.2
PEAKS = (RATIO, 1.0)  # of the two trained stages


def falling(epoch: int, config: TrialConfig) -> float:
    return 1 / (1 + epoch)


def table(epoch: int, config: TrialConfig) -> float:
    """Knows the epochs of the training, and no other."""
    return [1.0, 0.5, 0.0][epoch]


def by_its_length(epoch: int, config: TrialConfig) -> float:
    return config.epochs - epoch


def config_of(**values: Any) -> TrialConfig:
    return TrialConfig(
        **{
            "model": "resnet18",
            "optimizer": Sgd(lr=1.0),
            "freeze_depth": 1,
            "lr_ratio": RATIO,
            **values,
        }
    )


def begin(config: TrialConfig, steps_per_epoch: int) -> tuple[torch.optim.Optimizer, Running]:
    """The schedule over two trained stages, on top of a frozen one."""
    names = ("stem", "body", "head")
    model = StagedModel(nn.Sequential(OrderedDict((name, nn.Linear(2, 2)) for name in names)))
    model.freeze(config.freeze_depth)
    optimizer = build_optimizer(model, config)
    return optimizer, Running(optimizer, config, steps_per_epoch)


def go_on(
    optimizer: torch.optim.Optimizer,
    schedule: Running,
    steps: range,
    steps_per_epoch: int,
    rows: Sequence[Row],
) -> Iterator[list[float]]:
    """Yield the rates of all groups at each of these optimizer steps of a training."""
    for step in steps:
        yield [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        schedule.step()
        if (step + 1) % steps_per_epoch == 0:
            schedule.end_epoch(rows[step // steps_per_epoch])


def rates(
    config: TrialConfig, steps_per_epoch: int, rows: Sequence[Row] | None = None
) -> list[list[float]]:
    """Return the rates of all groups at each optimizer step."""
    steps = range(config.epochs * steps_per_epoch)
    rows = [{}] * config.epochs if rows is None else rows
    return list(go_on(*begin(config, steps_per_epoch), steps, steps_per_epoch, rows))


def own(name: str, **values: float) -> OwnSchedule:
    return OwnSchedule(factor=f"{__name__}:{name}", **values)


# --- Every number by hand -------------------------------------------------------------------------

S = math.sqrt(0.5)  # the cosine of an eighth of a turn

# What each kind makes of a few steps: shares of the learning rate.
BY_HAND: list[tuple[Schedule, int, int, list[float]]] = [
    (Constant(), 2, 3, [1] * 6),
    (Constant(warmup_fraction=0.5), 2, 2, [0.01, 0.505, 1, 1]),
    (Step(every_epochs=1), 3, 2, [1, 1, 0.1, 0.1, 0.01, 0.01]),
    (Step(every_epochs=2, gamma=0.5), 5, 1, [1, 1, 0.5, 0.5, 0.25]),
    # The steps of a warm-up come before the first epoch that counts.
    (
        Step(every_epochs=1, gamma=0.5, warmup_fraction=0.25),
        4,
        2,
        [0.01, 0.505, 1, 1, 0.5, 0.5, 0.25, 0.25],
    ),
    (
        MultiStep(milestones=[1, 3], gamma=0.5),
        5,
        2,
        [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25],
    ),
    (
        MultiStep(milestones=(1, 2), gamma=0.1, warmup_fraction=0.3),
        5,
        2,
        [0.01, 0.34, 0.67, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01],
    ),
    (MultiStep(milestones=[7]), 3, 1, [1, 1, 1]),
    (Exponential(gamma=0.25), 3, 2, [1, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
    (
        Exponential(gamma=0.25, warmup_fraction=0.5),
        3,
        2,
        [0.01, 0.34, 0.67, 1, 0.5, 0.25],
    ),
    (Exponential(gamma=1), 2, 2, [1, 1, 1, 1]),
    (Polynomial(), 2, 2, [1, 0.75, 0.5, 0.25]),
    (Polynomial(power=2), 2, 2, [1, 0.5625, 0.25, 0.0625]),
    (Polynomial(power=0.5), 4, 1, [1, math.sqrt(0.75), S, 0.5]),
    (
        Polynomial(power=2, warmup_fraction=1 / 3),
        3,
        2,
        [0.01, 0.505, 1, 0.5625, 0.25, 0.0625],
    ),
    (Cosine(), 2, 2, [1, (1 + S) / 2, 0.5, (1 - S) / 2]),
    (
        Cosine(warmup_fraction=1 / 3),
        3,
        2,
        [0.01, 0.505, 1, (1 + S) / 2, 0.5, (1 - S) / 2],
    ),
    (CosineRestarts(first_epochs=1), 3, 2, [1, 0.5, 1, 0.5, 1, 0.5]),
    (
        CosineRestarts(first_epochs=1, multiplier=2),
        7,
        2,
        [
            *(1, 0.5),
            *(1, (1 + S) / 2, 0.5, (1 - S) / 2),
            *(1, (1 + math.cos(math.pi / 8)) / 2, (1 + S) / 2, (1 + math.cos(3 * math.pi / 8)) / 2),
            *(0.5, (1 - math.cos(3 * math.pi / 8)) / 2, (1 - S) / 2),
            (1 - math.cos(math.pi / 8)) / 2,
        ],
    ),
    (
        CosineRestarts(first_epochs=2, warmup_fraction=0.2),
        5,
        2,
        [0.01, 0.505, 1, (1 + S) / 2, 0.5, (1 - S) / 2, 1, (1 + S) / 2, 0.5, (1 - S) / 2],
    ),
    # 3 steps up from 1 / 4, and 3 down to 1 / 4 / 10, half a cosine each.
    (
        OneCycle(pct_start=0.5, div_factor=4, final_div_factor=10),
        3,
        2,
        [0.25, 0.625, 1, 0.025 + 0.975 * 0.75, 0.025 + 0.975 * 0.25, 0.025],
    ),
    (Cyclic(up_epochs=1, base_factor=0.2), 5, 2, [0.2, 0.6, 1, 0.6, 0.2, 0.6, 1, 0.6, 0.2, 0.6]),
    (
        Cyclic(up_epochs=1, base_factor=0.2, mode="triangular2"),
        5,
        2,
        [0.2, 0.6, 1, 0.6, 0.2, 0.4, 0.6, 0.4, 0.2, 0.3],
    ),
    (
        Cyclic(up_epochs=2, base_factor=0.5),
        8,
        1,
        [0.5, 0.75, 1, 0.75, 0.5, 0.75, 1, 0.75],
    ),
    # The warm-up ends where the first cycle begins.
    (
        Cyclic(up_epochs=1, base_factor=0.2, warmup_fraction=0.25),
        4,
        2,
        [0.002, 0.101, 0.2, 0.6, 1, 0.6, 0.2, 0.6],
    ),
    (
        Cyclic(up_epochs=1, base_factor=0.2, mode="triangular2", warmup_fraction=0.2),
        5,
        2,
        [0.002, 0.101, 0.2, 0.6, 1, 0.6, 0.2, 0.4, 0.6, 0.4],
    ),
    (own("falling"), 3, 2, [1, 1, 1 / 2, 1 / 2, 1 / 3, 1 / 3]),
    (own("table"), 3, 1, [1, 0.5, 0]),
    (own("by_its_length"), 3, 1, [3, 2, 1]),
    (
        own("falling", warmup_fraction=0.3),
        5,
        2,
        [0.01, 0.34, 0.67, 1, 1, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 4],
    ),
]


def name_of(value: object) -> str | None:
    return None if isinstance(value, int | list) else repr(value)


@pytest.mark.parametrize(("schedule", "epochs", "steps_per_epoch", "wanted"), BY_HAND, ids=name_of)
def test_every_schedule_is_these_numbers(
    schedule: Schedule, epochs: int, steps_per_epoch: int, wanted: list[float]
) -> None:
    seen = rates(config_of(schedule=schedule, epochs=epochs), steps_per_epoch)
    assert len(wanted) == epochs * steps_per_epoch
    for column, peak in zip(zip(*seen, strict=True), PEAKS, strict=True):
        assert column == pytest.approx([peak * share for share in wanted], rel=1e-9, abs=1e-15)


# What was measured at the end of each epoch, and the share that its steps were taken with.
PLATEAUS: list[tuple[Plateau, list[float], list[float]]] = [
    # Two epochs without improvement are borne; the third one costs.
    (Plateau(), [9, 9, 9, 9, 9, 9, 9, 9], [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01]),
    (Plateau(), [9, 8, 8, 8, 7, 7, 7, 7, 7], [1, 1, 1, 1, 1, 1, 1, 1, 0.1]),
    (Plateau(factor=0.5, patience=0), [9, 9, 8, 9, 8, 7], [1, 1, 0.5, 0.5, 0.25, 0.125]),
    # After a reduction two epochs do not count, whether they improve or not.
    (
        Plateau(factor=0.5, patience=0, cooldown=2),
        [9, 9, 9, 9, 9, 9, 9, 9, 9],
        [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125],
    ),
    (
        Plateau(factor=0.5, patience=1, cooldown=1),
        [9, 9, 9, 9, 9, 9, 9],
        [1, 1, 1, 0.5, 0.5, 0.5, 0.25],
    ),
    # An improvement by more than a tenth is one, a smaller one is none.
    (
        Plateau(factor=0.5, patience=0, threshold=0.1),
        [100, 89, 81, 80, 71, 70],
        [1, 1, 1, 0.5, 0.5, 0.5],
    ),
    (
        Plateau(factor=0.5, patience=0, monitor="val/accuracy"),
        [0.5, 0.6, 0.6, 0.4, 0.7, 0.7],
        [1, 1, 1, 0.5, 0.25, 0.25],
    ),
    (
        Plateau(factor=0.5, patience=1, monitor="val/accuracy", threshold=0.5),
        [0.2, 0.25, 0.31, 0.4, 0.46, 0.47],
        [1, 1, 1, 1, 1, 0.5],
    ),
    # A network that never gets one right does not improve.
    (Plateau(factor=0.5, patience=0, monitor="val/accuracy"), [0, 0, 0], [1, 1, 0.5]),
    # No stage falls below its share of its own rate.
    (
        Plateau(factor=0.5, patience=0, min_factor=0.3),
        [9, 9, 9, 9, 9],
        [1, 1, 0.5, 0.3, 0.3],
    ),
    (
        Plateau(factor=0.1, patience=0, min_factor=0.25, monitor="val/accuracy"),
        [0.5, 0.5, 0.5, 0.5],
        [1, 1, 0.25, 0.25],
    ),
]


def measured(plateau: Plateau, values: Sequence[float]) -> list[Row]:
    """Rows in which the other metric says the contrary."""
    other = "val/loss" if plateau.monitor == "val/accuracy" else "val/accuracy"
    return [
        {plateau.monitor: float(value), other: float(-1) ** epoch * 2**epoch}
        for epoch, value in enumerate(values)
    ]


@pytest.mark.parametrize("steps_per_epoch", [1, 3])
@pytest.mark.parametrize(("plateau", "values", "wanted"), PLATEAUS, ids=name_of)
def test_a_plateau_of_what_it_monitors_lowers_all_rates_for_the_next_epochs(
    plateau: Plateau, values: list[float], wanted: list[float], steps_per_epoch: int
) -> None:
    config = config_of(schedule=plateau, epochs=len(values))
    seen = rates(config, steps_per_epoch, measured(plateau, values))
    spread = [share for share in wanted for _ in range(steps_per_epoch)]
    for column, peak in zip(zip(*seen, strict=True), PEAKS, strict=True):
        assert column == pytest.approx([peak * share for share in spread], rel=1e-12)


# 10 epochs of 2 steps: the warm-up takes 3 of them, 4 (two epochs) or 5.
@pytest.mark.parametrize(
    ("fraction", "rise", "wanted"),
    [
        # The second epoch is the first one that counts, and the best.
        (0.15, [0.01, 0.34, 0.67], [1, *(2.0**-n for n in range(8))]),
        # The second epoch ends with the warm-up, which is not after it.
        (0.2, [0.01, 0.2575, 0.505, 0.7525], [1, 1, 0.5, 0.25, 0.125, 0.125, 0.125, 0.0625]),
        (0.25, [0.01, 0.208, 0.406, 0.604, 0.802], [1, 1, 0.5, 0.25, 0.125, 0.125, 0.125, 0.0625]),
    ],
)
def test_a_plateau_looks_at_the_epochs_that_end_after_its_warm_up(
    fraction: float, rise: list[float], wanted: list[float]
) -> None:
    plateau = Plateau(factor=0.5, patience=0, warmup_fraction=fraction)
    # What is best of all comes during the warm-up.
    values = [1, 2, 8, 8, 8, 8, 7, 6, 6, 6]
    seen = [
        head
        for _, head in rates(config_of(schedule=plateau, epochs=10), 2, measured(plateau, values))
    ]
    spread = [share for share in wanted for _ in range(2)]
    assert seen == pytest.approx([*rise, *spread[-(20 - len(rise)) :]], rel=1e-9)


def test_a_plateau_lowers_the_smallest_rates_as_well() -> None:
    plateau = Plateau(factor=0.1, patience=0)
    config = config_of(schedule=plateau, epochs=8, optimizer=AdamW(lr=1e-5), lr_ratio=1e-3)
    seen = rates(config, 1, measured(plateau, [9] * 8))
    wanted = [[1e-8 * 0.1**n, 1e-5 * 0.1**n] for n in (0, 0, 1, 2, 3, 4, 5, 6)]
    assert [rate for pair in seen for rate in pair] == pytest.approx(
        [rate for pair in wanted for rate in pair], rel=1e-9
    )


# --- Closed formulas ------------------------------------------------------------------------------


def one_cycle_share(schedule: OneCycle, step: int, total: int) -> float:
    top = max(schedule.pct_start * total - 1, 1)
    start = 1 / schedule.div_factor
    end = start / schedule.final_div_factor
    rises = step <= top
    low = start if rises else end
    way = step / top if rises else (total - 1 - step) / (total - 1 - top)
    return low + (1 - low) * (1 - math.cos(math.pi * way)) / 2


def cosine_restarts_share(schedule: CosineRestarts, epochs: float) -> float:
    length = schedule.first_epochs
    while epochs >= length:
        epochs -= length
        length *= schedule.multiplier
    return math.cos(math.pi * epochs / length / 2) ** 2


def cyclic_share(schedule: Cyclic, epochs: float) -> float:
    cycle, within = divmod(epochs, 2 * schedule.up_epochs)
    height = 1 - abs(within / schedule.up_epochs - 1)
    height /= 2**cycle if schedule.mode == "triangular2" else 1
    return schedule.base_factor + (1 - schedule.base_factor) * height


# The share of the rate so many epochs after the warm-up, with `rest` epochs after it in all.
MAIN_SHARE: dict[type[Any], Callable[[Any, float, float], float]] = {
    Constant: lambda s, epochs, rest: 1.0,
    Step: lambda s, epochs, rest: s.gamma ** math.floor(epochs / s.every_epochs),
    MultiStep: lambda s, epochs, rest: s.gamma ** len([m for m in s.milestones if m <= epochs]),
    Exponential: lambda s, epochs, rest: s.gamma**epochs,
    Polynomial: lambda s, epochs, rest: (1 - epochs / rest) ** s.power,
    # (1 + cos x) / 2 is the square of the cosine of half the angle.
    Cosine: lambda s, epochs, rest: math.cos(math.pi * epochs / rest / 2) ** 2,
    CosineRestarts: lambda s, epochs, rest: cosine_restarts_share(s, epochs),
    Cyclic: lambda s, epochs, rest: cyclic_share(s, epochs),
    OwnSchedule: lambda s, epochs, rest: 1 / (1 + math.floor(epochs)),
}


def shares(schedule: Schedule, warmup: int, epochs: int, steps_per_epoch: int) -> list[float]:
    """Return what the documentation of each kind says of every step."""
    total = epochs * steps_per_epoch
    if isinstance(schedule, OneCycle):
        return [one_cycle_share(schedule, step, total) for step in range(total)]
    rest = total - warmup
    main_share, n = MAIN_SHARE[type(schedule)], steps_per_epoch
    main = [main_share(schedule, step / n, rest / n) for step in range(rest)]
    rise = [main[0] * (0.01 + 0.99 * step / warmup) for step in range(warmup)]
    return rise + main


SHAPES = [(3, 4), (2, 5), (1, 7), (6, 1), (10, 13)]
# Share of all steps -> steps of the warm-up in each of these trainings.
WARMUPS = {0.0: (0, 0, 0, 0, 0), 0.1: (2, 1, 1, 1, 13), 0.3: (4, 3, 3, 2, 39)}
KINDS: list[Schedule] = [
    Constant(),
    Step(every_epochs=2, gamma=0.3),
    Step(every_epochs=1, gamma=0.5),
    MultiStep(milestones=[1, 2, 5], gamma=0.4),
    Exponential(gamma=0.7),
    Polynomial(),
    Polynomial(power=0.9),
    Polynomial(power=3),
    Cosine(),
    CosineRestarts(first_epochs=1),
    CosineRestarts(first_epochs=2, multiplier=3),
    Cyclic(up_epochs=1),
    Cyclic(up_epochs=2, base_factor=0.4, mode="triangular2"),
    own("falling"),
]
TWICE = [replace(kind, warmup_fraction=fraction) for kind in KINDS for fraction in (0.1, 0.3)]
ONE_CYCLES = [
    OneCycle(),
    OneCycle(pct_start=0.4, div_factor=5, final_div_factor=100),
    OneCycle(pct_start=0.1),
]
ALL = [*KINDS, *TWICE, *ONE_CYCLES]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_every_stage_follows_the_formula_of_its_schedule_at_its_own_rate(
    schedule: Schedule,
) -> None:
    of_shape = WARMUPS[getattr(schedule, "warmup_fraction", 0.0)]
    for (epochs, steps_per_epoch), warmup in zip(SHAPES, of_shape, strict=True):
        config = config_of(schedule=schedule, epochs=epochs)
        seen = rates(config, steps_per_epoch)
        wanted = shares(schedule, warmup, epochs, steps_per_epoch)
        assert begin(config, steps_per_epoch)[1].warmup_steps == warmup
        for column, peak in zip(zip(*seen, strict=True), PEAKS, strict=True):
            assert column == pytest.approx([peak * s for s in wanted], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "optimizer", [Sgd(lr=0.3), Adam(lr=0.3), AdamW(lr=0.3), RmsProp(lr=0.3)], ids=repr
)
def test_the_rates_are_the_same_with_every_optimizer(optimizer: Optimizer) -> None:
    config = config_of(
        schedule=Cosine(warmup_fraction=0.25), epochs=2, optimizer=optimizer, lr_ratio=1.0
    )
    wanted = [0.3 * share for share in shares(config.schedule, 2, 2, 4)]
    assert [head for _, head in rates(config, 4)] == pytest.approx(wanted, rel=1e-9)


# A plateau's metrics, 6 epochs of them; for the others they are nothing.
ROWS = [{"val/loss": x, "val/accuracy": -x} for x in (9.0, 8.0, 8.0, 8.5, 9.0, 9.0)]
PLATEAU = Plateau(factor=0.5, patience=0, cooldown=1)
WITH_PLATEAUS = [
    *ALL,
    PLATEAU,
    replace(PLATEAU, patience=1, cooldown=0, monitor="val/accuracy"),
    replace(PLATEAU, warmup_fraction=0.3),
    replace(PLATEAU, cooldown=0, min_factor=0.4),
    replace(PLATEAU, cooldown=0, min_factor=0.4, warmup_fraction=0.3),
]


@pytest.mark.parametrize("schedule", WITH_PLATEAUS, ids=repr)
def test_the_ratio_between_two_stages_is_the_same_at_every_step(schedule: Schedule) -> None:
    config = config_of(schedule=schedule, epochs=6, lr_ratio=0.37)
    for body, head in rates(config, 3, ROWS):
        assert body / head == pytest.approx(0.37, rel=1e-9)


@pytest.mark.parametrize("schedule", WITH_PLATEAUS, ids=repr)
def test_both_groups_of_a_stage_follow_it(schedule: Schedule) -> None:
    plain = config_of(schedule=schedule, epochs=6)
    doubled = replace(plain, decay_norms_and_biases=False, optimizer=Sgd(lr=1.0, weight_decay=0.1))
    both = [[body, head] for body, _, head, _ in rates(doubled, 3, ROWS)]
    assert both == [[body, head] for _, body, _, head in rates(doubled, 3, ROWS)]
    assert both == rates(plain, 3, ROWS)


# --- Stored and read, replayed --------------------------------------------------------------------


@pytest.mark.parametrize("schedule", WITH_PLATEAUS, ids=repr)
def test_a_schedule_that_was_stored_and_read_goes_on_to_the_same_numbers(
    schedule: Schedule,
) -> None:
    config = config_of(schedule=schedule, epochs=6)
    whole = rates(config, 3, ROWS)
    # A warm-up takes 2 or 6 steps; an epoch ends after each third one.
    for done in (0, 1, 2, 3, 4, 6, 7, 9, 10, 15, 17):
        optimizer, running = begin(config, 3)
        first = list(go_on(optimizer, running, range(done), 3, ROWS))
        stored = io.BytesIO()
        torch.save([optimizer.state_dict(), running.state_dict()], stored)
        # What was stored is not what goes on.
        list(go_on(optimizer, running, range(done, 18), 3, ROWS))

        stored.seek(0)
        optimizer_state, schedule_state = torch.load(stored, weights_only=True)
        optimizer, running = begin(config, 3)
        optimizer.load_state_dict(optimizer_state)
        running.load_state_dict(schedule_state)
        rest = list(go_on(optimizer, running, range(done, 18), 3, ROWS))
        assert first + rest == whole, f"stored after {done} steps"


@pytest.mark.parametrize("schedule", WITH_PLATEAUS, ids=repr)
def test_epochs_that_are_replayed_lead_to_the_same_rates_as_those_that_were_trained(
    schedule: Schedule,
) -> None:
    config = config_of(schedule=schedule, epochs=6)
    whole = rates(config, 3, ROWS)
    for epochs in range(6):
        optimizer, running = begin(config, 3)
        running.replay(copy.deepcopy(ROWS[:epochs]))
        rest = list(go_on(optimizer, running, range(3 * epochs, 18), 3, ROWS))
        assert rest == whole[3 * epochs :], f"{epochs} epochs"


# --- The warm-up ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "epochs", "steps_per_epoch", "wanted"),
    [
        (Cosine(), 10, 10, 0),
        (Cosine(warmup_fraction=0.1), 1, 10, 1),
        (Cosine(warmup_fraction=0.1), 1, 11, 2),  # 1.1 is rounded up
        (Step(every_epochs=1, warmup_fraction=0.25), 5, 2, 3),
        (Cosine(warmup_fraction=0.07), 10, 10, 7),  # 0.07 * 100 is a bit above 7
        (Constant(warmup_fraction=0.001), 1, 10, 1),
        (Constant(warmup_fraction=0.99), 1, 3, 2),  # a step is left for the rest
        (Constant(warmup_fraction=0.99), 1, 1, 0),
        (Plateau(warmup_fraction=0.5), 3, 3, 5),
        (OneCycle(), 10, 10, 0),
    ],
)
def test_the_warm_up_takes_its_share_of_all_steps_rounded_up(
    schedule: Schedule, epochs: int, steps_per_epoch: int, wanted: int
) -> None:
    config = config_of(schedule=schedule, epochs=epochs)
    assert warmup_steps(config, steps_per_epoch) == wanted
    assert begin(config, steps_per_epoch)[1].warmup_steps == wanted


@pytest.mark.parametrize("kind", [*KINDS, PLATEAU], ids=repr)
def test_the_rise_is_there_with_a_warm_up_only_and_the_main_part_always(kind: Schedule) -> None:
    plain = begin(config_of(schedule=kind, epochs=4), 5)[1]
    warmed = begin(config_of(schedule=replace(kind, warmup_fraction=0.5), epochs=4), 5)[1]
    assert plain.rise is None
    assert type(warmed.rise) is torch.optim.lr_scheduler.LinearLR
    assert type(plain.main) is type(warmed.main)


@pytest.mark.parametrize("kind", [*KINDS, PLATEAU], ids=repr)
def test_a_training_of_one_step_has_neither_a_warm_up_nor_an_error(kind: Schedule) -> None:
    config = config_of(schedule=replace(kind, warmup_fraction=0.9), epochs=1)
    ((_, head),) = rates(config, 1, ROWS)
    assert head == (kind.base_factor if isinstance(kind, Cyclic) else 1.0)


# --- Cycles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [OneCycle(), Cyclic(up_epochs=1)], ids=repr)
@pytest.mark.parametrize(
    ("chosen", "asked"),
    [
        (Sgd(lr=1.0, momentum=0.7), {"momentum": 0.7}),
        (Sgd(lr=1.0, momentum=0.0), {"momentum": 0.0}),
        (AdamW(lr=1.0, beta1=0.8), {"betas": (0.8, 0.999)}),
        (RmsProp(lr=1.0, momentum=0.3), {"momentum": 0.3}),
    ],
)
def test_cycles_leave_the_momentum_as_it_was_asked(
    chosen: Optimizer, asked: dict[str, object], schedule: Schedule
) -> None:
    optimizer, running = begin(config_of(optimizer=chosen, schedule=schedule, epochs=3), 4)
    for _ in go_on(optimizer, running, range(12), 4, ROWS):
        for group in optimizer.param_groups:
            assert {name: group[name] for name in asked} == asked


@pytest.mark.parametrize("pct_start", [1e-9, 0.1])
@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 10), (2, 5), (1, 3), (10, 1), (1, 11), (1, 15), (2, 9), (1, 20)]
)
def test_one_cycle_reaches_its_peak_in_its_second_step_at_the_earliest(
    epochs: int, steps: int, pct_start: float
) -> None:
    config = config_of(epochs=epochs, schedule=OneCycle(pct_start=pct_start))
    seen = [head for _, head in rates(config, steps)]
    assert seen[0] == pytest.approx(1 / 25)
    assert seen[1] == max(seen) == pytest.approx(1)
    assert seen[-1] == pytest.approx(1 / 25 / 1e4)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (2, 1)])
def test_one_cycle_of_less_than_three_steps_is_refused(epochs: int, steps: int) -> None:
    told = f"^schedule OneCycle needs 3 optimizer steps, this training has {epochs * steps};"
    with pytest.raises(ConfigError, match=told):
        begin(config_of(epochs=epochs, schedule=OneCycle()), steps)


# --- The user's own -------------------------------------------------------------------------------

NO_FUNCTION = 3


def fails(epoch: int, config: TrialConfig) -> float:
    return 1 / (2 - epoch)


def fails_at_length(epoch: int, config: TrialConfig) -> float:
    raise ValueError("the first line\nthe second line")


def not_finite(epoch: int, config: TrialConfig) -> float:
    return math.nan if epoch == 2 else 1.0


def infinite(epoch: int, config: TrialConfig) -> float:
    return math.inf if epoch == 2 else 1.0


def negative(epoch: int, config: TrialConfig) -> float:
    return 1.0 - epoch


def worded(epoch: int, config: TrialConfig) -> object:
    return "half" if epoch == 2 else 1


def silent(epoch: int, config: TrialConfig) -> None:
    return None


def takes_nothing() -> float:
    return 1.0


def as_float32(epoch: int, config: TrialConfig) -> object:
    return np.float32(0.5**epoch)


def as_int64(epoch: int, config: TrialConfig) -> object:
    return np.int64(2 - epoch)


def as_tensor(epoch: int, config: TrialConfig) -> object:
    return torch.tensor(0.5**epoch)


def as_whole_tensor(epoch: int, config: TrialConfig) -> object:
    return torch.tensor(2 - epoch)


def as_fraction(epoch: int, config: TrialConfig) -> object:
    return Fraction(1, 2) ** epoch


def truth(epoch: int, config: TrialConfig) -> object:
    return True


def numpys_truth(epoch: int, config: TrialConfig) -> object:
    return np.bool_(True)


def truth_in_a_tensor(epoch: int, config: TrialConfig) -> object:
    return torch.tensor(True)


def huge(epoch: int, config: TrialConfig) -> object:
    return 10**5000  # which Python neither converts nor writes


def row(epoch: int, config: TrialConfig) -> object:
    return torch.ones(1)


def table_of_rows(epoch: int, config: TrialConfig) -> object:
    return torch.ones(2, 2)


def nan_in_a_tensor(epoch: int, config: TrialConfig) -> object:
    return torch.tensor(math.nan)


def imaginary(epoch: int, config: TrialConfig) -> object:
    return 1j


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("as_float32", [1, 0.5, 0.25]),
        ("as_int64", [2, 1, 0]),
        ("as_tensor", [1, 0.5, 0.25]),
        ("as_whole_tensor", [2, 1, 0]),
        ("as_fraction", [1, 0.5, 0.25]),
    ],
)
def test_an_own_schedule_may_return_numbers_of_numpy_and_torch(
    name: str, wanted: list[float]
) -> None:
    config = config_of(schedule=own(name), epochs=3)
    assert check_schedule(config) == []
    seen = [head for _, head in rates(config, 1)]
    assert seen == wanted
    assert {type(rate) for rate in seen} == {float}


MUST = "it must be a number >= 0 and finite"
WRONG = {
    "fails": "in epoch 2 it failed: ZeroDivisionError: division by zero",
    "not_finite": f"in epoch 2 it returned nan; {MUST}",
    "infinite": f"in epoch 2 it returned inf; {MUST}",
    "negative": f"in epoch 2 it returned -1.0; {MUST}",
    "worded": f"in epoch 2 it returned 'half'; {MUST}",
    "silent": f"in epoch 0 it returned None; {MUST}",
    "truth": f"in epoch 0 it returned True; {MUST}",
    "numpys_truth": f"in epoch 0 it returned np.True_; {MUST}",
    "truth_in_a_tensor": f"in epoch 0 it returned tensor(True); {MUST}",
    "huge": "in epoch 0 it failed: OverflowError: int too large to convert to float",
    "table_of_rows": f"in epoch 0 it returned tensor([[1., 1.], [1., 1.]]); {MUST}",
    "row": f"in epoch 0 it returned tensor([1.]); {MUST}",
    "nan_in_a_tensor": f"in epoch 0 it returned tensor(nan); {MUST}",
    "imaginary": f"in epoch 0 it returned 1j; {MUST}",
    "takes_nothing": "in epoch 0 it failed: TypeError: takes_nothing() takes 0 positional",
    "fails_at_length": "in epoch 0 it failed: ValueError: the first line",
    "NO_FUNCTION": f"{__name__}.NO_FUNCTION is an int, not a function",
    "fallin": f"{__name__} has no fallin; did you mean 'falling'?",
}


@pytest.mark.parametrize(("name", "told"), WRONG.items())
@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_what_is_wrong_with_an_own_schedule_is_told_in_one_line_before_and_while_it_runs(
    name: str, told: str, fraction: float
) -> None:
    config = config_of(schedule=own(name, warmup_fraction=fraction), epochs=5)
    (mistake,) = check_schedule(config)
    assert mistake.startswith(f"schedule '{__name__}:{name}': {told}")
    assert "\n" not in mistake
    with pytest.raises(ConfigError) as caught:
        rates(config, 2)
    assert str(caught.value) == mistake


def test_an_own_schedule_of_a_missing_module_is_told_by_its_path() -> None:
    config = config_of(schedule=OwnSchedule(factor="no_such_module:f"))
    (mistake,) = check_schedule(config)
    assert mistake.startswith("schedule 'no_such_module:f': cannot import no_such_module: ")
    with pytest.raises(ConfigError, match="cannot import no_such_module"):
        begin(config, 2)


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_an_own_schedule_is_asked_for_the_epochs_of_the_training_only(fraction: float) -> None:
    config = config_of(schedule=own("table", warmup_fraction=fraction), epochs=3)
    assert check_schedule(config) == []
    seen = [head for _, head in rates(config, 5)]
    warmup = [0.01, 0.34, 0.67] if fraction else []
    wanted = [*warmup, *[1] * 5, *[0.5] * 5, *[0] * 5][:15]
    assert seen == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("schedule", [*KINDS, *ONE_CYCLES, PLATEAU], ids=repr)
def test_nothing_is_wrong_with_good_schedules(schedule: Schedule) -> None:
    assert check_schedule(config_of(schedule=schedule, epochs=10)) == []


@pytest.mark.parametrize(
    ("examples", "is_refused"),
    [(48, False), (40, False), (34, False), (33, True), (32, True), (5, True)],
)
def test_too_few_examples_for_one_cycle_are_told_before_it_begins(
    examples: int, is_refused: bool
) -> None:
    config = config_of(epochs=1, batch_size=16, schedule=OneCycle())  # 33: batches of 16 and 17
    assert bool(check_steps(config, examples)) == is_refused


# --- What never acts ------------------------------------------------------------------------------

FALLS = "the learning rate never falls"
LATE = "they lie after the training"
IDLE: list[tuple[Schedule, int, str | None]] = [
    (Step(every_epochs=4), 5, None),
    (Step(every_epochs=5), 5, f"Step: every_epochs=5 in 5 epochs: {FALLS}"),
    (Step(every_epochs=1), 1, f"Step: every_epochs=1 in 1 epoch: {FALLS}"),
    # The warm-up takes the first of five epochs: the fourth after it is the last.
    (Step(every_epochs=3, warmup_fraction=0.2), 5, None),
    (
        Step(every_epochs=4, warmup_fraction=0.2),
        5,
        f"Step: every_epochs=4 in 5 epochs: {FALLS}",
    ),
    (MultiStep(milestones=[2, 4]), 5, None),
    (MultiStep(milestones=[2, 5, 9]), 5, f"MultiStep: milestones=[5, 9] in 5 epochs: {LATE}"),
    (MultiStep(milestones=(7,)), 5, f"MultiStep: milestones=[7] in 5 epochs: {LATE}"),
    (CosineRestarts(first_epochs=5), 5, None),
    (
        CosineRestarts(first_epochs=6),
        5,
        "CosineRestarts: first_epochs=6 in 5 epochs: the first cosine does not end",
    ),
    (
        CosineRestarts(first_epochs=5, warmup_fraction=0.1),
        5,
        "CosineRestarts: first_epochs=5 in 5 epochs: the first cosine does not end",
    ),
    (Cyclic(up_epochs=5), 5, None),
    (Cyclic(up_epochs=6), 5, "Cyclic: up_epochs=6 in 5 epochs: the first rise does not end"),
    (Plateau(patience=2), 5, None),
    (Plateau(patience=3), 5, f"Plateau: patience=3 in 5 epochs: {FALLS}"),
    (Plateau(patience=2, warmup_fraction=0.1), 5, None),
    (
        Plateau(patience=2, warmup_fraction=0.2),
        5,
        f"Plateau: patience=2 in 5 epochs: {FALLS}",
    ),
    *((schedule, 1, None) for schedule in (Constant(), Cosine(), Polynomial(), OneCycle())),
]


@pytest.mark.parametrize(("schedule", "epochs", "told"), IDLE, ids=name_of)
def test_what_never_acts_is_told(schedule: Schedule, epochs: int, told: str | None) -> None:
    wanted = [] if told is None else [f"schedule {told}"]
    assert idle_choices([config_of(schedule=schedule, epochs=epochs)]) == wanted


@pytest.mark.parametrize(("schedule", "epochs", "told"), IDLE, ids=name_of)
def test_what_is_told_never_to_fall_does_not(
    schedule: Schedule, epochs: int, told: str | None
) -> None:
    if not isinstance(schedule, Step | Plateau):
        return
    stuck = [{"val/loss": 1.0}] * epochs
    seen = [head for _, head in rates(config_of(schedule=schedule, epochs=epochs), 10, stuck)]
    falls = any(after < before for before, after in itertools.pairwise(seen))
    assert falls == (told is None)


def test_each_field_is_told_once_for_a_whole_space() -> None:
    kinds = [Step(every_epochs=n) for n in (9, 1, 8)] + [MultiStep(milestones=[n]) for n in (7, 6)]
    configs = [config_of(schedule=kind, epochs=epochs) for kind in kinds for epochs in (5, 2)]
    assert idle_choices(configs) == [
        f"schedule Step: every_epochs=9 in 5 epochs: {FALLS}",
        f"schedule MultiStep: milestones=[7] in 5 epochs: {LATE}",
    ]
