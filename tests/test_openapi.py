"""The API document: valid, whole, and true. (Every answer in every test that uses `client` is held to it too.)"""

import dataclasses
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import asyncpg
import pytest
from aiohttp.test_utils import TestClient
from openapi_spec_validator import OpenAPIV31SpecValidator

from schemas.shapes import shape_a
from service.identity import READ, WRITE
from service.limiting.policies import POLICIES, UNLIMITED
from service.middlewares import STATUS_TABLE
from service.pages.examples import SAMPLES
from service.pages.operations import OPERATIONS
from service.serving import make_runner
from service.streaming.frames import problem_event
from tests.conftest import RunnerServer, make_key
from tests.document import PROBLEM, Judge
from tests.http import JSON, Answer, ask, connected, create, head, report
from tests.sse_reader import EventReader

NEVER_OF_AN_OPERATION = {"method_not_allowed"}
"""What only addresses without an operation answer."""


@pytest.fixture
async def document(client) -> dict[str, Any]:
    return json.loads((await ask(client, "GET", "/openapi.json")).body)


@pytest.fixture
def judge(document) -> Judge:
    return Judge(document)


def operations_in(document: dict[str, Any]) -> set[str]:
    return {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}


async def test_it_is_valid_openapi_3_1(document):
    assert document["openapi"] == "3.1.0"
    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


async def test_it_describes_every_route_and_no_other(client, document):
    routes = {
        f"{route.method} {route.resource.canonical}"
        for route in client.app.router.routes()
        if route.method not in ("HEAD", "OPTIONS")
    }
    assert set(OPERATIONS) == routes, "each route of routes.py needs one entry in service/pages/operations.py"
    assert operations_in(document) == routes


async def test_operations_have_names_for_programs(document):
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+([A-Z][a-z]+)+", name) for name in names)


async def test_every_error_has_a_sample_and_every_sample_is_used(document):
    assert {kind for kind in STATUS_TABLE if kind.error_type not in NEVER_OF_AN_OPERATION} == set(SAMPLES)
    assert set(document["components"]["examples"]) == {kind.__name__ for kind in SAMPLES}


async def test_examples_are_what_their_schemas_say(document, judge):
    held = 0
    for pointer, media in media_in(document):
        for example in media.get("examples", {}).values():
            value = (
                document["components"]["examples"][example["$ref"].rpartition("/")[2]] if "$ref" in example else example
            )
            judge.hold_value(f"{pointer}/schema", value["value"])
            held += 1
    assert held > 100


def media_in(part: Any, pointer: str = ""):
    """Every media type object of the document with its place."""
    if isinstance(part, dict):
        for name, inner in part.items():
            place = f"{pointer}/{name.replace('~', '~0').replace('/', '~1').replace('{', '%7B').replace('}', '%7D')}"
            if name == "content":
                yield from ((f"{place}/{kind.replace('/', '~1')}", media) for kind, media in inner.items())
            elif name != "examples":
                yield from media_in(inner, place)


async def test_nothing_on_the_wire_is_without_a_meaning(document):
    """Each field of each schema and each parameter says what it means."""
    schemas = document["components"]["schemas"]
    silent = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, described in schema.get("properties", {}).items()
        if not described.get("description")
    ]
    parameters = [
        parameter
        for item in document["paths"].values()
        for operation in item.values()
        for parameter in operation["parameters"]
        if "$ref" not in parameter
    ]
    silent += [parameter["name"] for parameter in parameters if not parameter.get("description")]
    assert silent == []


