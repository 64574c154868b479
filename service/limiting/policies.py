"""The policy table: how many requests of each kind a key, or an address, may make in a rolling window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from service.identity import Caller

UNLIMITED: Final = "none"


@dataclass(frozen=True, slots=True)
class Policy:
    """No more than `most` requests in any window of `window_s` seconds. `name` stands in the headers."""

    name: str
    most: int
    window_s: int

    @property
    def header(self) -> str:
        """The value of RateLimit-Policy."""
        return f'"{self.name}";q={self.most};w={self.window_s}'


POLICIES: Final[Mapping[str, Policy]] = {
    "poll": Policy("poll", 1000, 60),  # one job: its status, result
    "bulk": Policy("bulk", 100, 60),  # many jobs, batches, histories
    "list": Policy("list", 60, 60),  # pages of jobs
    "stream": Policy("stream", 120, 60),  # streams opened
    "write": Policy("write", 6000, 60),  # all else
}
FAILED_KEYS: Final = Policy("failed-keys", 30, 60)
"""Unknown keys from one address."""


def policy_of(caller: Caller, name: str) -> Policy | None:
    """The caller's policy of this name: the key's own or the default; None: unlimited."""
    own = caller.limits.get(name)
    return POLICIES[name] if own is None else _parsed(name, own)


@lru_cache(maxsize=10_000)
def _parsed(name: str, own: str) -> Policy | None:
    """`N/SECONDS` or `none`, as `keys create --limit` has checked it."""
    if own == UNLIMITED:
        return None
    most, _, window_s = own.partition("/")
    return Policy(name, int(most), int(window_s))
