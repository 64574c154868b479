"""Readers that go, by hundreds: nothing is left of them. And processes that go: every reader sees the end."""

import asyncio

import aiohttp
import pytest

import service.hub
import service.streaming.stream
from service.hub import Hub
from service.limiting.limiter import Limiter
from service.status_reader import StatusReader
from service.streaming.operation import Streams
from tests.following import block, create, descriptors, followers, job_topics, report, session, slow_reader
from tests.sse_reader import EventReader, RawReader, comes_true, events_of


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


POINTS = {
    "the door and the stream": (Limiter, "take", "after"),
    "subscribe and read": (StatusReader, "read", "before"),
    "read and prepare": (StatusReader, "read", "after"),
}


@pytest.mark.usefixtures("quick_ticks")
@pytest.mark.parametrize("point", POINTS)
async def test_a_reader_that_hangs_up_before_its_stream_has_begun_is_let_go(
    client, key, inside, pause, capsys, monkeypatch, point
):
    monkeypatch.setattr(service.streaming.stream, "QUIET_FOR_s", 0.2)
    await create(client, "early")
    reached, go_on = pause(*POINTS[point])
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


async def test_a_reader_that_takes_nothing_does_not_hold_up_the_stop(start_web, unlimited_key):
    web = await start_web()
    async with session(web.url, unlimited_key) as client:
        await create(client, "stop-slow")
        await slow_reader(web.url, unlimited_key, "/jobs/stop-slow/events")
        await block(client, "stop-slow")
        async with asyncio.timeout(5):
            assert await web.stop() == 0


async def test_the_hub_ends_also_in_the_moment_in_which_it_is_hurried(client, inside):
    """A process that is stopped as soon as it listens would not end else."""
    hub = inside[Hub]
    running = asyncio.create_task(hub.run())
    await asyncio.sleep(2 * service.hub.RECONCILE_AT_MOST_EVERY_s)
    hub._hurry.set()
    running.cancel()
    await asyncio.wait([running], timeout=5)
    assert running.cancelled()


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
