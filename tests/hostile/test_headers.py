"""Headers and keys that nobody in their right mind sends."""

from collections.abc import Iterator

import pytest

from tests.hostile import NEW, POST, TYPED
from tests.http import ask, connected, head

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
    (b"X-API-Key: jw_a\rX-Evil: 1", 400),
    (b"X-API-Key : jw_a", 400),
    (b"api-key: jw_a, jw_b", 401),
    (b"Authorization: Bearer", 401),
    (b"Authorization: Bearer \xff", 401),
    (b"Authorization: Bearer a b c", 401),
    (b"Authorization: Bearer " + b"x" * 300, 401),
    (b"Authorization: \xff", 401),
    (b"Authorization:", 401),
    (b"Cookie: X-API-Key=a", 401),
]


@pytest.mark.parametrize(
    "address",
    [
        *("DELETE /jobs/x", "GET /jobs", "GET /jobs/x", "GET /jobs/status?job_ids=x", "GET /jobs/batch/b"),
        *("GET /jobs/x/history", "GET /jobs/x/events", "POST /jobs/status", "POST /jobs/batch/b/close"),
    ],
)
async def test_strange_keys(client, untouched, subtests, address):
    for line, status in KEYS:
        with subtests.test(str(line[:40])):
            async with connected(client) as socket:
                await socket.say(f"{address} HTTP/1.1\r\nHost: here\r\n".encode() + line + b"\r\n\r\n")
                (await socket.answer()).problem(status, {400: "malformed", 401: "unauthorized"}[status])
            await untouched()


def several_keys(key: str) -> list[tuple[list[str], int]]:
    """Header lines, and the status they deserve."""
    right, wrong = f"Authorization: Bearer {key}", "Authorization: Bearer wrong"
    return [
        ([f"x-api-KEY: {key}"], 200),
        ([f"Authorization: bEARER   {key}"], 200),
        ([f"X-API-Key: {key}", "X-API-Key: wrong"], 200),
        (["X-API-Key: wrong", f"X-API-Key: {key}"], 401),
        ([f"api-key: {key}", "api-key: wrong"], 200),
        (["api-key: wrong", f"X-API-Key: {key}"], 200),
        ([f"api-key: {key}", "X-API-Key: wrong"], 401),
        ([right, "api-key: wrong"], 401),
        ([wrong, f"api-key: {key}"], 200),
        (["X-API-Key:", f"api-key: {key}"], 200),
        (["X-API-Key:", "api-key:", right], 200),
        ([right, wrong], 200),
        ([wrong, right], 401),
        (["Authorization: Basic d3Jvbmc6", right], 401),
        ([right.replace("Bearer", "Basic")], 401),
        ([right.replace("Bearer ", "Bearer\t")], 401),
        ([right.replace("Bearer ", "Bearer")], 401),
        ([right.replace("Bearer ", "")], 401),
        ([f'X-API-Key: "{key}"'], 401),
        ([f"X-API-Key: {key}, {key}"], 401),
        ([f"X-API-Key: Bearer {key}"], 401),
        ([f"X-API-Key: {key[:-1]}"], 401),
        ([f"X-API-Key: {key.swapcase()}"], 401),
    ]


@pytest.mark.parametrize("address", ["GET /jobs/x", "GET /jobs", "GET /jobs/batch/b"])
async def test_of_several_keys_the_first_counts(client, key, untouched, subtests, address):
    """X-API-Key, then api-key, then Authorization; of several lines the first; an empty one is none."""
    for lines, status in several_keys(key):
        with subtests.test(str(lines).replace(key, "KEY")):
            async with connected(client) as socket:
                await socket.say("\r\n".join([f"{address} HTTP/1.1", "Host: here", *lines, "", ""]).encode())
                assert (await socket.answer()).status == status
            await untouched()


