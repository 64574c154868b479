"""The relay on real stores: what was committed and not told is told, deleted once it is told, and never twice for nothing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import asyncpg
import pytest

from service.job import NewJob, Report
from service.reporting import relay
from service.reporting.relay import Relay
from service.stores.connections import Postgres
from service.stores.job_table import JobTable
from service.stores.outbox_table import OutboxTable
from service.stores.redis_pipe import RedisPipe
from service.stores.status_cache import StatusCache
from tests.fault_proxy import FaultProxy
from tests.speaker import until

ACCOUNT = 1
IDLE = "from pg_stat_activity where datname = current_database() and state = 'idle in transaction'"
STANDS_IDLE = f"select exists (select {IDLE})"
END_IDLE = f"select pg_terminate_backend(pid, 2000) {IDLE}"
OVERDUE = "update outbox set at = at - interval '2 seconds'"


class CountedCache(StatusCache):
    """Counts how often each job was told; `slow_s`: how long each telling takes."""

    def __init__(self, polls: RedisPipe, puts: RedisPipe, *, process_token: str) -> None:
        super().__init__(polls, puts, process_token=process_token)
        self.told: list[str] = []
        self.slow_s = 0.0

    async def put(self, changes) -> bool:
        await asyncio.sleep(self.slow_s)
        told = await super().put(changes)
        self.told += [change.job_id for change in changes if told]
        return told


class Parts:
    """One process's relay and what it stands on."""

    def __init__(self, database: str, redis_url: str) -> None:
        self.postgres = Postgres(database, pool_size=4, prepared_statements=True, timeout_s=5)
        self.pipes = [RedisPipe(redis_url, deadline_s=1, scripts=StatusCache.scripts) for _ in range(2)]
        self.cache = CountedCache(*self.pipes, process_token="test")
        self.cache.on_connect.append(self.cache.trust)
        self.postgres.on_identity.append(lambda identity: setattr(self.cache, "postgres_identity", identity))
        self.jobs = JobTable(self.postgres)
        self.outbox = OutboxTable(self.postgres)
        self.relay = Relay(self.postgres, self.jobs, self.outbox, self.cache)

    async def create(self, *ids: str) -> None:
        async with self.postgres.transaction() as connection:
            await self.jobs.create(connection, ACCOUNT, [NewJob(job_id, "extraction") for job_id in ids], [])

    async def is_told(self) -> bool:
        return not await self.postgres.fetch("select from outbox")


StartParts = Callable[[], Awaitable[Parts]]


@pytest.fixture
async def start_parts(database: str, redis_url: str, sql: asyncpg.Connection) -> AsyncIterator[StartParts]:
    await sql.execute("insert into accounts (name) values ('one')")
    async with AsyncExitStack() as stack:

        async def start() -> Parts:
            parts = Parts(database, redis_url)
            await parts.postgres.open()
            stack.push_async_callback(parts.postgres.close)
            for pipe in parts.pipes:
                await pipe.start()
                stack.push_async_callback(pipe.close)
            await parts.postgres.fetch("select 1")
            return parts

        yield start


@pytest.fixture
async def parts(start_parts: StartParts) -> Parts:
    return await start_parts()


class Running:
    """The relay runs while inside."""

    def __init__(self, *parts: Parts) -> None:
        self._parts = parts

    async def __aenter__(self) -> None:
        self._tasks = [asyncio.create_task(parts.relay.run()) for parts in self._parts]

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_what_is_overdue_is_told_once_and_goes(parts: Parts, sql: asyncpg.Connection) -> None:
    await parts.create("a", "b")
    await sql.execute(OVERDUE)
    async with Running(parts):
        await until(parts.is_told, 3)
    assert sorted(parts.cache.told) == ["a", "b"]
    assert parts.relay.relayed == 2


async def test_what_is_not_overdue_is_left_to_whoever_wrote_it(parts: Parts) -> None:
    await parts.create("a")
    async with Running(parts):
        await until(lambda: _has_looked(parts, 3), 3)
    assert parts.cache.told == []


async def test_two_relays_never_tell_the_same(start_parts: StartParts, sql: asyncpg.Connection) -> None:
    one, other = await start_parts(), await start_parts()
    for n in range(300):
        await one.create(f"job-{n}")
    await sql.execute(OVERDUE)
    async with Running(one, other):
        await until(one.is_told, 10)
    told = one.cache.told + other.cache.told
    assert sorted(told) == sorted(f"job-{n}" for n in range(300))


async def test_what_another_relay_holds_and_does_not_tell_is_not_confirmed(
    parts: Parts, sql: asyncpg.Connection
) -> None:
    """It may stand still: readers must not take old answers for fresh meanwhile."""
    await parts.create("a")
    await sql.execute(OVERDUE)
    async with Running(parts):
        async with sql.transaction():
            await sql.execute("select from outbox for update")
            await until(lambda: _is_unconfirmed(parts, True), 3)
            assert parts.cache.trusted
        await until(parts.is_told, 3)
        await until(lambda: _is_unconfirmed(parts, False), 3)


