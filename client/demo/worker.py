"""The worker: registers the documents of a folder as one batch and works through them, reporting as it goes.

    JOBWIRE_URL=http://127.0.0.1:8080 JOBWIRE_API_KEY=jw_... python -m client.demo.worker FOLDER

Once the batch is registered it prints one line of JSON: the batch, and the id and name of each job.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import uuid4

import aiohttp
import click

from client.demo.calls import Refused, call, open_session
from client.demo.documents import Extraction, open_document
from client.demo.folder import documents_in

T = TypeVar("T")

AT_ONCE: Final = 4
PACE_s: Final = 0.3
"""The least time for a page. Here a page takes a few milliseconds; one that needs OCR or a model takes seconds."""
MESSAGE_CHARACTERS: Final = 1000
"""Of an error's text; the service takes 4 KiB."""


@dataclass(frozen=True, slots=True)
class Task:
    """A document and the job that it became. `attempt` fences reports: another attempt would be another worker's."""

    path: Path
    name: str
    job_id: str
    attempt: int


class Unreadable(Exception):
    """The document cannot be read; the cause says why, in its library's words."""


class Worker:
    """Reports to the service about the documents of one folder."""

    def __init__(self, session: aiohttp.ClientSession, pace_s: float) -> None:
        self._session = session
        self._pace_s = pace_s

    async def register(self, folder: Path) -> tuple[str, list[Task]]:
        """One job per document, all in one closed batch: the batch's id, and the jobs in the order of their names."""
        batch_id = f"demo-{uuid4()}"
        paths = {_sendable(str(path.relative_to(folder))): path for path in documents_in(folder)}
        jobs = [await asyncio.to_thread(_new_job, name, path, batch_id) for name, path in paths.items()]
        if not jobs:
            raise click.ClickException(f"There are no documents in {folder}.")
        jobs[-1]["close_batch"] = True
        created = await call(self._session, "POST", "jobs", json=jobs, headers={"Idempotency-Key": batch_id})
        return batch_id, [
            Task(paths[job["pdf_name"]], job["pdf_name"], job["id"], job["attempt"]) for job in created.json()["jobs"]
        ]

    async def work(self, tasks: list[Task]) -> None:
        """All of them, AT_ONCE at a time."""
        waiting = iter(tasks)
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._take_from(waiting))

    async def _take_from(self, waiting: Iterator[Task]) -> None:
        for task in waiting:
            try:
                await self._do(task)
            except Refused as refused:  # somebody cancelled, deleted or took over the job: it is no longer ours
                click.echo(f"{task.name}: {refused}", err=True)

    async def _do(self, task: Task) -> None:
        await self._report(task, status="PROCESSING", progress={"percentage": 0, "message": "opening"})
        try:
            result = await self._extract(task)
        except Unreadable as unreadable:
            await self._report(task, status="FAILED", **failure(task.name, unreadable.__cause__ or unreadable))
            return
        parameters = {"complete": "true", "attempt": str(task.attempt)}
        await call(self._session, "PUT", f"jobs/{task.job_id}/result", params=parameters, json=result)

    async def _extract(self, task: Task) -> dict[str, Any]:
        """Page by page. The percentage says what is done, the message what is being done."""
        document = await _reading(lambda: open_document(task.name, task.path.read_bytes()))
        total = document.page_count
        extraction = Extraction()
        for number in range(1, total + 1):
            progress = {"percentage": 100 * (number - 1) // total, "message": f"page {number} of {total}"}
            await self._report(task, progress=progress | {"step": "extract"})
            extraction.add(await _reading(partial(document.page, number), least_s=self._pace_s))
        return extraction.result()

    async def _report(self, task: Task, **said: Any) -> None:
        await call(self._session, "PATCH", f"jobs/{task.job_id}", json=said | {"attempt": task.attempt})


def failure(name: str, error: BaseException) -> dict[str, Any]:
    """The `error` and `error_details` that tell of a real exception."""
    error_type = type(error).__name__
    text = _sendable(str(error) or error_type)[:MESSAGE_CHARACTERS]
    return {
        "error": f"{name} could not be read: {text}",
        "error_details": {"error_type": error_type, "message": text},
    }


async def _reading(read: Callable[[], T], least_s: float = 0) -> T:
    """What `read` returns, in a thread, because it computes; takes at least `least_s`. Raises Unreadable."""
    pace = asyncio.create_task(asyncio.sleep(least_s))
    try:
        found = await asyncio.to_thread(read)
    except Exception as error:  # whatever a document does to its library is this job's end, not the worker's
        pace.cancel()
        raise Unreadable from error
    await pace
    return found


def _sendable(text: str) -> str:
    """Without what JSON in UTF-8 or Postgres cannot hold."""
    return text.replace("\0", "").encode(errors="replace").decode()


def _new_job(name: str, path: Path, batch_id: str) -> dict[str, Any]:
    content = path.read_bytes()
    return {
        "type": "extraction",
        "pdf_name": name,
        "pdf_hash": f"sha256:{hashlib.sha256(content).hexdigest()}",
        "file_count": 1,
        "metadata": {"bytes": len(content)},
        "batch_id": batch_id,
        "progress": {"percentage": 0, "message": "waiting"},
    }


async def _run(folder: Path, url: str, key: str, pace_s: float, wait: bool) -> None:
    async with open_session(url, key) as session:
        worker = Worker(session, pace_s)
        batch_id, tasks = await worker.register(folder)
        jobs = [{"id": task.job_id, "pdf_name": task.name} for task in tasks]
        click.echo(json.dumps({"batch_id": batch_id, "jobs": jobs}))
        if wait:
            await asyncio.to_thread(sys.stdin.readline)
        await worker.work(tasks)


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--url", envvar="JOBWIRE_URL", required=True, help="The service; else JOBWIRE_URL.")
@click.option("--key", envvar="JOBWIRE_API_KEY", required=True, help="A key that may write; better in JOBWIRE_API_KEY.")
@click.option("--pace", "pace_s", type=click.FloatRange(min=0), default=PACE_s, show_default=True, metavar="SECONDS")
@click.option("--wait", is_flag=True, help="Begin when a line comes on stdin.")
def main(folder: Path, url: str, key: str, pace_s: float, wait: bool) -> None:
    """Register every document in FOLDER, work through them and report to the service."""
    try:
        asyncio.run(_run(folder, url, key, pace_s, wait))
    except Refused as refused:
        raise click.ClickException(str(refused)) from refused


if __name__ == "__main__":
    main(prog_name="python -m client.demo.worker")