READ = [
    # addresses that answer 200
    *("GET /jobs", "GET /jobs?limit=1&order=asc", "GET /jobs/status?job_ids=x,nobody&include_progress=true"),
    *("GET /jobs/batch/b", "GET /jobs/batch/b?include_progress=true", "GET /jobs/x", "GET /jobs/x/status"),
    *("GET /jobs/x/history", "GET /jobs/done/result", "POST /jobs/status"),
]
HARMLESS: list[str | bytes] = [
    b"Accept: \xff",
    "Accept: text/html, application/xml;q=0.9",
    "Accept-Encoding: gzip, br, zstd, deflate",
    "Accept-Encoding: " + "x" * 5000,
    "Accept-Charset: utf-16",
    "Range: bytes=0-0",
    "If-Range: *",
    "If-Modified-Since: Fri, 31 Dec 9999 23:59:59 GMT",
    "If-Unmodified-Since: Thu, 01 Jan 1970 00:00:00 GMT",
    'If-Match: "1-1"',
    "X-HTTP-Method-Override: DELETE",
    "X-Original-URL: /jobs/done",
    "X-Rewrite-URL: /jobs/done",
    "X-Forwarded-For: ' or 1=1 --, 999.999.999.999, ::ffff:, \t",
    "X-Forwarded-Host: evil.example",
    "Forwarded: for=evil;host=evil",
    "Upgrade: h2c",
    "Connection: Upgrade, HTTP2-Settings, X-API-Key, Content-Length",
    "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    "TE: trailers, gzip",
    "Trailer: X-API-Key",
    "Idempotency-Key: ",
    "Last-Event-ID: 1-1",
    "Cache-Control: only-if-cached, max-stale=99999999",
    "Cookie: " + "a=b; " * 1000,
    "Origin: null",
    "Origin: https://evil.example",
    "Access-Control-Request-Method: DELETE",
    *(f"X-{n}: {'x' * 8000}" for n in (1, 2)),
]


async def test_headers_that_change_nothing_of_what_is_read(client, untouched, subtests):
    for address in READ:
        body = b'{"job_ids":["x","nobody"]}' if address.startswith("POST") else b""
        length = [TYPED, f"Content-Length: {len(body)}"] if body else []
        async with connected(client) as socket:
            await socket.say(head(client, address, *length) + body)
            plain = await socket.answer()
            assert plain.status == 200
            for lines in [*([line] for line in HARMLESS), HARMLESS]:
                with subtests.test(f"{address} {str(lines)[:40]}"):
                    await socket.say(head(client, address, *lines, *length) + body)
                    answer = await socket.answer()
                    assert (answer.status, answer.body) == (200, plain.body)
                    assert set(answer.headers) == set(plain.headers)
                    await untouched()


async def test_too_much_of_headers(client, untouched, subtests):
    for address in [*READ, "GET /jobs/x/events", "POST /jobs/batch/b/close"]:
        for lines in (["X-A: " + "x" * 9000], ["x" * 9000 + ": a"], [f"X-{n}: x" for n in range(200)]):
            with subtests.test(f"{address} {lines[0][:20]}"):
                async with connected(client) as socket:
                    await socket.say(head(client, address, *lines, "Content-Length: 0"))
                    (await socket.answer()).problem(400, "malformed")
                await untouched()


NO_REQUEST_IDS = [
    *(b"", b"a b", b"a,b", b'"a"', b"a\tb", b"<script>alert(1)</script>", b"%0d%0aX-Evil:%201", b"a;b", b"../x"),
    *("é".encode(), b"\xff", "\u2028".encode(), "٣".encode(), b"x" * 129, b"x" * 8000),
]


async def test_a_request_id_that_is_not_sane_is_replaced(client, untouched, subtests):
    for address in [*READ[:-1], "GET /jobs/nobody", "GET /jobs?limit=0", "GET /jobs/batch/nobody", "GET /nowhere"]:
        async with connected(client) as socket:
            taken = set()
            for given in NO_REQUEST_IDS:
                with subtests.test(f"{address} {given[:40]!r}"):
                    await socket.say(head(client, address, b"X-Request-Id: " + given))
                    answer = await socket.answer()
                    [own] = answer.headers.getall("X-Request-Id")
                    assert own.replace("-", "").isalnum() and own.encode() != given
                    assert answer.status == 200 or answer.json()["request_id"] == own
                    taken.add(own)
            assert len(taken) == len(NO_REQUEST_IDS), "each gets an id of its own"
            await socket.say(head(client, address, "X-Request-Id: sane.id_1:2-3", "X-Request-Id: other"))
            assert (await socket.answer()).headers.getall("X-Request-Id") == ["sane.id_1:2-3"]
            await untouched()


