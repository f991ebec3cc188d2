import errno
import os
import sys

import pytest
import torch
from torch import nn

from tuneapp import failures
from tuneapp.errors import AppliedValueError, DataError, Diverged, WeightsError
from tuneapp.failures import KINDS, Failure, at_fault, classify, hint, would_repeat


def raised(function):
    """Return an error as it is raised, with its traceback."""
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("it did not raise")


def raising(error):
    def function():
        raise error

    return raised(function)


def of_the_host():
    torch.empty(2**60)


def more_than_there_is():
    bytearray(2**62)


def at_a_write():
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123 - a device
        full.write(b"x")


def one_after_another():
    try:
        at_a_write()
    except OSError as error:
        raise RuntimeError("the checkpoint could not be written") from error


def in_numpy():
    import numpy as np

    np.empty(2**45)  # 281 TB


def of_the_system():
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.parametrize(
    "function",
    [
        of_the_host,
        more_than_there_is,
        in_numpy,
        of_the_system,
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB")),
        lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: out of memory")),
    ],
)
def test_memory_that_is_refused_is_lack_of_memory_whoever_refuses_it(function, tmp_path):
    failure = classify(raised(function), tmp_path)
    assert failure.kind == "out of memory", failure
    assert (failure.state, failure.can_pass) == ("failed", False)


@pytest.mark.parametrize("function", [at_a_write, one_after_another])
def test_a_full_disk_can_pass(function, tmp_path):
    failure = classify(raised(function), tmp_path)
    assert (failure.kind, failure.state, failure.can_pass) == ("disk full", "failed", True)


def test_a_quota_that_is_used_up_is_a_full_disk(tmp_path):
    failure = classify(raising(OSError(errno.EDQUOT, "Disk quota exceeded")), tmp_path)
    assert (failure.kind, failure.can_pass) == ("disk full", True)


def test_a_divergence_is_told_in_its_own_words(tmp_path):
    failure = classify(raising(Diverged(3, 17, float("nan"))), tmp_path)
    assert failure == Failure("diverged", "loss became nan in epoch 3, step 17")
    assert failure.state == "diverged"


def test_images_that_cannot_be_used_are_at_fault_themselves(tmp_path):
    failure = classify(raising(DataError("a.png has changed")), tmp_path)
    assert (failure.kind, failure.state, failure.can_pass) == ("data", "failed", False)
    assert failure.cause.startswith("DataError: a.png has changed (")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x512 and 5x3)"),
        WeightsError("gone"),
        AppliedValueError("lr"),
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        AssertionError(),
    ],
)
def test_all_else_is_a_bug_and_would_be_one_again(error, tmp_path):
    failure = classify(raising(error), tmp_path)
    assert (failure.kind, failure.state, failure.can_pass) == ("bug", "failed", False)
    assert failure.cause.startswith(type(error).__name__)
    assert "\n" not in failure.cause


def test_a_full_disk_of_others_does_not_explain_a_bug(tmp_path, monkeypatch):
    # An error of torch's files that does not name its cause counts only where little is free.
    error = RuntimeError("unexpected pos 64 vs 0")
    monkeypatch.setattr("tuneapp.room.free_bytes", lambda folder: 10**14)
    assert classify(raising(error), tmp_path).kind == "bug"
    monkeypatch.setattr("tuneapp.room.free_bytes", lambda folder: 10**6)
    assert classify(raising(error), tmp_path).kind == "disk full"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own, whose lines are known."""
    (tmp_path / "own_net_of_a_user.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "\n"
        "\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(4, 4)\n"
        "\n"
        "    def forward(self, x):\n"
        "        return self.layer(x)\n"
        "\n"
        "\n"
        "def much(x):\n"
        "    return torch.empty(2**60)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_net_of_a_user  # type: ignore[import-not-found]

    yield own_net_of_a_user
    del sys.modules["own_net_of_a_user"]


def test_the_users_own_line_is_named_and_not_the_librarys(own, tmp_path):
    # Called by torch's Sequential, and raised within torch's Linear.
    network = nn.Sequential(nn.Identity(), own.Net())
    failure = classify(raised(lambda: network(torch.zeros(2, 3))), tmp_path)
    assert failure.kind == "bug"
    assert failure.cause.startswith("RuntimeError: ")
    assert failure.cause.endswith("(own_net_of_a_user.py:11)")
    failure = classify(raised(lambda: own.much(0)), tmp_path)
    assert failure.kind == "out of memory"
    assert failure.cause.endswith("(own_net_of_a_user.py:15)")


def test_where_all_is_a_librarys_its_last_line_is_named(tmp_path):
    import json

    def drop_ours(error):
        return error.with_traceback(error.__traceback__.tb_next)

    error = raised(lambda: json.loads("{"))
    while "json" not in error.__traceback__.tb_frame.f_code.co_filename:
        error = drop_ours(error)
    assert "(decoder.py:" in classify(error, tmp_path).cause


def test_every_kind_says_what_is_at_fault_and_what_helps():
    assert len(set(KINDS)) == len(KINDS) == 9
    for kind in KINDS:
        assert at_fault(kind) != at_fault("something else")
        assert hint(kind) != hint("something else")
    assert len({hint(kind) for kind in KINDS}) == len(KINDS)
    # What the tables say of kinds that do not exist, nobody would ever read.
    for table in (failures._AT_FAULT, failures._HINTS):
        assert set(table) == set(KINDS)
    assert at_fault("") and hint("")


def test_the_table_in_the_docstring_has_every_kind_with_what_is_at_fault():
    rows = [line for line in failures.__doc__.splitlines() if line.startswith("    ")][1:]
    named = {kind: row for kind in KINDS for row in rows if row.strip().startswith(kind + "  ")}
    assert set(named) == set(KINDS)
    for kind, row in named.items():
        assert at_fault(kind) in row


def test_what_lies_in_the_configuration_or_the_code_would_come_again():
    again = {kind for kind in KINDS if would_repeat(kind)}
    assert again == {"diverged", "out of memory", "data", "bug", "refused"}
    assert {at_fault(kind) for kind in KINDS if kind not in again} == {"the machine", "the disk"}
    assert not would_repeat("")
