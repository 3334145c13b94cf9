"""The parts, each in worker processes under time limits, with results on disk after every figure."""

from __future__ import annotations

import datetime
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import click
import msgspec
import psutil

from tools.gpu.measure import forms
from tools.gpu.parts import Name, Part, Settings
from tools.gpu.results import Agreement, Event, Outcome, Rate, Results, Status, save
from tools.terminal import ROOT

PROGRAM: Final = (sys.executable, "-m", "tools.gpu.worker")

STOP_S: Final = 20.0
"""Time that a worker has to end after SIGTERM: the trainer saves a checkpoint first."""

END_S: Final = 5.0
"""Time that a worker has to end by itself after its last piece."""

LOG_BYTES: Final = 4000
"""Length of the end of a log that is searched for the reason of a death."""


class OutOfTime(Exception):
    """Raised when the time of the whole command has ended."""


class Runner:
    """Runs parts.

    Args:
        settings: settings of the run.
        results: results so far, which are changed.
        path: file of the results.
        deadline_s: monotonic time at which the command ends; None for no limit.
        changed: called after each piece, to write the document.
        program: command that starts a worker.
    """

    def __init__(
        self,
        settings: Settings,
        results: Results,
        path: Path,
        deadline_s: float | None,
        changed: Callable[[], None],
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self._settings, self._results, self._path, self._changed = settings, results, path, changed
        self._deadline_s, self._program = deadline_s, program

    def run(self, chosen: list[Part]) -> None:
        """Run what has not been done: parts that never ended first, then those with the fewest attempts."""
        order = sorted(chosen, key=lambda part: self._results.attempts.get(part.name, 0))  # sorted() keeps equal ones
        try:
            for part in order:
                if self._pending(part):
                    self._run_part(part)
        except OutOfTime:
            click.echo("the time has ended; the next call continues from here", err=True)

    def left(self, chosen: list[Part]) -> list[str]:
        """Return the pieces that have not been done, as ``part/piece``."""
        return [f"{part.name}/{piece}" for part in chosen for piece in self._pending(part)]

    def _pending(self, part: Part) -> list[str]:
        """Return the pieces to do, those that have not failed before first."""
        open_ = [p for p in part.pieces if p not in part.without and not self._results.done(f"{part.name}/{p}")]
        return sorted(open_, key=lambda piece: f"{part.name}/{piece}" in self._results.outcomes)

    def _run_part(self, part: Part) -> None:
        click.echo(f"{part.title}", err=True)
        limit_s = time.monotonic() + part.limit_s
        tried: set[str] = set()
        while pieces := [piece for piece in self._pending(part) if piece not in tried]:
            self._check_time()
            if time.monotonic() >= limit_s:
                click.echo(f"  {part.name}: its {part.limit_s:.0f} s have ended; the next part follows", err=True)
                break
            tried |= self._run_worker(part, pieces, limit_s)
        self._results.attempts[part.name] = self._results.attempts.get(part.name, 0) + 1
        self._save()

    def _check_time(self) -> None:
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            raise OutOfTime

    def _run_worker(self, part: Part, pieces: list[str], limit_s: float) -> set[str]:
        """Let one worker do pieces until it ends or a limit is reached; return the pieces that ended.

        Raises:
            OutOfTime: the command's time has ended.
        """
        stop_s = min(limit_s, self._deadline_s or limit_s)
        settings = msgspec.structs.replace(
            self._settings, form=best_form(self._results, self._settings), left_s=stop_s - time.monotonic()
        )
        log = self._settings.work / "logs" / f"{part.name}.log"
        ended: set[str] = set()
        with Worker([*self._program, part.name, _json(settings), *pieces], log) as worker:
            piece, began_s = "", time.monotonic()
            while True:
                piece_s = began_s + part.piece_limit_s if piece else stop_s
                over = ended >= set(pieces)
                event = worker.next(time.monotonic() + END_S if over else min(stop_s, piece_s))
                now_s = time.monotonic()
                if over:
                    return ended
                if event is None and piece and now_s >= piece_s and piece_s <= stop_s:
                    reason = f"not done within {part.piece_limit_s:.0f} s"
                    self._end(part, piece, Outcome(Status.TIMED_OUT, reason, now_s - began_s))
                    return ended | {piece}
                if event is None and not worker.ended:
                    self._check_time()
                    return ended | set(pieces)  # the part's limit: the piece under way stays to be done
                if event is None:
                    return ended | self._bury(part, piece or pieces[0], worker, now_s - began_s)
                if event.row is not None:
                    self._results.put(f"{part.name}/{event.piece}", event.row)
                    self._save()
                elif event.status is None:
                    piece, began_s = event.piece, now_s
                    click.echo(f"  {event.piece}", err=True)
                else:
                    self._end(part, event.piece, Outcome(event.status, event.reason, now_s - began_s))
                    ended.add(event.piece)
                    piece = ""

    def _bury(self, part: Part, piece: str, worker: Worker, seconds: float) -> set[str]:
        """Record the piece at which a worker died; a worker that ended between two pieces did so on purpose."""
        if worker.code == 0:
            return set()
        self._end(part, piece, Outcome(Status.FAILED, worker.last_words(), seconds))
        return {piece}

    def _end(self, part: Part, piece: str, outcome: Outcome) -> None:
        self._results.outcomes[f"{part.name}/{piece}"] = outcome
        if outcome.status is not Status.DONE:
            click.echo(f"  {piece}: {outcome.status}: {outcome.reason}", err=True)
        self._save()
        self._changed()

    def _save(self) -> None:
        self._results.changed = now()
        save(self._path, self._results)


class Worker:
    """A worker process; a context manager that ends it, and whatever it started.

    Args:
        command: command that starts it.
        log: file for its standard error.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._lines: Iterator[bytes] = iter(())
        self._rest = b""
        self.ended = False

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.poll()

    def next(self, until_s: float) -> Event | None:
        """Return the next event; None if there is none until a monotonic time, or ever, see ``ended``.

        Lines that are no events, such as a library's own prints, are left out.
        """
        while True:
            if (line := next(self._lines, None)) is not None:
                try:
                    return msgspec.json.decode(line, type=Event)
                except msgspec.MsgspecError:
                    continue
            if not self._selector.select(max(0.0, until_s - time.monotonic())):
                return None
            read = os.read(self._out, 1 << 16)
            if not read:
                self.ended = True
                self._process.wait(STOP_S)
                return None
            *lines, self._rest = (self._rest + read).split(b"\n")
            self._lines = iter(lines)

    def last_words(self) -> str:
        """Return the reason of a death as one sentence."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - LOG_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with code {self.code}: {lines[-1].strip()[:300] if lines else 'it wrote nothing'}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker by SIGTERM, then whatever is left of its tree by SIGKILL."""
        everyone = [self._process.pid]
        with suppress(psutil.NoSuchProcess):
            everyone += [child.pid for child in psutil.Process(self._process.pid).children(recursive=True)]
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        for process in [self._process.pid, *everyone]:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _json(settings: Settings) -> str:
    return msgspec.json.encode(settings).decode()


def best_form(results: Results, settings: Settings) -> str:
    """Return the form that feeds and trains: the fastest one that was measured and agrees with the plain one."""
    bad = {row.form for row in results.of(Name.AGREEMENT, Agreement) if not row.agrees}
    rates = [row for row in results.of(Name.SPEED, Rate) if row.images_per_s and not row.peer]
    good = [row for row in rates if row.title not in bad and row.title in forms.FORMS]
    if settings.dry or not good:
        return forms.SAFE
    return max(good, key=lambda row: (row.batch == min(settings.batches), max(row.images_per_s))).title


def now() -> str:
    """Return the time as UTC, for people."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
