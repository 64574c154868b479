"""Whatever is sent, the answer is a refusal that says why, nothing is written, and nobody else notices.

Each case is answered with its own 4xx; afterwards every row of every table is what it was, and no error was logged:
what clients do wrong is theirs, and must not drown what we do wrong.
"""

import asyncio
import gzip
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.http import JSON, Answer, ask, connected, create, head, report

MiB = 2**20
Untouched = Callable[[], Awaitable[None]]


@pytest.fixture
async def untouched(client, sql, caplog) -> AsyncIterator[Untouched]:
    """Some jobs (`x` is queued); calling it fails if any row of any table has changed, or an error was logged."""
    await create(client, id="x", metadata={"a": 1}, batch_id="b")
    await create(client, id="done")
    await ask(client, "PUT", "/jobs/done/result?complete=true", data=b"bytes")
    await create(client, id="gone")
    await ask(client, "DELETE", "/jobs/gone")
    await ask(client, "POST", "/jobs", json={"type": "x"}, headers={"Idempotency-Key": "used"})
    while await sql.fetchval("select count(*) from outbox"):
        pass
    tables = [
        row["name"]
        for row in await sql.fetch("select tablename::text as name from pg_tables where schemaname = 'public'")
    ]
    everything = (
        "select concat_ws(' ', "
        + ", ".join(f"(select jsonb_agg(t order by t::text) from {each} t)" for each in tables)
        + ")"
    )
    before = await sql.fetchval(everything)
    assert len(tables) > 8
    with capture_logs() as logs:

        async def check() -> None:
            assert await sql.fetchval(everything) == before
            assert [entry for entry in logs if entry["log_level"] in ("error", "critical")] == []
            assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []

        yield check
        await check()
    assert (await ask(client, "GET", "/jobs/x")).status == 200


def fields_of(answer: Answer) -> list[str]:
    return list(answer.problem(422, "validation_failed")["details"]["fields"])


# Bodies that are not what the address takes

NEW = b'{"type":"x"}'
NOT_JSON = {
    "nothing": b"",
    "white space": b" \n",
    "half an object": b'{"type":"x"',
    "two objects": NEW + NEW,
    "a comma too many": b'{"type":"x",}',
    "single quotes": b"{'type':'x'}",
    "a comment": NEW + b"// x",
    "a byte order mark": b"\xef\xbb\xbf" + NEW,
    "UTF-16": NEW.decode().encode("utf-16"),
    "Latin-1": '{"type":"x","user_id":"ö"}'.encode("latin-1"),
    "bytes that are no UTF-8": b'{"type":"\xff"}',
    "an overlong NUL": b'{"type":"\xc0\x80"}',
    "a raw surrogate": b'{"type":"\xed\xa0\x80"}',
    "an escaped high surrogate": b'{"type":"\\ud800"}',
    "an escaped low surrogate": b'{"type":"\\udc00x"}',
    "a surrogate in a name": b'{"\\ud800":1}',
    "a raw NUL": b'{"type":"\0"}',
    "a raw line end in a string": b'{"type":"\n"}',
    "NaN": b'{"type":NaN}',
    "Infinity": b'{"type":-Infinity}',
    "1e400": b'{"type":1e400}',
    "400 digits": b'{"type":%s}' % (b"9" * 400),
    "2000 arrays": b"[" * 2000 + b"]" * 2000,
    "2000 objects": b'{"a":' * 2000 + b"1" + b"}" * 2000,
    "100,000 arrays, never closed": b"[" * 100_000,
    "gzip": gzip.compress(NEW),
    "a form": b"type=x&id=1",
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
}
NO_OBJECT = {
    "null": b"null",
    "a string": b'"x"',
    "a number": b"1",
    "true": b"true",
    "an empty array": b"[]",
    "an array of arrays": b"[[]]",
    "an array of null": b"[null]",
    "an array of strings": b'["x"]',
    "an array of too many": b"[" + b",".join([NEW] * 1001) + b"]",
    "1000 levels": b'{"type":"x","a":' + b"[" * 1000 + b"]" * 1000 + b"}",
}
TAKE_JSON = ("POST /jobs", "PATCH /jobs", "PATCH /jobs/x", "POST /jobs/x/cancel", "POST /jobs/x/retry")


