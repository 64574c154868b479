"""`Prefer: wait`: holds a poll until the job changes, or ends. Woken by the change itself; read through the same gate."""

from __future__ import annotations

import asyncio
from typing import Final

from service.hub import Hub
from service.job import FINISHED
from service.polling.operation import StatusReader
from service.stores.event_channel import DELETED, Notice
from service.stores.ready import ReadyAnswer

LONGEST_WAIT_s: Final = 30


class Waker:
    """A poll that sleeps. It is woken only by what it waits for."""

    def __init__(self, *, for_the_end: bool) -> None:
        self.version = 0
        self._for_the_end = for_the_end
        self._woken = asyncio.Event()
        self.abandoned = False

    def hear(self, notice: Notice) -> None:
        """Wakes up for a newer version or, waiting for the end, for a finished one."""
        ends = notice.status in FINISHED or notice.status == DELETED
        if notice.status == DELETED or (notice.version > self.version and (ends or not self._for_the_end)):
            self._woken.set()

    def resync(self) -> None:
        """Something may have been missed."""
        self._woken.set()

    def abandon(self) -> None:
        """The client has hung up."""
        self.abandoned = True
        self._woken.set()

    async def sleep(self, until: float) -> bool:
        """True when woken, False at `until` (the loop's time)."""
        try:
            async with asyncio.timeout_at(until):
                await self._woken.wait()
        except TimeoutError:
            return False
        self._woken.clear()
        return True


class Waiting:
    """Holds polls. `held` is how many are held now."""

    def __init__(self, reader: StatusReader, hub: Hub) -> None:
        self._reader = reader
        self._hub = hub
        self.held = 0

    async def read(self, account_id: int, job_id: str, waker: Waker, known_etag: str | None, wait_s: int) -> ReadyAnswer:
        """The job once its ETag is not `known_etag` or, with None, once it is finished; after `wait_s`, as it is.

        Raises what StatusReader.read raises.
        """
        until = asyncio.get_running_loop().time() + wait_s
        self.held += 1
        try:
            async with self._hub.follow((account_id, job_id), waker):
                while True:
                    answer = await self._reader.read(account_id, job_id)
                    waker.version = answer.version
                    if _is_awaited(answer, known_etag) or not await waker.sleep(until) or waker.abandoned:
                        return answer
        finally:
            self.held -= 1


def _is_awaited(answer: ReadyAnswer, known_etag: str | None) -> bool:
    return answer.status in FINISHED if known_etag is None else answer.etag != known_etag
