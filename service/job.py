"""What a job is: its fields, its states and what may follow what. Pure: no store, no clock, no HTTP."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

QUEUED: Final = "queued"
PROCESSING: Final = "PROCESSING"
COMPLETED: Final = "COMPLETED"
FAILED: Final = "FAILED"
CANCELLED: Final = "CANCELLED"

STATUSES: Final = (QUEUED, PROCESSING, COMPLETED, FAILED, CANCELLED)
FINISHED: Final = frozenset({COMPLETED, FAILED, CANCELLED})

TRANSITIONS: Final[Mapping[str, tuple[str, ...]]] = {
    QUEUED: (PROCESSING, COMPLETED, FAILED, CANCELLED),
    PROCESSING: (COMPLETED, FAILED, CANCELLED, QUEUED),
    COMPLETED: (),
    FAILED: (),
    CANCELLED: (),
}
"""What a report may lead to. PROCESSING -> queued gives the job back: a new attempt."""

RETRY_FROM: Final = FAILED
"""The one state that a retry (not a report) leads out of, back to queued: a new attempt."""

OPERATION_OF_TYPE: Final[Mapping[str, str]] = {
    "extraction": "extract",
    "parsing": "parse",
    "splitting": "split",
    "chunking": "split",
    "classification": "classify",
}
TYPE_OF_OPERATION: Final[Mapping[str, str]] = {
    "extract": "extraction",
    "parse": "parsing",
    "split": "splitting",
    "classify": "classification",
}

JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")
TYPE_SLUG: Final = re.compile(r"[a-z0-9_.-]{1,64}\Z")
RESERVED_IDS: Final = frozenset({"status", "batch", "events", "stream", "limits"})

NO_REASON: Final = "No reason was given"
JOB_FAILED: Final = "job_failed"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


@dataclass(slots=True)
class Job:
    """One job as Postgres holds it. Times are aware and in UTC, to the millisecond. `eta`: None while unknown."""

    account_id: int
    id: str
    status: str
    type: str
    version: int
    attempt: int
    created_at: datetime
    changed_at: datetime
    updated_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    expires_at: datetime | None
    stalled: bool
    progress: dict[str, Any]
    error: str | None
    error_details: dict[str, Any] | None
    metadata: dict[str, Any]
    parameters: dict[str, Any] | None
    batch_id: str | None
    tags: list[str]
    user_id: str | None
    pdf_name: str | None
    pdf_hash: str | None
    file_count: int | None
    public: bool
    has_result: bool
    eta: datetime | None = None

    @property
    def finished(self) -> bool:
        """COMPLETED, FAILED or CANCELLED."""
        return self.status in FINISHED


@dataclass(slots=True)
class ListedJob:
    """One job as a page of a list shows it. Times are aware and in UTC, to the millisecond. `eta` as of a Job."""

    id: str
    status: str
    type: str
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None
    file_count: int | None
    tags: list[str]
    batch_id: str | None
    user_id: str | None
    pdf_name: str | None
    progress: dict[str, Any]
    error_details: dict[str, Any] | None
    version: int
    eta: datetime | None = None


@dataclass(slots=True)
class NewJob:
    """A job as its producer describes it."""

    id: str
    type: str
    progress: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] | None = None
    batch_id: str | None = None
    batch_size: int | None = None
    close_batch: bool = False
    tags: list[str] = field(default_factory=list)
    user_id: str | None = None
    pdf_name: str | None = None
    pdf_hash: str | None = None
    file_count: int | None = None
    heartbeat_timeout: int | None = None
    stalled_action: str = "mark"
    public: bool = False
    notification_settings: dict[str, Any] | None = None
    webhook_url: str | None = None


@dataclass(slots=True)
class Report:
    """What somebody says about one job. None: not said. `if_match`: acceptable ETags joined by comma, or `*`."""

    account_id: int
    id: str
    status: str | None = None
    progress: dict[str, Any] | None = None
    error: str | None = None
    error_details: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    attempt: int | None = None
    if_match: str | None = None
    retry: bool = False


def allowed_after(status: str) -> tuple[str, ...]:
    """The states that a report may lead to from `status`."""
    return TRANSITIONS[status]


def failure(error: str | None, details: Mapping[str, Any] | None) -> tuple[str, dict[str, str]]:
    """`error` and `error_details` of a job that failed or was cancelled, each made from the other where missing."""
    given = details or {}
    sentence = error or given.get("message") or NO_REASON
    return sentence, {
        "error_type": given.get("error_type") or JOB_FAILED,
        "message": given.get("message") or sentence,
    }


def type_of(word: str) -> str:
    """The type that a producer means: `extract` and the like are understood too."""
    return TYPE_OF_OPERATION.get(word, word)


def operation_of(job_type: str) -> str:
    """The operation (shape B) of a type; a producer's own type is its own operation."""
    return OPERATION_OF_TYPE.get(job_type, job_type)


def types_of(operation: str) -> tuple[str, ...]:
    """The types that an operation (shape B) stands for: `split` is splitting and chunking."""
    return tuple(known for known, named in OPERATION_OF_TYPE.items() if named == operation) or (operation,)


def epoch_ms(at: datetime) -> int:
    """Whole milliseconds since 1970."""
    return (at - _EPOCH) // _MILLISECOND


def is_job_id(text: str) -> bool:
    """Whether a job can have this id."""
    return JOB_ID.match(text) is not None and text not in RESERVED_IDS


def mint_id(now_ms: int) -> str:
    """A UUIDv7 (RFC 9562): ids of one producer sort by time, which keeps the primary key's inserts together."""
    value = (now_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return str(UUID(int=value))


def mint_public_id() -> str:
    """A UUIDv4: the id of a public job is its only protection, so nothing in it can be guessed."""
    return str(uuid4())
