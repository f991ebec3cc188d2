import json
import logging
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from tuneapp.config import Data, RunSettings
from tuneapp.errors import RunError, RunInUse, StorageError
from tuneapp.rundir import (
    FORMAT,
    RunDir,
    RunRecord,
    create_run,
    log_to,
    open_run,
    require_name,
    write_atomically,
    write_json,
    write_record,
)

RECORD = RunRecord(
    kind="sweep",
    space_paths=("/somewhere/resnet.py", "/somewhere/narrower.py"),
    settings=RunSettings(
        data=Data(source="photos"), seed=3, metric="val/loss", max_epochs=2, image_size=32
    ),
    image_root="/somewhere/photos",
    classes=("a", "ü"),
    weights={"resnet18 auto": {"asked": "auto", "file": None, "name": "random", "warning": "w"}},
    warnings=("starts from random weights",),
    cpus_per_trial=2,
    gpus_per_trial=0.5,
    concurrent=3,
    time_budget_s=1.5,
    import_from=("/somewhere", "/elsewhere/ü"),
    code={"/somewhere/nets.py": "0" * 64},
    is_multilabel=True,
    keep_best=2,
    disk_budget=10**10,
    min_free=10**6,
)


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_runs_without_a_name_are_numbered(tmp_path):
    runs = tmp_path / "deep" / "runs"
    made = [create_run(runs, None, "resnet").path for _ in range(3)]
    made.append(create_run(runs, None, "other").path)
    assert [p.name for p in made] == ["resnet-001", "resnet-002", "resnet-003", "other-001"]
    assert all(p.parent == runs and p.is_dir() and not list(p.iterdir()) for p in made)


def test_a_number_that_is_taken_is_passed_over(tmp_path):
    for taken in ("resnet-001", "resnet-002"):
        (tmp_path / taken).mkdir()
        (tmp_path / taken / "kept").touch()
    (tmp_path / "resnet-003").touch()  # a file is in the way as well
    assert create_run(tmp_path, None, "resnet").path.name == "resnet-004"
    assert names_in(tmp_path / "resnet-001") == ["kept"]


def test_a_name_that_is_taken_is_refused_with_both_ways_out(tmp_path):
    first = create_run(tmp_path, "mine", "resnet")
    assert first.path == tmp_path / "mine"
    with pytest.raises(RunError) as caught:
        create_run(tmp_path, "mine", "resnet")
    message = str(caught.value)
    assert f"{first.path} exists" in message
    assert f"python -m tuneapp resume {first.path}" in message
    assert "--name" in message
    assert names_in(tmp_path) == ["mine"]


@pytest.mark.parametrize(
    "name",
    ["../x", "", ".hidden", "..", "a/b", "a" * 65, "a b", "-dash", "_x", "ü", "a\n", "a\x00", "/x"],
)
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path, name):
    runs = tmp_path / "runs"
    with pytest.raises(RunError) as caught:
        create_run(runs, name, "resnet")
    assert str(caught.value).startswith(f"--name {name!r} is not allowed: letters, digits")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["a" * 64, "A.b_c-1", "0"])
def test_a_plain_name_is_taken_as_it_is(tmp_path, name):
    assert create_run(tmp_path, name, "resnet").path == tmp_path / name


def test_a_place_that_cannot_hold_runs_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot make a run directory in .*file"):
        create_run(tmp_path / "file" / "runs", None, "resnet")


def test_a_name_is_checked_without_making_anything(tmp_path):
    require_name(tmp_path / "deep" / "runs", "mine")
    require_name(tmp_path, None)
    assert names_in(tmp_path) == []
    (tmp_path / "mine").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match=r"^--name 'mine': .*mine exists; resume it with"):
        require_name(tmp_path, "mine")
    with pytest.raises(RunError, match=r"^--runs-dir /proc/no: cannot make a run directory in /pr"):
        require_name(Path("/proc/no"), None)


def test_a_run_is_locked_by_one_process_until_it_dies(tmp_path):
    run = RunDir(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tuneapp.rundir import RunDir\n"
        "lock = RunDir(Path(sys.argv[1])).lock(); print('locked', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RunInUse, match="is in use by another tuneapp"):
            run.lock()
    finally:
        holder.kill()  # SIGKILL: it cannot tidy up
        holder.communicate()
    lock = run.lock()
    second = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], input="", capture_output=True, text=True
    )
    assert second.returncode == 1
    assert "RunInUse" in second.stderr
    lock.release()
    run.lock().release()


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")

    def write(aside):
        assert aside.parent == tmp_path, "a rename works within one file system only"
        assert aside != path
        aside.write_text("ne")
        assert path.read_text() == "old"
        aside.write_text("new")

    write_atomically(path, write)
    assert path.read_text() == "new"
    assert names_in(tmp_path) == ["run.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "run.json"
    path.write_text("old")

    def write(aside):
        aside.write_text("half of the n")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["run.json"]


def test_a_writer_that_fails_leaves_no_new_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"x": float("nan")})
    assert names_in(tmp_path) == []


