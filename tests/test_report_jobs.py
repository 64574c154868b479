"""The group commit in SQL, on real Postgres: each outcome against the model, all of them at once, and every CHECK."""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from service.errors import Unavailable
from service.job import NewJob, Report, epoch_ms
from service.stores.connections import Postgres
from service.stores.job_table import ABSENCES, BadValue, BatchIsClosed, IdTaken, JobTable
from service.stores.keys import batch_of
from service.stores.queries import load
from tests import model
from tests.model import Job, Said

SQL = load("job_table")
RETENTION = timedelta(days=7)

Connection = asyncpg.Connection


@pytest.fixture
async def connect(database: str) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """Opens connections that end with the test."""
    opened: list[Connection] = []

    async def open_one() -> Connection:
        opened.append(await asyncpg.connect(database, command_timeout=30))
        return opened[-1]

    yield open_one
    for connection in opened:
        await connection.close()


@pytest.fixture
async def connection(connect: Callable[[], Awaitable[Connection]]) -> Connection:
    """A connection to a database with the accounts 1 and 2."""
    connection = await connect()
    await connection.execute("insert into accounts (name) values ('one'), ('two')")
    return connection


@pytest.fixture
async def table(database: str, connection: Connection) -> AsyncIterator[JobTable]:
    """The store itself, on eight connections."""
    postgres = Postgres(database, pool_size=8, prepared_statements=True, timeout_s=10)
    await postgres.open()
    yield JobTable(postgres)
    await postgres.close()


# Each outcome


@dataclass(frozen=True)
class Held:
    """What Postgres holds when the report comes: a job, or the reason why there is none."""

    job: Job = field(default_factory=Job)
    ahead: bool = False  # the clock was ahead when it changed last
    absence: str | None = None


@dataclass(frozen=True)
class Wish:
    """A report, as it is before it knows of the job that it meets."""

    said: Said = field(default_factory=Said)
    attempt: str | None = None
    if_match: str | None = None


ATTEMPTS = {"older": -1, "present": 0, "newer": 1}
IF_MATCH = {
    '"{version}-{ms}"': True,
    '"0-0","{version}-{ms}"': True,
    "*": True,
    '"{version}-{ms_after}"': False,
    '"{version_after}-{ms}"': False,
    "{version}-{ms}": False,
    "": False,
}


@st.composite
def held_states(draw: st.DrawFn) -> Held:
    """Any state in which a job can be, or none at all."""
    absence = draw(st.sampled_from([*[None] * 12, *ABSENCES]))
    status = draw(st.sampled_from(["queued", *["PROCESSING"] * 3, "COMPLETED", "FAILED", "CANCELLED"]))
    progress = draw(model.progress_parts(nulls=False))
    if status == "COMPLETED":
        progress["percentage"] = 100
    error, details = model.reason(draw(model.reasons), draw(model.reason_details))
    failed = status in ("FAILED", "CANCELLED")
    job = Job(
        status=status,
        version=draw(st.integers(1, 3)),
        attempt=draw(st.integers(1, 3)),
        progress=progress,
        error=error if failed else None,
        error_details=details if failed else None,
        metadata=draw(model.metadata_parts(nulls=False)),
        batch_id=draw(st.sampled_from([None, "batch 1", "batch 2"])),
        stalled=status == "PROCESSING" and draw(st.booleans()),
        started=status == "PROCESSING" or draw(st.booleans()),
        result=draw(st.none() | model.results),
    )
    return Held(job, draw(st.booleans()), absence)


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    """Any report that the service can send to Postgres."""
    kind = draw(st.sampled_from([*["report"] * 8, "result", "result", "retry"]))
    if kind == "retry":
        said = Said("queued", retry=True)
    elif kind == "result":
        said = Said(draw(st.sampled_from([None, "COMPLETED"])), result=draw(model.results))
    else:
        status = draw(model.statuses)
        error, details = model.reason(draw(model.reasons), draw(model.reason_details))
        failed = status in ("FAILED", "CANCELLED")
        said = Said(
            status,
            progress=draw(st.none() | model.progress_parts(nulls=True)),
            error=error if failed else None,
            error_details=details if failed else None,
            metadata=draw(st.none() | st.none() | model.metadata_parts(nulls=True)),
        )
    attempt = draw(st.sampled_from([*[None] * 6, "present", *ATTEMPTS]))
    return Wish(said, attempt, draw(st.sampled_from([*[None] * 14, *IF_MATCH])))


