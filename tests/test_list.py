"""Pages of jobs, from outside: their shape, every filter against plain Python, cursors, totals, and whose jobs they are."""

from datetime import datetime, timedelta, timezone

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.identity import READ, WRITE
from service.job import operation_of
from tests.conftest import make_key

KEYS_OF_A_ROW = {
    "job_id", "status", "operation", "type", "created_at", "updated_at", "completed_at", "file_count", "tags",
    "batch_id", "user_id", "pdf_name", "progress", "error_details", "version",
}  # fmt: skip
UNLIMITED = {"list": "none", "write": "none", "poll": "none"}


@pytest.fixture
async def key(database):
    """A key of `acme` that may list as often as a test needs."""
    return await make_key(database, "acme", (READ, WRITE), UNLIMITED)


@pytest.fixture
async def other(database):
    """The headers of another account."""
    return {"X-API-Key": await make_key(database, "other", (READ, WRITE), UNLIMITED)}


async def create(client, *jobs, **options):
    answer = await client.post("/jobs", json=list(jobs), **options)
    assert answer.status == 201, await answer.text()
    return [job["id"] for job in (await answer.json())["jobs"]]


async def report(client, job_id, **said):
    answer = await client.patch(f"/jobs/{job_id}", json=said)
    assert answer.status == 200, await answer.text()


async def page(client, **asked):
    answer = await client.get("/jobs", params=asked)
    assert answer.status == 200, await answer.text()
    return await answer.json()


async def ids(client, **asked):
    return [job["job_id"] for job in (await page(client, **asked))["jobs"]]


async def refused(client, field, _headers=None, **asked):
    """The reason for which a field is refused."""
    answer = await client.get("/jobs", params=asked, headers=_headers)
    problem = await answer.json()
    assert answer.status == 422, problem
    assert problem["details"]["error_type"] == "validation_failed"
    return " ".join(problem["details"]["fields"][field])


async def store_directly(database, account, how_many, status="queued"):
    """Many jobs at once, past the service."""
    connection = await asyncpg.connect(database)
    await connection.execute("set session_replication_role = replica")
    await connection.execute(
        """insert into jobs (account_id, id, type, status, created_at, changed_at, updated_at, heartbeat_at)
           select a.id, 'many-' || n, 'parsing', $3, at, at, at, at
           from accounts a, generate_series(1, $2) n, lateral (select now() - n * interval '1 s' as at) t where a.name = $1""",
        *(account, how_many, status),
    )
    await connection.close()


# Shape


async def test_a_row_has_every_key_whatever_is_known(client):
    bare, full = await create(
        client,
        {"type": "chunking"},
        {"type": "extract", "file_count": 3, "tags": ["a", "b"], "batch_id": "b1", "user_id": "u", "pdf_name": "ä.pdf"},
    )
    await report(client, full, status="PROCESSING", progress={"percentage": 40, "step": "ocr"})
    await report(client, full, status="FAILED", error="page 7 is damaged")
    one = await (await client.get(f"/jobs/{full}")).json()
    rows = {row["job_id"]: row for row in (await page(client))["jobs"]}
    assert all(set(row) == KEYS_OF_A_ROW for row in rows.values())
    assert rows[bare] | {"created_at": "", "updated_at": ""} == {
        "job_id": bare, "status": "queued", "operation": "split", "type": "chunking", "created_at": "", "updated_at": "",
        "completed_at": None, "file_count": None, "tags": [], "batch_id": None, "user_id": None, "pdf_name": None,
        "progress": {}, "error_details": None, "version": 1,
    }  # fmt: skip
    assert rows[full] == {
        "job_id": full, "status": "failed", "operation": "extract", "type": "extraction", "file_count": 3,
        "tags": ["a", "b"], "batch_id": "b1", "user_id": "u", "pdf_name": "ä.pdf", "version": 3,
        "progress": {"percentage": 40, "step": "ocr"},
        "error_details": {"error_type": "job_failed", "message": "page 7 is damaged"},
        **{name: one[name] for name in ("created_at", "updated_at", "completed_at")},
    }  # fmt: skip


async def test_an_empty_account_has_an_empty_page(client):
    answer = await client.get("/jobs")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.headers["Cache-Control"] == "private, no-cache"
    pagination = {"total": 0, "limit": 50, "offset": 0, "has_more": False, "next_cursor": None}
    assert await answer.json() == {"jobs": [], "pagination": pagination}


