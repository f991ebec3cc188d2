"""Whether a killed training comes to the same numbers: what is compared, and what is said of it."""

import copy
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from tests.test_data_runs import SPACE
from tuneapp import verify
from tuneapp.checkpoint import MANIFEST, Content, read_last
from tuneapp.cli import main
from tuneapp.config import Data, OneCycle, OwnLoss, RunSettings, Sgd, TrialConfig
from tuneapp.data.source import read_images
from tuneapp.display import verified_lines, verified_table
from tuneapp.errors import CheckpointError, ConfigError
from tuneapp.fetch import sha256_of
from tuneapp.ledger import Ledger, read_events
from tuneapp.rundir import RunDir
from tuneapp.training import TrialRun
from tuneapp.trial import run_trial
from tuneapp.verify import (
    Difference,
    Kill,
    Piece,
    Verified,
    buffer_names,
    compare,
    pieces_of,
    plan_kills,
)

Change = Callable[[Content], object]
OWN = "tests.states:OwnNet"
STEM, MEAN = "network.stem.0.weight", "network.stem.1.running_mean"


class CountingLoss(torch.nn.CrossEntropyLoss):
    """A loss with a state of its own, as it should be: in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))


# --- The comparison, piece by piece ---------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> tuple[Content, set[str]]:
    """The last checkpoint of a training that has every piece, and the names of its buffers."""
    images = read_images(Data(source=str(photos)), seed=0)
    config = TrialConfig(
        model=OWN,
        weights=None,
        image_size=32,
        epochs=2,
        batch_size=8,
        mixup_alpha=0.2,
        ema_decay=0.9,
        amp="fp16",
        loss=OwnLoss(loss=f"{__name__}:CountingLoss"),
        optimizer=Sgd(lr=0.01),
        schedule=OneCycle(),
    )
    folder = tmp_path_factory.mktemp("saved")
    run = TrialRun(settings=RunSettings(), images=images, params={}, folder=folder)
    run_trial(config, run, lambda row: None)
    return read_last(folder / "checkpoints"), buffer_names(config, run)


def differing(saved: tuple[Content, Collection[str]], change: Change) -> dict[str, Piece]:
    """Change a copy of a checkpoint; return the pieces in which it differs from the original."""
    content, buffers = saved
    other = copy.deepcopy(content)
    change(other)
    found = compare(pieces_of(content, buffers), pieces_of(other, buffers))
    return {piece.name: piece for piece in found if piece.differences}


def test_equal_checkpoints_are_the_same_in_every_piece_and_each_piece_has_something(
    saved: tuple[Content, set[str]],
) -> None:
    content, buffers = saved
    pieces = compare(pieces_of(content, buffers), pieces_of(copy.deepcopy(content), buffers))
    assert not [piece.name for piece in pieces if piece.differences]
    assert [piece.name for piece in pieces if piece.count] == [
        "weights", "buffers", "moving average", "optimizer", "schedule", "gradient scaler", "loss",
        "random generators", "history", "configuration",
    ]  # fmt: skip
    counts = {piece.name: piece.count for piece in pieces}
    # Two convolutions, a norm and two linear layers; mean, variance and count of the norm.
    assert (counts["weights"], counts["buffers"]) == (10, 3)


def flip(tensor: torch.Tensor) -> None:
    tensor.flatten()[0] = 1 - tensor.flatten()[0]


CHANGES: list[tuple[str, str, Change]] = [
    ("weights", STEM, lambda c: flip(c["model"][STEM])),
    ("weights", STEM, lambda c: c["model"].pop(STEM)),
    ("weights", STEM, lambda c: c["model"].update({STEM: c["model"][STEM].half()})),
    ("buffers", MEAN, lambda c: flip(c["model"][MEAN])),
    ("moving average", "n_averaged", lambda c: c.update(ema=None)),
    ("moving average", "n_averaged", lambda c: c.pop("ema")),
    ("moving average", f"module.{MEAN}", lambda c: flip(c["ema"][f"module.{MEAN}"])),
    (
        "optimizer",
        "state/0/momentum_buffer",
        lambda c: c["optimizer"]["state"][0].pop("momentum_buffer"),
    ),
    (
        "optimizer",
        "state/3/momentum_buffer",
        lambda c: flip(c["optimizer"]["state"][3]["momentum_buffer"]),
    ),
    (
        "optimizer",
        "param_groups/1/lr",
        lambda c: c["optimizer"]["param_groups"][1].update(lr=0.5),
    ),
    ("schedule", "steps_done", lambda c: c["schedule"].update(steps_done=1)),
    ("gradient scaler", "scale", lambda c: c["scaler"].update(scale=2.0)),
    ("gradient scaler", "scale", lambda c: c["scaler"].clear()),
    ("loss", "of_logits.called.calls", lambda c: flip(c["loss"]["of_logits.called.calls"])),
    ("loss", "of_logits.called.calls", lambda c: c.update(loss={})),
    ("random generators", "cpu", lambda c: flip(c["generators"]["cpu"])),
    ("history", "epoch 2/val/loss", lambda c: c["history"][1].update({"val/loss": 9.0})),
    ("history", "epoch 2/epoch", lambda c: c["history"].pop()),
    ("history", "best epoch", lambda c: c.update(best_epoch=9)),
    ("configuration", "", lambda c: c.update(config="{}")),
    ("python random", "0", lambda c: c.update({"python random": [1, 2]})),
]


@pytest.mark.parametrize(
    ("name", "where", "change"), CHANGES, ids=[f"{n}: {w}" for n, w, _ in CHANGES]
)
def test_a_piece_that_is_changed_or_lost_is_named_and_no_other(
    name: str, where: str, change: Change, saved: tuple[Content, set[str]]
) -> None:
    found = differing(saved, change)
    assert list(found) == [name]
    assert found[name].differences[0].where == where


def test_what_a_clock_measured_is_not_compared(saved: tuple[Content, set[str]]) -> None:
    clocked = {"train/images_per_s": 1.0, "train/data_wait": 0.5}
    assert differing(saved, lambda c: c["history"][0].update(clocked)) == {}


def test_tensors_are_compared_bit_by_bit_and_say_how_far_they_are_apart() -> None:
    def difference(a: object, b: object) -> Difference | None:
        (piece,) = compare({"x": {"t": a}}, {"x": {"t": b}})
        return piece.differences[0] if piece.differences else None

    nan, zeros = torch.tensor([float("nan"), 1.0]), torch.zeros(2)
    assert difference(nan, nan.clone()) is None
    assert difference(zeros, -zeros) == Difference("t", largest=0.0)
    assert difference(torch.ones(3, 2), torch.ones(2, 3).T) is None
    apart = difference(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0]))
    assert apart == Difference("t", largest=1.0)
    assert difference(torch.tensor(True), torch.tensor(False)) == Difference("t", largest=1.0)
    assert difference(zeros, torch.zeros(3)) == Difference(
        "t", "torch.float32 (2,)", "torch.float32 (3,)"
    )
    assert difference(zeros, 0.0) == Difference("t", "torch.float32 (2,)", "0.0")
    assert difference(float("nan"), float("nan")) is None
    assert difference(0.1 + 0.2, 0.3) == Difference("t", "0.30000000000000004", "0.3")


# --- The runs: what was reported, and what lies in their folders ----------------------------------


def train_both(folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """Train once in this process; `killed` is a copy of `straight`."""
    monkeypatch.chdir(folder)
    text = SPACE.format(config="", more="").replace("freeze_depth=4", "freeze_depth=1")
    Path("space.py").write_text(text.replace("resnet18", OWN))
    words = ["train", "space.py", "--data", str(photos), "--epochs", "2", "--image-size", "32"]
    assert main([*words, *more, "--runs-dir", ".", "--name", "straight"]) == 0
    shutil.copytree("straight", "killed")


def compared(folder: Path, num_folds: int = 0) -> Verified:
    found = Verified(epochs=2, asked=1, kills=(Kill(1, False),), device="cpu", folder=folder)
    return verify._compared(found, folder, num_folds, {MEAN})


def change_last(folder: Path, change: Change) -> None:
    """Change the newest checkpoint in a folder."""
    manifest = json.loads((folder / MANIFEST).read_text())
    entry = manifest["last"]
    content = torch.load(folder / entry["file"], weights_only=True)
    change(content)
    torch.save(content, folder / entry["file"])
    sha256 = sha256_of(folder / entry["file"])
    for each in manifest.values():
        if each["file"] == entry["file"]:
            each["sha256"] = sha256
    (folder / MANIFEST).write_text(json.dumps(manifest))


def rewrite_ledger(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    events = read_events(RunDir(run).ledger)
    RunDir(run).ledger.unlink()
    with Ledger(RunDir(run).ledger) as ledger:
        for event in events:
            change(event)
            ledger.append(event.pop("event"), **{k: v for k, v in event.items() if k != "seq"})


def named(found: Verified) -> list[str]:
    return [piece.name for piece in found.pieces if piece.differences]


def test_what_the_ledgers_say_is_compared_too(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_both(tmp_path, photos, monkeypatch)
    assert compared(tmp_path).is_same

    def other_metric(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["row"]["epoch"] == 2:
            event["row"] |= {"val/loss": 7.5, "train/data_wait": 0.9}

    def other_rate(event: dict[str, Any]) -> None:
        if event["event"] == "applied":
            event["applied"]["batch_size"] = 3

    rewrite_ledger(tmp_path / "killed", other_metric)
    found = compared(tmp_path)
    assert named(found) == ["metrics"]
    (difference,) = found.pieces[0].differences
    assert (difference.where, difference.killed) == ("epoch 2/val/loss", "7.5")
    rewrite_ledger(tmp_path / "killed", other_rate)
    assert named(compared(tmp_path)) == ["metrics", "applied"]
    change_last(
        tmp_path / "killed/trials/t0001/checkpoints",
        lambda c: c["history"][1].update({"val/loss": 7.5}),
    )
    found = compared(tmp_path)
    assert named(found) == ["metrics", "history", "applied"]
    assert found.first_epoch == 2


def test_with_folds_every_fold_is_compared_under_its_own_name(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_both(tmp_path, photos, monkeypatch, "--folds", "2")
    found = compared(tmp_path, num_folds=2)
    assert found.is_same
    assert found.first_epoch is None
    folder = tmp_path / "killed/trials/t0001/fold2/checkpoints"
    change_last(folder, lambda c: c["history"][0].update({"val/loss": 7.5}))
    change_last(folder, lambda c: flip(c["generators"]["cpu"]))
    found = compared(tmp_path, num_folds=2)
    places = {p.name: [d.where for d in p.differences] for p in found.pieces if p.differences}
    assert places == {"history": ["fold 2/epoch 1/val/loss"], "random generators": ["fold 2/cpu"]}
    assert found.first_epoch == 3  # after the two of the first fold


def test_the_last_checkpoint_is_read_whole_or_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no intact newest checkpoint"):
        read_last(tmp_path)


# --- The kills ------------------------------------------------------------------------------------


def test_kills_are_spread_over_the_epochs_and_begin_in_the_middle_of_one() -> None:
    assert plan_kills(1, None) == [Kill(0, False)]
    assert plan_kills(2, None) == [Kill(1, False)]
    assert plan_kills(3, None) == [Kill(1, False), Kill(2, True)]
    assert plan_kills(9, None) == [Kill(2, False), Kill(4, True), Kill(6, False)]
    for epochs in range(2, 12):
        for count in range(1, epochs):
            done = [kill.done for kill in plan_kills(epochs, count)]
            assert done == sorted(set(done))
            assert set(done) <= set(range(1, epochs))


@pytest.mark.parametrize(("epochs", "kills"), [(3, 3), (1, 2), (3, 0)])
def test_a_training_is_not_killed_more_often_than_it_can_go_on(epochs: int, kills: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"--interruptions {kills}: must be 1 to {epochs - 1 or 1} "
    ):
        plan_kills(epochs, kills)


FAKE = """
import csv, os, sys, time
from pathlib import Path

