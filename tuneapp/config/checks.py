"""Checks that the configuration classes share: each returns its mistakes, one line each."""

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, get_args

from tuneapp.errors import ConfigError

Metric = Literal["val/accuracy", "val/balanced_accuracy", "val/loss", "val/macro_f1"]
"""Metrics that every epoch has, whatever the classes are."""

MONITORS: tuple[str, ...] = get_args(Metric)
METRICS = ("accuracy", "auroc", "average_precision", "balanced_accuracy", "loss", "macro_f1")
"""What a trial can be judged by, after `val/`; also `recall/` and the name of a class."""

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_FILE_REFERENCE = re.compile(r"(?P<file>.*/\w+(?:\.py)?|\w+\.py):(?P<name>[A-Za-z_]\w*)")
_SHOWN = 200
"""Characters of a wrong value that a message shows."""


class Checked:
    """Collects all mistakes of a configuration object and raises them together."""

    def _mistakes(self) -> list[str]:
        """Return what is wrong, one line each; every class checks its own fields."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        mistakes = self._mistakes()
        if mistakes:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(mistakes))


def require(ok: bool, name: str, value: object, allowed: str) -> list[str]:
    """Return nothing if `ok`, else a line that names the field, what is allowed and the value."""
    return [] if ok else [f"{name} must be {allowed}, got {shown(value)}"]


def shown(value: object) -> str:
    """Return how Python writes `value`, on one line and not too long: arrays are neither."""
    written = repr(value)
    if "\n" in written:
        written = " ".join(written.split())
    return written if len(written) <= _SHOWN else f"{written[:_SHOWN]}..."


def is_number(value: object) -> bool:
    """Whether `value` is a finite number; booleans do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric_mode(metric: str) -> Literal["max", "min"]:
    """Return whether a larger or a smaller value of a metric is better."""
    return "min" if metric == "val/loss" else "max"


def is_metric(value: object) -> bool:
    """Whether `value` names a metric; a class in it can only be checked against the data."""
    if not isinstance(value, str):
        return False
    name = value.removeprefix("val/")
    return name != value and (name in METRICS or (name[:7] == "recall/" and name != "recall/"))


def is_whole(value: object, least: int) -> bool:
    """Whether `value` is a whole number of at least `least`; booleans do not count."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_plain(value: object) -> bool:
    """Whether JSON can hold `value`."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | str) or is_number(value)


def plain(value: Any) -> Any:
    """Return `value` with mappings as dicts and tuples as lists, as in JSON."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def is_reference(value: object) -> bool:
    """Whether `value` is written like `package.module:name`, the path of a user-defined object.

    `timm:name` is a network of timm, not an import path.
    """
    if not isinstance(value, str) or value.startswith("timm:"):
        return False
    return _REFERENCE.fullmatch(value) is not None


def import_path_meant(value: object) -> str | None:
    """Return the import path that a file and a name, `folder/module.py:name`, stand for, if any.

    Modules are found in the working directory and beside the space, so of an absolute path, or one
    that leads upwards, only the file's name is left.
    """
    found = _FILE_REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if found is None or "://" in found[0] or found[0].startswith(("timm:", "torchvision:")):
        return None
    parts = PurePath(found["file"]).with_suffix("").parts
    if not all(part.isidentifier() for part in parts):
        parts = parts[-1:]
    return f"{'.'.join(parts)}:{found['name']}"


def above_zero(name: str, value: float) -> list[str]:
    """Check for a number > 0."""
    return require(is_number(value) and value > 0, name, value, "a number > 0")


def at_least_zero(name: str, value: float) -> list[str]:
    """Check for a number >= 0."""
    return require(is_number(value) and value >= 0, name, value, "a number >= 0")


def in_interval(name: str, value: object, interval: str) -> list[str]:
    """Check for a number in an interval such as `[0, 1)`, whose end 0 is allowed and 1 is not."""
    return require(is_in_interval(value, interval), name, value, f"a number in {interval}")


def is_in_interval(value: object, interval: str) -> bool:
    """Whether `value` is a number in an interval such as `[0, 1)`."""
    if not (isinstance(value, int | float) and is_number(value)):
        return False
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < value < high
    return (
        inside or (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)
    )


def whole(name: str, value: int, least: int) -> list[str]:
    """Check for a whole number of at least `least`."""
    return require(is_whole(value, least), name, value, f"a whole number >= {least}")


def true_or_false(name: str, value: bool) -> list[str]:
    """Check for True or False."""
    return require(isinstance(value, bool), name, value, "True or False")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    """Check for one of these words."""
    ok = isinstance(value, str) and value in allowed  # an array compares element by element
    return require(ok, name, value, "one of " + ", ".join(map(repr, allowed)))


def reference(name: str, value: str) -> list[str]:
    """Check for the import path of an object."""
    return file_reference(name, value) or require(
        is_reference(value), name, value, "an import path such as 'package.module:name'"
    )


def file_reference(name: str, value: object) -> list[str]:
    """Refuse a file and a name, `folder/module.py:name`, and say which import path to write."""
    meant = import_path_meant(value)
    if meant is None:
        return []
    return [f"{name} {value!r} is a path of a file; write an import path: {meant}"]
