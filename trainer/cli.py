"""The command line: ``trainer run``, ``trainer evaluate`` and ``trainer predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec
import torch
from click.core import ParameterSource
from rich.console import Console

from trainer import checkpoint
from trainer.config import DEFAULT_RUNS, FIXED_FOR_A_RUN, RunConfig, Source
from trainer.errors import ConfigError, DeviceError, TrainerError
from trainer.evaluate import VIEWS, evaluate_runs
from trainer.feed import LoaderServiceError, open_source
from trainer.loop import Resume, train
from trainer.predict import predict
from trainer.preset import PRESETS
from trainer.run_folder import RunFolder, newest_run
from trainer.stop import Stopped, StopRequest
from trainer.summary import Summary

_DEFAULTS: Final = RunConfig()
_PLACES: Final = {"loader", "data", "workers"}


def _devices(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",")) if value else ()


_where = [
    click.option("--data", metavar="DIR", help="Start a private node on this folder."),
    click.option("--loader", metavar="ADDRESS", help="Use the node that runs at this address."),
    click.option("--workers", type=int, default=Source().workers, show_default=True, help="Of a private node."),
]
_devices_option = click.option(
    "--devices", metavar="A,B", callback=_devices, help="One device for both towers, or one each; e.g. cuda:0,cuda:1."
)
_batch_size_option = click.option("--batch-size", type=int, default=_DEFAULTS.batch_size, show_default=True)
_json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")


def _source_options(command: Any) -> Any:
    for option in reversed(_where):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train AlexNet, in two towers, from a loader service.

    Without --loader and --data, the node that answers at the usual address is used, or else a private one on data/.
    """


@main.command()
@_source_options
@click.option("--run", "path", type=click.Path(path_type=Path), metavar="DIR", help="Where results go. [default: new]")
@click.option("--epochs", type=int, default=_DEFAULTS.epochs, show_default=True)
@_batch_size_option
@_devices_option
@click.option("--width", type=float, default=_DEFAULTS.width, show_default=True, help="Factor of all layers' sizes.")
@click.option("--towers", type=int, default=_DEFAULTS.towers, show_default=True, help="2, or 1: the smaller net.")
@click.option("--seed", type=int, default=_DEFAULTS.seed, show_default=True)
@click.option("--preset", type=click.Choice(list(PRESETS)), default=_DEFAULTS.preset, show_default=True)
@click.option("--lr", type=float, default=_DEFAULTS.lr, show_default=True, help="Learning rate at the start.")
@click.option("--patience", type=int, default=_DEFAULTS.patience, show_default=True, help="Stalled epochs till a drop.")
@click.option("--checkpoint-every", type=int, metavar="STEPS", default=_DEFAULTS.checkpoint_every, show_default=True)
@click.option("--log-every", type=int, metavar="STEPS", default=_DEFAULTS.log_every, show_default=True)
@click.option("--resume", type=click.Choice(["auto"]), help="Go on from --run's newest checkpoint, if it has one.")
@click.pass_context
def run(context: click.Context, /, path: Path | None, resume: str | None, **options: Any) -> None:
    """Train a network."""
    console = Console()
    with _one_sentence(), StopRequest() as stop, ExitStack() as stack:
        config = RunConfig(**_nested(options))
        folder = _find_folder(path) if resume else None
        newest = folder.newest_checkpoint() if folder else None
        saved = Resume(newest, checkpoint.load(newest)) if newest else None
        if saved:
            config = _resumed_config(context, saved, options)
        try:
            with stop.interruptible():
                node = stack.enter_context(open_source(config.source))
            folder = folder or RunFolder.create(path, Path(DEFAULT_RUNS))
            folder.describe(config)
            _say(console, node.about)
            _say(console, f"Results go to {folder.path}.")
            summary = train(config, folder, node, console, stop, saved)
        except Stopped:
            _say(console, "Stopped before training began.")
        else:
            _tell(console, folder, summary)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@_source_options
