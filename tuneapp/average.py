"""An exponential moving average of a network's weights: torch's `AveragedModel`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tuneapp.models import StagedModel


class WeightAverage:
    """Follows the weights and BatchNorm statistics of a model that trains.

    The decay rises as `(1 + n) / (10 + n)` over the steps n up to the asked one, as TensorFlow's
    `ExponentialMovingAverage(num_updates=...)` documents it: a constant one would remember the
    random head for most of a short training.
    """

    def __init__(self, model: StagedModel, decay: float) -> None:
        """Begin with `model` as it is; the average stands on the same device."""
        self.decay = decay
        self._averaged = AveragedModel(model, multi_avg_fn=self._blend, use_buffers=True)

    @property
    def model(self) -> StagedModel:
        """The averaged model."""
        averaged = self._averaged.module
        assert isinstance(averaged, StagedModel)
        return averaged

    def update(self, model: StagedModel) -> None:
        """Take in the weights after an optimizer step."""
        self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights, under `module.`, and the number of steps."""
        return dict(self._averaged.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._averaged.load_state_dict(state)

    def _blend(
        self, averaged: Sequence[Tensor], current: Sequence[Tensor], steps: Tensor | int
    ) -> None:
        # Read from the counter on the CPU: `steps` lies on the device, which would be waited for.
        n = int(self._averaged.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n))
        blend: Any = get_ema_multi_avg_fn
        blend(decay)(averaged, current, steps)
