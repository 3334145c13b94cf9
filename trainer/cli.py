"""The command line: ``trainer run``, ``set-lr``, ``evaluate``, ``predict``, ``export`` and ``report``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
import msgspec
import torch
from rich.console import Console

from trainer.config import DEFAULT_RUNS, Source
from trainer.data.feed import Endpoint, LoaderServiceError, open_source
from trainer.errors import ConfigError, DeviceError, RunFolderError, TrainerError
from trainer.evaluation.evaluate import VIEWS, evaluate_runs
from trainer.evaluation.export import export_run
from trainer.evaluation.predict import predict
from trainer.evaluation.scores import class_errors, tables
from trainer.loop import train
from trainer.options import (
    ABLATION,
    BATCH_SIZE,
    DEVICES,
    JSON,
    NETWORK,
    OUTPUT,
    PLACE,
    RECIPE,
    SOURCE,
    SPEED,
    SectionedCommand,
    make_config,
    options,
    resumed_config,
)
from trainer.parallel.devices import choose_device
from trainer.parallel.world import World, join, launch_id, leave, was_restarted
from trainer.report.confusion import figure as confusion_figure
from trainer.report.drawing import check_installed
from trainer.report.progress import ReportProgress
from trainer.report.report import Settings, write_report
from trainer.run import checkpoint
from trainer.run.folder import RunFolder, newest_run, write_atomically
from trainer.run.state import Resume
from trainer.run.summary import Summary
from trainer.stop import Stopped, StopRequest


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train AlexNet in two towers, fed by a loader service.

    Without --loader and --data, a command uses the node at the default address. If none answers there, it starts a
    private node on data/.
    """


@main.command(cls=SectionedCommand)
@options(SOURCE, OUTPUT, RECIPE, NETWORK, ABLATION, SPEED)
@click.pass_context
def run(context: click.Context, /, path: Path | None, resume: str | None, profiled: int, **given: Any) -> None:
    """Train a network. Ctrl-C stops the run; the same command with --resume auto continues it."""
    # Errors are reported at two levels. The inner one runs while StopRequest still handles signals, so that the SIGTERM
    # that torchrun sends after the death of a process cannot cut the message off. The outer one reports errors of the
    # stack's own exits.
    with _errors_reported(), ExitStack() as stack, _errors_reported():
        config = make_config(given)
        folder = _find_folder(path) if resume or was_restarted() else None
        if folder and not resume and not folder.is_of(launch_id()):
            folder = None  # another launch's run: RunFolder.create refuses it below, as at the first start
        newest = folder.newest_checkpoint() if folder else None
        resumed = Resume(newest, checkpoint.load(newest)) if newest else None
        if resumed:
            config = resumed_config(context, resumed.checkpoint.plain.config, resumed.path, given)
        world = stack.enter_context(join(config.devices, config.towers))
        stop = stack.enter_context(StopRequest())  # after join: until then a signal kills the process at once
        _check_shared(world, path, resumed)
        console = Console(quiet=not world.is_first)
        try:
            node = _open_source_once(config.source, world, stop, stack)
            if node:
                _print(console, node.about)
            if world.is_first:
                folder = folder or RunFolder.create(path, Path(DEFAULT_RUNS))
                folder.describe(config, launch_id())
                _print(console, f"Results: {folder.path}")
            folder = folder or RunFolder(path or Path())
            summary = train(config, folder, node, console, stop, resumed, world, profiled)
        except Stopped:
            _print(console, "Stopped before training began.")
        else:
            _print_summary(console, RunFolder(Path(summary.log).parent), summary)
    leave(world)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@options(SOURCE, (BATCH_SIZE, DEVICES, JSON))
