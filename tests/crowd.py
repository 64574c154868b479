"""Thousands of polls that wait, held by a process of their own: what they cost must not delay what is measured.

`Crowd.open` sends them all; `Crowd.answers` ends once each has been answered.
"""

import asyncio
import json
import re
import resource
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

FILES = 16_384
LENGTH = re.compile(rb"content-length: (\d+)", re.I)
ETAG = re.compile(rb"etag: (\S+)", re.I)


class Ask(NamedTuple):
    """A poll that waits for the next version after `etag` or (None) for the end."""

    path: str
    etag: str | None = None
    wait_s: int = 30


@dataclass
class Answered:
    """`at`: time.monotonic of its first byte, which all processes of a machine share. Status 0: it was cut off."""

    status: int
    at: float
    etag: str
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Crowd:
    """The process."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def open(cls, url: str, key: str, asks: Sequence[Ask], within_s: float = 30) -> Self:
        """Returns once all are sent."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.crowd", stdin=PIPE, stdout=PIPE, limit=2**28
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([url, key, asks]).encode() + b"\n")
        async with asyncio.timeout(within_s):
            assert await process.stdout.readline() == b"sent\n"
        return cls(process)

    async def answers(self, within_s: float = 60) -> list[Answered]:
        """In the order of the asks. Ends the process."""
        async with asyncio.timeout(within_s):
            out, _ = await self._process.communicate()
        assert self._process.returncode == 0
        return [Answered(*each) for each in json.loads(out)]

    async def kill(self) -> None:
        """All clients are gone at once."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


def allow_many_files() -> None:
    """As far as this machine lets us; processes that are started from here inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Poll(asyncio.Protocol):
    """One poll on a connection of its own."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.at = 0.0
        self.data = b""
        self.transport: asyncio.Transport
        self.answered: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.at = self.at or time.monotonic()
        self.data += data
        head, end, body = self.data.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if end and len(body) >= (int(length[1]) if length else 0):
            etag = ETAG.search(head)
            status = int(head.split()[1])
            self._end(Answered(status, self.at, etag[1].decode() if etag else "", body.decode()))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(Answered(0, time.monotonic(), "", ""))

    def _end(self, answered: Answered) -> None:
        if not self.answered.done():
            self.answered.set_result(answered)
            self.transport.close()


async def _hold(url: str, key: str, asks: Sequence[Sequence[Any]]) -> None:
    host, port = urlsplit(url).hostname, urlsplit(url).port

    async def one(ask: Ask) -> _Poll:
        lines = [f"GET {ask.path} HTTP/1.1", "Host: x", f"X-API-Key: {key}", f"Prefer: wait={ask.wait_s}"]
        lines += [f"If-None-Match: {ask.etag}"] if ask.etag else []
        poll = _Poll("\r\n".join([*lines, "", ""]).encode())
        await asyncio.get_running_loop().create_connection(lambda: poll, host, port)
        return poll

    polls = await asyncio.gather(*(one(Ask(*ask)) for ask in asks))
    print("sent", flush=True)
    answers = [await poll.answered for poll in polls]
    print(json.dumps([[each.status, each.at, each.etag, each.body] for each in answers]))


if __name__ == "__main__":
    allow_many_files()
    asyncio.run(_hold(*json.loads(sys.stdin.readline())))
