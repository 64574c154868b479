"""Bodies that are no JSON, not what the address takes, compressed, or too large."""

import gzip
import io
from collections.abc import AsyncIterator

import pytest

from tests.hostile import NEW
from tests.http import JSON, ask, connected, create, fields_of, head

MiB = 2**20

# What is no JSON, or not what the address takes

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
MAY_BE_EMPTY = ("POST /jobs/x/cancel", "POST /jobs/x/retry", "POST /jobs/batch/b/close")
TAKE_JSON = ("POST /jobs", "POST /jobs/status", "PATCH /jobs", "PATCH /jobs/x", *MAY_BE_EMPTY)


async def test_what_is_not_json(client, untouched, subtests):
    for address in TAKE_JSON:
        for name, body in NOT_JSON.items():
            if name == "nothing" and address in MAY_BE_EMPTY:
                continue
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


async def test_of_a_name_that_stands_twice_the_last_counts(client, untouched):
    """As in every JSON parser at hand; what is refused is refused wherever it stands."""
    twice = b'{"job_ids":["nobody"],"include_progress":5,"job_ids":["x"],"include_progress":false}'
    answer = await ask(client, "POST", "/jobs/status", data=twice, headers=JSON)
    assert answer.json() == {"jobs": [{"job_id": "x", "status": "queued", "version": 1}]}
    twice = b'{"job_ids":["x"],"job_ids":"' + b"x," * 500 + b'x"}'
    assert fields_of(await ask(client, "POST", "/jobs/status", data=twice, headers=JSON)) == ["job_ids"]


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
    ("POST /jobs/status", b'{"job_ids":["x"]}', 1 * MiB),
    ("POST /jobs/batch/b/close", b"{}", 1 * MiB),
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
    await create(client, id="x", batch_id="b")
    await create(client, id="done")
    for address, body, most in SIZES:
        with subtests.test(f"{address} {most}"):
            answer = await ask(client, *address.split(), data=io.BytesIO(padded(body, most)), headers=JSON)
            if address.startswith(("POST /jobs/done", "PUT")):
                answer.problem(409, "invalid_transition" if "retry" in address else "result_final")  # it was read
            else:
                assert answer.status in (200, 201)


async def test_a_size_that_is_only_announced_is_refused_at_once(client, untouched):
    for address in (*TAKE_JSON, "PUT /jobs/x/result"):
        async with connected(client) as socket:
            await socket.say(head(client, address, "Content-Type: application/json", f"Content-Length: {10**12}"))
            (await socket.answer()).problem(413, "too_large")
            await untouched()
