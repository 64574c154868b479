"""The collector on real Postgres and Redis, with a table in between that writes down each statement and can hold it."""

import asyncio
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from zlib import crc32

import asyncpg
import pytest

from service.errors import Locked, Unavailable
from service.job import NewJob, Report
from service.reporting import collector
from service.reporting.announcer import Announcer
from service.reporting.collector import MOST_IN_ONE_STATEMENT, SHARDS, Collector, Taken
from service.stores.connections import Postgres
from service.stores.job_table import BadValue, JobTable, Verdict
from service.stores.outbox_table import OutboxTable
from service.stores.redis_pipe import RedisPipe
from service.stores.status_cache import StatusCache
from service.stores.status_memory import StatusMemory
from tests.fault_proxy import FaultProxy

ACCOUNT = 1
SOON_s = 10.0


class WatchedTable:
    """A JobTable that notes every statement before it is sent. A shut gate holds them there, one gate per shard."""

    def __init__(self, table: JobTable) -> None:
        self._table = table
        self.statements: list[list[Report]] = []
        self.gates: dict[int, asyncio.Event] = {}
        self.in_flight: Counter[int] = Counter()
        self.most_in_flight: Counter[int] = Counter()
        self._began = asyncio.Condition()

    async def report(self, reports: Sequence[Report]) -> list[Verdict]:
        shards = {shard_of(report.id) for report in reports}
        assert len(shards) == 1, "a statement is of one shard"
        shard = shards.pop()
        self.in_flight[shard] += 1
        self.most_in_flight[shard] = max(self.most_in_flight[shard], self.in_flight[shard])
        self.statements.append(list(reports))
        async with self._began:
            self._began.notify_all()
        try:
            if gate := self.gates.get(shard):
                await gate.wait()
            return await self._table.report(reports)
        finally:
            self.in_flight[shard] -= 1

    @property
    def sizes(self) -> list[int]:
        return [len(statement) for statement in self.statements]

    async def until_sent(self, statements: int) -> None:
        """Until that many statements have begun."""
        async with asyncio.timeout(SOON_s), self._began:
            await self._began.wait_for(lambda: len(self.statements) >= statements)

    @asynccontextmanager
    async def held(self, shard: int) -> AsyncIterator[None]:
        """Meanwhile statements of the shard are sent and do not come back."""
        gate = self.gates[shard] = asyncio.Event()
        try:
            yield
        finally:
            gate.set()


class Parts:
    """A collector and what it stands on."""

    def __init__(self, database: str, redis_url: str) -> None:
        self.postgres = Postgres(database, pool_size=8, prepared_statements=True, timeout_s=10)
        self.pipes = [RedisPipe(redis_url, deadline_s=2, scripts=StatusCache.scripts) for _ in range(2)]
        cache = StatusCache(*self.pipes, process_token="test")
        self.postgres.on_identity.append(lambda identity: setattr(cache, "postgres_identity", identity))
        self.jobs = JobTable(self.postgres)
        self.table = WatchedTable(self.jobs)
        self.collector = Collector(self.table, Announcer(cache, StatusMemory(), OutboxTable(self.postgres)))

    async def create(self, ids: Sequence[str]) -> None:
        async with self.postgres.transaction() as connection:
            await self.jobs.create(connection, ACCOUNT, [NewJob(job_id, "extraction") for job_id in ids], [])

    async def rows(self) -> dict[str, asyncpg.Record]:
        return {row["id"]: row for row in await self.postgres.fetch("select * from jobs")}


StartParts = Callable[[str], Awaitable[Parts]]


@pytest.fixture
async def start_parts(redis_url: str) -> AsyncIterator[StartParts]:
    async with AsyncExitStack() as stack:

        async def start(database: str) -> Parts:
            parts = Parts(database, redis_url)
            await parts.postgres.open()
            stack.push_async_callback(parts.postgres.close)
            for pipe in parts.pipes:
                await pipe.start()
                stack.push_async_callback(pipe.close)
            stack.push_async_callback(parts.collector.close)
            return parts

        yield start


@pytest.fixture
async def parts(database: str, start_parts: StartParts) -> Parts:
    parts = await start_parts(database)
    await parts.postgres.execute("insert into accounts (name) values ('one')")
    return parts


def shard_of(job_id: str) -> int:
    return crc32(f"{ACCOUNT}:{job_id}".encode()) % SHARDS


