"""Whether two images show the same, as far as thumbnails of 16 x 16 pixels tell.

What is compared are edges, the differences between neighbours: they stay when an image is
re-saved, made smaller, or brightened, and different images of one kind do not share them. How
similar they must be depends on the images, and was measured (`duplicates`).
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

SIDE = 16
"""Pixels of a thumbnail's side: small enough that a halved image of 32 pixels still fills it."""
SMOOTH = 0.25
"""Roughness below which an image is a gradient; gradients have 0.15, photos 0.3 to 0.9."""

_NOISY = 1.0  # roughness above which an image is noise, which has 1.1 to 1.3
_FAINT = 0.4  # levels between neighbours: below it, there is nothing but rounding
_FLAT = 0.3  # share of neighbours within 2 levels, from which an image is a drawing
_ASPECT = 0.06  # by how much the ratio of sides may differ: that of halved small images is rounded
_LIGHT, _TINT = 45, 35  # levels by which mean colours may differ, and channels of them in this
_LEFT = 11.0  # levels that may be left of a difference, at a contrast of 50
_EIGHTH = 60  # of the 480 edges of a thumbnail
_CHUNK = 4096  # images measured at once
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]


class Thumbnails:
    """Decides whether two images show the same.

    Attributes:
        roughness: how different neighbours are, relative to the contrast of the whole, (N,).
    """

    def __init__(self, thumbnails: npt.NDArray[np.uint8], sizes: npt.NDArray[np.int64]) -> None:
        """Measure thumbnails, uint8 (N, SIDE, SIDE, 3), of images of (N, 2) pixels."""
        count = len(thumbnails)
        self._thumbnails = thumbnails
        self._aspects = np.log(sizes[:, 0] / sizes[:, 1])
        self._grey = np.zeros((count, SIDE, SIDE), dtype=np.float16)
        self._colours = np.zeros((count, 3), dtype=np.float32)
        self.roughness, self._flat, self._steps = np.zeros((3, count), dtype=np.float32)
        for at in range(0, count, _CHUNK):
            part = slice(at, at + _CHUNK)
            pixels = thumbnails[part].astype(np.float32)
            self._grey[part] = pixels @ _LUMA
            self._colours[part] = pixels.mean(axis=(1, 2))
            edges = _edges(self._grey[part])
            self._flat[part] = (np.abs(edges) < 2).mean(axis=1)
            self._steps[part] = np.sqrt((edges**2).mean(axis=1))
            contrast = (pixels @ _LUMA).reshape(len(pixels), -1).std(axis=1)
            self.roughness[part] = self._steps[part] / np.maximum(contrast, 1e-3)

    def same(self, left: Indices, right: Indices) -> Iterator[tuple[int, int]]:
        """Yield those of the proposed pairs that show the same; the cheap tests first."""
        shift = np.abs(self._colours[left] - self._colours[right]).max(axis=1)
        kept = np.abs(self._aspects[left] - self._aspects[right]) <= _ASPECT
        kept &= np.minimum(self._steps[left], self._steps[right]) >= _FAINT
        left, right = left[kept & (shift <= _LIGHT)], right[kept & (shift <= _LIGHT)]
        ours, theirs = self._grey[left], self._grey[right]
        alike = _cosine(_edges(ours), _edges(theirs))
        smooth = np.minimum(self.roughness[left], self.roughness[right]) < SMOOTH
        same = np.where(
            smooth,
            (alike >= 0.9) & self._same_colours(left, right),
            self._saved_anew(left, right, alike) | self._marked(left, right),
        )
        yield from zip(left[same].tolist(), right[same].tolist(), strict=True)

    def _saved_anew(self, left: Indices, right: Indices, alike: Floats) -> Bools:
        """Return which are the same but for compression, size, and light, (P,)."""
        noisy = np.minimum(self.roughness[left], self.roughness[right]) >= _NOISY
        same = alike >= self._needed(left, right, noisy, 0.72, 0.985, 0.96)
        same &= np.abs(np.log(self._steps[left] / self._steps[right])) <= 0.5
        shift = self._colours[left] - self._colours[right]
        same &= np.ptp(shift, axis=1) <= _TINT
        at = np.flatnonzero(same)
        ours, theirs = self._grey[left[at]], self._grey[right[at]]
        edges, their_edges = _edges(ours), _edges(theirs)
        same[at] = _alike_beside(edges, their_edges)
        left_over = _ninety(_unlit(ours) - _unlit(theirs))
        same[at] &= noisy[at] | (left_over <= _LEFT)
        return same

    def _marked(self, left: Indices, right: Indices) -> Bools:
        """Return which are the same but for a small part, such as a mark of their owner, (P,)."""
        ours, theirs = self._grey[left], self._grey[right]
        same = _ninety(ours.astype(np.float32) - theirs) <= 10
        at = np.flatnonzero(same)
        edges, their_edges = _edges(ours[at]), _edges(theirs[at])
        outside = _without_largest(np.abs(edges - their_edges))
        # The larger: a mark is a strong contrast, relative to which noise is none.
        noisy = np.maximum(self.roughness[left[at]], self.roughness[right[at]]) >= _NOISY
        needed = self._needed(left[at], right[at], noisy, 0.85, 0.99, 0.985)
        edges, their_edges = edges * outside, their_edges * outside
        same[at] = (_cosine(edges, their_edges) >= needed) & _alike_beside(edges, their_edges)
        return same

    def _needed(
        self,
        left: Indices,
        right: Indices,
        noisy: Bools,
        noise: float,
        drawing: float,
        photo: float,
    ) -> Floats:
        """Return how alike edges must be: those of noise are never by chance, of drawings often."""
        flat = np.maximum(self._flat[left], self._flat[right]) >= _FLAT
        return np.where(noisy, noise, np.where(flat, drawing, photo)).astype(np.float32)

    def _same_colours(self, left: Indices, right: Indices) -> Bools:
        """Return which are nearly of the same colour everywhere: what tells gradients apart."""
        apart = self._thumbnails[left].astype(np.float32) - self._thumbnails[right]
        return np.asarray(_ninety(np.abs(apart).max(axis=3)) <= 6)


