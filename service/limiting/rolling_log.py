"""The rolling window in this process: what was granted here, and the only judge while Redis is away."""

from __future__ import annotations

from bisect import bisect_right
from itertools import islice
from typing import Final

GRAIN: Final = 1000
"""Grants closer than a window divided by this are one record, dated by the later."""

_TRIM_AT: Final = 512


class RollingLog:
    """Instants of grants (monotonic seconds, never backwards) and the running total behind each."""

    __slots__ = ("_instants", "_totals", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._instants: list[float] = []
        self._totals: list[int] = []

    def add(self, now: float) -> None:
        """One grant."""
        instants, totals = self._instants, self._totals
        total = (totals[-1] if totals else 0) + 1
        if len(instants) > 1 and now - instants[-2] < self._window_s / GRAIN:
            instants[-1], totals[-1] = now, total
        else:
            instants.append(now)
            totals.append(total)

    def used(self, now: float) -> int:
        """Grants inside the window that ends now."""
        first = self._first(now)
        if first == len(self._totals):
            return 0
        return self._totals[-1] - (self._totals[first - 1] if first else 0)

    def returns_in_s(self, now: float, most: int) -> float:
        """Until a grant leaves the window and fewer than `most` are in it; 0 when there is none."""
        first = self._first(now)
        if first == len(self._totals):
            return 0.0
        leaves = max(first, bisect_right(self._totals, self._totals[-1] - most))
        return self._instants[leaves] + self._window_s - now

    def _first(self, now: float) -> int:
        """The first record inside the window; what lies before goes once it is much."""
        first = bisect_right(self._instants, now - self._window_s)
        if first > _TRIM_AT:
            kept = first - 1  # its total is the one at the window's edge
            self._instants = list(islice(self._instants, kept, None))
            self._totals = list(islice(self._totals, kept, None))
            return 1
        return first
