"""Splits: who is for training, validation and test, whatever the classes and groups are."""

import csv
import os
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tuneapp.config import Data
from tuneapp.data.decode import digest
from tuneapp.data.examples import Example, ImageSet, Labels
from tuneapp.data.source import read_exclusions, read_images, read_unsplit
from tuneapp.data.split import (
    leaking_groups,
    read_split,
    require_unchanged,
    require_usable,
    split,
    write_bad_images,
    write_split,
)
from tuneapp.errors import DataError

LETTERS = "abcdefghijklmnop"


def image_set(
    labels: Sequence[Labels],
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    **fields: Any,
) -> ImageSet:
    """Return examples that are no files, with classes a, b, c, ..."""
    examples = tuple(
        Example(
            f"{i:05d}.png",
            label,
            splits[i] if splits else "train",
            1,
            group=groups[i] if groups else "",
        )
        for i, label in enumerate(labels)
    )
    several = any(isinstance(label, tuple) for label in labels)
    shown = {c for e in examples for c in e.labels}
    return ImageSet(None, tuple(LETTERS[: max(shown) + 1]), examples, Data(**fields), several)


def uneven(**sizes: int) -> list[Labels]:
    """Return labels, `a` times 0, `b` times 1, ..., in a mixed order."""
    labels: list[Labels] = [
        LETTERS.index(name) for name, size in sizes.items() for _ in range(size)
    ]
    random.Random(0).shuffle(labels)
    return labels


def sizes(images: ImageSet) -> dict[str, int]:
    return dict(Counter(e.split for e in images.examples))


def sides(images: ImageSet) -> dict[str, str]:
    return {e.path: e.split for e in images.examples}


def per_class(images: ImageSet, split_name: str) -> list[int]:
    """Count by hand, not by ImageSet.counts."""
    shown = [label for e in images.examples if e.split == split_name for label in e.labels]
    return [shown.count(label) for label in range(len(images.classes))]


