"""One job for one reader: memory if Redis has nothing newer, else Redis, else Postgres. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from service.errors import JobNotFound, JobwireError, RedisAway, Unavailable, absent_job
from service.job import is_job_id
from service.stores.connections import Postgres
from service.stores.joined_reads import JoinedReads, SpacedReads
from service.stores.keys import batch_of
from service.stores.ready import Absence, JobKey, Ready, ReadyAnswer
from service.stores.status_cache import (
    MISS_OF_ANOTHER,
    Miss,
    Newer,
    NothingNewer,
    Reading,
    StatusCache,
    Unverified,
)
from service.stores.status_memory import StatusMemory
from service.stores.truth import Truth


class StatusReader:
    """The one gate through which every status is read.

    `from_memory`, `from_redis`, `from_postgres` count where answers came from.
    """

    def __init__(self, postgres: Postgres, truth: Truth, cache: StatusCache, memory: StatusMemory) -> None:
        self._postgres = postgres
        self._cache = cache
        self._memory = memory
        self._truth = JoinedReads(truth.read)
        self._truth_of_batches = SpacedReads(self._truth)  # a batch is a thousand jobs
        self._fills: dict[JobKey, tuple[str, Ready]] = {}
        self._versions = truth.versions
        self._tasks: set[asyncio.Task[None]] = set()
        self.from_memory = self.from_redis = self.from_postgres = 0

    @property
    def may_be_stale(self) -> bool:
        """Postgres is away, or was until now: the answer is the newest that Redis knows, and nobody verified it."""
        return not self._postgres.reachable or self._cache.unconfirmed

    async def read(self, account_id: int, job_id: str) -> ReadyAnswer:
        """Never older than the last acknowledged report. Raises JobNotFound and its kind, JobForbidden, Unavailable."""
        key = (account_id, job_id)
        held = self._memory.get(key)
        try:
            reading = await self._cache.read(key, held.version if held is not None else 0)
        except RedisAway:
            reading = MISS_OF_ANOTHER
        return self._at_hand(key, held, reading) or await self._beyond(key, held, reading)

    async def read_many(self, account_id: int, job_ids: Sequence[str]) -> list[ReadyAnswer | JobwireError]:
        """Each as `read` would have it, in the order asked; what is wrong with one job stands in its place.

        All are asked for in one turn of the event loop, so they are one trip to Redis, and what Redis does not know
        is one read of Postgres. Raises Unavailable.
        """
        keys = [(account_id, job_id) for job_id in dict.fromkeys(job_ids) if is_job_id(job_id)]
        held = [self._memory.get(key) for key in keys]
        found: dict[str, ReadyAnswer | JobwireError] = {}
        missing = []
        for key, answer, reading in zip(keys, held, await self._readings(keys, held), strict=True):
            try:
                if (present := self._at_hand(key, answer, reading)) is not None:
                    found[key[1]] = present
                else:
                    missing.append((key, answer, reading))
            except JobwireError as absent:
                found[key[1]] = absent
        ends = await asyncio.gather(*(self._beyond(*each) for each in missing), return_exceptions=True)
        for (key, *_), end in zip(missing, ends, strict=True):
            if isinstance(end, BaseException) and (isinstance(end, Unavailable) or not isinstance(end, JobwireError)):
                raise end
            found[key[1]] = end
        return [found[job_id] if job_id in found else JobNotFound(job_id) for job_id in job_ids]

    async def read_many_confirmed(self, account_id: int, job_ids: Sequence[str]) -> list[ReadyAnswer | JobwireError]:
        """As `read_many`, and no older than what Postgres holds when this is called, whether Redis was told or not."""
        found = await self.read_many(account_id, job_ids)
        versions = await self._versions([(account_id, job_id) for job_id in job_ids])
        older = [n for n, version in enumerate(versions) if _version_of(found[n]) != version and is_job_id(job_ids[n])]
        reads = (self._confirmed((account_id, job_ids[n])) for n in older)
        for n, answer in zip(older, await asyncio.gather(*reads), strict=True):
            found[n] = answer
        return found

    async def _confirmed(self, key: JobKey) -> ReadyAnswer | JobwireError:
        ready = await self._from_postgres(key)
        try:
            return self._present(key, ready)
        except JobwireError as absent:
            return absent

    async def close(self) -> None:
        """Waits for what is in flight."""
        await self._truth_of_batches.close()
        await self._truth.close()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _readings(self, keys: Sequence[JobKey], held: Sequence[ReadyAnswer | None]) -> list[Reading]:
        """What Redis says of each, asked in one turn; where it says nothing, Postgres knows."""
        readings: list[Reading] = []
        try:
            versions = [answer.version if answer is not None else 0 for answer in held]
            asked = [self._cache.read(key, version) for key, version in zip(keys, versions, strict=True)]
        except RedisAway:
            return [MISS_OF_ANOTHER] * len(keys)
        for future in asked:
            try:
                readings.append(await future)
            except RedisAway:
                readings.append(MISS_OF_ANOTHER)
        return readings

    def _at_hand(self, key: JobKey, held: ReadyAnswer | None, reading: Reading) -> ReadyAnswer | None:
        """What memory or Redis has, or None where Postgres must be asked. Raises JobNotFound and its kind."""
        if isinstance(reading, NothingNewer):
            assert held is not None, "Redis has nothing newer only than what is held"
            self.from_memory += 1
            return held
        if isinstance(reading, Newer):
            self.from_redis += 1
            return self._present(key, reading.ready)
        return None

    async def _beyond(self, key: JobKey, held: ReadyAnswer | None, reading: Reading) -> ReadyAnswer:
        """What Postgres has."""
        if isinstance(reading, Unverified):
            return self._present(key, await self._verified(key, reading.ready or held))
        ready = await self._from_postgres(key)
        if isinstance(reading, Miss) and reading.lease is not None:
            self._fill_later(key, ready, reading.lease)
        return self._present(key, ready)

    async def _verified(self, key: JobKey, unverified: Ready | None) -> Ready:
        """Compares an entry that nobody compared for a minute; with Postgres away the entry is what there is."""
        if unverified is not None and self.may_be_stale:  # known already: a reader need not wait for it
            self.from_redis += 1
            return unverified
        try:
            ready = await self._from_postgres(key)
        except Unavailable:
            if unverified is None:
                raise
            self.from_redis += 1
            return unverified
        self._later(self._cache.verify([(*key, ready)]))
        return ready

    async def _from_postgres(self, key: JobKey) -> Ready:
        reads = self._truth if batch_of(key) is None else self._truth_of_batches
        ready = await reads.read(key)
        self.from_postgres += 1
        return ready

    def _present(self, key: JobKey, ready: Ready) -> ReadyAnswer:
        if isinstance(ready, Absence):
            self._memory.drop(key)
            raise absent_job(ready.kind, key[1], ready.expired_at)
        return self._memory.keep(key, ready)

    def _fill_later(self, key: JobKey, ready: Ready, lease: str) -> None:
        """All fills of one turn under one lease are one call, and of one key only that under its newest lease."""
        if not self._fills:
            asyncio.get_running_loop().call_soon(self._fill)
        self._fills[key] = lease, ready

    def _fill(self) -> None:
        fills, self._fills = self._fills, {}
        of_lease: dict[str, list[tuple[int, str, Ready]]] = {}
        for key, (lease, ready) in fills.items():
            of_lease.setdefault(lease, []).append((*key, ready))
        for lease, items in of_lease.items():
            self._later(self._cache.fill(items, lease))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """The reader does not wait for what only helps the next one."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _version_of(found: ReadyAnswer | JobwireError) -> int | None:
    return found.version if isinstance(found, ReadyAnswer) else None
