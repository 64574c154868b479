"""`progress.eta`: what is promised of the end of a job, held against simulated jobs on a clock of the tests' own."""

import itertools
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from service.job import PROCESSING, QUEUED, Job, Report
from service.stores.connections import Postgres
from service.stores.job_table import JobTable
from tests.http import TIME, ask, create, report
from tests.sse_reader import EventReader

# Postgres looks for clock_timestamp() where we put ours.
CLOCK = """
create schema test;
create table test.clock (now timestamptz not null);
insert into test.clock values ('2026-11-24T08:00:00Z');
create function test.clock_timestamp() returns timestamptz language sql volatile as $$ select now from test.clock $$;
do $$ begin execute format('alter database %I set search_path = test, pg_catalog, public', current_database()); end $$;
"""
LEAST_POINTS, PATIENCE_points = 5, 25
BEGAN = datetime(2026, 11, 24, 8, tzinfo=UTC)


class Clock:
    """What Postgres takes for the time: seconds since BEGAN."""

    def __init__(self, sql: asyncpg.Connection) -> None:
        self._sql = sql

    async def set(self, at_s: float) -> None:
        await self._sql.execute("update test.clock set now = $1", BEGAN + timedelta(seconds=at_s))


@pytest.fixture
async def clock(sql: asyncpg.Connection) -> Clock:
    """For every connection that is opened from now on: ask for it before `client`."""
    await sql.execute(CLOCK)
    return Clock(sql)


class Simulated:
    """A job whose reports come when the test says. Times are seconds since BEGAN."""

    def __init__(self, table: JobTable, clock: Clock, job_id: str) -> None:
        self._table = table
        self._clock = clock
        self.id = job_id

    async def says(self, at_s: float, **said: Any) -> Job:
        """The job after a report."""
        await self._clock.set(at_s)
        [verdict] = await self._table.report([Report(1, self.id, **said)])
        assert verdict.job is not None, verdict
        return verdict.job

    async def starts(self, at_s: float = 0, **progress: Any) -> Job:
        return await self.says(at_s, status=PROCESSING, progress=progress or None)

    async def reaches(self, at_s: float, percentage: float) -> float | None:
        """The end that is told once this percentage is reached."""
        return told(await self.says(at_s, progress={"percentage": percentage}))


def told(job: Job) -> float | None:
    """The end that is told, in seconds since BEGAN."""
    return None if job.eta is None else (job.eta - BEGAN).total_seconds()


@pytest.fixture
async def table(clock: Clock, database: str) -> AsyncIterator[JobTable]:
    postgres = Postgres(database, pool_size=1, prepared_statements=True, timeout_s=10)
    await postgres.open()
    yield JobTable(postgres)
    await postgres.close()


@pytest.fixture
async def simulated(table: JobTable, clock: Clock, sql: asyncpg.Connection) -> Callable[[], Awaitable[Simulated]]:
    """Makes jobs that wait to be simulated."""
    numbers = itertools.count()
    await sql.execute("insert into accounts (name) values ('one')")

    async def make() -> Simulated:
        job_id = f"job-{next(numbers)}"
        await clock.set(0)
        await sql.execute(
            "insert into jobs (account_id, id, type, created_at, changed_at, updated_at, heartbeat_at)"
            " values (1, $1, 'x', $2, $2, $2, $2)",
            job_id,
            BEGAN,
        )
        return Simulated(table, clock, job_id)

    return make


# Steady jobs


@pytest.mark.parametrize("step", [0.25, 1, 2.5, 5, 10, 25])
async def test_the_end_of_a_steady_job_is_told_exactly_however_coarse_its_reports_are(simulated, step):
    job, seconds = await simulated(), 1000
    await job.starts()
    for n in range(1, int(100 / step)):
        eta = await job.reaches(n * step * 10, n * step)
        if n * step >= LEAST_POINTS:
            assert eta == pytest.approx(seconds, rel=0.001)


@pytest.mark.parametrize("seed", range(5))
async def test_reports_that_come_unevenly_do_not_shake_it(simulated, seed):
    """Each of the hundred pages takes half or one and a half of the usual time."""
    rng, job = random.Random(seed), await simulated()
    pages = [rng.uniform(5, 15) for _ in range(100)]
    await job.starts()
    for n in range(1, 100):
        at, eta = sum(pages[:n]), await job.reaches(sum(pages[:n]), n)
        if n >= 10:
            assert eta - at == pytest.approx(sum(pages[n:]), rel=0.35, abs=25)


