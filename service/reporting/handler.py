"""The addresses under which jobs are created, reported on, cancelled, retried and deleted."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, Final

import orjson
from aiohttp import web

from schemas.requests import (
    MOST_JOBS_AT_ONCE,
    CancelSchema,
    NewJobSchema,
    NothingSchema,
    ReportOfManySchema,
    ReportSchema,
    ResultQuerySchema,
)
from schemas.shapes import batch_shape
from service.errors import JobwireError, Unavailable, UnsupportedMediaType, ValidationFailed
from service.identity import Caller
from service.job import NewJob, Report
from service.reporting.operation import Idempotency, Reported, Reporting
from service.requests import (
    ARRAY_LIMIT,
    AT_A_TIME,
    RESULT_LIMIT,
    batch_id_of,
    body_bytes,
    checked,
    checked_many,
    count_is_fine,
    if_match,
    job_id_of,
    json_body,
    query,
)

BEHIND: Final = '199 - "readers may be up to 2 s behind"'
LONGEST_IDEMPOTENCY_KEY: Final = 255
LONGEST_CONTENT_TYPE: Final = 255

_NEW_JOB: Final = NewJobSchema()
_REPORT: Final = ReportSchema()
_REPORT_OF_MANY: Final = ReportOfManySchema()
_CANCEL: Final = CancelSchema()
_NOTHING: Final = NothingSchema()
_RESULT_QUERY: Final = ResultQuerySchema()


class Writing:
    """Turns requests into reports, and their ends into answers."""

    def __init__(self, reporting: Reporting, status_of: dict[str, int]) -> None:
        """`status_of`: the HTTP status of each error_type, for the items of `PATCH /jobs`."""
        self._reporting = reporting
        self._status_of = status_of

    async def create(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """POST /jobs: one job, or an array of them, all or nothing."""
        query(request, _NOTHING)
        asked = await json_body(request, array_limit=ARRAY_LIMIT)
        items = asked if isinstance(asked, list) else [asked]
        if isinstance(asked, list):
            jobs = [_new_job(item) for item in await checked_many(_NEW_JOB, items, MOST_JOBS_AT_ONCE)]
        else:
            jobs = [_new_job(checked(_NEW_JOB, asked))]
        created = await self._reporting.create(
            caller.account_id, jobs, as_one=isinstance(asked, dict), idempotency=_idempotency(request, asked)
        )
        response = _json(created.body, 200 if created.repeated else 201, told=created.told)
        if created.location is not None:
            response.headers["Location"] = created.location
        return response

    async def report(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """PATCH /jobs/{job_id}: one report."""
        query(request, _NOTHING)
        said = checked(_REPORT, await json_body(request))
        return _reported(await self._reporting.report(Report(**_whose(request, caller), **said)))

    async def report_many(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """PATCH /jobs: an array of reports; one bad item never fails the others."""
        query(request, _NOTHING)
        items = await json_body(request, array_limit=ARRAY_LIMIT)
        if not isinstance(items, list):
            raise ValidationFailed({"_schema": ["The body must be an array of reports."]})
        count_is_fine(items, MOST_JOBS_AT_ONCE)
        reports, results = await self._sorted_out(items, caller.account_id)
        ends, told = await self._reporting.report_many([report for _, report in reports])
        if ends and all(isinstance(end, Unavailable) for end in ends):
            raise Unavailable()
        for (place, report), end in zip(reports, ends, strict=True):
            results[place] = self._end(report.id, end)
        return _json(orjson.dumps({"results": results}), told=told)

    async def put_result(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """PUT /jobs/{job_id}/result: any content type."""
        asked = query(request, _RESULT_QUERY)
        content_type = request.headers.get("Content-Type") or "application/octet-stream"
        if len(content_type) > LONGEST_CONTENT_TYPE or not content_type.isprintable() or not content_type.isascii():
            raise UnsupportedMediaType("The Content-Type of the result is not one that can be sent again")
        body = await body_bytes(request, RESULT_LIMIT)
        report = Report(**_whose(request, caller), attempt=asked["attempt"])
        reported = await self._reporting.put_result(report, content_type, body, complete=asked["complete"])
        return _reported(reported)

    async def cancel(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """POST /jobs/{job_id}/cancel."""
        query(request, _NOTHING)
        asked = checked(_CANCEL, await json_body(request, optional=True))
        return _reported(await self._reporting.cancel(Report(**_whose(request, caller)), asked.get("reason")))

    async def retry(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """POST /jobs/{job_id}/retry."""
        query(request, _NOTHING)
        checked(_NOTHING, await json_body(request, optional=True))
        return _reported(await self._reporting.retry(Report(**_whose(request, caller))))

    async def delete(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """DELETE /jobs/{job_id}, in any state."""
        query(request, _NOTHING)
        job_id = job_id_of(request)
        told = await self._reporting.delete(caller.account_id, job_id, if_match(request))
        return _json(orjson.dumps({"message": f"Job {job_id} deleted"}), told=told)

    async def close_batch(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """POST /jobs/batch/{batch_id}/close: no more jobs; closing again is fine."""
        query(request, _NOTHING)
        checked(_NOTHING, await json_body(request, optional=True))
        batch, told = await self._reporting.close_batch(caller.account_id, batch_id_of(request))
        return _json(orjson.dumps(batch_shape(batch, include_progress=False)), told=told)

    async def _sorted_out(
        self, items: list[Any], account_id: int
    ) -> tuple[list[tuple[int, Report]], list[dict[str, Any] | None]]:
        """The good items as reports with their place in the array; at the places of the bad ones, what is wrong."""
        reports: list[tuple[int, Report]] = []
        results: list[dict[str, Any] | None] = []
        for place, item in enumerate(items):
            results.append(None)
            if place % AT_A_TIME == AT_A_TIME - 1:
                await asyncio.sleep(0)
            try:
                said = checked(_REPORT_OF_MANY, item)
                reports.append((place, Report(account_id, said.pop("id"), **said)))
            except ValidationFailed as error:
                named = item.get("id") if isinstance(item, dict) else None
                results[place] = self._end(named if isinstance(named, str) else None, error)
        return reports, results

    def _end(self, job_id: str | None, end: Reported | JobwireError) -> dict[str, Any]:
        """One line of the answer to `PATCH /jobs`."""
        if isinstance(end, Reported):
            return {"id": job_id, "status": 200, "version": end.answer.version}
        return {"id": job_id, "status": self._status_of[end.error_type], "error": end.details}


def _new_job(loaded: dict[str, Any]) -> NewJob:
    return NewJob(**{"id": "", **{name: value for name, value in loaded.items() if value is not None}})


def _whose(request: web.Request, caller: Caller) -> dict[str, Any]:
    return {"account_id": caller.account_id, "id": job_id_of(request), "if_match": if_match(request)}


def _idempotency(request: web.Request, asked: Any) -> Idempotency | None:
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not 1 <= len(key) <= LONGEST_IDEMPOTENCY_KEY or not key.isprintable() or not key.isascii():
        reason = f"Must be 1 to {LONGEST_IDEMPOTENCY_KEY} printable ASCII characters."
        raise ValidationFailed({"Idempotency-Key": [reason]})
    return Idempotency(key, hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest())


def _reported(reported: Reported) -> web.Response:
    response = _json(reported.answer.shape_a, told=reported.told)
    response.headers["ETag"] = reported.answer.etag
    return response


def _json(body: bytes, status: int = 200, *, told: bool) -> web.Response:
    response = web.Response(body=body, status=status, content_type="application/json", charset="utf-8")
    response.headers["Cache-Control"] = "no-store"
    if not told:
        response.headers["Warning"] = BEHIND
    return response
