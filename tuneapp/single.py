"""One configuration in this process, without Ray: `tuneapp train`.

It leaves a run directory like a sweep's, with one trial in it, so that everything that reads runs
reads this one, and `resume` goes on with it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tuneapp.checkpoint import Row
from tuneapp.config import RunSettings
from tuneapp.errors import Diverged, say_cause
from tuneapp.ledger import Event, Ledger
from tuneapp.prepare import assemble, check_again, lay_out, prepare
from tuneapp.rundir import RunDir, RunRecord, create_run, log_to, open_run
from tuneapp.space import SearchSpace
from tuneapp.study import Study
from tuneapp.trial import run_trial

Listen = Callable[[Event], None]


def start_training(
    space: SearchSpace,
    settings: RunSettings,
    params: Mapping[str, Any],
    runs_dir: Path,
    name: str | None,
    say: Callable[[str], None],
    begun: Callable[[RunDir, RunRecord], Listen],
    like: tuple[RunDir, RunRecord] | None = None,
) -> RunDir:
    """Check one configuration, make its run directory, and train it.

    Args:
        space: where the configuration comes from.
        settings: where and how it runs.
        params: a value for each parameter that the space asks for.
        runs_dir: where the run directory is made.
        name: of the run directory; None takes the space's and a number.
        say: told what is being prepared.
        begun: called with the new run before it trains; returns the listener to its events.
        like: a run whose split, weights and threads are taken over, to the last bit.

    Raises:
        TuneappError: something does not fit; nothing was written.
    """
    prepared = prepare(space, settings, [space.replay(params)], say)
    weights = {key: found.as_dict() for key, found in prepared.weights.items()}
    threads = torch.get_num_threads()
    if like is not None:
        from_run, from_record = like
        check_again(from_run, from_record, space)
        threads = from_record.cpus_per_trial
        weights = {key: dict(found) for key, found in from_record.weights.items()}
    run = create_run(runs_dir.resolve(), name, f"{space.name}-train")
    record = RunRecord(
        kind="train",
        space_name=space.name,
        settings=settings,
        image_root=None if prepared.images.root is None else str(prepared.images.root),
        classes=prepared.images.classes,
        weights=weights,
        warnings=prepared.warnings,
        cpus_per_trial=threads,
        gpus_per_trial=float(torch.cuda.is_available() and settings.device != "cpu"),
    )
    lock = run.lock()
    try:
        lay_out(run, prepared, record)
        with Ledger(run.ledger) as ledger:
            study = Study(space, ledger, settings, [(params, "set")], begun(run, record))
            study.want(1)
            _train(run, record, study)
    finally:
        lock.release()
    return run


def resume_training(path: Path, begun: Callable[[RunDir, RunRecord], Listen]) -> RunDir:
    """Go on with the training in `path` after its last epoch; a finished one is left as it is."""
    run, record = open_run(path.resolve())
    lock = run.lock()
    try:
        space = SearchSpace.read(run.space_file)
        with Ledger(run.ledger) as ledger:
            study = Study(space, ledger, record.settings, [], begun(run, record))
            if study.remaining:
                check_again(run, record, space)
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
            config, trial_run = assemble(
                run, record, trial_id, proposal.params, has_gpu=record.gpus_per_trial > 0
            )
            run_trial(
                config,
                trial_run,
                report,
                resume_from=folder / "checkpoints",
            )
        except Diverged as error:
            study.end(trial_id, "diverged", str(error))
        except Exception as error:
            study.end(trial_id, "failed", say_cause(error))
            raise
    study.complete(trial_id)
