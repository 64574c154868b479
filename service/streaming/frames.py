"""Server-sent events as bytes, each made once for all who read it, already framed as an HTTP chunk."""

from __future__ import annotations

from random import randint
from typing import Final

import orjson

from service.stores.event_channel import DELETED, Notice


def chunk(text: bytes) -> bytes:
    """One chunk of `Transfer-Encoding: chunked`."""
    return b"%x\r\n%b\r\n" % (len(text), text)


COMMENT: Final = chunk(b":\n\n")
"""Says that the line is alive."""


def retry_frame() -> bytes:
    """When to come back: jittered, so that a restart is not met by everyone at once."""
    return b"retry: %d\n\n" % randint(2000, 5000)  # noqa: S311 (spreads load, guards nothing)


def problem_frame(error_type: str, detail: str) -> bytes:
    """Why the stream ends."""
    return chunk(b"event: problem\ndata: %b\n\n" % orjson.dumps({"error_type": error_type, "detail": detail}))


def event_id(notice: Notice) -> bytes:
    """What a reader sends back as Last-Event-ID: the ETag without its quotes."""
    return b"%d-%d" % (notice.version, notice.changed_ms)


def event_frame(notice: Notice, event: str, previous_status: str | None) -> bytes:
    """`notice` as an event. Made once per name and previous status, and kept with the notice."""
    frame = notice.frames.get((event, previous_status))
    if frame is None:
        data = _data(notice, previous_status)
        frame = chunk(b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id(notice), event.encode(), data))
        notice.frames[event, previous_status] = frame
    return frame


def _data(notice: Notice, previous_status: str | None) -> bytes:
    """Shape A with `previous_status`, on one line; of a deleted job there is no more than its id."""
    if notice.status == DELETED:
        return orjson.dumps({"id": notice.job_id, "version": notice.version, "previous_status": previous_status})
    return notice.body[:-1] + b',"previous_status":' + orjson.dumps(previous_status) + b"}"
