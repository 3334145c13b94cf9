"""``loader-service start`` and ``keygen``: a node, and the keys that let others reach it."""

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
    help="Address to listen at: tcp://HOST:PORT (port * picks one) or ipc://PATH.",
)
@option(
    "--keys",
    type=click.Path(path_type=Path),
    help="Directory of this node's keys (see keygen); needed where others can reach it.",
)
@option("--insecure", is_flag=True, help="Let other machines reach the node without keys.")
@option(
    "--io-threads",
    type=click.IntRange(1, 64),
    default=defaults.CONNECTIONS,
    show_default="one per 4 CPUs, 4 at most",
    help="Threads that send slices to other machines.",
)
@option("--metrics", metavar="HOST:PORT", help="Serve metrics for Prometheus there, at /metrics.")
@option("--log-format", type=click.Choice(logs.FORMATS), default="text", help="How log lines look.")
@option("--log-level", type=click.Choice(logs.LEVELS), default="info", help="The least grave lines that are shown.")
@hidden_option("--parent", type=int, help="End when this process, the starter, does.")
@hidden_option("--quiet", is_flag=True, help="Say nothing but warnings.")
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
        die_with_parent(parent)
    logs.set_up(log_format, "warning" if quiet else log_level)

    def announce(dispatcher: Dispatcher, facts: dict[Split, DatasetFacts]) -> None:
        line = _announcement(dispatcher, facts, workers)
        if log_format == "json":
            log.info(line, extra={"address": dispatcher.address, "instance": dispatcher.instance, "workers": workers})
        elif not quiet:
            click.echo(line)

    with _Metrics(metrics) if metrics else nullcontext() as hook:
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
    """A hook that starts to serve when it is first called: a node may have no threads before it has forked."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._exporter: Exporter | None = None

    def __call__(self, metrics: NodeMetrics) -> None:
        if self._exporter is None:
            self._exporter = Exporter(self._address, "node")
            log.info("metrics are at %s", self._exporter.url, extra={"url": self._exporter.url})
        self._exporter(metrics)

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._exporter:
            self._exporter.close()


@click.command(cls=Command)
@argument("directory", type=click.Path(path_type=Path))
def keygen(directory: Path) -> None:
    """Make the keys of a node and of a client in DIRECTORY."""
    for path in generate(directory):
        click.echo(f"made {path}")
    click.echo(
        f"node: start --keys {directory}; clients: server_key={directory}/node.key, client_key={directory}/client.secret"
    )


def _announcement(dispatcher: Dispatcher, facts: dict[Split, DatasetFacts], workers: int) -> str:
    serves = ", ".join(f"{split} ({f.count:,} records, {len(f.class_names):,} classes)" for split, f in facts.items())
    ceiling = dispatcher.memory_ceiling_bytes / 2**20
    return f"listening on {dispatcher.address}: {serves}; {workers} workers; at most {ceiling:.0f} MiB of shared memory"
