"""Reads server-sent events as the WHATWG standard says: what came, in which order, and how it ended."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

from aiohttp import ClientResponse

from service.job import FINISHED

WITHIN_s = 10.0


@dataclass(frozen=True)
class Event:
    """One event. `at`: when it was read, on the monotonic clock."""

    id: str
    name: str
    data: dict[str, Any]
    at: float

    @property
    def version(self) -> int:
        return self.data["version"]

    @property
    def status(self) -> str | None:
        return self.data.get("status")


class Parser:
    """Bytes in, events out. Strict where the standard is lenient: an unknown field or a second `data:` is an error."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, str] = {}
        self.retry_ms: int | None = None
        self.comments = 0
        self.last_id = ""

    @property
    def is_whole(self) -> bool:
        """Whether nothing of an unfinished event is left."""
        return not self._rest and not self._fields

    def feed(self, data: bytes) -> list[Event]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [event for line in lines if (event := self._line(line.decode())) is not None]

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(": ")
        if line.startswith(":"):
            self.comments += 1
        elif name == "retry":
            assert self.retry_ms is None, "retry: stands once, at the beginning"
            self.retry_ms = int(value)
        else:
            assert name in ("id", "event", "data"), line
            assert name not in self._fields, f"{name} stands twice"
            self._fields[name] = value
        return None

    def _dispatch(self) -> Event | None:
        fields, self._fields = self._fields, {}
        if "id" in fields:
            self.last_id = fields["id"]
        if "data" not in fields:
            return None
        return Event(fields.get("id", ""), fields.get("event", "message"), json.loads(fields["data"]), time.monotonic())


class EventReader:
    """Events from wherever bytes come from; `more` returns b"" at a clean end and raises at any other."""

    def __init__(self, more: Callable[[], Awaitable[bytes]]) -> None:
        self._more = more
        self._ready: list[Event] = []
        self.parser = Parser()
        self.seen: list[Event] = []
        self.ended = False

    @classmethod
    def of(cls, response: ClientResponse) -> Self:
        """Of an answer that is a stream."""
        assert response.status == 200, response.status
        assert response.content_type == "text/event-stream"
        return cls(response.content.readany)

    async def next(self, within_s: float = WITHIN_s) -> Event:
        """The next event. Raises TimeoutError, EOFError."""
        async with asyncio.timeout(within_s):
            while not self._ready:
                await self._read()
                if self.ended and not self._ready:
                    raise EOFError("the stream has ended")
        event = self._ready.pop(0)
        self.seen.append(event)
        return event

    async def until(self, is_it: Callable[[Event], bool], within_s: float = WITHIN_s) -> Event:
        """Reads on to the first event that it is."""
        async with asyncio.timeout(within_s):
            while not is_it(event := await self.next(within_s)):
                pass
        return event

    async def rest(self, within_s: float = WITHIN_s) -> list[Event]:
        """All that comes until the stream ends cleanly."""
        async with asyncio.timeout(within_s):
            while not self.ended:
                await self._read()
        assert self.parser.is_whole
        rest, self._ready = self._ready, []
        self.seen += rest
        return rest

    async def quiet(self, for_s: float) -> bool:
        """Whether nothing but comments comes for so long."""
        try:
            await self.next(for_s)
        except TimeoutError:
            return True
        return False

    async def _read(self) -> None:
        data = await self._more()
        self.ended = not data
        self._ready += self.parser.feed(data)


class RawReader:
    """A socket of our own, with nothing between us and the wire: it can be slow, silent, and rude."""

    _opened: ClassVar[list[Self]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.address = writer.get_extra_info("sockname")
        self.head = b""
        self.events = EventReader(self._chunk)

    @classmethod
    async def open(
        cls,
        url: str,
        path: str,
        key: str | None = None,
        *,
        http: str = "1.1",
        method: str = "GET",
        receives: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> Self:
        """Sends the request. `receives`: how many bytes the kernel may take before somebody reads."""
        parts = urlsplit(url)
        wire = socket.socket()
        wire.setblocking(False)
        if receives is not None:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        await asyncio.get_running_loop().sock_connect(wire, (parts.hostname, parts.port))
        # A reader of asyncio reads ahead as far as its limit.
        reader, writer = await asyncio.open_connection(sock=wire, limit=2**12 if receives is not None else 2**16)
        given = {"Host": parts.netloc, **({"X-API-Key": key} if key else {}), **(headers or {})}
        lines = [f"{method} {path} HTTP/{http}", *(f"{name}: {value}" for name, value in given.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        raw = cls(reader, writer)
        cls._opened.append(raw)
        return raw

    async def answer(self) -> int:
        """Reads the head of the answer; its status."""
        async with asyncio.timeout(WITHIN_s):
            self.head = await self.reader.readuntil(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in self.head.lower():
            self.events = EventReader(lambda: self.reader.read(2**16))
        return int(self.head.split()[1])

    async def _chunk(self) -> bytes:
        """One chunk; b"" is the last. Raises IncompleteReadError when the connection ends before it."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    def hang_up(self) -> None:
        """By RST: as a machine that lost its network and its patience."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    @classmethod
    async def close_all(cls) -> None:
        """What tests have left open."""
        opened, cls._opened = cls._opened, []
        for raw in opened:
            raw.writer.transport.abort()
            with suppress(ConnectionError):
                await raw.writer.wait_closed()


@asynccontextmanager
async def events_of(client: Any, job_id: str, **options: Any) -> AsyncIterator[EventReader]:
    """The stream of a job, opened with an aiohttp client of any kind."""
    async with client.get(f"/jobs/{job_id}/events", **options) as response:
        yield EventReader.of(response)


def assert_true_to(events: list[Event], *, ends: str = "COMPLETED") -> None:
    """What holds for every reader of one job whatever happened: never back, and the last word is the end."""
    versions = [event.version for event in events]
    assert versions == sorted(set(versions)), versions
    assert events[-1].status == ends
    assert not any(event.status in FINISHED for event in events[:-1])


async def comes_true(is_so: Callable[[], Any], within_s: float = WITHIN_s) -> None:
    """Looks until it is so. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while True:
            answer = is_so()
            if await answer if asyncio.iscoroutine(answer) else answer:
                return
            await asyncio.sleep(0.02)
