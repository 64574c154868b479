"""What only tests of streams need."""

import asyncio
import inspect
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

import service.hub
import service.streaming.operation
from service.hub import Hub
from service.identity import READ, WRITE
from service.stores.event_channel import EventChannel
from service.stores.key_memory import KeyMemory
from service.stores.status_memory import StatusMemory
from service.streaming.operation import Streams
from tests.conftest import make_key
from tests.following import UNLIMITED
from tests.sse_reader import RawReader


@pytest.fixture
async def key(database):
    """With the limits of every key: a stream takes its place of them."""
    return await make_key(database, "acme")


@pytest.fixture
async def unlimited_key(database):
    return await make_key(database, "acme", (READ, WRITE), UNLIMITED)


@pytest.fixture(autouse=True)  # before `client`
def inside(monkeypatch):
    """The parts of the service in this process by their class, once `client` has built it."""
    parts = {}

    def noting(kind):
        build = kind.__init__

        def built(self, *args, **options):
            parts[kind] = self
            build(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", built)

    for kind in (Streams, Hub, EventChannel, KeyMemory, StatusMemory):
        noting(kind)
    return parts


@pytest.fixture(autouse=True)
async def raw_readers():
    yield
    await RawReader.close_all()


@pytest.fixture(autouse=True)  # before `client`
async def redis(redis_url):
    """Empty: what our address has used up in another test is not ours."""
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()
        yield redis


@pytest.fixture
def two_streams(monkeypatch):
    monkeypatch.setenv("JOBWIRE_MAX_STREAMS_PER_KEY", "2")


@pytest.fixture
def a_thousand_streams(monkeypatch):
    monkeypatch.setenv("JOBWIRE_MAX_STREAMS_PER_KEY", "1000")


@pytest.fixture
def quick_ticks(monkeypatch):
    monkeypatch.setattr(service.streaming.operation, "TICK_EVERY_s", 0.01)


@pytest.fixture
def no_reconcile(monkeypatch):
    """So that what must be told by a message is not repaired unseen."""
    monkeypatch.setattr(service.hub, "RECONCILE_EVERY_s", 3600)


@pytest.fixture
def quick_reconcile(monkeypatch):
    monkeypatch.setattr(service.hub, "RECONCILE_EVERY_s", 0.2)


@pytest.fixture
def pause(monkeypatch):
    """`pause(kind, name, "before" or "after")`: the next call of a method (or `calls` of them) waits there, whether it is
    a coroutine, an asynchronous generator (after: with its first item) or a context (after: inside). Gives the events
    `reached` and `go_on`."""

    def at(kind, name, when, calls=1):
        reached, go_on = asyncio.Event(), asyncio.Event()
        original = getattr(kind, name)
        waiting = 0

        async def wait(now):
            nonlocal waiting
            if now == when and not reached.is_set():
                waiting += 1
                if waiting == calls:
                    reached.set()
                await go_on.wait()

        async def coroutine(self, *args, **options):
            await wait("before")
            answer = await original(self, *args, **options)
            await wait("after")
            return answer

        async def generator(self, *args, **options):
            await wait("before")
            async for item in original(self, *args, **options):
                await wait("after")
                yield item

        @asynccontextmanager
        async def context(self, *args, **options):
            await wait("before")
            async with original(self, *args, **options) as value:
                await wait("after")
                yield value

        if inspect.iscoroutinefunction(original):
            paused = coroutine
        else:
            paused = generator if inspect.isasyncgenfunction(original) else context
        monkeypatch.setattr(kind, name, paused)
        return reached, go_on

    return at
