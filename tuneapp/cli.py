"""The command line: what can be asked, and what errors become exit codes.

Exit codes: 0 done; 1 `doctor` found something serious, or `verify-resume` a difference; 2 bad
input; 3 done, but some trials failed; 4 no trial gave a result; 5 the disk, or what is on it, or
Ray failed; 75 the run is in use; 129, 130 and 143 ended by SIGHUP, Ctrl-C and SIGTERM. Each command
imports what it needs when it runs: `--help` needs neither torch nor Ray.
"""

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from tuneapp.config import Data, RunSettings
from tuneapp.errors import ConfigError, StorageError, TuneappError
from tuneapp.options import (
    DataOptions,
    LoadingOptions,
    SourceOptions,
    chosen_data,
    chosen_settings,
    expanded,
    num_bytes,
    seconds,
)
from tuneapp.terminal import (
    LogToStderr,
    Show,
    err,
    out,
    print_applied,
    print_examination,
    print_result,
    print_sweep,
    print_to,
    print_training,
    say,
    short_path,
    warn,
)

if TYPE_CHECKING:
    from tuneapp.records import TrialRecord
    from tuneapp.rundir import RunDir, RunRecord
    from tuneapp.space import SearchSpace
    from tuneapp.summary import Summary

OF_THE_MACHINE = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ENOMEM,
)
"""What no code of ours can mend, wherever it comes up: `ulimit -n`, a full or a failing disk."""

app = typer.Typer(
    name="tuneapp",
    help="Find the fine-tuning recipe for your own images.",
    epilog="Begin with: python -m tuneapp sweep search_spaces/resnet.py",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(function: Callable[..., int]) -> Callable[..., int]:
    """Make a function that returns an exit code a command; Ctrl-C is code 130."""
    with_options = expanded(function)

    @functools.wraps(with_options)
    def run(**options: Any) -> int:
        try:
            code = with_options(**options)
        except KeyboardInterrupt:
            code = 130
        raise typer.Exit(code)

    app.command()(run)
    return function


SpaceFile = Annotated[Path, typer.Argument(metavar="SPACE", help="A search-space file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/x.")]
Epochs = Annotated[
    int | None, typer.Option(metavar="N", help="Ceiling on every trial's epochs, for quick looks.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Height and width that the network sees. Default: what its weights were made for "
        "(224 for ResNets); 32 for the embedded data.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Source of every random draw; default: 0.")
]
RunsDir = Annotated[Path, typer.Option(metavar="DIR", help="Where run directories are made.")]
Name = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of the run directory. Default: the space's and a number."),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What trials are judged by: val/accuracy (the default), val/loss, "
        "val/balanced_accuracy, val/macro_f1, val/auroc, val/average_precision (multi-label), "
        "val/recall/CLASS.",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="auto, the default: each trial's GPU, where it has one."),
]
SetInSpace = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Value of a parameter; may be given several times. What is not set is as in the "
        "first recipe of SPACE.",
    ),
]
MoreTrials = Annotated[
    int, typer.Option(metavar="N", help="Trials beyond those that RUN was to have.")
]
DashboardFlag = Annotated[
    bool, typer.Option("--dashboard", help="Start the Ray dashboard and print its address.")
]
DashboardHost = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Start it on this address; any but 127.0.0.1 lets others on the network reach it.",
    ),
]


