"""Is it alive, is it ready, and if not, what is down."""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web

from service.errors import Unavailable
from service.stores.connections import Postgres
from service.stores.migrate import pending
from service.stores.status_cache import StatusCache

NO_EVICTION: Final = "noeviction"


class Health:
    """`/healthz`: this process answers. `/readyz`: everything it needs answers too."""

    def __init__(self, postgres: Postgres, database_url: str, cache: StatusCache, leaving: asyncio.Event) -> None:
        """`leaving`: set once this process has been told to end."""
        self._postgres = postgres
        self._database_url = database_url
        self._cache = cache
        self._leaving = leaving
        self._migrated = False

    async def healthz(self, request: web.Request) -> web.StreamResponse:
        """200 as long as the event loop turns."""
        return web.json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.StreamResponse:
        """200, or 503 that names what is down and what to do."""
        down = await self._what_is_down()
        if down:
            return web.json_response({"status": "unavailable", "down": down}, status=503, headers={"Retry-After": "2"})
        return web.json_response({"status": "ready", "down": {}})

    async def _what_is_down(self) -> dict[str, str]:
        down: dict[str, str] = {}
        if self._leaving.is_set():
            down["process"] = "was told to end: it answers what still comes, and others take over"
        try:
            if not self._migrated and (missing := await pending(self._database_url)):
                down["migrations"] = f"{', '.join(missing)} not applied: run `python -m service migrate`"
            else:
                await self._postgres.execute("select 1")
                self._migrated = True
        except Unavailable:
            down["postgres"] = "cannot be reached: polls are answered from Redis, reports are refused with 503"
        if not self._cache.trusted:
            down["redis"] = "cannot be reached or is still being brought up to date: polls are answered from Postgres"
        elif self._cache.policy not in ("", NO_EVICTION):
            down["redis_policy"] = (
                f"maxmemory-policy is {self._cache.policy}: set it to {NO_EVICTION}, or limits and leases may vanish"
            )
        return down
