"""Proof that a trial trains what was asked; a difference stops the trial.

Two things are compared with the configuration: what was read back from the objects that train
(`applied.py`), before each epoch, and what each epoch was seen to do (`observed.py`). Formulas such
as the learning rate of a stage are written a second time here, on purpose: compared with the code
that built the trial, a mistake in that code would agree with itself.
"""

import fnmatch
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tuneapp import config as c
from tuneapp.applied import Applied
from tuneapp.checkpoint import TrainState
from tuneapp.config import Amp, Optimizer, TrialConfig
from tuneapp.errors import AppliedValueError
from tuneapp.models import count_parameters
from tuneapp.staged import StagedModel

_SCHEDULE_CLASSES: Mapping[type[c.Schedule], str] = {
    c.Constant: "ConstantLR",
    c.Step: "StepLR",
    c.MultiStep: "MultiStepLR",
    c.Exponential: "ExponentialLR",
    c.Polynomial: "PolynomialLR",
    c.Cosine: "CosineAnnealingLR",
    c.CosineRestarts: "CosineAnnealingWarmRestarts",
    c.OneCycle: "OneCycleLR",
    c.Cyclic: "CyclicLR",
    c.Plateau: "ReduceLROnPlateau",
    c.OwnSchedule: "LambdaLR",
}
_OPTIMIZER_CLASSES: Mapping[type[Optimizer], str] = {
    c.Sgd: "SGD",
    c.Adam: "Adam",
    c.AdamW: "AdamW",
    c.RmsProp: "RMSprop",
}
# What a configuration says of an optimizer, and `require_applied` compares.
_SAID = ("self", "params", "lr", "weight_decay", "momentum", "nesterov", "betas", "eps", "alpha",
         "centered")  # fmt: skip
# How far a value that was read back may be from the one asked for, relative to it: class weights
# are float32 and read to six digits, shares of a schedule are quotients to nine.
_PRECISION = {"loss_options": 1e-5, "schedule_options": 1e-8}
_NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Which have no weight decay where norms and biases have none.
_EMBEDDINGS = ("class_token", "cls_token", "dist_token", "reg_token", "pos_embed", "pos_embedding",
               "position_embedding", "position_embeddings", "positional_embedding",
               "absolute_pos_embed", "relative_position_bias_table")  # fmt: skip
# The transforms of a training image, by torchvision's names.
_CROP, _FLIP = "RandomResizedCrop(scale=0.35)", "RandomHorizontalFlip"
_VIEWS: Mapping[str, tuple[str, ...]] = {
    "none": ("CenterCrop",),
    "light": ("RandomResizedCrop(scale=0.8)",),
    "standard": (_CROP, _FLIP),
    "strong": (_CROP, _FLIP, "TrivialAugmentWide", "RandomErasing"),
}
_LOSSES: Mapping[type[c.Loss], str] = {
    c.CrossEntropy: "CrossEntropyLoss",
    c.Focal: "focal",
    c.BinaryCrossEntropy: "binary_cross_entropy",
    c.Dice: "dice",
    c.BceDice: "bce_dice",
    c.Iou: "iou",
}


