"""Keys: what is stored of them, who is let in, and how soon a revoked one is refused. On a real Postgres."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from service.embedded import start_postgres
from service.errors import Unauthorized, Unavailable
from service.identity import READ, WRITE, Caller, key_hash
from service.stores import key_memory
from service.stores.account_table import AccountTable
from service.stores.connections import Postgres
from service.stores.key_memory import BELIEVED_s, KeyMemory, UNUSED_s
from service.stores.key_table import KeyTable
from service.stores.migrate import migrate

UNKNOWN = "jw_" + "x" * 43


class CountingPostgres(Postgres):
    """The real one; counts its queries."""

    queries = 0

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        self.queries += 1
        return await super().fetch(statement, *values)


class Clock:
    """Seconds that pass when a test says so."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


async def opened(url: str) -> CountingPostgres:
    postgres = CountingPostgres(url, pool_size=4, prepared_statements=True, timeout_s=5)
    await postgres.open()
    return postgres


@pytest.fixture
async def postgres(database: str) -> AsyncIterator[CountingPostgres]:
    postgres = await opened(database)
    yield postgres
    await postgres.close()


@pytest.fixture
def table(postgres: CountingPostgres) -> KeyTable:
    return KeyTable(postgres)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(table: KeyTable, clock: Clock) -> KeyMemory:
    return KeyMemory(table, clock=clock)


async def create(table: KeyTable, account: str = "acme", expires_in: timedelta | None = None) -> tuple[str, str]:
    return await table.create(account, [READ, WRITE], {}, expires_in)


def heard(memory: KeyMemory) -> list[str]:
    """The ids that the memory says are forgotten, as they come."""
    key_ids: list[str] = []
    memory.forgotten.append(key_ids.extend)
    return key_ids


# The table


async def test_a_key_itself_is_nowhere_in_the_database(postgres: CountingPostgres, table: KeyTable) -> None:
    _, key = await create(table)
    names = [
        row["t"] for row in await postgres.fetch("select oid::regclass::text as t from pg_class where relkind = 'r'")
    ]
    assert "keys" in names
    dump = "\n".join([str(row) for name in names for row in await postgres.fetch(f"select t::text from {name} t")])
    assert key_hash(key).hex() in dump
    assert key.removeprefix("jw_") not in dump
    assert key.encode().hex() not in dump


async def test_a_valid_key_has_a_caller(table: KeyTable) -> None:
    key_id, key = await table.create("acme", [READ], {"poll": "none"}, timedelta(days=90))
    caller = await table.find(key_hash(key))
    assert caller is not None
    assert (caller.account, caller.key_id, caller.scopes) == ("acme", key_id, frozenset({READ}))
    (listed,) = await table.list("acme")
    assert caller.expires_at == listed.expires_at
    assert listed.expires_at
    assert abs(listed.expires_at - listed.created_at - timedelta(days=90)) < timedelta(seconds=1)
    assert (listed.limits, listed.scopes, listed.state) == ({"poll": "none"}, (READ,), "active")


async def test_keys_of_an_account_share_it(table: KeyTable) -> None:
    keys = [(await create(table, account))[1] for account in ("acme", "acme", "other")]
    first, second, other = [await table.find(key_hash(key)) for key in keys]
    assert first is not None and second is not None and other is not None
    assert first.account_id == second.account_id != other.account_id
    assert sorted(key.account for key in await table.list(None)) == ["acme", "acme", "other"]
    assert [key.account for key in await table.list("other")] == ["other"]
    assert await table.list("nobody") == []


async def test_ten_processes_make_one_account(table: KeyTable) -> None:
    made = await asyncio.gather(*(create(table) for _ in range(10)))
    callers = await table.still_valid([key_hash(key) for _, key in made])
    assert len(callers) == 10
    assert len({caller.account_id for caller in callers.values()}) == 1


async def test_only_valid_keys_are_found_in_one_query(postgres: CountingPostgres, table: KeyTable) -> None:
    _, valid = await create(table)
    _, ends_later = await create(table, expires_in=timedelta(hours=1))
    _, expired = await create(table, expires_in=timedelta(seconds=-1))
    revoked_id, revoked = await create(table)
    assert await table.revoke(revoked_id)
    before = postgres.queries
    callers = await table.still_valid([key_hash(key) for key in (valid, ends_later, expired, revoked, UNKNOWN)])
    assert postgres.queries == before + 1
    assert callers.keys() == {key_hash(valid), key_hash(ends_later)}
    assert sorted(key.state for key in await table.list(None)) == ["active", "active", "expired", "revoked"]
    for key in (expired, revoked, UNKNOWN):
        assert await table.find(key_hash(key)) is None


