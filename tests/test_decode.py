import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile, PngImagePlugin
from torchvision.transforms import InterpolationMode, v2

from tuneapp.data.decode import (
    Unreadable,
    decode,
    digest,
    read_header,
    read_image,
    resize,
    resized_size,
)
from tuneapp.data.examples import Example, ImageSet
from tuneapp.data.pixels import Preprocessing
from tuneapp.data.store import open_store

Pixels = npt.NDArray[np.generic]


def noise(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def header_of(content: bytes, tmp_path: Path) -> tuple[int, int]:
    (tmp_path / "any").write_bytes(content)
    header = read_header(tmp_path / "any")
    return header.width, header.height


def chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], *more: bytes) -> bytes:
    """A PNG by its specification: header, `more` chunks, unfiltered rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + data + chunk(b"IEND", b"")


# --- What is unreadable, and why ------------------------------------------------------------------


def photo(kind: str) -> bytes:
    return encoded(Image.fromarray(noise(48, 64)), kind)


def unfit_tiff(mode: str) -> bytes:
    return encoded(Image.new(mode, (4, 3), 7), "TIFF")


UNREADABLE = {
    "empty": (b"", "is empty: 0 bytes"),
    "text": (b"I am not an image", "is not an image"),
    "half a JPEG": (photo("JPEG")[:2000], "cannot be decoded: .*truncated"),
    "half a PNG": (photo("PNG")[:5000], "cannot be decoded: "),
    "half a GIF": (photo("GIF")[:1500], "cannot be decoded: "),
    "half a WebP": (photo("WEBP")[:800], "(is not an image|cannot be decoded: )"),
    "only the head of a PNG": (photo("PNG")[:60], "cannot be decoded: "),
    "only the signature of a PNG": (photo("PNG")[:8], "is not an image"),
    "a PDF": (b"%PDF-1.7\n...", "is not an image, but a PDF"),
    "a ZIP": (b"PK\x03\x04....", "is not an image, but a ZIP archive"),
    "a drawing": (b"<svg xmlns=''></svg>", "is not an image, but an SVG drawing"),
    "a web page": (b"<!DOCTYPE html>", "is not an image, but a web page"),
    "a video": (b"\0\0\0\x18ftypisom\0\0\2\0", "is not an image, but a video"),
    "32-bit integers": (unfit_tiff("I"), "has 32-bit integers as pixels"),
    "floating point": (unfit_tiff("F"), "has floating-point numbers as pixels"),
}


@pytest.mark.parametrize(("content", "cause"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_says_why_whatever_it_is_called(
    content: bytes, cause: str, tmp_path: Path
) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(content)
    with pytest.raises(Unreadable, match=f"^{cause}") as caught:
        read_image(file)
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # to read it would be to wait for ever
    with pytest.raises(Unreadable, match="is not a regular file"):
        read_image(tmp_path / "pipe.jpg")
    for name, cause in (
        ("folder.jpg", "is not a regular file"),
        ("gone.jpg", "cannot be read: No such"),
    ):
        for read in (read_image, read_header):
            with pytest.raises(Unreadable, match=f"^{cause}"):
                read(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    file = tmp_path / "locked.png"
    file.write_bytes(photo("PNG"))
    file.chmod(0)
    for read in (read_image, read_header):
        with pytest.raises(Unreadable, match=r"^cannot be read: Permission denied"):
            read(file)


def test_an_image_larger_than_pillows_limit_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: object) -> None:
        raise AssertionError("its pixels were asked for")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    file = tmp_path / "bomb.png"
    file.write_bytes(png(20_000, 9_000, 8, 2, []))
    for read in (read_image, read_header):
        with pytest.raises(Unreadable, match=r"^is too large: .*180000000 pixels"):
            read(file)


def test_a_large_image_below_the_limit_is_no_warning(tmp_path: Path) -> None:
    # Pillow warns from 89 million pixels, and warnings are errors in these tests.
    assert header_of(png(12_000, 8_000, 8, 2, []), tmp_path) == (12_000, 8_000)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1)])
def test_a_strip_that_resizing_would_blow_up_is_refused(size: tuple[int, int]) -> None:
    # At a short side of 256 it would be 2,560,000 pixels long: 655 million.
    strip = Image.new("RGB", size)
    for call in (lambda: resized_size(*size, 256), lambda: resize(strip, 256, "bilinear")):
        with pytest.raises(Unreadable, match=rf"^is a strip of {size[0]} x {size[1]} pixels"):
            call()
    assert resize(strip, 2, "bilinear").size == 2 * 20_000 * 3


# --- Pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["photo.jpg", "photo.tif", "photo"])
def test_what_a_file_holds_decides_and_not_its_ending(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(photo("PNG"))
    assert np.array_equal(np.asarray(read_image(tmp_path / name)), noise(48, 64))
    assert read_header(tmp_path / name).format == "PNG"


SHADES = np.array([[0, 255, 256], [40_000, 65_280, 65_535]], dtype=np.uint16)
HIGH_BYTES = [[0, 0, 1], [156, 255, 255]]


def pgm(pixels: Pixels, maximum: int) -> bytes:
    height, width = pixels.shape
    return f"P5 {width} {height} {maximum}\n".encode() + pixels.astype(">u2").tobytes()


SIXTEEN_BITS = {
    "PNG": png(3, 2, 16, 0, [row.astype(">u2").tobytes() for row in SHADES]),
    "TIFF": encoded(Image.fromarray(SHADES), "TIFF"),
    "TIFF, big end first": encoded(Image.fromarray(SHADES.astype(">u2")), "TIFF"),
    "PGM": pgm(SHADES, 65_535),
}


@pytest.mark.parametrize("content", SIXTEEN_BITS.values(), ids=SIXTEEN_BITS)
def test_of_sixteen_bits_of_grey_the_high_byte_is_kept(content: bytes) -> None:
    image = decode(content)
    assert image.mode == "RGB"
    assert np.asarray(image).tolist() == [[[v] * 3 for v in row] for row in HIGH_BYTES]


def test_a_pgm_of_ten_bits_uses_the_whole_range() -> None:
    # 512 of 1023 is 32,799.5 of 65,535, whose high byte is 128.
    got = np.asarray(decode(pgm(np.array([[0, 512, 1023]]), 1023)))
    assert got[..., 0].tolist() == [[0, 128, 255]]


def test_of_sixteen_bits_of_colour_the_high_byte_is_kept() -> None:
    colours = np.array([[[0x1234, 0xFFFF, 0x00FF], [0x8000, 0x7FFF, 0x0100]]])
    got = decode(png(2, 1, 16, 2, [colours.astype(">u2").tobytes()]))
    assert np.asarray(got).tolist() == [[[0x12, 0xFF, 0x00], [0x80, 0x7F, 0x01]]]


def test_a_cmyk_jpeg_becomes_rgb_by_pillows_conversion() -> None:
    inks = Image.merge("CMYK", [Image.fromarray(noise(32, 32, s)[..., 0]) for s in range(4)])
    content = encoded(inks, "JPEG", quality=95)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "CMYK"
        wanted = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(decode(content)), wanted)
    plain = np.asarray(decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert plain[4, 4, 0] > 250
    assert plain[4, 4, 1:].max() < 5


def test_a_palette_is_looked_up() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    assert np.asarray(decode(encoded(image, "PNG"))).tolist() == [
        [[70, 80, 90], [10, 20, 30], [40, 50, 60]]
    ]


# On white by hand: 255 * (1 - a) + value * a, for a = 51 / 255 = 0.2.
ON_WHITE = [[244, 224, 204], [255, 255, 255], [200, 100, 0]]


def partly_transparent() -> Image.Image:
    rows = [[(200, 100, 0, 51), (200, 100, 0, 0), (200, 100, 0, 255)]]
    return Image.fromarray(np.array(rows, dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_lies_on_white(kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    got = np.asarray(decode(encoded(partly_transparent(), kind, **options)))
    assert got.tolist() == [ON_WHITE]


def test_grey_with_transparency_lies_on_white() -> None:
    # 255 * 127 / 255 + 100 * 128 / 255 = 177.2
    image = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 128)])
    assert np.asarray(decode(encoded(image, "PNG"))).tolist() == [[[177] * 3]]


def test_transparent_entries_of_a_palette_lie_on_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([200, 100, 0] * 3)
    image.putdata([0, 1, 2])
    content = encoded(image, "PNG", transparency=bytes([51, 0, 255]))
    assert np.asarray(decode(content)).tolist() == [ON_WHITE]


def test_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("RGB", (2, 1), (255, 0, 0))
    image.putpixel((1, 0), (254, 0, 0))
    content = encoded(image, "PNG", transparency=(255, 0, 0))
    assert np.asarray(decode(content)).tolist() == [[[255, 255, 255], [254, 0, 0]]]


def test_an_opaque_image_with_an_alpha_channel_is_its_colours() -> None:
    opaque = Image.fromarray(np.dstack([noise(9, 7), np.full((9, 7), 255, dtype=np.uint8)]))
    assert np.array_equal(np.asarray(decode(encoded(opaque, "PNG"))), noise(9, 7))
    assert np.array_equal(np.asarray(decode(encoded(opaque, "PNG"))), opaque.convert("RGB"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_seen(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(decode(content)).tolist() == np.full((5, 6, 3), (255, 0, 0)).tolist()
    (tmp_path / "moving").write_bytes(content)
    assert read_header(tmp_path / "moving").is_animated
    (tmp_path / "still").write_bytes(encoded(frames[0], kind))
    assert not read_header(tmp_path / "still").is_animated


# --- EXIF -----------------------------------------------------------------------------------------

# How stored rows and columns are to be seen (Exif 2.32, table 6), in numpy's words.
TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_an_image_is_seen_as_exif_says_and_its_header_knows_its_size(
    orientation: int, kind: str, tmp_path: Path
) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(noise(8, 16))
    plain = np.asarray(decode(encoded(image, kind, **options)))
    content = encoded(image, kind, exif=exif_of(orientation), **options)
    seen = np.asarray(decode(content))
    assert np.array_equal(seen, TURNS[orientation](plain))
    assert header_of(content, tmp_path) == seen.shape[1::-1]
    assert read_header(tmp_path / "any").is_turned == (orientation > 1)


def late_exif(orientation: int) -> bytes:
    """A PNG whose EXIF comes after its pixels, as its specification allows."""
    content = encoded(Image.fromarray(noise(8, 16)), "PNG")
    exif = chunk(b"eXIf", exif_of(orientation).tobytes().removeprefix(b"Exif\0\0"))
    return content[:-12] + exif + content[-12:]


def test_exif_behind_the_pixels_counts_too() -> None:
    assert np.array_equal(np.asarray(decode(late_exif(6))), np.rot90(noise(8, 16), -1))


def test_an_image_with_exif_behind_its_pixels_is_stored_as_it_is_seen(tmp_path: Path) -> None:
    (tmp_path / "late.png").write_bytes(late_exif(6))
    (tmp_path / "next.png").write_bytes(encoded(Image.fromarray(noise(9, 8, 1)), "PNG"))
    examples = tuple(Example(f"{name}.png", 0, "train", 0) for name in ("late", "next"))
    images = ImageSet(tmp_path, ("a", "b"), examples)
    store = open_store(images, Preprocessing(8, 8, "bilinear", (0.5,) * 3, (0.5,) * 3))
    assert store.causes == {}
    assert np.array_equal(store.image(0).permute(1, 2, 0), np.rot90(noise(8, 16), -1))
    assert np.array_equal(store.image(1).permute(1, 2, 0), noise(9, 8, 1))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"", b"Exif\0\0MM\0*\0\0\0\x08\0\x05"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_make_an_image_unreadable(
    kind: str, exif: bytes, tmp_path: Path
) -> None:
    content = encoded(Image.fromarray(noise(8, 16)), kind, exif=exif)
    assert decode(content).size == (16, 8)
    assert header_of(content, tmp_path) == (16, 8)


def test_a_damaged_second_frame_does_not_make_an_image_unreadable(tmp_path: Path) -> None:
    frame = Image.fromarray(noise(24, 32)).convert("P")
    more = [frame.rotate(90)]
    content = encoded(frame, "GIF", save_all=True, append_images=more, duration=100)
    first = np.asarray(decode(content))
    second_begins = content.index(b"!\xf9", content.index(b"!\xf9") + 8)
    cut = content[: second_begins + 20]
    assert np.array_equal(np.asarray(decode(cut)), first)
    assert header_of(cut, tmp_path) == (32, 24)


# --- Damage ---------------------------------------------------------------------------------------

CHECKED = ("palette PNG",)  # so small that nothing but its header and sums is hit
PALETTE = Image.fromarray(noise(24, 32)).convert("P")
KINDS = {
    "JPEG": encoded(Image.fromarray(noise(24, 32)), "JPEG", exif=exif_of(6)),
    "PNG": encoded(Image.fromarray(noise(24, 32)), "PNG"),
    "palette PNG": encoded(PALETTE, "PNG", transparency=3),
    "GIF": encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(90)]),
    "TIFF": encoded(Image.fromarray(noise(24, 32)), "TIFF", compression="tiff_lzw"),
    "plain TIFF": encoded(Image.fromarray(noise(24, 32)), "TIFF"),
    "WEBP": encoded(Image.fromarray(noise(24, 32)), "WEBP"),
    "BMP": encoded(Image.fromarray(noise(24, 32)), "BMP"),
}


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    out = bytearray(content)
    for _ in range(random.integers(1, 4)):
        # Half of the hits are near the front, where headers are.
        reach = len(out) if random.random() < 0.5 else min(60, len(out))
        place = int(random.integers(reach))
        match random.integers(4):
            case 0:
                out[place] ^= 1 << int(random.integers(8))
            case 1:
                out[place] = int(random.integers(256))
            case 2:
                del out[place : place + int(random.integers(1, 9))]
            case 3:
                out[place:place] = random.bytes(int(random.integers(1, 9)))
        out = out or bytearray(b"x")
    return bytes(out if random.random() < 0.6 else out[: random.integers(1, len(out) + 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_unreadable_or_images_in_rgb_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(list(KINDS).index(kind))
    outcomes = []
    for _ in range(100):
        content = damaged(KINDS[kind], random)
        try:
            image = decode(content)
        except Unreadable as cause:
            outcomes.append(False)
            assert str(cause)
            assert "\n" not in str(cause)
        else:
            outcomes.append(True)
            assert image.mode == "RGB"
            assert sorted(header_of(content, tmp_path)) == sorted(image.size)
        try:
            header_of(content, tmp_path)
        except Unreadable as cause:
            assert str(cause)
    assert False in outcomes
    assert (True in outcomes) == (kind not in CHECKED)


def test_a_decoder_that_raises_anything_at_all_says_that_the_image_is_bad(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error, told in (
        (IndexError("list index\nout of range"), "^cannot be decoded: list index$"),
        (struct.error(), "^cannot be decoded: error$"),
        (MemoryError(), "^is too large for this machine's memory$"),
        (RecursionError("too deep"), "^cannot be decoded: too deep$"),
    ):

        def load(self: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
        with pytest.raises(Unreadable, match=told):
            decode(KINDS["PNG"])


# --- Resizing, digests ----------------------------------------------------------------------------

SHAPES = [
    (300, 401),
    (401, 300),
    (57, 57),
    (32, 32),
    (33, 32),
    (7, 500),
    (511, 9),
    (1, 1),
    (31, 45),
]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("short_side", [32, 57, 33])
def test_resizing_is_torchvisions_to_the_last_bit(short_side: int, interpolation: str) -> None:
    theirs = v2.Resize(short_side, InterpolationMode(interpolation))
    for shape in SHAPES:
        image = Image.fromarray(noise(*shape))
        wanted = theirs(image)
        assert resized_size(*image.size, short_side) == wanted.size, shape
        assert np.array_equal(resize(image, short_side, interpolation), wanted), shape


def test_sizes_after_resizing_are_torchvisions_for_every_shape() -> None:
    theirs = v2.Resize(22)
    for width in range(1, 70, 3):
        for height in range(1, 70, 4):
            wanted = theirs(Image.new("L", (width, height))).size
            assert resized_size(width, height, 22) == wanted


def test_a_digest_is_128_bits_of_blake2b() -> None:
    # `printf abc | b2sum -l 128`
    assert digest(b"abc") == "cf4ab791c62b8d2b2109c90275287816"
