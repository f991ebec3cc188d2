"""Does a training that is killed and resumed give the same numbers as one that is not?

One configuration is trained twice: straight, and by a process that is repeatedly ended by
SIGKILL and resumed by `resume`. Both run as a user would run them, in separate processes. Then
their metrics and last checkpoints are compared, bit for bit and piece by piece, so that a
difference says which state was lost.
"""

import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tuneapp.checkpoint import Content, Row, read_last
from tuneapp.config import TrialConfig
from tuneapp.errors import ConfigError, RunError
from tuneapp.folds import fold_folder
from tuneapp.ledger import read_events
from tuneapp.models import build_staged
from tuneapp.records import read_records
from tuneapp.rundir import RunDir
from tuneapp.statedict import FROZEN_PARTS
from tuneapp.training import TrialRun, choose_device
from tuneapp.weights import preprocessing_of

MOST_EPOCHS = 3
"""Unless asked for: enough for a kill in an epoch, one between two, and one epoch after both."""
MOST_KILLS = 3
CLOCKED = ("train/images_per_s", "train/data_wait")
"""Measured times, in which no two trainings agree."""
COMMAND = (sys.executable, "-m", "tuneapp")
"""How a child process is started, before its arguments."""
_TRIAL = "t0001"
_POLL_S = 0.01

Leaves = dict[str, Any]
Pieces = dict[str, Leaves]


@dataclass(frozen=True)
class Difference:
    """One tensor, number or text that is not the same after both trainings.

    Attributes:
        where: its name within its piece.
        straight: what the straight training has, in words; empty for tensors of one shape.
        killed: the same of the killed one.
        largest: of two tensors, the largest difference of their numbers.
    """

    where: str
    straight: str = ""
    killed: str = ""
    largest: float | None = None


