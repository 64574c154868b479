"""Values that no field takes, and text that looks dangerous and is kept to the letter."""

import json
from typing import Any

from tests.hostile import Untouched
from tests.http import JSON, ask, create, fields_of, report

TEXTS = [
    # JSON, the status that refuses it
    (r'"\u0000"', 422),
    (r'"a\u0000b"', 422),
    (r'"\ud800"', 400),
    (r'"\udc00\ud800"', 400),
    ('"' + "ö" * 20_000 + '"', 422),
]
NUMBERS = [
    ("1e400", 400),
    ("-1e400", 400),
    ("NaN", 400),
    ("-Infinity", 400),
    ("1e308", 422),
    ("18446744073709551616", 422),
    ("-9223372036854775809", 422),
]
OTHERS = [
    ("true", 422),
    ("[]", 422),
    ("{}", 422),
    ('[["x"]]', 422),
    ('{"$ne":null}', 422),
    ("[" * 33 + "]" * 33, 422),
    ('{"a":' * 33 + "{}" + "}" * 33, 422),
    ("[" * 2000 + "]" * 2000, 400),
]
PLACES_IN_PROGRESS = [
    f'"progress":{{"{part}":VALUE}}'
    for part in ("percentage", "message", "step", "files_completed", "total_files", "queue_position")
]
FREE_PLACES = ['"metadata":{"a":VALUE}', '"metadata":{"a":[{"b":VALUE}]}']
NEW_JOB_FIELDS = (
    "id type operation pdf_name pdf_hash user_id batch_id batch_size close_batch tags file_count metadata "
    "parameters progress notification_settings webhook_url heartbeat_timeout stalled_action public"
)
PLACES_IN_A_NEW_JOB = [
    *(f'"{field}":VALUE' for field in NEW_JOB_FIELDS.split()),
    '"tags":["a",VALUE]',
    *PLACES_IN_PROGRESS,
    '"notification_settings":{"email":VALUE}',
    '"notification_settings":{"email":"a@b.cd","events":VALUE}',
    '"notification_settings":{"email":"a@b.cd","events":[VALUE]}',
    '"notification_settings":{"email":"a@b.cd","include_summary":VALUE}',
    *FREE_PLACES,
]
PLACES_IN_A_REPORT = [
    *(f'"{field}":VALUE' for field in ("status", "progress", "metadata", "attempt")),
    *PLACES_IN_PROGRESS,
    *FREE_PLACES,
]
FITS = {
    # right after all
    '"metadata":VALUE': ("{}", '{"$ne":null}'),
    '"parameters":VALUE': ("{}", '{"$ne":null}'),
    '"progress":VALUE': ("{}",),
    '"tags":VALUE': ("[]",),
    '"public":VALUE': ("true",),
    '"notification_settings":{"email":"a@b.cd","include_summary":VALUE}': ("true",),
}


def unfit(place: str) -> list[tuple[str, int]]:
    """What this place does not take."""
    if place in FREE_PLACES:
        return TEXTS[:-1] + NUMBERS + OTHERS[-3:]
    return [case for case in TEXTS + NUMBERS + OTHERS if case[0] not in FITS.get(place, ())]


async def refuse(client, untouched: Untouched, address: str, body: str, status: int) -> list[str]:
    """The fields that the refusal names, if it names any."""
    answer = await ask(client, *address.split(), data=body.encode(), headers=JSON)
    problem = answer.problem(status, {400: "malformed", 422: "validation_failed"}[status])
    await untouched()
    return list(problem["details"].get("fields", ()))


async def test_no_field_of_a_creation_takes_what_cannot_be_kept(client, untouched, subtests):
    for wrapped in ["{}", "[{}]"]:
        for place in PLACES_IN_A_NEW_JOB:
            for value, status in unfit(place):
                with subtests.test(f"{wrapped} {place} {value[:30]}"):
                    rest = "" if place.startswith(('"type"', '"operation"')) else '"type":"x",'
                    body = wrapped.format("{" + rest + place.replace("VALUE", value) + "}")
                    await refuse(client, untouched, "POST /jobs", body, status)


async def test_no_part_of_a_report_takes_what_cannot_be_kept(client, untouched, subtests):
    for place in PLACES_IN_A_REPORT:
        for value, status in unfit(place):
            with subtests.test(f"{place} {value[:30]}"):
                said = "{" + place.replace("VALUE", value) + "}"
                await refuse(client, untouched, "PATCH /jobs/x", said, status)
                if status == 400:
                    await refuse(client, untouched, "PATCH /jobs", f"[{said}]", 400)
                else:
                    many = f'[{{"id":"x",{said[1:]}, {{"id":"nobody"}}]'
                    answer = await ask(client, "PATCH", "/jobs", data=many.encode(), headers=JSON)
                    assert [result["status"] for result in answer.json()["results"]] == [422, 404]
                    await untouched()


