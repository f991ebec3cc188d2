import errno
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tuneapp.lr_range as lr_range
from tuneapp.cli import main
from tuneapp.config import AdamW, Cosine, OneCycle, RunSettings, Sgd, TrialConfig
from tuneapp.data.batches import Batch
from tuneapp.data.examples import ImageSet
from tuneapp.display import lr_range_lines
from tuneapp.errors import ConfigError, Diverged, TrialError
from tuneapp.figures import _loss_limits, draw_lr_range
from tuneapp.loop import train_one_epoch
from tuneapp.lr_range import (
    End,
    LrRange,
    SeedCurve,
    find_lr_range,
    propose,
    smooth,
    without_spikes,
)
from tuneapp.training import Training, TrialRun, begin_training


def rising(steps: int, lowest: float, highest: float) -> list[float]:
    return [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]


# --- Reading the curve ----------------------------------------------------------------------------


def seed_curve(losses: list[float], end: End = "reached the end") -> SeedCurve:
    return SeedCurve(tuple(losses), end)


def test_smoothing_is_the_mean_of_five_neighbours_and_no_window_is_smaller() -> None:
    assert smooth([6.0, 0.0, 3.0, 9.0, 12.0, 0.0]) == pytest.approx(
        [6, 6, 6, 24 / 5, 24 / 5, 24 / 5]
    )
    assert smooth([1.0, 3.0]) == [2.0, 2.0]


def test_a_longer_test_is_smoothed_over_more_steps() -> None:
    spike = [0.0] * 200
    spike[100] = 21.0
    assert [i for i, v in enumerate(smooth(spike)) if v > 0] == list(range(90, 111))
    assert smooth(spike)[100] == pytest.approx(1.0)


def test_a_spike_is_replaced_by_the_median_around_it() -> None:
    usual = [2.0, 2.1, 1.9, 2.2, 1.8] * 4
    assert without_spikes(usual) == usual
    assert without_spikes([9.0, *usual, 9.0]) == pytest.approx([2.1, *usual, 2.1])


def valley(lrs: list[float], start: float, bottom: float) -> list[float]:
    """Flat at 2 up to `start`, straight down over log(lr) to 1 at `bottom`, and up as fast."""

    def loss(lr: float) -> float:
        if lr <= start:
            return 2.0
        if lr <= bottom:
            return 2.0 - math.log(lr / start) / math.log(bottom / start)
        return 1.0 + math.log(lr / bottom) / math.log(bottom / start)

    return [loss(lr) for lr in lrs]


