"""The whole state of a training in one object; saved atomically, checked when read.

A checkpoint folder holds two files and a manifest. The manifest names the newest epoch, the best
one and, where these are the same, the one before, with their SHA-256. Replacing it is the moment at
which a save counts: before it the old files are complete, after it the new one is. Files are read
as plain tensors and values only.

What is frozen is the same in every epoch, and in every trial that froze as much: it is written
once, stage by stage, into files that are named by their own hash. An epoch's file and its entry in
the manifest say which of them belong to it.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from tuneapp.average import WeightAverage
from tuneapp.config import TrialConfig, canonical_json
from tuneapp.errors import CheckpointError
from tuneapp.fetch import sha256_of
from tuneapp.models import freeze_as
from tuneapp.optim import rebuild_optimizer
from tuneapp.rundir import write_atomically, write_json
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel
from tuneapp.statedict import AVERAGED, FROZEN_PARTS, State, put_back

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_KINDS = ("last", "best", "previous")
_NOT_KEPT = {"kept": "nothing"}
"""A manifest of which `drop` left nothing."""
_DIGITS = 32
"""Of a SHA-256, in the name of a frozen part."""
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their bytes."""
_LATER_FIELDS = {"sampling": "shuffle", "replacement": True, "num_samples": None}

Row = dict[str, Any]
Content = dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """What the manifest says of one epoch.

    Attributes:
        file: its name in the checkpoint folder.
        epoch: the epochs done.
        sha256: of the file.
        parts: the frozen parts that belong to it, as paths relative to the checkpoint folder, so
            that a run directory can be moved; and the SHA-256 of each.
    """

    file: str
    epoch: int
    sha256: str
    parts: Mapping[str, str]


