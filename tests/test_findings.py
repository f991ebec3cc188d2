"""What names, labels, splits and contents tell, on examples made by hand."""

import pytest

from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.findings import Finding, cheap_findings, duplicate_findings, some


def example(path: str, split: str = "train", label: int = 0, **more: object) -> Example:
    return Example(path, label, split, 10, **more)  # type: ignore[arg-type]


def healthy() -> list[Example]:
    """Two classes, 20 training and 2 validation images each."""
    return [
        example(f"{split}/{label}/{i}.png", split, label, digest=f"{split}{label}{i}")
        for split, count in (("train", 20), ("val", 2))
        for label in (0, 1)
        for i in range(count)
    ]


def findings(examples: list[Example], **more: object) -> list[Finding]:
    images = ImageSet(None, ("cat", "dog"), tuple(examples), **more)  # type: ignore[arg-type]
    return cheap_findings(images)


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, [finding.kind for finding in found]
    return found[0]


def test_a_healthy_set_has_no_findings() -> None:
    assert findings(healthy()) == []


def test_few_unreadable_images_are_left_out_and_many_are_serious() -> None:
    few = [*healthy(), example("bad.png", bad="is empty")]
    finding = only(findings(few))
    assert (finding.kind, finding.is_serious) == ("unreadable", False)
    assert finding.exclude == ("bad.png",) and "bad.png is empty" in finding.words
    many = [*few, example("b.png", bad="x"), example("c.png", bad="x")]
    assert only(findings(many)).is_serious


def test_files_that_are_no_images_are_told_and_not_excluded() -> None:
    finding = only(findings(healthy(), skipped=(("notes.md", "is not an image"),)))
    assert (finding.kind, finding.paths, finding.exclude) == ("not images", ("notes.md",), ())


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_missing_in_a_split_is_serious(split: str) -> None:
    found = findings([e for e in healthy() if (e.split, e.label) != (split, 1)])
    assert found[0].kind == "missing classes" and found[0].is_serious
    assert found[0].words == f"{split} has no image of dog"


def test_a_class_is_tiny_below_twenty_training_images() -> None:
    finding = only(findings(healthy()[1:]))
    assert (finding.kind, finding.is_serious) == ("tiny classes", False)
    assert "cat (19)" in finding.words and "dog" not in finding.words


def test_imbalance_is_told_from_ten_times_on() -> None:
    more = [example(f"more{i}.png", digest=f"more{i}") for i in range(180)]
    assert only(findings([*healthy(), *more])).kind == "imbalance"
    assert findings([*healthy(), *more[1:]]) == []


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("größe.png",), "non-ASCII names"),
        (("line\nbreak.png",), "unprintable names"),
        (("a/B.png", "a/b.png"), "colliding names"),
        (("A/b.png", "a/b.png"), "colliding names"),
    ],
)
def test_odd_names_are_told(names: tuple[str, ...], kind: str) -> None:
    more = [example(name, digest=name) for name in names]
    finding = only(findings([*healthy(), *more]))
    assert (finding.kind, finding.is_serious, finding.paths) == (kind, False, names)
    assert finding.exclude == ()


def test_names_that_unicode_spells_in_two_ways_collide() -> None:
    names = ("caf\u00e9.png", "cafe\u0301.png")
    found = findings([*healthy(), *(example(name, digest=name) for name in names)])
    assert [f.paths for f in found if f.kind == "colliding names"] == [names]


@pytest.mark.parametrize(
    ("splits", "kept"),
    [
        (("train", "val"), "1.png"),
        (("train", "test"), "1.png"),
        (("test", "val"), "0.png"),
        (("val", "train", "test"), "2.png"),
    ],
)
def test_of_duplicates_across_splits_the_one_for_testing_stays(
    splits: tuple[str, ...], kept: str
) -> None:
    same = [example(f"{i}.png", split, digest="same") for i, split in enumerate(splits)]
    finding = only(list(duplicate_findings([same], "the same content")))
    assert (finding.kind, finding.is_serious) == ("duplicates across splits", True)
    assert set(finding.paths) - set(finding.exclude) == {kept}


def test_duplicates_in_one_split_are_not_serious() -> None:
    same = [example(name, digest="same") for name in ("b.png", "a.png")]
    finding = only(findings([*healthy(), *same]))
    assert (finding.kind, finding.is_serious) == ("duplicates", False)
    assert finding.exclude == ("b.png",)


def test_duplicates_in_two_folds_are_as_serious_as_in_two_splits() -> None:
    def in_folds(*folds: int) -> Finding:
        same = [example(f"{i}.png", fold=fold) for i, fold in enumerate(folds)]
        return only(list(duplicate_findings([same], "the same content")))

    assert in_folds(1, 2).kind == "duplicates across splits" and in_folds(1, 2).is_serious
    assert in_folds(2, 2).kind == "duplicates"


def test_of_duplicates_with_different_labels_none_stays() -> None:
    same = [example("a.png", label=0, digest="same"), example("b.png", label=1, digest="same")]
    finding = only(findings([*healthy(), *same]))
    assert (finding.kind, finding.is_serious) == ("labels that contradict", True)
    assert finding.exclude == ("a.png", "b.png")


def test_images_that_cannot_be_read_are_no_duplicates() -> None:
    same = [example(name, digest="same", bad="is empty") for name in ("a.png", "b.png")]
    assert only(findings([*healthy(), *same])).kind == "unreadable"


def test_serious_findings_come_first() -> None:
    same = [example("a.png", "train", digest="same"), example("b.png", "val", digest="same")]
    found = findings([*healthy(), *same, example("ü.png", digest="ü")])
    assert [f.is_serious for f in found] == [True, False]


def test_a_few_names_stand_for_many() -> None:
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
