"""`GET /limits` and what stands behind it: the truth about what is left, for which nothing is taken."""

import asyncio

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from service.errors import RateLimited
from service.identity import READ, WRITE
from service.limiting.limiter import Limiter
from service.limiting.policies import Policy
from service.limiting.rolling_log import RollingLog
from service.stores.limit_log import LimitLog
from service.stores.redis_pipe import RedisPipe
from tests.conftest import make_key
from tests.http import ask
from tests.own_servers import own_redis

NAMES = ["poll", "bulk", "list", "stream", "write"]
FIELDS = ["name", "limit", "window_seconds", "left", "next_place_in_seconds"]


async def limited(database, **limits):
    return {"X-API-Key": await make_key(database, "acme", (READ, WRITE), limits)}


async def told(client, key, url=""):
    """What is told of each policy by its name."""
    answer = await ask(client, "GET", f"{url}/limits", headers=key)
    assert answer.status == 200, answer
    lines = answer.json()["limits"]
    assert [line["name"] for line in lines] == NAMES
    assert all(list(line) == FIELDS for line in lines)
    return {line["name"]: line for line in lines}


def left_of(lines):
    return {name: line["left"] for name, line in lines.items()}


@pytest.fixture
async def make_limiter(redis_url):
    """Limiters as several processes have them; their connections ask nothing by themselves."""
    pipes = []

    async def make():
        pipe = RedisPipe(redis_url, scripts=LimitLog.scripts, probe_every_s=3600)
        await pipe.start()
        pipes.append(pipe)
        return Limiter(LimitLog(pipe)), pipe

    yield make
    for pipe in pipes:
        await pipe.close()


# The address


async def test_a_key_that_asked_for_nothing_yet_has_all_of_every_policy(client, database):
    lines = await told(client, await limited(database))
    assert left_of(lines) == {"poll": 1000, "bulk": 100, "list": 60, "stream": 120, "write": 6000}
    assert {(line["limit"] == line["left"], line["window_seconds"]) for line in lines.values()} == {(True, 60)}
    assert {line["next_place_in_seconds"] for line in lines.values()} == {None}, "nothing is out, so nothing returns"


async def test_what_was_asked_for_is_missing_exactly(client, database):
    key = await limited(database)
    for path, times in [("/jobs/none", 7), ("/jobs/none/history", 3), ("/jobs", 2), ("/jobs/none/events", 1)]:
        for _ in range(times):
            await ask(client, "GET", path, headers=key)
    for _ in range(5):
        await ask(client, "PATCH", "/jobs/none", json={}, headers=key)
    lines = await told(client, key)
    assert left_of(lines) == {"poll": 993, "bulk": 97, "list": 58, "stream": 119, "write": 5995}
    assert all(50 <= line["next_place_in_seconds"] <= 60 for line in lines.values())


async def test_the_answer_says_what_the_headers_of_the_last_poll_said(client, database):
    key = await limited(database, poll="9/60")
    polled = await ask(client, "GET", "/jobs/none", headers=key)
    line = (await told(client, key))["poll"]
    assert polled.headers["RateLimit-Policy"] == f'"poll";q={line["limit"]};w={line["window_seconds"]}'
    assert polled.headers["RateLimit"].startswith(f'"poll";r={line["left"]};t=')


async def test_limits_of_ones_own_and_none_are_told_as_they_are(client, database):
    lines = await told(client, await limited(database, poll="none", bulk="5/10", write="none"))
    for name in ("poll", "write"):
        assert lines[name] == dict.fromkeys(FIELDS) | {"name": name}
    assert lines["bulk"] == dict(zip(FIELDS, ["bulk", 5, 10, 5, None], strict=True))
    assert lines["list"]["limit"] == 60
    assert set(left_of(await told(client, {})).values()) == {None}  # the client's own key has no limits


