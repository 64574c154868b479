"""The door: no handler runs before it is known who calls, that the key's scopes allow it, and that its limit does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from aiohttp import hdrs, web

from service.errors import Forbidden, JobwireError, RateLimited, TooManyStreams, Unauthorized, Unavailable
from service.identity import READ, WRITE, Caller, presented_key
from service.job import is_job_id
from service.limiting.addresses import Network, client_address
from service.limiting.limiter import Grant, Limiter, refusal
from service.limiting.policies import FAILED_KEYS, POLICIES, Policy, policy_of
from service.requests import PREFER, Handler, wait_preference
from service.stores.key_memory import KeyMemory
from service.stores.public_memory import PublicMemory
from service.tickets import Tickets

HandlerWithCaller = Callable[[web.Request, Caller], Awaitable[web.StreamResponse]]

LIMIT_HEADERS: Final = web.RequestKey("limit_headers", dict[str, str])
"""Where a request keeps the headers of its place, for a handler that answers by itself (a stream)."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What an address asks. `policy` None: no place of a limit.

    `public`: without a key it is open for public jobs; `ticket`: or with one.
    """

    scope: str
    policy: str | None
    public: bool = False
    ticket: bool = False


class Door:
    """Wraps handlers, so that `routes.py` shows what each address needs: a scope and a policy of the limiter.

    `needs`: of every handler that it wrapped. A handler that is not there is open to all.
    """

    def __init__(
        self,
        keys: KeyMemory,
        public: PublicMemory,
        limiter: Limiter,
        trusted: Sequence[Network],
        tickets: Tickets,
        tell_in_stream: Callable[[web.Request, JobwireError], Awaitable[web.StreamResponse]],
    ) -> None:
        """`tell_in_stream`: answers a refusal that passes to a reader whose EventSource would give up for good."""
        self._keys = keys
        self._tickets = tickets
        self._tell_in_stream = tell_in_stream
        self._public = public
        self._limiter = limiter
        self._trusted = trusted
        self.needs: dict[Handler, Needs] = {}

    def polls(
        self,
        handler: HandlerWithCaller,
        *,
        public: bool = False,
        policy: str = "poll",
        free: Callable[[web.Request], bool] | None = lambda request: True,
    ) -> Handler:
        """Reading one job or one batch: the place is asked for in the same trip to Redis as the job.

        An unchanged answer to If-None-Match takes no place, where that is cheap to say (`free`; None: never).
        `public`: without a key, public jobs are open.
        """

        async def guarded(request: web.Request) -> web.StreamResponse:
            caller = self._known(request, READ)
            if caller is None:
                if public and presented_key(request.headers) is None:
                    return await self._without_key(request, handler)
                caller = await self._find(request, READ)
            limit = policy_of(caller, policy)
            if PREFER in request.headers and wait_preference(request):
                return await self._wait(request, caller, limit, handler)
            if limit is None:
                return await handler(request, caller)
            if (
                hdrs.IF_NONE_MATCH in request.headers
                and free is not None
                and free(request)
                and self._limiter.may_check_freely(caller.key_id, limit)
            ):
                return await self._free_if_unchanged(request, caller, limit, handler)
            asked = self._limiter.ask(caller.key_id, limit)
            try:
                response = await handler(request, caller)
            except JobwireError as error:
                raise _with_headers(error, await asked.answer()) from None
            response.headers.update((await asked.answer()).headers)
            return response

        self.needs[guarded] = Needs(READ, policy, public)
        return guarded

    def reads(self, handler: HandlerWithCaller, policy: str) -> Handler:
        """Reading anything else: a place first."""
        return self._after_a_place(handler, READ, policy)

    def looks(self, handler: HandlerWithCaller) -> Handler:
        """Reading about the key itself: takes no place, so that no limit refuses it."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            return await handler(request, self._known(request, READ) or await self._find(request, READ))

        self.needs[guarded] = Needs(READ, None)
        return guarded

    def writes(self, handler: HandlerWithCaller) -> Handler:
        """Reporting: a place first."""
        return self._after_a_place(handler, WRITE, "write")

    def streams(self, handler: HandlerWithCaller, *, public: bool = False) -> Handler:
        """Following, by key or ticket: a place first; its headers are left for the handler, which answers by itself."""

        follow = self._follows(handler, public=public)

        async def open_to_all(request: web.Request) -> web.StreamResponse:
            try:
                return await follow(request)
            except (RateLimited, TooManyStreams, Unavailable) as error:
                if not _has_ticket(request):
                    raise
                return await self._tell_in_stream(request, error)

        self.needs[open_to_all] = Needs(READ, "stream", public, ticket=True)
        return open_to_all

    def upgrades(self, handler: HandlerWithCaller, *, otherwise: Handler) -> Handler:
        """`handler` for requests that ask for a WebSocket: as `streams`, but every refusal is one of the handshake."""
        socket = self._follows(handler, public=self.needs[otherwise].public)

        async def either(request: web.Request) -> web.StreamResponse:
            if hdrs.UPGRADE in request.headers and request.headers[hdrs.UPGRADE].lower() == "websocket":
                return await socket(request)
            return await otherwise(request)

        self.needs[either] = self.needs[otherwise]
        return either

    def _follows(self, handler: HandlerWithCaller, *, public: bool) -> Handler:
        async def follow(request: web.Request) -> web.StreamResponse:
            if _has_ticket(request):
                return await self._follow(request, self._caller_of_ticket, handler)
            if public and presented_key(request.headers) is None:
                return await self._without_key(request, handler, "stream")
            return await self._follow(request, self._caller_of_key, handler)

        return follow

    async def _follow(
        self, request: web.Request, who: Callable[[web.Request], Awaitable[Caller]], handler: HandlerWithCaller
    ) -> web.StreamResponse:
        """A place first. Then who calls is asked once more: a key that ends meanwhile ends only what is open."""
        caller = await who(request)
        policy = policy_of(caller, "stream")
        if policy is None:
            return await handler(request, caller)
        grant = await self._limiter.take(caller.key_id, policy)
        return await _with_place(request, await who(request), handler, grant)

    async def _caller_of_key(self, request: web.Request) -> Caller:
        return self._known(request, READ) or await self._find(request, READ)

    async def _caller_of_ticket(self, request: web.Request) -> Caller:
        """As with the key that made the ticket, but for one thing only."""
        key_id, right = self._tickets.read(request.query["ticket"])
        return replace(_allowed(await self._keys.find_by_id(key_id), READ), right=right)

    def _after_a_place(self, handler: HandlerWithCaller, scope: str, policy_name: str) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            caller = self._known(request, scope) or await self._find(request, scope)
            policy = policy_of(caller, policy_name)
            if policy is None:
                return await handler(request, caller)
            return await _with_place(request, caller, handler, await self._limiter.take(caller.key_id, policy))

        self.needs[guarded] = Needs(scope, policy_name)
        return guarded

    async def _wait(
        self, request: web.Request, caller: Caller, policy: Policy | None, handler: HandlerWithCaller
    ) -> web.StreamResponse:
        """A poll that is held: it costs its place on arrival, and ends with its key."""
        grant = await self._limiter.take(caller.key_id, policy) if policy is not None else None
        # The key may have been forgotten meanwhile, and nobody has told a wait that was not held yet.
        caller = self._known(request, READ) or await self._find(request, READ)
        try:
            return await _with_place(request, caller, handler, grant)
        except Unauthorized as ended:  # revoked, expired, or Postgres was away for too long to tell
            with suppress(Unauthorized):
                await self._keys.find(presented_key(request.headers) or "")
                raise Unavailable("For a moment nobody could tell whether this key is valid.") from None
            raise ended from None

    async def _free_if_unchanged(
        self, request: web.Request, caller: Caller, policy: Policy, handler: HandlerWithCaller
    ) -> web.StreamResponse:
        """Freshness first; a place only for what is new."""
        try:
            response = await handler(request, caller)
        except JobwireError as error:
            raise _with_headers(error, await self._limiter.take(caller.key_id, policy)) from None
        if response.status != 304:
            response.headers.update((await self._limiter.take(caller.key_id, policy)).headers)
        return response

    async def _without_key(
        self, request: web.Request, handler: HandlerWithCaller, policy_name: str = "poll"
    ) -> web.StreamResponse:
        """A public job for anybody, limited by the client's address."""
        address = self._address_of(request)
        grant = await self._limiter.take(address, POLICIES[policy_name])
        job_id = request.match_info["job_id"]
        account_id = await self._public.account_of(job_id) if is_job_id(job_id) else None
        if account_id is None:
            raise _with_headers(Unauthorized(), grant)
        caller = Caller(account_id, "", address, frozenset({READ}), public=True)
        return await _with_place(request, caller, handler, grant)

    def _known(self, request: web.Request, scope: str) -> Caller | None:
        """Who calls, if this process knows the key. Raises Unauthorized, Forbidden."""
        key = presented_key(request.headers)
        if key is None:
            return None
        caller = self._keys.known(key)
        return _allowed(caller, scope) if caller is not None else None

    async def _find(self, request: web.Request, scope: str) -> Caller:
        """Who calls. Raises Unauthorized, Forbidden, Unavailable, and RateLimited after many unknown keys."""
        key = presented_key(request.headers)
        if key is None:
            raise Unauthorized()
        address = self._address_of(request)
        failed = await self._limiter.look(address, FAILED_KEYS)
        if not failed.granted:
            raise refusal(FAILED_KEYS, failed.returns_in_s)
        try:
            caller = await self._keys.find(key)
        except Unauthorized:
            await self._limiter.take(address, FAILED_KEYS)
            raise
        return _allowed(caller, scope)

    def _address_of(self, request: web.Request) -> str:
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        forwarded_for = request.headers.getall("X-Forwarded-For", [])
        return client_address(peer[0] if peer else None, forwarded_for, self._trusted)


def _has_ticket(request: web.Request) -> bool:
    """Whether a ticket says who calls; a key beside it counts more."""
    return "ticket" in request.query and presented_key(request.headers) is None


async def _with_place(
    request: web.Request, caller: Caller, handler: HandlerWithCaller, grant: Grant | None
) -> web.StreamResponse:
    """`grant` None: the caller has no limit."""
    if grant is None:
        return await handler(request, caller)
    request[LIMIT_HEADERS] = grant.headers
    try:
        response = await handler(request, caller)
    except JobwireError as error:
        raise _with_headers(error, grant) from None
    if not response.prepared:
        response.headers.update(grant.headers)
    return response


def _with_headers(error: JobwireError, grant: Grant) -> JobwireError:
    error.headers |= grant.headers
    return error


def _allowed(caller: Caller, scope: str) -> Caller:
    if scope not in caller.scopes:
        raise Forbidden(f"This key lacks the scope {scope}", needed_scope=scope)
    return caller
