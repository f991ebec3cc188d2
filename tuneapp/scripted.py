"""Trials that take their values from a script instead of a sampler: to replay and probe a space.

To the space's function they are Optuna trials; they record what it asks for.
"""

import sys
from collections.abc import Callable, Mapping, Reversible, Sequence
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from tuneapp.config import TrialConfig
from tuneapp.errors import SpaceError

Params = Mapping[str, Any]


def describe(distribution: BaseDistribution) -> str:
    """Return the allowed values in words: `0.1 to 1.0, log`, `0 to 5, whole`, `sgd | adamw`."""
    if isinstance(distribution, CategoricalDistribution):
        return " | ".join(map(spell, distribution.choices))
    low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
    if low == high:
        return spell(low)
    whole = isinstance(distribution, optuna.distributions.IntDistribution)
    log = ", log" if distribution.log else ""  # type: ignore[attr-defined]
    return f"{low:g} to {high:g}{', whole' if whole else ''}{log}"


def spell(choice: object) -> str:
    """Return a choice as `show` and the recipes spell it: `0.2`, and `0` for 0.0."""
    return f"{choice:g}" if isinstance(choice, float) else str(choice)


class BadParameter(ValueError):  # noqa: N818 - it is reported without the name of its class
    """A parameter cannot be searched as the space asks for it."""


class _SuggestOnly(optuna.trial.BaseTrial):
    """The public `suggest_*` methods on top of a single method, `_value`.

    Optuna's FixedTrial would do for a replay, but it only warns of a value out of range.
    """

    def __init__(self) -> None:
        self.asked: dict[str, BaseDistribution] = {}
        self.values: dict[str, Any] = {}

    def _value(self, name: str, distribution: BaseDistribution) -> Any:
        """Return the value of a parameter that is asked for the first time."""
        raise NotImplementedError

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        known = self.asked.setdefault(name, distribution)
        if known != distribution:
            raise BadParameter(
                f"parameter {name!r} is asked for twice: {describe(known)}, then "
                f"{describe(distribution)}"
            )
        if name not in self.values:
            self.values[name] = self._value(name, distribution)
        return self.values[name]

    def suggest_float(
        self,
        name: str,
        low: float,
        high: float,
        *,
        step: float | None = None,
        log: bool = False,
    ) -> float:
        _require_range(name, low, high, step, log, Real)
        distribution = optuna.distributions.FloatDistribution(low, high, log=log, step=step)
        return float(self._suggest(name, distribution))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        _require_range(name, low, high, step, log, Integral)
        distribution = optuna.distributions.IntDistribution(low, high, log=log, step=step)
        return int(self._suggest(name, distribution))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        _require_choices(name, choices)
        return self._suggest(name, CategoricalDistribution(choices))

    # Optuna's base class requires these, too; a search space has no use for them.

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        return self.suggest_float(name, low, high, step=q)

    def report(self, value: float, step: int) -> None:
        raise SpaceError("a search space suggests values; it does not report")

    def should_prune(self) -> bool:
        return False

    def set_user_attr(self, key: str, value: Any) -> None:
        pass

    def set_constraint(self, key: str, value: float) -> None:
        pass

    @property
    def number(self) -> int:
        # A trial's own process replays its values: there, every number would be the same.
        raise BadParameter(
            "trial.number must not decide anything: trials are replayed from their values alone; "
            "let the trial suggest it, as in trial.suggest_int('seed', 0, 4)"
        )

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.values)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return dict(self.asked)

    @property
    def user_attrs(self) -> dict[str, Any]:
        return {}

    @property
    def datetime_start(self) -> None:
        return None


def _require_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise BadParameter(f"a parameter's name must be a string, got {name!r}")


