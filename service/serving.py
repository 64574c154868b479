"""Serves the application over HTTP, and leaves without losing a request.

Also what aiohttp itself refuses, before any handler, answers as problem+json.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import structlog
import uvloop
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from service.app import CORS, LEAVING, PROBLEMS, REQUEST_IDS, make_app
from service.cors import Cors
from service.errors import ExpectationFailed, Malformed
from service.listener import BACKLOG, Listener
from service.middlewares import Problems, RequestIds
from service.requests import Connection
from service.settings import Settings

LONGEST_LINE_bytes: Final = 8190
FINISHING_s: Final = 10.0
"""How long a process that leaves waits for requests that it has begun."""
GIVING_UP_s: Final = 1.0
"""And for those to end that it then gives up."""
QUIET_FOR_s: Final = 0.5
NEW_FOR_s: Final = 3.0
"""A process that leaves closes a connection on which nothing came for so long, after an answer or before a question."""
CLOSING_EVERY_s: Final = 0.05
KEEP_ALIVE_s: Final = 75.0


class _Connection(Connection):
    """One connection of a client. `heard_at`: when it said something last, by the loop's time."""

    request_ids: RequestIds
    problems: Problems
    cors: Cors | None
    leaving: asyncio.Event
    heard_at: float

    def is_silent(self, now: float) -> bool:
        """Everything that was asked has been answered, and nothing was said lately."""
        return self.is_idle and now - self.heard_at > (QUIET_FOR_s if self._request_count else NEW_FOR_s)

    @property
    def is_open(self) -> bool:
        """The client is there, or what it asked is still being done."""
        return self.transport is not None or self._request_in_progress

    @property
    def is_idle(self) -> bool:
        """Everything that was asked has been answered."""
        return self._waiter is not None and not self._messages

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self.heard_at = self._loop.time()
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """A body that stops making sense ends for whoever reads it: the parser would leave that reader waiting."""
        self.heard_at = self._loop.time()
        super().data_received(data)
        request = self._current_request
        if self._messages and request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("what followed was not the rest of the body"))

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What the parser refuses (a long line, bad syntax) and what no handler caught."""
        if request.writer.output_size:
            raise ConnectionError("a response has begun; all that is left is to close") from exc
        if isinstance(exc, LineTooLong):
            return self._refuse(request, Malformed(f"A line of the request is longer than {LONGEST_LINE_bytes} bytes"))
        if status == 400:
            reason = (message or "").partition("\n")[0][:200].rstrip(" :")
            return self._refuse(request, Malformed(f"The request could not be parsed: {reason or 'bad request'}"))
        if isinstance(exc, UnicodeEncodeError):  # aiohttp repeats an Expect header, and this one is no text
            return self._refuse(request, ExpectationFailed())
        return self._refuse(request, exc or RuntimeError(message))

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """What the framework refuses outside the middlewares (the Expect header) is still an exception here."""
        if isinstance(resp, web.HTTPException):
            resp = self._refuse(request, resp)
        if self.leaving.is_set() and not self._messages and not resp.prepared:
            resp.force_close()  # the next request is for another process
        return await super().finish_response(request, resp, start_time)

    def _refuse(self, request: web.BaseRequest, error: BaseException) -> web.Response:
        request_id = self.request_ids.of(request)
        response = self.problems.of(request, error, request_id)
        response.headers["X-Request-Id"] = request_id
        if self.cors is not None:  # no signal of the application is sent for these
            self.cors.mark(request.headers.get("Origin"), response.headers)
        response.force_close()
        return response


class _Server(web.Server):
    def __init__(self, template: web.Server, app: web.Application, **options: Any) -> None:
        super().__init__(template.request_handler, request_factory=template.request_factory, **options)
        self._app = app
        self._options = options

    def __call__(self) -> web.RequestHandler:
        connection = _Connection(self, loop=asyncio.get_running_loop(), **self._options)
        connection.request_ids = self._app[REQUEST_IDS]
        connection.problems = self._app[PROBLEMS]
        connection.cors = self._app.get(CORS)
        connection.leaving = self._app[LEAVING]
        return connection


class ServiceRunner(web.AppRunner):
    """An AppRunner whose connections refuse in problem+json, and which loses no request when it ends.

    `at_once`: set it, and the process leaves without going on for a while.
    """

    def __init__(self, app: web.Application, *, drain_s: float, **options: Any) -> None:
        """`drain_s`: how long a process that leaves goes on serving, until others are there and known."""
        super().__init__(app, **options)
        self.at_once = asyncio.Event()
        self._drain_s = drain_s
        self._listeners: list[Listener] = []

    def listen(self, sock: socket.socket) -> None:
        """Takes connections from a socket that other processes may share."""
        assert self.server is not None, "setup() comes first"
        self._listeners.append(Listener(sock, self.server))

    async def cleanup(self) -> None:
        """Leaves, then closes everything."""
        if self.server is not None:
            await self._leave()
        await super().cleanup()

    async def _leave(self) -> None:
        """Every request that reaches this process is answered, and the next one of the same client reaches another.

        First it goes on as before, but closes each connection with an answer. Then it takes no more connections,
        answers what is held and ends its streams. Connections whose clients have nothing to say are closed last.
        """
        self.app[LEAVING].set()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.at_once.wait(), self._drain_s)
        for site in self.sites:
            await site.stop()
        for listener in self._listeners:
            await listener.stop()
        await self.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(FINISHING_s):
                while still_open := self._open():
                    now = asyncio.get_running_loop().time()
                    for connection in still_open:
                        if connection.is_idle if self.at_once.is_set() else connection.is_silent(now):
                            hang_up(connection)
                    await asyncio.sleep(CLOSING_EVERY_s)

    def _open(self) -> list[_Connection]:
        assert self.server is not None
        ours = [connection for connection in self.server.connections if isinstance(connection, _Connection)]
        return [connection for connection in ours if connection.is_open]

    async def _make_server(self) -> web.Server:
        return _Server(await super()._make_server(), self.app, **self._kwargs)


def hang_up(connection: _Connection) -> None:
    """Unless something lies unread. At once, and not when the loop comes to it: the next request may be on its way."""
    if connection.transport is None:
        return
    descriptor = os.dup(connection.transport.get_extra_info("socket").fileno())
    with socket.socket(fileno=descriptor) as wire, suppress(OSError):  # one that is broken is the loop's to notice
        try:
            wire.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            wire.shutdown(socket.SHUT_WR)
            connection.force_close()


async def runner() -> ServiceRunner:
    """For gunicorn; see deploy/gunicorn.conf.py."""
    allow_many_files()
    settings = Settings.read(*WEB_NEEDS)
    configure_logging(settings.log_level)
    return make_runner(settings)


def make_runner(settings: Settings) -> ServiceRunner:
    """The service, ready to be set up."""
    return ServiceRunner(
        make_app(settings),
        drain_s=settings.drain_s,
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=KEEP_ALIVE_s,
        shutdown_timeout=GIVING_UP_s,
    )


WEB_NEEDS: Final = ("DATABASE_URL", "REDIS_URL", "JOBWIRE_SECRETS")


def run_web(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    configure_logging(settings.log_level)
    uvloop.run(serve(settings, on_ready=_say_ready))


async def serve(settings: Settings, *, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM, or SIGINT, which is in a hurry; `on_ready(url)` is called once the port is open."""
    allow_many_files()
    stop, service = asyncio.Event(), make_runner(settings)

    def interrupt() -> None:
        service.at_once.set()
        stop.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
    await service.setup()
    try:
        await web.TCPSite(service, settings.host, settings.port, backlog=BACKLOG).start()
        on_ready(_url(service))
        await stop.wait()
    finally:
        await service.cleanup()


def allow_many_files() -> None:
    """As many as this process may have: each connection is one, and many systems begin with 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems name a limit that they do not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def configure_logging(level: str) -> None:
    """JSON lines on stderr, ours and the libraries' alike."""
    renderers: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*renderers, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
            foreign_pre_chain=renderers,
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


def _url(service: ServiceRunner) -> str:
    host, port = service.addresses[0][:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _say_ready(url: str) -> None:
    print(f"ready {url}", flush=True)
