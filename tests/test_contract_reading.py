"""The contract's sections Job and Reading, line by line, as a client sees them."""

import asyncio
import io
import json
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.conftest import make_key
from tests.http import ETAG, TIME, ask, connected, create, head, report

FIELDS_OF_A = (
    "id status type created_at updated_at pdf_name pdf_hash user_id error error_details progress "
    "batch_id tags file_count metadata parameters attempt version stalled"
)
SHAPE_A = FIELDS_OF_A.split()
SHAPE_B = ["job_id", "operation", "status", "progress", "error_details", "created_at", "updated_at"]
READS = ("/jobs/{}", "/jobs/{}/status", "/jobs/{}/result", "/jobs/{}/results", "/jobs/{}/history")

EVERYTHING: dict[str, Any] = {
    "id": "Order-7.a_b:c",
    "type": "extraction",
    "pdf_name": "Rechnung März.pdf",
    "pdf_hash": "sha256:abc",
    "user_id": "user-1",
    "batch_id": "batch-1",
    "tags": ["red", "grün"],
    "file_count": 3,
    "metadata": {"a": [1, 2.5, None, {"b": "ö"}]},
    "parameters": {"pages": "1-3"},
    "progress": {"message": "waiting", "step": "intake", "total_files": 3, "files_completed": 0, "queue_position": 4},
}


def moment(text: str) -> datetime:
    assert TIME.fullmatch(text), text
    return datetime.fromisoformat(text)


async def polled(client, job_id: str) -> dict[str, Any]:
    return (await ask(client, "GET", f"/jobs/{job_id}")).json()


async def in_state(client, status: str, **fields: Any) -> str:
    """The id of a job in this state."""
    job = await create(client, **fields)
    if status != "queued":
        await report(client, job["id"], status=status)
    return job["id"]


async def expire(sql, job_id: str) -> datetime:
    """As retention will: the job's time is over, and its row goes. Returns when it expired."""
    expired_at = await sql.fetchval(
        "update jobs set expires_at = date_trunc('milliseconds', now() - interval '1 minute') where id = $1 returning expires_at",
        job_id,
    )
    await sql.execute("delete from jobs where id = $1", job_id)
    return expired_at


# Shapes


async def test_an_id_may_be_written_with_percent_signs(client):
    await create(client, id="a:b_c")
    async with connected(client) as socket:
        await socket.say(head(client, "GET /jobs/%61%3Ab%5Fc"))
        assert (await socket.answer()).json()["id"] == "a:b_c"


async def test_shape_a_has_these_fields_and_no_others(client):
    created = await create(client, **EVERYTHING)
    job = await polled(client, EVERYTHING["id"])
    assert job == created
    assert list(job) == [*SHAPE_A, "events_url"]
    assert {name: job[name] for name in EVERYTHING} == EVERYTHING
    assert (job["status"], job["error"], job["error_details"]) == ("queued", None, None)
    assert (job["attempt"], job["version"], job["stalled"]) == (1, 1, False)
    assert job["created_at"] == job["updated_at"]


async def test_what_a_producer_leaves_out_is_null_or_empty(client):
    job = await create(client)
    for name in ("pdf_name", "pdf_hash", "user_id", "error", "error_details", "batch_id", "file_count", "parameters"):
        assert job[name] is None
    assert (job["progress"], job["metadata"], job["tags"]) == ({}, {}, [])
    assert not {"started_at", "completed_at", "expires_at", "result_url"} & set(job)


async def test_shape_b_has_these_fields_and_no_others(client):
    job = await create(client, **EVERYTHING)
    answer = await ask(client, "GET", f"/jobs/{job['id']}/status")
    assert answer.json() == {
        "job_id": job["id"],
        "operation": "extract",
        "status": "queued",
        "progress": job["progress"],
        "error_details": None,
        "created_at": job["created_at"],
        "updated_at": job["updated_at"],
    }


