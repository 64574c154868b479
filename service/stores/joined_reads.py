"""Misses of many readers become one read of Postgres; what is dear to read is read no more often than it must be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from service.stores.ready import JobKey, Ready

ReadAll = Callable[[Sequence[JobKey]], Awaitable[list[Ready]]]

APART_s: Final = 0.02
"""What never rests is read at most 50 times a second; who asks waits for that no longer than for most networks."""


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
                _fail(future, error)
        else:
            for future, ready in zip(waiting.values(), found, strict=True):
                future.set_result(ready)


class SpacedReads:
    """Of one key no two reads are under way at once, and they begin at least APART_s apart.

    Whoever asks meanwhile shares the next, which is sent after all of them have asked: nobody is told what is older
    than their question. A key that is asked for rarely is read at once.
    """

    def __init__(self, reads: JoinedReads) -> None:
        self._reads = reads
        self._next: dict[JobKey, asyncio.Future[Ready]] = {}
        self._served: dict[JobKey, asyncio.Task[None]] = {}

    async def read(self, key: JobKey) -> Ready:
        """As JoinedReads.read."""
        asked = self._next.get(key)
        if asked is None:
            asked = self._next[key] = asyncio.get_running_loop().create_future()
            if key not in self._served:
                self._served[key] = asyncio.get_running_loop().create_task(self._serve(key))
        return await asyncio.shield(asked)

    async def close(self) -> None:
        """Waits for the reads in flight."""
        while self._served:
            await asyncio.wait(self._served.values())

    async def _serve(self, key: JobKey) -> None:
        """Until nobody asks any more."""
        loop = asyncio.get_running_loop()
        while (asked := self._next.pop(key, None)) is not None:
            again_at = loop.time() + APART_s
            try:
                asked.set_result(await self._reads.read(key))
            except Exception as error:
                _fail(asked, error)
                if (behind := self._next.pop(key, None)) is not None:  # it would wait as long again
                    _fail(behind, error)
            await asyncio.sleep(max(0.0, again_at - loop.time()))
        del self._served[key]


def _fail(future: asyncio.Future[Ready], error: Exception) -> None:
    future.set_exception(error)
    future.exception()  # seen, even where every caller has gone
