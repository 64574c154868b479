"""The outbox: commits that Redis may not have heard of yet. The triggers write a row; it goes once Redis knows."""

from __future__ import annotations

from datetime import datetime
from typing import Final

import asyncpg

from service.stores.connections import Connection, Postgres
from service.stores.queries import load

CLAIMED_AT_ONCE: Final = 100
"""As the statement says: written there, so that the plan knows how few they are."""

_SQL: Final = load("outbox_table")


class OutboxTable:
    """Rows are named by the transaction that wrote them (`xid`). `oldest_s`: how old the oldest was when measured."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._told: set[str] = set()
        self.oldest_s = 0.0

    def settle(self, xid: str) -> None:
        """Redis has heard of this commit; its row goes with the next `sweep`."""
        self._told.add(xid)

    async def sweep(self) -> None:
        """Deletes the rows that were settled, in one statement. Raises Unavailable and keeps them for next time."""
        told, self._told = self._told, set()
        if not told:
            return
        try:
            await self._postgres.execute(_SQL["settle"], list(told))
        except BaseException:
            self._told |= told
            raise

    async def claim_overdue(self, connection: Connection[asyncpg.Record]) -> dict[str, list[tuple[int, str]]]:
        """At most CLAIMED_AT_ONCE rows older than a second, locked until the transaction ends.

        xid -> jobs as (account id, job id).
        """
        return _by_commit(await connection.fetch(_SQL["claim_overdue"]))

    async def delete(self, connection: Connection[asyncpg.Record], xids: list[str]) -> None:
        """Deletes settled rows inside the transaction that claimed them: before others may claim them."""
        if xids:
            await connection.execute(_SQL["settle"], xids)
            self._told.difference_update(xids)

    async def look_for_overdue(self, connection: Connection[asyncpg.Record]) -> dict[str, list[tuple[int, str]]]:
        """As `claim_overdue` for a Postgres that is read-only: unlocked, and without what was settled here."""
        return _by_commit(await connection.fetch(_SQL["look_for_overdue"], list(self._told)))

    async def measure(self) -> None:
        """Measures `oldest_s`. Raises Unavailable."""
        row = await self._postgres.fetchrow(_SQL["oldest"])
        self.oldest_s = row["oldest_s"] if row is not None else 0.0

    async def now(self) -> datetime:
        """The database's clock."""
        row = await self._postgres.fetchrow(_SQL["now"])
        assert row is not None
        at: datetime = row["now"]
        return at

    async def holds_overdue(self) -> bool:
        """Whether a commit older than a second is still untold, also if another relay has locked it."""
        row = await self._postgres.fetchrow(_SQL["any_overdue"], list(self._told))
        return row is None or bool(row["waiting"])

    async def holds_older_than(self, moment: datetime) -> bool:
        """Whether a commit from before `moment` (by the database's clock) is still untold."""
        row = await self._postgres.fetchrow(_SQL["any_older"], moment)
        return row is None or bool(row["waiting"])


def _by_commit(rows: list[asyncpg.Record]) -> dict[str, list[tuple[int, str]]]:
    return {row["xid"]: list(zip(row["accounts"], row["jobs"], strict=True)) for row in rows}