async def test_to_revoke_again_keeps_the_date(table: KeyTable) -> None:
    key_id, _ = await create(table)
    assert await table.revoke(key_id)
    (first,) = await table.list(None)
    assert await table.revoke(key_id)
    assert await table.list(None) == [first]
    assert first.revoked_at is not None
    assert not await table.revoke("key_000000000000")


async def test_accounts(postgres: CountingPostgres, table: KeyTable) -> None:
    accounts = AccountTable(postgres)
    assert await accounts.create("zeta")
    assert not await accounts.create("zeta")
    await create(table, "acme")
    await create(table, "acme", expires_in=timedelta(seconds=-1))
    assert await accounts.set_retention("zeta", timedelta(hours=36))
    assert not await accounts.set_retention("nobody", timedelta(days=1))
    listed = {account.name: (account.retention, account.valid_keys) for account in await accounts.list()}
    assert listed == {"acme": (timedelta(days=7), 1), "zeta": (timedelta(hours=36), 0)}


@pytest.mark.parametrize("name", ["", "Acme", "-acme", "ac me", "acme\n", "a" * 65, "ä"])
async def test_a_bad_account_name_is_refused(table: KeyTable, name: str) -> None:
    with pytest.raises(ValueError, match="no account name"):
        await create(table, name)
    assert await table.list(None) == []


# The memory


async def test_a_found_key_is_known_without_another_query(
    postgres: CountingPostgres, table: KeyTable, memory: KeyMemory
) -> None:
    _, key = await create(table)
    assert memory.known(key) is None
    caller = await memory.find(key)
    queries = postgres.queries
    assert memory.known(key) == caller == await memory.find(key)
    assert postgres.queries == queries


async def test_an_unknown_key_is_refused_and_leaves_no_trace(postgres: CountingPostgres, memory: KeyMemory) -> None:
    for asked in (1, 2):
        with pytest.raises(Unauthorized):
            await memory.find(UNKNOWN)
        assert memory.known(UNKNOWN) is None
        assert postgres.queries == asked
        assert len(memory) == 0


async def test_a_key_that_is_refused_now_can_be_valid_later(postgres: CountingPostgres, memory: KeyMemory) -> None:
    with pytest.raises(Unauthorized):
        await memory.find(UNKNOWN)
    await AccountTable(postgres).create("acme")
    await postgres.execute(
        "insert into keys (id, account_id, hash, scopes) select 'key_late', id, $1, '{admin}' from accounts",
        key_hash(UNKNOWN),
    )
    assert (await memory.find(UNKNOWN)).key_id == "key_late"


async def test_callers_that_ask_at_once_share_one_query(
    postgres: CountingPostgres, table: KeyTable, memory: KeyMemory
) -> None:
    _, key = await create(table)
    before = postgres.queries
    callers = await asyncio.gather(*(memory.find(key) for _ in range(50)))
    assert postgres.queries == before + 1
    assert len(callers) == 50
    assert len(set(callers)) == 1
    refusals = await asyncio.gather(*(memory.find(UNKNOWN) for _ in range(50)), return_exceptions=True)
    assert postgres.queries == before + 2
    assert {type(refusal) for refusal in refusals} == {Unauthorized}


async def test_a_caller_that_hangs_up_takes_nobody_along(table: KeyTable, memory: KeyMemory) -> None:
    key_id, key = await create(table)
    impatient, patient = [asyncio.create_task(memory.find(key)) for _ in range(2)]
    await asyncio.sleep(0)  # both have asked by now
    impatient.cancel()
    assert (await patient).key_id == key_id
    assert impatient.cancelled()


async def test_a_revoked_key_is_forgotten_by_the_next_tick(
    postgres: CountingPostgres, table: KeyTable, memory: KeyMemory
) -> None:
    keys = [await create(table) for _ in range(3)]
    for _, key in keys:
        await memory.find(key)
    forgotten = heard(memory)
    await table.revoke(keys[1][0])
    before = postgres.queries
    await memory.tick()
    assert postgres.queries == before + 1
    assert forgotten == [keys[1][0]]
    assert [memory.known(key) is not None for _, key in keys] == [True, False, True]
    with pytest.raises(Unauthorized):
        await memory.find(keys[1][1])


