"""The command line: start, status.

Exit codes: 0 done, 2 an option that cannot work, 3 the dataset, 4 the network, 5 shared memory, 6 a saved state,
7 the node itself; see ``errors``.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from loader_service import __version__, defaults
from loader_service.client.query import status as ask_status
from loader_service.errors import LoaderServiceError
from loader_service.link.keys import generate
from loader_service.link.messages import Status
from loader_service.node.front import Front
from loader_service.node.start import run_node
from loader_service.node.worker import die_with_parent
from loader_service.spec import DatasetFacts, Split


class _Group(click.Group):
    """Shows deliberate errors as their sentence and ends with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LoaderServiceError as error:
            click.echo(f"loader-service: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Serve batches of augmented images to training jobs: every sample exactly once, whatever dies."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )


@main.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=defaults.DATA,
    show_default=True,
    help="Directory of train.lmdb and val.lmdb.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=defaults.WORKERS,
    show_default="one per CPU",
    help="Worker processes.",
)
@click.option(
    "--bind",
    default=defaults.ADDRESS,
    show_default=True,
    help="Address to listen at: tcp://HOST:PORT (port * picks one) or ipc://PATH.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="Directory of this node's keys (see keygen); needed where others can reach it.",
)
@click.option("--insecure", is_flag=True, help="Let other machines reach the node without keys.")
@click.option("--parent", type=int, hidden=True, help="End when this process, the starter, does.")
@click.option("--quiet", is_flag=True, hidden=True, help="Say nothing but warnings.")
def start(
    data: Path, workers: int, bind: str, keys: Path | None, insecure: bool, parent: int | None, quiet: bool
) -> None:
    """Run a node on this machine until Ctrl-C or SIGTERM."""
    if parent is not None:
        die_with_parent(parent)
    if quiet:
        logging.getLogger().setLevel(logging.WARNING)

    def announce(front: Front, facts: dict[Split, DatasetFacts]) -> None:
        if not quiet:
            click.echo(_announcement(front, facts, workers))

    run_node(data, workers=workers, bind=bind, version=__version__, on_ready=announce, keys=keys, insecure=insecure)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
def keygen(directory: Path) -> None:
    """Make the keys of a node and of a client in DIRECTORY."""
    for path in generate(directory):
        click.echo(f"made {path}")
    click.echo(
        f"node: start --keys {directory}; clients: server_key={directory}/node.key, client_key={directory}/client.secret"
    )


@main.command()
@click.argument("address", default=defaults.ADDRESS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--timeout", "timeout_s", type=float, default=5.0, show_default=True, help="Seconds to wait for an answer."
)
@click.option("--server-key", help="File with the node's public key, for a node that has keys.")
@click.option("--client-key", help="File with this client's secret key.")
def status(address: str, as_json: bool, timeout_s: float, server_key: str | None, client_key: str | None) -> None:
    """Show how the node at ADDRESS is; exit code 4 if there is none."""
    answer = ask_status(address, timeout_s, server_key=server_key, client_key=client_key)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(answer)).decode())
    else:
        _print_status(answer)


def _announcement(front: Front, facts: dict[Split, DatasetFacts], workers: int) -> str:
    serves = ", ".join(f"{split} ({f.count:,} records, {len(f.class_names):,} classes)" for split, f in facts.items())
    ceiling = front.memory_ceiling_bytes / 2**20
    return f"listening on {front.address}: {serves}; {workers} workers; at most {ceiling:.0f} MiB of shared memory"


def _print_status(answer: Status) -> None:
    console = Console()
    console.print(
        f"node {answer.instance[:8]} at {answer.address}, version {answer.version}, up {answer.uptime_s:.0f} s; "
        f"{answer.leases} leases out, {answer.reassigned} reassigned, {answer.restarts} workers restarted, "
        f"{answer.refused} messages refused"
    )
    for split, fingerprint in answer.splits.items():
        console.print(f"  {split}: {fingerprint}", highlight=False)
    workers = Table("worker", "pid", "state", "slices", "samples", "busy s")
    for index, w in enumerate(answer.workers):
        workers.add_row(str(index), str(w.pid), w.state, f"{w.slices:,}", f"{w.samples:,}", f"{w.busy_s:.1f}")
    clients = Table("client", "transport", "queued", "slices", "samples")
    for c in answer.clients:
        clients.add_row(c.name, c.transport, str(c.queued), f"{c.slices:,}", f"{c.samples:,}")
    console.print(workers)
    console.print(clients)
