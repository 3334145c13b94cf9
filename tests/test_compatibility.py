"""Compatibility with version 0.1.0: its files load, and its command lines, exit codes and names are still there.

``fixtures/version-0.1.tar.xz`` was written by version 0.1.0: ``data``, ``raw`` and ``centered`` (preprocessed at side 80
from 30 pictures, 24 for training, with the codecs jpeg, raw and centered), ``loader-state.json`` (a Loader's state after
two batches of 5 at seed 9) and ``run``, made with RUN_OPTIONS and stopped by SIGTERM after step 4, in its second epoch.
Tests reach the project through command lines and the public package alone, so that files can move beneath them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import click
import pytest
import xxhash

import loader_service.errors
import trainer.errors
from loader_service import Loader, LocalNode, status
from loader_service.cli import main as loader_service_main
from trainer.cli import main as trainer_main

ROOT = Path(__file__).parent.parent
ARCHIVE = Path(__file__).parent / "fixtures" / "version-0.1.tar.xz"
RUN_OPTIONS = [
    "--width",
    "0.02",
    "--epochs",
    "3",
    "--batch-size",
    "8",
    "--devices",
    "cpu",
    "--seed",
    "3",
    "--schedule",
    "step",
    "--drop-at",
    "1,2",
    "--no-jitter",
    "--log-every",
    "1",
    "--checkpoint-every",
    "3",
]

FINGERPRINTS = {
    "data/train.lmdb": "c22f646c504eecfd74fe97f42a156c17",
    "data/val.lmdb": "f18d68c1e2c06b3a1aa9c827e7ed8302",
    "raw/val.lmdb": "c4ddced0d6b3708210e85469160a7550",
    "centered/train.lmdb": "0b95ca780dc84823b5fa465b73fee903",
}

COMMANDS = {
    "loader-service doctor": "--bind --config --data --keys --workers",
    "loader-service keygen": "--config DIRECTORY",
    "loader-service start": "--bind --config --data --insecure --io-threads --keys --log-format --log-level --metrics "
    "--parent --quiet --workers",
    "loader-service status": "--client-key --config --interval --json --server-key --timeout ADDRESS",
    "loader-service top": "--client-key --config --interval --server-key --timeout ADDRESS",
    "trainer evaluate": "--batch-size --classes --client-key --data --devices --figure --json --loader --server-key "
    "--timeout --views --workers RUNS",
    "trainer export": "RUN TARGET",
    "trainer predict": "--devices --json IMAGES RUN",
    "trainer run": "--activation --amp --batch-size --channels-last --checkpoint-every --client-key --compile --crop "
    "--crops --cuda-graphs --data --deterministic --devices --drop-at --dropout --epochs --flips --fused-norm "
    "--fused-sgd --jitter --loader --log-every --lr --lrn --no-channels-last --no-compile --no-crops --no-cuda-graphs "
    "--no-dropout --no-flips --no-fused-norm --no-fused-sgd --no-jitter --no-lrn --patience --peak-tflops --pooling "
    "--preset --resume --run --schedule --seed --server-key --timeout --towers --warmup --width --without --workers",
    "trainer set-lr": "RATE RUN",
}
"""Every command with its options and arguments; later versions may add to them."""

TOOLS = {
    "preprocess": "--classes --codec --dry-run --file-timeout --json --layout --max-bad --quality --replace --seed "
    "--size --val --val-fraction --val-list --workers",
    "verify": "",
    "inspect": "--json --pictures",
    "export": "--format",
}
"""``python -m tools.NAME`` with its options."""

EXIT_CODES = {
    loader_service.errors: "AddressError 4, DatasetError 3, DatasetInvalid 3, DatasetNotFound 3, DatasetUnfinished 3, "
    "KeyFileError 4, KeyRefused 4, LinkError 4, LoaderServiceError 1, MessageError 4, NoNodeError 4, NodeFailed 7, "
    "NodeRefused 4, OptionError 2, PictureError 3, RecordError 3, SharedMemoryError 5, SlotsHeld 5, StateError 6, "
    "TooManyBadRecords 3",
    trainer.errors: "CheckpointError 3, ConfigError 2, DeviceError 5, PeerLost 9, RunFolderError 3, TrainerError 1, "
    "TrainingDiverged 8",
}

NODE_METRICS = [
    "uptime_seconds",
    "samples_total",
    "delivered_bytes_total",
    "clients",
    "workers",
    "queued_requests",
    "leases",
    "send_slots",
    "send_slots_used",
    "stage_seconds_total",
    "busy_seconds_total",
    "restarts_total",
    "reassigned_total",
    "bad_samples_total",
    "refused_messages_total",
]

STATUS_FIELDS = [
    "t",
    "protocol",
    "instance",
    "version",
    "address",
    "uptime_s",
    "memory_ceiling_bytes",
    "splits",
    "workers",
    "clients",
    "leases",
    "reassigned",
    "restarts",
    "refused",
    "queued",
    "samples",
    "delivered_bytes",
    "bad_samples",
    "send_slots",
    "send_slots_used",
    "send_s",
    "rates",
]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what version 0.1.0 wrote; not to be changed."""
    folder = tmp_path_factory.mktemp("version-0.1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def old_node(old: Path) -> Any:
    """The address of a node that serves the old datasets."""
    with LocalNode(old / "data", workers=1) as node:
        yield node.address


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command's output, run with one thread."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=environ, capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_dataset_is_sound_and_has_its_fingerprint(old: Path, name: str) -> None:
    """Each codec's records and manifest are read; the last line of ``verify`` is the fingerprint of old."""
    done = run("tools.verify", str(old / name), cwd=ROOT)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, FINGERPRINTS[name]), done.stderr


