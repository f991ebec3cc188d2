"""Training, validation and test splits: drawn once, seeded, stratified, groups kept together.

A split is written into the run directory, and read from there when the run is resumed.
"""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import (
    StratifiedGroupKFold,
    StratifiedKFold,
    train_test_split,
)

from tuneapp.config import Data
from tuneapp.data.decode import Unreadable, digest, read_bytes
from tuneapp.data.examples import Example, ImageSet, Labels
from tuneapp.errors import DataError
from tuneapp.rundir import cell, write_atomically

_NAMED = 5  # how many names a message lists


def split(images: ImageSet, seed: int) -> ImageSet:
    """Return the set with its missing splits drawn, sorted by split and path, and checked.

    Splits of the data set are kept; a test split is drawn only if there is neither a validation nor
    a test split. With `data.folds`, each example outside the test split gets a fold.

    Raises:
        DataError: a split would have no example of a class, or a group would be in two splits.
    """
    present = {e.split for e in images.examples}
    shares = {"test": images.data.test_share if present == {"train"} else 0.0}
    if images.data.folds is None:
        shares["val"] = 0.0 if "val" in present else images.data.val_share
    if any(shares.values()):
        _require_enough(images)
    train = [i for i, e in enumerate(images.examples) if e.split == "train"]
    for side, share in shares.items():
        if share:
            images, train = _split_off(images, train, side, share, seed)
    if images.data.folds is not None:
        images = _fold(images, images.data.folds, seed)
    examples = sorted(images.examples, key=lambda e: (e.split, e.path))
    images = replace(images, examples=tuple(examples))
    _require_sides(images)
    return images


def leaking_groups(images: ImageSet) -> dict[str, list[str]]:
    """Return the groups that are in several splits, each with its splits."""
    seen: dict[str, set[str]] = {}
    for e in images.examples:
        if e.group:
            seen.setdefault(e.group, set()).add(e.split)
    return {group: sorted(sides) for group, sides in seen.items() if len(sides) > 1}


def _split_off(
    images: ImageSet, train: list[int], side: str, share: float, seed: int
) -> tuple[ImageSet, list[int]]:
    """Move a stratified share of these training examples to `side`; also return the rest."""
    if any(images.examples[i].group for i in train):
        held_out = _whole_groups(images, train, share, seed, side)
    else:
        before = train
        strata = _strata(images, train, least=4)
        # Every class must be on both sides, however small the share or the class.
        size = max(round(share * len(train)), len(set(strata)))
        try:
            train, held_out = train_test_split(
                train, test_size=size, random_state=seed, stratify=strata
            )
        except ValueError as error:
            raise DataError(f"{images.data.source} cannot be split by class: {error}") from None
        if not _shown(images, train) == _shown(images, held_out) == _shown(images, before):
            # train_test_split can leave out classes of which the share is less than one image.
            train = before
            held_out = _some_of_each(train, strata, share, seed)
    moved = set(held_out)
    examples = tuple(
        replace(e, split=side) if i in moved else e for i, e in enumerate(images.examples)
    )
    return replace(images, examples=examples), [i for i in train if i not in moved]


def _some_of_each(
    train: Sequence[int], strata: Sequence[int], share: float, seed: int
) -> list[int]:
    """Return a share of each class, at least one example."""
    random = np.random.default_rng(seed)
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, stratum in zip(train, strata, strict=True):
        by_class[stratum].append(index)
    held_out: list[int] = []
    for _, members in sorted(by_class.items()):
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held_out += random.permutation(members)[:count].tolist()
    return held_out


def _whole_groups(
    images: ImageSet, train: Sequence[int], share: float, seed: int, side: str
) -> list[int]:
    """Return about a share of these examples, in whole groups, with classes as even as possible."""
    groups = _groups(images, train)
    parts = max(2, round(1 / share))
    if len(set(groups)) < 2:
        raise DataError(
            f"{images.data.source}: all images belong to one group, {groups[0]!r}, so no {side} "
            "split can be drawn; check the group column or expression"
        )
    strata = _strata(images, train, least=parts)
    first: list[int] | None = None
    # Groups of one class each can be too few for that many parts: then try fewer, larger parts.
    most = min(parts, len(set(groups)), max(Counter(strata).values()))
    for number in range(most, 1, -1):
        folds = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        for rest, chosen in _quietly(folds, train, strata, groups):
            taken = [train[i] for i in chosen]
            first = first or taken
            left = [train[i] for i in rest]
            if _shown(images, taken) == _shown(images, left) == _shown(images, train):
                return taken
    if first is None:
        raise DataError(
            f"{images.data.source}: {len(set(groups))} groups with so few images of each class "
            f"cannot be split; give a {side} split with the data"
        )
    return first  # what is missing is reported when all splits are drawn


