import hashlib
import math
import shutil
import sys

import pytest
import torch
from torch import nn

from tuneapp import own
from tuneapp import prepare as prepare_module
from tuneapp.config import (
    AdamW,
    CrossEntropy,
    Data,
    OwnLoss,
    OwnSchedule,
    Preprocess,
    RunSettings,
    Step,
    TrialConfig,
)
from tuneapp.data.batches import Batches
from tuneapp.data.sampling import InOrder
from tuneapp.data.store import open_store
from tuneapp.data.views import evaluation_view
from tuneapp.errors import CheckpointError, DataError, RunError, SpaceError, WeightsError
from tuneapp.ledger import Ledger
from tuneapp.models import build_network
from tuneapp.prepare import (
    assemble,
    check_again,
    lay_out,
    load_model,
    prepare,
    prepare_one,
    read_run_images,
    read_run_space,
    weights_key,
)
from tuneapp.rundir import RunDir, RunRecord, create_run, open_run
from tuneapp.space import SearchSpace
from tuneapp.trial import run_trial
from tuneapp.weights import Found, preprocessing_of

HEAD = """
from tuneapp.config import *

FIRST_TRIALS = {first}


def search_space(trial):
    kind = trial.suggest_categorical("kind", {kinds})
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    given = dict(model="resnet18", weights=None, image_size=32, optimizer=AdamW(lr=lr), epochs=2)
    given |= {choices}[kind]
    return TrialConfig(**given)
"""
PARAMS = {"kind": "plain", "lr": 0.012345678901234567}


