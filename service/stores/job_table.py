"""Jobs in Postgres: the truth. Everything that writes one goes through here; the SQL stands in `job_table.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import asyncpg
import orjson

from schemas.shapes import rfc3339
from service.job import Job, NewJob, Report
from service.stores.connections import Connection, Postgres
from service.stores.queries import load
from service.stores.ready import Absence, AbsenceKind

_SQL: Final = load("job_table")

ABSENCES: Final[tuple[AbsenceKind, ...]] = ("not_found", "forbidden", "deleted", "expired")


@dataclass(slots=True)
class Verdict:
    """What became of one report. `job` is the job afterwards, when the report was taken (`changed`, `same`).

    Other outcomes: those of `ABSENCES`, `precondition_failed`, `stale_attempt`, `unknown_attempt`,
    `invalid_transition`, `result_final`, `metadata_too_large`.
    """

    outcome: str
    job: Job | None
    held_status: str | None
    held_attempt: int | None
    held_stalled: bool | None
    expired_at: str | None
    xid: str | None

    @property
    def taken(self) -> bool:
        """Whether the report was accepted."""
        return self.outcome in ("changed", "same")


@dataclass(slots=True)
class Deletion:
    """What became of a request to delete. `deleted_now` or one of `ABSENCES` or `precondition_failed` in `outcome`.

    `version`: its tombstone's. `held_status`, `batch_id`, `user_id`, `tags`: of the job that was.
    """

    outcome: str
    version: int
    held_status: str | None
    batch_id: str | None
    user_id: str | None
    tags: list[str]
    expired_at: str | None
    xid: str | None


@dataclass(slots=True)
class StoredResult:
    """A result as it was put."""

    content_type: str
    body: bytes
    digest: bytes


@dataclass(slots=True)
class FirstAnswer:
    """What a creation with an Idempotency-Key answered the first time."""

    request_hash: bytes
    body: bytes
    location: str | None


class BadValue(Exception):
    """Postgres refused a value (SQLSTATE class 22 or 23): the report that carries it can never be stored."""


class BatchIsClosed(Exception):
    """A job was to be added to a closed batch; the argument is the batch's id."""


class BatchSizeDiffers(Exception):
    """`batch_size` contradicts what was announced before, or is too small; the argument is the batch's id."""


class IdTaken(Exception):
    """A job has this id (`deleted` False), or had it within the last 30 days (`deleted` True)."""

    def __init__(self, job_id: str, deleted: bool) -> None:
        super().__init__(job_id)
        self.job_id = job_id
        self.deleted = deleted


