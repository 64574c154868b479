"""Sets, batches and feeds on the wire: what is sent, to whom, under which filters, and how each kind ends."""

import json
import re

import pytest

from service.identity import WRITE
from service.streaming.operation import Streams
from tests.conftest import make_key
from tests.following import close, create, create_many, delete, of_set, report, retry, status_of, stream
from tests.sse_reader import RawReader

POSITION = rb"p\.[0-9a-f]{8}\.[0-9]{1,19}"
SET_END = r"e\.[0-9a-f]{16}"


async def raw_stream(client, path, key, **options):
    raw = await RawReader.open(str(client.make_url("")), path, key, **options)
    assert await raw.answer() == 200
    return raw


async def shape_of(client, job_id):
    """Shape A as it is polled, without its last brace."""
    return (await (await client.get(f"/jobs/{job_id}")).read())[:-1]


def names(events):
    return [(event.name, event.data.get("id"), event.status) for event in events]


# The wire


@pytest.mark.parametrize("path", [of_set("a"), "/jobs/batch/b/events", "/jobs/events"])
async def test_every_stream_of_many_has_these_headers(client, key, path):
    await create(client, "a", batch_id="b")
    raw = await raw_stream(client, path, key, headers={"Accept-Encoding": "gzip, deflate, br", "X-Request-Id": "mine"})
    head = raw.head.decode().lower()
    for line in (
        "content-type: text/event-stream",
        "cache-control: no-store",
        "x-accel-buffering: no",
        "x-request-id: mine",
        "transfer-encoding: chunked",
        'ratelimit-policy: "stream";q=120;w=60',
    ):
        assert f"\r\n{line}\r\n" in head, line
    assert "\r\nratelimit: " in head
    assert "content-encoding" not in head
    assert "content-length" not in head
    retry_ms = re.fullmatch(rb"retry: (\d+)\n", await raw._chunk())
    assert 2000 <= int(retry_ms[1]) <= 5000


async def test_the_wire_of_a_feed_is_exactly_this(client, key):
    raw = await raw_stream(client, "/jobs/events", key)
    await raw._chunk()
    opening = re.fullmatch(
        rb'id: (%s)\nevent: open\ndata: {"position":"(%s)"}\n\n' % (POSITION, POSITION), await raw._chunk()
    )
    assert opening[1] == opening[2]
    await create(client, "a", metadata={"text": "two\nlines, \u2028 and ümlauts"})
    created = await raw._chunk()
    assert re.match(rb"id: %s\nevent: status\ndata: " % POSITION, created)
    assert created.endswith(b'\ndata: %s,"previous_status":null}\n\n' % await shape_of(client, "a"))
    await report(client, "a", percentage=5)
    progress = await raw._chunk()
    assert re.match(rb"id: %s\nevent: progress\ndata: " % POSITION, progress)
    assert progress.endswith(b'\ndata: %s,"previous_status":"queued"}\n\n' % await shape_of(client, "a"))
    await delete(client, "a")
    data = rb'{"id":"a","version":3,"previous_status":"queued"}'
    assert re.fullmatch(rb"id: %s\nevent: deleted\ndata: %s\n\n" % (POSITION, re.escape(data)), await raw._chunk())


async def test_the_wire_of_a_set_is_exactly_this(client, key):
    await create(client, "a")
    await create(client, "c")
    shapes = [await shape_of(client, job_id) for job_id in "ca"]
    raw = await raw_stream(client, of_set("c", "a", "c"), key)
    await raw._chunk()
    assert await raw._chunk() == b'event: status\ndata: %s,"previous_status":null}\n\n' % shapes[0]
    last = await raw._chunk()  # only this one says what a reader has who has it
    assert re.match(rb"id: %s\n" % POSITION, last)
    assert last.endswith(b'\nevent: status\ndata: %s,"previous_status":null}\n\n' % shapes[1])
    await report(client, "a", "COMPLETED")
    assert re.match(
        rb"id: %s\nevent: status\ndata: .*\"previous_status\":\"queued\"}\n\n\Z" % POSITION, await raw._chunk()
    )
    await report(client, "c", "COMPLETED")
    assert re.match(rb"id: %s\nevent: status\ndata: " % SET_END.encode(), await raw._chunk())
    assert await raw._chunk() == b""


