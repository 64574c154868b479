"""Who is calling: a key becomes a Caller. Pure; where keys are stored is `stores/key_table.py`."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from service.tickets import Right

READ: Final = "jobs:read"
WRITE: Final = "jobs:write"
SCOPES: Final = (READ, WRITE, "webhooks:manage", "admin")

KEY_PREFIX: Final = "jw_"
_LONGEST_KEY = 200


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of a valid key: its account, what it may do, until when, and the limits that are its own."""

    account_id: int
    account: str
    key_id: str
    scopes: frozenset[str]
    expires_at: datetime | None = None
    limits: Mapping[str, str] = field(default_factory=dict, hash=False)
    right: Right | None = None
    """The one thing that a caller with a ticket may follow; None: a caller with a key may do what its scopes allow."""
    public: bool = False
    """Nobody in particular, who may read a public job's reduced form; `key_id` is then the client's address."""


def mint_key() -> str:
    """A new key: `jw_` and 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def mint_key_id() -> str:
    """The public name of a key, by which it is listed and revoked."""
    return "key_" + secrets.token_hex(6)


def key_hash(key: str) -> bytes:
    """SHA-256 of a key: what is stored, and what is looked up, so that no comparison runs over the key itself."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key in X-API-Key, api-key or Authorization: Bearer (in this order), or None."""
    key = headers.get("X-API-Key") or headers.get("api-key")
    if not key:
        scheme, _, credentials = headers.get("Authorization", "").partition(" ")
        key = credentials.strip() if scheme.lower() == "bearer" else None
    return key if key and len(key) <= _LONGEST_KEY else None
