"""Fixtures: small real images, and nothing of the user's own touched."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch

import numpy as np
import pytest
import torch
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from tuneapp.config import AdamW, Constant, Data, RunSettings, TrialConfig
from tuneapp.data.examples import ImageSet
from tuneapp.data.source import read_images
from tuneapp.trial import TrialRun

COLOURS = {"blue": (30, 40, 220), "green": (30, 200, 40), "red": (220, 40, 30)}


class RayTogether(LoadScopeScheduling):
    """Gives the files with tests of Ray to one worker, from the start, and spreads all others.

    Two at once would starve each other, and make the sweeps that several tests look at twice.
    (xdist's own `loadgroup` groups nothing with pytest 9.2.)
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        root = Path(__file__).parent
        self._with_ray = {
            path.relative_to(root.parent).as_posix()
            for path in root.rglob("test_*.py")
            if "pytest.mark.ray" in path.read_text()
        }

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.partition("::")[0] in self._with_ray else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayTogether:
    """Schedule the tests of `pytest -n 2`."""
    return RayTogether(config, log)


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
    return read_images(Data(source=str(photos)), seed=0)


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


SMALL_SPACE = '''"""A space whose trials take a second.

    python -m tuneapp sweep small.py --data photos
"""
from optuna import Trial

from tuneapp.config import AdamW, Cosine, Sgd, TrialConfig

FIRST_TRIALS = [
    {"freeze_depth": 5, "lr_ratio": 1.0, "optimizer": "adamw", "adamw.lr": 1e-2},
    {"freeze_depth": 5, "lr_ratio": 1.0, "optimizer": "sgd", "sgd.lr": 1e-2},
]


def search_space(trial: Trial) -> TrialConfig:
    depth = trial.suggest_int("freeze_depth", 4, 5)
    if trial.suggest_categorical("optimizer", ["adamw", "sgd"]) == "adamw":
        optimizer = AdamW(lr=trial.suggest_float("adamw.lr", 1e-4, 1e-1, log=True))
    else:
        optimizer = Sgd(lr=trial.suggest_float("sgd.lr", 1e-4, 1e-1, log=True))
    return TrialConfig(
        model="resnet18",
        weights=None,
        image_size=32,
        epochs=4,
        batch_size=8,
        freeze_depth=depth,
        lr_ratio=trial.suggest_float("lr_ratio", 0.1, 1.0, log=True),
        optimizer=optimizer,
        schedule=Cosine(warmup_fraction=0.1),
    )
'''


@pytest.fixture(scope="session")
def small_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("space") / "small.py"
    file.write_text(SMALL_SPACE)
    return file


@pytest.fixture(scope="session")
def tuneapp(_caches: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a starter of `python -m tuneapp ...` in a session of its own."""

    def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tuneapp", *map(str, words)],
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={
                **os.environ,
                "TUNEAPP_CACHE": str(_caches / "tuneapp"),
                "TORCH_HOME": str(_caches / "torch"),
                "COLUMNS": "200",
            },
        )

    return start


@pytest.fixture(scope="session")
def finished_sweep(
    tmp_path_factory: pytest.TempPathFactory,
    tuneapp: Callable[..., subprocess.Popen[str]],
    small_space: Path,
    photos: Path,
) -> dict[str, Any]:
    """Run one real sweep of eight trials; return its directory, exit code and output."""
    cwd = tmp_path_factory.mktemp("sweep")
    words = ["sweep", small_space, "--data", photos, "--trials", 8, "--name", "done"]
    process = tuneapp(*words, "--concurrent", 2, cwd=cwd)
    out, err = process.communicate(timeout=170)
    run = cwd / "runs" / "done"
    return {"run": run, "code": process.returncode, "out": out, "err": err}


def read_ledger(run: Path) -> list[dict[str, Any]]:
    """Return a ledger's events without tuneapp's own reader."""
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
