"""The command line: ``trainer run``, ``set-lr``, ``evaluate``, ``predict`` and ``export``."""

from __future__ import annotations

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
    RECIPE,
    SOURCE,
    SPEED,
    make_config,
    options,
    resumed_config,
)
from trainer.parallel.world import World, join, launch_id, leave, was_restarted
from trainer.run import checkpoint
from trainer.run.folder import RunFolder, newest_run, write_atomically
from trainer.run.plots import confusion_svg
from trainer.run.state import Resume
from trainer.run.summary import Summary
from trainer.stop import Stopped, StopRequest


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train AlexNet, in two towers, from a loader service.

    Without --loader and --data, the node that answers at the usual address is used, or else a private one on data/.
    """


@main.command()
@options(SOURCE, OUTPUT, RECIPE, NETWORK, (DEVICES,), ABLATION, SPEED)
@click.pass_context
def run(context: click.Context, /, path: Path | None, resume: str | None, **given: Any) -> None:
    """Train a network."""
    # Twice: what goes wrong is texts before the stack ends, while a signal to end (torchrun sends one when a process has
    # died) is still heard in order, and would not cut the sentence off; and what goes wrong at its end is texts, too.
    with _errors_reported(), ExitStack() as stack, _errors_reported():
        config = make_config(given)
        folder = _find_folder(path) if resume or was_restarted() else None
        if folder and not resume and not folder.is_of(launch_id()):
            folder = None  # another's run; to be refused as at the first start
        newest = folder.newest_checkpoint() if folder else None
        resumed = Resume(newest, checkpoint.load(newest)) if newest else None
        if resumed:
            config = resumed_config(context, resumed.checkpoint.plain.config, resumed.path, given)
        world = stack.enter_context(join(config.devices, config.towers))
        stop = stack.enter_context(StopRequest())  # not before: a signal ends the search for the others at once
        _check_shared(world, path, resumed)
        console = Console(quiet=not world.is_first)
        try:
            node = _open_source_once(config.source, world, stop, stack)
            if node:
                _print(console, node.about)
            if world.is_first:
                folder = folder or RunFolder.create(path, Path(DEFAULT_RUNS))
                folder.describe(config, launch_id())
                _print(console, f"Results go to {folder.path}.")
            summary = train(config, folder or RunFolder(path or Path()), node, console, stop, resumed, world)
        except Stopped:
            _print(console, "Stopped before training began.")
        else:
            _print_summary(console, RunFolder(Path(summary.log).parent), summary)
    leave(world)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@options(SOURCE, (BATCH_SIZE, DEVICES, JSON))
@click.option("--views", type=click.Choice(VIEWS), default=VIEWS[0], show_default=True)
@click.option("--classes", "by_class", is_flag=True, help="Also each class's errors, and which are taken for which.")
@click.option(
    "--figure",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw which classes are taken for which into this file, as SVG.",
)
def evaluate(
    runs: tuple[Path, ...],
    views: str,
    by_class: bool,
    figure: Path | None,
    batch_size: int,
    devices: tuple[str, ...],
    as_json: bool,
    **places: Any,
) -> None:
    """Top-1 and top-5 error on the validation split; of several RUNs, their outputs averaged.

    A RUN is a run's folder, which stands for its newest checkpoint, or a checkpoint file.
    """
    with _errors_reported(), open_source(Source(**places)) as node:
        click.echo(node.about, err=True)
        if figure and not figure.parent.is_dir():  # known before hours of work
            raise ConfigError("--figure", figure, "a file in a folder that is there")
        result, names = evaluate_runs(runs, node, views, batch_size, devices)
        if figure:
            write_atomically(figure, confusion_svg(result.confusion, names).encode())
            click.echo(f"drew {figure}", err=True)
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
    """The five best guesses of a RUN's network for any pictures."""
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
    """Set the learning RATE of a RUN by hand, from its next step on: while it trains, or when it goes on.

    Later drops of its schedule lower the new rate as they would have lowered the old one.
    """
    with _errors_reported():
        RunFolder(run).request_rate(rate)
    click.echo(f"{run} trains at a learning rate of {rate:g} from its next step on.")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path), metavar="FILE.safetensors")
def export(run: Path, target: Path) -> None:
    """Write a RUN's network, its towers merged into one grouped network, to a safetensors file."""
    with _errors_reported():
        export_run(run, target)
    click.echo(f"{target} has the network, the mean image to subtract and the names of the classes.")


def _open_source_once(source: Source, world: World, stop: StopRequest, stack: ExitStack) -> Endpoint | None:
    """The node that feeds this process; None in one of tower 1, which its twin feeds.

    The first process with tower 0 on each machine finds or starts the node and tells the others on that machine where it
    is: two replicas beside each other do not need two private nodes. It stays until ``stack`` is left.

    Raises:
        Stopped: somebody asked for an end, or the one that was to start the node could not.
    """
    places = world.gather([world.machine, world.has_head])
    openers = [rank for rank, place in enumerate(places) if place == [world.machine, True]]
    node = None
    try:
        if world.rank in openers[:1]:
            with stop.interruptible():
                node = stack.enter_context(open_source(source))
    finally:
        texts = world.gather_text(msgspec.json.encode(node).decode())
    if not world.has_head:
        return None
    found = msgspec.json.decode(texts[openers[0]], type=Endpoint | None)
    if found is None:
        raise Stopped
    return found


def _check_shared(world: World, path: Path | None, resumed: Resume | None) -> None:
    """Make sure that several processes work on one run.

    Raises:
        ConfigError: each would make a folder of its own.
        RunFolderError: they see different checkpoints.
    """
    if world.size == 1:
        return
    if path is None:
        raise ConfigError("--run", "", "a folder's name under torchrun: all processes must mean the same one")
    steps = world.gather([resumed.checkpoint.plain.progress.step if resumed else -1])
    if any(row != steps[0] for row in steps):
        raise RunFolderError(
            path, "processes see different checkpoints in it; it must be on a disk that all of them share"
        )


def _find_folder(path: Path | None) -> RunFolder | None:
    """The folder of an earlier run, None if there is none: the one at ``path``, or the newest with a checkpoint."""
    path = path or newest_run(Path(DEFAULT_RUNS))
    return RunFolder(path) if path and RunFolder(path).has_run else None


def _print_summary(console: Console, folder: RunFolder, summary: Summary) -> None:
    """Say in a few lines what came out."""
    if summary.accuracy is not None:
        _print(
            console,
            f"Validation accuracy {summary.accuracy:.1%}, chance {summary.chance:.1%}; "
            f"{summary.images_per_s:,.0f} images/s, waiting for data {summary.waiting_share:.1%} of the time.",
        )
    expected = sum(account.expected for account in summary.ledger)
    delivered = sum(account.delivered for account in summary.ledger)
    exactly = ", each exactly once" if summary.is_exact else ""
    _print(console, f"Samples: {delivered:,} of {expected:,} in {len(summary.ledger)} epochs{exactly}.")
    _print(console, f"Made: {', '.join([summary.checkpoint, summary.log, *summary.figures, str(folder.summary)])}")


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _errors_reported() -> Iterator[None]:
    """Turn a deliberate error into its sentence and its exit code."""
    try:
        yield
    except (TrainerError, LoaderServiceError) as error:
        _fail(error, error.exit_code)
    except torch.cuda.OutOfMemoryError:
        small = DeviceError("cuda", "its memory is too small for this network; try a smaller --width, or --devices A,B")
        _fail(small, small.exit_code)


def _fail(error: Exception, exit_code: int) -> NoReturn:
    click.echo(f"trainer: {error}", err=True)
    sys.exit(exit_code)
