"""Checks that the typed values share: each returns what is wrong, a line each."""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from tuneapp.errors import ConfigError

Metric = Literal["val/accuracy", "val/balanced_accuracy", "val/loss", "val/macro_f1"]
"""Metrics that every row has, whatever the classes are."""

METRIC_MODES: Mapping[str, Literal["max", "min"]] = MappingProxyType(
    {
        "val/accuracy": "max",
        "val/balanced_accuracy": "max",
        "val/loss": "min",
        "val/macro_f1": "max",
    }
)
METRICS = ("accuracy", "auroc", "average_precision", "balanced_accuracy", "loss", "macro_f1")
"""What a trial can be judged by, after `val/`; besides, `recall/` and the name of a class."""

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Checked:
    """Collects every mistake of a value before raising once."""

    def _mistakes(self) -> list[str]:
        """Return what is wrong, a line each; every class says it for its own fields."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        mistakes = self._mistakes()
        if mistakes:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(mistakes))


def require(ok: bool, name: str, value: object, allowed: str) -> list[str]:
    """Return nothing if `ok`, else a line that names the field, what is allowed and the value."""
    return [] if ok else [f"{name} must be {allowed}, got {value!r}"]


def is_number(value: object) -> bool:
    """Whether `value` is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric_mode(metric: str) -> Literal["max", "min"]:
    """Return whether a larger or a smaller value of a metric is better."""
    return "min" if metric == "val/loss" else "max"


def is_metric(value: object) -> bool:
    """Whether `value` names a metric; whether its class is one is known with the data only."""
    if not isinstance(value, str):
        return False
    name = value.removeprefix("val/")
    return name != value and (name in METRICS or (name[:7] == "recall/" and name != "recall/"))


def is_whole(value: object, least: int) -> bool:
    """Whether `value` is a whole number of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_plain(value: object) -> bool:
    """Whether JSON can hold `value`."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | str) or is_number(value)


def plain(value: Any) -> Any:
    """Return `value` with dicts for mappings and lists for tuples, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def is_reference(value: object) -> bool:
    """Whether `value` is written like `package.module:name`, an object of the user's own.

    `timm:name` is a network of timm's.
    """
    if not isinstance(value, str) or value.startswith("timm:"):
        return False
    return _REFERENCE.fullmatch(value) is not None


def above_zero(name: str, value: float) -> list[str]:
    """Check for a number > 0."""
    return require(is_number(value) and value > 0, name, value, "a number > 0")


def at_least_zero(name: str, value: float) -> list[str]:
    """Check for a number >= 0."""
    return require(is_number(value) and value >= 0, name, value, "a number >= 0")


def fraction(name: str, value: float) -> list[str]:
    """Check for a number in [0, 1)."""
    return require(is_number(value) and 0 <= value < 1, name, value, "a number in [0, 1)")


def share(name: str, value: float) -> list[str]:
    """Check for a number in (0, 1]."""
    return require(is_number(value) and 0 < value <= 1, name, value, "in (0, 1]")


def between(name: str, value: float) -> list[str]:
    """Check for a number in (0, 1)."""
    return require(is_number(value) and 0 < value < 1, name, value, "a number in (0, 1)")


def whole(name: str, value: int, least: int) -> list[str]:
    """Check for a whole number of at least `least`."""
    return require(is_whole(value, least), name, value, f"a whole number >= {least}")


def true_or_false(name: str, value: bool) -> list[str]:
    """Check for True or False."""
    return require(isinstance(value, bool), name, value, "True or False")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    """Check for one of some words."""
    return require(value in allowed, name, value, "one of " + ", ".join(map(repr, allowed)))


def reference(name: str, value: str) -> list[str]:
    """Check for the import path of an object."""
    return require(is_reference(value), name, value, "an import path such as 'package.module:name'")
