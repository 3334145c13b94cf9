"""An exporter for Prometheus: a hook that serves the last record of metrics at ``/metrics``.

>>> from loader_service import Loader
>>> from loader_service.prometheus import Exporter
>>> with Exporter("127.0.0.1:9556", "loader") as exporter, Loader(hook=exporter) as loader:  # doctest: +SKIP
...     train(loader)

A field becomes the metric ``loader_service_<prefix>_<field>``. Its unit is spelled out (``_s`` becomes ``_seconds``), and
the name of a counter ends in ``_total``, as Prometheus recommends.

The server is one thread, however many connections there are. A connection that sends no request is closed after a while, or
when a newer one needs its place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, get_type_hints
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from loader_service.errors import AddressError
from loader_service.metrics import Counter, Gauge, LoaderMetrics, NodeMetrics

log = logging.getLogger("loader_service.metrics")

MAX_CONNECTIONS: Final = 32
"""Connections at a time; the oldest makes room for a newer one. A collector needs one, for some milliseconds."""

REQUEST_TIMEOUT_S: Final = 5.0
"""Time for a connection to send its request and to take the answer."""

MAX_REQUEST_BYTES: Final = 16_384
"""Upper bound of a request with its headers."""

Family = CounterMetricFamily | GaugeMetricFamily
_FAMILIES: Final[dict[Any, type[Family]]] = {Counter: CounterMetricFamily, Gauge: GaugeMetricFamily}


class Exporter(Collector):
    """A hook with an HTTP server in another thread. Everyone who can reach the address can read the metrics.

    Args:
        address: HOST:PORT to listen at; port 0 chooses a free one.
        prefix: ``node`` or ``loader``, the source of the records.

    Raises:
        AddressError: the address is malformed, in use, or not one of this machine.
    """

    def __init__(self, address: str, prefix: str) -> None:
        self._prefix = prefix
        self._last: NodeMetrics | LoaderMetrics | None = None  # replaced as a whole by the hook, never changed
        host, port = _host_and_port(address)
        registry = CollectorRegistry()  # not the default one, which has metrics of Python and of the process
        registry.register(self)
        try:
            self._server = _Server(host, port, registry)
        except OSError as error:
            # asyncio's own text repeats the address; the bare reason is that of the error's number.
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise AddressError(address, f"metrics cannot be served there ({reason})") from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._server.port}/metrics"

    def __call__(self, metrics: NodeMetrics | LoaderMetrics) -> None:
        """Store a record; it replaces the last one."""
        self._last = metrics

    def collect(self) -> Iterator[Family]:
        """Yield the fields of the last record. The server's thread calls this for each scrape."""
        last = self._last  # read once: the caller's thread may replace it at any time
        if last is None:
            return
        for field, hint in get_type_hints(type(last), include_extras=True).items():
            (meaning,), value = hint.__metadata__, getattr(last, field)  # the Counter or Gauge in Annotated
            name = f"loader_service_{self._prefix}_{field}"
            # The client library appends _total to counters.
            name = f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name
            labels = [meaning.label] if meaning.label else []
            family = _FAMILIES[type(meaning)](name, meaning.help, labels=labels)
            for key, number in value.items() if labels else [("", value)]:
                family.add_metric([key] if labels else [], number)
            yield family

    def close(self) -> None:
        """Stop serving."""
        self._server.close()

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")  # urlsplit finds a host only after //
        port = parts.port
    except ValueError as error:
        raise AddressError(address, str(error)) from error
    if not parts.hostname or port is None or parts.path:
        raise AddressError(address, "it must look like HOST:PORT, such as 127.0.0.1:9555")
    return parts.hostname, port


class _Server:
    """An HTTP server of one thread that answers every GET with a registry's metrics.

    Raises:
        OSError: it cannot listen at ``host``:``port``.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._connections: dict[asyncio.Task[Any], None] = {}  # the oldest first
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._report)
        try:
            self._server = self._loop.run_until_complete(
                asyncio.start_server(self._serve, host, port, limit=MAX_REQUEST_BYTES)
            )
        except BaseException:
            self._loop.close()
            raise
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever, name="loader-service-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, close all connections and end the thread."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]  # now, since more may come before it has ended
            oldest.cancel()
        self._connections[own] = None
        # A peer that is slow, sends no request, or leaves early is none of this program's troubles.
        try:
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        except asyncio.CancelledError:  # it made room, or the server is closed
            pass
        finally:
            self._connections.pop(own, None)
            writer.transport.abort()  # does nothing after close()

    def _answer(self, head: bytes) -> bytes:
        """Return the answer to a request's line and headers."""
        line, *headers = head.decode("latin-1").split("\r\n")
        if not line.startswith(("GET ", "HEAD ")):
            return (
                b"HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        fields = {name.lower(): value.strip() for name, _, value in (header.partition(":") for header in headers)}
        encode, content_type = choose_encoder(fields.get("accept", ""))
        body = encode(self._registry)
        answer = (
            f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode()
        return answer if line.startswith("HEAD ") else answer + body

    def _report(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error of the loop, such as a lack of descriptors, after which asyncio pauses for a second."""
        log.warning("metrics: %s (%s)", context["message"], context.get("exception"))
