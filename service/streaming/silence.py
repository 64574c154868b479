"""Readers whose machine has gone without a word: switched off, or cut off."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Final

UNACKNOWLEDGED_ms: Final = 20_000
"""A reader whose machine acknowledges nothing for this long has gone without a word."""


def notice_silent_reader(transport: asyncio.Transport | None) -> None:
    """Where the system can, the kernel gives up what nobody acknowledges (TCP_USER_TIMEOUT, Linux)."""
    wire = None if transport is None else transport.get_extra_info("socket")
    if wire is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        with suppress(OSError):  # not every transport is TCP
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_ms)
