"""The whole state of a training in one object; saved atomically, checked when read.

A checkpoint folder holds one or two files and a manifest. The manifest names the newest and the
best epoch with their SHA-256, and replacing it is the moment at which a save counts: before it the
old files are complete, after it the new one is. Files are read as plain tensors and values only.
"""

import hashlib
import json
import logging
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tuneapp.average import WeightAverage
from tuneapp.config import TrialConfig, canonical_json
from tuneapp.errors import CheckpointError
from tuneapp.models import freeze_as
from tuneapp.optim import rebuild_optimizer
from tuneapp.rundir import write_atomically, write_json
from tuneapp.schedules import Schedule
from tuneapp.staged import StagedModel

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_LATER_FIELDS = {"sampling": "shuffle", "replacement": True, "num_samples": None}

Row = dict[str, Any]


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
        self.optimizer = rebuild_optimizer(self.optimizer, self.model, self.config)
        self.schedule = Schedule(self.optimizer, self.config, self.steps_per_epoch)
        self.schedule.replay(self.history)
        return True

    def save(self, folder: Path) -> None:
        """Write this epoch, and keep only it and the best one.

        Raises:
            OSError: the disk did not take it; what was there before is still complete.
        """
        folder.mkdir(parents=True, exist_ok=True)
        manifest = _read_manifest(folder)
        name = f"epoch-{self.epoch:04d}.pt"
        write_atomically(folder / name, lambda aside: torch.save(self._content(), aside))
        entry = {"file": name, "epoch": self.epoch, "sha256": _sha256(folder / name)}
        best = entry if self.best_epoch == self.epoch else manifest.get("best", entry)
        write_json(folder / MANIFEST, {"last": entry, "best": best})
        kept = (entry["file"], best["file"], MANIFEST)
        for file in folder.iterdir():  # older epochs, and what a killed save left half-written
            if file.name not in kept:
                file.unlink(missing_ok=True)

    def load(self, folder: Path) -> bool:
        """Go on from the newest intact checkpoint in `folder`; return whether there was one.

        Raises:
            CheckpointError: a checkpoint there belongs to another configuration.
        """
        manifest = _read_manifest(folder)
        for kind in ("last", "best"):
            content = _read_intact(folder, manifest[kind]) if manifest else None
            if content is not None:
                self._restore(content, folder)
                return True
        if manifest:
            log.warning("%s: no intact checkpoint; this trial starts from its beginning", folder)
        return False

    def _content(self) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        return {
            "config": canonical_json(self.config.as_dict()),
            "model": self.model.state_dict(),
            "loss": {} if self.loss_fn is None else self.loss_fn.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
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

    def _restore(self, content: dict[str, Any], folder: Path) -> None:
        # What a field meant before there was it is what it is by default.
        then = {**_LATER_FIELDS, **json.loads(content["config"])}
        if canonical_json(then) != canonical_json(self.config.as_dict()):
            raise CheckpointError(
                f"{folder} holds the checkpoint of another configuration: {content['config']}"
            )
        self.history = content["history"]
        self.best_epoch = content["best_epoch"]
        self.enter(self.epoch)  # the optimizer's groups are those of the epoch that was saved
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


def read_best(folder: Path) -> dict[str, Any]:
    """Return the content of the best checkpoint in `folder`.

    `model` is its state_dict, and `ema`, where there is one, that of the average that was
    validated.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    manifest = _read_manifest(folder)
    content = _read_intact(folder, manifest["best"]) if "best" in manifest else None
    if content is None:
        raise CheckpointError(f"{folder} holds no intact best checkpoint")
    return content


def validated_weights(content: dict[str, Any]) -> dict[str, Any]:
    """Return the state_dict of a checkpoint's model as it was validated: the average, if any."""
    averaged = content.get("ema")
    if averaged is None:
        weights: dict[str, Any] = content["model"]
        return weights
    prefix = "module."
    return {k.removeprefix(prefix): v for k, v in averaged.items() if k.startswith(prefix)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {kind: dict(manifest[kind]) for kind in ("last", "best")}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s is damaged (%s): its checkpoints are not used", folder / MANIFEST, error)
    return {}


def _read_intact(folder: Path, entry: dict[str, Any]) -> dict[str, Any] | None:
    file = folder / entry["file"]
    try:
        if _sha256(file) == entry["sha256"]:
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            return content
        log.warning("%s is damaged (its SHA-256 is not the manifest's): falling back", file)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        log.warning("%s cannot be read (%s): falling back", file, error)
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
