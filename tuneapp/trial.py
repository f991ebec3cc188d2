"""One trial, from its configuration to its last epoch: the page to read first.

`run_trial` knows nothing of Ray: the same function runs in a sweep (its `report` goes to Ray), in
`tuneapp train` (to the ledger and a printed line) and in a test (`list.append`).
"""

import csv
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuneapp.applied import read_back, require_applied, require_batches
from tuneapp.checkpoint import Row, TrainState
from tuneapp.config import Amp, RunSettings, TrialConfig, is_better
from tuneapp.data.source import ImageSet
from tuneapp.data.store import open_store
from tuneapp.data.views import Batches, evaluation_view, training_view
from tuneapp.errors import ConfigError, Diverged
from tuneapp.loop import Precision, evaluate, train_one_epoch
from tuneapp.losses import build_loss
from tuneapp.models import StagedModel, build_network, find_family, seed_everything
from tuneapp.optim import build_optimizer, build_schedule, warmup_steps
from tuneapp.rundir import write_atomically, write_json
from tuneapp.tracking import NoTracker, TensorBoardTracker, Tracker
from tuneapp.weights import load_weights, preprocessing_of

log = logging.getLogger(__name__)

Report = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """Where and how one trial runs.

    Attributes:
        images: the data set, split.
        weights_file: a state_dict to start from; None starts from random weights.
        weights_name: what these weights are called.
        num_threads: CPU threads.
        has_gpu: whether a GPU was given to this trial.
        folder: where its files go; None writes none.
        params: the sampled values behind the configuration, for HParams.
    """

    settings: RunSettings
    images: ImageSet
    weights_file: Path | None = None
    weights_name: str = "random"
    num_threads: int = 1
    has_gpu: bool = False
    folder: Path | None = None
    params: Mapping[str, Any]


def run_trial(
    config: TrialConfig, run: TrialRun, report: Report, resume_from: Path | None = None
) -> TrainState:
    """Train one configuration, and report each epoch.

    State is built from nothing: what ran before in this process does not matter. Epochs that a
    checkpoint holds already are reported again first, so that a listener who missed some has all.

    Args:
        config: what to train.
        run: where and how.
        report: called after each epoch with its row of metrics and, under `applied`, with what the
            trial really trains with.
        resume_from: a checkpoint folder to go on from, where it holds an intact one.

    Returns:
        The state after the last epoch.

    Raises:
        Diverged: the loss became NaN or infinite.
        AppliedValueError: the trial would train something else than `config`.
    """
    torch.set_num_threads(run.num_threads)
    device = _choose_device(run)
    precision = Precision(device.type, _choose_dtype(config.amp, device))

    # Data: the same store, views and order for every trial of the sweep.
    preprocessing = preprocessing_of(
        config.model, config.weights, config.image_size, run.images.native_size
    )
    store = open_store(run.images, preprocessing)
    train_batches = Batches(
        store,
        "train",
        view=training_view(config.augment, preprocessing),
        preprocessing=preprocessing,
        batch_size=config.batch_size,
        device=device,
        shuffle_seed=run.settings.seed,
    )
    val_batches = Batches(
        store,
        "val",
        view=evaluation_view(preprocessing),
        preprocessing=preprocessing,
        batch_size=config.batch_size,
        device=device,
    )

    # Model, optimizer, schedule: then read back what they really are.
    seed_everything(run.settings.seed, config.seed)
    model = _build_model(config, run).to(device)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps_per_epoch=len(train_batches))
    scaler = precision.scaler()
    applied = read_back(
        model, optimizer, schedule, train_batches.batch_size, precision, run.weights_name
    )
    require_applied(applied, config, model, device, warmup_steps(config, len(train_batches)))
    log.info("process %d trains with %s", os.getpid(), applied)

    state = TrainState(model, optimizer, schedule, scaler, config.as_dict())
    if resume_from is not None:
        state.load(resume_from)
    for row in state.history:
        report({**row, "applied": applied.as_dict()})

    loss_fn = build_loss(config.loss)
    tracker = _open_folder(run, config, state)
    try:
        for epoch in range(state.epoch + 1, config.epochs + 1):
            lrs = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
            trained = train_one_epoch(
                model,
                train_batches.epoch(epoch),
                loss_fn,
                optimizer,
                schedule,
                scaler,
                precision,
                epoch=epoch,
                clip_norm=config.clip_norm,
                accumulation_steps=config.accumulation_steps,
            )
            if epoch == 1:
                examples, steps = train_batches.num_examples, len(train_batches)
                require_batches(trained, config, examples, steps)
            scores = evaluate(model, val_batches.epoch(epoch), precision)
            row = {
                "epoch": epoch,
                "train/loss": trained.loss,
                "val/loss": scores.loss,
                "val/accuracy": scores.accuracy,
                "train/grad_norm": trained.grad_norm,
                "train/images_per_s": trained.images_per_s,
                "train/data_wait": trained.data_wait,
                **lrs,
            }
            _require_finite(row, trained.steps)
            _record(state, row, run)
            tracker.epoch(row)
            report({**row, "applied": applied.as_dict()})
    finally:
        tracker.close()
    return state