def test_a_record_comes_back_as_it_was_written(tmp_path):
    run = RunDir(tmp_path)
    write_record(run, RECORD)
    opened, record = open_run(tmp_path)
    assert opened == run
    assert record == RECORD
    assert isinstance(record.settings, RunSettings)
    plain = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert plain["format"] == FORMAT
    assert plain["versions"]["optuna"] == version("optuna")
    assert plain["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_record_of_format_1_has_one_space_and_keeps_the_checkpoints_that_it_kept(tmp_path):
    write_record(RunDir(tmp_path), RECORD)
    file = tmp_path / "run.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    for new in ("space_paths", "keep_best", "disk_budget", "min_free"):
        del plain[new]
    plain |= {"format": 1, "space_path": "/somewhere/resnet.py"}
    file.write_text(json.dumps(plain))
    record = open_run(tmp_path)[1]
    assert record == replace(
        RECORD,
        space_paths=("/somewhere/resnet.py",),
        keep_best=10**9,
        disk_budget=None,
        min_free=500_000_000,
    )


def test_a_record_without_code_of_the_users_own_has_none(tmp_path):
    write_record(RunDir(tmp_path), RECORD)
    file = tmp_path / "run.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    del plain["import_from"], plain["code"]
    file.write_text(json.dumps(plain))
    record = open_run(tmp_path)[1]
    assert (record.import_from, record.code) == ((), {})
    assert replace(record, import_from=RECORD.import_from, code=RECORD.code) == RECORD


def test_a_run_of_a_newer_format_is_refused_with_the_version_that_made_it(tmp_path):
    write_record(RunDir(tmp_path), RECORD)
    file = tmp_path / "run.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    plain |= {"format": FORMAT + 1, "unheard_of": 1}
    plain["versions"]["tuneapp"] = "9.8.7"
    file.write_text(json.dumps(plain))
    with pytest.raises(RunError, match=r"was made by a newer tuneapp \(9\.8\.7\); update this one"):
        open_run(tmp_path)


def test_a_run_record_that_is_cut_short_anywhere_is_damaged(tmp_path):
    write_record(RunDir(tmp_path), RECORD)
    file = tmp_path / "run.json"
    whole = file.read_bytes()
    assert whole.endswith(b"}\n")
    for cut in range(len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(StorageError, match=r"run\.json is damaged"):
            open_run(tmp_path)


def test_a_run_record_that_is_not_text_is_damaged(tmp_path):
    (tmp_path / "run.json").write_bytes(b'{"format": "\xff"}')
    with pytest.raises(StorageError, match=r"run\.json is damaged"):
        open_run(tmp_path)


@pytest.mark.parametrize("where", ["missing", "empty", "file"])
def test_what_is_no_run_directory_is_named(tmp_path, where):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=rf"{where} is not a run directory: it has no run\.json"):
        open_run(tmp_path / where)


def test_every_path_of_a_run_lies_inside_it_under_its_documented_name(tmp_path):
    run = RunDir(tmp_path)
    files = [
        run.ledger,
        run.settings_file,
        run.space_file(),
        run.space_file(1),
        run.space_file(2),
        run.study_file,
        run.split_file,
        run.bad_images_file,
        run.frozen,
        run.trials_table,
    ]
    assert [p.relative_to(tmp_path).as_posix() for p in files] == [
        "ledger.jsonl",
        "run.json",
        "space.py",
        "space.py",
        "space-2.py",
        "study.log",
        "split.csv",
        "bad_images.csv",
        "frozen",
        "trials.csv",
    ]
    assert run.trial("t0007") == tmp_path / "trials" / "t0007"


def test_the_log_goes_to_the_file_inside_the_block_only(tmp_path):
    log = logging.getLogger("tuneapp.somewhere")
    before = list(logging.getLogger("tuneapp").handlers)
    log.warning("before")
    with log_to(tmp_path / "log.txt"):
        log.info("inside ü")
    log.warning("after")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 3)[2:] for line in lines] == [["INFO", "inside ü"]]
    assert logging.getLogger("tuneapp").handlers == before


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"format": 1}', '{"format": "x", "versions": {}}', '{"versions": 1}']
)
def test_json_that_is_no_record_of_a_run_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StorageError, match=r"run\.json is not a record of a run"):
        open_run(tmp_path)
