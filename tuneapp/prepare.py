"""Check everything that can be checked before any compute is spent, and lay out a run.

A sweep and a single run begin here: models, stages and data are looked up for every branch of the
space, weights are found, images are decoded. Only then is a run directory made.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneapp.checkpoint import read_best, validated_weights
from tuneapp.config import Data, RunSettings, TrialConfig, is_reference
from tuneapp.data.examples import ImageSet
from tuneapp.data.findings import Finding, cheap_findings
from tuneapp.data.making import Watch
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.sampling import Shuffled
from tuneapp.data.source import read_images
from tuneapp.data.split import (
    read_split,
    require_unchanged,
    require_usable,
    write_bad_images,
    write_split,
)
from tuneapp.data.store import (
    Store,
    checked_apart,
    open_store,
    require_repeatable,
    require_same_pixels,
)
from tuneapp.data.views import check_augment
from tuneapp.errors import ConfigError, DataError, RunError, SpaceError
from tuneapp.fit import check_image_size, check_model
from tuneapp.ledger import read_events
from tuneapp.losses import check_loss
from tuneapp.metrics import metric_names
from tuneapp.models import build_staged
from tuneapp.own import fingerprints, import_from, require_same_code
from tuneapp.records import read_records
from tuneapp.rundir import (
    RunDir,
    RunRecord,
    open_run,
    require_own,
    write_atomically,
    write_record,
)
from tuneapp.schedules import check_schedule, check_steps, idle_choices
from tuneapp.space import Branch, SearchSpace, difference
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


def _unwatched(what: str, done: int, total: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A space, data and weights that fit together.

    Attributes:
        max_epochs: the longest training of any branch.
        weights: what was found for each choice of weights, by `weights_key`.
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
    space: SearchSpace,
    settings: RunSettings,
    branches: list[Branch],
    say: Say,
    watch: Watch = _unwatched,
    images: ImageSet | None = None,
) -> Prepared:
    """Check the branches of `space` against models, weights and data, and decode the images.

    Args:
        space: the search space.
        settings: where and how its trials will run.
        branches: what to check: all of the space's, or the one that will be trained.
        say: called with each line about what was found.
        watch: called with the progress of decoding the images.
        images: of a run that is resumed; None reads those of the settings.

    Raises:
        SpaceError: some branch asks for what does not exist; every such mistake is named.
        DataError: the images cannot be used.
        WeightsError: required weights are not available.
    """
    configs = [settings.applied_to(branch.config) for branch in branches]
    _refuse(space, branches, ([*check_model(c), *check_schedule(c)] for c in configs))
    images = images or _read_images(space, settings)
    for line in data_lines(images):
        say(line)
    _require_metric(settings, images)
    _refuse(space, branches, (_mistakes_with(c, images) for c in configs))
    wanted = {weights_key(c): c for c in configs}
    found = {key: find_weights(c.model, c.weights) for key, c in wanted.items()}
    _try_weights(configs, images, found, say)
    images, findings = _decode(configs, images, settings, say, watch)
    _refuse(space, branches, _sampling_mistakes(configs, images, settings))
    return Prepared(
        space=space,
        settings=settings,
        images=images,
        weights=found,
        max_epochs=max(c.epochs for c in configs),
        warnings=tuple(
            dict.fromkeys(
                [f.warning for f in found.values() if f.warning]
                + _warnings(findings)
                + idle_choices(configs)
            )
        ),
        code=fingerprints(
            [reference for c in configs for reference in _references(c)]
            + ([settings.data.source] if settings.data.is_own else []),
            [str(Path.cwd()), str(space.path.absolute().parent)],
        ),
    )


def _read_images(space: SearchSpace, settings: RunSettings) -> ImageSet:
    """Read the images of the settings; errors name DATA and not a flag where it is from there."""
    try:
        return read_images(settings.data, settings.seed)
    except (DataError, ConfigError) as error:
        found = re.match(r"--([a-z-]+) ", str(error))
        field = "source" if found and found[1] == "data" else found and found[1].replace("-", "_")
        wanted = getattr(space.data, field or "", None)
        if not found or not wanted or space.data == Data():
            raise
        given = getattr(settings.data, str(field))
        if given not in (wanted, str(Path(wanted).expanduser().absolute())):
            raise
        said = str(error)[found.end() :]
        raise type(error)(f"DATA in {space.path}: {field} {said}") from None


def data_lines(images: ImageSet) -> list[str]:
    """Return how the data were understood."""
    kind = " that may be present together" if images.is_multilabel else ""
    parts = {split: len(images.of(split)) for split in ("train", "val", "test")}
    if images.num_folds:
        parts = {f"in {images.num_folds} folds": parts["train"], "test": parts["test"]}
    counted = ", ".join(f"{count} {split}" for split, count in parts.items() if count)
    lines = [f"data      {images.data.source}: {len(images.classes)} classes{kind}; {counted}"]
    return lines + [f"          {note}" for note in images.notes]


def _require_metric(settings: RunSettings, images: ImageSet) -> None:
    names = metric_names(images.classes, images.is_multilabel)
    if settings.metric not in names:
        shown = [name for name in names if not name.startswith("val/recall/")]
        raise ConfigError(
            f"--metric {settings.metric}: these data have {', '.join(shown)}, and val/recall/ of "
            f"{', '.join(images.classes[:5])}{' ...' if len(images.classes) > 5 else ''}"
        )


def _decode(
    configs: list[TrialConfig], images: ImageSet, settings: RunSettings, say: Say, watch: Watch
) -> tuple[ImageSet, list[Finding]]:
    """Decode the images for every preprocessing; return them with their state, and findings."""
    stores: list[Store] = []
    require_repeatable(images)
    for preprocessing in _preprocessings(configs, images):
        store = open_store(images, preprocessing, settings.store_budget, watch)
        size = preprocessing.crop_size
        how = (
            "decoded at each use: they are more than the store's budget"
            if store.is_streamed
            else "decoded once for all trials"
        )
        say(f"images    seen at {size} x {size} pixels, {how}")
        stores.append(store)
    for store in stores:
        images = store.stamped(images)
    images = checked_apart(images, _preprocessings(configs, images)[0], "test", watch)
    require_usable(images)
    findings = cheap_findings(images)
    for finding in findings:
        if finding.kind == "unreadable":
            say(f"unread    {finding.words}{_policy(images)}")
    return images, findings


def _sampling_mistakes(
    configs: list[TrialConfig], images: ImageSet, settings: RunSettings
) -> list[list[str]]:
    """Return for each configuration what is wrong with its sampling of the readable images."""
    preprocessing = _preprocessings(configs, images)[0]
    folds = [images.fold(number) for number in range(1, images.num_folds + 1)] or [images]
    stores = [open_store(part, preprocessing, settings.store_budget) for part in folds]
    substitute = settings.data.bad_images == "substitute"
    drawn: dict[tuple[str, bool, int | None], int] = {}
    for config in configs:
        way = _sampled(config)
        if way not in drawn:
            try:
                drawn[way] = min(
                    Shuffled(store, config, settings.seed, substitute).num_examples
                    for store in stores
                )
            except ConfigError as error:
                return [[str(error)] if _sampled(other) == way else [] for other in configs]
    return [check_steps(c, drawn[_sampled(c)]) for c in configs]


def _sampled(config: TrialConfig) -> tuple[str, bool, int | None]:
    return config.sampling, config.replacement, config.num_samples


def _warnings(findings: Iterable[Finding]) -> list[str]:
    """Return what the user should know about the data before and after."""
    return [
        finding.words
        for finding in findings
        if finding.kind != "unreadable"  # reported separately, with its names
        and (finding.is_serious or finding.kind in ("not images", "tiny classes"))
    ]


def _policy(images: ImageSet) -> str:
    if images.data.bad_images == "substitute":
        return "; in training, others of their class take their places"
    return "; they are excluded"


def prepare_one(
    space: SearchSpace,
    settings: RunSettings,
    params: Mapping[str, Any],
    say: Say,
    watch: Watch = _unwatched,
) -> tuple[Prepared, TrialConfig, TrialRun]:
    """Check one configuration, and return it with where and how it runs here, without a folder.

    Args:
        space: where the configuration comes from.
        settings: where and how it will run.
        params: a value for each parameter that the space asks for.
        say: called with each line about what was found.
        watch: called with the progress of decoding the images.

    Raises:
        TuneappError: as `prepare` does.
    """
    branch = space.replay(params)
    prepared = prepare(space, settings, [branch], say, watch)
    config = settings.applied_to(branch.config)
    found = prepared.weights[weights_key(config)]
    return (
        prepared,
        config,
        TrialRun(
            settings=settings,
            images=_first_fold(prepared.images.sealed()),
            weights_file=None if found.file is None else Path(found.file),
            weights_name=found.name,
            num_threads=torch.get_num_threads(),
            has_gpu=torch.cuda.is_available() and settings.device != "cpu",
            params=params,
        ),
    )


def _mistakes_with(config: TrialConfig, images: ImageSet) -> list[str]:
    """Return what is wrong with a configuration for these images."""
    mistakes = check_loss(
        config.loss,
        len(images.classes),
        mixed=config.is_mixed,
        is_multilabel=images.is_multilabel,
    )
    trained = _first_fold(images).of("train")
    mistakes += check_steps(config, config.num_samples or len(trained))
    try:
        size = preprocessing_of(config, images.native_size).crop_size
    except ConfigError as error:
        return [*mistakes, str(error)]
    mistakes += check_image_size(config, size, len(images.classes))
    return [*mistakes, *check_augment(config.augment, size)]


def _first_fold(images: ImageSet) -> ImageSet:
    return images.fold(1) if images.num_folds else images


def _try_weights(
    configs: list[TrialConfig], images: ImageSet, found: Mapping[str, Found], say: Say
) -> None:
    """Load each file into each network that will start from it, and say what fits."""
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


def _refuse(space: SearchSpace, branches: list[Branch], mistakes: Iterable[list[str]]) -> None:
    """Raise all mistakes at once, each one once, with the values that lead there.

    Args:
        space: where they are.
        branches: all that were checked.
        mistakes: of each branch.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for branch, of_branch in zip(branches, mistakes, strict=True):
        for mistake in of_branch:
            found.setdefault(mistake, []).append(branch.params)
    if found:
        everywhere = [branch.params for branch in branches]
        said = [f"{words}{difference(inside, everywhere)}" for words, inside in found.items()]
        raise SpaceError(f"{space.path}: " + "; ".join(said))


