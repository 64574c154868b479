"""Pages of 50 jobs over HTTP, of an account with 10^4 jobs beside one with 10^6, in one database and one run.

.venv/bin/python -m bench.lists
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import asyncpg

from service.embedded import start_postgres, start_redis
from service.identity import READ
from service.stores.connections import Postgres
from service.stores.key_table import KeyTable
from service.stores.migrate import migrate

SMALL, BIG = 10**4, 10**6
ROUNDS = 301

FILL = """
insert into jobs (account_id, id, type, status, batch_id, user_id, tags, pdf_name, created_at, changed_at, updated_at,
                  heartbeat_at, started_at, completed_at, expires_at, progress, error, error_details)
select a.id, gen_random_uuid(),
       (array['extraction', 'parsing', 'splitting', 'chunking', 'classification'])[1 + n % 5], s.status,
       'b' || n / 100, 'u' || n % (a.jobs / 100), array['all', 't' || n % 10, 'c' || n % (a.jobs / 100)], 'report.pdf',
       at, at, at, at, at, ended, ended,
       case when s.status = 'COMPLETED' then '{"percentage": 100}' else '{"percentage": 40, "step": "ocr"}' end::jsonb,
       case when s.status = 'FAILED' then 'broken' end,
       case when s.status = 'FAILED' then '{"error_type": "x", "message": "broken"}' end::jsonb
from (select id, case name when 'big' then $1::int else $2::int end as jobs from accounts) a,
  lateral generate_series(1, a.jobs) n,
  lateral (select now() - interval '7 days' * n / a.jobs as at) t,
  lateral (select case when n % 50 = 7 then 'FAILED' when n % 100 = 9 then 'PROCESSING' when n % 100 = 11 then 'queued'
                       else 'COMPLETED' end as status) s,
  lateral (select case when s.status in ('COMPLETED', 'FAILED') then at end as ended) e
order by at
"""

ASKED = {
    "all": {},
    "all, oldest first": {"order": "asc"},
    "status=failed (2 %)": {"status": "failed"},
    "status=queued,processing (2 %)": {"status": "queued,processing"},
    "operation=split (40 %)": {"operation": "split"},
    "user_id (100 jobs)": {"user_id": "u7"},
    "batch_id (100 jobs)": {"batch_id": "b50"},
    "tags, of all jobs": {"tags": "all"},
    "tags, of 10 %": {"tags": "t3"},
    "tags, of 100 jobs": {"tags": "c7"},
}


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        postgres = start_postgres(Path(folder) / "postgres", durable=False)
        redis = start_redis(Path(folder) / "redis", durable=False)
        try:
            keys = await fill(postgres.url)
            async with service(postgres.url, redis.url) as url:
                await compare(url, *keys)
        finally:
            redis.stop()
            postgres.stop()


async def fill(url: str) -> tuple[str, str]:
    """The keys of the small and of the big account."""
    await migrate(url)
    pool = Postgres(url, pool_size=1, prepared_statements=False, timeout_s=600)
    await pool.open()
    keys = [(await KeyTable(pool).create(name, [READ], {"list": "none"}, None))[1] for name in ("small", "big")]
    await pool.close()
    connection = await asyncpg.connect(url, command_timeout=600)
    await connection.execute("set session_replication_role = replica; set synchronous_commit = on")
    await connection.execute(FILL, BIG, SMALL)
    await connection.execute("vacuum analyze jobs")
    await connection.execute("checkpoint")
    await connection.close()
    return keys[0], keys[1]


@asynccontextmanager
async def service(postgres: str, redis: str) -> AsyncIterator[str]:
    environment = {"DATABASE_URL": postgres, "REDIS_URL": redis, "JOBWIRE_SECRETS": "x" * 32, "JOBWIRE_PORT": "0"}
    command = (sys.executable, "-m", "service", "web")
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, env={**os.environ, **environment})
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().split()[1]
    finally:
        process.terminate()
        await process.wait()


async def compare(url: str, small: str, big: str) -> None:
    print(f"{'ms, median of ' + str(ROUNDS):48}{'10^4':>8}{'10^6':>8}{'ratio':>8}")
    async with (
        aiohttp.ClientSession(url, headers={"X-API-Key": small}) as of_small,
        aiohttp.ClientSession(url, headers={"X-API-Key": big}) as of_big,
    ):
        for name, asked in ASKED.items():
            await row(f"{name}: first page, total", of_small, of_big, asked, asked)
            further = [await middle(session, asked) for session in (of_small, of_big)]
            if all(further):
                await row(f"{name}: page in the middle", of_small, of_big, *further)
        await row("all: offset 9,000", of_small, of_big, {"offset": "9000"}, {"offset": "9000"})


async def middle(session: aiohttp.ClientSession, asked: dict[str, str]) -> dict[str, str] | None:
    """A cursor from the middle of what there is (of what an offset reaches); None if all is on one page."""
    pagination = await page(session, asked)
    if not pagination["has_more"]:
        return None
    offset = min(10_000, pagination["total"]) // 2
    return asked | {"cursor": (await page(session, asked | {"offset": str(offset - 50)}))["next_cursor"]}


async def row(
    name: str,
    of_small: aiohttp.ClientSession,
    of_big: aiohttp.ClientSession,
    asked_small: dict[str, str],
    asked_big: dict[str, str],
) -> None:
    rounds = [(await timed(of_small, asked_small), await timed(of_big, asked_big)) for _ in range(ROUNDS)]
    small, big = (statistics.median(one[which] for one in rounds[ROUNDS // 10 :]) for which in (0, 1))
    print(f"{name:48}{small:>8.2f}{big:>8.2f}{big / small:>8.2f}", flush=True)


async def timed(session: aiohttp.ClientSession, asked: dict[str, str]) -> float:
    started = time.perf_counter()
    await page(session, asked)
    return (time.perf_counter() - started) * 1e3


async def page(session: aiohttp.ClientSession, asked: dict[str, str]) -> dict:
    async with session.get("/jobs", params=asked) as answer:
        assert answer.status == 200, await answer.text()
        return (await answer.json())["pagination"]


if __name__ == "__main__":
    asyncio.run(main())