async def test_the_wire_of_a_batch_is_exactly_this(client, key):
    await create(client, "a", batch_id="b", batch_size=1)
    raw = await raw_stream(client, "/jobs/batch/b/events", key)
    await raw._chunk()
    first = await raw._chunk()
    assert re.match(rb"id: %s\nevent: status\ndata: .*\"previous_status\":null}\n\n\Z" % POSITION, first)
    await report(client, "a", "COMPLETED")
    assert b"event: status\n" in await raw._chunk()
    over = await client.get("/jobs/batch/b")
    counts = await over.json()
    del counts["jobs"]
    etag = over.headers["ETag"].strip('"').encode()
    data = json.dumps(counts, separators=(",", ":")).encode()
    over = rb"id: e\.%s\.%s\nevent: batch\ndata: %s\n\n" % (re.escape(etag), POSITION, re.escape(data))
    assert re.fullmatch(over, await raw._chunk())
    assert await raw._chunk() == b""
    assert list(counts) == [
        "batch_id", "status", "created_at", "total_jobs", "completed_jobs", "failed_jobs", "cancelled_jobs",
        "overall_progress", "closed",
    ]  # fmt: skip


@pytest.mark.parametrize("path", [of_set("a"), "/jobs/batch/b/events", "/jobs/events"])
async def test_stalling_and_coming_back_are_told(client, sql, path):
    await create(client, "a", batch_id="b")
    await report(client, "a", "PROCESSING")
    async with stream(client, path) as events:
        await events.next()
        await sql.execute("update jobs set stalled = true, version = version + 1, changed_at = clock_timestamp()")
        stalled = await events.next()
        await report(client, "a", "PROCESSING")
        back = await events.next()
    if path == "/jobs/events":  # nobody remembers what it was before
        assert (stalled.name, stalled.data["previous_status"]) == ("status", None)
    else:
        assert (stalled.name, stalled.data["previous_status"]) == ("stalled", "PROCESSING")
    assert (back.name, back.data["previous_status"]) == ("stalled", "PROCESSING")
    assert [event.data["stalled"] for event in (stalled, back)] == [True, False]


async def test_a_change_is_told_with_the_status_before_it(client):
    await create(client, "a", batch_id="b")
    async with (
        stream(client, "/jobs/events") as feed,
        stream(client, of_set("a")) as of_jobs,
        stream(client, "/jobs/batch/b/events") as batch,
    ):
        for events in (feed, of_jobs, batch):
            await events.next()
        for said in ({"status": "PROCESSING"}, {"percentage": 4}, {"status": "FAILED"}):
            await report(client, "a", **said)
        await retry(client, "a")
        expected = [("status", "queued"), ("progress", "PROCESSING"), ("status", "PROCESSING"), ("status", "FAILED")]
        for events in (feed, batch):
            told = [await events.next() for _ in expected]
            assert [(event.name, event.data["previous_status"]) for event in told] == expected
        told = await of_jobs.rest()  # which ends with its last job
        assert [(event.name, event.data["previous_status"]) for event in told] == expected[:3]


async def test_of_a_public_job_its_account_is_told_everything(client):
    public = await (
        await client.post("/jobs", json={"type": "parse", "public": True, "metadata": {"a": "secret"}})
    ).json()
    async with stream(client, of_set(public["id"])) as events:
        assert (await events.next()).data["metadata"] == {"a": "secret"}


@pytest.mark.parametrize("path", ["/jobs/events?job_ids={}", "/jobs/batch/b/events", "/jobs/events"])
async def test_without_a_key_nothing_of_many_is_open_not_even_public_jobs(client, path):
    public = await (await client.post("/jobs", json={"type": "parse", "public": True, "batch_id": "b"})).json()
    async with client.session.get(client.make_url(path.format(public["id"])), headers={"X-API-Key": ""}) as answer:
        assert answer.status == 401
        assert (await answer.json())["details"]["error_type"] == "unauthorized"


# Sets


