"""What is open: the streams of this process, their heartbeats and their ends. Knows nothing of HTTP but its transport."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Final

import orjson

from service.errors import JobwireError, TooManyStreams, Unavailable
from service.hub import Hub
from service.reading import StatusReader
from service.stores.event_channel import DELETED, Notice
from service.stores.ready import JobKey, ReadyAnswer
from service.streaming.frames import problem_frame
from service.streaming.stream import JobStream

TICK_EVERY_s: Final = 0.25


class Streams:
    """All open streams of this process. One timer looks after all of them."""

    def __init__(self, hub: Hub, reader: StatusReader, *, most_per_key: int) -> None:
        self._hub = hub
        self._reader = reader
        self._most_per_key = most_per_key
        self._open: set[JobStream] = set()
        self._per_key: Counter[str] = Counter()
        self.closing = False

    def __len__(self) -> int:
        return len(self._open)
