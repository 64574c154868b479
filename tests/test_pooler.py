"""Postgres behind PgBouncer in transaction mode, as a plain role, as on Supabase: nothing belongs to a session."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from service.embedded import Server, start_postgres, start_redis
from service.limiting.policies import POLICIES, UNLIMITED
from service.stores.connections import Postgres
from service.stores.migrate import migrate
from service.stores.queries import load
from tests.conftest import environment_of, make_key, with_database
from tests.own_servers import connected
from tests.pgbouncer import PROGRAM, PgBouncer
from tests.predicates import is_taken
from tests.speaker import speaking, until
from tests.test_plans import STATEMENTS
from tests.tour import PARTS, Part, Place, WITHIN_s, place_on


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_postgres(tmp_path_factory.mktemp("pooled"), durable=False)
    yield server
    server.stop()


@pytest.fixture(scope="module")
async def direct(server: Server) -> str:
    """Postgres itself, migrated, for a role that owns its database and is nothing more."""
    async with connected(server.url) as superuser:
        await superuser.execute("create role app login createdb")
        await superuser.execute("create database app owner app")
    url = with_database(server.url.replace("jobwire@", "app@"), "app")
    await migrate(url)
    return url


@pytest.fixture(scope="module")
def start_pooler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., PgBouncer]]:
    """Starts poolers before databases."""
    if not Path(PROGRAM).is_file():
        pytest.skip(f"no {PROGRAM}: apt install pgbouncer")
    with ExitStack() as started:

        def start(database: str, **limits: int) -> PgBouncer:
            pooler = PgBouncer(tmp_path_factory.mktemp("pgbouncer"), database, **limits)
            pooler.start()
            started.callback(pooler.stop)
            return pooler

        yield start


@pytest.fixture(scope="module", params=[1, 2], ids=["one connection", "two connections"])
def servers(request: pytest.FixtureRequest) -> int:
    """Connections of the pooler to Postgres, for two processes: they wait for it, or meet another each time."""
    return request.param


def behind(pooler: PgBouncer, redis_url: str) -> dict[str, str]:
    """The environment of a process that is to use the pooler."""
    pooled = {"JOBWIRE_PREPARED_STATEMENTS": "false", "JOBWIRE_DATABASE_TIMEOUT": "1"}
    return environment_of(pooler.url, redis_url) | pooled


async def new_key(direct: str) -> str:
    return await make_key(direct, "acme", limits=dict.fromkeys(POLICIES, UNLIMITED))


# The contract


@pytest.fixture(scope="module")
async def place(
    start_pooler: Callable[..., PgBouncer], servers: int, direct: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    """Two processes behind a pooler, on stores of their own."""
    own = with_database(direct, f"app_{servers}")
    async with connected(with_database(direct, "postgres")) as connection:
        await connection.execute(f"create database app_{servers} template app")
    redis = start_redis(tmp_path_factory.mktemp("redis"), durable=False)
    environment = behind(start_pooler(own, servers=servers), redis.url)
    async with place_on(environment, await new_key(own), own) as place:
        yield place
    redis.stop()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
async def test_the_tour(place: Place, part: Part) -> None:
    await part(place)


HELD = """
select pg_backend_pid() as pid,
  (select array_agg(name || ' = ' || setting) from pg_settings where source = 'session'
     and name not in ('application_name', 'client_encoding')) as settings,  -- the pooler looks after these
  (select count(*) from pg_prepared_statements where name <> '') as statements,
  (select count(*) from pg_locks where locktype = 'advisory') as locks,
  (select count(*) from pg_listening_channels()) as channels,
  (select count(*) from pg_class where relpersistence = 't') as tables
"""


async def test_nothing_of_ours_is_left_in_the_sessions_of_the_pooler(place: Place, servers: int) -> None:
    """After the tour, and after every statement that there is was prepared."""
    pooled = place.environment["DATABASE_URL"]
    postgres = Postgres(pooled, pool_size=2, prepared_statements=False, timeout_s=5)
    await postgres.open()
    before = {held["pid"] for held in await sessions_of(pooled, servers)}
    async with postgres.connection() as connection:
        for owner, name in STATEMENTS:
            await connection.prepare(load(owner)[name])
        await connection.fetchval("select 1")  # else the pooler gives the session up, and there is nothing to look at
    await postgres.close()
    sessions = await sessions_of(pooled, servers)
    assert len(before) == servers
    assert {held["pid"] for held in sessions} == before, "the sessions in which the tour was"
    nothing = {"settings": None, "statements": 0, "locks": 0, "channels": 0, "tables": 0}
    assert [dict(held) for held in sessions] == [{"pid": held["pid"], **nothing} for held in sessions]


async def sessions_of(pooled: str, servers: int) -> list[asyncpg.Record]:
    """What each session holds, seen from inside; all at the same time, so that none is seen twice."""
    everybody = asyncio.Barrier(servers)

    async def look() -> asyncpg.Record:
        async with sitting_in(pooled) as connection:
            held = await connection.fetchrow(HELD)
            await everybody.wait()
            return held

    return await asyncio.gather(*(look() for _ in range(servers)))


@asynccontextmanager
async def sitting_in(pooled: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else in a transaction: one connection of the pooler is taken."""
    connection = await asyncpg.connect(pooled, statement_cache_size=0)
    try:
        async with connection.transaction():
            await connection.execute("select 1")
            yield connection
    finally:
        await connection.close()


