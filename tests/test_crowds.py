"""Thousands of polls that wait in one process: each is answered by its own change, and nothing of them stays."""

import asyncio
import os
import resource
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from redis.asyncio import Redis

import service.hub
from service.hub import Hub
from service.polling.operation import Waiting
from service.stores.event_channel import EventChannel
from tests.crowd import Ask, Crowd, allow_many_files
from tests.sse_reader import comes_true
from tests.web_process import WebProcess

JOBS, WAITS_EACH = 200, 10
POOL = 16
"""Connections to Postgres that may have been made meanwhile."""
GROWTH = 1.1
"""Of memory from one crowd to the next: the heap of a process is never quite as it was."""


@pytest.fixture(autouse=True)
def many_files() -> None:
    allow_many_files()


@pytest.fixture
async def crowd() -> AsyncIterator[Callable[..., Awaitable[Crowd]]]:
    """Opens crowds, of which none outlives the test."""
    opened: list[Crowd] = []

    async def open_(*args: object) -> Crowd:
        opened.append(await Crowd.open(*args))  # type: ignore[arg-type]
        return opened[-1]

    yield open_
    for each in opened:
        await each.kill()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as redis:
        yield redis


async def make_jobs(http: aiohttp.ClientSession, url: str, ids: list[str], **fields: object) -> list[str]:
    """Their ETags."""
    jobs = [{"id": id, "type": "extraction", **fields} for id in ids]
    async with http.post(f"{url}/jobs", json=jobs) as created:
        assert created.status == 201
    etags = []
    for id in ids:
        async with http.get(f"{url}/jobs/{id}") as polled:
            etags.append(polled.headers["ETag"])
    return etags


async def report(http: aiohttp.ClientSession, url: str, job: str, status: str) -> float:
    """When it was sent."""
    sent_at = time.monotonic()
    async with http.patch(f"{url}/jobs/{job}", json={"status": status}) as reported:
        assert reported.status == 200, await reported.text()
        assert "Warning" not in reported.headers
    return sent_at


def resident_bytes(process: WebProcess) -> int:
    pages = Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def sockets(pid: int | str) -> int:
    return sum(
        os.readlink(file).startswith("socket:") for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()
    )


async def rests(process: WebProcess) -> None:
    """Until it has taken up all that it was asked, and has nothing to do."""
    busy_until, cpu = time.monotonic() + 0.3, -1
    while time.monotonic() < busy_until:
        stat = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()
        if (now := int(stat[11]) + int(stat[12])) > cpu + 1:
            busy_until, cpu = time.monotonic() + 0.3, now
        await asyncio.sleep(0.05)


async def topics(redis: Redis) -> dict[bytes, int]:
    """Jobs that are followed, and by how many processes."""
    names = await redis.pubsub_channels("jw:job:1:*")
    return dict(await redis.pubsub_numsub(*names)) if names else {}


async def test_of_two_thousand_waits_each_is_answered_by_the_change_of_its_own_job(
    start_web: Callable[..., Awaitable[WebProcess]], key: str, crowd: Callable[..., Awaitable[Crowd]], redis: Redis
) -> None:
    web, other = await start_web(), await start_web()
    memory, medians = [], []
    async with aiohttp.ClientSession(headers={"X-API-Key": key}) as http:
        unloaded = await delays_of_one(http, web, other, key, crowd)
        idle = sockets(web.process.pid)
        for round in range(3):
            ids = [f"r{round}-{n}" for n in range(JOBS)]
            etags = await make_jobs(http, other.url, ids)
            asks = [
                Ask(f"/jobs/{id}", etag if n % 2 else None)
                for id, etag in zip(ids, etags, strict=True)
                for n in range(WAITS_EACH)
            ]
            waiting = await crowd(web.url, key, asks)

            async def all_are_followed() -> bool:
                followed = await topics(redis)
                return {name: followed.get(name) for name in wanted} == dict.fromkeys(wanted, 1)

            wanted = [f"jw:job:1:{id}".encode() for id in ids]
            await comes_true(all_are_followed, within_s=20)
            await comes_true(lambda: sockets(web.process.pid) >= idle + len(asks), within_s=20)
            await rests(web)
            began = {id: await report(http, other.url, id, "PROCESSING") for id in ids}
            ended = {id: await report(http, other.url, id, "COMPLETED") for id in ids}
            answers = await waiting.answers()
            took = []
            for ask, answer in zip(asks, answers, strict=True):
                id = ask.path.removeprefix("/jobs/")
                changed_at, status, version = (began, "PROCESSING", 2) if ask.etag else (ended, "COMPLETED", 3)
                assert answer.status == 200
                assert (answer.json["id"], answer.json["status"], answer.json["version"]) == (id, status, version)
                assert answer.at > changed_at[id], "answered before anything had changed"
                took.append(answer.at - changed_at[id])
            medians.append(statistics.median(took))
            await comes_true(lambda: sockets(web.process.pid) <= idle + POOL)
            memory.append(resident_bytes(web))
            print(
                f"{len(asks)} waits on {JOBS} jobs: report sent -> answer {medians[-1] * 1e3:.1f} ms (median; "
                f"p99 {statistics.quantiles(took, n=100)[98] * 1e3:.1f}), one waiter {unloaded * 1e3:.1f} ms; "
                f"afterwards {memory[-1] / 2**20:.0f} MiB"
            )
    assert min(medians) < 5 * unloaded + 0.1, "one round may have been disturbed"
    assert memory[2] < memory[1] * GROWTH, "what a crowd leaves behind adds up"


