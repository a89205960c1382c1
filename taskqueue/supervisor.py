"""Start handlers, end those that are overdue, and write down how each of them ended.

    worker ──posix_spawn──> supervisor ──posix_spawn──> handler, in a session of its own
       └──── a socket, lines of JSON ────┘

This is a program of its own, so that it holds no more memory than it needs: it imports the standard
library alone. It outlives its worker while a handler runs. So the exit code of an orphaned handler
is known, and its timeout holds.

The worker sends one of:

    {"start": {"run", "command", "cwd", "env", "timeout", "overdue", "kill_after", "record"}}
        with three descriptors: the handler's stdin, its locked stdout, its stderr. "cwd" is a list
        of directories, of which the first that exists is taken
    {"end": run, "why", "now"}      TERM, then KILL after `kill_after`; or KILL at once

The supervisor sends one of:

    {"run", "code", "why", "seconds"}     the handler has ended; "code" is null if it was not started

"why" and "overdue" are outcomes, as JSON lists: see outcome.Outcome.

A run's record is a file of JSON lines. A later line replaces the fields of an earlier one:

    {"supervisor": [pid, started]}     written by the worker before it sends the order
    {"group", "started", "deadline", "overdue", "kill_after"}     the handler was started
    {"why", "kill_at"}                 its group was sent TERM, and is sent KILL at `kill_at`
    {"code", "why"}                    it has ended; `why` only if it was made to

Times are those of time.monotonic(), which all processes of one boot share.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

NOT_STARTED = "its handler could not be started"
# Seconds until a task is tried again that could not be started by no fault of its handler.
START_AGAIN_SECONDS = 5.0
# poll() takes milliseconds as a C int: 24 days at most.
LONGEST_POLL_SECONDS = 86_400.0
# Handlers begin with these at their defaults, whatever the worker was started with.
RESET_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


class Run:
    """A handler at work."""

    def __init__(self, order: dict, pid: int, out: int) -> None:
        self.name, self.record, self.kill_after = order["run"], order["record"], order["kill_after"]
        self.pid = pid
        # Open, and so locked, until the exit code is written down.
        self.out = out
        self.started = time.monotonic()
        self.signal_at = self.started + order["timeout"] if order["timeout"] else None
        self.next_signal = signal.SIGTERM
        # Why the handler is ended; it counts once a signal was sent.
        self.why = order["overdue"]
        self.signalled = False

    def end(self, why: Sequence, now: bool) -> None:
        """End the group: TERM first, or KILL if `now`."""
        if not self.signalled or now:
            self.why = self.why if self.signalled else why
            self.signal_at = time.monotonic()
            self.next_signal = signal.SIGKILL if now else signal.SIGTERM

    def signal_when_due(self) -> None:
        if self.signal_at is not None and time.monotonic() >= self.signal_at:
            self.signal_at = time.monotonic() + self.kill_after
            if not self.signalled:
                add_to_run(self.record, why=self.why, kill_at=self.signal_at)
            self.signalled = True
            self.kill(self.next_signal)
            self.next_signal = signal.SIGKILL

    def kill(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        # The group has ended. macOS raises PermissionError for a group of zombies.
        except (ProcessLookupError, PermissionError):
            pass


class Supervisor:
    """The loop: obey the worker, signal what is overdue, reap what has ended."""

    def __init__(self, worker: socket.socket) -> None:
        self.worker = worker
        self.worker.setblocking(False)
        self.alive = True
        self.runs: dict[int, Run] = {}
        # The descriptors of orders that have not been read yet, a list for each.
        self.files: deque[list[int]] = deque()
        self.heard = bytearray()
        self.unsent = bytearray()

    def run(self) -> None:
        """Serve until the worker is gone and no handler runs."""
        wakeup, waker = wakeup_pipe()
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        while self.alive or self.runs:
            if self.alive:
                poll.register(self.worker, select.POLLIN | (select.POLLOUT if self.unsent else 0))
            ready = dict(poll.poll(self.seconds_left() * 1000))
            if wakeup in ready:
                os.read(wakeup, 65536)
            if self.worker.fileno() in ready and not self.listen():
                self.alive = False
                poll.unregister(self.worker)
            for run in self.runs.values():
                run.signal_when_due()
            self.reap()
            self.send()

    def seconds_left(self) -> float:
        """Return the seconds until the next signal is due."""
        now = time.monotonic()
        due = [run.signal_at - now for run in self.runs.values() if run.signal_at is not None]
        return max(0.0, min([LONGEST_POLL_SECONDS, *due]))

    def listen(self) -> bool:
        """Obey what the worker sent. Return False when the worker is gone."""
        try:
            heard, fds, flags, _ = socket.recv_fds(self.worker, 65536, 3)
        # The worker has room again; it sent nothing.
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
        # The kernel drops descriptors for which this process has no room: fewer than three, or none.
        if fds or flags & socket.MSG_CTRUNC:
            self.files.append(fds)
        *lines, self.heard = (self.heard + heard).split(b"\n")
        for told in map(json.loads, lines):
            if "start" in told:
                self.start(told["start"], self.files.popleft())
            for run in self.runs.values():
                if run.name == told.get("end"):
                    run.end(told["why"], told["now"])
        return bool(heard)

    def start(self, order: dict, fds: list[int]) -> None:
        """Start a handler, or tell why it cannot be started."""
        kept = None
        try:
            if len(fds) < 3:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if trouble := enter(order["cwd"]):
                return self.tell_unstarted(order, "scheduled", trouble)
            told = {os.fsencode(name): os.fsencode(value) for name, value in order["env"].items()}
            pid = os.posix_spawn(
                order["command"][0],
                order["command"],
                os.environb | told,
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)],
                setsid=True,
                setsigmask=(),
                setsigdef=RESET_SIGNALS,
            )
            kept = fds[1]
            self.runs[pid] = run = Run(order, pid, kept)
            add_to_run(
                run.record,
                group=pid,
                started=(process(pid) or ("", ""))[1],
                deadline=run.signal_at,
                overdue=run.why,
                kill_after=run.kill_after,
            )
        # A NUL in a task's id or type is a ValueError.
        except (OSError, ValueError) as error:
            never = isinstance(error, ValueError) or error.errno == errno.E2BIG
            why = f"{NOT_STARTED}: {error}"
            if never:
                self.tell_unstarted(order, "failed", why)
            else:
                self.tell_unstarted(order, "put back", why, START_AGAIN_SECONDS)
        finally:
            # Staying there would keep that file system from being unmounted.
            os.chdir("/")
            for fd in fds:
                if fd != kept:
                    os.close(fd)

    def reap(self) -> None:
        """Write down and tell how handlers ended, then release their output's locks."""
        while self.runs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            run, code = self.runs.pop(pid), os.waitstatus_to_exitcode(status)
            if run.signalled or code < 0:
                # End the rest of its group. A daemon of a handler that ended well stays.
                run.kill(signal.SIGKILL)
            code = 128 - code if code < 0 else code
            why = {"why": run.why} if run.signalled else {}
            add_to_run(run.record, code=code, **why)
            seconds = time.monotonic() - run.started
            self.tell(run=run.name, code=code, why=why.get("why"), seconds=seconds)
            os.close(run.out)

    def tell_unstarted(self, order: dict, *why) -> None:
        self.tell(run=order["run"], code=None, why=why, seconds=0.0)

    def tell(self, **message) -> None:
        self.unsent += json.dumps(message).encode() + b"\n"

    def send(self) -> None:
        """Send as much as the worker takes now; a stopped worker must not stop the timeouts."""
        if not self.alive:
            self.unsent.clear()
        if self.unsent:
            try:
                del self.unsent[: self.worker.send(self.unsent)]
            # listen() sees an end of the worker.
            except (BlockingIOError, ConnectionError):
                pass