def refused(images: ImageSet, seed: int = 0) -> str:
    with pytest.raises(DataError) as caught:
        split(images, seed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Shares ---------------------------------------------------------------------------------------


def test_each_class_gives_its_share_to_each_side() -> None:
    images = split(image_set(uneven(a=100, b=200, c=700)), seed=0)
    # The test takes 15 % of 1000; the validation 15 % of the 850 that are left, 127.5, which
    # rounds to 128; of each class likewise: 85 -> 12.75, 170 -> 25.5, 595 -> 89.25.
    assert sizes(images) == {"test": 150, "val": 128, "train": 722}
    assert per_class(images, "test") == [15, 30, 105]
    for count, exact in zip(per_class(images, "val"), (12.75, 25.5, 89.25), strict=True):
        assert abs(count - exact) < 1


@pytest.mark.parametrize(
    ("test_share", "val_share", "wanted"),
    [
        (0.0, 0.25, {"val": 50, "train": 150}),
        (0.5, 0.5, {"test": 100, "val": 50, "train": 50}),
        (0.1, 0.2, {"test": 20, "val": 36, "train": 144}),
        (0.001, 0.001, {"test": 2, "val": 2, "train": 196}),  # one of each class at least
    ],
)
def test_other_shares_are_taken_as_asked(
    test_share: float, val_share: float, wanted: Mapping[str, int]
) -> None:
    labels = uneven(a=100, b=100)
    images = split(image_set(labels, test_share=test_share, val_share=val_share), seed=0)
    assert sizes(images) == wanted
    for name in wanted:
        assert len(set(per_class(images, name))) == 1


def test_examples_are_sorted_by_split_and_path_and_otherwise_untouched() -> None:
    before = image_set(uneven(a=20, b=30))
    before = replace(
        before,
        examples=tuple(
            replace(e, weight=i / 3, modified_ns=i) for i, e in enumerate(before.examples)
        ),
    )
    images = split(before, seed=1)
    keys = [(e.split, e.path) for e in images.examples]
    assert keys == sorted(keys)
    unsplit = {replace(e, split="train") for e in images.examples}
    assert unsplit == set(before.examples)


def test_a_seed_gives_one_split_and_another_seed_another_one() -> None:
    for groups in (None, [f"g{i // 4}" for i in range(400)]):
        images = image_set(uneven(a=100, b=300), groups)
        assert split(images, seed=7) == split(images, seed=7)
        assert len({tuple(sides(split(images, seed=s)).items()) for s in range(5)}) == 5


def test_a_validation_split_of_the_data_stays_and_no_test_is_drawn() -> None:
    names = ["train", "train", "train", "val"] * 10
    images = split(image_set([0, 1, 0, 0, 1, 1, 0, 1] * 5, splits=names), seed=0)
    assert sizes(images) == {"train": 30, "val": 10}
    assert sides(images) == {f"{i:05d}.png": name for i, name in enumerate(names)}


def test_beside_a_test_split_of_the_data_only_validation_is_drawn() -> None:
    names = ["train"] * 40 + ["test"] * 10
    images = split(image_set([0, 1] * 25, splits=names, val_share=0.25), seed=0)
    assert sizes(images) == {"train": 30, "val": 10, "test": 10}
    assert {e.path for e in images.of("test")} == {f"{i:05d}.png" for i in range(40, 50)}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_class_of_fewer_than_four_images_is_named(number: int) -> None:
    message = refused(image_set([0] * 50 + [1] * number))
    assert message.startswith("class b has fewer than 4 images")


def test_four_images_of_each_class_are_enough() -> None:
    images = split(image_set([0] * 4 + [1] * 4), seed=0)
    for name in ("train", "val", "test"):
        assert min(per_class(images, name)) >= 1


def test_a_split_of_the_data_without_some_class_is_refused_by_name() -> None:
    names = ["train"] * 8 + ["val"] * 4 + ["test"] * 2
    labels: list[Labels] = [0, 1] * 4 + [0, 1, 0, 1] + [0, 0]
    assert refused(image_set(labels, splits=names)).startswith(
        "no image of b would be in test: add images of that class"
    )


# --- Groups ---------------------------------------------------------------------------------------


def random_groups(draw: random.Random) -> tuple[list[Labels], list[str]]:
    """Return labels and groups: few or many, of one class or of all, of equal or odd sizes."""
    classes = draw.randint(2, 4)
    of_one_class = draw.random() < 0.5
    labels: list[Labels] = []
    groups: list[str] = []
    for number in range(draw.randint(4 * classes, 15 * classes)):
        own = number % classes
        for _ in range(draw.choice([1, 2, draw.randint(4, 30)]) + 3 * (number < 2 * classes)):
            labels.append(own if of_one_class else draw.randrange(classes))
            groups.append(f"patient {number}")
    return labels, groups


@pytest.mark.parametrize("trial", range(60))
def test_no_group_is_on_both_sides_and_every_class_on_each(trial: int) -> None:
    draw = random.Random(trial)
    labels, groups = random_groups(draw)
    folds = draw.choice([None, None, 2, 3])
    if draw.random() < 0.3:  # some images of no group
        groups = [group if draw.random() < 0.9 else "" for group in groups]
    images = split(image_set(labels, groups, folds=folds), seed=trial)

    assert len(images.examples) == len(labels)
    where = defaultdict(set)
    for e in images.examples:
        if e.group:
            where[e.group].add((e.split, e.fold))
    assert all(len(places) == 1 for places in where.values())
    for number in range(1, (folds or 0) + 1):
        for name in ("train", "val", "test"):
            assert min(per_class(images.fold(number), name)) >= 1
    if folds is None:
        for name in ("train", "val", "test"):
            assert min(per_class(images, name)) >= 1


@pytest.mark.parametrize(("patients", "classes"), [(6, 2), (12, 3), (20, 4), (30, 10)])
def test_a_few_patients_of_one_class_each_are_split(patients: int, classes: int) -> None:
    labels: list[Labels] = [p % classes for p in range(patients) for _ in range(5)]
    groups = [f"p{p}" for p in range(patients) for _ in range(5)]
    for seed in range(5):
        images = split(image_set(labels, groups), seed)
        assert not leaking_groups(images)
        for name in ("train", "val", "test"):
            assert min(per_class(images, name)) >= 1
        # No more than a patient of each class where there are so few.
        assert len({e.group for e in images.of("test")}) <= max(classes, round(patients / 6))


def test_many_small_groups_give_about_the_shares_and_even_classes() -> None:
    labels = uneven(a=300, b=900)
    groups = [f"g{i // 3}" for i in range(1200)]
    images = split(image_set(labels, groups, val_share=0.2, test_share=0.1), seed=0)
    # A tenth of 1200, a fifth of what is left, in groups of three.
    assert abs(sizes(images)["test"] - 120) <= 6
    assert abs(sizes(images)["val"] - 216) <= 9
    for name in ("train", "val", "test"):
        a, b = per_class(images, name)
        assert a / (a + b) == pytest.approx(0.25, abs=0.03)


def test_groups_give_the_part_that_is_nearest_to_the_share() -> None:
    images = image_set(uneven(a=700, b=700), [f"g{i // 2}" for i in range(1400)], test_share=0)
    # 15 % is about a seventh (14.3 %), and not a sixth (16.7 %).
    assert abs(sizes(split(images, seed=0))["val"] - 200) <= 4


def test_one_group_of_all_images_cannot_be_split() -> None:
    message = refused(image_set(uneven(a=20, b=20), ["same"] * 40))
    assert "all images belong to one group, 'same'" in message
    assert "check the group column or expression" in message


def test_a_class_in_one_group_only_cannot_be_on_all_sides() -> None:
    labels: list[Labels] = [i % 2 for i in range(40)] + [2] * 10
    groups = [f"p{i // 4}" for i in range(40)] + ["p99"] * 10
    assert "no image of c would be in" in refused(image_set(labels, groups))


def test_a_group_that_the_data_put_on_both_sides_is_named() -> None:
    labels: list[Labels] = [0, 1] * 6
    names = ["train"] * 8 + ["val"] * 4
    groups = [f"p{i}" for i in range(12)]
    groups[9] = groups[3]
    images = image_set(labels, groups, names)
    assert leaking_groups(images) == {"p3": ["train", "val"]}
    message = refused(images)
    assert "1 group(s) are in several splits, such as 'p3' in train and val" in message


def make_files(root: Path, names: Iterable[str], colour: int = 0) -> Path:
    for i, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), (i % 256, colour, i // 256)).save(file)
    return root


PATIENTS = [f"{c}/pat{p:02d}_{i}.png" for c in ("ill", "well") for p in range(12) for i in range(3)]


@pytest.mark.parametrize(
    ("expression", "group"),
    [(r"/(pat\d+)_", "pat07"), (r"pat\d\d", "pat07"), (r"(pat\d\d)_(\d)", "pat07")],
)
def test_groups_are_found_in_paths_by_the_first_group_or_the_whole_match(
    expression: str, group: str, tmp_path: Path
) -> None:
    data = Data(source=str(make_files(tmp_path, PATIENTS)), group_regex=expression)
    images = read_images(data, seed=2)
    found = {e.path: e.group for e in images.examples}
    assert found["ill/pat07_1.png"] == found["well/pat07_2.png"] == group
    assert len(set(found.values())) == 12
    where = defaultdict(set)
    for e in images.examples:
        where[Path(e.path).name[:5]].add(e.split)
    assert all(len(places) == 1 for places in where.values())


@pytest.mark.parametrize(
    ("expression", "without"),
    [(r"/(pat0\d)_", 12), (r"/pat0\d", 12), (r"ill/(pat)?", 36), (r"()pat", 72), (r"dog", 72)],
)
def test_paths_without_a_group_are_counted_and_named(
    expression: str, without: int, tmp_path: Path
) -> None:
    data = Data(source=str(make_files(tmp_path, PATIENTS)), group_regex=expression)
    with pytest.raises(DataError) as caught:
        read_images(data, seed=0)
    message = str(caught.value)
    assert message.startswith(f"--group-regex {expression!r} finds no group in {without} of 72")
    assert re.search(r"such as '(ill|well)/pat\d+_\d\.png'", message)


# --- Folds ----------------------------------------------------------------------------------------


def fold_sizes(images: ImageSet) -> list[int]:
    return [sum(e.fold == n for e in images.examples) for n in range(1, images.num_folds + 1)]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_each_image_that_is_not_for_testing_is_in_one_fold(folds: int) -> None:
    images = split(image_set(uneven(a=100, b=43), folds=folds), seed=0)
    assert images.num_folds == folds
    assert sizes(images) == {"test": 21, "train": 122}  # 15 % of 143
    assert {e.fold for e in images.of("test")} == {0}
    assert {e.fold for e in images.of("train")} == set(range(1, folds + 1))
    validated: list[str] = []
    for number in range(1, folds + 1):
        side = images.fold(number)
        assert [e.path for e in side.examples] == [e.path for e in images.examples]
        assert side.of("test") == images.of("test")
        assert {e.path for e in side.of("val")} == {
            e.path for e in images.examples if e.fold == number
        }
        assert {e.fold for e in side.of("train")} == set(range(1, folds + 1)) - {number}
        validated += [e.path for e in side.of("val")]
    assert sorted(validated) == sorted(e.path for e in images.of("train"))


def test_the_classes_of_the_folds_differ_by_one_image_at_most() -> None:
    images = split(image_set(uneven(a=101, b=44, c=17), folds=4), seed=3)
    counts = [per_class(images.fold(n), "val") for n in range(1, 5)]
    for of_class in zip(*counts, strict=True):
        assert max(of_class) - min(of_class) <= 1


def test_folds_are_made_of_whole_groups() -> None:
    groups = [f"g{i // 4}" for i in range(240)]
    images = split(image_set(uneven(a=100, b=140), groups, folds=5), seed=1)
    fold_of = defaultdict(set)
    for e in images.examples:
        fold_of[e.group].add((e.fold, e.split))
    assert all(len(places) == 1 for places in fold_of.values())
    assert max(fold_sizes(images)) - min(fold_sizes(images)) <= 12


@pytest.mark.parametrize("grouped", [False, True])
def test_a_seed_gives_the_same_folds_and_another_seed_others(grouped: bool) -> None:
    groups = [f"g{i // 4}" for i in range(100)] if grouped else None
    images = image_set(uneven(a=50, b=50), groups, folds=3, test_share=0)
    assert split(images, 1) == split(images, 1)
    drawn = {tuple((e.path, e.fold) for e in split(images, seed).examples) for seed in range(4)}
    assert len(drawn) == 4


def test_folds_join_the_training_and_validation_images_of_the_data() -> None:
    names = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
    images = split(image_set([0, 1] * 12, splits=names, folds=3), seed=0)
    assert sizes(images) == {"train": 18, "test": 6}
    assert fold_sizes(images) == [6, 6, 6]


def test_folds_without_a_test_share_use_every_image() -> None:
    images = split(image_set([0, 1] * 12, folds=3, test_share=0), seed=0)
    assert sizes(images) == {"train": 24}


def test_more_folds_than_images_of_a_class_are_refused_by_name() -> None:
    message = refused(image_set([0] * 40 + [1] * 5, folds=5))
    assert "5 folds need 5 images of each class, and there are fewer of b" in message
    assert "give fewer folds" in message


def test_more_folds_than_groups_are_refused() -> None:
    labels: list[Labels] = [0, 1] * 20
    groups = [f"p{i // 10}" for i in range(40)]
    message = refused(image_set(labels, groups, folds=5, test_share=0))
    assert message == "5 folds need 5 groups, and there are 4"


def test_a_fold_without_a_class_is_named() -> None:
    labels: list[Labels] = [0] * 30 + [1] * 30
    groups = [f"p{i // 3}" for i in range(30)] + ["q"] * 15 + ["r"] * 15
    message = refused(image_set(labels, groups, folds=3, test_share=0))
    assert "no image of b would be in val of fold" in message
    assert "or give fewer folds" in message


def test_the_sealed_set_has_no_test_example() -> None:
    images = split(image_set(uneven(a=30, b=30)), seed=0)
    sealed = images.sealed()
    assert sealed.examples == (*images.of("train"), *images.of("val"))
    assert sealed.of("test") == ()
    assert len(sealed.examples) + len(images.of("test")) == 60


# --- Several labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("folds", [None, 3])
def test_every_class_of_a_multi_label_set_is_on_every_side(folds: int | None, seed: int) -> None:
    draw = random.Random(seed)
    odds = [0.6, 0.3, 0.1, 0.05]
    labels: list[Labels] = [
        tuple(c for c, share in enumerate(odds) if draw.random() < share) for _ in range(400)
    ]
    images = split(image_set(labels, folds=folds), seed)
    assert images.is_multilabel
    for side in [images.fold(n + 1) for n in range(folds)] if folds else [images]:
        for name in ("train", "val", "test"):
            assert min(per_class(side, name)) >= 1
    assert any(e.label == () for e in images.examples)
    assert abs(sizes(images)["test"] - 60) <= 1


def test_rare_sets_of_labels_and_images_without_any_are_no_obstacle() -> None:
    labels: list[Labels] = (
        [(0,)] * 40 + [(1,)] * 40 + [(0, 1)] * 4 + [()] + [(0, 2)] * 12 + [(1, 2)]
    )
    images = split(image_set(labels), seed=0)
    assert len(images.examples) == len(labels)
    for name in ("train", "val", "test"):
        assert min(per_class(images, name)) >= 1


def test_a_rare_class_is_spread_by_itself_and_not_by_the_common_one_beside_it() -> None:
    labels: list[Labels] = [(0,)] * 80 + [(0, 1)] * 20
    random.Random(1).shuffle(labels)
    for seed in range(5):
        images = split(image_set(labels, test_share=0.2, val_share=0.25), seed)
        assert [per_class(images, name) for name in ("train", "val", "test")] == [
            [60, 12], [20, 4], [20, 4],
        ]  # fmt: skip


def test_a_class_of_three_images_in_a_multi_label_set_is_named() -> None:
    labels: list[Labels] = [(0,)] * 30 + [(1,)] * 30 + [(0, 2)] * 3
    assert refused(image_set(labels)).startswith("class c has fewer than 4 images")


def test_groups_of_multi_label_images_stay_whole() -> None:
    draw = random.Random(3)
    labels: list[Labels] = [tuple(c for c in range(3) if draw.random() < 0.4) for _ in range(300)]
    images = split(image_set(labels, [f"g{i // 5}" for i in range(300)]), seed=0)
    assert not leaking_groups(images)
    for name in ("train", "val", "test"):
        assert min(per_class(images, name)) >= 1


# --- The split as a file --------------------------------------------------------------------------

NOT_UTF8 = b"\xff\xfe".decode("utf-8", "surrogateescape")
ODD = [
    *("a,b", 'q"uote', "new\nline", "carriage\rreturn", "both\r\n", "Ä梨", NOT_UTF8),
    *("'", " space "),
]


@pytest.mark.parametrize("several", [False, True])
def test_a_split_is_read_back_exactly(several: bool, tmp_path: Path) -> None:
    classes = ("plain", *ODD)
    examples = []
    for i, name in enumerate([*ODD, *ODD]):
        label: Labels = i % len(classes)
        if several:
            label = tuple(c for c in range(len(classes)) if (i + 1) >> c & 1 and i != 4)
        examples.append(
            Example(
                f"{i}/{name}.png", label, ("train", "val", "test")[i % 3], i * 10**11,
                group=name if i % 2 else "", weight=1 / 3 if i % 2 else 0.0, fold=i % 4,
                modified_ns=1_700_000_000_123_456_789 + i, digest=digest(bytes([i])),
                bad="" if i % 5 else f"cannot be decoded: {name}",
            )
        )  # fmt: skip
    data = Data(source="somewhere", folds=3)
    images = ImageSet(tmp_path, classes, tuple(examples), data, several)
    file = tmp_path / "split.csv"
    write_split(file, images)
    assert read_split(file, tmp_path, classes, data, several) == images


def test_the_columns_of_a_split_file_are_what_other_programs_read(tmp_path: Path) -> None:
    examples = (
        Example("a.png", (0, 1), "train", 12, "p1", 0.5, 2, 34, "abc", ""),
        Example("b.png", (), "test", 0, bad="is empty: 0 bytes"),
    )
    write_split(tmp_path / "s.csv", ImageSet(tmp_path, ("x", "y"), examples, Data(), True))
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        [
            *("path", "class", "split", "bytes", "fold"),
            *("group", "weight", "modified_ns", "digest", "bad"),
        ],
        ["a.png", '["x", "y"]', "train", "12", "2", "p1", "0.5", "34", "abc", ""],
        ["b.png", "[]", "test", "0", "0", "", "1.0", "0", "", "is empty: 0 bytes"],
    ]  # fmt: skip


