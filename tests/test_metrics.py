"""What is told to Prometheus: true numbers of all processes, on an address of its own, and never at the cost of the service."""

import asyncio
import os
import re
import signal
import socket
from collections import defaultdict
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import TABLE
from service.middlewares import STATUS_OF
from tests.conftest import environment_of
from tests.speaker import speaking, until
from tests.web_processes import WebProcesses

README = (Path(__file__).parent.parent / "README.md").read_text()

Page = dict[str, dict[tuple[str, ...], float]]
"""Values by the values of their labels, by name."""


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def address() -> str:
    return free_address()


async def scrape(address: str) -> Page:
    # A connection of its own each time: which process takes it is up to the kernel.
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
        assert (answer.status, answer.content_type) == (200, "text/plain")
        return read(await answer.text())


def read(text: str) -> Page:
    page: Page = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            page[sample.name][tuple(sample.labels.values())] = sample.value
    return page


async def test_the_page_tells_what_happened(start_web, key, address):
    web = await start_web(JOBWIRE_METRICS_LISTEN=address)
    async with speaking(key) as speaker:
        await speaker.create(web, "j")
        await speaker.say(web, "j", "on its way")
        for _ in range(5):
            await speaker.poll(web, "j")
        assert (await speaker.poll(web, "none")).status == 404
        assert (await speaker.ask(web, "PATCH", "/jobs/j", data=b"")).status == 415
        page = await scrape(address)
    reads = page["jobwire_status_reads_total"]
    assert reads["memory",] >= 4
    assert sum(reads.values()) == 6
    assert page["jobwire_reports_total"][()] == page["jobwire_commits_total"][()] == 1
    assert 0 < page["jobwire_commit_seconds_total"][()] < 5
    assert page["jobwire_errors_total"]["not_found",] == page["jobwire_errors_total"]["unsupported_media_type",] == 1
    assert page["jobwire_redis_up"] == {("polls",): 1, ("puts",): 1, ("events",): 1}
    for name in ("redis_trusted", "postgres_up", "postgres_writable", "redis_lives_total", "keys_known", "processes"):
        assert page[f"jobwire_{name}"] == {(): 1}, name
    assert page["jobwire_outbox_oldest_seconds"][()] < 5


async def test_every_metric_is_there_from_the_start_with_few_values_of_its_labels(start_web, address):
    await start_web(JOBWIRE_METRICS_LISTEN=address)
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
        text = await answer.text()
    page = read(text)
    assert page.keys() == {measure.name for measure in TABLE}
    for measure in TABLE:
        assert len(page[measure.name]) <= max(8, len(STATUS_OF))
        kind = "counter" if measure.gauge is None else "gauge"
        assert re.search(rf"^# TYPE {measure.name} {kind}$", text, re.MULTILINE), measure.name
        assert re.search(rf"^# HELP {measure.name} {re.escape(measure.help[:20])}", text, re.MULTILINE), measure.name
        assert re.fullmatch(r"jobwire_[a-z_]+", measure.name)
        assert (measure.gauge is None) == measure.name.endswith("_total")
    assert {labels[0] for labels in page["jobwire_errors_total"]} == set(STATUS_OF)


