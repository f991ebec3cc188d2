import errno
import json
import logging
import os
import random
import struct
import subprocess
import sys

import pytest

from tuneapp import ledger as ledger_module
from tuneapp.errors import RunError, StorageError
from tuneapp.ledger import Events, Ledger, read_events

VALUES = [
    {"loss": 0.1 + 0.2, "name": "Größe\n\u2028 'x'", "none": None, "yes": True},
    {"nested": {"rows": [1, 2.5, [5e-324, -0.0, 1.7976931348623157e308]]}},
    {"trial": "t0001", "row": {"epoch": 1, "val/accuracy": 2 / 3}},
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def write(path, values=VALUES):
    with Ledger(path) as ledger:
        return [ledger.append("epoch", **fields) for fields in values]


def test_what_was_appended_is_what_is_read(path):
    written = write(path)
    assert written == [
        {"seq": seq, "event": "epoch", **fields} for seq, fields in enumerate(VALUES)
    ]
    assert read_events(path) == written
    with Ledger(path) as again:
        assert again.events == written


def test_floats_come_back_bit_for_bit(path):
    # Drawn as bit patterns, so that every exponent and every last digit has its turn.
    rng = random.Random(0)
    drawn = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000)]
    floats = [x for x in drawn if x - x == 0] + [-0.0, 5e-324, 2.2250738585072014e-308]
    write(path, [{"values": floats}])
    read = read_events(path)[0]["values"]
    assert [struct.pack("<d", x) for x in read] == [struct.pack("<d", x) for x in floats]


def test_sequence_numbers_go_on_after_reopening(path):
    write(path)
    write(path)
    assert [event["seq"] for event in read_events(path)] == [0, 1, 2, 3, 4, 5]


def test_an_event_is_one_line_of_plain_json(path):
    write(path)
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 4
    assert lines[-1] == b""
    assert [json.loads(line)["seq"] for line in lines[:-1]] == [0, 1, 2]


def test_an_event_is_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []

    def fsync(handle):
        real_fsync(handle)
        synced.append(path.read_bytes())

    with Ledger(path) as ledger:
        real_fsync = os.fsync
        monkeypatch.setattr(ledger_module.os, "fsync", fsync)
        for number in range(3):
            ledger.append("epoch", number=number)
            assert len(synced) == number + 1
            assert synced[-1].count(b"\n") == number + 1


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(path, caplog):
    written = write(path)
    whole = path.read_bytes()
    start_of_last = whole[:-1].rindex(b"\n") + 1
    for cut in range(start_of_last, len(whole)):
        path.write_bytes(whole[:cut])
        assert read_events(path) == written[:2]
        assert path.read_bytes() == whole[:cut], "a reader must not touch the file"
        caplog.clear()
        with caplog.at_level(logging.WARNING), Ledger(path) as ledger:
            assert ledger.events == written[:2]
            new = ledger.append("ended", state="finished")
        assert new["seq"] == 2
        assert read_events(path) == [*written[:2], new]
        torn = cut - start_of_last
        assert [r.message for r in caplog.records] == (
            [f"{path}: cut off {torn} bytes of a torn line"] if torn else []
        )


