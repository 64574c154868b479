"""HTTP as the tests of the contract need it: answers taken apart, what every refusal looks like, bytes on a socket."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientSession
from aiohttp.test_utils import TestClient
from multidict import CIMultiDict, CIMultiDictProxy

JSON = {"Content-Type": "application/json"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ETAG = re.compile(r'"(\d+)-(\d+)"')

PROBLEM = ["type", "title", "status", "detail", "instance", "error", "details", "suggestions", "request_id"]


@dataclass
class Answer:
    """One answer, read to its end."""

    status: int
    headers: CIMultiDict[str] | CIMultiDictProxy[str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def problem(self, status: int, error_type: str) -> dict[str, Any]:
        """The body of a refusal, after checking all that every refusal promises."""
        assert self.status == status, self
        assert self.headers["Content-Type"] == "application/problem+json"
        said = self.json()
        assert list(said) == PROBLEM
        assert said["type"] == f"urn:jobwire:error:{error_type}"
        assert (said["status"], said["error"]) == (status, said["title"])
        assert said["details"]["error_type"] == error_type
        assert said["details"]["message"]
        assert said["detail"]
        assert said["suggestions"]
        assert said["request_id"] == self.headers["X-Request-Id"]
        assert "Traceback" not in self.body.decode()
        return said


async def ask(client: TestClient | ClientSession, method: str, path: str, **options: Any) -> Answer:
    """One request and its whole answer."""
    async with client.request(method, path, **options) as response:
        return Answer(response.status, response.headers, await response.read())


def fields_of(answer: Answer) -> list[str]:
    """The fields that a refusal names."""
    return list(answer.problem(422, "validation_failed")["details"]["fields"])


async def create(client: TestClient | ClientSession, **fields: Any) -> dict[str, Any]:
    """A new job in shape A."""
    answer = await ask(client, "POST", "/jobs", json={"type": "extraction", **fields})
    assert answer.status == 201, answer
    return answer.json()


async def report(client: TestClient | ClientSession, job_id: str, **said: Any) -> dict[str, Any]:
    """The job in shape A after a report that is taken."""
    answer = await ask(client, "PATCH", f"/jobs/{job_id}", json=said)
    assert answer.status == 200, answer
    return answer.json()


class Socket:
    """A connection on which anything can be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, *parts: bytes) -> None:
        """Sends `parts`; the service may have hung up before all is said."""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                self.writer.write(part)
                await self.writer.drain()

    async def answer(self) -> Answer:
        """The next answer; of a stream, which has no Content-Length, only the head."""
        async with asyncio.timeout(10):
            status = int((await self.reader.readline()).split()[1])
            headers: CIMultiDict[str] = CIMultiDict()
            while (line := (await self.reader.readline()).decode().rstrip("\r\n")) != "":
                name, _, value = line.partition(":")
                headers.add(name, value.strip())
            return Answer(status, headers, await self.reader.readexactly(int(headers.get("Content-Length", 0))))

    def cut(self) -> None:
        """RST, as a crash or a lost network."""
        self.writer.transport.abort()


def head(client: TestClient, address: str, *lines: str | bytes) -> bytes:
    """The head of a request with the client's key."""
    key = f"X-API-Key: {client.session.headers['X-API-Key']}"
    every = [f"{address} HTTP/1.1", "Host: here", key, *lines, "", ""]
    return b"\r\n".join(line if isinstance(line, bytes) else line.encode() for line in every)


@contextlib.asynccontextmanager
async def connected(client: TestClient) -> AsyncIterator[Socket]:
    """A socket to the service that `client` talks to."""
    reader, writer = await asyncio.open_connection(client.server.host, client.server.port, limit=2**20)
    try:
        yield Socket(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
