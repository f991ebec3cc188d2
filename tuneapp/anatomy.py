"""A network in numbers, stage by stage: what there is to freeze, and what each stage costs.

Arithmetic is counted as torch's `FlopCounterMode` does: convolutions, matrix products and
attention, two float operations per multiply-add (papers and torchvision mostly give multiply-adds,
half as many). Not counted is what costs little in comparison (normalisation, activations, pooling,
softmax, biases, sums) and, in custom networks, what torch has no formula for, such as LSTMs and
custom kernels.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from tuneapp.config import Sgd, TrialConfig, is_reference
from tuneapp.errors import ConfigError
from tuneapp.fit import check_image_size, skeleton
from tuneapp.models import count_parameters, find_family
from tuneapp.staged import StagedModel
from tuneapp.timm_models import is_timm, usual_preprocessing

OWN_IMAGE_SIZE = 224
"""Pixels, for a custom network, which has no weights that were evaluated at a known size."""


@dataclass(frozen=True)
class StageAnatomy:
    """One stage.

    Attributes:
        name: as in `Stage`.
        output: shape of its output for one image, without the batch; None if that is not a tensor,
            or if a custom network does not call the stage.
        parameters: number of parameters.
        trainable: number of parameters to train if all stages before it are frozen, that is, with
            its index as `freeze_depth`.
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
        """Number of parameters."""
        return sum(stage.parameters for stage in self.stages)

    @property
    def flops(self) -> int:
        """Float operations of a forward pass of one image."""
        return sum(stage.flops for stage in self.stages)


class _Measured(NamedTuple):
    output: tuple[int, ...] | None
    flops: int


def read_anatomy(model: str, image_size: int | None = None) -> Anatomy:
    """Return output shape, parameters and FLOPs of each stage of a network, without its weights.

    Networks of torchvision and timm have 1000 classes, custom ones are built for 10.

    Args:
        model: as in `TrialConfig.model`.
        image_size: height and width in pixels of the image; None is what the model's default
            weights were evaluated at, and 224 for a custom network.

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
    staged = copy.deepcopy(skeleton(model, size)).eval()
    measured = (_measure if staged.is_chain else _measure_whole)(staged, size)
    held = [count_parameters([stage]) for stage in staged.stages]
    learning = [sum(p.numel() for p in stage.trained_parameters()) for stage in staged.stages]
    from_here = reversed(list(accumulate(reversed(learning))))
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
    kernels that have no formula and would count as nothing: they are switched off here.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _measure(staged: StagedModel, size: int) -> list[_Measured]:
    """Call the stages one after the other, on the meta device: shapes only."""
    x = torch.empty(1, 3, size, size, device="meta")
    measured = []
    with _counting() as counter:
        for stage in staged.stages:
            before = counter.get_total_flops()
            x = stage.module(x)
            measured.append(_Measured(tuple(x.shape[1:]), counter.get_total_flops() - before))
    return measured


def _measure_whole(staged: StagedModel, size: int) -> list[_Measured]:
    """Call a network that is no chain of its stages, and follow it from stage to stage."""
    image = torch.zeros(1, 3, size, size, device=next(staged.parameters()).device)
    with _counting() as counter:
        with staged.watching(counter.get_total_flops) as visits:
            staged.network(image)
        ends = [visit.begun for visit in visits[1:]] + [counter.get_total_flops()]
    outputs = {v.stage: tuple(v.output.shape[1:]) for v in visits if v.output is not None}
    flops = dict.fromkeys((stage.name for stage in staged.stages), 0)
    for visit, end in zip(visits, ends, strict=True):
        flops[visit.stage] += end - visit.begun
    return [_Measured(outputs.get(name), count) for name, count in flops.items()]