groups = st.lists(
    st.tuples(held_states(), wishes(), st.integers(1, 2), st.uuids().map(str)),
    min_size=1,
    max_size=6,
    unique_by=lambda item: item[3],
)
PROCESSING_AT_50 = Held(Job(status="PROCESSING", started=True, progress={"percentage": 50}))


@settings(max_examples=200)
@given(groups)
@example([(PROCESSING_AT_50, Wish(Said(progress={"percentage": 30})), 1, "a")])
@example([(PROCESSING_AT_50, Wish(Said(progress={"percentage": None})), 1, "a")])
@example([(PROCESSING_AT_50, Wish(Said("PROCESSING", progress={"percentage": 30})), 1, "a")])
@example([(PROCESSING_AT_50, Wish(Said("queued", progress={"percentage": 30})), 1, "a")])
@example([(Held(absence="forbidden"), Wish(), 2, "b"), (Held(absence="expired"), Wish(), 1, "a")])
async def test_every_outcome_is_that_of_the_model(
    connection: Connection, group: list[tuple[Held, Wish, int, str]]
) -> None:
    await check_group(connection, group)


@pytest.mark.long
@pytest.mark.timeout(600)
@settings(max_examples=4_000)
@given(groups)
async def test_every_outcome_is_that_of_the_model_for_long(
    connection: Connection, group: list[tuple[Held, Wish, int, str]]
) -> None:
    await check_group(connection, group)


