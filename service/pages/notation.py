"""The words in which `operations.py` describes an operation. `document.py` makes OpenAPI of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from marshmallow import Schema

from schemas.requests import NothingSchema
from service.errors import JobwireError, Malformed, TooLarge, UnsupportedMediaType, ValidationFailed

JSON: Final = "application/json"
ANYTHING: Final = "*/*"
BODY_ERRORS: Final = (Malformed, TooLarge, UnsupportedMediaType, ValidationFailed)
"""What can be wrong with a body, also with one that may be left out and is not worth describing."""


@dataclass(frozen=True)
class RequestHeader:
    """A header that a client may send. `errors`: what it can be answered because of it; `json_schema`: of its value."""

    name: str
    description: str
    example: str
    errors: Sequence[type[JobwireError]] = ()
    json_schema: dict[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True)
class ResponseHeader:
    """A header of an answer. `json_schema`: of its value; `shared_as`: its name in the document, where the header's
    own name means several things."""

    name: str
    description: str
    example: str | int
    json_schema: dict[str, Any] = field(default_factory=lambda: {"type": "string"})
    shared_as: str = ""


@dataclass(frozen=True)
class Body:
    """What is sent. `schema`: of the object; `items`: of the objects of an array, where one may be sent."""

    schema: type[Schema] | None = None
    items: type[Schema] | None = None
    most_items: int = 1
    media_type: str = JSON
    required: bool = True
    examples: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One status that is no error. `schemas`: of its body, any of them; none: it has no body.

    `json_schema` stands for bodies that are no JSON object of ours.
    """

    status: int
    description: str
    schemas: Sequence[type[Schema]] = ()
    headers: Sequence[ResponseHeader] = ()
    media_type: str = JSON
    json_schema: dict[str, Any] | None = None
    examples: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    `id`: its name in generated clients. `query`: None where the query is ignored. `errors`: those that do not already
    follow from the door (401, 403, 429, 503), the ids in the path (404, and 403 of a job), the body, the query or the
    request headers.
    """

    id: str
    tag: str
    summary: str
    answers: Sequence[Answer]
    description: str = ""
    query: type[Schema] | None = NothingSchema
    body: Body | None = None
    headers: Sequence[RequestHeader] = ()
    errors: Sequence[type[JobwireError]] = ()
