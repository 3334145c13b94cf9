"""The values of options: flag, environment variable, configuration file, default, in this order of precedence.

The same rule holds for every command:

- The flag ``--log-format`` of ``start`` is also the environment variable ``LOADER_SERVICE_START_LOG_FORMAT`` (a switch is on
  for ``1`` or ``true``) and the key ``log-format`` in the table ``[start]`` of the configuration file. So are arguments such
  as ADDRESS.
- The configuration file is named by ``--config`` or ``LOADER_SERVICE_CONFIG``, else it is ``loader-service.toml`` in the
  working directory, if that exists. The whole file is checked: an unknown table or key is an error.

This module also holds the classes of commands and of the group of commands.
"""

from __future__ import annotations

import signal
import tomllib
from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click

from loader_service.errors import LoaderServiceError, OptionError

VARIABLES: Final = "LOADER_SERVICE"
"""Prefix of all environment variables."""

CONFIG_FILE: Final = Path("loader-service.toml")
"""Configuration file in the working directory, read if it exists and no other is named."""

option = partial(click.option, show_default=True, show_envvar=True)
hidden_option = partial(click.option, hidden=True, allow_from_autoenv=False)
"""Declares an option between a program and the node that it starts; it must not come from the user's environment."""


class Argument(click.Argument):
    """An argument that, like an option, can be set by an environment variable."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the value of the argument's environment variable, if it is set."""
        self.envvar = variable(ctx, self)  # click derives names for options only
        return super().resolve_envvar_value(ctx)


argument = partial(click.argument, cls=Argument)


class Command(click.Command):
    """A command whose options can be set in a configuration file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--config"],
                type=click.Path(dir_okay=False, path_type=Path),
                envvar=f"{VARIABLES}_CONFIG",
                show_envvar=True,
                show_default=f"{CONFIG_FILE}, if it exists",
                is_eager=True,  # before the other options are given their defaults
                expose_value=False,
                callback=_read_config,
                help="TOML file with option values.",
            )
        )


class LazyCommands(MutableMapping[str, click.Command]):
    """A mapping from names to commands that imports a command's module when the command is first looked up.

    The dataset commands import PIL and rich: more than 100 ms of CPU time that ``start`` does not need.

    Args:
        modules: module of each command by name, in the order of --help. In its module, the command has the same name.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = dict(modules)
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            self._loaded[name] = getattr(import_module(self._modules[name]), name)
        return self._loaded[name]

    # Mapping's own test would look the command up, and so import it.
    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._modules.setdefault(name, "")
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        self._loaded.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class Group(click.Group):
    """A group of commands. A LoaderServiceError prints its message and ends with its exit code."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """Return the names of the commands in the order of --help."""
        return list(self.commands)  # click sorts them by name

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn errors and Ctrl-C into exit codes."""
        try:
            return super().invoke(ctx)
        except LoaderServiceError as error:
            click.echo(f"loader-service: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(128 + signal.SIGINT)  # click's own answer is 1


def variable(ctx: click.Context, parameter: click.Parameter) -> str:
    """Return the name of the environment variable of a command's parameter."""
    if parameter.envvar and not isinstance(parameter, Argument):  # an Argument's envvar comes from here
        return str(parameter.envvar)
    assert parameter.name is not None
    return f"{ctx.auto_envvar_prefix}_{parameter.name.upper()}"


def keys(command: click.Command) -> dict[str, click.Parameter]:
    """Return the keys of a command's table in the configuration file: its public options and arguments, by name."""
    found = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.hidden:
            continue
        name = max(parameter.opts, key=len).removeprefix("--")  # the long form of `-x, --name`
        if name != "config":
            found[name] = parameter
    return found


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Use the values of the configuration file as defaults of the command that runs."""
    if path is None and not CONFIG_FILE.exists():
        return
    path = path or CONFIG_FILE
    assert ctx.parent is not None
    assert isinstance(ctx.parent.command, click.Group)
    # click's default_map ranks below flags and environment variables, which is the order that this module promises.
    defaults = _checked(_parsed(path), path, ctx.parent.command, ctx)
    ctx.default_map = defaults.get(str(ctx.info_name), {})


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError("--config", str(path), f"a file that can be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError("--config", str(path), f"TOML ({error})") from error


def _checked(
    tables: dict[str, Any], path: Path, group: click.Group, ctx: click.Context
) -> dict[str, dict[str, str | int | float | bool]]:
    """Check the whole configuration file; return the values of each command by the names of its parameters.

    Raises:
        OptionError: a table, key or value is not valid; the error names it.
    """
    checked: dict[str, dict[str, str | int | float | bool]] = {}
    for name, table in tables.items():
        if name not in group.commands:
            raise OptionError(f"{path}: {name}", table, f"a table of a command: {', '.join(sorted(group.commands))}")
        if not isinstance(table, dict):
            raise OptionError(f"{path}: {name}", table, f"a table, [{name}], with the command's options")
        known = keys(group.commands[name])
        checked[name] = {}
        for key, value in table.items():
            where = f"{path}: [{name}] {key}"
            if key not in known:
                raise OptionError(where, value, f"one of the options of {name}: {', '.join(sorted(known))}")
            if not isinstance(value, str | int | float | bool):  # TOML also has dates, arrays and tables
                raise OptionError(where, value, "a string, a number, true or false")
            try:
                known[key].type_cast_value(ctx, value)  # only to check: click converts the value itself later
            except click.BadParameter as error:
                raise OptionError(where, value, f"another value, for {error.message}") from error
            checked[name][str(known[key].name)] = value
    return checked
