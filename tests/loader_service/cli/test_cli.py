"""The command line prints what scripts and people need, and ends with meaningful exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loader_service.cli import main
from loader_service.prometheus import Exporter


def test_commands_are_listed_in_a_sensible_order() -> None:
    """--help lists the commands of nodes, then those of datasets, each with a whole summary."""
    lines = CliRunner().invoke(main, ["--help"]).output.partition("Commands:\n")[2].splitlines()
    names = ["start", "status", "top", "doctor", "keygen", "preprocess", "verify", "inspect", "export"]
    assert [line.split()[0] for line in lines] == list(main.commands) == names
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_starting_a_node_imports_no_dataset_command() -> None:
    """The entry point and `start` leave rich and the preprocessing modules out, which would slow down every start."""
    program = (
        "import sys, loader_service.cli as cli; cli.main.commands['start']; "
        "print([m for m in ('rich', 'loader_service.datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loader_service", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


def test_status_as_json(node_address: str) -> None:
    """The JSON has the fields that scripts rely on."""
    answer = json.loads(_run("status", node_address, "--json").stdout)
    assert {"instance", "workers", "clients", "reassigned", "restarts", "leases", "splits"} <= set(answer)
    assert [{"pid", "state"} <= set(worker) for worker in answer["workers"]] == [True, True]


def test_status_for_people(node_address: str) -> None:
    """The text shows the node and a table of its workers."""
    done = _run("status", node_address)
    assert done.returncode == 0
    assert "worker" in done.stdout
    assert "idle" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("status", "tcp://127.0.0.1:9", "--timeout", "0.2"), 4, "no node answered within 0.2 s at tcp://127.0.0.1:9"),
        (("status", "nonsense"), 4, "the address nonsense cannot be used"),
        (("start", "--data", "/nowhere"), 3, "there is no dataset at /nowhere"),
        (("start", "--workers", "0"), 2, "Invalid value for '--workers'"),
        (("strat",), 2, "No such command"),
    ],
    ids=str,
)
def test_errors_are_a_sentence_and_an_exit_code(arguments: tuple[str, ...], code: int, sentence: str) -> None:
    """A user's mistake gives one sentence and an exit code, never a traceback."""
    done = _run(*arguments)
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(node_address: str, dataset_dir: Path) -> None:
    """A second node on the same address names it and ends with the network's exit code."""
    done = _run("start", "--data", str(dataset_dir), "--bind", node_address)
    assert done.returncode == 4
    assert "cannot be bound" in done.stderr


def test_a_node_that_would_be_refused(other_decoder: None, dataset_dir: Path) -> None:
    """A node whose samples differ from those that clients demand does not start."""
    done = CliRunner().invoke(main, ["start", "--data", str(dataset_dir), "--bind", "tcp://127.0.0.1:*"])
    assert done.exit_code == 7
    assert "clients would refuse the samples" in done.stderr


def test_metrics_where_somebody_is(dataset_dir: Path) -> None:
    """A node that cannot serve its metrics reports the reason and does not start."""
    with Exporter("127.0.0.1:0", "node") as taken:
        address = taken.url.removeprefix("http://").removesuffix("/metrics")
        done = _run("start", "--data", str(dataset_dir), "--bind", "tcp://127.0.0.1:*", "--metrics", address)
    assert done.returncode == 4
    assert f"the address {address} cannot be used: metrics cannot be served there (Address already" in done.stderr
    assert "Traceback" not in done.stderr
