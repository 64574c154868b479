"""The address under which one job is followed."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from aiohttp import HttpVersion11, web

from schemas.requests import EventsQuerySchema
from service.authentication import LIMIT_HEADERS
from service.identity import Caller
from service.job import FINISHED
from service.middlewares import REQUEST_ID
from service.requests import job_id_of, on_hangup, query
from service.stores.ready import ReadyAnswer
from service.streaming.frames import Form, retry_line
from service.streaming.operation import Streams, present_notice
from service.streaming.stream import JobStream

STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}
GONE_FIRST: Final = 204
"""For a reader that hung up before its stream began: nobody receives it."""

_EVENTS_QUERY: Final = EventsQuerySchema()


class Streaming:
    """Server-sent events."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def job_events(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/{job_id}/events: the present state, then every change, until the job is finished.

        204 for a reader that has the finished state already: that is how EventSource stops.
        """
        key = (caller.account_id, job_id_of(request))
        known_id = _last_event_id(request)
        if request.transport is None:
            return web.Response(status=GONE_FIRST)
        form = Form(chunked=request.version >= HttpVersion11, public=caller.public)
        stream = JobStream(request.transport, caller.key_id, form)
        with self._streams.counted(stream):
            # Subscribe, await the acknowledgement, then read: no change falls in between.
            async with self._streams.hub.follow(key, stream):
                answer = await self._streams.reader.read(*key)
                known = known_id == _event_id(answer)
                if known and answer.status in FINISHED:
                    return web.Response(status=204)
                try:
                    response = await self._begun(request)
                except ConnectionError:
                    return web.Response(status=GONE_FIRST)
                on_hangup(request, stream.end)
                stream.start(present_notice(key, answer), known=known)
                await self._streams.attend(stream, key)
            with suppress(ConnectionError):  # the reader has gone first
                await response.write_eof()
        return response

    async def _begun(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM_HEADERS)
        response.headers.update(request.get(LIMIT_HEADERS, {}))
        response.headers["X-Request-Id"] = request[REQUEST_ID]
        if request.version < HttpVersion11:
            response.force_close()  # neither a length nor chunks: only closing tells such a reader of the end
        await response.prepare(request)
        await response.write(retry_line())
        return response


def _last_event_id(request: web.Request) -> str | None:
    """The header, which EventSource sends by itself, or the parameter, for those who cannot set headers."""
    asked = query(request, _EVENTS_QUERY)
    return request.headers.get("Last-Event-ID") or asked["last_event_id"]


def _event_id(answer: ReadyAnswer) -> str:
    return answer.etag.strip('"')
