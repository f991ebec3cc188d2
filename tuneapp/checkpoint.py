"""The whole state of a training in one object; saved atomically, checked when read.

A checkpoint folder holds two files and a manifest. The manifest names the newest epoch, the best
one and, if these are the same, the one before, with their SHA-256. A save takes effect when the
manifest is replaced: before, the old files are complete; after, the new one is. Files are read as
plain tensors and values only.

Frozen tensors are the same in every epoch, and in every trial that froze the same stages: they are
written once, stage by stage, into files that are named by their own hash. An epoch's file and its
entry in the manifest name those that belong to it.
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
from torch.optim import Optimizer

from tuneapp.average import WeightAverage
from tuneapp.config import TrialConfig, canonical_json
from tuneapp.errors import CheckpointError
from tuneapp.fetch import sha256_of
from tuneapp.models import apply_freezing
from tuneapp.optim import rebuild_optimizer
from tuneapp.rundir import write_atomically, write_json
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel
from tuneapp.statedict import AVERAGED, FROZEN_PARTS, State, restore_frozen_parts

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_KINDS = ("last", "best", "previous")
_NOT_KEPT = {"kept": "nothing"}
"""The manifest that `drop` leaves."""
_DIGITS = 32
"""Digits of the SHA-256 in the name of a frozen part."""
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers with this number of bytes."""
_LATER_FIELDS = {"sampling": "shuffle", "replacement": True, "num_samples": None}
"""Fields of `TrialConfig` that older checkpoints lack -> the value that describes those trainings.

A checkpoint is resumed only if its configuration, completed by these, is the trial's. Whoever adds
a field to `TrialConfig` adds it here, with the value by which everything is as it was before;
without that, every checkpoint written before is refused.
"""
_LATER_OPTIONS = {"Plateau": {"min_factor": 0.0}}
"""The same for fields of an optimizer, a schedule or a loss, by its class."""