def lay_out(run: RunDir, space: SearchSpace, images: ImageSet, record: RunRecord) -> None:
    """Write everything except the ledger into a new run directory."""
    write_space(run, space)
    write_split(run.split_file, images)
    write_bad_images(run.bad_images_file, images)
    write_record(run, record)


def write_space(run: RunDir, space: SearchSpace, number: int = 1) -> None:
    """Write the run's copy of a space."""
    write_atomically(
        run.space_file(number), lambda aside: aside.write_text(space.text, encoding="utf-8")
    )


def read_run_space(run: RunDir, record: RunRecord, number: int = 1) -> SearchSpace:
    """Return a space of a run: the copy, as if it were still at the path of the file.

    Args:
        run: the run directory.
        record: of the run.
        number: which space, from 1; more than 1 after it was refined.

    Raises:
        RunError: the copy belongs to another user: it is code, and would run as you.
    """
    file = run.space_file(number)
    require_own(file)
    import_from(record.import_from)
    return SearchSpace(file.read_text(encoding="utf-8"), Path(record.space_paths[number - 1]))


def read_run_images(run: RunDir, record: RunRecord) -> ImageSet:
    """Return the images of a run, split as they were when it began."""
    root = None if record.image_root is None else Path(record.image_root)
    return read_split(
        run.split_file, root, record.classes, record.settings.data, record.is_multilabel
    )


