"""timm's networks, by the optional extra `[timm]`: built, cut into stages, with their weights.

Stages are what timm's own group matchers say, coarsely: they exist for layer-wise learning rates,
name every parameter's group, and keep the groups in order from stem to head. Everything of timm
that tuneapp uses is in this file.

Source: R. Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
"""

import importlib
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuneapp.data.pixels import Preprocessing
from tuneapp.errors import ConfigError, did_you_mean
from tuneapp.families import Beside, Family

log = logging.getLogger(__name__)

PREFIX = "timm:"

_OWN = "return it from a function of your own: model='package.module:build'"

_OF_FOREIGN_FILES = (
    *(KeyError, IndexError, AttributeError, TypeError, ValueError),
    *(RuntimeError, AssertionError),
)
"""What timm's filters raise for files of other networks."""

_SAFETENSORS = "model.safetensors"
"""What the file is called in nearly every repository of timm's weights."""


@dataclass(frozen=True)
class TimmWeights:
    """Weights that timm knows by name.

    Attributes:
        name: of network and weights, such as `resnet50d.ra2_in1k`.
        url: where the file is.
        file_name: what it is called in the cache of downloads.
        cached: where the Hugging Face cache has it already; None if it has not.
        preprocessing: what timm evaluates them with, but for its `crop_mode`.
        crop_mode: timm's: `center`; `squash`, whose images lose their proportions; or `border`,
            whose images get a frame.
    """

    name: str
    url: str
    file_name: str
    cached: Path | None
    preprocessing: Preprocessing
    crop_mode: str


def is_timm(model: str) -> bool:
    """Whether `model` is written like `timm:resnet50d`."""
    return model.startswith(PREFIX)


@lru_cache(maxsize=128)
def find_timm(model: str) -> Family:
    """Return how a network of timm's is cut into stages.

    Raises:
        ConfigError: timm is not installed, or has no such network.
    """
    timm = _timm(model)
    name, dot, tag = model.removeprefix(PREFIX).partition(".")
    if not timm.is_model(name):
        raise ConfigError(
            f"model {model!r}: timm {timm.__version__} has no {name!r}"
            f"{did_you_mean(name, timm.list_models())}; timm.list_models('*{name[:6]}*') lists "
            "those of such names"
        )
    if dot:
        raise ConfigError(
            f"model {model!r}: the network and its weights are two fields; write "
            f"model='{PREFIX}{name}', weights={tag!r}"
        )
    config = timm.get_pretrained_cfg(name)
    if config is None:  # it was renamed or removed, or somebody registered it without
        raise ConfigError(f"model {model!r}: {_instead(name)}")
    heads = config.classifier or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    # A head for distillation, where there is one; timm does not name that of some LeViTs.
    beside = [re.sub(r"^head(?=\.|$)", "head_dist", head) for head in heads]
    heads = tuple(dict.fromkeys([*heads, *beside]))
    return Family(partial(_stages, model, heads), heads, is_chain=False)


def build_timm(
    model: str,
    num_classes: int,
    image_size: int | None = None,
    *,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
) -> nn.Module:
    """Return a network of timm's with random weights and a head for `num_classes`.

    The draws come from torch's global generator: seed it before.

    Args:
        model: such as `timm:resnet50d`.
        num_classes: size of the head.
        image_size: pixels, for networks that are made for one size; None is their usual one.
        dropout: timm's `drop_rate`; None leaves the network's own.
        stochastic_depth: timm's `drop_path_rate`; None leaves the network's own.

    Raises:
        ConfigError: there is no such network, or it takes one of these not.
    """
    find_timm(model)
    timm, name = _timm(model), model.removeprefix(PREFIX)
    options: dict[str, Any] = {}
    if dropout is not None:
        options["drop_rate"] = dropout
    if stochastic_depth is not None:
        # At 0, most networks are built without such layers, and none could be read back.
        options["drop_path_rate"] = stochastic_depth or 0.5
    if image_size is not None and timm.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = image_size
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=num_classes, **options
        )
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"model {model!r} cannot be built with {options}: {said}") from error
    if stochastic_depth is not None:
        _scale_to(_drop_paths(network), stochastic_depth)
    return network


def is_of_timm(network: nn.Module) -> bool:
    """Whether timm built it: only then do the words of this file apply."""
    return hasattr(network, "pretrained_cfg") and "timm" in sys.modules


