"""What commands show: tables that fit, lines that a reader understands without the source."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tuneapp import terminal
from tuneapp.anatomy import Anatomy, StageAnatomy, read_anatomy
from tuneapp.applied_table import applied_table
from tuneapp.config import RunSettings
from tuneapp.display import anatomy_notes, anatomy_table, fixed_line, space_table
from tuneapp.records import TrialRecord
from tuneapp.rundir import RunDir, RunRecord
from tuneapp.space import Parameter, SearchSpace
from tuneapp.summary import Summary

ROOT = Path(__file__).parent.parent


def shown(table: Table, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def trial(name: str, **applied: object) -> TrialRecord:
    return TrialRecord(name, "search", {}, 1, applied=applied)


# --- Spaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", sorted(p.name for p in (ROOT / "search_spaces").glob("*.py")))
def test_names_of_parameters_are_whole_at_80_columns(space: str) -> None:
    parameters = SearchSpace.read(ROOT / "search_spaces" / space).parameters()
    lines = shown(space_table(parameters))
    assert {p.name for p in parameters} <= {line.split(" ")[0] for line in lines}
    assert max(map(len, lines)) <= 80


def test_a_parameter_stands_below_the_one_that_it_depends_on() -> None:
    given = [
        ("model", ""),
        ("a.depth", "model = a"),
        ("lr", ""),
        ("b.kind", "model = b"),
        ("b.kind.x", "model = b and b.kind = x"),
        ("late", "model = a | b"),
    ]
    lines = shown(space_table([Parameter(name, "0 to 1", when) for name, when in given]))
    names = [line.split(" ")[0] for line in lines[1:]]
    assert names == ["model", "a.depth", "b.kind", "b.kind.x", "late", "lr"]


def test_what_no_trial_changes_is_one_line(tmp_path: Path) -> None:
    text = """
from tuneapp.config import *

def search_space(trial):
    if trial.suggest_categorical("schedule", ["cosine", "constant"]) == "cosine":
        schedule = Cosine(warmup_fraction=0.1)
    else:
        schedule = Constant()
    return TrialConfig(
        model="resnet18", epochs=5, mixup_alpha=0.2, augment="light", schedule=schedule,
        freeze_depth=trial.suggest_int("freeze_depth", 0, 2),
        optimizer=Sgd(lr=trial.suggest_float("lr", 0.1, 1), momentum=0.5),
        loss=Focal(gamma=3.0),
    )