def require_applied(
    applied: Applied,
    config: TrialConfig,
    model: StagedModel,
    device: torch.device,
    steps_per_epoch: int,
    epoch: int = 1,
    class_counts: Sequence[int] = (),
) -> None:
    """Compare what is applied with what `config` asks for in `epoch`.

    Args:
        applied: what was read back.
        config: what was asked for.
        model: whose parameters are to be trained.
        device: where it must be.
        steps_per_epoch: optimizer steps.
        epoch: from 1.
        class_counts: training examples of each class, for balanced class weights.

    Raises:
        AppliedValueError: they differ; the message names every difference.
    """
    trained = _wanted_trained(config, model, epoch)
    by_stage = {s.name: [p for p in s.parameters() if id(p) in trained] for s in model.stages}
    numbers = sum(p.numel() for p in trained.values())
    spared = _wanted_undecayed(model.network)
    decay = config.optimizer.weight_decay
    kind = type(config.loss)
    undecayed = sum(p.numel() for key, p in trained.items() if key in spared)
    undecayed = 0 if config.decay_norms_and_biases else undecayed
    wanted = {
        "optimizer": _OPTIMIZER_CLASSES[type(config.optimizer)],
        "options": _wanted_options(config.optimizer),
        "weight_decay": decay if numbers > undecayed else 0.0,
        "undecayed_parameters": undecayed if decay > 0 else numbers,
        "schedule": _SCHEDULE_CLASSES[type(config.schedule)],
        "schedule_options": _wanted_schedule_options(config, steps_per_epoch),
        "warmup_steps": _wanted_warmup(config, steps_per_epoch),
        "trainable_parameters": numbers,
        "frozen_parameters": count_parameters(model.stages) - numbers,
        "frozen_held": 0,
        "frozen_training": (),
        "loss": config.loss.loss if isinstance(config.loss, c.OwnLoss) else _LOSSES[kind],
        "loss_options": _wanted_loss_options(config.loss, class_counts),
        "aux_weight": config.aux_weight,
        "ema_decay": config.ema_decay,
        "batch_size": config.batch_size,
        "device": device.type,
        "mixing": _wanted_mixing(config),
    }
    got = applied.as_dict()
    wrong = [
        f"{k} is {got[k]!r}, not {v!r}"
        for k, v in wanted.items()
        if not _agree(got[k], v, _PRECISION.get(k, 0.0))
    ]
    if applied.precision not in _allowed_precisions(config.amp, device):
        wrong.append(f"precision is {applied.precision}, with amp={config.amp!r}")
    if applied.frozen_batchnorm not in ("none", config.frozen_batchnorm):
        wrong.append(
            f"frozen_batchnorm is {applied.frozen_batchnorm!r}, not {config.frozen_batchnorm!r}"
        )
    if config.dropout is not None and applied.dropout != (config.dropout,):
        wrong.append(f"dropout is {applied.dropout}, not {config.dropout}")
    if config.stochastic_depth not in (None, applied.stochastic_depth):
        wrong.append(
            f"stochastic_depth is {applied.stochastic_depth}, not {config.stochastic_depth}"
        )
    # Where there is no convolution of more than a pixel, both formats are one.
    has_formats = any(p.ndim == 4 and min(p.shape[1:3]) > 1 for p in model.parameters())
    if config.channels_last and has_formats and not applied.channels_last:
        wrong.append("channels_last is False, not True")
    if config.augment in _VIEWS and applied.view != _VIEWS[config.augment]:
        wrong.append(f"view is {applied.view}, not {_VIEWS[config.augment]}")
    lrs = wanted_lrs(config, list(by_stage))
    lrs = {name: lrs[name] for name, parameters in by_stage.items() if parameters}
    if applied.lr.keys() != lrs.keys():
        wrong.append(f"the trained stages are {list(applied.lr)}, not {list(lrs)}")
    else:
        wrong += [
            f"lr of {stage} is {applied.lr[stage]!r}, not {lr!r}"
            for stage, lr in lrs.items()
            if not math.isclose(applied.lr[stage], lr, rel_tol=1e-9)
        ]
    raise_if(wrong)


def _agree(got: Any, wanted: Any, precision: float) -> bool:
    """Whether two values are the same, with a relative difference allowed between floats."""
    match got, wanted:
        case dict(), dict():
            return got.keys() == wanted.keys() and all(
                _agree(got[key], value, precision) for key, value in wanted.items()
            )
        case list(), list():
            return len(got) == len(wanted) and all(
                _agree(one, other, precision) for one, other in zip(got, wanted, strict=True)
            )
        case float(), float():
            return math.isclose(got, wanted, rel_tol=precision)
    return bool(got == wanted)


def wanted_lrs(config: TrialConfig, names: Sequence[str]) -> dict[str, float]:
    """Return the peak learning rate that `config` gives each stage, by name, were it trained."""
    lr, ratio = config.optimizer.lr, config.lr_ratio
    if isinstance(ratio, Mapping):
        return {name: lr * ratio[name] for name in names if name in ratio}
    distances = range(len(names) - 1, -1, -1)
    lrs = {name: lr * ratio**distance for name, distance in zip(names, distances, strict=True)}
    return {**lrs, names[-1]: lr * config.head_lr_factor}


