"""How fast a job goes of late, and when it will be done if it goes on like that. Pure; `report_jobs` keeps the pace."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

LEAST_POINTS: Final = 5
LEAST_TIME: Final = timedelta(seconds=1)
"""What must have been measured before anything is said."""

PATIENCE_points: Final = 25
"""Silence for as long as so many points take: the job has lost its pace."""


@dataclass(slots=True)
class Pace:
    """The pace of an attempt that began to be worked on at `began_at`, from the percentage `start` to `reached`.

    `point_s`: seconds that a point of percentage takes; an average in which what lies 10 points back counts a third.
    """

    began_at: datetime
    start: float
    reached: float
    reached_at: datetime
    point_s: float

    def end(self, changed_at: datetime) -> datetime | None:
        """When the job will be done, as its change of `changed_at` leaves it: later than that, or None for unknown.

        It stays the same until the percentage moves by a point, and is unknown from the change on that it is behind of.
        """
        if self.reached - self.start < LEAST_POINTS or self.reached_at - self.began_at < LEAST_TIME:
            return None
        if changed_at - self.reached_at > self._time_of(PATIENCE_points):
            return None
        end = self.reached_at + self._time_of(100 - self.reached)
        return end if end > changed_at else None

    def _time_of(self, points: float) -> timedelta:
        return timedelta(seconds=points * self.point_s)
