"""Speaks to web processes as workers and readers do, and measures how long they take."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from tests.web_process import WebProcess


@dataclass
class Answer:
    """One answer; `version` is its ETag's."""

    status: int
    headers: Any
    body: bytes
    took_s: float

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def etag(self) -> str:
        return self.headers["ETag"]

    @property
    def version(self) -> int:
        return int(self.etag.strip('"').partition("-")[0])

    @property
    def warning(self) -> str:
        """The code of its Warning header, or ''."""
        return self.headers.get("Warning", "")[:3]


class Speaker:
    """Everything is said with one key, on connections that are kept."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def create(self, web: WebProcess, job_id: str, **fields: Any) -> Answer:
        answer = await self.ask(web, "POST", "/jobs", json={"id": job_id, "type": "extraction", **fields})
        assert answer.status == 201, answer
        return answer

    async def report(self, web: WebProcess, job_id: str, **said: Any) -> Answer:
        return await self.ask(web, "PATCH", f"/jobs/{job_id}", json=said)

    async def say(self, web: WebProcess, job_id: str, message: str) -> Answer:
        """A report of a new progress message that must be acknowledged."""
        answer = await self.report(web, job_id, progress={"message": message})
        assert answer.status == 200, answer
        return answer

    async def poll(self, web: WebProcess, job_id: str, *, etag: str | None = None, shape_b: bool = False) -> Answer:
        path = f"/jobs/{job_id}/status" if shape_b else f"/jobs/{job_id}"
        return await self.ask(web, "GET", path, headers={"If-None-Match": etag} if etag else {})

    async def ask(self, web: WebProcess, method: str, path: str, **request: Any) -> Answer:
        started = time.monotonic()
        async with self._session.request(method, web.url + path, **request) as response:
            body = await response.read()
        return Answer(response.status, response.headers, body, time.monotonic() - started)


@asynccontextmanager
async def speaking(key: str) -> AsyncIterator[Speaker]:
    async with aiohttp.ClientSession(
        headers={"X-API-Key": key},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=60),
    ) as session:
        yield Speaker(session)


async def until(holds: Callable[[], Awaitable[Any]], within_s: float) -> float:
    """Asks `holds` again and again until what it says is true; returns after how long. Fails after `within_s`."""
    started = time.monotonic()
    while not await holds():
        assert time.monotonic() - started < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - started
