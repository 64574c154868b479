"""From a job to what is kept ready of it: made once per change, for Redis, for memory and for those who follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from schemas.shapes import batch_shape, shape_a, shape_b_of
from service.batch import Batch
from service.job import Job, epoch_ms
from service.stores.event_channel import BATCH_CHANGED, DELETED, Notice
from service.stores.keys import batch_key, topic_of
from service.stores.ready import JobKey, ReadyAnswer
from service.stores.status_cache import Change

SOONEST_RETRY_s: Final = 2
LATEST_RETRY_s: Final = 10


def ready_answer(job: Job) -> ReadyAnswer:
    """Both shapes of a job as bytes, with its ETag and headers."""
    shape = shape_a(job)
    return ReadyAnswer(
        version=job.version,
        changed_ms=epoch_ms(job.changed_at),
        status=job.status,
        retry_after_s=None if job.finished else _pace(job),
        shape_a=orjson.dumps(shape),
        shape_b=orjson.dumps(shape_b_of(shape)),
    )


def ready_batch(batch: Batch, *, include_progress: bool = False) -> ReadyAnswer:
    """A batch as bytes (there is one shape), with its ETag and headers; with progress the ETag says too little."""
    return ReadyAnswer(
        version=batch.version,
        changed_ms=epoch_ms(batch.changed_at),
        status=batch.status,
        retry_after_s=None if batch.over else SOONEST_RETRY_s,
        shape_a=orjson.dumps(batch_shape(batch, include_progress=include_progress)),
        shape_b=b"",
    )


def batch_change_of(account_id: int, batch_id: str) -> Change:
    """What Redis is told when a batch changed: to forget what it holds. The next reader makes the answer anew,
    so that a batch of thousands costs its writers nothing."""
    key = batch_key(account_id, batch_id)
    notice = Notice(*key, 0, BATCH_CHANGED, 0, False, batch_id, None, [], None, None, b"")
    return Change(*key, 0, None, [topic_of(key)], notice.encode())


@dataclass(frozen=True, slots=True)
class Written:
    """A job as it was written. `previous_status`, `was_stalled`: before; None: it was created, or nobody knows.

    `repeated`: the report said what was known already.
    """

    job: Job
    previous_status: str | None = None
    was_stalled: bool | None = None
    repeated: bool = False


def change_of(written: Written, answer: ReadyAnswer) -> Change:
    """What Redis is told when a job was created or changed. Who follows more than this job need not hear it again."""
    job = written.job
    notice = Notice(
        job.account_id,
        job.id,
        job.version,
        job.status,
        answer.changed_ms,
        job.stalled,
        job.batch_id,
        job.user_id,
        job.tags,
        written.previous_status,
        written.was_stalled,
        answer.shape_a,
    )
    topics = [topic_of(notice.key)] if written.repeated else notice.topics
    return Change(job.account_id, job.id, job.version, answer, topics, notice.encode())


def present_notice(key: JobKey, answer: ReadyAnswer) -> Notice:
    """The present state of a job as if it had just been announced."""
    shape = orjson.loads(answer.shape_a)
    return Notice(
        *key,
        answer.version,
        answer.status,
        answer.changed_ms,
        shape["stalled"],
        shape["batch_id"],
        shape["user_id"],
        shape["tags"],
        None,
        None,
        answer.shape_a,
    )


def deletion_notice(
    key: JobKey,
    version: int,
    *,
    batch_id: str | None = None,
    user_id: str | None = None,
    tags: Sequence[str] = (),
    previous_status: str | None = None,
) -> Notice:
    """That a job is gone. `version`: its tombstone's; 0: of an unknown one."""
    return Notice(*key, version, DELETED, 0, False, batch_id, user_id, list(tags), previous_status, None, b"")


def deletion_of(notice: Notice) -> Change:
    """What Redis is told when a job was removed."""
    return Change(*notice.key, notice.version, None, notice.topics, notice.encode())


def _pace(job: Job) -> int:
    """When to ask again: the longer a job has been on its way, the less a second matters. 2 to 10 s."""
    on_its_way_s = (job.changed_at - job.created_at).total_seconds()
    return max(SOONEST_RETRY_s, min(LATEST_RETRY_s, round(on_its_way_s / 30)))
