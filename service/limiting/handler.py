"""The address under which a key sees its limits."""

from __future__ import annotations

import math
from typing import Any, Final

import orjson
from aiohttp import web

from schemas.requests import NothingSchema
from service.identity import Caller
from service.limiting.limiter import Limiter
from service.limiting.policies import POLICIES, Policy, policy_of
from service.requests import query
from service.stores.limit_log import Place

_NOTHING: Final = NothingSchema()


class Limits:
    """What is left of the caller's limits."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    async def limits(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /limits: every policy of the key, with what is left of it now."""
        query(request, _NOTHING)
        policies = {name: policy_of(caller, name) for name in POLICIES}
        limited = [policy for policy in policies.values() if policy is not None]
        left = dict(zip(limited, await self._limiter.look_at_all(caller.key_id, limited), strict=True))
        body = {"limits": [_line(name, policy, left) for name, policy in policies.items()]}
        headers = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}
        return web.Response(body=orjson.dumps(body), headers=headers)


def _line(name: str, policy: Policy | None, left: dict[Policy, Place]) -> dict[str, Any]:
    """One policy; all but its name is null where nothing limits it."""
    if policy is None:
        return {"name": name, "limit": None, "window_seconds": None, "left": None, "next_place_in_seconds": None}
    place = left[policy]
    return {
        "name": name,
        "limit": policy.most,
        "window_seconds": policy.window_s,
        "left": place.left,
        "next_place_in_seconds": math.ceil(place.returns_in_s) or None,
    }
