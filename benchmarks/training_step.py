"""What the choices of a space cost or save in a training step: pairs within one run, medians.

    python benchmarks/training_step.py

Alternates the plain step of a network (float32, no average, nothing frozen)
with the same step and one choice more, with one CPU thread, and prints the times as ratios
plain / with the choice: above 1 it saves, below it costs.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from tuneapp.average import WeightAverage
from tuneapp.config import AdamW, TrialConfig
from tuneapp.loop import Precision, train_one_epoch
from tuneapp.losses import build_loss
from tuneapp.models import apply_freezing, build_staged
from tuneapp.optim import build_optimizer
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel

ROUNDS = 7
BATCH, SIZE = 16, 64
PLAIN = TrialConfig(model="resnet18", optimizer=AdamW(lr=1e-4), amp="off")
CHOICES = {
    "nothing (how far the ratio can be trusted)": PLAIN,
    "channels_last": replace(PLAIN, channels_last=True),
    "amp bf16": replace(PLAIN, amp="bf16"),
    "amp bf16, channels_last": replace(PLAIN, amp="bf16", channels_last=True),
    "ema_decay": replace(PLAIN, ema_decay=0.999),
    "clip_norm": replace(PLAIN, clip_norm=1.0),
    "accumulation_steps 4": replace(PLAIN, accumulation_steps=4),
    "freeze_depth 3": replace(PLAIN, freeze_depth=3),
    "freeze_depth -1": replace(PLAIN, freeze_depth=-1),
}


def timed_step(config: TrialConfig) -> float:
    """Return the seconds of a step, after two to warm up."""
    torch.manual_seed(0)
    model = build_staged(config, num_classes=10, image_size=SIZE)
    apply_freezing(model, config)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (BATCH,))
    step = _stepper(model, config)
    seconds = 0.0
    for _ in range(3):
        start = time.perf_counter()
        step([(images, labels)])
        seconds = time.perf_counter() - start
    return seconds


def _stepper(
    model: StagedModel, config: TrialConfig
) -> Callable[[Iterable[tuple[torch.Tensor, torch.Tensor]]], object]:
    optimizer = build_optimizer(model, config)
    schedule = Schedule(optimizer, config, steps_per_epoch=10)
    dtype = torch.bfloat16 if config.amp == "bf16" else torch.float32
    precision = Precision("cpu", dtype)
    loss_fn = build_loss(config.loss, [1] * 10)
    average = None if config.ema_decay is None else WeightAverage(model, config.ema_decay)
    return lambda batches: train_one_epoch(
        model,
        batches,
        loss_fn,
        optimizer,
        schedule,
        precision.scaler(),
        precision,
        epoch=1,
        average=average,
        clip_norm=config.clip_norm,
        accumulation_steps=config.accumulation_steps,
    )


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print(f"ResNet-18, {BATCH} images of {SIZE} x {SIZE}, one thread, {ROUNDS} pairs each")
    for what, config in CHOICES.items():
        pairs = [(timed_step(PLAIN), timed_step(config)) for _ in range(ROUNDS)]
        ratios = sorted(plain / chosen for plain, chosen in pairs)
        print(f"{statistics.median(ratios):6.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})  {what}")


if __name__ == "__main__":
    main()
