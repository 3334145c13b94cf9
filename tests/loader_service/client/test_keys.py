"""Tests of keys: a node with keys serves only clients that have them; other clients get a clear error."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loader_service import Loader, describe, errors, status
from loader_service.wire import auth
from loader_service.wire.access import own_keys

StartNode = Callable[..., Any]


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    auth.generate(directory / "ours")
    auth.generate(directory / "theirs")
    return directory


@pytest.fixture
def address(start_node: StartNode, keyring: Path) -> str:
    node: Any = start_node(options=("--keys", str(keyring / "ours")))
    return str(node.address)


def _right(keyring: Path) -> dict[str, Path]:
    return {"server_key": keyring / "ours" / "node.key", "client_key": keyring / "ours" / "client.secret"}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_right_keys_open_it(address: str, keyring: Path, transport: Any) -> None:
    """A client with the right keys gets an epoch, a description and a status, by both transports."""
    with Loader(address, transport=transport, timeout_s=20, **_right(keyring)) as loader:
        assert sum(len(batch.labels) for batch in loader) == 300
    assert describe(address, **_right(keyring)).count == 300
    assert status(address, **_right(keyring)).refused == 0


@pytest.mark.parametrize(
    ("server", "client", "sentence"),
    [
        (None, None, "the node demands keys, and this client connects without"),
        ("theirs", "ours", "does not prove the key that server_key names: it has another"),
        ("ours", "theirs", "this client's key is not on the node's list"),
    ],
)
def test_clients_with_wrong_keys_get_a_clear_error(
    address: str, keyring: Path, server: str | None, client: str | None, sentence: str
) -> None:
    """Loader, describe and status distinguish no key, a wrong node key and an unlisted client key."""
    given: dict[str, Any] = {
        "insecure": server is None,
        "server_key": keyring / server / "node.key" if server else None,
        "client_key": keyring / client / "client.secret" if client else None,
    }
    for attempt in (lambda: Loader(address, timeout_s=20, **given), lambda: describe(address, **given), lambda: status(address, **given)):  # fmt: skip
        with pytest.raises(errors.KeyRefused, match=sentence):
            attempt()
    assert describe(address, **_right(keyring)).count == 300


def test_keys_for_a_node_without_keys(start_node: StartNode, keyring: Path) -> None:
    """A client with keys refuses a node without, and so does one with the user's own keys."""
    address = start_node(options=("--insecure",)).address
    with pytest.raises(errors.KeyRefused, match="started without --keys"):
        Loader(address, timeout_s=20, **_right(keyring))
    with pytest.raises(errors.KeyRefused, match=r"does not prove this user's key .*insecure=True"):
        Loader(address, timeout_s=20)
    assert len(status(address, insecure=True).workers) == 1


def test_a_relay_without_a_node_is_no_wrong_key(start_node: StartNode, keyring: Path) -> None:
    """A relay that closes connections, since its node is not there yet, is not mistaken for a wrong key."""
    relay = socket.create_server(("127.0.0.1", 0))
    port = relay.getsockname()[1]
    with ThreadPoolExecutor() as pool, relay:
        loading = pool.submit(lambda: Loader(f"tcp://127.0.0.1:{port}", timeout_s=20, **_right(keyring)))
        for _ in range(10):
            relay.accept()[0].close()
        relay.close()
        start_node(bind=f"tcp://127.0.0.1:{port}", options=("--keys", str(keyring / "ours")))
        with loading.result() as loader:
            assert sum(len(batch.labels) for batch in loader) == 300


def test_an_address_that_others_can_reach_needs_keys(dataset_dir: Path) -> None:
    """Binding all interfaces without keys is refused, and the error names the remedy."""
    command = [sys.executable, "-m", "loader_service", "start", "--data", str(dataset_dir), "--bind", "tcp://0.0.0.0:*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == errors.OptionError.exit_code
    assert "keygen" in done.stderr
    assert "--insecure" in done.stderr


def test_a_name_with_several_addresses_is_several_nodes(
    start_node: StartNode, monkeypatch: pytest.MonkeyPatch, eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    """A DNS name is looked up again during a run: a new node behind it is used, and the batches stay the same."""
    first = start_node(bind="tcp://127.0.0.1:*")
    port = first.address.rpartition(":")[2]
    second = start_node(bind=f"tcp://127.0.0.2:{port}")
    known = ["127.0.0.1"]
    real = socket.getaddrinfo

    def answer(host: str, port: int, **options: Any) -> Any:
        return (
            [entry for ip in known for entry in real(ip, port, **options)]
            if host == "pool.test"
            else real(host, port, **options)
        )

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    monkeypatch.setattr("loader_service.client.resolver.INTERVAL_S", 0.05)
    folder = own_keys()  # which nodes on loopback have; a name could stand for another machine, so its keys are named
    own: Any = {"server_key": folder / "node.key", "client_key": folder / "client.secret"}
    with Loader(first.address, epochs=3, timeout_s=20) as loader:
        undisturbed = [batch.images.tobytes() for batch in loader.all_epochs()]
    with Loader(f"tcp://pool.test:{port}", epochs=3, timeout_s=20, prefetch=1, **own) as loader:
        got = [next(loader.all_epochs()).images.tobytes()]
        known.append("127.0.0.2")
        eventually(lambda: bool(status(second.address).clients), "the second node is found")
        known.remove("127.0.0.1")
        first.process.kill()
        got += [batch.images.tobytes() for batch in loader.all_epochs()]
    assert got == undisturbed
    assert status(second.address).workers[0].slices > 0
