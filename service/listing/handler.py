"""The address under which an account's jobs are listed."""

from __future__ import annotations

from typing import Any, Final

import orjson
from aiohttp import web

from schemas.queries import ListQuerySchema
from schemas.shapes import list_row
from service.identity import Caller
from service.listing.operation import Asked, Page, Pages
from service.requests import query

_LIST_QUERY: Final = ListQuerySchema()


class Listing:
    """Pages of jobs in the shape of the contract."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    async def jobs(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """GET /jobs: one page of the caller's jobs."""
        asked = Asked.of(**query(request, _LIST_QUERY))
        page = await self._pages.page(caller.account_id, asked)
        body = {"jobs": [list_row(job) for job in page.jobs], "pagination": _pagination(asked, page)}
        response = web.Response(body=orjson.dumps(body), content_type="application/json", charset="utf-8")
        response.headers["Cache-Control"] = "private, no-cache"
        return response


def _pagination(asked: Asked, page: Page) -> dict[str, Any]:
    """`total` only where it was counted, `total_capped` only where it is true."""
    counted: dict[str, Any] = {} if page.total is None else {"total": page.total}
    if page.total_capped:
        counted["total_capped"] = True
    return counted | {
        "limit": asked.limit,
        "offset": asked.offset,
        "has_more": page.has_more,
        "next_cursor": page.next_cursor,
    }
