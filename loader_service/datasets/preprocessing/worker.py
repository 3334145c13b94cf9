"""A worker process of the pool: it reads image files and writes records and sums.

The pool starts it as ``-m loader_service.datasets.preprocessing.worker``. Rules:

- One process, one thread, no signal handlers: a hostile file can only crash this process, and the pool then sees the end of
  file on the socket.
- A timer is set before each image; its SIGALRM kills the process. So no image can hang it, nor keep it alive after its pool
  has died.
"""

from __future__ import annotations

import mmap
import signal
import socket
import sys
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from loader_service.data import kernel
from loader_service.data.codecs import CODECS, decode, encode, header, raw_bytes
from loader_service.data.image_file import load_picture
from loader_service.datasets.preprocessing import messages
from loader_service.datasets.preprocessing.layouts import CIFAR_SIDE_PX
from loader_service.datasets.preprocessing.sources import Form, Item, read_bytes
from loader_service.errors import PictureError, PreprocessingFailed

CIFAR_HEADER: Final = b"P6 %d %d 255\n" % (CIFAR_SIDE_PX, CIFAR_SIDE_PX)
"""Header that makes a PPM file of CIFAR's pixels, so that they take the same path as every image."""


def main(connection: socket.socket, file: int) -> None:
    """Do jobs until the pool closes its end.

    Args:
        connection: the worker's end of the socket pair.
        file: descriptor of the shared memory.
    """
    setup = memory = None
    while packet := connection.recv(messages.MESSAGE_BYTES):  # empty: the pool closed its end
        message = messages.decode_to_worker(packet)
        if isinstance(message, messages.Setup):
            setup, memory = message, mmap.mmap(file, message.memory_bytes)
        else:
            assert setup is not None, "the pool sends Setup first"
            assert memory is not None
            try:
                answer: messages.FromWorker = work(memory, setup, message)
            except PreprocessingFailed as error:
                answer = messages.Failed(str(error))
            connection.sendall(messages.encode(answer))


def work(memory: mmap.mmap, setup: messages.Setup, job: messages.Job) -> messages.Done:
    """Write the records and sums of one chunk into the job's area."""
    start, side = job.area * setup.area_bytes, setup.side
    at = np.frombuffer(memory, np.int64, 1, setup.at_offset)  # (1,), a view of the memory shared with the pool
    total = np.frombuffer(memory, np.uint16, raw_bytes(side), start + setup.sum_offset).reshape(side, side, 3)
    total[...] = 0  # the area holds the sum of an earlier chunk
    products = np.zeros((3, 3), np.int64)
    outcomes: list[tuple[int, int] | str] = []
    offset = 0
    for index, item in enumerate(job.items):
        if reason := job.refused.get(index):
            outcomes.append(reason)
            continue
        at[0] = index + 1  # if this item kills the process, the pool reads its index here
        # SIGALRM has its default action: the kernel ends even a decoder that never returns to Python.
        signal.setitimer(signal.ITIMER_REAL, setup.limit_s)
        try:
            payload, pixels = make(item, setup)
        except PictureError as error:
            outcomes.append(error.reason)
            continue
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # what follows takes bounded time
        # Copy header and payload into the area, one record after another.
        before = header(item.label, setup.codec, payload)
        first, end = start + offset + len(before), start + offset + len(before) + len(payload)
        memory[start + offset : first] = before
        memory[first:end] = payload  # fits: sum_offset leaves space for the largest payloads
        outcomes.append((offset, len(before) + len(payload)))
        offset = end - start
        kernel.add(pixels, total, products)
    at[0] = 0
    return messages.Done(job.number, outcomes, products.ravel().tolist())


def make(item: Item, setup: messages.Setup) -> tuple[bytes | memoryview, npt.NDArray[np.uint8]]:
    """Return the payload of one item, and the pixels that a reader decodes from it: (side, side, 3) uint8.

    The statistics are those of the decoded pixels, so that they match what training sees.
    """
    content = read_bytes(item.path, item.source, item.offset, item.size)
    if item.form is Form.CIFAR:
        content = CIFAR_HEADER + np.frombuffer(content, np.uint8).reshape(3, -1).T.tobytes()  # planes to pixels
    pixels = load_picture(content, source=item.source, side=setup.side)
    if setup.codec == "raw":
        return pixels.data.cast("B"), pixels  # flat: an mmap slice takes bytes of one dimension
    assert setup.codec == "jpeg", "centered records are made from raw ones"
    payload = encode(pixels, setup.codec, setup.parameters)
    return payload, decode(payload, CODECS[setup.codec], side=setup.side)


if __name__ == "__main__":
    with (
        socket.socket(fileno=int(sys.argv[1])) as end,
        suppress(BrokenPipeError, ConnectionResetError),
    ):  # the pool died
        main(end, int(sys.argv[2]))
