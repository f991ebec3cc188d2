"""TensorBoard, and its twin that does nothing.

The event files are a cache of the trial's history: a trial that goes on makes them again from it,
so no step is ever in them twice. Ray's own TensorBoard logger is off (sweep.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from tuneapp.checkpoint import Row
from tuneapp.config import RunSettings, is_better


class Tracker(Protocol):
    """What a trial tells of its epochs."""

    def epoch(self, row: Row) -> None:
        """Record the metrics of one epoch."""

    def close(self) -> None:
        """Write what is left."""


class NoTracker:
    """Records nothing."""

    def epoch(self, row: Row) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def open_tracker(
    folder: Path | None,
    params: Mapping[str, Any],
    settings: RunSettings,
    history: Sequence[Row],
    text: str = "",
) -> Tracker:
    """Return a tracker that writes into `folder`; without one, one that does nothing.

    Args:
        folder: of the trial.
        params: for HParams.
        settings: say which metric makes an epoch the best.
        history: rows of the epochs done.
        text: in Markdown, what there is to say of the data; empty for nothing.
    """
    if folder is None:
        return NoTracker()
    return TensorBoardTracker(folder, params, settings, history, text)


class TensorBoardTracker:
    """Writes scalars once per epoch, and the parameters with the best value so far for HParams."""

    def __init__(
        self,
        folder: Path,
        params: Mapping[str, Any],
        settings: RunSettings,
        history: Sequence[Row],
        text: str = "",
    ) -> None:
        """Write the event file in `folder` anew, with the epochs of `history` in it."""
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        # tensorboardX writes from a thread of its own, by default every two minutes.
        self._writer = SummaryWriter(str(folder), flush_secs=1)
        self._metric, self._mode = settings.metric, settings.mode
        self._best: float | None = None
        # HParams shows the newest value of a tag, so the tag that it is given is the running best.
        self._best_tag = f"best/{self._metric}"
        plain = {
            k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in params.items()
        }
        experiment, start, _ = hparams(plain, {self._best_tag: 0.0})
        for summary in (experiment, start):
            self._writer.file_writer.add_summary(summary)
        if text:
            self._writer.add_text("data", text, 0)
        for row in history:
            self.epoch(row)

    def epoch(self, row: Row) -> None:
        """Write every number of `row` at its epoch, and the best value up to it."""
        epoch = row["epoch"]
        for tag, value in row.items():
            if tag != "epoch":
                self._writer.add_scalar(tag, value, epoch)
        if is_better(row[self._metric], self._best, self._mode):
            self._best = row[self._metric]
        self._writer.add_scalar(self._best_tag, self._best, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
