"""One story that all examples tell, in the shapes that the service itself makes, and one sample of each error."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from schemas.shapes import PUBLIC_FIELDS, batch_shape, list_row, rfc3339, shape_a, shape_b_of
from service import errors
from service.batch import Batch, BatchJob
from service.errors import JobwireError
from service.job import COMPLETED, FAILED, PROCESSING, QUEUED, Job, ListedJob, allowed_after, failure

JOB_ID: Final = "019b2f5e-7a10-7c3e-9d2b-5f0c8a1e4b77"
BATCH_ID: Final = "invoices-2026-11-24"
REQUEST_ID: Final = "5f0c8a1e4b77-2a"
ETAG: Final = '"3-1795508717730"'

_CREATED: Final = datetime(2026, 11, 24, 8, 25, 17, 684_000, UTC)
_STARTED: Final = _CREATED + timedelta(seconds=2)
_CHANGED: Final = _CREATED + timedelta(seconds=40)
_ETA: Final = _CHANGED + 1.5 * (_CHANGED - _STARTED)
_PROGRESS: Final = {"message": "page 4 of 10", "percentage": 40, "step": "ocr"}


def _job(**differs: Any) -> Job:
    job = {
        "account_id": 1,
        "id": JOB_ID,
        "status": PROCESSING,
        "type": "extraction",
        "version": 3,
        "attempt": 1,
        "created_at": _CREATED,
        "changed_at": _CHANGED,
        "updated_at": _CHANGED,
        "started_at": _STARTED,
        "completed_at": None,
        "expires_at": None,
        "stalled": False,
        "progress": _PROGRESS,
        "error": None,
        "error_details": None,
        "metadata": {"invoice": 4711},
        "parameters": {"language": "de"},
        "batch_id": BATCH_ID,
        "tags": ["prod", "eu"],
        "user_id": "u1",
        "pdf_name": "invoice-4711.pdf",
        "pdf_hash": None,
        "file_count": 1,
        "public": False,
        "has_result": False,
        "eta": _ETA,
    }
    return Job(**{**job, **differs})


_PROCESSING: Final = _job()
_COMPLETED: Final = _job(
    status=COMPLETED,
    version=7,
    completed_at=_CHANGED,
    expires_at=_CHANGED + timedelta(days=7),
    progress={**_PROGRESS, "percentage": 100},
    has_result=True,
    eta=None,
)
_ERROR, _ERROR_DETAILS = failure("page 7 is damaged", {"error_type": "damaged_pdf"})

NEW_JOB: Final = {
    "type": "extraction",
    "pdf_name": "invoice-4711.pdf",
    "user_id": "u1",
    "tags": ["prod", "eu"],
    "metadata": {"invoice": 4711},
}
NEW_JOBS: Final = [
    {"id": "a", "type": "extraction", "batch_id": BATCH_ID, "close_batch": True},
    {"id": "b", "type": "extraction", "batch_id": BATCH_ID},
]
PROGRESS_REPORT: Final = {"status": PROCESSING, "progress": _PROGRESS}
FAILURE_REPORT: Final = {"status": FAILED, "error": _ERROR, "error_details": {"error_type": "damaged_pdf"}}
REPORTS: Final = [{"id": "a", "status": COMPLETED}, {"id": "b", "progress": {"percentage": 70}}]

QUEUED_JOB: Final = shape_a(_job(status=QUEUED, version=1, progress={}, started_at=None))
JOB: Final = shape_a(_PROCESSING)
FINISHED_JOB: Final = shape_a(_COMPLETED)
FAILED_JOB: Final = shape_a(
    _job(
        status=FAILED,
        error=_ERROR,
        error_details=_ERROR_DETAILS,
        completed_at=_CHANGED,
        expires_at=_CHANGED + timedelta(days=7),
    )
)
PUBLIC_JOB: Final = {name: JOB[name] for name in PUBLIC_FIELDS if name in JOB}
JOB_STATUS: Final = shape_b_of(JOB)
LINES: Final = {
    "jobs": [
        {"job_id": "a", "status": "completed", "version": 7},
        {
            "job_id": "x",
            "status": None,
            "error": {"error_type": "not_found", "message": "Job with ID 'x' does not exist"},
        },
    ]
}
BATCH: Final = batch_shape(
    Batch(
        account_id=1,
        id=BATCH_ID,
        version=4,
        created_at=_CREATED,
        changed_at=_CHANGED,
        closed=True,
        total=2,
        queued=0,
        completed=1,
        failed=0,
        cancelled=0,
        jobs=[BatchJob("a", COMPLETED, "extraction", 100), BatchJob("b", PROCESSING, "extraction", 70)],
    ),
    include_progress=False,
)
PAGE: Final = {
    "jobs": [
        list_row(
            ListedJob(
                id=JOB_ID,
                status=PROCESSING,
                type="extraction",
                created_at=_CREATED,
                updated_at=_CHANGED,
                completed_at=None,
                file_count=1,
                tags=["prod", "eu"],
                batch_id=BATCH_ID,
                user_id="u1",
                pdf_name="invoice-4711.pdf",
                progress=_PROGRESS,
                error_details=None,
                version=3,
                eta=_ETA,
            )
        )
    ],
    "pagination": {"total": 1, "limit": 50, "offset": 0, "has_more": False, "next_cursor": None},
}
HISTORY: Final = {
    "job_id": JOB_ID,
    "history": [
        {
            "at": rfc3339(_CREATED),
            "version": 1,
            "status": QUEUED,
            "previous_status": None,
            "attempt": 1,
            "step": None,
            "error": None,
        }
    ],
    "has_more": False,
}
OUTCOMES: Final = {
    "results": [
        {"id": "a", "status": 200, "version": 7},
        {
            "id": "b",
            "status": 409,
            "error": {
                "error_type": "invalid_transition",
                "message": "Job b is COMPLETED and cannot take progress",
                "job_id": "b",
                "current_status": COMPLETED,
                "allowed": [],
            },
        },
    ]
}
STREAM: Final = (
    "retry: 2561\n"
    f'id: 3-1795508717730\nevent: status\ndata: {{"id":"{JOB_ID}","status":"PROCESSING", ... ,'
    '"version":3,"previous_status":"queued"}\n\n:\n\n'
)

LIMITS: Final = {
    "limits": [
        {"name": "poll", "limit": 1000, "window_seconds": 60, "left": 988, "next_place_in_seconds": 17},
        {"name": "write", "limit": None, "window_seconds": None, "left": None, "next_place_in_seconds": None},
    ]
}
MANY_STREAM: Final = (
    "retry: 4120\n"
    f'id: p.5f0c8a1e.4711\nevent: status\ndata: {{"id":"{JOB_ID}","status":"PROCESSING", ... ,'
    '"version":3,"previous_status":"queued"}\n\n:\n'
)
TICKET: Final = {"ticket": "eyJhbGciOi...", "expires_at": rfc3339(_CHANGED + timedelta(minutes=15))}

_HELD: Final[Mapping[str, Any]] = {"job_id": JOB_ID, "current_status": PROCESSING}

SAMPLES: Final[Mapping[type[JobwireError], JobwireError]] = {
    kind.__class__: kind
    for kind in (
        errors.Malformed("The body is not valid JSON: unexpected end of data: line 1 column 12 (char 11)"),
        errors.Unauthorized(),
        errors.Forbidden("This key lacks the scope jobs:write", needed_scope="jobs:write"),
        errors.JobForbidden(JOB_ID),
        errors.JobNotFound(JOB_ID),
        errors.JobExpired(JOB_ID, expired_at=rfc3339(_CHANGED)),
        errors.JobDeleted(JOB_ID),
        errors.BatchNotFound(BATCH_ID),
        errors.ResultNotFound(JOB_ID),
        errors.UnknownPath("There is nothing at /docs/nothing.js"),
        errors.AlreadyExists(f"Job {JOB_ID} already exists", job_id=JOB_ID),
        errors.BatchClosed(f"Batch {BATCH_ID} is closed", batch_id=BATCH_ID),
        errors.InvalidTransition(
            f"Job {JOB_ID} is PROCESSING and cannot be retried", allowed=list(allowed_after(PROCESSING)), **_HELD
        ),
        errors.StaleAttempt(current_attempt=2, **_HELD),
        errors.UnknownAttempt(current_attempt=2, **_HELD),
        errors.NotFinished(JOB_ID, 2),
        errors.NoResult(f"Job {JOB_ID} failed: {_ERROR}", job_id=JOB_ID, current_status=FAILED),
        errors.ResultFinal(job_id=JOB_ID, current_status=COMPLETED),
        errors.IdempotencyInFlight(),
        errors.PreconditionFailed(**_HELD),
        errors.TooLarge("The body is larger than 1 MiB"),
        errors.UnsupportedMediaType("The body must be sent as application/json, not text/plain"),
        errors.ExpectationFailed(),
        errors.ValidationFailed({"colour": ["Unknown field."]}),
        errors.IdempotencyMismatch(),
        errors.RateLimited("poll", 1000, 60, 17),
        errors.TooManyStreams("This key has 100 open streams, as many as it may"),
        errors.Internal(),
        errors.Unavailable(),
        errors.ReadOnly(),
        errors.Locked(),
    )
}
"""Every error that an operation can be answered, as it is raised."""
