"""The command line: its commands, and which errors become which exit codes.

Exit codes: 0 done; 1 `doctor` found something serious, or `verify-resume` a difference; 2 bad
input; 3 done, but some trials failed; 4 no trial gave a result; 5 the disk, or what is on it, or
Ray failed; 75 the run is in use; 129, 130 and 143 ended by SIGHUP, Ctrl-C and SIGTERM. Each command
imports what it needs when it runs: neither `--help` nor a refused space needs torch or Ray.
"""

import errno
import functools
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuneapp.config import Data, RunSettings
from tuneapp.errors import ConfigError, SpaceError, StorageError, TuneappError
from tuneapp.options import (
    DashboardOptions,
    DataOptions,
    LoadingOptions,
    SourceOptions,
    UsageError,
    chosen_data,
    chosen_settings,
    expanded,
    num_bytes,
    seconds,
    usage_line,
)
from tuneapp.rundir import require_name
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
"""What no code of ours can fix, wherever it occurs: `ulimit -n`, a full or a failing disk."""

PROGRAM = "python -m tuneapp"

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


_commands: dict[str, Callable[..., int]] = {}


def _command(function: Callable[..., int]) -> Callable[..., int]:
    """Make a function that returns an exit code a command; Ctrl-C is code 130."""
    with_options = expanded(function)
    _commands[function.__name__.replace("_", "-")] = with_options

    @functools.wraps(with_options)
    def run(**options: Any) -> int:
        try:
            code = with_options(**options)
        except KeyboardInterrupt:
            code = 130
        raise typer.Exit(code)

    app.command()(run)
    return function


def _show_versions(wanted: bool) -> None:
    if not wanted:
        return
    say(f"tuneapp {_version_of('tuneapp')}")
    say(f"Python {platform.python_version()}")
    for package in ("torch", "ray"):
        say(f"{package} {_version_of(package)}")
    raise typer.Exit(0)


def _version_of(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "not installed"


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the versions of tuneapp, Python, torch and ray.",
            callback=_show_versions,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


SpaceFile = Annotated[Path, typer.Argument(metavar="SPACE", help="A search-space file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/x.")]
Epochs = Annotated[
    int | None, typer.Option(metavar="N", help="Maximum epochs of every trial, for quick looks.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Height and width of the network's input. Default: the size its weights were "
        "evaluated with (224 for ResNets); 32 for the embedded data.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of all random numbers. Default: 0.")
]
RunsDir = Annotated[Path, typer.Option(metavar="DIR", help="Parent folder of run directories.")]
Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Name of the run directory. Default: the space's name plus a number.",
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Metric that ranks trials: val/accuracy (the default), val/loss, "
        "val/balanced_accuracy, val/macro_f1, val/auroc, val/average_precision (multi-label), "
        "val/recall/CLASS.",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="Default: auto, the trial's GPU if it has one, else the CPU."),
]
SetInSpace = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Value of a parameter; may be given several times. What is not set is as in the "
        "first recipe of SPACE that agrees with what is set.",
    ),
]
MoreTrials = Annotated[
    int, typer.Option(metavar="N", min=1, help="Trials in addition to those planned for RUN.")
]


@_command
def sweep(
    space: SpaceFile,
    data: DataOptions,
    loading: LoadingOptions,
    *,
    trials: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Total trials; the space's recipes come first."),
    ] = 16,
    epochs: Epochs = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    metric: MetricName = None,
    device: Device = None,
    concurrent: Annotated[
        int | None,
        typer.Option(metavar="N", help="Parallel trials. Default: one per GPU or CPU core."),
    ] = None,
    cpus_per_trial: Annotated[
        int | None,
        typer.Option(metavar="N", help="CPU threads per trial. Default: an equal share."),
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="GPUs per trial: 1, or a share such as 0.5."),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End after this time, e.g. 90s, 30m or 1h30m."),
    ] = None,
    keep_best: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Keep the checkpoints of the N best finished trials."
        ),
    ] = 5,
    disk_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Maximum disk space for checkpoints, e.g. 20GB. The best trial's are always kept.",
        ),
    ] = None,
    min_free: Annotated[
        str, typer.Option(metavar="SIZE", help="Pause while the disk has less free than this.")
    ] = "500MB",
    runs_dir: RunsDir = Path("runs"),
    name: Name = None,
    dashboard: DashboardOptions,
) -> int:
    """Search SPACE for the best configuration on your images.

    The recipes of the space run first and in full; then Optuna's TPE proposes trials and ASHA
    stops the weak ones early. Ctrl-C ends the sweep cleanly; `resume` continues it.
    """
    budget_s = None if time_budget is None else seconds("--time-budget", time_budget)
    disk_bytes = None if disk_budget is None else num_bytes("--disk-budget", disk_budget)
    free_bytes = num_bytes("--min-free", min_free)
    require_name(runs_dir, name)
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
        dashboard_host=dashboard.address,
        keep_best=keep_best,
        disk_budget=disk_bytes,
        min_free=free_bytes,
    )
    with Show() as show:
        outcome = start_sweep(loaded, settings, options, say, show.begin, show.watch)
    return print_sweep(outcome)


