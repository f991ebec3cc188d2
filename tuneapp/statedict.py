"""The tensors in a file, under the names that a network has for them.

Training scripts wrap a network before they save it, torchvision has renamed layers since it saved
its own, and a vision transformer's position embeddings belong to one image size: what is the same
tensor all the same is found here.
"""

import logging
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from tuneapp.errors import WeightsError
from tuneapp.fetch import check_hash, hub_dir, sha256_of

log = logging.getLogger(__name__)

State = Mapping[str, Tensor]

POSITIONS = "encoder.pos_embedding"
"""torchvision's name of a vision transformer's position embeddings."""

FROZEN_PARTS = "frozen_parts"
"""Where a checkpoint of ours says which files hold the tensors that are None in it."""

AVERAGED = "module."
"""What the names of averaged weights begin with, as in `torch.optim.swa_utils.AveragedModel`."""

# What torchvision's own files call some layers, and what its code does today.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)


_LONGEST_HEADER = 100_000_008
"""Of safetensors: its own limit, and the eight bytes that tell its length."""

# How training scripts commonly wrap a state_dict, and ours: an average before the weights.
_WRAPPED_BY = ("ema", "model_ema", "state_dict_ema", "model_state_dict", "state_dict", "model")


@lru_cache(maxsize=4)
def read_state_dict(file: Path, changed_ns: int) -> State:
    """Return the tensors in `file` under the names that they have there; read once per process.

    Args:
        file: `.safetensors`; or written by `torch.save` of a state_dict or of a dict that holds
            one, such as a checkpoint: its average (`ema`, `model_ema`), else its `state_dict`,
            `model_state_dict` or `model`.
        changed_ns: its modification time, so that a changed file is read anew.

    Raises:
        WeightsError: it is damaged, is no state_dict, or holds numbers that are not finite.
    """
    if file.parent == hub_dir():
        check_hash(file, file.name)
    try:
        _require_sizes(file)
        content: object
        if file.suffix.lower() == ".safetensors":
            content = safetensors.torch.load(file.read_bytes())
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{file} holds a pickled object, or is damaged; it must hold plain tensors: save it "
            "with torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{file} is not a readable file of plain weights ({first[:100]}); delete it, or save "
            "it again with torch.save(model.state_dict(), ...)"
        ) from None
    put_back(content, file.parent)
    content = _unwrapped(content)
    if not _holds_tensors(content):
        raise WeightsError(f"{file} holds no state_dict (names with tensors)")
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if all(name == "n_averaged" or name.startswith("module.") for name in state):
        state.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise WeightsError(f"{file}: {name} is sparse, quantised or without numbers")
        if not torch.isfinite(_numbers_of(tensor)).all():
            raise WeightsError(f"{file}: {name} holds NaN or infinite numbers")
    return state


def _require_sizes(file: Path) -> None:
    """Refuse a file that says that it holds more than it has, before memory is taken for it.

    safetensors is read whole before its own checks, and torch inflates what it never deflates.

    Raises:
        ValueError: it does.
    """
    there = file.stat().st_size
    if file.suffix.lower() == ".safetensors":
        with file.open("rb") as content:
            said = 8 + int.from_bytes(content.read(8), "little")
        what = "a header"
        there = min(there, _LONGEST_HEADER)
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as content_of:
            said = sum(entry.file_size for entry in content_of.infolist())
        what = "contents"
    else:
        return
    if said > there:
        raise ValueError(f"it speaks of {what} of {said:,} bytes, of at most {there:,}")


def _numbers_of(tensor: Tensor) -> Tensor:
    """Return what a tensor shows, or all that is stored where it shows that again and again."""
    stored = tensor.untyped_storage()
    if tensor.numel() * tensor.element_size() <= stored.nbytes():
        return tensor
    return tensor.new_empty(0).set_(stored)


def put_back(content: object, folder: Path) -> None:
    """Put the tensors that a checkpoint keeps in other files back into it.

    Args:
        content: of a checkpoint; anything else is left as it is.
        folder: in which the checkpoint lies.

    Raises:
        WeightsError: such a file is gone or damaged.
    """
    if not isinstance(content, dict) or not isinstance(content.get(FROZEN_PARTS), dict):
        return
    frozen: dict[str, Tensor] = {}
    for relative, sha256 in content[FROZEN_PARTS].items():
        frozen.update(_read_part(folder / str(relative), sha256))
    for key, prefix in (("model", ""), ("ema", AVERAGED)):
        state: Any = content.get(key)
        for name in [n for n, t in state.items() if t is None] if isinstance(state, dict) else []:
            tensor = frozen.get(str(name).removeprefix(prefix))
            if tensor is None:
                raise WeightsError(f"a checkpoint in {folder} lacks {name}, and so do its parts")
            state[name] = tensor


