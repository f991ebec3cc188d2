"""Why a trial did not finish: what it was, what is at fault, what helps, what becomes of it.

    kind             at fault           what becomes of the trial
    diverged         the configuration  `diverged`; the search is told the worst value seen
    out of memory    the configuration  `failed`; the search is told that it is infeasible
    data             the images         `failed`
    bug              the code           `failed`; the same one in the first three ends the sweep
    stalled          the machine        ended, and `failed`: nothing was heard of it for too long
    process died     the machine        tried again from its last checkpoint; `failed` at last
    node lost        the machine        likewise
    disk full        the disk           waits for room; `failed` only where it could not wait
    refused          the space          `failed`: a corner of the space builds no configuration

The time limit of a sweep and a stop by the user (Ctrl-C, SIGTERM) are no failures: they leave
trials `unfinished`, which `resume` goes on with.
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
"""How often in a row, without a new epoch between, a trial is tried again for what can pass."""

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
    "stalled": "look at its log.txt for what it was doing, and at the machine for what it waited",
    "process died": "look at its log.txt, and at the kernel's log for what ended it",
    "node lost": "look at the machine that it ran on",
    "disk full": "make room, then `resume`",
    "refused": "let the space ask for values that it can use",
}


@dataclass(frozen=True)
class Failure:
    """What ended a trial before its time.

    Attributes:
        kind: one of `KINDS`.
        cause: what happened, in a line.
        can_pass: whether the same trial, tried again, may well succeed.
    """

    kind: str
    cause: str
    can_pass: bool = False

    @property
    def state(self) -> Literal["diverged", "failed"]:
        """What becomes of the trial, where it is not tried again."""
        return "diverged" if self.kind == "diverged" else "failed"


def at_fault(kind: str) -> str:
    """Return what is at fault, in words."""
    return _AT_FAULT.get(kind, "the trial")


def hint(kind: str) -> str:
    """Return what helps, in words."""
    return _HINTS.get(kind, "look at its log.txt")


def would_repeat(kind: str) -> bool:
    """Whether the same configuration would end in the same way: it need not be run again."""
    return kind in _KNOWN_AFTER


def classify(error: BaseException, folder: Path) -> Failure:
    """Return what an error that a trial raised comes to.

    Args:
        error: as it was raised.
        folder: the trial's, to know whether its disk is full.
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
    """Whether memory was refused, of the device or of the host.

    torch has its own error for a device; of the host's memory its allocator raises a RuntimeError.
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