@_command
def resume(run: RunPath, dashboard: DashboardOptions) -> int:
    """Resume RUN where it stopped.

    Unfinished trials continue from their last epoch; then the remaining ones run.
    """
    from tuneapp.rundir import open_run

    if open_run(run)[1].kind == "train":
        from tuneapp.single import resume_training

        if dashboard.address:
            raise ConfigError(f"{run} is a single training: it runs without Ray and its dashboard")
        with Show() as show:
            resumed = resume_training(run, show.begin, show.watch)
        return print_training(resumed)

    from tuneapp.sweep import resume_sweep

    with Show() as show:
        outcome = resume_sweep(run, show.begin, show.watch, dashboard.address)
    return print_sweep(outcome)


@_command
def extend(run: RunPath, *, trials: MoreTrials = 16, dashboard: DashboardOptions) -> int:
    """Run more trials in RUN.

    Earlier results still inform the search.
    """
    from tuneapp.sweep import resume_sweep

    with Show() as show:
        outcome = resume_sweep(run, show.begin, show.watch, dashboard.address, more=trials)
    return print_sweep(outcome)


@_command
def refine(
    run: RunPath, space: SpaceFile, *, trials: MoreTrials = 16, dashboard: DashboardOptions
) -> int:
    """Continue RUN in a changed SPACE.

    Images and split stay the same. Earlier trials that also lie in SPACE inform the search; the
    others stay in RUN as its history.
    """
    loaded = _read_space(space)

    from tuneapp.sweep import refine_sweep

    with Show() as show:
        outcome = refine_sweep(run, loaded, trials, say, show.begin, show.watch, dashboard.address)
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
            "first recipe of SPACE that agrees with what is set, or as in the trial of --from.",
        ),
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="Use a trial of this run.")
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

    With only --from, reproduces that trial exactly.
    """
    chosen = _pairs(set_ or [])
    require_name(runs_dir, name)
    base = _training_base(space, from_, trial)
    settings = chosen_settings(
        replace(base.settings, data=chosen_data(data, base.settings.data)),
        loading,
        seed=seed,
        metric=metric,
        max_epochs=epochs,
        image_size=image_size,
        device=device,
    )
    params = base.space.choose(chosen, base.params)

    from tuneapp.single import start_training

    with Show() as show:
        run = start_training(
            base.space,
            settings,
            params,
            runs_dir,
            name,
            say,
            show.begin,
            show.watch,
            like=base.reproduced_with(settings),
            origin="set" if chosen else base.origin,
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
            help="A torchvision classifier, timm:NAME, or the import path of a custom network, "
            "such as package.module:build.",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=16,
            help="With --model: height and width of an image. Default: the size its weights were "
            "evaluated with; 224 for a custom network.",
        ),
    ] = None,
) -> int:
    """Show what SPACE searches, or the stages of a model.

    For SPACE: its parameters, their ranges and conditions, its recipes. For a model, stage by
    stage: output shape, parameters, trainable parameters at each freeze depth, FLOPs.
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
    from tuneapp.display import anatomy_notes, anatomy_table

    anatomy = read_anatomy(model, image_size)
    size, classes = anatomy.image_size, anatomy.stages[-1].output
    head = f", {classes[-1]:,} classes" if classes else ""
    say(f"{model}: {len(anatomy.stages)} stages; one image of {size} x {size} pixels{head}\n")
    out.print(anatomy_table(anatomy))
    say("")
    for line in anatomy_notes(anatomy):
        say(line)
    return 0


