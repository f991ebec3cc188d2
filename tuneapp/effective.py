"""The part of a configuration that has an effect: if two agree in it, they are the same trial."""

import hashlib
from typing import Any

from tuneapp.config import OwnSchedule, TrialConfig, canonical_json, is_reference
from tuneapp.errors import ConfigError
from tuneapp.fit import skeleton
from tuneapp.models import freeze_depth_in, stage_lrs, trained_parameters
from tuneapp.own import offered_code
from tuneapp.staged import StagedModel


def effective(config: TrialConfig) -> dict[str, Any]:
    """Return the part of a configuration that decides the training, written in one way.

    Learning rate, ratio and head factor become the learning rate of each stage that is ever
    trained (and stay beside it for a schedule of one's own, which may read them). Freeze depths are
    counted from the stem; patterns become the names that they freeze, or a depth if they freeze
    exactly the first stages. Fields without effect are left out: of frozen BatchNorm if no
    parameter is frozen or fixed, of a weight decay of 0, of drawing in a plain shuffle. `seed`
    stays: a repeat with another one is intended.

    Args:
        config: one that fits its network.

    Raises:
        ConfigError: a stage that is trained has no learning rate.
    """
    plain = config.as_dict()
    model = skeleton(config.model, aux=config.aux_weight > 0)
    names = [stage.name for stage in model.stages]

    # Depths only fall, so the last epoch trains most.
    ever = {id(p) for p in trained_parameters(model, config, config.epochs).values()}
    trained = {s.name for s in model.stages if any(id(p) in ever for p in s.parameters())}
    rates = stage_lrs(config, names)
    if not isinstance(config.schedule, OwnSchedule):  # whose factor is given the configuration
        for name in ("lr_ratio", "head_lr_factor"):
            del plain[name]
        del plain["optimizer"]["lr"]
    missing = [name for name in names if name in trained and name not in rates]
    if missing:
        raise ConfigError(f"lr_ratio: no factor for stage {missing[0]!r}, which is trained")
    plain["lrs"] = {name: rates[name] for name in names if name in trained}

    plain["freeze_depth"], plain["freeze"] = _frozen(model, config)
    plain["unfreeze_at"] = {
        str(epoch): freeze_depth_in(config, len(names), epoch) for epoch in config.unfreeze_at
    }
    if not plain["freeze"] and plain["freeze_depth"] == 0 and not model.fixed_names:
        del plain["frozen_batchnorm"]
    if not getattr(config.optimizer, "weight_decay", 0.0):
        del plain["decay_norms_and_biases"]
    if config.sampling == "shuffle":
        del plain["replacement"], plain["num_samples"]
    return plain


def _frozen(model: StagedModel, config: TrialConfig) -> tuple[int, list[str]]:
    """Return the freeze depth of the first epoch, or 0 and the names that patterns freeze.

    Patterns are a depth if they freeze the stages below it and nothing else. It is counted as
    `StagedModel.freeze_matching` does, so that the modes of all layers are those of this depth.
    """
    if not config.freeze:
        return freeze_depth_in(config, len(model.stages)), []
    named = dict(model.network.named_parameters())
    trained = trained_parameters(model, config)
    ids = {id(p) for p in trained.values()}
    fixed = {id(named[name]) for name in model.fixed_names}
    has_trained = [any(id(p) in ids for p in stage.parameters()) for stage in model.stages]
    depth = has_trained.index(True) if True in has_trained else len(has_trained)
    if all(id(p) in ids | fixed for stage in model.stages[depth:] for p in stage.parameters()):
        return depth, []
    return 0, sorted(name for name in named if name not in trained)


def config_hash(config: TrialConfig) -> str:
    """Return 16 hexadecimal digits that are the same for the same effective configuration.

    Code of a space's own file counts with its text: it may change when a run is refined.
    """
    plain = effective(config)
    code = _own_code(plain)
    if code:  # without any, the hash is the one that older versions wrote
        plain["code"] = code
    text = canonical_json(_alike(plain))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _own_code(plain: Any) -> dict[str, str]:
    """Return the code that a space's own file has for each import path in a configuration."""
    if isinstance(plain, dict):
        plain = list(plain.values())
    if isinstance(plain, list):
        return {reference: code for value in plain for reference, code in _own_code(value).items()}
    code = offered_code(plain) if is_reference(plain) else None
    return {} if code is None else {plain: code}


def _alike(plain: Any) -> Any:
    """Return it with every number as a float: 1 is 1.0."""
    if isinstance(plain, dict):
        return {name: _alike(value) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_alike(value) for value in plain]
    return float(plain) if isinstance(plain, int) and not isinstance(plain, bool) else plain
