"""Faults 28 to 35: NaN and infinity, skipped steps, rates and frozen weights that drift.

Each is brought about in a real training of a small network.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from torch import Tensor, nn

import tuneapp.training as training
import tuneapp.trial as trial
from tests.conftest import SMALL_SPACE, read_ledger
from tests.test_trial import SMALL, ignore, interrupt_after, timeless
from tuneapp import config as c
from tuneapp.checkpoint import Row
from tuneapp.cli import main
from tuneapp.config import AdamW, Cosine, OneCycle, RunSettings, Sgd, TrialConfig
from tuneapp.errors import Diverged, TrialError
from tuneapp.ledger import Ledger
from tuneapp.loop import MAX_SKIPPED, CountingScaler, train_one_epoch
from tuneapp.models import build_network
from tuneapp.rundir import open_run
from tuneapp.space import SearchSpace
from tuneapp.study import Study
from tuneapp.summary import read_summary
from tuneapp.training import Training
from tuneapp.trial import TrialRun, run_trial

pytestmark = pytest.mark.timeout(120)

STEPS = 3  # of an epoch: 21 images in batches of 8


@pytest.fixture
def small(config: TrialConfig) -> TrialConfig:
    """Three epochs of three steps of all of a small network."""
    return replace(config, model=SMALL, freeze_depth=0, epochs=3)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Training], None]], None]:
    """Return what lets a function change a trial after it was built and before it trains."""

    def arrange(change: Callable[[Training], None]) -> None:
        really = trial.begin_training

        def begin(config: TrialConfig, run: TrialRun) -> Training:
            training = really(config, run)
            change(training)
            return training

        monkeypatch.setattr(trial, "begin_training", begin)

    return arrange


def spoil_loss(step: int, value: float) -> Callable[[Training], None]:
    """Return what makes the loss of one step, counted from the first epoch's first, this value."""

    def change(training: Training) -> None:
        steps = iter(range(1, 10_000))

        def spoil(_: nn.Module, __: object, loss: Tensor) -> Tensor | None:
            return loss * value if next(steps) == step else None

        training.loss_fn.register_forward_hook(spoil)

    return change


def spoil_gradients(is_bad: Callable[[int], bool]) -> Callable[[Training], None]:
    """Return what makes one number of the head's gradient infinite in some steps."""

    def change(training: Training) -> None:
        steps = iter(range(1, 10_000))
        head = training.state.optimizer.param_groups[-1]["params"][0]

        def spoil(gradient: Tensor) -> Tensor:
            bad = gradient.clone()
            if is_bad(next(steps)):
                bad.view(-1)[0] = math.inf
            return bad

        head.register_hook(spoil)

    return change


def trained_by_command(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, *words: str
) -> tuple[int, Path]:
    """Train three epochs by the command line; return the exit code and the run directory."""
    monkeypatch.chdir(tmp_path)
    text = SMALL_SPACE.replace('"resnet18"', repr(SMALL)).replace("epochs=4", "epochs=3")
    (tmp_path / "space.py").write_text(text)
    code = main(["train", "space.py", "--data", str(photos), "--name", "x", *words])
    return code, tmp_path / "runs" / "x"


def taken_up(run: Path, tmp_path: Path) -> Study:
    """The study as a resumed sweep would have it."""
    space = SearchSpace((run / "space.py").read_text(), tmp_path / "space.py")
    with Ledger(run / "ledger.jsonl") as ledger:
        return Study(space, ledger, RunSettings(), [])


