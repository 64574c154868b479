"""What is announced in Redis when a job changes: to whom, the message, and the one connection that listens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import hiredis
import orjson
import structlog

from service.job import FINISHED
from service.stores.keys import HOME_TOPIC, account_topic, batch_topic, job_topic
from service.stores.redis_address import Argument, RedisAddress
from service.stores.redis_pipe import RedisError, pack

CONNECT_s: Final = 1.0
PROBE_EVERY_s: Final = 1.0
SILENT_FOR_s: Final = 3.0
"""A connection that answers no probe for this long is dead, whatever the kernel says of it."""
RECONNECT_EVERY_s: Final = 0.25

DELETED: Final = "deleted"
BATCH_CHANGED: Final = "batch"

_NOT_YET: Final = object()
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Notice:
    """One change as it was announced. `body`: shape A; empty for a deletion, whose status is `deleted`.

    `previous_status`, `was_stalled`: before this change, where its writer knew; None: created, or not known.
    `passed_through`: statuses between, where several changes are told as one. `frames` is room for what is made of it,
    once for all who follow.
    """

    account_id: int
    job_id: str
    version: int
    status: str
    changed_ms: int
    stalled: bool
    batch_id: str | None
    user_id: str | None
    tags: list[str]
    previous_status: str | None
    was_stalled: bool | None
    body: bytes
    passed_through: frozenset[str] = frozenset()
    frames: dict[Any, bytes] = field(default_factory=dict, compare=False, repr=False)

    def encode(self) -> bytes:
        """One line that says what changed, so that a listener decides without parsing the body; then the body."""
        head = (
            self.account_id,
            self.job_id,
            self.version,
            self.status,
            self.changed_ms,
            self.stalled,
            self.batch_id,
            self.user_id,
            self.tags,
            self.previous_status,
            self.was_stalled,
        )
        return orjson.dumps(head) + b"\n" + self.body

    @classmethod
    def decode(cls, message: bytes) -> Notice:
        """From what `encode` made. Raises ValueError or TypeError."""
        head, _, body = message.partition(b"\n")
        fields: list[Any] = orjson.loads(head)
        return cls(*[*fields, body])

    @property
    def key(self) -> tuple[int, str]:
        """Of the job, or of the batch, that changed."""
        return self.account_id, self.job_id

    @property
    def ends(self) -> bool:
        """Whether the job is finished, or gone, by it."""
        return self.status in FINISHED or self.status == DELETED

    @property
    def topics(self) -> list[bytes]:
        """The channels on which it is announced."""
        topics = [job_topic(self.account_id, self.job_id), account_topic(self.account_id)]
        if self.batch_id is not None:
            topics.append(batch_topic(self.account_id, self.batch_id))
        return topics


class EventChannel:
    """One subscription connection that comes back by itself.

    `on_message` is called with topic and message; `on_back` after each (re)connect, once every topic is subscribed
    again: what was announced meanwhile was missed; `on_lost` when it listens no more. `up` says whether it listens,
    `lost` how often it ceased to.
    """

    def __init__(self, url: str) -> None:
        self._address = RedisAddress.read(url)
        self._topics: dict[bytes, asyncio.Future[None]] = {}
        self._connection: _Listening | None = None
        self._keeping_up: asyncio.Task[None] | None = None
        self.up = False
        self.lost = 0
        self.on_message: Callable[[bytes, bytes], None] = lambda topic, message: None
        self.on_back: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Listens in the background. An absent Redis is not an error."""
        self._keeping_up = asyncio.create_task(self._keep_up(), name="event channel")

    async def close(self) -> None:
        """Stops listening."""
        if self._keeping_up is not None:
            self._keeping_up.cancel()
            await asyncio.wait([self._keeping_up])

    def subscribe(self, topic: bytes) -> asyncio.Future[None]:
        """Ends once Redis has acknowledged: what is announced from then on is heard.

        While Redis is away it stays open; it ends just before `on_back`. Many may await it: shield it.
        """
        acknowledged = self._topics.get(topic)
        if acknowledged is None:
            acknowledged = self._topics[topic] = asyncio.get_running_loop().create_future()
            if self._connection is not None:
                self._connection.tell("SUBSCRIBE", topic)
        return acknowledged

    def unsubscribe(self, topic: bytes) -> None:
        """Nothing of this topic is wanted any more."""
        acknowledged = self._topics.pop(topic, None)
        if acknowledged is not None:
            acknowledged.cancel()
            if self._connection is not None:
                self._connection.tell("UNSUBSCRIBE", topic)

    async def _keep_up(self) -> None:
        while True:
            try:
                await self._listen()
            except (OSError, TimeoutError, RedisError) as error:
                if self.up:
                    self._is_lost(str(error) or type(error).__name__)
            finally:
                self.up, self._connection = False, None
            await asyncio.sleep(RECONNECT_EVERY_s)

    def _is_lost(self, why: str) -> None:
        self.up = False
        self.lost += 1
        _log.warning("event_channel_lost", why=why)
        self.on_lost()

    async def _listen(self) -> None:
        """One connection from its beginning to its end, which is always an error."""
        connection = _Listening(self._acknowledged, self._heard)
        try:
            async with asyncio.timeout(CONNECT_s):
                await self._address.connect(connection)
            for words in self._address.introductions():
                connection.tell(*words)
            for topic, acknowledged in self._topics.items():
                if acknowledged.done():  # by an earlier connection
                    self._topics[topic] = asyncio.get_running_loop().create_future()
            # The home topic comes last: its acknowledgement is that of all.
            connection.tell("SUBSCRIBE", *self._topics, HOME_TOPIC)
            self._connection = connection
            await connection.probed()
        finally:
            connection.drop("closed")

    def _acknowledged(self, topic: bytes) -> None:
        acknowledged = self._topics.get(topic)
        if acknowledged is not None and not acknowledged.done():
            acknowledged.set_result(None)
        if topic == HOME_TOPIC:
            self.up = True
            self.on_back()

    def _heard(self, topic: bytes, message: bytes) -> None:
        try:
            self.on_message(topic, message)
        except Exception:  # one message's fault must not be the end of all listening
            _log.exception("notice_failed", topic=topic.decode(errors="replace"))


