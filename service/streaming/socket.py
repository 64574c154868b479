"""One job as text frames of a WebSocket: shape B, the newest state, and never a backlog."""

from __future__ import annotations

import asyncio
from random import uniform
from typing import Final

from service.stores.event_channel import Notice
from service.streaming.slot import Slot
from service.streaming.stream import LIFETIME_s, STUCK_FOR_s

FINISHED_CODE: Final = 1000
GOING_AWAY_CODE: Final = 1001
REFUSED_CODE: Final = 1008


class JobSocket:
    """Follows one job for whoever sends. `attention`: there is something to send or to read anew, or it has ended.

    `doubted`: the job must be read anew. `close_code`: with which the socket is to be closed, and why.
    `close_within_s`: how long the client may take to close it too.
    """

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        self.version = 0
        self.ended = False
        self.doubted = False
        self.close_code, self.close_reason = GOING_AWAY_CODE, "connect again"
        self.close_within_s = STUCK_FOR_s
        self.attention = asyncio.Event()
        self._slot = Slot()
        self._ends_at = asyncio.get_running_loop().time() + LIFETIME_s * uniform(0.8, 0.99)  # noqa: S311

    def hear(self, notice: Notice) -> None:
        """A change; an older one than was heard before says nothing new, and nothing comes after a deletion."""
        if notice.version > self.version and not self._slot.says_gone:
            self.version = notice.version
            self._slot.add(notice)
            self.attention.set()

    def resync(self, version: int = 0) -> None:
        """Something may have been missed."""
        self.doubted = True
        self.attention.set()

    def reset(self) -> None:
        """Postgres was restored: the job may have an older version than was told."""
        self.version = 0
        self._slot = Slot()
        self.resync()

    @property
    def has_more(self) -> bool:
        """Whether something waits to be sent."""
        return len(self._slot) > 0

    def finish(self) -> None:
        """The job is finished, and that was sent."""
        self.close_code, self.close_reason = FINISHED_CODE, "the job is finished"
        self.ended = True

    def next(self) -> Notice | None:
        """What is to be sent next."""
        return self._slot.take()[0] if self._slot else None

    def end(self, last_words: bytes = b"", *, within_s: float | None = None) -> None:
        """To be closed: `last_words` are for streams of events, here a close code says it."""
        if last_words and not self.ended:
            self.close_code, self.close_reason = REFUSED_CODE, "the key is no longer valid"
        if within_s is not None:
            self.close_within_s = within_s
        self.ended = True
        self.attention.set()

    def tick(self, now: float) -> None:
        """Looked at from time to time by one timer for all streams."""
        if now >= self._ends_at:
            self.end()
