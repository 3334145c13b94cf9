"""Tests of rank and world size: found where a framework states them, and a warning or an error where all would get the same."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loader_service import Loader, errors


@pytest.fixture
def one_of_one(tmp_path: Path) -> Any:
    """``one_of_one()`` initialises torch.distributed with this process alone."""

    def start() -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)

    yield start
    torch.distributed.destroy_process_group()


@pytest.fixture
def process_1_of_2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``process_1_of_2()`` lets a JAX that is imported say that it is process 1 of 2."""

    def start() -> None:
        says = SimpleNamespace(distributed=SimpleNamespace(is_initialized=lambda: True), process_index=lambda: 1, process_count=lambda: 2)  # fmt: skip
        monkeypatch.setitem(sys.modules, "jax", says)

    return start


def test_auto_takes_the_process_groups_ranks(node_address: str, one_of_one: Any, monkeypatch: Any) -> None:
    """torch.distributed, when initialised, counts more than the environment variables."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Loader(node_address, rank="auto", timeout_s=20) as loader:
        assert (loader.rank, loader.world_size) == (1, 2)
    one_of_one()
    with Loader(node_address, rank="auto", timeout_s=20) as loader:
        assert (loader.rank, loader.world_size) == (0, 1)


def test_auto_takes_jaxs_processes(node_address: str, process_1_of_2: Any) -> None:
    """JAX's process index and count are a rank and a world size."""
    process_1_of_2()
    with Loader(node_address, rank="auto", timeout_s=20) as loader:
        assert (loader.rank, loader.world_size) == (1, 2)


def test_auto_before_the_ranks_are_known_is_refused(node_address: str, process_1_of_2: Any) -> None:
    """A Loader that was rank 0 of 1 when a framework starts its processes delivers nothing, and says when to open it."""
    with Loader(node_address, rank="auto", timeout_s=20) as loader:
        process_1_of_2()
        with pytest.raises(errors.OptionError, match="opened as rank 0 of 1, and this process is now rank 1 of 2"):
            next(iter(loader))


def test_ranks_that_appear_after_opening_are_warned_of(node_address: str, process_1_of_2: Any, caplog: Any) -> None:
    """A Loader without a rank says that all ranks get the same data; one with rank 0 of 1 is meant so, and says nothing."""
    for options, warnings in (({}, 1), ({"rank": 0, "world_size": 1}, 0)):
        caplog.clear()
        with (
            Loader(node_address, timeout_s=20, **options) as loader,
            caplog.at_level(logging.WARNING, "loader_service"),
        ):
            assert caplog.messages == []
            process_1_of_2()
            next(iter(loader))
            assert [message.startswith("this process is rank 1 of 2") for message in caplog.messages] == [
                True
            ] * warnings
        sys.modules.pop("jax")
