"""A batch that is polled hard while its jobs change, at 10^4 and at 10^6 jobs; and many jobs in one call.

.venv/bin/python -m bench.batches

1000 polls a second, half of them conditional, go to one web process; 200 status reports a second to another one.
"""

import asyncio
import itertools
import os
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import asyncpg
import orjson

from service.embedded import Server, start_postgres, start_redis
from service.identity import READ, WRITE
from service.stores.connections import Postgres
from service.stores.key_table import KeyTable
from service.stores.migrate import migrate

SIZES = {"small": 10**4, "big": 10**6}
POLLS_PER_S, REPORTS_PER_S = 1000, 200
POLLERS = 64
WARM_UP_s, LASTING_s = 2, 8
STATISTICS_LAG_s = 2
CALLS = 300

FILL = """
insert into jobs (account_id, id, type, batch_id, progress, created_at, changed_at, updated_at, heartbeat_at)
select a.id, a.name || n, 'extraction', 'hot', '{"percentage": 40, "step": "ocr"}', at, at, at, at
from accounts a, lateral generate_series(1, case a.name when 'big' then $1::int else $2::int end) n,
  lateral (select now() - interval '1 day' + interval '10 ms' * n as at) t
"""
COUNT = """
insert into batches (account_id, id, total, queued)
select account_id, batch_id, count(*), count(*) from jobs group by 1, 2
"""
BODIES_READ = "select idx_scan from pg_stat_user_indexes where indexrelname = 'jobs_by_batch'"


@dataclass
class Web:
    """A process that serves."""

    url: str
    pid: int


@dataclass
class Polled:
    """What pollers saw; latencies count from when a poll was due."""

    polls: int
    unchanged: int
    median_ms: float
    p99_ms: float


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        postgres = start_postgres(Path(folder) / "postgres", durable=False)
        redis = start_redis(Path(folder) / "redis", durable=False)
        try:
            keys = await fill(postgres.url)
            async with web(postgres.url, redis.url) as polled, web(postgres.url, redis.url) as reported:
                columns = ("polls/s", "304", "median ms", "p99 ms", "web CPU", "Postgres", "bodies/s")
                print(f"{'':30}" + "".join(f"{column:>11}" for column in columns))
                for name in SIZES:
                    for reports_per_s in (0, REPORTS_PER_S):
                        await poll_row(name, reports_per_s, keys[name], polled, reported, postgres)
                print(f"\n{'':30}{'median ms':>11}{'CPU ms':>11}")
                for jobs in (200, 500):
                    await many_row(jobs, keys["small"], polled)
        finally:
            redis.stop()
            postgres.stop()


async def fill(url: str) -> dict[str, str]:
    """Keys by account. Each account is one batch."""
    await migrate(url)
    pool = Postgres(url, pool_size=1, prepared_statements=False, timeout_s=600)
    await pool.open()
    limits = {"bulk": "none", "write": "none"}
    keys = {name: (await KeyTable(pool).create(name, [READ, WRITE], limits, None))[1] for name in SIZES}
    await pool.close()
    connection = await asyncpg.connect(url, command_timeout=600)
    await connection.execute("set session_replication_role = replica")
    await connection.execute(FILL, SIZES["big"], SIZES["small"])
    await connection.execute(COUNT)
    await connection.execute("vacuum analyze jobs")
    await connection.execute("checkpoint")
    await connection.close()
    return keys


@asynccontextmanager
async def web(postgres: str, redis: str) -> AsyncIterator[Web]:
    environment = {"DATABASE_URL": postgres, "REDIS_URL": redis, "JOBWIRE_SECRETS": "x" * 32, "JOBWIRE_PORT": "0"}
    command = (sys.executable, "-m", "service", "web")
    process = await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, stderr=DEVNULL, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    try:
        yield Web((await process.stdout.readline()).decode().split()[1], process.pid)
    finally:
        process.terminate()
        await process.wait()


