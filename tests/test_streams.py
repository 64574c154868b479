"""Following one job: the wire, what a reader may rely on, and that nothing is left when it has gone."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import aiohttp
import asyncpg
import httpx
import httpx_sse
import pytest
from redis.asyncio import Redis

import service.hub
import service.streaming.job_stream
import service.streaming.operation
import service.streaming.stream
from service.embedded import free_port, start_redis
from service.hub import Hub
from service.identity import READ, WRITE
from service.limiting.limiter import Limiter
from service.status_reader import StatusReader
from service.stores.event_channel import EventChannel
from service.stores.key_memory import UNUSED_s
from service.streaming.handler import Streaming
from service.streaming.job_stream import JobStream
from service.streaming.operation import Streams
from service.streaming.stream import BUFFER_bytes
from tests.conftest import environment_of, make_key
from tests.sse_reader import EventReader, RawReader, assert_true_to, comes_true, events_of
from tests.web_process import WebProcess

BLOB = "b" * 15_000  # of metadata: 300 of these are more than the kernel keeps for a reader that does not read
UNLIMITED = {"stream": "none", "write": "none", "poll": "none"}


async def create(client, job_id, **fields):
    created = await client.post("/jobs", json={"id": job_id, "type": "extraction", **fields})
    assert created.status == 201, await created.text()
    return await created.json()


async def report(client, job_id, status=None, percentage=None, **fields):
    said = {"status": status} if status else {}
    if percentage is not None:
        said["progress"] = {"percentage": percentage}
    reported = await client.patch(f"/jobs/{job_id}", json=said | fields)
    assert reported.status == 200, await reported.text()
    return await reported.json()


async def report_many(client, reports):
    """In the order given, as fast as the service takes them."""
    for start in range(0, len(reports), 50):  # aiohttp's client warns of bodies beyond 1 MiB
        reported = await client.patch("/jobs", json=reports[start : start + 50])
        assert reported.status == 200
        assert {result["status"] for result in (await reported.json())["results"]} == {200}


async def etag_of(client, job_id):
    return (await client.get(f"/jobs/{job_id}")).headers["ETag"].strip('"')


def session(url, key):
    return aiohttp.ClientSession(url, headers={"X-API-Key": key})


@pytest.fixture
async def key(database):
    """With the limits of every key: a stream takes its place of them."""
    return await make_key(database, "acme")


@pytest.fixture(autouse=True)  # before `client`
def inside(monkeypatch):
    """The parts of the service in this process by their class, once `client` has built it."""
    parts = {}

    def noting(kind):
        build = kind.__init__

        def built(self, *args, **options):
            parts[kind] = self
            build(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", built)

    for kind in (Streams, Hub, EventChannel):
        noting(kind)
    return parts


@pytest.fixture(autouse=True)
async def raw_readers():
    yield
    await RawReader.close_all()


@pytest.fixture
def two_streams(monkeypatch):
    monkeypatch.setenv("JOBWIRE_MAX_STREAMS_PER_KEY", "2")


@pytest.fixture
def quick_ticks(monkeypatch):
    monkeypatch.setattr(service.streaming.operation, "TICK_EVERY_s", 0.01)


@pytest.fixture
def a_thousand_streams(monkeypatch):
    monkeypatch.setenv("JOBWIRE_MAX_STREAMS_PER_KEY", "1000")


@pytest.fixture
async def truth(database):
    """Straight to Postgres: somebody who does what no address does."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture(autouse=True)  # before `client`
async def redis(redis_url):
    """Empty: what our address has used up in another test is not ours."""
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
        yield redis


@pytest.fixture
async def unlimited_key(database):
    return await make_key(database, "acme", (READ, WRITE), UNLIMITED)


# The wire


async def test_the_wire_is_exactly_this(client, key):
    await create(client, "wire", metadata={"text": "two\nlines, \u2028 and ümlauts"})
    polled = await client.get("/jobs/wire")
    raw = await RawReader.open(
        str(client.make_url("")),
        "/jobs/wire/events",
        key,
        headers={"Accept-Encoding": "gzip, deflate", "X-Request-Id": "mine"},
    )
    assert await raw.answer() == 200
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

    retry = re.fullmatch(rb"retry: (\d+)\n", await raw._chunk())
    assert retry is not None
    assert 2000 <= int(retry[1]) <= 5000

    etag = polled.headers["ETag"].strip('"').encode()
    shape = (await polled.read())[:-1]
    snapshot = b'id: %s\nevent: status\ndata: %s,"previous_status":null}\n\n' % (etag, shape)
    assert await raw._chunk() == snapshot

    await report(client, "wire", "COMPLETED")
    polled = await client.get("/jobs/wire")
    etag = polled.headers["ETag"].strip('"').encode()
    shape = (await polled.read())[:-1]
    assert await raw._chunk() == b'id: %s\nevent: status\ndata: %s,"previous_status":"queued"}\n\n' % (etag, shape)
    assert await raw._chunk() == b""


async def test_the_time_to_come_back_is_jittered(client):
    await create(client, "jitter")
    await report(client, "jitter", "COMPLETED")
    told = set()
    for _ in range(8):
        async with events_of(client, "jitter") as events:
            await events.rest()
            told.add(events.parser.retry_ms)
    assert len(told) > 1
    assert all(2000 <= retry <= 5000 for retry in told)