def test_a_split_file_of_before_folds_groups_and_digests_is_read(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("path,class,split,bytes\na.png,x,train,3\nb.png,y,val,4\n")
    images = read_split(tmp_path / "s.csv", tmp_path, ["x", "y"])
    assert images.examples == (Example("a.png", 0, "train", 3), Example("b.png", 1, "val", 4))


@pytest.mark.parametrize("row", ['a,"[1]",train,3', "a,nonsense,train,3", 'a,"[""z""]",train,3'])
def test_a_damaged_multi_label_split_is_named(row: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f"path,class,split,bytes\n{row}\n")
    with pytest.raises(DataError, match=r"s\.csv cannot be read as a split"):
        read_split(tmp_path / "s.csv", tmp_path, ["x", "y"], is_multilabel=True)


def test_the_list_of_bad_images_has_each_with_its_cause_and_the_files_that_are_none(
    tmp_path: Path,
) -> None:
    examples = (
        Example("good.png", 0, "train", 1),
        Example("odd,name.png", 1, "val", 1, bad="is empty: 0 bytes"),
    )
    images = ImageSet(tmp_path, ("x", "y"), examples, skipped=(("notes.txt", "is not an image"),))
    write_bad_images(tmp_path / "bad.csv", images)
    with (tmp_path / "bad.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "class", "split", "cause"],
            ["odd,name.png", "y", "val", "is empty: 0 bytes"],
            ["notes.txt", "", "", "is not an image"],
        ]
    write_bad_images(tmp_path / "none.csv", replace(images, examples=examples[:1], skipped=()))
    assert not (tmp_path / "none.csv").exists()


# --- Files that change ----------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> ImageSet:
    """Images with the digests that decoding would find."""
    names = [f"{c}/{i}.png" for c in "xy" for i in range(6)]
    images = read_images(Data(source=str(make_files(tmp_path / "photos", names))), seed=0)
    root = images.root
    assert root is not None
    return replace(
        images,
        examples=tuple(
            replace(e, digest=digest((root / e.path).read_bytes())) for e in images.examples
        ),
    )


def swap(file: Path, content: bytes, *, keep_time: bool) -> None:
    before = file.stat()
    file.write_bytes(content)
    later = 0 if keep_time else 5_000_000_000
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + later))


