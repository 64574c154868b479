"""Statements find their rows through indexes, also with a plan that was made before the table had grown.

Plans are looked at in four states of a database with 10^5 jobs:
- `new`: planned while it was empty and had never been analysed, as a service plans on its first day;
- `emptied`: planned while it was empty and had been analysed: statistics say that there is nothing;
- `grown`: planned after it had grown, with those statistics;
- `analysed`: planned with statistics of what is there.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from service.embedded import Server
from service.stores import queries
from service.stores.queries import load
from tests.conftest import with_database
from tests.plans import Plan, explained, nodes, prepare_inner

STATES = ("new", "emptied", "grown", "analysed")
JOBS = 100_000
OWNERS = sorted(path.stem for path in Path(queries.__file__).parent.glob("*.sql"))
STATEMENTS = [(owner, name) for owner in OWNERS for name in load(owner)]

GROW = """
set session_replication_role = replica;
insert into jobs (account_id, id, type, batch_id, created_at, changed_at, updated_at, heartbeat_at)
  select 1 + n % 10, md5(n::text), 'extraction', case when n % 4 = 0 then 'batch-' || n / 10 end, now(), now(), now(), now()
  from generate_series(1, {jobs}) n;
insert into batches (account_id, id, total, queued)
  select account_id, batch_id, count(*), count(*) from jobs where batch_id is not null group by 1, 2
  on conflict do nothing;
insert into job_history (account_id, job_id, version, at, status, attempt) select account_id, id, 1, now(), 'queued', 1 from jobs
  on conflict do nothing;
insert into tombstones (account_id, id, version) select 1 + n % 10, md5('gone' || n), 2 from generate_series(1, {jobs}) n;
insert into results (content_type, body) select 'text/plain', 'x' from generate_series(1, {jobs} / 5) n;
insert into keys (id, account_id, hash, scopes)
  select 'key-' || n, 1 + n % 10, sha256(n::text::bytea), '{{jobs:read}}' from generate_series(1, {jobs} / 10) n;
insert into outbox (xid, accounts, jobs) select n::text::xid8, '{{1}}', '{{a}}' from generate_series(1, {jobs} / 10) n
  on conflict do nothing;
insert into idempotency_keys (account_id, key, request_hash, body)
  select 1 + n % 10, 'key ' || n, '', '' from generate_series(1, {jobs} / 10) n;
set session_replication_role = origin;
"""
BEGIN = """
insert into accounts (name) select 'account-' || n from generate_series(1, 10) n;
do $$ declare name text; begin
  for name in select relname from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace loop
    execute format('alter table %I set (autovacuum_enabled = off)', name);
  end loop;
