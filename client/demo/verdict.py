"""Whether the demo has shown what it promises, judged from what the poller and the streams were told. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client.demo.board import Heard
from client.demo.calls import FINISHED
from client.demo.poller import Polled


@dataclass(frozen=True, slots=True)
class Told:
    """What both were told of the job of one document."""

    name: str
    polled: Polled
    heard: Heard

    @property
    def status(self) -> str:
        """As the poller saw it last."""
        return self.polled.job["status"] if self.polled.job else "unknown"

    @property
    def agrees(self) -> bool:
        """The poller's last answer is the stream's last event, which adds nothing but the status before."""
        if self.polled.job is None or self.heard.job is None:
            return False
        return self.polled.job == {name: value for name, value in self.heard.job.items() if name != "previous_status"}

    @property
    def moved(self) -> bool:
        """The bar rose, and stood between its ends if there was more than one page to stop at."""
        seen = self.heard.percentages
        pages = self.polled.result["pages"] if self.polled.result else 0
        return seen == sorted(seen) and seen[-1:] == [100] and (pages < 2 or any(0 < each < 100 for each in seen))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Each promise, and whether it was kept; and one sentence with the figures."""

    promises: Sequence[tuple[str, bool]]
    summary: str

    @property
    def kept(self) -> bool:
        """All of them."""
        return all(kept for _, kept in self.promises)


ErrorOf = Callable[[str], Mapping[str, str] | None]
"""What a document's own library says when it is read once more: `error_details`, or None where it can be read."""


def judge(told: Sequence[Told], damaged: Sequence[str], error_of: ErrorOf) -> Verdict:
    """`damaged`: the documents that must fail. Another may fail too, if its library says the same when asked again."""
    completed = [each for each in told if each.status == "COMPLETED"]
    failed = [each for each in told if each.status == "FAILED"]
    intended = [each for each in failed if _error_details(each) == error_of(each.name)]
    agree = all(each.agrees for each in told)
    promises = [
        ("every job is finished", all(each.status in FINISHED for each in told)),
        ("every completed job has a result, and its bar moved", all(_is_whole(each) for each in completed)),
        (
            f"{', '.join(damaged)} FAILED with the real error of the library",
            {*damaged} <= {each.name for each in intended} and intended == failed,
        ),
        ("of every job the poller's last answer is the stream's last event", agree),
    ]
    asked = sum(each.polled.asked for each in told)
    unchanged = sum(each.polled.unchanged for each in told)
    changes = sum(each.heard.changes for each in told)
    summary = (
        f"{len(told)} jobs, {len(completed)} completed, {_failures(len(failed), len(intended))}; "
        f"the poller asked {asked} times ({unchanged} x 304), the streams told {changes} changes; "
        f"last answers agree: {'yes' if agree else 'NO'}"
    )
    return Verdict(promises, summary)


def _is_whole(told: Told) -> bool:
    return told.polled.result is not None and told.moved


def _error_details(told: Told) -> Any:
    return told.polled.job["error_details"] if told.polled.job else None


def _failures(failed: int, intended: int) -> str:
    if failed == intended:
        return f"{failed} failed as intended"
    return f"{failed} failed ({intended} as intended)"
