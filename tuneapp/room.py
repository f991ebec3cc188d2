"""Room on the disk: how much there is, whether an error was caused by its lack, waiting for it.

The error for a full disk depends on the writer. Python's own files raise an OSError with its errno;
so does `torch.save` into an open file, as the context of a RuntimeError. `torch.save` to a path
raises only a RuntimeError, and the cause is lost.
"""

import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)  # not EFBIG: waiting makes no file smaller
_WORDS_OF_TORCH = ("unexpected pos", "iostream error", "PytorchStreamWriter failed writing")
LARGEST_CHECKPOINT_BYTES = 12 * 10**9
"""Of torchvision's largest classifier: 645 million float32, their average and Adam's moments."""
MORE_BYTES = 10**6
"""With this much more room than at the last failure, another attempt is made."""
PATIENCE = 12
"""Pauses after which another attempt is made anyway: others may have removed what they wrote."""
_UNITS = ("B", "KB", "MB", "GB", "TB")


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free where `folder` is, or will be."""
    for existing in (folder.absolute(), *folder.absolute().parents):
        try:
            return shutil.disk_usage(existing).free
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether an error, or a cause of it, says that the disk or a quota is full.

    Args:
        error: as it was raised.
        folder: into which was written. An error that does not name its cause counts only if less is
            free than a checkpoint can need. (The disk need not be full any more: the remains of the
            failed write have often been removed by now.)
    """
    return any(_says_full(each, folder) for each in _chain(error))


def write_patiently(
    folder: Path,
    floor: int,
    write: Callable[[], None],
    say: Callable[[str], None],
    *,
    pause_s: float = 5.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Write; if there is no room, wait until there is, however long that takes.

    After a failure, the next attempt waits until more is free than before it: each attempt fills
    the disk for a moment, for all processes that write to it.

    Args:
        folder: into which is written.
        floor: bytes that must be free before an attempt.
        write: may be called several times.
        say: is called once with a line that it waits, and once with a line that it continues.
        pause_s: least seconds between two checks of the disk, and between two attempts.
        sleep: waits for a number of seconds.
    """
    needed, pauses_left, has_waited = floor, 0, False
    while True:
        free = free_bytes(folder)
        if free >= needed or (free >= floor and pauses_left <= 0):
            if _attempt(write, folder):
                break
            free = free_bytes(folder)
            needed, pauses_left = max(floor, free + MORE_BYTES), PATIENCE
        if not has_waited:
            say(_say_lack(free, floor, folder))
            has_waited = True
        # At random times: trials that failed together would fail together again.
        sleep(random.SystemRandom().uniform(pause_s, 1.5 * pause_s))
        pauses_left -= 1
    if has_waited:
        say(f"disk      {say_bytes(free_bytes(folder))} free on {folder}: continuing")


def say_bytes(count: int) -> str:
    """Return a number of bytes in words: `1.5 GB`, `0.2 GB`, `12 KB`; units are powers of ten."""
    if count < 100:
        return f"{count} B"
    power = 1
    while power < len(_UNITS) - 1 and count >= 100 * 1000**power:
        power += 1
    value = count / 1000**power
    return f"{value:.3g} {_UNITS[power]}" if value < 1000 else f"{value:.0f} {_UNITS[power]}"


def _attempt(write: Callable[[], None], folder: Path) -> bool:
    """Write; return whether there was room. Any other error is raised."""
    try:
        write()
    except Exception as error:
        if is_full(error, folder):
            return False
        raise
    return True


def _say_lack(free: int, floor: int, folder: Path) -> str:
    there_is = f"disk      {say_bytes(free)} free on {folder}"
    if free < floor:
        return f"{there_is}: waiting for {say_bytes(floor)}"
    return f"{there_is}: too little, or a quota is used up; waiting for more"


def _says_full(error: BaseException, folder: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    if not isinstance(error, RuntimeError):
        return False
    words = str(error)
    if any(os.strerror(number) in words for number in _FULL):
        return True
    is_torchs = any(each in words for each in _WORDS_OF_TORCH)
    return is_torchs and free_bytes(folder) < LARGEST_CHECKPOINT_BYTES


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and all of its causes, each once."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and not any(each is known for known in found):
            found.append(each)
            waiting += [each.__cause__, each.__context__]
    return found
