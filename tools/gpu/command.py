"""The command that ``make gpu`` runs once this Python is prepared."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import click
import msgspec

from loader_service.cli.job import CONTEXT, Job
from tools.bench.report.document import machine as describe_host
from tools.errors import ToolFailed
from tools.gpu.measure import forms
from tools.gpu.parts import Name, Part, Settings, parts
from tools.gpu.probe import Probe
from tools.gpu.report import markdown
from tools.gpu.results import Machine, Results, load, save, write
from tools.gpu.runner import Runner, now
from tools.terminal import ROOT

DOCUMENT: Final = ROOT / "docs" / "gpu.md"
RESULTS: Final = ROOT / "docs" / "results" / "gpu.json"
FOLDER: Final = ROOT / "build" / "gpu"
PROBE_S: Final = 120.0

GIB_EACH: Final = 10
"""GPU memory that one training process may need at a batch of 512."""

TOGETHER_MAX: Final = 7
"""torchvision and the six bfloat16 forms."""

BATCHES: Final = (128, 512)


def probe() -> Probe:
    """Ask a process of its own about PyTorch and the GPUs.

    Raises:
        ToolFailed: PyTorch cannot be imported, or does not answer.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tools.gpu.probe"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ToolFailed(f"PyTorch did not answer within {PROBE_S:.0f} s.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gives no reason"])[-1]
        raise ToolFailed(f"PyTorch cannot be used: {last}.")
    return msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=Probe)


def check(found: Probe, dry: bool) -> None:
    """Make sure that there is a GPU, unless this is a dry run.

    Raises:
        ToolFailed: there is none that works.
    """
    if dry or found.gpus:
        return
    if not found.cuda:
        raise ToolFailed(
            f"PyTorch {found.torch} is a build without CUDA; name a Python whose PyTorch has it (PYTHON=python3), or run "
            "the same script on a CPU with --dry."
        )
    why = f" ({found.problem})" if found.problem else ""
    raise ToolFailed(f"PyTorch {found.torch} finds no GPU that works{why}; --dry runs the same script on a CPU.")


def settings_of(
    found: Probe, dry: bool, width: float, folder: Path, photographs: Path | None, cifar10: Path | None
) -> Settings:
    """Return the settings of a run on the machine that was found."""
    cores = os.cpu_count() or 1
    together = max(1, min(TOGETHER_MAX, int(found.memory_gib / GIB_EACH)))
    return Settings(
        dry=dry,
        device="cpu" if dry else "cuda:0",
        gpus=0 if dry else len(found.gpus),
        batches=(4,) if dry else BATCHES,
        width=0.05 if dry else width,
        rounds=1 if dry else 3,
        seconds=0.1 if dry else 2.0,
        folder=str(folder),
        records=300 if dry else 4096,
        workers=1 if dry else max(1, cores - 2),
        together=3 if dry else together,
        photographs=str(photographs.resolve()) if photographs else None,
        cifar10=str(cifar10.resolve()) if cifar10 else None,
        form=forms.SAFE,
    )


def begin(path: Path, host: Machine, dry: bool) -> Results:
    """Return the results to continue; those of another machine are kept under another name.

    Raises:
        ToolFailed: the file cannot be read or written.
    """
    results = load(path)
    if results is not None and (results.machine, results.dry) != (host, dry):
        kept = path.with_name(f"{path.stem}-{results.changed.replace(' ', '-').replace(':', '')}{path.suffix}")
        write(kept, path.read_bytes())
        click.echo(f"{path} has the results of another machine or PyTorch: kept as {kept.name}", err=True)
        results = None
    if results is None:
        results = Results(dry=dry, machine=host, started=now(), changed=now())
    save(path, results)
    return results


def choose(every: list[Part], words: str) -> list[Part]:
    """Return the parts that an option names.

    Raises:
        click.BadParameter: there is no such part.
    """
    wanted = {word.strip() for word in words.split(",") if word.strip()}
    if unknown := wanted - {part.name for part in every}:
        raise click.BadParameter(f"there is no part {min(unknown)!r}; there are {', '.join(Name)}")
    return [part for part in every if part.name in wanted]


@click.command("gpu", cls=Job, context_settings=CONTEXT)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Time of this call; the next one continues.")
@click.option("--dry", is_flag=True, help="Run the same script on a CPU with tiny sizes; the figures mean nothing.")
@click.option("--parts", "part_names", default=",".join(Name), show_default=True, help="Parts to run.")
@click.option("--again", default="", metavar="PART,...", help="Parts whose results are thrown away first.")
@click.option("--report", is_flag=True, help="Only write the document from the results.")
@click.option("--width", type=float, default=1.0, show_default=True, help="Width of the network.")
@click.option("--cifar10", type=click.Path(path_type=Path), help="Archive of train/CLASS/*.jpg and test/CLASS/*.jpg.")
@click.option(
    "--photographs",
    type=click.Path(exists=True, path_type=Path),
    help="Folder or archive of photographs that records are cut from.  [default: synthetic ones]",
)
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for data, logs and runs.  [default: build/gpu]")
@click.option(
    "--results", "path", type=click.Path(path_type=Path), help="File of the results.  [docs/results/gpu.json]"
)
@click.option("--document", type=click.Path(path_type=Path), help="Document to write.  [docs/gpu.md]")
def main(
    minutes: float | None,
    dry: bool,
    part_names: str,
    again: str,
    report: bool,
    width: float,
    cifar10: Path | None,
    photographs: Path | None,
    folder: Path | None,
    path: Path | None,
    document: Path | None,
) -> None:
    """Check and measure everything that needs a GPU; continue where the last call ended."""
    deadline_s = None if minutes is None else time.monotonic() + 60 * minutes
    # A dry run keeps away from the documents: its figures mean nothing.
    folder = (folder or (FOLDER / "dry" if dry else FOLDER)).resolve()
    path = path or (folder / "results.json" if dry else RESULTS)
    document = document or (folder / "gpu.md" if dry else DOCUMENT)
    if cifar10 is not None and not cifar10.is_file():
        click.echo(f"{cifar10} does not exist: CIFAR-10 is left out", err=True)
        cifar10 = None
    source = str(path.resolve().relative_to(ROOT)) if path.resolve().is_relative_to(ROOT) else path.name
    if report:
        write(document, markdown(load(path), source).encode())
        click.echo(f"wrote {document}")
        return
    found = probe()
    check(found, dry)
    settings = settings_of(found, dry, width, folder, photographs, cifar10)
    every = parts(settings)
    chosen, forgotten = choose(every, part_names), choose(every, again)
    gpus = () if dry else found.gpus
    host = Machine(gpus, found.memory_gib, found.torch, found.cuda, platform.python_version(), describe_host())
    results = begin(path, host, dry)
    results.parts = every
    for part in forgotten:
        results.forget(part.name)

    def changed() -> None:
        write(document, markdown(results, source).encode())

    runner = Runner(settings, results, path, deadline_s, changed)
    try:
        runner.run(chosen)
    finally:
        changed()
        left = len(runner.left(chosen))
        click.echo(f"wrote {document} and {path}", err=True)
        click.echo(f"{left} pieces are left: call again to continue" if left else "everything is measured", err=True)
