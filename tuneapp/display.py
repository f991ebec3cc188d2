"""What commands show of search spaces, networks and checks, as tables and lines."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tuneapp.config import RunSettings, TrialConfig
from tuneapp.records import TrialRecord, spread_of
from tuneapp.rundir import printable

if TYPE_CHECKING:
    from tuneapp.anatomy import Anatomy
    from tuneapp.final_test import TestResult
    from tuneapp.lr_range import LrRange
    from tuneapp.space import Parameter, SearchSpace
    from tuneapp.verify import Difference, Kill, Piece, Verified

MAX_DIFFERENCES_SHOWN = 3


def space_table(parameters: "Sequence[Parameter]") -> Table:
    """Return the table of a space's parameters, each below the one that it depends on."""
    table = Table(box=None, pad_edge=False)
    table.add_column("parameter", no_wrap=True)  # a name is copied into --set
    table.add_column("allowed", overflow="fold")
    table.add_column("condition", overflow="fold")
    for each in _by_condition(parameters):
        table.add_row(*(Text(printable(t)) for t in (each.name, each.allowed, each.condition)))
    return table


def _by_condition(parameters: "Sequence[Parameter]") -> "list[Parameter]":
    """Return the parameters in order, those with a condition after the last one named in it."""
    names = {each.name for each in parameters}
    below: dict[str, list[Parameter]] = {}
    for each in parameters:
        named = [part.partition(" = ")[0] for part in each.condition.split(" and ")]
        known = [name for name in named if name in names]
        below.setdefault(known[-1] if known else "", []).append(each)

    def tree(name: str) -> "list[Parameter]":
        return [found for each in below.pop(name, []) for found in (each, *tree(each.name))]

    return tree("")


def fixed_line(space: "SearchSpace") -> str:
    """Return what no trial of a space changes: what every space sets, and what is not the default.

    A field of an optimizer, schedule or loss that is searched is shown as `lr=...`.
    """
    configs = [branch.config for branch in space.branches()]
    first = ("model", "weights", "epochs", "batch_size")
    known = {field.name: field for field in fields(TrialConfig)}
    said = []
    for name in (*first, *(name for name in known if name not in first)):
        values = [getattr(config, name) for config in configs]
        is_default = all(value == _default(known[name]) for value in values)
        text = _say_fixed(values)
        if text is not None and (name in first or not is_default):
            said.append(f"{name}={text}")
    return f"fixed     {' '.join(said)}"


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _say_fixed(values: Sequence[Any]) -> str | None:
    """Return the one value of all configurations as text; None if they differ."""
    one = values[0]
    if not is_dataclass(one):
        return short(one) if all(value == one for value in values) else None
    if any(type(value) is not type(one) for value in values):
        return None
    inner = []
    for field in fields(one):
        each = [getattr(value, field.name) for value in values]
        text = _say_fixed(each)
        if text is None or each[0] != _default(field):
            inner.append(f"{field.name}={'...' if text is None else text}")
    return f"{type(one).__name__}({', '.join(inner)})" if inner else type(one).__name__


