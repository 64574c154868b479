"""Queries that no address takes, and text in queries that looks dangerous and finds what it says."""

from urllib.parse import quote, unquote_plus

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile import TYPED
from tests.http import ask, connected, create, fields_of, head

# Values as they stand in a query, parted by blanks.
NO_NUMBERS = (
    "-1 +1 %201 1%20 1e9 1.0 0x10 1_0 1,2 1;drop 18446744073709551616 %D9%A1%D9%A2 %EF%BC%91 %E2%85%A0 %00 1%00 %ff NaN "
    "Infinity null true [] "
)
NO_FLAGS = "TRUE tRuE FALSE yes no on off t f 2 -1 01 1.0 %201 true%20 'true' true,false null None %00 "
NO_TIMES = (
    "yesterday now today infinity -infinity epoch null 0 1705314600 2024 24-01-15 2024-13-01 2024-02-30 2023-02-29 2024- "
    "0000-01-01 10000-01-01 99999-01-01 2024-W03-1 2024-015 10:30 2024-01-15T 2024-01-15T24:00:00Z 2024-01-15T10:60:00Z "
    "2024-01-15T10:30:60Z 2024-01-15T10:30:00.Z 2024-01-15T10:30:00.1234567890123Z 2024-01-15T10:30:00ZZ "
    "2024-01-15T10:30:00+99:00 2024-01-15T10:30:00%E2%88%9201:00 0001-01-01T00:00:00+23:59 '2024-01-15' 2024-01-15%0A "
    "2024-01-15T10:30:00Z%00 %D9%A2%D9%A0%D9%A2%D9%A4-01-15 %00 "
)
OF_A_PAGE = {
    "limit": NO_NUMBERS + "0 101 " + "9" * 5000,
    "offset": NO_NUMBERS + "-0 10001 1000000000 0&cursor=AAAA " + "9" * 5000,
    "status": ", failed,, finished 'or'1'='1 queued;drop null %00 failed%00 %EF%BC%A6AILED FA%C4%B0LED",
    "operation": "Extract split,parse a%20b a/b ' %C3%B6 %00",
    "type": "Extraction a%0Ab %22x%22 * %00 " + "x" * 65,
    "batch_id": "../b b,c '--b b%0A %C3%B6 %00 b%00 " + "b" * 129,
    "user_id": "%00 u%00 " + "u" * 257,
    "tags": f", a, a,,b %00 a%00 {'x' * 65} {','.join(map(str, range(33)))} {','.join(map(str, range(1000)))}",
    "order": "DESC descending asc;drop asc,desc 1 %00",
    "created_after": NO_TIMES,
    "created_before": NO_TIMES + "9999-12-31T23:59:59.9999999Z",
    "cursor": f"AAAA 0 null .. ==== ' a%0D%0AX-Evil:1 %C3%B6 %00 {'A' * 240} {'A' * 300} {'A' * 301} {'A' * 7000}",
}
WRONG = {
    "GET /jobs?": OF_A_PAGE,
    "GET /jobs/status?": {"job_ids": f", x, ,x x,,x x%2C x%00 %00 {'x,' * 200}x {'x,' * 3000}x"},
    "GET /jobs/status?job_ids=x&": {"include_progress": NO_FLAGS},
    "GET /jobs/batch/b?": {"include_progress": NO_FLAGS},
    "GET /jobs/x/history?": {
        "limit": NO_NUMBERS + "0 1001 " + "9" * 5000,
        "after_version": NO_NUMBERS + "9007199254740993 " + "9" * 5000,
    },
}


async def test_values_that_no_parameter_takes(client, untouched, subtests):
    for address, fields in WRONG.items():
        async with connected(client) as socket:
            for field, values in fields.items():
                for query in [field, f"{field}=", *(f"{field}={value}" for value in values.split())]:
                    with subtests.test(f"{address}{query[:40]}"):
                        await socket.say(head(client, address + query))
                        assert fields_of(await socket.answer()) == [field]
                        await untouched()


ADDRESSES = {
    # address: a query that it takes
    "GET /jobs": "limit=1&",
    "GET /jobs/status": "job_ids=x&",
    "GET /jobs/batch/b": "include_progress=1&",
    "GET /jobs/x": "",
    "GET /jobs/x/status": "",
    "GET /jobs/done/result": "",
    "GET /jobs/x/history": "limit=1&",
    "GET /jobs/done/events": "last_event_id=1-1&",
    "POST /jobs/status": "",
    "POST /jobs/batch/b/close": "",
}
UNKNOWN = {
    # query: the name that is refused
    "colour=red": "colour",
    "=": "",
    "=x": "",
    "%00=1": "\0",
    "%ff=1": "\ufffd",
    "%ed%a0%80=1": "\ufffd\ufffd\ufffd",
    "a%0D%0AX-Evil:1": "a\r\nX-Evil:1",
    "a[]=1": "a[]",
    "limit[$gt]=1": "limit[$gt]",
    "Limit=1": "Limit",
    "JOB_IDS=x": "JOB_IDS",
    "%EF%BD%8Cimit=1": "\uff4cimit",
    "job_id=x": "job_id",
    "__proto__=1": "__proto__",
    "account_id=1": "account_id",
    "id'%20or%201=1--": "id' or 1",
    "x" * 5000: "x" * 5000,
    "&".join(f"a{n}" for n in range(1000)): "a0",
}


