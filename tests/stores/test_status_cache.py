"""The rules of the cache, each on a real Redis; and all of them together against a model of what may be there."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from service.embedded import Server, start_redis
from service.errors import RedisAway
from service.stores import status_cache
from service.stores.keys import UNVERIFIED_AFTER_ms, status_key
from service.stores.ready import ANSWER_SHAPE, Absence, Ready, ReadyAnswer, decode_ready
from service.stores.redis_pipe import RedisPipe
from service.stores.status_cache import (
    LIFE_LENGTH,
    MISS_OF_ANOTHER,
    NOTHING_NEWER,
    UNVERIFIED_AS_HELD,
    Change,
    Miss,
    Newer,
    PUT_TRIES_FOR_s,
    StatusCache,
    Unverified,
)

Frozen = Callable[[], AbstractContextManager[None]]

SOON_s = 3.0
ACCOUNT = 7
JOB = (ACCOUNT, "job-1")
KEY = status_key(*JOB)
TOPICS = (b"jw:job", b"jw:account")
GONE = Absence("deleted")
NEVER_THERE = Absence("not_found")


class Process:
    """What one process of the service has: two pipes and the cache on top of them, trusted from the start."""

    def __init__(self, url: str, name: str, postgres_identity: str) -> None:
        self.polls = RedisPipe(url, probe_every_s=0.05, scripts=StatusCache.scripts)
        self.puts = RedisPipe(url, probe_every_s=0.05, scripts=StatusCache.scripts)
        self.cache = StatusCache(self.polls, self.puts, process_token=name)
        self.cache.postgres_identity = postgres_identity
        self.cache.on_connect.append(self.cache.trust)

    async def start(self) -> None:
        await self.polls.start()
        await self.puts.start()

    async def close(self) -> None:
        await self.polls.close()
        await self.puts.close()


StartProcess = Callable[..., Awaitable[Process]]


@pytest.fixture
async def start_process(admin: Redis, redis_server: Server) -> AsyncIterator[StartProcess]:
    processes: list[Process] = []

    async def start(url: str = redis_server.url, *, postgres_identity: str = "postgres:1") -> Process:
        process = Process(url, f"process{len(processes)}", postgres_identity)
        processes.append(process)
        await process.start()
        return process

    yield start
    for process in processes:
        await process.close()


@pytest.fixture
async def process(start_process: StartProcess) -> Process:
    return await start_process()


@pytest.fixture
async def two_processes(start_process: StartProcess) -> tuple[Process, Process]:
    return await start_process(), await start_process()


@pytest.fixture
def cache(process: Process) -> StatusCache:
    return process.cache


@pytest.fixture
async def ears(admin: Redis) -> AsyncIterator[PubSub]:
    async with admin.pubsub(ignore_subscribe_messages=True) as ears:
        await ears.subscribe(*(topic.decode() for topic in TOPICS))
        await ears.get_message(timeout=SOON_s)
        await ears.get_message(timeout=SOON_s)
        yield ears


def answer(version: int, body: str = "") -> ReadyAnswer:
    body = body or f'{{"version":{version}}}'
    return ReadyAnswer(version, 1_700_000_000_000 + version, "PROCESSING", 2, body.encode(), b'{"b":1}')


def changed(version: int, job_id: str = JOB[1], topics: tuple[bytes, ...] = TOPICS) -> Change:
    return Change(ACCOUNT, job_id, version, answer(version), topics, b"version %d" % version)


def deleted(version: int, job_id: str = JOB[1]) -> Change:
    return Change(ACCOUNT, job_id, version, None, TOPICS, b"deleted %d" % version)


async def lease_of(cache: StatusCache) -> str:
    """The lease of a miss."""
    reading = await cache.read(JOB, 0)
    assert isinstance(reading, Miss)
    assert reading.lease is not None
    return reading.lease


async def filled(cache: StatusCache, ready: Ready) -> None:
    """An entry that a reader put there."""
    await cache.fill([(*JOB, ready)], await lease_of(cache))


async def entry(admin: Redis, key: bytes = KEY) -> Ready | Literal["lease"] | None:
    """What lies under a status key, whatever its life."""
    value = await admin.getrange(key, 0, -1)
    assert isinstance(value, bytes)
    if not value or value.startswith(b"?"):
        return "lease" if value else None
    return decode_ready(int(value[8:23]), value[36:])


async def heard(ears: PubSub) -> list[bytes]:
    """The messages so far: a message of ours, sent last, says that no other is on its way."""
    async with asyncio.timeout(SOON_s):
        await ears.ping("end")
        messages: list[bytes] = []
        while (message := await ears.get_message(timeout=SOON_s)) is None or message["type"] != "pong":
            if message is not None:
                messages.append(message["data"][LIFE_LENGTH:])
        return messages


async def make_unverified(admin: Redis, key: bytes = KEY) -> None:
    """As if Postgres had last been asked a little too long ago."""
    seconds, microseconds = await admin.time()
    now_ms = seconds * 1000 + microseconds // 1000
    await admin.setrange(key, 23, f"{now_ms - UNVERIFIED_AFTER_ms - 1:013}")


async def calls_of(admin: Redis, command: str) -> int:
    calls: int = (await admin.info("commandstats")).get(f"cmdstat_{command}", {}).get("calls", 0)
    return calls


# --- reading -------------------------------------------------------------------------------------------------------


async def test_held_is_compared_with_the_entry(cache: StatusCache) -> None:
    await filled(cache, answer(5))
    assert await cache.read(JOB, 0) == Newer(answer(5))
    assert await cache.read(JOB, 4) == Newer(answer(5))
    assert await cache.read(JOB, 5) is NOTHING_NEWER
    assert await cache.read(JOB, 6) is NOTHING_NEWER, "an older entry is nothing newer"


async def test_versions_are_compared_as_numbers(cache: StatusCache) -> None:
    most = 10**15 - 1
    await filled(cache, answer(9))
    assert await cache.read(JOB, 10) is NOTHING_NEWER
    assert await cache.put([changed(10)])
    assert await cache.read(JOB, 9) == Newer(answer(10))
    assert await cache.put([changed(most)])
    assert await cache.read(JOB, most - 1) == Newer(answer(most))
    assert await cache.read(JOB, most) is NOTHING_NEWER


async def test_a_ready_answer_survives_the_trip(cache: StatusCache) -> None:
    sent = ReadyAnswer(3, 1_705_314_600_000, "COMPLETED", None, '{"error":"ü ✓"}'.encode(), b"{}")
    await filled(cache, sent)
    reading = await cache.read(JOB, 0)
    assert reading == Newer(sent)
    assert isinstance(reading, Newer)
    assert isinstance(reading.ready, ReadyAnswer)
    assert reading.ready.etag == '"3-1705314600000"'
    assert dict(reading.ready.headers) == {
        "Content-Type": "application/json; charset=utf-8",
        "ETag": '"3-1705314600000"',
        "Cache-Control": "private, no-cache",
    }
    assert answer(1).headers["Retry-After"] == "2"


@pytest.mark.parametrize(
    "absence", [NEVER_THERE, GONE, Absence("forbidden"), Absence("expired", "2024-01-15T10:30:00.000Z")]
)
async def test_an_absence_is_told_whatever_is_held(cache: StatusCache, admin: Redis, absence: Absence) -> None:
    await filled(cache, absence)
    assert await cache.read(JOB, 0) == Newer(absence)
    assert await cache.read(JOB, 9) == Newer(absence)
    assert 0 < await admin.pttl(KEY) <= 1_000


async def test_entries_live_a_day(cache: StatusCache, admin: Redis) -> None:
    await filled(cache, answer(1))
    assert 86_390_000 < await admin.pttl(KEY) <= 86_400_000
    await admin.pexpire(KEY, 5_000)
    await cache.put([changed(2)])
    assert 86_390_000 < await admin.pttl(KEY)


async def test_all_reads_of_a_turn_are_one_call(cache: StatusCache, admin: Redis) -> None:
    await filled(cache, answer(5))
    await admin.config_resetstat()
    others = [(ACCOUNT, f"other-{n}") for n in range(199)]
    readings = await asyncio.gather(cache.read(JOB, 0), *(cache.read(other, 0) for other in others))
    assert readings[0] == Newer(answer(5))
    assert all(isinstance(reading, Miss) and reading.lease for reading in readings[1:])
    assert await calls_of(admin, "evalsha") == 1


async def test_a_very_large_turn_lets_others_in_between(cache: StatusCache, admin: Redis) -> None:
    await admin.config_resetstat()
    readings = await asyncio.gather(*(cache.read((ACCOUNT, f"job-{n}"), 0) for n in range(2_500)))
    assert len({reading.lease for reading in readings if isinstance(reading, Miss)}) == 1
    assert await calls_of(admin, "evalsha") == 3


async def test_one_job_twice_in_a_turn_is_asked_once_for_the_lower_version(cache: StatusCache) -> None:
    await filled(cache, answer(5))
    readings = await asyncio.gather(*(cache.read(JOB, held) for held in (5, 3, 4)))
    assert readings == [Newer(answer(5))] * 3
    missing = (ACCOUNT, "missing")
    first, second = await asyncio.gather(cache.read(missing, 0), cache.read(missing, 0))
    assert first is second


async def test_a_cancelled_reader_cancels_nobody(cache: StatusCache) -> None:
    await filled(cache, answer(5))
    readers = [asyncio.ensure_future(cache.read(JOB, held)) for held in (0, 4, 5)]
    readers[0].cancel()
    await asyncio.sleep(0)
    readers[2].cancel()
    assert await asyncio.wait_for(readers[1], SOON_s) == Newer(answer(5))


async def test_an_error_reply_is_redis_away_for_the_whole_turn(cache: StatusCache, admin: Redis) -> None:
    await admin.lpush(KEY, "not a string")
    readings = await asyncio.gather(cache.read(JOB, 0), cache.read((ACCOUNT, "other"), 0), return_exceptions=True)
    assert [type(reading) for reading in readings] == [RedisAway, RedisAway]
    assert cache.redis_errors == 1


async def test_a_lost_connection_is_redis_away_for_the_whole_turn(cache: StatusCache, frozen: Frozen) -> None:
    with frozen():
        readings = await asyncio.gather(*(cache.read((ACCOUNT, str(n)), 0) for n in range(3)), return_exceptions=True)
        assert [type(reading) for reading in readings] == [RedisAway] * 3
        with pytest.raises(RedisAway):
            await cache.read(JOB, 0)


async def test_a_fault_of_ours_in_asking_leaves_nobody_waiting(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("a fault of ours")

    monkeypatch.setattr(process.polls, "call", fail)
    readings = [process.cache.read((ACCOUNT, str(n)), 0) for n in range(1_200)]
    async with asyncio.timeout(SOON_s):
        ends = await asyncio.gather(*readings, return_exceptions=True)
    assert {type(end) for end in ends} == {RedisAway}


async def test_an_id_that_cannot_be_a_key_harms_nobody_else(cache: StatusCache) -> None:
    other = cache.read(JOB, 0)
    with pytest.raises(UnicodeEncodeError):
        await cache.read((ACCOUNT, "\ud800"), 0)
    assert isinstance(await other, Miss)


async def test_an_unreadable_entry_is_a_miss(cache: StatusCache, admin: Redis) -> None:
    await filled(cache, answer(1))
    await admin.append(KEY, "\nhalf a\nthird")
    assert await cache.read(JOB, 0) is MISS_OF_ANOTHER


# --- rule 1: announce when newer or equal, store when newer ----------------------------------------------------------


async def test_newer_is_stored_and_announced(cache: StatusCache, ears: PubSub) -> None:
    await filled(cache, answer(1))
    assert await cache.put([changed(2)])
    assert await cache.read(JOB, 1) == Newer(answer(2))
    assert await heard(ears) == [b"version 2"] * len(TOPICS)


async def test_equal_is_announced(cache: StatusCache, ears: PubSub) -> None:
    """A reader's fill that lands before the put must not swallow the announcement."""
    await filled(cache, answer(2))
    assert await cache.put([changed(2)])
    assert await heard(ears) == [b"version 2"] * len(TOPICS)


