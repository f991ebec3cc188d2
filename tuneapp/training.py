"""A trial before its first epoch: data, network, loss, optimizer, schedule, built from nothing."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneapp.applied import Applied, read_back
from tuneapp.average import WeightAverage
from tuneapp.checkpoint import Row, TrainState
from tuneapp.config import Amp, RunSettings, TrialConfig
from tuneapp.data.batches import Batches
from tuneapp.data.examples import ImageSet
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.sampling import InOrder, Shuffled
from tuneapp.data.store import Store, open_store
from tuneapp.data.views import evaluation_view, mixing, training_view
from tuneapp.epoch_proof import (
    WantedFactors,
    require_batches,
    require_kept,
    require_observed,
    require_rates,
    require_weights,
)
from tuneapp.errors import ConfigError
from tuneapp.loop import EpochMetrics, Evaluation, Precision, evaluate, train_one_epoch
from tuneapp.losses import TrainingLoss, build_loss
from tuneapp.models import apply_freezing, build_staged, seed_everything
from tuneapp.observed import Observed, Witness
from tuneapp.optim import build_optimizer
from tuneapp.proof import require_applied, require_defaults, require_trained
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel
from tuneapp.statedict import read_state_dict
from tuneapp.weights import load_weights, preprocessing_of

log = logging.getLogger(__name__)

MOST_WORKERS = 8
"""Unless asked for: each of them is a process with torch in it."""


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """Where and how one trial runs.

    Attributes:
        images: the data set, split; without its test split.
        weights_file: a state_dict to start from; None starts from random weights.
        weights_name: what these weights are called.
        num_threads: CPU threads.
        has_gpu: whether a GPU was given to this trial.
        folder: where its files go; None writes none.
        frozen_folder: where checkpoints keep what is frozen, for all trials of a run; None keeps it
            beside them.
        min_free: bytes of the disk below which the trial waits for room before it writes.
        params: the sampled values behind the configuration, for HParams.
    """

    settings: RunSettings
    images: ImageSet
    weights_file: Path | None = None
    weights_name: str = "random"
    num_threads: int = 1
    has_gpu: bool = False
    folder: Path | None = None
    frozen_folder: Path | None = None
    min_free: int = 0
    params: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything that trains, and the proof that it trains what was asked.

    Attributes:
        config: what was asked for.
        run: where and how it runs.
        device: where the model and the batches are.
        precision: of the forward pass.
        preprocessing: of the images.
        train_batches: of the training set.
        val_batches: of the validation set.
        loss_fn: what is minimised.
        state: what changes from epoch to epoch.
        factors: what the schedule must do, computed apart from it.
    """

    config: TrialConfig
    run: TrialRun
    device: torch.device
    precision: Precision
    preprocessing: Preprocessing
    train_batches: Batches
    val_batches: Batches
    loss_fn: TrainingLoss
    state: TrainState
    factors: WantedFactors

    def resume(self, folder: Path) -> None:
        """Continue from the newest intact checkpoint in `folder`, if there is one.

        Raises:
            CheckpointError: it belongs to another configuration, or the manifest cannot be read.
        """
        if self.state.load(folder):
            self.factors.skip(self.state.history)

    def enter(self, epoch: int) -> None:
        """Unfreeze what `epoch` trains for the first time, and check what it will train with.

        Raises:
            AppliedValueError: it is not what was asked for.
        """
        if epoch > 1:
            # Before the unfreezing, which would mend what has changed since the last epoch.
            self._read_back(epoch - 1)
            optimizer_state = dict(self.state.optimizer.state)
            if self.state.enter(epoch):
                require_kept(optimizer_state, self.state.optimizer)
        applied = self._read_back(epoch).as_dict()
        if applied != self.state.applied_in(epoch):
            log.info("process %d trains with %s", os.getpid(), applied)
            self.state.applied[epoch] = applied
        file = self.run.weights_file
        # A part of a file may hold nothing but scales of 1 and biases of 0.
        if epoch == 1 and file is not None and not self.config.partial_weights:
            weights = read_state_dict(file, file.stat().st_mtime_ns)
            require_weights(self.state.model, weights, str(file))

    def train(self, epoch: int) -> EpochMetrics:
        """Train one epoch, and check what it did.

        Raises:
            AppliedValueError: it did something else than what was asked for.
            Diverged: the loss became NaN or infinite.
        """
        state, config = self.state, self.config
        with Witness(state.model, self.loss_fn, state.optimizer, state.average) as witness:
            trained = train_one_epoch(
                state.model,
                witness.watched(self.train_batches.epoch(epoch)),
                self.loss_fn,
                state.optimizer,
                state.schedule,
                state.scaler,
                self.precision,
                epoch=epoch,
                average=state.average,
                clip_norm=config.clip_norm,
                clip_value=config.clip_value,
                accumulation_steps=config.accumulation_steps,
            )
        self._check(trained, witness.observed())
        return trained

    def validate(self, epoch: int) -> Evaluation:
        """Evaluate the network, or the average of its weights, on the validation set."""
        average = self.state.average
        model = self.state.model if average is None else average.model
        return evaluate(model, self.val_batches.epoch(epoch), self.precision)

    def end_epoch(self, row: Row) -> None:
        """Report the metrics of an epoch to the schedule, which may follow them."""
        self.state.schedule.end_epoch(row)
        self.factors.end_epoch(row)

    def _read_back(self, epoch: int) -> Applied:
        state, config, batches = self.state, self.config, self.train_batches
        applied = read_back(state, self.loss_fn, batches, self.precision, self.run.weights_name)
        counts = self.run.images.counts("train")
        steps = len(batches)
        require_applied(applied, config, state.model, self.device, steps, epoch, counts)
        require_defaults(state.optimizer)
        require_trained(state, config, epoch)
        return applied

    def _check(self, trained: EpochMetrics, seen: Observed) -> None:
        state, config, batches = self.state, self.config, self.train_batches
        require_batches(trained, config, batches.num_examples, len(batches))
        size, is_multilabel = self.preprocessing.crop_size, self.run.images.is_multilabel
        require_observed(seen, trained, config, self.precision, size, is_multilabel)
        factors = self.factors.of_epoch()
        require_rates(seen, trained, factors, state.model, state.optimizer, config)


