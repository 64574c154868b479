"""What tests of following and waiting have in common: jobs that change, and readers that open streams of every kind."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from redis.asyncio import Redis

from service.stores.queries import load
from tests.sse_reader import EventReader, RawReader

BLOB = "b" * 15_000
"""Of metadata: 300 of these are more than the kernel keeps for a reader that does not read."""
UNLIMITED = {"stream": "none", "write": "none", "poll": "none"}
CHANGES = [["PROCESSING"], ["COMPLETED"], ["PROCESSING", "COMPLETED"], ["FAILED", "retry"], ["delete"]]
"""What may happen to a queued job in a moment; see `make_changes`."""


def session(url: str, key: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(url, headers={"X-API-Key": key}, connector=aiohttp.TCPConnector(limit=0))


# jobs


async def create(client: Any, job_id: str, **fields: Any) -> dict[str, Any]:
    created = await client.post("/jobs", json={"id": job_id, "type": "extraction", **fields})
    assert created.status == 201, await created.text()
    return await created.json()


async def create_many(client: Any, job_ids: list[str], **fields: Any) -> None:
    for start in range(0, len(job_ids), 1000):
        jobs = [{"id": job_id, "type": "extraction", **fields} for job_id in job_ids[start : start + 1000]]
        created = await client.post("/jobs", json=jobs)
        assert created.status == 201, await created.text()


async def report(
    client: Any, job_id: str, status: str | None = None, percentage: float | None = None, **fields: Any
) -> dict[str, Any]:
    said: dict[str, Any] = {"status": status} if status else {}
    if percentage is not None:
        said["progress"] = {"percentage": percentage}
    reported = await client.patch(f"/jobs/{job_id}", json=said | fields)
    assert reported.status == 200, await reported.text()
    return await reported.json()


async def report_many(client: Any, reports: list[dict[str, Any]]) -> None:
    """In the order given, as fast as the service takes them."""
    for start in range(0, len(reports), 50):  # aiohttp's client warns of bodies beyond 1 MiB
        reported = await client.patch("/jobs", json=reports[start : start + 50])
        assert reported.status == 200
        assert {result["status"] for result in (await reported.json())["results"]} == {200}


async def retry(client: Any, job_id: str) -> dict[str, Any]:
    retried = await client.post(f"/jobs/{job_id}/retry")
    assert retried.status == 200, await retried.text()
    return await retried.json()


async def delete(client: Any, job_id: str) -> None:
    deleted = await client.delete(f"/jobs/{job_id}")
    assert deleted.status == 200, await deleted.text()


async def close(client: Any, batch_id: str) -> None:
    closed = await client.post(f"/jobs/batch/{batch_id}/close")
    assert closed.status == 200, await closed.text()


async def make_changes(client: Any, job_id: str, changes: list[str]) -> int:
    """Makes each of `changes`: a status, `retry` or `delete`. Returns the version after the last."""
    version = 1
    for change in changes:
        if change == "retry":
            version = (await retry(client, job_id))["version"]
        elif change == "delete":
            await delete(client, job_id)
            version += 1
        else:
            version = (await report(client, job_id, change))["version"]
    return version


async def etag_of(client: Any, job_id: str) -> str:
    """As the id of an event says it: without quotes."""
    return (await client.get(f"/jobs/{job_id}")).headers["ETag"].strip('"')


async def begin_late(
    sql: Any, job_id: str, *, status: str | None = None, progress: str | None = None
) -> tuple[Callable[[], Any], int]:
    """Reports in a transaction that stays open; how to end it, and its xid. `progress` is JSON."""
    transaction = sql.transaction()
    await transaction.start()
    nothing = [None]
    columns = [[1], [job_id], [status], [progress], *[nothing] * 5, [False], nothing, nothing]
    (row,) = await sql.fetch(load("job_table")["report"], *columns)
    assert row["outcome"] == "changed"
    return transaction.commit, int(row["xid"])


# readers


@asynccontextmanager
async def stream(client: Any, path: str, last_id: str | None = None, **options: Any) -> AsyncIterator[EventReader]:
    """A stream of any kind by its path, opened as EventSource does when it comes back with `last_id`."""
    headers = options.pop("headers", {}) | ({"Last-Event-ID": last_id} if last_id is not None else {})
    async with client.get(path, headers=headers, **options) as response:
        assert response.status == 200, (response.status, await response.text())
        yield EventReader.of(response)


async def status_of(client: Any, path: str, last_id: str | None = None, **options: Any) -> int:
    """What opening a stream is answered; where it is a stream, it is hung up on."""
    headers = options.pop("headers", {}) | ({"Last-Event-ID": last_id} if last_id is not None else {})
    async with client.get(path, headers=headers, **options) as response:
        return response.status


def of_set(*job_ids: str) -> str:
    return f"/jobs/events?job_ids={','.join(job_ids)}"


async def slow_reader(url: str, key: str, path: str, *, until: Callable[[Any], bool] = lambda event: True) -> RawReader:
    """A reader that has read up to an event (the first), and reads no more until it is told to."""
    raw = await RawReader.open(url, path, key, receives=4096)
    assert await raw.answer() == 200
    await raw.events.until(until)
    return raw


def blobs(job_id: str, how_many: int, start: int = 0) -> list[dict[str, Any]]:
    """Reports that are large."""
    return [{"id": job_id, "metadata": {"n": n, "blob": BLOB}} for n in range(start, start + how_many)]


async def block(client: Any, job_id: str) -> None:
    """Fills all that lies between the service and a reader that does not read."""
    await report_many(client, blobs(job_id, 300))


async def followers(url: str, key: str, job_id: str, how_many: int) -> list[RawReader]:
    """That many open streams of one job, each of which has read the present state."""
    readers = []
    for _ in range(0, how_many, 50):
        group = await asyncio.gather(*(RawReader.open(url, f"/jobs/{job_id}/events", key) for _ in range(50)))
        for raw in group:
            assert await raw.answer() == 200
            await raw.events.next()
        readers += group
    return readers


# the machine


async def job_topics(redis: Redis) -> list[bytes]:
    return await redis.execute_command("PUBSUB", "CHANNELS", "jw:job:*")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def deaf(channel: Any, *, to: Callable[[bytes, bytes], bool] = lambda topic, message: True) -> None:
    """From now on messages that are `to` be lost are lost, as those that Redis sends to a connection that it cuts."""
    hear = channel.on_message
    channel.on_message = lambda topic, message: None if to(topic, message) else hear(topic, message)


def hold_messages(channel: Any) -> Callable[[], None]:
    """From now on messages wait until the function that this returns is called."""
    hear, held = channel.on_message, []
    channel.on_message = lambda topic, message: held.append((topic, message))

    def release() -> None:
        channel.on_message = hear
        for topic, message in held:
            hear(topic, message)

    return release
