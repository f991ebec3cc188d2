"""Metrics, against scikit-learn on the same predictions and against numbers worked out by hand."""

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    classification_report,
    f1_score,
    recall_score,
    roc_auc_score,
)

from tuneapp.config import RunSettings
from tuneapp.errors import ConfigError
from tuneapp.metrics import MANY_CLASSES, measure, metric_names

CLOSE = {"rel": 1e-9, "abs": 1e-12}


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def answers(seed: int, count: int = 200, classes: int = 5) -> tuple[Any, Any]:
    """Return logits that are right more often than not, and labels of uneven classes."""
    rng = np.random.default_rng(seed)
    shares = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    labels = np.concatenate([np.arange(classes), rng.choice(classes, count - classes, p=shares)])
    logits = rng.normal(0, 2, (count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 2
    return logits, labels.astype(np.int64)


def softmax(logits: Any) -> Any:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


# --- Exclusive classes ----------------------------------------------------------------------------


def test_one_validation_by_hand() -> None:
    # Three classes, five examples; the predictions are a, b, b, b, a.
    logits = np.log(
        np.array(
            [[6, 3, 1], [3, 5, 2], [1, 6, 3], [1, 5, 4], [5.5, 1, 3.5]], dtype=np.float32
        )
    )  # fmt: skip
    labels = np.array([0, 0, 1, 2, 2], dtype=np.int64)
    found = measure(logits, labels, ["a", "b", "c"])
    assert found["val/accuracy"] == pytest.approx(2 / 5)
    # Right of a: 1 of 2; of b: 1 of 1; of c: 0 of 2.
    assert found["val/recall/a"] == pytest.approx(1 / 2)
    assert found["val/recall/b"] == 1
    assert found["val/recall/c"] == 0
    assert found["val/balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    # F1: a has precision 1/2, recall 1/2; b precision 1/3, recall 1; c is never predicted: 0.
    assert found["val/macro_f1"] == pytest.approx((1 / 2 + 2 * (1 / 3) / (4 / 3) + 0) / 3)
    # Shares of a: .6 and .3 against .1, .1 and .55: 5 pairs of 6 are won. Of b: .6 against .3, .5,
    # .5 and .1: all. Of c: .4 and .35 against .1, .2 and .3: all.
    assert found["val/auroc"] == pytest.approx((5 / 6 + 1 + 1) / 3)
    assert set(found) == {
        "val/accuracy", "val/balanced_accuracy", "val/macro_f1", "val/auroc", "val/recall/a",
        "val/recall/b", "val/recall/c",
    }  # fmt: skip


@pytest.mark.parametrize(("seed", "classes"), [(0, 2), (1, 3), (2, 5), (3, 10)])
def test_the_metrics_of_exclusive_classes_are_scikit_learns(seed: int, classes: int) -> None:
    logits, labels = answers(seed, classes=classes)
    found = measure(logits, labels, names(classes))
    predicted = logits.argmax(axis=1)
    wanted = {
        "val/accuracy": accuracy_score(labels, predicted),
        "val/balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "val/macro_f1": f1_score(labels, predicted, average="macro"),
    }
    shares = softmax(logits)
    if classes == 2:
        wanted["val/auroc"] = roc_auc_score(labels, shares[:, 1])
    else:
        wanted["val/auroc"] = roc_auc_score(labels, shares, multi_class="ovr", average="macro")
    recalls = recall_score(labels, predicted, average=None)
    for name, recall in zip(names(classes), recalls, strict=True):
        wanted[f"val/recall/{name}"] = recall
    assert found == pytest.approx(wanted, **CLOSE)
    assert all(type(value) is float for value in found.values())


def test_the_report_of_scikit_learn_says_the_same() -> None:
    logits, labels = answers(4)
    found = measure(logits, labels, names(5))
    report = classification_report(
        labels, logits.argmax(axis=1), target_names=names(5), output_dict=True
    )
    assert found["val/macro_f1"] == pytest.approx(report["macro avg"]["f1-score"], **CLOSE)
    assert found["val/balanced_accuracy"] == pytest.approx(report["macro avg"]["recall"], **CLOSE)
    for name in names(5):
        assert found[f"val/recall/{name}"] == pytest.approx(report[name]["recall"], **CLOSE)


def test_classes_that_no_example_shows_are_left_out_of_averages_and_of_the_row() -> None:
    logits, labels = answers(5)
    logits, labels = logits[labels != 2], labels[labels != 2]
    found = measure(logits, labels, names(5))
    assert "val/recall/class 2" not in found
    predicted = logits.argmax(axis=1)
    there = [0, 1, 3, 4]
    recalls = recall_score(labels, predicted, labels=there, average=None)
    assert found["val/balanced_accuracy"] == pytest.approx(np.mean(recalls), **CLOSE)
    shares = softmax(logits)
    aurocs = [roc_auc_score(labels == c, shares[:, c]) for c in there]
    assert found["val/auroc"] == pytest.approx(np.mean(aurocs), **CLOSE)
    assert found["val/macro_f1"] == pytest.approx(
        f1_score(labels, predicted, average="macro", zero_division=0), **CLOSE
    )


def test_a_class_that_is_never_predicted_counts_nought() -> None:
    logits, labels = answers(6, classes=3)
    logits[:, 1] = -50
    found = measure(logits, labels, names(3))
    assert found["val/recall/class 1"] == 0
    f1s = f1_score(labels, logits.argmax(axis=1), average=None, zero_division=0)
    assert f1s[1] == 0
    assert found["val/macro_f1"] == pytest.approx(f1s.sum() / 3, **CLOSE)


def test_one_class_only_in_the_validation_has_no_auroc() -> None:
    logits, _ = answers(7, count=20, classes=3)
    found = measure(logits, np.ones(20, dtype=np.int64), names(3))
    assert "val/auroc" not in found
    assert set(found) == {
        "val/accuracy", "val/balanced_accuracy", "val/macro_f1", "val/recall/class 1",
    }  # fmt: skip
    assert np.isfinite(list(found.values())).all()


def test_large_logits_are_no_overflow() -> None:
    logits, labels = answers(8, classes=3)
    small, large = (measure(logits * f, labels, names(3)) for f in (1, 2.0**12))
    assert large["val/accuracy"] == small["val/accuracy"]
    assert 0 <= large["val/auroc"] <= 1


# --- Several labels -------------------------------------------------------------------------------


def sets(seed: int, count: int = 150, classes: int = 4) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, classes)) < [0.6, 0.4, 0.2, 0.1][:classes]).astype(np.float32)
    logits = (rng.normal(0, 2, targets.shape) + 2 * targets - 1).astype(np.float32)
    return logits, targets


