"""Read, call, replay and probe a search-space file.

A search-space file is Python with one function, `search_space(trial) -> TrialConfig`, and a list
`FIRST_TRIALS` of parameter values that are tried first. It is kept as its source text: the run
directory gets a copy, trials read that copy, and nothing depends on the file staying unchanged.

Imports Optuna, but neither torch nor Ray.
"""

import contextlib
import inspect
import re
import sys
import traceback
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from tuneapp import config as config_names
from tuneapp.config import Data, TrialConfig
from tuneapp.errors import ConfigError, SpaceError, did_you_mean
from tuneapp.own import import_from, offer
from tuneapp.scripted import (
    BadParameter,
    Params,
    Probe,
    ScriptedTrial,
    describe,
    spell,
)

MAX_PROBED_BRANCHES = 512
"""Sets of categorical choices that are tried before a sweep; single choices come first."""
_SIGNATURE = "`def search_space(trial: Trial) -> TrialConfig`"
_SUGGEST = ("suggest_float", "suggest_int", "suggest_categorical")
_TYPO_CUTOFF = 0.86
"""How similar a name must be to FIRST_TRIALS or DATA to be a typo: FIRST_TRAIL is, DATE is not."""


@dataclass(frozen=True)
class Branch:
    """One way through a search space, with every numeric parameter at one end of its range."""

    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    config: TrialConfig


@dataclass(frozen=True)
class Parameter:
    """What `show` prints about one parameter."""

    name: str
    allowed: str
    condition: str


