"""A real Chromium: its own EventSource and WebSocket, in pages of another origin, with tickets."""

import asyncio
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import aiohttp
import pytest

import service.streaming.frames
import service.streaming.handler
from service.embedded import free_port
from tests.browser import (
    CLOSED,
    CONNECTING,
    OPEN,
    Heard,
    Listening,
    Site,
)
from tests.fault_proxy import FaultProxy
from tests.http import ask, connected, create, head, report
from tests.sse_reader import comes_true, events_of

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(autouse=True)  # before `client`
async def site(monkeypatch):
    """Whose pages may call the service."""
    async with Site() as site:
        monkeypatch.setenv("JOBWIRE_CORS_ORIGINS", f"https://app.example.com,{site.origin}")
        yield site


@pytest.fixture
async def page(chromium, site):
    page = await chromium.new_page()
    yield await Listening.at(page, site.origin)
    await page.close()


@pytest.fixture
def soon(monkeypatch):
    """Readers are told to come back after a fifth of a second."""
    monkeypatch.setattr(service.streaming.frames, "randint", lambda *_: 200)


@pytest.fixture
def one_stream(monkeypatch):
    monkeypatch.setenv("JOBWIRE_MAX_STREAMS_PER_KEY", "1")


async def ticket(client, **wanted):
    answer = await ask(client, "POST", "/tickets", json=wanted)
    assert answer.status == 200, answer
    return answer.json()["ticket"]


async def events_url(client, path, base="", **wanted):
    """Where a page follows, with a ticket for what is `wanted`."""
    url = f"{base or str(client.make_url('')).rstrip('/')}{path}"
    return f"{url}?{urlencode({'ticket': await ticket(client, **wanted)})}"


def seconds_until(at):
    return (datetime.fromisoformat(at) - datetime.now(UTC)).total_seconds()


def status_is(status):
    return lambda heard: heard.data is not None and heard.data.get("status") == status


def assert_true_to(followed, job_id, *, ends):
    told = [heard.data for heard in followed.told if heard.data.get("id") == job_id]
    versions = [job["version"] for job in told]
    assert versions == sorted(set(versions)), versions
    assert told[-1]["status"] == ends


async def test_a_page_goes_on_by_itself_after_a_restart_and_stops_at_the_end(page, start_web, key, capfd):
    """Twice at once: one process stops as it should, the other is killed."""
    ports = {"stopped": str(free_port()), "killed": str(free_port())}
    logged = {"JOBWIRE_ACCESS_LOG": "true", "JOBWIRE_LOG_LEVEL": "info"}
    elsewhere, *webs = await asyncio.gather(
        start_web(), *(start_web(JOBWIRE_PORT=port, **logged) for port in ports.values())
    )
    async with aiohttp.ClientSession(elsewhere.url, headers={"X-API-Key": key}) as owner:
        followed = {}
        for web, job in zip(webs, ports, strict=True):
            await create(owner, id=job)
            url = await events_url(owner, f"/jobs/{job}/events", web.url, job_id=job)
            followed[job] = await page.follow(url)
            await followed[job].until(status_is("queued"))
            await report(owner, job, status="PROCESSING")
            await followed[job].until(status_is("PROCESSING"))

        webs[0].process.terminate()
        webs[1].kill()
        for web, job in zip(webs, ports, strict=True):
            await web.process.wait()
            await followed[job].until(lambda heard: (heard.name, heard.ready) == ("error", CONNECTING))
            await report(owner, job, progress={"percentage": 50, "message": "missed"})
        webs = await asyncio.gather(*(start_web(JOBWIRE_PORT=port, **logged) for port in ports.values()))
        for job in ports:
            missed = await followed[job].until(lambda heard: heard.data is not None and heard.data["version"] == 3)
            assert (missed.name, missed.data["previous_status"]) == ("status", None)  # a snapshot
            assert (
                missed.data["progress"].items() >= {"percentage": 50, "message": "missed"}.items()
            )  # and an eta, perhaps
            await report(owner, job, status="COMPLETED")

    for job, its in followed.items():
        await its.closed()
        assert [heard.name for heard in its.told] == ["status"] * 4
        assert_true_to(its, job, ends="COMPLETED")
        ids = [heard.id for heard in its.told]
        assert its.statuses == [200, 200, 204]
        assert await its.last_event_ids() == [None, ids[1], ids[3]]
    for web in webs:
        await web.stop()  # all is written
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    asked = [(line["path"], line["status"]) for line in lines if line.get("event") == "request"]
    for job, answers in {"stopped": [200, 200, 204], "killed": [200, 204]}.items():  # the killed one wrote nothing more
        assert [status for path, status in asked if path == f"/jobs/{job}/events"] == answers


