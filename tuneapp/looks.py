"""All that `doctor` needs of one image, so that each file is decoded once.

Imports little on purpose, as `data.decode` does: the processes that examine files import it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tuneapp.data.decode import Header, Unreadable, decode, digest, read_bytes, read_header
from tuneapp.duplicates import Fingerprint, fingerprint

_BLANK = 4  # levels of 256 within which all pixels of an image without anything on it are


class Seen(NamedTuple):
    """What is read from the pixels of an image.

    Attributes:
        sums: the number of pixels; the sum of each channel's values, 0 to 255; and of their
            squares: seven integers.
        is_blank: whether it is of a single colour.
        fingerprint: what it is recognised by.
    """

    sums: tuple[int, ...]
    is_blank: bool
    fingerprint: Fingerprint


class Look(NamedTuple):
    """What was read from a file, or an example of a Dataset.

    Attributes:
        digest: of its content; empty where there is none.
        cause: why it cannot be read; empty if it can.
        header: its format and size; None if it cannot be read.
        seen: read from its pixels; None if it cannot be read.
    """

    digest: str
    cause: str
    header: Header | None = None
    seen: Seen | None = None


def look_at_files(files: list[str]) -> list[Look]:
    """Examine these files, in order; unreadable ones have a cause."""
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
    """Examine an RGB image that did not come from a file."""
    header = Header(*image.size, "no file", image.mode, is_turned=False, is_animated=False)
    return Look(digest(image.tobytes()), "", header, see(image))


def see(image: Image.Image) -> Seen:
    """Read the pixels of an RGB image; its sums are exact."""
    counts = np.array(image.histogram(), dtype=np.int64).reshape(3, 256)
    values = np.arange(256)
    sums = (*(counts @ values).tolist(), *(counts @ values**2).tolist())
    spread = max(int(np.ptp(np.flatnonzero(channel))) for channel in counts)
    return Seen((image.width * image.height, *sums), spread <= _BLANK, fingerprint(image))
