"""Finds what is wrong with a data set before any training; nothing in it is ever changed.

Every image is decoded once, on all cores; about a kilobyte of each stays in memory for the
analysis. It continues where a training would refuse to start, and reports why.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from tuneapp.config import Data
from tuneapp.data.decode import Unreadable
from tuneapp.data.decoding import in_parallel
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.findings import Finding, cheap_findings, duplicate_findings, kept_first, some
from tuneapp.data.reading import read_example
from tuneapp.data.source import read_unsplit
from tuneapp.data.split import leaking_groups, require_usable, split
from tuneapp.duplicates import as_prints, near_duplicates
from tuneapp.errors import DataError
from tuneapp.examination import LONG, SMALL, Colours, Examination, Spread
from tuneapp.looks import Look, Seen, look_at_files, look_at_object

Watch = Callable[[str, int, int], None]
"""Called with the step, how many images are done, and how many there are."""


def examine(data: Data, seed: int, watch: Watch = lambda what, done, total: None) -> Examination:
    """Look at every image of a data set, and return what is odd about them.

    Args:
        data: what was asked for.
        seed: of the splits that the data do not have themselves.
        watch: called with the progress.

    Raises:
        DataError: there are no images to look at.
        ConfigError: there is no such source.
    """
    images, trouble = _split(read_unsplit(data), seed)
    looks = _Looks(images)
    looks.take_all(watch)
    images = looks.stamped()
    if not trouble:
        try:
            require_usable(images)
        except DataError as error:
            trouble = str(error)
    near = looks.near_duplicates(images, watch)
    found = [
        *cheap_findings(images),
        *_group_leakage(images),
        *duplicate_findings(near, "much the same pixels"),
        *looks.findings(),
    ]
    # A training would refuse for one reason; a finding about the same reason explains it better.
    if trouble and not any(f.kind in ("missing classes", "group leakage") for f in found):
        found.append(Finding("cannot be trained on", True, trouble))
    found.sort(key=lambda finding: not finding.is_serious)
    return looks.examination(images, found)


def _split(images: ImageSet, seed: int) -> tuple[ImageSet, str]:
    """Return the set split as for a training, or as it is and why it cannot be split."""
    try:
        return split(images, seed), ""
    except DataError as error:
        examples = sorted(images.examples, key=lambda e: (e.split, e.path))
        return replace(images, examples=tuple(examples)), str(error)


def _group_leakage(images: ImageSet) -> Iterator[Finding]:
    leaking = leaking_groups(images)
    if not leaking:
        return
    members: dict[str, list[Example]] = {group: [] for group in leaking}
    for example in images.examples:
        if example.group in members:
            members[example.group].append(example)
    leave_out = []
    for group in members.values():
        kept = min(group, key=kept_first).split
        leave_out += [e.path for e in group if e.split != kept]
    named = some([f"{name!r} in {' and '.join(sides)}" for name, sides in leaking.items()])
    yield Finding(
        "group leakage",
        True,
        f"{len(leaking)} group(s) are in several splits: {named}",
        tuple(e.path for group in members.values() for e in group),
        tuple(leave_out),
    )


class _Looks:
    """Examines each image, and keeps about a kilobyte of it."""

    def __init__(self, images: ImageSet) -> None:
        count = len(images.examples)
        self._images = images
        self._digests = [""] * count
        self._causes = [""] * count
        self._seen: list[Seen | None] = [None] * count
        self._sizes = np.zeros((count, 2), dtype=np.int64)
        self._formats: Counter[str] = Counter()
        self._num_turned = 0
        self._num_animated = 0
        self._misnamed: list[tuple[str, str]] = []

    def take_all(self, watch: Watch) -> None:
        """Look at all images: files on all cores, the examples of a Dataset one by one."""
        examples = self._images.examples
        if self._images.root is None:
            for index, example in enumerate(examples):
                try:
                    look = look_at_object(read_example(self._images, example))
                except Unreadable as cause:
                    look = Look("", str(cause))
                self._take(index, [look])
                watch("images examined", index + 1, len(examples))
            return
        files = [str(self._images.root / e.path) for e in examples]
        in_parallel(
            look_at_files, files, lambda start, part: (part,), self._take,
            lambda done: watch("images examined", done, len(files)),
        )  # fmt: skip

    def _take(self, start: int, looks: Sequence[Look]) -> None:
        for index, look in enumerate(looks, start):
            self._digests[index] = look.digest
            self._causes[index] = look.cause
            self._seen[index] = look.seen
            if look.header is None:
                continue
            header = look.header
            self._sizes[index] = header.width, header.height
            self._formats[f"{header.format} {header.mode}"] += 1
            self._num_turned += header.is_turned
            self._num_animated += header.is_animated
            path = self._images.examples[index].path
            if self._images.root is not None and _is_misnamed(path, header.format):
                self._misnamed.append((path, header.format))

    def stamped(self) -> ImageSet:
        """Return the set with the digests of its contents, and which of them cannot be read."""
        told = zip(self._images.examples, self._digests, self._causes, strict=True)
        examples = tuple(replace(e, digest=digest, bad=cause) for e, digest, cause in told)
        return replace(self._images, examples=examples)

    def near_duplicates(self, images: ImageSet, watch: Watch) -> list[list[Example]]:
        """Return the groups of images that show the same in different files.

        Files with the same content are represented by the one that the exclusion list keeps.
        Images of a single colour are not compared; they are a separate finding.
        """
        best: dict[str, int] = {}
        for index, example in enumerate(images.examples):
            seen = self._seen[index]
            if seen is None or seen.is_blank:
                continue
            other = best.setdefault(example.digest, index)
            if kept_first(example) < kept_first(images.examples[other]):
                best[example.digest] = index
        indices = sorted(best.values())
        prints = as_prints(
            [seen.fingerprint for i in indices if (seen := self._seen[i]) is not None],
            [(int(width), int(height)) for width, height in self._sizes[indices]],
        )
        groups = near_duplicates(prints, lambda done: watch("images compared", done, len(indices)))
        return [[images.examples[indices[i]] for i in group] for group in groups]

    def findings(self) -> Iterator[Finding]:
        """Yield what is odd about the files and pixels themselves."""
        blank = [
            example.path
            for example, seen in zip(self._images.examples, self._seen, strict=True)
            if seen is not None and seen.is_blank
        ]
        if blank:
            words = f"{len(blank)} image(s) are of a single colour: {some(blank)}"
            yield Finding("blank", False, words, tuple(blank), tuple(blank))
        if self._misnamed:
            named = some([f"{path} is {format_}" for path, format_ in sorted(self._misnamed)])
            yield Finding(
                "wrong endings",
                False,
                f"{len(self._misnamed)} file(s) are of another format than their ending says, "
                f"and are read anyway: {named}",
                tuple(path for path, _ in sorted(self._misnamed)),
            )

    def examination(self, images: ImageSet, findings: Sequence[Finding]) -> Examination:
        """Return everything together."""
        sizes = self._sizes[self._sizes[:, 0] > 0]
        shorter, longer = sizes.min(axis=1, initial=2**31), sizes.max(axis=1, initial=0)
        aspects = longer / shorter
        named = (
            ("width in pixels", sizes[:, 0]),
            ("height in pixels", sizes[:, 1]),
            ("longer side / shorter side", aspects),
        )
        return Examination(
            images=images,
            findings=tuple(findings),
            spreads=tuple(_spread(name, values) for name, values in named if len(values)),
            num_small=int((shorter < SMALL).sum()),
            num_long=int((aspects > LONG).sum()),
            formats=dict(self._formats.most_common()),
            num_turned=self._num_turned,
            num_animated=self._num_animated,
            colours=self._colours(),
        )

    def _colours(self) -> Colours | None:
        """Return the colours of the training split, exactly, from integers."""
        sums = [0] * 7
        for example, seen in zip(self._images.examples, self._seen, strict=True):
            if example.split == "train" and seen is not None:
                sums = [total + part for total, part in zip(sums, seen.sums, strict=True)]
        pixels = sums[0]
        if not pixels:
            return None
        mean = [total / pixels for total in sums[1:4]]
        # n * squares - sum^2 in integers: no cancellation between large numbers.
        std = [
            (pixels * squares - total * total) ** 0.5 / pixels
            for total, squares in zip(sums[1:4], sums[4:7], strict=True)
        ]
        red, green, blue = (m / 255 for m in mean)
        return Colours((red, green, blue), (std[0] / 255, std[1] / 255, std[2] / 255), pixels)


def _spread(name: str, values: npt.NDArray[np.number]) -> Spread:
    return Spread(name, *(float(v) for v in np.quantile(values, (0, 0.05, 0.5, 0.95, 1))))


def _is_misnamed(path: str, format_: str) -> bool:
    """Return whether the ending of a file belongs to another format."""
    said = Image.registered_extensions().get(PurePosixPath(path).suffix.lower())
    # Photos of two lenses are JPEG files with another one behind; DIB is BMP without its head.
    same = {"MPO": "JPEG", "DIB": "BMP"}
    return said is not None and same.get(said, said) != same.get(format_, format_)
