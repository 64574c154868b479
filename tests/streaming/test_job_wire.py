"""The stream of one job on the wire: what is sent, byte for byte, and what is refused before."""

import re

import pytest

from service.identity import WRITE
from service.streaming.operation import Streams
from tests.conftest import make_key
from tests.following import create, etag_of, report
from tests.sse_reader import RawReader, comes_true, events_of


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


async def test_stalling_and_coming_back_are_told(client, sql):
    """What `deliver` will do, done by hand: one statement, which the outbox carries to everybody."""
    await create(client, "stall")
    await report(client, "stall", "PROCESSING")
    async with events_of(client, "stall") as events:
        await events.next()
        await sql.execute(
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
        await sql.execute(
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
    assert again.status == 204
    anew = await client.get("/jobs/gone/events")
    assert anew.status == 404
    assert (await anew.json())["details"]["error_type"] == "deleted"


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
