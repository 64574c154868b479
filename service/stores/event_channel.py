"""What is announced in Redis when a job changes: to whom, and the message."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from service.stores.keys import account_topic, batch_topic, job_topic


def topics_of(account_id: int, job_id: str, batch_id: str | None) -> list[bytes]:
    """The channels on which a change of this job is announced."""
    topics = [job_topic(account_id, job_id), account_topic(account_id)]
    if batch_id is not None:
        topics.append(batch_topic(account_id, batch_id))
    return topics


def message_of(
    account_id: int, job_id: str, version: int, status: str, batch_id: str | None, tags: Sequence[str], body: bytes
) -> bytes:
    """One line that says what changed, so that a listener decides without parsing the body; then the body (shape A).

    A deletion has the status `deleted` and an empty body.
    """
    return orjson.dumps([account_id, job_id, version, status, batch_id, list(tags)]) + b"\n" + body
