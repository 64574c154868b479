"""Issuing tickets, and what they open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from service.errors import BatchNotFound, Forbidden, JobNotFound, Unauthorized, ValidationFailed
from service.identity import Caller
from service.job import JOB_ID, is_job_id
from service.status_reader import StatusReader
from service.stores.keys import batch_key
from service.stores.ticket_table import TicketTable
from service.streaming.filters import Filters
from service.tickets import LONGEST_TICKET, Right, Tickets

_NOT_THIS: Final = "This ticket opens something else: ask for another at POST /tickets"


class TicketOffice:
    """A ticket is bound to the key that asks for it: it ends with the key, and counts as the key."""

    def __init__(
        self,
        tickets: Tickets,
        table: TicketTable,
        reader: StatusReader,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._tickets = tickets
        self._table = table
        self._reader = reader
        self._now = now

    async def issue(self, caller: Caller, wanted: Mapping[str, Any], ttl_s: int) -> tuple[str, datetime]:
        """A ticket for the one thing that is `wanted` (as TicketSchema loads it), and when it ends, in whole seconds.

        Raises JobNotFound and its kind, BatchNotFound, ValidationFailed, Unavailable.
        """
        right = await self._right(caller.account_id, wanted, ttl_s)
        expires_at = (self._now() + timedelta(seconds=ttl_s)).replace(microsecond=0)
        ticket = self._tickets.make(caller.key_id, right, expires_at)
        if len(ticket) > LONGEST_TICKET:
            [name] = wanted
            raise ValidationFailed({name: ["Too long for a ticket, which travels in an address."]})
        return ticket, expires_at

    async def set_of(self, caller: Caller, asked: Sequence[str] | None) -> list[str]:
        """The jobs of the caller's ticket, or of these those that are `asked` for; of a key what is asked for.

        Raises Unauthorized where the ticket's set has gone, Forbidden beyond it.
        """
        asked = list(dict.fromkeys(asked or ()))
        if caller.right is None:
            return asked
        opened = await self._table.find(caller.account_id, caller.right.value[0])
        if opened is None:
            raise Unauthorized("This ticket has expired: ask for a new one at POST /tickets.")
        if not set(asked) <= set(opened):
            raise Forbidden(_NOT_THIS)
        return asked or opened

    async def _right(self, account_id: int, wanted: Mapping[str, Any], ttl_s: int) -> Right:
        [(name, value)] = wanted.items()
        match name:
            case "job_id":
                await self._job_exists(account_id, value)
                return Right("job", (value,))
            case "batch_id":
                await self._batch_exists(account_id, value)
                return Right("batch", (value,))
            case "job_ids":
                unique = list(dict.fromkeys(value))
                return Right("jobs", (await self._table.store(account_id, unique, ttl_s),))
            case "user_id":
                return Right("user", (value,))
            case "tags":
                return Right("tags", tuple(dict.fromkeys(value)))
            case _:
                return Right("feed")

    async def _job_exists(self, account_id: int, job_id: str) -> None:
        if not is_job_id(job_id):
            raise JobNotFound(job_id)
        await self._reader.read(account_id, job_id)

    async def _batch_exists(self, account_id: int, batch_id: str) -> None:
        if not JOB_ID.match(batch_id):
            raise BatchNotFound(batch_id)
        try:
            await self._reader.read(*batch_key(account_id, batch_id))
        except JobNotFound:
            raise BatchNotFound(batch_id) from None


def must_open(caller: Caller, kind: str, value: str) -> None:
    """Raises Forbidden for a ticket of something else than this job or batch."""
    if caller.right is not None and (caller.right.kind, caller.right.value) != (kind, (value,)):
        raise Forbidden(_NOT_THIS)


def opens_set(caller: Caller) -> bool:
    """Whether the caller's ticket opens a set of jobs."""
    return caller.right is not None and caller.right.kind == "jobs"


def narrowed(caller: Caller, asked: Filters, *, of_set: bool) -> Filters:
    """What is asked of many jobs, within what the caller's ticket opens. Raises Forbidden beyond it."""
    right = caller.right
    if right is None or right.kind == ("jobs" if of_set else "feed"):
        return asked
    if right.kind == "tags" and not of_set:
        return replace(asked, tags=asked.tags | frozenset(right.value))
    if right.kind == "user" and not of_set and asked.user_id in (None, right.value[0]):
        return replace(asked, user_id=right.value[0])
    raise Forbidden(_NOT_THIS)
