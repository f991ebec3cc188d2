import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tuneapp.config import Data
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.reading import open_image
from tuneapp.data.source import read_images
from tuneapp.data.split import read_split, require_unchanged, write_split
from tuneapp.errors import DataError

UNEVEN = {"ant": 20, "bee": 40, "cat": 12}


def add_images(folder: Path, count: int, ending: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(folder / f"{i:03d}.{ending}")


def add_classes(folder: Path, counts: Mapping[str, int]) -> Path:
    for name, count in counts.items():
        add_images(folder / name, count)
    return folder


def splits_of(images: ImageSet) -> dict[str, str]:
    return {e.path: e.split for e in images.examples}


def all_files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_every_image_of_an_unsplit_folder_is_in_exactly_one_split(tmp_path: Path) -> None:
    images = read_images(Data(source=str(add_classes(tmp_path, UNEVEN))), seed=3)
    paths = [e.path for e in images.examples]
    assert len(paths) == len(set(paths))
    assert set(paths) == all_files(tmp_path)
    assert {e.split for e in images.examples} == {"train", "val", "test"}


def test_an_example_carries_the_label_of_its_folder_and_the_size_of_its_file(
    tmp_path: Path,
) -> None:
    images = read_images(Data(source=str(add_classes(tmp_path, UNEVEN))), seed=3)
    assert images.classes == ("ant", "bee", "cat")
    for e in images.examples:
        assert images.classes[e.label] == Path(e.path).parent.name
        assert e.num_bytes == (tmp_path / e.path).stat().st_size
        assert e.modified_ns == (tmp_path / e.path).stat().st_mtime_ns


def test_an_unsplit_folder_is_split_by_class(tmp_path: Path) -> None:
    images = read_images(Data(source=str(add_classes(tmp_path, UNEVEN))), seed=0)
    total = sum(UNEVEN.values())
    # 15 % of all for the test, then 15 % of the remaining for validation: 72 -> 11, 61 -> 9.
    sizes = Counter(e.split for e in images.examples)
    assert sizes == {"test": 11, "val": 9, "train": 52}
    for split, size in sizes.items():
        per_class = Counter(images.classes[e.label] for e in images.of(split))
        for name, count in UNEVEN.items():
            assert abs(per_class[name] - size * count / total) <= 1, (split, name)


def test_the_smallest_allowed_classes_are_in_every_split(tmp_path: Path) -> None:
    # 15 % of 20 images would be three for five classes.
    images = read_images(Data(source=str(add_classes(tmp_path, dict.fromkeys("abcde", 4)))), seed=0)
    for split, each in (("test", 1), ("val", 1), ("train", 2)):
        assert Counter(e.label for e in images.of(split)) == dict.fromkeys(range(5), each)


def test_the_same_seed_splits_alike_and_another_one_differently(tmp_path: Path) -> None:
    root = str(add_classes(tmp_path, UNEVEN))
    first = read_images(Data(source=root), seed=5)
    assert read_images(Data(source=root), seed=5) == first
    assert splits_of(read_images(Data(source=root), seed=6)) != splits_of(first)


def test_the_split_does_not_depend_on_the_order_in_which_the_disk_lists_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(add_classes(tmp_path, UNEVEN))
    first = read_images(Data(source=root), seed=0)
    iterdir, walk = Path.iterdir, os.walk

    def walk_backwards(top: Path, onerror: object) -> object:
        for place, folders, files in walk(top, onerror=onerror):
            yield place, folders, sorted(files, reverse=True)

    monkeypatch.setattr(Path, "iterdir", lambda p: iter(sorted(iterdir(p), reverse=True)))
    monkeypatch.setattr(os, "walk", walk_backwards)
    assert read_images(Data(source=root), seed=0) == first


@pytest.mark.parametrize(
    "names",
    [
        {"train": "train", "val": "val", "test": "test"},
        {"train": "training", "val": "valid", "test": "testing"},
        {"train": "train", "val": "validation", "test": "test"},
    ],
)
def test_folders_that_are_split_already_are_kept(names: dict[str, str], tmp_path: Path) -> None:
    sizes = {"train": 6, "val": 3, "test": 2}
    for split, folder in names.items():
        add_classes(tmp_path / folder, {"ant": sizes[split], "bee": sizes[split]})
    images = read_images(Data(source=str(tmp_path)), seed=0)
    assert images.classes == ("ant", "bee")
    for split, folder in names.items():
        mine = [e.path for e in images.of(split)]
        assert set(mine) == {p for p in all_files(tmp_path) if p.startswith(f"{folder}/")}
        assert len(mine) == 2 * sizes[split]


def test_without_a_test_folder_nothing_is_taken_from_train_and_val(tmp_path: Path) -> None:
    add_classes(tmp_path / "train", {"ant": 10, "bee": 10})
    add_classes(tmp_path / "val", {"ant": 4, "bee": 4})
    images = read_images(Data(source=str(tmp_path)), seed=0)
    assert Counter(e.split for e in images.examples) == {"train": 20, "val": 8}
    assert all(e.path.startswith(f"{e.split}/") for e in images.examples)


def test_a_missing_val_folder_is_split_off_the_training_images(tmp_path: Path) -> None:
    add_classes(tmp_path / "train", {"ant": 20, "bee": 20})
    add_classes(tmp_path / "test", {"ant": 3, "bee": 3})
    images = read_images(Data(source=str(tmp_path)), seed=0)
    assert len(images.of("train")) == 34
    assert Counter(e.label for e in images.of("val")) == {0: 3, 1: 3}
    assert all(e.path.startswith("train/") for e in images.of("train", "val"))
    assert [e.path.split("/")[0] for e in images.of("test")] == ["test"] * 6


def test_a_train_folder_alone_is_split_like_an_unsplit_folder(tmp_path: Path) -> None:
    add_classes(tmp_path / "train", {"ant": 20, "bee": 20})
    images = read_images(Data(source=str(tmp_path)), seed=0)
    # 15 % of 40 for the test, then 15 % of the remaining 34 for validation.
    assert Counter(e.split for e in images.examples) == {"test": 6, "val": 5, "train": 29}
    assert Counter(e.label for e in images.of("test")) == {0: 3, 1: 3}
    assert sorted(Counter(e.label for e in images.of("val")).values()) == [2, 3]
    assert all(e.path.startswith("train/") for e in images.examples)


def test_a_class_of_three_is_refused_as_such_and_one_of_four_is_split_twice(
    tmp_path: Path,
) -> None:
    add_classes(tmp_path / "three", {"ant": 30, "bee": 3})
    with pytest.raises(DataError, match=r"^class bee has fewer than 4 images"):
        read_images(Data(source=str(tmp_path / "three")), seed=0)
    add_classes(tmp_path / "four", {"ant": 8, "bee": 4})
    images = read_images(Data(source=str(tmp_path / "four")), seed=0)
    assert {e.split for e in images.examples if e.label == 1} == {"train", "val", "test"}


def test_hidden_folders_and_files_are_ignored(tmp_path: Path) -> None:
    add_classes(tmp_path, {"ant": 8, "bee": 8})
    seen = all_files(tmp_path)
    add_images(tmp_path / ".ipynb_checkpoints", 5)
    add_images(tmp_path / "ant" / ".thumbnails", 5)
    Image.new("RGB", (8, 8)).save(tmp_path / "bee" / "._000.png")
    images = read_images(Data(source=str(tmp_path)), seed=0)
    assert {e.path for e in images.examples} == seen
    assert images.classes == ("ant", "bee")


def test_endings_in_capitals_and_folders_inside_a_class_count_and_other_files_do_not(
    tmp_path: Path,
) -> None:
    add_images(tmp_path / "ant", 4, "JPG")
    add_images(tmp_path / "ant" / "more" / "deeper", 4, "Png")
    add_images(tmp_path / "bee", 4, "TIFF")
    add_images(tmp_path / "bee", 4, "webp")
    seen = all_files(tmp_path)
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "bee" / "png").write_text("no ending")
    (tmp_path / "bee" / "Thumbs.db").write_bytes(b"litter of an operating system")
    images = read_images(Data(source=str(tmp_path)), seed=0)
    assert {e.path for e in images.examples} == seen
    assert dict(images.skipped) == dict.fromkeys(["ant/notes.txt", "bee/png"], "is not an image")