def lists_of_tags(etag: str) -> Iterator[tuple[list[bytes], int]]:
    """Lines of If-None-Match and the status they deserve: 304 only where it is sure that the client has this version."""
    bare = etag.strip('"')
    others = ", ".join(['"1-1"'] * 600)
    has = [
        etag,
        f"W/{etag}",
        f'"a", {etag}',
        f",,{etag} ,",
        f"{etag}, ö",
        f'"{"x" * 3000}",{etag}',
        f"{others}, {etag}",
    ]
    has += [f'"a"\r\nIf-None-Match: {etag}', "*", " * "]
    lacks = [
        "",
        '"',
        '""',
        ",,,",
        bare,
        f'"{bare}',
        f'{bare}"',
        f"'{bare}'",
        f'"{bare}x"',
        f'"x{bare}"',
        etag * 2,
        others,
    ]
    lacks += [
        f"w/{etag}",
        f"W/W/{etag}",
        f"W /{etag}",
        f"%22{bare}%22",
        '"*"',
        "W/*",
        '"a", *',
        "*, *",
        "1",
        "' or 1=1 --",
    ]
    lacks += ["\udcff", "x" * 8000]
    for lines, status in [*((line, 304) for line in has), *((line, 200) for line in lacks)]:
        yield f"If-None-Match: {lines}".encode("utf-8", "surrogateescape").split(b"\r\n"), status


async def test_only_who_has_this_version_is_told_that_nothing_changed(client, untouched, subtests):
    for address in ("GET /jobs/x", "GET /jobs/x/status", "GET /jobs/batch/b", "GET /jobs/done/result"):
        etag = (await ask(client, *address.split())).headers["ETag"]
        async with connected(client) as socket:
            for lines, status in lists_of_tags(etag):
                for more in ([], ["Prefer: wait=0"]):
                    with subtests.test(f"{address} {lines[0][:60]!r} {more}"):
                        await socket.say(head(client, address, *lines, *more))
                        answer = await socket.answer()
                        assert (answer.status, answer.headers["ETag"]) == (status, etag)
                        assert bool(answer.body) == (status == 200)
        await untouched()


async def test_a_last_event_id_that_is_none_gets_the_present_state(client, untouched, subtests):
    """Never silence; only the exact id of the finished state ends the stream at once."""
    etag = (await ask(client, "GET", "/jobs/done")).headers["ETag"]
    known = etag.strip('"')
    strange = ["", "x", "*", etag, f"W/{etag}", f"{known},{known}", f"{known} x", f"0{known}", known + "0", "9" * 8000]
    strange += ["-1--1", "1-1", "99-9999999999999", "' or 1=1 --", "é", "\u2028", "a\tb", "٣-٣"]
    for last_id in strange:
        for asked in ({"headers": {"Last-Event-ID": last_id}}, {"params": {"last_event_id": last_id}}):
            if "params" in asked and len(last_id) > 5000:
                continue  # no address is that long
            with subtests.test(f"{last_id[:40]} {list(asked)}"):
                answer = await ask(client, "GET", "/jobs/done/events", **asked)
                assert answer.status == 200
                [_, event_id, name, data] = answer.body.decode().strip().replace("\n\n", "\n").split("\n")
                assert (event_id, name, data[:24]) == (f"id: {known}", "event: status", 'data: {"id":"done","stat')
                await untouched()
    assert (await ask(client, "GET", "/jobs/done/events", headers={"Last-Event-ID": known})).status == 204
    assert (await ask(client, "GET", f"/jobs/done/events?last_event_id={known}")).status == 204
