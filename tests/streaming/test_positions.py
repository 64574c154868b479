"""Going on where one was: what the ids of events promise, whoever is slow, cut off, or started again elsewhere."""

import asyncio
import re

import pytest

import service.streaming.many_operation
from service.embedded import free_port
from service.hub import Hub
from service.status_reader import StatusReader
from service.stores.event_channel import EventChannel
from service.streaming.event_id import position_id
from service.streaming.many_operation import Following
from service.streaming.operation import Streams
from tests.following import (
    BLOB,
    begin_late,
    create,
    create_many,
    deaf,
    delete,
    etag_of,
    of_set,
    report,
    report_many,
    session,
    slow_reader,
    status_of,
    stream,
)
from tests.sse_reader import comes_true

KINDS = {"set": of_set("a", "c"), "batch": "/jobs/batch/b/events", "feed": "/jobs/events"}
EACH_KIND = pytest.mark.parametrize("path", KINDS.values(), ids=KINDS)


async def two_jobs(client):
    for job_id in ("a", "c"):
        await create(client, job_id, batch_id="b", tags=["z", "y", "x"])


async def known_id(client, path):
    """The id of a reader that has been told everything up to now."""
    async with stream(client, path) as events:
        while not events.parser.last_id:
            await events.next()
    return events.parser.last_id


async def told_after(client, path, last_id, how_many):
    """What a reader that comes back with `last_id` is told first, beside `open`: (job, version, previous status)."""
    async with stream(client, path, last_id) as events:
        told = []
        while len(told) < how_many:
            event = await events.next()
            if event.name != "open":
                told.append((event.data["id"], event.version))
        return told


async def told_to_all(hub):
    """Until the hub says that what was committed by now was told to everyone: it may still wait in a stream."""
    now = await hub._changes.position()
    await comes_true(lambda: (hub.position or 0) >= now)


def position_of(event_id):
    return int(re.fullmatch(r"p\.[0-9a-f]{8}\.(\d+)", event_id)[1])


# What a reader missed


@EACH_KIND
async def test_a_reader_that_comes_back_is_told_what_changed_since_and_no_more(client, path):
    await two_jobs(client)
    last_id = await known_id(client, path)
    async with stream(client, path, last_id) as events:
        if path == KINDS["feed"]:
            assert (await events.next()).name == "open"
        assert await events.quiet(0.2)
    await report(client, "c", "PROCESSING")
    await report(client, "c", percentage=40)
    async with stream(client, path, last_id) as events:
        changed = await events.until(lambda event: event.name != "open")
        assert (changed.data["id"], changed.version, changed.data["progress"]) == ("c", 3, {"percentage": 40})
        assert await events.quiet(0.2)
        assert events.parser.last_id == changed.id != last_id
    assert await told_after(client, f"{path}{'&' if '?' in path else '?'}last_event_id={last_id}", None, 1) == [
        ("c", 3)
    ]


@pytest.mark.parametrize("path", [*KINDS.values(), "/jobs/events?tags=x,y,z&status=queued,processing,completed"])
async def test_a_reader_goes_on_through_another_process(start_web, key, path):
    here, there = await start_web(), await start_web()
    async with session(here.url, key) as client, session(there.url, key) as other:
        await two_jobs(client)
        last_id = await known_id(client, path)
        await report(other, "a", "PROCESSING")
        await report(client, "c", "PROCESSING")
        assert sorted(await told_after(other, path, last_id, 2)) == [("a", 2), ("c", 2)]
        last_id = await known_id(other, path)
        await report(client, "a", "COMPLETED")
        await here.stop()
        assert ("a", 3) in await told_after(other, path, last_id, 1)


@EACH_KIND
async def test_creations_and_deletions_are_told_to_who_comes_back(client, path):
    await two_jobs(client)
    last_id = await known_id(client, path)
    await delete(client, "c")
    await create(client, "d", batch_id="b")
    expected = {("c", 2), ("d", 1)} if path != KINDS["set"] else {("c", 2)}
    async with stream(client, path, last_id) as events:
        told = []
        while len(told) < len(expected):
            event = await events.next()
            if event.name != "open":
                told.append((event.name, event.data["id"], event.version))
    assert {each[1:] for each in told} == expected
    assert ("deleted", "c", 2) in told


async def test_a_batch_that_ended_meanwhile_is_told_to_its_end(client):
    await create(client, "a", batch_id="b", batch_size=1)
    last_id = await known_id(client, KINDS["batch"])
    await report(client, "a", "COMPLETED")
    async with stream(client, KINDS["batch"], last_id) as events:
        assert [event.name for event in await events.rest()] == ["status", "batch"]
    assert await status_of(client, KINDS["batch"], events.parser.last_id) == 204


