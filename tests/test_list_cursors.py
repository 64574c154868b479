"""Cursors: nobody else can make one, they go with their filters, and pages do not drift while jobs come and go."""

import asyncio
import random
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import count

import aiohttp
import pytest

from service.identity import READ, WRITE
from service.listing.cursor import Cursors
from service.stores.page_table import Filters, Position
from tests.conftest import SECRET, make_key
from tests.test_list import UNLIMITED, create, ids, page, refused

NEWER_SECRET = "a-newer-secret-of-the-tests-with-32-characters"


@pytest.fixture
async def key(database):
    """A key of `acme` that may list as often as a test needs."""
    return await make_key(database, "acme", (READ, WRITE), UNLIMITED)


async def cursor_of(client, **asked):
    return (await page(client, limit=1, **asked))["pagination"]["next_cursor"]


async def test_no_character_of_a_cursor_may_change(client):
    await create(client, *({"type": "x"} for _ in range(3)))
    cursor = await cursor_of(client)
    forged = {cursor[:n] + ("A" if cursor[n] != "A" else "B") + cursor[n + 1 :] for n in range(len(cursor))}
    forged |= {cursor[:-1], cursor + "A", cursor + "=", cursor + "\n", cursor[::-1], cursor * 2, " " + cursor}
    for one in forged:
        assert "no cursor of a list of yours" in await refused(client, "cursor", cursor=one)
    assert len(await ids(client, cursor=cursor)) == 2


async def test_a_cursor_goes_with_its_filters_however_they_are_written(client):
    await create(client, *({"type": "splitting", "tags": ["a", "b"], "user_id": "u"} for _ in range(3)))
    asked = {"status": "queued,FAILED", "tags": "a,b", "operation": "split", "created_after": "2024-01-15T10:30:00Z"}
    cursor = await cursor_of(client, **asked)
    same = {"status": "failed,Queued", "tags": "b,a,b", "created_after": "2024-01-15T12:30:00.000 02:00", "limit": 1}
    assert len(await ids(client, **asked | same, cursor=cursor)) == 1
    assert len(await ids(client, **asked, order="desc", cursor=cursor)) == 2
    for changed in (
        {"status": "queued"}, {"tags": "a"}, {"operation": "parse"}, {"created_after": "2024-01-15"},
        {"created_before": "2099-01-01"}, {"user_id": "u"}, {"batch_id": "b"}, {"type": "splitting"}, {"order": "asc"},
    ):  # fmt: skip
        answer = await client.get("/jobs", params=asked | changed | {"cursor": cursor})
        problem = await answer.json()
        assert answer.status == 422 and problem["details"]["error_type"] == "validation_failed"
        assert "belongs to other filters or another order" in problem["detail"]
        assert "belongs to other filters or another order" in problem["details"]["fields"]["cursor"][0]
    assert "other filters" in await refused(client, "cursor", cursor=cursor)


async def test_a_cursor_and_an_offset_do_not_go_together(client):
    await create(client, *({"type": "x"} for _ in range(3)))
    cursor = await cursor_of(client)
    for offset in (0, 1):
        assert "cursor" in await refused(client, "offset", cursor=cursor, offset=offset)


async def test_the_first_secret_seals_and_all_are_accepted(client, start_web, key):
    await create(client, *({"type": "x"} for _ in range(3)))
    process = await start_web(JOBWIRE_SECRETS=f"{NEWER_SECRET},{SECRET}")
    async with aiohttp.ClientSession(process.url, headers={"X-API-Key": key}) as rotated:
        assert len(await ids(rotated, cursor=await cursor_of(client))) == 2
        newer = await cursor_of(rotated)
        assert len(await ids(rotated, cursor=newer)) == 2
        assert "no cursor" in await refused(client, "cursor", cursor=newer)


