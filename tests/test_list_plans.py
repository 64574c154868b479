"""Pages and totals find their rows in an index: at 10^5 jobs of one account among three, wherever the page lies.

What sorts: several statuses or types (no more than a page of each), and tags that few jobs have (no more than those).
"""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from service.embedded import Server
from service.job import STATUSES
from service.stores.page_table import Filters, Position, Statement, page_statement, total_statement
from tests.conftest import with_database

Plan = dict[str, Any]
PAGE = 51
BIG, JOBS = 1, 100_000
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
STEP = timedelta(seconds=1)

# The newest fifth is a backlog of queued jobs: where COMPLETED, the most frequent status, has none.
GROW = f"""
set synchronous_commit = on;  -- or vacuum would not know yet that what was written is visible to all
alter table jobs set (autovacuum_enabled = off);
set session_replication_role = replica;
insert into jobs (account_id, id, type, status, batch_id, user_id, tags, created_at, changed_at, updated_at, heartbeat_at,
                  started_at, completed_at, expires_at, progress, error, error_details)
select a.account, a.account || '-' || n, (array['extraction', 'parsing', 'splitting', 'chunking', 'ocr'])[1 + n % 5], s.status,
       'b' || n / 100, 'u' || n % 1000,
       array['all', 't' || n % 10, 'c' || n % 997], at, at, at, at, at, s.ended, s.ended,
       case when s.status = 'COMPLETED' then '{{"percentage": 100}}' else '{{}}' end::jsonb,
       case when s.status in ('FAILED', 'CANCELLED') then 'broken' end, case when s.status in ('FAILED', 'CANCELLED') then '{{}}' end::jsonb
from (values ({BIG}, {JOBS}), (2, {JOBS} / 5), (3, {JOBS} / 5)) a (account, jobs),
  lateral generate_series(1, a.jobs) n,
  lateral (select timestamptz '{BEGIN.isoformat()}' + n * ({JOBS} / a.jobs) * interval '1 s' as at) t,
  lateral (select case when n > a.jobs * 0.8 then 'queued' when n % 49 = 7 then 'FAILED' when n % 101 = 9 then 'CANCELLED'
                       when n % 499 = 11 then 'PROCESSING' else 'COMPLETED' end as status) w,
  lateral (select w.status, case when w.status not in ('queued', 'PROCESSING') then at end as ended) s
order by n;
"""

ALL = Filters()
ASKED = {
    "everything": (ALL, {"jobs_newest"}, PAGE),
    "status": (Filters(("FAILED",)), {"jobs_by_status"}, PAGE),
    "the most frequent status": (Filters(("COMPLETED",)), {"jobs_by_status"}, PAGE),
    "type": (Filters(types=("parsing",)), {"jobs_by_type"}, PAGE),
    "batch": (Filters(batch_id="b400"), {"jobs_by_batch"}, 100),
    "user": (Filters(user_id="u7"), {"jobs_by_user"}, 100),
    "a frequent tag": (Filters(tags=("all",)), {"jobs_newest"}, PAGE),
    "a rare tag": (Filters(tags=("c5",)), {"jobs_by_tags"}, 200),
    "a rare and a frequent tag": (Filters(tags=("all", "c5")), {"jobs_by_tags"}, 200),
    "after": (Filters(created_after=BEGIN + JOBS / 4 * STEP), {"jobs_newest"}, PAGE),
    "before": (Filters(created_before=BEGIN + JOBS * 3 / 4 * STEP), {"jobs_newest"}, PAGE),
    "status and time": (
        Filters(("FAILED",), created_after=BEGIN + JOBS / 4 * STEP, created_before=BEGIN + JOBS * 3 / 4 * STEP),
        {"jobs_by_status"},
        PAGE,
    ),
    "statuses": (Filters(("COMPLETED", "FAILED", "queued")), {"jobs_by_status"}, 3 * PAGE),
    "split": (Filters(types=("splitting", "chunking")), {"jobs_by_type"}, 2 * PAGE),
    "status and user": (Filters(("FAILED",), user_id="u7"), {"jobs_by_user"}, 100),
    "statuses and batch": (Filters(("COMPLETED", "queued"), batch_id="b400"), {"jobs_by_batch"}, 202),
    "status and type": (Filters(("FAILED",), ("parsing",)), {"jobs_by_status", "jobs_by_type"}, 5 * PAGE),
}
"""Filters, the indexes that may serve them, and how many jobs a page of them may look at (and sort) at most."""

NEVER_SORTED = {name for name, (_, _, most) in ASKED.items() if most == PAGE}


@pytest.fixture(scope="module")
async def grown(postgres_server: Server, template: str) -> AsyncIterator[asyncpg.Connection]:
    async for connection in database_with_jobs(postgres_server, template, "lists_grown"):
        await connection.execute("vacuum analyze jobs")
        yield connection


@pytest.fixture(scope="module")
async def never_analysed(postgres_server: Server, template: str) -> AsyncIterator[asyncpg.Connection]:
    async for connection in database_with_jobs(postgres_server, template, "lists_never_analysed"):
        yield connection


async def database_with_jobs(server: Server, template: str, name: str) -> AsyncIterator[asyncpg.Connection]:
    admin = await asyncpg.connect(server.url)
    await admin.execute(f"create database {name} template {template} strategy file_copy")
    connection = await asyncpg.connect(with_database(server.url, name), timeout=120, command_timeout=120)
    try:
        await connection.execute(GROW)
        yield connection
    finally:
        await connection.close()
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()


def nodes(plan: Plan) -> Iterator[Plan]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


