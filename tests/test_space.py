import itertools
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tuneapp import config, own
from tuneapp.config import AdamW, Sgd, TrialConfig
from tuneapp.errors import ConfigError, SpaceError
from tuneapp.space import SearchSpace, describe, parse_value

RESNET = Path(__file__).parent.parent / "search_spaces" / "resnet.py"
SPACE = '''"""Two optimizers, and a schedule within one of them.

More text.
"""
from tuneapp.config import AdamW, Cosine, Constant, Sgd, TrialConfig

FIRST_TRIALS = [{"optimizer": "sgd", "sgd.lr": 0.01}]


def search_space(trial):
    schedule = Constant()
    depth = trial.suggest_int("freeze_depth", 0, 5)
    if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "adamw":
        optimizer = AdamW(lr=trial.suggest_float("adamw.lr", 1e-4, 1e-1, log=True))
        if trial.suggest_categorical("adamw.schedule", ["cosine", "constant"]) == "cosine":
            warmup = trial.suggest_float("adamw.warmup", 0.0, 0.3)
            schedule = Cosine(warmup_fraction=warmup)
    else:
        optimizer = Sgd(lr=trial.suggest_float("sgd.lr", 1e-3, 1e-1, log=True))
    size = trial.suggest_categorical("batch_size", [32, 64])
    return TrialConfig(
        model="resnet18", freeze_depth=depth, optimizer=optimizer, schedule=schedule,
        batch_size=size,
    )
'''
SGD = {"freeze_depth": 2, "optimizer": "sgd", "sgd.lr": 0.012345678901234567, "batch_size": 64}
ADAMW = {
    "freeze_depth": 0,
    "optimizer": "adamw",
    "adamw.lr": 1e-3,
    "adamw.schedule": "cosine",
    "adamw.warmup": 0.1,
    "batch_size": 32,
}


def as_space(text):
    return SearchSpace(text, Path("space.py"))


def body(*lines):
    """Return a space whose function has these lines, the first of which is line 4."""
    return as_space(
        "from tuneapp.config import Sgd, TrialConfig\n\n"
        "def search_space(trial):\n"
        + "".join(f"    {line}\n" for line in lines)
        + "    return TrialConfig(model='resnet18', optimizer=Sgd(lr=0.1))\n"
    )


@pytest.fixture
def space():
    return as_space(SPACE)


# --- Reading -------------------------------------------------------------------------------------


def test_a_file_is_read_with_its_name_summary_and_first_trials(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SPACE, encoding="utf-8")
    space = SearchSpace.read(path)
    path.unlink()  # nothing depends on the file once it is read
    assert space.text == SPACE
    assert space.path == path
    assert space.name == "mine"
    assert space.summary == "Two optimizers, and a schedule within one of them."
    assert space.first_trials == [{"optimizer": "sgd", "sgd.lr": 0.01}]
    assert space.config(SGD).optimizer == Sgd(lr=SGD["sgd.lr"])


def test_a_space_without_docstring_and_first_trials_has_none():
    space = body()
    assert (space.summary, space.first_trials) == ("", [])


@pytest.mark.parametrize(
    ("asked", "hint"), [("resent.py", "; did you mean 'resnet.py'?"), ("zzzz.py", "")]
)
def test_a_missing_file_is_named_with_the_nearest_one_beside_it(tmp_path, asked, hint):
    (tmp_path / "resnet.py").touch()
    with pytest.raises(SpaceError) as caught:
        SearchSpace.read(tmp_path / asked)
    assert str(caught.value) == f"{tmp_path / asked}: no such search-space file{hint}"


def test_a_file_in_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SpaceError, match=r"gone/space\.py: no such search-space file$"):
        SearchSpace.read(tmp_path / "gone" / "space.py")


def test_a_binary_file_is_no_search_space(tmp_path):
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpaceError, match="cannot be read as a search space"):
        SearchSpace.read(tmp_path / "binary.py")


