"""What this machine has, and how trials share it."""

import math
import os
from pathlib import Path

import torch

from tuneapp.config import RunSettings
from tuneapp.errors import ConfigError

MEMORY_PER_TRIAL_BYTES = 2 * 2**30
"""Room for torch (about 1 GB in a process), a network and its batches."""


def share_machine(
    settings: RunSettings,
    trials: int,
    concurrent: int | None,
    cpus_per_trial: int | None = None,
    gpus_per_trial: float | None = None,
) -> tuple[int, int, float]:
    """Return trials at once, and CPU threads and GPUs (or a share of one) for each.

    On GPUs: one trial on each, or as many as were asked for sharing them. On CPUs: one core for
    each, limited by memory and trials: two trials on a core each do more than one on two.

    Raises:
        ConfigError: the machine does not have what was asked for.
    """
    cores = num_cores()
    gpus = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if settings.device == "cuda" and gpus == 0:
        raise ConfigError("--device cuda: this machine has no GPU that torch can use; use auto")
    if concurrent is not None and concurrent < 1:
        raise ConfigError(f"--concurrent {concurrent}: must be at least 1")
    _require_gpus(gpus_per_trial, gpus, settings.device)
    if cpus_per_trial is not None and not 1 <= cpus_per_trial <= cores:
        raise ConfigError(f"--cpus-per-trial {cpus_per_trial}: this machine has {cores} CPU cores")

    memory = memory_bytes() // MEMORY_PER_TRIAL_BYTES
    on_gpus = gpus * int(1 / (gpus_per_trial or 1.0))  # a share lies on one GPU
    room = on_gpus or max(1, min(cores, memory))
    most = max(cores, gpus) if cpus_per_trial is None else cores // cpus_per_trial
    if gpus_per_trial is not None:
        most = min(most, on_gpus)
    slots = int(min(room, most, trials) if concurrent is None else concurrent)
    if slots > most:
        raise ConfigError(
            f"--concurrent {slots}: this machine has {cores} CPU cores and {gpus} GPUs, which is "
            f"room for {most} such trials; use 1 to {most}"
        )
    # Ray gives out whole GPUs, or shares of a single one.
    share = 0.0 if gpus == 0 else 1.0 if slots <= gpus else 1 / math.ceil(slots / gpus)
    return slots, cpus_per_trial or max(1, cores // slots), gpus_per_trial or share


def _require_gpus(asked: float | None, gpus: int, device: str) -> None:
    if asked is None:
        return
    if device == "cpu":
        raise ConfigError(f"--gpus-per-trial {asked:g}: with --device cpu no GPU is used")
    if asked > gpus:
        raise ConfigError(
            f"--gpus-per-trial {asked:g}: this machine has {gpus} GPUs that torch can use"
        )
    if not 0 < asked <= 1:
        raise ConfigError(
            f"--gpus-per-trial {asked:g}: a trial trains on one GPU; use 1, or a share such as 0.5"
        )


def num_cores() -> int:
    """Return the CPU cores that this process may use, in a container those of the container."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores


def memory_bytes() -> int:
    """Return the memory of the machine, in a container that of the container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max")
    return min(memory, int(limit)) if limit.isdigit() else memory


def _cgroup(name: str) -> str:
    """Return a limit of the Linux control group that a container sees as its root."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""
