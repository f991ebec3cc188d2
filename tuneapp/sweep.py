"""A sweep: many trials at once under Ray Tune, from a search space to a finished ledger.

Ray places trials on CPUs and GPUs and keeps their processes; what was tried and what came of it is
in the ledger. `Tuner.restore` is not used: a resumed sweep is a new Tuner over the same ledger.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from tuneapp.config import RunSettings
from tuneapp.data.making import Watch
from tuneapp.errors import ConfigError, RunError, TuneappError
from tuneapp.ledger import Event, Ledger
from tuneapp.prepare import check_again, first_trials, lay_out, prepare, read_run_space
from tuneapp.rundir import RunDir, RunRecord, create_run, open_run
from tuneapp.space import SearchSpace
from tuneapp.study import Study

# Before Ray is imported, which reads them then. Each can be set otherwise from outside.
for _name, _value in {
    "RAY_AUTH_MODE": "token",  # Ray's own default, said aloud: silences its notice
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all of Ray's sockets on 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray's own tables and banners are off: we have ours
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # TensorBoard and CSV are ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a trial's error.txt has it
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402

from tuneapp.search import Driver, Proposer, Stopper, Until  # noqa: E402
from tuneapp.trainable import train_trial  # noqa: E402

log = logging.getLogger(__name__)

MEMORY_PER_TRIAL_BYTES = 2 * 2**30
"""Room for torch (about 1 GB in a process), a network and its batches."""
START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 128 * 2**20
"""Ray's shared memory: nothing large goes through it."""

_TOKEN = Path("~/.ray/auth_token").expanduser()

Listen = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What `sweep` is asked besides the space and the settings.

    Attributes:
        trials: how many in all, recipes included.
        runs_dir: where run directories are made.
        name: of the run directory; None takes the space's and a number.
        concurrent: trials at once; None is as many as the machine has room for.
        time_budget_s: seconds after which the sweep ends; None is no limit.
        dashboard_host: address for Ray's dashboard; None starts none.
    """

    trials: int
    runs_dir: Path
    name: str | None = None
    concurrent: int | None = None
    time_budget_s: float | None = None
    dashboard_host: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a sweep, or a part of one, came to its end.

    Attributes:
        run: its directory.
        interrupted_by: the signal that ended it early, if one did.
        out_of_time: whether its time budget ended it early.
        common_failure: the cause for which all of the first trials failed, if they did.
        remaining: trials still to run.
    """

    run: RunDir
    interrupted_by: int | None
    out_of_time: bool
    common_failure: str | None
    remaining: int


def start_sweep(
    space: SearchSpace,
    settings: RunSettings,
    options: SweepOptions,
    say: Callable[[str], None],
    begun: Callable[[RunDir, RunRecord], Listen],
    watch: Watch,
) -> Outcome:
    """Check everything, make the run directory, and run the sweep.

    Args:
        space: what to search.
        settings: where and how every trial runs.
        options: how many trials, where, for how long.
        say: told what is being prepared.
        begun: called with the new run before its first trial; returns the listener to its events.
        watch: told how far the decoding of the images is.

    Raises:
        TuneappError: something does not fit; nothing was written.
    """
    branches = space.branches()
    recipes = first_trials(space, branches)
    slots, cpus, gpus = share_machine(settings, options.trials, options.concurrent)
    prepared = prepare(space, settings, branches, say, watch)
    run = create_run(options.runs_dir.resolve(), options.name, space.name)
    record = RunRecord(
        kind="sweep",
        space_path=str(space.path.absolute()),
        settings=settings,
        image_root=None if prepared.images.root is None else str(prepared.images.root),
        classes=prepared.images.classes,
        is_multilabel=prepared.images.is_multilabel,
        weights={key: found.as_dict() for key, found in prepared.weights.items()},
        warnings=prepared.warnings,
        import_from=(str(Path.cwd()),),
        code=prepared.code,
        cpus_per_trial=cpus,
        gpus_per_trial=gpus,
        concurrent=slots,
        time_budget_s=options.time_budget_s,
    )
    lock = run.lock()
    try:
        lay_out(run, space, prepared.images, record)
        with Ledger(run.ledger) as ledger:
            study = Study(
                space,
                ledger,
                settings,
                [(params, "recipe") for params in recipes],
                begun(run, record),
            )
            study.want(options.trials)
            return _drive(run, record, study, ledger, prepared.max_epochs, options.dashboard_host)
    finally:
        lock.release()


def resume_sweep(
    path: Path,
    begun: Callable[[RunDir, RunRecord], Listen],
    watch: Watch,
    dashboard_host: str | None = None,
) -> Outcome:
    """Go on with the sweep in `path`: unfinished trials from their last epoch, then the rest.

    The space is the copy in the run directory. The time budget starts anew.

    Raises:
        TuneappError: it is no run directory, is in use, or its images have changed.
    """
    run, record = open_run(path.resolve())
    lock = run.lock()
    try:
        space = read_run_space(run, record)
        branches = space.branches()
        recipes = first_trials(space, branches)
        with Ledger(run.ledger) as ledger:
            study = Study(
                space,
                ledger,
                record.settings,
                [(params, "recipe") for params in recipes],
                begun(run, record),
            )
            if study.wanted == 0:
                raise RunError(
                    f"{run.path} ended before its first trial; remove it and start again"
                )
            if study.remaining == 0:
                return Outcome(run, None, False, None, 0)
            check_again(run, record, branches, watch)
            max_epochs = max(record.settings.applied_to(b.config).epochs for b in branches)
            return _drive(run, record, study, ledger, max_epochs, dashboard_host)
    finally:
        lock.release()


