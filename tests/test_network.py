"""Two hosts, as network namespaces, with a link between them that is cut, loses packets, or is slow."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from loader_service.defaults import NODE_SILENT_S
from tools.chaos.account import EpochResult, results
from tools.chaos.journal import read_saved

ROOT = Path(__file__).parent.parent
TAP_LINK = ROOT.parent / "shared" / "recipes" / "tap-link.py"  # makes a slow link on kernels without netem
SEED = 7
WAIT_S = 40.0


def _eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds, without using a CPU that the other processes need."""
    clock, deadline = threading.Event(), time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        clock.wait(0.05)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT_S).stdout


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str

    def run(self, *command: str) -> str:
        """Run a command on this host, and return its output."""
        return _run("ip", "netns", "exec", self.name, *command)

    def start(self, *arguments: str, log: Path) -> subprocess.Popen[str]:
        """Start a module of this project on this host."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", *arguments]
        with log.open("a") as out:
            return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=out, text=True)


def _make_host(stack: ExitStack, name: str, address: str) -> Host:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here, or the names are in use: {made.stderr.strip()}")
    stack.callback(_run, "ip", "netns", "del", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")
    return Host(name, address)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Provide a node's host and a client's, with a link between them: a pair of ``veth`` devices."""
    with ExitStack() as stack:
        pair = [_make_host(stack, f"ls{os.getpid()}{end}", f"10.79.0.{1 + at}") for at, end in enumerate("ab")]
        try:
            near, far = (host.name for host in pair)
            _run(*f"ip -n {near} link add veth type veth peer name veth netns {far}".split())
            for host in pair:
                _run(*f"ip -n {host.name} addr add {host.address}/24 dev veth".split())
                _run(*f"ip -n {host.name} link set veth up".split())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"namespaces cannot be linked here: {error.stderr.strip()}")
        yield pair[0], pair[1]


@pytest.fixture
def slow_hosts() -> Iterator[tuple[Host, Host]]:
    """Provide two hosts with a delay of 10 ms each way and a loss of 1 %: a process forwards the packets."""
    if not TAP_LINK.exists():
        pytest.skip("tap-link.py is not installed")
    if not Path("/dev/net/tun").exists():
        pytest.skip("/dev/net/tun does not exist here")
    with ExitStack() as stack:
        pair = _make_host(stack, "fa", "10.78.0.1"), _make_host(stack, "fb", "10.78.0.2")  # tap-link's own names
        carrier = subprocess.Popen([sys.executable, str(TAP_LINK), "0.01", "0.01", "60"])
        stack.callback(carrier.wait)
        stack.callback(carrier.kill)
        yield pair


class Training:
    """A node on one host and an epoch loop on the other, with its progress and its result."""

    def __init__(self, hosts: tuple[Host, Host], data: Path, folder: Path) -> None:
        self._data, self._folder = data, folder
        here, there = hosts
        address = f"tcp://{here.address}:5555"
        options = ["--data", str(data), "--workers", "1", "--bind", address, "--insecure"]
        self._node = here.start("loader_service", "start", *options, log=folder / "node.log")
        assert self._node.stdout is not None
        assert self._node.stdout.readline().startswith("listening"), (folder / "node.log").read_text()
        self._client = there.start(
            "tools.chaos.client", address, "tcp", str(SEED), str(folder), log=folder / "client.log"
        )

    def batches(self) -> int:
        """Return the number of batches that the loop has received."""
        saved = read_saved(self._folder)
        return saved.lines if saved else 0

    def wait_for_more(self, batches: int = 5) -> None:
        """Wait until the loop has received more batches."""
        goal = self.batches() + batches
        _eventually(lambda: self.batches() >= goal or self._client.poll() is not None, f"{goal} batches")
        assert self._client.poll() is None, self.log()

    def log(self) -> str:
        """Return the client's log."""
        return (self._folder / "client.log").read_text()

    def finish(self) -> list[EpochResult]:
        """Let the loop finish its epoch, and compare all epochs with those of an undisturbed run."""
        self._client.send_signal(signal.SIGTERM)
        self._client.communicate(timeout=WAIT_S)
        assert self._client.returncode == 0, self.log()
        self._node.terminate()
        self._node.communicate(timeout=WAIT_S)
        return results(self._data, SEED, self._folder)

    def close(self) -> None:
        """Kill the node and the loop."""
        for process in (self._client, self._node):
            process.kill()
            process.communicate()


@pytest.fixture
def train(dataset_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Provide ``train(hosts)``, which starts a node and an epoch loop that reads from it."""
    with ExitStack() as stack:

        def start(hosts: tuple[Host, Host]) -> Training:
            training = Training(hosts, dataset_dir, tmp_path)
            stack.callback(training.close)
            return training

        yield start


def test_a_cut_cable_costs_nothing(hosts: tuple[Host, Host], train: Callable[..., Training]) -> None:
    """A link that is down for longer than a connection survives costs nothing: each id once, the same bytes."""
    training = train(hosts)
    training.wait_for_more()
    hosts[0].run("ip", "link", "set", "veth", "down")
    _eventually(lambda: "is lost" in training.log(), f"the client declares the node lost within {NODE_SILENT_S:.0f} s")
    hosts[0].run("ip", "link", "set", "veth", "up")
    training.wait_for_more(20)
    epochs = training.finish()
    assert all(epoch.flawless for epoch in epochs)
    assert sum(epoch.account.reassigned for epoch in epochs) > 0


def test_dropped_packets_cost_nothing(hosts: tuple[Host, Host], train: Callable[..., Training]) -> None:
    """A loss of 10 % of the packets at either end costs nothing: each id once, the same bytes."""
    if shutil.which("iptables") is None:
        pytest.skip("iptables, which drops the packets, is not installed")
    rule = ["INPUT", "-i", "veth", "-m", "statistic", "--mode", "random", "--probability", "0.1", "-j", "DROP"]
    for host in hosts:
        try:
            host.run("iptables", "-A", *rule)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"iptables cannot drop packets at random here: {error.stderr.strip()}")
    training = train(hosts)
    training.wait_for_more(20)
    assert all(epoch.flawless for epoch in training.finish())
    for host in hosts:
        table = host.run("iptables", "-nvxL", "INPUT").splitlines()
        assert int(table[2].split()[0]) > 0  # packets that matched the rule


def test_a_slow_link_that_loses_packets_costs_nothing(
    slow_hosts: tuple[Host, Host], train: Callable[..., Training]
) -> None:
    """A round trip of 20 ms and a loss of 1 % cost nothing: each id once, the same bytes."""
    here, there = slow_hosts

    def reachable() -> bool:
        return "10.78.0.2" in there.run("ip", "addr") and "10.78.0.1" in here.run("ip", "addr")

    _eventually(reachable, "the link is up")
    training = train(slow_hosts)
    training.wait_for_more(10)
    assert all(epoch.flawless for epoch in training.finish())
