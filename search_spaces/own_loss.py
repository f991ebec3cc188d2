"""Does a custom loss or schedule beat the usual ones? Both are defined in this file.

    python -m tuneapp sweep search_spaces/own_loss.py
    python -m tuneapp sweep search_spaces/own_loss.py --data photos/ --trials 32

`OwnLoss` and `OwnSchedule` take import paths: `own_loss:poly_cross_entropy` is this file's, and the
run keeps a copy of it. `options` are arguments of the loss, and can be searched. The first trial is
the baseline: cross-entropy with a little label smoothing, and a cosine.

Measured on the digits with random weights, 8 trials: cross-entropy 0.991, Poly-1 with the inverse
square root 0.983; the search's best, cross-entropy again, 0.996, which may be chance.
"""

import torch
from optuna import Trial
from torch import Tensor
from torch.nn import functional as F

from tuneapp.config import (
    AdamW,
    Cosine,
    CrossEntropy,
    Focal,
    Loss,
    OwnLoss,
    OwnSchedule,
    Schedule,
    TrialConfig,
)

FIRST_TRIALS = [
    {"loss": "cross_entropy", "cross_entropy.label_smoothing": 0.1, "schedule": "cosine",
     "lr": 1e-3},
    {"loss": "poly", "poly.epsilon": 1.0, "schedule": "inverse_sqrt", "lr": 1e-3},
]  # fmt: skip


def poly_cross_entropy(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Return Poly-1: cross-entropy and `epsilon` times (1 - probability of the true class).

    Source: Z. Leng et al., PolyLoss, ICLR 2022.
    """
    true_class = logits.softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return torch.mean(losses + epsilon * (1 - true_class))


def inverse_sqrt(epoch: int, config: TrialConfig) -> float:
    """Return 1, 0.71, 0.58, 0.5, ...: the learning rate falls, and never to zero."""
    return float((1 + epoch) ** -0.5)


def search_space(trial: Trial) -> TrialConfig:
    return TrialConfig(
        model="resnet18",
        weights="auto",
        loss=loss(trial),
        schedule=schedule(trial),
        optimizer=AdamW(lr=trial.suggest_float("lr", 1e-4, 1e-2, log=True)),
        lr_ratio=0.65,
        epochs=5,
        batch_size=32,
    )


def loss(trial: Trial) -> Loss:
    match trial.suggest_categorical("loss", ["cross_entropy", "poly", "focal"]):
        case "cross_entropy":
            smoothing = trial.suggest_float("cross_entropy.label_smoothing", 0.0, 0.3)
            return CrossEntropy(label_smoothing=smoothing)
        case "poly":
            options = {"epsilon": trial.suggest_float("poly.epsilon", -1.0, 4.0)}
            return OwnLoss(loss="own_loss:poly_cross_entropy", options=options)
        case _:
            return Focal(gamma=trial.suggest_float("focal.gamma", 0.5, 4.0))


def schedule(trial: Trial) -> Schedule:
    if trial.suggest_categorical("schedule", ["cosine", "inverse_sqrt"]) == "cosine":
        return Cosine(warmup_fraction=0.1)
    return OwnSchedule(factor="own_loss:inverse_sqrt", warmup_fraction=0.1)
