"""``loader-service doctor``: whether a node would run here, and well."""

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
from loader_service.node.health import Check, State


@click.command(cls=Command)
@option("--data", type=click.Path(path_type=Path), default=defaults.DATA, help="Directory of train.lmdb and val.lmdb.")
@option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=defaults.WORKERS,
    show_default="one per CPU",
    help="Worker processes that the node is to have.",
)
@option("--bind", default=defaults.ADDRESS, help="Address that the node is to listen at.")
@option("--keys", type=click.Path(path_type=Path), help="Directory of the node's keys.")
def doctor(data: Path, workers: int, bind: str, keys: Path | None) -> None:
    """Tell whether a node would run here, and well: one line per check; exit code 1 if one has failed."""
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
    if any(check.state is State.FAILED for check in checks):
        click.get_current_context().exit(1)


def check_pillow() -> Check:
    """Whether PIL is the build that the house preprocesses with."""
    versions = {}
    for name in ("pillow-simd", "pillow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = " and ".join(f"{name} {version}" for name, version in versions.items()) or "no PIL is installed"
    wanted = "pillow-simd" if platform.machine() == "x86_64" else "pillow"
    if versions.keys() == {wanted}:
        return Check("PIL", State.OK, found)
    remedy = f"preprocess with {wanted} alone, since others resize more slowly and to other bytes: `make setup`"
    return Check("PIL", State.WARNING, found, remedy)


def check_kernel() -> Check:
    """Whether crop and jitter run compiled, with the processor's vector instructions, and how JPEGs are decoded."""
    what = "kernel"
    try:
        form = kernel.chosen()
    except OptionError as error:
        return Check(what, State.FAILED, str(error), f"unset {kernel.VARIABLE}")
    best = kernel.FORMS[0]
    if form != best:
        return Check(what, State.WARNING, f"{form}, where {best} could run", f"unset {kernel.VARIABLE}")
    if form == "numpy":
        return Check(
            what, State.WARNING, "plain NumPy, ten times slower", "install a C compiler, then `make clean setup`"
        )
    part = "as far as a crop needs" if kernel.decodes_windows() else "whole"
    return Check(what, State.OK, f"{form}; JPEGs are decoded {part}")
