"""Log lines have a JSON format for programs and a text format for people."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loader_service import status
from loader_service.cli import logs


@pytest.fixture(autouse=True)
def _root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A JSON line has time, level, logger, message and the caller's fields, and stays one line whatever the message."""
    logs.set_up("json", "info")
    log = logging.getLogger("loader_service.test")
    log.warning("worker %d\nis gone", 3, extra={"worker": 3, "path": Path("x")})
    log.debug("nobody sees this")
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert abs((datetime.fromisoformat(record.pop("time")) - datetime.now(UTC)).total_seconds()) < 60
    assert record == {
        "level": "warning",
        "logger": "loader_service.test",
        "message": "worker 3\nis gone",
        "fields": {"worker": 3, "path": "x"},
    }


def test_an_exception_is_part_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback stays within its JSON line."""
    logs.set_up("json", "info")
    try:
        raise ValueError("oh")
    except ValueError:
        logging.getLogger("loader_service.test").exception("broken")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: oh")


def test_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """A text line has time, logger and message; lines below the level are left out."""
    logs.set_up("text", "warning")
    log = logging.getLogger("loader_service.test")
    log.info("nobody sees this")
    log.warning("slow")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" loader_service.test: slow")


@pytest.mark.parametrize("style", logs.FORMATS)
def test_a_line_stays_a_line(capsys: pytest.CaptureFixture[str], style: str) -> None:
    """Text from another machine or a file neither begins a new line nor reaches the terminal as a command."""
    logs.set_up(style, "info")
    logging.getLogger("loader_service.test").warning("bad: %s", "\x1b[2J\x9b\u202e\n12:00:00 forged")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert "\\u001b[2J\\u009b\\u202e" in line


def test_a_node_that_logs_json(dataset_dir: Path) -> None:
    """Every log line of a node is a JSON object, and that of a worker's death names the worker in its fields."""
    command = [sys.executable, "-m", "loader_service", "start", "--data", str(dataset_dir), "--workers", "1"]
    command += ["--bind", "tcp://127.0.0.1:*", "--metrics", "127.0.0.1:0", "--log-format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as node:
        assert node.stderr is not None
        assert node.stdout is not None
        try:
            said: dict[str, str] = {}
            while not {"address", "url"} <= said.keys():
                said |= json.loads(node.stderr.readline())["fields"]
            with urllib.request.urlopen(said["url"], timeout=10) as answer:
                assert 'loader_service_node_workers{state="' in answer.read().decode()
            (worker,) = status(said["address"]).workers
            os.kill(worker.pid, signal.SIGKILL)
            death = json.loads(node.stderr.readline())
            assert (death["level"], death["fields"]["worker"], death["fields"]["pid"]) == ("warning", 0, worker.pid)
        finally:
            node.terminate()
        assert [json.loads(line)["logger"] for line in node.stderr] == []
        assert node.stdout.read() == ""
    assert node.returncode == 0
