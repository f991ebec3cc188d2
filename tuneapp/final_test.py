"""Open the sealed test split, once the search is over, and write down that it was done.

Nothing else reads test images: the store has none, and a trial's examples have none. Each opening
is an event of the ledger, written before the first image is read.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tuneapp.checkpoint import read_best, validated_weights
from tuneapp.config import TrialConfig
from tuneapp.data.batches import Batches
from tuneapp.data.examples import ImageSet
from tuneapp.data.making import Watch
from tuneapp.data.split import require_unchanged
from tuneapp.data.store import open_store
from tuneapp.errors import DataError
from tuneapp.folds import fold_folder
from tuneapp.ledger import Ledger, read_events
from tuneapp.loop import Precision, evaluate
from tuneapp.metrics import measure
from tuneapp.models import build_staged
from tuneapp.prepare import assemble, read_run_images
from tuneapp.records import read_records
from tuneapp.rundir import open_run
from tuneapp.training import (
    TrialRun,
    choose_device,
    choose_dtype,
    choose_workers,
    evaluation_batches,
)
from tuneapp.weights import preprocessing_of

OPENED, RESULT = "test_opened", "test_result"
"""The two events of an opening: before the first image is read, and when there are scores."""


@dataclass(frozen=True)
class TestResult:
    """What a trial is worth on the test split.

    Attributes:
        trial_id: which trial.
        scores: a row of metrics for each of its models: one, or one for each fold.
        num_images: test images that could be read.
        bad: those that could not, each with its cause.
        times_opened: how often the split was opened in this run, this time included.
    """

    __test__ = False  # pytest takes classes of this name for tests

    trial_id: str
    scores: tuple[dict[str, float], ...]
    num_images: int
    bad: tuple[tuple[str, str], ...]
    times_opened: int


def open_test(path: Path, trial_id: str, watch: Watch) -> TestResult:
    """Score the best epoch of a trial on the test split of its run.

    Args:
        path: the run directory.
        trial_id: a trial with an epoch.
        watch: told how far the decoding of the images is.

    Raises:
        DataError: the run has no test split, or its images have changed.
        RunError: the run is in use.
        CheckpointError: the trial has no intact checkpoint.
    """
    run, record = open_run(path.resolve())
    images = read_run_images(run, record)
    if not images.of("test"):
        raise DataError(
            f"{path} has no test split: data with a validation split of their own need a test "
            "split of their own, too (a test/ folder, a split column); of others, test_share is "
            "held out"
        )
    require_unchanged(replace(images, examples=images.of("test")))
    trial = read_records(read_events(run.ledger))[trial_id]
    has_gpu = torch.cuda.is_available()
    config, trial_run = assemble(
        run, record, trial_id, trial.params, has_gpu=has_gpu, space=trial.space
    )
    folder = run.trial(trial_id)
    folders = [fold_folder(folder, n + 1) for n in range(images.num_folds)] or [folder]
    contents = [read_best(place / "checkpoints") for place in folders]
    lock = run.lock()
    try:
        with Ledger(run.ledger) as ledger:
            ledger.append(OPENED, trial=trial_id)
            test, batches, device = _test_batches(config, trial_run, images, watch)
            scores = []
            for content in contents:
                model = build_staged(config, len(images.classes), _size(config, trial_run))
                model.load_state_dict(validated_weights(content))
                precision = Precision(device.type, choose_dtype(config.amp, device))
                answers = evaluate(model.to(device), batches.epoch(1), precision)
                measured = measure(
                    answers.logits.numpy(), answers.targets.numpy(), images.classes,
                    record.settings.metric,
                )  # fmt: skip
                scores.append(
                    {
                        name.replace("val/", "test/"): value
                        for name, value in {"val/loss": answers.loss, **measured}.items()
                    }
                )
            ledger.append(RESULT, trial=trial_id, scores=scores, images=batches.num_examples)
            opened = times_opened(run.ledger)
    finally:
        lock.release()
    bad = tuple((e.path, e.bad) for e in test.examples if e.bad)
    return TestResult(trial_id, tuple(scores), batches.num_examples, bad, opened)


def times_opened(ledger: Path) -> int:
    """Return how often the test split was opened in a run."""
    return sum(event["event"] == OPENED for event in read_events(ledger))


def _size(config: TrialConfig, run: TrialRun) -> int:
    return preprocessing_of(config, run.images.native_size).crop_size


def _test_batches(
    config: TrialConfig, run: TrialRun, images: ImageSet, watch: Watch
) -> tuple[ImageSet, Batches, torch.device]:
    """Return the test images, as the validation images of a set of their own, and their batches."""
    examples = tuple(replace(e, split="val") for e in images.of("test"))
    test = replace(images, examples=examples)
    preprocessing = preprocessing_of(config, images.native_size)
    # A budget of nothing: no pixel of the test split is kept on the disk.
    store = open_store(test, preprocessing, 0, watch)
    settings = replace(run.settings, workers=None)  # what was asked for stored images, perhaps
    device = choose_device(run)
    workers = choose_workers(settings, store, run.num_threads, device)
    batches = evaluation_batches(config, store, preprocessing, device, workers)
    if not batches.num_examples:
        raise DataError("none of the test images can be read")
    return store.stamped(test), batches, device
