"""Commands that work until they are done: how their errors and signals end.

A deliberate error is shown as its sentence and ends with its exit code; Ctrl-C ends with 130 and SIGTERM with 143, both
after every ``with`` block has been left, so that nothing stays behind.
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
        """Run it."""
        signal.signal(signal.SIGTERM, _leave)
        try:
            return super().invoke(ctx)
        except LoaderServiceError as error:
            click.echo(f"{ctx.command_path}: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # a disk that is full, a folder that may not be written
            what = f"{error.filename}: " if error.filename else ""
            click.echo(f"{ctx.command_path}: {what}{error.strerror or error}", err=True)
            ctx.exit(LoaderServiceError.exit_code)
        except KeyboardInterrupt:
            click.echo(f"\n{ctx.command_path}: stopped.", err=True)
            ctx.exit(128 + signal.SIGINT)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