def test_an_image_without_ending_or_with_a_strange_one_counts(tmp_path: Path) -> None:
    add_classes(tmp_path, {"ant": 8, "bee": 8})
    (tmp_path / "ant" / "000.png").rename(tmp_path / "ant" / "000")
    (tmp_path / "bee" / "000.png").rename(tmp_path / "bee" / "000.upload")
    images = read_images(Data(source=str(tmp_path)), seed=0)
    assert {"ant/000", "bee/000.upload"} < {e.path for e in images.examples}
    assert {e.path for e in images.examples} == all_files(tmp_path)
    assert images.skipped == ()


def one_class(root: Path) -> None:
    add_classes(root, {"ant": 8})


def no_class(root: Path) -> None:
    add_images(root, 8)


def empty_class(root: Path) -> None:
    add_classes(root, {"ant": 8, "bee": 8, "hollow": 0})


def class_missing_in_val(root: Path) -> None:
    add_classes(root / "train", {"ant": 8, "bee": 8, "wasp": 8})
    add_classes(root / "val", {"ant": 8, "bee": 8})


def class_only_in_val(root: Path) -> None:
    add_classes(root / "train", {"ant": 8, "bee": 8})
    add_classes(root / "val", {"ant": 8, "bee": 8, "wasp": 8})


