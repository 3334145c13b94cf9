"""`python -m tools.containers build|demo|scale`: what `make docker` and `make docker-scale` run.

- Everything is done by Docker Compose with docker/compose.yaml, in projects of its own, so nobody's volumes or containers
  are touched.
- ``build`` and the other commands are two, because an engine may have the network for the one and not for the other.
- Nothing waits for a time to pass: the trainer's own lines say when it is in the middle of an epoch.
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
    """Build the images, run the demo by them, or kill and add loaders while they train."""
    PARTS[part]()


if __name__ == "__main__":
    main()
