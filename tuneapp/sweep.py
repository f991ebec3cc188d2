"""A sweep: many trials at once under Ray Tune, from a search space to a finished ledger.

Ray places trials on CPUs and GPUs and manages their processes; what was tried, and its result, is
in the ledger. `Tuner.restore` is not used: a resumed sweep is a new Tuner over the same ledger.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tuneapp.config import RunSettings, TrialConfig
from tuneapp.data.making import Watch
from tuneapp.effective import config_hash
from tuneapp.errors import ConfigError, RayDied, RunError, TuneappError
from tuneapp.keeping import Keeper
from tuneapp.ledger import Event, Ledger, read_events
from tuneapp.machine import share_machine
from tuneapp.mirror import StudyMirror
from tuneapp.own import offers_kept
from tuneapp.prepare import (
    Prepared,
    check_again,
    lay_out,
    prepare,
    read_run_images,
    read_run_space,
    write_space,
)
from tuneapp.ray_session import START_ATTEMPTS, noted_signals, own_ray, require_token
from tuneapp.records import TrialRecord, current_space, read_records
from tuneapp.rundir import RunDir, RunRecord, create_run, open_run, require_name, write_record
from tuneapp.scripted import Params
from tuneapp.space import SearchSpace
from tuneapp.study import Study

# After ray_session, which sets what Ray reads when it is imported.
from ray import tune  # isort: skip

from tuneapp.search import Driver, Proposer, Stopper, Until  # isort: skip
from tuneapp.trainable import train_trial  # isort: skip

log = logging.getLogger(__name__)

Listen = Callable[[Event], None]
Begun = Callable[[RunDir, RunRecord], Listen]


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of `sweep` besides the space and the settings.

    Attributes:
        trials: how many in all, recipes included.
        runs_dir: where run directories are made.
        name: of the run directory; None takes the space's name and a number.
        concurrent: trials at once; None means as many as the machine has room for.
        cpus_per_trial: CPU threads of each; None shares all.
        gpus_per_trial: 1, or a share of a GPU; None shares all.
        time_budget_s: seconds after which the sweep ends; None means no limit.
        dashboard_host: address for Ray's dashboard; None starts none.
        keep_best: how many trials' checkpoints are kept once they have ended.
        disk_budget: bytes that all checkpoints may take; None means no limit.
        min_free: free bytes on the disk below which the sweep pauses.
    """

    trials: int
    runs_dir: Path
    name: str | None = None
    concurrent: int | None = None
    cpus_per_trial: int | None = None
    gpus_per_trial: float | None = None
    time_budget_s: float | None = None
    dashboard_host: str | None = None
    keep_best: int = 5
    disk_budget: int | None = None
    min_free: int = 500 * 10**6


