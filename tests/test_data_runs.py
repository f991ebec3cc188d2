"""Whole trainings on data as people have them, through the command line."""

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    recall_score,
    roc_auc_score,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms import v2

from tests.conftest import read_ledger
from tuneapp.cli import main
from tuneapp.prepare import load_model

SPACE = '''"""A space of one recipe."""
from optuna import Trial

from tuneapp.config import *

FIRST_TRIALS = [{{"lr": 0.01}}]
{more}

def search_space(trial: Trial) -> TrialConfig:
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    return TrialConfig(
        model="resnet18", weights=None, image_size=32, epochs=2, batch_size=8, freeze_depth=4,
        optimizer=AdamW(lr=lr), {config}
    )
'''


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a maker of spaces, in a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(config: str = "", more: str = "") -> str:
        Path("space.py").write_text(SPACE.format(config=config, more=more))
        return "space.py"

    return make


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [e["row"] for e in read_ledger(run) if e["event"] == "epoch"]


def split_of(run: Path) -> dict[str, str]:
    with (run / "split.csv").open(newline="") as file:
        return {row["path"]: row["split"] for row in csv.DictReader(file)}


# --- Several classes at once ----------------------------------------------------------------------


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A table of 80 drawings of circles, squares and lines, some of nothing."""
    draw = random.Random(3)
    folder = tmp_path / "shapes"
    (folder / "drawn").mkdir(parents=True)
    rows = []
    for index in range(80):
        image = Image.new("RGB", (40, 36), "grey")
        pen = ImageDraw.Draw(image)
        shown = [name for name in ("circle", "line", "square") if draw.random() < 0.5]
        if "circle" in shown:
            pen.ellipse((2, 2, 20, 20), fill="red")
        if "square" in shown:
            pen.rectangle((22, 4, 36, 18), fill="blue")
        if "line" in shown:
            pen.line((0, 30, 39, 26), fill="green", width=4)
        image.save(folder / "drawn" / f"{index:03d}.png")
        rows.append([f"drawn/{index:03d}.png", ";".join(shown)])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return folder / "table.csv"


@pytest.mark.parametrize("loss", ["Focal()", "Dice()"])
def test_several_labels_are_trained_and_measured_as_scikit_learn_measures_them(
    loss: str, space: Callable[..., str], shapes: Path
) -> None:
    words = ["--data", str(shapes), "--label-separator", ";", "--metric", "val/average_precision"]
    assert main(["train", space(f"loss={loss}"), *words, "--name", "x"]) == 0
    run = Path("runs/x")
    best = max(rows_of(run), key=lambda row: row["val/average_precision"])

    names = ["circle", "line", "square"]
    with (run / "split.csv").open(newline="") as file:
        validated = [row for row in csv.DictReader(file) if row["split"] == "val"]
    shown = np.array([[name in json.loads(row["class"]) for name in names] for row in validated])
    prepared = v2.Compose(
        [
            v2.Resize(36, antialias=True),  # a 32 pixel crop of what torchvision's ratio leaves
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    config = json.loads((run / "trials/t0001/config.json").read_text())["preprocessing"]
    assert config["crop_size"] == 32
    prepared.transforms[0] = v2.Resize(config["resize_size"], antialias=True)
    pixels = [prepared(Image.open(shapes.parent / row["path"]).convert("RGB")) for row in validated]
    with torch.no_grad():
        logits = load_model(run, "t0001")(torch.stack(pixels)).numpy()
    predicted = logits > 0
    assert best["val/accuracy"] == pytest.approx(accuracy_score(shown, predicted))
    macro_f1 = f1_score(shown, predicted, average="macro", zero_division=0)
    assert best["val/macro_f1"] == pytest.approx(macro_f1)
    assert best["val/auroc"] == pytest.approx(roc_auc_score(shown, logits, average="macro"))
    precision = average_precision_score(shown, logits, average="macro")
    assert best["val/average_precision"] == pytest.approx(precision)
    recalls = recall_score(shown, predicted, average=None, zero_division=np.nan)
    for name, recall in zip(names, recalls, strict=True):
        assert best[f"val/recall/{name}"] == pytest.approx(recall)


def test_cross_entropy_on_several_labels_is_refused(
    space: Callable[..., str], shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(shapes), "--label-separator", ";"]
    assert main(["train", space(), *words]) == 2
    error = capsys.readouterr().err
    assert "CrossEntropy takes one class for each image" in error
    assert "BinaryCrossEntropy" in error
    assert not Path("runs").exists()


# --- Images that cannot be read -------------------------------------------------------------------


@pytest.fixture
def hundred(make_photos: Callable[..., Path], tmp_path: Path) -> Path:
    return make_photos(tmp_path / "hundred", per_class=34)


def break_some(photos: Path) -> list[str]:
    """Cut off one image and empty another; return their paths."""
    cut, emptied = photos / "red/03.png", photos / "blue/10.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    emptied.write_bytes(b"")
    return ["red/03.png", "blue/10.jpg"]


def test_a_folder_with_broken_images_is_split_as_before_and_trains_to_the_end(
    space: Callable[..., str], hundred: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", space(), "--data", str(hundred), "--seed", "1"]
    assert main([*words, "--name", "clean"]) == 0
    broken = break_some(hundred)
    assert main([*words, "--name", "broken"]) == 0
    assert split_of(Path("runs/broken")) == split_of(Path("runs/clean"))

    said = capsys.readouterr()
    assert main(["summary", "runs/broken"]) == 0
    told = capsys.readouterr()
    log = Path("runs/broken/trials/t0001/log.txt").read_text()
    events = EventAccumulator("runs/broken/trials/t0001", size_guidance={"tensors": 0})
    events.Reload()
    (text,) = events.Tensors("data/text_summary")
    with Path("runs/broken/bad_images.csv").open(newline="") as file:
        listed = {row["path"]: row["cause"] for row in csv.DictReader(file)}
    in_trials = [path for path in broken if split_of(Path("runs/broken"))[path] != "test"]
    assert in_trials
    assert set(in_trials) <= set(listed) <= set(broken)
    for path in in_trials:
        for place in (said.out, told.err, log, text.tensor_proto.string_val[0].decode()):
            assert path in place
    assert not Path("runs/clean/bad_images.csv").exists()


def test_a_substitute_keeps_the_length_of_an_epoch(
    space: Callable[..., str], hundred: Path
) -> None:
    break_some(hundred)
    for name in ("drop", "substitute"):
        words = ["--data", str(hundred), "--bad-images", name, "--name", name, "--seed", "1"]
        assert main(["train", space("augment='none'"), *words]) == 0
    lost = sum(
        split == "train" and path in ("red/03.png", "blue/10.jpg")
        for path, split in split_of(Path("runs/drop")).items()
    )
    assert lost
    dropped, substituted = (rows_of(Path("runs") / name) for name in ("drop", "substitute"))
    assert dropped != substituted
    assert dropped[0]["val/loss"] != substituted[0]["val/loss"]


def test_asked_to_be_an_error_broken_images_end_it_before_any_training(
    space: Callable[..., str], hundred: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_some(hundred)
    words = ["--data", str(hundred), "--bad-images", "error", "--seed", "1"]
    assert main(["train", space(), *words]) == 2
    error = capsys.readouterr().err
    assert "cannot be read: " in error
    assert "--bad-images drop" in error
    assert not Path("runs").exists()


def test_a_class_of_broken_images_alone_ends_it_before_any_training(
    space: Callable[..., str], hundred: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (hundred / "green").iterdir():
        file.write_bytes(file.read_bytes()[:300])
    assert main(["train", space(), "--data", str(hundred)]) == 2
    error = capsys.readouterr().err
    assert "no image of green would be in" in error
    assert "that cannot be read" in error
    assert not Path("runs").exists()


def test_streamed_images_give_the_numbers_of_stored_ones(
    space: Callable[..., str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}
    for name, more in {"stored": [], "streamed": ["--store-budget", "0"]}.items():
        monkeypatch.setenv("TUNEAPP_CACHE", str(tmp_path / name))
        words = ["--data", str(photos), "--workers", "0", "--name", name]
        assert main(["train", space("augment='strong'"), *words, *more]) == 0
        row = rows_of(Path("runs") / name)[-1]
        seen[name] = {k: v for k, v in row.items() if k[:9] not in ("train/ima", "train/dat")}
        applied = next(e for e in read_ledger(Path("runs") / name) if e["event"] == "applied")
        assert applied["applied"]["images"] == name
    assert seen["stored"] == seen["streamed"]


# --- Splits, folds, the test split ----------------------------------------------------------------


def test_the_test_split_is_opened_by_final_test_alone_and_that_is_counted(
    space: Callable[..., str],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(photos, tmp_path / "copy")
    assert main(["train", space(), "--data", str(copy), "--name", "x"]) == 0
    run = Path("runs/x")
    tested = [path for path, split in split_of(run).items() if split == "test"]
    assert tested
    capsys.readouterr()
    assert main(["final-test", "runs/x"]) == 0
    first = capsys.readouterr().out
    assert main(["final-test", "runs/x", "--trial", "t0001"]) == 0
    second = capsys.readouterr().out
    assert "opened    1 time(s)" in first
    assert "opened    2 time(s)" in second
    opened, result, _, again = [e for e in read_ledger(run) if e["event"].startswith("test_")]
    assert (opened["event"], opened["trial"]) == ("test_opened", "t0001")
    assert result["scores"] == again["scores"]

    transform = v2.Compose(
        [
            v2.Resize(
                json.loads((run / "trials/t0001/config.json").read_text())["preprocessing"][
                    "resize_size"
                ],
                antialias=True,
            ),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    names = ["blue", "green", "red"]
    pixels = torch.stack([transform(Image.open(copy / path).convert("RGB")) for path in tested])
    with torch.no_grad():
        answers = load_model(run, "t0001")(pixels).argmax(dim=1)
    right = [names[a] == path.split("/")[0] for a, path in zip(answers, tested, strict=True)]
    assert result["scores"][0]["test/accuracy"] == sum(right) / len(right)

    assert main(["summary", "runs/x"]) == 0
    assert "the test split was opened 2 time(s)" in capsys.readouterr().out
    # What an interrupted opening has seen counts, too.
    (copy / tested[0]).unlink()
    assert main(["final-test", "runs/x"]) == 2
    assert tested[0] in capsys.readouterr().err
    assert main(["final-test", "runs/x", "--trial", "t0009"]) == 2


def test_without_a_test_split_there_is_no_final_test(
    space: Callable[..., str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"DATA = Data(source={str(photos)!r}, test_share=0.0)"
    assert main(["train", space(more=more), "--name", "x"]) == 0
    assert "test" not in split_of(Path("runs/x")).values()
    assert main(["final-test", "runs/x"]) == 2
    assert "has no test split" in capsys.readouterr().err


def test_folds_are_trained_resumed_and_tested(
    space: Callable[..., str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(photos), "--folds", "3", "--name", "x"]
    assert main(["train", space("augment='light'"), *words]) == 0
    out = capsys.readouterr().out
    rows = rows_of(Path("runs/x"))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert f"best      t0001: val/accuracy {rows[-1]['val/accuracy']:.4f}" in out
    assert "over 3 of 3 folds" in out
    assert main(["resume", "runs/x"]) == 0
    assert rows_of(Path("runs/x")) == rows
    assert main(["final-test", "runs/x"]) == 0
    assert "mean of 3 folds' models" in capsys.readouterr().out
    scores = [e["scores"] for e in read_ledger(Path("runs/x")) if e["event"] == "test_result"]
    assert len(scores[0]) == 3
    assert load_model(Path("runs/x"), "t0001", fold=2)


def test_a_changed_folder_is_refused_with_the_names_of_what_changed(
    space: Callable[..., str],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(photos, tmp_path / "copy")
    words = ["--data", str(copy), "--name", "x"]
    assert main(["train", space(), *words]) == 0
    for file in copy.rglob("*.*"):
        file.touch()  # copied, restored from a backup: another time, the same content
    assert main(["train", "--from", "runs/x", "--name", "again"]) == 0
    assert [r["val/loss"] for r in rows_of(Path("runs/x"))] == [
        r["val/loss"] for r in rows_of(Path("runs/again"))
    ]
    pixels = np.asarray(Image.open(copy / "red/01.png"))
    content = (copy / "red/01.png").read_bytes()
    Image.fromarray(255 - pixels).save(copy / "red/01.png")
    grown = (copy / "red/01.png").read_bytes()
    (copy / "red/01.png").write_bytes(grown.ljust(len(content), b"\0")[: len(content)])
    capsys.readouterr()
    assert main(["train", "--from", "runs/x"]) == 2
    error = capsys.readouterr().err
    assert "red/01.png" in error
    assert "changed since this run began" in error


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--metric", "val/recall/violet"], ["val/recall/violet", "blue, green, red"]),
        (["--metric", "val/average_precision"], ["val/average_precision", "val/auroc"]),
        (["--column", "label=kind"], ["--column label needs a .csv"]),
        (["--column", "kind"], ["--column kind", "ROLE=NAME"]),
        (["--folds", "50"], ["50 folds need 50 images of each class"]),
        (["--folds", "1"], ["--folds 1: must be a whole number >= 2"]),
        (["--store-budget", "lots"], ["--store-budget lots", "20GB"]),
        (["--exclude", "nowhere.txt"], ["nowhere.txt"]),
        (["--group-regex", "(.)/"], ["in several splits", "one side", "no image of", "one group"]),
        (["--workers", "-1"], ["--workers -1: must be"]),
    ],
    ids=repr,
)
def test_a_mistake_in_the_data_options_is_one_line_before_any_training(
    flags: list[str],
    told: list[str],
    space: Callable[..., str],
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", space(), "--data", str(photos), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    if flags[0] == "--group-regex":
        assert any(words in error for words in told)
    else:
        assert all(words in error for words in told)
    assert not Path("runs").exists()


# --- Sampling and views ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("sampling='weighted'", "needs weights that differ"),
        ("augment='my_views:wrong_size'", "it must return uint8 (3, 32, 32)"),
        ("augment='my_views:unseeded'", "two different images for one seed"),
        ("augment='my_views:missing'", "my_views has no missing"),
    ],
)
def test_what_has_no_meaning_for_the_data_is_refused(
    config: str,
    told: str,
    space: Callable[..., str],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my_views.py").write_text(
        "import os\nimport torch\nfrom torchvision.transforms import v2\n\n"
        "def wrong_size(image_size):\n    return v2.CenterCrop(image_size - 1)\n\n"
        "def unseeded(image_size):\n"
        "    crop = v2.CenterCrop(image_size)\n"
        "    return lambda image: crop(image) ^ os.urandom(1)[0]\n"
    )
    assert main(["train", space(config), "--data", str(photos)]) == 2
    assert told in capsys.readouterr().err
    assert not Path("runs").exists()


def test_balanced_sampling_draws_as_many_as_the_smallest_class_has(
    space: Callable[..., str], make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    photos = make_photos(tmp_path / "uneven", per_class=20)
    for file in sorted((photos / "red").iterdir())[8:]:
        file.unlink()
    words = [
        "train",
        space("sampling='balanced', replacement=False, schedule=Cosine()"),
        "--data",
        str(photos),
    ]
    assert main([*words, "--name", "x"]) == 0
    splits = split_of(Path("runs/x"))
    red = sum(split == "train" and path.startswith("red") for path, split in splits.items())
    (applied,) = (e["applied"] for e in read_ledger(Path("runs/x")) if e["event"] == "applied")
    drawn = 3 * red
    steps = drawn // 8 + (drawn % 8 > 1)  # a single leftover joins the batch before it
    assert applied["schedule_options"]["T_max"] == 2 * steps


def test_a_transform_of_the_space_itself_works_in_worker_processes(
    space: Callable[..., str], photos: Path
) -> None:
    more = (
        "from torchvision.transforms import v2\n\n"
        "def views(image_size):\n    return v2.RandomCrop(image_size)\n"
    )
    seen = []
    for workers in ("0", "1"):
        words = ["--data", str(photos), "--workers", workers, "--name", f"w{workers}"]
        assert main(["train", space("augment='space:views'", more), *words]) == 0
        # A worker that imported the file instead of the text that was executed would fail.
        Path("space.py").write_text("raise RuntimeError('edited since')\n")
        seen.append([row["train/loss"] for row in rows_of(Path(f"runs/w{workers}"))])
    assert seen[0] == seen[1]
