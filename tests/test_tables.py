"""Tables of paths and labels: CSV and Parquet files as people make them, right and wrong."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tuneapp.config import Data
from tuneapp.data.examples import ImageSet
from tuneapp.data.source import read_images
from tuneapp.data.tables import read_table
from tuneapp.errors import DataError

NAMES = ["a.png", "b.png", "c.png", "d.png"]
Columns = Mapping[str, Sequence[object]]


def add_images(folder: Path, names: Sequence[str] = NAMES) -> None:
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + i, 4), (i, 0, 0)).save(file, format="PNG")


def write_csv(file: Path, columns: Columns) -> Path:
    with file.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
    return file


def write(file: Path, columns: Columns) -> Path:
    """Write a table beside new images `a.png` to `d.png`."""
    add_images(file.parent)
    if file.suffix == ".csv":
        return write_csv(file, columns)
    pd.DataFrame(dict(columns)).to_parquet(file)
    return file


def read(file: Path, **fields: Any) -> ImageSet:
    return read_table(Data(source=str(file), **fields))


def said(images: ImageSet) -> dict[str, object]:
    """Return path -> class name, or the names of all classes that it shows."""
    return {
        e.path: tuple(images.classes[label] for label in e.label)
        if isinstance(e.label, tuple)
        else images.classes[e.label]
        for e in images.examples
    }


def refusal(file: Path, **fields: Any) -> str:
    """Return the message that refuses a table: a single line that names the file."""
    with pytest.raises(DataError) as caught:
        read(file, **fields)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


# --- Columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_path_and_label_are_found_by_their_names_among_other_columns(
    ending: str, tmp_path: Path
) -> None:
    columns = {"id": [5, 6, 7, 8], "label": ["ox", "ant", "ox", "bee"], "path": NAMES}
    images = read(write(tmp_path / f"t.{ending}", columns))
    assert images.root == tmp_path
    assert images.classes == ("ant", "bee", "ox")
    assert said(images) == dict(zip(NAMES, columns["label"], strict=True))
    assert not images.is_multilabel
    assert images.notes == ()
    assert {(e.split, e.group, e.weight) for e in images.examples} == {("train", "", 1.0)}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_are_found_by_the_names_that_are_asked_for(ending: str, tmp_path: Path) -> None:
    columns = {
        "file": NAMES, "what": ["x", "y", "x", "y"], "part": ["train", "val", "test", "train"],
        "w": [1, 2, 3, 4], "who": ["p1", "p2", "p3", "p1"],
        "path": ["no"] * 4, "label": ["no"] * 4, "split": ["no"] * 4, "weight": ["no"] * 4,
        "group": ["no"] * 4,
    }  # fmt: skip
    images = read(
        write(tmp_path / f"t.{ending}", columns),
        path_column="file",
        label_column="what",
        split_column="part",
        weight_column="w",
        group_column="who",
    )
    assert said(images) == dict(zip(NAMES, columns["what"], strict=True))
    assert [e.split for e in images.examples] == columns["part"]
    assert [e.weight for e in images.examples] == [1, 2, 3, 4]
    assert [e.group for e in images.examples] == columns["who"]
    notes = " ".join(images.notes)
    for said_of in ("path=file", "label=what", "'part' gives the split", "'who' gives the group"):
        assert said_of in notes


def test_split_weight_and_group_are_used_where_there_are_such_columns_and_that_is_told(
    tmp_path: Path,
) -> None:
    columns = {
        "path": NAMES, "label": [*"xyxy"], "split": ["train", "val", "train", "train"],
        "weight": [0, "0.5", "1e2", "3"], "group": ["p", "q", "r", "r"],
    }  # fmt: skip
    images = read(write(tmp_path / "t.csv", columns))
    assert [e.split for e in images.examples] == columns["split"]
    assert [e.weight for e in images.examples] == [0.0, 0.5, 100.0, 3.0]
    assert [e.group for e in images.examples] == columns["group"]
    assert images.notes == (
        "the table's column 'split' gives the split",
        "the table's column 'weight' gives the weight",
        "the table's column 'group' gives the group",
    )


def test_a_group_expression_takes_the_place_of_the_column(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", {"path": NAMES, "label": [*"xyxy"], "group": ["", "", "", ""]})
    images = read(file, group_regex=r"^[ab]|[cd]")
    assert {e.group for e in images.examples} == {""}
    assert images.notes == ()


def test_an_ending_in_capitals_is_a_table_too(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "t.csv", TWO).rename(tmp_path / "T.CSV")).examples) == 4
    parquet = write(tmp_path / "t.parquet", TWO).rename(tmp_path / "T.Parquet")
    assert len(read(parquet).examples) == 4


# --- Paths ----------------------------------------------------------------------------------------

TWO: Columns = {"path": NAMES, "label": [*"xyxy"]}


def test_paths_count_from_the_folder_of_the_table_and_may_be_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    elsewhere = tmp_path / "elsewhere"
    add_images(elsewhere, ["far.png"])
    add_images(tmp_path / "here", ["near.png", "in/side/deep.png"])
    paths = ["near.png", "in/side/deep.png", "../elsewhere/far.png"]
    file = write_csv(tmp_path / "here" / "t.csv", {"path": paths, "label": [*"xyx"]})
    assert [e.path for e in read(file).examples] == paths

    paths[2] = str(elsewhere / "far.png")
    write_csv(file, {"path": paths, "label": [*"xyx"]})
    examples = read(file).examples
    assert [e.path for e in examples] == paths
    for e in examples:
        stat = (file.parent / e.path).stat()
        assert (e.num_bytes, e.modified_ns) == (stat.st_size, stat.st_mtime_ns)
        assert e.num_bytes > 0


def test_the_table_itself_may_be_named_from_the_working_folder_or_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "t.csv", TWO)
    monkeypatch.chdir(tmp_path)
    assert read(Path("t.csv")).root == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert read(Path("~/t.csv")).root == tmp_path


ODD = ["a,b.png", 'say "cheese".png', "two\nlines.png", "Äpfel 梨.png", "'q'.png", "tab\t.png", "é"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_names_may_hold_commas_quotes_line_ends_and_any_letters(
    ending: str, tmp_path: Path
) -> None:
    add_images(tmp_path, ODD)
    labels = ["grün, hell", 'die "9"', "x\ny", "梨", "NaN", "#1", "grün, hell"]
    file = write(tmp_path / f"t.{ending}", {"path": ODD, "label": labels})
    assert said(read(file)) == dict(zip(ODD, labels, strict=True))


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    add_images(tmp_path)
    file = tmp_path / "excel.csv"
    file.write_bytes("\ufeffpath,label\r\na.png,x\r\n\r\nb.png,y\r\n".encode())
    assert said(read(file)) == {"a.png": "x", "b.png": "y"}


def test_no_word_of_a_csv_is_taken_for_a_number_or_for_nothing(tmp_path: Path) -> None:
    names = ["007", "1e3", "NA", "None", "true"]
    add_images(tmp_path, names)
    columns = {
        "path": names, "label": ["NA", "null", "nan", "None", "NA"],
        "group": ["007", "7", "1.0", "NA", "01"],
    }  # fmt: skip
    images = read(write_csv(tmp_path / "t.csv", columns))
    assert said(images) == dict(zip(names, columns["label"], strict=True))
    assert [e.group for e in images.examples] == columns["group"]


def test_columns_of_numbers_only_stay_as_they_are_written(tmp_path: Path) -> None:
    names = ["001", "01", "1.50", "1e3"]
    add_images(tmp_path, names)
    columns = {"path": names, "label": ["07", "7", "7", "8"], "group": ["1", "01", "1.0", "2"]}
    images = read(write_csv(tmp_path / "t.csv", columns))
    assert said(images) == dict(zip(names, columns["label"], strict=True))
    assert images.classes == ("07", "7", "8")
    assert [e.group for e in images.examples] == columns["group"]


# --- Classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_numbers_as_labels_are_sorted_as_numbers(ending: str, tmp_path: Path) -> None:
    images = read(write(tmp_path / f"t.{ending}", {"path": NAMES, "label": [10, 9, 100, 9]}))
    assert images.classes == ("9", "10", "100")
    assert [e.label for e in images.examples] == [1, 0, 2, 0]


def test_one_word_among_numbers_sorts_all_labels_as_text(tmp_path: Path) -> None:
    images = read(write(tmp_path / "t.csv", {"path": NAMES, "label": ["10", "9", "100", "x"]}))
    assert images.classes == ("10", "100", "9", "x")


def test_spaces_around_a_label_do_not_count(tmp_path: Path) -> None:
    images = read(write(tmp_path / "t.csv", {"path": NAMES, "label": ["x", " x", "y ", " y "]}))
    assert images.classes == ("x", "y")


def test_given_classes_fix_their_order_and_may_have_no_example(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", TWO)
    images = read(file, classes=["z", "y", "x"])
    assert images.classes == ("z", "y", "x")
    assert [e.label for e in images.examples] == [2, 1, 2, 1]
    file = write(tmp_path / "m.csv", {"path": NAMES, "label": ["x", "y;x", "", "z"]})
    images = read(file, classes=["z", "y", "x"], label_separator=";")
    assert [e.label for e in images.examples] == [(2,), (1, 2), (), (0,)]


def test_a_label_outside_the_given_classes_is_named_with_its_near_miss(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", {"path": NAMES, "label": ["cat", "dog", "dgo", "cat"]})
    message = refusal(file, classes=["cat", "dog"])
    assert "'dgo', which are not among the classes cat, dog; did you mean 'dog'?" in message


def test_all_labels_outside_the_given_classes_are_counted(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(6)]
    add_images(tmp_path, names)
    file = write_csv(tmp_path / "t.csv", {"path": names, "label": [*"abcdex"]})
    message = refusal(file, classes=["x", "y"])
    assert "'a', 'b', 'c' and 2 more" in message


# --- Several labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("separator", [";", "|", ", ", " and "])
def test_a_separator_makes_a_set_of_labels(separator: str, ending: str, tmp_path: Path) -> None:
    labels = [
        separator.join(["sky", "sea"]),
        "",
        separator.join([" sea", "sea ", "", "bird"]),
        "sky",
    ]
    images = read(
        write(tmp_path / f"t.{ending}", {"path": NAMES, "label": labels}), label_separator=separator
    )
    assert images.is_multilabel
    assert images.classes == ("bird", "sea", "sky")
    assert [e.label for e in images.examples] == [(1, 2), (), (0, 1), (2,)]


def test_a_missing_text_of_a_parquet_file_is_an_image_without_labels(tmp_path: Path) -> None:
    add_images(tmp_path)
    labels = pd.array(["x;y", None, "y", "x"], dtype="string")
    pd.DataFrame({"path": NAMES, "label": labels}).to_parquet(tmp_path / "t.parquet")
    images = read(tmp_path / "t.parquet", label_separator=";")
    assert [e.label for e in images.examples] == [(0, 1), (), (1,), (0,)]


@pytest.mark.parametrize(
    ("yes", "no"), [("1", "0"), ("1.0", "0.0"), ("true", "false"), ("True", "FALSE"), (" 1", "0 ")]
)
def test_columns_of_0_and_1_are_a_class_each_in_the_order_asked(
    yes: str, no: str, tmp_path: Path
) -> None:
    columns = {
        "path": NAMES,
        "sea": [yes, no, no, yes],
        "other": [*"abcd"],
        "sky": [yes, yes, no, no],
    }
    images = read(write(tmp_path / "t.csv", columns), label_column=["sky", "sea"])
    assert images.is_multilabel
    assert images.classes == ("sky", "sea")
    assert [e.label for e in images.examples] == [(0, 1), (0,), (), (1,)]
    again = read(tmp_path / "t.csv", label_column=["sky", "sea"], classes=["sky", "sea"])
    assert again.examples == images.examples


@pytest.mark.parametrize("kind", ["bool", "int8", "float32", "boolean", "Int64"])
def test_columns_of_0_and_1_of_a_parquet_file_may_be_of_any_kind(kind: str, tmp_path: Path) -> None:
    add_images(tmp_path)
    columns = {"sea": [1, 0, 0, 1], "sky": [1, 1, 0, 0]}
    table = pd.DataFrame(columns).astype(bool).astype(kind)
    table.assign(path=NAMES).to_parquet(tmp_path / "t.parquet")
    images = read(tmp_path / "t.parquet", label_column=["sea", "sky"])
    assert [e.label for e in images.examples] == [(0, 1), (1,), (), (0,)]


@pytest.mark.parametrize("value", ["2", "yes", "", "0.5", "-1"])
def test_other_values_in_columns_of_0_and_1_are_named_by_row(value: str, tmp_path: Path) -> None:
    columns = {"path": NAMES, "sea": [1, 0, value, 1], "sky": [1, 1, 0, 0]}
    message = refusal(write(tmp_path / "t.csv", columns), label_column=["sea", "sky"])
    assert "column 'sea' must hold only 0 and 1" in message
    assert f"{value!r} in row 3" in message


def test_a_missing_value_in_a_column_of_0_and_1_is_refused(tmp_path: Path) -> None:
    add_images(tmp_path)
    sea = pd.array([1, 0, None, 1], dtype="Int64")
    pd.DataFrame({"path": NAMES, "sea": sea, "sky": [1, 1, 0, 0]}).to_parquet(
        tmp_path / "t.parquet"
    )
    message = refusal(tmp_path / "t.parquet", label_column=["sea", "sky"])
    assert "row 3" in message


def test_label_columns_beside_other_classes_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", {"path": NAMES, "sea": [1, 0, 1, 0], "sky": [0, 1, 0, 1]})
    assert "remove classes=" in refusal(file, label_column=["sea", "sky"], classes=["sky", "sea"])


def test_lists_in_a_parquet_column_are_refused_with_the_way_out(tmp_path: Path) -> None:
    labels = [["x"], ["y"], ["x", "y"], []]
    file = write(tmp_path / "t.parquet", {"path": NAMES, "label": labels})
    for fields in ({}, {"label_separator": ";"}):
        message = refusal(file, **fields)
        assert "'label' holds lists, as in row 1" in message
        assert "--label-separator" in message


# --- Splits, weights and groups -------------------------------------------------------------------


def test_every_usual_word_for_a_split_is_understood(tmp_path: Path) -> None:
    words = {
        "train": ["train", "training", "TRAIN", " Training "],
        "val": ["val", "valid", "validation", "dev", "Valid"],
        "test": ["test", "testing", "TEST"],
    }
    listed = [(word, split) for split, given in words.items() for word in given]
    names = [f"{i}.png" for i in range(len(listed))]
    add_images(tmp_path, names)
    columns = {
        "path": names,
        "label": [i % 2 for i in range(len(names))],
        "split": [word for word, _ in listed],
    }
    images = read(write_csv(tmp_path / "t.csv", columns))
    assert [e.split for e in images.examples] == [split for _, split in listed]


def test_a_split_of_the_table_stays_as_it_is(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(12)]
    add_images(tmp_path, names)
    splits = ["train", "val", "test"] * 4
    columns = {"path": names, "label": [*"xxxxxxyyyyyy"], "split": splits}
    images = read_images(Data(source=str(write_csv(tmp_path / "t.csv", columns))), seed=5)
    assert {e.path: e.split for e in images.examples} == dict(zip(names, splits, strict=True))


def test_other_words_for_a_split_are_named_by_row(tmp_path: Path) -> None:
    columns = {"path": NAMES, "label": [*"xyxy"], "split": ["train", "trian", "val", "0"]}
    message = refusal(write(tmp_path / "t.csv", columns))
    assert "column 'split' must hold only train, val, test" in message
    assert "'trian' in row 2, '0' in row 4" in message


def test_a_split_column_without_training_images_is_refused(tmp_path: Path) -> None:
    columns = {"path": NAMES, "label": [*"xyxy"], "part": ["val", "val", "test", "test"]}
    message = refusal(write(tmp_path / "t.csv", columns), split_column="part")
    assert "column 'part' puts no image into train" in message


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "-inf", "heavy", "1,5"])
def test_weights_that_are_none_are_named_by_row(weight: str, tmp_path: Path) -> None:
    columns = {"path": NAMES, "label": [*"xyxy"], "w": [1, 2, weight, 4]}
    message = refusal(write(tmp_path / "t.csv", columns), weight_column="w")
    assert "column 'w' must hold numbers >= 0" in message
    assert f"{weight!r} in row 3" in message
    assert "row 2" not in message


@pytest.mark.parametrize("kind", ["int64", "float32"])
def test_weights_of_a_parquet_file_are_numbers(kind: str, tmp_path: Path) -> None:
    weights = np.array([0, 1, 2, 3], dtype=kind)
    columns = {"path": NAMES, "label": [*"xyxy"], "weight": weights}
    images = read(write(tmp_path / "t.parquet", columns))
    assert [e.weight for e in images.examples] == [0, 1, 2, 3]


# --- Bad tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_that_is_not_there_is_named(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"none.{ending}"
    assert refusal(file) == f"--data {file}: no such file"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", b""),
        ("more_fields.csv", b"path,label\na.png,x\nb.png,y,z\n"),
        ("latin1.csv", "path,label\na.png,café\n".encode("latin-1")),
        ("quote.csv", b'path,label\n"a.png,x\n'),
        ("empty.parquet", b""),
        ("text.parquet", b"path,label\na.png,x\n"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    told = "is not UTF-8 text" if name == "latin1.csv" else "cannot be read as a table: "
    assert told in refusal(tmp_path / name)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_messages_name_the_table_as_it_was_written(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    write(tmp_path / "tables" / f"t.{ending}", {"path": NAMES, "label": ["x"] * 4})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in (f"tables/t.{ending}", f"~/tables/t.{ending}"):
        with pytest.raises(DataError, match=rf"^{written} has only the label 'x'; "):
            read_table(Data(source=written))
        assert read_table(Data(source=written, classes=("x", "y"))).root == tmp_path / "tables"


def test_a_folder_with_the_name_of_a_table_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    assert "cannot be read as a table: " in refusal(tmp_path / "t.csv")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_without_rows_is_refused(ending: str, tmp_path: Path) -> None:
    assert "has no row" in refusal(write(tmp_path / f"t.{ending}", {"path": [], "label": []}))


def test_a_missing_column_is_named_with_its_near_miss_and_the_way_out(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", {"paths": NAMES, "klass": [*"xyxy"]})
    message = refusal(file)
    assert "no column 'path' (path); did you mean 'paths'?" in message
    assert "'label' (label)" in message
    assert "it has 'paths', 'klass'" in message
    assert "--column path=NAME --column label=NAME" in message
    message = refusal(file, path_column="paths", label_column="klas", weight_column="w")
    assert "no column 'klas' (label); did you mean 'klass'?, 'w' (weight); it has" in message


def test_a_missing_column_of_0_and_1_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", {"path": NAMES, "sea": [1, 0, 1, 0], "sky": [0, 1, 0, 1]})
    message = refusal(file, label_column=["sea", "skys", "sky"])
    assert "no column 'skys' (label); did you mean 'sky'?" in message


def test_image_files_that_are_not_there_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    paths = ["a.png", "gone.png", "folder", "also/gone.png", "nul\0l.png"]
    add_images(tmp_path, ["a.png"])
    columns = {"path": paths, "label": [*"xyxyx"]}
    pd.DataFrame(columns).to_parquet(tmp_path / "t.parquet")
    message = refusal(tmp_path / "t.parquet")
    assert "names 4 file(s) that do not exist" in message
    assert str(tmp_path / "gone.png") in message
    assert "paths are relative to the table's folder" in message


@pytest.mark.parametrize("column", ["path", "label", "split", "weight", "group"])
@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_cells_are_named_by_column_and_row(column: str, empty: str, tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {
        "path": [*NAMES], "label": [*"xyxy"], "split": ["train"] * 4, "weight": [1] * 4,
        "group": [*"pqrs"],
    }  # fmt: skip
    columns[column][1] = columns[column][3] = empty
    message = refusal(write(tmp_path / "t.csv", columns))
    assert f"column {column!r} is empty in 2 row(s): row 2, row 4" in message


def test_rows_that_end_early_have_empty_cells(tmp_path: Path) -> None:
    add_images(tmp_path)
    (tmp_path / "t.csv").write_text("path,label\na.png,x\nb.png\n")
    assert "'label' is empty in 1 row(s): row 2" in refusal(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("label", pd.array([0, 1, None, 1], dtype="Int64")),
        ("label", pd.array(["x", "y", None, "x"], dtype="string")),
        ("label", np.array(["x", "y", None, "x"], dtype=object)),
        ("weight", pd.array([1.0, 2.0, None, 1.0], dtype="Float64")),
        ("weight", [1.0, 2.0, float("nan"), 1.0]),
        ("group", pd.array(["p", "q", None, "r"], dtype="string")),
    ],
)
def test_missing_values_of_a_parquet_file_are_empty_cells(
    column: str, values: Any, tmp_path: Path
) -> None:
    file = write(tmp_path / "t.parquet", {"path": NAMES, "label": [*"xyxy"], column: values})
    assert f"column {column!r} is empty in 1 row(s): row 3" in refusal(file)


def test_many_bad_rows_are_counted_and_the_first_three_named(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(9)]
    add_images(tmp_path, names)
    file = write_csv(tmp_path / "t.csv", {"path": names, "label": ["x", *[""] * 8]})
    assert refusal(file).endswith("in 8 row(s): row 2, row 3, row 4 and 5 more")
    write_csv(file, {"path": names, "label": ["x", *[""] * 3, *["x"] * 5]})
    assert refusal(file).endswith("in 3 row(s): row 2, row 3, row 4")


@pytest.mark.parametrize(
    ("labels", "fields", "told"),
    [
        (["x"] * 4, {}, "only the label 'x'"),
        (["x", "", "x;x", ""], {"label_separator": ";"}, "only the label 'x'"),
        ([""] * 4, {"label_separator": ";"}, "no label"),
    ],
)
def test_fewer_than_two_classes_are_refused(
    labels: list[str], fields: dict[str, Any], told: str, tmp_path: Path
) -> None:
    message = refusal(write(tmp_path / "t.csv", {"path": NAMES, "label": labels}), **fields)
    assert re.search(rf"has {re.escape(told)}; at least two classes are required$", message)


@pytest.mark.parametrize("again", ["a.png", "./a.png", "sub/../a.png", "{here}/a.png"])
def test_an_image_that_is_named_twice_is_refused_in_any_spelling(
    again: str, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    paths = ["a.png", "b.png", again.format(here=tmp_path)]
    file = write(tmp_path / "t.csv", {"path": paths, "label": [*"xyy"]})
    message = refusal(file)
    assert "names 1 image(s) more than once" in message
    assert "a.png" in message
