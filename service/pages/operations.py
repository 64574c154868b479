"""What each operation of the API means: one entry per method and path of `routes.py`, in the order people read them.

An entry says only what is said nowhere else. The key, the scope, the limit and their errors come from the door in
`routes.py`; parameters and bodies from the schemas; statuses and titles of errors from `STATUS_TABLE`.
`tests/test_openapi.py` fails for a route without an entry, and for an entry without a route.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from schemas import responses as says
from schemas.queries import ListQuerySchema, ManyEventsQuerySchema
from schemas.requests import (
    MOST_JOBS_AT_ONCE,
    BatchQuerySchema,
    CancelSchema,
    EventsQuerySchema,
    HistoryQuerySchema,
    JobIdsSchema,
    ManyQuerySchema,
    NewJobSchema,
    ReportOfManySchema,
    ReportSchema,
    ResultQuerySchema,
    TicketSchema,
)
from service.errors import (
    AlreadyExists,
    BatchClosed,
    BatchNotFound,
    IdempotencyInFlight,
    IdempotencyMismatch,
    InvalidTransition,
    JobDeleted,
    JobExpired,
    JobForbidden,
    JobNotFound,
    NoResult,
    NotFinished,
    PreconditionFailed,
    ResultFinal,
    ResultNotFound,
    StaleAttempt,
    TooManyStreams,
    UnknownAttempt,
    UnknownPath,
)
from service.pages import examples
from service.pages.notation import ANYTHING, BODY_ERRORS, Answer, Body, Operation, RequestHeader, ResponseHeader

READING: Final = "Reading"
FOLLOWING: Final = "Following"
REPORTING: Final = "Reporting"
SERVICE: Final = "Service"

TAGS: Final[Mapping[str, str]] = {
    READING: "How jobs are doing. Needs `jobs:read`; a public job's status needs no key.",
    FOLLOWING: "Changes as they are committed, by Server-Sent Events. Needs `jobs:read`.",
    REPORTING: "For producers and workers. Needs `jobs:write`. "
    "The answer to a report means: committed, and visible to every reader.",
    SERVICE: "Whether the service is well, and this description. Open to all.",
}

# what clients may send beside the body
IF_NONE_MATCH: Final = RequestHeader("If-None-Match", "ETags that the client has: 304 where one is current.", '"3-1"')
IF_MATCH: Final = RequestHeader(
    "If-Match", "Acts only on this version of the job, or on any with `*`.", examples.ETAG, [PreconditionFailed]
)
PREFER: Final = RequestHeader(
    "Prefer",
    "`wait=N`: answers once there is something new (another version than in If-None-Match or, without it, the end), "
    "after N seconds at the latest; at most 30.",
    "wait=30",
)
IDEMPOTENCY_KEY: Final = RequestHeader(
    "Idempotency-Key",
    "1 to 255 printable ASCII characters. For 24 hours a repeat is answered as the first request was.",
    "order-17",
    [IdempotencyInFlight, IdempotencyMismatch],
    {"type": "string", "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
)
LAST_EVENT_ID: Final = RequestHeader("Last-Event-ID", "The id of the last event that was read.", "3-1795508717730")

# what answers carry beside the body
SECONDS: Final = {"type": "integer", "minimum": 1}
RETRY_AFTER: Final = ResponseHeader("Retry-After", "Seconds to wait.", 17, SECONDS)
ETAG: Final = ResponseHeader(
    "ETag", "`<version>-<milliseconds of the change>`, for If-None-Match and If-Match.", examples.ETAG
)
CONTENT_ETAG: Final = ResponseHeader("ETag", "A hash of the body.", '"9f86d081884c7d65"', shared_as="ContentETag")
PACE: Final = ResponseHeader(
    "Retry-After", "Until it is finished: seconds after which to ask again.", 2, SECONDS, shared_as="Pace"
)
WAITED: Final = ResponseHeader("Preference-Applied", "With `Prefer: wait`: what was applied.", "wait=30")
STALE: Final = ResponseHeader(
    "Warning",
    "While Postgres is away: the answer could not be verified.",
    '110 - "Response is Stale"',
    shared_as="WarningStale",
)
BEHIND: Final = ResponseHeader(
    "Warning",
    "While Redis is away: committed all the same.",
    '199 - "readers may be up to 2 s behind"',
    shared_as="WarningBehind",
)
LOCATION: Final = ResponseHeader("Location", "Where the job is, if one alone was created.", f"/jobs/{examples.JOB_ID}")
NOSNIFF: Final = ResponseHeader("X-Content-Type-Options", "Always `nosniff`.", "nosniff")
SANDBOX: Final = ResponseHeader(
    "Content-Security-Policy", "Nothing in a result acts in a browser.", "sandbox; default-src 'none'"
)
DISPOSITION: Final = ResponseHeader(
    "Content-Disposition", "Unless it is JSON or plain text: `attachment`.", "attachment"
)
POLL_HEADERS: Final = (ETAG, PACE, WAITED, STALE)

# answers that several operations share
UNCHANGED: Final = Answer(304, "The client has the present version.", headers=POLL_HEADERS)
CHANGED_JOB: Final = Answer(
    200,
    "The job after the change, which is committed.",
    [says.JobSchema],
    (ETAG, BEHIND),
    examples={"processing": examples.JOB},
)
RESULT: Final = Answer(
    200,
    "The bytes as they were stored, with their content type.",
    headers=(CONTENT_ETAG, NOSNIFF, SANDBOX, DISPOSITION),
    media_type=ANYTHING,
    json_schema={},
)
SAME_RESULT: Final = Answer(304, "The client has this result.", headers=(CONTENT_ETAG, NOSNIFF, SANDBOX, DISPOSITION))

OPERATIONS: Final[Mapping[str, Operation]] = {
    "GET /jobs/{job_id}": Operation(
        "getJob",
        READING,
        "Poll a job",
        [
            Answer(
                200,
                "The job; of a public job read without a key, its reduced form.",
                [says.JobSchema, says.PublicJobSchema],
                POLL_HEADERS,
                examples={
                    "processing": examples.JOB,
                    "completed": examples.FINISHED_JOB,
                    "failed": examples.FAILED_JOB,
                    "public, without a key": examples.PUBLIC_JOB,
                },
            ),
            UNCHANGED,
        ],
        "Never older than the last acknowledged report. With `If-None-Match` an unchanged job is 304 and takes no "
        "place of the limit; with `Prefer: wait=30` the answer comes when there is something new.",
        headers=[IF_NONE_MATCH, PREFER],
    ),
    "GET /jobs/{job_id}/status": Operation(
        "getJobStatus",
        READING,
        "Poll a job, in the shape of the many-jobs family",
        [
            Answer(
                200,
                "The job; of a public job read without a key, its reduced form.",
                [says.JobStatusSchema, says.PublicJobStatusSchema],
                POLL_HEADERS,
                examples={"processing": examples.JOB_STATUS},
            ),
            UNCHANGED,
        ],
        "As `GET /jobs/{job_id}`, with `job_id`, `operation` and the status in lower case.",
        headers=[IF_NONE_MATCH, PREFER],
    ),
    "GET /jobs/{job_id}/result": Operation(
        "getJobResult",
        READING,
        "The result of a COMPLETED job",
        [RESULT, SAME_RESULT],
        headers=[IF_NONE_MATCH],
        errors=[NotFinished, NoResult, ResultNotFound],
    ),
    "GET /jobs/{job_id}/results": Operation(
        "getJobResults",
        READING,
        "The result of a COMPLETED job, at its other address",
        [RESULT, SAME_RESULT],
        headers=[IF_NONE_MATCH],
        errors=[NotFinished, NoResult, ResultNotFound],
    ),
    "GET /jobs/{job_id}/history": Operation(
        "getJobHistory",
        READING,
        "What happened to a job, and when",
        [Answer(200, "Changes, oldest first.", [says.JobHistorySchema], examples={"created": examples.HISTORY})],
        "Changes of status, attempt, step, error and stalled. Mere progress is not kept.",
        query=HistoryQuerySchema,
    ),
    "GET /jobs/status": Operation(
        "getStatuses",
        READING,
        "Up to 200 jobs at once",
        [Answer(200, "One line per id.", [says.JobLinesSchema], examples={"one unknown": examples.LINES})],
        "An unknown or foreign id has the status null and an error, and never fails the call.",
        query=ManyQuerySchema,
    ),
    "POST /jobs/status": Operation(
        "queryStatuses",
        READING,
        "Up to 500 jobs at once",
        [Answer(200, "One line per id.", [says.JobLinesSchema], examples={"one unknown": examples.LINES})],
        "As `GET /jobs/status`, with the ids in the body.",
        query=None,
        body=Body(JobIdsSchema, examples={"two": {"job_ids": ["a", "x"]}}),
    ),
    "GET /jobs/batch/{batch_id}": Operation(
        "getBatch",
        READING,
        "A batch: counts, and its first 1000 jobs",
        [
            Answer(200, "The batch.", [says.BatchSchema], POLL_HEADERS, examples={"half done": examples.BATCH}),
            UNCHANGED,
        ],
        "With `include_progress` there is no ETag, and neither 304 nor waiting.",
        query=BatchQuerySchema,
        headers=[IF_NONE_MATCH, PREFER],
    ),
    "GET /jobs": Operation(
        "listJobs",
        READING,
        "Pages of jobs",
        [Answer(200, "One page.", [says.JobPageSchema], examples={"the only page": examples.PAGE})],
        "All filters that are given must hold; an empty one is refused. Follow `next_cursor` with the same filters and "
        "order to see each job once, whatever is created or deleted meanwhile.",
        query=ListQuerySchema,
    ),
    "GET /jobs/{job_id}/events": Operation(
        "followJob",
        FOLLOWING,
        "Follow a job",
        [
            Answer(
                200,
                "First the present state, then every change, until the job is finished. The data of `status`, "
                "`progress` and `stalled` is a JobEvent (without a key a PublicJobEvent), of `deleted` a DeletedEvent, "
                "of `problem` a ProblemEvent. A comment comes at least every 15 s.",
                media_type="text/event-stream",
                json_schema={"type": "string"},
                examples={"started": examples.STREAM},
            ),
            Answer(204, "The reader has the finished state already: EventSource stops."),
        ],
        "Every event carries the whole state and a growing version. A slow reader gets the newest state, not a "
        "backlog; a finished state is never skipped. A stream lives about 10 minutes: reconnect with the last id.",
        query=EventsQuerySchema,
        headers=[LAST_EVENT_ID],
        errors=[TooManyStreams],
    ),
    "GET /jobs/batch/{batch_id}/events": Operation(
        "followBatch",
        FOLLOWING,
        "Follow a batch",
        [
            Answer(
                200,
                "First the present state of each job (at most 1000), then every change, also of jobs that are added; "
                "once the batch is over a last `batch` event with a BatchEvent. Other events as of `GET /jobs/events`.",
                media_type="text/event-stream",
                json_schema={"type": "string"},
                examples={"started": examples.MANY_STREAM},
            ),
            Answer(204, "The reader has been told the end already: EventSource stops."),
        ],
        query=EventsQuerySchema,
        headers=[LAST_EVENT_ID],
        errors=[TooManyStreams],
    ),
    "GET /jobs/events": Operation(
        "followJobs",
        FOLLOWING,
        "Follow a set of jobs, or all",
        [
            Answer(
                200,
                "With `job_ids`: first the present state of each, then every change, until all are finished. Without: "
                "`open` (an OpenEvent), then whatever happens. The data of `status`, `progress` and `stalled` is a "
                "JobEvent, of `deleted` a DeletedEvent, of `reset` (what was missed cannot be told: read anew) a "
                "ResetEvent, of `problem` a ProblemEvent. A comment comes at least every 15 s.",
                media_type="text/event-stream",
                json_schema={"type": "string"},
                examples={"started": examples.MANY_STREAM},
            ),
            Answer(204, "The reader has been told the end already: EventSource stops."),
        ],
        "Filters are joined by AND; `status` is met by the state before or after a change. The id of an event is a "
        "position: who reconnects with it is told every job that changed since, in its present state.",
        query=ManyEventsQuerySchema,
        headers=[LAST_EVENT_ID],
        errors=[TooManyStreams],
    ),
    "POST /tickets": Operation(
        "createTicket",
        FOLLOWING,
        "A ticket for a stream",
        [Answer(200, "The ticket.", [says.TicketAnswerSchema], examples={"a ticket": examples.TICKET})],
        "A signed right to open one thing, as `?ticket=`, for browsers' EventSource, which cannot send a key. It lasts "
        "15 minutes at most and ends with its key; a stream that it opened lives on.",
        body=Body(TicketSchema, examples={"a job": {"job_id": examples.JOB_ID}, "everything": {"feed": True}}),
        errors=[JobNotFound, JobExpired, JobDeleted, JobForbidden, BatchNotFound],
    ),
    "POST /jobs": Operation(
        "createJobs",
        REPORTING,
        "Create a job, or many: all or none",
        [
            Answer(
                201,
                "Created: the job or, for an array, all of them.",
                [says.JobSchema, says.CreatedJobsSchema],
                (LOCATION, BEHIND),
                examples={"one": examples.QUEUED_JOB, "many": {"jobs": [examples.QUEUED_JOB]}},
            ),
            Answer(
                200,
                "Created by an earlier request with this Idempotency-Key, whose answer this is.",
                [says.JobSchema, says.CreatedJobsSchema],
                (LOCATION, BEHIND),
                examples={"one": examples.QUEUED_JOB},
            ),
        ],
        body=Body(
            NewJobSchema,
            NewJobSchema,
            MOST_JOBS_AT_ONCE,
            examples={"one": examples.NEW_JOB, "a whole batch": examples.NEW_JOBS},
        ),
        headers=[IDEMPOTENCY_KEY],
        errors=[AlreadyExists, BatchClosed],
    ),
    "PATCH /jobs/{job_id}": Operation(
        "reportJob",
        REPORTING,
        "Report on a job",
        [CHANGED_JOB],
        "`progress` and `metadata` merge at their top level; null removes a part. `{}` is a heartbeat. A worker fences "
        "itself with `attempt`.",
        body=Body(
            ReportSchema,
            examples={"progress": examples.PROGRESS_REPORT, "failed": examples.FAILURE_REPORT, "heartbeat": {}},
        ),
        headers=[IF_MATCH],
        errors=[InvalidTransition, StaleAttempt, UnknownAttempt],
    ),
    "PATCH /jobs": Operation(
        "reportJobs",
        REPORTING,
        "Report on many jobs",
        [
            Answer(
                200,
                "One outcome per report, in the order given.",
                [says.ReportOutcomesSchema],
                [BEHIND],
                examples={"one refused": examples.OUTCOMES},
            )
        ],
        "One bad report never fails the others; reports on the same job are applied in order. An outcome has the "
        "status and the error that `PATCH /jobs/{job_id}` would have answered.",
        body=Body(items=ReportOfManySchema, most_items=MOST_JOBS_AT_ONCE, examples={"two": examples.REPORTS}),
    ),
    "PUT /jobs/{job_id}/result": Operation(
        "putJobResult",
        REPORTING,
        "Store the result, and finish",
        [CHANGED_JOB],
        "Any content type, up to 16 MiB. The same bytes again are fine; others are refused once the job is finished.",
        query=ResultQuerySchema,
        body=Body(media_type=ANYTHING),
        headers=[IF_MATCH],
        errors=[InvalidTransition, StaleAttempt, UnknownAttempt, ResultFinal],
    ),
    "POST /jobs/{job_id}/cancel": Operation(
        "cancelJob",
        REPORTING,
        "Cancel a job",
        [CHANGED_JOB],
        "Again is fine; a COMPLETED or FAILED job stays as it is.",
        body=Body(CancelSchema, required=False, examples={"with a reason": {"reason": "not needed"}}),
        headers=[IF_MATCH],
        errors=[InvalidTransition],
    ),
    "POST /jobs/{job_id}/retry": Operation(
        "retryJob",
        REPORTING,
        "Run a FAILED job again",
        [CHANGED_JOB],
        "A new attempt: error, progress, end times and result of the last one are gone.",
        headers=[IF_MATCH],
        errors=[InvalidTransition, *BODY_ERRORS],
    ),
    "DELETE /jobs/{job_id}": Operation(
        "deleteJob",
        REPORTING,
        "Delete a job in any state",
        [
            Answer(
                200,
                "It is gone; its id can be used again after 30 days.",
                [says.DeletedJobSchema],
                [BEHIND],
                examples={"deleted": {"message": f"Job {examples.JOB_ID} deleted"}},
            )
        ],
        headers=[IF_MATCH],
    ),
    "POST /jobs/batch/{batch_id}/close": Operation(
        "closeBatch",
        REPORTING,
        "Take no more jobs into a batch",
        [Answer(200, "The batch. Again is fine.", [says.BatchSchema], [BEHIND], examples={"closed": examples.BATCH})],
        "Only a closed batch can be over.",
        errors=BODY_ERRORS,
    ),
    "GET /limits": Operation(
        "getLimits",
        READING,
        "Your limits, and what is left of them",
        [Answer(200, "Every policy of the key.", [says.LimitsSchema], examples={"one without limit": examples.LIMITS})],
    ),
    "GET /healthz": Operation(
        "checkAlive",
        SERVICE,
        "Is this process alive?",
        [Answer(200, "It is.", [says.AliveSchema], examples={"alive": {"status": "ok"}})],
        query=None,
    ),
    "GET /readyz": Operation(
        "checkReady",
        SERVICE,
        "Is everything there that the service needs?",
        [
            Answer(200, "It is.", [says.ReadinessSchema], examples={"ready": {"status": "ready", "down": {}}}),
            Answer(
                503,
                "Not everything; the answer names what is down.",
                [says.ReadinessSchema],
                [RETRY_AFTER],
                examples={"no Redis": {"status": "unavailable", "down": {"redis": "cannot be reached"}}},
            ),
        ],
        query=None,
    ),
    "GET /openapi.json": Operation(
        "getApiDescription",
        SERVICE,
        "This description",
        [
            Answer(200, "OpenAPI 3.1.", headers=[CONTENT_ETAG], json_schema={"type": "object"}),
            Answer(304, "The client has it.", headers=[CONTENT_ETAG]),
        ],
        query=None,
        headers=[IF_NONE_MATCH],
    ),
    "GET /docs": Operation(
        "getDocs",
        SERVICE,
        "This description, to read and to try out",
        [
            Answer(200, "A page.", headers=[CONTENT_ETAG], media_type="text/html", json_schema={"type": "string"}),
            Answer(304, "The client has it.", headers=[CONTENT_ETAG]),
        ],
        query=None,
        headers=[IF_NONE_MATCH],
    ),
    "GET /docs/{file}": Operation(
        "getDocsFile",
        SERVICE,
        "What the page is made of",
        [
            Answer(
                200,
                "A script, a style sheet or a picture.",
                headers=[CONTENT_ETAG],
                media_type=ANYTHING,
                json_schema={},
            ),
            Answer(304, "The client has it.", headers=[CONTENT_ETAG]),
        ],
        query=None,
        headers=[IF_NONE_MATCH],
        errors=[UnknownPath],
    ),
}
