"""Optimizers from their configuration: torch's own classes.

One parameter group per trained stage, at the learning rate of `stage_lrs`; two if biases and norms
are not decayed. Adam and AdamW are torch's fused ones (`benchmarks/optimizer_step.py` shows why).
SGD and RMSprop are not: if float16 overflows in the first step, the fused SGD leaves its momentum
uninitialised, and torch has no fused RMSprop.
"""

import re
from collections.abc import Sequence
from typing import Any, assert_never

from torch import nn, optim
from torch.nn.modules.batchnorm import _NormBase

from tuneapp.config import Adam, AdamW, RmsProp, Sgd, TrialConfig
from tuneapp.models import stage_lrs
from tuneapp.staged import StagedModel, matches

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""BatchNorm and InstanceNorm of all dimensions are `_NormBase`."""
_SCALE = re.compile(r"scale|gamma")
_EMBEDDING = re.compile(
    r"(^|\.)(class_token|cls_token|dist_token|reg_token|pos_embed|pos_embedding|"
    r"position_embeddings?|positional_embedding|absolute_pos_embed|relative_position_bias_table)"
    r"(\.weight)?$"
)
"""Names of class tokens, position embeddings and tables of relative position bias."""


def build_optimizer(model: StagedModel, config: TrialConfig) -> optim.Optimizer:
    """Return the optimizer of the parameters of `model` that are not frozen."""
    groups = _groups(model, config)
    chosen = config.optimizer
    match chosen:
        case Sgd():
            return optim.SGD(
                groups,
                lr=chosen.lr,
                momentum=chosen.momentum,
                nesterov=chosen.nesterov,
                weight_decay=chosen.weight_decay,
            )
        case AdamW() | Adam():  # AdamW is an Adam: its own class must be asked for first
            kind = optim.AdamW if isinstance(chosen, AdamW) else optim.Adam
            return kind(
                groups,
                lr=chosen.lr,
                betas=(chosen.beta1, chosen.beta2),
                weight_decay=chosen.weight_decay,
                fused=True,
            )
        case RmsProp():
            return optim.RMSprop(
                groups,
                lr=chosen.lr,
                alpha=chosen.alpha,
                eps=chosen.eps,
                momentum=chosen.momentum,
                centered=chosen.centered,
                weight_decay=chosen.weight_decay,
            )
        case _:
            assert_never(chosen)


def rebuild_optimizer(
    old: optim.Optimizer, model: StagedModel, config: TrialConfig
) -> optim.Optimizer:
    """Return the optimizer of the parameters that are trained now, with their state from `old`."""
    new = build_optimizer(model, config)
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]
    return new


def undecayed_names(network: nn.Module) -> set[str]:
    """Return the parameters that weight decay leaves out without `decay_norms_and_biases`, by name.

    These are all parameters of normalisation layers, biases, scales (such as `layer_scale` and
    `logit_scale`), whatever has one dimension, class tokens, position embeddings and tables of
    relative position bias; and the names or patterns that the network's own `no_weight_decay()`
    returns, if it has this method, as networks of timm and the authors' Swin have.
    """
    method = getattr(network, "no_weight_decay", None)
    patterns = list(method()) if callable(method) else []
    owned_by_norms = {
        name
        for path, module in network.named_modules()
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(path)
    }
    return {
        name
        for name, p in network.named_parameters()
        if name in owned_by_norms or _is_undecayed(name, p) or matches(name, patterns)
    }


def _is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is left out by its name and shape alone."""
    leaf = name.rpartition(".")[2]
    is_vector = sum(size > 1 for size in parameter.shape) <= 1
    return (
        parameter.ndim <= 1
        or leaf == "bias"
        or (is_vector and _SCALE.search(leaf) is not None)
        or _EMBEDDING.search(name) is not None
    )


def _groups(model: StagedModel, config: TrialConfig) -> list[dict[str, Any]]:
    lrs = stage_lrs(config, [stage.name for stage in model.stages])
    names = set() if config.decay_norms_and_biases else undecayed_names(model.network)
    left_out = {id(p) for name, p in model.network.named_parameters() if name in names}
    groups = []
    for stage in model.stages:
        trained = stage.trained_parameters()
        decayed = [p for p in trained if id(p) not in left_out]
        others = [p for p in trained if id(p) in left_out]
        parts: Sequence[tuple[str, list[nn.Parameter], dict[str, float]]] = (
            (stage.name, decayed, {}),
            (f"{stage.name} (norms, biases)", others, {"weight_decay": 0.0}),
        )
        for name, parameters, own in parts:
            if parameters:
                group = {"name": name, "stage": stage.name, "params": parameters}
                groups.append({**group, "lr": lrs[stage.name], **own})
    return groups