async def test_a_page_shows_what_was_acknowledged_a_moment_ago(client):
    [job] = await create(client, {"type": "x"})
    for percentage in range(0, 100, 10):
        await report(client, job, status="PROCESSING", progress={"percentage": percentage})
        assert (await page(client))["jobs"][0]["progress"] == {"percentage": percentage}
    await client.delete(f"/jobs/{job}")
    assert await ids(client) == []


# Order and pages


async def test_newest_first_unless_asked_otherwise_and_ids_decide_between_jobs_of_one_moment(client):
    first = await create(client, *({"id": f"a-{n}", "type": "x"} for n in range(5)))
    second = await create(client, *({"id": f"B-{n}", "type": "x"} for n in range(5)))
    newest = sorted(second, reverse=True) + sorted(first, reverse=True)
    assert await ids(client) == await ids(client, order="desc") == newest
    assert await ids(client, order="asc") == newest[::-1]
    assert [await ids(client, limit=3, offset=offset) for offset in (0, 3, 9, 10, 10_000)] == [
        newest[:3], newest[3:6], newest[9:], [], [],
    ]  # fmt: skip


async def test_every_page_says_where_it_stands(client):
    await create(client, *({"type": "x"} for _ in range(7)))
    first = (await page(client, limit=3))["pagination"]
    assert (first["total"], first["limit"], first["offset"], first["has_more"]) == (7, 3, 0, True)
    last = (await page(client, limit=3, offset=6))["pagination"]
    assert last == {"total": 7, "limit": 3, "offset": 6, "has_more": False, "next_cursor": None}
    behind = (await page(client, limit=3, offset=99))["pagination"]
    assert behind == {"total": 7, "limit": 3, "offset": 99, "has_more": False, "next_cursor": None}
    beyond = (await page(client, limit=4, cursor=first["next_cursor"]))["pagination"]
    assert beyond == {"limit": 4, "offset": 0, "has_more": False, "next_cursor": None}


async def test_a_total_is_exact_to_ten_thousand_and_capped_beyond(client, database):
    await store_directly(database, "acme", 10_000)
    assert (await page(client, limit=1))["pagination"]["total"] == 10_000
    assert "total_capped" not in (await page(client, limit=1))["pagination"]
    await create(client, {"type": "parsing"})
    for asked in ({}, {"type": "parsing"}, {"status": "queued,failed"}, {"offset": 9_990}, {"offset": 10_000}):
        pagination = (await page(client, **asked))["pagination"]
        assert (pagination["total"], pagination["total_capped"]) == (10_000, True)
    assert (await page(client, offset=10_000))["pagination"]["has_more"] is False


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "limit": ["0", "101", "-1", "1.0", "", " 5", "1e1", "5\x00", "\u0665", "9" * 5000],
        "offset": ["-1", "10001", "x", ""],
        "status": ["", "done", "queued,", "queued;failed", ",", "queued,queued,x"],
        "order": ["", "DESC", "random"],
        "operation": ["", "Extract", "a b", "x" * 65, "extract,split"],
        "type": ["", "Parsing", "x/y", "x" * 65],
        "batch_id": ["", "a b", "-a", "x" * 129],
        "user_id": ["", "x" * 257, "a\x00b"],
        "tags": ["", "a,,b", ",", "x" * 65, ",".join(f"t{n}" for n in range(33)), ",".join(["t"] * 33), "\x00"],
        "created_after": ["", "now", "1705314600", "2024-13-01", "2024-01-15T25:00:00Z", "2024-01-15T10:30:00+00:00Z"],
        "created_before": ["2024-02-30", "2024-01-15T10:30:00+24:00", "0001-01-01T00:00:00+01:00", "\uff12024-01-15"],
        "cursor": ["", "x", "=", "a" * 301, "ü", "AAAA" * 20],
        "page": ["1"],
        "job_ids": ["a"],
    }.items(),
)
async def test_what_is_out_of_range_or_unknown_is_refused_by_name(client, field, values):
    for value in values:
        assert await refused(client, field, **{field: value}), value


async def test_a_parameter_counts_once(client):
    answer = await client.get("/jobs?limit=1&limit=2")
    assert answer.status == 422
    assert (await answer.json())["details"]["fields"] == {"limit": ["Given more than once."]}


