"""The limits of the machine: copying crops, decoding records and moving frames, each with nothing else around it.

Each limit is a contestant (see ``turns``) of one process; the benchmark starts as many copiers and decoders as a node has
workers.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
import simplejpeg
import zmq

from loader_service.data.augment import complete_view
from loader_service.data.codecs import HEADER, raw_value
from loader_service.data.draws import draw
from loader_service.data.order import records_at
from loader_service.data.records import Records
from loader_service.node.send_buffers import PIECE_BYTES
from loader_service.node.worker import die_with_parent
from loader_service.types import RECORD_SIDE_PX, SampleLayout, View
from tools.bench.turns import BATCH, PAGE_BYTES, deliver

SLOTS: Final = 6  # PREFETCH + SPARE_SLOTS of loader_service.defaults
"""Number of slots of a loader by default: the memory that is written again and again."""

FRAME_BYTES: Final = PIECE_BYTES
"""Size of a frame, as a node sends it."""

IMAGE_BYTES: Final = SampleLayout(View(), "uint8").image_bytes
HIGH_WATER: Final = 40
"""Frames in flight: about the batches that a loader prefetches."""


_SOURCE = Path(__file__).with_suffix(".c")


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "limits.so"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, "-O3", "-shared", "-fPIC", "-o", path, _SOURCE], check=True)
        return ctypes.CDLL(str(path))  # mapped by now, so the file may go with its folder


def first_pixels(values: list[memoryview], draws: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Return the address of the first pixel of each record's crop: (n,) uint64."""
    # Addresses of LMDB's pages: valid while the caller's read transaction is open.
    bases = [np.frombuffer(value, np.uint8).ctypes.data for value in values]
    # uint64 before the sum: NumPy makes float64 of uint64 and int16, which are no addresses.
    rows, columns = draws["y"].astype(np.uint64), draws["x"].astype(np.uint64)
    addresses: npt.NDArray[np.uint64] = np.array(bases, np.uint64) + (rows * RECORD_SIDE_PX + columns) * 3 + HEADER.size
    return addresses


def copy_crops(images: npt.NDArray[np.uint8], addresses: npt.NDArray[np.uint64]) -> None:
    """Copy the crops at ``addresses``, (n,) uint64, to ``images``, (n, side, side, 3) uint8, without the GIL."""
    n, side = images.shape[:2]
    pointers: Any = addresses.ctypes.data_as(ctypes.c_void_p)  # 64-bit addresses, which C reads as an array of pointers
    # Explicit widths: ctypes passes a plain int as a 32-bit C int.
    sizes = (ctypes.c_size_t(v) for v in (n, side, 3 * side, 3 * RECORD_SIDE_PX))
    # CDLL, unlike PyDLL, releases the GIL.
    _library().copy_crops(images.ctypes.data_as(ctypes.c_void_p), pointers, *sizes)


def copying(data: Path) -> Iterator[int]:
    """Copy the crops of a training epoch from LMDB's pages to shared memory with C memcpy; yield images per batch."""
    with Records(data) as records, records.values() as values:
        view = complete_view(View(), records.statistics)
        stored = values.stored(np.arange(len(records)))
        starts = range(0, len(records) - BATCH + 1, BATCH)
        # Looked up before the clock starts: the limit is the copying alone.
        addresses = []
        for start in starts:
            # The pid as seed: each copy of this process reads the records in another order.
            chosen = [stored[number] for number in records_at(len(records), os.getpid(), 0, start, BATCH).tolist()]
            addresses.append(first_pixels(chosen, draw(view, os.getpid(), 0, start, BATCH)))
        # (6, 128, 224, 224, 3) uint8 in shared anonymous memory, as slots are.
        images = np.frombuffer(mmap.mmap(-1, SLOTS * BATCH * IMAGE_BYTES), np.uint8).reshape(SLOTS, BATCH, *view.shape)
        for batch, crops in zip(cycle(images), addresses, strict=False):
            copy_crops(batch, crops)  # maps every page before the clock starts
        for batch, crops in zip(cycle(images), cycle(addresses), strict=False):
            copy_crops(batch, crops)
            yield BATCH


def decoding(data: Path) -> Iterator[int]:
    """Decode whole records with libjpeg-turbo, in shuffled order, into one buffer; yield 1 per image."""
    buffer = raw_value()[HEADER.size :]  # aligned as a worker's buffer: decoding is fastest there
    with Records(data) as records, records.values() as values:
        # Every record once; another order in each copy.
        order = records_at(len(records), os.getpid(), 0, 0, len(records))
        payloads = [value[HEADER.size :] for value in values.stored(order)]
        for payload in cycle(payloads):
            simplejpeg.decode_jpeg(payload, colorspace="RGB", buffer=buffer)
            yield 1


def receiving(curve: bool) -> Iterator[int]:
    """Receive frames over TCP loopback from another process, without copies, and touch every page; yield images."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    key = b""
    if curve:
        key, secret = zmq.curve_keypair()
        # Before bind(): libzmq applies security options to later binds and connects only.
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    command = [sys.executable, "-m", "tools.bench.limits", "send", f"tcp://127.0.0.1:{port}", "--key", key.decode()]
    with subprocess.Popen([*command, "--parent", str(os.getpid())]) as sender:
        received = images = 0
        try:
            while True:
                # A view of libzmq's message, which is freed when the next frame replaces it.
                frame = np.frombuffer(socket.recv(copy=False).buffer, np.uint8)
                frame[::PAGE_BYTES].sum()
                received += len(frame)
                # A frame is no whole number of images: count those that are complete so far.
                yield received // IMAGE_BYTES - images
                images = received // IMAGE_BYTES
        finally:
            sender.kill()  # first: Popen's exit waits for it, and send() never ends
            context.destroy(linger=0)  # drops what is queued instead of waiting for a peer


def send(address: str, key: str) -> None:
    """Send the same few frames endlessly, from memory that ZeroMQ does not copy."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    if key:
        public, secret = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVERKEY, key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.connect(address)
    frames = [np.full(FRAME_BYTES, value, np.uint8) for value in range(2 * HIGH_WATER)]
    for frame in cycle(frames):
        socket.send(frame, copy=False)  # blocks at the high-water mark, which paces this loop


@click.command()
@click.argument("what", type=click.Choice(["memcpy", "decode", "zmq", "zmq-curve", "send"]))
@click.argument("target")
@click.option("--key", default="")
@click.option("--parent", type=int)
def main(what: str, target: str, key: str, parent: int | None) -> None:
    """Measure one limit of the machine."""
    if what == "send":
        assert parent is not None
        die_with_parent(parent)  # its parent may be killed before the `finally` in receiving()
        send(target, key)
    elif what == "memcpy":
        deliver(copying(Path(target)))
    elif what == "decode":
        deliver(decoding(Path(target)))
    else:
        deliver(receiving(curve=what == "zmq-curve"))


if __name__ == "__main__":
    main()
