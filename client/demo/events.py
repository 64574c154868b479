"""Server-sent events, read as the HTML standard says (section 9.2), reconnects included."""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Final

import aiohttp

from client.demo.calls import BUSY, UNREACHABLE, Refused, retry_after_s

RETRY_s: Final = 3.0
"""Until the server names another pause."""
SILENT_FOR_s: Final = 45.0
"""The service says something every 15 s; after three times that the line is dead, whatever TCP believes."""

_LINE_END: Final = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `id`: the last one that the stream had named by then."""

    name: str
    data: str
    id: str


class EventParser:
    """Events out of bytes that arrive in any pieces. One connection needs one parser.

    `last_event_id` and `retry_s` hold what is to be kept for the next connection.
    """

    def __init__(self, last_event_id: str = "", retry_s: float = RETRY_s) -> None:
        self.last_event_id = last_event_id
        self.retry_s = retry_s
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._rest = ""
        self._after_cr = False
        self._id = last_event_id
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that `piece` completes. To be read to its end before the next piece is fed."""
        for line in self._lines(self._decode(piece)):
            if line:
                self._take_field(line)
            elif event := self._dispatched():
                yield event

    def _lines(self, text: str) -> list[str]:
        if not text:
            return []
        if self._after_cr and text[0] == "\n":  # the second half of a line end that was cut in two
            text = text[1:]
        self._after_cr = text.endswith("\r")
        *lines, self._rest = _LINE_END.split(self._rest + text)
        return lines

    def _take_field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "data":
                self._data.append(value)
            case "event":
                self._name = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdecimal():
                self.retry_s = int(value) / 1000
            case _:  # a comment has the empty name
                pass

    def _dispatched(self) -> Event | None:
        """At a blank line. An event without data is none, but its id counts."""
        self.last_event_id = self._id
        name, data = self._name or "message", self._data
        self._name, self._data = "", []
        return Event(name, "\n".join(data), self._id) if data else None


async def follow(session: aiohttp.ClientSession, path: str, last_event_id: str = "") -> AsyncGenerator[Event, None]:
    """The events of `path` until the server says that there will be no more (204). Raises Refused.

    Every end of a connection is followed by another one, which names the last event that was read. Where the
    service is busy it waits as told, which EventSource would not do.
    """
    retry_s = RETRY_s
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENT_FOR_s)
    while True:
        parser = EventParser(last_event_id, retry_s)
        pause_s = 0.0
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
        try:
            async with session.get(path, headers=headers, timeout=timeout) as response:
                if response.status == 204:
                    return
                if response.status in BUSY:
                    pause_s = retry_after_s(response.headers)
                elif response.status != 200 or response.content_type != "text/event-stream":
                    raise Refused(response.status, await response.read())
                else:
                    async for piece in response.content.iter_any():
                        for event in parser.feed(piece):
                            yield event
        except UNREACHABLE:
            pass
        last_event_id, retry_s = parser.last_event_id, parser.retry_s
        await asyncio.sleep(max(pause_s, retry_s))
