"""``loader-service status``: how a node is."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console
from rich.table import Table

from loader_service import defaults
from loader_service.cli.options import Command, argument, option
from loader_service.client.query import status as ask_status
from loader_service.link.messages import Status


@click.command(cls=Command)
@argument("address", default=defaults.ADDRESS)
@option("--json", is_flag=True, help="Print JSON.")
@option("--timeout", type=float, default=5.0, help="Seconds to wait for an answer.")
@option("--server-key", help="File with the node's public key, for a node that has keys.")
@option("--client-key", help="File with this client's secret key.")
def status(address: str, json: bool, timeout: float, server_key: str | None, client_key: str | None) -> None:
    """Show how the node at ADDRESS is; exit code 4 if there is none."""
    answer = ask_status(address, timeout, server_key=server_key, client_key=client_key)
    if json:
        click.echo(msgspec.json.format(msgspec.json.encode(answer)).decode())
    else:
        _print_status(answer)


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
