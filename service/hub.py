"""Who in this process follows what: one subscription per topic, and what no message told is found in Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from service.errors import Unavailable
from service.stores.answers import deletion_notice, present_notice
from service.stores.change_table import Changed, ChangeTable, PositionUnknown
from service.stores.event_channel import BATCH_CHANGED, EventChannel, Notice
from service.stores.keys import account_topic, batch_of, batch_topic, topic_of
from service.stores.ready import Absence, JobKey
from service.stores.status_cache import LIFE_LENGTH
from service.stores.truth import Truth

LINGER_s: Final = 10.0
"""A subscription outlives its last follower by this long: readers come back."""

RECONCILE_EVERY_s: Final = 5.0
RECONCILE_WITHOUT_CHANNEL_EVERY_s: Final = 1.0
RECONCILE_AT_MOST_EVERY_s: Final = 0.05
ACKNOWLEDGED_WITHIN_s: Final = 1.0
BATCH_TOLD_EVERY_s: Final = 0.5
"""Who follows a batch hears of its changes at most this often: thousands of its jobs may change meanwhile."""
HEARD_KEPT_s: Final = 60.0
READ_AT_ONCE: Final = 200

_log = structlog.get_logger(__name__)


class Follower(Protocol):
    """Whoever follows one job, or the counts of one batch."""

    @property
    def version(self) -> int | None:
        """The newest that it knows of; 0: none yet; None: it knows that the job is gone."""

    def hear(self, notice: Notice) -> None:
        """A change was announced."""

    def resync(self, version: int = 0) -> None:
        """Something may have been missed: read anew. `version`: the one that Postgres has by now, at least."""

    def reset(self) -> None:
        """Versions have begun anew, because Postgres was restored: nothing that was heard before counts."""


class Listener(Protocol):
    """Whoever follows all jobs of a batch or of an account."""

    def hear(self, notice: Notice) -> None:
        """One of the jobs changed. The versions of one job only grow."""

    def reset(self) -> None:
        """What was missed cannot be told."""


@dataclass(slots=True)
class _Last:
    """What was last heard of a job."""

    version: int
    status: str
    stalled: bool


class _Heard:
    """What was heard of each job lately: for one minute at least and two at most."""

    def __init__(self) -> None:
        self._newer: dict[str, _Last] = {}
        self._older: dict[str, _Last] = {}
        self._turned_at = asyncio.get_running_loop().time()

    def last(self, job_id: str) -> _Last | None:
        return self._newer.get(job_id) or self._older.get(job_id)

    def keep(self, notice: Notice) -> None:
        self._newer[notice.job_id] = _Last(notice.version, notice.status, notice.stalled)

    def age(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._turned_at > HEARD_KEPT_s:
            self._older, self._newer, self._turned_at = self._newer, {}, now


@dataclass(slots=True)
class _Topic:
    """One subscription. `heard` is kept once somebody listened; `since`: the position from which nothing is missed.

    `changed_again`: of a batch that its followers were told of lately, whether it has changed since; None: not lately.
    """

    key: JobKey
    followers: set[Follower] = field(default_factory=set)
    listeners: set[Listener] = field(default_factory=set)
    heard: _Heard | None = None
    since: int | None = None
    lingering: asyncio.TimerHandle | None = None
    changed_again: bool | None = None


class Hub:
    """Subscribe, await the acknowledgement, then read: `follow` and `listen` do the first two, who calls reads inside.

    `position`: what was committed before it was told to everyone who follows; None while nobody does.
    """

    def __init__(self, channel: EventChannel, truth: Truth, changes: ChangeTable, life: Callable[[], str]) -> None:
        """`life`: of what this process reads; see StatusCache."""
        self._life = life
        self._channel = channel
        self._truth = truth
        self._changes = changes
        self._topics: dict[bytes, _Topic] = {}
        self._hurry = asyncio.Event()
        self._settling: list[asyncio.Future[None]] = []
        self._identity = ""
        self.position: int | None = None
        self.repaired = 0  # changes that no message told
        channel.on_message = self._heard
        channel.on_back = self._resync_all
        channel.on_lost = self._hurry.set  # from now on Postgres is compared more often

    @asynccontextmanager
    async def follow(self, key: JobKey, follower: Follower) -> AsyncIterator[None]:
        """While inside, `follower` hears every change that is announced; what it reads inside is missed by none."""
        async with self.follow_all([(key, follower)]):
            yield

    @asynccontextmanager
    async def follow_all(self, seats: Sequence[tuple[JobKey, Follower]]) -> AsyncIterator[None]:
        """As `follow`, of many at once."""
        topics = [(self._topic(key), follower) for key, follower in seats]
        for topic, follower in topics:
            topic.followers.add(follower)
        try:
            await self._acknowledged([key for key, _ in seats])
            yield
        finally:
            for topic, follower in topics:
                topic.followers.discard(follower)
                self._let_linger(topic)

    @asynccontextmanager
    async def listen(self, key: JobKey, listener: Listener) -> AsyncIterator[int]:
        """While inside, `listener` hears every change of the batch's or the account's jobs from the position given on.

        Raises Unavailable.
        """
        topic = self._topic(key)
        topic.listeners.add(listener)
        topic.heard = topic.heard or _Heard()
        try:
            await self._acknowledged([key])
            position = await self._changes.position()
            if topic.since is None:
                topic.since = position
            yield position
        finally:
            topic.listeners.discard(listener)
            self._let_linger(topic)

    async def settle(self) -> None:
        """Returns once everything that was committed before this call has been told."""
        settled = asyncio.get_running_loop().create_future()
        self._settling.append(settled)
        self._hurry.set()
        await settled

    def begin_anew(self, identity: str) -> None:
        """Postgres is `identity` now. If it was another: positions and versions from before mean nothing any more."""
        known, self._identity = self._identity, identity
        if known in ("", identity):
            return
        self.position = None
        for topic in tuple(self._topics.values()):
            topic.since, topic.heard = None, topic.heard and _Heard()
            for one in (*topic.followers, *topic.listeners):
                one.reset()

    async def run(self) -> None:
        """Compares what was heard with Postgres, until cancelled."""
        while True:
            await self._pause()
            settling, self._settling = self._settling, []
            try:
                await self._reconcile()
            except Exception as error:
                if not isinstance(error, Unavailable):
                    _log.exception("reconcile_failed")
                self._settling += settling
                continue
            for settled in settling:
                if not settled.done():
                    settled.set_result(None)

    async def _pause(self) -> None:
        every_s = RECONCILE_EVERY_s if self._channel.up else RECONCILE_WITHOUT_CHANNEL_EVERY_s
        await asyncio.sleep(RECONCILE_AT_MOST_EVERY_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(every_s):  # before Python 3.12 `wait_for` may lose a cancellation
                await self._hurry.wait()
        self._hurry.clear()

    # topics

    def _topic(self, key: JobKey) -> _Topic:
        name = topic_of(key)
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics[name] = _Topic(key)
        elif topic.lingering is not None:
            topic.lingering.cancel()
            topic.lingering = None
        return topic

    async def _acknowledged(self, keys: Sequence[JobKey]) -> None:
        """Without an acknowledgement the reconcile finds what is missed, so nobody waits for Redis for long."""
        asked = [self._channel.subscribe(topic_of(key)) for key in keys]
        waiting = [acknowledged for acknowledged in asked if not acknowledged.done()]
        if self._channel.up and waiting:
            await asyncio.wait(waiting, timeout=ACKNOWLEDGED_WITHIN_s)

    def _let_linger(self, topic: _Topic) -> None:
        if not topic.followers and not topic.listeners and topic.lingering is None:
            topic.lingering = asyncio.get_running_loop().call_later(LINGER_s, self._let_go, topic)

    def _let_go(self, topic: _Topic) -> None:
        name = topic_of(topic.key)
        del self._topics[name]
        self._channel.unsubscribe(name)

    # hearing

    def _heard(self, name: bytes, message: bytes) -> None:
        topic = self._topics.get(name)
        if topic is None:
            return
        if message[:LIFE_LENGTH] != self._life().encode():  # its version cannot be compared with ours
            self._resync(topic)
            self._compare_soon(topic)
            return
        notice = Notice.decode(message[LIFE_LENGTH:])
        if notice.status == BATCH_CHANGED:  # of the job that changed it a message of its own tells
            self._tell_of_batch(topic)
            return
        if not notice.version:  # the relay knows that a job is gone: no more was said
            self._resync(topic)
            self._compare_soon(topic)
            return
        if topic.followers and notice.key == topic.key:  # else it is a job's change on its batch's topic
            for follower in tuple(topic.followers):
                follower.hear(notice)
        if topic.heard is not None:
            _tell(topic, topic.heard, notice)

    def _tell_of_batch(self, topic: _Topic) -> None:
        """At once, and of all that changes within BATCH_TOLD_EVERY_s after that when it has passed."""
        if topic.changed_again is not None:
            topic.changed_again = True
            return
        topic.changed_again = False
        asyncio.get_running_loop().call_later(BATCH_TOLD_EVERY_s, self._tell_of_batch_again, topic)
        for follower in tuple(topic.followers):
            follower.resync()

    def _tell_of_batch_again(self, topic: _Topic) -> None:
        again, topic.changed_again = topic.changed_again, None
        if again:
            self._tell_of_batch(topic)

    def _resync(self, topic: _Topic) -> None:
        for follower in tuple(topic.followers):
            follower.resync()

    def _compare_soon(self, topic: _Topic) -> None:
        """For those who listen: what they missed is found in Postgres."""
        if topic.heard is not None:
            self._hurry.set()

    def _resync_all(self) -> None:
        for topic in tuple(self._topics.values()):
            self._resync(topic)
        self._hurry.set()

    # reconciling

    async def _reconcile(self) -> None:
        if not self._topics:
            self.position = None
            return
        began_at, began_in = await self._changes.position(), self._identity
        await self._find_newer()
        await self._find_unheard(began_at)
        if self._identity == began_in:  # a position of another Postgres means nothing in this one
            self.position = began_at

    async def _find_newer(self) -> None:
        """Of what is followed one by one the versions say whether something was missed."""
        keys = [topic.key for topic in self._topics.values() if topic.followers]
        if not keys:
            return
        for key, version in zip(keys, await self._truth.versions(keys), strict=True):
            topic = self._topics.get(topic_of(key))
            for follower in tuple(topic.followers) if topic is not None else ():
                if lacked := _lacked_version(follower.version, version):
                    self.repaired += 1
                    follower.resync(lacked)

    async def _find_unheard(self, began_at: int) -> None:
        """What changed in batches and accounts that are listened to, and no message told."""
        listened = [topic for topic in self._topics.values() if topic.heard is not None]
        if not listened:
            return
        for topic in listened:
            topic.since = began_at if topic.since is None else topic.since
        batches = [(topic.key[0], batch_id) for topic in listened if (batch_id := batch_of(topic.key)) is not None]
        accounts = [topic.key[0] for topic in listened if batch_of(topic.key) is None]
        start = self.position if self.position is not None else min(topic.since or began_at for topic in listened)
        try:
            async for _, changes in self._changes.since(start, accounts=accounts, batches=batches):
                await self._tell_unheard(changes)
        except PositionUnknown:
            for topic in listened:
                topic.since = began_at
                for listener in tuple(topic.listeners):
                    listener.reset()
        for topic in listened:
            if topic.heard is not None:
                topic.heard.age()

    async def _tell_unheard(self, changes: Mapping[JobKey, Changed]) -> None:
        unheard = [
            key
            for key, change in changes.items()
            if any(_is_unheard(topic, key, change) for topic in self._listened(key, change))
        ]
        for start in range(0, len(unheard), READ_AT_ONCE):
            keys = unheard[start : start + READ_AT_ONCE]
            for notice in await self.retell(keys, changes):
                self.repaired += 1
                for topic in self._listened(notice.key, changes[notice.key]):
                    if topic.heard is not None and _is_unheard(topic, notice.key, changes[notice.key]):
                        _tell(topic, topic.heard, notice)

    def _listened(self, key: JobKey, change: Changed) -> list[_Topic]:
        """The topics on which this change had to be heard."""
        names = [account_topic(key[0])]
        if change.batch_id is not None:
            names.append(batch_topic(key[0], change.batch_id))
        found = (self._topics.get(name) for name in names)
        return [topic for topic in found if topic is not None and topic.heard is not None]

    async def retell(self, keys: Sequence[JobKey], changes: Mapping[JobKey, Changed] | None = None) -> list[Notice]:
        """The present state of jobs, of deleted ones with what followers go by; of those that never were, nothing.

        `changes`: what they have been through. Raises Unavailable.
        """
        found = await self._truth.read(keys)
        gone = [key for key, ready in zip(keys, found, strict=True) if isinstance(ready, Absence)]
        tombstones = await self._changes.tombstones(gone) if gone else {}
        notices = []
        for key, ready in zip(keys, found, strict=True):
            if not isinstance(ready, Absence):
                notice = present_notice(key, ready)
            elif (tombstone := tombstones.get(key)) is not None:
                notice = deletion_notice(
                    key,
                    tombstone.version,
                    batch_id=tombstone.batch_id,
                    user_id=tombstone.user_id,
                    tags=tombstone.tags,
                )
            else:
                continue
            if changes is not None:
                notice.passed_through = frozenset(changes[key].statuses)
            notices.append(notice)
        return notices


def _lacked_version(known: int | None, present: int | None) -> int:
    """The version that a follower lacks, at least; 0: none. A job that is gone left a tombstone, one newer."""
    if known is None:
        return 0
    if present is None:
        return known + 1 if known else 0
    return present if present > known else 0


def _is_unheard(topic: _Topic, key: JobKey, change: Changed) -> bool:
    if topic.heard is None or topic.since is None or change.at < topic.since:
        return False
    last = topic.heard.last(key[1])
    return last is None or last.version < change.version


def _tell(topic: _Topic, heard: _Heard, notice: Notice) -> None:
    """To all who listen, unless they have heard it; what they heard last is what was before."""
    last = heard.last(notice.job_id)
    if last is not None:
        if notice.version <= last.version:
            return
        notice.previous_status, notice.was_stalled = last.status, last.stalled
    heard.keep(notice)
    for listener in tuple(topic.listeners):
        listener.hear(notice)