def test_a_folder_is_refused_with_the_files_in_it(tmp_path):
    with pytest.raises(SpaceError, match="is a folder; give a file in it: it has none that ends"):
        SearchSpace.read(tmp_path)
    for name in ("b.py", "a.py", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(SpaceError) as caught:
        SearchSpace.read(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a folder; give a file in it: a.py, b.py"


def test_a_file_that_does_not_end_in_py_is_not_executed(tmp_path):
    (tmp_path / "notes.txt").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{SPACE}")
    with pytest.raises(SpaceError, match=r"notes\.txt: not a search space: .* not end in \.py$"):
        SearchSpace.read(tmp_path / "notes.txt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("head", ["search_space()", "search_space(trial, more)"])
def test_a_function_that_does_not_take_a_trial_is_refused_with_its_signature(head):
    with pytest.raises(SpaceError) as caught:
        as_space(f"def {head}:\n    pass\n")
    assert str(caught.value) == (
        "space.py: search_space must take the trial and nothing else: "
        "`def search_space(trial: Trial) -> TrialConfig`"
    )


@pytest.mark.parametrize("head", ["search_space(*given)", "search_space(t, more=1)"])
def test_a_function_that_can_be_called_with_a_trial_is_taken(head):
    as_space(f"def {head}:\n    pass\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = 2\ndef search_space(trial:\n", r"space\.py:3: SyntaxError: "),
        ("x = 1\n\n\nx = y\n", r"space\.py:4: NameError: name 'y' is not defined"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"space\.py:2: ZeroDivisionError: "),
        ("import not_a_module_at_all\n", r"space\.py:1: ModuleNotFoundError: .*not_a_module"),
        ("import tuneapp.confg\n", r"space\.py:1: ModuleNotFoundError: .*tuneapp\.confg"),
        ("from optuna import Trail\n", r"space\.py:1: ImportError: .*Trail"),
        ("def serch_space(trial):\n    pass\n", r"space\.py: no function `search_space`"),
        ("search_space = 3\n", r"space\.py: no function `search_space`"),
        ("", r"space\.py: no function `search_space`; a search space is a file with `def"),
    ],
)
def test_a_file_that_is_no_search_space_is_named_with_the_line(text, said):
    with pytest.raises(SpaceError, match=said):
        as_space(text)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Cosin", "; did you mean 'Cosine'?"),
        ("AdanW", "; did you mean 'AdamW'?"),
        ("RMSprop", "; did you mean 'RmsProp'?"),
        ("Metric2", ""),
    ],
)
def test_a_name_that_the_configuration_does_not_have_is_answered_with_those_it_has(name, hint):
    with pytest.raises(SpaceError) as caught:
        as_space(f"import math\nfrom tuneapp.config import Sgd, {name}\n")
    message = str(caught.value)
    begin = f"space.py:2: cannot import name '{name}' from 'tuneapp.config'{hint}; it has "
    assert message.startswith(begin)
    assert "\n" not in message
    # All classes that are written in a space, and nothing that is none.
    told = message.removeprefix(begin).split(", ")
    assert told == sorted(told)
    groups = (config.Optimizer, config.Schedule, config.Loss)
    choices = {choice.__name__ for group in groups for choice in group.__args__}
    assert set(told) >= {*choices, "TrialConfig", "Preprocess"}
    assert all(isinstance(getattr(config, each), type) for each in told)


@pytest.mark.parametrize("listed", ["{'a': 1}", "[1]", "3", "['a']", "None", "[{}, 0]"])
def test_first_trials_must_be_a_list_of_dicts(listed):
    with pytest.raises(SpaceError, match="FIRST_TRIALS must be a list of dicts name -> value"):
        as_space(f"FIRST_TRIALS = {listed}\ndef search_space(trial):\n    pass\n")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("FIRST_TRIAL", "[{}]", "FIRST_TRIALS"),
        ("FIRST_TRAILS", "[{}]", "FIRST_TRIALS"),
        ("FIRST_TRAIL", "{'a': 1}", "FIRST_TRIALS"),
        ("FIRSTTRIALS", "({},)", "FIRST_TRIALS"),
        ("DATAS", "Data()", "DATA"),
        ("DATTA", "'photos/'", "DATA"),
    ],
)
def test_a_constant_that_seems_a_misspelled_one_is_refused(name, value, wanted):
    text = f"from tuneapp.config import Data\n{name} = {value}\ndef search_space(trial): pass\n"
    with pytest.raises(SpaceError) as caught:
        as_space(text).check_recipes([])
    assert str(caught.value) == f"space.py: {name} is not used; did you mean {wanted}?"


@pytest.mark.parametrize(
    "line",
    [
        "DATASETS = ['a']", "DATE = '2026'", "DATES = ['2026']", "DATA_DIR = 'photos/'",
        "DATA2 = 3", "_DATA = 3", "TRIALS = [1]", "FIRST = [1]", "FIRST_EPOCHS = [1]",
        "SECOND_TRIALS = []", "FIRST_TRIAL = 3", "first_trial = [{}]",
        "FIRST_TRIALS2 = []; FIRST_TRIALS = []", "DATAS = Data(); DATA = DATAS",
    ],
)  # fmt: skip
def test_another_constant_is_none_of_our_business(line):
    text = f"from tuneapp.config import Data\n{line}\ndef search_space(trial): pass\n"
    as_space(text).check_recipes([])


# --- FIRST_TRIALS ---------------------------------------------------------------------------------


def with_recipe(recipe):
    return as_space(SPACE.replace('{"optimizer": "sgd", "sgd.lr": 0.01}', repr(recipe)))


