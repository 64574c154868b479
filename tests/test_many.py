"""Many jobs in one call, and batches: shapes, order, closing, 304 and waiting, and counts that are never behind."""

import asyncio

import aiohttp
import pytest
from redis.asyncio import Redis

from service.embedded import free_port
from service.polling.many_operation import BatchReader
from service.stores.job_table import JobTable
from service.stores.status_cache import MOST_CHANGES
from tests.conftest import make_key
from tests.sse_reader import comes_true


async def create(client, *jobs):
    answer = await client.post("/jobs", json=[{"type": "extraction", **job} for job in jobs])
    assert answer.status == 201, await answer.text()


async def body(answer):
    assert answer.status == 200, await answer.text()
    return await answer.json()


async def batch(client, name="b", **query):
    return await body(await client.get(f"/jobs/batch/{name}", params=query))


async def test_many_jobs_come_in_the_order_asked_and_unknown_ones_never_fail_the_call(client, database):
    stranger = {"X-API-Key": await make_key(database, "stranger")}
    await client.post("/jobs", json={"id": "theirs", "type": "parsing"}, headers=stranger)
    await create(client, {"id": "a"}, {"id": "b", "progress": {"percentage": 5}})
    await client.patch("/jobs/b", json={"status": "PROCESSING"})
    expected = [
        {"job_id": "b", "status": "processing", "version": 2},
        {
            "job_id": "nope",
            "status": None,
            "error": {"error_type": "not_found", "message": "Job with ID 'nope' does not exist"},
        },
        {"job_id": "a", "status": "queued", "version": 1},
        {
            "job_id": "theirs",
            "status": None,
            "error": {"error_type": "forbidden", "message": "Job theirs belongs to another account"},
        },
        {"job_id": "b", "status": "processing", "version": 2},
    ]
    assert (await body(await client.get("/jobs/status?job_ids=b,nope,a,theirs,b")))["jobs"] == expected
    assert (await body(await client.get("/jobs/status?job_ids=b,nope&job_ids=a&job_ids=theirs,b")))["jobs"] == expected
    ids = ["b", "nope", "a", "theirs", "b"]
    assert (await body(await client.post("/jobs/status", json={"job_ids": ids})))["jobs"] == expected


@pytest.mark.parametrize("yes", ["true", "True", "1"])
async def test_progress_comes_only_where_it_is_asked_for(client, yes):
    await create(client, {"id": "a", "progress": {"percentage": 5, "message": "m"}})
    [job] = (await body(await client.get(f"/jobs/status?job_ids=a&include_progress={yes}")))["jobs"]
    assert job["progress"] == {"percentage": 5, "message": "m"}
    [job] = (await body(await client.get("/jobs/status?job_ids=a&include_progress=False")))["jobs"]
    assert "progress" not in job


async def test_what_is_too_much_or_no_id_is_refused_or_not_found(client):
    for ids, status in ((["x"] * 200, 200), (["x"] * 201, 422), ([""], 422), (["batch/b"], 200)):
        assert (await client.get("/jobs/status", params={"job_ids": ",".join(ids)})).status == status, ids[:3]
    for ids, status in ((["x"] * 500, 200), (["x"] * 501, 422), ([], 422), ([1], 422), ("a", 422), (["\0"], 422)):
        assert (await client.post("/jobs/status", json={"job_ids": ids})).status == status, ids[:3]
    assert (await client.get("/jobs/status")).status == 422
    assert (await client.get("/jobs/status?job_ids=a&x=1")).status == 422


async def test_no_id_of_many_jobs_reaches_a_batch(client):
    await create(client, {"id": "a", "batch_id": "b"})
    await batch(client)
    [job] = (await body(await client.get("/jobs/status?job_ids=batch/b")))["jobs"]
    assert job["error"]["error_type"] == "not_found"


