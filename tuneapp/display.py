"""What the terminal shows: one live table, or lines where there is no terminal.

Everything is drawn from the ledger's events, so what is seen is what was written.
"""

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tuneapp.config import RunSettings, is_better
from tuneapp.failures import at_fault, hint
from tuneapp.ledger import Event
from tuneapp.records import (
    FOLD_SCORE,
    MAX_TWINS,
    TrialRecord,
    best_record,
    flat,
    read_records,
    spread_of,
    take,
    trials_wanted,
)
from tuneapp.rundir import printable

if TYPE_CHECKING:
    from tuneapp.anatomy import Anatomy
    from tuneapp.final_test import TestResult
    from tuneapp.lr_range import LrRange
    from tuneapp.summary import Summary
    from tuneapp.verify import Difference, Kill, Piece, Verified

STATE_STYLES = {
    "unfinished": "cyan",
    "finished": "green",
    "stopped": "dim",
    "diverged": "yellow",
    "failed": "red",
    "duplicate": "dim",
}
MAX_BAD_SHOWN = 20
MAX_DIFFERENCES_SHOWN = 3
MUCH_WAITING = 0.2
"""Above this share of a training's time, waiting for data is worth a remedy."""
HIDDEN_ROWS = 9  # lines of the terminal that the table leaves to its frame and to what was said


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
            self._live.transient = True  # the final table follows, and says it all
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        take(self._records, event)
        if event["event"] == "sweep":
            self._wanted = event["trials"]
        if event["event"] in ("warned", "retried"):
            # For the console: they scroll by above the live table.
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
    """Return what happened to a trial that goes on all the same."""
    if event["event"] == "warned":
        return f"{event['trial']} {event['text']}"
    return f"{event['trial']} {event['kind']}: {event['cause']}; it is tried again"


def trials_table(
    records: list[TrialRecord],
    settings: RunSettings,
    best_id: str | None,
    unfinished: str = "unfinished",
) -> Table:
    """Return the table of trials: a row each, in the order given.

    Args:
        records: the trials.
        settings: the metric that is shown.
        best_id: the trial whose row is bold.
        unfinished: what to call the state of trials that have not ended.
    """
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
    table.add_column("trial", no_wrap=True)
    table.add_column("from", no_wrap=True)
    table.add_column("state", no_wrap=True)
    has_folds = settings.data.folds is not None
    table.add_column("folds" if has_folds else "epochs", justify="right", no_wrap=True)
    # A class can be in it; as a Text, no name is taken for markup.
    table.add_column(Text(printable(settings.metric)), justify="right", no_wrap=True)
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    for record in records:
        best = record.best(settings)
        table.add_row(
            record.trial_id,
            record.origin,
            Text(
                unfinished if record.state == "unfinished" else record.state,
                style=STATE_STYLES[record.state],
            ),
            f"{len(record.rows)}/{record.epochs}",
            "" if best is None else f"{best[settings.metric]:.4f}",
            "" if best is None else str(best["epoch"]),
            Text(say_params_shortly(record.params)),
            style="bold" if record.trial_id == best_id else None,
        )
    return table


def anatomy_table(anatomy: "Anatomy") -> Table:
    """Return the table of a network's stages, from stem to head, and their sums."""
    giga = anatomy.flops >= 1e9
    table = Table(box=None, pad_edge=False)
    table.add_column("depth", justify="right", no_wrap=True)
    table.add_column("stage", overflow="fold")
    table.add_column("output", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("trainable from here", justify="right")
    table.add_column("GFLOPs" if giga else "MFLOPs", justify="right", no_wrap=True)

    def say_flops(flops: int) -> str:
        return f"{flops / 1e9:,.3f}" if giga else f"{flops / 1e6:,.1f}"

    for depth, stage in enumerate(anatomy.stages):
        table.add_row(
            str(depth),
            Text(printable(stage.name)),
            "?" if stage.output is None else " x ".join(f"{size:,}" for size in stage.output),
            f"{stage.parameters:,}",
            f"{stage.trainable:,}",
            say_flops(stage.flops),
        )
    sums = (f"{anatomy.parameters:,}", "", say_flops(anatomy.flops))
    table.add_row("", "total", "", *sums, style="bold")
    return table


def say_params(params: dict[str, Any]) -> str:
    """Return parameter values in a line, by their full names: `optimizer=sgd sgd.lr=0.0131`."""
    return " ".join(f"{k}={_short(v)}" for k, v in params.items())


def say_params_shortly(params: dict[str, Any]) -> str:
    """Return parameter values in a line, a branch's after its name: `sgd lr=0.0131`."""
    branches = {name.split(".", 1)[0] for name in params if "." in name}
    words = []
    for name, value in params.items():
        branch, dot, own_name = name.partition(".")
        if value in branches:
            words.append(str(value))
        elif dot and branch in params.values():
            words.append(f"{own_name}={_short(value)}")
        else:
            words.append(f"{name}={_short(value)}")
    return " ".join(words)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))