def test_recipes_that_are_complete_are_taken():
    for recipe in (SGD, ADAMW):
        space = with_recipe(recipe)
        space.check_recipes(space.branches())
        assert space.first_trials == [recipe]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            {**SGD, "sgd.rl": 1},
            "'sgd.rl' is not a parameter; did you mean 'sgd.lr'?; there are freeze",
        ),
        ({**SGD, "zzz": 1}, "'zzz' is not a parameter; there are freeze_depth, optimizer, "),
        ({**SGD, "sgd.lr": 1.0}, "sgd.lr=1.0: allowed is 0.001 to 0.1, log"),
        ({**SGD, "adamw.warmup": 0.1}, "never asks for 'adamw.warmup' here; it asks for freeze_"),
        (
            {"freeze_depth": 2, "optimizer": "sgd", "batch_size": 64},
            "has no value for 'sgd.lr' (0.001 to 0.1, log); a recipe names every parameter that "
            "its branch asks for",
        ),
        (
            {"optimizer": "adamw", "adamw.lr": 0.1, "adamw.schedule": "cosine"},
            "has no value for 'freeze_depth' (0 to 5, whole), 'adamw.warmup' (0 to 0.3), "
            "'batch_size' (32 | 64); a recipe",
        ),
        # Not what only one of the optimizers has: which it is to be is not known.
        ({}, "has no value for 'freeze_depth' (0 to 5, whole), 'optimizer' (adamw | sgd), 'batch"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_number_and_the_path_once(recipe, said):
    space = with_recipe(recipe)
    with pytest.raises(SpaceError) as caught:
        space.check_recipes(space.branches())
    assert str(caught.value).startswith(f"space.py: FIRST_TRIALS, number 1: {said}")
    assert str(caught.value).count("space.py") == 1


def test_a_recipe_that_builds_nothing_valid_is_refused_with_its_line():
    space = as_space(
        "from tuneapp.config import Sgd, TrialConfig\nFIRST_TRIALS = [{'n': 1}, {'n': 2}]\n"
        "def search_space(trial):\n"
        "    epochs = 0 if trial.suggest_int('n', 1, 3) == 2 else 1\n"
        "    return TrialConfig(model='resnet18', optimizer=Sgd(lr=0.1), epochs=epochs)\n"
    )
    with pytest.raises(SpaceError) as caught:
        space.check_recipes(space.branches())
    assert str(caught.value) == (
        "space.py: FIRST_TRIALS, number 2: line 5: TrialConfig: epochs must be a whole number >= "
        "1, got 0"
    )


# --- Code beside the space and in it --------------------------------------------------------------


@pytest.fixture
def own_modules(monkeypatch):
    """Forget the modules of the user's own that a test has made."""
    monkeypatch.setattr(own, "_spaces", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


NETWORK = "def build(num_classes):\n    return {answer}\n"
PLAIN = "def search_space(trial):\n    pass\n"


@pytest.mark.usefixtures("own_modules")
def test_what_a_space_defines_is_found_under_the_name_of_its_file(tmp_path):
    path = tmp_path / "my_space.py"
    SearchSpace(PLAIN + NETWORK.format(answer="num_classes"), path)
    assert own.find_own("my_space:build", "model")(7) == 7
    # Neither is there such a file, nor is the space anything that can be imported.
    assert not path.exists()
    assert "my_space" not in sys.modules


@pytest.mark.usefixtures("own_modules")
def test_the_text_that_was_executed_last_is_what_the_name_stands_for(tmp_path):
    path = tmp_path / "my_space.py"
    path.write_text(PLAIN + NETWORK.format(answer="'edited'"))
    SearchSpace(PLAIN + NETWORK.format(answer="'kept'"), path)
    assert own.find_own("my_space:build", "model")(1) == "kept"
    SearchSpace.read(path)
    assert own.find_own("my_space:build", "model")(1) == "edited"


@pytest.mark.usefixtures("own_modules")
def test_a_module_beside_the_space_is_found(tmp_path):
    (tmp_path / "my_nets.py").write_text(NETWORK.format(answer="'beside'"))
    path = tmp_path / "my_space.py"
    path.write_text("import my_nets\nANSWER = my_nets.build(1)\n" + PLAIN)
    SearchSpace.read(path)
    assert own.find_own("my_nets:build", "model")(1) == "beside"


# --- Calling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("None", "None, not a TrialConfig (a missing return?)"),
        ("{'a': 1}", "dict, not a TrialConfig (end it with return TrialConfig(...))"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(returned, said):
    space = as_space(f"def search_space(trial):\n    return {returned}\n")
    with pytest.raises(SpaceError) as caught:
        space.config({})
    assert str(caught.value) == f"space.py: search_space returned {said}"


def test_an_exception_in_the_function_is_told_with_its_innermost_line_in_the_file():
    space = as_space(
        "def lr(trial):\n    return [][0]\n\n\ndef search_space(trial):\n    return lr(trial)\n"
    )
    with pytest.raises(SpaceError, match=r"space\.py:2: IndexError: list index out of range"):
        space.config({})


def test_a_typo_in_a_keyword_is_told_with_the_users_own_line():
    space = body("x = 1", "Sgd(lr=0.1, momentun=0.9)")
    with pytest.raises(SpaceError, match="py:5: Sgd has no momentun; did you mean 'momentum'"):
        space.config({})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Sgd()", "Sgd needs lr"),
        ("Sgd(0.1)", "Sgd takes its fields by name: Sgd(lr=...)"),
        ("Sgd(0.1, momentum=0.9)", "Sgd takes its fields by name: Sgd(lr=...)"),
        ("TrialConfig('resnet18')", "TrialConfig takes its fields by name: TrialConfig(model=...)"),
        ("TrialConfig(epochs=3)", "TrialConfig needs model, optimizer"),
        ("trial.sugest_float('x', 0, 1)", "trial has no sugest_float; did you mean 'suggest_flo"),
        ("trial.zzz", "trial has no zzz; it has suggest_float, suggest_int, suggest_categorical"),
        (
            "trial.suggest_float('x', 1, 2, lgo=True)",
            "trial.suggest_float has no lgo; did you mean 'log'?",
        ),
        ("trial.suggest_float('x', 1)", "trial.suggest_float: missing 1 required positional arg"),
    ],
)
def test_a_wrong_call_is_told_with_its_line_and_without_our_class_names(line, said):
    space = body("x = 1", line)
    for how in (space.branches, lambda: space.config({})):
        with pytest.raises(SpaceError) as caught:
            how()
        assert str(caught.value).startswith(f"space.py:5: {said}")


def test_a_wrong_call_of_other_code_keeps_its_error():
    space = body("len()")
    with pytest.raises(SpaceError, match=r"space\.py:4: TypeError: len\(\) takes exactly one"):
        space.branches()


def test_a_wrong_value_of_a_configuration_is_told_with_its_line():
    space = body("Sgd(lr=trial.suggest_float('lr', -1.0, 1.0))")
    with pytest.raises(ConfigError) as caught:
        space.config({"lr": -1.0})
    assert str(caught.value) == "space.py:4: Sgd: lr must be a number > 0, got -1.0"


def test_a_mistake_in_one_of_several_branches_is_told_with_its_values():
    space = body(
        "if trial.suggest_categorical('optimizer', ['adamw', 'sgd']) == 'sgd':",
        "    lr = trial.suggest_float('sgd.lr', 0.1, 1.0)",
        "    Sgd(lr=lr, momentum=2)",
    )
    with pytest.raises(ConfigError) as caught:
        space.branches()
    assert str(caught.value) == (
        "space.py:6: Sgd: momentum must be a number in [0, 1), got 2 "
        "(with optimizer=sgd sgd.lr=0.1)"
    )


def test_a_space_answers_optunas_own_trials_as_it_answers_a_replay(space):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        config = space(trial)
        branch = space.replay(trial.params)
        assert branch.config == config
        assert branch.params == trial.params
        assert branch.distributions == trial.distributions


# --- Replaying -----------------------------------------------------------------------------------


def test_a_replay_gives_exactly_the_values_that_were_given(space):
    branch = space.replay(SGD)
    assert branch.params == SGD
    assert branch.config == TrialConfig(
        model="resnet18", freeze_depth=2, optimizer=Sgd(lr=0.012345678901234567), batch_size=64
    )
    assert branch.distributions == {
        "freeze_depth": IntDistribution(0, 5),
        "optimizer": CategoricalDistribution(["adamw", "sgd"]),
        "sgd.lr": FloatDistribution(1e-3, 1e-1, log=True),
        "batch_size": CategoricalDistribution([32, 64]),
    }
    assert space.config(SGD) == branch.config


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        ("sgd.rl", "; did you mean 'sgd.lr'?"),
        ("adamw.warmup", ""),  # a parameter of the other branch
        ("zzz", ""),
    ],
)
@pytest.mark.parametrize("how", ["replay", "config"])
def test_a_value_that_nothing_asks_for_is_refused(space, how, extra, hint):
    with pytest.raises(SpaceError) as caught:
        getattr(space, how)({**SGD, extra: 0.1})
    assert str(caught.value) == (
        f"space.py: never asks for {extra!r} here{hint}; "
        "it asks for freeze_depth, optimizer, sgd.lr, batch_size"
    )


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("freeze_depth", "0 to 5, whole"),
        ("optimizer", "adamw | sgd"),
        ("sgd.lr", "0.001 to 0.1, log"),
        ("batch_size", "32 | 64"),
    ],
)
def test_a_missing_value_is_named_with_what_is_allowed(space, name, allowed):
    params = {k: v for k, v in SGD.items() if k != name}
    with pytest.raises(SpaceError) as caught:
        space.replay(params)
    assert f"no value for {name!r} ({allowed}); give it, as in --set {name}=" in str(caught.value)


