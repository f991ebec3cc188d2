"""Faults are planted in real folders, and each must be found, with its paths, and nothing else."""

import io
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from tuneapp import duplicates
from tuneapp.cli import main
from tuneapp.config import Data
from tuneapp.data.findings import Finding
from tuneapp.data.source import read_images
from tuneapp.doctor import examine
from tuneapp.duplicates import as_prints, fingerprint, near_duplicates
from tuneapp.errors import DataError
from tuneapp.examination import Examination
from tuneapp.looks import see
from tuneapp.thumbnails import Thumbnails


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A blurred random picture with some grain: as different from the next as photos are."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    smooth = np.asarray(blobs.resize(size, Image.Resampling.BICUBIC)).astype(int)
    grain = rng.integers(-8, 8, smooth.shape)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def make_clean(root: Path, per_class: int = 32, classes: Sequence[str] = ("cat", "dog")) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(1000 * c + i).save(root / name / f"{i:02d}.jpg", quality=92)
    return root


def make_split(root: Path) -> Path:
    for s, (side, count) in enumerate((("train", 20), ("val", 4), ("test", 4))):
        for c, name in enumerate(("cat", "dog")):
            (root / side / name).mkdir(parents=True)
            for i in range(count):
                file = root / side / name / f"{side}{i:02d}.jpg"
                picture(10_000 * s + 1000 * c + i).save(file, quality=92)
    return root


def look(root: Path, **options: Any) -> Examination:
    return examine(Data(source=str(root), **options), seed=0)


def found(examination: Examination, kind: str) -> Finding:
    named = [finding for finding in examination.findings if finding.kind == kind]
    assert len(named) == 1, [finding.kind for finding in examination.findings]
    return named[0]


def kinds(examination: Examination) -> list[str]:
    return [finding.kind for finding in examination.findings]


def doctor(cwd: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.chdir(cwd)
    return main(["doctor", *map(str, words)])


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests look."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# --- A clean folder -------------------------------------------------------------------------------


def test_a_clean_folder_gives_no_finding(tmp_path: Path) -> None:
    assert look(make_clean(tmp_path / "data")).findings == ()


def test_a_clean_folder_of_textures_gives_no_duplicates(make_photos: Any, tmp_path: Path) -> None:
    seen = look(make_photos(tmp_path / "photos", per_class=40))
    assert seen.findings == ()


def test_the_embedded_digits_have_no_duplicates() -> None:
    assert examine(Data(), seed=0).findings == ()


def test_gradients_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 64)
    for c in ("cat", "dog"):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(36):
            low, high = rng.integers(0, 256, (2, 3))
            turned = np.cos(i) * (ramp[:, None] - 0.5) + np.sin(i) * (ramp[None] - 0.5)
            pixels = low + (high - low) * (turned[..., None] / 1.5 + 0.5)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / c / f"{i}.png")
    assert look(tmp_path / "data").findings == ()


def test_skies_of_similar_colours_are_no_duplicates() -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 48)[:, None, None] * np.ones((1, 64, 1))
    skies = []
    for _ in range(40):
        top, bottom = np.array([[90, 130, 200], [170, 190, 230]]) + rng.integers(-25, 25, (2, 3))
        skies.append(Image.fromarray((top + (bottom - top) * ramp).astype(np.uint8)))
    prints = as_prints([fingerprint(sky) for sky in skies], [sky.size for sky in skies])
    assert near_duplicates(prints) == []


def test_the_same_logo_on_all_images_makes_them_no_duplicates(tmp_path: Path) -> None:
    for c in ("cat", "dog"):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(32):
            rng = np.random.default_rng(ord(c[0]) * 100 + i)
            paper = Image.fromarray(rng.integers(100, 140, (64, 64, 3)).astype(np.uint8))
            ImageDraw.Draw(paper).rectangle([44, 50, 62, 60], fill=(255, 255, 255))
            paper.save(tmp_path / "data" / c / f"{i}.png")
    assert look(tmp_path / "data").findings == ()


# --- Duplicates -----------------------------------------------------------------------------------


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return Image.open(content).convert("RGB")


