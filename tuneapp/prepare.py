"""Check everything that can be checked before any compute is spent, and lay out a run.

A sweep and a single run begin here: the space is probed in every branch, models, stages and data
are looked up, weights are found, images are decoded. Only then is a run directory made.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneapp.checkpoint import read_best, validated_weights
from tuneapp.config import RunSettings, TrialConfig, is_reference
from tuneapp.data.source import ImageSet, read_images, read_split, require_unchanged, write_split
from tuneapp.data.store import Preprocessing, open_store
from tuneapp.errors import ConfigError, SpaceError
from tuneapp.fit import check_image_size, check_model
from tuneapp.losses import check_loss
from tuneapp.models import build_staged
from tuneapp.own import fingerprints, import_from, require_same_code
from tuneapp.rundir import RunDir, RunRecord, open_run, write_atomically, write_record
from tuneapp.schedules import check_schedule, check_steps
from tuneapp.space import Branch, SearchSpace
from tuneapp.staged import StagedModel
from tuneapp.training import TrialRun
from tuneapp.weights import (
    Found,
    find_weights,
    load_weights,
    preprocessing_of,
    require_same_weights,
)

log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A space, data and weights that fit together.

    Attributes:
        max_epochs: the longest training of any branch.
        weights: what each choice of weights came to, by `weights_key`.
        warnings: what the user should know before and after.
        code: files of the user's own networks, losses and schedules, and their SHA-256.
    """

    space: SearchSpace
    settings: RunSettings
    images: ImageSet
    weights: Mapping[str, Found]
    max_epochs: int
    warnings: tuple[str, ...]
    code: Mapping[str, str]


def prepare(
    space: SearchSpace, settings: RunSettings, branches: list[Branch], say: Say
) -> Prepared:
    """Check the branches of `space` against models, weights and data, and decode the images.

    Args:
        space: the search space.
        settings: where and how its trials will run.
        branches: what is to be checked: all of the space's, or the one that is to be trained.
        say: told what takes a while.

    Raises:
        SpaceError: some branch asks for what does not exist; every such mistake is named.
        DataError: the images cannot be used.
        WeightsError: weights that must be had cannot be had.
    """
    configs = [settings.applied_to(branch.config) for branch in branches]
    _refuse(space, (m for c in configs for m in (*check_model(c), *check_schedule(c))))
    images = read_images(settings.data, settings.seed)
    counts = {split: len(images.of(split)) for split in ("train", "val", "test")}
    say(
        f"data      {settings.data}: {len(images.classes)} classes; "
        + ", ".join(f"{count} {split}" for split, count in counts.items() if count)
    )
    _refuse(space, (m for c in configs for m in _mistakes_with(c, images)))
    found = {weights_key(c): find_weights(c.model, c.weights) for c in configs}
    _try_weights(configs, images, found, say)
    for preprocessing in _preprocessings(configs, images):
        size = preprocessing.crop_size
        say(f"images    seen at {size} x {size} pixels, decoded once for all trials")
        open_store(images, preprocessing)
    return Prepared(
        space=space,
        settings=settings,
        images=images,
        weights=found,
        max_epochs=max(c.epochs for c in configs),
        warnings=tuple(dict.fromkeys(f.warning for f in found.values() if f.warning)),
        code=fingerprints(
            [reference for c in configs for reference in _references(c)],
            [str(Path.cwd()), str(space.path.absolute().parent)],
        ),
    )


def prepare_one(
    space: SearchSpace, settings: RunSettings, params: Mapping[str, Any], say: Say
) -> tuple[Prepared, TrialConfig, TrialRun]:
    """Check one configuration, and return it with where and how it runs here, without a folder.

    Args:
        space: where the configuration comes from.
        settings: where and how it will run.
        params: a value for each parameter that the space asks for.
        say: told what takes a while.

    Raises:
        TuneappError: as `prepare` does.
    """
    branch = space.replay(params)
    prepared = prepare(space, settings, [branch], say)
    config = settings.applied_to(branch.config)
    found = prepared.weights[weights_key(config)]
    return (
        prepared,
        config,
        TrialRun(
            settings=settings,
            images=prepared.images,
            weights_file=None if found.file is None else Path(found.file),
            weights_name=found.name,
            num_threads=torch.get_num_threads(),
            has_gpu=torch.cuda.is_available() and settings.device != "cpu",
            params=params,
        ),
    )


def _mistakes_with(config: TrialConfig, images: ImageSet) -> list[str]:
    """Return what is wrong with a configuration for these images."""
    mistakes = check_loss(config.loss, len(images.classes), mixed=config.is_mixed)
    mistakes += check_steps(config, len(images.of("train")))
    try:
        size = preprocessing_of(config, images.native_size).crop_size
    except ConfigError as error:
        return [*mistakes, str(error)]
    return [*mistakes, *check_image_size(config, size)]


def _try_weights(
    configs: list[TrialConfig], images: ImageSet, found: Mapping[str, Found], say: Say
) -> None:
    """Load each file into each network that is to start from it, and say what fits."""
    tried = set()
    for config in configs:
        size = preprocessing_of(config, images.native_size).crop_size
        file = found[weights_key(config)].file
        attempt = (config.model, file, config.partial_weights, size)
        if file is None or attempt in tried:
            continue
        tried.add(attempt)
        network = build_staged(config, len(images.classes), size).network
        say(f"weights   {config.model}: {load_weights(network, config, Path(file))}")


