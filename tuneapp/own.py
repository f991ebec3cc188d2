"""User-defined networks, losses and schedules, by import path: `package.module:name`.

What a search-space file itself defines is found under the file's name (`own_network:build` in
`own_network.py`), in the text that was executed: a resumed run uses its copy of the file.
"""

import ast
import contextlib
import hashlib
import importlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuneapp.errors import ConfigError, RunError, did_you_mean, say_cause

_LISTED = 10
"""How many names of a module a message lists."""

_spaces: dict[str, types.ModuleType] = {}
_texts: dict[str, tuple[str, Path]] = {}


def offer(name: str, module: types.ModuleType, text: str, path: Path) -> None:
    """Let `name:...` stand for what `module`, an executed space, defines.

    Args:
        name: of the file, without its suffix.
        module: the executed text.
        text: kept so that another process can execute it, too.
        path: where the file is, or was.
    """
    _spaces[name] = module
    _texts[name] = (text, path)


def offered_text(reference: str) -> tuple[str, Path] | None:
    """Return the text and the path of the space that an import path leads to, if it is one."""
    return _texts.get(reference.partition(":")[0])


@contextlib.contextmanager
def offers_kept() -> Iterator[None]:
    """Let what is offered now be what its names stand for in the end, too.

    Meanwhile older texts of a space can be read, which are offered under the same name.
    """
    spaces, texts = {**_spaces}, {**_texts}
    try:
        yield
    finally:
        _spaces.update(spaces)
        _texts.update(texts)
        sys.modules.update({module.__name__: module for module in spaces.values()})


def offered_code(reference: str) -> str | None:
    """Return what decides how the object at an import path works, if a space's text defines it.

    That is its definition and, in turn, the definitions of the same text whose names are used
    there; comments and the layout are left out. A name that no statement of the text binds may come
    from anywhere in it: then it is the whole text.
    """
    offered = offered_text(reference)
    return None if offered is None else _code_of(offered[0], reference.partition(":")[2])


@lru_cache(maxsize=64)
def _code_of(text: str, name: str) -> str:
    statements = [part for statement in ast.parse(text).body for part in _apart(statement)]
    bound = [_bound_names(statement) for statement in statements]
    if not any(name in names for names in bound):
        return text
    reached, waiting = {name, "*"}, [name, "*"]  # what `import *` binds is not known
    while waiting:
        wanted = waiting.pop()
        for statement, names in zip(statements, bound, strict=True):
            if wanted in names:
                new = _mentioned_names(statement) - reached
                reached |= new
                waiting += new
    used = [s for s, names in zip(statements, bound, strict=True) if names & reached]
    return "\n".join(ast.unparse(statement) for statement in used)


def _apart(statement: ast.stmt) -> list[ast.stmt]:
    """Return an import of several names as one import of each."""
    if isinstance(statement, ast.ImportFrom):
        where, level = statement.module, statement.level
        return [ast.ImportFrom(where, [alias], level) for alias in statement.names]
    if isinstance(statement, ast.Import):
        return [ast.Import([alias]) for alias in statement.names]
    return [statement]


def _bound_names(statement: ast.stmt) -> set[str]:
    """Return the names that a statement of a module binds, or whose objects it may change.

    `TABLE["a"] = 1` and `TABLE.update(a=1)` count for TABLE as its first assignment does.
    """
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    names = set()
    for node in ast.walk(statement):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.alias():
                names.add(node.asname or node.name.partition(".")[0])
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Subscript(ctx=ast.Store()) | ast.Attribute(ctx=ast.Store()) | ast.Expr():
                names |= _mentioned_names(node)
    return names


def _mentioned_names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def import_from(folders: Iterable[str]) -> None:
    """Let modules in these folders be imported, after all that could be imported before."""
    sys.path += [folder for folder in folders if folder not in sys.path]


