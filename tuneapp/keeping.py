"""Which checkpoints of a sweep are kept: of unfinished trials all, of ended ones the best.

Metrics, tables, logs and TensorBoard's files are never removed.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from tuneapp import checkpoint
from tuneapp.config import RunSettings
from tuneapp.errors import CheckpointError, ConfigError
from tuneapp.records import TrialRecord
from tuneapp.room import say_bytes
from tuneapp.rundir import RunDir

log = logging.getLogger(__name__)


class Keeper:
    """Removes checkpoints of a run that are not needed any more.

    An unfinished trial keeps all of its checkpoints. Of trials that have ended, the best ones keep
    that of their best epoch. A file that cannot be removed is logged as a warning, and tried again.
    """

    def __init__(
        self,
        run: RunDir,
        settings: RunSettings,
        keep_best: int,
        disk_budget: int | None,
        say: Callable[[str], None],
    ) -> None:
        """Set what is to be kept; nothing is removed yet.

        Args:
            run: the run with the checkpoints.
            settings: of the run; its metric decides which trials are the best.
            keep_best: how many ended trials keep a checkpoint; at least 1.
            disk_budget: bytes that all checkpoints and the frozen parts that they share may take;
                to meet it, fewer trials keep a checkpoint, but always the best one. None is no
                limit.
            say: is called once with a line if the budget cannot be met.

        Raises:
            ConfigError: `keep_best` is less than 1.
        """
        if keep_best < 1:
            raise ConfigError(f"keep_best must be at least 1, got {keep_best}")
        self._run, self._settings = run, settings
        self._keep_best, self._budget, self._say = keep_best, disk_budget, say
        self._trimmed: set[str] = set()
        self._dropped: set[str] = set()
        self._warned: set[Path] = set()
        self._has_said = False

    def tidy(self, records: Mapping[str, TrialRecord]) -> None:
        """Remove what is not needed any more; to be called after each trial has ended.

        A trial whose process still holds its folder is left for the next call.

        Args:
            records: all trials of the run, in the order in which they were proposed.
        """
        ended = [r for r in records.values() if r.state != "unfinished"]
        kept = ranked(ended, self._settings)[: self._keep_best]
        for record in ended:
            if record.trial_id in kept:
                self._settle(record.trial_id, checkpoint.keep_only_best, self._trimmed)
            else:
                self._settle(record.trial_id, checkpoint.drop, self._dropped)
        if self._budget is not None:
            unfinished = [r.trial_id for r in records.values() if r.state == "unfinished"]
            self._fit(kept, unfinished, self._budget)

    def tidy_frozen(self) -> None:
        """Remove shared frozen parts that no checkpoint needs; only while no trial is running.

        Nothing is removed while the process of a trial of a killed sweep still runs, or if a
        manifest cannot be read.
        """
        trials = sorted((self._run.path / "trials").glob("*"))
        if not self._run.frozen.is_dir() or any(_is_held(trial) for trial in trials):
            return
        needed: set[Path] = set()
        for folder in (each for trial in trials for each in _checkpoint_folders(trial)):
            try:
                needed |= checkpoint.frozen_parts(folder)
            except (OSError, CheckpointError) as error:
                self._warn(folder, error)
                return
        for file in sorted(self._run.frozen.glob("*")):
            if file.resolve() not in needed:
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    self._warn(file, error)

    def _settle(self, trial_id: str, act: Callable[[Path], None], done: set[str]) -> None:
        """Let `act` remove checkpoints of an ended trial, and record that in `done`."""
        trial = self._run.trial(trial_id)
        if trial_id in done | self._dropped or not trial.is_dir():
            return
        is_done = True
        try:
            with FileLock(trial / ".lock", timeout=0):
                for folder in _checkpoint_folders(trial):
                    is_done &= self._act(folder, act)
        except Timeout:  # its process may still be writing
            return
        except OSError as error:
            self._warn(trial, error)
            return
        if is_done:
            done.add(trial_id)

    def _act(self, folder: Path, act: Callable[[Path], None]) -> bool:
        """Remove checkpoints, if there are any; return whether that succeeded."""
        try:
            if checkpoint.bytes_of(folder):
                act(folder)
        except (OSError, CheckpointError) as error:
            self._warn(folder, error)
            return False
        return True

    def _fit(self, kept: Sequence[str], unfinished: Iterable[str], budget: int) -> None:
        """Drop kept checkpoints, those of the worst trial first, until all fit the budget."""
        # A trial whose process still holds it has more than it will keep: it counts next time.
        sizes = {t: self._bytes_of_trial(t) for t in kept if t in self._trimmed - self._dropped}
        total = sum(sizes.values()) + sum(self._bytes_of_trial(t) for t in unfinished)
        total += self._bytes_of(self._run.frozen)
        for trial_id in reversed(kept[1:]):
            if total > budget and trial_id in sizes:
                self._settle(trial_id, checkpoint.drop, self._dropped)
                total -= sizes[trial_id]
        if total > budget and not self._has_said:
            self._has_said = True
            self._say(
                f"disk      checkpoints take {say_bytes(total)}, and may take {say_bytes(budget)}: "
                "those of the best trial and of unfinished ones are kept anyway"
            )

    def _bytes_of_trial(self, trial_id: str) -> int:
        folders = _checkpoint_folders(self._run.trial(trial_id))
        return sum(self._bytes_of(folder) for folder in folders)

    def _bytes_of(self, folder: Path) -> int:
        try:
            return checkpoint.bytes_of(folder)
        except OSError as error:
            self._warn(folder, error)
            return 0

    def _warn(self, path: Path, error: Exception) -> None:
        if path not in self._warned:
            self._warned.add(path)
            log.warning("%s: not all unneeded files could be removed (%s)", path, error)


def ranked(records: Iterable[TrialRecord], settings: RunSettings) -> list[str]:
    """Return the ids of trials that have a row, the best first; of equals the earlier one.

    With folds, those with more folds come first: means over different folds are not compared.
    """
    sign = -1 if settings.mode == "max" else 1
    scores: dict[str, tuple[int, float]] = {}
    for record in records:
        row = record.best(settings)
        if row is not None:
            folds = 0 if settings.data.folds is None else len(record.rows)
            scores[record.trial_id] = (-folds, sign * row[settings.metric])
    return sorted(scores, key=lambda trial_id: scores[trial_id])


def _checkpoint_folders(trial: Path) -> list[Path]:
    """Return the folders with checkpoints of a trial: one, or with folds, one per fold."""
    return [
        f for f in (trial / "checkpoints", *sorted(trial.glob("fold*/checkpoints"))) if f.is_dir()
    ]


def _is_held(trial: Path) -> bool:
    """Whether a process holds the folder of a trial."""
    if not (trial / ".lock").exists():
        return False
    try:
        with FileLock(trial / ".lock", timeout=0):
            return False
    except OSError:  # held (a Timeout is an OSError), or unknown
        return True
