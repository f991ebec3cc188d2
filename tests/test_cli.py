"""The command line as a user meets it: exit codes, one-line errors, and the same numbers again."""

import importlib.metadata
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import SMALL_SPACE, read_ledger
from tests.states import config_of
from tuneapp.anatomy import read_anatomy
from tuneapp.cli import main
from tuneapp.data.batches import Batches
from tuneapp.data.sampling import InOrder
from tuneapp.data.store import open_store
from tuneapp.data.views import evaluation_view
from tuneapp.display import anatomy_table
from tuneapp.loop import Precision, evaluate
from tuneapp.prepare import load_model, read_run_images
from tuneapp.rundir import open_run
from tuneapp.weights import preprocessing_of

Start = Callable[..., subprocess.Popen[str]]
ROOT = Path(__file__).parent.parent
RESNET = ROOT / "search_spaces" / "resnet.py"
TIMINGS = ("train/images_per_s", "train/data_wait")


def rows_of(run: Path, trial: str) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in e["row"].items() if k not in TIMINGS}
        for e in read_ledger(run)
        if e["event"] == "epoch" and e["trial"] == trial
    ]


@pytest.mark.parametrize("words", [["--help"], ["sweep", "--help"], ["show", str(RESNET)]])
def test_help_and_show_import_neither_torch_nor_ray_nor_pandas(words: list[str]) -> None:
    code = (
        f"import sys; from tuneapp.cli import main; main({words!r}); "
        "print({'torch', 'ray', 'pandas', 'torchvision'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"
    assert done.stdout


def test_every_command_and_option_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("sweep", "resume", "train", "show", "summary"):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, flags=re.MULTILINE)
        assert options
        for option in options:
            after = text.split(option, 1)[1][:200]
            assert re.search(r"[A-Z]-?[a-z]+|default", after), (command, option)


def test_show_names_ranges_conditions_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(RESNET)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"sgd\.lr +0\.001 to 0\.1, log +optimizer = sgd", text)
    assert re.search(r"freeze_depth +0 to 5, whole", text)
    assert "  1  freeze_depth=0" in text


def test_show_model_names_its_stages_what_is_left_to_train_and_what_they_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["show", "--model", "resnet18"]) == 0
    text = capsys.readouterr().out
    assert "224 x 224 pixels" in text
    assert "1,000 classes" in text
    assert re.search(r"depth +stage +output +parameters +trainable from here +GFLOPs", text)
    # All but the stem, 64 x 3 x 7 x 7 weights and a norm, is left to train at depth 1.
    assert re.search(r"^ +0  stem +64 x 56 x 56 +9,536 +11,689,512 +0\.236 *$", text, re.M)
    assert re.search(r"^ +1  layer1 +64 x 56 x 56 +147,968 +11,679,976 ", text, re.M)
    assert re.search(r"^ +5  head +1,000 +513,000 +513,000 +0\.001 *$", text, re.M)
    assert re.search(r"^ +total +11,689,512 +3\.628 *$", text, re.M)
    assert main(["show", "--model", "resnet18", "--image-size", "64"]) == 0
    text = capsys.readouterr().out
    assert "64 x 64 pixels" in text
    assert re.search(r"^ +0  stem +64 x 16 x 16 +9,536 +11,689,512 +19\.3 *$", text, re.M)
    assert "MFLOPs" in text


def test_show_model_finds_a_network_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shown_network.py").write_text(
        "from torch import nn\n\n\n"
        "def build(classes):\n"
        "    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)]\n"
        "    stages = {'st[e]m': nn.Conv2d(3, 4, 1), 'head': head}\n"
        "    network = nn.Sequential(stages['st[e]m'], *head)\n"
        "    network.stages = lambda: stages\n"
        "    return network\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert main(["show", "--model", "shown_network:build", "--image-size", "32"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ +0  st\[e\]m +4 x 32 x 32 +16 +66 ", text, re.M)
    assert "10 classes" in text


@pytest.mark.parametrize("model", ["efficientnet_b0", "vit_b_16", "googlenet", "regnet_y_128gf"])
def test_the_table_of_a_model_fits_a_terminal_of_80_columns(model: str) -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(anatomy_table(read_anatomy(model)))
    text = console.file.getvalue()
    assert "…" not in text
    assert text.count("\n") == len(read_anatomy(model).stages) + 2


