"""Every error that tuneapp raises on purpose.

    TuneappError
    ├── ConfigError        a value of a configuration, a flag or a setting
    ├── SpaceError         a search-space file
    ├── DataError          the images, their folders, their split
    ├── WeightsError       pretrained weights: not available, damaged, of another network
    ├── CheckpointError    a checkpoint that is damaged or belongs to another configuration
    ├── RunError           a run directory or its ledger
    │   ├── RunInUse           another process is working in it (exit code 75)
    │   └── StorageError       it is damaged, or cannot be written to the disk (exit code 5)
    ├── RayDied            Ray's own processes ended under a sweep (exit code 5)
    └── TrialError         a trial that cannot continue; the sweep does
        ├── Diverged           its loss became NaN or infinite
        └── AppliedValueError  it trains with other values than those configured

A message names what the user wrote, what is allowed, and how to fix it. The command line prints it
as one line and exits with the error's `exit_code`; anything that is not a `TuneappError` is a bug
in tuneapp and keeps its traceback.
"""

import re
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
    """A search-space file cannot be read, or defines no valid search space."""


class DataError(TuneappError):
    """The images cannot be trained on as they are."""


class WeightsError(TuneappError):
    """Pretrained weights are not available, are damaged, or belong to another network."""


class CheckpointError(TuneappError):
    """A checkpoint is damaged, or belongs to another configuration."""


class RunError(TuneappError):
    """A run directory or its ledger is missing, in use or damaged."""


class RunInUse(RunError):  # noqa: N818 - it is a state of the run, not a fault
    """Another process is working in the run directory."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class StorageError(RunError):
    """A file on the disk is damaged, or a required file cannot be written."""

    exit_code = 5


class RayDied(TuneappError):  # noqa: N818 - it is what happened
    """Ray's own processes ended while trials ran; resuming the sweep loses nothing."""

    exit_code = 5


class TrialError(TuneappError):
    """A trial cannot continue."""


class Diverged(TrialError):  # noqa: N818 - it is what happened, and the state that a trial gets
    """The loss, or another value of an epoch, became NaN or infinite."""

    def __init__(self, epoch: int, step: int, value: float, what: str = "loss") -> None:
        super().__init__(epoch, step, value, what)
        self.epoch, self.step, self.value, self.what = epoch, step, value, what

    def __str__(self) -> str:
        return f"{self.what} became {self.value} in epoch {self.epoch}, step {self.step}"


class AppliedValueError(TrialError):
    """The trial would train with other values than those configured."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the name in `known` that is nearest to `word`, else ''."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near is not None else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` that `word` most likely misspells, else None."""
    by_lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), list(by_lower), n=1)
    return by_lower[near[0]] if near else None


def first_line(error: BaseException, limit: int = 120, *, named: bool = False) -> str:
    """Return the first line of an error's text, cut to `limit` characters.

    Args:
        error: as it was raised.
        limit: of the text.
        named: put the error's type before the text. This is also done where the text alone means
            nothing: a bare number, or the key of a KeyError. The type replaces an empty text.
    """
    name, text = type(error).__name__, _first_line(error, limit)
    if not text:
        return name
    is_bare = isinstance(error, KeyError) or re.fullmatch(r"[-+\d.]+", text) is not None
    return f"{name}: {text}" if named or is_bare else text


def _first_line(error: BaseException, limit: int) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else ""


def say_cause(error: BaseException) -> str:
    """Return an error's type, its first line, and the file and line of code that raised it.

    Lines of libraries are passed over: the innermost one of the user's modules, the space or
    tuneapp is named. A SyntaxError names its place itself.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _is_of_a_library(f.filename)] or frames
    has_place = bool(own) and not isinstance(error, SyntaxError)
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if has_place else ""
    return f"{type(error).__name__}: {_first_line(error, 200)}{place}"


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
