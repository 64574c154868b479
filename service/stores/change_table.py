"""What changed lately, in Postgres, for readers who come back and for messages that were lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from asyncpg import Record

from service.stores.connections import Postgres
from service.stores.queries import load
from service.stores.ready import JobKey

_SQL: Final = load("change_table")

ROWS_AT_ONCE: Final = 200
"""A row may name a thousand jobs: more rows would hold up everybody else while they are read."""
FORGOTTEN_AT_ONCE: Final = 1_000


@dataclass(slots=True)
class Changed:
    """What happened to one job: the version it came to have, its batch, every status before and after.

    `at`: the xid of the newest change. `gone`: it was deleted.
    """

    version: int
    at: int
    gone: bool
    batch_id: str | None
    statuses: set[str] = field(default_factory=set)

    def after(self, earlier: Changed | None) -> Changed:
        """What happened to the job in all, where this was found behind `earlier`."""
        if earlier is None:
            return self
        newest = max(self, earlier, key=lambda change: change.version)
        newest.statuses = self.statuses | earlier.statuses
        return newest


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A deleted job, with what its followers go by."""

    version: int
    batch_id: str | None
    user_id: str | None
    tags: list[str]


class PositionUnknown(Exception):
    """What changed since then was forgotten, or such a position was never given."""


class ChangeTable:
    """Positions are xids: every transaction below has ended. Every method raises Unavailable while Postgres is away."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    @property
    def identity(self) -> str:
        """Of the Postgres whose positions these are; see Postgres.identity."""
        return self._postgres.identity

    async def position(self) -> int:
        """The position of now: whoever reads after this has everything from before it."""
        row = await self._postgres.fetchrow(_SQL["position"])
        assert row is not None
        return int(row["xid"])

    async def since(
        self, position: int, *, accounts: Collection[int] = (), batches: Collection[tuple[int, str]] = ()
    ) -> AsyncIterator[tuple[int, dict[JobKey, Changed]]]:
        """What changed from `position` on in `accounts`, and in `batches` (account id, batch id) of others.

        Page by page, oldest first, each with the position that holds once it has been dealt with; the last page's is
        that of now. A batch of an account brings what else changed in the same commits. Raises PositionUnknown.
        """
        everyone = sorted({*accounts, *(account_id for account_id, _ in batches)})
        batch_ids = sorted({batch_id for _, batch_id in batches})
        ends_at: int | None = None
        rows_at_once = ROWS_AT_ONCE
        while True:
            values = [everyone, str(position), list(accounts), batch_ids, rows_at_once]
            rows = await self._postgres.fetch(_SQL["since"], *values)
            if not rows or not rows[0]["known"]:
                raise PositionUnknown(position)
            ends_at = int(rows[0]["position"]) if ends_at is None else ends_at
            if len(rows) < rows_at_once:
                yield ends_at, _by_job(rows)
                return
            if int(rows[-1]["xid"]) == position:  # one transaction of more rows than a page
                rows_at_once *= 2
                continue
            position = int(rows[-1]["xid"])  # its own rows may go on: they come again
            yield min(position, ends_at), _by_job(rows)

    async def tombstones(self, keys: Sequence[JobKey]) -> Mapping[JobKey, Tombstone]:
        """Those of `keys` that were deleted."""
        rows = await self._postgres.fetch(_SQL["tombstones"], [key[0] for key in keys], [key[1] for key in keys])
        return {
            (row["account_id"], row["id"]): Tombstone(row["version"], row["batch_id"], row["user_id"], row["tags"])
            for row in rows
        }

    async def forget(self) -> None:
        """What is older than an hour."""
        while True:
            row = await self._postgres.fetchrow(_SQL["forget"])
            if row is None or row["forgotten"] < FORGOTTEN_AT_ONCE:
                return


def _by_job(rows: Sequence[Record]) -> dict[JobKey, Changed]:
    changes: dict[JobKey, Changed] = {}
    for row in rows:
        if row["account_id"] is None:  # nothing changed: the row says only where we are
            continue
        at = int(row["xid"])
        items = zip(row["jobs"], row["versions"], row["were"], row["became"], row["batch_ids"], strict=True)
        for job_id, version, was, became, batch_id in items:
            key = (row["account_id"], job_id)
            change = changes.get(key)
            if change is None:
                change = changes[key] = Changed(version, at, became is None, batch_id)
            elif version >= change.version:  # a deletion and a creation anew are never in one statement
                change.version, change.at, change.gone = version, at, became is None
            change.statuses |= {status for status in (was, became) if status is not None}
    return changes