def _read_part(file: Path, sha256: object) -> dict[str, Tensor]:
    try:
        if sha256_of(file) == sha256:
            tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
            return tensors
    except Exception as error:  # of garbage, torch raises anything
        first = str(error).strip().partition("\n")[0]
        raise WeightsError(f"{file}, a part of a checkpoint, cannot be read: {first}") from None
    raise WeightsError(f"{file}, a part of a checkpoint, is damaged: its SHA-256 is another")


def _unwrapped(content: object) -> object:
    for key in _WRAPPED_BY:
        if isinstance(content, dict) and _holds_tensors(content.get(key)):
            content = content[key]
    return content


def _holds_tensors(content: object) -> TypeGuard[dict[object, object]]:
    return isinstance(content, dict) and any(isinstance(v, Tensor) for v in content.values())


def named_as(own: State, state: State) -> State:
    """Return `state` with the names that `own` has for the same tensors.

    A prefix such as `module.`, `_orig_mod.`, `network.` or `module.model.` is taken off where most
    of the tensors that do not fit carry it, and more of them fit without it than with it.

    Args:
        own: the state_dict of a network.
        state: that of a file.
    """
    while True:
        fitting = {name for name, tensor in state.items() if _fits(name, tensor, own)}
        stray = {name: tensor for name, tensor in state.items() if name not in fitting}
        prefix = _wrapping(stray, fitting, own)
        if prefix is None:
            return {_todays(name, own): tensor for name, tensor in state.items()}
        log.info("names are taken without %r", prefix)
        inner = {n: n.removeprefix(prefix) for n in stray if n.startswith(prefix)}
        inner = {n: i for n, i in inner.items() if i not in fitting}
        replaced = set(inner.values())
        state = {inner.get(n, n): t for n, t in state.items() if n in inner or n not in replaced}


def _wrapping(stray: State, fitting: Collection[str], own: State) -> str | None:
    """Return the prefix without which the most of the stray tensors would fit.

    All leading segments together are tried, since taking off one of two need not help.
    """
    gains = Counter(
        ".".join(parts[:cut]) + "."
        for name, tensor in stray.items()
        for parts in [name.split(".")]
        for cut in range(1, len(parts))
        if (inner := ".".join(parts[cut:])) not in fitting and _fits(inner, tensor, own)
    )
    if not gains:
        return None
    prefix = gains.most_common(1)[0][0]
    carriers = sum(name.startswith(prefix) for name in stray)
    return prefix if 2 * carriers > len(stray) else None


def _fits(name: str, tensor: Tensor, own: State) -> bool:
    return name in own and own[name].shape == tensor.shape


def _todays(name: str, own: State) -> str:
    if name not in own:
        for old, today in _OLD_NAMES:
            renamed = old.sub(today, name)
            if renamed in own:
                return renamed
    return name


def resized_for(network: nn.Module, state: State) -> State:
    """Return `state` with position embeddings for the image size of a vision transformer.

    The same `state` where there is nothing to change; `POSITIONS` is what may differ.
    """
    if not isinstance(network, VisionTransformer) or POSITIONS not in state:
        return state
    given = state[POSITIONS]
    if given.shape[1:2] == (network.seq_length,):
        return state
    try:
        resized = interpolate_embeddings(
            network.image_size, network.patch_size, OrderedDict({POSITIONS: given.float()})
        )
    except ValueError:  # not of a square: told as of another shape
        return state
    return {**state, **resized}


@dataclass(frozen=True)
class LoadReport:
    """What of a state_dict went into a network: names of tensors.

    Attributes:
        loaded: those that fit.
        other_shape: of the network, but not of its shape: left as they were.
        missing: of the network, but not in the file: likewise.
        unexpected: in the file, but not of the network.
        interpolated: those of `loaded` that were made for another image size.
    """

    loaded: tuple[str, ...]
    other_shape: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    interpolated: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for words, names in (
            ("interpolated for another image size", self.interpolated),
            ("of another shape", self.other_shape),
            ("missing in the file", self.missing),
            ("not of this network", self.unexpected),
        ):
            if names:
                more = ", ..." if len(names) > 3 else ""
                parts.append(f"{len(names)} {words} ({', '.join(names[:3])}{more})")
        return "; ".join(parts)


def compare(own: State, state: State, interpolated: tuple[str, ...]) -> LoadReport:
    """Return what of `state` fits a network whose state_dict is `own`."""
    shared = [name for name in state if name in own]
    loaded = tuple(name for name in shared if _fits(name, state[name], own))
    return LoadReport(
        loaded=loaded,
        other_shape=tuple(name for name in shared if name not in loaded),
        missing=tuple(n for n in own if n not in state and not is_counter(n)),
        unexpected=tuple(name for name in state if name not in own),
        interpolated=tuple(name for name in interpolated if name in loaded),
    )


def is_counter(name: str) -> bool:
    """Whether it is BatchNorm's count of batches, which old files lack and nothing depends on."""
    return name.rpartition(".")[2] == "num_batches_tracked"
