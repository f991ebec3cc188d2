"""Where this machine keeps what was downloaded and decoded."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder: `$TUNEAPP_CACHE`, else `~/.cache/tuneapp`."""
    asked = os.environ.get("TUNEAPP_CACHE")
    if asked:
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tuneapp"
