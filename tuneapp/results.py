"""A run in words: the table of its trials, its result, and what went wrong."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table
from rich.text import Text

from tuneapp.config import RunSettings, is_better
from tuneapp.display import say_params, say_params_shortly
from tuneapp.failures import at_fault, hint
from tuneapp.records import FOLD_SCORE, MAX_TWINS, TrialRecord, spread_of
from tuneapp.rundir import printable

if TYPE_CHECKING:
    from tuneapp.summary import Summary

STATE_STYLES = {
    "unfinished": "cyan",
    "finished": "green",
    "stopped": "dim",
    "diverged": "yellow",
    "failed": "red",
    "duplicate": "dim",
}
MAX_BAD_SHOWN = 20
MUCH_WAITING = 0.2
"""Above this share of a training's time, waiting for data is worth a remedy."""


class Waiting(NamedTuple):
    """How long trials waited for data.

    Attributes:
        line: says so, with a remedy if it was too long.
        is_too_long: whether it was.
    """

    line: str
    is_too_long: bool


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


def result_lines(read: "Summary") -> list[str]:
    """Return what went wrong, the best trial, and what the search gained over the recipes."""
    settings = read.record.settings
    metric = settings.metric
    lines = _failure_lines(read.ranked)
    twins = sum(trial.state == "duplicate" for trial in read.trials)
    if twins:
        lines.append(f"same      {twins} trial(s) were the same as earlier ones, and not run again")
    if read.is_exhausted:
        lines.append(
            f"exhausted the last {MAX_TWINS} proposals were duplicates: the space is exhausted"
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
    """Return why trials ended early: each cause, then what is at fault and what helps."""
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
    fate = "left out" if policy == "drop" else "in training, replaced by others of their class"
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


def waiting(read: "Summary") -> Waiting:
    """Return how long trials waited for data."""
    trained = [t for t in read.trials if any("train/data_wait" in row for row in t.rows)]
    if not trained:
        return Waiting("waiting   for data: not known", is_too_long=False)
    longest = max(trained, key=mean_wait)
    share = mean_wait(longest)
    line = f"waiting   {longest.trial_id} waited for data during {share:.0%} of its training"
    if share <= MUCH_WAITING:
        return Waiting(line, is_too_long=False)
    workers = longest.applied.get("workers", 0)
    remedy = f"more --workers than {workers}, or a weaker augment"
    if longest.applied.get("images") == "streamed":
        remedy = f"a larger --store-budget, or more --workers than {workers}"
    return Waiting(f"{line}, more than a fifth: try {remedy}", is_too_long=True)


def _test_lines(read: "Summary") -> list[str]:
    """Return how often the test split was opened, with each result."""
    if not read.test_results:
        return []
    times = len(read.test_results)
    name = f"test/{read.record.settings.metric.removeprefix('val/')}"
    lines = [f"test      the test split was opened {times} time(s)"]
    for trial_id, scores in read.test_results:
        values = [row[name] for row in scores if name in row]
        said = f"{name} {sum(values) / len(values):.4f}" if values else "no score"
        lines.append(f"          {trial_id}: {said}")
    if times > 1:
        lines.append("          the best of several test scores is optimistically biased")
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
