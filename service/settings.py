"""Every setting of the service, read once from the environment into one frozen value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Final

from environs import Env, EnvValidationError, ValidationError, validate

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
SECRET_LENGTH: Final = 32
LAST_PORT: Final = 65535
OFF: Final = "off"
ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+")


class BadSettings(Exception):
    """Some environment variables are missing or wrong; the message names every one of them."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says. Secrets stay out of repr. Seconds end in `_s`."""

    database_url: str = field(repr=False)
    database_direct_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    host: str
    port: int
    secrets: tuple[str, ...] = field(repr=False)
    prepared_statements: bool
    pool_size: int
    database_timeout_s: float
    redis_deadline_s: float
    memory_entries: int
    memory_bytes: int
    max_streams_per_key: int
    drain_s: float
    trusted_proxies: tuple[str, ...]
    cors_origins: tuple[str, ...]
    access_log: bool
    metrics_listen: tuple[str, int] | None
    log_level: str
    data_folder: Path

    @classmethod
    def read(cls, *required: str) -> Settings:
        """From the process's environment. Raises BadSettings that names everything that is wrong at once.

        `required` names the variables without which the caller cannot work; the others may be empty.
        """
        env = Env(eager=False)
        database_url = env.str("DATABASE_URL", default="", validate=_is_postgres)
        settings = cls(
            database_url=database_url,
            database_direct_url=env.str("DATABASE_DIRECT_URL", default="", validate=_is_postgres) or database_url,
            redis_url=env.str("REDIS_URL", default="", validate=_is_redis),
            host=env.str("JOBWIRE_HOST", default="127.0.0.1", validate=validate.Length(min=1)),
            port=env.int("JOBWIRE_PORT", default=8080, validate=validate.Range(min=0, max=LAST_PORT)),
            secrets=tuple(env.list("JOBWIRE_SECRETS", default=[], validate=_each_is_long) or ()),
            prepared_statements=env.bool("JOBWIRE_PREPARED_STATEMENTS", default=True),
            pool_size=env.int("JOBWIRE_POOL_SIZE", default=16, validate=validate.Range(min=2, max=500)),
            database_timeout_s=env.float("JOBWIRE_DATABASE_TIMEOUT", default=5.0, validate=validate.Range(min=0.1)),
            redis_deadline_s=env.float("JOBWIRE_REDIS_DEADLINE", default=0.1, validate=validate.Range(min=0.01)),
            memory_entries=env.int("JOBWIRE_MEMORY_ENTRIES", default=200_000, validate=validate.Range(min=1)),
            memory_bytes=env.int("JOBWIRE_MEMORY_BYTES", default=256 * 2**20, validate=validate.Range(min=2**20)),
            max_streams_per_key=env.int("JOBWIRE_MAX_STREAMS_PER_KEY", default=100, validate=validate.Range(min=1)),
            drain_s=env.float("JOBWIRE_DRAIN", default=5.0, validate=validate.Range(min=0, max=60)),
            trusted_proxies=tuple(env.list("JOBWIRE_TRUSTED_PROXIES", default=[], validate=_each_is_a_network) or ()),
            cors_origins=tuple(
                env.list("JOBWIRE_CORS_ORIGINS", default=[], subcast=str.strip, validate=_each_is_an_origin) or ()
            ),
            access_log=env.bool("JOBWIRE_ACCESS_LOG", default=False),
            metrics_listen=_address(env.str("JOBWIRE_METRICS_LISTEN", default="127.0.0.1:9464", validate=_is_address)),
            log_level=env.str("JOBWIRE_LOG_LEVEL", default="info", validate=validate.OneOf(LOG_LEVELS)),
            data_folder=Path(env.str("JOBWIRE_DATA", default=".data")),
        )
        _raise_all(env, [name for name in required if not os.environ.get(name)])
        return settings


def _each_is_long(secrets: list[str]) -> None:
    if any(len(secret.strip()) < SECRET_LENGTH for secret in secrets):
        raise ValidationError(f"each secret needs at least {SECRET_LENGTH} characters")


def _address(written: str | None) -> tuple[str, int] | None:
    """host:port, or [IPv6]:port. None: nothing is to be listened on, or it is not understood."""
    host, colon, port = (written or OFF).rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > LAST_PORT:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_address(written: str) -> None:
    if written not in ("", OFF) and _address(written) is None:
        raise ValidationError("is not understood: write host:port such as 127.0.0.1:9464, or off")


def _is_postgres(url: str) -> None:
    if url and not url.startswith(("postgresql://", "postgres://")):
        raise ValidationError("is not understood: it begins with postgresql://")


def _is_redis(url: str) -> None:
    if url and not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValidationError("is not understood: it begins with redis://, rediss:// or unix://")


def _each_is_a_network(written: list[str]) -> None:
    for one in written:
        try:
            ip_network(one.strip())
        except ValueError as error:
            raise ValidationError(f"{error}; write addresses or ranges such as 10.0.0.0/8") from error


def _each_is_an_origin(written: list[str]) -> None:
    """As browsers send them: another spelling would never match."""
    for one in written:
        if one != "*" and not ORIGIN.fullmatch(one):
            raise ValidationError(
                f"{one!r} is no origin; write https://app.example.com, lower case, without a path, or *"
            )


def _raise_all(env: Env, missing: list[str]) -> None:
    wrong = dict.fromkeys(missing, "is needed and not set")
    try:
        env.seal()
    except EnvValidationError as error:
        if isinstance(error.error_messages, Mapping):
            wrong |= {name: " ".join(messages) for name, messages in error.error_messages.items()}
    if wrong:
        lines = [f"  {name}: {reason}" for name, reason in sorted(wrong.items())]
        raise BadSettings("\n".join(["These environment variables need mending (see Settings in README.md):", *lines]))