def enter(directories: Sequence[str]) -> str | None:
    """Change to the first of the directories that exists; return the error if none does."""
    trouble = None
    for directory in directories:
        try:
            os.chdir(directory)
            return None
        except (OSError, ValueError) as error:
            trouble = f"cannot run in {directory!r}: {getattr(error, 'strerror', None) or error}"
    return trouble


def wakeup_pipe() -> tuple[int, int]:
    """Return (the end to poll, the end to write to) of a pipe of which neither end blocks."""
    ends = os.pipe()
    for fd in ends:
        os.set_blocking(fd, False)
    return ends


def add_to_run(path: str, **fields) -> None:
    """Add a line to a run's record.

    A record that was removed, or a full disk, ends no run: while the worker lives, nobody reads it.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(fd, json.dumps(fields).encode() + b"\n")
        finally:
            os.close(fd)
    except OSError:
        pass


def process(pid: int) -> tuple[str, str] | None:
    """Return (the letter of its state, when it started) of a process, or None if it is gone.

    Process ids are used again; an id and a start mean one process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), f"{fields[19].decode()} {_boot()}"
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return None
    import subprocess

    listed = subprocess.run(
        ["ps", "-o", "state=,lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        env={"PATH": os.defpath, "LC_ALL": "C"},
    ).stdout.split(maxsplit=1)
    return (listed[0][0], listed[1].strip()) if len(listed) == 2 else None


@lru_cache(1)
def _boot() -> str:
    """Return the id of this boot: Linux counts the starts of processes from it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    # Some containers show processes only.
    except OSError:
        return ""


def main() -> None:
    """Serve the worker at the other end of stdin, and keep nothing else that it has open."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    Supervisor(socket.socket(fileno=0)).run()