def read_timm_dropout(network: nn.Module) -> tuple[tuple[float, ...], float | None]:
    """Return the probabilities of dropout, without repeats, and the highest of stochastic depth.

    What timm's `drop_rate` sets is an attribute of some networks and a layer of others; layers at 0
    are those of attention and projections, which have words of their own in timm.
    """
    said = getattr(network, "drop_rate", None)
    rates = {m.p for m in network.modules() if isinstance(m, nn.Dropout) and m.p > 0}
    rates |= {float(said)} if said else set()
    skips = [float(m.drop_prob or 0.0) for m in _drop_paths(network)]
    return tuple(sorted(rates)) or (0.0,), max(skips, default=None)


@lru_cache(maxsize=128)
def takes_dropout(model: str) -> tuple[bool, bool]:
    """Return whether a network of timm's heeds `dropout`, and `stochastic_depth`."""
    with torch.device("meta"):
        try:
            rates, _ = read_timm_dropout(build_timm(model, 10, dropout=0.5))
        except ConfigError:
            rates = ()
        try:
            _, highest = read_timm_dropout(build_timm(model, 10, stochastic_depth=0.5))
        except ConfigError:
            highest = None
    return rates == (0.5,), highest == 0.5


def weights_of(model: str) -> Mapping[str, TimmWeights]:
    """Return the weights that timm has for a network, by tag; `DEFAULT` is what timm takes.

    Raises:
        ConfigError: as `find_timm`.
    """
    find_timm(model)
    timm, name = _timm(model), model.removeprefix(PREFIX)
    configs = timm.models.get_arch_pretrained_cfgs(name)
    found = {
        full.partition(".")[2] or "untagged": _weights(full, config)
        for full, config in configs.items()
        if config.hf_hub_id or config.url
    }
    default = timm.get_pretrained_cfg(name)
    if found:
        found["DEFAULT"] = found.get(default.tag or "untagged") or next(iter(found.values()))
    return found


def usual_preprocessing(model: str) -> Preprocessing:
    """Return what timm evaluates a network with, whatever its weights are."""
    find_timm(model)
    return _preprocessing(_timm(model).get_pretrained_cfg(model.removeprefix(PREFIX)))


