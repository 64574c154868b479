"""Misses of many readers become one read of Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from service.stores.ready import JobKey, Ready

ReadAll = Callable[[Sequence[JobKey]], Awaitable[list[Ready]]]


class JoinedReads:
    """A miss joins the next read that has not been sent yet, never one in flight: that may have looked too early."""

    def __init__(self, read_all: ReadAll) -> None:
        """`read_all`: reads any number of keys, in the order given."""
        self._read_all = read_all
        self._next: dict[JobKey, asyncio.Future[Ready]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def read(self, key: JobKey) -> Ready:
        """What Postgres says of a job now. Raises Unavailable. A cancelled caller cancels nobody else's read."""
        future = self._next.get(key)
        if future is None:
            if not self._next:
                self._start()
            future = self._next[key] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(future)

    async def close(self) -> None:
        """Waits for the reads in flight."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self) -> None:
        task = asyncio.get_running_loop().create_task(self._send())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self) -> None:
        """Runs in the next turn of the loop, so all misses of this one are in it."""
        waiting, self._next = self._next, {}
        try:
            found = await self._read_all(list(waiting))
        except Exception as error:
            for future in waiting.values():
                future.set_exception(error)
                future.exception()  # seen, even where every caller has gone
        else:
            for future, ready in zip(waiting.values(), found, strict=True):
                future.set_result(ready)
