"""One configuration in this process, without Ray: `tuneapp train`.

It writes a run directory like a sweep's, with one trial in it, so that everything that reads runs
can read this one, and `resume` can continue it.
"""

import errno
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from tuneapp.checkpoint import Row
from tuneapp.config import RunSettings
from tuneapp.data.making import Watch
from tuneapp.errors import StorageError, TrialError
from tuneapp.failures import classify, hint
from tuneapp.folds import run_whole
from tuneapp.ledger import Event, Ledger
from tuneapp.prepare import assemble, check_again, lay_out, prepare, read_run_space
from tuneapp.records import Origin
from tuneapp.room import is_full
from tuneapp.rundir import RunDir, RunRecord, create_run, log_to, open_run, require_name
from tuneapp.space import SearchSpace
from tuneapp.study import Study

Listen = Callable[[Event], None]


def start_training(
    space: SearchSpace,
    settings: RunSettings,
    params: Mapping[str, Any],
    runs_dir: Path,
    name: str | None,
    say: Callable[[str], None],
    begun: Callable[[RunDir, RunRecord], Listen],
    watch: Watch,
    like: tuple[RunDir, RunRecord] | None = None,
    origin: str = "set",
) -> RunDir:
    """Check one configuration, make its run directory, and train it.

    Args:
        space: where the configuration comes from.
        settings: where and how it runs.
        params: a value for each parameter that the space asks for.
        runs_dir: where the run directory is made.
        name: of the run directory; None takes the space's name and a number.
        say: called with each line about what is being prepared.
        begun: called with the new run before it trains; returns the listener to its events.
        watch: called with the progress of decoding the images.
        like: a run with these settings, whose split, weights and threads are reused.
        origin: where the parameters come from, such as `resnet-001/t0003`, another run's trial.

    Raises:
        TuneappError: something does not fit; nothing was written.
    """
    require_name(runs_dir, name)
    if like is None:
        prepared = prepare(space, settings, [space.replay(params)], say, watch)
        images = prepared.images
        record = RunRecord(
            kind="train",
            space_paths=(str(space.path.absolute()),),
            settings=settings,
            image_root=None if images.root is None else str(images.root),
            classes=images.classes,
            is_multilabel=images.is_multilabel,
            weights={key: found.as_dict() for key, found in prepared.weights.items()},
            params=dict(params),
            warnings=prepared.warnings,
            import_from=(str(Path.cwd()),),
            code=prepared.code,
            cpus_per_trial=torch.get_num_threads(),
            gpus_per_trial=float(torch.cuda.is_available() and settings.device != "cpu"),
        )
    else:
        images = check_again(*like, [space.replay(params)], watch)
        record = replace(
            like[1],
            kind="train",
            params=dict(params),
            concurrent=1,
            time_budget_s=None,
            space_paths=(str(space.path.absolute()),),
        )
    run = create_run(runs_dir.resolve(), name, f"{space.name}-train")
    lock = run.lock()
    try:
        lay_out(run, space, images, record)
        with Ledger(run.ledger) as ledger:
            # The ledger takes any text; `Origin` lists those that the program distinguishes.
            first = [(params, cast(Origin, origin))]
            study = Study(space, ledger, settings, first, begun(run, record))
            study.want(1)
            _train(run, record, study)
    finally:
        lock.release()
    return run


def resume_training(
    path: Path, begun: Callable[[RunDir, RunRecord], Listen], watch: Watch
) -> RunDir:
    """Resume the training in `path` after its last epoch; a finished one stays as it is."""
    run, record = open_run(path.resolve())
    lock = run.lock()
    try:
        space = read_run_space(run, record)
        assert record.params is not None
        with Ledger(run.ledger) as ledger:
            first: list[tuple[Mapping[str, Any], Origin]] = [(record.params, "set")]
            study = Study(space, ledger, record.settings, first, begun(run, record))
            if study.wanted == 0:  # it ended before this was recorded
                study.want(1)
            if study.remaining:
                check_again(run, record, [space.replay(record.params)], watch)
                _train(run, record, study)
    finally:
        lock.release()
    return run


def _train(run: RunDir, record: RunRecord, study: Study) -> None:
    proposal = study.propose()
    assert proposal is not None
    trial_id = proposal.trial_id
    folder = run.trial(trial_id)
    folder.mkdir(parents=True, exist_ok=True)

    def report(row: Row) -> None:
        study.record_epoch(trial_id, row)

    with log_to(folder / "log.txt"):
        try:
            has_gpu = record.gpus_per_trial > 0 and torch.cuda.is_available()
            config, trial_run = assemble(run, record, trial_id, proposal.params, has_gpu=has_gpu)
            run_whole(config, trial_run, report)
        except StorageError:  # of the ledger: the trial stays unfinished, for `resume`
            raise
        except Exception as error:
            _require_storage(error, run)
            failure = classify(error, folder)
            if failure.can_pass:  # nothing retries it here: it stays unfinished, for `resume`
                raise
            study.end(trial_id, failure.state, failure.cause, failure.kind)
            if failure.kind == "out of memory":  # torch's message has many lines
                raise TrialError(f"out of memory: {failure.cause}; {hint(failure.kind)}") from error
            if failure.state == "failed":
                raise
    study.complete(trial_id)


def _require_storage(error: Exception, run: RunDir) -> None:
    """Report a failing disk of the run, if that is why a trial could not continue.

    Raises:
        StorageError: it is; the trial stays unfinished, for `resume`.
    """
    if not isinstance(error, OSError) or is_full(error, run.path):
        return
    file = str(error.filename or run.path)
    is_own = Path(file).absolute().is_relative_to(run.path.absolute())
    if is_own and (error.filename is not None or error.errno in (errno.EIO, errno.EROFS)):
        raise StorageError(
            f"{file} cannot be written: {error.strerror or error}; fix that, then `resume`"
        ) from None
