"""The ready answer: a job as clients see it, made into bytes once per change; and its ready absence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, Self, cast

from multidict import CIMultiDict

ANSWER_SHAPE: Final = 3
"""Grows whenever the bytes of an answer or a payload change meaning; other shapes' entries are misses."""

JobKey = tuple[int, str]
"""account_id, job_id"""

AbsenceKind = Literal["not_found", "forbidden", "deleted", "expired"]

_NONE: Final = "-"


@dataclass(slots=True)
class ReadyAnswer:
    """One version of one job in both shapes. Shared by everyone who reads it: nobody changes it.

    `changed_ms`: Unix time of the change. `shape_a`, `shape_b`: JSON without a raw line feed.
    `headers`: all that do not depend on the caller; a response writes into them, so give it a copy.
    """

    version: int
    changed_ms: int
    status: str
    retry_after_s: int | None
    shape_a: bytes
    shape_b: bytes
    etag: str = field(init=False)
    headers: CIMultiDict[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.etag = f'"{self.version}-{self.changed_ms}"'
        self.headers = CIMultiDict(
            {
                "Content-Type": "application/json; charset=utf-8",
                "ETag": self.etag,
                "Cache-Control": "private, no-cache",
            }
        )
        if self.retry_after_s is not None:
            self.headers["Retry-After"] = str(self.retry_after_s)

    @property
    def finished(self) -> bool:
        """Nothing more will happen: nobody is asked to come back."""
        return self.retry_after_s is None

    def encode(self) -> bytes:
        """The payload: `<changed_ms> <status> <retry_after_s or ->`, shape A, shape B, one line each."""
        retry_after = _NONE if self.retry_after_s is None else self.retry_after_s
        head = f"{self.changed_ms} {self.status} {retry_after}".encode()
        return b"\n".join((head, self.shape_a, self.shape_b))

    @classmethod
    def decode(cls, version: int, payload: bytes) -> Self:
        """From what `encode` made. Raises ValueError."""
        head, shape_a, shape_b = payload.split(b"\n")
        changed_ms, status, retry_after = head.decode().split(" ")
        return cls(
            version=version,
            changed_ms=int(changed_ms),
            status=status,
            retry_after_s=None if retry_after == _NONE else int(retry_after),
            shape_a=shape_a,
            shape_b=shape_b,
        )


@dataclass(frozen=True, slots=True)
class Absence:
    """Why there is no such job for this account. `expired_at`: RFC 3339, for the kind `expired`."""

    kind: AbsenceKind
    expired_at: str | None = None

    def encode(self) -> bytes:
        """The payload: `<kind> <expired_at or ->`."""
        return f"{self.kind} {self.expired_at or _NONE}".encode()

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """From what `encode` made. Raises ValueError."""
        kind, expired_at = payload.decode().split(" ")
        return cls(cast(AbsenceKind, kind), None if expired_at == _NONE else expired_at)


Ready = ReadyAnswer | Absence


def version_of(ready: Ready) -> int:
    """An absence has version 0: jobs begin at 1."""
    return ready.version if isinstance(ready, ReadyAnswer) else 0


def decode_ready(version: int, payload: bytes) -> Ready:
    """Whichever `version` says it is. Raises ValueError."""
    return ReadyAnswer.decode(version, payload) if version else Absence.decode(payload)