async def test_a_set_that_ended_meanwhile_is_told_to_its_end_and_one_that_was_told_is_204(client):
    await two_jobs(client)
    last_id = await known_id(client, KINDS["set"])
    await report(client, "a", "COMPLETED")
    await report(client, "c", "COMPLETED")
    async with stream(client, KINDS["set"], last_id) as events:
        assert [event.data["id"] for event in await events.rest()] == ["a", "c"]
    assert await status_of(client, KINDS["set"], events.parser.last_id) == 204


async def test_what_passed_through_a_status_meanwhile_meets_it(client):
    for job_id in ("a", "c", "d"):
        await create(client, job_id)
    feed = "/jobs/events?status=processing"
    last_id = await known_id(client, feed)
    await report(client, "a", "PROCESSING")
    await report(client, "a", "COMPLETED")
    await report(client, "c", "FAILED")
    await report(client, "d", "PROCESSING")
    await delete(client, "d")
    assert sorted(await told_after(client, feed, last_id, 2)) == [("a", 3), ("d", 3)]


@pytest.mark.usefixtures("quick_reconcile")
@pytest.mark.parametrize("changes", [1, 450])
async def test_a_filtered_feed_gets_a_new_position_even_where_nothing_was_for_it(client, inside, changes):
    """Else it would catch up with the same changes again and again, until they are too many."""
    await create_many(client, [f"j{n}" for n in range(changes)], user_id="others")
    feed = "/jobs/events?user_id=mine"
    async with stream(client, feed) as events:
        first = await events.next()
    await report_many(client, [{"id": f"j{n}", "status": "PROCESSING"} for n in range(changes)])
    async with stream(client, feed, first.id) as events:
        again, then = await events.next(), await events.next()
        assert (again.name, again.id) == ("open", first.id)
        assert (then.name, then.data) == ("open", {"position": then.id})
        assert position_of(then.id) > position_of(first.id)
        assert await events.quiet(0.3)
        await create(client, "mine", user_id="mine")
        assert (await events.next()).data["id"] == "mine"
    async with stream(client, feed, then.id) as events:
        assert [(await events.next()).name for _ in range(2)] == ["open", "status"]


# Ids that say nothing


GARBAGE = (
    "", " ", "0", "-1", "p", "p.", "p..", "p.x.1", "p.00000000.", "p.00000000.x", "p.00000000.-1", "e.", "e.1-2", "x" * 2000,
    "p." + "0" * 4000, "é", "p.\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660.\u0661", '"p.00000000.1"', "3-1795508717730", "null", "undefined", "%00", "p.0000 0000.1",
)  # fmt: skip


async def odd_ids(client, path):
    """Ids that no reader of these streams can go on from, with what they are."""
    async with stream(client, path) as events:
        while not events.parser.last_id:
            await events.next()
    ours = events.parser.last_id
    _, print_, position = ours.split(".")
    async with stream(client, of_set("a")) as of_a, stream(client, "/jobs/events?tags=t") as tagged:
        await of_a.next()
        await tagged.next()
    await create(client, "elsewhere", batch_id="elsewhere", batch_size=1)
    await report(client, "elsewhere", "COMPLETED")
    async with stream(client, of_set("elsewhere")) as of_jobs, stream(client, "/jobs/batch/elsewhere/events") as batch:
        await of_jobs.rest()
        await batch.rest()
    return [
        *GARBAGE,
        f"p.{print_}.9{position}",  # of the future
        f"p.{print_}.9999999999999999999",
        f"p.{print_}.{2**64}",
        f"p.{print_}.0",
        f"P.{print_}.{position}",
        f"{ours} ",
        f"p.{'0' * 8}.{position}",  # of another Postgres
        position_id("another", "", int(position)).decode(),
        of_a.parser.last_id,  # of a set of other jobs
        tagged.parser.last_id,  # of a feed with other filters
        of_jobs.parser.last_id,  # where another set ended
        batch.parser.last_id,
        await etag_of(client, "elsewhere"),
    ]


