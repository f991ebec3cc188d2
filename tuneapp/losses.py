"""Losses from their configuration: what training minimises.

All of them compute in float32, whatever the network computes in, and take labels as well as shares
of classes. Cross-entropies are in nats; Dice and IoU losses have no unit and lie in [0, 1].
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from tuneapp.config import (
    BceDice,
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    Focal,
    Iou,
    Loss,
    OwnLoss,
)
from tuneapp.errors import ConfigError, say_cause
from tuneapp.own import find_own
from tuneapp.staged import WithAux


class TrainingLoss(nn.Module):
    """A loss of logits in float32, to which auxiliary classifiers add theirs."""

    def __init__(self, of_logits: nn.Module, aux_weight: float) -> None:
        super().__init__()
        self.of_logits = of_logits
        self.aux_weight = aux_weight

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Return what is computed and with which options, read from what computes it."""
        match self.of_logits:
            case nn.CrossEntropyLoss() as loss:
                weighted = loss.weight is not None
                options = {"label_smoothing": loss.label_smoothing, "weighted": weighted}
                return "CrossEntropyLoss", options
            case _OfShares(function=partial(func=function, keywords=options)):
                return function.__name__, dict(options)
            case _Own(name=name):
                return name, {}
            case other:
                return type(other).__name__, {}

    def forward(self, outputs: Tensor | WithAux, targets: Tensor) -> Tensor:
        """Return the mean over the examples, float32."""
        if not isinstance(outputs, WithAux):
            return self._mean(outputs, targets)
        aux = sum(self._mean(logits, targets) for logits in outputs.aux)
        return self._mean(outputs.logits, targets) + self.aux_weight * aux

    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            targets = targets.float()
        with torch.autocast(logits.device.type, enabled=False):
            mean: Tensor = self.of_logits(logits.float(), targets)
        return mean


def build_loss(config: Loss, class_counts: Sequence[int], aux_weight: float = 0.0) -> TrainingLoss:
    """Return the loss, called as `loss(outputs, targets)`: a scalar float32, the batch's mean.

    `outputs` are logits, float (B, classes), or (B, classes, ...) for masks; or `WithAux`, for the
    loss of its logits and `aux_weight` times the sum of the losses of the auxiliary ones.
    `targets` are labels, int64 (B,) or (B, ...), or shares of classes, float in the logits' shape.

    The mean is over examples, so that parts of a batch add up to it by their sizes. Cross-entropy
    with class weights is the exception: with labels, torch divides it by the weights of the labels.

    Args:
        config: which loss.
        class_counts: training examples of each class.
        aux_weight: weight of each auxiliary classifier.

    Raises:
        ConfigError: `class_weights` has the wrong length; or a loss of the user's own cannot be
            found, or is an instance and has options. Its call raises it for what is no scalar.
    """
    return TrainingLoss(_of_logits(config, class_counts), aux_weight)


def check_loss(
    config: Loss, num_classes: int, mixed: bool = False, is_multilabel: bool = False
) -> list[str]:
    """Return what is wrong with the loss, after trying it on two examples on the CPU.

    It must return a finite scalar with a finite gradient to the logits. torch's random numbers go
    on as if nothing had been tried.

    Args:
        config: which loss.
        num_classes: width of the logits.
        mixed: whether targets are shares of classes, and not labels.
        is_multilabel: whether several classes may be present at once.
    """
    if is_multilabel and isinstance(config, CrossEntropy):
        return [
            "loss CrossEntropy takes one class for each image, and these data are multi-label: use "
            "BinaryCrossEntropy, Focal, Dice, BceDice, Iou or OwnLoss"
        ]
    name = repr(config.loss) if isinstance(config, OwnLoss) else type(config).__name__
    logits = torch.linspace(-1, 1, 2 * num_classes).reshape(2, num_classes).requires_grad_()
    targets = torch.tensor([0, num_classes - 1])
    what = "labels"
    if mixed or is_multilabel:
        targets = F.one_hot(targets, num_classes).float()
        what = f"shares of classes ({'images are mixed' if mixed else 'they are multi-label'})"
    try:
        with torch.random.fork_rng(devices=[]):
            loss_fn = build_loss(config, [1] * num_classes)
            loss = loss_fn(logits, targets)
            gradient = None
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, logits, allow_unused=True)
    except ConfigError as error:
        return [str(error)]
    except Exception as error:
        return [f"loss {name}: trying it on two examples with {what} failed: {say_cause(error)}"]
    return _tried_mistakes(name, loss_fn, loss, gradient)