async def test_many_keys_are_asked_about_in_slices(
    postgres: CountingPostgres, table: KeyTable, memory: KeyMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_memory, "ASKED_AT_ONCE", 2)
    keys = [await create(table) for _ in range(5)]
    for key_id, key in keys:
        await memory.find(key)
        await table.revoke(key_id)
    forgotten = heard(memory)
    before = postgres.queries
    await memory.tick()
    assert postgres.queries == before + 3
    assert forgotten == [key_id for key_id, _ in keys]
    assert len(memory) == 0


async def test_an_expired_key_is_not_known_even_before_the_tick(
    table: KeyTable, memory: KeyMemory, clock: Clock
) -> None:
    key_id, key = await create(table, expires_in=timedelta(seconds=60))
    _, other = await create(table)
    forgotten = heard(memory)
    await memory.find(key)
    await memory.find(other)
    clock.now += 20  # and the seconds that have really passed
    assert memory.known(key)
    clock.now += 40
    assert memory.known(key) is None
    assert memory.known(other)
    assert forgotten == []
    await memory.tick()  # by the database's clock the key has a minute left: a new word from it counts
    assert memory.known(key)
    clock.now += 60
    await set_expired(table, key_id)
    await memory.tick()
    assert forgotten == [key_id]
    with pytest.raises(Unauthorized):
        await memory.find(key)


async def set_expired(table: KeyTable, key_id: str) -> None:
    await table._postgres.execute(
        "update keys set expires_at = clock_timestamp() - interval '1 s' where id = $1", key_id
    )


async def test_a_tick_is_a_new_word_from_postgres(table: KeyTable, memory: KeyMemory, clock: Clock) -> None:
    _, key = await create(table)
    await memory.find(key)
    for _ in range(5):
        clock.now += BELIEVED_s - 1
        assert memory.known(key)
        await memory.tick()
    clock.now += BELIEVED_s
    assert memory.known(key) is None


async def test_a_changed_key_is_known_as_it_is_now(
    postgres: CountingPostgres, table: KeyTable, memory: KeyMemory
) -> None:
    key_id, key = await create(table)
    await memory.find(key)
    await postgres.execute("update keys set scopes = '{admin}' where id = $1", key_id)
    await memory.tick()
    caller = memory.known(key)
    assert caller is not None
    assert caller.scopes == {"admin"}


async def test_an_unused_key_leaves_memory_but_stays_valid(table: KeyTable, memory: KeyMemory, clock: Clock) -> None:
    used, unused = [(await create(table))[1] for _ in range(2)]
    await memory.find(used)
    await memory.find(unused)
    forgotten = heard(memory)
    for _ in range(4):
        clock.now += UNUSED_s / 4
        await memory.find(used)
        await memory.tick()
    assert len(memory) == 1
    assert memory.known(used)
    assert forgotten == []
    assert (await memory.find(unused)).account == "acme"


async def test_memory_is_bounded(table: KeyTable, memory: KeyMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_memory, "CAPACITY", 3)
    keys = [(await create(table))[1] for _ in range(5)]
    for key in keys:
        await memory.find(key)
        assert memory.known(key)
        assert len(memory) <= 3
    assert [memory.known(key) is not None for key in keys] == [False, False, True, True, True]


async def test_while_postgres_is_away_known_keys_are_valid_and_unknown_ones_unavailable(
    tmp_path: Path, clock: Clock
) -> None:
    server = start_postgres(tmp_path, durable=False)
    await migrate(server.url)
    postgres = await opened(server.url)
    try:
        table = KeyTable(postgres)
        memory = KeyMemory(table, clock=clock)
        forgotten = heard(memory)
        key_id, key = await create(table)
        caller = await memory.find(key)
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        await asyncio.to_thread(server.stop)

        await assert_unavailable(memory, UNKNOWN)
        clock.now += BELIEVED_s - 1
        await memory.tick()
        assert memory.known(key) == caller == await memory.find(key)
        assert forgotten == []

        clock.now += 1
        assert memory.known(key) is None
        await assert_unavailable(memory, key)
        await memory.tick()
        assert forgotten == [key_id]
        assert len(memory) == 0

        server = start_postgres(tmp_path, durable=False, port=port)
        assert await memory.find(key) == caller
        with pytest.raises(Unauthorized):
            await memory.find(UNKNOWN)
    finally:
        await postgres.close()
        await asyncio.to_thread(server.stop)


async def assert_unavailable(memory: KeyMemory, key: str) -> None:
    answers: list[Caller | BaseException] = await asyncio.gather(
        *(memory.find(key) for _ in range(3)), return_exceptions=True
    )
    assert {type(answer) for answer in answers} == {Unavailable}
