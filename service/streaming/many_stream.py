"""The stream of many jobs: of each the newest state that was not sent yet, and a position from which to go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from service.stores.answers import deletion_notice
from service.stores.event_channel import DELETED, Notice
from service.stores.ready import JobKey
from service.streaming.event_id import set_end_id
from service.streaming.filters import Filters
from service.streaming.frames import Form, event_frame, open_event, reset_event
from service.streaming.slot import Slot
from service.streaming.stream import Stream

PositionId = Callable[[int], bytes]

MOST_SLOTS: Final = 1_000
"""Jobs of which something waits. A reader that is further behind reads anew (`reset`)."""


class Seat:
    """What a stream knows of one job that it began with.

    `heard`: the status that it heard of last, with its version. `told`, `stalled`: what the reader was told last.
    """

    __slots__ = ("_stream", "_version", "_wanted", "heard", "key", "stalled", "told")

    def __init__(self, stream: ManyStream, key: JobKey) -> None:
        self.key = key
        self.heard: str | None = None
        self.told: str | None = None
        self.stalled: bool | None = None
        self._stream = stream
        self._version: int | None = 0
        self._wanted = 0

    @property
    def version(self) -> int | None:
        """The newest that it heard of; 0: none yet; None: the job is gone, and does not come back."""
        return self._version

    @property
    def is_behind(self) -> bool:
        """Whether Postgres is known to have something newer."""
        return self._version is not None and self._version < self._wanted

    def take(self, notice: Notice) -> bool:
        """Whether this is newer than what was heard."""
        if self._version is None or notice.version <= self._version:
            return False
        self.heard, self._version = notice.status, None if notice.status == DELETED else notice.version
        return True

    def lose(self) -> Notice | None:
        """There is no such job, or not yet. None: that is known."""
        self._wanted = 0
        if self._version is None or self.heard == DELETED:
            return None
        self.heard = DELETED
        return deletion_notice(self.key, self._version + 1 if self._version else 0)

    def hear(self, notice: Notice) -> None:
        """A change of this job was announced."""
        self._stream.hear(notice)

    def resync(self, version: int = 0) -> None:
        """Something may have been missed."""
        if self._version is not None:
            self._wanted = max(self._wanted, version)
            self._stream.doubt(self)

    def reset(self) -> None:
        """Versions begin anew."""
        self._version, self._wanted, self.heard, self.told, self.stalled = 0, 0, None, None, None
        self._stream.doubt(self)
        self._stream.reset()


class ManyStream(Stream):
    """Follows a set of jobs, a batch or an account.

    The id of an event is the newest position from which a reader that has this event misses nothing. While something
    is unsent, known to be newer than what was heard, or being caught up with, that is an old one. What is merely
    `doubted` does not count: whoever gives positions has compared everything with Postgres first.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        key_id: str,
        form: Form,
        filters: Filters,
    ) -> None:
        super().__init__(transport, key_id, form)
        self.seats: dict[str, Seat] = {}
        self.doubted: dict[str, Seat] = {}
        self.catching_up = False
        self.filters = filters
        self._position_id: PositionId
        self._slots: dict[str, Slot] = {}
        self._behind: set[Seat] = set()
        self._unfinished: set[str] | None = None
        self._event_id: bytes | None = None
        self._begun_at: int | None = None
        self._first_id: bytes | None = None
        self._reset_due = False
        self._farewell: Callable[[bytes], bytes] | None = None

    @property
    def has_more(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._slots) or self._reset_due or self._farewell is not None

    @property
    def drained(self) -> bool:
        """Whether everything that was heard has been written."""
        return not self._slots and not self._reset_due

    @property
    def is_over(self) -> bool:
        """Whether all jobs that it follows to the end are finished or gone."""
        return self._unfinished is not None and not self._unfinished

    @property
    def end_id(self) -> bytes:
        """The id of the last event of a set."""
        return set_end_id(
            (job_id, 0 if seat.heard == DELETED else seat.version or 0) for job_id, seat in self.seats.items()
        )

    def begin(self, opening: bytes, *, event_id: bytes | None, position: int | None, position_id: PositionId) -> None:
        """Writes `opening`. A reader that comes back now would go on from `event_id` (None: begin anew).

        `position`: what was committed before it is in what the stream has heard, or will be told while catching up;
        None: nobody knows of one. `position_id`: the id of a position, or of the one up to which everything was told by
        now if that is newer.
        """
        self._started = True
        self._position_id = position_id
        self._event_id = self._first_id = event_id
        if not self._reset_due:
            self._begun_at = position
        if opening:
            self._write(self._form.framed(opening))
        self.flush()

    def follow_to_the_end(self, unfinished: Iterable[str]) -> None:
        """Ends once the seats of all these jobs are finished, and that was told."""
        self._unfinished = set(unfinished)

    def take_seat(self, key: JobKey) -> Seat:
        """Remembers a job from the beginning on."""
        seat = self.seats.get(key[1])
        if seat is None:
            seat = self.seats[key[1]] = Seat(self, key)
        return seat

    def hear(self, notice: Notice) -> None:
        """A change; one that is older than what was heard before says nothing new."""
        self._take(notice)
        self.flush()

    def catch_up(self, notices: Iterable[Notice], *, last: bool) -> None:
        """Some of what the reader lacks; with the `last` of it the ids are those of new positions."""
        for notice in notices:
            self._take(notice)
        self.catching_up = not last
        self.flush()

    def learn(self, notice: Notice) -> None:
        """The state in which the reader knows a job of a seat."""
        seat = self.seats[notice.job_id]
        if seat.told is None:
            seat.told, seat.stalled = notice.status, notice.stalled
        if seat.take(notice):
            self._note(seat, notice)

    def lose(self, seat: Seat, *, known: bool) -> None:
        """There is no such job, or not yet. `known`: the reader need not be told."""
        notice = seat.lose()
        self._behind.discard(seat)
        if notice is None:
            return
        self._count(notice)
        if known:
            seat.told = DELETED
        else:
            self._add(notice, seat)
        self.flush()

    def doubt(self, seat: Seat) -> None:
        """Something of this job may have been missed: whoever holds the stream reads it."""
        self.doubted[seat.key[1]] = seat
        if seat.is_behind:
            self._behind.add(seat)
        self.attention.set()

    def reset(self) -> None:
        """What was missed cannot be told: the reader is told so, once, as soon as its socket takes it."""
        self._slots.clear()
        self._behind = {seat for seat in self._behind if seat.is_behind}
        self._reset_due, self._begun_at = True, 0
        self._loop.call_soon(self.flush)  # a set is reset seat by seat

    def tell_position(self) -> None:
        """`open` once more, where no event has told a newer position: else the same is caught up with every time."""
        if self._event_id != self._first_id or self._begun_at is None or not self._is_up_to_date():
            return
        event_id = self._position_id(self._begun_at)
        if event_id != self._event_id and self._takes_more():
            self._event_id = event_id
            self._write(self._form.framed(open_event(event_id)))

    def finish(self, farewell: Callable[[bytes], bytes]) -> None:
        """Ends with these words, which say the last position, behind everything that waits."""
        self._farewell = farewell
        self.flush()

    def flush(self) -> None:
        """Writes what the socket takes."""
        while not self.ended and self.has_more and self._takes_more():
            if self._reset_due:
                self._reset_due = False
                self._event_id = self._position_id(0)
                self._write(self._form.framed(reset_event(self._event_id)))
            elif self._slots:
                self._send_next()
            elif self._farewell is not None:
                self.end(self._farewell(self._position_id(self._begun_at or 0)))
        if self.is_over and self._started and self._is_up_to_date():
            self.end()

    def _take(self, notice: Notice) -> None:
        if self.ended:
            return
        seat = self.seats.get(notice.job_id)
        before = None
        if seat is not None:
            before = seat.heard
            if not seat.take(notice):
                return
            self._note(seat, notice)
        if self.filters.match(notice, before):
            self._add(notice, seat)

    def _add(self, notice: Notice, seat: Seat | None) -> None:
        slot = self._slots.get(notice.job_id)
        if slot is None:
            if len(self._slots) >= MOST_SLOTS:
                self.reset()
                return
            slot = self._slots[notice.job_id] = _slot_before(notice, seat)
        slot.add(notice)

    def _send_next(self) -> None:
        job_id = next(iter(self._slots))
        slot = self._slots[job_id]
        notice, name, previous = slot.take()
        if not slot:
            del self._slots[job_id]
        seat = self.seats.get(job_id)
        if seat is not None:
            seat.told, seat.stalled = notice.status, notice.stalled
        if self._is_up_to_date():
            self._event_id = self._newest_id()
        self._write(event_frame(notice, name, previous, self._form, self._event_id))

    def _newest_id(self) -> bytes | None:
        if self.is_over:
            return self.end_id
        return self._event_id if self._begun_at is None else self._position_id(self._begun_at)

    def _is_up_to_date(self) -> bool:
        return self.drained and not self._behind and not self.catching_up

    def _note(self, seat: Seat, notice: Notice) -> None:
        if not seat.is_behind:
            self._behind.discard(seat)
        self._count(notice)

    def _count(self, notice: Notice) -> None:
        if self._unfinished is not None:
            if notice.ends:
                self._unfinished.discard(notice.job_id)
            else:
                self._unfinished.add(notice.job_id)


def _slot_before(notice: Notice, seat: Seat | None) -> Slot:
    """Knows the status before: what the reader was told or, where nobody remembers, what the change itself says."""
    if seat is not None and seat.told is not None:
        return Slot(seat.told, seat.stalled)
    return Slot(notice.previous_status, notice.was_stalled)
