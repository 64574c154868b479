"""Following many jobs: where each kind of stream begins, what it catches up with, and when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import orjson

from service.errors import BatchNotFound, JobDeleted, JobExpired, JobNotFound, JobwireError, Unavailable
from service.hub import Hub
from service.job import is_job_id
from service.status_reader import StatusReader
from service.stores.answers import deletion_notice, present_notice
from service.stores.change_table import Changed, ChangeTable, PositionUnknown
from service.stores.event_channel import Notice
from service.stores.keys import account_key, batch_key
from service.stores.ready import JobKey, ReadyAnswer
from service.streaming.event_id import batch_end_id, is_batch_end, position_id, read_position, scope_of
from service.streaming.frames import open_event, plain_event, problem_event, reset_event
from service.streaming.many_stream import ManyStream, PositionId, Seat

MOST_CHANGES: Final = 10_000
"""A reader that missed more reads anew."""
AT_ONCE: Final = 200
LOOKED_AT_EVERY_s: Final = 0.5
"""How often at most a batch that changes all the time is asked whether it is over."""

_GONE: Final = (JobDeleted, JobExpired)
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream that may begin: see ManyStream.begin; and what to do until it ends."""

    opening: bytes
    event_id: bytes | None
    position: int | None
    position_id: PositionId
    attend: Callable[[], Awaitable[None]]