def score_of(row: Row, settings: RunSettings) -> float:
    """Return the value that a row of metrics is judged by."""
    return float(row[settings.metric])


def _choose_device(run: TrialRun) -> torch.device:
    """Return the trial's GPU where it has one, unless the settings say otherwise."""
    asked = run.settings.device
    if asked == "cuda" and not run.has_gpu:
        raise ConfigError("--device cuda: there is no GPU for this trial; use auto or cpu")
    return torch.device("cuda" if run.has_gpu and asked != "cpu" else "cpu")


def _choose_dtype(amp: Amp, device: torch.device) -> torch.dtype:
    """Return what the forward pass computes in; `auto` mixes precisions on a GPU only."""
    if amp == "auto":
        if device.type == "cpu":
            return torch.float32
        # Without emulation: it exists on older GPUs, and is slow.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def _build_model(config: TrialConfig, run: TrialRun) -> StagedModel:
    network: nn.Module = build_network(config.model, len(run.images.classes))
    if run.weights_file is not None:
        load_weights(network, config.model, run.weights_file)
    model = StagedModel(network, find_family(config.model))
    model.freeze(config.freeze_depth)
    return model


def _open_folder(run: TrialRun, config: TrialConfig, state: TrainState) -> Tracker:
    if run.folder is None:
        return NoTracker()
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "config.json", {"params": dict(run.params), **config.as_dict()})
    if state.history:  # the table may lack the epoch in which the trial was interrupted
        _write_table(run.folder / "epochs.csv", state.history)
    return TensorBoardTracker(run.folder, run.params, run.settings, state.history)


def _require_finite(row: Row, step: int) -> None:
    """A step's loss was checked already; that of the validation can leave the numbers by itself."""
    for name, value in row.items():
        if not math.isfinite(value):
            raise Diverged(row["epoch"], step, value, what=name)


def _record(state: TrainState, row: Row, run: TrialRun) -> None:
    """Add an epoch to the state, and write the checkpoint and the trial's table of epochs."""
    best = state.history[state.best_epoch - 1] if state.best_epoch else None
    score = None if best is None else score_of(best, run.settings)
    state.history.append(row)
    if is_better(score_of(row, run.settings), score, run.settings.mode):
        state.best_epoch = row["epoch"]
    if run.folder is None:
        return
    state.save(run.folder / "checkpoints")
    _write_table(run.folder / "epochs.csv", state.history)


def _write_table(file: Path, history: Sequence[Row]) -> None:
    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", newline="") as out:
            rows = csv.DictWriter(out, fieldnames=list(history[0]))
            rows.writeheader()
            rows.writerows(history)

    write_atomically(file, write)
