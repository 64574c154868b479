"""Tickets: a signed right to follow something for a while, for those who cannot send a key. Pure; RFC 7519 (JWT)."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, Literal

import jwt

from service.errors import Unauthorized

Kind = Literal["job", "batch", "jobs", "user", "tags", "feed"]

LONGEST_TICKET: Final = 4_000
_ALGORITHM: Final = "HS256"
_AUDIENCE: Final = "jobwire streams"


@dataclass(frozen=True, slots=True)
class Right:
    """What a ticket opens. `value`: the id of the job, the batch or the stored set (`jobs`); the user id; the tags."""

    kind: Kind
    value: tuple[str, ...] = ()


class Tickets:
    """Signs with the first of `secrets`, verifies with all."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._keys = [_key_of(secret) for secret in secrets]

    def make(self, key_id: str, right: Right, expires_at: datetime) -> str:
        """A ticket of the key `key_id`. `expires_at` is cut to whole seconds."""
        claims = {"aud": _AUDIENCE, "sub": key_id, "exp": expires_at, "kind": right.kind, "value": right.value}
        return jwt.encode(claims, self._keys[0], algorithm=_ALGORITHM, json_encoder=_Brief)

    def read(self, ticket: str) -> tuple[str, Right]:
        """The id of the key and what it may open. Raises Unauthorized for a forged or an expired one."""
        if len(ticket) <= LONGEST_TICKET:
            for key in self._keys:
                try:
                    return _right(jwt.decode(ticket, key, [_ALGORITHM], audience=_AUDIENCE, options=_REQUIRED))
                except jwt.ExpiredSignatureError:
                    raise Unauthorized("This ticket has expired: ask for a new one at POST /tickets.") from None
                except jwt.InvalidTokenError:
                    continue
        raise Unauthorized("This is no ticket of ours: ask for one at POST /tickets.")


class _Brief(json.JSONEncoder):
    """Writes every letter as itself: escaped, a long user id would not fit into an address."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"ensure_ascii": False})


_REQUIRED: Final[Any] = {"require": ["exp", "sub", "aud"]}


def _key_of(secret: str) -> bytes:
    """The same secrets seal other things: a ticket must never pass for one of them, nor one of them for a ticket."""
    return hmac.digest(secret.encode(), b"jobwire ticket 1", sha256)


def _right(claims: dict[str, Any]) -> tuple[str, Right]:
    return claims["sub"], Right(claims["kind"], tuple(claims["value"]))