async def test_a_batch_from_its_first_job_to_its_end(client):
    await create(client, {"id": "a", "batch_id": "b"}, {"id": "c", "batch_id": "b", "type": "parsing"})
    held = await batch(client)
    assert {name: held[name] for name in held if name != "created_at"} == {
        "batch_id": "b",
        "status": "queued",
        "total_jobs": 2,
        "completed_jobs": 0,
        "failed_jobs": 0,
        "cancelled_jobs": 0,
        "overall_progress": 0,
        "closed": False,
        "jobs": [
            {"job_id": "a", "status": "queued", "operation": "extract"},
            {"job_id": "c", "status": "queued", "operation": "parse"},
        ],
    }
    await client.patch("/jobs/a", json={"status": "PROCESSING", "progress": {"percentage": 40}})
    assert (await batch(client))["status"] == "processing"
    assert [job["progress"] for job in (await batch(client, include_progress="True"))["jobs"]] == [40, 0]
    await client.patch("/jobs/a", json={"status": "COMPLETED"})
    await client.patch("/jobs/c", json={"status": "FAILED"})
    held = await batch(client)
    assert (held["status"], held["overall_progress"], held["completed_jobs"], held["failed_jobs"]) == (
        "processing",
        100,
        1,
        1,
    ), "only a closed batch can be over"
    closed = await body(await client.post("/jobs/batch/b/close"))
    assert (closed["status"], closed["closed"]) == ("completed_with_failures", True)
    assert await body(await client.post("/jobs/batch/b/close")) == closed == await batch(client)
    refused = await client.post("/jobs", json={"type": "x", "batch_id": "b"})
    assert (refused.status, (await refused.json())["details"]["error_type"]) == (409, "batch_closed")


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (["COMPLETED", "COMPLETED"], "completed"),
        (["COMPLETED", "FAILED"], "completed_with_failures"),
        (["COMPLETED", "CANCELLED"], "completed_with_failures"),
        (["FAILED", "FAILED"], "failed"),
        (["FAILED", "CANCELLED"], "failed"),
        (["CANCELLED", "CANCELLED"], "cancelled"),
        (["FAILED", "PROCESSING"], "processing"),
    ],
)
async def test_the_status_of_a_closed_batch(client, ends, status):
    await create(client, {"id": "a", "batch_id": "b", "close_batch": True}, {"id": "c", "batch_id": "b"})
    for job, end in zip("ac", ends, strict=True):
        await client.patch(f"/jobs/{job}", json={"status": end})
    assert (await batch(client))["status"] == status


async def test_an_unknown_batch_is_404_and_another_accounts_is_unknown(client, database):
    stranger = {"X-API-Key": await make_key(database, "stranger")}
    await client.post("/jobs", json={"type": "parsing", "batch_id": "b"}, headers=stranger)
    for name in ("b", "nope", "x y", "a" * 200):
        for answer in (await client.get(f"/jobs/batch/{name}"), await client.post(f"/jobs/batch/{name}/close")):
            assert answer.status == 404
            assert (await answer.json())["detail"] == f"Batch {name} not found"


async def test_only_a_batch_that_is_not_over_says_when_to_ask_again(client):
    await create(client, {"id": "a", "batch_id": "b", "close_batch": True})
    for status in ("queued", "PROCESSING", "COMPLETED"):
        await client.patch("/jobs/a", json={"status": status})
        for query, held in [("", {}), ("", {"If-None-Match": "*"}), ("?include_progress=true", {})]:
            answer = await client.get(f"/jobs/batch/b{query}", headers=held)
            pace = answer.headers.get("Retry-After")
            assert pace is None if status == "COMPLETED" else 2 <= int(pace) <= 10


async def test_an_unchanged_batch_is_304_and_mere_progress_does_not_change_it(client):
    await create(client, {"id": "a", "batch_id": "b"})
    first = await client.get("/jobs/batch/b")
    known = {"If-None-Match": first.headers["ETag"]}
    assert 2 <= int(first.headers["Retry-After"]) <= 10
    assert (await client.get("/jobs/batch/b", headers=known)).status == 304
    await client.patch("/jobs/a", json={"progress": {"percentage": 3}})
    assert (await client.get("/jobs/batch/b", headers=known)).status == 304
    await client.patch("/jobs/a", json={"status": "PROCESSING"})
    assert (await client.get("/jobs/batch/b", headers=known)).status == 200
    assert "ETag" not in (await client.get("/jobs/batch/b?include_progress=1")).headers


async def test_a_batch_with_progress_has_no_validator_so_a_condition_spares_it_no_place(client, database, monkeypatch):
    limited = {"X-API-Key": await make_key(database, "acme", limits={"bulk": "3/60"})}
    await create(client, {"id": "a", "batch_id": "b"})
    first = await client.get("/jobs/batch/b", headers=limited)
    known = {**limited, "If-None-Match": first.headers["ETag"]}
    for spelled in ("", "?include_progress=false", "?include_progress=0"):
        unchanged = await client.get("/jobs/batch/b" + spelled, headers=known)
        assert (unchanged.status, "RateLimit" in unchanged.headers) == (304, False), spelled
    read = 0
    read_with_progress = BatchReader.read_with_progress

    async def counting(self, *args):
        nonlocal read
        read += 1
        return await read_with_progress(self, *args)

    monkeypatch.setattr(BatchReader, "read_with_progress", counting)
    for status in (200, 200, 429, 429, 429):
        answer = await client.get("/jobs/batch/b?include_progress=1", headers={**known, "Prefer": "wait=5"})
        assert answer.status == status
        assert "Preference-Applied" not in answer.headers
        answer = await client.get("/jobs/batch/b?include_progress=1", headers=known) if status == 429 else answer
        assert answer.status == status
    assert read == 2, "nothing is read for who is over the limit"
    wrong = await client.get("/jobs/batch/b?include_progress=perhaps", headers={"If-None-Match": "*"})
    assert wrong.status == 422


