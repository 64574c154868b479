"""Two accounts: whatever one asks about the other's jobs, it learns nothing that it did not say itself."""

import asyncio
import json

import pytest

from tests.conftest import make_key
from tests.http import Answer, ask, create, fields_of, report

SECRET = "their secret"
THEIRS = {
    "id": "their-job",
    "type": "parsing",
    "batch_id": "their-batch",
    "user_id": SECRET,
    "pdf_name": SECRET,
    "tags": [SECRET],
    "metadata": {SECRET: SECRET},
    "progress": {"percentage": 7, "message": SECRET},
}
READ = (
    *("GET /jobs/their-job", "GET /jobs/their-job/status", "GET /jobs/their-job/result", "GET /jobs/their-job/results"),
    *("GET /jobs/their-job/history", "GET /jobs/their-job/history?after_version=1", "GET /jobs/their-job/events"),
    *("GET /jobs/their-job/events?last_event_id=1-1", "HEAD /jobs/their-job", "HEAD /jobs/their-job/result"),
)
WRITE = {
    "PATCH /jobs/their-job": {"status": "COMPLETED"},
    "PUT /jobs/their-job/result?complete=true": {"pages": 1},
    "POST /jobs/their-job/cancel": {},
    "POST /jobs/their-job/retry": {},
    "DELETE /jobs/their-job": None,
}
BATCH = (
    "GET /jobs/batch/their-batch",
    "GET /jobs/batch/their-batch?include_progress=true",
    "HEAD /jobs/batch/their-batch",
    "POST /jobs/batch/their-batch/close",
)
LISTS = (
    *("", "?batch_id=their-batch", "?user_id=their+secret", "?tags=their+secret", "?type=parsing", "?operation=parse"),
    *("?status=failed", "?created_after=2020-01-01", "?order=asc&limit=100", "?offset=1"),
)


class Neighbour:
    """What the other account does, through the same process, so that its answers lie ready in the same memory."""

    def __init__(self, client, key: str) -> None:
        self.client = client
        self.key = {"X-API-Key": key}

    async def do(self, method: str, path: str, **options) -> Answer:
        answer = await ask(self.client, method, path, headers=self.key, **options)
        assert answer.status in (200, 201), answer
        return answer

    async def reads_it_all(self) -> None:
        for path in ("/status", "/history", ""):
            last = await self.do("GET", f"/jobs/their-job{path}")
        assert SECRET in last.body.decode()
        await self.do("GET", "/jobs/status?job_ids=their-job&include_progress=true")
        await self.do("GET", "/jobs/batch/their-batch")


@pytest.fixture
async def neighbour(client, database):
    return Neighbour(client, await make_key(database, "other", limits={"list": "none", "bulk": "none"}))


OF_EVERY_REFUSAL = {"content-type", "cache-control", "content-length", "server", "x-request-id"}