@pytest.fixture(autouse=True)
def own_modules(monkeypatch, tmp_path_factory):
    """Forget the modules of the user's own that a test has made."""
    monkeypatch.setattr(own, "_spaces", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(
        tmp_path_factory.mktemp("here")
    )  # what was imported from the working directory counts
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def make(tmp_path, choices=None, first=(), more=""):
    """Return a space with one branch per choice, each given as `TrialConfig` keywords."""
    choices = choices or {"plain": {}}
    text = HEAD.format(first=list(first), kinds=list(choices), choices=choices) + more
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    return SearchSpace.read(path)


def prepared_of(space, data, **settings):
    said = []
    run_settings = RunSettings(data=Data(source=str(data)), **settings)
    return prepare(space, run_settings, space.branches(), said.append), said


def record_of(prepared, **more):
    return RunRecord(
        kind="sweep",
        space_paths=(str(prepared.space.path),),
        settings=prepared.settings,
        image_root=None if prepared.images.root is None else str(prepared.images.root),
        classes=prepared.images.classes,
        weights={key: found.as_dict() for key, found in prepared.weights.items()},
        warnings=prepared.warnings,
        code=prepared.code,
        **more,
    )


def laid_out(prepared, runs, **more):
    """Return a new run directory of a prepared sweep."""
    run = create_run(runs, None, prepared.space.name)
    lay_out(run, prepared.space, prepared.images, record_of(prepared, **more))
    return run


# --- What every branch asks for -------------------------------------------------------------------

MISTAKES = {
    "unknown model": ({"model": "resnet81"}, "model 'resnet81' is unknown; did you mean"),
    "network that is nowhere": (
        {"model": "my_nowhere:build"},
        "model 'my_nowhere:build': cannot import my_nowhere",
    ),
    "schedule that is nowhere": (
        {"schedule": OwnSchedule(factor="my_nowhere:factor")},
        "schedule 'my_nowhere:factor': cannot import my_nowhere",
    ),
    "pattern of nothing": (
        {"freeze": ["layer9.*"]},
        "freeze 'layer9.*' matches no parameter of resnet18",
    ),
    "unfrozen to deeper": (
        {"freeze_depth": 2, "unfreeze_at": {2: 3}},
        "unfreeze_at epoch 2: depth 3 must be less than the 2 before it",
    ),
    "no stochastic depth": (
        {"stochastic_depth": 0.1},
        "stochastic_depth: resnet18 has none",
    ),
    "no auxiliary classifiers": (
        {"aux_weight": 0.3},
        "aux_weight: resnet18 has no auxiliary classifiers",
    ),
    "too deep": (
        {"freeze_depth": 6},
        "freeze_depth 6 is too deep for resnet18: 0 to 5 (stem, layer1, layer2, layer3, layer4, "
        "head; the head is always trained)",
    ),
    "unknown stage": (
        {"freeze_depth": 4, "lr_ratio": {"layer4": 0.5, "head": 1.0, "layer9": 0.1}},
        "unknown: layer9; missing: none",
    ),
    "missing stage": (
        {"freeze_depth": 4, "lr_ratio": {"head": 1.0}},
        "unknown: none; missing: layer4",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_branch_that_asks_for_what_does_not_exist_is_refused(tmp_path, kind):
    keywords, said = MISTAKES[kind]
    space = make(tmp_path, {"plain": {}, "wrong": keywords})
    # No such folder: the space is checked before any image is looked for.
    with pytest.raises(SpaceError) as caught:
        prepared_of(space, tmp_path / "no_photos")
    message = str(caught.value)
    assert message.startswith(f"{space.path}: ")
    assert message.count(said) == 1  # and not once for each end of each range


def test_the_mistakes_of_all_branches_are_told_at_once(tmp_path):
    space = make(tmp_path, {kind: keywords for kind, (keywords, _) in MISTAKES.items()})
    with pytest.raises(SpaceError) as caught:
        prepared_of(space, tmp_path / "no_photos")
    for _, said in MISTAKES.values():
        assert str(caught.value).count(said) == 1


def test_a_mistake_of_some_branches_is_told_with_the_values_that_lead_there(tmp_path):
    choices = {"plain": {}, "deep": {"freeze_depth": 9}, "long": {"epochs": 7}}
    with pytest.raises(SpaceError) as caught:
        prepared_of(make(tmp_path, choices), tmp_path / "no_photos")
    assert str(caught.value).endswith(" (with kind=deep)")
    with pytest.raises(SpaceError) as caught:
        prepared_of(make(tmp_path, {"deep": {"freeze_depth": 9}}), tmp_path / "no_photos")
    assert "(with " not in str(caught.value)  # it is so in every branch


OWN_CODE = """
import torch
from torch import nn


def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


def too_deep(num_classes):
    return nn.Sequential(nn.AvgPool2d(64), build(num_classes))


def half_of_it(num_classes):
    return build(num_classes)[:2]


def fails(num_classes):
    raise RuntimeError("no such luck")


def loss(logits, targets):
    return nn.functional.cross_entropy(logits, targets)


def no_mean(logits, targets):
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def factor(epoch, config):
    return 1 / (1 + epoch)


def falls_out_of_the_numbers(epoch, config):
    return 1.0 if epoch < 1 else float("nan")
"""

# What only the images tell: how many classes there are, and how large they come.
LATE_MISTAKES = {
    "two weights for three classes": (
        {"loss": CrossEntropy(class_weights=[1.0, 2.0])},
        "class_weights must be a number for each of the 3 classes, got 2",
    ),
    "loss that is no mean": (
        {"loss": OwnLoss(loss="mine:no_mean")},
        "loss 'mine:no_mean' returned shape (2,); it must return the batch's mean",
    ),
    "loss that is nowhere": (
        {"loss": OwnLoss(loss="mine:lost")},
        "loss 'mine:lost': mine has no lost; did you mean 'loss'?",
    ),
    "resized to less than is seen": (
        {"preprocess": Preprocess(resize_size=16)},
        "preprocess.resize_size 16 is smaller than the 32 x 32 pixels that are",
    ),
    "images too small": (
        {"model": "alexnet"},
        "alexnet cannot take images of 32 x 32 pixels",
    ),
    "images too small for one's own": (
        {"model": "mine:too_deep"},
        "model 'mine:too_deep': images of 32 x 32 pixels: ",
    ),
    "network that returns no logits": (
        {"model": "mine:half_of_it"},
        "it returned (2, 4, 1, 1), not logits (2, 3)",
    ),
}


@pytest.fixture
def nothing_is_made(monkeypatch):
    """No image is decoded, and no weights are looked for."""

    def refuse(*args):
        raise AssertionError("there are mistakes to be told first")

    monkeypatch.setattr(prepare_module, "open_store", refuse)
    monkeypatch.setattr(prepare_module, "find_weights", refuse)


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize("kind", LATE_MISTAKES)
def test_a_mistake_that_only_the_images_tell_is_refused_before_they_are_decoded(
    tmp_path, photos, kind
):
    keywords, said = LATE_MISTAKES[kind]
    space = make(tmp_path, {"plain": {"weights": "DEFAULT"}, "wrong": keywords}, more=OWN_CODE)
    with pytest.raises(SpaceError) as caught:
        prepared_of(space, photos)
    message = str(caught.value)
    assert message.startswith(f"{space.path}: ")
    assert message.count(said) == 1


@pytest.mark.usefixtures("nothing_is_made")
def test_all_mistakes_that_only_the_images_tell_are_told_at_once(tmp_path, photos):
    choices = {kind: keywords for kind, (keywords, _) in LATE_MISTAKES.items()}
    space = make(tmp_path, choices, more=OWN_CODE)
    with pytest.raises(SpaceError) as caught:
        prepared_of(space, photos)
    for _, said in LATE_MISTAKES.values():
        assert str(caught.value).count(said) == 1


@pytest.mark.usefixtures("nothing_is_made")
@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        (
            {"schedule": OwnSchedule(factor="mine:falls_out_of_the_numbers")},
            "schedule 'mine:falls_out_of_the_numbers': in epoch 1 it returned nan; it must be a "
            "number >= 0",
        ),
        (
            {"model": "mine:fails"},
            "model 'mine:fails': building it for 10 classes failed: RuntimeError: no such luck",
        ),
        ({"model": "mine:loss"}, "model 'mine:loss': building it for 10 classes failed: TypeErr"),
        ({"model": "mine:biuld"}, "model 'mine:biuld': mine has no biuld; did you mean 'build'?"),
        ({"model": "mine:FIRST_TRIALS"}, "mine.FIRST_TRIALS is a list, not a function"),
    ],
)
def test_a_mistake_in_ones_own_code_is_told_before_any_image_is_looked_for(
    tmp_path, keywords, said
):
    space = make(tmp_path, {"plain": {}, "wrong": keywords}, more=OWN_CODE)
    with pytest.raises(SpaceError) as caught:
        prepared_of(space, tmp_path / "no_photos")
    assert str(caught.value).startswith(f"{space.path}: ")
    assert str(caught.value).count(said) == 1


def test_only_the_branches_that_are_to_be_trained_are_checked(tmp_path, photos):
    space = make(tmp_path, {"plain": {}, "wrong": {"model": "resnet81"}})
    settings = RunSettings(data=Data(source=str(photos)))
    prepared = prepare(space, settings, [space.replay(PARAMS)], lambda line: None)
    assert list(prepared.weights) == ["resnet18 None"]


def test_a_schedule_that_never_acts_is_a_warning_and_told_once_for_all_branches(tmp_path, photos):
    branches = {
        "plain": {},
        "slow": {"schedule": Step(every_epochs=8)},
        "slower": {"schedule": Step(every_epochs=9)},
    }
    prepared, _ = prepared_of(make(tmp_path, branches), photos)
    told = [text for text in prepared.warnings if text.startswith("schedule ")]
    epochs = prepared.max_epochs
    assert told == [
        f"schedule Step: every_epochs=8 in {epochs} epochs: the learning rate never falls"
    ]


def test_missing_images_and_missing_weights_are_named(tmp_path, photos):
    with pytest.raises(DataError, match=r"--data .*no_photos: no such folder"):
        prepared_of(make(tmp_path), tmp_path / "no_photos")
    with pytest.raises(WeightsError, match=r"weights 'mine/w\.pth': no such file"):
        prepared_of(make(tmp_path, {"plain": {"weights": "mine/w.pth"}}), photos)


def test_a_prepared_sweep_knows_its_images_weights_and_longest_training(tmp_path, photos):
    space = make(tmp_path, {"plain": {}, "long": {"epochs": 7}, "short": {"epochs": 1}})
    prepared, said = prepared_of(space, photos)
    assert prepared.max_epochs == 7
    assert prepared.weights == {"resnet18 None": Found(None, None, "random")}
    (tiny,) = prepared.warnings
    assert tiny.startswith("3 class(es) have fewer than 20 training images: blue (")
    assert prepared.images.root == photos.resolve()
    assert len(prepared.images.examples) == 30
    counts = {s: len(prepared.images.of(s)) for s in ("train", "val", "test")}
    assert said == [
        f"data      {photos}: 3 classes; {counts['train']} train, {counts['val']} val, "
        f"{counts['test']} test",
        "images    seen at 32 x 32 pixels, decoded once for all trials",
    ]
    assert prepared_of(space, photos, max_epochs=3)[0].max_epochs == 3
    assert prepared.code == {}


def test_one_prepared_configuration_comes_with_where_and_how_it_runs(tmp_path, photos):
    space = make(tmp_path, {"plain": {}, "wrong": {"model": "resnet81"}})
    settings = RunSettings(data=Data(source=str(photos)), max_epochs=1)
    prepared, config, run = prepare_one(space, settings, PARAMS, lambda line: None)
    assert config == settings.applied_to(space.config(PARAMS))
    assert (run.settings, run.images, run.params) == (settings, prepared.images.sealed(), PARAMS)
    assert (run.weights_file, run.weights_name, run.folder) == (None, "random", None)
    assert run.num_threads == torch.get_num_threads()
    with pytest.raises(SpaceError, match="'resnet81' is unknown"):
        prepare_one(space, settings, {**PARAMS, "kind": "wrong"}, lambda line: None)


def test_each_choice_of_weights_has_its_own_key():
    def key(**more):
        return weights_key(TrialConfig(**{"model": "resnet18", "optimizer": AdamW(lr=1), **more}))

    kinds = [{}, {"weights": None}, {"weights": "DEFAULT"}, {"model": "resnet34"}]
    assert len({key(**more) for more in kinds}) == len(kinds)
    assert key(epochs=3) == key(epochs=4)


# --- A run laid out, and its trials ---------------------------------------------------------------


def test_a_trial_assembled_from_the_run_directory_is_the_one_that_was_prepared(tmp_path, photos):
    space = make(tmp_path, {"plain": {}, "deep": {"freeze_depth": 5, "epochs": 9}})
    prepared, _ = prepared_of(space, photos, max_epochs=4, seed=3)
    run = create_run(tmp_path / "runs", None, space.name)
    lay_out(run, prepared.space, prepared.images, record_of(prepared, cpus_per_trial=2))
    assert run.space_file().read_text(encoding="utf-8") == space.text
    # From here on the run directory is all there is.
    space.path.write_text("def search_space(trial):\n    raise RuntimeError('edited since')\n")
    opened, record = open_run(run.path)
    for params in (PARAMS, {"kind": "deep", "lr": 1e-4}):
        config, trial_run = assemble(opened, record, "t0007", params, has_gpu=False)
        assert config == prepared.settings.applied_to(space.config(params))
        assert trial_run.images == prepared.images.sealed()
        assert trial_run.settings == prepared.settings
        assert trial_run.params == params
        assert trial_run.folder == run.path / "trials" / "t0007"
        assert (trial_run.weights_file, trial_run.weights_name) == (None, "random")
        assert (trial_run.num_threads, trial_run.has_gpu) == (2, False)
    assert config.epochs == 4
    assert assemble(opened, record, "t0007", PARAMS, has_gpu=True)[1].has_gpu


def test_the_embedded_data_come_back_from_a_run_directory_as_they_were(tmp_path):
    prepared, _ = prepared_of(make(tmp_path), "digits", seed=1)
    run = create_run(tmp_path, "run", "mine")
    lay_out(run, prepared.space, prepared.images, record_of(prepared))
    assert read_run_images(*open_run(run.path)) == prepared.images


def test_laying_out_writes_the_three_files_and_nothing_beside_them(tmp_path, photos):
    prepared, _ = prepared_of(make(tmp_path), photos)
    run = create_run(tmp_path, "run", "mine")
    lay_out(run, prepared.space, prepared.images, record_of(prepared))
    assert sorted(p.name for p in run.path.iterdir()) == ["run.json", "space.py", "split.csv"]


def test_a_run_goes_on_with_unchanged_images_only(tmp_path, make_photos):
    folder = make_photos(tmp_path / "photos", per_class=6)
    space = make(tmp_path)
    prepared, _ = prepared_of(space, folder)
    run = create_run(tmp_path, "run", "mine")
    lay_out(run, prepared.space, prepared.images, record_of(prepared))
    check_again(*open_run(run.path), space.branches())
    image = next(folder.rglob("*.png"))
    kept = tmp_path / "kept.png"
    shutil.move(image, kept)
    with pytest.raises(DataError, match=rf"1 of 18 images .*{image.name}; restore them"):
        check_again(*open_run(run.path), space.branches())
    shutil.move(kept, image)
    check_again(*open_run(run.path), space.branches())
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"1 of 18 images .* are missing or have changed"):
        check_again(*open_run(run.path), space.branches())


