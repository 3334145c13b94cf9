"""The doctor prints one line per check and ends with a meaningful exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from loader_service.cli import main
from loader_service.cli.doctor import check_kernel, check_pillow
from loader_service.data import kernel


def test_a_sound_machine(dataset_dir: Path) -> None:
    """Every check prints one line with its state; without a failure the exit code is 0."""
    command = ["doctor", "--data", str(dataset_dir), "--workers", "1", "--bind", "tcp://127.0.0.1:*"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    lines = [line.split(maxsplit=1) for line in done.output.splitlines()]
    assert {state for state, _ in lines} <= {"ok", "warning"}
    checks = ["PIL", "kernel", "samples", "CPUs", "shared memory", "open files", "keys", "address", "dataset"]
    assert [rest.partition(":")[0] for _, rest in lines] == checks


def test_a_failed_check(tmp_path: Path) -> None:
    """A failed check's line starts with "failed", and the exit code is 1."""
    done = CliRunner().invoke(main, ["doctor", "--data", str(tmp_path), "--bind", "tcp://127.0.0.1:*"])
    assert done.exit_code == 1
    assert "failed   dataset: there is no dataset at" in done.output


@pytest.mark.parametrize(("name", "state"), [("numpy", "warning"), ("abacus", "failed")])
def test_the_kernel(name: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest kernel form is a warning; an unknown form is a failure."""
    monkeypatch.setenv(kernel.VARIABLE, name)
    kernel.chosen.cache_clear()
    try:
        assert check_kernel().state == state
    finally:
        monkeypatch.undo()
        kernel.chosen.cache_clear()


@pytest.mark.parametrize(("in_part", "said"), [(True, "only the part that a crop needs"), (False, "whole images")])
def test_the_kernel_line_reports_jpeg_decoding(in_part: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's line also reports whether workers decode JPEGs in part."""
    monkeypatch.setattr(kernel, "FORMS", ("avx2", "numpy"))
    monkeypatch.setattr(kernel, "chosen", lambda: "avx2")
    monkeypatch.setattr(kernel, "decodes_windows", lambda: in_part)
    assert check_kernel().found == f"avx2; JPEG decoding: {said}"


def test_two_pils(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock Pillow and pillow-simd installed together are a warning."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "12")
    assert (check_pillow().state, check_pillow().found) == ("warning", "pillow-simd 12 and pillow 12")
