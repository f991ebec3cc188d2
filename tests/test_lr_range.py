import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tuneapp.lr_range as lr_range
from tuneapp.cli import main
from tuneapp.config import Cosine, OneCycle, RunSettings, Sgd, TrialConfig
from tuneapp.data.batches import Batch
from tuneapp.data.examples import ImageSet
from tuneapp.display import lr_range_lines
from tuneapp.errors import ConfigError, Diverged
from tuneapp.figures import draw_lr_range
from tuneapp.lr_range import LrRange, find_lr_range, propose, smooth
from tuneapp.training import Training, TrialRun


def rising(steps: int, lowest: float, highest: float) -> list[float]:
    return [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]


# --- Reading the curve ----------------------------------------------------------------------------


def test_smoothing_is_the_mean_of_two_neighbours_to_each_side() -> None:
    assert smooth([6.0, 0.0, 3.0, 9.0, 12.0, 0.0]) == pytest.approx(
        [9 / 3, 18 / 4, 30 / 5, 24 / 5, 24 / 4, 21 / 3]
    )


def test_a_longer_test_is_smoothed_over_more_steps() -> None:
    spike = [0.0] * 200
    spike[100] = 17.0
    assert [i for i, v in enumerate(smooth(spike)) if v > 0] == list(range(92, 109))
    assert smooth(spike)[100] == pytest.approx(1.0)


def valley(lrs: list[float], start: float, bottom: float) -> list[float]:
    """Flat at 2 up to `start`, straight down over log(lr) to 1 at `bottom`, and up as fast."""

    def loss(lr: float) -> float:
        if lr <= start:
            return 2.0
        if lr <= bottom:
            return 2.0 - math.log(lr / start) / math.log(bottom / start)
        return 1.0 + math.log(lr / bottom) / math.log(bottom / start)

    return [loss(lr) for lr in lrs]


def test_the_proposed_range_is_where_the_loss_falls() -> None:
    lrs = rising(301, 1e-6, 1.0)  # 50 steps in each decade
    found = propose(lrs, [valley(lrs, 1e-4, 1e-2)])
    assert found.low is not None
    assert found.high is not None
    assert found.steepest is not None
    # A tenth of the fall is at 10 ** -3.8, the bottom at 10 ** -2; smoothing rounds the corners.
    assert math.log10(found.low) == pytest.approx(-3.8, abs=0.1)
    assert math.log10(found.high) == pytest.approx(-2.0, abs=0.1)
    assert found.low <= found.steepest < found.high


def test_the_seeds_are_averaged_over_the_steps_that_all_of_them_reached() -> None:
    lrs = rising(20, 1e-4, 1.0)
    first, second = [float(i) for i in range(20)], [3.0 * i for i in range(12)]
    found = propose(lrs, [first, second])
    assert found.lrs == tuple(lrs[:12])
    assert found.losses == (tuple(first[:12]), tuple(second))
    assert found.smoothed == pytest.approx(smooth([2.0 * i for i in range(12)]))


def test_a_loss_that_never_falls_proposes_nothing() -> None:
    lrs = rising(50, 1e-4, 1.0)
    found = propose(lrs, [[1.0 + i for i in range(50)]])
    assert (found.low, found.high, found.steepest) == (None, None, None)


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
    assert second.losses[0] == pytest.approx(first.losses[0], rel=1e-6)


def test_each_seed_is_another_draw_and_the_whole_can_be_repeated(
    config: TrialConfig, run: TrialRun
) -> None:
    first = find_lr_range(config, run, steps=6, seeds=3)
    assert len(set(first.losses)) == 3
    assert find_lr_range(config, run, steps=6, seeds=3) == first


def test_everything_is_left_as_it_was(config: TrialConfig, run: TrialRun, tmp_path: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.randn(4)
    torch.manual_seed(5)
    torch.set_num_threads(2)
    find_lr_range(config, replace(run, folder=tmp_path / "trial"), steps=4, seeds=2)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.randn(4), wanted)
    assert list(tmp_path.iterdir()) == []


def test_a_seed_ends_where_it_diverges_or_blows_up(
    config: TrialConfig, run: TrialRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = [iter([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 99.0, 99.0]), iter([2.0, 1.0, 1.5, math.nan])]

    def step(training: Training, batch: Batch, config: TrialConfig) -> float:
        loss = next(scripts[config.seed])
        if math.isnan(loss):
            raise Diverged(1, 1, loss)
        return loss

    monkeypatch.setattr(lr_range, "_step", step)
    curves = [lr_range._one_seed(replace(config, seed=s), run, rising(8, 1e-4, 1)) for s in (0, 1)]
    assert curves == [[2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 99.0], [2.0, 1.0, 1.5]]


def test_the_loss_of_an_easy_task_falls_and_then_explodes(
    config: TrialConfig, run: TrialRun
) -> None:
    found = find_lr_range(config, run, steps=40, seeds=2, lowest=1e-5, highest=1e3)
    assert found.low is not None
    assert found.high is not None
    assert 1e-5 < found.low < found.high < 1e2


# --- What is shown --------------------------------------------------------------------------------


def test_the_figure_is_a_png_with_both_curves_and_the_range(tmp_path: Path) -> None:
    lrs = rising(60, 1e-6, 1.0)
    losses = valley(lrs, 1e-4, 1e-2)
    found = LrRange(tuple(lrs), (tuple(losses),), tuple(losses), 2e-4, 1e-2, 1e-3)
    draw_lr_range(found, "a title", tmp_path / "a.png")
    draw_lr_range(replace(found, low=None, high=None, steepest=None), "", tmp_path / "b.png")
    first, second = (
        np.asarray(Image.open(tmp_path / name).convert("RGB"), dtype=int)
        for name in ("a.png", "b.png")
    )
    assert first.shape == (675, 1200, 3)

    def pixels(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
        return int((abs(picture - colour).sum(axis=2) < 12).sum())

    blue, orange = (31, 119, 180), (255, 127, 14)
    assert pixels(first, blue) > 1000
    assert pixels(first, orange) > 100
    assert pixels(second, orange) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--steps", "3"], "--steps 3: must be at least 10"),
        (["--lowest", "1", "--highest", "0.1"], "--lowest 1 --highest 0.1: must rise"),
        (["--lowest", "0"], "must rise, from above 0"),
        (["--output", "curve.pdf"], "--output curve.pdf: must be a .png file"),
        (["--output", "nowhere/curve.png"], "in a folder that exists"),
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


def test_a_seed_without_any_finite_loss_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"not finite at the lowest learning rate, 1e-06"):
        propose(rising(10, 1e-6, 1.0), [[], [2.0] * 10])


def test_the_proposed_bounds_are_never_the_same() -> None:
    lrs = tuple(rising(20, 1e-4, 1e-1))
    found = LrRange(lrs, ((1.0,) * 20,), (1.0,) * 20, 1.6e-3, 2.4e-3, 2e-3)
    assert lr_range_lines(found, "lr")[1].endswith('("lr", 1.6e-03, 2.4e-03, log=True)')