async def test_a_page_hears_a_batch_to_its_end_though_its_ticket_expires(page, client, soon):
    jobs = [{"id": name, "type": "parse", "batch_id": "b", "close_batch": True} for name in "xyz"]
    assert (await ask(client, "POST", "/jobs", json=jobs)).status == 201
    short_lived = (await ask(client, "POST", "/tickets", json={"batch_id": "b", "ttl": 4})).json()
    address = str(client.make_url("/jobs/batch/b/events"))
    expiring = await page.follow(f"{address}?{urlencode({'ticket': short_lived['ticket']})}")
    lasting = await page.follow(await events_url(client, "/jobs/batch/b/events", batch_id="b"))
    both = (expiring, lasting)
    for followed in both:
        await comes_true(lambda: len(followed.told) == 3)

    await asyncio.sleep(seconds_until(short_lived["expires_at"]))
    refused = await ask(
        client, "GET", f"/jobs/batch/b/events?ticket={short_lived['ticket']}", headers={"X-API-Key": ""}
    )
    refused.problem(401, "unauthorized")
    for name in "xyz":
        await report(client, name, status="PROCESSING")
        await report(client, name, status="FAILED" if name == "z" else "COMPLETED")
    for followed in both:
        await followed.closed()

    for followed in both:
        assert followed.told[-1].name == "batch"
        assert followed.told[-1].data["status"] == "completed_with_failures"
        assert {heard.ready for heard in followed.told} == {OPEN}
        for name in "xyz":
            assert_true_to(followed, name, ends="FAILED" if name == "z" else "COMPLETED")
        assert followed.names[-2:] == ["error", "error"]  # the end of the stream, and of following
    assert expiring.names == lasting.names  # a page sees no difference
    await asyncio.sleep(1)  # five times as long as they were told to wait
    assert expiring.statuses == [200, 401]
    assert lasting.statuses == [200, 204]
    assert await lasting.last_event_ids() == [None, lasting.told[-1].id]
    [complaint] = page.complaints
    assert "401" in complaint


async def test_a_page_waits_by_itself_for_a_place(one_stream, page, client, monkeypatch):
    monkeypatch.setattr(service.streaming.handler, "randint", lambda *_: 0)
    await create(client, id="first")
    await create(client, id="second")
    async with events_of(client, "first") as place:
        await place.next()
        waiting = await page.follow(await events_url(client, "/jobs/second/events", job_id="second"))
        problem = await waiting.until(lambda heard: heard.name == "problem")
        assert problem.data["error_type"] == "too_many_streams"
        await waiting.until(lambda heard: (heard.name, heard.ready) == ("error", CONNECTING))
    assert (await waiting.until(status_is("queued"))).data["id"] == "second"
    await report(client, "second", status="COMPLETED")
    await waiting.until(status_is("COMPLETED"))
    assert set(waiting.statuses) == {200}


async def test_a_page_follows_a_job_by_websocket(page, client):
    await create(client, id="socket")
    sockets = []
    for _ in range(8):
        url = await events_url(client, "/jobs/socket/status", job_id="socket", ttl=60 + len(sockets))
        sockets.append(await page.connect(url.replace("http:", "ws:")))
    for said in ({"status": "PROCESSING", "progress": {"percentage": 40}}, {"status": "COMPLETED"}):
        await comes_true(lambda: all(socket.told for socket in sockets))
        told = len(sockets[0].told)
        await report(client, "socket", **said)
        await comes_true(lambda: all(len(socket.told) > told for socket in sockets))
    for socket in sockets:
        closed = await socket.until(lambda heard: heard.name == "close")
        assert closed.data == {"code": 1000, "wasClean": True}
        assert socket.names == ["open", "message", "message", "message", "close"]
        states = [heard.data for heard in socket.told[:-1]]
        assert [state["status"] for state in states] == ["queued", "processing", "completed"]
        assert states[1]["progress"]["percentage"] == 40
        assert states[2] == (await ask(client, "GET", "/jobs/socket/status")).json()


async def test_the_service_waits_for_the_close_of_the_other_side(client):
    """A browser whose own close meets a closed connection calls the end unclean."""
    await create(client, id="job")
    upgrade = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: " + "A" * 22 + "==",
    )
    async with connected(client) as socket:
        await socket.say(head(client, "GET /jobs/job/status", *upgrade))
        await socket.reader.readuntil(b"queued")
        await report(client, "job", status="COMPLETED")
        await socket.reader.readuntil((1000).to_bytes(2) + b"the job is finished")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await socket.reader.read(1)
        await socket.say(b"\x88\x80" + bytes(4))
        async with asyncio.timeout(5):
            assert await socket.reader.read() == b""


