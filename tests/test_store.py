import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights, ResNet50_Weights
from torchvision.transforms.v2 import functional as TF

import tuneapp
import tuneapp.data.store as store_module
from tests.states import config_of
from tuneapp.config import Data
from tuneapp.data.batches import Batches
from tuneapp.data.cache import cache_dir
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.reading import open_image
from tuneapp.data.source import read_images
from tuneapp.data.store import Preprocessing, open_store
from tuneapp.data.views import evaluation_view
from tuneapp.errors import DataError
from tuneapp.weights import preprocessing_of

SMALL = Preprocessing(20, 16, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

# Height and width: landscape, portrait, square, exactly the crop, thin, odd, smaller than asked.
SHAPES = [(300, 401), (401, 300), (256, 256), (224, 224), (90, 610), (257, 511), (31, 45)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TUNEAPP_CACHE", str(folder))
    return folder


def noise(shape: tuple[int, int], seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)


def example_of(root: Path, name: str, label: int, split: str) -> Example:
    return Example(name, label, split, (root / name).stat().st_size)


@pytest.fixture
def photos_of_all_shapes(tmp_path: Path) -> ImageSet:
    root = tmp_path / "photos"
    root.mkdir()
    examples = []
    for i, shape in enumerate(SHAPES):
        for ending in ("jpg", "png"):
            name = f"{i}.{ending}"
            noise(shape, seed=i).save(root / name)
            examples.append(example_of(root, name, i % 2, "train" if i == 0 else "val"))
    return ImageSet(root, ("even", "odd"), tuple(examples))


@pytest.fixture
def twelve(tmp_path: Path) -> ImageSet:
    """Eight for training, two for validation, two for the test, no two of one shape."""
    root = tmp_path / "twelve"
    root.mkdir()
    splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    for i in range(12):
        noise((24 + i, 40 - i), seed=i).save(root / f"{i:02d}.png")
    examples = [example_of(root, f"{i:02d}.png", i % 2, s) for i, s in enumerate(splits)]
    return ImageSet(root, ("even", "odd"), tuple(examples))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were decoded, in the order in which it happened."""
    paths: list[str] = []
    really_open = ImageSet.open

    def spy(images: ImageSet, example: Example) -> Image.Image:
        paths.append(example.path)
        return really_open(images, example)

    monkeypatch.setattr(ImageSet, "open", spy)
    return paths


def stores(cache: Path) -> list[Path]:
    return [p for p in cache.iterdir() if p.is_dir()]


def litter(cache: Path) -> list[str]:
    """What lies in the cache besides whole stores and their locks."""
    return [p.name for p in cache.iterdir() if not p.name.startswith("store-")]


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("resnet18", ResNet18_Weights.DEFAULT),
        ("resnet50", ResNet50_Weights.IMAGENET1K_V2),  # resized to 232 where others are to 256
    ],
)
def test_validation_pixels_are_torchvisions_own_to_the_last_bit(
    model: str, weights: ResNet18_Weights, photos_of_all_shapes: ImageSet
) -> None:
    images = photos_of_all_shapes
    preprocessing = preprocessing_of(config_of(model, weights=weights.name), None)
    batches = Batches(
        open_store(images, preprocessing),
        "val",
        view=evaluation_view(preprocessing),
        preprocessing=preprocessing,
        batch_size=5,
        device=torch.device("cpu"),
    )
    pixels, labels = (torch.cat(parts) for parts in zip(*batches.epoch(1), strict=True))
    preset = weights.transforms()
    val = images.of("val")
    assert pixels.shape == (len(val), 3, 224, 224)
    for i, example in enumerate(val):
        with Image.open(images.root / example.path) as file:
            wanted = preset(file.convert("RGB"))
        assert torch.equal(pixels[i], wanted), example.path
        assert labels[i] == example.label


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_stored_image_is_the_resized_file_whatever_the_chunks(
    interpolation: str, twelve: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_CHUNK", 3)
    store = open_store(twelve, replace(SMALL, interpolation=interpolation))
    for i, example in enumerate(twelve.of("train", "val")):
        resized = TF.resize(twelve.open(example), [20], TF.InterpolationMode(interpolation))
        assert torch.equal(store.image(i), TF.pil_to_tensor(resized)), example.path
        assert min(store.image(i).shape[1:]) == 20


def test_the_embedded_scans_are_stored_like_files() -> None:
    images = ImageSet(None, tuple("0123456789"), (Example("0007.png", 7, "train", 0),))
    store = open_store(images, SMALL)
    wanted = TF.pil_to_tensor(TF.resize(open_image(images, images.examples[0]), [20]))
    assert torch.equal(store.image(0), wanted)


def test_writing_to_an_image_changes_neither_the_store_nor_its_file(
    twelve: ImageSet, cache: Path
) -> None:
    store = open_store(twelve, SMALL)
    (folder,) = stores(cache)
    before, bytes_before = store.image(3).clone(), (folder / "pixels.bin").read_bytes()
    store.image(3).fill_(77)
    assert torch.equal(store.image(3), before)
    assert (folder / "pixels.bin").read_bytes() == bytes_before
    assert torch.equal(open_store(twelve, SMALL).image(3), before)


def test_the_pixels_are_mapped_read_only(twelve: ImageSet) -> None:
    store = open_store(twelve, SMALL)
    assert isinstance(store._pixels, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store._pixels[0] = 1


def test_images_of_the_test_split_are_not_even_opened(
    twelve: ImageSet, decoded: list[str], cache: Path
) -> None:
    for example in twelve.of("test"):
        (twelve.root / example.path).write_text("not an image at all")
    store = open_store(twelve, SMALL)
    assert sorted(decoded) == [e.path for e in twelve.of("train", "val")]
    assert store.indices("train").tolist() == list(range(8))
    assert store.indices("val").tolist() == [8, 9]
    assert store.labels.tolist() == [0, 1] * 5
    assert len(np.load(stores(cache)[0] / "shapes.npy")) == 10
    with pytest.raises(KeyError):
        store.indices("test")


def test_a_second_trial_decodes_nothing(twelve: ImageSet, decoded: list[str], cache: Path) -> None:
    first = open_store(twelve, SMALL)
    assert Counter(decoded) == Counter(e.path for e in twelve.of("train", "val"))
    decoded.clear()
    second = open_store(twelve, SMALL)
    assert decoded == []
    assert all(torch.equal(first.image(i), second.image(i)) for i in range(10))
    assert len(stores(cache)) == 1


@pytest.mark.parametrize(
    ("change", "made_anew"),
    [
        ({"resize_size": 24}, True),
        ({"interpolation": "bicubic"}, True),
        # The crop and the normalisation are done after the store: all such trials share one.
        ({"crop_size": 20}, False),
        ({"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, False),
    ],
)
def test_only_another_resizing_makes_another_store(
    change: dict[str, object], made_anew: bool, twelve: ImageSet, decoded: list[str]
) -> None:
    open_store(twelve, SMALL)
    decoded.clear()
    open_store(twelve, replace(SMALL, **change))
    assert len(decoded) == (10 if made_anew else 0)


def test_a_changed_file_makes_a_new_store(twelve: ImageSet) -> None:
    before = open_store(twelve, SMALL).image(4)
    file = twelve.root / twelve.examples[4].path
    changed_at = file.stat().st_mtime + 10
    noise((30, 30), seed=99).save(file)
    os.utime(file, (changed_at, changed_at))
    after = open_store(twelve, SMALL).image(4)
    assert not torch.equal(after, before)
    assert torch.equal(after, TF.pil_to_tensor(TF.resize(noise((30, 30), seed=99), [20])))


def test_the_same_names_in_another_folder_are_another_store(
    twelve: ImageSet, tmp_path: Path
) -> None:
    before = open_store(twelve, SMALL).image(0)
    other = tmp_path / "other"
    other.mkdir()
    for example in twelve.examples:
        file = twelve.root / example.path
        content = file.read_bytes()
        if example.path == "00.png":
            noise((24, 40), seed=50).save(other / example.path)
        else:
            (other / example.path).write_bytes(content)
        os.utime(other / example.path, ns=(0, file.stat().st_mtime_ns))
    theirs = ImageSet(other, twelve.classes, twelve.examples)
    assert not torch.equal(open_store(theirs, SMALL).image(0), before)


OPEN_AT_ONCE = """
import os, sys
from pathlib import Path
from tuneapp.data.examples import ImageSet
from tuneapp.data.split import read_split
from tuneapp.data.store import Preprocessing, open_store

decoded = []
really_open = ImageSet.open
ImageSet.open = lambda images, e: decoded.append(e.path) or really_open(images, e)
images = read_split(Path(sys.argv[1]), Path(sys.argv[2]), ["even", "odd"])
hold, go = os.pipe()
children = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.read(hold, 1)  # returns for both at once, when the parent closes its end
        store = open_store(images, Preprocessing(20, 16, "bilinear", (0.5,) * 3, (0.25,) * 3))
        pixels = sum(int(store.image(i).sum()) for i in range(len(images.examples)))
        os.write(1, f"{len(decoded)} {pixels}\\n".encode())
        os._exit(0)
    children.append(pid)
os.close(go)
for pid in children:
    os.waitpid(pid, 0)
"""


def test_two_processes_at_once_decode_each_image_once(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    lines = ["path,class,split,bytes"]
    for i in range(60):
        noise((60, 60), seed=i).save(root / f"{i}.png")
        lines.append(f"{i}.png,even,train,{(root / f'{i}.png').stat().st_size}")
    (tmp_path / "split.csv").write_text("\n".join(lines) + "\n")
    # A new interpreter, so that only what is forked there is shared; its two children are what
    # two trials of a sweep are.
    done = subprocess.run(
        [sys.executable, "-c", OPEN_AT_ONCE, str(tmp_path / "split.csv"), str(root)],
        cwd=Path(tuneapp.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    decoded, sums = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert sorted(map(int, decoded)) == [0, 60]
    assert sums[0] == sums[1]
    assert len(stores(cache)) == 1
    assert litter(cache) == []


def test_all_unreadable_images_are_named_and_nothing_is_left(twelve: ImageSet, cache: Path) -> None:
    names = ["01.png", "05.png", "09.png"]
    for name in names:
        (twelve.root / name).write_bytes(b"\x89PNG but no more")
    with pytest.raises(DataError, match=r"^3 of 10 images") as caught:
        open_store(twelve, SMALL)
    assert all(name in str(caught.value) for name in names)
    assert stores(cache) == []
    assert litter(cache) == []


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_with_the_way_out_and_nothing_is_left(
    twelve: ImageSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(DataError, match=r"No space left .* TUNEAPP_CACHE"):
            open_store(twelve, SMALL)
    assert stores(cache) == []
    assert litter(cache) == []
    assert len(open_store(twelve, SMALL).labels) == 10


@pytest.mark.parametrize("fails", ["decoding", "replacing"])
def test_an_interrupted_making_leaves_nothing_and_the_next_one_succeeds(
    fails: str, twelve: ImageSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = ImageSet.open

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def open_some(images: ImageSet, example: Example) -> Image.Image:
        if example.path == "06.png":
            interrupt()
        return really_open(images, example)

    with monkeypatch.context() as patch:
        if fails == "decoding":
            patch.setattr(ImageSet, "open", open_some)
        else:
            patch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store(twelve, SMALL)
    assert stores(cache) == []
    assert litter(cache) == []
    wanted = TF.pil_to_tensor(TF.resize(twelve.open(twelve.examples[7]), [20]))
    assert torch.equal(open_store(twelve, SMALL).image(7), wanted)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("TUNEAPP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, "{home}/.cache/tuneapp"),
        ({"XDG_CACHE_HOME": "/var/xdg"}, "/var/xdg/tuneapp"),
        ({"XDG_CACHE_HOME": "/var/xdg", "TUNEAPP_CACHE": "~/mine"}, "{home}/mine"),
    ],
)
def test_the_cache_lies_where_the_environment_says(
    environment: dict[str, str], wanted: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(wanted.format(home=home))


def test_an_image_that_has_gone_is_named(make_photos: Callable[..., Path], tmp_path: Path) -> None:
    images = read_images(Data(source=str(make_photos(tmp_path / "photos"))), seed=0)
    (gone,) = images.of("train")[:1]
    (tmp_path / "photos" / gone.path).unlink()
    with pytest.raises(DataError, match=gone.path):
        open_store(images, Preprocessing(32, 32, "bilinear", (0.5,) * 3, (0.5,) * 3))