async def test_no_reason_takes_what_cannot_be_kept(client, untouched, subtests):
    for address, body in [
        ("POST /jobs/x/cancel", '{"reason":VALUE}'),
        ("PATCH /jobs/x", '{"status":"FAILED","error":VALUE}'),
        ("PATCH /jobs/x", '{"status":"FAILED","error_details":[VALUE]}'),
        ("PATCH /jobs/x", '{"status":"FAILED","error_details":{"message":VALUE}}'),
        ("PATCH /jobs/x", '{"status":"FAILED","error_details":{"error_type":VALUE}}'),
    ]:
        for value, status in TEXTS + NUMBERS + OTHERS:
            with subtests.test(f"{body} {value[:30]}"):
                await refuse(client, untouched, address, body.replace("VALUE", value), status)


UNREADABLE = [case for case in TEXTS + NUMBERS + OTHERS if case[1] == 400]
NO_ID = [r'"\u0000"', r'"a\u0000b"', '""', "null", "true", "0", "1.5", "{}", '{"$in":["x"]}', "[" * 900 + "]" * 900]
NO_IDS = [
    *(*NO_ID, "[]", "[null]", '["x",""]', '"x,"', '",x"', '"x,,x"', '"x,\\u0000"'),
    *(json.dumps(many) for many in (["x"] * 501, ["x"] * 10_000, [f"j{n}" for n in range(10_000)])),
    json.dumps("x," * 10_000 + "x"),
]
PLACES_IN_MANY = [
    # field, place, what it does not take
    ("job_ids", '"job_ids":["x",VALUE]', [*NO_ID, "[]", '["x"]']),
    ("job_ids", '"job_ids":VALUE', NO_IDS),
    ("include_progress", '"job_ids":["x"],"include_progress":VALUE', ['"true"', '"1"', "1", "0", "null", "[]", "{}"]),
]
NO_BOOLEANS = ["True", "TRUE", "tRuE", "False", "None", "yes", "on", "undefined"]


async def test_many_jobs_are_asked_for_by_ids_and_nothing_else(client, untouched, subtests):
    for field, place, values in PLACES_IN_MANY:
        unreadable = [*UNREADABLE, *((word, 400) for word in NO_BOOLEANS)]
        for value, status in [*((value, 422) for value in values), *unreadable]:
            with subtests.test(f"{place} {value[:30]}"):
                body = "{" + place.replace("VALUE", value) + "}"
                fields = await refuse(client, untouched, "POST /jobs/status", body, status)
                assert fields == ([field] if status == 422 else [])


NO_ID_BUT_TEXT = [
    "'; drop table jobs; --",
    '"',
    "a\r\nX-Evil: 1",
    "../x",
    "x/status",
    "batch/b",
    "status",
    "x\n",
    " x",
    "\uff58",  # a full-width x, which NFKC would make an x
    "x\u0301",
    "😀",
    "x" * 129,
    "ö" * 20_000,
]


async def test_of_many_jobs_what_can_be_no_id_is_not_found_and_told_to_the_letter(client, untouched, subtests):
    for text in NO_ID_BUT_TEXT:
        with subtests.test(text[:30]):
            answer = await ask(client, "POST", "/jobs/status", json={"job_ids": ["x", text, "x"]})
            [before, line, after] = answer.json()["jobs"]
            assert before == after == {"job_id": "x", "status": "queued", "version": 1}
            assert (line["job_id"], line["status"], line["error"]["error_type"]) == (text, None, "not_found")
            assert "X-Evil" not in answer.headers
            await untouched()


async def test_names_nobody_knows(client, untouched, subtests):
    for address, known in [
        ("POST /jobs", '"type":"x",'),
        ("PATCH /jobs/x", ""),
        ("POST /jobs/status", '"job_ids":["x"],'),
        ("POST /jobs/batch/b/close", ""),
        ("POST /jobs/x/cancel", ""),
        ("POST /jobs/x/retry", ""),
    ]:
        for name in (
            "colour",
            "",
            "__proto__",
            "constructor",
            "_schema",
            "account_id",
            "version",
            "\n",
            "id; drop table jobs",
            "ö",
            "😀",
        ):
            with subtests.test(f"{address} {name}"):
                body = "{" + known + json.dumps(name) + ":1}"
                answer = await ask(client, *address.split(), data=body.encode(), headers=JSON)
                assert fields_of(answer) == [name]
                await untouched()


