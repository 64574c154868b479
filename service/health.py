"""Is it alive, is it ready, and if not, what is down."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from service.errors import ReadOnly, Unavailable
from service.stores.connections import Postgres
from service.stores.event_channel import EventChannel
from service.stores.limit_log import LimitLog
from service.stores.migrate import pending
from service.stores.status_cache import StatusCache

NO_EVICTION: Final = "noeviction"
ANSWERS_WITHIN_s: Final = 1.0
"""Whoever asks is not told more slowly, however long Postgres is silent."""


class Health:
    """`/healthz`: this process answers. `/readyz`: everything it needs answers too."""

    def __init__(
        self,
        postgres: Postgres,
        database_url: str,
        cache: StatusCache,
        channel: EventChannel,
        limit_log: LimitLog,
        leaving: asyncio.Event,
    ) -> None:
        """`leaving`: set once this process has been told to end."""
        self._postgres = postgres
        self._database_url = database_url
        self._cache = cache
        self._channel = channel
        self._limit_log = limit_log
        self._leaving = leaving
        self._migrated = False
        self._look: asyncio.Task[dict[str, str]] | None = None

    async def healthz(self, request: web.Request) -> web.StreamResponse:
        """200 as long as the event loop turns."""
        return web.json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.StreamResponse:
        """200, or 503 that names what is down and what to do."""
        down = self._whether_it_leaves() | await self._what_postgres_lacks() | self._what_redis_lacks()
        if down:
            return web.json_response({"status": "unavailable", "down": down}, status=503, headers={"Retry-After": "2"})
        return web.json_response({"status": "ready", "down": {}})

    def _whether_it_leaves(self) -> dict[str, str]:
        if not self._leaving.is_set():
            return {}
        return {"process": "was told to end: it answers what still comes, and others take over"}

    async def _what_postgres_lacks(self) -> dict[str, str]:
        """Everyone who asks while it is looked at shares the look."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._look_at_postgres())
        await asyncio.wait([self._look], timeout=ANSWERS_WITHIN_s)
        return self._look.result() if self._look.done() else _without_postgres("does not answer")

    async def _look_at_postgres(self) -> dict[str, str]:
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_s):
                if not self._migrated and (missing := await pending(self._database_url, timeout_s=ANSWERS_WITHIN_s)):
                    return {"migrations": f"{', '.join(missing)} not applied: run `python -m service migrate`"}
                self._migrated = True
                await self._postgres.check()
        except ReadOnly:
            return {"postgres_writes": "Postgres is read-only: polls are answered, reports are refused with 503"}
        except Unavailable as error:
            return _without_postgres(error.detail)
        except TimeoutError:
            return _without_postgres("does not answer")
        return {}

    def _what_redis_lacks(self) -> dict[str, str]:
        down: dict[str, str] = {}
        if not self._cache.trusted:
            down["redis"] = "cannot be reached or is still being brought up to date: polls are answered from Postgres"
        elif self._cache.policy not in ("", NO_EVICTION):
            down["redis_policy"] = (
                f"maxmemory-policy is {self._cache.policy}: set it to {NO_EVICTION}, or limits and leases may vanish"
            )
        if self._limit_log.refusal:
            down["redis_writes"] = (
                f"Redis refuses what is written ({self._limit_log.refusal}): answers that it does not hold come from "
                "Postgres, and each process limits by what it granted itself"
            )
        if not self._channel.up:
            down["events"] = (
                "the subscription to Redis hears nothing: streams and waits learn of changes from Postgres, each second"
            )
        return down


def _without_postgres(why: str) -> dict[str, str]:
    return {"postgres": f"{why}: polls are answered from Redis, reports are refused with 503"}
