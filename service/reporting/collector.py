"""The group commit: reports that arrive while a statement is in flight travel together in the next one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

from service.errors import Locked
from service.job import Report
from service.reporting.announcer import Announcer, written_by
from service.stores.job_table import BadValue, JobTable, Verdict
from service.stores.ready import ReadyAnswer

SHARDS: Final = 4
MOST_IN_ONE_STATEMENT: Final = 500
SINGLY_FOR_s: Final = 4.0
"""How long the reports of a statement that failed may take when they are run one by one."""


@dataclass(slots=True)
class Taken:
    """The end of one report: the verdict, the ready answer if it was taken, and whether Redis knows by now."""

    verdict: Verdict
    answer: ReadyAnswer | None
    told: bool


@dataclass(slots=True)
class _Waiting:
    report: Report
    end: asyncio.Future[Taken]

    @property
    def job(self) -> tuple[int, str]:
        return self.report.account_id, self.report.id

    def fail(self, error: BaseException) -> None:
        if not self.end.done():
            self.end.set_exception(error)

    def succeed(self, taken: Taken) -> None:
        if not self.end.done():
            self.end.set_result(taken)


@dataclass(slots=True)
class Commits:
    """What was committed: statements, the reports in them, the seconds that they took. `split`: run singly instead."""

    statements: int = 0
    reports: int = 0
    seconds: float = 0.0
    split: int = 0


class Collector:
    """Shards reports by job. A shard has one statement in flight and sends the next as soon as it is back: no timer."""

    def __init__(self, table: JobTable, announcer: Announcer) -> None:
        self.commits = Commits()
        self._shards = [_Shard(table, announcer, self.commits) for _ in range(SHARDS)]

    def take(self, report: Report) -> asyncio.Future[Taken]:
        """Ends after the commit, and after Redis was told or could not be. Reports on one job are taken in order.

        Raises Unavailable when it is not known to be committed; such a report is never sent twice from here.
        A caller that is cancelled takes nobody else's report with it: the statement is not its own.
        """
        shard = self._shards[crc32(f"{report.account_id}:{report.id}".encode()) % SHARDS]
        return shard.add(report)

    async def close(self) -> None:
        """Waits for all that is in flight."""
        await asyncio.gather(*(shard.close() for shard in self._shards))


class _Shard:
    def __init__(self, table: JobTable, announcer: Announcer, commits: Commits) -> None:
        self._table = table
        self._commits = commits
        self._announcer = announcer
        self._waiting: deque[_Waiting] = deque()
        self._committing = False
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, report: Report) -> asyncio.Future[Taken]:
        waiting = _Waiting(report, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if not self._committing:
            self._committing = True
            self._spawn(self._commit_all())
        return waiting.end

    async def close(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _commit_all(self) -> None:
        """One statement after the other until nothing waits. What was committed is told beside the next statement."""
        try:
            while self._waiting:
                await self._commit(self._next_group())
        finally:
            self._committing = False

    def _next_group(self) -> list[_Waiting]:
        """The longest-waiting reports, a job at most once; its second report waits for the next statement."""
        group: dict[tuple[int, str], _Waiting] = {}
        left: list[_Waiting] = []
        while self._waiting and len(group) < MOST_IN_ONE_STATEMENT:
            waiting = self._waiting.popleft()
            if waiting.job in group:
                left.append(waiting)
            else:
                group[waiting.job] = waiting
        self._waiting.extendleft(reversed(left))
        return list(group.values())

    async def _commit(self, group: Sequence[_Waiting]) -> None:
        sent_at = time.perf_counter()
        try:
            verdicts = await self._table.report([waiting.report for waiting in group])
        except (BadValue, Locked) as error:
            if len(group) > 1:
                await self._commit_singly(group)
            elif isinstance(error, Locked):
                self._fail([*group, *self._behind(group)], error)
            else:
                self._fail(group, error)
        except BaseException as error:
            self._fail([*group, *self._behind(group)], error)
            if not isinstance(error, Exception):
                raise
        else:
            self._commits.statements += 1
            self._commits.reports += len(group)
            self._commits.seconds += time.perf_counter() - sent_at
            self._spawn(self._tell(group, verdicts))

    async def _commit_singly(self, group: Sequence[_Waiting]) -> None:
        """One bad value, or one job that another writer keeps locked, must not fail the others: each alone, once.

        Every lock is waited for, so where many are kept not all get their turn.
        """
        self._commits.split += 1
        until = asyncio.get_running_loop().time() + SINGLY_FOR_s
        for n, waiting in enumerate(group):
            if asyncio.get_running_loop().time() > until:
                rest = group[n:]
                self._fail([*rest, *self._behind(rest)], Locked())
                return
            await self._commit([waiting])

    def _fail(self, waiting: Sequence[_Waiting], error: BaseException) -> None:
        for one in waiting:
            one.fail(error)

    def _behind(self, group: Sequence[_Waiting]) -> list[_Waiting]:
        """Takes out what waits for the same jobs. Each in turn would wait as long again for a store that is away."""
        jobs = {waiting.job for waiting in group}
        behind = [waiting for waiting in self._waiting if waiting.job in jobs]
        self._waiting = deque(waiting for waiting in self._waiting if waiting.job not in jobs)
        return behind

    async def _tell(self, group: Sequence[_Waiting], verdicts: Sequence[Verdict]) -> None:
        """Tells what was taken. A repeated state is told too: whoever made it may not have come to it yet."""
        written = [written_by(verdict, verdict.job) for verdict in verdicts if verdict.job is not None]
        xids = {verdict.xid for verdict in verdicts if verdict.xid is not None}
        batches = {
            (verdict.job.account_id, verdict.job.batch_id)
            for waiting, verdict in zip(group, verdicts, strict=True)
            if verdict.job is not None and verdict.job.batch_id is not None and waiting.report.status is not None
        }
        try:
            answers, told = await self._announcer.tell_changed(written, xids, batches) if written else ([], True)
        except Exception as error:
            for waiting in group:
                waiting.fail(error)
            return
        ready = iter(answers)
        for waiting, verdict in zip(group, verdicts, strict=True):
            waiting.succeed(Taken(verdict, next(ready) if verdict.job is not None else None, told))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