def result_lines(read: "Summary") -> list[str]:
    """Return what went wrong, the best trial, and what the search added to the recipes."""
    settings = read.record.settings
    metric = settings.metric
    lines = _failure_lines(read.ranked)
    twins = sum(trial.state == "duplicate" for trial in read.trials)
    if twins:
        lines.append(f"same      {twins} trial(s) were the same as earlier ones, and not run again")
    if read.is_exhausted:
        lines.append(
            f"exhausted the last {MAX_TWINS} proposals were all known: the space has no more"
        )
    history = sum(trial.is_history for trial in read.trials)
    if history:
        lines.append(f"history   {history} trial(s) lie outside the space as refined")
    if read.best is None:
        return [*lines, "best      none: no trial has finished an epoch"]
    trial, row = read.best
    spread = ""
    if metric == "val/accuracy":
        error = read.standard_error(row[metric])
        spread = f" (standard error {error:.4f} on {read.num_val} images)"
    where = f"at epoch {row['epoch']} of {trial.epochs}"
    if settings.data.folds is not None:
        where = f"over {row['epoch']} of {trial.epochs} folds{_fold_spread(trial, metric)}"
    lines += [
        f"best      {trial.trial_id}: {metric} {row[metric]:.4f}{spread} {where}",
        f"          {say_params(trial.params)}",
    ]
    if read.best_recipe is not None:
        lines.append(_gain_line(read, row[metric]))
    return [*lines, *_test_lines(read)]


def _failure_lines(trials: Sequence[TrialRecord]) -> list[str]:
    """Return what ended trials before their time: each cause, then what is at fault and helps."""
    failed = [trial for trial in trials if trial.state in ("failed", "diverged")]
    lines = [
        f"{t.trial_id} {t.state}: {t.kind + ': ' if t.kind not in ('', t.state) else ''}{t.cause}"
        for t in failed
    ]
    lines += [f"{t.trial_id} warned: {text}" for t in trials for text in t.warnings]
    kinds = dict.fromkeys(trial.kind for trial in failed if trial.kind)
    return lines + [f"          {kind} ({at_fault(kind)}): {hint(kind)}" for kind in kinds]


def bad_image_lines(read: "Summary") -> list[str]:
    """Return which images could not be read, and where all of them are listed."""
    if not read.bad:
        return []
    count, policy = len(read.bad), read.record.settings.data.bad_images
    fate = "left out" if policy == "drop" else "in training, others of their class in their places"
    lines = [f"unread    {count} image(s) could not be read ({fate}):"]
    lines += [f"          {path} {cause}" for path, cause in read.bad[:MAX_BAD_SHOWN]]
    if count > MAX_BAD_SHOWN:
        lines.append(f"          and {count - MAX_BAD_SHOWN} more")
    return [*lines, f"          listed in {read.run.bad_images_file.name} of the run directory"]


def _fold_spread(trial: TrialRecord, metric: str) -> str:
    scores = [row[FOLD_SCORE + metric] for row in trial.rows]
    return f" (standard deviation {spread_of(scores):.4f})" if len(scores) > 1 else ""


def mean_wait(trial: TrialRecord) -> float:
    """Return the share of its time that a trial waited for data, after its first epoch.

    In the first one, files are read from the disk and worker processes start.
    """
    shares = [row["train/data_wait"] for row in trial.rows if "train/data_wait" in row]
    shares = shares[1:] or shares
    return sum(shares) / len(shares) if shares else 0.0