def noisy(losses: list[float], sd: float, seeds: int, seed: int) -> list[SeedCurve]:
    """Curves that differ by normally distributed noise, and by a level of their own."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(0, 0.1, seeds)
    return [
        seed_curve((np.array(losses) + lv + rng.normal(0, sd, len(losses))).tolist())
        for lv in levels
    ]


def bounds(found: LrRange) -> tuple[float, float, float]:
    """Return the decimal logarithms of what is proposed."""
    assert found.low is not None
    assert found.steepest is not None
    assert found.high is not None
    return math.log10(found.low), math.log10(found.steepest), math.log10(found.high)


def test_the_proposed_range_is_where_the_loss_falls() -> None:
    lrs = rising(301, 1e-6, 1.0)  # 50 steps in each decade
    found = propose(lrs, [seed_curve(valley(lrs, 1e-4, 1e-2))])
    low, steepest, high = bounds(found)
    # A tenth of the fall is at 10 ** -3.8, the bottom at 10 ** -2; smoothing rounds the corners.
    assert low == pytest.approx(-3.8, abs=0.1)
    assert high == pytest.approx(-2.0, abs=0.1)
    assert low <= steepest < high
    assert found.fall == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("steps", "seeds", "sd"), [(100, 3, 0.05), (60, 2, 0.2), (20, 1, 0.3)])
def test_nothing_is_proposed_from_noise(steps: int, seeds: int, sd: float) -> None:
    lrs = rising(steps, 1e-6, 1.0)
    found = [propose(lrs, noisy([2.3] * steps, sd, seeds, seed)) for seed in range(100)]
    assert sum(f.low is not None for f in found) <= 2
    assert all(f.fall <= f.noise for f in found if f.low is None)


@pytest.mark.parametrize(("sd", "most"), [(0.05, 0.2), (0.1, 0.3), (0.2, 0.4)])
def test_noise_moves_the_bounds_by_little(sd: float, most: float) -> None:
    lrs = rising(100, 1e-6, 1.0)
    falls = valley(lrs, 1e-4, 1e-2)
    every = [bounds(propose(lrs, noisy(falls, sd, 3, seed))) for seed in range(50)]
    near = [abs(low + 3.8) < most and abs(high + 2.0) < most for low, _, high in every]
    assert sum(near) >= 47
    assert all(low <= steepest <= high for low, steepest, high in every)
    assert np.median([low for low, _, _ in every]) == pytest.approx(-3.8, abs=0.15)


def test_the_steepest_is_where_a_curve_falls_fastest() -> None:
    lrs = rising(100, 1e-6, 1.0)
    losses = [2.3 - 1.5 / (1 + math.exp(-4 * (math.log10(lr) + 3))) for lr in lrs]
    for seed in range(20):
        _, steepest, _ = bounds(propose(lrs, noisy(losses, 0.1, 3, seed)))
        assert steepest == pytest.approx(-3, abs=0.5)


def test_the_range_does_not_begin_in_the_flat_part() -> None:
    lrs = rising(100, 1e-6, 1.0)
    losses = valley(lrs, 1e-3, 1e-2)
    losses[20:24] = [1.7] * 4  # a dent, smaller than the fall, that noise made
    low, _, _ = bounds(propose(lrs, [seed_curve(losses)]))
    assert low == pytest.approx(-2.9, abs=0.2)


def test_noise_does_not_begin_the_range_early() -> None:
    lrs = rising(60, 1e-6, 1.0)
    falls = valley(lrs, 1e-3, 1e-2)
    found = [propose(lrs, noisy(falls, 0.3, 2, seed)) for seed in range(50)]
    assert sum(bounds(f)[0] > -3.6 for f in found if f.low is not None) >= 42


def test_noise_is_five_standard_deviations_of_a_difference() -> None:
    lrs = rising(100, 1e-6, 1.0)
    noise = [propose(lrs, noisy([2.0] * 100, 0.1, 1, seed)).noise for seed in range(200)]
    assert np.mean(noise) == pytest.approx(5 * 0.1 * math.sqrt(2 / 11), rel=0.025)


def test_an_explosion_at_the_end_is_not_taken_for_noise() -> None:
    lrs = rising(100, 1e-6, 1.0)
    (calm,) = noisy(valley(lrs, 1e-4, 1e-2), 0.05, 1, 0)
    ramp = [calm.losses[79] * 1.15**i for i in range(1, 21)]
    exploded = propose(lrs, [seed_curve([*calm.losses[:80], *ramp], "blew up")])
    assert exploded.noise == pytest.approx(propose(lrs, [calm]).noise, rel=0.1)


def test_a_very_short_curve_proposes_nothing() -> None:
    lrs = rising(10, 1e-6, 1.0)
    falls = [10.0 - i for i in range(10)]
    assert propose(lrs, [seed_curve(falls)]).noise < math.inf
    found = propose(lrs, [seed_curve(falls[:9], "diverged")])
    assert (found.low, found.noise) == (None, math.inf)


def test_a_loss_that_rises_first_falls_from_its_top() -> None:
    lrs = rising(100, 1e-6, 1.0)
    falls = valley(lrs, 1e-3, 1e-2)
    rises = [1.5 + 0.5 * i / 20 for i in range(20)]
    found = propose(lrs, [seed_curve([*rises, *falls[20:]])])
    assert found.fall == pytest.approx(propose(lrs, [seed_curve(falls)]).fall)
    assert bounds(found)[0] == pytest.approx(-2.9, abs=0.2)


def test_the_steepest_is_within_the_range() -> None:
    lrs = rising(60, 1e-6, 1.0)
    falls = valley(lrs, 1e-5, 10**-1.5)  # equally steep everywhere: noise decides
    found = [propose(lrs, noisy(falls, 0.3, 2, seed)) for seed in range(20)]
    every = [bounds(f) for f in found if f.low is not None]
    assert len(every) > 15
    assert all(low <= steepest <= high for low, steepest, high in every)


def test_a_spike_in_the_first_steps_is_not_the_top() -> None:
    lrs = rising(100, 1e-6, 1.0)
    assert propose(lrs, [seed_curve([9.0, 9.0, 9.5, 2.3] + [2.0] * 96)]).low is None
    falls = valley(lrs, 1e-4, 1e-2)
    spiked = propose(lrs, [seed_curve([9.0, 9.0, 9.5, *falls[3:]])])
    assert bounds(spiked) == bounds(propose(lrs, [seed_curve(falls)]))


def test_a_loss_that_never_falls_proposes_nothing() -> None:
    lrs = rising(50, 1e-4, 1.0)
    found = propose(lrs, [seed_curve([1.0 + i for i in range(50)])])
    assert (found.low, found.high, found.steepest, found.fall) == (None, None, None, 0.0)


def test_a_fall_by_less_than_three_percent_proposes_nothing() -> None:
    lrs = rising(100, 1e-6, 1.0)
    exact = valley(lrs, 1e-4, 1e-2)  # 1 at the bottom, 2 at the top
    assert propose(lrs, [seed_curve([100 + 4 * v for v in exact])]).low is not None
    small = propose(lrs, [seed_curve([100 + 3 * v for v in exact])])
    assert small.low is None
    assert small.fall > small.noise
    assert "the loss fell by 2." in lr_range_lines(small, "lr")[0]


def test_seeds_that_disagree_propose_nothing() -> None:
    lrs = rising(100, 1e-6, 1.0)
    falls = valley(lrs, 1e-4, 1e-2)
    flat = [2.0] * 100
    assert propose(lrs, [seed_curve(falls), seed_curve(flat)]).low is None
    one_of_three = propose(lrs, [seed_curve(falls), seed_curve(flat), seed_curve(flat)])
    assert one_of_three.low is None
    assert one_of_three.noise == pytest.approx(2 * one_of_three.fall)  # worked by hand: 1, 0, 0
    assert propose(lrs, [seed_curve(falls), seed_curve([v + 1 for v in falls])]).low is not None


def test_a_seed_that_ends_early_does_not_cut_the_others() -> None:
    lrs = rising(100, 1e-6, 1.0)
    falls = valley(lrs, 1e-4, 1e-2)
    alone = propose(lrs, [seed_curve(falls)] * 2)
    early = propose(lrs, [seed_curve([9.0] * 20, "diverged"), seed_curve(falls), seed_curve(falls)])
    assert (early.averaged, early.smoothed) == (2, alone.smoothed)
    assert bounds(early) == bounds(alone)
    assert [len(curve.losses) for curve in early.curves] == [20, 100, 100]


def test_seeds_that_end_after_the_fall_are_all_in_the_mean() -> None:
    lrs = rising(100, 1e-6, 1.0)
    falls = valley(lrs, 1e-4, 1e-2)
    found = propose(lrs, [seed_curve(falls[:n], "blew up") for n in (85, 88, 99)])
    assert found.averaged == 3
    assert len(found.smoothed) == 85


def test_at_least_half_of_the_seeds_are_in_the_mean() -> None:
    lrs = rising(100, 1e-6, 1.0)
    falls = valley(lrs, 1e-4, 1e-2)
    curves = [seed_curve(falls[:20], "diverged")] * 2 + [seed_curve(falls)]
    assert propose(lrs, curves).low is None
    assert len(propose(lrs, curves).smoothed) == 20
    assert propose(lrs, curves[1:]).averaged == 1


# --- The test itself ------------------------------------------------------------------------------


@pytest.fixture
def config() -> TrialConfig:
    return TrialConfig(
        model="squeezenet1_1",
        weights=None,
        image_size=32,
        batch_size=8,
        lr_ratio=0.5,
        freeze_depth=2,
        optimizer=Sgd(lr=0.3),
        schedule=Cosine(warmup_fraction=0.5),
    )


@pytest.fixture
def run(images: ImageSet) -> TrialRun:
    return TrialRun(settings=RunSettings(), images=images, params={}, num_threads=1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The learning rate of each stage at each step that is trained."""
    rates: list[dict[str, float]] = []
    really = lr_range._step

    def step(training: Training, batch: Batch, config: TrialConfig) -> float:
        rates.append({g["stage"]: g["lr"] for g in training.state.optimizer.param_groups})
        return really(training, batch, config)

    monkeypatch.setattr(lr_range, "_step", step)
    return rates