async def test_each_change_is_told_once_and_the_stream_ends_with_the_finished_one(client):
    await create(client, "told")
    async with events_of(client, "told") as events:
        told = [await events.next()]
        for change in (
            {"status": "PROCESSING"}, {"percentage": 10}, {"percentage": 60}, {"percentage": 60},  # the last says nothing
            {"metadata": {"page": 7}}, {"status": "COMPLETED"},
        ):  # fmt: skip
            await report(client, "told", **change)
            if change != {"percentage": 60} or told[-1].data["progress"].get("percentage") != 60:
                told.append(await events.next())
        assert await events.rest() == []
    assert [event.version for event in told] == [1, 2, 3, 4, 5, 6]
    assert [event.name for event in told] == ["status", "status", "progress", "progress", "progress", "status"]
    statuses = [(event.data["previous_status"], event.status) for event in told]
    working = ("PROCESSING", "PROCESSING")
    assert statuses == [
        (None, "queued"), ("queued", "PROCESSING"), working, working, working, ("PROCESSING", "COMPLETED"),
    ]  # fmt: skip
    assert told[-1].data["progress"]["percentage"] == 100
    assert told[-1].id == await etag_of(client, "told")


@pytest.mark.parametrize("end", ["COMPLETED", "FAILED", "CANCELLED"])
async def test_a_finished_job_is_told_once_and_that_is_all(client, end):
    job_id = f"over-{end}"
    await create(client, job_id)
    await report(client, job_id, end)
    async with events_of(client, job_id) as events:
        (only,) = await events.rest()
    assert (only.name, only.status, only.data["previous_status"]) == ("status", end, None)


async def test_a_connection_serves_on_after_the_stream_has_ended(client, key):
    await create(client, "kept")
    await report(client, "kept", "COMPLETED")
    raw = await RawReader.open(str(client.make_url("")), "/jobs/kept/events", key)
    await raw.answer()
    await raw.events.rest()
    raw.writer.write(f"GET /jobs/kept HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n".encode())
    assert await raw.answer() == 200


async def test_stalling_and_coming_back_are_told(client, truth):
    """What `deliver` will do, done by hand: one statement, which the outbox carries to everybody."""
    await create(client, "stall")
    await report(client, "stall", "PROCESSING")
    async with events_of(client, "stall") as events:
        await events.next()
        await truth.execute(
            "update jobs set stalled = true, version = version + 1, changed_at = clock_timestamp() where id = 'stall'"
        )
        stalled = await events.next()
        assert (stalled.name, stalled.data["stalled"], stalled.data["previous_status"]) == (
            "stalled",
            True,
            "PROCESSING",
        )
        await report(client, "stall", "PROCESSING")
        back = await events.next()
        assert (back.name, back.data["stalled"], back.version) == ("stalled", False, 4)
        await truth.execute(
            "update jobs set stalled = true, version = version + 1, changed_at = clock_timestamp() where id = 'stall'"
        )
        assert (await events.next()).name == "stalled"
        await report(client, "stall", "COMPLETED")
        last = await events.next()
        assert (last.name, last.data["stalled"]) == ("status", False)


async def test_a_deletion_is_the_last_event(client):
    await create(client, "gone")
    async with events_of(client, "gone") as events:
        await events.next()
        assert (await client.delete("/jobs/gone")).status == 200
        (deleted,) = await events.rest()
    assert deleted.name == "deleted"
    assert deleted.data == {"id": "gone", "version": 2, "previous_status": "queued"}
    again = await client.get("/jobs/gone/events", headers={"Last-Event-ID": deleted.id})
    assert again.status == 404
    assert (await again.json())["details"]["error_type"] == "deleted"


async def test_a_retry_goes_on_in_a_new_stream(client):
    await create(client, "again")
    async with events_of(client, "again") as events:
        await report(client, "again", "FAILED", error="no paper")
        failed = (await events.rest())[-1]
    assert (failed.status, failed.data["error"]) == ("FAILED", "no paper")
    assert (await client.get("/jobs/again/events", headers={"Last-Event-ID": failed.id})).status == 204
    assert (await client.post("/jobs/again/retry")).status == 200
    async with events_of(client, "again", headers={"Last-Event-ID": failed.id}) as events:
        assert (await events.next()).data["attempt"] == 2


async def test_an_http_1_0_reader_gets_the_events_as_they_are(client, key):
    await create(client, "old")
    raw = await RawReader.open(str(client.make_url("")), "/jobs/old/events", key, http="1.0")
    assert await raw.answer() == 200
    assert b"chunked" not in raw.head
    assert (await raw.events.next()).status == "queued"
    await report(client, "old", "PROCESSING")
    assert (await raw.events.next()).status == "PROCESSING"
    await report(client, "old", "COMPLETED")
    assert [event.status for event in await raw.events.rest()] == ["COMPLETED"]


async def test_head_is_refused(client):
    await create(client, "head")
    refused = await client.head("/jobs/head/events")
    assert refused.status == 405
    assert refused.headers["Allow"] == "GET"


# Coming back


def in_header(last_id):
    return {"headers": {"Last-Event-ID": last_id}}


def in_parameter(last_id):
    return {"params": {"last_event_id": last_id}}


COMING_BACK = pytest.mark.parametrize("coming_back", [in_header, in_parameter])
"""The two ways to say what one has."""


@COMING_BACK
async def test_who_has_the_present_state_gets_only_what_comes_next(client, coming_back):
    await create(client, "next")
    await report(client, "next", "PROCESSING")
    async with events_of(client, "next", **coming_back(await etag_of(client, "next"))) as events:
        assert await events.quiet(0.3)
        assert events.parser.retry_ms is not None
        await report(client, "next", percentage=50)
        event = await events.next()
    assert (event.name, event.version, event.data["previous_status"]) == ("progress", 3, "PROCESSING")


