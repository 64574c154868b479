"""Real servers for every test: one throw-away Postgres and one Redis per session, a database of its own per test."""

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, settings
from playwright.async_api import Browser
from redis import Redis

from service.embedded import Server, start_postgres, start_redis
from service.hub import Hub
from service.identity import READ, WRITE
from service.limiting.policies import POLICIES, UNLIMITED
from service.polling.operation import Waiting
from service.serving import make_runner
from service.settings import Settings
from service.stores.connections import Postgres
from service.stores.event_channel import EventChannel
from service.stores.key_memory import KeyMemory
from service.stores.key_table import KeyTable
from service.stores.migrate import migrate
from tests.browser import find_chromium, started
from tests.document import Judged, judge_of
from tests.web_process import WebProcess

SECRET = "a-secret-of-the-tests-with-32-characters"
FOREIGN = Path(__file__).parent / "foreign"
SKIPS_ARE_FAILURES = "JOBWIRE_TESTS_SKIP_NOTHING"

settings.register_profile("tests", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("tests")


def pytest_report_header() -> str:
    return f"servers: real, embedded; skips {'fail' if os.environ.get(SKIPS_ARE_FAILURES) else 'are listed'}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and os.environ.get(SKIPS_ARE_FAILURES) and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Postgres that forgets everything when the session ends."""
    folder = _fast_folder(tmp_path_factory)
    server = start_postgres(folder, durable=False)
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _fast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In memory where there is room: a database per test is copied file by file."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * 2**30:
        return Path(tempfile.mkdtemp(prefix="jobwire-tests-", dir=memory))
    return tmp_path_factory.mktemp("postgres")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Redis that forgets everything when the session ends."""
    server = start_redis(tmp_path_factory.mktemp("redis"), durable=False)
    yield server
    server.stop()


@pytest.fixture(scope="session")
async def template(postgres_server: Server) -> str:
    """The name of a migrated database from which each test gets a copy."""
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute("create database template_of_tests")
    await admin.close()
    await migrate(with_database(postgres_server.url, "template_of_tests"))
    return "template_of_tests"


_numbers = itertools.count(1)


@pytest.fixture
async def database(postgres_server: Server, template: str) -> AsyncIterator[str]:
    """The URL of a fresh migrated database."""
    async with fresh_database(postgres_server, template) as url:
        yield url


@asynccontextmanager
async def fresh_database(postgres_server: Server, template: str) -> AsyncIterator[str]:
    """The URL of a copy of `template`, dropped at the end."""
    name = f"test_{next(_numbers)}"
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"create database {name} template {template} strategy file_copy")
    try:
        yield with_database(postgres_server.url, name)
    finally:
        await admin.execute(f"drop database if exists {name} with (force)")
        await admin.close()


@pytest.fixture
async def sql(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection past the service: to look, and to make what only time makes."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


_redis_databases = itertools.cycle(range(1, 15))


@pytest.fixture
def redis_url(redis_server: Server) -> str:
    """A Redis database that no neighbouring test uses, empty."""
    return fresh_redis(redis_server)


def fresh_redis(server: Server) -> str:
    """The URL of an empty Redis database. It is given out again after 13 others."""
    url = re.sub(r"/0$", f"/{next(_redis_databases)}", server.url)
    with Redis.from_url(url) as redis:
        redis.flushdb()
    return url


@pytest.fixture
def service_settings(database: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of a service on fresh stores."""
    for name, value in environment_of(database, redis_url).items():
        monkeypatch.setenv(name, value)
    return Settings.read("DATABASE_URL", "REDIS_URL", "JOBWIRE_SECRETS")


@pytest.fixture
async def key(database: str) -> str:
    """A key of the account `acme` that may read and write, without limits: those are tested for themselves."""
    return await make_key(database, "acme", limits=dict.fromkeys(POLICIES, UNLIMITED))


@pytest.fixture(scope="session")
async def chromium() -> AsyncIterator[Browser]:
    """A real browser of this machine; one for all tests, because it starts slowly."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("there is no Chromium here: on Debian, apt install chromium")
    async with started(executable) as browser:
        yield browser


Client = TestClient[web.Request, web.Application]


@pytest.fixture
async def client(service_settings: Settings, key: str) -> AsyncIterator[Client]:
    """The whole service in this process, with the key already in the client's headers.

    Whatever a test asks through it, the answer must be one that the API document describes.
    """
    judged = Judged()
    server = RunnerServer(make_runner(service_settings))
    async with server, TestClient(server, headers={"X-API-Key": key}, trace_configs=[judged.trace]) as client:
        judged.judge = judge_of(await (await client.get("/openapi.json")).read())
        yield client


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> dict[type, Any]:
    """Parts of the service in this process by their class, once `client` has built it: ask for this one first."""
    parts: dict[type, Any] = {}

    def note(kind: type) -> None:
        build = kind.__init__

        def built(self: Any, *args: Any, **options: Any) -> None:
            parts[kind] = self
            build(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", built)

    for kind in (Waiting, Hub, EventChannel, KeyMemory):
        note(kind)
    return parts


@pytest.fixture
async def start_web(database: str, redis_url: str) -> AsyncIterator[Callable[..., Awaitable[WebProcess]]]:
    """Starts web processes of their own on fresh stores; further environment variables as keyword arguments."""
    started: list[WebProcess] = []

    async def start(**environment: str) -> WebProcess:
        process = await WebProcess.start(environment_of(database, redis_url) | environment)
        started.append(process)
        return process

    yield start
    for process in started:
        await process.stop()


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """What `make install` got from npm for tests/foreign."""
    installed = FOREIGN / "node_modules"
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (installed / ".bin" / "openapi-typescript").exists():
        pytest.skip("`make install` could get nothing from npm; to try again: rm .venv/.foreign")
    return installed


class RunnerServer(TestServer):
    """aiohttp's test server, on the runner that production uses: what aiohttp itself refuses is ours too."""

    def __init__(self, runner: web.AppRunner) -> None:
        super().__init__(runner.app)
        self._service_runner = runner

    async def _make_runner(self, **kwargs: object) -> web.BaseRunner:
        return self._service_runner


def environment_of(database: str, redis_url: str) -> dict[str, str]:
    """What a web process needs in its environment."""
    return {
        "DATABASE_URL": database,
        "REDIS_URL": redis_url,
        "JOBWIRE_SECRETS": SECRET,
        "JOBWIRE_LOG_LEVEL": "warning",
        "JOBWIRE_METRICS_LISTEN": "off",
        "JOBWIRE_DRAIN": "0",
    }


def with_database(url: str, name: str) -> str:
    """`url` with another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def make_key(
    database: str, account: str, scopes: tuple[str, ...] = (READ, WRITE), limits: dict[str, str] | None = None
) -> str:
    """A new key, made as the command line makes it."""
    postgres = Postgres(database, pool_size=1, prepared_statements=False, timeout_s=5)
    await postgres.open()
    try:
        _, key = await KeyTable(postgres).create(account, list(scopes), limits or {}, None)
    finally:
        await postgres.close()
    return key


ROOT = Path(__file__).parent.parent
