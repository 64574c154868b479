"""What tests wait for: each asks once, and `until` asks again."""

import time

import asyncpg
from redis.asyncio import Redis

from tests.speaker import Speaker
from tests.web_process import WebProcess

WAITS_FOR_A_ROW = "select exists (select from pg_locks where not granted and locktype in ('transactionid', 'tuple'))"


async def has_been(since: float, seconds: float) -> bool:
    return time.monotonic() - since >= seconds


async def are_ready(speaker: Speaker, webs) -> bool:
    """Also: all of them trust Redis."""
    return {(await speaker.ask(web, "GET", "/readyz")).status for web in webs} == {200}


async def shows(speaker: Speaker, web: WebProcess, job: str, least_version: int) -> bool:
    answer = await speaker.poll(web, job)
    return answer.status == 200 and answer.version >= least_version


async def is_taken(speaker: Speaker, web: WebProcess, job: str) -> bool:
    answer = await speaker.report(web, job, progress={"message": f"{time.monotonic()}"})
    assert answer.status in (200, 503), answer
    return answer.status == 200


async def is_told(speaker: Speaker, web: WebProcess, job: str = "j") -> bool:
    return (await speaker.say(web, job, f"{time.monotonic()}")).warning == ""


async def is_warned(speaker: Speaker, web: WebProcess, job: str) -> bool:
    return (await speaker.poll(web, job)).warning == "110"


async def are_without_warning(speaker: Speaker, webs, job: str) -> bool:
    return {(await speaker.poll(web, job)).warning for web in webs} == {""}


async def outbox_is_empty(postgres: asyncpg.Connection) -> bool:
    return not await postgres.fetchval("select count(*) from outbox")


async def nothing_waits_longer_than(postgres: asyncpg.Connection, seconds: float) -> bool:
    oldest = "select coalesce(extract(epoch from clock_timestamp() - min(at)), 0)::float8 from outbox"
    return await postgres.fetchval(oldest) <= seconds


async def row_is_at(postgres: asyncpg.Connection, version: int) -> bool:
    return await postgres.fetchval("select version from jobs where id = 'j'") == version


async def all_tiers_agree(speaker: Speaker, webs, redis_url: str, postgres: asyncpg.Connection, jobs) -> None:
    """Every process says what Postgres holds, and says it from entries in Redis."""
    versions = dict(await postgres.fetch("select id, version from jobs"))
    async with Redis.from_url(redis_url) as redis:
        for web in webs:
            for job in jobs:
                assert (await speaker.poll(web, job)).version == versions[job]
        before = await commands(redis)
        for web in webs:
            for job in jobs:
                assert (await speaker.poll(web, job)).version == versions[job]
        after = await commands(redis)
    assert after["getrange"] - before["getrange"] >= len(webs) * len(jobs), "each poll looked for an entry"
    assert after["set"] == before["set"], "and found it: nobody took a lease"


async def commands(redis: Redis) -> dict[str, int]:
    """How often Redis ran each command."""
    said = await redis.info("commandstats")
    return {name: said.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("getrange", "set")}
