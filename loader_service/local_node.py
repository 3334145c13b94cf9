"""A private node: started as a process of its own, reachable by its starter alone, gone with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Final

from loader_service import defaults
from loader_service.client.query import status
from loader_service.errors import NodeFailed, NoNodeError

START_TIMEOUT_S: Final = 60.0
"""Starting takes a second; a machine that needs a minute has something else to tell."""

STOP_TIMEOUT_S: Final = 5.0


class LocalNode:
    """A context manager that runs ``loader-service start`` on this machine over an ipc socket.

    The node dies with this process, also when it is killed.

    Args:
        data: directory of train.lmdb and val.lmdb.
        workers: how many worker processes.

    Raises:
        NodeFailed: it could not start; the sentence has what it said.
    """

    def __init__(self, data: Path | str = defaults.DATA, workers: int = defaults.WORKERS) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="loader-service-")  # 0700: nobody else may connect
        self.address = f"ipc://{self._folder.name}/node"
        command = [sys.executable, "-m", "loader_service", "start", "--data", os.fspath(data)]
        command += ["--workers", str(workers), "--bind", self.address, "--parent", str(os.getpid()), "--quiet"]
        command += ["--config", os.devnull]  # what is configured is meant for the node that the user starts
        # A session of its own: Ctrl-C in the terminal is for the starter, who then stops the node in its own time.
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=_without_options()
        )
        self._said: list[str] = []
        self._ready = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the node's dispatcher."""
        return self._process.pid

    def close(self) -> None:
        """Stop the node and wait until it is gone."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._listener.join(STOP_TIMEOUT_S)
        if self._process.stderr:
            self._process.stderr.close()
        self._folder.cleanup()

    def __enter__(self) -> LocalNode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _listen(self) -> None:
        """Pass on what the node says once it serves; until then it is kept for the error's sentence."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if self._ready:
                sys.stderr.write(line)
            else:
                self._said = [*self._said[-9:], line.strip()]

    def _wait_until_ready(self) -> None:
        for _ in range(int(START_TIMEOUT_S)):
            try:
                status(self.address, timeout_s=1.0)
            except NoNodeError:
                if self._process.poll() is None:
                    continue
                self._listener.join(STOP_TIMEOUT_S)
                said = " ".join(self._said) or f"exit code {self._process.returncode}"
                raise NodeFailed(f"it could not start: {said.rstrip('.')}") from None
            self._ready = True
            return
        raise NodeFailed(f"it was not ready after {START_TIMEOUT_S:.0f} s")


def _without_options() -> dict[str, str]:
    """The environment, less the options that it has for a user's node."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LOADER_SERVICE_START_")}