BAD_INPUT = [
    (["show", "search_spaces/resent.py"], ["resent.py", "no such search-space file"]),
    (["show"], ["either SPACE or --model NAME"]),
    (["show", "SPACE", "--model", "resnet18"], ["either SPACE or --model NAME"]),
    (["show", "SPACE", "--image-size", "64"], ["--image-size 64", "goes with --model NAME"]),
    (["show", "resnet18"], ["resnet18: no such search-space file; did you mean: show --model"]),
    (["show", "--model", "resnet18", "--image-size", "8"], ["--image-size 8: must be at least 16"]),
    (["show", "--model", "resnet81"], ["'resnet81' is unknown", "did you mean 'resnet18'?"]),
    (["show", "--model", "nothing:build"], ["'nothing:build'", "cannot import nothing"]),
    (["show", "--model", "vgg11", "--image-size", "20"], ["20 x 20", "--image-size 32"]),
    (["sweep", "nothing.py"], ["nothing.py", "no such search-space file"]),
    (["sweep", "nothing.txt"], ["nothing.txt", "no such search-space file"]),
    (["sweep", "."], ["is a folder; give a file in it: space.py"]),
    (["sweep", "SPACE", "--trials", "0"], ["--trials 0", "at least 1"]),
    (["sweep", "SPACE", "--epochs", "0"], ["--epochs 0: must be a whole number >= 1"]),
    (["sweep", "SPACE", "--seed", "-1"], ["--seed -1: must be a whole number >= 0"]),
    (["sweep", "SPACE", "--folds", "1"], ["--folds 1: must be a whole number >= 2"]),
    (["sweep", "SPACE", "--metric", "val/acuracy"], ["--metric 'val/ac", "mean 'val/accuracy'?"]),
    (["sweep", "SPACE", "--data", ".", "--label-regex", "("], ["--label-regex '(': must be a reg"]),
    (["sweep", "SPACE", "--time-budget", "soon"], ["--time-budget soon", "30m"]),
    (["sweep", "SPACE", "--time-budget", "30"], ["--time-budget 30", "did you mean 30m?"]),
    (["sweep", "SPACE", "--concurrent", "99999"], ["--concurrent 99999", "CPU cores"]),
    (["sweep", "SPACE", "--data", "no/such/folder"], ["no/such/folder", "no such folder"]),
    (["sweep", "SPACE", "--name", "../outside"], ["--name '../outside'", "not allowed"]),
    (["sweep", "SPACE", "--runs-dir", "space.py/x"], ["--runs-dir space.py/x", "Not a directory"]),
    (["sweep", "SPACE", "--image-size", "3"], ["--image-size 3: must be a whole number >= 16"]),
    (["sweep", "SPACE", "--device", "cuda"], ["--device cuda", "no GPU"]),
    (["train", "SPACE", "--set", "lr_ration=0.5"], ["lr_ration", "did you mean 'lr_ratio'?"]),
    (["train", "SPACE", "--set", "lr_ratio=7"], ["lr_ratio=7", "0.1 to 1, log"]),
    (["train", "SPACE", "--set", "optimizer=adagrad"], ["optimizer=adagrad", "adamw | sgd"]),
    (["train", "SPACE", "--set", "freeze_depth"], ["--set freeze_depth", "NAME=VALUE"]),
    (["train", "SPACE", "--set", "lr_ratio=1", "--set", "lr_ratio=1"], ["lr_ratio: given twice"]),
    (["train", "SPACE", "--set", "epochs=1"], ["--set epochs: ", "--epochs N"]),
    (["train"], ["SPACE or --from RUN"]),
    (["train", "--trial", "best"], ["--trial goes with --from RUN"]),
    (["train", "SPACE", "--trial", "best"], ["--trial goes with --from RUN"]),
    (["train", "SPACE", "--name", "a/b"], ["--name 'a/b'", "not allowed"]),
    (["train", "--from", "nowhere"], ["nowhere", "not a run directory"]),
    (["resume", "nowhere"], ["nowhere", "not a run directory"]),
    (["summary", "nowhere"], ["nowhere", "not a run directory"]),
]