async def test_a_set_ends_with_its_last_job_and_its_last_id_is_answered_204(client):
    for job_id in ("a", "b", "c"):
        await create(client, job_id)
    await report(client, "b", "CANCELLED")
    async with stream(client, of_set("a", "b", "c")) as events:
        assert names([await events.next() for _ in range(3)]) == [
            ("status", "a", "queued"), ("status", "b", "CANCELLED"), ("status", "c", "queued"),
        ]  # fmt: skip
        await report(client, "a", "COMPLETED")
        await report(client, "c", "FAILED")
        last = (await events.rest())[-1]
    assert (last.data["id"], last.status) == ("c", "FAILED")
    assert re.fullmatch(SET_END, last.id)
    for path in (of_set("a", "b", "c"), of_set("c", "a", "b")):
        assert await status_of(client, path, last.id) == 204
    assert await status_of(client, f"{of_set('a', 'b', 'c')}&last_event_id={last.id}") == 204
    async with stream(client, of_set("a", "b"), last.id) as events:  # another set: its end was not told
        assert names(await events.rest()) == [("status", "a", "COMPLETED"), ("status", "b", "CANCELLED")]


async def test_a_set_that_is_finished_already_is_told_and_ends(client):
    await create(client, "a")
    await report(client, "a", "COMPLETED")
    async with stream(client, of_set("a")) as events:
        (only,) = await events.rest()
    assert (only.name, only.data["previous_status"]) == ("status", None)
    assert await status_of(client, of_set("a"), only.id) == 204


async def test_after_a_retry_the_end_of_a_set_is_no_end(client):
    await create(client, "a")
    await report(client, "a", "FAILED")
    async with stream(client, of_set("a")) as events:
        failed = (await events.rest())[-1]
    assert await status_of(client, of_set("a"), failed.id) == 204
    await retry(client, "a")
    async with stream(client, of_set("a"), failed.id) as events:
        assert (await events.next()).data["attempt"] == 2
        await report(client, "a", "COMPLETED")
        completed = (await events.rest())[-1]
    assert completed.id != failed.id
    assert await status_of(client, of_set("a"), failed.id) == 200
    assert await status_of(client, of_set("a"), completed.id) == 204


async def test_a_job_that_is_deleted_counts_as_finished(client):
    for job_id in ("a", "b"):
        await create(client, job_id)
    async with stream(client, of_set("a", "b")) as events:
        await events.next()
        await delete(client, "a")
        await report(client, "b", "COMPLETED")
        told = [(event.name, event.data.get("id"), event.version) for event in await events.rest()]
    assert told == [("status", "b", 1), ("deleted", "a", 2), ("status", "b", 2)]
    last_id = events.parser.last_id
    assert await status_of(client, of_set("a", "b"), last_id) == 204
    async with stream(client, of_set("a", "b")) as events:
        deleted, completed = await events.rest()
    assert deleted.data == {"id": "a", "version": 2, "previous_status": None}
    assert completed.id == last_id


async def test_an_unknown_id_is_told_as_gone_and_may_come_yet(client):
    await create(client, "a")
    async with stream(client, of_set("a", "later", "no id", "batch/b")) as events:
        assert names([await events.next() for _ in range(4)]) == [
            ("status", "a", "queued"), ("deleted", "later", None), ("deleted", "no id", None), ("deleted", "batch/b", None),
        ]  # fmt: skip
        assert [event.version for event in events.seen[1:]] == [0, 0, 0]
        await create(client, "later")
        later = await events.next()
        assert (later.name, later.status, later.data["previous_status"]) == ("status", "queued", None)
        await report(client, "a", "COMPLETED")
        await events.next()
        await report(client, "later", "COMPLETED")
        assert names(await events.rest()) == [("status", "later", "COMPLETED")]
    assert await status_of(client, of_set("a", "later", "no id", "batch/b"), events.parser.last_id) == 204


async def test_a_set_of_nothing_that_is_there_ends_at_once(client):
    async with stream(client, of_set("x", "y")) as events:
        assert names(await events.rest()) == [("deleted", "x", None), ("deleted", "y", None)]
    assert await status_of(client, of_set("x", "y"), events.parser.last_id) == 204
    await create(client, "x")
    assert await status_of(client, of_set("x", "y"), events.parser.last_id) == 200


