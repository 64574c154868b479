"""Coming back to the stream of one job: `Last-Event-ID` in a header or a parameter, and what it spares the reader."""

import pytest

from tests.following import create, delete, etag_of, report, status_of
from tests.sse_reader import events_of


def in_header(last_id):
    return {"headers": {"Last-Event-ID": last_id}}


def in_parameter(last_id):
    return {"params": {"last_event_id": last_id}}


COMING_BACK = pytest.mark.parametrize("coming_back", [in_header, in_parameter])
"""The two ways to say what one has."""


@COMING_BACK
async def test_who_has_the_present_state_gets_only_what_comes_next(client, coming_back):
    await create(client, "next")
    await report(client, "next", "PROCESSING")
    async with events_of(client, "next", **coming_back(await etag_of(client, "next"))) as events:
        assert await events.quiet(0.3)
        assert events.parser.retry_ms is not None
        await report(client, "next", percentage=50)
        event = await events.next()
    assert (event.name, event.version, event.data["previous_status"]) == ("progress", 3, "PROCESSING")


@COMING_BACK
async def test_who_has_the_end_gets_204(client, coming_back):
    await create(client, "had")
    await report(client, "had", "CANCELLED")
    answer = await client.get("/jobs/had/events", **coming_back(await etag_of(client, "had")))
    assert answer.status == 204
    assert await answer.read() == b""
    assert "RateLimit" in answer.headers


@COMING_BACK
@pytest.mark.parametrize("status", ["PROCESSING", "COMPLETED"])
async def test_who_has_anything_else_gets_the_present_state_at_once(client, coming_back, status):
    await create(client, "else")
    older = await etag_of(client, "else")
    await report(client, "else", status)
    await create(client, "foreign")
    foreign = await etag_of(client, "foreign")
    malformed = ["", "1-1", "1", "-", "2", "9" * 20 + "-1", "abc", '"2-3"', "W/", "x" * 2000, "é", "7:4-18"]
    for last_id in (older, foreign, *malformed):
        async with events_of(client, "else", **coming_back(last_id)) as events:
            event = await events.next()
        assert (event.status, event.data["previous_status"], event.version) == (status, None, 2), last_id


async def test_the_header_is_newer_than_the_parameter(client):
    """EventSource keeps its address and says in the header what it has read since."""
    await create(client, "both")
    first = await etag_of(client, "both")
    await report(client, "both", "COMPLETED")
    options = {"params": {"last_event_id": first}, "headers": {"Last-Event-ID": await etag_of(client, "both")}}
    assert (await client.get("/jobs/both/events", **options)).status == 204


async def test_who_was_told_of_the_deletion_gets_204(client):
    await create(client, "gone")
    async with events_of(client, "gone") as events:
        await events.next()
        await delete(client, "gone")
        assert (await events.rest())[-1].name == "deleted"
    for last_id, status in ((events.parser.last_id, 204), ("1-1795508717730", 404), ("", 404)):
        assert await status_of(client, "/jobs/gone/events", last_id) == status
