"""`Prefer: wait`: a poll that is held until there is something to say, and costs next to nothing until then."""

import asyncio
import contextlib
import re
import statistics
import time
from unittest.mock import AsyncMock

import aiohttp
import pytest
from redis.asyncio import Redis

import service.hub
from service.embedded import free_port
from service.errors import Unavailable
from service.hub import Hub
from service.identity import READ, WRITE
from service.limiting.limiter import Limiter
from service.polling.operation import Waiting
from service.status_reader import StatusReader
from service.stores.event_channel import EventChannel
from service.stores.key_memory import BELIEVED_s, KeyMemory
from service.stores.key_table import KeyTable
from tests.conftest import make_key
from tests.sse_reader import RawReader, comes_true

UNLIMITED = {"stream": "none", "write": "none", "poll": "none"}


@pytest.fixture
async def key(database):
    """With the limits of every key: a wait takes its place of them."""
    return await make_key(database, "acme")


async def create(client, job_id):
    created = await client.post("/jobs", json={"id": job_id, "type": "extraction"})
    assert created.status == 201, await created.text()


async def report(client, job_id, **said):
    reported = await client.patch(f"/jobs/{job_id}", json=said)
    assert reported.status == 200, await reported.text()


async def etag_of(client, job_id):
    return (await client.get(f"/jobs/{job_id}")).headers["ETag"]


def wait(seconds, etag=None):
    return {"Prefer": f"wait={seconds}", **({"If-None-Match": etag} if etag else {})}


def left(headers):
    """Places of the limit."""
    return int(re.search(r"r=(\d+)", headers["RateLimit"])[1])


def waiter(client, job_id, seconds=30, etag=None, path="/jobs/{}", key=None):
    """A poll that waits, as a task; ends with (status, headers, body)."""
    headers = wait(seconds, etag) | ({"X-API-Key": key} if key else {})

    async def poll():
        async with client.get(path.format(job_id), headers=headers) as answer:
            return answer.status, answer.headers, await answer.json() if answer.status != 304 else None

    return asyncio.create_task(poll())


async def ended(task, within_s=5):
    async with asyncio.timeout(within_s):
        return await task


def session(url, key):
    return aiohttp.ClientSession(url, headers={"X-API-Key": key}, connector=aiohttp.TCPConnector(limit=0))


@pytest.fixture(autouse=True)
def from_the_inside(inside):
    """Before `client`."""


@pytest.fixture(autouse=True)
async def raw_readers():
    yield
    await RawReader.close_all()


@pytest.fixture
def held(inside):
    """`await held(n)`: until n polls are held."""

    async def until(how_many):
        await comes_true(lambda: len(inside[Waiting]) == how_many)

    return until


@pytest.fixture
def clock():
    return time.monotonic


@pytest.fixture(autouse=True)  # before `client`
async def redis(redis_url):
    """Empty: what our address has used up in another test is not ours."""
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
        yield redis


@pytest.fixture
async def unlimited_key(database):
    return await make_key(database, "acme", (READ, WRITE), UNLIMITED)


# What it waits for


async def test_without_a_version_it_waits_for_the_end(client, held):
    await create(client, "end")
    waiting = waiter(client, "end", 100)
    await held(1)
    await report(client, "end", status="PROCESSING")
    await report(client, "end", progress={"percentage": 50})
    assert not (await asyncio.wait([waiting], timeout=0.3))[0]
    await report(client, "end", status="COMPLETED")
    status, headers, body = await ended(waiting)
    assert (status, body["status"], body["version"]) == (200, "COMPLETED", 4)
    assert headers["Preference-Applied"] == "wait=30"
    assert headers["ETag"] == await etag_of(client, "end")
    await held(0)