@_command
def sweep(
    space: SpaceFile,
    data: DataOptions,
    loading: LoadingOptions,
    trials: Annotated[
        int, typer.Option(metavar="N", help="Trials in all; the space's recipes come first.")
    ] = 16,
    epochs: Epochs = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    metric: MetricName = None,
    device: Device = None,
    concurrent: Annotated[
        int | None,
        typer.Option(metavar="N", help="Trials at once. Default: one on each GPU or CPU core."),
    ] = None,
    cpus_per_trial: Annotated[
        int | None,
        typer.Option(metavar="N", help="CPU threads of each trial. Default: an equal share."),
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="1, or the share of a GPU that each trial gets."),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End after this long, such as 90s, 30m or 1h30m."),
    ] = None,
    keep_best: Annotated[
        int,
        typer.Option(metavar="N", help="Keep the checkpoints of the N best trials that ended."),
    ] = 5,
    disk_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of all checkpoints, such as 20GB; the best stays."),
    ] = None,
    min_free: Annotated[
        str, typer.Option(metavar="SIZE", help="Pause while the disk has less free than this.")
    ] = "500MB",
    runs_dir: RunsDir = Path("runs"),
    name: Name = None,
    dashboard: DashboardFlag = False,
    dashboard_host: DashboardHost = None,
) -> int:
    """Search for the best configuration of SPACE on your images.

    The recipes of the space run first and in full; then Optuna's TPE proposes and ASHA stops
    what falls behind. Ctrl-C ends it tidily; `resume` goes on.
    """
    for flag, number in (("--trials", trials), ("--keep-best", keep_best)):
        if number < 1:
            raise ConfigError(f"{flag} {number}: must be at least 1")
    budget_s = None if time_budget is None else seconds("--time-budget", time_budget)
    loaded = _read_space(space)
    settings = chosen_settings(
        RunSettings(data=chosen_data(data, loaded.data)),
        loading,
        seed=seed,
        metric=metric,
        max_epochs=epochs,
        image_size=image_size,
        device=device,
    )

    from tuneapp.sweep import SweepOptions, start_sweep

    options = SweepOptions(
        trials=trials,
        runs_dir=runs_dir,
        name=name,
        concurrent=concurrent,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        time_budget_s=budget_s,
        dashboard_host=dashboard_host or ("127.0.0.1" if dashboard else None),
        keep_best=keep_best,
        disk_budget=None if disk_budget is None else num_bytes("--disk-budget", disk_budget),
        min_free=num_bytes("--min-free", min_free),
    )
    with Show() as show:
        outcome = start_sweep(loaded, settings, options, say, show.begin, show.watch)
    return print_sweep(outcome)


@_command
def resume(
    run: RunPath,
    dashboard: DashboardFlag = False,
    dashboard_host: DashboardHost = None,
) -> int:
    """Go on with RUN where it ended: unfinished trials from their last epoch, then the rest."""
    from tuneapp.rundir import open_run

    if open_run(run)[1].kind == "train":
        from tuneapp.single import resume_training

        if dashboard or dashboard_host:
            raise ConfigError(f"{run} is a single training: it runs without Ray and its dashboard")
        with Show() as show:
            resumed = resume_training(run, show.begin, show.watch)
        return print_training(resumed)

    from tuneapp.sweep import resume_sweep

    with Show() as show:
        host = dashboard_host or ("127.0.0.1" if dashboard else None)
        outcome = resume_sweep(run, show.begin, show.watch, host)
    return print_sweep(outcome)


@_command
def extend(
    run: RunPath,
    trials: MoreTrials = 16,
    dashboard: DashboardFlag = False,
    dashboard_host: DashboardHost = None,
) -> int:
    """Give the sweep in RUN more trials, and go on with it: what it knows, it knows."""
    _require_more(trials)

    from tuneapp.sweep import resume_sweep

    with Show() as show:
        host = dashboard_host or ("127.0.0.1" if dashboard else None)
        outcome = resume_sweep(run, show.begin, show.watch, host, more=trials)
    return print_sweep(outcome)


@_command
def refine(
    run: RunPath,
    space: SpaceFile,
    trials: MoreTrials = 16,
    dashboard: DashboardFlag = False,
    dashboard_host: DashboardHost = None,
) -> int:
    """Go on with the sweep in RUN in a changed SPACE, on the same images and split.

    Trials that lie in SPACE, too, teach the search; the others stay in RUN as its history.
    """
    _require_more(trials)
    loaded = _read_space(space)

    from tuneapp.sweep import refine_sweep

    with Show() as show:
        host = dashboard_host or ("127.0.0.1" if dashboard else None)
        outcome = refine_sweep(run, loaded, trials, say, show.begin, show.watch, host)
    return print_sweep(outcome)


@_command
def train(
    data: DataOptions,
    loading: LoadingOptions,
    space: Annotated[
        Path | None,
        typer.Argument(metavar="SPACE", help="A search-space file; with --from, the run's own."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Value of a parameter; may be given several times. What is not set is as in the "
            "first recipe of SPACE, or as in the trial of --from.",
        ),
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Take a trial of this run.")
    ] = None,
    trial: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Which trial of --from: best (the default), or an id such as t0003."
        ),
    ] = None,
    epochs: Epochs = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    metric: MetricName = None,
    device: Device = None,
    runs_dir: RunsDir = Path("runs"),
    name: Name = None,
) -> int:
    """Train one configuration in this process, without Ray.

    With --from and nothing else, the numbers of that trial come out again.
    """
    if (space is None) == (from_ is None):
        raise ConfigError("give either SPACE or --from RUN")
    if trial is not None and from_ is None:
        raise ConfigError(f"--trial {trial}: goes with --from RUN")
    chosen = _pairs(set_ or [])
    like = None
    if from_ is None:
        assert space is not None
        loaded = _read_space(space)
        before = RunSettings(data=loaded.data)
        base = loaded.first_trials[0] if loaded.first_trials else {}
    else:
        loaded, before, base, like = _from_run(from_, trial or "best")
    settings = chosen_settings(
        replace(before, data=chosen_data(data, before.data)),
        loading,
        seed=seed,
        metric=metric,
        max_epochs=epochs,
        image_size=image_size,
        device=device,
    )
    # How images come to a trial changes no number of it.
    if settings != replace(before, workers=settings.workers, store_budget=settings.store_budget):
        like = None
    elif like is not None:
        like = (like[0], replace(like[1], settings=settings))
    params = loaded.override(base, chosen)

    from tuneapp.single import start_training

    with Show() as show:
        run = start_training(
            loaded, settings, params, runs_dir, name, say, show.begin, show.watch, like
        )
    return print_training(run)


