"""One reader's stream: what its socket takes, when it takes it, and how it ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from random import uniform
from typing import Final

from service.streaming.frames import COMMENT, Form

LIFETIME_s: Final = 600.0
"""At most: a key that nobody uses leaves memory after as long, and could no longer be revoked there."""
QUIET_FOR_s: Final = 12.0
"""A comment is due after this long without a word; the contract says 15."""
STUCK_FOR_s: Final = 10.0
"""A reader whose socket takes nothing for this long is closed."""
BUFFER_bytes: Final = 64 * 1024


class Stream:
    """Writes into the reader's socket. What there is to say is up to the kinds of streams: `flush` and `has_more`.

    Nothing is written before `begin`. `ended`: there is nothing more to write. `attention` is set when something must
    be read anew, and at the end.
    """

    def __init__(self, transport: asyncio.Transport, key_id: str, form: Form) -> None:
        self.key_id = key_id
        self.ended = False
        self.attention = asyncio.Event()
        self._over = asyncio.Event()
        self._form = form
        self._started = False
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._wrote_at = self._loop.time()
        self._blocked_since: float | None = None
        self._let_go_at = float("inf")
        self._ends_at = self._wrote_at + LIFETIME_s * uniform(0.8, 0.99)  # noqa: S311

    @property
    def has_more(self) -> bool:
        """Whether something waits to be written."""
        raise NotImplementedError

    def flush(self) -> None:
        """Writes what the socket takes."""
        raise NotImplementedError

    def end(self, last_words: bytes = b"", *, within_s: float | None = None) -> None:
        """Ends the stream cleanly, or by hanging up on a reader that does not take the end `within_s`."""
        self._let_go_at = min(self._let_go_at, self._loop.time() + (STUCK_FOR_s if within_s is None else within_s))
        if not self.ended:
            if last_words and self._started and not self._transport.is_closing():
                self._write(self._form.framed(last_words))
            self.ended = True
            self._over.set()
            self.attention.set()

    async def ends_within(self, seconds: float) -> bool:
        """Waits for so long, or to the end: whether it has ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        return self.ended

    def tick(self, now: float) -> None:
        """Looked at from time to time by one timer for all streams."""
        if self.ended:
            if now >= self._let_go_at:
                self._transport.abort()
        elif self._transport.is_closing() or now >= self._ends_at:
            self.end()
        elif self.has_more:
            self.flush()
            if self._blocked_since is not None and now - self._blocked_since > STUCK_FOR_s:
                self._transport.abort()
                self.end()
        elif now - self._wrote_at >= QUIET_FOR_s and self._takes_more():
            self._write(self._form.framed(COMMENT))

    def _takes_more(self) -> bool:
        if not self._started or self.ended:
            return False
        takes = self._transport.get_write_buffer_size() <= BUFFER_bytes
        if takes:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = self._loop.time()
        return takes

    def _write(self, frame: bytes) -> None:
        """Straight into the transport: the response's own writer awaits, and a hub cannot."""
        self._transport.write(frame)
        self._wrote_at = self._loop.time()