def test_one_multi_label_validation_by_hand() -> None:
    logits = np.array([[1, 2], [-1, 1], [3, -1], [-2, -3]], dtype=np.float32)
    targets = np.array([[1, 1], [0, 1], [0, 1], [0, 0]], dtype=np.float32)
    found = measure(logits, targets, ["a", "b"])
    # Predicted: ab, b, a, nothing; all right in three of four.
    assert found["val/accuracy"] == 3 / 4
    # a: 1 of 1 and 2 of 3 negatives; b: 2 of 3 and 1 of 1.
    assert found["val/balanced_accuracy"] == pytest.approx(((1 + 2 / 3) / 2 + (2 / 3 + 1) / 2) / 2)
    assert (found["val/recall/a"], found["val/recall/b"]) == (1, pytest.approx(2 / 3))
    # F1 of a: precision 1/2, recall 1; of b: precision 1, recall 2/3.
    assert found["val/macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    # a: 1 wins against -1 and -2 and loses against 3. b: all three are above -3.
    assert found["val/auroc"] == pytest.approx((2 / 3 + 1) / 2)
    # Average precision of a: its only one is second; of b: the first three are right.
    assert found["val/average_precision"] == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_metrics_of_several_labels_are_scikit_learns(seed: int) -> None:
    logits, targets = sets(seed)
    predicted = (logits > 0).astype(int)
    shown = targets.astype(int)
    wanted = {
        "val/accuracy": accuracy_score(shown, predicted),
        "val/balanced_accuracy": np.mean(
            [balanced_accuracy_score(shown[:, c], predicted[:, c]) for c in range(4)]
        ),
        "val/macro_f1": f1_score(shown, predicted, average="macro"),
        "val/auroc": roc_auc_score(shown, logits, average="macro"),
        "val/average_precision": average_precision_score(shown, logits, average="macro"),
    }
    for name, recall in zip(names(4), recall_score(shown, predicted, average=None), strict=True):
        wanted[f"val/recall/{name}"] = recall
    assert measure(logits, targets, names(4)) == pytest.approx(wanted, **CLOSE)


def test_a_label_that_all_or_no_examples_show_is_left_out_where_it_is_not_defined() -> None:
    logits, targets = sets(9)
    targets[:, 1], targets[:, 3] = 1, 0
    found = measure(logits, targets, names(4))
    assert "val/recall/class 3" not in found
    assert "val/recall/class 1" in found
    defined = [0, 2]
    shown = targets[:, defined].astype(int)
    assert found["val/auroc"] == pytest.approx(roc_auc_score(shown, logits[:, defined]), **CLOSE)
    assert found["val/average_precision"] == pytest.approx(
        average_precision_score(shown, logits[:, defined]), **CLOSE
    )
    assert np.isfinite(list(found.values())).all()


def test_a_label_that_is_neither_shown_nor_predicted_counts_nought_in_f1() -> None:
    logits, targets = sets(9)
    targets[:, 3], logits[:, 3] = 0, -5
    rest = f1_score(targets[:, :3].astype(int), (logits[:, :3] > 0).astype(int), average="macro")
    found = measure(logits, targets, names(4))
    assert found["val/macro_f1"] == pytest.approx(3 / 4 * rest, **CLOSE)


def test_examples_without_any_label_still_give_numbers() -> None:
    logits, targets = sets(10)
    found = measure(logits, np.zeros_like(targets), names(4))
    assert set(found) == {"val/accuracy", "val/balanced_accuracy", "val/macro_f1"}
    assert np.isfinite(list(found.values())).all()


def test_a_logit_of_nought_predicts_nothing() -> None:
    logits = np.array([[0, 1], [1, 0]], dtype=np.float32)
    targets = np.array([[0, 1], [1, 0]], dtype=np.float32)
    assert measure(logits, targets, ["a", "b"])["val/accuracy"] == 1


# --- Many classes ---------------------------------------------------------------------------------

ALWAYS = {"val/accuracy", "val/balanced_accuracy", "val/macro_f1"}


@pytest.mark.parametrize("several", [False, True])
def test_what_many_classes_leave_out_is_there_when_asked_for(several: bool) -> None:
    few, many = MANY_CLASSES, MANY_CLASSES + 1
    rng = np.random.default_rng(0)

    def found(classes: int, asked: str = "") -> dict[str, float]:
        logits = rng.normal(size=(3 * classes, classes)).astype(np.float32)
        labels = np.arange(3 * classes) % classes
        targets = np.eye(classes, dtype=np.float32)[labels] if several else labels
        return measure(logits, targets, names(classes), asked)

    optional = {"val/auroc", "val/average_precision"} if several else {"val/auroc"}
    assert set(found(few)) == ALWAYS | optional | {f"val/recall/{name}" for name in names(few)}
    assert set(found(many)) == ALWAYS
    assert set(found(many, "val/accuracy")) == ALWAYS
    for asked in [*optional, "val/recall/class 100"]:
        assert set(found(many, asked)) == {*ALWAYS, asked}


def test_a_metric_that_is_asked_for_is_the_same_as_among_few() -> None:
    logits, labels = answers(11, count=400, classes=MANY_CLASSES + 1)
    shares = softmax(logits)
    assert measure(logits, labels, names(101), "val/auroc")["val/auroc"] == pytest.approx(
        roc_auc_score(labels, shares, multi_class="ovr", average="macro"), **CLOSE
    )
    recalls = recall_score(labels, logits.argmax(axis=1), average=None)
    found = measure(logits, labels, names(101), "val/recall/class 7")
    assert found["val/recall/class 7"] == pytest.approx(recalls[7], **CLOSE)


# --- Names ----------------------------------------------------------------------------------------


def test_the_names_that_can_be_asked_for_are_those_that_are_measured() -> None:
    logits, labels = answers(12)
    told = metric_names(names(5), is_multilabel=False)
    assert told[0] == "val/loss"
    assert set(told) == {"val/loss", *measure(logits, labels, names(5))}
    assert len(set(told)) == len(told)
    logits, targets = sets(12)
    told = metric_names(names(4), is_multilabel=True)
    assert set(told) == {"val/loss", *measure(logits, targets, names(4))}


@pytest.mark.parametrize("several", [False, True])
def test_every_name_is_a_metric_of_the_settings_and_only_the_loss_falls(several: bool) -> None:
    for name in metric_names(["cat", "sea/sky", "a b"], several):
        assert RunSettings(metric=name).mode == ("min" if name == "val/loss" else "max")


@pytest.mark.parametrize(
    "name", ["accuracy", "val/f1", "val/recall/", "val/recall", "train/loss", "", "val/", None, 3]
)
def test_other_names_are_refused_with_those_there_are(name: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"metric must be one of val/accuracy, val/auroc, .*CLASS"
    ):
        RunSettings(metric=name)


def test_no_warning_reaches_the_user() -> None:
    logits, labels = answers(13, count=10, classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(logits[:, :3], np.zeros(10, dtype=np.int64), names(3))
        measure(logits, np.zeros((10, 3), dtype=np.float32), names(3))
        measure(logits[:2], labels[:2], names(3))
