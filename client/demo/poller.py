"""A plain poller: it asks for each job every half second, until the job is finished, and fetches the result."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from client.demo.calls import FINISHED, call

EVERY_s: Final = 0.5


@dataclass(slots=True)
class Polled:
    """What polling one job has brought so far."""

    asked: int = 0
    unchanged: int = 0
    job: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


async def poll(session: aiohttp.ClientSession, job_id: str, polled: Polled) -> None:
    """Asks until the job is finished, and tells in `polled` what came. Raises calls.Refused."""
    known: dict[str, str] = {}
    while polled.job is None or polled.job["status"] not in FINISHED:
        if polled.asked:
            await asyncio.sleep(EVERY_s)
        answer = await call(session, "GET", f"jobs/{job_id}", headers=known)
        polled.asked += 1
        if answer.status == 304:
            polled.unchanged += 1
        else:
            polled.job = answer.json()
            known = {"If-None-Match": answer.headers["ETag"]}
    if "result_url" in polled.job:
        polled.result = (await call(session, "GET", f"jobs/{job_id}/result")).json()