def _require_range(
    name: str, low: float, high: float, step: float | None, log: bool, kind: type
) -> None:
    """Refuse what Optuna would silently change: it clips, rounds and warns."""
    _require_name(name)
    said = f"parameter {name!r} from {low!r} to {high!r}"
    for number in (low, high, 1 if step is None else step):
        is_number = isinstance(number, kind) and not isinstance(number, bool)
        if not is_number or not abs(number) <= sys.float_info.max:  # infinite ones, NaN
            whole = "a whole number" if kind is Integral else "a finite number"
            raise BadParameter(f"{said}: {number!r} is not {whole}")
    if low > high:
        raise BadParameter(f"{said}: the low end is above the high end")
    if log and low <= 0:
        raise BadParameter(f"{said}: with log=True the low end must be above 0")
    if step is None or (log and step == 1):
        return
    if log or step <= 0:
        wrong = "cannot be combined with log=True" if log else "must be above 0"
        raise BadParameter(f"{said}: step={step!r} {wrong}")
    if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        raise BadParameter(f"{said}: step={step!r} does not divide the range")


def _require_choices(name: str, choices: object) -> None:
    _require_name(name)
    # A string would be split into letters, and the order of a set differs between processes.
    listed = list(choices) if isinstance(choices, Reversible) else []
    if isinstance(choices, str) or not listed:
        raise BadParameter(
            f"parameter {name!r}: choices must be a list that is not empty, got {choices!r}"
        )
    for index, choice in enumerate(listed):
        plain = isinstance(choice, str | int | float | bool | None)
        if not plain or (isinstance(choice, float) and not abs(choice) <= sys.float_info.max):
            # The ledger is JSON, which would return something else.
            raise BadParameter(
                f"parameter {name!r}: choice {choice!r} is not a string, finite number, boolean or "
                "None; let the trial choose a name, and look the value up by it"
            )
        same = [other for other in listed[:index] if other == choice]
        if same:  # 1 and True, too: Optuna cannot tell them apart
            raise BadParameter(f"parameter {name!r}: choices {same[0]!r} and {choice!r} are equal")


class ScriptedTrial(_SuggestOnly):
    """Returns given values, refuses those out of range, and records those that are `missing`.

    In place of a missing value the function gets the first choice or the low end, so that
    everything it asks for is known after one call.
    """

    def __init__(self, params: Params, path: Path) -> None:
        super().__init__()
        self._params = params
        self._path = path
        self.missing: dict[str, BaseDistribution] = {}

    def _value(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._params:
            self.missing[name] = distribution
            return _end_of(distribution, "low")
        value = self._params[name]
        try:
            _require_type(value, distribution)
            inside = distribution._contains(distribution.to_internal_repr(value))
        except (ValueError, TypeError):
            inside = False
        if not inside:
            raise SpaceError(f"{self._path}: {name}={value!r}: allowed is {describe(distribution)}")
        if isinstance(distribution, CategoricalDistribution):
            # The choice itself: a member of an enum comes back from JSON as a string equal to it.
            return distribution.choices[int(distribution.to_internal_repr(value))]
        return value


def _require_type(value: object, distribution: BaseDistribution) -> None:
    """Refuse what Optuna would convert: the string '0.5', and True as 1."""
    if isinstance(distribution, CategoricalDistribution):
        return
    whole = isinstance(distribution, optuna.distributions.IntDistribution)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TypeError(value)


class Probe(_SuggestOnly):
    """Takes the wanted choices (by default the first ones), and one end of every range."""

    def __init__(self, wanted: Mapping[str, int], end: Literal["low", "high"]) -> None:
        super().__init__()
        self._wanted = wanted
        self._end = end
        self._chosen: dict[str, int] = {}
        self.config: TrialConfig | None = None

    def choose(self, space: Callable[[optuna.trial.BaseTrial], TrialConfig]) -> dict[str, int]:
        """Call the space; return the index of every categorical choice made."""
        self.config = space(self)
        return self._chosen

    def alternatives(self) -> list[dict[str, int]]:
        """Return every set of choices that differs from this one in a single choice."""
        return [
            {**self._chosen, name: other}
            for name, index in self._chosen.items()
            for other in range(len(self.asked[name].choices))  # type: ignore[attr-defined]
            if other != index
        ]

    def _value(self, name: str, distribution: BaseDistribution) -> Any:
        if isinstance(distribution, CategoricalDistribution):
            self._chosen[name] = self._wanted.get(name, 0)
            return distribution.choices[self._chosen[name]]
        return _end_of(distribution, self._end)


def _end_of(distribution: BaseDistribution, end: Literal["low", "high"]) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0 if end == "low" else -1]
    return getattr(distribution, end)