async def check_group(connection: Connection, group: list[tuple[Held, Wish, int, str]]) -> None:
    """One call for the whole group in a transaction that is given up: outcomes, rows and all that rows record."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        before = [await _hold(connection, held, account, job_id) for held, _, account, job_id in group]
        noted = await _outbox(connection)
        reports = [_said(held, wish) for held, wish, _, _ in group]
        tags = [_if_match(row, wish) for row, (_, wish, _, _) in zip(before, group, strict=True)]
        keys = [(account, job_id) for _, _, account, job_id in group]
        outcomes = await _report_jobs(connection, keys, reports, tags)

        assert [row["n"] for row in outcomes] == list(range(1, len(group) + 1))
        changed = []
        for key, (held, _, _, _), said, row_before, outcome in zip(keys, group, reports, before, outcomes, strict=True):
            row_after = await _row(connection, key)
            if held.absence is not None:
                _check_absent(held, outcome)
                assert row_after is None
                continue
            expected, job_after = model.judge(held.job, said)
            event(expected)
            assert outcome["outcome"] == expected
            _check_written(held.job, job_after, expected, outcome, row_before, row_after)
            await _check_result_and_history(connection, key, job_after)
            if expected == "changed":
                changed.append(key)
        noted_now = await _outbox(connection)
        assert noted_now[: len(noted)] == noted
        assert sorted(noted_now[len(noted) :]) == sorted(changed)
        await _check_batches(connection)
    finally:
        await transaction.rollback()


async def _hold(connection: Connection, held: Held, account: int, job_id: str) -> asyncpg.Record | None:
    """Brings Postgres into the state; the row of the job, as it stands then."""
    if held.absence in ("deleted", "expired"):
        expired_at = datetime(2024, 1, 15, tzinfo=UTC) if held.absence == "expired" else None
        await connection.execute("insert into tombstones values ($1, $2, 5, now(), $3)", account, job_id, expired_at)
    if held.absence in ("deleted", "forbidden"):
        await _insert(connection, Held(), 3 - account, job_id)  # another account's
    if held.absence is None:
        await _insert(connection, held, account, job_id)
    return await _row(connection, (account, job_id))


async def _insert(connection: Connection, held: Held, account: int, job_id: str) -> None:
    job = held.job
    now = await connection.fetchval("select date_trunc('milliseconds', clock_timestamp())")
    at = now + timedelta(hours=1) if held.ahead else now
    result_id = None
    if job.result is not None:
        result_id = await connection.fetchval(SQL["write_result"], job.result[0], job.result[1])
    columns = {
        "account_id": account,
        "id": job_id,
        "status": job.status,
        "type": job.type,
        "version": job.version,
        "attempt": job.attempt,
        "created_at": now,
        "changed_at": at,
        "updated_at": at,
        "heartbeat_at": at,
        "started_at": now if job.started else None,
        "completed_at": at if job.finished else None,
        "expires_at": at + RETENTION if job.finished else None,
        "stalled": job.stalled,
        "progress": json.dumps(job.progress),
        "error": job.error,
        "error_details": job.error_details and json.dumps(job.error_details),
        "metadata": json.dumps(job.metadata),
        "batch_id": job.batch_id,
        "result_id": result_id,
        "result_digest": job.result and _digest(job.result),
    }
    places = ", ".join(f"${n}" for n in range(1, len(columns) + 1))
    await connection.execute(f"insert into jobs ({', '.join(columns)}) values ({places})", *columns.values())


def _said(held: Held, wish: Wish) -> Said:
    """The wish, now that it knows its job."""
    return replace(
        wish.said,
        attempt=None if wish.attempt is None else held.job.attempt + ATTEMPTS[wish.attempt],
        matches=None if wish.if_match is None else IF_MATCH[wish.if_match],
    )


def _if_match(row: asyncpg.Record | None, wish: Wish) -> str | None:
    version, ms = (1, 1) if row is None else (row["version"], epoch_ms(row["changed_at"]))
    return wish.if_match and wish.if_match.format(version=version, version_after=version + 1, ms=ms, ms_after=ms + 1)


async def _report_jobs(
    connection: Connection, keys: Sequence[tuple[int, str]], reports: Sequence[Said], tags: Sequence[str | None]
) -> list[asyncpg.Record]:
    """The statement of the store, with a result of its own for each report."""
    result_ids = [
        said.result and await connection.fetchval(SQL["write_result"], said.result[0], said.result[1])
        for said in reports
    ]
    return await connection.fetch(
        SQL["report"],
        [account for account, _ in keys],
        [job_id for _, job_id in keys],
        [said.status for said in reports],
        [_json(said.progress) for said in reports],
        [said.error for said in reports],
        [_json(said.error_details) for said in reports],
        [_json(said.metadata) for said in reports],
        [said.attempt for said in reports],
        tags,
        [said.retry for said in reports],
        result_ids,
        [said.result and _digest(said.result) for said in reports],
    )


def _check_absent(held: Held, outcome: asyncpg.Record) -> None:
    assert outcome["outcome"] == held.absence
    assert outcome["id"] is None
    assert (outcome["held_status"], outcome["held_attempt"], outcome["xid"]) == (None, None, None)
    assert (outcome["gone_expired_at"] is not None) == (held.absence == "expired")


def _check_written(
    held: Job, after: Job, expected: str, outcome: asyncpg.Record, before: asyncpg.Record, row: asyncpg.Record
) -> None:
    """What stands in the table now, and that exactly this was answered."""
    assert (outcome["held_status"], outcome["held_attempt"]) == (held.status, held.attempt)
    written = expected == "changed" or (expected == "same" and not held.finished)
    assert (outcome["xid"] is not None) == written
    if expected in model.TAKEN:
        told = {name: value for name, value in outcome.items() if name in row.keys()}  # noqa: SIM118
        assert told == {name: row[name] for name in told}
        assert {"status", "version", "progress", "result_id"} <= set(told)
    else:
        assert outcome["id"] is None
    assert shown(row) == shown_by(after)
    if expected == "changed":
        at = row["changed_at"]
        assert at >= before["changed_at"]
        assert at == row["updated_at"] == row["heartbeat_at"]
        assert row["started_at"] == (before["started_at"] or (at if after.started else None))
        completed_at = (before["completed_at"] or at) if after.finished else None
        assert row["completed_at"] == completed_at
        assert row["expires_at"] == (completed_at and completed_at + RETENTION)
    else:
        may_differ = {"heartbeat_at"} if written else set()
        assert _differences(before, row) <= may_differ
        assert row["heartbeat_at"] >= before["heartbeat_at"]


async def _check_result_and_history(connection: Connection, key: tuple[int, str], job: Job) -> None:
    stored = await connection.fetchrow(SQL["result"], *key)
    assert (stored and (stored["content_type"], stored["body"])) == job.result
    history = [dict(row) for row in await connection.fetch(SQL["history"], *key, 0, 1000)]
    first = history.pop(0)  # _insert made the job as it was held
    assert first["previous_status"] is None
    assert [{name: entry[name] for name in entry if name != "at"} for entry in history] == job.history


async def _check_batches(connection: Connection) -> None:
    """The counts are those of the jobs."""
    wrong = await connection.fetch(WRONG_BATCHES)
    assert wrong == []


WRONG_BATCHES = """
select b.*, r.* from batches b left join (
    select account_id, batch_id, count(*) as total, count(*) filter (where status = 'queued') as queued,
           count(*) filter (where status = 'PROCESSING') as processing,
           count(*) filter (where status = 'COMPLETED') as completed,
           count(*) filter (where status = 'FAILED') as failed, count(*) filter (where status = 'CANCELLED') as cancelled
    from jobs where batch_id is not null group by 1, 2
) r on r.account_id = b.account_id and r.batch_id = b.id
where (b.total, b.queued, b.processing, b.completed, b.failed, b.cancelled) is distinct from
      (coalesce(r.total, 0), coalesce(r.queued, 0), coalesce(r.processing, 0), coalesce(r.completed, 0),
       coalesce(r.failed, 0), coalesce(r.cancelled, 0))
