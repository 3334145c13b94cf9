"""The command line ``loader-service``: start, status, top, doctor, keygen; preprocess, verify, inspect, export.

Exit codes: 0 success, 2 invalid option, 3 dataset, 4 network, 5 shared memory, 6 saved state, 7 node failure; see
``errors``. Option values come from flags, environment variables and a configuration file; see ``options``.
"""

from __future__ import annotations

import click

from loader_service import __version__
from loader_service.cli.options import VARIABLES, Group, LazyCommands


@click.group(
    cls=Group,
    # In the order of --help: run, watch and set up a node; then the dataset commands.
    commands=LazyCommands(
        {
            "start": "loader_service.cli.start",
            "status": "loader_service.cli.status",
            "top": "loader_service.cli.status",
            "doctor": "loader_service.cli.doctor",
            "keygen": "loader_service.cli.start",
            "preprocess": "loader_service.cli.datasets",
            "verify": "loader_service.cli.datasets",
            "inspect": "loader_service.cli.datasets",
            "export": "loader_service.cli.datasets",
        }
    ),
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "auto_envvar_prefix": VARIABLES,
    },
)
@click.version_option(__version__)
def main() -> None:
    """Serve batches of augmented images to training jobs, every sample exactly once per epoch."""
