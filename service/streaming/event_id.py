"""What the ids of events say when many jobs are followed: a safe position, or that the end was told."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Final

_POSITION: Final = re.compile(r"p\.([0-9a-f]{8})\.([0-9]{1,19})")


def position_id(identity: str, position: int) -> bytes:
    """Everything that was committed before `position`, in this Postgres, was told."""
    return b"p.%b.%d" % (_print(identity), position)


def read_position(identity: str, event_id: str) -> int | None:
    """The position of an id of ours; None for every other: of another Postgres, or nonsense."""
    written = _POSITION.fullmatch(event_id)
    return int(written[2]) if written is not None and written[1].encode() == _print(identity) else None


def set_end_id(states: Iterable[tuple[str, int]]) -> bytes:
    """All jobs of a set were told to their end: these, each at this version (0: gone)."""
    return b"e.%b" % _print("\n".join(f"{job_id} {version}" for job_id, version in sorted(states)), 8)


def batch_end_id(etag: str) -> bytes:
    """A batch was told to its end."""
    return b"e.%b" % etag.strip('"').encode()


def _print(text: str, length_bytes: int = 4) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=length_bytes).hexdigest().encode()
