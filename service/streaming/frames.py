"""Server-sent events as bytes, each made once for all who read it in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from random import randint
from typing import Final

import orjson

from schemas.shapes import reduced
from service.stores.event_channel import DELETED, Notice

COMMENT: Final = b":\n\n"
"""Says that the line is alive."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a reader gets its events. `chunked`: HTTP/1.1 frames each write; `public`: reduced to what all may see."""

    chunked: bool
    public: bool

    def framed(self, text: bytes) -> bytes:
        """`text` as it stands on the wire."""
        return b"%x\r\n%b\r\n" % (len(text), text) if self.chunked else text


def retry_line() -> bytes:
    """When to come back: jittered, so that a restart is not met by everyone at once.

    No blank line ends it: the field counts as soon as it is read, and some readers take its own block for an event.
    """
    return b"retry: %d\n" % randint(2000, 5000)  # noqa: S311 (spreads load, guards nothing)


def problem_event(error_type: str, detail: str) -> bytes:
    """Why the stream ends."""
    return b"event: problem\ndata: %b\n\n" % orjson.dumps({"error_type": error_type, "detail": detail})


def event_frame(notice: Notice, event: str, previous_status: str | None, form: Form) -> bytes:
    """`notice` as an event on the wire. Made once for each way to tell it, and kept with the notice."""
    frame = notice.frames.get((event, previous_status, form))
    if frame is None:
        data = _data(notice, previous_status, form)
        text = b"id: %d-%d\nevent: %b\ndata: %b\n\n" % (notice.version, notice.changed_ms, event.encode(), data)
        frame = notice.frames[event, previous_status, form] = form.framed(text)
    return frame


def _data(notice: Notice, previous_status: str | None, form: Form) -> bytes:
    """Shape A with `previous_status`, on one line; of a deleted job there is no more than its id."""
    if notice.status == DELETED:
        return orjson.dumps({"id": notice.job_id, "version": notice.version, "previous_status": previous_status})
    body = reduced(notice.body) if form.public else notice.body
    return body[:-1] + b',"previous_status":' + orjson.dumps(previous_status) + b"}"