def test_all_missing_values_are_named_at_once(space):
    with pytest.raises(SpaceError) as caught:
        space.replay({"optimizer": "adamw", "adamw.schedule": "constant", "batch_size": 32})
    assert str(caught.value) == (
        "space.py: no value for 'freeze_depth' (0 to 5, whole), 'adamw.lr' (0.0001 to 0.1, log); "
        "give them, as in --set freeze_depth=... --set adamw.lr=..."
    )


def test_a_missing_value_is_told_even_where_what_stands_in_for_it_is_not_allowed():
    space = body("Sgd(lr=trial.suggest_float('lr', 0.0, 1.0))")
    with pytest.raises(SpaceError, match=r"no value for 'lr' \(0 to 1\)"):
        space.replay({})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("sgd.lr", 0.11, "0.001 to 0.1, log"),
        ("sgd.lr", 0.0009, "0.001 to 0.1, log"),
        ("sgd.lr", -1, "0.001 to 0.1, log"),
        ("sgd.lr", float("nan"), "0.001 to 0.1, log"),
        ("sgd.lr", "much", "0.001 to 0.1, log"),
        ("sgd.lr", None, "0.001 to 0.1, log"),
        ("freeze_depth", 6, "0 to 5, whole"),
        ("freeze_depth", -1, "0 to 5, whole"),
        ("freeze_depth", 2.5, "0 to 5, whole"),
        ("freeze_depth", "deep", "0 to 5, whole"),
        ("optimizer", "adam", "adamw | sgd"),
        ("optimizer", 0, "adamw | sgd"),
        ("batch_size", 48, "32 | 64"),
        ("batch_size", "64", "32 | 64"),
    ],
)
@pytest.mark.parametrize("how", ["replay", "covered"])
def test_a_value_out_of_range_is_refused_with_what_is_allowed(space, how, name, value, allowed):
    with pytest.raises(SpaceError) as caught:
        getattr(space, how)({**SGD, name: value})
    assert str(caught.value) == f"space.py: {name}={value!r}: allowed is {allowed}"


