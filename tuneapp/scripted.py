"""Trials that answer from a script instead of a sampler: to replay and to probe a space.

They are Optuna trials to the space's function, and remember what it asked for.
"""

from collections.abc import Callable, Mapping, Sequence
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
        return " | ".join(map(str, distribution.choices))
    low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
    whole = isinstance(distribution, optuna.distributions.IntDistribution)
    log = ", log" if distribution.log else ""  # type: ignore[attr-defined]
    return f"{low:g} to {high:g}{', whole' if whole else ''}{log}"


class _SuggestOnly(optuna.trial.BaseTrial):
    """The public `suggest_*` methods over one method of ours, `_value`.

    Optuna's FixedTrial would do for a replay, but it only warns of a value out of range.
    """

    number = 0

    def __init__(self) -> None:
        self.asked: dict[str, BaseDistribution] = {}
        self.values: dict[str, Any] = {}

    def _value(self, name: str, distribution: BaseDistribution) -> Any:
        """Return the answer to the first question for `name`; each kind of script has its own."""
        raise NotImplementedError

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        known = self.asked.setdefault(name, distribution)
        if known != distribution:
            raise SpaceError(
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
        distribution = optuna.distributions.FloatDistribution(low, high, log=log, step=step)
        return float(self._suggest(name, distribution))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        distribution = optuna.distributions.IntDistribution(low, high, log=log, step=step)
        return int(self._suggest(name, distribution))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        odd = [c for c in choices if not isinstance(c, str | int | float | bool | None)]
        if odd:  # the ledger is JSON, which would give back something else
            raise SpaceError(
                f"parameter {name!r}: choice {odd[0]!r} is not a text, number, boolean or None; "
                "choose a name, and look the value up by it"
            )
        return self._suggest(name, CategoricalDistribution(choices))

    # Optuna's base class wants these too; a search space has no use for them.

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


class ScriptedTrial(_SuggestOnly):
    """Answers with given values, and refuses what is out of range or (without `fill`) missing."""

    def __init__(self, params: Params, path: Path, fill: bool) -> None:
        super().__init__()
        self._params = params
        self._path = path
        self._fill = fill

    def _value(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._params:
            if self._fill:
                return _end_of(distribution, "low")
            raise SpaceError(
                f"{self._path}: no value for {name!r} ({describe(distribution)}); "
                f"give it, as in --set {name}=..."
            )
        value = self._params[name]
        try:
            _require_type(value, distribution)
            inside = distribution._contains(distribution.to_internal_repr(value))
        except (ValueError, TypeError):
            inside = False
        if not inside:
            raise SpaceError(f"{self._path}: {name}={value!r}: allowed is {describe(distribution)}")
        return value


def _require_type(value: object, distribution: BaseDistribution) -> None:
    """Optuna takes the text '0.5' for a number, and True for 1."""
    if isinstance(distribution, CategoricalDistribution):
        return
    whole = isinstance(distribution, optuna.distributions.IntDistribution)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TypeError(value)


class Probe(_SuggestOnly):
    """Takes the wanted choices (else the first ones), and one end of every range."""

    def __init__(self, wanted: Mapping[str, int], end: Literal["low", "high"]) -> None:
        super().__init__()
        self._wanted = wanted
        self._end = end
        self._chosen: dict[str, int] = {}
        self.config: TrialConfig | None = None

    def choose(self, space: Callable[[optuna.trial.BaseTrial], TrialConfig]) -> dict[str, int]:
        """Run the space through; return the index of every categorical choice made."""
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
