"""Real processes, and a clock of our own."""

import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tuneapp import watchdog
from tuneapp.watchdog import (
    LEAST_SILENCE_S,
    OTHERS_EPOCHS,
    OWN_EPOCHS,
    PAUSE_S,
    Watchdog,
    end_ray_processes,
    first_dead,
    kernel_memory_kills,
    ray_processes,
    why_it_died,
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def pass_by(self, dog, seconds, **look):
        """Let time pass while the watchdog looks as often as a sweep lets it."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 10.0, end)
            dog.look(**look)


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: made.now)
    return made


@pytest.fixture
def sleeper():
    """Return a starter of processes that do nothing."""
    started = []

    def start(*command):
        words = command or (sys.executable, "-c", "import time; time.sleep(120)")
        started.append(subprocess.Popen(words))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def is_ended(process, seconds=5):
    try:
        return process.wait(timeout=seconds) is not None
    except subprocess.TimeoutExpired:
        return False


def lives(process):
    time.sleep(0.05)  # a signal takes a moment
    return process.poll() is None


def watch(clock, process, epoch_s=10.0, epochs=1):
    dog = Watchdog()
    dog.began("t0001", process.pid)
    for _ in range(epochs):
        clock.pass_by(dog, epoch_s)
        dog.heard("t0001")
    return dog


@pytest.mark.parametrize("epoch_s", [1.0, 10.0, 30.0, 100.0, 400.0])
def test_a_trial_that_falls_silent_is_ended_after_its_limit_and_not_before(
    clock, sleeper, caplog, epoch_s
):
    process = sleeper()
    dog = watch(clock, process, epoch_s)
    limit = max(LEAST_SILENCE_S, OWN_EPOCHS * epoch_s)
    with caplog.at_level(logging.WARNING):
        clock.pass_by(dog, limit)
        assert lives(process)
        assert not caplog.records
        clock.pass_by(dog, 11)
        assert is_ended(process)
    assert process.returncode == -signal.SIGKILL
    assert [r.message for r in caplog.records] == [
        f"t0001: nothing heard for {limit + 10:.0f} s: it is ended"
    ]
    failure = dog.ended("t0001")
    assert (failure.kind, failure.state, failure.can_pass) == ("stalled", "failed", False)
    assert f"{limit + 10:.0f} s" in failure.cause
    assert dog.ended("t0001") is None


def test_the_limit_is_ten_of_its_own_slowest_epochs(clock, sleeper):
    assert (OWN_EPOCHS, OTHERS_EPOCHS, LEAST_SILENCE_S) == (10, 30, 300)
    process = sleeper()
    dog = watch(clock, process, 100.0)
    for _ in range(5):  # quick ones after it take nothing away
        clock.pass_by(dog, 1)
        dog.heard("t0001")
    clock.pass_by(dog, 990)
    assert lives(process)
    clock.pass_by(dog, 20)
    assert is_ended(process)


def test_a_trial_that_reports_lives_however_long_it_takes(clock, sleeper):
    process = sleeper()
    dog = watch(clock, process, 100.0, epochs=50)
    clock.pass_by(dog, 900)
    assert lives(process)
    assert dog.ended("t0001") is None


def test_before_any_epoch_of_any_trial_nothing_is_known_and_none_is_ended(clock, sleeper):
    process = sleeper()
    dog = watch(clock, process, epochs=0)
    clock.pass_by(dog, 10**5)
    assert lives(process)


def test_the_first_epoch_has_thirty_times_the_slowest_of_the_others(clock, sleeper):
    silent, busy = sleeper(), sleeper()
    dog = Watchdog()
    dog.began("t0001", busy.pid)
    clock.pass_by(dog, 50)
    dog.heard("t0001")
    dog.began("t0002", silent.pid)
    for _ in range(30):
        clock.pass_by(dog, 50)
        dog.heard("t0001")
    assert lives(silent)
    clock.pass_by(dog, 20)
    assert is_ended(silent)
    assert lives(busy)
    assert dog.ended("t0002").kind == "stalled"
    assert dog.ended("t0001") is None


def test_the_silence_of_one_trial_is_not_broken_by_another(clock, sleeper):
    silent, busy = sleeper(), sleeper()
    dog = Watchdog()
    dog.began("t0001", silent.pid)
    dog.began("t0002", busy.pid)
    for number in range(40):
        clock.pass_by(dog, 10)
        dog.heard("t0002")
        if number == 0:
            dog.heard("t0001")
    assert is_ended(silent)
    assert lives(busy)


def test_when_the_watcher_itself_slept_nobody_is_to_blame(clock, sleeper):
    process = sleeper()
    dog = watch(clock, process)
    clock.now += 8 * 3600.0  # the lid was closed
    dog.look()
    assert lives(process)
    clock.pass_by(dog, LEAST_SILENCE_S)  # all of it, from the awakening on
    assert lives(process)
    clock.pass_by(dog, 20)
    assert is_ended(process)


@pytest.mark.parametrize(("gap", "excused"), [(PAUSE_S - 1, False), (PAUSE_S + 1, True)])
def test_only_a_long_gap_between_two_looks_is_an_excuse(clock, sleeper, gap, excused):
    process = sleeper()
    dog = watch(clock, process)
    for _ in range(int(2 * LEAST_SILENCE_S / gap)):
        clock.now += gap
        dog.look()
    assert lives(process) == excused


def test_a_full_disk_is_an_excuse_for_as_long_as_it_is_full(clock, sleeper):
    process = sleeper()
    dog = watch(clock, process)
    clock.pass_by(dog, 10**5, excused=True)
    assert lives(process)
    clock.pass_by(dog, LEAST_SILENCE_S)
    assert lives(process)
    clock.pass_by(dog, 20)
    assert is_ended(process)


def test_a_process_that_has_the_number_of_an_ended_trial_is_left_alone(clock, sleeper, monkeypatch):
    innocent = sleeper()
    # As the watchdog would remember it: this number, but another start.
    real = psutil.Process._get_ident
    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "_get_ident", lambda self: (self.pid, real(self)[1] - 60.0))
        dog = Watchdog()
        dog.began("t0001", innocent.pid)
    clock.pass_by(dog, 10)
    dog.heard("t0001")
    clock.pass_by(dog, 2 * LEAST_SILENCE_S)
    assert lives(innocent)
    assert first_dead({"raylet": dog._lives["t0001"].process}) == "raylet"
    assert first_dead({"raylet": psutil.Process(innocent.pid)}) is None


def test_a_trial_that_is_gone_already_is_no_obstacle(clock, sleeper):
    process = sleeper(sys.executable, "-c", "")
    process.wait()
    dog = watch(clock, process)  # began with a number that nobody has
    clock.pass_by(dog, 2 * LEAST_SILENCE_S)
    assert dog.ended("t0001") is None
    process = sleeper()
    dog = watch(clock, process)
    process.kill()
    process.wait()
    clock.pass_by(dog, 2 * LEAST_SILENCE_S)  # Ray has not said so yet
    assert dog.ended("t0001").kind == "stalled"


def test_a_trial_that_has_ended_is_not_watched_any_more(clock, sleeper):
    process = sleeper()  # Ray uses it for the next one
    dog = watch(clock, process)
    assert dog.ended("t0001") is None
    dog.heard("t0001")  # too late, and no harm
    clock.pass_by(dog, 10**4)
    assert lives(process)
    dog.began("t0002", process.pid)
    clock.pass_by(dog, OTHERS_EPOCHS * 10.0 - 10)
    assert lives(process)


def test_a_trial_that_is_tried_again_begins_anew(clock, sleeper):
    first, second = sleeper(), sleeper()
    dog = watch(clock, first)
    clock.pass_by(dog, LEAST_SILENCE_S - 20)
    dog.began("t0001", second.pid)
    clock.pass_by(dog, LEAST_SILENCE_S - 20)
    assert lives(first)
    assert lives(second)
    clock.pass_by(dog, 40)
    assert is_ended(second)
    assert lives(first)


# --- Ray's own processes --------------------------------------------------------------------------


def test_the_first_process_that_is_dead_is_named(sleeper):
    processes = {name: psutil.Process(sleeper().pid) for name in ("gcs_server", "raylet")}
    assert first_dead(processes) is None
    assert first_dead({}) is None
    os.kill(processes["raylet"].pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while processes["raylet"].status() != psutil.STATUS_ZOMBIE:  # nobody has waited for it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert first_dead(processes) == "raylet"
    os.waitpid(processes["raylet"].pid, 0)
    assert not psutil.pid_exists(processes["raylet"].pid)
    assert first_dead(processes) == "raylet"
    assert first_dead({"gcs_server": processes["gcs_server"]}) is None


@pytest.mark.parametrize("sign", [signal.SIGSTOP])
def test_a_process_that_was_only_halted_is_alive(sleeper, sign):
    process = sleeper()
    process.send_signal(sign)
    assert first_dead({"raylet": psutil.Process(process.pid)}) is None


@pytest.fixture
def named(tmp_path, sleeper):
    """Return a starter of processes of a given path."""

    def start(path):
        program = tmp_path / path
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_bytes(open("/bin/sleep", "rb").read())  # noqa: PTH123, SIM115
        program.chmod(0o755)
        return sleeper(str(program), "120")

    return start


def wait_until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_rays_processes_are_found_among_the_children_by_their_names(named):
    started = {name: named(f"bin/{name}") for name in ("raylet", "gcs_server", "raylet_of_ours")}
    wait_until(lambda: len(ray_processes()) == 2)
    assert {name: p.pid for name, p in ray_processes().items()} == {
        name: started[name].pid for name in ("raylet", "gcs_server")
    }


def test_of_the_children_only_rays_are_ended(named, sleeper):
    of_ray = named("site-packages/ray/core/gcs")
    worker = sleeper("/bin/bash", "-c", "exec -a ray::train_trial sleep 120")
    others = [named("x-ray/of/sleep"), sleeper()]
    wait_until(lambda: psutil.Process(worker.pid).cmdline()[0] == "ray::train_trial")
    end_ray_processes()
    assert is_ended(of_ray)
    assert is_ended(worker)
    assert all(lives(other) for other in others)


@pytest.mark.parametrize(
    ("said", "kills", "kind"),
    [
        ("", 0, "process died"),
        ("The actor died unexpectedly before finishing this task.", 0, "process died"),
        ("", 1, "out of memory"),
        ("Task was killed due to the node running low on memory.", 0, "out of memory"),
        ("The actor died because its node has died.", 0, "node lost"),
        ("ray.exceptions.NodeDiedError: ...", 0, "node lost"),
    ],
)
def test_a_sudden_end_is_told_by_what_ray_and_the_kernel_say_and_can_pass(said, kills, kind):
    failure = why_it_died(said, kills)
    assert (failure.kind, failure.state, failure.can_pass) == (kind, "failed", True)
    assert failure.cause


def test_the_kernels_count_of_memory_kills_is_read(monkeypatch, tmp_path):
    file = tmp_path / "vmstat"
    file.write_text("nr_free_pages 12\noom_kill 7\noom_kill_other 9\nlast 1\n")
    monkeypatch.setattr(watchdog, "Path", lambda name: {"/proc/vmstat": file}[name])
    assert kernel_memory_kills() == 7
    file.unlink()
    assert kernel_memory_kills() == 0
    file.write_text("oom_kill many\n")
    assert kernel_memory_kills() == 0


def test_a_kernel_that_does_not_count_has_killed_none(monkeypatch, tmp_path):
    file = tmp_path / "vmstat"
    file.write_text("nr_free_pages 12\n")
    monkeypatch.setattr(watchdog, "Path", lambda name: file)
    assert kernel_memory_kills() == 0