words = dict(w[2:].split("=", 1) for w in sys.argv[1:] if w.startswith("--"))
is_new = sys.argv[1] == "train"
run = Path(words["runs-dir"]) / words["name"] if is_new else Path(sys.argv[2])
folder = run / "trials/t0001"
folder.mkdir(parents=True, exist_ok=True)
(run / "calls.txt").open("a").write(sys.argv[1] + "\\n")
if not is_new and os.environ.get("FAKE") == "breaks":
    sys.exit("Traceback\\ntuneapp: error: it is lost")
if run.name == "straight" and os.environ.get("FAKE") == "fails":
    sys.exit("KeyError: 'x'")
(folder / "config.json").write_text("{}")
table = folder / "epochs.csv"
done = len(list(csv.DictReader(table.open()))) if table.exists() else 0
for epoch in range(done + 1, 4):
    time.sleep(float(words.get("pace", 0.3)))
    (folder / "aside").write_text("epoch\\n" + "".join(f"{n}\\n" for n in range(1, epoch + 1)))
    (folder / "aside").replace(table)
    if os.environ.get("FAKE") == "quick":
        break
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a script that only writes tables of three epochs stand for tuneapp."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(verify, "COMMAND", (sys.executable, str(tmp_path / "fake.py")))
    return tmp_path


