"""Optimizers: torch's own, with the defaults of torch, but for SGD's momentum of 0.9.

`lr`: base learning rate. The head trains at `lr * head_lr_factor`, a stage d stages below it at
`lr * lr_ratio ** d`.
"""

from dataclasses import dataclass

from tuneapp.config.checks import (
    Checked,
    above_zero,
    at_least_zero,
    in_interval,
    is_number,
    require,
    true_or_false,
)


@dataclass(frozen=True, kw_only=True)
class Sgd(Checked):
    """`torch.optim.SGD`. `lr` is the base learning rate, as above."""

    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def _mistakes(self) -> list[str]:
        has_momentum = is_number(self.momentum) and self.momentum > 0
        nesterov_ok = self.nesterov is False or (self.nesterov is True and has_momentum)
        return [
            *above_zero("lr", self.lr),
            *in_interval("momentum", self.momentum, "[0, 1)"),
            *at_least_zero("weight_decay", self.weight_decay),
            *require(
                nesterov_ok,
                "nesterov",
                self.nesterov,
                "True or False, and False when momentum is 0",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class Adam(Checked):
    """`torch.optim.Adam` (weight decay is an L2 penalty). `lr` is the base learning rate."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0

    def _mistakes(self) -> list[str]:
        return [
            *above_zero("lr", self.lr),
            *in_interval("beta1", self.beta1, "[0, 1)"),
            *in_interval("beta2", self.beta2, "[0, 1)"),
            *at_least_zero("weight_decay", self.weight_decay),
        ]


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """`torch.optim.AdamW` (weight decay is decoupled). `lr` is the base learning rate."""

    weight_decay: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class RmsProp(Checked):
    """`torch.optim.RMSprop`. `lr` is the base learning rate.

    The defaults are torch's; torchvision's MobileNetV3 recipe has alpha 0.9, momentum 0.9 and eps
    0.0316.
    """

    lr: float
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    weight_decay: float = 0.0

    def _mistakes(self) -> list[str]:
        return [
            *above_zero("lr", self.lr),
            *in_interval("alpha", self.alpha, "[0, 1)"),
            *above_zero("eps", self.eps),
            *in_interval("momentum", self.momentum, "[0, 1)"),
            *true_or_false("centered", self.centered),
            *at_least_zero("weight_decay", self.weight_decay),
        ]


Optimizer = Sgd | Adam | AdamW | RmsProp
