"""The run directory: everything about a run as plain files with relative paths.

    runs/resnet-001/
        ledger.jsonl      the events (ledger.py); the rest can be made again from it
        run.json          settings, format number of this layout, versions, weights, warnings
        bad_images.csv    images that cannot be read and files that are no images, if there are any
        space.py          the search space as it was when the run began; a resumed run uses this one
                          (space-2.py and so on: the spaces to which it was refined)
        study.log         Optuna's view of the trials, a mirror for optuna-dashboard
        frozen/           frozen parts, stored once for all checkpoints, named by their hash
        split.csv         every image: path, class, split, fold, group, weight, its fingerprint
        trials/t0001/     config.json, epochs.csv, log.txt, TensorBoard events, checkpoints/ with
                          their manifest; error.txt of a failed trial
        trials.csv        the table of trials

Files are written under another name and renamed, so a reader never sees half of one.
"""

import contextlib
import json
import logging
import os
import platform
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from tuneapp.config import Data, RunSettings
from tuneapp.errors import ConfigError, RunError, RunInUse, StorageError

FORMAT = 2
"""Of `run.json` and the ledger. 2: several spaces, a budget for checkpoints. 1 can be read."""
KEEP_ALL = 10**9
"""As `keep_best`: more trials than any run has."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PACKAGES = (
    "tuneapp",
    "torch",
    "torchvision",
    "ray",
    "optuna",
    "tensorboardX",
    "pandas",
    "numpy",
    "timm",
)


@dataclass(frozen=True)
class RunDir:
    """The paths inside one run directory."""

    path: Path

    @property
    def ledger(self) -> Path:
        """The events."""
        return self.path / "ledger.jsonl"

    @property
    def settings_file(self) -> Path:
        """Settings, versions, weights."""
        return self.path / "run.json"

    def space_file(self, number: int = 1) -> Path:
        """Return the copy of a space of the run: the first, or one that it was refined to."""
        return self.path / ("space.py" if number == 1 else f"space-{number}.py")

    @property
    def study_file(self) -> Path:
        """The mirror of the study."""
        return self.path / "study.log"

    @property
    def split_file(self) -> Path:
        """Which image is in which split."""
        return self.path / "split.csv"

    @property
    def bad_images_file(self) -> Path:
        """Images that cannot be read, and why."""
        return self.path / "bad_images.csv"

    @property
    def frozen(self) -> Path:
        """The frozen parts of the networks of trials; their checkpoints share them."""
        return self.path / "frozen"

    @property
    def trials_table(self) -> Path:
        """The table of trials."""
        return self.path / "trials.csv"

    def trial(self, trial_id: str) -> Path:
        """Return the folder of a trial.

        Raises:
            RunError: the id, or a link, leads out of the run directory.
        """
        if not _NAME.fullmatch(trial_id):
            raise RunError(f"{trial_id!r} is not a trial id such as t0001")
        folder = self.path / "trials" / trial_id
        _refuse_links(folder)
        if folder.is_symlink():
            raise RunError(f"{folder} is a link, and a run is written only into its own folder")
        return folder

    def lock(self) -> FileLock:
        """Take the run for this process, until `release()` or its death.

        Raises:
            RunInUse: another process is working in this run directory.
            StorageError: the directory cannot be written.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunInUse(f"{self.path} is in use by another tuneapp; wait for it") from None
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror}") from None
        return lock


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of `run.json`.

    Attributes:
        kind: `sweep`, or `train` for a single configuration.
        space_paths: absolute path of the search-space file, of which `space.py` is the copy; then
            those to which the run was refined.
        settings: where and how the trials run.
        image_root: absolute folder of the images; None for embedded data.
        classes: class names in the order of their labels.
        is_multilabel: whether an image may show several of them.
        weights: for each weights choice of the space, what was found (`weights.Found.as_dict`).
        params: of the one trial of a `train` run.
        warnings: what the user must know when reading the results.
        cpus_per_trial: CPU threads of each trial.
        gpus_per_trial: GPUs, or the share of one, of each trial.
        concurrent: trials at once.
        time_budget_s: seconds after which the sweep ends; None is no limit.
        import_from: folders in which user-defined modules are searched, after all others.
        code: files of user-defined networks, losses and schedules, with their SHA-256.
        keep_best: how many trials' checkpoints are kept once they have ended.
        disk_budget: bytes that all checkpoints may take; None is no limit.
        min_free: bytes of the disk below which trials wait for room.
    """

    kind: Literal["sweep", "train"]
    space_paths: tuple[str, ...]
    settings: RunSettings
    image_root: str | None
    classes: tuple[str, ...]
    weights: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    cpus_per_trial: int = 1
    gpus_per_trial: float = 0.0
    concurrent: int = 1
    time_budget_s: float | None = None
    import_from: tuple[str, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)
    is_multilabel: bool = False
    keep_best: int = 5
    disk_budget: int | None = None
    min_free: int = 500 * 10**6


def require_name(runs_dir: Path, name: str | None) -> None:
    """Check that a run directory of this name can be made, and leave nothing behind.

    Args:
        runs_dir: as `--runs-dir`; it may not exist yet.
        name: as `--name`; None takes one that is free.

    Raises:
        RunError: the name is taken or is not a plain file name, or the folder cannot be made.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise RunError(
            f"--name {name!r} is not allowed: letters, digits, '.', '_' and '-', at most 64, "
            "beginning with a letter or digit"
        )
    if name is not None and os.path.lexists(runs_dir / name):
        raise _name_taken(runs_dir / name)
    place = runs_dir.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        Path(tempfile.mkdtemp(prefix=".tuneapp-", dir=place)).rmdir()
    except OSError as error:
        raise _no_place(runs_dir, place, error) from None


