"""`make demo`: composes the service, the worker, the board and the poller, and says whether all went as promised.

    python -m client.demo [FOLDER]

JOBWIRE_URL and JOBWIRE_API_KEY, if both are set, name a service that runs already.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from client.demo.board import STYLES, Heard, board_for, message_of, watch
from client.demo.calls import Refused, open_session
from client.demo.documents import open_document
from client.demo.folder import ROOT, chosen_from, lay_ready, own_documents
from client.demo.poller import Polled, poll
from client.demo.processes import Ended, last_lines, running, service, unless_it_ends, worked
from client.demo.verdict import Told, Verdict, judge
from client.demo.worker import AT_ONCE, PACE_s, failure

T = TypeVar("T")

TOLD_WITHIN_s: Final = 10.0
"""When the worker has ended everything is committed: stream and poller get this long to hear of it."""
ANSWERS_WITHIN_s: Final = 5.0
PLAIN_WIDTH: Final = 120
"""Columns where no terminal says how many there are."""
STOPS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Somebody sent one of STOPS, whose number is the argument."""


@dataclass(frozen=True, slots=True)
class Demo:
    """One run in a folder of its own, `scratch`. `folder`: whose documents; None for the project's."""

    console: Console
    scratch: Path
    folder: Path | None
    pace_s: float

    async def run(self) -> bool:
        """Whether everything went as promised. Raises Ended and Refused, perhaps in a group."""
        damaged = self._lay_ready()
        told = await self._with_a_service()
        verdict = judge(told, damaged, lambda name: error_of(self._documents / name, name))
        show_end(self.console, told, verdict)
        return verdict.kept

    @property
    def _documents(self) -> Path:
        return self.scratch / "documents"

    def _lay_ready(self) -> list[str]:
        self._documents.mkdir()
        if self.folder is None:
            return lay_ready(own_documents(), ROOT, self._documents)
        return lay_ready(chosen_from(self.folder), self.folder, self._documents)

    async def _with_a_service(self) -> list[Told]:
        """With the one that the environment names, else with one of our own."""
        url, key = os.environ.get("JOBWIRE_URL"), os.environ.get("JOBWIRE_API_KEY")
        if url and key:
            await somebody_answers(url)
            return await self._with(url, key)
        self._say("starting a service with a Postgres and a Redis of its own ...")
        log = self.scratch / "service.log"
        async with service(self.scratch / "data", log) as (process, url, key):
            return await unless_it_ends(process, "The service", log, self._with(url, key))

    async def _with(self, url: str, key: str) -> list[Told]:
        self._say(f"service  {url}")
        log = self.scratch / "worker.log"
        arguments = ["client.demo.worker", str(self._documents), "--wait", "--pace", str(self.pace_s)]
        environment = {"JOBWIRE_URL": url, "JOBWIRE_API_KEY": key}
        async with running(arguments, environment, log) as worker, open_session(url, key) as session:
            return await self._watch(session, worker, log)

    async def _watch(self, session: aiohttp.ClientSession, worker: Process, log: Path) -> list[Told]:
        """Shows the jobs while the worker works; returns what was told of each."""
        told = await self._registered(worker, log)
        names = {job_id: each.name for job_id, each in told.items()}
        with board_for(self.console, names) as board:
            async with asyncio.TaskGroup() as group:
                following = [
                    group.create_task(reader)
                    for job_id, each in told.items()
                    for reader in (watch(session, job_id, board, each.heard), poll(session, job_id, each.polled))
                ]
                group.create_task(_let_begin(worker, told))
                await worked(worker, "The worker", log)
                _, late = await asyncio.wait(following, timeout=TOLD_WITHIN_s)
                for task in late:
                    task.cancel()
        return list(told.values())

    async def _registered(self, worker: Process, log: Path) -> dict[str, Told]:
        """The documents by the ids of their jobs, once the worker has registered them."""
        assert worker.stdout is not None
        line = await worker.stdout.readline()
        if not line:
            raise Ended(f"The worker could not register its documents.\n{last_lines(log)}")
        batch = json.loads(line)
        self._say(f"batch    {batch['batch_id']}: {len(batch['jobs'])} documents, {AT_ONCE} at a time\n")
        return {job["id"]: Told(job["pdf_name"], Polled(), Heard()) for job in batch["jobs"]}

    def _say(self, text: str) -> None:
        self.console.print(Text(text))


