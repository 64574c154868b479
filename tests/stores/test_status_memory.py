"""The memory keeps the newest answers that are read, within both bounds."""

from __future__ import annotations

import tracemalloc

from service.stores.ready import ReadyAnswer
from service.stores.status_memory import OVERHEAD_bytes, StatusMemory


def answer(version: int = 1, size: int = 10) -> ReadyAnswer:
    return ReadyAnswer(version, 1_700_000_000_000, "PROCESSING", 2, b"a" * size, b"b" * size)


def key(number: int) -> tuple[int, str]:
    return (1, f"job-{number}")


def test_what_is_kept_is_found() -> None:
    memory = StatusMemory()
    kept = answer()
    assert memory.get(key(1)) is None
    assert memory.keep(key(1), kept) is kept
    assert memory.get(key(1)) is kept
    assert memory.get((2, "job-1")) is None, "another account's"
    assert len(memory) == 1


def test_newer_replaces_older_and_never_the_other_way() -> None:
    memory = StatusMemory()
    older, newer = answer(9), answer(10)
    memory.keep(key(1), older)
    assert memory.keep(key(1), newer) is newer
    assert memory.keep(key(1), older) is newer
    assert memory.keep(key(1), answer(10)) is newer, "the same version is the same answer"
    assert memory.get(key(1)) is newer
    assert len(memory) == 1


def test_older_does_not_replace_what_is_old_by_age() -> None:
    memory = StatusMemory(max_entries=4)
    newest = answer(5)
    memory.keep(key(0), newest)
    memory.keep(key(1), answer())
    memory.keep(key(2), answer())  # now 0 and 1 are the old generation
    assert memory.keep(key(0), answer(4)) is newest


def test_drop_and_clear() -> None:
    memory = StatusMemory(max_entries=4)
    for number in range(4):
        memory.keep(key(number), answer())
    memory.drop(key(0))
    memory.drop(key(3))
    memory.drop(key(9))
    assert [memory.get(key(number)) is None for number in range(4)] == [True, False, False, True]
    memory.clear()
    assert len(memory) == 0
    assert memory.get(key(1)) is None


def test_entries_are_bounded_and_what_is_read_stays() -> None:
    memory = StatusMemory(max_entries=100)
    memory.keep(key(0), answer())
    for number in range(1, 1_000):
        memory.keep(key(number), answer())
        assert memory.get(key(0)) is not None
        assert len(memory) <= 100
    assert memory.get(key(1)) is None
    assert memory.get(key(999)) is not None


def test_bytes_are_bounded() -> None:
    size = 5_000
    memory = StatusMemory(max_bytes=20 * (2 * size + OVERHEAD_bytes))
    for number in range(500):
        memory.keep(key(number), answer(size=size))
        assert len(memory) <= 20
    assert len(memory) >= 10


def test_replaced_and_dropped_answers_weigh_nothing() -> None:
    memory = StatusMemory(max_bytes=20 * (1_000 + OVERHEAD_bytes))
    memory.keep(key(0), answer())
    for version in range(1, 1_000):
        memory.keep(key(1), answer(version, 500))
        memory.keep(key(2), answer(1, 500))
        memory.drop(key(2))
    assert len(memory) == 2, "nothing was pushed out"


def test_an_answer_that_is_too_large_is_not_kept() -> None:
    memory = StatusMemory(max_bytes=10_000)
    memory.keep(key(1), answer())
    huge = answer(2, 5_000)
    assert memory.keep(key(1), huge) is huge
    assert memory.get(key(1)) is None, "the older one must not stay either"


def test_overhead_is_measured() -> None:
    memory, count, size = StatusMemory(), 2_000, 600
    tracemalloc.start()
    for number in range(count):
        memory.keep((1, f"0192f0c1-7c3a-7000-8000-{number:012}"), answer(number + 1_000, size + number % 2))
    measured, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.7 < measured / (count * (2 * size + OVERHEAD_bytes)) < 1.15