@click.option("--views", type=click.Choice(VIEWS), default=VIEWS[0], show_default=True, help="Crops of each image.")
@click.option("--best", is_flag=True, help="Use each run's checkpoint of the lowest validation error.")
@click.option("--ema", is_flag=True, help="Use the moving averages of the weights, of runs with --ema.")
@click.option(
    "--classes", "by_class", is_flag=True, help="Also show the errors of each class and the confusion matrix."
)
@click.option(
    "--figure",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw the confusion matrix to this SVG file.",
)
def evaluate(
    runs: tuple[Path, ...],
    views: str,
    best: bool,
    ema: bool,
    by_class: bool,
    figure: Path | None,
    batch_size: int,
    devices: tuple[str, ...],
    as_json: bool,
    **places: Any,
) -> None:
    """Report top-1 and top-5 error on the validation split.

    RUN is a run folder, whose newest checkpoint is used unless --best, or a checkpoint file. The outputs of several RUNs are averaged.
    """
    with _errors_reported(), open_source(Source(**places)) as node:
        click.echo(node.about, err=True)
        if figure and not figure.parent.is_dir():  # before the evaluation, which may take hours
            raise ConfigError("--figure", figure, "a file in an existing folder")
        if figure:
            check_installed()
        result, names = evaluate_runs(runs, node, views, batch_size, devices, best, ema)
        if figure:
            matrix = confusion_figure(result.confusion, names, f"{result.images:,} validation images, {views}.")
            write_atomically(figure, matrix.svg().encode())
            click.echo(f"Wrote {figure}.", err=True)
    if as_json:
        about = {"views": views, "classes": class_errors(result, names)}
        click.echo(msgspec.json.encode(msgspec.structs.asdict(result) | about).decode())
        return
    click.echo(
        f"{result.images} images, {views}: top-1 error {result.top1_error:.2%}, top-5 error {result.top5_error:.2%}, "
        f"loss {result.loss:.4f}"
    )
    if by_class:
        console = Console(soft_wrap=True)
        for table in tables(result, names):
            console.print(table)


@main.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@options((DEVICES, JSON))
def predict_command(run: Path, images: tuple[Path, ...], devices: tuple[str, ...], as_json: bool) -> None:
    """Print the five most probable classes of each IMAGE, by a RUN's newest checkpoint."""
    with _errors_reported():
        for prediction in predict(run, images, devices):
            if as_json:
                click.echo(msgspec.json.encode(prediction).decode())
                continue
            click.echo(prediction.image)
            for guess in prediction.guesses:
                click.echo(f"  {guess.probability:7.2%}  {guess.name}")


@main.command("set-lr")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("rate", type=float)
def set_lr(run: Path, rate: float) -> None:
    """Set the learning RATE of a RUN by hand.

    It applies from the step after the next log line, or from the first step after a resume. Later drops of the schedule start
    from the new rate.
    """
    with _errors_reported():
        RunFolder(run).request_rate(rate)
    click.echo(f"{run} uses the learning rate {rate:g} after its next log line.")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path), metavar="FILE.safetensors")
def export(run: Path, target: Path) -> None:
    """Export a RUN's network, as one network with grouped convolutions, to a safetensors file."""
    with _errors_reported():
        export_run(run, target)
    click.echo(f"Wrote {target}: weights, mean image and class names.")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the report. [default: RUN/report; of several runs, report beside them]",
)
@click.option(
    "--images",
    type=click.IntRange(1),
    default=2000,
    show_default=True,
    help="Most images of each split that the network looks at.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Leave the images out after SECONDS without a node.",
)
@options(PLACE, (BATCH_SIZE, DEVICES))
def report(
    runs: tuple[Path, ...],
    out: Path | None,
    images: int,
    timeout_s: float,
    batch_size: int,
    devices: tuple[str, ...],
    **places: Any,
) -> None:
    """Make a page of a RUN's results, or of several side by side, with its figures as SVG, PNG and JSON.

    The page is one file that needs no network. Images come from the source that each run used, unless --data or --loader names
    another one. What cannot be shown is left out, and the page says so.
    """
    with _errors_reported():
        named = Source(**places) if places["data"] or places["loader"] else None
        settings = Settings(out, named, timeout_s, choose_device(devices), images, batch_size)
        with ReportProgress(Console(stderr=True)) as progress:
            made = write_report(runs, settings, progress)
        for sentence in made.missing:
            click.echo(f"Left out: {sentence}", err=True)
        click.echo(f"Wrote {made.page}, and {len(made.files)} files beside it.")


