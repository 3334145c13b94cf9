"""What every contestant of the benchmark does alike: take turns at delivering batches into the consumer's memory.

A contestant is a process that prints ``ready`` and then reads ``WARM SECONDS`` a line. It consumes batches for WARM
seconds, so that what it had made ahead is used up, prints ``begin``, consumes for SECONDS, and prints the images, the
seconds that they took, and the CPU seconds that the benchmark itself spent on them in that process, where it knows. Peers run this in environments of their own: the standard library and NumPy are all it needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

BATCH: Final = 128
SHAPE: Final = (224, 224, 3)
PAGE_BYTES: Final = 4096
WORKERS_DEFAULT: Final = 2


def touch(images: Any) -> int:
    """Read a byte of every page of a batch, (n, 224, 224, 3) uint8, contiguous; returns n.

    Raises:
        SystemExit: the batch is of another form, so that its figure would mean something else.
    """
    if images.shape[1:] != SHAPE or images.dtype.name != "uint8" or not images.flags.c_contiguous:
        raise SystemExit(f"a batch is (n, 224, 224, 3) uint8 and contiguous, not {images.shape} {images.dtype}")
    images.reshape(-1)[::PAGE_BYTES].sum()
    return len(images)


def serve(batches: Iterable[Any]) -> None:
    """Take turns until standard input ends. ``batches`` is endless; each one is let go of before the next is asked for."""
    deliver(touch(images) for images in batches)


def deliver(counts: Iterator[int], spent_s: Callable[[], float] = float) -> None:
    """As :func:`serve`, for who touches its batches itself and tells how many images each had.

    ``spent_s`` gives the CPU seconds that went into touching and checking so far.
    """
    next(counts)  # what is made once is made before the contestant is ready
    say("ready")
    for line in sys.stdin:
        warm_s, seconds = (float(word) for word in line.split())
        consume(counts, warm_s)
        say("begin")
        before_s = spent_s()
        images, took_s = consume(counts, seconds)
        say(f"{images} {took_s:.6f} {spent_s() - before_s:.6f}")


def consume(counts: Iterator[int], seconds: float) -> tuple[int, float]:
    """Images, and the seconds from the first request to the last answer."""
    images, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        images += next(counts)
    return images, passed


def say(line: str) -> None:
    """Print a line, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