def _no_place(runs_dir: Path, place: Path, error: OSError) -> RunError:
    said = f"cannot make a run directory in {place}: {error.strerror}"
    return RunError(f"--runs-dir {runs_dir}: {said}")


def _name_taken(path: Path) -> RunError:
    return RunError(
        f"--name {path.name!r}: {path} exists; resume it with `python -m tuneapp resume {path}`, "
        "or choose another name"
    )


def create_run(runs_dir: Path, name: str | None, default_name: str) -> RunDir:
    """Make a new run directory; without `name` it gets `default_name` and the next number.

    Raises:
        RunError: the name is taken or is not a plain file name, or the folder cannot be made.
    """
    require_name(runs_dir, name)
    names = [name] if name else (f"{default_name}-{number:03d}" for number in range(1, 100_000))
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        for candidate in names:
            path = runs_dir / candidate
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return RunDir(path)
    except OSError as error:
        raise _no_place(runs_dir, runs_dir, error) from None
    raise _name_taken(path)


def write_record(run: RunDir, record: RunRecord) -> None:
    """Write `run.json`."""
    plain = {
        "format": FORMAT,
        **asdict(record),
        "versions": _versions(),
    }
    write_json(run.settings_file, plain)


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a run depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def open_run(path: Path) -> tuple[RunDir, RunRecord]:
    """Return the run directory at `path` and its record.

    Raises:
        RunError: it is not a run directory, or one of a newer tuneapp.
        StorageError: its record is damaged.
    """
    run = RunDir(path)
    _refuse_links(path)
    try:
        plain = json.loads(run.settings_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} is not a run directory: it has no run.json") from None
    except OSError as error:
        raise StorageError(f"{run.settings_file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StorageError(f"{run.settings_file} is damaged: {error}") from None
    try:
        made_by = plain.pop("versions")
        made_in = plain.pop("format")
        if made_in > FORMAT:
            raise RunError(
                f"{path} was made by a newer tuneapp ({made_by['tuneapp']}); update this one"
            )
        settings = plain["settings"]
        data = settings["data"]
        settings["data"] = Data(**data) if isinstance(data, dict) else Data(source=data)
        plain["settings"] = RunSettings(**settings)
        plain["classes"] = tuple(plain["classes"])
        plain["warnings"] = tuple(plain["warnings"])
        plain["import_from"] = tuple(plain.get("import_from", ()))
        if made_in == 1:  # it knew one space, and kept a checkpoint of every trial
            plain |= {"space_paths": [plain.pop("space_path")], "keep_best": KEEP_ALL}
        plain["space_paths"] = tuple(plain["space_paths"])
        return run, RunRecord(**plain)
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise StorageError(f"{run.settings_file} is not a record of a run: {error}") from None


def require_own(file: Path) -> None:
    """Refuse to run code from a run directory that another user could have written.

    Raises:
        RunError: the file belongs to another user, or others may write it.
    """
    status = file.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise RunError(
            f"{file} is code that belongs to another user, or that others may write: read it, then "
            "make it yours (chown) and writable only by you (chmod o-w)"
        )


def write_json(path: Path, plain: object) -> None:
    """Write `plain` as indented JSON, completely or not at all."""
    text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def cell(value: Any) -> Any:
    """Return `value` for a cell of a table, so that no spreadsheet runs a text as a formula.

    Such a text gets a leading `'`, also if it has one already, so that removing one gives the
    text again.
    """
    starts = ("=", "+", "-", "@", "\t", "\r")
    is_formula = isinstance(value, str) and value.lstrip("'").startswith(starts)
    return f"'{value}" if is_formula else value


def printable(text: str) -> str:
    """Return a text with control characters, including line ends, as Python escapes them."""
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def _refuse_links(folder: Path) -> None:
    """Refuse links, by which a run directory of another user could let us write elsewhere.

    Raises:
        RunError: the folder, which need not exist, holds a link.
    """
    entries = os.scandir(folder) if folder.is_dir() else ()
    for entry in entries:
        if entry.is_symlink():
            raise RunError(
                f"{entry.path} is a link, and a run is written only into its own folder: replace "
                "the link by its target"
            )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: old or new, never half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write(aside)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; without this, a power failure can undo it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class log_to:  # noqa: N801 - used as a `with` statement only
    """Also write the log of `tuneapp` to a file."""

    def __init__(self, file: Path) -> None:
        self._handler = _LogFile(file, encoding="utf-8", errors="backslashreplace")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._log = logging.getLogger("tuneapp")

    def __enter__(self) -> None:
        self._log.addHandler(self._handler)
        self._level = self._log.level
        self._log.setLevel(logging.INFO)

    def __exit__(self, *exit_reason: object) -> None:
        self._log.removeHandler(self._handler)
        self._log.setLevel(self._level)
        with contextlib.suppress(OSError):  # it writes what it still holds
            self._handler.close()


class _LogFile(logging.FileHandler):
    """A log file that tolerates a full disk: a wait for room is also reported elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name is logging's
        """Print no traceback; lines that could not be written are written with the next ones."""
