"""Downloads: complete and checked, or not there at all.

Files are where torch.hub keeps them, so that a file that another program downloaded is not
downloaded again. A file of torchvision is checked against the hash in its name at each use.
"""

import hashlib
import http.client
import os
import re
import secrets
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from tuneapp.errors import WeightsError

SILENCE_S = 5.0
"""A server that sends nothing for this long counts as unreachable."""

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")


def hub_dir() -> Path:
    """Return where torch.hub keeps weights: `$TORCH_HOME/hub/checkpoints`."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_or_fetched(url: str, limit_s: float | None, name: str | None = None) -> Path:
    """Return the file at `url`, downloaded if this machine does not have it yet.

    Args:
        url: http, https or file address.
        limit_s: seconds for a download; None is no limit.
        name: of the file on this machine; None is as in the address.

    Raises:
        WeightsError: it is damaged or not available; the message says where to put the file.
    """
    file = hub_dir() / (name or url.rsplit("/", 1)[-1])
    if file.is_file():
        check_hash(file, file.name)
        return file
    try:
        fetch(url, file, limit_s)
    except WeightsError as error:
        raise WeightsError(f"{error}; put the file at {file}") from None
    return file


def fetch(url: str, file: Path, limit_s: float | None) -> None:
    """Download `url` to `file`, complete and with the hash in its name, or not at all.

    Args:
        url: http, https or file address.
        file: where to; of several processes at once, one downloads it and the others wait.
        limit_s: seconds for the whole download; None is no limit.

    Raises:
        WeightsError: the server cannot be reached, is too slow, or sent another content.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    deadline = None if limit_s is None else time.monotonic() + limit_s
    lock = FileLock(file.with_name(file.name + ".lock"), timeout=-1 if limit_s is None else limit_s)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if file.is_file():
                return
            with urllib.request.urlopen(url, timeout=SILENCE_S) as reply, aside.open("wb") as out:
                while block := reply.read1(1 << 16):  # what has arrived, without waiting for more
                    out.write(block)
                    if deadline is not None and time.monotonic() > deadline:
                        raise WeightsError(f"{url} took longer than {limit_s:g} s")
                length = reply.headers.get("Content-Length")
                if length is not None and out.tell() != int(length):
                    raise WeightsError(f"{url} ended after {out.tell()} of {length} bytes")
            check_hash(aside, file.name)
            aside.replace(file)
    except Timeout:
        raise WeightsError(
            f"another process has been downloading {url} for more than {limit_s:g} s"
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise WeightsError(f"{url} cannot be downloaded ({reason})") from None
    finally:
        aside.unlink(missing_ok=True)


def check_hash(file: Path, name: str) -> None:
    """Compare a file with the hash that torchvision puts into `name`, if there is one.

    Raises:
        WeightsError: they differ.
    """
    wanted = _HASH_IN_NAME.search(name)
    if wanted is None:
        return
    got = sha256_of(file)
    if not got.startswith(wanted[1]):
        raise WeightsError(
            f"{file.with_name(name)} is damaged: its SHA-256 begins with {got[:8]}, but its name "
            f"says {wanted[1]}; delete it if it exists, and try again"
        )


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