def begin_training(config: TrialConfig, run: TrialRun) -> Training:
    """Build what `config` asks for. What ran before in this process does not matter."""
    torch.set_num_threads(run.num_threads)
    device = choose_device(run)
    precision = Precision(device.type, choose_dtype(config.amp, device))

    # Data: the same store, views and order for every trial of the sweep.
    preprocessing = preprocessing_of(config, run.images.native_size)
    train_batches, val_batches = _open_batches(config, run, preprocessing, device)

    # Head weights, and later dropout, are drawn from these seeds.
    seed_everything(run.settings.seed, config.seed)
    model = _build_model(config, run, preprocessing.crop_size, device)
    counts = run.images.counts("train")
    loss_fn = build_loss(config.loss, counts, config.aux_weight).to(device)
    return Training(
        config=config,
        run=run,
        device=device,
        precision=precision,
        preprocessing=preprocessing,
        train_batches=train_batches,
        val_batches=val_batches,
        loss_fn=loss_fn,
        state=_begin(config, model, loss_fn, len(train_batches), precision),
        factors=WantedFactors(config, len(train_batches)),
    )


def choose_device(run: TrialRun) -> torch.device:
    """Return the trial's GPU where it has one, unless the settings say otherwise."""
    asked = run.settings.device
    if asked == "cuda" and not run.has_gpu:
        raise ConfigError("--device cuda: there is no GPU for this trial; use auto or cpu")
    return torch.device("cuda" if run.has_gpu and asked != "cpu" else "cpu")


def choose_dtype(amp: Amp, device: torch.device) -> torch.dtype:
    """Return what the forward pass computes in; `auto` mixes precisions on a GPU only."""
    if amp == "auto":
        if device.type == "cpu":
            return torch.float32
        # Without emulation: it exists on older GPUs, and is slow.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def _open_batches(
    config: TrialConfig, run: TrialRun, preprocessing: Preprocessing, device: torch.device
) -> tuple[Batches, Batches]:
    """Return the batches of the training and of the validation set."""
    settings = run.settings
    budget = settings.store_budget
    store = open_store(run.images, preprocessing, budget, accept_index=True)
    workers = choose_workers(settings, store, run.num_threads, device)
    substitute = settings.data.bad_images == "substitute"
    train = Batches(
        store,
        Shuffled(store, config, settings.seed, substitute),
        view=training_view(config.augment, preprocessing),
        preprocessing=preprocessing,
        batch_size=config.batch_size,
        device=device,
        join_single=True,
        mix=mixing(config.mixup_alpha, config.cutmix_alpha, len(run.images.classes)),
        mix_seed=settings.seed,
        channels_last=config.channels_last,
        workers=workers,
    )
    return train, evaluation_batches(config, store, preprocessing, device, workers)


def evaluation_batches(
    config: TrialConfig,
    store: Store,
    preprocessing: Preprocessing,
    device: torch.device,
    workers: int,
) -> Batches:
    """Return the `val` examples of a store as they are, in its order."""
    return Batches(
        store,
        InOrder(store, "val"),
        view=evaluation_view(preprocessing),
        preprocessing=preprocessing,
        batch_size=config.batch_size,
        device=device,
        channels_last=config.channels_last,
        workers=workers,
    )


def choose_workers(
    settings: RunSettings, store: Store, num_threads: int, device: torch.device
) -> int:
    """Return how many processes make the batches of a split.

    Stored images need none on a CPU: views are made while nothing else could be done there. A GPU
    would wait for them.
    """
    # Nobody knows whether a Dataset bears to be in several processes.
    one_process = store.is_streamed and settings.data.is_dataset
    if settings.workers is None:
        wanted = store.is_streamed or device.type == "cuda"
        return min(num_threads, MOST_WORKERS) if wanted and not one_process else 0
    if settings.workers and one_process:
        raise ConfigError(
            f"--workers {settings.workers}: images of a Dataset are read by one process; use 0, or "
            "a --store-budget that they fit"
        )
    return settings.workers


def _build_model(
    config: TrialConfig, run: TrialRun, image_size: int, device: torch.device
) -> StagedModel:
    model = build_staged(config, len(run.images.classes), image_size)
    if run.weights_file is not None:
        load_weights(model.network, config, run.weights_file)
    apply_freezing(model, config)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    placed: StagedModel = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    return placed


def _begin(
    config: TrialConfig,
    model: StagedModel,
    loss_fn: TrainingLoss,
    steps_per_epoch: int,
    precision: Precision,
) -> TrainState:
    """Return the state before the first epoch."""
    optimizer = build_optimizer(model, config)
    return TrainState(
        model=model,
        optimizer=optimizer,
        schedule=Schedule(optimizer, config, steps_per_epoch),
        scaler=precision.scaler(),
        config=config,
        steps_per_epoch=steps_per_epoch,
        average=None if config.ema_decay is None else WeightAverage(model, config.ema_decay),
        loss_fn=loss_fn,
    )
