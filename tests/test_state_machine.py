"""Any sequence of creates, reports, results, cancels, retries and deletes over HTTP, held step by step to the model.

Two web processes share one Postgres and one Redis, and every request goes to the next of them: what one has
acknowledged, the other must show at once. Each example has two fresh accounts that use the same ids.
"""

import asyncio
import http.client
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from service.identity import READ, WRITE
from service.stores.connections import Postgres
from service.stores.key_table import KeyTable
from tests import model
from tests.model import Job, Said
from tests.web_process import WebProcess

STEPS = 30
BEHIND_s = 5.0
"""How long readers may be behind a report whose answer said that they may be."""

ABSENCE_LAGS_s = 1.5
"""How long "there is no such job" may outlive another account's creation, and 403 its deletion (kept for 1 s)."""

UNLIMITED = dict.fromkeys(("poll", "bulk", "list", "stream", "write"), "none")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
STATUS_OF = {
    "not_found": 404,
    "deleted": 404,
    "forbidden": 403,
    "precondition_failed": 412,
    "invalid_transition": 409,
    "stale_attempt": 409,
    "unknown_attempt": 409,
    "result_final": 409,
    "metadata_too_large": 422,
    "not_finished": 409,
    "no_result": 409,
    "result_not_found": 404,
    "already_exists": 409,
    "repeated": 422,
}
ERROR_TYPE_OF = {"metadata_too_large": "validation_failed", "repeated": "validation_failed"}

OWN_IDS = ["job-1", "job-2", "A.job:3"]
MINTED = ["minted 1", "minted 2"]  # the first and second job of the example whose id the service made

Target = tuple[str, int, str, str]
"""whose job it is for the caller, its place among those that are there, and who asks for which id otherwise"""

accounts = st.sampled_from(["one", "two"])
known_ids = st.sampled_from([*OWN_IDS, *MINTED, "never-created"])
targets = st.tuples(
    st.sampled_from([*["its owner"] * 8, "the other", "anybody's"]), st.integers(0, 9), accounts, known_ids
)
"""Mostly a job that is there and its owner; sometimes another account, sometimes any id."""
conditions = st.sampled_from([None, None, None, None, "present", "old version", "other ms", "*", "weak", "list"])
attempts = st.sampled_from([None, None, None, "present", "present", "present", "older", "newer"])
words = st.sampled_from(
    [
        {"type": "extraction"},
        {"type": "chunking", "operation": "split"},
        {"type": "split"},
        {"operation": "extract"},
        {"operation": "my.own-type_1"},
    ]
)
parts_of_new_jobs = st.fixed_dictionaries(
    {},
    optional={
        "pdf_name": st.sampled_from([None, "Bericht ä.pdf"]),
        "pdf_hash": st.just("sha256:00ff"),
        "user_id": st.just("user 7"),
        "batch_id": st.sampled_from(["batch-1", "batch-2"]),
        "tags": st.sampled_from([[], ["red"], ["red", "blue", "red"]]),
        "file_count": model.counts,
        "metadata": model.metadata_parts(nulls=False),
        "parameters": st.sampled_from([None, {"pages": [1, 2]}]),
        "progress": model.progress_parts(nulls=True),
    },
)
new_jobs = st.builds(lambda word, parts: word | parts, words, parts_of_new_jobs)


@st.composite
def report_bodies(draw: st.DrawFn) -> dict[str, Any]:
    """What `PATCH` takes; {} is a heartbeat. A reason goes only with an end."""
    body: dict[str, Any] = {}
    status = draw(model.statuses)
    if status is not None:
        body["status"] = draw(st.sampled_from([status, status.lower(), status.upper()]))
    if draw(st.booleans()):
        body["progress"] = draw(model.progress_parts(nulls=True))
    if draw(st.integers(0, 3)) == 0:
        body["metadata"] = draw(model.metadata_parts(nulls=True))
    if status in ("FAILED", "CANCELLED"):
        body["error"] = draw(model.reasons)
        body["error_details"] = draw(model.reason_details)
    return body


