"""The study of CPU time per batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]


def profile(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "tools.bench.studies.profile", "--workers", "1", "--seconds", "0.5", *options]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)


def test_each_process_and_thread_has_a_line(dataset_dir: Path, tmp_path: Path) -> None:
    """The line has its microseconds per batch."""
    (tmp_path / "raw").symlink_to(dataset_dir)
    done = profile("--records", str(tmp_path), "--transport", "tcp")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^[\d,]+ images/s in batches of 128", done.stdout)
    for who in ("client, MainThread", "client, loader-service", "client, libzmq", "node, process"):
        assert re.search(rf"^ *[\d,]+  {who} \d+$", done.stdout, re.MULTILINE), done.stdout


def test_missing_records_are_one_sentence(tmp_path: Path) -> None:
    """The error names the command that makes them."""
    done = profile("--records", str(tmp_path))
    assert done.returncode == 1
    assert "make bench makes them" in done.stderr
    assert "Traceback" not in done.stderr
