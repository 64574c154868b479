"""The accounts in Postgres: whose jobs they are, and how long finished ones are kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from service.stores.connections import Postgres
from service.stores.queries import load

STATEMENTS: Final = load("account_table")
ACCOUNT_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
"""What the table accepts as a name (the whole of it must match)."""


@dataclass(frozen=True, slots=True)
class Account:
    """One account as it is listed. Times are UTC."""

    name: str
    retention: timedelta
    created_at: datetime
    valid_keys: int


class AccountTable:
    """Reads and writes accounts. Every method raises Unavailable while Postgres is away."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def create(self, name: str) -> bool:
        """Makes sure that the account exists; True if it is new. ValueError: not an ACCOUNT_NAME."""
        if not ACCOUNT_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no account name: up to 64 of a-z 0-9 _ . - with a letter or digit first")
        return await self._postgres.fetchrow(STATEMENTS["create"], name) is not None

    async def set_retention(self, name: str, retention: timedelta) -> bool:
        """How long jobs that finish from now on are kept (more than 0); False if there is no such account."""
        return await self._postgres.fetchrow(STATEMENTS["set_retention"], name, retention) is not None

    async def list(self) -> Sequence[Account]:
        """All accounts, by name."""
        return [Account(**row) for row in await self._postgres.fetch(STATEMENTS["list"])]
