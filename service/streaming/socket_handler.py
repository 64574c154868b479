"""GET /jobs/{job_id}/status with a WebSocket upgrade."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import orjson
from aiohttp import web

from schemas.requests import SocketQuerySchema
from schemas.shapes import reduced, shape_b_of
from service.authentication import LIMIT_HEADERS
from service.errors import JobDeleted, JobExpired, JobwireError, Unavailable
from service.identity import Caller
from service.middlewares import REQUEST_ID
from service.requests import job_id_of, on_hangup, query
from service.stores.answers import deletion_notice, present_notice
from service.stores.event_channel import DELETED, Notice
from service.stores.ready import JobKey
from service.streaming.handler import GONE_FIRST
from service.streaming.operation import Streams
from service.streaming.silence import notice_silent_reader
from service.streaming.socket import JobSocket
from service.streaming.stream import STUCK_FOR_s
from service.streaming.ticket_operation import must_open

PING_EVERY_s: Final = 13.0
"""aiohttp waits up to a second longer; the contract says 15."""
LARGEST_MESSAGE_bytes: Final = 4096
"""Of what clients send, which is not looked at."""

_QUERY: Final = SocketQuerySchema()


class Sockets:
    """One job by WebSocket."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def job_status(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """Shape B as text frames: the present state, then changes; closed with 1000 once the job is finished."""
        query(request, _QUERY)
        key = (caller.account_id, job_id_of(request))
        must_open(caller, "job", key[1])
        follower = JobSocket(caller.key_id)
        with self._streams.counted(follower):
            async with self._streams.hub.follow(key, follower):
                present = present_notice(key, await self._streams.reader.read(*key))
                try:
                    socket = await _accepted(request)
                except ConnectionError:
                    return web.Response(status=GONE_FIRST)
                on_hangup(request, follower.end)
                follower.hear(present)
                listening = asyncio.create_task(_listen(socket, follower))
                try:
                    await self._send(request, socket, follower, key, public=caller.public)
                finally:
                    listening.cancel()  # while somebody listens aiohttp would hang up without hearing the client's end
                    await asyncio.wait([listening])
                await _close(request, socket, follower)
        return socket

    async def _send(
        self,
        request: web.Request,
        socket: web.WebSocketResponse,
        follower: JobSocket,
        key: JobKey,
        *,
        public: bool,
    ) -> None:
        """Until the job is finished, the client has gone, or nothing more may be sent."""
        try:
            async with asyncio.timeout(None) as patience:
                while not follower.ended and not socket.closed:
                    await follower.attention.wait()
                    follower.attention.clear()
                    if follower.doubted:
                        await self._read_anew(follower, key)
                    while (notice := follower.next()) is not None:
                        patience.reschedule(asyncio.get_running_loop().time() + STUCK_FOR_s)
                        await socket.send_str(_frame(notice, public=public))
                        patience.reschedule(None)
                        if notice.ends and not follower.has_more:
                            follower.finish()
        except (TimeoutError, ConnectionError):
            if request.transport is not None:
                request.transport.abort()

    async def _read_anew(self, follower: JobSocket, key: JobKey) -> None:
        follower.doubted = False
        try:
            follower.hear(present_notice(key, await self._streams.reader.read(*key)))
        except (JobDeleted, JobExpired):
            follower.hear(deletion_notice(key, follower.version + 1))
        except Unavailable:
            pass  # the next reconcile asks again
        except JobwireError:
            follower.end()


async def _accepted(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(heartbeat=PING_EVERY_s, compress=False, max_msg_size=LARGEST_MESSAGE_bytes)
    socket.headers.update(request.get(LIMIT_HEADERS, {}))
    socket.headers["X-Request-Id"] = request[REQUEST_ID]
    await socket.prepare(request)
    notice_silent_reader(request.transport)
    return socket


async def _close(request: web.Request, socket: web.WebSocketResponse, follower: JobSocket) -> None:
    """Says the end, and waits until the client has said it too: browsers call anything else unclean."""
    try:
        async with asyncio.timeout(follower.close_within_s):
            await socket.close(code=follower.close_code, message=follower.close_reason.encode())
    except (TimeoutError, ConnectionError):
        if request.transport is not None:
            request.transport.abort()


async def _listen(socket: web.WebSocketResponse, follower: JobSocket) -> None:
    """Answers pings and notices the close; what else a client sends is not looked at."""
    with suppress(ConnectionError):
        async for _ in socket:
            pass
    follower.end()


def _frame(notice: Notice, *, public: bool) -> str:
    """Shape B, made once for all who read it in the same way."""
    frame = notice.frames.get(("shape B", public))
    if frame is None:
        if notice.status == DELETED:
            frame = orjson.dumps({"job_id": notice.job_id, "status": None, "error": _GONE})
        else:
            shape = orjson.dumps(shape_b_of(orjson.loads(notice.body)))
            frame = reduced(shape) if public else shape
        notice.frames["shape B", public] = frame
    return frame.decode()


_GONE: Final = {"error_type": JobDeleted.error_type, "message": "The job was deleted"}
