"""Options that several commands share: on a real command line, and what they come to."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from tuneapp.config import Data, RunSettings
from tuneapp.errors import ConfigError
from tuneapp.options import (
    DashboardOptions,
    DataOptions,
    LoadingOptions,
    absolute,
    chosen_data,
    chosen_settings,
    expanded,
    num_bytes,
    seconds,
)

# --- Data -----------------------------------------------------------------------------------------


def test_without_options_the_data_stay() -> None:
    base = Data(source="/photos", label_regex="x", folds=3, bad_images="error", test_share=0.3)
    assert chosen_data(DataOptions(), base) == base
    assert chosen_data(DataOptions(), Data()) == Data()


def test_an_option_takes_the_place_of_one_field_only() -> None:
    base = Data(source="/photos", label_regex="x", folds=3, bad_images="error", test_share=0.3)
    chosen = chosen_data(DataOptions(folds=5, bad_images="substitute"), base)
    wanted = Data(
        source="/photos", label_regex="x", folds=5, bad_images="substitute", test_share=0.3
    )
    assert chosen == wanted


def test_another_source_takes_nothing_over() -> None:
    base = Data(
        source="/t.csv", label_column="x", classes=["a", "b"], folds=3, exclude="/out.txt",
        bad_images="error", val_share=0.3,
    )  # fmt: skip
    assert chosen_data(DataOptions(data="/photos"), base) == Data(source="/photos")
    assert chosen_data(DataOptions(data="/t.csv"), base) == Data(source="/t.csv")
    assert chosen_data(DataOptions(data="/photos", folds=2), base) == Data(
        source="/photos", folds=2
    )


def test_every_option_reaches_its_field() -> None:
    folder = chosen_data(
        DataOptions(
            data="/photos", label_regex="a", group_regex="b", folds=2, bad_images="error",
            exclude="/x.txt",
        ),
        Data(),
    )  # fmt: skip
    assert folder == Data(
        source="/photos", label_regex="a", group_regex="b", folds=2, bad_images="error",
        exclude="/x.txt",
    )  # fmt: skip
    table = chosen_data(
        DataOptions(
            data="/t.csv",
            label_separator=";",
            column=["path=p", "label=l", "split=s", "weight=w", "group=g"],
        ),
        Data(),
    )
    assert table == Data(
        source="/t.csv", label_separator=";", path_column="p", label_column="l", split_column="s",
        weight_column="w", group_column="g",
    )  # fmt: skip
    root = chosen_data(DataOptions(data="torchvision:MNIST", data_root="/r"), Data())
    assert root == Data(source="torchvision:MNIST", data_root="/r")


def test_several_label_columns_are_a_class_each_and_names_may_hold_equals_signs() -> None:
    chosen = chosen_data(
        DataOptions(data="/t.csv", column=["label=sky", "path=a=b", "label=sea"]), Data()
    )
    assert chosen.label_column == ("sky", "sea")
    assert chosen.path_column == "a=b"


@pytest.mark.parametrize("pair", ["path", "path=", "=x", "weigth=w", "Path=p", ""])
def test_a_column_that_makes_no_sense_is_shown_with_the_roles(pair: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_data(DataOptions(data="/t.csv", column=[pair]), Data())
    wanted = "must be ROLE=NAME, where ROLE is one of path, label, split, weight, group"
    assert str(caught.value) == f"--column {pair}: {wanted}"


@pytest.mark.parametrize("role", ["path", "split", "weight", "group"])
def test_a_role_that_is_given_twice_is_refused(role: str) -> None:
    options = DataOptions(data="/t.csv", column=[f"{role}=a", f"{role}=b"])
    with pytest.raises(ConfigError, match=f"^--column {role}: given twice$"):
        chosen_data(options, Data())


def test_an_option_that_means_nothing_for_the_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--column label needs a"):
        chosen_data(DataOptions(data="/photos", column=["label=x"]), Data())
    with pytest.raises(ConfigError, match=r"^--label-regex needs a folder"):
        chosen_data(DataOptions(label_regex="x"), Data(source="/t.csv"))


def test_paths_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert absolute(Data(source="photos")).source == str(tmp_path / "photos")
    assert absolute(Data(source="sub/t.csv")).source == str(tmp_path / "sub" / "t.csv")
    assert absolute(Data(source="~/t.csv")).source == "/home/somebody/t.csv"
    assert absolute(Data(source="/a/b")).source == "/a/b"
    assert absolute(Data(source="photos", exclude="out.txt")).exclude == str(tmp_path / "out.txt")
    for name in ("digits", "torchvision:MNIST", "my.module:Images"):
        assert absolute(Data(source=name)) == Data(source=name)
    root = absolute(Data(source="torchvision:MNIST", data_root="~/data")).data_root
    assert root == "/home/somebody/data"
    assert chosen_data(DataOptions(data="photos"), Data()).source == str(tmp_path / "photos")


# --- Settings -------------------------------------------------------------------------------------


def test_settings_take_what_is_given_and_keep_the_rest() -> None:
    base = RunSettings(seed=4, metric="val/loss", workers=2, store_budget=5)
    assert chosen_settings(base, LoadingOptions(), seed=None, metric=None) == base
    chosen = chosen_settings(
        base, LoadingOptions(store_budget="2kB", workers=0), seed=0, metric="val/macro_f1"
    )
    assert chosen == RunSettings(seed=0, metric="val/macro_f1", workers=0, store_budget=2000)
    assert chosen_settings(base, LoadingOptions(store_budget="0")).store_budget == 0


METRICS = (
    "val/accuracy, val/auroc, val/average_precision, val/balanced_accuracy, val/loss, "
    "val/macro_f1, val/recall/CLASS"
)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_epochs": 0}, "--epochs 0: must be a whole number >= 1"),
        ({"image_size": 8}, "--image-size 8: must be a whole number >= 16"),
        ({"seed": -1}, "--seed -1: must be a whole number >= 0"),
        (
            {"metric": "val/acuracy"},
            f"--metric 'val/acuracy': must be one of {METRICS}; did you mean 'val/accuracy'?",
        ),
        (
            {"max_epochs": 0, "seed": -1},
            "--seed -1: must be a whole number >= 0; --epochs 0: must be a whole number >= 1",
        ),
    ],
)
def test_a_wrong_setting_is_named_by_its_flag_and_not_by_our_classes(
    given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_settings(RunSettings(), LoadingOptions(), **given)
    assert str(caught.value) == said


def test_a_wrong_setting_of_a_program_is_named_by_its_field() -> None:
    with pytest.raises(ConfigError, match=r"^RunSettings: max_epochs must be a whole number >= 1"):
        RunSettings(max_epochs=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (DataOptions(folds=1), "--folds 1: must be a whole number >= 2"),
        (
            DataOptions(data="/photos", label_regex="("),
            "--label-regex '(': must be a regular expression: missing ), unterminated subpattern "
            "at position 0",
        ),
        (DataOptions(data=""), "--data '': must be a path or a name"),
        (
            DataOptions(data="/t.csv", group_regex="a", column=["group=b"]),
            "give either --group-regex or --column group, not both",
        ),
    ],
)
def test_wrong_data_are_named_by_their_flags(options: DataOptions, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_data(options, Data())
    assert str(caught.value) == said


def test_the_dashboard_has_an_address_where_it_is_asked_for() -> None:
    assert DashboardOptions().address is None
    assert DashboardOptions(dashboard=True).address == "127.0.0.1"
    assert DashboardOptions(dashboard_host="0.0.0.0").address == "0.0.0.0"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0", 0), ("500", 500), ("500B", 500), ("1K", 10**3), ("1kb", 10**3), ("20GB", 20 * 10**9),
        ("1.5 GB", 1_500_000_000), (" 2 tb ", 2 * 10**12), ("3m", 3 * 10**6), ("0.5MB", 500_000),
        ("2g", 2 * 10**9),
    ],
)  # fmt: skip
def test_sizes_are_powers_of_ten(text: str, wanted: int) -> None:
    assert num_bytes("--store-budget", text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1GiB", "1 G B", "1,5GB", "1e9", ".5GB", "1PB"])
def test_other_sizes_are_refused_by_their_flag(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_settings(RunSettings(), LoadingOptions(store_budget=text))
    assert str(caught.value) == f"--store-budget {text}: expected a size such as 500MB or 20GB"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2h", 7200), ("1h1m1s", 3661), ("1h1s", 3601),
     ("0s", 0), ("120m", 7200)],
)  # fmt: skip
def test_times_are_hours_minutes_and_seconds(text: str, wanted: float) -> None:
    assert seconds("--time", text) == wanted


@pytest.mark.parametrize("text", ["", "90", "m", "1m1h", "1.5h", "-1s", "1h 30m", "1H", "1d"])
def test_other_times_are_refused_by_their_flag(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        seconds("--time", text)
    hint = "; did you mean 90m?" if text == "90" else ""
    wanted = f"--time {text}: expected a time such as 90s, 30m or 1h30m{hint}"
    assert str(caught.value) == wanted


# --- On a command line ----------------------------------------------------------------------------

seen: list[Any] = []


def command(
    space: Annotated[Path, typer.Argument(metavar="SPACE")],
    data: DataOptions,
    loading: LoadingOptions,
    trials: Annotated[int, typer.Option(help="How many.")] = 3,
) -> int:
    """Do something with images."""
    seen.append((space, data, loading, trials))
    return 0


def call(*words: str) -> tuple[int, str]:
    seen.clear()
    app = typer.Typer()
    app.command()(expanded(command))
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def test_a_group_of_options_arrives_as_one_value() -> None:
    code, output = call(
        "space.py", "--data", "t.csv", "--column", "path=p", "--column", "label=l", "--trials", "7",
        "--label-separator", ";", "--group-regex", "g", "--folds", "4", "--bad-images", "error",
        "--exclude", "x.txt", "--store-budget", "2GB", "--workers", "1", "--data-root", "r",
        "--label-regex", "q",
    )  # fmt: skip
    assert code == 0, output
    (call_seen,) = seen
    assert call_seen == (
        Path("space.py"),
        DataOptions(
            data="t.csv", label_regex="q", column=["path=p", "label=l"], label_separator=";",
            group_regex="g", data_root="r", folds=4, bad_images="error", exclude="x.txt",
        ),
        LoadingOptions(store_budget="2GB", workers=1),
        7,
    )  # fmt: skip


def test_options_that_are_not_given_are_none() -> None:
    code, output = call("space.py")
    assert code == 0, output
    (path, data, loading, trials), *_ = seen
    assert (path, trials) == (Path("space.py"), 3)
    assert not data.column
    assert chosen_data(data, Data(source="/x", folds=2)) == Data(source="/x", folds=2)
    assert loading == LoadingOptions()


def test_the_help_shows_each_option_and_the_text_of_the_command() -> None:
    code, output = call("--help")
    assert code == 0
    assert "Do something with images." in output
    for name in (
        "--data", "--label-regex", "--column", "--label-separator", "--group-regex", "--data-root",
        "--folds", "--bad-images", "--exclude", "--store-budget", "--workers", "--trials",
    ):  # fmt: skip
        assert f"{name} " in output


@pytest.mark.parametrize(
    "words", [["--folds", "many"], ["--bad-images", "ignore"], ["--workers", "x"], ["--nonsense"]]
)
def test_wrong_words_on_the_command_line_are_refused(words: list[str]) -> None:
    code, output = call("space.py", *words)
    assert code == 2
    assert words[0] in output
    assert not seen


def test_the_signature_that_typer_reads_has_the_fields_in_the_place_of_the_groups() -> None:
    shown = inspect.signature(expanded(command)).parameters
    assert list(shown) == [
        "space", "data", "label_regex", "column", "label_separator", "group_regex", "data_root",
        "folds", "bad_images", "exclude", "store_budget", "workers", "trials",
    ]  # fmt: skip
    assert {p.kind for p in shown.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert shown["space"].default is inspect.Parameter.empty
    assert shown["trials"].default == 3
    assert expanded(command).__doc__ == command.__doc__
