import pickle
import re

import pytest

from tuneapp import errors
from tuneapp.errors import (
    AppliedValueError,
    Diverged,
    TuneappError,
    did_you_mean,
    first_line,
    nearest,
    say_cause,
)

DEFINED = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    parent_of = {}
    last_outer = ""
    for line in errors.__doc__.splitlines():
        found = re.search(r"[├└]── (\w+)", line)
        if found is None:
            continue
        outer = line.index(found.group()) == 4  # directly under the root
        parent_of[found.group(1)] = "TuneappError" if outer else last_outer
        last_outer = found.group(1) if outer else last_outer
    real = {name: kind.__bases__[0].__name__ for name, kind in DEFINED.items()}
    assert real.pop("TuneappError") == "Exception"
    assert parent_of == real


def test_an_exit_code_is_the_one_that_the_docstring_names():
    named = dict(re.findall(r"── (\w+) .*\(exit code (\d+)\)", errors.__doc__))
    assert len(named) == 3
    for name, kind in DEFINED.items():
        assert kind.exit_code == int(named.get(name, "2")), name


@pytest.mark.parametrize("name", ["ConfigError", "SpaceError"])
def test_wrong_values_are_value_errors_too(name):
    assert issubclass(DEFINED[name], ValueError)


@pytest.mark.parametrize("name", sorted(set(DEFINED) - {"Diverged"}))
def test_an_error_says_its_message_and_survives_pickling(name):
    # Ray carries errors between processes.
    error = pickle.loads(pickle.dumps(DEFINED[name]("what the user wrote")))  # noqa: S301
    assert type(error) is DEFINED[name]
    assert isinstance(error, TuneappError)
    assert str(error) == "what the user wrote"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Diverged(3, 17, float("inf")), "loss became inf in epoch 3, step 17"),
        (Diverged(1, 2, float("nan")), "loss became nan in epoch 1, step 2"),
    ],
)
def test_a_divergence_says_where_it_happened_and_survives_pickling(error, said):
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(copy) == str(error) == said
    assert (copy.epoch, copy.step) == (error.epoch, error.step)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("resnet81", "; did you mean 'resnet18'?"),
        ("sgd.rl", "; did you mean 'sgd.lr'?"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_only_a_near_miss_is_suggested(word, hint):
    known = ["resnet18", "sgd.lr", "adamw.lr"]
    assert did_you_mean(word, iter(known)) == hint
    near = nearest(word, iter(known))
    assert (f"; did you mean {near!r}?" if near else "") == hint


def test_without_known_words_nothing_is_suggested():
    assert did_you_mean("resnet18", []) == ""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n  late\nmore"), "late"),
        (ValueError("x" * 50), "x" * 10),
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (ValueError("101"), "ValueError: 101"),
        (OSError("-1.5"), "OSError: -1.5"),
        (KeyError(101), "KeyError: 101"),
        (KeyError("best"), "KeyError: 'best'"),
    ],
)
def test_the_first_line_of_an_error_says_something(error, said):
    assert first_line(error, limit=10) == said
    name = type(error).__name__
    always = said if said.startswith(name) else f"{name}: {said}"
    assert first_line(error, limit=10, named=True) == always


def test_a_syntax_error_names_its_own_place(tmp_path):
    file = tmp_path / "unfinished.py"
    file.write_text("value = (\n")
    try:
        compile(file.read_text(), str(file), "exec")
    except SyntaxError as error:
        assert say_cause(error) == "SyntaxError: '(' was never closed (unfinished.py, line 1)"


def test_a_cause_names_kind_first_line_and_the_innermost_place(tmp_path):
    file = tmp_path / "broken_module.py"
    file.write_text(
        "def outer():\n    inner()\n\n\ndef inner():\n    raise RuntimeError('first\\nsecond')\n"
    )
    names = {}
    exec(compile(file.read_text(), str(file), "exec"), names)  # noqa: S102 - a file with known lines
    try:
        names["outer"]()
    except RuntimeError as error:
        assert say_cause(error) == "RuntimeError: first (broken_module.py:6)"


@pytest.mark.parametrize(
    ("message", "said"), [("x" * 500, "x" * 200), ("\n\n  late\nmore", "late"), ("", "")]
)
def test_a_cause_is_one_short_line(message, said):
    try:
        raise AppliedValueError(message)
    except AppliedValueError as error:
        cause = say_cause(error)
    assert "\n" not in cause
    assert cause.startswith(f"AppliedValueError: {said} (test_errors.py:")
