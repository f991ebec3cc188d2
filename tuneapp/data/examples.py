"""The data set as all other modules see it: examples with their labels and splits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

from tuneapp.config import Data

SPLITS = ("train", "val", "test")
EMBEDDED_SIZE = 32
"""Pixels to which the embedded 8 x 8 scans are enlarged by default."""

Labels = int | tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One image.

    Attributes:
        path: relative to the root of its set, with `/`, or absolute if it is elsewhere; images that
            are not files have a generated one.
        label: index of its class; in a multi-label set, of each class that is present, ascending.
        split: `train`, `val` or `test`.
        num_bytes: size of the file; 0 for images that are not files.
        group: images of one group are never in different splits; empty is a group by itself.
        weight: how often it is drawn relative to others, with weighted sampling.
        fold: the part of a k-fold split to which it belongs, from 1; 0 without folds.
        modified_ns: modification time of its file, in nanoseconds; 0 for images that are not files.
        digest: `decode.digest` of its content; empty until it is read.
        bad: why it cannot be read; empty if it can.
    """

    path: str
    label: Labels
    split: str
    num_bytes: int
    group: str = ""
    weight: float = 1.0
    fold: int = 0
    modified_ns: int = 0
    digest: str = ""
    bad: str = ""

    @property
    def labels(self) -> tuple[int, ...]:
        """The classes that are present, always as a tuple."""
        return self.label if isinstance(self.label, tuple) else (self.label,)


@dataclass(frozen=True)
class ImageSet:
    """All images of a data set; the order of `examples` is part of it.

    Attributes:
        root: the folder of the images; None for those that are not files.
        classes: class names in the order of their labels.
        examples: every image; within a split, sorted by path.
        data: the settings that the set was read by; a Dataset is opened again by them.
        is_multilabel: whether an image may show several classes, or none.
        skipped: files among the images that are no images, each with the cause.
        notes: for the user: how the data were interpreted.
    """

    root: Path | None
    classes: tuple[str, ...]
    examples: tuple[Example, ...]
    data: Data = field(default_factory=Data)
    is_multilabel: bool = False
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_embedded(self) -> bool:
        """Whether these are the scans that come with scikit-learn."""
        return self.root is None and not self.data.is_dataset

    @property
    def native_size(self) -> int | None:
        """Height and width that suit images which are all of one small size, else None."""
        return EMBEDDED_SIZE if self.is_embedded else None

    @property
    def num_folds(self) -> int:
        """Parts of a k-fold split; 0 without one."""
        return max((e.fold for e in self.examples), default=0)

    def of(self, *splits: str) -> tuple[Example, ...]:
        """Return the examples of these splits, in their order."""
        return tuple(e for e in self.examples if e.split in splits)

    def counts(self, split: str) -> list[int]:
        """Return how many readable examples of a split show each class."""
        shown = Counter(
            label for e in self.examples if e.split == split and not e.bad for label in e.labels
        )
        return [shown[label] for label in range(len(self.classes))]

    def sealed(self) -> "ImageSet":
        """Return the set without its test split, which a sweep must not read."""
        return replace(self, examples=self.of("train", "val"))

    def fold(self, number: int) -> "ImageSet":
        """Return the set with the part `number`, from 1, as the validation split.

        The order of the examples does not change, so all folds read the same store.
        """
        examples = tuple(
            e if e.split == "test" else replace(e, split="val" if e.fold == number else "train")
            for e in self.examples
        )
        return replace(self, examples=examples)

    def name_of(self, example: Example) -> str:
        """Return the name of an example for messages."""
        return str(self.root / example.path if self.root else f"{self.data.source} {example.path}")


@lru_cache(maxsize=1)
def _digits() -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
    """Return scikit-learn's scans, uint8 (1797, 8, 8), and their digits.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """
    digits = load_digits()
    scans = (digits.images * (255 / 16)).round().astype(np.uint8)
    return scans, tuple(int(t) for t in digits.target)


def embedded() -> ImageSet:
    """Return the embedded scans, not split yet."""
    labels = _digits()[1]
    examples = tuple(Example(f"{i:04d}.png", label, "train", 0) for i, label in enumerate(labels))
    return ImageSet(None, tuple("0123456789"), examples)


def scan(index: int) -> Image.Image:
    """Return an embedded scan in RGB."""
    return Image.fromarray(_digits()[0][index]).convert("RGB")


def sorted_classes(names: Sequence[str]) -> list[str]:
    """Return class names in order: as numbers if all of them are whole numbers, else as text."""
    distinct = set(names)
    numeric = all(name.isascii() and name.isdigit() for name in distinct)
    return sorted(distinct, key=(lambda name: (int(name), name)) if numeric else None)