Row = dict[str, Any]
Content = dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """The entry of one epoch in the manifest.

    Attributes:
        file: its name in the checkpoint folder.
        epoch: number of epochs done.
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
    """Everything on which the next epoch depends.

    Attributes:
        config: the trial's configuration; a checkpoint of another one is refused.
        steps_per_epoch: optimizer steps of an epoch.
        average: of the weights, if the configuration has one.
        loss_fn: its state, if it has one, is saved with the rest.
        history: one row of metrics for each epoch done, oldest first.
        best_epoch: the epoch of the best metric so far; 0 before the first.
        applied: what was read back at the beginning of an epoch, where it differed from before.
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
    applied: dict[int, dict[str, Any]] = field(default_factory=dict)
    # The SHA-256 of the frozen parts that were written, by folder and names of tensors.
    _written: dict[tuple[Path, tuple[str, ...]], str] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def applied_in(self, epoch: int) -> dict[str, Any]:
        """Return what was read back in this epoch; nothing where an older checkpoint lacks it."""
        begun = [at for at in self.applied if at <= epoch]
        return self.applied[max(begun)] if begun else {}

    def enter(self, epoch: int) -> bool:
        """Unfreeze what this epoch trains and the one before did not.

        The optimizer keeps its state of the stages that were trained already; their schedule and
        that of the new ones are at the same step.

        Returns:
            Whether anything was unfrozen.
        """
        if not apply_freezing(self.model, self.config, epoch):
            return False
        self._written.clear()
        self.optimizer = rebuild_optimizer(self.optimizer, self.model, self.config)
        self.schedule = Schedule(self.optimizer, self.config, self.steps_per_epoch)
        self.schedule.replay(self.history)
        return True

    def save(self, folder: Path, frozen_folder: Path | None = None) -> None:
        """Write this epoch; keep it, the best one and, if they are the same, the one before.

        Args:
            folder: of this training alone.
            frozen_folder: for frozen tensors of all trials of a run; None is `folder`.

        Raises:
            CheckpointError: the manifest cannot be read, and nothing was written.
            OSError: writing failed; the checkpoint before is still complete.
        """
        folder.mkdir(parents=True, exist_ok=True)
        before = _read_manifest(folder) or {}
        parts = self._write_parts(folder, frozen_folder or folder)
        name = _epoch_file(self.epoch)
        content = self._content(parts)

        def write(aside: Path) -> None:
            with aside.open("wb") as file:  # given a path, torch does not report a full disk
                torch.save(content, file)

        write_atomically(folder / name, write)
        entry = _Entry(name, self.epoch, sha256_of(folder / name), parts)
        _write_manifest(folder, self._to_keep(entry, before))

    def _to_keep(self, entry: _Entry, before: Mapping[str, _Entry]) -> dict[str, _Entry]:
        """Return the manifest after this epoch, given its `entry` and the manifest `before`."""
        kept = {"last": entry}
        older = [each for each in before.values() if each.epoch < entry.epoch]
        best = [each for each in (entry, *older) if each.epoch == self.best_epoch]
        if best:
            kept["best"] = best[0]
        elif "best" in before:  # training had fallen back to an epoch before it
            log.warning("the weights of the best epoch, %d, are lost", self.best_epoch)
        if kept.get("best", entry) is entry and older:
            kept["previous"] = max(older, key=lambda each: each.epoch)
        return kept

    def load(self, folder: Path) -> bool:
        """Resume from the newest intact checkpoint in `folder`; return whether there was one.

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
                log.warning("%s: falling back, to resume after epoch %d", each, self.epoch)
            return True
        for each in damaged:
            log.warning("%s", each)
        if manifest:
            log.warning("%s: no intact checkpoint; this trial starts from its beginning", folder)
        return False

    def _write_parts(self, folder: Path, frozen_folder: Path) -> dict[str, str]:
        """Write frozen tensors that are not written yet; return paths and SHA-256."""
        parts = {}
        for tensors in frozen_tensors(self.model):
            key = frozen_folder, tuple(tensors)
            sha256 = self._written.get(key)
            if sha256 is None or not _part_file(frozen_folder, sha256).is_file():
                sha256 = self._written[key] = _write_part(tensors, frozen_folder)
            file = _part_file(frozen_folder, sha256)
            # Of resolved folders: the system follows a link before it applies "..".
            parts[os.path.relpath(file.resolve(), folder.resolve())] = sha256
        return parts

    def _content(self, parts: Mapping[str, str]) -> Content:
        """Return the content of an epoch's file; tensors that are in one of `parts` are None."""
        device = next(self.model.parameters()).device
        model: dict[str, Any] = self.model.state_dict()
        ema = None if self.average is None else self.average.state_dict()
        for name in [name for tensors in frozen_tensors(self.model) for name in tensors]:
            # Averaging turns -0.0 into 0.0.
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
            "applied": self.applied,
            "best_epoch": self.best_epoch,
            "generators": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
        }

    def _restore(self, content: Content, folder: Path) -> None:
        then = {**_LATER_FIELDS, **json.loads(content["config"])}
        for choice in ("optimizer", "schedule", "loss"):
            then[choice] = {**_LATER_OPTIONS.get(then[choice]["kind"], {}), **then[choice]}
        if canonical_json(then) != canonical_json(self.config.as_dict()):
            raise CheckpointError(
                f"{folder} holds the checkpoint of another configuration: {content['config']}"
            )
        self.history = content["history"]
        self.applied = content.get("applied", {})  # older checkpoints have none
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
        log.info("resumed after epoch %d", self.epoch)


def read_best(folder: Path) -> Content:
    """Return the content of the best checkpoint in `folder`.

    `model` is its state_dict, and `ema`, where there is one, that of the average that was
    validated.

    Raises:
        CheckpointError: there is none, it is damaged, or it was not kept.
    """
    best = _best_entry(folder)
    try:
        return _read_intact(folder, best)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} holds no intact best checkpoint: {error}") from None


def best_file(folder: Path) -> Path:
    """Return the file of the best checkpoint in `folder`; its hash is checked, it is not read.

    Raises:
        CheckpointError: as `read_best`.
    """
    best = _best_entry(folder)
    file = folder / best.file
    try:
        if sha256_of(file) == best.sha256:
            return file
        cause = f"{file} is damaged: its SHA-256 differs from the one in {MANIFEST}"
    except OSError as error:
        cause = f"{file} cannot be read: {error.strerror}"
    raise CheckpointError(f"{folder} holds no intact best checkpoint: {cause}")


def _best_entry(folder: Path) -> _Entry:
    manifest = _read_manifest(folder)
    if manifest is not None and not manifest:
        raise CheckpointError(
            f"{folder}: the checkpoints of this trial were not kept; raise --keep-best, or train "
            "it again: `python -m tuneapp train --from RUN --trial ID`"
        )
    if not manifest or "best" not in manifest:
        raise CheckpointError(f"{folder} holds no intact best checkpoint")
    return manifest["best"]


