"""Where Redis listens and who we are there, for every connection that we open ourselves."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from redis.asyncio.connection import SSLConnection, parse_url

Argument = bytes | str | int


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """With `path`, a unix socket's, host and port mean nothing."""

    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None = field(repr=False)
    username: str
    password: str = field(repr=False)
    db: int

    @classmethod
    def read(cls, url: str) -> Self:
        """From redis://, rediss:// or unix://, as redis-py takes it. Raises ValueError for any other."""
        parts: dict[str, Any] = dict(parse_url(url))
        return cls(
            host=parts.get("host", "localhost"),
            port=parts.get("port", 6379),
            path=parts.get("path", ""),
            tls=_tls(parts) if parts.get("connection_class") is SSLConnection else None,
            username=parts.get("username", ""),
            password=parts.get("password", ""),
            db=parts.get("db", 0),
        )

    async def connect(self, protocol: asyncio.Protocol) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        if self.path:
            await loop.create_unix_connection(lambda: protocol, self.path)
        else:
            await loop.create_connection(lambda: protocol, self.host, self.port, ssl=self.tls)

    def introductions(self) -> list[tuple[Argument, ...]]:
        """The commands that must come first."""
        auth = ("AUTH", self.username, self.password) if self.username else ("AUTH", self.password)
        return [*([auth] if self.password else []), *([("SELECT", self.db)] if self.db else [])]


def _tls(parts: Mapping[str, Any]) -> ssl.SSLContext:
    """As redis-py reads `ssl_cert_reqs`, `ssl_ca_certs` and the rest."""
    asked = {name: value for name, value in parts.items() if name.startswith("ssl_")}
    return SSLConnection(**asked).ssl_context.get()
