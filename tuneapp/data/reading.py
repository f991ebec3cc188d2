"""From an example to its image, for every kind of source."""

from functools import lru_cache
from pathlib import Path

from PIL import Image

from tuneapp.config import Data
from tuneapp.data.datasets import Opener, open_dataset
from tuneapp.data.decode import Unreadable, read_image
from tuneapp.data.examples import Example, ImageSet, scan
from tuneapp.errors import DataError


def open_image(images: ImageSet, example: Example) -> Image.Image:
    """Decode one image to RGB, upright.

    Raises:
        DataError: it cannot be read as an image; the message names it.
    """
    try:
        return read_example(images, example)
    except Unreadable as cause:
        raise DataError(f"{images.name_of(example)} {cause}") from None


def read_example(images: ImageSet, example: Example) -> Image.Image:
    """Decode one image to RGB, upright.

    Raises:
        Unreadable: it cannot be read as an image; the message says why, but does not name it.
    """
    if images.root is not None:
        return read_image(images.root / example.path)
    if images.is_embedded:
        return scan(int(Path(example.path).stem))
    return _opener(images.data)(example)


@lru_cache(maxsize=4)
def _opener(data: Data) -> Opener:
    """Open a Dataset source, once per process."""
    return open_dataset(data)