async def test_a_foreign_job_looks_like_one_that_is_not_there(client, database, inside):
    other = {"headers": {"X-API-Key": await make_key(database, "other")}}
    await client.post(
        "/jobs", json={"id": "theirs", "type": "x", "user_id": "u", "tags": ["t"], "batch_id": "b"}, **other
    )
    await create(client, "mine", batch_id="b", user_id="u", tags=["t"])
    async with (
        stream(client, of_set("mine", "theirs", "nobodys")) as of_jobs,
        stream(client, "/jobs/batch/b/events") as batch,
        stream(client, "/jobs/events?user_id=u&tags=t") as feed,
    ):
        told = [await of_jobs.next() for _ in range(3)]
        assert told[1].data | {"id": ""} == told[2].data | {"id": ""}
        assert (await batch.next()).data["id"] == "mine"
        await feed.next()
        await client.patch("/jobs/theirs", json={"status": "PROCESSING", "metadata": {"a": "secret"}}, **other)
        await client.patch("/jobs/theirs", json={"status": "COMPLETED"}, **other)
        await client.delete("/jobs/theirs", **other)
        await report(client, "mine", "PROCESSING")
        for events in (of_jobs, batch, feed):
            event = await events.next()
            assert (event.data["id"], event.status) == ("mine", "PROCESSING")
    assert len(inside[Streams]._open) <= 3


async def test_a_thousand_jobs_are_one_set(client):
    job_ids = [f"j{n:03}" for n in range(1000)]
    await create_many(client, job_ids)
    async with stream(client, of_set(*job_ids)) as events:
        assert [(await events.next()).data["id"] for _ in job_ids] == job_ids
        assert events.seen[-1].id
        assert not any(event.id for event in events.seen[:-1])
        await report(client, "j500", "PROCESSING")
        assert (await events.next()).data["id"] == "j500"
    async with stream(client, of_set(*job_ids), events.parser.last_id) as events:
        await report(client, "j999", "PROCESSING")
        await events.until(lambda event: event.data["id"] == "j999")
    assert {event.data["id"] for event in events.seen} <= {"j500", "j999"}


# Batches


async def test_a_batch_tells_of_jobs_that_come_later_and_ends_when_it_is_over(client):
    await create(client, "a", batch_id="b")
    async with stream(client, "/jobs/batch/b/events") as events:
        assert (await events.next()).data["id"] == "a"
        await create(client, "c", batch_id="b")
        added = await events.next()
        assert (added.name, added.data["id"], added.data["previous_status"]) == ("status", "c", None)
        await report(client, "a", "COMPLETED")
        await report(client, "c", "FAILED")
        await events.next()
        await events.next()
        assert await events.quiet(0.7)  # only a closed batch can be over
        await close(client, "b")
        (over,) = await events.rest()
    assert (over.name, over.data["status"], over.data["failed_jobs"]) == ("batch", "completed_with_failures", 1)
    assert over.data["closed"] is True
    assert await status_of(client, "/jobs/batch/b/events", over.id) == 204
    assert await status_of(client, f"/jobs/batch/b/events?last_event_id={over.id}") == 204


async def test_after_a_retry_the_end_of_a_batch_is_no_end(client):
    await create(client, "a", batch_id="b", batch_size=1)
    await report(client, "a", "FAILED")
    async with stream(client, "/jobs/batch/b/events") as events:
        assert names(await events.rest()) == [("status", "a", "FAILED"), ("batch", None, "failed")]
    failed_id = events.parser.last_id
    assert await status_of(client, "/jobs/batch/b/events", failed_id) == 204
    await retry(client, "a")
    async with stream(client, "/jobs/batch/b/events", failed_id) as events:
        assert (await events.next()).data["attempt"] == 2
        await report(client, "a", "COMPLETED")
        assert names(await events.rest()) == [("status", "a", "COMPLETED"), ("batch", None, "completed")]
    assert await status_of(client, "/jobs/batch/b/events", failed_id) == 200
    assert await status_of(client, "/jobs/batch/b/events", events.parser.last_id) == 204


async def test_a_deletion_in_a_batch_is_told_and_may_end_it(client):
    for job_id in ("a", "c"):
        await create(client, job_id, batch_id="b")
    await close(client, "b")
    async with stream(client, "/jobs/batch/b/events") as events:
        await events.next()
        await events.next()
        await report(client, "a", "COMPLETED")
        await delete(client, "c")
        completed, deleted, over = await events.rest()
    assert (completed.name, deleted.name, over.name) == ("status", "deleted", "batch")
    assert deleted.data == {"id": "c", "version": 2, "previous_status": "queued"}
    assert (over.data["total_jobs"], over.data["status"]) == (1, "completed")


