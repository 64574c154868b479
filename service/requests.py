"""What a client sent: body, query and conditions, read and checked in one way for every address."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final

import orjson
from aiohttp import web
from marshmallow import Schema, ValidationError
from multidict import istr

from schemas.fields import ByComma
from service.errors import BatchNotFound, JobNotFound, Malformed, TooLarge, UnsupportedMediaType, ValidationFailed
from service.job import JOB_ID, is_job_id

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PREFER: Final = istr("Prefer")
LONGEST_WAIT_s: Final = 30

_PREFERENCE: Final = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*"?)+')  # a comma in quotes parts nothing
_SECONDS: Final = re.compile(r'(")?([0-9]+)(?(1)")')

MiB: Final = 2**20
BODY_LIMIT: Final = 1 * MiB
ARRAY_LIMIT: Final = 8 * MiB
RESULT_LIMIT: Final = 16 * MiB
STALLED_BODY_s: Final = 30.0
"""A client whose body stops coming for this long is told so, and its connection freed."""

AT_A_TIME: Final = 50
"""Items of an array that are worked on before others get their turn: all at once would hold up every poll."""


class Connection(web.RequestHandler):
    """A client's connection that tells when it is lost: aiohttp lets an idle handler sleep on."""

    __slots__ = ("on_hangup",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.on_hangup: Callable[[], object] | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client has gone, or we have closed."""
        super().connection_lost(exc)
        if self.on_hangup is not None:
            self.on_hangup()


def on_hangup(request: web.Request, hear: Callable[[], object]) -> None:
    """Calls `hear` when the connection of `request` is lost while it is handled."""
    if isinstance(request.protocol, Connection):
        request.protocol.on_hangup = hear
    if request.transport is None:  # it is lost already
        hear()


async def body_bytes(request: web.Request, limit: int) -> bytes:
    """The whole body. Raises TooLarge beyond `limit` bytes, without reading what lies behind.

    Raises Malformed when the body breaks off or makes no sense, UnsupportedMediaType when it is compressed.
    """
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMediaType(f"The body must be sent as it is, not with Content-Encoding: {encoding}")
    if request.content_length is not None and request.content_length > limit:
        raise TooLarge(f"The body is larger than {limit // MiB} MiB")
    body = bytearray()
    try:
        while chunk := await asyncio.wait_for(request.content.readany(), STALLED_BODY_s):
            body += chunk
            if len(body) > limit:
                raise TooLarge(f"The body is larger than {limit // MiB} MiB")
    except TimeoutError:
        raise Malformed(f"Nothing more of the body came within {STALLED_BODY_s:g} s") from None
    except (web.RequestPayloadError, ConnectionError):
        raise Malformed("The body ended before it was whole") from None
    return bytes(body)


async def json_body(request: web.Request, *, array_limit: int | None = None, optional: bool = False) -> Any:
    """The body as JSON: an object of at most 1 MiB or, with `array_limit`, an array of at most that many bytes.

    `optional`: an empty body is `{}`. Raises UnsupportedMediaType, TooLarge, Malformed.
    """
    body = await body_bytes(request, array_limit or BODY_LIMIT)
    if not body and optional:
        return {}
    if request.content_type != "application/json" and not request.content_type.endswith("+json"):
        raise UnsupportedMediaType(f"The body must be sent as application/json, not {request.content_type}")
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"The body is not valid JSON: {error}") from None
    if isinstance(parsed, dict):
        if len(body) > BODY_LIMIT:
            raise TooLarge(f"An object may be {BODY_LIMIT // MiB} MiB long; send an array for more")
        return parsed
    if isinstance(parsed, list) and array_limit is not None:
        return parsed
    wanted = "an object or an array of objects" if array_limit else "an object"
    raise ValidationFailed({"_schema": [f"The body must be {wanted}."]})


def checked(schema: Schema, data: Any) -> Any:
    """`data` as `schema` loads it. Raises ValidationFailed that names each field."""
    try:
        return schema.load(data)
    except ValidationError as error:
        raise ValidationFailed(_named(error.messages)) from None


async def checked_many(schema: Schema, items: list[Any], most: int) -> list[Any]:
    """Each of 1 to `most` items as `schema` loads it; fields are named under the item's place in the array."""
    count_is_fine(items, most)
    loaded, wrong = [], {}
    for place, item in enumerate(items):
        if place % AT_A_TIME == AT_A_TIME - 1:
            await asyncio.sleep(0)
        try:
            loaded.append(schema.load(item))
        except ValidationError as error:
            wrong[str(place)] = _named(error.messages)
    if wrong:
        raise ValidationFailed(wrong)
    return loaded


def count_is_fine(items: list[Any], most: int) -> None:
    """Raises ValidationFailed unless there are 1 to `most` items."""
    if not 1 <= len(items) <= most:
        raise ValidationFailed({"_schema": [f"The array must have 1 to {most} items; this one has {len(items)}."]})


def job_id_of(request: web.Request) -> str:
    """The job that the path names. Raises JobNotFound for what cannot be the id of any job."""
    job_id = request.match_info["job_id"]
    if not is_job_id(job_id):
        raise JobNotFound(job_id)
    return job_id


def batch_id_of(request: web.Request) -> str:
    """The batch that the path names. Raises BatchNotFound for what cannot be the id of any batch."""
    batch_id = request.match_info["batch_id"]
    if not JOB_ID.match(batch_id):
        raise BatchNotFound(batch_id)
    return batch_id


def query(request: web.Request, schema: Schema) -> Any:
    """The query parameters as `schema` loads them; unknown ones are refused, and repeated ones that have one value."""
    given = request.query
    single = [name for name in given if not isinstance(schema.fields.get(name), ByComma)]
    repeated = {name: ["Given more than once."] for name in single if len(given.getall(name)) > 1}
    if repeated:
        raise ValidationFailed(repeated)
    return checked(schema, {name: ",".join(given.getall(name)) for name in given})


def if_match(request: web.Request) -> str | None:
    """The ETags of If-Match joined by comma, or `*`, or None when the header is not there. Weak ones never match."""
    if "If-Match" not in request.headers:
        return None
    return ",".join(tag for tag in _tags(request, "If-Match") if tag.isascii() and not tag.startswith("W/"))


def none_match(request: web.Request, etag: str) -> bool:
    """Whether If-None-Match says that the client has this version, or (`*`, which stands alone) any."""
    header = request.headers.get("If-None-Match")
    if header is None:
        return False
    if header in (etag, "*"):
        return True
    return any(tag.removeprefix("W/") == etag for tag in _tags(request, "If-None-Match"))


def _tags(request: web.Request, header: str) -> list[str]:
    """The entity tags of a header, which may stand on several lines. Ours hold no comma."""
    return [tag.strip() for line in request.headers.getall(header) for tag in line.split(",")]


def wait_preference(request: web.Request) -> int | None:
    """N of `Prefer: wait=N` in seconds, at most LONGEST_WAIT_s; None where there is none that makes sense.

    As RFC 7240 has it: of several only the first counts, and what makes no sense is as if it were not there.
    """
    for line in request.headers.getall(PREFER, ()):
        for preference in _PREFERENCE.findall(line):
            name, _, value = preference.partition(";")[0].partition("=")
            if name.strip().lower() == "wait":
                seconds = _SECONDS.fullmatch(value.strip())
                return min(int(seconds[2].lstrip("0")[:9] or 0), LONGEST_WAIT_s) if seconds else None
    return None


def _named(messages: Any) -> dict[str, Any]:
    """Marshmallow's messages with every key a string, as JSON has it."""
    if isinstance(messages, dict):
        return {str(name): _named(inner) if isinstance(inner, dict) else inner for name, inner in messages.items()}
    return {"_schema": messages}
