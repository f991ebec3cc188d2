"""Every error that tuneapp raises on purpose.

    TuneappError
    ├── ConfigError        a value of a configuration, a flag or a setting
    ├── SpaceError         a search-space file
    ├── DataError          the images, their folders, their split
    ├── WeightsError       pretrained weights: not to be had, damaged, of another network
    ├── CheckpointError    a checkpoint that is damaged or belongs to another configuration
    ├── RunError           a run directory or its ledger
    │   ├── RunInUse           another process is working in it (exit code 75)
    │   └── StorageError       it is damaged, or the disk does not take it (exit code 5)
    ├── RayDied            Ray's own processes ended under a sweep (exit code 5)
    └── TrialError         a trial that cannot go on; the sweep does
        ├── Diverged           its loss left the finite numbers
        └── AppliedValueError  it trains with something else than was asked

A message names what the user wrote, what is allowed, and the way out. The command line prints it
as one line and exits with the error's `exit_code`; anything that is not a `TuneappError` is a bug
of ours and keeps its traceback.
"""

import site
import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from pathlib import Path


class TuneappError(Exception):
    """An expected error: its message is written for the user."""

    exit_code = 2


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


class RunInUse(RunError):  # noqa: N818 - it is a state of the run, and no fault
    """Another process is working in the run directory."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class StorageError(RunError):
    """What is on the disk is damaged, or the disk does not take what must be on it."""

    exit_code = 5


class RayDied(TuneappError):  # noqa: N818 - it is what happened
    """Ray's own processes ended while trials ran; a resumed sweep loses nothing."""

    exit_code = 5


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


def say_cause(error: BaseException) -> str:
    """Return the kind of an error, its first line, and the last own line of code before it.

    Own is what lies in no library: the user's modules and space, and tuneapp.
    """
    first_line = (str(error).strip().split("\n") or [""])[0][:200]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _is_of_a_library(f.filename)] or frames
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line}{place}"


@cache
def _libraries() -> tuple[str, ...]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return tuple(str(Path(p).resolve()) for p in [*paths, *site.getsitepackages()] if p)


def _is_of_a_library(file: str) -> bool:
    if file.startswith("<"):
        return True
    path = str(Path(file).resolve())
    ours = str(Path(__file__).resolve().parent)
    return not path.startswith(ours) and path.startswith(_libraries())