@COMING_BACK
async def test_who_has_the_end_gets_204(client, coming_back):
    await create(client, "had")
    await report(client, "had", "CANCELLED")
    answer = await client.get("/jobs/had/events", **coming_back(await etag_of(client, "had")))
    assert answer.status == 204
    assert await answer.read() == b""
    assert "RateLimit" in answer.headers


@COMING_BACK
@pytest.mark.parametrize("status", ["PROCESSING", "COMPLETED"])
async def test_who_has_anything_else_gets_the_present_state_at_once(client, coming_back, status):
    await create(client, "else")
    older = await etag_of(client, "else")
    await report(client, "else", status)
    await create(client, "foreign")
    foreign = await etag_of(client, "foreign")
    malformed = ["", "1-1", "1", "-", "2", "9" * 20 + "-1", "abc", '"2-3"', "W/", "x" * 2000, "é", "7:4-18"]
    for last_id in (older, foreign, *malformed):
        async with events_of(client, "else", **coming_back(last_id)) as events:
            event = await events.next()
        assert (event.status, event.data["previous_status"], event.version) == (status, None, 2), last_id


async def test_the_header_is_newer_than_the_parameter(client):
    """EventSource keeps its address and says in the header what it has read since."""
    await create(client, "both")
    first = await etag_of(client, "both")
    await report(client, "both", "COMPLETED")
    options = {"params": {"last_event_id": first}, "headers": {"Last-Event-ID": await etag_of(client, "both")}}
    assert (await client.get("/jobs/both/events", **options)).status == 204


# Before the stream


async def test_what_is_wrong_is_said_before_any_stream(client, key, database, inside):
    await create(client, "mine")
    await create(client, "deleted-before")
    await client.delete("/jobs/deleted-before")
    foreign, writer = await make_key(database, "other"), await make_key(database, "acme", (WRITE,))
    for path, headers, status, error_type in (
        ("/jobs/none/events", {}, 404, "not_found"),
        ("/jobs/deleted-before/events", {}, 404, "deleted"),
        ("/jobs/no%20id/events", {}, 404, "not_found"),
        ("/jobs/mine/events", {"X-API-Key": foreign}, 403, "forbidden"),
        ("/jobs/mine/events", {"X-API-Key": writer}, 403, "forbidden"),
        ("/jobs/mine/events", {"X-API-Key": "jw_unknown"}, 401, "unauthorized"),
        ("/jobs/mine/events?last_event=1-1", {}, 422, "validation_failed"),
        ("/jobs/mine/events?last_event_id=1&last_event_id=2", {}, 422, "validation_failed"),
    ):  # fmt: skip
        answer = await client.get(path, headers=headers)
        assert (answer.status, answer.content_type) == (status, "application/problem+json"), path
        assert (await answer.json())["details"]["error_type"] == error_type
    assert len(inside[Streams]) == 0


@pytest.mark.usefixtures("two_streams")
async def test_a_key_has_no_more_streams_than_it_may(client, database):
    await create(client, "many")
    other = {"headers": {"X-API-Key": await make_key(database, "acme")}}
    async with events_of(client, "many") as first:
        await first.next()
        async with events_of(client, "many") as second:
            await second.next()
            refused = await client.get("/jobs/many/events")
            assert refused.status == 429
            assert (await refused.json())["details"]["error_type"] == "too_many_streams"
            assert "RateLimit" in refused.headers
            async with events_of(client, "many", **other) as of_another_key:
                await of_another_key.next()
            assert (await client.get("/jobs/many")).status == 200

        async def opens():
            async with client.get("/jobs/many/events") as response:
                return response.status == 200

        await comes_true(opens)


# As time goes by


def test_comments_are_due_before_the_contract_says():
    assert service.streaming.stream.QUIET_FOR_s + 2 * service.streaming.operation.TICK_EVERY_s < 15


@pytest.mark.usefixtures("quick_ticks")
async def test_a_quiet_line_is_kept_alive_by_comments(client, monkeypatch):
    monkeypatch.setattr(service.streaming.stream, "QUIET_FOR_s", 0.3)
    await create(client, "quiet")
    async with events_of(client, "quiet") as events:
        await events.next()
        assert await events.quiet(1.2)
        assert 2 <= events.parser.comments <= 4
        assert events.parser.is_whole
        await report(client, "quiet", "COMPLETED")
        assert [event.status for event in await events.rest()] == ["COMPLETED"]


async def test_a_lifetime_ends_cleanly_and_the_reader_goes_on_where_it_was(client, monkeypatch):
    monkeypatch.setattr(service.streaming.stream, "LIFETIME_s", 0.3)
    await create(client, "life")
    async with events_of(client, "life") as events:
        first = await events.next()
        assert await events.rest() == []
    await report(client, "life", "PROCESSING")
    async with events_of(client, "life", headers={"Last-Event-ID": first.id}) as events:
        assert [event.version for event in await events.rest()] == [2]
    async with events_of(client, "life", headers={"Last-Event-ID": events.parser.last_id}) as events:
        assert await events.rest() == []


