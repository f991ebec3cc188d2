"""Faults 76 to 78 and checks S3 to S7 and S12: what is planted in runs, names and the environment.

Untrusted are run directories and images from others; a search space is the user's own code.
"""

import ast
import csv
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tuneapp
import tuneapp.training as training
from tests.conftest import SMALL_SPACE, read_ledger
from tests.test_checkpoint import Touch
from tests.test_trial import table
from tuneapp.cli import main
from tuneapp.errors import CheckpointError, RunError
from tuneapp.ledger import Ledger
from tuneapp.prepare import load_model, read_run_images
from tuneapp.rundir import open_run

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run of one trial of one epoch, which tests copy."""
    folder = tmp_path_factory.mktemp("made")
    space = folder / "space.py"
    space.write_text(SMALL_SPACE)
    words = ["train", str(space), "--data", str(photos), "--epochs", "1", "--name", "x"]
    assert main([*words, "--runs-dir", str(folder)]) == 0
    return folder / "x"


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as `runs/x` of the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / "runs/x")
    return tmp_path / "runs/x"


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below one, and what it holds."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


# --- S3, 76: code in a run directory --------------------------------------------------------------

RAYS = [
    "tuner.pkl", "experiment_state-2026-01-01_00-00-00.json", "searcher-state.pkl", "study.log",
    "search_gen_state-2026.pkl", "trials.pkl", "trials/tuner.pkl", "trials/t0001/params.pkl",
    "trials/t0001/result.json", "trials/t0001/checkpoints/.metadata.pkl",
    "trials/t0001/checkpoints/epoch-0002.pt", "trials/t0001/checkpoint_000000/dict_checkpoint.pkl",
]  # fmt: skip


def plant(file: Path, marker: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(Touch(marker)))


@pytest.mark.parametrize("words", [["summary"], ["train", "--from"], ["final-test"], ["resume"]])
def test_check_s3_pickles_under_the_names_of_others_are_never_opened(
    words: list[str], run: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    for name in RAYS:
        plant(run / name, marker)
    plant(Path("tuner.pkl"), marker)
    if words == ["resume"]:
        (run / "study.log").unlink()  # Optuna's own mirror, in JSON
    assert main([*words, "runs/x"]) == 0
    load_model(run, "t0001")
    assert not marker.exists()


def entries(run: Path) -> Iterator[tuple[Path, Any, Callable[[], None]]]:
    """The manifest's entries of the run's trial, each with what writes them back."""
    file = run / "trials/t0001/checkpoints/manifest.json"
    manifest = json.loads(file.read_text())
    for entry in manifest.values():
        yield file.parent, entry, lambda: file.write_text(json.dumps(manifest)) and None


@pytest.mark.parametrize("write", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x))])
@pytest.mark.parametrize("slot", ["epoch", "frozen"])
def test_fault_76_code_in_a_checkpoint_with_the_right_hash_is_never_run(
    slot: str,
    write: Callable[[object, Path], object],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    marker = tmp_path / "marker"
    for folder, entry, write_back in entries(run):
        if slot == "epoch":
            file = folder / entry["file"]
            write({"config": "{}", "model": {}, "x": Touch(marker)}, file)
            entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        for name in entry.get("parts", {}) if slot == "frozen" else ():
            write({"conv1.weight": Touch(marker)}, folder / name)
            entry["parts"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        write_back()
    assert main(["summary", "runs/x"]) == 0
    capsys.readouterr()
    assert main(["final-test", "runs/x"]) != 0
    error = capsys.readouterr().err
    assert error.startswith("tuneapp: error: ")
    assert error.count("\n") == 1
    with pytest.raises(CheckpointError):
        load_model(run, "t0001")
    assert not marker.exists()


def test_fault_76_a_summary_does_not_run_the_space_of_a_run(run: Path, tmp_path: Path) -> None:
    # Those commands that do (a space is code) refuse one that others could have written; see below.
    marker = tmp_path / "marker"
    (run / "space.py").write_text(f"open({str(marker)!r}, 'w')\n" + SMALL_SPACE)
    assert main(["summary", "runs/x", "--applied"]) == 0
    assert not marker.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("words", [["train", "--from"], ["final-test"], ["resume"]])
def test_fault_76_the_space_of_another_user_is_not_run(
    words: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    (run / "space.py").write_text(f"open({str(marker)!r}, 'w')\n" + SMALL_SPACE)
    os.chown(run / "space.py", 12345, 12345)
    assert main([*words, "runs/x"]) == 2
    assert "belongs to another user" in capsys.readouterr().err
    assert not marker.exists()


# --- S4: the source -------------------------------------------------------------------------------

ALLOWED = {
    # A search space is the user's own code, and runs as they do (README, `show --help`).
    ("space.py", "exec"): 1,
}
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "_pickle"}
CALLS = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pd.read_pickle",
    "pandas.read_pickle", "torch.jit.load", "subprocess.getoutput",
    "subprocess.getstatusoutput",
}  # fmt: skip


def dangers(source: str) -> list[str]:
    """The calls in a source that run code from data, or hand a text to a shell."""
    names: dict[str, str] = {}  # what `import ... as` and `from ... import` call it here
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            name = ".".join([names.get(first, first), *rest])
            # An option that is no constant may be anything.
            options = {k.arg: getattr(k.value, "value", "?") for k in node.keywords}
            if is_dangerous(name, options):
                found.append(name)
    return found


def is_dangerous(name: str, options: dict[str | None, object]) -> bool:
    if name == "torch.load":
        return options.get("weights_only") is not True
    if name in ("np.load", "numpy.load"):
        return options.get("allow_pickle", False) is not False
    module, _, last = name.rpartition(".")
    reads = module.partition(".")[0] in MODULES and last in ("load", "loads", "Unpickler", "open")
    return reads or name in CALLS or options.get("shell", False) is not False


def test_check_s4_no_source_runs_what_it_reads_but_where_it_is_said() -> None:
    root = Path(tuneapp.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert len(files) > 60
    found: dict[tuple[str, str], int] = {}
    loads = 0
    for file in files:
        source = file.read_text()
        loads += source.count("torch.load(")
        for name in dangers(source):
            key = (file.relative_to(root).as_posix(), name)
            found[key] = found.get(key, 0) + 1
    assert found == ALLOWED
    assert loads >= 2, "the check looks at nothing"


BAD_SOURCES = [
    "torch.load(f)",
    "torch.load(f, weights_only=False)",
    "torch.load(f, weights_only=flag)",
    "from torch import load as read\nread(f)",
    "import pickle\npickle.loads(x)",
    "import pickle as p\np.load(x)",
    "from cloudpickle import loads\nloads(x)",
    "joblib.load(f)",
    "eval(x)",
    "exec(x)",
    "import yaml as y\ny.load(f)",
    "os.system(x)",
    "subprocess.run(x, shell=True)",
    "subprocess.run(x, shell=flag)",
    "import numpy as n\nn.load(f, allow_pickle=True)",
]


@pytest.mark.parametrize("source", BAD_SOURCES)
def test_check_s4_the_check_sees_each_of_them(source: str) -> None:
    assert len(dangers(source)) == 1
    good = ["torch.load(f, weights_only=True)", "model.eval()", "json.load(f)", "np.load(f)"]
    assert dangers("\n".join([*good, "subprocess.run(x)", "safetensors.torch.load(x)"])) == []


# --- S5: modes ------------------------------------------------------------------------------------


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_check_s5_nothing_in_a_run_can_be_written_by_others(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.py").write_text(SMALL_SPACE)
    words = ["train", "space.py", "--data", str(photos), "--epochs", "1", "--name", "x"]
    assert main(words) == 0
    assert main(["summary", "runs/x"]) == 0
    files = [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]
    assert len(files) > 10
    open_to_others = [p for p in files if p.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
    assert open_to_others == []


# --- S6, 77: ways out of the run directory --------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".hidden", "/tmp/x", "a/b", "x\n", "x" * 65, "-x", "\x1b[31m", ""]
)
def test_fault_77_a_name_that_leads_elsewhere_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep/down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep/down")
    Path("space.py").write_text(SMALL_SPACE)
    before = everything(tmp_path)
    # Of the embedded data, which need no reading.
    assert main(["train", "space.py", "--epochs", "1", f"--name={name}"]) == 2
    error = capsys.readouterr().err
    assert "is not allowed" in error
    assert "\x1b" not in error
    assert {k for k in everything(tmp_path) if k not in before} <= {"deep/down/runs"}


def test_fault_77_a_link_in_the_place_of_a_new_run_is_not_followed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("space.py").write_text(SMALL_SPACE)
    Path("outside").mkdir()
    Path("runs").mkdir()
    Path("runs/x").symlink_to(tmp_path / "outside")
    Path("runs/y").mkdir()
    Path("runs/y/trials").symlink_to(tmp_path / "outside")
    for name in ("x", "y"):
        words = ["train", "space.py", "--data", str(photos), "--epochs", "1", "--name", name]
        assert main(words) == 2
    assert everything(tmp_path / "outside") == {}


LINKED = ["trials", "trials/t0001", "trials/t0001/log.txt", "trials/t0001/checkpoints"]
LINKED += ["ledger.jsonl", "frozen", "space.py"]


@pytest.mark.parametrize("name", LINKED)
def test_fault_77_a_link_planted_in_a_run_is_refused_before_anything_is_written_through_it(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if its end had not been written down, so that there is something to go on with.
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(x for x in lines if b'"ended"' not in x))
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / Path(name).name
    shutil.move(run / name, outside)
    (run / name).symlink_to(outside)
    before = everything(tmp_path / "outside")
    for words in (["resume"], ["final-test"]):
        assert main([*words, "runs/x"]) == 2
        assert "is a link" in capsys.readouterr().err
    assert everything(tmp_path / "outside") == before


@pytest.mark.parametrize("trial_id", ["../t0001", "../../../x", "t0001/..", "/etc", "\x1b[31m"])
@pytest.mark.parametrize("words", [["train", "--from"], ["final-test"]])
def test_fault_77_a_trial_id_that_leads_elsewhere_is_refused(
    words: list[str], trial_id: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(run.parent)
    assert main([*words, "runs/x", f"--trial={trial_id}"]) == 2
    error = capsys.readouterr().err
    assert f"--trial {trial_id}".replace("\x1b", "\\x1b") in error
    assert everything(run.parent) == before
    with pytest.raises(RunError, match="is not a trial id"):
        load_model(run, trial_id)


def test_fault_77_a_trial_id_in_a_ledger_that_leads_elsewhere_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = read_ledger(run)[1]["params"]
    (run / "ledger.jsonl").unlink()
    with Ledger(run / "ledger.jsonl") as ledger:
        ledger.append("sweep", trials=1)
        ledger.append("proposed", trial="../../../x", origin="set", params=params, epochs=1)
    before = set(everything(tmp_path))
    for words in (["resume", "runs/x"], ["final-test", "runs/x", "--trial=../../../x"]):
        assert main(words) == 2
        assert "is not a trial id" in capsys.readouterr().err
    assert set(everything(tmp_path)) - before <= {"runs/x/.lock", "runs/x/study.log"}


# --- S7, 78: secrets ------------------------------------------------------------------------------

SECRETS = {
    "RAY_AUTH_TOKEN": "a1f0c3-of-the-environment",
    "AWS_SECRET_ACCESS_KEY": "b2e1d4/of+the+cloud",
    "HF_TOKEN": "hf_c3d2e5ofthehub",
}
FILED = "d4c3f6-of-the-file"


@pytest.mark.parametrize("fails", [False, True])
def test_fault_78_no_token_is_in_any_file_or_line_of_a_run(
    fails: bool,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text(FILED)
    monkeypatch.setenv("HOME", str(home))
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("space.py").write_text(SMALL_SPACE)
    words = ["train", "space.py", "--data", str(photos), "--epochs", "1", "--name", "x"]
    if fails:

        def broken(*_: object) -> object:
            raise RuntimeError("boom")

        monkeypatch.setattr(training, "evaluate", broken)
        with suppress(RuntimeError):  # a bug keeps its traceback
            main(words)
    else:
        assert main(words) == 0
    main(["summary", "runs/x", "--applied"])
    said = capsys.readouterr()
    files = [p for p in (tmp_path / "work").rglob("*") if p.is_file()]
    assert len(files) >= (6 if fails else 10)
    written = {str(p): p.read_bytes() for p in files}
    written |= {"stdout": said.out.encode(), "stderr": said.err.encode()}
    for name, content in written.items():
        for secret in (*SECRETS.values(), FILED):
            assert secret.encode() not in content, name
    # (The absolute paths of the space and of the images are in run.json, as documented: a run that
    # goes on needs them.)


# --- S12: names -----------------------------------------------------------------------------------

CLASSES = ["=cmd()|'x'!A1", '+q"uote,comma', "-a\nbest      t9999: val", "@\x1b[31m[red]"]
FORGED = "best      t9999"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> tuple[Path, list[Path], str]:
    """A run on images whose names are what spreadsheets, terminals and parsers obey."""
    folder = tmp_path_factory.mktemp("evil")
    data = folder / "data"
    sources = sorted(photos.rglob("*.png")) + sorted(photos.rglob("*.jpg"))
    paths = []
    for name in CLASSES:
        (data / name).mkdir(parents=True)
        for i, source in enumerate(sources[:20]):
            file = data / name / f"{name} {i}{source.suffix}"
            shutil.copy(source, file)
            paths.append(file.relative_to(data))
        for i in range(3):  # some of these are not in the test split
            broken = data / name / f"\x1b]0;owned\x07\n{FORGED}, {i}.png"
            broken.write_bytes(b"\x89PNG\r\n\x1a\n")
            paths.append(broken.relative_to(data))
    space = folder / "space.py"
    space.write_text(SMALL_SPACE)
    words = ["train", str(space), "--data", str(data), "--epochs", "1", "--name", "x"]
    words += ["--metric", f"val/recall/{CLASSES[3]}", "--runs-dir", str(folder)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        assert main(words) == 0, err.getvalue()
        assert main(["summary", str(folder / "x")]) == 0
        assert main(["train", "--from", str(folder / "x"), "--trial", "\x1b[31m\nx"]) == 2
    return folder / "x", paths, out.getvalue() + err.getvalue()


def unprintable(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c not in "\n\t"}


def test_check_s12_names_cannot_command_the_terminal_or_forge_a_line(
    evil: tuple[Path, list[Path], str],
) -> None:
    run, _, said = evil
    assert unprintable(said) == set()
    assert not re.search(rf"^\s*{FORGED}", said, re.MULTILINE)
    assert "\\x1b]0;owned\\x07\\n" in said  # and yet it can be recognised
    assert "[31m[red]" in said  # which is no markup
    log = (run / "trials/t0001/log.txt").read_text()
    assert unprintable(log) == set()
    assert not re.search(rf"^\s*{FORGED}", log, re.MULTILINE)


def test_check_s12_tables_are_valid_and_read_back_equal(evil: tuple[Path, list[Path], str]) -> None:
    run, paths, _ = evil
    split = table(run / "split.csv")
    assert sorted(row["path"] for row in split) == sorted(p.as_posix() for p in paths)
    assert {row["class"] for row in split} == set(CLASSES)
    assert all(row["path"].split("/")[0] == row["class"] for row in split)
    images = read_run_images(*open_run(run))
    assert sorted(e.path for e in images.examples) == sorted(p.as_posix() for p in paths)
    (of_ledger,) = [e["row"] for e in read_ledger(run) if e["event"] == "epoch"]
    names = {f"val/recall/{name}" for name in CLASSES}
    assert names <= of_ledger.keys()
    for file in ("trials/t0001/epochs.csv", "trials.csv"):
        (row,) = table(run / file)
        assert None not in row
        assert None not in row.values()
        for name in names:
            assert float(row[name]) == of_ledger[name], file
    for file in ("trials.csv", "bad_images.csv"):  # those that people open
        with (run / file).open(newline="") as text:
            cells = [cell for row in csv.reader(text, strict=True) for cell in row]
        assert not [c for c in cells if c.startswith(("=", "+", "@", "\t", "\r"))], file
        assert not [c for c in cells if re.match(r"-[^\d]", c)], file
    bad = {row["path"] for row in table(run / "bad_images.csv")}
    assert {p.removeprefix("'") for p in bad} == {p.as_posix() for p in paths if "owned" in p.name}


def test_check_s12_tensorboard_gets_clean_tags_and_text(
    evil: tuple[Path, list[Path], str],
) -> None:
    run, _, _ = evil
    events = EventAccumulator(str(run / "trials/t0001"), size_guidance={"tensors": 0}).Reload()
    tags = events.Tags()
    recalls = [tag for tag in tags["scalars"] if tag.startswith("val/recall/")]
    assert len(recalls) == len(CLASSES)
    assert all(unprintable(tag) == set() and "\n" not in tag for tag in tags["scalars"])
    (tensor,) = events.Tensors("data/text_summary")
    text = tensor.tensor_proto.string_val[0].decode()
    assert unprintable(text) == set()
    assert "owned" in text
    assert not re.search(rf"^\s*{FORGED}", text, re.MULTILINE)
