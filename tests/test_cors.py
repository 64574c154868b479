"""CORS, from outside: what a browser needs to let a page call us, for the origins that are named and for no other."""

from dataclasses import replace

import aiohttp
import pytest
from aiohttp.test_utils import TestClient

from service.serving import make_runner
from service.settings import BadSettings, Settings
from tests.conftest import RunnerServer

PAGE, OTHER_PAGE, STRANGER = "https://app.example.com", "http://localhost:3000", "https://evil.example"
EXPOSED = {"ETag", "Retry-After", "RateLimit", "RateLimit-Policy", "X-Request-Id", "Location", "Preference-Applied"}


@pytest.fixture
async def serve(service_settings, key):
    """Starts the service for some origins; the client has a key in its headers."""
    opened = []

    async def start(*origins):
        server = RunnerServer(make_runner(replace(service_settings, cors_origins=origins)))
        await server.start_server()
        client = TestClient(server, headers={"X-API-Key": key})
        opened.append(client)
        return client

    yield start
    for client in opened:
        await client.close()


def words(headers, name):
    return {word.strip() for line in headers.getall(name, []) for word in line.split(",")}


def marks(answer):
    return {name for name in answer.headers if name.lower().startswith("access-control-")}


def assert_readable(answer, origin):
    assert answer.headers.getall("Access-Control-Allow-Origin") == [origin]
    assert words(answer.headers, "Access-Control-Expose-Headers") == EXPOSED
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert "X-Request-Id" in answer.headers


async def test_every_answer_to_a_named_origin_is_readable_and_caches_know(serve):
    client = await serve(PAGE, OTHER_PAGE)
    made = await client.post("/jobs", json={"id": "a", "type": "x"}, headers={"Origin": PAGE})
    read = await client.get("/jobs/a", headers={"Origin": OTHER_PAGE})
    assert_readable(made, PAGE)
    assert_readable(read, OTHER_PAGE)
    unchanged = {"Origin": PAGE, "If-None-Match": read.headers["ETag"]}
    for status, method, path, headers in (
        (200, "GET", "/jobs", {"Origin": PAGE}),
        (200, "GET", "/healthz", {"Origin": PAGE}),
        (304, "GET", "/jobs/a", unchanged),
        (401, "GET", "/jobs/a", {"Origin": PAGE, "X-API-Key": "jw_unknown"}),
        (404, "GET", "/jobs/none", {"Origin": PAGE}),
        (404, "GET", "/nowhere", {"Origin": PAGE}),
        (405, "POST", "/jobs/a", {"Origin": PAGE}),
        (417, "GET", "/jobs/a", {"Origin": PAGE, "Expect": "tea"}),
        (422, "GET", "/jobs?limit=0", {"Origin": PAGE}),
    ):
        answer = await client.request(method, path, headers=headers)
        assert answer.status == status, path
        assert_readable(answer, PAGE)
        assert words(answer.headers, "Vary") == {"Origin"}


async def test_a_stream_is_readable(serve):
    client = await serve(PAGE)
    await client.post("/jobs", json={"id": "a", "type": "x"})
    async with client.get("/jobs/a/events", headers={"Origin": PAGE}) as stream:
        assert (stream.status, stream.content_type) == (200, "text/event-stream")
        assert_readable(stream, PAGE)
        assert (await stream.content.readline()).startswith(b"retry:")


@pytest.mark.parametrize("headers", [{}, {"Origin": STRANGER}, {"Origin": "null"}, {"Origin": PAGE + ".evil.example"}])
async def test_other_origins_get_nothing_but_the_word_to_caches(serve, headers):
    client = await serve(PAGE)
    for path in ("/jobs", "/jobs/none", "/nowhere"):
        answer = await client.get(path, headers=headers)
        assert not marks(answer)
        assert words(answer.headers, "Vary") == {"Origin"}
    preflight = await client.options("/jobs", headers=headers | {"Access-Control-Request-Method": "GET"})
    assert (preflight.status, marks(preflight)) == (204, set())


