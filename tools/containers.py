"""`make docker` and `make docker-scale`: the system as containers, really run.

Rules of this file:

- Everything is done by `docker compose` with docker/compose.yaml, and each command is printed before it runs.
- It works in a project of its own, so nobody's volumes or containers are touched; whatever ends it (its end, a failed
  step, Ctrl-C, SIGTERM) also removes that project's containers, networks and volumes. Images stay.
- ``build`` and the other commands are two, because an engine may have the network for the one and not for the other.
- Nothing waits for a time to pass: the trainer's own lines say when it is in the middle of an epoch.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Self

import click
import msgspec

from tools.command import CONTEXT, Command, ToolFailed
from tools.demo import ROOT, Evaluation, Summary, check, read, say

FILE: Final = Path("docker/compose.yaml")
PROJECT: Final = "loader-service-demo"
RUNS: Final = Path("build/containers")
"""Where a run's folder is copied to before its volume is removed."""

TRAINER: Final = "trainer-cpu"
BUILT: Final = ("keys", "preprocess", TRAINER)
"""The services that build the images: the loader's, the same with photographs, and the trainer's."""

WHEELS_PORT: Final = 8998
"""Always the same one: it becomes part of a build argument, and another argument would make every layer again."""

TRAINING: Final = ("--width", "0.25", "--batch-size", "32", "--epochs")
"""As in `make demo`, but for fewer epochs: enough to be far from chance, or to lose a node and win another."""

_MIDDLE: Final = re.compile(r"epoch \d+/\d+  ")
"""What the trainer's lines begin with while it is in the middle of an epoch."""


class Client(msgspec.Struct):
    """What is used of a client in `loader-service status --json`."""

    transport: str


class Worker(msgspec.Struct):
    """What is used of a worker in `loader-service status --json`."""

    samples: int


class Status(msgspec.Struct):
    """What is used of `loader-service status --json`."""

    clients: list[Client]
    workers: list[Worker]


class Compose:
    """A Compose project of docker/compose.yaml; a context manager that leaves nothing of it behind.

    Args:
        variables: for docker/compose.yaml, beside those that are set already; see docker/.env.example.
    """

    def __init__(self, **variables: str) -> None:
        self._environ = {**os.environ, **variables}
        docker = ["docker", "compose"] if _succeeds("docker", "compose", "version") else ["docker-compose"]
        if not _succeeds(*docker, "version"):
            raise ToolFailed("neither `docker compose` nor `docker-compose` runs here: install Docker with Compose.")
        if not _succeeds("docker", "version"):
            raise ToolFailed("no Docker engine answers: start one, or set DOCKER_HOST to where it is.")
        self._command = [*docker, "--file", str(FILE), "--project-name", PROJECT, "--profile", "cpu"]

    def __enter__(self) -> Self:
        self._down()  # what a run that was killed has left
        return self

    def __exit__(self, *_: object) -> None:
        self._down()

    def run(self, *arguments: str) -> None:
        """Run one subcommand, whose output goes to the terminal."""
        self._finish([*self._command, *arguments])

    def ask(self, *arguments: str) -> str:
        """Run one subcommand and return what it prints."""
        return self._finish([*self._command, *arguments], stdout=subprocess.PIPE)

    def follow(self, service: str) -> Iterator[str]:
        """The lines that a service prints, passed on as they come, until its container has ended; its failure is ours."""
        command = [*self._command, "logs", "--follow", "--no-log-prefix", service]
        with self._started(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.rstrip())
                yield line
        code = self.ask("ps", "--all", "--format", "{{.ExitCode}}", service).strip()
        if code != "0":
            raise ToolFailed(f"the service {service} ended with exit code {code}; its lines are above.")

    def indices(self, service: str) -> set[int]:
        """The numbers of a service's running containers."""
        names = self.ask("ps", "--format", "{{.Name}}", service).split()
        return {int(name.rpartition("-")[2]) for name in names}

    def freeze(self, service: str, index: int) -> None:
        """Stop all processes of a container where they are."""
        self._finish(["docker", "pause", f"{PROJECT}-{service}-{index}"])

    def destroy(self, service: str, index: int) -> None:
        """Kill a container by SIGKILL, and take it away."""
        self._finish(["docker", "rm", "--force", f"{PROJECT}-{service}-{index}"])

    def status(self, index: int) -> Status:
        """How a loader is, as its own container sees it."""
        command = ("exec", "-T", "--index", str(index), "loader", "loader-service", "status", "--json")
        return read(self.ask(*command), Status, "what `loader-service status --json` printed")

    def _finish(self, command: Sequence[str], **pipes: Any) -> str:
        with self._started(command, **pipes) as process:
            printed, _ = process.communicate()
        if process.returncode:
            raise ToolFailed(f"`{shlex.join(command)}` ended with exit code {process.returncode}.")
        return printed or ""

    @contextmanager
    def _started(self, command: Sequence[str], **pipes: Any) -> Iterator[subprocess.Popen[str]]:
        say(click.style(f"$ {shlex.join(command)}", fg="cyan"))
        with subprocess.Popen(command, cwd=ROOT, env=self._environ, text=True, **pipes) as process:
            try:
                yield process
            except BaseException:
                process.terminate()
                raise

    def _down(self) -> None:
        self.run("down", "--volumes", "--remove-orphans", "--timeout", "10")


