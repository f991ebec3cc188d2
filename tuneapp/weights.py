"""Pretrained weights: where they are, how they are had, what of them fits.

Only tensors are read, never code (`weights_only=True`). A file from torchvision's own list is
checked against the hash in its name each time it is read.
"""

import hashlib
import http.client
import logging
import os
import re
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor, nn

from tuneapp.data.store import Preprocessing
from tuneapp.errors import WeightsError, did_you_mean
from tuneapp.models import find_family

log = logging.getLogger(__name__)

SILENCE_S = 5.0
"""A server that says nothing for so long is not there."""
AUTO_LIMIT_S = 60.0
"""`auto` gives up a download after so long; `DEFAULT` and other names wait for the end."""

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")


@dataclass(frozen=True)
class Found:
    """What a choice of weights came to on this machine.

    Attributes:
        asked: as written in the space.
        file: the state_dict file; None for random weights.
        name: torchvision's name of the weights, or `file`, or `random`.
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


def find_weights(model: str, asked: str | None) -> Found:
    """Return the weights that `asked` stands for, downloading them once where that is needed.

    Args:
        model: name of a torchvision classifier.
        asked: as in `TrialConfig.weights`.

    Raises:
        WeightsError: they cannot be had; the message says where to put the file.
    """
    if asked is None:
        return Found(None, None, "random")
    if asked == "auto":
        entry = _enum_entry(model, "DEFAULT")
        try:
            return _found(asked, _cached_or_fetched(entry, AUTO_LIMIT_S), str(entry))
        except WeightsError as error:
            warning = f"{model} starts from RANDOM weights, not pretrained ones: {error}"
            return Found(asked, None, "random", warning=warning)
    path = Path(asked).expanduser()
    if path.is_file():
        return _found(asked, path.resolve(), "file")
    if path.suffix or "/" in asked:
        raise WeightsError(f"weights {asked!r}: no such file")
    entry = _enum_entry(model, asked)
    return _found(asked, _cached_or_fetched(entry, None), str(entry))


def require_same_weights(found: Mapping[str, Any]) -> None:
    """Check that the file of a `Found`, as plain values, is still what it was.

    Raises:
        WeightsError: it is gone, or holds something else.
    """
    if found["file"] is None:
        return
    try:
        same = _sha256(Path(found["file"])) == found["sha256"]
    except OSError as error:
        raise WeightsError(f"weights {found['file']} cannot be read: {error.strerror}") from None
    if not same:
        raise WeightsError(
            f"weights {found['file']} have changed since this run began; restore them"
        )


def _found(asked: str, file: Path, name: str) -> Found:
    return Found(asked, str(file), name, _sha256(file))


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def preprocessing_of(
    model: str, asked: str | None, image_size: int | None, native_size: int | None
) -> Preprocessing:
    """Return how images are prepared for these weights.

    The weights' own evaluation preprocessing; for random weights and files that of the model's
    default ones. A size that differs keeps the proportion of resize to crop.

    Args:
        model: name of a torchvision classifier.
        asked: as in `TrialConfig.weights`.
        image_size: height and width in pixels that the network shall see; None: as evaluated.
        native_size: size of data that come in one small size, used where nothing is asked.
    """
    named = asked is not None and asked != "auto" and asked in _names(model)
    entry = _enum_entry(model, str(asked) if named else "DEFAULT")
    preset = entry.transforms()
    own = Preprocessing(
        resize_size=preset.resize_size[0],
        crop_size=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    size = image_size or native_size
    if size is None or size == own.crop_size:
        return own
    if native_size is not None:  # scans of one size, framed already: nothing is cropped away
        resize = size
    else:
        resize = max(size, round(size * own.resize_size / own.crop_size))
    return Preprocessing(resize, size, own.interpolation, own.mean, own.std)


@dataclass(frozen=True)
class LoadReport:
    """What of a state_dict went into a network: names of tensors."""

    loaded: tuple[str, ...]
    other_shape: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for words, names in (
            ("of another shape", self.other_shape),
            ("missing in the file", self.missing),
            ("not of this network", self.unexpected),
        ):
            if names:
                more = ", ..." if len(names) > 3 else ""
                parts.append(f"{len(names)} {words} ({', '.join(names[:3])}{more})")
        return "; ".join(parts)


def load_weights(network: nn.Module, model: str, file: Path) -> LoadReport:
    """Load the state_dict in `file` into `network`, all but a head of another size.

    Raises:
        WeightsError: the file is damaged, is not a state_dict, holds numbers that are not finite,
            has backbone tensors of another shape, or fits less than half of the backbone.
    """
    try:
        changed_ns = file.stat().st_mtime_ns
    except OSError as error:
        raise WeightsError(f"weights {file} cannot be read: {error.strerror}") from None
    state = read_state_dict(file, changed_ns)
    own = network.state_dict()
    head = find_family(model).head_prefix
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    network.load_state_dict(fitting, strict=False)
    report = LoadReport(
        loaded=tuple(fitting),
        other_shape=tuple(k for k in state if k in own and k not in fitting),
        missing=tuple(k for k in own if k not in state),
        unexpected=tuple(k for k in state if k not in own),
    )
    backbone = {k: v.numel() for k, v in own.items() if not k.startswith(head)}
    share = sum(n for k, n in backbone.items() if k in fitting) / sum(backbone.values())
    if share < 0.5 or any(k in backbone for k in report.other_shape):
        raise WeightsError(
            f"{file} fits {share:.0%} of {model}'s backbone: it belongs to another network "
            f"({report})"
        )
    if share < 1:
        log.warning("%s fits %.0f %% of %s's backbone: %s", file, 100 * share, model, report)
    log.info("weights %s: %s", file, report)
    return report


@lru_cache(maxsize=4)
def read_state_dict(file: Path, changed_ns: int) -> Mapping[str, Tensor]:
    """Return the tensors in `file`, read once per process.

    Args:
        file: written by `torch.save` of a state_dict, or of a dict that holds one.
        changed_ns: its modification time, so that a changed file is read anew.

    Raises:
        WeightsError: see `load_weights`.
    """
    if file.parent == _hub_dir():
        _check_hash(file, file.name)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{file} is not a readable file of plain weights ({first[:100]}); delete it, or save "
            "it again with torch.save(model.state_dict(), ...)"
        ) from None
    for key in ("state_dict", "model"):  # how training scripts commonly wrap it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{file} holds no state_dict (names with tensors)")
    state = {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{file}: {name} holds NaN or infinite numbers")
    return state


def fetch(url: str, file: Path, limit_s: float | None) -> None:
    """Download `url` to `file`, whole and with the hash in its name, or not at all.

    Args:
        url: http, https or file address.
        file: where to; processes that ask at once take turns, and fetch it once.
        limit_s: seconds for the whole of it; None is no limit.

    Raises:
        WeightsError: the server cannot be reached, is too slow, or sent something else.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    deadline = None if limit_s is None else time.monotonic() + limit_s
    lock = FileLock(file.with_name(file.name + ".lock"), timeout=-1 if limit_s is None else limit_s)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if file.is_file():
                return
            with urllib.request.urlopen(url, timeout=SILENCE_S) as answer, aside.open("wb") as out:
                while block := answer.read1(1 << 16):  # what has come, and no waiting for more
                    out.write(block)
                    if deadline is not None and time.monotonic() > deadline:
                        raise WeightsError(f"{url} took longer than {limit_s:g} s")
                length = answer.headers.get("Content-Length")
                if length is not None and out.tell() != int(length):
                    raise WeightsError(f"{url} ended after {out.tell()} of {length} bytes")
            _check_hash(aside, file.name)
            aside.replace(file)
    except Timeout:
        raise WeightsError(f"another process has been fetching {url} for {limit_s:g} s") from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise WeightsError(f"{url} cannot be fetched ({reason})") from None
    finally:
        aside.unlink(missing_ok=True)


