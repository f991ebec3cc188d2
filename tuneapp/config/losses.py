"""Losses. Where images are mixed (mixup, cutmix), targets are shares of classes for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tuneapp.config.checks import (
    Checked,
    above_zero,
    at_least_zero,
    fraction,
    is_number,
    is_plain,
    reference,
    require,
)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Checked):
    """`torch.nn.CrossEntropyLoss`, in nats.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: a weight > 0 for each class in the order of their names, or `balanced`:
            `examples / (classes * examples of the class)`, of the training set. As in torch, the
            mean over a batch is divided by the weights of its labels; with accumulation, over
            each part of it.
    """

    label_smoothing: float = 0.0
    class_weights: Sequence[float] | Literal["balanced"] | None = None

    def _mistakes(self) -> list[str]:
        given = self.class_weights
        listed = given if isinstance(given, list | tuple) else ()
        weights_ok = bool(listed) and all(is_number(w) and w > 0 for w in listed)
        ok = given is None or given == "balanced" or weights_ok
        allowed = "None, 'balanced', or a number > 0 for each class"
        return [
            *fraction("label_smoothing", self.label_smoothing),
            *require(ok, "class_weights", given, allowed),
        ]


@dataclass(frozen=True, kw_only=True)
class Focal(Checked):
    """`torchvision.ops.sigmoid_focal_loss`: each class against the rest, easy cases count less.

    Summed over classes, averaged over examples.

    Attributes:
        gamma: how much less; 0 is binary cross-entropy.
        alpha: weight in [0, 1) of the class that is present, `1 - alpha` of those that are not;
            None weighs them alike.
    """

    gamma: float = 2.0
    alpha: float | None = 0.25

    def _mistakes(self) -> list[str]:
        alpha = [] if self.alpha is None else fraction("alpha", self.alpha)
        return [*at_least_zero("gamma", self.gamma), *alpha]


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(Checked):
    """`torch.nn.BCEWithLogitsLoss`: each class against the rest, averaged over all of them.

    Attributes:
        label_smoothing: targets go from 0 and 1 to `s / 2` and `1 - s / 2`.
        pos_weight: weight of the classes that are present; with exclusive classes, one in all.
    """

    label_smoothing: float = 0.0
    pos_weight: float = 1.0

    def _mistakes(self) -> list[str]:
        return [
            *fraction("label_smoothing", self.label_smoothing),
            *above_zero("pos_weight", self.pos_weight),
        ]


@dataclass(frozen=True, kw_only=True)
class Dice(Checked):
    """One less the soft Dice coefficient of each example over its classes (and pixels).

    Attributes:
        smooth: added above and below the fraction, so that an empty target has a gradient.
    """

    smooth: float = 1.0

    def _mistakes(self) -> list[str]:
        return above_zero("smooth", self.smooth)


@dataclass(frozen=True, kw_only=True)
class BceDice(Checked):
    """`(1 - dice_weight)` of binary cross-entropy and `dice_weight` of Dice."""

    dice_weight: float = 0.5
    smooth: float = 1.0

    def _mistakes(self) -> list[str]:
        return [
            *fraction("dice_weight", self.dice_weight),
            *above_zero("smooth", self.smooth),
        ]


@dataclass(frozen=True, kw_only=True)
class Iou(Checked):
    """One less the soft intersection over union (Jaccard index) of each example."""

    smooth: float = 1.0

    def _mistakes(self) -> list[str]:
        return above_zero("smooth", self.smooth)


@dataclass(frozen=True, kw_only=True)
class OwnLoss(Checked):
    """A loss of your own.

    Attributes:
        loss: import path, such as `package.module:name`, of a function `loss(logits, targets)` or
            of a subclass of `torch.nn.Module`. Logits are float (B, classes); targets are int64
            (B,), or float (B, classes) where images are mixed. It returns the batch's mean.
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
