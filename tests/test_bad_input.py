"""Every mistake of a space is one line that names the field, before any trial starts."""

from pathlib import Path

import pytest
import torch
import torchvision

from tuneapp.cli import main

SPACE = """
from tuneapp.config import *
import own_things

def search_space(trial):
    return TrialConfig(**{{
        "model": "resnet18",
        "weights": None,
        "image_size": 32,
        "epochs": 2,
        "optimizer": AdamW(lr=0.1),
        {wrong}
    }})
"""
OWN = """
from torch import nn

def flat(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(5, num_classes))

def no_network(num_classes):
    return "a network"

class Stray(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def stages(self):
        return {"only": self.one}

def stray(num_classes):
    return Stray()

class Pair(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, x):
        logits = self.fc(x.flatten(1))
        return (logits, logits) if self.training else logits

def pair(num_classes):
    return Pair(num_classes)

def vector(logits, targets):
    return logits.sum(dim=1)

def negative(epoch, config):
    return -1
"""

# What is wrong -> words of the one line that says so.
MISTAKES = {
    '"model": "resnet81"': ["model 'resnet81' is unknown", "did you mean 'resnet18'?", "families:"],
    '"model": "own_things:nothing"': ["model 'own_things:nothing'", "has no nothing"],
    '"model": "no_such_module:build"': ["model 'no_such_module:build'", "cannot import"],
    '"model": "own_things:no_network"': ["(num_classes) must return an nn.Module, got str"],
    '"model": "own_things:stray"': ["Stray", "two.weight belongs to none", "stages()"],
    '"model": "own_things:flat"': ["own_things:flat", "32 x 32 pixels", "shapes cannot"],
    '"model": "own_things:pair"': ["while training", "returned tuple, not logits (2, 3)"],
    '"schedule": OneCycle(), "epochs": 1, "batch_size": 16': ["OneCycle needs 3", "has 2"],
    '"schedule": Cosine(warmup_epochs=1)': ["Cosine has no warmup_epochs; it has warmup_fraction"],
    '"freeze": ["fc.*"]': ["freezes fc.weight, but the head"],
    '"freeze_depth": 0, "unfreeze_at": {2: 0}': ["nothing is frozen before it; set freeze_depth"],
    '"model": "alexnet"': ["alexnet cannot take images of 32 x 32", "64 is possible"],
    '"lr_ratio": {"layer4": 0.1, "laier3": 0.1}': [
        "lr_ratio must name the trained stages of resnet18: stem, layer1",
        "unknown: laier3",
        "missing: stem, layer1",
    ],
    '"schedule": "cosin"': ["schedule must be one of Constant", "got 'cosin'", "mean Cosine()?"],
    '"optimizer": "adam"': ["optimizer must be one of Sgd, Adam", "did you mean Adam(lr=...)?"],
    '"schedule": Cosine': ["schedule must be one of", "did you forget the brackets: Cosine()?"],
    '"preprocess": Preprocess(mean=[124, 116, 104])': ["mean must be", "divide by 255"],
    '"weights": "https://x.org/w.pth"': ["a URL is not accepted: download the file"],
    '"model": "./own_things.py:flat"': ["write an import path: own_things:flat"],
    '"freeze": "layer1.*"': ["freeze must be a list", "write ['layer1.*']"],
    '"loss": "focal"': ["loss must be one of CrossEntropy, Focal", "got 'focal'", "mean Focal()?"],
    '"schedule": Cosin()': ["NameError", "Cosin"],
    '"schedule": OwnSchedule(factor="own_things:negative")': [
        "schedule 'own_things:negative'",
        "in epoch 0",
        "returned -1",
        "must be a number >= 0",
    ],
    '"loss": OwnLoss(loss="own_things:vector")': ["loss 'own_things:vector'", "shape (2,)"],
    '"loss": CrossEntropy(class_weights=[1.0, 2.0])': ["class_weights", "3 classes", "[1.0, 2.0]"],
    '"freeze_depth": 6': ["freeze_depth 6 is too deep for resnet18: 0 to 5", "stem", "head"],
    '"freeze_depth": -7': ["freeze_depth -7"],
    '"freeze": ["layer9.*"]': ["freeze 'layer9.*' matches no parameter of resnet18"],
    '"freeze": ["*"]': ["leaves nothing of resnet18 to train"],
    '"freeze_depth": 2, "unfreeze_at": {2: 3}': ["unfreeze_at epoch 2: depth 3 must be less"],
    '"freeze_depth": 2, "unfreeze_at": {9: 0}': ["epoch 9 is after the last of 2 epochs"],
    '"lr_ratio": 0': ["lr_ratio must be a number in (0, 1]", "got 0"],
    '"lr_ratio": -0.5': ["lr_ratio must be a number in (0, 1]", "got -0.5"],
    '"head_lr_factor": 0': ["head_lr_factor must be a number > 0", "got 0"],
    '"schedule": Cosine(warmup_fraction=1.5)': [
        "Cosine: warmup_fraction must be a share of the training in [0, 1)",
        "got 1.5",
    ],
    '"optimizer": AdamW(lr=-1)': ["AdamW: lr must be a number > 0", "got -1"],
    '"weights": "IMAGENET1K_V7"': ["weights 'IMAGENET1K_V7' of resnet18 are unknown", "known:"],
    '"weights": "nowhere.pth"': ["weights 'nowhere.pth'", "no such file"],
    '"weights": "vgg11.pth"': ["vgg11.pth", "resnet18", "another network"],
    '"dropout": 0.5': ["dropout: resnet18 has no dropout layers"],
    '"stochastic_depth": 0.1': ["stochastic_depth: resnet18 has none"],
    '"aux_weight": 0.4': ["aux_weight: resnet18 has no auxiliary classifiers"],
    '"clip_norm": 1.0, "clip_value": 1.0': ["give either clip_norm or clip_value, not both"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spaces")
    (folder / "own_things.py").write_text(OWN)
    torch.save(torchvision.models.vgg11().features.state_dict(), folder / "vgg11.pth")
    return folder


@pytest.mark.parametrize(("wrong", "told"), MISTAKES.items(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_before_any_trial_starts(
    wrong: str,
    told: list[str],
    folder: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "space.py").write_text(SPACE.format(wrong=wrong))
    monkeypatch.chdir(folder)
    assert main(["sweep", "space.py", "--data", str(photos)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("tuneapp: error: ")
    for words in told:
        assert words in error
    assert not (folder / "runs").exists()


def test_a_mistake_in_the_values_of_a_field_is_told_with_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "space.py").write_text(SPACE.format(wrong='"epochs": 0'))
    monkeypatch.chdir(folder)
    assert main(["show", "space.py"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tuneapp: error: space.py:6: TrialConfig: epochs must be")


def test_the_same_space_without_a_mistake_trains(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "good.py").write_text(SPACE.format(wrong='"freeze_depth": -1'))
    monkeypatch.chdir(folder)
    assert main(["train", "good.py", "--data", str(photos), "--runs-dir", "fine"]) == 0


def test_a_name_that_the_configuration_lacks_is_told_with_those_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "space.py"
    file.write_text("from tuneapp.config import AdamW, Cosin\n")
    assert main(["show", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file}:1: cannot import name 'Cosin' from 'tuneapp.config'" in error
    assert "Cosine, CosineRestarts" in error
