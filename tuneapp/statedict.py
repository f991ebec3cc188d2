"""The tensors in a file, under the names that a network has for them.

Training scripts wrap a network before they save it, torchvision has renamed layers since it saved
its own files, and a vision transformer's position embeddings belong to one image size. The tensors
that are the same nevertheless are matched here.
"""

import argparse
import logging
import pickle
import re
import warnings
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

from tuneapp.errors import WeightsError, first_line
from tuneapp.fetch import check_hash, hub_dir, sha256_of

log = logging.getLogger(__name__)

State = Mapping[str, Tensor]

POSITIONS = "encoder.pos_embedding"
"""torchvision's name of a vision transformer's position embeddings."""

FROZEN_PARTS = "frozen_parts"
"""The key under which a checkpoint names the files that hold the tensors that are None in it."""

AVERAGED = "module."
"""Prefix of the names of averaged weights, as in `torch.optim.swa_utils.AveragedModel`."""

# Names of some layers in torchvision's own files, and in its current code.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)


_LONGEST_HEADER = 100_000_008
"""Of safetensors: its own limit, and the eight bytes that hold the length."""

# Keys under which training scripts, and checkpoints of tuneapp, commonly hold a state_dict. An
# average comes before the weights that it averages.
_WRAPPED_BY = (
    *("ema", "model_ema", "state_dict_ema", "teacher"),
    *("model_state_dict", "state_dict", "model", "network", "net", "weights"),
)
_DEEPEST = 4
"""Such keys that are followed into each other; a pickle can hold itself."""

_SAVE_AGAIN = "save it with torch.save(model.state_dict(), ...)"


@lru_cache(maxsize=4)
def read_state_dict(file: Path, changed_ns: int) -> State:
    """Return the tensors in `file` under the names that they have there; read once per process.

    Args:
        file: in the format of safetensors; or written by `torch.save` of a state_dict or of a dict
            that holds one, such as a checkpoint: its average (`ema`, `model_ema`), else its
            `state_dict`, `model_state_dict` or `model`. Its ending does not matter.
        changed_ns: its modification time, so that a changed file is read anew.

    Raises:
        WeightsError: it is damaged, is no state_dict, or holds values that are not finite.
    """
    if file.parent == hub_dir():
        check_hash(file, file.name)
    content = _read(file)
    restore_frozen_parts(content, file.parent)
    unwrapped = _unwrapped(content)
    if not _holds_tensors(unwrapped):
        raise WeightsError(f"{file} holds no state_dict (names with tensors); {_said_of(content)}")
    content = unwrapped
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if all(name == "n_averaged" or name.startswith("module.") for name in state):
        state.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise WeightsError(f"{file}: {name} is sparse, quantised or without values")
        if not torch.isfinite(_values_of(tensor)).all():
            raise WeightsError(f"{file}: {name} holds NaN or infinite values")
    return state


def _read(file: Path) -> object:
    """Return the content of a file, by its first bytes rather than by its ending.

    Raises:
        WeightsError: it is damaged, or is something else; the message says what.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(100)
        _refuse_texts(file, start)
        if _is_safetensors(file, start):
            header = 8 + int.from_bytes(start[:8], "little")
            _require_size("header", header, min(file.stat().st_size, _LONGEST_HEADER))
            return safetensors.torch.load(file.read_bytes())
        if zipfile.is_zipfile(file):
            _check_archive(file)
        # `args` of the training scripts of torchvision and timm
        plain = torch.serialization.safe_globals([argparse.Namespace])
        # Opened, since torch, too, takes a file for safetensors by its ending.
        with plain, warnings.catch_warnings(), file.open("rb") as opened:
            warnings.simplefilter("ignore", UserWarning)  # of pickles: the error below says it
            content: object = torch.load(opened, map_location="cpu", weights_only=True)
            return content
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        refused = _refused_classes(file, str(error))
        cause = f" ({refused}), which could run code" if refused else ", or is damaged"
        raise WeightsError(
            f"{file} holds a pickled object{cause}; it must hold plain tensors: {_SAVE_AGAIN}"
        ) from None
    except Exception as error:
        raise WeightsError(
            f"{file} is not a readable file of plain weights ({first_line(error)}); delete it, or "
            "save it again with torch.save(model.state_dict(), ...)"
        ) from None


def _refuse_texts(file: Path, start: bytes) -> None:
    """Refuse what is commonly downloaded in place of weights, given the first bytes of a file."""
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{file} is a Git LFS pointer: run `git lfs pull` in its repository")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise WeightsError(f"{file} is a web page, not weights; download the file itself")


def _is_safetensors(file: Path, start: bytes) -> bool:
    """Whether a file is to be read as safetensors; if its first bytes say nothing, by its ending.

    safetensors begins with the length of a header of JSON, zip archives with `PK`, and pickles with
    their protocol.
    """
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size - 8:
        return True
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start):
        return False
    return file.suffix.lower() == ".safetensors"


def _check_archive(file: Path) -> None:
    """Check the sizes and checksums of an archive, since torch compares neither.

    Raises:
        ValueError: its sizes are impossible.
        WeightsError: it is damaged, or is TorchScript.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise WeightsError(f"{file} is TorchScript; save its state_dict() with torch.save")
        # torch decompresses archives, although it never compresses tensors.
        size = sum(entry.file_size for entry in entries)
        _require_size("table of contents", size, file.stat().st_size)
        # torch can be told to write no checksums; it then writes zeros.
        damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
    if damaged:
        raise WeightsError(
            f"{file} is damaged: the checksum of {damaged} in it differs; copy or download it again"
        )