def translated(network: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state_dict under the names and with the sizes that a network of timm's has.

    Each of timm's modules has a function for its own older files and for other image sizes (it
    resizes position embeddings). What it does not understand is returned as it is.
    """
    module = sys.modules[type(network).__module__]
    adapt = getattr(module, "checkpoint_filter_fn", None)
    if adapt is None:
        return state
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")  # those of interpolation are no reason to fail
            adapted: Mapping[str, Tensor] = adapt(dict(state), network)
    except _OF_FOREIGN_FILES as error:  # it is written for this network's files, and is given any
        log.info("timm's checkpoint filter: %s: %s", type(error).__name__, error)
        return state
    for each in warned:
        log.info("timm's checkpoint filter: %s", each.message)
    return adapted


def _timm(model: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(
            f"model {model!r} needs timm ({error}); install it with: "
            "python -m pip install -e '.[timm]'"
        ) from None


def _instead(name: str) -> str:
    """Return what to write for a name that timm knows, but has nothing to say of."""
    timm = importlib.import_module("timm")
    today, dot, tag = (timm.models.get_deprecated_models().get(name) or "").partition(".")
    if not today:
        return f"timm {timm.__version__} has nothing to say of {name!r}; {_OWN}"
    weights = f", weights={tag!r}" if dot else ""
    return f"timm calls it otherwise today; write model='{PREFIX}{today}'{weights}"


def _stages(model: str, heads: tuple[str, ...], network: Any) -> dict[str, list[nn.Module]]:
    """Return the stages of a network, by what timm calls the first module of each.

    A module without parameters goes with what stands before it, but with the head where the head
    comes next, as pooling and dropout do. What timm calls `head_drop` is the head's wherever it is:
    else it would do nothing while all but the head is frozen.
    """
    group_of = _groups(model, heads, network)
    head = max(group_of.values())
    pieces = list(_pieces(network, "", group_of))
    names = {0: "stem", head: "head"}
    stages: dict[int, list[nn.Module]] = {index: [] for index in range(head + 1)}
    current = 0
    for place, (index, name, module) in enumerate(pieces):
        if index is not None:
            current = index
            # SelecSLS calls its last blocks `head`.
            names.setdefault(index, f"stage{index}" if name in ("stem", "head") else name)
        elif (
            module is getattr(network, "head_drop", None)
            or next((later for later, _, _ in pieces[place:] if later is not None), head) == head
        ):
            current = head
        stages[current].append(module)
    return {names[index]: modules for index, modules in stages.items()}


def _groups(model: str, heads: tuple[str, ...], network: Any) -> dict[int, int]:
    """Return the stage of each parameter, counted from 0 without gaps, by the parameter's id.

    By its id, since one that several modules share has several names.

    The head is what timm calls the classifier. What its matcher groups with that, such as a last
    norm or convolution, is pretrained and belongs to the stage below.
    """
    inside = tuple(f"{head}." for head in heads)
    named = dict(network.named_parameters())
    in_head = [name for name in named if inside and name.startswith(inside)]
    if not hasattr(network, "group_matcher"):
        raise ConfigError(
            f"model {model!r}: timm says no stages of it (it has no group_matcher); {_OWN}"
        )
    try:
        matcher = network.group_matcher(coarse=True)
        grouped = _timm(model).models.group_parameters(network, matcher)
    except AssertionError as error:  # so do networks that have fine groups only, such as RDNet
        raise ConfigError(f"model {model!r}: timm says no stages of it ({error}); {_OWN}") from None
    below = [[n for n in grouped[key] if n not in in_head] for key in sorted(grouped)]
    below[-2:] = [[name for group in below[-2:] for name in group]]
    if not in_head or not below[0]:
        raise ConfigError(f"model {model!r} has no classifier in timm's words; {_OWN}")
    groups = enumerate([*below, in_head])
    return {id(named[name]): index for index, group in groups for name in group}


def _pieces(
    module: nn.Module, path: str, group_of: Mapping[int, int]
) -> Iterator[tuple[int | None, str, nn.Module]]:
    """Yield the largest modules whose parameters are all of one stage, with that stage and a name.

    The stage is None where there are no parameters. Parameters that stand beside modules of several
    stages, such as a class token, come as modules that compute nothing.
    """
    for name, parameter in module.named_parameters(path, recurse=False):
        yield group_of[id(parameter)], name, Beside(nn.ParameterList([parameter]))
    for short, child in module.named_children():
        name = f"{path}.{short}" if path else short
        stages = {group_of[id(parameter)] for parameter in child.parameters()}
        if len(stages) > 1:
            yield from _pieces(child, name, group_of)
        else:
            yield (stages.pop() if stages else None), name, child


def _drop_paths(network: nn.Module) -> list[Any]:
    layers = importlib.import_module("timm.layers")
    return [m for m in network.modules() if isinstance(m, layers.DropPath)]


def _scale_to(skips: list[Any], highest: float) -> None:
    """Give the deepest block the probability itself, as for torchvision's networks."""
    now = max((float(skip.drop_prob or 0.0) for skip in skips), default=0.0)
    for skip in skips:
        skip.drop_prob = highest * (float(skip.drop_prob or 0.0) / now) if now else 0.0


def _weights(full_name: str, config: Any) -> TimmWeights:
    if not config.hf_hub_id:
        file_name = config.url.rsplit("/", 1)[-1]
        return TimmWeights(
            full_name, config.url, file_name, None, _preprocessing(config), config.crop_mode
        )
    hub = importlib.import_module("huggingface_hub")
    repository, _, revision = config.hf_hub_id.partition("@")
    file_name = config.hf_hub_filename or _SAFETENSORS
    cached = hub.try_to_load_from_cache(repository, file_name, revision=revision or None)
    return TimmWeights(
        name=full_name,
        url=hub.hf_hub_url(repository, file_name, revision=revision or None),
        # Nearly all are called the same.
        file_name=f"{repository.replace('/', '--')}--{file_name}",
        cached=Path(cached) if isinstance(cached, str) else None,
        preprocessing=_preprocessing(config),
        crop_mode=config.crop_mode,
    )


def _preprocessing(config: Any) -> Preprocessing:
    """Return timm's usual evaluation transform, at the size of its training.

    (Some weights score better at timm's `test_input_size`.) `crop_pct` is crop over resize.
    """
    size = config.input_size[-1]
    known = config.interpolation in ("nearest", "bilinear", "bicubic")
    return Preprocessing(
        # Some say 1.15, with which timm puts a black frame around the image.
        resize_size=max(size, math.floor(size / config.crop_pct)),
        crop_size=size,
        interpolation=config.interpolation if known else "bicubic",
        mean=tuple(config.mean),
        std=tuple(config.std),
    )
