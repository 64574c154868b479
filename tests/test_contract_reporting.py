"""The contract's section Reporting and the states of a job, line by line, as producers and workers see them."""

import asyncio
import json
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from tests.conftest import make_key
from tests.http import JSON, ask, create, report

STATUSES = ("queued", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED")
ALLOWED = {
    "queued": ["PROCESSING", "COMPLETED", "FAILED", "CANCELLED"],
    "PROCESSING": ["COMPLETED", "FAILED", "CANCELLED", "queued"],
    "COMPLETED": [],
    "FAILED": [],
    "CANCELLED": [],
}
WRITES: dict[str, dict[str, Any]] = {
    "PATCH /jobs/{}": {"json": {}},
    "PUT /jobs/{}/result": {"data": b"x"},
    "POST /jobs/{}/cancel": {},
    "POST /jobs/{}/retry": {},
    "DELETE /jobs/{}": {},
}


async def post(client, body: Any, **headers: str):
    return await ask(client, "POST", "/jobs", json=body, headers=headers)


async def patch(client, job_id: str, said: dict[str, Any], **headers: str):
    return await ask(client, "PATCH", f"/jobs/{job_id}", json=said, headers=headers)


async def patch_many(client, items: list[Any]) -> list[dict[str, Any]]:
    answer = await ask(client, "PATCH", "/jobs", json=items)
    assert answer.status == 200, answer
    assert list(answer.json()) == ["results"]
    return answer.json()["results"]


async def put(client, job_id: str, body: bytes, query: str = "", **headers: str):
    return await ask(client, "PUT", f"/jobs/{job_id}/result{query}", data=body, headers=headers)


async def write(client, address: str, job_id: str, headers: dict[str, str] | None = None):
    """One of WRITES."""
    method, path = address.format(job_id).split()
    return await ask(client, method, path, headers=headers, **WRITES[address])


async def job_in(client, status: str, **fields: Any) -> dict[str, Any]:
    job = await create(client, **fields)
    return job if status == "queued" else await report(client, job["id"], status=status)


async def polled(client, job_id: str) -> dict[str, Any]:
    return (await ask(client, "GET", f"/jobs/{job_id}")).json()


# Creating


async def test_a_creation_answers_with_the_job_and_where_it_is(client):
    answer = await post(client, {"type": "parse", "id": "a-1"})
    assert (answer.status, answer.headers["Location"]) == (201, "/jobs/a-1")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.json() == await polled(client, "a-1")


async def test_minted_ids_are_uuid_7_and_grow(client):
    ids = [(await create(client))["id"] for _ in range(3)]
    assert [UUID(each).version for each in ids] == [7, 7, 7]
    assert sorted(each[:13] for each in ids) == [each[:13] for each in ids]
    assert len(set(ids)) == 3


async def test_a_public_job_has_a_uuid_4(client):
    assert UUID((await create(client, public=True))["id"]).version == 4
    answer = await post(client, {"type": "x", "public": True, "id": "guessable"})
    assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["id"]


async def test_own_ids_are_taken_as_they_are(client):
    for own in ("a", "0", "a" * 128, "A.b_c:d-e", "Status", "9..", "x:::"):
        assert (await create(client, id=own))["id"] == own
        assert (await polled(client, own))["id"] == own


LIMITS: list[tuple[str, Any, Any]] = [
    # field, the most that is taken, what is refused
    ("id", "a" * 127, "a" * 129),
    ("id", "a", ""),
    ("id", "b", "-b"),
    ("id", "c", "c/d"),
    ("id", "d", "d\n"),
    ("id", "e", "ö"),
    ("id", "f", None),
    ("type", "x" * 64, "x" * 65),
    ("type", "x", ""),
    ("type", "x.y_z-1", "Extraction"),
    ("operation", "x" * 64, "x" * 65),
    ("pdf_name", "ö" * 1024, "x" * 1025),
    ("pdf_hash", "x" * 256, "x" * 257),
    ("user_id", "x" * 256, "x" * 257),
    ("batch_id", "b" * 128, "b" * 129),
    ("batch_id", "b", "not an id"),
    ("tags", [str(n) for n in range(32)], [str(n) for n in range(33)]),
    ("tags", ["ö" * 64], ["x" * 65]),
    ("tags", ["a b"], ["a,b"]),
    ("file_count", 2**31 - 1, 2**31),
    ("file_count", 0, -1),
    ("metadata", {"a": "x" * (16 * 1024 - 9)}, {"a": "x" * (16 * 1024 - 8)}),
    ("parameters", {"a": "x" * (16 * 1024 - 9)}, {"a": "x" * (16 * 1024 - 8)}),
    ("progress", {"message": "ö" * 512}, {"message": "x" * 513}),
    ("progress", {"step": "ö" * 512}, {"step": "x" * 513}),
    ("progress", {"percentage": 100}, {"percentage": 100.1}),
    ("progress", {"queue_position": 0}, {"queue_position": -1}),
    ("heartbeat_timeout", 30 * 24 * 3600, 30 * 24 * 3600 + 1),
    ("heartbeat_timeout", 1, 0),
    ("stalled_action", "fail", "retry"),
    ("webhook_url", "https://example.com/" + "x" * 2028, "https://example.com/" + "x" * 2029),
    ("webhook_url", "http://localhost:8080/hook?a=b", "ftp://example.com/"),
    ("notification_settings", {"email": "a@b.cd"}, {"email": "a@b.cd", "events": []}),
    ("notification_settings", {"email": "a@b.cd", "events": ["failed"]}, {"email": "a@b.cd", "events": ["queued"]}),
    ("notification_settings", {"email": "a@b.cd", "include_summary": True}, {"email": "nobody"}),
    ("notification_settings", {"email": "a@b.cd"}, {}),
]


async def test_every_field_is_taken_up_to_its_limit_and_refused_beyond(client, subtests):
    for n, (field, most, more) in enumerate(LIMITS):
        with subtests.test(f"{n} {field}"):
            rest = {} if field in ("type", "operation") else {"type": "x"}
            taken = await post(client, {**rest, field: most})
            assert taken.status == 201, taken
            if field in taken.json():
                assert taken.json()[field] == most
            refused = (await post(client, {**rest, field: more})).problem(422, "validation_failed")
            assert list(refused["details"]["fields"]) == [field]


async def test_repeated_tags_are_one(client):
    assert (await create(client, tags=["b", "a", "b"]))["tags"] == ["b", "a"]


async def test_a_creation_that_makes_no_sense_names_the_fields(client):
    for asked, wrong in [
        ({}, ["type"]),
        ({"type": "extraction", "operation": "parse"}, ["operation"]),
        ({"type": "x", "batch_size": 2}, ["batch_size"]),
        ({"type": "x", "close_batch": True}, ["close_batch"]),
        ({"type": "x", "status": "COMPLETED", "colour": "red"}, ["colour", "status"]),
        ({"type": "x", "progress": {"eta": "2024-01-15T10:30:00Z", "speed": 1}}, ["progress"]),
    ]:
        fields = (await post(client, asked)).problem(422, "validation_failed")["details"]["fields"]
        assert sorted(fields) == wrong


async def test_whom_to_tell_is_kept(client, sql):
    settings = {"email": "a@b.cd", "events": ["failed"], "include_summary": True}
    job = await create(
        client,
        notification_settings=settings,
        webhook_url="https://example.com/hook",
        heartbeat_timeout=60,
        stalled_action="fail",
    )
    row = await sql.fetchrow("select * from jobs where id = $1", job["id"])
    assert json.loads(row["notification"]) == settings
    assert (row["webhook_url"], row["heartbeat_timeout_s"], row["stalled_action"]) == (
        "https://example.com/hook",
        60,
        "fail",
    )
    defaults = await create(client, notification_settings={"email": "a@b.cd"})
    kept = await sql.fetchval("select notification from jobs where id = $1", defaults["id"])
    assert json.loads(kept) == {"email": "a@b.cd", "events": ["completed", "failed"], "include_summary": False}


async def test_an_array_is_created_whole_and_in_order(client):
    ids = ["c", "a", "b"]
    answer = await post(client, [{"type": "x", "id": each} for each in ids])
    assert answer.status == 201
    assert list(answer.json()) == ["jobs"]
    assert [job["id"] for job in answer.json()["jobs"]] == ids
    assert answer.json()["jobs"][1] == await polled(client, "a")


async def test_an_array_of_one_is_still_an_array(client):
    answer = await post(client, [{"type": "x"}])
    assert (answer.status, len(answer.json()["jobs"])) == (201, 1)


async def test_an_array_is_created_whole_or_not_at_all(client, sql, subtests):
    for own in ("taken", "gone"):
        await create(client, id=own)
    await ask(client, "DELETE", "/jobs/gone")
    await create(client, batch_id="full", batch_size=1)
    before = await sql.fetchval("select count(*) from jobs")
    batch = [{"type": "x", "id": f"new-{n}", "batch_id": "b"} for n in range(3)]
    spoilers: list[tuple[Any, int, str]] = [
        ({"type": "x", "id": "taken"}, 409, "already_exists"),
        ({"type": "x", "id": "gone"}, 409, "already_exists"),
        ({"type": "x", "id": "new-1"}, 422, "validation_failed"),
        ({"type": "X"}, 422, "validation_failed"),
        ("job", 422, "validation_failed"),
        ({"type": "x", "batch_id": "full"}, 409, "batch_closed"),
        ({"type": "x", "batch_id": "b", "batch_size": 1}, 422, "validation_failed"),
    ]
    for spoiler, status, error_type in spoilers:
        with subtests.test(str(spoiler)):
            (await post(client, [*batch, spoiler])).problem(status, error_type)
            assert await sql.fetchval("select count(*) from jobs") == before
            assert await sql.fetchval("select count(*) from batches where id = 'b'") == 0
    assert (await post(client, batch)).status == 201


async def test_a_repeated_id_in_one_array_is_named_at_each_place(client):
    answer = await post(client, [{"type": "x", "id": each} for each in ("a", "b", "a")])
    assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["0", "2"]


async def test_what_is_wrong_in_an_array_is_named_under_its_place(client):
    answer = await post(client, [{"type": "x"}, {"type": "x", "colour": 1}, {"type": 5}])
    fields = answer.problem(422, "validation_failed")["details"]["fields"]
    assert {place: list(wrong) for place, wrong in fields.items()} == {"1": ["colour"], "2": ["type"]}


async def test_a_thousand_jobs_are_created_at_once(client, sql):
    answer = await post(client, [{"type": "x"}] * 1000)
    assert (answer.status, len(answer.json()["jobs"])) == (201, 1000)
    assert await sql.fetchval("select count(*) from jobs") == 1000


async def test_a_taken_id_of_one_s_own(client):
    await create(client, id="mine", pdf_name="first")
    said = (await post(client, {"type": "x", "id": "mine"})).problem(409, "already_exists")
    assert said["details"]["job_id"] == "mine"
    assert (await polled(client, "mine"))["pdf_name"] == "first"


async def test_of_20_creations_of_one_id_at_once_one_wins(client, sql):
    answers = await asyncio.gather(*(post(client, {"type": "x", "id": "one"}) for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [201] + [409] * 19
    for answer in answers:
        if answer.status == 409:
            assert answer.problem(409, "already_exists")["details"]["job_id"] == "one"
    assert await sql.fetchval("select count(*) from jobs") == 1


# Batches, as far as creation tells


async def test_a_batch_closes_itself_when_it_has_its_announced_size(client):
    for _ in range(2):
        await create(client, batch_id="b", batch_size=2)
    said = (await post(client, {"type": "x", "batch_id": "b"})).problem(409, "batch_closed")
    assert said["details"]["batch_id"] == "b"


async def test_one_job_may_announce_the_size_for_all(client):
    await create(client, batch_id="b", batch_size=3)
    await create(client, batch_id="b")
    await create(client, batch_id="b")
    (await post(client, {"type": "x", "batch_id": "b"})).problem(409, "batch_closed")


@pytest.mark.parametrize("sizes", [[2, 3], [1, 1]], ids=["contradict each other", "less than the jobs"])
async def test_a_batch_size_that_cannot_be(client, sizes):
    answer = await post(client, [{"type": "x", "batch_id": "b", "batch_size": size} for size in sizes])
    assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["batch_size"]
    assert (await post(client, {"type": "x", "batch_id": "b"})).status == 201


async def test_a_batch_size_that_contradicts_an_earlier_one(client):
    await create(client, batch_id="b", batch_size=3)
    answer = await post(client, {"type": "x", "batch_id": "b", "batch_size": 4})
    assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["batch_size"]


async def test_close_batch_on_any_item_closes_what_is_created_whole(client):
    items = [{"type": "x", "batch_id": "b"}, {"type": "x", "batch_id": "b", "close_batch": True}, {"type": "x"}]
    assert (await post(client, items)).status == 201
    (await post(client, {"type": "x", "batch_id": "b"})).problem(409, "batch_closed")
    assert (await post(client, {"type": "x", "batch_id": "other"})).status == 201


async def test_batches_of_accounts_do_not_meet(client, database):
    await create(client, batch_id="b", batch_size=1)
    other = await make_key(database, "other")
    answer = await post(client, {"type": "x", "batch_id": "b"}, **{"X-API-Key": other})
    assert answer.status == 201


async def test_of_20_additions_at_once_a_batch_takes_as_many_as_it_has_places(client, sql):
    item = {"type": "x", "batch_id": "b", "batch_size": 5}
    answers = await asyncio.gather(*(post(client, item) for _ in range(20)))
    assert sorted(answer.status for answer in answers) == [201] * 5 + [409] * 15
    for answer in answers:
        if answer.status == 409:
            answer.problem(409, "batch_closed")
    assert await sql.fetchval("select count(*) from jobs") == 5


# Idempotency-Key

ONCE = {"Idempotency-Key": "order 7"}


@pytest.mark.parametrize("body", [{"type": "x", "pdf_name": "a"}, [{"type": "x"}, {"type": "y"}]])
async def test_a_repeat_gets_the_first_answer(client, sql, body):
    first = await post(client, body, **ONCE)
    again = await post(client, body, **ONCE)
    assert (first.status, again.status) == (201, 200)
    assert again.body == first.body
    assert again.headers.get("Location") == first.headers.get("Location")
    assert await sql.fetchval("select count(*) from jobs") == (len(body) if isinstance(body, list) else 1)


async def test_the_first_answer_stays_whatever_becomes_of_the_job(client):
    first = await post(client, {"type": "x"}, **ONCE)
    await report(client, first.json()["id"], status="PROCESSING")
    assert (await post(client, {"type": "x"}, **ONCE)).body == first.body
    await ask(client, "DELETE", first.headers["Location"])
    assert (await post(client, {"type": "x"}, **ONCE)).body == first.body


async def test_the_same_body_written_differently_is_a_repeat(client):
    assert (await post(client, {"type": "x", "pdf_name": "a"}, **ONCE)).status == 201
    again = await ask(client, "POST", "/jobs", data=b'{ "pdf_name":"\\u0061", "type":"x" }', headers=JSON | ONCE)
    assert again.status == 200


async def test_another_body_with_the_same_key(client, sql):
    await post(client, {"type": "x"}, **ONCE)
    for other in ({"type": "y"}, [{"type": "x"}], {"type": "x", "pdf_name": None}, {"type": "x", "id": "a"}):
        (await post(client, other, **ONCE)).problem(422, "idempotency_mismatch")
    assert await sql.fetchval("select count(*) from jobs") == 1


async def test_while_the_first_request_runs_a_second_is_told_so(client, sql):
    async with sql.transaction():
        await sql.execute("lock table jobs in exclusive mode")  # the first cannot end before this does
        first = asyncio.create_task(post(client, {"type": "x"}, **ONCE))
        while not await sql.fetchval("select count(*) from pg_locks where not granted"):
            pass
        second = await post(client, {"type": "x"}, **ONCE)
    second.problem(409, "idempotency_in_flight")
    assert (await first).status == 201
    assert (await post(client, {"type": "x"}, **ONCE)).status == 200


async def test_of_20_requests_at_once_with_one_key_exactly_one_creates(client, sql):
    answers = await asyncio.gather(*(post(client, {"type": "x"}, **ONCE) for _ in range(20)))
    assert [answer.status for answer in answers].count(201) == 1
    bodies = {answer.body for answer in answers if answer.status in (200, 201)}
    assert len(bodies) == 1
    for answer in answers:
        if answer.status not in (200, 201):
            answer.problem(409, "idempotency_in_flight")
    assert await sql.fetchval("select count(*) from jobs") == 1
    assert (await post(client, {"type": "x"}, **ONCE)).body in bodies


async def test_a_refused_request_does_not_use_its_key_up(client):
    await create(client, id="taken")
    (await post(client, {"type": "X"}, **ONCE)).problem(422, "validation_failed")
    (await post(client, {"type": "x", "id": "taken"}, **ONCE)).problem(409, "already_exists")
    assert (await post(client, {"type": "x"}, **ONCE)).status == 201


async def test_idempotency_keys_of_accounts_do_not_meet(client, database):
    await post(client, {"type": "x"}, **ONCE)
    other = {"X-API-Key": await make_key(database, "other")}
    assert (await post(client, {"type": "y"}, **ONCE, **other)).status == 201


async def test_an_idempotency_key_is_kept_for_24_hours(client, sql):
    first = await post(client, {"type": "x"}, **ONCE)
    await sql.execute("update idempotency_keys set at = at - interval '23 hours 59 minutes'")
    assert (await post(client, {"type": "x"}, **ONCE)).body == first.body
    await sql.execute("update idempotency_keys set at = at - interval '1 minute'")
    assert (await post(client, {"type": "y"}, **ONCE)).status == 201


async def test_an_idempotency_key_is_1_to_255_printable_characters(client):
    for word in ("", "x" * 256, "ö"):
        answer = await post(client, {"type": "x"}, **{"Idempotency-Key": word})
        assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["Idempotency-Key"]
    assert (await post(client, {"type": "x"}, **{"Idempotency-Key": "x" * 255})).status == 201


# States


async def test_every_transition_is_taken_or_refused_as_the_table_says(client, subtests):
    for held in STATUSES:
        with subtests.test(held):
            for wanted in STATUSES:
                job = await job_in(client, held)
                answer = await patch(client, job["id"], {"status": wanted})
                if wanted == held:
                    assert (answer.status, answer.json()) == (200, job)
                elif wanted in ALLOWED[held]:
                    assert (answer.status, answer.json()["status"]) == (200, wanted)
                    assert answer.json()["version"] == job["version"] + 1
                else:
                    details = answer.problem(409, "invalid_transition")["details"]
                    assert (details["current_status"], details["allowed"]) == (held, ALLOWED[held])
                    assert await polled(client, job["id"]) == job


async def test_status_is_understood_in_any_casing(client):
    for casing in ("processing", "PROCESSING", "Processing"):
        job = await create(client)
        assert (await report(client, job["id"], status=casing))["status"] == "PROCESSING"


async def test_a_job_given_back_is_a_new_attempt(client):
    job = await job_in(client, "PROCESSING")
    await report(client, job["id"], progress={"percentage": 60, "step": "ocr"})
    back = await report(client, job["id"], status="queued")
    assert (back["status"], back["attempt"], back["progress"]) == ("queued", 2, {})
    again = await report(client, job["id"], status="PROCESSING", progress={"percentage": 5})
    assert (again["attempt"], again["progress"]) == (2, {"percentage": 5})


async def test_a_report_names_the_attempt_it_belongs_to_or_none(client):
    job = await job_in(client, "PROCESSING")
    await report(client, job["id"], status="queued")
    stale = (await patch(client, job["id"], {"attempt": 1})).problem(409, "stale_attempt")
    early = (await patch(client, job["id"], {"attempt": 3, "status": "FAILED"})).problem(409, "unknown_attempt")
    assert stale["details"]["current_attempt"] == early["details"]["current_attempt"] == 2
    for attempt in (2, None):
        assert (await patch(client, job["id"], {"attempt": attempt})).status == 200
    (await put(client, job["id"], b"x", "?attempt=1")).problem(409, "stale_attempt")
    (await put(client, job["id"], b"x", "?attempt=3")).problem(409, "unknown_attempt")
    assert (await put(client, job["id"], b"x", "?attempt=2")).status == 200


async def test_a_finished_job_takes_no_progress_and_no_metadata(client, subtests):
    for status in ["COMPLETED", "FAILED", "CANCELLED"]:
        with subtests.test(status):
            job = await job_in(client, status)
            for said in ({"progress": {"percentage": 100}}, {"metadata": {"a": 1}}, {"progress": {}}, {"metadata": {}}):
                details = (await patch(client, job["id"], said)).problem(409, "invalid_transition")["details"]
                assert (details["current_status"], details["allowed"]) == (status, [])
            assert (await patch(client, job["id"], {})).json() == job
            assert await polled(client, job["id"]) == job


async def test_a_repeated_state_changes_nothing_but_the_heartbeat(client, sql, subtests):
    for status in STATUSES:
        with subtests.test(status):
            job = await create(client, progress={"percentage": 5, "message": "m"}, metadata={"a": 1})
            said = {"status": status, "progress": {"message": "n"}, "metadata": {"b": 2}}
            if status in ("FAILED", "CANCELLED"):
                said["error"] = "No ink"
            first = await report(client, job["id"], **said)
            beat = await sql.fetchval("select heartbeat_at from jobs where id = $1", job["id"])
            await sql.execute("update jobs set heartbeat_at = heartbeat_at - interval '1 hour'")
            assert await report(client, job["id"], **said) == first
            assert await report(client, job["id"]) == first
            if status in ("queued", "PROCESSING"):
                assert await sql.fetchval("select heartbeat_at from jobs where id = $1", job["id"]) >= beat
            history = await sql.fetchval("select count(*) from job_history where job_id = $1", job["id"])
            assert history == (1 if status == "queued" else 2)


# Progress, metadata, errors


async def test_progress_and_metadata_merge_at_their_top_level_and_null_removes(client):
    job = await create(
        client,
        progress={"percentage": 10, "message": "m", "step": "s", "total_files": 3},
        metadata={"keep": 1, "deep": {"a": 1, "b": 2}, "drop": 1},
    )
    merged = await report(
        client,
        job["id"],
        progress={"percentage": 20, "message": None, "files_completed": 1},
        metadata={"deep": {"a": 3}, "drop": None, "new": [None]},
    )
    assert merged["progress"] == {"percentage": 20, "step": "s", "total_files": 3, "files_completed": 1}
    assert merged["metadata"] == {"keep": 1, "deep": {"a": 3}, "new": [None]}
    assert merged["version"] == 2


async def test_percentage_never_falls_within_an_attempt(client, subtests):
    for status in ("queued", "PROCESSING"):
        for lower in (0, 39, 39.99, None):
            with subtests.test(f"{status} {lower}"):
                job = await job_in(client, status, progress={"percentage": 40})
                said = await report(client, job["id"], progress={"percentage": lower, "message": "still here"})
                assert said["progress"] == {"percentage": 40, "message": "still here"}
                assert await report(client, job["id"], status=status, progress={"percentage": lower}) == said


async def test_metadata_has_a_limit_also_after_merging(client):
    job = await create(client, metadata={"a": "x" * 10_000})
    answer = await patch(client, job["id"], {"metadata": {"b": "x" * 10_000}})
    assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["metadata"]
    assert await polled(client, job["id"]) == job
    assert (await patch(client, job["id"], {"metadata": {"a": None, "b": "x" * 10_000}})).status == 200


async def test_a_completed_job_is_at_100_percent_and_out_of_the_queue(client):
    job = await create(client, progress={"percentage": 10, "queue_position": 3, "step": "s"})
    assert (await report(client, job["id"], status="COMPLETED"))["progress"] == {"percentage": 100, "step": "s"}
    job = await job_in(client, "PROCESSING")
    done = await report(client, job["id"], status="COMPLETED", progress={"percentage": 30, "message": "done"})
    assert done["progress"] == {"percentage": 100, "message": "done"}


async def test_a_job_that_left_the_queue_has_no_place_in_it(client):
    job = await create(client, progress={"queue_position": 3, "percentage": 0})
    assert (await report(client, job["id"], status="PROCESSING"))["progress"] == {"percentage": 0}


DETAILS = {"error_type": "bad_scan", "message": "Page 3 is black"}


NOTHING_SAID = ("No reason was given", {"error_type": "job_failed", "message": "No reason was given"})
REASONS: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    ({}, *NOTHING_SAID),
    ({"error": None, "error_details": None}, *NOTHING_SAID),
    ({"error": "", "error_details": {}}, *NOTHING_SAID),
    ({"error": "No ink"}, "No ink", {"error_type": "job_failed", "message": "No ink"}),
    ({"error_details": DETAILS}, "Page 3 is black", DETAILS),
    (
        {"error_details": {"error_type": "t"}},
        "No reason was given",
        {"error_type": "t", "message": "No reason was given"},
    ),
    ({"error_details": {"message": "m"}}, "m", {"error_type": "job_failed", "message": "m"}),
    ({"error": "No ink", "error_details": DETAILS}, "No ink", DETAILS),
    ({"error": "No ink", "error_details": {"error_type": "t"}}, "No ink", {"error_type": "t", "message": "No ink"}),
]


async def test_error_and_error_details_are_made_from_each_other(client, subtests):
    for status in ["FAILED", "CANCELLED"]:
        for said, error, details in REASONS:
            with subtests.test(f"{status} {said}"):
                job = await job_in(client, "PROCESSING")
                failed = await report(client, job["id"], status=status, **said)
                assert (failed["error"], failed["error_details"]) == (error, details)
                assert (await ask(client, "GET", f"/jobs/{job['id']}/status")).json()["error_details"] == details
                assert await report(client, job["id"], status=status, error="another") == failed


async def test_an_error_goes_only_with_an_end(client):
    job = await create(client)
    for status in (None, "queued", "PROCESSING", "COMPLETED"):
        answer = await patch(client, job["id"], {"status": status, "error": "e", "error_details": {"message": "m"}})
        assert sorted(answer.problem(422, "validation_failed")["details"]["fields"]) == ["error", "error_details"]
    assert await polled(client, job["id"]) == job


REPORT_LIMITS: list[tuple[str, Any, Any]] = [
    ("progress", {"message": "ö" * 512}, {"message": "ö" * 513}),
    ("progress", {"percentage": 0}, {"percentage": "5"}),
    ("progress", {"files_completed": 0}, {"files_completed": 1.5}),
    ("metadata", {"a": "x" * (16 * 1024 - 9)}, {"a": "x" * (16 * 1024 - 8)}),
    ("attempt", 1, 0),
    ("attempt", 1, "1"),
    ("error", "ö" * 2048, "ö" * 2048 + "x"),
    ("error_details", {"message": "ö" * 2048}, {"message": "ö" * 2048 + "x"}),
    ("error_details", {"error_type": "x" * 128}, {"error_type": "x" * 129}),
    ("status", "failed", "done"),
]


async def test_every_part_of_a_report_is_taken_up_to_its_limit_and_refused_beyond(client, subtests):
    for n, (field, most, more) in enumerate(REPORT_LIMITS):
        with subtests.test(f"{n} {field}"):
            job = await create(client)
            end = {"status": "FAILED"} if field.startswith("error") else {}
            refused = (await patch(client, job["id"], {**end, field: more})).problem(422, "validation_failed")
            assert list(refused["details"]["fields"]) == [field]
            assert await polled(client, job["id"]) == job
            taken = await report(client, job["id"], **end, **{field: most})
            if field != "status":
                assert json.dumps(most, ensure_ascii=False)[1:-1] in json.dumps(taken, ensure_ascii=False)


# If-Match


CONDITIONS = [
    ("{etag}", True),
    ("*", True),
    ('"9-9", {etag}', True),
    ('"9-9"', False),
    ("W/{etag}", False),
    ("{bare}", False),
    ("", False),
    ("ö", False),
    ('"9-9", *', False),
]


async def test_if_match(client, subtests):
    for address in WRITES:
        for condition, holds in CONDITIONS:
            with subtests.test(f"{address} {condition}"):
                job = await job_in(client, "FAILED" if "retry" in address else "queued")
                etag = (await ask(client, "GET", f"/jobs/{job['id']}")).headers["ETag"]
                asked = condition.format(etag=etag, bare=etag.strip('"'))
                answer = await write(client, address, job["id"], {"If-Match": asked})
                if holds:
                    assert answer.status == 200, answer
                else:
                    answer.problem(412, "precondition_failed")
                    assert await polled(client, job["id"]) == job


async def test_of_two_writers_with_one_etag_one_wins(client):
    job = await create(client)
    etag = (await ask(client, "GET", f"/jobs/{job['id']}")).headers["ETag"]
    writers = [patch(client, job["id"], {"metadata": {"a": n}}, **{"If-Match": etag}) for n in range(10)]
    assert sorted(answer.status for answer in await asyncio.gather(*writers)) == [200] + [412] * 9


# Answers to reports


async def test_the_answer_to_a_report_is_what_readers_see(client):
    job = await create(client)
    for said in ({"status": "PROCESSING"}, {}, {"progress": {"percentage": 3}}):
        reported = await patch(client, job["id"], said)
        seen = await ask(client, "GET", f"/jobs/{job['id']}")
        assert (reported.status, reported.body, reported.headers["ETag"]) == (200, seen.body, seen.headers["ETag"])
        assert reported.headers["Content-Type"] == "application/json; charset=utf-8"
        assert "Warning" not in reported.headers


async def test_a_report_taken_by_one_process_is_seen_through_another_at_once(start_web, key):
    one, two = await asyncio.gather(start_web(), start_web())
    own = {"X-API-Key": key}
    async with (
        aiohttp.ClientSession(one.url, headers=own) as worker,
        aiohttp.ClientSession(two.url, headers=own) as reader,
    ):
        job = await create(worker)
        for percentage in range(1, 40):
            reported = await patch(worker, job["id"], {"progress": {"percentage": percentage}})
            assert (await ask(reader, "GET", f"/jobs/{job['id']}")).body == reported.body
        assert (await ask(worker, "DELETE", f"/jobs/{job['id']}")).status == 200
        (await ask(reader, "GET", f"/jobs/{job['id']}")).problem(404, "deleted")


async def test_what_is_not_there_or_another_s_takes_no_report(client, database, sql, subtests):
    other = {"X-API-Key": await make_key(database, "other")}
    for address in WRITES:
        with subtests.test(address):
            (await write(client, address, "nobody")).problem(404, "not_found")
            job = await job_in(client, "FAILED")
            (await write(client, address, job["id"], other)).problem(403, "forbidden")
            assert await polled(client, job["id"]) == job
            await ask(client, "DELETE", f"/jobs/{job['id']}")
            (await write(client, address, job["id"])).problem(404, "deleted")
            old = (await job_in(client, "FAILED"))["id"]
            await sql.execute("update jobs set expires_at = now() - interval '1 minute' where id = $1", old)
            await sql.execute("delete from jobs where id = $1", old)
            assert "expired_at" in (await write(client, address, old)).problem(404, "expired")["details"]


# Many reports at once


async def test_an_array_of_reports_is_taken_in_order_and_one_bad_item_fails_nobody_else(client, database, sql):
    await create(client, id="a", metadata={"big": "x" * 10_000})
    await create(client, id="b")
    await job_in(client, "COMPLETED", id="done")
    await create(client, id="gone")
    await ask(client, "DELETE", "/jobs/gone")
    other = {"X-API-Key": await make_key(database, "other")}
    await ask(client, "POST", "/jobs", json={"type": "x", "id": "theirs"}, headers=other)
    items: list[tuple[Any, Any]] = [
        ({"id": "a", "status": "PROCESSING"}, ("a", 200, 2)),
        ({"id": "b", "progress": {"percentage": 5}}, ("b", 200, 2)),
        ({"id": "a", "progress": {"percentage": 30}}, ("a", 200, 3)),
        ({"id": "a", "progress": {"percentage": 20}}, ("a", 200, 3)),
        ({"id": "nobody"}, ("nobody", 404, "not_found")),
        ({"id": "status"}, ("status", 404, "not_found")),
        ({"id": "../x"}, ("../x", 404, "not_found")),
        ({"id": "theirs", "status": "FAILED"}, ("theirs", 403, "forbidden")),
        ({"id": "gone"}, ("gone", 404, "deleted")),
        ({"id": "done", "status": "PROCESSING"}, ("done", 409, "invalid_transition")),
        ({"id": "done", "status": "completed"}, ("done", 200, 2)),
        ({"id": "a", "attempt": 2}, ("a", 409, "unknown_attempt")),
        ({"id": "a", "status": "queued"}, ("a", 200, 4)),
        ({"id": "a", "attempt": 1}, ("a", 409, "stale_attempt")),
        ({"id": "a", "metadata": {"more": "x" * 10_000}}, ("a", 422, "validation_failed")),
        ({"id": "b", "colour": "red"}, ("b", 422, "validation_failed")),
        ({"id": "b", "error": "e"}, ("b", 422, "validation_failed")),
        ({"status": "FAILED"}, (None, 422, "validation_failed")),
        ({"id": 5}, (None, 422, "validation_failed")),
        ({"id": "x" * 129}, ("x" * 129, 422, "validation_failed")),
        ("a", (None, 422, "validation_failed")),
        (None, (None, 422, "validation_failed")),
        ([], (None, 422, "validation_failed")),
        ({"id": "a", "status": "FAILED", "error": "No ink"}, ("a", 200, 5)),
        ({"id": "b"}, ("b", 200, 2)),
    ]
    results = await patch_many(client, [item for item, _ in items])
    for result, (item, (job_id, status, told)) in zip(results, items, strict=True):
        if status == 200:
            assert result == {"id": job_id, "status": 200, "version": told}, item
        else:
            assert list(result) == ["id", "status", "error"], item
            assert (result["id"], result["status"], result["error"]["error_type"]) == (job_id, status, told), item
            assert result["error"]["message"]
    a, b = await polled(client, "a"), await polled(client, "b")
    assert (a["status"], a["error"], a["attempt"], a["version"]) == ("FAILED", "No ink", 2, 5)
    assert (b["status"], b["progress"], b["version"]) == ("queued", {"percentage": 5}, 2)
    history = await sql.fetch("select version, status from job_history where job_id = 'a' order by version")
    assert [tuple(row) for row in history] == [(1, "queued"), (2, "PROCESSING"), (4, "queued"), (5, "FAILED")]


async def test_a_thousand_reports_on_one_job_are_applied_in_order(client):
    job = await create(client)
    results = await patch_many(client, [{"id": job["id"], "metadata": {"n": n}} for n in range(1000)])
    assert [result["version"] for result in results] == list(range(2, 1002))
    assert (await polled(client, job["id"]))["metadata"] == {"n": 999}


async def test_a_thousand_jobs_are_reported_on_at_once(client):
    ids = [job["id"] for job in (await post(client, [{"type": "x"}] * 1000)).json()["jobs"]]
    results = await patch_many(client, [{"id": each, "status": "COMPLETED"} for each in ids])
    assert results == [{"id": each, "status": 200, "version": 2} for each in ids]


# The result


async def test_a_result_is_stored_and_replaced_until_the_job_is_finished(client):
    job = await job_in(client, "PROCESSING")
    versions = [(await put(client, job["id"], body)).json()["version"] for body in (b"one", b"one", b"two", b"one")]
    assert versions == [3, 3, 4, 5]
    done = await put(client, job["id"], b"last", "?complete=true", **{"Content-Type": "text/plain"})
    assert (done.json()["status"], done.json()["version"]) == ("COMPLETED", 6)
    assert (done.json()["progress"], done.json()["result_url"]) == ({"percentage": 100}, f"/jobs/{job['id']}/result")
    assert done.headers["ETag"] == (await ask(client, "GET", f"/jobs/{job['id']}")).headers["ETag"]
    stored = await ask(client, "GET", f"/jobs/{job['id']}/result")
    assert (stored.body, stored.headers["Content-Type"]) == (b"last", "text/plain")


@pytest.mark.parametrize("query", ["", "?complete=true", "?complete=false"])
async def test_a_result_again_once_finished(client, sql, query):
    job = await job_in(client, "PROCESSING")
    done = await put(client, job["id"], b"bytes", "?complete=true")
    assert (await put(client, job["id"], b"bytes", query)).json() == done.json()
    details = (await put(client, job["id"], b"others", query)).problem(409, "result_final")["details"]
    assert details["current_status"] == "COMPLETED"
    assert (await ask(client, "GET", f"/jobs/{job['id']}/result")).body == b"bytes"
    assert await sql.fetchval("select count(*) from results") == 1


async def test_a_result_may_follow_a_completion_once(client):
    job = await job_in(client, "COMPLETED")
    late = await put(client, job["id"], b"bytes")
    assert (late.status, late.json()["result_url"]) == (200, f"/jobs/{job['id']}/result")
    (await put(client, job["id"], b"others")).problem(409, "result_final")


async def test_a_job_that_came_to_nothing_takes_no_result(client, sql, subtests):
    for status in ["FAILED", "CANCELLED"]:
        with subtests.test(status):
            job = await job_in(client, status)
            (await put(client, job["id"], b"x")).problem(409, "result_final")
            (await put(client, job["id"], b"x", "?complete=true")).problem(409, "invalid_transition")
            assert await polled(client, job["id"]) == job
            assert await sql.fetchval("select count(*) from results") == 0


async def test_booleans_in_a_query(client):
    for words, completes in [("true True 1", True), ("false False 0", False), ("yes TRUE 2 null", None)]:
        for word in words.split():
            job = await job_in(client, "PROCESSING")
            answer = await put(client, job["id"], b"x", f"?complete={word}")
            if completes is None:
                assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["complete"]
            else:
                assert answer.json()["status"] == ("COMPLETED" if completes else "PROCESSING")


async def test_a_result_without_a_content_type_is_a_stream_of_bytes(client):
    for options in ({"skip_auto_headers": ["Content-Type"]}, {"headers": {"Content-Type": ""}}):
        job = await create(client)
        await ask(client, "PUT", f"/jobs/{job['id']}/result?complete=1", data=b"x", **options)
        answer = await ask(client, "GET", f"/jobs/{job['id']}/result")
        assert answer.headers["Content-Type"] == "application/octet-stream"


# Cancel, retry, delete


async def test_cancel(client, subtests):
    for status in ["queued", "PROCESSING"]:
        with subtests.test(status):
            for body in ({"json": {"reason": "Late"}}, {}, {"json": {}}, {"json": {"reason": None}}):
                reason = body.get("json", {}).get("reason") or "No reason was given"
                job = await job_in(client, status)
                first = await ask(client, "POST", f"/jobs/{job['id']}/cancel", **body)
                assert (first.status, first.json()["status"], first.json()["error"]) == (200, "CANCELLED", reason)
                assert first.json()["error_details"] == {"error_type": "job_failed", "message": reason}
                assert first.json() == await polled(client, job["id"])
                again = await ask(client, "POST", f"/jobs/{job['id']}/cancel", json={"reason": "another"})
                assert (again.status, again.body, again.headers["ETag"]) == (200, first.body, first.headers["ETag"])


async def test_what_is_over_cannot_be_cancelled(client, subtests):
    for status in ["COMPLETED", "FAILED"]:
        with subtests.test(status):
            job = await job_in(client, status)
            answer = await ask(client, "POST", f"/jobs/{job['id']}/cancel")
            details = answer.problem(409, "invalid_transition")["details"]
            assert (details["current_status"], details["allowed"]) == (status, [])
            assert await polled(client, job["id"]) == job


async def test_retry_begins_anew_with_nothing_left_of_the_failure(client):
    job = await create(client, metadata={"keep": 1}, progress={"message": "m"})
    await report(client, job["id"], status="PROCESSING", progress={"percentage": 70, "step": "s"})
    await put(client, job["id"], b"half")
    failed = await report(client, job["id"], status="FAILED", error="No ink")
    answer = await ask(client, "POST", f"/jobs/{job['id']}/retry")
    retried = answer.json()
    assert (answer.status, retried) == (200, await polled(client, job["id"]))
    assert (retried["status"], retried["attempt"], retried["progress"]) == ("queued", 2, {})
    assert (retried["error"], retried["error_details"], retried["metadata"]) == (None, None, {"keep": 1})
    assert not {"completed_at", "expires_at", "result_url"} & set(retried)
    assert retried["version"] == failed["version"] + 1
    assert (await report(client, job["id"], status="PROCESSING", progress={"percentage": 1}))["progress"] == {
        "percentage": 1
    }
    await report(client, job["id"], status="COMPLETED")
    (await ask(client, "GET", f"/jobs/{job['id']}/result")).problem(404, "result_not_found")


async def test_only_a_failed_job_is_retried(client, subtests):
    for status in ["queued", "PROCESSING", "COMPLETED", "CANCELLED"]:
        with subtests.test(status):
            job = await job_in(client, status)
            answer = await ask(client, "POST", f"/jobs/{job['id']}/retry")
            details = answer.problem(409, "invalid_transition")["details"]
            assert details["current_status"] == status
            assert await polled(client, job["id"]) == job


async def test_of_10_retries_at_once_one_is_taken(client):
    job = await job_in(client, "FAILED")
    answers = await asyncio.gather(*(ask(client, "POST", f"/jobs/{job['id']}/retry") for _ in range(10)))
    assert sorted(answer.status for answer in answers) == [200] + [409] * 9
    assert (await polled(client, job["id"]))["attempt"] == 2


async def test_delete_in_any_state(client, sql, subtests):
    for status in STATUSES:
        with subtests.test(status):
            job_id = (await job_in(client, status, id=f"x-{status}"))["id"]
            await sql.execute("insert into results (content_type, body) values ('a/b', 'x')")
            await sql.execute("update jobs set result_id = (select id from results), result_digest = sha256('x')")
            answer = await ask(client, "DELETE", f"/jobs/{job_id}")
            assert (answer.status, answer.json()) == (200, {"message": f"Job {job_id} deleted"})
            for path in ("", "/status", "/result", "/history"):
                (await ask(client, "GET", f"/jobs/{job_id}{path}")).problem(404, "deleted")
            (await ask(client, "DELETE", f"/jobs/{job_id}")).problem(404, "deleted")
            (await post(client, {"type": "x", "id": job_id})).problem(409, "already_exists")
            for table in ("jobs", "results", "job_history"):
                assert await sql.fetchval(f"select count(*) from {table}") == 0


async def test_an_id_can_be_used_again_30_days_after_its_job_was_deleted(client, sql):
    await create(client, id="x-1")
    await ask(client, "DELETE", "/jobs/x-1")
    await sql.execute("update tombstones set at = at - interval '29 days 23 hours'")
    (await post(client, {"type": "x", "id": "x-1"})).problem(409, "already_exists")
    await sql.execute("update tombstones set at = at - interval '1 hour'")
    assert (await create(client, id="x-1"))["version"] == 1
    assert (await polled(client, "x-1"))["version"] == 1
