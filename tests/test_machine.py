import os
import re
from pathlib import Path

import pytest

from tuneapp import machine
from tuneapp.config import RunSettings
from tuneapp.errors import ConfigError
from tuneapp.machine import memory_bytes, num_cores, share_machine

GB = 2**30


@pytest.fixture
def has(monkeypatch):
    """Return a maker of machines."""

    def make(cores=4, gpus=0, memory=64 * GB):
        monkeypatch.setattr(machine, "num_cores", lambda: cores)
        monkeypatch.setattr(machine, "memory_bytes", lambda: memory)
        monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)

    return make


def shared(trials=16, concurrent=None, device="auto", **each):
    return share_machine(RunSettings(device=device), trials, concurrent, **each)


@pytest.mark.parametrize(
    ("cores", "trials", "concurrent", "cpus", "slots"),
    [
        (4, 16, None, None, (4, 1, 0.0)),
        (4, 3, None, None, (3, 1, 0.0)),  # no more at once than there are
        (4, 2, None, None, (2, 2, 0.0)),
        (4, 1, None, None, (1, 4, 0.0)),
        (4, 16, 1, None, (1, 4, 0.0)),
        (4, 16, 3, None, (3, 1, 0.0)),
        (4, 16, 4, None, (4, 1, 0.0)),
        (1, 16, None, None, (1, 1, 0.0)),
        (8, 16, None, 1, (8, 1, 0.0)),
        (8, 16, None, 2, (4, 2, 0.0)),
        (8, 16, None, 3, (2, 3, 0.0)),
        (8, 16, None, 5, (1, 5, 0.0)),
        (8, 16, None, 8, (1, 8, 0.0)),
        (8, 3, None, 2, (3, 2, 0.0)),
        (8, 16, 2, 2, (2, 2, 0.0)),
        (8, 16, 4, 2, (4, 2, 0.0)),
        (8, 16, 2, 4, (2, 4, 0.0)),
        (8, 1, 4, 2, (4, 2, 0.0)),  # what was said is done
    ],
)
def test_cores_are_shared_out(has, cores, trials, concurrent, cpus, slots):
    has(cores)
    assert shared(trials, concurrent, cpus_per_trial=cpus) == slots


@pytest.mark.parametrize(
    ("memory", "cpus", "slots"),
    [
        (64 * GB, None, (8, 1, 0.0)),
        (6 * GB, None, (3, 2, 0.0)),
        (6 * GB - 1, None, (2, 4, 0.0)),
        (1 * GB, None, (1, 8, 0.0)),  # one at the least
        (6 * GB, 2, (3, 2, 0.0)),
        (6 * GB, 4, (2, 4, 0.0)),
    ],
)
def test_without_a_wish_no_more_run_at_once_than_memory_has_room_for(has, memory, cpus, slots):
    has(8, memory=memory)
    assert shared(cpus_per_trial=cpus) == slots
    assert shared(concurrent=4, cpus_per_trial=2) == (4, 2, 0.0)


@pytest.mark.parametrize(
    ("gpus", "concurrent", "cpus", "share", "slots"),
    [
        (1, None, None, None, (1, 8, 1.0)),
        (2, None, None, None, (2, 4, 1.0)),
        (2, 1, None, None, (1, 8, 1.0)),
        (2, 3, None, None, (3, 2, 0.5)),
        (2, 4, None, None, (4, 2, 0.5)),
        (2, 5, None, None, (5, 1, 1 / 3)),
        (1, 4, None, None, (4, 2, 0.25)),
        (1, None, None, 1.0, (1, 8, 1.0)),
        (1, None, None, 0.5, (2, 4, 0.5)),
        (1, None, None, 0.3, (3, 2, 0.3)),
        (2, None, None, 0.25, (8, 1, 0.25)),
        (1, None, 3, 0.25, (2, 3, 0.25)),
        (4, None, 4, None, (2, 4, 1.0)),
        (1, 2, None, 0.25, (2, 4, 0.25)),
        (1, 2, 1, 0.5, (2, 1, 0.5)),
    ],
)
def test_gpus_are_shared_out(has, gpus, concurrent, cpus, share, slots):
    has(8, gpus)
    assert shared(16, concurrent, cpus_per_trial=cpus, gpus_per_trial=share) == slots


def test_more_gpus_than_cores_are_all_used(has):
    has(2, gpus=4)
    assert shared() == (4, 1, 1.0)
    assert shared(concurrent=4) == (4, 1, 1.0)


def test_on_the_cpu_gpus_are_left_alone(has):
    has(4, gpus=2)
    assert shared(device="cpu") == (4, 1, 0.0)
    assert shared(device="cuda") == (2, 2, 1.0)


def require_fits(cores, gpus, slots, cpus, share):
    """Count what the trials take, as Ray does: a share lies on a single GPU."""
    assert slots >= 1
    assert cpus >= 1
    assert slots * cpus <= max(cores, gpus)
    if share:
        assert slots <= gpus * int(1 / share + 1e-9)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
