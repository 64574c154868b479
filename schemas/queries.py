"""What clients may ask of lists. Loads into what `service.listing` takes; unknown parameters are refused."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from marshmallow import Schema, ValidationError, fields, post_load, validate, validates_schema

from schemas.fields import ByComma, Digits, Instant, Text, ecma_pattern
from schemas.requests import IdsInQuery, Status
from service.job import JOB_ID, STATUSES, TYPE_SLUG, type_of, types_of

MOST_TAGS = 32
LONGEST_CURSOR = 300
FURTHEST_OFFSET = 10_000


class Statuses(ByComma, fields.Field[tuple[str, ...]]):
    """One or several of the five states, in any casing, by comma. All five are no restriction: ()."""

    json_schema: ClassVar = {"type": "array", "items": {"type": "string", "enum": list(STATUSES)}, "minItems": 1}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> tuple[str, ...]:
        named = {Status().deserialize(word.strip()) for word in value.split(",")}
        return () if len(named) == len(STATUSES) else tuple(sorted(named))


class Tags(ByComma, fields.Field[tuple[str, ...]]):
    """1 to 32 tags by comma. A tag is taken as it is written, blanks and all."""

    json_schema: ClassVar = {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[^,]+$"},
        "minItems": 1,
        "maxItems": MOST_TAGS,
    }

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> tuple[str, ...]:
        tags = value.split(",")
        if len(tags) > MOST_TAGS:
            raise ValidationError(f"Must be at most {MOST_TAGS} tags.")
        return tuple(Text(longest=64, shortest=1).deserialize(tag) for tag in dict.fromkeys(tags))


class Matching(fields.String):
    """Text that `pattern` matches. It need not be anything that a job has."""

    def __init__(self, pattern: re.Pattern[str], **options: Any) -> None:
        # marshmallow formats the message: braces stand for fields there
        written = pattern.pattern.removesuffix(r"\Z").replace("{", "{{").replace("}", "}}")
        super().__init__(validate=validate.Regexp(pattern, error=f"Must match {written}."), **options)
        self.json_schema = {"pattern": ecma_pattern(pattern)}


class ListQuerySchema(Schema):
    """The filters, the order and the page of `GET /jobs`.

    Empty values are refused: a variable that is unset where the address is put together must not widen the list.
    """

    status = Statuses(load_default=())
    operation = Matching(TYPE_SLUG)
    type = Matching(TYPE_SLUG)
    batch_id = Matching(JOB_ID, load_default=None)
    user_id = Text(longest=256, shortest=1, load_default=None)
    tags = Tags(load_default=())
    created_after = Instant(load_default=None)
    created_before = Instant(round_up=True, load_default=None)
    order = fields.String(validate=validate.OneOf(["desc", "asc"]), load_default="desc")
    limit = Digits(least=1, most=100, load_default=50)
    offset = Digits(least=0, most=FURTHEST_OFFSET)
    cursor = Text(longest=LONGEST_CURSOR, shortest=1, load_default=None)

    @validates_schema
    def _one_way_to_page(self, data: dict[str, Any], **kwargs: Any) -> None:
        if data.get("cursor") is not None and "offset" in data:
            raise ValidationError({"offset": ["Does not go with a cursor, which says by itself where to go on."]})

    @post_load
    def _as_asked(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {
            "statuses": data.pop("status"),
            "types": _types(data.pop("type", None), data.pop("operation", None)),
            "newest_first": data.pop("order") == "desc",
            "offset": data.pop("offset", 0),
            **data,
        }


class ManyEventsQuerySchema(Schema):
    """Which jobs `GET /jobs/events` tells of. Empty values are refused, as in lists."""

    job_ids = IdsInQuery(most=1000, load_default=None)
    status = Statuses(load_default=())
    user_id = Text(longest=256, shortest=1, load_default=None)
    tags = Tags(load_default=())
    last_event_id = fields.String(load_default=None)
    ticket = fields.String(load_default=None)


def _types(job_type: str | None, operation: str | None) -> tuple[str, ...] | None:
    """The types that both allow; () where they contradict each other, None where neither is given."""
    if job_type is None:
        return None if operation is None else types_of(operation)
    named = type_of(job_type)
    return (named,) if operation is None or named in types_of(operation) else ()
