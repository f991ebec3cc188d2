"""Find the images, name their classes, and say which are for training, validation and test."""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tuneapp.errors import DataError
from tuneapp.rundir import write_atomically

EMBEDDED = "digits"
EMBEDDED_SIZE = 32
"""Pixels to which the embedded 8 x 8 scans are enlarged where nothing else is asked."""

TEST_SHARE = 0.15
VAL_SHARE = 0.15
"""Shares of a folder without split that are held out; of the rest, for validation."""

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Example:
    """One image.

    Attributes:
        path: relative to the root of its set, with `/`; embedded scans have a made-up one.
        label: index of its class.
        split: `train`, `val` or `test`.
        num_bytes: size of the file; 0 for embedded scans.
    """

    path: str
    label: int
    split: str
    num_bytes: int


@dataclass(frozen=True)
class ImageSet:
    """All images of a data set; the order of `examples` is part of it.

    Attributes:
        root: the folder of the images; None for the embedded scans.
        classes: class names in the order of their labels.
        examples: every image; within a split, sorted by path.
    """

    root: Path | None
    classes: tuple[str, ...]
    examples: tuple[Example, ...]

    @property
    def native_size(self) -> int | None:
        """Height and width that suit images which are all of one small size, else None."""
        return EMBEDDED_SIZE if self.root is None else None

    def of(self, *splits: str) -> tuple[Example, ...]:
        """Return the examples of these splits, in their order."""
        return tuple(e for e in self.examples if e.split in splits)

    def open(self, example: Example) -> Image.Image:
        """Decode one image to RGB, turned as its EXIF orientation says.

        Raises:
            DataError: the file cannot be read as an image; the message names it.
        """
        if self.root is None:
            return _scan(int(Path(example.path).stem))
        path = self.root / example.path
        try:
            with Image.open(path) as image:
                turned = ImageOps.exif_transpose(image)
                # By way of RGBA, or Pillow warns of palettes with transparency.
                return (turned.convert("RGBA") if turned.mode == "P" else turned).convert("RGB")
        except UnidentifiedImageError:
            raise DataError(f"{path} is not an image") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be decoded: {error}") from None


def read_images(data: str, seed: int) -> ImageSet:
    """Return the embedded digits (`digits`) or the image folder at `data`, split.

    A folder holds either `train/`, `val/` (and `test/`) with a folder per class in each, or the
    class folders themselves. What is missing is split off, stratified by class and seeded; the
    test share of a folder that has `train/` and `val/` is left alone.

    Raises:
        DataError: no such folder, no images, fewer than two classes, or classes that differ
            between the splits.
    """
    if data == EMBEDDED and not Path(data).is_dir():
        return _split_off(_embedded(), seed, test=True)
    root = Path(data).expanduser().resolve()
    if not root.is_dir():
        raise DataError(
            f"--data {data}: no such folder; give a folder of class folders (or of train/, val/ "
            f"and test/), or {EMBEDDED!r} for the embedded data"
        )
    found = {split: _split_folder(root, names) for split, names in _SPLIT_NAMES.items()}
    held_out = found["val"] or found["test"]
    if found["train"] is None and held_out:
        raise DataError(f"{root} has {held_out.name}/ and no train/: add it, or give classes alone")
    if found["train"] is None:
        images = ImageSet(root, *_class_folders(root, root, "train"))
        return _split_off(images, seed, test=True)
    classes, examples = _class_folders(root, found["train"], "train")
    for split in ("val", "test"):
        folder = found[split]
        if folder is not None:
            theirs, more = _class_folders(root, folder, split)
            _require_same_classes(classes, theirs, folder)
            examples = (*examples, *more)
    images = ImageSet(root, classes, examples)
    return images if found["val"] is not None else _split_off(images, seed, test=False)


def write_split(file: Path, images: ImageSet) -> None:
    """Write which image is in which split, a row each."""

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            rows = csv.writer(out)
            rows.writerow(["path", "class", "split", "bytes"])
            for e in images.examples:
                rows.writerow([e.path, images.classes[e.label], e.split, e.num_bytes])

    write_atomically(file, write)


def read_split(file: Path, root: Path | None, classes: Sequence[str]) -> ImageSet:
    """Return the image set that `write_split` recorded.

    Raises:
        DataError: the file is missing or damaged.
    """
    labels = {name: label for label, name in enumerate(classes)}
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as text:
            examples = tuple(
                Example(row["path"], labels[row["class"]], row["split"], int(row["bytes"]))
                for row in csv.DictReader(text)
            )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file} cannot be read as a split: {error}") from None
    if not examples:
        raise DataError(f"{file} names no image")
    return ImageSet(root, tuple(classes), examples)


