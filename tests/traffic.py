"""Many who use the service at once, each on a connection of its own, while something happens to its processes.

They speak HTTP on plain sockets, because clients repeat by themselves what they may, and a test of lost requests must
see it. As any client they open another connection where the last was closed before they asked; nothing else is repeated.
"""

import asyncio
import itertools
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg

from tests.http import Answer
from tests.sse_reader import RawReader, comes_true

ANSWERED_WITHIN_s = 60.0
PAUSES_s = (0.1, 0.3)
"""Between two questions of one asker: fifty of them and their two processes share two cores with the tests."""


class Unanswered(Exception):
    """A question on which no whole answer came."""


@dataclass
class Failure:
    """What went wrong for whom. `port`: the client's of the connection, 0 if there was none."""

    who: str
    what: str
    port: int


class Kept:
    """One client's connection, kept as long as the service keeps it. Counts what it sees in `seen`."""

    def __init__(self, url: str, key: str, seen: Counter[str]) -> None:
        self._address = urlsplit(url)
        self._head = f"Host: {self._address.netloc}\r\nX-API-Key: {key}\r\n"
        self.seen = seen
        self._wire: tuple[asyncio.StreamReader, asyncio.StreamWriter, socket.socket] | None = None
        self.port = 0
        self._opened_at, self._answered = 0.0, 0

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One answer. Raises Unanswered."""
        try:
            async with asyncio.timeout(ANSWERED_WITHIN_s):
                return await self._ask(method, path, body, headers)
        except (OSError, asyncio.IncompleteReadError) as error:  # TimeoutError is an OSError
            self.close()
            age_s = time.monotonic() - self._opened_at
            before = f"{self._answered} answers before on a connection opened {age_s:.2f} s ago"
            raise Unanswered(f"{method} {path}, {before}: {error!r}") from error

    async def _ask(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Answer:
        reader, writer = await self._connection()
        data = b"" if body is None else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if data:
            given |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{self._head}{lines}\r\n".encode() + data)
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        told = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        answer = Answer(int(first.split()[1]), told, await reader.readexactly(int(told.get("content-length", 0))))
        self._answered += 1
        if told.get("connection") == "close":
            self.seen["connection closed with an answer"] += 1
            self.close()
        return answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._wire is not None and _was_closed(self._wire[2]):
            self.seen["connection closed between requests"] += 1
            self.close()
        if self._wire is None:
            self.port = 0
            wire = socket.socket()
            wire.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(wire, (self._address.hostname, self._address.port))
            except OSError:
                wire.close()
                raise
            self.port = wire.getsockname()[1]
            self._opened_at, self._answered = time.monotonic(), 0
            looks = socket.socket(fileno=os.dup(wire.fileno()))
            self._wire = (*await asyncio.open_connection(sock=wire), looks)
        return self._wire[:2]

    def close(self) -> None:
        if self._wire is not None:
            self._wire[1].transport.abort()
            self._wire[2].close()
            self._wire = None


def _was_closed(wire: socket.socket) -> bool:
    """Whether the other side has closed it, as far as can be known before asking."""
    try:
        return wire.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


class Crowd:
    """Reporters, pollers, streams and sockets. `failures`: whoever got no answer, a refusal, an old answer, a cut.

    `seen` counts what came. Each job has one reporter, so that its versions can be accounted for.
    """

    def __init__(self, url: str, key: str, jobs: Sequence[str]) -> None:
        self.failures: list[Failure] = []
        self.seen: Counter[str] = Counter()
        self.acknowledged = dict.fromkeys(jobs, 1)
        self.visible = dict.fromkeys(jobs, 1)  # acknowledged without a warning that readers may be behind
        self.unanswered = dict.fromkeys(jobs, 0)
        self._url = url
        self._key = key
        self._jobs = jobs
        self._told: list[tuple[str, Sequence[str], dict[str, int]]] = []
        self._over = asyncio.Event()

    @asynccontextmanager
    async def using(self, *, pollers: int, streams: int, sockets: int = 0) -> AsyncIterator[None]:
        """All of them are at work inside: a reporter for each job, and as many others. Streams go on a while longer."""
        batch = await self._create()
        following = [asyncio.create_task(self._follow(*self._stream(number, batch))) for number in range(streams)]
        following += [
            asyncio.create_task(self._watch(self._jobs[number % len(self._jobs)])) for number in range(sockets)
        ]
        await comes_true(lambda: self.seen["stream opened"] >= streams and self.seen["socket opened"] >= sockets, 60)
        asking = [asyncio.create_task(self._report(job)) for job in self._jobs]
        asking += [asyncio.create_task(self._poll(number)) for number in range(pollers)]
        try:
            yield
            self._over.set()
            await asyncio.gather(*asking)
            with suppress(TimeoutError):
                await comes_true(lambda: not self.behind(), 10)
            behind = self.behind()
        finally:
            for task in (*asking, *following):
                task.cancel()
            ends = await asyncio.gather(*asking, *following, return_exceptions=True)
            await RawReader.close_all()
            print(f"\n{dict(sorted(self.seen.items()))}", *self.failures[:20], sep="\n")
        assert [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)] == []
        assert behind == []

    def behind(self) -> list[str]:
        """The streams that have not told the last acknowledged version of some job, with the first of those jobs."""
        return [
            f"{path}: {job} is at {self.acknowledged[job]}, told {told.get(job)}"
            for path, jobs, told in self._told
            if (job := next((job for job in jobs if told.get(job, 0) < self.acknowledged[job]), None))
        ]

    async def account_for(self, postgres: asyncpg.Connection) -> None:
        """Of each job every version was acknowledged, or belongs to a report on which no answer came."""
        stored = dict(await postgres.fetch("select id, version from jobs"))
        for job, acknowledged in self.acknowledged.items():
            assert acknowledged <= stored[job] <= acknowledged + self.unanswered[job], job
        print(f"{sum(self.acknowledged.values()) - len(self._jobs)} reports acknowledged, all there")

    async def _create(self) -> str:
        client = Kept(self._url, self._key, Counter())
        items = [{"id": job, "type": "parse", "batch_id": "crowd"} for job in self._jobs]
        assert (await client.ask("POST", "/jobs", items)).status == 201
        client.close()
        return "crowd"

    # Those who ask

    async def _report(self, job: str) -> None:
        client = Kept(self._url, self._key, self.seen)
        for number in itertools.count(1):
            answer = await self._answer(
                client, "report", "PATCH", f"/jobs/{job}", {"progress": {"message": f"{number}"}}
            )
            if answer is None:
                self.unanswered[job] += 1
            else:
                version, before = answer.json()["version"], self.acknowledged[job]
                if not before < version <= before + 1 + self.unanswered[job]:
                    self._fail("report", f"{job} went from {before} to {version}", client.port)
                self.acknowledged[job] = version
                if "warning" not in answer.headers:
                    self.visible[job] = version
            if await self._pause():
                break
        client.close()

    async def _poll(self, number: int) -> None:
        """Every fifth waits for changes of one job, every tenth asks rarely, the others ask for any job."""
        client, etag = Kept(self._url, self._key, self.seen), ""
        waits, rarely = number % 5 == 0, number % 10 == 1
        while not await self._pause(10 if rarely else 1):
            job = self._jobs[number % len(self._jobs)] if waits else random.choice(self._jobs)
            headers = {"Prefer": "wait=5", "If_None_Match": etag or '"0-0"'} if waits else {}
            floor = self.visible[job]
            answer = await self._answer(client, "wait" if waits else "poll", "GET", f"/jobs/{job}", **headers)
            if answer is not None:
                etag = answer.headers["etag"]
                if (version := int(etag.strip('"').partition("-")[0])) < floor:
                    self._fail("poll", f"{job} is at {floor}, and this says {version}", client.port)
        client.close()

    async def _answer(
        self, client: Kept, who: str, method: str, path: str, body: Any = None, **how: str
    ) -> Answer | None:
        try:
            answer = await client.ask(method, path, body, **how)
        except Unanswered as error:
            self._fail(who, f"{error}", client.port)
            return None
        self.seen[f"{who} {answer.status} {answer.headers.get('warning', '')[:3]}".strip()] += 1
        if answer.status in (200, 304):
            return answer
        self._fail(who, f"{answer}", client.port)
        return None

    async def _pause(self, times: float = 1) -> bool:
        """Whether it is over."""
        try:
            await asyncio.wait_for(self._over.wait(), random.uniform(*PAUSES_s) * times)
        except TimeoutError:
            return False
        return True

    # Those who follow

    def _stream(self, number: int, batch: str) -> tuple[str, Sequence[str]]:
        """Its address, and the jobs of which it tells."""
        job, some = self._jobs[number % len(self._jobs)], self._jobs[:5]
        return [
            (f"/jobs/{job}/events", [job]),
            (f"/jobs/batch/{batch}/events", self._jobs),
            ("/jobs/events", self._jobs),
            (f"/jobs/events?job_ids={','.join(some)}", some),
        ][number % 4]

    async def _follow(self, path: str, jobs: Sequence[str]) -> None:
        """Comes back with the last id, sooner than it is asked to."""
        told: dict[str, int] = {}
        self._told.append((path, jobs, told))
        last_id = ""
        while True:
            try:
                last_id = await self._read_stream(path, told, last_id)
            except OSError as error:
                self._fail("stream", f"{error!r}", 0)
            await asyncio.sleep(random.uniform(*PAUSES_s))

    async def _read_stream(self, path: str, told: dict[str, int], last_id: str) -> str:
        raw = await RawReader.open(self._url, path, self._key, headers={"Last-Event-ID": last_id} if last_id else None)
        port = raw.address[1]
        try:
            if (status := await raw.answer()) != 200:
                self._fail("stream", f"{status}", port)
                return last_id
            self.seen["stream opened"] += 1
            while True:
                event = await raw.events.next(ANSWERED_WITHIN_s)
                last_id = event.id or last_id
                if event.name in ("status", "progress"):
                    told[event.data["id"]] = max(event.version, told.get(event.data["id"], 0))
                elif event.name not in ("open", "batch"):
                    self._fail("stream", f"{event}", port)
        except asyncio.IncompleteReadError as error:
            self._fail("stream", f"{error!r}", port)
        except EOFError:
            self.seen["stream ended"] += 1
        finally:
            raw.writer.transport.abort()
        return last_id

    async def _watch(self, job: str) -> None:
        told: dict[str, int] = {}
        self._told.append((f"socket of {job}", [job], told))
        async with aiohttp.ClientSession(headers={"X-API-Key": self._key}) as session:
            while True:
                try:
                    async with session.ws_connect(f"{self._url}/jobs/{job}/status") as socket_:
                        self.seen["socket opened"] += 1
                        async for frame in socket_:
                            told[job] = 1 + int(frame.json().get("progress", {}).get("message", 0))  # as _report counts
                        self.seen[f"socket closed with {socket_.close_code}"] += 1
                        if socket_.close_code != aiohttp.WSCloseCode.GOING_AWAY:
                            self._fail("socket", f"closed with {socket_.close_code}", 0)
                except aiohttp.ClientError as error:
                    self._fail("socket", f"{error!r}", 0)
                await asyncio.sleep(random.uniform(*PAUSES_s))

    def _fail(self, who: str, what: str, port: int) -> None:
        self.seen[f"{who} failed"] += 1
        self.failures.append(Failure(who, what, port))
