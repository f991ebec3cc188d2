import errno
import importlib
import itertools
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.models import ResNet18_Weights, ResNet50_Weights
from torchvision.transforms.v2 import functional as TF

import tuneapp
from tests.states import config_of
from tuneapp.config import Data
from tuneapp.data import decoding, reading
from tuneapp.data.batches import Batches
from tuneapp.data.cache import cache_dir
from tuneapp.data.decode import Header
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.reading import open_image
from tuneapp.data.sampling import InOrder, Shuffled
from tuneapp.data.source import read_images
from tuneapp.data.split import require_usable, split
from tuneapp.data.store import Store, checked_apart, open_store
from tuneapp.data.views import KeyedViews, evaluation_view, training_view
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
    now = (root / name).stat()
    return Example(name, label, split, now.st_size, modified_ns=now.st_mtime_ns)


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
    """The names of the files that were read to be decoded, in the order in which it happened."""
    names: list[str] = []
    really_read = decoding.read_bytes

    def spy(path: Path) -> bytes:
        names.append(path.name)
        return really_read(path)

    monkeypatch.setattr(decoding, "read_bytes", spy)
    return names


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose headers were read."""
    names: list[str] = []
    really_read = decoding.read_header

    def spy(path: Path) -> Header:
        names.append(path.name)
        return really_read(path)

    monkeypatch.setattr(decoding, "read_header", spy)
    return names


def stores(cache: Path) -> list[Path]:
    return [p for p in cache.iterdir() if p.is_dir() and p.name.startswith("store-")]


def litter(cache: Path) -> list[str]:
    """What lies in the cache besides whole stores and their locks."""
    return [p.name for p in cache.iterdir() if not p.name.startswith(("store-", "index-"))]


def same_images(a: Store, b: Store) -> bool:
    count = len(a.labels)
    return count == len(b.labels) and all(torch.equal(a.image(i), b.image(i)) for i in range(count))


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
    store = open_store(images, preprocessing)
    batches = Batches(
        store,
        InOrder(store, "val"),
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
    monkeypatch.setattr(decoding, "CHUNK", 3)
    store = open_store(twelve, replace(SMALL, interpolation=interpolation))
    for i, example in enumerate(twelve.of("train", "val")):
        resized = TF.resize(open_image(twelve, example), [20], TF.InterpolationMode(interpolation))
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
    assert isinstance(store.pixels._pixels, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.pixels._pixels[0] = 1
    assert {oct(file.stat().st_mode & 0o777) for file in store.folder.iterdir()} == {"0o444"}


def test_images_of_the_test_split_are_not_even_opened(
    twelve: ImageSet, decoded: list[str], measured: list[str], cache: Path
) -> None:
    for example in twelve.of("test"):
        (twelve.root / example.path).write_text("not an image at all")
    store = open_store(twelve, SMALL)
    assert sorted(decoded) == sorted(measured) == [e.path for e in twelve.of("train", "val")]
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
    assert torch.equal(after, before)  # the run goes on with the images that it began with
    now = file.stat()
    changed = replace(twelve.examples[4], num_bytes=now.st_size, modified_ns=now.st_mtime_ns)
    anew = replace(twelve, examples=(*twelve.examples[:4], changed, *twelve.examples[5:]))
    after = open_store(anew, SMALL).image(4)
    assert not torch.equal(after, before)
    assert torch.equal(after, TF.pil_to_tensor(TF.resize(noise((30, 30), seed=99), [20])))


@pytest.mark.parametrize("change", [{"num_bytes": 1}, {"modified_ns": 1}])
def test_a_file_of_another_size_or_time_makes_a_new_store(
    change: dict[str, int], twelve: ImageSet, decoded: list[str]
) -> None:
    open_store(twelve, SMALL)
    decoded.clear()
    changed = (*twelve.examples[:9], replace(twelve.examples[9], **change), *twelve.examples[10:])
    open_store(replace(twelve, examples=changed), SMALL)
    assert len(decoded) == 10


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
    theirs = ImageSet(other, twelve.classes, twelve.examples)  # the same sizes and times, too
    assert not torch.equal(open_store(theirs, SMALL).image(0), before)


OPEN_AT_ONCE = """
import os, sys
from pathlib import Path
from tuneapp.data import decoding
from tuneapp.data.split import read_split
from tuneapp.data.split import require_usable, split, write_split
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.store import Store, checked_apart, open_store

