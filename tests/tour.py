"""The contract's main paths, through two processes: what one is told the other says. For every place that is supported.

Each part is a test of its own on jobs of its own; `PARTS` names them all.
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import asyncpg

from tests.conftest import make_key
from tests.speaker import Answer, Speaker, speaking, until
from tests.sse_reader import EventReader
from tests.web_process import WebProcess

WITHIN_s = 20.0
"""For what takes moments on a machine that has nothing else to do."""


@dataclass
class Place:
    """Two processes on stores of some kind. `environment` is theirs; `postgres` and `redis` lead past them."""

    one: WebProcess
    other: WebProcess
    speaker: Speaker
    key: str
    environment: dict[str, str]
    postgres: asyncpg.Connection

    async def ask(self, method: str, path: str, expected: int = 200, **request: Any) -> Answer:
        """Of the first process, and at ease: the other judges what it did."""
        answer = await self.speaker.ask(self.one, method, path, **request)
        assert answer.status == expected, answer
        return answer

    async def other_says(self, path: str, expected: int = 200, **request: Any) -> Answer:
        answer = await self.speaker.ask(self.other, "GET", path, **request)
        assert answer.status == expected, answer
        return answer

    async def create(self, *jobs: str, **fields: Any) -> None:
        items = [{"id": job, "type": "extraction", **fields} for job in jobs]
        assert len((await self.ask("POST", "/jobs", 201, json=items)).json["jobs"]) == len(jobs)

    async def command(self, *arguments: str) -> str:
        """`python -m service` with the same environment; its stdout."""
        environment = {**os.environ, **self.environment}
        command = (sys.executable, "-m", "service", *arguments)
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, env=environment)
        said, _ = await process.communicate()
        assert process.returncode == 0
        return said.decode()


Part = Callable[[Place], Awaitable[None]]


async def a_life(place: Place) -> None:
    """Created, reported on, failed, run again, completed with a result, deleted: each step is seen at once."""
    created = await place.ask("POST", "/jobs", 201, json={"id": "life", "type": "extract", "metadata": {"a": 1}})
    assert created.headers["Location"] == "/jobs/life"
    assert (await place.other_says("/jobs/life")).json["status"] == "queued"
    await place.ask("PATCH", "/jobs/life", json={"status": "PROCESSING", "progress": {"percentage": 40, "step": "ocr"}})
    seen = await place.other_says("/jobs/life")
    assert (seen.json["status"], seen.json["progress"]["percentage"], seen.version) == ("PROCESSING", 40, 2)
    await place.other_says("/jobs/life", 304, headers={"If-None-Match": seen.etag})
    await place.ask("PATCH", "/jobs/life", 412, json={"status": "COMPLETED"}, headers={"If-Match": '"1-1"'})
    await place.ask("PATCH", "/jobs/life", json={"status": "FAILED", "error": "page 7 is damaged"})
    assert (await place.other_says("/jobs/life/result", 409)).json["details"]["error_type"] == "no_result"
    await place.ask("POST", "/jobs/life/retry")
    await place.ask("PATCH", "/jobs/life", 409, json={"progress": {"percentage": 1}, "attempt": 1})
    await place.ask("PUT", "/jobs/life/result", params={"complete": "true"}, data=b"\0\1\2")
    assert (await place.other_says("/jobs/life/result")).body == b"\0\1\2"
    assert (await place.other_says("/jobs/life/status")).json["status"] == "completed"
    history = (await place.other_says("/jobs/life/history")).json
    told = [entry["status"] for entry in history["history"]]
    assert told == ["queued", "PROCESSING", "FAILED", "queued", "COMPLETED"]
    await place.ask("DELETE", "/jobs/life")
    assert (await place.other_says("/jobs/life", 404)).json["details"]["error_type"] == "deleted"


async def group_commits(place: Place) -> None:
    """Two processes report on the same jobs at once: no update is lost, and both say the same afterwards."""
    jobs = [f"group-{number}" for number in range(10)]
    await place.create(*jobs)
    webs = (place.one, place.other)
    said = [place.speaker.say(webs[n % 2], job, f"message {n}") for n in range(20) for job in jobs]
    answers = await asyncio.gather(*said)
    assert sorted(answer.version for answer in answers) == sorted(list(range(2, 22)) * len(jobs))
    many = [{"id": job, "status": "COMPLETED"} for job in jobs] + [{"id": "group-none", "status": "COMPLETED"}]
    results = (await place.ask("PATCH", "/jobs", json=many)).json["results"]
    assert [result["status"] for result in results] == [200] * len(jobs) + [404]
    for web in webs:
        assert {(await place.speaker.poll(web, job)).version for job in jobs} == {22}


async def idempotent_creation(place: Place) -> None:
    """Ten at once through two processes make one job; what repeats is told the first answer."""

    def create(web: WebProcess, **fields: Any) -> Awaitable[Answer]:
        body = {"type": "parse", **fields}
        return place.speaker.ask(web, "POST", "/jobs", json=body, headers={"Idempotency-Key": "order-17"})

    answers = await asyncio.gather(*(create(web) for web in (place.one, place.other) * 5))
    assert sorted({answer.status for answer in answers}) in ([200, 201], [201, 409], [200, 201, 409])
    assert [answer.status for answer in answers].count(201) == 1
    (first,) = (answer for answer in answers if answer.status == 201)
    repeated = await create(place.other)
    assert (repeated.status, repeated.json) == (200, first.json)
    assert (await create(place.one, user_id="u")).json["details"]["error_type"] == "idempotency_mismatch"


async def many_jobs(place: Place) -> None:
    """Lists, pages, batches and the bulk read."""
    await place.create("b-1", "b-2", "b-3", batch_id="batch", tags=["eu"], close_batch=True)
    await place.ask("PATCH", "/jobs/b-1", json={"status": "COMPLETED"})
    await place.ask("PATCH", "/jobs/b-2", json={"status": "FAILED", "error": "no"})
    batch = await place.other_says("/jobs/batch/batch")
    assert [batch.json[name] for name in ("completed_jobs", "failed_jobs", "total_jobs", "closed")] == [1, 1, 3, True]
    held = {"If-None-Match": batch.etag}
    await place.other_says("/jobs/batch/batch", 304, headers=held)
    waiting = asyncio.create_task(place.other_says("/jobs/batch/batch", headers=held | {"Prefer": "wait=20"}))
    await place.ask("POST", "/jobs/b-3/cancel")
    assert (await waiting).json["cancelled_jobs"] == 1
    assert (await place.other_says("/jobs/batch/batch")).json["status"] == "completed_with_failures"
    page = (await place.other_says("/jobs?tags=eu&status=completed,failed&limit=1")).json
    assert (page["pagination"]["total"], page["pagination"]["has_more"]) == (2, True)
    cursor = page["pagination"]["next_cursor"]
    rest = (await place.other_says(f"/jobs?tags=eu&status=completed,failed&limit=1&cursor={cursor}")).json
    assert {job["job_id"] for job in page["jobs"] + rest["jobs"]} == {"b-1", "b-2"}
    bulk = (await place.other_says("/jobs/status?job_ids=b-1,b-none,b-3")).json["jobs"]
    assert [job["status"] for job in bulk] == ["completed", None, "cancelled"]


async def waiting(place: Place) -> None:
    """A held poll is answered by a report through the other process."""
    await place.create("wait")
    seen = await place.other_says("/jobs/wait")
    held = {"If-None-Match": seen.etag, "Prefer": "wait=20"}
    waiter = asyncio.create_task(place.other_says("/jobs/wait", headers=held))
    await asyncio.sleep(0.2)
    await place.ask("PATCH", "/jobs/wait", json={"status": "PROCESSING"})
    answer = await waiter
    assert (answer.json["status"], answer.version) == ("PROCESSING", 2)
    assert answer.took_s < WITHIN_s


async def streams(place: Place) -> None:
    """A job to its end; a batch and a feed, each resumed from its position with what changed meanwhile."""
    await place.create("s-1", "s-2", batch_id="streamed")
    async with following(place, "/jobs/s-1/events") as job, following(place, "/jobs/events") as feed:
        assert (await job.next()).status == "queued"
        assert (await feed.next()).name == "open"
        await place.ask("PATCH", "/jobs/s-1", json={"progress": {"percentage": 5}})
        assert (await job.next()).name == "progress"
        assert (await feed.until(lambda event: event.data["id"] == "s-1")).version == 2
        position = feed.parser.last_id
    async with following(place, "/jobs/batch/streamed/events") as batch:
        assert {(await batch.next()).data["id"] for _ in range(2)} == {"s-1", "s-2"}
        batch_position = batch.parser.last_id
    await place.ask("PATCH", "/jobs/s-2", json={"status": "COMPLETED"})
    async with following(place, "/jobs/events", position) as feed:
        assert (await feed.until(lambda event: event.data.get("id") == "s-2")).status == "COMPLETED"
    async with following(place, "/jobs/batch/streamed/events", batch_position) as batch:
        assert (await batch.until(lambda event: event.data["id"] == "s-2")).status == "COMPLETED"
        await place.ask("PATCH", "/jobs/s-1", json={"status": "COMPLETED"})
        await place.ask("POST", "/jobs/batch/streamed/close")
        assert (await batch.rest(WITHIN_s))[-1].name == "batch"


async def tickets(place: Place) -> None:
    """A ticket of one process opens just its set at the other, without a key."""
    await place.create("t-1", "t-2", "t-3")
    ticket = (await place.ask("POST", "/tickets", json={"job_ids": ["t-1", "t-2"]})).json["ticket"]
    async with following(place, f"/jobs/events?ticket={ticket}", key="") as events:
        assert {(await events.next()).data["id"] for _ in range(2)} == {"t-1", "t-2"}
    async with (
        aiohttp.ClientSession() as nobody,
        nobody.get(f"{place.other.url}/jobs/t-3/events?ticket={ticket}") as response,
    ):
        assert response.status == 403


async def relaying(place: Place) -> None:
    """What a process committed and died before telling is told by another: claimed, told, removed."""
    await place.create("relayed")
    assert (await place.other_says("/jobs/relayed")).version == 1
    await place.postgres.execute("update jobs set metadata = '{}', version = version + 1 where id = 'relayed'")

    async def is_told() -> bool:
        return (await place.other_says("/jobs/relayed")).version == 2

    await until(is_told, WITHIN_s)

    async def is_settled() -> bool:
        return not await place.postgres.fetchval("select count(*) from outbox")

    await until(is_settled, WITHIN_s)


async def keys(place: Place) -> None:
    """Made and revoked on the command line: refused by both processes within moments, its streams end."""
    key = (await place.command("keys", "create", "--account", "acme")).splitlines()[-1]
    await place.create("keyed")
    async with following(place, "/jobs/keyed/events", key=key) as events:
        assert (await events.next()).status == "queued"
        listed = [json.loads(line) for line in (await place.command("keys", "list", "--json")).splitlines()]
        await place.command("keys", "revoke", listed[-1]["id"])
        assert (await events.until(lambda event: event.name == "problem", WITHIN_s)).data[
            "error_type"
        ] == "unauthorized"

    async def is_refused() -> bool:
        answers = [
            await place.speaker.ask(web, "GET", "/jobs/keyed", headers={"X-API-Key": key}) for web in both(place)
        ]
        return [answer.status for answer in answers] == [401, 401]

    await until(is_refused, WITHIN_s)


async def limits(place: Place) -> None:
    """Two processes together grant a key its limit and no more."""
    key = await make_key(place.environment["DATABASE_URL"], "limited", limits={"poll": "10/60"})
    polls = [
        place.speaker.ask(web, "GET", "/jobs/limited", headers={"X-API-Key": key})
        for web in both(place)
        for _ in range(10)
    ]
    statuses = sorted(answer.status for answer in await asyncio.gather(*polls))
    assert statuses == [404] * 10 + [429] * 10


async def health(place: Place) -> None:
    """Everything is there."""
    for web in both(place):
        ready = await place.speaker.ask(web, "GET", "/readyz")
        assert (ready.status, ready.json["down"]) == (200, {})


PARTS: list[Part] = [
    a_life,
    group_commits,
    idempotent_creation,
    many_jobs,
    waiting,
    streams,
    tickets,
    relaying,
    keys,
    limits,
    health,
]


def both(place: Place) -> tuple[WebProcess, WebProcess]:
    return place.one, place.other


@asynccontextmanager
async def following(place: Place, path: str, last_id: str = "", key: str | None = None):
    """A stream through the other process."""
    given = {"X-API-Key": place.key if key is None else key, "Last-Event-ID": last_id}
    headers = {name: value for name, value in given.items() if value}
    async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{place.other.url}{path}") as response:
        yield EventReader.of(response)


@asynccontextmanager
async def place_on(environment: dict[str, str], key: str, postgres: str):
    """Starts both processes. `postgres` leads to Postgres itself."""
    webs = await asyncio.gather(*(WebProcess.start(environment) for _ in range(2)))
    connection = await asyncpg.connect(postgres)
    try:
        async with speaking(key) as speaker:
            yield Place(*webs, speaker, key, environment, connection)
    finally:
        await connection.close()
        await asyncio.gather(*(web.stop() for web in webs))
