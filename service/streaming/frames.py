"""Server-sent events as bytes, each made once for all who read it in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from random import randint
from typing import Any, Final

import orjson

from schemas.shapes import reduced
from service.stores.event_channel import DELETED, Notice

COMMENT: Final = b":\n"
"""Says that the line is alive. No blank line: some readers take one for an event once they have seen an id."""


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


def version_id(notice: Notice) -> bytes:
    """The id of an event of one job's stream: what its ETag says."""
    return b"%d-%d" % (notice.version, notice.changed_ms)


def problem_event(error_type: str, detail: str) -> bytes:
    """Why the stream ends."""
    return plain_event("problem", {"error_type": error_type, "detail": detail}, None)


def open_event(position: bytes) -> bytes:
    """A feed has begun: from here on everything is told."""
    return plain_event("open", {"position": position.decode()}, position)


def reset_event(position: bytes | None) -> bytes:
    """What was missed cannot be told; from here on everything is."""
    return plain_event("reset", {"detail": "What was missed cannot be told any more: read the jobs anew."}, position)


def plain_event(name: str, data: Any, event_id: bytes | None) -> bytes:
    """An event that is not about one job. `data` is JSON already, or becomes it."""
    body = data if isinstance(data, bytes) else orjson.dumps(data)
    return b"%bevent: %b\ndata: %b\n\n" % (_id_line(event_id), name.encode(), body)


def event_frame(notice: Notice, event: str, previous_status: str | None, form: Form, event_id: bytes | None) -> bytes:
    """`notice` as an event on the wire. Made once for each way to tell it, and kept with the notice."""
    frame = notice.frames.get((event, previous_status, form, event_id))
    if frame is None:
        text = plain_event(event, _data(notice, previous_status, form), event_id)
        frame = notice.frames[event, previous_status, form, event_id] = form.framed(text)
    return frame


def _id_line(event_id: bytes | None) -> bytes:
    return b"" if event_id is None else b"id: %b\n" % event_id


def _data(notice: Notice, previous_status: str | None, form: Form) -> bytes:
    """Shape A with `previous_status`, on one line; of a deleted job there is no more than its id."""
    if notice.status == DELETED:
        return orjson.dumps({"id": notice.job_id, "version": notice.version, "previous_status": previous_status})
    body = reduced(notice.body) if form.public else notice.body
    return body[:-1] + b',"previous_status":' + orjson.dumps(previous_status) + b"}"