async def test_readers_that_have_it_are_told_so(client):
    first = await ask(client, "GET", "/openapi.json")
    again = await ask(client, "GET", "/openapi.json", headers={"If-None-Match": first.headers["ETag"]})
    assert (first.status, first.headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert (again.status, again.body) == (304, b"")


async def test_the_page_takes_everything_from_this_service(client):
    page = await ask(client, "GET", "/docs")
    taken = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode())
    assert {"docs/swagger-ui-bundle.js", "docs/start.js", "openapi.json"} <= set(taken)
    for relative in taken:  # whatever stands before the path: a proxy's name, or none
        assert not re.match(r"\w+:|/", relative)
        assert (await ask(client, "GET", f"/{relative}")).status == 200
    policy = page.headers["Content-Security-Policy"]
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= set(
        policy.split("; ")
    )
    assert "unsafe" not in policy


async def test_the_door_is_described_as_it_is(document):
    job, statuses, health = (document["paths"][path]["get"] for path in ("/jobs/{job_id}", "/jobs/status", "/healthz"))
    keys = [{"apiKey": [READ]}, {"apiKeyLowerCase": [READ]}, {"bearer": [READ]}]
    assert job["security"] == [*keys, {}]  # public jobs
    assert statuses["security"] == keys
    assert health["security"] == []
    assert document["paths"]["/jobs"]["post"]["security"][0] == {"apiKey": [WRITE]}


async def test_a_field_that_is_not_described_is_found(client, monkeypatch):
    """So that the silence of the judge in all tests with `client` means something."""
    monkeypatch.setattr("service.reporting.operation.shape_a", lambda job: shape_a(job) | {"colour": "red"})
    with pytest.raises(AssertionError, match="colour"):
        await create(client)


# --- what each operation can be answered --------------------------------------------------------------------------


class World:
    """The service, and whatever an operation needs to be asked in earnest."""

    def __init__(self, client: TestClient, database: str, sql: asyncpg.Connection, settings: Any) -> None:
        self.client = client
        self.database = database
        self.sql = sql
        self.settings = settings

    async def ask(self, key: str, job_id: str = "none", batch_id: str = "none", **differs: Any) -> Answer:
        """The operation in its usual form, with what differs: `headers`, `params`, `json`, `data`, `through`."""
        method, _, path = key.partition(" ")
        through = differs.pop("through", self.client)
        usual = {} if {"data", "json"} & set(differs) else USUAL.get(key, {})
        options: dict[str, Any] = {**usual, **differs}
        if "{job_id}" in str(options.get("json")):
            options["json"] = {"job_id": job_id}
        path = path.format(job_id=job_id, batch_id=batch_id, file=options.pop("file", "swagger-ui.css"))
        return await ask_briefly(through, method, path, **options)

    async def job(self, *reports: dict[str, Any], **fields: Any) -> str:
        job_id = (await create(self.client, **fields))["id"]
        for said in reports:
            await report(self.client, job_id, **said)
        return job_id


async def ask_briefly(client: Any, method: str, path: str, **options: Any) -> Answer:
    """Like `ask`; of a stream only the head, which is all that is asked about here."""
    async with client.request(method, path, **options) as response:
        is_stream = response.content_type == "text/event-stream"
        return Answer(response.status, response.headers, b"" if is_stream else await response.read())


USUAL: dict[str, dict[str, Any]] = {
    "GET /jobs/status": {"params": {"job_ids": "a,b"}},
    "POST /jobs/status": {"json": {"job_ids": ["a", "b"]}},
    "POST /jobs": {"json": {"type": "extraction"}},
    "PATCH /jobs": {"json": [{"id": "a", "progress": {"percentage": 40}}]},
    "POST /tickets": {"json": {"job_id": "{job_id}"}},
    "PATCH /jobs/{job_id}": {"json": {"progress": {"percentage": 40}}},
    "PUT /jobs/{job_id}/result": {"data": b"result"},
}
"""How an operation is asked when nothing is wrong, where more is needed than its path."""

FAILED = {"status": "FAILED", "error": "page 7 is damaged"}
COMPLETED = {"status": "COMPLETED"}


async def fine(world: World, key: str) -> Answer:
    batch_id = str(uuid.uuid4())
    return await world.ask(key, await world.job(batch_id=batch_id), batch_id)


