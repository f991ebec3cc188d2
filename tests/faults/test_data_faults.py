"""Faults of the data: rows 1 to 13 of the fault catalogue."""

import csv
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import COLOURS, read_ledger
from tests.faults.refusal import (
    after_epochs,
    interrupt_after,
    numbers,
    refused,
    write_space,
)
from tests.states import config_of
from tests.test_data_runs import rows_of, split_of
from tests.test_decode import chunk, encoded, exif_of
from tuneapp.cli import main
from tuneapp.config import Data
from tuneapp.data.batches import Batches
from tuneapp.data.decode import read_image
from tuneapp.data.examples import ImageSet
from tuneapp.data.findings import cheap_findings
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.sampling import Shuffled
from tuneapp.data.source import read_images
from tuneapp.data.store import open_store
from tuneapp.data.views import training_view

RUN = Path("runs/x")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def divided(make_photos: Callable[..., Path]) -> Path:
    """Folders train, val and test of three colours, three images in each."""
    return make_photos(Path("photos"), per_class=3, split=True)


@pytest.fixture
def whole(make_photos: Callable[..., Path]) -> Path:
    """A folder per colour, eight images in each."""
    return make_photos(Path("photos"), per_class=8)


def train(*words: object) -> int:
    return main(["train", write_space(), "--name", "x", *map(str, words)])


def causes(run: Path = RUN) -> dict[str, str]:
    """Return what `bad_images.csv` lists, read without tuneapp."""
    text = (run / "bad_images.csv").read_bytes().decode("utf-8", "surrogateescape")
    return {row["path"]: row["cause"] for row in csv.DictReader(io.StringIO(text, newline=""))}