async def test_who_waits_for_the_end_sleeps_through_everything_else(client, held, monkeypatch):
    monkeypatch.setattr(Hub, "_reconcile", AsyncMock())
    looks = []
    read = StatusReader.read

    async def noting(self, *key):
        looks.append(key)
        return await read(self, *key)

    monkeypatch.setattr(StatusReader, "read", noting)
    await create(client, "sleeps")
    waiting = waiter(client, "sleeps")
    await held(1)
    for percentage in range(5):
        await report(client, "sleeps", status="PROCESSING", progress={"percentage": percentage})
    await report(client, "sleeps", status="COMPLETED")
    assert (await ended(waiting))[2]["status"] == "COMPLETED"
    assert len(looks) == 2, "on arrival, and at the end"


async def test_every_end_is_an_end(client, held):
    for end in ("COMPLETED", "FAILED", "CANCELLED"):
        await create(client, end)
        waiting = waiter(client, end, path="/jobs/{}/status")
        await held(1)
        await report(client, end, status=end)
        status, _, body = await ended(waiting)
        assert (status, body["job_id"], body["status"]) == (200, end, end.lower())


async def test_with_a_version_it_waits_for_the_next(client, held):
    await create(client, "next")
    changes = ({"status": "PROCESSING"}, {"progress": {"percentage": 1}}, {"metadata": {"a": 1}})
    for version, said in enumerate(changes, start=2):
        waiting = waiter(client, "next", etag=await etag_of(client, "next"))
        await held(1)
        await report(client, "next", **said)
        status, headers, body = await ended(waiting)
        assert (status, body["version"]) == (200, version)
        assert headers["Preference-Applied"] == "wait=30"


async def test_a_version_may_be_written_in_every_way(client, held):
    """A proxy that compresses makes ETags weak: such a poll must wait, not come back at once for ever."""
    await create(client, "ways")
    etag = await etag_of(client, "ways")
    ways = (f"W/{etag}", f'"0-0", {etag}', f'{etag},W/"7-7"', "*")
    waiting = [waiter(client, "ways", 1, written) for written in ways]
    await held(len(ways))
    for each in waiting:
        assert (await ended(each))[0] == 304


async def test_what_it_waits_for_may_be_there_already(client, clock):
    await create(client, "there")
    old = await etag_of(client, "there")
    await report(client, "there", status="COMPLETED")
    started = clock()
    for etag in (None, old, '"malformed'):
        status, headers, body = await ended(waiter(client, "there", etag=etag))
        assert (status, body["status"], headers["Preference-Applied"]) == (200, "COMPLETED", "wait=30")
    assert clock() - started < 5


async def test_at_the_end_of_its_time_it_says_what_there_is(client, clock):
    await create(client, "time")
    started = clock()
    plain, conditional = waiter(client, "time", 1), waiter(client, "time", 1, await etag_of(client, "time"))
    status, headers, body = await ended(plain)
    assert (status, body["status"], headers["Preference-Applied"]) == (200, "queued", "wait=1")
    assert "Retry-After" in headers
    status, headers, _ = await ended(conditional)
    assert (status, headers["Preference-Applied"], headers["ETag"]) == (304, "wait=1", await etag_of(client, "time"))
    assert 0.95 < clock() - started < 4


async def test_a_finished_job_that_is_known_is_waited_for_too(client):
    """A retry may change it."""
    await create(client, "known")
    await report(client, "known", status="FAILED")
    waiting = waiter(client, "known", etag=await etag_of(client, "known"))
    assert not (await asyncio.wait([waiting], timeout=0.2))[0]
    await client.post("/jobs/known/retry")
    assert (await ended(waiting))[2]["status"] == "queued"


async def test_a_wait_of_nothing_is_a_poll(client, clock, inside):
    await create(client, "nothing")
    etag = await etag_of(client, "nothing")
    started = clock()
    status, headers, _ = await ended(waiter(client, "nothing", 0))
    assert (status, headers["Preference-Applied"]) == (200, "wait=0")
    before = left(headers)
    status, headers, _ = await ended(waiter(client, "nothing", 0, etag))
    assert (status, headers["Preference-Applied"]) == (304, "wait=0")
    assert left((await client.get("/jobs/nothing")).headers) == before - 1, "a 304 takes no place"
    assert clock() - started < 5
    assert not inside[EventChannel]._topics, "nothing is waited for"


