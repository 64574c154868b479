"""How many reports a second one connection commits: `report_jobs` with 1, 16 and 128 reports in each call.

    .venv/bin/python -m bench.group_commit [--seconds 1] [--jobs 100000] [--explain]

An embedded Postgres of its own, once without and once with fsync; a table of 10^5 jobs, a quarter of them in batches.
`progress`: a percentage, which grows, and a message.
`status`: PROCESSING and queued in turn, so history and batches move too.
Through JobTable, so the arrays in and the rows out are paid for. --explain prints the plan of the statement inside.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg

from service.embedded import start_postgres
from service.job import PROCESSING, QUEUED, Report
from service.stores.connections import Postgres
from service.stores.job_table import JobTable
from service.stores.migrate import migrate
from tests.plans import prepare_inner

GROUPS = (1, 16, 128)
ROUNDS = 5
LOAD = """
alter table jobs disable trigger user;
insert into jobs (account_id, id, type, status, progress, batch_id,
                  created_at, changed_at, updated_at, heartbeat_at, started_at,
                  attempt_started_at, pace_start, pace_reached, pace_reached_at, pace_point_s)
select 1 + n %% 10, md5(n::text), 'extraction', 'PROCESSING', '{"percentage": 1, "step": "ocr"}',
       case when n %% 4 = 0 then 'batch-' || n %% 400 end, now(), now(), now(), now(), now(),
       now(), 0, 1, now(), 1
from generate_series(1, %d) n;
alter table jobs enable trigger user;
insert into batches (account_id, id, total, processing)
select account_id, batch_id, count(*), count(*) from jobs where batch_id is not null group by 1, 2;
"""
Workload = Callable[[int, str, int], Report]


def progress(account: int, job_id: str, turn: int) -> Report:
    return Report(account, job_id, progress={"percentage": (turn + 2) % 101, "message": f"page {turn}"})


def status(account: int, job_id: str, turn: int) -> Report:
    return Report(account, job_id, status=(QUEUED, PROCESSING)[turn % 2])


async def measure(url: str, jobs: int, seconds: float, explain: bool) -> list[tuple[str, int, float, float, float]]:
    """(workload, reports in a call, reports/s, ms per call, reports/s of the best round); medians of ROUNDS."""
    await migrate(url)
    keys = await load(url, jobs)
    postgres = Postgres(url, pool_size=1, prepared_statements=True, timeout_s=60)
    await postgres.open()
    table = JobTable(postgres)
    measured = []
    for workload, size in itertools.product((progress, status), GROUPS):
        groups = endless_groups(keys, size, workload)
        rates = [await one_round(table, groups, seconds) for _ in range(ROUNDS)]
        calls_per_s = statistics.median(rates)
        measured.append((workload.__name__, size, calls_per_s * size, 1000 / calls_per_s, max(rates) * size))
    await postgres.close()
    if explain:
        await print_plan(url, keys)
    return measured


async def load(url: str, jobs: int) -> list[tuple[int, str]]:
    connection = await asyncpg.connect(url)
    await connection.execute("insert into accounts (name) select 'account-' || n from generate_series(1, 10) n")
    await connection.execute(LOAD % jobs)
    await connection.execute("vacuum analyze")
    keys = [(row["account_id"], row["id"]) for row in await connection.fetch("select account_id, id from jobs")]
    await connection.close()
    random.Random(1).shuffle(keys)
    return keys


def endless_groups(keys: list[tuple[int, str]], size: int, workload: Workload) -> Iterator[list[Report]]:
    for turn in itertools.count():
        for start in range(0, len(keys) - size + 1, size):
            yield [workload(account, job_id, turn) for account, job_id in keys[start : start + size]]


async def one_round(table: JobTable, groups: Iterator[list[Report]], seconds: float) -> float:
    """Calls a second."""
    began, calls = time.perf_counter(), 0
    while (now := time.perf_counter()) < began + seconds:
        verdicts = await table.report(next(groups))
        assert all(verdict.taken for verdict in verdicts)
        calls += 1
    return calls / (now - began)


async def print_plan(url: str, keys: list[tuple[int, str]]) -> None:
    connection = await asyncpg.connect(url)
    inner = await prepare_inner(connection, "report_jobs")
    group = keys[: GROUPS[-1]]
    given = [
        [account for account, _ in group],
        [job_id for _, job_id in group],
        [None] * len(group),
        [json.dumps({"percentage": 50, "message": "explained"})] * len(group),
    ]
    values = [
        f"array[{', '.join(map(literal, column))}]::{kind}" for column, kind in zip(given, inner.types, strict=False)
    ]
    values += [
        f"array_fill(null::{kind.removesuffix('[]')}, array[{len(group)}])" for kind in inner.types[len(given) :]
    ]
    transaction = connection.transaction()
    await transaction.start()
    for _ in range(2):  # the first reads what is not in memory yet
        rows = await connection.fetch(f"explain (analyze, buffers) {inner.execute(values)}")
    print(f"\nEXPLAIN (ANALYZE, BUFFERS) of the statement inside report_jobs, {len(group)} reports:")
    print(*(row[0] for row in rows), sep="\n")
    await transaction.rollback()
    await connection.close()


def literal(value: object) -> str:
    if value is None:
        return "null"
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each of the five rounds")
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs in the table")
    parser.add_argument("--explain", action="store_true", help="print the plan, with fsync off")
    asked = parser.parse_args()
    print(f"{'fsync':<6} {'workload':<9} {'reports/call':>12} {'reports/s':>10} {'ms/call':>8} {'best':>10}")
    for durable in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            server = start_postgres(Path(folder), durable=durable)
            try:
                explain = asked.explain and not durable
                measured = asyncio.run(measure(server.url, asked.jobs, asked.seconds, explain))
            finally:
                server.stop()
        for workload, size, rate, ms, best in measured:
            print(
                f"{'on' if durable else 'off':<6} {workload:<9} {size:>12} {rate:>10,.0f} {ms:>8.2f} {best:>10,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
