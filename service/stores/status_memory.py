"""This process's ready answers, by job. Not assumed to be fresh: each poll asks Redis for anything newer."""

from __future__ import annotations

from typing import Final

from service.stores.ready import JobKey, ReadyAnswer

OVERHEAD_bytes: Final = 1_100
"""What an answer costs beside its shapes: objects, headers, ETag, key, its place in the dict (measured)."""


class StatusMemory:
    """A bounded map of ReadyAnswers in two generations; absences are never kept here.

    New and read answers are young. When the young fill half of a bound they become the old, and the old are
    forgotten: a hit costs one look into a dict and no bookkeeping, and what was not read for a while goes.
    """

    def __init__(self, max_entries: int = 200_000, max_bytes: int = 256 * 2**20) -> None:
        self._half_entries = max(max_entries // 2, 1)
        self._half_bytes = max_bytes // 2
        self._young: dict[JobKey, ReadyAnswer] = {}
        self._old: dict[JobKey, ReadyAnswer] = {}
        self._young_bytes = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: JobKey) -> ReadyAnswer | None:
        """The newest answer that was kept, or None."""
        answer = self._young.get(key)
        if answer is None and (answer := self._old.pop(key, None)) is not None:
            self._add(key, answer)
        return answer

    def keep(self, key: JobKey, answer: ReadyAnswer) -> ReadyAnswer:
        """Keeps `answer` unless a newer version is here, and returns the newer of the two."""
        present = self.get(key)
        if present is not None:
            if present.version >= answer.version:
                return present
            self.drop(key)
        self._add(key, answer)
        return answer

    def drop(self, key: JobKey) -> None:
        """Forgets one job."""
        self._old.pop(key, None)
        if (answer := self._young.pop(key, None)) is not None:
            self._young_bytes -= _weight_bytes(answer)

    def clear(self) -> None:
        """Forgets everything: versions of another life mean nothing."""
        self._young, self._old, self._young_bytes = {}, {}, 0

    def _add(self, key: JobKey, answer: ReadyAnswer) -> None:
        weight_bytes = _weight_bytes(answer)
        if weight_bytes > self._half_bytes:
            return
        if len(self._young) >= self._half_entries or self._young_bytes + weight_bytes > self._half_bytes:
            self._young, self._old, self._young_bytes = {}, self._young, 0
        self._young[key] = answer
        self._young_bytes += weight_bytes


def _weight_bytes(answer: ReadyAnswer) -> int:
    return len(answer.shape_a) + len(answer.shape_b) + OVERHEAD_bytes