async def test_all_origins_may_be_named_at_once(serve):
    client = await serve("*")
    for headers in ({}, {"Origin": STRANGER}, {"Origin": "null"}):
        answer = await client.get("/jobs/none", headers=headers)
        assert_readable(answer, "*")
        assert "Vary" not in answer.headers
    preflight = await client.options("/jobs", headers={"Origin": STRANGER, "Access-Control-Request-Method": "GET"})
    assert preflight.status == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == "*"


async def test_what_the_parser_refuses_is_readable_too(serve):
    client = await serve("*")
    answer = await client.get("/jobs?cursor=" + "x" * 9000, headers={"Origin": PAGE})
    assert (answer.status, (await answer.json())["details"]["error_type"]) == (400, "malformed")
    assert_readable(answer, "*")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/jobs", {"GET", "HEAD", "POST", "PATCH"}),
        ("/jobs/a", {"GET", "HEAD", "PATCH", "DELETE"}),
        ("/jobs/a/result", {"GET", "HEAD", "PUT"}),
        ("/jobs/a/cancel", {"POST"}),
        ("/jobs/a/events", {"GET"}),
        ("/healthz", {"GET", "HEAD"}),
    ],
)
async def test_a_preflight_needs_no_key_and_tells_the_methods_of_the_path(serve, path, methods):
    client = await serve(PAGE)
    async with aiohttp.ClientSession() as browser:
        asks = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "PATCH",
            "Access-Control-Request-Headers": "content-type,x-api-key",
        }
        answer = await browser.options(client.make_url(path), headers=asks)
    assert (answer.status, await answer.read()) == (204, b"")
    assert_readable(answer, PAGE)
    assert words(answer.headers, "Access-Control-Allow-Methods") == methods
    assert words(answer.headers, "Access-Control-Allow-Headers") == {
        "X-API-Key", "api-key", "Authorization", "Content-Type", "If-None-Match", "If-Match", "Prefer", "Last-Event-ID",
        "Idempotency-Key", "X-Request-Id",
    }  # fmt: skip
    assert int(answer.headers["Access-Control-Max-Age"]) >= 600
    assert "RateLimit" not in answer.headers
    assert words(answer.headers, "Vary") == {"Origin"}


async def test_an_options_that_is_no_preflight_or_leads_nowhere_is_refused_as_ever(serve):
    client = await serve(PAGE)
    assert (await client.options("/jobs", headers={"Origin": PAGE})).status == 405
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "GET"}
    nowhere = await client.options("/nowhere", headers=asks)
    assert nowhere.status == 404
    assert_readable(nowhere, PAGE)
    assert (await client.get("/jobs", headers=asks)).status == 200


async def test_without_origins_nothing_is_said_and_nothing_runs(serve):
    client = await serve()
    answer = await client.get("/jobs", headers={"Origin": PAGE})
    assert (answer.status, marks(answer)) == (200, set())
    assert "Vary" not in answer.headers
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "GET"}
    refused = await client.options("/jobs", headers=asks)
    assert (refused.status, marks(refused)) == (405, set())
    assert not client.server.app.on_response_prepare
    assert len(client.server.app.middlewares) == 1


def test_origins_are_read_as_browsers_send_them(service_settings, monkeypatch):
    monkeypatch.setenv("JOBWIRE_CORS_ORIGINS", f"{PAGE}, {OTHER_PAGE},http://[::1]:8080")
    assert Settings.read().cors_origins == (PAGE, OTHER_PAGE, "http://[::1]:8080")
    for wrong in (
        PAGE + "/",
        "app.example.com",
        "https://*.example.com",
        "HTTPS://APP.example.com",
        "null",
        PAGE + "/x",
    ):
        monkeypatch.setenv("JOBWIRE_CORS_ORIGINS", wrong)
        with pytest.raises(BadSettings, match=r"JOBWIRE_CORS_ORIGINS.*no origin"):
            Settings.read()
