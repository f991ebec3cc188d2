"""The device path on a real GPU; skipped where there is none."""

from dataclasses import replace

import pytest
import torch

from tuneapp.average import WeightAverage
from tuneapp.config import AdamW, CrossEntropy, Plateau, TrialConfig
from tuneapp.models import build_staged
from tuneapp.training import begin_training
from tuneapp.trial import run_trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16", "auto"])
def test_a_trial_trains_on_its_gpu_in_every_precision(config, run, amp):
    rows = []
    trial = replace(config, amp=amp, freeze_depth=3, epochs=4)
    state = run_trial(trial, replace(run, has_gpu=True), rows.append)
    assert rows[-1]["applied"]["device"] == "cuda"
    assert next(state.model.parameters()).device.type == "cuda"
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_a_trial_without_a_gpu_of_its_own_stays_on_the_cpu(config, run):
    rows = []
    run_trial(config, run, rows.append)
    assert rows[-1]["applied"]["device"] == "cpu"


def test_a_resumed_trial_on_a_gpu_goes_on_with_its_state(config, run, tmp_path):
    trial = replace(config, freeze_depth=4, epochs=3, amp="fp16")
    whole, part = [], []
    run_trial(trial, replace(run, has_gpu=True), whole.append)

    class StopError(Exception):
        pass

    def report(row):
        part.append(row)
        if row["epoch"] == 2:
            raise StopError

    with pytest.raises(StopError):
        run_trial(trial, replace(run, has_gpu=True, folder=tmp_path), report)
    again = []
    run_trial(
        trial,
        replace(run, has_gpu=True, folder=tmp_path),
        again.append,
        resume_from=tmp_path / "checkpoints",
    )
    assert [r["epoch"] for r in again] == [1, 2, 3]
    # The algorithms of a GPU may differ from run to run in the last bits.
    assert again[-1]["train/loss"] == pytest.approx(whole[-1]["train/loss"], rel=1e-2)


def test_everything_at_once_trains_on_a_gpu(config, run):
    rows = []
    trial = replace(
        config,
        epochs=4,
        freeze_depth=-1,
        unfreeze_at={2: 4, 3: 0},
        loss=CrossEntropy(label_smoothing=0.1, class_weights="balanced"),
        schedule=Plateau(patience=0, warmup_fraction=0.1),
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        ema_decay=0.9,
        decay_norms_and_biases=False,
        channels_last=True,
        accumulation_steps=2,
        clip_value=1.0,
    )
    state = run_trial(trial, replace(run, has_gpu=True), rows.append)
    assert next(state.average.model.parameters()).device.type == "cuda"
    assert rows[-1]["applied"]["channels_last"]
    assert rows[-1]["applied"]["frozen_parameters"] == 0
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]


def test_a_step_with_an_average_does_not_wait_for_the_gpu():
    torch.manual_seed(0)
    config = TrialConfig(model="resnet18", optimizer=AdamW(lr=1e-3), ema_decay=0.9)
    model = build_staged(config, num_classes=3, image_size=32).cuda()
    average = WeightAverage(model, 0.9)
    average.update(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.update(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("budget", [None, 0], ids=["stored", "streamed"])
def test_batches_on_a_gpu_are_those_of_the_cpu(config, run, tmp_path, monkeypatch, budget, workers):
    monkeypatch.setenv("TUNEAPP_CACHE", str(tmp_path))
    settings = replace(run.settings, store_budget=budget, workers=workers)
    trial = replace(config, augment="strong", mixup_alpha=0.2)
    seen = {}
    for has_gpu in (False, True):
        begun = begin_training(trial, replace(run, settings=settings, has_gpu=has_gpu))
        assert begun.train_batches.is_streamed == (budget == 0)
        # Taken slowly and quickly: a batch must be whole before it is used.
        seen[has_gpu] = [
            (images.cpu(), labels.cpu())
            for epoch in (1, 2)
            for images, labels in begun.train_batches.epoch(epoch)
        ]
    for (images, labels), (theirs, their_labels) in zip(seen[False], seen[True], strict=True):
        torch.testing.assert_close(theirs, images, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(their_labels, labels, rtol=1e-6, atol=1e-6)
