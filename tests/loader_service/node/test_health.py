"""Every check of a machine, with a result of each kind."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from loader_service.node import health
from loader_service.node.health import CheckState
from loader_service.wire.auth import generate

LOCAL = "tcp://127.0.0.1:5555"


def test_a_dataset(dataset_dir: Path, tmp_path: Path) -> None:
    """A sound dataset is reported with its records, a missing one with a remedy."""
    assert health.check_dataset(dataset_dir).state is CheckState.OK
    assert "train (300 records), val (60 records)" in health.check_dataset(dataset_dir).found
    missing = health.check_dataset(tmp_path)
    assert missing.state is CheckState.FAILED
    assert "make preprocess" in missing.found


def test_samples(other_decoder: None) -> None:
    """An installation that makes other samples fails the check, which lists the versions of its libraries."""
    check = health.check_samples()
    assert check.state is CheckState.FAILED
    assert f"with numpy {np.__version__}, simplejpeg {simplejpeg.__version__}" in check.found


def test_samples_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that cannot decode the built-in images fails the check."""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such thing as a JPEG")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    check = health.check_samples()
    assert (check.state, "a built-in image cannot be decoded" in check.found) == (CheckState.FAILED, True)


def test_more_workers_than_processors() -> None:
    """One worker passes on any machine; 10,000 give a warning with a better number."""
    assert health.check_cpus(1).state is CheckState.OK
    many = health.check_cpus(10_000)
    assert many.state is CheckState.WARNING
    assert many.remedy.endswith(f"--workers {int(health.available_cpus())}")


def test_a_cgroups_quota_counts(tmp_path: Path) -> None:
    """A CPU quota of a cgroup limits the CPUs: of versions 1 and 2, at the root and in the own group."""
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("1:cpu:/x\n0::/box\n")
    (root / "box").mkdir(parents=True)
    whole = health.available_cpus(root, membership)
    assert whole == len(os.sched_getaffinity(0))
    (root / "cpu.max").write_text("max 100000\n")
    assert health.available_cpus(root, membership) == whole
    (root / "box" / "cpu.max").write_text("50000 100000\n")
    assert health.available_cpus(root, membership) == 0.5
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cpus in (("-1\n", 0.5), ("25000\n", 0.25)):
        (root / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert health.available_cpus(root, membership) == cpus


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one loader passes, 64 MiB (the default of a container) give a warning, and a missing directory fails."""
    for free_mib, state in ((111, CheckState.OK), (64, CheckState.WARNING)):
        usage = type("Usage", (), {"free": free_mib * 2**20})
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        check = health.check_shared_memory(tmp_path)
        assert check.state is state
        assert ("--shm-size" in check.remedy) == (state is CheckState.WARNING)
    monkeypatch.undo()
    assert health.check_shared_memory(tmp_path / "nowhere").state is CheckState.FAILED


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hard limit, to which a node raises its own, must allow four files per worker and some for clients."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 256))
    assert health.check_descriptors(32).state is CheckState.OK
    few = health.check_descriptors(33)
    assert (few.state, few.remedy) == (CheckState.FAILED, "raise the limit: ulimit -n 260")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert health.check_descriptors(33).state is CheckState.OK


def test_keys(tmp_path: Path) -> None:
    """Keys are optional on loopback and required elsewhere, and only their owner may read them."""
    assert health.check_keys(None, LOCAL).state is CheckState.OK
    assert health.check_keys(None, "tcp://0.0.0.0:5555").state is CheckState.FAILED
    assert health.check_keys(None, "nonsense").state is CheckState.FAILED
    generate(tmp_path / "keys")
    assert health.check_keys(tmp_path / "keys", "tcp://0.0.0.0:5555").state is CheckState.OK
    (tmp_path / "keys" / "node.secret").chmod(0o644)
    assert health.check_keys(tmp_path / "keys", LOCAL).state is CheckState.FAILED
    (tmp_path / "keys" / "node.secret").chmod(0o600)
    (tmp_path / "keys" / "allowed" / "client.key").unlink()
    assert health.check_keys(tmp_path / "keys", LOCAL).state is CheckState.FAILED


def test_an_address_that_is_taken(node_address: str) -> None:
    """A port in use fails the check; a free one passes and stays free."""
    assert health.check_address("tcp://127.0.0.1:*").state is CheckState.OK
    taken = health.check_address(node_address)
    assert taken.state is CheckState.FAILED
    assert f"loader-service status {node_address}" in taken.remedy


def test_read_only_shared_memory(run_with_own_shm: Callable[..., str]) -> None:
    """A read-only /dev/shm is found."""
    script = "from loader_service.node.health import check_shared_memory; print(check_shared_memory())"
    said = run_with_own_shm(script, mount="mount -t tmpfs -o ro,size=1g tmpfs /dev/shm")
    assert "FAILED" in said
    assert "/dev/shm cannot be written" in said
