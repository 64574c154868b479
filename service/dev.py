"""`python -m service dev`, which is `make run`: everything on one machine, with a private real Postgres and Redis."""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import uvloop

from service.embedded import start_postgres, start_redis
from service.identity import READ, WRITE, key_hash
from service.serving import configure_logging, serve
from service.settings import Settings
from service.stores.connections import Postgres
from service.stores.key_table import KeyTable
from service.stores.migrate import migrate

DEMO_ACCOUNT: Final = "demo"
KEY_FILE: Final = "demo.key"
SECRETS_FILE: Final = "secrets"


def run_dev(settings: Settings) -> None:
    """Serves until Ctrl-C. Data stays in `settings.data_folder`; servers that the environment names are used."""
    configure_logging(settings.log_level)
    folder = settings.data_folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as servers:
        settings = _with_servers(settings, servers)
        kept = settings.secrets or (_kept(folder / SECRETS_FILE, secrets.token_hex(32)),)
        settings = replace(settings, secrets=kept, drain_s=0)  # nobody else takes over
        uvloop.run(_run(settings, folder))


async def _run(settings: Settings, folder: Path) -> None:
    await migrate(settings.database_direct_url)
    key = await _demo_key(settings, folder / KEY_FILE)
    await serve(settings, on_ready=lambda url: print(_welcome(url, key, folder), flush=True))


def _with_servers(settings: Settings, servers: ExitStack) -> Settings:
    """Starts what the environment does not name, beside the data folder of this project."""
    if not settings.database_url:
        print("starting Postgres ...", flush=True)
        postgres = start_postgres(settings.data_folder / "postgres", durable=True)
        servers.callback(postgres.stop)
        settings = replace(settings, database_url=postgres.url, database_direct_url=postgres.url)
    if not settings.redis_url:
        print("starting Redis ...", flush=True)
        redis = start_redis(settings.data_folder / "redis", durable=True)
        servers.callback(redis.stop)
        settings = replace(settings, redis_url=redis.url)
    return settings


async def _demo_key(settings: Settings, file: Path) -> str:
    """The key of the demo account: the one of the last run if it is still valid, else a new one."""
    postgres = Postgres(
        settings.database_url, pool_size=2, prepared_statements=False, timeout_s=settings.database_timeout_s
    )
    await postgres.open()
    try:
        keys = KeyTable(postgres)
        if file.exists() and await keys.find(key_hash(file.read_text().strip())):
            return file.read_text().strip()
        _, key = await keys.create(DEMO_ACCOUNT, [READ, WRITE], {}, None)
    finally:
        await postgres.close()
    file.unlink(missing_ok=True)
    return _kept(file, key)


def _kept(file: Path, value: str) -> str:
    """The content of `file`, which nobody else may read; `value` where it is new."""
    if file.exists() and not file.read_text().strip():  # the machine went down before it was written
        file.unlink()
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return file.read_text().strip()
    with os.fdopen(descriptor, "w") as handle:
        handle.write(value + "\n")
    return value


def _welcome(url: str, key: str, folder: Path) -> str:
    return f"""
ready {url}
key   {key}   (account {DEMO_ACCOUNT}, kept in {folder / KEY_FILE})

Try it in another terminal:
  KEY={key}
  curl -s {url}/jobs -H "X-API-Key: $KEY" -H 'Content-Type: application/json' \\
       -d '{{"id":"hello","type":"extraction","pdf_name":"report.pdf"}}'
  curl -s -X PATCH {url}/jobs/hello -H "X-API-Key: $KEY" -H 'Content-Type: application/json' \\
       -d '{{"status":"PROCESSING","progress":{{"percentage":40,"message":"page 4 of 10"}}}}'
  curl -s {url}/jobs/hello -H "X-API-Key: $KEY"

Data stays in {folder}. Ctrl-C stops everything.
"""