work_bodies = st.fixed_dictionaries(
    {"progress": model.progress_parts(nulls=True)},
    optional={"status": st.just("PROCESSING"), "metadata": model.metadata_parts(nulls=True)},
)
"""What a worker says most of the time."""


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Service:
    """Both processes, in turn, and the database behind them for what HTTP does not tell."""

    def __init__(self, urls: list[str], database: str, runner: asyncio.Runner) -> None:
        self.connections = [http.client.HTTPConnection(urlsplit(url).netloc, timeout=20) for url in urls]
        self.next = itertools.cycle(self.connections)
        self.postgres = Postgres(database, pool_size=2, prepared_statements=True, timeout_s=5)
        self.run = runner.run
        self.run(self.postgres.open())
        self.examples = itertools.count(1)
        self.outcomes: Counter[str] = Counter()

    def close(self) -> None:
        self.run(self.postgres.close())
        for connection in self.connections:
            connection.close()

    def ask(self, key: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request to the next process; `body` is sent as JSON unless it is bytes."""
        sent = {"X-API-Key": key} | {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        connection = next(self.next)
        connection.request(method, path, body, sent)
        return Answer(connection.getresponse())

    def new_key(self, account: str) -> str:
        _, key = self.run(KeyTable(self.postgres).create(account, [READ, WRITE], UNLIMITED, None))
        return key

    def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        return self.run(self.postgres.fetch(statement, *values))


class Jobs(RuleBasedStateMachine):
    service: Service

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self.service.examples)
        self.names = {who: f"example-{self.number}-{who}" for who in ("one", "two")}
        self.keys = {who: self.service.new_key(name) for who, name in self.names.items()}
        self.world = model.World()
        self.minted: list[str] = []
        self.seen: dict[tuple[str, str], Answer] = {}  # the last answer to GET /jobs/{id}
        self.behind_until = 0.0
        self.turned_at: dict[str, float] = {}  # when somebody created or deleted a job with this id

    # What happens

    @initialize(bodies=st.lists(new_jobs, min_size=4, max_size=4))
    def begin(self, bodies: list[dict[str, Any]]) -> None:
        """Both accounts have a job of the same id, and each another of its own."""
        owned = [("one", OWN_IDS[0]), ("two", OWN_IDS[0]), ("one", OWN_IDS[1]), ("two", None)]
        for (who, which), body in zip(owned, bodies, strict=True):
            self.create(who, which, body, False)

    @rule(who=accounts, job_id=st.sampled_from([None, None, *OWN_IDS]), body=new_jobs, again=st.booleans())
    def create(self, who: str, job_id: str | None, body: dict[str, Any], again: bool) -> None:
        if job_id is None and len(self.minted) == len(MINTED):
            job_id = self.minted[again]
        if job_id in OWN_IDS:
            job_id = self.id_of(job_id)
        job = _job_of(job_id or "", body)
        answer = self.ask(who, "POST", "/jobs", body if job_id is None else {**body, "id": job_id})
        if job_id is None:
            job.id = answer.json["id"]
            self.minted.append(job.id)
        outcome = self.world.create(who, job)
        self.count("create", outcome)
        if outcome == "created":
            assert answer.status == 201
            assert answer.headers["Location"] == f"/jobs/{job.id}"
            self.turned_at[job.id] = time.monotonic()
            self.check_shape(answer.json, job.shape_a(), job.known_times())
        else:
            self.check_problem(answer, outcome, job.id)
        self.check(job.id)

    @rule(who=accounts, items=st.lists(st.tuples(st.sampled_from(OWN_IDS), new_jobs), min_size=1, max_size=3))
    def create_many(self, who: str, items: list[tuple[str, dict[str, Any]]]) -> None:
        items = [(self.id_of(which), body) for which, body in items]
        jobs = [_job_of(job_id, body) for job_id, body in items]
        answer = self.ask(who, "POST", "/jobs", [{**body, "id": job_id} for job_id, body in items])
        outcome = self.world.create(who, *jobs)
        self.count("create many", outcome)
        if outcome == "created":
            assert answer.status == 201
            for shape, job in zip(answer.json["jobs"], jobs, strict=True):
                self.turned_at[job.id] = time.monotonic()
                self.check_shape(shape, job.shape_a(), job.known_times())
        else:
            self.check_problem(answer, outcome, None)
        for job_id, _ in items:
            self.check(job_id)

    @rule(aimed_at=targets, body=work_bodies, attempt=attempts)
    def work(self, aimed_at: Target, body: dict[str, Any], attempt: str | None) -> None:
        self.report(aimed_at, body, attempt, None)

    @rule(aimed_at=targets, body=report_bodies(), attempt=attempts, condition=conditions)
    def report(self, aimed_at: Target, body: dict[str, Any], attempt: str | None, condition: str | None) -> None:
        who, job_id = self.aim(aimed_at)
        body = body | self.attempt(who, job_id, attempt)
        etag, matches = self.condition(who, job_id, condition)
        answer = self.ask(who, "PATCH", f"/jobs/{job_id}", body, **etag)
        self.check_end(answer, who, job_id, self.world.take(who, job_id, _said(body, matches)))

    @rule(who=accounts, items=st.lists(st.tuples(targets, report_bodies(), attempts), min_size=1, max_size=5))
    def report_many(self, who: str, items: list[tuple[Target, dict[str, Any], str | None]]) -> None:
        reports = []
        for aimed_at, body, attempt in items:
            _, job_id = self.aim(aimed_at)
            reports.append({"id": job_id, **body, **self.attempt(who, job_id, attempt)})
        answer = self.ask(who, "PATCH", "/jobs", reports)
        assert answer.status == 200, answer.body
        results = answer.json["results"]
        for report, result in zip(reports, results, strict=True):
            assert result["id"] == report["id"]
            outcome = self.world.take(who, report["id"], _said(report, None))
            self.count("report many", outcome)
            if outcome in model.TAKEN:
                assert result == {
                    "id": report["id"],
                    "status": 200,
                    "version": self.world.jobs[who, report["id"]].version,
                }
            else:
                assert result["status"] == STATUS_OF[outcome], result
                assert result["error"]["error_type"] == ERROR_TYPE_OF.get(outcome, outcome)
                assert result["error"]["message"]
        for job_id in {report["id"] for report in reports}:
            self.check(job_id)

    @rule(
        aimed_at=targets,
        result=model.results,
        complete=st.sampled_from([False, False, True]),
        attempt=attempts,
        condition=conditions,
    )
    def put_result(
        self, aimed_at: Target, result: model.Result, complete: bool, attempt: str | None, condition: str | None
    ) -> None:
        who, job_id = self.aim(aimed_at)
        asked = self.attempt(who, job_id, attempt)
        etag, matches = self.condition(who, job_id, condition)
        query = "&".join(f"{name}={value}" for name, value in ({"complete": str(complete).lower()} | asked).items())
        content_type, body = result
        answer = self.ask(who, "PUT", f"/jobs/{job_id}/result?{query}", body, Content_Type=content_type, **etag)
        said = Said("COMPLETED" if complete else None, result=result, attempt=asked.get("attempt"), matches=matches)
        self.check_end(answer, who, job_id, self.world.take(who, job_id, said))

    @rule(aimed_at=targets, reason=model.reasons, condition=conditions)
    def cancel(self, aimed_at: Target, reason: str | None, condition: str | None) -> None:
        who, job_id = self.aim(aimed_at)
        etag, matches = self.condition(who, job_id, condition)
        answer = self.ask(who, "POST", f"/jobs/{job_id}/cancel", {"reason": reason} if reason else None, **etag)
        self.check_end(
            answer, who, job_id, self.world.take(who, job_id, Said("CANCELLED", error=reason, matches=matches))
        )

    @rule(aimed_at=targets, condition=conditions)
    def retry(self, aimed_at: Target, condition: str | None) -> None:
        who, job_id = self.aim(aimed_at)
        etag, matches = self.condition(who, job_id, condition)
        answer = self.ask(who, "POST", f"/jobs/{job_id}/retry", **etag)
        self.check_end(answer, who, job_id, self.world.take(who, job_id, Said("queued", retry=True, matches=matches)))

    @rule(aimed_at=targets, condition=conditions, really=st.integers(0, 4))
    def delete(self, aimed_at: Target, condition: str | None, really: int) -> None:
        who, job_id = self.aim(aimed_at)
        etag, matches = self.condition(who, job_id, condition)
        if really and matches is not False and (who, job_id) in self.world.jobs:
            return  # most jobs should live long
        answer = self.ask(who, "DELETE", f"/jobs/{job_id}", **etag)
        outcome = self.world.delete(who, job_id, matches)
        self.count("delete", outcome)
        if outcome == "deleted_now":
            assert (answer.status, answer.json) == (200, {"message": f"Job {job_id} deleted"})
            self.turned_at[job_id] = time.monotonic()
        else:
            self.check_problem(answer, outcome, job_id)
        self.check(job_id)

    def teardown(self) -> None:
        """At the end of an example: all its jobs once more, and the counts of its batches in Postgres."""
        if sys.exc_info()[0] is not None:
            return  # a step has failed already
        for job_id in {job_id for _, job_id in self.world.jobs} | {job_id for _, job_id in self.world.gone}:
            self.check(job_id)
        for who, name in self.names.items():
            rows = self.service.fetch(
                "select b.id, total, queued, processing, completed, failed, cancelled"
                " from batches b join accounts a on a.id = b.account_id where a.name = $1 and total > 0",
                name,
            )
            counts = {row["id"]: {part: row[part] for part in row.keys() if part != "id"} for row in rows}  # noqa: SIM118
            assert counts == self.world.batch_counts(who)

    # What is said about it

    def count(self, what: str, outcome: str) -> None:
        self.service.outcomes[f"{what}: {outcome}"] += 1

    def ask(self, who: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        answer = self.service.ask(self.keys[who], method, path, body, **headers)
        if "199" in answer.headers.get("Warning", ""):
            self.behind_until = time.monotonic() + BEHIND_s
        return answer

    def aim(self, target: Target) -> tuple[str, str]:
        """Whom and which job a drawn target means now."""
        whose, number, who, which = target
        there = sorted(self.world.jobs, key=lambda key: (key[1], key[0]))
        if whose == "anybody's" or not there:
            return who, self.id_of(which)
        owner, job_id = there[number % len(there)]
        return {"one": "two", "two": "one"}[owner] if whose == "the other" else owner, job_id

    def id_of(self, which: str) -> str:
        """The id in this example: another example's account must not have it, or the answer would be 403."""
        if which in MINTED[: len(self.minted)]:
            return self.minted[MINTED.index(which)]
        return f"{which.replace(' ', '-')}.{self.number}"

    def attempt(self, who: str, job_id: str, which: str | None) -> dict[str, int]:
        job = self.world.jobs.get((who, job_id), Job())
        match which:
            case "present":
                return {"attempt": job.attempt}
            case "older" if job.attempt > 1:
                return {"attempt": job.attempt - 1}
            case "newer":
                return {"attempt": job.attempt + 1}
        return {}

    def condition(self, who: str, job_id: str, which: str | None) -> tuple[dict[str, str], bool | None]:
        """The header If-Match, if any, and whether it is that of the present version."""
        seen = self.seen.get((who, job_id))
        version, ms = _parts(seen.headers["ETag"]) if seen is not None else (1, 1)
        match which:
            case "present":
                return {"If_Match": f'"{version}-{ms}"'}, True
            case "old version":
                return {"If_Match": f'"{version - 1}-{ms}"'}, False
            case "other ms":
                return {"If_Match": f'"{version}-{ms + 1}"'}, False
            case "weak":
                return {"If_Match": f'W/"{version}-{ms}"'}, False
            case "list":
                return {"If_Match": f'"0-0", "{version}-{ms}"'}, True
            case "*":
                return {"If_Match": "*"}, True
        return {}, None

    # What must be so

    def check_end(self, answer: Answer, who: str, job_id: str, outcome: str) -> None:
        self.count("report", outcome)
        if outcome in model.TAKEN:
            job = self.world.jobs[who, job_id]
            assert answer.status == 200, answer.body
            self.check_shape(answer.json, job.shape_a(), job.known_times())
            assert _parts(answer.headers["ETag"])[0] == job.version
            if outcome == "same":
                assert answer.headers["ETag"] == self.seen[who, job_id].headers["ETag"]
        else:
            self.check_problem(answer, outcome, job_id)
            if outcome == "invalid_transition":
                details = answer.json["details"]
                job = self.world.jobs[who, job_id]
                assert details["current_status"] == job.status
                assert set(details["allowed"]) == model.REPORT_MAY_LEAD_TO[job.status]
        self.check(job_id)

    def check_problem(self, answer: Answer, outcome: str, job_id: str | None) -> None:
        assert answer.status == STATUS_OF[outcome], (outcome, answer.status, answer.body)
        assert answer.headers.get_content_type() == "application/problem+json"
        problem = answer.json
        assert problem["details"]["error_type"] == ERROR_TYPE_OF.get(outcome, outcome), problem
        assert problem["status"] == answer.status
        if outcome in ("not_found", "deleted"):
            assert problem["detail"] == f"Job {job_id} not found"
            assert problem["error"] == "Job not found"
            assert problem["details"]["message"] == f"Job with ID '{job_id}' does not exist"
            assert problem["details"]["job_id"] == job_id

    def check(self, job_id: str) -> None:
        """Everything that both accounts can read of this id; at once, unless an answer said that readers are behind."""
        for who in self.keys:
            while True:
                try:
                    self.check_readings(who, job_id)
                    break
                except AssertionError:
                    if time.monotonic() > self.behind_until:
                        raise

    def check_readings(self, who: str, job_id: str) -> None:
        absent = self.world.absence(who, job_id)
        if absent is not None:
            for part in ("", "/status", "/result", "/history"):
                self.check_absence(self.ask(who, "GET", f"/jobs/{job_id}{part}"), absent, job_id)
            self.seen.pop((who, job_id), None)
            return
        job = self.world.jobs[who, job_id]
        polled = self.ask(who, "GET", f"/jobs/{job_id}")
        self.check_polled(who, job, polled)
        self.check_status(who, job, polled)
        self.check_result(who, job)
        self.check_history(who, job, polled)

    def check_absence(self, answer: Answer, absent: str, job_id: str) -> None:
        lags = time.monotonic() < self.turned_at.get(job_id, 0.0) + ABSENCE_LAGS_s
        if lags and absent in ("not_found", "forbidden"):
            absent = answer.json["details"]["error_type"]
            assert absent in ("not_found", "forbidden")
        self.check_problem(answer, absent, job_id)

    def check_polled(self, who: str, job: Job, polled: Answer) -> None:
        assert polled.status == 200, polled.body
        shape = polled.json
        self.check_shape(shape, job.shape_a(), job.known_times())
        version, ms = _parts(polled.headers["ETag"])
        assert version == job.version
        assert ms == _ms(shape["updated_at"])
        assert polled.headers["Cache-Control"] == "private, no-cache"
        assert ("Retry-After" in polled.headers) == (not job.finished)
        assert job.finished or 2 <= int(polled.headers["Retry-After"]) <= 10
        before = self.seen.get((who, job.id))
        if before is not None:
            version_before, ms_before = _parts(before.headers["ETag"])
            assert ms >= ms_before
            if version == version_before:
                assert (polled.body, polled.headers["ETag"]) == (before.body, before.headers["ETag"])
            else:
                changed = self.ask(who, "GET", f"/jobs/{job.id}", If_None_Match=before.headers["ETag"])
                assert changed.status == 200
        unchanged = self.ask(who, "GET", f"/jobs/{job.id}", If_None_Match=polled.headers["ETag"])
        assert (unchanged.status, unchanged.body) == (304, b"")
        self.seen[who, job.id] = polled

    def check_status(self, who: str, job: Job, polled: Answer) -> None:
        status = self.ask(who, "GET", f"/jobs/{job.id}/status")
        assert status.status == 200
        self.check_shape(status.json, job.shape_b(), job.known_times())
        assert status.headers["ETag"] == polled.headers["ETag"]
        assert {name: polled.json[name] for name in job.known_times()} == {
            name: status.json[name] for name in job.known_times()
        }

    def check_result(self, who: str, job: Job) -> None:
        answer = self.ask(who, "GET", f"/jobs/{job.id}/result")
        if not job.finished:
            self.check_problem(answer, "not_finished", job.id)
            assert answer.json["detail"] == f"Job {job.id} is still processing"
            assert "Retry-After" in answer.headers
        elif job.status != "COMPLETED":
            self.check_problem(answer, "no_result", job.id)
            assert answer.json["detail"] == f"Job {job.id} failed: {job.error}"
        elif job.result is None:
            self.check_problem(answer, "result_not_found", job.id)
            assert answer.json["detail"] == f"Result for job {job.id} not found"
        else:
            assert (answer.status, answer.headers["Content-Type"], answer.body) == (200, *job.result)
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
            shown = answer.headers.get_content_type() in ("application/json", "text/plain")
            assert answer.headers["Content-Disposition"] == (None if shown else "attachment")

    def check_history(self, who: str, job: Job, polled: Answer) -> None:
        answer = self.ask(who, "GET", f"/jobs/{job.id}/history")
        assert answer.status == 200
        history = answer.json["history"]
        assert [{name: part for name, part in entry.items() if name != "at"} for entry in history] == job.history
        times = [_ms(entry["at"]) for entry in history]
        assert times == sorted(times)
        assert times[0] == _ms(polled.json["created_at"])
        assert times[-1] <= _ms(polled.json["updated_at"])
        if history[-1]["version"] == job.version:
            assert history[-1]["at"] == polled.json["updated_at"]
        middle = history[len(history) // 2]["version"]
        later = self.ask(who, "GET", f"/jobs/{job.id}/history?after_version={middle}&limit=1").json["history"]
        assert later == [entry for entry in history if entry["version"] > middle][:1]

    def check_shape(self, shape: dict[str, Any], expected: dict[str, Any], known_times: set[str]) -> None:
        """`shape` is what is expected, with the times that are known, in order; what the service adds is sane."""
        shape = dict(shape)
        times = {name: shape.pop(name) for name in list(shape) if name.endswith("_at")}
        assert set(times) == known_times
        assert all(TIME.fullmatch(at) for at in times.values())
        if eta := shape["progress"].get("eta"):
            assert TIME.fullmatch(eta)
            shape["progress"] = {name: part for name, part in shape["progress"].items() if name != "eta"}
        assert shape == expected
        moments = [times[name] for name in ("created_at", "started_at", "completed_at", "updated_at") if name in times]
        assert moments == sorted(moments)
        if "expires_at" in times:
            assert _ms(times["expires_at"]) - _ms(times["completed_at"]) == timedelta(days=7) // timedelta(
                milliseconds=1
            )


def _job_of(job_id: str, body: dict[str, Any]) -> Job:
    """The job that a creation describes."""
    fields = {name: body[name] for name in body if name not in ("operation", "progress", "tags", "type")}
    word = body.get("type", body.get("operation"))
    types = {"extract": "extraction", "parse": "parsing", "split": "splitting", "classify": "classification"}
    return Job(
        id=job_id,
        type=types.get(word, word),
        progress={name: part for name, part in body.get("progress", {}).items() if part is not None},
        tags=list(dict.fromkeys(body.get("tags", []))),
        **fields,
    )


def _said(body: dict[str, Any], matches: bool | None) -> Said:
    """A report as the model takes it."""
    told = {name: body[name] for name in body if name not in ("id", "status")}
    status = next((known for known in model.STATUSES if known.lower() == body.get("status", "").lower()), None)
    return Said(status, matches=matches, **told)


def _parts(etag: str) -> tuple[int, int]:
    version, ms = re.fullmatch(r'"(\d+)-(\d+)"', etag).groups()
    return int(version), int(ms)


def _ms(at: str) -> int:
    assert TIME.fullmatch(at)
    moment = datetime.fromisoformat(at.replace("Z", "+00:00"))
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


StartWeb = Callable[..., Awaitable[WebProcess]]


@pytest.fixture
async def urls(start_web: StartWeb) -> list[str]:
    return [(await start_web()).url, (await start_web()).url]


def run_examples(urls: list[str], database: str, examples: int) -> None:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        service = Service(urls, database, runner)
        machine = type("JobsOverHttp", (Jobs,), {"service": service})
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=STEPS,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    phases=(Phase.reuse, Phase.generate, Phase.shrink),
                    print_blob=True,
                ),
            )
        finally:
            service.close()
            print(*sorted(f"{times:6} {outcome}" for outcome, times in service.outcomes.items()), sep="\n")


@pytest.mark.timeout(420)  # a failure is made small before it is told, for at most five minutes
def test_any_sequence_of_requests_agrees_with_the_model(urls: list[str], database: str) -> None:
    run_examples(urls, database, 60)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ten_times_as_many_sequences_agree_with_the_model(urls: list[str], database: str) -> None:
    run_examples(urls, database, 600)