async def executed(connection: asyncpg.Connection, statement: Statement) -> list[Plan]:
    """The nodes of the plan with which it was executed."""
    text, values = statement
    return told(await connection.fetchval(f"explain (analyze, timing off, format json) {text}", *values))


async def executed_without_values(connection: asyncpg.Connection, statement: Statement) -> list[Plan]:
    """The same, planned once for all values, as Postgres may come to do."""
    text, values = statement
    await connection.execute(f"set plan_cache_mode = force_generic_plan; prepare once as {text}")
    literals = await connection.fetchval("select string_agg(quote_nullable(v), ', ' order by n) from unnest($1::text[]) with ordinality t (v, n)", [as_text(value) for value in values])  # fmt: skip
    try:
        return told(await connection.fetchval(f"explain (analyze, timing off, format json) execute once ({literals})"))
    finally:
        await connection.execute("deallocate once")
        await connection.execute("reset plan_cache_mode")


def as_text(value: Any) -> str:
    return "{" + ",".join(one or "NULL" for one in value) + "}" if isinstance(value, list) else str(value)


def told(explained: str) -> list[Plan]:
    return list(nodes(json.loads(explained)[0]["Plan"]))


def read(plan: list[Plan]) -> float:
    """How many jobs were looked at."""
    scans = [node for node in plan if node.get("Relation Name") == "jobs"]
    return sum((scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0)) * scan["Actual Loops"] for scan in scans)


def indexes(plan: list[Plan]) -> set[str]:
    return {node["Index Name"] for node in plan if "Index Name" in node}


def sorts(plan: list[Plan]) -> list[float]:
    """How many rows each sort took in."""
    return [node["Plans"][0]["Actual Rows"] * node["Plans"][0]["Actual Loops"] for node in plan if "Sort Key" in node]


def pages(filters: Filters, account: int = BIG) -> list[Statement]:
    """The first page and one from the middle, in both orders."""
    middle = Position(BEGIN + JOBS // 2 * STEP, f"{account}-{JOBS // 2}")
    return [
        page_statement(account, filters, newest_first=newest_first, most=PAGE, beyond=beyond)
        for newest_first in (True, False)
        for beyond in (None, middle)
    ]


@pytest.mark.parametrize("name", ASKED)
async def test_a_page_is_a_short_walk_along_an_index(grown, name):
    filters, expected, most = ASKED[name]
    for statement in pages(filters):
        without_values = await executed_without_values(grown, statement)
        assert not [node for node in without_values if node["Node Type"] == "Seq Scan"], statement[0]
        # How frequent each value is decides between the indexes of several filters, and how to look for tags.
        decided = name in NEVER_SORTED and not filters.tags
        for plan in (await executed(grown, statement), *([without_values] if decided else [])):
            assert not [node for node in plan if node["Node Type"] == "Seq Scan"], statement[0]
            assert indexes(plan) <= expected, statement[0]
            assert read(plan) <= most, statement[0]
            assert all(rows <= most for rows in sorts(plan)), statement[0]
            assert not (sorts(plan) and name in NEVER_SORTED), statement[0]


@pytest.mark.parametrize("name", ASKED)
async def test_a_total_reads_no_more_than_it_counts_or_the_narrowest_filter_has(grown, name):
    filters, expected, _ = ASKED[name]
    plan = await executed(grown, total_statement(BIG, filters))
    assert not [node for node in plan if node["Node Type"] == "Seq Scan"]
    assert indexes(plan) <= expected
    assert read(plan) <= 10_001
    counted = await grown.fetchval(*flat(total_statement(BIG, filters)))
    every = await grown.fetchval(*flat(total_statement(BIG, replace(ALL, batch_id=filters.batch_id))))
    assert 0 < counted <= every <= 10_001


@pytest.mark.parametrize("name", ASKED)
async def test_nothing_reads_the_whole_table_before_it_was_ever_analysed(never_analysed, name):
    for statement in (*pages(ASKED[name][0]), total_statement(BIG, ASKED[name][0])):
        assert not [node for node in await executed(never_analysed, statement) if node["Node Type"] == "Seq Scan"]


async def test_a_small_account_reads_only_its_own(grown):
    for account in (2, 3, 4):
        for filters, _, _ in ASKED.values():
            for statement in (*pages(filters, account), total_statement(account, filters)):
                plan = await executed(grown, statement)
                assert not [node for node in plan if node["Node Type"] == "Seq Scan"]
                assert read(plan) <= JOBS // 5


async def test_mere_progress_touches_no_index_and_every_index_is_used(grown):
    """No index holds a column that mere progress changes, so such an update stays on its page."""
    held = await grown.fetchval(
        "select array_agg(distinct a.attname::text) from pg_index i join pg_attribute a on a.attrelid = i.indrelid"
        " and (a.attnum = any (i.indkey) or pg_get_expr(i.indpred, i.indrelid) ~ a.attname) where i.indrelid = 'jobs'::regclass"
    )
    assert not {"progress", "version", "changed_at", "updated_at", "heartbeat_at", "stalled"} & set(held)
    used = {index for _, expected, _ in ASKED.values() for index in expected}
    made = await grown.fetch("select indexrelname::text from pg_stat_user_indexes where relname = 'jobs'")
    assert {row[0] for row in made} == used | {"jobs_pkey"}
    assert set(STATUSES) == {row[0] for row in await grown.fetch("select distinct status from jobs")}


def flat(statement: Statement) -> tuple[Any, ...]:
    return (statement[0], *statement[1])