async def poll_row(name: str, reports_per_s: int, key: str, polled: Web, reported: Web, postgres: Server) -> None:
    reporting = asyncio.create_task(report(reported.url, key, name, reports_per_s))
    polling = asyncio.create_task(poll_elsewhere(polled.url, key))
    await asyncio.sleep(WARM_UP_s)
    read, web_cpu, postgres_cpu = await bodies_read(postgres.url), cpu_s(polled.pid), cpu_s_of_children(postgres.pid)
    started = time.monotonic()
    saw = await polling
    lasted = time.monotonic() - started
    web_cpu, postgres_cpu = cpu_s(polled.pid) - web_cpu, cpu_s_of_children(postgres.pid) - postgres_cpu
    reporting.cancel()
    with suppress(asyncio.CancelledError):
        await reporting
    await asyncio.sleep(STATISTICS_LAG_s)
    read = await bodies_read(postgres.url) - read
    print(
        f"10^{len(str(SIZES[name])) - 1} jobs, {reports_per_s:>3} reports/s".ljust(30)
        + f"{saw.polls / LASTING_s:>11.0f}{saw.unchanged / saw.polls:>11.0%}{saw.median_ms:>11.1f}{saw.p99_ms:>11.1f}"
        + f"{web_cpu / lasted:>11.0%}{postgres_cpu / lasted:>11.0%}{read / lasted:>11.1f}",
        flush=True,
    )


async def bodies_read(postgres: str) -> int:
    """How often the jobs of a batch were looked up; Postgres says so a second late."""
    connection = await asyncpg.connect(postgres)
    try:
        return int(await connection.fetchval(BODIES_READ))
    finally:
        await connection.close()


def cpu_s(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def cpu_s_of_children(pid: int) -> float:
    total = 0.0
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError):  # it has ended just now
            total += cpu_s(int(child))
    return total


async def report(url: str, key: str, name: str, per_s: int) -> None:
    """Job after job begins and is done."""
    if not per_s:
        return
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(url, headers={"X-API-Key": key}) as session, asyncio.TaskGroup() as under_way:

        async def work(job: str) -> None:
            for status in ("PROCESSING", "COMPLETED"):
                async with session.patch(f"/jobs/{job}", json={"status": status}) as answer:
                    assert answer.status == 200, await answer.text()

        started = loop.time()
        for job in itertools.count(1):
            await asyncio.sleep(max(0.0, started + 2 * job / per_s - loop.time()))
            under_way.create_task(work(f"{name}{job}"))


async def poll_elsewhere(url: str, key: str) -> Polled:
    """`poll` in a process of its own."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.batches", "poll", url, key, stdout=PIPE)
    out, _ = await process.communicate()
    return Polled(**orjson.loads(out))


async def poll(url: str, key: str) -> Polled:
    """POLLERS connections, each with its share of the rate; every other one asks for changes only."""
    took, unchanged = [], 0
    loop = asyncio.get_running_loop()

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal unchanged
        etag, due = None, loop.time() + number / POLLS_PER_S
        ends = due + WARM_UP_s + LASTING_s
        while due < ends:
            await asyncio.sleep(max(0.0, due - loop.time()))
            headers = {"If-None-Match": etag} if etag and number % 2 else {}
            async with session.get("/jobs/batch/hot", headers=headers) as answer:
                assert answer.status in (200, 304), await answer.text()
                etag = answer.headers["ETag"]
                await answer.read()
            if due > ends - LASTING_s:
                took.append(loop.time() - due)
                unchanged += answer.status == 304
            due += POLLERS / POLLS_PER_S

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, headers={"X-API-Key": key}, connector=connector) as session:
        await asyncio.gather(*(one(session, number) for number in range(POLLERS)))
    return Polled(len(took), unchanged, statistics.median(took) * 1e3, statistics.quantiles(took, n=100)[98] * 1e3)


async def many_row(jobs: int, key: str, asked: Web) -> None:
    """`POST /jobs/status`, one call after the other, of jobs that the process has in memory."""
    ids = [f"small{SIZES['small'] - n}" for n in range(jobs)]
    took = []
    async with aiohttp.ClientSession(asked.url, headers={"X-API-Key": key}) as session:
        for call in range(CALLS + 10):
            if call == 10:
                cpu = cpu_s(asked.pid)
            started = time.perf_counter()
            async with session.post("/jobs/status", json={"job_ids": ids}) as answer:
                assert len(orjson.loads(await answer.read())["jobs"]) == jobs
            took.append(time.perf_counter() - started)
    cpu_ms = (cpu_s(asked.pid) - cpu) / CALLS * 1e3
    print(f"{f'{jobs} jobs in one call':30}{statistics.median(took[10:]) * 1e3:>11.2f}{cpu_ms:>11.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["poll"]:
        print(orjson.dumps(vars(asyncio.run(poll(*sys.argv[2:])))).decode())
    else:
        asyncio.run(main())