async def test_several_values_come_by_comma_or_by_repetition(client):
    """Generated clients repeat the name."""
    for tags in (["a", "b", "c"], ["a", "b"], ["c"]):
        await create(client, {"id": "-".join(tags), "type": "parsing", "tags": tags})
    await client.patch("/jobs/c", json={"status": "FAILED"})
    for query, found in {
        "tags=a,b": {"a-b-c", "a-b"},
        "tags=a&tags=b": {"a-b-c", "a-b"},
        "tags=a,b&tags=c": {"a-b-c"},
        "status=failed&status=completed": {"c"},
        "status=failed&status=queued&order=asc": {"a-b-c", "a-b", "c"},
    }.items():
        answer = await client.get(f"/jobs?{query}")
        assert {job["job_id"] for job in (await answer.json())["jobs"]} == found, query
    for query in ("tags=a&tags=", "status=&status=failed"):
        assert (await client.get(f"/jobs?{query}")).status == 422, query


# Filters


async def test_operations_are_the_types_they_stand_for(client):
    types = ("extraction", "parsing", "splitting", "chunking", "classification", "ocr")
    made = dict(zip(types, await create(client, *({"type": job_type} for job_type in types)), strict=True))

    async def found(**asked):
        return {job_type for job_type, job in made.items() if job in await ids(client, **asked)}

    assert await found(operation="split") == {"splitting", "chunking"}
    assert await found(operation="extract") == {"extraction"}
    assert await found(operation="ocr") == {"ocr"}
    assert await found(operation="unheard.of") == set()
    assert await found(type="chunking") == {"chunking"}
    assert await found(type="extract") == {"extraction"}
    assert await found(type="chunking", operation="split") == {"chunking"}
    assert await found(type="parsing", operation="split") == set()


async def test_time_bounds_are_exclusive_in_every_form(client):
    [job] = await create(client, {"type": "x"})
    at = datetime.fromisoformat((await page(client))["jobs"][0]["created_at"])
    ms, east = timedelta(milliseconds=1), timezone(timedelta(hours=5, minutes=30))
    forms = [
        lambda at: at.isoformat(),
        lambda at: at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        lambda at: at.replace(tzinfo=None).isoformat(),  # naive is UTC
        lambda at: at.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z",  # utcnow().isoformat() + "Z"
        lambda at: at.isoformat().replace("+", " "),  # a plus that was not escaped
        lambda at: at.astimezone(east).isoformat(),
        lambda at: at.astimezone(east).strftime("%Y-%m-%dT%H:%M:%S.%f+0530"),
        lambda at: at.strftime("%Y-%m-%d %H:%M:%S.%f"),
        lambda at: at.strftime("%Y%m%dT%H%M%S.%fz"),
        lambda at: at.replace(tzinfo=None).isoformat(timespec="microseconds").replace(".", ",") + "000Z",
    ]
    for form in forms:
        written = form(at)
        assert await ids(client, created_after=written) == await ids(client, created_before=written) == [], written
        assert await ids(client, created_after=form(at - ms), created_before=form(at + ms)) == [job], written
    nanoseconds = at.strftime("%Y-%m-%dT%H:%M:%S.%f") + "001Z"
    assert await ids(client, created_before=nanoseconds) == [job]
    assert await ids(client, created_after=nanoseconds) == []
    tomorrow = at + timedelta(days=1)
    assert await ids(client, created_after=f"{at:%Y-%m-%d}", created_before=f"{tomorrow:%Y-%m-%d}") == [job]
    assert await ids(client, created_after=f"{tomorrow:%Y-%m-%d}") == []
    assert await ids(client, created_after=f"{at - timedelta(minutes=1):%Y-%m-%dT%H:%M}") == [job]


STATUSES = ("queued", "PROCESSING", "COMPLETED", "FAILED", "CANCELLED")
TYPES = ("extraction", "parsing", "splitting", "chunking", "ocr")
SOME = {
    "status": st.lists(st.sampled_from(STATUSES), min_size=1, max_size=5).map(
        lambda some: ",".join(word.upper() if len(some) % 2 else word.lower() for word in some)
    ),
    "type": st.sampled_from(TYPES),
    "operation": st.sampled_from(("extract", "parse", "split", "ocr", "none")),
    "batch_id": st.sampled_from(("b0", "b1", "b2", "none")),
    "user_id": st.sampled_from(("u0", "u1", "none")),
    "tags": st.lists(st.sampled_from(("t0", "t1", "t2", "all", "none")), min_size=1, max_size=3).map(",".join),
    "created_after": st.integers(0, 29),
    "created_before": st.integers(0, 29),
}


