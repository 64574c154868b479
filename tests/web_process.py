"""A web process of its own, as production starts it: for tests of several processes and of their ends."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from typing import Self


class WebProcess:
    """`python -m service web` on a free port; `url` leads to it."""

    def __init__(self, process: Process, url: str) -> None:
        self.process = process
        self.url = url

    @classmethod
    async def start(cls, environment: dict[str, str], within_s: float = 20) -> Self:
        """Returns once it answers."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "service", "web", stdout=PIPE, env={**os.environ, "JOBWIRE_PORT": "0", **environment}
        )
        assert process.stdout is not None
        async with asyncio.timeout(within_s):
            while line := (await process.stdout.readline()).decode():
                if line.startswith("ready "):
                    return cls(process, line.split()[1])
        raise AssertionError(f"the web process ended with {await process.wait()} before it was ready")

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        self.process.send_signal(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    async def stop(self, within_s: float = 15) -> int:
        """SIGTERM, and SIGKILL if it does not end in time; returns the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                async with asyncio.timeout(within_s):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
        return await self.process.wait()