def _show_space(space: Path) -> int:
    from tuneapp.display import fixed_line, say_params, space_table
    from tuneapp.space import SearchSpace

    if not space.exists() and space.suffix != ".py":
        raise SpaceError(f"{space}: no such search-space file; did you mean: show --model {space}?")
    loaded = SearchSpace.read(space)
    loaded.check_recipes(loaded.branches())
    say(f"{space}: {loaded.summary}\n")
    out.print(space_table(loaded.parameters()))
    say(f"\n{fixed_line(loaded)}")
    if loaded.data != Data():
        say(f"\ndata: {loaded.data.source}")
    if loaded.first_trials:
        say("\nrecipes, run first and in full:")
        for number, params in enumerate(loaded.first_trials, start=1):
            say(f"  {number}  {say_params(params)}")
    say("\nnot checked here: the model, its stages and weights (sweep and train check them first)")
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
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of seeds to average over.")
    ] = 3,
    steps: Annotated[int, typer.Option(metavar="N", min=10, help="Steps per seed.")] = 100,
    lowest: Annotated[float, typer.Option(metavar="LR", help="`lr` in the first step.")] = 1e-6,
    highest: Annotated[float, typer.Option(metavar="LR", help="`lr` in the last step.")] = 1.0,
    output: Annotated[Path, typer.Option(metavar="PNG", help="Where the curve is drawn.")] = Path(
        "lr-range.png"
    ),
) -> int:
    """Run a learning-rate range test.

    Finds which learning rates are worth searching for one configuration of SPACE: the first recipe
    that agrees with --set. The learning rates of all stages rise together, their ratios kept, while
    the loss is watched (Smith's range test), and a range for `lr` is proposed. It holds for that
    freeze depth and optimizer only. Nothing but the PNG is kept.
    """
    if not 0 < lowest < highest < float("inf"):
        raise ConfigError(
            f"--lowest {lowest:g} --highest {highest:g}: must rise, from above 0, and be finite"
        )
    _require_writable(output)
    loaded = _read_space(space)
    settings = chosen_settings(
        RunSettings(data=chosen_data(data, loaded.data)),
        loading,
        seed=seed,
        image_size=image_size,
        device=device,
    )
    params = loaded.choose(_pairs(set_ or []))

    from tuneapp.display import lr_range_lines, say_params
    from tuneapp.figures import draw_lr_range
    from tuneapp.lr_range import find_lr_range
    from tuneapp.prepare import prepare_one

    with Show() as show:
        prepared, config, run = prepare_one(loaded, settings, params, say, show.watch)
    for warning in prepared.warnings:
        warn(warning)
    say(f"trains    {say_params(params)}")
    if config.unfreeze_at:
        say("frozen    as in epoch 1; what unfreeze_at frees later is not tested")
    with out.status(f"{seeds} x {steps} steps, from {lowest:g} to {highest:g}"):
        found = find_lr_range(config, run, steps=steps, seeds=seeds, lowest=lowest, highest=highest)
    names = [name for name in params if name.rpartition(".")[2] == "lr"]
    for line in lr_range_lines(found, names[0] if len(names) == 1 else "lr"):
        say(line)
    drawn = f"{config.model}: learning-rate range test, {seeds} seeds x {steps} steps"
    try:
        draw_lr_range(found, drawn, say_params(params), output)
    except OSError as error:
        raise StorageError(f"--output {output}: {error.strerror or error}") from error
    say(f"figure    {output}")
    return 0


