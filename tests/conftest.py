"""Fixtures: small real images, and nothing of the user's own touched."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tuneapp.config import AdamW, Constant, RunSettings, TrialConfig
from tuneapp.data.source import ImageSet, read_images
from tuneapp.trial import TrialRun

COLOURS = {"blue": (30, 40, 220), "green": (30, 200, 40), "red": (220, 40, 30)}


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def own_caches(_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep decoded images and weights of the tests apart from the user's."""
    monkeypatch.setenv("TUNEAPP_CACHE", str(_caches / "tuneapp"))
    monkeypatch.setenv("TORCH_HOME", str(_caches / "torch"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_photos() -> Callable[..., Path]:
    """Return a maker of image folders: noisy colours, JPEG and PNG, of several shapes."""

    def make(root: Path, per_class: int = 10, seed: int = 0, split: bool = False) -> Path:
        rng = np.random.default_rng(seed)
        for part in ("train", "val", "test") if split else ("",):
            for name, colour in COLOURS.items():
                folder = root / part / name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    shape = [(40, 48), (48, 40), (64, 64)][i % 3]
                    noise = rng.integers(-30, 30, (*shape, 3))
                    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                    ending = "png" if i % 2 else "jpg"
                    Image.fromarray(pixels).save(folder / f"{i:02d}.{ending}")
        return root

    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[..., Path]) -> Path:
    """An unsplit folder of three colours, 10 images each."""
    return make_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="session")
def images(photos: Path) -> ImageSet:
    return read_images(str(photos), seed=0)


@pytest.fixture
def config() -> TrialConfig:
    """The smallest real training: the head of a ResNet-18 at 32 pixels."""
    return TrialConfig(
        model="resnet18",
        weights=None,
        image_size=32,
        epochs=2,
        batch_size=8,
        freeze_depth=5,
        optimizer=AdamW(lr=1e-2),
        schedule=Constant(),
    )


@pytest.fixture
def run(images: ImageSet) -> TrialRun:
    """Runs a trial on the photos without leaving files."""
    return TrialRun(settings=RunSettings(), images=images, params={})
