"""State dicts and small networks for the tests of weights."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from tuneapp.config import Sgd, TrialConfig
from tuneapp.families import FAMILIES
from tuneapp.fit import skeleton
from tuneapp.models import build_network

State = dict[str, Tensor]


def config_of(model: str = "resnet18", **values: Any) -> TrialConfig:
    return TrialConfig(model=model, optimizer=Sgd(lr=0.1), **values)


def saved(content: object, file: Path) -> Path:
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(content, file)
    else:
        torch.save(content, file)
    return file


def copied(network: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def require_equal(network: nn.Module, wanted: State, *names: str) -> None:
    """Check the tensors of these names, or else all."""
    own = network.state_dict()
    for name in names or own:
        assert torch.equal(own[name], wanted[name]), name


def empty_state(model: str, classes: int = 1000, *, aux: bool = False) -> State:
    """Zeros in the shapes of a torchvision network, each expanded from one, so hardly a byte."""
    if classes == 1000:
        shapes = skeleton(model, None, aux).network.state_dict()
    elif model.startswith("regnet"):  # computes its widths with numbers
        shapes = build_network(model, classes).state_dict()
    else:
        options = {"aux_logits": aux, "init_weights": False} if FAMILIES[model].aux else {}
        with torch.device("meta"):
            network = torchvision.models.get_model(model, num_classes=classes, **options)
        shapes = network.state_dict()
    return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in shapes.items()}


class OwnNet(nn.Module):
    """A network of one's own: three stages by its children, and a head of two layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(x)))
        return logits


class OneStage(nn.Module):
    """All of it in one child."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def ladder(num_classes: int) -> nn.Module:
    """Ten stages of sixteen numbers under a head."""
    steps = {f"step{i}": nn.Linear(4, 4, bias=False) for i in range(10)}
    return nn.Sequential(OrderedDict({**steps, "head": nn.Linear(4, num_classes)}))


OWN = f"{__name__}:OwnNet"
ONE_STAGE = f"{__name__}:OneStage"
LADDER = f"{__name__}:ladder"