def marked(image: Image.Image) -> Image.Image:
    image = image.copy()
    width, height = image.size
    ImageDraw.Draw(image).rectangle(
        [width * 0.8, height * 0.88, width - 2, height - 2], fill=(255, 255, 255)
    )
    return image


COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], str]] = {
    "saved anew": (lambda image: as_jpeg(image, 60), "png"),
    "halved": (lambda image: image.resize((32, 24), Image.Resampling.LANCZOS), "jpg"),
    "brightened": (lambda image: ImageEnhance.Brightness(image).enhance(1.1), "jpg"),
    "another format": (lambda image: image, "bmp"),
    "marked": (marked, "jpg"),
}


@pytest.mark.parametrize("how", COPIES)
def test_near_duplicates_are_found_all_of_them(how: str, tmp_path: Path) -> None:
    change, ending = COPIES[how]
    data = make_clean(tmp_path / "data")
    expected = set()
    for i in range(0, 24, 2):
        original = data / "cat" / f"{i:02d}.jpg"
        copy = original.with_name(f"copy{i:02d}.{ending}")
        change(Image.open(original).convert("RGB")).save(copy)
        expected |= {f"cat/{original.name}", f"cat/{copy.name}"}
    seen = look(data)
    told = [f for f in seen.findings if f.kind.startswith("duplicates")]
    assert {path for finding in told for path in finding.paths} == expected
    assert len(told) == len(seen.findings)
    assert sum(len(finding.exclude) for finding in told) == 12


def test_it_does_not_matter_in_which_blocks_images_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = [picture(seed) for seed in range(60)]
    pictures += [as_jpeg(pictures[i], 60) for i in (0, 7, 31, 59)]
    pictures += [marked(pictures[i]) for i in (7, 30, 58)]
    prints = as_prints([fingerprint(p) for p in pictures], [p.size for p in pictures])
    expected = [[0, 60], [7, 61, 64], [30, 65], [31, 62], [58, 66], [59, 63]]
    told: list[int] = []
    assert near_duplicates(prints, told.append) == expected
    assert told == sorted(told) and told[-1] == len(pictures)
    for rows, columns, pairs in ((3, 7, 2), (1, 1, 1), (64, 5, 3)):
        monkeypatch.setattr(duplicates, "_ROWS", rows)
        monkeypatch.setattr(duplicates, "_COLUMNS", columns)
        monkeypatch.setattr(duplicates, "_PAIRS", pairs)
        assert near_duplicates(prints) == expected


def test_where_all_hashes_are_alike_fewer_pairs_are_proposed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = [picture(seed) for seed in range(40)]
    pictures += [as_jpeg(pictures[3], 60)]
    prints = as_prints([fingerprint(p) for p in pictures], [p.size for p in pictures])
    proposed: list[int] = []
    same = Thumbnails.same

    def counted(self: Any, left: Any, right: Any) -> Any:
        proposed.append(len(left))
        return same(self, left, right)

    monkeypatch.setattr(Thumbnails, "same", counted)
    monkeypatch.setattr(duplicates, "MAX_BITS", 64)
    assert near_duplicates(prints) == [[3, 40]]
    assert sum(proposed) == 2 * (41 * 40 // 2)
    proposed.clear()
    monkeypatch.setattr(duplicates, "_ENOUGH", 20)
    assert near_duplicates(prints) == [[3, 40]]
    assert 2 <= sum(proposed) <= 40


def test_smooth_pictures_are_told_apart_and_recognised() -> None:
    pictures = []
    for seed in range(40):
        corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3)).astype(np.uint8)
        pictures.append(Image.fromarray(corners).resize((64, 48), Image.Resampling.BICUBIC))
    pictures += [as_jpeg(p, 75) for p in pictures]
    groups = near_duplicates(
        as_prints([fingerprint(p) for p in pictures], [p.size for p in pictures])
    )
    # Not all: what little detail there is may be lost by compression.
    assert len(groups) >= 20
    assert all(group == [group[0], group[0] + 40] for group in groups)


def test_noise_is_recognised_too(make_photos: Any, tmp_path: Path) -> None:
    data = make_photos(tmp_path / "photos", per_class=24, split=True)
    original = Image.open(data / "test/red/02.jpg").convert("RGB")
    original.save(data / "train/red/copy.jpg", quality=60)
    finding = found(look(data), "duplicates across splits")
    assert finding.paths == ("test/red/02.jpg", "train/red/copy.jpg")
    assert finding.exclude == ("train/red/copy.jpg",)