@_command
def show(
    space: Annotated[
        Path | None, typer.Argument(metavar="SPACE", help="A search-space file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A torchvision classifier, or the import path of a network of your own, such as "
            "package.module:build.",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="With --model: height and width of an image. Default: what its weights were made "
            "for; 224 for a network of your own.",
        ),
    ] = None,
) -> int:
    """Show what SPACE searches, or the stages of a model.

    Of SPACE: its parameters, their ranges and conditions, its recipes. Of a model, stage by
    stage: what it puts out, its parameters, what is left to train at each freeze depth, its FLOPs.
    """
    if (space is None) == (model is None):
        raise ConfigError("give either SPACE or --model NAME")
    if model is not None:
        return _show_model(model, image_size)
    if image_size is not None:
        raise ConfigError(f"--image-size {image_size}: goes with --model NAME")
    assert space is not None
    return _show_space(space)


def _show_model(model: str, image_size: int | None) -> int:
    from tuneapp.own import import_from

    import_from([str(Path.cwd())])
    from tuneapp.anatomy import read_anatomy
    from tuneapp.display import anatomy_table

    anatomy = read_anatomy(model, image_size)
    size, classes = anatomy.image_size, anatomy.stages[-1].output
    head = f", {classes[-1]:,} classes" if classes else ""
    say(f"{model}: {len(anatomy.stages)} stages; one image of {size} x {size} pixels{head}\n")
    out.print(anatomy_table(anatomy))
    say("\ndepth: as freeze_depth, freezes the stages above; 'trainable from here' is the rest")
    say("FLOPs: forward, 2 per multiply-add; without normalisation, activations and pooling")
    return 0


def _show_space(space: Path) -> int:
    from rich.table import Table

    from tuneapp.display import say_params
    from tuneapp.space import SearchSpace

    loaded = SearchSpace.read(space)
    table = Table(box=None, pad_edge=False)
    for heading in ("parameter", "allowed", "asked for when"):
        table.add_column(heading, overflow="fold")
    for parameter in loaded.parameters():
        table.add_row(
            escape(parameter.name), escape(parameter.allowed), escape(parameter.condition)
        )
    say(f"{space}: {loaded.summary}\n")
    out.print(table)
    if loaded.data != Data():
        say(f"\ndata: {loaded.data.source}")
    if loaded.first_trials:
        say("\nrecipes, run first and in full:")
        for number, params in enumerate(loaded.first_trials, start=1):
            say(f"  {number}  {say_params(params)}")
    return 0


@_command
def lr_range(
    space: SpaceFile,
    data: DataOptions,
    loading: LoadingOptions,
    set_: SetInSpace = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    device: Device = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Draws that are averaged.")] = 3,
    steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps of each draw.")] = 100,
    lowest: Annotated[
        float, typer.Option(metavar="LR", help="The head's learning rate in the first step.")
    ] = 1e-6,
    highest: Annotated[float, typer.Option(metavar="LR", help="And in the last.")] = 1.0,
    output: Annotated[Path, typer.Option(metavar="PNG", help="Where the curve is drawn.")] = Path(
        "lr-range.png"
    ),
) -> int:
    """Find which learning rates are worth searching for one configuration of SPACE.

    The learning rates of all stages rise together, their ratios kept, while the loss is watched
    (Smith's range test), and a range for `lr` is proposed. Nothing but the PNG is kept.
    """
    for name, number, least in (("--seeds", seeds, 1), ("--steps", steps, 10)):
        if number < least:
            raise ConfigError(f"{name} {number}: must be at least {least}")
    if not 0 < lowest < highest:
        raise ConfigError(f"--lowest {lowest:g} --highest {highest:g}: must rise, from above 0")
    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: must be a .png file in a folder that exists")
    loaded = _read_space(space)
    settings = chosen_settings(
        RunSettings(data=chosen_data(data, loaded.data)),
        loading,
        seed=seed,
        image_size=image_size,
        device=device,
    )
    base = loaded.first_trials[0] if loaded.first_trials else {}
    params = loaded.override(base, _pairs(set_ or []))

    from tuneapp.display import lr_range_lines, say_params
    from tuneapp.figures import draw_lr_range
    from tuneapp.lr_range import find_lr_range
    from tuneapp.prepare import prepare_one

    with Show() as show:
        prepared, config, run = prepare_one(loaded, settings, params, say, show.watch)
    for warning in prepared.warnings:
        warn(warning)
    say(f"trains    {say_params(params)}")
    with out.status(f"{seeds} x {steps} steps, from {lowest:g} to {highest:g}"):
        found = find_lr_range(config, run, steps=steps, seeds=seeds, lowest=lowest, highest=highest)
    draw_lr_range(found, f"{space.name}: {say_params(params)}", output)
    names = [name for name in params if name.rpartition(".")[2] == "lr"]
    for line in lr_range_lines(found, names[0] if len(names) == 1 else "lr"):
        say(line)
    say(f"figure    {output}")
    return 0