def _cached_or_fetched(entry: Any, limit_s: float | None) -> Path:
    url = str(entry.url)
    file = _hub_dir() / url.rsplit("/", 1)[-1]
    if file.is_file():
        _check_hash(file, file.name)
        return file
    try:
        fetch(url, file, limit_s)
    except WeightsError as error:
        raise WeightsError(f"{error}; put the file at {file}") from None
    return file


def _hub_dir() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _check_hash(file: Path, name: str) -> None:
    """Compare a file with the hash that torchvision puts into `name`, where there is one."""
    wanted = _HASH_IN_NAME.search(name)
    if wanted is None:
        return
    got = _sha256(file)
    if not got.startswith(wanted[1]):
        raise WeightsError(
            f"{file.with_name(name)} is damaged: its SHA-256 begins with {got[:8]}, its name says "
            f"{wanted[1]}; delete it if it is there, and try again"
        )


def _names(model: str) -> list[str]:
    return [entry.name for entry in torchvision.models.get_model_weights(model)] + ["DEFAULT"]


def _enum_entry(model: str, name: str) -> Any:
    enum = torchvision.models.get_model_weights(model)
    if name not in _names(model):
        raise WeightsError(
            f"weights {name!r} of {model} are unknown{did_you_mean(name, _names(model))}; known: "
            f"{', '.join(_names(model))}, 'auto', None, or the path of a file"
        )
    return enum[name] if name != "DEFAULT" else enum.DEFAULT