def _refused_classes(file: Path, said: str) -> str:
    """Return the classes and functions for which torch refuses a file, or an empty text.

    Args:
        file: which was refused.
        said: torch's message, which names one of them.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # torch raises anything for a damaged file; its message names one class
        names = re.findall(r"GLOBAL (\w[\w.]*)", said)[:1]
    return _listed(names, 3)


def _said_of(content: object) -> str:
    """Return what a file holds instead of a state_dict."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}"
    return f"at its top level: {_listed([str(key) for key in content], 10) or 'nothing'}"


def _listed(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _require_size(part: str, claimed: int, possible: int) -> None:
    """Refuse a file that claims more content than it has, before memory is allocated for it.

    Raises:
        ValueError: the `part` of the file claims more bytes than are possible.
    """
    if claimed > possible:
        raise ValueError(
            f"its {part} claims {claimed:,} bytes, but at most {possible:,} are possible"
        )


def _values_of(tensor: Tensor) -> Tensor:
    """Return the values of a tensor, each once: an expanded tensor repeats its storage."""
    stored = tensor.untyped_storage()
    if tensor.numel() * tensor.element_size() <= stored.nbytes():
        return tensor
    return tensor.new_empty(0).set_(stored)


def restore_frozen_parts(content: object, folder: Path) -> None:
    """Fill in the tensors that a checkpoint stores in other files.

    Args:
        content: of a checkpoint; anything else is left unchanged.
        folder: of the checkpoint.

    Raises:
        WeightsError: such a file is missing or damaged.
    """
    if not isinstance(content, dict) or not isinstance(content.get(FROZEN_PARTS), dict):
        return
    frozen: dict[str, Tensor] = {}
    for relative, sha256 in content[FROZEN_PARTS].items():
        frozen.update(_read_part(folder / str(relative), sha256))
    for key, prefix in (("model", ""), ("ema", AVERAGED)):
        state: Any = content.get(key)
        if not isinstance(state, dict):
            continue
        absent = [name for name, tensor in state.items() if tensor is None]
        for name in absent:
            tensor = frozen.get(str(name).removeprefix(prefix))
            if tensor is None:
                raise WeightsError(
                    f"{name} is neither in a checkpoint in {folder} nor in its parts"
                )
            state[name] = tensor


def _read_part(file: Path, sha256: object) -> dict[str, Tensor]:
    try:
        if sha256_of(file) == sha256:
            tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
            return tensors
    except Exception as error:  # for a damaged file, torch raises nearly anything
        raise WeightsError(
            f"{file}, a part of a checkpoint, cannot be read: {first_line(error)}"
        ) from None
    raise WeightsError(f"{file}, a part of a checkpoint, is damaged: its SHA-256 differs")


def _unwrapped(content: object, depth: int = _DEEPEST) -> object:
    """Return the state_dict that a dict holds under one or more of the usual keys, or the dict."""
    if isinstance(content, dict) and depth:
        for key in _WRAPPED_BY:
            inner = _unwrapped(content.get(key), depth - 1)
            if _holds_tensors(inner):
                return inner
    return content


def _holds_tensors(content: object) -> TypeGuard[dict[object, object]]:
    return isinstance(content, dict) and any(isinstance(v, Tensor) for v in content.values())


def match_names(own: State, state: State) -> State:
    """Return `state` with the names that `own` has for the same tensors.

    A prefix such as `module.`, `_orig_mod.`, `network.` or `module.model.` is removed where most of
    the tensors that do not fit have it, and more of them fit without it than with it.

    Args:
        own: the state_dict of a network.
        state: that of a file.
    """
    while True:
        fitting = {name for name, tensor in state.items() if _fits(name, tensor, own)}
        stray = {name: tensor for name, tensor in state.items() if name not in fitting}
        prefix = _common_prefix(stray, fitting, own)
        if prefix is None:
            return {_current_name(name, own): tensor for name, tensor in state.items()}
        log.info("the prefix %r is removed from names", prefix)
        state = _without_prefix(state, prefix, fitting)


def _without_prefix(state: State, prefix: str, fitting: Collection[str]) -> State:
    """Return `state` without a prefix of its names.

    A tensor that fits is never replaced; one that does not fit gives way to one that had the
    prefix before the same name.
    """
    renamed: dict[str, str] = {}
    for name in state:
        inner = name.removeprefix(prefix)
        if inner != name and name not in fitting and inner not in fitting:
            renamed[name] = inner
    replaced = set(renamed.values())
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in renamed:
            kept[renamed[name]] = tensor
        elif name not in replaced:
            kept[name] = tensor
    return kept


def _common_prefix(stray: State, fitting: Collection[str], own: State) -> str | None:
    """Return the prefix without which the most of the stray tensors would fit, if one is common.

    Prefixes of several segments are tried as a whole, since removing one of two need not help.
    """
    gains: Counter[str] = Counter()
    for name, tensor in stray.items():
        parts = name.split(".")
        for cut in range(1, len(parts)):
            inner = ".".join(parts[cut:])
            if inner not in fitting and _fits(inner, tensor, own):
                gains[".".join(parts[:cut]) + "."] += 1
    if not gains:
        return None
    prefix = gains.most_common(1)[0][0]
    carriers = sum(name.startswith(prefix) for name in stray)
    return prefix if 2 * carriers > len(stray) else None


def _fits(name: str, tensor: Tensor, own: State) -> bool:
    return name in own and own[name].shape == tensor.shape and _is_of_same_kind(own[name], tensor)


def _is_of_same_kind(a: Tensor, b: Tensor) -> bool:
    """Whether both are of floating-point numbers, of whole ones, or of complex ones."""
    return (a.is_floating_point(), a.is_complex()) == (b.is_floating_point(), b.is_complex())


def _current_name(name: str, own: State) -> str:
    """Return what torchvision calls today what its files call `name`."""
    if name not in own:
        for old, current in _OLD_NAMES:
            renamed = old.sub(current, name)
            if renamed in own:
                return renamed
    return name


def with_interpolated_positions(network: nn.Module, state: State) -> State:
    """Return `state` with position embeddings for the image size of a vision transformer.

    Only `POSITIONS` may differ; where it need not, `state` itself is returned.
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
    except ValueError:  # not of a square: reported as of another shape
        return state
    return {**state, **resized}


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors of a network and of a file, by whether they were loaded.

    Attributes:
        loaded: those that fit.
        other_shape: in both, but with another shape: left unchanged.
        missing: only in the network: left unchanged.
        unexpected: only in the file.
        interpolated: those of `loaded` that were interpolated from another image size.
        other_kind: in both, but one is of whole or complex numbers and the other not: left
            unchanged.
    """

    loaded: tuple[str, ...]
    other_shape: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    interpolated: tuple[str, ...] = ()
    other_kind: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for words, names in (
            ("interpolated for another image size", self.interpolated),
            ("of another shape", self.other_shape),
            ("of another kind of numbers", self.other_kind),
            ("missing in the file", self.missing),
            ("not of this network", self.unexpected),
        ):
            if names:
                more = ", ..." if len(names) > 3 else ""
                parts.append(f"{len(names)} {words} ({', '.join(names[:3])}{more})")
        return "; ".join(parts)


def compare(own: State, state: State, interpolated: tuple[str, ...]) -> LoadReport:
    """Return which tensors of `state` fit a network whose state_dict is `own`."""
    shared = [name for name in state if name in own]
    loaded = tuple(name for name in shared if _fits(name, state[name], own))
    other_shape = tuple(name for name in shared if own[name].shape != state[name].shape)
    return LoadReport(
        loaded=loaded,
        other_shape=other_shape,
        missing=tuple(n for n in own if n not in state and not is_counter(n)),
        unexpected=tuple(name for name in state if name not in own),
        interpolated=tuple(name for name in interpolated if name in loaded),
        other_kind=tuple(n for n in shared if n not in loaded and n not in other_shape),
    )


def is_counter(name: str) -> bool:
    """Whether it is BatchNorm's count of batches; old files lack it, and nothing depends on it."""
    return name.rpartition(".")[2] == "num_batches_tracked"
