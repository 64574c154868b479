"""What clients receive, as marshmallow says it. Nothing is dumped through these schemas (`shapes.py` makes the bytes):
they describe the answers in the API document, and a test holds every real answer to them."""

from __future__ import annotations

from typing import Any

from marshmallow import EXCLUDE, INCLUDE, Schema, fields, validate

from schemas.fields import FreeObject, Percentage
from service.batch import BATCH_STATUSES
from service.job import STATUSES

_LOWER_CASE = [status.lower() for status in STATUSES]


class Shape(Schema):
    """Part of an answer. Further fields may come with time: readers are to ignore what they do not know."""

    class Meta:
        """Nothing is refused."""

        unknown = EXCLUDE


def _text(**options: Any) -> fields.String:
    return fields.String(**{"required": True, **options})


def _text_or_null(**options: Any) -> fields.String:
    return _text(allow_none=True, **options)


def _one_of(words: list[str] | tuple[str, ...], **options: Any) -> fields.String:
    return _text(validate=validate.OneOf(words), **options)


def _number(**options: Any) -> fields.Integer:
    return fields.Integer(**{"required": True, **options})


def _time(**options: Any) -> fields.DateTime:
    return fields.DateTime(**{"required": True, **options})


def _flag(**options: Any) -> fields.Boolean:
    return fields.Boolean(**{"required": True, **options})


def _nested(schema: type[Schema], **options: Any) -> fields.Nested:
    return fields.Nested(schema, **{"required": True, **options})


def _many(schema: type[Schema]) -> fields.List[Any]:
    return fields.List(fields.Nested(schema), required=True)


class JobProgressSchema(Shape):
    """How far a job is. Parts that are not known are absent, never null."""

    percentage = Percentage()
    message = _text(required=False)
    step = _text(required=False)
    files_completed = _number(required=False)
    total_files = _number(required=False)
    queue_position = _number(required=False)
    eta = _time(required=False)


class JobErrorSchema(Shape):
    """Why a job failed or was cancelled, for machines and for people."""

    error_type = _text()
    message = _text()


class PublicJobSchema(Shape):
    """What anybody may read of a public job."""

    id = _text()
    status = _one_of(STATUSES)
    type = _text()
    created_at = _time()
    updated_at = _time()
    started_at = _time(required=False)
    completed_at = _time(required=False)
    expires_at = _time(required=False)
    progress = _nested(JobProgressSchema)
    version = _number()


class JobSchema(PublicJobSchema):
    """One job: the single-job resource (shape A)."""

    pdf_name = _text_or_null()
    pdf_hash = _text_or_null()
    user_id = _text_or_null()
    error = _text_or_null()
    error_details = _nested(JobErrorSchema, allow_none=True)
    batch_id = _text_or_null()
    tags = fields.List(fields.String(), required=True)
    file_count = _number(allow_none=True)
    metadata = FreeObject(required=True)
    parameters = FreeObject(required=True, allow_none=True)
    attempt = _number()
    stalled = _flag()
    result_url = _text(required=False)
    events_url = _text(required=False)


class PublicJobStatusSchema(Shape):
    """What anybody may read of a public job, in the shape of the many-jobs family."""

    job_id = _text()
    operation = _text()
    status = _one_of(_LOWER_CASE)
    progress = _nested(JobProgressSchema)
    created_at = _time()
    updated_at = _time()
    started_at = _time(required=False)
    completed_at = _time(required=False)
    expires_at = _time(required=False)


class JobStatusSchema(PublicJobStatusSchema):
    """One job in the shape of the many-jobs family (shape B)."""

    error_details = _nested(JobErrorSchema, allow_none=True)


class JobLineSchema(Shape):
    """One of many jobs. An unknown or foreign one has the status null and an error."""

    job_id = _text()
    status = _one_of(_LOWER_CASE, allow_none=True)
    version = _number(required=False)
    progress = _nested(JobProgressSchema, required=False)
    error = _nested(JobErrorSchema, required=False)


class JobLinesSchema(Shape):
    """Many jobs, in the order asked."""

    jobs = _many(JobLineSchema)


class BatchJobSchema(Shape):
    """One job of a batch. Its progress, where it was asked for, is a bare number."""

    job_id = _text()
    status = _one_of(_LOWER_CASE)
    operation = _text()
    progress = Percentage(metadata={"description": "Percent; 0 where nothing is known. With include_progress only."})


class BatchEventSchema(Shape):
    """The data of a `batch` event, and the counts of a batch: of all its jobs."""

    batch_id = _text()
    status = _one_of(BATCH_STATUSES, metadata={"description": "In one word; the last four only once it is over."})
    created_at = _time()
    total_jobs = _number()
    completed_jobs = _number()
    failed_jobs = _number()
    cancelled_jobs = _number()
    overall_progress = _number(validate=validate.Range(min=0, max=100))
    closed = _flag()


class BatchSchema(BatchEventSchema):
    """A batch: counts of all its jobs, and the first 1000 of them."""

    jobs = _many(BatchJobSchema)
    jobs_truncated = _flag(required=False)


