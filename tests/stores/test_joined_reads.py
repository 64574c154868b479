"""Reads that are shared: nobody is told what is older than their question, and nobody ends another's."""

import asyncio
from collections.abc import Sequence

import pytest

from service.errors import Unavailable
from service.stores.joined_reads import JoinedReads, SpacedReads
from service.stores.ready import Absence, JobKey, Ready

A, B = (1, "a"), (1, "b")
SOON_s = 3.0


class Source:
    """Answers with how often it was asked before; each read waits until `go_on`."""

    def __init__(self) -> None:
        self.asked: list[list[JobKey]] = []
        self.go_on = asyncio.Event()
        self.fails: Exception | None = None

    async def read(self, keys: Sequence[JobKey]) -> list[Ready]:
        number = len(self.asked)
        self.asked.append(list(keys))
        await self.go_on.wait()
        if self.fails is not None:
            raise self.fails
        return [Absence("not_found", f"read {number}") for _ in keys]

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(SOON_s):
            while len(self.asked) < times:
                await asyncio.sleep(0)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture(params=["joined", "joined and spaced"])
def reads(source: Source, request: pytest.FixtureRequest) -> JoinedReads | SpacedReads:
    joined = JoinedReads(source.read)
    return joined if request.param == "joined" else SpacedReads(joined)


async def test_reads_of_one_turn_are_one(source: Source) -> None:
    reads = JoinedReads(source.read)
    source.go_on.set()
    told = await asyncio.gather(reads.read(A), reads.read(B), reads.read(A))
    assert source.asked == [[A, B]]
    assert told == [Absence("not_found", "read 0")] * 3


async def test_who_asks_while_a_read_is_under_way_gets_the_next(
    source: Source, reads: JoinedReads | SpacedReads
) -> None:
    early = asyncio.create_task(reads.read(A))
    await source.until_asked(1)
    late = [asyncio.create_task(reads.read(A)) for _ in range(3)]
    await asyncio.sleep(0)
    source.go_on.set()
    assert await early == Absence("not_found", "read 0")
    assert await asyncio.gather(*late) == [Absence("not_found", "read 1")] * 3
    await reads.close()


async def test_who_hangs_up_takes_nobody_along(source: Source, reads: JoinedReads | SpacedReads) -> None:
    async def ask() -> Ready:
        return await reads.read(A)

    askers = [asyncio.create_task(ask()) for _ in range(3)]
    await source.until_asked(1)
    behind = [asyncio.create_task(ask()) for _ in range(3)]
    await asyncio.sleep(0)
    askers[0].cancel()
    behind[2].cancel()
    await asyncio.sleep(0)
    source.go_on.set()
    ends = await asyncio.gather(*askers, *behind, return_exceptions=True)
    assert [isinstance(end, asyncio.CancelledError) for end in ends] == [True, *[False] * 4, True]
    assert all(isinstance(end, Absence) for end in ends[1:5])
    await reads.close()


async def test_what_fails_fails_for_all_who_asked(source: Source, reads: JoinedReads | SpacedReads) -> None:
    source.fails = Unavailable()
    source.go_on.set()
    ends = await asyncio.gather(reads.read(A), reads.read(A), return_exceptions=True)
    assert {type(end) for end in ends} == {Unavailable}
    source.fails = None
    assert isinstance(await reads.read(A), Absence)
    await reads.close()