async def test_files_count_where_no_percentage_is_given(simulated):
    job = await simulated()
    await job.starts(files_completed=0, total_files=8)
    for n in range(1, 8):
        eta = told(await job.says(n * 60, progress={"files_completed": n}))
        assert eta == pytest.approx(480, rel=0.001)


async def test_a_percentage_that_is_given_counts_and_not_the_files(simulated):
    job = await simulated()
    await job.starts(total_files=2)
    eta = told(await job.says(100, progress={"percentage": 10, "files_completed": 1}))
    assert eta == pytest.approx(1000, rel=0.001)


# Jobs that change their pace


def reached(at: float, knees: list[tuple[float, float]]) -> float:
    """The percentage at a part of the time, along straight lines between (part of the time, percentage)."""
    for (t0, p0), (t1, p1) in itertools.pairwise(knees):
        if at <= t1:
            return p0 + (p1 - p0) * (at - t0) / (t1 - t0)
    raise AssertionError(at)


async def along(job: Simulated, knees: list[tuple[float, float]], reports: int) -> dict[float, tuple[float, float]]:
    """By percentage: how much time is left as told and in truth. The job takes 10,000 s and is told evenly in time."""
    await job.starts()
    lefts = {}
    for n in range(1, reports):
        at, percentage = 10_000 * n / reports, round(reached(n / reports, knees), 6)
        eta = await job.reaches(at, percentage)
        if eta is not None:
            lefts[percentage] = (eta - at, 10_000 - at)
    return lefts


async def test_a_job_that_was_fast_first_is_not_promised_too_early_for_long(simulated):
    """80 % in the first fifth of the time. What is told of the time that is left grows true with each point."""
    lefts = await along(await simulated(), [(0, 0), (0.2, 80), (1, 100)], 25)
    for percentage, least in [(81, 0.09), (85, 0.39), (90, 0.63), (95, 0.77), (99, 0.85)]:
        left, truth = lefts[percentage]
        assert least <= left / truth <= 1, percentage
    for percentage, (left, truth) in lefts.items():
        assert percentage <= 80 or left / truth >= 1 - math.exp((80 - percentage) / 10), percentage


async def test_a_job_that_became_fast_is_told_late_rather_than_early(simulated):
    lefts = await along(await simulated(), [(0, 0), (0.8, 20), (1, 100)], 1000)
    for percentage, most in [(30, 6.5), (40, 3), (60, 1.3), (80, 1.04)]:
        left, truth = lefts[percentage]
        assert 1 <= left / truth <= most, percentage


steps = st.lists(
    st.tuples(st.floats(0, 20), st.floats(1, 5000)).map(lambda step: (round(step[0], 3), round(step[1], 3))),
    min_size=1,
    max_size=12,
)
"""Points that are made, and the seconds that they take."""


@settings(max_examples=150)
@given(steps)
@example([(5, 1.0)])
@example([(0.6, 1.0), (0.6, 1.0), (20, 1.0)])
async def test_what_is_told_lies_between_the_slowest_and_the_fastest_step(simulated, steps):
    job, at, done, counted = await simulated(), 0.0, 0.0, (0.0, 0.0)
    await job.starts()
    paces: list[float] = []
    for points, seconds in steps:
        at, done = round(at + seconds, 3), round(min(100, done + points), 3)
        now = await job.says(at, progress={"percentage": done})
        if done >= counted[1] + 1:
            paces.append((at - counted[0]) / (done - counted[1]))
            counted = (at, done)
        eta = told(now)
        if eta is None:
            continue
        assert now.eta > now.changed_at
        assert counted[1] >= LEAST_POINTS
        assert min(paces) * 0.999 <= (eta - counted[0]) / (100 - counted[1]) <= max(paces) * 1.001 + 0.001


