"""An exporter for Prometheus: a hook that serves the last record of metrics at ``/metrics``.

>>> from loader_service import Loader
>>> from loader_service.prometheus import Exporter
>>> with Exporter("127.0.0.1:9556", "loader") as exporter, Loader(hook=exporter) as loader:  # doctest: +SKIP
...     train(loader)

A field becomes the metric ``loader_service_<prefix>_<field>``. Its unit is spelled out (``_s`` becomes ``_seconds``), and
the name of a counter ends in ``_total``, as Prometheus recommends.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, get_type_hints
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from loader_service.errors import AddressError
from loader_service.metrics import Counter, Gauge, LoaderMetrics, NodeMetrics

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
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise AddressError(address, f"metrics cannot be served there ({error.strerror})") from error
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}/metrics"

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
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

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
