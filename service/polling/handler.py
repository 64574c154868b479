"""The addresses under which one job is read."""

from __future__ import annotations

from typing import Any, Final

import orjson
from aiohttp import web
from multidict import CIMultiDict

from schemas.requests import HistoryQuerySchema, NothingSchema
from schemas.shapes import rfc3339
from service.identity import Caller
from service.polling.operation import ResultReader, StatusReader
from service.requests import job_id_of, none_match, query
from service.stores.ready import ReadyAnswer

STALE: Final = '110 - "Response is Stale"'
_SHOWN_INLINE: Final = ("application/json", "text/plain")
_HISTORY_QUERY: Final = HistoryQuerySchema()
_NOTHING: Final = NothingSchema()


class Polling:
    """Reads one job in the shapes of the contract."""

    def __init__(self, reader: StatusReader, results: ResultReader) -> None:
        self._reader = reader
        self._results = results

    async def job(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/{job_id}: shape A, or 304."""
        _refuse_query(request)
        answer = await self._reader.read(caller.account_id, job_id_of(request))
        return self._respond(request, answer, answer.shape_a)

    async def status(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/{job_id}/status: shape B, or 304."""
        _refuse_query(request)
        answer = await self._reader.read(caller.account_id, job_id_of(request))
        return self._respond(request, answer, answer.shape_b)

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
        return web.Response(body=orjson.dumps(body), headers=_json_headers())

    def _respond(self, request: web.Request, answer: ReadyAnswer, body: bytes) -> web.Response:
        headers = answer.headers.copy()
        if self._reader.may_be_stale:
            headers["Warning"] = STALE
        if none_match(request, answer.etag):
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers)


def _refuse_query(request: web.Request) -> None:
    if request.query_string:  # almost never: no schema on the way of an ordinary poll
        query(request, _NOTHING)


def _on_the_wire(change: dict[str, Any]) -> dict[str, Any]:
    return {**change, "at": rfc3339(change["at"])}


def _json_headers() -> CIMultiDict[str]:
    return CIMultiDict({"Content-Type": "application/json; charset=utf-8", "Cache-Control": "private, no-cache"})
