"""Debian's nginx in front, with its own settings and our site: nothing that the service promises is lost on the way."""

import asyncio
import json
import os
from io import BytesIO

import aiohttp
import pytest

import service.streaming.stream
from service.embedded import free_port
from service.streaming.operation import Streams
from tests.browser import CLOSED, OPEN, Listening, Site
from tests.http import JSON, ask, create, report
from tests.nginx import find_nginx, nginx_before
from tests.sse_reader import RawReader, assert_true_to, comes_true, events_of

BARE_SITE = """server {
    listen 80;
    location / { proxy_pass http://127.0.0.1:8080; }
}"""
"""The least there is: HTTP/1.0 to the service, no WebSocket, bodies up to 1 MiB."""

MIB = 2**20
OF_EACH_ANSWER = {"date", "server", "connection", "x-request-id"}


@pytest.fixture(scope="session")
def nginx():
    executable = find_nginx()
    if executable is None:
        pytest.skip("there is no nginx of Debian's here: apt install nginx")
    return executable


@pytest.fixture
def front(nginx, client):
    """The URL of nginx before the service of `client`, and the folder of its logs."""
    with nginx_before(nginx, client.server.port) as front:
        yield front


@pytest.fixture
async def through(front, key):
    """As `client`, but through nginx."""
    async with aiohttp.ClientSession(front[0], headers={"X-API-Key": key}) as session:
        yield session


@pytest.fixture(autouse=True)  # before `client`
async def open_streams(monkeypatch):
    """Says how many streams are open in the service."""
    built, build = [], Streams.__init__

    def noted(self, *args, **options):
        built.append(self)
        build(self, *args, **options)

    monkeypatch.setattr(Streams, "__init__", noted)
    monkeypatch.setenv("JOBWIRE_MAX_STREAMS_PER_KEY", "1000")
    yield lambda: sum(map(len, built))
    await RawReader.close_all()


@pytest.fixture
def trusting_the_proxy(monkeypatch):
    monkeypatch.setenv("JOBWIRE_TRUSTED_PROXIES", "127.0.0.1")


# Following


@pytest.mark.parametrize("site", ["ours", "bare"])
async def test_events_arrive_one_by_one(nginx, client, key, site):
    await create(client, id="job", batch_id="b")
    with nginx_before(nginx, client.server.port, **({} if site == "ours" else {"site": BARE_SITE})) as (url, _):
        readers = []
        for path in ("/jobs/job/events", "/jobs/batch/b/events", "/jobs/events"):
            reader = await RawReader.open(url, path, key, headers={"Accept-Encoding": "gzip"})
            assert await reader.answer() == 200
            assert b"content-encoding" not in reader.head.lower()
            assert (await reader.events.next()).name in ("status", "open")
            readers.append(reader.events)
        for percentage in range(1, 21):
            version = (await report(client, "job", status="PROCESSING", progress={"percentage": percentage}))["version"]
            for events in readers:  # before the next report is made
                assert (await events.next()).version == version


async def test_a_stream_ends_and_is_over(through, client):
    await create(client, id="job")
    async with events_of(through, "job") as events:
        await events.next()
        await report(client, "job", status="COMPLETED")
        assert [event.status for event in await events.rest()] == ["COMPLETED"]
        assert 2000 <= events.parser.retry_ms <= 5000
    known = {"Last-Event-ID": events.seen[-1].id}
    assert (await ask(through, "GET", "/jobs/job/events", headers=known)).status == 204


async def test_comments_keep_a_quiet_stream_alive(through, client, monkeypatch):
    monkeypatch.setattr(service.streaming.stream, "QUIET_FOR_s", 0.2)
    await create(client, id="job")
    async with events_of(through, "job") as events:
        await events.next()
        async with asyncio.timeout(10):
            while events.parser.comments < 3:
                assert await events.quiet(0.2)


async def test_who_hangs_up_is_noticed_without_a_word(front, through, client, key, open_streams):
    await create(client, id="job", batch_id="b")
    for path in ("/jobs/job/events", "/jobs/batch/b/events", "/jobs/events"):
        for leaves in (RawReader.hang_up, lambda reader: reader.writer.close()):
            reader = await RawReader.open(front[0], path, key)
            await reader.answer()
            await reader.events.next()
            assert open_streams() == 1
            leaves(reader)
            await comes_true(lambda: open_streams() == 0)
    async with through.ws_connect("/jobs/job/status") as socket:
        await socket.receive_json()
        assert open_streams() == 1
        socket._response.connection.transport.abort()
        await comes_true(lambda: open_streams() == 0)


