"""What is hardly HTTP, and connections that are cut."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import service.requests
from tests.hostile import CHUNKED, NEW, POST, TYPED
from tests.http import ask, connected, create, head

MiB = 2**20
READING = (
    "GET /jobs",
    "GET /jobs/status?job_ids=x",
    "GET /jobs/batch/b",
    "GET /jobs/x",
    "GET /jobs/x/status",
    "GET /jobs/done/result",
    "GET /jobs/x/history",
)

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
        "a CRLF behind a space in the query": head(client, "GET /jobs?tags=a \r\nX-Evil: 1"),
        "a space in the query": head(client, "GET /jobs/status?job_ids=a b"),
        "a raw NUL in the query": head(client, "GET /jobs/status?job_ids=\0"),
        "raw bytes in the query": head(client, "GET /jobs?tags=").replace(b"tags=", b"tags=\xff"),
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


SMUGGLED = b"DELETE /jobs/x HTTP/1.1\r\nHost: here\r\nX-API-Key: KEY\r\n\r\n"


async def test_the_body_of_a_request_is_never_the_next_request(client, key, untouched, subtests):
    """Also where nobody reads it: it is skipped, or the connection ends."""
    inner = SMUGGLED.replace(b"KEY", key.encode())
    bodies = {
        f"Content-Length: {len(inner)}": inner,
        CHUNKED: b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner),
        f"Content-Length: {2 * MiB}": inner + b" " * (2 * MiB - len(inner)),
    }
    for address in (
        *READING,
        "GET /jobs/nobody",
        "GET /nowhere",
        "GET /jobs?limit=0",
        "POST /jobs/status",
        "PUT /jobs",
    ):
        for line, body in bodies.items():
            with subtests.test(f"{address} {line}"):
                async with connected(client) as socket:
                    await socket.say(
                        head(client, address, TYPED, line) + body, head(client, "GET /jobs/done", "Connection: close")
                    )
                    answers = [await socket.answer()]
                    with contextlib.suppress(IndexError):
                        answers.append(await socket.answer())
                    assert len(answers) == 1 or answers[1].json()["id"] == "done"
                    assert await socket.reader.read() == b""
                await untouched()


async def test_a_line_end_in_an_address_ends_the_address(client, untouched):
    """What is left is HTTP before 1.0, and what follows are headers of the request, never of the answer."""
    for address in (
        "GET /jobs?tags=a\r\nX-Evil: 1",
        "GET /jobs/nobody\r\nX-Evil: 1",
        "GET /jobs/batch/nobody\r\nX-Evil: 1",
    ):
        async with connected(client) as socket:
            await socket.say(head(client, address))
            answer = await socket.answer()
            assert answer.status == 404 or answer.json()["jobs"] == []
            assert "X-Evil" not in answer.headers and b"Evil" not in answer.body
        await untouched()


async def test_an_upgrade_that_is_not_offered_changes_nothing(client, untouched, subtests):
    for address in READING:
        for protocol in ("websocket", "h2c", "tcp", "TLS/1.0", "jw/1"):
            if protocol == "websocket" and address.endswith("/status"):
                continue  # that one is offered
            with subtests.test(f"{address} {protocol}"):
                async with connected(client) as socket:
                    lines = ("Connection: Upgrade", f"Upgrade: {protocol}", "Sec-WebSocket-Version: 13")
                    lines += ("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",)
                    await socket.say(head(client, address, *lines))
                    assert (await socket.answer()).status == 200
                    await socket.say(head(client, "GET /jobs/done", "Connection: close"))
                    with contextlib.suppress(IndexError):  # it may as well end
                        assert (await socket.answer()).json()["id"] == "done"
                    assert await socket.reader.read() == b""
                await untouched()


async def test_a_body_that_never_ends_is_not_waited_for(client, untouched, monkeypatch, subtests):
    """Where a body is read, for a while; where none is, the answer is there at once. Others notice nothing."""
    monkeypatch.setattr(service.requests, "STALLED_BODY_s", 0.2)
    begun = {"Content-Length: 1000": b"{", CHUNKED: b"1\r\n{\r\n", "Transfer-Encoding: Chunked": b"5;x=y\r\n{"}
    for address in ("POST /jobs/status", "POST /jobs/batch/b/close", *READING, "GET /jobs/nobody"):
        for line, body in begun.items():
            with subtests.test(f"{address} {line}"):
                async with connected(client) as socket:
                    await socket.say(head(client, address, TYPED, line) + body)
                    answer = await socket.answer()
                    if address.startswith("POST"):
                        answer.problem(400, "malformed")
                    else:
                        assert answer.status in (200, 404)
                    assert (await ask(client, "GET", "/jobs/x")).status == 200
                await untouched()


async def test_chunks_that_never_end_are_refused_once_they_are_too_much(client, untouched):
    for address in ("POST /jobs/status", "POST /jobs/batch/b/close"):
        async with connected(client) as socket:
            chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            await socket.say(head(client, address, TYPED, CHUNKED), *[chunk] * 20)
            (await socket.answer()).problem(413, "too_large")
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
