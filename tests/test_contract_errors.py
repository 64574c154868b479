"""The contract's sections Errors and Common rules: who is let in, and how every refusal looks."""

import io
from typing import Any

from redis.asyncio import Redis

from service.identity import READ, WRITE
from tests.conftest import make_key
from tests.http import JSON, ask, connected, create, head, report

READS = (
    "GET /jobs/{}",
    "GET /jobs/{}/status",
    "GET /jobs/{}/result",
    "GET /jobs/{}/results",
    "GET /jobs/{}/history",
    "GET /limits",
)
WRITES = (
    "POST /jobs",
    "PATCH /jobs",
    "PATCH /jobs/{}",
    "PUT /jobs/{}/result",
    "POST /jobs/{}/cancel",
    "POST /jobs/{}/retry",
    "DELETE /jobs/{}",
)
OPEN = ("GET /healthz", "GET /readyz")
BODY = {
    "POST /jobs": b'{"type":"x"}',
    "PATCH /jobs": b'[{"id":"x"}]',
    "PATCH /jobs/{}": b"{}",
    "PUT /jobs/{}/result": b"x",
}
NO_KEY = {"X-API-Key": ""}


async def send(client, address: str, job_id: str = "x", query: str = "", headers: dict[str, str] | None = None):
    """What the address is made for."""
    method, path = address.format(job_id).split()
    return await ask(client, method, path + query, data=BODY.get(address), headers=JSON | (headers or {}))


# Who is let in


async def test_without_a_valid_key_nobody_is_let_in(client, database, sql, redis_url, subtests):
    await create(client, id="x")
    revoked, expired = [await make_key(database, "acme", (scope,)) for scope in ("admin", "webhooks:manage")]
    await sql.execute("update keys set revoked_at = now() where scopes = '{admin}'")
    await sql.execute("update keys set expires_at = now() - interval '1 second' where scopes = '{webhooks:manage}'")
    redis = Redis.from_url(redis_url)
    for address in READS + WRITES:
        await redis.flushdb()  # 30 failed keys a minute are refused otherwise, which is tested elsewhere
        for headers in (
            NO_KEY,
            {"X-API-Key": "jw_" + "x" * 43},
            {"X-API-Key": revoked},
            {"X-API-Key": expired},
            {**NO_KEY, "api-key": "nonsense"},
            {**NO_KEY, "Authorization": "Bearer nonsense"},
            {**NO_KEY, "Authorization": "Basic dXNlcjpwYXNz"},
        ):
            with subtests.test(f"{address} {headers}"):
                answer = await send(client, address, headers=headers)
                answer.problem(401, "unauthorized")
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    await redis.aclose()
    assert await sql.fetchval("select count(*) from jobs where version = 1") == 1


async def test_the_key_comes_in_any_of_three_headers(client, key, subtests):
    await create(client, id="x")
    for headers in [
        {"X-API-Key": "{}"},
        {"x-api-key": "{}"},
        {"api-key": "{}"},
        {"Authorization": "Bearer {}"},
        {"Authorization": "bearer  {} "},
        {"X-API-Key": "{}", "api-key": "another", "Authorization": "Bearer another"},
    ]:
        with subtests.test(str(headers)):
            sent = NO_KEY | {name: value.format(key) for name, value in headers.items()}
            if "x-api-key" in headers:
                del sent["X-API-Key"]
            assert (await ask(client, "GET", "/jobs/x", headers=sent)).status == 200


async def test_a_key_in_the_query_opens_nothing(client, key):
    (await ask(client, "GET", f"/jobs/x?api_key={key}", headers=NO_KEY)).problem(401, "unauthorized")


async def test_a_key_without_the_scope_is_refused(client, database, sql, subtests):
    await create(client, id="x")
    for scope, closed in [(READ, WRITES), (WRITE, READS), ("admin", READS), ("webhooks:manage", WRITES)]:
        narrow = {"X-API-Key": await make_key(database, "acme", (scope,))}
        for address in closed:
            with subtests.test(f"{scope} {address}"):
                said = (await send(client, address, headers=narrow)).problem(403, "forbidden")
                assert said["details"]["needed_scope"] == (WRITE if closed is WRITES else READ)
    assert await sql.fetchval("select count(*) from jobs where version = 1") == 1


async def test_health_is_open_to_all(client):
    for address in OPEN:
        assert (await send(client, address, headers=NO_KEY)).status == 200


# X-Request-Id


