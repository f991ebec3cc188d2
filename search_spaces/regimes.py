"""Which of the four classic cases of transfer is yours: few or many images, ImageNet-like or not?

    python -m tuneapp sweep search_spaces/regimes.py
    python -m tuneapp sweep search_spaces/regimes.py --data photos/ --trials 48

Each case tries the freeze depths and learning-rate ratios that are taught for it:

    few images, similar       the head, at most the last stage below it
    few images, different     the early stages stay, what lies above them adapts, slowly
    many images, similar      the whole network, early stages much slower
    many images, different    the whole network, all of it fast

The first trials are the usual recipe of each case; all else is the same in all of them.

Measured on the digits with random weights, which are nothing like them, 8 trials: many_different
0.996, few_different 0.987, many_similar 0.961, few_similar 0.886, each by its recipe.
"""

from dataclasses import dataclass

from optuna import Trial

from tuneapp.config import AdamW, Cosine, TrialConfig


@dataclass(frozen=True)
class Case:
    """What is tried, and what is usual, in one case (a ResNet has five stages below its head)."""

    depths: tuple[int, int]
    ratios: tuple[float, float]
    lrs: tuple[float, float]
    usual: tuple[int, float, float]  # depth, ratio, lr


CASES = {
    "few_similar": Case((4, 5), (0.1, 1.0), (1e-3, 1e-1), (5, 1.0, 1e-2)),
    "few_different": Case((1, 3), (0.3, 1.0), (1e-4, 1e-2), (2, 0.6, 1e-3)),
    "many_similar": Case((0, 2), (0.1, 0.7), (1e-4, 1e-2), (0, 0.4, 1e-3)),
    "many_different": Case((0, 0), (0.7, 1.0), (3e-4, 3e-2), (0, 1.0, 3e-3)),
}

FIRST_TRIALS = [
    {"case": name, f"{name}.freeze_depth": case.usual[0], f"{name}.lr_ratio": case.usual[1],
     f"{name}.lr": case.usual[2]}
    for name, case in CASES.items()
]  # fmt: skip


def search_space(trial: Trial) -> TrialConfig:
    name = trial.suggest_categorical("case", list(CASES))
    case = CASES[name]
    return TrialConfig(
        model="resnet18",
        weights="auto",
        freeze_depth=trial.suggest_int(f"{name}.freeze_depth", *case.depths),
        lr_ratio=trial.suggest_float(f"{name}.lr_ratio", *case.ratios, log=True),
        optimizer=AdamW(lr=trial.suggest_float(f"{name}.lr", *case.lrs, log=True)),
        schedule=Cosine(warmup_fraction=0.1),
        epochs=5,
        batch_size=32,
    )
