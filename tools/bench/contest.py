"""Contestants as child processes that take turns in rounds; ``turns`` has the protocol.

Rules of this file:

- One contestant works at a time. The others wait, with full buffers, which they empty before their own clock starts.
- CPU time includes the whole tree of processes: work in another process is not free.
- Contestants take turns round by round, so that whatever disturbs the machine disturbs them equally.
- When the benchmark ends, also by an error or a signal, every contestant ends, with the processes that it started.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from enum import StrEnum
from types import TracebackType
from typing import Final

import click
import msgspec
import psutil

from tools.errors import ToolFailed
from tools.terminal import ROOT

GONE_S: Final = 10.0
"""Time that a contestant has to end after SIGTERM."""


class Kind(StrEnum):
    """The kinds of contestants."""

    OURS = "ours"
    PEER = "peer"
    LIMIT = "limit"


class Contestant(msgspec.Struct, frozen=True):
    """A program that delivers batches.

    Fields:
        name: unique name, for files and options.
        title: name for people.
        codec: codec of the records that it reads, ``raw`` or ``jpeg``.
        kind: this project, a peer, or a limit of the machine.
        command: command that starts one of its processes.
        copies: number of processes.
        group: contestants of a group take turns; a group's processes end before the next group's start.
    """

    name: str
    title: str
    codec: str
    kind: Kind
    command: tuple[str, ...]
    copies: int = 1
    group: str = ""


class Turn(msgspec.Struct, frozen=True):
    """The figures of one turn. CPU times exclude the benchmark's own work, if the contestant reports it.

    Fields:
        images_per_s: images delivered per second, all copies together.
        cpu_ms: CPU milliseconds per image (equally: seconds per 1,000 images), all processes.
        consumer_cpu_ms: CPU milliseconds per image of the process that receives the batches.
        memory_mb: proportional set size of all processes, 10**6 bytes; shared pages count once.
    """

    images_per_s: float
    cpu_ms: float
    consumer_cpu_ms: float
    memory_mb: float


Rounds = dict[str, list[Turn]]
"""The turns of each contestant, by its name, round by round."""


class Running:
    """A contestant whose processes run; a context manager that ends them.

    Args:
        contestant: contestant to start.
        environ: variables added to the environment.

    Raises:
        ToolFailed: it ended early, or broke the protocol; the message has the end of its log.
    """

    def __init__(self, contestant: Contestant, environ: Mapping[str, str] | None = None) -> None:
        self.contestant = contestant
        # A file, not a pipe: nothing reads it during a turn, and a full pipe would block the contestant. All copies
        # inherit this one open file, so they share its offset and do not overwrite each other's lines.
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 -- close() closes it
        self._processes = [self._start(environ or {}) for _ in range(contestant.copies)]

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until all copies are ready.

        Raises:
            ToolFailed: one is not within ``limit_s``, if that is given.
        """
        self._expect("ready", limit_s)

    def turn(self, warm_s: float, seconds: float, limit_s: float | None = None) -> Turn:
        """Let it deliver for ``seconds`` after a warm-up of ``warm_s``; return the figures.

        Raises:
            ToolFailed: it does not answer within ``limit_s`` more than the turn takes, if that is given.
        """
        # All copies get the line before any answer is read, so that they deliver at the same time.
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # _expect() reports that it has ended
                process.stdin.write(f"{warm_s} {seconds}\n")
                process.stdin.flush()
        # Counted from here: the warm-up's images and CPU time belong to no turn.
        self._expect("begin", None if limit_s is None else warm_s + limit_s)
        before = self._cpu()
        answers = [
            self._read(process, None if limit_s is None else seconds + limit_s).split() for process in self._processes
        ]
        after = self._cpu()
        images = sum(int(count) for count, _, _ in answers)
        # The benchmark's checks run in the consumer's process, so their time is part of both totals.
        spent_s = sum(float(spent) for _, _, spent in answers)
        total_s, consumer_s = after[0] - before[0] - spent_s, after[1] - before[1] - spent_s
        return Turn(
            # Each copy by its own clock: the last batch may end after the turn's seconds.
            images_per_s=sum(int(count) / float(took_s) for count, took_s, _ in answers),
            cpu_ms=1000 * total_s / images,
            consumer_cpu_ms=1000 * consumer_s / images,
            memory_mb=self._memory() / 1e6,
        )

    def close(self) -> None:
        """End its processes and their children; a second call does nothing."""
        if self._log.closed:
            return
        everyone = self._tree()  # before the signal: orphans are no longer found below their parent
        for process in self._processes:
            with suppress(ProcessLookupError):  # _read() has reaped it
                # The group id is the pid (start_new_session). A node has its own session: it ends with its parent.
                os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(everyone, GONE_S)
        for child in alive:
            with suppress(psutil.NoSuchProcess):
                child.kill()  # by its pid and start time (psutil), so a reused pid is safe
        for process in self._processes:
            process.communicate()  # reaps it and closes its pipes
        self._log.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _start(self, environ: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.contestant.command,
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # a group to signal; the terminal's Ctrl-C reaches the benchmark alone
        )

    def _expect(self, word: str, limit_s: float | None = None) -> None:
        for process in self._processes:
            if (line := self._read(process, limit_s)) != word:
                raise ToolFailed(f"{self.contestant.name} printed {line!r} instead of {word!r}.")

    def _read(self, process: subprocess.Popen[str], limit_s: float | None = None) -> str:
        assert process.stdout is not None
        # Each answer is one line to one question, so nothing is left in the file's buffer when select() looks.
        if limit_s is not None and not select.select([process.stdout], [], [], limit_s)[0]:
            raise ToolFailed(f"{self.contestant.name} did not answer within {limit_s:.0f} s.")
        if line := process.stdout.readline().strip():
            return line
        # An empty line is the end of file, which may precede the exit by a moment, or come from a process that lives on.
        try:
            how = f"ended with exit code {process.wait(GONE_S)}"
        except subprocess.TimeoutExpired:
            how = "closed its output and did not end"
        self._log.seek(0)
        said = " ".join(self._log.read().strip().splitlines()[-3:])
        raise ToolFailed(f"{self.contestant.name} {how}: {said}")

    def _tree(self) -> list[psutil.Process]:
        found = []
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(process.pid)
                found += [root, *root.children(recursive=True)]
        return found

    def _cpu(self) -> tuple[float, float]:
        """Return the CPU seconds so far: of all processes, and of those that were started here."""
        total_s = consumer_s = 0.0
        own = {process.pid for process in self._processes}
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                # Without children_user and children_system: living children are in the tree themselves.
                times = process.cpu_times()
                used_s = times.user + times.system
                total_s += used_s
                consumer_s += used_s if process.pid in own else 0.0
        return total_s, consumer_s

    def _memory(self) -> int:
        total = 0
        for process in self._tree():
            with suppress(psutil.Error, OSError):  # some sandboxes have no smaps
                # PSS divides a shared page among its users, so LMDB's pages and the slots count once in the sum.
                total += process.memory_full_info().pss
        return total


