"""What trials really trained with, as a table: what differs in columns, what all share once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from tuneapp.display import short
from tuneapp.records import TrialRecord
from tuneapp.rundir import printable

COLUMNS = ("lr of stages", "optimizer", "schedule", "loss", "trainable", "frozen", "also")
_RATES = "lr of stages"
_OWN_COLUMN = {
    "lr": _RATES,
    "optimizer": "optimizer",
    "options": "optimizer",
    "weight_decay": "optimizer",
    "undecayed_parameters": "optimizer",
    "schedule": "schedule",
    "schedule_options": "schedule",
    "warmup_steps": "schedule",
    "loss": "loss",
    "loss_options": "loss",
    "aux_weight": "loss",
    "trainable_parameters": "trainable",
    "frozen_parameters": "frozen",
}
"""The column of each value; those of any other name, which later versions may read back, are in
the last one."""
_COUNTS = ("trainable", "frozen")
MIN_RATES = 20
"""Columns that learning rates need: a stage's name and rate."""
_KINDS = ("optimizer", "schedule", "loss")
"""Columns that begin with a class or a function, which the other values of the column go with."""
_HIDDEN = {
    "frozen_held": 0,
    "frozen_training": [],
    "aux_weight": 0.0,
    "warmup_steps": 0,
    "undecayed_parameters": 0,
}
"""Values that are not shown: of the first two any other one would have failed the trial; with the
rest there is nothing of that kind."""
_WORDS = {
    "weight_decay": "weight decay",
    "undecayed_parameters": "parameters without decay",
    "warmup_steps": "warm-up steps",
    "ema_decay": "EMA decay",
    "frozen_batchnorm": "frozen BatchNorm",
}

Words = dict[tuple[str, str], str]
"""(column, name) -> value, of one trial, as text."""


class AppliedTable(NamedTuple):
    """What was read back from the objects that trained.

    Attributes:
        table: a row for each trial, in the order given; of a single trial, a row for each column.
        shared: a label and values: `all` with what all trials have in common, and an optimizer,
            schedule or loss with what all of its trials have in common.
        num_trials: trials whose values were read back. They match what was asked: values
            that do not fail the trial and are not kept.
    """

    table: Table
    shared: list[tuple[str, str]]
    num_trials: int