class SearchSpace:
    """A search-space file: call it with an Optuna trial to get the trial's configuration."""

    def __init__(self, text: str, path: Path) -> None:
        """Execute the file's text.

        Args:
            text: of the file, or of a copy of it.
            path: where the file itself is, or was: its `__file__` and its name in errors.

        Raises:
            SpaceError: it does not run, or lacks a `search_space` function.
        """
        self.text = text
        self.path = path
        module = types.ModuleType(f"search_space_{path.stem}")
        sys.modules[module.__name__] = module  # where dataclasses look up their annotations
        module.__file__ = str(path)
        import_from([str(path.parent.absolute())])
        try:
            with _output_to_stderr():
                exec(compile(text, str(path), "exec"), module.__dict__)  # noqa: S102 - it is code
        except (Exception, SystemExit) as error:
            raise SpaceError(f"{_place(error, path)}: {_say(error)}") from error
        offer(path.stem, module, text, path)
        self._function = getattr(module, "search_space", None)
        if not callable(self._function):
            raise SpaceError(
                f"{path}: no function `search_space`; a search space is a file with {_SIGNATURE}"
            )
        _require_signature(self._function, path)
        self._constants = {n: value for n, value in vars(module).items() if n.isupper()}
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
            if path.is_dir():
                files = ", ".join(_space_files(path)) or "it has none that ends in .py"
                raise SpaceError(f"{path}: is a folder; give a file in it: {files}")
            if path.suffix != ".py" and path.exists():
                raise SpaceError(f"{path}: not a search space: its name does not end in .py")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            hint = did_you_mean(path.name, _space_files(path.parent))
            raise SpaceError(f"{path}: no such search-space file{hint}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpaceError(f"{path}: cannot be read as a search space: {error}") from None
        return cls(text, path)

    @property
    def name(self) -> str:
        """The file's name without its extension."""
        return self.path.stem

    def __call__(self, trial: optuna.trial.BaseTrial) -> TrialConfig:
        """Return the configuration that `trial`'s suggestions stand for.

        Raises:
            SpaceError: the file's function fails, or returns something other than a TrialConfig.
            ConfigError: it builds a configuration with a value that is not allowed.
        """
        assert callable(self._function)
        try:
            with _output_to_stderr():
                config = self._function(trial)
        except SpaceError:
            raise
        except (Exception, SystemExit) as error:
            kind = ConfigError if isinstance(error, ConfigError) else SpaceError
            place = _place(error, self.path)
            raise kind(f"{place}: {_say(error)}{_branch_taken(trial)}") from error
        if not isinstance(config, TrialConfig):
            returned = "None" if config is None else type(config).__name__
            hint = "a missing return?" if config is None else "end it with return TrialConfig(...)"
            raise SpaceError(
                f"{self.path}: search_space returned {returned}, not a TrialConfig ({hint})"
            )
        return config

    def config(self, params: Params) -> TrialConfig:
        """Return the configuration of these parameter values, all of which must be used.

        Raises:
            SpaceError: a value is missing, out of range, or not asked for.
        """
        return self.replay(params).config

    def replay(self, params: Params) -> Branch:
        """Like `config`, but return the distributions of the parameters, too."""
        branch = self.covered(params)
        unused = [name for name in params if name not in branch.distributions]
        if unused:
            hint = did_you_mean(unused[0], branch.distributions)
            raise SpaceError(
                f"{self.path}: never asks for {unused[0]!r} here{hint}; "
                f"it asks for {', '.join(branch.distributions)}"
            )
        return branch

    def covered(self, params: Params) -> Branch:
        """Like `replay`, but ignore values that this space does not ask for."""
        branch, missing = self._attempt(params)
        if branch is None:
            flags = " ".join(f"--set {name}=..." for name in missing)
            raise SpaceError(
                f"{self.path}: no value for {_ranges(missing)}; give "
                f"{'it' if len(missing) == 1 else 'them'}, as in {flags}"
            )
        return branch

    def check_recipes(self, branches: Sequence[Branch]) -> None:
        """Check FIRST_TRIALS: known names, allowed values, none missing.

        Args:
            branches: of this space, as `branches()` returns them.

        Raises:
            SpaceError: some recipe is wrong, or FIRST_TRIALS or DATA is misspelled.
        """
        self._refuse_typos()
        known = {name: d for branch in branches for name, d in branch.distributions.items()}
        for number, params in enumerate(self.first_trials, start=1):
            try:
                self._check_recipe(params, known)
            except (SpaceError, ConfigError) as error:
                said = str(error).removeprefix(f"{self.path}: ")
                if said.startswith(f"{self.path}:"):
                    said = f"line {said.removeprefix(f'{self.path}:')}"
                raise SpaceError(f"{self.path}: FIRST_TRIALS, number {number}: {said}") from None

    def _check_recipe(self, params: Params, known: Mapping[str, BaseDistribution]) -> None:
        asked = {**known, **self._asked_with(params)}
        unknown = [name for name in params if name not in asked]
        if unknown:
            hint = did_you_mean(unknown[0], known)
            raise SpaceError(
                f"{unknown[0]!r} is not a parameter{hint}; there are {', '.join(known)}"
            )
        branch, missing = self._attempt(params)
        if branch is None:
            raise SpaceError(
                f"has no value for {_ranges(missing)}; a recipe names every parameter that its "
                "branch asks for"
            )
        self.replay(params)

    def _asked_with(self, params: Params) -> dict[str, BaseDistribution]:
        """Return what the function asks for, given some values.

        `branches` tries the ends of ranges only: what is asked for in between is not in them.
        """
        trial = ScriptedTrial(params, self.path)
        with contextlib.suppress(SpaceError, ConfigError):  # other callers will tell
            self(trial)
        return trial.asked

    def _refuse_typos(self) -> None:
        """Refuse a constant that seems meant as FIRST_TRIALS or DATA, which would be ignored."""
        for wanted, kinds in (("FIRST_TRIALS", (list, tuple, dict)), ("DATA", (Data, str))):
            if wanted in self._constants:
                continue
            suspects = [name for name, value in self._constants.items() if isinstance(value, kinds)]
            near = get_close_matches(wanted, suspects, n=1, cutoff=_TYPO_CUTOFF)
            if near:
                raise SpaceError(f"{self.path}: {near[0]} is not used; did you mean {wanted}?")

    def _attempt(self, params: Params) -> tuple[Branch | None, dict[str, BaseDistribution]]:
        """Call the space with these values; return the branch, or what is missing for one.

        Raises:
            SpaceError: a value is out of range, or the function fails with complete values.
            ConfigError: complete values build a configuration that is not allowed.
        """
        trial = ScriptedTrial(params, self.path)
        try:
            config = self(trial)
        except (SpaceError, ConfigError):
            if not trial.missing:
                raise
        else:
            if not trial.missing:
                return Branch(trial.values, trial.asked, config), {}
        return None, self._always_missing(params, trial)

    def _always_missing(self, params: Params, trial: ScriptedTrial) -> dict[str, BaseDistribution]:
        """Return what is missing whichever way the missing choices are made."""
        missing = dict(trial.missing)
        for name, distribution in trial.missing.items():
            if not isinstance(distribution, CategoricalDistribution):
                continue
            for choice in distribution.choices[1:]:
                other = ScriptedTrial({**params, name: choice}, self.path)
                with contextlib.suppress(SpaceError, ConfigError):
                    self(other)
                    needed = {name, *other.missing}
                    missing = {n: d for n, d in missing.items() if n in needed}
        return missing

    def choose(self, chosen: Mapping[str, str], base: Params | None = None) -> dict[str, Any]:
        """Return complete parameter values, those that the user has set among them.

        Args:
            chosen: parameter to text, as in `--set name=text`.
            base: where all others come from; None takes the first recipe that agrees with
                `chosen`.

        Raises:
            SpaceError: a name is unknown, a text is not an allowed value, or a value is missing.
        """
        recipes: list[Params] = [*self.first_trials] if base is None else [base]
        values, known = self._parsed(chosen, recipes)

        def disagreements(recipe: Params) -> int:
            return sum(
                isinstance(known[name], CategoricalDistribution) and recipe.get(name) != value
                for name, value in values.items()
            )

        errors: list[SpaceError] = []
        for recipe in sorted(recipes or [{}], key=disagreements):
            try:
                return self._with_values(recipe, values)
            except SpaceError as error:
                errors.append(error)
        raise errors[0]

    def _with_values(self, base: Params, values: Params) -> dict[str, Any]:
        branch = self.covered({**base, **values})
        unused = [name for name in values if name not in branch.distributions]
        if unused:
            raise SpaceError(
                f"--set {unused[0]}: not asked for with the other values; "
                f"{self.path} asks for {', '.join(branch.distributions)}"
            )
        return branch.params

    def _parsed(
        self, chosen: Mapping[str, str], recipes: Sequence[Params]
    ) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Return what `--set` means, and every parameter that may be meant."""
        known = {n: d for branch in self.branches() for n, d in branch.distributions.items()}
        if not chosen.keys() <= known.keys():
            sure = {n: parse_value(n, text, known[n]) for n, text in chosen.items() if n in known}
            for recipe in recipes or [{}]:
                known = {**self._asked_with({**recipe, **sure}), **known}
        for name in chosen:
            if name in known:
                continue
            hint = did_you_mean(name, known)
            if name in {field.name for field in fields(TrialConfig)}:
                hint = (
                    f"; its function sets {name}, so edit it there (for fewer epochs or another "
                    "image size give --epochs N or --image-size PIXELS)"
                )
            raise SpaceError(
                f"--set {name}: {self.path} has no such parameter{hint}; it has {', '.join(known)}"
            )
        return {n: parse_value(n, text, known[n]) for n, text in chosen.items()}, known

    def branches(self) -> list[Branch]:
        """Try each set of categorical choices, with all numbers low and then high.

        Raises:
            SpaceError: a branch fails, a name has two meanings, or the file is not repeatable.
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
            if not seen:  # before collisions: random ranges would look like one
                self._require_repeatable(low.asked)
            seen.add(path)
            for probe in (low, high):
                assert probe.config is not None
                self._refuse_collisions(meanings, probe.asked)
                found.append(Branch(probe.values, probe.asked, probe.config))
            waiting.extend([*low.alternatives(), *high.alternatives()])
        return found

    def _require_repeatable(self, asked: Mapping[str, BaseDistribution]) -> None:
        """Refuse a file that differs each time it is read: every trial reads it again."""
        again = Probe({}, "low")
        again.choose(SearchSpace(self.text, self.path))
        for name in {**asked, **again.asked}:
            said = [
                "nothing" if name not in one else describe(one[name])
                for one in (asked, again.asked)
            ]
            if said[0] != said[1]:
                raise SpaceError(
                    f"{self.path}: parameter {name!r} is {said[0]} when the file is read, and "
                    f"{said[1]} when it is read again; leave clocks and random numbers out of it"
                )

    def parameters(self) -> list[Parameter]:
        """Return every parameter once, with its range and the choices under which it is asked."""
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
        SpaceError: the text is not an allowed value.
    """
    if isinstance(distribution, CategoricalDistribution):
        for choice in distribution.choices:
            if text in (str(choice), spell(choice)):
                return choice
        for choice in distribution.choices:
            if isinstance(choice, int | float) and not isinstance(choice, bool):
                with contextlib.suppress(ValueError):
                    if float(text) == choice:  # 1e-3 is 0.001
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
    """Return the choices that are always made where the parameter is asked for."""
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


def difference(inside: Sequence[Params], everywhere: Sequence[Params]) -> str:
    """Return the values that some branches share and not all have, as ` (with name=value)`.

    Args:
        inside: parameter values of the branches in question.
        everywhere: those of all branches.
    """
    first = inside[0]
    shared = {n: v for n, v in first.items() if all(n in p and p[n] == v for p in inside)}
    return _with_params(
        {n: v for n, v in shared.items() if not all(n in p and p[n] == v for p in everywhere)}
    )


def _branch_taken(trial: optuna.trial.BaseTrial) -> str:
    """Return the values of a trial, as ` (with name=value)`, if there are other branches."""
    choices = [d for d in trial.distributions.values() if isinstance(d, CategoricalDistribution)]
    return _with_params(trial.params) if any(len(d.choices) > 1 for d in choices) else ""


def _with_params(params: Params) -> str:
    shown = " ".join(
        f"{name}={f'{value:.6g}' if isinstance(value, float) else value}"
        for name, value in params.items()
    )
    return f" (with {shown})" if shown else ""


def _ranges(distributions: Mapping[str, BaseDistribution]) -> str:
    return ", ".join(f"{name!r} ({describe(d)})" for name, d in distributions.items())


def _space_files(folder: Path) -> list[str]:
    """Return the names of the Python files in a folder; none if it does not exist."""
    return sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []


def _require_signature(function: Callable[..., object], path: Path) -> None:
    """Refuse a function that cannot be called with a trial alone."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise SpaceError(
            f"{path}: search_space must take the trial and nothing else: {_SIGNATURE}"
        ) from None
    except ValueError:  # it has no signature that can be read
        return