def _tried_mistakes(
    name: str, loss_fn: TrainingLoss, loss: Tensor, gradient: Tensor | None
) -> list[str]:
    """Return what is wrong with a loss that could be computed."""
    parameters = [n.removeprefix("of_logits.called.") for n, _ in loss_fn.named_parameters()]
    if parameters:
        return [
            f"loss {name}: its parameters ({', '.join(parameters)}) would not be trained; make "
            "them buffers, or put them into the network"
        ]
    if not loss.isfinite():
        return [f"loss {name}: it is {loss.item()} for logits in [-1, 1]; it must be finite"]
    if gradient is None:
        return [f"loss {name}: it has no gradient to the logits; compute it from them with torch"]
    if not gradient.isfinite().all():
        return [f"loss {name}: its gradient to the logits is not finite for logits in [-1, 1]"]
    return []


def _of_logits(config: Loss, class_counts: Sequence[int]) -> nn.Module:
    match config:
        case CrossEntropy():
            weights = _class_weights(config.class_weights, class_counts)
            return nn.CrossEntropyLoss(weights, label_smoothing=config.label_smoothing)
        case Focal():
            return _OfShares(partial(focal, gamma=config.gamma, alpha=config.alpha))
        case BinaryCrossEntropy():
            return _OfShares(
                partial(
                    binary_cross_entropy,
                    label_smoothing=config.label_smoothing,
                    pos_weight=config.pos_weight,
                )
            )
        case Dice():
            return _OfShares(partial(dice, smooth=config.smooth))
        case BceDice():
            return _OfShares(
                partial(bce_dice, dice_weight=config.dice_weight, smooth=config.smooth)
            )
        case Iou():
            return _OfShares(partial(iou, smooth=config.smooth))
        case OwnLoss():
            return _Own(config)
        case _:
            assert_never(config)


def _class_weights(
    given: Sequence[float] | Literal["balanced"] | None, counts: Sequence[int]
) -> Tensor | None:
    if given is None:
        return None
    if given == "balanced":
        # A class without examples weighs 1, as in a balanced set: no label has it, but smoothing
        # gives it a share, which a weight for hardly any examples would let outweigh the labels.
        total = sum(counts)
        return torch.tensor([total / (len(counts) * n) if n else 1.0 for n in counts])
    if len(given) != len(counts):
        raise ConfigError(
            f"loss: class_weights must be a number for each of the {len(counts)} classes, "
            f"got {len(given)}: {list(given)}"
        )
    return torch.tensor(given, dtype=torch.float32)


# --- Each class against the rest ------------------------------------------------------------------