def applied_table(trials: Sequence[TrialRecord], width: int) -> AppliedTable:
    """Return what trials trained with, by what they read back from the objects that train.

    Args:
        trials: in the order of the rows; those that have not finished an epoch are left out.
        width: columns that the table can take.
    """
    read = {t.trial_id: _words(t.applied) for t in trials if t.applied}
    if len(read) == 1:
        return AppliedTable(_single_table(*read.items()), [], 1)
    rows = list(read.values())
    common = _take_common(rows)
    shared = [("all", common)] if common else []
    for column in _KINDS:
        shared += _take_common_by_kind(rows, column)
    cells = [{column: _cell(words, column) for column in COLUMNS} for words in rows]
    shown = [column for column in COLUMNS if any(cell[column] for cell in cells)]
    widths = _widths([{c: cell[c] for c in shown} for cell in cells], width)
    table = Table(box=None, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    for column in shown:
        side: JustifyMethod = "right" if column in _COUNTS else "left"
        table.add_column(column, overflow="fold", justify=side, width=widths.get(column))
    for trial_id, cell in zip(read, cells, strict=True):
        table.add_row(trial_id, *(Text(cell[column]) for column in shown))
    return AppliedTable(table, shared, len(read))


def _widths(cells: Sequence[Mapping[str, str]], width: int) -> dict[str, int]:
    """Return the widths of columns that rich would make too narrow for their longest word.

    Learning rates get what is left: all that they need while the rest is not folded, else MIN_RATES
    while it is folded between values, else what folding between words leaves.
    """
    if not cells:
        return {}
    fixed: dict[str, int] = {}
    needed = min(max(len(cell.get(_RATES, "")) for cell in cells), 2 * MIN_RATES)
    for separator, rates in ((None, needed), (", ", MIN_RATES), (" ", 0)):
        fixed = {
            column: max(
                len(part)
                for text in (column, *(cell[column] for cell in cells))
                for part in ([text] if separator is None else text.split(separator))
            )
            + (separator == ", ")
            for column in cells[0]
            if column != _RATES
        }
        if len("t0000") + sum(2 + each for each in fixed.values()) + 2 + rates <= width:
            break
    return fixed


def _single_table(row: tuple[str, Words]) -> Table:
    """Return the table of a single trial, which has nothing to compare: a line for each column."""
    trial_id, words = row
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("column", no_wrap=True)
    table.add_column("values", overflow="fold")
    table.add_row("trial", trial_id)
    for column in COLUMNS:
        cell = _cell(words, column)
        if cell:
            table.add_row(column, Text(cell))
    return table


def _words(applied: Mapping[str, Any]) -> Words:
    """Return each value as text under its column and name, without those that say nothing."""
    found: Words = {}
    for key, value in applied.items():
        if value is None or value in ("", {}) or _HIDDEN.get(key, ...) == value:
            continue
        if key == "undecayed_parameters" and not applied.get("weight_decay"):
            continue
        column = _OWN_COLUMN.get(key, COLUMNS[-1])
        name = _WORDS.get(key, key.replace("_", " "))
        if key == "lr":
            found[column, name] = _say_rates(value)
        elif isinstance(value, Mapping):
            # Torch's names, and those of a loss, are left as they are.
            prefix = "" if column != COLUMNS[-1] else f"{name} "
            for inner, each in value.items():
                found[column, f"{prefix}{_WORDS.get(str(inner), inner)}"] = _say(each)
        else:
            found[column, name] = _say(value)
    return found


def _say(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return " ".join(f"{printable(str(k))}={_say(v)}" for k, v in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(_say, value)) or "none"
    return short(value)


def _say_rates(rates: Mapping[str, float]) -> str:
    """Return the learning rate of each stage; neighbours with the same one as `first..last`."""
    runs: list[tuple[str, str, float]] = []
    for stage, rate in rates.items():
        if runs and runs[-1][2] == rate:
            runs[-1] = (runs[-1][0], stage, rate)
        else:
            runs.append((stage, stage, rate))
    return " ".join(
        f"{printable(a if a == b else f'{a}..{b}')}={short(rate)}" for a, b, rate in runs
    )


def _take_common(rows: Sequence[Words]) -> str:
    """Take what all rows have in common, apart from learning rates, out of them; return it."""
    taken = []
    for column in COLUMNS:
        common = _common(rows, column) if column != _RATES else {}
        if not common:
            continue
        text = _cell(common, column)
        if column in _COUNTS:
            text = f"{text} parameters {column}"
        elif (column, column) in common:
            text = f"{column} {text}"
        taken.append(text)
    return "; ".join(taken)


def _take_common_by_kind(rows: Sequence[Words], column: str) -> list[tuple[str, str]]:
    """Take what all rows with the same class have in common in one column; return it."""
    kinds = dict.fromkeys(row[column, column] for row in rows if (column, column) in row)
    taken = []
    for kind in kinds:
        same = [row for row in rows if row.get((column, column)) == kind]
        common = _common(same, column, but=column) if len(same) > 1 else {}
        if common:
            taken.append((kind, _cell(common, column)))
    return taken


def _common(rows: Sequence[Words], column: str, but: str = "") -> Words:
    """Take the values of a column that are the same in all rows out of them; return them."""
    first = rows[0] if rows else {}
    common = {
        (of, name): text
        for (of, name), text in first.items()
        if of == column and name != but and all(row.get((of, name)) == text for row in rows)
    }
    for row in rows:
        for key in common:
            del row[key]
    return common


def _cell(words: Words, column: str) -> str:
    """Return a column's values in a line: a class by itself, others after their names."""
    names = {"trainable parameters", "frozen parameters", column}
    return ", ".join(
        text if name in names or column == _RATES else f"{name} {text}"
        for (of, name), text in words.items()
        if of == column
    )