async def test_a_wait_ends_with_the_state_of_its_end_not_of_its_beginning(client, held, inside, monkeypatch):
    """Progress wakes nobody who waits for the end, and a message may be lost: what was read on arrival is old."""
    monkeypatch.setattr(Hub, "_reconcile", AsyncMock())
    await create(client, "old")
    waiting = waiter(client, "old", 1)
    deaf = waiter(client, "old", 1, await etag_of(client, "old"))
    await held(2)
    await comes_true(lambda: [waker.version for waker in inside[Waiting]._held] == [1, 1])
    inside[EventChannel].on_message = lambda topic, message: None
    await report(client, "old", status="PROCESSING")
    for each in (waiting, deaf):
        status, _, body = await ended(each)
        assert (status, body["status"], body["version"]) == (200, "PROCESSING", 2)


@pytest.mark.parametrize(
    ("lines", "applied"),
    [
        (["wait=3600"], 30),
        (["wait=" + "9" * 7000], 30),
        (["wait=0000000007"], 7),
        (["wait=" + "0" * 7000 + "7"], 7),
        (['wait="7"'], 7),
        (["Wait=7"], 7),
        (["WAIT = 7"], 7),
        (["wait\t=\t7"], 7),
        (['wait = "7" ; foo = bar'], 7),
        (["Wait=7;foo=bar"], 7),
        (["respond-async, wait=7"], 7),
        ([", ,wait=7,"], 7),
        (["return=minimal", "wait=7"], 7),
        (["wait=7, wait=9"], 7),
        (["wait=7", "wait=9"], 7),
        (['note="a, wait=9", wait=7'], 7),
        (['note="say \\", wait=9", wait=7'], 7),
        (['note="never closed', "wait=7"], 7),
        (["foo;wait=9, wait=7"], 7),
    ],
    ids=lambda lines: str(lines)[:20],
)
async def test_the_preference_is_read_as_rfc_7240_says(client, held, lines, applied):
    await create(client, "read")
    headers = [("Prefer", line) for line in lines]
    polling = asyncio.create_task(client.get("/jobs/read", headers=headers))
    await held(1)
    await report(client, "read", status="COMPLETED")
    assert (await ended(polling)).headers["Preference-Applied"] == f"wait={applied}"


async def test_a_preference_that_makes_no_sense_is_none(client, clock):
    await create(client, "sense")
    started = clock()
    for prefer in (
        "",
        "wait",
        "wait=",
        'wait=""',
        "wait=x",
        "wait=-1",
        "wait=+1",
        "wait=1.5",
        "wait=1_0",
        "wait=²",
        "wait=٣",
        'wait="5',
        'wait=5"',
        "wait=5 6",
        "wait=x, wait=9",  # only the first instance of a preference counts
        "return=minimal",
        "wait=10s",
        ";,=,",
        "waits=9",
        "foo;wait=9",
        'foo="wait=9, wait=9',
        '"wait"=9',
    ):
        async with client.get("/jobs/sense", headers={"Prefer": prefer}) as answer:
            assert answer.status == 200, prefer
            assert "Preference-Applied" not in answer.headers, prefer
    assert clock() - started < 5


async def test_what_cannot_be_waited_for_is_said_at_once(client, database):
    await create(client, "mine")
    assert (await ended(waiter(client, "none")))[0] == 404
    foreign = {**wait(30), "X-API-Key": await make_key(database, "other")}
    assert (await client.get("/jobs/mine", headers=foreign)).status == 403


