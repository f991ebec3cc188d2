import re
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution

from tuneapp.config import AdamW, Sgd, TrialConfig
from tuneapp.fit import check_image_size, check_model
from tuneapp.losses import check_loss
from tuneapp.schedules import check_schedule
from tuneapp.space import SearchSpace
from tuneapp.weights import preprocessing_of

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "search_spaces").rglob("*.py"))
every_space = pytest.mark.parametrize(
    "path", FILES, ids=[p.relative_to(ROOT / "search_spaces").as_posix() for p in FILES]
)


def test_there_are_spaces_to_test():
    # An empty parametrization would pass in silence.
    assert len(FILES) >= 1
    assert ROOT / "search_spaces" / "resnet.py" in FILES


@every_space
def test_the_docstring_says_how_to_run_this_very_file(path):
    space = SearchSpace.read(path)
    assert space.summary
    module_text = compile(space.text, str(path), "exec").co_consts[0]
    commands = re.findall(r"^    python -m tuneapp sweep (\S+)", module_text, flags=re.MULTILINE)
    assert commands
    assert set(commands) == {path.relative_to(ROOT).as_posix()}


@every_space
def test_every_branch_builds_a_configuration_that_its_model_can_have(path):
    branches = SearchSpace.read(path).branches()
    assert branches
    for branch in branches:
        assert isinstance(branch.config, TrialConfig)
        assert check_model(branch.config) == [], branch.params


@every_space
def test_every_branch_is_replayed_to_the_same_configuration(path):
    space = SearchSpace.read(path)
    for branch in space.branches():
        assert space.replay(branch.params) == branch


@every_space
def test_the_first_trials_are_complete_and_allowed_and_each_is_another(path):
    space = SearchSpace.read(path)
    configs = [space.replay(params).config for params in space.first_trials]
    assert configs, "a search that has no recipe to beat proves nothing"
    assert all(check_model(config) == [] for config in configs)
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


@every_space
def test_a_parameter_of_one_branch_carries_the_branch_in_its_name(path):
    branches = SearchSpace.read(path).branches()
    names = {name for branch in branches for name in branch.params}
    for name in names:
        inside = [b for b in branches if name in b.params]
        if len(inside) == len(branches):
            continue
        prefix, dot, rest = name.partition(".")
        assert dot, f"{name} is asked for in some branches only"
        assert rest
        for branch in inside:
            choices = {
                str(branch.params[n])
                for n, d in branch.distributions.items()
                if isinstance(d, CategoricalDistribution)
            }
            assert prefix in choices, f"{name} is asked for beside {choices}"


@every_space
def test_every_branch_can_be_trained_on_the_embedded_images(path):
    size, num_classes = 32, 10
    for branch in SearchSpace.read(path).branches():
        config = branch.config
        assert check_schedule(config) == [], branch.params
        assert check_loss(config.loss, num_classes) == [], branch.params
        assert preprocessing_of(config, size).crop_size == (config.image_size or size)
        assert check_image_size(config, config.image_size or size) == [], branch.params


def test_adamw_and_sgd_are_both_searched_for_a_resnet():
    space = SearchSpace.read(ROOT / "search_spaces" / "resnet.py")
    assert {type(branch.config.optimizer) for branch in space.branches()} == {AdamW, Sgd}
