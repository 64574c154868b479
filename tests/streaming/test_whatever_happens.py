"""Reports, lost messages, an untold Redis, late commits and cuts in any order: in the end every reader knows the truth.

The reader is an EventSource that is cut off at any event it has seen, forgets what it heard after that, and comes back
with that event's id: so every id is held to what it says.
"""

import asyncio
import itertools
from contextlib import suppress

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import service.hub
from service.stores.event_channel import EventChannel
from service.stores.status_cache import StatusCache
from service.stores.status_memory import StatusMemory
from tests.following import begin_late, create, of_set
from tests.sse_reader import EventReader, comes_true

JOBS = ("a", "b", "c", "late")
LIKE = "select id, version, status from jobs where starts_with(id, $1)"

changes = st.sampled_from(["PROCESSING", "FAILED", "COMPLETED", "retry", "delete", *["progress"] * 5])
steps = st.one_of(
    st.tuples(st.just("report"), st.sampled_from(JOBS[:3]), changes),
    st.tuples(st.just("report_untold"), st.sampled_from(JOBS[:3]), changes),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.sampled_from(["lose_messages", "hear_messages", "begin_late", "commit_late", "be_compared"])),
)
_prefixes = (f"x{number}-" for number in itertools.count())


class Reader:
    """`view`: of each job the newest (version, status) that it was told. `marks`: the ids with which it could come back,
    each with the view that it had then."""

    def __init__(self, client, path, read_anew):
        self._client, self._path, self._read_anew = client, path, read_anew
        self.view, self.marks = {}, [("", {})]
        self._reading = asyncio.create_task(self._read_on())

    async def close(self):
        self._reading.cancel()
        with suppress(asyncio.CancelledError):
            await self._reading

    async def cut(self, how_far):
        await self.close()
        self.marks = self.marks[: 1 + round(how_far * (len(self.marks) - 1))]
        self.view = dict(self.marks[-1][1])
        self._reading = asyncio.create_task(self._read_on())

    async def _read_on(self):
        while True:
            last_id = self.marks[-1][0]
            async with self._client.get(self._path, headers={"Last-Event-ID": last_id} if last_id else {}) as response:
                if response.status == 204:
                    await asyncio.sleep(0.02)  # EventSource would stop here, until its page asks again
                else:
                    with suppress(EOFError):
                        await self._read(EventReader.of(response), fresh=not last_id)

    async def _read(self, events, *, fresh):
        newest = {}
        if fresh:
            self.view = {}
        while True:
            event = await events.next(within_s=60)
            if event.name == "reset" or (event.name == "open" and fresh):
                self.view = await self._read_anew()
            elif "version" in event.data:
                job_id, version = event.data["id"], event.version
                assert version >= newest.get(job_id, 0), "a version went back"
                newest[job_id] = version
                if version >= self.view.get(job_id, (0, ""))[0]:
                    self.view[job_id] = version, event.status
            self.marks.append((event.id or self.marks[-1][0], dict(self.view)))


class World:
    """The jobs of one example, and what may happen to them."""

    def __init__(self, client, inside, sql, late_sql, told):
        self.prefix = next(_prefixes)
        self._client, self._sql, self._late_sql, self._told = client, sql, late_sql, told
        self._channel, self._memory = inside[EventChannel], inside[StatusMemory]
        self._hear = self._channel.on_message
        self._looking = asyncio.Lock()
        self._commit = None
        self._said = itertools.count()

    async def truth(self):
        """What Postgres holds; a reader that was told of a deletion knows as much."""
        async with self._looking:
            return {row["id"]: (row["version"], row["status"]) for row in await self._sql.fetch(LIKE, self.prefix)}

    async def report(self, job, change):
        path = f"/jobs/{self.prefix}{job}"
        if change == "retry":
            answer = await self._client.post(f"{path}/retry")
        elif change == "delete":
            answer = await self._client.delete(path)
        else:
            said = {"progress": {"message": f"{next(self._said)}"}} if change == "progress" else {"status": change}
            answer = await self._client.patch(path, json=said)
        assert answer.status in (200, 404, 409), await answer.text()

    async def report_untold(self, job, change):
        """As another process does that has lost Redis: entries stay old until the relay comes to it."""
        self._told.clear()
        await self.report(job, change)
        self._told.set()
        self._memory.drop((1, f"{self.prefix}{job}"))

    async def lose_messages(self):
        self._channel.on_message = lambda topic, message: None

    async def hear_messages(self):
        self._channel.on_message = self._hear

    async def begin_late(self):
        if self._commit is None:
            message = f'{{"message": "{next(self._said)}"}}'
            self._commit, _ = await begin_late(self._late_sql, f"{self.prefix}late", progress=message)

    async def commit_late(self):
        if self._commit is not None:
            commit, self._commit = self._commit, None
            await commit()

    async def be_compared(self):
        await asyncio.sleep(3 * service.hub.RECONCILE_EVERY_s)


@pytest.fixture
async def late_sql(database):
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@pytest.fixture
def told(monkeypatch):
    """While it is not set Redis is told nothing."""
    telling = asyncio.Event()
    telling.set()
    put = StatusCache.put

    async def put_if_told(self, put_changes):
        return telling.is_set() and await put(self, put_changes)

    monkeypatch.setattr(StatusCache, "put", put_if_told)
    monkeypatch.setattr(service.hub, "RECONCILE_EVERY_s", 0.03)
    return telling


def path_of(kind, prefix):
    if kind == "set":
        return of_set(*(prefix + job for job in JOBS))
    return f"/jobs/batch/{prefix}batch/events" if kind == "batch" else f"/jobs/events?tags={prefix}"


async def hold(kind, client, key, inside, sql, late_sql, told, story):
    client.session.headers["X-API-Key"] = key
    world = World(client, inside, sql, late_sql, told)
    for job in JOBS:
        await create(client, world.prefix + job, batch_id=f"{world.prefix}batch", tags=[world.prefix])
    reader = Reader(client, path_of(kind, world.prefix), world.truth)
    try:
        for name, *how in story:
            await (reader.cut(*how) if name == "cut" else getattr(world, name)(*how))
        await world.hear_messages()
        await world.commit_late()
        await knows(reader, world)
        for how_far in (0.75, 0.5, 0.25):
            await reader.cut(how_far)
            await knows(reader, world)
    finally:
        await world.hear_messages()
        await world.commit_late()
        await reader.close()


async def knows(reader, world):
    async def has_the_truth():
        if reader._reading.done():
            reader._reading.result()
        there = {job_id: state for job_id, state in reader.view.items() if state[1] is not None}
        return there == await world.truth()

    try:
        await comes_true(has_the_truth, within_s=5)
    except TimeoutError:
        raise AssertionError(f"{reader.view} is not {await world.truth()}; {reader.marks}") from None


@pytest.mark.parametrize("kind", ["set", "batch", "feed"])
@settings(max_examples=60)
@given(story=st.lists(steps, max_size=25))
async def test_in_the_end_every_reader_knows_the_truth(client, unlimited_key, inside, sql, late_sql, told, kind, story):
    await hold(kind, client, unlimited_key, inside, sql, late_sql, told, story)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["set", "batch", "feed"])
@settings(max_examples=400)
@given(story=st.lists(steps, max_size=60))
async def test_in_the_end_every_reader_knows_the_truth_at_length(
    client, unlimited_key, inside, sql, late_sql, told, kind, story
):
    await hold(kind, client, unlimited_key, inside, sql, late_sql, told, story)
