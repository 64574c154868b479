"""A walk through every operation of the document by those who may not: with the key of another account, without a key,
and with a key that lacks the scope.

What is asked comes from the document, with the owner's ids, filters, cursors, ETags and keys wherever a name stands for
one. A new operation is walked by itself; where it names a kind of thing that the owner here does not have, or lacks an
example of its body, the walk says so.
"""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import aiohttp
import pytest

from schemas.shapes import PUBLIC_FIELDS
from service.identity import READ, SCOPES, WRITE
from service.limiting.policies import POLICIES, UNLIMITED
from tests.conftest import make_key
from tests.document import EVENT_STREAM, Judge
from tests.http import JSON, Answer, ask, create

MARK = f"mark-{uuid.uuid4().hex}"
"""Stands in everything that the owner keeps, and in nothing that a stranger sends."""

NO_LIMITS = dict.fromkeys(POLICIES, UNLIMITED)
FIRST_EVENT_s = 0.5


@dataclass(frozen=True)
class Owner:
    """The account `acme`, which has a job in every state. `has`: what is its own, by the name of a parameter or field;
    `public`: the ids that anybody may read; `etags`: by the ids of its jobs, but of the deleted one."""

    has: Mapping[str, list[str]]
    public: list[str]
    etags: Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """One request. `about_theirs`: whether it is about one thing that is the owner's."""

    operation: str
    method: str
    path: str
    about_theirs: bool
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None


ENDS = {
    "queued": [],
    "processing": [("PATCH", "", {"status": "PROCESSING"})],
    "completed": [("PUT", "/result?complete=true", {"result": MARK})],
    "failed": [("PATCH", "", {"status": "FAILED", "error": MARK, "error_details": {"error_type": MARK}})],
    "cancelled": [("POST", "/cancel", {"reason": MARK})],
    "retried": [("PATCH", "", {"status": "FAILED", "error": MARK}), ("POST", "/retry", {})],
    "deleted": [("DELETE", "", None)],
}
KEPT = {
    "type": "extraction",
    "pdf_name": MARK,
    "pdf_hash": MARK,
    "user_id": "user-of-acme",
    "tags": ["tag-of-acme", MARK],
    "metadata": {"note": MARK},
    "parameters": {MARK: MARK},
    "batch_id": "batch-of-acme",
}
PRIVATE = KEPT | {"progress": {"message": MARK, "step": MARK}}


@pytest.fixture
async def owner(client) -> Owner:
    private = [(await create(client, id=f"{name}-of-acme", **PRIVATE))["id"] for name in ENDS]
    public = [(await create(client, public=True, **KEPT))["id"] for _ in ("queued", "completed")]
    for job_id, steps in zip([*private, *public], [*ENDS.values(), [], ENDS["completed"]], strict=True):
        for method, path, body in steps:
            assert (await ask(client, method, f"/jobs/{job_id}{path}", json=body)).status == 200
    await create(client, **PRIVATE | {"batch_id": "closed-batch-of-acme", "batch_size": 1})
    await ask(client, "POST", "/jobs", json=PRIVATE, headers={"Idempotency-Key": "key-of-acme"})
    page = (await ask(client, "GET", "/jobs", params={"limit": "1"})).json()
    jobs = [*private, *public]
    answers = {job_id: await ask(client, "GET", f"/jobs/{job_id}") for job_id in jobs}
    etags = {job_id: answer.headers["ETag"] for job_id, answer in answers.items() if answer.status == 200}
    has = {
        "job_id": jobs,
        "id": jobs,
        "job_ids": [",".join(jobs)],
        "batch_id": ["batch-of-acme", "closed-batch-of-acme"],
        "user_id": ["user-of-acme"],
        "tags": ["tag-of-acme"],
        "cursor": [page["pagination"]["next_cursor"]],
        "ticket": [],  # is a right of whoever holds it
        "last_event_id": [],
        "If-Match": ["*"],
        "If-None-Match": ["*"],
        "Idempotency-Key": ["key-of-acme"],
    }
    return Owner(has, public, etags)


@pytest.fixture
async def judge(client) -> Judge:
    return Judge((await ask(client, "GET", "/openapi.json")).json())


# What is asked


def everything(judge: Judge, owner: Owner) -> Iterator[Request]:
    """Every operation about each thing of the owner's: plainly, and with each parameter, header and body there is.

    What creates comes last: then there are things of the same names that are the stranger's own.
    """
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, item in judge.document["paths"].items()
        for method, operation in item.items()
    ]
    for key, operation in sorted(operations, key=lambda each: "201" in each[1]["responses"]):
        yield from _requests(judge, owner, key, operation)


