"""The board: one line per job that moves as the job's stream tells, or, where nothing can move, a line per change."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Protocol, Self

import aiohttp
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from client.demo.calls import FINISHED
from client.demo.events import follow

STYLES: Final = {
    "queued": "dim",
    "PROCESSING": "cyan",
    "COMPLETED": "green",
    "FAILED": "bold red",
    "CANCELLED": "yellow",
}
STATUS_WIDTH: Final = max(map(len, STYLES))
STEP_SHOWN: Final = 25
"""Percent between two lines, where nothing can move."""


@dataclass(slots=True)
class Heard:
    """What the stream of one job has told so far. `job`: its last event, shape A."""

    changes: int = 0
    percentages: list[float] = field(default_factory=list)
    job: dict[str, Any] | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, job: dict[str, Any]) -> None:
        """One more event."""
        self.changes += 1
        self.percentages.append(percentage_of(job))
        self.job = job
        self.begun.set()


class Board(Protocol):
    """Shows jobs while it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing moves any more."""

    def show(self, job: Mapping[str, Any]) -> None:
        """The present state of a job, shape A."""


def board_for(console: Console, names: Mapping[str, str]) -> Board:
    """Bars that move where the terminal lets them, else lines. `names`: of each job, by id."""
    return BarBoard(console, names) if console.is_interactive else LineBoard(console, names)


async def watch(session: aiohttp.ClientSession, job_id: str, board: Board, heard: Heard) -> None:
    """Follows a job until it is finished or deleted; what is told goes to `board` and `heard`."""
    async with aclosing(follow(session, f"jobs/{job_id}/events")) as events:
        async for event in events:
            if event.name == "deleted":
                return
            if event.name in ("status", "progress", "stalled"):
                job = json.loads(event.data)
                heard.take(job)
                board.show(job)
                if job["status"] in FINISHED:
                    return


def percentage_of(job: Mapping[str, Any]) -> float:
    """How far a job is; 0 where nobody said."""
    percentage: float = job["progress"].get("percentage", 0)
    return percentage


def message_of(job: Mapping[str, Any]) -> str:
    """What a job is at, or what ended it."""
    if job["error_details"]:
        return f"{job['error_details']['error_type']}: {job['error_details']['message']}"
    return str(job["progress"].get("message", ""))


class BarBoard:
    """A bar per job, on a terminal."""

    def __init__(self, console: Console, names: Mapping[str, str]) -> None:
        widest = min(max(map(len, names.values()), default=0), console.width // 3)
        self._bars = Progress(
            _Name(table_column=Column(width=widest, no_wrap=True, overflow="ellipsis")),
            _Bar(table_column=Column(ratio=1)),
            _Percentage(table_column=Column(width=4, justify="right")),
            _Status(table_column=Column(width=STATUS_WIDTH, no_wrap=True)),
            _Message(table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
        )
        self._ids: dict[str, TaskID] = {
            job_id: self._bars.add_task(name, total=100, status="queued", message="") for job_id, name in names.items()
        }

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def show(self, job: Mapping[str, Any]) -> None:
        """Moves the bar of a job."""
        self._bars.update(
            self._ids[job["id"]],
            completed=percentage_of(job),
            status=job["status"],
            message=message_of(job),
        )


class LineBoard:
    """A line whenever a job's status changes, and at every STEP_SHOWN percent: for pipes, logs and dumb terminals."""

    def __init__(self, console: Console, names: Mapping[str, str]) -> None:
        self._console = console
        self._names = names
        self._width = max(map(len, names.values()), default=0)
        self._began = time.monotonic()
        self._shown: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def show(self, job: Mapping[str, Any]) -> None:
        """Prints, if there is something new to print."""
        job_id, status, percentage = job["id"], job["status"], percentage_of(job)
        now = status, int(percentage // STEP_SHOWN)
        if self._shown.get(job_id) != now:
            self._shown[job_id] = now
            passed_s = time.monotonic() - self._began
            name = self._names[job_id].ljust(self._width)
            line = f"{passed_s:5.1f} s  {name}  {percentage:3.0f} %  {status:{STATUS_WIDTH}}  {message_of(job)}"
            self._console.print(Text(line.rstrip()), soft_wrap=True)


class _Name(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.description)


class _Bar(ProgressColumn):
    """Rich's bar, in the colour of the status."""

    def render(self, task: Task) -> ProgressBar:
        style = STYLES[task.fields["status"]]
        return ProgressBar(total=100, completed=task.completed, complete_style=style, finished_style=style)


class _Percentage(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}%")


class _Status(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["status"], STYLES[task.fields["status"]])


class _Message(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["message"], "red" if task.fields["status"] == "FAILED" else "")