@EACH_KIND
async def test_an_id_that_says_nothing_gets_the_present_state_or_a_reset_at_once(client, unlimited_key, path):
    client.session.headers["X-API-Key"] = unlimited_key
    await two_jobs(client)
    for last_id in await odd_ids(client, path):
        for options in ({"params": {"last_event_id": last_id}}, {"last_id": last_id}):
            if "last_id" in options and (not last_id.isascii() or last_id != last_id.strip()):
                continue  # no header can say it
            async with stream(client, path, **options) as events:
                opening = {KINDS["set"]: [], KINDS["batch"]: ["reset"], KINDS["feed"]: ["reset"]}[path]
                if not last_id:
                    opening = ["open"] if path == KINDS["feed"] else []
                states = [] if path == KINDS["feed"] else ["status", "status"]
                for name in opening + states:
                    assert (await events.next(within_s=3)).name == name, last_id
                assert await events.quiet(0.01)
                assert position_of(events.parser.last_id)


@EACH_KIND
async def test_a_position_that_was_forgotten_gets_the_present_state_or_a_reset(client, sql, path):
    await two_jobs(client)
    last_id = await known_id(client, path)
    await report(client, "a", "PROCESSING")
    assert await told_after(client, path, last_id, 1) == [("a", 2)]
    assert await sql.fetchval("select forget_changes(interval '1 hour', 1000)") == 0
    assert await sql.fetchval("select forget_changes(interval '0 seconds', 1000)") > 0
    async with stream(client, path, last_id) as events:
        if path != KINDS["set"]:  # which says everything with its present state
            reset = await events.next()
            assert (reset.name, list(reset.data)) == ("reset", ["detail"])
        if path != KINDS["feed"]:
            assert [(await events.next()).version for _ in range(2)] == [2, 1]
        await report(client, "c", "PROCESSING")
        await events.until(lambda event: event.data.get("id") == "c" and event.version == 2)
    assert await told_after(client, path, await known_id(client, path), 0) == []


@EACH_KIND
@pytest.mark.parametrize("missed", ["as many as may be", "one more"])
@pytest.mark.parametrize("most", [500, pytest.param(10_000, marks=pytest.mark.long)])
async def test_who_missed_more_changes_than_can_be_told_reads_anew(client, monkeypatch, path, most, missed):
    if most != 10_000:
        monkeypatch.setattr(service.streaming.many_operation, "MOST_CHANGES", most)
    assert service.streaming.many_operation.MOST_CHANGES == most
    await two_jobs(client)
    last_id = await known_id(client, path)
    job_ids = [f"more-{n}" for n in range(most + (missed == "one more"))]
    await create_many(client, job_ids, batch_id="b")
    async with stream(client, path, last_id) as events:
        if path == KINDS["set"] and missed == "as many as may be":  # of other jobs
            assert await events.quiet(0.5)
        elif missed == "as many as may be":
            told = set()
            while not told >= set(job_ids):
                told.add((await events.next()).data.get("id"))
        else:
            if path != KINDS["set"]:
                assert (await events.next()).name == "reset"
            if path == KINDS["feed"]:
                assert await events.quiet(0.3)
            else:
                assert [(await events.next()).data["id"] for _ in range(2)] == ["a", "c"]


async def test_ten_thousand_changes_are_too_many_for_a_feed(client):
    await two_jobs(client)
    last_id = await known_id(client, "/jobs/events")
    await create_many(client, [f"more-{n}" for n in range(10_001)])
    async with stream(client, "/jobs/events", last_id) as events:
        assert (await events.next()).name == "reset"


# No id is newer than what its reader was sent