def ids_of_shard(shard: int, how_many: int) -> list[str]:
    ids = (f"job-{number}" for number in itertools.count())
    return list(itertools.islice((job_id for job_id in ids if shard_of(job_id) == shard), how_many))


def said(job_id: str, message: str) -> Report:
    return Report(ACCOUNT, job_id, progress={"message": message})


BAD = {"nul": "\0"}


async def ended(*ends: asyncio.Future[Taken]) -> list[Taken | BaseException]:
    async with asyncio.timeout(SOON_s):
        return await asyncio.gather(*ends, return_exceptions=True)


async def test_a_lone_report_is_sent_at_once_and_told(parts: Parts) -> None:
    await parts.create(["a"])
    taken = await parts.collector.take(Report(ACCOUNT, "a", status="PROCESSING"))
    assert (taken.verdict.outcome, taken.told) == ("changed", True)
    assert taken.answer.version == 2
    assert json.loads(taken.answer.shape_a)["status"] == "PROCESSING"
    assert parts.table.sizes == [1]


async def test_what_arrives_during_a_statement_travels_together_in_the_next(parts: Parts) -> None:
    ids = ids_of_shard(0, 51)
    await parts.create(ids)
    async with parts.table.held(0):
        first = parts.collector.take(said(ids[0], "first"))
        await parts.table.until_sent(1)
        others = [parts.collector.take(said(job_id, "later")) for job_id in ids[1:]]
    assert all(taken.verdict.outcome == "changed" for taken in await ended(first, *others))
    assert parts.table.sizes == [1, 50]


async def test_reports_of_one_turn_travel_together(parts: Parts) -> None:
    ids = ids_of_shard(1, 20)
    await parts.create(ids)
    await ended(*(parts.collector.take(said(job_id, "x")) for job_id in ids))
    assert parts.table.sizes == [20]


async def test_a_shard_does_not_wait_for_another(parts: Parts) -> None:
    one_of_each = [ids_of_shard(shard, 1)[0] for shard in range(SHARDS)]
    await parts.create(one_of_each)
    async with parts.table.held(0):
        ends = [parts.collector.take(said(job_id, "x")) for job_id in one_of_each]
        await ended(*ends[1:])
        assert not ends[0].done()
    await ended(ends[0])


async def test_the_second_report_on_a_job_waits_for_the_next_statement(parts: Parts) -> None:
    a, b, c = ids = ids_of_shard(2, 3)
    await parts.create(ids)
    async with parts.table.held(2):
        ends = [parts.collector.take(said(c, "opens"))]
        await parts.table.until_sent(1)
        for job_id, message in [(a, "1"), (a, "2"), (b, "1"), (a, "3"), (c, "1"), (b, "2")]:
            ends.append(parts.collector.take(said(job_id, message)))
    await ended(*ends)
    spoken = [[(report.id, report.progress["message"]) for report in sent] for sent in parts.table.statements]
    assert spoken == [[(c, "opens")], [(a, "1"), (b, "1"), (c, "1")], [(a, "2"), (b, "2")], [(a, "3")]]


async def test_a_statement_carries_a_bounded_number_of_reports(parts: Parts) -> None:
    ids = ids_of_shard(3, 2 * MOST_IN_ONE_STATEMENT + 7)
    await parts.create(ids)
    ends = [parts.collector.take(said(job_id, "x")) for job_id in ids]
    assert all(taken.verdict.outcome == "changed" for taken in await ended(*ends))
    assert parts.table.sizes == [MOST_IN_ONE_STATEMENT, MOST_IN_ONE_STATEMENT, 7]


@pytest.mark.parametrize("seed", range(3))
async def test_reports_of_each_job_are_taken_in_order_and_once(parts: Parts, seed: int) -> None:
    """Many reporters, few jobs: nothing overtakes, nothing is lost, a job is at most once in a statement."""
    rng = random.Random(seed)
    ids = [f"job-{number}" for number in range(30)]
    await parts.create(ids)
    expected: dict[str, list[str]] = defaultdict(list)
    ends: list[tuple[str, asyncio.Future[Taken]]] = []

    async def reporter(number: int) -> None:
        for step in range(25):
            job_id, message = rng.choice(ids), f"{number}.{step}"
            expected[job_id].append(message)
            end = parts.collector.take(said(job_id, message))
            ends.append((job_id, end))
            if rng.random() < 0.5:
                await end

    async with asyncio.timeout(SOON_s * 3):
        await asyncio.gather(*(reporter(number) for number in range(40)))
    taken = await ended(*(end for _, end in ends))

    for statement in parts.table.statements:
        assert len({report.id for report in statement}) == len(statement) <= MOST_IN_ONE_STATEMENT
    assert set(parts.table.most_in_flight.values()) == {1}
    sent = defaultdict(list)
    for report in itertools.chain(*parts.table.statements):
        sent[report.id].append(report.progress["message"])
    assert sent == expected
    versions = defaultdict(list)
    for (job_id, _), end in zip(ends, taken, strict=True):
        assert end.verdict.outcome == "changed"
        versions[job_id].append(end.verdict.job.version)
    assert versions == {job_id: list(range(2, len(said_of) + 2)) for job_id, said_of in expected.items()}
    rows = await parts.rows()
    last = {job_id: json.loads(rows[job_id]["progress"])["message"] for job_id in expected}
    assert last == {job_id: messages[-1] for job_id, messages in expected.items()}


