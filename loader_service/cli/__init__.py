"""The command line: start, status, top, keygen, doctor; preprocess, verify, inspect, export.

Exit codes: 0 done, 2 an option that cannot work, 3 the dataset, 4 the network, 5 shared memory, 6 a saved state,
7 the node itself; see ``errors``. Where options come from: ``options``.
"""

from __future__ import annotations

import click

from loader_service import __version__
from loader_service.cli.datasets import export, inspect, verify
from loader_service.cli.doctor import doctor
from loader_service.cli.options import VARIABLES, Group
from loader_service.cli.preprocess import preprocess
from loader_service.cli.start import keygen, start
from loader_service.cli.status import status, top


@click.group(
    cls=Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "auto_envvar_prefix": VARIABLES,
    },
)
@click.version_option(__version__)
def main() -> None:
    """Serve batches of augmented images to training jobs: every sample exactly once, whatever dies."""


for _command in (start, status, top, keygen, doctor, preprocess, verify, inspect, export):
    main.add_command(_command)
