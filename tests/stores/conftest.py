"""Real Redis for the tests of the stores: one server for the session, emptied before each test."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from service.embedded import Server, start_redis


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_redis(tmp_path_factory.mktemp("redis"), durable=False)
    yield server
    server.stop()


@pytest.fixture
async def admin(redis_server: Server) -> AsyncIterator[Redis]:
    """redis-py: somebody else who looks at the same server and meddles with it."""
    async with Redis.from_url(redis_server.url) as client:
        await client.flushall()
        yield client


@pytest.fixture
def frozen(redis_server: Server) -> Callable[[], AbstractContextManager[None]]:
    """`with frozen():` the server is there, takes connections, and answers nothing."""

    @contextmanager
    def freeze() -> Iterator[None]:
        os.kill(redis_server.pid, signal.SIGSTOP)
        try:
            while not _is_stopped(redis_server.pid):
                os.sched_yield()
            yield
        finally:
            os.kill(redis_server.pid, signal.SIGCONT)

    return freeze


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