def test_the_ends_of_a_range_are_in_it(space):
    for depth, lr in ((0, 1e-3), (5, 1e-1)):
        config = space.config({**SGD, "freeze_depth": depth, "sgd.lr": lr})
        assert (config.freeze_depth, config.optimizer.lr) == (depth, lr)


def test_the_number_of_a_trial_decides_nothing():
    # Trials are replayed from their values in other processes, which do not know it.
    with pytest.raises(SpaceError, match=r"^space\.py:4: trial\.number must not decide anything"):
        body("trial.suggest_int('n', trial.number, 9)").branches()


IN_BETWEEN = (
    "depth = trial.suggest_int('depth', 0, 5)",
    "if 0 < depth < 5:",
    "    trial.suggest_float('ratio', 0.1, 1.0)",
)


def test_what_is_asked_for_between_the_ends_of_a_range_is_known():
    space = body(*IN_BETWEEN)
    recipe = {"depth": 2, "ratio": 0.5}
    as_space(f"FIRST_TRIALS = [{recipe}]\n{space.text}").check_recipes(space.branches())
    assert space.choose({"ratio": "0.5"}, {"depth": 2, "ratio": 0.3}) == recipe
    assert space.choose({"depth": "2", "ratio": "0.5"}) == recipe
    with pytest.raises(SpaceError, match=r"--set ratio: .*has no such parameter"):
        space.choose({"depth": "5", "ratio": "0.5"})


def test_a_choice_that_is_a_member_of_an_enum_comes_back_as_itself():
    space = as_space(
        "from enum import StrEnum\n"
        "from tuneapp.config import AdamW, Sgd, TrialConfig\n"
        "class Kind(StrEnum):\n"
        "    SGD = 'sgd'\n"
        "    ADAMW = 'adamw'\n"
        "def search_space(trial):\n"
        "    kind = trial.suggest_categorical('kind', list(Kind))\n"
        "    optimizer = Sgd(lr=0.1) if kind is Kind.SGD else AdamW(lr=0.1)\n"
        "    return TrialConfig(model='resnet18', optimizer=optimizer)\n"
    )
    assert space.config({"kind": "sgd"}).optimizer == Sgd(lr=0.1)
    assert space.config({"kind": "adamw"}).optimizer == AdamW(lr=0.1)


def test_a_step_of_a_range_is_kept():
    space = body("trial.suggest_int('n', 1, 7, step=3)", "trial.suggest_float('x', 0, 1, step=0.5)")
    assert space.replay({"n": 4, "x": 0.5}).params == {"n": 4, "x": 0.5}
    for wrong in ({"n": 3, "x": 0.5}, {"n": 4, "x": 0.4}):
        with pytest.raises(SpaceError, match="allowed is"):
            space.replay(wrong)


def test_what_is_not_asked_for_can_be_left_out(space):
    assert space.covered({**SGD, "adamw.lr": 1e-3, "gone": 3}).params == SGD


# --- --set ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "changed"),
    [
        ({}, {}),
        ({"adamw.lr": "3e-3"}, {"adamw.lr": 3e-3}),
        ({"freeze_depth": "5", "batch_size": "64"}, {"freeze_depth": 5, "batch_size": 64}),
    ],
)
def test_set_changes_what_is_written_and_nothing_else(space, chosen, changed):
    base = dict(ADAMW)
    got = space.choose(chosen, base)
    assert got == {**ADAMW, **changed}
    assert [type(got[k]) for k in got] == [type(ADAMW[k]) for k in got]
    assert base == ADAMW