async def test_a_bad_value_fails_alone(parts: Parts) -> None:
    ids = ids_of_shard(0, 6)
    await parts.create(ids)
    bad = {1, 4}
    reports = [said(job_id, "good") for job_id in ids]
    for place in bad:
        reports[place].metadata = BAD
    ends = await ended(*map(parts.collector.take, reports))
    assert [isinstance(end, BadValue) for end in ends] == [place in bad for place in range(6)]
    assert all(end.verdict.outcome == "changed" for place, end in enumerate(ends) if place not in bad)
    assert parts.table.sizes == [6, 1, 1, 1, 1, 1, 1], "all together, then each alone, once"
    assert {job_id: row["version"] for job_id, row in (await parts.rows()).items()} == {
        job_id: 1 if place in bad else 2 for place, job_id in enumerate(ids)
    }


async def test_a_lone_bad_value_is_not_tried_again(parts: Parts) -> None:
    await parts.create(["a"])
    [end] = await ended(parts.collector.take(Report(ACCOUNT, "a", metadata=BAD)))
    assert isinstance(end, BadValue)
    assert parts.table.sizes == [1]


async def test_order_holds_around_a_bad_value(parts: Parts) -> None:
    a, b = ids = ids_of_shard(1, 2)
    await parts.create(ids)
    reports = [said(a, "1"), Report(ACCOUNT, b, metadata=BAD), said(a, "2"), said(b, "1"), said(a, "3")]
    ends = await ended(*map(parts.collector.take, reports))
    assert [getattr(end, "verdict", None) and end.verdict.job.version for end in ends] == [2, None, 3, 2, 4]
    rows = await parts.rows()
    assert [json.loads(rows[job_id]["progress"])["message"] for job_id in ids] == ["3", "1"]


async def test_callers_that_hang_up_take_nobody_with_them(parts: Parts) -> None:
    """Whether their report is in the statement or waits for the next one."""
    ids = ids_of_shard(0, 8)
    await parts.create(ids)

    async def call(job_id: str) -> Taken:
        return await parts.collector.take(said(job_id, "x"))

    async with parts.table.held(0):
        flying = [asyncio.create_task(call(job_id)) for job_id in ids[:4]]
        await parts.table.until_sent(1)
        waiting = [asyncio.create_task(call(job_id)) for job_id in ids[4:]]
        await asyncio.wait(waiting, timeout=0)
        for task in (flying[0], flying[3], waiting[0], waiting[2]):
            task.cancel()
    ends = await ended(*flying, *waiting)
    cancelled = [isinstance(end, asyncio.CancelledError) for end in ends]
    assert cancelled == [True, False, False, True, True, False, True, False]
    assert all(end.verdict.outcome == "changed" for end in ends if not isinstance(end, BaseException))
    assert len(parts.table.statements) == 2
    sent = Counter(report.id for report in itertools.chain(*parts.table.statements))
    assert set(sent.values()) == {1}
    versions = {job_id: row["version"] for job_id, row in (await parts.rows()).items()}
    assert versions == {job_id: 1 + sent[job_id] for job_id in ids}


async def test_all_callers_may_hang_up(parts: Parts) -> None:
    await parts.create(["a"])
    async with parts.table.held(shard_of("a")):
        end = parts.collector.take(said("a", "x"))
        await parts.table.until_sent(1)
        end.cancel()
    await parts.collector.close()
    assert (await parts.rows())["a"]["version"] == 2
    assert (await parts.collector.take(said("a", "y"))).verdict.job.version == 3


