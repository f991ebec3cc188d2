"""Folders of images: a folder per class, and flat ones with the label in the names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tuneapp.config import Data
from tuneapp.data.examples import ImageSet
from tuneapp.data.folders import read_folder
from tuneapp.data.source import read_images
from tuneapp.errors import DataError


def add_images(root: Path, names: Iterable[str]) -> Path:
    """Write images, of PNG where the name does not say another format."""
    for i, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (5, 4), (i % 256, 0, 0))
        image.save(file, format="JPEG" if name.lower().endswith(("jpg", "jpeg")) else "PNG")
    return root


def read(root: Path, **fields: Any) -> ImageSet:
    return read_folder(Data(source=str(root), **fields))


def labelled(images: ImageSet) -> dict[str, str]:
    return {e.path: images.classes[e.labels[0]] for e in images.examples}


def refusal(root: Path, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(root, **fields)
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) in message
    return message


# --- A flat folder --------------------------------------------------------------------------------

PETS = [f"{pet}.{i}.jpg" for pet in ("cat", "dog") for i in range(4)]


@pytest.mark.parametrize("expression", ["^(cat|dog)", "cat|dog", r"^([a-z]+)\.", r"^[a-z]+"])
def test_the_label_is_the_first_group_or_the_whole_match(expression: str, tmp_path: Path) -> None:
    images = read(add_images(tmp_path, PETS), label_regex=expression)
    assert images.classes == ("cat", "dog")
    assert labelled(images) == {name: name[:3] for name in PETS}
    assert {e.split for e in images.examples} == {"train"}
    for e in images.examples:
        stat = (tmp_path / e.path).stat()
        assert (e.num_bytes, e.modified_ns) == (stat.st_size, stat.st_mtime_ns)


def test_only_the_first_of_several_groups_is_the_label(tmp_path: Path) -> None:
    names = ["1_cat_red.png", "2_dog_red.png", "3_cat_blue.png"]
    images = read(add_images(tmp_path, names), label_regex=r"_([a-z]+)_([a-z]+)")
    assert images.classes == ("cat", "dog")


def test_labels_are_looked_for_in_the_whole_path_below_the_folder(tmp_path: Path) -> None:
    names = ["2019/cat/a.png", "2019/dog/a.png", "2020/cat/deep/er/a.png", "cat/x.png"]
    images = read(add_images(tmp_path, names), label_regex=r"(?:^|/)(cat|dog)/")
    assert labelled(images) == {name: "cat" if "cat" in name else "dog" for name in names}


def test_a_flat_folder_is_split_by_the_labels_found(tmp_path: Path) -> None:
    names = [f"{pet}.{i}.jpg" for pet in ("cat", "dog") for i in range(10)]
    images = read_images(
        Data(source=str(add_images(tmp_path, names)), label_regex="^(cat|dog)"), seed=0
    )
    for split in ("train", "val", "test"):
        assert {images.classes[e.labels[0]] for e in images.of(split)} == {"cat", "dog"}


def test_flat_folders_for_training_validation_and_test_are_kept(tmp_path: Path) -> None:
    names = [
        f"{part}/{pet}{i}.png"
        for part in ("train", "valid", "Testing")
        for pet in ("cat", "dog")
        for i in range(2)
    ]
    data = Data(source=str(add_images(tmp_path, names)), label_regex="^(cat|dog)")
    images = read_images(data, seed=0)
    splits = {"train": "train", "valid": "val", "Testing": "test"}
    assert {e.path: e.split for e in images.examples} == {n: splits[n.split("/")[0]] for n in names}
    assert labelled(images) == {n: n.split("/")[1][:3] for n in names}


def test_paths_in_which_no_label_is_found_are_counted_and_named(tmp_path: Path) -> None:
    add_images(tmp_path, [*PETS, "horse.1.jpg", "sub/cow.png"])
    message = refusal(tmp_path, label_regex="^(cat|dog)")
    assert "'^(cat|dog)' finds no label in 2 of 10 paths" in message
    assert "such as 'horse.1.jpg'" in message
    assert "the label is its first group, or the whole match" in message


@pytest.mark.parametrize("expression", ["^(x)?", "^(cat)?", r"^()"])
def test_an_empty_label_is_none(expression: str, tmp_path: Path) -> None:
    add_images(tmp_path, PETS)
    assert "finds no label in" in refusal(tmp_path, label_regex=expression)


def test_one_label_only_is_refused(tmp_path: Path) -> None:
    add_images(tmp_path, PETS[:4])
    assert refusal(tmp_path, label_regex="^([a-z]+)").endswith("finds only the label 'cat'")


def test_a_flat_folder_without_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("cat")
    assert refusal(tmp_path, label_regex="^(cat|dog)").endswith("finds no image")


def test_given_classes_fix_the_order_and_refuse_strangers(tmp_path: Path) -> None:
    add_images(tmp_path, PETS)
    images = read(tmp_path, label_regex="^[a-z]+", classes=["dog", "emu", "cat"])
    assert images.classes == ("dog", "emu", "cat")
    assert labelled(images)["cat.0.jpg"] == "cat"
    message = refusal(tmp_path, label_regex="^[a-z]+", classes=["dog", "emu"])
    assert "has images of cat, which classes= does not name" in message


# --- A folder per class ---------------------------------------------------------------------------

CLASSES = [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(4)]


def test_a_folder_that_is_not_there_names_every_kind_of_source(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none")
    assert "no such folder" in message
    for way in (".csv or .parquet", "torchvision:NAME", "package.module:name", "'digits'"):
        assert way in message


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    add_images(tmp_path, ["a.png"])
    message = refusal(tmp_path / "a.png")
    assert message.startswith(f"--data {tmp_path / 'a.png'}: it is a file, not a folder; give a ")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("digist", "'digits'"),
        ("Digits", "'digits'"),
        ("cifar10", "'torchvision:CIFAR10'"),
        ("CIFAR-100", "'torchvision:CIFAR100'"),
        ("flowers", "'torchvision:Flowers102'"),
        ("zebras", None),
        ("photos/cifar10", None),
    ],
)
def test_a_near_miss_of_a_known_data_set_is_answered_by_its_name(
    written: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read(Path(written))
    hint = f"; did you mean {meant}?" if meant else ""
    assert str(caught.value).startswith(f"--data {written}: no such folder{hint}; give a folder ")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (["photos/ant/0.png"], "photos has 1 class folder(s)"),
        (["photos/val/ant/0.png"], "photos has val/ and no train/"),
        (["photos/train/a/0.png", "photos/training/a/0.png"], "photos has train/ and training/"),
        (["photos/train/a/0.png"], "photos/train has 1 class folder(s)"),
        (
            [f"photos/{name}/0.png" for name in ("train/a", "train/b", "val/a", "val/c")],
            "photos/val lacks b and also has c: every split needs",
        ),
    ],
)
def test_messages_name_folders_as_they_were_written(
    make: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_images(tmp_path, make)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read(Path("photos"))
    assert str(caught.value).startswith(told)


def test_an_empty_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "has 0 class folder(s); at least two are required" in message
    assert "--label-regex" in message


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    add_images(tmp_path, CLASSES[:4])
    assert "has 1 class folder(s)" in refusal(tmp_path)


def test_images_beside_no_class_folder_are_pointed_to_the_expression(tmp_path: Path) -> None:
    add_images(tmp_path, PETS)
    assert "for labels in file names, give --label-regex" in refusal(tmp_path)


@pytest.mark.parametrize(
    "inside", [[], ["notes.txt"], [".hidden.png"], ["Thumbs.db"], [".d/a.png"]]
)
def test_a_class_without_any_image_is_named(inside: list[str], tmp_path: Path) -> None:
    add_images(tmp_path, CLASSES)
    (tmp_path / "cat").mkdir()
    for name in inside:
        (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_text("no image")
    message = refusal(tmp_path)
    assert f"{tmp_path / 'cat'} holds no image" in message
    assert "add some, or remove the folder" in message


def test_images_with_odd_endings_or_none_count_and_other_files_are_listed(tmp_path: Path) -> None:
    add_images(tmp_path, [*CLASSES, "ant/photo", "bee/photo.jpg_large", "bee/photo.JPG~"])
    (tmp_path / "ant" / "notes.txt").write_text("a note")
    (tmp_path / "bee" / "paper").write_bytes(b"%PDF-1.7 and so on")
    (tmp_path / "bee" / "nothing").touch()
    images = read(tmp_path)
    found = {e.path for e in images.examples}
    assert found == {*CLASSES, "ant/photo", "bee/photo.jpg_large", "bee/photo.JPG~"}
    assert dict(images.skipped) == {
        "ant/notes.txt": "is not an image",
        "bee/paper": "is not an image, but a PDF",
        "bee/nothing": "is empty: 0 bytes",
    }


def test_a_file_with_the_ending_of_an_image_counts_whatever_it_holds(tmp_path: Path) -> None:
    add_images(tmp_path, CLASSES)
    (tmp_path / "ant" / "broken.jpg").write_text("no image")
    images = read(tmp_path)
    assert "ant/broken.jpg" in {e.path for e in images.examples}
    assert images.skipped == ()


@pytest.mark.parametrize(
    "name", ["a.JPG", "a.Jpeg", "a.PNG", "a.TIF", "a.WebP", "a.HEIC", "a.b.c.BMP", "a.jfif"]
)
def test_endings_count_in_any_case(name: str, tmp_path: Path) -> None:
    add_images(tmp_path, CLASSES)
    (tmp_path / "ant" / name).write_text("not looked into")
    assert f"ant/{name}" in {e.path for e in read(tmp_path).examples}


@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", "DESKTOP.INI", ".DS_Store", ".a.png"])
def test_litter_and_hidden_files_are_not_even_listed(name: str, tmp_path: Path) -> None:
    add_images(tmp_path, [*CLASSES, f"ant/{name}", f"ant/sub/{name}"])
    for fields in ({}, {"label_regex": "^(ant|bee)"}):
        images = read(tmp_path, **fields)
        assert {e.path for e in images.examples} == set(CLASSES)
        assert images.skipped == ()


def test_hidden_folders_are_no_classes_and_hold_no_images(tmp_path: Path) -> None:
    add_images(tmp_path, [*CLASSES, ".cache/a.png", "ant/.thumbs/a.png"])
    assert read(tmp_path).classes == ("ant", "bee")
    assert {e.path for e in read(tmp_path).examples} == set(CLASSES)
    assert {e.path for e in read(tmp_path, label_regex="ant|bee").examples} == set(CLASSES)


def test_folders_below_a_class_belong_to_it(tmp_path: Path) -> None:
    names = ["ant/red/1.png", "ant/2.png", "bee/x/y/z.png", "bee/1.png"]
    assert labelled(read(add_images(tmp_path, names))) == {n: n.split("/")[0] for n in names}


def test_classes_of_numbers_are_sorted_as_torchvision_sorts_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    add_images(tmp_path, [f"{name}/a.png" for name in ("10", "9", "Z", "a")])
    assert list(read(tmp_path).classes) == ImageFolder(str(tmp_path)).classes


def test_given_classes_order_the_labels_of_folders(tmp_path: Path) -> None:
    add_images(tmp_path, CLASSES)
    images = read(tmp_path, classes=["bee", "ant"])
    assert images.classes == ("bee", "ant")
    assert {e.path[:3]: e.label for e in images.examples} == {"bee": 0, "ant": 1}
    message = refusal(tmp_path, classes=["bee", "wasp"])
    assert "has images of ant, which classes= does not name" in message


def test_a_given_class_without_images_is_refused_once_the_split_is_drawn(tmp_path: Path) -> None:
    add_images(tmp_path, CLASSES)
    with pytest.raises(DataError, match="no image of wasp would be in train"):
        read_images(Data(source=str(tmp_path), classes=["bee", "ant", "wasp"]), seed=0)


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    add_images(tmp_path, CLASSES)
    (tmp_path / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    example = next(e for e in read(tmp_path).examples if e.path == "ant/gone.png")
    assert (example.num_bytes, example.modified_ns) == (0, 0)


def test_links_to_image_files_are_images(tmp_path: Path) -> None:
    add_images(tmp_path / "store", ["a.png", "b.png"])
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for file in ("a.png", "b.png"):
            (tmp_path / "set" / name / file).symlink_to(tmp_path / "store" / file)
    images = read(tmp_path / "set")
    assert len(images.examples) == 4
    assert all(e.num_bytes == (tmp_path / "set" / e.path).stat().st_size for e in images.examples)


# --- Folders of splits ----------------------------------------------------------------------------


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    add_images(
        tmp_path, [f"{part}/{name}" for part in ("train", "val", "valid") for name in CLASSES]
    )
    assert "has val/ and valid/: rename the one that is not the split" in refusal(tmp_path)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_split_without_training_images_is_refused(part: str, tmp_path: Path) -> None:
    add_images(tmp_path, [f"{part}/{name}" for name in CLASSES])
    assert f"has {part}/ and no train/" in refusal(tmp_path)


def test_classes_that_differ_between_the_splits_are_named(tmp_path: Path) -> None:
    add_images(tmp_path, [f"train/{name}" for name in CLASSES])
    add_images(tmp_path, ["val/ant/1.png", "val/wasp/1.png"])
    message = refusal(tmp_path)
    assert f"{tmp_path / 'val'} lacks bee and also has wasp" in message
    assert "every split needs the classes of train/" in message


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    images = read_images(Data(source=str(tmp_path)), seed=0)
    assert images.classes == ("bus", "car", "train")


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    (tmp_path / "ant" / "linked").symlink_to(tmp_path / "bee")
    images = read_images(Data(source=str(tmp_path)), seed=0)
    assert {path for path, _ in images.skipped} == {"loose.png", "ant/linked"}
    assert len(images.examples) == 10
