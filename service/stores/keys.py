"""Every name in Redis, in one place. Units are part of the name (`_ms`, `_s`)."""

from __future__ import annotations

from binascii import crc_hqx
from typing import Final

TAGS: Final = 64
"""All keys of a job share one of this many hash tags, so that they can live on one node of a cluster."""

ENTRY_LIFETIME_ms: Final = 24 * 3_600_000
"""An entry that nobody refreshes leaves Redis after a day."""

ABSENCE_LIFETIME_ms: Final = 1_000
"""How long Redis may say "there is no such job"."""

LEASE_LIFETIME_ms: Final = 5_000
"""How long one reader may be the one that fills an entry."""

UNVERIFIED_AFTER_ms: Final = 60_000
"""An entry that was not compared with Postgres for this long is read from there first."""


def status_key(account_id: int, job_id: str) -> bytes:
    """Where the ready answer of a job lies."""
    name = f"{account_id}:{job_id}".encode()
    return b"jw:{%d}:status:%s" % (crc_hqx(name, 0) % TAGS, name)


_BATCH: Final = "batch/"  # no job id holds a slash


def batch_key(account_id: int, batch_id: str) -> tuple[int, str]:
    """The key of a batch among the keys of jobs (account id, job id): batches are cached and followed as jobs are."""
    return account_id, _BATCH + batch_id


def batch_of(key: tuple[int, str]) -> str | None:
    """The batch id, where a key is a batch's."""
    return key[1].removeprefix(_BATCH) if key[1].startswith(_BATCH) else None


_ACCOUNT: Final = "account/"


def account_key(account_id: int) -> tuple[int, str]:
    """The key of all jobs of an account, for those who follow them."""
    return account_id, _ACCOUNT


def topic_of(key: tuple[int, str]) -> bytes:
    """Where changes of a job, of a batch or of an account's jobs are announced."""
    if key[1] == _ACCOUNT:
        return account_topic(key[0])
    batch_id = batch_of(key)
    return job_topic(*key) if batch_id is None else batch_topic(key[0], batch_id)


def job_topic(account_id: int, job_id: str) -> bytes:
    """Where changes of one job are announced."""
    return b"jw:job:%d:%s" % (account_id, job_id.encode())


def batch_topic(account_id: int, batch_id: str) -> bytes:
    """Where changes of a batch's jobs are announced."""
    return b"jw:batch:%d:%s" % (account_id, batch_id.encode())


def account_topic(account_id: int) -> bytes:
    """Where changes of an account's jobs are announced."""
    return b"jw:account:%d" % account_id


def limit_key(whose: str, policy: str) -> bytes:
    """Where the rolling window of a key or an address lies."""
    return f"jw:{{{whose}}}:limit:{policy}".encode()


PROCESSES_KEY: Final = b"jw:processes"
"""A sorted set of web processes by when they were last alive (Redis's Unix time, s)."""

HOME_TOPIC: Final = b"jw:home"
"""A channel that every process listens to, so that its connection always has one; nothing is announced there yet."""
