"""The stores that are supported: the oldest, where Debian has put them, and the newest, as wheels."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis

from service.embedded import OLDEST_POSTGRES, SYSTEM_POSTGRES, start_postgres, start_redis
from service.limiting.policies import POLICIES, UNLIMITED
from service.stores.migrate import MIGRATIONS, find_dbmate, migrate
from tests.conftest import environment_of, make_key, with_database
from tests.own_servers import OwnServer, connected
from tests.predicates import are_ready
from tests.speaker import until
from tests.test_migrate import schema_of
from tests.tour import PARTS, Part, Place, WITHIN_s, both, place_on

SYSTEM_REDIS = Path("/usr/bin/redis-server")


@dataclass
class Stores:
    """Servers of one age. `versions`: what they call themselves."""

    postgres: OwnServer
    redis: OwnServer
    versions: tuple[str, str]


@pytest.fixture(scope="module", params=["oldest", "newest"])
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "oldest":
        binaries, binary = SYSTEM_POSTGRES / str(OLDEST_POSTGRES) / "bin", SYSTEM_REDIS
        versions = (f"{OLDEST_POSTGRES}.", "redis 7.")
        for program, package in ((binaries / "postgres", f"postgresql-{OLDEST_POSTGRES}"), (binary, "redis-server")):
            if not program.is_file():
                pytest.skip(f"no {program}: apt install {package}")
    else:
        binaries, binary, versions = None, None, ("18.", "valkey 9.")
    with ExitStack() as started:
        postgres = OwnServer(lambda port: start_postgres(folder, durable=False, port=port, binaries=binaries))
        started.callback(postgres.stop)
        redis = OwnServer(lambda port: start_redis(folder, durable=False, port=port, binary=binary))
        started.callback(redis.stop)
        yield Stores(postgres, redis, versions)


@pytest.fixture(scope="module")
async def place(stores: Stores) -> AsyncIterator[Place]:
    """Two processes on them."""
    await migrate(stores.postgres.url)
    key = await make_key(stores.postgres.url, "acme", limits=dict.fromkeys(POLICIES, UNLIMITED))
    environment = environment_of(stores.postgres.url, stores.redis.url)
    async with place_on(environment, key, stores.postgres.url) as place:
        yield place


async def test_they_are_of_the_versions_that_are_promised(stores: Stores) -> None:
    async with connected(stores.postgres.url) as connection, Redis.from_url(stores.redis.url) as redis:
        postgres = await connection.fetchval("show server_version")
        said = await redis.info("server")
    cache = f"{said.get('server_name', 'redis')} {said.get('valkey_version', said['redis_version'])}"
    print(f"Postgres {postgres}, {cache}")
    assert postgres.startswith(stores.versions[0])
    assert cache.startswith(stores.versions[1])


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
async def test_the_tour(place: Place, part: Part) -> None:
    await part(place)


async def test_a_redis_that_forgot_its_scripts_and_one_that_was_restarted_empty_are_noticed(
    place: Place, stores: Stores
) -> None:
    await place.create("again")
    assert (await place.other_says("/jobs/again")).version == 1
    async with Redis.from_url(stores.redis.url) as redis:
        await redis.script_flush()
    await place.speaker.say(place.one, "again", "after the scripts had gone")
    assert (await place.other_says("/jobs/again")).version == 2
    stores.redis.kill()
    await place.speaker.say(place.one, "again", "while it is away")
    await stores.redis.start()
    await until(partial(are_ready, place.speaker, both(place)), WITHIN_s)
    assert (await place.other_says("/jobs/again")).version == 3
    said = await place.speaker.say(place.one, "again", "to another life")
    assert (said.warning, (await place.other_says("/jobs/again")).version) == ("", 4)


async def test_migrations_go_up_down_and_up_again(stores: Stores) -> None:
    async with connected(stores.postgres.url) as connection:
        await connection.execute("create database migrated")
    url = with_database(stores.postgres.url, "migrated")
    applied = await migrate(url)
    after_the_first = await schema_of(url)
    assert any("report_jobs" in line for line in after_the_first)
    command = [find_dbmate(), "--no-dump-schema", "--migrations-dir", MIGRATIONS, "--url", f"{url}?sslmode=disable"]
    for _ in applied:
        await asyncio.to_thread(subprocess.run, [*command, "rollback"], check=True, capture_output=True)
    assert [line for line in await schema_of(url) if "schema_migrations" not in line] == []
    assert await migrate(url) == applied
    assert await schema_of(url) == after_the_first
