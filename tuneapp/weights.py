"""Pretrained weights: which are meant, which tensors fit, and how their images were prepared.

`fetch.py` downloads them, `statedict.py` reads them: tensors only, never code.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from tuneapp.checkpoint import MANIFEST, best_file
from tuneapp.config import TrialConfig
from tuneapp.data.pixels import Preprocessing
from tuneapp.errors import CheckpointError, ConfigError, WeightsError, did_you_mean
from tuneapp.fetch import cached_or_fetched, sha256_of
from tuneapp.models import find_family
from tuneapp.staged import StagedModel
from tuneapp.statedict import (
    LoadReport,
    State,
    compare,
    is_counter,
    match_names,
    read_state_dict,
    with_interpolated_positions,
)
from tuneapp.timm_models import (
    TimmWeights,
    is_timm,
    translated,
    usual_preprocessing,
    weights_of,
)

log = logging.getLogger(__name__)

AUTO_LIMIT_S = 60.0
"""Seconds after which `auto` gives up a download; `DEFAULT` and other names wait for the end."""

_IMAGENET = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# A file that fits less than this belongs to another network. resnet34's file has all that resnet18
# needs, and as much again; of torchvision's related networks, resnet152's file for resnet101 fits
# best, with 67 % of its tensors.
_LEAST_OF_NETWORK = 0.5
_LEAST_OF_FILE = 0.75


@dataclass(frozen=True)
class Found:
    """The file that a choice of weights stands for on this machine.

    Attributes:
        asked: as written in the space.
        file: the state_dict file; None for random weights.
        name: torchvision's or timm's name of the weights, or `file`, `checkpoint` or `random`.
        sha256: of the file.
        warning: what the user should know, or an empty text.
    """

    asked: str | None
    file: str | None
    name: str
    sha256: str | None = None
    warning: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Named:
    """Weights that torchvision or timm knows by name.

    Attributes:
        name: in full, with the network.
        url: where the file is.
        preprocessing: what they are evaluated with.
        warning: what the user should know, or an empty text.
        file_name: what the file is called in the cache; None is as in the address.
        cached: where another cache of this machine has it; None if none has.
    """

    name: str
    url: str
    preprocessing: Preprocessing
    warning: str = ""
    file_name: str | None = None
    cached: Path | None = None

    def found(self, asked: str, limit_s: float | None) -> Found:
        """Return the file, downloaded once where that is needed.

        Raises:
            WeightsError: it is not available.
        """
        file = self.cached or cached_or_fetched(self.url, limit_s, self.file_name)
        return _found(asked, file, self.name, self.warning)


def find_weights(model: str, asked: str | None) -> Found:
    """Return the weights that `asked` stands for, downloading them once where that is needed.

    Args:
        model: as in `TrialConfig.model`.
        asked: as in `TrialConfig.weights`. A trial's folder stands for its best checkpoint.

    Raises:
        WeightsError: they are not available; the message says where to put the file.
    """
    named = _named(model)
    if asked is None or (asked == "auto" and not named):
        return Found(asked, None, "random")
    if asked == "auto":
        try:
            return named["DEFAULT"].found(asked, AUTO_LIMIT_S)
        except WeightsError as error:
            warning = f"{model} starts from RANDOM weights, not pretrained ones: {error}"
            return Found(asked, None, "random", warning=warning)
    if "://" in asked:
        raise WeightsError(
            f"weights {asked!r}: a URL is not accepted: download the file and give its path"
        )
    if _tag(asked, named) not in named:
        path = _path(asked)
        if path.is_file():
            return _found(asked, path.resolve(), "file")
        if path.is_dir():
            return _found(asked, _best_checkpoint(path.resolve(), asked), "checkpoint")
        if (path.suffix or "/" in asked) and not re.fullmatch(r"\w+_Weights\.\w+", asked):
            raise WeightsError(f"weights {asked!r}: no such file or folder")
    return _require_named(model, asked).found(asked, limit_s=None)


def _path(asked: str) -> Path:
    """Return the file or folder that a text may mean, whether or not it is there."""
    try:
        path = Path(asked).expanduser()
        path.is_file()
    except (RuntimeError, OSError) as error:  # no such user; too long a name
        cause = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"weights {asked[:100]!r}: {cause}") from None
    return path


def require_same_weights(found: Mapping[str, Any]) -> None:
    """Check that the file of a `Found`, as plain values, is unchanged.

    Raises:
        WeightsError: it is missing, or has changed.
    """
    if found["file"] is None:
        return
    try:
        same = sha256_of(Path(found["file"])) == found["sha256"]
    except OSError as error:
        raise WeightsError(f"weights {found['file']} cannot be read: {error.strerror}") from None
    if not same:
        raise WeightsError(
            f"weights {found['file']} have changed since this run began; restore them"
        )


def _found(asked: str, file: Path, name: str, warning: str = "") -> Found:
    return Found(asked, str(file), name, sha256_of(file), warning)


def _best_checkpoint(folder: Path, asked: str) -> Path:
    """Return the best checkpoint of a trial, given its folder or the `checkpoints` in it."""
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not (folder / MANIFEST).exists():
        raise WeightsError(
            f"weights {asked!r}: no checkpoint of a trial in this folder; give a file, or a "
            "folder such as runs/NAME/trials/t0001"
        )
    try:
        return best_file(folder)
    except CheckpointError as error:
        raise WeightsError(f"weights {asked!r}: {error}") from None


def _named(model: str) -> dict[str, _Named]:
    """Return the weights for `model` that have names; a custom network has none."""
    if is_timm(model):
        return {
            tag: _Named(w.name, w.url, w.preprocessing, _crop_warning(w), w.file_name, w.cached)
            for tag, w in weights_of(model).items()
        }
    if find_family(model) is None:
        return {}
    entries = torchvision.models.get_model_weights(model)
    return {
        name: _Named(str(entry), str(entry.url), _of_preset(entry.transforms()))
        for name, entry in [*entries.__members__.items(), ("DEFAULT", entries.DEFAULT)]
    }


def _tag(asked: str, named: Mapping[str, _Named]) -> str:
    """Return the short name of weights that are called in full, as `Found.name` is, or `asked`."""
    return next((tag for tag, weights in named.items() if weights.name == asked), asked)


def _of_preset(preset: Any) -> Preprocessing:
    """Return the preprocessing of a preset of torchvision, an `ImageClassification`."""
    return Preprocessing(
        resize_size=preset.resize_size[0],
        crop_size=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _crop_warning(weights: TimmWeights) -> str:
    if weights.crop_mode == "center":
        return ""
    return (
        f"timm evaluates {weights.name} with crop_mode={weights.crop_mode!r}, on the whole image; "
        "tuneapp crops the centre, so the edges of an image that is not square are not seen"
    )


def _require_named(model: str, name: str) -> _Named:
    named = _named(model)
    name = _tag(name, named)
    if not named and is_timm(model):
        raise WeightsError(
            f"weights {name!r}: timm has none for {model}; give None or 'auto' (random weights), a "
            "file, or the folder of a trial"
        )
    if not named:
        raise WeightsError(
            f"weights {name!r}: there are none by name for a custom network ({model}); give None "
            "or 'auto' (random weights), a file, or the folder of a trial"
        )
    if name not in named:
        raise WeightsError(
            f"weights {name!r} of {model} are unknown{_did_you_mean(name, named)}; known: "
            f"{', '.join(named)}, 'auto', None, or the path of a file or of a trial's folder"
        )
    return named[name]


def _did_you_mean(name: str, named: Mapping[str, _Named]) -> str:
    in_full = [weights.name for weights in named.values()]
    return did_you_mean(name, in_full if "." in name else named)


def preprocessing_of(config: TrialConfig, native_size: int | None) -> Preprocessing:
    """Return how images are prepared for a configuration's weights.

    Named weights have an evaluation preprocessing of their own; the folder of a trial has that
    trial's. Random weights and files use that of the model's default weights, and ImageNet's usual
    one for a custom network. Another image size keeps the proportion of resize to crop.
    `config.preprocess` overrides all of these.

    Args:
        config: its model, weights, image size and preprocessing are used.
        native_size: size of data that come in one small size, used where `image_size` is None.

    Raises:
        ConfigError: images would be resized to less than what is then cropped from them.
    """
    base, asked = _evaluated_with(config), config.preprocess
    size = config.image_size or native_size or base.crop_size
    if size == base.crop_size:
        resize = base.resize_size
    elif native_size is not None:  # scans of one size, framed already: nothing is cropped away
        resize = size
    else:
        resize = max(size, round(size * base.resize_size / base.crop_size))
    if asked.resize_size is not None:
        resize = asked.resize_size
    if resize < size:
        raise ConfigError(
            f"preprocess.resize_size {resize} is smaller than the {size} x {size} pixels that are "
            f"cropped from the resized image; give at least {size}, or a smaller image_size"
        )
    mean, std = asked.mean or base.mean, asked.std or base.std
    return Preprocessing(
        resize_size=resize,
        crop_size=size,
        interpolation=asked.interpolation or base.interpolation,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def _evaluated_with(config: TrialConfig) -> Preprocessing:
    named = _named(config.model)
    tag = None if config.weights is None else _tag(config.weights, named)
    if config.weights is not None and tag not in named:
        theirs = _trained_with(Path(config.weights).expanduser())
        if theirs is not None:
            return theirs
    if tag in named:
        return named[tag].preprocessing
    if is_timm(config.model):
        return usual_preprocessing(config.model)
    return named["DEFAULT"].preprocessing if named else _IMAGENET


def _trained_with(folder: Path) -> Preprocessing | None:
    """Return how a trial's images were prepared, given its folder or the `checkpoints` in it."""
    for place in (folder, folder.parent):
        try:
            plain = json.loads((place / "config.json").read_text(encoding="utf-8"))
            values = plain["preprocessing"]
            colours = {name: tuple(values[name]) for name in ("mean", "std")}
            return Preprocessing(**{**values, **colours})
        except (OSError, ValueError, TypeError, KeyError):
            continue  # no trial's folder, or one from before this was recorded
    return None


