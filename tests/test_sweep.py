"""Real sweeps under a real Ray: whole, killed, interrupted, and with trials that fail."""

import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import SMALL_SPACE, read_ledger
from tuneapp.cli import main
from tuneapp.config import RunSettings
from tuneapp.errors import ConfigError
from tuneapp.machine import share_machine
from tuneapp.prepare import assemble
from tuneapp.rundir import open_run
from tuneapp.trial import run_trial

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

Start = Callable[..., subprocess.Popen[str]]
TIMINGS = ("train/images_per_s", "train/data_wait")


def rows_of(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "epoch":
            plain = {k: v for k, v in event["row"].items() if k not in TIMINGS}
            rows.setdefault(event["trial"], []).append(plain)
    return rows


def ends_of(events: list[dict[str, Any]]) -> dict[str, str]:
    return {e["trial"]: e["state"] for e in events if e["event"] == "ended"}


def trained_alone(run_path: Path, trial_id: str) -> list[dict[str, Any]]:
    """Train a trial of a run again in this process, which has run other trials before."""
    run, record = open_run(run_path)
    params = next(
        e["params"]
        for e in read_ledger(run_path)
        if e["event"] == "proposed" and e["trial"] == trial_id
    )
    config, trial_run = assemble(run, record, trial_id, params, has_gpu=False)
    rows: list[dict[str, Any]] = []
    # Its files are left alone: only the rows are compared.
    object.__setattr__(trial_run, "folder", None)
    run_trial(config, trial_run, rows.append)
    return [{k: v for k, v in r.items() if k not in (*TIMINGS, "applied")} for r in rows]


def wait_for(run: Path, is_enough: Callable[[list[dict[str, Any]]], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "ledger.jsonl").exists():
            lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
            if is_enough([json.loads(line) for line in lines if line.endswith("\n")]):
                return
        time.sleep(0.05)
    raise AssertionError(f"{run} did not get there in {seconds} s")


def processes_of(marker: Path) -> list[str]:
    """Return the processes that were started from this folder, or that work below it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(
                "PWD_MARKER"
            ) == str(marker):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def test_a_sweep_runs_every_trial_once_and_says_what_it_found(
    finished_sweep: dict[str, Any],
) -> None:
    assert finished_sweep["code"] == 0, finished_sweep["err"]
    events = read_ledger(finished_sweep["run"])
    proposed = [e["trial"] for e in events if e["event"] == "proposed"]
    assert proposed == [f"t{i:04d}" for i in range(1, 9)]
    ends = ends_of(events)
    assert sorted(ends) == proposed
    assert set(ends.values()) <= {"finished", "stopped"}
    out = finished_sweep["out"]
    scores = [r["val/accuracy"] for rows in rows_of(events).values() for r in rows]
    assert re.search(rf"best      t\d{{4}}: val/accuracy {max(scores):.4f}", out)
    assert "gain      " in out
    assert "tensorboard --logdir runs/done/trials" in out


def test_recipes_come_first_and_run_in_full(finished_sweep: dict[str, Any]) -> None:
    events = read_ledger(finished_sweep["run"])
    origins = {e["trial"]: e["origin"] for e in events if e["event"] == "proposed"}
    assert [t for t, origin in origins.items() if origin == "recipe"] == ["t0001", "t0002"]
    assert ends_of(events)["t0001"] == ends_of(events)["t0002"] == "finished"
    assert len(rows_of(events)["t0001"]) == len(rows_of(events)["t0002"]) == 4


def test_ray_prints_nothing_and_leaves_no_files_in_the_run(finished_sweep: dict[str, Any]) -> None:
    assert "ray" not in finished_sweep["err"].lower()
    assert "Tune Status" not in finished_sweep["out"]
    files = {p.name for p in finished_sweep["run"].rglob("*") if p.is_file()}
    assert not files & {"result.json", "progress.csv", "params.pkl", "tuner.pkl"}
    for folder in (finished_sweep["run"] / "trials").iterdir():
        assert len(list(folder.glob("events.out.tfevents.*"))) == 1


def test_trials_share_processes_and_yet_are_what_they_are_alone(
    finished_sweep: dict[str, Any],
) -> None:
    run = finished_sweep["run"]
    logs = {p.parent.name: p.read_text() for p in run.glob("trials/*/log.txt")}
    process = {t: re.findall(r"process (\d+) trains", text)[0] for t, text in logs.items()}
    assert len(logs) == 8
    assert len(set(process.values())) <= 2
    events = read_ledger(run)
    finished = [t for t, state in ends_of(events).items() if state == "finished"]
    later = [t for t in finished if Counter(process.values())[process[t]] > 1][-2:]
    for trial_id in later:
        assert trained_alone(run, trial_id) == rows_of(events)[trial_id]


def test_a_sweep_killed_half_way_and_resumed_has_every_trial_once(
    tuneapp: Start, small_space: Path, photos: Path, tmp_path: Path
) -> None:
    words = ["sweep", small_space, "--data", photos, "--trials", 4, "--name", "killed"]
    process = tuneapp(*words, "--concurrent", 2, cwd=tmp_path)
    run = tmp_path / "runs" / "killed"
    # A trial has ended, and another is in the middle.
    wait_for(
        run,
        lambda events: (
            len(ends_of(events)) >= 1
            and any(
                len(r) in (1, 2, 3) and t not in ends_of(events) for t, r in rows_of(events).items()
            )
        ),
        seconds=120,
    )
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = read_ledger(run)
    unfinished = {e["trial"] for e in before if e["event"] == "proposed"} - set(ends_of(before))
    assert unfinished, "the kill came too late to prove anything"

    # At once: trial processes of the dead sweep may still be writing.
    again = tuneapp("resume", run, cwd=tmp_path)
    _, err = again.communicate(timeout=170)
    assert again.returncode == 0, err
    after = read_ledger(run)
    assert after[: len(before)] == before
    assert [e["trial"] for e in after if e["event"] == "proposed"] == [
        f"t{i:04d}" for i in range(1, 5)
    ]
    assert Counter(e["trial"] for e in after if e["event"] == "ended") == Counter(
        f"t{i:04d}" for i in range(1, 5)
    )
    for trial_id, rows in rows_of(after).items():
        assert [r["epoch"] for r in rows] == list(range(1, len(rows) + 1))
        if trial_id in unfinished:  # interrupted, and yet what it would have been
            assert rows == trained_alone(run, trial_id)[: len(rows)]

    assert main(["resume", str(run)]) == 0  # nothing is left to do
    assert read_ledger(run) == after


@pytest.mark.slow  # fault 62 interrupts a sweep, too
def test_ctrl_c_ends_a_sweep_tidily_and_says_how_to_go_on(
    tuneapp: Start, small_space: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PWD_MARKER", str(tmp_path))  # inherited by every process of the sweep
    words = ["sweep", small_space, "--data", photos, "--trials", 20, "--name", "stopped"]
    process = tuneapp(*words, cwd=tmp_path)
    run = tmp_path / "runs" / "stopped"
    wait_for(run, lambda events: len(rows_of(events)) >= 1, seconds=120)
    assert len(processes_of(tmp_path)) > 3  # the search finds what it must not find later
    # As a terminal does it: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    pressed = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - pressed < 30
    assert process.returncode == 130
    assert "resume    python -m tuneapp resume runs/stopped" in out
    assert "Traceback" not in err
    deadline = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(tmp_path) == []
    assert set(ends_of(read_ledger(run)).values()) <= {"finished", "stopped"}


FAULTY = (
    SMALL_SPACE.replace(
        "FIRST_TRIALS = [",
        """FIRST_TRIALS = [
    {"freeze_depth": 5, "optimizer": "adamw", "adamw.lr": 1e-2, "lr_ratio": 1.0,
     "fault": "none"},
    {"freeze_depth": 5, "optimizer": "sgd", "sgd.lr": 1e-2, "lr_ratio": 1.0,
     "fault": "diverges"},
    {"freeze_depth": 5, "optimizer": "sgd", "sgd.lr": 1e-2, "lr_ratio": 1.0,
     "fault": "raises"},
    {"freeze_depth": 5, "optimizer": "sgd", "sgd.lr": 2e-2, "lr_ratio": 1.0,
     "fault": "dies"},
]
_ = [""",
    )
    .replace(
        "    return TrialConfig(",
        """    fault = trial.suggest_categorical("fault", ["none", "diverges", "raises", "dies"])
    if fault == "diverges":
        optimizer = Sgd(lr=1e38)
    if "default_worker" in sys.argv[0]:  # in a trial's process only: the space itself is fine
        if fault == "raises":
            raise RuntimeError("a bug in the space")
        if fault == "dies":
            os.kill(os.getpid(), 9)
    return TrialConfig(""",
    )
    .replace("from optuna import Trial", "import os\nimport sys\n\nfrom optuna import Trial")
)


@dataclass
class Ended:
    """A sweep that has run to its end."""

    run: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def side_by_side(
    tuneapp: Start, small_space: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ended]:
    """Run three sweeps at once, each with a Ray of its own, as users of one machine do."""
    cwd = tmp_path_factory.mktemp("side_by_side")
    (cwd / "faulty.py").write_text(FAULTY)
    (cwd / "broken.py").write_text(FAULTY.replace('if fault == "raises":', 'if fault != "never":'))
    options = ["--data", photos, "--concurrent", 1]
    started = {
        "faulty": tuneapp("sweep", "faulty.py", *options, "--trials", 4, cwd=cwd),
        "broken": tuneapp("sweep", "broken.py", *options, "--trials", 12, cwd=cwd),
        "small": tuneapp(
            *["sweep", small_space, *options, "--trials", 500, "--time-budget", "10s"], cwd=cwd
        ),
    }
    with ThreadPoolExecutor(len(started)) as pool:
        said = dict(
            zip(
                started,
                pool.map(lambda p: p.communicate(timeout=220), started.values()),
                strict=True,
            )
        )
    return {
        name: Ended(cwd / "runs" / f"{name}-001", started[name].returncode, *said[name])
        for name in started
    }


def test_a_trial_that_fails_says_why_and_the_others_go_on(side_by_side: dict[str, Ended]) -> None:
    faulty = side_by_side["faulty"]
    assert faulty.code == 3, faulty.err
    events = read_ledger(faulty.run)
    assert ends_of(events) == {
        "t0001": "finished",
        "t0002": "diverged",
        "t0003": "failed",
        "t0004": "failed",
    }
    causes = {e["trial"]: e["cause"] for e in events if e["event"] == "ended"}
    assert re.fullmatch(r"loss became (nan|inf) in epoch \d, step \d+", causes["t0002"])
    assert "a bug in the space" in causes["t0003"]
    assert "faulty.py" in (faulty.run / "trials/t0003/error.txt").read_text()
    assert "process died" in causes["t0004"]
    assert "t0003 failed" in faulty.out
    assert "Traceback" not in faulty.err


def test_the_same_failure_in_the_first_three_trials_ends_the_sweep(
    side_by_side: dict[str, Ended],
) -> None:
    broken = side_by_side["broken"]
    assert broken.code == 4
    assert "all of its first trials failed" in broken.err
    assert "trial(s) to go (fix the cause first)" in broken.out
    assert len(ends_of(read_ledger(broken.run))) < 6


def test_fault_60_sweeps_side_by_side_have_ports_and_folders_of_their_own(
    side_by_side: dict[str, Ended],
) -> None:
    assert len({sweep.run for sweep in side_by_side.values()}) == 3
    assert not any("Traceback" in sweep.err for sweep in side_by_side.values())
    assert [sweep.code for sweep in side_by_side.values()][:2] == [3, 4]  # as they would be alone


def test_a_time_budget_ends_the_sweep_and_leaves_the_rest_to_resume(
    side_by_side: dict[str, Ended],
) -> None:
    small = side_by_side["small"]
    found_something = "best      t00" in small.out  # not so on a machine that is slow to start
    assert small.code == (0 if found_something else 4), small.err
    assert "trial(s) to go (the time budget is used up)" in small.out
    assert "resume    python -m tuneapp resume runs/small-001" in small.out


def test_what_the_machine_cannot_give_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("tuneapp.machine._cgroup", lambda name: "")
    settings = RunSettings()
    assert share_machine(settings, 16, None) == (4, 1, 0.0)
    assert share_machine(settings, 16, 2) == (2, 2, 0.0)
    assert share_machine(settings, 16, 3) == (3, 1, 0.0)
    with pytest.raises(ConfigError, match=r"--concurrent 5: .* 4 CPU cores.*; use 1 to 4"):
        share_machine(settings, 16, 5)
    with pytest.raises(ConfigError, match="--concurrent 0"):
        share_machine(settings, 16, 0)
    with pytest.raises(ConfigError, match="no GPU"):
        share_machine(RunSettings(device="cuda"), 16, None)
    assert share_machine(settings, 1, None) == (1, 4, 0.0)  # no more at once than there are
    limits = {"cpu.max": "200000 100000", "memory.max": "max"}  # a container with two cores
    monkeypatch.setattr("tuneapp.machine._cgroup", limits.get)
    assert share_machine(settings, 16, None) == (2, 1, 0.0)
    limits.update({"cpu.max": "max 100000", "memory.max": str(3 * 2**30)})
    assert share_machine(settings, 16, None) == (1, 4, 0.0)
    limits.update({"memory.max": "max"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert share_machine(settings, 16, None) == (2, 2, 1.0)
    assert share_machine(settings, 16, 4) == (4, 1, 0.5)
    assert share_machine(settings, 16, 1) == (1, 4, 1.0)
    assert share_machine(RunSettings(device="cpu"), 16, None) == (4, 1, 0.0)
