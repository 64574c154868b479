"""Servers of one test alone, to be killed, frozen and started again on the same port; and a look past the service."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from service.embedded import Server, start_postgres, start_redis


class OwnServer:
    """`start(port)` starts it on whatever its folder holds. Starting blocks, so a thread does it."""

    def __init__(self, start: Callable[[int | None], Server]) -> None:
        self._start = start
        self._server = start(None)
        self.url = self._server.url

    async def start(self) -> None:
        """Again, on the same port and data."""
        self._server = await asyncio.to_thread(self._start, urlsplit(self.url).port)

    def kill(self) -> None:
        """SIGKILL, and nothing of it is left."""
        os.kill(self._server.pid, signal.SIGKILL)
        self._server.stop()

    def freeze(self) -> None:
        """SIGSTOP: it takes connections and answers nothing. (Of Postgres only the postmaster stops.)"""
        os.kill(self._server.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self._server.pid, signal.SIGCONT)

    def stop(self) -> None:
        """For good."""
        self._server.stop()

    def keep_a_copy(self) -> None:
        """Of its data as they are on disk now. (Of Postgres while it is down.)"""
        shutil.copytree(self._server.data, self._copy)
        owner = self._server.data.stat()
        for path in [self._copy, *self._copy.rglob("*")]:
            os.chown(path, owner.st_uid, owner.st_gid)

    def put_the_copy_back(self) -> None:
        """While it is down: the next start finds old data."""
        shutil.rmtree(self._server.data)
        self._copy.rename(self._server.data)

    def empty(self) -> None:
        """While it is down: the next start finds no data."""
        for path in self._server.data.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def make_a_standby(self) -> None:
        """While it is down: the next start of Postgres waits for a primary, and is read-only."""
        signal_file = self._server.data / "standby.signal"
        signal_file.touch()
        owner = self._server.data.stat()
        os.chown(signal_file, owner.st_uid, owner.st_gid)

    @property
    def _copy(self) -> Path:
        return self._server.data.with_suffix(".copy")


def own_redis(folder: Path, *, durable: bool) -> OwnServer:
    """`durable`: what it was told last is there after a kill."""
    options = ("--appendfsync", "always") if durable else ()
    return OwnServer(lambda port: start_redis(folder, durable=durable, port=port, options=options))


def own_postgres(folder: Path) -> OwnServer:
    """What it committed is there after a kill, if the machine goes on."""
    options = {"synchronous_commit": "on"}
    return OwnServer(lambda port: start_postgres(folder, durable=False, port=port, options=options))


@asynccontextmanager
async def connected(database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Postgres itself, past the service."""
    connection = await asyncpg.connect(database)
    try:
        yield connection
    finally:
        await connection.close()
