"""The command line: `python -m service web | migrate | dev | keys | accounts`.

What a person can mend ends as one message on stderr that says what to do, never as a traceback: exit code 2
for wrong settings and wrong usage, 1 for the rest.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import click
import orjson

from service.errors import Unavailable
from service.identity import KEY_PREFIX, READ, SCOPES, WRITE
from service.settings import BadSettings, Settings
from service.stores.account_table import ACCOUNT_NAME, Account, AccountTable
from service.stores.connections import Postgres
from service.stores.key_table import KeyTable, ListedKey
from service.stores.migrate import MigrationFailed, migrate

T = TypeVar("T")

POLICIES: Final = ("poll", "bulk", "list", "stream", "write")
LONGEST_DAYS: Final = 36_500
UNITS: Final = {
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
}

_DURATION = re.compile(r"([1-9][0-9]{0,9})([dhms])")
_LIMIT = re.compile(r"([a-z]+)=(none|[1-9][0-9]{0,8}/[1-9][0-9]{0,4})")


class Refused(click.ClickException):
    """The environment says something wrong, or too little."""

    exit_code = 2


class Commands(click.Group):
    """Commands whose errors end as one message."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except BadSettings as error:
            raise Refused(str(error)) from error
        except MigrationFailed as error:
            raise click.ClickException(str(error)) from error
        except Unavailable as error:
            raise click.ClickException(_explained(error)) from error
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                raise click.ClickException(f"{error}. Check the folder, host or address that it names.") from error
            advice = "Set JOBWIRE_HOST and JOBWIRE_PORT to an address that is free on this machine."
            raise click.ClickException(f"{error.strerror}. {advice}") from error


def _explained(error: Unavailable) -> str:
    cause = error.__cause__
    if cause is None or error.detail != Unavailable().detail:
        return error.detail
    reason = str(cause) or type(cause).__name__
    return f"Postgres cannot be used ({reason}). Check that it runs, and what DATABASE_URL says of it."


# What is written after an option


def duration(text: str) -> timedelta:
    """From 90d, 12h, 30m or 45s."""
    written = _DURATION.fullmatch(text)
    if not written:
        raise click.BadParameter(f"{text!r} is no duration: write a whole number and d, h, m or s, such as 90d.")
    number, unit = int(written[1]), UNITS[written[2]]
    if number > timedelta(days=LONGEST_DAYS) / unit:
        raise click.BadParameter(f"{text!r} is longer than {LONGEST_DAYS}d.")
    return number * unit


def limit(text: str) -> tuple[str, str]:
    """From POLICY=N/SECONDS or POLICY=none: the policy and the rest."""
    written = _LIMIT.fullmatch(text)
    if not written or written[1] not in POLICIES:
        raise click.BadParameter(
            f"{text!r} is no limit: write POLICY=N/SECONDS, such as poll=1000/60, or POLICY=none. "
            f"POLICY is one of {' '.join(POLICIES)}; N and SECONDS are whole numbers from 1."
        )
    return written[1], written[2]


def account_name(text: str) -> str:
    """A name that the table accepts."""
    if not ACCOUNT_NAME.fullmatch(text):
        raise click.BadParameter(
            f"{text!r} is no account name: write up to 64 of a-z 0-9 _ . - with a letter or digit first."
        )
    return text