async def test_parameters_nobody_knows(client, untouched, subtests):
    for address, known in ADDRESSES.items():
        async with connected(client) as socket:
            for query, name in UNKNOWN.items():
                with subtests.test(f"{address} {query[:40]}"):
                    body = b'{"job_ids":["x"]}' if address == "POST /jobs/status" else b""
                    asked = f"{address}?{known}{query}"
                    await socket.say(head(client, asked, TYPED, f"Content-Length: {len(body)}") + body)
                    answer = await socket.answer()
                    named = fields_of(answer)
                    assert name in named
                    assert not known or known.partition("=")[0] not in named
                    assert "X-Evil" not in answer.headers
                    await untouched()


PARAMETERS = {
    "GET /jobs": " ".join(OF_A_PAGE),
    "GET /jobs/status": "job_ids include_progress",
    "GET /jobs/batch/b": "include_progress",
    "GET /jobs/x/history": "limit after_version",
    "GET /jobs/x/events": "last_event_id",
}


LISTS = {"job_ids", "status", "tags"}
"""Of these several values may be given either way: by comma, or each with the name before it."""


async def test_parameters_that_are_given_twice(client, untouched, subtests):
    async with connected(client) as socket:
        for address, parameters in PARAMETERS.items():
            for name in set(parameters.split()) - LISTS:
                encoded = f"%{ord(name[0]):x}{name[1:]}"
                for query in (f"{name}=1&{name}=1", f"{name}=&{name}=1", f"{name}=1&{name}", f"{encoded}=1&{name}=1"):
                    with subtests.test(f"{address} {query}"):
                        await socket.say(head(client, f"{address}?{query}"))
                        assert fields_of(await socket.answer()) == [name]
                        await untouched()


async def test_10_000_ids_do_not_fit_into_an_address(client, untouched):
    for ids in (["x"] * 10_000, [f"job-{n}" for n in range(10_000)]):
        async with connected(client) as socket:
            await socket.say(head(client, f"GET /jobs/status?job_ids={','.join(ids)}"))
            (await socket.answer()).problem(400, "malformed")
        await untouched()


TEXTS = [
    "'; drop table jobs; --",
    "' or '1'='1",
    '"',
    "\\",
    "%",
    "_",
    "%zz %s {0} $1 ${jndi:ldap://a/b} {{7*7}}",
    "a\r\nX-Evil: 1\r\n\r\n<html>",
    "<script>alert(1)</script>",
    "\u2028\u202e\ufeff\x01\x7f\x85",
    " both ends ",
    "{a}",
    "null",
    "e\u0301",
    "\u00e9",
    "😀",
]


async def test_filters_find_dangerous_text_to_the_letter_and_nothing_else(client, subtests):
    """`é` in one and in two characters are two texts, `%` and `_` are no wildcards, blanks are not cut off."""
    for n, text in enumerate(TEXTS):
        await create(client, id=f"user-{n}", user_id=text)
        await create(client, id=f"tag-{n}", tags=[text, "all"])
    for n, text in enumerate(TEXTS):
        for field, value, found in (
            ("user_id", text, f"user-{n}"),
            ("tags", text, f"tag-{n}"),
            ("tags", f"all,{text}", f"tag-{n}"),
        ):
            with subtests.test(f"{field} {value}"):
                answer = await ask(client, "GET", f"/jobs?{field}={quote(value, safe='')}")
                body = answer.json()
                assert ([job["job_id"] for job in body["jobs"]], body["pagination"]["total"]) == ([found], 1)
                assert b"\n" not in answer.body
                assert "X-Evil" not in answer.headers


async def test_ids_in_a_query_that_no_job_can_have_are_told_to_the_letter(client, untouched, subtests):
    for text in [*TEXTS, "x/status", "batch/b", "../x", "status", "X", "\uff58", "x\u0301", "x" * 129, "\ufffd"]:
        with subtests.test(text[:40]):
            answer = await ask(client, "GET", f"/jobs/status?job_ids=x,{quote(text, safe='')},x&include_progress=0")
            [before, line, after] = answer.json()["jobs"]
            assert before == after == {"job_id": "x", "status": "queued", "version": 1}
            assert (line["job_id"], line["status"], line["error"]["error_type"]) == (text, None, "not_found")
            assert "X-Evil" not in answer.headers
            await untouched()


# Anything

NAMES = [*OF_A_PAGE, "job_ids", "include_progress", "after_version", "colour", ""]
VALUES = [
    *("1", "x", "true", "failed", "2024-01-15T10:30:00Z"),
    *(unquote_plus(value)[:300] for fields in WRONG.values() for values in fields.values() for value in values.split()),
]


@settings(max_examples=300)
@given(
    address=st.sampled_from([address for address in ADDRESSES if "events" not in address]),
    asked=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES) | st.text(max_size=20)), max_size=4),
    unquoted=st.sampled_from(["", "&=;+%,"]),
)
async def test_any_query_is_answered_or_refused_by_name(client, address, asked, unquoted):
    method, path = address.split()
    query = "&".join(f"{name}={quote(value, safe=unquoted, errors='replace')}" for name, value in asked)
    answer = await ask(client, method, f"{path}?{query}", json={"job_ids": ["x"]} if method == "POST" else None)
    if answer.status == 422:
        assert unquoted or set(fields_of(answer)) <= {name for name, _ in asked} | {"job_ids"}
    else:
        answer.problem(404, "not_found") if answer.status != 200 else answer.json()
