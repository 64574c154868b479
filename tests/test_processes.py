"""Several processes behind one port: they come, go, crash and stand still, and no client loses a request by it."""

import asyncio
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from service.listener import AT_A_TIME, Listener
from service.serving import hang_up, make_runner
from service.settings import Settings
from tests.conftest import environment_of
from tests.own_servers import connected
from tests.sse_reader import RawReader, comes_true
from tests.traffic import Crowd, Kept, Unanswered
from tests.web_processes import WebProcesses, children, is_there

JOBS = [f"job-{number}" for number in range(50)]
MANY_STREAMS = {"JOBWIRE_MAX_STREAMS_PER_KEY": "1000"}
PATIENCE_s = 60
"""Bounds for a machine that does other work as well."""

Start = Callable[..., Awaitable[WebProcesses]]


@pytest.fixture
async def start_processes(database: str, redis_url: str) -> AsyncIterator[Start]:
    """Starts gunicorn as production does, on fresh stores."""
    started: list[WebProcesses] = []

    async def start(*options: str, how_many: int = 2, **environment: str) -> WebProcesses:
        settings = environment_of(database, redis_url) | MANY_STREAMS | environment
        processes = await WebProcesses.launch(settings, *options, how_many=how_many)
        started.append(processes)
        await processes.serve()
        return processes

    yield start
    await RawReader.close_all()
    for processes in started:
        await processes.stop()


@pytest.fixture
async def clients(key: str) -> AsyncIterator[Callable[[WebProcesses, int], list[Kept]]]:
    """Makes clients, each with a connection of its own."""
    with ExitStack() as stack:

        def make(processes: WebProcesses, how_many: int) -> list[Kept]:
            made = [Kept(processes.url, key, Counter()) for _ in range(how_many)]
            for client in made:
                stack.callback(client.close)
            return made

        yield make


# Reloading and ending


async def reload_under_a_crowd(processes: WebProcesses, key: str, database: str, reloads: int) -> None:
    crowd = Crowd(processes.url, key, JOBS)
    async with connected(database) as postgres:
        async with crowd.using(pollers=50, streams=200, sockets=10):
            await comes_true(lambda: min(crowd.acknowledged.values()) > 2, PATIENCE_s)
            for number in range(1, reloads + 1):
                await processes.reload()
                await comes_true(lambda number=number: crowd.seen["stream ended"] >= 200 * number, PATIENCE_s)
                reports = crowd.seen["report 200"]
                await comes_true(lambda reports=reports: crowd.seen["report 200"] > reports + 100, PATIENCE_s)
        await crowd.account_for(postgres)
    assert crowd.failures == []


async def test_a_reload_under_50_reporters_50_pollers_and_200_streams_loses_no_request_and_no_event(
    start_processes: Start, key: str, database: str
) -> None:
    await reload_under_a_crowd(await start_processes(JOBWIRE_DRAIN="2"), key, database, 1)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_ten_reloads_one_after_the_other_lose_nothing(start_processes: Start, key: str, database: str) -> None:
    await reload_under_a_crowd(await start_processes(JOBWIRE_DRAIN="2"), key, database, 10)


@pytest.mark.long
async def test_a_second_master_takes_over_without_a_lost_request(start_processes: Start, key: str) -> None:
    """USR2, then TERM for the first: as one upgrades to a release that may not start."""
    processes = await start_processes(JOBWIRE_DRAIN="2")
    crowd = Crowd(processes.url, key, JOBS)
    async with crowd.using(pollers=50, streams=200, sockets=10):
        old = processes.pids
        processes.master.send_signal(signal.SIGUSR2)
        await comes_true(lambda: len(processes.pids) == 3, PATIENCE_s)
        (second,) = processes.pids - old
        await comes_true(lambda: len(children(second) & processes.serving()) == 2, PATIENCE_s)
        processes.master.terminate()
        assert await processes.ended() == 0
        await comes_true(lambda: crowd.seen["stream ended"] >= 200, PATIENCE_s)
    os.kill(second, signal.SIGTERM)
    await comes_true(lambda: not is_there(second), PATIENCE_s)
    assert crowd.failures == []


async def test_told_to_end_they_answer_what_was_begun_and_what_comes_meanwhile(
    start_processes: Start, clients: Callable[..., list[Kept]], key: str
) -> None:
    processes = await start_processes(JOBWIRE_DRAIN="2")
    kept, holding, newcomer, late = clients(processes, 4)
    assert (await kept.ask("POST", "/jobs", {"id": "j", "type": "parse"})).status == 201
    etag = (await kept.ask("GET", "/jobs/j")).headers["etag"]
    held = asyncio.create_task(holding.ask("GET", "/jobs/j", Prefer="wait=30", If_None_Match=etag))
    stream = await RawReader.open(processes.url, "/jobs/j/events", key)
    assert await stream.answer() == 200
    assert (await stream.events.next()).status == "queued"
    body = b'{"progress":{"message":"slowly"}}'
    head = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    slow = await RawReader.open(processes.url, "/jobs/j", key, method="PATCH", headers=head)
    slow.writer.write(body[:10])
    await slow.writer.drain()

    processes.master.terminate()
    await comes_true(lambda: is_leaving(kept), 1.5)
    assert (await newcomer.ask("GET", "/jobs/j")).status == 200
    assert kept.seen["connection closed with an answer"] and newcomer.seen["connection closed with an answer"]
    assert (await asyncio.wait_for(held, 20)).status == 304
    assert await stream.events.rest() == []
    slow.writer.write(body[10:])
    assert await slow.answer() == 200
    assert await processes.ended() == 0
    with pytest.raises(Unanswered):
        await late.ask("GET", "/healthz")


