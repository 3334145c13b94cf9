"""``loader-service status`` and ``top``: show the state and rates of a node, once or live."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import click
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loader_service import defaults
from loader_service.cli.options import Command, argument, option
from loader_service.client.query import status as ask_status
from loader_service.errors import NoNodeError, printable
from loader_service.metrics import Rates
from loader_service.wire.messages import Status


def _node_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a connection to a node: address, timeout and keys."""
    for decorate in (  # applied in this order, so --help lists them in the reverse one
        option("--insecure", is_flag=True, help="Connect without keys, to a node started with --insecure."),
        option("--client-key", show_default="likewise", help="File with this client's secret key."),
        option(
            "--server-key",
            show_default="the user's own, on a loopback address",
            help="File with the node's public key.",
        ),
        option("--timeout", type=click.FloatRange(min=0), default=5.0, help="Seconds to wait for an answer."),
        argument("address", default=defaults.ADDRESS),
    ):
        function = decorate(function)
    return function


@click.command(cls=Command)
@_node_options
@option("--json", is_flag=True, help="Print JSON.")
@option(
    "--interval",
    type=click.FloatRange(min=0),
    default=0.5,
    help="Seconds over which rates are measured; 0 gives the averages since the node's start.",
)
def status(json: bool, interval: float, **node: Any) -> None:
    """Show the state and rates of the node at ADDRESS.

    The exit code is 4 if no node answers.
    """
    ask = _asker(**node)
    before = ask() if interval else None
    if before:
        threading.Event().wait(interval)  # rates are the difference of two answers
    answer = ask()
    rates = Rates.between(before, answer)
    if json:
        both = {**msgspec.to_builtins(answer), "rates": msgspec.to_builtins(rates)}
        click.echo("\n".join(map(printable, msgspec.json.format(msgspec.json.encode(both)).decode().split("\n"))))
    else:
        click.echo("\n".join(_lines(answer, rates)))
        Console().print(_tables(answer, rates))


@click.command(cls=Command)
@_node_options
@option("--interval", type=click.FloatRange(min=0.1), default=1.0, help="Seconds between updates.")
def top(interval: float, **node: Any) -> None:
    """Watch the node at ADDRESS live, until Ctrl-C.

    The exit code is 4 if no node answers at the start.
    """
    ask = _asker(**node)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave by an exception: Live shows the cursor
    try:
        before = ask()
        screen = _screen(before, Rates.between(None, before))  # averages since the node's start
        with Live(screen, auto_refresh=False) as live:  # no thread: one refresh for each answer
            while not threading.Event().wait(interval):
                try:
                    after = ask()
                except NoNodeError as error:  # keep the last screen: the node may be restarted
                    live.update(Group(screen, Text(str(error), style="bold red")), refresh=True)
                    continue
                screen = _screen(after, Rates.between(before, after))
                before = after
                live.update(screen, refresh=True)
    except KeyboardInterrupt:  # the normal end
        return
    finally:
        signal.signal(signal.SIGTERM, previous)


def _asker(address: str, timeout: float, **keys: Any) -> Callable[[], Status]:
    return lambda: ask_status(address, timeout, **keys)


def _screen(answer: Status, rates: Rates) -> Group:
    """Return everything about a node as one renderable."""
    return Group(*map(Text, _lines(answer, rates)), _tables(answer, rates))


def _lines(answer: Status, rates: Rates) -> list[str]:
    full = len(answer.clients) >= answer.max_clients > 0
    lines = [
        f"node {answer.instance[:8]} at {answer.address}, version {answer.version}, up {answer.uptime_s:.0f} s",
        *(f"  {split}: {fingerprint}" for split, fingerprint in answer.splits.items()),
        f"{answer.leases} active leases, {answer.queued} queued requests, "
        f"{answer.send_slots_used} of {answer.send_slots} send slots in use; {answer.reassigned} leases reassigned, "
        f"{answer.restarts} workers restarted, {answer.bad_samples} bad samples, {answer.refused} messages refused",
        f"{rates.samples:,.0f} samples/s, {rates.delivered_bytes / 1e6:,.1f} MB/s; workers busy {rates.busy:.0%}: "
        + ", ".join(f"{stage} {share:.0%}" for stage, share in rates.stages.items()),
        *([f"full: it has {len(answer.clients)} clients, and refuses others"] if full else []),
        f"bottleneck: {rates.bottleneck.what} ({rates.bottleneck.why})",
    ]
    return list(map(printable, lines))


def _tables(answer: Status, rates: Rates) -> Group:
    workers = Table("worker", "pid", "state", "slices", "samples", "samples/s", "busy s")
    for index, (w, rate) in enumerate(zip(answer.workers, rates.workers, strict=True)):
        counts = f"{w.slices:,}", f"{w.samples:,}", f"{rate:,.0f}", f"{w.busy_s:.1f}"
        workers.add_row(str(index), str(w.pid), _cell(f"{w.state} {w.stage}".strip()), *counts)
    clients = Table("client", "transport", "queued", "slices", "samples", "samples/s")
    for c, rate in zip(answer.clients, rates.clients, strict=True):
        clients.add_row(
            _cell(c.name), _cell(c.transport), str(c.queued), f"{c.slices:,}", f"{c.samples:,}", f"{rate:,.0f}"
        )
    return Group(workers, clients)


def _cell(text: str) -> Text:
    """Return a node's text as a cell: rich would read a str as markup."""
    return Text(printable(text))
