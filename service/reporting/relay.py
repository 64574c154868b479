"""The relay: tells Redis what its writer could not, and opens the gate after an outage once nothing old waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import structlog

from service.errors import ReadOnly, Unavailable
from service.job import Job
from service.stores.answers import Written, batch_change_of, change_of, deletion_notice, deletion_of, ready_answer
from service.stores.connections import Connection, Postgres
from service.stores.job_table import JobTable
from service.stores.keys import batch_of
from service.stores.outbox_table import CLAIMED_AT_ONCE, OutboxTable
from service.stores.ready import JobKey
from service.stores.status_cache import Change, StatusCache

EVERY_s: Final = 0.25
MOST_JOBS_AT_ONCE: Final = 1_000
MOST_JOBS_IN_ONE_PUT: Final = 200
"""A commit may have a thousand jobs: told in one go, they would stop this process and outlast Redis's deadline."""

_log = structlog.get_logger(__name__)


class Relay:
    """Every process runs one. Rows of the outbox older than a second are told by whichever comes first.

    One that cannot tell a row (Redis may still answer polls, and refuse what is written) trusts Redis no more.
    """

    def __init__(self, postgres: Postgres, table: JobTable, outbox: OutboxTable, cache: StatusCache) -> None:
        self._postgres = postgres
        self._table = table
        self._outbox = outbox
        self._cache = cache
        self.relayed = 0  # jobs told late

    async def run(self) -> None:
        """Until cancelled. Trouble with Postgres is waited out: the rows stay where they are."""
        while True:
            began_at = time.monotonic()
            try:
                await self._sweep()
                while await self._relay_overdue():
                    pass
                # What another relay has locked is not told yet: that one may stand still.
                if not self._cache.trusted or not await self._outbox.holds_overdue():
                    self._cache.confirm(began_at)
            except Unavailable:
                pass
            except Exception:
                _log.exception("relay_failed")
            await asyncio.sleep(EVERY_s)

    async def _relay_overdue(self) -> bool:
        """One group of overdue commits; True when there may be more."""
        if not self._cache.can_put:  # then another process must not find the rows locked by this one
            self._cache.distrust()
            return False
        try:
            async with self._postgres.transaction() as connection:
                overdue = await self._outbox.claim_overdue(connection)
                commits = await self._tell_beginning_of(overdue, connection)
                await self._outbox.delete(connection, commits)
        except ReadOnly:  # nothing can be locked or deleted; each process tells all there is, once
            async with self._postgres.connection() as connection:
                overdue = await self._outbox.look_for_overdue(connection)
                commits = await self._tell_beginning_of(overdue, connection)
        return bool(commits) and (len(overdue) == CLAIMED_AT_ONCE or len(commits) < len(overdue))

    async def _tell_beginning_of(
        self, overdue: Mapping[str, Sequence[JobKey]], connection: Connection[Any]
    ) -> list[str]:
        """The commits that Redis has heard of by now. They are settled: what is not deleted now, the sweep deletes."""
        commits, jobs = _beginning_of(overdue)
        if not await self._tell(jobs, connection):
            self._cache.distrust()
            return []
        for commit in commits:
            self._outbox.settle(commit)
        self.relayed += len(jobs)
        return commits

    async def _sweep(self) -> None:
        with suppress(ReadOnly):
            await self._outbox.sweep()

    async def _tell(self, jobs: Sequence[JobKey], connection: Connection[Any]) -> bool:
        """Whether Redis has heard of the present state of all of them.

        It is read on the connection that holds the rows: no read waits for another, and while Redis is told
        Postgres waits for a moment only, much less than it lets a transaction stand idle.
        """
        for start in range(0, len(jobs), MOST_JOBS_IN_ONE_PUT):
            some = jobs[start : start + MOST_JOBS_IN_ONE_PUT]
            if not await self._cache.put(await self._changes(some, connection)):
                return False
        return True

    async def _changes(self, keys: Sequence[JobKey], connection: Connection[Any]) -> list[Change]:
        """What Redis must hear: of jobs their present state, or that they are gone; of batches to forget them."""
        batches = [(key[0], batch_id) for key in keys if (batch_id := batch_of(key)) is not None]
        jobs = [key for key in keys if batch_of(key) is None]
        found = await self._table.read(jobs, on=connection)
        return [
            change_of(Written(job), ready_answer(job)) if isinstance(job, Job) else deletion_of(deletion_notice(key, 0))
            for key, job in zip(jobs, found, strict=True)
        ] + [batch_change_of(*batch) for batch in batches]


def _beginning_of(overdue: Mapping[str, Sequence[JobKey]]) -> tuple[list[str], list[JobKey]]:
    """As many of the commits, and their jobs, as can be told while their rows are locked: at least one."""
    commits: list[str] = []
    jobs: dict[JobKey, None] = {}
    for commit, its_jobs in overdue.items():
        if commits and len(jobs) + len(its_jobs) > MOST_JOBS_AT_ONCE:
            break
        commits.append(commit)
        jobs |= dict.fromkeys(its_jobs)
    return commits, list(jobs)


class Gate:
    """After a (re)connect, or a loss of trust, entries are trusted once no commit from before waits to be told."""

    def __init__(self, outbox: OutboxTable, cache: StatusCache) -> None:
        self._outbox = outbox
        self._cache = cache
        self._watching: asyncio.Task[None] | None = None
        cache.on_connect.append(self._begin)

    def _begin(self, generation: int) -> None:
        self.close()
        self._watching = asyncio.get_running_loop().create_task(self._open(generation))

    def close(self) -> None:
        """Stops watching."""
        if self._watching is not None:
            self._watching.cancel()

    async def _open(self, generation: int) -> None:
        """Opens for this generation only; a later one has a watch of its own."""
        began_at = None
        while True:
            try:
                began_at = began_at or await self._outbox.now()
                if not await self._outbox.holds_older_than(began_at):
                    self._cache.trust(generation)
                    return
            except Unavailable:
                pass
            await asyncio.sleep(EVERY_s / 5)