def class_missing_in_test(root: Path) -> None:
    add_classes(root / "train", {"ant": 8, "bee": 8, "wasp": 8})
    add_classes(root / "val", {"ant": 8, "bee": 8, "wasp": 8})
    add_classes(root / "test", {"ant": 8, "bee": 8})


def too_few_of_a_class(root: Path) -> None:
    add_classes(root, {"ant": 8, "bee": 8, "wasp": 3})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (one_class, ["{root}", "1 class folder", "at least two"]),
        (no_class, ["{root}", "0 class folder"]),
        (empty_class, ["{root}/hollow", "no image"]),
        (class_missing_in_val, ["{root}/val", "lacks wasp"]),
        (class_only_in_val, ["{root}/val", "has wasp"]),
        (class_missing_in_test, ["{root}/test", "lacks wasp"]),
        (too_few_of_a_class, ["wasp", "fewer than 4"]),
    ],
)
def test_folders_that_cannot_be_trained_on_are_refused_by_name(
    make: Callable[[Path], None], told: list[str], tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(DataError) as caught:
        read_images(Data(source=str(tmp_path)), seed=0)
    for words in told:
        assert words.format(root=tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*no such folder.*digits"):
        read_images(Data(source=str(tmp_path / "nowhere")), seed=0)


@pytest.mark.timeout(20)
def test_linked_folders_that_loop_are_not_followed(tmp_path: Path) -> None:
    add_classes(tmp_path, {"ant": 8, "bee": 8})
    seen = all_files(tmp_path)
    (tmp_path / "ant" / "up").symlink_to(tmp_path)
    (tmp_path / "bee" / "self").symlink_to(tmp_path / "bee")
    (tmp_path / "bee" / "to_itself").symlink_to("to_itself")
    assert {e.path for e in read_images(Data(source=str(tmp_path)), seed=0).examples} == seen


ODD_NAMES = [
    "plain.png",
    "größe 図.png",
    os.fsdecode(b"latin-\xe9\xff.png"),
    'comma, "quote".png',
    "two\nlines.png",
    "carriage\rreturn.png",
    " space at both ends .png",
    "percent%20;semicolon'.png",
]


def test_a_split_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("ant, 'black'", "Käfer\nrot"):
        (root / name).mkdir(parents=True)
        for odd in ODD_NAMES:
            Image.new("RGB", (8, 8)).save(root / name / odd)
    images = read_images(Data(source=str(root)), seed=0)
    assert len(images.examples) == 2 * len(ODD_NAMES)

    write_split(tmp_path / "split.csv", images)
    again = read_split(tmp_path / "split.csv", images.root, images.classes, images.data)
    assert again == images
    require_unchanged(again)


def test_the_embedded_split_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    images = read_images(Data(source="digits"), seed=4)
    write_split(tmp_path / "split.csv", images)
    assert read_split(tmp_path / "split.csv", None, images.classes, images.data) == images


@pytest.mark.parametrize(
    "text",
    [
        None,
        "path,class,split\na.png,ant,train\n",
        "path,class,split,bytes\na.png,wasp,train,3\n",
        "path,class,split,bytes\na.png,ant,train,many\n",
    ],
    ids=["missing file", "missing column", "unknown class", "no number"],
)
def test_a_damaged_split_file_is_named(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "split.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=r"split\.csv"):
        read_split(file, tmp_path, ["ant", "bee"])


def test_images_that_are_as_they_were_pass(tmp_path: Path) -> None:
    require_unchanged(read_images(Data(source=str(add_classes(tmp_path, UNEVEN))), seed=0))
    require_unchanged(read_images(Data(source="digits"), seed=0))


@pytest.mark.parametrize("change", ["removed", "longer", "replaced by a folder"])
def test_images_that_are_gone_or_changed_are_named(change: str, tmp_path: Path) -> None:
    images = read_images(Data(source=str(add_classes(tmp_path, UNEVEN))), seed=0)
    file = tmp_path / "bee" / "007.png"
    if change == "longer":
        file.write_bytes(file.read_bytes() + b"x")
    else:
        file.unlink()
        if change == "replaced by a folder":
            file.mkdir()
    with pytest.raises(DataError, match=r"^1 of 72 images .* bee/007\.png"):
        require_unchanged(images)


def digested(images: ImageSet) -> ImageSet:
    """With the digest that the run would know each file by."""
    return replace(
        images,
        examples=tuple(
            replace(
                e, digest=blake2b((images.root / e.path).read_bytes(), digest_size=16).hexdigest()
            )
            for e in images.examples
        ),
    )


def test_a_copy_of_the_images_with_other_times_passes_and_another_content_does_not(
    tmp_path: Path,
) -> None:
    images = digested(read_images(Data(source=str(add_classes(tmp_path, UNEVEN))), seed=0))
    for path in all_files(tmp_path):
        os.utime(tmp_path / path, ns=(0, 1))
    require_unchanged(images)
    changed = tmp_path / "ant" / "003.png"
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    with pytest.raises(DataError, match=r"^1 of 72 images .* ant/003\.png"):
        require_unchanged(images)


def test_an_image_that_could_not_be_read_then_may_be_as_bad_or_gone_now(tmp_path: Path) -> None:
    images = read_images(Data(source=str(add_classes(tmp_path, UNEVEN))), seed=0)
    bad = [
        replace(e, bad="cannot be read: Permission denied", num_bytes=0) if i == 0 else e
        for i, e in enumerate(images.examples)
    ]
    (tmp_path / bad[0].path).unlink()
    require_unchanged(replace(images, examples=tuple(bad)))
    bad[0] = replace(bad[0], bad="")
    with pytest.raises(DataError, match=r"^1 of 72 images"):
        require_unchanged(replace(images, examples=tuple(bad)))


# Where the left half of a stored image is seen, by EXIF orientation (Exif 2.32, table 6).
LEFT_HALF_SEEN = {1: "left", 2: "right", 3: "right", 6: "top", 8: "bottom"}


@pytest.mark.parametrize(("orientation", "side"), LEFT_HALF_SEEN.items())
def test_an_image_is_turned_as_its_camera_was_held(
    orientation: int, side: str, tmp_path: Path
) -> None:
    stored = np.zeros((20, 40, 3), dtype=np.uint8)
    stored[:, :20] = (255, 0, 0)
    stored[:, 20:] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.jpg", exif=exif, quality=95)

    images = ImageSet(tmp_path, ("a", "b"), ())
    seen = np.asarray(open_image(images, Example("turned.jpg", 0, "train", 1))).astype(int)
    assert seen.shape == ((20, 40, 3) if side in ("left", "right") else (40, 20, 3))
    height, width = seen.shape[:2]
    edge = {
        "left": seen[height // 2, 2],
        "right": seen[height // 2, width - 3],
        "top": seen[2, width // 2],
        "bottom": seen[height - 3, width // 2],
    }
    assert next(s for s, pixel in edge.items() if pixel[0] > 200 and pixel[2] < 60) == side
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[side]
    assert edge[opposite][2] > 200


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_pixels_becomes_rgb(mode: str, tmp_path: Path) -> None:
    name = "image.tif" if mode == "CMYK" else "image.png"
    Image.new("RGB", (9, 5), (255, 255, 255)).convert(mode).save(tmp_path / name)
    image = open_image(ImageSet(tmp_path, ("a", "b"), ()), Example(name, 0, "train", 1))
    assert (image.mode, image.size) == ("RGB", (9, 5))
    assert np.asarray(image).min() == 255


def truncated_jpeg(file: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated_jpeg, "cannot be decoded: .*truncated"),
        (lambda file: file.write_bytes(b""), "is empty: 0 bytes"),
        (lambda file: file.write_text("I am not an image"), "is not an image"),
        (lambda file: None, "cannot be read: No such file"),
    ],
    ids=["truncated", "empty", "text", "missing"],
)
def test_a_file_that_cannot_be_decoded_is_named(
    spoil: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "spoilt.jpg"
    spoil(file)
    with pytest.raises(DataError, match=rf"spoilt\.jpg {reason}"):
        open_image(ImageSet(tmp_path, ("a", "b"), ()), Example("spoilt.jpg", 0, "train", 1))


def test_the_embedded_scans_are_all_of_scikit_learns_with_its_labels() -> None:
    digits = load_digits()
    images = read_images(Data(source="digits"), seed=0)
    assert len(images.examples) == 1797
    by_index = {int(Path(e.path).stem): e for e in images.examples}
    assert [by_index[i].label for i in range(1797)] == digits.target.tolist()
    assert images.classes == tuple("0123456789")
    for split, size in (("test", 270), ("val", 229), ("train", 1298)):
        assert len(images.of(split)) == size
        assert {e.label for e in images.of(split)} == set(range(10))


def test_an_embedded_scan_is_scikit_learns_in_shades_of_0_to_255() -> None:
    digits = load_digits()
    images = read_images(Data(source="digits"), seed=0)
    for e in itertools.islice(images.examples, 0, None, 100):
        scan = np.asarray(open_image(images, e))
        assert scan.shape == (8, 8, 3)
        wanted = digits.images[int(Path(e.path).stem)] * 255 / 16
        assert np.abs(scan - wanted[:, :, None]).max() <= 0.5


def test_a_folder_called_digits_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_classes(tmp_path / "digits", {"ant": 8, "bee": 8})
    monkeypatch.chdir(tmp_path)
    assert read_images(Data(source="digits"), seed=0).classes == ("ant", "bee")


@pytest.mark.parametrize("text", ["", "path,class,split,bytes\n", "path,class,split,bytes\na,b"])
def test_a_split_that_was_cut_off_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "split.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=r"split\.csv"):
        read_split(file, tmp_path, ["b"])


def test_split_folders_are_known_in_any_case(
    make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_photos(tmp_path / "photos", per_class=4, split=True)
    for name in ("train", "val", "test"):
        (root / name).rename(root / name.upper())
    images = read_images(Data(source=str(root)), seed=0)
    assert images.classes == ("blue", "green", "red")
    assert {e.path.split("/")[0] for e in images.of("test")} == {"TEST"}


def test_a_split_without_training_images_is_no_folder_of_classes(
    make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_photos(tmp_path / "photos", per_class=4, split=True)
    (root / "train").rename(root / "a")
    with pytest.raises(DataError, match="has val/ and no train/"):
        read_images(Data(source=str(root)), seed=0)
