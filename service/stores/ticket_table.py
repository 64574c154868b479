"""The sets of jobs that tickets open, in Postgres."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

from service.stores.connections import Postgres
from service.stores.queries import load

_SQL: Final = load("ticket_table")


class TicketTable:
    """Every method raises Unavailable while Postgres is away."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def store(self, account_id: int, job_ids: Sequence[str], lives_s: float) -> str:
        """Keeps a set for so long; its id."""
        set_id = secrets.token_urlsafe(16)
        await self._postgres.execute(_SQL["store"], set_id, account_id, list(job_ids), lives_s)
        return set_id

    async def find(self, account_id: int, set_id: str) -> list[str] | None:
        """The job ids of a set; None where it is over."""
        row = await self._postgres.fetchrow(_SQL["find"], set_id, account_id)
        return None if row is None else list(row["job_ids"])

    async def forget(self) -> None:
        """What is over."""
        await self._postgres.execute(_SQL["forget"])