def test_duplicates_across_splits_are_serious_and_the_test_image_stays(tmp_path: Path) -> None:
    data = make_split(tmp_path / "data")
    (data / "train/cat/same.jpg").write_bytes((data / "test/cat/test00.jpg").read_bytes())
    as_jpeg(Image.open(data / "val/dog/val01.jpg").convert("RGB"), 60).save(
        data / "train/dog/near.png"
    )
    exact, near = (f for f in look(data).findings if f.kind == "duplicates across splits")
    assert exact.is_serious and near.is_serious
    assert exact.exclude == ("train/cat/same.jpg",)
    assert set(exact.paths) == {"test/cat/test00.jpg", "train/cat/same.jpg"}
    assert near.exclude == ("train/dog/near.png",)
    assert set(near.paths) == {"val/dog/val01.jpg", "train/dog/near.png"}


def test_duplicates_within_a_split_are_not_serious(tmp_path: Path) -> None:
    data = make_split(tmp_path / "data")
    (data / "train/cat/same.jpg").write_bytes((data / "train/cat/train00.jpg").read_bytes())
    finding = found(look(data), "duplicates")
    assert not finding.is_serious and finding.exclude == ("train/cat/train00.jpg",)


def test_exact_duplicates_are_not_reported_as_near_ones_again(tmp_path: Path) -> None:
    data = make_split(tmp_path / "data")
    (data / "train/cat/same.jpg").write_bytes((data / "train/cat/train00.jpg").read_bytes())
    assert kinds(look(data)) == ["duplicates"]


def test_a_near_duplicate_of_an_exact_one_leaks_through_the_copy_that_stays(tmp_path: Path) -> None:
    data = make_split(tmp_path / "data")
    content = (data / "val/cat/val00.jpg").read_bytes()
    (data / "train/cat/same.jpg").write_bytes(content)
    Image.open(data / "val/cat/val00.jpg").save(data / "train/cat/near.png")
    exact, near = (f for f in look(data).findings if f.kind == "duplicates across splits")
    assert exact.exclude == ("train/cat/same.jpg",)
    assert near.exclude == ("train/cat/near.png",)


def test_one_image_under_two_labels_contradicts_itself(tmp_path: Path) -> None:
    data = make_split(tmp_path / "data")
    (data / "train/dog/same.jpg").write_bytes((data / "train/cat/train00.jpg").read_bytes())
    finding = found(look(data), "labels that contradict")
    assert finding.is_serious
    assert set(finding.exclude) == {"train/cat/train00.jpg", "train/dog/same.jpg"}


def test_duplicates_in_two_folds_are_serious(tmp_path: Path) -> None:
    data = make_clean(tmp_path / "data")
    for i in range(32):
        (data / "cat" / f"copy{i:02d}.jpg").write_bytes(
            (data / "cat" / f"{i:02d}.jpg").read_bytes()
        )
    finding = found(look(data, folds=3, test_share=0.0), "duplicates across splits")
    assert finding.is_serious and "folds" in finding.words


# --- Other faults ---------------------------------------------------------------------------------


