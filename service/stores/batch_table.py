"""Batches in Postgres. Their counts are kept by the triggers on jobs; here they are read and closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import asyncpg
import orjson

from service.batch import MOST_JOBS_SHOWN, Batch, BatchJob
from service.stores.connections import Postgres
from service.stores.queries import load

_SQL: Final = load("batch_table")


class BatchTable:
    """Every method raises Unavailable when Postgres cannot be reached."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def read(self, keys: Sequence[tuple[int, str]], *, with_progress: bool = False) -> list[Batch | None]:
        """Batches by (account id, batch id), in the order asked; None where there is no such batch."""
        accounts, ids = [key[0] for key in keys], [key[1] for key in keys]
        rows = await self._postgres.fetch(_SQL["read"], accounts, ids, MOST_JOBS_SHOWN, with_progress)
        return [_batch(row) if row["id"] is not None else None for row in rows]

    async def versions(self, keys: Sequence[tuple[int, str]]) -> list[int | None]:
        """The versions of batches, in the order asked; None where there is no such batch."""
        rows = await self._postgres.fetch(_SQL["versions"], [key[0] for key in keys], [key[1] for key in keys])
        return [row["version"] for row in rows]

    async def close(self, account_id: int, batch_id: str) -> tuple[bool, str | None]:
        """Closes a batch: whether there is one, and the commit that Redis must hear of (None: it was closed)."""
        row = await self._postgres.fetchrow(_SQL["close"], account_id, batch_id)
        assert row is not None
        return row["outcome"] != "not_found", row["xid"]


def _batch(row: asyncpg.Record) -> Batch:
    return Batch(
        account_id=row["account_id"],
        id=row["id"],
        version=row["version"],
        created_at=row["created_at"],
        changed_at=row["changed_at"],
        closed=row["closed"],
        total=row["total"],
        queued=row["queued"],
        completed=row["completed"],
        failed=row["failed"],
        cancelled=row["cancelled"],
        jobs=[_batch_job(line) for line in row["jobs"].split("\n")] if row["jobs"] else [],
    )


def _batch_job(line: str) -> BatchJob:
    id, status, type, *percentage = line.split(" ")
    return BatchJob(id, status, type, *map(orjson.loads, percentage))
