"""Several processes, one truth: what one acknowledged is the first thing that any other says."""

import asyncio
import random
import time

import asyncpg
import pytest
from redis.asyncio import Redis

from service.stores.keys import status_key
from tests.fault_proxy import FaultProxy
from tests.own_servers import connected
from tests.speaker import Speaker, speaking, until
from tests.web_process import WebProcess
from tests.witness import Witness

JOBS, ROUNDS = 10, 200


async def test_a_report_through_one_process_is_the_first_thing_read_through_another_that_held_the_old_answer(
    start_web, key
):
    one, other = await start_web(), await start_web()
    async with speaking(key) as speaker:
        await asyncio.gather(*(report_and_read(speaker, one, other, f"job-{n}") for n in range(JOBS)))


async def report_and_read(speaker: Speaker, one: WebProcess, other: WebProcess, job: str) -> None:
    await speaker.create(one, job)
    held = await speaker.poll(other, job)
    for number in range(ROUNDS):
        writer, reader = (one, other) if number % 5 else (other, one)  # at each change of roles, both hold it
        held = held if number % 5 > 1 else await speaker.poll(reader, job, shape_b=number % 2 == 0)
        said = await speaker.say(writer, job, f"step {number}")
        assert said.warning == ""
        seen = await speaker.poll(reader, job, etag=held.etag if number % 3 else None, shape_b=number % 2 == 0)
        assert (seen.status, seen.version, seen.warning) == (200, said.version, ""), (number, said, seen)
        assert seen.json["progress"]["message"] == f"step {number}"
        assert (await speaker.poll(reader, job, etag=seen.etag)).status == 304
        held = seen


async def test_of_200_concurrent_reports_on_one_job_each_is_a_version_and_the_last_version_is_the_row(
    start_web, key, database
):
    one, other = await start_web(), await start_web()
    async with speaking(key) as speaker:
        await speaker.create(one, "j")
        said = await asyncio.gather(*(speaker.say((one, other)[n % 2], "j", f"message {n}") for n in range(200)))
        polled = [await speaker.poll(web, "j") for web in (one, other)]
    assert sorted(answer.version for answer in said) == list(range(2, 202))
    assert sorted(answer.json["progress"]["message"] for answer in said) == sorted(f"message {n}" for n in range(200))
    last = max(said, key=lambda answer: answer.version).json
    row = await row_of(database, "j")
    assert (row["version"], row["message"]) == (201, last["progress"]["message"])
    assert [answer.json for answer in polled] == [last, last]


async def test_readers_are_never_behind_while_entries_vanish_and_are_filled_again(start_web, key, redis_url):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    webs = [await start_web(), await start_web()]
    jobs = [f"job-{n}" for n in range(4)]
    async with speaking(key) as speaker, Redis.from_url(redis_url) as redis:
        for job in jobs:
            await speaker.create(webs[0], job)
        witness = Witness(speaker)
        async with witness.watching(webs, jobs, rng):
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                await redis.flushdb()
                if rng.random() < 0.1:
                    await redis.script_flush()
                await asyncio.sleep(rng.uniform(0, 0.01))
    assert witness.seen["report 200"] > 100
    assert set(witness.seen) <= {"report 200", "poll 200", "poll 304"}


@pytest.mark.parametrize("shape_b", [False, True], ids=["shape A", "shape B"])
async def test_every_way_of_changing_a_job_is_seen_at_once_by_a_reader_that_had_looked_before(start_web, key, shape_b):
    one, other = await start_web(), await start_web()
    async with speaking(key) as speaker:

        async def tell(method: str, path: str, expected: int = 200, **request):
            answer = await speaker.ask(one, method, path, **request)
            assert (answer.status, answer.warning) == (expected, ""), answer

        async def life(job: str) -> None:
            async def sees(status: str | int) -> None:
                answer = await speaker.poll(other, job, shape_b=shape_b)
                seen = answer.json.get("status") if answer.status == 200 else answer.status
                assert str(seen).lower() == str(status).lower(), (job, status, answer)

            await sees(404)
            await tell("POST", "/jobs", 201, json={"id": job, "type": "extraction"})
            await sees("queued")
            await tell("PATCH", f"/jobs/{job}", json={"status": "PROCESSING"})
            await sees("PROCESSING")
            await tell("PATCH", "/jobs", json=[{"id": job, "status": "FAILED", "error": "no"}])
            await sees("FAILED")
            await tell("POST", f"/jobs/{job}/retry")
            await sees("queued")
            await tell("PUT", f"/jobs/{job}/result?complete=true", json={"a": 1})
            await sees("COMPLETED")
            assert (await speaker.ask(other, "GET", f"/jobs/{job}/result")).json == {"a": 1}
            await tell("DELETE", f"/jobs/{job}")
            await sees(404)
            await tell("POST", "/jobs", 201, json={"id": f"{job}-again", "type": "extraction"})
            await tell("POST", f"/jobs/{job}-again/cancel")

        await asyncio.gather(*(life(f"job-{n}") for n in range(40)))