async def test_a_batch_that_has_lost_all_its_jobs(client):
    await create(client, "a", batch_id="b")
    await delete(client, "a")
    async with stream(client, "/jobs/batch/b/events") as events:
        assert await events.quiet(0.3)
        await close(client, "b")
        (over,) = await events.rest()
    assert (over.name, over.data["total_jobs"]) == ("batch", 0)


async def test_a_batch_that_nobody_has_and_one_of_another_account_are_not_found(client, database):
    other = {"headers": {"X-API-Key": await make_key(database, "other")}}
    await client.post("/jobs", json={"id": "theirs", "type": "x", "batch_id": "b"}, **other)
    for batch_id in ("b", "none", "no%20id"):
        answer = await client.get(f"/jobs/batch/{batch_id}/events")
        assert (answer.status, answer.content_type) == (404, "application/problem+json")
        assert (await answer.json())["error"] == "Batch not found"


async def test_of_a_large_batch_the_first_thousand_are_shown_and_all_are_followed(client, unlimited_key):
    client.session.headers["X-API-Key"] = unlimited_key
    job_ids = [f"j{n:04}" for n in range(1005)]
    await create_many(client, job_ids, batch_id="b")
    async with stream(client, "/jobs/batch/b/events") as events:
        assert [(await events.next()).data["id"] for _ in range(1000)] == job_ids[:1000]
        assert await events.quiet(0.2)
        await report(client, "j1003", "PROCESSING")
        assert (await events.next()).data["id"] == "j1003"
        assert events.seen[-1].data["previous_status"] == "queued"
        await close(client, "b")
        for start in range(0, 1005, 500):
            answer = await client.patch(
                "/jobs", json=[{"id": job_id, "status": "COMPLETED"} for job_id in job_ids[start : start + 500]]
            )
            assert answer.status == 200
        rest = await events.rest(within_s=20)
    assert {event.data["id"] for event in rest[:-1]} == set(job_ids)
    assert all(event.status == "COMPLETED" for event in rest[:-1])
    assert (rest[-1].name, rest[-1].data["completed_jobs"]) == ("batch", 1005)
    assert "jobs_truncated" not in rest[-1].data


# Filters


JOBS = {
    "a": {"user_id": "u1", "tags": ["x", "y"]},
    "b": {"user_id": "u1", "tags": ["x"]},
    "c": {"user_id": "u2", "tags": ["y", "x", "z"]},
    "d": {},
}


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ("", "abcd"),
        ("user_id=u1", "ab"),
        ("user_id=u3", ""),
        ("tags=x", "abc"),
        ("tags=x,y", "ac"),
        ("tags=x,y,z", "c"),
        ("tags=x&user_id=u1", "ab"),
        ("tags=y&user_id=u1", "a"),
        ("status=processing", "abcd"),
        ("status=failed", ""),
        ("status=failed,QUEUED", "abcd"),
        ("status=queued&tags=z&user_id=u2", "c"),
        ("status=queued&tags=z&user_id=u1", ""),
        ("status=queued,processing,completed,failed,cancelled&tags=z", "c"),
    ],
)
async def test_a_feed_tells_what_all_its_filters_let_through(client, filters, wanted):
    for job_id, fields in JOBS.items():
        await create(client, job_id, **fields)
    async with stream(client, f"/jobs/events?{filters}") as events, stream(client, "/jobs/events") as everything:
        assert (await events.next()).name == "open"
        for job_id in JOBS:
            await report(client, job_id, "PROCESSING")
        await everything.until(lambda event: event.data.get("id") == "d")
        for job_id in wanted:
            assert (await events.next()).data["id"] == job_id
        assert await events.quiet(0.1)


