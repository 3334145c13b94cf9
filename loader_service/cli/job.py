"""Commands that run to completion: their errors and signals become messages and exit codes.

A LoaderServiceError prints its message and ends with its exit code. Ctrl-C ends with 130 and SIGTERM with 143, both after
all ``with`` blocks have cleaned up.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Final, NoReturn

import click

from loader_service.errors import LoaderServiceError

CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Job(click.Command):
    """A command whose errors and signals become exit codes; see the module."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn errors and signals into exit codes."""
        signal.signal(signal.SIGTERM, _leave)
        try:
            return super().invoke(ctx)
        except LoaderServiceError as error:
            click.echo(f"{ctx.command_path}: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # for example a full disk, or a folder without write permission
            what = f"{error.filename}: " if error.filename else ""
            click.echo(f"{ctx.command_path}: {what}{error.strerror or error}", err=True)
            ctx.exit(LoaderServiceError.exit_code)
        except KeyboardInterrupt:
            click.echo(f"\n{ctx.command_path}: stopped.", err=True)
            ctx.exit(128 + signal.SIGINT)  # as a shell reports a process that a signal ended


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # an exception, so that `with` and `finally` blocks run
