"""What the README says exists, and is what CI runs."""

import re
import shlex
from pathlib import Path

import pytest

from tuneapp.cli import main
from tuneapp.space import SearchSpace

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
COMMANDS = re.findall(r"^(?:    |\$ )(?:.*&& )?python -m tuneapp (.+)$", README, flags=re.MULTILINE)


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_has_only_options_that_exist(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command, comments=True)
    assert main([words[0], "--help"]) == 0
    text = capsys.readouterr().out
    for word in words[1:]:
        if word.startswith("--"):
            assert re.search(rf"^ +(-\w, )?{word}\b", text, flags=re.MULTILINE), word


def test_flags_that_the_readme_names_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = ""
    for command in ("sweep", "train"):
        assert main([command, "--help"]) == 0
        text += capsys.readouterr().out
    for flag in re.findall(r"`(--[\w-]+)", README):
        assert flag in text + "--help", flag


def test_the_file_map_names_every_file_and_no_other() -> None:
    files = re.search(r"## Files\n\n(.+)", CONTRIBUTING, flags=re.DOTALL)
    assert files is not None
    named = re.findall(r"^    (\S+)", files[1], flags=re.MULTILINE)
    for path in named:
        assert (ROOT / path).exists(), path
    modules = {f"tuneapp/{p.name}" for p in (ROOT / "tuneapp").glob("[a-z]*.py")}
    assert {n for n in named if n.startswith("tuneapp/") and n.endswith(".py")} == modules
    for folder in ("tuneapp/data", "search_spaces", "notebooks"):
        for file in (ROOT / folder).glob("[a-z]*.[pi][yp]*"):
            assert file.name in files[1], file


def test_the_design_page_names_every_module() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    for module in (ROOT / "tuneapp").glob("[a-z]*.py"):
        assert f"`{module.stem}`" in page, module.name


def test_the_space_in_the_readme_is_a_space(tmp_path: Path) -> None:
    text = re.search(r"```python\n(.+?)```", README, flags=re.DOTALL)
    assert text is not None
    space = SearchSpace(text[1], tmp_path / "readme.py")
    assert {b.config.model for b in space.branches()} == {"resnet18"}
    for params in space.first_trials:
        space.replay(params)


def test_ci_runs_the_readme_s_test_command() -> None:
    commands = re.search(r"## Tests\n\n((?:    .+\n)+)", README)
    assert commands is not None
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in commands[1].splitlines():
        assert command.strip() in lines


def test_modules_import_only_what_stands_above_them_in_the_design() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    order: list[str] = []
    for row in re.findall(r"^\| (`.+?`) \|", page, flags=re.MULTILINE):
        order += [name.strip("/") for name in re.findall(r"`([\w/]+)`", row)]
    assert len(order) > 20
    for place, module in enumerate(order):
        path = ROOT / "tuneapp" / module
        files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        allowed = {*order[:place], module if path.is_dir() else ""}
        for file in files:
            for line in file.read_text().splitlines():
                found = re.match(r"\s*from tuneapp\.(\w+)", line)
                if found and module != "cli":
                    assert found[1] in allowed, f"{file.name} imports {found[1]}"
