"""Options that several commands share, and their values."""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from tuneapp.config import EMBEDDED, Data, RunSettings
from tuneapp.errors import ConfigError, did_you_mean

_Settings = TypeVar("_Settings", Data, RunSettings)
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
UsageError: type[Any] = typer.BadParameter.__bases__[0]
"""What typer raises for a wrong command line; it has no public name for all of them."""
_ROLES = ("path", "label", "split", "weight", "group")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images; every command that reads images has these options."""

    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Images: a folder per class, or train/, val/ and test/ with one in each; a flat "
            "folder, with --label-regex; a .csv or .parquet table; torchvision:NAME; "
            "package.module:name, a custom Dataset; or 'digits', the embedded data set. "
            "Default: DATA in SPACE, else digits.",
        ),
    ] = None
    label_regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="For a flat folder: the regex's first group, matched against the file path, is "
            "the label.",
        ),
    ] = None
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="For a table: which column is the path, label, split, weight or group; may be "
            "given several times. Several label columns hold 0 and 1, one class each.",
        ),
    ] = None
    label_separator: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="For a table: what separates several labels."),
    ] = None
    group_regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="The regex's first group, matched against the file path, is the image's group; "
            "groups are never split.",
        ),
    ] = None
    data_root: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="For torchvision:NAME: where its files are or are downloaded to."
        ),
    ] = None
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="K-fold cross-validation: train each trial K times, validating on a different "
            "fold each time.",
        ),
    ] = None
    bad_images: Annotated[
        Literal["drop", "substitute", "error"] | None,
        typer.Option(help="How to handle images that cannot be read. Default: drop."),
    ] = None
    exclude: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File listing images to exclude, one path per line (`doctor` writes one).",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SourceOptions(DataOptions):
    """The same, with the source as an argument, for commands about the images themselves."""

    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="Images, as --data of `sweep`; default: digits."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How images are loaded."""

    store_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Disk space for decoded images, e.g. 20GB; what does not fit is decoded at "
            "each use. Default: half of the free space.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes per trial that prepare batches. Default: 0 for stored images, else "
            "one per CPU thread of the trial.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DashboardOptions:
    """Whether and where Ray's dashboard is started."""

    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Start the Ray dashboard and print its address.")
    ] = False
    dashboard_host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Start it on this address; any but 127.0.0.1 makes it reachable from the network.",
        ),
    ] = None

    @property
    def address(self) -> str | None:
        """The address to start it on; None starts none."""
        return self.dashboard_host or ("127.0.0.1" if self.dashboard else None)


_GROUPS = (DataOptions, SourceOptions, LoadingOptions, DashboardOptions)


def expanded(function: Callable[..., int]) -> Callable[..., int]:
    """Replace each parameter that is a group of options by one parameter for each of its fields.

    typer has no groups of options, but reads signatures: it gets one with the fields instead of
    the group.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if kind in _GROUPS}
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
    """Return `base` with the given options; for another source, `base` is ignored.

    Raises:
        ConfigError: an option has a wrong value, or no meaning for the source.
    """
    if options.data is not None:
        base = _replaced(Data(), {"source": options.data}, {"source": "--data"})
    given: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "label_regex", "label_separator", "group_regex", "data_root", "folds", "bad_images",
            "exclude",
        )
        if getattr(options, name) is not None
    }  # fmt: skip
    given |= _columns(options.column or [])
    return absolute(
        _replaced(base, given, {f"{role}_column": f"--column {role}" for role in _ROLES})
    )


def absolute(data: Data) -> Data:
    """Return it with absolute paths, so that a run can be resumed from any folder."""

    def full(path: str) -> str:
        try:
            return str(Path(path).expanduser().absolute())
        except RuntimeError as error:  # ~nobody
            raise ConfigError(f"{path}: {error}") from None

    is_embedded = data.source == EMBEDDED and not Path(EMBEDDED).is_dir()
    is_path = not is_embedded and not data.is_dataset
    return replace(
        data,
        source=full(data.source) if is_path else data.source,
        data_root=data.data_root and full(data.data_root),
        exclude=data.exclude and full(data.exclude),
    )


def chosen_settings(base: RunSettings, loading: LoadingOptions, **given: Any) -> RunSettings:
    """Return `base` with those of the given values that are not None.

    Raises:
        ConfigError: a value is not allowed; it is named by its flag.
    """
    budget = loading.store_budget
    given |= {
        "store_budget": None if budget is None else num_bytes("--store-budget", budget),
        "workers": loading.workers,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return _replaced(base, given, {"max_epochs": "--epochs"})


def _replaced(base: _Settings, given: Mapping[str, Any], flags: Mapping[str, str]) -> _Settings:
    """Return `base` with these fields, and name their flags in errors.

    Args:
        base: valid by itself.
        given: field to value.
        flags: field to flag, where it is not `--field`.

    Raises:
        ConfigError: a value is not allowed, such as `--epochs 0: must be a whole number >= 1`.
    """
    try:
        return replace(base, **given)
    except ConfigError as error:
        said = str(error).removeprefix(f"{type(base).__name__}: ")
        for field, value in given.items():
            flag = flags.get(field, f"--{field.replace('_', '-')}")
            begin, end = f"{field} must be ", f", got {value!r}"
            if begin in said and end in said:
                said = said.replace(begin, f"{flag} {value!r}: must be ").replace(end, "")
                said = said.replace("must be None or ", "must be ")
            said = re.sub(rf"(?<![\w-]){field}\b", flag, said)
        raise ConfigError(said) from None


def num_bytes(flag: str, text: str) -> int:
    """Return how many bytes `20GB` is: powers of ten, as disks are sold."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = found[2] if found and found[2].endswith("B") else f"{found[2]}B" if found else ""
    if not found:
        raise ConfigError(f"{flag} {text}: expected a size such as 500MB or 20GB")
    return int(float(found[1]) * _UNITS[unit])


