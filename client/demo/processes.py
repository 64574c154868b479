"""The processes that the demo starts. None outlives it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from client.demo.folder import ROOT

T = TypeVar("T")

STARTS_WITHIN_s: Final = 60.0
ENDS_WITHIN_s: Final = 10.0
LINES_SHOWN: Final = 15
STOP: Final = signal.SIGINT
"""Ends the service in order even while it starts, when SIGTERM would leave its servers to their supervisors."""
PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>

_prctl: Callable[..., int] | None = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class Ended(Exception):
    """A process of ours has ended before its time, or with an error. The text says what it said last."""


@asynccontextmanager
async def running(module: Sequence[str], environment: Mapping[str, str], log: Path) -> AsyncIterator[Process]:
    """`python -m MODULE...`, which ends with the block. Its stderr goes to `log`; stdin and stdout are ours."""
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *module,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=PIPE,
            stdout=PIPE,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C is ours to handle: we end them in order
            preexec_fn=_be_our_child,
        )
    try:
        yield process
    finally:
        await _end(process)


@asynccontextmanager
async def service(data: Path, log: Path) -> AsyncIterator[tuple[Process, str, str]]:
    """The whole service on a free port: its process, address and key. Raises Ended."""
    environment = {
        "JOBWIRE_HOST": "127.0.0.1",
        "JOBWIRE_PORT": "0",
        "JOBWIRE_DATA": str(data),
        "JOBWIRE_LOG_LEVEL": "warning",
    }
    async with running(["service", "dev"], environment, log) as process:
        try:
            async with asyncio.timeout(STARTS_WITHIN_s):
                url, key = await _said(process, "ready", log), await _said(process, "key", log)
        except TimeoutError:
            raise Ended(f"The service was not ready within {STARTS_WITHIN_s:.0f} s.\n{last_lines(log)}") from None
        yield process, url, key


async def _said(process: Process, word: str, log: Path) -> str:
    """What follows `word` on the first line that begins with it. Raises Ended."""
    assert process.stdout is not None
    async for line in process.stdout:
        first, *rest = line.decode(errors="replace").split() or [""]
        if first == word and rest:
            return rest[0]
    raise Ended(f"The service could not start.\n{last_lines(log)}")


def last_lines(log: Path) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LINES_SHOWN:])


async def worked(process: Process, name: str, log: Path) -> None:
    """Waits for a process that ends by itself. Raises Ended if it failed."""
    if code := await process.wait():
        raise Ended(f"{name} ended with exit code {code}.\n{last_lines(log)}")


async def unless_it_ends(process: Process, name: str, log: Path, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of `work`. Raises Ended if the process, which should outlast it, ends before."""
    working, ending = asyncio.create_task(work), asyncio.create_task(process.wait())
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Ended(f"{name} ended with exit code {process.returncode}.\n{last_lines(log)}")
        return await working
    finally:
        working.cancel()
        ending.cancel()
        await asyncio.wait((working, ending))


async def _end(process: Process) -> None:
    """Ctrl-C, then SIGKILL. What the process still says is read, so that a full pipe does not hold it up."""
    with suppress(ProcessLookupError):
        process.send_signal(STOP)
    if process.stdin is not None:  # a worker that waits for a line gets an end
        process.stdin.close()
    try:
        async with asyncio.timeout(ENDS_WITHIN_s):
            await process.communicate()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _be_our_child() -> None:
    """In the child: STOP has its usual meaning, and comes from the kernel should the demo itself be SIGKILLed."""
    signal.signal(STOP, signal.SIG_DFL)  # a shell without job control lets what it puts in the background ignore it
    if _prctl:
        _prctl(PR_SET_PDEATHSIG, int(STOP), 0, 0, 0)