def nothing(*_: object) -> None:
    pass


def train_killed(folder: Path, *plan: Kill, pause_s: float = 0.1) -> tuple[list[Kill], str]:
    return verify._train_killed([], folder, plan, pause_s, nothing, nothing)


def test_a_training_is_killed_as_planned_and_gone_on_with_to_its_end(fake: Path) -> None:
    plan = [Kill(1, False), Kill(2, True)]
    assert train_killed(fake, *plan) == (plan, "")
    assert (fake / "killed/calls.txt").read_text().split() == ["train", "resume", "resume"]
    assert (fake / "killed/trials/t0001/epochs.csv").read_text().split() == ["epoch", *"123"]


def test_a_training_of_one_epoch_is_killed_in_it(fake: Path) -> None:
    assert train_killed(fake, Kill(0, False)) == ([Kill(0, False)], "")
    assert (fake / "killed/calls.txt").read_text().split() == ["train", "resume"]


def test_a_kill_that_comes_too_late_is_not_counted(fake: Path) -> None:
    assert train_killed(fake, Kill(1, False), pause_s=60.0) == ([], "")


def test_an_epoch_is_timed_by_the_straight_training(fake: Path) -> None:
    took = verify._train_straight(["--pace=0.4"], fake, nothing, nothing)
    assert 0.3 < took < 1.5


