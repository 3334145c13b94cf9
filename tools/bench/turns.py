"""The protocol of a contestant: it takes turns at delivering batches into the consumer's memory.

A contestant is a process that prints ``ready`` and then reads lines ``WARM SECONDS``. For each it consumes batches for
WARM seconds, which uses up what it has prefetched, prints ``begin``, consumes for SECONDS, and prints three numbers: images,
the seconds that they took, and the CPU seconds that the benchmark's own checks took in this process (0 if unknown).

Peers run this module in environments of their own, so it imports the standard library alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

BATCH: Final = 128
SHAPE: Final = (224, 224, 3)
PAGE_BYTES: Final = 4096  # of x86-64 and most arm64 kernels
WORKERS_DEFAULT: Final = 2


def touch(images: Any) -> int:
    """Read a byte of every page of a batch, (n, 224, 224, 3) uint8, contiguous; return n.

    Raises:
        SystemExit: the batch has another shape, dtype or layout, which would make its figure incomparable.
    """
    if images.shape[1:] != SHAPE or images.dtype.name != "uint8" or not images.flags.c_contiguous:
        raise SystemExit(f"a batch is (n, 224, 224, 3) uint8 and contiguous, not {images.shape} {images.dtype}")
    # A view, because the array is contiguous; reading a byte of a page maps it.
    images.reshape(-1)[::PAGE_BYTES].sum()
    return len(images)


def serve(batches: Iterable[Any]) -> None:
    """Take turns until standard input ends.

    Args:
        batches: endless iterator of arrays; each array is held until the next one arrives.
    """
    deliver(touch(images) for images in batches)


def deliver(counts: Iterator[int], spent_s: Callable[[], float] = float) -> None:
    """Take turns until standard input ends, for a contestant that touches its batches itself.

    Args:
        counts: endless iterator of the number of images of each batch.
        spent_s: function that returns the CPU seconds spent on touching and checking so far.
    """
    next(counts)  # one batch before `ready`: all set-up work is done by then
    say("ready")
    for line in sys.stdin:
        warm_s, seconds = (float(word) for word in line.split())
        consume(counts, warm_s)
        say("begin")
        # After `begin`: the checks of the warm-up do not count. The default, float(), is always 0.0.
        before_s = spent_s()
        images, took_s = consume(counts, seconds)
        say(f"{images} {took_s:.6f} {spent_s() - before_s:.6f}")


def consume(counts: Iterator[int], seconds: float) -> tuple[int, float]:
    """Consume for ``seconds``; return the number of images, and the seconds that they took."""
    images, start = 0, time.perf_counter()
    # The last batch may end late, so the caller divides by the true time, not by `seconds`.
    while (passed := time.perf_counter() - start) < seconds:
        images += next(counts)
    return images, passed


def say(line: str) -> None:
    """Print a line and flush it: the benchmark waits for it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
