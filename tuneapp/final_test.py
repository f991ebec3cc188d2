"""Open the sealed test split after the search, and record that it was opened.

Nothing else reads test images: neither the store nor a trial's examples have any. Each opening is
an event of the ledger, written before the first image is read.
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
"""The two events of an opening: before the first image is read, and with the scores."""


@dataclass(frozen=True)
class TestResult:
    """The scores of a trial on the test split.

    Attributes:
        trial_id: of the trial.
        scores: a row of metrics for each of its models: one, or one per fold.
        num_images: test images that could be read.
        bad: those that could not be read, each with its cause.
        times_opened: how often the split was opened in this run, including this time.
    """

    __test__ = False  # pytest would collect a class of this name

    trial_id: str
    scores: tuple[dict[str, float], ...]
    num_images: int
    bad: tuple[tuple[str, str], ...]
    times_opened: int


def open_test(path: Path, trial_id: str, watch: Watch) -> TestResult:
    """Score the best epoch of a trial on the test split of its run.

    Args:
        path: the run directory.
        trial_id: of a trial that has finished an epoch.
        watch: is called with the progress of the decoding.

    Raises:
        DataError: the run has no test split, or its images have changed.
        RunError: the run is in use.
        CheckpointError: the trial has no intact checkpoint.
    """
    run, record = open_run(path.resolve())
    images = read_run_images(run, record)
    if not images.of("test"):
        raise DataError(
            f"{path} has no test split: a data set with a validation split must also have a test "
            "split (a test/ folder, or test in the split column); from others, test_share is held "
            "out"
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
                outputs = evaluate(model.to(device), batches.epoch(1), precision)
                measured = measure(
                    outputs.logits.numpy(), outputs.targets.numpy(), images.classes,
                    record.settings.metric,
                )  # fmt: skip
                scores.append(
                    {
                        f"test/{name.removeprefix('val/')}": value
                        for name, value in {"val/loss": outputs.loss, **measured}.items()
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
    """Return the test images, as the validation split of a separate set, and their batches."""
    examples = tuple(replace(e, split="val") for e in images.of("test"))
    test = replace(images, examples=examples)
    preprocessing = preprocessing_of(config, images.native_size)
    # With a budget of 0, no pixels of the test split are stored on the disk.
    store = open_store(test, preprocessing, 0, watch)
    settings = replace(run.settings, workers=None)  # it may have been chosen for stored images
    device = choose_device(run)
    workers = choose_workers(settings, store, run.num_threads, device)
    batches = evaluation_batches(config, store, preprocessing, device, workers)
    if not batches.num_examples:
        raise DataError("none of the test images can be read")
    return store.stamped(test), batches, device
