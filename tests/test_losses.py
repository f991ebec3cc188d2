import itertools
import math
import random
import sys
import threading
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from tuneapp import own
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
from tuneapp.errors import ConfigError
from tuneapp.losses import build_loss, check_loss
from tuneapp.staged import WithAux

ln = math.log
COUNTS = [1, 1, 1]

# Probabilities of three classes for two examples that the arithmetic below starts from: by softmax
# for cross-entropy, by sigmoid for all else.
SOFTMAX = [[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8]]
SIGMOID = [[0.75, 0.5, 0.25], [0.25, 0.6, 0.8]]
LABELS = [0, 2]
HARD = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
SOFT = [[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]]
SOFTER = [[0.8, 0.2, 0.0], [0.3, 0.0, 0.7]]

# Two examples of two classes with 1 x 2 pixels, and which class each pixel is.
MASK_SIGMOID = [[[[0.75, 0.5]], [[0.25, 0.75]]], [[[0.5, 0.25]], [[0.75, 0.25]]]]
MASK_LABELS = [[[0, 1]], [[1, 1]]]
MASK_SOFT = [[[[1.0, 0.2]], [[0.0, 0.8]]], [[[0.5, 0.0]], [[0.5, 1.0]]]]

EVERY_LOSS: list[Loss] = [
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1),
    CrossEntropy(class_weights=[1.0, 2.0, 4.0]),
    CrossEntropy(label_smoothing=0.1, class_weights="balanced"),
    Focal(),
    Focal(gamma=0.0),
    Focal(gamma=0.5, alpha=None),
    Focal(gamma=1.5, alpha=0.0),
    BinaryCrossEntropy(),
    BinaryCrossEntropy(label_smoothing=0.2, pos_weight=3.0),
    Dice(),
    Dice(smooth=1e-6),
    BceDice(),
    Iou(),
    Iou(smooth=1e-6),
]
WEIGHTED = CrossEntropy(class_weights=[1.0, 2.0, 4.0])