@pytest.mark.parametrize(("words", "said"), BAD_INPUT, ids=lambda v: " ".join(v)[:40])
def test_bad_input_gets_one_line_and_leaves_nothing(
    words: list[str],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.py").write_text(SMALL_SPACE.replace("1e-4, 1e-1, log=True", "1e-4, 1e-1"))
    words = ["space.py" if w == "SPACE" else w for w in words]
    if "cuda" in words:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("tuneapp: error: ")
    for text in said:
        assert text in error
    assert {p.name for p in tmp_path.iterdir()} <= {"space.py", "runs"}
    assert not list(tmp_path.glob("runs/*"))


SWEEP = "(python -m tuneapp sweep --help)"
COMMANDS = (
    "sweep, resume, extend, refine, train, show, lr-range, verify-resume, final-test, summary, "
    "doctor"
)
USAGE = [
    ("sweep S --trails 3", f"--trails: no such option; did you mean '--trials'? {SWEEP}"),
    ("sweep S --zzzzzz 3", f"--zzzzzz: no such option {SWEEP}"),
    ("sweep S --trials abc", f"--trials 'abc': must be a whole number {SWEEP}"),
    ("sweep S --trials 1 --trials=1.5", f"--trials 1.5: must be a whole number {SWEEP}"),
    ("sweep S --trials -2", f"--trials -2: must be at least 1 {SWEEP}"),
    ("sweep S --gpus-per-trial x", f"--gpus-per-trial 'x': must be a number {SWEEP}"),
    ("sweep S --trials", f"--trials: needs a value {SWEEP}"),
    ("sweep S --dashboard=1", f"--dashboard: takes no value {SWEEP}"),
    ("sweep S --device gppu", f"--device 'gppu': must be one of auto, cpu, cuda {SWEEP}"),
    (
        "sweep S --bad-images drp",
        f"--bad-images 'drp': must be one of drop, substitute, error; did you mean 'drop'? {SWEEP}",
    ),
    ("sweep", f"SPACE: missing {SWEEP}"),
    ("sweep S T", f"T: unexpected; the command takes no more arguments {SWEEP}"),
    (
        "sumary RUN",
        f"sumary: no such command; did you mean 'summary'?; there are {COMMANDS} "
        "(python -m tuneapp --help)",
    ),
    ("--verson", "--verson: no such option; did you mean '--version'? (python -m tuneapp --help)"),
]


@pytest.mark.parametrize(("words", "said"), USAGE, ids=lambda text: text[:30])
def test_a_wrong_command_line_is_told_in_one_line_with_what_was_typed(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    read = capsys.readouterr()
    assert (read.out, read.err) == ("", f"tuneapp: error: {said}\n")


def test_the_help_cuts_no_summary_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "Resume RUN where it stopped." in text
    assert "..." not in text.replace("[ARGS]...", "")
    assert main([]) == 2  # nothing was asked
    assert capsys.readouterr().out == text


def test_the_versions_are_told_without_importing_what_they_are_of() -> None:
    code = (
        "import sys; from tuneapp.cli import main; code = main(['--version']); "
        "print(code, {'torch', 'ray'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 set()"
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(told) == ["tuneapp", "Python", "torch", "ray"]
    assert told["torch"] == importlib.metadata.version("torch")


REFUSED_EARLY = {
    "broken branch": ("epochs=4", "epochs=0", [], "epochs must be a whole number >= 1"),
    "recipe": ('"freeze_depth": 5, ', "", [], "number 1: has no value for 'freeze_depth'"),
    "misspelled": ("FIRST_TRIALS", "FIRST_TRIAL", [], "did you mean FIRST_TRIALS?"),
    "name": ("", "", ["--name", "a/b"], "--name 'a/b'"),
    "runs": ("", "", ["--runs-dir", "/proc/nope"], "--runs-dir /proc/nope: cannot make a run"),
}


@pytest.mark.parametrize("command", ["sweep", "train"])
@pytest.mark.parametrize(("old", "new", "words", "said"), REFUSED_EARLY.values(), ids=REFUSED_EARLY)
def test_bad_input_is_refused_before_torch_and_ray_are_imported(
    command: str, old: str, new: str, words: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "space.py").write_text(SMALL_SPACE.replace(old, new) if old else SMALL_SPACE)
    code = (
        f"import sys; from tuneapp.cli import main; print(main({[command, 'space.py', *words]!r}), "
        "{'torch', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "2 set()"
    assert said in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["space.py"]


@pytest.mark.parametrize("words", [["verify-resume"], ["lr-range"]])
def test_the_other_commands_check_a_space_first_too(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.py").write_text(SMALL_SPACE.replace('"freeze_depth": 5, ', ""))
    assert main([*words, str(tmp_path / "space.py")]) == 2
    assert "FIRST_TRIALS, number 1: has no value for" in capsys.readouterr().err


def test_show_checks_the_recipes_and_says_what_it_does_not_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "space.py"
    file.write_text(SMALL_SPACE)
    assert main(["show", str(file)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not checked here: the model, its stages and weights")
    file.write_text(SMALL_SPACE.replace('"lr_ratio": 1.0', '"lr_ratio": 7.0'))
    assert main(["show", str(file)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"tuneapp: error: {file}: FIRST_TRIALS, number 1: lr_ratio=7.0: allowed is 0.1 to 1, log\n"
    )


def test_data_of_a_space_are_named_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = "from tuneapp.config import Data\nDATA = Data(source='no/photos')\n"
    Path("space.py").write_text(SMALL_SPACE + data)
    assert main(["train", "space.py"]) == 2
    error = capsys.readouterr().err
    assert f"DATA in space.py: source {tmp_path / 'no/photos'}: no such folder" in error
    assert main(["train", "space.py", "--data", "other"]) == 2
    assert f"error: --data {tmp_path / 'other'}: no such folder" in capsys.readouterr().err


def test_a_branch_that_cannot_be_is_refused_before_any_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = SMALL_SPACE.replace('"freeze_depth", 4, 5', '"freeze_depth", 4, 6')
    (tmp_path / "deep.py").write_text(text.replace('"resnet18"', '"resnet81"'))
    assert main(["sweep", "deep.py"]) == 2
    assert "model 'resnet81' is unknown; did you mean 'resnet18'?" in capsys.readouterr().err
    (tmp_path / "deep.py").write_text(text)
    assert main(["sweep", "deep.py"]) == 2
    assert "freeze_depth 6 is too deep for resnet18: 0 to 5" in capsys.readouterr().err


def test_train_sets_values_and_reports_what_it_applied(
    photos: Path,
    small_space: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(small_space), "--data", str(photos), "--epochs", "2"]
    values = ["--set", "optimizer=sgd", "--set", "sgd.lr=0.02"]
    assert main([*words, *values]) == 0
    out = capsys.readouterr().out
    assert "runs/small-train-001" in out
    assert "python -m tuneapp summary runs/small-train-001 --applied" in out
    assert main(["summary", "runs/small-train-001", "--applied"]) == 0
    shown = " ".join(capsys.readouterr().out.split("applied, read back")[1].split())
    for value in ("t0001", "stages head=0.02 ", "optimizer SGD", "batch size 8", "device cpu"):
        assert value in shown
    events = read_ledger(tmp_path / "runs/small-train-001")
    (applied,) = [e["applied"] for e in events if e["event"] == "applied"]
    assert applied["lr"] == {"head": 0.02}
    assert applied["trainable_parameters"] == 512 * 3 + 3
    assert applied["batch_size"] == 8


@pytest.mark.slow  # the tests of verify-resume kill a training, too
@pytest.mark.timeout(120)
def test_a_killed_training_goes_on_to_the_same_numbers(
    tuneapp: Start, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough to be killed in the middle.
    text = SMALL_SPACE.replace("epochs=4", "epochs=6")
    (tmp_path / "long.py").write_text(text)
    words = ["train", "long.py", "--data", photos, "--set", "freeze_depth=4"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the other process: as many as this one has
    assert main([*map(str, words), "--name", "whole"]) == 0

    killed = tuneapp(*words, "--name", "killed", cwd=tmp_path)
    run = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline:
        if (run / "trials/t0001/checkpoints/manifest.json").exists():
            break
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    done = len(rows_of(run, "t0001"))
    assert done < 6, "the kill came too late to prove anything"
    again = tuneapp("resume", run, cwd=tmp_path)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert rows_of(run, "t0001") == rows_of(tmp_path / "runs" / "whole", "t0001")


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_train_from_a_run_gives_the_trial_s_numbers_again(
    finished_sweep: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = finished_sweep["run"]
    best = re.search(r"best      (t\d{4})", finished_sweep["out"])
    assert best is not None
    for number, (asked, trial) in enumerate((("best", best[1]), ("t0002", "t0002")), start=1):
        assert main(["train", "--from", str(run), "--trial", asked]) == 0
        again = rows_of(tmp_path / "runs" / f"small-train-{number:03d}", "t0001")
        theirs = rows_of(run, trial)
        assert again[: len(theirs)] == theirs
    capsys.readouterr()
    assert main(["train", "--from", str(run), "--trial", "t0099"]) == 2
    assert "--trial t0099" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_summary_shows_the_trials_and_what_was_applied(
    finished_sweep: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summary", str(finished_sweep["run"]), "--applied"]) == 0
    out = capsys.readouterr().out
    ranked, applied = out.split("applied, read back")
    assert len(re.findall(r"^t\d{4} ", ranked, flags=re.MULTILINE)) == 8
    # What differs stands in a trial's row, what does not below the table. Both, best first.
    rows = re.findall(r"^(t\d{4}) .*head=0\.\d+ ", applied, flags=re.MULTILINE)
    assert rows == re.findall(r"^(t\d{4}) ", ranked, flags=re.MULTILINE)
    assert re.search(r"^all       .*schedule CosineAnnealingLR.* device cpu", applied, re.MULTILINE)
    assert (finished_sweep["run"] / "trials.csv").exists()


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_taken_name_and_a_run_in_use_are_refused(
    finished_sweep: dict[str, Any],
    small_space: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finished_sweep["run"]
    monkeypatch.chdir(run.parent.parent)
    before = (run / "ledger.jsonl").read_bytes()
    words = ["train", str(small_space), "--data", str(photos), "--name", "done"]
    assert main(words) == 2
    assert "python -m tuneapp resume" in capsys.readouterr().err
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from tuneapp.rundir import RunDir; "
            "lock = RunDir(Path(sys.argv[1])).lock(); print('held', flush=True); time.sleep(60)",
            str(run),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert main(["resume", str(run)]) == 75
    assert "is in use" in capsys.readouterr().err
    holder.kill()
    holder.communicate()
    assert (run / "ledger.jsonl").read_bytes() == before


@pytest.mark.timeout(120)
def test_train_from_takes_over_the_split_though_photos_have_come_since(
    make_photos: Callable[..., Path],
    small_space: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_photos(tmp_path / "photos")
    words = ["train", str(small_space), "--data", str(folder), "--epochs", "1"]
    assert main([*words, "--name", "first"]) == 0
    for image in list(folder.rglob("*.png")):
        image.with_name(f"new-{image.name}").write_bytes(image.read_bytes())
    assert main(["train", "--from", "runs/first", "--name", "again"]) == 0
    first, again = tmp_path / "runs/first", tmp_path / "runs/again"
    assert (again / "split.csv").read_bytes() == (first / "split.csv").read_bytes()
    assert rows_of(again, "t0001") == rows_of(first, "t0001")
    capsys.readouterr()
    assert main(["train", "--from", "runs/first", "--metric", "val/loss", "--name", "other"]) == 0
    assert "best      t0001: val/loss" in capsys.readouterr().out
    assert (tmp_path / "runs/other/split.csv").read_bytes() != (first / "split.csv").read_bytes()
    # A trial that was taken from a run as it is says so; one with a value that was set does not.
    (proposed,) = [e for e in read_ledger(again) if e["event"] == "proposed"]
    assert proposed["origin"] == "first/t0001"
    words_set = ["--set", "lr_ratio=0.5", "--name", "set", "--epochs", "1"]
    assert main(["train", "--from", "runs/first", *words_set]) == 0
    (proposed,) = [e for e in read_ledger(tmp_path / "runs/set") if e["event"] == "proposed"]
    assert proposed["origin"] == "set"
    # What cannot have an effect is refused, not ignored.
    assert main([*words, "--trial", "t0001"]) == 2
    assert main(["resume", "runs/first", "--dashboard"]) == 2
    assert "without Ray" in capsys.readouterr().err


def test_the_best_epoch_of_a_run_is_a_model_to_use(
    photos: Path, small_space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(small_space), "--data", str(photos), "--name", "one"]) == 0
    rows = rows_of(tmp_path / "runs/one", "t0001")
    model = load_model(tmp_path / "runs/one", "t0001")
    assert not model.training
    run, record = open_run(tmp_path / "runs/one")
    images = read_run_images(run, record)
    preprocessing = preprocessing_of(config_of("resnet18", image_size=32), None)
    store = open_store(images, preprocessing)
    batches = Batches(
        store,
        InOrder(store, "val"),
        view=evaluation_view(preprocessing),
        preprocessing=preprocessing,
        batch_size=8,
        device=torch.device("cpu"),
    )
    scores = evaluate(model, batches.epoch(1), Precision("cpu", torch.float32))
    right = (scores.logits.argmax(1) == scores.targets).sum().item()
    assert right / len(scores.targets) == max(r["val/accuracy"] for r in rows)
