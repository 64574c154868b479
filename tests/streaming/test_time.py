"""What time does to a stream: comments, its lifetime, the end of its key."""

import asyncio

import pytest

import service.streaming.operation
import service.streaming.stream
from service.stores.key_memory import UNUSED_s
from service.streaming.job_stream import JobStream
from tests.conftest import make_key
from tests.following import create, report
from tests.sse_reader import events_of


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


async def test_a_revoked_key_ends_its_streams_and_no_others(client, database, sql):
    await create(client, "revoked")
    key = await make_key(database, "acme")
    async with (
        events_of(client, "revoked") as others,
        events_of(client, "revoked", headers={"X-API-Key": key}) as events,
    ):
        await others.next()
        await events.next()
        await sql.execute("update keys set revoked_at = clock_timestamp() where hash = sha256($1)", key.encode())
        (problem,) = await events.rest(within_s=5)
        assert problem.name == "problem"
        assert problem.data["error_type"] == "unauthorized"
        assert problem.id == ""  # what the reader has stays what it says when it comes back
        await report(client, "revoked", "PROCESSING")
        assert (await others.next()).status == "PROCESSING"
    assert (await client.get("/jobs/revoked/events", headers={"X-API-Key": key})).status == 401
