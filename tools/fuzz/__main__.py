"""`make fuzz`: damaged messages for the decoders, damaged JPEGs, damaged messages for a node, and inputs guided by coverage.

Inputs come from a printed seed; the same seed gives the same inputs. ``messages`` and ``jpegs`` have the rules that no input
may break.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from random import Random
from typing import Final

import click

from loader_service.cli.job import CONTEXT, Job
from loader_service.datasets.progress import Progress
from tools.fuzz import guided
from tools.fuzz.jpegs import fuzz_jpegs
from tools.fuzz.messages import fuzz_decoders, fuzz_node
from tools.sample_dataset import given_or_made

KINDS: Final = ("decoders", "jpegs", "node", "guided")


@click.command(cls=Job, context_settings=CONTEXT)
@click.option(
    "--inputs", type=click.IntRange(1), default=100_000, show_default=True, help="Number of inputs of each kind."
)
@click.option("--seed", type=int, help="Seed of the inputs.  [default: random, and printed]")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Directory with train.lmdb to serve.")
@click.option("--only", type=click.Choice(KINDS), multiple=True, help="Only this kind of inputs.  [default: all]")
def main(inputs: int, seed: int | None, data: Path | None, only: tuple[str, ...]) -> None:
    """Fuzz the message decoders, the JPEG decoder and a node at random, then both decoders guided by coverage."""
    seed = secrets.randbits(32) if seed is None else seed
    kinds = only or KINDS
    again = "".join(f" --only {kind}" for kind in only)
    click.echo(f"seed {seed}: python -m tools.fuzz --seed {seed} --inputs {inputs}{again}")
    if "decoders" in kinds:
        with Progress("decoders", inputs, "inputs") as progress:
            passed = fuzz_decoders(Random(seed), inputs, progress)  # noqa: S311 - inputs need not be hard to guess
        click.echo(f"decoders: {inputs:,} inputs, {passed:,} of them valid; each gave a message or a MessageError")
    if "jpegs" in kinds:
        with Progress("jpegs", inputs, "inputs") as progress:
            in_part, bad = fuzz_jpegs(Random(seed), inputs, progress)  # noqa: S311
        click.echo(f"jpegs: {inputs:,} inputs, {in_part:,} decoded in part, {bad:,} refused; all as libjpeg-turbo does")
    if "node" in kinds:
        with given_or_made(data) as served, Progress("node", inputs, "inputs") as progress:
            refused, grown = fuzz_node(Random(seed), inputs, served, progress)  # noqa: S311
        click.echo(
            f"node: {inputs:,} inputs, {refused:,} refused; it serves the same bytes, and grew by {grown / 1024:,.0f} KiB"
        )
    if "guided" in kinds:
        _guided(inputs, seed)


def _guided(inputs: int, seed: int) -> None:
    for kind in guided.KINDS:
        if reason := guided.missing(kind):
            click.echo(f"guided, {kind}: not run: {reason}")
            continue
        click.echo(f"guided, {kind}: libFuzzer makes {inputs:,} inputs", err=True)
        kept, reached = guided.fuzz_guided(kind, inputs, seed)
        click.echo(f"guided, {kind}: {inputs:,} inputs, {kept:,} kept, {reached:,} places in the code reached")


if __name__ == "__main__":
    main(prog_name="python -m tools.fuzz")
