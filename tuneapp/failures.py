"""Why a trial did not finish: the kind of failure, what is at fault, what helps, what happens next.

    kind             at fault           state of the trial
    diverged         the configuration  `diverged`; the search gets the worst value seen
    out of memory    the configuration  `failed`; for the search, it is infeasible
    data             the images         `failed`
    bug              the code           `failed`; the same one in the first three ends the sweep
    stalled          the machine        ended, and `failed`: it reported nothing for too long
    process died     the machine        retried from its last checkpoint; `failed` after retries
    node lost        the machine        likewise
    disk full        the disk           waits for room; `failed` only where it could not wait
    refused          the space          `failed`: some values of the space are no configuration

The time limit of a sweep and a stop by the user (Ctrl-C, SIGTERM) are not failures: they leave
trials `unfinished`, which `resume` continues.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tuneapp.errors import DataError, Diverged, say_cause
from tuneapp.room import is_full

Kind = Literal[
    "diverged",
    "out of memory",
    "data",
    "bug",
    "stalled",
    "process died",
    "node lost",
    "disk full",
    "refused",
]
KINDS: tuple[str, ...] = get_args(Kind)

MAX_RETRIES = 2
"""Retries of a trial after temporary failures, in a row without a new epoch in between."""

_KNOWN_AFTER = ("diverged", "out of memory", "data", "bug", "refused")

_AT_FAULT = {
    "diverged": "the configuration",
    "out of memory": "the configuration",
    "data": "the images",
    "bug": "the code",
    "stalled": "the machine",
    "process died": "the machine",
    "node lost": "the machine",
    "disk full": "the disk",
    "refused": "the space",
}
_HINTS = {
    "diverged": "smaller learning rates, a longer warm-up, or clip_norm",
    "out of memory": "a smaller batch_size or image_size, more accumulation_steps, or fewer trials "
    "at once (--concurrent)",
    "data": "`python -m tuneapp doctor` finds what is wrong with images",
    "bug": "the traceback is in the trial's error.txt",
    "stalled": "its log.txt shows what it was doing; check what on the machine it waited for",
    "process died": "check its log.txt, and the kernel's log for what ended it",
    "node lost": "check the machine on which it ran",
    "disk full": "free some disk space, then `resume`",
    "refused": "restrict the space to values that build a configuration",
}


@dataclass(frozen=True)
class Failure:
    """What ended a trial early.

    Attributes:
        kind: one of `KINDS`.
        cause: what happened, in one line.
        can_pass: whether a retry of the same trial may succeed.
    """

    kind: str
    cause: str
    can_pass: bool = False

    @property
    def state(self) -> Literal["diverged", "failed"]:
        """The state of the trial, if it is not retried."""
        return "diverged" if self.kind == "diverged" else "failed"


def at_fault(kind: str) -> str:
    """Return what is at fault, in words."""
    return _AT_FAULT.get(kind, "the trial")


def hint(kind: str) -> str:
    """Return what helps, in words."""
    return _HINTS.get(kind, "look at its log.txt")


def would_repeat(kind: str) -> bool:
    """Whether the same configuration would fail in the same way, so that a retry is useless."""
    return kind in _KNOWN_AFTER


def classify(error: BaseException, folder: Path) -> Failure:
    """Return the failure that an error of a trial stands for.

    Args:
        error: as it was raised.
        folder: of the trial, to find out whether its disk is full.
    """
    if isinstance(error, Diverged):
        return Failure("diverged", str(error))
    kind = _kind_of(error, folder)
    return Failure(kind, say_cause(error), can_pass=kind in ("disk full", "process died"))


def _kind_of(error: BaseException, folder: Path) -> Kind:
    if _is_out_of_memory(error):
        return "out of memory"
    if is_full(error, folder):
        return "disk full"
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return "process died"
    return "data" if isinstance(error, DataError) else "bug"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the host could not be allocated.

    torch has its own error for a device; for host memory, its allocator raises a RuntimeError.
    """
    words = str(error).lower()
    refused = (
        "can't allocate memory",
        "out of memory",
        "not enough memory",
        "cannot allocate",
        "alloc_failed",  # of cuBLAS and cuDNN
    )
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    of_torch = isinstance(error, RuntimeError | OSError) and any(w in words for w in refused)
    return named or of_torch