async def test_a_stream_ends_before_its_key_leaves_memory():
    """Only keys in memory are confirmed each second; a stream that outlived its key there could not be revoked."""

    class Wire:
        pass

    ends = [JobStream(Wire(), "key", None)._ends_at for _ in range(200)]
    now = asyncio.get_running_loop().time()
    assert max(ends) - now < UNUSED_s
    assert max(ends) - min(ends) > 60  # jittered


async def test_a_revoked_key_ends_its_streams_and_no_others(client, database, truth):
    await create(client, "revoked")
    key = await make_key(database, "acme")
    async with (
        events_of(client, "revoked") as others,
        events_of(client, "revoked", headers={"X-API-Key": key}) as events,
    ):
        await others.next()
        await events.next()
        await truth.execute("update keys set revoked_at = clock_timestamp() where hash = sha256($1)", key.encode())
        (problem,) = await events.rest(within_s=5)
        assert problem.name == "problem"
        assert problem.data["error_type"] == "unauthorized"
        assert problem.id == ""  # what the reader has stays what it says when it comes back
        await report(client, "revoked", "PROCESSING")
        assert (await others.next()).status == "PROCESSING"
    assert (await client.get("/jobs/revoked/events", headers={"X-API-Key": key})).status == 401


# Slow readers


async def slow_reader(url, key, job_id):
    """A reader that has read the present state, and reads no more until it is told to."""
    raw = await RawReader.open(url, f"/jobs/{job_id}/events", key, receives=4096)
    assert await raw.answer() == 200
    await raw.events.next()
    return raw


def blobs(job_id, how_many, start=0):
    return [{"id": job_id, "metadata": {"n": n, "blob": BLOB}} for n in range(start, start + how_many)]


async def test_a_slow_reader_gets_the_newest_state_and_no_backlog(start_web, unlimited_key):
    web = await start_web()
    async with session(web.url, unlimited_key) as client:
        await create(client, "slow")
        await report(client, "slow", "PROCESSING")
        raw = await slow_reader(web.url, unlimited_key, "slow")
        async with events_of(client, "slow") as quick:
            await quick.next()
            quick_one = asyncio.create_task(quick.until(lambda event: event.data["metadata"].get("n") == 499))
            await report_many(client, blobs("slow", 500))
            await quick_one  # a slow reader holds up nobody
        newest = await raw.events.until(lambda event: event.data["metadata"].get("n") == 499)
        assert newest.version == 502
        assert len(raw.events.seen) < 450
        await report(client, "slow", "COMPLETED")
        await raw.events.rest()
        assert_true_to(raw.events.seen)


async def test_what_is_kept_for_a_slow_reader_is_bounded(client, unlimited_key, inside):
    client.session.headers["X-API-Key"] = unlimited_key
    await create(client, "kept-small")
    raw = await slow_reader(str(client.make_url("")), unlimited_key, "kept-small")
    (stream,) = inside[Streams]._open
    most = 0
    for start in range(0, 400, 50):
        await report_many(client, blobs("kept-small", 50, start))
        most = max(most, stream._transport.get_write_buffer_size())
        assert len(stream._slot) <= 1
    assert BUFFER_bytes < most < BUFFER_bytes + 2 * len(BLOB), "the reader was not slow enough, or is kept too much for"
    await report(client, "kept-small", "COMPLETED")
    await raw.events.rest()
    assert_true_to(raw.events.seen)


async def block(client, job_id):
    """Fills all that lies between the service and a reader that does not read."""
    await report_many(client, blobs(job_id, 300))


async def test_a_finished_state_is_never_skipped(start_web, unlimited_key):
    web = await start_web()
    async with session(web.url, unlimited_key) as client:
        await create(client, "skip")
        raw = await slow_reader(web.url, unlimited_key, "skip")
        await block(client, "skip")
        await report(client, "skip", "FAILED", error="out of ink")
        assert (await client.post("/jobs/skip/retry")).status == 200
        await report(client, "skip", "PROCESSING")
        await report(client, "skip", percentage=50)
        failed = await raw.events.until(lambda event: event.status == "FAILED")
        assert (failed.name, failed.data["error"]) == ("status", "out of ink")
        newest = await raw.events.next()
        assert (newest.name, newest.status, newest.data["previous_status"]) == ("status", "PROCESSING", "FAILED")
        assert (newest.data["attempt"], newest.data["progress"]) == (2, {"percentage": 50})
        await report(client, "skip", "COMPLETED")
        assert [event.status for event in await raw.events.rest()] == ["COMPLETED"]


async def test_a_deletion_waits_behind_an_unsent_finished_state(start_web, unlimited_key):
    web = await start_web()
    async with session(web.url, unlimited_key) as client:
        await create(client, "behind")
        raw = await slow_reader(web.url, unlimited_key, "behind")
        await block(client, "behind")
        await report(client, "behind", "COMPLETED")
        await client.delete("/jobs/behind")
        last = (await raw.events.rest())[-2:]
        assert [event.name for event in last] == ["status", "deleted"]
        assert last[0].status == "COMPLETED"
        assert last[1].data == {"id": "behind", "version": last[0].version + 1, "previous_status": "COMPLETED"}


async def test_a_deletion_that_waits_stays_the_same_however_often_it_is_found(
    client, unlimited_key, inside, monkeypatch
):
    """Each comparison with Postgres finds it anew while the reader does not read."""
    monkeypatch.setattr(service.hub, "RECONCILE_EVERY_s", 0.05)
    client.session.headers["X-API-Key"] = unlimited_key
    await create(client, "found")
    raw = await slow_reader(str(client.make_url("")), unlimited_key, "found")
    await block(client, "found")
    await report(client, "found", "COMPLETED")
    await client.delete("/jobs/found")
    hub = inside[Hub]
    found_before = hub.repaired
    await comes_true(lambda: hub.repaired >= found_before + 3)
    completed, deleted = (await raw.events.rest())[-2:]
    assert (deleted.name, deleted.version) == ("deleted", completed.version + 1)


