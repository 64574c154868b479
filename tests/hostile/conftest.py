"""What every hostile request is checked for."""

import logging
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from tests.hostile import Untouched
from tests.http import ask, create


@pytest.fixture
async def untouched(client, sql, caplog) -> AsyncIterator[Untouched]:
    """Some jobs: `x` is queued and of the batch `b`, `done` is COMPLETED, `gone` is deleted."""
    await create(client, id="x", metadata={"a": 1}, batch_id="b")
    await create(client, id="done")
    await ask(client, "PUT", "/jobs/done/result?complete=true", data=b"bytes")
    await create(client, id="gone")
    await ask(client, "DELETE", "/jobs/gone")
    await ask(client, "POST", "/jobs", json={"type": "x"}, headers={"Idempotency-Key": "used"})
    while await sql.fetchval("select count(*) from outbox"):
        pass
    tables = [
        row["name"]
        for row in await sql.fetch("select tablename::text as name from pg_tables where schemaname = 'public'")
    ]
    everything = (
        "select concat_ws(' ', "
        + ", ".join(f"(select jsonb_agg(t order by t::text) from {each} t)" for each in tables)
        + ")"
    )
    before = await sql.fetchval(everything)
    assert len(tables) > 8
    with capture_logs() as logs:

        async def check() -> None:
            assert await sql.fetchval(everything) == before
            assert [entry for entry in logs if entry["log_level"] in ("error", "critical")] == []
            assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []

        yield check
        await check()
    assert (await ask(client, "GET", "/jobs/x")).status == 200