async def is_leaving(client: Kept) -> bool:
    answer = await client.ask("GET", "/readyz")
    return answer.status == 503 and "process" in answer.json()["down"]


async def test_interrupted_they_end_at_once(start_processes: Start, clients: Callable[..., list[Kept]]) -> None:
    processes = await start_processes(JOBWIRE_DRAIN="30")
    for client in clients(processes, 10):
        assert (await client.ask("GET", "/healthz")).status == 200
    processes.master.send_signal(signal.SIGINT)
    assert await processes.ended(10) == 0


async def test_one_process_alone_leaves_as_one_of_several_does(start_web, key: str) -> None:
    web = await start_web(JOBWIRE_DRAIN="1")
    client = Kept(web.url, key, Counter())
    assert (await client.ask("GET", "/readyz")).status == 200
    stopping = asyncio.create_task(web.stop())
    await comes_true(lambda: is_leaving(client), 0.9)
    assert await stopping == 0
    interrupted = await start_web(JOBWIRE_DRAIN="30")
    interrupted.process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(interrupted.process.wait(), 10) == 0


async def test_a_connection_is_not_closed_under_a_client_that_has_just_come_or_just_begun(start_web, key: str) -> None:
    """Its request may be on the way: it is answered, although the process takes no more connections."""
    web = await start_web(JOBWIRE_DRAIN="0")
    address = urlsplit(web.url)
    request = f"GET /healthz HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
    just_come, just_begun, kept = [await asyncio.open_connection(address.hostname, address.port) for _ in range(3)]
    for reader, writer in (just_begun, kept):
        writer.write(request)
        assert (await reader.readuntil(b"}"))[:12] == b"HTTP/1.1 200"
    await asyncio.sleep(0.6)  # longer than a connection may be quiet
    just_begun[1].write(request[:30])
    await just_begun[1].drain()
    stopping = asyncio.create_task(web.stop())
    await asyncio.sleep(0.2)
    just_begun[1].write(request[30:])
    assert b"Connection: close" in await just_begun[0].read()
    assert await kept[0].read() == b"", "which had nothing to say"
    just_come[1].write(request)
    assert b"Connection: close" in await just_come[0].read()
    assert await stopping == 0
    for _, writer in (just_come, just_begun, kept):
        writer.transport.abort()


async def test_a_process_that_leaves_does_not_wait_for_a_client_that_has_gone(start_web, key: str) -> None:
    """It was refused before its body came, and aiohttp would go on reading that for ten seconds."""
    web = await start_web(JOBWIRE_DRAIN="0")
    gone = await RawReader.open(web.url, "/nowhere", key, method="POST", headers={"Content-Length": "1000"})
    assert await gone.answer() == 404
    gone.hang_up()
    began_at = asyncio.get_running_loop().time()
    assert await web.stop() == 0
    assert asyncio.get_running_loop().time() - began_at < 6


async def test_nobody_is_hung_up_on_whose_request_lies_unread(service_settings: Settings, key: str) -> None:
    service = make_runner(replace(service_settings, drain_s=0))
    await service.setup()
    await web.TCPSite(service, "127.0.0.1", 0).start()
    address = service.addresses[0]
    reader, writer = await asyncio.open_connection(*address)
    request = f"GET /healthz HTTP/1.1\r\nHost: {address[0]}\r\n\r\n".encode()
    writer.write(request)
    assert (await reader.readuntil(b"}"))[:12] == b"HTTP/1.1 200"
    (connection,) = service.server.connections
    writer.write(request)  # goes out at once, and the service shares our loop: it has not read it
    hang_up(connection)
    assert (await reader.readuntil(b"}"))[:12] == b"HTTP/1.1 200"
    hang_up(connection)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await service.cleanup()


# Crashing and standing still


async def test_of_a_process_that_is_killed_only_its_own_clients_hear(
    start_processes: Start, key: str, database: str
) -> None:
    processes = await start_processes()
    crowd = Crowd(processes.url, key, JOBS)
    async with connected(database) as postgres:
        async with crowd.using(pollers=30, streams=40):
            await comes_true(lambda: min(crowd.acknowledged.values()) > 2, PATIENCE_s)
            victim = max(processes.pids, key=lambda pid: len(processes.clients_of(pid)))
            os.kill(victim, signal.SIGSTOP)  # so that it takes nobody else
            its_own = processes.clients_of(victim)
            os.kill(victim, signal.SIGKILL)
            await processes.serve(instead_of={victim})
            reports = crowd.seen["report 200"]
            await comes_true(lambda: crowd.seen["report 200"] > reports + 100, PATIENCE_s)
        await crowd.account_for(postgres)
    unanswered = {failure.port for failure in crowd.failures}
    print(f"{len(its_own)} connections to the process that was killed, {len(unanswered)} failed")
    assert unanswered
    assert unanswered <= its_own
    assert any(failure.who == "stream" for failure in crowd.failures)


