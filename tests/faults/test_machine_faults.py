"""Faults 57 to 59, 64 and 65: memory of a GPU, what a machine lacks, clocks, and sleep."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState

import tuneapp.training as training
from tests.conftest import read_ledger
from tests.faults.refusal import interrupt_after, numbers, refused, write_space
from tests.killing import forked
from tests.test_trial import table
from tuneapp.cli import main
from tuneapp.config import RunSettings
from tuneapp.ledger import Events, read_events
from tuneapp.rundir import open_run
from tuneapp.space import SearchSpace
from tuneapp.study import MEMORY, Study

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def words(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`train` of two epochs of a network of a few kilobytes, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    return ["train", write_space(), "--data", str(photos), "--name"]


def events_of(name: str) -> list[dict[str, Any]]:
    """Return the events of a run without what a clock has measured."""
    events = read_ledger(Path("runs", name))
    for event in events:
        del event["crc"]
        if "row" in event:
            (event["row"],) = numbers([event["row"]])
    return events


# --- 57, 58, 59: what a machine has not -----------------------------------------------------------


def test_fault_57_a_gpu_without_memory_ends_the_trial_alone_and_the_search_learns_of_it(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    really = training.train_one_epoch

    def run_out(*args: Any, epoch: int, **options: Any) -> Any:
        if epoch == 2:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
            )
        return really(*args, epoch=epoch, **options)

    monkeypatch.setattr(training, "train_one_epoch", run_out)
    assert main([*words, "x"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line.startswith("tuneapp: error: out of memory: OutOfMemoryError: CUDA out of memory")
    (ended,) = [e for e in events_of("x") if e["event"] == "ended"]
    assert (ended["state"], ended["kind"]) == ("failed", "out of memory")
    assert ended["cause"].startswith("OutOfMemoryError: CUDA out of memory")
    assert not [e for e in events_of("x") if e["event"] == "retried"]
    # What it would have needed the memory for is written down.
    config = json.loads(Path("runs/x/trials/t0001/config.json").read_text())
    assert (config["batch_size"], config["image_size"], config["params"]) == (8, 32, {"lr": 0.01})
    assert [e["params"] for e in events_of("x") if e["event"] == "proposed"] == [{"lr": 0.01}]
    assert len([e for e in events_of("x") if e["event"] == "epoch"]) == 1
    # To the search it is infeasible, and not a score; nor is the same configuration run again.
    space = SearchSpace(Path("runs/x/space.py").read_text(), tmp_path / "space.py")
    events = Events()
    events.events = read_events(Path("runs/x/ledger.jsonl"))
    study = Study(space, events, RunSettings(), [({"lr": 0.01}, "set")] * 2)
    (told,) = study.frozen_trials()
    assert (told.state, told.constraints) == (TrialState.PRUNED, {MEMORY: 1.0})
    study.want(2)
    proposal = study.propose()
    assert proposal is None or proposal.params != {"lr": 0.01}
    assert main(["resume", "runs/x"]) == 4


TOO_MUCH = [
    (["--gpus-per-trial", "2"], r"--gpus-per-trial 2: this machine has 0 GPUs"),
    (["--gpus-per-trial", "1"], r"--gpus-per-trial 1: this machine has 0 GPUs"),
    (["--device", "cuda"], r"--device cuda: this machine has no GPU that torch can use"),
    (["--cpus-per-trial", "4096"], r"--cpus-per-trial 4096: this machine has \d+ CPU cores"),
    (["--concurrent", "4096"], r"--concurrent 4096: this machine has \d+ CPU cores"),
    (["--concurrent", "0"], r"--concurrent 0: must be at least 1"),
]


@pytest.mark.parametrize(("flags", "message"), TOO_MUCH, ids=[" ".join(f) for f, _ in TOO_MUCH])
def test_fault_58_more_than_the_machine_has_is_refused_at_once(
    flags: list[str],
    message: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert re.search(message, refused(capsys, "sweep", *words[1:], "x", *flags))
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fork cannot train where a GPU was used")
@pytest.mark.parametrize("more", [1, 2, 3, 4, 16])
def test_fault_59_with_few_open_files_it_works_or_says_so_in_a_line(
    more: int, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "error.txt"
    assert main([*words, "warm"]) == 0  # the images are decoded

    def live() -> None:
        """Train in a process that may open so many files more at once."""
        taken = [os.open("/dev/null", os.O_RDONLY)]
        limit = max(int(name) for name in os.listdir("/proc/self/fd")) + 20  # noqa: PTH208
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for handle in taken[:more]:
            os.close(handle)
        os._exit(main([*words, "x"]))

    code = os.waitstatus_to_exitcode(os.waitpid(forked(live, log), 0)[1])
    assert not log.exists(), log.read_text()
    if code == 0:
        assert [e["state"] for e in events_of("x") if e["event"] == "ended"] == ["finished"]
        return
    assert more < 16
    assert code in (2, 5)
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "Too many open files" in error.splitlines()[-1]


# --- 64, 65: clocks, and sleep --------------------------------------------------------------------


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return what sets the time zone of this process and shifts its clock."""

    def arrange(name: str, shift_s: float) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()
        monkeypatch.setattr(time, "time", lambda really=time.time: really() + shift_s)

    yield arrange
    monkeypatch.undo()
    time.tzset()


ZONES = ["Pacific/Kiritimati", "America/St_Johns", "Europe/Berlin"]


@pytest.mark.parametrize("shift_s", [-3600.0, 86400.0])
@pytest.mark.parametrize("name", ZONES)
def test_fault_64_another_zone_and_another_time_after_an_interruption_change_nothing(
    name: str, shift_s: float, words: list[str], zone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*words, "straight"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert main([*words, "x"]) == 130
    zone(name, shift_s)
    assert main(["resume", "runs/x"]) == 0
    assert events_of("x") == events_of("straight")
    assert main(["summary", "runs/x"]) == 0
    rows = [table(Path("runs", run, "trials.csv")) for run in ("x", "straight")]
    for row in (*rows[0], *rows[1]):
        for clocked in ("train/images_per_s", "train/data_wait"):
            del row[clocked]
    assert rows[0] == rows[1]
    assert open_run(Path("runs/x"))[1] == open_run(Path("runs/straight"))[1]


WATCHING = """
import sys, time
from tuneapp import watchdog
watchdog.LEAST_SILENCE_S, watchdog.OWN_EPOCHS, watchdog.PAUSE_S = 2.0, 1, 1.0
dog = watchdog.Watchdog()
dog.began("t0001", int(sys.argv[1]))
dog.heard("t0001")
print("watches", flush=True)
while True:
    dog.look()
    time.sleep(0.05)
"""


@pytest.mark.parametrize("sleeps", [True, False])
def test_fault_65_a_sweep_that_was_asleep_calls_no_trial_stalled(sleeps: bool) -> None:
    path = str(Path(__file__).parents[2])
    quiet = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCHING, str(quiet.pid)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == b"watches\n"
        if not sleeps:  # silence alone: it is ended
            assert quiet.wait(timeout=30) < 0
            return
        watcher.send_signal(signal.SIGSTOP)
        time.sleep(4.0)  # twice as long as a trial may be silent
        watcher.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        assert quiet.poll() is None
        assert watcher.poll() is None
    finally:
        for process in (quiet, watcher):
            process.kill()
            process.communicate()