@pytest.mark.parametrize("schedule", [Cosine(warmup_fraction=0.5), OneCycle()])
def test_all_stages_rise_together_and_keep_their_ratios(
    schedule: Cosine | OneCycle, config: TrialConfig, run: TrialRun, seen: list[dict[str, float]]
) -> None:
    config = replace(config, schedule=schedule)
    find_lr_range(config, run, steps=5, seeds=1, lowest=1e-5, highest=1e-1)
    assert [step["head"] for step in seen] == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    for step in seen:  # stem and fires1 are frozen
        assert step == pytest.approx(
            {"fires2": step["head"] / 4, "fires3": step["head"] / 2, "head": step["head"]}
        )


def test_the_size_of_the_configured_lr_does_not_matter(config: TrialConfig, run: TrialRun) -> None:
    first = find_lr_range(config, run, steps=6, seeds=1)
    second = find_lr_range(replace(config, optimizer=Sgd(lr=7.0)), run, steps=6, seeds=1)
    assert second.curves[0].losses == pytest.approx(first.curves[0].losses, rel=1e-6)


def test_each_seed_is_another_draw_and_the_whole_can_be_repeated(
    config: TrialConfig, run: TrialRun
) -> None:
    first = find_lr_range(config, run, steps=6, seeds=3)
    assert len(set(first.curves)) == 3
    assert find_lr_range(config, run, steps=6, seeds=3) == first


