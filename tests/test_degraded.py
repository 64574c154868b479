"""One store or both in trouble: what a client sees of each kind of request, what /readyz names, which metric shows it.

The README has the same table; a test holds it to this one.
"""

import asyncio
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest

from service.identity import READ
from tests.conftest import make_key
from tests.fault_proxy import FaultProxy
from tests.own_servers import connected
from tests.predicates import are_ready, are_without_warning
from tests.speaker import Answer, Speaker, speaking, until
from tests.sse_reader import EventReader, events_of
from tests.test_metrics import free_address, scrape
from tests.troubles import ROLE, TROUBLES, stores_for

README = (Path(__file__).parent.parent / "README.md").read_text()

UNKNOWN_KEY = {"X-API-Key": "jw_" + "x" * 43}
LIMIT, ASKED = 8, 20
TIMEOUT_s = 1.0


@dataclass(frozen=True)
class Seen:
    """A status and the code of its Warning, where there is one. `held`: Redis has the job; `unheld`: it does not.

    `up_to`: how many polls a key may make whose limit is 8. `metric`: its name and the values of its labels; it
    `grows`, or is 0 meanwhile. `resets`: streams are told that versions begin anew.
    """

    held: str = "200"
    unheld: str = "200"
    report: str = "200"
    new_stream: int = 200
    unknown_key: int = 401
    up_to: int = LIMIT
    names: frozenset[str] = frozenset()
    metric: tuple[str, ...] = ()
    grows: bool = False
    resets: int = 0


REDIS_AWAY = Seen(
    report="200 199", names=frozenset({"redis", "events"}), metric=("jobwire_redis_up", "polls"), up_to=LIMIT
)
REDIS_IS_ANOTHER = Seen(metric=("jobwire_redis_lives_total",), grows=True, up_to=2 * LIMIT)
POSTGRES_AWAY = Seen(
    held="200 110",
    unheld="503",
    report="503",
    unknown_key=503,
    names=frozenset({"postgres"}),
    metric=("jobwire_postgres_up",),
)
BOTH_AWAY = replace(
    POSTGRES_AWAY,
    held="503",
    new_stream=503,
    names=frozenset({"postgres", "redis", "events"}),
    metric=("jobwire_postgres_up",),
)

SEEN = {
    "Redis is down": REDIS_AWAY,
    "Redis is frozen": REDIS_AWAY,
    "Redis was flushed": Seen(metric=("jobwire_status_reads_total", "postgres"), grows=True, up_to=2 * LIMIT),
    "Redis was restarted, empty": REDIS_IS_ANOTHER,
    "Redis was restarted, with old data": REDIS_IS_ANOTHER,
    "Redis failed over to a replica that lagged": REDIS_IS_ANOTHER,
    "Redis is out of memory": Seen(
        names=frozenset({"redis_writes"}), metric=("jobwire_redis_errors_total", "limits"), grows=True
    ),
    "The subscription to Redis is wedged": Seen(names=frozenset({"events"}), metric=("jobwire_redis_up", "events")),
    "Postgres is down": POSTGRES_AWAY,
    "Postgres is frozen": POSTGRES_AWAY,
    "Postgres was restarted": Seen(metric=("jobwire_postgres_errors_total", "away"), grows=True),
    "Postgres is read-only": Seen(
        report="503", names=frozenset({"postgres_writes"}), metric=("jobwire_postgres_writable",)
    ),
    "Postgres is a standby": replace(POSTGRES_AWAY, resets=1),  # once it is promoted
    "Postgres has no connection left": replace(
        POSTGRES_AWAY, metric=("jobwire_postgres_errors_total", "no_connection_left"), grows=True
    ),
    "Both are down": BOTH_AWAY,
    "Both are frozen": BOTH_AWAY,
}