async def test_what_is_not_json(client, untouched, subtests):
    for address in TAKE_JSON:
        for name, body in NOT_JSON.items():
            if name == "nothing" and address.startswith("POST /jobs/x"):
                continue  # their body may be left out
            with subtests.test(f"{address} {name}"):
                answer = await ask(client, *address.split(), data=body, headers=JSON)
                answer.problem(400, "malformed")
                await untouched()


async def test_json_that_is_not_an_object_or_an_array_of_objects(client, untouched, subtests):
    for address in TAKE_JSON:
        for name, body in NO_OBJECT.items():
            with subtests.test(f"{address} {name}"):
                answer = await ask(client, *address.split(), data=body, headers=JSON)
                if address == "PATCH /jobs" and name.startswith("an array of") and "too many" not in name:
                    assert [result["status"] for result in answer.json()["results"]] == [422]
                else:
                    fields_of(answer)
                await untouched()


OTHER_CONTENT_TYPES = [
    None,
    "",
    "text/plain",
    "text/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=a",
    "application/jsonp",
    "application",
    "*/*",
    "ö/ö",
]


async def test_another_content_type(client, untouched, subtests):
    for address in TAKE_JSON:
        for other in OTHER_CONTENT_TYPES:
            with subtests.test(f"{address} {other}"):
                headers = {} if other is None else {"Content-Type": other}
                skipped = ["Content-Type"] if other is None else []
                answer = await ask(client, *address.split(), data=NEW, headers=headers, skip_auto_headers=skipped)
                answer.problem(415, "unsupported_media_type")
                await untouched()


async def test_a_compressed_body(client, untouched, subtests):
    """Not understood: so there is no bomb to defuse, and no half of a result that broke off."""
    bodies = {
        "gzip": gzip.compress(NEW),
        "x-gzip": gzip.compress(NEW)[:10],
        "GZIP": gzip.compress(b" " * 50 * MiB),
        **dict.fromkeys(("deflate", "br", "zstd", "tea", "gzip, gzip"), NEW),
    }
    for address in (*TAKE_JSON, "PUT /jobs/x/result"):
        for encoding, body in bodies.items():
            with subtests.test(f"{address} {encoding}"):
                headers = JSON | {"Content-Encoding": encoding}
                answer = await ask(client, *address.split(), data=body, headers=headers)
                answer.problem(415, "unsupported_media_type")
                await untouched()


# Values that no field takes

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


async def refuse(client, untouched: Untouched, address: str, body: str, status: int) -> None:
    answer = await ask(client, *address.split(), data=body.encode(), headers=JSON)
    answer.problem(status, {400: "malformed", 422: "validation_failed"}[status])
    await untouched()


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


async def test_names_nobody_knows(client, untouched, subtests):
    for address, known in [
        ("POST /jobs", '"type":"x",'),
        ("PATCH /jobs/x", ""),
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


# Sizes


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 256 * 1024):
        yield body[start : start + 256 * 1024]


def padded(body: bytes, size: int) -> bytes:
    return body + b" " * (size - len(body))


SIZES = [
    # address, a body that is fine, the most it may be padded to
    ("POST /jobs", NEW, 1 * MiB),
    ("POST /jobs", b"[" + NEW + b"]", 8 * MiB),
    ("PATCH /jobs", b'[{"id":"nobody"}]', 8 * MiB),
    ("PATCH /jobs/x", b"{}", 1 * MiB),
    ("POST /jobs/x/cancel", b"{}", 1 * MiB),
    ("POST /jobs/done/retry", b"{}", 1 * MiB),
    ("PUT /jobs/x/result", b"", 16 * MiB),
]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large(client, untouched, subtests, chunked):
    for address, body, most in SIZES:
        for size in (most + 1, 17 * MiB):
            with subtests.test(f"{address} {size}"):
                too_large = padded(body, size)
                data = in_chunks(too_large) if chunked else io.BytesIO(too_large)
                answer = await ask(client, *address.split(), data=data, headers=JSON)
                answer.problem(413, "too_large")
                await untouched()


