"""``loader-service start`` and ``keygen``: run a node, and make the keys with which other machines reach it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import click

from loader_service import __version__, defaults
from loader_service.cli import logs
from loader_service.cli.options import Command, argument, hidden_option, option
from loader_service.metrics import NodeMetrics
from loader_service.node.dispatcher import Dispatcher, run_node
from loader_service.node.worker import die_with_parent
from loader_service.prometheus import Exporter
from loader_service.types import DatasetFacts, Split
from loader_service.wire.auth import generate

log = logging.getLogger("loader_service.node")


@click.command(cls=Command)
@option(
    "--data",
    type=click.Path(path_type=Path),
    default=defaults.DATA,
    help="Directory of train.lmdb and val.lmdb.",
)
@option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=defaults.WORKERS,
    show_default="one per CPU",
    help="Worker processes.",
)
@option(
    "--bind",
    default=defaults.ADDRESS,
    help="Address to listen on: tcp://HOST:PORT (port * picks a free one) or ipc://PATH.",
)
@option(
    "--keys",
    type=click.Path(path_type=Path),
    show_default="the user's own, on a loopback address",
    help="Directory of the node's keys (see keygen); required if other machines can reach the address.",
)
@option("--insecure", is_flag=True, help="Serve without keys and encryption everybody who can reach the address.")
@option(
    "--io-threads",
    type=click.IntRange(1, 64),
    default=defaults.CONNECTIONS,
    show_default="one per 4 CPUs, 2 to 4",
    help="Threads that send and encrypt slices over TCP.",
)
@option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics at http://HOST:PORT/metrics.")
@option("--log-format", type=click.Choice(logs.FORMATS), default="text", help="Format of log lines.")
@option("--log-level", type=click.Choice(logs.LEVELS), default="info", help="Minimum log level.")
@hidden_option("--parent", type=int, help="Process id of the starter; the node ends when that process ends.")
@hidden_option("--quiet", is_flag=True, help="Print warnings only.")
def start(
    data: Path,
    workers: int,
    bind: str,
    keys: Path | None,
    insecure: bool,
    io_threads: int,
    metrics: str | None,
    log_format: str,
    log_level: str,
    parent: int | None,
    quiet: bool,
) -> None:
    """Run a node on this machine until Ctrl-C or SIGTERM."""
    if parent is not None:
        die_with_parent(parent)  # first of all: a starter that is killed now must not leave a node behind
    logs.set_up(log_format, "warning" if quiet else log_level)

    # Starters and scripts wait for this line on stdout; with JSON logs it is a log line with fields instead.
    def announce(dispatcher: Dispatcher, facts: dict[Split, DatasetFacts]) -> None:
        line = _announcement(dispatcher, facts, workers)
        if log_format == "json":
            log.info(line, extra={"address": dispatcher.address, "instance": dispatcher.instance, "workers": workers})
        elif not quiet:
            click.echo(line)

    with _Metrics(metrics) if metrics else nullcontext() as hook:  # nullcontext gives None: no hook
        run_node(
            data,
            workers=workers,
            bind=bind,
            version=__version__,
            on_ready=announce,
            keys=keys,
            insecure=insecure,
            io_threads=io_threads,
            hook=hook,
        )


class _Metrics:
    """A metrics hook that starts its server at the first call: a node may have no threads before it has forked workers."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._exporter: Exporter | None = None

    def __call__(self, metrics: NodeMetrics) -> None:
        if self._exporter is not None:
            self._exporter(metrics)
            return
        self._exporter = Exporter(self._address, "node")
        self._exporter(metrics)  # before the line: whoever reads it may ask at once
        log.info("serving metrics at %s", self._exporter.url, extra={"url": self._exporter.url})

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._exporter:
            self._exporter.close()


@click.command(cls=Command)
@argument("directory", type=click.Path(path_type=Path))
def keygen(directory: Path) -> None:
    """Write the keys of a node and its clients to DIRECTORY."""
    for path in generate(directory):
        click.echo(f"wrote {path}")
    click.echo(f"node:    loader-service start --keys {directory}")
    click.echo(f"clients: server_key={directory}/node.key, client_key={directory}/client.secret")


def _announcement(dispatcher: Dispatcher, facts: dict[Split, DatasetFacts], workers: int) -> str:
    serves = ", ".join(f"{split} ({f.count:,} records, {len(f.class_names):,} classes)" for split, f in facts.items())
    ceiling = dispatcher.memory_ceiling_bytes / 2**20
    queue = dispatcher.client_bytes / 2**20
    return (
        f"listening on {dispatcher.address}: {serves}; {workers} workers; at most {ceiling:.0f} MiB of shared memory, and "
        f"{queue:.0f} MiB for each client's requests"
    )
