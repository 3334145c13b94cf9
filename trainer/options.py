"""The options of ``trainer run``, and how they become a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import click
import msgspec
from click.core import ParameterSource

from trainer.config import FIXED_FOR_A_RUN, RunConfig, Source
from trainer.errors import ConfigError
from trainer.model.ablation import REMOVABLE, Ablation
from trainer.model.presets import PRESETS
from trainer.model.speed import Precision, Speed
from trainer.schedule import Policy

_RUN: Final = RunConfig()
_GROUPS: Final[dict[str, type[msgspec.Struct]]] = {"source": Source, "ablation": Ablation, "speed": Speed}
"""Fields of a RunConfig that are values of their own, with options for each of their fields."""

_OWNER: Final = {field: name for name, group in _GROUPS.items() for field in group.__struct_fields__}

_TYPED: Final = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)

Command = Callable[..., Any]


def _names(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",")) if value else ()


def _numbers(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter("it is a list of whole numbers such as 30,60,80") from None


def _option(name: str, type_: Any, text: str, **more: Any) -> Any:
    """An option named as a field of RunConfig, with that field's default."""
    default = getattr(_RUN, name.strip("-").replace("-", "_"))
    return click.option(name, type=type_, default=default, show_default=True, help=text, **more)


def _switch(name: str, text: str, default: bool = True) -> Any:
    return click.option(f"--{name}/--no-{name}", default=default, show_default=True, help=text)


DEVICES: Final = click.option(
    "--devices", metavar="A,B", callback=_names, help="One device for both towers, or one each; e.g. cuda:0,cuda:1."
)
BATCH_SIZE: Final = _option("--batch-size", int, "Images per update.")
JSON: Final = click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")

SOURCE: Final = (
    click.option("--data", metavar="DIR", help="Start a private node on this folder."),
    click.option("--loader", metavar="ADDRESS", help="Use the node that runs at this address."),
    click.option("--workers", type=int, default=Source().workers, show_default=True, help="Of a private node."),
    click.option("--server-key", envvar="LOADER_SERVICE_SERVER_KEY", metavar="FILE", help="Public key of the node."),
    click.option(
        "--client-key", envvar="LOADER_SERVICE_CLIENT_KEY", metavar="FILE", help="Secret key of this trainer."
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=float,
        metavar="SECONDS",
        help="Give a node up that is away so long; else wait for it.",
    ),
)
NETWORK: Final = (
    _option("--width", float, "Factor of all layers' sizes."),
    _option("--towers", int, "2, or 1: the smaller net."),
    _option("--seed", int, "Of weights, order, augmentation and dropout."),
    click.option(
        "--crop", type=click.IntRange(1), metavar="PIXELS", help="What the net sees of a record. [default: 224 of 256]"
    ),
    _option("--preset", click.Choice(list(PRESETS)), "The paper's text, or its authors' code."),
)
RECIPE: Final = (
    _option("--epochs", int, "Passes over the training split."),
    BATCH_SIZE,
    _option("--lr", float, "Learning rate at the start."),
    _option("--schedule", click.Choice(get_args(Policy)), "Of the learning rate."),
    _option("--patience", int, "Stalled epochs till plateau drops the rate."),
    click.option("--drop-at", metavar="EPOCHS", callback=_numbers, help="Where step drops the rate, e.g. 30,60,80."),
    _option("--warmup", float, "Epochs in which the rate rises to --lr."),
)
ABLATION: Final = (
    click.option("--activation", type=click.Choice(["relu", "tanh"]), default="relu", show_default=True),
    _switch("lrn", "Local response normalisation."),
    click.option("--pooling", type=click.Choice(["overlapping", "plain"]), default="overlapping", show_default=True),
    _switch("dropout", "Of fc6 and fc7."),
    click.option("--without", metavar="LAYER,...", callback=_names, help=f"Leave out any of {', '.join(REMOVABLE)}."),
    _switch("crops", "Random crops; else the centre, which needs --no-flips --no-jitter."),
    _switch("flips", "Random mirror images."),
    _switch("jitter", "Colour jitter."),
)
_SPEED: Final = Speed()
SPEED: Final = (
    click.option(
        "--amp",
        type=click.Choice(get_args(Precision)),
        default=_SPEED.amp,
        show_default=True,
        help="bf16: products in bfloat16; weights, LRN, softmax and loss stay float32.",
    ),
    _switch("channels-last", "Maps in memory place by place.", _SPEED.channels_last),
    _switch("compile", "torch.compile, segment by segment of each tower.", _SPEED.compile),
    _switch("cuda-graphs", "Each such segment as one CUDA graph.", _SPEED.cuda_graphs),
    _switch("fused-norm", "ReLU, LRN and pooling as one operation.", _SPEED.fused_norm),
    _switch("fused-sgd", "The update of all parameters as one kernel.", _SPEED.fused_sgd),
)
OUTPUT: Final = (
    click.option(
        "--run", "path", type=click.Path(path_type=Path), metavar="DIR", help="Where results go. [default: new]"
    ),
    _option(
        "--checkpoint-every", int, "Steps between checkpoints within an epoch; 0: at its end alone.", metavar="STEPS"
    ),
    _option("--log-every", int, "Steps between lines of the log.", metavar="STEPS"),
    _option("--deterministic", bool, "The same bits from every run, at the price of some speed.", is_flag=True),
    _option("--peak-tflops", float, "Of a device, for its MFU.  [default: known of common GPUs]", metavar="TFLOPS"),
    click.option("--resume", type=click.Choice(["auto"]), help="Go on from --run's newest checkpoint, if it has one."),
)


def options(*groups: Sequence[Any]) -> Callable[[Command], Command]:
    """A decorator that gives a command all options of ``groups``, in that order."""

    def decorate(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def make_config(given: dict[str, Any]) -> RunConfig:
    """The configuration of a new run.

    Raises:
        ConfigError: it cannot work.
    """
    groups: dict[str, Any] = {
        name: group(**{field: given[field] for field in group.__struct_fields__}) for name, group in _GROUPS.items()
    }
    return RunConfig(**groups, **{name: value for name, value in given.items() if name not in _OWNER})


def resumed_config(context: click.Context, before: RunConfig, path: Path, given: dict[str, Any]) -> RunConfig:
    """The configuration ``before`` of the checkpoint at ``path``, with what was typed on the command line this time.

    Raises:
        ConfigError: something was typed that a run cannot change.
    """
    typed = {name: given[name] for name in given if context.get_parameter_source(name) in _TYPED}
    for name, value in typed.items():
        owner = _OWNER.get(name)
        earlier = getattr(getattr(before, owner) if owner else before, name)
        if (owner or name) in FIXED_FOR_A_RUN and value != earlier:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, value, f"{earlier}, as in the run that goes on from {path}")
    changed: dict[str, Any] = {name: value for name, value in typed.items() if name not in _OWNER}
    for name, group in _GROUPS.items():
        fields = {field: value for field, value in typed.items() if _OWNER.get(field) == name}
        if not fields:
            continue
        # Another place replaces the old one whole: an address beside a folder would contradict it.
        moves = name == "source" and bool(fields.keys() & {"loader", "data"})
        old = group() if moves else getattr(before, name)
        changed[name] = msgspec.structs.replace(old, **fields)
    return msgspec.structs.replace(before, **changed)
