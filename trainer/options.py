"""The command-line options of ``trainer run``, and their conversion to a ``RunConfig``."""

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
"""Nested structs of a RunConfig; each of their fields has an option."""

_OWNER: Final = {field: name for name, group in _GROUPS.items() for field in group.__struct_fields__}

"""Option name -> the nested struct that it belongs to."""

_TYPED: Final = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
"""Sources of a value that the user gave, as opposed to a default."""

Command = Callable[..., Any]


def _names(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",")) if value else ()


def _numbers(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter("expected whole numbers separated by commas, such as 30,60,80") from None


def _option(name: str, type_: Any, text: str, **more: Any) -> Any:
    """Return an option with the name and default of a field of RunConfig."""
    default = getattr(_RUN, name.strip("-").replace("-", "_"))
    return click.option(name, type=type_, default=default, show_default=True, help=text, **more)


def _switch(name: str, text: str, default: bool | None = True) -> Any:
    shown = "on on CPUs, off on GPUs" if default is None else True  # None: see trainer.model.speed.Speed
    return click.option(f"--{name}/--no-{name}", default=default, show_default=shown, help=text)


DEVICES: Final = click.option(
    "--devices",
    metavar="A[,B]",
    callback=_names,
    help="One device for both towers, or one for each, such as cuda:0,cuda:1. [default: cuda:0, or cpu without a GPU]",
)
BATCH_SIZE: Final = _option("--batch-size", int, "Images per batch; every crop of an image counts.")
JSON: Final = click.option("--json", "as_json", is_flag=True, help="Write JSON to standard output.")

PLACE: Final = (
    click.option("--data", metavar="DIR", help="Start a private node on this dataset folder."),
    click.option("--loader", metavar="ADDRESS", help="Use the running node at this address."),
    click.option(
        "--workers", type=int, default=Source().workers, show_default=True, help="Worker processes of the private node."
    ),
    click.option(
        "--server-key",
        envvar="LOADER_SERVICE_SERVER_KEY",
        metavar="FILE",
        help="Public key file of the node; on loopback, by default this user's own.",
    ),
    click.option(
        "--client-key", envvar="LOADER_SERVICE_CLIENT_KEY", metavar="FILE", help="Secret key file of this trainer."
    ),
    click.option("--insecure", is_flag=True, help="Connect without keys, to a node started with --insecure."),
)
SOURCE: Final = (
    *PLACE,
    click.option(
        "--timeout",
        "timeout_s",
        type=float,
        metavar="SECONDS",
        help="Fail after SECONDS without a node (default: wait).",
    ),
)
NETWORK: Final = (
    _option("--width", float, "Factor of all layer sizes."),
    _option("--towers", int, "2, or 1 for the paper's smaller network."),
    _option("--seed", int, "Seed of weights, data order, augmentation and dropout."),
    click.option(
        "--crop",
        type=click.IntRange(1),
        metavar="PIXELS",
        help="Side of the network's input. [default: 7/8 of a record's, 224 of 256]",
    ),
    _option("--preset", click.Choice(list(PRESETS)), "Follow the paper's text, or its authors' code."),
)
RECIPE: Final = (
    _option("--epochs", int, "Passes over the training split."),
    _option("--batch-size", int, "Images per batch; also per update, without --accumulate."),
    _option("--accumulate", int, "Batches per update.", metavar="N"),
    _option("--ema", float, "Also keep a moving average of the weights. [default: none]", metavar="DECAY"),
    _option("--lr", float, "Initial learning rate."),
    _option("--schedule", click.Choice(get_args(Policy)), "Learning rate schedule."),
    _option("--patience", int, "Epochs without improvement before the rate drops (plateau)."),
    click.option(
        "--drop-at",
        metavar="EPOCHS",
        callback=_numbers,
        help="Epochs at which the rate drops, such as 30,60,80 (step).",
    ),
    _option("--warmup", float, "Epochs of linear warm-up to --lr."),
)
ABLATION: Final = (
    click.option(
        "--activation",
        type=click.Choice(["relu", "tanh"]),
        default="relu",
        show_default=True,
        help="Activation function.",
    ),
    _switch("lrn", "Local response normalisation."),
    click.option(
        "--pooling",
        type=click.Choice(["overlapping", "plain"]),
        default="overlapping",
        show_default=True,
        help="Windows of 3 or of 2, at stride 2.",
    ),
    _switch("dropout", "Dropout of fc6 and fc7."),
    click.option(
        "--without", metavar="LAYER,...", callback=_names, help=f"Remove layers: any of {', '.join(REMOVABLE)}."
    ),
    _switch("crops", "Random crops. --no-crops takes the centre and needs --no-flips --no-jitter."),
    _switch("flips", "Random horizontal flips."),
    _switch("jitter", "PCA colour jitter."),
)
_SPEED: Final = Speed()
SPEED: Final = (
    DEVICES,
    click.option(
        "--amp",
        type=click.Choice(get_args(Precision)),
        default=_SPEED.amp,
        show_default=True,
        help="Mixed precision. bf16: products in bfloat16; weights, LRN, softmax and loss in float32.",
    ),
    _switch("channels-last", "Channels-last memory format.", _SPEED.channels_last),
    _switch("compile", "torch.compile for each segment of a tower.", _SPEED.compile),
    _switch("cuda-graphs", "One CUDA graph for each segment of a tower.", _SPEED.cuda_graphs),
    _switch("fused-norm", "ReLU, LRN and pooling as one operation.", _SPEED.fused_norm),
    _switch("fused-sgd", "Update of all parameters as one kernel.", _SPEED.fused_sgd),
    _option("--deterministic", bool, "Bit-identical results in every run, at some cost in speed.", is_flag=True),
    _option(
        "--peak-tflops", float, "Peak of one device, for the MFU. [default: known for common GPUs]", metavar="TFLOPS"
    ),
)
OUTPUT: Final = (
    click.option(
        "--run",
        "path",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Run folder. [default: a new one in runs/]",
    ),
    click.option(
        "--resume", type=click.Choice(["auto"]), help="Continue from the newest checkpoint of --run, if there is one."
    ),
    _option(
        "--checkpoint-every",
        int,
        "Steps between checkpoints within an epoch; 0 saves only at its end.",
        metavar="STEPS",
    ),
    _option("--log-every", int, "Steps between log lines.", metavar="STEPS"),
    # Not a part of the configuration: a resumed run profiles only if it is asked again.
    click.option(
        "--profile",
        "profiled",
        type=click.IntRange(0),
        default=0,
        metavar="STEPS",
        help="Record STEPS steps with torch.profiler into the run folder's trace.json, for Perfetto. [default: none]",
    ),
)

_SECTIONS: Final = {
    "Data source": SOURCE,
    "Run folder": OUTPUT,
    "Training recipe": RECIPE,
    "Network": NETWORK,
    "Ablations": ABLATION,
    "Devices and speed": SPEED,
}
"""Headings of the help text, in its order."""


class SectionedCommand(click.Command):
    """A command whose help text lists its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, last those that belong to no section."""
        section_of = {name: title for title, group in _SECTIONS.items() for name in _parameter_names(group)}
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in (*_SECTIONS, "Other options")}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (row := parameter.get_help_record(ctx)):
                rows[section_of.get(str(parameter.name), "Other options")].append(row)
        for title, lines in rows.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