@pytest.mark.parametrize("left", ["a change", "the end"])
async def test_a_reader_that_takes_nothing_is_let_go(client, unlimited_key, inside, monkeypatch, left):
    """Also one that has only the end left to take: it would hold its place for ever."""
    client.session.headers["X-API-Key"] = unlimited_key
    monkeypatch.setattr(service.streaming.stream, "STUCK_FOR_s", 0.5)
    await create(client, "stuck")
    raw = await slow_reader(str(client.make_url("")), unlimited_key, "stuck")
    (stream,) = inside[Streams]._open
    stream._transport.set_write_buffer_limits(high=len(BLOB))  # for the framework's own writes
    for n in range(1000):
        if stream.has_more or (left == "the end" and stream._transport.get_write_buffer_size() > 2 * len(BLOB)):
            break
        await report_many(client, blobs("stuck", 1, n))
    if left == "the end":
        await report(client, "stuck", "COMPLETED")
        assert (stream.ended, stream.has_more) == (True, False)
    await comes_true(lambda: len(inside[Streams]) == 0)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await raw.events.rest()


# The truth, whatever happens


@pytest.fixture
def no_reconcile(monkeypatch):
    """So that what must be told by a message is not repaired unseen."""
    monkeypatch.setattr(service.hub, "RECONCILE_EVERY_s", 3600)


@pytest.fixture
def pause(monkeypatch):
    """`pause(kind, name, after=...)`: the next call waits there; yields `reached` and `go_on` events."""

    def at(kind, name, *, after):
        reached, go_on = asyncio.Event(), asyncio.Event()
        original = getattr(kind, name)

        async def paused(self, *args, **options):
            if reached.is_set():
                return await original(self, *args, **options)
            answer = await original(self, *args, **options) if after else None
            reached.set()
            await go_on.wait()
            return answer if after else await original(self, *args, **options)

        monkeypatch.setattr(kind, name, paused)
        return reached, go_on

    return at


BETWEEN = {
    "subscribe and read": (StatusReader, "read", False),
    "read and prepare": (StatusReader, "read", True),
    "prepare and start": (Streaming, "_begun", True),
}


CHANGES = [["PROCESSING"], ["COMPLETED"], ["PROCESSING", "COMPLETED"], ["FAILED", "retry"], ["delete"]]


@pytest.mark.usefixtures("no_reconcile")
@pytest.mark.parametrize("known", [False, True], ids=["new", "coming back"])
@pytest.mark.parametrize("point", BETWEEN)
async def test_no_change_falls_between(client, inside, pause, point, known):
    channel = inside[EventChannel]
    heard = 0

    def hear(topic, message, original=channel.on_message):
        nonlocal heard
        original(topic, message)
        heard += 1

    channel.on_message = hear
    for changes in CHANGES:
        job_id = "-".join(changes)
        await create(client, job_id)
        options = in_header(await etag_of(client, job_id)) if known else {}
        kind, name, after = BETWEEN[point]
        reached, go_on = pause(kind, name, after=after)
        opening = asyncio.create_task(client.get(f"/jobs/{job_id}/events", **options))
        async with asyncio.timeout(5):
            await reached.wait()
        before = heard
        version = await make_changes(client, job_id, changes)
        await comes_true(lambda before=before, changes=changes: heard >= before + len(changes))
        go_on.set()
        response = await opening
        if changes == ["delete"] and point == "subscribe and read":
            assert response.status == 404
            continue
        events = EventReader.of(response)
        await events.until(lambda event, version=version: event.version == version, within_s=2)
        assert events.seen[0].data["previous_status"] in ((None, "queued") if known else (None,))
        if changes[-1] in ("PROCESSING", "retry"):
            await report(client, job_id, "COMPLETED")
        await events.rest()
        versions = [event.version for event in events.seen]
        assert versions == sorted(set(versions))
        assert not (known and 1 in versions)


async def make_changes(client, job_id, changes):
    """Makes each of `changes`; returns the version after the last."""
    version = 1
    for change in changes:
        if change == "retry":
            version = (await (await client.post(f"/jobs/{job_id}/retry")).json())["version"]
        elif change == "delete":
            await client.delete(f"/jobs/{job_id}")
            version += 1
        else:
            version = (await report(client, job_id, change))["version"]
    return version


@pytest.mark.usefixtures("no_reconcile")
async def test_what_a_returning_reader_has_is_not_told_again(client, inside, pause):
    """The change that it has read elsewhere is announced once more while it comes back."""
    await create(client, "twice")
    announced = []
    channel = inside[EventChannel]

    def hear(topic, message, original=channel.on_message):
        announced.append((topic, message))
        original(topic, message)

    channel.on_message = hear
    async with events_of(client, "twice") as events:
        await events.next()
        await report(client, "twice", "PROCESSING")
        await events.next()
    reached, go_on = pause(StatusReader, "read", after=False)
    opening = asyncio.create_task(client.get("/jobs/twice/events", headers={"Last-Event-ID": events.parser.last_id}))
    async with asyncio.timeout(5):
        await reached.wait()
    channel.on_message(*announced[-1])
    go_on.set()
    events = EventReader.of(await opening)
    assert await events.quiet(0.3)
    await report(client, "twice", "COMPLETED")
    assert [event.version for event in await events.rest()] == [3]