def _wanted_depth(config: TrialConfig, num_stages: int, epoch: int) -> int:
    """Return how many stages are frozen in `epoch`, from 1."""
    depth = config.freeze_depth
    for at in sorted(config.unfreeze_at):
        if epoch >= at:
            depth = config.unfreeze_at[at]
    return depth if depth >= 0 else num_stages + depth


def _wanted_undecayed(network: nn.Module) -> set[int]:
    """Return the parameters without weight decay, by id: norms, biases, scales, embeddings."""
    own_list: Any = getattr(network, "no_weight_decay", None)
    listed = own_list() if callable(own_list) else ()
    spared = set()
    for path, module in network.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own_name}" if path else own_name
            last_two = name.split(".")[-2:]
            is_vector = sum(size != 1 for size in parameter.shape) < 2
            if (
                parameter.ndim < 2
                or own_name == "bias"
                or isinstance(module, _NORM_LAYERS)
                or (is_vector and ("scale" in own_name or "gamma" in own_name))
                or own_name in _EMBEDDINGS
                or (own_name == "weight" and last_two[0] in _EMBEDDINGS)
                or any(fnmatch.fnmatchcase(name, pattern) for pattern in listed)
            ):
                spared.add(id(parameter))
    return spared


def _wanted_warmup(config: TrialConfig, steps_per_epoch: int) -> int:
    """Return the steps of the warm-up: its share of all, rounded up, and never all of them."""
    steps = config.epochs * steps_per_epoch
    share = getattr(config.schedule, "warmup_fraction", 0.0)
    whole = round(share * steps)
    is_whole = math.isclose(whole, share * steps, rel_tol=0.0, abs_tol=1e-9)
    rounded_up = whole if is_whole else math.ceil(share * steps)
    return min(rounded_up, steps - 1)


def _wanted_mixing(config: TrialConfig) -> dict[str, float]:
    alphas = {"MixUp": config.mixup_alpha, "CutMix": config.cutmix_alpha}
    return {name: alpha for name, alpha in alphas.items() if alpha > 0}


def _wanted_trained(config: TrialConfig, model: StagedModel, epoch: int) -> dict[int, Tensor]:
    """Return the parameters that `config` wants trained, whatever the model says of itself."""
    # What the network's own code fixed when it was built is never trained.
    free = {n: p for n, p in model.network.named_parameters() if n not in model.fixed_names}
    if config.freeze:
        return {
            id(p): p
            for name, p in free.items()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in config.freeze)
        }
    depth = _wanted_depth(config, len(model.stages), epoch)
    above = {id(p) for stage in model.stages[depth:] for p in stage.parameters()}
    return {id(p): p for p in free.values() if id(p) in above}


def require_defaults(optimizer: torch.optim.Optimizer) -> None:
    """Check that whatever a configuration cannot say of an optimizer is torch's own default.

    `maximize`, `amsgrad`, `dampening` and the like; Adam and AdamW alone are fused.

    Raises:
        AppliedValueError: one is not.
    """
    kind = type(optimizer)
    wanted = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in _SAID
    }
    if issubclass(kind, torch.optim.Adam):
        wanted |= {"fused": True, "decoupled_weight_decay": kind is torch.optim.AdamW}
    raise_if(
        [
            f"{name} of {group.get('name')} is {group[name]!r}, not {value!r}"
            for group in optimizer.param_groups
            for name, value in wanted.items()
            if name in group and group[name] != value
        ]
    )


def require_trained(state: TrainState, config: TrialConfig, epoch: int) -> None:
    """Check, parameter by parameter, that the optimizer holds what is to be trained.

    Raises:
        AppliedValueError: it does not; the message names the first ones.
    """
    names = {id(p): name for name, p in state.model.network.named_parameters()}
    wanted = _wanted_trained(config, state.model, epoch).keys()
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    missing = [names[key] for key in wanted - held]
    extra = [names.get(key, "a stranger") for key in held - wanted]
    raise_if(
        [f"{name} is not trained" for name in sorted(missing)[:3]]
        + [f"{name} is trained" for name in sorted(extra)[:3]]
    )


