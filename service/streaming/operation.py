"""What is open: the streams of this process, their heartbeats and their ends; and the stream of one job."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import structlog

from service.errors import JobDeleted, JobExpired, JobwireError, TooManyStreams, Unavailable
from service.hub import Hub
from service.status_reader import StatusReader
from service.stores.answers import deletion_notice, present_notice
from service.stores.ready import JobKey
from service.streaming.frames import problem_event
from service.streaming.job_stream import JobStream

TICK_EVERY_s: Final = 0.25
LAST_WORDS_s: Final = 1.0
"""How long a process that ends waits for its readers to take the end of their streams."""

_log = structlog.get_logger(__name__)


class Open(Protocol):
    """A stream of events, or a WebSocket."""

    key_id: str

    def tick(self, now: float) -> None:
        """Looks after itself; `now` is the loop's time."""

    def end(self, last_words: bytes = b"", *, within_s: float | None = None) -> None:
        """Ends cleanly, with an event that says why."""


class Streams:
    """All open streams of this process. One timer looks after all of them."""

    def __init__(self, hub: Hub, reader: StatusReader, *, most_per_key: int) -> None:
        self.hub = hub
        self.reader = reader
        self._most_per_key = most_per_key
        self._open: set[Open] = set()
        self._per_key: Counter[str] = Counter()
        self._closing = False

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def counted(self, stream: Open) -> Iterator[None]:
        """`stream` is open while inside; in a process that ends it ends as it begins. Raises TooManyStreams."""
        if self._per_key[stream.key_id] >= self._most_per_key:
            raise TooManyStreams(f"This key has {self._most_per_key} open streams, as many as it may")
        self._open.add(stream)
        self._per_key[stream.key_id] += 1
        if self._closing:
            stream.end(within_s=LAST_WORDS_s)
        try:
            yield
        finally:
            self._open.discard(stream)
            self._per_key[stream.key_id] -= 1
            if not self._per_key[stream.key_id]:
                del self._per_key[stream.key_id]

    async def attend(self, stream: JobStream, key: JobKey) -> None:
        """Until the stream ends: reads the job anew whenever something may have been missed."""
        while not stream.ended:
            await stream.attention.wait()
            stream.attention.clear()
            if not stream.ended:
                await self._read_anew(stream, key)

    async def run(self) -> None:
        """Looks at every stream from time to time, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            for stream in tuple(self._open):
                try:
                    stream.tick(loop.time())
                except Exception:  # one stream's fault must not be the end of all looking after
                    _log.exception("tick_failed")
            await asyncio.sleep(TICK_EVERY_s)

    def end_of_keys(self, key_ids: Sequence[str]) -> None:
        """Ends the streams of keys that are no longer valid."""
        for stream in tuple(self._open):
            if stream.key_id in key_ids:
                stream.end(problem_event("unauthorized", "The key that opened this stream is no longer valid."))

    def end_all(self) -> None:
        """Ends every stream cleanly, now and from now on: readers reconnect to another process."""
        self._closing = True
        for stream in tuple(self._open):
            stream.end(within_s=LAST_WORDS_s)

    async def _read_anew(self, stream: JobStream, key: JobKey) -> None:
        try:
            stream.hear(present_notice(key, await self.reader.read(*key)))
        except (JobDeleted, JobExpired):
            stream.hear(deletion_notice(key, stream.version + 1))
        except Unavailable:
            pass  # the next reconcile asks again
        except JobwireError as error:
            stream.end(problem_event(error.error_type, error.detail))
