"""What the parts have counted, told to Prometheus on a listener of its own, never on the public port.

Nothing is measured here: the parts count in plain attributes, and these are copied once a second, and for each scrape,
into prometheus-client's values. A poll pays nothing for it, and a second process does not have to be asked: where
PROMETHEUS_MULTIPROC_DIR names a folder those values lie there, and whichever process is asked answers for all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics import disable_created_metrics
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from service.hub import Hub
from service.limiting.limiter import Limiter
from service.middlewares import STATUS_OF, Problems
from service.polling.operation import Waiting
from service.reporting.announcer import Announcer
from service.reporting.collector import Collector
from service.reporting.relay import Relay
from service.status_reader import StatusReader
from service.stores.connections import ERRORS, Postgres
from service.stores.event_channel import EventChannel
from service.stores.key_memory import KeyMemory
from service.stores.limit_log import LimitLog
from service.stores.outbox_table import OutboxTable
from service.stores.redis_pipe import RedisPipe
from service.stores.status_cache import StatusCache
from service.stores.status_memory import StatusMemory
from service.streaming.operation import Streams

COPIED_EVERY_s: Final = 1.0
SHARED_FOLDER: Final = os.environ.get("PROMETHEUS_MULTIPROC_DIR", "")
"""prometheus-client reads it when it is imported, so it is read here and no setting of ours."""

OverProcesses = Literal["livesum", "livemin", "livemax"]
"""What a gauge of several processes is: the sum, the least or the most of those that live."""

Values = Mapping[tuple[str, ...], float]
"""By the values of the labels."""

_log = structlog.get_logger(__name__)
disable_created_metrics()  # Prometheus sees by itself when a counter begins anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Whose attributes are told."""

    postgres: Postgres
    polls: RedisPipe
    puts: RedisPipe
    channel: EventChannel
    cache: StatusCache
    memory: StatusMemory
    keys: KeyMemory
    limit_log: LimitLog
    outbox: OutboxTable
    reader: StatusReader
    hub: Hub
    limiter: Limiter
    streams: Streams
    waiting: Waiting
    announcer: Announcer
    collector: Collector
    relay: Relay
    problems: Problems


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric. `read`: its present value, or values by label. A counter unless `gauge` says how processes add up."""

    name: str
    help: str
    read: Callable[[Parts], Values | float]
    labels: tuple[str, ...] = ()
    gauge: OverProcesses | None = None


TABLE: Final = (
    # reading
    Measure(
        "jobwire_status_reads_total",
        "Statuses read, by what answered: memory (Redis had nothing newer), redis, or postgres. Much postgres: Redis "
        "was emptied, or is not used at the moment.",
        lambda parts: {
            ("memory",): parts.reader.from_memory,
            ("redis",): parts.reader.from_redis,
            ("postgres",): parts.reader.from_postgres,
        },
        ("tier",),
    ),
    Measure(
        "jobwire_memory_answers",
        "Ready answers kept in the memory of the processes.",
        lambda parts: len(parts.memory),
        gauge="livesum",
    ),
    # Redis
    Measure(
        "jobwire_redis_up",
        "Whether Redis answers: on the connection for polls, on that for reports (puts), on the subscription (events). "
        "0: a process has lost it.",
        lambda parts: {
            ("polls",): parts.polls.up,
            ("puts",): parts.puts.up,
            ("events",): parts.channel.up,
        },
        ("connection",),
        gauge="livemin",
    ),
    Measure(
        "jobwire_redis_lost_total",
        "Connections to Redis that were lost, also for a moment between two scrapes.",
        lambda parts: {
            ("polls",): parts.polls.lost,
            ("puts",): parts.puts.lost,
            ("events",): parts.channel.lost,
        },
        ("connection",),
    ),
    Measure(
        "jobwire_redis_trusted",
        "1: polls are answered from Redis. 0: in a process they come from Postgres, because Redis is away, refuses "
        "what is written, or is still being brought up to date.",
        lambda parts: parts.cache.trusted,
        gauge="livemin",
    ),
    Measure(
        "jobwire_redis_lives_total",
        "How often Redis or Postgres turned out to be another than before: at the start, and whenever one of them was "
        "restarted, failed over or was restored. What was cached before is not used any more.",
        lambda parts: parts.cache.lives,
    ),
    Measure(
        "jobwire_redis_errors_total",
        "Questions that Redis answered with an error, such as out of memory: about statuses or about limits.",
        lambda parts: {("statuses",): parts.cache.redis_errors, ("limits",): parts.limit_log.redis_errors},
        ("about",),
    ),
    # Postgres
    Measure(
        "jobwire_postgres_up",
        "Whether Postgres answered last. 0: to a process it did not; polls come from Redis with Warning 110, reports "
        "are refused with 503.",
        lambda parts: parts.postgres.reachable,
        gauge="livemin",
    ),
    Measure(
        "jobwire_postgres_writable",
        "Whether Postgres took the last change. 0: it is read-only; polls are answered, reports are refused with 503.",
        lambda parts: parts.postgres.writable,
        gauge="livemin",
    ),
    Measure(
        "jobwire_postgres_errors_total",
        "Statements that came to nothing, by reason: Postgres is away, has no connection left, is read-only, lacks the "
        "migrations, or another writer kept the lock.",
        lambda parts: {(reason,): parts.postgres.errors[reason] for reason in ERRORS},
        ("reason",),
    ),
    Measure(
        "jobwire_postgres_connections",
        "Connections to Postgres that the processes hold.",
        lambda parts: parts.postgres.connections,
        gauge="livesum",
    ),
    # reporting
    Measure(
        "jobwire_reports_total",
        "Reports on jobs that were committed together with others (divided by jobwire_commits_total: reports per "
        "commit).",
        lambda parts: parts.collector.commits.reports,
    ),
    Measure(
        "jobwire_commits_total",
        "Statements in which they were committed.",
        lambda parts: parts.collector.commits.statements,
    ),
    Measure(
        "jobwire_commit_seconds_total",
        "Seconds that these statements took (divided by jobwire_commits_total: seconds per commit).",
        lambda parts: parts.collector.commits.seconds,
    ),
    Measure(
        "jobwire_commits_split_total",
        "Statements that failed for one of their reports, so that each was run by itself.",
        lambda parts: parts.collector.commits.split,
    ),
    Measure(
        "jobwire_untold_total",
        "Writes acknowledged with Warning 199, because Redis could not be told: readers were up to 2 s behind.",
        lambda parts: parts.announcer.untold,
    ),
    Measure(
        "jobwire_relayed_total",
        "Changes that Redis was told of later, because whoever made them could not.",
        lambda parts: parts.relay.relayed,
    ),
    Measure(
        "jobwire_outbox_oldest_seconds",
        "The age of the oldest change that Redis may not have heard of, as last seen. More than 2 for long: Redis "
        "cannot be told.",
        lambda parts: parts.outbox.oldest_s,
        gauge="livemax",
    ),
    # following
    Measure(
        "jobwire_streams_open",
        "Streams of events and WebSockets that are open.",
        lambda parts: len(parts.streams),
        gauge="livesum",
    ),
    Measure(
        "jobwire_waits_open",
        "Polls that are held by Prefer: wait.",
        lambda parts: len(parts.waiting),
        gauge="livesum",
    ),
    Measure(
        "jobwire_repaired_total",
        "Changes that no message told to those who follow, and that were found in Postgres.",
        lambda parts: parts.hub.repaired,
    ),
    # keys and limits
    Measure(
        "jobwire_keys_known",
        "API keys that the processes know without asking Postgres.",
        lambda parts: len(parts.keys),
        gauge="livesum",
    ),
    Measure(
        "jobwire_limit_decisions_total",
        "Decisions about limits, by who made them: redis; memory (a refusal that still stood); alone (a process by "
        "itself, because Redis could not: up to twice the limit is possible).",
        lambda parts: {
            ("redis",): parts.limiter.asked,
            ("memory",): parts.limiter.refused_here,
            ("alone",): parts.limiter.judged_alone,
        },
        ("by",),
    ),
    # all
    Measure(
        "jobwire_errors_total",
        "Errors answered as problem+json, by error_type.",
        lambda parts: {(kind,): parts.problems.counts[kind] for kind in STATUS_OF},
        ("error_type",),
    ),
    Measure("jobwire_processes", "Processes for which this page speaks.", lambda parts: 1, gauge="livesum"),
)
"""Every metric of the service. Labels have few values, known beforehand: no id, key, account or path is one."""


class Metrics:
    """Tells the values of `parts` to whoever asks `GET /metrics` at `address` (host, port)."""

    def __init__(self, address: tuple[str, int], parts: Parts) -> None:
        self._address = address
        self._parts = parts
        self._registry = CollectorRegistry()
        self.url = ""
        if SHARED_FOLDER:
            Path(SHARED_FOLDER).mkdir(parents=True, exist_ok=True)
        self._told = [_told(measure, self._registry) for measure in TABLE]

    async def serve(self, app: web.Application) -> AsyncIterator[None]:
        """For `cleanup_ctx`. An address that cannot be had is a warning, not the end of the service."""
        runner = await self._listen()
        copying = asyncio.create_task(self._copy_again_and_again())
        yield
        copying.cancel()
        await asyncio.wait([copying])
        if runner is not None:
            await runner.cleanup()
        self._copy()
        if SHARED_FOLDER:
            mark_process_dead(os.getpid(), SHARED_FOLDER)

    async def page(self) -> bytes:
        """All metrics as Prometheus reads them."""
        self._copy()
        if not SHARED_FOLDER:
            return generate_latest(self._registry)
        return await asyncio.to_thread(_page_of_all)

    async def _listen(self) -> web.AppRunner | None:
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        host, port = self._address
        try:
            await web.TCPSite(runner, host, port, reuse_port=bool(SHARED_FOLDER)).start()
        except OSError as error:
            _log.warning("metrics_not_told", address=f"{host}:{port}", why=error.strerror, advice=_ADVICE)
            await runner.cleanup()
            return None
        self.url = f"http://{host}:{runner.addresses[0][1]}/metrics"
        _log.info("metrics_told", url=self.url)
        return runner

    async def _answer(self, request: web.Request) -> web.Response:
        return web.Response(body=await self.page(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _copy_again_and_again(self) -> None:
        while True:
            try:
                self._copy()
            except OSError:  # the folder's disk is full, perhaps: no reason to end
                _log.exception("metrics_not_copied")
            await asyncio.sleep(COPIED_EVERY_s)

    def _copy(self) -> None:
        for told in self._told:
            told.copy(self._parts)


_ADVICE: Final = (
    "Set JOBWIRE_METRICS_LISTEN to another address, or off. Where several processes are one service, set "
    "PROMETHEUS_MULTIPROC_DIR to a folder that they share: then they share the address too."
)


class _Told:
    """A measure and what prometheus-client holds of it."""

    def __init__(self, measure: Measure, held: Counter | Gauge) -> None:
        self._measure = measure
        self._held = held
        self._before: dict[tuple[str, ...], float] = {}

    def copy(self, parts: Parts) -> None:
        read = self._measure.read(parts)
        for labels, value in read.items() if isinstance(read, Mapping) else [((), read)]:
            held = self._held.labels(*labels) if labels else self._held
            if isinstance(held, Gauge):
                held.set(value)
            else:
                held.inc(value - self._before.get(labels, 0))
                self._before[labels] = value


def _told(measure: Measure, registry: CollectorRegistry) -> _Told:
    name, help, labels, gauge = measure.name, measure.help, measure.labels, measure.gauge
    if gauge is None:
        return _Told(measure, Counter(name, help, labels, registry=registry))
    return _Told(measure, Gauge(name, help, labels, registry=registry, multiprocess_mode=gauge))


# The folder that processes share: prometheus-client keeps a file per kind of metric and process


def _page_of_all() -> bytes:
    """Those that died left their gauges behind; what they counted stays counted, or sums would fall."""
    for pid in _processes(Path(SHARED_FOLDER)):
        if not _lives(pid):
            mark_process_dead(pid, SHARED_FOLDER)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, SHARED_FOLDER)
    return generate_latest(registry)


def _processes(folder: Path) -> Iterator[int]:
    names = {file.stem.rpartition("_")[2] for file in folder.glob("*.db")}
    return (int(name) for name in names if name.isdigit())


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, but there
        pass
    return True
