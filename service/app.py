"""The composition root: builds every part, joins them, opens and closes them. It decides nothing; read it downwards."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import structlog
from aiohttp import web

from service.authentication import Door
from service.cors import Cors, preflight_middleware
from service.errors import RedisAway, Unavailable
from service.health import Health
from service.hub import Hub
from service.limiting.addresses import networks
from service.limiting.handler import Limits
from service.limiting.limiter import Limiter
from service.listing.cursor import Cursors
from service.listing.handler import Listing
from service.listing.operation import Pages
from service.metrics import COPIED_EVERY_s, Metrics, Parts
from service.middlewares import STATUS_OF, Problems, RequestIds, request_middleware
from service.pages.handler import ApiPages
from service.polling.handler import Polling
from service.polling.many_handler import PollingMany
from service.polling.many_operation import BatchReader
from service.polling.operation import ResultReader, Waiting
from service.reporting.announcer import Announcer
from service.reporting.collector import Collector
from service.reporting.handler import Writing
from service.reporting.operation import Reporting
from service.reporting.relay import Gate, Relay
from service.requests import RESULT_LIMIT
from service.routes import routes
from service.settings import Settings
from service.status_reader import StatusReader
from service.stores.batch_table import BatchTable
from service.stores.change_table import ChangeTable
from service.stores.connections import Postgres
from service.stores.event_channel import EventChannel
from service.stores.job_table import JobTable
from service.stores.key_memory import KeyMemory
from service.stores.key_table import KeyTable
from service.stores.limit_log import LimitLog
from service.stores.outbox_table import OutboxTable
from service.stores.page_table import PageTable
from service.stores.public_memory import PublicMemory
from service.stores.redis_pipe import RedisPipe
from service.stores.status_cache import StatusCache
from service.stores.status_memory import StatusMemory
from service.stores.ticket_table import TicketTable
from service.stores.truth import Truth
from service.streaming.handler import Streaming, tell_in_stream
from service.streaming.many_operation import Following
from service.streaming.operation import Streams
from service.streaming.socket_handler import Sockets
from service.streaming.ticket_operation import TicketOffice
from service.tickets import Tickets

KEYS_CHECKED_EVERY_s: Final = 1.0
PROCESSES_COUNTED_EVERY_s: Final = 1.0
LIMITS_FORGOTTEN_EVERY_s: Final = 5.0
FORGOTTEN_EVERY_s: Final = 60.0

REQUEST_IDS: Final = web.AppKey("request_ids", RequestIds)
PROBLEMS: Final = web.AppKey("problems", Problems)
CORS: Final = web.AppKey("cors", Cors)
LEAVING: Final = web.AppKey("leaving", asyncio.Event)
"""Set once this process has been told to end."""

_log = structlog.get_logger(__name__)


def make_app(settings: Settings) -> web.Application:
    """The whole service as one aiohttp application."""
    # stores
    process = secrets.token_hex(6)
    postgres = Postgres(
        settings.database_url,
        pool_size=settings.pool_size,
        prepared_statements=settings.prepared_statements,
        timeout_s=settings.database_timeout_s,
    )
    polls = RedisPipe(
        settings.redis_url, deadline_s=settings.redis_deadline_s, scripts=(*StatusCache.scripts, *LimitLog.scripts)
    )
    puts = RedisPipe(settings.redis_url, deadline_s=settings.redis_deadline_s, scripts=StatusCache.scripts)
    cache = StatusCache(polls, puts, process_token=process)
    memory = StatusMemory(settings.memory_entries, settings.memory_bytes)
    jobs, batches, outbox = JobTable(postgres), BatchTable(postgres), OutboxTable(postgres)
    truth, changes = Truth(jobs, batches), ChangeTable(postgres)
    ticket_sets = TicketTable(postgres)
    keys, public = KeyMemory(KeyTable(postgres)), PublicMemory(jobs)
    channel = EventChannel(settings.redis_url)
    limit_log = LimitLog(polls)
    postgres.on_identity.append(lambda identity: setattr(cache, "postgres_identity", identity))
    cache.on_new_life.append(memory.clear)

    reader = StatusReader(postgres, truth, cache, memory)

    # rooms
    hub = Hub(channel, truth, changes, lambda: cache.life)
    postgres.on_identity.append(hub.begin_anew)
    limiter = Limiter(limit_log)
    waiting = Waiting(reader, hub)
    tickets = Tickets(settings.secrets)
    streams = Streams(hub, reader, most_per_key=settings.max_streams_per_key)
    keys.forgotten += [streams.end_of_keys, waiting.end_of_keys]
    announcer = Announcer(cache, memory, outbox)
    collector = Collector(jobs, announcer)
    gate = Gate(outbox, cache)
    relay = Relay(postgres, jobs, outbox, cache)
    reporting = Reporting(postgres, jobs, batches, collector, announcer)

    # addresses
    request_ids, problems = RequestIds(), Problems()
    app = web.Application(
        middlewares=[request_middleware(request_ids, problems, access_log=settings.access_log)],
        client_max_size=RESULT_LIMIT,
    )
    app[REQUEST_IDS], app[PROBLEMS] = request_ids, problems
    app[LEAVING] = leaving = asyncio.Event()
    if settings.cors_origins:  # without them no response pays for it
        app[CORS] = cors = Cors(settings.cors_origins)
        app.middlewares.append(preflight_middleware(cors))
        app.on_response_prepare.append(cors.mark_response)
    door = Door(keys, public, limiter, networks(settings.trusted_proxies), tickets, tell_in_stream)
    pages = ApiPages()
    addresses = routes(
        door,
        Polling(reader, ResultReader(jobs, reader), waiting),
        PollingMany(reader, BatchReader(batches, reader), waiting),
        Listing(Pages(PageTable(postgres), Cursors(settings.secrets))),
        Streaming(streams, Following(hub, reader, changes), TicketOffice(tickets, ticket_sets, reader)),
        Sockets(streams),
        Writing(reporting, STATUS_OF),
        Limits(limiter),
        Health(postgres, settings.database_url, cache, channel, limit_log, leaving),
        pages,
    )
    pages.describe(addresses, door)
    app.add_routes(addresses)

    metrics = settings.metrics_listen and Metrics(
        settings.metrics_listen,
        Parts(
            postgres=postgres,
            polls=polls,
            puts=puts,
            channel=channel,
            cache=cache,
            memory=memory,
            keys=keys,
            limit_log=limit_log,
            outbox=outbox,
            reader=reader,
            hub=hub,
            limiter=limiter,
            streams=streams,
            waiting=waiting,
            announcer=announcer,
            collector=collector,
            relay=relay,
            problems=problems,
        ),
    )

    async def stores(app: web.Application) -> AsyncIterator[None]:
        await postgres.open()
        await _warn_of_weak_durability(postgres)
        await polls.start()
        await puts.start()
        await channel.start()
        yield
        await channel.close()
        gate.close()
        await collector.close()
        with suppress(Unavailable):  # else others tell again, a second later, what was told
            await outbox.sweep()
        await reader.close()
        await polls.close()
        await puts.close()
        await postgres.close()

    async def background(app: web.Application) -> AsyncIterator[None]:
        work = [
            relay.run(),
            hub.run(),
            streams.run(),
            _every(KEYS_CHECKED_EVERY_s, keys.tick),
            _every(PROCESSES_COUNTED_EVERY_s, count_processes),
            _every(LIMITS_FORGOTTEN_EVERY_s, forget_limits),
            _every(FORGOTTEN_EVERY_s, forget),
        ]
        if metrics is not None:
            work.append(_every(COPIED_EVERY_s, measure_outbox))
        tasks = [asyncio.create_task(each) for each in work]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def count_processes() -> None:
        with suppress(RedisAway):
            limiter.processes = await limit_log.count_processes(process)

    async def forget_limits() -> None:
        limiter.tick()

    async def measure_outbox() -> None:
        with suppress(Unavailable):
            await outbox.measure()

    async def forget() -> None:
        with suppress(Unavailable):
            await changes.forget()
            await ticket_sets.forget()

    async def end_what_is_held(app: web.Application) -> None:
        streams.end_all()
        waiting.end_all()

    app.cleanup_ctx.extend([stores, background])
    if metrics is not None:
        app.cleanup_ctx.append(metrics.serve)
    app.on_shutdown.append(end_what_is_held)
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
