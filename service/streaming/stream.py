"""One reader's stream: the newest state of its job, as fast as its socket takes it, and never a backlog."""

from __future__ import annotations

import asyncio
from random import uniform
from typing import Final

from service.job import FINISHED
from service.stores.event_channel import DELETED, Notice
from service.streaming.frames import COMMENT, Form, event_frame

LIFETIME_s: Final = 600.0
"""At most: a key that nobody uses leaves memory after as long, and could no longer be revoked there."""
QUIET_FOR_s: Final = 12.0
"""A comment is due after this long without a word; the contract says 15."""
STUCK_FOR_s: Final = 10.0
"""A reader whose socket takes nothing for this long is closed."""
BUFFER_bytes: Final = 64 * 1024


class JobStream:
    """A follower that writes. It keeps one slot, the latest change; only a finished state is never overwritten.

    Nothing is written before `start`. `ended`: there is nothing more to write. `attention` is set when the job must
    be read anew, and at the end.
    """

    def __init__(self, transport: asyncio.Transport, key_id: str, form: Form) -> None:
        self.key_id = key_id
        self._form = form
        self._started = False
        self.version = 0
        self.ended = False
        self.attention = asyncio.Event()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._slots: list[Notice] = []
        self._sent_status: str | None = None
        self._sent_stalled = False
        self._wrote_at = self._loop.time()
        self._blocked_since: float | None = None
        self._let_go_at = float("inf")
        self._ends_at = self._wrote_at + LIFETIME_s * uniform(0.8, 0.99)  # noqa: S311

    def start(self, present: Notice, *, known: bool) -> None:
        """Begins with the present state of the job, or (`known`) after it; what was heard meanwhile may be newer."""
        self._started = True
        if known:
            self.version = max(self.version, present.version)
            self._sent_status, self._sent_stalled = present.status, present.stalled
            self._slots = [notice for notice in self._slots if notice.version > present.version]
        else:
            self.hear(present)
        self.flush()

    def hear(self, notice: Notice) -> None:
        """A change; an older one than was heard before says nothing new, and nothing comes after a deletion."""
        if notice.version <= self.version or self.ended or (self._slots and self._slots[-1].status == DELETED):
            return
        self.version = notice.version
        if self._slots and self._slots[-1].status not in FINISHED:
            self._slots[-1] = notice
        else:  # a deletion, and a retry, wait behind a finished state that was not sent yet
            self._slots.append(notice)
        self.flush()

    def resync(self) -> None:
        """Something may have been missed: whoever holds the stream reads the job."""
        self.attention.set()

    def flush(self) -> None:
        """Writes what the socket takes."""
        while self._slots and self._takes_more():
            notice = self._slots.pop(0)
            self._write(event_frame(notice, self._name_of(notice), self._sent_status, self._form))
            self._sent_status, self._sent_stalled = notice.status, notice.stalled
            if not self._slots and (notice.status in FINISHED or notice.status == DELETED):
                self.end()

    def end(self, last_words: bytes = b"", *, within_s: float | None = None) -> None:
        """Ends the stream cleanly, or by hanging up on a reader that does not take the end `within_s`."""
        self._let_go_at = min(self._let_go_at, self._loop.time() + (STUCK_FOR_s if within_s is None else within_s))
        if not self.ended:
            if last_words and self._started and not self._transport.is_closing():
                self._write(self._form.framed(last_words))
            self.ended = True
            self.attention.set()

    def tick(self, now: float) -> None:
        """Looked at from time to time by one timer for all streams."""
        if self.ended:
            if now >= self._let_go_at:
                self._transport.abort()
        elif self._transport.is_closing() or now >= self._ends_at:
            self.end()
        elif self._slots:
            self.flush()
            if self._blocked_since is not None and now - self._blocked_since > STUCK_FOR_s:
                self._transport.abort()
                self.end()
        elif now - self._wrote_at >= QUIET_FOR_s and self._takes_more():
            self._write(self._form.framed(COMMENT))

    def _takes_more(self) -> bool:
        if not self._started or self.ended:
            return False
        takes = self._transport.get_write_buffer_size() <= BUFFER_bytes
        if takes:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = self._loop.time()
        return takes

    def _write(self, frame: bytes) -> None:
        """Straight into the transport: the response's own writer awaits, and a hub cannot."""
        self._transport.write(frame)
        self._wrote_at = self._loop.time()

    def _name_of(self, notice: Notice) -> str:
        if notice.status == DELETED:
            return "deleted"
        if notice.status != self._sent_status:
            return "status"
        return "stalled" if notice.stalled != self._sent_stalled else "progress"
