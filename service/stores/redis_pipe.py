"""One connection to Redis that speaks RESP itself: what is asked in one turn of the event loop is one send.

A question that is not answered within the deadline ends the connection: everything that waits fails with
RedisAway, and so does everything asked from then on, at once, until a probe of our own has found Redis again.
Nobody's poll is that probe. redis-py, which remains for pub/sub, would cost 60-100 us per awaited command,
more than all the rest of a poll.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, cast

import hiredis
import structlog

from service.errors import RedisAway
from service.stores.redis_address import Argument, RedisAddress

HANDSHAKE_s: Final = 1.0
"""How long connecting, introducing ourselves and loading the scripts may take together."""

LAST_LOOK_s: Final = 0.002
"""After a deadline the loop reads its sockets once more: perhaps the loop was busy and not Redis."""

_Unknown = tuple[str, bytes, tuple[Argument, ...]]
"""What to ask instead should Redis not know a script: EVAL, its source, and the rest of the command."""

OnUp = Callable[[Mapping[str, str]], None]
OnDown = Callable[[], None]

# hiredis' stub describes the command as a tuple of one element.
pack: Final = cast(Callable[[tuple[Argument, ...]], bytes], hiredis.pack_command)
_NOT_YET: Final = object()
_log = structlog.get_logger(__name__)


class RedisError(Exception):
    """Redis answered, with an error."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script. `sha` is the name under which Redis remembers it."""

    name: str
    source: bytes = field(repr=False)
    sha: str = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """From a file `<owner>.<verb>.lua`."""
        source = path.read_bytes()
        return cls(path.stem, source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


class RedisPipe:
    """One connection that comes back by itself. `up` says whether it may be asked, `why_down` why not.
    `lost` counts how often it was lost.

    `on_up` are called after each connect with what Redis says about itself (`run_id`, `redis_version`,
    `maxmemory_policy`, ...), `on_down` after each loss; both before anybody can ask or learn of it.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = 0.1,
        probe_every_s: float = 0.25,
        scripts: Sequence[Script] = (),
        on_up: OnUp | None = None,
        on_down: OnDown | None = None,
    ) -> None:
        """`url` as redis-py takes it: redis://, rediss:// or unix://. Raises ValueError for any other."""
        self._address = RedisAddress.read(url)
        self._deadline_s = deadline_s
        self._probe_every_s = probe_every_s
        self._scripts = tuple(scripts)
        self._connection: _Connection | None = None
        self._keeping_up: asyncio.Task[None] | None = None
        self._turn_is_open = False
        self._builders: list[Callable[[], None]] = []
        self.up = False
        self.lost = 0
        self.why_down = "not started"
        self.on_up: list[OnUp] = [on_up] if on_up else []
        self.on_down: list[OnDown] = [on_down] if on_down else []

    async def start(self) -> None:
        """Tries to connect once, and goes on in the background. An absent Redis is not an error."""
        await self._try_to_connect()
        self._keeping_up = asyncio.create_task(self._keep_up(), name="redis pipe")

    async def close(self) -> None:
        """Ends the connection for good; what still waits fails with RedisAway. `on_down` are not called."""
        if self._keeping_up is not None:
            self._keeping_up.cancel()
            await asyncio.wait([self._keeping_up])
        connection, self._connection = self._connection, None
        self.up, self.why_down = False, "closed"
        if connection is not None:
            connection.drop("closed")

    def call(self, script: Script, keys: Sequence[bytes], args: Sequence[Argument]) -> asyncio.Future[Any]:
        """Runs a script. Strings come back as bytes; see `command` for the errors."""
        rest = (len(keys), *keys, *args)
        return self._ask(("EVALSHA", script.sha, *rest), ("EVAL", script.source, rest))

    def command(self, *words: Argument) -> asyncio.Future[Any]:
        """Asks one command.

        Raises RedisAway at once when there is no connection; the future raises RedisAway when there is no
        answer within the deadline, RedisError when the answer is an error. Cancelling it takes nothing back:
        the answer, when it comes, is thrown away.
        """
        return self._ask(words, None)

    def before_send(self, build: Callable[[], None]) -> None:
        """Calls `build` once at the end of this turn of the event loop, just before everything is sent.

        It is called even if Redis is away, and then meets RedisAway where it asks. What it raises is logged: whoever
        waits for its answers must be told by itself.
        """
        self._builders.append(build)
        self._open_turn()

    def _ask(self, words: tuple[Argument, ...], unknown: _Unknown | None) -> asyncio.Future[Any]:
        if self._connection is None:
            raise RedisAway(self.why_down)
        self._open_turn()
        return self._connection.ask(words, unknown)

    def _open_turn(self) -> None:
        if not self._turn_is_open:
            self._turn_is_open = True
            asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        builders, self._builders = self._builders, []
        for build in builders:
            try:
                build()
            except Exception:  # one builder's fault must not be the end of what others ask
                _log.exception("redis_question_failed")
        self._turn_is_open = False
        if self._connection is not None:
            self._connection.send()

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(self._probe_every_s)
            try:
                await (self._probe() if self.up else self._try_to_connect())
            except Exception:  # a hook's fault must not be the end of all reconnecting
                _log.exception("redis_pipe_failed")

    async def _probe(self) -> None:
        """Notices a frozen server when nobody polls: the deadline of the PING ends the connection."""
        connection = self._connection
        try:
            await self.command("PING")
        except RedisAway:
            pass
        except RedisError as error:
            if connection is not None:
                connection.drop(str(error))

    async def _try_to_connect(self) -> None:
        connection = _Connection(self._lost)
        try:
            async with asyncio.timeout(HANDSHAKE_s):
                await self._address.connect(connection)
                facts = await self._introduce(connection)
        except (OSError, RedisAway, RedisError) as error:
            self._stays_down(_reason(error))
        else:
            self._came_up(connection, facts)
        finally:
            if connection is not self._connection:
                connection.drop("never came up")

    async def _introduce(self, connection: _Connection) -> dict[str, str]:
        """Raises RedisError when Redis refuses us, or is not one whose answers may be trusted."""
        sections = ("server", "memory", "replication")
        asked = [
            *self._address.introductions(),
            ("CLIENT", "SETNAME", "jobwire"),
            *(("SCRIPT", "LOAD", script.source) for script in self._scripts),
            *(("INFO", section) for section in sections),
        ]
        waiting = [connection.ask(words) for words in asked]
        connection.send()
        for reply in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(reply, BaseException):
                raise reply
        if connection.is_lost:
            raise RedisAway("lost before it came up")
        facts: dict[str, str] = {}
        for told in waiting[-len(sections) :]:
            facts |= _read_info(told.result())
        if facts.get("role", "master") != "master":
            raise RedisError("this Redis is a replica, and may be behind")
        if not facts.get("run_id"):
            raise RedisError("this Redis does not tell its run_id, so a restart could not be noticed")
        return facts

    def _came_up(self, connection: _Connection, facts: Mapping[str, str]) -> None:
        connection.deadline_s = self._deadline_s
        self._connection, self.up, self.why_down = connection, True, ""
        _log.info("redis_up", version=facts.get("redis_version"))
        for hear in self.on_up:
            hear(facts)

    def _stays_down(self, why: str) -> None:
        if why != self.why_down:
            _log.warning("redis_unreachable", why=why)
        self.why_down = why

    def _lost(self, connection: _Connection, why: str) -> None:
        if connection is not self._connection:
            return  # it never came up, or was closed by us
        self._connection, self.up, self.why_down = None, False, why
        self.lost += 1
        _log.warning("redis_down", why=why)
        for hear in self.on_down:
            hear()


class _Asked(NamedTuple):
    answer: asyncio.Future[Any]
    at: float
    unknown: _Unknown | None


class _Connection(asyncio.Protocol):
    """One connection from its first byte to its last.

    The n-th reply belongs to the n-th question, and a late reply can never reach another: whoever gives up on
    one reply gives up the connection and all that wait on it. A future that was cancelled keeps its place.
    """

    def __init__(self, on_lost: Callable[[_Connection, str], None]) -> None:
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=RedisError, notEnoughData=_NOT_YET)
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Asked] = deque()
        self._unsent: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self.is_lost = False
        self.deadline_s: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        wire = transport.get_extra_info("socket")
        if wire is not None and wire.family in (socket.AF_INET, socket.AF_INET6):
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, error: Exception | None) -> None:
        self.drop(_reason(error) if error else "Redis closed the connection")

    def ask(self, words: tuple[Argument, ...], unknown: _Unknown | None = None) -> asyncio.Future[Any]:
        """Puts a question at the end of the line; `send` sends it."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._line_up(words, answer, unknown)
        return answer

    def send(self) -> None:
        """Sends all that was asked since the last time, in one piece."""
        if self._unsent and self._transport is not None:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()

    def drop(self, why: str) -> None:
        """Ends the connection; everything that waits fails with RedisAway. Does nothing the second time."""
        if self.is_lost:
            return
        self.is_lost = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._on_lost(self, why)
        for asked in self._waiting:
            if not asked.answer.done():
                asked.answer.set_exception(RedisAway(why))
        self._waiting.clear()

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while not self.is_lost and (reply := self._reader.gets()) is not _NOT_YET:
                if not self._waiting:
                    raise hiredis.ProtocolError("a reply to no question")
                self._answer(self._waiting.popleft(), reply)
        except hiredis.ProtocolError as error:
            self.drop(_reason(error))

    def _line_up(self, words: tuple[Argument, ...], answer: asyncio.Future[Any], unknown: _Unknown | None) -> None:
        self._unsent.append(pack(words))
        self._waiting.append(_Asked(answer, self._loop.time(), unknown))
        if self._timer is None and self.deadline_s is not None:
            self._timer = self._loop.call_later(self.deadline_s, self._look_at_oldest)

    def _answer(self, asked: _Asked, reply: Any) -> None:
        if isinstance(reply, RedisError):
            self._answer_error(asked, reply)
        elif not asked.answer.done():
            asked.answer.set_result(reply)

    def _answer_error(self, asked: _Asked, error: RedisError) -> None:
        said = str(error)
        if said.startswith("NOSCRIPT") and asked.unknown is not None:
            verb, source, rest = asked.unknown
            self._line_up((verb, source, *rest), asked.answer, None)
            self.send()
        elif said.startswith("READONLY"):  # it became a replica: the primary is somewhere else now
            self._waiting.appendleft(asked)
            self.drop(said)
        elif not asked.answer.done():
            asked.answer.set_exception(error)

    def _look_at_oldest(self) -> None:
        """One timer watches the whole line: with one deadline for all, the oldest question is due first."""
        self._timer = None
        if not self._waiting or self.deadline_s is None:
            return
        oldest = self._waiting[0]
        left_s = oldest.at + self.deadline_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look_at_oldest)
        else:
            self._timer = self._loop.call_later(LAST_LOOK_s, self._give_up, oldest)

    def _give_up(self, oldest: _Asked) -> None:
        if self._waiting and self._waiting[0] is oldest:
            self.drop(f"no answer within {self.deadline_s} s")
        else:
            self._look_at_oldest()


def _read_info(reply: bytes) -> dict[str, str]:
    """The `name:value` lines of an INFO."""
    lines = reply.decode(errors="replace").splitlines()
    return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