async def test_a_sane_request_id_comes_back(client, subtests):
    await create(client, id="x")
    etag = (await ask(client, "GET", "/jobs/x")).headers["ETag"]
    for own in ["abc", "A-b_c.d:e", "0" * 128]:
        with subtests.test(own):
            sent = {"X-Request-Id": own}
            answers = [
                await ask(client, "GET", "/jobs/x", headers=sent),
                await ask(client, "GET", "/jobs/x", headers=sent | {"If-None-Match": etag}),
                await ask(client, "GET", "/healthz", headers=sent),
                await ask(client, "GET", "/jobs/nobody", headers=sent),
                await ask(client, "GET", "/nothing/here", headers=sent),
                await ask(client, "GET", "/jobs/x", headers=sent | NO_KEY),
                await ask(client, "POST", "/jobs", headers=sent | {"Expect": "tea"}),
            ]
            assert [answer.status for answer in answers] == [200, 304, 200, 404, 404, 401, 417]
            assert [answer.headers["X-Request-Id"] for answer in answers] == [own] * 7
            assert answers[3].problem(404, "not_found")["request_id"] == own


async def test_another_request_id_is_replaced_by_a_new_one(client):
    minted = set()
    sent = [None, "", "a b", "ö", "x" * 129, '"quoted"', "<script>", "a,b"]
    for own in sent:
        headers = {} if own is None else {"X-Request-Id": own}
        minted.add((await ask(client, "GET", "/healthz", headers=headers)).headers["X-Request-Id"])
    assert len(minted) == len(sent)
    assert not minted & set(sent)


async def test_what_the_parser_refuses_has_a_request_id_too(client):
    async with connected(client) as socket:
        await socket.say(b"what is this\r\n\r\n")
        assert (await socket.answer()).problem(400, "malformed")["request_id"]


# How refusals look

REFUSALS: list[tuple[str, str, dict[str, Any], int, str, str]] = [
    # method, path, options, status, error_type, title
    ("GET", "/nothing", {}, 404, "unknown_path", "Nothing here"),
    ("GET", "/jobs/", {}, 404, "unknown_path", "Nothing here"),
    ("GET", "/jobs/x/", {}, 404, "unknown_path", "Nothing here"),
    ("GET", "/jobs/x/nothing", {}, 404, "unknown_path", "Nothing here"),
    ("GET", "/favicon.ico", {}, 404, "unknown_path", "Nothing here"),
    ("PUT", "/jobs/x", {}, 405, "method_not_allowed", "Method not allowed"),
    ("POST", "/jobs/x", {}, 405, "method_not_allowed", "Method not allowed"),
    ("POST", "/jobs/x/result", {}, 405, "method_not_allowed", "Method not allowed"),
    ("GET", "/jobs/nobody", {}, 404, "not_found", "Job not found"),
    ("GET", "/jobs/gone", {}, 404, "deleted", "Job not found"),
    ("GET", "/jobs/theirs", {}, 403, "forbidden", "Forbidden"),
    ("GET", "/jobs/x", {"headers": NO_KEY}, 401, "unauthorized", "Unauthorized"),
    ("GET", "/jobs/x/result", {}, 409, "not_finished", "Job not finished"),
    ("GET", "/jobs/failed/result", {}, 409, "no_result", "Job has no result"),
    ("GET", "/jobs/done/result", {}, 404, "result_not_found", "Result not found"),
    ("POST", "/jobs", {"json": {"type": "x", "id": "x"}}, 409, "already_exists", "Job already exists"),
    ("POST", "/jobs", {"json": {"type": "x", "batch_id": "full"}}, 409, "batch_closed", "Batch closed"),
    ("POST", "/jobs", {"json": {}}, 422, "validation_failed", "Validation failed"),
    ("POST", "/jobs", {"data": b"{", "headers": JSON}, 400, "malformed", "Malformed request"),
    ("POST", "/jobs", {"data": b"{}"}, 415, "unsupported_media_type", "Unsupported media type"),
    ("POST", "/jobs", {"data": io.BytesIO(b" " * (8 * 2**20 + 1)), "headers": JSON}, 413, "too_large", "Body too large"),
    ("POST", "/jobs", {"headers": {"Expect": "tea"}}, 417, "expectation_failed", "Expectation failed"),
    ("POST", "/jobs", {"json": {"type": "y"}, "headers": {"Idempotency-Key": "1"}}, 422, "idempotency_mismatch", "Idempotency key reused"),
    ("PATCH", "/jobs/done", {"json": {"status": "queued"}}, 409, "invalid_transition", "Invalid transition"),
    ("PATCH", "/jobs/back", {"json": {"attempt": 1}}, 409, "stale_attempt", "Stale attempt"),
    ("PATCH", "/jobs/back", {"json": {"attempt": 3}}, 409, "unknown_attempt", "Unknown attempt"),
    ("PATCH", "/jobs/x", {"json": {}, "headers": {"If-Match": '"9-9"'}}, 412, "precondition_failed", "Precondition failed"),
    ("PUT", "/jobs/failed/result", {"data": b"x"}, 409, "result_final", "Result is final"),
]  # fmt: skip