def require_unchanged(images: ImageSet) -> None:
    """Check that the files are there, with the sizes that they had when the run began.

    Raises:
        DataError: some are not; the message names the first ones.
    """
    if images.root is None:
        return
    changed = [e.path for e in images.examples if _num_bytes(images.root / e.path) != e.num_bytes]
    if changed:
        raise DataError(
            f"{len(changed)} of {len(images.examples)} images in {images.root} are gone or have "
            f"changed since this run began: {', '.join(changed[:3])}; put them back, or start a "
            "new sweep"
        )


def _num_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _split_folder(root: Path, names: Sequence[str]) -> Path | None:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name.casefold() in names)
    if len(folders) > 1:
        both = " and ".join(f"{folder.name}/" for folder in folders)
        raise DataError(f"{root} has {both}: rename the one that is not meant")
    return folders[0] if folders else None


def _class_folders(
    root: Path, folder: Path, split: str
) -> tuple[tuple[str, ...], tuple[Example, ...]]:
    """Return the class names in `folder` and the examples in them, all of one split."""
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise DataError(
            f"{folder} has {len(folders)} class folder(s); it takes at least two, each with the "
            "images of one class"
        )
    examples: list[Example] = []
    for label, class_folder in enumerate(folders):
        files = sorted(_image_files(class_folder))
        if not files:
            raise DataError(
                f"{class_folder} holds no image ({', '.join(_ENDINGS)}); add some, or remove it"
            )
        for file in files:
            path = file.relative_to(root).as_posix()
            examples.append(Example(path, label, split, file.stat().st_size))
    return tuple(f.name for f in folders), tuple(examples)


def _image_files(folder: Path) -> Iterator[Path]:
    """Walk `folder`, not following links to folders: they can loop."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(_ENDINGS) and not name.startswith("."):
                yield Path(place, name)


def _require_same_classes(classes: Sequence[str], theirs: Sequence[str], folder: Path) -> None:
    missing, extra = sorted(set(classes) - set(theirs)), sorted(set(theirs) - set(classes))
    if missing or extra:
        parts = [f"lacks {', '.join(missing[:5])}"] if missing else []
        parts += [f"has {', '.join(extra[:5])} besides"] if extra else []
        raise DataError(
            f"{folder} {' and '.join(parts)}: every split needs the classes of train/, by the same "
            "names"
        )


def _split_off(images: ImageSet, seed: int, *, test: bool) -> ImageSet:
    """Move seeded, stratified shares of the training examples to `val`, and to `test` if asked."""
    train = [i for i, e in enumerate(images.examples) if e.split == "train"]
    counts = Counter(images.examples[i].label for i in train)
    few = [images.classes[label] for label, count in counts.items() if count < 4]
    if few:
        raise DataError(
            f"class {', '.join(few[:5])} has fewer than 4 images: too few to split; add images, or "
            "give train/, val/ and test/ folders"
        )
    moved: dict[int, str] = {}
    for split, share in (("test", TEST_SHARE if test else 0.0), ("val", VAL_SHARE)):
        if share:
            labels = [images.examples[i].label for i in train]
            # Every class must be on both sides, however small the share or the class.
            size = max(round(share * len(train)), len(counts))
            try:
                train, held_out = train_test_split(
                    train, test_size=size, random_state=seed, stratify=labels
                )
            except ValueError as error:
                raise DataError(f"{images.root} cannot be split by class: {error}") from None
            moved |= {int(i): split for i in held_out}
    examples = [replace(e, split=moved.get(i, e.split)) for i, e in enumerate(images.examples)]
    examples.sort(key=lambda e: (e.split, e.path))
    for split in ("val", *(("test",) if test else ())):
        absent = set(counts) - {e.label for e in examples if e.split == split}
        if absent:
            names = ", ".join(sorted(images.classes[label] for label in absent)[:5])
            raise DataError(f"no image of {names} would be in {split}: add images of that class")
    return replace(images, examples=tuple(examples))


# --- The embedded data ----------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _digits() -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
    """Return scikit-learn's scans, uint8 (1797, 8, 8), and their digits.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
    """
    digits = load_digits()
    scans = (digits.images * (255 / 16)).round().astype(np.uint8)
    return scans, tuple(int(t) for t in digits.target)


def _embedded() -> ImageSet:
    labels = _digits()[1]
    examples = tuple(Example(f"{i:04d}.png", label, "train", 0) for i, label in enumerate(labels))
    return ImageSet(None, tuple("0123456789"), examples)


def _scan(index: int) -> Image.Image:
    return Image.fromarray(_digits()[0][index]).convert("RGB")
