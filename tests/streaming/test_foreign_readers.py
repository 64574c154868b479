"""Readers that others wrote: curl, httpx-sse, npm's eventsource."""

import asyncio
import json

import httpx
import httpx_sse
import pytest

from service.embedded import free_port
from tests.conftest import FOREIGN
from tests.following import create, report, session
from tests.sse_reader import EventReader


async def test_curl_reads_along(client, key):
    await create(client, "curl")
    url = str(client.make_url("/jobs/curl/events"))
    command = ["curl", "-sS", "-N", "-H", f"X-API-Key: {key}", url]
    curl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    events = EventReader(lambda: curl.stdout.read(2**16))
    assert (await events.next()).status == "queued"
    await report(client, "curl", "PROCESSING")
    assert (await events.next()).status == "PROCESSING"
    await report(client, "curl", "COMPLETED")
    assert [event.status for event in await events.rest()] == ["COMPLETED"]
    assert await curl.wait() == 0


async def test_httpx_sse_reads_along(client, key):
    await create(client, "httpx")
    heard = []
    url = str(client.make_url("/jobs/httpx/events"))
    async with (
        httpx.AsyncClient(headers={"X-API-Key": key}, timeout=10) as reader,
        httpx_sse.aconnect_sse(reader, "GET", url) as source,
    ):
        async for event in source.aiter_sse():
            if not event.data:  # it makes an event of `retry:` alone
                assert 2000 <= event.retry <= 5000
                continue
            heard.append((event.event, event.json()["status"], event.json()["previous_status"]))
            following = {"queued": "PROCESSING", "PROCESSING": "COMPLETED"}.get(event.json()["status"])
            if following:
                await report(client, "httpx", following)
            assert event.id
    assert heard == [
        ("status", "queued", None),
        ("status", "PROCESSING", "queued"),
        ("status", "COMPLETED", "PROCESSING"),
    ]


@pytest.fixture(scope="session")
def eventsource(node_modules):
    """The script that follows a job with npm's `eventsource`, installed beside it."""
    return FOREIGN / "follow.mjs"


async def test_eventsource_reads_along_across_a_restart(start_web, key, eventsource):
    port = str(free_port())
    web = await start_web(JOBWIRE_PORT=port)
    node = await asyncio.create_subprocess_exec(
        "node", str(eventsource), f"http://127.0.0.1:{port}/jobs/node/events", key, stdout=asyncio.subprocess.PIPE
    )

    async def says(what):
        async with asyncio.timeout(20):
            while line := await node.stdout.readline():
                said = json.loads(line)
                if said["what"] == what:
                    return said
        raise AssertionError("eventsource has ended")

    async with session(web.url, key) as client:
        await create(client, "node")
        assert (await says("status"))["status"] == "queued"
        await report(client, "node", "PROCESSING")
        known = await says("status")
        assert known["status"] == "PROCESSING"
        await web.stop()
        web = await start_web(JOBWIRE_PORT=port)
        returned = await says("request")
        while returned["last_event_id"] is None:
            returned = await says("request")
        assert returned["last_event_id"] == known["event_id"]
        await says("open")
        await report(client, "node", percentage=50)
        told = await says("progress")  # no snapshot in between: it had said what it has
        assert (told["version"], told["status"]) == (3, "PROCESSING")
        await report(client, "node", "COMPLETED")
        assert (await says("status"))["status"] == "COMPLETED"
        ended = await says("closed")
        assert ended["code"] == 204
        async with asyncio.timeout(10):
            assert await node.wait() == 0
