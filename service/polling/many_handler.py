"""The addresses under which many jobs, and batches, are read."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

from schemas.requests import BatchQuerySchema, JobIdsSchema, ManyQuerySchema
from service.errors import JobwireError
from service.identity import Caller
from service.polling.handler import JSON_HEADERS, respond
from service.polling.many_operation import BatchReader
from service.polling.operation import LONGEST_WAIT_s, Waiting, Waker
from service.requests import (
    PREFER,
    batch_id_of,
    checked,
    json_body,
    none_match,
    on_hangup,
    query,
    wait_preference,
)
from service.status_reader import StatusReader
from service.stores.ready import ReadyAnswer

_MANY_QUERY: Final = ManyQuerySchema()
_MANY: Final = JobIdsSchema()
_BATCH_QUERY: Final = BatchQuerySchema()


class PollingMany:
    """Reads many jobs in one call."""

    def __init__(self, reader: StatusReader, batches: BatchReader, waiting: Waiting) -> None:
        self._reader = reader
        self._batches = batches
        self._waiting = waiting

    async def statuses(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/status?job_ids=a,b,c: at most 200 jobs, in the order asked."""
        asked = query(request, _MANY_QUERY)
        return await self._statuses(caller, asked["job_ids"], asked["include_progress"])

    async def statuses_of_body(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """POST /jobs/status: at most 500 jobs."""
        asked = checked(_MANY, await json_body(request))
        return await self._statuses(caller, asked["job_ids"], asked["include_progress"])

    async def batch(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/batch/{batch_id}: counts and the first 1000 jobs, or 304."""
        asked, batch_id = query(request, _BATCH_QUERY), batch_id_of(request)
        if asked["include_progress"]:
            answer = await self._batches.read_with_progress(caller.account_id, batch_id)
            return _without_validator(answer)
        wait_s = wait_preference(request, LONGEST_WAIT_s) if PREFER in request.headers else None
        if wait_s is None:
            answer = await self._batches.read(caller.account_id, batch_id)
        else:
            waker = Waker(is_known=partial(none_match, request) if hdrs.IF_NONE_MATCH in request.headers else None)
            on_hangup(request, waker.give_up)
            answer = await self._batches.wait(self._waiting, caller.account_id, batch_id, waker, wait_s)
        return respond(request, answer, answer.shape_a, waited_s=wait_s, may_be_stale=self._reader.may_be_stale)

    async def _statuses(self, caller: Caller, job_ids: list[str], include_progress: bool) -> web.Response:
        found = await self._reader.read_many(caller.account_id, job_ids)
        jobs = [_line(job_id, job, include_progress) for job_id, job in zip(job_ids, found, strict=True)]
        return web.Response(body=orjson.dumps({"jobs": jobs}), headers=JSON_HEADERS.copy())


def _line(job_id: str, job: ReadyAnswer | JobwireError, include_progress: bool) -> dict[str, Any]:
    """One job of the answer; an unknown one never fails the call."""
    if isinstance(job, JobwireError):
        error = {"error_type": job.details["error_type"], "message": job.details["message"]}
        return {"job_id": job_id, "status": None, "error": error}
    line: dict[str, Any] = {"job_id": job_id, "status": job.status.lower(), "version": job.version}
    if include_progress:
        line["progress"] = orjson.loads(job.shape_b)["progress"]
    return line


def _without_validator(answer: ReadyAnswer) -> web.Response:
    headers = answer.headers.copy()
    del headers[hdrs.ETAG]
    return web.Response(body=answer.shape_a, headers=headers)