def share_machine(
    settings: RunSettings, trials: int, concurrent: int | None
) -> tuple[int, int, float]:
    """Return trials at once, and CPU threads and GPUs (or a share of one) for each.

    On GPUs: one trial on each, or `concurrent` of them sharing the GPUs. On CPUs: one core for
    each, as far as memory and trials go: two on a core each get more done than one on two.

    Raises:
        ConfigError: the machine cannot give what was asked.
    """
    cores = _num_cores()
    gpus = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if settings.device == "cuda" and gpus == 0:
        raise ConfigError("--device cuda: this machine has no GPU that torch can use; use auto")
    if concurrent is not None and concurrent < 1:
        raise ConfigError(f"--concurrent {concurrent}: must be at least 1")
    room = gpus or max(1, min(cores, _memory_bytes() // MEMORY_PER_TRIAL_BYTES))
    most = max(cores, gpus)
    slots = int(min(room, trials) if concurrent is None else concurrent)
    if slots > most:
        raise ConfigError(
            f"--concurrent {slots}: this machine has {cores} CPU cores; use 1 to {most}"
        )
    # Ray gives out whole GPUs, or shares of a single one.
    share = 0.0 if gpus == 0 else 1.0 if slots <= gpus else 1 / math.ceil(slots / gpus)
    return slots, max(1, cores // slots), share


def _num_cores() -> int:
    """Return the CPU cores that this process may use, in a container those of the container."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores


def _memory_bytes() -> int:
    """Return the memory of the machine, in a container that of the container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max")
    return min(memory, int(limit)) if limit.isdigit() else memory


def _cgroup(name: str) -> str:
    """Return a limit of the Linux control group that a container sees as its root."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _drive(
    run: RunDir,
    record: RunRecord,
    study: Study,
    ledger: Ledger,
    max_epochs: int,
    dashboard_host: str | None,
) -> Outcome:
    """Run the study's remaining trials under Ray."""
    settings = record.settings
    if record.gpus_per_trial and not torch.cuda.is_available():
        raise ConfigError(f"{run.path} was begun on GPUs, and this machine has none for torch")
    driver = Driver(study, str(run.path))
    folds = settings.data.folds
    if folds is None:
        stopper = Stopper(driver, max_epochs, settings.mode)
    else:
        stopper = Stopper(driver, folds, settings.mode, step="fold")
    stopper.replay(list(ledger.events))
    # The handlers come second: `ray.init` sets its own for SIGTERM.
    with _ray(record, dashboard_host) as scratch, _signals() as caught:
        budget_s = record.time_budget_s
        until = Until(driver, None if budget_s is None else time.monotonic() + budget_s)
        tune.Tuner(
            tune.with_resources(
                train_trial, {"cpu": record.cpus_per_trial, "gpu": record.gpus_per_trial}
            ),
            tune_config=tune.TuneConfig(
                search_alg=Proposer(driver, settings.mode),
                scheduler=stopper,
                num_samples=study.remaining,
                max_concurrent_trials=record.concurrent,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name="trials", storage_path=str(scratch), stop=until, verbose=0
            ),
        ).fit()
    early = study.remaining > 0 and study.common_failure is None and not until.is_late
    if early and not caught:
        raise TuneappError(
            f"Ray ended the sweep with {study.remaining} trials to go; see the log.txt of the "
            f"trials in {run.path}, and go on with `python -m tuneapp resume {run.path}`"
        )
    return Outcome(
        run,
        interrupted_by=caught[0] if early else None,
        out_of_time=until.is_late and study.remaining > 0,
        common_failure=study.common_failure,
        remaining=study.remaining,
    )


@contextlib.contextmanager
def _ray(record: RunRecord, dashboard_host: str | None) -> Iterator[Path]:
    """Start a Ray of our own, give a scratch folder for its files, and leave nothing of either."""
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    scratch = Path(tempfile.mkdtemp(prefix="tuneapp-"))
    gpus = record.gpus_per_trial
    try:
        context = _patiently(
            partial(
                ray.init,
                address="local",
                num_cpus=record.concurrent * record.cpus_per_trial,
                num_gpus=torch.cuda.device_count() if gpus else 0,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=dashboard_host is not None,
                dashboard_host=dashboard_host or "127.0.0.1",
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                _temp_dir=str(scratch / "ray"),
            )
        )
        if _TOKEN.exists():
            _TOKEN.chmod(0o600)  # Ray leaves it readable to others; it lets one run code as us
        if dashboard_host is not None:
            log.warning("dashboard http://%s", context.dashboard_url)
            log.warning("token     it asks for what `ray get-auth-token` prints")
        yield scratch / "results"
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _patiently(start: Callable[[], Any]) -> Any:
    """Start Ray; on a machine so busy that it takes longer than Ray's 30 seconds, again."""
    for attempt in range(START_ATTEMPTS):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start within 30 s (attempt %d)", attempt + 1)
            ray.shutdown()
            _end_half_started()
    raise TuneappError("Ray could not start: the machine is too busy; try again when it is less so")


def _end_half_started() -> None:
    """End what a failed start of Ray leaves behind: it goes on starting, and slows the next one."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(f"{os.sep}ray{os.sep}" in word for word in child.cmdline()):
                child.kill()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM, and hand them to Ray as the signal on which it ends a run tidily.

    Ray handles SIGINT itself while it runs trials, but aborts on SIGTERM; SIGUSR1 is its second
    word for the same. A second Ctrl-C does not wait.
    """
    caught: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1 or signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, None):
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGUSR1)

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    try:
        for number in before:
            signal.signal(number, note)
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