def anatomy_table(anatomy: "Anatomy") -> Table:
    """Return the table of a network's stages, from stem to head, and their sums."""
    unit, scale, digits = "MFLOPs", 1e6, 1
    if anatomy.flops >= 1e9:
        unit, scale, digits = "GFLOPs", 1e9, 3
    elif anatomy.flops < 1e6:
        unit, scale, digits = "kFLOPs", 1e3, 1
    table = Table(box=None, pad_edge=False)
    table.add_column("depth", justify="right", no_wrap=True)
    table.add_column("stage", overflow="fold")
    table.add_column("output", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("trainable from here", justify="right")
    table.add_column(unit, justify="right", no_wrap=True)

    def say_flops(flops: int) -> str:
        text = f"{flops / scale:,.{digits}f}"
        return f"{flops / scale:.3g}" if flops and not float(text.replace(",", "")) else text

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


def anatomy_notes(anatomy: "Anatomy") -> list[str]:
    """Return how the table of a network is to be read."""
    from tuneapp.models import find_family

    family = find_family(anatomy.model)
    notes = [
        "freeze_depth=k freezes the first k rows; 'trainable from here' in row k is the rest",
        "FLOPs: forward, 2 per multiply-add; without normalisation, activations and pooling",
    ]
    if family is not None and family.aux:
        notes.append("shown without the auxiliary classifiers, which aux_weight > 0 trains as well")
    return notes


def say_params(params: dict[str, Any]) -> str:
    """Return parameter values in a line, by their full names: `optimizer=sgd sgd.lr=0.0131`."""
    return " ".join(f"{k}={short(v)}" for k, v in params.items())


def say_params_shortly(params: dict[str, Any]) -> str:
    """Return parameter values in a line, a branch's after its name: `sgd lr=0.0131`."""
    branches = {name.split(".", 1)[0] for name in params if "." in name}
    words = []
    for name, value in params.items():
        branch, dot, own_name = name.partition(".")
        if value in branches:
            words.append(str(value))
        elif dot and branch in params.values():
            words.append(f"{own_name}={short(value)}")
        else:
            words.append(f"{name}={short(value)}")
    return " ".join(words)


def short(value: Any) -> str:
    """Return a value as text, a float with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else printable(str(value))


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
        val = best.get(f"val/{name.removeprefix('test/')}")
        before = "" if val is None else f"  (validation {val:.4f})"
        lines.append(f"{name:<26} {mean:.4f}{before}{doubt}")
    if result.bad:
        named = ", ".join(path for path, _ in result.bad[:3])
        lines.append(f"unread    {len(result.bad)} test image(s), left out: {named}")
    lines.append(f"opened    {result.times_opened} time(s) in this run; every use is recorded")
    return lines


def lr_range_lines(found: "LrRange", name: str) -> list[str]:
    """Return what the range test proposes, as it is written in a space.

    Args:
        found: what it saw.
        name: of the parameter.
    """
    if found.low is None or found.high is None or found.steepest is None:
        return [f"lr        nothing to propose: {_no_lr_range(found)}", *_lr_range_ends(found)]
    low, high = f"{found.low:.1e}", f"{found.high:.1e}"
    lines = [
        f"lr        from {low}, where the loss begins to fall, to {high}, where it is smallest; "
        f"steepest at {found.steepest:.1e}",
        f'space     trial.suggest_float("{name}", {low}, {high}, log=True)',
        "holds     for these parameters only; test other freeze depths and optimizers with --set",
    ]
    if found.is_still_falling:
        lines.append("          the loss was still falling there: try a larger --highest")
    return [*lines, *_lr_range_ends(found)]


def _no_lr_range(found: "LrRange") -> str:
    """Return why nothing is proposed, and what to do."""
    if found.ended_at_once:
        first = min(found.last_lr(curve) for curve in found.curves)
        return f"the training diverged at lr {first:.1e}, before the loss fell; lower --lowest"
    if found.fall <= found.noise:
        return (
            f"the loss fell by {found.fall:.2g}, and noise alone can cause a fall of "
            f"{found.noise:.2g}; give --steps or --seeds a larger number"
        )
    share = found.fall / max(found.smoothed)
    return f"the loss fell by {share:.1%} only; give --steps or --highest a larger number"


def _lr_range_ends(found: "LrRange") -> list[str]:
    """Return where and why seeds ended, if one of them did not reach the last learning rate."""
    early = [curve for curve in found.curves if curve.end != "reached the end"]
    if not early:
        return []
    said = []
    for end in ("diverged", "blew up"):
        lrs = sorted(found.last_lr(curve) for curve in early if curve.end == end)
        if lrs:
            said.append(f"{len(lrs)} {end} at lr {', '.join(f'{lr:.1e}' for lr in lrs)}")
    total = len(found.curves)
    if len(early) < total:
        said.append(f"{total - len(early)} reached the end")
    if found.averaged < total:
        said.append(f"the curve is the mean of the {found.averaged} that got furthest")
    return [f"seeds     {'; '.join(said)}"]


def verified_table(found: "Verified") -> Table:
    """Return the pieces of a training's state: whether kills changed them, and where."""
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
    """Return how often a training was killed, the verdict, and where to look if it differs."""
    times = [_say_kill(kill) for kill in found.kills]
    missed = found.asked - len(times)
    late = f"; {missed} more came too late" if missed else ""
    lines = [f"kills     {len(times)}, {', '.join(times)}, of {found.epochs}{late}"]
    if found.is_same:
        lines.append("verdict   the same to the last bit, interrupted or not")
    elif found.failure:
        lines.append(f"verdict   the killed training could not be resumed: {found.failure}")
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
        "hint      state that is in no checkpoint: a custom loss or augment that counts "
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
