"""Where and how trials run, and how they are compared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tuneapp.config.checks import (
    METRICS,
    Checked,
    is_metric,
    is_whole,
    metric_mode,
    one_of,
    require,
    whole,
)
from tuneapp.config.data import Data
from tuneapp.config.trial import TrialConfig
from tuneapp.errors import did_you_mean


@dataclass(frozen=True, kw_only=True)
class RunSettings(Checked):
    """Where and how trials run: the same for every trial of a sweep, and never searched.

    Attributes:
        data: which images, and how they are split.
        seed: with a trial's own `seed`, the source of every random draw.
        metric: what a trial is judged by, always at its best epoch: `val/loss`, `val/accuracy`,
            `val/balanced_accuracy`, `val/macro_f1`, `val/auroc`, of multi-label data
            `val/average_precision`, or `val/recall/<class>`. With folds, by its mean over them.
        max_epochs: a ceiling on every trial's `epochs`, for quick looks.
        image_size: replaces every trial's `image_size`.
        device: `auto` is the trial's GPU where it has one, else the CPU.
        store_budget: bytes that the decoded images of all data sets may take on this machine's
            disk; what does not fit is decoded at each use. None means half of the free space.
        workers: processes of each trial that make its batches; None means none for stored images,
            and one for each of the trial's CPU threads for those decoded at each use.
    """

    data: Data = field(default_factory=Data)
    seed: int = 0
    metric: str = "val/accuracy"
    max_epochs: int | None = None
    image_size: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    store_budget: int | None = None
    workers: int | None = None

    def _mistakes(self) -> list[str]:
        epochs_ok = self.max_epochs is None or is_whole(self.max_epochs, 1)
        near = did_you_mean(str(self.metric), [f"val/{name}" for name in METRICS])
        size_ok = self.image_size is None or is_whole(self.image_size, 16)
        budget_ok = self.store_budget is None or is_whole(self.store_budget, 0)
        workers_ok = self.workers is None or is_whole(self.workers, 0)
        names = ", ".join(f"val/{name}" for name in METRICS)
        return [
            *require(isinstance(self.data, Data), "data", self.data, "a Data"),
            *require(budget_ok, "store_budget", self.store_budget, "None or bytes >= 0"),
            *require(workers_ok, "workers", self.workers, "None or a whole number >= 0"),
            *whole("seed", self.seed, 0),
            *(
                mistake + near
                for mistake in require(
                    is_metric(self.metric),
                    "metric",
                    self.metric,
                    f"one of {names}, val/recall/CLASS",
                )
            ),
            *one_of("device", self.device, ("auto", "cpu", "cuda")),
            *require(epochs_ok, "max_epochs", self.max_epochs, "a whole number >= 1"),
            *require(size_ok, "image_size", self.image_size, "a whole number >= 16"),
        ]

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a larger or a smaller value of the metric is better."""
        return metric_mode(self.metric)

    def applied_to(self, config: TrialConfig) -> TrialConfig:
        """Return `config` with this run's ceiling on epochs and its image size.

        Epochs beyond the ceiling are dropped, and so is the unfreezing planned for them.
        """
        epochs = min(config.epochs, self.max_epochs or config.epochs)
        return replace(
            config,
            epochs=epochs,
            unfreeze_at={e: d for e, d in config.unfreeze_at.items() if e <= epochs},
            image_size=self.image_size or config.image_size,
        )


def is_better(value: float, than: float | None, mode: Literal["max", "min"]) -> bool:
    """Whether `value` beats `than` (None: no value yet); of equal values, the first stays."""
    if than is None:
        return True
    return value > than if mode == "max" else value < than


def canonical_json(plain: Mapping[str, Any]) -> str:
    """Return the canonical JSON of `plain`: sorted keys, no spaces, finite numbers only."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