# --- 1 to 4: folders and classes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (shutil.rmtree, "photos: no such folder"),
        (lambda root: (root / "train").rename(root / "tran"), "photos has val/ and no train/"),
        (lambda root: [shutil.rmtree(p) for p in root.iterdir()], "photos has 0 class folder(s)"),
        (lambda root: [shutil.rmtree(p) for p in (root / "val").iterdir()], "photos/val has 0"),
    ],
    ids=["no root", "no train", "an empty root", "an empty val"],
)
def test_fault_01_a_missing_root_or_split_folder_is_refused(
    break_it: Callable[[Path], object],
    named: str,
    divided: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(divided)
    assert named in refused(capsys, "sweep", write_space(), "--data", divided)


def test_fault_01_a_validation_split_of_another_name_is_drawn_and_the_folder_told(
    make_photos: Callable[..., Path],
) -> None:
    # The row wants exit code 2; documented is that what the data do not say is drawn.
    photos = make_photos(Path("photos"), per_class=4, split=True)
    (photos / "val").rename(photos / "v")
    images = read_images(Data(source=str(photos)), seed=0)
    assert {e.path.split("/")[0] for e in images.of("val")} == {"train"}
    (told,) = [f.words for f in cheap_findings(images) if f.kind == "not images"]
    assert "v is beside the folders of the splits, and is not read" in told


@pytest.mark.parametrize("part", ["val", "test"])
def test_fault_02_a_class_that_a_split_lacks_is_refused_by_name(
    part: str, divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(divided / part / "blue")
    error = refused(capsys, "sweep", write_space(), "--data", divided)
    assert f"{divided / part} lacks blue" in error


def test_fault_02_the_classes_of_a_split_are_those_of_the_training_whatever_its_order(
    divided: Path,
) -> None:
    # ImageFolder numbers each folder by itself: a shifted map would go unnoticed there.
    table = [("path", "label", "split")]
    table += [
        (f"{split}/{name}/{i:02d}.{'png' if i % 2 else 'jpg'}", name, split)
        for split, names in (("train", "red green blue"), ("val", "blue red green"))
        for name in names.split()
        for i in range(3)
    ]
    with (divided / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    images = read_images(Data(source=str(divided / "t.csv")), seed=0)
    for example in images.examples:
        assert images.classes[example.label] == example.path.split("/")[1]


@pytest.mark.parametrize("part", ["val", "test"])
def test_fault_03_a_class_that_only_another_split_has_is_refused_by_name(
    part: str, divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(divided / part / "red", divided / part / "zz")
    error = refused(capsys, "sweep", write_space(), "--data", divided)
    assert f"{divided / part} also has zz" in error


def test_fault_04_an_empty_class_folder_is_refused_and_a_hidden_one_is_none(
    divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The row wants a warning of hidden folders; documented is that they are not even listed.
    for part in ("train", "val", "test"):
        shutil.copytree(divided / part / "red", divided / part / ".ipynb_checkpoints")
    assert read_images(Data(source=str(divided)), seed=0).classes == tuple(COLOURS)
    (divided / "train" / "a2").mkdir()
    error = refused(capsys, "sweep", write_space(), "--data", divided)
    assert f"{divided / 'train' / 'a2'} holds no image" in error


# --- 5 to 8: files --------------------------------------------------------------------------------


def halve(file: Path) -> str:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "cannot be decoded"


def empty(file: Path) -> str:
    file.write_bytes(b"")
    return "is empty: 0 bytes"


def become_a_page(file: Path) -> str:
    file.write_text("<html>Please log in</html>")
    return "is not an image, but a web page"


def dangle(file: Path) -> str:
    file.unlink()
    file.symlink_to("gone.jpg")
    return "cannot be read: No such file"


def require_listed_or_refused(
    spoilt: dict[str, str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check both ways to treat unreadable images: left out and listed, and an error."""
    # The row wants exit code 2; documented is that by default they are listed and left out.
    assert train("--data", photos) == 0
    told = capsys.readouterr().out
    listed = causes()
    assert listed.keys() == spoilt.keys()
    for path, cause in spoilt.items():
        assert listed[path].startswith(cause), (path, listed[path])
        assert path in told
    (ended,) = [e for e in read_ledger(RUN) if e["event"] == "ended"]
    assert ended["state"] == "finished"
    shutil.rmtree("runs")
    words = ["--data", photos, "--bad-images", "error"]
    error = refused(capsys, "sweep", write_space(), *words)
    assert f"{len(spoilt)} of {sum(1 for _ in photos.glob('*/*'))} images cannot be read" in error
    assert all(f"{path} {cause}" in error for path, cause in spoilt.items())


def test_fault_05_a_truncated_jpeg_and_png_are_listed_or_refused_by_name(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = {path: halve(whole / path) for path in ("red/00.jpg", "blue/01.png")}
    require_listed_or_refused(spoilt, whole, capsys)


def test_fault_06_an_empty_file_a_web_page_and_a_link_to_nowhere_are_listed_or_refused(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = {
        "red/00.jpg": empty(whole / "red/00.jpg"),
        "green/02.jpg": become_a_page(whole / "green/02.jpg"),
        "blue/04.jpg": dangle(whole / "blue/04.jpg"),
    }
    require_listed_or_refused(spoilt, whole, capsys)


def bomb(width: int, height: int) -> bytes:
    """A whole PNG of one bit a pixel, all black; made a row at a time."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_fault_07_a_decompression_bomb_is_refused_at_its_header(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = whole / "red" / "bomb.png"
    file.write_bytes(bomb(20_000, 20_000))
    assert file.stat().st_size < 100_000  # which would become 400 MB, or 1.2 GB in RGB
    code = (
        "import sys; from pathlib import Path\n"
        "from tuneapp.data.decoding import Task, decode_chunk, measure_chunk\n"
        "print(measure_chunk([sys.argv[1]], 36)[0])\n"
        "print(decode_chunk(Task([sys.argv[1]], [[36, 36]], [0], 36, 'bilinear', None))[0].cause)\n"
        "print(*[x for x in Path('/proc/self/status').open() if x.startswith('VmHWM')], end='')\n"
    )
    repository = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code, str(file.absolute())],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *said, most = ran.stdout.splitlines()
    assert len(said) == 2
    assert all("is too large: Image size (400000000 pixels)" in line for line in said)
    assert int(most.split()[1]) < 200_000  # kilobytes
    words = ["--data", whole, "--bad-images", "error"]
    assert "red/bomb.png is too large" in refused(capsys, "sweep", write_space(), *words)


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))


def half_transparent_palette() -> bytes:
    image = Image.new("P", (8, 8))
    image.putpalette([255, 0, 0, 0, 0, 0])
    return encoded(image, "PNG", transparency=bytes([51, 255]))  # a fifth of red on white


def moving(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


# Content, and the colour by hand of every pixel.
KINDS = {
    "cmyk.jpg": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "palette.png": (half_transparent_palette(), (255, 204, 204)),
    "la.png": (encoded(Image.new("LA", (8, 8), (0, 51)), "PNG"), (204, 204, 204)),
    "sixteen.png": (encoded(sixteen_bits(), "PNG"), (128, 128, 128)),
    "one.png": (encoded(Image.new("RGB", (1, 1), (7, 8, 9)), "PNG"), (7, 8, 9)),
    # A GIF is not refused by name: the rule is its first frame.
    "moving.gif": (moving("GIF"), (255, 0, 0)),
    "moving.webp": (moving("WEBP"), (255, 0, 0)),
}


def test_fault_08_every_mode_of_an_image_is_decoded_by_one_rule(
    divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (content, colour) in KINDS.items():
        (divided / "train/red" / name).write_bytes(content)
        pixels = np.asarray(read_image(divided / "train/red" / name))
        assert pixels.shape[2] == 3, name
        assert np.abs(pixels.astype(int) - colour).max() <= 1, name
    turned = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    file = divided / "train/red/turned.png"
    file.write_bytes(encoded(turned, "PNG", exif=exif_of(6)))
    assert np.array_equal(np.asarray(read_image(file)), np.rot90(np.asarray(turned), -1))
    images = read_images(Data(source=str(divided)), seed=0)
    store = open_store(images, Preprocessing(36, 32, "bilinear", (0.5,) * 3, (0.5,) * 3))
    assert not store.causes
    for index, example in enumerate(images.of("train", "val")):
        name = example.path.rpartition("/")[2]
        if name in KINDS:  # and so to the trial
            seen = store.image(index).permute(1, 2, 0).numpy().astype(int)
            assert np.abs(seen - KINDS[name][1]).max() <= 1, name


# --- 9 to 11: links, names, changes ---------------------------------------------------------------


def test_fault_09_a_link_that_loops_is_not_followed_and_a_leak_is_warned_of(
    divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The row wants exit code 2 for the loop; documented is that links to folders are listed.
    (divided / "train/red/self").symlink_to("..", target_is_directory=True)
    shutil.copy(divided / "train/blue/00.jpg", divided / "val/blue/99.jpg")
    assert train("--data", divided) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "1 image(s) occur several times, with the same file content" in told
    assert "train/blue/00.jpg = val/blue/99.jpg" in told
    assert "train/red/self is a link to a folder, which is not followed" in told
    warnings = json.loads((RUN / "run.json").read_text())["warnings"]
    assert any("train/blue/00.jpg = val/blue/99.jpg" in warning for warning in warnings)
    assert len(split_of(RUN)) == 3 * 3 * 3 + 1
    assert "self" in "".join(causes())


def test_fault_10_any_name_of_a_file_is_trained_listed_and_shown_without_harm(
    divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [b"\xff\xfe.jpg", b'two\nlines,"quoted".jpg', b"\x1b[31mred.jpg", b"n" * 251 + b".jpg"]
    good, bad = divided / "train/red", divided / "train/blue"
    for name in names:
        shutil.copy(good / "00.jpg", good / os.fsdecode(name))
        (bad / os.fsdecode(name)).write_bytes(b"")
    assert train("--data", divided) == 0
    assert main(["summary", str(RUN)]) == 0
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "\x1b" not in text
    assert "two\nlines" not in text
    text.encode()  # no surrogate is left in it
    assert causes().keys() == {f"train/blue/{os.fsdecode(name)}" for name in names}
    content = (RUN / "split.csv").read_bytes().decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(content, newline="")))
    listed = {row["path"] for row in rows if row["split"] == "train"}
    for name in names:
        assert {f"train/{c}/{os.fsdecode(name)}" for c in ("red", "blue")} <= listed
    for log in RUN.rglob("log.txt"):
        log.read_text(encoding="utf-8")
    # Another run finds every one of them again, unchanged.
    assert main(["train", "--from", str(RUN), "--trial", "best", "--name", "again"]) == 0
    assert numbers(rows_of(Path("runs/again"))) == numbers(rows_of(RUN))


def test_fault_10_a_class_of_any_name_is_trained_and_in_every_table(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole / "red").rename(whole / os.fsdecode(b"caf\xe9 festival/"))
    assert train("--data", whole) == 0
    assert main(["summary", str(RUN), "--applied"]) == 0
    assert main(["final-test", str(RUN)]) == 0
    assert "test/recall/caf\\udce9 festival " in capsys.readouterr().out
    assert "val/recall/caf\\udce9 festival" in (RUN / "trials.csv").read_text().splitlines()[0]


def test_fault_11_a_run_whose_images_changed_does_not_go_on_until_they_are_back(
    whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", write_space(), "--data", str(whole), "--name", "unharmed"]) == 0
    file = whole / "red/00.jpg"
    content, times = file.read_bytes(), file.stat()
    with monkeypatch.context() as patch:
        interrupt_after(1, patch, file.unlink)
        assert train("--data", whole) == 130
    before = (RUN / "ledger.jsonl").read_bytes()
    for change in (lambda: None, lambda: file.write_bytes(content[::-1])):
        change()
        error = refused(capsys, "resume", RUN)
        assert "1 of 24 images in" in error
        assert "missing or have changed since this run began: red/00.jpg" in error
    assert (RUN / "ledger.jsonl").read_bytes() == before
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(["resume", str(RUN)]) == 0
    assert numbers(rows_of(RUN)) == numbers(rows_of(Path("runs/unharmed")))


def test_fault_11_an_image_that_goes_while_a_trial_runs_fails_it_only_where_it_is_needed(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUNEAPP_CACHE", str(tmp_path / "cache"))
    words = ["train", write_space(), "--data", str(whole), "--workers", "0"]
    assert main([*words, "--name", "unharmed"]) == 0
    used = next(path for path, split in split_of(Path("runs/unharmed")).items() if split == "train")
    kept = (whole / used).read_bytes(), (whole / used).stat()
    after_epochs(monkeypatch, lambda row: (whole / used).unlink(missing_ok=True))
    assert main([*words, "--name", "stored"]) == 0  # decoded before; nobody asks for it again
    assert numbers(rows_of(Path("runs/stored"))) == numbers(rows_of(Path("runs/unharmed")))

    (whole / used).write_bytes(kept[0])
    os.utime(whole / used, ns=(kept[1].st_atime_ns, kept[1].st_mtime_ns))
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert main([*words, "--store-budget", "0", "--name", "streamed"]) == 2
    assert f"{used} cannot be read: No such file" in capsys.readouterr().err
    (ended,) = [e for e in read_ledger(Path("runs/streamed")) if e["event"] == "ended"]
    assert ended["state"] == "failed"
    assert used in ended["cause"]
    assert len(rows_of(Path("runs/streamed"))) == 1  # what was done is kept


# --- 12, 13: batches and draws --------------------------------------------------------------------


def test_fault_12_too_few_images_to_split_are_refused(
    make_photos: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    photos = make_photos(Path("few"), per_class=1)
    error = refused(capsys, "sweep", write_space(), "--data", photos)
    assert "class blue, green, red has fewer than 4 images" in error


def with_batches_of(batch_size: int, freeze_depth: int) -> str:
    """Write a space whose last trained BatchNorm sees one pixel of each image of 32."""
    space = Path(write_space(model="resnet18"))
    text = space.read_text().replace("freeze_depth=1", f"freeze_depth={freeze_depth}")
    space.write_text(text.replace("batch_size=8", f"batch_size={batch_size}"))
    return str(space)


@pytest.mark.parametrize(("batch_size", "steps"), [(8, 1), (64, 1), (4, 2)])
def test_fault_12_a_last_batch_of_one_joins_and_one_larger_than_the_data_is_all_of_them(
    batch_size: int, steps: int, divided: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is dropped, so there is always a batch; nine images are 8 + 1, all nine, 4 + 4 + 1.
    sizes: list[int] = []
    real = Batches._normalised
    monkeypatch.setattr(
        Batches, "_normalised", lambda self, views: [sizes.append(len(views)), real(self, views)][1]
    )
    words = ["train", with_batches_of(batch_size, 0), "--data", str(divided), "--epochs", "1"]
    assert main([*words, "--name", "x"]) == 0
    (row,) = rows_of(RUN)
    assert np.isfinite([row["train/loss"], row["val/loss"]]).all()
    assert sum(sizes[:steps]) == 9
    assert min(sizes[:steps]) > 1


def test_fault_12_batches_of_one_are_refused_where_batchnorm_cannot_be_trained_on_them(
    divided: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(divided)]
    error = refused(capsys, "sweep", with_batches_of(1, 0), *words)
    assert "batch_size 1: resnet18 cannot be trained on one image of 32 x 32 pixels" in error
    assert "give at least 2" in error
    space = with_batches_of(1, 5)  # of the head alone, it can
    assert main(["train", space, *words, "--epochs", "1", "--name", "x"]) == 0
    assert len(rows_of(RUN)) == 1


MY_DRAWS = """
import random

import numpy as np
import torch


def build(image_size):
    count = image_size * image_size

    def draw(image):
        channels = [
            torch.randint(0, 256, (count,), dtype=torch.uint8),
            torch.from_numpy(np.random.randint(0, 256, count, dtype=np.uint8)),
            torch.tensor([random.randrange(256) for _ in range(count)], dtype=torch.uint8),
        ]
        return torch.stack(channels).reshape(3, image_size, image_size)

    return draw
"""


def draws(images: ImageSet, workers: int) -> dict[tuple[int, int], torch.Tensor]:
    """Return what was drawn for each place of three epochs."""
    size = Preprocessing(32, 32, "bilinear", (0.0,) * 3, (1.0,) * 3)
    store = open_store(images, size)
    batches = Batches(
        store,
        Shuffled(store, config_of(), 0),
        view=training_view("my_draws:build", size),
        preprocessing=size,
        batch_size=4,
        device=torch.device("cpu"),
        workers=workers,
    )
    return {
        (epoch, place): image
        for epoch in (1, 2, 3)
        for place, image in enumerate(torch.cat([views for views, _ in batches.epoch(epoch)]))
    }


def test_fault_13_no_two_draws_are_the_same_whatever_the_worker_and_the_epoch(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my_draws.py").write_text(MY_DRAWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    here, apart = draws(images, workers=0), draws(images, workers=2)
    assert len(here) == 3 * len(images.of("train"))
    assert here.keys() == apart.keys()
    assert all(torch.equal(here[key], apart[key]) for key in here)
    for channel in range(3):  # torch's, numpy's and Python's generator
        seen = {image[channel].numpy().tobytes() for image in here.values()}
        assert len(seen) == len(here)
