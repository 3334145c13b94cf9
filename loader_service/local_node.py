"""A node on this machine as a context manager: started as a process of its own, ended with its starter.

>>> from loader_service import Loader, LocalNode
>>> with LocalNode("data", workers=2) as node, Loader(node.address, batch_size=128) as loader:  # doctest: +SKIP
...     for batch in loader:
...         train(batch.images, batch.labels)
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Final

from loader_service import defaults
from loader_service.errors import NodeFailed
from loader_service.wire.sockets import MAX_IPC_PATH_BYTES

START_TIMEOUT_S: Final = 60.0
"""A node starts within a second; one that takes a minute does not start at all."""

STOP_TIMEOUT_S: Final = 10.0
"""A node ends within 2 s of SIGTERM; after this time it is killed."""

PROGRAM: Final = (sys.executable, "-m", "loader_service")
_SOCKET: Final = "node"
_ANNOUNCES: Final = "listening on "
_LAST_LINES: Final = 10
"""Number of lines of a failed node's log that its error quotes: more than a sentence, less than a flood."""


def start_command(
    data: Path | str,
    workers: int,
    bind: str,
    *,
    keys: Path | str | None = None,
    options: Sequence[str] = (),
    program: Sequence[str] = ("loader-service",),
) -> list[str]:
    """Return the command that starts such a node, as a user types it."""
    command = [*program, "start", "--workers", str(workers), "--data", os.fspath(data), "--bind", bind]
    return [*command, *(["--keys", os.fspath(keys)] if keys else []), *options]


class LocalNode:
    """A node that runs ``loader-service start`` on this machine; a context manager.

    The constructor returns when the node serves. The node dies with this process, however this process ends. It runs in
    a session of its own, so Ctrl-C in the terminal reaches the starter alone, which then closes the node. Options from
    the environment and from configuration files do not apply to it: they belong to the node that a user starts.

    Args:
        data: directory of train.lmdb and val.lmdb.
        workers: number of worker processes.
        bind: address to listen at, such as ``tcp://127.0.0.1:*`` or ``ipc:///run/node``; by default an ipc socket in a
            fresh folder that only this user can open.
        keys: directory of the node's keys (see ``loader-service keygen``); by default none for an ipc socket, and the user's
            own for a loopback address.
        options: further options of ``loader-service start``.
        log: file that the node's log is appended to; by default its warnings go to this process's standard error.
        program: command that runs in place of ``loader-service``, for a node with altered defaults.

    Fields:
        address: address that clients connect to, with the port that the node chose for ``*``.
        announcement: line that the node printed when it was ready: address, splits, workers, memory ceiling.

    Raises:
        NodeFailed: the node could not start; the message quotes the end of its log.
    """

    def __init__(
        self,
        data: Path | str = defaults.DATA,
        workers: int = defaults.WORKERS,
        *,
        bind: str | None = None,
        keys: Path | str | None = None,
        options: Sequence[str] = (),
        log: Path | str | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        folder = _socket_folder() if bind is None else None
        self._remove_folder = weakref.finalize(self, _remove, folder, os.getpid())
        bind = f"ipc://{folder}/{_SOCKET}" if bind is None else bind
        # A log in a file keeps everything; on this process's standard error only warnings are worth the noise.
        levels = ("--log-level", "warning") if log is None else ()
        command = start_command(data, workers, bind, keys=keys, options=(*levels, *options), program=program)
        # --parent: the kernel kills the node when this process ends (see _Starter). An empty configuration: see the class.
        command += ["--parent", str(os.getpid()), "--config", os.devnull]
        self._last_lines: list[str] = []
        self._ready = False
        self._process = _starter(os.getpid()).spawn(command, log)
        # Also drains the pipe: a node with a full pipe would block in its log.
        self._listener = threading.Thread(target=self._pass_on_log, name="node-log", daemon=True)
        self._listener.start()
        try:
            self.announcement = self._await_announcement(log)
        except BaseException:  # Ctrl-C, too: no node may stay behind
            self.close()
            raise
        self._ready = True
        self.address = self.announcement.removeprefix(_ANNOUNCES).partition(": ")[0]

    @property
    def pid(self) -> int:
        """Process id of the node's dispatcher, which is also the id of the node's session."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the dispatcher, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End the node with SIGKILL, as a crash of its machine would."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Stop the node and wait until it has ended; by SIGKILL if it does not end within STOP_TIMEOUT_S."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._listener.join(STOP_TIMEOUT_S)  # its pipe is at its end, unless a child of the node still holds it
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()
        self._remove_folder()

    def __enter__(self) -> LocalNode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _await_announcement(self, log: Path | str | None) -> str:
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()  # readline() has no timeout, but returns when the node's end of the pipe is closed

        alarm = threading.Timer(START_TIMEOUT_S, give_up)  # runs in another thread, while this one is in readline()
        alarm.daemon = True
        alarm.start()
        try:
            line = self._process.stdout.readline().strip()
        finally:
            alarm.cancel()
        if line.startswith(_ANNOUNCES):
            return line
        if late.is_set():
            raise NodeFailed(f"it was not ready after {START_TIMEOUT_S:.0f} s")
        with suppress(subprocess.TimeoutExpired):  # it may have closed its output and still run
            self._process.wait(STOP_TIMEOUT_S)
        self._listener.join(STOP_TIMEOUT_S)  # so that _last_lines is complete
        last_lines = self._last_lines
        if log is not None:
            last_lines = Path(log).read_text(encoding="utf-8", errors="replace").split("\n")[-_LAST_LINES:]
        said = line or " ".join(last_lines).strip() or f"exit code {self._process.returncode}"
        raise NodeFailed(f"it could not start: {said.rstrip('.')}")

    def _pass_on_log(self) -> None:
        """Keep the log's last lines until the node is ready, for the error message; then copy lines to stderr."""
        if self._process.stderr is None:
            return
        for line in self._process.stderr:  # ends when the node and its workers have ended
            if self._ready:
                sys.stderr.write(line)
            else:
                self._last_lines = [*self._last_lines[1 - _LAST_LINES :], line.strip()]


def _remove(folder: Path | None, owner: int) -> None:
    """Remove the folder of a node's socket, unless this is a forked child of the process that made it."""
    if folder is not None and os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _socket_folder() -> Path:
    """Make a folder of mode 0700, in which no other user can connect to a socket.

    Raises:
        NodeFailed: no temporary folder can be written to whose path is short enough.
    """
    # A user's temporary folder may have a long path, but the path of a socket is limited.
    for parent in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp"):  # noqa: S108
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="loader-service-", dir=parent)) if parent else None
            if folder and len(os.fsencode(folder / _SOCKET)) <= MAX_IPC_PATH_BYTES:
                return folder
            if folder:
                folder.rmdir()
    raise NodeFailed(
        f"there is no folder for its socket, whose path may have {MAX_IPC_PATH_BYTES} bytes: set TMPDIR to a folder with a "
        "short path that this user can write"
    )