@dataclass(frozen=True)
class Outcome:
    """How a sweep, or a part of one, ended.

    Attributes:
        run: its directory.
        interrupted_by: the signal that ended it early, if one did.
        out_of_time: whether its time budget ended it early.
        common_failure: why all of the first trials failed, if they did.
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
    begun: Begun,
    watch: Watch,
) -> Outcome:
    """Check everything, make the run directory, and run the sweep.

    Args:
        space: what to search.
        settings: where and how every trial runs.
        options: how many trials, where, for how long.
        say: called with each line about what is being prepared.
        begun: called with the new run before its first trial; returns the listener to its events.
        watch: called with the progress of decoding the images.

    Raises:
        TuneappError: something does not fit; nothing was written.
    """
    require_token()
    branches = space.branches()
    space.check_recipes(branches)
    require_name(options.runs_dir, options.name)
    slots, cpus, gpus = share_machine(
        settings,
        options.trials,
        options.concurrent,
        options.cpus_per_trial,
        options.gpus_per_trial,
    )
    prepared = prepare(space, settings, branches, say, watch)
    run = create_run(options.runs_dir.resolve(), options.name, space.name)
    record = RunRecord(
        kind="sweep",
        space_paths=(str(space.path.absolute()),),
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
        keep_best=options.keep_best,
        disk_budget=options.disk_budget,
        min_free=options.min_free,
    )
    lock = run.lock()
    try:
        lay_out(run, space, prepared.images, record)
        with Ledger(run.ledger) as ledger:
            study = _open_study(run, record, space, ledger, begun)
            study.want(options.trials)
            return _drive(run, record, space, study, ledger, options.dashboard_host)
    finally:
        lock.release()


def resume_sweep(
    path: Path,
    begun: Begun,
    watch: Watch,
    dashboard_host: str | None = None,
    more: int = 0,
) -> Outcome:
    """Resume the sweep in `path`: unfinished trials from their last epoch, then the rest.

    The space is the copy in the run directory. The time budget starts again.

    Args:
        path: the run directory.
        begun: called with the run; returns the listener to its events.
        watch: called with the progress of decoding the images.
        dashboard_host: address for Ray's dashboard; None starts none.
        more: trials to run in addition to those planned so far.

    Raises:
        TuneappError: it is not a run directory, is in use, or its images have changed.
    """
    require_token()
    with _taken_up(path) as (run, record), Ledger(run.ledger) as ledger:
        space = read_run_space(run, record, current_space(ledger.events))
        study = _open_study(run, record, space, ledger, begun)
        if study.wanted == 0:
            raise RunError(f"{run.path} ended before its first trial; remove it and start again")
        if study.remaining + more == 0:
            return Outcome(run, None, False, None, 0)
        check_again(run, record, space.branches(), watch)
        if more:
            study.want(study.wanted + more)
        return _drive(run, record, space, study, ledger, dashboard_host)


def refine_sweep(
    path: Path,
    space: SearchSpace,
    more: int,
    say: Callable[[str], None],
    begun: Begun,
    watch: Watch,
    dashboard_host: str | None = None,
) -> Outcome:
    """Continue the sweep in `path` in a changed space, on the same images and split.

    Earlier trials that would be the same in the new space inform the search; the others stay in
    the run as its history.

    Args:
        path: the run directory.
        space: the changed one.
        more: trials to run in addition to those planned so far.
        say: called with each line about what is being prepared.
        begun: called with the run; returns the listener to its events.
        watch: called with the progress of decoding the images.
        dashboard_host: address for Ray's dashboard; None starts none.

    Raises:
        TuneappError: something does not fit; the run is as it was.
    """
    require_token()
    with _taken_up(path) as (run, before):
        branches = space.branches()
        space.check_recipes(branches)
        number = current_space(read_events(run.ledger))
        with offers_kept():  # code in the space's file is to be that of the new one, below
            before_space = read_run_space(run, before, number)
            if space.data not in (before_space.data, type(space.data)()):
                raise ConfigError(
                    f"{space.path}: DATA is {space.data.source!r}, but {run.path} uses "
                    f"{before.settings.data.source!r}; start a new sweep for other images"
                )
            check_again(run, before, before_space.branches(), watch)
        images = read_run_images(run, before)
        prepared = prepare(space, before.settings, branches, say, watch, images)
        record = _refined(before, number, space, prepared)
        with Ledger(run.ledger) as ledger:
            records = read_records(ledger.events)
            history = outside(run, before, space, records)
            say(
                f"refined   {len(records) - len(history)} of {len(records)} trials lie in this "
                "space; the others stay as history"
            )
            write_space(run, space, number + 1)
            write_record(run, record)
            ledger.append("refined", space=number + 1, history=history)  # takes effect here
            study = _open_study(run, record, space, ledger, begun)
            study.want(study.wanted + more)
            return _drive(run, record, space, study, ledger, dashboard_host)


def outside(
    run: RunDir, record: RunRecord, space: SearchSpace, records: dict[str, TrialRecord]
) -> list[str]:
    """Return which trials of a run would not be the same in another space.

    They lack a value that it asks for, have one that it does not allow, or get another
    configuration: a constant in the space, or code in its file, may have changed.

    Args:
        run: the run directory.
        record: of the run.
        space: the other one; its text must be the newest that was read under its name.
        records: the run's trials.
    """

    def hash_of(config_from: Callable[[Params], TrialConfig], trial: TrialRecord) -> str | None:
        try:
            return config_hash(record.settings.applied_to(config_from(trial.params)))
        except TuneappError:
            return None

    was: dict[str, str | None] = {}
    with offers_kept():
        for number in sorted({trial.space for trial in records.values()}):
            # One at a time: code in a space's file is looked up in the text that was read last.
            before = read_run_space(run, record, number)
            of_it = [trial for trial in records.values() if trial.space == number]
            was |= {trial.trial_id: hash_of(before.config, trial) for trial in of_it}
    would_be = {
        trial.trial_id: hash_of(lambda params: space.covered(params).config, trial)
        for trial in records.values()
    }
    return [t for t in records if would_be[t] is None or would_be[t] != was[t]]


def _refined(before: RunRecord, number: int, space: SearchSpace, prepared: Prepared) -> RunRecord:
    """Return the record of a run that continues from space `number` in another one."""
    found = {key: found.as_dict() for key, found in prepared.weights.items()}
    return replace(
        before,
        # There may be one more already, of a refinement that was killed before it took effect.
        space_paths=(*before.space_paths[:number], str(space.path.absolute())),
        weights={**found, **before.weights},
        code={**before.code, **prepared.code},
        warnings=tuple(dict.fromkeys([*before.warnings, *prepared.warnings])),
        import_from=tuple(dict.fromkeys([*before.import_from, str(Path.cwd())])),
    )


@contextlib.contextmanager
def _taken_up(path: Path) -> Iterator[tuple[RunDir, RunRecord]]:
    """Open and lock a sweep's directory."""
    run, record = open_run(path.resolve())
    if record.kind != "sweep":
        raise RunError(f"{path} is a single training, not a sweep; `resume` continues it")
    lock = run.lock()
    try:
        # Again: the previous owner of the lock may have refined it.
        yield open_run(run.path)
    finally:
        lock.release()


