"""One web process of several: gunicorn starts it, gives it the socket, watches it, and tells it to end."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, cast

import uvloop
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker

if TYPE_CHECKING:
    from service.serving import ServiceRunner

BEAT_EVERY_s: Final = 1.0


class WebWorker(Worker):
    """Differs from aiohttp's worker in that no request is lost when it ends, and that a crowd is shared by all.

    SIGTERM lets it go on for JOBWIRE_DRAIN seconds; SIGINT and SIGQUIT are in a hurry. It beats to the very end, and
    a master that died is an order to end. When gunicorn aborts it for being stuck it says where it is stuck.
    The application is a coroutine function that makes a ServiceRunner.
    """

    def init_signals(self) -> None:
        """The master's handlers are not ours; ours belong to the event loop."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it would reopen log files, and there are none
        faulthandler.enable()

    def run(self) -> None:
        """Serves until told to end."""
        from service.settings import BadSettings  # here: what the master has imported, HUP does not load anew

        self.booted = False  # not before connections are taken
        try:
            uvloop.run(self._serve())
        except BadSettings as error:
            self.log.error("%s", error)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def _serve(self) -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        service = await cast("Callable[[], Awaitable[ServiceRunner]]", self.wsgi)()

        def interrupt() -> None:
            service.at_once.set()
            stop.set()

        loop.add_signal_handler(signal.SIGTERM, stop.set)
        for number in (signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(number, interrupt)
        beating = asyncio.create_task(self._beat(stop))
        await service.setup()
        try:
            for listening in self.sockets:
                service.listen(listening)
            self.booted = True
            self.log.info("Worker serves (pid: %s)", self.pid)
            await stop.wait()
        finally:
            await service.cleanup()
            beating.cancel()

    async def _beat(self, stop: asyncio.Event) -> None:
        while True:
            self.notify()
            if os.getppid() != self.ppid:
                stop.set()
            await asyncio.sleep(BEAT_EVERY_s)