def test_set_of_another_branch_drops_the_values_of_the_old_one(space):
    got = space.choose({"optimizer": "sgd", "sgd.lr": "0.01"}, ADAMW)
    assert got == {"freeze_depth": 0, "optimizer": "sgd", "sgd.lr": 0.01, "batch_size": 32}
    assert space.config(got).optimizer == Sgd(lr=0.01)
    nested = space.choose({"adamw.schedule": "constant"}, ADAMW)
    kept = {name: value for name, value in ADAMW.items() if name != "adamw.warmup"}
    assert nested == {**kept, "adamw.schedule": "constant"}


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"adam.lr": "1"}, r"--set adam\.lr: .*has no such parameter; did you mean 'adamw\.lr'\?"),
        ({"zzz": "1"}, r"--set zzz: .*has no such parameter; it has freeze_depth, optimizer"),
        ({"adamw.lr": "fast"}, r"--set adamw\.lr=fast: allowed is 0\.0001 to 0\.1, log"),
        ({"adamw.lr": "7"}, r"adamw\.lr=7\.0: allowed is 0\.0001 to 0\.1, log"),
        ({"adamw.lr": "nan"}, r"adamw\.lr=nan: allowed is 0\.0001 to 0\.1, log"),
        ({"freeze_depth": "1.5"}, r"--set freeze_depth=1\.5: allowed is 0 to 5, whole"),
        ({"freeze_depth": "9"}, r"freeze_depth=9: allowed is 0 to 5, whole"),
        ({"optimizer": "adam"}, r"--set optimizer=adam: allowed is adamw \| sgd"),
        ({"optimizer": "sgd"}, r"no value for 'sgd\.lr' \(0\.001 to 0\.1, log\)"),
        ({"sgd.lr": "0.01"}, r"--set sgd\.lr: not asked for with the other values"),
    ],
)
def test_a_wrong_set_is_refused(space, chosen, said):
    with pytest.raises(SpaceError, match=said):
        space.choose(chosen, ADAMW)


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ({}, ADAMW),
        ({"freeze_depth": "5"}, {**ADAMW, "freeze_depth": 5}),
        ({"optimizer": "sgd"}, SGD),
        ({"sgd.lr": "0.05"}, {**SGD, "sgd.lr": 0.05}),
        ({"optimizer": "sgd", "batch_size": "32"}, {**SGD, "batch_size": 32}),
        ({"adamw.schedule": "constant"}, {k: ADAMW.get(k) for k in ADAMW if k != "adamw.warmup"}
         | {"adamw.schedule": "constant"}),
    ],
)  # fmt: skip
def test_what_is_not_set_is_as_in_the_first_recipe_that_agrees(chosen, wanted):
    text = SPACE.replace('{"optimizer": "sgd", "sgd.lr": 0.01}', f"{ADAMW!r}, {SGD!r}")
    assert as_space(text).choose(chosen) == wanted


def test_a_choice_of_numbers_picks_the_recipe_too_and_is_written_in_any_way():
    space = as_space(
        "from tuneapp.config import Sgd, TrialConfig\n"
        "FIRST_TRIALS = [{'decay': 0.0, 'lr': 0.1}, {'decay': 0.001, 'lr': 0.2}]\n"
        "def search_space(trial):\n"
        "    decay = trial.suggest_categorical('decay', [0.0, 0.001])\n"
        "    lr = trial.suggest_float('lr', 0.1, 1.0)\n"
        "    return TrialConfig(model='resnet18', optimizer=Sgd(lr=lr, weight_decay=decay))\n"
    )
    for text in ("0.001", "1e-3", "1E-03"):
        assert space.choose({"decay": text}) == {"decay": 0.001, "lr": 0.2}


def test_a_recipe_with_the_choice_that_is_set_comes_before_one_that_could_take_it():
    space = as_space(
        "from tuneapp.config import Sgd, TrialConfig\n"
        "FIRST_TRIALS = [{'kind': 'a', 'lr': 0.1}, {'kind': 'b', 'lr': 0.2}]\n"
        "def search_space(trial):\n"
        "    trial.suggest_categorical('kind', ['a', 'b', 'c'])\n"
        "    lr = trial.suggest_float('lr', 0.1, 1.0)\n"
        "    return TrialConfig(model='resnet18', optimizer=Sgd(lr=lr))\n"
    )
    assert space.choose({"kind": "b"}) == {"kind": "b", "lr": 0.2}
    assert space.choose({"kind": "c"}) == {"kind": "c", "lr": 0.1}
    assert space.choose({"lr": "0.3"}) == {"kind": "a", "lr": 0.3}


def test_where_no_recipe_agrees_all_that_is_missing_is_named(space):
    with pytest.raises(SpaceError) as caught:
        space.choose({"optimizer": "adamw"})
    assert str(caught.value) == (
        "space.py: no value for 'freeze_depth' (0 to 5, whole), 'adamw.lr' (0.0001 to 0.1, log), "
        "'adamw.schedule' (cosine | constant), 'batch_size' (32 | 64); give them, as in "
        "--set freeze_depth=... --set adamw.lr=... --set adamw.schedule=... --set batch_size=..."
    )


