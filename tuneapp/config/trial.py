"""A trial's configuration: everything that decides what is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any, Literal, TypeGuard, get_args

from tuneapp.config.checks import (
    Checked,
    above_zero,
    at_least_zero,
    file_reference,
    in_interval,
    is_in_interval,
    is_number,
    is_reference,
    is_whole,
    one_of,
    plain,
    require,
    shown,
    true_or_false,
    whole,
)
from tuneapp.config.losses import CrossEntropy, Loss
from tuneapp.config.optimizers import Optimizer
from tuneapp.config.schedules import Constant, Schedule
from tuneapp.errors import nearest

Amp = Literal["auto", "bf16", "fp16", "off"]
Augment = Literal["none", "light", "standard", "strong"]
Sampling = Literal["shuffle", "balanced", "weighted"]

AMP_MODES: tuple[str, ...] = get_args(Amp)
AUGMENTS: tuple[str, ...] = get_args(Augment)
SAMPLINGS: tuple[str, ...] = get_args(Sampling)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True)
class Preprocess(Checked):
    """Changes to the preprocessing that belongs to the weights; None keeps theirs.

    Pixels are in [0, 1]. Statistics of pixels in [0, 255] must be divided by 255.

    Attributes:
        mean: subtracted from each colour channel, red, green, blue; each in [0, 1].
        std: what each colour channel is then divided by; each in (0, 1].
        interpolation: `nearest`, `bilinear` or `bicubic`.
        resize_size: pixels of an image's shorter side before it is cropped to `image_size`.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    resize_size: int | None = None

    def _mistakes(self) -> list[str]:
        size_ok = self.resize_size is None or is_whole(self.resize_size, 16)
        given = self.interpolation
        named = given is None or (isinstance(given, str) and given in INTERPOLATIONS)
        words = "None or one of " + ", ".join(map(repr, INTERPOLATIONS))
        return [
            *_colour_mistakes("mean", self.mean, "[0, 1]"),
            *_colour_mistakes("std", self.std, "(0, 1]"),
            *require(named, "interpolation", given, words),
            *require(size_ok, "resize_size", self.resize_size, "None or a whole number >= 16"),
        ]


def _colour_mistakes(name: str, value: object, interval: str) -> list[str]:
    """Check for None or a number in `interval` for each colour channel."""
    if value is None:
        return []
    listed = value if isinstance(value, list | tuple) else []
    are_numbers = len(listed) == 3 and all(map(is_number, listed))
    ok = are_numbers and all(is_in_interval(each, interval) for each in listed)
    mistakes = require(ok, name, value, f"None or three numbers in {interval}")
    if are_numbers and max(listed) > 1:
        return [f"{mistake}: pixels are in [0, 1]; divide by 255" for mistake in mistakes]
    return mistakes