class Following:
    """Opens the streams of many jobs. Each method gives None where the reader has been told everything to the end."""

    def __init__(self, hub: Hub, reader: StatusReader, changes: ChangeTable) -> None:
        self._hub = hub
        self._reader = reader
        self._changes = changes

    @asynccontextmanager
    async def jobs(
        self, stream: ManyStream, account_id: int, job_ids: Sequence[str], known_id: str | None
    ) -> AsyncIterator[Opened | None]:
        """A set of jobs: ends once all are finished or gone. One that is unknown is told as gone, and may come yet."""
        scope = scope_of(account_id, "jobs", sorted(job_ids), stream.filters)
        seats = [stream.take_seat((account_id, job_id)) for job_id in job_ids]
        stream.follow_to_the_end(job_ids)
        async with self._hub.follow_all([(seat.key, seat) for seat in seats if is_job_id(seat.key[1])]):
            position, missed = await self._begin_set(stream, seats, self._position_of(scope, known_id))
            if stream.is_over and (stream.drained or stream.end_id == _as_id(known_id)):
                yield None
            else:
                event_id = None if missed is None else _as_id(known_id)
                position_id = partial(self._position_id, scope)
                yield Opened(b"", event_id, position, position_id, partial(self._attend_jobs, stream))

    @asynccontextmanager
    async def batch(
        self, stream: ManyStream, account_id: int, batch_id: str, known_id: str | None
    ) -> AsyncIterator[Opened | None]:
        """All jobs of a batch, later ones too: ends with `event: batch` once it is over. Raises BatchNotFound."""
        key, scope = batch_key(account_id, batch_id), scope_of(account_id, "batch", batch_id)
        watch = _Watch(stream)
        async with self._hub.listen(key, stream) as now, self._hub.follow(key, watch):
            known = self._position_of(scope, known_id)
            missed = await self._missed(known, account_id, batch_id)
            position = now if missed is None else missed.position
            answer = await self._read_batch(key, batch_id)
            if known is not None and answer.finished and is_batch_end(answer.etag, known_id or ""):
                yield None
                return
            if missed is None:
                keys = [(account_id, job["job_id"]) for job in orjson.loads(answer.shape_a)["jobs"]]
                catch_up, event_id = partial(self._catch_up, stream, keys, self._present), None
            else:
                retell = partial(self._hub.retell, changes=missed.changes)
                catch_up, event_id = partial(self._catch_up, stream, list(missed.changes), retell), _as_id(known_id)
            stream.catching_up = True
            # Of what is gone, or beyond the first thousand, the present state says nothing.
            opening = reset_event(None) if known_id and missed is None else b""
            attend = partial(self._attend_batch, stream, watch, key, batch_id, catch_up)
            yield Opened(opening, event_id, position, partial(self._position_id, scope), attend)

    @asynccontextmanager
    async def feed(self, stream: ManyStream, account_id: int, known_id: str | None) -> AsyncIterator[Opened]:
        """Everything that happens in an account from now, or from the reader's position, on."""
        scope = scope_of(account_id, "feed", stream.filters)
        async with self._hub.listen(account_key(account_id), stream) as position:
            missed = await self._missed(self._position_of(scope, known_id), account_id, None)
            now = self._position_id(scope, position)
            if missed is not None and missed.changes:
                stream.catching_up = True
                event_id, changes = _as_id(known_id) or now, missed.changes
            else:
                event_id, changes = now, {}
            opening = reset_event(now) if known_id and missed is None else open_event(event_id)
            position_id = partial(self._position_id, scope)
            yield Opened(opening, event_id, position, position_id, partial(self._attend_feed, stream, changes))

    # where a reader goes on

    def _position_id(self, scope: str, position: int) -> bytes:
        """The id of a position, or of the one up to which the hub has told everything, if that is newer."""
        return position_id(self._changes.identity, scope, max(position, self._hub.position or 0))

    def _position_of(self, scope: str, known_id: str | None) -> int | None:
        return read_position(self._changes.identity, scope, known_id or "")

    async def _begin_set(
        self, stream: ManyStream, seats: Sequence[Seat], known: int | None
    ) -> tuple[int | None, _Missed | None]:
        """Reads every job, and what the reader lacks; the position from which the stream goes on, None: not known.

        The order counts. What is read holds everything from before the first position; what was read and is newer
        than the reader's position is among what it missed, because that is looked up last.
        """
        position = await self._position_if_known()
        present = await self._read(seats, confirmed=position is not None)
        missed = await self._missed(known, seats[0].key[0], None)
        if missed is not None:
            position = missed.position
            present |= await self._read([seat for seat in seats if seat.key in missed.changes], confirmed=True)
        for seat, notice in present.items():
            change = None if missed is None else missed.changes.get(seat.key)
            if notice is not None and change is not None:
                notice.passed_through = frozenset(change.statuses)
            _tell(stream, seat, notice, known=missed is not None and change is None)
        return position, missed

    async def _missed(self, position: int | None, account_id: int, batch_id: str | None) -> _Missed | None:
        """What happened since the reader's position; None where it has none that is known, or missed too much."""
        if position is None:
            return None
        whole = [account_id] if batch_id is None else []
        batches = [] if batch_id is None else [(account_id, batch_id)]
        missed: dict[JobKey, Changed] = {}
        told_up_to = position
        try:
            async for told_up_to, page in self._changes.since(position, accounts=whole, batches=batches):  # noqa: B007
                for key, change in page.items():
                    if batch_id is None or change.batch_id == batch_id:
                        missed[key] = change.after(missed.get(key))
                if len(missed) > MOST_CHANGES:
                    return None
        except (PositionUnknown, Unavailable):
            return None
        return _Missed(told_up_to, missed)

    async def _position_if_known(self) -> int | None:
        """None while Postgres is away: then a reader that comes back is told everything anew."""
        try:
            return await self._changes.position()
        except Unavailable:
            return None

    async def _read_batch(self, key: JobKey, batch_id: str) -> ReadyAnswer:
        try:
            return await self._reader.read(*key)
        except JobNotFound:
            raise BatchNotFound(batch_id) from None

    async def _read(self, seats: Sequence[Seat], *, confirmed: bool) -> dict[Seat, Notice | None]:
        """The present state of each, None where there is no such job; `confirmed`: no older than what Postgres holds.

        Raises Unavailable.
        """
        read_many = self._reader.read_many_confirmed if confirmed else self._reader.read_many
        found: dict[Seat, Notice | None] = {}
        for some in _in_parts(seats):
            answers = await read_many(some[0].key[0], [seat.key[1] for seat in some])
            for seat, answer in zip(some, answers, strict=True):
                found[seat] = None if isinstance(answer, JobwireError) else present_notice(seat.key, answer)
            gone = [seat for seat, answer in zip(some, answers, strict=True) if isinstance(answer, _GONE)]
            if gone:
                found |= await self._deletions(gone)
        return found

    async def _deletions(self, gone: Sequence[Seat]) -> dict[Seat, Notice]:
        """That these jobs were deleted; while Postgres is away, without what followers go by."""
        told = {seat.key: deletion_notice(seat.key, (seat.version or 0) + 1) for seat in gone}
        with suppress(Unavailable):
            told |= {notice.key: notice for notice in await self._hub.retell(list(told))}
        return {seat: told[seat.key] for seat in gone}

    # until it ends

    async def _attend_jobs(self, stream: ManyStream) -> None:
        while not stream.ended:
            await stream.attention.wait()
            stream.attention.clear()
            if stream.doubted and not stream.ended:
                await self._read_doubted(stream)

    async def _read_doubted(self, stream: ManyStream) -> None:
        doubted, stream.doubted = stream.doubted, {}
        try:
            for behind in (False, True):  # of these Postgres knows, and Redis may not
                seats = [seat for seat in doubted.values() if seat.is_behind == behind]
                for seat, notice in (await self._read(seats, confirmed=behind)).items():
                    del doubted[seat.key[1]]
                    _tell(stream, seat, notice)
        except Unavailable:
            stream.doubted = doubted | stream.doubted
            if not await stream.ends_within(LOOKED_AT_EVERY_s):
                stream.attention.set()
        stream.flush()

    async def _attend_batch(
        self,
        stream: ManyStream,
        watch: _Watch,
        key: JobKey,
        batch_id: str,
        catch_up: Callable[[], Awaitable[None]],
    ) -> None:
        await catch_up()
        while not stream.ended:
            stream.attention.clear()
            try:
                answer = await self._read_batch(key, batch_id)
            except Unavailable:
                await stream.ends_within(LOOKED_AT_EVERY_s)
                continue
            watch.version = answer.version
            if answer.finished:
                await self._end_batch(stream, answer)
            elif not await stream.ends_within(LOOKED_AT_EVERY_s):
                await stream.attention.wait()

    async def _end_batch(self, stream: ManyStream, answer: ReadyAnswer) -> None:
        """Every job's last state first, also of those that no message told; then the batch itself."""
        settled = asyncio.ensure_future(self._hub.settle())
        while not settled.done() and not stream.ended:
            await asyncio.wait([settled], timeout=LOOKED_AT_EVERY_s)
        settled.cancel()
        counts = {
            name: value
            for name, value in orjson.loads(answer.shape_a).items()
            if name not in ("jobs", "jobs_truncated")
        }
        stream.finish(lambda position: plain_event("batch", counts, batch_end_id(answer.etag, position)))
        while not stream.ended:
            await stream.attention.wait()
            stream.attention.clear()

    async def _attend_feed(self, stream: ManyStream, changes: Mapping[JobKey, Changed]) -> None:
        if changes:
            await self._catch_up(stream, list(changes), partial(self._hub.retell, changes=changes))
            stream.tell_position()
        while not stream.ended:
            await stream.attention.wait()
            stream.attention.clear()

    async def _catch_up(
        self, stream: ManyStream, keys: Sequence[JobKey], read: Callable[[Sequence[JobKey]], Awaitable[list[Notice]]]
    ) -> None:
        """Tells the present state of these jobs, as fast as the reader takes it."""
        left = len(keys)
        for some in _in_parts(keys):
            for key in some:
                stream.take_seat(key)
            try:
                notices = await read(some)
            except Unavailable as error:
                stream.end(problem_event(error.error_type, error.detail))
                return
            left -= len(some)
            stream.catch_up(notices, last=not left)
            while not stream.drained:
                if await stream.ends_within(0.05):
                    return
        stream.catching_up = False

    async def _present(self, keys: Sequence[JobKey]) -> list[Notice]:
        """Of jobs of which the reader knows nothing yet; those that are gone by now it need not know."""
        found = await self._reader.read_many_confirmed(keys[0][0], [job_id for _, job_id in keys])
        return [
            present_notice(key, answer)
            for key, answer in zip(keys, found, strict=True)
            if not isinstance(answer, JobwireError)
        ]


@dataclass(frozen=True, slots=True)
class _Missed:
    """What changed since a reader's position, and the position that holds once it was told."""

    position: int
    changes: dict[JobKey, Changed]


class _Watch:
    """Follows the counts of a batch: whether it is over is asked when they change."""

    def __init__(self, stream: ManyStream) -> None:
        self.version = 0
        self._stream = stream

    def hear(self, notice: Notice) -> None:
        """The counts changed."""
        self._stream.attention.set()

    def resync(self, version: int = 0) -> None:
        """The counts changed, or may have."""
        self._stream.attention.set()

    def reset(self) -> None:
        """Versions begin anew."""
        self.version = 0
        self._stream.attention.set()


def _tell(stream: ManyStream, seat: Seat, present: Notice | None, *, known: bool = False) -> None:
    """The present state of a job, unless the reader has it (`known`)."""
    if present is None:
        stream.lose(seat, known=known)
    elif known:
        stream.learn(present)
    else:
        stream.hear(present)


def _in_parts(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    return (items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE))


def _as_id(known_id: str | None) -> bytes | None:
    return known_id.encode() if known_id and known_id.isascii() else None