def test_the_seeds_begin_with_the_one_of_the_configuration(
    config: TrialConfig, run: TrialRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def begin(config: TrialConfig, run: TrialRun) -> Training:
        used.append(config.seed)
        return begin_training(config, run)

    monkeypatch.setattr(lr_range, "begin_training", begin)
    find_lr_range(replace(config, seed=7), run, steps=4, seeds=3)
    assert used == [7, 8, 9]


def test_no_two_steps_of_any_seed_see_the_same_batch(
    config: TrialConfig, run: TrialRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[bytes] = []

    def step(training: Training, batch: Batch, config: TrialConfig) -> float:
        batches.append(batch[0].numpy().tobytes())
        return 1.0

    monkeypatch.setattr(lr_range, "_step", step)
    find_lr_range(replace(config, batch_size=1000), run, steps=5, seeds=3)  # an epoch in each step
    assert len(set(batches)) == 15


def test_steps_clip_and_accumulate_as_the_configuration_says(
    config: TrialConfig, run: TrialRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, object]] = []

    def train(*args: object, **options: object) -> object:
        told.append(options)
        return train_one_epoch(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lr_range, "train_one_epoch", train)
    find_lr_range(replace(config, clip_norm=0.5), run, steps=2, seeds=1)
    find_lr_range(replace(config, clip_value=0.25, accumulation_steps=2), run, steps=2, seeds=1)
    names = ("clip_norm", "clip_value", "accumulation_steps")
    assert [tuple(options[name] for name in names) for options in told] == [
        (0.5, None, 1),
        (0.5, None, 1),
        (None, 0.25, 2),
        (None, 0.25, 2),
    ]


def test_clipped_steps_are_smaller(config: TrialConfig, run: TrialRun) -> None:
    lrs = {"steps": 5, "seeds": 1, "lowest": 1e-2, "highest": 1.0}
    free, held = (
        find_lr_range(replace(config, clip_value=clip), run, **lrs)  # type: ignore[arg-type]
        for clip in (None, 1e-9)
    )
    assert held.curves[0].losses[0] == free.curves[0].losses[0]
    assert held.curves[0].losses[-1] != pytest.approx(free.curves[0].losses[-1], rel=1e-3)


def test_everything_is_left_as_it_was(config: TrialConfig, run: TrialRun, tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.randn(4)
    torch.manual_seed(5)
    torch.set_num_threads(2)
    find_lr_range(config, replace(run, folder=tmp_path / "trial"), steps=4, seeds=2)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.randn(4), wanted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "length", "end"),
    [
        ([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 99.0, 99.0], 7, "blew up"),
        ([2.0, 1.0, 1.5, math.nan], 3, "diverged"),
        ([math.nan], 0, "diverged"),
        ([2.0, 1.0, math.inf], 2, "diverged"),
        ([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 16.0, 1.0], 8, "reached the end"),  # (16 + 4) / 5 is 4
        ([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 16.1, 1.0], 7, "blew up"),
        # Many times the smallest, but below what it began with: a spike of a network that learns.
        ([2.0, 0.01, 0.01, 0.01, 0.01, 0.01, 0.9, 0.1], 8, "reached the end"),
    ],
)
def test_a_seed_ends_where_it_diverges_or_blows_up(
    script: list[float],
    length: int,
    end: str,
    config: TrialConfig,
    run: TrialRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter(script)

    def step(training: Training, batch: Batch, config: TrialConfig) -> float:
        loss = next(losses)
        if math.isnan(loss):
            raise Diverged(1, 1, loss)
        if math.isinf(loss):
            raise TrialError("mixed precision: 20 steps in a row were skipped")
        return loss

    monkeypatch.setattr(lr_range, "_step", step)
    found = lr_range._one_seed(config, run, rising(8, 1e-4, 1), first_epoch=1)
    assert found == SeedCurve(tuple(script[:length]), end)  # type: ignore[arg-type]


def test_the_range_of_an_easy_task_is_found(run: TrialRun) -> None:
    config = TrialConfig(
        model="resnet18",
        weights=None,
        image_size=32,
        batch_size=8,
        freeze_depth=5,
        optimizer=AdamW(lr=0.3),
    )
    found = find_lr_range(config, run, steps=40, seeds=2, lowest=1e-6, highest=1e3)
    assert found.low is not None
    assert found.high is not None
    # At 1e-2 the head of a ResNet learns three colours in 40 steps, and at 1e-5 it does not.
    assert 1e-5 < found.low < 1e-2 < found.high < 1e2
    assert found.fall > 0.5
    assert not found.is_still_falling


def test_a_network_that_cannot_learn_gets_no_proposal(config: TrialConfig, run: TrialRun) -> None:
    found = find_lr_range(config, run, steps=40, seeds=2, lowest=1e-12, highest=1e-8)
    assert found.low is None
    assert [curve.end for curve in found.curves] == ["reached the end"] * 2


# --- What is shown --------------------------------------------------------------------------------


def pixels(file: Path, colour: tuple[int, int, int]) -> int:
    picture = np.asarray(Image.open(file).convert("RGB"), dtype=int)
    assert picture.shape == (675, 1200, 3)
    return int((abs(picture - colour).sum(axis=2) < 12).sum())


BLUE, ORANGE, RED = (31, 119, 180), (255, 127, 14), (214, 39, 40)


def test_the_figure_is_a_png_with_curves_ends_and_the_range(tmp_path: Path) -> None:
    lrs = rising(60, 1e-6, 1.0)
    losses = valley(lrs, 1e-4, 1e-2)
    curves = [seed_curve(losses), seed_curve(losses[:50], "diverged")]
    found = propose(lrs, curves)
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    draw_lr_range(found, "a title", "its weights=/data/$a_$b", first)
    whole = replace(found, low=None, high=None, steepest=None, curves=(curves[0],), averaged=1)
    draw_lr_range(whole, "", "", second)
    assert pixels(first, BLUE) > 1000
    assert pixels(first, ORANGE) > 100
    assert pixels(first, RED) > 20
    assert pixels(second, BLUE) > 1000
    assert pixels(second, ORANGE) == 0
    assert pixels(second, RED) == 0


def test_an_explosion_does_not_flatten_the_figure(tmp_path: Path) -> None:
    lrs = rising(60, 1e-6, 1.0)
    losses = valley(lrs, 1e-4, 1e-2)
    calm = _loss_limits(propose(lrs, [seed_curve(losses)]))
    exploded = [*losses[:55], 1e3, 1e4, 1e5, 1e6, 1e7]
    assert _loss_limits(propose(lrs, [seed_curve(exploded, "blew up")])) == calm
    low, high = calm
    assert low < min(losses) < max(losses) < high < 3


def test_the_shortest_curves_can_be_drawn(tmp_path: Path) -> None:
    lrs = rising(20, 1e-6, 1.0)
    curves = [seed_curve([], "diverged"), seed_curve([2.0, 2.0], "diverged")]
    draw_lr_range(propose(lrs, curves), "", "", tmp_path / "a.png")
    assert pixels(tmp_path / "a.png", RED) > 20


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--steps", "3"], "--steps 3: must be at least 10"),
        (["--lowest", "1", "--highest", "0.1"], "--lowest 1 --highest 0.1: must rise"),
        (["--lowest", "0"], "must rise, from above 0"),
        (["--lowest", "nan"], "--lowest nan --highest 1: must rise"),
        (["--highest", "inf"], "--highest inf: must rise, from above 0, and be finite"),
        (["--output", "curve.pdf"], "--output curve.pdf: must be a .png file"),
        (["--output", "nowhere/curve.png"], "in a folder that exists"),
        (["--output", "/proc/x.png"], "--output /proc/x.png: cannot be written ("),
        (["--set", "lr=1"], "has no such parameter"),
    ],
)
def test_wrong_options_are_refused_in_a_line(
    words: list[str], told: str, small_space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lr-range", str(small_space), *words]) == 2
    assert told in capsys.readouterr().err


def test_the_command_prints_what_can_be_pasted_into_the_space(
    small_space: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(photos), "--seeds", "1", "--steps", "30", "--highest", "100"]
    assert main(["lr-range", str(small_space), *words, "--set", "lr_ratio=0.5"]) == 0
    out = capsys.readouterr().out
    assert 'space     trial.suggest_float("adamw.lr", ' in out
    assert "lr_ratio=0.5" in out
    assert [p.name for p in tmp_path.iterdir()] == ["lr-range.png"]
    assert Image.open("lr-range.png").size == (1200, 675)


def test_the_proposal_names_the_lr_of_the_chosen_branch(
    small_space: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(photos), "--seeds", "1", "--steps", "40", "--highest", "1000"]
    chosen = ["--set", "optimizer=sgd", "--set", "sgd.lr=0.01"]
    words += [*chosen, "--output", str(tmp_path / "x.png")]
    assert main(["lr-range", str(small_space), *words]) == 0
    assert 'trial.suggest_float("sgd.lr", ' in capsys.readouterr().out


def test_an_output_that_is_there_is_kept_until_the_test_is_done(
    small_space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "there.png"
    file.write_bytes(b"a figure")
    words = ["--output", str(file), "--set", "lr=1"]
    assert main(["lr-range", str(small_space), *words]) == 2
    assert file.read_bytes() == b"a figure"
    assert (
        main(["lr-range", str(small_space), *words[2:], "--output", str(tmp_path / "x.png")]) == 2
    )
    assert not (tmp_path / "x.png").exists()


def test_a_figure_that_the_disk_refuses_is_one_line_after_the_result(
    small_space: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tuneapp.figures.draw_lr_range", draw)
    words = ["--data", str(photos), "--seeds", "1", "--steps", "10", "--set", "lr_ratio=0.5"]
    file = tmp_path / "x.png"
    assert main(["lr-range", str(small_space), *words, "--output", str(file)]) == 5
    said = capsys.readouterr()
    assert "\nlr        " in said.out
    assert f"error: --output {file}: No space left on device" in said.err


def test_the_command_says_that_unfreezing_is_not_tested(
    tmp_path: Path, small_space: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "unfreezing.py"
    text = small_space.read_text()
    space.write_text(text.replace("epochs=4,", "epochs=4, unfreeze_at={2: 1},"))
    words = ["--data", str(photos), "--seeds", "1", "--steps", "10"]
    words += ["--output", str(tmp_path / "x.png")]
    for file, wanted in ((space, True), (small_space, False)):
        assert main(["lr-range", str(file), *words]) == 0
        assert ("what unfreeze_at frees later is not tested" in capsys.readouterr().out) is wanted


def test_a_loss_that_is_never_finite_is_no_matter_of_the_learning_rate() -> None:
    with pytest.raises(ConfigError, match="loss of the first batch is not finite, before any step"):
        propose(rising(10, 1e-6, 1.0), [seed_curve([])] * 2 + [seed_curve([2.0] * 10)])
    assert propose(rising(10, 1e-6, 1.0), [seed_curve([]), seed_curve([2.0] * 10)]).averaged == 1


def test_the_bounds_are_said_to_two_digits() -> None:
    lrs = rising(100, 1e-6, 1.0)
    found = propose(lrs, [seed_curve(valley(lrs, 1e-4, 1e-2))])
    found = replace(found, low=1.6e-3, high=2.4e-3, steepest=2e-3)
    assert lr_range_lines(found, "a.lr") == [
        "lr        from 1.6e-03, where the loss begins to fall, to 2.4e-03, where it is smallest; "
        "steepest at 2.0e-03",
        'space     trial.suggest_float("a.lr", 1.6e-03, 2.4e-03, log=True)',
        "holds     for these parameters only; test other freeze depths and optimizers with --set",
    ]


def test_a_larger_highest_is_advised_only_if_the_last_planned_lr_was_reached() -> None:
    lrs = rising(100, 1e-6, 1.0)
    falls = valley(lrs, 1e-4, 10.0)
    advice = "          the loss was still falling there: try a larger --highest"
    found = propose(lrs, [seed_curve(falls)])
    assert found.is_still_falling
    assert lr_range_lines(found, "lr")[3:] == [advice]
    cut = propose(lrs, [seed_curve(falls[:90], "diverged")])
    assert cut.low is not None
    assert not cut.is_still_falling
    assert lr_range_lines(cut, "lr")[3:] == ["seeds     1 diverged at lr 2.5e-01"]
    inside = propose(lrs, [seed_curve(valley(lrs, 1e-4, 1e-1))])
    assert not inside.is_still_falling


def test_nothing_to_propose_says_how_much_noise_there_is() -> None:
    lrs = rising(100, 1e-6, 1.0)
    found = replace(propose(lrs, [seed_curve([2.0] * 100)]), fall=0.05, noise=0.1)
    assert lr_range_lines(found, "lr") == [
        "lr        nothing to propose: the loss fell by 0.05, and noise alone can cause a fall of "
        "0.1; give --steps or --seeds a larger number"
    ]


@pytest.mark.parametrize(("steps", "length"), [(20, 2), (20, 9), (100, 24)])
def test_a_test_that_diverges_at_once_says_where(steps: int, length: int) -> None:
    lrs = rising(steps, 1e-2, 1.0)
    other = seed_curve([2.0] * (length - 1), "blew up")
    found = propose(lrs, [seed_curve([2.0] * length, "diverged"), other])
    first, last = f"{lrs[length - 2]:.1e}", f"{lrs[length - 1]:.1e}"
    assert lr_range_lines(found, "lr") == [
        f"lr        nothing to propose: the training diverged at lr {first}, before the loss fell; "
        "lower --lowest",
        f"seeds     1 diverged at lr {last}; 1 blew up at lr {first}"
        + ("; the curve is the mean of the 1 that got furthest" if found.averaged == 1 else ""),
    ]


def test_a_test_that_goes_far_enough_did_not_diverge_at_once() -> None:
    lrs = rising(100, 1e-2, 1.0)
    assert not propose(lrs, [seed_curve([2.0] * 25, "diverged")]).ended_at_once
    assert not propose(lrs[:8], [seed_curve([2.0] * 8)]).ended_at_once
    flat = [seed_curve([2.0] * 100), seed_curve([2.0] * 5, "diverged")]
    assert not propose(lrs, flat).ended_at_once
    assert propose(lrs, flat[:1] + flat[1:] * 2).ended_at_once


def test_where_each_seed_ended_is_told() -> None:
    lrs = rising(101, 1e-6, 1.0)
    falls = valley(lrs, 1e-4, 1e-2)
    curves = [seed_curve(falls), seed_curve(falls[:20], "diverged"), seed_curve(falls)]
    assert lr_range_lines(propose(lrs, curves), "lr")[-1] == (
        "seeds     1 diverged at lr 1.4e-05; 2 reached the end; the curve is the mean of the 2 "
        "that got furthest"
    )