def _requests(judge: Judge, owner: Owner, key: str, operation: dict[str, Any]) -> Iterator[Request]:
    method, _, template = key.partition(" ")
    parameters = [judge.resolved(parameter) for parameter in operation["parameters"]]
    in_path, in_query, in_headers = (
        {each["name"]: _values(owner, key, each) for each in parameters if each["in"] == place}
        for place in ("path", "query", "header")
    )
    needed = {
        each["name"]: in_query[each["name"]][0] for each in parameters if each["in"] == "query" and each["required"]
    }
    bodies = [*_bodies(judge, owner, key, operation)]
    for values in product(*in_path.values()):
        named = dict(zip(in_path, values, strict=True))
        plain = Request(key, method, template.format_map(named), bool(named.keys() & owner.has.keys()), params=needed)
        for body in bodies:
            yield replace(plain, body=body, about_theirs=plain.about_theirs or _is_about_theirs(body))
        plain = replace(plain, body=bodies[0])
        etag = owner.etags.get(named.get("job_id", ""))
        yield from (replace(plain, params=needed | {name: value}) for name, value in _each(in_query, etag))
        yield from (replace(plain, headers={name: value}) for name, value in _each(in_headers, etag))
        if method == "GET" and not judge.may_stream(key):
            yield replace(plain, method="HEAD")


def _each(known: dict[str, list[str]], etag: str | None) -> Iterator[tuple[str, str]]:
    """Each value of each parameter, and what a reader who knows the job would say of it."""
    for name, values in known.items():
        yield from ((name, value) for value in values)
        if etag is not None and name in ("If-Match", "If-None-Match"):
            yield name, etag
        if etag is not None and name.lower().replace("-", "_") == "last_event_id":
            yield name, etag.strip('"')


def _values(owner: Owner, key: str, parameter: dict[str, Any]) -> list[str]:
    """The owner's own, where there are such; else what is no mistake."""
    name, schema = parameter["name"], parameter["schema"]
    if name in owner.has:
        return owner.has[name]
    if name.endswith("_id"):
        pytest.fail(f"{key}: say in the fixture `owner` which {name} it has")
    if "example" in parameter:
        return [parameter["example"]]
    if "enum" in schema:
        return schema["enum"]
    return {"boolean": ["true"], "integer": [str(schema.get("minimum", 1))], "array": []}.get(schema["type"], ["x"])


def _bodies(judge: Judge, owner: Owner, key: str, operation: dict[str, Any]) -> Iterator[Any]:
    """The document's examples, as they are and with the owner's things in them. None: nothing is sent."""
    content = operation.get("requestBody", {"content": {"": {}}})["content"]
    if "application/json" not in content:
        yield b"a result" if "*/*" in content else None
        return
    media = content["application/json"]
    if "examples" not in media:
        pytest.fail(f"{key}: needs an example of its body in service/pages/operations.py")
    fields = _fields(judge, media["schema"]) & {"id", "job_id", "job_ids", "batch_id", "user_id"}
    for example in media["examples"].values():
        yield example["value"]
        for name in fields:
            yield _with_theirs(owner, name, example["value"])


def _fields(judge: Judge, schema: dict[str, Any]) -> set[str]:
    """The names of an object's fields, or of the objects of an array."""
    schema = judge.resolved(schema)
    inner = [*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())]
    return {*schema.get("properties", ())}.union(*(_fields(judge, part) for part in inner))


def _with_theirs(owner: Owner, name: str, example: Any) -> Any:
    theirs = owner.has["job_id"] if name == "job_ids" else owner.has[name]
    if isinstance(example, list):
        return [{**item, name: theirs[place % len(theirs)]} for place, item in enumerate(example)]
    return {**example, name: theirs if name == "job_ids" else theirs[0]}


def _is_about_theirs(body: Any) -> bool:
    return isinstance(body, dict) and "-of-acme" in str(body.get("job_id"))


# What comes


async def walk(
    through: Any, requests: Iterable[Request], key: str | None = None
) -> AsyncIterator[tuple[Request, Answer]]:
    """Each request with its answer. Of a stream the first event is read."""
    for request in requests:
        answer = await _answer_to(through, request, {} if key is None else {"X-API-Key": key})
        assert answer.status < 500, (request, answer)
        yield request, answer


