"""Paths, queries, headers and keys that nobody in their right mind sends."""

from tests.hostile import NEW, POST, TYPED
from tests.http import connected, fields_of, head

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