async def fine_when_finished(world: World, key: str) -> Answer:
    return await world.ask(key, await finished_with_result(world))


async def fine_when_failed(world: World, key: str) -> Answer:
    return await world.ask(key, await world.job(FAILED))


async def unchanged(world: World, key: str) -> Answer:
    batch_id = str(uuid.uuid4())
    await world.job(batch_id=batch_id)
    return await world.ask(key, await finished_with_result(world), batch_id, headers={"If-None-Match": "*"})


async def read_to_the_end(world: World, key: str) -> Answer:
    job_id = await finished_with_result(world)
    etag = (await ask(world.client, "GET", f"/jobs/{job_id}")).headers["ETag"]
    return await world.ask(key, job_id, headers={"Last-Event-ID": etag.strip('"')})


async def told_to_the_end(world: World, key: str) -> Answer:
    batch_id = str(uuid.uuid4())
    job_id = await world.job(COMPLETED, batch_id=batch_id, batch_size=1)
    if not key.endswith("/events"):
        return await world.ask(key, job_id, batch_id)
    options = {"params": {"job_ids": job_id}} if key == "GET /jobs/events" else {}
    path = key.removeprefix("GET ").format(job_id=job_id, batch_id=batch_id)
    async with world.client.get(path, **options) as response:
        stream = EventReader.of(response)
        await stream.rest()
    return await world.ask(key, job_id, batch_id, headers={"Last-Event-ID": stream.parser.last_id}, **options)


async def repeated(world: World, key: str) -> Answer:
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    await world.ask(key, headers=headers)
    return await world.ask(key, headers=headers)


async def malformed(world: World, key: str) -> Answer:
    return await raw(world, key, "X-Long: " + "x" * 9000)


async def unauthorized(world: World, key: str) -> Answer:
    return await world.ask(key, headers={"X-API-Key": "jw_nobody"})


async def forbidden(world: World, key: str) -> Answer:
    return await world.ask(key, headers={"X-API-Key": await make_key(world.database, "acme", ("webhooks:manage",))})


async def foreign(world: World, key: str) -> Answer:
    """forbidden, because the job is another account's."""
    job_id = await world.job()
    other = await make_key(world.database, "other", limits=dict.fromkeys(POLICIES, UNLIMITED))
    return await world.ask(key, job_id, headers={"X-API-Key": other})


async def not_found(world: World, key: str) -> Answer:
    return await world.ask(key)


async def deleted(world: World, key: str) -> Answer:
    job_id = await world.job()
    await ask(world.client, "DELETE", f"/jobs/{job_id}")
    return await world.ask(key, job_id)


async def expired(world: World, key: str) -> Answer:
    job_id = f"expired-{uuid.uuid4()}"
    await world.sql.execute(
        "insert into tombstones (account_id, id, version, expired_at) select id, $1, 2, now() from accounts where name = 'acme'",
        job_id,
    )
    return await world.ask(key, job_id)


async def result_not_found(world: World, key: str) -> Answer:
    return await world.ask(key, await world.job(COMPLETED))


async def not_finished(world: World, key: str) -> Answer:
    return await world.ask(key, await world.job())


async def no_result(world: World, key: str) -> Answer:
    return await world.ask(key, await world.job(FAILED))


async def unknown_path(world: World, key: str) -> Answer:
    return await world.ask(key, file="nothing.js")


async def already_exists(world: World, key: str) -> Answer:
    return await world.ask(key, json={"type": "extraction", "id": await world.job(id=str(uuid.uuid4()))})


async def batch_closed(world: World, key: str) -> Answer:
    batch_id = str(uuid.uuid4())
    await world.job(batch_id=batch_id, batch_size=1)
    return await world.ask(key, batch_id=batch_id, json={"type": "extraction", "batch_id": batch_id})


async def invalid_transition(world: World, key: str) -> Answer:
    return await world.ask(key, await world.job(COMPLETED))


