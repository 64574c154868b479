"""Everything at once on one Postgres: groups of reports that overlap, results, creations, deletions, retries.

Afterwards all that was answered is told as one story: by version, each report must have led from the state before
to the state after as the model says, and history, outbox, batches, results and tombstones must be exactly what
these states make of them.
"""

import asyncio
import hashlib
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from datetime import datetime

import pytest

from service import job as service
from service.errors import Unavailable
from service.job import NewJob, Report
from service.stores.connections import Postgres
from service.stores.job_table import IdTaken, JobTable, Verdict
from service.stores.keys import batch_of
from tests import model
from tests.model import Job, Said
from tests.test_report_jobs import WRONG_BATCHES

WRITERS = 8
MOST_IN_ONE_CALL = 64
BATCHES = ("b1", "b2", "b3", None, None)
Key = tuple[int, str]
STATUSES = [None] * 80 + ["PROCESSING"] * 60 + ["queued"] * 40 + ["FAILED"] * 20 + ["COMPLETED", "CANCELLED"]
ONE_CHOICE_FROM_ALL_IN = 20  # choices; the others are made from jobs that are still there


class Story:
    """What was answered."""

    def __init__(self) -> None:
        self.created: dict[Key, service.Job] = {}
        self.changes: dict[Key, dict[int, tuple[Said, service.Job]]] = defaultdict(dict)
        self.repeats: list[tuple[Key, Said, service.Job]] = []
        self.refusals: list[tuple[Key, Said, Verdict]] = []
        self.deleted: dict[Key, int] = {}
        self.commits: dict[str, list[Key]] = defaultdict(list)  # what each transaction changed, by its xid
        self.outcomes: Counter[str] = Counter()
        self.calls = 0

    def tell(self, key: Key, said: Said, verdict: Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome == "changed":
            assert verdict.job is not None
            assert verdict.xid is not None
            assert verdict.job.version not in self.changes[key], "two changes have one version"
            self.changes[key][verdict.job.version] = (said, verdict.job)
            self.commits[verdict.xid].append(key)
        elif verdict.outcome == "same":
            assert verdict.job is not None
            self.repeats.append((key, said, verdict.job))
        else:
            self.refusals.append((key, said, verdict))


class Writer:
    """One of several that know nothing of each other."""

    def __init__(self, number: int, seed: int, postgres: Postgres, story: Story) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.postgres = postgres
        self.table = JobTable(postgres)
        self.story = story

    async def write_until(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            act = self.random.choices([self.report, self.put_result, self.create, self.delete], weights=[82, 8, 8, 2])[
                0
            ]
            self.story.calls += 1
            try:
                await act()
            except Unavailable as error:
                cause = error.__cause__
                self.story.outcomes[f"{type(cause).__name__} {getattr(cause, 'sqlstate', '')}"] += 1

    async def report(self) -> None:
        there = self.keys()
        keys = self.random.sample(there, min(len(there), self.random.choice([1, 2, 8, MOST_IN_ONE_CALL])))
        reports = [(key, self.said()) for key in keys]
        verdicts = await self.table.report([_report(key, said) for key, said in reports])
        for (key, said), verdict in zip(reports, verdicts, strict=True):
            self.story.tell(key, said, verdict)

    async def put_result(self) -> None:
        key = self.random.choice(self.keys())
        result = "text/plain", self.random.choice([b"one", b"two"])
        said = Said(self.random.choice([None, None, None, "COMPLETED"]), result=result)
        self.story.tell(
            key, said, await self.table.report_result(_report(key, said), result[0], _digest(result), result[1])
        )

    async def create(self, how_many: int = 0) -> None:
        """A few jobs whose ids others choose too."""
        account = self.random.choice([1, 2])
        highest = max((int(job_id[4:]) for owner, job_id in self.story.created if owner == account), default=0)
        numbers = self.random.sample(
            range(max(highest - 3, 0), highest + 10), how_many or self.random.choice([1, 1, 2, 5])
        )
        jobs = [NewJob(f"job-{n:05}", "extraction", batch_id=self.random.choice(BATCHES)) for n in numbers]
        try:
            async with self.postgres.transaction() as connection:
                created, xid = await self.table.create(connection, account, jobs, [])
        except IdTaken as taken:
            self.story.outcomes["taken, deleted" if taken.deleted else "taken"] += 1
            return
        for job in created:
            key = account, job.id
            assert key not in self.story.created, "an id was given twice"
            self.story.created[key] = job
            self.story.commits[xid].append(key)
            self.story.outcomes["created"] += 1

    async def delete(self) -> None:
        account, job_id = key = self.random.choice(self.keys())
        deletion = await self.table.delete(account, job_id, None)
        if deletion.outcome == "deleted_now":
            assert key not in self.story.deleted, "deleted twice"
            assert deletion.xid is not None
            self.story.deleted[key] = deletion.version
            self.story.commits[deletion.xid].append(key)
        else:
            assert deletion.outcome == "deleted"
        self.story.outcomes[f"deletion: {deletion.outcome}"] += 1

    def keys(self) -> list[Key]:
        """Jobs that are there as far as anybody knows, now and then some that are gone."""
        there = [key for key in self.story.created if key not in self.story.deleted]
        if not there or self.random.randrange(ONE_CHOICE_FROM_ALL_IN) == 0:
            return list(self.story.created)
        return there

    def said(self) -> Said:
        choose = self.random.choice
        if choose(range(8)) == 0:
            return Said("queued", retry=True)
        status = choose(STATUSES)
        error, details = model.reason(choose(["Out of memory", "The file is encrypted"]), None)
        failed = status in ("FAILED", "CANCELLED")
        progress = {"percentage": choose(range(101)), "step": choose(["ocr", "layout", None])}
        return Said(
            status,
            progress=choose([None, {}, progress, progress]),
            error=error if failed else None,
            error_details=details if failed else None,
            metadata=choose([None, None, {"by": choose("abc"), "old": None}]),
            attempt=choose([None, None, None, 1, 2, 3]),
        )


@pytest.fixture
async def postgres(database: str) -> AsyncIterator[Postgres]:
    postgres = Postgres(database, pool_size=WRITERS, prepared_statements=True, timeout_s=20)
    await postgres.open()
    await postgres.execute("insert into accounts (name) values ('one'), ('two')")
    yield postgres
    await postgres.close()


async def test_what_many_writers_leave_is_one_story(postgres: Postgres) -> None:
    await storm(postgres, lasting_s=10)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_what_many_writers_leave_in_a_minute_is_one_story(postgres: Postgres) -> None:
    await storm(postgres, lasting_s=60)


async def storm(postgres: Postgres, lasting_s: float) -> None:
    seed = int(os.environ.get("JOBWIRE_TESTS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"JOBWIRE_TESTS_SEED={seed}")
    story = Story()
    writers = [Writer(number, seed, postgres, story) for number in range(WRITERS)]
    for writer in writers:
        await writer.create(5)
    await asyncio.gather(*(writer.write_until(time.monotonic() + lasting_s) for writer in writers))
    print(f"{story.calls} calls in {lasting_s} s:", dict(sorted(story.outcomes.items())))

    database = await postgres.fetch("select deadlocks from pg_stat_database where datname = current_database()")
    assert [row["deadlocks"] for row in database] == [0]
    assert not [outcome for outcome in story.outcomes if "Error" in outcome]
    told = _as_told(story)
    _check_repeats_and_refusals(story, told)
    await _check_jobs(postgres, story, told)
    await _check_history(postgres, story, told)
    await _check_outbox(postgres, story)
    assert await postgres.fetch(WRONG_BATCHES) == []
    await _check_results(postgres, story, told)


def _as_told(story: Story) -> dict[Key, list[Job]]:
    """Every job through its versions, as the model has them; what was answered must be just that."""
    told: dict[Key, list[Job]] = {}
    for key, first in story.created.items():
        job = Job(id=key[1], batch_id=first.batch_id)
        job.note(None)
        told[key] = states = [job]
        at: datetime = first.changed_at
        assert _seen(first) == _as_seen(job)
        for version in range(2, len(story.changes[key]) + 2):
            assert version in story.changes[key], f"{key} has a version {version} that nobody made"
            said, now = story.changes[key][version]
            outcome, job = model.judge(job, said)
            assert outcome == "changed", f"{key} {version}: {said} makes no change of {states[-1]}"
            assert _seen(now) == _as_seen(job)
            assert now.changed_at >= at, "changed_at ran backwards"
            at = now.changed_at
            states.append(job)
    return told


def _check_repeats_and_refusals(story: Story, told: dict[Key, list[Job]]) -> None:
    """What changed nothing was rightly said of a state that there was."""
    for key, said, job in story.repeats:
        state = told[key][job.version - 1]
        assert _seen(job) == _as_seen(state)
        assert model.judge(state, said)[0] == "same"
    for key, said, verdict in story.refusals:
        if verdict.outcome == "deleted":
            assert key in story.deleted
        else:
            held = (verdict.held_status, verdict.held_attempt)
            possible = [state for state in told[key] if (state.status, state.attempt) == held]
            assert any(model.judge(state, said)[0] == verdict.outcome for state in possible), (key, said, verdict)


async def _check_jobs(postgres: Postgres, story: Story, told: dict[Key, list[Job]]) -> None:
    rows = await postgres.fetch("select account_id, id, version, status, attempt from jobs")
    stand = {(row["account_id"], row["id"]): (row["version"], row["status"], row["attempt"]) for row in rows}
    last = {key: states[-1] for key, states in told.items()}
    assert stand == {
        key: (job.version, job.status, job.attempt) for key, job in last.items() if key not in story.deleted
    }
    tombs = await postgres.fetch("select account_id, id, version from tombstones")
    buried = {(row["account_id"], row["id"]): row["version"] for row in tombs}
    assert buried == story.deleted == {key: last[key].version + 1 for key in story.deleted}
    versions = sum(version - 1 for version, _, _ in stand.values()) + sum(version - 2 for version in buried.values())
    assert versions == story.outcomes["changed"]


async def _check_history(postgres: Postgres, story: Story, told: dict[Key, list[Job]]) -> None:
    kept = defaultdict(list)
    for row in await postgres.fetch("select * from job_history order by account_id, job_id, version"):
        kept[row["account_id"], row["job_id"]].append(
            {name: row[name] for name in ("version", "status", "previous_status", "attempt", "step", "error")}
        )
    assert kept == {key: states[-1].history for key, states in told.items() if key not in story.deleted}


async def _check_outbox(postgres: Postgres, story: Story) -> None:
    """One row per commit that changed something, and what it changed."""
    rows = await postgres.fetch("select xid::text as xid, accounts, jobs from outbox")
    assert len({row["xid"] for row in rows}) == len(rows)
    noted = {
        row["xid"]: sorted(key for key in zip(row["accounts"], row["jobs"], strict=True) if batch_of(key) is None)
        for row in rows
    }
    assert noted == {xid: sorted(keys) for xid, keys in story.commits.items()}


async def _check_results(postgres: Postgres, story: Story, told: dict[Key, list[Job]]) -> None:
    rows = await postgres.fetch(
        "select j.account_id, j.id, r.content_type, r.body from results r left join jobs j on j.result_id = r.id"
    )
    assert {(row["account_id"], row["id"]): (row["content_type"], row["body"]) for row in rows} == {
        key: states[-1].result
        for key, states in told.items()
        if key not in story.deleted and states[-1].result is not None
    }
    assert len(rows) == len({(row["account_id"], row["id"]) for row in rows})


def _report(key: Key, said: Said) -> Report:
    names = ("status", "progress", "error", "error_details", "metadata", "attempt", "retry")
    return Report(*key, **{name: getattr(said, name) for name in names})


def _seen(job: service.Job) -> dict[str, object]:
    names = ("id", "status", "version", "attempt", "progress", "error", "error_details", "metadata", "batch_id")
    return {name: getattr(job, name) for name in names} | {
        "started": job.started_at is not None,
        "completed": job.completed_at is not None,
        "result": job.has_result,
    }


def _as_seen(job: Job) -> dict[str, object]:
    names = ("id", "status", "version", "attempt", "progress", "error", "error_details", "metadata", "batch_id")
    return {name: getattr(job, name) for name in names} | {
        "started": job.started,
        "completed": job.finished,
        "result": job.result is not None,
    }


def _digest(result: model.Result) -> bytes:
    return hashlib.sha256(result[0].encode() + b"\0" + result[1]).digest()
