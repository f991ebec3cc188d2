"""A classifier as stages: named, ordered pieces of a network, from the stem to the head.

`families.py` declares the stages of torchvision's networks, `timm_models.py` those of timm's; a
custom network declares its own with a method `stages()`, or else its top-level children are its
stages. Freezing, learning rates and feature extraction all refer to stages.
"""

import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tuneapp.errors import ConfigError, did_you_mean
from tuneapp.families import Beside, Family


@dataclass(frozen=True)
class Stage:
    """A named piece of a network.

    Attributes:
        name: as the family names it, such as `layer3`.
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


@dataclass
class Visit:
    """A part of a forward pass that is spent in one stage.

    Attributes:
        stage: name of the stage.
        begun: the clock when it began.
        entered_by: the module whose call began it, if that has no parameters: only the end of the
            pass shows whether it is shared.
        output: what the last of the stages' modules to return in it returned; None if no tensor.
    """

    stage: str
    begun: int
    entered_by: nn.Module | None = None
    output: Tensor | None = None


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
    modules. Frozen stages stay in `eval()` mode whatever the argument of `train()`, so that their
    BatchNorm statistics do not change.
    """

    def __init__(self, network: nn.Module, family: Family | None = None) -> None:
        """Divide `network` into stages.

        Args:
            network: a classifier of torchvision or timm, or a custom one.
            family: of torchvision or timm; None for a custom network.

        Raises:
            ConfigError: the network's stages do not hold each of its parameters exactly once.
        """
        super().__init__()
        self.network = network
        # A tuple, which nn.Module does not register: the parameters are counted once, in `network`.
        self.stages = tuple(
            Stage(name, nn.Sequential(*modules))
            for name, modules in (family.stages if family else _own_stages)(network).items()
        )
        self.is_chain = family is not None and family.is_chain
        """Whether calling the stages one after the other is the network; False if unknown."""
        self._aux_after: dict[nn.Module, nn.Module] = {}
        for name, path in (family.aux if family else {}).items():
            head = getattr(network, name)
            if head is not None:
                self._aux_after[network.get_submodule(path)] = head
        self.fixed_names = frozenset(
            name for name, p in network.named_parameters() if not p.requires_grad
        )
        """Parameters that the network itself never trains, such as fixed position embeddings."""
        self.freeze_depth = 0
        self.frozen_batchnorm = "eval"

    def forward(
        self, x: Tensor, first_stage: int = 0, stages: Sequence[str] | None = None
    ) -> Tensor | WithAux | list[Tensor]:
        """Return the logits, float (B, classes), or the outputs of some stages.

        Args:
            x: images, float32 (B, 3, H, W) normalised; or, with `first_stage` k, the output of the
                first k stages.
            first_stage: index of the stage to begin with; 0 for a network that is no chain.
            stages: names of stages; their outputs are returned as a list in this order, and later
                stages are not computed (but a network that is no chain runs whole). None returns
                the logits; while training a network with auxiliary classifiers, with theirs.

        Raises:
            ConfigError: `stages` is no list of names of stages, or one of them has no output; the
                network cannot begin with `first_stage`.
        """
        self._require_beginning(first_stage)
        if stages is not None:
            return self._features(x, first_stage, stages)
        if not self.is_chain:
            logits: Tensor = self.network(x)
            return logits
        aux = []
        for stage in self.stages[first_stage:]:
            for module in stage.module:
                x = module(x)
                if self.training and module in self._aux_after:
                    aux.append(self._aux_after[module](x))
        return WithAux(x, tuple(aux)) if aux else x

    def _require_beginning(self, first_stage: int) -> None:
        if first_stage == 0:
            return
        if not self.is_chain:
            raise ConfigError(
                f"first_stage must be 0, got {first_stage}: this network is called whole, from its "
                "beginning"
            )
        if not 0 < first_stage <= len(self.stages):
            raise ConfigError(
                f"first_stage must be 0 to {len(self.stages)}, got {first_stage}; the stages are "
                f"{', '.join(stage.name for stage in self.stages)}"
            )
        if not self.training:
            return
        for stage in self.stages[:first_stage]:
            if self._aux_after.keys() & set(stage.module):
                raise ConfigError(
                    f"first_stage {first_stage} leaves out {stage.name!r}, whose output an "
                    "auxiliary classifier is trained on; begin at or before it, or call eval()"
                )

    def _features(self, x: Tensor, first_stage: int, wanted: Sequence[str]) -> list[Tensor]:
        names = [stage.name for stage in self.stages]
        self._require_names(wanted, names)
        if self.is_chain:
            for name in wanted:
                if names.index(name) < first_stage:
                    raise ConfigError(f"stage {name!r} is before first_stage, so it has no output")
            last = max(names.index(name) for name in wanted)
            outputs: dict[str, Tensor] = {}
            for stage in self.stages[first_stage : last + 1]:
                x = outputs[stage.name] = stage.module(x)
        else:
            with self.watching(keep=wanted) as visits:
                self.network(x)
            outputs = {v.stage: v.output for v in visits if v.output is not None}
            for name in wanted:
                if name not in outputs:
                    raise ConfigError(f"stage {name!r} is never called, so it has no output")
        return [outputs[name] for name in wanted]

    def _require_names(self, wanted: Sequence[str], names: Sequence[str]) -> None:
        """Check for a list of names of stages."""
        known = ", ".join(names)
        if isinstance(wanted, str):
            raise ConfigError(f"stages must be a list, such as [{wanted!r}]; there are {known}")
        if not wanted:
            raise ConfigError(f"stages is empty: name at least one of {known}, or leave it out")
        for name in wanted:
            if name not in names:
                hint = did_you_mean(str(name), names)
                raise ConfigError(f"stage {name!r} is unknown{hint}; there are {known}")

    @contextmanager
    def watching(
        self, clock: Callable[[], int] = lambda: 0, keep: Collection[str] = ()
    ) -> Iterator[list[Visit]]:
        """Record through which stages a call of the whole network passes; read it after the block.

        A stage is entered when one of its modules is called, or returns, that has parameters or is
        called only once. A module without parameters that is called more often, such as the one
        ReLU of a network, counts for the stage in which it is called, wherever it is kept. So do
        functions, but only for the clock: outputs are those of modules that belong to a stage.

        Args:
            clock: a number that never falls, such as the FLOPs so far.
            keep: names of stages whose outputs are copied, so that what the network does to them
                later in place does not change them.
        """
        follower = _Follower(self.stages, clock, keep)
        hooks = [m.register_forward_pre_hook(follower.before) for m in follower.modules]
        hooks += [m.register_forward_hook(follower.after) for m in follower.modules]
        try:
            yield follower.visits
        finally:
            for hook in hooks:
                hook.remove()
        follower.finish()

    @contextmanager
    def noting_calls(self) -> Iterator[list[str]]:
        """List the stages in the order in which modules with parameters of theirs are first called.

        Not seen is a stage whose parameters the network uses without calling a module that has
        them, as `F.linear(x, self.head.weight)` does.
        """
        called: list[str] = []

        def note(name: str) -> None:
            if name not in called:
                called.append(name)

        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=stage.name: note(name))
            for stage in self.stages
            for module in stage.module.modules()
            if _has_parameters(module)
        ]
        try:
            yield called
        finally:
            for hook in hooks:
                hook.remove()

    def freeze(self, depth: int) -> None:
        """Freeze the first `depth` stages and train the rest, except what is fixed."""
        self.freeze_depth = depth
        fixed = {id(p) for n, p in self.network.named_parameters() if n in self.fixed_names}
        for index, stage in enumerate(self.stages):
            for parameter in stage.parameters():
                parameter.requires_grad_(index >= depth and id(parameter) not in fixed)
        self.train(self.training)

    def freeze_matching(self, patterns: Sequence[str]) -> None:
        """Freeze the parameters whose names match a pattern; train the rest but what is fixed."""
        for name, parameter in self.network.named_parameters():
            is_frozen = name in self.fixed_names or matches(name, patterns)
            parameter.requires_grad_(not is_frozen)
        trained = [bool(stage.trained_parameters()) for stage in self.stages]
        self.freeze_depth = trained.index(True) if True in trained else len(trained)
        self.train(self.training)

    def is_frozen(self, stage: Stage) -> bool:
        """Whether nothing of a stage is trained."""
        below = self.stages.index(stage) < self.freeze_depth
        return below or bool(stage.parameters() and not stage.trained_parameters())

    def frozen_batchnorms(self) -> list[_BatchNorm]:
        """Return the BatchNorm layers of frozen stages, and those whose own parameters are frozen.

        Whether they update their statistics is what `frozen_batchnorm` says.
        """
        found = []
        for stage in self.stages:
            is_frozen = self.is_frozen(stage)
            for norm in stage.module.modules():
                if isinstance(norm, _BatchNorm):
                    own = [p.requires_grad for p in norm.parameters()]
                    if is_frozen or (own and not any(own)):
                        found.append(norm)
        return found

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; what is frozen stays in `eval()`.

        Frozen are whole stages and, elsewhere, the `frozen_batchnorms`. With `frozen_batchnorm`
        "train", all frozen BatchNorm layers take `mode` anyway.
        """
        super().train(mode)
        for stage in self.stages:
            if self.is_frozen(stage):
                stage.module.eval()
        for norm in self.frozen_batchnorms():
            # Of the layer alone: timm's have an activation and dropout inside.
            norm.training = mode and self.frozen_batchnorm == "train"
        return self


class _Follower:
    """Follows a call of a network from stage to stage, by hooks of the stages' modules."""

    def __init__(
        self, stages: Sequence[Stage], clock: Callable[[], int], keep: Collection[str]
    ) -> None:
        self._clock = clock
        self._keep = keep
        self._calls: Counter[nn.Module] = Counter()
        self._stage_of: dict[nn.Module, str | None] = {}  # None: it is in several
        for stage in stages:
            for module in stage.module.modules():
                self._stage_of[module] = None if module in self._stage_of else stage.name
        self.modules = list(self._stage_of)
        self.visits = [Visit(stages[0].name, clock())]

    def before(self, module: nn.Module, args: object) -> None:
        """Note that a module is called."""
        self._calls[module] += 1
        if _has_parameters(module):
            self._enter(module, None)
        elif self._calls[module] == 1:
            self._enter(module, module)

    def after(self, module: nn.Module, args: object, output: object) -> None:
        """Note what a module returned."""
        if _has_parameters(module):  # modules of other stages may have been called in it
            self._enter(module, None)
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor):
            visit = self.visits[-1]
            # If a shared module began the visit, it may turn out to be of the stage before it.
            is_kept = visit.stage in self._keep or (self._keep and visit.entered_by is not None)
            visit.output = first.clone() if is_kept else first

    def _enter(self, module: nn.Module, entered_by: nn.Module | None) -> None:
        stage, last = self._stage_of[module], self.visits[-1]
        is_there = last.stage == stage and last.entered_by is None
        if stage is not None and not is_there:
            self.visits.append(Visit(stage, self._clock(), entered_by))

    def finish(self) -> None:
        """Let visits that a shared module began belong to the stage before them."""
        before = self.visits[0].stage
        for visit in self.visits:
            if visit.entered_by is not None and self._calls[visit.entered_by] > 1:
                visit.stage = before
            before = visit.stage


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _own_stages(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the stages of a custom network, in the order of its data.

    `network.stages()` returns a mapping name -> module, or modules in the order in which they are
    called. Without it, each top-level child is a stage; one without parameters belongs to the one
    before it. Parameters of the network itself, such as a class token, belong to the first stage.
    """
    kind = type(network).__name__
    if not _has_parameters(network):
        raise ConfigError(f"{kind} has no parameters: nothing to train")
    own: Any = getattr(network, "stages", None)
    # Some networks have a module of this name.
    is_method = callable(own) and not isinstance(own, nn.Module)
    declared = _declared(kind, own()) if is_method else _children(network)
    placed = {id(p) for modules in declared.values() for m in modules for p in m.parameters()}
    loose = [p for p in network.parameters(recurse=False) if id(p) not in placed]
    if loose and declared:
        first_name = next(iter(declared))
        beside = Beside(nn.ParameterList(loose))
        declared = {**declared, first_name: [beside, *declared[first_name]]}
    last = list(declared)[-1]
    if not any(_has_parameters(module) for module in declared[last]):
        raise ConfigError(
            f"{kind}: the last stage, {last!r}, is the head, but has no parameters; put its "
            "modules into the stage before it"
        )
    held = Counter(
        id(p) for modules in declared.values() for p in nn.Sequential(*modules).parameters()
    )
    for name, parameter in network.named_parameters():
        if held[id(parameter)] != 1:
            raise ConfigError(
                f"{kind}: every parameter must belong to exactly one stage; {name} belongs to "
                f"{_holders(parameter, declared)}; give it a method stages() that returns a dict "
                "name -> module, with what shares weights in one stage"
            )
    return declared


def _holders(parameter: nn.Parameter, stages: Mapping[str, list[nn.Module]]) -> str:
    """Return the names of the stages that hold a parameter."""
    names = [
        name
        for name, modules in stages.items()
        if any(p is parameter for m in modules for p in m.parameters())
    ]
    return " and ".join(names) or "none"


def _declared(kind: str, stages: object) -> dict[str, list[nn.Module]]:
    """Return what a network's own `stages()` returned, as a list of modules for each stage."""
    if isinstance(stages, Mapping):
        listed = {
            str(name): list(modules) if isinstance(modules, list | tuple) else [modules]
            for name, modules in stages.items()
        }
        if len(listed) < len(stages):
            named = ", ".join(map(repr, stages))
            raise ConfigError(f"{kind}: stages() has two stages of one name: {named}")
        if all(isinstance(m, nn.Module) for modules in listed.values() for m in modules):
            return listed
    raise ConfigError(
        f"{kind}: stages() must return a dict name -> module, or name -> list of modules, got "
        f"{_say_types(stages)}"
    )


def _say_types(value: object) -> str:
    """Say what something is, without the many lines that a module prints."""
    if value is None or isinstance(value, str):
        return repr(value)[:40]
    name = type(value).__name__
    if isinstance(value, Mapping):
        pairs = [f"{key!r:.40}: {_say_types(inner)}" for key, inner in value.items()]
        return f"{{{', '.join(pairs)}}}"[:200]
    if isinstance(value, list | tuple):
        return f"{name} of {', '.join(map(_say_types, value)) or 'nothing'}"[:200]
    return name


def _children(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Return each top-level child that has parameters, with those after it that have none."""
    stages: dict[str, list[nn.Module]] = {}
    before: list[nn.Module] = []
    for name, child in network.named_children():
        if _has_parameters(child):
            stages[name] = [*before, child]
            before = []
        elif stages:
            stages[list(stages)[-1]].append(child)
        else:
            before.append(child)
    return stages
