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
from service.streaming.frames import Form, event_frame, reset_event
from service.streaming.slot import Slot
from service.streaming.stream import Stream

PositionId = Callable[[int], bytes]

MOST_SLOTS: Final = 1_000
"""Jobs of which something waits. A reader that is further behind reads anew (`reset`)."""


class Seat:
    """What a stream knows of one job that it began with: the newest version it heard of, the status it was told."""

    __slots__ = ("_stream", "gone", "key", "stalled", "status", "version")

    def __init__(self, stream: ManyStream, key: JobKey) -> None:
        self.key = key
        self.version = 0
        self.status: str | None = None
        self.stalled: bool | None = None
        self.gone = False
        self._stream = stream

    def hear(self, notice: Notice) -> None:
        """A change of this job was announced."""
        self._stream.hear(notice)

    def resync(self) -> None:
        """Something may have been missed."""
        self._stream.doubt(self)

    def reset(self) -> None:
        """Versions begin anew."""
        self.version, self.status, self.stalled, self.gone = 0, None, None, False
        self._stream.doubt(self)
        self._stream.reset()


class ManyStream(Stream):
    """Follows a set of jobs, a batch or an account.

    The id of an event is the newest position from which a reader that has this event misses nothing. While
    something is unsent, or `doubted`, or being caught up with, that is an old one.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        key_id: str,
        form: Form,
        filters: Filters,
        position_id: PositionId,
    ) -> None:
        """`position_id`: the id of a position, or of the one up to which everything was told by now if newer."""
        super().__init__(transport, key_id, form)
        self.seats: dict[str, Seat] = {}
        self.doubted: dict[str, Seat] = {}
        self.reading = False
        self.catching_up = False
        self._filters = filters
        self._position_id = position_id
        self._slots: dict[str, Slot] = {}
        self._unfinished: set[str] | None = None
        self._event_id: bytes | None = None
        self._begun_at = 0
        self._reset_due = False
        self._farewell: bytes | None = None

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
        return set_end_id((job_id, 0 if seat.gone else seat.version) for job_id, seat in self.seats.items())

    def begin(self, opening: bytes, *, event_id: bytes | None, position: int) -> None:
        """Writes `opening`. A reader that comes back now would go on from `event_id` (None: begin anew).

        `position`: what was committed before it is in what the stream has heard, or will be told while catching up.
        """
        self._started = True
        self._event_id, self._begun_at = event_id, position
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
        seat = self.seats.get(notice.job_id)
        if self.ended or (seat is not None and (notice.version <= seat.version or seat.gone)):
            return
        if seat is not None:
            seat.version, seat.gone = notice.version, notice.status == DELETED
            self._count(notice)
        if self._filters.match(notice):
            self._add(notice, seat)
        self.flush()

    def learn(self, notice: Notice) -> None:
        """The state in which the reader knows a job of a seat."""
        seat = self.seats[notice.job_id]
        if seat.status is None:
            seat.status, seat.stalled = notice.status, notice.stalled
        if notice.version > seat.version:
            seat.version = notice.version
            self._count(notice)

    def lose(self, seat: Seat, *, for_good: bool, known: bool) -> None:
        """There is no such job; unless it is gone `for_good` it may come yet. `known`: the reader need not be told."""
        slot = self._slots.get(seat.key[1])
        if seat.gone or seat.status == DELETED or (slot is not None and slot.says_gone):
            return
        seat.gone = for_good
        notice = deletion_notice(seat.key, seat.version + 1 if for_good else seat.version)
        self._count(notice)
        if known:
            seat.status = DELETED
        else:
            self._add(notice, seat)
        self.flush()

    def doubt(self, seat: Seat) -> None:
        """Something of this job may have been missed: whoever holds the stream reads it."""
        self.doubted[seat.key[1]] = seat
        self.attention.set()

    def reset(self) -> None:
        """What was missed cannot be told: the reader is told so, once, as soon as its socket takes it."""
        self._slots.clear()
        self._reset_due, self._begun_at = True, 0
        self._loop.call_soon(self.flush)  # a set is reset seat by seat

    def finish(self, farewell: bytes) -> None:
        """Ends with these words, behind everything that waits."""
        self._farewell = farewell
        self.flush()

    def flush(self) -> None:
        """Writes what the socket takes."""
        while not self.ended and self.has_more and self._takes_more():
            if self._reset_due:
                self._reset_due = False
                self._event_id = self._position_id(self._begun_at)
                self._write(self._form.framed(reset_event(self._event_id)))
            elif self._slots:
                self._send_next()
            elif self._farewell is not None:
                self.end(self._farewell)
        if self.is_over and self._started and self._is_up_to_date():
            self.end()

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
            seat.status, seat.stalled = notice.status, notice.stalled
        if self._is_up_to_date():
            self._event_id = self.end_id if self.is_over else self._position_id(self._begun_at)
        self._write(event_frame(notice, name, previous, self._form, self._event_id))

    def _is_up_to_date(self) -> bool:
        return self.drained and not self.doubted and not self.reading and not self.catching_up

    def _count(self, notice: Notice) -> None:
        if self._unfinished is not None:
            if notice.ends:
                self._unfinished.discard(notice.job_id)
            else:
                self._unfinished.add(notice.job_id)


def _slot_before(notice: Notice, seat: Seat | None) -> Slot:
    """Knows the status before: what the reader was told or, where nobody remembers, what the change itself says."""
    if seat is not None and seat.status is not None:
        return Slot(seat.status, seat.stalled)
    return Slot(notice.previous_status, notice.was_stalled)