async def test_telling_that_outlasts_the_transaction_is_told_once_and_goes(
    parts: Parts, sql: asyncpg.Connection
) -> None:
    """Postgres ends a transaction that stands idle for 2 s: what was told by then must not be told for ever."""
    parts.cache.slow_s = 2.6
    await parts.create("a")
    await sql.execute(OVERDUE)
    async with Running(parts):
        await until(parts.is_told, 8)
        await until(lambda: _has_looked(parts, 3), 3)
    assert parts.cache.told == ["a"]


async def test_a_relay_that_is_cancelled_ends_though_its_session_has_ended(
    parts: Parts, sql: asyncpg.Connection
) -> None:
    parts.cache.slow_s = 60
    await parts.create("a")
    await sql.execute(OVERDUE)
    running = asyncio.create_task(parts.relay.run())
    await until(lambda: sql.fetchval(STANDS_IDLE), 3)
    await sql.fetch(END_IDLE)
    running.cancel()
    await asyncio.wait([running], timeout=5)
    assert running.cancelled()


@pytest.mark.parametrize("asks", ["a statement", "a transaction"])
async def test_who_is_cancelled_while_postgres_is_silent_ends_cancelled(database: str, asks: str) -> None:
    async with FaultProxy(database) as proxy:
        postgres = Postgres(proxy.url, pool_size=2, prepared_statements=True, timeout_s=5)
        await postgres.open()
        await postgres.fetch("select 1")

        async def ask() -> None:
            if asks == "a statement":
                await postgres.fetch("select 2")
            async with postgres.transaction() as connection:
                await connection.fetch("select 3")

        proxy.freeze()
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.2)
        asking.cancel()
        done, _ = await asyncio.wait([asking], timeout=8)
        assert done
        assert asking.cancelled()
        proxy.thaw()
        await postgres.close()


async def test_what_cannot_be_told_is_kept_and_redis_trusted_no_more(parts: Parts, sql: asyncpg.Connection) -> None:
    await parts.create("a")
    await sql.execute(OVERDUE)
    parts.cache.on_connect.clear()
    await parts.pipes[1].command("CONFIG", "SET", "min-replicas-to-write", 1)
    try:
        async with Running(parts):
            await until(lambda: _is_distrusted(parts), 3)
        assert not await parts.is_told()
    finally:
        await parts.pipes[1].command("CONFIG", "SET", "min-replicas-to-write", 0)
    async with Running(parts):
        await until(parts.is_told, 3)


async def test_while_postgres_is_read_only_all_is_told_once_and_goes_later(
    parts: Parts, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "MOST_JOBS_AT_ONCE", 50)
    for n in range(120):
        await parts.create(f"job-{n}")
    await sql.execute(OVERDUE)
    async with read_only(parts, sql):
        async with Running(parts):
            await until(lambda: _has_told(parts, 120), 5)
            await until(lambda: _has_looked(parts, 3), 3)
            assert parts.cache.trusted
            assert not parts.cache.unconfirmed
        assert not parts.postgres.writable
        assert parts.postgres.reachable
        assert len(parts.cache.told) == 120
        assert await sql.fetchval("select count(*) from outbox") == 120
    async with Running(parts):
        await until(parts.is_told, 3)
        await until(lambda: _is_writable(parts), 3)
    assert len(parts.cache.told) == 120


class read_only:
    """Inside, sessions write nothing."""

    def __init__(self, parts: Parts, sql: asyncpg.Connection) -> None:
        self._sql, self._parts = sql, parts

    async def __aenter__(self) -> None:
        await self._set("set default_transaction_read_only = on")

    async def __aexit__(self, *_: object) -> None:
        await self._set("reset default_transaction_read_only")

    async def _set(self, what: str) -> None:
        name = await self._sql.fetchval("select current_database()")
        await self._sql.execute(f"alter database {name} {what}")
        assert self._parts.postgres._pool is not None
        await self._parts.postgres._pool.expire_connections()


async def test_a_report_of_now_is_told_by_nobody_twice(parts: Parts, sql: asyncpg.Connection) -> None:
    """Each commit has a row of its own: what is told late never hides what comes after."""
    await parts.create("a")
    await sql.execute(OVERDUE)
    async with Running(parts):
        await until(parts.is_told, 3)
        await parts.jobs.report([Report(ACCOUNT, "a", status="PROCESSING")])
        assert not await parts.is_told()
        await sql.execute(OVERDUE)
        await until(parts.is_told, 3)
    assert parts.cache.told == ["a", "a"]


async def _has_told(parts: Parts, jobs: int) -> bool:
    return len(parts.cache.told) >= jobs


async def _is_writable(parts: Parts) -> bool:
    return parts.postgres.writable


async def _is_unconfirmed(parts: Parts, so: bool) -> bool:
    return parts.cache.unconfirmed == so


async def _is_distrusted(parts: Parts) -> bool:
    return not parts.cache.trusted


async def _has_looked(parts: Parts, times: int) -> bool:
    """The relay has come round so often since it was first asked."""
    seen = _rounds.setdefault(parts, [])
    if not seen or seen[-1] != parts.cache._confirmed_at:
        seen.append(parts.cache._confirmed_at)
    return len(seen) > times


_rounds: dict[Parts, list[float]] = {}
