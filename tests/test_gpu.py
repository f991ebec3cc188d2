"""The device path on a real GPU; skipped where there is none."""

from dataclasses import replace

import pytest
import torch

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
