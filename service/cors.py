"""CORS: which pages of other origins may call from a browser. Nothing here runs unless origins are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from aiohttp import hdrs, web
from multidict import CIMultiDict

from service.requests import Handler

ANY: Final = "*"
EXPOSED: Final = "ETag, Retry-After, RateLimit, RateLimit-Policy, X-Request-Id, Location, Preference-Applied"
ALLOWED_HEADERS: Final = (
    "X-API-Key, api-key, Authorization, Content-Type, If-None-Match, If-Match, Prefer, Last-Event-ID, Idempotency-Key, "
    "X-Request-Id"
)
REMEMBERED_s: Final = 7200
"""How long a browser may remember a preflight; no browser but Firefox remembers longer."""


class Cors:
    """Marks every response for its origin, and answers preflights, which carry no key.

    Credentials are never allowed: keys come in headers that a page sets itself, so `*` gives no page more than it has.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = ANY in origins
        self._origins = frozenset(origins)

    def mark(self, origin: str | None, headers: CIMultiDict[str]) -> None:
        """Adds to a response what lets the page of an allowed origin read it; others get nothing, and caches know."""
        if self._any:
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = ANY
        else:
            vary = headers.getall(hdrs.VARY, [])
            if hdrs.ORIGIN not in vary:
                headers.add(hdrs.VARY, hdrs.ORIGIN)
            if origin not in self._origins:
                return
            headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
        headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED

    async def mark_response(self, request: web.Request, response: web.StreamResponse) -> None:
        """For `on_response_prepare`: also of errors and streams."""
        self.mark(request.headers.get(hdrs.ORIGIN), response.headers)

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin may call."""
        return self._any or origin in self._origins


def preflight_middleware(cors: Cors) -> Any:
    """Answers OPTIONS before the door: a browser sends no key with it. The methods are those that the path has."""

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        refused = request.match_info.http_exception
        asks = request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
        if not asks or not isinstance(refused, web.HTTPMethodNotAllowed):
            return await handler(request)
        response = web.Response(status=204)
        if cors.allows(request.headers.get(hdrs.ORIGIN, "")):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = ", ".join(sorted(refused.allowed_methods))
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = ALLOWED_HEADERS
            response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = str(REMEMBERED_s)
        return response

    return around