class _Listening(asyncio.Protocol):
    """A connection that has subscribed: whatever comes is an acknowledgement, a message, or the echo of a probe."""

    def __init__(self, on_acknowledged: Callable[[bytes], None], on_message: Callable[[bytes, bytes], None]) -> None:
        self._on_acknowledged = on_acknowledged
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=RedisError, notEnoughData=_NOT_YET)
        self._transport: asyncio.Transport | None = None
        self._lost: asyncio.Future[str] = self._loop.create_future()
        self._heard_at = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.drop(str(error) if error else "Redis closed the connection")

    def tell(self, *words: Argument) -> None:
        """Sends a command."""
        if self._transport is not None and not self._lost.done():
            self._transport.write(pack(words))

    def drop(self, why: str) -> None:
        """Ends the connection."""
        if not self._lost.done():
            self._lost.set_result(why)
        if self._transport is not None:
            self._transport.abort()

    async def probed(self) -> None:
        """Probes until the connection is lost, or silent for too long. Raises RedisError with the reason."""
        while not self._lost.done():
            self.tell("PING")
            await asyncio.wait([self._lost], timeout=PROBE_EVERY_s)
            if self._loop.time() - self._heard_at > SILENT_FOR_s:
                self.drop(f"silent for {SILENT_FOR_s} s")
        raise RedisError(self._lost.result())

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOT_YET:
                self._take(reply)
        except hiredis.ProtocolError as error:
            self.drop(str(error))

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"message", bytes(topic), bytes(message)]:
                self._on_message(topic, message)
            case [b"subscribe", bytes(topic), _]:
                self._on_acknowledged(topic)
            case RedisError():
                self.drop(str(reply))
            case _:
                pass  # +OK of an introduction, pong, unsubscribe