def test_another_content_of_the_same_size_is_noticed_by_its_time(recorded: ImageSet) -> None:
    assert recorded.root is not None
    file = recorded.root / "x" / "3.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    swap(file, bytes(content), keep_time=False)
    with pytest.raises(DataError, match=r"^1 of 12 images .* changed since .*: x/3\.png; restore"):
        require_unchanged(recorded)


def test_a_file_of_the_same_size_and_time_is_not_read_again(recorded: ImageSet) -> None:
    assert recorded.root is not None
    file = recorded.root / "x" / "3.png"
    swap(file, bytes(file.stat().st_size), keep_time=True)
    require_unchanged(recorded)


def test_a_copy_with_other_times_and_the_same_contents_passes(
    recorded: ImageSet, tmp_path: Path
) -> None:
    assert recorded.root is not None
    for i, file in enumerate(recorded.root.rglob("*.png")):
        os.utime(file, ns=(10**18 + i, 10**18 + i))
    require_unchanged(recorded)
    elsewhere = tmp_path / "copy"
    shutil.copytree(recorded.root, elsewhere)
    require_unchanged(replace(recorded, root=elsewhere))


@pytest.mark.parametrize("change", ["gone", "longer", "a folder", "a folder of the same size"])
def test_every_file_that_is_not_what_it_was_is_named(change: str, recorded: ImageSet) -> None:
    assert recorded.root is not None
    file = recorded.root / "y" / "1.png"
    if change == "longer":
        swap(file, file.read_bytes() + b"\0", keep_time=True)
    else:
        file.unlink()
    if change.startswith("a folder"):
        file.mkdir()
    if change == "a folder of the same size":
        size = file.stat().st_size
        recorded = replace(
            recorded,
            examples=tuple(
                replace(e, num_bytes=size) if e.path == "y/1.png" else e for e in recorded.examples
            ),
        )
    with pytest.raises(DataError, match=r"^1 of 12 images .*: y/1\.png;"):
        require_unchanged(recorded)