@pytest.mark.usefixtures("quick_reconcile")
@EACH_KIND
async def test_an_id_says_nothing_of_what_still_waits_for_a_slow_reader(client, unlimited_key, inside, path):
    client.session.headers["X-API-Key"] = unlimited_key
    await two_jobs(client)
    url = str(client.make_url(""))
    raw = await slow_reader(
        url, unlimited_key, path, until=lambda event: event.data.get("id") == "c" or path == KINDS["feed"]
    )
    (slow,) = inside[Streams]._open
    n = 0
    while not slow.has_more:
        n += 1
        await report(client, "a", metadata={"n": n, "blob": BLOB})
    await report(client, "c", "PROCESSING")
    await told_to_all(inside[Hub])
    version = (await report(client, "a", metadata={"n": -1}))["version"]
    first_read = len(raw.events.seen)
    await raw.events.until(lambda event: event.data["id"] == "a" and event.version == version)
    told = raw.events.seen[first_read:]
    assert any(event.data["id"] == "c" for event in told) or told[-1].data["id"] == "a"
    for place in {0, len(told) // 2, len(told) - 2, len(told) - 1}:
        known = {
            event.data["id"]: event.version
            for event in [*raw.events.seen[:first_read], *told[: place + 1]]
            if "id" in event.data
        }
        async with stream(client, path, told[place].id) as events:
            while known.get("a") != version or known.get("c") != 2:
                event = await events.next()
                if "id" in event.data:
                    known[event.data["id"]] = event.version


@pytest.mark.usefixtures("quick_reconcile")
async def test_an_id_says_nothing_of_what_is_known_to_be_newer_and_not_read_yet(client, inside, pause):
    await two_jobs(client)
    async with stream(client, KINDS["set"]) as events:
        await events.next()
        await events.next()
        deaf(inside[EventChannel], to=lambda topic, message: b'"a"' in message)
        reached, go_on = pause(StatusReader, "read_many_confirmed", "before")
        await report(client, "a", "PROCESSING")
        await asyncio.wait_for(reached.wait(), 5)  # the comparison has found it
        await told_to_all(inside[Hub])
        await report(client, "c", "PROCESSING")
        of_c = await events.next()
        assert of_c.data["id"] == "c"
        assert ("a", 2) in await told_after(client, KINDS["set"], of_c.id, 2)
        go_on.set()
        assert (await events.next()).data["id"] == "a"


@pytest.mark.usefixtures("quick_reconcile")
@pytest.mark.parametrize("path", [KINDS["batch"], KINDS["feed"]], ids=["batch", "feed"])
async def test_an_id_says_nothing_of_what_is_still_to_be_caught_up_with(client, inside, pause, path):
    job_ids = [f"j{n:03}" for n in range(250)]
    await two_jobs(client)
    last_id = await known_id(client, path)
    await create_many(client, job_ids, batch_id="b")
    reached, go_on = pause(Following, "_catch_up", "before")
    async with stream(client, path, last_id) as events:
        await asyncio.wait_for(reached.wait(), 5)
        await told_to_all(inside[Hub])
        await report(client, "c", "PROCESSING")
        of_c = await events.until(lambda event: event.data.get("id") == "c")
        go_on.set()
        told = await told_after(client, path, of_c.id or last_id, 251)
    assert {job_id for job_id, _ in told} >= set(job_ids)


@pytest.mark.parametrize("path", [KINDS["set"], KINDS["batch"]], ids=["set", "batch"])
async def test_what_redis_was_not_told_yet_is_in_what_a_reader_begins_with(client, start_web, sql, path):
    """Its id says that everything from before was told, and Redis may be behind by two seconds."""
    await two_jobs(client)
    await known_id(client, path)  # Redis and memory know the jobs
    alone = await start_web(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    async with session(alone.url, client.session.headers["X-API-Key"]) as writer:
        answer = await writer.patch("/jobs/c", json={"status": "PROCESSING"})
        assert answer.headers["Warning"].startswith("199 ")
        async with stream(client, path) as events:
            assert [(await events.next()).version for _ in range(2)] == [1, 2]


# A transaction that began earlier and commits late


@pytest.mark.usefixtures("quick_reconcile")
@EACH_KIND
async def test_what_commits_late_is_told_to_who_stays_and_to_who_comes_back(client, inside, sql, path):
    await two_jobs(client)
    # The relay announces what nobody else told: that is lost too.
    commit, xid = await begin_late(sql, "a", status="PROCESSING")
    async with stream(client, path) as stays:
        while not stays.parser.last_id:
            await stays.next()
        for percentage in (10, 20):
            await report(client, "c", percentage=percentage)
            passed = await stays.until(lambda event, p=percentage: event.data.get("progress") == {"percentage": p})
            await asyncio.sleep(0.5)  # some comparisons with Postgres
        assert position_of(passed.id) <= xid, "it is not told yet"
        deaf(inside[EventChannel])
        await commit()
        late = await stays.until(lambda event: event.data.get("id") == "a" and event.version == 2, within_s=10)
        assert late.status == "PROCESSING"
    assert ("a", 2) in await told_after(client, path, passed.id, 2)


@pytest.mark.usefixtures("no_reconcile")
@EACH_KIND
async def test_who_comes_back_before_a_late_commit_hears_of_it_when_it_comes(client, sql, path):
    await two_jobs(client)
    commit, _ = await begin_late(sql, "a", status="PROCESSING")
    last_id = await known_id(client, path)
    await report(client, "c", percentage=5)
    async with stream(client, path, last_id) as events:
        await events.until(lambda event: event.data.get("id") == "c" and event.version == 2)
        last_id = events.parser.last_id
    await commit()
    assert ("a", 2) in await told_after(client, path, last_id, 2)