@pytest.mark.parametrize("name", ["epochs", "model", "image_size"])
def test_a_field_that_the_space_sets_itself_is_told_with_the_flags_that_there_are(space, name):
    with pytest.raises(SpaceError) as caught:
        space.choose({name: "3"})
    for words in (f"--set {name}: space.py has no such parameter", "--epochs N", "it has freeze_"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "distribution", "value"),
    [
        ("1e-3", FloatDistribution(0, 1), 1e-3),
        ("1", FloatDistribution(0, 1), 1.0),
        ("3", IntDistribution(0, 5), 3),
        ("b", CategoricalDistribution(["a", "b"]), "b"),
        ("64", CategoricalDistribution([32, 64]), 64),
        ("0.5", CategoricalDistribution([0.1, 0.5]), 0.5),
        ("None", CategoricalDistribution([None, "x"]), None),
        ("False", CategoricalDistribution([True, False]), False),
        ("", CategoricalDistribution(["", "x"]), ""),
    ],
)
def test_a_text_becomes_a_value_of_the_parameters_own_type(text, distribution, value):
    got = parse_value("p", text, distribution)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("", FloatDistribution(0, 1)),
        ("1,5", FloatDistribution(0, 10)),
        ("2.0", IntDistribution(0, 5)),
        ("1e1", IntDistribution(0, 50)),
        ("c", CategoricalDistribution(["a", "b"])),
        ("A", CategoricalDistribution(["a", "b"])),
        ("none", CategoricalDistribution([None, "x"])),
    ],
)
def test_a_text_that_is_no_value_is_refused_with_what_is_allowed(text, distribution):
    with pytest.raises(SpaceError) as caught:
        parse_value("p", text, distribution)
    assert str(caught.value) == f"--set p={text}: allowed is {describe(distribution)}"


@pytest.mark.parametrize(
    ("distribution", "words"),
    [
        (FloatDistribution(0.1, 1.0, log=True), "0.1 to 1, log"),
        (FloatDistribution(1e-5, 0.3), "1e-05 to 0.3"),
        (IntDistribution(0, 5), "0 to 5, whole"),
        (IntDistribution(1, 64, log=True), "1 to 64, whole, log"),
        (CategoricalDistribution(["sgd", None, 3]), "sgd | None | 3"),
    ],
)
def test_a_range_is_said_in_words(distribution, words):
    assert describe(distribution) == words


# --- Probing -------------------------------------------------------------------------------------


def test_every_combination_of_choices_of_the_resnet_space_is_visited_at_both_ends():
    branches = SearchSpace.read(RESNET).branches()
    visited = {}
    for branch in branches:
        choices = (branch.params["optimizer"], branch.params["schedule"])
        visited.setdefault(choices, []).append(branch)
    optimizers, schedules = ["adamw", "sgd"], ["cosine", "onecycle", "step", "constant"]
    assert set(visited) == set(itertools.product(optimizers, schedules))
    for pair in visited.values():
        low, high = pair
        assert low.distributions == high.distributions
        for name, distribution in low.distributions.items():
            if not isinstance(distribution, CategoricalDistribution):
                assert low.params[name] == distribution.low < distribution.high
                assert high.params[name] == distribution.high
    low, high = visited["adamw", "step"]
    assert low.config.optimizer == AdamW(lr=1e-5, weight_decay=1e-4)
    assert (high.config.freeze_depth, high.config.schedule.every_epochs) == (5, 4)


def test_choices_within_choices_are_visited(space):
    visited = {
        (b.params["optimizer"], b.params.get("adamw.schedule"), b.params["batch_size"])
        for b in space.branches()
    }
    assert visited == {
        *itertools.product(["adamw"], ["cosine", "constant"], [32, 64]),
        ("sgd", None, 32),
        ("sgd", None, 64),
    }
    assert len(space.branches()) == 2 * len(visited)


def test_a_branch_is_complete_in_itself(space):
    for branch in space.branches():
        assert space.replay(branch.params) == branch


def test_a_branch_that_builds_nothing_valid_is_found_without_being_the_first():
    space = body(
        "if trial.suggest_categorical('kind', ['a', 'b', 'c']) == 'c':",
        "    Sgd(lr=trial.suggest_float('lr', 0.0, 1.0))",
    )
    with pytest.raises(ConfigError, match=r"lr must be a number > 0, got 0\.0"):
        space.branches()


def test_a_high_end_that_builds_nothing_valid_is_found():
    space = body("Sgd(lr=0.1, momentum=trial.suggest_float('momentum', 0.5, 1.0))")
    with pytest.raises(ConfigError, match=r"momentum must be a number in \[0, 1\), got 1\.0"):
        space.branches()


def test_an_exception_in_a_late_branch_is_told_with_its_line():
    space = body("if trial.suggest_categorical('kind', [1, 2, 3]) == 3:", "    [][0]")
    with pytest.raises(SpaceError, match=r"space\.py:5: IndexError"):
        space.branches()


def test_one_name_with_two_ranges_in_two_branches_is_refused():
    space = body(
        "kind = trial.suggest_categorical('kind', ['a', 'b'])",
        "trial.suggest_float('lr', 0.1, 1.0 if kind == 'a' else 2.0)",
    )
    with pytest.raises(SpaceError) as caught:
        space.branches()
    assert str(caught.value) == (
        "space.py: parameter 'lr' is 0.1 to 1 in one branch and 0.1 to 2 in another; give each "
        "branch its own name, such as 'sgd.lr' and 'adamw.lr'"
    )


