"""How good are the features of a pretrained network? Only the head is trained.

    python -m tuneapp sweep search_spaces/linear_probe.py
    python -m tuneapp sweep search_spaces/linear_probe.py --data photos/ --trials 32

The first trials are the usual linear probe of each network: SGD with momentum at a large learning
rate, no weight decay, a cosine. They cost little, hint at which network to fine-tune, and are the
baseline.

Measured on the digits with random weights, 8 trials: ConvNeXt 0.956 and ResNet-18 0.913 by their
recipes, which the search did not beat; random EfficientNets and MobileNets stay at chance, 0.100.
"""

from optuna import Trial

from tuneapp.config import AdamW, Cosine, Optimizer, Sgd, TrialConfig

MODELS = ["resnet18", "efficientnet_b0", "convnext_tiny", "mobilenet_v2"]

FIRST_TRIALS = [
    {"model": model, "optimizer": "sgd", "sgd.lr": 0.1, "sgd.weight_decay": 0.0} for model in MODELS
]


def search_space(trial: Trial) -> TrialConfig:
    return TrialConfig(
        model=trial.suggest_categorical("model", MODELS),
        weights="auto",
        freeze_depth=-1,  # all but the head, whatever the network
        optimizer=optimizer(trial),
        schedule=Cosine(),
        epochs=5,
        batch_size=32,
    )


def optimizer(trial: Trial) -> Optimizer:
    if trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
        return Sgd(
            lr=trial.suggest_float("sgd.lr", 1e-3, 1.0, log=True),
            weight_decay=trial.suggest_float("sgd.weight_decay", 0.0, 1e-2),
        )
    return AdamW(
        lr=trial.suggest_float("adamw.lr", 1e-4, 1e-1, log=True),
        weight_decay=trial.suggest_float("adamw.weight_decay", 1e-4, 1e-1, log=True),
    )
