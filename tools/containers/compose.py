"""A Compose project of docker/compose.yaml: every command that is given to Docker, and what comes back.

Each command is printed before it runs. A project is a context manager: whatever ends the block (its end, a failed step,
Ctrl-C, SIGTERM) also removes the project's containers, networks and volumes. Images stay.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Self

import click
import msgspec

from tools.demo import ROOT, read, say
from tools.errors import ToolFailed

FILE: Final = Path("docker/compose.yaml")
PROJECT: Final = "loader-service-demo"


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

    @property
    def samples(self) -> int:
        """How many samples the node's workers have made."""
        return sum(worker.samples for worker in self.workers)


class Point(msgspec.Struct):
    """One series of a Prometheus query's answer: its value is a time and a number as text."""

    value: tuple[float, Annotated[str, msgspec.Meta(max_length=100)]]


class Lines:
    """The lines that a service prints, passed on to the terminal as they come; the source of all timing here.

    A service that crashes and is restarted goes on printing. The lines end when its container has.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def until(self, pattern: re.Pattern[str], what: str) -> None:
        """Read on to a line that begins like this.

        Raises:
            ToolFailed: there is none; ``what`` names it in the sentence.
        """
        for line in self._lines:
            if pattern.match(line):
                return
        raise ToolFailed(f"the service ended before {what}; its lines are above.")

    def finish(self) -> None:
        """Read on to the end.

        Raises:
            ToolFailed: the service has failed.
        """
        for _ in self._lines:
            pass


class Compose:
    """A Compose project of docker/compose.yaml; a context manager that leaves nothing of it behind.

    Args:
        project: the project's name: what it has belongs to no other project.
        variables: for docker/compose.yaml, beside those that are set already; see docker/.env.example.

    Raises:
        ToolFailed: there is no Compose, or no engine answers.
    """

    def __init__(self, project: str = PROJECT, **variables: str) -> None:
        self.project = project
        self._environ = {**os.environ, **variables}
        docker = ["docker", "compose"] if _succeeds("docker", "compose", "version") else ["docker-compose"]
        if not _succeeds(*docker, "version"):
            raise ToolFailed("neither `docker compose` nor `docker-compose` runs here: install Docker with Compose.")
        if not _succeeds("docker", "version"):
            raise ToolFailed("no Docker engine answers: start one, or set DOCKER_HOST to where it is.")
        profiles = ["--profile", "cpu", "--profile", "metrics"]
        self._command = [*docker, "--file", str(FILE), "--project-name", project, *profiles]

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

    @contextmanager
    def follow(self, service: str) -> Iterator[Lines]:
        """The lines of a service while the block runs."""
        with closing(self._lines(service)) as lines:
            yield Lines(lines)

    def indices(self, service: str) -> set[int]:
        """The numbers of a service's running containers."""
        names = self.ask("ps", "--format", "{{.Name}}", service).split()
        return {int(name.rpartition("-")[2]) for name in names}

    def freeze(self, service: str, index: int) -> None:
        """Stop all processes of a container where they are."""
        self._finish(["docker", "pause", f"{self.project}-{service}-{index}"])

    def destroy(self, service: str, *indices: int) -> None:
        """Kill containers by SIGKILL, and take them away."""
        self._finish(["docker", "rm", "--force", *(f"{self.project}-{service}-{index}" for index in indices)])

    def crash(self, service: str) -> None:
        """Kill by SIGKILL every process in a service's container but its first, which then ends as after any crash."""
        self.run("exec", "-T", service, "sh", "-c", "kill -9 -1")

    def status(self, index: int) -> Status:
        """How a loader is, as its own container sees it."""
        command = ("exec", "-T", "--index", str(index), "loader", "loader-service", "status", "--json")
        return read(self.ask(*command), Status, "what `loader-service status --json` printed")

    def metric(self, query: str) -> float:
        """What Prometheus answers to a query for one number; 0 where it knows no such series."""
        command = ("promtool", "query", "instant", "--format", "json", "http://localhost:9090", query)
        points = read(self.ask("exec", "-T", "prometheus", *command), list[Point], "Prometheus's answer")
        return float(points[0].value[1]) if points else 0.0

    def outside_address(self, service: str, port: int) -> str:
        """HOST:PORT where containers of other projects reach a published port of a service, as other hosts do."""
        published = self.ask("port", service, str(port)).split()[0].rpartition(":")[2]
        form = "{{(index .IPAM.Config 0).Gateway}}"  # this machine, as its containers see it
        command = ["docker", "network", "inspect", "--format", form, f"{self.project}_default"]
        return f"{self._finish(command, stdout=subprocess.PIPE).strip()}:{published}"

    def _lines(self, service: str) -> Generator[str]:
        command = [*self._command, "logs", "--follow", "--no-log-prefix", service]
        with self._started(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.rstrip())
                yield line
        code = self.ask("ps", "--all", "--format", "{{.ExitCode}}", service).strip()
        if code != "0":
            raise ToolFailed(f"the service {service} ended with exit code {code}; its lines are above.")

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


def _succeeds(*command: str) -> bool:
    if not shutil.which(command[0]):
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