async def test_whenever_a_stream_is_opened_it_tells_the_same_story(client, unlimited_key):
    client.session.headers["X-API-Key"] = unlimited_key
    await create(client, "story")

    async def follow():
        async with events_of(client, "story") as events:
            await events.rest()
        return events.seen

    readers = []
    for n in range(40):
        readers.append(asyncio.create_task(follow()))
        await report(client, "story", "PROCESSING", percentage=2 * n)
        await asyncio.sleep(0.001 * (n % 5))
    await report(client, "story", "COMPLETED")
    for seen in await asyncio.gather(*readers):
        assert_true_to(seen)


async def test_a_lost_message_is_repaired(client, inside, monkeypatch):
    monkeypatch.setattr(service.hub, "RECONCILE_EVERY_s", 0.2)
    await create(client, "lost")
    async with events_of(client, "lost") as events:
        await events.next()
        inside[EventChannel].on_message = lambda topic, message: None
        await report(client, "lost", "PROCESSING")
        await events.until(lambda event: event.status == "PROCESSING")
        await report(client, "lost", "COMPLETED")
        assert [event.status for event in await events.rest()] == ["COMPLETED"]
    assert inside[Hub].repaired == 2


async def test_a_lost_message_of_a_deletion_is_repaired(client, inside, monkeypatch):
    monkeypatch.setattr(service.hub, "RECONCILE_EVERY_s", 0.2)
    await create(client, "lost-too")
    async with events_of(client, "lost-too") as events:
        await events.next()
        inside[EventChannel].on_message = lambda topic, message: None
        await client.delete("/jobs/lost-too")
        (deleted,) = await events.rest()
    assert (deleted.name, deleted.data["version"]) == ("deleted", 2)


