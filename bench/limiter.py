"""The limiter's cost beside the usual library: memory per key, and time per decision, on one real Redis in one run.

.venv/bin/python -m bench.limiter
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from limits import parse
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import Redis

from service.embedded import start_redis
from service.limiting.limiter import Limiter
from service.limiting.policies import Policy
from service.stores.keys import limit_key
from service.stores.limit_log import LimitLog
from service.stores.redis_pipe import RedisPipe

ROUNDS = 5
DECISIONS = 4000
AT_ONCE = 64
WINDOW_s = 10

Decide = Callable[[], Awaitable[object]]


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = start_redis(Path(folder), durable=False)
        try:
            await compare(server.url)
        finally:
            server.stop()


async def compare(url: str) -> None:
    pipe = RedisPipe(url, deadline_s=5, scripts=LimitLog.scripts)
    await pipe.start()
    limiter = Limiter(LimitLog(pipe))
    theirs = MovingWindowRateLimiter(RedisStorage(f"async+{url}", implementation="redispy"))
    redis = Redis.from_url(url)
    print(f"{'':34}{'jobwire':>12}{'limits':>12}{'ratio':>8}")
    for most in (1000, 6000):
        await fill(limiter, theirs, most, WINDOW_s)
        ours_bytes = await redis.memory_usage(limit_key(f"full{most}", "poll"))
        [name] = [key async for key in redis.scan_iter(f"LIMITS:*full{most}*")]
        row(f"bytes of a full key, {most} places", ours_bytes, await redis.memory_usage(name), "{:.0f}")
    for at_once in (1, AT_ONCE):
        ours, other = await paired(
            lambda: limiter.take("time", Policy("poll", 10**6, 60)),
            lambda: theirs.hit(parse("1000000/minute"), "time"),
            at_once,
        )
        row(f"us per decision, {at_once} at once", ours, other, "{:.1f}")
    await redis.aclose()
    await pipe.close()


async def fill(limiter: Limiter, theirs: MovingWindowRateLimiter, most: int, window_s: int) -> None:
    """Uses up every place, evenly over the whole window: the most records that a log can have."""
    policy, limit = Policy("poll", most, window_s), parse(f"{most}/{window_s} seconds")
    started, steps = time.monotonic(), 1000
    for step in range(steps):
        at_once = most // steps
        await asyncio.gather(*(limiter.take(f"full{most}", policy) for _ in range(at_once)))
        await asyncio.gather(*(theirs.hit(limit, f"full{most}") for _ in range(at_once)))
        await asyncio.sleep(max(0.0, started + (step + 1) * window_s / steps - time.monotonic()))


async def paired(ours: Decide, theirs: Decide, at_once: int) -> tuple[float, float]:
    """Medians of interleaved rounds, in us per decision."""
    rounds = [(await timed(ours, at_once), await timed(theirs, at_once)) for _ in range(ROUNDS)]
    return statistics.median(a for a, _ in rounds), statistics.median(b for _, b in rounds)


async def timed(decide: Decide, at_once: int) -> float:
    decisions = DECISIONS if at_once > 1 else DECISIONS // 8
    started = time.perf_counter()
    for _ in range(decisions // at_once):
        await asyncio.gather(*(decide() for _ in range(at_once)))
    return (time.perf_counter() - started) / decisions * 1e6


def row(name: str, ours: float, theirs: float, form: str) -> None:
    print(f"{name:34}{form.format(ours):>12}{form.format(theirs):>12}{ours / theirs:>8.2f}")


if __name__ == "__main__":
    asyncio.run(main())
