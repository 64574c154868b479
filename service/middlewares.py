"""Around every handler: the request's id, the access log, and errors made into problem+json (RFC 9457)."""

from __future__ import annotations

import itertools
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import orjson
import structlog
from aiohttp import web

from service import errors
from service.errors import JobwireError
from service.requests import Handler

STATUS_TABLE: Final[Mapping[type[JobwireError], tuple[int, str]]] = {
    errors.Malformed: (400, "Malformed request"),
    errors.Unauthorized: (401, "Unauthorized"),
    errors.Forbidden: (403, "Forbidden"),
    errors.JobForbidden: (403, "Forbidden"),
    errors.JobNotFound: (404, "Job not found"),
    errors.JobExpired: (404, "Job not found"),
    errors.JobDeleted: (404, "Job not found"),
    errors.BatchNotFound: (404, "Batch not found"),
    errors.ResultNotFound: (404, "Result not found"),
    errors.UnknownPath: (404, "Nothing here"),
    errors.MethodNotAllowed: (405, "Method not allowed"),
    errors.AlreadyExists: (409, "Job already exists"),
    errors.BatchClosed: (409, "Batch closed"),
    errors.InvalidTransition: (409, "Invalid transition"),
    errors.StaleAttempt: (409, "Stale attempt"),
    errors.UnknownAttempt: (409, "Unknown attempt"),
    errors.NotFinished: (409, "Job not finished"),
    errors.NoResult: (409, "Job has no result"),
    errors.ResultFinal: (409, "Result is final"),
    errors.IdempotencyInFlight: (409, "First request still running"),
    errors.PreconditionFailed: (412, "Precondition failed"),
    errors.TooLarge: (413, "Body too large"),
    errors.UnsupportedMediaType: (415, "Unsupported media type"),
    errors.ExpectationFailed: (417, "Expectation failed"),
    errors.ValidationFailed: (422, "Validation failed"),
    errors.IdempotencyMismatch: (422, "Idempotency key reused"),
    errors.RateLimited: (429, "Too many requests"),
    errors.TooManyStreams: (429, "Too many streams"),
    errors.Internal: (500, "Internal error"),
    errors.Unavailable: (503, "Service unavailable"),
    errors.ReadOnly: (503, "Service unavailable"),
    errors.Locked: (503, "Service unavailable"),
}
"""The one table from error to HTTP status and title. A test holds the README's table to it."""

STATUS_OF: Final[dict[str, int]] = {kind.error_type: status for kind, (status, _) in STATUS_TABLE.items()}
"""HTTP status by error_type."""

_SANE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_log = structlog.get_logger(__name__)


REQUEST_ID: Final = web.RequestKey("request_id", str)
"""Where a request keeps its id, for a handler that answers by itself (a stream)."""


class RequestIds:
    """Ids for requests that bring none: random per process, then counted, because a poll cannot afford more."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def of(self, request: web.BaseRequest) -> str:
        """The caller's own id if it is sane, else a new one."""
        given = request.headers.get("X-Request-Id")
        if given is not None and _SANE_ID.match(given):
            return given
        return f"{self._prefix}-{next(self._numbers):x}"


class Problems:
    """Errors made into problem+json, and counted: `counts` by error_type."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def of(self, request: web.BaseRequest, error: BaseException, request_id: str) -> web.Response:
        """The answer to an error, whoever raised it."""
        ours = as_our_error(error, request, request_id)
        self.counts[ours.error_type] += 1
        return problem(request, ours, request_id)


def request_middleware(ids: RequestIds, problems: Problems, *, access_log: bool) -> Any:
    """One middleware for all three duties, so that a poll passes one and not three."""

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request[REQUEST_ID] = ids.of(request)
        started = time.perf_counter() if access_log else 0.0
        try:
            response = await handler(request)
        except Exception as error:
            if request.writer.output_size:  # a stream has begun: a second response in it would be nonsense
                raise
            response = problems.of(request, error, request_id)
            _end_with_a_broken_body(request, response)
        if not response.prepared:  # a stream has sent its headers already
            response.headers["X-Request-Id"] = request_id
        if access_log:
            _write_access_log(request, response, request_id, time.perf_counter() - started)
        return response

    return around


def as_our_error(error: BaseException, request: web.BaseRequest, request_id: str) -> JobwireError:
    """Ours as it is, the framework's in our words, anything else as Internal: logged here, hidden from the caller."""
    match error:
        case JobwireError():
            return error
        case web.HTTPNotFound():
            return errors.UnknownPath(f"There is nothing at {request.path}")
        case web.HTTPMethodNotAllowed():
            allowed = sorted(error.allowed_methods)
            return errors.MethodNotAllowed(f"{request.path} does not understand {request.method}", allowed=allowed)
        case web.HTTPRequestEntityTooLarge():
            return errors.TooLarge()
        case web.HTTPExpectationFailed():
            return errors.ExpectationFailed()
        case web.HTTPClientError():
            return errors.Malformed(error.reason)
        case _:
            _log.error("request_failed", request_id=request_id, path=request.path, exc_info=error)
            return errors.Internal()


def problem(request: web.BaseRequest, error: JobwireError, request_id: str) -> web.Response:
    """The answer that carries RFC 9457 and both older documented shapes."""
    body = problem_body(error, request.rel_url.raw_path, request_id)
    response = web.Response(body=_dumps(body), status=body["status"], content_type="application/problem+json")
    response.headers["Cache-Control"] = "no-store"
    _add_what_the_status_asks_for(response, error)
    return response


def problem_body(error: JobwireError, instance: str, request_id: str) -> dict[str, Any]:
    """A ProblemSchema. `instance`: the path without its query."""
    status, title = STATUS_TABLE[type(error)]
    return {
        "type": error.problem_type or f"urn:jobwire:error:{error.error_type}",
        "title": title,
        "status": status,
        "detail": error.detail,
        "instance": instance,
        "error": title,
        "details": error.details,
        "suggestions": list(error.suggestions),
        "request_id": request_id,
        **error.members,
    }


def _end_with_a_broken_body(request: web.Request, response: web.Response) -> None:
    """Where a body broke off nobody knows where the next request begins: the connection ends with this answer."""
    if request.content.exception() is not None:
        request.content.feed_eof()  # aiohttp would read on, for a body that does not come
        response.force_close()


def _add_what_the_status_asks_for(response: web.Response, error: JobwireError) -> None:
    response.headers.update(error.headers)
    if isinstance(error, errors.Unauthorized):
        response.headers["WWW-Authenticate"] = 'Bearer realm="jobwire"'
    if isinstance(error, errors.MethodNotAllowed) and "allowed" in error.details:
        response.headers["Allow"] = ", ".join(error.details["allowed"])
    if isinstance(error, errors.NotFinished | errors.Unavailable):
        response.headers["Retry-After"] = str(error.retry_after_s)


def _dumps(body: dict[str, Any]) -> bytes:
    """JSON even when the path holds what UTF-8 cannot carry."""
    try:
        return orjson.dumps(body)
    except TypeError:
        return orjson.dumps(
            {
                **body,
                "detail": _storable(body["detail"]),
                "details": {
                    name: _storable(value) if isinstance(value, str) else value
                    for name, value in body["details"].items()
                },
            }
        )


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _write_access_log(request: web.Request, response: web.StreamResponse, request_id: str, took_s: float) -> None:
    """The path without its query: tickets travel there."""
    _log.info(
        "request",
        request_id=request_id,
        method=request.method,
        path=request.path,
        status=response.status,
        took_ms=round(took_s * 1000, 2),
    )