async def test_a_body_of_just_the_size_is_read(client, subtests):
    await create(client, id="x")
    await create(client, id="done")
    for address, body, most in SIZES:
        with subtests.test(f"{address} {most}"):
            answer = await ask(client, *address.split(), data=io.BytesIO(padded(body, most)), headers=JSON)
            if address.startswith(("POST /jobs/done", "PUT")):
                answer.problem(409, "invalid_transition" if "retry" in address else "result_final")  # it was read
            else:
                assert answer.status in (200, 201)


async def test_a_size_that_is_only_announced_is_refused_at_once(client, untouched):
    for address in ("POST /jobs", "PATCH /jobs/x", "PUT /jobs/x/result"):
        async with connected(client) as socket:
            await socket.say(head(client, address, "Content-Type: application/json", f"Content-Length: {10**12}"))
            (await socket.answer()).problem(413, "too_large")
            await untouched()


# Paths, queries, headers

POST = "POST /jobs"
TYPED = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"


NO_IDS = (
    "%00 x%00 %0a x%0a x%0d%0aX-Evil:1 . .. %2e%2e %2E %2f x%2f x%2F..%2Fdone ..%2f..%2fetc%2fpasswd %5c.. %ff %ed%a0%80 "
    "%c0%80 %F0%9F%98%80 %zz % %2 %2500 x%20 %20x x'-- x;y x,done x*y -x .x _x $x {job_id} %7Bjob_id%7D x%3Fy x%23y "
    "'%20or%201=1-- %E2%80%AE ./x x+x"
)


async def test_ids_that_no_job_can_have(client, untouched, subtests):
    for address in (
        "GET /jobs/{}",
        "GET /jobs/{}/status",
        "GET /jobs/{}/result",
        "GET /jobs/{}/history",
        "DELETE /jobs/{}",
    ):
        async with connected(client) as socket:
            for job_id in [*NO_IDS.split(), "x" * 129, "x" * 5000]:
                with subtests.test(f"{address} {job_id[:40]}"):
                    await socket.say(head(client, address.format(job_id)))
                    answer = await socket.answer()
                    said = answer.problem(404, "unknown_path" if "/" in job_id or "job_id" in job_id else "not_found")
                    assert said["instance"] == address.format(job_id).partition(" ")[2]
                    assert "X-Evil" not in answer.headers
                    await untouched()


async def test_strange_queries(client, untouched, subtests):
    async with connected(client) as socket:
        for query, name in {
            "%00=1": "\0",
            "%ff=1": "�",
            "%ed%a0%80=1": "���",
            "=": "",
            "=x": "",
            "a[]=1": "a[]",
            "limit[$gt]=1": "limit[$gt]",
            "limit": "limit",
            "limit=": "limit",
            "limit=%00": "limit",
            "limit=%ff": "limit",
            "limit=1e9": "limit",
            "limit=" + "9" * 5000: "limit",
            "after_version=-1": "after_version",
            "after_version=18446744073709551616": "after_version",
            "after_version=1;drop": "after_version",
            "x" * 5000: "x" * 5000,
            "&".join(f"a{n}" for n in range(1000)): "a0",
        }.items():
            with subtests.test(query[:40]):
                await socket.say(head(client, f"GET /jobs/x/history?{query}"))
                assert name in fields_of(await socket.answer())
                await untouched()


