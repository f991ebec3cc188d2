"""Figures as PNG files, drawn without a display."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuneapp.lr_range import LrRange, reach_of

MARKERS = {"diverged": "x", "blew up": "^", "reached the end": ""}


def draw_lr_range(found: LrRange, title: str, params: str, file: Path) -> None:
    """Draw the loss over the learning rate, and the bounds that are proposed.

    Args:
        found: the curves.
        title: model, steps and seeds.
        params: what was trained, in small letters.
        file: where the PNG goes.

    Raises:
        OSError: it cannot be written.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    bottom, top = _loss_limits(found)
    _draw_curves(axes, found, top)
    if found.low is not None and found.high is not None:
        words = f"search from {found.low:.1e} to {found.high:.1e}"
        axes.axvspan(found.low, found.high, color="C0", alpha=0.15, linewidth=0, label=words)
        for lr, side, words in (
            (found.low, "right", f"{found.low:.1e} "),
            (found.high, "left", f" {found.high:.1e}"),
        ):
            height = bottom + 0.03 * (top - bottom)
            axes.text(lr, height, words, ha=side, color="C0", fontsize=11, fontweight="bold")
    if found.steepest is not None:
        words = f"steepest at {found.steepest:.1e}"
        axes.axvline(found.steepest, color="C1", linestyle="--", label=words)
    axes.set_xscale("log")
    axes.set_xlim(found.lrs[0], found.lrs[-1])
    axes.set_ylim(bottom, top)
    axes.set_xlabel("learning rate of the head (each stage has its share of it)")
    axes.set_ylabel("training loss")
    # Names of the user's own: a dollar sign is no formula.
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", parse_math=False)
    axes.set_title(
        textwrap.fill(params, 110), loc="left", fontsize=8, color="0.35", parse_math=False
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=3, frameon=False)
    figure.savefig(file, dpi=150)


def _draw_curves(axes: Axes, found: LrRange, top: float) -> None:
    """Draw each seed to its own end, and their mean."""
    total = len(found.curves)
    seeds = f"{total} seeds" if total > 1 else "1 seed"
    for number, curve in enumerate(found.curves):
        lrs = found.lrs[: len(curve.losses)]
        name = "_" if number else seeds  # one entry of the legend for all of them
        axes.plot(lrs, curve.losses, color="0.7", linewidth=0.8, label=name)
    ended = {curve.end for curve in found.curves if MARKERS[curve.end]}
    for end in sorted(ended):
        curves = [curve for curve in found.curves if curve.end == end and curve.losses]
        axes.plot(
            [found.last_lr(curve) for curve in curves],
            # An end above the picture is marked at its upper edge.
            [min(curve.losses[-1], top) for curve in curves],
            MARKERS[end],
            color="C3",
            markersize=6,
            label=end,
            clip_on=False,
            zorder=3,
        )
    of_some = "" if found.averaged == total else f" of {found.averaged}"
    # At its ends, the smoothed loss repeats its first and last whole window.
    steps, reach = len(found.smoothed), reach_of(len(found.smoothed))
    whole = slice(reach, steps - reach) if steps > 2 * reach else slice(steps)
    mean = f"mean{of_some}, smoothed"
    lrs = found.lrs[:steps][whole]
    axes.plot(lrs, found.smoothed[whole], color="C0", linewidth=2.5, label=mean)


def _loss_limits(found: LrRange) -> tuple[float, float]:
    """Return the losses between which the figure is drawn, so that no explosion flattens it."""
    smallest = found.smoothed.index(min(found.smoothed))
    # Without a fall, the smallest may be the first: a third of the steps is always shown in full.
    shown = max(smallest + 1 + reach_of(len(found.smoothed)), len(found.smoothed) // 3)
    losses = [loss for curve in found.curves for loss in curve.losses[:shown]]
    losses = sorted([*losses, *found.smoothed[:shown]])
    # A spike of one seed does not flatten it, either.
    low, high = losses[0], losses[round(0.99 * (len(losses) - 1))]
    room = 0.15 * (high - low) or 0.1
    return low - room, high + room
