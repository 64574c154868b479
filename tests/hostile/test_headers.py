"""Headers and keys that nobody in their right mind sends."""

from tests.hostile import NEW, POST, TYPED
from tests.http import connected, head

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