HEADERS: list[tuple[str, list[str | bytes], int, str]] = [
    # address, header lines, status, error_type
    ("PATCH /jobs/x", [b"If-Match: \xff"], 412, "precondition_failed"),
    ("DELETE /jobs/x", [b"If-Match: \xff\xfe"], 412, "precondition_failed"),
    ("PUT /jobs/x/result", ['If-Match: "\'; drop table jobs; --"'], 412, "precondition_failed"),
    ("POST /jobs/x/cancel", ["If-Match: " + ",".join(['"1-1"'] * 1000)], 412, "precondition_failed"),
    ("DELETE /jobs/x", ['If-Match: "1-1"', 'If-Match: W/"1-1"'], 412, "precondition_failed"),
    ("GET /jobs/nobody", [b"If-None-Match: \xff"], 404, "not_found"),
    ("POST /jobs", [b"Idempotency-Key: \xff"], 422, "validation_failed"),
    ("POST /jobs", ["Idempotency-Key: a\tb"], 422, "validation_failed"),
    ("POST /jobs", ["Idempotency-Key: " + "x" * 300], 422, "validation_failed"),
    ("POST /jobs", ["Idempotency-Key:"], 422, "validation_failed"),
    ("POST /jobs", ["Content-Type: text/plain"], 415, "unsupported_media_type"),
    ("POST /jobs", [b"Content-Type: \xff/\xff"], 415, "unsupported_media_type"),
    ("PUT /jobs/x/result", [b"Content-Type: text/\xff"], 415, "unsupported_media_type"),
    ("PUT /jobs/x/result", ["Content-Type: " + "x" * 256], 415, "unsupported_media_type"),
    ("PUT /jobs/x/result", ["Content-Type: a\tb"], 415, "unsupported_media_type"),
    ("GET /jobs/nobody", [b"Accept: \xff", "Accept-Encoding: " + "x" * 5000, "Range: bytes=0-"], 404, "not_found"),
    ("GET /jobs/nobody", [f"X-{n}: x" for n in range(100)], 404, "not_found"),
]


async def test_strange_headers(client, untouched, subtests):
    for address, lines, status, error_type in HEADERS:
        with subtests.test(f"{address} {str(lines[0])[:40]}"):
            body = NEW if address == POST else b"{}"
            more = [] if "Content-Type" in str(lines) else [TYPED]
            async with connected(client) as socket:
                await socket.say(head(client, address, *lines, *more, f"Content-Length: {len(body)}") + body)
                (await socket.answer()).problem(status, error_type)
            await untouched()


KEYS: list[tuple[bytes, int]] = [
    (b"X-API-Key: \xff\xfe", 401),
    ("X-API-Key: ööö".encode(), 401),
    (b"X-API-Key: \xed\xa0\x80", 401),
    (b"X-API-Key: jw_\0", 400),
    (b"X-API-Key: jw_\x01", 400),
    (b"X-API-Key:", 401),
    (b"X-API-Key: " + b"x" * 201, 401),
    (b"X-API-Key: " + b"x" * 8000, 401),
    (b"X-API-Key: " + b"x" * 9000, 400),
    (b"X-API-Key: ' or 1=1 --", 401),
    (b"X-API-Key: jw_a\r\n b", 400),
    (b"Authorization: Bearer", 401),
    (b"Authorization: Bearer \xff", 401),
    (b"Authorization: Bearer a b c", 401),
    (b"Authorization: Bearer " + b"x" * 300, 401),
    (b"Authorization: \xff", 401),
    (b"Authorization:", 401),
    (b"Cookie: X-API-Key=a", 401),
]


async def test_strange_keys(client, untouched, subtests):
    for line, status in KEYS:
        with subtests.test(str(line[:40])):
            async with connected(client) as socket:
                await socket.say(b"DELETE /jobs/x HTTP/1.1\r\nHost: here\r\n" + line + b"\r\n\r\n")
                (await socket.answer()).problem(status, {400: "malformed", 401: "unauthorized"}[status])
            await untouched()


# What is hardly HTTP


