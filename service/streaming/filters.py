"""Which changes a reader of many jobs wants to hear of."""

from __future__ import annotations

from dataclasses import dataclass

from service.stores.event_channel import Notice


@dataclass(frozen=True, slots=True)
class Filters:
    """All that are given must hold. `statuses`: of the job before or after the change; empty: any."""

    user_id: str | None = None
    tags: frozenset[str] = frozenset()
    statuses: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """The same for the same filters, in every process."""
        return f"{self.user_id!r} {sorted(self.tags)} {sorted(self.statuses)}"

    def match(self, notice: Notice, before: str | None = None) -> bool:
        """Whether the reader hears of this change. `before`: the status before, where somebody remembers it."""
        if self.user_id is not None and notice.user_id != self.user_id:
            return False
        if self.tags and not self.tags.issubset(notice.tags):
            return False
        if not self.statuses:
            return True
        passed = notice.passed_through | {notice.status, notice.previous_status, before}
        return not self.statuses.isdisjoint(passed)