# The commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Jobwire tells clients how their jobs are doing.

    \b
    On one machine, to look around:   python -m service dev
    With servers of your own:         python -m service migrate
                                      python -m service keys create --account acme
                                      python -m service web

    Settings are environment variables, explained in README.md.
    """


@cli.command()
def web() -> None:
    """Answer clients over HTTP, until SIGTERM or Ctrl-C.

    Needs DATABASE_URL, REDIS_URL and JOBWIRE_SECRETS, and a database that `migrate` has brought up to date.
    Listens on JOBWIRE_HOST (127.0.0.1) and JOBWIRE_PORT (8080).
    """
    settings = Settings.read("DATABASE_URL", "REDIS_URL", "JOBWIRE_SECRETS")
    from service.serving import run_web  # here, because no other command needs the server's parts

    run_web(settings)


@cli.command()
def dev() -> None:
    """Run everything on this machine, with a private Postgres and Redis.

    Needs no settings. Data stays in JOBWIRE_DATA (.data). DATABASE_URL and REDIS_URL are used where they are
    set.
    """
    settings = Settings.read()
    from service.dev import run_dev  # here, because production has no use for it
    from service.embedded import ServerFailed, ServersMissing

    try:
        run_dev(settings)
    except (ServerFailed, ServersMissing) as error:
        raise click.ClickException(str(error)) from error


@cli.command("migrate")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="How long Postgres may take to come up.",
)
def migrate_database(wait_s: float) -> None:
    """Bring the database up to date.

    Needs DATABASE_URL, or DATABASE_DIRECT_URL where the first leads to a transaction pooler. Safe to repeat, and
    to run on several machines at once: one works, the others wait for it.
    """
    settings = Settings.read()
    url = settings.database_direct_url or settings.database_url or Settings.read("DATABASE_URL").database_url
    applied = asyncio.run(migrate(url, wait_s=wait_s))
    for name in applied:
        click.echo(f"Applied {name}")
    click.echo("The database is up to date.")


@cli.group()
def keys() -> None:
    """Make, list and revoke API keys. Needs DATABASE_URL."""


@keys.command("create")
@click.option("--account", type=account_name, required=True, help="Whose key it is; made if it is new.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=(READ, WRITE),
    show_default=True,
    help="What it may do; may be repeated.",
)
@click.option(
    "--limit",
    "limits",
    type=limit,
    multiple=True,
    metavar="POLICY=N/SECONDS|POLICY=none",
    help=f"A rate limit other than the default; may be repeated. Policies: {' '.join(POLICIES)}.",
)
@click.option(
    "--expires", type=duration, metavar="90d|12h|30m|45s", help="When it ends by itself; never, if not given."
)
def create_key(
    account: str, scopes: Sequence[str], limits: Sequence[tuple[str, str]], expires: timedelta | None
) -> None:
    """Make an API key. It is shown once, as the only line on stdout.

    \b
    For a worker and its clients:  keys create --account acme
    For a dashboard, for a while:  keys create --account acme --scope jobs:read --expires 90d
    For a service of your own:     keys create --account acme --limit poll=none
    """
    scopes, by_policy = list(dict.fromkeys(scopes)), dict(limits)
    if len(by_policy) < len(limits):
        raise click.UsageError("--limit names a policy twice.")

    async def create(postgres: Postgres) -> tuple[bool, str, str]:
        is_new = await AccountTable(postgres).create(account)
        return is_new, *await KeyTable(postgres).create(account, scopes, by_policy, expires)

    is_new, key_id, key = _in_postgres(create)
    if is_new:
        click.echo(f"Account {account} is new.", err=True)
    ends = f"expires in {_short(expires)}" if expires else "does not expire"
    what = ", ".join([*scopes, *_written(by_policy), ends])
    click.echo(f"Key {key_id} of account {account}: {what}.", err=True)
    click.echo("Keep the key itself, it is shown only now:", err=True)
    click.echo(key)


@keys.command("list")
@click.option("--account", type=account_name, help="Only this account's keys.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_keys(account: str | None, as_json: bool) -> None:
    """List keys, oldest first, with their state: active, expired or revoked."""
    listed = _in_postgres(lambda postgres: KeyTable(postgres).list(account))
    if as_json:
        _print_json([_key_fields(key) for key in listed])
    elif listed:
        heads = ("id", "account", "scopes", "created (UTC)", "expires (UTC)", "state", "limits")
        _print_table(heads, [_key_cells(key) for key in listed])
    else:
        click.echo(f"Account {account} has no keys." if account else "There are no keys.", err=True)


@keys.command("revoke")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def revoke_keys(ids: Sequence[str]) -> None:
    """End keys for good; ID is what `keys list` shows. Every process refuses them within 2 seconds."""
    if any(key_id.startswith(KEY_PREFIX) for key_id in ids):
        raise click.UsageError("That is a key itself. Name its id (key_...), which `keys list` shows.")

    async def revoke(postgres: Postgres) -> dict[str, bool]:
        table = KeyTable(postgres)
        return {key_id: await table.revoke(key_id) for key_id in ids}

    outcomes = _in_postgres(revoke)
    for key_id in (key_id for key_id, was_there in outcomes.items() if was_there):
        click.echo(f"{key_id} is revoked: refused everywhere within 2 s, its open streams end within 5 s.")
    unknown = [key_id for key_id, was_there in outcomes.items() if not was_there]
    if unknown:
        raise click.ClickException(f"There is no key {', '.join(unknown)}. `keys list` shows the ids.")


@cli.group()
def accounts() -> None:
    """Make and list accounts, and set how long their jobs are kept. Needs DATABASE_URL."""


@accounts.command("create")
@click.argument("name", type=account_name)
def create_account(name: str) -> None:
    """Make an account. (`keys create` makes it too.)"""
    if not _in_postgres(lambda postgres: AccountTable(postgres).create(name)):
        raise click.ClickException(f"Account {name} exists already.")
    click.echo(f"Account {name} is made. Give it a key: python -m service keys create --account {name}")


@accounts.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_accounts(as_json: bool) -> None:
    """List accounts, how long each keeps finished jobs, and how many valid keys it has."""
    listed = _in_postgres(lambda postgres: AccountTable(postgres).list())
    if as_json:
        _print_json([_account_fields(account) for account in listed])
    elif listed:
        _print_table(("account", "retention", "valid keys", "created (UTC)"), [_account_cells(row) for row in listed])
    else:
        click.echo("There are no accounts.", err=True)


@accounts.command("set")
@click.argument("name", type=account_name)
@click.option(
    "--retention",
    type=duration,
    required=True,
    metavar="7d|12h|...",
    help="How long jobs are kept after they have finished.",
)
def set_account(name: str, retention: timedelta) -> None:
    """Change what holds for an account."""
    if not _in_postgres(lambda postgres: AccountTable(postgres).set_retention(name, retention)):
        raise click.ClickException(f"There is no account {name}. `accounts list` shows those that exist.")
    click.echo(
        f"Jobs of {name} that finish from now on are kept for {_short(retention)}; "
        "those that have finished already keep their date."
    )


# Asking Postgres


def _in_postgres(work: Callable[[Postgres], Awaitable[T]]) -> T:
    return asyncio.run(_with_postgres(Settings.read("DATABASE_URL"), work))


async def _with_postgres(settings: Settings, work: Callable[[Postgres], Awaitable[T]]) -> T:
    postgres = Postgres(
        settings.database_url,
        pool_size=1,
        prepared_statements=settings.prepared_statements,
        timeout_s=settings.database_timeout_s,
    )
    await postgres.open()
    try:
        await _connect(postgres)
        return await work(postgres)
    finally:
        await postgres.close()


async def _connect(postgres: Postgres) -> None:
    try:
        async with postgres.connection():
            pass
    except (ValueError, OverflowError):  # whose text may hold a piece of the password: not shown
        raise BadSettings(
            "DATABASE_URL is not understood. It is written postgresql://user:password@host:5432/name, "
            "and the special characters of the password as %XX."
        ) from None


# Showing


def _key_fields(key: ListedKey) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "account": key.account,
        "scopes": key.scopes,
        "limits": key.limits,
        "created_at": _instant(key.created_at),
        "expires_at": key.expires_at and _instant(key.expires_at),
        "revoked_at": key.revoked_at and _instant(key.revoked_at),
        "state": key.state,
    }


def _key_cells(key: ListedKey) -> list[str]:
    expires = _minute(key.expires_at) if key.expires_at else "never"
    limits = " ".join(_written(key.limits)) or "default"
    return [
        key.key_id,
        key.account,
        ",".join(key.scopes),
        _minute(key.created_at),
        expires,
        key.state,
        limits,
    ]


def _account_fields(account: Account) -> dict[str, Any]:
    return {
        "account": account.name,
        "retention_s": int(account.retention.total_seconds()),
        "valid_keys": account.valid_keys,
        "created_at": _instant(account.created_at),
    }


def _account_cells(account: Account) -> list[str]:
    return [account.name, _short(account.retention), str(account.valid_keys), _minute(account.created_at)]


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        click.echo(orjson.dumps(row))


def _written(limits: Mapping[str, str]) -> list[str]:
    return [f"{policy}={value}" for policy, value in sorted(limits.items())]


def _short(span: timedelta) -> str:
    """As it is written on the command line, in the largest unit that fits: 90d, 36h."""
    unit = next((unit for unit, length in UNITS.items() if not span % length), "s")
    return f"{span // UNITS[unit]}{unit}"


def _instant(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _minute(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}"


if __name__ == "__main__":
    cli(prog_name="python -m service")
