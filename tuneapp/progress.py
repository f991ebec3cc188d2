"""The live view of a run: a table that is redrawn, or lines without a terminal.

It is drawn from the ledger's events, so what is seen is what was written.
"""

from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from tuneapp.config import RunSettings
from tuneapp.display import say_params
from tuneapp.ledger import Event
from tuneapp.records import best_record, read_records, take, trials_wanted
from tuneapp.results import trials_table
from tuneapp.rundir import printable

HIDDEN_ROWS = 9  # lines of the terminal that the table leaves to its frame and to other output


class Progress:
    """Follows a run by its events; a context manager, and a listener while it is open."""

    def __init__(self, console: Console, settings: RunSettings, known: list[Event]) -> None:
        """Begin with the events that the ledger holds already."""
        self._console = console
        self._settings = settings
        self._wanted = trials_wanted(known)
        self._records = read_records(known)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=2
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.transient = True  # the final table follows
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        take(self._records, event)
        if event["event"] == "sweep":
            self._wanted = event["trials"]
        if event["event"] in ("warned", "retried"):
            # They scroll by above the live table.
            self._console.print(_say_trouble(event), style="yellow", highlight=False, markup=False)
        if self._live is None:
            line = printable(self._line(event) or "")
            if line:
                self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    @property
    def _step(self) -> str:
        return "epoch" if self._settings.data.folds is None else "fold"

    @property
    def _done(self) -> int:
        return sum(r.state not in ("unfinished", "duplicate") for r in self._records.values())

    def _line(self, event: Event) -> str | None:
        metric = self._settings.metric
        match event["event"]:
            case "proposed":
                return f"{event['trial']} {event['origin']}: {say_params(event['params'])}"
            case "epoch":
                row, record = event["row"], self._records[event["trial"]]
                best = record.best(self._settings)
                assert best is not None
                return (
                    f"{event['trial']} {self._step} {row['epoch']}/{record.epochs}  "
                    f"train/loss {row['train/loss']:.4f}  {metric} {row[metric]:.4f}  "
                    f"best {best[metric]:.4f}"
                )
            case "ended":
                cause = f": {event['cause']}" if event["cause"] else ""
                return f"{event['trial']} {event['state']}{cause}  [{self._done} of {self._wanted}]"
        return None

    def _render(self) -> RenderableType:
        records = list(self._records.values())
        best = best_record(records, self._settings)
        title = f"{self._done} of {self._wanted} trials done"
        if best is not None:
            metric = self._settings.metric
            title += f", best {metric} {best[1][metric]:.4f} ({best[0].trial_id})"
        room = max(self._console.height - HIDDEN_ROWS, 3)
        running = [r for r in records if r.state == "unfinished"]
        ended = [r for r in records if r.state != "unfinished"]
        shown = ended[len(ended) - max(room - len(running), 0) :] + running
        best_id = best[0].trial_id if best else None
        table = trials_table(shown, self._settings, best_id, unfinished="running")
        table.title = Text(printable(title))
        return table


def _say_trouble(event: Event) -> str:
    """Return what happened to a trial that continues anyway."""
    if event["event"] == "warned":
        return f"{event['trial']} {event['text']}"
    return f"{event['trial']} {event['kind']}: {event['cause']}; trying again"