def test_unreadable_files_are_named_with_their_causes(tmp_path: Path) -> None:
    data = make_clean(tmp_path / "data", per_class=40)
    (data / "cat/empty.jpg").write_bytes(b"")
    whole = (data / "cat/00.jpg").read_bytes()
    (data / "cat/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "dog/text.png").write_text("not an image")
    seen = look(data)
    finding = found(seen, "unreadable")
    expected = ("cat/cut.jpg", "cat/empty.jpg", "dog/text.png")
    assert tuple(sorted(finding.paths)) == expected == tuple(sorted(finding.exclude))
    causes = {e.path: e.bad for e in seen.images.examples if e.bad}
    assert causes["cat/empty.jpg"] == "is empty: 0 bytes"
    assert "truncated" in causes["cat/cut.jpg"]
    assert causes["dog/text.png"] == "is not an image"
    assert not seen.is_serious


def test_unreadable_files_are_serious_where_the_policy_is_to_refuse_them(tmp_path: Path) -> None:
    data = make_clean(tmp_path / "data", per_class=40)
    (data / "cat/empty.jpg").write_bytes(b"")
    finding = found(look(data, bad_images="error"), "cannot be trained on")
    assert finding.is_serious and "cat/empty.jpg" in finding.words


def test_a_class_without_readable_images_in_a_split_is_serious(tmp_path: Path) -> None:
    data = make_split(tmp_path / "data")
    for file in (data / "val/dog").iterdir():
        file.write_bytes(b"")
    seen = look(data)
    finding = found(seen, "missing classes")
    assert finding.is_serious and finding.words == "val has no image of dog"
    assert "cannot be trained on" not in kinds(seen)


def test_a_class_that_a_table_puts_into_no_split_is_serious(tmp_path: Path) -> None:
    data = make_clean(tmp_path / "data", per_class=30)
    rows = [f"data/cat/{i:02d}.jpg,cat,{'val' if i > 25 else 'train'}" for i in range(30)]
    rows += [f"data/dog/{i:02d}.jpg,dog,train" for i in range(30)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    assert kinds(look(table)) == ["missing classes"]
    assert data.is_dir()


def test_too_few_images_to_split_are_a_finding_and_no_end(tmp_path: Path) -> None:
    data = make_clean(tmp_path / "data")
    (data / "owl").mkdir()
    picture(9).save(data / "owl" / "only.jpg")
    seen = look(data)
    assert "fewer than 4 images" in found(seen, "cannot be trained on").words
    assert seen.is_serious and "owl (1)" in found(seen, "tiny classes").words


def test_tiny_classes_are_counted_in_the_training_split(tmp_path: Path) -> None:
    seen = look(make_clean(tmp_path / "data", per_class=12))
    assert kinds(seen) == ["tiny classes"] and not seen.is_serious


def test_groups_in_several_splits_are_serious(tmp_path: Path) -> None:
    data = make_split(tmp_path / "data")
    for side in ("train", "val"):
        picture(ord(side[0])).save(data / side / "cat" / f"p7_{side}.jpg")
    seen = look(data, group_regex=r"(p7_|[a-z]+\d+)")
    finding = found(seen, "group leakage")
    assert finding.is_serious and "'p7_' in train and val" in finding.words
    assert set(finding.paths) == {"train/cat/p7_train.jpg", "val/cat/p7_val.jpg"}
    assert finding.exclude == ("train/cat/p7_train.jpg",)
    assert kinds(seen) == ["group leakage"]


def test_odd_names_are_found(tmp_path: Path) -> None:
    data = make_clean(tmp_path / "data")
    for number, name in enumerate(("größe.jpg", "Photo.jpg", "photo.JPG")):
        picture(500 + number).save(data / "cat" / name, "JPEG")
    seen = look(data)
    assert found(seen, "non-ASCII names").paths == ("cat/größe.jpg",)
    assert set(found(seen, "colliding names").paths) == {"cat/Photo.jpg", "cat/photo.JPG"}
    assert not seen.is_serious


def test_wrong_endings_and_blank_images_are_found(tmp_path: Path) -> None:
    data = make_clean(tmp_path / "data")
    picture(900).save(data / "cat" / "png.jpg", "PNG")
    for i, colour in enumerate(("black", "white", "red")):
        Image.new("RGB", (40, 40), colour).save(data / "dog" / f"blank{i}.png")
    Image.new("RGB", (40, 40), "black").save(data / "dog" / "blank3.bmp")
    picture(901).save(data / "dog" / "fine.jpeg", "JPEG")
    seen = look(data)
    assert found(seen, "wrong endings").paths == ("cat/png.jpg",)
    blank = found(seen, "blank")
    expected = {"dog/blank0.png", "dog/blank1.png", "dog/blank2.png", "dog/blank3.bmp"}
    assert set(blank.paths) == expected == set(blank.exclude)
    assert set(kinds(seen)) == {"wrong endings", "blank"} and not seen.is_serious


# --- Numbers --------------------------------------------------------------------------------------


def test_mean_and_deviation_are_of_the_training_pixels_to_the_last_digit(tmp_path: Path) -> None:
    data = make_split(tmp_path / "data")
    Image.new("RGB", (100, 80), "white").save(data / "val/cat/white.png")
    pixels = np.concatenate(
        [
            np.asarray(Image.open(file)).reshape(-1, 3).astype(np.float64) / 255
            for file in sorted((data / "train").rglob("*.jpg"))
        ]
    )
    colours = look(data).colours
    assert colours is not None and colours.pixels == len(pixels)
    np.testing.assert_allclose(colours.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(colours.std, pixels.std(axis=0), rtol=1e-10)


def test_sums_are_exact() -> None:
    image = Image.fromarray(np.array([[[0, 1, 2], [255, 3, 4]]], dtype=np.uint8))
    assert see(image).sums == (2, 255, 4, 6, 255**2, 10, 20)


def test_sizes_formats_and_turned_images_are_counted(tmp_path: Path) -> None:
    data = make_clean(tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(300, (100, 80)).save(data / "cat/turned.jpg", exif=exif)
    picture(301, (400, 100)).save(data / "cat/long.png")
    frames = [picture(302), picture(303)]
    frames[0].save(data / "dog/moving.gif", save_all=True, append_images=frames[1:])
    picture(304).convert("CMYK").save(data / "dog/cmyk.jpg")
    seen = look(data)
    assert seen.formats == {"JPEG RGB": 65, "PNG RGB": 1, "GIF P": 1, "JPEG CMYK": 1}
    assert (seen.num_turned, seen.num_animated) == (1, 1)
    assert (seen.num_small, seen.num_long) == (66, 1)
    width, height, aspect = seen.spreads
    assert (width.least, width.median, width.most) == (64, 64, 400)
    assert (height.least, height.median, height.most) == (48, 48, 100)
    assert aspect.most == 4 and aspect.median == pytest.approx(64 / 48)


def test_a_dataset_is_examined_as_well(tmp_path: Path) -> None:
    seen = examine(Data(), seed=0)
    assert len(seen.images.examples) == 1797 and seen.formats == {"no file RGB": 1797}


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A folder with a fault of every kind that an exclusion list can mend."""
    data = make_split(tmp_path / "data")
    (data / "train/cat/same.jpg").write_bytes((data / "test/cat/test00.jpg").read_bytes())
    (data / "train/dog/other.jpg").write_bytes((data / "train/cat/train01.jpg").read_bytes())
    as_jpeg(Image.open(data / "val/dog/val01.jpg").convert("RGB"), 60).save(
        data / "train/dog/near.png"
    )
    for i in range(3):
        (data / f"train/dog/bad{i}.jpg").write_bytes(b"\x00" * i)
    Image.new("RGB", (40, 40), "red").save(data / "train/cat/blank.png")
    return data


def test_the_exclusion_list_makes_the_data_healthy(
    faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert doctor(tmp_path, monkeypatch, faulty) == 1
    said = capsys.readouterr().out
    assert "--exclude exclude.txt" in said and f"--data {faulty}" in said
    assert "SERIOUS   duplicates across splits" in said
    excluded = Data(source=str(faulty), exclude=str(tmp_path / "exclude.txt"))
    left = {e.path for e in read_images(excluded, seed=0).examples}
    every = {e.path for e in read_images(Data(source=str(faulty)), seed=0).examples}
    assert every - left == {
        "train/cat/same.jpg", "train/dog/other.jpg", "train/cat/train01.jpg", "train/dog/near.png",
        "train/dog/bad0.jpg", "train/dog/bad1.jpg", "train/dog/bad2.jpg", "train/cat/blank.png",
    }  # fmt: skip
    again = examine(excluded, seed=0)
    assert [f.kind for f in again.findings] == ["tiny classes"] and again.num_excluded == 0
    lines = (tmp_path / "exclude.txt").read_text().splitlines()
    assert lines[lines.index("train/cat/blank.png") - 1].startswith("# blank: ")


def test_a_list_that_was_given_goes_into_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_clean(tmp_path / "data")
    (data / "cat/bad.jpg").write_bytes(b"")
    mine = tmp_path / "mine.txt"
    mine.write_text("# too dark\ncat/03.jpg\n")
    assert doctor(tmp_path, monkeypatch, data, "--exclude", mine) == 0
    lines = (tmp_path / "exclude.txt").read_text().splitlines()
    assert {line for line in lines if line[:2] != "# "} == {"cat/03.jpg", "cat/bad.jpg"}


def test_the_page_shows_the_findings_and_needs_nothing_else(
    faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor(tmp_path, monkeypatch, faulty) == 1
    html = (tmp_path / "doctor.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.all("html") == [{"lang": "en"}]
    thumbnails = page.all("img")
    assert len(thumbnails) >= 6
    for image in thumbnails:
        assert str(image["src"]).startswith("data:image/jpeg;base64,")
    assert any("train/dog/near.png (dog, train)" in str(image["alt"]) for image in thumbnails)
    assert "train/dog/bad0.jpg is empty: 0 bytes" in page.text
    assert "serious finding" in page.text and "ImageNet mean" in page.text
    assert not page.all("script") and not page.all("link")
    assert "http://" not in html and "https://" not in html


def test_names_are_escaped_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_clean(tmp_path / "data", classes=("cat", '<img src=x onerror="alert(1)">'))
    picture(77).save(data / "cat" / "<script>alert(2)<.png", "JPEG")
    (data / "cat" / "\x1b[31mred\u2028.png").write_bytes(b"")
    assert doctor(tmp_path, monkeypatch, data) == 0
    html = (tmp_path / "doctor.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.all("script")
    assert all(str(image["src"]).startswith("data:") for image in page.all("img"))
    assert "cat/<script>alert(2)<.png" in page.text
    assert "\x1b" not in html and "\\x1b[31mred" in html
    assert "# not to be named in a line" in (tmp_path / "exclude.txt").read_text()


def test_nothing_in_the_data_is_changed(
    faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> dict[Path, tuple[int, bytes]]:
        return {
            p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
            for p in faulty.rglob("*")
        }

    before = state()
    doctor(tmp_path, monkeypatch, faulty)
    assert state() == before


def test_a_healthy_folder_is_code_0_and_has_no_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    data = make_clean(tmp_path / "data")
    assert doctor(tmp_path, monkeypatch, data) == 0
    assert not (tmp_path / "exclude.txt").exists()
    said = capsys.readouterr().out
    assert "finding   none" in said and "--exclude" not in said
    assert not Page((tmp_path / "doctor.html").read_text()).all("img")


def test_what_cannot_be_examined_is_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert doctor(tmp_path, monkeypatch, "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(DataError):
        look(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--output", "data/page.html"), "lies in the data"),
        (("--exclusions", "data/cat/x.txt"), "lies in the data"),
        (("--output", "none/page.html"), "a folder that exists"),
        (("--exclusions", "mine.txt"), "not written by `doctor`"),
    ],
)
def test_results_are_not_written_where_they_harm(
    words: tuple[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_clean(tmp_path / "data")
    (tmp_path / "mine.txt").write_text("cat/01.jpg\n")
    assert doctor(tmp_path, monkeypatch, "data", *words) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "cat/01.jpg\n"


def test_own_results_are_written_anew(
    faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor(tmp_path, monkeypatch, faulty) == 1
    first = (tmp_path / "exclude.txt").read_text(), (tmp_path / "doctor.html").read_text()
    assert doctor(tmp_path, monkeypatch, faulty) == 1
    assert first == ((tmp_path / "exclude.txt").read_text(), (tmp_path / "doctor.html").read_text())


def test_ctrl_c_leaves_no_page(
    tuneapp: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    own = tmp_path / "slow.py"
    own.write_text(
        "import time\nimport numpy as np\nfrom pathlib import Path\n"
        "class Slow:\n"
        "    targets = [0, 1] * 50\n"
        "    def __len__(self): return 100\n"
        "    def __getitem__(self, i):\n"
        "        Path('begun').touch(); time.sleep(0.5)\n"
        "        return np.zeros((8, 8, 3), dtype=np.uint8), i % 2\n"
        "def make(): return Slow()\n"
    )
    process = tuneapp("doctor", "slow:make", cwd=tmp_path)
    deadline = time.monotonic() + 50
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob("*.txt"))
