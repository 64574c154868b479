"""The pipe: every question gets its own answer or RedisAway, and never somebody else's."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from service.embedded import Server, start_redis
from service.errors import RedisAway
from service.stores.redis_pipe import RedisError, RedisPipe, Script

OpenPipe = Callable[..., Awaitable[RedisPipe]]
Frozen = Callable[[], AbstractContextManager[None]]

SOON_s = 3.0
DEADLINE_s = 0.1
NO_PROBE_s = 60.0


@pytest.fixture
def double(tmp_path: Path) -> Script:
    """A script that answers twice its argument."""
    path = tmp_path / "numbers.double.lua"
    path.write_text("return ARGV[1] * 2")
    return Script.load(path)


@pytest.fixture
async def open_pipe(admin: Redis, redis_server: Server) -> AsyncIterator[OpenPipe]:
    pipes = []

    async def start(url: str = redis_server.url, **options: Any) -> RedisPipe:
        pipe = RedisPipe(url, **({"deadline_s": DEADLINE_s, "probe_every_s": 0.05} | options))
        pipes.append(pipe)
        await pipe.start()
        return pipe

    yield start
    for pipe in pipes:
        await pipe.close()


def heard(hooks: list[Any]) -> asyncio.Event:
    """Is set the next time these hooks are called."""
    event = asyncio.Event()
    hooks.append(lambda *_: event.set())
    return event


async def soon(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), SOON_s)


async def echoes(pipe: RedisPipe, words: list[str]) -> bool:
    """Whether each question gets its own answer."""
    return await asyncio.gather(*(pipe.command("ECHO", word) for word in words)) == [w.encode() for w in words]


def refused_at_once(pipe: RedisPipe) -> bool:
    """Whether asking fails, and not only waiting for the answer."""
    try:
        pipe.command("PING").cancel()
    except RedisAway:
        return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_each_question_gets_its_own_answer(open_pipe: OpenPipe) -> None:
    pipe = await open_pipe()
    assert await echoes(pipe, [str(n) for n in range(5_000)])


async def test_a_turn_is_one_send(open_pipe: OpenPipe, admin: Redis) -> None:
    pipe = await open_pipe(probe_every_s=NO_PROBE_s)
    before = (await admin.info("stats"))["total_reads_processed"]
    built: list[asyncio.Future[Any]] = []
    pipe.before_send(lambda: built.append(pipe.command("ECHO", "built")))
    assert await echoes(pipe, [str(n) for n in range(100)])
    assert await built[0] == b"built"
    after = (await admin.info("stats"))["total_reads_processed"]
    assert after - before == 2, "one for the turn, one for the second INFO"


async def test_a_failing_builder_takes_nothing_from_the_others(open_pipe: OpenPipe) -> None:
    pipe = await open_pipe()
    built: list[asyncio.Future[Any]] = []

    def fail() -> None:
        raise LookupError("a builder's own fault")

    for build in (
        lambda: built.append(pipe.command("ECHO", "1")),
        fail,
        lambda: built.append(pipe.command("ECHO", "2")),
    ):
        pipe.before_send(build)
    asked = pipe.command("ECHO", "asked")
    assert await asked == b"asked"
    assert await asyncio.gather(*built) == [b"1", b"2"]
    assert await echoes(pipe, ["the next turn"])


async def test_what_redis_tells_of_itself(open_pipe: OpenPipe, admin: Redis) -> None:
    told: list[Any] = []
    pipe = await open_pipe(on_up=told.append)
    assert pipe.up
    assert told[0]["run_id"] == (await admin.info("server"))["run_id"]
    assert told[0]["maxmemory_policy"] == "noeviction"
    assert "redis_version" in told[0]
    assert [client["name"] for client in await admin.client_list()].count("jobwire") == 1


async def test_small_packets_are_sent_at_once(open_pipe: OpenPipe) -> None:
    pipe = await open_pipe()
    assert pipe._connection is not None
    assert pipe._connection._transport is not None
    wire = pipe._connection._transport.get_extra_info("socket")
    assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_script_and_its_error(open_pipe: OpenPipe, double: Script) -> None:
    pipe = await open_pipe(scripts=[double])
    good, bad, command = pipe.call(double, [], [21]), pipe.call(double, [], ["x"]), pipe.command("NONSENSE")
    assert await good == 42
    with pytest.raises(RedisError, match="arithmetic"):
        await bad
    with pytest.raises(RedisError, match="unknown command"):
        await command
    assert pipe.up


async def test_scripts_flushed_in_flight(open_pipe: OpenPipe, admin: Redis, double: Script) -> None:
    pipe = await open_pipe(scripts=[double], probe_every_s=NO_PROBE_s)
    answers = [pipe.call(double, [], [n]) for n in range(50)]
    flushed = pipe.command("SCRIPT", "FLUSH")
    answers += [pipe.call(double, [], [n]) for n in range(50, 100)]
    last = pipe.command("ECHO", "last")
    assert await asyncio.gather(*answers) == [2 * n for n in range(100)]
    assert (await flushed, await last) == (b"OK", b"last")
    await admin.config_resetstat()
    assert await pipe.call(double, [], [4]) == 8
    assert "cmdstat_eval" not in await admin.info("commandstats"), "after one EVAL the script is known again"


async def test_cancelled_callers_shift_nothing(open_pipe: OpenPipe, double: Script) -> None:
    pipe = await open_pipe()
    callers = [asyncio.ensure_future(pipe.command("ECHO", str(n))) for n in range(100)]
    for caller in callers[::3]:
        caller.cancel()
    await asyncio.sleep(0)  # the rest is cancelled when it is on its way
    for caller in callers[1::3]:
        caller.cancel()
    assert await asyncio.gather(*callers[2::3]) == [str(n).encode() for n in range(2, 100, 3)]
    late = pipe.call(double, [], [1])  # not loaded: its NOSCRIPT arrives when nobody waits any more
    late.cancel()
    assert await echoes(pipe, ["after"])


async def test_absent_redis_is_no_error_and_is_found_later(open_pipe: OpenPipe, tmp_path: Path, double: Script) -> None:
    port = free_port()
    pipe = await open_pipe(f"redis://127.0.0.1:{port}", scripts=[double])
    came_up, built = heard(pipe.on_up), asyncio.Event()
    assert not pipe.up
    assert pipe.why_down
    assert refused_at_once(pipe)
    pipe.before_send(built.set)
    await soon(built)
    server = await asyncio.to_thread(start_redis, tmp_path, durable=False, port=port)
    try:
        await soon(came_up)
        assert await pipe.call(double, [], [5]) == 10
    finally:
        await asyncio.to_thread(server.stop)


async def test_frozen_server_costs_one_deadline_once(open_pipe: OpenPipe, frozen: Frozen) -> None:
    pipe = await open_pipe()
    went_down, came_up = heard(pipe.on_down), heard(pipe.on_up)
    clock = asyncio.get_running_loop().time
    with frozen():
        asked_at = clock()
        answers = await asyncio.gather(*(pipe.command("ECHO", "old") for _ in range(50)), return_exceptions=True)
        took_s = clock() - asked_at
        assert [type(answer) for answer in answers] == [RedisAway] * 50
        assert DEADLINE_s * 0.8 <= took_s < DEADLINE_s + 0.1
        assert went_down.is_set()
        assert not pipe.up
        asked_at = clock()
        for _ in range(100):
            assert refused_at_once(pipe)
        assert clock() - asked_at < 0.05
    await soon(came_up)
    assert await echoes(pipe, [f"new {n}" for n in range(100)])


async def test_probe_finds_a_frozen_server_without_any_poll(open_pipe: OpenPipe, frozen: Frozen) -> None:
    pipe = await open_pipe()
    went_down = heard(pipe.on_down)
    with frozen():
        await asyncio.wait_for(went_down.wait(), 0.05 + DEADLINE_s + 0.2)


async def test_busy_loop_is_not_a_frozen_server(open_pipe: OpenPipe) -> None:
    pipe = await open_pipe(probe_every_s=NO_PROBE_s)
    answer = pipe.command("ECHO", "here")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(2 * DEADLINE_s)  # the loop itself is busy; the answer lies in the socket
    assert await answer == b"here"
    assert pipe.up


async def test_deadline_is_of_the_oldest_question(open_pipe: OpenPipe, frozen: Frozen) -> None:
    """A timer that was set for an answered question must not end a later one early."""
    pipe = await open_pipe(probe_every_s=NO_PROBE_s)
    clock = asyncio.get_running_loop().time
    assert await echoes(pipe, ["first"])  # its timer is still running
    await asyncio.sleep(DEADLINE_s / 2)
    with frozen():
        asked_at = clock()
        with pytest.raises(RedisAway):
            await pipe.command("ECHO", "second")
        assert DEADLINE_s * 0.8 <= clock() - asked_at < DEADLINE_s + 0.1


async def test_killed_connection_comes_back(open_pipe: OpenPipe, admin: Redis, frozen: Frozen) -> None:
    pipe = await open_pipe()
    went_down, came_up = heard(pipe.on_down), heard(pipe.on_up)
    [ours] = [client["id"] for client in await admin.client_list() if client["name"] == "jobwire"]
    waiting = pipe.command("BLPOP", "nothing", 0)
    await admin.client_kill_filter(_id=ours)
    with pytest.raises(RedisAway):
        await waiting
    assert went_down.is_set()
    await soon(came_up)
    assert await echoes(pipe, ["again"])


async def test_who_we_are(open_pipe: OpenPipe, admin: Redis, redis_server: Server) -> None:
    await admin.acl_setuser("alice", enabled=True, passwords=["+s:e/c"], keys=["*"], commands=["+@all"])
    port = redis_server.url.rpartition(":")[2].partition("/")[0]
    pipe = await open_pipe(f"redis://alice:s%3Ae%2Fc@127.0.0.1:{port}/3")
    assert await pipe.command("ACL", "WHOAMI") == b"alice"
    await pipe.command("SET", "where", "third")
    async with Redis.from_url(f"{redis_server.url.rpartition('/')[0]}/3") as third:
        assert await third.get("where") == b"third"
    stranger = await open_pipe(f"redis://alice:wrong@127.0.0.1:{port}/3")
    assert not stranger.up
    assert "WRONGPASS" in stranger.why_down
    assert "wrong" not in repr(stranger._address)


async def test_unix_socket(open_pipe: OpenPipe, tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = await asyncio.to_thread(start_redis, tmp_path, durable=False, options=("--unixsocket", str(path)))
    try:
        pipe = await open_pipe(f"unix://{path}?db=2")
        assert await echoes(pipe, ["through a file"])
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("url", ["http://127.0.0.1", "127.0.0.1:6379"])
async def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="scheme"):
        RedisPipe(url)


async def test_tls_as_redis_py_reads_it() -> None:
    strict = RedisPipe("rediss://example.test:6380")._address.tls
    lax = RedisPipe("rediss://example.test:6380?ssl_cert_reqs=none")._address.tls
    assert strict is not None
    assert strict.check_hostname
    assert lax is not None
    assert not lax.check_hostname
    assert RedisPipe("redis://example.test")._address.tls is None


async def test_a_replica_is_not_trusted(open_pipe: OpenPipe, admin: Redis) -> None:
    pipe = await open_pipe(probe_every_s=0.02)
    went_down, came_up = heard(pipe.on_down), heard(pipe.on_up)
    await admin.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(RedisAway, match="READONLY"):
            await pipe.command("SET", "a", "b")
        assert went_down.is_set()
        newcomer = await open_pipe()
        assert not newcomer.up
        assert "replica" in newcomer.why_down
    finally:
        await admin.replicaof("NO", "ONE")
    await soon(came_up)


@pytest.mark.parametrize("nonsense", [b"what?\r\n", b"+OK\r\n" * 50])
async def test_nonsense_is_not_redis(open_pipe: OpenPipe, nonsense: bytes) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(nonsense)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1") as server:
        pipe = await open_pipe(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        assert not pipe.up
        assert pipe.why_down
        await pipe.close()


async def test_close_fails_what_waits(open_pipe: OpenPipe) -> None:
    pipe = await open_pipe()
    went_down = heard(pipe.on_down)
    waiting = pipe.command("BLPOP", "nothing", 0)
    await asyncio.sleep(0)
    await pipe.close()
    with pytest.raises(RedisAway):
        await waiting
    assert refused_at_once(pipe)
    assert not went_down.is_set()


async def test_a_failing_hook_does_not_end_the_probing(open_pipe: OpenPipe, admin: Redis) -> None:
    pipe = await open_pipe()

    def fail(facts: object) -> None:
        raise LookupError("a hook's own fault")

    pipe.on_up.append(fail)
    came_up = asyncio.Event()
    pipe.on_up.insert(0, lambda _: came_up.set())
    for _ in range(2):
        came_up.clear()
        await admin.client_kill_filter(_type="normal", skipme=True)
        await soon(came_up)


async def test_lost_connections_leave_no_unheard_exceptions(
    open_pipe: OpenPipe, frozen: Frozen, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = await open_pipe()
    with frozen(), caplog.at_level(logging.ERROR, logger="asyncio"):
        cancelled = [pipe.command("PING") for _ in range(3)]
        for answer in cancelled:
            answer.cancel()
        await soon(heard(pipe.on_down))
        del answer, cancelled
        gc.collect()
    assert not caplog.records
