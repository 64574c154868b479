"""What Postgres says now of jobs and batches alike: under one kind of key, as ready answers."""

from __future__ import annotations

from collections.abc import Sequence

from service.job import Job
from service.stores.answers import ready_answer, ready_batch
from service.stores.batch_table import BatchTable
from service.stores.job_table import JobTable
from service.stores.keys import batch_of
from service.stores.ready import Absence, JobKey, Ready


class Truth:
    """Jobs by (account id, job id) and batches by `keys.batch_key`, in any mixture."""

    def __init__(self, jobs: JobTable, batches: BatchTable) -> None:
        self._jobs = jobs
        self._batches = batches

    async def read(self, keys: Sequence[JobKey]) -> list[Ready]:
        """In the order asked; an Absence says why one is not there. Raises Unavailable."""
        jobs, batches = _apart(keys)
        found: dict[JobKey, Ready] = {}
        if jobs:
            for key, job in zip(jobs, await self._jobs.read(jobs), strict=True):
                found[key] = ready_answer(job) if isinstance(job, Job) else job
        if batches:
            for key, batch in zip(batches, await self._batches.read(list(batches.values())), strict=True):
                found[key] = ready_batch(batch) if batch is not None else Absence("not_found")
        return [found[key] for key in keys]

    async def versions(self, keys: Sequence[JobKey]) -> list[int | None]:
        """In the order asked; None where there is none. Raises Unavailable."""
        jobs, batches = _apart(keys)
        found: dict[JobKey, int | None] = {}
        if jobs:
            found |= zip(jobs, await self._jobs.versions(jobs), strict=True)
        if batches:
            found |= zip(batches, await self._batches.versions(list(batches.values())), strict=True)
        return [found[key] for key in keys]


def _apart(keys: Sequence[JobKey]) -> tuple[list[JobKey], dict[JobKey, JobKey]]:
    """The keys of jobs, and those of batches with what the table of batches calls them."""
    batches = {key: (key[0], batch_id) for key in keys if (batch_id := batch_of(key)) is not None}
    return [key for key in keys if key not in batches], batches
