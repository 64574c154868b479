"""Clients that were written for other APIs of this kind, run as they are against a server and a worker.

`tests/documented/` holds them: each takes the address and the key from its environment, and names from its arguments.
"""

import asyncio
import itertools
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from service.identity import READ, WRITE
from tests.conftest import environment_of, fresh_database, make_key
from tests.http import ask, create, fields_of, report
from tests.web_process import WebProcess

DOCUMENTED = Path(__file__).parent / "documented"
RUN_BY = {".py": [sys.executable], ".mjs": ["node"], ".sh": ["sh"]}
NEEDS = {".py": (), ".mjs": ("node",), ".sh": ("curl",)}
STEP_s = 0.15
RESULT = b'{"pages":4,"fields":{"total":"12.50"}}'

_known: set[str] = set()


def clients(name: str) -> pytest.MarkDecorator:
    """Every client of this name, in each language in which it is there."""
    files = sorted(file.name for file in DOCUMENTED.glob(f"{name}.*"))
    _known.update(files)
    return pytest.mark.parametrize("file", files)


class Running:
    """A client at work."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []

    async def line(self, wanted: str = "") -> str:
        """The next line that holds `wanted`."""
        async with asyncio.timeout(30):
            while line := (await self._process.stdout.readline()).decode():
                self.lines.append(line.rstrip("\n"))
                if wanted in line:
                    return self.lines[-1]
        raise AssertionError(f"ended without {wanted!r}: {self.lines}, {await self._process.stderr.read()}")

    async def end(self) -> tuple[int, list[str], str]:
        """The exit code, all lines of stdout, and the last line of stderr."""
        async with asyncio.timeout(60):
            out, err = await self._process.communicate()
        self.lines += out.decode().splitlines()
        return self._process.returncode, self.lines, (err.decode().splitlines() or [""])[-1]


class Account:
    """An account on the server: its key, what its owner does beside the client, and its worker."""

    def __init__(self, url: str, database: str, name: str, key: str, session: aiohttp.ClientSession) -> None:
        self.url, self.key, self.session = url, key, session
        self._database, self._name = database, name

    async def limited_key(self, **limits: str) -> str:
        return await make_key(self._database, self._name, (READ, WRITE), limits)

    async def foreign_job(self, job_id: str) -> None:
        """One of somebody else."""
        stranger = {"X-API-Key": await make_key(self._database, f"stranger-of-{self._name}")}
        await ask(self.session, "POST", "/jobs", json={"id": job_id, "type": "x"}, headers=stranger)

    async def create(self, job_id: str, pdf_name: str = "report.pdf", **fields) -> dict:
        return await create(self.session, id=job_id, pdf_name=pdf_name, **fields)

    @asynccontextmanager
    async def running(self, file: str, *arguments: str, key: str | None = None) -> AsyncIterator[Running]:
        """The client `file`, with nothing in its environment but what it is told."""
        kind = Path(file).suffix
        for tool in NEEDS[kind]:
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed, so {file} cannot run")
        process = await asyncio.create_subprocess_exec(
            *(*RUN_BY[kind], str(DOCUMENTED / file), *arguments),
            env={"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1", "API_URL": self.url, "API_KEY": key or self.key},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            yield Running(process)
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    async def run(self, file: str, *arguments: str, key: str | None = None) -> tuple[int, list[str], str]:
        async with self.running(file, *arguments, key=key) as client:
            return await client.end()

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[None]:
        """Works through what is queued."""
        working = asyncio.create_task(self._work())
        try:
            yield
            assert not working.done() or working.result()
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _work(self) -> None:
        taken: set[str] = set()
        async with asyncio.TaskGroup() as group:
            while True:
                page = (await ask(self.session, "GET", "/jobs?status=queued&order=asc&limit=100")).json()
                for job in page["jobs"]:
                    if job["job_id"] not in taken:
                        taken.add(job["job_id"])
                        group.create_task(self._work_on(job["job_id"], job["pdf_name"]))
                await asyncio.sleep(1)

    async def _work_on(self, job_id: str, pdf_name: str) -> None:
        """What becomes of a document stands in its name."""
        await report(self.session, job_id, status="PROCESSING")
        for page in (1, 2, 3):
            await asyncio.sleep(STEP_s)
            await report(self.session, job_id, progress={"percentage": page * 25, "message": f"page {page} of 4"})
        await asyncio.sleep(STEP_s)
        if pdf_name.startswith("broken"):
            details = {"error_type": "damaged_page", "message": "page 3 is damaged"}
            await report(self.session, job_id, status="FAILED", error_details=details)
        elif pdf_name.startswith("unwanted"):
            await ask(self.session, "POST", f"/jobs/{job_id}/cancel", json={"reason": "not needed any more"})
        else:
            path = f"/jobs/{job_id}/result?complete=true"
            stored = await ask(self.session, "PUT", path, data=RESULT, headers={"Content-Type": "application/json"})
            assert stored.status == 200


@pytest.fixture(scope="module")
async def server(postgres_server, template, redis_server) -> AsyncIterator[tuple[str, str]]:
    """One for all clients, and its database; each test has an account of its own."""
    async with fresh_database(postgres_server, template) as database:
        process = await WebProcess.start(environment_of(database, redis_server.url))
        yield process.url, database
        await process.stop()


_numbers = itertools.count(1)


@pytest.fixture
async def account(server) -> AsyncIterator[Account]:
    """With the limits that every key has."""
    url, database = server
    name = f"acme-{next(_numbers)}"
    key = await make_key(database, name)
    async with aiohttp.ClientSession(url, headers={"X-API-Key": key}) as session:
        yield Account(url, database, name, key, session)


def in_order(statuses: list[str], *states: str) -> bool:
    """Whether these are the states, each once or more, in this order; those in the middle may not have been seen."""
    first, *middle, last = states
    pattern = f"({first} )+" + "".join(f"({state} )*" for state in middle) + f"{last} "
    return re.fullmatch(pattern, "".join(f"{status} " for status in statuses)) is not None


def test_every_client_is_run():
    assert _known == {file.name for file in DOCUMENTED.iterdir() if file.suffix in RUN_BY}


# One job


@clients("poll_until_done")
async def test_polling_until_done(account, file):
    created = await account.create("job")
    async with account.running(file, "job") as client:
        assert await client.line() == "status: queued"
        async with account.worker():
            code, [*told, summary], _ = await client.end()
    job = (await ask(account.session, "GET", "/jobs/job")).json()
    assert code == 0
    assert in_order([line.removeprefix("status: ") for line in told], "queued", "PROCESSING", "COMPLETED")
    assert summary == f"report.pdf (extraction) took from {created['created_at']} to {job['updated_at']}"


@clients("poll_until_done")
async def test_polling_a_job_that_fails(account, file):
    await account.create("job", "broken.pdf")
    async with account.running(file, "job") as client:
        await client.line()
        async with account.worker():
            code, told, error = await client.end()
    assert (code, error) == (1, "broken.pdf failed: page 3 is damaged")
    assert in_order([line.removeprefix("status: ") for line in told], "queued", "PROCESSING", "FAILED")


@clients("poll_until_done")
async def test_polling_no_longer_than_one_will(account, file):
    await account.create("job")
    code, told, error = await account.run(file, "job", "1")
    assert code == 1
    assert set(told) == {"status: queued"}
    assert re.search(r"job job was not done within 1(\.0)? seconds", error)


@clients("poll_until_done")
async def test_a_cancelled_job_is_waited_for_by_who_knows_only_two_ends(account, file):
    """The state is a word of its own: no client takes it for success or failure."""
    await account.create("job")
    await ask(account.session, "POST", "/jobs/job/cancel")
    code, told, error = await account.run(file, "job", "1")
    assert code == 1
    assert set(told) == {"status: CANCELLED"}
    assert "not done" in error


@clients("poll_with_backoff")
@pytest.mark.parametrize(
    ("pdf_name", "end", "summary"),
    [
        ("report.pdf", "completed", "extract completed at "),
        ("broken.pdf", "failed", "extract failed: damaged_page: page 3 is damaged"),
        ("unwanted.pdf", "cancelled", "extract cancelled: job_failed: not needed any more"),
    ],
)
async def test_polling_with_growing_pauses(account, file, pdf_name, end, summary):
    await account.create("job", pdf_name)
    async with account.running(file, "job") as client:
        assert await client.line() == "attempt 1: queued 0% "
        async with account.worker():
            code, told, error = await client.end()
    if end == "completed":
        error = told.pop()
    assert code == (0 if end == "completed" else 1)
    assert error.startswith(summary)
    asked = [re.fullmatch(r"attempt (\d+): (\w+) (\d+)% (page \d of 4)?", line).groups() for line in told]
    assert [int(attempt) for attempt, *_ in asked] == list(range(1, len(asked) + 1))
    assert in_order([status for _, status, *_ in asked], "queued", "processing", end)
    percentages = [int(percentage) for _, _, percentage, _ in asked]
    assert percentages == sorted(percentages)


@clients("poll_when_changed")
async def test_polling_only_for_what_has_changed(account, file):
    await account.create("job")
    async with account.running(file, "job") as client:
        assert await client.line() == "version 1: queued"
        await asyncio.sleep(0.6)
        async with account.worker():
            code, [*told, unchanged], _ = await client.end()
    versions = [int(line.split()[1].rstrip(":")) for line in told]
    assert code == 0
    assert versions == sorted(set(versions)), "each version is told once"
    assert in_order([line.split()[2] for line in told], "queued", "PROCESSING", "COMPLETED")
    assert int(re.fullmatch(r"not changed: (\d+) times", unchanged).group(1)) >= 1


@clients("process_document")
async def test_handing_a_document_in_and_reading_its_result(account, file):
    for pdf_name, ends in (("report.pdf", (0, "4 pages")), ("broken.pdf", (1, "page 3 is damaged (damaged_page)"))):
        async with account.running(file, pdf_name) as client:
            assert re.fullmatch(r"job [0-9a-f-]{36} is queued", await client.line())
            async with account.worker():
                code, told, error = await client.end()
        assert (code, told[-1] if code == 0 else error.removeprefix("failed: ")) == ends


# Results


@clients("fetch_result")
async def test_fetching_a_result_before_there_is_one(account, file, tmp_path):
    await account.create("job")
    async with account.running(file, "job", str(tmp_path / "result")) as client:
        assert await client.line() == "409: Job job is still processing"
        async with account.worker():
            code, told, _ = await client.end()
    assert (code, told[-1]) == (0, f"saved {len(RESULT)} bytes of application/json")
    assert set(told[:-1]) == {"409: Job job is still processing"}
    assert (tmp_path / "result").read_bytes() == RESULT


@clients("fetch_result")
async def test_fetching_a_result_that_never_comes(account, file, tmp_path):
    for job_id, said, refusal in (
        ("failed", {"status": "FAILED", "error": "page 3 is damaged"}, "409: Job failed failed: page 3 is damaged"),
        ("without", {"status": "COMPLETED"}, "404: Result for job without not found"),
        ("deleted", None, "404: Job deleted not found"),
    ):
        await account.create(job_id)
        if said is None:
            await ask(account.session, "DELETE", f"/jobs/{job_id}")
        else:
            await report(account.session, job_id, **said)
        assert (await account.run(file, job_id, str(tmp_path / job_id)))[:2] == (1, [refusal])


# Many jobs


async def create_batch(account: Account, *, close: bool, third: str = "last.pdf") -> None:
    jobs = [
        {"id": job_id, "type": "extraction", "batch_id": "batch", "pdf_name": pdf_name, "close_batch": close}
        for job_id, pdf_name in (("first", "report.pdf"), ("second", "broken.pdf"), ("third", third))
    ]
    assert (await ask(account.session, "POST", "/jobs", json=jobs)).status == 201


def percents(told: list[str]) -> list[int]:
    return [int(line.split()[1].rstrip("%")) for line in told if " completed, " in line]


@clients("monitor_batch")
async def test_monitoring_a_batch(account, file):
    await create_batch(account, close=True)
    async with account.running(file, "batch") as client:
        assert await client.line() == "queued: 0% (0 completed, 0 failed of 3)"
        async with account.worker():
            code, told, _ = await client.end()
    assert code == 1, "one has failed"
    jobs = [line for line in told if " extract " in line]
    assert jobs == [] or jobs == [
        "first extract completed 100%",
        "second extract failed 75%",
        "third extract completed 100%",
    ]
    assert told[len(told) - len(jobs) - 1] == "completed_with_failures: 100% (2 completed, 1 failed of 3)"
    assert percents(told) == sorted(percents(told))


@clients("monitor_batch")
async def test_a_batch_is_at_100_percent_with_its_jobs_and_over_once_it_is_closed(account, file):
    """Who counts, or watches the percentage, is done with the last job; who waits for the end, with the closing."""
    await create_batch(account, close=False)
    async with account.running(file, "batch") as client:
        async with account.worker():
            assert await client.line("100%") == "processing: 100% (2 completed, 1 failed of 3)"
        if file == "monitor_batch.py":
            await client.line("100%")
            await ask(account.session, "POST", "/jobs/batch/batch/close")
            await client.line("completed_with_failures: 100%")
        assert (await client.end())[0] == 1


async def test_cancelled_jobs_of_a_batch_are_counted_by_themselves(account):
    await create_batch(account, close=True, third="unwanted.pdf")
    async with account.running("monitor_batch.py", "batch") as client, account.worker():
        code, told, _ = await client.end()
    assert code == 1
    assert "completed_with_failures: 100% (1 completed, 1 failed of 3)" in told
    assert (await ask(account.session, "GET", "/jobs/batch/batch")).json()["cancelled_jobs"] == 1


@clients("check_many")
async def test_checking_several_jobs_at_once(account, file):
    await account.create("one")
    await account.create("two", "broken.pdf")
    await account.foreign_job("theirs")
    async with account.running(file, "one", "nobody", "two", "theirs") as client:
        assert await client.line() == "2 of 4 done"
        async with account.worker():
            code, told, _ = await client.end()
    assert code == 0
    assert told[-5:] == [
        "4 of 4 done",
        "one: completed 100%",
        "nobody: not_found",
        "two: failed 75%",
        "theirs: forbidden",
    ]


@clients("check_many")
async def test_200_minted_ids_fit_into_an_address(account, file):
    """Each comma takes three characters, as these libraries write it."""
    jobs = [{"type": "x"} for _ in range(200)]
    created = (await ask(account.session, "POST", "/jobs", json=jobs)).json()["jobs"]
    ids = [job["id"] for job in created]
    ends = [{"id": job_id, "status": "COMPLETED"} for job_id in ids]
    assert (await ask(account.session, "PATCH", "/jobs", json=ends)).status == 200
    code, told, _ = await account.run(file, *ids)
    assert (code, told) == (0, ["200 of 200 done", *(f"{job_id}: completed 100%" for job_id in ids)])


# Lists


@clients("list_recent")
async def test_listing_page_by_page(account, file):
    types = ("extraction", "splitting", "chunking")
    made = [
        {"id": f"job-{n:02}", "type": types[n % 3], "tags": ["prod", "eu"] if n % 4 == 0 else ["prod"]}
        for n in range(23)
    ]
    for job in made:
        await create(account.session, **job)
    for n in (3, 8):
        await report(account.session, f"job-{n:02}", status="FAILED", error=f"page {n} is damaged")
    operations = {"extraction": "extract", "splitting": "split", "chunking": "split"}
    for arguments, found in (
        ((), [*range(23)]),
        (("failed",), [3, 8]),
        (("QUEUED,failed", "prod,eu"), [*range(0, 23, 4)]),
        (("completed",), []),
    ):
        code, [*told, total], _ = await account.run(file, *arguments)
        assert (code, total) == (0, f"total: {len(found)}")
        for line, n in zip(told, reversed(found), strict=True):
            status = "failed" if n in (3, 8) else "queued"
            assert line.startswith(f"job-{n:02} {operations[types[n % 3]]} {status}")
            assert file.endswith(".sh") or line.endswith(f": page {n} is damaged") == (status == "failed")


# Refusals


@clients("handle_errors")
async def test_handling_refusals(account, file):
    await account.foreign_job("theirs")
    await account.create("mine")
    await account.create("deleted")
    await ask(account.session, "DELETE", "/jobs/deleted")
    assert (await account.run(file, "mine"))[:2] == (0, ["status: queued"])
    suggestions = [
        "- Check the job ID for typos",
        "- Verify that the job belongs to your account",
        "- The job may have been deleted after the retention period",
    ]
    for job_id, error_type in (("nobody", "not_found"), ("deleted", "deleted")):
        first = f"Job not found ({error_type}): Job with ID '{job_id}' does not exist"
        assert (await account.run(file, job_id))[:2] == (4, [first, *suggestions])
    code, told, _ = await account.run(file, "theirs")
    assert (code, told[0]) == (3, "not yours: Job theirs belongs to another account")
    assert "- Check that the job belongs to your account." in told
    code, told, _ = await account.run(file, "mine", key="jw_of_nobody")
    assert (code, told[0][:13], told[1][:19]) == (1, "who are you? ", "- Send the key in X")


@clients("wait_out_rate_limit")
async def test_waiting_as_long_as_the_limit_says(account, file):
    """Waiting so long succeeds: nobody is refused twice in a row."""
    await account.create("job")
    limited = await account.limited_key(poll="4/3")
    code, told, _ = await account.run(file, "job", "7", key=limited)
    assert code == 0
    assert [line for line in told if "waiting" not in line] == [f"{n}: queued" for n in range(1, 8)]
    waits = [n for n, line in enumerate(told) if "waiting" in line]
    assert file.endswith(".sh") or waits, "it came to the limit"
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(waits))


@clients("retrying_session")
async def test_a_library_that_retries_by_itself(account, file):
    await account.create("job")
    limited = await account.limited_key(poll="4/3")
    code, told, _ = await account.run(file, "job", "7", key=limited)
    assert code == 0
    assert [line.split(" (")[0] for line in told] == [f"{n}: queued" for n in range(1, 8)]
    retries = [int(re.search(r"\((\d+) retries\)", line).group(1)) for line in told]
    assert set(retries) == {0, 1}


# Where we differ on purpose from what such APIs usually say


async def test_a_misspelt_filter_is_refused_and_not_ignored(account):
    for query, field in (
        ("state=failed", "state"),
        ("page=2", "page"),
        ("limit=500", "limit"),
        ("limit=0", "limit"),
        ("offset=20000", "offset"),
        ("status=finished", "status"),
    ):
        assert fields_of(await ask(account.session, "GET", f"/jobs?{query}")) == [field]


async def test_a_list_is_written_either_way_and_nothing_else_is_given_twice(account):
    by_comma, repeated = ("job_ids=a,b", "job_ids=a&job_ids=b")
    first = await ask(account.session, "GET", f"/jobs/status?{by_comma}")
    assert first.json() == (await ask(account.session, "GET", f"/jobs/status?{repeated}")).json()
    answer = await ask(account.session, "GET", "/jobs?limit=1&limit=2")
    assert fields_of(answer) == ["limit"]


async def test_progress_is_an_object_but_in_a_batch_where_it_is_a_number(account):
    await account.create("job", batch_id="batch", progress={"percentage": 40, "message": "page 2 of 5"})
    whole = {"percentage": 40, "message": "page 2 of 5"}
    for path in ("/jobs/job", "/jobs/job/status"):
        assert (await ask(account.session, "GET", path)).json()["progress"] == whole
    for path in ("/jobs", "/jobs/status?job_ids=job&include_progress=true"):
        assert (await ask(account.session, "GET", path)).json()["jobs"][0]["progress"] == whole
    batch = (await ask(account.session, "GET", "/jobs/batch/batch?include_progress=true")).json()
    assert batch["jobs"][0]["progress"] == 40