def test_images_that_were_bad_may_stay_so_and_no_other(recorded: ImageSet) -> None:
    assert recorded.root is not None
    (recorded.root / "x" / "0.png").unlink()
    absent = tuple(
        replace(e, num_bytes=0, modified_ns=0, digest="", bad="cannot be read: gone")
        if e.path == "x/0.png"
        else e
        for e in recorded.examples
    )
    require_unchanged(replace(recorded, examples=absent))
    was_there = tuple(replace(e, num_bytes=9) if e.bad else e for e in absent)
    with pytest.raises(DataError, match=r"x/0\.png"):
        require_unchanged(replace(recorded, examples=was_there))


def test_many_changed_files_are_counted_and_the_first_five_named(recorded: ImageSet) -> None:
    assert recorded.root is not None
    shutil.rmtree(recorded.root / "x")
    with pytest.raises(
        DataError, match=r"^6 of 12 images .*: (x/\d\.png, ){4}x/\d\.png and 1 more"
    ):
        require_unchanged(recorded)


# --- Images that cannot be read -------------------------------------------------------------------


def with_bad(images: ImageSet, paths: Iterable[str], **fields: Any) -> ImageSet:
    bad = set(paths)
    examples = tuple(
        replace(e, bad="is empty: 0 bytes") if e.path in bad else e for e in images.examples
    )
    return replace(images, examples=examples, data=replace(images.data, **fields))


