"""Which images show the same, though their files differ.

Two steps. Perceptual hashes (imagehash) propose pairs: 64 bits each, compared by how many differ.
Thumbnails decide: hashes alone would take one scan of a 1 for another. Images with too little
detail (a gradient, a scan of 8 x 8 pixels) are called the same only if their pixels are.

Light on purpose (Pillow, numpy and imagehash only): the processes that read files import it.

Measured on 5250 photos of CIFAR-10 (32 px), 960 histology patches (48 px), crops of scikit-learn's
two photos (128 px), coloured noise (40 to 224 px), 600 gradients and scikit-learn's 1797 digits;
each against itself, and against copies saved as JPEG of quality 60, halved, brightened by a tenth
and a fifth, of a palette, and with a white mark on 2 % of the area, as it is and saved as JPEG:

- One hash is not enough. Copies differ in up to 6 bits of phash (photos), yet a mark moves 10 to
  28 of them; it moves at most 9 of dhash, which in turn is alike for most gradients.
- Edges correlate at 0.97 or more between a photo and its copies, at 0.92 or less between different
  ones (but for one pair of CIFAR-10, 0.95, much the same picture). In pure noise copies have
  0.74 or more and others 0.15 or less; among digits, others have up to 0.99.
- With a mark, the edges outside of it correlate at 0.985 or more, and nine tenths of the thumbnail
  are within 10 levels of the original; of different photos, within 12 at best.

With these thresholds no two different images of any of these sets are called the same. Found are
all marked and re-saved copies of CIFAR-10 and seven tenths of those halved to 16 px; of the crops
24 to 26 of 26, the others being sky without detail; of the patches 8 to 9 in 10. Digits enlarged to
32 px give one false pair of 1797 images. 100,000 fingerprints take 34 s of one core, and 100 MB.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image

from tuneapp.data.decoding import usable_cores
from tuneapp.thumbnails import SIDE, SMOOTH, Indices, Thumbnails

MAX_BITS = 13
"""Bits of a hash in which two proposed images may differ."""
TINY = 32
"""Smaller images are compared with larger ones only: they are too alike among themselves."""

_REDUCED = 256  # the short side down to which large images are shrunk by the fast way
_ROWS, _COLUMNS = 16, 8192  # hashes compared at once: few enough for the caches
_PAIRS = 4096  # pairs whose thumbnails are compared at once
_ENOUGH = 1_000_000  # pairs that each hash may propose, about: 10 s of comparing
_SAMPLED = 512  # images from which that number is estimated
_NOTHING = np.zeros(0, dtype=np.intp)


class Fingerprint(NamedTuple):
    """What an image is recognised by; 784 bytes.

    Attributes:
        phash: 64 bits, of the low frequencies: stays when an image is re-saved or made smaller.
        dhash: 64 bits, of the slopes: stays outside of a mark on the image.
        thumbnail: RGB, SIDE x SIDE x 3 bytes.
    """

    phash: int
    dhash: int
    thumbnail: bytes


class Prints(NamedTuple):
    """The fingerprints of many images.

    Attributes:
        hashes: phash and dhash, uint64 (N, 2).
        thumbnails: uint8 (N, SIDE, SIDE, 3).
        sizes: width and height in pixels, int64 (N, 2).
    """

    hashes: npt.NDArray[np.uint64]
    thumbnails: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return what an RGB image is recognised by."""
    shrink = min(image.size) // _REDUCED
    if shrink > 1:
        image = image.reduce(shrink)
    # Bilinear: of the filters, the one whose thumbnails of an image and its half agree best.
    thumbnail = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    hashes = (imagehash.phash(image), imagehash.dhash(image))
    phash, dhash = (int(str(value), 16) for value in hashes)
    return Fingerprint(phash, dhash, thumbnail.tobytes())


