"""An exponential moving average of a network's weights, by torch's own averaging function."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tuneapp.staged import StagedModel


class WeightAverage:
    """Follows the weights and BatchNorm statistics of a model that trains.

    The average is the weights themselves after the first step. Then the decay rises as
    `(1 + n) / (10 + n)` over the steps n up to the asked one, as TensorFlow's
    `ExponentialMovingAverage(num_updates=...)` documents it: a constant one would remember the
    random head for most of a short training. Whole numbers are copied.

    torch's `AveragedModel` does the same for floating-point tensors, but rounds whole numbers down,
    and waits for the device in every step, where it copies its counter there.
    """

    def __init__(self, model: StagedModel, decay: float) -> None:
        """Begin with `model` as it is; the average stands on the same device."""
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._steps = 0

    @torch.no_grad()
    def update(self, model: StagedModel) -> None:
        """Take in the weights after an optimizer step."""
        n = self._steps
        decay = 0.0 if n == 0 else min(self.decay, (1 + n) / (10 + n))
        blend: Any = get_ema_multi_avg_fn
        averaged, current = _tensors(self.model), _tensors(model)
        pairs = list(zip(averaged, current, strict=True))
        blended = [(a, c) for a, c in pairs if a.is_floating_point()]
        blend(decay)([a for a, _ in blended], [c for _, c in blended], None)
        # Whole numbers count batches, or are positions in a table (Swin's): the mean of two equal
        # ones could be rounded to the one below.
        for average, now in pairs:
            if not average.is_floating_point():
                average.copy_(now)
        self._steps += 1

    @property
    def steps(self) -> int:
        """Updates that it has followed."""
        return self._steps

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of steps, named as `AveragedModel` does."""
        weights = {f"module.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {"n_averaged": torch.tensor(self._steps), **weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._steps = int(state["n_averaged"])
        prefix = "module."
        self.model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )


def _tensors(model: StagedModel) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
