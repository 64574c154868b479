"""The composition root: builds every part, joins them, opens and closes them. It decides nothing; read it downwards."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import structlog
from aiohttp import web

from service.authentication import Door
from service.errors import Unavailable
from service.health import Health
from service.middlewares import STATUS_OF, RequestIds, request_middleware
from service.polling.handler import Polling
from service.polling.operation import ResultReader, StatusReader
from service.reporting.announcer import Announcer
from service.reporting.collector import Collector
from service.reporting.handler import Writing
from service.reporting.operation import Reporting
from service.reporting.relay import Gate, Relay
from service.requests import RESULT_LIMIT
from service.routes import routes
from service.settings import Settings
from service.stores.connections import Postgres
from service.stores.job_table import JobTable
from service.stores.key_memory import KeyMemory
from service.stores.key_table import KeyTable
from service.stores.outbox_table import OutboxTable
from service.stores.redis_pipe import RedisPipe
from service.stores.status_cache import StatusCache
from service.stores.status_memory import StatusMemory

KEYS_CHECKED_EVERY_s: Final = 1.0

REQUEST_IDS: Final = web.AppKey("request_ids", RequestIds)

_log = structlog.get_logger(__name__)


def make_app(settings: Settings) -> web.Application:
    """The whole service as one aiohttp application."""
    # stores
    postgres = Postgres(
        settings.database_url,
        pool_size=settings.pool_size,
        prepared_statements=settings.prepared_statements,
        timeout_s=settings.database_timeout_s,
    )
    polls = RedisPipe(settings.redis_url, deadline_s=settings.redis_deadline_s, scripts=StatusCache.scripts)
    puts = RedisPipe(settings.redis_url, deadline_s=settings.redis_deadline_s, scripts=StatusCache.scripts)
    cache = StatusCache(polls, puts, process_token=secrets.token_hex(6))
    memory = StatusMemory(settings.memory_entries, settings.memory_bytes)
    jobs, outbox = JobTable(postgres), OutboxTable(postgres)
    keys = KeyMemory(KeyTable(postgres))
    postgres.on_identity.append(lambda identity: setattr(cache, "postgres_identity", identity))
    cache.on_new_life.append(memory.clear)

    # rooms
    reader = StatusReader(postgres, jobs, cache, memory)
    announcer = Announcer(cache, memory, outbox)
    collector = Collector(jobs, announcer)
    gate = Gate(outbox, cache)
    relay = Relay(postgres, jobs, outbox, cache)
    reporting = Reporting(postgres, jobs, collector, announcer)

    # addresses
    request_ids = RequestIds()
    app = web.Application(
        middlewares=[request_middleware(request_ids, access_log=settings.access_log)],
        client_max_size=RESULT_LIMIT,
    )
    app[REQUEST_IDS] = request_ids
    app.add_routes(
        routes(
            Door(keys),
            Polling(reader, ResultReader(jobs, reader)),
            Writing(reporting, STATUS_OF),
            Health(postgres, settings.database_url, cache),
        )
    )

    async def stores(app: web.Application) -> AsyncIterator[None]:
        await postgres.open()
        await _warn_of_weak_durability(postgres)
        await polls.start()
        await puts.start()
        yield
        gate.close()
        await collector.close()
        await reader.close()
        await polls.close()
        await puts.close()
        await postgres.close()

    async def background(app: web.Application) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(relay.run()), asyncio.create_task(_every(KEYS_CHECKED_EVERY_s, keys.tick))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app.cleanup_ctx.extend([stores, background])
    return app


async def _every(seconds: float, work: Callable[[], Awaitable[Any]]) -> None:
    """Repeats `work` until cancelled, whatever happens to it."""
    while True:
        try:
            await work()
        except Exception:
            _log.exception("tick_failed")
        await asyncio.sleep(seconds)


async def _warn_of_weak_durability(postgres: Postgres) -> None:
    try:
        weak = await postgres.weak_durability()
    except Unavailable:
        return
    if weak:
        _log.warning("acknowledged_reports_may_be_lost_in_a_crash", switched_off=weak)
