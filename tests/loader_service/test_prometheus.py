"""The exporter for Prometheus."""

from __future__ import annotations

import os
import socket
import time
import urllib.request
from contextlib import ExitStack, suppress

import psutil
import pytest

from loader_service import LoaderMetrics
from loader_service.errors import AddressError
from loader_service.prometheus import MAX_REQUEST_BYTES, Exporter

METRICS = LoaderMetrics(
    batches=3,
    samples=300,
    delivered_bytes=45_000,
    waited_s=0.5,
    used_s=1.5,
    slots={"held": 1, "free": 3},
    duplicates_refused=2,
    reassigned=1,
    substituted=0,
)


def _scrape(url: str) -> list[str]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return [line for line in answer.read().decode().splitlines() if not line.startswith("#")]


def test_the_last_record_is_served() -> None:
    """The exporter serves each field of the last record, in base units, counters with _total, dicts by label."""
    with Exporter("127.0.0.1:0", "loader") as exporter:
        assert _scrape(exporter.url) == []
        exporter(METRICS)
        assert _scrape(exporter.url) == [
            "loader_service_loader_batches_total 3.0",
            "loader_service_loader_samples_total 300.0",
            "loader_service_loader_delivered_bytes_total 45000.0",
            "loader_service_loader_waited_seconds_total 0.5",
            "loader_service_loader_used_seconds_total 1.5",
            'loader_service_loader_slots{state="held"} 1.0',
            'loader_service_loader_slots{state="free"} 3.0',
            "loader_service_loader_duplicates_refused_total 2.0",
            "loader_service_loader_reassigned_total 1.0",
            "loader_service_loader_substituted_total 0.0",
        ]


def test_a_closed_exporter_gives_its_port_back() -> None:
    """An address is in use until its exporter is closed, and free at once afterwards."""
    with Exporter("127.0.0.1:0", "node") as first:
        address = first.url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(AddressError, match=r"metrics cannot be served there \(Address already in use\)"):
            Exporter(address, "node")
    Exporter(address, "node").close()


@pytest.mark.parametrize("address", ["9555", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", "a:1/b"])
def test_a_malformed_address_is_an_error(address: str) -> None:
    """A malformed address raises AddressError."""
    with pytest.raises(AddressError, match="cannot be used"):
        Exporter(address, "node")


def test_idle_connections_cost_no_threads() -> None:
    """With 300 idle connections a scrape is answered at once, by the one thread that there is."""
    threads = psutil.Process().num_threads()
    with Exporter("127.0.0.1:0", "loader") as exporter, ExitStack() as idle:
        exporter(METRICS)
        host, port = exporter.url.removeprefix("http://").removesuffix("/metrics").split(":")
        connections = [idle.enter_context(socket.create_connection((host, int(port)))) for _ in range(300)]
        start = time.monotonic()
        assert len(_scrape(exporter.url)) == 10
        assert time.monotonic() - start < 2
        assert psutil.Process().num_threads() == threads + 1
        connections[0].settimeout(10)
        assert connections[0].recv(1) == b""  # the oldest ones have made room


def test_a_connection_that_asks_for_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends half a request, or one without an end, is not kept."""
    monkeypatch.setattr("loader_service.prometheus.REQUEST_TIMEOUT_S", 0.2)
    with Exporter("127.0.0.1:0", "loader") as exporter:
        host, port = exporter.url.removeprefix("http://").removesuffix("/metrics").split(":")
        for said in (b"GET /metr", b"x" * 2 * MAX_REQUEST_BYTES, os.urandom(100)):
            with socket.create_connection((host, int(port)), timeout=10) as peer:
                peer.sendall(said)
                with suppress(ConnectionError):  # a reset, if not all that it said was read
                    assert peer.recv(1) == b""
        with socket.create_connection((host, int(port)), timeout=10) as peer:
            peer.sendall(b"POST /metrics HTTP/1.1\r\n\r\n")
            assert peer.recv(100).startswith(b"HTTP/1.1 405 ")