@dataclass(frozen=True)
class Piece:
    """A piece of a training's state, such as its optimizer, and its differences.

    Attributes:
        name: of the piece.
        count: tensors, numbers and texts that it has; 0 where the training has no such piece.
        differences: none, where all of them are the same.
    """

    name: str
    count: int
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Kill:
    """When a training was killed, or is to be.

    Attributes:
        done: the epochs that it had done; with folds, over all of them.
        is_between: as soon as an epoch was done; else in the middle of the next one.
    """

    done: int
    is_between: bool


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The result of comparing a straight and a killed training.

    Attributes:
        epochs: of each training; with folds, over all of them.
        asked: how often it was to be killed.
        kills: how often it really was, before it was over.
        pieces: of both trainings' states; none if the killed one could not be resumed.
        failure: why it could not be resumed; else empty.
        first_epoch: the first epoch with another number in it; None where there is none.
        device: where they trained, such as `cpu`.
        folder: where both trainings are; None once they are removed.
    """

    epochs: int
    asked: int
    kills: tuple[Kill, ...]
    pieces: tuple[Piece, ...] = ()
    failure: str = ""
    first_epoch: int | None = None
    device: str
    folder: Path | None

    @property
    def is_same(self) -> bool:
        """Whether the kills changed nothing."""
        return not self.failure and not any(piece.differences for piece in self.pieces)


def verify_resume(
    words: Sequence[str],
    config: TrialConfig,
    run: TrialRun,
    *,
    num_folds: int = 0,
    interruptions: int | None = None,
    keep: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Verified:
    """Train a configuration straight and with kills, and compare the results.

    Args:
        words: arguments of `tuneapp train` that stand for the configuration.
        config: the configuration itself.
        run: where and how it runs.
        num_folds: of its data; 0 without folds.
        interruptions: kills; None is one for each epoch but the last, at most `MOST_KILLS`.
        keep: leave both trainings on the disk although they are the same.
        tell: called with what is being done.

    Raises:
        ConfigError: it is too short for that many kills, or fails even without any.
    """
    epochs = config.epochs * max(num_folds, 1)
    plan = plan_kills(epochs, interruptions)
    buffers = buffer_names(config, run)
    folder = Path(tempfile.mkdtemp(prefix="tuneapp-verify-")).resolve()
    is_wanted = keep
    try:
        with _Signals() as signals:
            pause_s = _train_straight(words, folder, tell, signals.check) / 3
            kills, failure = _train_killed(words, folder, plan, pause_s, tell, signals.check)
        kills = [kill for kill in kills if kill.done < epochs]
        if not kills:
            raise ConfigError(
                "the training was over before it could be killed, and nothing is verified: give "
                "it more to do, by --epochs"
            )
        tell("comparing")
        found = Verified(
            epochs=epochs,
            asked=len(plan),
            kills=tuple(kills),
            failure=failure,
            device=choose_device(run).type,
            folder=folder,
        )
        if not failure:
            found = _compared(found, folder, num_folds, buffers)
        is_wanted = keep or not found.is_same
    finally:
        if not is_wanted:
            shutil.rmtree(folder, ignore_errors=True)
    return found if is_wanted else replace(found, folder=None)


def plan_kills(epochs: int, interruptions: int | None) -> list[Kill]:
    """Return when to kill a training: spread over its epochs, first in the middle of one.

    Args:
        epochs: of the training.
        interruptions: kills; None is one for each epoch but the last, at most `MOST_KILLS`.

    Raises:
        ConfigError: there are too few epochs to resume after that many kills.
    """
    most = max(epochs - 1, 1)
    count = min(most, MOST_KILLS) if interruptions is None else interruptions
    if not 1 <= count <= most:
        raise ConfigError(
            f"--interruptions {count}: must be 1 to {most} for a training of {epochs} epoch(s)"
        )
    places = [number * epochs // (count + 1) for number in range(1, count + 1)]
    return [Kill(done, is_between=bool(n % 2)) for n, done in enumerate(places)]


def buffer_names(config: TrialConfig, run: TrialRun) -> set[str]:
    """Return which tensors of a checkpoint's model are buffers, such as BatchNorm statistics."""
    size = preprocessing_of(config, run.images.native_size).crop_size
    with torch.random.fork_rng(devices=[]):
        model = build_staged(config, len(run.images.classes), size)
    return {name for name, _ in model.named_buffers(remove_duplicate=False)}


# --- Comparing ------------------------------------------------------------------------------------


def pieces_of(content: Content, buffers: Collection[str]) -> Pieces:
    """Return the content of a checkpoint as named pieces, each as its tensors, numbers and texts.

    Args:
        content: as `read_last` returns it.
        buffers: which tensors of the model are no parameters.
    """
    rest = dict(content)
    rest.pop(FROZEN_PARTS, None)  # where they lie; what they hold is in the model
    model = rest.pop("model")
    history = {f"epoch {row['epoch']}": _timeless(row) for row in rest.pop("history")}
    named = {
        "weights": {name: tensor for name, tensor in model.items() if name not in buffers},
        "buffers": {name: tensor for name, tensor in model.items() if name in buffers},
        "moving average": rest.pop("ema", None),
        "optimizer": rest.pop("optimizer", None),
        "schedule": rest.pop("schedule", None),
        "gradient scaler": rest.pop("scaler", None),
        "loss": rest.pop("loss", None),
        "random generators": rest.pop("generators", None),
        "history": {
            **history,
            "best epoch": rest.pop("best_epoch", None),
            "applied": rest.pop("applied", None),
        },
        "configuration": rest.pop("config", None),
        **rest,  # whatever checkpoints will hold besides is compared, too
    }
    return {name: _leaves(value) for name, value in named.items()}


def compare(straight: Pieces, killed: Pieces) -> tuple[Piece, ...]:
    """Return the pieces of both trainings with their differences, to the last bit."""
    return tuple(
        _piece(name, straight.get(name, {}), killed.get(name, {}))
        for name in dict.fromkeys([*straight, *killed])
    )