def unparsable(client) -> dict[str, bytes]:
    return {
        "words": b"what is this about\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        "Redis": b"*1\r\n$4\r\nPING\r\n\r\n",
        "NULs": b"\0" * 1000 + b"\r\n\r\n",
        "HTTP/9.9": head(client, "GET /jobs/x").replace(b"HTTP/1.1", b"HTTP/9.9"),
        "no Host": b"GET /jobs/x HTTP/1.1\r\n\r\n",
        "two Hosts": head(client, "GET /jobs/x", "Host: there"),
        "a NUL in Host": head(client, "GET /jobs/x").replace(b"here", b"he\0re"),
        "an unknown method": head(client, "BREW /jobs/x"),
        "a method in lower case": head(client, "delete /jobs/x"),
        "a long method": b"A" * 9000 + b" / HTTP/1.1\r\nHost: here\r\n\r\n",
        "a space in the path": head(client, "DELETE /jobs/x y"),
        "a raw NUL in the path": head(client, "DELETE /jobs/\0"),
        "raw bytes in the path": b"DELETE /jobs/\xff HTTP/1.1\r\nHost: here\r\n\r\n",
        "a path without slash": head(client, "DELETE jobs/x"),
        "a bad absolute address": head(client, "DELETE http://[::1/jobs/x"),
        "a path of 9 KB": head(client, "GET /jobs/" + "x" * 9000),
        "a path of 90 KB": head(client, "GET /jobs/" + "x" * 90_000),
        "a query of 9 KB": head(client, "GET /jobs/x?a=" + "x" * 9000),
        "a header of 9 KB": head(client, "GET /jobs/x", "X-A: " + "x" * 9000),
        "a header's name of 9 KB": head(client, "GET /jobs/x", "x" * 9000 + ": a"),
        "200 headers": head(client, "GET /jobs/x", *(f"X-{n}: x" for n in range(200))),
        "a space in a header's name": head(client, "GET /jobs/x", "X A: b"),
        "no colon": head(client, "GET /jobs/x", "nonsense"),
        "a folded header": head(client, "GET /jobs/x", "X-A: b", " c"),
        "a lone LF": head(client, "GET /jobs/x", b"X-A: b\nX-C: d"),
        "a lone CR": head(client, "GET /jobs/x", b"X-A: b\rX-C: d"),
        "a length in words": head(client, POST, TYPED, "Content-Length: abc"),
        "a negative length": head(client, POST, TYPED, "Content-Length: -1"),
        "a length with a sign": head(client, POST, TYPED, "Content-Length: +12") + NEW,
        "a length beyond 64 bits": head(client, POST, TYPED, f"Content-Length: {2**70}"),
        "two lengths": head(client, POST, TYPED, "Content-Length: 12", "Content-Length: 13") + NEW,
        "a length and chunks": head(client, POST, TYPED, CHUNKED, "Content-Length: 12") + b"0\r\n\r\n",
        "an unknown transfer encoding": head(client, POST, TYPED, "Transfer-Encoding: tea"),
        "identity": head(client, POST, TYPED, "Transfer-Encoding: identity"),
        "chunked twice": head(client, POST, TYPED, "Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
        "chunked, but not last": head(client, POST, TYPED, "Transfer-Encoding: chunked, gzip") + b"0\r\n\r\n",
        "a bad chunk at once": head(client, POST, TYPED, CHUNKED) + b"zz\r\n{}\r\n0\r\n\r\n",
    }


async def test_what_cannot_be_parsed(client, untouched, subtests):
    for name, said in unparsable(client).items():
        with subtests.test(name):
            async with connected(client) as socket:
                await socket.say(said)
                (await socket.answer()).problem(400, "malformed")
                assert await socket.reader.read() == b""  # nobody can say where the next request would begin
            await untouched()


BROKEN_CHUNKS = {
    "a size that is none": [b"zz\r\n{}\r\n0\r\n\r\n"],
    "a size beyond 64 bits": [b"f" * 20 + b"\r\n" + NEW + b"\r\n0\r\n\r\n"],
    "a negative size": [b"-1\r\n" + NEW + b"\r\n0\r\n\r\n"],
    "more than its size": [b"1\r\n" + NEW + b"\r\n0\r\n\r\n"],
    "a bad one after a good one": [b"c\r\n" + NEW + b"\r\n", b"xx\r\n"],
    "a bad trailer": [b"c\r\n" + NEW + b"\r\n0\r\n", b"bad trailer\r\n\r\n"],
}


async def test_a_body_that_stops_making_sense_while_it_is_read(client, untouched, subtests):
    for name, parts in BROKEN_CHUNKS.items():
        for address in (POST, "PUT /jobs/x/result?complete=true"):
            with subtests.test(f"{address} {name}"):
                async with connected(client) as socket:
                    await socket.say(head(client, address, TYPED, CHUNKED, "Expect: 100-continue"))
                    assert await socket.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                    await socket.say(*parts)
                    (await socket.answer()).problem(400, "malformed")
                    assert await socket.reader.read() == b""
                await untouched()


async def test_an_expectation_that_cannot_be_met(client, untouched, subtests):
    for expectation in ["tea", "200-ok", "100-continue, tea", "\xff"]:
        with subtests.test(expectation):
            async with connected(client) as socket:
                line = b"Expect: " + expectation.encode("latin-1")
                await socket.say(head(client, POST, TYPED, line, f"Content-Length: {len(NEW)}"), NEW)
                (await socket.answer()).problem(417, "expectation_failed")
            await untouched()


async def test_odd_requests_that_are_http(client, untouched, subtests):
    for address, status, error_type in [
        ("OPTIONS *", 404, "unknown_path"),
        ("CONNECT here:80", 404, "unknown_path"),
        ("GET //jobs/x", 404, "unknown_path"),
        ("GET /jobs//x", 404, "unknown_path"),
        ("GET /jobs/x/../done", 404, "unknown_path"),
        ("GET http://evil.example/jobs/nobody", 404, "not_found"),
        ("TRACE /jobs/x", 405, "method_not_allowed"),
        ("PUT /jobs/x", 405, "method_not_allowed"),
    ]:
        with subtests.test(address):
            async with connected(client) as socket:
                await socket.say(head(client, address))
                (await socket.answer()).problem(status, error_type)
            await untouched()


async def test_requests_before_and_after_a_refusal_on_one_connection(client, untouched):
    async with connected(client) as socket:
        await socket.say(
            head(client, "GET /jobs/x"),
            head(client, POST, TYPED, "Content-Length: 1") + b"{",
            head(client, "GET /jobs/nobody"),
            head(client, "GET /jobs/done"),
        )
        assert [(await socket.answer()).status for _ in range(4)] == [200, 400, 404, 200]
    await untouched()


# Connections that are cut

CUTS: dict[str, Callable[[Any], bytes]] = {
    "in the request line": lambda client: b"POST /jo",
    "in the head": lambda client: head(client, POST, TYPED)[:-4],
    "before the body": lambda client: head(client, POST, TYPED, f"Content-Length: {len(NEW)}"),
    "in the body": lambda client: head(client, POST, TYPED, f"Content-Length: {len(NEW)}") + NEW[:-1],
    "in a chunk": lambda client: head(client, POST, TYPED, CHUNKED) + b"c\r\n" + NEW[:-1],
    "before the last chunk": lambda client: head(client, POST, TYPED, CHUNKED) + b"c\r\n" + NEW + b"\r\n",
    "in a report": lambda client: head(client, "PATCH /jobs/x", TYPED, "Content-Length: 3") + b"{}",
    "in a result": lambda client: (
        head(client, "PUT /jobs/x/result?complete=true", "Content-Length: 1000000") + b"x" * 999_999
    ),
}


async def test_a_connection_that_ends_in_the_middle_of_a_request(client, untouched, subtests):
    for how in ["cut", "closed"]:
        for name, said in CUTS.items():
            with subtests.test(f"{how} {name}"):
                async with connected(client) as socket:
                    await socket.say(said(client))
                    assert (await ask(client, "GET", "/healthz")).status == 200  # by now it has been read
                    if how == "cut":
                        socket.cut()
                assert (await ask(client, "GET", "/jobs/x")).status == 200
                await untouched()


async def test_who_hangs_up_before_the_answer_has_created_a_whole_job_or_none(client, sql):
    for n in range(20):
        async with connected(client) as socket:
            body = json.dumps({"type": "x", "id": f"cut-{n}", "batch_id": "b"}).encode()
            await socket.say(head(client, POST, TYPED, f"Content-Length: {len(body)}") + body)
            socket.cut()
    await create(client, id="after")
    jobs = await sql.fetchval("select count(*) from jobs where id like 'cut-%'")
    assert await sql.fetchval("select count(*) from job_history where job_id like 'cut-%'") == jobs
    assert await sql.fetchval("select coalesce(sum(total), 0) from batches") == jobs
    for n in range(20):
        assert (await ask(client, "GET", f"/jobs/cut-{n}")).status in (200, 404)


async def test_idle_and_half_open_connections_hold_nobody_up(client, untouched):
    async with asyncio.TaskGroup() as group:
        for n in range(50):
            group.create_task(hang(client, head(client, POST, TYPED, "Content-Length: 12")[: n * 5]))
    assert (await ask(client, "GET", "/jobs/x")).status == 200


async def hang(client, said: bytes) -> None:
    async with connected(client) as socket:
        await socket.say(said)
        assert (await ask(client, "GET", "/jobs/x")).status == 200
