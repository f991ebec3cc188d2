"""TensorBoard, and a tracker that does nothing.

The event files are a cache of the trial's history: a resumed trial rewrites them from it, so
no step is ever in them twice. Ray's own TensorBoard logger is off (sweep.py). If a file cannot be
written, there is one warning, and the training continues without it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import hparams, scalar
from tensorboardX.summary import text as text_summary

from tuneapp.checkpoint import Row
from tuneapp.config import RunSettings, is_better

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Records a trial's epochs."""

    def epoch(self, row: Row) -> None:
        """Record the metrics of one epoch."""

    def close(self) -> None:
        """Write what is buffered."""


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
        text: Markdown about the data; may be empty.
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
        """Rewrite the event file in `folder`, with the epochs of `history` in it."""
        # Not tensorboardX's SummaryWriter: it writes from its own thread, through a queue that is
        # lost in a kill and blocks forever once a full disk has ended the thread.
        self._folder = folder
        self._file: EventsWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._file = EventsWriter(str(folder / "events"))
        except OSError as error:
            self._give_up(error)
        self._tags: dict[str, str] = {}
        self._metric, self._mode = settings.metric, settings.mode
        self._best: float | None = None
        # HParams shows the newest value of a tag, so its tag is the running best.
        self._best_tag = f"best/{self._metric}"
        plain = {name: _as_hparam(value) for name, value in params.items()}
        experiment, start, _ = hparams(plain, {self._tag(self._best_tag): 0.0})
        for summary in (experiment, start):
            self._add(summary, None)
        if text:
            self._add(text_summary("data", text), 0)
        for row in history:
            self.epoch(row)

    def epoch(self, row: Row) -> None:
        """Write every number of `row` at its epoch, and the best value up to it."""
        epoch = row["epoch"]
        for name, value in row.items():
            if name != "epoch":
                self._add(scalar(self._tag(name), value), epoch)
        if is_better(row[self._metric], self._best, self._mode):
            self._best = row[self._metric]
        self._add(scalar(self._tag(self._best_tag), self._best), epoch)
        self._attempt(lambda file: file.flush())

    def close(self) -> None:
        """Close the event file."""
        self._attempt(lambda file: file.close())
        self._file = None

    def _tag(self, name: str) -> str:
        """Return the tag of a metric: few characters are allowed, and each metric needs its own."""
        if name not in self._tags:
            tag = clean = scalar(name, 0.0).value[0].tag
            number = 1
            while tag in self._tags.values():
                number += 1
                tag = f"{clean}_{number}"
            self._tags[name] = tag
        return self._tags[name]

    def _add(self, summary: Any, step: int | None) -> None:
        event = Event(summary=summary, wall_time=time.time(), step=step)
        self._attempt(lambda file: file.write_event(event))

    def _attempt(self, act: Callable[[Any], object]) -> None:
        if self._file is None:
            return
        try:
            act(self._file)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # it tries to write what it still holds
                file.close()
        log.warning(
            "%s: TensorBoard's file cannot be written (%s); the training continues without it, and "
            "epochs.csv has every number",
            self._folder,
            error.strerror or error,
        )


def _as_hparam(value: Any) -> bool | int | float | str:
    """Return a value as TensorBoard's files can hold it: 64 bits, and text in UTF-8."""
    if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")