class Client:
    """What a client does, by one web process."""

    def __init__(self, speaker: Speaker, web, limited: str, address: str) -> None:
        self.speaker, self.web, self._limited, self._address = speaker, web, limited, address

    async def poll(self, job: str) -> Answer:
        return await self.speaker.poll(self.web, job)

    async def report(self, message: str) -> Answer:
        return await self.speaker.report(self.web, "followed", progress={"message": message})

    async def with_limited_key(self, method: str = "GET", **how) -> int:
        headers = {"X-API-Key": self._limited}
        return (await self.speaker.ask(self.web, method, "/jobs/held", headers=headers, **how)).status

    async def with_unknown_key(self) -> int:
        return (await self.speaker.ask(self.web, "GET", "/jobs/held", headers=UNKNOWN_KEY)).status

    async def metric(self, name: str, *labels: str) -> float:
        return (await scrape(self._address))[name][labels]

    async def named(self) -> set[str]:
        answer = await self.speaker.ask(self.web, "GET", "/readyz")
        assert answer.took_s < 1.5
        return set(answer.json["down"])


def said(answer: Answer) -> str:
    return f"{answer.status} {answer.warning}".strip()


def test_the_readme_tells_the_same():
    section = README.split("## When a store is in trouble", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] in BEGINS
    ]
    told = {row[0]: row[1:6] for row in rows}
    assert told.keys() == SEEN.keys() == TROUBLES.keys()
    for what, (polls, report, limits, names, metric) in told.items():
        seen = SEEN[what]
        assert polls == f"{seen.held}; {seen.unheld}", what
        assert report == seen.report, what
        assert ("twice" in limits) == (seen.up_to > LIMIT), what
        assert set(re.findall(r"`(\w+)`", names)) == seen.names, what
        name, label = re.fullmatch(r"`(\w+)(?:{\w+=\"(\w+)\"})?` (?:= 0|grows)", metric).groups()
        assert (name, *filter(None, [label])) == seen.metric, what
        assert metric.endswith("grows") == seen.grows, what


BEGINS = {f"| {what[0]}" for what in SEEN}


@pytest.mark.parametrize("what", TROUBLES)
async def test_what_a_client_sees_while(start_web, database, tmp_path, what):
    seen = SEEN[what]
    async with stores_for(what, database, tmp_path) as stores:
        key = await make_key(stores.database, "acme")
        limited = await make_key(stores.database, "acme", (READ,), {"poll": f"{LIMIT}/60"})
        address = free_address()
        web = await start_web(
            **stores.environment, JOBWIRE_DATABASE_TIMEOUT=f"{TIMEOUT_s}", JOBWIRE_METRICS_LISTEN=address
        )
        async with speaking(key) as speaker:
            client = Client(speaker, web, limited, address)
            for job in ("held", "unheld", "followed"):
                await speaker.create(web, job)
            for _ in range(2):
                await client.poll("held")
            await until(lambda: are_ready(speaker, [web]), 5)
            await stores.remember()
            told = await speaker.say(web, "held", "what old data do not know")
            assert told.warning == ""
            assert (await client.poll("held")).version == told.version
            assert [await client.with_limited_key() for _ in range(3)] == [200] * 3
            async with (
                aiohttp.ClientSession(web.url, headers={"X-API-Key": key}) as session,
                events_of(session, "followed") as events,
            ):
                assert (await events.next()).version == 1
                before = await client.metric(*seen.metric)
                async with TROUBLES[what](stores):
                    await expect(seen, client, before, told.version, events, session)
                ready = await until(lambda: are_ready(speaker, [web]), 8)
                await until(lambda: are_without_warning(speaker, [web], "held"), 3)
                print(f"ready {ready:.2f} s after")
                assert (await client.poll("held")).version == told.version
                assert (await client.poll("unheld")).version == 1
                ended = await speaker.report(web, "followed", status="COMPLETED")
                assert said(ended) == "200"
                assert (await events.rest())[-1].version == ended.version
                assert [event.name for event in events.seen if event.name == "reset"] == ["reset"] * seen.resets
                versions = [event.version for event in events.seen if event.name != "reset"]
                assert versions == sorted(versions if seen.resets else set(versions))