def test_a_run_without_its_split_cannot_be_read(tmp_path, photos):
    prepared, _ = prepared_of(make(tmp_path), photos)
    run = RunDir(tmp_path)
    lay_out(run, prepared.space, prepared.images, record_of(prepared))
    run.split_file.unlink()
    with pytest.raises(DataError, match=r"split\.csv cannot be read as a split"):
        assemble(*open_run(run.path), "t0001", PARAMS, has_gpu=False)


# --- Code of one's own ----------------------------------------------------------------------------


def uses(module, *fields):
    """Return `TrialConfig` keywords that name objects of a module."""
    named = {
        "model": f"{module}:build",
        "loss": OwnLoss(loss=f"{module}:loss"),
        "schedule": OwnSchedule(factor=f"{module}:factor"),
    }
    return {field: named[field] for field in fields}


@pytest.mark.parametrize("field", ["model", "loss", "schedule"])
def test_a_run_goes_on_with_unchanged_code_of_ones_own_only(tmp_path, photos, field):
    file = tmp_path / "my_code.py"
    file.write_text(OWN_CODE)
    space = make(tmp_path, {"plain": {}, "own": uses("my_code", field)})
    prepared, _ = prepared_of(space, photos)
    sha256 = hashlib.sha256(OWN_CODE.encode()).hexdigest()
    assert prepared.code == {str(file): sha256}

    run = laid_out(prepared, tmp_path / "runs")
    check_again(*open_run(run.path), space.branches())
    file.write_text(OWN_CODE + "# a remark\n")
    with pytest.raises(RunError) as caught:
        check_again(*open_run(run.path), space.branches())
    assert str(caught.value) == (
        f"{file} has changed since this run began; restore it, or begin a new run"
    )
    file.unlink()
    with pytest.raises(RunError, match=r"my_code\.py, which this run uses, cannot be read"):
        check_again(*open_run(run.path), space.branches())
    file.write_text(OWN_CODE)
    check_again(*open_run(run.path), space.branches())