def logits_of(probabilities: Sequence[object]) -> Tensor:
    """Logits whose sigmoid the probabilities are."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.log(p / (1 - p)).float()


def value(config: Loss, logits: Tensor, targets: Sequence[object]) -> float:
    """The loss of a batch; whole numbers are labels, others class probabilities."""
    loss = build_loss(config, COUNTS)(logits, torch.tensor(targets))
    assert loss.shape == ()
    assert loss.dtype is torch.float32
    return loss.item()


def close(wanted: float) -> object:
    return pytest.approx(wanted, rel=2e-6)


# --- Cross-entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "targets", "wanted"),
    [
        (CrossEntropy(), LABELS, (ln(2) + ln(8)) / 2),
        (
            CrossEntropy(),
            SOFT,
            (0.7 * ln(2) + 0.3 * ln(4) + 0.5 * ln(4 / 3) + 0.5 * ln(8)) / 2,
        ),
        (  # 0.7 of the label, and 0.1 for each of the three classes
            CrossEntropy(label_smoothing=0.3),
            LABELS,
            (0.8 * ln(2) + 0.2 * ln(4) + 0.1 * ln(8) + 0.1 * ln(4 / 3) + 0.8 * ln(8)) / 2,
        ),
        (
            CrossEntropy(label_smoothing=0.3),
            SOFT,
            (
                (0.49 + 0.1) * ln(2)
                + (0.21 + 0.1) * ln(4)
                + 0.1 * ln(4)
                + 0.1 * ln(8)
                + (0.35 + 0.1) * ln(4 / 3)
                + (0.35 + 0.1) * ln(8)
            )
            / 2,
        ),
        (  # divided by the weights of the labels, 1 and 4
            CrossEntropy(class_weights=[1, 2, 4]),
            LABELS,
            (1 * ln(2) + 4 * ln(8)) / (1 + 4),
        ),
        (  # divided by the weights of the class probabilities
            CrossEntropy(class_weights=(1, 2, 4)),
            SOFT,
            (0.7 * 1 * ln(2) + 0.3 * 2 * ln(4) + 0.5 * 2 * ln(4 / 3) + 0.5 * 4 * ln(8))
            / (0.7 * 1 + 0.3 * 2 + 0.5 * 2 + 0.5 * 4),
        ),
        (  # which are those before smoothing, as for labels
            CrossEntropy(class_weights=[1, 2, 4], label_smoothing=0.3),
            SOFT,
            (
                (0.49 + 0.1) * 1 * ln(2)
                + (0.21 + 0.1) * 2 * ln(4)
                + 0.1 * 4 * ln(4)
                + 0.1 * 1 * ln(8)
                + (0.35 + 0.1) * 2 * ln(4 / 3)
                + (0.35 + 0.1) * 4 * ln(8)
            )
            / (0.7 * 1 + 0.3 * 2 + 0.5 * 2 + 0.5 * 4),
        ),
        (
            CrossEntropy(class_weights=[1, 2, 4], label_smoothing=0.3),
            LABELS,
            (
                0.8 * 1 * ln(2)
                + 0.1 * 2 * ln(4)
                + 0.1 * 4 * ln(4)
                + 0.1 * 1 * ln(8)
                + 0.1 * 2 * ln(4 / 3)
                + 0.8 * 4 * ln(8)
            )
            / (1 + 4),
        ),
    ],
)
def test_cross_entropy_is_what_is_worked_by_hand(
    config: CrossEntropy, targets: Sequence[object], wanted: float
) -> None:
    assert value(config, torch.tensor(SOFTMAX).log() + 5, targets) == close(wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 4.0]])
@pytest.mark.parametrize("sizes", [(9, 3), (3, 3, 2, 2)])
def test_cross_entropy_of_labels_is_torchs_own(
    weights: list[float] | None, smoothing: float, sizes: tuple[int, ...]
) -> None:
    logits = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(math.prod(sizes) // 3).reshape(sizes[0], *sizes[2:]) % 3
    weight = None if weights is None else torch.tensor(weights)
    wanted = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)(logits, labels)
    loss = build_loss(CrossEntropy(class_weights=weights, label_smoothing=smoothing), COUNTS)
    assert loss(logits, labels).item() == wanted.item()


def test_balanced_weights_are_examples_over_classes_times_examples_of_the_class() -> None:
    loss = build_loss(CrossEntropy(class_weights="balanced"), [10, 5, 5])
    wanted = (2 / 3 * ln(2) + 4 / 3 * ln(8)) / (2 / 3 + 4 / 3)
    assert loss(torch.tensor(SOFTMAX).log(), torch.tensor(LABELS)).item() == close(wanted)


def test_a_class_without_training_example_weighs_one_in_a_balanced_loss() -> None:
    (weights,) = build_loss(CrossEntropy(class_weights="balanced"), [15, 5, 0]).buffers()
    assert weights.tolist() == pytest.approx([20 / 45, 20 / 15, 1.0])
    (weights,) = build_loss(CrossEntropy(class_weights="balanced"), [0, 0]).buffers()
    assert weights.tolist() == [1.0, 1.0]


def test_class_weights_of_the_wrong_length_are_refused_with_the_number_of_classes() -> None:
    config = CrossEntropy(class_weights=[1.0, 2.5])
    with pytest.raises(ConfigError) as error:
        build_loss(config, COUNTS)
    assert str(error.value) == (
        "loss: class_weights must be a number for each of the 3 classes, got 2: [1.0, 2.5]"
    )
    assert check_loss(config, num_classes=3) == [str(error.value)]
    assert check_loss(config, num_classes=2) == []


def test_class_weights_move_with_the_loss() -> None:
    loss = build_loss(CrossEntropy(class_weights=[1.0, 2.0, 4.0]), COUNTS)
    assert [b.tolist() for b in loss.buffers()] == [[1.0, 2.0, 4.0]]
    assert [b.device.type for b in loss.to("meta").buffers()] == ["meta"]


# --- Each class against the rest ------------------------------------------------------------------


def bce(p: float, t: float, pos_weight: float = 1.0) -> float:
    return -(pos_weight * t * ln(p) + (1 - t) * ln(1 - p))


def pairs(
    outputs: Sequence[Sequence[float]], targets: Sequence[Sequence[float]]
) -> list[tuple[float, float]]:
    """Each output with its target, over all examples and classes."""
    return [
        pair for ps, ts in zip(outputs, targets, strict=True) for pair in zip(ps, ts, strict=True)
    ]


def test_binary_cross_entropy_is_the_mean_over_examples_and_classes() -> None:
    logits = logits_of(SIGMOID)
    # Example 0: 0.75 is present, 0.5 and 0.25 are not; example 1: 0.8 is, 0.25 and 0.6 are not.
    by_hand = -(ln(0.75) + ln(0.5) + ln(0.75) + ln(0.75) + ln(0.4) + ln(0.8)) / 6
    assert value(BinaryCrossEntropy(), logits, LABELS) == close(by_hand)
    assert value(BinaryCrossEntropy(), logits, HARD) == close(by_hand)
    soft = sum(bce(p, t) for p, t in pairs(SIGMOID, SOFT)) / 6
    assert value(BinaryCrossEntropy(), logits, SOFT) == close(soft)


def test_labels_of_binary_cross_entropy_are_smoothed_by_half_the_number() -> None:
    logits, config = logits_of(SIGMOID), BinaryCrossEntropy(label_smoothing=0.2)
    hard = sum(bce(p, 0.9 if t else 0.1) for p, t in pairs(SIGMOID, HARD)) / 6
    assert value(config, logits, LABELS) == close(hard)
    soft = sum(bce(p, 0.8 * t + 0.1) for p, t in pairs(SIGMOID, SOFT)) / 6
    assert value(config, logits, SOFT) == close(soft)


def test_the_positive_weight_counts_what_is_present_more() -> None:
    logits, config = logits_of(SIGMOID), BinaryCrossEntropy(pos_weight=3.0)
    by_hand = -(3 * ln(0.75) + ln(0.5) + ln(0.75) + ln(0.75) + ln(0.4) + 3 * ln(0.8)) / 6
    assert value(config, logits, LABELS) == close(by_hand)
    soft = sum(bce(p, t, 3.0) for p, t in pairs(SIGMOID, SOFT)) / 6
    assert value(config, logits, SOFT) == close(soft)


def test_focal_loss_is_summed_over_classes_and_averaged_over_examples() -> None:
    logits = logits_of(SIGMOID)
    first = -(0.25 * 0.25**2 * ln(0.75) + 0.75 * 0.5**2 * ln(0.5) + 0.75 * 0.25**2 * ln(0.75))
    second = -(0.75 * 0.25**2 * ln(0.75) + 0.75 * 0.6**2 * ln(0.4) + 0.25 * 0.2**2 * ln(0.8))
    assert value(Focal(gamma=2, alpha=0.25), logits, LABELS) == close((first + second) / 2)
    first = -(0.25**3 * ln(0.75) + 0.5**3 * ln(0.5) + 0.25**3 * ln(0.75))
    second = -(0.25**3 * ln(0.75) + 0.6**3 * ln(0.4) + 0.2**3 * ln(0.8))
    assert value(Focal(gamma=3, alpha=None), logits, LABELS) == close((first + second) / 2)


def test_focal_loss_takes_class_probabilities() -> None:
    wanted = sum(
        (0.25 * t + 0.75 * (1 - t)) * (1 - p * t - (1 - p) * (1 - t)) ** 2 * bce(p, t)
        for p, t in pairs(SIGMOID, SOFT)
    )
    assert value(Focal(), logits_of(SIGMOID), SOFT) == close(wanted / 2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.25])
def test_focal_loss_and_its_gradient_are_torchvisions_where_those_are_finite(
    gamma: float, alpha: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(8, 3, generator=generator) * 4).requires_grad_()
    targets = torch.rand(8, 3, generator=generator)
    loss = build_loss(Focal(gamma=gamma, alpha=alpha), COUNTS)(logits, targets)
    wanted = torchvision.ops.sigmoid_focal_loss(
        logits, targets, alpha=-1 if alpha is None else alpha, gamma=gamma
    )
    torch.testing.assert_close(loss, wanted.sum() / 8)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(wanted.sum() / 8, logits)
    )


def test_focal_loss_without_gamma_and_alpha_is_binary_cross_entropy() -> None:
    logits = logits_of(SIGMOID)
    alike = value(BinaryCrossEntropy(), logits, SOFT) * 3
    assert value(Focal(gamma=0, alpha=None), logits, SOFT) == close(alike)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_zero_for_the_right_answer_and_all_of_it_for_the_wrong(gamma: float) -> None:
    right = torch.full((2, 3), -30.0)
    right[0, 0] = right[1, 2] = 30.0
    config = Focal(gamma=gamma, alpha=None)
    assert value(config, right, LABELS) == pytest.approx(0, abs=1e-6)
    assert value(config, -right, LABELS) == close(3 * 30)


def test_dice_loss_is_of_each_example_over_its_classes() -> None:
    logits = logits_of(SIGMOID)
    # Probabilities add up to 1.5 and 1.65; 0.75 and 0.8 of them are right.
    hard = ((1 - (2 * 0.75 + 1) / (1.5 + 1 + 1)) + (1 - (2 * 0.8 + 1) / (1.65 + 1 + 1))) / 2
    assert value(Dice(), logits, LABELS) == close(hard)
    # Of class probabilities, the overlap is the smaller number of each pair.
    first = 1 - (2 * (0.75 + 0.2) + 0.1) / (1.5 + 1 + 0.1)
    second = 1 - (2 * (0.25 + 0.7) + 0.1) / (1.65 + 1 + 0.1)
    assert value(Dice(smooth=0.1), logits, SOFTER) == close((first + second) / 2)


def test_iou_loss_is_of_each_example_over_its_classes() -> None:
    logits = logits_of(SIGMOID)
    first = 1 - (0.75 + 1) / (1.5 + 1 - 0.75 + 1)
    second = 1 - (0.8 + 1) / (1.65 + 1 - 0.8 + 1)
    assert value(Iou(), logits, LABELS) == close((first + second) / 2)
    first = 1 - (0.95 + 0.1) / (1.5 + 1 - 0.95 + 0.1)  # 0.75 + 0.2 = 0.95
    second = 1 - (0.95 + 0.1) / (1.65 + 1 - 0.95 + 0.1)  # 0.25 + 0.7 = 0.95
    assert value(Iou(smooth=0.1), logits, SOFTER) == close((first + second) / 2)


OVERLAPS = [Dice(), Dice(smooth=1e-6), BceDice(), Iou(), Iou(smooth=1e-6)]


@pytest.mark.parametrize("config", OVERLAPS)
def test_the_best_outputs_for_class_probabilities_are_these_probabilities(config: Loss) -> None:
    # Two numbers of three are varied at once, from 0.05 to 0.95.
    steps = [n / 20 for n in range(1, 20)]
    grid = list(itertools.product(steps, steps, [0.05]))
    loss = build_loss(config, COUNTS)
    for target in [(0.7, 0.3, 0.05), (0.5, 0.5, 0.05), (0.95, 0.05, 0.05), (0.4, 0.25, 0.05)]:
        wanted = torch.tensor([target])
        costs = [loss(logits_of([p]), wanted).item() for p in grid]
        best = min(costs)
        assert grid[costs.index(best)] == pytest.approx(target)
        assert sorted(costs)[1] > best + 1e-4


@pytest.mark.parametrize("config", [Dice(), Iou()])
def test_training_on_class_probabilities_ends_at_them(config: Loss) -> None:
    wanted = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]])
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = build_loss(config, COUNTS)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.99**step
        optimizer.zero_grad()
        loss(logits, wanted).backward()
        optimizer.step()
    assert torch.allclose(logits.sigmoid(), wanted, atol=0.02)


@pytest.mark.parametrize("config", [Dice(), Iou(), BceDice()])
def test_overlap_of_zeros_and_ones_is_the_sum_of_products(config: Loss) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=draw).requires_grad_()
    targets = (torch.rand(5, 4, generator=draw) < 0.5).float()
    p, t = logits.sigmoid(), targets
    both, total = (p * t).sum(1), (p + t).sum(1)
    dice = (1 - (2 * both + 1) / (total + 1)).mean()
    wanted = {
        Dice: dice,
        Iou: (1 - (both + 1) / (total - both + 1)).mean(),
        BceDice: (dice + F.binary_cross_entropy_with_logits(logits, targets)) / 2,
    }[type(config)]
    loss = build_loss(config, [1] * 4)(logits, targets)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits), torch.autograd.grad(wanted, logits)
    )


def test_bce_dice_loss_is_the_weighted_mean_of_its_two() -> None:
    logits = logits_of(SIGMOID)
    cross_entropy = sum(bce(p, t) for p, t in pairs(SIGMOID, HARD)) / 6
    dice = ((1 - (2 * 0.75 + 2) / (1.5 + 1 + 2)) + (1 - (2 * 0.8 + 2) / (1.65 + 1 + 2))) / 2
    config = BceDice(dice_weight=0.3, smooth=2)
    assert value(config, logits, LABELS) == close(0.7 * cross_entropy + 0.3 * dice)
    assert value(config, logits, HARD) == close(0.7 * cross_entropy + 0.3 * dice)


@pytest.mark.parametrize("config", [Dice(smooth=1e-6), Iou(smooth=1e-6)])
def test_an_overlap_loss_is_nearly_zero_for_the_right_answer_and_one_for_the_wrong(
    config: Dice | Iou,
) -> None:
    right = torch.full((2, 3), -30.0)
    right[0, 0] = right[1, 2] = 30.0
    assert value(config, right, LABELS) == pytest.approx(0, abs=1e-6)
    assert value(config, -right, LABELS) == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("config", EVERY_LOSS)
@pytest.mark.parametrize("sizes", [(2, 3), (8, 3), (2, 3, 2, 2)])
def test_labels_give_the_same_loss_as_their_one_hot_probabilities(
    config: Loss, sizes: tuple[int, ...]
) -> None:
    logits = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(math.prod(sizes) // 3).reshape(sizes[0], *sizes[2:]) % 3
    one_hot = torch.stack([(labels == c).float() for c in range(3)], dim=1)
    loss = build_loss(config, [6, 3, 1])
    torch.testing.assert_close(loss(logits, labels), loss(logits, one_hot))
    torch.testing.assert_close(loss.normalizer(labels), loss.normalizer(one_hot))


# --- Masks ----------------------------------------------------------------------------------------

# By example, over classes and pixels: outputs, targets as labels, as class probabilities.
FLAT_SIGMOID = [[0.75, 0.5, 0.25, 0.75], [0.5, 0.25, 0.75, 0.25]]
FLAT_HARD = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
FLAT_SOFT = [[1.0, 0.2, 0.0, 0.8], [0.5, 0.0, 0.5, 1.0]]


def test_binary_cross_entropy_of_masks_is_the_mean_over_pixels() -> None:
    logits = logits_of(MASK_SIGMOID)
    right = [0.75, 0.5, 0.75, 0.75, 0.5, 0.75, 0.75, 0.25]
    by_hand = -sum(map(ln, right)) / 8
    assert value(BinaryCrossEntropy(), logits, MASK_LABELS) == close(by_hand)
    soft = sum(bce(p, t) for p, t in pairs(FLAT_SIGMOID, FLAT_SOFT)) / 8
    assert value(BinaryCrossEntropy(), logits, MASK_SOFT) == close(soft)


def test_overlap_losses_of_masks_are_of_each_example_over_classes_and_pixels() -> None:
    logits = logits_of(MASK_SIGMOID)
    # Outputs add up to 2.25 and 1.75, targets to 2; 1.5 and 1.0 of them are right.
    dice = ((1 - (3 + 1) / (2.25 + 2 + 1)) + (1 - (2 + 1) / (1.75 + 2 + 1))) / 2
    iou = ((1 - (1.5 + 1) / (4.25 - 1.5 + 1)) + (1 - (1 + 1) / (3.75 - 1 + 1))) / 2
    assert value(Dice(), logits, MASK_LABELS) == close(dice)
    assert value(Iou(), logits, MASK_LABELS) == close(iou)
    both = [0.75 + 0.2 + 0.75, 0.5 + 0.5 + 0.25]
    dices = [1 - (2 * b + 1) / (p + 2 + 1) for b, p in zip(both, [2.25, 1.75], strict=True)]
    ious = [1 - (b + 1) / (p + 2 - b + 1) for b, p in zip(both, [2.25, 1.75], strict=True)]
    assert value(Dice(), logits, MASK_SOFT) == close(sum(dices) / 2)
    assert value(Iou(), logits, MASK_SOFT) == close(sum(ious) / 2)
    cross_entropy = sum(bce(p, t) for p, t in pairs(FLAT_SIGMOID, FLAT_HARD)) / 8
    assert value(BceDice(), logits, MASK_LABELS) == close((cross_entropy + dice) / 2)


def test_focal_loss_of_masks_is_summed_over_pixels() -> None:
    wanted = sum(
        (0.25 if t else 0.75) * (1 - p if t else p) ** 2 * bce(p, t)
        for p, t in pairs(FLAT_SIGMOID, FLAT_HARD)
    )
    assert value(Focal(), logits_of(MASK_SIGMOID), MASK_LABELS) == close(wanted / 2)


def test_cross_entropy_of_masks_is_the_mean_over_pixels() -> None:
    logits = torch.tensor([[[[ln(3), 0.0]], [[0.0, ln(4)]]]])
    assert value(CrossEntropy(), logits, [[[0, 0]]]) == close((ln(4 / 3) + ln(5)) / 2)


# --- For every loss -------------------------------------------------------------------------------


def extremes(most: float) -> Tensor:
    """Logits (8, 3) from a network that is sure, right or wrong, or says nothing."""
    rows = [(1, 1, 1), (-1, -1, -1), (1, -1, -1), (-1, 1, -1), (-1, 1, 1), (0, 0, 0)]
    return most * torch.tensor([*rows, (1, 0, -1), (1e-3, -1e-3, 0)])


@pytest.mark.parametrize("config", EVERY_LOSS)
@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        (torch.float16, 65504.0),
        (torch.float16, 20.0),
        (torch.bfloat16, 1e4),
        (torch.bfloat16, 20.0),
        (torch.float32, 1e4),
    ],
)
@pytest.mark.parametrize("is_hard", [True, False])
def test_the_loss_and_its_gradient_are_finite_at_the_extremes(
    config: Loss, dtype: torch.dtype, most: float, is_hard: bool
) -> None:
    loss = build_loss(config, [8, 1, 0])
    soft = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.3, 0.0], [1e-9, 1.0, 0.0], [0.0, 0.0, 0.0]])
    if isinstance(config, CrossEntropy):  # one class is present
        soft = soft[:-1]
    for target in torch.arange(3) if is_hard else soft:
        logits = extremes(most).to(dtype).requires_grad_()
        assert logits.isfinite().all()
        mean = loss(logits, target.expand(8, *target.shape))
        assert mean.dtype is torch.float32
        assert mean.isfinite()
        (gradient,) = torch.autograd.grad(mean, logits)
        assert gradient.dtype is dtype
        assert gradient.isfinite().all()


@pytest.mark.parametrize("config", EVERY_LOSS)
@pytest.mark.parametrize("targets", [LABELS, SOFT])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_loss_computes_in_float32_also_under_autocast(
    config: Loss, targets: Sequence[object], dtype: torch.dtype
) -> None:
    logits, given = logits_of(SIGMOID).to(dtype), torch.tensor(targets)
    if given.is_floating_point():
        given = given.to(dtype)
    loss = build_loss(config, COUNTS)
    wanted = loss(logits.float(), given.float() if given.is_floating_point() else given)
    plain = loss(logits, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(logits, given)
    assert wanted.dtype is plain.dtype is mixed.dtype is torch.float32
    assert wanted.item() == plain.item() == mixed.item()


@pytest.mark.parametrize("config", EVERY_LOSS)
def test_losses_of_auxiliary_classifiers_are_added_with_their_weight(config: Loss) -> None:
    logits = torch.tensor(SIGMOID)
    aux = (logits.flip(0), 2 * logits - 1)
    for targets in torch.tensor(LABELS), torch.tensor(SOFT):
        alone = [build_loss(config, COUNTS)(x, targets).item() for x in (logits, *aux)]
        both = build_loss(config, COUNTS, aux_weight=0.3)(WithAux(logits, aux), targets)
        assert both.item() == close(alone[0] + 0.3 * (alone[1] + alone[2]))


@pytest.mark.parametrize("config", EVERY_LOSS)
@pytest.mark.parametrize("is_hard", [True, False])
@pytest.mark.parametrize("pixels", [(), (2, 2)])
def test_parts_of_a_batch_add_up_to_it_by_their_normalizers(
    config: Loss, is_hard: bool, pixels: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, *pixels, generator=generator)
    targets = torch.rand(7, 3, *pixels, generator=generator).softmax(1)
    if is_hard:
        targets = targets.argmax(1)
    loss = build_loss(config, [6, 3, 1])
    parts = zip(logits.split([2, 4, 1]), targets.split([2, 4, 1]), strict=True)
    added = sum((loss(x, t) * loss.normalizer(t)).item() for x, t in parts)
    assert loss(logits, targets).item() == close(added / loss.normalizer(targets).item())


def test_the_normalizer_is_the_number_of_examples_or_the_sum_of_their_class_weights() -> None:
    labels, soft = torch.tensor([0, 2, 2]), torch.tensor(SOFT)
    weighted, plain = build_loss(WEIGHTED, COUNTS), build_loss(Focal(), COUNTS)
    assert plain.normalizer(labels).item() == 3
    assert plain.normalizer(soft).item() == 2
    assert weighted.normalizer(labels).item() == 1 + 4 + 4
    assert weighted.normalizer(soft).item() == close(0.7 * 1 + 0.3 * 2 + 0.5 * 2 + 0.5 * 4)
    many = torch.full((20000, 3), 1 / 3, dtype=torch.float16)  # more than float16 can count
    assert weighted.normalizer(many).item() == pytest.approx(20000 * 7 / 3, rel=1e-3)
    assert weighted.normalizer(many).dtype is torch.float32


@pytest.mark.parametrize("config", EVERY_LOSS)
@pytest.mark.parametrize("mixed", [True, False])
def test_every_shipped_loss_passes_its_own_check(config: Loss, mixed: bool) -> None:
    assert check_loss(config, num_classes=3, mixed=mixed) == []
    if not isinstance(config, CrossEntropy):
        assert check_loss(config, num_classes=3, is_multilabel=True) == []


def test_a_loss_learns_the_labels() -> None:
    for config in EVERY_LOSS:
        logits = torch.zeros(2, 3, requires_grad=True)
        loss = build_loss(config, COUNTS)
        for _ in range(200):
            (gradient,) = torch.autograd.grad(loss(logits, torch.tensor(LABELS)), logits)
            logits = (logits - gradient).detach().requires_grad_()
        assert logits.argmax(1).tolist() == LABELS, config


# --- Custom losses --------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.scale * (logits[:, 0] - targets).mean()


class Linear(nn.Module):
    """Computes in half precision unless autocast is off, and returns float64."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        product = logits @ logits.T
        assert product.dtype is torch.float32
        return product.mean().double()