async def expect(
    seen: Seen, client: Client, before: float, told: int, events: EventReader, session: aiohttp.ClientSession
) -> None:
    """That a client sees this and nothing else."""
    await until(lambda: shows(client, seen, before), 8)
    await until(lambda: names_exactly(client, seen.names), 8)
    if seen.held == "200":
        await until(lambda: are_without_warning(client.speaker, [client.web], "held"), 3)

    held, unheld = await asyncio.gather(client.poll("held"), client.poll("unheld"))
    assert (said(held), said(unheld)) == (seen.held, seen.unheld)
    assert held.status != 200 or held.version == told

    report = await client.report(f"{time.monotonic()}")
    assert said(report) == seen.report, report
    if report.status == 200:
        heard = await events.next(within_s=5)
        assert heard.version == report.version
    else:
        assert int(report.headers["Retry-After"]) > 0

    async with session.get("/jobs/held/events") as stream:
        assert stream.status == seen.new_stream

    assert await client.with_unknown_key() == seen.unknown_key
    assert await client.with_limited_key("PATCH", json={}) == 403, "a key that may only read"
    answers = [await client.with_limited_key() for _ in range(ASKED)]
    assert 0 < ASKED - answers.count(429) <= seen.up_to - 3
    assert set(answers) == {held.status, 429}


async def names_exactly(client: Client, names: frozenset[str]) -> bool:
    return await client.named() == names


async def shows(client: Client, seen: Seen, before: float) -> bool:
    if not seen.grows:
        return await client.metric(*seen.metric) == 0
    await client.poll("held")
    return await client.metric(*seen.metric) > before


async def test_the_first_look_at_a_postgres_that_is_silent_takes_a_second(start_web, database):
    async with FaultProxy(database) as proxy:
        web = await start_web(DATABASE_URL=proxy.url)
        proxy.freeze()
        async with speaking("none") as speaker:
            looks = await asyncio.gather(*(speaker.ask(web, "GET", "/readyz") for _ in range(20)))
            assert {look.status for look in looks} == {503}
            assert all("does not answer" in look.json["down"]["postgres"] for look in looks)
            assert max(look.took_s for look in looks) < 1.5
            proxy.thaw()
            await until(lambda: are_ready(speaker, [web]), 4)


async def test_connections_that_are_left_are_used_on_where_others_took_the_rest(start_web, database, tmp_path):
    what = "Postgres has no connection left"
    async with stores_for(what, database, tmp_path) as stores, connected(stores.database) as admin:
        web = await start_web(**stores.environment)
        async with speaking(await make_key(stores.database, "acme")) as speaker:
            await speaker.create(web, "j")
            await until(lambda: are_ready(speaker, [web]), 5)
            await admin.execute(f"alter role {ROLE} connection limit 0")
            for number in range(10):
                assert (await speaker.say(web, "j", f"step {number}")).warning == ""
                assert (await speaker.poll(web, "j")).warning == ""
            # More at once than there are connections: some come to nothing, and that is no outage.
            asked = [speaker.ask(web, "POST", "/jobs", json={"type": "x"}) for _ in range(40)]
            statuses = {answer.status for answer in await asyncio.gather(*asked)}
            assert statuses <= {201, 503}
            assert (await speaker.poll(web, "j")).warning == ""
            assert (await speaker.say(web, "j", "on")).warning == ""
            await admin.execute(f"alter role {ROLE} connection limit -1")


async def test_keys_are_not_guessed_faster_while_redis_cannot_write(start_web, database, tmp_path):
    what = "Redis is out of memory"
    async with stores_for(what, database, tmp_path) as stores, connected(stores.database) as admin:
        web = await start_web(**stores.environment)
        async with speaking("jw_" + "y" * 43) as speaker:
            await speaker.poll(web, "j")
            async with TROUBLES[what](stores):
                guesses = [{"X-API-Key": f"jw_{number:043}"} for number in range(60)]
                answers = [(await speaker.ask(web, "GET", "/jobs/j", headers=guess)).status for guess in guesses]
                right = await make_key(stores.database, "acme")
                guessed = await speaker.ask(web, "GET", "/jobs/j", headers={"X-API-Key": right})
                assert answers.index(429) <= 30
                assert set(answers[answers.index(429) :]) == {429}
                assert guessed.status == 429, "also the right one: nobody looks it up any more"
            assert await admin.fetchval("select count(*) from keys") == 1