WARM_SHARE: Final = 0.4
"""Warm-up before the clock starts, as a share of a turn's seconds: it uses up what was prefetched."""


def play(contestants: list[Contestant], rounds: int, seconds: float, missing: dict[str, str]) -> Rounds:
    """Let all contestants take their turns, group by group; return the figures.

    Args:
        contestants: in any order.
        rounds: turns of each contestant.
        seconds: length of a turn.
        missing: receives the reason for each peer that failed, by name; such a peer is left out.

    Raises:
        ToolFailed: a contestant failed that is no peer.
    """
    turns: Rounds = {}
    # A dict keeps the order in which groups first appear, unlike a set.
    for group in dict.fromkeys(each.group for each in contestants):
        with ExitStack() as stack:
            together = [each for each in contestants if each.group == group]
            running = [one for each in together if (one := _start(stack, each, seconds, missing))]
            # Rounds outside, contestants inside: a slow minute of the machine hits all of them, and ratios are taken
            # per round.
            for number in range(rounds):
                for one in running:
                    turn = one.turn(WARM_SHARE * seconds, seconds)  # the others only fill their buffers, then block
                    turns.setdefault(one.contestant.name, []).append(turn)
                    click.echo(
                        f"round {number + 1}/{rounds} {one.contestant.name:<18} {turn.images_per_s:>9,.0f}/s", err=True
                    )
    return turns


def _start(stack: ExitStack, contestant: Contestant, seconds: float, missing: dict[str, str]) -> Running | None:
    """Start a contestant and let it take one turn that does not count, to map pages and warm caches; None if it failed."""
    click.echo(f"starting {contestant.name}", err=True)
    try:
        # Entered before wait(): the processes of a contestant that fails here still end with the group.
        one = stack.enter_context(Running(contestant))
        one.wait()
        one.turn(WARM_SHARE * seconds, seconds)
    except ToolFailed as error:
        # The comparison stands without a peer; without ours or a limit there is nothing to compare.
        if contestant.kind is not Kind.PEER:
            raise
        missing[contestant.name] = str(error)
        return None
    return one
