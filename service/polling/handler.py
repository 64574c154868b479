"""The addresses under which one job is read."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import orjson
from aiohttp import hdrs, web
from multidict import CIMultiDict

from schemas.requests import HistoryQuerySchema, NothingSchema
from schemas.shapes import reduced, rfc3339
from service.identity import Caller
from service.polling.operation import ResultReader, Waiting, Waker
from service.requests import PREFER, job_id_of, none_match, on_hangup, query, wait_preference
from service.status_reader import StatusReader
from service.stores.ready import ReadyAnswer

STALE: Final = '110 - "Response is Stale"'
JSON_HEADERS: Final = CIMultiDict(
    {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "private, no-cache"}
)
_SHOWN_INLINE: Final = ("application/json", "text/plain")
_HISTORY_QUERY: Final = HistoryQuerySchema()
_NOTHING: Final = NothingSchema()


class Polling:
    """Reads one job in the shapes of the contract."""

    def __init__(self, reader: StatusReader, results: ResultReader, waiting: Waiting) -> None:
        self._reader = reader
        self._results = results
        self._waiting = waiting

    async def job(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/{job_id}: shape A, or 304."""
        answer, waited = await self._read(request, caller)
        return self._respond(request, answer, reduced(answer.shape_a) if caller.public else answer.shape_a, waited)

    async def status(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/{job_id}/status: shape B, or 304."""
        answer, waited = await self._read(request, caller)
        return self._respond(request, answer, reduced(answer.shape_b) if caller.public else answer.shape_b, waited)

    async def result(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/{job_id}/result: the stored bytes. Nothing in them can act in the reader's browser."""
        _refuse_query(request)
        result = await self._results.result(caller.account_id, job_id_of(request))
        etag = f'"{result.digest.hex()}"'
        headers = CIMultiDict(
            {
                "Content-Type": result.content_type,
                "ETag": etag,
                "Cache-Control": "private, no-cache",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "sandbox; default-src 'none'",
            }
        )
        if result.content_type.partition(";")[0].strip().lower() not in _SHOWN_INLINE:
            headers["Content-Disposition"] = "attachment"
        if none_match(request, etag):
            return web.Response(status=304, headers=headers)
        return web.Response(body=result.body, headers=headers)

    async def history(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/{job_id}/history: what changed, oldest first."""
        job_id = job_id_of(request)
        asked = query(request, _HISTORY_QUERY)
        changes, more = await self._results.history(caller.account_id, job_id, asked["after_version"], asked["limit"])
        body = {"job_id": job_id, "history": [_on_the_wire(change) for change in changes], "has_more": more}
        return web.Response(body=orjson.dumps(body), headers=JSON_HEADERS.copy())

    async def _read(self, request: web.Request, caller: Caller) -> tuple[ReadyAnswer, int | None]:
        """The job, and how many seconds the client let us wait for it (None: it did not)."""
        _refuse_query(request)
        job_id = job_id_of(request)
        wait_s = wait_preference(request) if PREFER in request.headers else None
        if wait_s:
            answer = await self._waiting.read(caller.account_id, job_id, waker_of(request, caller), wait_s)
        else:
            answer = await self._reader.read(caller.account_id, job_id)
        return answer, wait_s

    def _respond(self, request: web.Request, answer: ReadyAnswer, body: bytes, waited_s: int | None) -> web.Response:
        return respond(request, answer, body, waited_s=waited_s, may_be_stale=self._reader.may_be_stale)


def waker_of(request: web.Request, caller: Caller) -> Waker:
    """What wakes a poll that waits: a change of what the client has, or the end, or the client's own going."""
    conditional = hdrs.IF_NONE_MATCH in request.headers
    waker = Waker(caller.key_id, is_known=partial(none_match, request) if conditional else None)
    on_hangup(request, waker.give_up)
    return waker


def respond(
    request: web.Request, answer: ReadyAnswer, body: bytes, *, waited_s: int | None, may_be_stale: bool
) -> web.Response:
    """A ready answer as a response: 304 where the client has it."""
    headers = answer.headers.copy()
    if waited_s is not None:
        headers["Preference-Applied"] = f"wait={waited_s}"
    if may_be_stale:
        headers["Warning"] = STALE
    if none_match(request, answer.etag):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers)


def _refuse_query(request: web.Request) -> None:
    if request.query_string:  # almost never: no schema on the way of an ordinary poll
        query(request, _NOTHING)


def _on_the_wire(change: dict[str, Any]) -> dict[str, Any]:
    return {**change, "at": rfc3339(change["at"])}
