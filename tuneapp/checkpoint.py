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
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tuneapp.config import canonical_json
from tuneapp.errors import CheckpointError
from tuneapp.models import StagedModel
from tuneapp.rundir import write_atomically, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"

Row = dict[str, Any]


@dataclass
class TrainState:
    """Everything that the next epoch depends on.

    Attributes:
        config: the trial's configuration as plain values; a checkpoint of another one is refused.
        history: one row of metrics for each epoch done, oldest first.
        best_epoch: the epoch of the best metric so far; 0 before the first.
    """

    model: StagedModel
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: GradScaler
    config: dict[str, Any]
    history: list[Row] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

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
            "config": canonical_json(self.config),
            "model": self.model.state_dict(),
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
        if content["config"] != canonical_json(self.config):
            raise CheckpointError(
                f"{folder} holds the checkpoint of another configuration: {content['config']}"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.scaler.load_state_dict(content["scaler"])
        self.history = content["history"]
        self.best_epoch = content["best_epoch"]
        torch.set_rng_state(content["generators"]["cpu"])
        device = next(self.model.parameters()).device
        if content["generators"]["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(content["generators"]["cuda"], device)
        log.info("goes on after epoch %d", self.epoch)


def read_best(folder: Path) -> dict[str, Any]:
    """Return the content of the best checkpoint in `folder`: `model` is its state_dict.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    manifest = _read_manifest(folder)
    content = _read_intact(folder, manifest["best"]) if "best" in manifest else None
    if content is None:
        raise CheckpointError(f"{folder} holds no intact best checkpoint")
    return content


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
