import hashlib
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneapp import own
from tuneapp.errors import ConfigError, RunError


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what is offered and imported."""
    modules = set(sys.modules)
    monkeypatch.setattr(own, "_spaces", {})
    monkeypatch.setattr(own, "_texts", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    importlib.invalidate_caches()


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.py"
    file.write_text(text)
    importlib.invalidate_caches()
    return file


def space(**values: object) -> types.ModuleType:
    module = types.ModuleType("a_space")
    vars(module).update(values)
    return module


# --- Finding --------------------------------------------------------------------------------------


def test_an_object_is_found_by_its_import_path(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    write(tmp_path / "pack", "__init__", "")
    write(tmp_path / "pack", "inner", "def build(n):\n    return n + 1\n")
    own.import_from([str(tmp_path)])
    assert own.find_own("pack.inner:build", "model")(3) == 4
    assert own.find_own("math:sqrt", "loss")(4) == 2


def test_what_a_space_defines_is_found_in_the_text_that_was_executed(tmp_path: Path) -> None:
    write(tmp_path, "my_space", "def build(n):\n    return 'the file'\n")
    own.import_from([str(tmp_path)])
    assert own.find_own("my_space:build", "model")(3) == "the file"
    own.offer("my_space", space(build=lambda n: "the text"), "", Path("x.py"))
    assert own.find_own("my_space:build", "model")(3) == "the text"
    own.offer("my_space", space(build=lambda n: "a newer text"), "", Path("x.py"))
    assert own.find_own("my_space:build", "model")(3) == "a newer text"


def test_folders_come_after_everything_else_and_once(tmp_path: Path) -> None:
    write(tmp_path, "colorsys", "build = print\n")  # as a module of Python's is called
    before = [*sys.path]
    own.import_from([str(tmp_path), before[0]])
    own.import_from([str(tmp_path)])
    assert sys.path == [*before, str(tmp_path)]
    with pytest.raises(ConfigError, match="colorsys has no build"):
        own.find_own("colorsys:build", "model")


BROKEN = "import math\nvalue = 1 / 0\n"
MODULE = """
import os
from math import sqrt
_hidden = print
number, nothing = 3, None

def build_network(n):
    return n

class other_one:
    pass
"""


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        (
            "not_there:build",
            "model 'not_there:build': cannot import not_there: no module named 'not_there'; it "
            "must be importable from the working directory, or be beside the search space",
        ),
        (
            "not_there.inner:build",
            "model 'not_there.inner:build': cannot import not_there.inner: no module named "
            "'not_there'; it must be importable from the working directory, or be beside the "
            "search space",
        ),
        (
            "broken:build",
            "model 'broken:build': cannot import broken: ZeroDivisionError: division by zero "
            "(broken.py:2)",
        ),
        (
            "needy:build",
            "model 'needy:build': cannot import needy: ModuleNotFoundError: No module named "
            "'nothere' (needy.py:1)",
        ),
        (
            "unfinished:build",
            "model 'unfinished:build': cannot import unfinished: SyntaxError: '(' was never "
            "closed (unfinished.py, line 1)",
        ),
        (
            "mine:bild_network",
            "model 'mine:bild_network': mine has no bild_network; did you mean 'build_network'?; "
            "it has build_network, other_one",
        ),
        ("mine:zebra", "model 'mine:zebra': mine has no zebra; it has build_network, other_one"),
        ("mine:number", "model 'mine:number': mine.number is an int, not a function"),
        ("mine:nothing", "model 'mine:nothing': mine.nothing is a NoneType, not a function"),
        ("empty:build", "model 'empty:build': empty has no build; it defines no function"),
        (
            "many:zebra",
            "model 'many:zebra': many has no zebra; it has f0, f1, f2, f3, f4, f5, f6, f7, f8, f9 "
            "and 2 more",
        ),
        (
            "offered:buidl",
            "model 'offered:buidl': offered has no buidl; did you mean 'build'?; it has build",
        ),
    ],
)
def test_what_cannot_be_found_is_told_with_the_cause(
    tmp_path: Path, reference: str, told: str
) -> None:
    write(tmp_path, "broken", BROKEN)
    write(tmp_path, "mine", MODULE)
    write(tmp_path, "needy", "import nothere\n")
    write(tmp_path, "unfinished", "build = (\n")
    write(tmp_path, "empty", "number = 1\n")
    write(tmp_path, "many", "".join(f"def f{i}(n): return n\n" for i in range(12)))
    own.offer("offered", space(build=print), "", Path("x.py"))
    own.import_from([str(tmp_path)])
    with pytest.raises(ConfigError) as error:
        own.find_own(reference, "model")
    assert str(error.value) == told


def test_the_field_in_which_it_was_written_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^schedule 'not_there:f': cannot import"):
        own.find_own("not_there:f", "schedule")


# --- Whether it is still the same code ------------------------------------------------------------


def test_a_fingerprint_is_the_file_and_its_sha256(tmp_path: Path) -> None:
    file = write(tmp_path, "marked", "def build(n):\n    return n\n")
    own.import_from([str(tmp_path)])
    wanted = hashlib.sha256(b"def build(n):\n    return n\n").hexdigest()
    assert own.fingerprints(["marked:build"], []) == {str(file): wanted}
    file.write_text("def build(n):\n    return n + 1\n")
    assert own.fingerprints(["marked:build"], []) != {str(file): wanted}


def test_what_has_no_file_of_its_own_has_no_fingerprint(tmp_path: Path) -> None:
    write(tmp_path, "my_space", "build = print\n")
    own.offer("my_space", space(build=print), "", Path("x.py"))
    own.import_from([str(tmp_path)])
    # A space's text is kept with the run; a built-in module has no file.
    assert own.fingerprints(["my_space:build", "sys:exit"], []) == {}


def test_code_that_has_changed_or_gone_is_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path, "one", "a = 1\n"), write(tmp_path, "two", "b = 2\n")
    code = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in (one, two)}
    own.require_same_code({})
    own.require_same_code(code)
    two.write_text("b = 3\n")
    with pytest.raises(RunError, match=rf"^{two} has changed since this run began; restore it"):
        own.require_same_code(code)
    two.unlink()
    with pytest.raises(RunError, match=rf"^{two}, which this run uses, cannot be read: "):
        own.require_same_code(code)


def test_a_module_of_the_same_name_elsewhere_is_not_taken_for_the_runs_own(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    text = b"def build(n):\n    return n\n"
    for folder in (here, there):
        folder.mkdir()
        (folder / "namesake.py").write_bytes(text)
    own.import_from([str(there)])
    begun_with = {str(here / "namesake.py"): hashlib.sha256(text).hexdigest()}
    with pytest.raises(RunError, match=r"'namesake:build' is imported from .*namesake\.py now, "):
        own.require_same_code(begun_with, ["namesake:build"])
    own.require_same_code(own.fingerprints(["namesake:build"], []), ["namesake:build"])


# --- The text that counts -------------------------------------------------------------------------


def test_texts_that_are_read_meanwhile_are_not_what_a_name_stands_for_afterwards() -> None:
    new, old, other = (space(build=built) for built in (print, repr, len))
    own.offer("x", new, "new", Path("x.py"))
    with pytest.raises(RuntimeError), own.offers_kept():
        own.offer("x", old, "old", Path("x.py"))
        own.offer("y", other, "other", Path("y.py"))
        sys.modules[old.__name__] = old
        assert own.find_own("x:build", "model") is repr
        raise RuntimeError
    assert own.find_own("x:build", "model") is print
    assert own.offered_text("x:build") == ("new", Path("x.py"))
    assert sys.modules[new.__name__] is new
    assert own.find_own("y:build", "model") is len


TEXT = """
from math import pi, tau
from helpers import *

