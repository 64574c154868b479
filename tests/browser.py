"""A real Chromium, and pages in it that say what their own EventSource and WebSocket hear."""

import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web
from playwright.async_api import Browser, Page, Response, async_playwright

from tests.sse_reader import comes_true

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
CONNECTING, OPEN, CLOSED = 0, 1, 2
"""The readyState of an EventSource."""
WITHIN_s = 20.0

LISTENING_PAGE = """<!doctype html>
<title>A page that listens</title>
<link rel="icon" href="data:,">
<script>
  const kept = []  // what nobody holds may be collected

  function follow(url) {
    const source = new EventSource(url)
    kept.push(source)
    const hear = ({ type, data, lastEventId }) =>
      tell(url, { name: type, ready: source.readyState, id: lastEventId ?? '', data: data ? JSON.parse(data) : null })
    for (const name of ['open', 'error', 'message', 'status', 'progress', 'stalled', 'deleted', 'batch', 'reset', 'problem'])
      source.addEventListener(name, hear)
  }

  function connect(url) {
    const socket = new WebSocket(url)
    kept.push(socket)
    const hear = (name, data) => tell(url, { name, ready: socket.readyState, id: '', data })
    socket.onopen = () => hear('open', null)
    socket.onmessage = ({ data }) => hear('message', JSON.parse(data))
    socket.onclose = ({ code, wasClean }) => hear('close', { code, wasClean })
  }
</script>"""


def find_chromium() -> str | None:
    """The browser of this machine."""
    return next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


@asynccontextmanager
async def started(executable: str) -> AsyncIterator[Browser]:
    """The browser, without a window."""
    sandbox = os.geteuid() != 0  # Chromium has none for root
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, chromium_sandbox=sandbox)
        yield browser
        await browser.close()


@asynccontextmanager
async def served(*routes: web.RouteDef) -> AsyncIterator[str]:
    """Somebody else's site, on a port of its own; its origin."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def page_of(html: str) -> web.RouteDef:
    """`/` of a site."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(text=html, content_type="text/html")

    return web.get("/", page)


@dataclass(frozen=True)
class Heard:
    """What reached a script. `ready`: the readyState at that moment; `data`: None for the browser's own events."""

    name: str
    ready: int
    id: str
    data: Any


@dataclass
class Followed:
    """One EventSource or WebSocket of a page. `answers`: those that the browser got for it."""

    heard: list[Heard] = field(default_factory=list)
    answers: list[Response] = field(default_factory=list)

    @property
    def told(self) -> list[Heard]:
        """What the service said, without what the browser says."""
        return [heard for heard in self.heard if heard.data is not None]

    @property
    def names(self) -> list[str]:
        return [heard.name for heard in self.heard]

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]

    async def last_event_ids(self) -> list[str | None]:
        """What the browser sent of them with each request that was answered."""
        return [(await answer.request.all_headers()).get("last-event-id") for answer in self.answers]

    async def until(self, is_it: Callable[[Heard], bool], within_s: float = WITHIN_s) -> Heard:
        """The first thing heard that it is. Raises TimeoutError."""
        await comes_true(lambda: any(map(is_it, self.heard)), within_s)
        return next(filter(is_it, self.heard))

    async def closed(self) -> None:
        """Until EventSource has given up."""
        await self.until(lambda heard: heard.ready == CLOSED)


class Listening:
    """LISTENING_PAGE in a browser. `complaints`: what stands in its console."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self._followed: dict[str, Followed] = {}

    @classmethod
    async def at(cls, page: Page, origin: str) -> Self:
        """Loads it from a site."""
        listening = cls(page)
        page.on("console", lambda message: listening.complaints.append(message.text))
        page.on("response", listening._note_answer)
        await page.expose_function("tell", lambda url, said: listening._followed[url].heard.append(Heard(**said)))
        await page.goto(origin)
        return listening

    async def follow(self, url: str) -> Followed:
        """Opens an EventSource."""
        return await self._begin("follow", url)

    async def connect(self, url: str) -> Followed:
        """Opens a WebSocket."""
        return await self._begin("connect", url)

    async def _begin(self, function: str, url: str) -> Followed:
        followed = self._followed[url] = Followed()
        await self.page.evaluate(f"{function}({json.dumps(url)})")
        return followed

    def _note_answer(self, response: Response) -> None:
        followed = self._followed.get(response.url)
        if followed is not None:
            followed.answers.append(response)
