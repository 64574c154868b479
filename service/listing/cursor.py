"""Cursors: where a page ended, sealed, so that only we make them and each goes with its account and its filters."""

from __future__ import annotations

import hmac
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final

import orjson

from service.errors import ValidationFailed
from service.job import epoch_ms
from service.stores.page_table import Filters, Position

SEAL_bytes: Final = 16
PRINT_bytes: Final = 16

_PURPOSE: Final = b"jobwire list cursor 1"  # the same secrets seal other things
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FORGED: Final = "This is no cursor of a list of yours; start anew without it."
_OTHER_FILTERS: Final = (
    "This cursor belongs to other filters or another order; repeat those of the first page, or start anew without it."
)


class Cursors:
    """Makes cursors and reads them again. The first of `secrets` seals, all of them are accepted."""

    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = [secret.encode() for secret in secrets]

    def make(self, account_id: int, filters: Filters, *, newest_first: bool, position: Position) -> str:
        """base64url of: seal (16 bytes), print of filters and order (16), created_at in ms (8), job id."""
        content = _print(filters, newest_first) + struct.pack(">q", epoch_ms(position.created_at))
        content += position.id.encode()
        return _as_text(_seal(self._secrets[0], account_id, content) + content)

    def read(self, account_id: int, filters: Filters, *, newest_first: bool, cursor: str) -> Position:
        """Raises ValidationFailed for a forged one, another account's, and one of other filters."""
        sealed = _as_bytes(cursor)
        seal, content = sealed[:SEAL_bytes], sealed[SEAL_bytes:]
        if not any(hmac.compare_digest(seal, _seal(secret, account_id, content)) for secret in self._secrets):
            raise ValidationFailed({"cursor": [_FORGED]}, _FORGED)
        if content[:PRINT_bytes] != _print(filters, newest_first):
            raise ValidationFailed({"cursor": [_OTHER_FILTERS]}, _OTHER_FILTERS)
        [created_ms] = struct.unpack_from(">q", content, PRINT_bytes)
        return Position(_EPOCH + timedelta(milliseconds=created_ms), content[PRINT_bytes + 8 :].decode())


def _seal(secret: bytes, account_id: int, content: bytes) -> bytes:
    return hmac.digest(secret, _PURPOSE + struct.pack(">q", account_id) + content, sha256)[:SEAL_bytes]


def _print(filters: Filters, newest_first: bool) -> bytes:
    """The same for the same filters, however they were written."""
    sets = [sorted(filters.statuses), filters.types and sorted(filters.types), sorted(filters.tags)]
    rest = [filters.batch_id, filters.user_id, filters.created_after, filters.created_before, newest_first]
    return sha256(orjson.dumps([*sets, *rest], option=orjson.OPT_UTC_Z)).digest()[:PRINT_bytes]


def _as_text(sealed: bytes) -> str:
    return urlsafe_b64encode(sealed).rstrip(b"=").decode()


def _as_bytes(cursor: str) -> bytes:
    """Refuses every writing of the same bytes but ours: no character of a cursor may be changed unnoticed."""
    try:
        sealed = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    except ValueError:
        sealed = b""
    if _as_text(sealed) != cursor:
        raise ValidationFailed({"cursor": [_FORGED]}, _FORGED)
    return sealed