def find_own(reference: str, field: str) -> Any:
    """Return the object at an import path.

    Args:
        reference: such as `package.module:name`.
        field: in which it was written, for errors.

    Raises:
        ConfigError: there is no such module, it cannot be imported, or it has no such function.
    """
    module_name, _, name = reference.partition(":")
    module = _spaces.get(module_name)
    if module is None:
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # SystemExit: a script that runs on import
            cause = f"cannot import {module_name}: {say_cause(error)}"
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{module_name}.".startswith(f"{missing}."):
                cause = (
                    f"cannot import {module_name}: no module named {missing!r}; it must be "
                    "importable from the working directory, or be beside the search space"
                )
            raise ConfigError(f"{field} {reference!r}: {cause}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"{field} {reference!r}: {_say_lack(module, module_name, name)}")
    return found


def _say_lack(module: types.ModuleType, module_name: str, name: str) -> str:
    """Say that a module has no function `name`, and which ones it has."""
    if hasattr(module, name):
        kind = type(getattr(module, name)).__name__
        article = "an" if kind[0].lower() in "aeiou" else "a"
        return f"{module_name}.{name} is {article} {kind}, not a function"
    callables = {n: v for n, v in vars(module).items() if callable(v) and not n.startswith("_")}
    hint = did_you_mean(name, callables)
    # What it only imports is not meant, unless it has nothing else.
    own = [n for n, v in callables.items() if getattr(v, "__module__", None) == module.__name__]
    known = own or list(callables)
    if not known:
        return f"{module_name} has no {name}; it defines no function"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"{module_name} has no {name}{hint}; it has {', '.join(known[:_LISTED])}{more}"


def fingerprints(references: Iterable[str], folders: Iterable[str]) -> dict[str, str]:
    """Return the files of user-defined code that are in use, with their SHA-256.

    Args:
        references: import paths; what a space's text defines has no file here.
        folders: modules imported from these count too, except those that are installed there.
    """
    files = {file for reference in references if (file := _file_of(reference)) is not None}
    places = [Path(folder).resolve() for folder in folders]
    installed = [Path(__file__).parent, *(Path(p).resolve() for p in (sys.prefix, sys.base_prefix))]
    for module in list(sys.modules.values()):
        if any(module is space for space in _spaces.values()):
            continue  # its text is saved with the run
        named = getattr(module, "__file__", None)
        file = Path(named).resolve() if named else None
        if file is None or file.suffix != ".py" or not file.is_file():
            continue
        own = any(place in file.parents for place in places)
        if own and not any(place in file.parents for place in installed):
            files.add(file)
    return {str(file): _sha256(file) for file in sorted(files)}


def _file_of(reference: str) -> Path | None:
    """Return the file that an import path leads to; None for a space's own text."""
    module_name = reference.partition(":")[0]
    if module_name in _spaces:
        return None
    file = getattr(importlib.import_module(module_name), "__file__", None)
    return None if file is None else Path(file).resolve()


def require_same_code(code: Mapping[str, str], references: Iterable[str] = ()) -> None:
    """Check that user-defined code is unchanged since the run began.

    Args:
        code: file -> its SHA-256.
        references: import paths that must lead to one of these files.

    Raises:
        RunError: a file is missing or has changed, or another file of its name is imported.
    """
    for file, sha256 in code.items():
        try:
            same = _sha256(Path(file)) == sha256
        except OSError as error:
            raise RunError(f"{file}, which this run uses, cannot be read: {error}") from None
        if not same:
            raise RunError(
                f"{file} has changed since this run began; restore it, or begin a new run"
            )
    for reference in references:
        imported = _file_of(reference)
        namesakes = [file for file in code if imported and Path(file).name == imported.name]
        if namesakes and str(imported) not in code:
            raise RunError(
                f"{reference!r} is imported from {imported} now, and was imported from "
                f"{namesakes[0]} when this run began; resume from the same folder, or rename one "
                "of the two"
            )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
