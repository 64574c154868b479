"""The one family of errors. Each class is one stable code (`error_type`) that clients match on.

The HTTP status and the title of each code stand in one table, `middlewares.STATUS_TABLE`; nothing here knows of HTTP.
A class's docstring is its default message.
"""

from __future__ import annotations

from typing import Any, ClassVar


class JobwireError(Exception):
    """Something went wrong."""

    error_type: ClassVar[str]
    suggestions: ClassVar[tuple[str, ...]] = ()
    problem_type: ClassVar[str] = ""
    """The `type` of the problem where the field has a registered one."""

    def __init__(self, detail: str | None = None, *, message: str | None = None, **details: Any) -> None:
        """`detail` is the sentence for this case, `message` the one inside `details` (the same unless given)."""
        self.detail = detail or (type(self).__doc__ or "").strip()
        self.headers: dict[str, str] = {}
        self.members: dict[str, Any] = {}  # further members of the problem
        self.details: dict[str, Any] = {"error_type": self.error_type, "message": message or self.detail, **details}
        super().__init__(self.detail)


class Internal(JobwireError):
    """Something went wrong on our side; it has been logged under this request's id."""

    error_type = "internal"
    suggestions = ("Try again in a moment.", "If it stays, report it with the request_id.")


class Malformed(JobwireError):
    """The request could not be parsed."""

    error_type = "malformed"
    suggestions = ("Check that the request is well-formed HTTP and its body valid JSON in UTF-8.",)


class UnknownPath(JobwireError):
    """There is nothing at this address."""

    error_type = "unknown_path"
    suggestions = ("Check the path against the addresses listed at /docs.",)


class MethodNotAllowed(JobwireError):
    """This address does not understand that method."""

    error_type = "method_not_allowed"
    suggestions = ("Use one of the methods named in the Allow header.",)


class TooLarge(JobwireError):
    """The body is larger than this address accepts."""

    error_type = "too_large"
    suggestions = ("Send less in one request: 1 MiB of JSON, 8 MiB in an array of at most 1000, 16 MiB of result.",)


class UnsupportedMediaType(JobwireError):
    """The body must be sent as application/json."""

    error_type = "unsupported_media_type"
    suggestions = ("Send the header Content-Type: application/json.",)


class ExpectationFailed(JobwireError):
    """The Expect header asks for something this service does not do."""

    error_type = "expectation_failed"
    suggestions = ("Leave the Expect header out, or send Expect: 100-continue.",)


class ValidationFailed(JobwireError):
    """Some fields are not as they should be; details.fields names each."""

    error_type = "validation_failed"
    suggestions = ("Mend the fields named in details.fields and send the request again.",)

    def __init__(self, fields: dict[str, Any], detail: str | None = None) -> None:
        super().__init__(detail, fields=fields)


class Unauthorized(JobwireError):
    """A valid API key is needed: it is missing, unknown, revoked or expired."""

    error_type = "unauthorized"
    suggestions = (
        "Send the key in X-API-Key, api-key or Authorization: Bearer.",
        "Check that the key has not been revoked and has not expired.",
    )


class Forbidden(JobwireError):
    """This key may not do that."""

    error_type = "forbidden"
    suggestions = ("Check that the job belongs to your account.", "Check the scopes of your key.")


class JobNotFound(JobwireError):
    """The job does not exist."""

    error_type = "not_found"
    suggestions = (
        "Check the job ID for typos",
        "Verify that the job belongs to your account",
        "The job may have been deleted after the retention period",
    )

    def __init__(self, job_id: str, **details: Any) -> None:
        super().__init__(
            f"Job {job_id} not found", message=f"Job with ID '{job_id}' does not exist", job_id=job_id, **details
        )


class JobExpired(JobNotFound):
    """The job was removed after its retention period."""

    error_type = "expired"


class JobDeleted(JobNotFound):
    """The job was deleted."""

    error_type = "deleted"


