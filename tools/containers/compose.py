"""A Compose project of docker/compose.yaml: the commands given to Docker, and their answers.

Each command is printed before it runs. A project is a context manager: when the block ends, also by a failed step, Ctrl-C
or SIGTERM, the project's containers, networks and volumes are removed. Images stay.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Self

import msgspec

from loader_service.wire.messages import Status
from tools.errors import ToolFailed
from tools.results import decode
from tools.terminal import finish, say, start, stop

FILE: Final = Path("docker/compose.yaml")
PROJECT: Final = "loader-service-demo"


class Point(msgspec.Struct):
    """One series in the answer to a Prometheus query: its value is a time and a number as text."""

    value: tuple[float, Annotated[str, msgspec.Meta(max_length=100)]]


class ServiceLog:
    """The lines that a service prints, copied to the terminal as they arrive; the source of all timing here.

    A service that crashes and restarts continues its log. The log ends when the service's container has ended.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def until(self, pattern: re.Pattern[str], what: str) -> None:
        """Read up to a line that begins with ``pattern``.

        Raises:
            ToolFailed: the log ended without one; ``what`` names the event in the message.
        """
        for line in self._lines:
            if pattern.match(line):
                return
        raise ToolFailed(f"the service ended before {what}; its lines are above.")

    def finish(self) -> None:
        """Read to the end.

        Raises:
            ToolFailed: the service has failed.
        """
        for _ in self._lines:
            pass


class Compose:
    """A Compose project of docker/compose.yaml; a context manager that removes all of it at the end.

    Args:
        project: name of the project, which no other project shares.
        variables: variables of docker/compose.yaml, added to the environment's; see docker/.env.example.

    Raises:
        ToolFailed: Compose is not installed, or no engine answers.
    """

    def __init__(self, project: str = PROJECT, **variables: str) -> None:
        self.project = project
        self._environ = {**os.environ, **variables}  # Compose prefers these to docker/.env
        docker = ["docker", "compose"] if _succeeds("docker", "compose", "version") else ["docker-compose"]
        if not _succeeds(*docker, "version"):
            raise ToolFailed("neither `docker compose` nor `docker-compose` runs here: install Docker with Compose.")
        if not _succeeds("docker", "version"):
            raise ToolFailed("no Docker engine answers: start one, or set DOCKER_HOST to its address.")
        # `down` removes services of active profiles alone, so all profiles are always active.
        profiles = ["--profile", "cpu", "--profile", "metrics"]
        self._command = [*docker, "--file", str(FILE), "--project-name", project, *profiles]

    def __enter__(self) -> Self:
        self._down()  # remains of a run that was killed
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
    def follow(self, service: str) -> Iterator[ServiceLog]:
        """Follow the log of a service while the block runs."""
        with closing(self._lines(service)) as lines:
            yield ServiceLog(lines)

    def indices(self, service: str) -> set[int]:
        """Return the numbers of a service's running containers."""
        names = self.ask("ps", "--format", "{{.Name}}", service).split()
        return {int(name.rpartition("-")[2]) for name in names}  # PROJECT-SERVICE-NUMBER

    def freeze(self, service: str, index: int) -> None:
        """Suspend all processes of a container."""
        self._finish(["docker", "pause", f"{self.project}-{service}-{index}"])

    def destroy(self, service: str, *indices: int) -> None:
        """Kill containers with SIGKILL and remove them."""
        # Of docker, not of Compose, whose `kill` and `rm` take a whole service.
        self._finish(["docker", "rm", "--force", *(f"{self.project}-{service}-{index}" for index in indices)])

    def crash(self, service: str) -> None:
        """Kill every process in a service's container but process 1, which then ends as after any crash."""
        # -1 is every process but 1 and the caller. Process 1 is docker's init, which ends with the program that it
        # started.
        self.run("exec", "-T", service, "sh", "-c", "kill -9 -1")

    def status(self, index: int) -> Status:
        """Return a loader's status, as asked inside its own container.

        Raises:
            ToolFailed: the container printed something else.
        """
        # -T: no terminal, so that the output is the JSON alone. The container has the keys that a status needs.
        command = ("exec", "-T", "--index", str(index), "loader", "loader-service", "status", "--json")
        where = "the output of `loader-service status --json`"
        fields = decode(self.ask(*command), dict[str, Any], where)
        fields.pop("rates", None)  # the command adds these to the node's message
        return decode(msgspec.json.encode(fields), Status, where)

    def metric(self, query: str) -> float:
        """Return Prometheus's answer to a query for one number; 0 if it knows no such series."""
        command = ("promtool", "query", "instant", "--format", "json", "http://localhost:9090", query)
        points = decode(self.ask("exec", "-T", "prometheus", *command), list[Point], "Prometheus's answer")
        # Prometheus gives values as text, so that NaN and Inf fit into JSON.
        return float(points[0].value[1]) if points else 0.0

    def outside_address(self, service: str, port: int) -> str:
        """Return HOST:PORT of a service's published port as containers of other projects, or other hosts, reach it."""
        published = self.ask("port", service, str(port)).split()[0].rpartition(":")[2]  # the first line: IPv4's
        form = "{{(index .IPAM.Config 0).Gateway}}"  # the gateway is this machine, as its containers see it
        command = ["docker", "network", "inspect", "--format", form, f"{self.project}_default"]
        return f"{self._finish(command, stdout=subprocess.PIPE).strip()}:{published}"

    def _lines(self, service: str) -> Generator[str]:
        command = [*self._command, "logs", "--follow", "--no-log-prefix", service]
        process = start(command, self._environ, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                say(line.rstrip())
                yield line
        finally:
            stop(process)  # follow()'s block may end before the log does
            process.stdout.close()
        # `logs` ends with 0 whatever happened to the service, so its exit code is asked for.
        # Not reached if that block ends early: closing() then raises GeneratorExit at the `yield`.
        code = self.ask("ps", "--all", "--format", "{{.ExitCode}}", service).strip()
        if code != "0":
            raise ToolFailed(f"the service {service} ended with exit code {code}; its lines are above.")

    def _finish(self, command: Sequence[str], **pipes: Any) -> str:
        return finish(start(command, self._environ, **pipes))

    def _down(self) -> None:
        self.run("down", "--volumes", "--remove-orphans", "--timeout", "10")  # seconds from SIGTERM to SIGKILL


def _succeeds(*command: str) -> bool:
    if not shutil.which(command[0]):  # else subprocess.run() raises
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
