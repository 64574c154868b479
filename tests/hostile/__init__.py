"""Whatever is sent, the answer is a refusal that says why, nothing is written, and nobody else notices.

Each case is answered with its own 4xx; afterwards every row of every table is what it was, and no error was logged:
what clients do wrong is theirs, and must not drown what we do wrong.
"""

from collections.abc import Awaitable, Callable

Untouched = Callable[[], Awaitable[None]]
"""Fails if any row of any table has changed, or an error was logged."""

NEW = b'{"type":"x"}'
POST = "POST /jobs"
TYPED = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"
