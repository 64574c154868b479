"""The addresses under which people and their tools read what the API is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path
from typing import Final

from aiohttp import web
from multidict import CIMultiDict

from service.authentication import Door
from service.pages.document import Address, api_document
from service.requests import none_match

ASSETS: Final = ("swagger-ui.css", "swagger-ui-bundle.js", "index.css", "favicon-32x32.png")
"""What of swagger-ui-py the page needs."""

PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HERE: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class ReadyPage:
    """Bytes that do not change while the process lives."""

    body: bytes
    etag: str
    headers: CIMultiDict[str]

    @classmethod
    def of(cls, body: bytes, content_type: str) -> ReadyPage:
        """Made once; whoever has it is answered 304."""
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {
            "Content-Type": content_type,
            "ETag": etag,
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": PAGE_POLICY,
            "Referrer-Policy": "no-referrer",
        }
        return cls(body, etag, CIMultiDict(headers))


class ApiPages:
    """The description of the API as a document and as a page. Nothing on it comes from another host."""

    def __init__(self) -> None:
        self._document = ReadyPage.of(b"{}", "application/json")
        self._page, self._files = _files()

    def describe(self, addresses: Iterable[web.RouteDef], door: Door) -> None:
        """Says what the service has; before it serves."""
        known = tuple(Address(route.method, route.path, door.needs.get(route.handler)) for route in addresses)
        self._document = ReadyPage.of(api_document(known), "application/json; charset=utf-8")

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        """GET /openapi.json."""
        return _answer(request, self._document)

    async def docs(self, request: web.Request) -> web.StreamResponse:
        """GET /docs."""
        return _answer(request, self._page)

    async def docs_file(self, request: web.Request) -> web.StreamResponse:
        """GET /docs/{file}."""
        file = self._files.get(request.match_info["file"])
        if file is None:
            raise web.HTTPNotFound
        return _answer(request, file)


@lru_cache(maxsize=1)
def _files() -> tuple[ReadyPage, dict[str, ReadyPage]]:
    """The page, and what it is made of, by name."""
    found = find_spec("swagger_ui")  # only its files are wanted: nothing of it is imported
    assert found is not None
    assert found.origin is not None
    static = Path(found.origin).parent / "static"
    paths = [*(static / name for name in ASSETS), _HERE / "start.js"]
    files = {path.name: ReadyPage.of(path.read_bytes(), _content_type(path)) for path in paths}
    return ReadyPage.of((_HERE / "docs.html").read_bytes(), "text/html; charset=utf-8"), files


def _content_type(path: Path) -> str:
    kind = "text/javascript" if path.suffix == ".js" else guess_type(path.name)[0]  # some systems call it otherwise
    return f"{kind}; charset=utf-8" if kind and kind.startswith("text/") else str(kind)


def _answer(request: web.Request, page: ReadyPage) -> web.Response:
    if none_match(request, page.etag):
        return web.Response(status=304, headers=page.headers)
    return web.Response(body=page.body, headers=page.headers)
