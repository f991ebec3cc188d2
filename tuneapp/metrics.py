"""What a network's answers are worth: scikit-learn's metrics, under the names of our rows."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    recall_score,
    roc_auc_score,
)

MANY_CLASSES = 100
"""With more classes, recall of each and AUROC are left out of the rows, unless asked for: a row of
thousands of numbers helps nobody, and AUROC sorts all answers once for each class."""

Floats = npt.NDArray[np.float64]


def metric_names(classes: Sequence[str], is_multilabel: bool) -> list[str]:
    """Return the metrics that a trial of these classes can be judged by, `val/loss` first."""
    plain = ["val/loss", "val/accuracy", "val/balanced_accuracy", "val/macro_f1", "val/auroc"]
    if is_multilabel:
        plain.append("val/average_precision")
    return plain + [f"val/recall/{name}" for name in classes]


def measure(
    logits: npt.NDArray[np.float32],
    targets: npt.NDArray[np.generic],
    classes: Sequence[str],
    asked: str = "",
) -> dict[str, float]:
    """Return the metrics of a validation, each in [0, 1].

    Exclusive classes: `accuracy`; `balanced_accuracy` (mean recall); `macro_f1`; `auroc`, of each
    class against the rest by its softmax, averaged; `recall/<class>`.

    Multi-label, a class being predicted where its logit is above 0: `accuracy`, the share of
    examples with every class right; `balanced_accuracy`, of each class, averaged; `macro_f1`;
    `auroc` and `average_precision` of each class, averaged; `recall/<class>`.

    What is not defined (AUROC or recall of a class that no example shows) is left out of averages.

    Args:
        logits: float32 (N, classes).
        targets: labels, int64 (N,); or 0 and 1, float32 (N, classes), of a multi-label set.
        classes: their names.
        asked: a metric that must not be left out for there being many classes.
    """
    with warnings.catch_warnings():
        # Of classes that are never predicted, or not there; zero_division says what they count.
        warnings.simplefilter("ignore")
        found = dict(
            _of_labels(logits, targets.astype(np.int64), classes, asked)
            if targets.ndim == 1
            else _of_sets(logits, targets.astype(np.bool_), classes, asked)
        )
    return {f"val/{name}": float(value) for name, value in found.items() if np.isfinite(value)}


def _of_labels(
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    asked: str,
) -> Iterator[tuple[str, float]]:
    predicted = logits.argmax(axis=1)
    yield "accuracy", accuracy_score(labels, predicted)
    yield "balanced_accuracy", balanced_accuracy_score(labels, predicted)
    yield "macro_f1", f1_score(labels, predicted, average="macro", zero_division=0)
    few = len(classes) <= MANY_CLASSES
    if few or asked == "val/auroc":
        shares = _softmax(logits)
        yield "auroc", _mean_over_classes(roc_auc_score, labels, shares, range(len(classes)))
    recalls = recall_score(
        labels, predicted, labels=range(len(classes)), average=None, zero_division=np.nan
    )
    yield from _recalls(recalls, classes, few, asked)


def _of_sets(
    logits: npt.NDArray[np.float32],
    shown: npt.NDArray[np.bool_],
    classes: Sequence[str],
    asked: str,
) -> Iterator[tuple[str, float]]:
    predicted = logits > 0
    yield "accuracy", accuracy_score(shown, predicted)
    columns = range(len(classes))
    yield (
        "balanced_accuracy",
        float(np.mean([balanced_accuracy_score(shown[:, c], predicted[:, c]) for c in columns])),
    )
    yield "macro_f1", f1_score(shown, predicted, average="macro", zero_division=0)
    few = len(classes) <= MANY_CLASSES
    for name, score in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        if few or asked == f"val/{name}":
            values = [
                score(shown[:, c], logits[:, c])
                for c in columns
                if 0 < shown[:, c].sum() < len(shown)
            ]
            yield name, float(np.mean(values)) if values else np.nan
    recalls = recall_score(shown, predicted, average=None, zero_division=np.nan)
    yield from _recalls(recalls, classes, few, asked)


def _recalls(
    recalls: Floats, classes: Sequence[str], few: bool, asked: str
) -> Iterator[tuple[str, float]]:
    for name, recall in zip(classes, recalls, strict=True):
        if few or asked == f"val/recall/{name}":
            yield f"recall/{name}", recall


def _mean_over_classes(
    score: object, labels: npt.NDArray[np.int64], shares: Floats, classes: Sequence[int]
) -> float:
    """Average a score of one class against the rest over the classes for which it is defined."""
    assert callable(score)
    values = [
        score(labels == label, shares[:, label])
        for label in classes
        if 0 < (labels == label).sum() < len(labels)
    ]
    return float(np.mean(values)) if values else float("nan")


def _softmax(logits: npt.NDArray[np.float32]) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
