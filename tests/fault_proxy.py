"""A TCP proxy that stands before Postgres or Redis and fails on command, as networks and machines do."""

import asyncio
import contextlib
import socket
import struct
from typing import Self
from urllib.parse import urlsplit, urlunsplit

_RST_ON_CLOSE = struct.pack("ii", 1, 0)
_CHUNK_bytes = 2**16


class FaultProxy:
    """`async with FaultProxy(url) as proxy:` passes everything on until told otherwise; `proxy.url` leads through it.

    What is frozen is kept, as a machine that hangs keeps it, and goes on its way when thawed.
    """

    def __init__(self, url: str) -> None:
        self._behind = urlsplit(url)
        self._asks, self._answers = asyncio.Event(), asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._port = 0

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.thaw()
        self.refuse()
        await asyncio.gather(*self._serving)

    @property
    def url(self) -> str:
        return urlunsplit(self._behind._replace(netloc=f"{self._user}127.0.0.1:{self._port}"))

    async def accept(self) -> None:
        """Listens, again on the same port after `refuse`, and passes everything on."""
        self.thaw()
        self._server = await asyncio.start_server(self._begin, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def freeze(self) -> None:
        """Takes connections and bytes, and passes nothing on."""
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
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            writer.transport.abort()

    def refuse(self) -> None:
        """As if nothing listened: resets every connection and refuses new ones."""
        self._server.close()
        self.cut()

    @property
    def _user(self) -> str:
        return f"{self._behind.username}@" if self._behind.username else ""

    def _begin(self, asker: asyncio.StreamReader, to_asker: asyncio.StreamWriter) -> None:
        serving = asyncio.create_task(self._serve(asker, to_asker))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    async def _serve(self, asker: asyncio.StreamReader, to_asker: asyncio.StreamWriter) -> None:
        self._open.add(to_asker)
        try:
            store, to_store = await asyncio.open_connection(self._behind.hostname, self._behind.port)
            self._open.add(to_store)
            await asyncio.gather(_pass_on(asker, to_store, self._asks), _pass_on(store, to_asker, self._answers))
        except OSError:  # nothing listens behind us: then neither do we
            to_asker.transport.abort()
        self._open -= {to_asker, to_store}


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while chunk := await source.read(_CHUNK_bytes):
            await flowing.wait()
            target.write(chunk)
            await target.drain()
    target.close()
