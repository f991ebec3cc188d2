"""Sweeps that are killed at random moments, and what then became of them.

A driver of its own works off a sweep without Ray: the study, the stopper, the ledger and the files
are the real ones, and its trials write made-up metrics and real checkpoints. It is forked from this
process, so that a life begins within milliseconds, and killed by SIGKILL. What it did is judged by
files that tuneapp does not write itself: a witness of every epoch, and one of every event that was
acknowledged.
"""

import functools
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneapp.config import RunSettings
from tuneapp.failures import Failure
from tuneapp.ledger import Event, Ledger
from tuneapp.records import Origin
from tuneapp.rundir import RunDir, write_atomically
from tuneapp.simulated import (
    MADE_UP_SPACE,
    Curve,
    CurveOf,
    made_up_curves,
    play,
    tell_epoch,
    tell_failure,
    tell_return,
)
from tuneapp.space import SearchSpace
from tuneapp.study import Study

from tuneapp.search import Driver, Stopper  # isort: skip

RECIPES = """
FIRST_TRIALS = [{"optimizer": "sgd"}, {"freeze_depth": 5}, {"optimizer": "sgd", "freeze_depth": 3}]
"""
SHARES_OF_A_LIFE = (0.02, 0.06, 0.2)
"""Most lives are short, or else few kills would do for a sweep; some last long."""
EARLY = 0.15
"""The share of kills that come while a process takes up the sweep."""
TIMINGS = ("train/images_per_s", "train/data_wait")

_write = os.write  # the witnesses write even where a test has put a crash in its place


@dataclass(frozen=True)
class Plan:
    """A sweep: whose, of how many trials, in which space."""

    space: SearchSpace
    settings: RunSettings
    curve_of: CurveOf
    trials: int


def poisoned(curve_of: CurveOf, share: float) -> CurveOf:
    """Return curves of which this share ends early, in all the ways that there are."""
    faults = [
        Failure("diverged", "loss became nan"),
        Failure("out of memory", "OutOfMemoryError: no room (loop.py:7)"),
        Failure("bug", "KeyError: 'x' (own.py:3)"),
        Failure("process died", "its process died", can_pass=True),
        Failure("process died", "its process died, always", can_pass=True),
    ]

    def curve(params: Mapping[str, Any]) -> Curve:
        whole = curve_of(params)
        drawn = random.Random(f"fault {sorted(params.items())}")
        if drawn.random() >= share:
            return whole
        fault, after = drawn.choice(faults), drawn.randint(0, 3)
        times = 9 if fault.cause.endswith("always") else drawn.randint(1, 2)
        return Curve(whole.values, whole.seconds, fault, after, times)

    return curve


def plan(seed: int, trials: int = 12, max_epochs: int | None = None, share: float = 0.4) -> Plan:
    """Return a sweep with recipes, a conditional space, early stops, and trials that fail."""
    space = SearchSpace(MADE_UP_SPACE + RECIPES, Path(f"killing_{seed}.py"))
    settings = RunSettings(seed=seed, max_epochs=max_epochs)
    return Plan(space, settings, poisoned(made_up_curves(seed), share), trials)


# --- The driver -----------------------------------------------------------------------------------


def work(run: RunDir, sweep: Plan, ready: Callable[[], None] = lambda: None) -> None:
    """Work off what is left of a sweep, as `sweep.py` does it under Ray.

    Args:
        run: its directory.
        sweep: what it is.
        ready: called when the study is taken up.
    """
    lock = run.lock()
    with Ledger(run.ledger) as ledger:
        recipes: list[tuple[Mapping[str, Any], Origin]]
        recipes = [(params, "recipe") for params in sweep.space.first_trials]
        acked = _appending(run.path / "acked.txt")
        study = Study(
            sweep.space,
            ledger,
            sweep.settings,
            recipes,
            lambda event: _line(acked, str(event["seq"])),
        )
        longest = sweep.settings.max_epochs or 9
        stopper = Stopper(Driver(study, str(run.path)), longest, sweep.settings.mode)
        stopper.replay(list(ledger.events))
        ready()
        if not study.wanted:
            study.want(sweep.trials)
        while (proposal := study.propose()) is not None:
            _train(run, study, stopper, proposal.trial_id, sweep.curve_of(proposal.params))
    lock.release()


