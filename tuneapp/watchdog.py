"""Which processes are alive: trials that are silent for too long, and Ray's own processes.

Ray has no limit on the silence of a trial, and notices the end of its own processes late: it
continues for 14 s without a raylet and ends this process after 60 s without a GCS (ray 2.60,
measured).
"""

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tuneapp.failures import Failure

log = logging.getLogger(__name__)

LEAST_SILENCE_S = 300.0
"""A trial may be silent this long in any case."""
OWN_EPOCHS = 10
"""And for this many times its own slowest epoch,"""
OTHERS_EPOCHS = 30
"""or, in its first one, the slowest epoch of all trials: another network may be much slower."""
PAUSE_S = 30.0
"""From this gap between two checks on, this process itself slept (a suspended laptop, SIGSTOP)."""

_RAY_PROCESSES = ("raylet", "gcs_server")


@dataclass
class _Life:
    """A trial that runs: its process, and when it was last heard of."""

    process: psutil.Process | None
    name: str
    heard: float
    slowest_epoch_s: float = 0.0


class Watchdog:
    """Ends trials that were silent for far longer than their epochs take."""

    def __init__(self) -> None:
        self._lives: dict[str, _Life] = {}
        self._slowest_epoch_s = 0.0
        self._looked = time.monotonic()
        self._silences: dict[str, float] = {}

    def began(self, key: str, pid: int, name: str = "") -> None:
        """Record that a trial runs in this process.

        Args:
            key: of this attempt at it.
            pid: of its process.
            name: its id, for messages; none is the key.
        """
        process = None
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)  # with its start, so that the pid alone decides nothing
        self._lives[key] = _Life(process, name or key, time.monotonic())

    def heard(self, key: str) -> None:
        """Record that a trial has reported an epoch."""
        life = self._lives.get(key)
        if life is None:
            return
        now = time.monotonic()
        life.slowest_epoch_s = max(life.slowest_epoch_s, now - life.heard)
        self._slowest_epoch_s = max(self._slowest_epoch_s, life.slowest_epoch_s)
        life.heard = now

    def ended(self, key: str) -> Failure | None:
        """Record that a trial has stopped running; return why, if it was ended here."""
        self._lives.pop(key, None)
        silence = self._silences.pop(key, None)
        if silence is None:
            return None
        return Failure("stalled", f"nothing was heard of it for {silence:.0f} s; it was ended")

    def look(self, *, excused: bool = False) -> None:
        """End the trials that have been silent for too long.

        Args:
            excused: they have a reason to be silent, such as a full disk.
        """
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        for key, life in self._lives.items():
            if excused or gap > PAUSE_S:  # no trial could be heard
                life.heard = now
            silence, allowed = now - life.heard, self._allowed_s(life)
            if allowed and silence > allowed and life.process is not None:
                log.warning("%s: nothing heard for %.0f s: it is ended", life.name, silence)
                self._silences[key] = silence
                life.heard = now
                with contextlib.suppress(psutil.Error):
                    life.process.kill()

    def _allowed_s(self, life: _Life) -> float:
        """Return how long a trial may be silent; 0 where nothing is known of epochs yet."""
        if life.slowest_epoch_s:
            return max(LEAST_SILENCE_S, OWN_EPOCHS * life.slowest_epoch_s)
        return max(LEAST_SILENCE_S, OTHERS_EPOCHS * self._slowest_epoch_s) * bool(
            self._slowest_epoch_s
        )


def ray_processes() -> dict[str, psutil.Process]:
    """Return Ray's own processes among the children of this one: those that it needs."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name() in _RAY_PROCESSES:
                found[child.name()] = child
    return found


def first_dead(processes: Mapping[str, psutil.Process]) -> str | None:
    """Return the name of the first of these processes that has ended; None while all live."""
    for name, process in processes.items():
        alive = False
        with contextlib.suppress(psutil.NoSuchProcess):
            alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        if not alive:
            return name
    return None


def end_ray_processes() -> None:
    """End Ray processes that remain as children of this process after a failed start or stop."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(f"{os.sep}ray{os.sep}" in w or w.startswith("ray::") for w in child.cmdline()):
                child.kill()


def kernel_memory_kills() -> int:
    """Return how many processes Linux has ended for lack of memory since it booted."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").split("\n"):
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def why_it_died(said: str, memory_kills: int) -> Failure:
    """Return the failure that the sudden end of a trial's process stands for.

    Args:
        said: Ray's message.
        memory_kills: processes that the kernel has ended for lack of memory while it ran.
    """
    if memory_kills or "running low on memory" in said:
        # Another process may have taken the memory: at first the trial is retried.
        return Failure(
            "out of memory", "its process was ended for lack of host memory", can_pass=True
        )
    if "node has died" in said or "node was" in said or "NodeDied" in said:
        return Failure("node lost", "the machine that it ran on was lost", can_pass=True)
    return Failure("process died", "its process died", can_pass=True)