def test_a_cursor_is_short_and_fit_for_an_address():
    position = Position(datetime(2026, 11, 24, 9, 30, 0, 123000, UTC), "x" * 128)
    cursors = Cursors([SECRET])
    cursor = cursors.make(7, Filters(), newest_first=True, position=position)
    assert len(cursor) <= 240 and cursor.replace("-", "").replace("_", "").isalnum()
    assert cursors.read(7, Filters(), newest_first=True, cursor=cursor) == position


# No drift


class Unrest:
    """Creates, reports, finishes and deletes jobs through another process, as fast as it answers.

    Of the jobs that were there at the start, `gone` are those that it deleted (or was about to).
    """

    def __init__(self, session, there):
        self.session, self.random = session, random.Random(1)
        self.there, self.gone, self.done = list(there), set(), 0
        self.numbers = count()

    async def run(self):
        while True:
            await self.random.choice((self.create, self.finish, self.finish, self.delete))()
            self.done += 1

    async def create(self):
        jobs = [
            {"id": f"new-{next(self.numbers)}", "type": "parsing", "tags": ["all"], "user_id": "u1"} for _ in range(20)
        ]
        assert (await self.session.post("/jobs", json=jobs)).status == 201

    async def finish(self):
        some = [{"id": job, "progress": {"percentage": 7}} for job in self.random.sample(self.there, 10)]
        some += [{"id": job, "status": "COMPLETED"} for job in self.random.sample(self.there, 10)]
        assert (await self.session.patch("/jobs", json=some)).status == 200

    async def delete(self):
        job = self.random.choice(self.there)
        self.gone.add(job)
        assert (await self.session.delete(f"/jobs/{job}")).status in (200, 404)


@asynccontextmanager
async def unrest(session, there):
    work = Unrest(session, there)
    tasks = [asyncio.create_task(work.run()) for _ in range(3)]
    try:
        yield work
        for task in tasks:
            assert not task.done() or task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def walk(session, work, **asked):
    """All ids that the pages show, one after the other, while `work` goes on."""
    seen, more = [], {}
    while True:
        before = work.done
        body = await page(session, limit=100, **asked, **more)
        seen += [job["job_id"] for job in body["jobs"]]
        if not body["pagination"]["has_more"]:
            return seen
        more = {"cursor": body["pagination"]["next_cursor"]}
        while work.done < before + 3:
            await asyncio.sleep(0.005)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("jobs", [3_000, pytest.param(10_000, marks=pytest.mark.long)])
async def test_each_job_that_was_there_and_stays_is_seen_exactly_once(start_web, key, jobs):
    reading, writing = await start_web(), await start_web()
    async with (
        aiohttp.ClientSession(reading.url, headers={"X-API-Key": key}) as reader,
        aiohttp.ClientSession(writing.url, headers={"X-API-Key": key}) as writer,
    ):
        of_filter = {"none": [], "user": [], "several": []}
        for start in range(0, jobs, 500):
            made = [
                {"id": f"old-{n}", "type": ("parsing", "splitting", "chunking")[n % 3]}
                for n in range(start, start + 500)
            ]
            made = [job | {"tags": ["all"], "user_id": f"u{n % 2}"} for n, job in enumerate(made)]
            await create(writer, *made)
            of_filter["none"] += [job["id"] for job in made]
            of_filter["user"] += [job["id"] for job in made if job["user_id"] == "u1"]
            of_filter["several"] += [job["id"] for job in made if job["type"] != "parsing"]
        filters = {"none": {}, "user": {"user_id": "u1", "tags": "all"}, "several": {"operation": "split"}}
        async with unrest(writer, of_filter["none"]) as work:
            for order in ("desc", "asc"):
                for name, asked in filters.items():
                    there = set(of_filter[name]) - work.gone
                    begun = work.done
                    seen = await walk(reader, work, order=order, **asked)
                    assert work.done > begun + len(there) // 50
                    assert len(seen) == len(set(seen)), f"{order} {name}: seen twice"
                    assert there - work.gone <= set(seen), f"{order} {name}: missed"
                    assert set(of_filter["none"]) & set(seen) <= set(of_filter[name])
