"""Which convolutional network suits your images: EfficientNet, ConvNeXt, RegNet or MobileNet?

    python -m tuneapp sweep search_spaces/convnet.py
    python -m tuneapp sweep search_spaces/convnet.py --data photos/ --trials 64

The first trials fine-tune each whole network in the usual way: AdamW that decays neither
norms nor biases, later stages faster, a warm-up and a cosine, label smoothing. The search then
tries how deep to freeze each of them, and how strongly to regularise.

Measured on the digits with random weights, the recipes for one epoch: ConvNeXt 0.886, the others
still at chance, 0.100: with BatchNorm and no pretraining they need more than 41 steps.
"""

from optuna import Trial

from tuneapp.config import AdamW, Cosine, CrossEntropy, TrialConfig

# How many stages each has below its head.
DEEPEST = {"efficientnet_b0": 9, "convnext_tiny": 5, "regnet_y_400mf": 5, "mobilenet_v3_large": 8}

# A ConvNeXt is fine-tuned like a transformer, at a smaller learning rate.
USUAL_LR = {
    "efficientnet_b0": 5e-4,
    "convnext_tiny": 1e-4,
    "regnet_y_400mf": 5e-4,
    "mobilenet_v3_large": 5e-4,
}

FIRST_TRIALS = [
    {"model": model, f"{model}.freeze_depth": 0, "lr_ratio": 0.8, "lr": USUAL_LR[model],
     "weight_decay": 5e-2, "label_smoothing": 0.1, "mixup_alpha": 0.0}
    for model in DEEPEST
]  # fmt: skip


def search_space(trial: Trial) -> TrialConfig:
    model = trial.suggest_categorical("model", list(DEEPEST))
    return TrialConfig(
        model=model,
        weights="auto",
        freeze_depth=trial.suggest_int(f"{model}.freeze_depth", 0, DEEPEST[model]),
        lr_ratio=trial.suggest_float("lr_ratio", 0.3, 1.0, log=True),
        optimizer=AdamW(
            lr=trial.suggest_float("lr", 1e-5, 1e-2, log=True),
            weight_decay=trial.suggest_float("weight_decay", 1e-3, 1e-1, log=True),
        ),
        decay_norms_and_biases=False,
        schedule=Cosine(warmup_fraction=0.1),
        loss=CrossEntropy(label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2)),
        mixup_alpha=trial.suggest_categorical("mixup_alpha", [0.0, 0.2]),
        epochs=5,
        batch_size=32,
    )