async def test_while_a_process_stands_still_others_answer_whoever_comes(
    start_processes: Start, clients: Callable[..., list[Kept]]
) -> None:
    processes = await start_processes()
    known, newcomers = clients(processes, 20), clients(processes, 20)
    await asyncio.gather(*(client.ask("GET", "/healthz") for client in known))
    still = min(processes.pids)
    os.kill(still, signal.SIGSTOP)
    its_own = processes.clients_of(still)
    stuck = [asyncio.create_task(each.ask("GET", "/healthz")) for each in known if each.port in its_own]
    others = [each for each in known if each.port not in its_own]
    answers = await asyncio.gather(*(each.ask("GET", "/healthz") for each in (*others, *newcomers)))
    assert {answer.status for answer in answers} == {200}
    assert not any(each.done() for each in stuck)
    os.kill(still, signal.SIGCONT)
    assert all(answer.status == 200 for answer in await asyncio.gather(*stuck))


@pytest.mark.long
async def test_a_process_that_stands_still_for_too_long_is_replaced(start_processes: Start) -> None:
    processes = await start_processes("--timeout", "8")
    still = min(processes.pids)
    os.kill(still, signal.SIGSTOP)
    await processes.serve(instead_of={still})
    assert f"WORKER TIMEOUT (pid:{still})" in processes.said


async def test_a_process_that_is_aborted_says_where_it_stood_and_is_replaced(start_processes: Start) -> None:
    processes = await start_processes()
    aborted = min(processes.pids)
    os.kill(aborted, signal.SIGABRT)
    await processes.serve(instead_of={aborted})
    assert "Fatal Python error: Aborted" in processes.said
    assert "in _serve" in processes.said or "in run" in processes.said


async def test_processes_whose_master_died_leave_by_themselves(start_processes: Start) -> None:
    processes = await start_processes()
    left = processes.pids
    processes.master.kill()
    await comes_true(lambda: not any(map(is_there, left)), PATIENCE_s)


# Taking connections


async def test_those_who_come_at_once_are_shared_by_all_processes(
    start_processes: Start, clients: Callable[..., list[Kept]]
) -> None:
    processes = await start_processes()
    await asyncio.gather(*(client.ask("GET", "/healthz") for client in clients(processes, 200)))
    shares = sorted(len(processes.clients_of(pid)) for pid in processes.pids)
    print(f"200 who came at once: {shares}")
    assert sum(shares) == 200
    assert shares[0] >= 10


async def test_a_process_takes_a_few_in_a_row_and_leaves_the_others_time_for_theirs() -> None:
    """(How a crowd is shared depends on what else the machine does; this does not.)"""
    taken: list[asyncio.BaseTransport] = []

    class Arrival(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            taken.append(transport)

    with socket.create_server(("127.0.0.1", 0)) as sock, ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(sock.getsockname()))
        other = stack.enter_context(sock.dup())
        listener = Listener(sock, Arrival)
        for _ in range(20):
            await asyncio.sleep(0)
        left = 0
        with suppress(BlockingIOError):
            while True:
                stack.enter_context(other.accept()[0])
                left += 1
        await listener.stop()
        print(f"{len(taken)} taken, {left} left")
        assert len(taken) >= AT_A_TIME
        assert left >= 8
        for transport in taken:
            transport.close()


async def test_a_process_without_a_descriptor_left_takes_connections_again_once_it_has_some(
    start_processes: Start, clients: Callable[..., list[Kept]]
) -> None:
    processes = await start_processes(how_many=1)
    (pid,) = processes.pids
    known, newcomer = clients(processes, 2)
    assert (await known.ask("GET", "/healthz")).status == 200
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, limits[1]))
    asking = asyncio.create_task(newcomer.ask("GET", "/healthz"))
    await comes_true(lambda: "cannot_accept" in processes.said, PATIENCE_s)
    assert (await known.ask("GET", "/healthz")).status == 200
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert (await asking).status == 200
    assert processes.said.count("cannot_accept") < 100, "it pauses"


async def test_wrong_settings_are_told_in_one_message_and_nothing_is_left_running(redis_url: str) -> None:
    environment = environment_of("postgresql://nowhere", redis_url) | {"JOBWIRE_SECRETS": "short"}
    processes = await WebProcesses.launch(environment, how_many=1)
    assert await processes.ended() == 3
    said = processes.said
    await processes.stop()
    assert "JOBWIRE_SECRETS: each secret needs at least 32 characters" in said
    assert "Traceback" not in said
