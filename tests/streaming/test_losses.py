"""Lost messages, cut connections, Redis and Postgres away: what was missed is repaired, unseen by the reader."""

import asyncio
import os
import signal

import pytest

from service.embedded import free_port, start_redis
from service.hub import Hub
from service.stores.event_channel import EventChannel
from service.stores.keys import topic_of
from service.stores.redis_address import RedisAddress
from tests.conftest import environment_of
from tests.fault_proxy import FaultProxy
from tests.following import create, deaf, report, session
from tests.sse_reader import assert_true_to, comes_true, events_of
from tests.web_process import WebProcess


@pytest.mark.usefixtures("quick_reconcile")
async def test_a_lost_message_is_repaired(client, inside):
    await create(client, "lost")
    async with events_of(client, "lost") as events:
        await events.next()
        deaf(inside[EventChannel])
        await report(client, "lost", "PROCESSING")
        await events.until(lambda event: event.status == "PROCESSING")
        await report(client, "lost", "COMPLETED")
        assert [event.status for event in await events.rest()] == ["COMPLETED"]
    assert inside[Hub].repaired == 2


@pytest.mark.usefixtures("quick_reconcile")
async def test_a_lost_message_of_a_deletion_is_repaired(client, inside):
    await create(client, "lost-too")
    async with events_of(client, "lost-too") as events:
        await events.next()
        deaf(inside[EventChannel])
        await client.delete("/jobs/lost-too")
        (deleted,) = await events.rest()
    assert (deleted.name, deleted.data["version"]) == ("deleted", 2)


@pytest.mark.usefixtures("no_reconcile")
async def test_a_subscription_that_is_lost_for_good_delays_nobody_for_long(client, inside):
    """From then on Postgres is compared at once, and every second."""
    await create(client, "cut")
    async with events_of(client, "cut") as events:
        await events.next()
        channel = inside[EventChannel]
        await inside[Hub].settle()  # the next comparison is an hour away
        channel._address = RedisAddress.read(f"redis://127.0.0.1:{free_port()}")
        channel._connection.drop("cut by the test")
        await comes_true(lambda: not channel.up)
        await report(client, "cut", "PROCESSING")
        assert (await events.next(within_s=5)).status == "PROCESSING"
        await report(client, "cut", "COMPLETED")
        assert [event.status for event in await events.rest(within_s=5)] == ["COMPLETED"]


class Doubter:
    """Follows, and notes that it must read anew."""

    def __init__(self):
        self.version = 0
        self.doubts = asyncio.Event()

    def hear(self, notice):
        pass

    def resync(self):
        self.doubts.set()

    def reset(self):
        pass


@pytest.mark.usefixtures("no_reconcile")
async def test_nobody_reads_before_the_subscription_is_acknowledged(redis_url, redis):
    """What is announced after the reading is heard, however long the subscription was on its way."""
    key = (1, "late")
    async with FaultProxy(redis_url) as proxy:
        channel = EventChannel(proxy.url)
        hub = Hub(channel, None, None, lambda: "")
        await channel.start()
        await comes_true(lambda: channel.up)
        proxy.freeze()
        follower = Doubter()

        async def follow():
            async with hub.follow(key, follower):
                await redis.publish(topic_of(key), b"of another life: it is resynced")
                await follower.doubts.wait()

        following = asyncio.create_task(follow())
        await asyncio.sleep(0.1)
        proxy.thaw()
        await asyncio.wait_for(following, 3)
        await channel.close()


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
