"""What of a configuration can matter: two that differ in nothing else are the same trial."""

import hashlib
from typing import Any

from tuneapp.config import TrialConfig, canonical_json
from tuneapp.errors import ConfigError
from tuneapp.fit import skeleton
from tuneapp.models import freeze_as, freeze_depth_in, stage_lrs


def effective(config: TrialConfig) -> dict[str, Any]:
    """Return what of a configuration decides the training, in one spelling.

    Learning rate, ratio and head factor become the learning rate of each stage that is ever
    trained; depths are counted from the stem; what only frozen layers, a weight decay of 0 or a
    plain shuffle leave without effect is left out. What was not chosen is in no configuration.
    `seed` stays: a repeat with another one is asked for on purpose.

    Args:
        config: of a network that exists, and that it fits.

    Raises:
        ConfigError: a stage that is trained has no learning rate.
    """
    plain = config.as_dict()
    model = skeleton(config.model, aux=config.aux_weight > 0)
    names = [stage.name for stage in model.stages]

    freeze_as(model, config, config.epochs)  # depths only fall, so the last epoch trains most
    trained = {stage.name for stage in model.stages if stage.trained_parameters()}
    model.freeze(0)  # it is shared, and was so before
    rates = stage_lrs(config, names)
    for name in ("lr_ratio", "head_lr_factor"):
        del plain[name]
    del plain["optimizer"]["lr"]
    missing = [name for name in names if name in trained and name not in rates]
    if missing:
        raise ConfigError(f"lr_ratio: no factor for stage {missing[0]!r}, which is trained")
    plain["lrs"] = {name: rates[name] for name in names if name in trained}

    plain["freeze_depth"] = freeze_depth_in(config, len(names)) if not config.freeze else 0
    plain["unfreeze_at"] = {
        str(epoch): freeze_depth_in(config, len(names), epoch) for epoch in config.unfreeze_at
    }
    if not config.freeze and plain["freeze_depth"] == 0:
        del plain["frozen_batchnorm"]
    if not getattr(config.optimizer, "weight_decay", 0.0):
        del plain["decay_norms_and_biases"]
    if config.sampling == "shuffle":
        del plain["replacement"], plain["num_samples"]
    return plain


def config_hash(config: TrialConfig) -> str:
    """Return 16 hexadecimal digits that are the same for the same effective configuration."""
    text = canonical_json(_alike(effective(config)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _alike(plain: Any) -> Any:
    """Return it with one spelling for each number: 1 is 1.0."""
    if isinstance(plain, dict):
        return {name: _alike(value) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_alike(value) for value in plain]
    return float(plain) if isinstance(plain, int) and not isinstance(plain, bool) else plain
