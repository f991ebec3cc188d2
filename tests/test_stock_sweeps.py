"""Each stock space as a user would try it: `show`, and a sweep of two trials on the digits."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import read_ledger
from tuneapp.cli import main
from tuneapp.space import SearchSpace

SPACES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.py"))
every_space = pytest.mark.parametrize("path", SPACES, ids=[p.stem for p in SPACES])
# Minutes of training, of which the others show nothing less.
SLOW = ("convnet", "linear_probe", "own_loss", "regimes", "resnet", "vit")
with_slow_ones_marked = pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.stem in SLOW else ()) for p in SPACES],
    ids=[p.stem for p in SPACES],
)


@every_space
def test_show_names_every_parameter_and_recipe(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    space = SearchSpace.read(path)
    assert space.summary in shown
    for parameter in space.parameters():
        assert parameter.name in shown
    for number in range(1, len(space.first_trials) + 1):
        assert f"\n  {number}  " in shown


@pytest.mark.ray
@pytest.mark.timeout(400)
@with_slow_ones_marked
def test_two_trials_of_the_space_run_to_their_end(
    path: Path, tuneapp: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = tuneapp("sweep", path, "--trials", 2, "--epochs", 1, "--name", "x", cwd=tmp_path)
    out, err = process.communicate(timeout=380)
    assert process.returncode == 0, err
    events = read_ledger(tmp_path / "runs" / "x")
    assert [e["state"] for e in events if e["event"] == "ended"] == ["finished", "finished"]
    space = SearchSpace.read(path)
    recipes = [*space.first_trials[:2], None][:2]
    proposed = [e for e in events if e["event"] == "proposed"]
    for event, recipe in zip(proposed, recipes, strict=True):
        assert event["origin"] == ("search" if recipe is None else "recipe")
        assert recipe is None or event["params"] == recipe
    assert "best      t000" in out
    for trial in ("t0001", "t0002"):
        config = json.loads((tmp_path / f"runs/x/trials/{trial}/config.json").read_text())
        (applied,) = [
            e["applied"] for e in events if e["event"] == "applied" and e["trial"] == trial
        ]
        trained = applied["trainable_parameters"] > 0
        assert trained
        assert applied["lr"]["head"] == pytest.approx(config["optimizer"]["lr"], rel=1e-9)