async def test_a_creation_repeated_before_the_first_was_told_is_seen_by_a_reader_that_had_found_nothing(
    start_web, key, redis_url, sql
):
    async with FaultProxy(redis_url) as redis, speaking(key) as speaker:
        one, other = await start_web(REDIS_URL=redis.url), await start_web()
        await speaker.create(one, "before")  # so that each knows the key
        assert (await speaker.poll(other, "j")).status == 404
        redis.freeze()

        def create(web: WebProcess, **item):
            return speaker.ask(web, "POST", "/jobs", json={"type": "x", **item}, headers={"Idempotency-Key": "k"})

        first = asyncio.create_task(create(one, id="j"))
        await until(lambda: sql.fetchval("select exists (select from idempotency_keys)"), 2)
        repeated = await create(other, id="j")
        assert (repeated.status, repeated.warning) == (200, "")
        assert (await speaker.poll(other, "j")).status == 200
        redis.thaw()
        assert (await first).json == repeated.json


async def test_a_process_that_stood_still_says_nothing_old_when_it_goes_on(start_web, key):
    one, other = await start_web(), await start_web()
    async with speaking(key) as speaker:
        await speaker.create(one, "j")
        await speaker.poll(other, "j")
        for number in range(10):
            other.freeze()
            asked_while_frozen = asyncio.create_task(speaker.poll(other, "j"))
            said = await speaker.say(one, "j", f"step {number}")
            asked_after = asyncio.create_task(speaker.poll(other, "j"))
            other.thaw()
            assert (await asked_while_frozen).version >= said.version - 1
            assert (await asked_after).version == said.version
            assert (await speaker.poll(other, "j")).version == said.version


async def test_a_reader_does_not_join_a_read_that_looked_before_it_came(start_web, key, database, redis_url, sql):
    async with FaultProxy(database) as proxy, speaking(key) as speaker, Redis.from_url(redis_url) as redis:
        one, other = await start_web(), await start_web(DATABASE_URL=proxy.url)
        await speaker.create(one, "j")
        await speaker.poll(other, "j")
        for number in range(5):
            await redis.flushdb()
            before = await sql.fetchval("select clock_timestamp()")
            proxy.hold_answers()
            early = asyncio.create_task(speaker.poll(other, "j"))
            await until(lambda since=before: sql.fetchval(HAS_LOOKED, since), 2)
            said = await speaker.say(one, "j", f"step {number}")
            late = asyncio.create_task(speaker.poll(other, "j"))
            while not await redis.dbsize():  # its question is with Redis, or was
                pass
            proxy.thaw()
            assert (await late).version == said.version
            assert (await early).version in (said.version - 1, said.version)


async def test_an_old_entry_that_nobody_verified_is_compared_with_postgres(start_web, key, redis_url, sql):
    """Whatever brought it there: the belt."""
    one, other = await start_web(), await start_web()
    async with speaking(key) as speaker, Redis.from_url(redis_url) as redis:
        await speaker.create(one, "j")
        for web in (one, other):
            await speaker.poll(web, "j")
        entry = status_key(await sql.fetchval("select account_id from jobs"), "j")
        old = await redis.get(entry)
        said = await speaker.say(one, "j", "not in the old entry")
        long_ago = f"{1:013}".encode()
        await redis.set(entry, old[:23] + long_ago + old[36:])
        assert (await speaker.poll(other, "j")).version == said.version
        await until(lambda: holds(redis, entry, said.version), 2)


async def holds(redis: Redis, entry: bytes, version: int) -> bool:
    return int((await redis.get(entry))[8:23]) == version


HAS_LOOKED = """
select exists (select from pg_stat_activity
               where query like '%tombstones%' and query_start > $1 and state = 'idle' and pid <> pg_backend_pid())
"""


async def test_readers_and_reporters_that_hang_up_harm_nobody(start_web, key, database):
    web = await start_web()
    jobs = [f"job-{n}" for n in range(20)]
    async with speaking(key) as speaker, connected(database) as meddler:
        await asyncio.gather(*(speaker.create(web, job) for job in jobs))
        async with speaking(key) as leaving, meddler.transaction():
            await meddler.execute("lock table jobs in access exclusive mode")
            leavers = [asyncio.create_task(each) for each in saying_and_polling(leaving, web, jobs)]
            stayers = [asyncio.create_task(each) for each in saying_and_polling(speaker, web, jobs)]
            await until(lambda: meddler.fetchval(WAITING_FOR_THE_LOCK), 0.9)
            for leaver in leavers:
                leaver.cancel()
            await asyncio.gather(*leavers, return_exceptions=True)
        answers = await asyncio.gather(*stayers)
        assert {answer.status for answer in answers} == {200}
        assert answers[-1].json["progress"]["message"] == "hello"
        assert (await speaker.poll(web, jobs[-1])).version >= answers[-1].version


WAITING_FOR_THE_LOCK = "select count(*) >= 5 from pg_locks where not granted and relation = 'jobs'::regclass"


def saying_and_polling(speaker: Speaker, web: WebProcess, jobs: list[str]):
    return [speaker.poll(web, job) for job in jobs] + [speaker.say(web, job, "hello") for job in jobs]


async def row_of(database: str, job: str) -> asyncpg.Record:
    async with connected(database) as connection:
        return await connection.fetchrow("select version, progress->>'message' as message from jobs where id = $1", job)
