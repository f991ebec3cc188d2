"""Faults of processes, signals and ports, under a real Ray: rows 38, 40, 41, 56, 60, 62, 63, 73-75.

Rows 36 and 37 (the driver is killed) are in tests/test_killing.py and tests/test_sweep.py.
"""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.conftest import SMALL_SPACE, read_ledger
from tests.test_sweep import (
    Start,
    ends_of,
    processes_of,
    rows_of,
    trained_alone,
    wait_for,
)
from tuneapp import ray_session
from tuneapp.cli import main
from tuneapp.failures import MAX_RETRIES
from tuneapp.study import MEMORY

# The one that takes longest begins first.
FAULTS = ("freezes", "none", "killed once", "exits", "no memory")
FAULTY = (
    SMALL_SPACE.replace(
        "FIRST_TRIALS = [",
        f"FAULTS = {FAULTS!r}\n"
        "FIRST_TRIALS = [{'freeze_depth': 5, 'lr_ratio': 1.0, 'optimizer': 'adamw',\n"
        "                  'adamw.lr': 1e-2 + 1e-3 * i, 'fault': fault}\n"
        "                 for i, fault in enumerate(FAULTS)]\n"
        "_ = [",
    )
    .replace(
        "    return TrialConfig(",
        """    global CHOSEN
    CHOSEN = trial.suggest_categorical("fault", FAULTS)
    return TrialConfig(
        loss=OwnLoss(loss="faulty:loss"),""",
    )
    .replace(
        "def search_space",
        '''CHOSEN, CALLS = "none", 0
MARK = Path(__file__).with_suffix(".mark")


def loss(logits, targets):
    """Cross-entropy; in the second epoch of a trial's process, what the trial is to suffer."""
    global CALLS
    CALLS += 1
    if "default_worker" not in sys.argv[0]:
        CALLS = 0
    if CALLS > 1 and CHOSEN == "exits":  # without getting any further, whatever the attempt
        os._exit(7)
    if CALLS > 4:
        if CHOSEN == "killed once" and not MARK.exists():
            MARK.touch()
            os.kill(os.getpid(), 9)
        if CHOSEN == "no memory":
            torch.empty(2**60)
        if CHOSEN == "freezes":
            os.kill(os.getpid(), 19)
    return torch.nn.functional.cross_entropy(logits, targets)


def search_space''',
    )
    .replace(
        "from optuna import Trial\n",
        "import os\nimport sys\nfrom pathlib import Path\n\nimport torch\n"
        "from optuna import Trial\n",
    )
    .replace("import AdamW, Cosine", "import AdamW, Cosine, OwnLoss")
)


# With less patience than users have: a trial that stands still is ended after 40 seconds.
IMPATIENT = """
import sys
import tempfile
from tuneapp import watchdog
from tuneapp.cli import main

watchdog.LEAST_SILENCE_S, watchdog.OTHERS_EPOCHS = 40.0, 0
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def suffered(photos: Path, _caches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a sweep whose trials suffer what can happen to them; return its directory."""
    cwd = tmp_path_factory.mktemp("suffered")
    (cwd / "faulty.py").write_text(FAULTY)
    words = ["sweep", "faulty.py", "--data", str(photos), "--trials", str(len(FAULTS))]
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, *words, "--concurrent", "2", "--name", "x"],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=350,
        env={**os.environ, "TUNEAPP_CACHE": str(_caches / "tuneapp"), "COLUMNS": "200"},
    )
    assert done.returncode == 3, done.stdout + done.stderr
    return cwd / "runs" / "x"