@pytest.mark.parametrize("policy", ["drop", "substitute", "error"])
def test_sound_images_pass_under_every_policy(policy: str) -> None:
    images = split(image_set(uneven(a=20, b=20)), seed=0)
    require_usable(with_bad(images, [], bad_images=policy))


def test_some_bad_images_pass_unless_they_are_an_error() -> None:
    images = split(image_set(uneven(a=20, b=20)), seed=0)
    bad = [images.of("train")[0].path, images.of("train")[1].path]
    require_usable(with_bad(images, bad, bad_images="drop"))
    require_usable(with_bad(images, bad, bad_images="substitute"))
    with pytest.raises(DataError) as caught:
        require_usable(with_bad(images, bad, bad_images="error"))
    message = str(caught.value)
    assert message.startswith("2 of 40 images cannot be read: ")
    assert f"{bad[0]} is empty: 0 bytes, {bad[1]} is empty: 0 bytes" in message
    assert "--bad-images drop" in message


@pytest.mark.parametrize("side", ["train", "val", "test"])
def test_a_side_that_loses_all_of_a_class_is_refused(side: str) -> None:
    images = split(image_set(uneven(a=20, b=20)), seed=0)
    bad = [e.path for e in images.of(side) if e.label == 1]
    with pytest.raises(DataError) as caught:
        require_usable(with_bad(images, bad))
    message = str(caught.value)
    assert message.startswith(f"without the {len(bad)} images that cannot be read (")
    assert f"no image of b would be in {side}: " in message
    require_usable(with_bad(images, bad[1:]))


