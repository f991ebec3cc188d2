"""Losses from their configuration: what training minimises.

All of them compute in float32, whatever the network computes in, and take labels as well as class
probabilities. Cross-entropies are in nats; Dice and IoU losses have no unit and lie in [0, 1].
"""

import copy
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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

SATURATED = 30.0
"""A logit at which a sigmoid is exactly 1 in float32."""
VANISHED = -200.0
"""A logit at which a sigmoid is exactly 0 in float32."""


class TrainingLoss(nn.Module):
    """A loss of logits in float32, to which auxiliary classifiers add theirs."""

    def __init__(self, of_logits: nn.Module, aux_weight: float) -> None:
        super().__init__()
        self.of_logits = of_logits
        self.aux_weight = aux_weight

    def describe(self) -> tuple[str, dict[str, Any]]:
        """Return what is computed and with which options, read from what computes it."""
        match self.of_logits:
            case nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing):
                weights = None if weight is None else weight.tolist()
                return "CrossEntropyLoss", {"label_smoothing": smoothing, "class_weights": weights}
            case _OfProbabilities(function=partial(func=function, keywords=options)):
                return function.__name__, dict(options)
            case _Own(name=name):
                return name, {}
            case other:
                return type(other).__name__, {}

    def normalizer(self, targets: Tensor) -> Tensor:
        """Return what the mean over these targets is divided by: float32, a scalar.

        It is the number of examples; for cross-entropy with class weights it is the sum of the
        weights of the targets. Weighted by it, the losses of the parts of a batch add up to the
        loss of the batch.
        """
        if isinstance(self.of_logits, _CrossEntropy) and self.of_logits.weight is not None:
            return self.of_logits.weight_of(targets)
        return torch.full((), float(len(targets)), device=targets.device)

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
    `targets` are labels, int64 (B,) or (B, ...), or class probabilities, float like the logits.

    Parts of a batch add up to the batch by `TrainingLoss.normalizer`.

    Args:
        config: which loss.
        class_counts: training examples of each class.
        aux_weight: weight of each auxiliary classifier.

    Raises:
        ConfigError: `class_weights` has the wrong length; or a custom loss cannot be found or
            copied, or is an `nn.Module` instance with options. Calling a custom loss raises it if
            the result is no scalar.
    """
    return TrainingLoss(_of_logits(config, class_counts), aux_weight)


def check_loss(
    config: Loss, num_classes: int, mixed: bool = False, is_multilabel: bool = False
) -> list[str]:
    """Return what is wrong with the loss, after trying it on two examples on the CPU.

    It must return a finite scalar with a finite gradient to the logits, for saturated logits too.
    A custom loss must not keep state that checkpoints miss. torch's random state is left unchanged.

    Args:
        config: which loss.
        num_classes: width of the logits.
        mixed: whether targets are class probabilities instead of labels.
        is_multilabel: whether several classes may be present at once.
    """
    if is_multilabel and isinstance(config, CrossEntropy):
        return [
            "loss CrossEntropy takes one class for each image, and these data are multi-label: use "
            "BinaryCrossEntropy, Focal, Dice, BceDice, Iou or OwnLoss"
        ]
    name = repr(config.loss) if isinstance(config, OwnLoss) else type(config).__name__
    labels = torch.tensor([0, num_classes - 1])
    present = F.one_hot(labels, num_classes).float()
    targets, what = labels, "labels"
    if mixed or is_multilabel:
        targets = present
        what = f"class probabilities ({'images are mixed' if mixed else 'they are multi-label'})"
    plain = torch.linspace(-1, 1, 2 * num_classes).reshape(2, num_classes)
    right = SATURATED * (2 * present - 1)
    saturated = f"logits of {-SATURATED:g} and {SATURATED:g}"
    cases = [
        (plain, targets, "logits in [-1, 1]"),
        (right, targets, saturated),
        (-right, targets, saturated),
    ]
    if is_multilabel:
        none, where = torch.zeros_like(present), f"logits of {VANISHED:g} and no class present"
        cases.append((torch.full_like(present, VANISHED), none, where))
    try:
        with torch.random.fork_rng(devices=[]):
            loss_fn = build_loss(config, [1] * num_classes)
            instance = getattr(loss_fn.of_logits, "instance", None)
            was = copy.deepcopy(instance)
            tried = [(*_tried(loss_fn, logits, t), where) for logits, t, where in cases]
            is_stateless = _is_alike(instance, was)
    except ConfigError as error:
        return [str(error)]
    except Exception as error:
        return [f"loss {name}: trying it on two examples with {what} failed: {say_cause(error)}"]
    mistakes = [_trainable(loss_fn), *(_mistake(*result) for result in tried)]
    if not is_stateless:
        mistakes.append(
            "calling it changes its attributes, which no checkpoint has; write it as an nn.Module "
            "and keep this state in buffers"
        )
    return [f"loss {name}: {mistake}" for mistake in mistakes if mistake][:1]


def _tried(loss_fn: TrainingLoss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the loss and its gradient to the logits, which is None if there is none."""
    logits = logits.clone().requires_grad_()
    # A product, as a network's output is no leaf: some losses write into it.
    loss: Tensor = loss_fn(logits * 1, targets)
    if not loss.requires_grad:
        return loss, None
    (gradient,) = torch.autograd.grad(loss, logits, allow_unused=True)
    return loss, gradient


