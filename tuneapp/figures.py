"""Figures as PNG files, drawn without a display."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from tuneapp.lr_range import LrRange


def draw_lr_range(found: LrRange, title: str, file: Path) -> None:
    """Draw the loss over the learning rate, and the bounds that are proposed.

    Args:
        found: the curves.
        title: what was trained.
        file: where the PNG goes.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for losses in found.losses:
        axes.plot(found.lrs, losses, color="0.75", linewidth=0.8)
    axes.plot([], [], color="0.75", linewidth=0.8, label=f"{len(found.losses)} seeds")
    axes.plot(found.lrs, found.smoothed, color="C0", linewidth=2, label="mean, smoothed")
    if found.low is not None and found.high is not None:
        words = f"proposed: {found.low:.1e} to {found.high:.1e}"
        axes.axvspan(found.low, found.high, color="C0", alpha=0.12, label=words)
    if found.steepest is not None:
        axes.axvline(found.steepest, color="C1", linestyle="--", label="steepest")
    axes.set_xscale("log")
    # What blows up at the end would press the rest flat.
    smallest, first = min(found.smoothed), found.smoothed[0]
    axes.set_ylim(min(map(min, found.losses)) * 0.9, max(first, smallest) * 1.6)
    axes.set_xlabel("lr (every stage has its share of it)")
    axes.set_ylabel("training loss")
    axes.set_title(textwrap.fill(title, 95), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