def seconds(flag: str, text: str) -> float:
    """Return how many seconds `1h30m` is."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not found or not any(found.groups()):
        hint = f"; did you mean {text}m?" if text.isdecimal() else ""
        raise ConfigError(f"{flag} {text}: expected a time such as 90s, 30m or 1h30m{hint}")
    hours, minutes, rest = (int(g or 0) for g in found.groups())
    return 3600.0 * hours + 60.0 * minutes + rest


def usage_line(error: Any, words: Sequence[str], commands: Mapping[str, Callable[..., int]]) -> str:
    """Return a usage error of typer in one line, with what was typed and what is allowed.

    Args:
        error: a `UsageError`.
        words: the command line.
        commands: name to function, as `expanded` made it.
    """
    command = [word for word in words[:1] if word in commands]
    path = error.ctx.command_path if error.ctx else " ".join(["python -m tuneapp", *command])
    said = _say_usage(error, words, commands) or " ".join(error.format_message().split())
    return f"{said} ({path} --help)"


def _say_usage(
    error: Any, words: Sequence[str], commands: Mapping[str, Callable[..., int]]
) -> str | None:
    said, param, context = error.format_message(), getattr(error, "param", None), error.ctx
    name = getattr(error, "option_name", None)
    if param is not None and said.startswith("Missing"):
        return f"{param.metavar or param.opts[0]}: missing"
    if param is not None:
        command = commands.get(context.info_name if context else "")
        typed = _typed(words, param.opts)
        if command is None or typed is None:
            return None
        wrong = _not_allowed(typed, command.__annotations__[param.name])
        shown = typed if _NUMBER.fullmatch(typed) else repr(typed)
        return f"{param.opts[0]} {shown}: {wrong}"
    if name is not None and said.startswith("No such option"):
        known = [flag for p in context.command.params for flag in p.opts if flag[:1] == "-"]
        return f"{name}: no such option{did_you_mean(name, known)}"
    if name is not None:
        return f"{name}: {'takes no value' if 'not take a value' in said else 'needs a value'}"
    if found := re.match(r"No such command '(.*?)'", said):
        hint = did_you_mean(found[1], commands)
        return f"{found[1]}: no such command{hint}; there are {', '.join(commands)}"
    if found := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", said):
        return f"{found[1]}: unexpected; the command takes no more arguments"
    return None


def _typed(words: Sequence[str], flags: Sequence[str]) -> str | None:
    """Return the last value that was typed for an option."""
    typed = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        flag, equals, value = word.partition("=")
        if flag in flags:
            typed = value if equals else following
    return typed


def _not_allowed(typed: str, annotation: Any) -> str:
    """Say what is allowed for an option, given its annotation."""
    kind, option = typing.get_args(annotation)
    for one in [kind, *typing.get_args(kind)]:
        if typing.get_origin(one) is Literal:
            allowed = typing.get_args(one)
            return f"must be one of {', '.join(allowed)}{did_you_mean(typed, allowed)}"
    is_whole = int in (kind, *typing.get_args(kind))
    is_right_kind = _NUMBER.fullmatch(typed) and not (is_whole and "." in typed)
    if option.min is not None and is_right_kind:
        return f"must be at least {option.min}"
    return "must be a whole number" if is_whole else "must be a number"


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
        raise ConfigError(f"--column {several[0].removesuffix('_column')}: given twice")
    return {role: names[0] if len(names) == 1 else tuple(names) for role, names in columns.items()}
