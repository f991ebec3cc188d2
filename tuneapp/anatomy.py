"""A network in numbers, stage by stage: what there is to freeze, and what each stage costs.

Arithmetic is counted as torch's `FlopCounterMode` does: convolutions, matrix products and
attention, two float operations per multiply-add (papers and torchvision mostly give multiply-adds,
half as many). Not counted are what needs few beside them (normalisation, activations, pooling,
softmax, biases, sums) and, in networks of one's own, what torch has no formula for, such as LSTMs
and kernels of one's own.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from tuneapp.config import Sgd, TrialConfig, is_reference
from tuneapp.errors import ConfigError
from tuneapp.fit import check_image_size, skeleton
from tuneapp.models import count_parameters, find_family
from tuneapp.staged import StagedModel
from tuneapp.timm_models import is_timm, usual_preprocessing

OWN_IMAGE_SIZE = 224
"""Pixels, for a network of one's own, which has no weights that say theirs."""


@dataclass(frozen=True)
class StageAnatomy:
    """One stage.

    Attributes:
        name: as in `Stage`.
        output: shape of what it makes of one image, without the batch; None if that is not a
            tensor, or if a network of one's own does not call the stage.
        parameters: numbers that its parameters hold.
        trainable: numbers to train if all stages before it are frozen, that is, with its index as
            `freeze_depth`.
        flops: float operations of a forward pass of one image.
    """

    name: str
    output: tuple[int, ...] | None
    parameters: int
    trainable: int
    flops: int


@dataclass(frozen=True)
class Anatomy:
    """A network.

    Attributes:
        model: as in `TrialConfig.model`.
        image_size: height and width in pixels of the image.
        stages: from stem to head.
    """

    model: str
    image_size: int
    stages: tuple[StageAnatomy, ...]

    @property
    def parameters(self) -> int:
        """Numbers that all parameters hold."""
        return sum(stage.parameters for stage in self.stages)

    @property
    def flops(self) -> int:
        """Float operations of a forward pass of one image."""
        return sum(stage.flops for stage in self.stages)


class _Measured(NamedTuple):
    output: tuple[int, ...] | None
    flops: int


def read_anatomy(model: str, image_size: int | None = None) -> Anatomy:
    """Return what each stage of a network puts out, holds and costs, without its weights.

    Networks of torchvision have 1000 classes, those of one's own are built for 10.

    Args:
        model: as in `TrialConfig.model`.
        image_size: height and width in pixels of the image; None is what the model's default
            weights were evaluated at, and 224 for a network of one's own.

    Raises:
        ConfigError: the model is unknown or cannot be built, or cannot take such images.
    """
    find_family(model)
    config = TrialConfig(model=model, optimizer=Sgd(lr=1), image_size=image_size)
    size = _default_size(model) if image_size is None else image_size
    if image_size is not None or is_reference(model):
        mistakes = check_image_size(config, size)
        if mistakes:
            way_out = "; --image-size sets another size" if image_size is None else ""
            raise ConfigError(mistakes[0] + way_out)
    staged = skeleton(model, size).eval()
    measured = (_measure if staged.is_chain else _measure_whole)(staged, size)
    held = [count_parameters([stage]) for stage in staged.stages]
    from_here = reversed(list(accumulate(reversed(held))))
    return Anatomy(
        model,
        size,
        tuple(
            StageAnatomy(stage.name, of.output, parameters, trainable, of.flops)
            for stage, of, parameters, trainable in zip(
                staged.stages, measured, held, from_here, strict=True
            )
        ),
    )


def _default_size(model: str) -> int:
    """Return the size of the images that the model's default weights were evaluated on."""
    if is_reference(model):
        return OWN_IMAGE_SIZE
    if is_timm(model):
        return usual_preprocessing(model).crop_size
    size: int = torchvision.models.get_model_weights(model).DEFAULT.transforms().crop_size[0]
    return size


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count float operations.

    In evaluation and on a CPU, `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` take fused
    kernels that have no formula and would count as nothing: those are switched off meanwhile.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _measure(staged: StagedModel, size: int) -> list[_Measured]:
    """Call the stages one after the other, on the meta device: shapes, and no numbers."""
    x = torch.empty(1, 3, size, size, device="meta")
    measured = []
    with _counting() as counter:
        for stage in staged.stages:
            before = counter.get_total_flops()
            x = stage.module(x)
            measured.append(_Measured(tuple(x.shape[1:]), counter.get_total_flops() - before))
    return measured


def _measure_whole(staged: StagedModel, size: int) -> list[_Measured]:
    """Call a network that is no chain of its stages, and watch in which stage it is.

    A stage lasts from a call of one of its modules to that of another stage's: functions count for
    the stage whose module was called before them, and so do modules without parameters that are
    called several times, such as the one ReLU of a network, wherever they are kept.
    """
    image = torch.zeros(1, 3, size, size, device=next(staged.parameters()).device)
    outputs: dict[int, tuple[int, ...]] = {}
    flops = [0] * len(staged.stages)
    current, counted = 0, 0

    with _counting() as counter:

        def enter(stage: int, *call: object) -> None:
            nonlocal current, counted
            total = counter.get_total_flops()
            flops[current] += total - counted
            current, counted = stage, total

        def note(module: nn.Module, args: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, Tensor):
                outputs[current] = tuple(first.shape[1:])

        calls = _count_calls(staged.network, image)
        counted = counter.get_total_flops()
        hooks = [
            module.register_forward_pre_hook(partial(enter, index))
            for index, stage in enumerate(staged.stages)
            for module in stage.module.modules()
            if calls[module] == 1 or next(module.parameters(), None) is not None
        ]
        hooks += [module.register_forward_hook(note) for module in staged.network.modules()]
        with _removing(hooks):
            staged.network(image)
        enter(current)
    return [_Measured(outputs.get(index), count) for index, count in enumerate(flops)]


def _count_calls(network: nn.Module, image: Tensor) -> Counter[nn.Module]:
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: object) -> None:
        calls[module] += 1

    with _removing([m.register_forward_pre_hook(count) for m in network.modules()]):
        network(image)
    return calls


@contextmanager
def _removing(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
