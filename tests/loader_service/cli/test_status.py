"""`status` and `top` show a node's state, its rates and its bottleneck."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
from click.testing import CliRunner

from loader_service import Loader
from loader_service.cli import main
from loader_service.wire import messages


def test_rates_and_the_bottleneck_as_json(node_address: str) -> None:
    """The JSON has the node's answer, its rates per second, and one word for the bottleneck."""
    done = CliRunner().invoke(main, ["status", node_address, "--json", "--interval", "0.1"])
    answer = json.loads(done.output)
    assert answer["rates"]["interval_s"] > 0.09
    assert len(answer["rates"]["workers"]) == len(answer["workers"]) == 2
    assert answer["rates"]["bottleneck"]["what"] == "idle"


def test_a_slow_trainer_is_named(node_address: str) -> None:
    """If a client has all the batches it wants and asks for no more, the bottleneck is the trainer."""
    with Loader(node_address, batch_size=32, epochs=100, timeout_s=20) as loader:
        next(loader.all_epochs())
        done = CliRunner().invoke(main, ["status", node_address, "--interval", "0.3"])
    assert re.search(r"^bottleneck: trainer \(.+\)$", done.output, re.MULTILINE), done.output
    assert re.search(r"│ \S+:\d+ +│ shm +│", done.output), done.output


def _read_until(terminal: int, wanted: str) -> str:
    """Return what a program writes to its terminal, up to and including ``wanted``."""
    got = b""
    while wanted not in got.decode(errors="replace"):
        assert select.select([terminal], [], [], 20)[0], got.decode(errors="replace")
        got += os.read(terminal, 65536)
    return got.decode(errors="replace")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_top_ends_on_a_signal(node_address: str, number: signal.Signals) -> None:
    """`top` keeps showing the node, ends with 0 at Ctrl-C or SIGTERM, and shows the cursor again."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "loader_service", "top", node_address, "--interval", "0.1"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        _read_until(ours, "bottleneck: idle")
        _read_until(ours, "bottleneck: idle")
        process.send_signal(number)
        said = _read_until(ours, "\x1b[?25h")
        assert process.wait(20) == 0
    os.close(ours)
    assert "Traceback" not in said


def test_top_continues_without_its_node(start_node: Callable[..., Any]) -> None:
    """While the node is away, `top` keeps the last screen and adds a line that says so."""
    node = start_node()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "loader_service", "top", node.address, "--interval", "0.1", "--timeout", "0.2"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        _read_until(ours, "bottleneck: idle")
        node.stop()
        _read_until(ours, "no node answered")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    os.close(ours)


def test_top_without_a_node() -> None:
    """A missing node at the start is an error, for `top` as for `status`."""
    done = CliRunner().invoke(main, ["top", "tcp://127.0.0.1:9", "--timeout", "0.2"])
    assert done.exit_code == 4
    assert "no node answered within 0.2 s" in done.output


def test_ctrl_c_while_it_waits() -> None:
    """Ctrl-C while `status` waits for an answer ends it with exit code 130 and without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "loader_service", "status", address, "--timeout", "60"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            silent.settimeout(20)
            silent.accept()[0].close()  # it has begun to ask
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said


NASTY = "[red]x[/red]\x1b]0;owned\x07\x9b2J\u202egnp.exe\nnode 00000000"
"""Markup, escape sequences of 7 and 8 bits, a reversal of direction, and a forged line."""
HARMLESS = r"[red]x[/red]\u001b]0;owned\u0007\u009b2J\u202egnp.exe\u000anode 00000000"


@pytest.mark.parametrize("options", [["--interval", "0"], ["--json", "--interval", "0"]], ids=["text", "json"])
def test_names_of_clients_cannot_change_the_terminal(
    start_node: Callable[..., Any], tmp_path: Path, options: list[str]
) -> None:
    """A client's name is shown with its markup as it is and its control characters escaped; JSON still means the same."""
    node = start_node(bind=f"ipc://{tmp_path}/node")
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    try:
        dealer.connect(node.address)
        dealer.send(messages.encode(messages.Hello(messages.PROTOCOL, NASTY)))
        assert dealer.poll(20_000)
        said = CliRunner().invoke(main, ["status", node.address, *options], env={"COLUMNS": "200"}).output
    finally:
        dealer.close()
        context.term()
    assert all(line.isprintable() for line in said.splitlines())
    if "--json" in options:
        assert json.loads(said)["clients"][0]["name"] == NASTY
    else:
        assert HARMLESS in said
