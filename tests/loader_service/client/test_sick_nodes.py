"""A node that fails every slice, beside a healthy one and alone, with real nodes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from loader_service import Loader, LocalNode, errors, status

# While FLAG exists, each slice fails at once, as on a node whose disk is gone.
SICK = """
import sys
from pathlib import Path
import loader_service.node.worker as worker
from loader_service.cli import main
flag, true = Path(sys.argv.pop(1)), worker.fill
def fill(*slice):
    if flag.exists():
        raise ValueError("the disk is gone")
    true(*slice)
worker.fill = fill
main(prog_name="loader-service")
"""


def _node(data: Path, flag: Path) -> LocalNode:
    return LocalNode(data, workers=1, program=(sys.executable, "-c", SICK, str(flag)))


def test_a_sick_node_costs_nothing_and_comes_back(
    dataset_dir: Path, tmp_path: Path, node_address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The healthy node makes everything, each sample once; the other is asked again, and serves when it is well."""
    flag = tmp_path / "sick"
    flag.touch()
    with _node(dataset_dir, flag) as sick, caplog.at_level(logging.INFO, "loader_service.client"):
        with Loader(node_address, seed=5, timeout_s=20) as loader:
            expected = [batch.images.tobytes() for batch in loader]
        with Loader(f"{sick.address},{node_address}", seed=5, timeout_s=20, epochs=100_000) as loader:
            batches = loader.all_epochs()
            got = [next(batches).images.tobytes() for _ in expected]
            assert got == expected
            assert loader.ledger[0].delivered == loader.ledger[0].expected == 300
            for _ in batches:  # the healthy node may have made all of that before the other was connected
                if (
                    f"node {sick.address} is not asked for 1 s, since slices fail there: the disk is gone"
                    in caplog.text
                ):
                    break
            made = {worker.slices for worker in status(sick.address).workers}
            assert made == {0}
            flag.unlink()
            for _ in batches:
                if f"node {sick.address} serves again" in caplog.text:
                    break
            assert status(sick.address).workers[0].slices > 0


def test_sick_nodes_alone_end_the_run_with_their_reasons(
    dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a run whose slice every node has failed often enough has the reason of each node."""
    for pause in ("FIRST_PAUSE_S", "MAX_PAUSE_S"):  # the pauses have a test without clocks
        monkeypatch.setattr(f"loader_service.client.protocol.{pause}", 0.02)
    flag = tmp_path / "sick"
    flag.touch()
    with (
        _node(dataset_dir, flag) as one,
        _node(dataset_dir, flag) as two,
        Loader(f"{one.address},{two.address}", timeout_s=60) as loader,
        pytest.raises(errors.NodeFailed) as caught,
    ):
        next(loader.all_epochs())
    for address in (one.address, two.address):
        assert f"at {address}: the disk is gone" in str(caught.value)
