"""May this key ask once more? Redis judges for all processes; refusals are remembered here; alone, we judge alone."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from service.errors import RateLimited, RedisAway
from service.limiting.policies import Policy
from service.limiting.rolling_log import RollingLog
from service.stores.limit_log import LimitLog, Place

FORGET_AFTER_s: Final = 120.0
FREE_CHECKS_PER_PLACE: Final = 20

_Whose = tuple[str, Policy]


@dataclass(slots=True)
class Grant:
    """A place that was taken. `left`: places after it; `returns_in_s`: until the oldest in use comes back."""

    policy: Policy
    left: int
    returns_in_s: float

    @property
    def headers(self) -> dict[str, str]:
        """RateLimit-Policy and RateLimit, as every limited answer carries them."""
        return rate_limit_headers(self.policy, self.left, self.returns_in_s)


@dataclass(slots=True)
class Asked:
    """A question under way."""

    limiter: Limiter
    key: _Whose
    sent_at: float
    place: asyncio.Future[Place] | None

    async def answer(self) -> Grant:
        """Raises RateLimited."""
        try:
            place = await self.place if self.place is not None else None
        except RedisAway:
            place = None
        return self.limiter.conclude(self, place)


class Limiter:
    """Exact for all processes while one Redis lives; across its loss each process grants its share of the limit.

    `processes`: how many share the limit, as last seen. `asked`, `refused_here`, `judged_alone` count decisions.
    """

    def __init__(self, log: LimitLog, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds and never runs backwards; the windows themselves are on Redis's clock."""
        self._log = log
        self._clock = clock
        self._refused_until: dict[_Whose, float] = {}
        self._granted: dict[_Whose, RollingLog] = {}
        self._checks: dict[_Whose, RollingLog] = {}
        self.processes = 1
        self.asked = self.refused_here = self.judged_alone = 0

    def ask(self, whose: str, policy: Policy) -> Asked:
        """Asks for one place. Raises RateLimited at once where a refusal still stands: no question is sent then.

        The question is sent at the end of this turn of the event loop, in one trip with all that is asked of Redis
        until then: start reading before you await the answer.
        """
        key = (whose, policy)
        self._refuse_what_was_refused(key)
        try:
            return Asked(self, key, self._clock(), self._log.take(whose, policy.name, policy.most, policy.window_s))
        except RedisAway:
            return Asked(self, key, self._clock(), None)

    async def take(self, whose: str, policy: Policy) -> Grant:
        """One place. Raises RateLimited."""
        return await self.ask(whose, policy).answer()

    def conclude(self, asked: Asked, place: Place | None) -> Grant:
        """What follows from Redis's answer, or (None) from having none. Raises RateLimited."""
        policy = asked.key[1]
        if place is None:
            place = self._judge_alone(asked.key)
        else:
            self.asked += 1
        if not place.granted:
            # Counted from when the question was sent: we stop refusing a little early rather than late.
            self._refused_until[asked.key] = asked.sent_at + place.returns_in_s
            raise refusal(policy, place.returns_in_s)
        self._log_of(self._granted, asked.key).add(self._clock())
        return Grant(policy, place.left, place.returns_in_s)

    async def look(self, whose: str, policy: Policy) -> Place:
        """What is left now, taking nothing and counting nothing; while Redis is away, of this process's share.

        A refusal that stands counts here too: Redis may answer and be unable to write down what was taken.
        """
        key = (whose, policy)
        refused_s = self._refused_for_s(key)
        if refused_s > 0:
            return Place(False, 0, refused_s)
        try:
            return await self._log.look(whose, policy.name, policy.most, policy.window_s)
        except RedisAway:
            return self._left_alone(key)

    async def look_at_all(self, whose: str, policies: Sequence[Policy]) -> list[Place]:
        """What is left of each, asked in one trip to Redis."""
        return await asyncio.gather(*(self.look(whose, policy) for policy in policies))

    def may_check_freely(self, whose: str, policy: Policy | None) -> bool:
        """Whether a conditional poll may still be free: up to 20 times the poll limit per key and process."""
        if policy is None:
            return True
        log, now = self._log_of(self._checks, (whose, policy)), self._clock()
        if log.used(now) >= FREE_CHECKS_PER_PLACE * policy.most:
            return False
        log.add(now)
        return True

    def tick(self) -> None:
        """Forgets what has no meaning any more. To be called every few seconds."""
        now = self._clock()
        self._refused_until = {key: until for key, until in self._refused_until.items() if until > now}
        for logs in (self._granted, self._checks):
            for key in [key for key, log in logs.items() if not log.used(now)]:
                del logs[key]

    def _refuse_what_was_refused(self, key: _Whose) -> None:
        """A refusal that still stands needs no question. It names its policy, so a changed limit is another."""
        refused_s = self._refused_for_s(key)
        if refused_s > 0:
            self.refused_here += 1
            raise refusal(key[1], refused_s)

    def _refused_for_s(self, key: _Whose) -> float:
        """How long a refusal still stands; 0 where there is none."""
        until = self._refused_until.get(key)
        return max(0.0, until - self._clock()) if until is not None else 0.0

    def _judge_alone(self, key: _Whose) -> Place:
        """One place of this process's share."""
        self.judged_alone += 1
        place = self._left_alone(key)
        return Place(place.granted, max(0, place.left - 1), place.returns_in_s or key[1].window_s)

    def _left_alone(self, key: _Whose) -> Place:
        """What is left of this process's share, counting what it granted before Redis went away."""
        log, now = self._log_of(self._granted, key), self._clock()
        share = max(1, key[1].most // self.processes)
        left = max(0, share - log.used(now))
        return Place(left > 0, left, log.returns_in_s(now, share))

    def _log_of(self, logs: dict[_Whose, RollingLog], key: _Whose) -> RollingLog:
        log = logs.get(key)
        if log is None:
            log = logs[key] = RollingLog(key[1].window_s)
        return log


def refusal(policy: Policy, returns_in_s: float) -> RateLimited:
    """The 429 of a policy: waiting as long as it says succeeds if nobody else uses the key."""
    error = RateLimited(policy.name, policy.most, policy.window_s, max(1, math.ceil(returns_in_s)))
    error.headers |= rate_limit_headers(policy, 0, returns_in_s)
    return error


def rate_limit_headers(policy: Policy, left: int, returns_in_s: float) -> dict[str, str]:
    """RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers)."""
    return {"RateLimit-Policy": policy.header, "RateLimit": f'"{policy.name}";r={left};t={math.ceil(returns_in_s)}'}
