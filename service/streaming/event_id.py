"""What the ids of events say when many jobs are followed: a safe position, or that the end was told.

An id belongs to a scope: who comes back to follow something else has said nothing of what it knows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

_POSITION: Final = re.compile(r"(?:e\.[0-9]+-[0-9]+\.)?p\.([0-9a-f]{8})\.([0-9]{1,19})")


def scope_of(account_id: int, kind: str, *what: object) -> str:
    """What is followed, in brief."""
    return _print(" ".join(map(str, (account_id, kind, *what))), 8)


def position_id(identity: str, scope: str, position: int) -> bytes:
    """Everything in this scope that was committed before `position`, in this Postgres, was told."""
    return f"p.{_scope_print(identity, scope)}.{position}".encode()


def read_position(identity: str, scope: str, event_id: str) -> int | None:
    """The position of an id of ours; None for every other: of another scope or Postgres, or nonsense."""
    written = _POSITION.fullmatch(event_id)
    return int(written[2]) if written is not None and written[1] == _scope_print(identity, scope) else None


def set_end_id(states: Iterable[tuple[str, int]]) -> bytes:
    """All jobs of a set were told to their end: these, each at this version (0: gone)."""
    return f"e.{_print(' '.join(f'{job_id} {version}' for job_id, version in sorted(states)), 8)}".encode()


def batch_end_id(etag: str, position: bytes) -> bytes:
    """A batch was told to its end; should it begin again, the reader goes on from `position`, an id."""
    return _batch_end(etag).encode() + position


def is_batch_end(etag: str, event_id: str) -> bool:
    """Whether an id that has a position says that the batch was told to this end."""
    return event_id.startswith(_batch_end(etag))


def _batch_end(etag: str) -> str:
    return "e.{}.".format(etag.strip('"'))


@lru_cache(maxsize=1_000)  # of one stream they are all alike
def _scope_print(identity: str, scope: str) -> str:
    return _print(identity + scope, 4)


def _print(text: str, length_bytes: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=length_bytes).hexdigest()