def build() -> None:
    """The images, in the order in which each can use the layers of the one before."""
    with local_wheels() as variables:
        compose = Compose(**variables)
        for service in BUILT:
            started_s = time.monotonic()
            compose.run("build", service)
            say(f"{service}: built in {time.monotonic() - started_s:.0f} s")


@contextmanager
def local_wheels() -> Iterator[dict[str, str]]:
    """Serve the folder of wheels that PIP_FIND_LINKS names to builds, which cannot see it; yields Compose's variables."""
    folder = Path(os.environ.get("PIP_FIND_LINKS") or "-")
    if not folder.is_dir():
        yield {}
        return
    address = ("127.0.0.1", WHEELS_PORT)
    with ThreadingHTTPServer(address, partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {"PIP_FIND_LINKS": f"http://127.0.0.1:{WHEELS_PORT}/", "BUILD_NETWORK": "host"}
        if any(folder.glob("torch-*+cpu-*.whl")):
            variables["TORCH_CPU_INDEX"] = ""
        try:
            yield variables
        finally:
            server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def demo() -> None:
    """From sample images to evaluation, by containers that share memory."""
    started_s = time.monotonic()
    with Compose(TRAINER_OPTIONS=shlex.join([*TRAINING, "6"]), RUN="demo") as compose:
        heading("preprocess, keys, loader, trainer: each starts when those before it have done their part")
        compose.run("up", "--detach", TRAINER)
        for number in middles(compose):
            if number == 0:
                expect_transport(compose, "shm")
        heading("evaluation: ten crops of each validation image")
        evaluation = evaluate(compose, "demo")
        folder, summary = copy_run(compose, "demo")
    check(summary)
    accuracy = 1 - evaluation.top1_error
    heading(f"The demo took {time.monotonic() - started_s:.0f} s.")
    say(
        f"  accuracy      {accuracy:.1%} top-1 of {evaluation.images} validation images, ten crops; "
        f"chance is {summary.chance:.1%}\n"
        f"  speed         {summary.images_per_s:,.0f} images/s; the trainer waited for data "
        f"{summary.waiting_share:.1%} of the time\n"
        f"  exactly once  {account(summary)}\n"
        f"  the run       {folder}"
    )
    if accuracy <= summary.chance:
        raise ToolFailed("the network has learnt nothing.")


def scale() -> None:
    """Three loaders, of which one is killed in the middle of an epoch, and another is added; all by TCP."""
    apart = {"LOADER_IPC": "private", "TRAINER_IPC": "private"}
    held, added = 0, list[int]()
    with Compose(TRAINER_OPTIONS=shlex.join([*TRAINING, "3"]), RUN="scale", LOADER_WORKERS="1", **apart) as compose:
        heading("three loaders and a trainer with no memory in common, as if each were a host")
        compose.run("up", "--detach", "--scale", "loader=3", TRAINER)
        for number in middles(compose):
            if number == 0:
                expect_transport(compose, "tcp")
                heading("in the middle of an epoch a loader is held, so that it keeps what it is asked for")
                # The busiest one: the others may have nothing to do, for it is the trainer that is slow here.
                held = max(compose.indices("loader"), key=lambda index: samples_made(compose, index))
                compose.freeze("loader", held)
            elif number == 1:
                heading("it is killed, and another is added")
                added = exchange_a_loader(compose, held)
        if not added:
            raise ToolFailed("the training was over before a loader could be killed.")
        made = sum(samples_made(compose, index) for index in added)
        folder, summary = copy_run(compose, "scale")
    check(summary)
    heading("The training has outlived its loader.")
    say(f"  exactly once  {account(summary)}\n  the added one made {made:,} samples\n  the run       {folder}")
    if not made:
        raise ToolFailed("the loader that was added was given no work.")
    if not any(epoch.reassigned for epoch in summary.ledger):
        raise ToolFailed("the loader that was killed had nothing to do: no slice was asked for again.")


def middles(compose: Compose) -> Iterator[int]:
    """Follow the trainer to its end; hand over whenever it tells of the middle of an epoch, with how often it has."""
    reached = 0
    for line in compose.follow(TRAINER):
        if _MIDDLE.match(line):
            yield reached
            reached += 1
    if not reached:
        raise ToolFailed("the trainer has ended without a line from the middle of an epoch.")


def expect_transport(compose: Compose, transport: str) -> None:
    """Refuse a trainer that gets its batches from the first loader in another way than it should."""
    found = {client.transport for client in compose.status(1).clients}
    if found != {transport}:
        raise ToolFailed(f"batches were to come by {transport}, but come by {', '.join(sorted(found)) or 'no way'}.")


def samples_made(compose: Compose, index: int) -> int:
    """How many samples a loader's workers have made."""
    return sum(worker.samples for worker in compose.status(index).workers)


def exchange_a_loader(compose: Compose, index: int) -> list[int]:
    """Kill a loader and start one more; returns the numbers of those that are new."""
    compose.destroy("loader", index)
    before = compose.indices("loader")  # without the killed one, whose number the new one may take over
    compose.run("up", "--detach", "--no-deps", "--no-recreate", "--scale", "loader=3", "loader")
    return sorted(compose.indices("loader") - before)


def evaluate(compose: Compose, run: str) -> Evaluation:
    """The newest checkpoint's error, by a container of its own."""
    options = ["--loader", "tcp://loader:5555", "--views", "ten-crop", "--json"]
    printed = compose.ask("run", "--rm", "-T", "--no-deps", TRAINER, "evaluate", f"/runs/{run}", *options)
    return read(printed, Evaluation, "what `trainer evaluate --json` printed")


def copy_run(compose: Compose, run: str) -> tuple[Path, Summary]:
    """A run's folder out of its volume, and what the run says of itself."""
    folder = RUNS / run
    shutil.rmtree(ROOT / folder, ignore_errors=True)  # an earlier copy
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    compose.run("cp", f"{TRAINER}:/runs/{run}", str(folder))
    return folder, read((ROOT / folder / "summary.json").read_bytes(), Summary, "the run's summary.json")


def account(summary: Summary) -> str:
    """The ledger in one line."""
    delivered = sum(epoch.delivered for epoch in summary.ledger)
    expected = sum(epoch.expected for epoch in summary.ledger)
    refused = sum(epoch.duplicates_refused for epoch in summary.ledger)
    reassigned = sum(epoch.reassigned for epoch in summary.ledger)
    return (
        f"{delivered:,} of {expected:,} samples in {len(summary.ledger)} epochs "
        f"({refused} duplicates refused, {reassigned} slices asked for again)"
    )


def heading(title: str) -> None:
    """Announce a part."""
    say(click.style(f"\n{title}", bold=True))


def _succeeds(*command: str) -> bool:
    if not shutil.which(command[0]):
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


_PARTS: Final = {"build": build, "demo": demo, "scale": scale}


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("part", type=click.Choice(list(_PARTS)))
def main(part: str) -> None:
    """Build the images, run the demo by them, or kill and add loaders while they train."""
    _PARTS[part]()


if __name__ == "__main__":
    main()
