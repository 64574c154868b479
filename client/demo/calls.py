"""One request, sent until there is an answer: how an ordinary client of Jobwire waits when it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

FINISHED: Final = frozenset({"COMPLETED", "FAILED", "CANCELLED"})
BUSY: Final = frozenset({429, 502, 503, 504})
"""Too much, or not now, or a proxy finds nobody: the same request will do later."""
UNREACHABLE: Final = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError)
"""No whole answer came: the service restarts, or the line broke."""
PAUSE_s: Final = 1.0


class Refused(Exception):
    """The service will not do this, and sending it again will not help."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        super().__init__(f"{status}: {_detail(body)}")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)


def open_session(url: str, key: str) -> aiohttp.ClientSession:
    """A session whose paths are relative to `url`. Streams and polls share it, so it does not count connections."""
    return aiohttp.ClientSession(
        base_url=url.rstrip("/") + "/",
        headers={"X-API-Key": key},
        timeout=aiohttp.ClientTimeout(total=30),
        connector=aiohttp.TCPConnector(limit=0),
    )


async def call(session: aiohttp.ClientSession, method: str, path: str, **options: Any) -> Answer:
    """Sends until the answer is one to keep. Raises Refused.

    Only for requests that may be repeated: all reads and reports are, a creation is with an Idempotency-Key.
    """
    while True:
        try:
            async with session.request(method, path, **options) as response:
                answer = Answer(response.status, response.headers, await response.read())
        except UNREACHABLE:
            await asyncio.sleep(PAUSE_s)
            continue
        if answer.status in BUSY:
            await asyncio.sleep(retry_after_s(answer.headers))
        elif answer.status >= 400:
            raise Refused(answer.status, answer.body)
        else:
            return answer


def retry_after_s(headers: Mapping[str, str]) -> float:
    """The seconds of Retry-After; PAUSE_s where it says none."""
    said = headers.get("Retry-After", "")
    return float(said) if said.isdecimal() else PAUSE_s


def _detail(body: bytes) -> str:
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):  # not ours: a proxy's page, perhaps
        return body[:200].decode(errors="replace")