async def _answer_to(through: Any, request: Request, headers: dict[str, str]) -> Answer:
    body, headers = request.body, headers | request.headers
    if body is not None and not isinstance(body, bytes):
        body, headers = json.dumps(body).encode(), headers | JSON
    sent = {"params": request.params, "data": body, "headers": headers}
    async with through.request(request.method, request.path, **sent) as response:
        is_stream = response.content_type == EVENT_STREAM
        come = await (_up_to_an_event(response) if is_stream else response.read())
        return Answer(response.status, response.headers, come)


async def _up_to_an_event(response: aiohttp.ClientResponse) -> bytes:
    come = b""
    with suppress(TimeoutError):
        async with asyncio.timeout(FIRST_EVENT_s):
            while b"\ndata:" not in come and (chunk := await response.content.readany()):
                come += chunk
    return come


def told(answer: Answer) -> str:
    return answer.body.decode(errors="replace") + repr(sorted(answer.headers.items()))


def assert_nothing_is_told(owner: Owner, request: Request, answer: Answer) -> None:
    sent = {*request.params.values(), *request.headers.values()}
    for secret in (MARK, *(etag.strip('"') for etag in owner.etags.values())):
        assert secret not in told(answer) or {secret, f'"{secret}"'} & sent, (request, answer)


async def everything_of(sql, account: str) -> dict[str, list[str]]:
    """All rows that belong to an account, by table, and all results."""
    account_id = await sql.fetchval("select id from accounts where name = $1", account)
    tables = await sql.fetch(
        "select table_name from information_schema.columns join information_schema.tables using (table_name)"
        " where column_name = 'account_id' and table_type = 'BASE TABLE'"
    )
    found = {name: await sql.fetch(f"select * from {name} where account_id = {account_id}") for (name,) in tables}
    found["results"] = await sql.fetch("select * from results")
    return {name: sorted(map(repr, rows)) for name, rows in found.items()}


async def test_the_owner_sees_it_all(client, judge, owner):
    """So that it means something that others do not."""
    fine, marked = set(), set()
    reading = [request for request in everything(judge, owner) if request.method == "GET" and request.about_theirs]
    async for request, answer in walk(client, reading):
        if answer.status == 200:
            fine.add(request.operation)
        if MARK in told(answer):
            marked.add(request.operation)
    assert fine == {request.operation for request in reading}
    assert marked >= {operation for operation in fine if "{job_id}" in operation}


async def test_another_account_sees_nothing_and_changes_nothing(client, judge, owner, database, sql):
    stranger = await make_key(database, "other", limits=NO_LIMITS)
    before = await everything_of(sql, "acme")
    async for request, answer in walk(client, everything(judge, owner), stranger):
        assert_nothing_is_told(owner, request, answer)
        if request.about_theirs:
            assert answer.status in (403, 404) or (request.body and answer.status == 422), (request, answer)
    assert await everything_of(sql, "acme") == before


async def test_nobody_sees_more_than_what_is_public_and_changes_nothing(client, judge, owner, sql):
    before = await everything_of(sql, "acme")
    async with aiohttp.ClientSession(client.make_url("")) as anybody:
        async for request, answer in walk(anybody, everything(judge, owner)):
            door = judge.operation(request.operation)["security"]
            if {} in door and request.path.split("/")[2] in owner.public:
                assert MARK not in told(answer), (request, answer)
                assert answer.status in (200, 204, 304), (request, answer)
                assert {*_job_in(answer)} <= {*PUBLIC_FIELDS, "previous_status"}, (request, answer)
            else:
                assert_nothing_is_told(owner, request, answer)
                assert answer.status == 401 or not door, (request, answer)
    assert await everything_of(sql, "acme") == before


def _job_in(answer: Answer) -> dict[str, Any]:
    """What an answer, or the first event of a stream, says of a job."""
    if answer.headers.get("Content-Type") == EVENT_STREAM:
        event = re.search(rb"\ndata: (.*)", answer.body)
        return json.loads(event[1]) if event else {}
    return answer.json() if answer.status == 200 and answer.body else {}


@pytest.mark.parametrize("scope", [READ, WRITE])
async def test_a_key_that_lacks_the_scope_sees_nothing_and_changes_nothing(client, judge, owner, database, sql, scope):
    key = await make_key(database, "acme", tuple({*SCOPES} - {scope}), NO_LIMITS)
    before = await everything_of(sql, "acme")
    requests = [
        request
        for request in everything(judge, owner)
        if {"apiKey": [scope]} in judge.operation(request.operation)["security"]
    ]
    assert requests
    async for request, answer in walk(client, requests, key):
        assert_nothing_is_told(owner, request, answer)
        assert answer.status == 403, (request, answer)
        assert request.method == "HEAD" or answer.json()["details"]["needed_scope"] == scope
    assert await everything_of(sql, "acme") == before
