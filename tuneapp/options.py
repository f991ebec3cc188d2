"""Options that several commands share, and what they come to."""

import functools
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tuneapp.config import EMBEDDED, Data, RunSettings
from tuneapp.errors import ConfigError

_ROLES = ("path", "label", "split", "weight", "group")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images; every command that reads some has these options."""

    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Images: a folder per class, or train/, val/ and test/ with one in each; a flat "
            "folder, with --label-regex; a .csv or .parquet table; torchvision:NAME; "
            "package.module:name, a Dataset of yours; or 'digits', the embedded data set. "
            "Default: what SPACE says, else digits.",
        ),
    ] = None
    label_regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Of a flat folder: its first group in a file's path is the label."
        ),
    ] = None
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="Of a table: which column is the path, label, split, weight or group; may be "
            "given several times. Several label columns hold 0 and 1, a class each.",
        ),
    ] = None
    label_separator: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Of a table: what stands between several labels."),
    ] = None
    group_regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Its first group in a path is the image's group; groups are never split.",
        ),
    ] = None
    data_root: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the files of torchvision:NAME are, or go."),
    ] = None
    folds: Annotated[
        int | None,
        typer.Option(metavar="K", help="Train each trial K times, each time validated elsewhere."),
    ] = None
    bad_images: Annotated[
        Literal["drop", "substitute", "error"] | None,
        typer.Option(help="What becomes of images that cannot be read. Default: drop."),
    ] = None
    exclude: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Images to leave out, a path a line, as of `doctor`."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SourceOptions(DataOptions):
    """The same, where the images are what the command is about: their source is an argument."""

    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="Images, as --data of `sweep`; default: digits."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How images come to the trials."""

    store_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Disk space for decoded images, such as 20GB; what does not fit is decoded at "
            "each use. Default: half of what is free.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes of each trial that make its batches. Default: 0 for stored images, "
            "else one for each of its CPU threads.",
        ),
    ] = None


def expanded(function: Callable[..., int]) -> Callable[..., int]:
    """Make each field of a parameter that is such a group of options a parameter of its own.

    typer has no groups of options; it reads signatures, so it is shown one with the fields in the
    place of the group.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    kinds = (DataOptions, SourceOptions, LoadingOptions)
    groups = {name: kind for name, kind in hints.items() if kind in kinds}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            shown.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        of_group = typing.get_type_hints(group, include_extras=True)
        shown += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=of_group[field.name],
            )
            for field in fields(group)
        ]
    shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]

    @functools.wraps(function)
    def call(**options: Any) -> int:
        for name, group in groups.items():
            options[name] = group(**{f.name: options.pop(f.name) for f in fields(group)})
        return function(**options)

    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in shown}
    return call


def chosen_data(options: DataOptions, base: Data) -> Data:
    """Return `base` with what the options say; another source takes nothing over from it.

    Raises:
        ConfigError: a `--column` makes no sense, or an option has no meaning for the source.
    """
    if options.data is not None:
        base = Data(source=options.data)
    given: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "label_regex", "label_separator", "group_regex", "data_root", "folds", "bad_images",
            "exclude",
        )
        if getattr(options, name) is not None
    }  # fmt: skip
    return absolute(replace(base, **given, **_columns(options.column or [])))


def absolute(data: Data) -> Data:
    """Return it with absolute paths, so that a run can be gone on with from anywhere."""

    def full(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    is_embedded = data.source == EMBEDDED and not Path(EMBEDDED).is_dir()
    is_path = not is_embedded and not data.is_dataset
    return replace(
        data,
        source=full(data.source) if is_path else data.source,
        data_root=data.data_root and full(data.data_root),
        exclude=data.exclude and full(data.exclude),
    )


def chosen_settings(base: RunSettings, loading: LoadingOptions, **given: Any) -> RunSettings:
    """Return `base` with those of the given values that are not None."""
    budget = loading.store_budget
    given |= {
        "store_budget": None if budget is None else num_bytes("--store-budget", budget),
        "workers": loading.workers,
    }
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def num_bytes(flag: str, text: str) -> int:
    """Return how many bytes `20GB` is: powers of ten, as disks are sold."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = found[2] if found and found[2].endswith("B") else f"{found[2]}B" if found else ""
    if not found:
        raise ConfigError(f"{flag} {text}: must be such as 500MB or 20GB")
    return int(float(found[1]) * _UNITS[unit])


def seconds(flag: str, text: str) -> float:
    """Return how many seconds `1h30m` is."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not found or not any(found.groups()):
        raise ConfigError(f"{flag} {text}: must be such as 90s, 30m or 1h30m")
    hours, minutes, rest = (int(g or 0) for g in found.groups())
    return 3600.0 * hours + 60.0 * minutes + rest


def _columns(pairs: list[str]) -> dict[str, Any]:
    columns: dict[str, list[str]] = {}
    for pair in pairs:
        role, equals, name = pair.partition("=")
        if not equals or not name or role not in _ROLES:
            raise ConfigError(
                f"--column {pair}: must be ROLE=NAME, where ROLE is one of {', '.join(_ROLES)}"
            )
        columns.setdefault(f"{role}_column", []).append(name)
    several = [role for role, names in columns.items() if len(names) > 1 and role[:5] != "label"]
    if several:
        raise ConfigError(f"--column: {several[0].removesuffix('_column')} is given twice")
    return {role: names[0] if len(names) == 1 else tuple(names) for role, names in columns.items()}
