"""A trial's configuration: everything that decides what is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from tuneapp.config.checks import (
    Checked,
    at_least_zero,
    fraction,
    is_number,
    is_reference,
    is_whole,
    one_of,
    plain,
    require,
    true_or_false,
    whole,
)
from tuneapp.config.losses import CrossEntropy, Loss
from tuneapp.config.optimizers import Optimizer
from tuneapp.config.schedules import Constant, Schedule
from tuneapp.errors import did_you_mean

Amp = Literal["auto", "bf16", "fp16", "off"]
Augment = Literal["none", "light", "standard", "strong"]
Sampling = Literal["shuffle", "balanced", "weighted"]

AMP_MODES: tuple[str, ...] = get_args(Amp)
AUGMENTS: tuple[str, ...] = get_args(Augment)
SAMPLINGS: tuple[str, ...] = get_args(Sampling)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True)
class Preprocess(Checked):
    """What is to differ from the weights' own preprocessing; None leaves theirs.

    Attributes:
        mean: of each colour channel, red, green, blue, of pixels in [0, 1]; subtracted.
        std: of each colour channel, > 0; divided by.
        interpolation: `nearest`, `bilinear` or `bicubic`.
        resize_size: pixels of an image's shorter side before it is cropped to `image_size`.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    resize_size: int | None = None

    def _mistakes(self) -> list[str]:
        mean_ok = self.mean is None or _three_numbers(self.mean)
        std_ok = self.std is None or (_three_numbers(self.std) and min(self.std) > 0)
        size_ok = self.resize_size is None or is_whole(self.resize_size, 16)
        named = self.interpolation is None or self.interpolation in INTERPOLATIONS
        words = "None or one of " + ", ".join(map(repr, INTERPOLATIONS))
        return [
            *require(mean_ok, "mean", self.mean, "None or three numbers"),
            *require(std_ok, "std", self.std, "None or three numbers > 0"),
            *require(named, "interpolation", self.interpolation, words),
            *require(size_ok, "resize_size", self.resize_size, "None or a whole number >= 16"),
        ]


def _three_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(is_number, value))