def _piece(name: str, straight: Leaves, killed: Leaves) -> Piece:
    places = list(dict.fromkeys([*straight, *killed]))
    found = [_difference(place, straight, killed) for place in places]
    return Piece(name, len(places), tuple(each for each in found if each is not None))


def _difference(where: str, straight: Leaves, killed: Leaves) -> Difference | None:
    if where not in straight:
        return Difference(where, "nothing", _kind(killed[where]))
    if where not in killed:
        return Difference(where, _kind(straight[where]), "nothing")
    a, b = straight[where], killed[where]
    if isinstance(a, Tensor) and isinstance(b, Tensor) and _kind(a) == _kind(b):
        if torch.equal(_bits(a), _bits(b)):
            return None
        return Difference(where, largest=(a.double() - b.double()).abs().max().item())
    said = _kind(a), _kind(b)
    return None if said[0] == said[1] else Difference(where, *said)


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes: NaN is the same as NaN, and -0.0 is not 0.0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _kind(value: Any) -> str:
    """Return what a value is in words: all of a number or text, and what a tensor consists of."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _leaves(value: Any, path: str = "") -> Leaves:
    """Return every tensor, number and text of a nested state by its path; None is nothing."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {path: value}
    found: Leaves = {}
    for key, part in items:
        found |= _leaves(part, f"{path}/{key}" if path else str(key))
    return found


def _timeless(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in CLOCKED}


def _compared(found: Verified, folder: Path, num_folds: int, buffers: Collection[str]) -> Verified:
    """Return `found` with the comparison of both trainings."""
    pieces, rows = [], []
    for run in (RunDir(folder / "straight"), RunDir(folder / "killed")):
        contents = [read_last(place) for place in _checkpoints(run, num_folds)]
        metrics, applied = _reported(run, num_folds)
        held = _joined([pieces_of(content, buffers) for content in contents])
        pieces.append({"metrics": metrics, **held, "applied": applied})
        rows.append([_timeless(row) for content in contents for row in content["history"]])
    differs = (n for n, (a, b) in enumerate(zip(*rows, strict=False), start=1) if a != b)
    return replace(found, pieces=compare(*pieces), first_epoch=next(differs, None))


def _checkpoints(run: RunDir, num_folds: int) -> list[Path]:
    folder = run.trial(_TRIAL)
    folders = [fold_folder(folder, n) for n in range(1, num_folds + 1)] if num_folds else [folder]
    return [each / "checkpoints" for each in folders]


def _joined(folds: Sequence[Pieces]) -> Pieces:
    """Return the pieces of all folds as one, in which the names say of which fold."""
    if len(folds) == 1:
        return folds[0]
    return {
        name: {f"fold {n}/{k}": v for n, fold in enumerate(folds, 1) for k, v in fold[name].items()}
        for name in folds[0]
    }


def _reported(run: RunDir, num_folds: int) -> tuple[Leaves, Leaves]:
    """Return what the ledger holds: metrics, and the applied values."""
    events = read_events(run.ledger)
    rows = [event["row"] for event in events if event["event"] == "epoch"]
    applied = [event["applied"] for event in events if event["event"] == "applied"]
    step = "fold" if num_folds else "epoch"
    return _leaves({f"{step} {row['epoch']}": _timeless(row) for row in rows}), _leaves(applied)


# --- Training, and killing ------------------------------------------------------------------------


def _train_straight(
    words: Sequence[str], folder: Path, tell: Callable[[str], None], check: Callable[[], None]
) -> float:
    """Train without a kill; return how many seconds an epoch took."""
    tell("training straight")
    run, log = RunDir(folder / "straight"), folder / "straight.txt"
    times: list[float] = []
    with _child(_first_words(words, run), log) as child:
        while child.poll() is None:
            check()
            times += [time.monotonic()] * (_steps(run) - len(times))
            time.sleep(_POLL_S)
    times += [time.monotonic()] * (2 - len(times))  # over before much could be seen
    if child.returncode != 0:
        raise ConfigError(
            f"the training fails even without a kill: {_cause(run, log)}; "
            "`python -m tuneapp train` with the same options shows all of it"
        )
    return statistics.median(b - a for a, b in pairwise(times))