def _shown(images: ImageSet, indices: Iterable[int]) -> set[int]:
    """Return the classes that these examples show."""
    return {label for i in indices for label in images.examples[i].labels}


def _fold(images: ImageSet, folds: int, seed: int) -> ImageSet:
    """Give a fold to each example outside the test split."""
    used = [i for i, e in enumerate(images.examples) if e.split != "test"]
    strata = _strata(images, used, least=folds)
    groups = _groups(images, used)
    rarest = min(Counter(strata).values())
    if rarest < folds:
        names = [
            images.classes[label] if label >= 0 else "no class at all"
            for label, count in Counter(strata).items()
            if count < folds
        ]
        raise DataError(
            f"{folds} folds need {folds} images of each class, and there are fewer of "
            f"{_some(sorted(names))}; give fewer folds, or add images"
        )
    fold_of: dict[int, int] = {}
    if len(set(groups)) < len(groups):
        if len(set(groups)) < folds:
            raise DataError(f"{folds} folds need {folds} groups, and there are {len(set(groups))}")
        maker = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    else:
        maker = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for number, (_, chosen) in enumerate(_quietly(maker, used, strata, groups), start=1):
        fold_of |= {used[i]: number for i in chosen}
    examples = tuple(
        e if e.split == "test" else replace(e, split="train", fold=fold_of[i])
        for i, e in enumerate(images.examples)
    )
    return replace(images, examples=examples)


