"""Faults of the search space: rows 14 to 20 of the fault catalogue."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.refusal import interrupt_after, numbers, refused, write_space
from tests.test_data_runs import rows_of
from tuneapp.cli import main
from tuneapp.ledger import Ledger
from tuneapp.space import SearchSpace

RUN = Path("runs/x")
HEAD = "from tuneapp.config import *\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.dont_write_bytecode", True)


def body(*lines: str, config: str = "") -> str:
    """Return a space whose function begins with these lines, the first of which is line 3."""
    indented = "".join(f"    {line}\n" for line in lines)
    return (
        f"{HEAD}def search_space(trial):\n{indented}    return TrialConfig(**{{'model': 'resnet18',"
        f" 'weights': None, 'image_size': 32, 'optimizer': Sgd(lr=0.1), {config}}})\n"
    )


def refused_space(text: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> str:
    Path("space.py").write_text(text)
    return refused(capsys, "sweep", "space.py", "--data", photos)


# --- 14, 15: files that are no search space -------------------------------------------------------

# A file that runs for ever is not among them: no limit of time is meant for reading a space.
NO_SPACES = {
    "syntax": (f"{HEAD}x = (\n", "space.py:2: SyntaxError: "),
    "null byte": ("x = 1\0\n", "space.py: SyntaxError: "),
    "import": (f"{HEAD}import not_there\n", "space.py:2: ModuleNotFoundError: "),
    "import of a name": (f"{HEAD}from optuna import Trail\n", "space.py:2: ImportError: "),
    "exception": (f"{HEAD}1 / 0\n", "space.py:2: ZeroDivisionError: "),
    "exception of lines": (f"{HEAD}raise ValueError('a\\nb')\n", "space.py:2: ValueError: a b"),
    "for ever deeper": (f"{HEAD}def f(): f()\nf()\n", "space.py:2: RecursionError: "),
    "exit": (f"{HEAD}import sys\nsys.exit(0)\n", "space.py:3: it ends the program"),
    "exit without a word": (f"{HEAD}raise SystemExit\n", "space.py:2: it ends the program"),
    "exit of the function": (body("import sys", "sys.exit()"), "space.py:4: it ends the program"),
    "exit of what it imports": (f"{HEAD}import a_script\n", "space.py:2: it ends the program"),
    "exit of a network": (
        body(config="'model': 'a_script:build'"),
        "model 'a_script:build': cannot import a_script: SystemExit: 7",
    ),
}


@pytest.mark.parametrize(("text", "told"), NO_SPACES.values(), ids=NO_SPACES)
def test_fault_14_a_file_that_does_not_run_through_is_refused_with_its_line(
    text: str, told: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a_script.py").write_text("raise SystemExit(7)\n")
    assert told in refused_space(text, photos, capsys)


def test_fault_14_a_missing_file_and_a_folder_are_refused_by_name(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("space.py").write_text(body())
    error = refused(capsys, "sweep", "spce.py", "--data", photos)
    assert "spce.py: no such search-space file; did you mean 'space.py'?" in error
    Path("folder.py").mkdir()
    error = refused(capsys, "sweep", "folder.py", "--data", photos)
    assert "folder.py: is a folder; give a file in it" in error


def test_fault_14_what_a_file_prints_stays_out_of_the_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("space.py").write_text("print('on reading')\n" + body("print('on asking')"))
    assert main(["show", "space.py"]) == 0
    shown = capsys.readouterr()
    assert "on " not in shown.out
    assert "on reading" in shown.err
    assert "on asking" in shown.err


WRONG_SPACES = {
    "no function": (f"{HEAD}def serch_space(trial): pass\n", ["no function `search_space`"]),
    "no callable": (f"{HEAD}search_space = 3\n", ["no function `search_space`"]),
    "a dict": (
        "def search_space(trial):\n    return {'model': 'resnet18'}\n",
        ["search_space returned dict, not a TrialConfig"],
    ),
    "nothing": ("def search_space(trial):\n    pass\n", ["returned None"]),
    "unknown field": (
        body(config="'learning_rte': 0.1"),
        ["TrialConfig has no learning_rte", "it has model, "],
    ),
    "near field": (body(config="'batch_sise': 8"), ["no batch_sise", "did you mean 'batch_size'?"]),
    "near field of a choice": (
        body(config="'optimizer': AdamW(lr=1, weight_decy=0)"),
        ["AdamW has no weight_decy", "did you mean 'weight_decay'?"],
    ),
    "wrong type": (body(config="'epochs': 'many'"), ["epochs must be a whole number", "'many'"]),
    "unknown recipe": (
        f"FIRST_TRIALS = [{{'learning_rte': 0.1}}]\n{body('trial.suggest_float(chr(97), 0, 1)')}",
        ["FIRST_TRIALS, number 1: 'learning_rte' is not a parameter; there are a"],
    ),
    "recipes of another kind": (f"FIRST_TRIALS = 3\n{body()}", ["must be a list of dicts"]),
    "data of another kind": (f"{body()}DATA = 'photos/'\n", ["DATA must be a Data"]),
}


@pytest.mark.parametrize(("text", "told"), WRONG_SPACES.values(), ids=WRONG_SPACES)
def test_fault_15_a_wrong_kind_or_a_name_that_is_not_known_is_refused_with_those_that_are(
    text: str, told: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused_space(text, photos, capsys)
    for words in told:
        assert words in error


# --- 16, 17: dimensions ---------------------------------------------------------------------------

DIMENSIONS = {
    "float('x', 1.0, 0.1)": "the low end is above the high end",
    "int('x', 5, 4)": "the low end is above the high end",
    "float('x', 0.0, 1.0, log=True)": "the low end must be above 0",
    "float('x', -1.0, 1.0, log=True)": "the low end must be above 0",
    "int('x', 0, 4, log=True)": "the low end must be above 0",
    "int('x', 1, 8, step=2)": "step=2 does not divide the range",
    "float('x', 0, 1, step=0.3)": "step=0.3 does not divide the range",
    "int('x', 1, 8, step=0)": "step=0 must be above 0",
    "float('x', 0, 1, step=-0.1)": "step=-0.1 must be above 0",
    "float('x', 0.1, 1, step=0.1, log=True)": "cannot be combined with log=True",
    "float('x', float('nan'), 1)": "nan is not a finite number",
    "float('x', 0, float('nan'))": "nan is not a finite number",
    "float('x', 0, float('inf'))": "inf is not a finite number",
    "float('x', 0, 1, step=float('nan'))": "nan is not a finite number",
    "float('x', '0', 1)": "'0' is not a finite number",
    "float('x', None, 1)": "None is not a finite number",
    "int('x', False, True)": "False is not a whole number",
    "float('x', 0, True)": "True is not a finite number",
    "int('x', 0.5, 4)": "0.5 is not a whole number",
    "int('x', 0, 10 ** 400)": "is not a whole number",
    "categorical('x', [])": "choices must be a list that is not empty",
    "categorical('x', 'abc')": "choices must be a list that is not empty",
    "categorical('x', {'a', 'b'})": "choices must be a list that is not empty",
    "categorical('x', ['a', 'b', 'a'])": "choices 'a' and 'a' are equal",
    "categorical('x', [1, True])": "choices 1 and True are equal",
    "categorical('x', [[1], [2]])": "choice [1] is not a string, finite number",
    "categorical('x', [lambda: 1])": "<lambda>",
    "categorical('x', [float('nan'), 1])": "choice nan is not a string, finite number",
}


@pytest.mark.parametrize(("asked", "told"), DIMENSIONS.items(), ids=DIMENSIONS)
def test_fault_16_a_dimension_that_cannot_be_searched_is_refused_by_name(
    asked: str, told: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused_space(body(f"trial.suggest_{asked}"), photos, capsys)
    assert "space.py:3: parameter 'x'" in error
    assert told in error


@pytest.mark.parametrize("name", ["''", "3", "None"])
def test_fault_16_a_dimension_without_a_name_is_refused(
    name: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused_space(body(f"trial.suggest_float({name}, 0, 1)"), photos, capsys)
    assert f"space.py:3: a parameter's name must be a string, got {name}" in error


def test_fault_16_the_ends_that_are_allowed_are_searched() -> None:
    # The nearest neighbours of what is refused.
    space = SearchSpace(
        body(
            "trial.suggest_float('a', 1.0, 1.0)",
            "trial.suggest_int('b', 1, 4, log=True)",
            "trial.suggest_int('c', 1, 7, step=2)",
            "trial.suggest_float('d', 0, 0.9, step=0.3)",
            "trial.suggest_categorical('e', ['1', 1, None, 0.5])",
            "trial.suggest_categorical('f', {'a': 1, 'b': 2})",
            "trial.suggest_categorical('g', ('a',))",
        ),
        Path("space.py"),
    )
    allowed = {p.name: p.allowed for p in space.parameters()}
    assert (allowed["c"], allowed["d"], allowed["f"]) == ("1 to 7, whole", "0 to 0.9", "a | b")


# Only both ends of each range are tried (docs/design.md, README), and every single choice.
UNFIT = {
    "'optimizer': AdamW(lr=trial.suggest_float('lr', 0.0, 0.1))": "lr must be a number > 0, got 0",
    "'lr_ratio': trial.suggest_float('r', 0.5, 1.5)": "lr_ratio must be a number in (0, 1]",
    "'freeze_depth': trial.suggest_int('d', 0, 9)": "freeze_depth 9 is too deep for resnet18",
    "'schedule': Cosine(warmup_fraction=trial.suggest_float('w', 0, 1))": "got 1.0",
    "'schedule': trial.suggest_categorical('s', ['cosin'])": "did you mean Cosine()?",
    "'model': trial.suggest_categorical('m', ['resnet18', 'resnet81'])": "did you mean 'resnet18'",
    "'epochs': trial.suggest_int('e', 0, 3)": "epochs must be a whole number >= 1, got 0",
    "'batch_size': trial.suggest_categorical('b', [8, 0])": "batch_size must be",
    "'image_size': trial.suggest_categorical('i', [32, 8])": "or a whole number >= 16, got 8",
    "'model': trial.suggest_categorical('m', ['resnet18', 'alexnet'])": "alexnet cannot take",
}


@pytest.mark.parametrize(("config", "told"), UNFIT.items(), ids=UNFIT)
def test_fault_17_a_value_that_training_cannot_use_is_refused_wherever_the_space_has_it(
    config: str, told: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused_space(body(config=config), photos, capsys)


# --- 18 to 20: between reading and reporting ------------------------------------------------------


EDITS: dict[str, Callable[[Path], object]] = {
    "other range": lambda f: f.write_text(f.read_text().replace("1e-4, 1e-1", "0.5, 0.9")),
    "fewer epochs": lambda f: f.write_text(f.read_text().replace("epochs=2", "epochs=1")),
    "no space": lambda f: f.write_text("raise SystemExit\n"),
    "gone": Path.unlink,
}


def test_fault_18_a_run_goes_on_with_its_own_copy_of_a_space_that_was_edited(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The row wants exit code 2 for an edited file; documented is that the copy counts.
    words = ["train", write_space(), "--data", str(photos)]
    assert main([*words, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert main([*words, "--name", "x"]) == 130
    text = (RUN / "space.py").read_text()
    assert text == Path("space.py").read_text()
    for what, edit in EDITS.items():
        run = Path(shutil.copytree(RUN, f"runs/{what}"))
        Path("space.py").write_text(text)
        edit(Path("space.py"))
        assert main(["resume", str(run)]) == 0, what
        assert (run / "space.py").read_text() == text, what
        assert numbers(rows_of(run)) == numbers(rows_of(Path("runs/whole"))), what


@pytest.mark.parametrize(
    "lines",
    [
        ["import random", "HIGH = random.uniform(1, 2)"],
        ["import time", "HIGH = 1 + time.time_ns() % 10**9 / 10**9"],
        ["import uuid", "HIGH = 1 + uuid.uuid4().int / 2**128"],
    ],
    ids=["random", "clock", "uuid"],
)
def test_fault_18_a_file_that_means_something_else_each_time_is_refused(
    lines: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join([*lines, body("trial.suggest_float('x', 0, HIGH)")])
    error = refused_space(text, photos, capsys)
    assert "parameter 'x' is 0 to 1." in error
    assert "when it is read again" in error


def test_fault_18_a_function_that_means_something_else_each_time_is_refused(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = body("import random", "trial.suggest_float('x', 0, random.uniform(1, 2))")
    assert "parameter 'x' is 0 to 1." in refused_space(text, photos, capsys)


def test_fault_19_many_dimensions_and_long_choices_make_short_names_and_whole_tables(
    photos: Path,
) -> None:
    long = ["a" * 4096, "b" * 4096]
    names = [f"branch.number{i:03d}" for i in range(200)]
    first = {"lr": 0.01, "long": long[1], **{name: i / 200 for i, name in enumerate(names)}}
    more = (
        f"FIRST_TRIALS = [{first!r}]\n"
        "def many(trial):\n"
        f"    for name in {names!r}:\n"
        "        trial.suggest_float(name, 0.0, 1.0)\n"
        f"    return len(trial.suggest_categorical('long', {long!r}))\n"
    )
    space = write_space("seed=many(trial)", more)
    assert main(["train", space, "--data", str(photos), "--epochs", "1", "--name", "x"]) == 0
    assert [p.name for p in (RUN / "trials").iterdir()] == ["t0001"]
    assert max(len(path.name) for path in RUN.rglob("*")) < 80
    assert main(["summary", str(RUN)]) == 0
    with (RUN / "trials.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    params = {name: value for name, value in row.items() if name.startswith("params/")}
    assert len(params) == 202
    assert params["params/long"] == long[1]
    assert [float(params[f"params/{name}"]) for name in names] == [i / 200 for i in range(200)]


def test_fault_20_a_parameter_that_was_not_asked_for_is_an_empty_cell(photos: Path) -> None:
    more = (
        "def branch(trial):\n"
        "    if trial.suggest_categorical('kind', ['a', 'b']) == 'a':\n"
        "        return trial.suggest_int('a.n', 1, 3)\n"
        "    return trial.suggest_int('b.n', 1, 3)\n"
    )
    more += "FIRST_TRIALS = []\n"
    space = write_space("seed=branch(trial)", more)
    runs = {"a": "--set=a.n=2", "b": "--set=b.n=3"}
    for kind, value in runs.items():
        words = ["--data", str(photos), "--epochs", "1", "--name", kind]
        assert main(["train", space, f"--set=kind={kind}", value, "--set=lr=0.01", *words]) == 0
    # One table of both: the second run's trial, told to the first one's ledger.
    shutil.copytree("runs/a", RUN)
    told = [e for e in Ledger(Path("runs/b/ledger.jsonl")).events if e.get("trial") == "t0001"]
    with Ledger(RUN / "ledger.jsonl") as ledger:
        for event in told:
            fields = {k: v for k, v in event.items() if k not in ("seq", "crc", "event")}
            ledger.append(event["event"], **{**fields, "trial": "t0002"})
    assert main(["summary", str(RUN)]) == 0
    with (RUN / "trials.csv").open(newline="") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    cells = ("params/kind", "params/a.n", "params/b.n")
    assert [rows["t0001"][name] for name in cells] == ["a", "2.0", ""]
    assert [rows["t0002"][name] for name in cells] == ["b", "", "3.0"]