@settings(max_examples=60)
@given(steps, st.floats(1, 20), st.floats(0, 20), st.floats(1, 5000), st.floats(1, 5000))
async def test_who_is_further_at_the_same_time_or_as_far_sooner_is_told_an_earlier_end(
    simulated, steps, points, more, seconds, later
):
    """The same beginning, and then another last report."""

    async def ends(points: float, seconds: float) -> float | None:
        job, at, done = await simulated(), 0.0, 0.0
        await job.starts()
        for made, took in [*((made / 4, took) for made, took in steps), (points, seconds)]:
            at, done = round(at + took, 3), min(100, done + made)
            eta = await job.reaches(at, done)
        return eta

    usual, further, slower = (
        await ends(points, seconds),
        await ends(points + more, seconds),
        await ends(points, seconds + later),
    )
    if usual is not None and further is not None:
        assert further <= usual + 0.002
    if usual is not None and slower is not None:
        assert slower > usual


# Jobs that stand still


async def test_what_is_no_progress_does_not_move_it(simulated):
    job = await simulated()
    await job.starts()
    eta = await job.reaches(100, 10)
    for at, said in [
        (101, {"progress": {"message": "still page 3"}}),
        (102, {"progress": {"step": "ocr"}}),
        (103, {"metadata": {"a": 1}}),
        (104, {"progress": {"percentage": 10.9}}),
        (105, {"progress": {"percentage": 3}}),
        (106, {"status": PROCESSING}),
        (107, {}),
    ]:
        assert told(await job.says(at, **said)) == eta


async def test_a_heartbeat_changes_nothing_even_when_the_end_that_was_told_has_passed(simulated):
    job = await simulated()
    await job.starts()
    await job.says(100, progress={"percentage": 90})
    held = await job.says(101, progress={"message": "page 9"})
    for at in (105, 112, 500):
        beat = await job.says(at)
        assert (beat.version, beat.changed_at, beat.eta) == (held.version, held.changed_at, held.eta)


async def test_an_end_that_has_passed_is_gone_with_the_next_change_until_there_is_progress(simulated):
    job = await simulated()
    await job.starts()
    assert await job.reaches(90, 90) == pytest.approx(100, abs=0.01)
    assert told(await job.says(99, progress={"message": "nearly"})) == pytest.approx(100, abs=0.01)
    assert told(await job.says(101, progress={"message": "still nearly"})) is None
    assert told(await job.says(5000, progress={"message": "and nearly"})) is None
    assert await job.reaches(5001, 91) > 5001


async def test_nothing_is_promised_of_a_job_that_has_been_stuck_for_as_long_as_a_quarter_of_it_takes(simulated):
    job = await simulated()
    await job.starts()
    assert await job.reaches(200, 20) == pytest.approx(1000, abs=1)
    assert told(await job.says(200 + 10 * PATIENCE_points - 1, progress={"message": "a"})) == pytest.approx(1000, abs=1)
    assert told(await job.says(200 + 10 * PATIENCE_points + 1, progress={"message": "b"})) is None
    assert await job.reaches(1200, 21) > 1200


async def test_a_stalled_job_has_none(simulated, clock, sql, table):
    job = await simulated()
    await job.starts()
    assert await job.reaches(100, 10) is not None
    await sql.execute("update jobs set stalled = true, version = version + 1 where id = $1", job.id)
    [stalled] = await table.read([(1, job.id)])
    assert stalled.eta is None
    assert told(await job.says(110)) == pytest.approx(1000, rel=0.001), "awake again"


# Jobs of which nothing is known


async def test_nothing_is_said_before_a_twentieth_is_done_and_a_second_has_passed(simulated):
    job = await simulated()
    assert (await job.starts()).eta is None
    assert await job.reaches(0.4, 20) is None, "too early"
    assert await job.reaches(0.9, 21) is None
    assert await job.reaches(1, 22) is not None
    job = await simulated()
    await job.starts()
    assert await job.reaches(600, LEAST_POINTS - 0.1) is None, "too little"
    assert told(await job.says(900, progress={"message": "a"})) is None
    assert await job.reaches(1200, LEAST_POINTS + 0.9) is not None


async def test_nothing_is_said_without_a_percentage_or_files(simulated):
    job = await simulated()
    await job.starts()
    for at, progress in [
        (100, {"message": "busy"}),
        (200, {"percentage": 0}),
        (300, {"files_completed": 7}),
        (400, {"files_completed": 7, "total_files": 0}),
        (500, {"queue_position": 3}),
    ]:
        assert told(await job.says(at, progress=progress)) is None