async def test_what_a_process_without_redis_writes_is_told_by_another(start_web, key, redis_url):
    """Only the outbox and the comparison with Postgres know of it."""
    here = await start_web()
    alone = await start_web(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    async with session(here.url, key) as client, session(alone.url, key) as writer:
        await create(client, "aside")
        await create(client, "aside-gone")
        async with events_of(client, "aside") as events, events_of(client, "aside-gone") as gone:
            await events.next()
            await gone.next()
            reported = await writer.patch("/jobs/aside", json={"status": "PROCESSING"})
            assert reported.headers["Warning"].startswith("199 ")
            assert (await events.next()).status == "PROCESSING"
            await writer.patch("/jobs/aside", json={"status": "COMPLETED"})
            await writer.delete("/jobs/aside-gone")
            assert [event.status for event in await events.rest()] == ["COMPLETED"]
            assert [event.name for event in await gone.rest()] == ["deleted"]


async def test_a_reader_at_a_process_without_redis_hears_of_everything_too(start_web, key):
    here = await start_web()
    alone = await start_web(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    async with session(alone.url, key) as client, session(here.url, key) as writer:
        await create(writer, "deaf")
        async with events_of(client, "deaf") as events:
            await events.next()
            await report(writer, "deaf", "PROCESSING")
            assert (await events.next()).status == "PROCESSING"
            await report(writer, "deaf", "COMPLETED")
            assert [event.status for event in await events.rest()] == ["COMPLETED"]


@pytest.mark.parametrize("reports", [20, pytest.param(400, marks=pytest.mark.long)])
async def test_the_end_comes_however_often_the_connection_is_cut(start_web, unlimited_key, redis, reports):
    web, other = await start_web(), await start_web()
    async with session(web.url, unlimited_key) as client, session(other.url, unlimited_key) as writer:
        jobs = [f"cut-{n}" for n in range(5)]
        for job_id in jobs:
            await create(client, job_id)

        async def follow(job_id):
            async with events_of(client, job_id) as events:
                await events.rest(within_s=60)
            return events.seen

        readers = [asyncio.create_task(follow(job_id)) for job_id in jobs for _ in range(4)]
        done, cuts = asyncio.Event(), 0

        async def cut():
            nonlocal cuts
            while not done.is_set():
                cuts += await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                await asyncio.sleep(0.05)

        cutting = asyncio.create_task(cut())
        for n in range(reports):
            percentage = 100 * n / reports
            await asyncio.gather(*(report(writer, job_id, "PROCESSING", percentage) for job_id in jobs))
            await asyncio.sleep(0.04)
        await asyncio.gather(*(report(writer, job_id, "COMPLETED") for job_id in jobs))
        finished_at = asyncio.get_running_loop().time()
        stories = await asyncio.gather(*readers)
        done.set()
        await cutting
        assert cuts > 5
        for seen in stories:
            assert_true_to(seen)
            assert seen[-1].at - finished_at < 10


async def test_the_end_comes_while_redis_hangs_and_after(database, tmp_path, key):
    redis = await asyncio.to_thread(start_redis, tmp_path, durable=False)
    web = await WebProcess.start(environment_of(database, redis.url))
    try:
        async with session(web.url, key) as client:
            for job_id in ("during", "after"):
                await create(client, job_id)
            async with events_of(client, "during") as during, events_of(client, "after") as after:
                await during.next()
                await after.next()
                os.kill(redis.pid, signal.SIGSTOP)
                await report(client, "during", "PROCESSING")
                await report(client, "during", "COMPLETED")
                assert (await during.rest(within_s=10))[-1].status == "COMPLETED"
                await report(client, "after", "PROCESSING")
                async with events_of(client, "after") as opened_meanwhile:
                    assert (await opened_meanwhile.next()).status == "PROCESSING"
                    os.kill(redis.pid, signal.SIGCONT)
                    await report(client, "after", "COMPLETED")
                    for events in (after, opened_meanwhile):
                        await events.rest(within_s=10)
                        assert_true_to(events.seen)
                assert_true_to(during.seen)
    finally:
        os.kill(redis.pid, signal.SIGCONT)
        await web.stop()
        await asyncio.to_thread(redis.stop)


# Five hundred of them


async def followers(url, key, job_id, how_many):
    """That many open streams, each of which has read the present state."""
    readers = []
    for _ in range(0, how_many, 50):
        group = await asyncio.gather(*(RawReader.open(url, f"/jobs/{job_id}/events", key) for _ in range(50)))
        for raw in group:
            assert await raw.answer() == 200
            await raw.events.next()
        readers += group
    return readers


async def job_topics(redis):
    return await redis.execute_command("PUBSUB", "CHANNELS", "jw:job:*")


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.usefixtures("a_thousand_streams")
async def test_nothing_is_left_of_readers_that_hung_up(client, unlimited_key, inside, redis, monkeypatch):
    monkeypatch.setattr(service.hub, "LINGER_s", 0.3)
    client.session.headers["X-API-Key"] = unlimited_key
    url = str(client.make_url(""))
    await create(client, "crowd")
    streams, hub = inside[Streams], inside[Hub]
    for raw in await followers(url, unlimited_key, "crowd", 50):
        raw.hang_up()
    await comes_true(lambda: not len(streams) and not hub._topics)
    at_first = len(asyncio.all_tasks())

    readers = await followers(url, unlimited_key, "crowd", 500)
    assert len(streams) == 500
    assert await redis.execute_command("PUBSUB", "NUMSUB", "jw:job:1:crowd") == [b"jw:job:1:crowd", 1]
    for raw in readers[:250]:
        raw.hang_up()
    await comes_true(lambda: len(streams) == 250)
    await report(client, "crowd", "PROCESSING")
    for raw in readers[250:]:
        assert (await raw.events.next()).status == "PROCESSING"
    for raw in readers[250:]:
        raw.hang_up()
    await comes_true(lambda: len(streams) == 0)
    await comes_true(lambda: len(asyncio.all_tasks()) <= at_first)
    await comes_true(lambda: not hub._topics)

    async def no_topics():
        return await job_topics(redis) == []

    await comes_true(no_topics)
    assert not streams._per_key


@pytest.mark.usefixtures("quick_ticks")
@pytest.mark.parametrize("point", ["the door and the stream", "subscribe and read", "read and prepare"])
async def test_a_reader_that_hangs_up_before_its_stream_has_begun_is_let_go(
    client, key, inside, pause, capsys, monkeypatch, point
):
    monkeypatch.setattr(service.streaming.stream, "QUIET_FOR_s", 0.2)
    await create(client, "early")
    kind, name, after = (BETWEEN | {"the door and the stream": (Limiter, "take", True)})[point]
    reached, go_on = pause(kind, name, after=after)
    raw = await RawReader.open(str(client.make_url("")), "/jobs/early/events", key)
    async with asyncio.timeout(5):
        await reached.wait()
    connections = client.server.runner.server.connections
    (of_raw,) = [one for one in connections if one.transport.get_extra_info("peername") == raw.address]
    raw.hang_up()
    await comes_true(lambda: of_raw.transport is None)

    async def read_slowly(self, *key, read=StatusReader.read):
        await asyncio.sleep(0.05)  # so that the timer looks at the stream while it has no transport
        return await read(self, *key)

    monkeypatch.setattr(StatusReader, "read", read_slowly)
    go_on.set()
    async with events_of(client, "early") as events:
        await events.next()
        await comes_true(lambda: len(inside[Streams]) == 1)
        assert await events.quiet(0.8)
        assert events.parser.comments > 0  # the one timer of all streams has survived it
    assert "request_failed" not in capsys.readouterr().out  # it is nobody's fault


async def test_a_process_gives_back_what_readers_took(start_web, unlimited_key, redis):
    web = await start_web(JOBWIRE_MAX_STREAMS_PER_KEY="1000")
    pid = web.process.pid
    async with session(web.url, unlimited_key) as client:
        await create(client, "files")
        first = await followers(web.url, unlimited_key, "files", 50)
        for raw in first:
            raw.hang_up()
        at_first = descriptors(pid)
        await comes_true(lambda: descriptors(pid) <= at_first - 50)
        at_first = descriptors(pid)

        readers = await followers(web.url, unlimited_key, "files", 500)
        assert descriptors(pid) >= at_first + 500
        for raw in readers[:250]:
            raw.hang_up()
        await comes_true(lambda: descriptors(pid) <= at_first + 250)
        await report(client, "files", "COMPLETED")
        for raw in readers[250:]:
            assert [event.status for event in await raw.events.rest()] == ["COMPLETED"]
            raw.hang_up()
        await comes_true(lambda: descriptors(pid) <= at_first)


@pytest.mark.long
async def test_a_subscription_outlives_its_last_reader_by_ten_seconds(start_web, key, redis):
    web = await start_web()
    async with session(web.url, key) as client:
        await create(client, "linger")
        async with events_of(client, "linger") as events:
            await events.next()

        async def no_topics():
            return await job_topics(redis) == []

        with pytest.raises(TimeoutError):
            await comes_true(no_topics, within_s=8)
        await comes_true(no_topics)


async def test_a_process_that_stops_ends_every_stream_cleanly(start_web, unlimited_key):
    web = await start_web(JOBWIRE_MAX_STREAMS_PER_KEY="1000")
    async with session(web.url, unlimited_key) as client:
        await create(client, "stop")
        readers = await followers(web.url, unlimited_key, "stop", 500)
        loop = asyncio.get_running_loop()
        started = loop.time()
        stopping = asyncio.create_task(web.stop())
        ends = await asyncio.gather(*(raw.events.rest() for raw in readers))
        assert await stopping == 0
        took_s = loop.time() - started
        assert ends == [[]] * 500  # each with its last chunk
        assert took_s < 2, took_s


async def test_a_process_that_stops_ends_new_streams_as_they_begin(client, key, inside):
    """EventSource comes back after a clean end, to another process, and gives up for good after a 503."""
    await create(client, "late", batch_id="late")
    inside[Streams].end_all()
    for path in ("/jobs/late/events", "/jobs/batch/late/events", "/jobs/events?job_ids=late", "/jobs/events"):
        async with client.get(path) as response:
            events = EventReader.of(response)
            told = await events.rest()
        assert [event.name for event in told] == (["open"] if path == "/jobs/events" else []), path
        assert 2000 <= events.parser.retry_ms <= 5000
    async with session(str(client.make_url("/")), key) as other, other.ws_connect("/jobs/late/status") as socket:
        assert (await socket.receive()).type == aiohttp.WSMsgType.CLOSE
    assert socket.close_code == aiohttp.WSCloseCode.GOING_AWAY


async def test_a_reader_that_takes_nothing_does_not_hold_up_the_stop(start_web, unlimited_key):
    web = await start_web()
    async with session(web.url, unlimited_key) as client:
        await create(client, "stop-slow")
        await slow_reader(web.url, unlimited_key, "stop-slow")
        await block(client, "stop-slow")
        async with asyncio.timeout(5):
            assert await web.stop() == 0


# Readers that others wrote


async def test_curl_reads_along(client, key):
    await create(client, "curl")
    url = str(client.make_url("/jobs/curl/events"))
    command = ["curl", "-sS", "-N", "-H", f"X-API-Key: {key}", url]
    curl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    events = EventReader(lambda: curl.stdout.read(2**16))
    assert (await events.next()).status == "queued"
    await report(client, "curl", "PROCESSING")
    assert (await events.next()).status == "PROCESSING"
    await report(client, "curl", "COMPLETED")
    assert [event.status for event in await events.rest()] == ["COMPLETED"]
    assert await curl.wait() == 0


async def test_httpx_sse_reads_along(client, key):
    await create(client, "httpx")
    heard = []
    url = str(client.make_url("/jobs/httpx/events"))
    async with (
        httpx.AsyncClient(headers={"X-API-Key": key}, timeout=10) as reader,
        httpx_sse.aconnect_sse(reader, "GET", url) as source,
    ):
        async for event in source.aiter_sse():
            if not event.data:  # it makes an event of `retry:` alone
                assert 2000 <= event.retry <= 5000
                continue
            heard.append((event.event, event.json()["status"], event.json()["previous_status"]))
            following = {"queued": "PROCESSING", "PROCESSING": "COMPLETED"}.get(event.json()["status"])
            if following:
                await report(client, "httpx", following)
            assert event.id
    assert heard == [
        ("status", "queued", None),
        ("status", "PROCESSING", "queued"),
        ("status", "COMPLETED", "PROCESSING"),
    ]


FOREIGN = Path(__file__).parent / "foreign"


@pytest.fixture(scope="session")
def eventsource():
    """The script that follows a job with npm's `eventsource`, installed beside it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    if not (FOREIGN / "node_modules" / "eventsource").is_dir():
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"], cwd=FOREIGN, check=True
        )
    return FOREIGN / "follow.mjs"


async def test_eventsource_reads_along_across_a_restart(start_web, key, eventsource):
    port = str(free_port())
    web = await start_web(JOBWIRE_PORT=port)
    node = await asyncio.create_subprocess_exec(
        "node", str(eventsource), f"http://127.0.0.1:{port}/jobs/node/events", key, stdout=asyncio.subprocess.PIPE
    )

    async def says(what):
        async with asyncio.timeout(20):
            while line := await node.stdout.readline():
                said = json.loads(line)
                if said["what"] == what:
                    return said
        raise AssertionError("eventsource has ended")

    async with session(web.url, key) as client:
        await create(client, "node")
        assert (await says("status"))["status"] == "queued"
        await report(client, "node", "PROCESSING")
        known = await says("status")
        assert known["status"] == "PROCESSING"
        await web.stop()
        web = await start_web(JOBWIRE_PORT=port)
        returned = await says("request")
        while returned["last_event_id"] is None:
            returned = await says("request")
        assert returned["last_event_id"] == known["event_id"]
        await says("open")
        await report(client, "node", percentage=50)
        told = await says("progress")  # no snapshot in between: it had said what it has
        assert (told["version"], told["status"]) == (3, "PROCESSING")
        await report(client, "node", "COMPLETED")
        assert (await says("status"))["status"] == "COMPLETED"
        ended = await says("closed")
        assert ended["code"] == 204
        async with asyncio.timeout(10):
            assert await node.wait() == 0