def test_what_is_given_out_is_there(has, cores, gpus):
    has(cores, gpus)
    for trials in (1, 2, 5, 100):
        require_fits(cores, gpus, *shared(trials))
        for concurrent in range(1, max(cores, gpus) + 1):
            given = shared(trials, concurrent)
            assert given[0] == concurrent
            require_fits(cores, gpus, *given)
        for cpus in range(1, cores + 1):
            given = shared(trials, cpus_per_trial=cpus)
            assert given[1] == cpus
            require_fits(cores, gpus, *given)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.2, 1 / 3, 1.0])
@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_shares_of_gpus_that_are_given_out_are_there(has, gpus, share):
    has(64, gpus)
    given = shared(100, gpus_per_trial=share)
    assert given[2] == share
    require_fits(64, gpus, *given)
    assert given[0] == gpus * round(1 / share)


def test_what_is_left_of_two_gpus_makes_no_share(has):
    has(64, gpus=2)
    require_fits(64, 2, *shared(100, gpus_per_trial=0.4))


def test_small_shares_of_a_gpu_are_no_more_than_there_are_cores(has):
    has(4, gpus=1)
    assert shared(100, gpus_per_trial=0.05) == (4, 1, 0.05)


def test_more_trials_at_once_than_shares_of_gpus_are_refused(has):
    has(8, gpus=1)
    with pytest.raises(ConfigError, match="--concurrent 8"):
        shared(concurrent=8, gpus_per_trial=0.5)


@pytest.mark.parametrize(
    ("cores", "gpus", "asked", "said"),
    [
        (4, 0, {"concurrent": 5}, r"--concurrent 5: .* 4 CPU cores and 0 GPUs.*; use 1 to 4"),
        (4, 8, {"concurrent": 9}, r"--concurrent 9: .* 4 CPU cores and 8 GPUs.*; use 1 to 8"),
        (4, 0, {"concurrent": 0}, r"--concurrent 0: must be at least 1"),
        (4, 0, {"concurrent": -2}, r"--concurrent -2: must be at least 1"),
        (4, 0, {"cpus_per_trial": 5}, r"--cpus-per-trial 5: .* 4 CPU cores"),
        (4, 0, {"cpus_per_trial": 0}, r"--cpus-per-trial 0: .* 4 CPU cores"),
        (4, 0, {"cpus_per_trial": -1}, r"--cpus-per-trial -1: .* 4 CPU cores"),
        (
            8,
            0,
            {"concurrent": 3, "cpus_per_trial": 4},
            r"--concurrent 3: .* 8 CPU cores.* 2 such trials; use 1 to 2",
        ),
        (4, 1, {"gpus_per_trial": 2}, r"--gpus-per-trial 2: .* 1 GPU"),
        (4, 0, {"gpus_per_trial": 0.5}, r"--gpus-per-trial 0.5: .* 0 GPU"),
        (4, 4, {"gpus_per_trial": 2}, r"--gpus-per-trial 2: .* on one GPU; use 1, or a share"),
        (4, 4, {"gpus_per_trial": 1.5}, r"--gpus-per-trial 1.5: .* on one GPU"),
        (4, 1, {"gpus_per_trial": 0}, r"--gpus-per-trial 0: .* use 1, or a share"),
        (4, 1, {"gpus_per_trial": -0.5}, r"--gpus-per-trial -0.5: .* use 1, or a share"),
        (4, 1, {"gpus_per_trial": float("nan")}, r"--gpus-per-trial nan: "),
        (4, 0, {"device": "cuda"}, r"--device cuda: this machine has no GPU"),
    ],
)
def test_what_the_machine_cannot_give_is_refused_with_what_was_written_and_what_is_there(
    has, cores, gpus, asked, said
):
    has(cores, gpus)
    with pytest.raises(ConfigError) as caught:
        shared(**asked)
    assert re.search(said, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("", 8),
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),  # half a core is one that is slow
        ("9900000 100000", 8),
    ],
)
def test_in_a_container_its_own_cores_count(monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "_cgroup", {"cpu.max": limit}.get)
    assert num_cores() == cores


def test_where_nobody_can_say_which_cores_all_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # macOS
    monkeypatch.setattr(machine, "_cgroup", lambda name: "")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert num_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == 1


def test_in_a_container_its_own_memory_counts(monkeypatch):
    there = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    for limit, found in (("", there), ("max", there), (str(GB), GB), (str(2**60), there)):
        monkeypatch.setattr(machine, "_cgroup", {"memory.max": limit}.get)
        assert memory_bytes() == pytest.approx(found, rel=0.02)


def test_a_machine_without_control_groups_has_no_limit():
    assert machine._cgroup("no such limit") == ""
