"""Fields that hold what Postgres and every client can hold: no NUL, no lone surrogates, no number beyond 64 bits.

`json_schema` of a field says for the API document what its type and validators do not say by themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, ClassVar

from marshmallow import ValidationError, fields, validate

DEEPEST = 32
LARGEST_NUMBER = 2**63
LARGEST_INT = 2**31 - 1

_INSTANT = re.compile(
    r"(\d{4})-?(\d\d)-?(\d\d)"
    r"(?:[T ](\d\d):?(\d\d)(?::?(\d\d)(?:[.,](\d{1,12}))?)?(?:\s*Z|\s*([+ -])(\d\d):?([0-5]\d)?)?)?",
    re.ASCII | re.IGNORECASE,
)


class Text(fields.String):
    """Text of `shortest` to `longest` characters that can be stored and sent again."""

    def __init__(self, *, longest: int, shortest: int = 0, **options: Any) -> None:
        super().__init__(validate=[validate.Length(min=shortest, max=longest), refuse_unstorable], **options)


class Bytes4KiB(Text):
    """A sentence of at most 4 KiB in UTF-8."""

    def __init__(self, **options: Any) -> None:
        super().__init__(longest=4096, **options)
        self.validators.append(_at_most_4_kib)


class WebAddress(fields.Url):
    """An http or https address that one line of text can hold."""

    json_schema: ClassVar = {"format": "uri"}

    def __init__(self, *, longest: int, **options: Any) -> None:
        super().__init__(schemes={"http", "https"}, require_tld=False, **options)
        self.validators += [validate.Length(max=longest), refuse_unprintable]


class MailAddress(fields.Email):
    """An e-mail address that one line of text can hold."""

    def __init__(self, *, longest: int, **options: Any) -> None:
        super().__init__(**options)
        self.validators += [validate.Length(max=longest), refuse_unprintable]


class Count(fields.Integer):
    """A whole number from `least` to 2^31-1; neither a string nor 3.0 nor true passes for one."""

    def __init__(self, *, least: int = 0, most: int = LARGEST_INT, **options: Any) -> None:
        super().__init__(strict=True, validate=validate.Range(min=least, max=most), **options)


class CountInQuery(fields.Integer):
    """A whole number from `least` to `most` in plain digits: no sign, no underscore, no digits of other scripts."""

    def __init__(self, *, least: int, most: int, **options: Any) -> None:
        super().__init__(validate=validate.Range(min=least, max=most), **options)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        if not (isinstance(value, str) and value.isascii() and value.isdigit()):
            raise self.make_error("invalid", input=value)
        return super()._deserialize(value, attr, data, **kwargs)


class Digits(fields.Field[int]):
    """A whole number from `least` to `most` in a query, written in plain digits."""

    def __init__(self, *, least: int, most: int, **options: Any) -> None:
        super().__init__(**options)
        self.least, self.most = least, most
        self.json_schema = {"type": "integer", "minimum": least, "maximum": most}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        plain = value.isascii() and value.isdigit() and len(value) <= 10
        if not plain or not self.least <= int(value) <= self.most:
            raise ValidationError(f"Must be a whole number from {self.least} to {self.most}.")
        return int(value)


class ByComma:
    """Marks a query parameter of several values: `a,b`, or `a` and `b` each with the name before it."""


class Instant(fields.Field[datetime]):
    """A time in a query, RFC 3339 or ISO 8601, to the microsecond. Without an offset it is UTC; a date is its midnight.

    A `+` that arrived as a space is understood. What is finer than a microsecond is cut off or, with `round_up`,
    rounded up: either way no stored time (whole milliseconds) changes sides of the bound.
    """

    json_schema: ClassVar = {"type": "string", "format": "date-time"}

    def __init__(self, *, round_up: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.round_up = round_up

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> datetime:
        written = _INSTANT.fullmatch(value)
        try:
            if written is None:
                raise ValueError(value)
            return _instant(written, self.round_up)
        except (ValueError, OverflowError):
            raise ValidationError("Must be a time such as 2024-01-15T10:30:00.000Z.") from None


class Percentage(fields.Field[float | int]):
    """A number from 0 to 100. Whole numbers stay whole."""

    json_schema: ClassVar = {"type": "number", "minimum": 0, "maximum": 100}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> float | int:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise ValidationError("Must be a number from 0 to 100.")
        return int(value) if value == int(value) else value


class Flag(fields.Field[bool]):
    """true or false and nothing that resembles them."""

    json_schema: ClassVar = {"type": "boolean"}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise ValidationError("Must be true or false.")
        return value


class FreeObject(fields.Field[dict[str, Any]]):
    """A JSON object of the caller's own, at most `most_bytes` long as `json.dumps` writes it."""

    json_schema: ClassVar = {"type": "object", "additionalProperties": True}

    def __init__(self, *, most_bytes: int = 16 * 1024, **options: Any) -> None:
        super().__init__(**options)
        self.most_bytes = most_bytes

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValidationError("Must be an object.")
        _refuse_unstorable_inside(value, 1)
        if _length_as_jsonb(value) > self.most_bytes:
            raise ValidationError(f"Must not be larger than {self.most_bytes // 1024} KiB.")
        return value


