"""Classifiers as stages: named, ordered pieces of a network, from the stem to the head.

`families.py` says what the stages of torchvision's networks are; a network of one's own says it by
its method `stages()`, or else has its top-level children as stages. Freezing, learning rates and
feature extraction all speak in stages.
"""

import fnmatch
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth

from tuneapp.config import TrialConfig, is_reference
from tuneapp.errors import ConfigError, did_you_mean
from tuneapp.families import FAMILIES, Beside, Family
from tuneapp.own import find_own


@dataclass(frozen=True)
class Stage:
    """A named piece of a network.

    Attributes:
        name: the family's own word for it, such as `layer3`.
        module: modules of the network, called one after the other.
    """

    name: str
    module: nn.Sequential

    def parameters(self) -> list[nn.Parameter]:
        """Return its parameters."""
        return list(self.module.parameters())

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return those of its parameters that are not frozen."""
        return [p for p in self.module.parameters() if p.requires_grad]


class WithAux(NamedTuple):
    """What a network with auxiliary classifiers returns while it trains: logits, all (B, classes).

    Attributes:
        logits: of the head.
        aux: of each auxiliary classifier.
    """

    logits: Tensor
    aux: tuple[Tensor, ...]


class StagedModel(nn.Module):
    """A classifier that is called, frozen and trained stage by stage.

    The network itself is `network`, with its own parameter names; the stages are views of its
    modules. Frozen stages stay in `eval()` mode whatever `train()` is told, so that their BatchNorm
    statistics stay put.
    """

    def __init__(self, network: nn.Module, family: Family | None = None) -> None:
        """Cut `network` into stages.

        Args:
            network: a torchvision classifier, or one of the user's own.
            family: of torchvision's; None for one of the user's own.

        Raises:
            ConfigError: the stages that the network says are not its parts, each once.
        """
        super().__init__()
        self.network = network
        # A tuple, which nn.Module does not register: the parameters are counted once, in `network`.
        self.stages = tuple(
            Stage(name, nn.Sequential(*modules))
            for name, modules in (family.stages if family else _own_stages)(network).items()
        )
        # Whether calling the stages one after the other is the network; not known of one's own.
        self._is_chain = family is not None
        aux = family.aux if family else {}
        self._aux_after = {
            id_of: head
            for name, after in aux.items()
            if (head := getattr(network, name)) is not None
            for id_of in [network.get_submodule(after)]
        }
        self.freeze_depth = 0
        self.frozen_batchnorm = "eval"

    def forward(
        self, x: Tensor, first_stage: int = 0, stages: Sequence[str] | None = None
    ) -> Tensor | WithAux | list[Tensor]:
        """Return the logits, float (B, classes), or the outputs of some stages.

        Args:
            x: images, float32 (B, 3, H, W) normalised; or, with `first_stage` k, what the first k
                stages made of them.
            first_stage: index of the stage to begin with; 0 for a network of one's own.
            stages: names of stages; their outputs are returned as a list in this order, and later
                stages are not computed (but a network of one's own is called whole). None returns
                the logits; while training a network with auxiliary classifiers, with theirs.

        Raises:
            ConfigError: there is no such stage.
        """
        if stages is not None:
            return self._features(x, first_stage, stages)
        if not self._is_chain:
            assert first_stage == 0, "a network of one's own is called from its beginning"
            logits: Tensor = self.network(x)
            return logits
        aux = []
        for stage in self.stages[first_stage:]:
            for module in stage.module:
                x = module(x)
                if self.training and module in self._aux_after:
                    aux.append(self._aux_after[module](x))
        return WithAux(x, tuple(aux)) if aux else x

    def _features(self, x: Tensor, first_stage: int, wanted: Sequence[str]) -> list[Tensor]:
        names = [stage.name for stage in self.stages]
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ConfigError(
                f"stage {unknown[0]!r} is unknown{did_you_mean(unknown[0], names)}; there are "
                f"{', '.join(names)}"
            )
        outputs: dict[str, Tensor] = {}
        if self._is_chain:
            last = max((names.index(name) for name in wanted), default=-1)
            for stage in self.stages[first_stage : last + 1]:
                x = outputs[stage.name] = stage.module(x)
        else:
            self._watch(x, outputs)
        missing = [name for name in wanted if name not in outputs]
        if missing:
            why = "lies before the first stage" if self._is_chain else "is not called"
            raise ConfigError(f"stage {missing[0]!r} {why}: it puts out nothing")
        return [outputs[name] for name in wanted]

    def _watch(self, x: Tensor, outputs: dict[str, Tensor]) -> None:
        """Call the whole network, and note what each stage puts out.

        A stage lasts from a call of one of its modules that have parameters to such a call of
        another stage, so that one without, which is shared and called again later, does no harm.
        """
        current = self.stages[0].name

        def enter(name: str, *call: object) -> None:
            nonlocal current
            current = name

        def note(name: str, module: nn.Module, args: object, output: Tensor) -> None:
            if current == name:
                outputs[name] = output

        hooks = []
        for stage in self.stages:
            for module in stage.module.modules():
                if next(module.parameters(recurse=False), None) is not None:
                    hooks.append(module.register_forward_pre_hook(partial(enter, stage.name)))
                hooks.append(module.register_forward_hook(partial(note, stage.name)))
        try:
            self.network(x)
        finally:
            for hook in hooks:
                hook.remove()

    def freeze(self, depth: int) -> None:
        """Freeze the first `depth` stages and train the rest."""
        self.freeze_depth = depth
        for index, stage in enumerate(self.stages):
            stage.module.requires_grad_(index >= depth)
        self.train(self.training)

    def freeze_matching(self, patterns: Sequence[str]) -> None:
        """Freeze the parameters whose names match one of `patterns`, and train the rest."""
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(not _matches(name, patterns))
        trained = [bool(stage.trained_parameters()) for stage in self.stages]
        self.freeze_depth = trained.index(True) if True in trained else len(trained)
        self.train(self.training)

    def is_frozen(self, stage: Stage) -> bool:
        """Whether nothing of a stage is trained."""
        below = self.stages.index(stage) < self.freeze_depth
        return below or bool(stage.parameters() and not stage.trained_parameters())

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; what is frozen stays in `eval()`.

        Frozen are whole stages and, elsewhere, BatchNorm layers whose own parameters are. With
        `frozen_batchnorm` "train", the BatchNorm layers among them take `mode` all the same.
        """
        super().train(mode)
        for stage in self.stages:
            frozen = self.is_frozen(stage)
            if frozen:
                stage.module.eval()
            for norm in stage.module.modules():
                if not isinstance(norm, _BatchNorm):
                    continue
                own = [p.requires_grad for p in norm.parameters()]
                if frozen or (own and not any(own)):
                    norm.train(mode and self.frozen_batchnorm == "train")
        return self


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _own_stages(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the stages of a network of the user's own, in the order of its data.

    `network.stages()` returns a mapping name -> module, or modules in the order in which they are
    called. Without it, each top-level child is a stage; one without parameters goes with the one
    before it. Parameters of the network itself, such as a class token, go with the first stage.
    """
    own: Any = getattr(network, "stages", None)
    if inspect.ismethod(own):  # some networks have a module of this name
        said = {
            str(name): [modules] if isinstance(modules, nn.Module) else list(modules)
            for name, modules in own().items()
        }
    else:
        said = _children(network)
    placed = {id(p) for modules in said.values() for m in modules for p in m.parameters()}
    loose = [p for p in network.parameters(recurse=False) if id(p) not in placed]
    if loose and said:
        first_name = next(iter(said))
        said = {**said, first_name: [Beside(nn.ParameterList(loose)), *said[first_name]]}
    held = [id(p) for modules in said.values() for p in nn.Sequential(*modules).parameters()]
    names = {id(p): name for name, p in network.named_parameters()}
    left_out = [name for key, name in names.items() if key not in held]
    if left_out or len(held) != len(set(held)) or not said:
        which = f"{left_out[0]} is in none" if left_out else "one is in two"
        raise ConfigError(
            f"{type(network).__name__}: its stages must hold each of its parameters once, but "
            f"{which}; give it a method stages() that returns a dict name -> module"
        )
    return said


def _children(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Return each top-level child that has parameters, with those after it that have none."""
    stages: dict[str, list[nn.Module]] = {}
    before: list[nn.Module] = []
    for name, child in network.named_children():
        if next(child.parameters(), None) is not None:
            stages[name] = [*before, child]
            before = []
        elif stages:
            stages[list(stages)[-1]].append(child)
        else:
            before.append(child)
    return stages


# --- Building -------------------------------------------------------------------------------------


def find_family(model: str) -> Family | None:
    """Return the family of a torchvision classifier; None for a network of the user's own.

    Raises:
        ConfigError: the name is unknown.
    """
    if is_reference(model):
        return None
    if model in FAMILIES:
        return FAMILIES[model]
    raise ConfigError(
        f"model {model!r} is unknown{did_you_mean(model, FAMILIES)}; known: {', '.join(FAMILIES)}, "
        "or the import path of a function, such as 'package.module:build'"
    )


def build_network(
    model: str, num_classes: int, *, image_size: int | None = None, aux: bool = False
) -> nn.Module:
    """Return the network with random weights and a head for `num_classes`.

    The draws come from torch's global generator: seed it before.

    Args:
        model: as in `TrialConfig.model`.
        num_classes: size of the head.
        image_size: pixels, for networks that are made for one size; None is their usual one.
        aux: with the auxiliary classifiers, where it has some.

    Raises:
        ConfigError: the name is unknown, there is no such function, or it returns no network.
    """
    family = find_family(model)
    if family is None:
        network = find_own(model, "model")(num_classes)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"model {model!r} returned {type(network).__name__}, no nn.Module")
        return network
    options = {**family.options, "num_classes": num_classes}
    if family.aux:
        options["aux_logits"] = aux
    if family.size_argument and image_size is not None:
        # MaxViT wants height and width, ViT one number.
        both = (image_size, image_size)
        options[family.size_argument] = both if family.size_argument == "input_size" else image_size
    built: nn.Module = torchvision.models.get_model(model, weights=None, **options)
    return built


def build_staged(
    config: TrialConfig, num_classes: int, image_size: int | None = None
) -> StagedModel:
    """Return the network of a configuration, in stages, with random weights and nothing frozen."""
    network = build_network(
        config.model, num_classes, image_size=image_size, aux=config.aux_weight > 0
    )
    set_dropout(network, config.dropout, config.stochastic_depth)
    return StagedModel(network, find_family(config.model))


def set_dropout(
    network: nn.Module, dropout: float | None, stochastic_depth: float | None
) -> tuple[int, int]:
    """Give the network's dropout and stochastic-depth layers other probabilities.

    Stochastic depth keeps its rise over the blocks, linear in torchvision (Huang et al. 2016); the
    last block gets the value itself.

    Returns:
        How many layers there are of each kind.
    """
    drops = [m for m in network.modules() if isinstance(m, nn.Dropout) or hasattr(m, "drop_rate")]
    skips = [m for m in network.modules() if isinstance(m, StochasticDepth)]
    if dropout is not None:
        for layer in drops:
            # DenseNet's layers call the function, with a field of their own.
            setattr(layer, "p" if isinstance(layer, nn.Dropout) else "drop_rate", dropout)
    if stochastic_depth is not None:
        highest = max((skip.p for skip in skips), default=0.0)
        for index, skip in enumerate(skips):
            rise = skip.p / highest if highest else index / max(len(skips) - 1, 1)
            skip.p = stochastic_depth * rise
    return len(drops), len(skips)


def freeze_as(model: StagedModel, config: TrialConfig, epoch: int = 1) -> bool:
    """Freeze what `config` wants frozen in `epoch`; return whether that changed anything."""
    model.frozen_batchnorm = config.frozen_batchnorm
    if config.freeze:
        before = model.freeze_depth, [p.requires_grad for p in model.parameters()]
        model.freeze_matching(config.freeze)
        return before != (model.freeze_depth, [p.requires_grad for p in model.parameters()])
    depth = freeze_depth_in(config, len(model.stages), epoch)
    changed = depth != model.freeze_depth
    model.freeze(depth)
    return changed


def freeze_depth_in(config: TrialConfig, num_stages: int, epoch: int = 1) -> int:
    """Return how many stages are frozen in `epoch`, counted from 1."""
    begun = [at for at in config.unfreeze_at if at <= epoch]
    depth = config.unfreeze_at[max(begun)] if begun else config.freeze_depth
    return depth + num_stages if depth < 0 else depth


# --- What a configuration says of the stages ------------------------------------------------------


def skeleton(model: str, image_size: int | None = None, aux: bool = False) -> StagedModel:
    """Return the network without its numbers (on the `meta` device), in stages, with 1000 classes.

    A network of the user's own is built as it is, since its code may need numbers.
    """
    family = find_family(model)
    if family is None:
        return _own_skeleton(find_own(model, "model"), model)
    return _skeleton(model, image_size, aux)


class _NoNumbers(TorchFunctionMode):
    """Makes `torch.empty`, by which layers make their parameters, answer from the meta device.

    `torch.device("meta")` would do for all families but RegNet, which computes its widths with
    tensors while it is built.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)


@lru_cache(maxsize=128)
def _skeleton(model: str, image_size: int | None, aux: bool) -> StagedModel:
    with torch.random.fork_rng(devices=[]), _NoNumbers():
        network = build_network(model, 1000, image_size=image_size, aux=aux)
    return StagedModel(network.to("meta"), find_family(model))


@lru_cache(maxsize=8)
def _own_skeleton(build: Callable[[int], Any], model: str) -> StagedModel:
    with torch.random.fork_rng(devices=[]):
        try:
            return StagedModel(build_network(model, 10))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model {model!r}: building it for 10 classes failed: "
                f"{type(error).__name__}: {error}"
            ) from error


def check_model(config: TrialConfig) -> list[str]:
    """Return what is wrong with the parts of `config` that speak of the model and its stages."""
    try:
        model = skeleton(config.model, aux=config.aux_weight > 0)
    except ConfigError as error:
        return [str(error)]
    names = [stage.name for stage in model.stages]
    return [
        *_depth_mistakes(config, names),
        *_pattern_mistakes(config, model),
        *_ratio_mistakes(config, model, names),
        *_layer_mistakes(config, model),
    ]


def _depth_mistakes(config: TrialConfig, names: Sequence[str]) -> list[str]:
    deepest = len(names) - 1
    asked = {"freeze_depth": config.freeze_depth}
    asked |= {f"unfreeze_at epoch {e}: depth": d for e, d in config.unfreeze_at.items()}
    mistakes = [
        f"{field} {depth} is too deep for {config.model}: 0 to {deepest} "
        f"({', '.join(names)}; the head is always trained), or -1 to -{len(names)} from the head"
        for field, depth in asked.items()
        if not -len(names) <= depth <= deepest
    ]
    if mistakes:
        return mistakes
    depth = freeze_depth_in(config, len(names))
    for epoch in sorted(config.unfreeze_at):
        after = freeze_depth_in(config, len(names), epoch)
        if after >= depth:
            return [
                f"unfreeze_at epoch {epoch}: depth {after} must be less than the {depth} before it"
            ]
        depth = after
    return []


def _pattern_mistakes(config: TrialConfig, model: StagedModel) -> list[str]:
    names = [name for name, _ in model.network.named_parameters()]
    mistakes = []
    for pattern in config.freeze:
        if not any(_matches(name, [pattern]) for name in names):
            hint = did_you_mean(pattern, names) or f"; its names are such as {names[0]!r}"
            mistakes.append(f"freeze {pattern!r} matches no parameter of {config.model}{hint}")
    if config.freeze and all(_matches(name, config.freeze) for name in names):
        mistakes.append(f"freeze {list(config.freeze)} leaves nothing of {config.model} to train")
    return mistakes


def _ratio_mistakes(config: TrialConfig, model: StagedModel, names: Sequence[str]) -> list[str]:
    if not isinstance(config.lr_ratio, Mapping):
        return []
    if config.freeze:
        trained = {
            name
            for name, stage in zip(names, model.stages, strict=True)
            if not all(_matches(n, config.freeze) for n in _parameter_names(model, stage))
        }
    else:
        shallowest = min(freeze_depth_in(config, len(names), e) for e in (1, config.epochs))
        trained = set(names[max(shallowest, 0) :])
    unknown, missing = set(config.lr_ratio) - set(names), trained - set(config.lr_ratio)
    if not unknown and not missing:
        return []
    return [
        f"lr_ratio must name the trained stages of {config.model}: {', '.join(names)}; "
        f"unknown: {', '.join(sorted(unknown)) or 'none'}; "
        f"missing: {', '.join(sorted(missing)) or 'none'}"
    ]


def _parameter_names(model: StagedModel, stage: Stage) -> list[str]:
    held = {id(p) for p in stage.parameters()}
    return [name for name, p in model.network.named_parameters() if id(p) in held]


def _layer_mistakes(config: TrialConfig, model: StagedModel) -> list[str]:
    mistakes = []
    drops, skips = set_dropout(model.network, None, None)
    if config.dropout is not None and not drops:
        mistakes.append(f"dropout: {config.model} has no dropout layers; leave it None")
    if config.stochastic_depth is not None and not skips:
        mistakes.append(
            f"stochastic_depth: {config.model} has none; leave it None, or take a ConvNeXt, "
            "EfficientNet, MaxViT or Swin"
        )
    family = find_family(config.model)
    if config.aux_weight > 0 and not (family and family.aux):
        mistakes.append(
            f"aux_weight: {config.model} has no auxiliary classifiers; leave it 0, or take "
            "googlenet or inception_v3"
        )
    return mistakes


def check_image_size(config: TrialConfig, size: int) -> list[str]:
    """Return whether the network cannot take images of `size` x `size` pixels, and which it can."""
    failure = _failure_at(config, size)
    if failure is None:
        return []
    if is_reference(config.model):
        return [f"model {config.model!r}: images of {size} x {size} pixels: {failure}"]
    usual = (32, 48, 64, 96, 128, 160, 192, 224, 256, 299, 384)
    taken = next((s for s in usual if s > size and _failure_at(config, s) is None), None)
    way_out = f"; {taken} is possible (--image-size {taken})" if taken else ""
    return [f"{config.model} cannot take images of {size} x {size} pixels ({failure}){way_out}"]


def _failure_at(config: TrialConfig, size: int) -> str | None:
    """Return what goes wrong in a forward pass at this size, or None."""
    if is_reference(config.model):
        return _own_failure(find_own(config.model, "model"), config.model, size)
    return _failure(config.model, size, config.aux_weight > 0)


@lru_cache(maxsize=256)
def _failure(model: str, size: int, aux: bool) -> str | None:
    try:
        staged = skeleton(model, size, aux)
        with torch.no_grad():
            staged.train()(torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        return _first_line(error)
    return None


@lru_cache(maxsize=32)
def _own_failure(build: Callable[[int], Any], model: str, size: int) -> str | None:
    staged = _own_skeleton(build, model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            logits = staged.eval()(torch.zeros(2, 3, size, size))
        except Exception as error:
            return _first_line(error)
    if not isinstance(logits, Tensor) or logits.shape != (2, 10):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        return f"for two of them and 10 classes it returned {got}, not logits (2, 10)"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__


def stage_lrs(config: TrialConfig, names: Sequence[str]) -> dict[str, float]:
    """Return the peak learning rate of each stage, by name, were it trained.

    With a ratio r, a stage learns at `lr * r ** d`, d being how many stages it lies below the
    head: the head at `lr * head_lr_factor`, the stage under it at lr * r, and so on. What is frozen
    changes nothing.

    Args:
        config: the configuration.
        names: the network's stages, from stem to head; a mapping may leave frozen ones out.
    """
    lr, ratio = config.optimizer.lr, config.lr_ratio
    if isinstance(ratio, Mapping):
        return {name: lr * ratio[name] for name in names if name in ratio}
    head = len(names) - 1
    lrs = {name: lr * math.pow(ratio, head - index) for index, name in enumerate(names)}
    lrs[names[head]] *= config.head_lr_factor
    return lrs


def count_parameters(stages: Sequence[Stage]) -> int:
    """Return how many numbers the parameters of these stages hold."""
    return sum(p.numel() for stage in stages for p in stage.parameters())


def seed_everything(seed: int, trial_seed: int) -> None:
    """Seed the generators from which head weights and dropout are drawn."""
    mixed = np.random.SeedSequence([seed, trial_seed]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed >> np.uint64(1)))