@dataclass(frozen=True, kw_only=True)
class TrialConfig(Checked):
    """Everything that decides what a trial trains.

    Attributes:
        model: name of a torchvision classifier, such as `resnet18`; `timm:` and the name of a timm
            network, such as `timm:resnet50d`; or the import path of a function
            `build(num_classes) -> nn.Module`, such as `package.module:build`.
        optimizer: the optimizer and the base learning rate `lr`.
        schedule: how the learning rates change over the training.
        loss: what is minimised.
        epochs: passes over the training set.
        batch_size: examples of one optimizer step.
        weights: a torchvision weights name (`DEFAULT`, `IMAGENET1K_V1`, ...), or torchvision's own
            `ResNet18_Weights.DEFAULT`: if it is not available, the trial fails; `auto`, the default
            weights if they are available within a minute, else random ones with a warning; a file
            (`.pth`, `.pt`, `.safetensors`) or the folder of a trial, of which its best checkpoint
            is taken; or None, random ones.
        partial_weights: accept a file that fits only a part of the backbone.
        freeze_depth: k >= 0 freezes the first k stages; k < 0 freezes all but the last -k (-1: all
            but the head).
        freeze: instead of `freeze_depth`: parameters whose names match one of these patterns
            (`layer1.*`, `*.bn?.*`; `*`, `?` and `[...]` as in file names) are frozen.
        unfreeze_at: epoch -> freeze depth from that epoch on, for gradual unfreezing; epochs count
            from 1, depths must decrease.
        frozen_batchnorm: whether the BatchNorm statistics of frozen stages are kept (`eval`) or
            continue to be updated from the data (`train`).
        lr_ratio: in (0, 1]: a stage d stages below the head learns at `lr * lr_ratio ** d`; or a
            mapping from every trainable stage to its own factor (> 0) on `lr`.
        head_lr_factor: > 0: the head alone learns at `lr * head_lr_factor`.
        decay_norms_and_biases: whether weight decay also shrinks biases, the parameters of
            normalisation layers, scales (`layer_scale`, `logit_scale`), all parameters of one
            dimension, class tokens, position embeddings, tables of relative position bias, and
            what the network's own `no_weight_decay()` names.
        dropout: probability in [0, 1) of the network's dropout layers; None keeps its own. Dropout
            in frozen stages is off.
        stochastic_depth: probability in [0, 1) with which the last residual block is skipped (the
            earlier ones less); None keeps the network's own.
        aux_weight: weight in the loss of each auxiliary classifier (GoogLeNet, Inception v3);
            0 trains without them.
        augment: strength of the random views: `none`; `light` (crops of 80-100 % of the area, no
            mirroring); `standard` (crops of 35-100 %, mirrored left-right half the time); `strong`
            (like `standard`, plus TrivialAugment and random erasing of a tenth of the images); or
            the import path of a function `build(image_size)` that returns a transform of uint8
            tensors (3, H, W) to (3, image_size, image_size), such as one of torchvision's v2.
        sampling: which examples an epoch has: `shuffle`, each once; `balanced`, the same number of
            each class; `weighted`, drawn by the weights that the data set gives.
        replacement: for `balanced` and `weighted`: whether an example may be drawn several times
            in an epoch, each time as another view. Without, `balanced` draws as many examples of
            each class as the smallest class has, different ones in each epoch.
        num_samples: examples per epoch, for `weighted`, or `balanced` with replacement; None is the
            size of the training set.
        mixup_alpha: > 0 blends the images of each batch (`torchvision.transforms.v2.MixUp`).
        cutmix_alpha: > 0 pastes parts of them into each other (`v2.CutMix`); with both, each batch
            gets one or the other.
        image_size: height and width in pixels of the network's input; None is the size at which
            the weights were evaluated (embedded data: 32).
        preprocess: changes to the preprocessing that belongs to the weights.
        clip_norm: gradients are scaled down to this total 2-norm; None is no limit.
        clip_value: each value of the gradients is clipped to [-clip_value, clip_value]; None is no
            limit.
        accumulation_steps: parts, of at least two examples each, in which a batch is computed to
            save memory; the optimizer still steps once per batch.
        ema_decay: in (0, 1): an exponential moving average of the weights is validated and saved
            instead of the weights themselves; its decay rises to `ema_decay` as
            `(1 + n) / (10 + n)` over the steps n.
        amp: automatic mixed precision: `auto` is bf16 or fp16 on a GPU and off on a CPU.
        channels_last: compute in the memory format NHWC.
        seed: another seed repeats the same configuration with other random head weights and
            dropout.
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

    def __post_init__(self) -> None:
        given: object = self.weights
        if _is_named_for(given, self.model):
            object.__setattr__(self, "weights", given.name)
        super().__post_init__()

    def _mistakes(self) -> list[str]:
        choices = [
            *_choice("optimizer", self.optimizer, get_args(Optimizer)),
            *_choice("schedule", self.schedule, get_args(Schedule)),
            *_choice("loss", self.loss, get_args(Loss)),
            *_preprocess_mistakes(self.preprocess),
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
        size_ok = self.image_size is None or is_whole(self.image_size, 16)
        return [
            *require(model_ok, "model", self.model, "a name or an import path"),
            *file_reference("model", self.model),
            *self._weights_mistakes(),
            *true_or_false("partial_weights", self.partial_weights),
            *_none_or_fraction("dropout", self.dropout),
            *_none_or_fraction("stochastic_depth", self.stochastic_depth),
            *at_least_zero("aux_weight", self.aux_weight),
            *require(size_ok, "image_size", self.image_size, "None or a whole number >= 16"),
        ]

    def _weights_mistakes(self) -> list[str]:
        given: object = self.weights
        if isinstance(given, Enum) and not isinstance(given, str):
            return [f"weights {given} are not those of {self.model}; write weights={given.name!r}"]
        ok = given is None or (isinstance(given, str) and given != "")
        return require(ok, "weights", given, "None, a name or a path")

    def _freezing_mistakes(self) -> list[str]:
        depth_ok = is_whole(self.freeze_depth, -1000)
        patterns_ok = isinstance(self.freeze, list | tuple) and all(
            isinstance(p, str) and p for p in self.freeze
        )
        is_one = isinstance(self.freeze, str) and self.freeze != ""
        mistakes = [
            *require(depth_ok, "freeze_depth", self.freeze_depth, "a whole number"),
            *require(patterns_ok, "freeze", self.freeze, "a list of patterns of parameter names"),
            *([f"write {[self.freeze]!r}"] if is_one else []),
            *self._unfreezing_mistakes(),
            *one_of("frozen_batchnorm", self.frozen_batchnorm, ("eval", "train")),
            *_lr_ratio_mistakes(self.lr_ratio),
            *above_zero("head_lr_factor", self.head_lr_factor),
            *true_or_false("decay_norms_and_biases", self.decay_norms_and_biases),
        ]
        if mistakes:
            return mistakes
        if self.freeze and (self.freeze_depth or self.unfreeze_at):
            mistakes.append("give either freeze, or freeze_depth and unfreeze_at, not both")
        if isinstance(self.lr_ratio, Mapping) and self.head_lr_factor != 1:
            mistakes.append(
                "head_lr_factor needs a number as lr_ratio; with a mapping, set the factor of the "
                "head in it"
            )
        return mistakes

    def _unfreezing_mistakes(self) -> list[str]:
        given = self.unfreeze_at
        ok = isinstance(given, Mapping) and all(
            is_whole(epoch, 2) and is_whole(depth, -1000) for epoch, depth in given.items()
        )
        if not ok:
            return require(False, "unfreeze_at", given, "a mapping epoch (from 2) -> freeze depth")
        late = [epoch for epoch in given if is_whole(self.epochs, 1) and epoch > self.epochs]
        if not late:
            return []
        these = f"epoch {late[0]} is" if len(late) == 1 else f"epochs {_listed(late)} are"
        return [f"unfreeze_at {these} after the last of {_count(self.epochs, 'epoch')}"]

    def _training_mistakes(self) -> list[str]:
        parts_ok = is_whole(self.accumulation_steps, 1) and (
            not is_whole(self.batch_size, 1)  # a mistake of its own
            or self.accumulation_steps <= max(1, self.batch_size // 2)
        )
        ema_ok = self.ema_decay is None or is_in_interval(self.ema_decay, "(0, 1)")
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
                "a whole number from 1 to half of batch_size (each part has at least 2 examples)",
            ),
        ]
        if mistakes:
            return mistakes
        if self.batch_size == 1 and self.is_mixed:
            mistakes.append("mixup_alpha and cutmix_alpha mix a batch: batch_size must be >= 2")
        if self.clip_norm is not None and self.clip_value is not None:
            mistakes.append("give either clip_norm or clip_value, not both")
        return mistakes

    def _augment_mistakes(self) -> list[str]:
        given = self.augment
        words = ", ".join(map(repr, AUGMENTS))
        allowed = f"one of {words}, or an import path such as 'package.module:build'"
        ok = is_reference(given) or (isinstance(given, str) and given in AUGMENTS)
        return file_reference("augment", given) or require(ok, "augment", given, allowed)

    def _sampling_mistakes(self) -> list[str]:
        mistakes = [
            *one_of("sampling", self.sampling, SAMPLINGS),
            *true_or_false("replacement", self.replacement),
        ]
        if mistakes:
            return mistakes
        if self.num_samples is None:
            if self.sampling == "weighted" and not self.replacement:
                return [
                    "num_samples must be given with sampling='weighted' and replacement=False: an "
                    "epoch of all examples would not be weighted"
                ]
            return []
        mistakes += whole("num_samples", self.num_samples, 1)
        if self.sampling == "shuffle":
            mistakes.append("num_samples needs sampling='balanced' or 'weighted'")
        elif self.sampling == "balanced" and not self.replacement:
            mistakes.append(
                "num_samples needs replacement=True with sampling='balanced': without, an epoch "
                "has as many examples of each class as the smallest class"
            )
        return mistakes

    @property
    def is_mixed(self) -> bool:
        """Whether the images of a batch are mixed, so that targets are class probabilities."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `kind` is the class of each choice."""
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
    by_name = {kind.__name__: kind for kind in kinds}
    hint = ""
    if isinstance(value, type) and value in kinds:
        hint = f"; did you forget the brackets: {_call(value)}?"
    elif isinstance(value, str) and (near := nearest(value, by_name)) is not None:
        hint = f"; did you mean {_call(by_name[near])}?"
    names = ", ".join(by_name)
    return [f"{name} must be one of {names} from tuneapp.config, got {shown(value)}{hint}"]