def _train(run: RunDir, study: Study, stopper: Stopper, trial_id: str, curve: Curve) -> None:
    """Run a trial from its checkpoint on; the epochs that it holds are reported again."""
    record, folder = study.records[trial_id], run.trial(trial_id)
    folder.mkdir(parents=True, exist_ok=True)
    witness, checkpoint = _appending(run.path / "witness.txt"), folder / "checkpoint.json"
    rows = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    for row in rows:
        tell_epoch(stopper, trial_id, row)
    while record.state == "unfinished" and len(rows) < record.epochs:
        failure = curve.failure_after(len(rows), record.retries)
        if failure is not None:
            os.close(witness)
            return tell_failure(study, stopper, trial_id, failure)
        rows.append(_computed(trial_id, curve, rows))
        _line(witness, f"{trial_id} {rows[-1]['epoch']} {json.dumps(rows[-1], sort_keys=True)}")
        write_atomically(checkpoint, lambda aside: aside.write_text(json.dumps(rows)))
        tell_epoch(stopper, trial_id, rows[-1])
    os.close(witness)
    return tell_return(stopper, trial_id)


def _computed(trial_id: str, curve: Curve, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the next epoch's row; it depends on all epochs before, as weights do."""
    epoch = len(rows) + 1
    digest = hashlib.sha256(f"{trial_id} {json.dumps(rows)}".encode()).digest()
    loss = int.from_bytes(digest[:8]) / 2**64
    applied = {"lr": {"head": 0.1}, "frozen": epoch < 3}  # it changes once
    return {"epoch": epoch, "val/accuracy": curve.at(epoch), "val/loss": loss, "applied": applied}


def _appending(file: Path) -> int:
    """Open a witness, without the line in which the last life was killed."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.ftruncate(handle, file.read_bytes().rfind(b"\n") + 1)
    return handle


def _whole_lines(file: Path) -> list[str]:
    """Return the lines that were written to their end: a kill may tear the last one."""
    return file.read_text().split("\n")[:-1] if file.exists() else []


def _line(handle: int, text: str) -> None:
    _write(handle, f"{text}\n".encode())


# --- Lives and kills ------------------------------------------------------------------------------


def forked(live: Callable[[], None], log: Path) -> int:
    """Let a child process live; return its id. What it raises goes to `log`."""
    gc.freeze()
    child = os.fork()
    if child:
        gc.unfreeze()
        return child
    code = 1
    try:
        gc.disable()  # it would look at, and so copy, all that the two processes share
        live()
        code = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def end_of(child: int, log: Path) -> int:
    """Wait for a child; return its exit code, or minus the signal that ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != 1, log.read_text()
    return code


@dataclass
class Figures:
    """What kills came to.

    Attributes:
        trials: that were to run, over all sweeps.
        kills: that ended a process at work.
        misses: that came after its end.
        lost: trials, epochs and ends that the uninterrupted sweep has, and the killed one has not.
        doubled: those that it has more than once.
        differing: trials that are not the same to the last bit.
        repeated: epochs that were computed more than once.
        most_repeated_per_kill: the largest number of epochs that one sweep repeated for each kill.
        phases: what was going on at the kills, and how often.
    """

    trials: int = 0
    kills: int = 0
    misses: int = 0
    lost: int = 0
    doubled: int = 0
    differing: int = 0
    repeated: int = 0
    most_repeated_per_kill: float = 0.0
    phases: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Figures") -> None:
        """Take the figures of another sweep into these."""
        for name in ("trials", "kills", "misses", "lost", "doubled", "differing", "repeated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        worst = other.repeated / max(other.kills, 1)
        self.most_repeated_per_kill = max(self.most_repeated_per_kill, worst)
        self.phases += other.phases


class _Moments:
    """Kills processes at random moments: a few while they start, the others at work."""

    def __init__(self, draws: random.Random, usual_s: float) -> None:
        """Take how long an uninterrupted life takes."""
        self._draws = draws
        self._usual_s = usual_s
        self._start_s = 0.05

    def killed(self, live: Callable[[Callable[[], None]], None], log: Path) -> int:
        """Start a process, kill it, and return its id; `live` says when it has started."""
        here, there = os.pipe()
        begun = time.perf_counter()
        child = forked(lambda: live(lambda: _line(there, "ready")), log)
        os.close(there)
        if self._draws.random() < EARLY:
            time.sleep(self._draws.uniform(0, self._start_s))
        else:
            os.read(here, 1)
            self._start_s = time.perf_counter() - begun
            share = self._draws.choice(SHARES_OF_A_LIFE)
            time.sleep(self._draws.uniform(0, self._usual_s * share))
        os.kill(child, signal.SIGKILL)  # a zombie at worst: nobody has waited for it yet
        os.close(here)
        return child


def kill_a_sweep(folder: Path, sweep: Plan, draws: random.Random) -> Figures:
    """Run a sweep twice, once uninterrupted and once killed again and again; compare the two."""
    _warm_up()
    whole, killed = RunDir(folder / "whole"), RunDir(folder / "killed")
    for run in (whole, killed):
        run.path.mkdir(parents=True)
    log = folder / "error.txt"
    begun = time.perf_counter()
    assert end_of(forked(lambda: work(whole, sweep), log), log) == 0
    moments = _Moments(draws, time.perf_counter() - begun)
    found = Figures(trials=sweep.trials)
    while True:
        before = _progress(killed)
        child = moments.killed(lambda ready: work(killed, sweep, ready), log)
        if end_of(child, log) == 0:
            found.misses += 1
            break
        found.kills += 1
        found.phases[_phase(killed, before)] += 1
        require_no_acknowledged_event_lost(killed)
    compare(whole, killed, found)
    compare_with_witness(killed, found)
    return found


@functools.cache
def _warm_up() -> None:
    """Load what is loaded at its first use, or else every life would do that first."""
    play(SearchSpace(MADE_UP_SPACE, Path("warm_up.py")), RunSettings(), made_up_curves(0), 12)


def require_no_acknowledged_event_lost(run: RunDir) -> None:
    """At most the event that was being written is there without having been acknowledged."""
    acked = [int(line) for line in _whole_lines(run.path / "acked.txt")]
    written = [event["seq"] for event in events_of(run)]
    assert written == list(range(len(written)))
    assert len(set(acked)) <= len(written)
    if acked:
        assert max(acked) < len(written)


def events_of(run: RunDir) -> list[Event]:
    """Return the whole lines of a ledger, without tuneapp's own reader."""
    return [json.loads(line) for line in _whole_lines(run.ledger)]


def witnessed(run: RunDir) -> list[tuple[str, int, dict[str, Any]]]:
    """Return trial, epoch and row of each epoch that was computed, in that order."""
    lines = _whole_lines(run.path / "witness.txt")
    return [(t, int(e), json.loads(row)) for t, e, row in (line.split(" ", 2) for line in lines)]


def _progress(run: RunDir) -> tuple[int, int]:
    return len(events_of(run)), len(witnessed(run))


def _phase(run: RunDir, before: tuple[int, int]) -> str:
    """Say what a life was doing when it was killed, by what it left behind."""
    events, computed = events_of(run), witnessed(run)
    if not events or (len(events), len(computed)) == before:
        return "before it did anything"
    last = events[-1]
    if computed:
        trial_id, epoch, _ = computed[-1]
        known = [e for e in events if e["event"] == "epoch" and e["trial"] == trial_id]
        if len(known) < epoch:
            checkpoint = run.trial(trial_id) / "checkpoint.json"
            saved = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
            if len(saved) < epoch:
                return "before an epoch's checkpoint"
            return "between checkpoint and ledger"
    if last["event"] == "epoch":
        wanted = next(
            e["epochs"] for e in events if e["event"] == "proposed" and e["trial"] == last["trial"]
        )
        is_last = last["row"]["epoch"] == wanted
        return "between last epoch and end" if is_last else "between epochs"
    return {
        "sweep": "before the first trial",
        "proposed": "between proposal and first epoch",
        "applied": "between what was applied and its epoch",
        "ended": "between trials",
        "retried": "before another attempt",
    }[last["event"]]


# --- Comparing ------------------------------------------------------------------------------------


def compare(whole: RunDir, killed: RunDir, found: Figures) -> None:
    """Count what is lost, doubled and different in the sweep that was killed."""
    expected, got = events_of(whole), events_of(killed)
    assert [event["seq"] for event in got] == list(range(len(got)))
    wanted, there = _counted(expected), _counted(got)
    assert set(wanted.values()) == {1}
    found.lost += (wanted - there).total()
    found.doubled += (there - wanted).total()
    found.differing += sum(
        _story(expected, trial_id) != _story(got, trial_id)
        for trial_id in sorted({e["trial"] for e in (*expected, *got) if "trial" in e})
    )


def compare_with_witness(run: RunDir, found: Figures) -> None:
    """Count epochs that were computed again; what the ledger says must be what was computed."""
    seen = witnessed(run)
    times = Counter((trial_id, epoch) for trial_id, epoch, _ in seen)
    found.repeated += sum(count - 1 for count in times.values())
    rows = {(e["trial"], e["row"]["epoch"]): e["row"] for e in events_of(run) if "row" in e}
    assert set(rows) == set(times)
    for trial_id, epoch, row in seen:
        plain = {name: value for name, value in row.items() if name != "applied"}
        assert plain == rows[trial_id, epoch]


def _counted(events: Sequence[Event]) -> Counter[tuple[Any, ...]]:
    """Count what there may be once only: each proposal, each epoch, each end."""
    return Counter(
        (e["event"], e["trial"], e["row"]["epoch"] if e["event"] == "epoch" else 0)
        for e in events
        if e["event"] in ("proposed", "epoch", "ended")
    )


def _story(events: Sequence[Event], trial_id: str) -> list[Event]:
    return [_bare(event) for event in events if event.get("trial") == trial_id]


def _bare(event: Event) -> Event:
    """Return an event without its place in the file, and without what a clock measured."""
    bare = {name: value for name, value in event.items() if name not in ("seq", "crc")}
    if "row" in bare:
        bare["row"] = {k: v for k, v in bare["row"].items() if k not in TIMINGS}
    return bare


# --- A crash at each call that writes -------------------------------------------------------------

CALLS = ("write", "fsync", "replace", "unlink", "ftruncate", "truncate")


def die_at(number: int, *, half_written: bool) -> None:
    """Let this process end before call `number` that changes the disk, or within write `number`."""
    done = 0

    def dying(name: str, really: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                if half_written:
                    _write(args[0], args[1][: len(args[1]) // 2])
                os._exit(DIED)
            return really(*args, **more)

        return call

    for name in ("write",) if half_written else CALLS:
        setattr(os, name, dying(name, getattr(os, name)))


DIED = 77
"""The exit code of a process that died at the call where it was to."""


# --- Sweeps under a real Ray ----------------------------------------------------------------------

REAL_SPACE = """
from tuneapp.config import AdamW, Constant, Sgd, TrialConfig

FIRST_TRIALS = [{"optimizer": "sgd", "sgd.lr": 1e-2, "freeze_depth": 0}]


def search_space(trial):
    if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "adamw":
        optimizer = AdamW(lr=trial.suggest_float("adamw.lr", 1e-4, 1e-2, log=True))
    else:
        optimizer = Sgd(lr=trial.suggest_float("sgd.lr", 1e-3, 1e-1, log=True))
    return TrialConfig(
        model="shufflenet_v2_x0_5",
        weights=None,
        image_size=32,
        epochs=3,
        batch_size=32,
        freeze_depth=trial.suggest_int("freeze_depth", 0, 2),
        optimizer=optimizer,
        schedule=Constant(),
    )
"""
START_S, END_S = 180.0, 400.0
"""How long a start of Ray, and a whole sweep, may take on a busy machine."""


@dataclass(frozen=True)
class RealSweep:
    """A sweep of the command line in a folder of its own."""

    cwd: Path
    data: str = "digits"
    trials: int = 4
    seed: int = 0

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start the sweep of this name, or go on with it."""
        run = self.run(name)
        words = ["resume", str(run.path)]
        if not run.ledger.exists():
            space = self.cwd / "real_space.py"
            space.write_text(REAL_SPACE)
            words = ["sweep", str(space), "--data", self.data, "--name", name, "--seed"]
            words += [str(self.seed), "--trials", str(self.trials)]
            words += ["--concurrent", "1", "--cpus-per-trial", "1"]
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tuneapp", *words],
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, name: str) -> RunDir:
        """Return the run directory of this name."""
        return RunDir(self.cwd / "runs" / name)

    def finish(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a sweep, which must be a good one."""
        code = process.wait(timeout=END_S)
        assert code == 0, self._log(name).read_text()

    def killed_at(self, name: str, events: int, after_s: float) -> str | None:
        """Kill the driver so long after so many events more; return the phase, None if it ended.

        Only the driver is killed: Ray's processes and the trial's have to notice by themselves.
        """
        run = self.run(name)
        before = len(events_of(run))
        process = self.start(name)
        deadline = time.monotonic() + START_S
        while len(events_of(run)) < before + events and process.poll() is None:
            assert time.monotonic() < deadline, self._log(name).read_text()
            time.sleep(0.02)
        time.sleep(after_s)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            self.finish(name, process)
            return None
        now = events_of(run)
        return "while Ray starts" if len(now) <= max(before, 1) else f"after {now[-1]['event']}"

    def _log(self, name: str) -> Path:
        return self.cwd / f"{name}.log"


def kill_a_real_sweep(sweep: RealSweep, draws: random.Random, kills: int) -> Figures:
    """Run a real sweep uninterrupted, and again with kills of its driver; compare the two.

    The first kill comes while Ray starts, the others a moment after some event.
    """
    sweep.finish("whole", sweep.start("whole"))
    found = Figures(trials=sweep.trials)
    for number in range(kills):
        # The first event is written before Ray starts; a resumed sweep writes none before it.
        events, after_s = (
            (1, draws.uniform(0.0, 2.0))
            if number == 0
            else (draws.randint(1, 4), draws.uniform(0.0, 0.5))
        )
        phase = sweep.killed_at("killed", events, after_s)
        if phase is None:
            found.misses += 1
            break
        found.kills += 1
        found.phases[phase] += 1
    sweep.finish("killed", sweep.start("killed"))
    compare(sweep.run("whole"), sweep.run("killed"), found)
    return found