class _Starter(threading.Thread):
    """The thread that starts all nodes of a process, and lives as long as the process.

    The kernel kills a node when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG), and the thread that makes a
    LocalNode may end long before the process.
    """

    def __init__(self) -> None:
        super().__init__(name="node-starter", daemon=True)  # daemon: it never ends by itself
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        """Start nodes, one after another, until the process ends."""
        while True:
            self._orders.get()()

    def spawn(self, command: Sequence[str], log: Path | str | None) -> subprocess.Popen[str]:
        """Return the process that :func:`_spawn` starts, as a child of this thread."""
        spawned: Future[subprocess.Popen[str]] = Future()

        def order() -> None:
            try:
                spawned.set_result(_spawn(command, log))
            except BaseException as error:  # it belongs to the caller; this thread goes on
                spawned.set_exception(error)

        self._orders.put(order)
        try:
            return spawned.result()
        except KeyboardInterrupt:  # the caller leaves without the process
            spawned.add_done_callback(_kill)
            raise


def _kill(spawned: Future[subprocess.Popen[str]]) -> None:
    if not spawned.exception():
        spawned.result().kill()


@cache
def _starter(_pid: int) -> _Starter:
    """Return the starter of the process ``pid``: a forked process has no threads of its parent, so it makes its own."""
    return _Starter()


def _spawn(command: Sequence[str], log: Path | str | None) -> subprocess.Popen[str]:
    """Start the node's process in a session of its own; its log goes to a file or, without one, to a pipe."""
    # The user's defaults are for the user's node.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LOADER_SERVICE_START_")}
    # The child has its own copy of the file, so this one closes.
    with nullcontext(subprocess.PIPE) if log is None else Path(log).open("a", encoding="utf-8") as stderr:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True, env=environ
        )
