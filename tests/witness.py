"""Holds what readers are told to what was acknowledged, while everything else goes on."""

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aiohttp

from tests.speaker import Answer, Speaker
from tests.web_process import WebProcess

BEHIND_s = 2.0
"""How long a report that was acknowledged with Warning 199 may stay unseen."""

REPORTERS, POLLERS_EACH = 6, 2
PAUSE_s = 0.02
"""Between two questions of one asker: a test of truth needs an idle moment of the machine, or it tests deadlines."""


class Witness:
    """Remembers every acknowledgement and judges every poll by it. `seen` counts what it saw."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self._told: dict[str, int] = defaultdict(int)
        self._untold: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.seen: Counter[str] = Counter()
        self.lies: list[str] = []

    def floors(self, job: str, at: float) -> tuple[int, int]:
        """The versions below which no answer to a poll sent at `at` may be; the second, if it calls itself stale."""
        late = [version for acknowledged_at, version in self._untold[job] if acknowledged_at <= at - BEHIND_s]
        return max(self._told[job], *late, 0), self._told[job]

    async def report(self, web: WebProcess, job: str, message: str) -> Answer:
        """A report that may be refused with 503."""
        answer = await self._speaker.report(web, job, progress={"message": message})
        if answer.status == 200:
            if answer.warning == "199":
                self._untold[job].append((time.monotonic(), answer.version))
            else:
                self._told[job] = max(self._told[job], answer.version)
        self.seen[f"report {answer.status} {answer.warning}".strip()] += 1
        if answer.status not in (200, 503):
            self.lies.append(f"report on {job}: {answer}")
        return answer

    async def poll(self, web: WebProcess, job: str, **how: object) -> Answer:
        """A poll that may be refused with 503 and must not be older than `floors` allow."""
        asked_at = time.monotonic()
        floors = self.floors(job, asked_at)
        answer = await self._speaker.poll(web, job, **how)  # type: ignore[arg-type]
        self.seen[f"poll {answer.status} {answer.warning}".strip()] += 1
        floor = floors[answer.warning == "110"]
        if answer.status != 503 and (answer.status not in (200, 304) or answer.version < floor):
            untold = [(version, round(asked_at - at, 3)) for at, version in self._untold[job][-3:]]
            said = f"told {self._told[job]}, and untold for so many seconds {untold}"
            self.lies.append(f"{web.url} was asked for {job} ({said}): {answer}")
        return answer

    @asynccontextmanager
    async def watching(
        self, webs: Sequence[WebProcess], jobs: Sequence[str], rng: random.Random
    ) -> AsyncIterator[None]:
        """Reports and polls all jobs through all processes until the block ends; nobody may have been lied to."""
        work = [self._report(webs, jobs, rng) for _ in range(REPORTERS)]
        work += [self._poll(web, jobs, rng) for web in webs for _ in range(POLLERS_EACH)]
        tasks = [asyncio.create_task(each) for each in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        print(f"\n{dict(sorted(self.seen.items()))}")
        assert not self.lies, self.lies[:5]
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends

    async def _report(self, webs: Sequence[WebProcess], jobs: Sequence[str], rng: random.Random) -> None:
        while True:
            await self._unless_it_died(self.report(rng.choice(webs), rng.choice(jobs), f"{rng.random()}"))
            await asyncio.sleep(rng.uniform(0, 2 * PAUSE_s))

    async def _poll(self, web: WebProcess, jobs: Sequence[str], rng: random.Random) -> None:
        held: dict[str, str] = {}
        while True:
            job = rng.choice(jobs)
            etag = held.get(job) if rng.random() < 0.7 else None
            answer = await self._unless_it_died(self.poll(web, job, etag=etag, shape_b=rng.random() < 0.3))
            if answer is not None and answer.status == 200:
                held[job] = answer.etag
            await asyncio.sleep(rng.uniform(0, PAUSE_s))

    async def _unless_it_died(self, saying: object) -> Answer | None:
        try:
            return await saying  # type: ignore[misc]
        except aiohttp.ClientError:
            self.seen["no answer"] += 1
            return None