decoded = []
really_decode = decoding.decode
decoding.decode = lambda content: decoded.append(1) or really_decode(content)
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


def test_unreadable_images_are_recorded_and_end_nothing(twelve: ImageSet, cache: Path) -> None:
    spoilt = {"01.png": b"\x89PNG but no more", "05.png": b"", "09.png": b"%PDF-1.7"}
    for name, content in spoilt.items():
        (twelve.root / name).write_bytes(content)
    store = open_store(twelve, SMALL)
    causes = {1: "is not an image", 5: "is empty: 0 bytes", 9: "is not an image, but a PDF"}
    assert store.causes == causes
    assert np.flatnonzero(store.bad).tolist() == [1, 5, 9]
    assert store.indices("train").tolist() == [0, 2, 3, 4, 6, 7]
    assert store.bad_indices("train").tolist() == [1, 5]
    assert store.indices("val").tolist() == [8]
    assert store.bad_indices("val").tolist() == [9]
    assert litter(cache) == []


def test_the_stamped_set_has_every_cause_and_the_digest_of_every_content(twelve: ImageSet) -> None:
    (twelve.root / "01.png").write_bytes(b"\x89PNG but no more")
    (twelve.root / "05.png").write_bytes(b"")
    stamped = checked_apart(
        open_store(twelve, SMALL).stamped(twelve), SMALL, "test", lambda what, done, total: None
    )
    assert [e.path for e in stamped.examples] == [e.path for e in twelve.examples]
    for e in stamped.examples:
        content = (twelve.root / e.path).read_bytes()
        wanted = blake2b(content, digest_size=16).hexdigest() if content else ""
        assert e.digest == wanted, e.path
    bad = {e.path: e.bad for e in stamped.examples if e.bad}
    assert bad == {"01.png": "is not an image", "05.png": "is empty: 0 bytes"}
    without = [replace(e, digest="", bad="") for e in stamped.examples]
    assert tuple(without) == twelve.examples
    assert stamped.counts("train") == [4, 2]


def test_what_another_preprocessing_cannot_use_is_bad_in_this_store_too(twelve: ImageSet) -> None:
    examples = tuple(
        replace(e, bad="is a strip") if e.path in ("03.png", "11.png") else e
        for e in twelve.examples
    )
    store = open_store(replace(twelve, examples=examples), SMALL)
    assert store.causes == {}
    assert store.bad_indices("train").tolist() == [3]
    assert 3 not in store.indices("train")


def test_one_unreadable_image_is_an_error_only_where_it_is_asked_to_be(twelve: ImageSet) -> None:
    (twelve.root / "02.png").write_text("no image")
    stamped = open_store(twelve, SMALL).stamped(twelve)
    require_usable(stamped)
    strict = replace(stamped, data=Data(source="x", bad_images="error"))
    with pytest.raises(DataError, match=r"^1 of 12 images cannot be read: 02\.png is not an image"):
        require_usable(strict)


def test_a_class_that_is_gone_with_its_unreadable_images_is_named(twelve: ImageSet) -> None:
    (twelve.root / "09.png").write_text("no image")
    with pytest.raises(
        DataError, match=r"^without the 1 images .*09\.png.*no image of odd.* in val"
    ):
        require_usable(open_store(twelve, SMALL).stamped(twelve))


def test_a_set_without_one_readable_image_is_told_and_not_a_crash(twelve: ImageSet) -> None:
    for example in twelve.examples:
        (twelve.root / example.path).write_text("no image")
    store = open_store(twelve, SMALL)
    assert store.bad.all()
    with pytest.raises(DataError, match="without the 10 images that cannot be read"):
        require_usable(store.stamped(twelve))


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fails", [(os, "fsync"), (os, "pwrite"), (np, "save")])
def test_a_full_disk_is_told_with_the_way_out_and_nothing_is_left(
    fails: tuple[object, str], twelve: ImageSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*fails, full_disk)
        with pytest.raises(DataError, match=r"No space left .* TUNEAPP_CACHE"):
            open_store(twelve, SMALL)
    assert stores(cache) == []
    assert litter(cache) == []
    assert len(open_store(twelve, SMALL).labels) == 10