class _OfShares(nn.Module):
    """Calls a function of logits and shares of classes; labels become shares of 0 and 1."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not targets.is_floating_point():
            targets = torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), 1)
        return self.function(logits, targets)


def focal(logits: Tensor, shares: Tensor, gamma: float, alpha: float | None) -> Tensor:
    """Return the focal loss of Lin et al. 2017 (arXiv 1708.02002), in nats.

    Summed over classes and pixels, averaged over examples.

    Args:
        logits: float32 (B, classes, ...).
        shares: likewise, in [0, 1].
        gamma: power of the probability that was missed.
        alpha: weight in [0, 1) of what is present, `1 - alpha` of what is not; None weighs by 1.
    """
    # Where a probability is exactly right there is nothing to learn. The power has no gradient
    # there if gamma < 1: torch would multiply 0 by infinity.
    p = logits.detach().sigmoid()
    is_met = p * shares + (1 - p) * (1 - shares) >= 1
    losses: Tensor = sigmoid_focal_loss(
        logits.masked_fill(is_met, 0), shares, alpha=-1 if alpha is None else alpha, gamma=gamma
    )
    return losses.masked_fill(is_met, 0).sum() / len(logits)


def binary_cross_entropy(
    logits: Tensor, shares: Tensor, label_smoothing: float = 0.0, pos_weight: float = 1.0
) -> Tensor:
    """Return the mean over classes (and pixels) of the binary cross-entropy, in nats.

    Args:
        logits: float32 (B, classes, ...).
        shares: likewise, in [0, 1].
        label_smoothing: s, in [0, 1): 0 and 1 become `s / 2` and `1 - s / 2` (Szegedy et al. 2016,
            arXiv 1512.00567, with two classes: present or not).
        pos_weight: weight of what is present, as in `torch.nn.BCEWithLogitsLoss`.
    """
    smoothed = shares * (1 - label_smoothing) + label_smoothing / 2
    weight = logits.new_full((), pos_weight)
    return F.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=weight)


def dice(logits: Tensor, shares: Tensor, smooth: float) -> Tensor:
    """Return the mean over examples of one less the soft Dice coefficient, in [0, 1].

    Milletari et al. 2016 (arXiv 1606.04797), on sigmoids, but with sums instead of sums of squares
    below the fraction, as in Drozdzal et al. 2016 (arXiv 1608.04117).

    Args:
        logits: float32 (B, classes, ...).
        shares: likewise, in [0, 1].
        smooth: > 0, added above and below.
    """
    both, either = _overlap(logits, shares)
    return (1 - (2 * both + smooth) / (either + smooth)).mean()


def iou(logits: Tensor, shares: Tensor, smooth: float) -> Tensor:
    """Return the mean over examples of one less the soft intersection over union, in [0, 1].

    Rahman & Wang 2016 ("Optimizing Intersection-Over-Union in Deep Neural Networks for Image
    Segmentation", ISVC), on sigmoids.

    Args:
        logits: float32 (B, classes, ...).
        shares: likewise, in [0, 1].
        smooth: > 0, added above and below.
    """
    both, either = _overlap(logits, shares)
    return (1 - (both + smooth) / (either - both + smooth)).mean()


def bce_dice(logits: Tensor, shares: Tensor, dice_weight: float, smooth: float) -> Tensor:
    """Return `1 - dice_weight` of `binary_cross_entropy`, in nats, and `dice_weight` of `dice`."""
    bce = binary_cross_entropy(logits, shares)
    return (1 - dice_weight) * bce + dice_weight * dice(logits, shares, smooth)


def _overlap(logits: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each example, the sum of the products and of both, over classes and pixels."""
    p, t = logits.sigmoid().flatten(1), shares.flatten(1)
    return (p * t).sum(1), (p + t).sum(1)


# --- The user's own -------------------------------------------------------------------------------


class _Own(nn.Module):
    """Calls a function or a module of the user's own, and says so if it returns no scalar."""

    def __init__(self, config: OwnLoss) -> None:
        super().__init__()
        self.name = config.loss
        found = find_own(config.loss, "loss")
        self.called: Callable[..., Any]
        if isinstance(found, type) and issubclass(found, nn.Module):
            self.called = found(**config.options)
        elif not isinstance(found, nn.Module):
            self.called = partial(found, **config.options)
        elif not config.options:
            self.called = copy.deepcopy(found)  # no trial shall see what another left in it
        else:
            raise ConfigError(
                f"loss {config.loss!r} is an instance of {type(found).__name__} and takes no "
                f"options, got {dict(config.options)}; name its class instead"
            )

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        mean = self.called(logits, targets)
        if not isinstance(mean, Tensor) or mean.dim() > 0:
            what = f"shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
            raise ConfigError(
                f"loss {self.name!r} returned {what}; it must return the batch's mean, a tensor "
                "without dimensions"
            )
        return mean.float()
