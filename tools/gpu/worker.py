"""A process that does pieces of one part: ``python -m tools.gpu.worker PART SETTINGS PIECE...``.

It prints one line of JSON for each event (see ``tools.gpu.results.Event``), and dies with the process that started it. A CUDA error makes a
process useless for further work, so a worker whose GPU no longer answers ends after that piece; the runner starts another.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Final, NoReturn

import msgspec
import torch

from loader_service.node.worker import die_with_parent
from tools.gpu.measure import agreement, cifar, feed, loaders, marked, speed
from tools.gpu.parts import Name, Settings
from tools.gpu.results import AnyRow, Event, Status

Emit = Callable[[AnyRow], None]
"""Function that reports a figure."""

WORK: Final[dict[Name, Callable[[Settings, str, Emit], None]]] = {
    Name.TESTS: marked.run,
    Name.AGREEMENT: agreement.run,
    Name.SPEED: speed.run,
    Name.FEED: feed.run,
    Name.LOADERS: loaders.run,
    Name.CIFAR10: cifar.run,
    Name.FLOAT32: speed.run_float32,
}


def say(event: Event) -> None:
    """Print an event and flush it."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


def sentence(error: Exception) -> str:
    """Return an error as one line for people."""
    said = " ".join(str(error).split())
    return said[:300] if said.endswith(".") else f"{type(error).__name__}: {said[:300]}"


def gpu_answers() -> bool:
    """Return whether the GPU still works in this process, or was never used in it."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(part: Name, settings: Settings, pieces: list[str]) -> None:
    """Do the pieces, one after the other; an error ends only its piece."""
    deadline_s = time.monotonic() + settings.left_s
    for piece in pieces:
        say(Event(piece))
        torch.compiler.reset()  # or the networks of earlier pieces would use up dynamo's limit of recompilations
        now = msgspec.structs.replace(settings, left_s=deadline_s - time.monotonic())
        try:
            WORK[part](now, piece, lambda row, piece=piece: say(Event(piece, row)))  # type: ignore[misc]
        except Exception as error:
            say(Event(piece, status=Status.FAILED, reason=sentence(error)))
        else:
            say(Event(piece, status=Status.DONE))
        if not gpu_answers():
            return


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    signal.signal(signal.SIGTERM, _leave)  # leaves every `with` block, which ends contestants and nodes
    main(Name(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Settings), sys.argv[3:])