def _quietly(
    maker: StratifiedKFold | StratifiedGroupKFold,
    indices: Sequence[int],
    strata: Sequence[int],
    groups: Sequence[str],
) -> Iterable[tuple[Sequence[int], Sequence[int]]]:
    """Split without scikit-learn's warnings: their causes are checked, and are errors."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(maker.split(np.zeros(len(indices)), strata, groups))


def _groups(images: ImageSet, indices: Sequence[int]) -> list[str]:
    """Return the group of each example; one without a group is a group by itself."""
    examples = images.examples
    return [examples[i].group or f"\0{examples[i].path}" for i in indices]


def _strata(images: ImageSet, indices: Sequence[int], least: int) -> list[int]:
    """Return the class by which each example is stratified.

    Of an image with several classes it is the rarest one, so that it is in every split; without
    any class it is -1. Strata of fewer than `least` examples are merged into the largest one.
    """
    counts = Counter(label for i in indices for label in images.examples[i].labels)
    strata = [
        min(images.examples[i].labels, key=lambda label: (counts[label], label), default=-1)
        for i in indices
    ]
    if not images.is_multilabel:
        return strata
    sizes = Counter(strata)
    largest = max(sizes, key=lambda stratum: (sizes[stratum], stratum))
    return [stratum if sizes[stratum] >= least else largest for stratum in strata]


def require_usable(images: ImageSet) -> None:
    """Check, once it is known which images can be read, that each split still has every class.

    Raises:
        DataError: one lacks a class, or `bad_images` is `error` and some cannot be read.
    """
    bad = [f"{e.path} {e.bad}" for e in images.examples if e.bad]
    if bad and images.data.bad_images == "error":
        raise DataError(
            f"{len(bad)} of {len(images.examples)} images cannot be read: {_some(bad)}; repair or "
            "remove them, or leave them out with --bad-images drop"
        )
    try:
        require_classes(images)
    except DataError as error:
        if not bad:
            raise
        raise DataError(
            f"without the {len(bad)} images that cannot be read ({_some(bad)}), {error}"
        ) from None


def _require_enough(images: ImageSet) -> None:
    counts = Counter(label for e in images.of("train") for label in e.labels)
    few = [name for label, name in enumerate(images.classes) if 0 < counts[label] < 4]
    if few:
        raise DataError(
            f"class {_some(few)} has fewer than 4 images: too few to split; add images, or "
            "give train/, val/ and test/ folders"
        )


def _require_sides(images: ImageSet) -> None:
    """Check that each split and fold has every class, and that no group is in two of them.

    Raises:
        DataError: a class is missing, or a group is in two of them.
    """
    leaking = leaking_groups(images)
    if leaking:
        group, sides = next(iter(leaking.items()))
        raise DataError(
            f"{len(leaking)} group(s) are in several splits, such as {group!r} in "
            f"{' and '.join(sides)}: correct the split, or leave the group out"
        )
    require_classes(images)


def require_classes(images: ImageSet) -> None:
    """Check that every class has a readable example in each split and fold.

    Raises:
        DataError: one lacks a class.
    """
    sides = (
        [images] if not images.num_folds else [images.fold(n + 1) for n in range(images.num_folds)]
    )
    for number, side in enumerate(sides, start=1):
        for name in ("train", "val", "test"):
            counts = side.counts(name)
            if name == "test" and not any(counts):
                continue  # there need not be one
            absent = [images.classes[label] for label, count in enumerate(counts) if count == 0]
            if absent:
                where = f"{name} of fold {number}" if images.num_folds else name
                raise DataError(
                    f"no image of {_some(absent)} would be in {where}: add images of that class"
                    + (", or give fewer folds" if images.num_folds else "")
                )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


# --- The split as a file --------------------------------------------------------------------------

_COLUMNS = (
    "path", "class", "split", "bytes", "fold", "group", "weight", "modified_ns", "digest", "bad",
)  # fmt: skip


def write_split(file: Path, images: ImageSet) -> None:
    """Write which image is in which split, one row each.

    The class of a multi-label example is a JSON list of its classes.
    """

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            rows = csv.writer(out)
            rows.writerow(_COLUMNS)
            for e in images.examples:
                names = [images.classes[label] for label in e.labels]
                named = json.dumps(names) if images.is_multilabel else names[0]
                rows.writerow(
                    (
                        *(e.path, named, e.split, e.num_bytes, e.fold, e.group, repr(e.weight)),
                        *(e.modified_ns, e.digest, e.bad),
                    )
                )

    write_atomically(file, write)


def write_bad_images(file: Path, images: ImageSet) -> None:
    """Write the images that cannot be read, and the files that are no images, if any."""
    rows = [
        (e.path, " ".join(images.classes[label] for label in e.labels), e.split, e.bad)
        for e in images.examples
        if e.bad
    ]
    rows += [(path, "", "", cause) for path, cause in images.skipped]
    if not rows:
        return

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            table = [("path", "class", "split", "cause"), *rows]
            csv.writer(out).writerows([cell(value) for value in row] for row in table)

    write_atomically(file, write)


def read_split(
    file: Path,
    root: Path | None,
    classes: Sequence[str],
    data: Data | None = None,
    is_multilabel: bool = False,
) -> ImageSet:
    """Return the image set that `write_split` recorded.

    Raises:
        DataError: the file is missing or damaged.
    """
    labels = {name: label for label, name in enumerate(classes)}
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as text:
            examples = tuple(_from_row(row, labels, is_multilabel) for row in csv.DictReader(text))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file} cannot be read as a split: {error}") from None
    if not examples:
        raise DataError(f"{file} names no image")
    return ImageSet(root, tuple(classes), examples, data or Data(), is_multilabel)


def _from_row(row: Mapping[str, str], labels: Mapping[str, int], is_multilabel: bool) -> Example:
    label: Labels
    if is_multilabel:
        label = tuple(sorted(labels[name] for name in json.loads(row["class"])))
    else:
        label = labels[row["class"]]
    return Example(
        row["path"],
        label,
        row["split"],
        int(row["bytes"]),
        group=row.get("group") or "",
        weight=float(row.get("weight") or 1),
        fold=int(row.get("fold") or 0),
        modified_ns=int(row.get("modified_ns") or 0),
        digest=row.get("digest") or "",
        bad=row.get("bad") or "",
    )


def require_unchanged(images: ImageSet) -> None:
    """Check that the files are unchanged since the run began.

    A file whose size and modification time are the same counts as unchanged; one with another time,
    such as in a copy of the folder, is read, and its content compared.

    Raises:
        DataError: some are missing or have changed; the message names the first ones.
    """
    if images.root is None:
        return
    changed = [e.path for e in images.examples if _has_changed(images.root / e.path, e)]
    if changed:
        raise DataError(
            f"{len(changed)} of {len(images.examples)} images in {images.root} are missing or have "
            f"changed since this run began: {_some(changed)}; restore them, or start a new sweep"
        )


def _has_changed(file: Path, then: Example) -> bool:
    try:
        now = file.stat()
    except OSError:
        return not then.bad or then.num_bytes > 0
    if now.st_size != then.num_bytes:
        return True
    if then.modified_ns in (0, now.st_mtime_ns) or not then.digest:
        return False
    try:
        return digest(read_bytes(file)) != then.digest
    except Unreadable:
        return not then.bad
