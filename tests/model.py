"""The contract's section Job as plain Python: what a report means to a job, written without a look at the SQL.

`judge` is the heart: one job, one report, what becomes of both. `World` is many jobs of many accounts.
Times are not modelled: tests hold them to each other (order, presence, ETag).
Below: strategies that draw what workers say, in few words and small numbers so that reports meet often.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

FINISHED = {"COMPLETED", "FAILED", "CANCELLED"}
STATUSES = ("queued", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED")
REPORT_MAY_LEAD_TO: dict[str, set[str]] = {
    "queued": {"PROCESSING", "COMPLETED", "FAILED", "CANCELLED"},
    "PROCESSING": {"COMPLETED", "FAILED", "CANCELLED", "queued"},
    "COMPLETED": set(),
    "FAILED": set(),
    "CANCELLED": set(),
}
OPERATIONS = {
    "extraction": "extract",
    "parsing": "parse",
    "splitting": "split",
    "chunking": "split",
    "classification": "classify",
}
METADATA_LIMIT_bytes = 16 * 1024

TAKEN = {"changed", "same"}

Object = dict[str, Any]
Result = tuple[str, bytes]
"""content type, bytes"""


@dataclass
class Job:
    """A job as everyone may see it. The values of its fields are never changed, only replaced."""

    id: str = "job"
    type: str = "extraction"
    status: str = "queued"
    version: int = 1
    attempt: int = 1
    progress: Object = field(default_factory=dict)
    error: str | None = None
    error_details: Object | None = None
    metadata: Object = field(default_factory=dict)
    parameters: Object | None = None
    batch_id: str | None = None
    tags: list[str] = field(default_factory=list)
    user_id: str | None = None
    pdf_name: str | None = None
    pdf_hash: str | None = None
    file_count: int | None = None
    stalled: bool = False
    started: bool = False
    result: Result | None = None
    history: list[Object] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    def shape_a(self) -> Object:
        """Shape A without its times and without what the service adds of its own (`eta`)."""
        shape = {
            "id": self.id,
            "status": self.status,
            "type": self.type,
            "pdf_name": self.pdf_name,
            "pdf_hash": self.pdf_hash,
            "user_id": self.user_id,
            "error": self.error,
            "error_details": self.error_details,
            "progress": self.progress,
            "batch_id": self.batch_id,
            "tags": self.tags,
            "file_count": self.file_count,
            "metadata": self.metadata,
            "parameters": self.parameters,
            "attempt": self.attempt,
            "version": self.version,
            "stalled": self.stalled,
        }
        if self.status == "COMPLETED" and self.result is not None:
            shape["result_url"] = f"/jobs/{self.id}/result"
        if not self.finished:
            shape["events_url"] = f"/jobs/{self.id}/events"
        return shape

    def shape_b(self) -> Object:
        """Shape B without its times."""
        return {
            "job_id": self.id,
            "operation": OPERATIONS.get(self.type, self.type),
            "status": self.status.lower(),
            "progress": self.progress,
            "error_details": self.error_details,
        }

    def known_times(self) -> set[str]:
        """The times that both shapes must have: the others must be absent."""
        known = {"created_at", "updated_at"}
        if self.started:
            known.add("started_at")
        if self.finished:
            known |= {"completed_at", "expires_at"}
        return known

    def note(self, before: "Job | None") -> None:
        """Adds to the history what this version changed, unless it is mere progress."""

        def kept(job: Job) -> tuple[Any, ...]:
            return job.status, job.attempt, job.progress.get("step"), job.error, job.stalled

        if before is None or kept(before) != kept(self):
            entry = {
                "version": self.version,
                "status": self.status,
                "previous_status": before and before.status,
                "attempt": self.attempt,
                "step": self.progress.get("step"),
                "error": self.error,
            }
            self.history = [*self.history, entry]


@dataclass(frozen=True)
class Said:
    """What somebody says about a job; None: not said. `matches`: what If-Match, if sent, comes to."""

    status: str | None = None
    progress: Object | None = None
    error: str | None = None
    error_details: Object | None = None
    metadata: Object | None = None
    attempt: int | None = None
    matches: bool | None = None
    retry: bool = False
    result: Result | None = None


def judge(job: Job, said: Said) -> tuple[str, Job]:
    """What becomes of the report, in the words of the store, and of the job, which itself stays as it is."""
    refused = _refusal(job, said)
    if refused is not None:
        return refused, job
    after = _with_all_that_was_said(job, said)
    if after == job:
        return "same", job
    if job.finished and said.result is None and not said.retry:
        return "invalid_transition", job
    if after.metadata != job.metadata and as_jsonb_bytes(after.metadata) > METADATA_LIMIT_bytes:
        return "metadata_too_large", job
    after.version += 1
    after.note(job)
    return "changed", after


def _refusal(job: Job, said: Said) -> str | None:
    if said.matches is False:
        return "precondition_failed"
    if said.attempt is not None and said.attempt != job.attempt:
        return "stale_attempt" if said.attempt < job.attempt else "unknown_attempt"
    if said.retry:
        return None if job.status == "FAILED" else "invalid_transition"
    wanted = said.status or job.status
    if wanted != job.status and wanted not in REPORT_MAY_LEAD_TO[job.status]:
        return "invalid_transition"
    if job.finished and said.result is not None:
        may_be_stored = said.result == job.result or (job.status == "COMPLETED" and job.result is None)
        return None if may_be_stored else "result_final"
    if job.finished and said.status is None and (said.progress is not None or said.metadata is not None):
        return "invalid_transition"
    return None


def _with_all_that_was_said(job: Job, said: Said) -> Job:
    """The job if everything in an allowed report were taken."""
    after = replace(job)
    after.status = said.status or job.status
    after.stalled = False
    begins_attempt = after.status == "queued" != job.status
    after.attempt += begins_attempt
    if said.progress is not None or after.status != job.status:
        after.progress = merged_progress({} if begins_attempt else job.progress, said.progress or {}, after.status)
    if said.retry:
        after.progress = {}
    if begins_attempt:
        after.result = None
    if said.metadata is not None:
        after.metadata = merged(job.metadata, said.metadata)
    if after.status in ("FAILED", "CANCELLED"):
        if not job.finished:
            after.error, after.error_details = reason(said.error, said.error_details)
    else:
        after.error = after.error_details = None
    if after.status == "PROCESSING":
        after.started = True
    if said.result is not None:
        after.result = said.result
    return after


def merged(held: Object, given: Object) -> Object:
    """At the top level: parts given replace parts held, null removes one."""
    return {name: part for name, part in {**held, **given}.items() if not (name in given and part is None)}


def merged_progress(held: Object, given: Object, status: str) -> Object:
    """The percentage never falls; COMPLETED is 100; who has left the queue has no place in it unless it is said."""
    parts = merged(held, given)
    if held.get("percentage", -1) > parts.get("percentage", -1):
        parts["percentage"] = held["percentage"]
    if status == "COMPLETED":
        parts["percentage"] = 100
    if status == "COMPLETED" or (status != "queued" and "queue_position" not in given):
        parts.pop("queue_position", None)
    return parts


def reason(error: str | None, details: Object | None) -> tuple[str, Object]:
    """A sentence, and `{error_type, message}`, each made from the other where one is missing."""
    details = details or {}
    sentence = error or details.get("message") or "No reason was given"
    return sentence, {
        "error_type": details.get("error_type") or "job_failed",
        "message": details.get("message") or sentence,
    }


def as_jsonb_bytes(value: Object) -> int:
    """How long Postgres writes it."""
    return len(json.dumps(value, ensure_ascii=False).encode())


class World:
    """Jobs and tombstones of several accounts, and the counts of their batches."""

    def __init__(self) -> None:
        self.jobs: dict[tuple[Any, str], Job] = {}
        self.gone: set[tuple[Any, str]] = set()

    def absence(self, account: Any, job_id: str) -> str | None:
        """Why this account cannot have this job; None: it has it."""
        if (account, job_id) in self.jobs:
            return None
        if (account, job_id) in self.gone:
            return "deleted"
        return "forbidden" if any(held == job_id for _, held in self.jobs) else "not_found"

    def create(self, account: Any, *jobs: Job) -> str:
        """All or nothing: `created`, `already_exists` or `repeated`."""
        keys = [(account, job.id) for job in jobs]
        if len(set(keys)) < len(keys):
            return "repeated"
        if any(key in self.jobs or key in self.gone for key in keys):
            return "already_exists"
        for key, job in zip(keys, jobs, strict=True):
            self.jobs[key] = replace(job)
            self.jobs[key].note(None)
        return "created"

    def take(self, account: Any, job_id: str, said: Said) -> str:
        """One report; the outcome."""
        absent = self.absence(account, job_id)
        if absent is not None:
            return absent
        outcome, self.jobs[account, job_id] = judge(self.jobs[account, job_id], said)
        return outcome

    def delete(self, account: Any, job_id: str, matches: bool | None = None) -> str:
        """`deleted_now`, an absence or `precondition_failed`."""
        absent = self.absence(account, job_id)
        if absent is not None:
            return absent
        if matches is False:
            return "precondition_failed"
        del self.jobs[account, job_id]
        self.gone.add((account, job_id))
        return "deleted_now"

    def batch_counts(self, account: Any) -> dict[str, dict[str, int]]:
        """Jobs of each batch by status, batches without jobs left out."""
        counts: dict[str, dict[str, int]] = {}
        for (owner, _), job in self.jobs.items():
            if owner == account and job.batch_id is not None:
                of_batch = counts.setdefault(job.batch_id, dict.fromkeys(("total", *map(str.lower, STATUSES)), 0))
                of_batch["total"] += 1
                of_batch[job.status.lower()] += 1
        return counts


# What workers say

BIG = "x" * 9_000  # two of these are more metadata than a job may have

texts = st.sampled_from(["", "reading", "Seite 3 von 7 \N{SNOWMAN}", 'a "quoted" \\ line\nand another'])
percentages = st.sampled_from([0, 1, 30, 50, 62.5, 99, 99.9, 100])
counts = st.sampled_from([0, 1, 7, 2**31 - 1])


def progress_parts(*, nulls: bool) -> st.SearchStrategy[Object]:
    """Some parts of a progress; `nulls`: some of them to be removed."""

    def part(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return values | st.none() if nulls else values

    return st.fixed_dictionaries(
        {},
        optional={
            "percentage": part(percentages),
            "message": part(texts),
            "step": part(st.sampled_from(["ocr", "layout"])),
            "files_completed": part(counts),
            "total_files": part(counts),
            "queue_position": part(counts),
        },
    )


def metadata_parts(*, nulls: bool) -> st.SearchStrategy[Object]:
    """A small object of the caller's own, rarely a big one."""
    plain = st.sampled_from([0, "one", True, [1, None, {"deep": None}], {"x": None, "y": {"z": 1}}, -1.5])
    values = plain | st.none() if nulls else plain
    small = st.dictionaries(st.sampled_from(["a", "b", "ключ"]), values, max_size=3)
    big = st.sampled_from([{"big one": BIG}, {"big two": BIG}, {"big one": None}] if nulls else [{"big one": BIG}])
    return st.one_of(small, small, small, big)


reasons = st.none() | st.sampled_from(["The file is encrypted", "Out of memory"])
reason_details = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "error_type": st.sampled_from(["encrypted", "oom"]),
        "message": st.sampled_from(["", "page 3 cannot be read"]),
    },
)
statuses = st.sampled_from(
    [
        None,
        None,
        None,
        "PROCESSING",
        "PROCESSING",
        "PROCESSING",
        "queued",
        "queued",
        "COMPLETED",
        "FAILED",
        "FAILED",
        "CANCELLED",
    ]
)
"""None: no word about it. Ends are rare, or there would be little to say."""

results: st.SearchStrategy[Result] = st.tuples(
    st.sampled_from(["application/json", "application/pdf", "text/plain; charset=utf-8"]),
    st.sampled_from([b"", b"{}", b"\x00\xff" * 40]),
)
