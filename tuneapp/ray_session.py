"""A private Ray: started, closed to others, and ended without leaving anything behind."""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout

from tuneapp.errors import ConfigError, RayDied, TuneappError
from tuneapp.rundir import RunRecord
from tuneapp.watchdog import end_ray_processes, first_dead, ray_processes

# Before Ray is imported, which reads them then. The environment can override each, except
# the token, without which whoever reaches a port of Ray's runs code as this user.
for _name, _value in {
    "RAY_AUTH_MODE": "token",  # Ray's own default; setting it silences a notice
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all of Ray's sockets on 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray's own tables and banners are off: we have ours
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # TensorBoard and CSV are ours
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a trial's error.txt has it
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402

log = logging.getLogger(__name__)

START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 128 * 2**20
"""Ray's shared memory: nothing large passes through it."""

GCS = "gcs_server"
LOOK_EVERY_S = 0.5
_SCRATCH = "tuneapp-ray-"
_TOKEN = Path("~/.ray/auth_token").expanduser()


def require_token() -> None:
    """Refuse to start a Ray that admits whoever reaches its ports.

    Raises:
        ConfigError: RAY_AUTH_MODE says so.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE={mode}: whoever reaches a port of this Ray could run code as you; "
            "unset it, or set it to token"
        )


@dataclass(frozen=True)
class OwnRay:
    """A running Ray.

    Attributes:
        scratch: folder for its files.
        processes: those that it needs, by name.
    """

    scratch: Path
    processes: Mapping[str, psutil.Process]

    def require_alive(self) -> None:
        """Check that trials can run; meant to be called several times a second.

        Raises:
            RayDied: they cannot; Ray can be ended, and started again.
        """
        dead = first_dead(self.processes)
        if dead is not None:
            raise RayDied(f"Ray's {dead} process ended")

    def leave_without_gcs(self, is_ending: threading.Event, way_out: str) -> None:
        """End this process as soon as Ray's GCS has ended.

        Without it Ray cannot even be ended: each call to it waits for 60 s, and then ends this
        process (ray 2.60). The main thread may be inside such a call, so this runs in a separate
        thread.

        Args:
            is_ending: set when Ray is being ended on purpose.
            way_out: shown to the user.
        """
        gcs = {name: p for name, p in self.processes.items() if name == GCS}
        while first_dead(gcs) is None:
            if is_ending.wait(LOOK_EVERY_S):
                return
        if is_ending.is_set():
            return
        end_ray_processes()
        shutil.rmtree(self.scratch, ignore_errors=True)
        log.error("tuneapp: error: Ray's %s process ended; %s", GCS, way_out)
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # the live table has hidden the cursor
        sys.stdout.flush()
        os._exit(RayDied.exit_code)


@contextlib.contextmanager
def own_ray(record: RunRecord, dashboard_host: str | None, way_out: str) -> Iterator[OwnRay]:
    """Start a private Ray, and leave nothing behind.

    Args:
        record: says how many trials run at once, and on what.
        dashboard_host: address for Ray's dashboard; None starts none.
        way_out: shown to the user if this process cannot continue.
    """
    require_token()
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _remove_leftovers()
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH))
    lock = FileLock(scratch / ".lock")  # released when this process ends, so it shows that it lives
    lock.acquire()
    is_ending = threading.Event()
    try:
        context = _patiently(
            partial(
                ray.init,
                address="local",
                num_cpus=record.concurrent * record.cpus_per_trial,
                num_gpus=torch.cuda.device_count() if record.gpus_per_trial else 0,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=dashboard_host is not None,
                dashboard_host=dashboard_host or "127.0.0.1",
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                _temp_dir=str(scratch / "ray"),
            )
        )
        if _TOKEN.exists():
            _TOKEN.chmod(0o600)  # Ray leaves it readable to others; it lets one run code as us
        if dashboard_host is not None:
            log.warning("dashboard http://%s", context.dashboard_url)
            log.warning("token     it asks for what `ray get-auth-token` prints")
        if dashboard_host not in (None, "127.0.0.1", "localhost", "::1"):
            log.warning("open      the network can reach it: the token is all that guards it")
        started = OwnRay(scratch, ray_processes())
        words = (is_ending, way_out)
        threading.Thread(target=started.leave_without_gcs, args=words, daemon=True).start()
        yield started
    finally:
        is_ending.set()
        ray.shutdown()
        end_ray_processes()
        lock.release()
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the scratch folders of sweeps that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError, Timeout):
            if folder.stat().st_uid == os.geteuid() and (folder / ".lock").exists():
                with FileLock(folder / ".lock", timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)


def _patiently(start: Callable[[], Any]) -> Any:
    """Start Ray; retry on a machine so busy that it takes longer than Ray's 30 seconds."""
    for attempt in range(START_ATTEMPTS):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            again = f": trying again ({attempt + 2} of {START_ATTEMPTS})"
            is_last = attempt + 1 == START_ATTEMPTS
            log.warning("Ray did not start within 30 s%s", "" if is_last else again)
            ray.shutdown()
            end_ray_processes()  # it would keep starting, and slow the next attempt
    raise TuneappError("Ray could not start: the machine is too busy; try again when it is less so")


@contextlib.contextmanager
def noted_signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Record SIGINT, SIGTERM and SIGHUP, and pass them to Ray as the one on which it ends cleanly.

    Ray handles SIGINT itself while it runs trials, but aborts on SIGTERM; SIGUSR1 does
    the same as SIGINT. A second Ctrl-C does not wait.

    Args:
        stop: called first, so that no new trial begins.
    """
    caught: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {s: handler for s, handler in before.items() if handler is not signal.SIG_IGN}  # nohup

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        stop()
        if len(caught) > 1 or signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, None):
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGUSR1)

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    try:
        for number in before:
            signal.signal(number, note)
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