async def heard(client, address: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """All that an answer says but the date."""
    answer = await ask(client, *address.split(), headers=headers | {"X-Request-Id": "the-same"})
    return answer.status, {k: v for k, v in answer.headers.items() if k != "Date"}, answer.body.decode()


async def all_that_is_heard(client, addresses, **headers: str) -> dict[str, tuple[int, dict[str, str], str]]:
    return {address: await heard(client, address, **headers) for address in addresses}


async def test_of_a_foreign_job_nothing_is_heard_whatever_becomes_of_it(client, neighbour):
    await neighbour.do("POST", "/jobs", json=THEIRS)
    await neighbour.reads_it_all()
    before = await all_that_is_heard(client, READ)
    for address, (status, headers, body) in before.items():
        assert status == 403, address
        assert {name.lower() for name in headers} == OF_EVERY_REFUSAL
        assert body == "" or json.loads(body)["details"]["error_type"] == "forbidden"
        assert SECRET not in body
    for said in (
        {"status": "PROCESSING", "progress": {"percentage": 50, "step": SECRET}},
        {"status": "queued"},
        {"status": "FAILED", "error": SECRET},
    ):
        await neighbour.do("PATCH", "/jobs/their-job", json=said)
        await neighbour.reads_it_all()
        assert await all_that_is_heard(client, READ) == before
    etag = (await neighbour.do("GET", "/jobs/their-job")).headers["ETag"]
    for known in (etag, f"W/{etag}", "*"):
        assert await all_that_is_heard(client, READ, **{"If-None-Match": known}) == before
        assert await all_that_is_heard(client, READ, **{"If-None-Match": known, "Prefer": "wait=30"}) == before
    assert await all_that_is_heard(client, READ, **{"Last-Event-ID": etag.strip('"')}) == before


async def test_a_foreign_job_cannot_be_touched(client, neighbour):
    await neighbour.do("POST", "/jobs", json=THEIRS)
    untouched = (await neighbour.do("GET", "/jobs/their-job")).body
    etag = (await neighbour.do("GET", "/jobs/their-job")).headers["ETag"]
    for headers in ({}, {"If-Match": etag}, {"If-Match": "*"}, {"If-Match": '"1-1"'}):
        for address, said in WRITE.items():
            said = {} if said is None else {"json": said}
            refused = (await ask(client, *address.split(), headers=headers, **said)).problem(403, "forbidden")
            assert SECRET not in str(refused)
    many = await ask(client, "PATCH", "/jobs", json=[{"id": "their-job", "status": "FAILED", "attempt": 9}])
    assert [(result["status"], result["error"]["error_type"]) for result in many.json()["results"]] == [
        (403, "forbidden")
    ]
    assert (await neighbour.do("GET", "/jobs/their-job")).body == untouched


async def test_among_many_jobs_a_foreign_one_is_forbidden_and_says_no_more(client, neighbour):
    await neighbour.do("POST", "/jobs", json=THEIRS)
    await neighbour.reads_it_all()
    await create(client, id="mine", progress={"percentage": 3})
    asked = ["GET /jobs/status?include_progress=true&job_ids=their-job,mine,nobody,their-job"]
    before = await all_that_is_heard(client, asked)
    body = {"job_ids": ["their-job", "mine", "nobody", "their-job"], "include_progress": True}
    assert (await ask(client, "POST", "/jobs/status", json=body)).body.decode() == before[asked[0]][2]
    lines = json.loads(before[asked[0]][2])["jobs"]
    assert (
        lines[0]
        == lines[3]
        == {
            "job_id": "their-job",
            "status": None,
            "error": {"error_type": "forbidden", "message": "Job their-job belongs to another account"},
        }
    )
    assert [(line["status"], line.get("progress")) for line in lines[1:3]] == [
        ("queued", {"percentage": 3}),
        (None, None),
    ]
    await neighbour.do("PATCH", "/jobs/their-job", json={"status": "FAILED", "error": SECRET})
    await neighbour.reads_it_all()
    assert await all_that_is_heard(client, asked) == before


async def test_a_foreign_batch_is_as_if_it_were_not(client, neighbour, sql):
    """The very answers that were given before there was one: not even that it exists is heard."""
    before = await all_that_is_heard(client, BATCH)
    assert {status for status, _, _ in before.values()} == {404}
    await neighbour.do("POST", "/jobs", json=THEIRS)
    await neighbour.reads_it_all()
    assert await all_that_is_heard(client, BATCH) == before
    etag = (await neighbour.do("GET", "/jobs/batch/their-batch")).headers["ETag"]
    for known in (etag, "*"):
        assert await all_that_is_heard(client, BATCH, **{"If-None-Match": known}) == before
        assert await all_that_is_heard(client, BATCH, **{"If-None-Match": known, "Prefer": "wait=30"}) == before
    assert (await neighbour.do("GET", "/jobs/batch/their-batch")).json()["closed"] is False
    assert await sql.fetchval("select count(*) from batches") == 1


async def test_no_list_shows_counts_or_continues_a_foreign_one(client, neighbour):
    await create(client, id="mine", type="extraction")
    asked = [f"GET /jobs{query}" for query in LISTS]
    before = await all_that_is_heard(client, asked)
    for n in range(3):
        await neighbour.do("POST", "/jobs", json=THEIRS | {"id": f"their-{n}"})
    await neighbour.do("PATCH", "/jobs/their-0", json={"status": "FAILED", "error": SECRET})
    assert await all_that_is_heard(client, asked) == before
    page = (await neighbour.do("GET", "/jobs?limit=1")).json()
    cursor = page["pagination"]["next_cursor"]
    assert page["pagination"]["total"] == 3
    foreign, forged = [await heard(client, f"GET /jobs?limit=1&cursor={text}") for text in (cursor, "A" * len(cursor))]
    assert foreign == forged
    assert fields_of(await ask(client, "GET", f"/jobs?limit=1&cursor={cursor}")) == ["cursor"]
    assert len((await neighbour.do("GET", f"/jobs?limit=1&cursor={cursor}")).json()["jobs"]) == 1


async def test_two_jobs_of_one_name_are_two_jobs(client, neighbour):
    """Ids and batch ids belong to an account: the same name elsewhere is read, counted and followed by itself."""
    mine = {"id": "shared", "type": "extraction", "batch_id": "shared", "close_batch": True}
    await ask(client, "POST", "/jobs", json=[mine])
    await neighbour.do("POST", "/jobs", json=THEIRS | {"id": "shared", "batch_id": "shared"})
    await neighbour.do("POST", "/jobs", json=THEIRS | {"id": "another", "batch_id": "shared"})
    following = asyncio.create_task(ask(client, "GET", "/jobs/shared/events"))
    waiting = asyncio.create_task(ask(client, "GET", "/jobs/shared", headers={"Prefer": "wait=30"}))
    over = asyncio.create_task(ask(client, "GET", "/jobs/batch/shared", headers={"Prefer": "wait=30"}))
    await asyncio.sleep(0.1)
    await neighbour.do("PATCH", "/jobs/shared", json={"status": "FAILED", "error": SECRET})
    await neighbour.do("POST", "/jobs/batch/shared/close")
    for path in ("shared", "shared/status", "shared/history", "batch/shared", "status?job_ids=shared", "shared/result"):
        said = (await ask(client, "GET", f"/jobs/{path}")).body.decode()
        assert "fail" not in said.replace("failed_jobs", "").lower() and SECRET not in said
    assert not (following.done() or waiting.done() or over.done())
    assert (await report(client, "shared", status="COMPLETED"))["version"] == 2
    async with asyncio.timeout(10):
        assert (await waiting).json()["status"] == "COMPLETED"
        counts = (await over).json()
        assert (counts["status"], counts["total_jobs"], counts["failed_jobs"]) == ("completed", 1, 0)
        told = (await following).body.decode()
    assert told.count("event: ") == 2 and SECRET not in told
    theirs = (await neighbour.do("GET", "/jobs/batch/shared")).json()
    assert (theirs["total_jobs"], theirs["failed_jobs"], theirs["completed_jobs"]) == (2, 1, 0)
    await ask(client, "DELETE", "/jobs/shared")
    assert (await neighbour.do("GET", "/jobs/shared")).json()["error"] == SECRET
    (await ask(client, "GET", "/jobs/shared")).problem(404, "deleted")


async def test_a_deleted_or_removed_foreign_job_is_heard_of_no_more_than_any_other(client, neighbour):
    await neighbour.do("POST", "/jobs", json=THEIRS)
    await neighbour.do("DELETE", "/jobs/their-job")
    for address in READ:
        answer = await ask(client, *address.split())
        assert answer.status in (403, 404)
        assert SECRET not in answer.body.decode()
        assert b"expired_at" not in answer.body