"""
    line = fixed_line(SearchSpace(text, tmp_path / "x.py"))
    assert line == (
        "fixed     model=resnet18 weights=auto epochs=5 batch_size=32 "
        "optimizer=Sgd(lr=..., momentum=0.5) loss=Focal(gamma=3) mixup_alpha=0.2"
    )


def test_a_model_that_is_searched_is_not_fixed() -> None:
    line = fixed_line(SearchSpace.read(ROOT / "search_spaces" / "convnet.py"))
    assert "model=" not in line
    assert "epochs=" in line


# --- Networks -------------------------------------------------------------------------------------


def test_few_flops_are_not_shown_as_none() -> None:
    stages = (
        StageAnatomy("stem", (4,), 10, 20, 2_000_000_000),
        StageAnatomy("head", (2,), 10, 10, 1_280),
        StageAnatomy("nothing", (2,), 0, 0, 0),
    )
    lines = shown(anatomy_table(Anatomy("x", 32, stages)))
    assert [line.split()[-1] for line in lines[1:4]] == ["2.000", "1.28e-06", "0.000"]
    lines = shown(anatomy_table(Anatomy("x", 32, stages[1:])))
    assert lines[0].endswith("kFLOPs")
    assert lines[1].split()[-1] == "1.3"


def test_a_network_with_auxiliary_classifiers_is_said_to_be_shown_without_them() -> None:
    assert "auxiliary" in " ".join(anatomy_notes(read_anatomy("googlenet")))
    notes = anatomy_notes(read_anatomy("resnet18"))
    assert "auxiliary" not in " ".join(notes)
    assert "freeze_depth=k freezes the first k" in notes[0]
    assert max(map(len, notes)) <= 88


# --- What was applied -----------------------------------------------------------------------------

SGD = {"optimizer": "SGD", "options": {"momentum": 0.9, "nesterov": False}}
ADAMW = {"optimizer": "AdamW", "options": {"betas": [0.9, 0.999]}}
REST = {"frozen_held": 0, "frozen_training": [], "batch_size": 32, "schedule": "StepLR"}


def test_what_differs_has_columns_and_what_is_shared_is_said_once() -> None:
    trials = [
        trial("t0002", **SGD, **REST, weight_decay=0.1, lr={"a": 0.1, "head": 0.1}),
        trial("t0001", **ADAMW, **REST, weight_decay=0.1, lr={"head": 0.2}),
        trial("t0003", **SGD, **REST, weight_decay=0.1, lr={"head": 0.3}),
        trial("t0004"),  # no epoch yet
    ]
    found = applied_table(trials, 80)
    lines = shown(found.table)
    assert [line.split() for line in lines] == [
        ["trial", "lr", "of", "stages", "optimizer"],
        ["t0002", "a..head=0.1", "SGD"],
        ["t0001", "head=0.2", "AdamW,", "betas", "0.9", "0.999"],
        ["t0003", "head=0.3", "SGD"],
    ]
    assert found.shared == [
        ("all", "weight decay 0.1; schedule StepLR; batch size 32"),
        ("SGD", "momentum 0.9, nesterov no"),
    ]
    assert found.num_trials == 3


def test_numbers_of_parameters_have_separators_and_what_is_amiss_is_not_hidden() -> None:
    first = {"lr": {"head": 0.1}, "trainable_parameters": 11_181_642, "frozen_held": 0}
    found = applied_table([trial("t1", **first), trial("t2", **first | {"frozen_held": 7})], 80)
    assert found.shared == [("all", "11,181,642 parameters trainable")]
    assert shown(found.table)[2].split() == ["t2", "head=0.1", "frozen", "held", "7"]


def test_values_of_names_that_are_not_known_yet_are_shown() -> None:
    first = {"lr": {"head": 0.1}, "clip_norm": 1.0, "views": {"flip": True}, "loss": "focal"}
    second = first | {"views": {"flip": False, "mix": {"p": [1, 2]}}, "mixup": None}
    found = applied_table([trial("t1", **first), trial("t2", **second)], 200)
    assert found.shared == [("all", "loss focal; clip norm 1")]
    assert shown(found.table, 200)[1:] == [
        "t1     head=0.1      views flip yes",
        "t2     head=0.1      views flip no, views mix p=1 2",
    ]


def test_a_single_trial_has_a_line_for_each_group_of_values() -> None:
    found = applied_table([trial("t0001", **SGD, lr={"head": 0.1}, warmup_steps=3)], 80)
    assert [line.split(maxsplit=1) for line in shown(found.table)] == [
        ["trial", "t0001"],
        ["lr", "of stages  head=0.1"],
        ["optimizer", "SGD, momentum 0.9, nesterov no"],
        ["schedule", "warm-up steps 3"],
    ]
    assert applied_table([trial("t0001")], 80).num_trials == 0


@pytest.mark.parametrize("width", [80, 120])
def test_the_applied_table_fits_and_breaks_no_word(width: int) -> None:
    stages = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    rates = {name: 0.000116 * 1.5**i for i, name in enumerate(stages)}
    trials = [
        trial(
            f"t{i:04d}",
            lr=rates,
            optimizer=("SGD", "AdamW")[i % 2],
            weight_decay=0.000123 * (i + 1),
            schedule=("CosineAnnealingLR", "StepLR")[i % 2],
            warmup_steps=17 + i,
            trainable_parameters=11_181_642 - i,
            frozen_parameters=11_176_512 + i,
        )
        for i in range(4)
    ]
    lines = shown(applied_table(trials, width).table, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for word in ("CosineAnnealingLR", "stem=0.000116", "11,176,512"):
        assert word in text


# --- Terminals and pipes --------------------------------------------------------------------------


def a_table() -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("name")
    table.add_row("x " * 100)
    table.add_row("y")
    return table


def test_a_pipe_gets_whole_rows_without_blanks_at_their_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS")
    terminal.out.print(a_table())
    assert capsys.readouterr().out == f"name\n{('x ' * 100).strip()}\ny\n"


def test_columns_fold_a_table_in_a_pipe_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    terminal.out.print(a_table())
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name", *[("x " * 25).strip()] * 4, "y"]


def test_a_warning_is_wrapped_on_a_terminal_and_one_line_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(["weights"] * 20)
    terminal.warn(words)
    assert capsys.readouterr().err == f"warning   {words}\n"
    screen = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    monkeypatch.setattr(terminal, "err", screen)
    terminal.warn(words)
    lines = screen.file.getvalue().splitlines()
    assert lines[0].startswith("warning   weights")
    assert all(line.startswith(" " * 10 + "weights") for line in lines[1:])
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines).split()) == f"warning {words}"


@pytest.mark.parametrize(("with_warnings", "times"), [(True, 1), (False, 0)])
def test_a_command_that_said_its_warnings_when_it_began_does_not_repeat_them(
    with_warnings: bool, times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord(
        kind="sweep",
        space_paths=("x.py",),
        settings=RunSettings(),
        image_root=None,
        classes=("a", "b"),
        weights={},
        warnings=("random weights",),
    )
    read = Summary(RunDir(tmp_path), record, (), 1, num_val=10)
    terminal.print_result(read, with_warnings=with_warnings)
    assert capsys.readouterr().err.count("random weights") == times


def test_a_closed_stream_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    terminal.say("nobody reads this")