def _parameter_names(group: Sequence[Any]) -> list[str]:
    """Return the parameter names of options, which click knows only once they decorate a function."""

    @options(group)
    def command() -> None: ...

    return [str(parameter.name) for parameter in click.command()(command).params]


def options(*groups: Sequence[Any]) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of ``groups`` to a command, in that order."""

    def decorate(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def make_config(given: dict[str, Any]) -> RunConfig:
    """Return the configuration of a new run, from the values of all options.

    Raises:
        ConfigError: an impossible value.
    """
    groups: dict[str, Any] = {
        name: group(**{field: given[field] for field in group.__struct_fields__}) for name, group in _GROUPS.items()
    }
    return RunConfig(**groups, **{name: value for name, value in given.items() if name not in _OWNER})


def resumed_config(context: click.Context, before: RunConfig, path: Path, given: dict[str, Any]) -> RunConfig:
    """Return the configuration of a checkpoint, changed by the options that the user gave this time.

    Args:
        context: command line, which knows the given options.
        before: configuration in the checkpoint.
        path: file of the checkpoint, for the error.
        given: values of all options, given or default.

    Raises:
        ConfigError: the user gave an option that a run cannot change.
    """
    # Defaults of this command line must not override the checkpoint's values.
    typed = {name: given[name] for name in given if context.get_parameter_source(name) in _TYPED}
    for name, value in typed.items():
        owner = _OWNER.get(name)
        earlier = getattr(getattr(before, owner) if owner else before, name)
        if (owner or name) in FIXED_FOR_A_RUN and value != earlier:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, value, f"{earlier}, as in the run that continues from {path}")
    changed: dict[str, Any] = {name: value for name, value in typed.items() if name not in _OWNER}
    for name, group in _GROUPS.items():
        fields = {field: value for field, value in typed.items() if _OWNER.get(field) == name}
        if not fields:
            continue
        # A new source replaces the old one as a whole: a new address and the old folder would contradict each other.
        moves = name == "source" and bool(fields.keys() & {"loader", "data"})
        old = group() if moves else getattr(before, name)
        changed[name] = msgspec.structs.replace(old, **fields)
    return msgspec.structs.replace(before, **changed)
