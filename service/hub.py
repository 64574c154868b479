"""Who in this process follows which job or batch: one subscription each, and lost messages are repaired."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

import structlog

from service.errors import Unavailable
from service.stores.event_channel import BATCH_CHANGED, EventChannel, Notice
from service.stores.keys import topic_of
from service.stores.ready import JobKey
from service.stores.status_cache import LIFE_LENGTH
from service.stores.truth import Truth

LINGER_s: Final = 10.0
"""A subscription outlives its last follower by this long: readers come back."""

RECONCILE_EVERY_s: Final = 5.0
RECONCILE_WITHOUT_CHANNEL_EVERY_s: Final = 1.0
ACKNOWLEDGED_WITHIN_s: Final = 1.0
BATCH_TOLD_EVERY_s: Final = 0.5
"""Who follows a batch hears of its changes at most this often: thousands of its jobs may change meanwhile."""

_log = structlog.get_logger(__name__)


class Follower(Protocol):
    """Whoever follows a job. `version` is the newest that it knows of."""

    version: int

    def hear(self, notice: Notice) -> None:
        """A change was announced."""

    def resync(self) -> None:
        """Something may have been missed: read the job anew."""


class Hub:
    """Subscribe, await the acknowledgement, then read: `follow` does the first two, the follower reads inside it."""

    def __init__(self, channel: EventChannel, truth: Truth, life: Callable[[], str]) -> None:
        """`life`: of what this process reads; see StatusCache."""
        self._life = life
        self._channel = channel
        self._truth = truth
        self._followers: dict[JobKey, set[Follower]] = {}
        self._keys: dict[bytes, JobKey] = {}
        self._lingering: dict[JobKey, asyncio.TimerHandle] = {}
        self._changed_again: dict[JobKey, bool] = {}  # batches that were told of lately
        self.repaired = 0  # changes that no message told
        channel.on_message = self._heard
        channel.on_back = self._resync_all

    @asynccontextmanager
    async def follow(self, key: JobKey, follower: Follower) -> AsyncIterator[None]:
        """While inside, `follower` hears every change that is announced; what it reads inside is missed by none."""
        topic = topic_of(key)
        self._keys[topic] = key
        self._followers.setdefault(key, set()).add(follower)
        if (lingering := self._lingering.pop(key, None)) is not None:
            lingering.cancel()
        try:
            await self._acknowledged(topic)
            yield
        finally:
            self._leave(key, topic, follower)

    async def run(self) -> None:
        """Compares what is followed with Postgres, until cancelled."""
        while True:
            await asyncio.sleep(RECONCILE_EVERY_s if self._channel.up else RECONCILE_WITHOUT_CHANNEL_EVERY_s)
            try:
                await self._reconcile()
            except Unavailable:
                pass
            except Exception:
                _log.exception("reconcile_failed")

    async def _acknowledged(self, topic: bytes) -> None:
        """Without an acknowledgement the reconcile finds what is missed, so nobody waits for Redis for long."""
        acknowledged = self._channel.subscribe(topic)
        if self._channel.up and not acknowledged.done():
            await asyncio.wait([acknowledged], timeout=ACKNOWLEDGED_WITHIN_s)

    def _leave(self, key: JobKey, topic: bytes, follower: Follower) -> None:
        followers = self._followers[key]
        followers.discard(follower)
        if not followers and key not in self._lingering:
            self._lingering[key] = asyncio.get_running_loop().call_later(LINGER_s, self._let_go, key, topic)

    def _let_go(self, key: JobKey, topic: bytes) -> None:
        del self._lingering[key], self._followers[key], self._keys[topic]
        self._channel.unsubscribe(topic)

    def _heard(self, topic: bytes, message: bytes) -> None:
        key = self._keys.get(topic)
        if key is None:
            return
        if message[:LIFE_LENGTH] != self._life().encode():  # its version cannot be compared with ours
            self._resync(key)
            return
        notice = Notice.decode(message[LIFE_LENGTH:])
        if notice.key != key:  # a job's change on its batch's topic
            return
        if notice.status == BATCH_CHANGED:
            self._tell_of_batch(key)
        elif notice.version:
            for follower in tuple(self._followers[key]):
                follower.hear(notice)
        else:  # the relay knows that a job is gone: no more was said
            self._resync(key)

    def _tell_of_batch(self, key: JobKey) -> None:
        """At once, and of all that changes within BATCH_TOLD_EVERY_s after that when it has passed."""
        if key in self._changed_again:
            self._changed_again[key] = True
            return
        self._changed_again[key] = False
        asyncio.get_running_loop().call_later(BATCH_TOLD_EVERY_s, self._tell_of_batch_again, key)
        self._resync(key)

    def _tell_of_batch_again(self, key: JobKey) -> None:
        if self._changed_again.pop(key) and key in self._followers:
            self._tell_of_batch(key)

    def _resync(self, key: JobKey) -> None:
        for follower in tuple(self._followers[key]):
            follower.resync()

    def _resync_all(self) -> None:
        for key in self._followers:
            self._resync(key)

    async def _reconcile(self) -> None:
        keys = [key for key, followers in self._followers.items() if followers]
        if not keys:
            return
        for key, version in zip(keys, await self._truth.versions(keys), strict=True):
            for follower in tuple(self._followers.get(key, ())):
                if version is None or version > follower.version:
                    self.repaired += 1
                    follower.resync()