def load_weights(network: nn.Module, config: TrialConfig, file: Path) -> LoadReport:
    """Load the tensors in `file` into `network`, except a head of another size.

    Heads are the last layer and auxiliary classifiers, or the last stage of a custom network.

    Args:
        network: that of `config.model`, with random weights; unchanged if there is an error.
        config: its model and `partial_weights` are used.
        file: see `read_state_dict`.

    Raises:
        WeightsError: the file is damaged, is not a state_dict, or holds values that are not finite;
            nothing of it fits; or, without `partial_weights`, it belongs to another network:
            backbone tensors have another shape or kind of numbers, less than half of the backbone
            fits, or more than a quarter of the file is not part of the backbone.
    """
    try:
        changed_ns = file.stat().st_mtime_ns
    except OSError as error:
        raise WeightsError(f"weights {file} cannot be read: {error.strerror}") from None
    whole = network.state_dict()
    own = {name: tensor for name, tensor in whole.items() if isinstance(tensor, Tensor)}
    named = match_names(own, read_state_dict(file, changed_ns))
    state = translated(network, named) if is_timm(config.model) else named
    state = with_interpolated_positions(network, state)
    resized = (n for n, t in named.items() if n in state and state[n].numel() != t.numel())
    report = compare(own, state, interpolated=tuple(resized))
    share = _require_fit(own, state, report, _heads(network, config), config, file)
    # Update the network's own state_dict: it has the version numbers that some layers check.
    whole.update({name: state[name] for name in report.loaded})
    network.load_state_dict(whole)
    if share < 1:
        log.warning("%s fits %.0f %% of %s's backbone: %s", file, 100 * share, config.model, report)
    log.info("weights %s: %s", file, report)
    return report