async def test_every_refusal_has_its_own_code_and_title(client, database, subtests):
    other = {"X-API-Key": await make_key(database, "other")}
    for own in ("x", "gone", "done", "failed", "back"):
        await create(client, id=own)
    await create(client, batch_id="full", batch_size=1)
    await ask(client, "POST", "/jobs", json={"type": "x", "id": "theirs"}, headers=other)
    await ask(client, "POST", "/jobs", json={"type": "x"}, headers={"Idempotency-Key": "1"})
    await ask(client, "DELETE", "/jobs/gone")
    await report(client, "done", status="COMPLETED")
    await report(client, "failed", status="FAILED")
    for status in ("PROCESSING", "queued"):
        await report(client, "back", status=status)
    for method, path, options, status, error_type, title in REFUSALS:
        with subtests.test(f"{method} {path} {error_type}"):
            answer = await ask(client, method, path, **options)
            said = answer.problem(status, error_type)
            assert (said["title"], said["instance"]) == (title, path)
            assert answer.headers["Cache-Control"] == "no-store"


async def test_a_method_that_is_not_understood_is_answered_with_those_that_are(client, subtests):
    for method, path, allowed in [
        ("PUT", "/jobs/x", "DELETE, GET, HEAD, PATCH"),
        ("DELETE", "/jobs", "PATCH, POST"),
        ("POST", "/jobs/x/status", "GET, HEAD"),
        ("DELETE", "/jobs/x/result", "GET, HEAD, PUT"),
        ("GET", "/jobs/x/cancel", "POST"),
        ("POST", "/limits", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
    ]:
        with subtests.test(f"{method} {path}"):
            answer = await ask(client, method, path)
            answer.problem(405, "method_not_allowed")
            assert set(allowed.split(", ")) <= set(answer.headers["Allow"].split(", "))
            assert method not in answer.headers["Allow"].split(", ")


async def test_unknown_and_repeated_query_parameters_are_refused_by_name(client, sql, subtests):
    await create(client, id="x")
    queries = {"?colour=red&limi=5": {"colour", "limi"}, "?colour=1&colour=2": {"colour"}, "?=": {""}, "?a": {"a"}}
    for address in READS + WRITES:
        for query, wrong in queries.items():
            with subtests.test(f"{address}{query}"):
                said = (await send(client, address, query=query)).problem(422, "validation_failed")
                assert set(said["details"]["fields"]) == wrong
                assert "?" not in said["instance"]
    assert await sql.fetchval("select count(*) from jobs where version = 1") == 1


async def test_a_known_query_parameter_given_twice_is_refused(client):
    await create(client, id="x")
    answer = await ask(client, "GET", "/jobs/x/history?limit=5&limit=6")
    assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["limit"]
    answer = await ask(client, "PUT", "/jobs/x/result?complete=true&complete=true", data=b"x")
    assert list(answer.problem(422, "validation_failed")["details"]["fields"]) == ["complete"]


async def test_instance_is_the_path_as_it_was_sent(client):
    for path in ("/jobs/a%20b", "/jobs/%FF", "/jobs/a%2Fb", "/n%C3%B6thing"):
        async with connected(client) as socket:
            await socket.say(head(client, f"GET {path}?secret=1"))
            said = (await socket.answer()).json()
            assert said["instance"] == path
            assert "secret=1" not in str(said)


async def test_nobody_gets_html(client):
    for path in ("/jobs/nobody", "/nothing", "/jobs/<script>alert(1)</script>"):
        answer = await ask(client, "GET", path, headers={"Accept": "text/html,*/*;q=0.1"})
        assert answer.headers["Content-Type"] == "application/problem+json"


async def test_head_of_what_is_not_there_has_the_status_and_no_body(client):
    answer = await ask(client, "HEAD", "/jobs/nobody")
    assert (answer.status, answer.body) == (404, b"")
    assert answer.headers["Content-Type"] == "application/problem+json"


async def test_what_went_wrong_on_our_side_is_not_told(client, sql):
    await sql.execute("alter table jobs add constraint a_secret_of_ours check (type <> 'x')")
    said = (await ask(client, "POST", "/jobs", json={"type": "x"})).problem(500, "internal")
    for word in ("a_secret_of_ours", "violates", "asyncpg", "insert", ".py"):
        assert word not in str(said)
    assert (await ask(client, "POST", "/jobs", json={"type": "y"})).status == 201


async def test_what_cannot_be_done_now_says_when_to_come_again(client, sql):
    async with sql.transaction():
        await sql.execute("lock table jobs in exclusive mode")
        answer = await ask(client, "POST", "/jobs", json={"type": "x"})
    answer.problem(503, "unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
