"""What commands print, and where: only this module and `cli` print."""

import contextlib
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console, ConsoleDimensions

from tuneapp.bars import ProgressBars
from tuneapp.rundir import printable

if TYPE_CHECKING:
    from tuneapp.examination import Examination
    from tuneapp.progress import Progress
    from tuneapp.rundir import RunDir, RunRecord
    from tuneapp.summary import Summary
    from tuneapp.sweep import Outcome

UNFOLDED = 10_000
"""Columns where nothing has a width: more than a table needs."""
LABEL = 10
"""Columns before the text of a line: its label, or blanks."""


class _Stream:
    """Standard output or error, whichever that is at the time; nothing if nobody reads it.

    A command continues without its terminal: after `| head -1`, on a full disk, over a lost
    connection. A letter that the terminal's encoding lacks is escaped as Python does. Blanks before
    the end of a line, to which tables are padded, are for terminals only.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name == "rich_proxied_file":  # a live table replaces our file by its own
            raise AttributeError(name)
        return getattr(self._file, name)

    @property
    def _file(self) -> Any:
        file = getattr(sys, self._name)
        return getattr(file, "rich_proxied_file", file)

    def write(self, text: str) -> int:
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        if not self.isatty():
            shown = re.sub(r" +$", "", shown, flags=re.MULTILINE)
        self._attempt(lambda file: file.write(shown))
        return len(text)

    def isatty(self) -> bool:
        try:
            return bool(self._file.isatty())
        except (AttributeError, ValueError):  # there is none, or it was closed
            return False

    def flush(self) -> None:
        self._attempt(lambda file: file.flush())

    def _attempt(self, act: Callable[[Any], object]) -> None:
        file = self._file
        if file is None:  # it was closed before we began
            return
        try:
            act(file)
        except (OSError, ValueError):
            # Whatever else is written there, also at the end of the process, must not fail again.
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as null:
                os.dup2(null.fileno(), file.fileno())


class _Console(Console):
    """A console that folds tables at the width of a terminal, or at COLUMNS, and nowhere else."""

    @property
    def size(self) -> ConsoleDimensions:
        if self.is_terminal:
            return super().size
        columns = os.environ.get("COLUMNS", "")
        return ConsoleDimensions(int(columns) if columns.isdecimal() else UNFOLDED, 25)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size


out = _Console(file=cast(IO[str], _Stream("stdout")))
err = _Console(file=cast(IO[str], _Stream("stderr")), stderr=True)


def print_to(console: Console, line: str, style: str | None = None) -> None:
    """Print a line without the control characters that names of files in it can have.

    Line ends around it are kept. It is not wrapped, so that a command in it can be copied.
    """
    inner = line.strip("\n")
    shown = line.replace(inner, printable(inner)) if inner else line
    console.print(shown, style=style, highlight=False, markup=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line."""
    print_to(out, line)