def check_again(
    run: RunDir, record: RunRecord, branches: list[Branch], watch: Watch = _unwatched
) -> ImageSet:
    """Check that the images and weights of a run have not changed; return the images.

    Raises:
        DataError: images have changed, or cannot be decoded.
        WeightsError: a file of weights has changed or is missing.
        RunError: a file of user-defined code has changed or is missing.
    """
    images = read_run_images(run, record)
    require_unchanged(images)
    require_same_pixels(images)
    require_same_code(record.code)
    for found in record.weights.values():
        require_same_weights(found)
    configs = [record.settings.applied_to(b.config) for b in branches]
    for preprocessing in _preprocessings(configs, images):
        open_store(images, preprocessing, record.settings.store_budget, watch)
    return images


def assemble(
    run: RunDir,
    record: RunRecord,
    trial_id: str,
    params: Mapping[str, Any],
    *,
    has_gpu: bool,
    space: int = 1,
) -> tuple[TrialConfig, TrialRun]:
    """Return a trial of a run: its configuration, and where and how it runs.

    Args:
        run: the run directory.
        record: of the run.
        trial_id: names the trial's folder.
        params: its sampled values.
        has_gpu: whether it gets a GPU.
        space: number of the run's space that the values belong to.
    """
    config = record.settings.applied_to(read_run_space(run, record, space).config(params))
    require_same_code(record.code, _references(config))  # again: it can change while trials run
    found = record.weights.get(weights_key(config))
    if found is None:  # it depends on a number between the ends of a range, which were probed
        found = find_weights(config.model, config.weights).as_dict()
    return config, TrialRun(
        settings=record.settings,
        images=read_run_images(run, record).sealed(),
        weights_file=None if found["file"] is None else Path(found["file"]),
        weights_name=found["name"],
        num_threads=record.cpus_per_trial,
        has_gpu=has_gpu,
        folder=run.trial(trial_id),
        frozen_folder=run.frozen,
        min_free=record.min_free,
        params=params,
    )