class ListedJobSchema(Shape):
    """One job of a page. Every field is always there."""

    job_id = _text()
    status = _one_of(_LOWER_CASE)
    operation = _text()
    type = _text()
    created_at = _time()
    updated_at = _time()
    completed_at = _time(allow_none=True)
    file_count = _number(allow_none=True)
    tags = fields.List(fields.String(), required=True)
    batch_id = _text_or_null()
    user_id = _text_or_null()
    pdf_name = _text_or_null()
    progress = _nested(JobProgressSchema)
    error_details = _nested(JobErrorSchema, allow_none=True)
    version = _number()


class PaginationSchema(Shape):
    """Where a page stands."""

    total = _number(required=False)
    total_capped = _flag(required=False)
    limit = _number(metadata={"description": "At most so many jobs stand on a page."})
    offset = _number(metadata={"description": "How many jobs were skipped; 0 with a cursor."})
    has_more = _flag()
    next_cursor = _text_or_null()


class JobPageSchema(Shape):
    """One page of jobs."""

    jobs = _many(ListedJobSchema)
    pagination = _nested(PaginationSchema)


class JobChangeSchema(Shape):
    """One change of a job. Mere progress is not kept."""

    at = _time()
    version = _number()
    status = _one_of(STATUSES)
    previous_status = _one_of(STATUSES, allow_none=True)
    attempt = _number()
    step = _text_or_null()
    error = _text_or_null()


class JobHistorySchema(Shape):
    """What happened to a job, oldest first."""

    job_id = _text()
    history = _many(JobChangeSchema)
    has_more = _flag()


class CreatedJobsSchema(Shape):
    """The jobs that were created together, in the order given."""

    jobs = _many(JobSchema)


class ProblemDetailsSchema(Shape):
    """The code that programs match on, and what is known of this case: further members depend on it."""

    error_type = _text()
    message = _text()
    wrong_fields = FreeObject(data_key="fields", metadata={"description": "What is wrong with each field, by name."})

    class Meta:
        """Each error_type has members of its own."""

        unknown = INCLUDE


class ReportOutcomeSchema(Shape):
    """What became of one report of many: a version, or an error."""

    id = _text_or_null()
    status = _number(metadata={"description": "The HTTP status that this report would have been answered alone."})
    version = _number(required=False)
    error = _nested(ProblemDetailsSchema, required=False)


class ReportOutcomesSchema(Shape):
    """What became of many reports, in the order given."""

    results = _many(ReportOutcomeSchema)


class DeletedJobSchema(Shape):
    """Says that a job is gone."""

    message = _text(metadata={"description": "`Job <id> deleted`."})


class JobEventSchema(JobSchema):
    """The data of a `status`, `progress` or `stalled` event: the whole job, and where it came from."""

    previous_status = _one_of(STATUSES, allow_none=True)


class PublicJobEventSchema(PublicJobSchema):
    """The data of an event of a public job, for somebody without a key."""

    previous_status = _one_of(STATUSES, allow_none=True)


class DeletedEventSchema(Shape):
    """The data of a `deleted` event."""

    id = _text()
    version = _number()
    previous_status = _one_of(STATUSES, allow_none=True)


class OpenEventSchema(Shape):
    """The data of an `open` event: a feed has begun."""

    position = _text()


class ResetEventSchema(Shape):
    """The data of a `reset` event: what was missed cannot be told."""

    detail = _text()


class TicketAnswerSchema(Shape):
    """A ticket."""

    ticket = _text()
    expires_at = _time()


class ProblemEventSchema(Shape):
    """The data of a `problem` event, after which the stream ends."""

    error_type = _text()
    detail = _text()


class ProblemSchema(Shape):
    """An error (RFC 9457) that also carries the two older documented shapes."""

    type = _text(metadata={"format": "uri", "description": "`urn:jobwire:error:<error_type>` or a registered type."})
    title = _text(metadata={"description": "The kind of the error in a few words."})
    status = _number(metadata={"description": "The HTTP status."})
    detail = _text(metadata={"description": "A sentence about this case."})
    instance = _text(metadata={"description": "The path that was asked, without its query."})
    error = _text(metadata={"description": "The same as title."})
    details = _nested(ProblemDetailsSchema)
    suggestions = fields.List(fields.String(), required=True, metadata={"description": "What to do about it."})
    request_id = _text(metadata={"description": "The X-Request-Id of the answer."})
    violated_policies = fields.List(
        fields.String(), data_key="violated-policies", metadata={"description": "With `rate_limited`: which limits."}
    )


class LimitSchema(Shape):
    """One policy of a key; all but its name is null where nothing limits it."""

    name = _text(metadata={"description": "As in RateLimit-Policy."})
    limit = _number(allow_none=True, metadata={"description": "Requests in any window."})
    window_seconds = _number(allow_none=True)
    left = _number(allow_none=True)
    next_place_in_seconds = _number(allow_none=True)


class LimitsSchema(Shape):
    """What is left of each policy of a key."""

    limits = _many(LimitSchema)


class AliveSchema(Shape):
    """This process answers."""

    status = _text(validate=validate.Equal("ok"), metadata={"description": "Always `ok`."})


class ReadinessSchema(Shape):
    """Whether everything the service needs answers."""

    status = _one_of(["ready", "unavailable"], metadata={"description": "`unavailable` if anything is down."})
    down = fields.Dict(
        keys=fields.String(),
        values=fields.String(),
        required=True,
        metadata={"description": "What is down, and what that means or what to do."},
    )