async def test_a_key_sees_its_own_limits_and_no_other_key_s(client, database):
    one, other = [await limited(database, poll="10/60") for _ in range(2)]
    await ask(client, "GET", "/jobs/none", headers=one)
    assert [(await told(client, key))["poll"]["left"] for key in (one, other)] == [9, 10]


async def test_two_hundred_calls_take_no_place_and_none_is_refused(client, database):
    key = await limited(database, **dict.fromkeys(NAMES, "1/60"))
    await asyncio.gather(*(told(client, key) for _ in range(200)))
    assert set(left_of(await told(client, key)).values()) == {1}
    for method, path in [
        ("GET", "/jobs/none"),
        ("GET", "/jobs/none/history"),
        ("GET", "/jobs"),
        ("PATCH", "/jobs/none"),
    ]:
        body = {"json": {}} if method == "PATCH" else {}
        statuses = [(await ask(client, method, path, headers=key, **body)).status for _ in range(2)]
        assert statuses[0] != 429
        assert statuses[1] == 429
    assert left_of(await told(client, key)) == {"poll": 0, "bulk": 0, "list": 0, "stream": 1, "write": 0}


async def test_it_is_limited_by_nothing_needs_no_validator_and_is_not_to_be_kept(client, database):
    key = await limited(database)
    answer = await ask(client, "GET", "/limits", headers=key | {"If-None-Match": "*"})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert not {"ETag", "RateLimit", "RateLimit-Policy", "Retry-After"} & set(answer.headers)
    headed = await ask(client, "HEAD", "/limits", headers=key)
    assert (headed.status, headed.body, headed.headers["Cache-Control"]) == (200, b"", "no-store")
    assert headed.headers["Content-Length"] == str(len(answer.body))


async def test_a_used_up_limit_says_when_to_come_back_and_that_is_true(client, database):
    key = await limited(database, poll="3/2")
    for _ in range(3):
        while (await ask(client, "GET", "/jobs/none", headers=key)).status != 429:
            pass
        line = (await told(client, key))["poll"]
        assert line["left"] == 0
        assert 1 <= line["next_place_in_seconds"] <= 2
        await asyncio.sleep(line["next_place_in_seconds"])
        assert (await ask(client, "GET", "/jobs/none", headers=key)).status == 404


async def test_two_processes_tell_the_same(start_web, database):
    key = await limited(database, poll="20/60")
    one, two = await asyncio.gather(start_web(), start_web())
    async with aiohttp.ClientSession() as session:
        for web, times in [(one, 4), (two, 3), (one, 2)]:
            for _ in range(times):
                await ask(session, "GET", f"{web.url}/jobs/none", headers=key)
            assert (await told(session, key, one.url))["poll"] == (await told(session, key, two.url))["poll"]
        assert (await told(session, key, two.url))["poll"]["left"] == 11
        while (await ask(session, "GET", f"{one.url}/jobs/none", headers=key)).status != 429:
            pass
        assert [(await told(session, key, web.url))["poll"]["left"] for web in (one, two)] == [0, 0]


async def test_while_redis_hangs_it_tells_this_process_s_share_and_takes_nothing_of_it(start_web, database, tmp_path):
    redis = own_redis(tmp_path, durable=False)
    try:
        web = await start_web(REDIS_URL=redis.url)
        key = await limited(database, poll="10/600", bulk="none")
        async with aiohttp.ClientSession(headers=key) as session:
            for _ in range(4):
                await ask(session, "GET", f"{web.url}/jobs/none")
            redis.freeze()
            for _ in range(20):
                lines = await told(session, key, web.url)
                assert (lines["poll"]["left"], lines["poll"]["limit"]) == (6, 10)
                assert 590 <= lines["poll"]["next_place_in_seconds"] <= 600
                assert (lines["bulk"]["left"], lines["write"]["left"]) == (None, 6000)
                assert lines["write"]["next_place_in_seconds"] is None
            statuses = [(await ask(session, "GET", f"{web.url}/jobs/none")).status for _ in range(7)]
            assert statuses == [404] * 6 + [429], "as many as were told"
            assert (await told(session, key, web.url))["poll"]["left"] == 0
            redis.thaw()
    finally:
        redis.stop()


