"""The limiter: exact over all processes, refusals that cost nothing, and truth about when to come back."""

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import RateLimited
from service.identity import READ, WRITE
from service.limiting.limiter import Limiter
from service.limiting.policies import Policy
from service.limiting.rolling_log import RollingLog
from service.stores.limit_log import LimitLog
from service.stores.redis_pipe import RedisPipe
from tests.conftest import make_key

SKEW = Path(__file__).parent / "skew"


async def limited_key(database, **limits):
    return await make_key(database, "acme", (READ, WRITE), limits)


async def commandstats(redis, command):
    return (await redis.info("commandstats")).get(f"cmdstat_{command}", {"calls": 0})["calls"]


@pytest.fixture
async def redis(redis_url):
    from redis.asyncio import Redis

    async with Redis.from_url(redis_url) as redis:
        yield redis


@pytest.fixture
async def make_limiter(redis_url):
    """Limiters as several processes have them: each with a connection of its own, and a clock of its own."""
    pipes = []

    async def make(skew_s=0.0):
        pipe = RedisPipe(redis_url, scripts=LimitLog.scripts)
        await pipe.start()
        pipes.append(pipe)
        return Limiter(LimitLog(pipe), clock=lambda: time.monotonic() + skew_s)

    yield make
    for pipe in pipes:
        await pipe.close()


class Grants:
    """When successes were asked for and answered, and what may be said of any window of them."""

    def __init__(self):
        self.at = []
        self.refused = 0

    def most_in(self, window_s):
        """The most that were certainly granted within one window: asked for and answered inside it."""
        return max(
            sum(asked >= start and answered <= start + window_s for asked, answered in self.at) for start, _ in self.at
        )


async def hammer(url, key, callers, until, grants):
    """`callers` concurrent callers on one process, each obeying Retry-After only as far as half a second."""

    async def one(session):
        while time.monotonic() < until:
            asked = time.monotonic()
            async with session.get(f"{url}/jobs/none") as answer:
                if answer.status == 429:
                    grants.refused += 1
                else:
                    assert answer.status == 404
                    grants.at.append((asked, time.monotonic()))
            await asyncio.sleep(0.02 if answer.status == 429 else 0)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers={"X-API-Key": key}, connector=connector) as session:
        await asyncio.gather(*(one(session) for _ in range(callers)))


@pytest.mark.parametrize("seconds", [20, pytest.param(60, marks=pytest.mark.long)])
async def test_four_processes_with_skewed_clocks_never_admit_more_than_the_limit_and_waste_no_place(
    start_web, database, seconds
):
    key = await limited_key(database, poll="100/10")
    skews = ["0", "5", "-5", "2.5"]
    processes = await asyncio.gather(*(start_web(PYTHONPATH=str(SKEW), JOBWIRE_TEST_SKEW_S=skew) for skew in skews))
    grants, until = Grants(), time.monotonic() + seconds
    await asyncio.gather(*(hammer(process.url, key, 50, until, grants) for process in processes))
    assert grants.most_in(9.9) <= 100
    possible = 100 * seconds // 10
    assert len(grants.at) >= 0.97 * possible, f"{len(grants.at)} of {possible} places used"
    assert grants.refused > len(grants.at)


async def test_after_retry_after_the_next_call_succeeds_twenty_times_of_twenty(start_web, database):
    process = await start_web()

    async def five_times(key):
        async with aiohttp.ClientSession(headers={"X-API-Key": key}) as session:
            for _ in range(5):
                while (answer := await session.get(f"{process.url}/jobs/none")).status != 429:
                    assert answer.status == 404
                await asyncio.sleep(int(answer.headers["Retry-After"]))
                assert (await session.get(f"{process.url}/jobs/none")).status == 404

    keys = [await limited_key(database, poll="5/2") for _ in range(4)]
    await asyncio.gather(*(five_times(key) for key in keys))


async def test_refused_calls_cost_no_redis_command_while_they_are_refused(start_web, database, redis):
    key = await limited_key(database, poll="3/60")
    process = await start_web()
    async with aiohttp.ClientSession(headers={"X-API-Key": key}) as session:
        while (await session.get(f"{process.url}/jobs/none")).status != 429:
            pass
        before = await commandstats(redis, "evalsha")
        for _ in range(200):
            assert (await session.get(f"{process.url}/jobs/none")).status == 429
        assert await commandstats(redis, "evalsha") == before


async def test_a_refusal_says_who_limits_and_when_to_come_back(client, database):
    key = await limited_key(database, poll="2/60")
    for left in (1, 0):
        answer = await client.get("/jobs/none", headers={"X-API-Key": key})
        assert answer.status == 404
        assert answer.headers["RateLimit-Policy"] == '"poll";q=2;w=60'
        assert answer.headers["RateLimit"] == f'"poll";r={left};t=60'
    refused = await client.get("/jobs/none", headers={"X-API-Key": key})
    assert refused.status == 429
    assert refused.content_type == "application/problem+json"
    assert 58 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["RateLimit"].startswith('"poll";r=0;t=')
    problem = await refused.json()
    assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert problem["details"]["error_type"] == "rate_limited"
    assert problem["violated-policies"] == ["poll"]


async def test_an_unchanged_conditional_poll_takes_no_place_and_a_changed_one_takes_one(client, database):
    key = {"X-API-Key": await limited_key(database, poll="3/60")}
    await client.post("/jobs", json={"id": "j", "type": "parsing"}, headers=key)
    etag = (await client.get("/jobs/j", headers=key)).headers["ETag"]
    for _ in range(20):
        assert (await client.get("/jobs/j", headers=key | {"If-None-Match": etag})).status == 304
    await client.patch("/jobs/j", json={"status": "PROCESSING"}, headers=key)
    changed = await client.get("/jobs/j", headers=key | {"If-None-Match": etag})
    assert (changed.status, changed.headers["RateLimit"]) == (200, '"poll";r=1;t=60')