"""


def shown(row: asyncpg.Record) -> dict[str, Any]:
    """What readers see of a row, without times and result."""
    parsed = {name: row[name] and json.loads(row[name]) for name in ("progress", "error_details", "metadata")}
    plain = ("status", "type", "version", "attempt", "error", "batch_id", "stalled")
    return parsed | {name: row[name] for name in plain}


def shown_by(job: Job) -> dict[str, Any]:
    """The same of the model."""
    names = (
        "progress",
        "error_details",
        "metadata",
        "status",
        "type",
        "version",
        "attempt",
        "error",
        "batch_id",
        "stalled",
    )
    return {name: getattr(job, name) for name in names}


async def _row(connection: Connection, key: tuple[int, str]) -> asyncpg.Record | None:
    return await connection.fetchrow("select * from jobs where account_id = $1 and id = $2", *key)


async def _outbox(connection: Connection) -> list[tuple[int, str]]:
    """The jobs that this transaction has noted so far; their batches stand beside them."""
    row = await connection.fetchrow("select accounts, jobs from outbox where xid = pg_current_xact_id()")
    noted = [] if row is None else list(zip(row["accounts"], row["jobs"], strict=True))
    return [key for key in noted if batch_of(key) is None]


def _differences(before: asyncpg.Record, after: asyncpg.Record) -> set[str]:
    return {name for name in before.keys() if before[name] != after[name]}  # noqa: SIM118


def _digest(result: model.Result) -> bytes:
    return hashlib.sha256(result[0].encode() + b"\0" + result[1]).digest()


def _json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value)


# Single cases


async def test_an_empty_call_does_nothing(table: JobTable, connection: Connection) -> None:
    assert await table.report([]) == []
    assert await connection.fetchval("select count(*) from outbox") == 0


async def test_outcomes_come_in_the_order_asked(table: JobTable, connection: Connection) -> None:
    ids = [f"job-{n}" for n in range(40)]
    await _create(table, *ids)
    random.Random(7).shuffle(ids)
    verdicts = await table.report([Report(1, job_id, status="PROCESSING") for job_id in [*ids, "missing"]])
    assert [verdict.job and verdict.job.id for verdict in verdicts] == [*ids, None]


async def test_one_commit_is_one_row_of_the_outbox(table: JobTable, connection: Connection) -> None:
    await _create(table, "a", "b")
    await connection.execute("delete from outbox")
    verdicts = await table.report([Report(1, "a", status="PROCESSING"), Report(1, "b", progress={"percentage": 1})])
    rows = await connection.fetch("select xid::text as xid, jobs from outbox")
    assert [(row["xid"], sorted(row["jobs"])) for row in rows] == [(verdicts[0].xid, ["a", "b"])]


async def test_a_heartbeat_moves_heartbeat_at_and_nothing_else(table: JobTable, connection: Connection) -> None:
    await _create(table, "a")
    await connection.execute("delete from outbox")
    before = await _row(connection, (1, "a"))
    [verdict] = await table.report([Report(1, "a")])
    after = await _row(connection, (1, "a"))
    assert verdict.outcome == "same"
    assert _differences(before, after) <= {"heartbeat_at"}
    assert await connection.fetchval("select count(*) from outbox") == 0
    assert await connection.fetchval("select count(*) from job_history") == 1


async def test_a_heartbeat_of_a_stalled_job_is_a_change(table: JobTable, connection: Connection) -> None:
    await _create(table, "a")
    await table.report([Report(1, "a", status="PROCESSING")])
    await connection.execute("update jobs set stalled = true, version = version + 1")
    [verdict] = await table.report([Report(1, "a")])
    assert (verdict.outcome, verdict.job.stalled, verdict.job.version) == ("changed", False, 4)
    assert await connection.fetchval("select count(*) from job_history") == 4


async def test_changed_at_does_not_run_backwards_with_the_clock(table: JobTable, connection: Connection) -> None:
    await _create(table, "a")
    ahead = await connection.fetchval("update jobs set changed_at = changed_at + interval '1 h' returning changed_at")
    for percentage in (10, 20):
        [verdict] = await table.report([Report(1, "a", progress={"percentage": percentage})])
        assert verdict.job.changed_at == ahead
    assert verdict.job.version == 3


@pytest.mark.parametrize(
    "bad",
    [
        Report(1, "a", status="FAILED"),
        Report(1, "a", status="no such state"),
        Report(1, "a", progress={"percentage": 101}),
        Report(1, "a", progress={"percentage": -1}),
        Report(1, "a", progress={"percentage": "many"}),
        Report(1, "a", metadata={"nul": "\0"}),
        Report(1, "a", if_match="\udcff"),
        Report(1, "a", attempt=2**31),
    ],
    ids=lambda report: str({name: getattr(report, name) for name in report.__slots__ if getattr(report, name)})[:60],
)
async def test_what_cannot_be_stored_is_a_bad_value_and_changes_nothing(
    table: JobTable, connection: Connection, bad: Report
) -> None:
    await _create(table, "a", "b")
    before = await connection.fetch("select * from jobs")
    with pytest.raises(BadValue):
        await table.report([Report(1, "b", status="PROCESSING"), bad])
    assert await connection.fetch("select * from jobs") == before


# Two at once


async def test_a_report_that_waited_for_a_deletion_hears_that_the_job_is_deleted(
    table: JobTable, connection: Connection, connect: Callable[[], Awaitable[Connection]]
) -> None:
    await _create(table, "a")
    async with connection.transaction():
        await connection.fetch(SQL["delete"], 1, "a", None)
        waiting = asyncio.create_task(table.report([Report(1, "a", status="PROCESSING")]))
        await until_somebody_waits(await connect())
    [verdict] = await waiting
    assert verdict.outcome == "deleted"


async def test_a_report_that_waited_for_another_sees_what_it_wrote(
    table: JobTable, connection: Connection, connect: Callable[[], Awaitable[Connection]]
) -> None:
    await _create(table, "a")
    async with connection.transaction():
        await connection.execute(
            "update jobs set status = 'PROCESSING', started_at = now(), attempt = 2, version = 2,"
            " progress = '{\"percentage\": 70}', changed_at = now() + interval '1 h'"
        )
        stale = asyncio.create_task(table.report([Report(1, "a", attempt=1, status="COMPLETED")]))
        await until_somebody_waits(watcher := await connect())
    assert [verdict.outcome for verdict in await stale] == ["stale_attempt"]
    async with connection.transaction():
        await connection.execute("update jobs set version = 3, progress = '{\"percentage\": 80}'")
        lower = asyncio.create_task(table.report([Report(1, "a", progress={"percentage": 75, "step": "ocr"})]))
        await until_somebody_waits(watcher)
    [verdict] = await lower
    assert (verdict.outcome, verdict.job.version) == ("changed", 4)
    assert verdict.job.progress == {"percentage": 80, "step": "ocr"}
    assert epoch_ms(verdict.job.changed_at) == epoch_ms(await connection.fetchval("select changed_at from jobs"))


@pytest.mark.parametrize("complete", [True, False])
async def test_the_same_result_put_twice_at_once_is_the_same(
    table: JobTable, connection: Connection, connect: Callable[[], Awaitable[Connection]], complete: bool
) -> None:
    """As when a worker gives up waiting and sends its result again while the first request is still being committed."""
    await _create(table, "a")
    said = Said("COMPLETED" if complete else None, result=("text/plain", b"done"))
    async with connection.transaction():
        [first] = await _report_jobs(connection, [(1, "a")], [said], [None])
        again = asyncio.create_task(
            table.report_result(Report(1, "a", status=said.status), "text/plain", _digest(said.result), b"done")
        )
        await until_somebody_waits(await connect())
    assert first["outcome"] == "changed"
    assert (await again).outcome == "same"
    assert await connection.fetchval("select version from jobs") == 2
    assert await connection.fetchval("select count(*) from results") == 1


async def test_a_deletion_that_waited_for_another_hears_that_the_job_is_deleted(
    table: JobTable, connection: Connection, connect: Callable[[], Awaitable[Connection]]
) -> None:
    await _create(table, "a")
    async with connection.transaction():
        await connection.fetch(SQL["delete"], 1, "a", None)
        waiting = asyncio.create_task(table.delete(1, "a", None))
        await until_somebody_waits(await connect())
    assert (await waiting).outcome == "deleted"


async def test_an_id_that_is_being_created_by_another_is_taken(
    table: JobTable, connection: Connection, connect: Callable[[], Awaitable[Connection]], database: str
) -> None:
    async with connection.transaction():
        await connection.fetch(SQL["create"], 1, json.dumps([_item("a")]), [])
        waiting = asyncio.create_task(_create(table, "0", "a"))
        await until_somebody_waits(await connect())
    with pytest.raises(IdTaken) as taken:
        await waiting
    assert (taken.value.job_id, taken.value.deleted) == ("a", False)
    assert [row["id"] for row in await connection.fetch("select id from jobs")] == ["a"]


async def test_an_id_created_and_deleted_while_another_creates_it_stays_taken(
    table: JobTable, connection: Connection, connect: Callable[[], Awaitable[Connection]]
) -> None:
    async with connection.transaction():
        await connection.fetch(SQL["create"], 1, json.dumps([_item("a")]), [])
        waiting = asyncio.create_task(_create(table, "a"))
        await until_somebody_waits(await connect())
        await connection.fetch(SQL["delete"], 1, "a", None)
    with pytest.raises(IdTaken):
        await waiting
    assert await connection.fetch("select id from jobs") == []


async def test_a_job_is_not_added_to_a_batch_that_is_being_closed(
    table: JobTable, connection: Connection, connect: Callable[[], Awaitable[Connection]]
) -> None:
    await _create(table, NewJob("a", "x", batch_id="b"))
    async with connection.transaction():
        await connection.execute("update batches set closed = true")
        waiting = asyncio.create_task(_create(table, NewJob("late", "x", batch_id="b")))
        await until_somebody_waits(await connect())
    with pytest.raises(BatchIsClosed):
        await waiting
    assert await connection.fetch(WRONG_BATCHES) == []


# Locks that nobody gives back

WRITES: dict[str, Callable[[JobTable], Awaitable[Any]]] = {
    "report": lambda table: table.report([Report(1, "0"), Report(1, "held", status="PROCESSING"), Report(1, "z")]),
    "result": lambda table: table.report_result(Report(1, "held"), "text/plain", b"d" * 32, b"body"),
    "delete": lambda table: table.delete(1, "held", None),
    "create in a batch": lambda table: _create(table, NewJob("new", "x", batch_id="batch")),
}


@pytest.mark.parametrize("write", WRITES)
async def test_a_lock_is_waited_for_one_second_and_nothing_is_written(
    table: JobTable, connection: Connection, write: str
) -> None:
    await _create(table, "0", NewJob("held", "x", batch_id="batch"), "z")
    before = await _everything(connection)
    async with connection.transaction():
        await connection.execute("select from jobs where id = 'held' for update")
        await connection.execute("select from batches for update")
        started = time.monotonic()
        with pytest.raises(Unavailable) as raised:
            await WRITES[write](table)
        waited_s = time.monotonic() - started
    assert isinstance(raised.value.__cause__, asyncpg.LockNotAvailableError)
    assert raised.value.__cause__.sqlstate == "55P03"
    assert 0.9 < waited_s < 4
    assert await _everything(connection) == before
    await WRITES[write](table)
    assert await _everything(connection) != before


async def until_somebody_waits(connection: Connection) -> None:
    """Until a session of this database waits for a lock."""
    asked = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    async with asyncio.timeout(10):
        while not await connection.fetchval(asked):
            pass


async def _create(table: JobTable, *jobs: str | NewJob) -> None:
    wanted = [NewJob(job, "extraction") if isinstance(job, str) else job for job in jobs]
    async with table._postgres.transaction() as connection:
        await table.create(connection, 1, wanted, [])


def _item(job_id: str) -> dict[str, Any]:
    """One job as create_jobs takes it."""
    return {
        "id": job_id,
        "type": "extraction",
        "progress": {},
        "metadata": {},
        "tags": [],
        "stalled_action": "mark",
        "public": False,
    }


async def _everything(connection: Connection) -> list[list[asyncpg.Record]]:
    tables = ("jobs", "job_history", "batches", "tombstones", "outbox", "results")
    return [await connection.fetch(f"select * from {name} order by 1, 2") for name in tables]
