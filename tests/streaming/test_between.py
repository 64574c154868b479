"""A change at every point between connecting and the first event: never missed, and no version goes back."""

import asyncio

import pytest

from service.hub import Hub
from service.status_reader import StatusReader
from service.stores.change_table import ChangeTable
from service.stores.event_channel import EventChannel
from service.streaming.handler import Streaming
from tests.following import CHANGES, create, hold_messages, make_changes, of_set, report, stream
from tests.sse_reader import EventReader, events_of

FOLLOW, LISTEN = (Hub, "follow_all"), (Hub, "listen")
POSITION, SINCE = (ChangeTable, "position"), (ChangeTable, "since")
READ, READ_MANY = (StatusReader, "read"), (StatusReader, "read_many")
CONFIRM, RETELL, BEGIN = (StatusReader, "read_many_confirmed"), (Hub, "retell"), (Streaming, "_begun")

CALLS = {
    ("job", "new"): [FOLLOW, READ, BEGIN],
    ("job", "coming back"): [FOLLOW, READ, BEGIN],
    ("set", "new"): [FOLLOW, POSITION, READ_MANY, CONFIRM, BEGIN],
    ("set", "coming back"): [FOLLOW, POSITION, READ_MANY, CONFIRM, SINCE, BEGIN],
    ("batch", "new"): [LISTEN, POSITION, FOLLOW, READ, READ_MANY, CONFIRM, BEGIN],
    ("batch", "coming back"): [LISTEN, POSITION, FOLLOW, SINCE, READ, RETELL, BEGIN],
    ("feed", "new"): [LISTEN, POSITION, BEGIN],
    ("feed", "coming back"): [LISTEN, POSITION, SINCE, RETELL, BEGIN],
}
"""What each kind of stream awaits while it is opened: of what kind, by whom."""


def path_of(kind, job_id):
    """A stream that tells of this job, and of another one beside it."""
    return {
        "job": f"/jobs/{job_id}/events",
        "set": of_set(job_id, other(job_id)),
        "batch": f"/jobs/batch/of-{job_id}/events",
        "feed": f"/jobs/events?tags={job_id}",
    }[kind]


def other(job_id):
    return f"other-{job_id}"


@pytest.mark.usefixtures("no_reconcile")
@pytest.mark.parametrize("messages", ["at once", "late"])
@pytest.mark.parametrize(("kind", "reader"), CALLS)
async def test_no_change_falls_between(client, unlimited_key, inside, pause, kind, reader, messages):
    """`late`: what Postgres holds is announced only after the stream has begun."""
    client.session.headers["X-API-Key"] = unlimited_key
    for call in CALLS[kind, reader]:
        for when in ("before", "after"):
            jobs = {f"{call[1].strip('_')}-{when}-{number}": changes for number, changes in enumerate(CHANGES)}
            for job_id in jobs:
                for each in (job_id, other(job_id)):
                    await create(client, each, batch_id=f"of-{job_id}", tags=[job_id])
            known = {job_id: await come_to_know(client, kind, job_id, reader) for job_id in jobs}
            reached, go_on = pause(*call, when, calls=len(jobs))
            opening = [asyncio.create_task(open_stream(client, path_of(kind, job), known[job])) for job in jobs]
            async with asyncio.timeout(10):
                await reached.wait()
            release = hold_messages(inside[EventChannel])
            versions = [await make_changes(client, job_id, changes) for job_id, changes in jobs.items()]
            if messages == "at once":
                await asyncio.sleep(0.05)
                release()
            go_on.set()
            responses = await asyncio.gather(*opening)
            release()
            for job_id, version, response in zip(jobs, versions, responses, strict=True):
                place = f"{call[1]}, {when}: {jobs[job_id]}"
                if response.status == 404:
                    assert (kind, jobs[job_id]) == ("job", ["delete"]), place
                    continue
                events = EventReader.of(response)
                if not must_tell(kind, reader, call, when, jobs[job_id]):  # but whatever happens from now on
                    job_id, version = other(job_id), (await report(client, other(job_id), percentage=99))["version"]
                await holds(client, path_of(kind, job_id.removeprefix("other-")), job_id, version, events, place)


async def open_stream(client, path, last_id):
    return await client.get(path, headers={"Last-Event-ID": last_id} if last_id else {})


async def come_to_know(client, kind, job_id, reader):
    """The last id of a reader that was told everything, before one more change of another job. A new reader has none."""
    if reader == "new":
        return None
    async with stream(client, path_of(kind, job_id)) as events:
        while not events.parser.last_id:
            await events.next()
        if kind != "job":
            await report(client, other(job_id), "PROCESSING")
    return events.parser.last_id


def must_tell(kind, reader, call, when, changes):
    """A new feed tells what happens after its position was taken; a new reader of a batch never knew what is gone."""
    if (kind, reader) == ("feed", "new"):
        return call == BEGIN or when == "after"
    return (kind, reader, changes) != ("batch", "new", ["delete"]) or (call, when) == (BEGIN, "after")


async def holds(client, path, job_id, version, events, place):
    """The version was told, and none was ever older than one before."""
    seen = events.seen
    if not await tells(events, job_id, version, place):  # the stream has ended: EventSource would come back
        async with stream(client, path, events.parser.last_id) as events:
            assert await tells(events, job_id, version, place)
            seen += events.seen
    told = {}
    for event in seen:
        if "version" in event.data:
            assert event.version >= told.get(event.data["id"], 0), (place, [event.data for event in seen])
            told[event.data["id"]] = event.version


async def tells(events, job_id, version, place):
    """Reads until this version of the job was told; False if the stream ends before."""
    try:
        async with asyncio.timeout(5):
            while not any(event.data.get("id") == job_id and event.version == version for event in events.seen):
                await events.next()
    except EOFError:
        return False
    except TimeoutError:
        told = [(event.name, event.id, event.data) for event in events.seen]
        raise AssertionError(f"{place}: version {version} of {job_id} was not told, but {told}") from None
    return True


@pytest.mark.usefixtures("no_reconcile")
async def test_what_a_returning_reader_has_is_not_told_again(client, inside, pause):
    """The change that it has read elsewhere is announced once more while it comes back."""
    await create(client, "twice")
    announced = []
    channel = inside[EventChannel]

    def hear(topic, message, original=channel.on_message):
        announced.append((topic, message))
        original(topic, message)

    channel.on_message = hear
    async with events_of(client, "twice") as events:
        await events.next()
        await report(client, "twice", "PROCESSING")
        await events.next()
    reached, go_on = pause(StatusReader, "read", "before")
    opening = asyncio.create_task(client.get("/jobs/twice/events", headers={"Last-Event-ID": events.parser.last_id}))
    async with asyncio.timeout(5):
        await reached.wait()
    channel.on_message(*announced[-1])
    go_on.set()
    events = EventReader.of(await opening)
    assert await events.quiet(0.3)
    await report(client, "twice", "COMPLETED")
    assert [event.version for event in await events.rest()] == [3]


async def test_whenever_a_stream_is_opened_it_tells_the_same_story(client, unlimited_key):
    client.session.headers["X-API-Key"] = unlimited_key
    await create(client, "story")

    async def follow():
        async with events_of(client, "story") as events:
            await events.rest()
        return events.seen

    readers = []
    for n in range(40):
        readers.append(asyncio.create_task(follow()))
        await report(client, "story", "PROCESSING", percentage=2 * n)
        await asyncio.sleep(0.001 * (n % 5))
    await report(client, "story", "COMPLETED")