def test_code_in_several_files_is_noted_file_by_file(tmp_path, photos):
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(OWN_CODE)
    (tmp_path / "my_losses.py").write_text(OWN_CODE)
    choices = {
        "net": uses("my_package.nets", "model", "schedule"),
        "loss": uses("my_losses", "loss"),
        "same": uses("mine", "model"),
    }
    prepared, _ = prepared_of(make(tmp_path, choices, more=OWN_CODE), photos)
    files = (package / "__init__.py", package / "nets.py", tmp_path / "my_losses.py")
    assert set(prepared.code) == {str(file) for file in files}


def test_what_ones_own_code_imports_is_noted_too(tmp_path, photos):
    (tmp_path / "my_width.py").write_text("WIDTH = 8\n")
    (tmp_path / "my_nets.py").write_text("from my_width import WIDTH\n" + OWN_CODE)
    prepared, _ = prepared_of(make(tmp_path, {"own": uses("my_nets", "model")}), photos)
    assert set(prepared.code) == {str(tmp_path / "my_nets.py"), str(tmp_path / "my_width.py")}
    run = laid_out(prepared, tmp_path / "runs")
    params = {"kind": "own", "lr": 1e-2}
    assemble(*open_run(run.path), "t0001", params, has_gpu=False)
    (tmp_path / "my_width.py").write_text("WIDTH = 9\n")
    with pytest.raises(RunError, match=r"my_width\.py has changed since this run began"):
        assemble(*open_run(run.path), "t0001", params, has_gpu=False)


