"""What a stream still has to say of one job: its newest state, and never a backlog."""

from __future__ import annotations

from service.job import FINISHED
from service.stores.event_channel import DELETED, Notice


class Slot:
    """The latest change wins. Only a finished state is never overwritten: a deletion, and a retry, wait behind it.

    `status`, `stalled`: what the reader was told last; None: nothing, or nobody knows.
    """

    __slots__ = ("_unsent", "stalled", "status")

    def __init__(self, status: str | None = None, stalled: bool | None = None) -> None:
        self.status = status
        self.stalled = stalled
        self._unsent: list[Notice] = []

    def __len__(self) -> int:
        return len(self._unsent)

    @property
    def says_gone(self) -> bool:
        """Whether a deletion waits: nothing comes after it."""
        return bool(self._unsent) and self._unsent[-1].status == DELETED

    def add(self, notice: Notice) -> None:
        """A newer state."""
        if self._unsent and self._unsent[-1].status not in FINISHED:
            self._unsent[-1] = notice
        else:
            self._unsent.append(notice)

    def drop_known(self, version: int) -> None:
        """Of what waits, everything up to this version."""
        self._unsent = [notice for notice in self._unsent if notice.version > version]

    def take(self) -> tuple[Notice, str, str | None]:
        """The next to send, the name of its event, and the status before."""
        notice, previous = self._unsent.pop(0), None if self.status == DELETED else self.status
        name = _event_name(notice, previous, self.stalled)
        self.status, self.stalled = notice.status, notice.stalled
        return notice, name, previous


def _event_name(notice: Notice, previous_status: str | None, was_stalled: bool | None) -> str:
    """What a change is called, by what the reader knew before."""
    if notice.status == DELETED:
        return "deleted"
    if notice.status != previous_status:
        return "status"
    return "stalled" if was_stalled is not None and notice.stalled != was_stalled else "progress"