async def test_a_status_is_met_by_the_state_before_and_after(client):
    await create(client, "a")
    async with stream(client, "/jobs/events?status=PROCESSING") as events:
        await events.next()
        await report(client, "a", metadata={"n": 1})
        await report(client, "a", "PROCESSING")
        await report(client, "a", percentage=4)
        await report(client, "a", "FAILED")
        await retry(client, "a")
        await report(client, "a", "CANCELLED")
        await delete(client, "a")
        await create(client, "b")
        await report(client, "b", "PROCESSING")
        await delete(client, "b")
        told = [await events.next() for _ in range(5)]
    assert names(told) == [
        ("status", "a", "PROCESSING"), ("progress", "a", "PROCESSING"), ("status", "a", "FAILED"),
        ("status", "b", "PROCESSING"), ("deleted", "b", None),
    ]  # fmt: skip


async def test_filters_hold_in_a_set_too_and_it_ends_all_the_same(client):
    for job_id, fields in JOBS.items():
        await create(client, job_id, **fields)
    path = of_set(*JOBS) + "&tags=x&status=failed"
    async with stream(client, path) as events:
        await report(client, "a", "COMPLETED")
        await report(client, "b", "FAILED")
        await report(client, "d", "FAILED")
        assert names([await events.next()]) == [("status", "b", "FAILED")]
        await report(client, "c", "COMPLETED")
        assert await events.rest() == []
    async with stream(client, path, events.parser.last_id) as events:  # it had not been told that b was the last
        assert names(await events.rest()) == [("status", "b", "FAILED")]
    assert await status_of(client, path, events.parser.last_id) == 204
    assert await status_of(client, of_set("a", "c") + "&status=failed") == 204  # else EventSource would ask for ever


async def test_a_reader_that_comes_back_to_a_filtered_set_hears_of_what_left_the_filter(client):
    for job_id in ("a", "b"):
        await create(client, job_id)
    path = of_set("a", "b") + "&status=queued"
    async with stream(client, path) as events:
        await events.next()
        known_id = (await events.next()).id
    await report(client, "a", "PROCESSING")
    async with stream(client, path, known_id) as events:
        assert names([await events.next()]) == [("status", "a", "PROCESSING")]


# Before the stream


@pytest.mark.parametrize(
    "path",
    [
        "/jobs/events?job_ids=", "/jobs/events?job_ids=a,,b", f"/jobs/events?job_ids={','.join(['x'] * 1001)}",
        "/jobs/events?status=", "/jobs/events?status=done", "/jobs/events?tags=", "/jobs/events?tags=a,,b",
        f"/jobs/events?tags={','.join(f't{n}' for n in range(33))}", "/jobs/events?user_id=", "/jobs/events?user_id=%00",
        "/jobs/events?job_ids=%00", "/jobs/events?batch_id=b",
        "/jobs/events?limit=1", "/jobs/batch/b/events?status=failed", "/jobs/batch/b/events?job_ids=a",
        "/jobs/events?last_event_id=1&last_event_id=2",
    ],
)  # fmt: skip
async def test_a_wrong_query_is_refused_by_name(client, inside, path):
    answer = await client.get(path)
    assert (answer.status, answer.content_type) == (422, "application/problem+json")
    said = (await answer.json())["details"]
    assert said["error_type"] == "validation_failed"
    assert set(said["fields"]) == {path.partition("?")[2].partition("=")[0]}
    assert len(inside[Streams]) == 0


@pytest.mark.parametrize("path", [of_set("a"), "/jobs/batch/b/events", "/jobs/events"])
async def test_who_may_not_read_may_not_follow(client, database, path):
    await create(client, "a", batch_id="b")
    writer = await make_key(database, "acme", (WRITE,))
    for key, status in ((writer, 403), ("jw_unknown", 401), ("", 401)):
        assert await status_of(client, path, headers={"X-API-Key": key}) == status
    refused = await client.head(path)
    assert (refused.status, refused.headers["Allow"]) == (405, "GET")


@pytest.mark.usefixtures("two_streams")
async def test_streams_of_all_kinds_are_counted_together(client):
    await create(client, "a", batch_id="b")
    async with stream(client, of_set("a")) as of_jobs, stream(client, "/jobs/batch/b/events") as batch:
        await of_jobs.next()
        await batch.next()
        for path in ("/jobs/events", of_set("a"), "/jobs/batch/b/events", "/jobs/a/events"):
            refused = await client.get(path)
            assert refused.status == 429
            assert (await refused.json())["details"]["error_type"] == "too_many_streams"
