"""Addresses: valid and invalid forms, and the errors of the invalid ones; and the memory of frames."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import zmq

from loader_service.errors import AddressError
from loader_service.wire import sockets


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:5555", "tcp://*:5555", "tcp://[::1]:5555", "ipc:///tmp/x", "tcp://host:*"]
)
def test_good_addresses_pass(address: str) -> None:
    """Every form in the documentation is accepted."""
    sockets.check_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "5555",
        "tcp://",
        "tcp://host",
        "tcp://host:port",
        "tcp://host:99999",
        "udp://h:1",
        "ipc://",
        "tcp://a..b:1",
        f"tcp://{'x' * 64}:1",
    ],
)
def test_bad_addresses_are_named(address: str) -> None:
    """The error names the address."""
    with pytest.raises(AddressError, match="cannot be used") as caught:
        sockets.check_address(address)
    assert caught.value.address == address


@pytest.mark.parametrize(
    ("address", "local"),
    [("ipc:///tmp/x", True), ("tcp://127.0.0.1:1", True), ("tcp://127.9.9.9:1", True), ("tcp://[::1]:1", True),
     ("tcp://localhost:1", True), ("tcp://*:1", False), ("tcp://0.0.0.0:1", False), ("tcp://10.0.0.1:1", False),
     ("tcp://node:1", False)],
)  # fmt: skip
def test_only_loopback_is_local(address: str, local: bool) -> None:
    """An address is local only if other machines cannot reach it."""
    assert sockets.is_local(address) is local


def test_a_port_in_use_is_an_address_error() -> None:
    """A bind to an address in use raises an error with the address and the reason."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    first, address = sockets.bind_node(context, "tcp://127.0.0.1:*")
    try:
        with pytest.raises(AddressError, match="Address already in use"):
            sockets.bind_node(context, address)
    finally:
        first.close()
        context.term()


_FRAMES_COME_AND_GO = """
import resource, sys
import numpy as np
from loader_service.wire import sockets

if sys.argv[1] == "keep":
    sockets.keep_freed_frames()
for turn in range(20):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    frames = [np.ones(1 << 21, np.uint8) for _ in range(8)]
    del frames
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's malloc returns the memory of frames to the kernel"
)
def test_memory_of_frames_is_used_again() -> None:
    """After keep_freed_frames, new frames reuse the pages of freed ones; without it, they fault them in again."""
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", _FRAMES_COME_AND_GO, mode], timeout=60))
        for mode in ("keep", "leave")
    }
    assert faults["keep"] < 100 < 1000 < faults["leave"]