async def test_a_job_deleted_meanwhile_is_404(client, held):
    await create(client, "deleted")
    waiting = [waiter(client, "deleted"), waiter(client, "deleted", etag=await etag_of(client, "deleted"))]
    await held(2)
    await client.delete("/jobs/deleted")
    for each in waiting:
        status, headers, body = await ended(each)
        assert (status, body["details"]["error_type"]) == (404, "deleted")
        assert "RateLimit" in headers
    await held(0)


async def test_a_wait_takes_one_place_and_takes_it_on_arrival(client, redis):
    await create(client, "place")
    async with client.get("/jobs/place") as polled:
        etag, before = polled.headers["ETag"], left(polled.headers)
    unchanged = waiter(client, "place", 1, etag)

    async def taken():
        async with client.get("/jobs/place") as polled:
            nonlocal before
            before -= 1  # this one's own
            return left(polled.headers) == before - 1

    await comes_true(taken, within_s=1)  # while it waits
    status, headers, _ = await ended(unchanged)
    assert status == 304
    assert left(headers) < before + 2


@pytest.mark.parametrize("prefer", ["respond-async", "return=minimal, wait=x", "wait=0"])
async def test_who_prefers_anything_else_than_a_wait_takes_no_place_with_a_304(client, prefer):
    await create(client, "free")
    async with client.get("/jobs/free") as polled:
        etag, before = polled.headers["ETag"], left(polled.headers)
    for _ in range(3):
        async with client.get("/jobs/free", headers={"Prefer": prefer, "If-None-Match": etag}) as unchanged:
            assert (unchanged.status, "RateLimit" in unchanged.headers) == (304, False)
    async with client.get("/jobs/free") as polled:
        assert left(polled.headers) == before - 1


# Whose key ends


async def test_a_wait_ends_with_its_key(client, database, held, sql, clock):
    mine, theirs = [await make_key(database, "acme", scopes, UNLIMITED) for scopes in ((READ,), (WRITE, READ))]
    expiring = await make_key(database, "acme", (READ, "admin"))
    await create(client, "ending")
    await client.post("/jobs", json={"id": "in-batch", "type": "x", "batch_id": "ending"})
    addresses = ["/jobs/{}"] * 20 + ["/jobs/{}/status"] * 20 + ["/jobs/batch/{}"] * 2
    revoked = [waiter(client, "ending", path=path, key=mine) for path in addresses]
    expired = waiter(client, "ending", key=expiring)
    others = waiter(client, "ending", key=theirs)
    await held(len(addresses) + 2)
    started = clock()
    await sql.execute("update keys set revoked_at = clock_timestamp() where scopes = '{jobs:read}'")
    await sql.execute("update keys set expires_at = clock_timestamp() where scopes @> '{admin}'")
    for each in [*revoked, expired]:
        status, headers, body = await ended(each)
        assert (status, body["details"]["error_type"]) == (401, "unauthorized")
        assert "WWW-Authenticate" in headers
    assert "RateLimit" in headers, "its place stays taken"
    assert clock() - started < 4
    await held(1)
    await report(client, "ending", status="COMPLETED")
    assert (await ended(others))[0] == 200


async def test_a_key_that_ends_before_its_wait_is_held_is_refused(client, database, sql, inside, monkeypatch):
    """Between the door and the wait the place is taken, and the key may be forgotten: nobody would tell the wait."""
    await create(client, "between")
    ending = await make_key(database, "acme", (READ,))
    reached, go_on = asyncio.Event(), asyncio.Event()
    take = Limiter.take

    async def paused(self, *args):
        reached.set()
        await go_on.wait()
        return await take(self, *args)

    monkeypatch.setattr(Limiter, "take", paused)
    waiting = waiter(client, "between", key=ending)
    await reached.wait()
    await sql.execute("update keys set revoked_at = clock_timestamp() where scopes = '{jobs:read}'")
    await inside[KeyMemory].tick()
    go_on.set()
    assert (await ended(waiting))[0] == 401


