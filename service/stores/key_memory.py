"""The keys that this process has seen lately: answers on the hot path without a question to Postgres.

A key is believed for 300 s after Postgres last confirmed it. `tick` confirms all of them once a second, so in
practice a revoked key is forgotten within a second, and the 300 s count only while Postgres is away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

from service.errors import Unauthorized, Unavailable
from service.identity import Caller, key_hash
from service.stores.key_table import KeyTable

BELIEVED_s: Final = 300.0
"""How long a key stays valid without a word from Postgres."""

UNUSED_s: Final = 600.0
"""A key that nobody used for this long leaves memory; it stays valid and is looked up when it comes back."""

ASKED_AT_ONCE: Final = 2_000
"""Keys in one query of a tick: its answer takes this process about 5 ms, in which no poll is answered."""

CAPACITY: Final = 50_000
"""With this many keys in memory, the one that was found first makes room for a new one."""


class _Entry:
    """A caller, until when it is believed and when it was last used, both on the memory's clock."""

    __slots__ = ("believed_until", "caller", "used_at")

    def __init__(self, caller: Caller, asked_at: float) -> None:
        self.used_at = asked_at
        self.confirm(caller, asked_at)

    def confirm(self, caller: Caller, asked_at: float) -> None:
        """Postgres said so in answer to a question sent at `asked_at`."""
        self.caller = caller
        self.believed_until = asked_at + min(BELIEVED_s, _seconds_left(caller))


class KeyMemory:
    """Callers by the SHA-256 of their key.

    `forgotten`: each is called with the ids of keys that must no longer be served: revoked, expired, or not
    confirmed for 300 s. Keys that merely left memory (unused, or no room) are not among them.
    """

    def __init__(self, table: KeyTable, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds and never runs backwards."""
        self._table = table
        self._clock = clock
        self._entries: dict[bytes, _Entry] = {}
        self._hashes: dict[str, bytes] = {}
        self._lookups: dict[bytes, asyncio.Task[Caller | None]] = {}
        self.forgotten: list[Callable[[list[str]], None]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, key: str) -> Caller | None:
        """Who calls with this key, if memory can tell. Hot path: one SHA-256, one look into a dict."""
        return self._recall(key_hash(key))

    async def find(self, key: str) -> Caller:
        """Who calls with this key, from memory or else from Postgres.

        Raises Unauthorized if Postgres says that there is no such valid key, Unavailable if it is away.
        """
        hash = key_hash(key)
        caller = self._recall(hash) or await asyncio.shield(self._lookup(hash))
        if caller is None:
            raise Unauthorized()
        return caller

    async def find_by_id(self, key_id: str) -> Caller:
        """The caller of a key that is not presented itself, by its public name. Raises as `find` does."""
        hash = self._hashes.get(key_id)
        caller = None if hash is None else self._recall(hash)
        if caller is None:
            asked_at = self._clock()
            found = await self._table.find_by_id(key_id)
            if found is None:
                raise Unauthorized("The key of this ticket is no longer valid.")
            hash, caller = found
            self._remember(hash, _Entry(caller, asked_at))
        return caller

    async def tick(self) -> None:
        """Asks Postgres about all keys in memory and forgets at once those that are no longer valid.

        To be called once a second. While Postgres is away, keys are forgotten when their 300 s are over.
        """
        self._drop_unused()
        hashes = list(self._entries)
        with suppress(Unavailable):
            for start in range(0, len(hashes), ASKED_AT_ONCE):
                self._forget(await self._not_valid(hashes[start : start + ASKED_AT_ONCE]))
        self._forget(self._not_believed())

    def _recall(self, hash: bytes) -> Caller | None:
        entry = self._entries.get(hash)
        now = self._clock()
        if entry is None or now >= entry.believed_until:
            return None
        entry.used_at = now
        return entry.caller

    def _lookup(self, hash: bytes) -> asyncio.Task[Caller | None]:
        """The question to Postgres that is under way for this key, or a new one: callers share its answer."""
        lookup = self._lookups.get(hash)
        if lookup is None:
            lookup = self._lookups[hash] = asyncio.create_task(self._ask(hash))
            lookup.add_done_callback(lambda done: self._looked_up(hash, done))
        return lookup

    def _looked_up(self, hash: bytes, lookup: asyncio.Task[Caller | None]) -> None:
        del self._lookups[hash]
        if not lookup.cancelled():
            lookup.exception()  # all who asked may have hung up: then nobody else takes notice of it

    async def _ask(self, hash: bytes) -> Caller | None:
        asked_at = self._clock()
        caller = await self._table.find(hash)
        if caller is not None:
            self._remember(hash, _Entry(caller, asked_at))
        return caller

    def _remember(self, hash: bytes, entry: _Entry) -> None:
        if len(self._entries) >= CAPACITY and hash not in self._entries:
            self._drop(next(iter(self._entries)))
        self._entries[hash] = entry
        self._hashes[entry.caller.key_id] = hash

    def _drop(self, hash: bytes) -> _Entry | None:
        entry = self._entries.pop(hash, None)
        if entry is not None:
            self._hashes.pop(entry.caller.key_id, None)
        return entry

    def _drop_unused(self) -> None:
        unused_since = self._clock() - UNUSED_s
        for hash in [hash for hash, entry in self._entries.items() if entry.used_at <= unused_since]:
            self._drop(hash)

    async def _not_valid(self, asked: list[bytes]) -> list[bytes]:
        """Those that Postgres does not confirm."""
        asked_at = self._clock()
        valid = await self._table.still_valid(asked)
        for hash, caller in valid.items():
            if entry := self._entries.get(hash):
                entry.confirm(caller, asked_at)
        return [hash for hash in asked if hash not in valid]

    def _not_believed(self) -> list[bytes]:
        now = self._clock()
        return [hash for hash, entry in self._entries.items() if now >= entry.believed_until]

    def _forget(self, hashes: list[bytes]) -> None:
        key_ids = [entry.caller.key_id for hash in hashes if (entry := self._drop(hash))]
        if key_ids:
            for hear in self.forgotten:
                hear(key_ids)


def _seconds_left(caller: Caller) -> float:
    """Until the key expires, by this machine's clock; Postgres, asked each second, goes by its own."""
    if caller.expires_at is None:
        return float("inf")
    return (caller.expires_at - datetime.now(UTC)).total_seconds()