@_command
def verify_resume(
    space: SpaceFile,
    data: DataOptions,
    loading: LoadingOptions,
    set_: SetInSpace = None,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Epochs of each training. Default: the space's, at most 3."),
    ] = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    device: Device = None,
    interruptions: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Kills. Default: one for each epoch but the last, at most 3."
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep both trainings, also where they are the same.")
    ] = False,
) -> int:
    """Check that an interrupted training of SPACE comes to the same numbers.

    One configuration is trained twice: straight, and killed and resumed. Metrics and all state
    are compared to the last bit, so that a loss or an augment of your own that keeps state
    outside of the checkpoint is found.

    Exit code 0: all is the same. 1: something differs. 2: bad input.
    """
    if interruptions is not None and interruptions < 1:
        raise ConfigError(f"--interruptions {interruptions}: must be at least 1")
    loaded = _read_space(space)

    from tuneapp.display import say_params, verified_lines, verified_table
    from tuneapp.prepare import prepare_one
    from tuneapp.verify import MOST_EPOCHS
    from tuneapp.verify import verify_resume as verify

    settings = chosen_settings(
        RunSettings(data=chosen_data(data, loaded.data)),
        loading,
        seed=seed,
        max_epochs=MOST_EPOCHS if epochs is None else epochs,
        image_size=image_size,
        device=device,
    )
    base = loaded.first_trials[0] if loaded.first_trials else {}
    params = loaded.override(base, _pairs(set_ or []))
    with Show() as show:
        prepared, config, run = prepare_one(loaded, settings, params, say, show.watch)
    for warning in prepared.warnings:
        warn(warning)
    say(f"trains    {say_params(params)}")
    own_epochs = loaded.config(params).epochs
    fewer = f" of the {own_epochs} that SPACE says, for this check" * (config.epochs < own_epochs)
    say(f"epochs    {config.epochs}{fewer}")
    given = {**vars(data), **vars(loading), "set": set_, "epochs": config.epochs}
    given |= {"image_size": image_size, "seed": seed, "device": device}
    with out.status("") as status:
        found = verify(
            [str(space.absolute()), *_flags(given)],
            config,
            run,
            num_folds=prepared.images.num_folds,
            interruptions=interruptions,
            keep=keep,
            tell=status.update,
        )
    if found.pieces:
        out.print(verified_table(found))
    for line in verified_lines(found):
        say(line)
    return 0 if found.is_same else 1


@_command
def final_test(
    run: RunPath,
    trial: Annotated[
        str, typer.Option(metavar="ID", help="Which trial: best, or an id such as t0003.")
    ] = "best",
) -> int:
    """Open the sealed test split of RUN, and score a trial's best epoch on it.

    Meant to be done once, for the winner: each time is written down and counted, since a test
    split that is looked at again and again becomes a validation split.
    """
    from tuneapp.display import final_test_lines
    from tuneapp.final_test import open_test

    read, record = _find_trial(run, trial)
    with Show() as show:
        result = open_test(run, record.trial_id, show.watch)
    for line in final_test_lines(result, record, read.record.settings):
        say(line)
    return 0


@_command
def summary(
    run: RunPath,
    applied: Annotated[
        bool, typer.Option("--applied", help="Show what each trial really trained with, too.")
    ] = False,
) -> int:
    """Show RUN's trials, best first, and write them to RUN/trials.csv."""
    from tuneapp.summary import read_summary, write_trials_table

    read = read_summary(run)
    table = write_trials_table(run)
    print_result(read)
    if applied:
        print_applied(read)
    say(f"table     {short_path(table)}")
    return 0


