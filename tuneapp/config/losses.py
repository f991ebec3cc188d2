"""Losses. Where images are mixed (mixup, cutmix), all of them take class probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tuneapp.config.checks import (
    Checked,
    above_zero,
    at_least_zero,
    in_interval,
    is_number,
    is_plain,
    reference,
    require,
)

LEAST_SMOOTH = 1e-6
"""Far above 1e-38, below which `1 / smooth` is infinite in float32 and gradients are NaN."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Checked):
    """`torch.nn.CrossEntropyLoss`, in nats.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: a weight > 0 for each class in the order of their names, or `balanced`:
            `examples / (classes * examples of the class)`, of the training set. The loss of a
            batch is divided by the sum of the weights of its targets, as in torch for labels; for
            class probabilities (mixed images) too, where torch divides by the number of examples.
    """

    label_smoothing: float = 0.0
    class_weights: Sequence[float] | Literal["balanced"] | None = None

    def _mistakes(self) -> list[str]:
        given = self.class_weights
        listed = given if isinstance(given, list | tuple) else ()
        weights_ok = bool(listed) and all(is_number(w) and w > 0 for w in listed)
        # An array compares number by number.
        ok = given is None or (isinstance(given, str) and given == "balanced") or weights_ok
        allowed = "None, 'balanced', or a list with a number > 0 for each class"
        return [
            *in_interval("label_smoothing", self.label_smoothing, "[0, 1)"),
            *require(ok, "class_weights", given, allowed),
        ]


@dataclass(frozen=True, kw_only=True)
class Focal(Checked):
    """`torchvision.ops.sigmoid_focal_loss`: each class against the rest, easy cases count less.

    Summed over classes, averaged over examples. With exclusive classes, too, it is this sigmoid
    form of Lin et al. 2017 and not one of the softmax variants, so that it means the same for every
    kind of targets; a softmax variant is a few lines as `OwnLoss`.

    Attributes:
        gamma: how much less; 0 is binary cross-entropy.
        alpha: weight in [0, 1) of a class that is present, `1 - alpha` of those that are not; None
            weighs both equally. The default is that of object detection.
    """

    gamma: float = 2.0
    alpha: float | None = 0.25

    def _mistakes(self) -> list[str]:
        alpha = [] if self.alpha is None else in_interval("alpha", self.alpha, "[0, 1)")
        return [*at_least_zero("gamma", self.gamma), *alpha]


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(Checked):
    """`torch.nn.BCEWithLogitsLoss`: each class against the rest, averaged over all of them.

    Attributes:
        label_smoothing: targets go from 0 and 1 to `s / 2` and `1 - s / 2`.
        pos_weight: weight of the classes that are present; of exclusive classes, that is one.
    """

    label_smoothing: float = 0.0
    pos_weight: float = 1.0

    def _mistakes(self) -> list[str]:
        return [
            *in_interval("label_smoothing", self.label_smoothing, "[0, 1)"),
            *above_zero("pos_weight", self.pos_weight),
        ]


@dataclass(frozen=True, kw_only=True)
class Dice(Checked):
    """One less the soft Dice coefficient of each example over its classes (and pixels).

    For class probabilities it is the Dice semimetric loss (Wang et al. 2023), which is smallest
    where the outputs equal them.

    Attributes:
        smooth: added to numerator and denominator, so that an empty target has a gradient.
    """

    smooth: float = 1.0

    def _mistakes(self) -> list[str]:
        return _smooth(self.smooth)


@dataclass(frozen=True, kw_only=True)
class BceDice(Checked):
    """`(1 - dice_weight)` of binary cross-entropy and `dice_weight` of Dice."""

    dice_weight: float = 0.5
    smooth: float = 1.0

    def _mistakes(self) -> list[str]:
        return [
            *in_interval("dice_weight", self.dice_weight, "[0, 1)"),
            *_smooth(self.smooth),
        ]


@dataclass(frozen=True, kw_only=True)
class Iou(Checked):
    """One less the soft intersection over union (Jaccard index) of each example.

    For class probabilities it is the Jaccard metric loss (Wang et al. 2023), which is smallest
    where the outputs equal them.

    Attributes:
        smooth: as in `Dice`.
    """

    smooth: float = 1.0

    def _mistakes(self) -> list[str]:
        return _smooth(self.smooth)


def _smooth(value: float) -> list[str]:
    ok = is_number(value) and value >= LEAST_SMOOTH
    return require(ok, "smooth", value, f"a number >= {LEAST_SMOOTH}")


@dataclass(frozen=True, kw_only=True)
class OwnLoss(Checked):
    """A custom loss.

    Trainable parameters are refused: the optimizer does not have them. State must be in buffers of
    an `nn.Module`, which checkpoints hold; each trial gets its own copy of an instance.

    Attributes:
        loss: import path, such as `package.module:name`, of a function `loss(logits, targets)` or
            of a subclass of `torch.nn.Module`. Logits are float (B, classes); targets are int64
            (B,), or float (B, classes) where images are mixed. It returns the mean over the batch's
            examples; with accumulation, the loss of a batch is the mean of the losses of its
            parts, weighted by their examples.
        options: keyword arguments: of the class, or of each call of the function.
    """

    loss: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def _mistakes(self) -> list[str]:
        ok = isinstance(self.options, Mapping) and is_plain(self.options)
        words = "a mapping name -> value, of numbers, strings, lists and mappings"
        return [
            *reference("loss", self.loss),
            *require(ok, "options", self.options, words),
        ]


Loss = CrossEntropy | Focal | BinaryCrossEntropy | Dice | BceDice | Iou | OwnLoss
