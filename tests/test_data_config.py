"""The values of `Data`: what is allowed, what goes together, and where a space gives them."""

from pathlib import Path
from typing import Any

import pytest

from tuneapp.config import Data, RunSettings
from tuneapp.errors import ConfigError, SpaceError
from tuneapp.space import SearchSpace


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Data(**fields)
    message = str(caught.value)
    assert message.startswith("Data: ")
    assert "\n" not in message
    return message


GOOD: list[dict[str, Any]] = [
    {},
    {"source": "photos"},
    {"source": "photos", "label_regex": "^(cat|dog)"},
    {"source": "photos", "group_regex": r"pat\d+", "folds": 2, "exclude": "out.txt"},
    {"source": "t.csv", "path_column": "p", "label_column": "l", "split_column": "s"},
    {"source": "t.CSV", "weight_column": "w", "group_column": "g"},
    {"source": "t.parquet", "label_column": ["a", "b"]},
    {"source": "t.csv", "label_separator": ";", "classes": ("a", "b")},
    {"source": "t.csv", "group_regex": "x"},
    {"source": "torchvision:CIFAR10", "data_root": "here"},
    {"source": "my.module:Images", "classes": ["a", "b"]},
    {"val_share": 0.01, "test_share": 0},
    {"val_share": 0.99, "test_share": 0.99},
    *({"bad_images": name} for name in ("drop", "substitute", "error")),
]


