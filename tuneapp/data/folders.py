"""Images in folders: one per class, split or not, or a flat one with labels in file names."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from tuneapp.config import EMBEDDED, Data
from tuneapp.data.datasets import TORCHVISION_NAMES
from tuneapp.data.decode import ENDINGS, Unreadable, read_header
from tuneapp.data.examples import Example, ImageSet
from tuneapp.errors import DataError, did_you_mean, nearest

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Files of operating systems and photo catalogues, which nobody takes for images.
_LITTER = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db", "picasa.ini"})

Skipped = tuple[str, str]


def read_folder(data: Data) -> ImageSet:
    """Return the images in a folder, in its own splits if it has some, else in `train`.

    Raises:
        DataError: no such folder, no images, fewer than two classes, or classes that differ
            between the splits.
    """
    root = Path(data.source).expanduser().resolve()
    if not root.is_dir():
        cause = "it is a file, not a folder" if root.exists() else "no such folder"
        raise DataError(
            f"--data {data.source}: {cause}{_source_meant(data.source)}; give a folder of class "
            "folders (or of train/, val/ and test/), a .csv or .parquet table, torchvision:NAME, "
            f"an import path package.module:name, or {EMBEDDED!r} for the embedded data"
        )
    found = {s: _split_folder(root, names, data) for s, names in _SPLIT_NAMES.items()}
    if data.label_regex is None and found["train"] and not _has_folders(found["train"]):
        found = dict.fromkeys(found)  # a class of that name, such as trains among buses
    held_out = found["val"] or found["test"]
    if found["train"] is None and held_out:
        raise DataError(
            f"{data.source} has {held_out.name}/ and no train/: add it, or give a folder of class "
            "folders"
        )
    folders = {split: place for split, place in found.items() if place} or {"train": root}
    reader = _ClassFolders(root, data) if data.label_regex is None else _FlatFolder(root, data)
    for split, place in folders.items():
        reader.read(place, split)
    if root not in folders.values():
        for beside in sorted(root.iterdir()):
            if beside.is_dir() and beside.name[:1] != "." and beside not in folders.values():
                reader.skip(beside, "is beside the folders of the splits, and is not read")
    return reader.result()


def _source_meant(source: str) -> str:
    """Return `; did you mean ...?` where a source is nearly the name of a known data set."""
    if Path(source).name != source:
        return ""
    near = nearest(source, TORCHVISION_NAMES)
    hint = did_you_mean(source, [EMBEDDED])
    return f"; did you mean 'torchvision:{near}'?" if near is not None and not hint else hint


class _Reader(ABC):
    """Walks folders, and collects examples under the names of their classes."""

    def __init__(self, root: Path, data: Data) -> None:
        self.root = root
        self.data = data
        self.found: list[tuple[str, str, os.stat_result | None, str]] = []
        self.skipped: list[Skipped] = []

    @abstractmethod
    def read(self, place: Path, split: str) -> None:
        """Collect the images below `place`, all of one split."""

    def written(self, place: Path) -> Path:
        """Return a path below the root as the user would write it, for messages."""
        return Path(self.data.source) / place.relative_to(self.root)

    def classes(self) -> list[str]:
        """Return the classes in their order: the requested ones, or those that were found."""
        names = sorted({name for _, name, _, _ in self.found})  # as torchvision's ImageFolder
        if self.data.classes is None:
            return names
        strange = [name for name in names if name not in self.data.classes]
        if strange:
            raise DataError(
                f"{self.data.source} has images of {', '.join(strange[:5])}, which classes= does "
                "not name"
            )
        return list(self.data.classes)

    def result(self) -> ImageSet:
        classes = self.classes()
        labels = {name: label for label, name in enumerate(classes)}
        examples = tuple(
            Example(
                path, labels[name], split, now.st_size if now else 0,
                modified_ns=now.st_mtime_ns if now else 0,
            )
            for path, name, now, split in self.found
        )  # fmt: skip
        return ImageSet(self.root, tuple(classes), examples, self.data, skipped=tuple(self.skipped))

    def take(self, file: Path, name: str, split: str) -> None:
        try:
            now = file.stat()
        except OSError:  # a broken link: it is reported when images are decoded
            now = None
        self.found.append((file.relative_to(self.root).as_posix(), name, now, split))

    def skip(self, file: Path, cause: str) -> None:
        self.skipped.append((file.relative_to(self.root).as_posix(), cause))

    def image_files(self, folder: Path) -> Iterator[Path]:
        """Walk `folder`, without following links to folders, which can loop.

        Files without a suffix of images are opened: photos without a suffix are images, notes are
        not.
        """
        for place, folders, files in os.walk(folder, onerror=_refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in folders:
                if Path(place, name).is_symlink():
                    self.skip(Path(place, name), "is a link to a folder, which is not followed")
            for name in sorted(files):
                file = Path(place, name)
                if name.startswith(".") or name.lower() in _LITTER:
                    continue
                if file.suffix.lower() not in ENDINGS:
                    try:
                        read_header(file)
                    except Unreadable as cause:
                        self.skip(file, str(cause))
                        continue
                yield file


def _refuse(error: OSError) -> None:
    """Report a folder that `os.walk` would silently leave out."""
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}")


class _ClassFolders(_Reader):
    """A folder per class."""

    _first: frozenset[str] | None = None

    def read(self, place: Path, split: str) -> None:
        folders = sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
        if len(folders) < 2:
            raise DataError(
                f"{self.written(place)} has {len(folders)} class folder(s); at least two are "
                "required, each with the images of one class (for labels in file names, give "
                "--label-regex)"
            )
        for file in sorted(place.iterdir()):
            if file.is_file() and file.suffix.lower() in ENDINGS and file.name[:1] != ".":
                self.skip(file, "is beside the class folders, and has no label")
        for folder in folders:
            before = len(self.found)
            for file in sorted(self.image_files(folder)):
                self.take(file, folder.name, split)
            if len(self.found) == before:
                endings = ", ".join(sorted(ENDINGS)[:6])
                raise DataError(
                    f"{self.written(folder)} holds no image ({endings}, ...); add some, or remove "
                    "the folder"
                )
        theirs = frozenset(folder.name for folder in folders)
        self._first = self._first or theirs
        _require_same_classes(self._first, theirs, self.written(place))


class _FlatFolder(_Reader):
    """Labels in the paths, found by a regular expression."""

    def read(self, place: Path, split: str) -> None:
        assert self.data.label_regex is not None
        pattern = re.compile(self.data.label_regex)
        without: list[str] = []
        before = len(self.found)
        for file in self.image_files(place):
            path = file.relative_to(place).as_posix()
            match = pattern.search(path)
            name = (match.group(1) if pattern.groups else match.group(0)) if match else None
            if name:
                self.take(file, name, split)
            else:
                without.append(path)
        if without:
            total = len(without) + len(self.found) - before
            raise DataError(
                f"--label-regex {self.data.label_regex!r} finds no label in {len(without)} of "
                f"{total} paths below {self.written(place)}, such as {without[0]!r}; "
                "the label is its first group, or the whole match"
            )
        names = {name for _, name, _, _ in self.found}
        if len(names) < 2:
            held = f"only the label {names.pop()!r}" if names else "no image"
            raise DataError(
                f"{self.written(place)}: --label-regex {self.data.label_regex!r} finds {held}"
            )


def _split_folder(root: Path, names: Sequence[str], data: Data) -> Path | None:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name.casefold() in names)
    if len(folders) > 1:
        both = " and ".join(f"{folder.name}/" for folder in folders)
        raise DataError(f"{data.source} has {both}: rename the one that is not the split")
    return folders[0] if folders else None


def _has_folders(folder: Path) -> bool:
    return any(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir())


def _require_same_classes(
    classes: AbstractSet[str], theirs: AbstractSet[str], folder: Path
) -> None:
    missing, extra = sorted(classes - theirs), sorted(theirs - classes)
    if not missing and not extra:
        return
    parts = [f"lacks {', '.join(missing[:5])}"] if missing else []
    parts += [f"also has {', '.join(extra[:5])}"] if extra else []
    raise DataError(
        f"{folder} {' and '.join(parts)}: every split needs the classes of train/, with the same "
        "names"
    )