def near_duplicates(
    prints: Prints, watch: Callable[[int], None] = lambda done: None
) -> list[list[int]]:
    """Return the groups of images that show the same, by their indices, each rising.

    Every pair is compared, in blocks: memory does not grow with their number.

    Args:
        prints: of images that are not of one colour, no two of them with the same content.
        watch: called with the number of images compared.
    """
    count = len(prints.hashes)
    joined = _Joined(count)
    for group in _same_pixels(prints):
        for other in group[1:]:
            joined.join(group[0], other)
    looks = Thumbnails(prints.thumbnails, prints.sizes)
    is_tiny = prints.sizes.min(axis=1, initial=TINY) < TINY
    # Tiny images last: each comparison has a larger one on its left, so they never meet.
    order = np.argsort(is_tiny, kind="stable")
    # The slopes of all gradients are alike, which would propose each pair of them.
    rough = order[looks.roughness[order] >= SMOOTH]
    for half, (members, column) in enumerate(((order, 0), (rough, 1))):
        num_left = int((~is_tiny[members]).sum())
        for done, left, right in _close(prints.hashes[members, column], num_left):
            for first, second in looks.same(members[left], members[right]):
                joined.join(first, second)
            watch(count * half // 2 + done * count // (2 * max(num_left, 1)))
    watch(count)
    return joined.groups()


def _same_pixels(prints: Prints) -> Iterator[list[int]]:
    """Yield the images with the same size and the same thumbnail: one image in two formats."""
    by_look: dict[bytes, list[int]] = defaultdict(list)
    for index, (thumbnail, size) in enumerate(zip(prints.thumbnails, prints.sizes, strict=True)):
        by_look[size.tobytes() + thumbnail.tobytes()].append(index)
    return (group for group in by_look.values() if len(group) > 1)


def _close(hashes: npt.NDArray[np.uint64], num_left: int) -> Iterator[tuple[int, Indices, Indices]]:
    """Yield how many are done, and pairs whose hashes differ in few bits, each pair once.

    Args:
        hashes: uint64 (N,).
        num_left: how many of them, from the first, are compared with all that follow.
    """
    most = _most_bits(hashes)
    starts = range(0, num_left, _ROWS)
    waiting: list[npt.NDArray[np.intp]] = []
    # Threads: numpy counts bits without Python's lock.
    with ThreadPoolExecutor(usable_cores()) as pool:
        rows = pool.map(lambda start: _close_to(hashes, start, num_left, most), starts)
        for start, pairs in zip(starts, rows, strict=True):
            waiting.append(pairs)
            if sum(map(len, waiting)) >= _PAIRS or start + _ROWS >= num_left:
                together = np.concatenate(waiting)
                waiting = []
                for first in range(0, len(together), _PAIRS):
                    part = together[first : first + _PAIRS]
                    yield start, part[:, 0], part[:, 1]
            yield min(start + _ROWS, num_left), _NOTHING, _NOTHING


def _close_to(
    hashes: npt.NDArray[np.uint64], start: int, num_left: int, most: int
) -> npt.NDArray[np.intp]:
    """Return the pairs (M, 2) of some rows, from `start`, with all that follow them."""
    rows = hashes[start : min(start + _ROWS, num_left), None]
    found = [np.zeros((0, 2), dtype=np.intp)]
    for at in range(start, len(hashes), _COLUMNS):
        close = np.bitwise_count(rows ^ hashes[at : at + _COLUMNS]) <= most
        if close.any():
            pairs = np.argwhere(close) + np.array([start, at])
            found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return np.concatenate(found)


def _most_bits(hashes: npt.NDArray[np.uint64]) -> int:
    """Return the number of differing bits up to which pairs are proposed.

    Fewer where images are alike as a rule (X-rays, scans of digits): there, hashes that differ by
    many bits propose nearly every pair, and say nothing.
    """
    sample = np.random.default_rng(0).permutation(len(hashes))[:_SAMPLED]
    counts = np.zeros(65, dtype=np.int64)
    for index in sample:
        counts += np.bincount(np.bitwise_count(hashes[index] ^ hashes), minlength=65)
    counts[0] -= len(sample)  # each with itself
    pairs = np.cumsum(counts) * (len(hashes) / max(len(sample), 1) / 2)
    return min(MAX_BITS, int((pairs <= _ENOUGH).sum()) - 1)


class _Joined:
    """Groups that grow together, pair by pair."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def join(self, first: int, second: int) -> None:
        first, second = self._root(first), self._root(second)
        self._parents[max(first, second)] = min(first, second)

    def _root(self, index: int) -> int:
        while self._parents[index] != index:
            self._parents[index] = self._parents[self._parents[index]]
            index = self._parents[index]
        return index

    def groups(self) -> list[list[int]]:
        """Return the groups of two and more, each rising."""
        members: dict[int, list[int]] = defaultdict(list)
        for index in range(len(self._parents)):
            members[self._root(index)].append(index)
        return [group for group in members.values() if len(group) > 1]


def as_prints(prints: Sequence[Fingerprint], sizes: Sequence[tuple[int, int]]) -> Prints:
    """Return fingerprints, and sizes in pixels, together."""
    thumbnails = np.frombuffer(b"".join(p.thumbnail for p in prints), dtype=np.uint8)
    return Prints(
        np.array([(p.phash, p.dhash) for p in prints], dtype=np.uint64).reshape(-1, 2),
        thumbnails.reshape(-1, SIDE, SIDE, 3),
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
    )
