"""A real Chromium, and pages in it that say what their own EventSource and WebSocket hear."""

import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
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
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable)
        yield browser
        await browser.close()


class Site:
    """Somebody else's server, on a port of its own. `pages`: HTML by path, or what makes JSON for a script."""

    def __init__(self) -> None:
        self.origin = ""
        self.pages: dict[str, str | Callable[[], Awaitable[Any]]] = {"/": LISTENING_PAGE}

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.origin = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        page = self.pages.get(request.path)
        if isinstance(page, str):
            return web.Response(text=page, content_type="text/html")
        return web.Response(status=404) if page is None else web.json_response(await page())


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