def matches(row, asked, moments):
    """What the filters mean, in plain Python."""
    return (
        ("status" not in asked or row["status"] in asked["status"].lower().split(","))
        and ("type" not in asked or row["type"] == asked["type"])
        and ("operation" not in asked or operation_of(row["type"]) == asked["operation"])
        and ("batch_id" not in asked or row["batch_id"] == asked["batch_id"])
        and ("user_id" not in asked or row["user_id"] == asked["user_id"])
        and ("tags" not in asked or set(asked["tags"].split(",")) <= set(row["tags"]))
        and ("created_after" not in asked or row["created_at"] > moments[asked["created_after"]])
        and ("created_before" not in asked or row["created_at"] < moments[asked["created_before"]])
    )


@pytest.fixture
async def rows(client, other):
    """300 jobs of 30 moments, in all states; as they are listed, oldest first. Another account has one that fits all."""
    made = []
    for moment in range(30):
        jobs = (
            {
                "type": TYPES[n % 5],
                "batch_id": (None, "b0", "b1", "b2")[(n + moment) % 4],
                "user_id": (None, "u0", "u1")[(n * 7 + moment) % 3],
                "tags": [f"t{k}" for k in range(3) if (n + moment) >> k & 1] + ["all"] * (n % 9 > 0),
            }
            for n in range(10)
        )
        made += await create(client, *jobs)
    ends = [{"id": job, "status": STATUSES[n * 3 % 5]} for n, job in enumerate(made) if n * 3 % 5]
    assert (await client.patch("/jobs", json=ends)).status == 200
    await create(client, {"type": "ocr", "tags": ["t0", "all"], "batch_id": "b0", "user_id": "u0"}, headers=other)
    pages = [await page(client, order="asc", limit=100, offset=offset) for offset in (0, 100, 200)]
    return [row for body in pages for row in body["jobs"]]


@settings(max_examples=150)
@given(
    asked=st.fixed_dictionaries({}, optional=SOME),
    order=st.sampled_from(("asc", "desc")),
    limit=st.integers(1, 100),
    by_cursor=st.booleans(),
)
async def test_any_filters_together_are_what_they_are_in_plain_python(client, rows, asked, order, limit, by_cursor):
    moments = sorted({row["created_at"] for row in rows})
    assert len(rows) == 300 and len(moments) == 30 and {row["status"] for row in rows} == {s.lower() for s in STATUSES}
    expected = [row for row in rows if matches(row, asked, moments)]
    expected = expected if order == "asc" else expected[::-1]
    params = asked | {name: moments[asked[name]] for name in ("created_after", "created_before") if name in asked}
    found, more = [], {}
    while True:
        body = await page(client, **params, order=order, limit=limit, **more)
        found += body["jobs"]
        if "cursor" not in more:
            assert body["pagination"]["total"] == len(expected)
        assert body["pagination"]["has_more"] == (len(found) < len(expected))
        if not body["pagination"]["has_more"]:
            break
        more = {"cursor": body["pagination"]["next_cursor"]} if by_cursor else {"offset": len(found)}
    assert found == expected


# Whose


async def test_another_account_sees_nothing_with_any_filter_or_cursor(client, other):
    filters = {"status": "queued", "type": "x", "batch_id": "b1", "user_id": "u", "tags": "t", "operation": "x"}
    mine = await create(client, *({"type": "x", "batch_id": "b1", "user_id": "u", "tags": ["t"]} for _ in range(3)))
    cursor = (await page(client, limit=1))["pagination"]["next_cursor"]
    assert len(await ids(client, cursor=cursor)) == 2
    for asked in ({}, filters, *({name: value} for name, value in filters.items()), {"status": "queued,failed"}):
        assert (await (await client.get("/jobs", params=asked, headers=other)).json())["pagination"]["total"] == 0
    assert "no cursor of a list of yours" in await refused(client, "cursor", _headers=other, cursor=cursor)
    theirs = await create(client, {"type": "x"}, {"type": "x"}, headers=other)
    shown = (await (await client.get("/jobs", headers=other)).json())["jobs"]
    assert {row["job_id"] for row in shown} == set(theirs)
    assert set(await ids(client)) == set(mine)


async def test_a_list_needs_the_scope_to_read_and_a_place_of_its_own_limit(client, database):
    assert (await client.get("/jobs", headers={"X-API-Key": "jw_unknown"})).status == 401
    writer = {"X-API-Key": await make_key(database, "acme", (WRITE,))}
    assert (await client.get("/jobs", headers=writer)).status == 403
    limited = {"X-API-Key": await make_key(database, "acme", (READ,))}
    answers = [await client.get("/jobs", headers=limited) for _ in range(61)]
    assert [answer.status for answer in answers] == [200] * 60 + [429]
    assert answers[0].headers["RateLimit-Policy"] == '"list";q=60;w=60'
    assert answers[0].headers["RateLimit"].startswith('"list";r=59;')