class Times:
    """A callable that is no module, with attributes that a call does not change."""

    def __init__(self, scale: float) -> None:
        self.scale = torch.tensor(scale)
        self.made_of = {"scale": scale, "rows": np.ones((2, 2)), "of": [self], "how": len}

    def __call__(self, logits: Tensor, targets: Tensor, more: float = 1.0) -> Tensor:
        return more * self.scale * (logits[:, 0] - targets).mean()

    def method(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self(logits, targets)


class Counting:
    """A callable that is no module, whose calls count."""

    def __init__(self, count: object) -> None:
        self.count = count

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        calls = self.step()
        return calls * logits.mean()

    def method(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self(logits, targets)

    def step(self) -> int:
        match self.count:
            case int():
                self.count += 1
                return self.count
            case list():
                self.count.append(1)
                return len(self.count)
            case dict():
                self.count["calls"] = self.count.get("calls", 0) + 1
                return self.count["calls"]
            case Counting():
                return self.count.step()
            case random.Random():
                return self.count.randrange(100)
            case _:  # an array or a tensor
                self.count += 1
                return int(self.count)


class CountingModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * logits.mean()


class Locked(Times):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.lock = threading.Lock()


def in_place(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.sub_(logits.mean(1, keepdim=True)).logsumexp(1).mean()


def log_of_sum(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.logsumexp(1).mean()


def unstable(logits: Tensor, targets: Tensor) -> Tensor:
    present = F.one_hot(targets, logits.shape[1]).float()
    p = logits.sigmoid()
    return -(present * p.log() + (1 - present) * (1 - p).log()).mean()


def unstable_if_wrong(logits: Tensor, targets: Tensor) -> Tensor:
    return -(1 - (-logits.gather(1, targets.unsqueeze(1))).sigmoid()).log().mean()


def unstable_root(logits: Tensor, targets: Tensor) -> Tensor:
    return (1 - logits.sigmoid()).sqrt().mean()


def unsmoothed(logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.sigmoid()
    return 1 - ((p * targets).sum() / (p + targets - p * targets).sum())


def noisy(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits + torch.randn(logits.shape)).mean()


def scaled(logits: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (logits[:, 0] - targets).mean()


def failing(logits: Tensor, targets: Tensor) -> Tensor:
    raise KeyError("colour\nof many lines")


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], str]:
    """Return what makes an object importable, and its import path."""
    monkeypatch.setattr(own, "_spaces", {})
    monkeypatch.setattr(own, "_texts", {})
    monkeypatch.setattr(sys, "path", list(sys.path))

    def offer(thing: object) -> str:
        module = types.ModuleType("own_losses")
        module.thing = thing
        own.offer("own_losses", module, "", Path("offered.py"))
        return "own_losses:thing"

    return offer


@pytest.mark.parametrize(
    ("thing", "options"),
    [
        (scaled, {"scale": 3.0}),
        (Scaled, {"scale": 3.0}),
        (Scaled(3.0), {}),
        (Times(3.0), {}),
        (Times(1.5), {"more": 2.0}),
        (Times(3.0).method, {}),
        (partial(scaled, scale=3.0), {}),
        (partial(Times(1.5), more=2.0), {}),
    ],
)
def test_an_own_loss_is_a_function_a_class_or_an_instance(
    thing: object, options: dict[str, float], offer: Callable[[object], str]
) -> None:
    config = OwnLoss(loss=offer(thing), options=options)
    logits, labels = torch.tensor([[4.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    loss = build_loss(config, [1, 1], aux_weight=0.5)
    assert loss(logits, labels).item() == 3 * (4 + 0) / 2
    assert loss(WithAux(logits, (logits,)), labels).item() == 1.5 * 3 * (4 + 0) / 2
    assert check_loss(config, num_classes=2) == []


COUNTS_CALLS = {
    "number": lambda: Counting(0),
    "tensor": lambda: Counting(torch.zeros(())),
    "array": lambda: Counting(np.zeros(())),
    "list": lambda: Counting([]),
    "dict": lambda: Counting({}),
    "object": lambda: Counting(Counting(0)),
    "generator": lambda: Counting(random.Random(5)),
    "method": lambda: Counting(0).method,
    "partial": lambda: partial(Counting(0)),
}


@pytest.mark.parametrize("make", [*COUNTS_CALLS.values(), CountingModule])
def test_a_trial_does_not_see_what_another_one_left_in_a_loss(
    make: Callable[[], Any], offer: Callable[[object], str]
) -> None:
    config = OwnLoss(loss=offer(make()))
    logits, labels = torch.ones(2, 3), torch.tensor([0, 1])
    first = build_loss(config, COUNTS)
    calls = [first(logits, labels).item() for _ in range(3)]
    assert len(set(calls)) == 3
    second = build_loss(config, COUNTS)
    assert [second(logits, labels).item() for _ in range(3)] == calls


@pytest.mark.parametrize("make", COUNTS_CALLS.values(), ids=COUNTS_CALLS)
def test_state_that_no_checkpoint_has_is_refused(
    make: Callable[[], Any], offer: Callable[[object], str]
) -> None:
    told = (
        "loss 'own_losses:thing': calling it changes its attributes, which no checkpoint has; "
        "write it as an nn.Module and keep this state in buffers"
    )
    assert check_loss(OwnLoss(loss=offer(make())), num_classes=3) == [told]


@pytest.mark.parametrize("thing", [CountingModule, CountingModule()])
def test_state_in_buffers_is_allowed(thing: object, offer: Callable[[object], str]) -> None:
    config = OwnLoss(loss=offer(thing))
    assert check_loss(config, num_classes=3) == []
    assert build_loss(config, COUNTS).state_dict().keys() == {"of_logits.called.calls"}


def test_an_instance_that_cannot_be_copied_is_one_line(offer: Callable[[object], str]) -> None:
    (line,) = check_loss(OwnLoss(loss=offer(Locked())), num_classes=3)
    assert line.startswith(
        "loss 'own_losses:thing' is an instance of Locked, which cannot be copied for each trial: "
        "TypeError: cannot pickle"
    )
    assert "\n" not in line


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_functions_are_not_copied(offer: Callable[[object], str]) -> None:
    scripted = torch.jit.script(log_of_sum)  # cannot be
    for thing in (log_of_sum, scripted):
        assert check_loss(OwnLoss(loss=offer(thing)), num_classes=3) == []


def test_a_loss_may_write_into_its_logits(offer: Callable[[object], str]) -> None:
    assert check_loss(OwnLoss(loss=offer(in_place)), num_classes=3) == []


@pytest.mark.parametrize(
    ("thing", "told"),
    [
        (unstable, "it is nan for logits of -30 and 30; it must be finite"),
        (unstable_if_wrong, "it is inf for logits of -30 and 30; it must be finite"),
        (unstable_root, "its gradient to the logits is not finite for logits of -30 and 30"),
    ],
)
def test_a_loss_that_fails_for_saturated_logits_is_refused(
    thing: object, told: str, offer: Callable[[object], str]
) -> None:
    (line,) = check_loss(OwnLoss(loss=offer(thing)), num_classes=3)
    assert line == f"loss 'own_losses:thing': {told}"


def test_a_loss_that_fails_without_any_class_is_refused_for_multi_label_data(
    offer: Callable[[object], str],
) -> None:
    config = OwnLoss(loss=offer(unsmoothed))
    assert check_loss(config, num_classes=3, mixed=True) == []  # where a class always is
    (line,) = check_loss(config, num_classes=3, is_multilabel=True)
    assert line == (
        "loss 'own_losses:thing': it is nan for logits of -200 and no class present; it must be "
        "finite"
    )


def test_an_own_loss_without_options_is_called_with_two_arguments(
    offer: Callable[[object], str],
) -> None:
    for thing in scaled, Scaled:
        loss = build_loss(OwnLoss(loss=offer(thing)), [1, 1])
        assert loss(torch.tensor([[4.0, 0.0]]), torch.tensor([1])).item() == 3


def test_an_own_loss_gets_float32_and_gives_float32_also_under_autocast(
    offer: Callable[[object], str],
) -> None:
    loss = build_loss(OwnLoss(loss=offer(Linear)), [1, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = loss(torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor([0, 1]))
    assert (mean.dtype, mean.item()) == (torch.float32, 2.0)


def test_the_buffers_of_an_own_class_move_with_the_loss(offer: Callable[[object], str]) -> None:
    loss = build_loss(OwnLoss(loss=offer(Scaled)), [1, 1])
    assert [b.device.type for b in loss.to("meta").buffers()] == ["meta"]


def test_an_instance_takes_no_options(offer: Callable[[object], str]) -> None:
    config = OwnLoss(loss=offer(Scaled()), options={"scale": 3.0})
    with pytest.raises(ConfigError) as error:
        build_loss(config, [1, 1])
    assert str(error.value) == (
        "loss 'own_losses:thing' is an instance of Scaled and takes no options, got "
        "{'scale': 3.0}; name its class instead"
    )
    assert check_loss(config, num_classes=2) == [str(error.value)]


TRIED = "trying it on two examples with labels failed: "


@pytest.mark.parametrize(
    ("thing", "options", "wanted"),
    [
        (lambda x, t: x.mean(1), {}, "returned shape (2,); it must return the batch's mean, a te"),
        (lambda x, t: x.mean().item(), {}, "returned float; it must return the batch's mean"),
        (lambda x, t: None, {}, "returned NoneType; it must"),
        (lambda x, t: x.sum() / 0, {}, "it is nan for logits in [-1, 1]; it must be finite"),
        (lambda x, t: x.mean() + math.inf, {}, "it is inf for logits in [-1, 1]; it must be"),
        (lambda x, t: x.detach().mean(), {}, "it has no gradient to the logits; compute it"),
        (lambda x, t: (x.argmax(1) == t).sum(), {}, "it has no gradient to the logits"),
        (
            lambda x, t: torch.ones((), requires_grad=True) * 2,
            {},
            "it has no gradient to the logits",
        ),
        (
            lambda x, t: (x - x).abs().sqrt().mean(),
            {},
            "its gradient to the logits is not finite for logits in [-1, 1]",
        ),
        (
            failing,
            {},
            TRIED + "KeyError: 'colour\\nof many lines' (test",
        ),
        (
            lambda x, t: x.view(5),
            {},
            TRIED + "RuntimeError: shape '[5]' is invalid for input",
        ),
        (scaled, {"scael": 1}, TRIED + "TypeError: "),
        (Scaled, {"scael": 1}, TRIED + "TypeError: "),
    ],
)
def test_a_bad_own_loss_is_one_line_that_says_what_is_wrong(
    thing: object, options: dict[str, object], wanted: str, offer: Callable[[object], str]
) -> None:
    (line,) = check_loss(OwnLoss(loss=offer(thing), options=options), num_classes=3)
    assert line.removeprefix("loss 'own_losses:thing'").lstrip(": ").startswith(wanted)
    assert line.startswith("loss 'own_losses:thing'")
    assert "\n" not in line


def test_an_own_loss_that_is_no_scalar_is_refused_when_it_is_called(
    offer: Callable[[object], str],
) -> None:
    loss = build_loss(OwnLoss(loss=offer(lambda x, t: x)), [1, 1])
    with pytest.raises(ConfigError, match=r"loss 'own_losses:thing' returned shape \(2, 2\); it"):
        loss(torch.ones(2, 2), torch.tensor([0, 1]))


def test_an_own_loss_that_is_not_there_is_one_line() -> None:
    (line,) = check_loss(OwnLoss(loss="no_such_module:loss"), num_classes=3)
    assert line.startswith("loss 'no_such_module:loss': cannot import no_such_module")


def test_the_check_leaves_the_random_numbers_alone(offer: Callable[[object], str]) -> None:
    before = torch.get_rng_state()
    assert check_loss(OwnLoss(loss=offer(noisy)), num_classes=3) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_refuses_parameters_and_leaves_no_gradient_in_them(
    offer: Callable[[object], str],
) -> None:
    class Learned(nn.Linear):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return super().forward(logits).mean()

    instance = Learned(3, 1)
    (line,) = check_loss(OwnLoss(loss=offer(instance)), num_classes=3)
    assert "its parameters (weight, bias) would not be trained" in line
    assert instance.weight.grad is None


def test_the_check_takes_one_class_as_well_as_many() -> None:
    for config in EVERY_LOSS:
        if config != CrossEntropy(class_weights=[1.0, 2.0, 4.0]):
            assert check_loss(config, num_classes=1) == []
            assert check_loss(config, num_classes=1000) == []


def needs_labels(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets.unsqueeze(1)).mean()


def test_a_loss_that_takes_labels_only_is_refused_where_images_are_mixed(
    offer: Callable[[object], str],
) -> None:
    config = OwnLoss(loss=offer(needs_labels))
    assert check_loss(config, num_classes=3) == []
    (line,) = check_loss(config, num_classes=3, mixed=True)
    assert "with class probabilities (images are mixed) failed" in line
    for of_ours in (CrossEntropy(), Focal(), BinaryCrossEntropy(), Dice(), BceDice(), Iou()):
        assert check_loss(of_ours, num_classes=3, mixed=True) == []


def test_a_loss_says_what_it_computes(offer: Callable[[object], str]) -> None:
    said = {
        CrossEntropy(label_smoothing=0.1): (
            "CrossEntropyLoss",
            {"label_smoothing": 0.1, "class_weights": None},
        ),
        CrossEntropy(class_weights="balanced"): (
            "CrossEntropyLoss",
            {"label_smoothing": 0.0, "class_weights": [2.0, 0.6666666865348816]},  # in float32
        ),
        Focal(gamma=1.5, alpha=None): ("focal", {"gamma": 1.5, "alpha": None}),
        BinaryCrossEntropy(label_smoothing=0.2, pos_weight=3.0): (
            "binary_cross_entropy",
            {"label_smoothing": 0.2, "pos_weight": 3.0},
        ),
        Dice(smooth=2.0): ("dice", {"smooth": 2.0}),
        BceDice(dice_weight=0.3): ("bce_dice", {"dice_weight": 0.3, "smooth": 1.0}),
        Iou(): ("iou", {"smooth": 1.0}),
    }
    for config, wanted in said.items():
        assert build_loss(config, [1, 3]).describe() == wanted
    reference = offer(needs_labels)
    assert build_loss(OwnLoss(loss=reference), [1, 3]).describe() == (reference, {})
