"""Processes die at any moment; what was acknowledged is there, and is told."""

import asyncio
import itertools
import random
import time

import aiohttp
import pytest

from tests.fault_proxy import FaultProxy
from tests.own_servers import connected
from tests.predicates import WAITS_FOR_A_ROW, is_taken, outbox_is_empty
from tests.speaker import Speaker, speaking, until
from tests.web_process import WebProcess
from tests.witness import BEHIND_s

REPORTERS, KILLS = 50, 20


async def test_what_was_acknowledged_outlives_20_kills_of_the_process_that_acknowledged_it(start_web, key, database):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    survivor, victim = await start_web(), await start_web()
    async with speaking(key) as speaker, connected(database) as postgres:
        reporters = [Reporter(speaker, f"job-{n}") for n in range(REPORTERS)]
        for reporter in reporters:
            await speaker.create(survivor, reporter.job)
            await speaker.poll(survivor, reporter.job)
        for _ in range(KILLS):
            reporting = [asyncio.create_task(reporter.report_until_it_dies(victim)) for reporter in reporters]
            successor = asyncio.create_task(start_web())
            await asyncio.sleep(rng.uniform(0.05, 0.5))
            victim.kill()
            await asyncio.gather(*reporting)
            await asyncio.gather(*(reporter.is_believed_by(survivor) for reporter in reporters))
            committed = dict(await postgres.fetch("select id, version from jobs"))
            assert all(reporter.acknowledged <= committed[reporter.job] for reporter in reporters)
            await until(lambda now=committed: everyone_is_at(now, speaker, survivor), BEHIND_s)
            victim = await successor
        await until(lambda: outbox_is_empty(postgres), BEHIND_s)
        acknowledged = sum(reporter.acknowledged - 1 for reporter in reporters)
        unheard = sum(committed[reporter.job] - reporter.acknowledged for reporter in reporters)
        warned = sum(reporter.warned for reporter in reporters)
        print(f"{acknowledged} versions acknowledged, {warned} with a warning, {unheard} committed and never answered")


class Reporter:
    """Reports on its own job, one report after the other; remembers the newest that was acknowledged."""

    def __init__(self, speaker: Speaker, job: str) -> None:
        self.job = job
        self.acknowledged = 1
        self.told = 1
        self.warned = 0
        self._speaker = speaker
        self._steps = itertools.count(1)

    async def report_until_it_dies(self, web: WebProcess) -> None:
        while True:
            try:
                said = await self._speaker.say(web, self.job, f"step {next(self._steps)}")
            except aiohttp.ClientError:
                return
            assert said.version > self.acknowledged
            self.acknowledged = said.version
            if said.warning:
                self.warned += 1
            else:
                self.told = said.version

    async def is_believed_by(self, web: WebProcess) -> None:
        seen = await self._speaker.poll(web, self.job)
        assert seen.status == 200
        assert seen.version >= self.told, f"{self.job} is at {self.told} and the next poll says {seen}"


async def everyone_is_at(versions: dict[str, int], speaker: Speaker, web: WebProcess) -> bool:
    answers = await asyncio.gather(*(speaker.poll(web, job) for job in versions))
    return [answer.version for answer in answers] == list(versions.values())


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
async def test_what_a_process_committed_and_died_before_telling_is_told_by_another_within_2_s(
    start_web, key, database, redis_url, method
):
    survivor = await start_web()
    async with speaking(key) as speaker, connected(database) as postgres:
        latencies = []
        for number in range(2):
            async with FaultProxy(redis_url) as redis:
                victim = await start_web(REDIS_URL=redis.url)
                job = f"job-{number}"
                await speaker.create(victim, job)
                assert (await speaker.poll(survivor, job)).version == 1
                await until(lambda: outbox_is_empty(postgres), BEHIND_s)
                redis.freeze()
                body = {"json": {"status": "COMPLETED"}} if method == "PATCH" else {}
                unheard = asyncio.create_task(speaker.ask(victim, method, f"/jobs/{job}", **body))
                while await outbox_is_empty(postgres):
                    pass
                committed = time.monotonic()
                victim.kill()
                with pytest.raises(aiohttp.ClientError):
                    await unheard
                expected = "COMPLETED" if method == "PATCH" else 404
                await until(lambda job=job, sees=expected: says(speaker, survivor, job, sees), BEHIND_s)
                latencies.append(time.monotonic() - committed)
                await until(lambda: outbox_is_empty(postgres), BEHIND_s)
        print(f"told by another after {', '.join(f'{latency:.2f}' for latency in latencies)} s")
        assert max(latencies) <= BEHIND_s


async def says(speaker: Speaker, web: WebProcess, job: str, expected: str | int) -> bool:
    answer = await speaker.poll(web, job)
    return expected in (answer.status, answer.json.get("status"))


async def test_the_outbox_is_empty_when_nobody_reports(start_web, key, database):
    webs = [await start_web(), await start_web()]
    async with speaking(key) as speaker, connected(database) as postgres:
        jobs = [f"job-{n}" for n in range(50)]
        await asyncio.gather(*(speaker.create(random.choice(webs), job) for job in jobs))
        for number in range(5):
            await asyncio.gather(*(speaker.say(random.choice(webs), job, f"step {number}") for job in jobs))
        await asyncio.gather(*(speaker.ask(random.choice(webs), "DELETE", f"/jobs/{job}") for job in jobs[::2]))
        print(f"empty after {await until(lambda: outbox_is_empty(postgres), 1):.2f} s")


async def test_a_process_told_to_end_answers_what_it_has_begun(start_web, key, database):
    leaving, staying = await start_web(), await start_web()
    async with speaking(key) as speaker, connected(database) as postgres:
        reporters = [Reporter(speaker, f"job-{n}") for n in range(20)]
        await asyncio.gather(*(speaker.create(staying, reporter.job) for reporter in reporters))
        reporting = [asyncio.create_task(reporter.report_until_it_dies(leaving)) for reporter in reporters]
        await until(lambda: some_version_is(postgres, 5), 10)
        assert await leaving.stop() == 0
        await asyncio.gather(*reporting)
        committed = dict(await postgres.fetch("select id, version from jobs"))
        assert committed == {reporter.job: reporter.acknowledged for reporter in reporters}
        await asyncio.gather(*(reporter.is_believed_by(staying) for reporter in reporters))


async def test_a_process_that_stands_still_inside_a_transaction_holds_a_job_for_a_moment_only(start_web, key, database):
    still, other = await start_web(), await start_web()
    async with speaking(key) as speaker, connected(database) as postgres:
        await speaker.create(still, "j")
        await speaker.poll(other, "j")
        async with postgres.transaction():
            await postgres.execute("select from jobs for update")
            unanswered = asyncio.create_task(speaker.ask(still, "PUT", "/jobs/j/result", data=b"x"))
            await until(lambda: postgres.fetchval(WAITS_FOR_A_ROW), 0.9)
            still.freeze()
        # Its statement ends now, and nobody commits.
        freed = await until(lambda: is_taken(speaker, other, "j"), 4)
        print(f"others may report after {freed:.2f} s")
        still.thaw()
        assert (await unanswered).status == 503
        taken = await speaker.say(other, "j", "once more")
        assert (await speaker.poll(still, "j")).version == taken.version
        assert (await speaker.ask(still, "GET", "/jobs/j/result")).json["details"]["error_type"] == "not_finished"
        assert await postgres.fetchval("select count(*) from results") == 0


async def some_version_is(postgres, version: int) -> bool:
    return await postgres.fetchval("select max(version) >= $1 from jobs", version)
