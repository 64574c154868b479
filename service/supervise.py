"""Run a command so that nothing of it outlives the process that asked for it, even if that one is SIGKILLed.

The asker (`Supervised`, in any process) holds the write end of a pipe; the supervisor, this file run as a
program, holds the read end. Whatever ends the asker, the kernel closes its end; then the supervisor reads the
end of the pipe and stops the command: each `--stop` signal in turn with the seconds it is given, SIGKILL at
last, and SIGKILL for whatever the command leaves behind.

    supervise.py --lifeline FD [--keep FD]... [--stop SIGINT=1.5]... [--user UID:GID] -- COMMAND...

Prints the command's pid on stdout. The command reads the supervisor's stdin and writes to its stderr. Exits
with the command's status (128 + signal if a signal ended it) once no descendant is left. Stdlib only.
"""

import argparse
import atexit
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

KILL_SECONDS = 0.3  # given to SIGKILL before the supervisor leaves: only a hung disk takes longer
GIVE_UP_SECONDS = 4.0  # given to a supervisor: its `--stop` seconds, KILL_SECONDS twice, and slack
# The asker's own would give a Postgres cluster its language and clock, and initdb its PGDATA.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>

prctl: Callable[..., int] | None = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


# The asker's side


class Supervised:
    """A command beneath a supervisor. `pid` is the command's own; 0 if it could not start: see the log."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        stop: Sequence[str],
        keep: Sequence[int] = (),
        user: tuple[int, int] | None = None,
        says: bytes = b"",
    ) -> None:
        """stop: "SIGNAL=seconds" in order; keep: descriptors to inherit; user: uid, gid; says: its stdin."""
        lifeline, self.lifeline = os.pipe()  # both close-on-exec: no other child can hold our end
        order = [
            f"--lifeline={lifeline}",
            *(f"--keep={kept}" for kept in keep),
            *(f"--stop={step}" for step in stop),
        ]
        order += [f"--user={user[0]}:{user[1]}"] if user else []
        try:
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(Path(__file__).resolve()), *order, "--", *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    pass_fds=(lifeline, *keep),
                    cwd="/",
                    env=ENVIRONMENT,
                    start_new_session=True,  # a Ctrl-C in the terminal is the asker's to handle
                )
        finally:
            os.close(lifeline)
        supervised.append(self)
        assert self.process.stdin and self.process.stdout
        with self.process.stdin as stdin, self.process.stdout as stdout:
            stdin.write(says)
            stdin.close()
            self.pid = int(stdout.readline() or 0)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def let_go(self) -> None:
        """Breaks the lifeline: the supervisor begins to stop the command."""
        lifeline, self.lifeline = self.lifeline, -1
        if lifeline != -1:
            os.close(lifeline)

    def stop(self) -> None:
        """Stops the command and waits until nothing of it is left; at once if it has ended already."""
        self.let_go()
        try:
            self.process.wait(GIVE_UP_SECONDS)
        except subprocess.TimeoutExpired:  # it hangs itself, or is SIGSTOPped: the kernel kills the command with it
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ValueError):  # a second stop
            supervised.remove(self)


supervised: list[Supervised] = []  # kept here, so that a command does not end because nobody holds its object


def let_all_go() -> None:
    for each in supervised:
        each.let_go()


@atexit.register
def stop_all() -> None:
    let_all_go()
    while supervised:
        supervised[0].stop()  # which removes it


# A forked child (multiprocessing, gunicorn) that kept our ends would keep the commands alive after us.
os.register_at_fork(after_in_child=let_all_go)


# The supervisor's side


def main(arguments: Sequence[str]) -> int:
    order = read_order(arguments)
    if prctl:  # a dead server's own children become ours, so that `end_family` finds them
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken = wake_on_signals()
    child = start(order)
    if not ends_by_itself(child, order.lifeline, woken):
        stop(child, order.stop)
    end_family()
    status = child.returncode
    return 1 if status is None else status if status >= 0 else 128 - status


def read_order(arguments: Sequence[str]) -> argparse.Namespace:
    """lifeline: int; keep: [int]; stop: [(signal, seconds)]; user: (uid, gid) or None; command: [str]."""
    parser = argparse.ArgumentParser(prog="supervise.py")
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--keep", type=int, action="append", default=[])
    parser.add_argument("--stop", type=read_step, action="append", default=[])
    parser.add_argument("--user", type=read_user)
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


def read_step(text: str) -> tuple[signal.Signals, float]:
    name, _, seconds = text.partition("=")
    return signal.Signals[name], float(seconds)


def read_user(text: str) -> tuple[int, int]:
    uid, _, gid = text.partition(":")
    return int(uid), int(gid)


def wake_on_signals() -> int:
    """Returns a descriptor on which each caught signal arrives as one byte, its number."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for caught in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(caught, lambda *_: None)  # without a handler Python writes no byte
    return woken


def start(order: argparse.Namespace) -> subprocess.Popen[bytes]:
    uid, gid = order.user or (None, None)
    child = subprocess.Popen(
        order.command,
        stdout=sys.stderr,
        stderr=sys.stderr,
        pass_fds=order.keep,
        cwd="/",
        umask=0o077,
        user=uid,
        group=gid,
        extra_groups=[] if order.user else None,
        preexec_fn=die_with_parent,
    )
    with contextlib.suppress(BrokenPipeError):  # the asker is gone already: the lifeline says so too
        os.write(1, b"%d\n" % child.pid)
    os.close(1)
    return child


def die_with_parent() -> None:
    """In the child: should the supervisor itself be SIGKILLed, the kernel kills the command with it."""
    if prctl:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def ends_by_itself(child: subprocess.Popen[bytes], lifeline: int, woken: int) -> bool:
    """Waits. False: the asker ended or let go, or we are told to end, while the command still runs."""
    while child.poll() is None:
        ready, _, _ = select.select([lifeline, woken], [], [])
        if lifeline in ready or set(os.read(woken, 512)) - {signal.SIGCHLD}:
            return False
    return True


def stop(child: subprocess.Popen[bytes], steps: Sequence[tuple[signal.Signals, float]]) -> None:
    for pid in family(os.getpid()):
        send(pid, signal.SIGCONT)  # one that is SIGSTOPped obeys nothing but SIGKILL
    for step, seconds in [*steps, (signal.SIGKILL, KILL_SECONDS)]:
        child.send_signal(step)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            return


def end_family() -> None:
    """SIGKILLs and reaps all descendants: the backends of a killed postmaster, the fork of a saving Redis."""
    deadline = time.monotonic() + KILL_SECONDS
    while (left := family(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            send(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)


def send(pid: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, what)


def family(ancestor: int) -> set[int]:
    """The pids of every descendant of `ancestor`, as /proc shows them now (none where there is no /proc)."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended since it was listed
            after_name = stat.read_bytes().rpartition(b")")[2]  # the name before it may hold anything
            parents[int(stat.parent.name)] = int(after_name.split()[1])
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