class JobForbidden(Forbidden):
    """The job belongs to another account."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"Job {job_id} belongs to another account", job_id=job_id)


class BatchNotFound(JobwireError):
    """The batch does not exist."""

    error_type = "not_found"
    suggestions = (
        "Check the batch ID for typos",
        "Verify that the batch belongs to your account",
        "A batch begins with the first job that names it",
    )

    def __init__(self, batch_id: str) -> None:
        super().__init__(
            f"Batch {batch_id} not found", message=f"Batch with ID '{batch_id}' does not exist", batch_id=batch_id
        )


class ResultNotFound(JobwireError):
    """No result was stored for the job."""

    error_type = "result_not_found"
    suggestions = ("Check that the worker stores its result with PUT /jobs/{id}/result.",)

    def __init__(self, job_id: str) -> None:
        super().__init__(f"Result for job {job_id} not found", job_id=job_id)


class NotFinished(JobwireError):
    """The job has not finished yet."""

    error_type = "not_finished"
    suggestions = ("Ask again after the seconds named in Retry-After.",)

    def __init__(self, job_id: str, retry_after_s: int) -> None:
        super().__init__(f"Job {job_id} is still processing", job_id=job_id)
        self.retry_after_s = retry_after_s


class NoResult(JobwireError):
    """The job ended without a result."""

    error_type = "no_result"
    suggestions = ("Read error_details of the job.", "If it FAILED, run it again with POST /jobs/{id}/retry.")


class AlreadyExists(JobwireError):
    """A job of yours already has this id."""

    error_type = "already_exists"
    suggestions = ("Use another id, or leave it out to have one minted.", "Read the existing job at GET /jobs/{id}.")


class BatchClosed(JobwireError):
    """The batch is closed and takes no more jobs."""

    error_type = "batch_closed"
    suggestions = ("Start another batch with a new batch_id.",)


class InvalidTransition(JobwireError):
    """The job's present state does not allow that."""

    error_type = "invalid_transition"
    suggestions = (
        "Read the job and report one of the states in details.allowed; where there is none, it stays as it is.",
        "A FAILED job is run again with POST /jobs/{id}/retry, which is no report.",
    )


class StaleAttempt(JobwireError):
    """The report names an attempt that is over."""

    error_type = "stale_attempt"
    suggestions = ("Stop this worker's run: the job was given back or retried and another attempt owns it.",)


class UnknownAttempt(JobwireError):
    """The report names an attempt that has not begun."""

    error_type = "unknown_attempt"
    suggestions = ("Read the job and use its present attempt.",)


class ResultFinal(JobwireError):
    """The job is finished and its result can no longer be replaced."""

    error_type = "result_final"
    suggestions = ("Create a new job for a new result.",)


class PreconditionFailed(JobwireError):
    """The job has changed since the ETag in If-Match."""

    error_type = "precondition_failed"
    suggestions = ("Read the job again and decide on its present state.",)


class IdempotencyMismatch(JobwireError):
    """This Idempotency-Key was used with another body."""

    error_type = "idempotency_mismatch"
    suggestions = ("Use a new Idempotency-Key for a new request.",)


class IdempotencyInFlight(JobwireError):
    """The first request with this Idempotency-Key is still running."""

    error_type = "idempotency_in_flight"
    suggestions = ("Send the request again after a moment.",)


class RateLimited(JobwireError):
    """Too many requests."""

    error_type = "rate_limited"
    problem_type = "https://iana.org/assignments/http-problem-types#quota-exceeded"
    suggestions = (
        "Wait as long as Retry-After says.",
        "Follow the job with GET /jobs/{id}/events, or poll with If-None-Match: an unchanged job is free.",
    )

    def __init__(self, policy: str, most: int, window_s: int, retry_after_s: int) -> None:
        super().__init__(f"More than {most} requests in {window_s} s under the policy {policy}", policy=policy)
        self.members["violated-policies"] = [policy]
        self.headers["Retry-After"] = str(retry_after_s)


class TooManyStreams(JobwireError):
    """This key has as many open streams as it may."""

    error_type = "too_many_streams"
    suggestions = ("Close streams that nobody reads.", "Follow a batch or several jobs in one stream.")


class Unavailable(JobwireError):
    """The store of jobs cannot be reached at the moment."""

    error_type = "unavailable"
    suggestions = (
        "Try again after the seconds named in Retry-After.",
        "A report may or may not have been taken: sending it again is safe.",
    )
    retry_after_s = 2


class ReadOnly(Unavailable):
    """The store of jobs can be read but takes no changes at the moment."""


class Locked(Unavailable):
    """Another writer holds the job, or its batch, at the moment."""


def absent_job(kind: str, job_id: str, expired_at: str | None) -> JobwireError:
    """The error for a job that is not there, by the kind of its absence."""
    if kind == "forbidden":
        return JobForbidden(job_id)
    if kind == "expired":
        return JobExpired(job_id, expired_at=expired_at)
    return JobDeleted(job_id) if kind == "deleted" else JobNotFound(job_id)


class RedisAway(Exception):
    """Redis did not answer in time or cannot be reached. Never leaves the stores: Postgres answers instead."""