# The limiter behind it


async def test_all_policies_are_asked_in_one_trip_to_redis(make_limiter, redis_url):
    limiter, _ = await make_limiter()
    policies = [Policy(name, 10, 60) for name in NAMES]
    await limiter.take("key", policies[0])
    async with Redis.from_url(redis_url) as redis:
        before = (await redis.info("stats"))["total_reads_processed"]
        places = await limiter.look_at_all("key", policies)
        after = (await redis.info("stats"))["total_reads_processed"]
    assert [place.left for place in places] == [9, 10, 10, 10, 10]
    assert after - before == 2, "one for the five looks, one for asking this"


async def test_looking_counts_nothing_whether_redis_is_there_or_not(make_limiter):
    limiter, pipe = await make_limiter()
    policy = Policy("poll", 3, 60)
    await limiter.take("key", policy)

    def counts():
        return limiter.asked, limiter.refused_here, limiter.judged_alone

    held = counts()
    for _ in range(10):
        assert (await limiter.look("key", policy)).left == 2
    await pipe.close()
    for _ in range(10):
        place = await limiter.look("key", policy)
        assert (place.granted, place.left) == (True, 2)
    assert counts() == held
    for left in (1, 0):
        assert (await limiter.take("key", policy)).left == left
        assert (await limiter.look("key", policy)).left == left
    assert not (await limiter.look("key", policy)).granted


async def test_while_a_refusal_stands_here_nothing_is_left_here(make_limiter, redis_url):
    limiter, _ = await make_limiter()
    policy = Policy("poll", 1, 60)
    await limiter.take("key", policy)
    with pytest.raises(RateLimited) as refused:
        await limiter.take("key", policy)
    async with Redis.from_url(redis_url) as redis:
        await redis.flushdb()  # Redis would grant it, but it is not asked: the refusal said when to come back
    place = await limiter.look("key", policy)
    assert (place.granted, place.left) == (False, 0)
    assert place.returns_in_s <= int(refused.value.headers["Retry-After"])


async def test_after_a_limit_was_lowered_waiting_as_long_as_a_refusal_says_succeeds(make_limiter):
    limiter, _ = await make_limiter()
    before, now = Policy("poll", 6, 2), Policy("poll", 2, 2)
    for _ in range(5):
        await limiter.take("key", before)
        await asyncio.sleep(0.2)
    oldest_returns_in_s = (await limiter.look("key", before)).returns_in_s
    place = await limiter.look("key", now)
    assert (place.granted, place.left) == (False, 0)
    assert place.returns_in_s >= oldest_returns_in_s + 0.5, "three more must come back than the oldest"
    with pytest.raises(RateLimited):
        await limiter.take("key", now)
    await asyncio.sleep(place.returns_in_s + 0.002)
    assert (await limiter.take("key", now)).left == 0


@given(
    st.lists(st.floats(min_value=0.011, max_value=3), min_size=1, max_size=60), st.integers(min_value=1, max_value=20)
)
def test_the_local_log_says_when_fewer_than_any_number_are_in_use(pauses, most):
    log, now = RollingLog(10.0), 0.0
    for pause in pauses:
        now += pause
        log.add(now)
    waits = log.returns_in_s(now, most)
    assert log.used(now + waits + 1e-6) < most
    assert log.used(now) < most or log.used(now + waits - 1e-6) >= most


def test_an_unused_local_log_has_nothing_to_return():
    log = RollingLog(10.0)
    assert log.returns_in_s(5.0, 3) == 0
    log.add(5.0)
    assert log.returns_in_s(5.0, 3) == 10
    assert log.returns_in_s(15.0, 3) == 0