@dataclass(frozen=True, kw_only=True)
class TrialConfig(Checked):
    """Everything that decides what a trial trains.

    Attributes:
        model: name of a torchvision classifier, such as `resnet18`, or the import path of a
            function `build(num_classes) -> nn.Module`, such as `package.module:build`.
        optimizer: the optimizer and the head's learning rate.
        schedule: how the learning rates change over the training.
        loss: what is minimised.
        epochs: passes over the training set.
        batch_size: examples of one optimizer step.
        weights: a torchvision weights name (`DEFAULT`, `IMAGENET1K_V1`, ...), which must be had;
            `auto`, the default ones if they can be had within seconds, else random ones with a
            warning; a file (`.pth`, `.pt`, `.safetensors`) or a checkpoint folder of a trial; or
            None, random ones.
        partial_weights: take a file even if less than half of the backbone fits.
        freeze_depth: the first so many stages are frozen (0: none); below zero, all but so many
            (-1: all but the head).
        freeze: instead of `freeze_depth`: parameters whose names match one of these patterns
            (`layer1.*`, `*.bn?.*`; `*`, `?` and `[...]` as in file names) are frozen.
        unfreeze_at: epoch -> freeze depth from that epoch on, for gradual unfreezing; epochs count
            from 1, depths become smaller.
        frozen_batchnorm: whether the BatchNorm statistics of frozen stages stay (`eval`), or go on
            following the data (`train`).
        lr_ratio: in (0, 1]: stage i learns at `lr * lr_ratio ** (number of stages from i up to the
            head)`; or a mapping from every trainable stage to its own factor (> 0) on `lr`.
        head_lr_factor: > 0: the head alone learns at `lr` times this.
        decay_norms_and_biases: whether weight decay also shrinks biases and the scales of
            normalisation layers: all parameters of one dimension.
        dropout: probability in [0, 1) of the network's dropout layers; None leaves its own. Those
            in frozen stages are off.
        stochastic_depth: probability in [0, 1) with which the last residual block is skipped (the
            earlier ones less); None leaves the network's own.
        aux_weight: weight in the loss of each auxiliary classifier (GoogLeNet, Inception v3);
            0 trains without them.
        augment: strength of the random views: `none`; `light` (crops of 80-100 % of the area,
            nothing mirrored); `standard` (crops of 35-100 %, mirrored left-right half the time);
            `strong` (besides, TrivialAugment, and random erasing of a tenth of the images); or the
            import path of a function `build(image_size)` that returns a transform of uint8 tensors
            (3, H, W) to (3, image_size, image_size), such as one of torchvision's v2.
        sampling: which examples an epoch has: `shuffle`, each once; `balanced`, of each class as
            many; `weighted`, as the weights that the data give say.
        replacement: where sampling is not `shuffle`, whether an example may come several times in
            an epoch, each time as another view. Without, `balanced` takes as many of each class as
            the smallest one has, other ones in each epoch.
        num_samples: examples of an epoch, where they are weighted, or balanced with replacement;
            None is as many as there are.
        mixup_alpha: > 0 blends the images of each batch (`torchvision.transforms.v2.MixUp`).
        cutmix_alpha: > 0 pastes parts of them into each other (`v2.CutMix`); with both, each batch
            gets one or the other.
        image_size: height and width in pixels that the network sees; None is what the weights
            were evaluated at (embedded data: 32).
        preprocess: what is to differ from the weights' own preprocessing.
        clip_norm: gradients are scaled down to this total 2-norm; None leaves them.
        clip_value: each number of the gradients is cut to [-this, this]; None leaves them.
        accumulation_steps: a batch is computed in so many parts (of two examples at least), to
            need less memory; the optimizer still steps once per batch.
        ema_decay: in (0, 1): an exponential moving average of the weights is what is validated
            and kept; the decay rises to this as `(1 + n) / (10 + n)` over the steps n.
        amp: automatic mixed precision: `auto` is bf16 or fp16 on a GPU and off on a CPU.
        channels_last: compute in the memory format NHWC.
        seed: a repeat of the same configuration with another draw of head weights and dropout.
    """

    model: str
    optimizer: Optimizer
    schedule: Schedule = field(default_factory=Constant)
    loss: Loss = field(default_factory=CrossEntropy)
    epochs: int = 10
    batch_size: int = 32
    weights: str | None = "auto"
    partial_weights: bool = False
    freeze_depth: int = 0
    freeze: Sequence[str] = ()
    unfreeze_at: Mapping[int, int] = field(default_factory=dict)
    frozen_batchnorm: Literal["eval", "train"] = "eval"
    lr_ratio: float | Mapping[str, float] = 1.0
    head_lr_factor: float = 1.0
    decay_norms_and_biases: bool = True
    dropout: float | None = None
    stochastic_depth: float | None = None
    aux_weight: float = 0.0
    augment: str = "light"
    sampling: Sampling = "shuffle"
    replacement: bool = True
    num_samples: int | None = None
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    image_size: int | None = None
    preprocess: Preprocess = field(default_factory=Preprocess)
    clip_norm: float | None = None
    clip_value: float | None = None
    accumulation_steps: int = 1
    ema_decay: float | None = None
    amp: Amp = "auto"
    channels_last: bool = False
    seed: int = 0

    def _mistakes(self) -> list[str]:
        choices = [
            *_choice("optimizer", self.optimizer, get_args(Optimizer)),
            *_choice("schedule", self.schedule, get_args(Schedule)),
            *_choice("loss", self.loss, get_args(Loss)),
            *_choice("preprocess", self.preprocess, (Preprocess,)),
        ]
        if choices:
            return choices
        return [
            *self._model_mistakes(),
            *self._freezing_mistakes(),
            *self._training_mistakes(),
        ]

    def _model_mistakes(self) -> list[str]:
        model_ok = isinstance(self.model, str) and self.model != ""
        weights_ok = self.weights is None or (isinstance(self.weights, str) and self.weights != "")
        size_ok = self.image_size is None or is_whole(self.image_size, 16)
        return [
            *require(model_ok, "model", self.model, "a name or an import path"),
            *require(weights_ok, "weights", self.weights, "None, a name or a path"),
            *true_or_false("partial_weights", self.partial_weights),
            *([] if self.dropout is None else fraction("dropout", self.dropout)),
            *(
                []
                if self.stochastic_depth is None
                else fraction("stochastic_depth", self.stochastic_depth)
            ),
            *at_least_zero("aux_weight", self.aux_weight),
            *require(size_ok, "image_size", self.image_size, "None or a whole number >= 16"),
        ]

    def _freezing_mistakes(self) -> list[str]:
        depth_ok = is_whole(self.freeze_depth, -1000)
        patterns_ok = isinstance(self.freeze, list | tuple) and all(
            isinstance(p, str) and p for p in self.freeze
        )
        mistakes = [
            *require(depth_ok, "freeze_depth", self.freeze_depth, "a whole number"),
            *require(patterns_ok, "freeze", self.freeze, "a list of patterns of parameter names"),
            *self._unfreezing_mistakes(),
            *one_of("frozen_batchnorm", self.frozen_batchnorm, ("eval", "train")),
            *_lr_ratio_mistakes(self.lr_ratio),
            *_positive("head_lr_factor", self.head_lr_factor),
            *true_or_false("decay_norms_and_biases", self.decay_norms_and_biases),
        ]
        if self.freeze and (self.freeze_depth or self.unfreeze_at):
            mistakes.append("freeze names parameters: give it, or freeze_depth and unfreeze_at")
        if isinstance(self.lr_ratio, Mapping) and self.head_lr_factor != 1:
            mistakes.append("head_lr_factor goes with a number as lr_ratio; a mapping has its own")
        return mistakes

    def _unfreezing_mistakes(self) -> list[str]:
        given = self.unfreeze_at
        ok = isinstance(given, Mapping) and all(
            is_whole(epoch, 2) and is_whole(depth, -1000) for epoch, depth in given.items()
        )
        if not ok:
            return require(False, "unfreeze_at", given, "a mapping epoch (from 2) -> freeze depth")
        late = [epoch for epoch in given if is_whole(self.epochs, 1) and epoch > self.epochs]
        return require(not late, "unfreeze_at", late, f"epochs up to {self.epochs}")

    def _training_mistakes(self) -> list[str]:
        parts_ok = is_whole(self.accumulation_steps, 1) and (
            not is_whole(self.batch_size, 1)  # which is told by itself
            or self.accumulation_steps <= self.batch_size
        )
        ema_ok = self.ema_decay is None or (is_number(self.ema_decay) and 0 < self.ema_decay < 1)
        mistakes = [
            *whole("epochs", self.epochs, 1),
            *whole("batch_size", self.batch_size, 1),
            *whole("seed", self.seed, 0),
            *self._augment_mistakes(),
            *self._sampling_mistakes(),
            *at_least_zero("mixup_alpha", self.mixup_alpha),
            *at_least_zero("cutmix_alpha", self.cutmix_alpha),
            *one_of("amp", self.amp, AMP_MODES),
            *true_or_false("channels_last", self.channels_last),
            *_none_or_positive("clip_norm", self.clip_norm),
            *_none_or_positive("clip_value", self.clip_value),
            *require(ema_ok, "ema_decay", self.ema_decay, "None or a number in (0, 1)"),
            *require(
                parts_ok,
                "accumulation_steps",
                self.accumulation_steps,
                "a whole number from 1 to batch_size",
            ),
        ]
        if self.clip_norm is not None and self.clip_value is not None:
            mistakes.append("clip_norm and clip_value: give one of them")
        return mistakes

    def _augment_mistakes(self) -> list[str]:
        if is_reference(self.augment):
            return []
        words = ", ".join(map(repr, AUGMENTS))
        allowed = f"one of {words}, or an import path such as 'package.module:build'"
        return require(self.augment in AUGMENTS, "augment", self.augment, allowed)

    def _sampling_mistakes(self) -> list[str]:
        mistakes = [
            *one_of("sampling", self.sampling, SAMPLINGS),
            *true_or_false("replacement", self.replacement),
        ]
        if self.num_samples is None:
            if self.sampling == "weighted" and not self.replacement:
                mistakes.append(
                    "num_samples must be given: weighted without replacement, an epoch of all "
                    "examples would not be weighted"
                )
            return mistakes
        mistakes += whole("num_samples", self.num_samples, 1)
        if self.sampling == "shuffle":
            mistakes.append("num_samples goes with sampling='balanced' or 'weighted'")
        elif self.sampling == "balanced" and not self.replacement:
            mistakes.append(
                "num_samples goes with replacement: without, balanced takes as many of each class "
                "as the smallest one has"
            )
        return mistakes

    @property
    def is_mixed(self) -> bool:
        """Whether the images of a batch are mixed, so that targets are shares of classes."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; each choice says its class under `kind`."""
        values = _fields(self)
        for name in ("optimizer", "schedule", "loss"):
            values[name] = {"kind": type(values[name]).__name__, **_fields(values[name])}
        values["preprocess"] = _fields(self.preprocess)
        values["unfreeze_at"] = {str(epoch): depth for epoch, depth in self.unfreeze_at.items()}
        return values


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: plain(getattr(value, field.name)) for field in fields(value)}


def _choice(name: str, value: object, kinds: tuple[type, ...]) -> list[str]:
    """Check for an object of one of these classes."""
    if isinstance(value, kinds):
        return []
    names = [kind.__name__ for kind in kinds]
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    return [f"{name} must be one of {', '.join(names)} from tuneapp.config, got {value!r}{hint}"]


def _positive(name: str, value: float) -> list[str]:
    return require(is_number(value) and value > 0, name, value, "a number > 0")


def _none_or_positive(name: str, value: float | None) -> list[str]:
    ok = value is None or (is_number(value) and value > 0)
    return require(ok, name, value, "None or a number > 0")


def _lr_ratio_mistakes(lr_ratio: object) -> list[str]:
    if isinstance(lr_ratio, Mapping):
        wrong = {k: v for k, v in lr_ratio.items() if not is_number(v) or v <= 0}
        return require(not wrong, "lr_ratio", wrong, "a number > 0 for each stage")
    ok = isinstance(lr_ratio, int | float) and is_number(lr_ratio) and 0 < lr_ratio <= 1
    return require(ok, "lr_ratio", lr_ratio, "in (0, 1], or a mapping stage -> factor")