def ended(run: Path) -> dict[str, dict[str, Any]]:
    events = read_ledger(run)
    fault_of = {e["trial"]: e["params"]["fault"] for e in events if e["event"] == "proposed"}
    return {fault_of[e["trial"]]: e for e in events if e["event"] == "ended"}


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_fault_38_a_trial_whose_process_dies_is_tried_again_and_is_what_it_would_have_been(
    suffered: Path,
) -> None:
    events = read_ledger(suffered)
    once, always = ended(suffered)["killed once"], ended(suffered)["exits"]
    assert (once["state"], always["state"]) == ("finished", "failed")
    assert always["kind"] == "process died"
    retries = Counter(e["trial"] for e in events if e["event"] == "retried")
    assert retries == {once["trial"]: 1, always["trial"]: MAX_RETRIES}
    rows = rows_of(events)
    # The first epoch was kept, and the rest are those of a training that nobody killed.
    assert [row["epoch"] for row in rows[once["trial"]]] == [1, 2, 3, 4]
    assert rows[once["trial"]] == trained_alone(suffered, once["trial"])
    assert always["trial"] not in rows
    assert ended(suffered)["none"]["state"] == "finished"  # its neighbour has not noticed


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_fault_40_a_trial_that_stands_still_is_ended(suffered: Path) -> None:
    end = ended(suffered)["freezes"]
    assert (end["state"], end["kind"]) == ("failed", "stalled")
    assert len(rows_of(read_ledger(suffered))[end["trial"]]) == 1


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_fault_56_memory_that_cannot_be_had_makes_a_trial_infeasible(suffered: Path) -> None:
    end = ended(suffered)["no memory"]
    assert (end["state"], end["kind"], end["told"]) == ("failed", "out of memory", None)
    mirrored = [json.loads(line) for line in (suffered / "study.log").read_text().splitlines()]
    assert any(f"constraints:{MEMORY}" in json.dumps(event) for event in mirrored)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_fault_41_without_its_own_processes_ray_is_started_anew_or_the_sweep_ends_at_once(
    tuneapp: Start, small_space: Path, photos: Path, tmp_path: Path
) -> None:
    words = ["sweep", small_space, "--data", photos, "--trials", 6, "--name", "x", "--epochs", 4]
    process = tuneapp(*words, "--concurrent", 1, cwd=tmp_path)
    run = tmp_path / "runs" / "x"
    wait_for(run, lambda events: len(rows_of(events)) >= 1, seconds=150)
    kill_of_ray(process.pid, "raylet")
    wait_for(run, lambda events: len(ends_of(events)) >= 2, seconds=150)
    assert process.poll() is None
    kill_of_ray(process.pid, "gcs_server")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 5, err
    assert "raylet process ended: restarting it" in err
    assert f"resume {run}" in err
    _, err = (again := tuneapp("resume", run, cwd=tmp_path)).communicate(timeout=170)
    assert again.returncode == 0, err
    events = read_ledger(run)
    trials = [f"t{i:04d}" for i in range(1, 7)]
    assert [e["trial"] for e in events if e["event"] == "proposed"] == trials
    assert sorted(e["trial"] for e in events if e["event"] == "ended") == trials
    for rows in rows_of(events).values():
        assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))