async def test_beyond_twenty_times_the_limit_an_unchanged_poll_takes_a_place_too(client, database):
    key = {"X-API-Key": await limited_key(database, poll="2/60")}
    await client.post("/jobs", json={"id": "j", "type": "parsing"}, headers=key)
    etag = (await client.get("/jobs/j", headers=key)).headers["ETag"]
    statuses = [(await client.get("/jobs/j", headers=key | {"If-None-Match": etag})).status for _ in range(43)]
    assert statuses == [304] * 41 + [429] * 2


async def test_a_key_without_a_limit_is_never_refused_and_gets_no_limit_headers(client, database):
    key = await limited_key(database, poll="none")
    for _ in range(1100):
        answer = await client.get("/jobs/none", headers={"X-API-Key": key})
        assert answer.status == 404
    assert "RateLimit" not in answer.headers


async def test_writes_polls_and_streams_are_limited_apart(client, database):
    key = {"X-API-Key": await limited_key(database, poll="1/60", write="2/60", stream="1/60", bulk="1/60")}
    assert (await client.post("/jobs", json={"id": "j", "type": "parsing"}, headers=key)).status == 201
    assert (await client.get("/jobs/j", headers=key)).status == 200
    assert (await client.get("/jobs/j", headers=key)).status == 429
    assert (await client.get("/jobs/j/history", headers=key)).status == 200
    assert (await client.get("/jobs/j/history", headers=key)).status == 429
    assert (await client.patch("/jobs/j", json={}, headers=key)).status == 200
    refused = await client.patch("/jobs/j", json={"status": "COMPLETED"}, headers=key)
    assert refused.status == 429
    assert (await client.get("/jobs/j")).status == 200
    assert (await (await client.get("/jobs/j")).json())["status"] == "queued", "a refused report must change nothing"


async def test_thirty_failed_keys_a_minute_then_429_and_a_key_that_is_known_goes_on(client):
    assert (await client.get("/jobs/x")).status == 404
    answers = await asyncio.gather(*(client.get("/jobs/x", headers={"X-API-Key": f"jw_{n}"}) for n in range(80)))
    assert sorted(answer.status for answer in answers) == [401] * 30 + [429] * 50
    assert (await client.get("/jobs/x")).status == 404


async def test_a_changed_limit_of_a_key_holds_within_two_seconds(client, database):
    import asyncpg

    key = {"X-API-Key": await limited_key(database, poll="1/600")}
    assert (await client.get("/jobs/none", headers=key)).status == 404
    assert (await client.get("/jobs/none", headers=key)).status == 429
    connection = await asyncpg.connect(database)
    await connection.execute("""update keys set limits = '{"poll": "50/600"}' where limits->>'poll' = '1/600'""")
    await connection.close()
    async with asyncio.timeout(2):
        while (await client.get("/jobs/none", headers=key)).status != 404:
            await asyncio.sleep(0.05)


async def test_concurrent_questions_of_several_processes_grant_exactly_the_limit(make_limiter):
    policy = Policy("poll", 500, 60)
    limiters = [await make_limiter(skew) for skew in (0, 5, -5, 0)]

    async def one(limiter):
        try:
            return await limiter.take("key", policy) is not None
        except RateLimited:
            return False

    granted = await asyncio.gather(*(one(limiters[n % 4]) for n in range(2000)))
    assert sum(granted) == 500


async def test_one_turn_of_the_event_loop_is_one_question_per_key(make_limiter, redis):
    limiter = await make_limiter()
    policy = Policy("poll", 1000, 60)
    before = await commandstats(redis, "evalsha")
    await asyncio.gather(*(limiter.take("key", policy) for _ in range(200)))
    assert await commandstats(redis, "evalsha") == before + 1


async def test_while_redis_is_away_each_process_grants_its_share_and_counts_what_it_granted_before(make_limiter):
    limiter = await make_limiter()
    limiter.processes = 2
    policy = Policy("poll", 100, 60)
    await asyncio.gather(*(limiter.take("key", policy) for _ in range(30)))
    await limiter._log._pipe.close()
    granted = 0
    with pytest.raises(RateLimited) as refused:
        while granted < 100:
            await limiter.take("key", policy)
            granted += 1
    assert granted == 20
    assert 55 <= int(refused.value.headers["Retry-After"]) <= 60


@given(
    st.lists(st.floats(min_value=0, max_value=3, allow_nan=False), min_size=1, max_size=400),
    st.integers(min_value=1, max_value=20),
)
def test_the_local_log_never_admits_more_than_the_limit_in_any_window_and_returns_places_on_time(pauses, most):
    log, window_s, now, granted = RollingLog(10.0), 10.0, 0.0, []
    for pause in pauses:
        now += pause
        if log.used(now) < most:
            log.add(now)
            granted.append(now)
        else:
            in_window = sum(1 for at in granted if at > now - window_s - window_s / 1000)
            assert in_window >= most, "refused although a place had returned more than a grain ago"
            assert log.returns_in_s(now, most) <= window_s
    for last in granted:
        assert sum(1 for at in granted if last - window_s < at <= last) <= most


async def test_the_log_in_redis_stays_small_whatever_the_limit(make_limiter, redis):
    limiter = await make_limiter()
    policy = Policy("write", 6000, 2)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        await asyncio.gather(*(limiter.take("key", policy) for _ in range(5)), return_exceptions=True)
    assert await redis.memory_usage(b"jw:{key}:limit:write") < 50_000
