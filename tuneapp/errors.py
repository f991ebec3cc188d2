"""Every error that tuneapp raises on purpose.

    TuneappError
    ├── ConfigError        a value of a configuration, a flag or a setting
    ├── SpaceError         a search-space file
    ├── DataError          the images, their folders, their split
    ├── WeightsError       pretrained weights: not to be had, damaged, of another network
    ├── CheckpointError    a checkpoint that is damaged or belongs to another configuration
    ├── RunError           a run directory or its ledger
    └── TrialError         a trial that cannot go on; the sweep does
        ├── Diverged           its loss left the finite numbers
        └── AppliedValueError  it trains with something else than was asked

A message names what the user wrote, what is allowed, and the way out. The command line prints it
as one line and exits with 2; anything that is not a `TuneappError` is a bug of ours and keeps its
traceback.
"""

import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class TuneappError(Exception):
    """An expected error: its message is written for the user."""


class ConfigError(TuneappError, ValueError):
    """A value of a configuration, a flag or a setting is not allowed."""


class SpaceError(TuneappError, ValueError):
    """A search-space file cannot be read, or cannot be what it says."""


class DataError(TuneappError):
    """The images cannot be trained on as they are."""


class WeightsError(TuneappError):
    """Pretrained weights cannot be had, are damaged, or belong to another network."""


class CheckpointError(TuneappError):
    """A checkpoint is damaged, or belongs to another configuration."""


class RunError(TuneappError):
    """A run directory or its ledger is missing, in use or damaged."""


class TrialError(TuneappError):
    """A trial cannot go on."""


class Diverged(TrialError):  # noqa: N818 - it is what happened, and the state that a trial gets
    """The loss, or another number of an epoch, became NaN or infinite."""

    def __init__(self, epoch: int, step: int, value: float, what: str = "loss") -> None:
        super().__init__(epoch, step, value, what)
        self.epoch, self.step, self.value, self.what = epoch, step, value, what

    def __str__(self) -> str:
        return f"{self.what} became {self.value} in epoch {self.epoch}, step {self.step}"


class AppliedValueError(TrialError):
    """What the trial would train with is not what was asked."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the near miss of `word` among `known`, else nothing."""
    by_lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), list(by_lower), n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def say_cause(error: Exception) -> str:
    """Return the kind of an error, its first line, and where in the code it arose."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    first_line = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {first_line} ({Path(last.filename).name}:{last.lineno})"