end $$
"""

GUARDED = {
    ("job_table", "read"): {"jobs": {"account_id", "id"}, "tombstones": {"account_id", "id"}},
    ("job_table", "result"): {"jobs": {"account_id", "id"}, "results": {"id"}},
    ("job_table", "history"): {"job_history": {"account_id", "job_id", "version"}},
    ("job_table", "drop_result"): {"results": {"id"}},
    ("job_table", "idempotency_find"): {"idempotency_keys": {"account_id", "key"}},
    ("outbox_table", "settle"): {"outbox": {"xid"}},
    ("outbox_table", "any_older"): {"outbox": {"outbox_by_age"}},
    ("outbox_table", "claim_overdue"): {"outbox": {"at"}},
    ("outbox_table", "look_for_overdue"): {"outbox": {"at"}},
    ("outbox_table", "any_overdue"): {"outbox": {"at"}},
    ("outbox_table", "oldest"): {"outbox": {"outbox_by_age"}},
    ("key_table", "still_valid"): {"keys": {"hash"}},
    ("key_table", "revoke"): {"keys": {"id"}},
}
"""What each statement must find by which columns, or from the beginning of which index."""

OTHERS_OF_THAT_ID = {"x"}
"""The one access to jobs by id alone: does only another account have it?"""


class Looked:
    """A database in one state and what it said."""

    def __init__(self) -> None:
        self.inner: list[Plan] = []
        self.statements: dict[tuple[str, str], list[Plan]] = {}
        self.writes: list[tuple[str, Plan]] | None = []  # (statement, plan); None: no auto_explain here


@pytest.fixture(scope="module")
async def looked(postgres_server: Server, template: str) -> dict[str, Looked]:
    """All plans in all states, taken once."""
    found = {state: Looked() for state in STATES}
    async with copy_of(postgres_server, template, "plans_new") as connect:
        early = await connect()
        await early.execute(BEGIN)
        inner = await prepare_inner(early, "report_jobs")
        planner = await connect()
        await prepare_guarded(planner)
        writer = await connect()
        for number in range(7):  # more often than custom plans are tried
            await write(writer, f"early-{number}")
        await grow(await connect())
        found["new"].inner = await explained(early, inner.execute())
        found["new"].statements = await plans_of_guarded(planner)
        found["new"].writes = await plans_of_writes(writer)
    async with copy_of(postgres_server, template, "plans_emptied") as connect:
        early = await connect()
        await early.execute(BEGIN)
        await early.execute("vacuum analyze")
        inner = await prepare_inner(early, "report_jobs")
        found["emptied"].inner = await explained(early, inner.execute())
        await grow(await connect())
        for state in ("grown", "analysed"):
            if state == "analysed":
                await early.execute("analyze")
            later, planner = await connect(), await connect()
            inner = await prepare_inner(later, "report_jobs")
            found[state].inner = await explained(later, inner.execute())
            await prepare_guarded(planner)
            found[state].statements = await plans_of_guarded(planner)
            found[state].writes = await plans_of_writes(await connect())
    return found


@asynccontextmanager
async def copy_of(server: Server, template: str, name: str) -> AsyncIterator[Callable[[], Any]]:
    """A database of its own; what is yielded opens connections to it."""
    admin = await asyncpg.connect(server.url)
    await admin.execute(f"create database {name} template {template} strategy file_copy")
    opened: list[asyncpg.Connection] = []

    async def connect() -> asyncpg.Connection:
        opened.append(await asyncpg.connect(with_database(server.url, name)))
        return opened[-1]

    try:
        yield connect
    finally:
        for connection in opened:
            await connection.close()
        await admin.execute(f"drop database {name} with (force)")
        await admin.close()


async def grow(connection: asyncpg.Connection) -> None:
    await connection.execute(GROW.format(jobs=JOBS))


# Looking


async def prepare_guarded(connection: asyncpg.Connection) -> None:
    """PREPARE, as asyncpg does, and enough executions for a plan that fits any values."""
    for owner, name in GUARDED:
        await connection.execute(f"prepare {owner}_{name} as {load(owner)[name]}")
        for _ in range(7):
            await connection.fetch(f"explain {await execution_of(connection, owner, name)}")


async def plans_of_guarded(connection: asyncpg.Connection) -> dict[tuple[str, str], list[Plan]]:
    return {
        (owner, name): await explained(connection, await execution_of(connection, owner, name))
        for owner, name in GUARDED
    }


async def execution_of(connection: asyncpg.Connection, owner: str, name: str) -> str:
    """Values that might be there; with nulls the planner would know that nothing is."""
    values = {
        "integer": "3",
        "bigint": "3",
        "text": "'abc'",
        "integer[]": "'{3,4}'",
        "text[]": "'{abc,def}'" if owner != "outbox_table" else "'{1,2}'",
        "bytea[]": "array[sha256('1'), sha256('2')]",
        "timestamp with time zone": "now() - interval '1 s'",
    }
    types = await connection.fetchval(
        "select parameter_types::text[] from pg_prepared_statements where name = $1", f"{owner}_{name}"
    )
    given = f" ({', '.join(values[kind] for kind in types)})" if types else ""
    return f"execute {owner}_{name}{given}"


async def write(connection: asyncpg.Connection, prefix: str) -> None:
    """Every way to write a job: some at once, in batches and not, one alone, a result, a deletion."""
    sql = load("job_table")
    items = [
        {"id": f"{prefix}-{n}", "type": "x", "progress": {}, "metadata": {}, "tags": [], "stalled_action": "mark"}
        | {"public": False, "batch_id": f"{prefix}-batch" if n % 2 else None}
        for n in range(20)
    ]
    for group in (items[:1], items[1:]):
        await connection.fetch(sql["create"], 1, json.dumps(group), [])
    for group in (items[:1], items):
        ids, nothing = [item["id"] for item in group], [None] * len(group)
        columns: list[list[Any]] = [[1] * len(group), ids, ["PROCESSING"] * len(group), *[nothing] * 6]
        await connection.fetch(sql["report"], *columns, [False] * len(group), nothing, nothing)
    result = await connection.fetchval(sql["write_result"], "text/plain", b"")
    for _ in range(2):
        one: list[list[Any]] = [[1], [items[0]["id"]], ["COMPLETED"], *[[None]] * 6, [False], [result], [bytes(32)]]
        await connection.fetch(sql["report"], *one)
    for item in items[:2]:
        await connection.fetch(sql["delete"], 1, item["id"], None)
    unknown: list[list[Any]] = [[1], ["no such job"], ["COMPLETED"], *[[None]] * 6, [False], [None], [None]]
    await connection.fetch(sql["report"], *unknown)


async def plans_of_writes(connection: asyncpg.Connection) -> list[tuple[str, Plan]] | None:
    """All plans that run inside `write`, also those of triggers, as auto_explain tells them."""
    told: list[str] = []

    def listen(_: Any, message: Any) -> None:
        told.append(message.message)

    try:
        await connection.execute("load 'auto_explain'")
    except asyncpg.PostgresError as missing:
        print("no auto_explain:", missing)
        return None
    connection.add_log_listener(listen)
    await connection.execute(
        "set auto_explain.log_min_duration = 0; set auto_explain.log_nested_statements = on;"
        "set auto_explain.log_format = json; set client_min_messages = log"
    )
    await write(connection, "late")
    await connection.execute("set client_min_messages = notice")
    connection.remove_log_listener(listen)
    explained = [json.loads(message[message.index("{") :]) for message in told if "plan:" in message]
    return [(one["Query Text"], one["Plan"]) for one in explained]


# What must be so


def scans(plan: list[Plan]) -> list[Plan]:
    """The accesses to tables."""
    return [node for node in plan if "Relation Name" in node and node["Node Type"] != "ModifyTable"]


def columns_looked_up(scan: Plan) -> set[str]:
    """The columns by which an access finds its rows in an index, in itself or in the bitmap beneath it."""
    conditions = " ".join(node.get("Index Cond", "") for node in nodes(scan))
    words = conditions.replace("(", " ").replace(")", " ").split()
    return {words[place - 1] for place, word in enumerate(words) if word in ("=", ">", "<") and place}


@pytest.mark.parametrize("state", STATES)
def test_the_group_commit_never_scans_jobs_or_tombstones(looked: dict[str, Looked], state: str) -> None:
    accesses = scans(looked[state].inner)
    assert len([access for access in accesses if access["Relation Name"] == "jobs"]) >= 3
    for access in accesses:
        assert access["Node Type"] != "Seq Scan", access
        if access["Relation Name"] == "tombstones":  # also where statistics say that there are none
            assert columns_looked_up(access) >= {"account_id", "id"}, access


@pytest.mark.parametrize("state", ["new", "grown", "analysed"])
def test_the_group_commit_finds_each_row_by_its_whole_key(looked: dict[str, Looked], state: str) -> None:
    for access in scans(looked[state].inner):
        table, found_by = access["Relation Name"], columns_looked_up(access)
        if table == "jobs" and access["Alias"].partition("_")[0] in OTHERS_OF_THAT_ID:
            assert "id" in found_by, access
        elif table in ("jobs", "tombstones"):
            assert found_by >= {"account_id", "id"}, access
        else:
            assert found_by >= {"id"}, access


@pytest.mark.parametrize("state", ["new", "grown", "analysed"])
@pytest.mark.parametrize(("owner", "name"), GUARDED)
def test_a_statement_finds_its_rows_in_an_index(looked: dict[str, Looked], owner: str, name: str, state: str) -> None:
    if owner != "job_table" and state == "new":
        return  # small tables, of which the planner may think as it likes until they have grown
    found = [
        scan for scan in scans(looked[state].statements[owner, name]) if scan["Relation Name"] in GUARDED[owner, name]
    ]
    assert found
    for scan in found:
        wanted = GUARDED[owner, name][scan["Relation Name"]]
        if scan["Alias"].partition("_")[0] in OTHERS_OF_THAT_ID:
            wanted = {"id"}
        assert columns_looked_up(scan) | {scan.get("Index Name")} >= wanted, scan


@pytest.mark.parametrize("state", ["new", "grown", "analysed"])
def test_no_write_reads_a_whole_table(looked: dict[str, Looked], state: str) -> None:
    """Creations, reports, results and deletions, with all that their triggers do."""
    plans = looked[state].writes
    if plans is None:
        pytest.skip("this Postgres has no auto_explain")
    growing = {"jobs", "job_history", "tombstones", "results", "batches", "outbox", "idempotency_keys"}
    seen: dict[str, list[str]] = {}
    for statement, plan in plans:
        for scan in scans(list(nodes(plan))):
            if scan["Relation Name"] in growing:
                found_by = columns_looked_up(scan)
                key = {"jobs": "id", "job_history": "job_id", "tombstones": "id", "outbox": "xid"}
                if key.get(scan["Relation Name"], "id") not in found_by:
                    brief = " ".join(statement.split())[:80]
                    seen.setdefault(f"{scan['Node Type']} of {scan['Relation Name']}", []).append(brief)
    assert not seen, json.dumps({kind: sorted(set(texts)) for kind, texts in seen.items()}, indent=1)


@pytest.mark.parametrize(("owner", "name"), STATEMENTS)
async def test_every_statement_can_be_prepared(sql: asyncpg.Connection, owner: str, name: str) -> None:
    await sql.prepare(load(owner)[name])
