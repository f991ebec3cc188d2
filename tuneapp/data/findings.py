"""What is suspicious in a data set, judged by names, labels, splits and file contents.

Fast: nothing is decoded here. `sweep` runs this before every search; `doctor` adds findings that
need the pixels.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tuneapp.data.examples import Example, ImageSet

TINY_CLASS = 20
"""A class with fewer training images than this is called tiny."""
IMBALANCED = 10
"""Classes are imbalanced if the largest has this many times the images of the smallest."""
MANY_UNREADABLE = 0.05
"""Above this share, unreadable images are a sign of a larger problem."""

_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """Something that the user should know.

    Attributes:
        kind: a short name, such as `duplicates across splits`.
        is_serious: whether it makes the metrics of a training wrong, or ends it.
        words: one line: what, how many, and, unless it is obvious, what to do.
        paths: the images that it is about.
        exclude: those of them that the exclusion list should name.
    """

    kind: str
    is_serious: bool
    words: str
    paths: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def cheap_findings(images: ImageSet) -> list[Finding]:
    """Return the findings that need no decoding, the serious ones first.

    Contents are compared where the examples have digests.
    """
    found = [
        *_unreadable(images),
        *_skipped(images),
        *_small_classes(images),
        *_names(images),
        *exact_duplicates(images),
    ]
    return sorted(found, key=lambda finding: not finding.is_serious)


def _unreadable(images: ImageSet) -> Iterable[Finding]:
    bad = [e for e in images.examples if e.bad]
    if bad:
        share = len(bad) / len(images.examples)
        yield Finding(
            "unreadable",
            share > MANY_UNREADABLE,
            f"{len(bad)} of {len(images.examples)} images cannot be read: "
            + some([f"{e.path} {e.bad}" for e in bad]),
            tuple(e.path for e in bad),
            tuple(e.path for e in bad),
        )


def describe_bad(images: ImageSet) -> str:
    """Return which images cannot be read, why, and how they are treated; empty if all can."""
    bad = [e for e in images.examples if e.bad]
    if not bad:
        return ""
    counts = Counter(e.split for e in bad)
    counted = ", ".join(f"{count} of {split}" for split, count in sorted(counts.items()))
    lines = [f"- {_shown(e.path)} {e.bad}" for e in bad]
    policy = images.data.bad_images
    fate = (
        "in training, others of their class replace them"
        if policy == "substitute"
        else "they are left out"
    )
    text = "\n".join([f"{len(bad)} images cannot be read ({counted}); {fate}:", "", *lines])
    # Names of files need not be valid text, and TensorBoard accepts nothing else.
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(path: str) -> str:
    """Return a path with line ends and other unprintable characters as Python escapes them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in path)


def _skipped(images: ImageSet) -> Iterable[Finding]:
    if images.skipped:
        yield Finding(
            "not images",
            False,
            f"{len(images.skipped)} file(s) among the images are no images: "
            + some([f"{path} {cause}" for path, cause in images.skipped]),
            tuple(path for path, _ in images.skipped),
        )


def _small_classes(images: ImageSet) -> Iterable[Finding]:
    for split in ("train", "val", "test"):
        counts = images.counts(split)
        absent = [name for name, n in zip(images.classes, counts, strict=True) if n == 0]
        if absent and any(counts):
            yield Finding("missing classes", True, f"{split} has no image of {some(absent)}")
    counts = images.counts("train")
    tiny = [
        f"{name} ({n})" for name, n in zip(images.classes, counts, strict=True) if n < TINY_CLASS
    ]
    if tiny:
        yield Finding(
            "tiny classes",
            False,
            f"{len(tiny)} class(es) have fewer than {TINY_CLASS} training images: {some(tiny)}"
            + ("" if images.num_folds else "; with --folds, each validates once"),
        )
    if min(counts) and max(counts) >= IMBALANCED * min(counts):
        yield Finding(
            "imbalance",
            False,
            f"the largest class has {max(counts)} training images, the smallest {min(counts)}: "
            "consider --metric val/balanced_accuracy, sampling='balanced' or "
            "CrossEntropy(class_weights='balanced')",
        )


def _names(images: ImageSet) -> Iterable[Finding]:
    paths = [e.path for e in images.examples]
    non_ascii = [path for path in paths if not path.isascii()]
    if non_ascii:
        yield Finding(
            "non-ASCII names",
            False,
            f"{len(non_ascii)} name(s) are not plain ASCII, such as {non_ascii[0]!r}: other "
            "machines may spell them differently",
            tuple(non_ascii),
        )
    odd = [path for path in paths if any(unicodedata.category(c) in ("Cc", "Cs") for c in path)]
    if odd:
        yield Finding(
            "unprintable names",
            False,
            f"{len(odd)} name(s) have unprintable characters, such as {odd[0]!r}",
            tuple(odd),
        )
    for group in _same(paths, {path: _folded(path) for path in paths}):
        yield Finding(
            "colliding names",
            False,
            f"{some(group)} are the same name where case is ignored (macOS, Windows)",
            tuple(group),
        )


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def exact_duplicates(images: ImageSet) -> Iterable[Finding]:
    """Yield the images with the same content: with other labels, across splits, or within one."""
    by_digest: dict[str, list[Example]] = defaultdict(list)
    for example in images.examples:
        if example.digest and not example.bad:
            by_digest[example.digest].append(example)
    groups = [group for group in by_digest.values() if len(group) > 1]
    yield from duplicate_findings(groups, "the same file content")


def duplicate_findings(groups: Sequence[Sequence[Example]], how: str) -> Iterable[Finding]:
    """Yield the findings for groups of the same image.

    Of a group in several splits, one image is kept: in the test split if there is one, else in the
    validation split. Of a group with different labels none is kept, since the right label is not
    known.

    Args:
        groups: examples that show the same.
        how: in which way they are the same.
    """
    conflicting = [g for g in groups if len({e.labels for e in g}) > 1]
    rest = [g for g in groups if len({e.labels for e in g}) == 1]
    # Folds count as splits: each is the validation split of the others.
    across = [g for g in rest if len({(e.split, e.fold) for e in g}) > 1]
    within = [g for g in rest if len({(e.split, e.fold) for e in g}) == 1]
    kinds = (
        ("labels that contradict", True, conflicting, "different labels"),
        ("duplicates across splits", True, across, "different splits or folds"),
        ("duplicates", False, within, "one split"),
    )
    for kind, is_serious, of_kind, where in kinds:
        if of_kind:
            shown = [" = ".join(e.path for e in group[:3]) for group in of_kind]
            leave_out = [
                e.path
                for group in of_kind
                for e in (group if kind[0] == "l" else _all_but_one(group))
            ]
            yield Finding(
                kind,
                is_serious,
                f"{len(of_kind)} image(s) occur several times, with {how}, in {where}: "
                + some(shown),
                tuple(e.path for group in of_kind for e in group),
                tuple(leave_out),
            )


def kept_first(example: Example) -> tuple[int, str]:
    """Return a sort key for identical images; the first one is kept.

    The test split comes first, since it is the smallest and must not shrink; then the validation
    split.
    """
    return ("test", "val", "train").index(example.split), example.path


def _all_but_one(group: Sequence[Example]) -> list[Example]:
    return sorted(group, key=kept_first)[1:]


def _same(paths: Sequence[str], keys: Mapping[str, str]) -> list[list[str]]:
    by_key: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_key[keys[path]].append(path)
    return [group for group in by_key.values() if len(group) > 1]


def some(items: Sequence[str]) -> str:
    """Return the first few items, and the number of the others."""
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more