def _output_to_stderr() -> contextlib.AbstractContextManager[object]:
    """Send what a space prints to stderr: stdout is for the command's own output."""
    return contextlib.redirect_stdout(sys.stderr)


def _place(error: BaseException, path: Path) -> str:
    """Return `file:line` of the last frame of `error` that lies in the space file."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _say(error: BaseException) -> str:
    """Return an error of the space's code in one line, without internal names of ours."""
    if isinstance(error, BadParameter | ConfigError):
        return str(error)
    if isinstance(error, SystemExit):
        return f"it ends the program (SystemExit: {error}); a search space only says what to try"
    if isinstance(error, ImportError) and error.name == config_names.__name__:
        said = error.msg.split(" (")[0]
        wanted = said.split("'")[1]
        return f"{said}{did_you_mean(wanted, _choices())}; it has {', '.join(_choices())}"
    ours = _say_call(error) if isinstance(error, TypeError) else _say_trial(error)
    if ours is not None:
        return ours
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(said.split())}"  # one line


def _say_call(error: TypeError) -> str | None:
    """Explain a wrong call of one of our classes, or of a method of the trial."""
    found = re.match(r"(\w+)\.(\w+)\(\) (.*)", str(error))
    if found is None:
        return None
    owner, method, problem = found.groups()
    if owner in {kind.__name__ for kind in Probe.__mro__}:
        parameters = list(inspect.signature(getattr(Probe, method)).parameters.values())[1:]
        known = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        known = known or [p.name for p in parameters]
        return _wrong_argument(f"trial.{method}", known, problem) or f"trial.{method}: {problem}"
    kind = getattr(config_names, owner, None)
    if method != "__init__" or kind is None:
        return None
    known = [field.name for field in fields(kind)]
    if problem.startswith("missing"):
        missing = re.findall(r"'(\w+)'", problem)
        return f"{owner} needs {', '.join(missing)}"
    if "positional argument" in problem:
        return f"{owner} takes its fields by name: {owner}({known[0]}=...)"
    return _wrong_argument(owner, known, problem)


def _wrong_argument(called: str, known: Sequence[str], problem: str) -> str | None:
    found = re.match(r"got an unexpected keyword argument '(\w+)'", problem)
    if found is None:
        return None
    return f"{called} has no {found[1]}{did_you_mean(found[1], known)}; it has {', '.join(known)}"


def _say_trial(error: BaseException) -> str | None:
    """Explain a method that a trial does not have."""
    if not isinstance(error, AttributeError) or not isinstance(error.obj, Probe | ScriptedTrial):
        return None
    hint = did_you_mean(str(error.name), _SUGGEST) or f"; it has {', '.join(_SUGGEST)}"
    return f"trial has no {error.name}{hint}"


def _choices() -> list[str]:
    """Return the classes that a space can import."""
    return [name for name in config_names.__all__ if isinstance(getattr(config_names, name), type)]