@_command
def doctor(
    data: SourceOptions,
    seed: Seed = None,
    output: Annotated[
        Path, typer.Option(metavar="HTML", help="Where the page with all findings is written.")
    ] = Path("doctor.html"),
    exclusions: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Where the list of images to leave out is written, if there are some; the other "
            "commands take it as --exclude.",
        ),
    ] = Path("exclude.txt"),
) -> int:
    """Examine DATA before any training, and say what is wrong with it; nothing in it is changed.

    Looks for unreadable files, classes that are tiny or missing in a split, duplicates and near
    duplicates within and across splits, groups in several splits, blank images, odd names.

    Exit code 0: nothing serious. 1: something that would spoil a training, or end it. 2: no data.
    """
    chosen = chosen_data(data, Data())

    from tuneapp.doctor import examine
    from tuneapp.doctor_page import write_page
    from tuneapp.examination import next_command, require_writable, write_exclusions
    from tuneapp.own import import_from

    for flag, file in (("--output", output), ("--exclusions", exclusions)):
        require_writable(flag, file, chosen)

    import_from([str(Path.cwd())])
    with Show() as show:
        found = examine(chosen, seed or 0, show.watch)
    listed = exclusions if found.num_excluded else None
    if listed:
        unnamed = write_exclusions(listed, found)
        if unnamed:
            warn(f"{unnamed} name(s) do not fit a line of {listed}; rename these files")
    command = next_command(found, listed)
    write_page(output, found, listed, command)
    print_examination(found)
    say(f"page      {output}")
    if listed:
        say(f"exclude   {listed}: {found.num_excluded:,} image(s); look through it, then")
    say(f"next      {command}")
    return 1 if found.is_serious else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    # Files of a run hold code and weights that are loaded again: others shall not write them.
    os.umask(os.umask(0o022) | 0o022)
    # Before torch is loaded: its threads wait asleep and not spinning, or else a second busy
    # program slows a training down by far more than its share (benchmarks/busy_machine.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogToStderr()])
    try:
        app(args=None if argv is None else list(argv), prog_name="python -m tuneapp")
    except SystemExit as end:  # how typer returns, from a wrong flag and from a command alike
        return end.code if isinstance(end.code, int) else 0
    except TuneappError as error:
        print_to(err, f"tuneapp: error: {error}", "red")
        return error.exit_code
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        print_to(err, f"tuneapp: error: the machine does not give it: {error}", "red")
        return StorageError.exit_code
    return 0


# --- What the commands share ----------------------------------------------------------------------


def _read_space(path: Path) -> "SearchSpace":
    from tuneapp.own import import_from
    from tuneapp.space import SearchSpace

    import_from([str(Path.cwd())])
    space = SearchSpace.read(path)
    say(f"space     {path}: {space.summary}")
    return space


def _require_more(trials: int) -> None:
    if trials < 1:
        raise ConfigError(f"--trials {trials}: must be at least 1")


def _find_trial(path: Path, trial_id: str) -> "tuple[Summary, TrialRecord]":
    """Return a run and one of its trials, by its id or as the best."""
    from tuneapp.summary import read_summary

    read = read_summary(path)
    ids = [t.trial_id for t in read.trials]
    if trial_id == "best":
        if read.best is None:
            raise ConfigError(f"{path} has no trial with a result yet")
        record = read.best[0]
    elif trial_id in ids:
        record = read.trials[ids.index(trial_id)]
    else:
        raise ConfigError(f"--trial {trial_id}: {path} has {', '.join(ids) or 'none'}, and best")
    say(f"trial     {record.trial_id} of {path}")
    return read, record


def _from_run(
    path: Path, trial_id: str
) -> "tuple[SearchSpace, RunSettings, dict[str, Any], tuple[RunDir, RunRecord]]":
    """Return the space, the settings and the parameters of a trial of a run."""
    from tuneapp.prepare import read_run_space

    read, record = _find_trial(path, trial_id)
    space = read_run_space(read.run, read.record, record.space)
    return space, read.record.settings, record.params, (read.run, read.record)


def _flags(values: dict[str, Any]) -> list[str]:
    """Return options as another process takes them on its command line."""
    flags = []
    for name, value in values.items():
        given = value if isinstance(value, list) else [value]
        flags += [f"--{name.replace('_', '-')}={one}" for one in given if one is not None]
    return flags


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {text}: must be NAME=VALUE, such as --set freeze_depth=2")
        pairs[name] = value
    return pairs


if __name__ == "__main__":
    sys.exit(main())
