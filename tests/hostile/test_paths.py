"""Paths that lead nowhere: names that no job and no batch can have, and addresses that only look like ours."""

from tests.http import ask, connected, head

NO_IDS = (
    "%00 x%00 %0a x%0a x%0d%0aX-Evil:1 . .. %2e%2e %2E %2f x%2f x%2F..%2Fdone ..%2f..%2fetc%2fpasswd %5c.. %ff %ed%a0%80 "
    "%c0%80 %F0%9F%98%80 %zz % %2 %2500 x%20 %20x x'-- x;y x,done x*y -x .x _x $x {job_id} %7Bjob_id%7D x%3Fy x%23y "
    "'%20or%201=1-- %E2%80%AE ./x x+x x%252fstatus x%2fstatus x%5cstatus %EF%BD%98 x%CC%81 x%C2%A0 x%E2%80%8B %uff58"
)
NO_NAMES = [*NO_IDS.split(), "x" * 129, "x" * 5000]
OF_A_JOB = ("", "/status", "/result", "/results", "/history", "/events")


async def is_refused(client, socket, address: str, status: int, error_type: str) -> str:
    """The sentence of the refusal."""
    await socket.say(head(client, address))
    answer = await socket.answer()
    said = answer.problem(status, error_type)
    assert said["instance"] == address.partition(" ")[2].partition("?")[0]
    assert "X-Evil" not in answer.headers
    return said["detail"]


async def test_ids_that_no_job_can_have(client, untouched, subtests):
    for address in (*(f"GET /jobs/ID{rest}" for rest in OF_A_JOB), "DELETE /jobs/ID"):
        async with connected(client) as socket:
            for job_id in NO_NAMES:
                with subtests.test(f"{address} {job_id[:40]}"):
                    error_type = "unknown_path" if "/" in job_id or "job_id" in job_id else "not_found"
                    detail = await is_refused(client, socket, address.replace("ID", job_id), 404, error_type)
                    assert detail.startswith("Job " if error_type == "not_found" else "There is nothing at ")
                    await untouched()


async def test_ids_that_no_job_can_have_without_a_key(client, untouched, subtests):
    """Public jobs are open, so here the id is looked at before anybody has shown a key."""
    for rest in ("", "/status", "/events"):
        async with connected(client) as socket:
            for job_id in [*NO_NAMES, "x", "nobody", "gone"]:
                with subtests.test(f"{rest} {job_id[:40]}"):
                    await socket.say(f"GET /jobs/{job_id}{rest} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
                    answer = await socket.answer()
                    if "/" in job_id or "job_id" in job_id:
                        answer.problem(404, "unknown_path")
                    else:
                        answer.problem(401, "unauthorized")
                    await untouched()


async def test_ids_that_no_batch_can_have(client, untouched, subtests):
    for address in ("GET /jobs/batch/ID", "POST /jobs/batch/ID/close"):
        async with connected(client) as socket:
            for batch_id in [*NO_NAMES, "B", "batch%2Fb"]:
                with subtests.test(f"{address} {batch_id[:40]}"):
                    error_type = "unknown_path" if "/" in batch_id or "job_id" in batch_id else "not_found"
                    detail = await is_refused(client, socket, address.replace("ID", batch_id), 404, error_type)
                    assert detail.startswith("Batch " if error_type == "not_found" else "There is nothing at ")
                    await untouched()


WITH_RESERVED_WORDS = [
    *(f"GET /jobs/{word}{rest}" for word in ("stream", "limits") for rest in OF_A_JOB),
    *(f"GET /jobs/events{rest}" for rest in OF_A_JOB if rest),  # without anything behind it, it is the account's feed
    *(f"GET /jobs/{word}{rest}" for word in ("status", "%73tatus", "statu%73") for rest in OF_A_JOB[1:]),
    *("GET /jobs/batch", "GET /jobs/%62atch"),  # with more behind it, it is a batch of that name
    *(f"DELETE /jobs/{word}" for word in ("status", "batch", "events", "stream", "limits", "%73tatus", "batc%68")),
]


async def test_a_reserved_word_is_the_id_of_no_job(client, untouched, subtests):
    async with connected(client) as socket:
        for address in WITH_RESERVED_WORDS:
            with subtests.test(address):
                await is_refused(client, socket, address, 404, "not_found")
                await untouched()


ALMOST = (
    "// /jobs/ //jobs /jobs// /jobs/?limit=1 /./jobs /jobs;a=b /jobs.json /Jobs /JOBS/x /jobs%2fx /jobs%2Fstatus "
    "/jobs%00 /%6aobs/x/ /v1/jobs /api/jobs/x /jobs/status/ /jobs/status// /jobs/x/ /jobs/x//status /jobs//x/status "
    "/jobs/x/status/ /jobs/x/Status /jobs/x/EVENTS /jobs/x/events/ /jobs/x/events/1 /jobs/x/history/ /jobs/x/history%00 "
    "/jobs/x/history;a /jobs/x/y/z /jobs/x/. /jobs/x/.. /jobs/x/../done /jobs/x/status/../../done /jobs/x/%2e%2e "
    "/jobs/x/%2e%2e/done /jobs/batch/ /jobs/batch//b /jobs/batch/b/ /jobs/batch/b/jobs /jobs/Batch/b "
    "/jobs/batch/b/close/ /jobs/batch/b/CLOSE /jobs/batch/../x /jobs/batch/b/../c"
)


async def test_addresses_that_only_look_like_ours(client, untouched, subtests):
    async with connected(client) as socket:
        for path in [*ALMOST.split(), "/jobs/" + "a/" * 2000]:
            for method in ("GET", "DELETE"):
                with subtests.test(f"{method} {path[:40]}"):
                    await is_refused(client, socket, f"{method} {path}", 404, "unknown_path")
                    await untouched()


NO_METHODS = [
    "PUT /jobs/status",
    "DELETE /jobs/batch/b",
    "POST /jobs/batch/b",
    "GET /jobs/batch/b/close",
    "PATCH /jobs/batch/b/close",
    "DELETE /jobs",
    "POST /jobs/x/history",
    "POST /jobs/x/events",
    "HEAD /jobs/x/events",
    "OPTIONS /jobs/status",
]


async def test_methods_that_an_address_does_not_understand(client, untouched, subtests):
    for address in NO_METHODS:
        with subtests.test(address):
            answer = await ask(client, *address.split())
            assert (answer.status, answer.headers["Content-Type"]) == (405, "application/problem+json")
            assert address.split()[0] not in answer.headers["Allow"].split(", ")
            await untouched()