def _trainable(loss_fn: TrainingLoss) -> str | None:
    names = [n.removeprefix("of_logits.called.") for n, _ in loss_fn.named_parameters()]
    if not names:
        return None
    return (
        f"its parameters ({', '.join(names)}) would not be trained; make them buffers, or put them "
        "into the network"
    )


def _mistake(loss: Tensor, gradient: Tensor | None, where: str) -> str | None:
    """Return what is wrong with a loss that could be computed."""
    if not loss.isfinite():
        return f"it is {loss.item()} for {where}; it must be finite"
    if gradient is None:
        return "it has no gradient to the logits; compute it from them with torch"
    if not gradient.isfinite().all():
        return f"its gradient to the logits is not finite for {where}"
    return None


def _of_logits(config: Loss, class_counts: Sequence[int]) -> nn.Module:
    match config:
        case CrossEntropy():
            weights = _class_weights(config.class_weights, class_counts)
            return _CrossEntropy(weights, label_smoothing=config.label_smoothing)
        case Focal():
            return _OfProbabilities(partial(focal, gamma=config.gamma, alpha=config.alpha))
        case BinaryCrossEntropy():
            return _OfProbabilities(
                partial(
                    binary_cross_entropy,
                    label_smoothing=config.label_smoothing,
                    pos_weight=config.pos_weight,
                )
            )
        case Dice():
            return _OfProbabilities(partial(dice, smooth=config.smooth))
        case BceDice():
            return _OfProbabilities(
                partial(bce_dice, dice_weight=config.dice_weight, smooth=config.smooth)
            )
        case Iou():
            return _OfProbabilities(partial(iou, smooth=config.smooth))
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


class _CrossEntropy(nn.CrossEntropyLoss):
    """torch's cross-entropy, with the same mean for labels and for their one-hot probabilities.

    With class weights, torch divides by the weights of labels, but by the number of examples where
    targets are class probabilities. Mixing images would thus change the scale of the loss.
    """

    def weight_of(self, targets: Tensor) -> Tensor:
        """Return the sum of the class weights of the targets; label smoothing does not count."""
        assert self.weight is not None
        if not targets.is_floating_point():
            return self.weight[targets].sum()
        # (B, classes, ...) to (B, ..., classes), next to the weights.
        return (targets.float().movedim(1, -1) * self.weight).sum()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if self.weight is None or not target.is_floating_point():
            return super().forward(input, target)
        total = F.cross_entropy(
            input, target, self.weight, reduction="sum", label_smoothing=self.label_smoothing
        )
        return total / self.weight_of(target)