def wait_line(read: "Summary") -> tuple[str, bool]:
    """Return how long trials waited for data, with the remedy where it was too long: and if so."""
    trained = [t for t in read.trials if any("train/data_wait" in row for row in t.rows)]
    if not trained:
        return "waiting   for data: not known", False
    longest = max(trained, key=mean_wait)
    share = mean_wait(longest)
    line = f"waiting   {longest.trial_id} waited for data during {share:.0%} of its training"
    if share <= MUCH_WAITING:
        return line, False
    workers = longest.applied.get("workers", 0)
    remedy = f"more --workers than {workers}, or a weaker augment"
    if longest.applied.get("images") == "streamed":
        remedy = f"a larger --store-budget, or more --workers than {workers}"
    return f"{line}, more than a fifth: try {remedy}", True


def _test_lines(read: "Summary") -> list[str]:
    """Return how often the test split was opened, and what came of it."""
    if not read.test_results:
        return []
    times = len(read.test_results)
    name = read.record.settings.metric.replace("val/", "test/")
    lines = [f"test      the test split was opened {times} time(s)"]
    for trial_id, scores in read.test_results:
        values = [row[name] for row in scores if name in row]
        said = f"{name} {sum(values) / len(values):.4f}" if values else "no score"
        lines.append(f"          {trial_id}: {said}")
    if times > 1:
        lines.append("          of several looks, the best one promises too much")
    return lines


def final_test_lines(result: "TestResult", trial: TrialRecord, settings: RunSettings) -> list[str]:
    """Return what a trial is worth on the test split."""
    best = trial.best(settings) or {}
    lines = []
    for name in result.scores[0]:
        values = [row[name] for row in result.scores if name in row]
        mean = sum(values) / len(values)
        doubt = ""
        if len(values) > 1:
            doubt = f"  mean of {len(values)} folds' models, deviation {spread_of(values):.4f}"
        elif name == "test/accuracy":
            error = math.sqrt(mean * (1 - mean) / result.num_images)
            doubt = f"  standard error {error:.4f} on {result.num_images} images"
        val = best.get(name.replace("test/", "val/"))
        before = "" if val is None else f"  (validation {val:.4f})"
        lines.append(f"{name:<26} {mean:.4f}{before}{doubt}")
    if result.bad:
        named = ", ".join(path for path, _ in result.bad[:3])
        lines.append(f"unread    {len(result.bad)} test image(s), left out: {named}")
    lines.append(f"opened    {result.times_opened} time(s) in this run; it is written down")
    return lines


def _gain_line(read: "Summary", best: float) -> str:
    """Return what the search added to the best recipe, and whether that may be chance."""
    assert read.best_recipe is not None
    settings = read.record.settings
    recipe, row = read.best_recipe
    theirs = row[settings.metric]
    found = f"best recipe {recipe.trial_id} has {theirs:.4f}"
    if not any(t.origin == "search" and t.rows for t in read.trials):
        return f"gain      not known: only recipes have run so far ({found})"
    if not is_better(best, theirs, settings.mode):
        return f"gain      none: the search did not beat the recipes ({found})"
    gain = abs(best - theirs)
    # Two standard errors: about 95 % of what chance alone does to one score.
    small = settings.metric == "val/accuracy" and gain < 2 * read.standard_error(theirs)
    doubt = "; so small a gain may be chance" if small else ""
    return f"gain      {gain:.4f} over the recipes ({found}){doubt}"


def applied_table(trials: Sequence[TrialRecord]) -> tuple[Table, str]:
    """Return what trials read back from the objects that train: a row each, and what all share."""
    read = {trial.trial_id: _applied_cells(trial.applied) for trial in trials if trial.applied}
    names = list(dict.fromkeys(name for cells in read.values() for name in cells))
    shared = [n for n in names if n != "lr" and len({c.get(n) for c in read.values()}) == 1]
    if len(read) == 1:
        shared = []
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("lr of each stage", overflow="fold", ratio=1)
    table.add_column("and", overflow="fold", ratio=1)
    for trial_id, cells in read.items():
        own = [f"{n}={cells[n]}" for n in cells if n != "lr" and n not in shared]
        table.add_row(trial_id, Text(cells["lr"]), Text(" ".join(own)))
    first = next(iter(read.values()), {})
    return table, " ".join(f"{name}={first[name]}" for name in shared)


