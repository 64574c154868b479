"""A TCP proxy that stands before Postgres or Redis and fails on command, as networks and machines do."""

import asyncio
import contextlib
import socket
import struct
from typing import Self
from urllib.parse import urlsplit, urlunsplit


class FaultProxy:
    """`async with FaultProxy(url) as proxy:` passes everything on until told otherwise; `proxy.url` leads through it."""

    def __init__(self, url: str) -> None:
        self._behind = urlsplit(url)
        self._port = 0
        self._asks, self._answers = asyncio.Event(), asyncio.Event()
        self._open: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.thaw()
        self.refuse()
        await asyncio.gather(*filter(None, self._open.values()))

    async def accept(self) -> None:
        """Listens, again on the same port after `refuse`, and passes everything on."""
        self.thaw()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = urlunsplit(self._behind._replace(netloc=f"{self._behind.username or ''}@127.0.0.1:{self._port}"))

    def lead_to(self, url: str) -> None:
        """To another store from now on, as a failover does: what is connected is cut."""
        self._behind = urlsplit(url)
        self.cut()

    def freeze(self) -> None:
        """Takes connections and bytes, keeps them, and passes nothing on."""
        self._asks.clear()
        self._answers.clear()

    def hold_answers(self) -> None:
        """What is asked arrives; no answer comes back."""
        self._answers.clear()

    def thaw(self) -> None:
        """Passes on what was kept and all that follows."""
        self._asks.set()
        self._answers.set()

    def cut(self) -> None:
        """Resets every connection; what was kept is lost. New ones are taken."""
        for writer in self._open:
            if not writer.is_closing():
                reset = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()

    def refuse(self) -> None:
        """As if nothing listened: resets every connection and refuses new ones."""
        self._server.close()
        self.cut()

    async def _serve(self, asker: asyncio.StreamReader, to_asker: asyncio.StreamWriter) -> None:
        if not self._server.is_serving():  # it came in the very moment in which we ceased to listen
            to_asker.transport.abort()
            return
        self._open[to_asker] = asyncio.current_task()
        with contextlib.suppress(OSError):  # nothing listens behind us: then neither do we
            store, to_store = await asyncio.open_connection(self._behind.hostname, self._behind.port)
            self._open[to_store] = None
            await asyncio.gather(_pass_on(asker, to_store, self._asks), _pass_on(store, to_asker, self._answers))
            del self._open[to_store]
        to_asker.transport.abort()
        del self._open[to_asker]


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while chunk := await source.read(2**16):
            await flowing.wait()
            target.write(chunk)
            await target.drain()
    target.close()
