"""One page of an account's jobs: by offset with a total, or beyond a cursor without drift. Knows nothing of HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.job import ListedJob
from service.listing.cursor import Cursors
from service.stores.page_table import MOST_COUNTED, Filters, PageTable, Position


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client wants to see. With a `cursor` there is no offset."""

    filters: Filters
    newest_first: bool
    limit: int
    offset: int
    cursor: str | None

    @classmethod
    def of(cls, *, newest_first: bool, limit: int, offset: int, cursor: str | None, **filters: Any) -> Asked:
        """From a query as its schema loads it."""
        return cls(Filters(**filters), newest_first, limit, offset, cursor)


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs in the order asked. `total`: at most MOST_COUNTED, None beyond a cursor. `next_cursor` if `has_more`."""

    jobs: list[ListedJob]
    total: int | None
    total_capped: bool
    has_more: bool
    next_cursor: str | None


class Pages:
    """Reads pages from the truth itself: nothing here is cached."""

    def __init__(self, table: PageTable, cursors: Cursors) -> None:
        self._table = table
        self._cursors = cursors

    async def page(self, account_id: int, asked: Asked) -> Page:
        """Raises ValidationFailed for a cursor that is not this account's, or of other filters; Unavailable."""
        most = asked.limit + 1  # one more than is shown, to know whether there are more
        if asked.cursor is None:
            jobs, total = await self._table.with_total(
                account_id, asked.filters, newest_first=asked.newest_first, most=most, skipped=asked.offset
            )
            return self._page(account_id, asked, jobs, total)
        position = self._cursors.read(account_id, asked.filters, newest_first=asked.newest_first, cursor=asked.cursor)
        jobs = await self._table.beyond(account_id, asked.filters, position, newest_first=asked.newest_first, most=most)
        return self._page(account_id, asked, jobs, None)

    def _page(self, account_id: int, asked: Asked, found: list[ListedJob], total: int | None) -> Page:
        jobs, has_more = found[: asked.limit], len(found) > asked.limit
        capped = total is not None and total > MOST_COUNTED
        return Page(
            jobs=jobs,
            total=MOST_COUNTED if capped else total,
            total_capped=capped,
            has_more=has_more,
            next_cursor=self._cursor_after(account_id, asked, jobs[-1]) if has_more else None,
        )

    def _cursor_after(self, account_id: int, asked: Asked, last: ListedJob) -> str:
        position = Position(last.created_at, last.id)
        return self._cursors.make(account_id, asked.filters, newest_first=asked.newest_first, position=position)
