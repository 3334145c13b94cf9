"""`make examples`: set up the environment with the frameworks, and run every example in it, as tests."""

from __future__ import annotations

import os
import subprocess
import sys

import click

from loader_service.cli.job import CONTEXT, Job
from tools.examples.environment import FRAMEWORKS, ROOT, RUN, VENV, is_ready, make_environment


@click.command(cls=Job, context_settings=CONTEXT | {"ignore_unknown_options": True})
@click.argument("pytest_arguments", nargs=-1, type=click.UNPROCESSED)
def main(pytest_arguments: tuple[str, ...]) -> None:
    """Set up the environment of examples/, if that is not done, and run every example in it."""
    if not is_ready():
        click.echo(f"examples: installing {', '.join(FRAMEWORKS)} into {VENV} (a few minutes)")
        make_environment()
    command = [sys.executable, "-m", "pytest", "tests/examples", *pytest_arguments]
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, RUN: "1"}, check=False).returncode)


if __name__ == "__main__":
    main()