def load_model(run_path: Path, trial_id: str, fold: int | None = None) -> StagedModel:
    """Return the network of a trial with the weights of its best epoch, in `eval()` mode.

    Args:
        run_path: the run directory.
        trial_id: such as `t0007`.
        fold: of a run with folds, which fold's model, from 1.

    `.network` is torchvision's own module, or yours. It expects images preprocessed as in the
    trial; the classes, in the order of the logits, are in the run's `run.json`.

    Raises:
        RunError: `run_path` is not a run directory.
        CheckpointError: the trial has no intact checkpoint.
    """
    run, record = open_run(run_path)
    folder = run.trial(trial_id)
    if (fold is None) != (record.settings.data.folds is None):
        raise RunError(f"{run_path}: give fold= for a run with folds, and only there")
    content = read_best((folder / f"fold{fold}" if fold else folder) / "checkpoints")
    trials = read_records(read_events(run.ledger))
    if trial_id not in trials:
        raise RunError(f"{run_path} has no trial {trial_id}; it has {', '.join(trials) or 'none'}")
    trial = trials[trial_id]
    config, trial_run = assemble(
        run, record, trial_id, trial.params, has_gpu=False, space=trial.space
    )
    size = preprocessing_of(config, trial_run.images.native_size).crop_size
    model = build_staged(config, len(record.classes), size)
    model.load_state_dict(validated_weights(content))
    return model.eval()


def weights_key(config: TrialConfig) -> str:
    """Name a choice of weights within a run."""
    return f"{config.model} {config.weights}"


def _references(config: TrialConfig) -> list[str]:
    """Return the import paths of user-defined objects in a configuration."""
    named = [
        config.model,
        config.augment,
        getattr(config.loss, "loss", ""),
        getattr(config.schedule, "factor", ""),
    ]
    return [reference for reference in named if is_reference(reference)]


def _preprocessings(configs: list[TrialConfig], images: ImageSet) -> list[Preprocessing]:
    wanted = (preprocessing_of(c, images.native_size) for c in configs)
    return list(dict.fromkeys(wanted))
