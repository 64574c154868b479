"""The documented shapes on the wire, made once per change and kept as bytes. `responses.py` says what is in each."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import orjson

from schemas.responses import PublicJobSchema, PublicJobStatusSchema
from service.batch import Batch, BatchJob
from service.job import COMPLETED, Job, ListedJob, operation_of


def rfc3339(at: datetime) -> str:
    """`2024-01-15T10:30:00.000Z`; `at` is aware and in UTC."""
    return at.isoformat(timespec="milliseconds")[:23] + "Z"


def shape_a(job: Job) -> dict[str, Any]:
    """The single-job resource, a JobSchema: `id`, `type`, mixed-case status."""
    shape: dict[str, Any] = {
        "id": job.id,
        "status": job.status,
        "type": job.type,
        **_times(job),
        "pdf_name": job.pdf_name,
        "pdf_hash": job.pdf_hash,
        "user_id": job.user_id,
        "error": job.error,
        "error_details": job.error_details,
        "progress": _progress(job),
        "batch_id": job.batch_id,
        "tags": job.tags,
        "file_count": job.file_count,
        "metadata": job.metadata,
        "parameters": job.parameters,
        "attempt": job.attempt,
        "version": job.version,
        "stalled": job.stalled,
    }
    if job.has_result and job.status == COMPLETED:
        shape["result_url"] = f"/jobs/{job.id}/result"
    if not job.finished:
        shape["events_url"] = f"/jobs/{job.id}/events"
    return shape


def shape_b_of(shape: dict[str, Any]) -> dict[str, Any]:
    """One job of the many-jobs family, a JobStatusSchema, from its shape A."""
    return {
        "job_id": shape["id"],
        "operation": operation_of(shape["type"]),
        "status": shape["status"].lower(),
        "progress": shape["progress"],
        "error_details": shape["error_details"],
        **{name: shape[name] for name in TIMES if name in shape},
    }


def list_row(job: ListedJob) -> dict[str, Any]:
    """One job of a page, a ListedJobSchema; every key is always there."""
    return {
        "job_id": job.id,
        "status": job.status.lower(),
        "operation": operation_of(job.type),
        "type": job.type,
        "created_at": rfc3339(job.created_at),
        "updated_at": rfc3339(job.updated_at),
        "completed_at": None if job.completed_at is None else rfc3339(job.completed_at),
        "file_count": job.file_count,
        "tags": job.tags,
        "batch_id": job.batch_id,
        "user_id": job.user_id,
        "pdf_name": job.pdf_name,
        "progress": _progress(job),
        "error_details": job.error_details,
        "version": job.version,
    }


def batch_shape(batch: Batch, *, include_progress: bool) -> dict[str, Any]:
    """A BatchSchema with the first of its jobs; here `progress` is a bare number (0 where nothing is known)."""
    shape = {
        "batch_id": batch.id,
        "status": batch.status,
        "created_at": rfc3339(batch.created_at),
        "total_jobs": batch.total,
        "completed_jobs": batch.completed,
        "failed_jobs": batch.failed,
        "cancelled_jobs": batch.cancelled,
        "overall_progress": batch.percent,
        "closed": batch.closed,
        "jobs": [_batch_job(job, include_progress) for job in batch.jobs],
    }
    if batch.total > len(batch.jobs):
        shape["jobs_truncated"] = True
    return shape


def _batch_job(job: BatchJob, include_progress: bool) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "job_id": job.id,
        "status": job.status.lower(),
        "operation": operation_of(job.type),
    }
    if include_progress:
        shape["progress"] = job.percentage
    return shape


def _progress(job: Job | ListedJob) -> dict[str, Any]:
    """What was told of it and, where that is known, when the job will be done."""
    return job.progress if job.eta is None else {**job.progress, "eta": rfc3339(job.eta)}


TIMES = ("created_at", "updated_at", "started_at", "completed_at", "expires_at")
"""In both shapes; each is there once it is known."""


def _times(job: Job) -> dict[str, str]:
    known = ((name, getattr(job, name)) for name in TIMES)
    return {name: rfc3339(at) for name, at in known if at is not None}


PUBLIC_FIELDS: Final = tuple(dict.fromkeys([*PublicJobSchema().fields, *PublicJobStatusSchema().fields]))
"""What anybody may read of a public job, in either shape."""


def reduced(body: bytes) -> bytes:
    """A shape, as bytes, without what only the account may read."""
    shape = orjson.loads(body)
    return orjson.dumps({name: shape[name] for name in PUBLIC_FIELDS if name in shape})