async def test_closing_waits_for_all_that_was_taken(parts: Parts) -> None:
    ids = [f"job-{number}" for number in range(50)]
    await parts.create(ids)
    ends = [parts.collector.take(said(job_id, text)) for text in "ab" for job_id in ids]
    await parts.collector.close()
    assert all(end.done() for end in ends)
    assert {row["version"] for row in (await parts.rows()).values()} == {3}


# Postgres goes


async def test_a_session_that_ends_during_a_statement_fails_all_in_it_and_nothing_is_sent_again(
    parts: Parts, sql: asyncpg.Connection
) -> None:
    ids = ids_of_shard(0, 5)
    await parts.create(ids)
    async with sql.transaction():
        await sql.execute("select from jobs where id = $1 for update", ids[2])
        ends = [parts.collector.take(said(job_id, "x")) for job_id in ids]
        await end_the_session_that_waits(sql)
        taken = await ended(*ends)
    assert [type(end) for end in taken] == [Unavailable] * 5
    assert parts.table.sizes == [5]
    assert {row["version"] for row in (await parts.rows()).values()} == {1}
    assert (await parts.collector.take(said(ids[2], "again"))).verdict.job.version == 2


async def test_a_commit_whose_answer_is_lost_is_unavailable_and_never_sent_again(
    database: str, sql: asyncpg.Connection, start_parts: StartParts
) -> None:
    await sql.execute("insert into accounts (name) values ('one')")
    *ids, other = ids_of_shard(0, 4)
    async with FaultProxy(database) as proxy:
        parts = await start_parts(re.sub(r"@[^/]*", f"@{proxy.url.partition('@')[2].partition('/')[0]}", database))
        await parts.create([*ids, other])
        await parts.jobs.report([Report(ACCOUNT, other)])  # the statement is prepared by now
        proxy.hold_answers()
        ends = [parts.collector.take(said(job_id, "x")) for job_id in ids]
        await parts.table.until_sent(1)
        later = parts.collector.take(said(other, "x"))
        async with asyncio.timeout(SOON_s):
            while await sql.fetchval("select count(*) from jobs where version = 2") < len(ids):
                pass
        proxy.cut()
        assert [type(end) for end in await ended(*ends)] == [Unavailable] * len(ids)
        proxy.thaw()
        assert (await later).verdict.outcome == "changed", "who came later is not in what was lost"
        assert parts.table.sizes == [len(ids), 1]
        assert await sql.fetch("select version, count(*) from jobs group by 1") == [(2, len(ids) + 1)]
        await parts.collector.close()
        await parts.postgres.close()


async def test_only_the_reports_on_a_job_that_another_keeps_locked_are_unavailable(
    parts: Parts, sql: asyncpg.Connection
) -> None:
    a, b, c = ids = ids_of_shard(0, 3)
    await parts.create(ids)
    async with sql.transaction():
        await sql.execute("select from jobs where id = $1 for update", b)
        reports = [*(said(job_id, "1") for job_id in ids), said(b, "2"), said(c, "2")]
        ends = await ended(*(parts.collector.take(report) for report in reports))
    assert [type(end) for end in ends] == [Taken, Locked, Taken, Locked, Taken]
    assert parts.table.sizes == [3, 1, 1, 1, 1], "all together, then each alone; what waits for the same job does not"
    assert parts.postgres.reachable, "it answered: polls are not called stale for it"
    assert {job_id: row["version"] for job_id, row in (await parts.rows()).items()} == {a: 2, b: 1, c: 3}
    assert (await parts.collector.take(said(b, "3"))).verdict.job.version == 2


async def test_many_locks_that_another_keeps_hold_nobody_up_for_long(
    parts: Parts, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "SINGLY_FOR_s", 0.5)
    ids = ids_of_shard(0, 40)
    await parts.create(ids)
    async with sql.transaction():
        await sql.execute("select from jobs for update")
        ends = await ended(*(parts.collector.take(said(job_id, "x")) for job_id in ids))
    assert {type(end) for end in ends} == {Locked}
    assert parts.table.sizes == [40, 1]
    assert {row["version"] for row in (await parts.rows()).values()} == {1}
    assert (await parts.collector.take(said(ids[0], "y"))).verdict.job.version == 2


async def end_the_session_that_waits(connection: asyncpg.Connection) -> None:
    waits = (
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and wait_event_type = 'Lock'"
    )
    async with asyncio.timeout(SOON_s):
        while not await connection.fetch(waits):
            pass