async def test_waiting_for_a_batch_ends_with_its_change_or_its_end(client):
    await create(client, {"id": "a", "batch_id": "b", "close_batch": True}, {"id": "c", "batch_id": "b"})
    etag = (await client.get("/jobs/batch/b")).headers["ETag"]
    changed = asyncio.create_task(client.get("/jobs/batch/b", headers={"Prefer": "wait=20", "If-None-Match": etag}))
    over = asyncio.create_task(client.get("/jobs/batch/b", headers={"Prefer": "wait=20"}))
    await asyncio.sleep(0.05)
    await client.patch("/jobs/a", json={"status": "COMPLETED"})
    async with asyncio.timeout(3):
        assert (await (await changed).json())["completed_jobs"] == 1
    assert not over.done()
    await client.patch("/jobs/c", json={"status": "COMPLETED"})
    async with asyncio.timeout(3):
        answer = await over
    assert (await answer.json())["status"] == "completed"
    assert answer.headers["Preference-Applied"] == "wait=20"


async def test_a_batch_read_through_another_process_is_never_behind_the_last_report(start_web, key):
    one, other = await start_web(), await start_web()
    async with aiohttp.ClientSession(headers={"X-API-Key": key}) as session:
        jobs = [{"id": f"j{n}", "type": "x", "batch_id": "b", "close_batch": True} for n in range(200)]
        assert (await session.post(one.url + "/jobs", json=jobs)).status == 201
        for done in range(200):
            async with session.get(other.url + "/jobs/batch/b") as answer:
                assert (await answer.json())["completed_jobs"] == done
            async with session.patch(f"{one.url}/jobs/j{done}", json={"status": "COMPLETED"}) as answer:
                assert (answer.status, answer.headers.get("Warning")) == (200, None)
        async with session.delete(one.url + "/jobs/j0") as answer:
            assert answer.status == 200
        async with session.get(other.url + "/jobs/batch/b") as answer:
            assert ((await answer.json())["total_jobs"], (await answer.json())["status"]) == (199, "completed")


async def test_the_first_thousand_jobs_are_shown_and_the_counts_are_of_all(client):
    for start in (0, 1000):
        await create(client, *({"id": f"j{start + n:04}", "batch_id": "b"} for n in range(1000 if not start else 5)))
    held = await batch(client)
    assert (held["total_jobs"], len(held["jobs"]), held["jobs_truncated"]) == (1005, 1000, True)


async def calls(redis):
    """Scripts that Redis has run."""
    return (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]


async def test_500_jobs_are_one_trip_to_redis(client, redis_url):
    await create(client, *({"id": f"j{n}"} for n in range(500)))
    ids = {"job_ids": [f"j{n}" for n in range(500)]}
    await body(await client.post("/jobs/status", json=ids))
    async with Redis.from_url(redis_url) as redis:
        costs = []
        for _ in range(5):
            before = await calls(redis)
            assert len((await body(await client.post("/jobs/status", json=ids)))["jobs"]) == 500
            costs.append(await calls(redis) - before)
        assert min(costs) == 1, "others may have asked meanwhile, but not each time"


async def test_what_redis_does_not_know_is_one_read_of_postgres_and_is_filled_in_together(
    client, redis_url, monkeypatch
):
    await create(client, *({"id": f"j{n}"} for n in range(498)))
    ids = [f"j{n}" for n in range(498)]
    await client.patch("/jobs/j7", json={"status": "PROCESSING"})
    read = []
    read_jobs = JobTable.read

    async def noting(self, keys):
        read.append(len(keys))
        return await read_jobs(self, keys)

    monkeypatch.setattr(JobTable, "read", noting)
    async with Redis.from_url(redis_url) as redis:
        costs = []
        for _ in range(3):
            await redis.flushdb()
            before = await calls(redis)
            jobs = (await body(await client.post("/jobs/status", json={"job_ids": [*ids, "nope", "x/y"]})))["jobs"]
            assert [job["job_id"] for job in jobs] == [*ids, "nope", "x/y"]
            assert [job["status"] for job in jobs] == [*["queued"] * 7, "processing", *["queued"] * 490, None, None]
            assert read.pop() == 499
            assert read == []

            async def filled():
                entries = [entry for entry in await redis.mget(await redis.keys("*status*")) if entry]
                return len(entries) == 499 and not any(entry.startswith(b"?") for entry in entries)

            await comes_true(filled)
            costs.append(await calls(redis) - before)
    assert min(costs) <= 1 + -(-499 // MOST_CHANGES)


async def test_many_jobs_are_read_from_postgres_where_redis_is_away(start_web, key):
    web = await start_web(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    async with aiohttp.ClientSession(web.url, headers={"X-API-Key": key}) as session:
        await create(session, {"id": "a"}, {"id": "b"})
        jobs = (await body(await session.get("/jobs/status?job_ids=b,nope,a,b,batch/x")))["jobs"]
        assert [(job["job_id"], job["status"]) for job in jobs] == [
            ("b", "queued"), ("nope", None), ("a", "queued"), ("b", "queued"), ("batch/x", None),
        ]  # fmt: skip
