"""Injected faults: what a refusal looks like, and trainings that end in the middle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_data_runs import SPACE
from tuneapp import single
from tuneapp.cli import main

Files = dict[str, bytes]


def write_space(config: str = "", more: str = "", model: str = "tests.states:OwnNet") -> str:
    """Write a space of one recipe, of a network of a few kilobytes; return its name."""
    text = SPACE.format(config=config, more=more).replace("freeze_depth=4", "freeze_depth=1")
    Path("space.py").write_text(text.replace("resnet18", model), encoding="utf-8")
    return "space.py"


def files_below(folder: Path) -> Files:
    """Return the content of every file, and the links and empty folders by what they are."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size < 10_000_000:
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = b"folder" if path.is_dir() else b"link, or large"
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must be refused: exit code 2, one line, nothing written, no Ray."""
    import ray

    capsys.readouterr()
    before = files_below(Path.cwd())
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines(keepends=True)
    # A run tells its warnings again when it goes on, before it looks at its data.
    error = "".join(line for line in lines if not line.startswith("warning   "))
    assert error.startswith("tuneapp: error: "), error
    assert error.count("\n") == 1, error
    assert files_below(Path.cwd()) == before
    assert not ray.is_initialized()
    return error


def interrupt_after(
    epoch: int, monkeypatch: pytest.MonkeyPatch, then: Callable[[], object] = lambda: None
) -> None:
    """Let the next trainings do `then` after an epoch, and end as by Ctrl-C."""

    def reported(row: Any) -> None:
        if row["epoch"] == epoch:
            then()
            raise KeyboardInterrupt

    after_epochs(monkeypatch, reported)


def after_epochs(monkeypatch: pytest.MonkeyPatch, do: Callable[[Any], object]) -> None:
    """Let the next trainings call `do` with each epoch's row, after it was recorded."""
    real = single.run_whole

    def run_whole(config: Any, run: Any, report: Callable[[Any], None]) -> None:
        def reported(row: Any) -> None:
            report(row)
            do(row)

        real(config, run, reported)

    monkeypatch.setattr(single, "run_whole", run_whole)


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of metrics without what a clock has measured."""
    return [
        {k: v for k, v in row.items() if k not in ("train/images_per_s", "train/data_wait")}
        for row in rows
    ]
