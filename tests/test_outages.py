"""Redis or Postgres hangs, dies, refuses, comes back with other data: nobody is lied to, nobody hangs, it mends itself."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from service.stores.keys import status_key
from service.stores.migrate import migrate
from tests.conftest import make_key
from tests.fault_proxy import FaultProxy
from tests.own_servers import OwnServer, connected, own_postgres, own_redis
from tests.predicates import (
    WAITS_FOR_A_ROW,
    all_tiers_agree,
    are_ready,
    are_without_warning,
    has_been,
    is_taken,
    is_told,
    is_warned,
    nothing_waits_longer_than,
    outbox_is_empty,
    row_is_at,
    shows,
)
from tests.speaker import Answer, Speaker, speaking, until
from tests.web_process import WebProcess
from tests.witness import BEHIND_s, Witness

UNKNOWN_KEY = {"X-API-Key": "jw_" + "x" * 43}


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


# Redis


@asynccontextmanager
async def redis_of_its_own(tmp_path, *, durable: bool = False) -> AsyncIterator[OwnServer]:
    server = own_redis(tmp_path, durable=durable)
    try:
        yield server
    finally:
        server.stop()


REDIS_OUTAGES = ["hangs", "is restarted empty", "is restarted", "is restarted with old data", "cannot be reached"]


@pytest.mark.parametrize("what", REDIS_OUTAGES)
async def test_polls_go_on_and_stay_true_while_redis(start_web, key, database, tmp_path, rng, what):
    jobs = [f"job-{n}" for n in range(6)]
    async with (
        redis_of_its_own(tmp_path, durable=what != "is restarted empty") as redis,
        FaultProxy(redis.url) as proxy,
        speaking(key) as speaker,
        connected(database) as postgres,
    ):
        webs = [await start_web(REDIS_URL=proxy.url if what == "cannot be reached" else redis.url) for _ in range(2)]
        for job in [*jobs, "told-before", "told-during"]:
            await speaker.create(webs[0], job)
        for web in (webs[0], webs[1]) * 2:
            for job in ("told-before", "told-during"):
                assert (await speaker.poll(web, job)).version == 1  # now all hold it
        redis.keep_a_copy()
        told_before = await speaker.say(webs[0], "told-before", "only once more")
        witness = Witness(speaker)
        async with witness.watching(webs, jobs, rng):
            await until(lambda: has_seen(witness, "report 200", 30), 10)
            begin_outage(what, redis, proxy)
            told_during = await speaker.say(webs[0], "told-during", "only once more")
            await until(lambda: has_seen(witness, "report 200 199", 30), 10)
            await end_outage(what, redis, proxy)
            ready = await until(lambda: are_ready(speaker, webs), BEHIND_s)
            assert (await speaker.poll(webs[1], "told-before")).version == told_before.version
            assert (await speaker.poll(webs[1], "told-during")).version == told_during.version
            await until(lambda: nothing_waits_longer_than(postgres, BEHIND_s), BEHIND_s)
            behind, told = witness.seen["report 200 199"], witness.seen["report 200"]
            await until(lambda: has_seen(witness, "report 200", told + 30), 10)
        print(f"trusted again after {ready:.2f} s")
        assert witness.seen["report 200 199"] == behind, "told again, as before"
        assert set(witness.seen) <= {"report 200", "report 200 199", "poll 200", "poll 304"}
        await until(lambda: outbox_is_empty(postgres), BEHIND_s)
        await all_tiers_agree(speaker, webs, redis.url, postgres, jobs)


def begin_outage(what: str, redis: OwnServer, proxy: FaultProxy) -> None:
    match what:
        case "hangs":
            redis.freeze()
        case "cannot be reached":
            proxy.refuse()
        case _:
            redis.kill()


async def end_outage(what: str, redis: OwnServer, proxy: FaultProxy) -> None:
    match what:
        case "hangs":
            redis.thaw()
        case "cannot be reached":
            await proxy.accept()
        case "is restarted with old data":
            redis.put_the_copy_back()
            await redis.start()
        case _:
            await redis.start()


async def test_only_the_first_poll_and_the_first_report_wait_for_a_redis_that_hangs(start_web, key, tmp_path):
    async with redis_of_its_own(tmp_path) as redis, speaking(key) as speaker:
        one, other = await start_web(REDIS_URL=redis.url), await start_web(REDIS_URL=redis.url)
        await speaker.create(one, "j")
        await speaker.poll(other, "j")
        redis.freeze()
        first = await speaker.poll(one, "j")
        next_ones = [await speaker.poll(one, "j") for _ in range(20)]
        reports = [await speaker.say(one, "j", f"step {n}") for n in range(10)]
        seen = await speaker.poll(other, "j")
        print(f"first poll {first.took_s:.3f} s, next {slowest(next_ones):.3f} s at most")
        print(f"first report {reports[0].took_s:.3f} s, next {slowest(reports[1:]):.3f} s at most")
        assert first.took_s < 0.1 + 0.25
        assert total(next_ones) < 20 * 0.1 / 2, "they do not wait for the deadline each"
        assert reports[0].took_s < 0.5 + 0.25
        assert total(reports[1:]) < 9 * 0.1 / 2
        assert {answer.warning for answer in reports} == {"199"}
        assert reports[0].headers["Warning"] == '199 - "readers may be up to 2 s behind"'
        assert seen.version == reports[-1].version
        redis.thaw()


async def test_a_redis_that_is_back_is_not_trusted_while_anything_waits_to_be_told(start_web, key, database, tmp_path):
    async with redis_of_its_own(tmp_path) as redis, speaking(key) as speaker, connected(database) as postgres:
        one, other = await start_web(REDIS_URL=redis.url), await start_web(REDIS_URL=redis.url)
        await speaker.create(one, "j")
        for web in (one, other):
            await speaker.poll(web, "j")
        redis.freeze()
        said = await speaker.say(one, "j", "unseen by the other")
        assert said.warning == "199"
        async with postgres.transaction():
            assert await postgres.fetch("select from outbox for update"), "no relay gets at it"
            redis.thaw()
            async with Redis.from_url(redis.url) as admin:
                await until(lambda: clients_are_back(admin, 4), 2)
            down = [(await speaker.ask(web, "GET", "/readyz")).json["down"].keys() for web in (one, other)]
            assert (await speaker.poll(other, "j")).version == said.version
            assert all("redis" in named for named in down)
        await until(lambda: are_ready(speaker, (one, other)), BEHIND_s)
        assert (await speaker.poll(other, "j")).version == said.version


async def clients_are_back(redis: Redis, count: int) -> bool:
    """All pipes are up again: each has said its name, and has asked since then."""
    pipes = [client for client in await redis.client_list() if client["name"] == "jobwire" and client["cmd"] == "ping"]
    return len(pipes) >= count


async def test_what_is_reported_through_a_process_that_lost_redis_is_seen_everywhere_within_2_s(
    start_web, key, redis_url
):
    async with FaultProxy(redis_url) as proxy, speaking(key) as speaker:
        lost, other = await start_web(REDIS_URL=proxy.url), await start_web()
        await speaker.create(lost, "j")
        await speaker.poll(other, "j")
        proxy.freeze()
        latencies = []
        for number in range(3):
            said = await speaker.say(lost, "j", f"step {number}")
            assert said.warning == "199"
            assert (await speaker.poll(lost, "j")).version == said.version
            latencies.append(await until(lambda least=said.version: shows(speaker, other, "j", least), BEHIND_s))
        print(f"seen after {', '.join(f'{latency:.2f}' for latency in latencies)} s")
        proxy.thaw()
        back = await until(lambda: is_told(speaker, lost), BEHIND_s)
        print(f"told again after {back:.2f} s")


@pytest.mark.parametrize("refusal", ["min-replicas-to-write", "maxmemory"])
async def test_polls_stay_true_while_redis_answers_and_refuses_what_is_written(
    start_web, key, database, tmp_path, rng, refusal
):
    jobs = [f"job-{n}" for n in range(6)]
    async with (
        redis_of_its_own(tmp_path) as redis,
        Redis.from_url(redis.url) as admin,
        speaking(key) as speaker,
        connected(database) as postgres,
    ):
        webs = [await start_web(REDIS_URL=redis.url) for _ in range(2)]
        for job in jobs:
            await speaker.create(webs[0], job)
            await speaker.poll(webs[1], job)
        witness = Witness(speaker)
        async with witness.watching(webs, jobs, rng):
            await until(lambda: has_seen(witness, "report 200", 30), 10)
            await admin.config_set(refusal, 1)
            begun = time.monotonic()
            await until(lambda: has_been(begun, BEHIND_s * (0.5 if refusal == "maxmemory" else 1.2)), 10)
            await admin.config_set(refusal, 0)
            await until(lambda: are_ready(speaker, webs), BEHIND_s)
        # Out of memory, an entry can still be thrown away: then nobody is behind. A Redis that lost its replica
        # lets nothing be thrown away.
        assert (witness.seen["report 200 199"] > 0) == (refusal == "min-replicas-to-write")
        assert witness.seen["report 503"] == witness.seen["poll 503"] == 0
        await until(lambda: outbox_is_empty(postgres), BEHIND_s)
        await all_tiers_agree(speaker, webs, redis.url, postgres, jobs)


async def test_the_last_report_before_a_redis_that_refuses_is_seen_within_2_s(start_web, key, tmp_path):
    async with redis_of_its_own(tmp_path) as redis, Redis.from_url(redis.url) as admin, speaking(key) as speaker:
        one, other = await start_web(REDIS_URL=redis.url), await start_web(REDIS_URL=redis.url)
        await speaker.create(one, "j")
        for web in (one, other):
            await speaker.poll(web, "j")
        await admin.config_set("min-replicas-to-write", 1)
        said = await speaker.say(one, "j", "nobody says more")
        assert said.warning == "199"
        for web in (one, other):
            print(f"seen after {await until(lambda web=web: shows(speaker, web, 'j', said.version), BEHIND_s):.2f} s")


async def test_a_backlog_of_25_thousand_jobs_is_told_in_pieces(start_web, key, database, redis_url):
    async with FaultProxy(redis_url) as redis, speaking(key) as speaker, connected(database) as postgres:
        web = await start_web(REDIS_URL=redis.url)
        await speaker.create(web, "j")
        redis.refuse()
        account = await postgres.fetchval("select account_id from jobs")
        for commit in range(25):
            await postgres.execute(MANY_JOBS, account, commit)
        await redis.accept()
        told = asyncio.create_task(until(lambda: outbox_is_empty(postgres), 30))
        pauses = []
        while not told.done():
            pauses.append((await speaker.ask(web, "GET", "/healthz")).took_s)
        print(f"told after {await told:.2f} s; the longest pause of the process was {max(pauses):.3f} s")
        assert max(pauses) < 0.5
        await until(lambda: are_ready(speaker, [web]), BEHIND_s)


MANY_JOBS = """
insert into jobs (account_id, id, type, created_at, changed_at, updated_at, heartbeat_at)
select $1, format('many-%s-%s', $2::int, n), 'extraction', now(), now(), now(), now() from generate_series(1, 1000) n
"""


# Postgres

POSTGRES_OUTAGES = ["hangs", "cannot be reached", "is killed"]


@asynccontextmanager
async def postgres_that(what: str, database: str, tmp_path) -> AsyncIterator[tuple[str, "PostgresOutage"]]:
    """The URL of a Postgres, and its outage."""
    if what == "is killed":
        server = own_postgres(tmp_path)
        try:
            await migrate(server.url)
            yield server.url, PostgresOutage(what, server=server)
        finally:
            server.stop()
    else:
        async with FaultProxy(database) as proxy:
            yield proxy.url, PostgresOutage(what, proxy=proxy)


class PostgresOutage:
    def __init__(self, what: str, *, server: OwnServer | None = None, proxy: FaultProxy | None = None) -> None:
        self._what, self._server, self._proxy = what, server, proxy

    def begin(self) -> None:
        if self._server is not None:
            self._server.kill()
        elif self._what == "hangs":
            self._proxy.freeze()
        else:
            self._proxy.refuse()

    async def end(self) -> None:
        if self._server is not None:
            await self._server.start()
        elif self._what == "hangs":
            self._proxy.thaw()
        else:
            await self._proxy.accept()


TIMEOUT_s = 1.0
BOUND_s = 2 * (TIMEOUT_s + 1.0) + 0.5
"""At most behind one statement and in the next; each may take the timeout, and a second to be given up."""


@pytest.mark.parametrize("what", POSTGRES_OUTAGES)
async def test_polls_go_on_from_the_cache_and_reports_are_refused_while_postgres(start_web, database, tmp_path, what):
    async with postgres_that(what, database, tmp_path) as (url, outage):
        key = await make_key(url, "acme")
        one, other = [await start_web(DATABASE_URL=url, JOBWIRE_DATABASE_TIMEOUT=f"{TIMEOUT_s}") for _ in range(2)]
        async with speaking(key) as speaker:
            for job in ("cached", "uncached", "gone"):
                await speaker.create(one, job)
            held = [await speaker.poll(web, "cached") for web in (one, other, one)][-1]
            before = await speaker.say(one, "cached", "before")
            await until(lambda: are_ready(speaker, (one, other)), BEHIND_s)
            assert (await speaker.poll(other, "cached")).version == before.version

            outage.begin()
            refused = asyncio.gather(*(asyncio.create_task(each) for each in everything_but_polls(speaker, one)))
            during = [await poll_at_once(speaker, web, "cached") for web in (one, other)]
            assert [(answer.status, answer.version) for answer in during] == [(200, before.version)] * 2
            for answer in await refused:
                assert answer.status == 503, answer
                assert answer.json["details"]["error_type"] == "unavailable"
                assert int(answer.headers["Retry-After"]) > 0
                assert answer.took_s < BOUND_s
            print(f"refused after {slowest(await refused):.2f} s at most")

            for web in (one, other):
                await until(lambda web=web: is_warned(speaker, web, "cached"), BOUND_s)
                stale = await poll_at_once(speaker, web, "cached", etag=held.etag)
                assert stale.headers["Warning"] == '110 - "Response is Stale"'
                assert (stale.status, stale.version) == (200, before.version)
                same = await poll_at_once(speaker, web, "cached", etag=stale.etag)
                assert (same.status, same.warning) == (304, "110")
            down, *refused_still = await asyncio.gather(
                what_is_down(speaker, one),
                speaker.ask(one, "GET", "/jobs/cached", headers=UNKNOWN_KEY),
                *(speaker.poll(web, "uncached") for web in (one, other)),
            )
            assert down.keys() == {"postgres"}
            assert [(answer.status, answer.took_s < BOUND_s) for answer in refused_still] == [(503, True)] * 3
            assert (await speaker.ask(one, "GET", "/healthz")).status == 200

            await outage.end()
            back = await until(lambda: is_taken(speaker, one, "cached"), 3)
            warned = await until(lambda: are_without_warning(speaker, (one, other), "cached"), 3)
            print(f"reports are taken again after {back:.2f} s, polls without warning {warned:.2f} s later")
            assert (await speaker.ask(one, "GET", "/jobs/cached", headers=UNKNOWN_KEY)).status == 401
            after = await speaker.poll(one, "cached")
            assert (await speaker.poll(other, "cached")).version == after.version
            assert (await speaker.poll(other, "uncached")).version >= 1
            await until(lambda: are_ready(speaker, (one, other)), 3)


def everything_but_polls(speaker: Speaker, web: WebProcess):
    """Each of these needs Postgres; five reports on one job are one bound, not five."""
    return [
        *(speaker.report(web, "cached", progress={"message": f"refused {n}"}) for n in range(5)),
        speaker.poll(web, "uncached"),
        speaker.ask(web, "POST", "/jobs", json={"type": "extraction"}),
        speaker.ask(web, "PATCH", "/jobs", json=[{"id": "gone"}, {"id": "gone"}]),
        speaker.ask(web, "PUT", "/jobs/gone/result", data=b"x"),
        speaker.ask(web, "POST", "/jobs/gone/cancel"),
        speaker.ask(web, "GET", "/jobs/cached/history"),
        speaker.ask(web, "DELETE", "/jobs/gone"),
        speaker.ask(web, "GET", "/jobs/cached", headers=UNKNOWN_KEY),
    ]


@pytest.mark.parametrize("what", ["hang", "cannot be reached"])
async def test_nothing_hangs_while_both_stores(start_web, key, database, redis_url, what):
    async with FaultProxy(database) as postgres, FaultProxy(redis_url) as redis, speaking(key) as speaker:
        web = await start_web(DATABASE_URL=postgres.url, REDIS_URL=redis.url, JOBWIRE_DATABASE_TIMEOUT=f"{TIMEOUT_s}")
        for job in ("cached", "uncached", "gone"):
            await speaker.create(web, job)
        said = await speaker.poll(web, "cached")
        await until(lambda: are_ready(speaker, [web]), BEHIND_s)
        for proxy in (postgres, redis):
            proxy.freeze() if what == "hang" else proxy.refuse()
        asked = [*everything_but_polls(speaker, web), speaker.poll(web, "cached")]
        for answer in await asyncio.gather(*asked):
            assert (answer.status, answer.took_s < BOUND_s + 0.5) == (503, True), answer
        assert (await speaker.ask(web, "GET", "/healthz")).took_s < 0.5
        assert (await what_is_down(speaker, web)).keys() >= {"postgres", "redis"}
        for proxy in (postgres, redis):
            proxy.thaw() if what == "hang" else await proxy.accept()
        print(f"ready after {await until(lambda: are_ready(speaker, [web]), 4):.2f} s")
        assert (await speaker.poll(web, "cached")).version >= said.version
        await until(lambda: is_told(speaker, web, "cached"), BEHIND_s)


async def test_a_commit_whose_answer_is_lost_is_503_once_in_postgres_and_told_by_the_relay(start_web, key, database):
    async with FaultProxy(database) as proxy, speaking(key) as speaker, connected(database) as postgres:
        one, other = await start_web(DATABASE_URL=proxy.url), await start_web()
        await speaker.create(one, "j")
        await speaker.poll(other, "j")
        for number in range(3):
            before = await speaker.say(one, "j", f"before {number}")
            async with postgres.transaction():  # holds the commit up, until its answer is sure not to arrive
                await postgres.execute("select from jobs for update")
                lost = asyncio.create_task(speaker.report(one, "j", progress={"message": f"lost {number}"}))
                await until(lambda: postgres.fetchval(WAITS_FOR_A_ROW), 0.9)
                proxy.hold_answers()
            await until(lambda least=before.version + 1: row_is_at(postgres, least), 2)
            proxy.cut()
            proxy.thaw()
            assert (await lost).status == 503
            for web in (one, other):
                await until(lambda web=web, least=before.version + 1: shows(speaker, web, "j", least), BEHIND_s)
            assert await row_is_at(postgres, before.version + 1), "taken once, never sent again"


async def test_after_postgres_was_restored_everyone_says_what_it_says_now(start_web, tmp_path):
    """Versions that were told before are gone: nothing that was kept in memory or Redis may outlive them."""
    server = own_postgres(tmp_path)
    try:
        await migrate(server.url)
        key = await make_key(server.url, "acme")
        webs = [await start_web(DATABASE_URL=server.url) for _ in range(2)]
        async with speaking(key) as speaker:
            await speaker.create(webs[0], "j")
            kept = await speaker.say(webs[0], "j", "kept")
            server.kill()
            server.keep_a_copy()
            await server.start()
            await until(lambda: is_taken(speaker, webs[0], "j"), 5)
            lost = [await speaker.say(webs[0], "j", f"lost {n}") for n in range(3)][-1]
            for web in webs * 2:
                assert (await speaker.poll(web, "j")).version == lost.version
            server.kill()
            server.put_the_copy_back()
            server.make_a_standby()  # and primary again: a restore to an earlier moment is another timeline
            await server.start()
            async with connected(server.url) as admin:
                await admin.execute("select pg_promote()")
            await until(lambda: are_ready(speaker, webs), 8)
            await until(lambda: are_without_warning(speaker, webs, "j"), 3)
            for web in webs * 2:
                seen = await speaker.poll(web, "j")
                assert (seen.version, seen.json["progress"]["message"]) == (kept.version, "kept")
            again = await speaker.say(webs[1], "j", "said again")
            assert again.version == kept.version + 1 < lost.version
            assert (await speaker.poll(webs[0], "j")).json["progress"]["message"] == "said again"
    finally:
        server.stop()


async def test_an_entry_that_nobody_verified_is_served_at_once_while_postgres_is_known_to_be_away(
    start_web, key, database, redis_url
):
    async with FaultProxy(database) as postgres, speaking(key) as speaker, Redis.from_url(redis_url) as redis:
        web = await start_web(DATABASE_URL=postgres.url, JOBWIRE_DATABASE_TIMEOUT=f"{TIMEOUT_s}")
        await speaker.create(web, "j")
        held = await speaker.poll(web, "j")
        postgres.freeze()
        await until(lambda: is_warned(speaker, web, "j"), BOUND_s)
        async with connected(database) as connection:
            account = await connection.fetchval("select account_id from jobs")
        assert await redis.setrange(status_key(account, "j"), 8 + 15, f"{1:013}") > 0  # verified_ms
        answers = [await poll_at_once(speaker, web, "j") for _ in range(3)]
        assert {(answer.status, answer.version, answer.warning) for answer in answers} == {(200, held.version, "110")}
        postgres.thaw()
        await until(lambda: are_without_warning(speaker, [web], "j"), 3)


async def test_what_nobody_could_tell_because_postgres_hung_too_is_called_stale_until_it_is_told(
    start_web, key, database, redis_url
):
    async with FaultProxy(database) as postgres, FaultProxy(redis_url) as redis, speaking(key) as speaker:
        lost = await start_web(DATABASE_URL=postgres.url, REDIS_URL=redis.url)
        other = await start_web(DATABASE_URL=postgres.url)
        await speaker.create(lost, "j")
        held = await speaker.poll(other, "j")
        redis.freeze()
        said = await speaker.say(lost, "j", "unseen by the other")
        acknowledged = time.monotonic()
        postgres.freeze()
        assert said.warning == "199"
        assert (await poll_at_once(speaker, other, "j")).version == held.version
        await until(lambda: has_been(acknowledged, BEHIND_s), 3)
        stale = await poll_at_once(speaker, other, "j")
        assert (stale.version, stale.warning) == (held.version, "110")
        postgres.thaw()
        while (answer := await speaker.poll(other, "j")).version < said.version:
            assert answer.warning == "110"
            assert time.monotonic() - acknowledged < 6


async def test_a_process_told_to_end_while_postgres_hangs_ends(start_web, key, database):
    async with FaultProxy(database) as proxy, speaking(key) as speaker, connected(database) as postgres:
        web = await start_web(DATABASE_URL=proxy.url, JOBWIRE_DATABASE_TIMEOUT=f"{TIMEOUT_s}")
        await speaker.create(web, "j")
        async with postgres.transaction():
            await postgres.execute("select from jobs for update")
            begun = asyncio.create_task(speaker.report(web, "j", progress={"message": "x"}))
            await until(lambda: postgres.fetchval(WAITS_FOR_A_ROW), 0.9)
            proxy.freeze()
        assert await web.stop(within_s=10) == 0
        assert (await begun).status == 503


async def test_a_process_started_while_both_stores_are_away_mends_itself(start_web, key, database, redis_url):
    async with FaultProxy(database) as postgres, FaultProxy(redis_url) as redis, speaking(key) as speaker:
        usual = await start_web()
        await speaker.create(usual, "j")
        said = await speaker.say(usual, "j", "before")
        postgres.refuse()
        redis.refuse()
        web = await start_web(DATABASE_URL=postgres.url, REDIS_URL=redis.url)
        assert (await speaker.ask(web, "GET", "/healthz")).status == 200
        assert (await speaker.poll(web, "j")).status == 503
        await redis.accept()
        assert (await speaker.poll(web, "j")).status == 503, "nobody vouches for the key"
        await postgres.accept()
        print(f"ready after {await until(lambda: are_ready(speaker, [web]), 4):.2f} s")
        assert (await speaker.poll(web, "j")).version == said.version
        await until(lambda: is_told(speaker, web), BEHIND_s)


@pytest.mark.long
async def test_nobody_is_lied_to_through_a_minute_of_any_trouble(start_web, key, database, tmp_path, rng):
    jobs = [f"job-{n}" for n in range(50)]  # so many that each has quiet times
    async with (
        redis_of_its_own(tmp_path) as redis,
        FaultProxy(database) as postgres,
        FaultProxy(redis.url) as redis_of_one,
        FaultProxy(redis.url) as redis_of_other,
        Redis.from_url(redis.url) as admin,
        speaking(key) as speaker,
        connected(database) as truth,
    ):
        common = {"DATABASE_URL": postgres.url, "JOBWIRE_DATABASE_TIMEOUT": f"{TIMEOUT_s}"}
        webs = [await start_web(REDIS_URL=proxy.url, **common) for proxy in (redis_of_one, redis_of_other)]
        for job in jobs:
            await speaker.create(webs[0], job)
        witness = Witness(speaker)
        async with witness.watching(webs, jobs, rng):
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                proxy = rng.choice([postgres, redis_of_one, redis_of_other])
                web = rng.choice(webs)
                trouble = rng.randrange(7)
                print(
                    f"{time.monotonic():.3f} {trouble} {webs.index(web)} {[postgres, redis_of_one, redis_of_other].index(proxy)}"
                )
                match trouble:
                    case 0:
                        await admin.flushall()
                    case 1:
                        await admin.config_set("min-replicas-to-write", 1)
                    case 2:
                        web.freeze()
                    case 3:
                        proxy.cut()
                    case 4:
                        proxy.freeze()
                    case 5:
                        proxy.hold_answers()
                    case 6:
                        proxy.refuse()
                        await asyncio.sleep(rng.uniform(0, 1))
                        await proxy.accept()
                await asyncio.sleep(rng.uniform(0, 1.5))
                proxy.thaw()
                web.thaw()
                await admin.config_set("min-replicas-to-write", 0)
        await until(lambda: are_ready(speaker, webs), 5)
        await until(lambda: outbox_is_empty(truth), BEHIND_s)
        await all_tiers_agree(speaker, webs, redis.url, truth, jobs)


# What is asked


async def poll_at_once(speaker: Speaker, web: WebProcess, job: str, **how) -> Answer:
    answer = await speaker.poll(web, job, **how)
    assert answer.took_s < TIMEOUT_s / 2, answer
    return answer


def total(answers: list[Answer]) -> float:
    return sum(answer.took_s for answer in answers)


def slowest(answers: list[Answer]) -> float:
    return max(answer.took_s for answer in answers)


async def has_seen(witness: Witness, what: str, times: int) -> bool:
    return witness.seen[what] >= times


async def what_is_down(speaker: Speaker, web: WebProcess) -> dict[str, str]:
    answer = await speaker.ask(web, "GET", "/readyz")
    assert (answer.status, answer.took_s < BOUND_s) == (503, True), answer
    return answer.json["down"]
