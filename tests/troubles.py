"""What may happen to the stores, each as a context: inside it lasts. The service reaches both through proxies."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import Redis

from service.stores.migrate import migrate
from tests.fault_proxy import FaultProxy
from tests.own_servers import OwnServer, connected, own_postgres, own_redis
from tests.speaker import until

ROLE = "jobwire_without_privileges"


@dataclass
class Stores:
    """`database`: the real URL, by which a test looks past the service; the service goes by the proxies."""

    redis: OwnServer
    redis_proxy: FaultProxy
    database: str
    postgres: OwnServer | None
    postgres_proxy: FaultProxy
    replica: OwnServer | None
    replica_link: FaultProxy | None

    @property
    def environment(self) -> dict[str, str]:
        return {"REDIS_URL": self.redis_proxy.url, "DATABASE_URL": self.postgres_proxy.url}

    async def remember(self) -> None:
        """What Redis holds now is what old data, or a replica that lags, will hold when its time has come."""
        self.redis.keep_a_copy()
        if self.replica is not None and self.replica_link is not None:
            await until(self._has_caught_up, 15)
            self.replica_link.freeze()

    async def _has_caught_up(self) -> bool:
        assert self.replica is not None
        async with Redis.from_url(self.redis.url) as primary, Redis.from_url(self.replica.url) as replica:
            there, here = await asyncio.gather(primary.info("replication"), replica.info("replication"))
        return here["master_link_status"] == "up" and here["slave_repl_offset"] == there["master_repl_offset"]


@asynccontextmanager
async def stores_for(what: str, database: str, folder: Path) -> AsyncIterator[Stores]:
    """A Redis, and where the trouble is in the server itself also a Postgres, of one test alone."""
    redis = own_redis(folder, durable=True)
    postgres = own_postgres(folder) if what in OF_A_SERVER else None
    role = ROLE if what in OF_A_ROLE else None
    try:
        if postgres is not None:
            database = postgres.url
            await migrate(database)
        async with (
            own_role(database, role),
            FaultProxy(redis.url) as redis_proxy,
            FaultProxy(as_role(database, role)) as postgres_proxy,
            replica_of(redis, folder / "replica", what in OF_A_REPLICA) as (replica, link),
        ):
            yield Stores(redis, redis_proxy, database, postgres, postgres_proxy, replica, link)
    finally:
        redis.stop()
        if postgres is not None:
            postgres.stop()


@asynccontextmanager
async def replica_of(
    redis: OwnServer, folder: Path, wanted: bool
) -> AsyncIterator[tuple[OwnServer, FaultProxy] | tuple[None, None]]:
    """A real replica of `redis`, and the link between them, which may be frozen."""
    if not wanted:
        yield None, None
        return
    replica = own_redis(folder, durable=False)
    try:
        async with FaultProxy(redis.url) as link, Redis.from_url(replica.url) as admin:
            to_primary = urlsplit(link.url)
            await admin.replicaof(to_primary.hostname, to_primary.port)
            yield replica, link
    finally:
        replica.stop()


@asynccontextmanager
async def own_role(database: str, name: str | None) -> AsyncIterator[None]:
    """A user of the database who is no superuser: those are not held to limits."""
    if name is None:
        yield
        return
    async with connected(database) as admin:
        await admin.execute(f"create role {name} login; grant all on all tables in schema public to {name}")
        await admin.execute(f"grant all on all sequences in schema public to {name}")
        yield
        await admin.execute(END_SESSIONS, name)
        await admin.execute(f"drop owned by {name}; drop role {name}")


END_SESSIONS = "select pg_terminate_backend(pid, 2000) from pg_stat_activity where usename = $1"


def as_role(database: str, name: str | None) -> str:
    parts = urlsplit(database)
    return database if name is None else urlunsplit(parts._replace(netloc=f"{name}@{parts.netloc.rpartition('@')[2]}"))


# Redis


@asynccontextmanager
async def redis_is_down(stores: Stores) -> AsyncIterator[None]:
    stores.redis.kill()
    yield
    await stores.redis.start()


@asynccontextmanager
async def redis_is_frozen(stores: Stores) -> AsyncIterator[None]:
    stores.redis.freeze()
    yield
    stores.redis.thaw()


@asynccontextmanager
async def redis_was_flushed(stores: Stores) -> AsyncIterator[None]:
    async with Redis.from_url(stores.redis.url) as admin:
        await admin.flushall()
    yield


@asynccontextmanager
async def redis_was_restarted_empty(stores: Stores) -> AsyncIterator[None]:
    stores.redis.kill()
    stores.redis.empty()
    await stores.redis.start()
    yield


@asynccontextmanager
async def redis_was_restarted_with_old_data(stores: Stores) -> AsyncIterator[None]:
    stores.redis.kill()
    stores.redis.put_the_copy_back()
    await stores.redis.start()
    yield


@asynccontextmanager
async def redis_failed_over_to_a_replica_that_lagged(stores: Stores) -> AsyncIterator[None]:
    assert stores.replica is not None
    stores.redis.kill()
    async with Redis.from_url(stores.replica.url) as admin:
        await admin.replicaof("NO", "ONE")
    stores.redis_proxy.lead_to(stores.replica.url)
    yield


@asynccontextmanager
async def redis_is_out_of_memory(stores: Stores) -> AsyncIterator[None]:
    async with Redis.from_url(stores.redis.url) as admin:
        await admin.config_set("maxmemory", 1)
        yield
        await admin.config_set("maxmemory", 0)


@asynccontextmanager
async def the_subscription_is_wedged(stores: Stores) -> AsyncIterator[None]:
    async with Redis.from_url(stores.redis.url) as admin:
        await admin.execute_command("ACL", "SETUSER", "default", "-subscribe")
        await admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        yield
        await admin.execute_command("ACL", "SETUSER", "default", "+subscribe")


# Postgres


@asynccontextmanager
async def postgres_is_down(stores: Stores) -> AsyncIterator[None]:
    stores.postgres_proxy.refuse()
    yield
    await stores.postgres_proxy.accept()


@asynccontextmanager
async def postgres_is_frozen(stores: Stores) -> AsyncIterator[None]:
    stores.postgres_proxy.freeze()
    yield
    stores.postgres_proxy.thaw()


@asynccontextmanager
async def postgres_was_restarted(stores: Stores) -> AsyncIterator[None]:
    assert stores.postgres is not None
    stores.postgres.kill()
    await asyncio.sleep(0.6)  # as restarts are: so long that somebody asks meanwhile
    await stores.postgres.start()
    yield


@asynccontextmanager
async def postgres_is_read_only(stores: Stores) -> AsyncIterator[None]:
    """As managed services make it when a disk is full: sessions that begin from now on write nothing."""
    name = urlsplit(stores.database).path.removeprefix("/")
    async with connected(stores.database) as admin:
        await admin.execute(f"alter database {name} set default_transaction_read_only = on")
        stores.postgres_proxy.cut()
        yield
        await admin.execute(f"alter database {name} reset default_transaction_read_only")
        stores.postgres_proxy.cut()


@asynccontextmanager
async def postgres_is_a_standby(stores: Stores) -> AsyncIterator[None]:
    assert stores.postgres is not None
    stores.postgres.kill()
    stores.postgres.make_a_standby()
    await stores.postgres.start()
    yield
    async with connected(stores.database) as admin:
        await admin.execute("select pg_promote()")


@asynccontextmanager
async def postgres_has_no_connection_left(stores: Stores) -> AsyncIterator[None]:
    async with connected(stores.database) as admin:
        await admin.execute(f"alter role {ROLE} connection limit 0")
        await admin.execute(END_SESSIONS, ROLE)
        yield
        await admin.execute(f"alter role {ROLE} connection limit -1")


# Both


@asynccontextmanager
async def both_are_down(stores: Stores) -> AsyncIterator[None]:
    async with redis_is_down(stores), postgres_is_down(stores):
        yield


@asynccontextmanager
async def both_are_frozen(stores: Stores) -> AsyncIterator[None]:
    async with redis_is_frozen(stores), postgres_is_frozen(stores):
        yield


Trouble = Callable[[Stores], AbstractAsyncContextManager[None]]

TROUBLES: dict[str, Trouble] = {
    "Redis is down": redis_is_down,
    "Redis is frozen": redis_is_frozen,
    "Redis was flushed": redis_was_flushed,
    "Redis was restarted, empty": redis_was_restarted_empty,
    "Redis was restarted, with old data": redis_was_restarted_with_old_data,
    "Redis failed over to a replica that lagged": redis_failed_over_to_a_replica_that_lagged,
    "Redis is out of memory": redis_is_out_of_memory,
    "The subscription to Redis is wedged": the_subscription_is_wedged,
    "Postgres is down": postgres_is_down,
    "Postgres is frozen": postgres_is_frozen,
    "Postgres was restarted": postgres_was_restarted,
    "Postgres is read-only": postgres_is_read_only,
    "Postgres is a standby": postgres_is_a_standby,
    "Postgres has no connection left": postgres_has_no_connection_left,
    "Both are down": both_are_down,
    "Both are frozen": both_are_frozen,
}

OF_A_SERVER = ("Postgres was restarted", "Postgres is a standby")
OF_A_ROLE = ("Postgres has no connection left",)
OF_A_REPLICA = ("Redis failed over to a replica that lagged",)