async def delays_of_one(
    http: aiohttp.ClientSession, web: WebProcess, other: WebProcess, key: str, crowd: Callable[..., Awaitable[Crowd]]
) -> float:
    """Median from sending a report to the answer of the one poll that waits for it, in s."""
    took = []
    ids = [f"one-{n}" for n in range(15)]
    for id, etag in zip(ids, await make_jobs(http, other.url, ids), strict=True):
        waiting = await crowd(web.url, key, [Ask(f"/jobs/{id}", etag)])
        await asyncio.sleep(0.05)
        sent_at = await report(http, other.url, id, "PROCESSING")
        [answer] = await waiting.answers()
        took.append(answer.at - sent_at)
    return statistics.median(took)


async def test_a_crowd_that_goes_away_leaves_nothing_behind(inside, client, key, crowd, redis, monkeypatch):
    """Its places at once, its topics when they have lingered."""
    monkeypatch.setattr(service.hub, "LINGER_s", 1.0)
    url = str(client.make_url("")).rstrip("/")
    ids = [f"gone-{n}" for n in range(JOBS)]
    async with aiohttp.ClientSession(headers={"X-API-Key": key}) as http:
        etags = await make_jobs(http, url, ids)
    assert await topics(redis) == {}
    tasks, files = len(asyncio.all_tasks()), sockets("self")
    asks = [Ask(f"/jobs/{id}", etag if n % 2 else None) for n in range(WAITS_EACH) for id, etag in zip(ids, etags)]
    gone = await crowd(url, key, asks)
    await comes_true(lambda: len(inside[Waiting]) == len(asks), within_s=20)
    assert await topics(redis) == {f"jw:job:1:{id}".encode(): 1 for id in ids}
    await gone.kill()
    await comes_true(lambda: len(inside[Waiting]) == 0)
    assert len(inside[Hub]._topics) == JOBS, "readers come back: topics linger"
    await comes_true(lambda: not inside[Hub]._topics)
    assert not inside[EventChannel]._topics
    await comes_true(lambda: len(asyncio.all_tasks()) <= tasks and sockets("self") <= files + POOL)
    assert await topics(redis) == {}


async def test_hundreds_who_come_back_at_once_are_all_taken_in(start_web, key):
    """A connection that finds no room to wait tries again a second later, and then later still."""
    web = await start_web()
    many = min(600, int(Path("/proc/sys/net/core/somaxconn").read_text()))
    web.freeze()
    host, port = urlsplit(web.url).hostname, urlsplit(web.url).port
    opening = [asyncio.create_task(asyncio.open_connection(host, port)) for _ in range(many)]
    await asyncio.wait(opening, timeout=5)
    web.thaw()
    at_once = [each for each in opening if each.done()]
    connections = await asyncio.gather(*opening)
    for _, writer in connections:
        writer.close()
    assert len(at_once) == many


async def test_a_process_may_hold_as_many_connections_as_the_machine_allows(start_web):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    try:
        web = await start_web()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(web.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


async def test_a_process_that_ends_answers_five_hundred_waits_with_what_is_so_now(start_web, key, crowd, redis):
    web, other = await start_web(), await start_web()
    idle = sockets(web.process.pid)
    async with aiohttp.ClientSession(headers={"X-API-Key": key}) as http:
        _, etag = await make_jobs(http, other.url, ["stop", "still"])
        await make_jobs(http, other.url, ["of-batch"], batch_id="stop")
        for_the_end, for_a_change = [Ask("/jobs/stop")] * 250, [Ask("/jobs/still", etag)] * 150
        ending = await crowd(web.url, key, [*for_the_end, *for_a_change, *[Ask("/jobs/batch/stop")] * 100])
        rude = await crowd(web.url, key, [Ask("/jobs/stop")] * 50)
        await comes_true(lambda: sockets(web.process.pid) >= idle + 550)
        await rests(web)
        async with http.patch(f"{other.url}/jobs/stop", json={"progress": {"percentage": 7}}) as reported:
            assert reported.status == 200
        await report(http, other.url, "of-batch", "PROCESSING")
        assert len(await still_waiting(redis)) == 3
        _, stopped = await asyncio.gather(rude.kill(), web.stop())
        assert stopped == 0
        answers = await ending.answers(within_s=10)
        assert [answer.status for answer in answers] == [200] * 250 + [304] * 150 + [200] * 100
        assert {answer.json["progress"]["percentage"] for answer in answers[:250]} == {7}
        assert {answer.json["jobs"][0]["status"] for answer in answers[400:]} == {"processing"}


async def still_waiting(redis: Redis) -> list[bytes]:
    """Jobs and batches."""
    return [*await topics(redis), *await redis.pubsub_channels("jw:batch:1:*")]
