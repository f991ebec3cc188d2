"""Networks, losses and schedules of the user's own, by import path: `package.module:name`.

What a search-space file defines itself is found under the file's name (`own_network:build` in
`own_network.py`), in the text that was executed: a run that goes on uses its copy of the file.
"""

import hashlib
import importlib
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuneapp.errors import ConfigError, RunError, did_you_mean

_spaces: dict[str, types.ModuleType] = {}
_texts: dict[str, tuple[str, Path]] = {}


def offer(name: str, module: types.ModuleType, text: str, path: Path) -> None:
    """Let `name:...` stand for what `module`, an executed space, defines.

    Args:
        name: the file's, without ending.
        module: the executed text.
        text: so that another process can execute it, too.
        path: where the file is, or was.
    """
    _spaces[name] = module
    _texts[name] = (text, path)


def offered_text(reference: str) -> tuple[str, Path] | None:
    """Return the text and the path of the space that an import path leads to, if it is one."""
    return _texts.get(reference.partition(":")[0])


def import_from(folders: Iterable[str]) -> None:
    """Let modules in these folders be imported, after everything that could be before."""
    sys.path += [folder for folder in folders if folder not in sys.path]


def find_own(reference: str, field: str) -> Any:
    """Return the object at an import path.

    Args:
        reference: such as `package.module:name`.
        field: where it was written, for errors.

    Raises:
        ConfigError: there is no such module, it cannot be imported, or has no such name.
    """
    module_name, _, name = reference.partition(":")
    module = _spaces.get(module_name)
    if module is None:
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # a script, too, that runs when it is imported
            said = " ".join(str(error).split())  # one line
            raise ConfigError(
                f"{field} {reference!r}: cannot import {module_name}: "
                f"{type(error).__name__}: {said}; it must be importable from here, or lie beside "
                "the search space"
            ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if callable(value) and n[:1] != "_"]
        what = "has no" if found is None else "cannot call its"
        raise ConfigError(
            f"{field} {reference!r}: {module_name} {what} {name}{did_you_mean(name, known)}"
        )
    return found


def fingerprints(references: Iterable[str], folders: Iterable[str]) -> dict[str, str]:
    """Return the files of the user's own code that are in use, with their SHA-256.

    Args:
        references: import paths; a space's own text has no file of its own here.
        folders: what was imported from these counts too, but not what is installed there.
    """
    files = {file for reference in references if (file := _file_of(reference)) is not None}
    places = [Path(folder).resolve() for folder in folders]
    installed = [Path(__file__).parent, *(Path(p).resolve() for p in (sys.prefix, sys.base_prefix))]
    for module in list(sys.modules.values()):
        if any(module is space for space in _spaces.values()):
            continue  # its text is kept with the run
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
    """Check that the user's own code is what it was when the run began.

    Args:
        code: file -> its SHA-256.
        references: import paths that must lead to one of these files.

    Raises:
        RunError: a file is gone, or has changed, or another one of its name is imported.
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
                f"{reference!r} is imported from {imported} here, and was from {namesakes[0]} when "
                "this run began; go on from the same folder, or rename one of the two"
            )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
