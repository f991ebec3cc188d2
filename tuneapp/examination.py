"""The result of examining a data set: for the terminal, and as an exclusion list."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuneapp.config import Data
from tuneapp.data.examples import SPLITS, ImageSet
from tuneapp.data.findings import Finding
from tuneapp.data.source import read_exclusions
from tuneapp.errors import ConfigError
from tuneapp.rundir import write_atomically

_MADE_BY = b"tuneapp doctor"  # in the first lines of the page, and of the list
_OURS = "# by tuneapp doctor: images to leave out of"
SMALL = 64
"""Images with a shorter side of fewer pixels are counted as small."""
LONG = 3.0
"""Images whose longer side is more than this many times the shorter one are counted as long."""


@dataclass(frozen=True)
class Spread:
    """How a number is distributed over the images.

    Attributes:
        name: of the number, with its unit.
        least: the smallest.
        low: 5 % of the images have less.
        median: half have less.
        high: 95 % have less.
        most: the largest.
    """

    name: str
    least: float
    low: float
    median: float
    high: float
    most: float


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of each channel, R, G and B in [0, 1], over all pixels.

    Attributes:
        mean: of each channel.
        std: of each channel.
        pixels: how many pixels these are of.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pixels: int


@dataclass(frozen=True)
class Examination:
    """What was found in a data set.

    Attributes:
        images: split as a training would, if that is possible; with digests, and the
            causes of unreadable files.
        findings: the serious first.
        spreads: of width, height, and the ratio of the longer side to the shorter one.
        num_small: images with a shorter side below `SMALL` pixels.
        num_long: images with a longer side above `LONG` times the shorter one.
        formats: how many images there are of each format and pixel format, most first.
        num_turned: images that EXIF turns or mirrors.
        num_animated: images with several frames, of which the first is taken.
        colours: of the training split; None if nothing in it can be read.
    """

    images: ImageSet
    findings: tuple[Finding, ...]
    spreads: tuple[Spread, ...]
    num_small: int
    num_long: int
    formats: Mapping[str, int]
    num_turned: int
    num_animated: int
    colours: Colours | None

    @property
    def is_serious(self) -> bool:
        """Whether a finding would spoil a training, or end it."""
        return any(finding.is_serious for finding in self.findings)

    @property
    def num_excluded(self) -> int:
        """How many images the exclusion list would name."""
        return len({path for finding in self.findings for path in finding.exclude})


def printable(text: str) -> str:
    """Return a text whose unprintable characters are escaped: file names may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def summary_lines(examination: Examination) -> list[str]:
    """Return what a data set is, a few lines for the terminal; the findings are not in them."""
    images = examination.images
    counts = [(split, len(images.of(split))) for split in SPLITS]
    sides = ", ".join(f"{count:,} {split}" for split, count in counts if count)
    lines = [f"images    {len(images.examples):,} of {len(images.classes)} classes: {sides}"]
    lines += [f"          {printable(note)}" for note in images.notes]
    if examination.spreads:
        width, height, _ = examination.spreads
        lines.append(
            f"sizes     median {width.median:g} x {height.median:g} pixels; "
            f"{examination.num_small:,} below {SMALL} on the shorter side, "
            f"{examination.num_long:,} longer than {LONG:g} : 1"
        )
        named = ", ".join(f"{name} {count:,}" for name, count in examination.formats.items())
        lines.append(f"formats   {named}")
    if examination.colours:
        mean, std = (
            " ".join(f"{value:.4f}" for value in values)
            for values in (examination.colours.mean, examination.colours.std)
        )
        lines.append(f"colours   of the training images: mean {mean}, std {std}")
    return lines


def require_writable(flag: str, file: Path, data: Data) -> None:
    """Check, before the long examination, that a result can be written without harm.

    Raises:
        ConfigError: it cannot, lies in the data, or there is a file that `doctor` did not write.
    """
    if not file.absolute().parent.is_dir() or file.is_dir():
        raise ConfigError(f"{flag} {file}: must be a file in a folder that exists")
    if not data.is_table and Path(data.source).resolve() in file.resolve().parents:
        raise ConfigError(f"{flag} {file}: lies in the data, where nothing is written")
    if file.exists() and _MADE_BY not in file.read_bytes()[:4096]:
        raise ConfigError(f"{flag} {file}: not written by `doctor`; give another name")


def next_command(examination: Examination, exclusions: Path | None) -> str:
    """Return the command that trains on these data, without what the list names."""
    words = ["python", "-m", "tuneapp", "sweep", "SPACE", *options_of(examination.images.data)]
    exclude = exclusions or examination.images.data.exclude
    if exclude:
        words += ["--exclude", str(exclude)]
    return " ".join(word if word == "SPACE" else shlex.quote(word) for word in words)


def options_of(data: Data) -> list[str]:
    """Return the options that name these data; not `--exclude`, whose list is rewritten."""
    words = ["--data", data.source]
    for name in ("label_regex", "label_separator", "group_regex", "data_root", "folds"):
        if getattr(data, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(data, name))]
    for role in ("path", "label", "split", "weight", "group"):
        columns = getattr(data, f"{role}_column") or ()
        for column in (columns,) if isinstance(columns, str) else columns:
            words += ["--column", f"{role}={column}"]
    if data.bad_images != "drop":
        words += ["--bad-images", data.bad_images]
    return words


def write_exclusions(file: Path, examination: Examination) -> int:
    """Write the images that the findings would leave out, each below its reason.

    What `--exclude` reads: a path a line, reasons as comments.

    Returns:
        How many could not be named, since a line cannot hold their names.
    """
    data = examination.images.data
    lines = [f"{_OURS} {printable(data.source)}"]
    if data.exclude is not None:  # or the next training would include these again
        lines += [f"# left out before, by {printable(data.exclude)}"]
        lines += read_exclusions(Path(data.exclude))
    written: set[str] = set()
    unnamed: set[str] = set()
    for finding in examination.findings:
        new = [path for path in dict.fromkeys(finding.exclude) if path not in written]
        if not new:
            continue
        lines.append(f"# {finding.kind}: {printable(finding.words)}")
        for path in new:
            if _fits_a_line(path):
                lines.append(path)
                written.add(path)
            else:
                lines.append(f"# not to be named in a line: {printable(path)}")
                unnamed.add(path)

    def write(aside: Path) -> None:
        text = "".join(f"{line}\n" for line in lines)
        aside.write_bytes(text.encode("utf-8", "surrogateescape"))

    write_atomically(file, write)
    return len(unnamed)


def _fits_a_line(path: str) -> bool:
    """Return whether `--exclude` would read it back: names may hold line breaks."""
    return path.splitlines() == [path] and bool(path.strip()) and not path.startswith("# ")
