"""The API keys in Postgres. A key itself is shown once by `create`; only its SHA-256 is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

import orjson
from asyncpg import Record

from service.identity import Caller, key_hash, mint_key, mint_key_id
from service.stores.account_table import AccountTable
from service.stores.connections import Postgres
from service.stores.queries import load

STATEMENTS: Final = load("key_table")


@dataclass(frozen=True, slots=True)
class ListedKey:
    """One key as it is listed. Times are UTC; `limits` are those that differ from the default, by policy."""

    key_id: str
    account: str
    scopes: tuple[str, ...]
    limits: Mapping[str, str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    state: Literal["active", "expired", "revoked"]


class KeyTable:
    """Reads and writes keys. Valid means: not revoked and not expired, by the database's clock.

    Every method raises Unavailable while Postgres is away.
    """

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._accounts = AccountTable(postgres)

    async def find(self, hash: bytes) -> Caller | None:
        """Who calls with the key of this SHA-256; None if there is no such valid key."""
        return (await self.still_valid([hash])).get(hash)

    async def find_by_id(self, key_id: str) -> tuple[bytes, Caller] | None:
        """The SHA-256 of a valid key and who calls with it, by the key's public name."""
        row = await self._postgres.fetchrow(STATEMENTS["valid_by_id"], key_id)
        return None if row is None else (row["hash"], _caller(row))

    async def still_valid(self, hashes: Sequence[bytes]) -> dict[bytes, Caller]:
        """The valid ones of these keys by their SHA-256, in one query."""
        rows = await self._postgres.fetch(STATEMENTS["still_valid"], hashes)
        return {row["hash"]: _caller(row) for row in rows}

    async def create(
        self, account: str, scopes: Sequence[str], limits: Mapping[str, str], expires_in: timedelta | None
    ) -> tuple[str, str]:
        """A new key as (its id, the key); the account is made if it is new.

        `scopes` are of identity.SCOPES, at least one; `limits` as in ListedKey; None: it does not expire.
        Raises ValueError for a bad account name.
        """
        await self._accounts.create(account)
        key_id, key = mint_key_id(), mint_key()
        values = [account, key_id, key_hash(key), scopes, orjson.dumps(dict(limits)).decode(), expires_in]
        await self._postgres.execute(STATEMENTS["create"], *values)
        return key_id, key

    async def revoke(self, key_id: str) -> bool:
        """Ends a key for good (again is no harm); False if there is no such key."""
        return await self._postgres.fetchrow(STATEMENTS["revoke"], key_id) is not None

    async def list(self, account: str | None) -> Sequence[ListedKey]:
        """The keys of one account, or all, oldest first."""
        return [_listed(row) for row in await self._postgres.fetch(STATEMENTS["list"], account)]


def _caller(row: Record) -> Caller:
    return Caller(
        row["account_id"],
        row["account"],
        row["key_id"],
        frozenset(row["scopes"]),
        row["expires_at"],
        orjson.loads(row["limits"]),
    )


def _listed(row: Record) -> ListedKey:
    fields = dict(row)
    return ListedKey(**fields | {"scopes": tuple(row["scopes"]), "limits": orjson.loads(row["limits"])})
