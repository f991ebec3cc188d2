"""What a trial is (searched) and how it is run (never searched), as typed, checked values.

Every class is frozen and keyword-only, so that a typo in a search space is a `TypeError` on the
user's own line. Wrong values are collected and reported together. This module imports nothing but
the standard library: search-space files import it, and `tuneapp show` stays fast.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from tuneapp.errors import ConfigError

Amp = Literal["auto", "bf16", "fp16", "off"]
Augment = Literal["none", "light", "standard"]
Metric = Literal["val/accuracy", "val/loss"]

AMP_MODES: tuple[str, ...] = ("auto", "bf16", "fp16", "off")
AUGMENTS: tuple[str, ...] = ("none", "light", "standard")
METRIC_MODES: Mapping[str, Literal["max", "min"]] = MappingProxyType(
    {"val/accuracy": "max", "val/loss": "min"}
)


class _Checked:
    """Collects every mistake of a value before raising once."""

    def _mistakes(self) -> list[str]:
        """Return what is wrong, a line each; every class says it for its own fields."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        mistakes = self._mistakes()
        if mistakes:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(mistakes))


def _require(ok: bool, name: str, value: object, allowed: str) -> list[str]:
    return [] if ok else [f"{name} must be {allowed}, got {value!r}"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _above_zero(name: str, value: float) -> list[str]:
    return _require(_is_number(value) and value > 0, name, value, "a number > 0")


def _at_least_zero(name: str, value: float) -> list[str]:
    return _require(_is_number(value) and value >= 0, name, value, "a number >= 0")


def _fraction(name: str, value: float) -> list[str]:
    return _require(_is_number(value) and 0 <= value < 1, name, value, "a number in [0, 1)")


def _whole(name: str, value: int, least: int) -> list[str]:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return _require(ok, name, value, f"a whole number >= {least}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    return _require(value in allowed, name, value, "one of " + ", ".join(map(repr, allowed)))


# --- Optimizers: torch's names, and SGD with the momentum that fine-tuning uses -----------------


@dataclass(frozen=True, kw_only=True)
class Sgd(_Checked):
    """`torch.optim.SGD`. `lr` is the head's learning rate; the stages below follow `lr_ratio`."""

    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def _mistakes(self) -> list[str]:
        has_momentum = _is_number(self.momentum) and self.momentum > 0
        nesterov_ok = self.nesterov is False or (self.nesterov is True and has_momentum)
        return [
            *_above_zero("lr", self.lr),
            *_fraction("momentum", self.momentum),
            *_at_least_zero("weight_decay", self.weight_decay),
            *_require(
                nesterov_ok,
                "nesterov",
                self.nesterov,
                "True or False, and False when momentum is 0",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class Adam(_Checked):
    """`torch.optim.Adam` (weight decay is an L2 penalty). `lr` is the head's learning rate."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0

    def _mistakes(self) -> list[str]:
        return [
            *_above_zero("lr", self.lr),
            *_fraction("beta1", self.beta1),
            *_fraction("beta2", self.beta2),
            *_at_least_zero("weight_decay", self.weight_decay),
        ]


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """`torch.optim.AdamW` (weight decay is decoupled). `lr` is the head's learning rate."""

    weight_decay: float = 1e-2


Optimizer = Sgd | Adam | AdamW


# --- Learning-rate schedules: every one is stepped after each optimizer step ----------------------


@dataclass(frozen=True, kw_only=True)
class _WarmedUp(_Checked):
    """Schedules that may begin with a linear warm-up.

    Attributes:
        warmup_fraction: share of all steps during which the learning rate rises linearly from a
            hundredth of its value. A share and not a count, so that a shorter training
            (`--epochs`) keeps its shape.
    """

    warmup_fraction: float = 0.0

    def _mistakes(self) -> list[str]:
        return _fraction("warmup_fraction", self.warmup_fraction)


@dataclass(frozen=True, kw_only=True)
class Constant(_WarmedUp):
    """One learning rate throughout."""


@dataclass(frozen=True, kw_only=True)
class Step(_WarmedUp):
    """`torch.optim.lr_scheduler.StepLR`: multiply by `gamma` after every `every_epochs` epochs.

    Epochs are counted from the end of the warm-up.
    """

    every_epochs: int
    gamma: float = 0.1

    def _mistakes(self) -> list[str]:
        return [
            *super()._mistakes(),
            *_whole("every_epochs", self.every_epochs, 1),
            *_require(
                _is_number(self.gamma) and 0 < self.gamma <= 1, "gamma", self.gamma, "in (0, 1]"
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class Cosine(_WarmedUp):
    """`torch.optim.lr_scheduler.CosineAnnealingLR`: one half cosine down to zero."""


@dataclass(frozen=True, kw_only=True)
class OneCycle(_Checked):
    """`torch.optim.lr_scheduler.OneCycleLR`: `lr` is the peak, reached after two steps or more.

    The momentum (Adam: beta1) stays where the optimizer's configuration puts it.
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def _mistakes(self) -> list[str]:
        return [
            *_require(
                _is_number(self.pct_start) and 0 < self.pct_start < 1,
                "pct_start",
                self.pct_start,
                "a number in (0, 1)",
            ),
            *_above_zero("div_factor", self.div_factor),
            *_above_zero("final_div_factor", self.final_div_factor),
        ]


Schedule = Constant | Step | Cosine | OneCycle


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(_Checked):
    """`torch.nn.CrossEntropyLoss`, in nats."""

    label_smoothing: float = 0.0

    def _mistakes(self) -> list[str]:
        return _fraction("label_smoothing", self.label_smoothing)


# --- A trial -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrialConfig(_Checked):
    """Everything that decides what a trial trains.

    Attributes:
        model: name of a torchvision classifier, such as `resnet18`.
        weights: a torchvision weights name (`DEFAULT`, `IMAGENET1K_V1`, ...), which must be had;
            `auto`, the default ones if they can be had within seconds, else random ones with a
            warning; a path to a state_dict file; or None, random ones.
        optimizer: the optimizer and the head's learning rate.
        schedule: how the learning rates change over the training.
        epochs: passes over the training set.
        batch_size: examples of one optimizer step.
        freeze_depth: the first so many stages are frozen (0: none).
        lr_ratio: in (0, 1]: stage i learns at `lr * lr_ratio ** (number of stages from i up to the
            head)`; or a mapping from every trainable stage to its own factor (> 0) on `lr`.
        loss: what is minimised.
        augment: strength of the random views: `none`; `light` (crops of 80-100 % of the area,
            nothing mirrored); `standard` (crops of 35-100 %, mirrored left-right half the time).
        image_size: height and width in pixels that the network sees; None is what the weights
            were evaluated at (embedded data: 32).
        clip_norm: gradients are scaled down to this total 2-norm; None leaves them.
        accumulation_steps: a batch is computed in so many parts (of two examples at least), to
            need less memory; the optimizer still steps once per batch.
        amp: automatic mixed precision: `auto` is bf16 or fp16 on a GPU and off on a CPU.
        seed: a repeat of the same configuration with another draw of head weights and dropout.
    """

    model: str
    optimizer: Optimizer
    schedule: Schedule = field(default_factory=Constant)
    epochs: int = 10
    batch_size: int = 32
    weights: str | None = "auto"
    freeze_depth: int = 0
    lr_ratio: float | Mapping[str, float] = 1.0
    loss: CrossEntropy = field(default_factory=CrossEntropy)
    augment: Augment = "light"
    image_size: int | None = None
    clip_norm: float | None = None
    accumulation_steps: int = 1
    amp: Amp = "auto"
    seed: int = 0

    def _mistakes(self) -> list[str]:
        parts_ok = isinstance(self.optimizer, Sgd | Adam) and isinstance(
            self.schedule, Constant | Step | Cosine | OneCycle
        )
        if not parts_ok or not isinstance(self.loss, CrossEntropy):
            return ["optimizer, schedule and loss must be objects from tuneapp.config"]
        size_ok = self.image_size is None or not _whole("image_size", self.image_size, 16)
        weights_ok = self.weights is None or (isinstance(self.weights, str) and self.weights != "")
        clip_ok = self.clip_norm is None or (_is_number(self.clip_norm) and self.clip_norm > 0)
        parts_ok = not _whole("accumulation_steps", self.accumulation_steps, 1) and (
            bool(_whole("batch_size", self.batch_size, 1))  # which is told by itself
            or self.accumulation_steps <= self.batch_size
        )
        return [
            *_whole("epochs", self.epochs, 1),
            *_whole("batch_size", self.batch_size, 1),
            *_whole("freeze_depth", self.freeze_depth, 0),
            *_whole("seed", self.seed, 0),
            *_one_of("augment", self.augment, AUGMENTS),
            *_one_of("amp", self.amp, AMP_MODES),
            *_lr_ratio_mistakes(self.lr_ratio),
            *_require(size_ok, "image_size", self.image_size, "None or a whole number >= 16"),
            *_require(weights_ok, "weights", self.weights, "None, a name or a path"),
            *_require(clip_ok, "clip_norm", self.clip_norm, "None or a number > 0"),
            *_require(
                parts_ok,
                "accumulation_steps",
                self.accumulation_steps,
                "a whole number from 1 to batch_size",
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; each choice says its class under `kind`."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("optimizer", "schedule", "loss"):
            choice = plain[name]
            plain[name] = {"kind": type(choice).__name__, **asdict(choice)}
        if isinstance(self.lr_ratio, Mapping):
            plain["lr_ratio"] = dict(self.lr_ratio)
        return plain


def _lr_ratio_mistakes(lr_ratio: object) -> list[str]:
    if isinstance(lr_ratio, Mapping):
        wrong = {k: v for k, v in lr_ratio.items() if not _is_number(v) or v <= 0}
        return _require(not wrong, "lr_ratio", wrong, "a number > 0 for each stage")
    ok = isinstance(lr_ratio, int | float) and _is_number(lr_ratio) and 0 < lr_ratio <= 1
    return _require(ok, "lr_ratio", lr_ratio, "in (0, 1], or a mapping stage -> factor")


# --- A run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSettings(_Checked):
    """Where and how trials run: the same for every trial of a sweep, and never searched.

    Attributes:
        data: `digits` (embedded) or the path of an image folder.
        seed: with a trial's own `seed`, the source of every random draw.
        metric: what a trial is judged by, always at its best epoch.
        max_epochs: a ceiling on every trial's `epochs`, for quick looks.
        image_size: replaces every trial's `image_size`.
        device: `auto` is the trial's GPU where it has one, else the CPU.
    """

    data: str = "digits"
    seed: int = 0
    metric: Metric = "val/accuracy"
    max_epochs: int | None = None
    image_size: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def _mistakes(self) -> list[str]:
        epochs_ok = self.max_epochs is None or not _whole("max_epochs", self.max_epochs, 1)
        size_ok = self.image_size is None or not _whole("image_size", self.image_size, 16)
        return [
            *_whole("seed", self.seed, 0),
            *_one_of("metric", self.metric, tuple(METRIC_MODES)),
            *_one_of("device", self.device, ("auto", "cpu", "cuda")),
            *_require(epochs_ok, "epochs", self.max_epochs, "a whole number >= 1"),
            *_require(size_ok, "image_size", self.image_size, "a whole number >= 16"),
        ]

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a larger or a smaller value of the metric is better."""
        return METRIC_MODES[self.metric]

    def applied_to(self, config: TrialConfig) -> TrialConfig:
        """Return `config` under this run's ceiling on epochs and its image size."""
        return replace(
            config,
            epochs=min(config.epochs, self.max_epochs or config.epochs),
            image_size=self.image_size or config.image_size,
        )


def is_better(value: float, than: float | None, mode: Literal["max", "min"]) -> bool:
    """Whether `value` beats `than` (None: nothing yet); of equals, the first stays."""
    if than is None:
        return True
    return value > than if mode == "max" else value < than


def canonical_json(plain: Mapping[str, Any]) -> str:
    """Return one spelling of `plain`: sorted keys, no spaces, finite numbers only."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