async def _let_begin(worker: Process, told: Mapping[str, Told]) -> None:
    """The worker begins when every stream is open: who comes late would not see all that moves."""
    for each in told.values():
        await each.heard.begun.wait()
    assert worker.stdin is not None
    worker.stdin.write(b"\n")


async def somebody_answers(url: str) -> None:
    """Raises Ended unless there is a service: a worker would wait for it, a person who mistyped would not."""
    try:
        async with asyncio.timeout(ANSWERS_WITHIN_s), aiohttp.request("GET", url.rstrip("/") + "/healthz"):
            pass
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Ended(f"Nothing answers at JOBWIRE_URL, {url}: {str(error) or type(error).__name__}") from error


def error_of(path: Path, name: str) -> dict[str, str] | None:
    """The `error_details` of a document that cannot be read, as somebody else finds them who reads it."""
    try:
        document = open_document(name, path.read_bytes())
        for number in range(1, document.page_count + 1):
            document.page(number)
    except Exception as error:  # whatever its library raises is what is asked for
        details: dict[str, str] = failure(name, error)["error_details"]
        return details
    return None


def show_end(console: Console, told: Sequence[Told], verdict: Verdict) -> None:
    """What the poller saw, and whether the promises were kept."""
    console.print(Text("\nWhat a plain poller saw at the end\n", "bold"))
    console.print(_table(told))
    console.print()
    for promise, kept in verdict.promises:
        console.print(Text.assemble(("yes  ", "green") if kept else ("NO   ", "bold red"), promise))
    console.print(Text(f"\n{verdict.summary}"), soft_wrap=not console.is_terminal)


def _table(told: Sequence[Told]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("name", overflow="fold")
    table.add_column("status")
    table.add_column("pages", justify="right")
    table.add_column("words", justify="right")
    table.add_column("most frequent terms, or the error", overflow="fold")
    for each in told:
        status = Text(each.status, STYLES.get(each.status, ""))
        table.add_row(Text(each.name), status, *_result_cells(each))
    return table


def _result_cells(told: Told) -> tuple[str, str, Text]:
    if told.polled.result:
        result = told.polled.result
        terms = ", ".join(f"{term['term']} {term['count']}" for term in result["terms"])
        return str(result["pages"]), f"{result['words']:,}", Text(terms)
    error = message_of(told.polled.job) if told.polled.job else ""
    return "", "", Text(error, "red")


async def until_stopped(work: Coroutine[Any, Any, T]) -> T:
    """`work`, cancelled by the first of STOPS, so that every block ends what it has begun. Then raises Stopped."""
    task = asyncio.create_task(work)
    caught: list[int] = []

    def stop(number: int) -> None:
        if not caught:  # a second one must not disturb the end
            caught.append(number)
            task.cancel()

    for number in STOPS:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if caught:
            raise Stopped(caught[0]) from None
        raise


def errors_in(error: Exception) -> Mapping[str, None]:
    """The sentences of an error or a group of errors, each once."""
    if isinstance(error, ExceptionGroup):
        return {sentence: None for inner in error.exceptions for sentence in errors_in(inner)}
    if isinstance(error, Ended | Refused):
        return {str(error): None}
    raise error


def _console() -> Console:
    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=PLAIN_WIDTH)


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--pace",
    "pace_s",
    type=click.FloatRange(min=0),
    default=PACE_s,
    show_default=True,
    metavar="SECONDS",
    help="The least time for a page.",
)
def main(folder: Path | None, pace_s: float) -> None:
    """Show a worker at real documents: those of FOLDER, else the project's own.

    Ends with 0 if everything went as promised.
    """
    with tempfile.TemporaryDirectory(prefix="jobwire-demo-", ignore_cleanup_errors=True) as scratch:
        demo = Demo(_console(), Path(scratch), folder and folder.resolve(), pace_s)
        try:
            kept = asyncio.run(until_stopped(demo.run()))
        except Stopped as stopped:
            demo.console.print("\nStopped; nothing is left running.")
            sys.exit(128 + stopped.args[0])
        except Exception as error:
            raise click.ClickException("\n".join(errors_in(error))) from error
    sys.exit(not kept)


if __name__ == "__main__":
    main(prog_name="python -m client.demo")
