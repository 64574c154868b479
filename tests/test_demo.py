"""`make demo` keeps its promises, ends what it starts, and its parts read what the standards allow."""

import asyncio
import hashlib
import itertools
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from client.demo.board import Heard
from client.demo.calls import Refused, call, open_session
from client.demo.documents import LINES_PER_PAGE, Extraction, NoText, decoded, open_document
from client.demo.events import Event, EventParser, follow
from client.demo.folder import (
    CUT_PDF,
    MADE_PDF,
    MOST,
    ROOT,
    chosen_from,
    documents_in,
    lay_ready,
    own_documents,
    pdf_of,
)
from client.demo.poller import Polled
from client.demo.verdict import Told, judge
from client.demo.worker import Worker, failure
from service.supervise import family

PDF = pdf_of("\n".join(f"line {n} of a letter about lighthouses" for n in range(150)), title="letter")


# The whole


@pytest.fixture
def documents(tmp_path) -> Path:
    """Two texts, a PDF and half a PDF."""
    folder = tmp_path / "documents"
    (folder / "notes").mkdir(parents=True)
    (folder / "letter.pdf").write_bytes(PDF)
    (folder / "half.pdf").write_bytes(PDF[: len(PDF) // 2])
    (folder / "notes" / "sea.txt").write_text("the harbour and the harbour light\n" * 100)
    (folder / "one line.md").write_text("Harbour master's office")
    (folder / ".hidden").write_text("not a document")
    return folder


async def start_demo(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("JOBWIRE_", "DATABASE_", "REDIS_"))
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "client.demo", *arguments, cwd=ROOT, stdout=PIPE, stderr=PIPE, env=clean | environment
    )


async def test_the_demo_with_a_service_of_its_own_keeps_its_promises(documents):
    began = time.monotonic()
    demo = await start_demo(str(documents), "--pace", "0.05")
    stdout, stderr = await demo.communicate()
    said = stdout.decode()
    assert (demo.returncode, stderr.decode()) == (0, ""), said
    assert time.monotonic() - began < 25
    assert re.search(r"^batch    demo-[0-9a-f-]{36}: 4 documents, 4 at a time$", said, re.MULTILINE)
    lines = [re.sub(r" +", " ", line).strip() for line in said.splitlines()]
    assert "half.pdf FAILED PdfStreamError: Stream has ended unexpectedly" in lines
    assert "letter.pdf COMPLETED 3 900 letter 150, lighthouses 150, line 150" in lines
    assert "notes/sea.txt COMPLETED 5 600 harbour 200, light 100" in lines
    assert "one line.md COMPLETED 1 3 harbour 1, master's 1, office 1" in lines
    assert any(re.fullmatch(r"\d+\.\d s notes/sea\.txt [2-7]\d % PROCESSING page [2-4] of 5", line) for line in lines)
    assert lines[-6:-1] == [
        "yes every job is finished",
        "yes every completed job has a result, and its bar moved",
        "yes half.pdf FAILED with the real error of the library",
        "yes of every job the poller's last answer is the stream's last event",
        "",
    ]
    assert re.fullmatch(
        r"4 jobs, 3 completed, 1 failed as intended; the poller asked \d+ times \(\d+ x 304\), "
        r"the streams told \d+ changes; last answers agree: yes",
        lines[-1],
    )


async def test_nothing_outlives_a_demo_that_is_interrupted(documents):
    demo = await start_demo(str(documents), "--pace", "5")
    assert demo.stdout is not None
    while not (await demo.stdout.readline()).startswith(b"batch"):
        pass
    started = {pid: name_of(pid) for pid in family(demo.pid)}
    scratch = next(
        Path(name).parent for name in started.values() for name in re.findall(r"\S*/jobwire-demo-\w+/\w+", name)
    )
    assert any("client.demo.worker" in name for name in started.values())
    assert any("postgres" in name for name in started.values())
    began = time.monotonic()
    demo.send_signal(signal.SIGINT)
    demo.send_signal(signal.SIGINT)
    stdout, stderr = await demo.communicate()
    assert stdout.decode().splitlines()[-1] == "Stopped; nothing is left running."
    assert (demo.returncode, stderr) == (130, b"")
    assert time.monotonic() - began < 8
    assert {pid: name for pid, name in started.items() if name_of(pid) == name} == {}
    assert not scratch.exists()


async def test_the_demo_says_why_it_cannot_work(start_web, documents):
    nobody = await start_demo(JOBWIRE_URL="http://127.0.0.1:9", JOBWIRE_API_KEY="jw_x")
    stranger = await start_demo(JOBWIRE_URL=(await start_web()).url, JOBWIRE_API_KEY="jw_" + 40 * "x")
    _, stderr = await nobody.communicate()
    assert nobody.returncode == 1
    assert stderr.decode().startswith("Error: Nothing answers at JOBWIRE_URL, http://127.0.0.1:9: ")
    _, stderr = await stranger.communicate()
    assert stranger.returncode == 1
    assert "Error: The worker could not register its documents.\nError: 401: " in stderr.decode()


def name_of(pid: int) -> str:
    """The command of a process that lives; nothing for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except FileNotFoundError:
        return ""


# The worker


async def test_the_worker_registers_one_closed_batch_and_leaves_a_job_that_is_taken_from_it(start_web, key, documents):
    service = await start_web()
    async with open_session(service.url, key) as session:
        worker = Worker(session, pace_s=0.01)
        batch_id, tasks = await worker.register(documents)
        assert [task.name for task in tasks] == ["half.pdf", "letter.pdf", "notes/sea.txt", "one line.md"]
        letter, sea = tasks[1], tasks[2]
        job = (await call(session, "GET", f"jobs/{letter.job_id}")).json()
        assert job["pdf_hash"] == "sha256:" + hashlib.sha256(PDF).hexdigest()
        assert job["batch_id"] == batch_id
        with pytest.raises(Refused, match="409"):
            await call(session, "POST", "jobs", json={"type": "parse", "batch_id": batch_id})
        await call(session, "POST", f"jobs/{sea.job_id}/cancel", json={})
        await worker.work(tasks)
        statuses = [(await call(session, "GET", f"jobs/{task.job_id}")).json()["status"] for task in tasks]
        assert statuses == ["FAILED", "COMPLETED", "CANCELLED", "COMPLETED"]


def test_an_error_is_told_in_its_own_words_as_far_as_they_can_be_sent():
    assert failure("a.pdf", KeyError("/Root")) == {
        "error": "a.pdf could not be read: '/Root'",
        "error_details": {"error_type": "KeyError", "message": "'/Root'"},
    }
    assert failure("a.pdf", RecursionError())["error_details"]["message"] == "RecursionError"
    assert failure("a.pdf", ValueError("\0\ud800" + "x" * 9000))["error_details"]["message"] == "?" + "x" * 999


async def test_a_call_waits_while_the_service_is_busy():
    answers = [
        web.Response(status=503, headers={"Retry-After": "0"}),
        web.Response(status=429, headers={"Retry-After": "1"}),
    ]
    asked_at = []

    async def answer(request: web.Request) -> web.Response:
        asked_at.append(time.monotonic())
        return answers.pop(0) if answers else web.json_response({"body": await request.json()})

    async with serving(answer) as url, open_session(url, "key") as session:
        assert (await call(session, "PATCH", "any", json=[1])).json() == {"body": [1]}
    assert len(asked_at) == 3
    assert asked_at[2] - asked_at[1] >= 1


# The verdict


def told_of(name: str, status: str, *, percentages: list[float], **changed: object) -> Told:
    job = {"id": name, "status": status, "error_details": None, "version": 4}
    result = {"pages": 3} if status == "COMPLETED" else None
    heard = Heard(len(percentages), percentages, job | {"previous_status": "PROCESSING"} | changed)
    return Told(name, Polled(asked=3, unchanged=1, job=job, result=result), heard)


def test_each_promise_can_be_broken():
    good, bad = told_of("a", "COMPLETED", percentages=[0, 33, 100]), told_of("b", "FAILED", percentages=[0])

    def kept(*told: Told, damaged: str = "b", error: object = None) -> list[bool]:
        return [kept for _, kept in judge(told, [damaged], lambda _: error).promises]

    assert kept(good, bad) == [True, True, True, True]
    assert kept(told_of("a", "PROCESSING", percentages=[0]), bad) == [False, True, True, True]
    assert kept(told_of("a", "COMPLETED", percentages=[0, 100]), bad) == [True, False, True, True]
    assert kept(told_of("a", "COMPLETED", percentages=[66, 33, 100]), bad) == [True, False, True, True]
    assert kept(good, bad, damaged="a") == [True, True, False, True]
    assert kept(good, bad, error={"error_type": "Other"}) == [True, True, False, True]
    assert kept(told_of("a", "COMPLETED", percentages=[0, 33, 100], version=3), bad) == [True, True, True, False]
    assert kept(Told("a", Polled(), Heard()), bad) == [False, True, True, False]


# Events


STREAM = (
    b"\xef\xbb\xbfretry: 2500\r\n\r\n"
    b": a comment\r\n\r\n"
    b'id: 1-7\r\nevent: status\r\ndata: {"a":1}\r\n\r\n'
    b"id: 2\rdata:one\rdata: two\r\rdata\ndata\nretry: 1x\nretry:\nunknown: x\n\n"
    b"event: nothing without data\nid: 3\n\n"
    b"id: no\0t an id\ndata:  two spaces, \xe2\x82\xac: a colon\n\n"
    b"id: 9\nevent: half\ndata: an event"
)
EVENTS = [
    Event("status", '{"a":1}', "1-7"),
    Event("message", "one\ntwo", "2"),
    Event("message", "\n", "2"),
    Event("message", " two spaces, €: a colon", "3"),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 1000])
def test_events_come_whole_however_they_are_cut(size):
    parser = EventParser()
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS
    assert (parser.last_event_id, parser.retry_s) == ("3", 2.5)


def test_an_event_is_told_at_its_blank_line_even_if_that_ends_in_a_lone_cr():
    parser = EventParser()
    assert list(parser.feed(b"data: x\r\n\r")) == [Event("message", "x", "")]
    assert list(parser.feed(b"\ndata: y\n\n")) == [Event("message", "y", "")]


def test_an_id_is_forgotten_when_it_comes_empty():
    parser = EventParser("7")
    assert list(parser.feed(b"id\ndata: x\n\n")) == [Event("message", "x", "")]
    assert parser.last_event_id == ""


class serving:
    """An HTTP server that answers everything with `answer`; entering it gives the address."""

    def __init__(self, answer) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        self.server = TestServer(app)

    async def __aenter__(self) -> str:
        await self.server.start_server()
        return str(self.server.make_url("/"))

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()


async def test_following_goes_on_where_it_was_cut_off_and_stops_at_204():
    asked = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append((request.headers.get("Last-Event-ID"), time.monotonic()))
        if len(asked) == 2:
            return web.Response(status=503, headers={"Retry-After": "0"})
        if len(asked) == 4:
            return web.Response(status=204)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if len(asked) == 1:
            await response.write(b"retry: 200\n\nid: 1\ndata: a\n\nid: 2\ndata: cut o")
            request.transport.abort()
        else:
            await response.write(b"id: 2\nevent: status\ndata: b\n\n")
        return response

    async with serving(answer) as url, open_session(url, "key") as session:
        events = [event async for event in follow(session, "jobs/x/events")]
    assert events == [Event("message", "a", "1"), Event("status", "b", "2")]
    assert [last_id for last_id, _ in asked] == [None, "1", "1", "2"]
    assert all(later[1] - earlier[1] >= 0.2 for earlier, later in itertools.pairwise(asked))


@pytest.mark.parametrize("response", [{"status": 401, "text": '{"detail":"no key"}'}, {"text": "<html>"}])
async def test_following_gives_up_where_there_is_no_stream(response):
    async def answer(request: web.Request) -> web.Response:
        return web.Response(**response)

    async with serving(answer) as url, open_session(url, "key") as session:
        with pytest.raises(Refused, match=r"401: no key|200: <html>"):
            async for _ in follow(session, "jobs/x/events"):
                pass


# Documents


def read(name: str, content: bytes) -> list[str]:
    document = open_document(name, content)
    return [document.page(number) for number in range(1, document.page_count + 1)]


@pytest.mark.parametrize("name", ["letter.pdf", "LETTER.PDF", "a PDF without its suffix"])
def test_a_pdf_is_read_page_by_page(name):
    pages = read(name, PDF)
    assert len(pages) == 3
    assert pages[1].startswith("line 50 of a letter")
    assert "line 149 of" in pages[2]


@pytest.mark.parametrize("content", [PDF[: len(PDF) // 2], PDF[:20], b"", b"no PDF at all", b"\0" * 100])
def test_a_damaged_pdf_is_an_error_of_its_library(content):
    with pytest.raises(Exception, match=r".+") as raised:
        read("damaged.pdf", content)
    assert type(raised.value).__module__.startswith("pypdf")


def test_a_text_has_pages_of_so_many_lines():
    pages = read("a.txt", b"line\n" * (2 * LINES_PER_PAGE + 1))
    assert [page.count("line") for page in pages] == [LINES_PER_PAGE, LINES_PER_PAGE, 1]


def test_an_empty_file_has_no_pages():
    assert read("empty.txt", b"") == []
    assert Extraction().result() == {"pages": 0, "words": 0, "terms": []}


def test_a_binary_file_is_no_text():
    with pytest.raises(NoText, match="Binary content: a NUL byte at offset 4"):
        read("program", b"\x7fELF\0\1\2")


@pytest.mark.parametrize(
    "content",
    [
        "Zürich: 5 €".encode(),
        "Zürich: 5 €".encode("utf-8-sig"),
        "Zürich: 5 €".encode("utf-16"),
        "Zürich: 5 €".encode("utf-32"),
        "Zürich: 5 €".encode("cp1252"),
    ],
)
def test_text_is_understood_in_any_usual_encoding(content):
    assert decoded(content) == "Zürich: 5 €"


def test_what_no_encoding_explains_is_still_read():
    assert decoded(b"caf\xe9 \x81") == "café \ufffd"


def test_words_and_terms_are_counted():
    extraction = Extraction()
    extraction.add("Jobs: the job's jobs, JOBS! 12 x_y")
    extraction.add("Über über status2 status")
    assert extraction.result() == {
        "pages": 2,
        "words": 11,
        "terms": [
            {"term": "jobs", "count": 3},
            {"term": "status", "count": 2},
            {"term": "über", "count": 2},
            {"term": "job's", "count": 1},
        ],
    }


# The folder


def test_the_project_has_enough_documents_of_its_own(tmp_path):
    damaged = lay_ready(own_documents(), ROOT, tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in documents_in(tmp_path)]
    assert damaged == [CUT_PDF]
    assert len(names) == MOST + 2
    assert {"README.md", "LICENSE", MADE_PDF, CUT_PDF, "service/__main__.py"} <= set(names)
    assert len(read(MADE_PDF, (tmp_path / MADE_PDF).read_bytes())) >= 3
    with pytest.raises(Exception, match="Stream has ended unexpectedly"):
        read(CUT_PDF, (tmp_path / CUT_PDF).read_bytes())


def test_documents_are_chosen_with_pdfs_first_and_without_what_is_no_document(documents):
    (documents / "empty.txt").touch()
    (documents / "program").write_bytes(b"\x7fELF\0")
    (documents / "node_modules").mkdir()
    (documents / "node_modules" / "readme.md").write_text("of somebody else")
    (documents / "gone.txt").symlink_to("nowhere")
    names = [path.name for path in chosen_from(documents)]
    assert names == ["half.pdf", "letter.pdf", "sea.txt", "one line.md"]


def test_what_a_folder_has_is_not_made_again(documents, tmp_path):
    target = tmp_path / "ready"
    target.mkdir()
    assert lay_ready(chosen_from(documents), documents, target) == ["half.pdf"]
    names = [str(path.relative_to(target)) for path in documents_in(target)]
    assert names == ["half.pdf", "letter.pdf", "notes/sea.txt", "one line.md"]