def _applied_cells(applied: dict[str, Any]) -> dict[str, str]:
    """Return each applied value as a text; learning rates of all stages together."""
    rates = applied.get("lr", {})
    rest = {
        k.removeprefix("options/").replace("_options/", "."): v
        for k, v in flat({**applied, "lr": {}}).items()
    }
    said = {name: _short(value) for name, value in rest.items() if value not in ("", None)}
    return {"lr": " ".join(f"{stage}={_short(rate)}" for stage, rate in rates.items()), **said}


def lr_range_lines(found: "LrRange", name: str) -> list[str]:
    """Return what the range test proposes, as it is written in a space.

    Args:
        found: what it saw.
        name: of the parameter.
    """
    if found.low is None or found.high is None or found.steepest is None:
        return [
            f"lr        nothing to propose: from {found.lrs[0]:g} to {found.lrs[-1]:g} the loss "
            "did not fall; try --lowest, --highest and --steps"
        ]
    low, high = f"{found.low:.1e}", f"{found.high:.1e}"
    open_end = found.high == found.lrs[-1]
    return [
        f"lr        from {found.low:.1e}, where the loss begins to fall, to {found.high:.1e}, "
        f"where it is smallest; steepest at {found.steepest:.1e}",
        f'space     trial.suggest_float("{name}", {low}, {high}, log=True)',
        *(
            ["          the loss was still falling there: try a larger --highest"]
            if open_end
            else []
        ),
    ]


def verified_table(found: "Verified") -> Table:
    """Return the pieces of a training's state: whether kills changed them, and what of them."""
    table = Table(box=None, pad_edge=False)
    table.add_column("piece", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("where", overflow="fold")
    for piece in found.pieces:
        differs = bool(piece.differences)
        result = Text("differs", "bold red") if differs else Text("same", "green")
        table.add_row(Text(printable(piece.name)), result, Text(printable(_say_piece(piece))))
    return table


def _say_piece(piece: "Piece") -> str:
    if not piece.count:
        return "there is none"
    if not piece.differences:
        return f"{piece.count:,} value(s)"
    shown = [_say_difference(each) for each in piece.differences[:MAX_DIFFERENCES_SHOWN]]
    more = len(piece.differences) - len(shown)
    sizes = [each.largest for each in piece.differences if each.largest is not None]
    return (
        f"{len(piece.differences):,} of {piece.count:,}: {'; '.join(shown)}"
        f"{f'; and {more:,} more' if more else ''}"
        f"{f'; at most by {max(sizes):.2g}' if sizes else ''}"
    )


def _say_difference(difference: "Difference") -> str:
    where = difference.where or "all of it"
    if difference.largest is not None:
        return where
    return f"{where} {difference.straight}, killed {difference.killed}"


def verified_lines(found: "Verified") -> list[str]:
    """Return how often a training was killed, what came of it, and where to look if it differs."""
    times = [_say_kill(kill) for kill in found.kills]
    missed = found.asked - len(times)
    late = f"; {missed} more came too late" if missed else ""
    lines = [f"kills     {len(times)}, {', '.join(times)}, of {found.epochs}{late}"]
    if found.is_same:
        lines.append("verdict   the same to the last bit, interrupted or not")
    elif found.failure:
        lines.append(f"verdict   the killed training could not go on: {found.failure}")
    else:
        lines += _difference_lines(found)
    if found.folder is not None:
        lines.append(f"kept      {found.folder}: straight, killed, and what they printed")
    return lines


def _difference_lines(found: "Verified") -> list[str]:
    """Return since when two trainings differ, and what that is usually due to."""
    named = ", ".join(piece.name for piece in found.pieces if piece.differences)
    lines = [f"verdict   differs: {named}"]
    first, kill = found.first_epoch, found.kills[0].done
    if first is not None and first <= kill:
        lines.append(
            f"since     epoch {first}, which no kill had touched: this training does not repeat, "
            "interrupted or not"
        )
    elif first is not None:
        lines.append(f"since     epoch {first}; the first kill was after {kill} whole epoch(s)")
    lines.append(
        "hint      state that is in no checkpoint: a loss or an augment of your own that counts "
        "outside of its buffers, or draws from Python's `random` or NumPy instead of torch"
    )
    if found.device == "cuda":
        lines.append(
            "          on a GPU the last bits repeat with deterministic algorithms only "
            "(torch.use_deterministic_algorithms); compare with --device cpu"
        )
    return lines


def _say_kill(kill: "Kill") -> str:
    return f"after epoch {kill.done}" if kill.is_between else f"in epoch {kill.done + 1}"
