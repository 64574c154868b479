"""What reading one job means beyond its status: its result, its history, and waiting for a change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import orjson

from service.errors import NoResult, NotFinished, ResultNotFound, Unauthorized
from service.hub import Hub
from service.job import COMPLETED, FINISHED
from service.status_reader import StatusReader
from service.stores.event_channel import DELETED, Notice
from service.stores.job_table import JobTable, StoredResult
from service.stores.ready import JobKey, ReadyAnswer


class ResultReader:
    """Results and histories, which are read from Postgres; what an unfinished job has to say comes from the cache."""

    def __init__(self, table: JobTable, reader: StatusReader) -> None:
        self._table = table
        self._reader = reader

    async def result(self, account_id: int, job_id: str) -> StoredResult:
        """Raises NotFinished, NoResult, ResultNotFound beside what StatusReader.read raises."""
        _must_be_completed(job_id, await self._reader.read(account_id, job_id))
        result = await self._table.result(account_id, job_id)
        if result is None:
            # Deleted in between, perhaps: then this says so.
            _must_be_completed(job_id, await self._reader.read(account_id, job_id))
            raise ResultNotFound(job_id)
        return result

    async def history(
        self, account_id: int, job_id: str, after_version: int, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """At most `limit` changes after a version, oldest first, and whether there are more."""
        await self._reader.read(account_id, job_id)
        changes = await self._table.history(account_id, job_id, after_version, limit + 1)
        return changes[:limit], len(changes) > limit


def _must_be_completed(job_id: str, answer: ReadyAnswer) -> None:
    """Raises NotFinished, NoResult."""
    if answer.status not in FINISHED:
        raise NotFinished(job_id, answer.retry_after_s or 2)
    if answer.status != COMPLETED:
        reason = orjson.loads(answer.shape_a)["error"]
        raise NoResult(f"Job {job_id} failed: {reason}", job_id=job_id, current_status=answer.status)


class Waker:
    """A poll that sleeps, woken only by what it waits for: a version that is not known or (None) the end.

    `over`: it waits no longer. `refused`: its key is no longer valid. `on_doubt` is called with it when something may
    have been missed, and ends in `wake` if that is what it waits for.
    """

    def __init__(self, key_id: str, *, is_known: Callable[[str], bool] | None) -> None:
        """`is_known`: whether the client has the version with this ETag."""
        self.key_id = key_id
        self.version = 0
        self.over = False
        self.refused = False
        self.on_doubt: Callable[[Waker], object] = Waker.wake
        self._is_known = is_known
        self._woken = asyncio.Event()

    def is_satisfied_by(self, answer: ReadyAnswer) -> bool:
        """Whether this is what it waits for."""
        return answer.finished if self._is_known is None else not self._is_known(answer.etag)

    def hear(self, notice: Notice) -> None:
        """Wakes up for a newer version or, waiting for the end, for a finished one."""
        ends = notice.status in FINISHED or notice.status == DELETED
        if notice.version > self.version and (ends or self._is_known is not None):
            self.wake()

    def resync(self, version: int = 0) -> None:
        """Something may have been missed."""
        self.on_doubt(self)

    def wake(self) -> None:
        """There is something to look at."""
        self._woken.set()

    def reset(self) -> None:
        """Versions begin anew."""
        self.version = 0
        self._woken.set()

    def give_up(self) -> None:
        """The client has hung up, or this process ends."""
        self.over = True
        self.wake()

    def refuse(self) -> None:
        """The key is no longer valid."""
        self.refused = True
        self.wake()

    async def sleep(self, until: float) -> None:
        """Until woken; at `until` (the loop's time) it is over."""
        try:
            async with asyncio.timeout_at(until):
                await self._woken.wait()
        except TimeoutError:
            self.over = True
        self._woken.clear()


class Waiting:
    """Holds polls until their job changes."""

    def __init__(self, reader: StatusReader, hub: Hub) -> None:
        self._reader = reader
        self._hub = hub
        self._held: set[Waker] = set()
        self._in_doubt: dict[JobKey, list[Waker]] = {}
        self._looks: set[asyncio.Task[None]] = set()
        self._closing = False

    def __len__(self) -> int:
        return len(self._held)

    async def read(self, account_id: int, job_id: str, waker: Waker, wait_s: int) -> ReadyAnswer:
        """The job once `waker` is satisfied; after `wait_s`, as it is then.

        Raises Unauthorized once the key is no longer valid, beside what StatusReader.read raises.
        """
        until = asyncio.get_running_loop().time() + wait_s
        key = (account_id, job_id)
        waker.on_doubt = partial(self._doubt, key)
        self._held.add(waker)
        if self._closing:
            waker.give_up()
        try:
            async with self._hub.follow(key, waker):
                while True:
                    answer = await self._reader.read(*key)
                    waker.version = answer.version
                    if waker.over or waker.is_satisfied_by(answer):
                        return answer
                    await waker.sleep(until)
                    if waker.refused:
                        raise Unauthorized()
        finally:
            self._held.discard(waker)

    def end_of_keys(self, key_ids: Sequence[str]) -> None:
        """Refuses the polls of keys that are no longer valid."""
        ended = set(key_ids)
        for waker in tuple(self._held):
            if waker.key_id in ended:
                waker.refuse()

    def end_all(self) -> None:
        """Answers every held poll with what there is, now and from now on: this process ends."""
        self._closing = True
        for waker in tuple(self._held):
            waker.give_up()

    def _doubt(self, key: JobKey, waker: Waker) -> None:
        """Of all whom one turn of the event loop leaves in doubt one looks: a batch has many waiters, many changes."""
        if key not in self._in_doubt:
            self._in_doubt[key] = []
            look = asyncio.get_running_loop().create_task(self._look(key))
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)
        self._in_doubt[key].append(waker)

    async def _look(self, key: JobKey) -> None:
        wakers = self._in_doubt.pop(key)
        try:
            answer = await self._reader.read(*key)
        except Exception:  # each meets it by itself
            for waker in wakers:
                waker.wake()
            return
        for waker in wakers:
            waker.version = answer.version
            if waker.is_satisfied_by(answer):
                waker.wake()