async def test_a_key_of_which_nobody_can_say_whether_it_is_valid_gets_503_and_not_401(
    client, database, held, inside, monkeypatch
):
    await create(client, "unsure")
    waiting = waiter(client, "unsure", key=await make_key(database, "acme", (READ,)))
    await held(1)

    async def away(self, hashes):
        raise Unavailable()

    monkeypatch.setattr(KeyTable, "still_valid", away)
    monkeypatch.setattr(inside[KeyMemory], "_clock", lambda: time.monotonic() + BELIEVED_s)
    with contextlib.suppress(Unavailable):
        await inside[KeyMemory].tick()
    inside[KeyMemory]._forget(inside[KeyMemory]._not_believed())
    status, _, body = await ended(waiting)
    assert (status, body["details"]["error_type"]) == (503, "unavailable")


# How soon, and what it costs


async def test_a_wait_ends_as_soon_as_the_change_is_there(start_web, unlimited_key, clock):
    web, other = await start_web(), await start_web()
    took = []
    async with session(web.url, unlimited_key) as client, session(other.url, unlimited_key) as writer:
        await create(client, "soon")
        for n in range(50):
            waiting = waiter(client, "soon", etag=await etag_of(client, "soon"))
            await asyncio.sleep(0.01)
            await report(writer, "soon", metadata={"n": n})
            reported = clock()
            status, _, body = await ended(waiting)
            took.append(clock() - reported)
            assert (status, body["metadata"]) == (200, {"n": n})
    assert statistics.median(took) < 0.25


async def test_three_hundred_waits_on_thirty_jobs_are_thirty_subscriptions(start_web, unlimited_key, redis):
    web = await start_web()
    topics = [f"jw:job:1:of-{n}" for n in range(30)]

    async def subscribed():
        counts = await redis.execute_command("PUBSUB", "NUMSUB", *topics)
        return counts[1::2] == [1] * 30

    async with session(web.url, unlimited_key) as client:
        await asyncio.gather(*(create(client, f"of-{n}") for n in range(30)))
        waiting = [waiter(client, f"of-{n % 30}") for n in range(300)]
        await comes_true(subscribed)
        await asyncio.gather(*(report(client, f"of-{n}", status="COMPLETED") for n in range(30)))
        ends = await asyncio.gather(*(ended(each) for each in waiting))
        assert {(status, body["status"]) for status, _, body in ends} == {(200, "COMPLETED")}
        assert await subscribed()


async def test_who_hangs_up_frees_the_place_at_once(client, key, held):
    await create(client, "hang")
    url = str(client.make_url(""))
    raws = [await RawReader.open(url, "/jobs/hang", key, headers=wait(30)) for _ in range(10)]
    await held(10)
    for raw in raws[:5]:
        raw.hang_up()
    for raw in raws[5:9]:
        raw.writer.close()  # politely
    await held(1)
    await report(client, "hang", status="COMPLETED")
    assert await raws[9].answer() == 200
    await held(0)


async def test_who_hangs_up_before_it_is_held_is_not_held(client, key, inside, monkeypatch, held):
    await create(client, "early")
    reached, go_on = asyncio.Event(), asyncio.Event()
    take = Limiter.take

    async def paused(self, *args):
        if not reached.is_set():
            reached.set()
            await go_on.wait()
        return await take(self, *args)

    monkeypatch.setattr(Limiter, "take", paused)
    raw = await RawReader.open(str(client.make_url("")), "/jobs/early", key, headers=wait(30))
    async with asyncio.timeout(5):
        await reached.wait()
    connections = client.server.runner.server.connections
    (of_raw,) = [one for one in connections if one.transport.get_extra_info("peername") == raw.address]
    raw.hang_up()
    await comes_true(lambda: of_raw.transport is None)
    most = 0
    entered = Waiting.read

    async def read(self, *args):
        nonlocal most
        most += 1
        return await entered(self, *args)

    monkeypatch.setattr(Waiting, "read", read)
    go_on.set()
    await comes_true(lambda: most == 1)
    await held(0)