async def test_whichever_of_several_processes_is_asked_answers_for_all(start_web, key, address, tmp_path):
    shared = {"JOBWIRE_METRICS_LISTEN": address, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics")}
    one, other = await asyncio.gather(start_web(**shared), start_web(**shared))
    async with speaking(key) as speaker:
        await speaker.create(one, "j")
        await speaker.poll(one, "j")
        for _ in range(3):
            await speaker.poll(other, "j")

        async def is_told(reads: float, processes: int) -> bool:
            pages = [await scrape(address) for _ in range(6)]
            return all(
                sum(page["jobwire_status_reads_total"].values()) == reads
                and page["jobwire_processes"][()] == page["jobwire_keys_known"][()] == processes
                for page in pages
            )

        await until(lambda: is_told(4, processes=2), 5)
        one.kill()
        await one.process.wait()
        await until(lambda: is_told(4, processes=1), 5)
        third = await start_web(**shared)
        await speaker.poll(third, "j")
        await until(lambda: is_told(5, processes=2), 5)
        assert await third.stop() == 0
        await until(lambda: is_told(5, processes=1), 1)
    assert await other.stop() == 0
    assert not list((tmp_path / "metrics").glob("gauge_live*")), "who ends takes its gauges along"


async def test_under_gunicorn_the_page_is_of_all_processes_through_crash_and_reload(
    database, redis_url, key, address, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    settings = environment_of(database, redis_url) | {"JOBWIRE_METRICS_LISTEN": address, "JOBWIRE_DRAIN": "0.2"}
    processes = await WebProcesses.launch(settings)
    try:
        await processes.serve()
        asked = 0
        for change in ("none", "a crash", "a reload"):
            old = processes.pids
            if change == "a crash":
                os.kill(min(old), signal.SIGKILL)
                await processes.serve(instead_of={min(old)})
            elif change == "a reload":
                await processes.reload()
            async with speaking(key) as speaker:
                for _ in range(10):
                    assert (await speaker.poll(processes, "none")).status == 404
            asked += 10

            async def is_told(asked=asked):
                pages = [await scrape(address) for _ in range(4)]
                return {(p["jobwire_processes"][()], p["jobwire_errors_total"]["not_found",]) for p in pages} == {
                    (2, asked)
                }

            await until(is_told, 10)
    finally:
        await processes.stop()
    assert not list(tmp_path.glob("jobwire-metrics-*")), "nothing is left of it"


async def test_one_process_that_lost_redis_is_seen_in_the_page_of_all(start_web, address, tmp_path):
    shared = {"JOBWIRE_METRICS_LISTEN": address, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    await start_web(**shared)
    await start_web(**shared, REDIS_URL=f"redis://{free_address()}/0")

    async def is_told() -> bool:
        page = await scrape(address)
        return page["jobwire_processes"][()] == 2 and page["jobwire_redis_up"]["polls",] == 0

    await until(is_told, 5)


@pytest.mark.parametrize("shared", [False, True])
async def test_an_address_that_another_has_is_a_warning_and_no_more(start_web, key, address, tmp_path, capfd, shared):
    host, port = address.split(":")
    with socket.create_server((host, int(port))):
        folder = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)} if shared else {}
        web = await start_web(JOBWIRE_METRICS_LISTEN=address, **folder)
        async with speaking(key) as speaker:
            assert (await speaker.create(web, "j")).status == 201
    said = [line for line in capfd.readouterr().err.splitlines() if "metrics_not_told" in line]
    assert len(said) == 1
    assert address in said[0]
    assert "JOBWIRE_METRICS_LISTEN" in said[0]


@pytest.mark.parametrize("off", ["off", ""])
async def test_it_can_be_switched_off(start_web, off):
    web = await start_web(JOBWIRE_METRICS_LISTEN=off)
    assert listening(web.process.pid) == [int(web.url.rpartition(":")[2])]


async def test_it_is_not_on_the_public_port(start_web, address):
    web = await start_web(JOBWIRE_METRICS_LISTEN=address)
    async with aiohttp.ClientSession() as session, session.get(f"{web.url}/metrics") as answer:
        assert answer.status == 404
    assert sorted(listening(web.process.pid)) == sorted([int(web.url.rpartition(":")[2]), int(address.split(":")[1])])


def listening(pid: int) -> list[int]:
    """The TCP ports on which a process listens."""
    sockets = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def test_the_readme_names_no_metric_that_is_not_there():
    named = set(re.findall(r"\bjobwire_[a-z_]+\b", README))
    assert named
    assert named <= {measure.name for measure in TABLE}
