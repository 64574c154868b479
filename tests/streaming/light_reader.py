"""A reader that costs little, so that thousands of them fit beside the service: it keeps what the ids of events say."""

import asyncio
import re
import time
from typing import Self
from urllib.parse import urlsplit

EVENT = re.compile(rb"id: (\d+)-\d+\nevent: (\w+)\ndata: \{[^\n]*?\"status\":\"(\w+)\"[^\n]*\n\n")


class LightReader(asyncio.Protocol):
    """One open stream of a job. `seen`: (version, status, time.monotonic of its arrival) of each event."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._rest = b""
        self.seen: list[tuple[int, str, float]] = []
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    @classmethod
    async def open(cls, url: str, path: str, key: str) -> Self:
        """Sends the request. HTTP/1.0, so that no chunks stand between the events."""
        parts = urlsplit(url)
        request = f"GET {path} HTTP/1.0\r\nHost: {parts.netloc}\r\nX-API-Key: {key}\r\n\r\n".encode()
        loop = asyncio.get_running_loop()
        _, reader = await loop.create_connection(lambda: cls(request), parts.hostname, parts.port)
        return reader

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now, end = time.monotonic(), 0
        self._rest += data
        for event in EVENT.finditer(self._rest):
            self.seen.append((int(event[1]), event[3].decode(), now))
            end = event.end()
        self._rest = self._rest[end:]
        if self.seen and not self.began.done():
            self.began.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        for end in (self.began, self.ended):
            if not end.done():
                end.set_result(None)