def test_a_fold_that_loses_all_of_a_class_is_refused() -> None:
    images = split(image_set(uneven(a=20, b=20), folds=3), seed=0)
    bad = [e.path for e in images.examples if e.label == 0 and e.fold == 2]
    with pytest.raises(DataError, match=r"no image of a would be in val of fold 2"):
        require_usable(with_bad(images, bad))


# --- Exclusion lists ------------------------------------------------------------------------------

SIXTEEN = [f"{c}/{i}.png" for c in "xy" for i in range(8)]


def test_what_an_exclusion_list_names_is_left_out_of_every_split(tmp_path: Path) -> None:
    root = make_files(tmp_path / "photos", SIXTEEN)
    listed = tmp_path / "out.txt"
    listed.write_text("# by doctor: doubles\nx/3.png\n\ny/5.png\r\nz/no.png\n")
    data = Data(source=str(root), exclude=str(listed))
    images = read_images(data, seed=0)
    assert {e.path for e in images.examples} == set(SIXTEEN) - {"x/3.png", "y/5.png"}
    assert images.notes == (
        f"2 images left out by {listed}; 1 of its lines name none, such as 'z/no.png'",
    )
    assert {e.path for e in read_unsplit(data).examples} == {e.path for e in images.examples}


def test_odd_names_can_be_excluded(tmp_path: Path) -> None:
    names = ["x/#1.png", "x/two\u2028lines.png", "x/form\ffeed.png", "x/Ä.png"]
    undecodable = b"x/\xff.png".decode("utf-8", "surrogateescape")
    listed = tmp_path / "out.txt"
    listed.write_bytes("\n".join(names).encode() + b"\nx/\xff.png")
    assert read_exclusions(listed) == [*names, undecodable]
    listed.write_bytes("\ufeffx/a.png\r\n#hash.png\r\n# said\r\n".encode())
    assert read_exclusions(listed) == ["x/a.png", "#hash.png"]


