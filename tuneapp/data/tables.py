"""Images and labels in a table: a CSV or a Parquet file, a row for each image."""

import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tuneapp.config import Data
from tuneapp.data.examples import SPLITS, Example, ImageSet, sorted_classes
from tuneapp.errors import DataError, did_you_mean, first_line

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_OPTIONAL = ("split", "weight", "group")
_SHOWN = 3


def read_table(data: Data) -> ImageSet:
    """Return the images that a table names, with their labels, splits, weights and groups.

    Raises:
        DataError: the table cannot be read, lacks a column, or has invalid values; the message
            names the first rows.
    """
    file = Path(data.source)  # as the user wrote it, for messages
    place = file.expanduser().resolve()
    root = place.parent
    table = _read(place, data)
    columns = _columns(table, file, data)
    if table.empty:
        raise DataError(f"{file} has no row")
    classes, labels = _labels(table, file, data)
    paths = _texts(table, columns["path"], file)
    stats = _stats(file, root, paths)
    splits = _splits(table, columns.get("split"), file)
    weights = _weights(table, columns.get("weight"), file)
    groups = [""] * len(paths)
    if "group" in columns:
        groups = [text.strip() for text in _texts(table, columns["group"], file)]
    examples = tuple(
        Example(
            path, label, split, stat.st_size, group=group, weight=weight,
            modified_ns=stat.st_mtime_ns,
        )
        for path, label, split, group, weight, stat in zip(
            paths, labels, splits, groups, weights, stats, strict=True
        )
    )  # fmt: skip
    is_doubled = pd.Series([os.path.normpath(root / path) for path in paths]).duplicated()
    if is_doubled.any():
        first = paths[int(is_doubled.argmax())]
        raise DataError(
            f"{file} names {is_doubled.sum()} image(s) more than once, such as {first!r}"
        )
    is_multilabel = data.label_separator is not None or not isinstance(
        data.label_column, str | None
    )
    used = ", ".join(f"{role}={name}" for role, name in columns.items() if role != name)
    found = [role for role in _OPTIONAL if role in columns]
    notes = [f"columns {used}"] if used else []
    notes += [f"the table's column {columns[role]!r} gives the {role}" for role in found]
    return ImageSet(root, tuple(classes), examples, data, is_multilabel, notes=tuple(notes))


