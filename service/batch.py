"""What a batch is: counts of its jobs, and the one status that follows from them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

MOST_JOBS_SHOWN: Final = 1000
BATCH_STATUSES: Final = ("queued", "processing", "completed", "completed_with_failures", "failed", "cancelled")


@dataclass(slots=True)
class BatchJob:
    """One job of a batch as the batch shows it. `percentage`: None where it is not known."""

    id: str
    status: str
    type: str
    percentage: float | int | None


@dataclass(slots=True)
class Batch:
    """Counts are of the whole batch; `jobs` are its first MOST_JOBS_SHOWN. Times are UTC."""

    account_id: int
    id: str
    version: int
    created_at: datetime
    changed_at: datetime
    closed: bool
    total: int
    queued: int
    completed: int
    failed: int
    cancelled: int
    jobs: list[BatchJob]

    @property
    def finished(self) -> int:
        """Jobs that are COMPLETED, FAILED or CANCELLED."""
        return self.completed + self.failed + self.cancelled

    @property
    def over(self) -> bool:
        """Nothing more can happen: closed, and every job is finished."""
        return self.closed and self.finished == self.total

    @property
    def percent(self) -> int:
        """Finished jobs of all, in whole percent."""
        return 100 * self.finished // self.total if self.total else 0

    @property
    def status(self) -> str:
        """In one word; the last four only once it is over."""
        if not self.over:
            return "queued" if self.queued == self.total else "processing"
        if self.total and self.cancelled == self.total:
            return "cancelled"
        if self.total and not self.completed:
            return "failed"
        return "completed_with_failures" if self.failed or self.cancelled else "completed"