def _preprocess_mistakes(value: object) -> list[str]:
    hint = ""
    if value is Preprocess:
        hint = "; did you forget the brackets?"
    ok = isinstance(value, Preprocess)
    return [] if ok else [f"preprocess must be a Preprocess(...), got {shown(value)}{hint}"]


def _call(kind: type) -> str:
    """Return how an object of this class is made, with the arguments that it must be given."""
    required = [
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    return f"{kind.__name__}({', '.join(f'{name}=...' for name in required)})"


def _is_named_for(weights: object, model: object) -> TypeGuard[Enum]:
    """Whether `weights` is a member of the enum of this model's weights, as torchvision names it.

    `ResNet18_Weights.DEFAULT` is one for `resnet18`. Two models have members of the same name.
    """
    enum_name = type(weights).__name__.lower()
    return isinstance(weights, Enum) and enum_name == f"{str(model).lower()}_weights"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _none_or_fraction(name: str, value: float | None) -> list[str]:
    return [] if value is None else in_interval(name, value, "[0, 1)")


def _none_or_positive(name: str, value: float | None) -> list[str]:
    ok = value is None or (is_number(value) and value > 0)
    return require(ok, name, value, "None or a number > 0")


def _lr_ratio_mistakes(lr_ratio: object) -> list[str]:
    if isinstance(lr_ratio, Mapping):
        unnamed = [name for name in lr_ratio if not isinstance(name, str)]
        wrong = {k: v for k, v in lr_ratio.items() if not is_number(v) or v <= 0}
        return [
            *require(not unnamed, "lr_ratio", unnamed, "a mapping from names of stages"),
            *require(not wrong, "lr_ratio", wrong, "a number > 0 for each stage"),
        ]
    ok = is_in_interval(lr_ratio, "(0, 1]")
    return require(ok, "lr_ratio", lr_ratio, "a number in (0, 1], or a mapping stage -> factor")