def test_a_whole_line_without_its_newline_is_not_counted(path):
    written = write(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert read_events(path) == written[:2]
    with Ledger(path) as ledger:
        ledger.append("ended", state="failed")
    assert [event["event"] for event in read_events(path)] == ["epoch", "epoch", "ended"]


def test_every_flipped_bit_of_a_line_before_the_last_is_detected(path):
    # Short decimals and plain letters: of 0.14285714285714285, the last digit changes no double,
    # and an exponent means the same in both cases.
    values = [{"trial": "t0001", "row": {"epoch": n, "val/accuracy": n / 8}} for n in range(4)]
    write(path, values)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(lines[0])
    for place in range(start, start + len(lines[1])):  # its newline, too
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(StorageError, match=r"ledger\.jsonl, line 2: damaged; restore"):
                read_events(path)
            with pytest.raises(RunError, match="line 2"):
                Ledger(path)
            assert path.read_bytes() == damaged, "nothing may be cut off a damaged ledger"


@pytest.mark.parametrize(
    ("rearranged", "line"),
    [
        ([0, 2, 3], 2),  # one is missing
        ([0, 1, 1, 2, 3], 3),  # one is there twice
        ([0, 2, 1, 3], 2),  # two are swapped
        ([1, 2, 3], 1),  # the first is missing
    ],
)
def test_whole_lines_in_a_wrong_order_are_detected(path, rearranged, line):
    write(path, [{"number": n} for n in range(4)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in rearranged))
    with pytest.raises(RunError, match=f"line {line}: damaged"):
        read_events(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_leaves_the_ledger_alone(path, value):
    written = write(path)
    before = path.read_bytes()
    with Ledger(path) as ledger:
        with pytest.raises(ValueError, match="not JSON compliant"):
            ledger.append("epoch", row={"epoch": 1, "val/loss": value})
        assert path.read_bytes() == before
        assert ledger.events == written
        new = ledger.append("epoch", row={"epoch": 1, "val/loss": 0.5})
    assert read_events(path) == [*written, new]


@pytest.fixture
def waits(monkeypatch):
    """Return what happens at each pause of a writer that waits for room, instead of time passing.

    A pause more than there are steps is an error, so that nothing waits for ever.
    """
    steps = []
    patiently = ledger_module.write_patiently
    monkeypatch.setattr(
        ledger_module,
        "write_patiently",
        lambda *words: patiently(*words, sleep=lambda seconds: steps.pop(0)()),
    )
    return steps


def full_after(num_bytes, real_write=os.write):
    """A disk that takes the beginning of a line, and no more."""
    return lambda handle, data: real_write(handle, data[:num_bytes])


def refuse(*words):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("cut", [0, 1, 10, 40])
def test_on_a_full_disk_an_event_waits_for_room_and_is_there_once(
    path, monkeypatch, caplog, waits, cut
):
    written = write(path)
    before = path.read_bytes()
    seen = []

    def look():
        seen.append((path.read_bytes(), read_events(path)))

    real_write = os.write
    waits += [look] * 12  # the pauses after which it tries again, whatever the disk says
    waits += [look, lambda: monkeypatch.setattr(ledger_module.os, "write", real_write)]
    waits += [look] * 24
    monkeypatch.setattr(ledger_module.os, "write", refuse if cut == 0 else full_after(cut))
    with caplog.at_level(logging.WARNING), Ledger(path) as ledger:
        new = ledger.append("ended", state="finished")
        assert ledger.events == [*written, new]
        # Whoever reads meanwhile sees neither the event nor a part of it.
        assert len(seen) > 12
        assert all(each == (before, written) for each in seen)
        after = ledger.append("ended", state="stopped")
    assert read_events(path) == [*written, new, after]
    said = [r.message for r in caplog.records]
    assert len(said) == 2
    assert "waiting for more" in said[0]
    assert "continuing" in said[1]


@pytest.mark.parametrize("where", ["write", "fsync"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EFBIG])
def test_what_no_waiting_can_mend_is_an_error_and_the_events_before_stay(
    path, monkeypatch, waits, where, code
):
    written = write(path)
    before = path.read_bytes()

    def fail(*words):
        raise OSError(code, os.strerror(code))

    with Ledger(path) as ledger:
        with monkeypatch.context() as patched:
            patched.setattr(ledger_module.os, where, fail)
            with pytest.raises(StorageError) as caught:
                ledger.append("ended", state="finished")
        assert os.strerror(code) in str(caught.value)
        assert "`resume`" in str(caught.value)
        assert caught.value.exit_code == 5
        assert ledger.events == written
        assert path.read_bytes() == before  # although the line was written before the sync
        new = ledger.append("ended", state="stopped")
    assert read_events(path) == [*written, new]


def test_a_line_that_was_written_and_not_synced_is_written_once(path, monkeypatch, waits):
    real_sync, attempts = os.fsync, []

    def sync(handle):
        attempts.append(path.read_bytes())
        if len(attempts) == 1:
            refuse()
        real_sync(handle)

    waits += [lambda: None] * 24
    monkeypatch.setattr(ledger_module.os, "fsync", sync)
    written = write(path, VALUES[:1])
    assert len(attempts) == 2
    assert attempts[0] == attempts[1]
    assert read_events(path) == written


@pytest.mark.parametrize("place", ["folder", "read-only"])
def test_a_ledger_that_cannot_be_written_is_an_error_of_storage(tmp_path, place, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    if place == "folder":
        path = tmp_path / "nowhere" / "ledger.jsonl"
    else:  # not by its mode: root may write anything

        def refuse_it(*words, **more):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("pathlib.Path.touch", refuse_it)
    with pytest.raises(StorageError, match=r"ledger\.jsonl cannot be written"):
        Ledger(path)


def test_events_without_a_file_are_numbered_alike(path):
    kept = Events()
    returned = [kept.append("epoch", **fields) for fields in VALUES]
    assert returned == kept.events == write(path)


def test_a_new_ledger_is_empty(path):
    with Ledger(path) as ledger:
        assert ledger.events == []
    assert read_events(path) == []


def test_a_missing_ledger_is_named_to_a_reader(tmp_path):
    with pytest.raises(RunError, match=r"nowhere is not a run directory: it has no ledger\.jsonl"):
        read_events(tmp_path / "nowhere" / "ledger.jsonl")
    assert not (tmp_path / "nowhere").exists()


def test_after_a_kill_every_acknowledged_event_is_there(path):
    code = (
        "import sys; from pathlib import Path; from tuneapp.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "while True: print(ledger.append('epoch', x=0.1)['seq'], flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    while int(writer.stdout.readline()) < 20:
        pass
    writer.kill()
    acknowledged = 21 + len(writer.stdout.read().splitlines())
    writer.wait()
    events = read_events(path)
    assert acknowledged <= len(events) <= acknowledged + 1
    assert [event["seq"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("line", [b"[]", b"1", b"null", b'"crc"'])
def test_a_line_that_is_json_but_no_event_is_damage(tmp_path, line):
    file = tmp_path / "ledger.jsonl"
    with Ledger(file) as ledger:
        for trials in (1, 2, 3):
            ledger.append("sweep", trials=trials)
    lines = file.read_bytes().split(b"\n")
    lines[1] = line
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(RunError, match="line 2: damaged"):
        read_events(file)