def test_a_loader_state_goes_on_with_the_same_bytes(old: Path, old_node: str) -> None:
    """The state names the third batch, and that batch has the pixels, labels and draws it always had."""
    with Loader(old_node, batch_size=5, seed=9, epochs=2, timeout_s=20) as loader:
        loader.load_state_dict(json.loads((old / "loader-state.json").read_text()))
        batch = next(iter(loader))
    assert (batch.epoch, batch.start) == (0, 10)
    arrays = (batch.images, batch.labels, batch.ids, batch.sources, batch.draws)
    assert (
        xxhash.xxh3_128_hexdigest(b"".join(array.tobytes() for array in arrays)) == "542b413b97a78a989e918264c0b28317"
    )


def test_a_run_is_resumed_evaluated_and_read(old: Path, old_node: str, tmp_path: Path) -> None:
    """The same command continues the old run to its end: same log, same ledger, and the network answers."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in (old / "run").rglob("*"):
        target = folder / path.relative_to(old / "run")
        target.mkdir(exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    before = (folder / "log.jsonl").read_text()
    done = run("trainer", "run", "--loader", old_node, "--run", str(folder), *RUN_OPTIONS, "--resume", "auto", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    log = (folder / "log.jsonl").read_text()
    assert log.startswith(before)
    assert [json.loads(line)["step"] for line in log.splitlines() if '"event":"step"' in line] == list(range(1, 10))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert [(row["expected"], row["delivered"]) for row in summary["ledger"]] == [(24, 24)] * 3
    config = json.loads((folder / "config.json").read_text())
    assert config["config"].keys() >= json.loads((old / "run" / "config.json").read_text())["config"].keys()
    assert config["config"]["variation"]["jitter"] is False
    done = run("trainer", "evaluate", str(old / "run"), "--loader", old_node, "--devices", "cpu", "--json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == 6


def parameters(command: click.Command) -> set[str]:
    """The flags and arguments of a command."""
    found = set[str]()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            found |= {*parameter.opts, *parameter.secondary_opts}
        else:
            found.add(str(parameter.name).upper())
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_that_it_had(name: str) -> None:
    """Scripts written for 0.1.0 run: no command, option or argument of it is gone."""
    program, command = name.split()
    group = {"loader-service": loader_service_main, "trainer": trainer_main}[program]
    assert set(COMMANDS[name].split()) - parameters(group.commands[command]) == set()


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_has_the_options_that_it_had(name: str) -> None:
    """``python -m tools.NAME`` stays an entry, with every option it had."""
    done = run(f"tools.{name}", "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(TOOLS[name].split()) - set(re.findall(r"--[a-z-]+", done.stdout)) == set()


@pytest.mark.parametrize("module", EXIT_CODES, ids=lambda module: module.__name__)
def test_an_error_has_the_exit_code_that_it_had(module: Any) -> None:
    """Each public error class is there by its name, with its exit code."""
    wanted = dict(entry.split() for entry in EXIT_CODES[module].split(", "))
    assert {name: str(getattr(module, name).exit_code) for name in wanted} == wanted


def test_metrics_have_the_names_that_they_had(old: Path) -> None:
    """Dashboards made for 0.1.0 find every metric of a node."""
    command = [sys.executable, "-m", "loader_service", "start", "--data", str(old / "data"), "--workers", "1"]
    command += ["--bind", "tcp://127.0.0.1:*", "--metrics", "127.0.0.1:0", "--log-format", "json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = next(row["fields"]["url"] for line in process.stderr if "url" in (row := json.loads(line))["fields"])
            with urllib.request.urlopen(url, timeout=10) as answer:
                shown = set(re.findall(r"^loader_service_node_(\w+)", answer.read().decode(), re.MULTILINE))
        finally:
            process.terminate()
    assert set(NODE_METRICS) - shown == set()


def test_a_status_has_the_fields_that_it_had(old_node: str) -> None:
    """``loader-service status --json`` gives scripts every field that it gave them."""
    done = run("loader_service", "status", old_node, "--json", "--interval", "0", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert set(STATUS_FIELDS) - json.loads(done.stdout).keys() == set()
    assert status(old_node).protocol
