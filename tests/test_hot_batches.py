"""A batch that is polled and waited for from all sides while its jobs finish: true at every moment, and not dear."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import asyncpg
import orjson
import pytest

from service.batch import MOST_JOBS_SHOWN
from service.hub import BATCH_TOLD_EVERY_s, Hub
from service.polling.operation import Waiting
from service.status_reader import StatusReader
from service.stores.batch_table import BatchTable
from service.stores.joined_reads import APART_s
from service.stores.ready import ReadyAnswer
from tests.conftest import Client
from tests.sse_reader import comes_true
from tests.web_process import WebProcess

REPORTERS, POLLERS, WAITERS = 24, 6, 10
FAILS_EVERY = 50

StartWeb = Callable[..., Awaitable[WebProcess]]


class Batch:
    """What is known of a batch: how many of its jobs were acknowledged as finished."""

    def __init__(self, http: aiohttp.ClientSession, webs: Sequence[WebProcess], jobs: int) -> None:
        self.http = http
        self.webs = webs
        self.jobs = jobs
        self.to_report = iter(range(jobs))
        self.acknowledged = 0
        self.over = asyncio.Event()
        self.reads = self.unchanged = self.waits = 0

    async def create(self) -> None:
        jobs = [
            {"id": name(n), "type": "extraction", "batch_id": "hot", "batch_size": self.jobs} for n in range(self.jobs)
        ]
        for start in range(0, self.jobs, 1000):
            async with self.http.post(f"{self.webs[0].url}/jobs", json=jobs[start : start + 1000]) as created:
                assert created.status == 201, await created.text()

    async def report_and_read(self, number: int) -> None:
        """Reports through one process, reads through the other, until there is nothing more to report."""
        web, other = itertools.islice(itertools.cycle(self.webs), number, number + 2)
        for n in self.to_report:
            status = "FAILED" if n % FAILS_EVERY == 0 else "COMPLETED"
            async with self.http.patch(f"{web.url}/jobs/{name(n)}", json={"status": status}) as reported:
                assert reported.status == 200, await reported.text()
                assert "Warning" not in reported.headers
            self.acknowledged += 1
            shown = await self.read(other)
            if n < MOST_JOBS_SHOWN:
                job = shown["jobs"][n]
                assert (job["job_id"], job["status"]) == (name(n), status.lower())

    async def poll(self, number: int) -> None:
        """Hammers one process; every other poller asks for changes only."""
        web, held, etag = self.webs[number % 2], {}, ""
        while not self.over.is_set():
            floor = self.acknowledged
            async with self.http.get(
                self.url(web), headers={"If-None-Match": etag} if number // 2 % 2 else {}
            ) as answer:
                held, etag = (
                    (orjson.loads(await answer.read()), answer.headers["ETag"])
                    if answer.status == 200
                    else (held, etag)
                )
                self.unchanged += answer.status == 304
                self.judge(held, floor)

    async def wait_for_changes(self, number: int) -> None:
        web, etag, last = self.webs[number % 2], "", {}
        while last.get("status") not in ("completed", "completed_with_failures"):
            floor = self.acknowledged
            headers = {"Prefer": "wait=30", "If-None-Match": etag or '"none"'}
            async with self.http.get(self.url(web), headers=headers) as answer:
                assert (answer.status, answer.headers["Preference-Applied"]) == (200, "wait=30")
                assert answer.headers["ETag"] != etag
                last, etag = orjson.loads(await answer.read()), answer.headers["ETag"]
                self.judge(last, floor)
                self.waits += 1

    async def wait_for_the_end(self, number: int) -> dict[str, Any]:
        """As often as it takes: the answer that it is over."""
        while True:
            floor = self.acknowledged
            async with self.http.get(self.url(self.webs[number % 2]), headers={"Prefer": "wait=30"}) as answer:
                assert answer.status == 200
                shown = self.judge(orjson.loads(await answer.read()), floor)
                if shown["status"] != "processing":
                    return shown

    async def read(self, web: WebProcess) -> dict[str, Any]:
        floor = self.acknowledged
        async with self.http.get(self.url(web)) as answer:
            assert answer.status == 200, await answer.text()
            return self.judge(orjson.loads(await answer.read()), floor)

    def judge(self, shown: dict[str, Any], floor: int) -> dict[str, Any]:
        """What was told against what was acknowledged before it was asked for."""
        self.reads += 1
        finished = shown["completed_jobs"] + shown["failed_jobs"] + shown["cancelled_jobs"]
        assert finished >= floor, f"{finished} finished, {floor} were acknowledged before"
        statuses = [job["status"] for job in shown["jobs"]]
        if self.jobs <= MOST_JOBS_SHOWN:
            assert len(statuses) - statuses.count("queued") == finished
        return shown

    @staticmethod
    def url(web: WebProcess) -> str:
        return f"{web.url}/jobs/batch/hot"


def name(number: int) -> str:
    return f"job-{number:05}"


@pytest.mark.parametrize("jobs", [1_500, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
async def test_no_read_of_a_hot_batch_is_behind_what_was_acknowledged(start_web: StartWeb, key: str, jobs: int) -> None:
    webs = [await start_web(), await start_web()]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers={"X-API-Key": key}, connector=connector) as http:
        batch = Batch(http, webs, jobs)
        await batch.create()
        ends = [asyncio.create_task(batch.wait_for_the_end(number)) for number in range(WAITERS)]
        askers = [asyncio.create_task(batch.poll(number)) for number in range(POLLERS)]
        askers += [asyncio.create_task(batch.wait_for_changes(number)) for number in range(WAITERS)]
        started = time.monotonic()
        await asyncio.gather(*(batch.report_and_read(number) for number in range(REPORTERS)))
        took_s = time.monotonic() - started
        last = [await batch.read(web) for web in webs]
        batch.over.set()
        await asyncio.gather(*askers)
        async with asyncio.timeout(5):
            last += await asyncio.gather(*ends)
    print(f"{jobs} reports in {took_s:.1f} s, {batch.reads} answers, {batch.unchanged} x 304, {batch.waits} waits")
    failed = len(range(0, jobs, FAILS_EVERY))
    for shown in last:
        assert (shown["status"], shown["closed"], shown["overall_progress"]) == ("completed_with_failures", True, 100)
        assert (shown["completed_jobs"], shown["failed_jobs"], shown["total_jobs"]) == (jobs - failed, failed, jobs)
        assert [job["status"] for job in shown["jobs"]] == [
            "failed" if n % FAILS_EVERY == 0 else "completed" for n in range(MOST_JOBS_SHOWN)
        ]


async def small_batch(client: Client, jobs: int) -> None:
    every = [{"id": name(n), "type": "extraction", "batch_id": "hot", "close_batch": True} for n in range(jobs)]
    created = await client.post("/jobs", json=every)
    assert created.status == 201


async def finish(client: Client, jobs: int) -> None:
    for n in range(jobs):
        reported = await client.patch(f"/jobs/{name(n)}", json={"status": "COMPLETED"})
        assert reported.status == 200


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """When each read of batches in Postgres began and ended."""
    noted = []
    read = BatchTable.read

    async def noting(self: BatchTable, *args: Any, **options: Any) -> Any:
        began = time.monotonic()
        found = await read(self, *args, **options)
        noted.append((began, time.monotonic()))
        return found

    monkeypatch.setattr(BatchTable, "read", noting)
    return noted


@pytest.mark.parametrize("query", ["", "?include_progress=1"])
async def test_of_a_batch_that_is_polled_hard_no_two_reads_are_under_way_and_none_follows_at_once(
    client: Client, spans: list[tuple[float, float]], query: str
) -> None:
    jobs, polls = 100, 0
    await small_batch(client, jobs)
    finished = asyncio.Event()

    async def hammer() -> None:
        nonlocal polls
        while not finished.is_set():
            async with client.get("/jobs/batch/hot" + query) as answer:
                assert answer.status == 200
            polls += 1

    hammering = [asyncio.create_task(hammer()) for _ in range(20)]
    await finish(client, jobs)
    finished.set()
    await asyncio.gather(*hammering)
    assert len(spans) < polls / 2
    for (began, ended), (began_next, _) in itertools.pairwise(spans):
        assert began_next >= ended
        assert began_next - began > 0.9 * APART_s


async def test_a_batch_that_is_asked_for_now_and_then_is_read_at_once(client: Client) -> None:
    await small_batch(client, 3)
    took = []
    for n in range(3):
        await asyncio.sleep(2 * APART_s)
        await client.patch(f"/jobs/{name(n)}", json={"status": "COMPLETED"})
        started = time.monotonic()
        assert orjson.loads(await (await client.get("/jobs/batch/hot")).read())["completed_jobs"] == n + 1
        took.append(time.monotonic() - started)
    assert min(took) < APART_s


async def test_who_waits_for_the_end_of_a_batch_is_not_woken_by_each_of_its_changes(
    inside: dict[type, Any], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "_reconcile", AsyncMock())
    jobs, waits = 60, 50
    await small_batch(client, jobs)
    waiting = [asyncio.create_task(client.get("/jobs/batch/hot", headers={"Prefer": "wait=30"})) for _ in range(waits)]
    await comes_true(lambda: len(inside[Waiting]) == waits)
    looked = 0
    read = StatusReader.read

    async def counting(self: StatusReader, *args: Any) -> ReadyAnswer:
        nonlocal looked
        looked += 1
        return await read(self, *args)

    monkeypatch.setattr(StatusReader, "read", counting)
    started = time.monotonic()
    await finish(client, jobs)
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*waiting)
    tellings = (time.monotonic() - started) / BATCH_TOLD_EVERY_s + 2
    for answer in answers:
        assert orjson.loads(await answer.read())["status"] == "completed"
    assert looked <= tellings + waits, "one looks for all, and at the end each for itself"


async def test_who_asks_behind_a_read_that_fails_does_not_wait_for_another_to_fail(
    start_web: StartWeb, key: str, sql: asyncpg.Connection
) -> None:
    web = await start_web(JOBWIRE_DATABASE_TIMEOUT="1")
    async with aiohttp.ClientSession(web.url, headers={"X-API-Key": key}) as http:
        async with http.post("/jobs", json={"id": "a", "type": "x", "batch_id": "hot"}) as created:
            assert created.status == 201

        async def asked() -> float:
            started = time.monotonic()
            async with http.get("/jobs/batch/hot") as answer:
                assert answer.status == 503
            return time.monotonic() - started

        async with sql.transaction():
            await sql.execute("lock table batches in access exclusive mode")
            first = asyncio.create_task(asked())
            await asyncio.sleep(0.5)
            behind = asyncio.create_task(asked())
            assert await behind < 0.9 * await first
        async with http.get("/jobs/batch/hot") as answer:
            assert answer.status == 200