def _refuse(space: SearchSpace, mistakes: Iterable[str]) -> None:
    """Raise all of these mistakes at once, each of them once, if there are any."""
    found = list(dict.fromkeys(mistakes))
    if found:
        raise SpaceError(f"{space.path}: " + "; ".join(found))


def lay_out(run: RunDir, space: SearchSpace, images: ImageSet, record: RunRecord) -> None:
    """Write everything into a new run directory but the ledger."""
    write_atomically(run.space_file, lambda aside: aside.write_text(space.text, encoding="utf-8"))
    write_split(run.split_file, images)
    write_record(run, record)


def read_run_space(run: RunDir, record: RunRecord) -> SearchSpace:
    """Return the space of a run: the copy, as if it still stood where the file did."""
    import_from(record.import_from)
    return SearchSpace(run.space_file.read_text(encoding="utf-8"), Path(record.space_path))


def read_run_images(run: RunDir, record: RunRecord) -> ImageSet:
    """Return the images of a run, split as they were when it began."""
    root = None if record.image_root is None else Path(record.image_root)
    return read_split(run.split_file, root, record.classes)


def check_again(run: RunDir, record: RunRecord, branches: list[Branch]) -> ImageSet:
    """Check that the images and weights of a run are still what they were; return the images.

    Raises:
        DataError: images have changed, or cannot be decoded.
        WeightsError: a file of weights has changed, or is gone.
        RunError: a file of the user's own code has changed, or is gone.
    """
    images = read_run_images(run, record)
    require_unchanged(images)
    require_same_code(record.code)
    for found in record.weights.values():
        require_same_weights(found)
    configs = [record.settings.applied_to(b.config) for b in branches]
    for preprocessing in _preprocessings(configs, images):
        open_store(images, preprocessing)
    return images


def assemble(
    run: RunDir, record: RunRecord, trial_id: str, params: Mapping[str, Any], *, has_gpu: bool
) -> tuple[TrialConfig, TrialRun]:
    """Return a trial of a run: its configuration, and where and how it runs."""
    config = record.settings.applied_to(read_run_space(run, record).config(params))
    require_same_code(record.code, _references(config))  # again: it can change while trials run
    found = record.weights.get(weights_key(config))
    if found is None:  # a choice between the ends of a range, which the probe did not see
        found = find_weights(config.model, config.weights).as_dict()
    return config, TrialRun(
        settings=record.settings,
        images=read_run_images(run, record),
        weights_file=None if found["file"] is None else Path(found["file"]),
        weights_name=found["name"],
        num_threads=record.cpus_per_trial,
        has_gpu=has_gpu,
        folder=run.trial(trial_id),
        params=params,
    )


def load_model(run_path: Path, trial_id: str) -> StagedModel:
    """Return the network of a trial with the weights of its best epoch, in `eval()` mode.

    `.network` is torchvision's own module, or yours. It wants images as the trial had them; the
    classes, in the order of the logits, are in the run's `run.json`.

    Raises:
        RunError: `run_path` is no run directory.
        CheckpointError: the trial has no intact checkpoint.
    """
    run, record = open_run(run_path)
    folder = run.trial(trial_id)
    content = read_best(folder / "checkpoints")
    params = json.loads((folder / "config.json").read_text(encoding="utf-8"))["params"]
    config, trial_run = assemble(run, record, trial_id, params, has_gpu=False)
    size = preprocessing_of(config, trial_run.images.native_size).crop_size
    model = build_staged(config, len(record.classes), size)
    model.load_state_dict(validated_weights(content))
    return model.eval()


def weights_key(config: TrialConfig) -> str:
    """Name a choice of weights within a run."""
    return f"{config.model} {config.weights}"


def first_trials(space: SearchSpace, branches: list[Branch]) -> list[dict[str, Any]]:
    """Return the space's FIRST_TRIALS, checked: known names, allowed values.

    Raises:
        SpaceError: one of them names a parameter that does not exist, or a value out of range.
    """
    known = {name: d for branch in branches for name, d in branch.distributions.items()}
    for number, params in enumerate(space.first_trials, start=1):
        try:
            unknown = [name for name in params if name not in known]
            if unknown:
                raise SpaceError(f"{unknown[0]!r} is no parameter; there are {', '.join(known)}")
            space.complete(params)
        except (SpaceError, ConfigError) as error:
            raise SpaceError(f"{space.path}: FIRST_TRIALS, number {number}: {error}") from None
    return space.first_trials


def _references(config: TrialConfig) -> list[str]:
    """Return the import paths of the user's own objects in a configuration."""
    named = [config.model, getattr(config.loss, "loss", ""), getattr(config.schedule, "factor", "")]
    return [reference for reference in named if is_reference(reference)]


def _preprocessings(configs: list[TrialConfig], images: ImageSet) -> list[Preprocessing]:
    wanted = (preprocessing_of(c, images.native_size) for c in configs)
    return list(dict.fromkeys(wanted))
