"""The study as a file that `optuna-dashboard` opens, also while the sweep runs.

A mirror: it is written from the study and never read by a sweep, so it can be deleted at any time
and is rebuilt from the ledger. An error in it never ends a sweep.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

log = logging.getLogger(__name__)


class StudyMirror:
    """Writes a study into an Optuna journal file as it grows."""

    def __init__(self, file: Path, study_name: str) -> None:
        """Set what is mirrored; nothing is written yet.

        Args:
            file: the journal, which may hold other studies too.
            study_name: under which the dashboard shows this one.
        """
        self._file = file
        self._name = study_name
        self._storage: BaseStorage | None = None
        self._study_id = -1

    def open(self, trials: Sequence[FrozenTrial], direction: StudyDirection) -> None:
        """Bring the file up to these trials; if it holds others, the study is rewritten."""
        self._try(lambda: self._catch_up(trials, direction))

    def update(self, trial: FrozenTrial) -> None:
        """Bring one trial up to date: one that is in the file, or the next one."""
        storage = self._storage
        if storage is not None:
            self._try(lambda: self._write(storage, trial))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # whatever it is, the sweep does not depend on this file
            self._storage = None
            log.warning("%s is no longer updated (%s); the sweep continues", self._file, error)

    def _catch_up(self, trials: Sequence[FrozenTrial], direction: StudyDirection) -> None:
        # Left by a process that was killed while it wrote. The run is locked: no other one writes.
        for leftover in self._file.parent.glob(f"{self._file.name}.lock*"):
            leftover.unlink(missing_ok=True)
        if self._file.exists() and not self._file.read_bytes().endswith(b"\n"):
            self._file.unlink()  # torn by a kill: the next line would follow half a line
        try:
            storage, known = self._open(direction)
        except Exception as error:  # a damaged line, or no journal at all
            log.info("%s is rebuilt: %s", self._file, error)
            self._file.unlink(missing_ok=True)
            storage, known = self._open(direction)
        pairs = zip(known, trials, strict=False)
        if len(known) > len(trials) or not all(_may_become(old, new) for old, new in pairs):
            storage.delete_study(self._study_id)
            storage, _ = self._open(direction)
        for trial in trials:
            self._write(storage, trial)
        self._storage = storage

    def _open(self, direction: StudyDirection) -> tuple[BaseStorage, list[FrozenTrial]]:
        lock = _Lock(str(self._file))
        storage = JournalStorage(JournalFileBackend(str(self._file), lock))
        try:
            self._study_id = storage.get_study_id_from_name(self._name)
        except KeyError:
            self._study_id = storage.create_new_study([direction], self._name)
        return storage, storage.get_all_trials(self._study_id)

    def _write(self, storage: BaseStorage, trial: FrozenTrial) -> None:
        if trial.number == storage.get_n_trials(self._study_id):
            storage.create_new_trial(self._study_id, template_trial=trial)
            return
        trial_id = storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        known = storage.get_trial(trial_id)
        if known.state.is_finished():
            return
        for step, value in trial.intermediate_values.items():
            if step not in known.intermediate_values:
                storage.set_trial_intermediate_value(trial_id, step, value)
        for key, attribute in trial.system_attrs.items():
            if key not in known.system_attrs:
                storage.set_trial_system_attr(trial_id, key, attribute)
        if trial.state.is_finished():
            storage.set_trial_state_values(trial_id, trial.state, trial.values)


class _Lock(JournalFileSymlinkLock):
    """Optuna's lock, which would wait forever if it was held when the journal was removed."""

    def acquire(self) -> bool:
        lock = Path(self._lock_file)
        if lock.is_symlink() and not lock.exists():
            lock.unlink(missing_ok=True)
        return super().acquire()


def _may_become(old: FrozenTrial, new: FrozenTrial) -> bool:
    """Whether a trial in the file is the same one, as it was before or is now."""
    curve = old.intermediate_values.items() <= new.intermediate_values.items()
    ended_so = old.state in (TrialState.RUNNING, new.state)
    return old.params == new.params and curve and ended_so