def ecma_pattern(pattern: re.Pattern[str]) -> str:
    """A pattern of ours, which ends in `\\Z` and is matched from the start, as JSON Schema writes it."""
    return "^" + pattern.pattern.removesuffix(r"\Z") + "$"


def refuse_unstorable(text: str) -> None:
    """Refuses NUL (Postgres cannot store it) and lone surrogates (UTF-8 cannot carry them)."""
    if "\0" in text:
        raise ValidationError("Must not contain the NUL character.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValidationError("Must not contain lone surrogates.") from None


def refuse_unprintable(text: str) -> None:
    """Refuses line ends and other control characters, which would break out of the header they are written to."""
    if not text.isprintable():
        raise ValidationError("Must not contain control characters.")


def _length_as_jsonb(value: dict[str, Any]) -> int:
    """Bytes of the text that Postgres's jsonb makes of it, where a merged object is measured again: with a space
    behind `:` and `,`, and with small numbers spelled out (1e-9 is 0.000000001)."""
    spelled_out = sum(len(f"{Decimal(repr(number)):f}") - len(repr(number)) for number in _floats_inside(value))
    return len(json.dumps(value, ensure_ascii=False).encode()) + spelled_out


def _floats_inside(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _floats_inside(part)


def _instant(written: re.Match[str], round_up: bool) -> datetime:
    """Raises ValueError and OverflowError for what no calendar has."""
    year, month, day, hour, minute, second = (int(part or 0) for part in written.groups()[:6])
    fraction, sign, offset_hours, offset_minutes = written.groups()[6:]
    offset = timedelta(hours=int(offset_hours or 0), minutes=int(offset_minutes or 0))
    microseconds = int((fraction or "")[:6].ljust(6, "0"))
    zone = timezone(-offset if sign == "-" else offset)
    at = datetime(year, month, day, hour, minute, second, microseconds, zone).astimezone(UTC)
    finer = round_up and (fraction or "")[6:].strip("0")
    return at + timedelta(microseconds=1) if finer else at


def _at_most_4_kib(text: str) -> None:
    if len(text.encode("utf-8", "replace")) > 4096:
        raise ValidationError("Must not be larger than 4 KiB.")


def _refuse_unstorable_inside(value: Any, depth: int) -> None:
    if depth > DEEPEST and isinstance(value, dict | list):
        raise ValidationError(f"Must not be nested deeper than {DEEPEST} levels.")
    if isinstance(value, str):
        refuse_unstorable(value)
    elif isinstance(value, dict):
        for name, part in value.items():
            refuse_unstorable(name)
            _refuse_unstorable_inside(part, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _refuse_unstorable_inside(part, depth + 1)
    elif isinstance(value, float) and (not math.isfinite(value) or abs(value) >= LARGEST_NUMBER):
        # The parser has already turned whole numbers beyond 64 bits into floats: what was sent is lost.
        raise ValidationError("Numbers must fit into 64 bits.")
