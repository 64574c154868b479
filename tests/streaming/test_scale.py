"""Thousands of streams: each is told its job's end whatever is cut, one that never reads delays nobody, none leaves a trace."""

import asyncio
import gc
import socket
import statistics
import time
from collections import defaultdict

import pytest

import service.hub
from service.hub import Hub
from service.streaming.operation import Streams
from tests.conftest import environment_of
from tests.crowd import allow_many_files
from tests.fault_proxy import FaultProxy
from tests.following import BLOB, create, create_many, descriptors, report, report_many, session, slow_reader
from tests.sse_reader import comes_true
from tests.streaming.light_reader import LightReader
from tests.web_process import WebProcess

SILENT_FOR_s = 10.0
MANY = {"JOBWIRE_MAX_STREAMS_PER_KEY": "10000"}


@pytest.fixture(autouse=True)
def many_files():
    allow_many_files()


async def open_all(url, key, paths):
    """A stream of each path, each of which has been told the present state."""
    readers = []
    for start in range(0, len(paths), 100):
        group = [await LightReader.open(url, path, key) for path in paths[start : start + 100]]
        await asyncio.wait_for(asyncio.gather(*(reader.began for reader in group)), 30)
        assert all(reader.seen for reader in group)
        readers += group
    return readers


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how_many", [2_000, pytest.param(5_000, marks=pytest.mark.long)])
async def test_every_stream_is_told_its_jobs_end_while_redis_is_cut(database, redis_url, unlimited_key, how_many):
    jobs, changes, cuts = 200, 50, 10
    job_ids = [f"job-{n}" for n in range(jobs)]
    acknowledged: dict[str, list[tuple[int, float]]] = defaultdict(list)
    async with FaultProxy(redis_url) as proxy:
        web = await WebProcess.start(environment_of(database, proxy.url) | MANY)
        try:
            async with session(web.url, unlimited_key) as client:
                await create_many(client, job_ids)
                paths = [f"/jobs/{job_ids[n % jobs]}/events" for n in range(how_many)]
                readers = await open_all(web.url, unlimited_key, paths)
                for change in range(1, changes + 1):
                    if change % (changes // cuts) == 0:
                        proxy.cut()
                    said = {"status": "COMPLETED"} if change == changes else {"progress": {"percentage": change}}
                    reports = [{"id": job_id, **({"status": "PROCESSING"} | said)} for job_id in job_ids]
                    async with client.patch("/jobs", json=reports) as reported:
                        results = (await reported.json())["results"]
                    for result in results:
                        assert result["status"] == 200, result
                        acknowledged[result["id"]].append((result["version"], time.monotonic()))
                await asyncio.wait_for(asyncio.gather(*(reader.ended for reader in readers)), 60)
        finally:
            await web.stop()
    for n, reader in enumerate(readers):
        versions = [version for version, _, _ in reader.seen]
        assert versions == sorted(set(versions))
        assert reader.seen[-1][:2] == (changes + 1, "COMPLETED")
        for version, told_at in acknowledged[job_ids[n % jobs]]:
            arrived = next(at for seen, _, at in reader.seen if seen >= version)
            assert arrived - told_at < SILENT_FOR_s
    told = sum(len(reader.seen) for reader in readers)
    print(f"{how_many} streams, {jobs * changes} changes, {told} events, Redis cut {cuts} times")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("connects", [1_000, pytest.param(10_000, marks=pytest.mark.long)])
async def test_of_connects_that_end_in_every_way_nothing_is_left(client, unlimited_key, inside, monkeypatch, connects):
    monkeypatch.setattr(service.hub, "LINGER_s", 0.2)
    client.session.headers["X-API-Key"] = unlimited_key
    await create_many(client, [f"job-{n}" for n in range(20)], batch_id="b")
    url, streams, hub = str(client.make_url("")), inside[Streams], inside[Hub]
    kinds = ["/jobs/job-{}/events", "/jobs/batch/b/events?last_event_id={}", "/jobs/events?job_ids=job-{}"]

    async def connect(how_many):
        readers = [await LightReader.open(url, kinds[n % 3].format(n % 20), unlimited_key) for n in range(how_many)]
        await comes_true(lambda: len(streams) == how_many, within_s=30)
        for n, reader in enumerate(readers):
            if n % 2:
                reader.transport.close()  # FIN
            else:
                reader.transport.abort()  # what was not read yet makes it an RST
        await comes_true(lambda: not len(streams), within_s=30)

    async def measured():
        await comes_true(lambda: not hub._topics)
        await asyncio.sleep(0.1)
        gc.collect()
        return len(asyncio.all_tasks()), descriptors("self")

    await connect(90)
    tasks, files = await measured()
    pools = 20  # connections to Postgres and of our client, which come and go by themselves
    for _ in range(0, connects, 90):
        await connect(90)
    tasks_left, files_left = await measured()
    assert tasks_left <= tasks
    assert files_left <= files + pools
    assert not streams._per_key


async def delays_of(client, readers, job_id, changes):
    """How long after a report was sent each reader was told of it."""
    delays = []
    for _ in range(changes):
        sent_at = time.monotonic()
        version = (await report(client, job_id, metadata={"blob": BLOB, "at": sent_at}))["version"]
        await comes_true(lambda version=version: all(reader.seen[-1][0] >= version for reader in readers))
        delays += [next(at for seen, _, at in reader.seen if seen >= version) - sent_at for reader in readers]
    return delays


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_one_that_never_reads_delays_nobody(database, redis_url, unlimited_key):
    """The medians of five pairs, with it and without it in turn."""
    web = await WebProcess.start(environment_of(database, redis_url) | MANY)
    try:
        async with session(web.url, unlimited_key) as client:
            ratios = []
            for pair in range(5):
                medians = {}
                for stuck in (False, True) if pair % 2 else (True, False):
                    job_id = f"job-{pair}-{stuck}"
                    await create(client, job_id)
                    readers = await open_all(web.url, unlimited_key, [f"/jobs/{job_id}/events"] * 999)
                    if stuck:
                        never = await slow_reader(web.url, unlimited_key, f"/jobs/{job_id}/events")
                        await report_many(
                            client, [{"id": job_id, "metadata": {"n": n, "blob": BLOB}} for n in range(60)]
                        )
                    else:
                        readers += await open_all(web.url, unlimited_key, [f"/jobs/{job_id}/events"])
                        await report_many(
                            client, [{"id": job_id, "metadata": {"n": n, "blob": BLOB}} for n in range(60)]
                        )
                    medians[stuck] = statistics.median(await delays_of(client, readers[:999], job_id, 10))
                    if stuck:
                        never.hang_up()
                    for reader in readers:
                        reader.transport.abort()
                    await asyncio.sleep(0.5)
                ratios.append(medians[True] / medians[False])
    finally:
        await web.stop()
    print("with one that never reads / without:", [round(ratio, 3) for ratio in ratios])
    assert statistics.median(ratios) <= 1.10


async def test_a_reader_whose_machine_is_gone_is_given_up_by_the_kernel(client, unlimited_key, inside):
    client.session.headers["X-API-Key"] = unlimited_key
    await create(client, "job")
    async with client.get("/jobs/job/events") as response:
        assert response.status == 200
        (stream,) = inside[Streams]._open
        wire = stream._transport.get_extra_info("socket")
        assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