def _read(place: Path, data: Data) -> pd.DataFrame:
    file = data.source
    try:
        if place.suffix.lower() == ".parquet":
            return pd.read_parquet(place)
        # As text: "007" is a name and not a number, and so is "NA".
        return pd.read_csv(
            place, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except FileNotFoundError:
        raise DataError(f"--data {data.source}: no such file") from None
    except Exception as error:  # pandas and pyarrow raise many kinds
        raise DataError(f"{file} cannot be read as a table: {first_line(error)}") from None


def _columns(table: pd.DataFrame, file: Path, data: Data) -> dict[str, str]:
    """Return the column of each role, after checking that it is there."""
    asked: dict[str, Any] = {
        "path": data.path_column or "path",
        "label": data.label_column or "label",
        "split": data.split_column,
        "weight": data.weight_column,
        "group": data.group_column,
    }
    names = [str(name) for name in table.columns]
    if data.group_regex is not None:
        asked.pop("group")
    columns: dict[str, str] = {}
    missing = []
    for role, wanted in asked.items():
        if wanted is None:
            if role in names:
                columns[role] = role
            continue
        for name in [wanted] if isinstance(wanted, str) else wanted:
            if name not in names:
                missing.append(f"{name!r} ({role}){did_you_mean(name, names)}")
        columns[role] = wanted if isinstance(wanted, str) else ", ".join(wanted)
    if missing:
        raise DataError(
            f"{file} has no column {', '.join(missing)}; it has {', '.join(map(repr, names))}; "
            "name the columns with --column path=NAME --column label=NAME"
        )
    return columns


def _texts(table: pd.DataFrame, column: str, file: Path) -> list[str]:
    texts = _cells(table, column, file)
    empty = [_row(i) for i, text in enumerate(texts) if not text.strip()]
    if empty:
        raise DataError(
            f"{file}: column {column!r} is empty in {len(empty)} row(s): {_some(empty)}"
        )
    return texts


def _cells(table: pd.DataFrame, column: str, file: Path) -> list[str]:
    """Return a column as text; missing values, such as in a Parquet file, are empty text."""
    values = table[column]
    lists = [_row(i) for i, value in enumerate(values) if pd.api.types.is_list_like(value)]
    if lists:
        raise DataError(
            f"{file}: column {column!r} holds lists, as in {lists[0]}; join each to one text, and "
            "give --label-separator"
        )
    absent = values.isna()
    texts = ["" if none else str(value) for value, none in zip(values, absent, strict=True)]
    if pd.api.types.is_float_dtype(values):  # whole numbers, of which some are missing
        texts = [text.removesuffix(".0") for text in texts]
    return texts


def _labels(
    table: pd.DataFrame, file: Path, data: Data
) -> tuple[list[str], list[int] | list[tuple[int, ...]]]:
    column = data.label_column or "label"
    if not isinstance(column, str):
        return _from_flags(table, list(column), file, data)
    if data.label_separator is not None:
        raw = _cells(table, column, file)
        sets = [
            [name.strip() for name in text.split(data.label_separator) if name.strip()]
            for text in raw
        ]
        classes = _classes([name for names in sets for name in names], file, data)
        index = {name: label for label, name in enumerate(classes)}
        return classes, [tuple(sorted({index[name] for name in names})) for names in sets]
    names = [text.strip() for text in _texts(table, column, file)]
    classes = _classes(names, file, data)
    index = {name: label for label, name in enumerate(classes)}
    return classes, [index[name] for name in names]


def _classes(names: Sequence[str], file: Path, data: Data) -> list[str]:
    found = sorted_classes(names)
    if data.classes is None:
        classes = found
    else:
        classes = list(data.classes)
        strange = [name for name in found if name not in data.classes]
        if strange:
            hint = did_you_mean(strange[0], data.classes)
            raise DataError(
                f"{file} has the label(s) {_some(list(map(repr, strange)))}, which are not among "
                f"the classes {', '.join(data.classes)}{hint}"
            )
    if len(classes) < 2:
        held = f"only the label {classes[0]!r}" if classes else "no label"
        raise DataError(f"{file} has {held}; at least two classes are required")
    return classes


def _from_flags(
    table: pd.DataFrame, columns: list[str], file: Path, data: Data
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Return the classes whose columns are 1 in each row."""
    if data.classes is not None and list(data.classes) != columns:
        raise DataError(f"{file}: the label columns are the classes; remove classes=")
    flags = {}
    for column in columns:
        values = [str(value).strip().lower() for value in table[column]]
        meaning = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
        strange = [f"{v!r} in {_row(i)}" for i, v in enumerate(values) if v not in meaning]
        if strange:
            raise DataError(
                f"{file}: label column {column!r} must hold only 0 and 1, and has {_some(strange)}"
            )
        flags[column] = [meaning[value] for value in values]
    rows = zip(*flags.values(), strict=True)
    return columns, [tuple(label for label, flag in enumerate(row) if flag) for row in rows]


def _splits(table: pd.DataFrame, column: str | None, file: Path) -> list[str]:
    if column is None:
        return ["train"] * len(table)
    words = [text.strip().casefold() for text in _texts(table, column, file)]
    strange = [f"{w!r} in {_row(i)}" for i, w in enumerate(words) if w not in _SPLIT_WORDS]
    if strange:
        raise DataError(
            f"{file}: column {column!r} must hold only {', '.join(SPLITS)}, and has "
            f"{_some(strange)}"
        )
    splits = [_SPLIT_WORDS[word] for word in words]
    if "train" not in splits:
        raise DataError(f"{file}: column {column!r} puts no image into train")
    return splits


def _weights(table: pd.DataFrame, column: str | None, file: Path) -> list[float]:
    if column is None:
        return [1.0] * len(table)
    weights, strange = [], []
    for i, text in enumerate(_texts(table, column, file)):
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight >= 0):
            strange.append(f"{text!r} in {_row(i)}")
        weights.append(weight)
    if strange:
        raise DataError(
            f"{file}: column {column!r} must hold numbers >= 0, and has {_some(strange)}"
        )
    return weights


def _stats(file: Path, root: Path, paths: Sequence[str]) -> list[Any]:
    """Return the status, with size and modification time, of every image file."""
    stats, missing = [], []
    for path in paths:
        try:
            found = (root / path).stat()
        except (OSError, ValueError):  # ValueError: a null byte in a path
            missing.append(path)
            continue
        stats.append(found)
        if stat.S_ISDIR(found.st_mode):
            missing.append(path)
    if missing:
        raise DataError(
            f"{file} names {len(missing)} file(s) that do not exist, or are folders, such as "
            f"{str(file.parent / missing[0])!r}; paths are relative to the table's folder"
        )
    return stats


def _row(index: int) -> str:
    return f"row {index + 1}"


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