def _train_killed(
    words: Sequence[str],
    folder: Path,
    plan: Sequence[Kill],
    pause_s: float,
    tell: Callable[[str], None],
    check: Callable[[], None],
) -> tuple[list[Kill], str]:
    """Train to the end in spite of the kills; return them, and why it failed, if it did."""
    run, log = RunDir(folder / "killed"), folder / "killed.txt"
    kills: list[Kill] = []
    next_words = _first_words(words, run)
    while True:
        tell(f"training with kills: {len(kills)} of {len(plan)} done")
        # What is done already cannot be waited for; the very first epoch can.
        due = [kill for kill in plan if kill.done > _epochs_done(run) or not kills]
        with _child(next_words, log) as child:
            is_due = bool(due) and _wait_for(due[0], run, child, pause_s, check)
            if is_due:
                _kill(child)
            while child.poll() is None:
                check()
                time.sleep(_POLL_S)
        if not is_due or child.returncode != -signal.SIGKILL:
            return kills, "" if child.returncode == 0 else _cause(run, log)
        kills.append(replace(due[0], done=_epochs_done(run)))
        next_words = ["resume", str(run.path)]


def _first_words(words: Sequence[str], run: RunDir) -> list[str]:
    return ["train", *words, f"--runs-dir={run.path.parent}", f"--name={run.path.name}"]


def _wait_for(
    kill: Kill,
    run: RunDir,
    child: subprocess.Popen[bytes],
    pause_s: float,
    check: Callable[[], None],
) -> bool:
    """Wait for the moment of a kill; return False if the training was over before."""
    moment = None
    while child.poll() is None:
        check()
        if moment is None and _steps(run) > kill.done:
            moment = time.monotonic() + (0.0 if kill.is_between else pause_s)
        if moment is not None and time.monotonic() >= moment:
            return True
        time.sleep(_POLL_S)
    return False


def _steps(run: RunDir) -> int:
    """Return 1 once the first epoch has begun, and 1 more for each that is done."""
    folder = run.trial(_TRIAL)
    has_begun = any((each / "config.json").exists() for each in _folders(folder))
    return int(has_begun) + _epochs_done(run)


def _epochs_done(run: RunDir) -> int:
    """Return how many epochs are recorded; with folds, over all of them.

    By the tables of epochs, which are written after the checkpoints: the ledger has folds only.
    """
    done = 0
    for folder in _folders(run.trial(_TRIAL)):
        table = folder / "epochs.csv"
        if table.exists():
            with table.open(encoding="utf-8", newline="") as file:
                done += sum(1 for _ in csv.DictReader(file))
    return done


def _folders(trial: Path) -> list[Path]:
    return [trial, *trial.glob("fold*")]


def _cause(run: RunDir, log: Path) -> str:
    """Return in a line why a child ended early: from the ledger, else its last output."""
    try:
        record = read_records(read_events(run.ledger)).get(_TRIAL)
    except RunError:
        record = None
    if record is not None and record.cause:
        return f"{record.state}: {record.cause}"
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line] or ["it printed nothing"]
    mark = "tuneapp: error: "
    said = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
    return (said or lines)[-1]


@contextmanager
def _child(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run tuneapp in its own process group, all of which ends with the block."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            [*COMMAND, *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and the processes that make its batches, unless it has ended; wait for it."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class _Signals:
    """Notes Ctrl-C, SIGTERM and SIGHUP until `check`, and not while a child is being started.

    Whatever ends us so ends the child, too: it is in a process group that no terminal knows.
    """

    def __init__(self) -> None:
        self._caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self.check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._caught = number

    def check(self) -> None:
        """End what runs here, if a signal asked for it."""
        if self._caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self._caught:
            raise SystemExit(128 + self._caught)
