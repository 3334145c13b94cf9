"""TCP links that can be cut, whole or in part, held, delayed and left half open, on any machine and without privileges.

All links run in one asyncio loop in a thread of its own; the methods of :class:`Links` are for other threads. A link
delivers bytes in order or ends the connection: like TCP, it loses nothing silently.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, TypeVar

T = TypeVar("T")

HOST: Final = "127.0.0.1"
"""Address that nodes listen at. Links listen at other loopback addresses, so that one name can stand for all of them."""

CHUNK_BYTES: Final = 1 << 18
CHUNKS_IN_FLIGHT: Final = 64
"""With CHUNK_BYTES, 16 MiB per direction: as much as a real link of high latency holds, and a bound on memory."""

ANSWER_S: Final = 10.0
"""Timeout for the loop's thread to do a request; every request is instant."""


class Link:
    """One link: it listens at ``host``:``port`` and relays connections to port ``target`` of this machine.

    Fields:
        delay_s: delay of every byte, in both directions.
        held_bytes, delayed_bytes: bytes so far that a hold or a delay has stopped.
    """

    def __init__(self, target: int, host: str, port: int) -> None:
        self.target, self.host, self.port = target, host, port
        self.delay_s = 0.0
        self.held_bytes = self.delayed_bytes = 0
        self._half_open = False
        self._flowing = asyncio.Event()  # bound to a loop at its first wait (Python 3.10), so any thread may make it
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._client_ends: set[asyncio.StreamWriter] = set()
        self._node_ends: set[asyncio.StreamWriter] = set()

    async def listen(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._relay, self.host, self.port)

    async def cut(self) -> int:
        """Reset every connection and refuse new ones until ``listen``; return the number of connections."""
        if self._server:
            self._server.close()  # stops listening; connections are separate
            self._server = None
        _abort(self._node_ends)
        return _abort(self._client_ends)

    async def cut_one(self, which: int) -> bool:
        """Reset one of several connections; return whether there were several."""
        ends = sorted(self._client_ends, key=id)
        return len(ends) > 1 and bool(_abort({ends[which % len(ends)]}))

    async def hold(self) -> None:
        """Relay nothing and end nothing; bytes sent meanwhile arrive after ``release``."""
        self._flowing.clear()

    async def release(self) -> None:
        """Relay again, held bytes first."""
        self._flowing.set()

    async def leave_half_open(self) -> int:
        """End the connections to the node and return their number.

        The clients' connections stay open and are read, but lead nowhere.
        """
        self._half_open = True
        return _abort(self._node_ends)

    async def end_half_open(self) -> None:
        """End the clients' connections too; new ones work again."""
        self._half_open = False
        _abort(self._client_ends)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._client_ends.add(writer)
        try:
            if not self._half_open:
                await self._connect_through(reader, writer)
            # Not `else`: leave_half_open() may have ended the connection to the node while it was relayed. Reading on
            # empties the client's socket buffers, so that the client notices nothing.
            if self._half_open:
                with suppress(ConnectionError):
                    while await reader.read(CHUNK_BYTES):
                        pass
        except asyncio.CancelledError:  # by _end(); Python 3.11 logs a cancelled handler as an error
            return
        finally:
            _abort({writer})
            self._client_ends.discard(writer)

    async def _connect_through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            node_reader, node_writer = await asyncio.open_connection(HOST, self.target)
        except ConnectionError:  # no node listens
            return
        self._node_ends.add(node_writer)
        pumps = [asyncio.create_task(self._pump(*ends)) for ends in ((reader, node_writer), (node_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The end of one direction ends both, as the end of a process at either side does.
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)  # the streams are free after that
            _abort({node_writer})
            self._node_ends.discard(node_writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one direction until an end closes. Reading and writing overlap, so that delay costs no throughput."""
        # Bounded: if it is full, nothing is read, and TCP makes the sender wait.
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_IN_FLIGHT)
        taking = asyncio.create_task(self._take(reader, chunks))
        try:
            while True:
                due, data = await chunks.get()
                await _until(due)
                if not self._flowing.is_set():
                    self.held_bytes += len(data)
                await self._flowing.wait()
                # After both waits: the end of a connection is delayed and held as its bytes are.
                if not data:
                    return
                writer.write(data)
                await writer.drain()  # waits for a slow receiver
        except ConnectionError:
            return
        finally:
            taking.cancel()

    async def _take(self, reader: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b"-"  # anything but empty: an empty chunk stands for the end
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                data = b""  # a reset: relayed as the end, after the bytes before it
            if self.delay_s:
                self.delayed_bytes += len(data)
            # Each chunk has its time, and the queue keeps its order also when the delay becomes shorter.
            await chunks.put((asyncio.get_running_loop().time() + self.delay_s, data))


class Links:
    """All links of a run and their thread; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._links: list[Link] = []

    def __enter__(self) -> Links:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)  # stop() alone is not thread-safe, and would not wake the loop
        self._thread.join(ANSWER_S)
        self._loop.close()

    def new(self, target: int, host: str, port: int) -> Link:
        """Return a link to port ``target`` of this machine that accepts connections."""

        async def make() -> Link:
            link = Link(target, host, port)
            await link.listen()
            return link

        self._links.append(self.do(make()))
        return self._links[-1]

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine such as ``link.cut()`` in the loop; return its result."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(ANSWER_S)

    async def _end(self) -> None:
        for link in self._links:
            await link.cut()
        # Tasks that still wait, for held bytes or a half-open client, would be destroyed with the loop.
        relaying = asyncio.all_tasks() - {asyncio.current_task()}
        for task in relaying:
            task.cancel()
        await asyncio.gather(*relaying, return_exceptions=True)


def _abort(writers: set[asyncio.StreamWriter]) -> int:
    """End connections at once and return their number; bytes that they still had to send are lost."""
    # abort() only schedules the end, so the set does not change while it is iterated.
    for writer in writers:
        writer.transport.abort()
    return len(writers)


async def _until(due: float) -> None:
    """Wait for a time of the loop's clock."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(due):  # an absolute time; asyncio.sleep() takes a duration
            await asyncio.Event().wait()  # never set
