"""`python -m tools.containers build|demo|scale`: the commands behind `make docker` and `make docker-scale`.

- Docker Compose does everything with docker/compose.yaml, in projects of its own: no other volumes or containers change.
- ``build`` is a command apart, because an engine may have network access for builds and none for containers.
- No step waits for a fixed time: the trainer's own lines tell when it is in the middle of an epoch.
"""

from __future__ import annotations

from typing import Final

import click

from loader_service.cli.job import CONTEXT, Job
from tools.containers.demo import demo
from tools.containers.images import build
from tools.containers.scale import scale

PARTS: Final = {"build": build, "demo": demo, "scale": scale}


@click.command(cls=Job, context_settings=CONTEXT)
@click.argument("part", type=click.Choice(list(PARTS)))
def main(part: str) -> None:
    """Build the images, run the demo in containers, or kill and add loaders during training."""
    PARTS[part]()


if __name__ == "__main__":
    main()
