"""One rule for every image file: how it is read, and what makes it unreadable.

Light on purpose (Pillow and numpy only): the processes that decode a data set import nothing else.

What files really hold decides, not their endings. Turned as EXIF says; of animations the first
frame; grey, palette and CMYK become RGB by Pillow's own conversions; what is transparent lies on
white, as a browser shows it; of 16-bit pixels the high byte is kept, as Pillow does with 16-bit
colours and torchvision with uint16. What has no known range (32-bit integers, floating point), is
cut off, is empty, or is larger than Pillow's limit against decompression bombs is unreadable.
"""

import contextlib
import hashlib
import io
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from tuneapp.errors import DataError

with contextlib.suppress(ImportError):  # photos of iPhones; an extra of the package
    import pillow_heif

    pillow_heif.register_heif_opener()

ENDINGS = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".avif", ".jp2", ".heic", ".heif"),
    ]
)
"""Files called so are taken for images; others are looked into."""

DECODER = f"Pillow {PIL.__version__}, HEIC {'.heic' in Image.registered_extensions()}"
"""What decoded the images of a store: another one may read more, or otherwise."""

PASSING = ("cannot be read: ", "is too large for this machine's memory")
"""How causes begin that say nothing of the file itself: the next try may read it."""

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""Pillow's own limit against decompression bombs, 179 million pixels; also for the resized image,
which for a strip of 1 x 10,000 pixels is far larger than the strip."""

# Pixels of these formats may use all of the 16 bits; Pillow scales those of PGM to them.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height


class Unreadable(DataError):  # noqa: N818 - what an image is, and what is listed of it
    """An image cannot be read; the message says why, in a few words, and not which."""


class Header(NamedTuple):
    """What an image file says of itself before it is decoded.

    Attributes:
        width: in pixels, as turned by EXIF.
        height: likewise.
        format: Pillow's name, such as `JPEG`.
        mode: Pillow's name of the pixel format in the file, such as `CMYK`.
        is_turned: whether EXIF turns or mirrors it.
        is_animated: whether it has more than one frame.
    """

    width: int
    height: int
    format: str
    mode: str
    is_turned: bool
    is_animated: bool


def digest(content: bytes) -> str:
    """Return what tells contents apart: 128 bits of BLAKE2b, in hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        Unreadable: it is missing, empty, no file, or may not be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unreadable("is no regular file")
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from None
    if not content:
        raise Unreadable("is empty: 0 bytes")
    return content


def read_header(path: Path) -> Header:
    """Return what an image file says of itself, without decoding it.

    Raises:
        Unreadable: it is missing, no image, or one too large.
    """
    try:
        now = path.stat()
        if not stat.S_ISREG(now.st_mode):
            raise Unreadable("is no regular file")
        if now.st_size == 0:
            raise Unreadable("is empty: 0 bytes")
        with path.open("rb") as file, _opened(file) as image:
            orientation = _orientation(image)
            width, height = image.size
            if orientation in _TURNED and image.format != "TIFF":  # which Pillow opens turned
                width, height = height, width
            is_turned = orientation in range(2, 9)
            return Header(
                width, height, str(image.format), image.mode, is_turned, _is_animated(image)
            )
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from None


def decode(content: bytes) -> Image.Image:
    """Return an image in RGB, upright.

    Raises:
        Unreadable: it is no image, is damaged, or too large.
    """
    with _opened(io.BytesIO(content)) as image:
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except MemoryError:
            raise
        except Exception:  # damaged EXIF turns nothing; the pixels are whole
            pass
        return to_rgb(image)


def read_image(path: Path) -> Image.Image:
    """Return the image in a file, in RGB, upright.

    Raises:
        Unreadable: it is missing, no image, damaged, or too large.
    """
    return decode(read_bytes(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, by the rule at the head of this module.

    Raises:
        Unreadable: its pixels have no known range.
    """
    if image.mode in _SIXTEEN_BITS:
        return Image.fromarray(_high_byte(np.asarray(image))).convert("RGB")
    if image.mode == "I" and image.format == "PPM":
        return Image.fromarray(_high_byte(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise Unreadable(f"has {kind} for pixels, whose range is not known; save it with 8 or 16")
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    if with_alpha.getchannel("A").getextrema()[0] == 255:
        return with_alpha.convert("RGB")
    paper = Image.new("RGBA", with_alpha.size, "white")
    return Image.alpha_composite(paper, with_alpha).convert("RGB")


def resized_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return width and height after the short side is resized, as torchvision computes them.

    Raises:
        Unreadable: that would be too large.
    """
    long_side = int(short_side * max(width, height) / min(width, height))
    if short_side * long_side > MAX_PIXELS:
        raise Unreadable(
            f"is a strip of {width} x {height} pixels: {long_side:,} long at the short side of "
            f"{short_side} that the network's preprocessing wants"
        )
    return (short_side, long_side) if width <= height else (long_side, short_side)


def resize(image: Image.Image, short_side: int, interpolation: str) -> npt.NDArray[np.uint8]:
    """Return an RGB image with its short side resized, uint8 (H, W, 3).

    The very call that torchvision's `Resize(short_side)` makes for a PIL image; a test holds them
    equal to the last bit.

    Raises:
        Unreadable: the result would be too large.
    """
    size = resized_size(*image.size, short_side)
    if size != image.size:
        image = image.resize(size, Image.Resampling[interpolation.upper()])
    return np.asarray(image)


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """Open an image; whatever Pillow and its plugins raise for bad files becomes `Unreadable`."""
    # Whatever other code has set: half an image would be filled up with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    with quiet():
        try:
            with Image.open(file) as image:
                yield image
        except Unreadable:
            raise
        except UnidentifiedImageError:
            file.seek(0)
            raise Unreadable(f"is not an image{_guess(file.read(16))}") from None
        except Image.DecompressionBombError as error:
            raise Unreadable(f"is too large: {error}") from None
        except MemoryError:
            raise Unreadable("is too large for this machine's memory") from None
        except Exception as error:  # plugins raise nearly anything for damaged files
            first_line = str(error).strip().split("\n")[0]
            raise Unreadable(f"cannot be decoded: {first_line or type(error).__name__}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow from warning, of large images (its limit holds) and of odd metadata.

    In the main thread only: Python's filters are those of the whole process, and threads that put
    them back in another order would leave them changed. Who starts threads does this around them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: Image.Image) -> object:
    """Return how EXIF turns an image that is not decoded yet; damaged EXIF turns nothing."""
    try:
        if image.format == "TIFF":
            return image.getexif().get(ExifTags.Base.Orientation, 1)
        # Not `getexif()`, which decodes a whole PNG to look for EXIF behind its pixels.
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises nearly anything for damaged EXIF
        return 1


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame; the first one counts
        return True


def _high_byte(pixels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    return (pixels.astype(np.uint16) >> 8).astype(np.uint8)


def _guess(content: bytes) -> str:
    """Return what a file that is no image to Pillow seems to be, for the kinds people meet."""
    if content[4:8] == b"ftyp":
        brand = content[8:12].decode("ascii", "replace")
        if brand in ("heic", "heix", "mif1", "msf1", "heim", "heis"):
            return " that Pillow reads by itself, but HEIC: pip install pillow-heif"
        return ", but a video"
    kinds = {
        b"%PDF": "a PDF",
        b"PK\x03\x04": "a ZIP archive or an office document",
        b"<svg": "an SVG drawing",
        b"<?xml": "XML",
        b"<!DO": "a web page",
        b"<htm": "a web page",
    }
    kind = kinds.get(content[:4]) or kinds.get(content[:5])
    return f", but {kind}" if kind else ""
