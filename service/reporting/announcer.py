"""After the commit: Redis, this process's memory and everyone who follows hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from service.job import Job
from service.stores.answers import Written, batch_change_of, change_of, deletion_of, ready_answer
from service.stores.event_channel import Notice
from service.stores.job_table import Verdict
from service.stores.outbox_table import OutboxTable
from service.stores.ready import ReadyAnswer
from service.stores.status_cache import Change, StatusCache
from service.stores.status_memory import StatusMemory

BatchName = tuple[int, str]
"""Account id and batch id."""

AT_A_TIME: Final = 50


def written_by(verdict: Verdict, job: Job) -> Written:
    """`job` as a report left it."""
    return Written(job, verdict.held_status, verdict.held_stalled, repeated=verdict.outcome == "same")


class Announcer:
    """Tells what was committed. What cannot be told stays in the outbox, and the relay tells it later."""

    def __init__(self, cache: StatusCache, memory: StatusMemory, outbox: OutboxTable) -> None:
        self._cache = cache
        self._memory = memory
        self._outbox = outbox
        self.untold = 0  # commits acknowledged before Redis knew

    async def tell_changed(
        self, written: Sequence[Written], xids: Iterable[str], batches: Iterable[BatchName] = ()
    ) -> tuple[list[ReadyAnswer], bool]:
        """The ready answers of the jobs, and whether Redis has them by now, with the `batches` whose counts moved."""
        answers = []
        for one in written:
            answers.append(ready_answer(one.job))
            if len(answers) % AT_A_TIME == 0:  # a thousand at once would hold up every poll
                await asyncio.sleep(0)
        changes = [change_of(one, answer) for one, answer in zip(written, answers, strict=True)]
        changes += [batch_change_of(*batch) for batch in sorted(set(batches))]
        told = await self._tell(changes, xids)
        for one, answer in zip(written, answers, strict=True):
            self._memory.keep((one.job.account_id, one.job.id), answer)
        return answers, told

    async def tell_deleted(self, notice: Notice, xid: str) -> bool:
        """Whether Redis has forgotten the job by now."""
        self._memory.drop(notice.key)
        changes = [deletion_of(notice)]
        if notice.batch_id is not None:
            changes.append(batch_change_of(notice.account_id, notice.batch_id))
        return await self._tell(changes, [xid])

    async def tell_batch(self, account_id: int, batch_id: str, xids: Iterable[str]) -> bool:
        """Whether Redis has forgotten what a batch was by now."""
        return await self._tell([batch_change_of(account_id, batch_id)], xids)

    async def _tell(self, changes: Sequence[Change], xids: Iterable[str]) -> bool:
        told = await self._cache.put(changes)
        if not told:
            self.untold += 1
            return False
        for xid in xids:
            self._outbox.settle(xid)
        return True
