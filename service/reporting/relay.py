"""The relay: tells Redis what its writer could not, and opens the gate after an outage once nothing old waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from service.errors import Unavailable
from service.job import Job
from service.stores.answers import change_of, deletion_of, ready_answer
from service.stores.connections import Postgres
from service.stores.job_table import JobTable
from service.stores.outbox_table import OutboxTable
from service.stores.status_cache import Change, StatusCache

EVERY_s: Final = 0.25
MOST_COMMITS_AT_ONCE: Final = 100

_log = structlog.get_logger(__name__)


class Relay:
    """Every process runs one. Rows of the outbox older than a second are told by whichever comes first."""

    def __init__(self, postgres: Postgres, table: JobTable, outbox: OutboxTable, cache: StatusCache) -> None:
        self._postgres = postgres
        self._table = table
        self._outbox = outbox
        self._cache = cache
        self.relayed = 0  # jobs told late

    async def run(self) -> None:
        """Until cancelled. Trouble with Postgres is waited out: the rows stay where they are."""
        while True:
            try:
                await self._outbox.sweep()
                while await self._relay_overdue():
                    pass
            except Unavailable:
                pass
            except Exception:
                _log.exception("relay_failed")
            await asyncio.sleep(EVERY_s)

    async def _relay_overdue(self) -> bool:
        """One group of overdue commits; True when there may be more."""
        async with self._postgres.transaction() as connection:
            commits = await self._outbox.claim_overdue(connection, MOST_COMMITS_AT_ONCE)
            if not commits:
                return False
            jobs = list(dict.fromkeys(job for jobs in commits.values() for job in jobs))
            if not await self._cache.put(await self._changes(jobs)):
                return False
            await self._outbox.delete(connection, list(commits))
        self.relayed += len(jobs)
        return len(commits) == MOST_COMMITS_AT_ONCE

    async def _changes(self, keys: Sequence[tuple[int, str]]) -> list[Change]:
        """What Redis must hear of these jobs: their present state, or that they are gone."""
        found = await self._table.read(keys)
        return [
            change_of(job, ready_answer(job)) if isinstance(job, Job) else deletion_of(account_id, job_id, 0, None)
            for (account_id, job_id), job in zip(keys, found, strict=True)
        ]


class Gate:
    """After a (re)connect to Redis its entries are trusted only once no commit from before still waits to be told."""

    def __init__(self, outbox: OutboxTable, cache: StatusCache) -> None:
        self._outbox = outbox
        self._cache = cache
        self._watching: asyncio.Task[None] | None = None
        cache.on_connect.append(self._connected)

    def _connected(self, generation: int) -> None:
        self.close()
        self._watching = asyncio.get_running_loop().create_task(self._open(generation))

    def close(self) -> None:
        """Stops watching."""
        if self._watching is not None:
            self._watching.cancel()

    async def _open(self, generation: int) -> None:
        """Opens for this generation of the connection only; a later one has a watch of its own."""
        reconnected_at = None
        while True:
            try:
                reconnected_at = reconnected_at or await self._outbox.now()
                if not await self._outbox.holds_older_than(reconnected_at):
                    self._cache.trust(generation)
                    return
            except Unavailable:
                pass
            await asyncio.sleep(EVERY_s / 5)
