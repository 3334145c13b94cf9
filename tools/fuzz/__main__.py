"""`make fuzz`: damaged messages for the decoders, damaged JPEGs, and damaged messages for a node.

Inputs are random numbers from a printed seed; the same seed gives the same inputs. ``messages``, ``jpegs`` and ``segments``
have the rules that no input may break.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from random import Random

import click

from loader_service.cli.job import CONTEXT, Job
from loader_service.datasets.progress import Progress
from tools.fuzz.jpegs import fuzz_jpegs
from tools.fuzz.messages import fuzz_decoders, fuzz_node
from tools.sample_dataset import given_or_made


@click.command(cls=Job, context_settings=CONTEXT)
@click.option(
    "--inputs", type=click.IntRange(1), default=100_000, show_default=True, help="Number of inputs of each kind."
)
@click.option("--seed", type=int, help="Seed of the inputs.  [default: random, and printed]")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Directory with train.lmdb to serve.")
def main(inputs: int, seed: int | None, data: Path | None) -> None:
    """Fuzz the message decoders, the JPEG decoder, and then a node."""
    seed = secrets.randbits(32) if seed is None else seed
    rng = Random(seed)  # noqa: S311 - inputs need not be hard to guess
    click.echo(f"seed {seed}: python -m tools.fuzz --seed {seed} --inputs {inputs}")
    with Progress("decoders", inputs, "inputs") as progress:
        passed = fuzz_decoders(rng, inputs, progress)
    with Progress("jpegs", inputs, "inputs") as progress:
        in_part, bad = fuzz_jpegs(rng, inputs, progress)
    with given_or_made(data) as served, Progress("node", inputs, "inputs") as progress:
        refused, grown = fuzz_node(rng, inputs, served, progress)
    click.echo(f"decoders: {inputs:,} inputs, {passed:,} of them valid; each gave a message or a MessageError")
    click.echo(f"jpegs: {inputs:,} inputs, {in_part:,} decoded in part, {bad:,} refused; all as libjpeg-turbo does")
    click.echo(
        f"node: {inputs:,} inputs, {refused:,} refused; it serves the same bytes, and grew by {grown / 1024:,.0f} KiB"
    )


if __name__ == "__main__":
    main(prog_name="python -m tools.fuzz")