async def test_status_has_this_casing_in_shape_a_and_is_lower_in_shape_b(client):
    for status in ("queued", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED"):
        job_id = await in_state(client, status)
        assert (await polled(client, job_id))["status"] == status
        assert (await ask(client, "GET", f"/jobs/{job_id}/status")).json()["status"] == status.lower()


TYPES = [
    ({"type": "extraction"}, "extraction", "extract"),
    ({"type": "parsing"}, "parsing", "parse"),
    ({"type": "splitting"}, "splitting", "split"),
    ({"type": "chunking"}, "chunking", "split"),
    ({"type": "classification"}, "classification", "classify"),
    ({"type": "extract"}, "extraction", "extract"),
    ({"type": "parse"}, "parsing", "parse"),
    ({"type": "split"}, "splitting", "split"),
    ({"type": "classify"}, "classification", "classify"),
    ({"operation": "extract"}, "extraction", "extract"),
    ({"operation": "chunking"}, "chunking", "split"),
    ({"type": "chunking", "operation": "split"}, "chunking", "split"),
    ({"type": "my.own_type-2"}, "my.own_type-2", "my.own_type-2"),
    ({"operation": "x" * 64}, "x" * 64, "x" * 64),
]


async def test_type_and_operation_are_understood_and_told_both_ways(client, subtests):
    for asked, job_type, operation in TYPES:
        with subtests.test(str(asked)):
            job = (await ask(client, "POST", "/jobs", json=asked)).json()
            assert job["type"] == job_type
            assert (await ask(client, "GET", f"/jobs/{job['id']}/status")).json()["operation"] == operation


async def test_times_appear_once_known_and_have_milliseconds_and_z(client):
    job_id = (await create(client))["id"]
    started = await report(client, job_id, status="PROCESSING")
    assert list(started) == [*SHAPE_A[:5], "started_at", *SHAPE_A[5:], "events_url"]
    assert started["started_at"] == started["updated_at"]
    done = await report(client, job_id, status="COMPLETED")
    assert list(done) == [*SHAPE_A[:5], "started_at", "completed_at", "expires_at", *SHAPE_A[5:]]
    assert done["started_at"] == started["started_at"]
    assert done["completed_at"] == done["updated_at"]
    assert moment(done["created_at"]) <= moment(done["started_at"]) <= moment(done["completed_at"])
    assert moment(done["expires_at"]) == moment(done["completed_at"]) + timedelta(days=7)
    assert abs(datetime.now(UTC) - moment(done["completed_at"])) < timedelta(seconds=20)

    b = (await ask(client, "GET", f"/jobs/{job_id}/status")).json()
    assert list(b) == [*SHAPE_B, "started_at", "completed_at", "expires_at"]
    assert {name: b[name] for name in b if name.endswith("_at")} == {
        name: done[name] for name in done if name.endswith("_at")
    }


async def test_parts_of_progress_that_nobody_told_are_left_out(client):
    job_id = (await create(client))["id"]
    await report(client, job_id, progress={"percentage": 12.5, "step": "ocr", "message": None})
    assert (await polled(client, job_id))["progress"] == {"percentage": 12.5, "step": "ocr"}


async def test_whole_percentages_stay_whole(client):
    for given, told in [(0, "0"), (45, "45"), (45.0, "45"), (99.5, "99.5"), (100, "100")]:
        job_id = (await create(client, progress={"percentage": given}))["id"]
        assert f'"percentage":{told}}}' in (await ask(client, "GET", f"/jobs/{job_id}")).body.decode()


async def test_result_url_appears_when_there_is_something_to_fetch(client):
    job_id = (await create(client))["id"]
    await ask(client, "PUT", f"/jobs/{job_id}/result", json={"n": 1})
    assert "result_url" not in await polled(client, job_id)
    assert (await report(client, job_id, status="COMPLETED"))["result_url"] == f"/jobs/{job_id}/result"
    assert "result_url" not in await polled(client, await in_state(client, "COMPLETED"))


async def test_events_url_is_there_as_long_as_there_is_something_to_follow(client):
    for status in ("queued", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED"):
        job = await polled(client, await in_state(client, status))
        assert job.get("events_url") == (f"/jobs/{job['id']}/events" if status in ("queued", "PROCESSING") else None)
    job_id = await in_state(client, "FAILED")
    retried = await ask(client, "POST", f"/jobs/{job_id}/retry")
    assert retried.json()["events_url"] == f"/jobs/{job_id}/events"


async def test_events_url_leads_to_the_events(client):
    created = await create(client)
    assert created["events_url"] == f"/jobs/{created['id']}/events"
    async with client.get(created["events_url"]) as stream:
        assert (stream.status, stream.content_type) == (200, "text/event-stream")


# ETag, 304, pace


async def test_etag_is_the_version_and_the_millisecond_of_the_change(client):
    job_id = (await create(client))["id"]
    for version, said in enumerate(
        [{"progress": {"percentage": 1}}, {"status": "PROCESSING"}, {"metadata": {"a": 1}}], 2
    ):
        reported = await ask(client, "PATCH", f"/jobs/{job_id}", json=said)
        job = reported.json()
        assert job["version"] == version
        etags = {(await ask(client, "GET", path.format(job_id))).headers["ETag"] for path in READS[:2]}
        assert etags == {reported.headers["ETag"]}
        changed_ms = round(moment(job["updated_at"]).timestamp() * 1000)
        assert ETAG.fullmatch(etags.pop()).groups() == (str(version), str(changed_ms))


async def test_status_may_be_kept_only_by_who_asked_and_never_unvalidated(client):
    job_id = await in_state(client, "queued")
    for path in READS[:2]:
        answer = await ask(client, "GET", path.format(job_id))
        assert answer.headers["Cache-Control"] == "private, no-cache"
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"


CONDITIONS = [
    ("{etag}", 304),
    ("W/{etag}", 304),
    ("*", 304),
    ('"9-9", {etag}', 304),
    ('"9-9",W/{etag} , "8-8"', 304),
    ('"9-9"', 200),
    ('W/"1-1"', 200),
    ("{bare}", 200),
    ("", 200),
    ('"{bare}', 200),
    (", ,", 200),
    ("ö", 200),
]


async def test_if_none_match(client, subtests):
    for path in READS[:4]:
        job_id = await in_state(client, "queued")
        await ask(client, "PUT", f"/jobs/{job_id}/result?complete=true", data=b"bytes")
        first = await ask(client, "GET", path.format(job_id))
        etag = first.headers["ETag"]
        for condition, status in CONDITIONS:
            with subtests.test(f"{path} {condition}"):
                asked = condition.format(etag=etag, bare=etag.strip('"'))
                answer = await ask(client, "GET", path.format(job_id), headers={"If-None-Match": asked})
                assert answer.status == status
                assert answer.headers["ETag"] == etag
                assert answer.headers["Cache-Control"] == "private, no-cache"
                assert answer.headers["X-Request-Id"]
                assert answer.body == (b"" if status == 304 else first.body)


async def test_if_none_match_may_stand_on_several_lines(client):
    job_id = await in_state(client, "queued")
    etag = (await ask(client, "GET", f"/jobs/{job_id}")).headers["ETag"]
    lines = [("If-None-Match", '"9-9"'), ("If-None-Match", etag)]
    assert (await ask(client, "GET", f"/jobs/{job_id}", headers=lines)).status == 304


async def test_a_change_ends_the_304s(client):
    job_id = await in_state(client, "queued")
    held = {"If-None-Match": (await ask(client, "GET", f"/jobs/{job_id}")).headers["ETag"]}
    assert (await ask(client, "GET", f"/jobs/{job_id}", headers=held)).status == 304
    await report(client, job_id)  # a heartbeat is no change
    assert (await ask(client, "GET", f"/jobs/{job_id}", headers=held)).status == 304
    await report(client, job_id, progress={"percentage": 1})
    answer = await ask(client, "GET", f"/jobs/{job_id}", headers=held)
    assert (answer.status, answer.json()["version"]) == (200, 2)


async def test_the_etag_of_a_result_changes_with_its_bytes(client):
    job_id = await in_state(client, "PROCESSING")
    etags = set()
    for body in (b"one", b"two"):
        await ask(client, "PUT", f"/jobs/{job_id}/result", data=body)
    await report(client, job_id, status="COMPLETED")
    etags.add((await ask(client, "GET", f"/jobs/{job_id}/result")).headers["ETag"])
    other = await in_state(client, "PROCESSING")
    await ask(client, "PUT", f"/jobs/{other}/result?complete=true", data=b"one")
    etags.add((await ask(client, "GET", f"/jobs/{other}/result")).headers["ETag"])
    assert len(etags) == 2


async def test_only_an_unfinished_job_says_when_to_ask_again(client):
    for status in ("queued", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED"):
        job_id = await in_state(client, status)
        for path in READS[:2]:
            answer = await ask(client, "GET", path.format(job_id))
            again = await ask(client, "GET", path.format(job_id), headers={"If-None-Match": "*"})
            paces = [each.headers.get("Retry-After") for each in (answer, again)]
            assert paces == (["2", "2"] if status in ("queued", "PROCESSING") else [None, None])


async def test_the_pace_is_2_to_10_seconds_whatever_the_age(client, sql):
    for age, pace in [("0 s", "2"), ("2 min", "4"), ("1 hour", "10"), ("29 days", "10")]:
        job_id = (await create(client))["id"]
        await sql.execute("update jobs set created_at = created_at - $2::text::interval where id = $1", job_id, age)
        await report(client, job_id, status="PROCESSING")
        for path in READS[:4]:  # an unfinished job's result too: 409, and when to come back
            assert (await ask(client, "GET", path.format(job_id))).headers["Retry-After"] == pace


async def test_head_is_get_without_the_body(client):
    job_id = await in_state(client, "queued")
    got, headed = [await ask(client, method, f"/jobs/{job_id}") for method in ("GET", "HEAD")]
    assert (headed.status, headed.body) == (200, b"")
    assert headed.headers["ETag"] == got.headers["ETag"]


# Result


CONTENT_TYPES = [
    ("application/json", True),
    ("application/json; charset=utf-8", True),
    ("text/plain", True),
    ("Text/Plain;charset=latin-1", True),
    ("text/html", False),
    ("image/svg+xml", False),
    ("application/pdf", False),
    ("application/problem+json", False),
    ("text/plain, text/html", False),
    ("anything at all", False),
]


async def test_a_result_comes_as_it_was_put_and_cannot_act(client, subtests):
    body = bytes(range(256)) * 5
    for content_type, inline in CONTENT_TYPES:
        with subtests.test(content_type):
            job_id = await in_state(client, "PROCESSING")
            headers = {"Content-Type": content_type}
            await ask(client, "PUT", f"/jobs/{job_id}/result?complete=true", data=body, headers=headers)
            for path in READS[2:4]:
                answer = await ask(client, "GET", path.format(job_id))
                assert (answer.status, answer.body) == (200, body)
                assert answer.headers["Content-Type"] == content_type
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"
                assert answer.headers.get("Content-Disposition") == (None if inline else "attachment")


async def test_the_result_of_an_unfinished_job(client):
    for status in ("queued", "PROCESSING"):
        job_id = await in_state(client, status)
        await ask(client, "PUT", f"/jobs/{job_id}/result", data=b"early")
        for path in READS[2:4]:
            answer = await ask(client, "GET", path.format(job_id))
            assert answer.problem(409, "not_finished")["detail"] == f"Job {job_id} is still processing"
            assert 2 <= int(answer.headers["Retry-After"]) <= 10


async def test_the_result_of_a_job_that_came_to_nothing(client):
    for status in ("FAILED", "CANCELLED"):
        job_id = await in_state(client, "PROCESSING")
        await ask(client, "PUT", f"/jobs/{job_id}/result", data=b"half")
        await report(client, job_id, status=status, error="Page 3 is unreadable")
        for path in READS[2:4]:
            answer = await ask(client, "GET", path.format(job_id))
            assert answer.problem(409, "no_result")["detail"] == f"Job {job_id} failed: Page 3 is unreadable"
            assert "Retry-After" not in answer.headers


async def test_a_completed_job_without_a_result(client):
    job_id = await in_state(client, "COMPLETED")
    for path in READS[2:4]:
        answer = await ask(client, "GET", path.format(job_id))
        assert answer.problem(404, "result_not_found")["detail"] == f"Result for job {job_id} not found"


async def test_a_result_may_have_any_size_up_to_16_mib(client):
    for size in (0, 1, 16 * 2**20):
        job_id = await in_state(client, "PROCESSING")
        body = b"x" * size
        assert (await ask(client, "PUT", f"/jobs/{job_id}/result?complete=1", data=io.BytesIO(body))).status == 200
        assert (await ask(client, "GET", f"/jobs/{job_id}/result")).body == body


# History


async def test_history_tells_what_changed_oldest_first(client):
    job_id = (await create(client, progress={"step": "intake"}))["id"]
    said: list[dict[str, Any]] = [
        {"status": "PROCESSING"},
        {"progress": {"percentage": 50}},  # mere progress is not kept
        {"metadata": {"a": 1}},
        {"progress": {"step": "ocr"}},
        {"status": "queued"},
        {"status": "FAILED", "error": "No ink"},
    ]
    times = [(await report(client, job_id, **each))["updated_at"] for each in said]
    retried = (await ask(client, "POST", f"/jobs/{job_id}/retry")).json()
    history = (await ask(client, "GET", f"/jobs/{job_id}/history")).json()["history"]
    created_at = retried["created_at"]
    names = ["at", "version", "status", "previous_status", "attempt", "step", "error"]
    assert history == [
        dict(zip(names, row, strict=True))
        for row in [
            (created_at, 1, "queued", None, 1, "intake", None),
            (times[0], 2, "PROCESSING", "queued", 1, "intake", None),
            (times[3], 5, "PROCESSING", "PROCESSING", 1, "ocr", None),
            (times[4], 6, "queued", "PROCESSING", 2, None, None),
            (times[5], 7, "FAILED", "queued", 2, None, "No ink"),
            (retried["updated_at"], 8, "queued", "FAILED", 3, None, None),
        ]
    ]
    assert [list(row) for row in history] == [names] * len(history)
    assert all(TIME.fullmatch(row["at"]) for row in history)


async def test_history_comes_in_pages(client):
    job_id = (await create(client))["id"]
    for n in range(4):
        await report(client, job_id, progress={"step": f"step {n}"})

    async def page(query: str) -> tuple[list[int], bool]:
        body = (await ask(client, "GET", f"/jobs/{job_id}/history{query}")).json()
        return [row["version"] for row in body["history"]], body["has_more"]

    assert await page("") == ([1, 2, 3, 4, 5], False)
    assert await page("?limit=2") == ([1, 2], True)
    assert await page("?limit=2&after_version=2") == ([3, 4], True)
    assert await page("?limit=2&after_version=4") == ([5], False)
    assert await page("?after_version=5") == ([], False)


async def test_history_refuses_what_is_out_of_range(client):
    job_id = (await create(client))["id"]
    for query in ("limit=0", "limit=1001", "limit=", "limit=1_0", "limit=%2B5", "limit=٣", "after_version=-1"):
        answer = await ask(client, "GET", f"/jobs/{job_id}/history?{query}")
        assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == [query.partition("=")[0]]


# What is not there


async def test_an_unknown_job(client, subtests):
    for path in READS:
        with subtests.test(path):
            answer = await ask(client, "GET", path.format("nobody-1"))
            assert answer.problem(404, "not_found") == {
                "type": "urn:jobwire:error:not_found",
                "title": "Job not found",
                "status": 404,
                "detail": "Job nobody-1 not found",
                "instance": path.format("nobody-1"),
                "error": "Job not found",
                "details": {
                    "error_type": "not_found",
                    "message": "Job with ID 'nobody-1' does not exist",
                    "job_id": "nobody-1",
                },
                "suggestions": [
                    "Check the job ID for typos",
                    "Verify that the job belongs to your account",
                    "The job may have been deleted after the retention period",
                ],
                "request_id": answer.headers["X-Request-Id"],
            }


async def test_a_deleted_job(client, subtests):
    for path in READS:
        with subtests.test(path):
            job_id = await in_state(client, "COMPLETED")
            await polled(client, job_id)
            await ask(client, "DELETE", f"/jobs/{job_id}")
            said = (await ask(client, "GET", path.format(job_id))).problem(404, "deleted")
            assert (said["detail"], said["error"]) == (f"Job {job_id} not found", "Job not found")
            assert said["details"] == {
                "error_type": "deleted",
                "message": f"Job with ID '{job_id}' does not exist",
                "job_id": job_id,
            }


async def test_an_expired_job(client, sql, subtests):
    for path in READS:
        with subtests.test(path):
            job_id = await in_state(client, "COMPLETED")
            expired_at = await expire(sql, job_id)
            said = (await ask(client, "GET", path.format(job_id))).problem(404, "expired")
            assert said["detail"] == f"Job {job_id} not found"
            assert moment(said["details"]["expired_at"]) == expired_at


async def test_a_job_of_another_account(client, database, subtests):
    other = {"X-API-Key": await make_key(database, "other")}
    job_id = await in_state(client, "COMPLETED")
    for path in READS:
        with subtests.test(path):
            (await ask(client, "GET", path.format(job_id), headers=other)).problem(403, "forbidden")


async def test_own_id_wins_over_another_account_s(client, database):
    other = {"X-API-Key": await make_key(database, "other")}
    await create(client, id="shared", pdf_name="mine")
    (await ask(client, "GET", "/jobs/shared", headers=other)).problem(403, "forbidden")
    made = await ask(
        client, "POST", "/jobs", json={"id": "shared", "type": "parse", "pdf_name": "theirs"}, headers=other
    )
    assert made.status == 201
    assert (await ask(client, "GET", "/jobs/shared", headers=other)).json()["pdf_name"] == "theirs"
    assert (await polled(client, "shared"))["pdf_name"] == "mine"
    await ask(client, "DELETE", "/jobs/shared")
    (await ask(client, "GET", "/jobs/shared")).problem(404, "deleted")  # one's own grave wins too
    assert (await ask(client, "GET", "/jobs/shared", headers=other)).json()["pdf_name"] == "theirs"


async def test_reserved_words_are_no_job_ids(client):
    for word in ("status", "batch", "events", "stream", "limits"):
        answer = await ask(client, "POST", "/jobs", json={"type": "x", "id": word})
        assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["id"]


async def test_a_job_that_was_asked_for_too_early_is_there_once_it_is_created(client):
    for n in range(5):
        (await ask(client, "GET", f"/jobs/early-{n}")).problem(404, "not_found")
        await create(client, id=f"early-{n}")
        assert (await ask(client, "GET", f"/jobs/early-{n}")).status == 200


async def test_every_poll_after_a_report_shows_it(client):
    job_id = (await create(client))["id"]
    for percentage in range(1, 60):
        await report(client, job_id, progress={"percentage": percentage})
        answers = await asyncio.gather(*(ask(client, "GET", path.format(job_id)) for path in READS[:2] * 2))
        assert {answer.json()["progress"]["percentage"] for answer in answers} == {percentage}


# The loop that clients in the field run, unchanged


def documented_client_loop(url: str, key: str, job_id: str) -> dict[str, Any]:
    """Polls until the job is over, with nothing but the standard library."""
    headers = {"X-API-Key": key}
    while True:
        request = urllib.request.Request(f"{url}/jobs/{job_id}", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            job = json.loads(response.read())
        if job["status"] == "COMPLETED":
            return {name: job[name] for name in ("id", "type", "created_at", "pdf_name", "pdf_hash", "error")}
        if job["status"] == "FAILED":
            raise RuntimeError(f"{job['id']}: {job['error']}")
        time.sleep(0.02)


async def test_the_documented_client_loop_ends_with_the_job(start_web, key):
    web = await start_web()

    def send(method: str, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        headers = {"X-API-Key": key, "Content-Type": "application/json"}
        request = urllib.request.Request(web.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())

    def good_then_bad() -> None:
        job = send("POST", "/jobs", {"type": "extraction", "pdf_name": "a.pdf", "pdf_hash": "sha256:1"})
        send("PATCH", f"/jobs/{job['id']}", {"status": "PROCESSING", "progress": {"percentage": 10}})
        send("PATCH", f"/jobs/{job['id']}", {"status": "COMPLETED"})
        assert documented_client_loop(web.url, key, job["id"]) == {
            "id": job["id"],
            "type": "extraction",
            "created_at": job["created_at"],
            "pdf_name": "a.pdf",
            "pdf_hash": "sha256:1",
            "error": None,
        }
        bad = send("POST", "/jobs", {"type": "extraction"})
        send("PATCH", f"/jobs/{bad['id']}", {"status": "FAILED", "error": "No ink"})
        with pytest.raises(RuntimeError, match=f"{bad['id']}: No ink"):
            documented_client_loop(web.url, key, bad["id"])
        with pytest.raises(urllib.error.HTTPError) as refused:
            documented_client_loop(web.url, key, "nobody")
        assert refused.value.code == 404
        assert json.loads(refused.value.read())["detail"] == "Job nobody not found"
        refused.value.close()

    await asyncio.to_thread(good_then_bad)


async def test_the_documented_client_loop_sees_the_end_while_it_waits(start_web, key, client):
    web = await start_web()
    job_id = (await create(client, pdf_name="late.pdf"))["id"]
    loop = asyncio.create_task(asyncio.to_thread(documented_client_loop, web.url, key, job_id))
    for percentage in range(10, 100, 10):
        await report(client, job_id, status="PROCESSING", progress={"percentage": percentage})
    assert not loop.done()
    await report(client, job_id, status="COMPLETED")
    assert (await loop)["pdf_name"] == "late.pdf"