@pytest.mark.parametrize("fails", ["decoding", "replacing"])
def test_an_interrupted_making_leaves_nothing_and_the_next_one_succeeds(
    fails: str, twelve: ImageSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_read = decoding.read_bytes

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def read_some(path: Path) -> bytes:
        if path.name == "06.png":
            interrupt()
        return really_read(path)

    with monkeypatch.context() as patch:
        if fails == "decoding":
            patch.setattr(decoding, "read_bytes", read_some)
        else:
            patch.setattr(Path, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store(twelve, SMALL)
    assert stores(cache) == []
    assert litter(cache) == []
    wanted = TF.pil_to_tensor(TF.resize(open_image(twelve, twelve.examples[7]), [20]))
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


def test_an_image_that_has_gone_is_recorded_by_its_cause(
    make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    images = read_images(Data(source=str(make_photos(tmp_path / "photos"))), seed=0)
    (gone,) = images.of("train")[:1]
    (tmp_path / "photos" / gone.path).unlink()
    store = open_store(images, SMALL)
    index = [e.path for e in images.of("train", "val")].index(gone.path)
    assert store.causes == {index: "cannot be read: No such file or directory"}


# --- Broken images change nothing of the others ---------------------------------------------------


def spoil(file: Path, how: int) -> None:
    content = file.read_bytes()
    file.write_bytes([content[: len(content) // 2], b"", b"text", content[:20]][how % 4])


def many_photos(root: Path) -> Path:
    for i in range(200):
        folder = root / ("even" if i % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        noise((24 + i % 5, 24 + i % 7), seed=i).save(folder / f"{i:03d}.png")
    return root


@pytest.mark.parametrize("num_broken", [2, 20])
def test_broken_images_change_neither_the_split_nor_the_place_or_view_of_any_other(
    num_broken: int, tmp_path: Path
) -> None:
    clean_root = many_photos(tmp_path / "clean")
    broken_root = Path(shutil.copytree(clean_root, tmp_path / "broken"))
    files = sorted(broken_root.rglob("*.png"))
    chosen = np.random.default_rng(num_broken).choice(len(files), num_broken, replace=False)
    for number, position in enumerate(chosen.tolist()):
        spoil(files[position], number)
    broken = {files[position].relative_to(broken_root).as_posix() for position in chosen}

    clean, spoilt = (
        read_images(Data(source=str(root)), seed=3) for root in (clean_root, broken_root)
    )
    assert [(e.path, e.label, e.split) for e in spoilt.examples] == [
        (e.path, e.label, e.split) for e in clean.examples
    ]
    first, second = open_store(clean, SMALL), open_store(spoilt, SMALL)
    used = [e.path for e in clean.of("train", "val")]
    assert {used[i] for i in second.causes} == broken & set(used)
    assert second.causes
    readable = [i for i, path in enumerate(used) if path not in broken]
    assert all(torch.equal(first.image(i), second.image(i)) for i in readable)
    assert torch.equal(first.labels, second.labels)
    draws = [Shuffled(store, config_of(), seed=5).draw(2) for store in (first, second)]
    keys = [dict(zip(d.indices.tolist(), d.seeds.tolist(), strict=True)) for d in draws]
    assert keys[1] == {i: seed for i, seed in keys[0].items() if i not in second.causes}
    view = training_view("strong", SMALL)
    for index, seed in itertools.islice(keys[1].items(), 30):
        views = [KeyedViews(store.pixels, view)[index, seed] for store in (first, second)]
        assert torch.equal(*views)


# --- Budgets --------------------------------------------------------------------------------------


def bytes_of(images: ImageSet) -> int:
    """What the pixels of a store take, from the sizes that torchvision makes."""
    resized = [TF.resize(open_image(images, e), [20]) for e in images.of("train", "val")]
    return sum(image.width * image.height * 3 for image in resized)


def test_a_set_that_does_not_fit_the_budget_is_streamed_with_the_same_pixels(
    twelve: ImageSet, cache: Path
) -> None:
    needed = bytes_of(twelve)
    streamed = open_store(twelve, SMALL, needed - 1)
    assert streamed.is_streamed
    assert [p.name[:6] for p in cache.iterdir() if p.is_dir()] == ["index-"]
    stored = open_store(twelve, SMALL, needed)
    assert not stored.is_streamed
    assert same_images(streamed, stored)
    assert torch.equal(streamed.labels, stored.labels)
    assert (stored.folder / "pixels.bin").stat().st_size == needed


def test_an_index_knows_what_cannot_be_read_and_is_used_again(
    twelve: ImageSet, decoded: list[str], measured: list[str]
) -> None:
    content = (twelve.root / "04.png").read_bytes()
    (twelve.root / "04.png").write_bytes(content[: len(content) // 2])
    first = open_store(twelve, SMALL, budget=10)
    assert list(first.causes) == [4]
    assert len(decoded) == len(measured) == 10
    second = open_store(twelve, SMALL, budget=10)
    assert len(decoded) == len(measured) == 10
    assert second.is_streamed
    assert second.causes == first.causes
    assert second.stamped(twelve) == first.stamped(twelve)


def test_an_index_is_no_copy_of_the_pixels(twelve: ImageSet, cache: Path) -> None:
    store = open_store(twelve, SMALL, budget=0)
    assert sorted(p.name for p in store.folder.iterdir()) == [
        "bad.json",
        "digests.npy",
        "shapes.npy",
    ]
    shapes = np.load(store.folder / "shapes.npy")
    assert shapes.tolist() == [list(store.image(i).shape[1:]) for i in range(10)]


def test_a_streamed_image_that_has_gone_is_named(twelve: ImageSet) -> None:
    store = open_store(twelve, SMALL, budget=0)
    (twelve.root / "03.png").unlink()
    with pytest.raises(DataError, match=r"twelve/03\.png cannot be read: No such file"):
        store.image(3)


def aged(folder: Path, hours: float) -> Path:
    long_ago = time.time() - 3600 * hours
    os.utime(folder, (long_ago, long_ago))
    return folder


def test_idle_stores_make_room_oldest_first_and_used_ones_stay(
    twelve: ImageSet, cache: Path
) -> None:
    sizes = {short_side: replace(SMALL, resize_size=short_side) for short_side in (20, 21, 22, 23)}
    folders = {side: open_store(twelve, sizes[side]).folder for side in (20, 21, 22)}
    aged(folders[20], 30)
    aged(folders[21], 50)
    aged(folders[22], 23)
    taken = {side: (f / "pixels.bin").stat().st_size for side, f in folders.items()}
    # Room for all but one of them besides the new one: the one idle for longest goes.
    probe = open_store(twelve, sizes[23], budget=0)
    needed = int(np.load(probe.folder / "shapes.npy").prod(axis=1).sum() * 3)
    new = open_store(twelve, sizes[23], budget=taken[20] + taken[22] + needed)
    assert not new.is_streamed
    assert set(stores(cache)) == {folders[20], folders[22], new.folder}

    # Those used within a day stay, and what has no room beside them is streamed.
    other = open_store(twelve, sizes[21], budget=taken[22] + needed + taken[21] - 1)
    assert other.is_streamed
    assert set(stores(cache)) == {folders[20], folders[22], new.folder}
    last = open_store(twelve, sizes[21], budget=taken[22] + needed + taken[21])
    assert not last.is_streamed
    assert set(stores(cache)) == {folders[22], new.folder, last.folder}


def test_opening_a_store_makes_it_used(twelve: ImageSet, cache: Path) -> None:
    folder = aged(open_store(twelve, SMALL).folder, 100)
    open_store(twelve, SMALL)
    assert open_store(twelve, replace(SMALL, resize_size=24), budget=0).is_streamed
    assert stores(cache) == [folder]


def test_without_a_budget_a_set_may_take_half_of_what_is_free(
    twelve: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = bytes_of(twelve)
    for free, is_streamed in ((2 * needed - 2, True), (2 * needed, False)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert open_store(twelve, SMALL).is_streamed == is_streamed


# --- Labels and sources ---------------------------------------------------------------------------


def test_several_labels_of_an_image_are_ones_in_its_row(twelve: ImageSet) -> None:
    labels = [(0, 2), (), (1,), (0, 1, 2), (2,), (0,), (1, 2), (), (0,), (1,), (2,), (0,)]
    examples = tuple(
        replace(e, label=shown) for e, shown in zip(twelve.examples, labels, strict=True)
    )
    images = ImageSet(twelve.root, ("a", "b", "c"), examples, is_multilabel=True)
    store = open_store(images, SMALL)
    assert store.labels.dtype == torch.float32
    assert store.labels.tolist() == [[float(c in shown) for c in range(3)] for shown in labels[:10]]


def test_the_weights_of_examples_are_those_of_the_set(twelve: ImageSet) -> None:
    weights = [0.0, 0.5, *range(2, 12)]
    examples = tuple(replace(e, weight=w) for e, w in zip(twelve.examples, weights, strict=True))
    assert open_store(replace(twelve, examples=examples), SMALL).weights.tolist() == weights[:10]


@pytest.mark.parametrize("budget", [None, 3000])
def test_the_embedded_scans_are_stored_or_streamed_alike(budget: int | None, cache: Path) -> None:
    images = split(
        ImageSet(
            None,
            tuple("0123456789"),
            tuple(Example(f"{i:04d}.png", i % 10, "train", 0) for i in range(100)),
        ),
        seed=0,
    )
    store = open_store(images, SMALL, budget)
    assert store.is_streamed == (budget is not None)
    for i, example in enumerate(images.of("train", "val")):
        wanted = TF.pil_to_tensor(TF.resize(open_image(images, example), [20]))
        assert torch.equal(store.image(i), wanted)
    assert not store.bad.any()
    assert litter(cache) == []


OWN_DATA = """
import numpy as np
from PIL import Image

class Photos:
    targets = [0, 1] * 10

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 4:
            raise OSError("disk error")
        if index == 7:
            return np.zeros((3, 3), dtype=np.float32), 1
        shade = np.full((20 + index, 30, 3), SHADE + index, dtype=np.uint8)
        return (Image.fromarray(shade) if index % 2 else shade), index % 2

def photos():
    return Photos()
"""


@pytest.mark.parametrize("budget", [None, 3000])
def test_what_a_dataset_gives_is_stored_or_streamed_and_its_bad_examples_recorded(
    budget: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_photos.py").write_text(f"SHADE = 100\n{OWN_DATA}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_photos", raising=False)
    reading._opener.cache_clear()
    images = read_images(Data(source="own_photos:photos"), seed=0)
    told: list[tuple[str, int, int]] = []
    store = open_store(images, SMALL, budget, lambda *words: told.append(words))
    assert store.is_streamed == (budget is not None)
    used = images.of("train", "val")
    bad = {used[i].path[-2:]: cause for i, cause in store.causes.items()}
    wanted = {
        "04": "cannot be read: OSError: disk error (own_photos.py:14)",
        "07": "is float32; a Dataset must give PIL images, or uint8 tensors or arrays",
    }
    assert bad == {p: c for p, c in wanted.items() if f"train/00000{p}" in {e.path for e in used}}
    assert bad
    for i in store.indices("train").tolist():
        shade = 100 + int(used[i].path[-2:])
        assert int(store.image(i).min()) == int(store.image(i).max()) == shade
    stamped = store.stamped(images)
    readable = [e for e in stamped.of("train", "val") if not e.bad]
    assert len({e.digest for e in readable}) == len(readable)
    assert {len(e.digest) for e in readable} == {32}
    assert {total for _, _, total in told} == {len(used)}

    # The same names with other pixels are another store.
    (tmp_path / "own_photos.py").write_text(f"SHADE = 50\n{OWN_DATA}")
    monkeypatch.delitem(sys.modules, "own_photos")
    importlib.invalidate_caches()
    reading._opener.cache_clear()
    index = int(store.indices("train")[0])
    anew = open_store(read_images(Data(source="own_photos:photos"), seed=0), SMALL, budget)
    assert int(anew.image(index).max()) == 50 + int(used[index].path[-2:])
    reading._opener.cache_clear()


# --- Processes ------------------------------------------------------------------------------------


@pytest.fixture
def with_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PROCESSES_FROM", 10)
    monkeypatch.setattr(decoding, "CHUNK", 4)


def test_processes_make_the_store_that_threads_make(
    twelve: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    content = (twelve.root / "04.png").read_bytes()
    (twelve.root / "04.png").write_bytes(content[: len(content) // 2])
    (twelve.root / "07.png").write_bytes(b"")
    by_threads = open_store(twelve, SMALL).folder
    request.getfixturevalue("with_processes")
    monkeypatch.setenv("TUNEAPP_CACHE", str(tmp_path / "by_processes"))
    executors = []
    really = decoding._executor

    def spy(num_files: int) -> Executor:
        executors.append(really(num_files))
        return executors[-1]

    monkeypatch.setattr(decoding, "_executor", spy)
    told: list[tuple[str, int, int]] = []
    by_processes = open_store(twelve, SMALL, watch=lambda *words: told.append(words)).folder
    assert {type(executor) for executor in executors} == {ProcessPoolExecutor}
    assert by_processes.name == by_threads.name
    for file in ("shapes.npy", "digests.npy", "bad.json", "pixels.bin"):
        assert (by_processes / file).read_bytes() == (by_threads / file).read_bytes(), file
    assert told[-1] == ("images decoded", 10, 10)
    assert {what for what, _, _ in told} == {"images measured", "images decoded"}
    for what in ("images measured", "images decoded"):
        done = [count for said, count, _ in told if said == what]
        assert done == sorted(done)
        assert len(done) == 3


def test_the_processes_that_decode_import_no_torch() -> None:
    words = "import sys, tuneapp.data.decoding; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=50)
    assert done.stdout == "False\n", done.stderr


def test_ctrl_c_among_processes_leaves_none_of_them_and_no_file(
    with_processes: None, twelve: ImageSet, cache: Path
) -> None:
    before = set(psutil.Process().children(recursive=True))
    working: set[psutil.Process] = set()

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "images decoded":
            working.update(set(psutil.Process().children(recursive=True)) - before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(twelve, SMALL, watch=interrupt)
    workers = [p for p in working if not is_tracker(p)]
    assert workers
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert stores(cache) == litter(cache) == []


def is_tracker(process: psutil.Process) -> bool:
    """Whether it is multiprocessing's own helper, which lives as long as its process."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_what_a_killed_process_left_of_a_store_is_removed_when_it_is_made(
    twelve: ImageSet, cache: Path
) -> None:
    folder = open_store(twelve, SMALL).folder
    shutil.rmtree(folder)
    half = cache / f".{folder.name}.abcd1234"
    half.mkdir()
    (half / "pixels.bin").write_bytes(b"half of it")
    another = cache / ".store-0123456789abcdef0123.abcd1234"  # which may be being made just now
    another.mkdir()
    assert open_store(twelve, SMALL).folder == folder
    assert litter(cache) == [another.name]


# --- Files that change meanwhile ------------------------------------------------------------------


def test_a_file_that_changed_between_listing_and_decoding_is_stamped_with_what_was_decoded(
    twelve: ImageSet,
) -> None:
    noise((33, 21), seed=77).save(twelve.root / "02.png")
    store = open_store(twelve, SMALL)
    wanted = TF.pil_to_tensor(TF.resize(noise((33, 21), seed=77), [20]))
    assert torch.equal(store.image(2), wanted)
    stamped = store.stamped(twelve).examples[2]
    content = (twelve.root / "02.png").read_bytes()
    assert stamped.digest == blake2b(content, digest_size=16).hexdigest()


def test_a_file_that_changes_its_size_while_it_is_decoded_is_left_out(
    twelve: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_read = decoding.read_bytes

    def read_late(path: Path) -> bytes:
        if path.name == "05.png":
            noise((60, 21), seed=78).save(path)
        return really_read(path)

    monkeypatch.setattr(decoding, "read_bytes", read_late)
    clean = [
        torch.from_numpy(np.array(TF.resize(open_image(twelve, e), [20]))) for e in twelve.examples
    ]
    store = open_store(twelve, SMALL)
    assert store.causes == {5: "is of another size than its header says"}
    for i in (0, 1, 2, 3, 4, 6, 7, 8, 9):
        assert torch.equal(store.image(i), clean[i].permute(2, 0, 1))


def test_a_file_that_could_not_be_read_for_a_while_is_there_when_it_can(
    twelve: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "03.png":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        for _ in range(2):
            assert open_store(twelve, SMALL).causes == {3: "cannot be read: Input/output error"}
    # A trial takes what its sweep began with; the next sweep has the image.
    assert 3 in open_store(twelve, SMALL, accept_index=True).causes
    healed = open_store(twelve, SMALL)
    assert healed.causes == {}
    assert healed.image(3).shape[0] == 3


def test_decoding_in_threads_leaves_pythons_warnings_as_they_were(twelve: ImageSet) -> None:
    before = list(warnings.filters)
    for size in range(20, 26):
        open_store(twelve, replace(SMALL, resize_size=size))
    assert list(warnings.filters) == before


def test_half_an_image_is_not_filled_up_whatever_other_code_has_set(
    twelve: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    file = twelve.root / "03.png"
    file.write_bytes(file.read_bytes()[:-30])
    assert list(open_store(twelve, SMALL).causes) == [3]


def test_a_full_disk_streams(twelve: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = open_store(twelve, SMALL)
    assert store.is_streamed
    assert store.causes == {}
