"""A run's single source of truth: an append-only file of events, from which the rest is rebuilt.

JSON lines. Each line carries its sequence number and a CRC-32 of itself and is written with one
`write` and one `fsync`, so that after a kill at any moment the file holds every event that was
acknowledged and at most one torn line at its end. It has no timestamps: order is the order of the
lines. One process writes (it holds the run's lock), any number read.

Events: `sweep` (how many trials are wanted), `refined` (another space from here on), `proposed`,
`applied`, `epoch`, `warned`, `retried`, `ended`, written by `study.py` alone; `test_opened` and
`test_result`, written by `final_test.py`.
"""

import errno
import json
import logging
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tuneapp.errors import RunError, StorageError
from tuneapp.room import write_patiently

log = logging.getLogger(__name__)

Event = dict[str, Any]


def read_events(path: Path) -> list[Event]:
    """Return the events of the ledger at `path`, oldest first; a torn last line is left out.

    Raises:
        RunError: there is no such file.
        StorageError: a line before the last is damaged, or the file cannot be read.
    """
    return _parse(_read(path), path)[0]


class Events:
    """Keeps events in memory, for a study without a run directory."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def append(self, event: str, **fields: Any) -> Event:
        """Add one event and return it as it is kept, with its sequence number."""
        record = {"seq": len(self.events), "event": event, **fields}
        self.events.append(record)
        return record


class Ledger(Events):
    """Appends events; each is on the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        """Open the ledger at `path`, creating it if it is missing and repairing a torn end.

        Raises:
            StorageError: it is damaged, or cannot be written.
        """
        self._path = path
        try:
            path.touch()
            content = _read(path)
            self.events, self._size = _parse(content, path)
            if self._size < len(content):
                log.warning("%s: cut off %d bytes of a torn line", path, len(content) - self._size)
                os.truncate(path, self._size)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from None

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event and return it as written, with its sequence number.

        Raises:
            ValueError: a number in a field is not finite.
            TypeError: a field is not JSON.
            StorageError: it cannot be written; the ledger is unchanged. (If the disk is full, it
                waits for room.)
        """
        record = {"seq": len(self.events), "event": event, **fields}
        line = json.dumps({**record, "crc": _crc(record)}, allow_nan=False) + "\n"
        data = line.encode()
        try:
            write_patiently(self._path.parent, 0, lambda: self._write(data), log.warning)
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be written: {error.strerror or error}; nothing in it is "
                "lost: fix that, then `resume`"
            ) from error
        self._size += len(data)
        self.events.append(record)
        return record

    def _write(self, data: bytes) -> None:
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(errno.ENOSPC, "only a part of a line was written")
            os.fsync(self._file)
            if os.fstat(self._file).st_nlink == 0:
                raise OSError(errno.ENOENT, "it was removed")
        except OSError:
            os.ftruncate(self._file, self._size)  # or the next line would follow half a line
            raise

    def close(self) -> None:
        """Close the file. The ledger stays readable, and `events` too."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path.parent} is not a run directory: it has no {path.name}") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from None


def _parse(content: bytes, path: Path) -> tuple[list[Event], int]:
    """Return the complete events of `content` and their length in bytes."""
    events: list[Event] = []
    good_bytes = 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        event = _checked(line, seq=len(events))
        if event is None:
            if any(rest.strip() for rest in lines[number:]):
                raise StorageError(
                    f"{path}, line {number}: damaged; restore this file from a backup, or start "
                    "a new sweep"
                )
            break
        if number == len(lines):
            break  # complete, but without its newline: it was not acknowledged
        events.append(event)
        good_bytes += len(line) + 1
    return events, good_bytes


def _checked(line: bytes, seq: int) -> Event | None:
    try:
        event = json.loads(line)
        crc = event.pop("crc")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return event if crc == _crc(event) and event["seq"] == seq else None


def _crc(record: Event) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"