def test_a_training_that_fails_by_itself_is_refused_with_its_cause(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "fails")
    with pytest.raises(ConfigError, match="fails even without a kill: KeyError"):
        verify._train_straight([], fake, nothing, nothing)


def test_a_training_that_cannot_go_on_says_why(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "breaks")
    kills, failure = train_killed(fake, Kill(1, False))
    assert (kills, failure) == ([Kill(1, False)], "it is lost")
    found = Verified(
        epochs=3, asked=1, kills=tuple(kills), failure=failure, device="cpu", folder=fake
    )
    assert not found.is_same
    assert "could not be resumed: it is lost" in "\n".join(verified_lines(found))


def test_whatever_ends_us_ends_the_child(fake: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children(recursive=True))  # other tests have theirs
    with pytest.raises(KeyboardInterrupt):
        verify._train_straight(["--pace=60"], fake, nothing, interrupt)
    assert not set(psutil.Process().children(recursive=True)) - before


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_waits_until_it_is_asked_for(
    number: signal.Signals, error: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(error) as caught, verify._Signals() as signals:
        signals.check()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        signals.check()
    assert signal.getsignal(number) is before
    if error is SystemExit:
        assert caught.value.code == 143


# --- What is shown --------------------------------------------------------------------------------

SAME = Piece("schedule", 3, ())
NONE = Piece("moving average", 0, ())
OTHER = Piece(
    "weights", 6, (Difference("a", largest=0.25), Difference("b", "1", "2"), *[Difference("c")] * 3)
)


def shown(found: Verified) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(verified_table(found))
    return console.export_text() + "\n".join(verified_lines(found))


def test_a_result_shows_each_piece_and_what_of_it_differs() -> None:
    found = Verified(
        epochs=3,
        asked=3,
        kills=(Kill(1, False), Kill(2, True)),
        pieces=(SAME, NONE, OTHER),
        first_epoch=2,
        device="cpu",
        folder=Path("/tmp/x"),
    )
    text = shown(found)
    for line in (
        "schedule        same     3 value(s)",
        "moving average  same     there is none",
        "weights         differs  5 of 6: a; b 1, killed 2; c",
        "and 2 more; at most by 0.25",
        "kills     2, in epoch 2, after epoch 2, of 3; 1 more came too late",
        "verdict   differs: weights",
        "since     epoch 2; the first kill was after 1 whole epoch(s)",
        "Python's `random`",
        "kept      /tmp/x",
    ):
        assert line in text
    assert "GPU" not in text


def test_a_difference_before_the_first_kill_is_not_blamed_on_it() -> None:
    found = Verified(
        epochs=3,
        asked=1,
        kills=(Kill(1, False),),
        pieces=(OTHER,),
        first_epoch=1,
        device="cuda",
        folder=Path("/tmp/x"),
    )
    text = shown(found)
    assert "epoch 1, which no kill had touched: this training does not repeat" in text
    assert "deterministic algorithms" in text


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--interruptions", "0"], "--interruptions 0: must be at least 1"),
        (["--interruptions", "3"], "--interruptions 3: must be 1 to 2 for a training of 3 epoch"),
        (["--epochs", "0"], "--epochs 0: must be"),
        (["--set", "nothing=1"], "has no such parameter"),
        (["--data", "nowhere"], "no such folder"),
        (["--keeep"], "--keeep"),
    ],
)
def test_wrong_options_are_refused_in_a_line(
    words: list[str],
    told: str,
    small_space: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["verify-resume", str(small_space), "--data", str(photos), *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


NETWORK = '''"""A network that is trained in no time, in a space of one configuration."""
import random

from optuna import Trial
from torch import nn
from torch.nn import functional as F

from tuneapp.config import Data, OneCycle, OwnLoss, Sgd, TrialConfig

random.seed(0)


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.drop(self.stem(x).mean([2, 3])))


def drawing(logits, targets):
    return F.cross_entropy(logits * (1 + random.random()), targets)


class Counting(nn.CrossEntropyLoss):
    calls = 0

    def forward(self, logits, targets):
        self.calls += 1
        return super().forward(logits, targets) * (1 + self.calls / 100)


def search_space(trial: Trial) -> TrialConfig:
    return TrialConfig(
        model="net:Net",
        weights=None,
        image_size=32,
        epochs=trial.suggest_int("epochs", 1, 9),
        optimizer=Sgd(lr=0.01),
        schedule=OneCycle(),
        ema_decay=0.9,
        {more},
    )
'''


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Return a maker of a space in the current folder: words that verify two epochs of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(more: str) -> list[str]:
        Path("net.py").write_text(NETWORK.replace("{more}", more))
        return ["verify-resume", "net.py", "--set", "epochs=2"]

    return make


@pytest.mark.timeout(400)
def test_a_clean_space_comes_to_the_same_numbers(
    net: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(net("mixup_alpha=0.2")) == 0
    text = capsys.readouterr().out
    assert "differs" not in text
    for piece in ("metrics", "weights", "buffers", "moving average", "optimizer", "schedule"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{piece} ")]
        assert " same " in line
        assert "none" not in line
    assert "kills     1, in epoch 2, of 2" in text
    assert "verdict   the same to the last bit" in text
    assert not list((tmp_path / "temporary").glob("tuneapp-verify-*"))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("loss", [pytest.param("drawing", marks=pytest.mark.slow), "Counting"])
def test_a_loss_with_state_that_no_checkpoint_holds_is_found(
    loss: str,
    net: Callable[[str], list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(net(f'loss=OwnLoss(loss="net:{loss}")')) == 1
    text = capsys.readouterr().out
    assert "verdict   differs: metrics, weights, buffers, moving average, optimizer" in text
    assert "epoch 2/train/loss" in text
    assert "epoch 1/" not in text
    assert "since     epoch 2; the first kill was after 1 whole epoch(s)" in text
    assert "random generators  same" in text  # torch's own: they are not what is lost
    (kept,) = (tmp_path / "temporary").glob("tuneapp-verify-*")
    assert f"kept      {kept}" in text
    assert {"straight", "killed"} <= {path.name for path in kept.iterdir()}


@pytest.mark.timeout(240)
def test_ctrl_c_leaves_no_process_and_no_folder(
    net: Callable[[str], list[str]], tmp_path: Path, tuneapp: Callable[..., Any]
) -> None:
    process = tuneapp(*net("mixup_alpha=0.2"), cwd=tmp_path)
    children: list[psutil.Process] = []
    while not children and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        children = [c for c in children if "--name=straight" in c.cmdline()]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert children
    assert not [child for child in children if child.is_running()]
    assert not list((tmp_path / "temporary").glob("tuneapp-verify-*"))
