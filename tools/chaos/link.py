"""TCP links that can be cut, held, delayed and left half open, on any machine and without privileges.

Rules of this file: all links live in one asyncio loop in a thread of its own; the methods of :class:`Links` are for other
threads. Bytes that were taken from one end are given to the other in order, or the connection ends: a link loses
nothing silently, as TCP does not.
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
"""Where nodes listen; links do at other addresses of the loopback network, so that one name can stand for them all."""

CHUNK_BYTES: Final = 1 << 18
CHUNKS_ON_THE_WAY: Final = 64
"""16 MiB per direction: as much as a real link of high latency holds, and no more memory than that."""

ANSWER_S: Final = 10.0
"""How long the loop's thread may take for what is asked of it: all of it is instant."""


class Link:
    """One link: listens at ``port`` of ``host``, and carries what comes to the port ``target`` of here and back."""

    def __init__(self, target: int, host: str, port: int) -> None:
        self.target, self.host, self.port = target, host, port
        self.delay_s = 0.0
        self._half_open = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._near: set[asyncio.StreamWriter] = set()
        self._far: set[asyncio.StreamWriter] = set()

    async def raise_up(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._carry, self.host, self.port)

    async def cut(self) -> None:
        """End every connection and refuse new ones, until it is raised again."""
        if self._server:
            self._server.close()
            self._server = None
        _abort(self._near | self._far)

    async def hold(self) -> None:
        """Carry nothing, end nothing; what is sent meanwhile arrives when the link is let go."""
        self._flowing.clear()

    async def let_go(self) -> None:
        """Carry on, late."""
        self._flowing.set()

    async def leave_half_open(self) -> None:
        """The far ends see their connections end; the near ends see nothing, and talk to nobody."""
        self._half_open = True
        _abort(self._far)

    async def make_whole(self) -> None:
        """The near ends learn the truth."""
        self._half_open = False
        _abort(self._near)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._near.add(writer)
        try:
            if not self._half_open:
                await self._connect_through(reader, writer)
            if self._half_open:
                with suppress(ConnectionError):
                    while await reader.read(CHUNK_BYTES):
                        pass
        finally:
            _abort({writer})
            self._near.discard(writer)

    async def _connect_through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self.target)
        except ConnectionError:  # nobody is there
            return
        self._far.add(far_writer)
        pumps = [asyncio.create_task(self._pump(*ends)) for ends in ((reader, far_writer), (far_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            _abort({far_writer})
            self._far.discard(far_writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction until an end is gone; reading and writing overlap, so that delay is not slowness."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_ON_THE_WAY)
        taking = asyncio.create_task(self._take(reader, chunks))
        try:
            while True:
                due, data = await chunks.get()
                await _until(due)
                await self._flowing.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            return
        finally:
            taking.cancel()

    async def _take(self, reader: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                data = b""
            await chunks.put((asyncio.get_running_loop().time() + self.delay_s, data))


class Links:
    """All links of a run, and the thread that carries them; a context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._links: list[Link] = []

    def __enter__(self) -> Links:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S)
        self._loop.close()

    def new(self, target: int, host: str, port: int) -> Link:
        """A link that is up, to the port ``target`` of this machine."""

        async def make() -> Link:
            link = Link(target, host, port)
            await link.raise_up()
            return link

        self._links.append(self.do(make()))
        return self._links[-1]

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        """Have the loop do something, such as ``link.cut()``, and wait until it is done."""
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(ANSWER_S)

    async def _end(self) -> None:
        for link in self._links:
            await link.cut()
        carrying = asyncio.all_tasks() - {asyncio.current_task()}
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)


def _abort(writers: set[asyncio.StreamWriter]) -> None:
    """End connections at once, with what they still had to send."""
    for writer in writers:
        writer.transport.abort()


async def _until(due: float) -> None:
    """Wait for a moment of the loop's clock."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(due):
            await asyncio.Event().wait()
