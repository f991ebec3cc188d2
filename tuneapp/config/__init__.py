"""What a trial is (searched) and how it is run (never searched), as typed, checked values.

Every class is frozen and keyword-only, so a typo in a search space is a `TypeError` on the line of
the typo. Wrong values are collected and reported together. This package imports only the standard
library: search-space files import it, and `tuneapp show` stays fast.
"""

from tuneapp.config.checks import METRICS, Metric, is_metric, is_reference, metric_mode
from tuneapp.config.data import BAD_IMAGES, EMBEDDED, BadImages, Data
from tuneapp.config.losses import (
    BceDice,
    BinaryCrossEntropy,
    CrossEntropy,
    Dice,
    Focal,
    Iou,
    Loss,
    OwnLoss,
)
from tuneapp.config.optimizers import Adam, AdamW, Optimizer, RmsProp, Sgd
from tuneapp.config.run import RunSettings, canonical_json, is_better
from tuneapp.config.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    MultiStep,
    OneCycle,
    OwnSchedule,
    Plateau,
    Polynomial,
    Schedule,
    Step,
)
from tuneapp.config.trial import AMP_MODES, AUGMENTS, Amp, Augment, Preprocess, TrialConfig

__all__ = [
    "AMP_MODES",
    "AUGMENTS",
    "BAD_IMAGES",
    "EMBEDDED",
    "METRICS",
    "Adam",
    "AdamW",
    "Amp",
    "Augment",
    "BadImages",
    "BceDice",
    "BinaryCrossEntropy",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "CrossEntropy",
    "Cyclic",
    "Data",
    "Dice",
    "Exponential",
    "Focal",
    "Iou",
    "Loss",
    "Metric",
    "MultiStep",
    "OneCycle",
    "Optimizer",
    "OwnLoss",
    "OwnSchedule",
    "Plateau",
    "Polynomial",
    "Preprocess",
    "RmsProp",
    "RunSettings",
    "Schedule",
    "Sgd",
    "Step",
    "TrialConfig",
    "canonical_json",
    "is_better",
    "is_metric",
    "is_reference",
    "metric_mode",
]