@click.option("--views", type=click.Choice(VIEWS), default=VIEWS[0], show_default=True)
@_batch_size_option
@_devices_option
@_json_option
def evaluate(
    runs: tuple[Path, ...],
    views: str,
    batch_size: int,
    devices: tuple[str, ...],
    as_json: bool,
    **places: Any,
) -> None:
    """Top-1 and top-5 error on the validation split; of several RUNs, their outputs averaged.

    A RUN is a run's folder, which stands for its newest checkpoint, or a checkpoint file.
    """
    with _one_sentence(), open_source(Source(**places)) as node:
        click.echo(node.about, err=True)
        result = evaluate_runs(runs, node, views, batch_size, devices)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        click.echo(
            f"{result.images} images, {views}: top-1 error {result.top1_error:.2%}, top-5 error {result.top5_error:.2%}, "
            f"loss {result.loss:.4f}"
        )


@main.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@_devices_option
@_json_option
def predict_command(run: Path, images: tuple[Path, ...], devices: tuple[str, ...], as_json: bool) -> None:
    """The five best guesses of a RUN's network for any pictures."""
    with _one_sentence():
        for prediction in predict(run, images, devices):
            if as_json:
                click.echo(msgspec.json.encode(prediction).decode())
                continue
            click.echo(prediction.image)
            for guess in prediction.guesses:
                click.echo(f"  {guess.probability:7.2%}  {guess.name}")


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """The options as fields of a RunConfig, which holds those of the source in a value of their own."""
    places = {name: value for name, value in options.items() if name in _PLACES}
    return {name: value for name, value in options.items() if name not in _PLACES} | {"source": Source(**places)}


def _find_folder(path: Path | None) -> RunFolder | None:
    """The folder of an earlier run, None if there is none: the one at ``path``, or the newest with a checkpoint."""
    path = path or newest_run(Path(DEFAULT_RUNS))
    return RunFolder(path) if path and RunFolder(path).has_run else None


def _resumed_config(context: click.Context, saved: Resume, options: dict[str, Any]) -> RunConfig:
    """The saved configuration with what was given on the command line this time.

    Raises:
        ConfigError: something was given that a run cannot change.
    """
    typed = {
        name: options[name] for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    before = saved.saved.plain.config
    for name in typed.keys() & set(FIXED_FOR_A_RUN):
        if typed[name] != getattr(before, name):
            raise ConfigError(
                f"--{name}", typed[name], f"{getattr(before, name)}, as in the run that goes on from {saved.path}"
            )
    changed = {name: value for name, value in typed.items() if name not in _PLACES}
    if typed.keys() & _PLACES:
        changed["source"] = Source(**{name: options[name] for name in _PLACES})
    return msgspec.structs.replace(before, **changed)


def _tell(console: Console, folder: RunFolder, summary: Summary) -> None:
    """Say in a few lines what came out."""
    if summary.accuracy is not None:
        _say(
            console,
            f"Validation accuracy {summary.accuracy:.1%}, chance {summary.chance:.1%}; "
            f"{summary.images_per_s:,.0f} images/s, waiting for data {summary.waiting_share:.1%} of the time.",
        )
    expected = sum(account.expected for account in summary.ledger)
    delivered = sum(account.delivered for account in summary.ledger)
    exactly = ", each exactly once" if summary.is_exact else ""
    _say(console, f"Samples: {delivered:,} of {expected:,} in {len(summary.ledger)} epochs{exactly}.")
    _say(console, f"Made: {', '.join([summary.checkpoint, summary.log, *summary.figures, str(folder.summary)])}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn a deliberate error into its sentence and its exit code."""
    try:
        yield
    except (TrainerError, LoaderServiceError) as error:
        _fail(error, error.exit_code)
    except torch.cuda.OutOfMemoryError:
        small = DeviceError("cuda", "its memory is too small for this; try a smaller --batch-size, or --devices A,B")
        _fail(small, small.exit_code)


def _fail(error: Exception, exit_code: int) -> NoReturn:
    click.echo(f"trainer: {error}", err=True)
    sys.exit(exit_code)