def _wanted_schedule_options(config: TrialConfig, steps_per_epoch: int) -> dict[str, Any]:
    options = _wanted_main_options(config, steps_per_epoch)
    if _wanted_warmup(config, steps_per_epoch) > 0:
        options["warmup_start"] = 0.01  # of the peak, as `config/schedules.py` says
    return options


def _wanted_main_options(  # noqa: C901 - one flat case for each schedule
    config: TrialConfig, steps_per_epoch: int
) -> dict[str, Any]:
    chosen, n = config.schedule, steps_per_epoch
    warmup = _wanted_warmup(config, n)
    rest = config.epochs * n - warmup
    match chosen:
        case c.Step():
            return {"step_size": chosen.every_epochs * n, "gamma": chosen.gamma}
        case c.MultiStep():
            return {"milestones": [m * n for m in chosen.milestones], "gamma": chosen.gamma}
        case c.Exponential():
            return {"gamma": chosen.gamma ** (1 / n)}
        case c.Polynomial():
            return {"total_iters": rest, "power": chosen.power}
        case c.Cosine():
            return {"T_max": rest, "eta_min": 0.0}
        case c.CosineRestarts():
            return {"T_0": chosen.first_epochs * n, "T_mult": chosen.multiplier, "eta_min": 0.0}
        case c.OneCycle():
            return {
                "total_steps": rest,
                "peak_step": float(max(chosen.pct_start * rest, 2) - 1),
                "div_factor": chosen.div_factor,
                "final_div_factor": chosen.final_div_factor,
            }
        case c.Cyclic():
            return {
                "total_size": 2 * chosen.up_epochs * n,
                "mode": chosen.mode,
                "gamma": 1.0,
                "base_factor": chosen.base_factor,
            }
        case c.Plateau():
            names = ("factor", "patience", "threshold", "cooldown")
            options = {name: getattr(chosen, name) for name in names}
            mode = "min" if chosen.monitor == "val/loss" else "max"
            return {**options, "mode": mode, "monitor": chosen.monitor}
        case c.Constant():
            return {"factor": 1.0, "total_iters": 0}
        case c.OwnSchedule():
            return {}


def _wanted_options(optimizer: Optimizer) -> dict[str, Any]:
    match optimizer:
        case c.Sgd():
            return {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
        case c.Adam():
            return {"betas": (optimizer.beta1, optimizer.beta2), "eps": 1e-8}
        case c.RmsProp():
            return {
                "momentum": optimizer.momentum,
                "alpha": optimizer.alpha,
                "eps": optimizer.eps,
                "centered": optimizer.centered,
            }


def _wanted_loss_options(loss: c.Loss, class_counts: Sequence[int]) -> dict[str, Any]:
    match loss:
        case c.CrossEntropy():
            weights = loss.class_weights
            if weights == "balanced":
                mean = sum(class_counts) / max(len(class_counts), 1)
                weights = [mean / count if count else 1.0 for count in class_counts]
            listed = None if weights is None else [float(weight) for weight in weights]
            return {"label_smoothing": loss.label_smoothing, "class_weights": listed}
        case c.OwnLoss():
            return {}  # they went into an object that is not ours to look into
        case _:
            return asdict(loss)


def _allowed_precisions(amp: Amp, device: torch.device) -> tuple[str, ...]:
    if amp == "auto":
        return ("float32",) if device.type == "cpu" else ("bfloat16", "float16")
    return ({"bf16": "bfloat16", "fp16": "float16", "off": "float32"}[amp],)


def raise_if(wrong: list[str]) -> None:
    """Raise an `AppliedValueError` that names every difference, if there is one."""
    if wrong:
        raise AppliedValueError("the trial does not train what was asked: " + "; ".join(wrong))
