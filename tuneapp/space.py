"""Read, call, replay and probe a search-space file.

A search-space file is Python with one function, `search_space(trial) -> TrialConfig`, and a list
`FIRST_TRIALS` of parameter values that are tried first. It is kept as its source text: the run
directory gets a copy, trials read that copy, and nothing depends on the file staying as it was.

Imports Optuna, and neither torch nor Ray.
"""

import contextlib
import re
import sys
import traceback
import types
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from tuneapp import config as config_names
from tuneapp.config import Data, TrialConfig
from tuneapp.errors import ConfigError, SpaceError, did_you_mean
from tuneapp.own import import_from, offer
from tuneapp.scripted import BadParameter, Params, Probe, ScriptedTrial, describe

MAX_PROBED_BRANCHES = 512
"""Sets of categorical choices that are tried before a sweep; single choices come first."""


@dataclass(frozen=True)
class Branch:
    """One way through a search space, with every numeric parameter at one end of its range."""

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    config: TrialConfig


@dataclass(frozen=True)
class Parameter:
    """What `show` tells of one parameter."""

    name: str
    allowed: str
    condition: str


class SearchSpace:
    """A search-space file: call it with an Optuna trial to get the trial's configuration."""

    def __init__(self, text: str, path: Path) -> None:
        """Execute the file's text.

        Args:
            text: of the file, or of a copy of it.
            path: where the file itself is, or was: its `__file__`, its name, told in errors.

        Raises:
            SpaceError: it does not run, or lacks a `search_space` function.
        """
        self.text = text
        self.path = path
        module = types.ModuleType(f"search_space_{path.stem}")
        sys.modules[module.__name__] = module  # where dataclasses look for their annotations
        module.__file__ = str(path)
        import_from([str(path.parent.absolute())])
        try:
            with _apart():
                exec(compile(text, str(path), "exec"), module.__dict__)  # noqa: S102 - it is code
        except (Exception, SystemExit) as error:
            raise SpaceError(f"{_place(error, path)}: {_say(error)}") from error
        offer(path.stem, module, text, path)
        self._function = getattr(module, "search_space", None)
        if not callable(self._function):
            raise SpaceError(
                f"{path}: no function `search_space`; a search space is a file with "
                "`def search_space(trial: Trial) -> TrialConfig`"
            )
        self.summary = ((module.__doc__ or "").strip().splitlines() or [""])[0]
        self.first_trials = self._read_first_trials(getattr(module, "FIRST_TRIALS", []))
        self.data = self._read_data(getattr(module, "DATA", Data()))

    @classmethod
    def read(cls, path: Path) -> "SearchSpace":
        """Read the search-space file at `path`.

        Raises:
            SpaceError: there is no such file, or it is not a search space.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            beside = (
                sorted(p.name for p in path.parent.glob("*.py")) if path.parent.exists() else []
            )
            hint = did_you_mean(path.name, beside)
            raise SpaceError(f"{path}: no such search-space file{hint}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpaceError(f"{path}: cannot be read as a search space: {error}") from None
        return cls(text, path)

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def __call__(self, trial: optuna.trial.BaseTrial) -> TrialConfig:
        """Return the configuration that `trial`'s suggestions stand for.

        Raises:
            SpaceError: the file's function fails, or returns something else than a TrialConfig.
        """
        assert callable(self._function)
        try:
            with _apart():
                config = self._function(trial)
        except (SpaceError, ConfigError):
            raise
        except (Exception, SystemExit) as error:
            raise SpaceError(f"{_place(error, self.path)}: {_say(error)}") from error
        if not isinstance(config, TrialConfig):
            raise SpaceError(
                f"{self.path}: search_space returned {type(config).__name__}, not a TrialConfig"
            )
        return config

    def config(self, params: Params) -> TrialConfig:
        """Return the configuration of these parameter values, all of which must be used.

        Raises:
            SpaceError: a value is missing, out of range, or asked for by no suggestion.
        """
        return self.replay(params).config

    def replay(self, params: Params) -> Branch:
        """Like `config`, with the distributions of the parameters beside it."""
        return self._run_script(params, fill=False)

    def covered(self, params: Params) -> Branch:
        """Like `replay`, leaving out the values that this space does not ask for."""
        trial = ScriptedTrial(params, self.path, fill=False)
        config = self(trial)
        return Branch(trial.values, trial.asked, config)

    def complete(self, params: Params) -> Branch:
        """Like `replay`, taking the first choice and the low end for each value that is missing."""
        return self._run_script(params, fill=True)

    def override(self, base: Params, chosen: Mapping[str, str]) -> dict[str, Any]:
        """Return `base` with the values that the user has written, and only what they ask for.

        Args:
            base: complete values, such as a recipe's.
            chosen: parameter to text, as in `--set name=text`.

        Raises:
            SpaceError: a name is unknown, a text is no allowed value, or a value is missing.
        """
        known = {n: d for branch in self.branches() for n, d in branch.distributions.items()}
        for name in chosen:
            if name not in known:
                hint = did_you_mean(name, known)
                raise SpaceError(
                    f"--set {name}: {self.path} has no such parameter{hint}; it has "
                    f"{', '.join(known)}"
                )
        values = {name: parse_value(name, text, known[name]) for name, text in chosen.items()}
        trial = ScriptedTrial({**base, **values}, self.path, fill=False)
        self(trial)
        unused = [name for name in chosen if name not in trial.asked]
        if unused:
            raise SpaceError(
                f"--set {unused[0]}: not asked for beside the other values; "
                f"{self.path} asks for {', '.join(trial.asked)}"
            )
        return trial.values

    def _run_script(self, params: Params, *, fill: bool) -> Branch:
        trial = ScriptedTrial(params, self.path, fill)
        config = self(trial)
        unused = [name for name in params if name not in trial.asked]
        if unused:
            hint = did_you_mean(unused[0], trial.asked)
            raise SpaceError(
                f"{self.path} never asks for {unused[0]!r} here{hint}; "
                f"it asks for {', '.join(trial.asked)}"
            )
        return Branch(trial.values, trial.asked, config)

    def branches(self) -> list[Branch]:
        """Try each set of categorical choices, with all numbers low and then high.

        Raises:
            SpaceError: a branch fails, or one name has two meanings.
            ConfigError: a branch builds a configuration that is not allowed.
        """
        found: list[Branch] = []
        meanings: dict[str, BaseDistribution] = {}
        seen: set[tuple[tuple[str, int], ...]] = set()
        waiting: deque[dict[str, int]] = deque([{}])
        while waiting and len(seen) < MAX_PROBED_BRANCHES:
            wanted = waiting.popleft()
            low, high = Probe(wanted, "low"), Probe(wanted, "high")
            path = tuple(sorted({**low.choose(self), **high.choose(self)}.items()))
            if path in seen:
                continue
            seen.add(path)
            for probe in (low, high):
                assert probe.config is not None
                self._refuse_collisions(meanings, probe.asked)
                found.append(Branch(probe.values, probe.asked, probe.config))
            waiting.extend([*low.alternatives(), *high.alternatives()])
        self._require_repeatable(found[0])
        return found

    def _require_repeatable(self, branch: Branch) -> None:
        """Refuse a file that means something else each time: every trial reads it anew."""
        again = Probe({}, "low")
        again.choose(SearchSpace(self.text, self.path))
        for name in {**branch.distributions, **again.asked}:
            said = [
                "nothing" if name not in asked else describe(asked[name])
                for asked in (branch.distributions, again.asked)
            ]
            if said[0] != said[1]:
                raise SpaceError(
                    f"{self.path}: parameter {name!r} is {said[0]} when the file is read, and "
                    f"{said[1]} when it is read again; leave clocks and random numbers out of it"
                )

    def parameters(self) -> list[Parameter]:
        """Return every parameter once, with its range and the choices that bring it up."""
        branches = self.branches()
        distributions = {n: d for b in branches for n, d in b.distributions.items()}
        return [
            Parameter(name, describe(distribution), _condition(name, branches, distributions))
            for name, distribution in distributions.items()
        ]

    def _refuse_collisions(
        self, meanings: dict[str, BaseDistribution], asked: Mapping[str, BaseDistribution]
    ) -> None:
        for name, distribution in asked.items():
            known = meanings.setdefault(name, distribution)
            if known != distribution:
                raise SpaceError(
                    f"{self.path}: parameter {name!r} is {describe(known)} in one branch and "
                    f"{describe(distribution)} in another; give each branch its own name, such as "
                    f"'sgd.{name}' and 'adamw.{name}'"
                )

    def _read_data(self, given: object) -> Data:
        if not isinstance(given, Data):
            raise SpaceError(
                f"{self.path}: DATA must be a Data from tuneapp.config, got {given!r}; such as "
                "DATA = Data(source='photos/')"
            )
        return given

    def _read_first_trials(self, listed: object) -> list[dict[str, Any]]:
        ok = isinstance(listed, Sequence) and all(isinstance(p, Mapping) for p in listed)
        if not ok:
            raise SpaceError(f"{self.path}: FIRST_TRIALS must be a list of dicts name -> value")
        return [dict(params) for params in listed]  # type: ignore[attr-defined]


def parse_value(name: str, text: str, distribution: BaseDistribution) -> Any:
    """Return what `--set name=text` means for a parameter of this distribution.

    Raises:
        SpaceError: the text is no allowed value.
    """
    if isinstance(distribution, CategoricalDistribution):
        for choice in distribution.choices:
            if str(choice) == text:
                return choice
    else:
        try:
            whole = isinstance(distribution, optuna.distributions.IntDistribution)
            return int(text) if whole else float(text)
        except ValueError:
            pass
    raise SpaceError(f"--set {name}={text}: allowed is {describe(distribution)}")


def _condition(
    name: str, branches: Sequence[Branch], distributions: Mapping[str, BaseDistribution]
) -> str:
    """Say which choices bring the parameter up: those that are always made where it is asked."""
    inside = [b.params for b in branches if name in b.params]
    parts = []
    for other, distribution in distributions.items():
        if other == name or not isinstance(distribution, CategoricalDistribution):
            continue
        made = {b[other] for b in inside if other in b}
        all_made = {b.params[other] for b in branches if other in b.params}
        if all(other in b for b in inside) and made < all_made:
            parts.append(f"{other} = {' | '.join(sorted(map(str, made)))}")
    return " and ".join(parts)


def _apart() -> contextlib.AbstractContextManager[object]:
    """Send what a space prints to stderr: stdout is for what the command was asked."""
    return contextlib.redirect_stdout(sys.stderr)


def _place(error: BaseException, path: Path) -> str:
    """Return `file:line` of the last step of `error` that lies in the space file."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _say(error: BaseException) -> str:
    if isinstance(error, BadParameter):
        return str(error)
    if isinstance(error, SystemExit):
        return f"it ends the program (SystemExit: {error}); a search space only says what to try"
    if isinstance(error, ImportError) and error.name == config_names.__name__:
        said = error.msg.split(" (")[0]
        wanted = said.split("'")[1]
        return f"{said}{did_you_mean(wanted, _choices())}; it has {', '.join(_choices())}"
    if isinstance(error, TypeError) and (of_field := _say_field(error)) is not None:
        return of_field
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(said.split())}"  # one line


def _say_field(error: TypeError) -> str | None:
    """Name the fields of one of our classes that was called with another."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kind = getattr(config_names, found[1], None) if found else None
    if found is None or kind is None:
        return None
    known = [field.name for field in fields(kind)]
    return f"{found[1]} has no {found[2]}{did_you_mean(found[2], known)}; it has {', '.join(known)}"


def _choices() -> list[str]:
    """Return the classes that a space can import."""
    return [name for name in config_names.__all__ if isinstance(getattr(config_names, name), type)]
