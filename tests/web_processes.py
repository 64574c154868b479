"""Several web processes behind one port, as production starts them: gunicorn with deploy/gunicorn.conf.py."""

import asyncio
import os
import re
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, Self

from service.embedded import free_port

CONFIGURATION = "deploy/gunicorn.conf.py"
ROOT = Path(__file__).parent.parent
WITHIN_s = 60
"""A machine that does other work as well takes seconds to start a Python."""

SERVES = re.compile(r"Worker serves \(pid: (\d+)\)")


class WebProcesses:
    """A master and its processes. `url` leads to all of them."""

    def __init__(self, master: Process, log: BinaryIO, port: int, how_many: int) -> None:
        self.master = master
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._how_many = how_many

    @classmethod
    async def launch(cls, environment: dict[str, str], *options: str, how_many: int = 2) -> Self:
        """Returns at once; see `serve`. `options` are gunicorn's."""
        port = free_port()
        log = tempfile.TemporaryFile()  # noqa: SIM115 -- `stop` closes it; a pipe would make wait() wait for a second master
        master = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).with_name("gunicorn")), "-c", CONFIGURATION, *options),
            cwd=ROOT,
            env={**os.environ, **environment, "JOBWIRE_PORT": str(port), "WEB_CONCURRENCY": str(how_many)},
            stderr=log,
        )
        return cls(master, log, port, how_many)

    @property
    def said(self) -> str:
        """What the master and its processes have logged."""
        return os.pread(self._log.fileno(), 2**24, 0).decode()

    @property
    def pids(self) -> set[int]:
        """Of all but the master."""
        return children(self.master.pid)

    async def serve(self, instead_of: Collection[int] = ()) -> None:
        """Returns once as many as there should be serve, and those `instead_of` whom they do have gone."""
        async with asyncio.timeout(WITHIN_s):
            while len(pids := self.pids & self.serving()) < self._how_many or pids != self.pids or pids & {*instead_of}:
                assert self.master.returncode is None, f"the master ended with {self.master.returncode}"
                await asyncio.sleep(0.05)

    async def reload(self) -> None:
        """HUP. Returns once all processes are others."""
        old = self.pids
        self.master.send_signal(signal.SIGHUP)
        await self.serve(instead_of=old)

    def clients_of(self, pid: int) -> set[int]:
        """The ports from which the clients speak whose connections this process has taken."""
        sockets = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
        ours = re.compile(rf" *\d+: \w+:{self.port:04X} \w+:(\w{{4}}) 01 (?:\S+ +){{5}}(\d+) ")
        connections = [ours.match(line) for line in Path("/proc/net/tcp").read_text().splitlines()]
        return {int(found[1], 16) for found in connections if found and f"socket:[{found[2]}]" in sockets}

    async def ended(self, within_s: float = WITHIN_s) -> int:
        """Waits for the master's end; its exit code."""
        async with asyncio.timeout(within_s):
            return await self.master.wait()

    async def stop(self) -> None:
        """In a hurry. Nothing of them is left."""
        left = self.pids
        for pid in left:
            os.kill(pid, signal.SIGCONT)
        if self.master.returncode is None:
            self.master.send_signal(signal.SIGINT)
        try:
            await self.ended()
        finally:
            for pid in (each for each in left if is_there(each)):
                os.kill(pid, signal.SIGKILL)
            sys.stderr.write(self.said)
            self._log.close()

    def serving(self) -> set[int]:
        """All that have said so."""
        return {int(pid) for pid in SERVES.findall(self.said)}


def children(pid: int) -> set[int]:
    """Those that this process has started and that are there."""
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def is_there(pid: int) -> bool:
    """Whether there is such a process (a zombie is none)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False
