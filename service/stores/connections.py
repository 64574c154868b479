"""The pool of connections to Postgres: its errors become ours, its identity and its health are known here."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final

import asyncpg

from service.errors import Locked, ReadOnly, Unavailable

CANCELLING_s: Final = 1.0
"""How long Postgres may take to confirm that it gave up a statement, before we give up the connection."""

AWAY, FULL, READ_ONLY, LOCKED, NOT_MIGRATED = "away", "no_connection_left", "read_only", "locked", "not_migrated"
ERRORS: Final = (AWAY, FULL, READ_ONLY, LOCKED, NOT_MIGRATED)

Connection = asyncpg.pool.PoolConnectionProxy

_UNREACHABLE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.exceptions.ObjectNotInPrerequisiteStateError,  # it is in recovery: a standby, or on its way to be primary
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)
_NOT_MIGRATED = (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.UndefinedColumnError)
_LOCKED = (asyncpg.LockNotAvailableError, asyncpg.exceptions.TransactionRollbackError)

# A process that stands still, or is cut off, must not hold its locks for longer than a moment.
_BEGIN = "begin; set local idle_in_transaction_session_timeout = '2s'"
_IDENTITY = """
select concat_ws(':', system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), d.oid) as identity,
       pg_backend_pid() as pid
from pg_control_system(), pg_database d where d.datname = current_database()
"""
_READ_ONLY = "select current_setting('transaction_read_only')::bool as read_only"
_ARRAYS = "select $1::int[], $2::bigint[], $3::bool[], $4::bytea[], $5::jsonb[]"
"""Every type of our statements that asyncpg does not know by itself."""
_DURABILITY = """
select name from pg_settings where name in ('fsync', 'full_page_writes', 'synchronous_commit') and setting = 'off'
"""


class Postgres:
    """A pool that opens when first used, so that the service starts, and answers from Redis, while Postgres is away.

    `identity` names the cluster, its timeline and the database: it changes when Postgres is restored or fails over.
    `reachable`: it answered the last statement; `writable`: it took the last change. `errors` counts what was not
    answered, by reason: one of ERRORS.
    """

    def __init__(self, url: str, *, pool_size: int, prepared_statements: bool, timeout_s: float) -> None:
        self._url = url
        self._pool_size = pool_size
        self._prepared_statements = prepared_statements
        self._timeout_s = timeout_s
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self.identity = ""
        self.reachable = False
        self.writable = True
        self.errors: Counter[str] = Counter()
        self.on_identity: list[Callable[[str], None]] = []

    async def open(self) -> None:
        """Makes the pool; connects nowhere yet."""
        self._pool = await asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=self._pool_size,
            # Behind a transaction pooler a prepared statement may be on another server connection.
            statement_cache_size=100 if self._prepared_statements else 0,
            command_timeout=self._timeout_s,
            timeout=self._timeout_s,
            max_inactive_connection_lifetime=300,
            init=self._learn,
            reset=_keep_as_it_is,
            server_settings={"application_name": "jobwire"},
        )

    async def close(self) -> None:
        """Closes the pool; statements still running get two seconds."""
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(2):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection[asyncpg.Record]]:
        """One connection. Raises Unavailable for everything that is Postgres's trouble and not the statement's."""
        assert self._pool is not None, "open() comes first"
        with self._as_our_errors():
            connection = await self._pool.acquire(timeout=self._timeout_s)
            try:
                yield connection
                self.reachable = True
            finally:
                with suppress(Exception):  # then the pool lets it go; what happened to the statement is what counts
                    await self._pool.release(connection, timeout=CANCELLING_s)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection[asyncpg.Record]]:
        """One connection inside a transaction."""
        async with self.connection() as connection:
            await connection.execute(_BEGIN)
            try:
                yield connection
            except BaseException as error:
                await _give_up(connection, is_silent=isinstance(error, TimeoutError))
                raise
            await connection.execute("commit")
            self.writable = True

    async def fetch(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """All rows of one statement."""
        async with self.connection() as connection:
            return await connection.fetch(statement, *values)

    async def fetchrow(self, statement: str, *values: Any) -> asyncpg.Record | None:
        """The first row of one statement, or None."""
        async with self.connection() as connection:
            return await connection.fetchrow(statement, *values)

    async def execute(self, statement: str, *values: Any) -> None:
        """One statement whose rows do not matter."""
        async with self.connection() as connection:
            await connection.execute(statement, *values)

    @property
    def connections(self) -> int:
        """How many there are at the moment."""
        return self._pool.get_size() if self._pool is not None else 0

    async def check(self) -> None:
        """Raises ReadOnly if it answers and takes no changes, Unavailable if it does not answer."""
        row = await self.fetchrow(_READ_ONLY)
        self.writable = row is not None and not row["read_only"]
        if not self.writable:
            raise ReadOnly()

    async def weak_durability(self) -> list[str]:
        """The settings with which an acknowledged report could be lost in a crash of the server; empty is good."""
        return [row["name"] for row in await self.fetch(_DURABILITY)]

    async def _learn(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Who answers on a new connection."""
        said = await connection.fetchrow(_IDENTITY)
        assert said is not None
        if not self._prepared_statements:
            await _learn_types(connection)
        elif said["pid"] != connection.get_server_pid():
            # A transaction pooler would let us run, by its name, what another process has prepared.
            raise Unavailable("A pooler stands before Postgres: set JOBWIRE_PREPARED_STATEMENTS=false.")
        self._is(str(said["identity"]))

    def _is(self, identity: str) -> None:
        if identity != self.identity:
            self.identity = identity
            for hear in self.on_identity:
                hear(identity)

    @contextmanager
    def _as_our_errors(self) -> Iterator[None]:
        try:
            yield
        except _LOCKED as error:  # asked first: to asyncpg a lock is also a prerequisite state
            self.errors[LOCKED] += 1
            raise Locked() from error
        except asyncpg.exceptions.ReadOnlySQLTransactionError as error:
            self.writable = False
            self.errors[READ_ONLY] += 1
            raise ReadOnly() from error
        except asyncpg.TooManyConnectionsError as error:
            self.reachable = self.reachable and self.connections > 0  # those go on answering
            self.errors[FULL] += 1
            raise Unavailable("Postgres has no connection left for this service at the moment.") from error
        except _UNREACHABLE as error:
            if isinstance(error, ValueError):  # asyncpg's word for a value that does not fit: our fault, not Postgres's
                raise
            self.reachable = False
            self.errors[AWAY] += 1
            raise Unavailable() from error
        except _NOT_MIGRATED as error:
            self.errors[NOT_MIGRATED] += 1
            raise Unavailable("The database lacks our tables: run `python -m service migrate` first.") from error


async def _give_up(connection: Connection[asyncpg.Record], *, is_silent: bool) -> None:
    """Nothing is committed. Where no rollback gets through Postgres does it, for a lost client.

    What fails here must not take the place of what went wrong: a cancelled task has to end.
    """
    if not is_silent:
        with suppress(Exception):  # the session is gone, or has become silent
            await connection.execute("rollback")
            return
    with suppress(Exception):  # the pool may have let it go already
        connection.terminate()


async def _learn_types(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Asks for types once and inside a transaction that is rolled back.

    asyncpg asks when it meets one, and switches `jit` off for the session meanwhile: behind a transaction pooler that
    would be somebody else's session, and it would stay off there.
    """
    learning = connection.transaction()
    await learning.start()
    try:
        await connection.fetchrow(_ARRAYS, [], [], [], [], [])
    finally:
        await learning.rollback()


async def _keep_as_it_is(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """No session state is ever set, so nothing is reset: one round trip less, and transaction poolers agree."""
