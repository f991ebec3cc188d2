"""What it costs that a trial proves what it trains: pairs within one run, medians.

    python benchmarks/watching.py

Alternates an epoch of the bare loop with the same epoch as a trial trains it: values read back
before, watched in between, compared with the configuration after. On the embedded digits, with one
CPU thread; prints the times as ratios with the proof / without: 1.05 costs 5 %.
"""

import os
import statistics
import tempfile
import time
from dataclasses import replace

import torch

from tuneapp.config import AdamW, Constant, RunSettings, TrialConfig
from tuneapp.data.source import read_images
from tuneapp.loop import train_one_epoch
from tuneapp.training import Training, TrialRun, begin_training

ROUNDS = 7
PLAIN = TrialConfig(
    model="resnet18",
    image_size=32,
    epochs=2 * ROUNDS + 2,
    batch_size=32,
    optimizer=AdamW(lr=1e-4),
    schedule=Constant(),
    amp="off",
)
CONFIGS = {
    "ResNet-18, whole network": PLAIN,
    "ResNet-18, head only": replace(PLAIN, freeze_depth=-1),
    "MobileNetV2, whole network": replace(PLAIN, model="mobilenet_v2"),
    "MobileNetV2, head only": replace(PLAIN, model="mobilenet_v2", freeze_depth=-1),
}


def bare_epoch(training: Training, epoch: int) -> None:
    """Train one epoch, and look at nothing."""
    state = training.state
    train_one_epoch(
        state.model,
        training.train_batches.epoch(epoch),
        training.loss_fn,
        state.optimizer,
        state.schedule,
        state.scaler,
        training.precision,
        epoch=epoch,
    )


def proven_epoch(training: Training, epoch: int) -> None:
    """Train one epoch as a trial does."""
    training.enter(epoch)
    training.train(epoch)


def measure(config: TrialConfig) -> tuple[list[float], float]:
    """Return the ratios of the pairs, sorted, and the median seconds of a bare epoch."""
    settings = RunSettings()
    run = TrialRun(settings=settings, images=read_images(settings.data, seed=0), params={})
    training = begin_training(config, run)
    bare_epoch(training, 1)
    ratios, seconds = [], []
    for first in range(2, config.epochs, 2):
        start = time.perf_counter()
        bare_epoch(training, first)
        middle = time.perf_counter()
        proven_epoch(training, first + 1)
        ratios.append((time.perf_counter() - middle) / (middle - start))
        seconds.append(middle - start)
    return sorted(ratios), statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TUNEAPP_CACHE"] = scratch
        for what, config in CONFIGS.items():
            ratios, seconds = measure(config)
            print(
                f"{statistics.median(ratios):6.3f}  ({ratios[0]:.3f} to {ratios[-1]:.3f})  "
                f"{what}: {seconds:.1f} s an epoch without"
            )


if __name__ == "__main__":
    main()
