"""The pool: what becomes of a transaction that cannot end as it should."""

import asyncio

import pytest

from service.stores.connections import Postgres


async def test_a_cancelled_transaction_that_lost_its_connection_is_cancelled(database, sql):
    """Not unavailable: whoever repeats its work after that would never end."""
    postgres = Postgres(database, pool_size=1, prepared_statements=True, timeout_s=5)
    await postgres.open()
    inside = asyncio.get_running_loop().create_future()

    async def work():
        async with postgres.transaction() as connection:
            inside.set_result(await connection.fetchval("select pg_backend_pid()"))
            await asyncio.Event().wait()

    working = asyncio.create_task(work())
    assert await sql.fetchval("select pg_terminate_backend($1, 5000)", await inside)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    await postgres.close()
