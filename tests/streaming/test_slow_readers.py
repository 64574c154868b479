"""Readers that do not read: what is kept for them, what they are told in the end, and when they are let go."""

import asyncio

import pytest

import service.hub
import service.streaming.stream
from service.hub import Hub
from service.streaming.operation import Streams
from service.streaming.stream import BUFFER_bytes
from tests.following import BLOB, blobs, block, create, report, report_many, session, slow_reader
from tests.sse_reader import assert_true_to, comes_true, events_of


async def test_a_slow_reader_gets_the_newest_state_and_no_backlog(start_web, unlimited_key):
    web = await start_web()
    async with session(web.url, unlimited_key) as client:
        await create(client, "slow")
        await report(client, "slow", "PROCESSING")
        raw = await slow_reader(web.url, unlimited_key, "/jobs/slow/events")
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
    raw = await slow_reader(str(client.make_url("")), unlimited_key, "/jobs/kept-small/events")
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


async def test_a_finished_state_is_never_skipped(start_web, unlimited_key):
    web = await start_web()
    async with session(web.url, unlimited_key) as client:
        await create(client, "skip")
        raw = await slow_reader(web.url, unlimited_key, "/jobs/skip/events")
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
        raw = await slow_reader(web.url, unlimited_key, "/jobs/behind/events")
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
    raw = await slow_reader(str(client.make_url("")), unlimited_key, "/jobs/found/events")
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
    raw = await slow_reader(str(client.make_url("")), unlimited_key, "/jobs/stuck/events")
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