def read_last(folder: Path) -> Content:
    """Return the content of the newest checkpoint in `folder`: the whole state after its epoch.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    manifest = _read_manifest(folder) or {}
    if "last" not in manifest:
        raise CheckpointError(f"{folder} holds no intact newest checkpoint")
    return _read_intact(folder, manifest["last"])


def validated_weights(content: Content) -> dict[str, Any]:
    """Return the state_dict that was validated: of the average, if there is one."""
    averaged = content.get("ema")
    if averaged is None:
        weights: dict[str, Any] = content["model"]
        return weights
    return {k.removeprefix(AVERAGED): v for k, v in averaged.items() if k.startswith(AVERAGED)}


def bytes_of(folder: Path) -> int:
    """Return the bytes of the checkpoints in `folder`, without the parts that trials share."""
    total = 0
    for file in _files(folder):
        with suppress(FileNotFoundError):  # a trial that is still running replaces them
            total += file.stat().st_size
    return total


def keep_only_best(folder: Path) -> None:
    """Remove all checkpoints of a trial that has ended, except for the best one.

    If there is no best one, nothing is removed. Called again after a kill, it finishes.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    manifest = _read_manifest(folder) or {}
    if "best" in manifest:
        _write_manifest(folder, {"best": manifest["best"]})


def drop(folder: Path) -> None:
    """Remove all checkpoints of a trial that has ended; `read_best` then says so.

    Called again after a kill, it finishes. Without such a folder, nothing is done.
    """
    if folder.is_dir():
        _write_manifest(folder, {})


def frozen_parts(folder: Path) -> set[Path]:
    """Return the files with frozen tensors that the checkpoints in `folder` need, resolved.

    A file that no folder needs can be removed once no trial of the run is training: a trial writes
    its parts before its manifest names them.

    Raises:
        CheckpointError: the manifest cannot be read, so what it needs is unknown. (If it is
            damaged, its checkpoints cannot be used and need nothing.)
    """
    manifest = _read_manifest(folder) or {}
    return {(folder / part).resolve() for entry in manifest.values() for part in entry.parts}


def frozen_tensors(model: StagedModel) -> list[State]:
    """Return the tensors of each stage that training does not change, by their full names.

    These are frozen parameters, and the statistics of BatchNorm layers that stay in `eval()`; not
    other buffers, which may change even in frozen stages of custom networks.
    """
    named = model.state_dict(keep_vars=True)
    # Not by their modes: those may be the validation's at the moment.
    unchanged = set(model.frozen_batchnorms() if model.frozen_batchnorm == "eval" else ())
    stages = []
    for stage in model.stages:
        held = {id(p) for p in stage.parameters() if not p.requires_grad}
        for norm in unchanged.intersection(stage.module.modules()):
            held |= {id(buffer) for buffer in norm.buffers()}
        stages.append({name: tensor for name, tensor in named.items() if id(tensor) in held})
    return [tensors for tensors in stages if tensors]


def _write_part(tensors: State, folder: Path) -> str:
    """Write tensors to a file that is named by its hash, unless it exists; return the SHA-256."""
    # In one layout, on one device: equal numbers are equal bytes, whichever trial wrote them.
    plain = {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in tensors.items()
    }
    content = io.BytesIO()  # torch writes a file's name into its bytes
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
    except OSError as error:  # it may be intact: what it names must not be overwritten
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        cause = str(error)
    log.warning("%s is damaged (%s): its checkpoints are not used", file, cause)
    return None


def _entry(plain: Mapping[str, Any]) -> _Entry:
    parts = dict(plain.get("parts", {}))  # older checkpoints have none: the file is complete
    entry = _Entry(str(plain["file"]), int(plain["epoch"]), str(plain["sha256"]), parts)
    # A manifest has no hash; but the names in it follow from the rest of the entry.
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
    """Return the files of a checkpoint folder without the manifest."""
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
            restore_frozen_parts(content, folder)
            return content
    except Exception as error:  # torch may raise anything if the content is damaged
        raise CheckpointError(f"{file} cannot be read ({error})") from None
    raise CheckpointError(f"{file} is damaged (its SHA-256 is not the manifest's)")
