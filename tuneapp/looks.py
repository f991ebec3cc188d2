"""One look at an image: all that `doctor` wants to know of it, so that each file is decoded once.

Light on purpose, as `data.decode` is: the processes that look at files import this module.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tuneapp.data.decode import Header, Unreadable, decode, digest, read_bytes, read_header
from tuneapp.duplicates import Fingerprint, fingerprint

_BLANK = 4  # levels of 256 within which all pixels of an image without anything on it are


class Seen(NamedTuple):
    """What the pixels of an image tell.

    Attributes:
        sums: the number of pixels; the sum of each channel's values, of 0 to 255; and of their
            squares: seven whole numbers.
        is_blank: whether it is of a single colour.
        fingerprint: what it is recognised by.
    """

    sums: tuple[int, ...]
    is_blank: bool
    fingerprint: Fingerprint


class Look(NamedTuple):
    """What a file, or an example of a Dataset, turned out to be.

    Attributes:
        digest: of its content; empty where there is none.
        cause: why it cannot be read; empty if it can.
        header: what it says of itself; None if it cannot be read.
        seen: what its pixels tell; None if it cannot be read.
    """

    digest: str
    cause: str
    header: Header | None = None
    seen: Seen | None = None


def look_at_files(files: list[str]) -> list[Look]:
    """Return what these files are, in their order; those that cannot be read with their cause."""
    return [_look_at_file(Path(file)) for file in files]


def _look_at_file(file: Path) -> Look:
    content = b""
    try:
        content = read_bytes(file)
        image = decode(content)
        return Look(digest(content), "", read_header(file), see(image))
    except Unreadable as cause:
        return Look(digest(content) if content else "", str(cause))


def look_at_object(image: Image.Image) -> Look:
    """Return what an RGB image is that did not come from a file."""
    header = Header(*image.size, "no file", image.mode, is_turned=False, is_animated=False)
    return Look(digest(image.tobytes()), "", header, see(image))


def see(image: Image.Image) -> Seen:
    """Return what the pixels of an RGB image tell; its sums are exact."""
    counts = np.array(image.histogram(), dtype=np.int64).reshape(3, 256)
    values = np.arange(256)
    sums = (*(counts @ values).tolist(), *(counts @ values**2).tolist())
    spread = max(int(np.ptp(np.flatnonzero(channel))) for channel in counts)
    return Seen((image.width * image.height, *sums), spread <= _BLANK, fingerprint(image))
