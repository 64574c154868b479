"""The addresses under which jobs are followed by server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from random import randint
from typing import Final

import orjson
from aiohttp import HttpVersion11, web

from schemas.queries import ManyEventsQuerySchema
from schemas.requests import EventsQuerySchema, TicketSchema
from schemas.shapes import rfc3339
from service.authentication import LIMIT_HEADERS
from service.errors import JobDeleted, JobExpired, JobwireError
from service.identity import Caller
from service.job import FINISHED
from service.middlewares import REQUEST_ID
from service.requests import batch_id_of, checked, job_id_of, json_body, on_hangup, query
from service.stores.answers import present_notice
from service.stores.ready import ReadyAnswer
from service.streaming.filters import Filters
from service.streaming.frames import Form, problem_event, retry_line
from service.streaming.job_stream import JobStream
from service.streaming.many_operation import Following, Opened
from service.streaming.many_stream import ManyStream
from service.streaming.operation import Streams
from service.streaming.silence import notice_silent_reader
from service.streaming.ticket_operation import TicketOffice, must_open, narrowed, opens_set

STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}
GONE_FIRST: Final = 204
"""For a reader that hung up before its stream began: nobody receives it."""

GONE_ID: Final = "-0"
"""How the id of a job's deletion ends: there is no time of a change in it."""

_EVENTS_QUERY: Final = EventsQuerySchema()
_MANY_QUERY: Final = ManyEventsQuerySchema()
_TICKET: Final = TicketSchema()

Open = Callable[[ManyStream], AbstractAsyncContextManager[Opened | None]]


class Streaming:
    """Server-sent events of one job, of a set, of a batch, of an account."""

    def __init__(self, streams: Streams, following: Following, office: TicketOffice) -> None:
        self._streams = streams
        self._following = following
        self._office = office

    async def job_events(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/{job_id}/events: the present state, then every change, until the job is finished.

        204 for a reader that has the finished state already: that is how EventSource stops.
        """
        key = (caller.account_id, job_id_of(request))
        must_open(caller, "job", key[1])
        known_id = _last_event_id(request, query(request, _EVENTS_QUERY)["last_event_id"])
        if request.transport is None:
            return web.Response(status=GONE_FIRST)
        stream = JobStream(request.transport, caller.key_id, _form(request, caller))
        with self._streams.counted(stream):
            # Subscribe, await the acknowledgement, then read: no change falls in between.
            async with self._streams.hub.follow(key, stream):
                try:
                    answer = await self._streams.reader.read(*key)
                except (JobDeleted, JobExpired):
                    if known_id is not None and known_id.endswith(GONE_ID):  # the reader has been told
                        return web.Response(status=204)
                    raise
                known = known_id == _event_id(answer)
                if known and answer.status in FINISHED:
                    return web.Response(status=204)
                try:
                    response = await self._begun(request)
                except ConnectionError:
                    return web.Response(status=GONE_FIRST)
                on_hangup(request, stream.end)
                stream.begin(present_notice(key, answer), known=known)
                await self._streams.attend(stream, key)
            await _ended(response)
        return response

    async def batch_events(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/batch/{batch_id}/events: present states, every change, `batch` when it is over."""
        batch_id = batch_id_of(request)
        must_open(caller, "batch", batch_id)
        known_id = _last_event_id(request, query(request, _EVENTS_QUERY)["last_event_id"])
        return await self._many(
            request,
            caller,
            Filters(),
            lambda stream: self._following.batch(stream, caller.account_id, batch_id, known_id),
        )

    async def events(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs/events: a set of jobs to their end, or what happens in the account from now on."""
        asked = query(request, _MANY_QUERY)
        known_id = _last_event_id(request, asked["last_event_id"])
        of_set = asked["job_ids"] is not None or opens_set(caller)
        wanted = Filters(asked["user_id"], frozenset(asked["tags"]), frozenset(asked["status"]))
        filters = narrowed(caller, wanted, of_set=of_set)

        @asynccontextmanager
        async def open_(stream: ManyStream) -> AsyncIterator[Opened | None]:
            if of_set:
                job_ids = await self._office.set_of(caller, asked["job_ids"])
                opening = self._following.jobs(stream, caller.account_id, job_ids, known_id)
            else:
                opening = self._following.feed(stream, caller.account_id, known_id)
            async with opening as opened:
                yield opened

        return await self._many(request, caller, filters, open_)

    async def ticket(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """POST /tickets: the right to follow one thing for at most 15 minutes, for those who cannot send a key."""
        asked = checked(_TICKET, await json_body(request))
        ttl_s = asked.pop("ttl")
        ticket, expires_at = await self._office.issue(caller, asked, ttl_s)
        body = {"ticket": ticket, "expires_at": rfc3339(expires_at)}
        return web.Response(
            body=orjson.dumps(body),
            content_type="application/json",
            charset="utf-8",
            headers={"Cache-Control": "no-store"},
        )

    async def _many(self, request: web.Request, caller: Caller, filters: Filters, open_: Open) -> web.StreamResponse:
        if request.transport is None:
            return web.Response(status=GONE_FIRST)
        form = _form(request, caller)
        stream = ManyStream(request.transport, caller.key_id, form, filters)
        with self._streams.counted(stream):
            async with open_(stream) as opened:
                if opened is None:
                    return web.Response(status=204)
                try:
                    response = await self._begun(request)
                except ConnectionError:
                    return web.Response(status=GONE_FIRST)
                on_hangup(request, stream.end)
                stream.begin(
                    opened.opening,
                    event_id=opened.event_id,
                    position=opened.position,
                    position_id=opened.position_id,
                )
                await opened.attend()
            await _ended(response)
        return response

    async def _begun(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM_HEADERS)
        response.headers.update(request.get(LIMIT_HEADERS, {}))
        response.headers["X-Request-Id"] = request[REQUEST_ID]
        if request.version < HttpVersion11:
            response.force_close()  # neither a length nor chunks: only closing tells such a reader of the end
        await response.prepare(request)
        notice_silent_reader(request.transport)
        await response.write(retry_line())
        return response


def _form(request: web.Request, caller: Caller) -> Form:
    return Form(chunked=request.version >= HttpVersion11, public=caller.public)


async def _ended(response: web.StreamResponse) -> None:
    with suppress(ConnectionError):  # the reader has gone first
        await response.write_eof()


def _last_event_id(request: web.Request, asked: str | None) -> str | None:
    """The header, which EventSource sends by itself, or the parameter, for those who cannot set headers."""
    return request.headers.get("Last-Event-ID") or asked


def _event_id(answer: ReadyAnswer) -> str:
    return answer.etag.strip('"')


async def tell_in_stream(request: web.Request, error: JobwireError) -> web.StreamResponse:
    """A refusal that passes, as a stream that says when to come back: on 429 and 503 EventSource gives up for good."""
    if request.writer.output_size:  # a stream has begun
        raise error
    wait_s = int(error.headers.get("Retry-After", "2"))
    text = b"retry: %d\n%b" % (wait_s * 1000 + randint(0, 3000), problem_event(error.error_type, error.detail))  # noqa: S311
    return web.Response(body=text, headers=STREAM_HEADERS)