def test_a_run_finds_the_modules_that_could_be_imported_where_it_began(tmp_path, photos):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my_nets.py").write_text(OWN_CODE)
    sys.path.append(str(elsewhere))  # as the working directory is
    space = make(tmp_path, {"own": uses("my_nets", "model", "loss", "schedule")})
    prepared, _ = prepared_of(space, photos)
    run = laid_out(prepared, tmp_path / "runs", import_from=(str(elsewhere),))

    # Another process, begun elsewhere.
    sys.path.remove(str(elsewhere))
    del sys.modules["my_nets"]
    params = {"kind": "own", "lr": 1e-2}
    config, trial_run = assemble(*open_run(run.path), "t0001", params, has_gpu=False)
    state = run_trial(config, trial_run, lambda row: None)
    assert type(state.model.network[3]) is nn.Linear
    assert sys.path[-1] == str(elsewhere)  # after everything that could be imported before


def test_a_network_in_the_space_itself_is_that_of_the_runs_copy(tmp_path, photos):
    space = make(tmp_path, {"own": uses("mine", "model", "schedule")}, more=OWN_CODE)
    prepared, _ = prepared_of(space, photos)
    assert prepared.code == {}  # the run has a copy
    run = laid_out(prepared, tmp_path / "runs")

    edited = space.text.replace("nn.Conv2d(3, 4, 3)", "nn.Conv2d(3, 4, 5)")
    space.path.write_text(edited.replace("1 / (1 + epoch)", "7.0"))
    SearchSpace.read(space.path)
    assert build_network("mine:build", 3)[0].kernel_size == (5, 5)
    config, trial_run = assemble(
        *open_run(run.path), "t0001", {"kind": "own", "lr": 1e-2}, has_gpu=False
    )
    check_again(*open_run(run.path), [])
    assert build_network(config.model, 3)[0].kernel_size == (3, 3)
    rows = []
    state = run_trial(config, trial_run, rows.append)
    assert state.model.network[0].kernel_size == (3, 3)
    assert [row["lr/3"] for row in rows] == pytest.approx([1e-2, 1e-2 / 2])