@pytest.mark.parametrize("status", [QUEUED, "COMPLETED", "FAILED", "CANCELLED"])
async def test_only_a_job_that_is_worked_on_has_one(simulated, status):
    job = await simulated()
    await job.starts()
    assert await job.reaches(100, 10) is not None
    failure = {"error": "e", "error_details": {"error_type": "e", "message": "e"}}
    ended = await job.says(110, status=status, **(failure if status in ("FAILED", "CANCELLED") else {}))
    assert ended.eta is None


async def test_a_job_at_100_that_is_still_worked_on_has_none(simulated):
    job = await simulated()
    await job.starts()
    assert await job.reaches(100, 50) is not None
    assert await job.reaches(200, 100) is None
    assert told(await job.says(201, progress={"message": "cleaning up"})) is None


async def test_another_attempt_is_measured_by_itself(simulated):
    job = await simulated()
    await job.starts()
    await job.reaches(100, 10)
    await job.says(200, status=QUEUED)
    assert (await job.starts(300)).eta is None
    assert await job.reaches(350, 10) == pytest.approx(800, rel=0.001)
    await job.says(400, status="FAILED", error="e", error_details={"error_type": "e", "message": "e"})
    await job.says(500, status=QUEUED, retry=True)
    assert (await job.starts(600, percentage=50)).eta is None
    assert await job.reaches(700, 60) == pytest.approx(1100, rel=0.001), (
        "what it began with was not made in this attempt"
    )


async def test_when_files_are_added_the_pace_is_unknown_until_it_was_measured_anew(simulated):
    job = await simulated()
    await job.starts(files_completed=0, total_files=10)
    assert told(await job.says(50, progress={"files_completed": 5})) == pytest.approx(100)
    assert told(await job.says(51, progress={"total_files": 100})) is None
    assert told(await job.says(91, progress={"files_completed": 9})) is None
    assert told(await job.says(101, progress={"files_completed": 10})) == pytest.approx(1001, rel=0.001)


async def test_no_number_that_a_report_may_carry_is_too_small_or_too_dense(simulated):
    job = await simulated()
    await job.starts(percentage=5e-324)
    at = 1.0
    for percentage in (1e-323, 2e-300, 1e-9, 1, math.nextafter(1, 2), 99.999999999999, math.nextafter(100, 0), 100):
        at += 3600
        assert (await job.says(at, progress={"percentage": percentage})).progress["percentage"] == percentage
    job = await simulated()
    await job.starts(files_completed=2**31 - 1, total_files=1)
    assert (await job.says(1, progress={"total_files": 2**31 - 1})).eta is None


@settings(max_examples=60)
@given(steps, st.lists(st.floats(0.001, 5000), min_size=1, max_size=8))
async def test_without_progress_it_is_one_time_that_lies_ahead_and_then_none(simulated, steps, silences):
    job, at, done = await simulated(), 0.0, 0.0
    await job.starts()
    for points, seconds in steps:
        at, done = at + seconds, min(100, done + points)
        now = await job.says(at, progress={"percentage": done})
    ends = [now.eta]
    for n, silence in enumerate(silences):
        at += silence
        now = await job.says(at, progress={"message": str(n)})
        assert now.eta is None or now.eta > now.changed_at
        ends.append(now.eta)
    known = [end for end in ends if end is not None]
    assert len(set(known)) <= 1
    assert ends == known + [None] * (len(ends) - len(known)), "once unknown, it stays so"


# On the wire


def in_seconds(text: str) -> float:
    assert TIME.fullmatch(text), text
    return (datetime.fromisoformat(text) - BEGAN).total_seconds()


async def seen(client: TestClient | ClientSession) -> list[dict[str, Any]]:
    """The progress of the job `a` in all that shows it."""
    listed = (await ask(client, "GET", "/jobs?status=processing")).json()["jobs"]
    of_several = (await ask(client, "GET", "/jobs?status=processing,failed")).json()["jobs"]
    many = (await ask(client, "GET", "/jobs/status?job_ids=a,b&include_progress=true")).json()["jobs"]
    async with client.get("/jobs/a/events") as stream:
        event = await EventReader.of(stream).next()
    job, status = [(await ask(client, "GET", f"/jobs/a{path}")).json() for path in ("", "/status")]
    return [each["progress"] for each in (job, status, *listed, *of_several, many[0], event.data)]