async def test_hundreds_follow_to_the_end(front, client, key, open_streams):
    jobs = [f"job-{number}" for number in range(30)]
    created = await ask(client, "POST", "/jobs", json=[{"id": job, "type": "parse"} for job in jobs])
    assert created.status == 201
    readers = [(job, await RawReader.open(front[0], f"/jobs/{job}/events", key)) for job in jobs * 10]
    for _, reader in readers:
        assert await reader.answer() == 200
    for said in (
        {"status": "PROCESSING"},
        *({"progress": {"percentage": n}} for n in (20, 40, 60)),
        {"status": "COMPLETED"},
    ):
        await ask(client, "PATCH", "/jobs", json=[{"id": job, **said} for job in jobs])
    for job, reader in readers:
        events = await reader.events.rest(30)
        assert {event.data["id"] for event in events} == {job}
        assert_true_to(events)
    await comes_true(lambda: open_streams() == 0)


async def test_a_websocket_passes(through, client):
    await create(client, id="job")
    async with through.ws_connect("/jobs/job/status") as socket:
        assert (await socket.receive_json())["status"] == "queued"
        for said in ("PROCESSING", "COMPLETED"):
            await report(client, "job", status=said)
            assert (await socket.receive_json())["status"] == said.lower()
        assert (await socket.receive()).data == 1000


async def test_tickets_stay_out_of_the_log(front, through, client):
    await create(client, id="job")
    await report(client, "job", status="COMPLETED")
    ticket = (await ask(through, "POST", "/tickets", json={"job_id": "job"})).json()["ticket"]
    async with aiohttp.ClientSession(front[0]) as page:
        assert (await ask(page, "GET", f"/jobs/job/events?ticket={ticket}", headers={"Referer": ticket})).status == 200
    log = front[1] / "jobwire.log"
    await comes_true(lambda: "GET /jobs/job/events HTTP/1.1" in log.read_text())
    assert not any(ticket in file.read_text() for file in front[1].glob("*.log"))


async def test_a_page_comes_back_when_the_service_is_there_again(nginx, chromium, start_web, key, monkeypatch):
    """EventSource gives up on the 502 that nginx has for others."""
    port = free_port()
    async with Site() as site:
        monkeypatch.setenv("JOBWIRE_CORS_ORIGINS", site.origin)
        web = await start_web(JOBWIRE_PORT=str(port))
        with nginx_before(nginx, port) as (url, _):
            async with aiohttp.ClientSession(url, headers={"X-API-Key": key}) as through:
                await create(through, id="job")
                ticket = (await ask(through, "POST", "/tickets", json={"job_id": "job"})).json()["ticket"]
                await web.stop()
                assert (await ask(through, "GET", "/jobs/job")).status == 502
                assert (await ask(through, "GET", "/jobs/job/events")).status == 503
            page = await Listening.at(await chromium.new_page(), site.origin)
            followed = await page.follow(f"{url}/jobs/job/events?ticket={ticket}")
            problem = await followed.until(lambda heard: heard.name == "problem")
            assert problem.data["error_type"] == "unavailable"
            await start_web(JOBWIRE_PORT=str(port))
            present = await followed.until(lambda heard: heard.name == "status")
            assert (present.data["id"], present.ready) == ("job", OPEN)
            assert CLOSED not in {heard.ready for heard in followed.heard}
            await page.page.close()


# Asking