def _heads(network: nn.Module, config: TrialConfig) -> tuple[str, ...]:
    """Return the prefixes of the names of tensors that may have another size."""
    family = find_family(config.model)
    if family is not None:
        return tuple(f"{name}." for name in family.heads)
    last = set(StagedModel(network).stages[-1].module.modules())
    return tuple(f"{name}." for name, module in network.named_modules() if module in last)


def _require_fit(
    own: State,
    state: State,
    report: LoadReport,
    heads: tuple[str, ...],
    config: TrialConfig,
    file: Path,
) -> float:
    """Return the share of the backbone that the file has; refuse another network's file."""
    backbone = {n: t for n, t in own.items() if not n.startswith(heads) and not is_counter(n)}
    counted = backbone or own  # a network of a single stage is all head
    fitting = [counted[name] for name in report.loaded if name in counted]
    strange = [
        state[name]
        for name in report.unexpected
        if not name.startswith(heads) and not is_counter(name)
    ]
    share = _share(fitting, list(counted.values()))
    of_file = _share(fitting, fitting + strange)
    fit = f"{file} fits {share:.0%} of {config.model}'s backbone"
    if not fitting:
        raise WeightsError(
            f"{fit}: it belongs to another network ({report}); give weights of {config.model}, or "
            "None for random ones"
        )
    unfit = any(name in backbone for name in report.other_shape + report.other_kind)
    if config.partial_weights or not (
        share < _LEAST_OF_NETWORK or of_file < _LEAST_OF_FILE or unfit
    ):
        return share
    if share >= _LEAST_OF_NETWORK and of_file < _LEAST_OF_FILE:
        fit += f", which is {of_file:.0%} of the file"
    raise WeightsError(
        f"{fit}: it belongs to another network ({report}); to load the tensors that fit anyway, "
        "set partial_weights=True"
    )


def _share(part: list[Tensor], whole: list[Tensor]) -> float:
    """Return the share of the parameters or of the tensors, whichever is less.

    The dense layers of a VGG are nine tenths of its parameters, whatever its convolutions are.
    """
    parameters = sum(t.numel() for t in part) / max(sum(t.numel() for t in whole), 1)
    return min(parameters, len(part) / max(len(whole), 1))