def test_a_space_of_a_run_may_import_what_lies_beside_it(tmp_path, photos):
    (tmp_path / "my_helper.py").write_text("EPOCHS = 7\n")
    space = make(tmp_path)
    text = space.text.replace("epochs=2", "epochs=my_helper.EPOCHS")
    space.path.write_text("import my_helper\n" + text)
    sys.path.append(str(tmp_path))
    prepared, _ = prepared_of(SearchSpace.read(space.path), photos)
    run = laid_out(prepared, tmp_path / "runs", import_from=(str(tmp_path),))
    sys.path.remove(str(tmp_path))
    del sys.modules["my_helper"]
    assert read_run_space(*open_run(run.path)).config(PARAMS).epochs == 7


# --- The model of a trial -------------------------------------------------------------------------


def validation_loss(model, config, images):
    """Score a model by hand, with torch alone."""
    preprocessing = preprocessing_of(config, images.native_size)
    store = open_store(images, preprocessing)
    batches = Batches(
        store,
        InOrder(store, "val"),
        view=evaluation_view(preprocessing),
        preprocessing=preprocessing,
        batch_size=3,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        losses = [
            -math.log(p[label])
            for pixels, labels in batches.epoch(1)
            for p, label in zip(model(pixels).double().softmax(dim=1), labels, strict=True)
        ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "keywords",
    [
        {"freeze_depth": 4},
        {"freeze_depth": 4, "ema_decay": 0.6},
        {"model": "mine:build", "ema_decay": 0.6},
        {"freeze_depth": 5, "unfreeze_at": {2: 4}, "channels_last": True},
        {"model": "squeezenet1_1", "freeze_depth": 2, "dropout": 0.3},
    ],
    ids=repr,
)
def test_the_model_of_a_trial_has_the_weights_that_its_best_epoch_was_validated_with(
    tmp_path, photos, keywords
):
    space = make(tmp_path, {"own": {"epochs": 3, **keywords}}, more=OWN_CODE)
    prepared, _ = prepared_of(space, photos)
    run = laid_out(prepared, tmp_path / "runs")
    params = {"kind": "own", "lr": 3e-2}
    config, trial_run = assemble(*open_run(run.path), "t0001", params, has_gpu=False)
    state = run_trial(config, trial_run, lambda row: None)
    with Ledger(run.ledger) as ledger:
        ledger.append("proposed", trial="t0001", origin="set", params=params, epochs=3)
    torch.manual_seed(5)
    model = load_model(run.path, "t0001")
    best = state.history[state.best_epoch - 1]
    assert not any(module.training for module in model.modules())
    loss = validation_loss(model, config, trial_run.images)
    assert loss == pytest.approx(best["val/loss"], rel=1e-4)
    if config.ema_decay is not None:
        trained = validation_loss(state.model.eval(), config, trial_run.images)
        assert trained != pytest.approx(loss, rel=1e-3)


def test_a_trial_without_a_checkpoint_has_no_model(tmp_path, photos):
    prepared, _ = prepared_of(make(tmp_path), photos)
    run = laid_out(prepared, tmp_path / "runs")
    with pytest.raises(CheckpointError, match="no intact best checkpoint"):
        load_model(run.path, "t0001")
    with pytest.raises(RunError, match="is not a run directory"):
        load_model(tmp_path, "t0001")