# --- Each class against the rest ------------------------------------------------------------------


class _OfProbabilities(nn.Module):
    """Calls a function of logits and class probabilities; labels become zeros and ones."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not targets.is_floating_point():
            targets = torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), 1)
        return self.function(logits, targets)


def focal(logits: Tensor, targets: Tensor, gamma: float, alpha: float | None) -> Tensor:
    """Return the focal loss of Lin et al. 2017 (arXiv 1708.02002), in nats.

    Summed over classes and pixels, averaged over examples.

    Args:
        logits: float32 (B, classes, ...).
        targets: class probabilities of the same shape.
        gamma: power of the probability that was missed.
        alpha: weight in [0, 1) of what is present, `1 - alpha` of what is not; None weighs by 1.
    """
    # Where a probability is exactly right there is nothing to learn. The power has no gradient
    # there if gamma < 1: torch would multiply 0 by infinity.
    p = logits.detach().sigmoid()
    is_met = p * targets + (1 - p) * (1 - targets) >= 1
    losses: Tensor = sigmoid_focal_loss(
        logits.masked_fill(is_met, 0), targets, alpha=-1 if alpha is None else alpha, gamma=gamma
    )
    return losses.masked_fill(is_met, 0).sum() / len(logits)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, pos_weight: float = 1.0
) -> Tensor:
    """Return the mean over classes (and pixels) of the binary cross-entropy, in nats.

    Args:
        logits: float32 (B, classes, ...).
        targets: class probabilities of the same shape.
        label_smoothing: s, in [0, 1): 0 and 1 become `s / 2` and `1 - s / 2` (Szegedy et al. 2016,
            arXiv 1512.00567, with two classes: present or not).
        pos_weight: weight of what is present, as in `torch.nn.BCEWithLogitsLoss`.
    """
    smoothed = targets * (1 - label_smoothing) + label_smoothing / 2
    weight = logits.new_full((), pos_weight)
    return F.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=weight)


def dice(logits: Tensor, targets: Tensor, smooth: float) -> Tensor:
    """Return the mean over examples of one less the soft Dice coefficient, in [0, 1].

    Milletari et al. 2016 (arXiv 1606.04797), on sigmoids, but with sums instead of sums of squares
    below the fraction, as in Drozdzal et al. 2016 (arXiv 1608.04117). For targets between 0 and 1
    it is the Dice semimetric loss of Wang et al. 2023 (arXiv 2303.16296).

    Args:
        logits: float32 (B, classes, ...).
        targets: class probabilities of the same shape.
        smooth: > 0, added to numerator and denominator.
    """
    both, total = _overlap(logits, targets)
    return (1 - (2 * both + smooth) / (total + smooth)).mean()


def iou(logits: Tensor, targets: Tensor, smooth: float) -> Tensor:
    """Return the mean over examples of one less the soft intersection over union, in [0, 1].

    Rahman & Wang 2016 ("Optimizing Intersection-Over-Union in Deep Neural Networks for Image
    Segmentation", ISVC), on sigmoids. For targets between 0 and 1 it is the Jaccard metric loss of
    Wang et al. 2023 (arXiv 2302.05666).

    Args:
        logits: float32 (B, classes, ...).
        targets: class probabilities of the same shape.
        smooth: > 0, added to numerator and denominator.
    """
    both, total = _overlap(logits, targets)
    return (1 - (both + smooth) / (total - both + smooth)).mean()


def bce_dice(logits: Tensor, targets: Tensor, dice_weight: float, smooth: float) -> Tensor:
    """Return `1 - dice_weight` of `binary_cross_entropy`, in nats, and `dice_weight` of `dice`."""
    bce = binary_cross_entropy(logits, targets)
    return (1 - dice_weight) * bce + dice_weight * dice(logits, targets, smooth)


def _overlap(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each example, the overlap and the sum of both, over classes and pixels.

    The overlap is that of Wang et al. 2023, `(p + t - |p - t|) / 2`: the smaller of both. For
    targets of 0 and 1 it equals the usual product `p * t`. With targets between them, a product
    would be largest at p = 1 for the most probable class; this one is best at p = t.
    """
    p, t = logits.sigmoid().flatten(1), targets.flatten(1)
    return torch.minimum(p, t).sum(1), (p + t).sum(1)


# --- Custom losses --------------------------------------------------------------------------------


class _Own(nn.Module):
    """Calls a custom function or module, and says so if it returns no scalar.

    Attributes:
        called: a module, or a function with its options.
        instance: this trial's copy of an object with `__call__` that is no module, else None.
    """

    def __init__(self, config: OwnLoss) -> None:
        super().__init__()
        self.name = config.loss
        self.instance: Any = None
        self.called: Callable[..., Any]
        found = find_own(config.loss, "loss")
        if isinstance(found, type) and issubclass(found, nn.Module):
            self.called = found(**config.options)
        elif isinstance(found, _WITHOUT_STATE):
            self.called = partial(found, **config.options)
        elif not isinstance(found, nn.Module):
            self.instance = self._copy_of(found)
            self.called = partial(self.instance, **config.options)
        elif not config.options:
            self.called = self._copy_of(found)
        else:
            raise ConfigError(
                f"loss {config.loss!r} is an instance of {type(found).__name__} and takes no "
                f"options, got {dict(config.options)}; name its class instead"
            )

    def _copy_of(self, found: Any) -> Any:
        """Return a copy, so that no trial sees what another one left in it."""
        try:
            return copy.deepcopy(found)
        except Exception as error:
            raise ConfigError(
                f"loss {self.name!r} is an instance of {type(found).__name__}, which cannot be "
                f"copied for each trial: {say_cause(error)}"
            ) from error

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        mean = self.called(logits, targets)
        if not isinstance(mean, Tensor) or mean.dim() > 0:
            what = f"shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
            raise ConfigError(
                f"loss {self.name!r} returned {what}; it must return the batch's mean, a tensor "
                "without dimensions"
            )
        return mean.float()


_WITHOUT_STATE = (type, types.FunctionType, types.BuiltinFunctionType, torch.jit.ScriptFunction)


def _is_alike(value: Any, was: Any) -> bool:
    """Whether an object, with all that its attributes hold, still equals a copy of it."""
    todo: list[tuple[Any, Any]] = [(value, was)]
    seen: dict[int, Any] = {}
    while todo:
        now, then = todo.pop()
        if now is then or id(now) in seen:
            continue
        seen[id(now)] = now  # kept, so that no other object gets its id
        if type(now) is not type(then):
            return False
        held, had = _held(now), _held(then)
        if len(held) != len(had) or not (held or _equal(now, then)):
            return False
        todo += zip(held, had, strict=True)
    return True


def _equal(now: Any, then: Any) -> bool:
    """Whether two values of one type are equal; objects that cannot be compared are."""
    by_identity: Any = object.__eq__
    if type(now).__eq__ is by_identity:
        return True
    try:
        same = now == then
        return bool(same.all() if hasattr(same, "all") else same)
    except Exception:  # a custom `__eq__` may raise anything, as arrays of two shapes do: not equal
        return False


def _held(value: Any) -> list[Any]:
    """Return what a container or an object holds; nothing of a plain value."""
    match value:
        case Tensor():
            return []
        case Mapping():
            return [*value.keys(), *value.values()]
        case list() | tuple() | deque():
            return list(value)
        case types.MethodType():
            return [value.__self__]
        case partial():
            return [value.func, value.args, value.keywords]
        case _:
            state = value.__getstate__()
            return [] if state is None else [state]