@pytest.mark.parametrize("fields", GOOD)
def test_sensible_values_are_allowed(fields: dict[str, Any]) -> None:
    data = Data(**fields)
    for name, value in fields.items():
        assert getattr(data, name) == (tuple(value) if isinstance(value, list) else value)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"source": ""}, "source must be a path or a name, got ''"),
    ({"source": None}, "source must be a path or a name, got None"),
    ({"source": Path("photos")}, "source must be a path or a name"),
    ({"source": "./helpers.py:Images"}, "path of a file; write an import path: helpers:Images"),
    ({"source": "photos", "label_regex": "(cat"}, "label_regex must be a regular expression"),
    ({"source": "photos", "label_regex": 3}, "label_regex must be a regular expression, got 3"),
    ({"source": "photos", "group_regex": "[a"}, "group_regex must be a regular expression"),
    ({"classes": ["a"]}, "classes must be None or two or more different names, got ('a',)"),
    ({"classes": []}, "classes must be"),
    ({"classes": ["a", "a"]}, "classes must be"),
    ({"classes": ["a", ""]}, "classes must be"),
    ({"classes": ["a", 1]}, "classes must be"),
    ({"classes": "ab"}, "classes must be"),
    ({"source": "t.csv", "label_column": ["a"]}, "label_column must be a column, or two or more"),
    ({"source": "t.csv", "label_column": ["a", "a"]}, "label_column must be"),
    ({"source": "t.csv", "label_column": ""}, "label_column must be"),
    ({"source": "t.csv", "label_column": 1}, "label_column must be"),
    ({"source": "t.csv", "label_separator": ""}, "label_separator must be None or a text, got ''"),
    ({"source": "t.csv", "label_separator": 1}, "label_separator must be None or a text, got 1"),
    ({"folds": 1}, "folds must be None or a whole number >= 2, got 1"),
    ({"folds": 2.0}, "folds must be"),
    ({"folds": True}, "folds must be"),
    ({"folds": "3"}, "folds must be"),
    *(
        ({"val_share": value}, "val_share must be a number in (0, 1)")
        for value in (0, 1, -0.1, float("nan"), "0.1", None, True)
    ),
    *(
        ({"test_share": value}, "test_share must be a number in [0, 1)")
        for value in (1, -0.1, float("inf"), "0.1", None, False)
    ),
    ({"bad_images": "ignore"}, "bad_images must be one of 'drop', 'substitute', 'error'"),
    ({"bad_images": None}, "bad_images must be one of"),
    ({"exclude": ""}, "exclude must be None or a text"),
    ({"exclude": ["a"]}, "exclude must be None or a text"),
    ({"source": "torchvision:MNIST", "data_root": Path("x")}, "data_root must be None or a text"),
    *(
        ({"source": "t.csv", f"{role}_column": value}, f"{role}_column must be None or a text")
        for role in ("path", "split", "weight", "group")
        for value in ("", 3, ["a", "b"])
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_value_that_is_not_allowed_is_named(fields: dict[str, Any], message: str) -> None:
    assert message in refusal(**fields)


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal(folds=1, val_share=2, bad_images="x", label_separator=";")
    for name in ("folds", "val_share", "bad_images", "label_separator"):
        assert name in message


OF_TABLES = [
    "path_column", "label_column", "label_separator", "split_column", "weight_column",
    "group_column",
]  # fmt: skip


@pytest.mark.parametrize("field", OF_TABLES)
@pytest.mark.parametrize("source", ["digits", "photos", "torchvision:MNIST", "my.own:Images"])
def test_what_is_for_tables_is_refused_for_others(field: str, source: str) -> None:
    message = refusal(source=source, **{field: "x"})
    assert f"{field} needs a .csv or .parquet table, and source is {source!r}" in message


@pytest.mark.parametrize("source", ["digits", "photos", "t.csv", "my.own:Images"])
def test_a_data_root_is_for_torchvision_only(source: str) -> None:
    message = refusal(source=source, data_root="x")
    assert f"data_root needs torchvision:NAME, and source is {source!r}" in message


@pytest.mark.parametrize("source", ["t.csv", "t.Parquet", "torchvision:MNIST", "my.own:Images"])
def test_labels_in_file_names_are_for_folders_only(source: str) -> None:
    message = refusal(source=source, label_regex="x")
    assert f"label_regex needs a folder, and source is {source!r}" in message


def test_two_ways_of_saying_the_same_are_refused() -> None:
    assert "give either group_regex or group_column, not both" in refusal(
        source="t.csv", group_regex="x", group_column="y"
    )
    assert "give either label_separator or several label columns, not both" in refusal(
        source="t.csv", label_separator=";", label_column=["a", "b"]
    )


@pytest.mark.parametrize("source", ["torchvision:MNIST", "my.own:Images"])
def test_a_group_expression_is_for_images_with_paths(source: str) -> None:
    assert "group_regex matches paths, and the images of a Dataset have none" in refusal(
        source=source, group_regex="x"
    )


@pytest.mark.parametrize(
    ("source", "table", "dataset", "own"),
    [
        ("digits", False, False, False),
        ("photos", False, False, False),
        ("/a/b.csv", True, False, False),
        ("b.PARQUET", True, False, False),
        ("b.csv.gz", False, False, False),
        ("torchvision:CIFAR10", False, True, False),
        ("module:Name", False, True, True),
        ("package.module:name", False, True, True),
        ("C:/photos", False, False, False),
        ("photos/a:b", False, False, False),
    ],
)
def test_the_kind_of_a_source_is_seen_by_how_it_is_written(
    source: str, table: bool, dataset: bool, own: bool
) -> None:
    data = Data(source=source)
    assert (data.is_table, data.is_dataset, data.is_own) == (table, dataset, own)


def test_values_with_lists_are_hashable_and_equal_those_with_tuples() -> None:
    lists = Data(source="t.csv", label_column=["a", "b"], classes=["a", "b"])
    tuples = Data(source="t.csv", label_column=("a", "b"), classes=("a", "b"))
    assert lists == tuples
    assert hash(lists) == hash(tuples)
    assert hash(RunSettings(data=lists)) == hash(RunSettings(data=tuples))


@pytest.mark.parametrize("data", ["photos", None, {"source": "photos"}])
def test_settings_take_a_data_only(data: Any) -> None:
    with pytest.raises(ConfigError, match="data must be a Data, got "):
        RunSettings(data=data)


# --- In a search space ----------------------------------------------------------------------------

SPACE = """
from optuna import Trial
from tuneapp.config import Data, TrialConfig

{data}

def search_space(trial: Trial) -> TrialConfig:
    return TrialConfig(model="resnet18")
"""


def read_space(tmp_path: Path, data: str) -> SearchSpace:
    file = tmp_path / "own_space.py"
    file.write_text(SPACE.format(data=data))
    return SearchSpace.read(file)


def test_a_space_gives_its_data(tmp_path: Path) -> None:
    space = read_space(tmp_path, "DATA = Data(source='t.csv', label_separator=';', folds=3)")
    assert space.data == Data(source="t.csv", label_separator=";", folds=3)


def test_a_space_without_data_has_the_embedded_ones(tmp_path: Path) -> None:
    assert read_space(tmp_path, "").data == Data() == Data(source="digits")


@pytest.mark.parametrize("given", ["'photos'", "{'source': 'photos'}", "None", "Data"])
def test_data_of_another_type_are_refused_with_the_way_out(given: str, tmp_path: Path) -> None:
    with pytest.raises(SpaceError) as caught:
        read_space(tmp_path, f"DATA = {given}")
    message = str(caught.value)
    assert "own_space.py: DATA must be a Data from tuneapp.config, got " in message
    assert "DATA = Data(source='photos/')" in message


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("DATA = Data(folds=1)", "own_space.py:5: Data: folds must be"),
        ("DATA = Data(surce='x')", "Data has no surce; did you mean 'source'?"),
    ],
)
def test_mistakes_in_the_data_of_a_space_are_named_by_line(
    given: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(SpaceError) as caught:
        read_space(tmp_path, given)
    assert told in str(caught.value)