async def test_a_feed_goes_on_where_it_was_and_says_when_it_cannot(page, client, sql, soon):
    async with FaultProxy(str(client.make_url("/"))) as network:
        base = f"http://127.0.0.1:{urlsplit(network.url).port}"
        feed = await page.follow(await events_url(client, "/jobs/events", base, feed=True))
        opened = await feed.until(lambda heard: heard.data is not None)
        assert (opened.name, opened.data["position"]) == ("open", opened.id)

        await create(client, id="heard")
        await feed.until(lambda heard: heard.data and heard.data.get("id") == "heard")
        network.refuse()
        await feed.until(lambda heard: (heard.name, heard.ready) == ("error", CONNECTING))
        await create(client, id="missed")
        await network.accept()
        known = await feed.until(lambda heard: heard.data and heard.data.get("id") == "missed")
        assert "reset" not in feed.names

        network.refuse()
        await feed.until(lambda heard: (heard.name, heard.ready) == ("error", CONNECTING))
        await create(client, id="forgotten")
        assert await sql.fetchval("select forget_changes(interval '0', 1000)") >= 2
        await network.accept()
        await comes_true(lambda: any(heard.data is not None for heard in feed.told[feed.told.index(known) + 1 :]))
        told_next = next(heard for heard in feed.told[feed.told.index(known) + 1 :] if heard.data is not None)
        assert told_next.name == "reset"  # at once, not when the service finds out by itself
        assert (await feed.last_event_ids())[-1] == known.id
        await create(client, id="later")
        await feed.until(lambda heard: heard.data and heard.data.get("id") == "later")
        assert feed.statuses == [200, 200, 200]


async def test_a_page_of_an_origin_that_is_not_named_gets_nothing(one_stream, chromium, page, client, key):
    await create(client, id="job")
    url = await events_url(client, "/jobs/job/events", job_id="job")
    asks = f"fetch('{client.make_url('/jobs/job')}', {{headers: {{'X-API-Key': '{key}'}}}}).then((answer) => answer.text(), String)"
    async with Site() as unnamed:
        stranger = await Listening.at(await chromium.new_page(), unnamed.origin)
        followed = await stranger.follow(url)
        await followed.closed()
        assert followed.heard == [Heard("error", CLOSED, "", None)]
        assert "Failed to fetch" in await stranger.page.evaluate(asks)
        await stranger.page.close()
    assert json.loads(await page.page.evaluate(asks))["id"] == "job"
    await (await page.follow(url)).until(status_is("queued"))  # the only place is free again


async def test_the_page_in_the_readme_runs_as_written(chromium, site, client, soon):
    """It loses its network after its ticket has expired: it asks for another and goes on from where it was."""
    [html] = re.findall(r"```html\n(.*?)```", README, re.DOTALL)
    tickets = []

    async def give_ticket():
        tickets.append((await ask(client, "POST", "/tickets", json={"batch_id": "b1", "ttl": 2})).json())
        return tickets[-1]

    batch = [
        {"id": job, "type": "parse", "batch_id": "b1", "close_batch": True} for job in ("first", "second", "third")
    ]
    assert (await ask(client, "POST", "/jobs", json=batch)).status == 201
    page = await chromium.new_page()
    opened = []
    page.on("request", lambda request: opened.append(request.url) if request.resource_type == "eventsource" else None)

    async def shows(*rows):
        await comes_true(lambda: _is_shown(page, rows))

    async with FaultProxy(str(client.make_url("/"))) as network:
        assert html.count("127.0.0.1:8080") == 1
        site.pages |= {
            "/": html.replace("127.0.0.1:8080", f"127.0.0.1:{urlsplit(network.url).port}"),
            "/ticket": give_ticket,
        }
        await page.goto(site.origin)
        await shows("first queued 0 %", "second queued 0 %", "third queued 0 %")
        await report(client, "first", status="PROCESSING", progress={"percentage": 40})
        await ask(client, "DELETE", "/jobs/third")
        await shows("first PROCESSING 40 %", "second queued 0 %", "third deleted 0 %")

        await asyncio.sleep(seconds_until(tickets[-1]["expires_at"]))
        network.cut()
        await report(client, "first", status="COMPLETED")
        await shows("first COMPLETED 100 %", "second queued 0 %", "third deleted 0 %")
        assert len(tickets) == 2
        assert "last_event_id=p." in opened[-1]
        await report(client, "second", status="FAILED")
        await comes_true(lambda: _has_title(page, "completed_with_failures"))
        await shows("first COMPLETED 100 %", "second FAILED 0 %", "third deleted 0 %")
    await page.close()


async def _is_shown(page, rows):
    return await page.locator("li").all_inner_texts() == list(rows)


async def _has_title(page, title):
    return await page.title() == title