async def test_answers_come_through_unchanged(through, client):
    await create(client, id="job", batch_id="b")
    await report(client, "job", status="PROCESSING", progress={"percentage": 40})
    etag = (await ask(client, "GET", "/jobs/job")).headers["ETag"]
    await create(client, id="done")
    await ask(client, "PUT", "/jobs/done/result?complete=true", data=b'{"pages":3}', headers=JSON)
    seen = set()
    for method, path, headers in (
        ("GET", "/jobs/job", {}),
        ("HEAD", "/jobs/job", {}),
        ("GET", "/jobs/job", {"If-None-Match": etag}),
        ("GET", "/jobs/job", {"If-None-Match": etag, "Prefer": "wait=1"}),
        ("GET", "/jobs/job/status", {}),
        ("GET", "/jobs/job/result", {}),
        ("GET", "/jobs/done/result", {}),
        ("HEAD", "/jobs/done/result", {}),
        ("GET", "/jobs/job/history", {}),
        ("GET", "/jobs?limit=1&tags=a%2Cb", {}),
        ("GET", "/jobs/status?job_ids=job,done,none", {}),
        ("GET", "/jobs/batch/b", {}),
        ("GET", "/jobs//job", {}),
        ("GET", "/jobs/none", {}),
        ("GET", "/jobs/job", {"X-API-Key": "jw_unknown"}),
        ("POST", "/jobs", JSON),
        ("PUT", "/jobs", {}),
    ):
        direct, passed = [await ask(session, method, path, headers=headers) for session in (client, through)]
        assert passed.status == direct.status, path
        seen.add(direct.status)
        for name in {name.lower() for name in direct.headers} - OF_EACH_ANSWER:
            assert passed.headers.getall(name, None) == direct.headers.getall(name), (path, name)
        if direct.status < 400:
            assert passed.body == direct.body
        else:
            ours, its = direct.json(), passed.json()
            assert its | {"request_id": ""} == ours | {"request_id": ""}
            assert its["request_id"] == passed.headers["X-Request-Id"]
    assert seen == {200, 304, 400, 401, 404, 405, 409}
    refused = await ask(through, "PATCH", "/jobs/job", json={"status": "COMPLETED"}, headers={"If-Match": '"1-1"'})
    refused.problem(412, "precondition_failed")
    assert (await report(through, "job", status="COMPLETED"))["status"] == "COMPLETED"


async def test_what_nginx_compresses_stays_readable_and_known(through, client):
    packed = await ask(through, "GET", "/docs")
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.body == (await ask(client, "GET", "/docs")).body
    known = {"If-None-Match": packed.headers["ETag"]}
    assert (await ask(through, "GET", "/docs", headers=known)).status == 304


async def test_a_wait_is_held_and_answered_when_it_is_due(through, client):
    await create(client, id="job")
    etag = (await ask(through, "GET", "/jobs/job")).headers["ETag"]
    headers = {"If-None-Match": etag, "Prefer": "wait=30"}
    waiting = asyncio.ensure_future(ask(through, "GET", "/jobs/job", headers=headers))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await report(client, "job", status="PROCESSING")
    async with asyncio.timeout(10):
        answer = await waiting
    assert (answer.status, answer.headers["Preference-Applied"]) == (200, "wait=30")
    assert answer.json()["status"] == "PROCESSING"
    assert int(answer.headers["Retry-After"]) in range(2, 11)


async def test_bodies_as_large_as_they_may_be(through, client):
    await create(client, id="job")
    result = os.urandom(16 * MIB)
    refused = await ask(through, "PUT", "/jobs/job/result", data=BytesIO(result + b"1"))
    refused.problem(413, "too_large")
    stored = await ask(through, "PUT", "/jobs/job/result?complete=true", data=BytesIO(result))
    assert stored.status == 200, stored
    assert (await ask(through, "GET", "/jobs/job/result")).body == result
    jobs = json.dumps([{"id": f"job-{n}", "type": "parse", "metadata": {"text": "x" * 8000}} for n in range(1000)])
    made = await ask(through, "POST", "/jobs", data=BytesIO(jobs.encode()), headers=JSON)
    assert (made.status, len(made.json()["jobs"])) == (201, 1000)


@pytest.mark.usefixtures("trusting_the_proxy")
async def test_limits_of_public_jobs_belong_to_the_client_and_not_to_the_proxy(front, client):
    job = (await create(client, public=True))["id"]

    async def left(address, **headers):
        connector = aiohttp.TCPConnector(local_addr=(address, 0))
        async with aiohttp.ClientSession(front[0], connector=connector) as anybody:
            return (await ask(anybody, "GET", f"/jobs/{job}", headers=headers)).headers["RateLimit"].partition(";t")[0]

    assert await left("127.0.0.2") == '"poll";r=999'
    assert await left("127.0.0.2", **{"X-Forwarded-For": "203.0.113.7"}) == '"poll";r=998'
    assert await left("127.0.0.3") == '"poll";r=999'
