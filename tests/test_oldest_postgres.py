"""The oldest Postgres that the service promises to run on, where Debian has put it: migrations, statements, outcomes."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from hypothesis import given, settings

from service.embedded import OLDEST_POSTGRES, SYSTEM_POSTGRES, start_postgres
from service.stores.migrate import migrate
from service.stores.queries import load
from tests.test_plans import STATEMENTS
from tests.test_report_jobs import Held, Wish, check_group, groups

BINARIES = SYSTEM_POSTGRES / str(OLDEST_POSTGRES) / "bin"


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not (BINARIES / "postgres").is_file():
        pytest.skip(f"no Postgres {OLDEST_POSTGRES} in {BINARIES}: apt install postgresql-{OLDEST_POSTGRES}")
    folder: Path = tmp_path_factory.mktemp("oldest")
    server = start_postgres(folder, durable=False, binaries=BINARIES)
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
async def oldest(server_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a migrated database with the accounts 1 and 2."""
    await migrate(server_url)
    connection = await asyncpg.connect(server_url)
    await connection.execute("insert into accounts (name) values ('one'), ('two')")
    yield connection
    await connection.close()


async def test_it_is_the_oldest(oldest: asyncpg.Connection) -> None:
    assert oldest.get_server_version().major == OLDEST_POSTGRES


@pytest.mark.parametrize(("owner", "name"), STATEMENTS)
async def test_every_statement_can_be_prepared_there(oldest: asyncpg.Connection, owner: str, name: str) -> None:
    await oldest.prepare(load(owner)[name])


@settings(max_examples=60)
@given(groups)
async def test_every_outcome_there_is_that_of_the_model(
    oldest: asyncpg.Connection, group: list[tuple[Held, Wish, int, str]]
) -> None:
    await check_group(oldest, group)
