"""Many jobs at once, and batches, through the same gate as one job."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import BatchNotFound, JobNotFound
from service.polling.operation import Waiting, Waker
from service.status_reader import StatusReader
from service.stores.answers import ready_batch
from service.stores.batch_table import BatchTable
from service.stores.joined_reads import JoinedReads, SpacedReads
from service.stores.keys import batch_key, batch_of
from service.stores.ready import Absence, JobKey, Ready, ReadyAnswer


class BatchReader:
    """A batch as one answer. Shown with its jobs' progress it is read from Postgres, because progress moves without
    the batch's version: all who ask while it is read share the next read."""

    def __init__(self, batches: BatchTable, reader: StatusReader) -> None:
        self._batches = batches
        self._reader = reader
        self._with_progress = SpacedReads(JoinedReads(self._read_with_progress))

    async def read(self, account_id: int, batch_id: str) -> ReadyAnswer:
        """Raises BatchNotFound, Unavailable."""
        try:
            return await self._reader.read(*batch_key(account_id, batch_id))
        except JobNotFound:
            raise BatchNotFound(batch_id) from None

    async def wait(self, waiting: Waiting, account_id: int, batch_id: str, waker: Waker, wait_s: int) -> ReadyAnswer:
        """Once it has changed, or is over; see Waiting. Raises BatchNotFound, Unavailable."""
        try:
            return await waiting.read(*batch_key(account_id, batch_id), waker, wait_s)
        except JobNotFound:
            raise BatchNotFound(batch_id) from None

    async def read_with_progress(self, account_id: int, batch_id: str) -> ReadyAnswer:
        """Raises BatchNotFound, Unavailable."""
        ready = await self._with_progress.read(batch_key(account_id, batch_id))
        if isinstance(ready, Absence):
            raise BatchNotFound(batch_id)
        return ready

    async def _read_with_progress(self, keys: Sequence[JobKey]) -> list[Ready]:
        found = await self._batches.read([(key[0], batch_of(key) or "") for key in keys], with_progress=True)
        return [Absence("not_found") if batch is None else ready_batch(batch, include_progress=True) for batch in found]