# Trouble


async def test_a_pooler_that_dies_and_comes_back(start_pooler, start_web, direct: str, redis_url: str) -> None:
    pooler = start_pooler(direct, servers=2)
    web = await start_web(**behind(pooler, redis_url))
    async with speaking(await new_key(direct)) as speaker:
        await speaker.create(web, "dies")
        told = await speaker.say(web, "dies", "before")
        assert (await speaker.poll(web, "dies")).version == told.version  # now Redis has it
        pooler.kill()
        for _ in range(3):
            refused = await speaker.report(web, "dies", progress={"message": "nobody hears it"})
            assert (refused.status, refused.headers["Retry-After"]) == (503, "2")
            seen = await speaker.poll(web, "dies")
            assert (seen.status, seen.version, seen.warning) == (200, told.version, "110")
        pooler.start()
        await until(lambda: is_taken(speaker, web, "dies"), WITHIN_s)
        said = await speaker.say(web, "dies", "after")
        assert (await speaker.poll(web, "dies")).version == said.version == told.version + 2


async def test_a_pooler_whose_connections_others_hold(start_pooler, start_web, direct: str, redis_url: str) -> None:
    pooler = start_pooler(direct, servers=2)
    web = await start_web(**behind(pooler, redis_url))
    async with speaking(await new_key(direct)) as speaker:
        await speaker.create(web, "held")
        told = await speaker.say(web, "held", "before")
        assert (await speaker.poll(web, "held")).version == told.version  # now Redis has it
        async with sitting_in(pooler.url), sitting_in(pooler.url):
            refused = await speaker.report(web, "held", progress={"message": "nobody takes it"})
            assert refused.status == 503
            assert "Retry-After" in refused.headers
            seen = await speaker.poll(web, "held")
            assert (seen.status, seen.version, seen.warning) == (200, told.version, "110")
        await until(lambda: is_taken(speaker, web, "held"), WITHIN_s)
        said = await speaker.say(web, "held", "after")
        assert (await speaker.poll(web, "held")).version == said.version == told.version + 2


async def test_a_pooler_that_takes_fewer_clients_than_we_have_connections(
    start_pooler, start_web, direct: str, redis_url: str
) -> None:
    web = await start_web(**behind(start_pooler(direct, servers=1, clients=4), redis_url))
    async with speaking(await new_key(direct)) as speaker, connected(direct) as postgres:
        jobs = [f"crowd-{number}" for number in range(8)]
        for job in jobs:
            await speaker.create(web, job)
        async with postgres.transaction():  # their reports pile up
            await postgres.execute("select from jobs where id like 'crowd-%' for update")
            reports = [
                asyncio.create_task(speaker.ask(web, "PUT", f"/jobs/{job}/result", data=b"x"))
                for job in jobs
                for _ in "ab"
            ]
            await asyncio.sleep(0.5)
        answers = Counter(answer.status for answer in await asyncio.gather(*reports))
        print(answers)
        assert set(answers) <= {200, 503}
        assert answers[503]
        await until(lambda: is_taken(speaker, web, jobs[0]), WITHIN_s)


async def test_a_pooler_of_which_nobody_told_us_is_refused(
    start_pooler, start_web, direct: str, redis_url: str
) -> None:
    """With prepared statements one process would run under a name what another has prepared."""
    pooler = start_pooler(direct, servers=1)
    web = await start_web(**environment_of(pooler.url, redis_url))
    async with speaking(await new_key(direct)) as speaker:
        refused = await speaker.ask(web, "POST", "/jobs", json={"type": "parse"})
    assert refused.status == 503
    assert "JOBWIRE_PREPARED_STATEMENTS=false" in refused.json["detail"]
