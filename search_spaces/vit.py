"""Fine-tune a vision transformer, Swin or ViT: how deep, how fast each block, how regularised?

    python -m tuneapp sweep search_spaces/vit.py
    python -m tuneapp sweep search_spaces/vit.py --data photos/ --trials 48

The first trials are the usual recipe for transformers: AdamW at a small learning rate that shrinks
with each block away from the head, no decay of norms and biases, gradients clipped to norm 1, a
warm-up and a cosine; and the head alone.

Measured on the digits with random weights, the four recipes: Swin 0.961 whole and 0.956 by its head
alone, ViT 0.961 and 0.948.
"""

from optuna import Trial

from tuneapp.config import AdamW, Cosine, CrossEntropy, TrialConfig

# How many stages each has below its head: an embedding, then four stages or twelve blocks.
DEEPEST = {"swin_t": 5, "vit_b_16": 13}
# The same fall from the head to the first block, over four and over twelve of them.
USUAL_RATIO = {"swin_t": 0.5, "vit_b_16": 0.8}

FIRST_TRIALS = [
    {"model": model, f"{model}.freeze_depth": depth, f"{model}.lr_ratio": USUAL_RATIO[model],
     "lr": lr, "weight_decay": 5e-2, "label_smoothing": 0.1}
    for model in DEEPEST
    for depth, lr in ((0, 1e-4), (DEEPEST[model], 5e-3))
]  # fmt: skip


def search_space(trial: Trial) -> TrialConfig:
    model = trial.suggest_categorical("model", list(DEEPEST))
    return TrialConfig(
        model=model,
        weights="auto",
        freeze_depth=trial.suggest_int(f"{model}.freeze_depth", 0, DEEPEST[model]),
        lr_ratio=trial.suggest_float(f"{model}.lr_ratio", 0.4, 1.0, log=True),
        optimizer=AdamW(
            lr=trial.suggest_float("lr", 1e-5, 1e-2, log=True),
            weight_decay=trial.suggest_float("weight_decay", 1e-3, 3e-1, log=True),
        ),
        decay_norms_and_biases=False,
        schedule=Cosine(warmup_fraction=0.1),
        loss=CrossEntropy(label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2)),
        clip_norm=1.0,
        epochs=5,
        batch_size=32,
    )
