"""Find the images, name their classes, and say which are for training, validation and test."""

import re
from dataclasses import replace
from pathlib import Path

from tuneapp.config import EMBEDDED, Data
from tuneapp.data.datasets import read_dataset
from tuneapp.data.examples import Example, ImageSet, embedded
from tuneapp.data.folders import read_folder
from tuneapp.data.split import split
from tuneapp.errors import DataError


def read_images(data: Data, seed: int) -> ImageSet:
    """Return all images of a data set with their labels, split.

    Nothing is decoded: only names, headers of files with odd endings, and tables are read.

    Args:
        data: what was asked for.
        seed: of the splits that the data do not have themselves.

    Raises:
        DataError: the images cannot be trained on as they are; the message says what is wrong.
        ConfigError: there is no such source.
    """
    return split(_excluded(_grouped(_found(data))), seed)


def read_unsplit(data: Data) -> ImageSet:
    """Return all images as they are found, in the splits that the data have themselves."""
    return _excluded(_grouped(_found(data)))


def _found(data: Data) -> ImageSet:
    if data.source == EMBEDDED and not Path(EMBEDDED).is_dir():
        return replace(embedded(), data=data)
    if data.is_table:
        # Only here: pandas is slow to import, and trials have no use for it.
        from tuneapp.data.tables import read_table

        return read_table(data)
    return read_dataset(data) if data.is_dataset else read_folder(data)


def _grouped(images: ImageSet) -> ImageSet:
    """Give each example the group that `group_regex` finds in its path."""
    expression = images.data.group_regex
    if expression is None:
        return images
    pattern = re.compile(expression)
    without: list[str] = []

    def with_group(example: Example) -> Example:
        match = pattern.search(example.path)
        group = (match.group(1) if pattern.groups else match.group(0)) if match else None
        if not group:
            without.append(example.path)
        return replace(example, group=group or "")

    examples = tuple(map(with_group, images.examples))
    if without:
        raise DataError(
            f"--group-regex {expression!r} finds no group in {len(without)} of {len(examples)} "
            f"paths, such as {without[0]!r}; the group is its first group, or the whole match"
        )
    return replace(images, examples=examples)


def read_exclusions(file: Path) -> list[str]:
    """Return the paths that an exclusion list names: one a line; `# ` begins a comment line.

    Raises:
        DataError: it cannot be read.
    """
    try:
        # Not `splitlines()`: names may hold other characters that it takes for ends of lines.
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise DataError(f"--exclude {file}: {error.strerror}") from None
    return [line for line in lines if line.strip() and not line.startswith("# ")]


def _excluded(images: ImageSet) -> ImageSet:
    """Leave out what the exclusion list names."""
    if images.data.exclude is None:
        return images
    named = set(read_exclusions(Path(images.data.exclude)))
    kept = tuple(e for e in images.examples if e.path not in named)
    left_out = len(images.examples) - len(kept)
    note = f"{left_out} images left out by {images.data.exclude}"
    strangers = named - {e.path for e in images.examples}
    if strangers:
        note += f"; {len(strangers)} of its lines name none, such as {min(strangers)!r}"
    if not kept:
        raise DataError(f"--exclude {images.data.exclude} leaves no image of {images.data.source}")
    return replace(images, examples=kept, notes=(*images.notes, note))