def test_a_random_range_is_told_as_such_and_not_as_two_meanings():
    space = body("import random", "trial.suggest_float('x', 0, random.uniform(1, 2))")
    with pytest.raises(
        SpaceError, match=r"'x' is 0 to 1\.\d+ when the file is read, and .* again;"
    ):
        space.branches()


def test_one_name_with_one_range_in_two_branches_is_allowed():
    space = body(
        "kind = trial.suggest_categorical('kind', ['a', 'b'])", "trial.suggest_int('n', 1, 2)"
    )
    assert len(space.branches()) == 4


@pytest.mark.parametrize(
    "second",
    [
        "trial.suggest_float('x', 0.1, 2.0)",
        "trial.suggest_float('x', 0.1, 1.0, log=True)",
        "trial.suggest_int('x', 0, 1)",
        "trial.suggest_categorical('x', [0.1, 1.0])",
    ],
)
@pytest.mark.parametrize("how", ["branches", "replay"])
def test_one_name_asked_for_twice_with_two_ranges_is_refused(second, how):
    space = body("trial.suggest_float('x', 0.1, 1.0)", second)
    with pytest.raises(SpaceError, match=r"parameter 'x' is asked for twice: 0\.1 to 1, then"):
        space.branches() if how == "branches" else space.replay({"x": 0.5})


def test_one_name_asked_for_twice_with_one_range_has_one_value():
    space = body(*["trial.suggest_float('x', 0.1, 1.0)"] * 2)
    assert space.replay({"x": 0.5}).params == {"x": 0.5}
    assert [p.name for p in space.parameters()] == ["x"]


def test_a_space_of_many_choices_is_probed_by_single_changes_first():
    # 2 ** 20 combinations cannot all be tried; each choice must be seen at least once.
    space = body("for i in range(20):", "    trial.suggest_categorical(f'c{i}', ['x', 'y'])")
    branches = space.branches()
    seen = {(name, value) for b in branches for name, value in b.params.items()}
    assert seen == set(itertools.product([f"c{i}" for i in range(20)], ["x", "y"]))
    assert len(branches) < 2000


def test_a_space_without_parameters_has_one_branch():
    assert [b.params for b in body().branches()] == [{}, {}]
    assert body().parameters() == []


# --- Showing -------------------------------------------------------------------------------------


def test_parameters_are_told_with_ranges_and_conditions_in_order(space):
    told = [(p.name, p.allowed, p.condition) for p in space.parameters()]
    cosine = "optimizer = adamw and adamw.schedule = cosine"
    assert sorted(told) == sorted(
        [
            ("freeze_depth", "0 to 5, whole", ""),
            ("optimizer", "adamw | sgd", ""),
            ("adamw.lr", "0.0001 to 0.1, log", "optimizer = adamw"),
            ("adamw.schedule", "cosine | constant", "optimizer = adamw"),
            ("adamw.warmup", "0 to 0.3", cosine),
            ("sgd.lr", "0.001 to 0.1, log", "optimizer = sgd"),
            ("batch_size", "32 | 64", ""),
        ]
    )
    assert [name for name, _, _ in told][:3] == ["freeze_depth", "optimizer", "adamw.lr"]


def test_a_condition_lists_all_choices_that_bring_a_parameter_up():
    space = body(
        "if trial.suggest_categorical('kind', ['a', 'b', 'c']) != 'b':",
        "    trial.suggest_int('n', 1, 2)",
    )
    assert [(p.name, p.condition) for p in space.parameters()] == [
        ("kind", ""),
        ("n", "kind = a | c"),
    ]


def test_reading_and_showing_a_space_imports_neither_torch_nor_ray():
    code = (
        "import sys; from pathlib import Path; from tuneapp.space import SearchSpace\n"
        "assert SearchSpace.read(Path(sys.argv[1])).parameters()\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(RESNET)], capture_output=True, text=True, check=True
    )
    loaded = set(ran.stdout.split())
    assert "optuna" in loaded
    assert not loaded & {"torch", "torchvision", "ray", "sklearn", "pandas"}


def test_choices_that_come_up_only_at_the_high_end_of_a_number_are_all_probed():
    space = body(
        "Sgd(lr=0.1, momentum={'a': 0.1, 'b': 0.2}[trial.suggest_categorical('c', ['a', 'b'])] "
        "if trial.suggest_int('n', 1, 3) > 2 else 0.0)"
    )
    assert {b.params.get("c") for b in space.branches()} == {None, "a", "b"}


@pytest.mark.parametrize("value", ["0.5", True, "1"])
def test_what_only_looks_like_a_number_is_refused(value):
    space = body("Sgd(lr=trial.suggest_float('lr', 0.1, 1.0))")
    with pytest.raises(SpaceError, match="allowed is"):
        space.replay({"lr": value})
