"""The stream of one job."""

from __future__ import annotations

import asyncio

from service.stores.event_channel import Notice
from service.streaming.frames import Form, event_frame, reset_event, version_id
from service.streaming.slot import Slot
from service.streaming.stream import Stream


class JobStream(Stream):
    """Follows one job, as fast as its socket takes it, and ends with it."""

    def __init__(self, transport: asyncio.Transport, key_id: str, form: Form) -> None:
        super().__init__(transport, key_id, form)
        self.version = 0
        self._slot = Slot()
        self._reset_due = False

    @property
    def has_more(self) -> bool:
        """Whether something waits to be written."""
        return len(self._slot) > 0 or self._reset_due

    def begin(self, present: Notice, *, known: bool) -> None:
        """Begins with the present state of the job, or (`known`) after it; what was heard meanwhile may be newer."""
        self._started = True
        if known:
            self.version = max(self.version, present.version)
            self._slot.status, self._slot.stalled = present.status, present.stalled
            self._slot.drop_known(present.version)
        else:
            self.hear(present)
        self.flush()

    def hear(self, notice: Notice) -> None:
        """A change; an older one than was heard before says nothing new, and nothing comes after a deletion."""
        if notice.version <= self.version or self.ended or self._slot.says_gone:
            return
        self.version = notice.version
        self._slot.add(notice)
        self.flush()

    def resync(self, version: int = 0) -> None:
        """Something may have been missed: whoever holds the stream reads the job."""
        self.attention.set()

    def reset(self) -> None:
        """Postgres was restored: the job may have an older version than was told."""
        self.version = 0
        self._slot = Slot()
        self._reset_due = self._started
        self.flush()
        self.attention.set()

    def flush(self) -> None:
        """Writes what the socket takes."""
        if self._reset_due and self._takes_more():
            self._reset_due = False
            self._write(self._form.framed(reset_event(None)))
        while self._slot and self._takes_more():
            notice, name, previous = self._slot.take()
            self._write(event_frame(notice, name, previous, self._form, version_id(notice)))
            if not self._slot and notice.ends:
                self.end()
