"""What reporting does: create, report, result, cancel, retry, delete. Knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from schemas.shapes import shape_a
from service.batch import Batch
from service.errors import (
    AlreadyExists,
    BatchClosed,
    BatchNotFound,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidTransition,
    JobwireError,
    PreconditionFailed,
    ResultFinal,
    StaleAttempt,
    Unavailable,
    UnknownAttempt,
    ValidationFailed,
    absent_job,
)
from service.job import (
    CANCELLED,
    COMPLETED,
    QUEUED,
    Job,
    NewJob,
    Report,
    allowed_after,
    failure,
    mint_id,
    mint_public_id,
)
from service.reporting.announcer import Announcer, written_by
from service.reporting.collector import Collector, Taken
from service.stores.answers import Written, deletion_notice
from service.stores.batch_table import BatchTable
from service.stores.connections import Connection, Postgres
from service.stores.job_table import (
    ABSENCES,
    BadValue,
    BatchIsClosed,
    BatchSizeDiffers,
    FirstAnswer,
    IdTaken,
    JobTable,
    Verdict,
)
from service.stores.ready import ReadyAnswer


@dataclass(slots=True)
class Reported:
    """A report that was committed. `told`: every reader sees it by now."""

    answer: ReadyAnswer
    told: bool


@dataclass(slots=True)
class Created:
    """A creation that was committed, now or (`repeated`) by an earlier request with the same Idempotency-Key.

    `body`: JSON. `location`: of the job, where one alone was created.
    """

    body: bytes
    location: str | None
    repeated: bool
    told: bool


@dataclass(slots=True)
class Idempotency:
    """The Idempotency-Key of a creation and the hash of what was asked."""

    key: str
    request_hash: bytes


class Reporting:
    """Every method returns after the commit, and after Redis was told or could not be."""

    def __init__(
        self,
        postgres: Postgres,
        table: JobTable,
        batches: BatchTable,
        collector: Collector,
        announcer: Announcer,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._postgres = postgres
        self._table = table
        self._batches = batches
        self._collector = collector
        self._announcer = announcer
        self._now_ms = now_ms

    async def create(
        self, account_id: int, jobs: Sequence[NewJob], *, as_one: bool, idempotency: Idempotency | None
    ) -> Created:
        """All `jobs` or none. `as_one`: the answer is the job itself, not `{"jobs": [...]}`."""
        self._mint_missing_ids(jobs)
        _refuse_repeated_ids(jobs)
        close_batches = sorted({job.batch_id for job in jobs if job.close_batch and job.batch_id is not None})
        try:
            async with self._postgres.transaction() as connection:
                first = await self._first_answer(connection, account_id, idempotency)
                if first is None:
                    created, xid = await self._table.create(connection, account_id, jobs, close_batches)
                    answer, xids = _creation_answer(created, as_one), [xid]
                    if idempotency is not None:
                        answer.request_hash = idempotency.request_hash
                        await self._table.keep_first_answer(connection, account_id, idempotency.key, answer)
                else:
                    created, answer, xids = [], first, []
        except IdTaken as error:
            raise _id_taken(error) from error
        except BatchIsClosed as error:
            raise BatchClosed(f"Batch {error} is closed", batch_id=str(error)) from error
        except BatchSizeDiffers as error:
            reason = f"Contradicts what was announced for batch {error}, or is less than the jobs it has."
            raise ValidationFailed({"batch_size": [reason]}) from error
        # A repeat is told too: whoever took the first request may not have come to it yet.
        present = created or await self._present(account_id, answer)
        _, told = await self._announcer.tell_changed(
            [Written(job, repeated=not created) for job in present], xids, _batches_of(present)
        )
        return Created(answer.body, answer.location, repeated=not created, told=told)

    async def report(self, report: Report) -> Reported:
        """One report. Raises the error that its verdict means."""
        return _reported(await self._take(report), report)

    async def report_many(self, reports: Sequence[Report]) -> tuple[list[Reported | JobwireError], bool]:
        """One end per report, in the order given; reports on one job are taken in order. And whether all were told."""
        futures = [self._collector.take(report) for report in reports]
        ends: list[Reported | JobwireError] = []
        for report, future in zip(reports, futures, strict=True):
            try:
                ends.append(_reported(await future, report))
            except BadValue:
                ends.append(_unstorable())
            except JobwireError as error:
                ends.append(error)
        return ends, all(end.told for end in ends if isinstance(end, Reported))

    async def cancel(self, report: Report, reason: str | None) -> Reported:
        """Ends a job that nobody wants any more; again is fine."""
        report.status = CANCELLED
        report.error, report.error_details = failure(reason, None)
        return await self.report(report)

    async def retry(self, report: Report) -> Reported:
        """FAILED back to queued, as a new attempt with nothing left of the last one."""
        report.status = QUEUED
        report.retry = True
        return await self.report(report)

    async def put_result(self, report: Report, content_type: str, body: bytes, *, complete: bool) -> Reported:
        """Stores a result; `complete` finishes the job in the same commit."""
        if complete:
            report.status = COMPLETED
        digest = hashlib.sha256(content_type.encode() + b"\0" + body).digest()
        verdict = await self._table.report_result(report, content_type, digest, body)
        if verdict.job is None:
            raise refusal(verdict, report)
        answers, told = await self._announcer.tell_changed(
            [written_by(verdict, verdict.job)],
            [verdict.xid] if verdict.xid else [],
            _batches_of([verdict.job]) if complete else (),
        )
        return Reported(answers[0], told)

    async def close_batch(self, account_id: int, batch_id: str) -> tuple[Batch, bool]:
        """The batch, which takes no more jobs, and whether every reader sees that by now. Raises BatchNotFound."""
        found, xid = await self._batches.close(account_id, batch_id)
        [batch] = await self._batches.read([(account_id, batch_id)])
        if not found or batch is None:
            raise BatchNotFound(batch_id)
        return batch, await self._announcer.tell_batch(account_id, batch_id, [xid] if xid else [])

    async def delete(self, account_id: int, job_id: str, if_match: str | None) -> bool:
        """Removes a job in any state. Whether every reader knows by now."""
        deletion = await self._table.delete(account_id, job_id, if_match)
        if deletion.outcome == "precondition_failed":
            raise PreconditionFailed(job_id=job_id)
        if deletion.outcome != "deleted_now":
            raise absent_job(deletion.outcome, job_id, deletion.expired_at)
        notice = deletion_notice(
            (account_id, job_id),
            deletion.version,
            batch_id=deletion.batch_id,
            user_id=deletion.user_id,
            tags=deletion.tags,
            previous_status=deletion.held_status,
        )
        return await self._announcer.tell_deleted(notice, deletion.xid or "")

    async def _first_answer(
        self, connection: Connection[Any], account_id: int, idempotency: Idempotency | None
    ) -> FirstAnswer | None:
        """What the first request with this Idempotency-Key was answered; the key is taken until the transaction ends.

        Raises IdempotencyInFlight, IdempotencyMismatch.
        """
        if idempotency is None:
            return None
        if not await self._table.lock_idempotency_key(connection, account_id, idempotency.key):
            raise IdempotencyInFlight()
        first = await self._table.first_answer(connection, account_id, idempotency.key)
        if first is not None and first.request_hash != idempotency.request_hash:
            raise IdempotencyMismatch()
        return first

    async def _present(self, account_id: int, answer: FirstAnswer) -> list[Job]:
        """The jobs of a creation as they are now; those that are gone are left out."""
        body = orjson.loads(answer.body)
        shapes = body["jobs"] if answer.location is None else [body]
        found = await self._table.read([(account_id, shape["id"]) for shape in shapes])
        return [job for job in found if isinstance(job, Job)]

    async def _take(self, report: Report) -> Taken:
        try:
            return await self._collector.take(report)
        except BadValue as error:
            raise _unstorable() from error

    def _mint_missing_ids(self, jobs: Sequence[NewJob]) -> None:
        for job in jobs:
            if not job.id:
                job.id = mint_public_id() if job.public else mint_id(self._now_ms())


def refusal(verdict: Verdict, report: Report) -> JobwireError:
    """The error that a verdict means, when the report was not taken."""
    if verdict.outcome in ABSENCES:
        return absent_job(verdict.outcome, report.id, verdict.expired_at)
    status = verdict.held_status or QUEUED
    known = {"job_id": report.id, "current_status": status}
    match verdict.outcome:
        case "invalid_transition":
            wanted = "be retried" if report.retry else f"become {report.status}" if report.status else "take progress"
            return InvalidTransition(
                f"Job {report.id} is {status} and cannot {wanted}", allowed=list(allowed_after(status)), **known
            )
        case "stale_attempt":
            return StaleAttempt(current_attempt=verdict.held_attempt, **known)
        case "unknown_attempt":
            return UnknownAttempt(current_attempt=verdict.held_attempt, **known)
        case "result_final":
            return ResultFinal(**known)
        case "precondition_failed":
            return PreconditionFailed(**known)
        case "metadata_too_large":
            return ValidationFailed({"metadata": ["Together with what is stored it is larger than 16 KiB."]})
        case _:
            return Unavailable()


def _reported(taken: Taken, report: Report) -> Reported:
    if taken.answer is None:
        raise refusal(taken.verdict, report)
    return Reported(taken.answer, taken.told)


def _unstorable() -> ValidationFailed:
    return ValidationFailed({"_schema": ["Postgres cannot store a value in this report."]})


def _refuse_repeated_ids(jobs: Sequence[NewJob]) -> None:
    times = Counter(job.id for job in jobs)
    repeated = {str(n): {"id": ["Stands twice in this array."]} for n, job in enumerate(jobs) if times[job.id] > 1}
    if repeated:
        raise ValidationFailed(repeated)


def _batches_of(jobs: Sequence[Job]) -> set[tuple[int, str]]:
    return {(job.account_id, job.batch_id) for job in jobs if job.batch_id is not None}


def _creation_answer(created: Sequence[Job], as_one: bool) -> FirstAnswer:
    shapes = [shape_a(job) for job in created]
    if as_one:
        return FirstAnswer(b"", orjson.dumps(shapes[0]), f"/jobs/{created[0].id}")
    return FirstAnswer(b"", orjson.dumps({"jobs": shapes}), None)


def _id_taken(error: IdTaken) -> AlreadyExists:
    if error.deleted:
        return AlreadyExists(
            f"The id {error.job_id} belonged to a job that is gone; it can be used again 30 days after",
            job_id=error.job_id,
        )
    return AlreadyExists(f"Job {error.job_id} already exists", job_id=error.job_id)
