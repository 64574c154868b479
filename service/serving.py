"""Serves the application over HTTP. Also what aiohttp itself refuses, before any handler, answers as problem+json."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import structlog
import uvloop
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from service.app import CORS, PROBLEMS, REQUEST_IDS, make_app
from service.cors import Cors
from service.errors import ExpectationFailed, Malformed
from service.middlewares import Problems, RequestIds
from service.requests import Connection
from service.settings import Settings

LONGEST_LINE_bytes: Final = 8190
SHUTDOWN_s: Final = 10.0
KEEP_ALIVE_s: Final = 75.0
BACKLOG: Final = 2048
"""New connections that wait to be taken: when thousands come back at once, those beyond it lose a second or more."""


class _Connection(Connection):
    """One connection of a client."""

    request_ids: RequestIds
    problems: Problems
    cors: Cors | None

    def data_received(self, data: bytes) -> None:
        """A body that stops making sense ends for whoever reads it: the parser would leave that reader waiting."""
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
        return connection


class ServiceRunner(web.AppRunner):
    """An AppRunner whose connections refuse in problem+json."""

    async def _make_server(self) -> web.Server:
        template = await super()._make_server()
        return _Server(template, self.app, **self._kwargs)


async def runner() -> ServiceRunner:
    """For gunicorn: `gunicorn service.serving:runner -k aiohttp.GunicornUVLoopWebWorker`."""
    allow_many_files()
    settings = Settings.read(*WEB_NEEDS)
    configure_logging(settings.log_level)
    return make_runner(settings)


def make_runner(settings: Settings) -> ServiceRunner:
    """The service, ready to be set up."""
    return ServiceRunner(
        make_app(settings),
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=KEEP_ALIVE_s,
        shutdown_timeout=SHUTDOWN_s,
    )


WEB_NEEDS: Final = ("DATABASE_URL", "REDIS_URL", "JOBWIRE_SECRETS")


def run_web(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM."""
    configure_logging(settings.log_level)
    uvloop.run(serve(settings, on_ready=_say_ready))


async def serve(settings: Settings, *, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM; `on_ready(url)` is called once the port is open."""
    allow_many_files()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = make_runner(settings)
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