async def test_an_address_that_would_break_out_of_its_line(client, untouched, subtests):
    for field in ["webhook_url", "email"]:
        for value in [
            "http://a.bc/\0",
            "http://a.bc/\r\nX-Evil: 1",
            "http://a.bc/\n",
            "http://a.bc/\x01",
            "http://a.bc/\x7f",
            "http://a.bc/ d",
            "javascript:alert(1)",
            "file:///etc/passwd",
            "//a.bc/",
            "a@b.cd\n",
            "a@b.cd\r\nBcc: c@d.ef",
            '"\r\nBcc: c@d.ef"@b.cd',
            '"\x01"@b.cd',
            '"\\\r"@b.cd',
            "a@b.cd, c@d.ef",
            "a@" + "b" * 250 + ".cd",
        ]:
            with subtests.test(f"{field} {value}"):
                fields = (
                    {"webhook_url": value} if field == "webhook_url" else {"notification_settings": {"email": value}}
                )
                assert len(fields_of(await ask(client, "POST", "/jobs", json={"type": "x", **fields}))) == 1
                await untouched()


STRANGE_BUT_TEXT = [
    "a\r\nX-Evil: 1\r\n\r\n<html>",
    "'; drop table jobs; --",
    "${jndi:ldap://a/b} {{7*7}} %s %n {0} $1 \\u0000 \\",
    "\u2028\u2029\u202e\ufeff\uffff\x01\x7f\x85",
    "😀👩‍👩‍👧 ö ﷽",
    "</script><script>alert(1)</script>",
    "data: x\n\nevent: status\ndata: {}",
    " leading and trailing ",
    "",
]


async def test_text_that_looks_dangerous_is_kept_to_the_letter(client, subtests):
    for text in STRANGE_BUT_TEXT:
        with subtests.test(text):
            free = {"metadata": {"a": text, "b" + text: [text]}, "parameters": {text: text}}
            own = {"pdf_name": text, "pdf_hash": text, "user_id": text, "tags": [text.replace(",", "")[:64] or "x"]}
            said = {"message": text, "step": text}
            job = await create(client, **own, **free, progress=said)
            failed = await report(
                client,
                job["id"],
                status="FAILED",
                error="e" + text,
                error_details={"error_type": "t" + text, "message": text},
            )
            for each in (job, failed):
                assert {name: each[name] for name in own | free} == own | free
                assert each["progress"] == said
            assert failed["error"] == "e" + text
            assert failed["error_details"]["error_type"] == "t" + text
            answer = await ask(client, "GET", f"/jobs/{job['id']}")
            assert answer.json() == failed
            assert b"\n" not in answer.body
            assert "X-Evil" not in answer.headers
            refused = await ask(client, "GET", f"/jobs/{job['id']}/result")
            assert refused.problem(409, "no_result")["detail"] == f"Job {job['id']} failed: e{text}"
            history = (await ask(client, "GET", f"/jobs/{job['id']}/history")).json()["history"]
            assert (history[-1]["step"], history[-1]["error"]) == (text, "e" + text)


async def test_reports_on_ids_that_no_job_can_have(client, untouched):
    strange = [
        "",
        "\0",
        "x\0",
        "x" * 129,
        "x" * 10_000,
        "x\n",
        "../x",
        "%00",
        "x,done",
        "'; drop table jobs; --",
        "ö",
        "😀",
        None,
        5,
        {},
    ]
    refused = [422, 422, 422, 422, 422, *[404] * 7, 422, 422, 422]
    answer = await ask(client, "PATCH", "/jobs", json=[{"id": each, "status": "FAILED"} for each in strange])
    assert [result["status"] for result in answer.json()["results"]] == refused
    assert [result["id"] for result in answer.json()["results"]] == [*strange[:-3], None, None, None]


async def test_numbers_that_fit_are_kept_to_the_digit(client):
    numbers = [2**63 - 1, -(2**63), 0.1, 1e-7, -1.5, 2**53 + 1, 123456789.123456]
    assert (await create(client, metadata={"n": numbers}))["metadata"] == {"n": numbers}


async def test_32_levels_are_taken(client):
    deep: Any = "leaf"
    for _ in range(31):
        deep = {"a": deep} if isinstance(deep, list) else [deep]
    assert (await create(client, metadata={"a": deep}))["metadata"] == {"a": deep}
    answer = await ask(client, "POST", "/jobs", json={"type": "x", "metadata": {"a": [deep]}})
    assert fields_of(answer) == ["metadata"]