# --- 28, 29, 32: what is no number ----------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("step", "epoch"), [(1, 1), (5, 2), (9, 3)])
def test_fault_28_a_loss_that_becomes_nan_ends_the_trial_as_diverged(
    step: int,
    epoch: int,
    value: float,
    begun: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun(spoil_loss(step, value))
    code, run = trained_by_command(tmp_path, photos, monkeypatch)
    assert code == 4  # its one trial gave no result
    where = f"loss became {value} in epoch {epoch}, step {step - STEPS * (epoch - 1)}"
    assert where in capsys.readouterr().out
    events = read_ledger(run)
    (ended,) = [e for e in events if e["event"] == "ended"]
    assert (ended["state"], ended["cause"]) == ("diverged", where)
    # The epochs before it are kept, each finite, and one of them is still the best.
    rows = [e["row"] for e in events if e["event"] == "epoch"]
    assert [row["epoch"] for row in rows] == list(range(1, epoch))
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert (read_summary(run).best is None) == (epoch == 1)
    # Documented: not FAIL, but COMPLETE with the worst value seen, so that the search keeps away.
    (told,) = taken_up(run, tmp_path).frozen_trials()
    worst = min((row["val/accuracy"] for row in rows), default=None)
    assert told.state == (TrialState.FAIL if worst is None else TrialState.COMPLETE)
    assert told.values == (None if worst is None else [worst])


BAD_METRICS = {"nan": math.nan, "inf": math.inf, "None": None, "text": "0.9", "missing": KeyError}


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("value", BAD_METRICS.values(), ids=BAD_METRICS.keys())
def test_fault_29_a_metric_that_is_no_number_fails_the_trial_alone(
    value: object,
    epoch: int,
    small: TrialConfig,
    run: TrialRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    really = trial.measure
    validations = iter(range(1, 10))

    def measure(*args: Any) -> dict[str, Any]:
        scores: dict[str, Any] = really(*args)
        if next(validations) == epoch:
            scores["val/accuracy"] = value
            if value is KeyError:
                del scores["val/accuracy"]
        return scores

    monkeypatch.setattr(trial, "measure", measure)
    rows: list[Row] = []
    # Documented: what is NaN or infinite is a divergence; what is no number at all, a failure.
    kind = Diverged if isinstance(value, float) else TrialError if value is KeyError else TypeError
    with pytest.raises(kind):
        run_trial(small, replace(run, folder=tmp_path), rows.append)
    # It was neither reported nor kept: a resumed trial goes on from the epoch before.
    assert [row["epoch"] for row in rows] == list(range(1, epoch))
    assert all(math.isfinite(row["val/accuracy"]) for row in rows)
    monkeypatch.setattr(trial, "measure", really)
    again: list[Row] = []
    run_trial(small, replace(run, folder=tmp_path), again.append, tmp_path / "checkpoints")
    assert timeless(again)[: epoch - 1] == timeless(rows)
    assert [row["epoch"] for row in again] == [1, 2, 3]


def test_fault_32_a_constant_metric_makes_the_first_epoch_the_best(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "measure", lambda *args: {"val/accuracy": 0.5})
    code, run = trained_by_command(tmp_path, photos, monkeypatch)
    assert code == 0
    best = read_summary(run).best
    assert best is not None
    assert (best[0].state, best[1]["epoch"], best[1]["val/accuracy"]) == ("finished", 1, 0.5)


def test_fault_32_when_every_trial_diverges_there_is_no_best_and_the_code_says_so(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = SMALL_SPACE.replace("1e-4, 1e-1, log=True", "1e38, 1e39, log=True")
    text = text.replace(": 1e-2}", ": 1e38}").replace('"resnet18"', repr(SMALL))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wild.py").write_text(text)
    words = ["train", "wild.py", "--data", str(photos), "--set", "optimizer=sgd"]
    words += ["--set", "sgd.lr=1e38", "--set", "freeze_depth=4", "--name", "x"]
    assert main(words) == 4
    assert "best      none" in capsys.readouterr().out
    assert main(["summary", "runs/x"]) == 0
    said = capsys.readouterr().out
    assert "best      none" in said
    assert "diverged" in said
    table = (tmp_path / "runs/x/trials.csv").read_text()
    assert table.count("\nt0001,") == 1
    (told,) = taken_up(tmp_path / "runs/x", tmp_path).frozen_trials()
    assert told.state == TrialState.FAIL  # and not RUNNING: no value was ever seen


# --- 30, 31: gradients and the scaler -------------------------------------------------------------

CLIPS: list[dict[str, float]] = [{}, {"clip_norm": 1.0}, {"clip_value": 1.0}]


@pytest.mark.parametrize("clip", CLIPS, ids=repr)
def test_fault_30_an_infinite_gradient_skips_the_step_under_float16_and_is_counted(
    clip: dict[str, float],
    small: TrialConfig,
    run: TrialRun,
    begun: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[tuple[int, int]] = []
    moved: list[bool] = []

    def watch(training: Training) -> None:
        # Beside the optimizer: the weights after each of its steps, or skipped steps.
        scaler, model = training.state.scaler, training.state.model
        last = {k: v.clone() for k, v in model.named_parameters()}
        update = scaler.update

        def spy(new_scale: float | Tensor | None = None) -> None:
            update(new_scale)
            moved.append(any(not torch.equal(last[k], v) for k, v in model.named_parameters()))
            last.update({k: v.clone() for k, v in model.named_parameters()})

        scaler.update = spy  # type: ignore[method-assign]
        spoil_gradients(lambda step: step == 2)(training)

    def told(*args: Any, **options: Any) -> Any:
        trained = train_one_epoch(*args, **options)
        counted.append((trained.steps, trained.skipped))
        return trained

    begun(watch)
    monkeypatch.setattr(training, "train_one_epoch", told)
    rows: list[Row] = []
    config = replace(small, amp="fp16", optimizer=AdamW(lr=1e-3), **clip)
    state = run_trial(replace(config, epochs=2), run, rows.append)
    assert counted == [(STEPS, 1), (STEPS, 0)]
    assert moved == [True, False, True, True, True, True]
    # Nothing of it is in the weights or in the numbers that are told.
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    assert all(math.isfinite(row["train/grad_norm"]) for row in rows)
    assert state.scaler.get_scale() == 2.0**15  # halved once
    assert isinstance(state.scaler, CountingScaler)
    assert state.scaler.skipped_in_a_row == 0


@pytest.mark.parametrize("skipped", [1, STEPS, STEPS + 1], ids=["one", "all", "one more"])
def test_fault_30_the_first_steps_may_be_skipped_with_any_optimizer(
    skipped: int, small: TrialConfig, run: TrialRun, begun: Any
) -> None:
    # For one that is not fused, torch's scaler does not even call it.
    begun(spoil_gradients(lambda step: step <= skipped))
    rows: list[Row] = []
    config = replace(small, amp="fp16", optimizer=Sgd(lr=1e-3), clip_norm=1.0)
    state = run_trial(config, run, rows.append)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert state.scaler.get_scale() == 2.0 ** (16 - skipped)


def test_fault_31_a_training_that_goes_on_in_float16_begins_with_a_scaler_of_its_own() -> None:
    scaler = CountingScaler("cpu", enabled=True)
    scaler.load_state_dict(CountingScaler("cpu", enabled=False).state_dict())
    assert (scaler.get_scale(), scaler.skipped_in_a_row) == (2.0**16, 0)


@pytest.mark.parametrize("clip", CLIPS[:2], ids=repr)
@pytest.mark.parametrize("step", [2, STEPS])
def test_fault_30_an_infinite_gradient_in_full_precision_is_never_silently_nan(
    step: int, clip: dict[str, float], small: TrialConfig, run: TrialRun, begun: Any, tmp_path: Path
) -> None:
    # Clipping by the norm makes NaN of it: the next loss, or the validation's, tells.
    begun(spoil_gradients(lambda now: now == step))
    rows: list[Row] = []
    config = replace(small, optimizer=Sgd(lr=1e-3), **clip)
    with pytest.raises(Diverged, match=r"^(val/)?loss became (nan|inf) in epoch 1"):
        run_trial(config, replace(run, folder=tmp_path), rows.append)
    assert rows == []
    assert not (tmp_path / "checkpoints").exists()


def test_fault_31_a_trial_whose_every_step_is_skipped_ends_with_the_cause(
    small: TrialConfig, run: TrialRun, begun: Any, tmp_path: Path
) -> None:
    begun(spoil_gradients(lambda step: step > STEPS))  # the first epoch is a good one
    rows: list[Row] = []
    config = replace(small, amp="fp16", epochs=20)
    with pytest.raises(
        TrialError, match=r"^mixed precision: 20 steps in a row were skipped"
    ) as caught:
        run_trial(config, replace(run, folder=tmp_path), rows.append)
    assert not isinstance(caught.value, Diverged)
    # Twenty steps of three an epoch, counted across the epochs: in the eighth.
    assert "the last in epoch 8" in str(caught.value)
    assert [row["epoch"] for row in rows] == list(range(1, 8))


def test_fault_31_the_count_goes_on_after_a_resume_and_begins_anew_after_a_step(
    small: TrialConfig, run: TrialRun, begun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(small, amp="fp16", epochs=20)
    in_folder = replace(run, folder=tmp_path)
    begun(spoil_gradients(lambda step: True))
    interrupt_after(config, in_folder, 4)
    rows: list[Row] = []
    with pytest.raises(TrialError, match="20 steps in a row were skipped, the last in epoch 7"):
        run_trial(config, in_folder, rows.append, tmp_path / "checkpoints")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # Nineteen in a row and one good step are no fault.
    monkeypatch.undo()
    begun(spoil_gradients(lambda step: step % MAX_SKIPPED != 0))
    run_trial(replace(config, epochs=8), run, ignore)


# --- 33, 34, 35: rates, frozen layers, threads ----------------------------------------------------


def learning_rates(training: Training, into: list[float]) -> None:
    optimizer = training.state.optimizer
    optimizer.register_step_pre_hook(lambda *_: into.append(optimizer.param_groups[-1]["lr"]))


SCHEDULES: list[c.Schedule] = [OneCycle(), Cosine(), Cosine(warmup_fraction=0.25)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_fault_33_the_learning_rate_of_every_step_is_the_same_after_a_resume(
    schedule: c.Schedule, small: TrialConfig, run: TrialRun, begun: Any, tmp_path: Path
) -> None:
    config = replace(small, schedule=schedule)
    seen: list[float] = []
    begun(lambda training: learning_rates(training, seen))
    run_trial(config, run, ignore)
    straight = seen.copy()
    assert len(straight) == 3 * STEPS
    for done in (1, 2):
        seen.clear()
        place = replace(run, folder=tmp_path / str(done))
        interrupt_after(config, place, done)
        run_trial(config, place, ignore, tmp_path / str(done) / "checkpoints")
        assert seen == straight
    if schedule == Cosine():  # by the formula, beside torch's recursion
        total = 3 * STEPS
        wanted = [1e-2 * (1 + math.cos(math.pi * k / total)) / 2 for k in range(total)]
        assert straight == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("depth", range(6))
def test_fault_34_frozen_tensors_are_bit_equal_at_the_end(
    depth: int, small: TrialConfig, run: TrialRun, begun: Any, tmp_path: Path
) -> None:
    before: dict[str, Tensor] = {}
    starts: list[dict[str, Tensor]] = []

    def keep(training: Training) -> None:
        starts.append({k: v.clone() for k, v in training.state.model.network.state_dict().items()})

    begun(keep)
    # All that could make frozen layers drift: weight decay, an average, BatchNorm's statistics.
    optimizer = AdamW(lr=1e-2, weight_decay=0.5)
    config = replace(small, freeze_depth=depth, optimizer=optimizer, ema_decay=0.9)
    place = replace(run, folder=tmp_path)
    interrupt_after(config, place, 1)
    state = run_trial(config, place, ignore, tmp_path / "checkpoints")
    before, again = starts
    assert all(torch.equal(before[k], again[k]) for k in before), "both began with the same"
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]
    after = state.model.network.state_dict()
    assert set(after) == set(build_network(SMALL, 3).state_dict())
    same = {k.split(".")[0] for k in after if torch.equal(after[k], before[k])}
    changed = {k.split(".")[0] for k in after if not torch.equal(after[k], before[k])}
    assert changed == set(names[depth:])
    assert same >= set(names[:depth])
    frozen = set(names[:depth])
    for name in names:
        stage = getattr(state.model.network, name)
        parameters = list(stage.parameters())
        assert all(p.requires_grad != (name in frozen) for p in parameters), name
        assert (name in frozen) <= (not any(m.training for m in stage.modules())), name
    assert state.average is not None
    averaged = {k.removeprefix("network."): v for k, v in state.average.model.state_dict().items()}
    for name, tensor in before.items():
        if name.split(".")[0] in frozen and name in averaged:
            assert torch.equal(averaged[name], tensor), name


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("threads")
def test_fault_35_the_number_of_threads_is_the_trials_own_and_hardly_changes_its_numbers(
    config: TrialConfig, run: TrialRun, begun: Any
) -> None:
    used: list[int] = []
    begun(lambda training: used.append(torch.get_num_threads()))
    deep = replace(config, freeze_depth=4, optimizer=Sgd(lr=1e-2), epochs=1)

    def outcome(num_threads: int) -> list[Row]:
        torch.set_num_threads(3)  # what the process had before does not matter
        rows: list[Row] = []
        run_trial(deep, replace(run, num_threads=num_threads), rows.append)
        return [{k: v for k, v in row.items() if k != "applied"} for row in timeless(rows)]

    one, again, two = outcome(1), outcome(1), outcome(2)
    assert used == [1, 1, 2]
    # The same number of threads: the same bits. With another number they differ (seen with torch on
    # two cores: sums are added up in another order), and only closeness can be promised; hence a
    # run writes the number down, and `train --from` and `resume` take it over.
    assert one == again
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-3)
        assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-2)


def test_fault_35_the_number_of_threads_is_written_down_and_taken_over(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, run = trained_by_command(tmp_path, photos, monkeypatch, "--epochs", "1")
    assert code == 0
    assert open_run(run)[1].cpus_per_trial == 1