async def test_all_that_show_the_progress_of_a_job_show_the_same_end(clock, client, key, start_web, redis_url):
    for job_id in "ab":
        await create(client, id=job_id, batch_id="batch")
    await report(client, "a", status=PROCESSING)
    await clock.set(30)
    progress = (await report(client, "a", progress={"percentage": 40, "message": "4", "total_files": 9}))["progress"]
    assert list(progress) == ["message", "percentage", "total_files", "eta"]
    assert in_seconds(progress["eta"]) == pytest.approx(75, abs=0.001)
    assert await seen(client) == [progress] * 6

    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
    web = await start_web()
    async with ClientSession(web.url, headers={"X-API-Key": key}) as other:
        assert await seen(other) == [progress] * 6, "a process that has it from Postgres"

    batch = (await ask(client, "GET", "/jobs/batch/batch?include_progress=true")).json()
    assert [job["progress"] for job in batch["jobs"]] == [40, 0]
    done = await report(client, "a", status="COMPLETED")
    assert done["progress"] == {"message": "4", "percentage": 100, "total_files": 9}


async def test_an_answer_that_is_held_stays_as_it_is_when_its_end_has_passed(clock, client):
    await create(client, id="a")
    await report(client, "a", status=PROCESSING)
    await clock.set(90)
    await report(client, "a", progress={"percentage": 90})
    first = await ask(client, "GET", "/jobs/a")
    await clock.set(1000)
    await report(client, "a")  # a heartbeat
    again = await ask(client, "GET", "/jobs/a")
    assert (again.headers["ETag"], again.body) == (first.headers["ETag"], first.body)
    assert in_seconds(again.json()["progress"]["eta"]) == pytest.approx(100, abs=0.01)
    assert "eta" not in (await report(client, "a", progress={"message": "slow"}))["progress"]
    assert "eta" not in (await ask(client, "GET", "/jobs/a")).json()["progress"]


async def test_a_public_job_shows_it_to_anybody(clock, client):
    job = await create(client, public=True)
    await report(client, job["id"], status=PROCESSING)
    await clock.set(30)
    eta = (await report(client, job["id"], progress={"percentage": 40}))["progress"]["eta"]
    for path in ("", "/status"):
        answer = await ask(client, "GET", f"/jobs/{job['id']}{path}", headers={"X-API-Key": ""})
        assert answer.json()["progress"]["eta"] == eta


async def test_nobody_can_report_it(client):
    await create(client, id="a")
    sent = {"progress": {"eta": "2026-11-24T09:00:00.000Z"}}
    said = (await ask(client, "PATCH", "/jobs/a", json=sent)).problem(422, "validation_failed")
    assert list(said["details"]["fields"]) == ["progress"]
    [outcome] = (await ask(client, "PATCH", "/jobs", json=[{"id": "a", **sent}])).json()["results"] or [{}]
    assert outcome["status"] == 422
    said = (await ask(client, "POST", "/jobs", json={"type": "x", **sent})).problem(422, "validation_failed")
    assert list(said["details"]["fields"]) == ["progress"]


# In Postgres


async def test_mere_progress_stays_on_its_page(simulated, sql, table):
    job = await simulated()
    await job.starts()
    async with sql.transaction():
        await sql.execute("set local search_path = test, pg_catalog, public")
        for n in range(1, 20):
            await sql.execute("update test.clock set now = now + interval '1 minute'")
            report_jobs = "select outcome from report_jobs('{1}', $1, '{null}', $2, '{null}', '{null}', '{null}', '{null}', '{null}', '{f}', '{null}', '{null}')"
            assert await sql.fetchval(report_jobs, [job.id], [f'{{"percentage": {n}}}']) == "changed"
        row = await sql.fetchrow(
            "select pg_stat_get_xact_tuples_updated('jobs'::regclass) as updated,"
            " pg_stat_get_xact_tuples_hot_updated('jobs'::regclass) as hot, pace_reached from jobs"
        )
        assert (row["updated"], row["hot"], row["pace_reached"]) == (19, 19, 19)