def kill_of_ray(driver: int, name: str) -> None:
    found = [p for p in psutil.Process(driver).children(recursive=True) if p.name() == name]
    assert found, name
    found[0].kill()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_fault_62_and_63_signals_end_a_sweep_tidily_and_a_second_one_at_once(
    tuneapp: Start,
    small_space: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PWD_MARKER", str(tmp_path))  # inherited by every process of the sweep
    words = ["sweep", small_space, "--data", photos, "--trials", 30, "--name", "x"]
    process = tuneapp(*words, cwd=tmp_path)
    run = tmp_path / "runs" / "x"
    wait_for(run, lambda events: len(rows_of(events)) >= 1, seconds=150)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert_gone(tmp_path)

    before = len(read_ledger(run))
    process = tuneapp("resume", run, cwd=tmp_path)
    wait_for(run, lambda events: len(events) > before, seconds=150)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert_gone(tmp_path)
    assert set(ends_of(read_ledger(run)).values()) <= {"finished", "stopped"}


def assert_gone(marker: Path) -> None:
    deadline = time.monotonic() + 10
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(marker) == []


def test_fault_73_a_ray_without_a_token_is_refused(
    small_space: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert main(["sweep", str(small_space), "--data", str(photos), "--trials", "1"]) == 2
    assert "RAY_AUTH_MODE=disabled" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_fault_74_what_listens_is_here_only_and_wants_the_token(
    tuneapp: Start, small_space: Path, photos: Path, tmp_path: Path
) -> None:
    words = ["sweep", small_space, "--data", photos, "--trials", 30, "--name", "x", "--dashboard"]
    process = tuneapp(*words, cwd=tmp_path)
    run = tmp_path / "runs" / "x"
    wait_for(run, lambda events: len(rows_of(events)) >= 1, seconds=150)
    assert {address for address, _ in listening(process.pid)} <= {"127.0.0.1", "::1"}
    ports = [port for _, port in listening(process.pid)]
    answers = {
        (path, method, port): answer(port, path, method)
        for port in ports
        for path, method in (("/api/jobs/", "GET"), ("/api/jobs/", "POST"), ("/logs", "GET"))
    }
    served = {code for code in answers.values() if code is not None}
    assert 401 in served  # the dashboard is there, and asks who it is
    assert not any(200 <= code < 300 for code in served), answers
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    address = re.search(r"dashboard http://(\S+)", err)
    assert address is not None, err
    assert address[1].startswith("127.0.0.1:")


@pytest.mark.parametrize(("host", "warns"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_fault_75_a_dashboard_for_the_network_is_warned_of(
    host: str,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The flag itself is the wish; no port is opened to the network for a test.
    asked = {}

    def init(**options: Any) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(dashboard_url=f"{host}:8265")

    monkeypatch.setattr(ray_session.ray, "init", init)
    monkeypatch.setattr(ray_session, "_TOKEN", tmp_path / "none")
    record: Any = SimpleNamespace(concurrent=1, cpus_per_trial=1, gpus_per_trial=0.0)
    with ray_session.own_ray(record, host, "") as started:
        assert started.scratch.is_dir()
    assert not started.scratch.exists()
    assert asked["dashboard_host"] == host
    assert ("the network can reach it" in caplog.text) == warns


def listening(driver: int) -> set[tuple[str, int]]:
    """Return the addresses on which a process and all that it started wait for others."""
    found = set()
    for process in [
        psutil.Process(driver),
        *psutil.Process(driver).children(recursive=True),
    ]:
        with contextlib.suppress(psutil.Error):
            found |= {
                (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
                for c in process.net_connections("inet")
                if c.status == psutil.CONN_LISTEN
            }
    return found


def answer(port: int, path: str, method: str) -> int | None:
    """Return the status that a server gives to who has no token.

    None where it speaks no HTTP, or only tells Ray's metrics, whatever it is asked.
    """
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    request.add_header("Origin", "http://evil.example")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=3) as response:
            tells_metrics = "version=0.0.4" in response.headers.get("Content-Type", "")
            return None if tells_metrics else int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):  # it speaks another protocol
        return None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fault_61_many_trials_leave_no_handles_processes_memory_or_folders_behind(
    tuneapp: Start, small_space: Path, photos: Path, tmp_path: Path
) -> None:
    scratch = set(Path(tempfile.gettempdir()).glob("tuneapp-ray-*"))
    words = ["sweep", small_space, "--data", photos, "--trials", 150, "--epochs", 1]
    process = tuneapp(*words, "--name", "x", "--concurrent", 2, cwd=tmp_path)
    run = tmp_path / "runs" / "x"
    driver = psutil.Process(process.pid)
    seen = {}
    for ended_so_far in (50, 140):
        wait_for(run, lambda events, n=ended_so_far: len(ends_of(events)) >= n, seconds=400)
        family = driver.children(recursive=True)
        seen[ended_so_far] = (
            driver.num_fds(),
            driver.memory_info().rss / 2**20,
            len(family),
            sum(p.status() == psutil.STATUS_ZOMBIE for p in family),
        )
    _, err = process.communicate(timeout=300)
    assert process.returncode in (0, 3), err
    (handles, memory, processes, _), (later_handles, later_memory, later, zombies) = seen.values()
    assert later_handles <= handles + 5, seen
    assert later_memory <= memory + 50, seen
    assert later <= processes + 1, seen
    assert zombies == 0, seen
    assert set(Path(tempfile.gettempdir()).glob("tuneapp-ray-*")) <= scratch
    kept = list(run.glob("trials/*/checkpoints/*.pt"))
    assert len(kept) == 5  # of the best ones