def _edges(grey: npt.NDArray[np.floating]) -> Floats:
    """Return the differences of brightness between neighbours, (P, 480)."""
    grey = grey.astype(np.float32)
    half = SIDE * (SIDE - 1)
    across = (grey[:, :, 1:] - grey[:, :, :-1]).reshape(len(grey), half)
    down = (grey[:, 1:] - grey[:, :-1]).reshape(len(grey), half)
    return np.concatenate([across, down], axis=1)


def _cosine(ours: Floats, theirs: Floats) -> Floats:
    """Return the cosine between the rows of two arrays, (P,); 0 where one of them is zero."""
    product, own, other = (
        np.einsum("ij,ij->i", a, b) for a, b in ((ours, theirs), (ours, ours), (theirs, theirs))
    )
    return np.asarray(product / np.maximum(np.sqrt(own * other), 1e-6))


def _alike_beside(edges: Floats, their_edges: Floats) -> Bools:
    """Return which are alike without their strongest edges, too, (P,).

    The logo that all images of a source bear does not make two of them the same.
    """
    weak = _without_largest(np.minimum(np.abs(edges), np.abs(their_edges)))
    return np.asarray(_cosine(edges * weak, their_edges * weak) >= 0.6)


def _without_largest(values: Floats) -> Bools:
    """Return where the values of a row are not among its largest eighth, (P, 480)."""
    return np.asarray(values <= np.partition(values, -_EIGHTH, axis=1)[:, -_EIGHTH, None])


def _unlit(grey: npt.NDArray[np.floating]) -> Floats:
    """Return brightness, (P, SIDE, SIDE), with the mean 0 and the contrast of 50 levels."""
    levels = grey.astype(np.float32)
    levels -= levels.mean(axis=(1, 2), keepdims=True)
    return np.asarray(50 * levels / np.maximum(levels.std(axis=(1, 2), keepdims=True), 1e-3))


def _ninety(apart: Floats) -> Floats:
    """Return what nine tenths of a row's values do not exceed in size, (P,)."""
    sizes = np.abs(apart).reshape(len(apart), SIDE * SIDE)
    return np.asarray(np.partition(sizes, 230, axis=1)[:, 230])
