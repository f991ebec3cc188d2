"""Which images, what they show, and how they are split: the same for every trial of a sweep."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tuneapp.config.checks import (
    Checked,
    file_reference,
    in_interval,
    is_reference,
    is_whole,
    one_of,
    require,
)

EMBEDDED = "digits"
BadImages = Literal["drop", "substitute", "error"]
BAD_IMAGES: tuple[str, ...] = get_args(BadImages)
_TEXTS = (
    "path_column", "label_separator", "split_column", "weight_column", "group_column", "data_root",
    "exclude",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data(Checked):
    """A data set. A space has one as `DATA = Data(...)`; `--data` and its flags take its place.

    Attributes:
        source: `digits`, the embedded scans; a folder with a folder per class, or with `train/`,
            `val/` and `test/` of such folders; a flat folder, with `label_regex`; a `.csv` or
            `.parquet` table of paths and labels; a torchvision data set, such as
            `torchvision:CIFAR10`; or the import path of a function, `package.module:name`, that
            returns a `torch.utils.data.Dataset` of (image, label).
        label_regex: for a flat folder: the label is the first group of the match in a file's path
            below the folder, or the whole match if there is no group.
        path_column: of a table: paths, absolute or relative to the table's folder; default `path`.
        label_column: of a table: the class, or, with `label_separator`, the classes; or several
            columns of 0 and 1, one per class. Default `label`.
        label_separator: text between the classes of one image; makes the data set multi-label.
        split_column: of a table: `train`, `val` or `test`; default `split`, if the table has it.
        weight_column: how often an image is drawn relative to others, with
            `sampling="weighted"`; default `weight`, if the table has it.
        group_column: images of one group (a patient, a burst of photos) are never in different
            splits; default `group`, if the table has it.
        group_regex: the group is the first group of the match in an image's path.
        classes: the classes in the order of their labels; default: all that are found, sorted.
        data_root: the folder for the files of a torchvision data set.
        folds: number of times that each trial is trained, each time validated on another part of
            the images outside the test split; its score is the mean.
        val_share: in (0, 1): share of the images outside the test split that is held out for
            validation, if the data set has no such split; of whole groups, the nearest 1 in n.
        test_share: in [0, 1): share of all images that is held out for `final-test`, likewise.
        bad_images: how unreadable images are treated: `drop`; `substitute`: in training, another
            example of the same class, drawn anew in each epoch (in validation they are dropped);
            or `error`.
        exclude: a file that names images to leave out, one path per line, as `doctor` writes it.
    """

    source: str = EMBEDDED
    label_regex: str | None = None
    path_column: str | None = None
    label_column: str | Sequence[str] | None = None
    label_separator: str | None = None
    split_column: str | None = None
    weight_column: str | None = None
    group_column: str | None = None
    group_regex: str | None = None
    classes: Sequence[str] | None = None
    data_root: str | None = None
    folds: int | None = None
    val_share: float = 0.15
    test_share: float = 0.15
    bad_images: BadImages = "drop"
    exclude: str | None = None

    def __post_init__(self) -> None:
        for name in ("label_column", "classes"):  # tuples, so that `Data` is hashable
            given = getattr(self, name)
            if isinstance(given, list):
                object.__setattr__(self, name, tuple(given))
        super().__post_init__()

    @property
    def is_table(self) -> bool:
        """Whether the source is a table of paths and labels."""
        return self.source.lower().endswith((".csv", ".parquet"))

    @property
    def is_dataset(self) -> bool:
        """Whether images come from a Dataset object and not from files."""
        return self.source.startswith("torchvision:") or self.is_own

    @property
    def is_own(self) -> bool:
        """Whether it is the import path of a user-defined Dataset."""
        return is_reference(self.source) and not self.source.startswith("torchvision:")

    def _mistakes(self) -> list[str]:
        if not isinstance(self.source, str) or not self.source:
            return require(False, "source", self.source, "a path or a name")
        if ".py:" in self.source:
            return file_reference("source", self.source)
        folds_ok = self.folds is None or is_whole(self.folds, 2)
        names_ok = self.classes is None or _are_names(self.classes)
        label = self.label_column
        label_ok = label is None or (isinstance(label, str) and label != "") or _are_names(label)
        return [
            *_pattern("label_regex", self.label_regex),
            *_pattern("group_regex", self.group_regex),
            *require(names_ok, "classes", self.classes, "None or two or more different names"),
            *require(label_ok, "label_column", label, "a column, or two or more different ones"),
            *(mistake for name in _TEXTS for mistake in _text(name, getattr(self, name))),
            *require(folds_ok, "folds", self.folds, "None or a whole number >= 2"),
            *in_interval("val_share", self.val_share, "(0, 1)"),
            *in_interval("test_share", self.test_share, "[0, 1)"),
            *one_of("bad_images", self.bad_images, BAD_IMAGES),
            *self._misplaced(),
        ]

    def _misplaced(self) -> list[str]:
        """Return which fields do not apply to this source: nothing is silently ignored."""
        table_only = {
            "path_column": self.path_column,
            "label_column": self.label_column,
            "label_separator": self.label_separator,
            "split_column": self.split_column,
            "weight_column": self.weight_column,
            "group_column": self.group_column,
        }
        mistakes = [
            f"{name} needs a .csv or .parquet table, and source is {self.source!r}"
            for name, value in table_only.items()
            if value is not None and not self.is_table
        ]
        if self.label_separator is not None and isinstance(self.label_column, tuple):
            mistakes.append("give either label_separator or several label columns, not both")
        if self.data_root is not None and not self.source.startswith("torchvision:"):
            mistakes.append(f"data_root needs torchvision:NAME, and source is {self.source!r}")
        if self.label_regex is not None and (self.is_table or self.is_dataset):
            mistakes.append(f"label_regex needs a folder, and source is {self.source!r}")
        if self.group_regex is not None and self.group_column is not None:
            mistakes.append("give either group_regex or group_column, not both")
        if self.group_regex is not None and self.is_dataset:
            mistakes.append("group_regex matches paths, and the images of a Dataset have none")
        return mistakes


def _are_names(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) >= 2
        and all(isinstance(name, str) and name for name in value)
        and len(set(value)) == len(value)
    )


def _text(name: str, value: object) -> list[str]:
    """Check for a text, or None."""
    return require(
        value is None or (isinstance(value, str) and bool(value)), name, value, "None or a text"
    )


def _pattern(name: str, value: object) -> list[str]:
    """Check for a regular expression."""
    if value is None:
        return []
    try:
        ok = isinstance(value, str) and bool(re.compile(value))
    except re.error as error:
        return [f"{name} must be a regular expression, got {value!r}: {error}"]
    return require(ok, name, value, "a regular expression")