class JobTable:
    """Reads and writes jobs. Every method raises Unavailable when Postgres cannot be reached."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def report(self, reports: Sequence[Report]) -> list[Verdict]:
        """One commit for all `reports`, at most one per job; one verdict each, in the order given. Raises BadValue."""
        try:
            rows = await self._postgres.fetch(_SQL["report"], *_columns(reports, None, None))
        except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
            raise BadValue(str(error)) from error
        return await self._with_why_absent(reports, [_verdict(row) for row in rows])

    async def report_result(self, report: Report, content_type: str, digest: bytes, body: bytes) -> Verdict:
        """Stores a result and takes the report that came with it, in one commit.

        The bytes are written before the job is locked, so a large result holds up no other report of that job.
        """
        async with self._postgres.transaction() as connection:
            result_id = await connection.fetchval(_SQL["write_result"], content_type, body)
            row = await connection.fetchrow(_SQL["report"], *_columns([report], result_id, digest))
            assert row is not None
            verdict = _verdict(row)
            if verdict.outcome != "changed":
                await connection.execute(_SQL["drop_result"], result_id)
        [verdict] = await self._with_why_absent([report], [verdict])
        return verdict

    async def create(
        self,
        connection: Connection[asyncpg.Record],
        account_id: int,
        jobs: Sequence[NewJob],
        close_batches: Sequence[str],
    ) -> tuple[list[Job], str]:
        """Creates all `jobs` or none, inside the caller's transaction; they come back in the order given, with the xid.

        Raises IdTaken, BatchIsClosed, BatchSizeDiffers: the transaction must then be given up.
        """
        items = orjson.dumps([_item(job) for job in jobs]).decode()
        try:
            rows = await connection.fetch(_SQL["create"], account_id, items, list(close_batches))
        except asyncpg.UniqueViolationError as error:  # another request created it between the check and the insert
            raise IdTaken(_conflicting_id(error), deleted=False) from error
        except asyncpg.PostgresError as error:
            if error.sqlstate == "JW001":
                raise BatchIsClosed(error.detail) from error
            if error.sqlstate == "JW002":
                raise BatchSizeDiffers(error.detail) from error
            if error.sqlstate == "JW003":
                raise IdTaken(error.detail or "", deleted=True) from error
            raise
        for row in rows:
            if row["outcome"] != "created":
                raise IdTaken(row["conflict_id"], deleted=row["outcome"] == "tombstone")
        created = {row["id"]: _job(row) for row in rows}
        xid = await connection.fetchval(_SQL["current_xid"])
        return [created[job.id] for job in jobs], xid

    async def delete(self, account_id: int, job_id: str, if_match: str | None) -> Deletion:
        """Removes a job in any state and leaves its tombstone."""
        row = await self._postgres.fetchrow(_SQL["delete"], account_id, job_id, if_match)
        assert row is not None
        outcome = {"deleted": "deleted_now", "gone_deleted": "deleted", "gone_expired": "expired"}
        return Deletion(
            outcome.get(row["outcome"], row["outcome"]),
            row["version"] or 0,
            row["held_status"],
            row["batch_id"],
            row["user_id"],
            row["tags"] or [],
            _told(row["gone_expired_at"]),
            row["xid"],
        )

    async def read(
        self, keys: Sequence[tuple[int, str]], *, on: Connection[asyncpg.Record] | None = None
    ) -> list[Job | Absence]:
        """Jobs by (account id, job id), in the order asked; an Absence says why one is not there.

        `on`: a connection that the caller holds already.
        """
        rows = await (on or self._postgres).fetch(_SQL["read"], [key[0] for key in keys], [key[1] for key in keys])
        return [_job(row) if row["absence"] is None else _absence(row) for row in rows]

    async def versions(self, keys: Sequence[tuple[int, str]]) -> list[int | None]:
        """The versions of jobs, in the order asked; None where there is no such job."""
        rows = await self._postgres.fetch(_SQL["versions"], [key[0] for key in keys], [key[1] for key in keys])
        return [row["version"] for row in rows]

    async def public_account(self, job_id: str) -> int | None:
        """The account of a public job; None where no public job has this id."""
        row = await self._postgres.fetchrow(_SQL["public_account"], job_id)
        return row["account_id"] if row else None

    async def result(self, account_id: int, job_id: str) -> StoredResult | None:
        """The stored result of a job, or None."""
        row = await self._postgres.fetchrow(_SQL["result"], account_id, job_id)
        return StoredResult(row["content_type"], row["body"], row["result_digest"]) if row else None

    async def history(self, account_id: int, job_id: str, after_version: int, most: int) -> list[dict[str, Any]]:
        """At most `most` changes after a version, oldest first; `at` is a datetime."""
        rows = await self._postgres.fetch(_SQL["history"], account_id, job_id, after_version, most)
        return [dict(row) for row in rows]

    async def _with_why_absent(self, reports: Sequence[Report], verdicts: list[Verdict]) -> list[Verdict]:
        """Looks again for what was not found: a report that waited for a deletion could not see its tombstone yet."""
        missing = [
            (report, verdict)
            for report, verdict in zip(reports, verdicts, strict=True)
            if verdict.outcome in ("not_found", "forbidden")
        ]
        if missing:
            found = await self.read([(report.account_id, report.id) for report, _ in missing])
            for (_, verdict), why in zip(missing, found, strict=True):
                if isinstance(why, Absence):
                    verdict.outcome, verdict.expired_at = why.kind, why.expired_at
        return verdicts

    async def lock_idempotency_key(self, connection: Connection[asyncpg.Record], account_id: int, key: str) -> bool:
        """False while another request with this key runs. Held until the transaction ends."""
        return bool(await connection.fetchval(_SQL["idempotency_lock"], account_id, key))

    async def first_answer(
        self, connection: Connection[asyncpg.Record], account_id: int, key: str
    ) -> FirstAnswer | None:
        """What this key was answered in the last 24 hours."""
        row = await connection.fetchrow(_SQL["idempotency_find"], account_id, key)
        return FirstAnswer(row["request_hash"], row["body"], row["location"]) if row else None

    async def keep_first_answer(
        self, connection: Connection[asyncpg.Record], account_id: int, key: str, answer: FirstAnswer
    ) -> None:
        """Keeps an answer, in the transaction that makes it true."""
        await connection.execute(
            _SQL["idempotency_keep"], account_id, key, answer.request_hash, answer.body, answer.location
        )


def _columns(reports: Sequence[Report], result_id: int | None, digest: bytes | None) -> tuple[list[Any], ...]:
    """`reports` as the arrays that report_jobs takes."""
    return (
        [report.account_id for report in reports],
        [report.id for report in reports],
        [report.status for report in reports],
        [_json(report.progress) for report in reports],
        [report.error for report in reports],
        [_json(report.error_details) for report in reports],
        [_json(report.metadata) for report in reports],
        [report.attempt for report in reports],
        [report.if_match for report in reports],
        [report.retry for report in reports],
        [result_id for _ in reports],
        [digest for _ in reports],
    )


def _item(job: NewJob) -> dict[str, Any]:
    """`job` as create_jobs takes it."""
    return {
        "id": job.id,
        "type": job.type,
        "progress": job.progress,
        "metadata": job.metadata,
        "parameters": job.parameters,
        "batch_id": job.batch_id,
        "batch_size": job.batch_size,
        "tags": job.tags,
        "user_id": job.user_id,
        "pdf_name": job.pdf_name,
        "pdf_hash": job.pdf_hash,
        "file_count": job.file_count,
        "heartbeat_timeout_s": job.heartbeat_timeout,
        "stalled_action": job.stalled_action,
        "public": job.public,
        "notification": job.notification_settings,
        "webhook_url": job.webhook_url,
    }


def _verdict(row: asyncpg.Record) -> Verdict:
    taken = row["outcome"] in ("changed", "same")
    return Verdict(
        row["outcome"],
        _job(row) if taken else None,
        row["held_status"],
        row["held_attempt"],
        row["held_stalled"],
        _told(row["gone_expired_at"]),
        row["xid"],
    )


def _job(row: asyncpg.Record) -> Job:
    return Job(
        account_id=row["account_id"],
        id=row["id"],
        status=row["status"],
        type=row["type"],
        version=row["version"],
        attempt=row["attempt"],
        created_at=row["created_at"],
        changed_at=row["changed_at"],
        updated_at=row["updated_at"],
        started_at=row["started_at"],
        completed_at=row["completed_at"],
        expires_at=row["expires_at"],
        stalled=row["stalled"],
        progress=orjson.loads(row["progress"]),
        error=row["error"],
        error_details=_parsed(row["error_details"]),
        metadata=orjson.loads(row["metadata"]),
        parameters=_parsed(row["parameters"]),
        batch_id=row["batch_id"],
        tags=row["tags"],
        user_id=row["user_id"],
        pdf_name=row["pdf_name"],
        pdf_hash=row["pdf_hash"],
        file_count=row["file_count"],
        public=row["public"],
        has_result=row["result_id"] is not None,
        eta=row["eta"],
    )


def _absence(row: asyncpg.Record) -> Absence:
    return Absence(row["absence"], _told(row["gone_expired_at"]))


def _told(expired_at: datetime | None) -> str | None:
    return None if expired_at is None else rfc3339(expired_at)


def _json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


def _parsed(text: str | None) -> dict[str, Any] | None:
    return None if text is None else orjson.loads(text)


def _conflicting_id(error: asyncpg.UniqueViolationError) -> str:
    """The job id in `Key (id, account_id)=(abc, 7) already exists.`"""
    return (error.detail or "").partition("=(")[2].partition(",")[0]