def print_wrapped(console: Console, line: str, style: str | None = None) -> None:
    """Print a line of words below each other on a terminal; in a pipe, a line stays a line."""
    lines = [line]
    if console.is_terminal:
        lines = textwrap.wrap(
            line,
            max(console.width, 2 * LABEL),
            subsequent_indent=" " * LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
    for each in lines:
        print_to(console, each, style)


def warn(line: str) -> None:
    """Print a warning, where errors go."""
    print_wrapped(err, f"warning   {line}", "yellow")


class LogToStderr(logging.Handler):
    """Shows warnings; a trial's log.txt has the rest."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Print what was logged, each line of a traceback as one."""
        message, *traceback = [record.getMessage(), *self._traceback(record)]
        for line in (message, *traceback):
            print_to(err, line, "yellow")

    def _traceback(self, record: logging.LogRecord) -> list[str]:
        if not record.exc_info:
            return []
        return logging.Formatter().formatException(record.exc_info).splitlines()


class Show:
    """Shows how images are decoded, then a run, once there is one, until it ends."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._run: RunDir | None = None
        self._bars = ProgressBars(err)

    def __enter__(self) -> "Show":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bars.close()
        self._stack.close()
        if self._run is not None and kind is not None and issubclass(kind, KeyboardInterrupt):
            say(f"resume    python -m tuneapp resume {short_path(self._run.path)}")

    def watch(self, what: str, done: int, total: int) -> None:
        """Show how far a step over many images is."""
        self._bars.update(what, done, total)

    def begin(self, run: "RunDir", record: "RunRecord") -> "Progress":
        """Say what begins, and return the listener to its events."""
        from tuneapp.ledger import read_events
        from tuneapp.progress import Progress

        self._run = run
        self._bars.close()
        for warning in record.warnings:
            warn(warning)
        where = f"{record.cpus_per_trial} CPU thread(s)"
        if record.gpus_per_trial:
            where = f"{record.gpus_per_trial:g} GPU and {where}"
        at_once = "" if record.kind == "train" else f"{record.concurrent} trial(s) at once, "
        say(f"run       {short_path(run.path)}: {at_once}{where} each")
        known = read_events(run.ledger) if run.ledger.exists() else []
        progress = Progress(out, record.settings, known)
        return self._stack.enter_context(progress)


def short_path(path: Path) -> Path:
    """Return a path as seen from here, where it lies below."""
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path


def print_sweep(outcome: "Outcome") -> int:
    """Print how a sweep ended and what it found; return the exit code."""
    from tuneapp.summary import read_summary, write_trials_table

    read = read_summary(outcome.run.path)
    write_trials_table(outcome.run.path)
    print_result(read, with_warnings=False)
    path = short_path(outcome.run.path)
    if outcome.common_failure is not None:
        warn(f"the sweep was stopped: all of its first trials failed: {outcome.common_failure}")
        say(f"details   {path}/trials/t0001/error.txt")
    if outcome.remaining:
        why = "interrupted"
        if outcome.common_failure is not None:
            why = "fix the cause first"
        elif outcome.out_of_time:
            why = "the time budget is used up"
        say(f"{outcome.remaining} trial(s) to go ({why})")
        say(f"resume    python -m tuneapp resume {path}")
    if read.best is not None:
        say(f"model     {path}/trials/{read.best[0].trial_id}/{_checkpoints(read)}")
        say(f"again     python -m tuneapp train --from {path} --trial best")
    say(f"summary   python -m tuneapp summary {path}")
    say(f"curves    tensorboard --logdir {path}/trials")
    say("dashboard of Ray, while trials run: with --dashboard on sweep and resume")
    if outcome.interrupted_by:
        return 128 + int(outcome.interrupted_by)
    if read.best is None:
        return 4
    return 3 if any(t.state == "failed" for t in read.trials) else 0


def _checkpoints(read: "Summary") -> str:
    return "checkpoints" if read.record.settings.data.folds is None else "fold*/checkpoints"


def print_training(run: "RunDir") -> int:
    """Print the result of a single training; return the exit code."""
    from tuneapp.summary import read_summary, write_trials_table

    read = read_summary(run.path)
    write_trials_table(run.path)
    print_result(read, with_warnings=False)
    path = short_path(run.path)
    if any(trial.applied for trial in read.trials):
        say("applied   as asked: what was trained was read back and compared; to see it,")
        say(f"          python -m tuneapp summary {path} --applied")
    say(f"model     {path}/trials/t0001/{_checkpoints(read)}")
    say(f"curves    tensorboard --logdir {path}/trials")
    return 0 if read.trials and read.trials[0].state == "finished" else 4


def print_result(read: "Summary", *, with_warnings: bool = True) -> None:
    """Print the table of trials, best first, and the result.

    Args:
        read: the run.
        with_warnings: print its warnings, too; a command that ran trials did so when they began.
    """
    from tuneapp.results import bad_image_lines, result_lines, trials_table, waiting

    best = read.best
    say("")
    table = trials_table(read.ranked, read.record.settings, best[0].trial_id if best else None)
    out.print(table)
    say("")
    for line in result_lines(read):
        print_wrapped(out, line)
    waited = waiting(read)
    if waited.is_too_long:
        print_wrapped(err, waited.line, "yellow")
    else:
        print_wrapped(out, waited.line)
    for line in bad_image_lines(read):
        print_to(err, line, "yellow")
    if with_warnings:
        for warning in read.record.warnings:
            warn(warning)


def print_applied(read: "Summary") -> None:
    """Print what each trial read back from its optimizer, schedule and parameters."""
    from tuneapp.applied_table import applied_table

    found = applied_table(read.ranked, out.width)
    say("\napplied, read back from the objects that trained:")
    if not found.num_trials:
        say("none      no trial has finished an epoch\n")
        return
    say("asked = applied: checked for every trial; one that differs fails")
    say("")
    out.print(found.table)
    for label, values in found.shared:
        print_wrapped(out, f"{label:<9} {values}")
    say("")


def print_examination(found: "Examination") -> None:
    """Print what a data set is, and a line for each finding, the serious ones in red."""
    from tuneapp.examination import summary_lines

    for line in summary_lines(found):
        say(line)
    for finding in found.findings:
        mark, style = ("SERIOUS   ", "bold red") if finding.is_serious else ("finding   ", "yellow")
        print_to(out, f"{mark}{finding.kind}: {finding.words}", style)
    if not found.findings:
        print_to(out, "finding   none", "green")