SCALE, OTHER = 1.0, 2.0
UNUSED = 3.0
TABLE = {}
TABLE["a"] = 4.0
TABLE.update(b=5.0)
if pi > 3:
    LIMIT = 6.0


def loss(logits, labels):
    '''About it.'''
    return Inner(logits).both() * TABLE["a"]


class Inner:
    def both(self):
        return SCALE * min(LIMIT, pi)


def search_space(trial):
    return trial.suggest_float("lr", 0.1, 0.7) * UNUSED * loss(tau, 8.0)
"""


def code_in(text: str, reference: str = "x:loss") -> str:
    own.offer("x", space(), text, Path("x.py"))
    code = own.offered_code(reference)
    assert code is not None
    return code


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("logits).both", "logits - 1).both"),
        ("SCALE * min", "SCALE + min"),
        ("OTHER = 1.0", "OTHER = 1.5"),
        ('"] = 4.0', '"] = 4.5'),
        ("b=5.0", "b=5.5"),
        ("LIMIT = 6.0", "LIMIT = 6.5"),
        ("pi > 3", "pi > 2"),
        ("from math import pi", "from numpy import pi"),
        ("from helpers", "from others"),
    ],
)
def test_code_is_what_a_definition_and_all_that_it_uses_say(was: str, becomes: str) -> None:
    assert was in TEXT
    assert code_in(TEXT) != code_in(TEXT.replace(was, becomes))


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("0.1, 0.7", "0.2, 0.8"),
        ("UNUSED = 3.0", "UNUSED = 3.5"),
        ("pi, tau", "tau, e, pi"),
        ("def loss", "# In short:\ndef loss"),
        ("min(LIMIT, pi)", "min( LIMIT,pi )"),
    ],
)
def test_code_is_not_what_the_rest_of_the_text_says(was: str, becomes: str) -> None:
    assert was in TEXT
    assert code_in(TEXT) == code_in(TEXT.replace(was, becomes))


def test_the_whole_text_is_the_code_of_a_name_that_nothing_in_it_defines() -> None:
    assert code_in(TEXT, "x:elsewhere") == TEXT


def test_only_what_a_space_defines_has_code(tmp_path: Path) -> None:
    write(tmp_path, "marked", "def build(n):\n    return n\n")
    own.import_from([str(tmp_path)])
    assert own.offered_code("marked:build") is None
