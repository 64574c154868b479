"""The command line: what it prints where, its exit codes, and that it never answers with a traceback."""

import asyncio
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import asyncpg
import click
import orjson
import pytest
from click.testing import CliRunner, Result

from service import dev, serving
from service.__main__ import cli
from service.embedded import Server, ServersMissing
from service.settings import Settings
from service.stores.migrate import MIGRATIONS
from tests.conftest import ROOT, SECRET, with_database

KEY = re.compile(r"jw_[A-Za-z0-9_-]{32,}")
PASSWORD = "s3cret-of-the-test"
NO_SERVER = f"postgresql://jobwire:{PASSWORD}@127.0.0.1:1/jobwire"
SETTINGS = ("DATABASE_URL", "DATABASE_DIRECT_URL", "REDIS_URL", "JOBWIRE_SECRETS")

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(database: str) -> Run:
    """Runs a command on a fresh migrated database; returns what it printed."""
    return lambda *arguments: command(*arguments, DATABASE_URL=database)


def command(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli, arguments, prog_name="python -m service")


def refused(result: Result, exit_code: int, *says: str) -> None:
    """Ended with this code and one message on stderr that says all of this."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert PASSWORD not in result.stderr
    assert "Error: " in result.stderr
    for text in says:
        assert text in result.stderr


# Keys


def test_the_key_is_all_there_is_on_stdout(database: str) -> None:
    arguments = ["keys", "create", "--account", "acme", "--scope", "jobs:read", "--expires", "90d"]
    made = subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=os.environ | {"DATABASE_URL": database},
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    assert KEY.fullmatch(made.stdout.removesuffix("\n"))
    assert made.stdout.count("\n") == 1
    assert "Account acme is new." in made.stderr
    assert re.search(r"Key key_[0-9a-f]{12} of account acme: jobs:read, expires in 90d\.", made.stderr)
    assert made.stdout.strip() not in made.stderr


def test_keys_are_made_listed_and_revoked(run: Run) -> None:
    created = run("keys", "create", "--account", "acme", "--limit", "poll=1000/60", "--limit", "list=none")
    assert created.exit_code == 0
    assert KEY.fullmatch(created.stdout.strip())
    second = run("keys", "create", "--account", "acme", "--scope", "admin", "--scope", "admin", "--expires", "1h")
    assert "is new" not in second.stderr
    run("keys", "create", "--account", "other")

    first, timed, other = map(orjson.loads, run("keys", "list", "--json").stdout.splitlines())
    assert first["scopes"] == ["jobs:read", "jobs:write"]
    assert first["limits"] == {"poll": "1000/60", "list": "none"}
    assert first["expires_at"] is first["revoked_at"] is None
    assert (timed["scopes"], timed["limits"], timed["state"]) == (["admin"], {}, "active")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", timed["expires_at"])
    assert other["account"] == "other"

    revoked = run("keys", "revoke", first["id"], other["id"])
    assert revoked.exit_code == 0
    assert [line.split()[0] for line in revoked.stdout.splitlines()] == [first["id"], other["id"]]
    assert revoked.stdout.count("everywhere within 2 s") == 2
    states = [orjson.loads(line)["state"] for line in run("keys", "list", "--json").stdout.splitlines()]
    assert states == ["revoked", "active", "revoked"]
    assert run("keys", "revoke", first["id"]).exit_code == 0, "again is no harm"


def test_the_table_of_keys_is_aligned(run: Run) -> None:
    run("keys", "create", "--account", "a")
    run("keys", "create", "--account", "a-much-longer-name", "--scope", "admin", "--limit", "bulk=5/1")
    listed = run("keys", "list").stdout.splitlines()
    heads = ("id", "account", "scopes", "created (UTC)", "expires (UTC)", "state", "limits")
    starts = [listed[0].index(head) for head in heads]
    rows = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in listed[1:]]
    assert [(row[1], row[2], *row[4:]) for row in rows] == [
        ("a", "jobs:read,jobs:write", "never", "active", "default"),
        ("a-much-longer-name", "admin", "never", "active", "bulk=5/1"),
    ]
    assert all(re.fullmatch(r"key_[0-9a-f]{12}", row[0]) for row in rows)
    assert all(line[start - 1] == " " for line in listed for start in starts[1:])
    assert len(run("keys", "list", "--account", "a").stdout.splitlines()) == 2


def test_where_there_is_nothing_to_list_stderr_says_so(run: Run) -> None:
    for arguments, says in {
        ("keys", "list"): "There are no keys.",
        ("keys", "list", "--account", "acme"): "Account acme has no keys.",
        ("accounts", "list"): "There are no accounts.",
    }.items():
        result = run(*arguments)
        assert (result.exit_code, result.stdout, result.stderr.strip()) == (0, "", says)
        assert run(*arguments, "--json").output == ""


def test_an_unknown_id_is_told_and_the_others_are_revoked(run: Run) -> None:
    run("keys", "create", "--account", "acme")
    key_id = orjson.loads(run("keys", "list", "--json").stdout)["id"]
    result = run("keys", "revoke", "key_unknown", key_id)
    assert result.exit_code == 1
    assert "There is no key key_unknown." in result.stderr
    assert key_id in result.stdout
    assert orjson.loads(run("keys", "list", "--json").stdout)["state"] == "revoked"


def test_a_key_in_place_of_its_id_is_refused_and_not_repeated(run: Run) -> None:
    key = run("keys", "create", "--account", "acme").stdout.strip()
    result = run("keys", "revoke", key)
    refused(result, 2, "That is a key itself")
    assert key not in result.stderr


@pytest.mark.parametrize(
    "limit", ["poll", "poll=", "poll=10", "poll=0/60", "poll=10/0", "poll=-1/60", "poll=1.5/60", "poll=None", "pol=1/1",
              "poll=10/60 ", "poll=10/60/60", "poll=1e3/60", "=none", "poll=٣/60", "poll=1/999999"]
)  # fmt: skip
def test_a_bad_limit_is_refused(limit: str) -> None:
    result = command("keys", "create", "--account", "acme", "--limit", limit, DATABASE_URL=NO_SERVER)
    refused(result, 2, "--limit", "POLICY=N/SECONDS", "poll bulk list stream write")


def test_a_policy_limited_twice_is_refused() -> None:
    twice = ["--limit", "poll=1/1", "--limit", "poll=none"]
    refused(command("keys", "create", "--account", "acme", *twice, DATABASE_URL=NO_SERVER), 2, "twice")


@pytest.mark.parametrize("span", ["", "90", "d", "0d", "-1d", "1w", "1.5h", "90 d", "36501d", "9999999999d", "1d12h"])
def test_a_bad_duration_is_refused(span: str) -> None:
    result = command("keys", "create", "--account", "acme", "--expires", span, DATABASE_URL=NO_SERVER)
    refused(result, 2, "--expires", repr(span))
    refused(command("accounts", "set", "acme", "--retention", span, DATABASE_URL=NO_SERVER), 2, "--retention")


@pytest.mark.parametrize("name", ["", "Acme", "_acme", "ac me", "a" * 65, "acme\n"])
def test_a_bad_account_name_is_refused(name: str) -> None:
    refused(command("keys", "create", "--account", name, DATABASE_URL=NO_SERVER), 2, "no account name")
    refused(command("accounts", "create", name, DATABASE_URL=NO_SERVER), 2, "no account name")


def test_an_unknown_scope_is_refused() -> None:
    result = command("keys", "create", "--account", "acme", "--scope", "jobs:delete", DATABASE_URL=NO_SERVER)
    refused(result, 2, "--scope", "webhooks:manage")


@pytest.mark.parametrize(("span", "seconds"), [("2d", 172_800), ("12h", 43_200), ("30m", 1_800), ("45s", 45)])
def test_durations(run: Run, database: str, span: str, seconds: int) -> None:
    run("keys", "create", "--account", "acme", "--expires", span)
    assert asyncio.run(lifetime_s(database)) == pytest.approx(seconds, abs=1)


async def lifetime_s(database: str) -> float:
    connection = await asyncpg.connect(database)
    try:
        return float(await connection.fetchval("select extract(epoch from expires_at - created_at) from keys"))
    finally:
        await connection.close()


# Accounts


def test_accounts_are_made_set_and_listed(run: Run) -> None:
    made = run("accounts", "create", "acme")
    assert made.exit_code == 0
    assert "keys create --account acme" in made.stdout
    refused(run("accounts", "create", "acme"), 1, "Account acme exists already.")
    assert "is new" not in run("keys", "create", "--account", "acme").stderr

    for span, shown in {"36h": "36h", "48h": "2d", "90m": "90m", "61s": "61s", "30d": "30d"}.items():
        result = run("accounts", "set", "acme", "--retention", span)
        assert result.exit_code == 0
        assert f"kept for {shown};" in result.stdout
    listed = orjson.loads(run("accounts", "list", "--json").stdout)
    assert (listed["account"], listed["retention_s"], listed["valid_keys"]) == ("acme", 30 * 86_400, 1)
    heads, row = run("accounts", "list").stdout.splitlines()
    assert heads.split()[:2] == ["account", "retention"]
    assert row.split()[:3] == ["acme", "30d", "1"]

    refused(run("accounts", "set", "nobody", "--retention", "7d"), 1, "There is no account nobody.")
    refused(run("accounts", "set", "acme"), 2, "--retention")


# The stores in trouble

STORE_COMMANDS = (
    ("keys", "create", "--account", "acme"),
    ("keys", "list"),
    ("keys", "revoke", "key_000000000000"),
    ("accounts", "create", "acme"),
    ("accounts", "list"),
    ("accounts", "set", "acme", "--retention", "7d"),
)


@pytest.mark.parametrize("arguments", STORE_COMMANDS, ids=" ".join)
def test_every_store_command_says_what_is_wrong(postgres_server: Server, arguments: tuple[str, ...]) -> None:
    without_tables = with_database(postgres_server.url, "postgres")
    refused(command(*arguments, DATABASE_URL=without_tables), 1, "run `python -m service migrate` first")
    refused(command(*arguments, DATABASE_URL=NO_SERVER), 1, "Postgres cannot be used", "Check that it runs")
    refused(command(*arguments), 2, "DATABASE_URL: is needed and not set")


@pytest.mark.parametrize(
    "url", [f"mysql://jobwire:{PASSWORD}@127.0.0.1/x", f"postgresql://jobwire:{PASSWORD}#1@127.0.0.1/x", "acme"]
)
def test_a_url_that_is_not_understood_is_told_without_the_password(url: str) -> None:
    refused(command("keys", "list", DATABASE_URL=url), 2, "DATABASE_URL", "is not understood")
    migrated = command("migrate", DATABASE_URL=url)
    refused(migrated, migrated.exit_code, "is not understood")


def test_a_missing_database_is_named(postgres_server: Server) -> None:
    url = with_database(postgres_server.url, "no_such_database")
    for arguments in (("keys", "list"), ("migrate",)):
        refused(command(*arguments, DATABASE_URL=url), 1, 'database "no_such_database" does not exist')


# migrate, web, dev


@pytest.fixture
def new_database(postgres_server: Server) -> Iterator[str]:
    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(postgres_server.url)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(execute("create database new_to_cli"))
    yield with_database(postgres_server.url, "new_to_cli")
    asyncio.run(execute("drop database new_to_cli with (force)"))


def test_migrate_says_what_it_did(new_database: str) -> None:
    names = sorted(path.name for path in MIGRATIONS.glob("*.sql"))
    result = command("migrate", DATABASE_URL=NO_SERVER, DATABASE_DIRECT_URL=new_database)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [*(f"Applied {name}" for name in names), "The database is up to date."]
    again = command("migrate", DATABASE_URL=new_database, DATABASE_DIRECT_URL="")
    assert again.stdout == "The database is up to date.\n"


def test_migrate_in_trouble() -> None:
    refused(command("migrate"), 2, "DATABASE_URL: is needed and not set")
    refused(command("migrate", "--wait", "0", DATABASE_URL=NO_SERVER), 1, "127.0.0.1:1 did not answer within 0 s")
    refused(command("migrate", "--wait", "-1", DATABASE_URL=NO_SERVER), 2, "--wait")


def test_web_names_every_setting_it_lacks() -> None:
    refused(command("web"), 2, *(f"{name}: is needed" for name in ("DATABASE_URL", "REDIS_URL", "JOBWIRE_SECRETS")))
    refused(command("web", JOBWIRE_PORT="many", REDIS_URL="redis://h"), 2, "JOBWIRE_PORT: Not a valid integer.")


def test_web_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(serving, "run_web", served.append)
    result = command("web", DATABASE_URL="postgresql://d/x", REDIS_URL="redis://r", JOBWIRE_SECRETS=SECRET)
    assert result.exit_code == 0
    assert [(settings.database_url, settings.secrets) for settings in served] == [("postgresql://d/x", (SECRET,))]


def test_dev_needs_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(dev, "run_dev", served.append)
    assert command("dev").exit_code == 0
    assert len(served) == 1


def test_dev_in_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_dev(settings: Settings) -> None:
        raise ServersMissing("No PostgreSQL server was found")

    monkeypatch.setattr(dev, "run_dev", run_dev)
    refused(command("dev"), 1, "No PostgreSQL server was found", "apt install")


def test_an_address_in_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_dev(settings: Settings) -> None:
        raise OSError(errno.EADDRINUSE, "error while attempting to bind on address ('127.0.0.1', 8080)")

    monkeypatch.setattr(dev, "run_dev", run_dev)
    refused(command("dev"), 1, "127.0.0.1", "JOBWIRE_PORT")


# Help


def every_command(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, found in group.commands.items():
        if isinstance(found, click.Group):
            yield from every_command(found, *path, name)
        else:
            yield *path, name


@pytest.mark.parametrize("path", [*every_command(cli)], ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    for flag in ("-h", "--help"):
        shown = command(*path, flag)
        assert shown.exit_code == 0
        assert shown.stdout.startswith(f"Usage: {' '.join(['python -m service', *path])}")
        assert len(shown.stdout.splitlines()[2].strip()) > 20
        assert max(map(len, shown.stdout.splitlines())) <= 100