async def result_of_a_cancelled_job(world: World, key: str) -> Answer:
    """invalid_transition of a result."""
    return await world.ask(key, await world.job({"status": "CANCELLED"}), params={"complete": "true"})


async def stale_attempt(world: World, key: str) -> Answer:
    job_id = await world.job({"status": "PROCESSING"}, {"status": "queued"})
    return await with_attempt(world, key, job_id, 1)


async def unknown_attempt(world: World, key: str) -> Answer:
    return await with_attempt(world, key, await world.job(), 9)


async def result_final(world: World, key: str) -> Answer:
    return await world.ask(key, await finished_with_result(world))


async def idempotency_in_flight(world: World, key: str) -> Answer:
    name = str(uuid.uuid4())
    account_id = await world.sql.fetchval("select id from accounts where name = 'acme'")
    lock = "hashtextextended($2, $1::bigint)"
    await world.sql.execute(f"select pg_advisory_lock({lock})", account_id, name)
    try:
        return await world.ask(key, headers={"Idempotency-Key": name})
    finally:
        await world.sql.execute(f"select pg_advisory_unlock({lock})", account_id, name)


async def idempotency_mismatch(world: World, key: str) -> Answer:
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    await ask(world.client, "POST", "/jobs", json={"type": "parsing"}, headers=headers)
    return await world.ask(key, headers=headers)


async def precondition_failed(world: World, key: str) -> Answer:
    return await world.ask(key, await world.job(), headers={"If-Match": '"0-0"'})


async def too_large(world: World, key: str) -> Answer:
    return await raw(world, key, "Content-Type: application/json", "Content-Length: 99999999")


async def unsupported_media_type(world: World, key: str) -> Answer:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    return await world.ask(key, await world.job(), data=b"{}", headers=headers)


async def expectation_failed(world: World, key: str) -> Answer:
    return await raw(world, key, "Expect: miracles")


async def validation_failed(world: World, key: str) -> Answer:
    return await world.ask(key, await world.job(), params={"colour": "red"}, data=b'{"colour":"red"}', headers=JSON)


async def guessed_too_often(world: World, key: str) -> Answer:
    """From an address of its own, so that nobody else is refused."""
    server = RunnerServer(make_runner(dataclasses.replace(world.settings, trusted_proxies=("127.0.0.1",))))
    headers = {"X-API-Key": "jw_guessed", "X-Forwarded-For": "203.0.113.7"}
    async with server, TestClient(server) as client:
        answers = [await world.ask(key, through=client, headers=headers) for _ in range(31)]
    return answers[-1]


async def rate_limited(world: World, key: str) -> Answer:
    if key == "GET /limits":
        return await guessed_too_often(world, key)
    once = await make_key(world.database, "acme", (READ, WRITE), dict.fromkeys(POLICIES, "1/60"))
    await world.ask(key, headers={"X-API-Key": once})
    return await world.ask(key, headers={"X-API-Key": once})


async def too_many_streams(world: World, key: str) -> Answer:
    server = RunnerServer(make_runner(dataclasses.replace(world.settings, max_streams_per_key=0)))
    async with server, TestClient(server, headers=world.client.session.headers) as client:
        return await world.ask(key, await world.job(), through=client)


async def unavailable(world: World, key: str) -> Answer:
    """A key that this process does not know, while nobody can be asked."""
    await world.sql.close()
    admin = await asyncpg.connect(re.sub(r"/[^/]*$", "/postgres", world.database))
    try:
        await admin.execute(f"drop database {world.database.rpartition('/')[2]} with (force)")
    finally:
        await admin.close()
    return await world.ask(key, headers={"X-API-Key": "jw_" + "x" * 43})


async def finished_with_result(world: World) -> str:
    job_id = await world.job()
    await ask(world.client, "PUT", f"/jobs/{job_id}/result", params={"complete": "true"}, data=b"first")
    return job_id