async def test_one_connection_waits_again_and_again(client, key, held):
    await create(client, "again")
    etag = await etag_of(client, "again")
    raw = await RawReader.open(str(client.make_url("")), "/jobs/again", key, headers=wait(30, etag))
    for version in (2, 3, 4):
        await held(1)
        await report(client, "again", metadata={"version": version})
        assert await raw.answer() == 200
        length = int(re.search(rb"Content-Length: (\d+)", raw.head)[1])
        assert b'"version":%d' % version in await raw.reader.readexactly(length)
        etag = re.search(rb"ETag: (\S+)", raw.head)[1].decode()
        head = f"GET /jobs/again HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nPrefer: wait=30\r\nIf-None-Match: {etag}\r\n\r\n"
        raw.writer.write(head.encode())
    await held(1)
    raw.hang_up()
    await held(0)


# Whatever happens


async def test_a_lost_message_is_repaired(client, held, inside, monkeypatch):
    monkeypatch.setattr(service.hub, "RECONCILE_EVERY_s", 0.2)
    await create(client, "lost")
    waiting = [waiter(client, "lost"), waiter(client, "lost", etag=await etag_of(client, "lost"))]
    await held(2)
    inside[EventChannel].on_message = lambda topic, message: None
    await report(client, "lost", status="COMPLETED")
    for each in waiting:
        assert (await ended(each, within_s=10))[2]["status"] == "COMPLETED"


async def test_waits_end_in_a_process_that_has_no_redis(start_web, key):
    here, alone = await start_web(), await start_web(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    async with session(here.url, key) as writer, session(alone.url, key) as client:
        await create(writer, "alone")
        await create(writer, "alone-gone")
        waiting, gone = waiter(client, "alone", etag=await etag_of(client, "alone")), waiter(client, "alone-gone")
        await report(writer, "alone", status="PROCESSING")
        await writer.delete("/jobs/alone-gone")
        assert (await ended(waiting, within_s=10))[2]["status"] == "PROCESSING"
        assert (await ended(gone, within_s=10))[0] == 404


async def test_waits_are_woken_by_what_a_process_without_redis_writes(start_web, key):
    here, alone = await start_web(), await start_web(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0")
    async with session(here.url, key) as client, session(alone.url, key) as writer:
        await create(client, "aside")
        await create(client, "aside-gone")
        waiting, gone = waiter(client, "aside"), waiter(client, "aside-gone")
        await report(writer, "aside", status="COMPLETED")
        await writer.delete("/jobs/aside-gone")
        assert (await ended(waiting, within_s=10))[2]["status"] == "COMPLETED"
        assert (await ended(gone, within_s=10))[0] == 404


async def test_a_process_that_stops_answers_its_waits_at_once(start_web, unlimited_key, redis, clock):
    web = await start_web()

    async def all_are_held():
        return await redis.execute_command("PUBSUB", "NUMSUB", "jw:job:1:stop") == [b"jw:job:1:stop", 1]

    async with session(web.url, unlimited_key) as client:
        await create(client, "stop")
        etag = await etag_of(client, "stop")
        waiting = [waiter(client, "stop", etag=etag) for _ in range(50)] + [waiter(client, "stop") for _ in range(50)]
        await comes_true(all_are_held)
        assert (await client.get("/jobs/stop")).status == 200  # has seen all that was sent before
        started = clock()
        stopping = asyncio.create_task(web.stop())
        ends = [(await ended(each))[0] for each in waiting]
        assert ends == [304] * 50 + [200] * 50
        assert await stopping == 0
        assert clock() - started < 3


async def test_a_process_that_stops_holds_no_more(client, inside, clock):
    await create(client, "more")
    inside[Waiting].end_all()
    started = clock()
    assert (await ended(waiter(client, "more")))[0] == 200
    assert clock() - started < 2
