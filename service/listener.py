"""Takes connections from a socket that several processes share."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

import structlog

BACKLOG: Final = 2048
"""Connections that wait to be taken: everyone comes back at once when a process has ended."""
AT_A_TIME: Final = 4
BREATH_s: Final = 0.001
"""After so many connections in a row a process lets others take theirs."""
FULL_PAUSE_s: Final = 0.5
"""After an accept that failed, because this process has no descriptor left."""

_log = structlog.get_logger(__name__)


class Listener:
    """Takes one connection per turn of the event loop, and a few in a row, so that a crowd is shared by all processes.

    (uvloop's own server takes all that wait: one process gets them, and the others idle.)
    """

    def __init__(self, sock: socket.socket, protocol: Callable[[], asyncio.BaseProtocol]) -> None:
        """Begins at once. `protocol` makes what serves a connection."""
        self._sock = sock
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._arriving: set[asyncio.Task[object]] = set()
        self._in_a_row = 0
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._take()

    async def stop(self) -> None:
        """Takes no more; those that were taken are served. What waits in the socket is for the others."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        await asyncio.gather(*self._arriving, return_exceptions=True)

    def _take(self) -> None:
        self._in_a_row = 0
        self._loop.add_reader(self._sock, self._accept)

    def _rest(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(seconds, self._take)

    def _accept(self) -> None:
        try:
            connection, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another process was faster, or the client has gone
            return
        except OSError as error:
            _log.error("cannot_accept", error=str(error))
            self._rest(FULL_PAUSE_s)
            return
        connection.setblocking(False)
        arriving = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
        self._arriving.add(arriving)
        arriving.add_done_callback(self._arrived)
        self._in_a_row += 1
        if self._in_a_row >= AT_A_TIME:
            self._rest(BREATH_s)

    def _arrived(self, arriving: asyncio.Task[object]) -> None:
        self._arriving.discard(arriving)
        if not arriving.cancelled() and arriving.exception() is not None:
            _log.error("connection_failed", exc_info=arriving.exception())
