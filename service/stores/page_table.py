"""Pages of jobs, from Postgres: by keyset or offset, narrowed by any filters; the SQL stands in `page_table.sql`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from typing import Any, Final

import asyncpg
import orjson

from service.job import ListedJob
from service.stores.connections import Postgres
from service.stores.queries import load

_SQL: Final = load("page_table")
_OPTIONAL: Final = re.compile(r"^(.*?)\s*-- if (\w+)$")
_PLACE: Final = re.compile(r"\$(\d+)")

MOST_COUNTED: Final = 10_000
"""A total is exact up to here; counting goes one further, to know that there are more."""

Statement = tuple[str, list[Any]]
"""SQL and the values of its places."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which jobs are meant, all of it at once. What is empty or None does not narrow, but `types=()`: none of them."""

    statuses: tuple[str, ...] = ()
    types: tuple[str, ...] | None = None
    batch_id: str | None = None
    user_id: str | None = None
    tags: tuple[str, ...] = ()
    created_after: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page ended: the last job on it. Positions order as the jobs do."""

    created_at: datetime
    id: str


class PageTable:
    """Reads pages. Every method raises Unavailable when Postgres cannot be reached."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    async def beyond(
        self, account_id: int, filters: Filters, position: Position, *, newest_first: bool, most: int
    ) -> list[ListedJob]:
        """At most `most` jobs that follow a position."""
        statement, values = page_statement(account_id, filters, newest_first=newest_first, beyond=position, most=most)
        return [_listed(row) for row in await self._postgres.fetch(statement, *values)]

    async def with_total(
        self, account_id: int, filters: Filters, *, newest_first: bool, most: int, skipped: int
    ) -> tuple[list[ListedJob], int]:
        """At most `most` jobs after `skipped` ones, and how many there are in all, counted to MOST_COUNTED + 1."""
        statement, values = page_statement(account_id, filters, newest_first=newest_first, most=most, skipped=skipped)
        async with (
            self._postgres.connection() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),  # page and total of one moment
        ):
            rows = await connection.fetch(statement, *values)
            if len(rows) < most and (rows or not skipped):  # the end is in sight
                total = skipped + len(rows)
            else:
                statement, values = total_statement(account_id, filters)
                total = await connection.fetchval(statement, *values)
        return [_listed(row) for row in rows], total


def page_statement(
    account_id: int,
    filters: Filters,
    *,
    newest_first: bool,
    most: int,
    skipped: int = 0,
    beyond: Position | None = None,
) -> Statement:
    """The statement of one page: of only those filters that are there."""
    where = {} if beyond is None else {9: beyond.created_at, 10: beyond.id}
    values = _values(account_id, filters) | where | {11: most, 12: skipped}
    text = _text(filters, {"page", "beyond"} if where else {"page"})
    return _numbered(text if newest_first else _turned_round(text), values)


def total_statement(account_id: int, filters: Filters) -> Statement:
    """How many jobs there are, counted to MOST_COUNTED + 1.

    It counts a page of that length, in order: without one the planner may look for a small account in everyone's jobs.
    """
    values = _values(account_id, filters) | {11: MOST_COUNTED + 1, 12: 0}
    page, places = _numbered(_text(filters, set()), values)
    return f"select count(*) from ({page}) counted", places  # noqa: S608 - both parts are ours


def _one_of(filters: Filters) -> list[tuple[str | None, str | None]]:
    """Each status and type that together are asked for; None: any."""
    return list(product(filters.statuses or (None,), (None,) if filters.types is None else filters.types))


def _values(account_id: int, filters: Filters) -> dict[int, Any]:
    """What stands at the places of `page_table.sql`: of one status and type the words, of several two arrays."""
    one_of = _one_of(filters)
    statuses, types = [status for status, _ in one_of], [job_type for _, job_type in one_of]
    return {
        1: account_id,
        2: statuses[0] if len(one_of) == 1 else statuses,
        3: types[0] if len(one_of) == 1 else types,
        4: filters.batch_id,
        5: filters.user_id,
        6: list(filters.tags),
        7: filters.created_after,
        8: filters.created_before,
    }


def _text(filters: Filters, asked: set[str]) -> str:
    """One of the two statements, with the lines of the filters that are there and of what else is `asked`."""
    with_their_own_index = {
        "status": bool(filters.statuses),
        "type": filters.types is not None,
        "batch": filters.batch_id is not None,
        "user": filters.user_id is not None,
    }
    present = with_their_own_index | {
        "tags": bool(filters.tags),
        "newest": not any(with_their_own_index.values()),
        "after": filters.created_after is not None,
        "before": filters.created_before is not None,
    }
    statement = _SQL["page" if len(_one_of(filters)) == 1 else "page_of_several"]
    return _only_what_is_asked(statement, asked | {word for word, there in present.items() if there})


def _only_what_is_asked(text: str, asked: set[str]) -> str:
    """The statement without the optional lines that are not asked for."""
    kept = []
    for line in text.splitlines():
        optional = _OPTIONAL.match(line)
        if optional is None:
            kept.append(line)
        elif optional[2] in asked:
            kept.append(optional[1])
    return "\n".join(kept)


def _turned_round(text: str) -> str:
    """A statement that is written newest first, oldest first."""
    return text.replace(" desc", "").replace("(j.created_at, j.id) <", "(j.created_at, j.id) >")


def _numbered(text: str, values: Mapping[int, Any]) -> Statement:
    """The places that are left, numbered without gaps, and their values."""
    left = sorted({int(place) for place in _PLACE.findall(text)})
    numbers = {place: number for number, place in enumerate(left, start=1)}
    return _PLACE.sub(lambda place: f"${numbers[int(place[1])]}", text), [values[place] for place in left]


def _listed(row: asyncpg.Record) -> ListedJob:
    details = row["error_details"]
    return ListedJob(
        id=row["id"],
        status=row["status"],
        type=row["type"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        completed_at=row["completed_at"],
        file_count=row["file_count"],
        tags=row["tags"],
        batch_id=row["batch_id"],
        user_id=row["user_id"],
        pdf_name=row["pdf_name"],
        progress=orjson.loads(row["progress"]),
        error_details=None if details is None else orjson.loads(details),
        version=row["version"],
        eta=row["eta"],
    )