def test_an_exclusion_list_that_is_not_there_or_names_all_images_is_refused(tmp_path: Path) -> None:
    root = make_files(tmp_path / "photos", SIXTEEN)
    listed = tmp_path / "out.txt"
    with pytest.raises(DataError, match=r"^--exclude .*out\.txt: No such file"):
        read_images(Data(source=str(root), exclude=str(listed)), seed=0)
    listed.write_text("\n".join(SIXTEEN))
    with pytest.raises(DataError, match=r"out\.txt leaves no image of "):
        read_images(Data(source=str(root), exclude=str(listed)), seed=0)


def test_leaving_out_too_much_of_a_class_is_refused_as_too_few(tmp_path: Path) -> None:
    root = make_files(tmp_path / "photos", SIXTEEN)
    listed = tmp_path / "out.txt"
    listed.write_text("\n".join(SIXTEEN[3:8]))
    with pytest.raises(DataError, match="class x has fewer than 4 images"):
        read_images(Data(source=str(root), exclude=str(listed)), seed=0)


@pytest.mark.parametrize(
    "sizes",
    [
        {"ant": 100, "wasp": 4},
        {"many": 1000} | {f"rare{i}": 4 for i in range(10)},
        {f"big{i}": 200 for i in range(5)} | {f"small{i:02d}": 5 for i in range(40)},
    ],
    ids=["one", "ten", "forty"],
)
def test_however_long_the_tail_every_class_is_in_every_split(sizes: dict[str, int]) -> None:
    classes = tuple(sorted(sizes))
    examples = tuple(
        Example(f"{name}/{i}.png", classes.index(name), "train", 1)
        for name in classes
        for i in range(sizes[name])
    )
    for seed in range(5):
        done = split(ImageSet(Path("x"), classes, examples), seed)
        for side in ("train", "val", "test"):
            assert min(done.counts(side)) >= 1
        held_out = len(done.of("test")) / len(examples)
        assert 0.1 < held_out < 0.25
        assert split(ImageSet(Path("x"), classes, examples), seed) == done


def test_groups_with_too_few_images_of_a_class_are_refused_and_not_a_traceback() -> None:
    classes = tuple("abcde")
    examples = tuple(
        Example(f"{name}{i}.png", label, "train", 1, group=f"{name}{i}")
        for label, name in enumerate(classes)
        for i in range(5)
    )
    try:
        done = split(ImageSet(Path("x"), classes, examples), 0)
    except DataError:
        return
    assert all(min(done.counts(side)) for side in ("train", "val", "test"))