def _require_writable(output: Path) -> None:
    """Check that a PNG can be written, and leave the file as it was.

    Raises:
        ConfigError: it cannot.
    """
    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: must be a .png file in a folder that exists")
    is_new = not output.exists()
    try:
        # Permissions do not tell everything: /proc, for one, refuses root, too.
        with output.open("ab"):
            pass
        if is_new:
            output.unlink()
    except OSError as error:
        raise ConfigError(
            f"--output {output}: cannot be written ({error.strerror}); name another file"
        ) from error


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
            metavar="N", min=1, help="Kills. Default: one per epoch except the last, at most 3."
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep both trainings even if they are identical.")
    ] = False,
) -> int:
    """Check that a resumed training is bit-identical.

    One configuration of SPACE is trained twice: without interruption, and killed and resumed.
    Metrics and all state are compared to the last bit, which finds custom losses and augments
    that keep state outside of the checkpoint.

    Exit code 0: identical. 1: something differs. 2: bad input.
    """
    loaded = _read_space(space)
    params = loaded.choose(_pairs(set_ or []))

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
    with Show() as show:
        prepared, config, run = prepare_one(loaded, settings, params, say, show.watch)
    for warning in prepared.warnings:
        warn(warning)
    say(f"trains    {say_params(params)}")
    own_epochs = loaded.config(params).epochs
    fewer = f" of the {own_epochs} in SPACE, for this check" * (config.epochs < own_epochs)
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
        str, typer.Option(metavar="ID", help="Which trial: best, or an ID such as t0003.")
    ] = "best",
) -> int:
    """Score a trial on the sealed test split.

    Scores the best epoch of a trial of RUN. Meant to be done once, for the winner: each use is
    recorded and counted, since a test split that is used repeatedly becomes a validation split.
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
        bool, typer.Option("--applied", help="Also show what each trial really trained with.")
    ] = False,
) -> int:
    """List RUN's trials, best first.

    Also writes them to RUN/trials.csv.
    """
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
        Path, typer.Option(metavar="HTML", help="Where to write the page with all findings.")
    ] = Path("doctor.html"),
    exclusions: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Where to write the list of images to exclude, if there are any; pass it to "
            "other commands as --exclude.",
        ),
    ] = Path("exclude.txt"),
) -> int:
    """Check DATA for problems before training.

    Looks for unreadable files, classes that are tiny or missing in a split, duplicates and near
    duplicates within and across splits, groups in several splits, blank images, odd names. DATA
    is not changed.

    Exit code 0: nothing serious. 1: a problem that would spoil or end a training. 2: no data.
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
            warn(f"{unnamed} name(s) cannot be written to {listed}; rename these files")
    command = next_command(found, listed)
    write_page(output, found, listed, command)
    print_examination(found)
    say(f"page      {output}")
    if listed:
        say(f"exclude   {listed}: {found.num_excluded:,} image(s); review it, then")
    say(f"next      {command}")
    return 1 if found.is_serious else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    # Files of a run hold code and weights that are loaded again: others must not write them.
    os.umask(os.umask(0o022) | 0o022)
    # Before torch is loaded: its threads must sleep and not spin while they wait, or a second
    # busy program slows a training down by far more than its share (benchmarks/busy_machine.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogToStderr()])
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = app(args=words or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        if not words:
            code = TuneappError.exit_code
        return code if isinstance(code, int) else 0
    except SystemExit as end:  # of typer, when nobody reads its output
        return end.code if isinstance(end.code, int) else 0
    except typer.Abort:  # Ctrl-C before a command has started
        return 130
    except UsageError as error:
        print_to(err, f"tuneapp: error: {usage_line(error, words, _commands)}", "red")
        return TuneappError.exit_code
    except TuneappError as error:
        print_to(err, f"tuneapp: error: {error}", "red")
        return error.exit_code
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        print_to(err, f"tuneapp: error: out of system resources: {error}", "red")
        return StorageError.exit_code


# --- What the commands share ----------------------------------------------------------------------


def _read_space(path: Path) -> "SearchSpace":
    from tuneapp.own import import_from
    from tuneapp.space import SearchSpace

    import_from([str(Path.cwd())])
    space = SearchSpace.read(path)
    # Here, since what commands import next takes seconds.
    space.check_recipes(space.branches())
    say(f"space     {path}: {space.summary}")
    return space


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


@dataclass(frozen=True)
class _TrainingBase:
    """What `train` starts from, before its flags.

    Attributes:
        space: a file, or the copy in a run.
        settings: the defaults, or those of a run.
        params: of a trial; None takes a recipe.
        like: the run of that trial.
        origin: where the parameters come from, unless some are set.
    """

    space: "SearchSpace"
    settings: RunSettings
    params: dict[str, Any] | None = None
    like: "tuple[RunDir, RunRecord] | None" = None
    origin: str = "set"

    def reproduced_with(self, settings: RunSettings) -> "tuple[RunDir, RunRecord] | None":
        """Return the run whose split and weights are reused; None if these settings differ."""
        # How images are loaded changes no result.
        same = replace(self.settings, workers=settings.workers, store_budget=settings.store_budget)
        if self.like is None or settings != same:
            return None
        return self.like[0], replace(self.like[1], settings=settings)


def _training_base(space: Path | None, from_: Path | None, trial: str | None) -> _TrainingBase:
    if trial is not None and from_ is None:
        raise ConfigError("--trial goes with --from RUN")
    if space is not None and from_ is None:
        loaded = _read_space(space)
        return _TrainingBase(loaded, RunSettings(data=loaded.data))
    if from_ is None or space is not None:
        raise ConfigError("give either SPACE or --from RUN")

    from tuneapp.prepare import read_run_space

    read, record = _find_trial(from_, trial or "best")
    return _TrainingBase(
        space=read_run_space(read.run, read.record, record.space),
        settings=read.record.settings,
        params=dict(record.params),
        like=(read.run, read.record),
        origin=f"{read.run.path.resolve().name}/{record.trial_id}",
    )


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
        if name in pairs:
            raise ConfigError(f"--set {name}: given twice")
        pairs[name] = value
    return pairs


if __name__ == "__main__":
    sys.exit(main())
