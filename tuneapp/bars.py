"""A progress bar for each step over many images."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBars:
    """Shows how far each step is; nothing without a terminal or for few images."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._steps: dict[str, object] = {}

    def update(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` images are through the step `what`."""
        if not self._console.is_terminal or total < 500:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:<16}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        if what not in self._steps:
            self._steps[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._steps[what], completed=done)  # type: ignore[arg-type]

    def close(self) -> None:
        """Remove the bars."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._steps.clear()
