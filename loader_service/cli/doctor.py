"""``loader-service doctor``: check that a node can run on this machine, and run well."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import click

from loader_service import defaults
from loader_service.cli.options import Command, option
from loader_service.data import kernel
from loader_service.errors import OptionError
from loader_service.node import health
from loader_service.node.health import Check, CheckState


@click.command(cls=Command)
@option("--data", type=click.Path(path_type=Path), default=defaults.DATA, help="Directory of train.lmdb and val.lmdb.")
@option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=defaults.WORKERS,
    show_default="one per CPU",
    help="Worker processes of the planned node.",
)
@option("--bind", default=defaults.ADDRESS, help="Address that the planned node listens on.")
@option(
    "--keys",
    type=click.Path(path_type=Path),
    show_default="the user's own, on a loopback address",
    help="Directory of the planned node's keys.",
)
def doctor(data: Path, workers: int, bind: str, keys: Path | None) -> None:
    """Check that a node can run on this machine.

    Prints one line per check: ok, warning or failed, with a remedy. The exit code is 1 if a check failed.
    """
    # From the installation to the dataset; a check that fails does not stop the others.
    checks = [
        check_pillow(),
        check_kernel(),
        health.check_samples(),
        health.check_cpus(workers),
        health.check_shared_memory(),
        health.check_descriptors(workers),
        health.check_keys(keys, bind),
        health.check_address(bind),
        health.check_dataset(data),
    ]
    for check in checks:
        remedy = f"; {check.remedy}" if check.remedy else ""
        click.echo(f"{check.state:8} {check.what}: {check.found.removesuffix('.')}{remedy}")
    if any(check.state is CheckState.FAILED for check in checks):
        click.get_current_context().exit(1)


def check_pillow() -> Check:
    """Check that the installed PIL is the reference build for preprocessing, and the only one."""
    versions = {}
    for name in ("pillow-simd", "pillow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = " and ".join(f"{name} {version}" for name, version in versions.items()) or "not installed"
    wanted = "pillow-simd" if platform.machine() == "x86_64" else "pillow"
    if versions.keys() == {wanted}:
        return Check("PIL", CheckState.OK, found)
    # Both packages install the module PIL: the one installed last wins, whatever the metadata says.
    remedy = f"other builds are slower and resize to other bytes: `make setup` installs {wanted} alone"
    return Check("PIL", CheckState.WARNING, found, remedy)


def check_kernel() -> Check:
    """Check that the kernel runs in its best form; report how far JPEGs are decoded."""
    what = "kernel"
    try:
        form = kernel.chosen()
    except OptionError as error:
        return Check(what, CheckState.FAILED, str(error), f"unset {kernel.VARIABLE}")
    best = kernel.FORMS[0]
    if form != best:
        return Check(what, CheckState.WARNING, f"{form}; this machine can run {best}", f"unset {kernel.VARIABLE}")
    if form == "numpy":
        remedy = "install a C compiler, then run `make clean setup`"
        return Check(what, CheckState.WARNING, "not compiled; NumPy is ten times slower", remedy)
    part = "only the part that a crop needs" if kernel.decodes_windows() else "whole images"
    return Check(what, CheckState.OK, f"{form}; JPEG decoding: {part}")
