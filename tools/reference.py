"""The reference of the command line, docs/cli.md, made from the commands themselves.

    python -m tools.reference > docs/cli.md

A test compares the file with what this prints, so that no option goes undocumented.
"""

from __future__ import annotations

import inspect
from typing import Final

import click

from loader_service.cli import main
from loader_service.cli.options import CONFIG_FILE, VARIABLES, keys, variable

INTRODUCTION: Final = f"""\
# The command line

Made by `python -m tools.reference > docs/cli.md`; do not edit it by hand. `loader-service COMMAND --help` says the same.

## Where an option's value comes from

The first of these that has one:

1. the **flag**;
2. the **environment variable** `{VARIABLES}_<COMMAND>_<OPTION>`, in capitals, with `_` for `-`; a switch is on for `1` or
   `true`;
3. the **configuration file**: the key of the option's name, without the dashes before it, in the table of its command;
4. the **default**.

The configuration file is the one that `--config FILE` or `{VARIABLES}_CONFIG` names, else `{CONFIG_FILE}` in the working
directory, if there is one. Paths in it count from the working directory. It is checked whole before a command begins: a
table or key that means nothing is an error that names it.

```toml
# {CONFIG_FILE}
[start]
data = "/srv/imagenet"
workers = 16
metrics = "127.0.0.1:9555"
log-format = "json"

[status]
timeout = 2.0
```

A private node (`LocalNode`, or `trainer run` where no node is named) takes no options from the environment or a file: what is
configured there is meant for the node that you start.

One variable belongs to no option: `LOADER_SERVICE_KERNEL` names the form of the inner loops that workers and clients run
(`avx512`, `avx2`, `neon`, `c` or `numpy`), where it shall not be the best that the machine has.

## Shell completion

    eval "$(_LOADER_SERVICE_COMPLETE=bash_source loader-service)"        # bash, in ~/.bashrc
    eval "$(_LOADER_SERVICE_COMPLETE=zsh_source loader-service)"         # zsh, in ~/.zshrc
    _LOADER_SERVICE_COMPLETE=fish_source loader-service | source         # fish

## Exit codes

See [the table](design/faults.md#exit-codes). Ctrl-C is the normal end of `start` and `top`: 0. `doctor` ends with 1 if a
check has failed.
"""


def reference() -> str:
    """The whole document, in Markdown."""
    group = click.Context(main, info_name="loader-service", auto_envvar_prefix=VARIABLES)
    return "\n".join([INTRODUCTION, *(_section(command, group) for command in main.commands.values())])


def _section(command: click.Command, group: click.Context) -> str:
    context = click.Context(command, parent=group, info_name=command.name)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [_row(parameter, key, context) for key, parameter in keys(command).items()]
    return "\n".join(
        [
            f"## {command.name}",
            "",
            f"    loader-service {command.name} {usage}",
            "",
            inspect.cleandoc(command.help or ""),
            "",
            "| flag or argument | variable | key | default | meaning |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _row(parameter: click.Parameter, key: str, context: click.Context) -> str:
    """One line of a command's table."""
    if isinstance(parameter, click.Option):
        flag = max(parameter.opts, key=len)
        if not parameter.is_flag:
            flag += f" {parameter.make_metavar(context)}"
        meaning, shown = parameter.help or "", parameter.show_default
    else:
        flag, meaning, shown = parameter.make_metavar(context).strip("[]"), "See above.", True
    default = shown if isinstance(shown, str) else parameter.to_info_dict()["default"]
    plain = "" if default is None or default is False else str(default)
    cells = (f"`{flag}`", f"`{variable(context, parameter)}`", f"`{key}`", f"`{plain}`" if plain else "", meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    click.echo(reference(), nl=False)