async def with_attempt(world: World, key: str, job_id: str, attempt: int) -> Answer:
    if "PUT" in key:
        return await world.ask(key, job_id, params={"attempt": str(attempt)})
    return await world.ask(key, job_id, data=json.dumps({"attempt": attempt}), headers=JSON)


async def raw(world: World, key: str, *lines: str) -> Answer:
    """The operation with lines in its head that no client library would send."""
    method, _, path = key.partition(" ")
    path = path.format(job_id="none", batch_id="none", file="swagger-ui.css")
    async with connected(world.client) as socket:
        await socket.say(head(world.client, f"{method} {path}", *lines))
        return await socket.answer()


CASES: tuple[Callable[[World, str], Awaitable[Answer]], ...] = (
    fine,
    fine_when_finished,
    fine_when_failed,
    unchanged,
    read_to_the_end,
    told_to_the_end,
    repeated,
    malformed,
    unauthorized,
    forbidden,
    foreign,
    not_found,
    deleted,
    expired,
    result_not_found,
    not_finished,
    no_result,
    unknown_path,
    already_exists,
    batch_closed,
    invalid_transition,
    result_of_a_cancelled_job,
    stale_attempt,
    unknown_attempt,
    result_final,
    idempotency_in_flight,
    idempotency_mismatch,
    precondition_failed,
    too_large,
    unsupported_media_type,
    expectation_failed,
    validation_failed,
    rate_limited,
    too_many_streams,
    unavailable,  # the last: nothing is left of the database
)
"""Everything that can come to any operation. Each is tried on each: what an operation lists is exactly what comes."""

ONLY_BY_A_FAULT_OF_OURS = {"internal"}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_operation_lists_exactly_what_it_can_be_answered(
    operation, client, judge, database, sql, service_settings
):
    world = World(client, database, sql, service_settings)
    codes, statuses = set(ONLY_BY_A_FAULT_OF_OURS), {500}
    for case in CASES:
        answer = await case(world, operation)
        judge.hold(operation, answer.status, answer.headers, answer.body)
        statuses.add(answer.status)
        if answer.headers.get("Content-Type") == PROBLEM:
            codes.add(answer.json()["details"]["error_type"])
    assert codes == set(judge.errors_of(operation))
    assert statuses == {int(status) for status in judge.operation(operation)["responses"]}


async def test_what_anybody_may_read_of_a_public_job_is_described(client, judge):
    job_id = (await create(client, public=True))["id"]
    async with aiohttp.ClientSession(client.make_url("")) as anybody:
        for path in ("/jobs/{job_id}", "/jobs/{job_id}/status"):
            answer = await ask(anybody, "GET", path.format(job_id=job_id))
            assert answer.status == 200
            judge.hold(f"GET {path}", answer.status, answer.headers, answer.body)


@pytest.mark.parametrize(("public", "schema"), [(False, "JobEvent"), (True, "PublicJobEvent")])
async def test_the_data_of_events_is_described(client, judge, public, schema):
    job_id = (await create(client, public=public))["id"]
    async with (
        aiohttp.ClientSession(client.make_url(""), headers={} if public else client.session.headers) as reader,
        reader.get(f"/jobs/{job_id}/events") as response,
    ):
        events = EventReader.of(response)
        first = await events.next()
        await report(client, job_id, status="PROCESSING", progress={"percentage": 40})
        second = await events.next()
        await ask(client, "DELETE", f"/jobs/{job_id}")
        last = await events.next()
    assert [first.name, second.name, last.name] == ["status", "status", "deleted"]
    for event in (first, second):
        judge.hold_value(f"/components/schemas/{schema}", event.data)
    judge.hold_value("/components/schemas/DeletedEvent", last.data)


async def test_the_data_of_a_problem_event_is_described(judge):
    data = problem_event("unauthorized", "The key is gone.").partition(b"data: ")[2]
    judge.hold_value("/components/schemas/ProblemEvent", json.loads(data))
