"""One rule for every image file: how it is read, and what makes it unreadable.

Light on purpose (Pillow and numpy only): the processes that decode a data set import nothing else.

The content of a file decides, not its suffix. Images are turned as EXIF says; of animations the
first frame is used; grey, palette and CMYK become RGB by Pillow's own conversions; transparent
parts are put on white, as a browser shows them; of 16-bit pixels the high byte is kept, as Pillow
does with 16-bit colours and torchvision with uint16. An image is unreadable if its pixels have no
known range (32-bit integers, floating point), if it is cut off or empty, or if it is larger than
Pillow's limit against decompression bombs.
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

from tuneapp.errors import DataError, first_line

with contextlib.suppress(ImportError):  # photos of iPhones; an extra of the package
    import pillow_heif

    pillow_heif.register_heif_opener()

ENDINGS = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".avif", ".jp2", ".heic", ".heif"),
    ]
)
"""Suffixes of files that count as images; other files are opened to find out."""

DECODER = f"Pillow {PIL.__version__}, HEIC {'.heic' in Image.registered_extensions()}"
"""What decoded the images of a store: another version may read more files, or other pixels."""

PASSING = ("cannot be read: ", "is too large for this machine's memory")
"""Beginnings of causes that do not depend on the file itself: the next attempt may read it."""

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""Pillow's own limit against decompression bombs, 179 million pixels; also for the resized image,
which for a strip of 1 x 10,000 pixels is far larger than the strip."""

# Pixels of these modes may use all 16 bits; Pillow scales pixels of PGM files to 16 bits.
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height


class Unreadable(DataError):  # noqa: N818 - a state of an image, as it is listed
    """An image cannot be read; the message says why, in a few words, but does not name it."""


class Header(NamedTuple):
    """The metadata of an image file, known before it is decoded.

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
    """Return a hash of `content`: 128 bits of BLAKE2b, in hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        Unreadable: it is missing, empty, not a file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unreadable("is not a regular file")
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from None
    if not content:
        raise Unreadable("is empty: 0 bytes")
    return content


def read_header(path: Path) -> Header:
    """Return the metadata of an image file, without decoding it.

    Raises:
        Unreadable: it is missing, not an image, or too large.
    """
    try:
        now = path.stat()
        if not stat.S_ISREG(now.st_mode):
            raise Unreadable("is not a regular file")
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
        Unreadable: it is not an image, damaged, or too large.
    """
    with _opened(io.BytesIO(content)) as image:
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except MemoryError:
            raise
        except Exception:  # damaged EXIF is ignored; the pixels are intact
            pass
        return to_rgb(image)


def read_image(path: Path) -> Image.Image:
    """Return the image in a file, in RGB, upright.

    Raises:
        Unreadable: it is missing, not an image, damaged, or too large.
    """
    return decode(read_bytes(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, by the rule in the docstring of this module.

    Raises:
        Unreadable: its pixels have no known range.
    """
    if image.mode in _SIXTEEN_BITS:
        return Image.fromarray(_high_byte(np.asarray(image))).convert("RGB")
    if image.mode == "I" and image.format == "PPM":
        return Image.fromarray(_high_byte(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise Unreadable(f"has {kind} as pixels, of unknown range; save it with 8 or 16 bits")
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
            f"is a strip of {width} x {height} pixels: it would be {long_side:,} pixels long after "
            f"the preprocessing resizes its short side to {short_side}"
        )
    return (short_side, long_side) if width <= height else (long_side, short_side)


def resize(image: Image.Image, short_side: int, interpolation: str) -> npt.NDArray[np.uint8]:
    """Return an RGB image with its short side resized, uint8 (H, W, 3).

    The same call that torchvision's `Resize(short_side)` makes for a PIL image; a test compares
    the results to the last bit.

    Raises:
        Unreadable: the result would be too large.
    """
    size = resized_size(*image.size, short_side)
    if size != image.size:
        image = image.resize(size, Image.Resampling[interpolation.upper()])
    return np.asarray(image)


@contextlib.contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """Open an image; all errors of Pillow and its plugins for bad files become `Unreadable`."""
    # Other code may have set it: then Pillow would fill up a truncated image with grey.
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
            raise Unreadable(f"cannot be decoded: {first_line(error)}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Pillow's warnings of large images, which its limit covers, and of odd metadata.

    Only in the main thread: Python's filters belong to the whole process, and threads that restore
    them in another order would leave them changed. Code that starts threads uses this around them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: Image.Image) -> object:
    """Return the EXIF orientation of an image that is not decoded yet; 1 if EXIF is damaged."""
    try:
        if image.format == "TIFF":
            return image.getexif().get(ExifTags.Base.Orientation, 1)
        # Not `getexif()`, which decodes a whole PNG to look for EXIF after its pixels.
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        return exif.get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises nearly anything for damaged EXIF
        return 1


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame; only the first one is used
        return True


def _high_byte(pixels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    return (pixels.astype(np.uint16) >> 8).astype(np.uint8)


def _guess(content: bytes) -> str:
    """Return what a file that Pillow cannot identify seems to be, for common kinds."""
    if content[4:8] == b"ftyp":
        brand = content[8:12].decode("ascii", "replace")
        if brand in ("heic", "heix", "mif1", "msf1", "heim", "heis"):
            return " that Pillow reads without help, but HEIC: pip install pillow-heif"
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
