"""Ready answers in Redis, and the rules by which no poll is older than the last acknowledged report.

A status key holds nothing, a lease, or an entry (the three Lua files say how it is written and what may
happen to it). An entry belongs to a life: one shape of answers, one run of Redis, one Postgres. Entries of
another life are misses, because their versions cannot be compared with ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from service.errors import RedisAway
from service.stores.keys import (
    ABSENCE_LIFETIME_ms,
    ENTRY_LIFETIME_ms,
    LEASE_LIFETIME_ms,
    UNVERIFIED_AFTER_ms,
    status_key,
)
from service.stores.ready import ANSWER_SHAPE, Absence, JobKey, Ready, ReadyAnswer, decode_ready, version_of
from service.stores.redis_address import Argument
from service.stores.redis_pipe import RedisError, RedisPipe, Script

PUT_TRIES_FOR_s: Final = 0.5
"""How long a writer tries to tell Redis before it acknowledges with a warning instead."""

CONFIRMED_FOR_s: Final = 1.0
"""The relay looks four times a second for changes that were not told within one: a second later they are two old."""

MOST_READS: Final = 1_000
MOST_CHANGES: Final = 100
"""Keys in one script call: Redis does nothing else meanwhile (about 0.7 us a read, 5 us a change)."""

LIFE_LENGTH: Final = 8
VERSION_DIGITS: Final = 15

_SCRIPTS: Final = Path(__file__).parent
READ_IF_NEWER: Final = Script.load(_SCRIPTS / "status_cache.read_if_newer.lua")
PUT: Final = Script.load(_SCRIPTS / "status_cache.put.lua")
FILL: Final = Script.load(_SCRIPTS / "status_cache.fill.lua")

_Item = TypeVar("_Item")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class NothingNewer:
    """What is held is the newest."""


@dataclass(frozen=True, slots=True)
class Newer:
    """Something newer than what is held, or an absence."""

    ready: Ready


@dataclass(frozen=True, slots=True)
class Miss:
    """Postgres knows. With a `lease`, fill in what is read there; without, another reader will."""

    lease: str | None


@dataclass(frozen=True, slots=True)
class Unverified:
    """Read Postgres first and `verify`; should it be away, this is the best there is (None: what is held)."""

    ready: Ready | None


Reading = NothingNewer | Newer | Miss | Unverified

NOTHING_NEWER: Final = NothingNewer()
MISS_OF_ANOTHER: Final = Miss(None)
UNVERIFIED_AS_HELD: Final = Unverified(None)


@dataclass(frozen=True, slots=True)
class Change:
    """A committed change. `answer` None: the job is deleted. `message` goes to every one of `topics`."""

    account_id: int
    job_id: str
    version: int
    answer: ReadyAnswer | None
    topics: Sequence[bytes]
    message: bytes


class StatusCache:
    """Build it before its pipes start: it listens to them.

    `trusted`: whether `read` may be used. Each connect of the polls pipe, and `distrust`, start a new `generation`
    that nobody trusts yet, call `on_connect` with it, and wait until the owner, who has seen that every change
    from before it was told, calls `trust` with that generation.
    `on_new_life` are called when what was read before can no longer be compared with what will be read.
    `policy` is Redis's maxmemory_policy as of the last connect. `redis_errors` counts error replies, `lives` the lives
    that have begun.
    """

    scripts: Final = (READ_IF_NEWER, PUT, FILL)
    """What its pipes must be able to run."""

    def __init__(self, polls: RedisPipe, puts: RedisPipe, *, process_token: str) -> None:
        """`process_token` is this process's alone, also after a restart."""
        self._polls = polls
        self._puts = puts
        self._leases = (f"{process_token}-{number:x}" for number in itertools.count(1))
        self._postgres_identity = ""
        self._polls_run_id = ""
        self._puts_run_id = ""
        self._puts_life = ""
        self._puts_are_up = asyncio.Event()
        self._turn: dict[bytes, _Slot] = {}
        self._loop: asyncio.AbstractEventLoop
        self.life = ""
        self.generation = 0
        self.trusted = False
        self._confirmed_at = time.monotonic()  # the gate is shut, and opens no earlier than it has looked itself
        self.policy = ""
        self.redis_errors = 0
        self.lives = 0
        self._refusal = ""
        self.on_connect: list[Callable[[int], None]] = []
        self.on_new_life: list[Callable[[], None]] = []
        polls.on_up.append(self._polls_came_up)
        polls.on_down.append(self._polls_went_down)
        puts.on_up.append(self._puts_came_up)
        puts.on_down.append(self._puts_are_up.clear)

    @property
    def postgres_identity(self) -> str:
        """Which Postgres the versions come from. The cache cannot be used while it is empty."""
        return self._postgres_identity

    @postgres_identity.setter
    def postgres_identity(self, identity: str) -> None:
        self._postgres_identity = identity
        self._settle_lives()

    def trust(self, generation: int) -> None:
        """Opens the gate, if Redis has not been away since `generation` began."""
        if generation == self.generation and self._polls.up:
            self.trusted = True

    def distrust(self) -> None:
        """Shuts the gate, as at a connect: what was committed could not be told, so entries may be old."""
        if self.trusted:
            self._begin_generation()

    def confirm(self, as_of: float) -> None:
        """At `as_of` (time.monotonic) no change was overdue to be told, or the gate was shut because one was."""
        self._confirmed_at = as_of

    @property
    def unconfirmed(self) -> bool:
        """Entries are used, and for too long nobody could look whether every change was told: they may be old."""
        return self.trusted and time.monotonic() - self._confirmed_at > CONFIRMED_FOR_s

    def read(self, key: JobKey, held: int) -> asyncio.Future[Reading]:
        """Compares version `held` (0: none) with Redis. All reads of one turn of the event loop are one trip.

        Two reads of one job in one turn are one, made with the lower `held`: what it finds may be no newer
        than what the other reader holds. Raises RedisAway, at once or from the future.
        """
        self._must_be_trusted()
        name = status_key(*key)
        if not self._turn:
            self._loop = asyncio.get_running_loop()  # once a turn: it asks the kernel for our pid
            self._polls.before_send(self._send_turn)
        reading: asyncio.Future[Reading] = self._loop.create_future()
        slot = self._turn.get(name)
        if slot is None:
            self._turn[name] = _Slot(held, reading)
        else:
            slot.join(held, reading)
        return reading

    @property
    def can_put(self) -> bool:
        """Whether it makes sense to try: as far as is known Redis can be reached."""
        return self._puts.up and bool(self._puts_life)

    async def put(self, changes: Sequence[Change]) -> bool:
        """Refreshes entries and announces. True: every change was told. Told twice, a change does no harm.

        A put that Redis did not take is tried again for PUT_TRIES_FOR_s in all. False at once if Redis is
        known to be away, or refuses.
        """
        if not self.can_put:
            return False
        try:
            async with asyncio.timeout(PUT_TRIES_FOR_s):
                tellings = [self._tell(part) for part in _parts(changes, MOST_CHANGES)]
                return all(await asyncio.gather(*tellings))
        except TimeoutError:
            return False

    async def fill(self, items: Sequence[tuple[int, str, Ready]], token: str) -> None:
        """Stores what was read from Postgres under the lease `token`, where it still stands. Never fails."""
        life = token[:LIFE_LENGTH]  # of when the lease was taken: what was read since may be of no later one
        for part in _parts(items, MOST_CHANGES):
            keys = [status_key(account_id, job_id) for account_id, job_id, _ in part]
            args: list[Argument] = [token, life, ENTRY_LIFETIME_ms, ABSENCE_LIFETIME_ms]
            for _, _, ready in part:
                args += _digits(version_of(ready)), ready.encode()
            await self._try_to_write(FILL, keys, args)

    async def verify(self, items: Sequence[tuple[int, str, Ready]]) -> None:
        """Tells Redis what Postgres said about unverified entries; announces nothing. Never fails."""
        for part in _parts(items, MOST_CHANGES):
            changes = [_as_silent_change(account_id, job_id, ready) for account_id, job_id, ready in part]
            await self._try_to_write(PUT, *self._as_put(changes))

    def _must_be_trusted(self) -> None:
        if not self.trusted or not self.life:
            raise RedisAway(self._polls.why_down or "Redis is not trusted yet")

    def _send_turn(self) -> None:
        turn, self._turn = self._turn, {}
        lease = f"{self.life}-{next(self._leases)}"
        for part in _parts(list(turn.items()), MOST_READS):
            keys, slots = [name for name, _ in part], [slot for _, slot in part]
            args: list[Argument] = [self.life, lease, UNVERIFIED_AFTER_ms, LEASE_LIFETIME_ms]
            args += [slot.held for slot in slots]
            try:
                self._must_be_trusted()
                reply = self._polls.call(READ_IF_NEWER, keys, args)
            except RedisAway as away:
                _fail(slots, away)
            except Exception as fault:  # ours; still nobody may wait for ever
                _log.exception("redis_question_failed")
                _fail(slots, fault)
            else:
                reply.add_done_callback(partial(self._hand_out, slots, self.life, lease))

    def _hand_out(self, slots: Sequence[_Slot], life: str, lease: str, reply: asyncio.Future[Any]) -> None:
        error = reply.exception()
        if isinstance(error, RedisError):
            self._count(error)
        if error is not None:
            _fail(slots, error)
        elif life != self.life:
            _fail(slots, RedisAway("read in another life"))
        else:
            leased = Miss(lease)
            for slot, found in zip(slots, reply.result(), strict=True):
                slot.answer(NOTHING_NEWER if found == 0 else _understand(found, leased))

    async def _tell(self, changes: Sequence[Change]) -> bool:
        while True:
            try:
                await self._puts.call(PUT, *self._as_put(changes))
            except RedisError as error:
                self._count(error)
                return False
            except RedisAway:
                await self._puts_are_up.wait()
            else:
                self._refusal = ""
                return True

    async def _try_to_write(self, script: Script, keys: Sequence[bytes], args: Sequence[Argument]) -> None:
        try:
            await self._puts.call(script, keys, args)
        except RedisAway:
            pass
        except RedisError as error:
            self._count(error)

    def _as_put(self, changes: Sequence[Change]) -> tuple[list[bytes], list[Argument]]:
        """KEYS and ARGV of the put script."""
        keys = [status_key(change.account_id, change.job_id) for change in changes]
        args: list[Argument] = [self._puts_life, ENTRY_LIFETIME_ms]
        for change in changes:
            payload = change.answer.encode() if change.answer else b""
            # Who listens must know whose versions these are: channels are shared by all databases of one Redis.
            message = self._puts_life.encode() + change.message
            args += _digits(change.version), payload, message, len(change.topics), *change.topics
        return keys, args

    def _count(self, error: RedisError) -> None:
        self.redis_errors += 1
        if str(error) != self._refusal:  # it comes with every report while it lasts
            self._refusal = str(error)
            _log.warning("redis_refused", why=self._refusal)

    def _polls_came_up(self, facts: Mapping[str, str]) -> None:
        self.policy = facts.get("maxmemory_policy", "")
        self._polls_run_id = facts["run_id"]
        self._settle_lives()
        self._begin_generation()

    def _begin_generation(self) -> None:
        self.generation += 1
        self.trusted = False
        for hear in self.on_connect:
            hear(self.generation)

    def _polls_went_down(self) -> None:
        self.trusted = False

    def _puts_came_up(self, facts: Mapping[str, str]) -> None:
        self._puts_run_id = facts["run_id"]
        self._settle_lives()
        self._puts_are_up.set()

    def _settle_lives(self) -> None:
        self._puts_life = _life(self._puts_run_id, self._postgres_identity)
        life = _life(self._polls_run_id, self._postgres_identity)
        if life != self.life:
            self.life = life
            self.lives += bool(life)
            for hear in self.on_new_life:
                hear()