def _open_source_once(source: Source, world: World, stop: StopRequest, stack: ExitStack) -> Endpoint | None:
    """Return the node that feeds this process; None in a process of tower 1, which gets batches from tower 0's process.

    On each machine, the first process with tower 0 finds or starts the node and sends its address to the others, so that
    several replicas share one private node. The node runs until ``stack`` closes.

    Raises:
        Stopped: a stop was requested, or the process that should start the node failed.
    """
    rows = world.gather([world.machine, world.has_head])
    openers = [rank for rank, row in enumerate(rows) if row == [world.machine, True]]
    node = None
    try:
        if world.rank in openers[:1]:
            with stop.interruptible():
                node = stack.enter_context(open_source(source))
    finally:  # also after an error: the other processes wait for this text
        texts = world.gather_text(msgspec.json.encode(node).decode())
    if not world.has_head:
        return None
    found = msgspec.json.decode(texts[openers[0]], type=Endpoint | None)
    if found is None:
        raise Stopped
    return found


def _check_shared(world: World, path: Path | None, resumed: Resume | None) -> None:
    """Check that all processes work on the same run.

    Raises:
        ConfigError: without --run, each process would create its own folder.
        RunFolderError: the processes see different checkpoints.
    """
    if world.size == 1:
        return
    if path is None:
        raise ConfigError("--run", "", "a folder: under torchrun all processes must use the same one")
    steps = world.gather([resumed.checkpoint.plain.progress.step if resumed else -1])
    if any(row != steps[0] for row in steps):
        raise RunFolderError(
            path, "its processes see different checkpoints; it must be on a disk that all of them share"
        )


def _find_folder(path: Path | None) -> RunFolder | None:
    """Return the folder of an earlier run at ``path``, by default the newest one with a checkpoint; None without one."""
    path = path or newest_run(Path(DEFAULT_RUNS))
    return RunFolder(path) if path and RunFolder(path).has_run else None


def _print_summary(console: Console, folder: RunFolder, summary: Summary) -> None:
    """Print the results of a run in a few lines."""
    if summary.accuracy is not None:
        _print(
            console,
            f"Validation accuracy {summary.accuracy:.1%} (chance {summary.chance:.1%}); "
            f"{summary.images_per_s:,.0f} images/s, {summary.waiting_share:.1%} of the time waiting for data.",
        )
    expected = sum(account.expected for account in summary.ledger)
    delivered = sum(account.delivered for account in summary.ledger)
    exactly = ", each exactly once" if summary.is_exact else ""
    _print(console, f"Samples: {delivered:,} of {expected:,} in {len(summary.ledger)} epochs{exactly}.")
    _print(console, f"Wrote: {', '.join([summary.checkpoint, summary.log, *summary.figures, str(folder.summary)])}")
    _print(console, f"For a page with all figures: trainer report {shlex.quote(str(folder.path))}")


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _errors_reported() -> Iterator[None]:
    """Print a deliberate error as one sentence and exit with its code."""
    try:
        yield
    except (TrainerError, LoaderServiceError) as error:
        _fail(error, error.exit_code)
    except torch.cuda.OutOfMemoryError:
        too_small = DeviceError(
            "cuda", "its memory is too small for this network; try a smaller --width, or --devices A,B"
        )
        _fail(too_small, too_small.exit_code)


def _fail(error: Exception, exit_code: int) -> NoReturn:
    click.echo(f"trainer: {error}", err=True)
    sys.exit(exit_code)