def _open_study(
    run: RunDir, record: RunRecord, space: SearchSpace, ledger: Ledger, begun: Begun
) -> Study:
    number = current_space(ledger.events)
    name = run.path.name if number == 1 else f"{run.path.name}, space {number}"
    return Study(
        space,
        ledger,
        record.settings,
        [(params, "recipe") for params in space.first_trials],
        begun(run, record),
        hash_of=config_hash,
        mirror=StudyMirror(run.study_file, name),
        space_number=number,
    )


def _drive(
    run: RunDir,
    record: RunRecord,
    space: SearchSpace,
    study: Study,
    ledger: Ledger,
    dashboard_host: str | None,
) -> Outcome:
    """Run the study's remaining trials under Ray; restart Ray if it dies."""
    if record.gpus_per_trial and not torch.cuda.is_available():
        raise ConfigError(f"{run.path} was started on GPUs, but torch finds none on this machine")
    budget_s = record.time_budget_s
    deadline = None if budget_s is None else time.monotonic() + budget_s
    settings = record.settings
    longest = max(settings.applied_to(b.config).epochs for b in space.branches())
    keeper = Keeper(run, settings, record.keep_best, record.disk_budget, log.warning)
    for attempt in range(1, START_ATTEMPTS + 1):
        driver = Driver(study, str(run.path), record.min_free, keeper)
        folds = settings.data.folds
        stopper = Stopper(
            driver, folds or longest, settings.mode, step="epoch" if folds is None else "fold"
        )
        stopper.replay(list(ledger.events))
        keeper.tidy_frozen()
        keeper.tidy(study.records)
        try:
            caught = _fit(record, driver, stopper, deadline, dashboard_host)
            break
        except RayDied as error:
            if attempt == START_ATTEMPTS:
                raise RayDied(
                    f"{error}, for the {attempt}th time; nothing is lost: resume with "
                    f"`python -m tuneapp resume {run.path}`"
                ) from None
            log.warning("%s: restarting it; the trials continue", error)
            study.put_back()
    keeper.tidy(study.records)
    keeper.tidy_frozen()
    return _outcome(
        run, study, caught, is_late=deadline is not None and time.monotonic() > deadline
    )


def _fit(
    record: RunRecord,
    driver: Driver,
    stopper: Stopper,
    deadline: float | None,
    dashboard_host: str | None,
) -> list[int]:
    """Let Ray Tune run the trials; return the signals that ended it early."""
    # The handlers come second: `ray.init` sets its own for SIGTERM.
    way_out = f"nothing is lost: resume with `python -m tuneapp resume {driver.run_dir}`"
    with (
        own_ray(record, dashboard_host, way_out) as driver.ray,
        noted_signals(driver.stop) as caught,
    ):
        until = Until(driver, deadline)
        tune.Tuner(
            tune.with_resources(
                train_trial, {"cpu": record.cpus_per_trial, "gpu": record.gpus_per_trial}
            ),
            tune_config=tune.TuneConfig(
                search_alg=Proposer(driver, record.settings.mode),
                scheduler=stopper,
                num_samples=-1,  # the proposer decides when to stop: a trial may be retried
                max_concurrent_trials=record.concurrent,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(driver.ray.scratch / "results"),
                stop=until,
                verbose=0,
            ),
        ).fit()
    return caught


def _outcome(run: RunDir, study: Study, caught: list[int], is_late: bool) -> Outcome:
    early = study.remaining > 0 and study.common_failure is None and not is_late
    if early and not caught:
        raise TuneappError(
            f"Ray ended the sweep with {study.remaining} trials to go; see the log.txt of the "
            f"trials in {run.path}, and resume with `python -m tuneapp resume {run.path}`"
        )
    return Outcome(
        run,
        interrupted_by=caught[0] if early else None,
        out_of_time=is_late and study.remaining > 0,
        common_failure=study.common_failure,
        remaining=study.remaining,
    )