async def test_older_changes_nothing_and_is_not_announced(cache: StatusCache, ears: PubSub) -> None:
    await filled(cache, answer(3))
    assert await cache.put([changed(2)])
    assert await cache.read(JOB, 0) == Newer(answer(3))
    assert await heard(ears) == []


# --- rule 2: an entry of another life is a miss ----------------------------------------------------------------------


async def test_another_life_is_a_miss(start_process: StartProcess, cache: StatusCache) -> None:
    restored = (await start_process(postgres_identity="postgres:2")).cache
    await filled(cache, answer(9))
    token = await lease_of(restored)
    await restored.fill([(*JOB, answer(4))], token)
    assert await restored.read(JOB, 0) == Newer(answer(4)), "although version 9 of another life was there"
    assert isinstance(await cache.read(JOB, 0), Miss)


async def test_another_shape_of_answers_is_another_life(
    start_process: StartProcess, cache: StatusCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(cache, answer(9))
    monkeypatch.setattr(status_cache, "ANSWER_SHAPE", ANSWER_SHAPE + 1)
    upgraded = (await start_process()).cache
    assert isinstance(await upgraded.read(JOB, 0), Miss)


async def test_a_put_clears_an_entry_of_another_life(
    start_process: StartProcess, cache: StatusCache, admin: Redis, ears: PubSub
) -> None:
    restored = (await start_process(postgres_identity="postgres:2")).cache
    await filled(cache, answer(9))
    assert await restored.put([changed(4)])
    assert await entry(admin) is None
    assert await heard(ears) == [b"version 4"] * len(TOPICS)


async def test_redis_restarted_on_old_data_is_another_life(start_process: StartProcess, tmp_path: Path) -> None:
    def start(port: int | None = None) -> Server:
        return start_redis(tmp_path, durable=True, port=port)

    server = await asyncio.to_thread(start)
    try:
        process = await start_process(server.url)
        cache, lives = process.cache, 0

        def count() -> None:
            nonlocal lives
            lives += 1

        cache.on_new_life.append(count)
        reconnected = asyncio.Event()
        cache.on_connect.append(lambda generation: reconnected.set())
        await filled(cache, answer(5))
        async with Redis.from_url(server.url) as owner:
            await owner.save()
        await asyncio.to_thread(server.stop)
        server = await asyncio.to_thread(start, int(server.url.rpartition(":")[2].partition("/")[0]))
        await asyncio.wait_for(reconnected.wait(), SOON_s)
        assert lives == 1
        async with Redis.from_url(server.url) as owner:
            assert await entry(owner) == answer(5), "the old data is there"
        assert isinstance(await cache.read(JOB, 0), Miss)
    finally:
        await process.close()
        await asyncio.to_thread(server.stop)


async def test_a_new_life_is_told_once(cache: StatusCache) -> None:
    lives: list[str] = []
    cache.on_new_life.append(lambda: lives.append(cache.life))
    before = cache.life
    cache.postgres_identity = "postgres:1"
    assert lives == []
    cache.postgres_identity = "postgres:2"
    assert lives == [cache.life]
    assert len(cache.life) == 8
    assert cache.life != before


async def test_what_was_asked_in_another_life_is_not_answered(cache: StatusCache) -> None:
    await filled(cache, answer(9))
    reading = cache.read(JOB, 0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not reading.done()
    cache.postgres_identity = "postgres:2"
    with pytest.raises(RedisAway):
        await reading


async def test_a_fill_belongs_to_the_life_of_its_lease(cache: StatusCache) -> None:
    token = await lease_of(cache)
    cache.postgres_identity = "postgres:2"
    await cache.fill([(*JOB, answer(9))], token)
    assert isinstance(await cache.read(JOB, 0), Miss)


async def test_without_a_known_postgres_nothing_is_read_or_put(start_process: StartProcess) -> None:
    cache = (await start_process(postgres_identity="")).cache
    assert cache.life == ""
    with pytest.raises(RedisAway):
        await cache.read(JOB, 0)
    assert not await cache.put([changed(1)])
    cache.postgres_identity = "postgres:1"
    reading = cache.read(JOB, 0)
    cache.postgres_identity = ""
    with pytest.raises(RedisAway):
        await reading
    assert cache.redis_errors == 0, "none of it was sent"


# --- rule 3: a miss leaves a lease, a fill needs it --------------------------------------------------------------------


async def test_one_reader_gets_the_lease(start_process: StartProcess, cache: StatusCache, admin: Redis) -> None:
    other = (await start_process()).cache
    token = await lease_of(cache)
    assert 0 < await admin.pttl(KEY) <= 5_000
    assert await other.read(JOB, 0) is MISS_OF_ANOTHER
    assert await cache.read(JOB, 0) is MISS_OF_ANOTHER
    await cache.fill([(*JOB, answer(1))], token)
    assert await other.read(JOB, 0) == Newer(answer(1))


async def test_each_lease_is_another(cache: StatusCache, admin: Redis) -> None:
    first = await lease_of(cache)
    await admin.delete(KEY)
    second = await lease_of(cache)
    assert first != second
    await cache.fill([(*JOB, answer(1))], first)
    assert await entry(admin) == "lease"


async def test_a_fill_without_its_lease_is_not_stored(cache: StatusCache, admin: Redis) -> None:
    token = await lease_of(cache)
    await cache.fill([(*JOB, answer(1))], token[:-1])
    await cache.fill([(*JOB, answer(1))], token + "0")
    assert await entry(admin) == "lease"
    await admin.delete(KEY)
    await cache.fill([(*JOB, answer(1))], token)
    assert await entry(admin) is None


async def test_a_fill_from_before_a_put_is_not_stored(cache: StatusCache, admin: Redis) -> None:
    token = await lease_of(cache)
    assert await cache.put([changed(2)])
    await cache.fill([(*JOB, answer(1))], token)
    assert await entry(admin) is None


async def test_a_fill_from_before_a_deletion_is_not_stored(cache: StatusCache, admin: Redis) -> None:
    token = await lease_of(cache)
    assert await cache.put([deleted(2)])
    await cache.fill([(*JOB, answer(1))], token)
    assert await entry(admin) is None


async def test_a_fill_replaces_no_entry(cache: StatusCache, admin: Redis) -> None:
    token = await lease_of(cache)
    await cache.fill([(*JOB, answer(2))], token)
    await cache.fill([(*JOB, answer(1))], token)
    assert await entry(admin) == answer(2)


async def test_a_fill_announces_nothing(cache: StatusCache, ears: PubSub) -> None:
    await filled(cache, answer(1))
    assert await heard(ears) == []


async def test_many_fills_at_once(cache: StatusCache) -> None:
    jobs = [(ACCOUNT, f"job-{n}") for n in range(250)]
    readings = await asyncio.gather(*(cache.read(job, 0) for job in jobs))
    [token] = {reading.lease for reading in readings if isinstance(reading, Miss)}
    assert token is not None
    ready: list[Ready] = [answer(n + 1) if n % 2 else NEVER_THERE for n in range(250)]
    await cache.fill([(*job, one) for job, one in zip(jobs, ready, strict=True)], token)
    assert await asyncio.gather(*(cache.read(job, 0) for job in jobs)) == [Newer(one) for one in ready]


# --- rule 4: a writer plants nothing ------------------------------------------------------------------------------------


async def test_a_put_plants_nothing_and_announces(cache: StatusCache, admin: Redis, ears: PubSub) -> None:
    assert await cache.put([changed(2)])
    assert await entry(admin) is None
    await lease_of(cache)
    assert await cache.put([changed(3)])
    assert await entry(admin) is None, "the lease is void"
    assert await heard(ears) == [b"version 2"] * len(TOPICS) + [b"version 3"] * len(TOPICS)


async def test_a_deletion_leaves_nothing_and_announces(cache: StatusCache, admin: Redis, ears: PubSub) -> None:
    await filled(cache, answer(9))
    assert await cache.put([deleted(3)])
    assert await entry(admin) is None
    assert await heard(ears) == [b"deleted 3"] * len(TOPICS)


async def test_a_late_put_does_not_bring_a_deleted_job_back(cache: StatusCache, admin: Redis) -> None:
    """The put of version 2 was on its way when version 3, the deletion, was told and read by someone."""
    assert await cache.put([deleted(3)])
    await filled(cache, GONE)
    assert await cache.put([changed(2)])
    assert await entry(admin) is None


async def test_a_creation_clears_the_absence(cache: StatusCache, admin: Redis, ears: PubSub) -> None:
    await filled(cache, NEVER_THERE)
    assert await cache.put([changed(1)])
    assert await entry(admin) is None
    assert await heard(ears) == [b"version 1"] * len(TOPICS)


async def test_many_changes_at_once(cache: StatusCache, admin: Redis, ears: PubSub) -> None:
    jobs = [(ACCOUNT, f"job-{n}") for n in range(250)]
    leases = await asyncio.gather(*(cache.read(job, 0) for job in jobs))
    assert isinstance(leases[0], Miss)
    assert leases[0].lease
    await cache.fill([(*job, answer(1)) for job in jobs], leases[0].lease)
    await admin.config_resetstat()
    topics = [TOPICS[: n % 3] for n in range(250)]
    assert await cache.put([changed(n + 2, job[1], topics[n]) for n, job in enumerate(jobs)])
    assert await calls_of(admin, "evalsha") == 3
    assert await asyncio.gather(*(cache.read(job, 0) for job in jobs)) == [Newer(answer(n + 2)) for n in range(250)]
    told = [b"version %d" % (n + 2) for n in range(250) for _ in topics[n]]
    assert sorted(await heard(ears)) == sorted(told)
    assert await cache.put([])


# --- rule 5: what cannot be stored is unlinked ----------------------------------------------------------------------------


@pytest.fixture
async def no_memory(admin: Redis, process: Process) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """From the call on Redis refuses everything that needs memory."""

    async def fill_up() -> None:
        await admin.config_set("maxmemory", 1)

    yield fill_up
    await admin.config_set("maxmemory", 0)


async def test_out_of_memory(
    cache: StatusCache, admin: Redis, ears: PubSub, no_memory: Callable[[], Awaitable[None]]
) -> None:
    await filled(cache, answer(1))
    await no_memory()
    assert await cache.read(JOB, 1) is NOTHING_NEWER
    assert await cache.put([changed(2)])
    assert await entry(admin) is None, "version 1 must not be read any more"
    assert await heard(ears) == [b"version 2"] * len(TOPICS)
    assert await cache.read(JOB, 0) is MISS_OF_ANOTHER, "a lease finds no room either"
    assert cache.redis_errors == 0


async def test_a_fill_without_memory_removes_its_lease(
    cache: StatusCache, admin: Redis, no_memory: Callable[[], Awaitable[None]]
) -> None:
    token = await lease_of(cache)
    await no_memory()
    await cache.fill([(*JOB, answer(1))], token)
    assert await entry(admin) is None


# --- rule 6: after an outage nothing is trusted until the owner says so ---------------------------------------------------


async def test_the_gate_is_closed_until_it_is_opened_for_this_connection(
    process: Process, admin: Redis, redis_server: Server
) -> None:
    cache = process.cache
    await filled(cache, answer(1))
    cache.on_connect.remove(cache.trust)
    reconnected = asyncio.Event()
    cache.on_connect.append(lambda generation: reconnected.set())
    before = cache.generation
    for client in await admin.client_list():
        if client["name"] == "jobwire":
            await admin.client_kill_filter(_id=client["id"])
    await asyncio.wait_for(reconnected.wait(), SOON_s)
    assert cache.generation == before + 1
    cache.trust(before)
    assert not cache.trusted
    with pytest.raises(RedisAway):
        await cache.read(JOB, 0)
    async with asyncio.timeout(SOON_s):
        while not await cache.put([changed(2)]):  # the puts pipe comes back by itself, and needs no trust
            await asyncio.sleep(0.01)
    cache.trust(cache.generation)
    assert await cache.read(JOB, 0) == Newer(answer(2))


async def test_the_gate_can_be_shut_and_opens_for_the_new_generation_only(cache: StatusCache) -> None:
    await filled(cache, answer(1))
    cache.on_connect.remove(cache.trust)
    generations: list[int] = []
    cache.on_connect.append(generations.append)
    before = cache.generation
    cache.distrust()
    cache.distrust()
    assert generations == [before + 1], "it was shut already"
    cache.trust(before)
    with pytest.raises(RedisAway):
        await cache.read(JOB, 0)
    cache.trust(before + 1)
    assert await cache.read(JOB, 0) == Newer(answer(1))


async def test_the_gate_does_not_open_while_redis_is_away(process: Process, frozen: Frozen) -> None:
    cache = process.cache
    went_down = asyncio.Event()
    process.polls.on_down.append(went_down.set)
    with frozen():
        await asyncio.wait_for(went_down.wait(), SOON_s)
        cache.trust(cache.generation)
        assert not cache.trusted


async def test_the_policy_is_learned_at_connect(cache: StatusCache) -> None:
    assert cache.policy == "noeviction"


async def test_a_put_survives_a_short_outage(cache: StatusCache, admin: Redis, frozen: Frozen) -> None:
    await filled(cache, answer(1))
    with frozen():
        put = asyncio.create_task(cache.put([changed(2)]))
        await asyncio.sleep(PUT_TRIES_FOR_s / 2)  # longer than a deadline, shorter than the tries
        assert not put.done()
    assert await put
    assert await entry(admin) == answer(2)


async def test_a_put_gives_up(cache: StatusCache, frozen: Frozen) -> None:
    clock = asyncio.get_running_loop().time
    with frozen():
        began_at = clock()
        assert not await cache.put([changed(n) for n in range(1, 250)])
        assert PUT_TRIES_FOR_s * 0.9 <= clock() - began_at < PUT_TRIES_FOR_s + 0.2
        began_at = clock()
        assert not await cache.put([changed(2)])
        assert clock() - began_at < 0.05, "Redis is known to be away"
        await cache.fill([(*JOB, answer(1))], "a lease")
        await cache.verify([(*JOB, answer(1))])


async def test_a_put_that_redis_refuses_is_not_told(cache: StatusCache, admin: Redis) -> None:
    await admin.lpush(KEY, "not a string")
    assert not await cache.put([changed(2)])
    assert cache.redis_errors == 1


# --- the belt: entries that Postgres was not asked about for long -----------------------------------------------------------


async def test_unverified_is_said_with_what_is_newer(cache: StatusCache, admin: Redis) -> None:
    await filled(cache, answer(5))
    await make_unverified(admin)
    assert await cache.read(JOB, 5) is UNVERIFIED_AS_HELD
    assert await cache.read(JOB, 6) is UNVERIFIED_AS_HELD
    assert await cache.read(JOB, 4) == Unverified(answer(5))


@pytest.mark.parametrize("version", [5, 6])
async def test_verifying_refreshes_without_announcing(
    cache: StatusCache, admin: Redis, ears: PubSub, version: int
) -> None:
    await filled(cache, answer(5))
    await make_unverified(admin)
    await cache.verify([(*JOB, answer(version))])
    assert await cache.read(JOB, version) is NOTHING_NEWER
    assert await entry(admin) == answer(version)
    assert await heard(ears) == []


async def test_verifying_an_absence_unlinks(cache: StatusCache, admin: Redis, ears: PubSub) -> None:
    await filled(cache, answer(5))
    await make_unverified(admin)
    await cache.verify([(*JOB, GONE)])
    assert await entry(admin) is None
    assert await heard(ears) == []


async def test_verifying_neither_plants_nor_goes_back(cache: StatusCache, admin: Redis) -> None:
    await cache.verify([(*JOB, answer(5))])
    assert await entry(admin) is None
    await filled(cache, answer(6))
    await cache.verify([(*JOB, answer(5))])
    assert await entry(admin) == answer(6)


@pytest.mark.parametrize("version", [5, 6])
async def test_a_put_verifies(cache: StatusCache, admin: Redis, version: int) -> None:
    await filled(cache, answer(5))
    await make_unverified(admin)
    await cache.put([changed(version)])
    assert await cache.read(JOB, version) is NOTHING_NEWER


# --- all rules together -----------------------------------------------------------------------------------------------------


class World:
    """One job: Postgres as a list of states (version n is the n-th), and those who carry them to Redis, step by step.

    An absence carries in `expired_at` the version of Postgres that it was read from.
    """

    def __init__(self, processes: tuple[Process, Process], job_id: str) -> None:
        one, other = processes
        self.job = (ACCOUNT, job_id)
        self.states: list[Ready] = [Absence("not_found", "0")]
        self.told = 0
        self.actors = {
            "creator": self.writer(one.cache),
            "changer": self.writer(other.cache),
            "deleter": self.writer(one.cache, deletes=True),
            "reader": self.reader(one.cache),
            "reader beside it": self.reader(one.cache),
            "doubter": self.doubter(other.cache),
            "evictor": self.evictor(one.puts),
        }

    async def writer(self, cache: StatusCache, *, deletes: bool = False) -> AsyncIterator[None]:
        """Commits; puts; and the put, believed lost, arrives once more."""
        if isinstance(self.states[-1], Absence) and (deletes or len(self.states) > 1):
            return
        version = len(self.states)
        self.states.append(Absence("deleted", str(version)) if deletes else answer(version))
        yield
        change = (deleted if deletes else changed)(version, self.job[1])
        assert await cache.put([change])
        self.told = max(self.told, version)
        yield
        assert await cache.put([change])

    async def reader(self, cache: StatusCache) -> AsyncIterator[None]:
        reading = await cache.read(self.job, 0)
        yield
        ready = self.states[-1]
        yield
        if isinstance(reading, Miss) and reading.lease is not None:
            await cache.fill([(*self.job, ready)], reading.lease)

    async def doubter(self, cache: StatusCache) -> AsyncIterator[None]:
        ready = self.states[-1]
        yield
        await cache.verify([(*self.job, ready)])

    async def evictor(self, pipe: RedisPipe) -> AsyncIterator[None]:
        await pipe.command("DEL", status_key(*self.job))
        yield

    async def shown(self, admin: Redis) -> int | None:
        """The version of Postgres that a poll would be shown; None: it would be sent to Postgres."""
        match await entry(admin, status_key(*self.job)):
            case ReadyAnswer() as there:
                return there.version
            case Absence() as there:
                return int(there.expired_at or 0)
            case _:
                return None


WRITERS, READERS = ("creator", "changer", "deleter"), ("reader", "reader beside it")
ORDERS = st.permutations([*WRITERS * 3, *READERS * 3, *["doubter"] * 2, "evictor"])
numbers = itertools.count()


@given(order=ORDERS)
@settings(max_examples=1_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_entry_is_older_than_what_was_told(
    two_processes: tuple[Process, Process], admin: Redis, order: list[str]
) -> None:
    world = World(two_processes, f"world-{next(numbers)}")
    for actor in order:
        await anext(world.actors[actor], None)
        version = await world.shown(admin)
        assert version is None or version >= world.told, f"{version} after {world.told} was told"


async def test_no_poll_is_older_than_what_was_acknowledged(
    two_processes: tuple[Process, Process], admin: Redis
) -> None:
    """Two processes, one with a memory, eight jobs, writers and readers at once, and Redis forgets all the time."""
    caches = [process.cache for process in two_processes]
    memory: dict[str, int] = {}
    jobs = [f"busy-{n}" for n in range(8)]
    truth, acknowledged = dict.fromkeys(jobs, 1), dict.fromkeys(jobs, 1)
    chance = Random(1)
    polls = 0

    async def write(job_id: str, which: int) -> None:
        for _ in range(60):
            truth[job_id] = version = truth[job_id] + 1
            assert await caches[which].put([changed(version, job_id, ())])
            acknowledged[job_id] = max(acknowledged[job_id], version)

    async def poll(job_id: str, which: int) -> int:
        held = memory.get(job_id, 0) if which == 0 else 0
        match await caches[which].read((ACCOUNT, job_id), held):
            case Newer(ReadyAnswer() as ready):
                found = ready.version
            case Miss(lease):
                found = truth[job_id]
                if lease is not None:
                    await asyncio.sleep(chance.random() / 500)  # Postgres's answer grows old on its way
                    await caches[which].fill([(ACCOUNT, job_id, answer(found))], lease)
            case _:
                return held
        memory[job_id] = max(found, memory.get(job_id, 0))
        return memory[job_id] if which == 0 else found

    async def read(job_id: str, which: int) -> None:
        nonlocal polls
        while any(not writer.done() for writer in writers):
            least = acknowledged[job_id]
            assert await poll(job_id, which) >= least
            polls += 1

    async def evict() -> None:
        while any(not writer.done() for writer in writers):
            await admin.delete(*(status_key(ACCOUNT, job_id) for job_id in chance.sample(jobs, 2)))

    async with asyncio.timeout(20), asyncio.TaskGroup() as everyone:
        writers = [everyone.create_task(write(job_id, which)) for job_id in jobs for which in (0, 1)]
        for job_id in jobs:
            for which in (0, 1, 0, 1):
                everyone.create_task(read(job_id, which))
        everyone.create_task(evict())
    assert polls > 500
