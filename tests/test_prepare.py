import shutil

import pytest

from tuneapp.config import AdamW, RunSettings, TrialConfig
from tuneapp.errors import DataError, SpaceError, WeightsError
from tuneapp.prepare import (
    assemble,
    check_again,
    first_trials,
    lay_out,
    prepare,
    read_run_images,
    weights_key,
)
from tuneapp.rundir import RunDir, RunRecord, create_run, open_run
from tuneapp.space import SearchSpace
from tuneapp.weights import Found

HEAD = """
from tuneapp.config import AdamW, Sgd, TrialConfig

FIRST_TRIALS = {first}


def search_space(trial):
    kind = trial.suggest_categorical("kind", {kinds})
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    given = dict(model="resnet18", weights=None, image_size=32, optimizer=AdamW(lr=lr), epochs=2)
    given |= {choices}[kind]
    return TrialConfig(**given)
"""
PARAMS = {"kind": "plain", "lr": 0.012345678901234567}


def make(tmp_path, choices=None, first=()):
    """Return a space with one branch per choice, each given as `TrialConfig` keywords."""
    choices = choices or {"plain": {}}
    text = HEAD.format(first=list(first), kinds=list(choices), choices=choices)
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    return SearchSpace.read(path)


def prepared_of(space, data, **settings):
    said = []
    run_settings = RunSettings(data=str(data), **settings)
    return prepare(space, run_settings, space.branches(), said.append), said


def record_of(prepared, **more):
    return RunRecord(
        kind="sweep",
        space_path=str(prepared.space.path),
        settings=prepared.settings,
        image_root=None if prepared.images.root is None else str(prepared.images.root),
        classes=prepared.images.classes,
        weights={key: found.as_dict() for key, found in prepared.weights.items()},
        warnings=prepared.warnings,
        **more,
    )


# --- FIRST_TRIALS ---------------------------------------------------------------------------------


def test_first_trials_that_fit_are_handed_on_as_they_are(tmp_path):
    listed = [{"kind": "plain"}, PARAMS, {}]
    space = make(tmp_path, first=listed)
    assert first_trials(space, space.branches()) == listed


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rl": 0.1}, "'rl' is no parameter; there are kind, lr"),
        ({"lr": 0.2}, "lr=0.2: allowed is 0.0001 to 0.1, log"),
        ({"lr": "fast"}, "lr='fast': allowed is 0.0001 to 0.1, log"),
        ({"kind": "fancy"}, "kind='fancy': allowed is plain | deep"),
    ],
)
@pytest.mark.parametrize("before", [0, 2])
def test_a_wrong_first_trial_is_named_by_its_number(tmp_path, wrong, said, before):
    listed = [*[PARAMS] * before, wrong, PARAMS]
    space = make(tmp_path, {"plain": {}, "deep": {"freeze_depth": 1}}, first=listed)
    with pytest.raises(SpaceError) as caught:
        first_trials(space, space.branches())
    message = str(caught.value)
    assert message.startswith(f"{space.path}: FIRST_TRIALS, number {before + 1}: ")
    assert said in message


def test_a_first_trial_with_a_value_of_another_branch_is_refused(tmp_path):
    space = SearchSpace(
        "from tuneapp.config import AdamW, Sgd, TrialConfig\n"
        "FIRST_TRIALS = [{'optimizer': 'sgd', 'adamw.lr': 0.01}]\n"
        "def search_space(trial):\n"
        "    kind = trial.suggest_categorical('optimizer', ['adamw', 'sgd'])\n"
        "    lr = trial.suggest_float(f'{kind}.lr', 1e-4, 1e-1)\n"
        "    made = AdamW(lr=lr) if kind == 'adamw' else Sgd(lr=lr)\n"
        "    return TrialConfig(model='resnet18', optimizer=made)\n",
        tmp_path / "space.py",
    )
    with pytest.raises(SpaceError, match=r"number 1: .*never asks for 'adamw\.lr' here"):
        first_trials(space, space.branches())


# --- What every branch asks for -------------------------------------------------------------------

MISTAKES = {
    "unknown model": ({"model": "resnet81"}, "model 'resnet81' is unknown; did you mean"),
    "model without stages": ({"model": "vgg11"}, "model 'vgg11' has no stages in tuneapp yet"),
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


def test_only_the_branches_that_are_to_be_trained_are_checked(tmp_path, photos):
    space = make(tmp_path, {"plain": {}, "wrong": {"model": "resnet81"}})
    settings = RunSettings(data=str(photos))
    prepared = prepare(space, settings, [space.replay(PARAMS)], lambda line: None)
    assert list(prepared.weights) == ["resnet18 None"]


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
    assert prepared.warnings == ()
    assert prepared.images.root == photos.resolve()
    assert len(prepared.images.examples) == 30
    counts = {s: len(prepared.images.of(s)) for s in ("train", "val", "test")}
    assert said == [
        f"data      {photos}: 3 classes; {counts['train']} train, {counts['val']} val, "
        f"{counts['test']} test",
        "images    seen at 32 x 32 pixels, decoded once for all trials",
    ]
    assert prepared_of(space, photos, max_epochs=3)[0].max_epochs == 3


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
    assert run.space_file.read_text(encoding="utf-8") == space.text
    # From here on the run directory is all there is.
    space.path.write_text("def search_space(trial):\n    raise RuntimeError('edited since')\n")
    opened, record = open_run(run.path)
    for params in (PARAMS, {"kind": "deep", "lr": 1e-4}):
        config, trial_run = assemble(opened, record, "t0007", params, has_gpu=False)
        assert config == prepared.settings.applied_to(space.config(params))
        assert trial_run.images == prepared.images
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
    with pytest.raises(DataError, match=rf"1 of 18 images .*{image.name}; put them back"):
        check_again(*open_run(run.path), space.branches())
    shutil.move(kept, image)
    check_again(*open_run(run.path), space.branches())
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"1 of 18 images .* are gone or have changed"):
        check_again(*open_run(run.path), space.branches())


def test_a_run_without_its_split_cannot_be_read(tmp_path, photos):
    prepared, _ = prepared_of(make(tmp_path), photos)
    run = RunDir(tmp_path)
    lay_out(run, prepared.space, prepared.images, record_of(prepared))
    run.split_file.unlink()
    with pytest.raises(DataError, match=r"split\.csv cannot be read as a split"):
        assemble(*open_run(run.path), "t0001", PARAMS, has_gpu=False)
