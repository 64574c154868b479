"""The rolling windows in Redis: one log per key and policy, for all processes, on Redis's clock."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from service.errors import RedisAway
from service.stores.keys import PROCESSES_KEY, limit_key
from service.stores.redis_pipe import RedisError, RedisPipe, Script

TAKE: Final = Script.load(Path(__file__).with_name("limit_log.take.lua"))

GRAIN: Final = 1000
"""A place returns at most a window divided by this late; about 24 KB of log per key, whatever its limit."""

ALIVE_FOR_s: Final = 15


@dataclass(slots=True)
class Place:
    """The end of one question. `left`: places after it. `returns_in_s`: until the next comes back (0: all are free)."""

    granted: bool
    left: int
    returns_in_s: float


_log = structlog.get_logger(__name__)

_Log = tuple[str, str, int, int]  # whose, which policy, limit, window in s


class LimitLog:
    """All that is asked of one log in one turn of the event loop is one script call, and all logs' are one trip.

    `refusal`: why Redis does not store what it is told, as it said last; '' if it does. `redis_errors` counts.
    """

    scripts: Final = (TAKE,)
    """What its pipe must be able to run."""

    def __init__(self, pipe: RedisPipe) -> None:
        self._pipe = pipe
        self._turn: dict[_Log, list[asyncio.Future[Place]]] = {}
        self.refusal = ""
        self.redis_errors = 0

    def take(self, whose: str, policy: str, most: int, window_s: int) -> asyncio.Future[Place]:
        """Takes one place of `most` in `window_s`, if there is one. Raises RedisAway, at once or from the future."""
        if not self._pipe.up:
            raise RedisAway(self._pipe.why_down)
        if not self._turn:
            self._pipe.before_send(self._send_turn)
        asker: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._turn.setdefault((whose, policy, most, window_s), []).append(asker)
        return asker

    async def look(self, whose: str, policy: str, most: int, window_s: int) -> Place:
        """What is left, taking nothing. `granted`: whether a place is free. Raises RedisAway."""
        _, left, returns_in_us = await self._ask((whose, policy, most, window_s), 0)
        return Place(left > 0, max(0, left), returns_in_us / 1e6)

    async def count_processes(self, process: str) -> int:
        """Says that `process` is alive, and how many were in the last 15 s. Raises RedisAway."""
        try:
            seconds, _ = await self._pipe.command("TIME")
            now_s = int(seconds)
            await self._pipe.command("ZADD", PROCESSES_KEY, now_s, process)
            await self._pipe.command("ZREMRANGEBYSCORE", PROCESSES_KEY, "-inf", now_s - ALIVE_FOR_s)
            self.refusal = ""  # else one of these would have been refused
            return max(1, int(await self._pipe.command("ZCARD", PROCESSES_KEY)))
        except RedisError as error:
            self._count(error)
            raise RedisAway(str(error)) from error

    def _send_turn(self) -> None:
        turn, self._turn = self._turn, {}
        for log, askers in turn.items():
            try:
                reply = self._pipe.call(*self._call(log, len(askers)))
            except RedisAway as away:
                _fail(askers, away)
            except Exception as fault:  # ours; still nobody may wait for ever
                _log.exception("redis_question_failed")
                _fail(askers, fault)
            else:
                reply.add_done_callback(partial(self._hand_out, askers))

    async def _ask(self, log: _Log, want: int) -> Any:
        try:
            return await self._pipe.call(*self._call(log, want))
        except RedisError as error:
            self._count(error)
            raise RedisAway(str(error)) from error

    def _call(self, log: _Log, want: int) -> tuple[Script, list[bytes], list[int]]:
        whose, policy, most, window_s = log
        window_us = window_s * 1_000_000
        return TAKE, [limit_key(whose, policy)], [want, most, window_us, window_us // GRAIN]

    def _hand_out(self, askers: Sequence[asyncio.Future[Place]], reply: asyncio.Future[Any]) -> None:
        """The first askers get the places there are."""
        error = reply.exception()
        if error is not None:
            if isinstance(error, RedisError):
                self._count(error)
            _fail(askers, error)
            return
        granted, left, returns_in_us = reply.result()
        left += granted
        for place, asker in enumerate(askers):
            if not asker.done():
                asker.set_result(Place(place < granted, max(0, left - place - 1), returns_in_us / 1e6))

    def _count(self, error: RedisError) -> None:
        self.redis_errors += 1
        self.refusal = str(error)


def _fail(askers: Sequence[asyncio.Future[Place]], why: BaseException) -> None:
    """A log that cannot be written (out of memory) is as good as no Redis."""
    for asker in askers:
        if not asker.done():
            asker.set_exception(RedisAway(str(why)))
