"""Trials as recorded in the ledger: the basis of every reader of a run."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tuneapp.config import RunSettings, is_better
from tuneapp.ledger import Event

FOLD_SCORE = "fold/"
"""Before the name of the metric: the score of the one fold that a row is about."""

MAX_TWINS = 20
"""After this many duplicate proposals in a row, a space counts as exhausted."""

State = Literal["unfinished", "finished", "stopped", "diverged", "failed", "duplicate"]
Origin = Literal["recipe", "search", "set"]


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        trial_id: such as `t0007`; its folder's name.
        origin: `recipe` (one of the space's FIRST_TRIALS), `search` (proposed by the sampler) or
            `set` (given by the user to `train`).
        params: the sampled values.
        epochs: how many rows it was to report: its epochs, or with folds, its folds.
        rows: metrics of each epoch done; with folds, their means over the folds done.
        applied: what it really trained with in its newest epoch; empty before its first.
        state: `stopped` is early, by comparison with others; `unfinished` can be resumed;
            `duplicate` is not run: an earlier trial is the same.
        cause: why it did not finish, in a line.
        kind: of a failure, one of `failures.KINDS`; else empty.
        told: the value that was reported to the sampler; None if there was none.
        config_hash: of its effective configuration; equal ones are duplicates.
        twin: the earlier trial that it is a duplicate of; empty for nearly all.
        retries: how often it was retried since its newest epoch.
        warnings: its process's messages for the user.
        space: number of the space of the run that proposed it: 1, or more after a `refine`.
        is_history: it lies outside the space as refined, and the search does not know of it.
    """

    trial_id: str
    origin: Origin
    params: dict[str, Any]
    epochs: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    applied: dict[str, Any] = field(default_factory=dict)
    state: State = "unfinished"
    cause: str = ""
    kind: str = ""
    told: float | None = None
    config_hash: str = ""
    twin: str = ""
    retries: int = 0
    warnings: list[str] = field(default_factory=list)
    space: int = 1
    is_history: bool = False

    def best(self, settings: RunSettings, up_to: int | None = None) -> dict[str, Any] | None:
        """Return the row of the best epoch, the earliest of equals; None before the first.

        With folds, the newest row: the mean over all folds done, not the best of fewer.

        Args:
            settings: the metric.
            up_to: only consider epochs up to this one.
        """
        best: dict[str, Any] | None = None
        for row in self.rows:
            if up_to is not None and row["epoch"] > up_to:
                break
            if settings.data.folds is not None:
                best = row
                continue
            value = row[settings.metric]
            if is_better(value, None if best is None else best[settings.metric], settings.mode):
                best = row
        return best

    def apply(self, event: Event) -> None:
        """Apply an event of this trial."""
        match event["event"]:
            case "applied":
                self.applied = event["applied"]
            case "epoch":
                self.rows.append(event["row"])
                self.retries = 0
            case "warned":
                self.warnings.append(event["text"])
            case "retried":
                self.retries += 1
            case "ended":
                self.state = event["state"]
                self.cause = event["cause"]
                self.kind = event.get("kind", "")
                self.told = event["told"]


def read_records(events: Iterable[Event]) -> dict[str, TrialRecord]:
    """Return the trials of a ledger by their ids, in the order in which they were proposed."""
    records: dict[str, TrialRecord] = {}
    for event in events:
        take(records, event)
    return records


def take(records: dict[str, TrialRecord], event: Event) -> None:
    """Apply one more event to the trials."""
    if event["event"] == "proposed":
        records[event["trial"]] = TrialRecord(
            event["trial"],
            event["origin"],
            event["params"],
            event["epochs"],
            config_hash=event.get("config_hash", ""),
            twin=event.get("twin", ""),
            space=event.get("space", 1),
        )
    elif event["event"] == "refined":
        for trial_id, record in records.items():
            record.is_history = trial_id in event["history"]
    elif "trial" in event:
        records[event["trial"]].apply(event)


def current_space(events: Iterable[Event]) -> int:
    """Return the number of the space that trials of the run come from now."""
    return next((e["space"] for e in reversed(list(events)) if e["event"] == "refined"), 1)


def trials_wanted(events: Iterable[Event]) -> int:
    """Return how many trials the run is to have in total."""
    return next((e["trials"] for e in reversed(list(events)) if e["event"] == "sweep"), 0)


def is_exhausted(events: Sequence[Event]) -> bool:
    """Whether the newest proposals were all duplicates of earlier trials.

    `extend` and `refine` restart the count.
    """
    twins = 0
    for event in reversed(events):
        if event["event"] in ("sweep", "refined"):
            return False
        if event["event"] == "proposed":
            if not event.get("twin"):
                return False
            twins += 1
            if twins == MAX_TWINS:
                return True
    return False


def trials_to_go(records: Iterable[TrialRecord], wanted: int, *, exhausted: bool) -> int:
    """Return how many trials are still to run: unfinished ones, and ones not proposed yet.

    Duplicates are not run and not counted.

    Args:
        records: all trials of the run, in the order in which they were proposed.
        wanted: trials that the run is to have.
        exhausted: whether the space has no further trials.
    """
    records = list(records)
    unfinished = sum(record.state == "unfinished" for record in records)
    if exhausted:
        return unfinished
    return unfinished + max(wanted - sum(not record.twin for record in records), 0)


def best_record(
    records: Iterable[TrialRecord], settings: RunSettings
) -> tuple[TrialRecord, dict[str, Any]] | None:
    """Return the trial with the best epoch of all, the earliest of equals, and that epoch's row.

    Stopped, diverged and failed trials are included with the epochs that they have: a checkpoint of
    the best epoch is kept for each. With folds, means over different folds are not compared: only
    trials with the most folds are included.
    """
    records = list(records)
    if settings.data.folds is not None:
        most = max((len(record.rows) for record in records), default=0)
        records = [record for record in records if len(record.rows) == most]
    best: tuple[TrialRecord, dict[str, Any]] | None = None
    for record in records:
        row = record.best(settings)
        if row is None:
            continue
        than = None if best is None else best[1][settings.metric]
        if is_better(row[settings.metric], than, settings.mode):
            best = (record, row)
    return best


def spread_of(scores: Sequence[float]) -> float:
    """Return the standard deviation over folds: of a sample, so divided by one less."""
    return statistics.stdev(scores)


def flat(applied: dict[str, Any]) -> dict[str, Any]:
    """Return `{"lr": {"head": 1}}` as `{"lr/head": 1}`, and lists as words."""
    out: dict[str, Any] = {}
    for name, value in applied.items():
        if isinstance(value, dict):
            out |= {f"{name}/{inner}": v for inner, v in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            out[name] = " ".join(map(str, value))
        else:
            out[name] = value
    return out