class _Slot:
    """One job in one turn and its readers, each with a future of its own to cancel."""

    __slots__ = ("_readers", "held")

    def __init__(self, held: int, reader: asyncio.Future[Reading]) -> None:
        self.held = held
        self._readers = [reader]

    def join(self, held: int, reader: asyncio.Future[Reading]) -> None:
        self.held = min(held, self.held)
        self._readers.append(reader)

    def answer(self, reading: Reading) -> None:
        for reader in self._readers:
            if not reader.done():
                reader.set_result(reading)

    def fail(self, why: str) -> None:
        for reader in self._readers:
            if not reader.done():
                reader.set_exception(RedisAway(why))


def _fail(slots: Sequence[_Slot], why: BaseException) -> None:
    for slot in slots:
        slot.fail(str(why))


def _understand(found: Any, leased: Miss) -> Reading:
    """One reading as the script returns it."""
    try:
        match found:
            case 1:
                return leased
            case 2:
                return MISS_OF_ANOTHER
            case 3:
                return UNVERIFIED_AS_HELD
            case bytes():
                return Newer(_decode(found))
            case [3, bytes(entry)]:
                return Unverified(_decode(entry))
            case _:
                raise ValueError(found)
    except ValueError:
        _log.exception("status_entry_unreadable")
        return MISS_OF_ANOTHER


def _decode(found: bytes) -> Ready:
    """Raises ValueError."""
    return decode_ready(int(found[:VERSION_DIGITS]), found[VERSION_DIGITS:])


def _as_silent_change(account_id: int, job_id: str, ready: Ready) -> Change:
    answer = None if isinstance(ready, Absence) else ready
    return Change(account_id, job_id, version_of(ready), answer, topics=(), message=b"")


def _life(run_id: str, postgres_identity: str) -> str:
    """Hex digits for one shape of answers, one run of Redis, one Postgres; '' while one is unknown."""
    if not run_id or not postgres_identity:
        return ""
    return hashlib.sha256(f"{ANSWER_SHAPE}|{run_id}|{postgres_identity}".encode()).hexdigest()[:LIFE_LENGTH]


def _digits(version: int) -> bytes:
    return b"%0*d" % (VERSION_DIGITS, version)


def _parts(items: Sequence[_Item], most: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + most] for start in range(0, len(items), most))
