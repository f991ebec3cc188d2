"""A classifier as stages: named, ordered pieces of a network, from the stem to the head.

`families.py` says what the stages of torchvision's networks are, `timm_models.py` those of timm's;
a network of one's own says it by its method `stages()`, or else has its top-level children as
stages. Freezing, learning rates and feature extraction all speak in stages.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tuneapp.errors import ConfigError, did_you_mean
from tuneapp.families import Beside, Family


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
            family: of torchvision's or timm's; None for one of the user's own.

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
        self.is_chain = family is not None and family.is_chain
        """Whether calling the stages one after the other is the network; not known of one's own."""
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
            first_stage: index of the stage to begin with; 0 for a network that is no chain.
            stages: names of stages; their outputs are returned as a list in this order, and later
                stages are not computed (but a network that is no chain runs whole). None returns
                the logits; while training a network with auxiliary classifiers, with theirs.

        Raises:
            ConfigError: there is no such stage.
        """
        if stages is not None:
            return self._features(x, first_stage, stages)
        if not self.is_chain:
            assert first_stage == 0, "a network that is called whole is called from its beginning"
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
        if self.is_chain:
            last = max((names.index(name) for name in wanted), default=-1)
            for stage in self.stages[first_stage : last + 1]:
                x = outputs[stage.name] = stage.module(x)
        else:
            self._watch(x, outputs)
        missing = [name for name in wanted if name not in outputs]
        if missing:
            why = "lies before the first stage" if self.is_chain else "is not called"
            raise ConfigError(f"stage {missing[0]!r} {why}: it puts out nothing")
        return [outputs[name] for name in wanted]

    def _watch(self, x: Tensor, outputs: dict[str, Tensor]) -> None:
        """Call the whole network, and note what each stage puts out.

        A stage lasts from a call of one of its modules to such a call of another stage. A module
        without parameters counts once: it may be shared, and called again in later stages.
        """
        current = self.stages[0].name
        called: set[nn.Module] = set()

        def enter(name: str, module: nn.Module, *args: object) -> None:
            nonlocal current
            if module not in called or next(module.parameters(), None) is not None:
                current = name
            called.add(module)

        def note(name: str, module: nn.Module, args: object, output: Tensor) -> None:
            if current == name:
                outputs[name] = output

        hooks = []
        for stage in self.stages:
            for module in stage.module.modules():
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
            parameter.requires_grad_(not matches(name, patterns))
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


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _own_stages(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the stages of a network of the user's own, in the order of its data.

    `network.stages()` returns a mapping name -> module, or modules in the order in which they are
    called. Without it, each top-level child is a stage; one without parameters goes with the one
    before it. Parameters of the network itself, such as a class token, go with the first stage.
    """
    own: Any = getattr(network, "stages", None)
    if callable(own) and not isinstance(own, nn.Module):  # which some have under this name
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