@dataclass
class TrainState:
    """Everything that the next epoch depends on.

    Attributes:
        config: the trial's configuration; a checkpoint of another one is refused.
        steps_per_epoch: optimizer steps of an epoch.
        average: of the weights, where the configuration asks for one.
        loss_fn: where it has a state of its own, that goes with the rest.
        history: one row of metrics for each epoch done, oldest first.
        best_epoch: the epoch of the best metric so far; 0 before the first.
    """

    model: StagedModel
    optimizer: Optimizer
    schedule: Schedule
    scaler: GradScaler
    config: TrialConfig
    steps_per_epoch: int
    average: WeightAverage | None = None
    loss_fn: nn.Module | None = None
    history: list[Row] = field(default_factory=list)
    best_epoch: int = 0
    # The SHA-256 of the frozen parts that were written, by folder and names of tensors.
    _written: dict[tuple[Path, tuple[str, ...]], str] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def enter(self, epoch: int) -> bool:
        """Unfreeze what this epoch is to train and the one before did not.

        The optimizer keeps what it knows of the stages that were trained already; the schedule of
        the new ones is where that of the others is.

        Returns:
            Whether anything was unfrozen.
        """
        if not freeze_as(self.model, self.config, epoch):
            return False
        self._written.clear()
        self.optimizer = rebuild_optimizer(self.optimizer, self.model, self.config)
        self.schedule = Schedule(self.optimizer, self.config, self.steps_per_epoch)
        self.schedule.replay(self.history)
        return True

    def save(self, folder: Path, frozen_folder: Path | None = None) -> None:
        """Write this epoch, and keep only it, the best one, and one more where it is the best.

        Args:
            folder: of this training alone.
            frozen_folder: where what is frozen goes, for all trials of a run; None is `folder`.

        Raises:
            CheckpointError: the manifest cannot be read, and nothing was written.
            OSError: the disk did not take it; what was there before is still complete.
        """
        folder.mkdir(parents=True, exist_ok=True)
        before = _read_manifest(folder) or {}
        parts = self._write_parts(folder, frozen_folder or folder)
        name = _epoch_file(self.epoch)
        content = self._content(parts)

        def write(aside: Path) -> None:
            with aside.open("wb") as file:  # given a path, torch does not say that the disk is full
                torch.save(content, file)

        write_atomically(folder / name, write)
        entry = _Entry(name, self.epoch, sha256_of(folder / name), parts)
        _write_manifest(folder, self._to_keep(entry, before))

    def _to_keep(self, entry: _Entry, before: Mapping[str, _Entry]) -> dict[str, _Entry]:
        """Return the manifest with this epoch, of which `entry` is, given that of `before`."""
        kept = {"last": entry}
        older = [each for each in before.values() if each.epoch < entry.epoch]
        best = [each for each in (entry, *older) if each.epoch == self.best_epoch]
        if best:
            kept["best"] = best[0]
        elif "best" in before:  # after a fall-back to before the epoch that had taken its place
            log.warning("the weights of the best epoch, %d, are lost", self.best_epoch)
        if kept.get("best", entry) is entry and older:
            kept["previous"] = max(older, key=lambda each: each.epoch)
        return kept

    def load(self, folder: Path) -> bool:
        """Go on from the newest intact checkpoint in `folder`; return whether there was one.

        Raises:
            CheckpointError: a checkpoint there belongs to another configuration, or the manifest
                cannot be read.
        """
        manifest = _read_manifest(folder)
        damaged = []
        for entry in _newest_first(manifest or {}):
            try:
                content = _read_intact(folder, entry)
            except CheckpointError as error:
                damaged.append(error)
                continue
            self._restore(content, folder)
            for each in damaged:
                log.warning("%s: falling back, to go on after epoch %d", each, self.epoch)
            return True
        for each in damaged:
            log.warning("%s", each)
        if manifest:
            log.warning("%s: no intact checkpoint; this trial starts from its beginning", folder)
        return False

    def _write_parts(self, folder: Path, frozen_folder: Path) -> dict[str, str]:
        """Write what is frozen, where that was not done yet; return paths and SHA-256."""
        parts = {}
        for tensors in frozen_tensors(self.model):
            key = frozen_folder, tuple(tensors)
            sha256 = self._written.get(key)
            if sha256 is None or not _part_file(frozen_folder, sha256).is_file():
                sha256 = self._written[key] = _write_part(tensors, frozen_folder)
            file = _part_file(frozen_folder, sha256)
            # Of resolved folders: the system follows a link before it goes up from there.
            parts[os.path.relpath(file.resolve(), folder.resolve())] = sha256
        return parts

    def _content(self, parts: Mapping[str, str]) -> Content:
        """Return what is written of an epoch; a tensor that lies in one of `parts` is None."""
        device = next(self.model.parameters()).device
        model: dict[str, Any] = self.model.state_dict()
        ema = None if self.average is None else self.average.state_dict()
        for name in [name for tensors in frozen_tensors(self.model) for name in tensors]:
            # Averaging can round a counter, and turns -0.0 into 0.0.
            if ema is not None and _has_same_bits(ema[AVERAGED + name], model[name]):
                ema[AVERAGED + name] = None
            model[name] = None
        return {
            "config": canonical_json(self.config.as_dict()),
            "model": model,
            "loss": {} if self.loss_fn is None else self.loss_fn.state_dict(),
            "ema": ema,
            FROZEN_PARTS: dict(parts),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "generators": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
        }

    def _restore(self, content: Content, folder: Path) -> None:
        # What a field meant before there was it is what it is by default.
        then = {**_LATER_FIELDS, **json.loads(content["config"])}
        if canonical_json(then) != canonical_json(self.config.as_dict()):
            raise CheckpointError(
                f"{folder} holds the checkpoint of another configuration: {content['config']}"
            )
        self.history = content["history"]
        self.best_epoch = content["best_epoch"]
        self.enter(self.epoch)  # the optimizer's groups are those of the epoch that was saved
        self._written.clear()
        self.model.load_state_dict(content["model"])
        if self.loss_fn is not None:
            self.loss_fn.load_state_dict(content["loss"])
        if self.average is not None:
            self.average.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["generators"]["cpu"])
        device = next(self.model.parameters()).device
        if content["generators"]["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(content["generators"]["cuda"], device)
        log.info("goes on after epoch %d", self.epoch)


def read_best(folder: Path) -> Content:
    """Return the content of the best checkpoint in `folder`.

    `model` is its state_dict, and `ema`, where there is one, that of the average that was
    validated.

    Raises:
        CheckpointError: there is none, it is damaged, or it was not kept.
    """
    manifest = _read_manifest(folder)
    if manifest is not None and not manifest:
        raise CheckpointError(
            f"{folder}: the checkpoints of this trial were not kept; raise --keep-best, or train "
            "it again: `python -m tuneapp train --from RUN --trial ID`"
        )
    if not manifest or "best" not in manifest:
        raise CheckpointError(f"{folder} holds no intact best checkpoint")
    try:
        return _read_intact(folder, manifest["best"])
    except CheckpointError as error:
        raise CheckpointError(f"{folder} holds no intact best checkpoint: {error}") from None


def validated_weights(content: Content) -> dict[str, Any]:
    """Return the state_dict of a checkpoint's model as it was validated: the average, if any."""
    averaged = content.get("ema")
    if averaged is None:
        weights: dict[str, Any] = content["model"]
        return weights
    return {k.removeprefix(AVERAGED): v for k, v in averaged.items() if k.startswith(AVERAGED)}


def bytes_of(folder: Path) -> int:
    """Return how many bytes the checkpoints in `folder` take, without what trials share."""
    total = 0
    for file in _files(folder):
        with suppress(FileNotFoundError):  # a trial that is still running replaces them
            total += file.stat().st_size
    return total


def keep_only_best(folder: Path) -> None:
    """Remove all checkpoints in `folder` but the best one, of a trial that has ended.

    Where there is no best one, nothing is removed. Called again after a kill, it finishes.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    manifest = _read_manifest(folder) or {}
    if "best" in manifest:
        _write_manifest(folder, {"best": manifest["best"]})


def drop(folder: Path) -> None:
    """Remove all checkpoints in `folder`, of a trial that has ended; `read_best` then says so.

    Called again after a kill, it finishes. Where there is no such folder, nothing is done.
    """
    if folder.is_dir():
        _write_manifest(folder, {})


def frozen_parts(folder: Path) -> set[Path]:
    """Return the files with what is frozen that the checkpoints in `folder` need, resolved.

    A file that is in none of these sets can be removed once no trial of the run is training: one
    that trains writes its parts before its manifest names them.

    Raises:
        CheckpointError: the manifest cannot be read, so that nobody knows what it needs. (Of a
            damaged one no checkpoint can be used.)
    """
    manifest = _read_manifest(folder) or {}
    return {(folder / part).resolve() for entry in manifest.values() for part in entry.parts}


def frozen_tensors(model: StagedModel) -> list[State]:
    """Return the tensors of each stage that training leaves as they are, by their full names.

    These are frozen parameters, and the statistics of BatchNorm layers that stay in `eval()`. Other
    buffers may change there too, in networks of the user's own, and are not among them.
    """
    named = model.state_dict(keep_vars=True)
    stages = []
    for stage in model.stages:
        held = {id(p) for p in stage.parameters() if not p.requires_grad}
        for norm in stage.module.modules():
            if isinstance(norm, _BatchNorm) and model.frozen_batchnorm == "eval":
                own = [p.requires_grad for p in norm.parameters()]
                # As in StagedModel.train; the modes themselves are those of the validation now.
                if model.is_frozen(stage) or (own and not any(own)):
                    held |= {id(buffer) for buffer in norm.buffers()}
        stages.append({name: tensor for name, tensor in named.items() if id(tensor) in held})
    return [tensors for tensors in stages if tensors]


def _write_part(tensors: State, folder: Path) -> str:
    """Write tensors to a file that is named by its hash, unless it is there; return the SHA-256."""
    # In one layout and place: the same numbers are the same bytes, whichever trial wrote them.
    plain = {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in tensors.items()
    }
    content = io.BytesIO()  # a file's own name would be among its bytes
    torch.save(plain, content)
    sha256 = hashlib.sha256(content.getbuffer()).hexdigest()
    file = _part_file(folder, sha256)
    if not (file.is_file() and sha256_of(file) == sha256):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda aside: aside.write_bytes(content.getbuffer()))
    return sha256


def _epoch_file(epoch: int) -> str:
    return f"epoch-{epoch:04d}.pt"


def _part_file(folder: Path, sha256: str) -> Path:
    return folder / f"{sha256[:_DIGITS]}.pt"


def _has_same_bits(a: Tensor, b: Tensor) -> bool:
    whole = _WHOLE_NUMBERS.get(a.element_size())
    return whole is not None and torch.equal(a.view(whole), b.view(whole))


def _newest_first(manifest: Mapping[str, _Entry]) -> list[_Entry]:
    """Return the entries of a manifest, each once."""
    by_file = {entry.file: entry for entry in manifest.values()}
    return sorted(by_file.values(), key=lambda entry: entry.epoch, reverse=True)


def _read_manifest(folder: Path) -> dict[str, _Entry] | None:
    """Return the entries by their kind; none after `drop`, and None without a usable manifest."""
    file = folder / MANIFEST
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        if plain == _NOT_KEPT:
            return {}
        entries = {kind: _entry(entry) for kind, entry in plain.items()}
        if entries and entries.keys() <= set(_KINDS):
            return entries
        cause = "it names no checkpoint, or an unknown one"
    except FileNotFoundError:
        return None
    except OSError as error:  # it may be all right: what it names must not be written over
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        cause = str(error)
    log.warning("%s is damaged (%s): its checkpoints are not used", file, cause)
    return None


def _entry(plain: Mapping[str, Any]) -> _Entry:
    parts = dict(plain.get("parts", {}))  # before there were any, the file was all of it
    entry = _Entry(str(plain["file"]), int(plain["epoch"]), str(plain["sha256"]), parts)
    # A manifest has no hash of its own; but names follow from what they name.
    names = [(entry.file, _epoch_file(entry.epoch))]
    names += [(Path(part).name, _part_file(Path(), sha256).name) for part, sha256 in parts.items()]
    if any(a != b for a, b in names) or not plain.keys() <= _Entry.__annotations__.keys():
        raise ValueError(f"it has {dict(plain)}")
    return entry


def _write_manifest(folder: Path, entries: Mapping[str, _Entry]) -> None:
    """Write the manifest, then remove what it does not name: older epochs, half-written files."""
    plain = {kind: asdict(entry) for kind, entry in entries.items()} or _NOT_KEPT
    write_json(folder / MANIFEST, plain)
    kept = {name for entry in entries.values() for name in (entry.file, *entry.parts)}
    for file in _files(folder):
        if file.name not in kept:
            file.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder, but for the manifest."""
    if not folder.is_dir():
        return []
    return [file for file in folder.iterdir() if file.name != MANIFEST]


def _read_intact(folder: Path, entry: _Entry) -> Content:
    """Return the content of a checkpoint with its frozen parts.

    Raises:
        CheckpointError: its file or a part is damaged; the message names it.
    """
    file = folder / entry.file
    try:
        if sha256_of(file) == entry.sha256:
            content: Content = torch.load(file, map_location="cpu", weights_only=True)
            put_back(content, folder)
            return content
    except Exception as error:  # of garbage, torch raises anything
        raise CheckpointError(f"{file} cannot be read ({error})") from None
    raise CheckpointError(f"{file} is damaged (its SHA-256 is not the manifest's)")


def read_last(folder: Path) -> Content:
    """Return the content of the newest checkpoint in `folder`: the whole state after its epoch.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    manifest = _read_manifest(folder) or {}
    if "last" not in manifest:
        raise CheckpointError(f"{folder} holds no intact newest checkpoint")
    return _read_intact(folder, manifest["last"])
