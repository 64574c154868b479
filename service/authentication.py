"""The door: no handler runs before it is known who calls and that the key's scopes allow it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from service.errors import Forbidden, Unauthorized
from service.identity import Caller, presented_key
from service.stores.key_memory import KeyMemory

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
HandlerWithCaller = Callable[[web.Request, Caller], Awaitable[web.StreamResponse]]


class Door:
    """Wraps handlers, so that `routes.py` shows which scope each address needs."""

    def __init__(self, keys: KeyMemory) -> None:
        self._keys = keys

    def needs(self, scope: str) -> Callable[[HandlerWithCaller], Handler]:
        """Lets in who holds a valid key with `scope`; others get Unauthorized or Forbidden."""

        def wrap(handler: HandlerWithCaller) -> Handler:
            async def guarded(request: web.Request) -> web.StreamResponse:
                key = presented_key(request.headers)
                if key is None:
                    raise Unauthorized()
                caller = self._keys.known(key) or await self._keys.find(key)
                if scope not in caller.scopes:
                    raise Forbidden(f"This key lacks the scope {scope}", needed_scope=scope)
                return await handler(request, caller)

            return guarded

        return wrap
