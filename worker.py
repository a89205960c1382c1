#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["watchdog>=4,<8"]
# ///
"""Run the tasks of one or more queues: each by the executable in --handlers that bears its task type's name.

    worker.py notifications --then completions              results become the next queue's tasks
    worker.py approvals --timeout 1800 -- claude -p         one command for every task type
    worker.py notifications approvals --concurrency 4 --drain

A handler gets the task's envelope on stdin as JSON, and TASK_ID, TASK_TYPE, TASK_QUEUE, TASK_ATTEMPT, TASK_DEPTH and
TASK_QUEUE_STATE in its environment. It runs in data.workspace_path, in a process group of its own. What it prints is
the task's result; stdout and stderr are kept in state/logs. Its exit code decides:

    0 done    75 not now, does not count (a last line {"retry_after": SECONDS} says when)    65 never, dead letter
    anything else, a signal or the timeout: a failed attempt; back-off, then dead letter when --max-attempts are spent

SIGTERM or Ctrl-C: claim no more, let handlers finish for --grace seconds, then end them; their tasks go back uncounted.
A second one ends them at once.

exit codes: 0 stopped, drained, idle, or another worker has the queue (--single); 1 the database cannot be used; 64 usage.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import queue_helpers as q

EX_USAGE = 64
NO_HANDLER_SECONDS = 60.0  # a task without a handler is looked at again this often; it costs it no attempt
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # while the database cannot be used
GROUP_SECONDS = 0.01  # runs that end within this time of each other are recorded together: one wait for the disk
BUSY_TIMEOUT_MS = 1_000  # shorter than elsewhere: handlers' timeouts are watched between two tries
WAL_WARN_BYTES = 4 * q.WAL_BYTES
NOT_STARTED = "its handler could not be started"
AHEAD = 16  # tasks claimed before there is a place for them, at most: one message brings them and their descriptors
PREFETCH_SECONDS = 0.02  # tasks that should have their turn within this time are handed over before there is a place
WAITING_SECONDS = 0.05  # those that have none by then go back

# A handler must not take itself for a part of whoever started the worker, or for a part of the worker's own uv run.
SCRUBBED = ("CLAUDECODE", "CLAUDE_CODE_ENTRYPOINT", "CLAUDE_CODE_SSE_PORT", "CLAUDE_CODE_SESSION_ID", "CLAUDE_CODE_EXECPATH",
            "CLAUDE_PROJECT_DIR", "CLAUDE_ENV_FILE", "CLAUDE_PLUGIN_ROOT", "VIRTUAL_ENV", "UV_RUN_RECURSION_DEPTH")  # fmt: skip
TOLD = ("TASK_ID", "TASK_TYPE", "TASK_QUEUE", "TASK_ATTEMPT", "TASK_DEPTH", "TASK_QUEUE_STATE")  # to each handler

Verdict = Callable[[q.Connection], tuple]  # records how a run ended, in a transaction: (outcome, error)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(EX_USAGE, f"{self.prog}: {message}; see {self.prog} --help\n")


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError
    return value


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise ValueError
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    argv, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, None)
    beside = Path(__file__).resolve().parent
    handlers = next(
        (path for path in (beside / "handlers", beside.parent.parent / "handlers") if path.is_dir()),
        beside / "handlers",
    )
    parser = Parser(prog="worker.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("queues", metavar="QUEUE", nargs="+")
    add(
        "--handlers",
        metavar="DIR",
        type=Path,
        default=handlers,
        help="executables named after task types (default: %(default)s)",
    )
    add("--concurrency", metavar="N", type=count, default=1, help="tasks at a time, all queues together (default 1)")
    add(
        "--then",
        metavar="QUEUE",
        help="enqueue what a handler prints there, in the transaction that records it as done",
    )
    add(
        "--max-attempts",
        metavar="N",
        type=count,
        default=q.MAX_ATTEMPTS,
        help="then it is a dead letter (default %(default)s)",
    )
    add("--backoff", metavar="SECONDS", type=seconds, default=q.BACKOFF_SECONDS,
        help="before the second attempt, doubling with each one after, an hour at most (default %(default)s)")  # fmt: skip
    add("--crash-backoff", metavar="SECONDS", type=seconds, default=0.0,
        help="before a dead worker's task runs again (default 0: at once)")  # fmt: skip
    add("--timeout", metavar="SECONDS", type=seconds, default=0.0, help="for one attempt (default 0: none)")
    add(
        "--grace",
        metavar="SECONDS",
        type=seconds,
        default=10.0,
        help="for handlers to finish when stopped (default 10)",
    )
    add("--kill-after", metavar="SECONDS", type=seconds, default=5.0, help="from TERM to KILL (default 5)")
    add("--drain", action="store_true", help="leave when nothing is ready or running")
    add(
        "--idle-exit",
        metavar="SECONDS",
        type=seconds,
        help="leave when nothing waited, ran or was scheduled for this long",
    )
    add("--single", action="store_true", help="leave at once if another worker serves one of the queues")
    args = parser.parse_args(argv)
    args.command = command
    if command == []:
        parser.error("-- needs a command after it")
    try:
        args.queues = list(dict.fromkeys(map(q.check_queue_name, args.queues)))
        args.then and q.check_queue_name(args.then)
    except q.InvalidTask as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    q.BUSY_TIMEOUT_MS = BUSY_TIMEOUT_MS
    try:
        return Worker(args).run()
    except q.QueueError as error:
        say(f"worker.py: {error}")
        return 1


def clean_environment() -> dict[bytes, bytes]:
    """Our environment without what would have a handler take itself for a part of something else.

    As bytes, which spares the system's calls their conversion at each start.
    """
    env = {name: value for name, value in os.environ.items() if name not in SCRUBBED + TOLD}
    if "VIRTUAL_ENV" in os.environ:  # uv run put its own bin first
        ours = os.path.join(os.environ["VIRTUAL_ENV"], "bin")
        env["PATH"] = os.pathsep.join(p for p in env.get("PATH", "").split(os.pathsep) if p != ours)
    return {os.fsencode(name): os.fsencode(value) for name, value in env.items()}


def close(fds: Sequence[int | None]) -> None:
    for fd in fds:
        if fd is not None:
            os.close(fd)


def nonblocking_pipe() -> tuple[int, int]:
    """(ear, mouth): what wakes a loop."""
    ear, mouth = os.pipe()
    os.set_blocking(ear, False)
    os.set_blocking(mouth, False)
    return ear, mouth


def stdin_file(raw: bytes) -> int:
    """A file for a handler's stdin, in memory where that can be had. No pipe: nothing blocks that is not read."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("task")
    else:
        import tempfile

        fd = os.dup(tempfile.TemporaryFile().fileno())
    if os.pwrite(fd, raw, 0) < len(raw):  # leaves the position at 0
        os.close(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fd


def reuse(empty: str, path: str) -> int | None:
    """Open a finished run's output file under a new name; None unless it is empty and nobody else has it open.

    So silent handlers do not leave two files each until the next clean-up. Linux only.
    """
    try:
        if os.stat(empty).st_size:
            return None
        fd = os.open(empty, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # to be sent to us if it is opened now: one that does nothing
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # refused where somebody reads it, or a daemon may still write
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        if os.fstat(fd).st_size == 0:
            os.rename(empty, path)
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def say(line: str) -> None:
    """One line on stderr; a closed terminal is no reason to stop working."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(time.strftime("%Y-%m-%d %H:%M:%S ") + " ".join(line.split()) + "\n")  # in one piece
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads it any more: let nothing fail of it at the end


class Run:
    """A handler at work, as its supervisor knows it."""

    def __init__(self, name: str, pid: int, out: int, exits: str, timeout: float) -> None:
        self.name, self.pid, self.exits = name, pid, exits
        self.out = out  # its locked stdout: ours as well, until its exit code is written down
        self.started = time.monotonic()
        self.end_at = self.started + timeout if timeout else None  # when to send the next signal
        self.next_signal = signal.SIGTERM
        self.why = f"timed out after {timeout:g} s"  # holds once a signal was sent
        self.ended = False  # whether one was

    def end(self, why: str, now: bool) -> None:
        """Have the group ended: TERM first, or KILL now."""
        if not self.ended or now:
            self.why, self.end_at = why if not self.ended else self.why, time.monotonic()
            self.next_signal = signal.SIGKILL if now else signal.SIGTERM

    def signal_when_due(self, kill_after: float) -> None:
        if self.end_at is not None and time.monotonic() >= self.end_at:
            self.ended = True
            self.kill(self.next_signal)
            self.end_at = time.monotonic() + kill_after
            self.next_signal = signal.SIGKILL

    def kill(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # gone; macOS says the latter of zombies
            pass


class Supervisor:
    """A process of its own that starts handlers, ends the overdue, and writes down how each of them ended.

    It outlives its worker for as long as a handler runs: so an orphan's exit code is known, and its timeout holds. The
    two talk in lines of JSON over a socket. The worker says {"start": [{"run", "command", "cwd", "env", "exits"}, …]},
    sending the descriptors of each run's stdin, stdout and stderr along, or {"end": run, "why", "now"}, or {"stop": why}
    about all that it has not yet started. It is told {"run", "code", "why", "seconds"}, or {"run", "error", "refused"} of
    what could not be started. What comes when all places are taken waits for one, but not for long.
    """

    def __init__(self, worker: socket.socket, env: dict[bytes, bytes], timeout: float, kill_after: float, places: int) -> None:
        self.worker, self.env, self.timeout, self.kill_after, self.places = worker, env, timeout, kill_after, places
        worker.setblocking(False)
        self.alive = True  # the worker is
        self.runs: dict[int, Run] = {}  # by pid
        self.waiting: dict[str, tuple[dict, list[int | None], float]] = {}  # {run: (order, files, until when)}, oldest first
        self.heard, self.fds = b"", []  # of the line that is not yet whole, and of those to come; ... is where some are lost
        self.unsent, self.tell_at = b"", 0.0  # what the worker is to be told, and when at the latest

    def run(self) -> None:
        """Serve until the worker is gone and no handler runs."""
        os.setsid()
        try:
            Path("/proc/self/comm").write_text("task-supervisor")  # for top and pstree
        except OSError:
            pass
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # nobody should have to wait for us who reads what the worker writes
            os.dup2(null, fd)
        os.closerange(3, self.worker.fileno())
        os.closerange(self.worker.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        os.environb[b"PATH"] = self.env.get(b"PATH", os.defpath.encode())  # where a command is looked for
        ear, mouth = nonblocking_pipe()
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the latter are for the worker
            signal.signal(number, lambda *_: None)
        poll = select.poll()
        poll.register(ear, select.POLLIN)
        poll.register(self.worker, select.POLLIN)
        while self.alive or self.runs or self.waiting:
            due = [run.end_at for run in self.runs.values() if run.end_at is not None]
            if self.alive:
                due += [until for *_, until in self.waiting.values()]
                due += [self.tell_at] if self.unsent else []
            ready = dict(poll.poll(max(0.0, min(due) - time.monotonic()) * 1000 if due else None))
            if ear in ready:
                os.read(ear, 65536)
            if self.worker.fileno() in ready and not self.listen():
                poll.unregister(self.worker)
                self.alive = False
            for run in self.runs.values():
                run.signal_when_due(self.kill_after)
            self.reap()
            while self.waiting and len(self.runs) < self.places:
                order, files, _ = self.waiting.pop(next(iter(self.waiting)))
                self.start(order, files)
            if self.alive:
                self.give_back([run for run, (*_, until) in self.waiting.items() if until <= time.monotonic()], q.NO_PLACE)
            if self.unsent and self.alive and (len(self.waiting) < self.places or self.tell_at <= time.monotonic()):
                self.send()

    def listen(self) -> bool:
        """Do what the worker says; False when it is gone."""
        try:
            heard, fds, flags, _ = socket.recv_fds(self.worker, 65536, 3 * AHEAD)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
        self.fds += fds
        if flags & socket.MSG_CTRUNC:  # we have no room for all of them
            self.fds.append(...)
        *lines, self.heard = (self.heard + heard).split(b"\n")
        for said in map(json.loads, lines):
            if "start" in said:
                files = self.take_fds(3 * len(said["start"]))
                for n, order in enumerate(said["start"]):
                    self.waiting[order["run"]] = order, files[3 * n : 3 * n + 3], time.monotonic() + WAITING_SECONDS
            elif "end" in said:
                for run in self.runs.values():
                    if run.name == said["end"]:
                        run.end(said["why"], said["now"])
                self.give_back(self.waiting.keys() & {said["end"]}, said["why"])
            else:
                self.give_back(list(self.waiting), said["stop"])
        return bool(heard)

    def take_fds(self, number: int) -> list[int | None]:
        """The descriptors that came with a line; None for the lost."""
        fds, self.fds = self.fds[:number], self.fds[number:]
        if ... in fds:
            end = fds.index(...)
            fds, self.fds = fds[:end] + [None] * (number - end), fds[end + 1 :] + self.fds
        return fds

    def give_back(self, runs: Iterable[str], why: str) -> None:
        """Do not start what waits for a place, as if it had been ended at once."""
        for run in runs:
            _, files, _ = self.waiting.pop(run)
            close(files)
            self.tell({"run": run, "code": 128 + signal.SIGTERM, "why": why, "seconds": 0.0})

    def start(self, order: dict, files: list[int | None]) -> None:
        try:
            if None in files:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            env = self.env | order["env"]  # they have no name in common: see TOLD
            for directory in (*order["cwd"], "/"):
                try:
                    os.chdir(directory)
                    break
                except (OSError, ValueError):
                    pass
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(files)]
            pid = os.posix_spawnp(order["command"][0], order["command"], env, file_actions=actions, setsid=True,
                                  setsigdef=(signal.SIGPIPE, signal.SIGXFSZ))  # fmt: skip
            self.runs[pid] = Run(order["run"], pid, files[1], order["exits"], self.timeout)
            files[1] = None  # stays open
        except (OSError, ValueError) as error:  # the latter for a NUL, from a writer that checks nothing
            refused = isinstance(error, ValueError) or error.errno == errno.E2BIG
            self.tell({"run": order["run"], "error": str(error), "refused": refused})
        finally:
            os.chdir("/")  # keeps no file system busy
            close(files)

    def reap(self) -> None:
        """Tell and write down how handlers ended, then let their output's locks go."""
        while self.runs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            run, code = self.runs.pop(pid), os.waitstatus_to_exitcode(status)
            if run.ended or code < 0:
                run.kill(signal.SIGKILL)  # whoever of its group is left; a daemon of one that ended well is let be
            code, why = 128 - code if code < 0 else code, run.why if run.ended else None
            self.tell({"run": run.name, "code": code, "why": why, "seconds": time.monotonic() - run.started})
            try:
                fd = os.open(run.exits, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                os.write(fd, f"{run.name} {code}{f' {why}' if why else ''}\n".encode())
                os.close(fd)
            except OSError:
                pass  # no harm while the worker lives
            os.close(run.out)

    def tell(self, message: dict) -> None:
        if not self.unsent:
            self.tell_at = time.monotonic() + GROUP_SECONDS
        self.unsent += json.dumps(message).encode() + b"\n"

    def send(self) -> None:
        try:
            self.unsent = self.unsent[self.worker.send(self.unsent) :]
        except BlockingIOError:
            self.tell_at = time.monotonic() + GROUP_SECONDS  # it is busy; listen to it meanwhile
        except OSError:
            self.unsent = b""  # it is gone


class SupervisorProcess:
    """The worker's hold on a supervisor."""

    def __init__(self, env: dict[bytes, bytes], timeout: float, kill_after: float, places: int) -> None:
        """Fork one. To be done while there is no other thread."""
        self.socket, theirs = socket.socketpair()
        self.free = places  # what it can start at once; less than none when some wait
        self.orders, self.files = [], []  # not yet sent, and their descriptors
        self.heard = b""
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                Supervisor(theirs, env, timeout, kill_after, places).run()
                code = 0
            finally:
                os._exit(code)
        theirs.close()

    def order(self, order: dict, fds: Sequence[int]) -> None:
        """Have a run started, once send_orders() is called. The descriptors are closed then."""
        self.free -= 1
        self.orders.append(order)
        self.files += fds

    def send_orders(self) -> list[tuple[str, OSError]]:
        """Send all orders. Returns those that cannot be sent, and why: [(run, error), …]."""
        if not self.orders:
            return []
        orders, files, self.orders, self.files = self.orders, self.files, [], []
        try:
            self.say({"start": orders}, files)
            return []
        except OSError as error:  # too many descriptors are under way
            self.free += len(orders)
            return [(order["run"], error) for order in orders]
        finally:
            close(files)

    def say(self, what: dict, fds: Sequence[int] = ()) -> None:
        line = json.dumps(what).encode() + b"\n"
        try:
            sent = socket.send_fds(self.socket, [line], fds)
            if sent < len(line):
                self.socket.sendall(line[sent:])
        except ConnectionError:
            pass  # it was killed: hear() will say so

    def hear(self) -> list[dict]:
        """What it has to say, now. Raises EOFError when it has been killed."""
        try:
            heard = self.socket.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            heard = b""
        if not heard:
            raise EOFError
        *lines, self.heard = (self.heard + heard).split(b"\n")
        self.free += len(lines)
        return [json.loads(line) for line in lines]


class Worker:
    """The loop: hear what ended, claim and start what is next, then record what ended."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.state = q.STATE_DIR
        self.logs = f"{self.state}/logs"
        self.handlers = os.path.abspath(args.handlers)
        try:
            self.cwd = os.getcwd()
        except OSError:  # removed under us
            self.cwd = "/"
        self.runs: dict[str, tuple[q.Task, SupervisorProcess]] = {}  # what runs, and where, by run_name
        self.done: list[tuple[q.Task, Verdict, float]] = []  # ended, not yet recorded
        self.record_at = 0.0  # when they must be
        self.heard = True  # that the database may have been changed by others, or the spool
        self.backlog: set[str] = set()  # queues that had a task when we last claimed: worth a claim without a look
        self.stops = 0  # signals received
        self.stop_at: float | None = None  # when to end what still runs
        self.said_stop = False  # to the supervisors
        self.idle_since = time.monotonic()
        self.trouble, self.failures, self.retry_at = "", 0, 0.0
        self.said: set[str] = set()
        self.serving: dict[str, int] = {}
        self.served_at = 0.0
        # One pipe wakes the loop: signals by their number, the watch by a 0.
        self.ear, self.mouth = nonblocking_pipe()
        self.poll = select.poll()
        self.poll.register(self.ear, select.POLLIN)
        # To start a program makes its parent wait, and longer the busier the machine is: hence one for each processor.
        number, env = min(args.concurrency, os.cpu_count() or 1), clean_environment()
        places = [args.concurrency // number + (n < args.concurrency % number) for n in range(number)]
        self.supervisors = [SupervisorProcess(env, args.timeout, args.kill_after, n) for n in places]
        for supervisor in self.supervisors:
            self.poll.register(supervisor.socket, select.POLLIN)
        self.seconds = float("inf")  # that runs took of late
        self.empties: deque[str] = deque(maxlen=4 * (args.concurrency + AHEAD))  # output files that may be

    def set(self) -> None:
        """Wake the loop; this makes us a listener of the watch."""
        try:
            os.write(self.mouth, b"\0")
        except BlockingIOError:
            pass  # it has not even read the last one

    def run(self) -> int:
        conn = q.connect(self.state)
        for queue in (*self.args.queues, *([self.args.then] if self.args.then else [])):
            q.ensure_queue(conn, queue)
        q.make_private(self.state / "logs")
        if not self.serve() and self.args.single:
            say(f"another worker serves {' or '.join(self.args.queues)}; leaving (--single)")
            return 0
        signal.set_wakeup_fd(self.mouth, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.stop)
        watch = q.Watch.of(self.state)
        watch.crash_backoff = self.args.crash_backoff
        watch.on_recovered = self.recovered
        watch.on_deaf = say
        watch.listeners.add(self)
        self.set()  # look at once
        say(f"worker {q.owner_name(self.state)} serves {', '.join(self.args.queues)}")
        try:
            while not self.may_leave():
                self.sleep()
                self.reap()
                self.end_overdue()
                self.exchange()
        finally:
            exits = q.exits_file(self.state, q.owner_name(self.state))
            for run in self.runs:
                self.end_run(run, q.STOPPED, now=True)
            for supervisor in self.supervisors:
                supervisor.socket.close()
            if not self.runs and not self.done:
                for supervisor in self.supervisors:
                    os.waitpid(supervisor.pid, 0)
                exits.unlink(missing_ok=True)
            q.resign(self.state)
        return 0

    def stop(self, *_) -> None:
        self.stops += 1
        self.stop_at = time.monotonic() + self.args.grace if self.stops == 1 else 0.0

    # ------------------------------------------------------------------------------------------------------- handlers

    def start(self, task: q.Task, command_for: Callable[[str], list[str]]) -> None:
        """Start the handler of a claimed task; what cannot be started gets its verdict at once."""
        try:
            envelope, command = task.envelope, command_for(task.task_type)
            data, text = envelope["data"], json.dumps(envelope)
        except (ValueError, RecursionError, TypeError, AttributeError) as error:
            return self.end(task, partial(self.bury, task, f"data is not a JSON object: {error}"))
        except LookupError as error:
            if "/" in task.task_type or task.task_type.startswith("."):
                return self.end(task, partial(self.bury, task, f"{error}, nor can there be one"))
            return self.end(task, partial(self.put_back, task, str(error), NO_HANDLER_SECONDS))
        run, fds = task.run_name, []
        try:
            fds.append(stdin_file(text.encode()))
            fds.append(self.output(f"{self.logs}/{run}.out"))
            fcntl.flock(fds[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the handler and its heirs are gone
            fds.append(self.output(f"{self.logs}/{run}.err"))
        except OSError as error:  # the disk is full, too many files, …: not the task's fault
            close(fds)
            return self.not_started(task, error)
        order = {"run": run, "command": command, "env": self.environment(task, envelope),
                 "cwd": [*self.workspace(data), self.cwd], "exits": str(q.exits_file(self.state, task.owner))}  # fmt: skip
        supervisor = max(self.supervisors, key=lambda one: one.free)
        self.runs[run] = task, supervisor
        supervisor.order(order, fds)
        if supervisor.free >= 0:  # it can start at once; orders that will wait, no more than AHEAD, go together
            self.hand_over(supervisor)

    def hand_over(self, supervisor: SupervisorProcess) -> None:
        """Send a supervisor what was ordered."""
        for run, error in supervisor.send_orders():
            self.not_started(self.runs.pop(run)[0], error)

    def not_started(self, task: q.Task, error: OSError | str) -> None:
        """Put a task back whose handler could not be started, by no fault of its own."""
        self.end(task, partial(self.put_back, task, f"{NOT_STARTED}: {error}", RETRY_SECONDS[-1]))

    def workspace(self, data: dict) -> list[str]:
        """Where a handler should run: data.workspace_path, if that can be one."""
        path = data.get("workspace_path")
        return [os.path.join(self.cwd, path)] if isinstance(path, str) else []

    def end_run(self, run: str, why: str, *, now: bool = False) -> None:
        """Have a run ended: TERM, then KILL; or KILL at once. Saying it again changes nothing."""
        self.runs[run][1].say({"end": run, "why": why, "now": now})

    def output(self, path: str) -> int:
        """A file for a handler's output: one that a run left empty, else a new one."""
        while self.empties:
            fd = reuse(self.empties.pop(), path)
            if fd is not None:
                return fd
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileExistsError:  # from an attempt of ours that did not count
            os.unlink(path)
        except FileNotFoundError:
            q.make_private(Path(self.logs))
            q.make_private(Path(path).parent)
        return os.open(path, flags, 0o600)

    def command_for(self, task_type: str) -> list[str]:
        """What to run. LookupError when there is no handler for the task type."""
        if self.args.command is not None:
            return self.args.command
        handler = f"{self.handlers}/{task_type}"
        if "/" in task_type or task_type.startswith(".") or not os.path.isfile(handler):
            raise LookupError(f"no handler {task_type!r} in {self.handlers}")
        if not os.access(handler, os.X_OK):
            raise LookupError(f"{handler} is not executable: chmod +x it")
        return [handler]

    def environment(self, task: q.Task, envelope: dict) -> dict[str, str]:
        depth = task.depth + 1
        values = task.task_id, task.task_type, task.queue, str(task.attempts), str(depth), str(self.state)
        return dict(zip(TOLD, values, strict=True))

    def reap(self) -> None:
        """Give each handler that has ended its verdict."""
        try:
            ended = [told for supervisor in self.supervisors for told in supervisor.hear()]
        except EOFError:
            self.start_afresh()
        for told in ended:
            task, _ = self.runs.pop(told["run"])
            if "code" in told:
                self.pace(told)
                verdict = partial(q.settle, task=task, exit_code=told["code"], why=told["why"])
            elif told["refused"]:
                verdict = partial(self.bury, task, f"{NOT_STARTED}: {told['error']}")
            else:
                self.not_started(task, told["error"])
                continue
            self.end(task, verdict, told.get("seconds", 0.0))

    def pace(self, ended: dict) -> None:
        """Keep in mind how long runs take, by a moving average; without end, when one found no place."""
        if ended["why"] == q.NO_PLACE:
            self.seconds = float("inf")
        elif ended["why"] is None:
            self.seconds = min(self.seconds, ended["seconds"]) * 0.9 + max(ended["seconds"], 0.0001) * 0.1

    def start_afresh(self) -> NoReturn:
        """A supervisor was killed: nobody will hear how its handlers end. So end as if killed; another life recovers.

        The process stays the same for whoever started it; our lock on the tasks goes with the old life.
        """
        if self.stops:
            say("a supervisor of handlers was killed; the next worker sees to their tasks")
            os._exit(1)
        say("a supervisor of handlers was killed; starting afresh")
        os.execv(sys.executable, sys.orig_argv)

    def end_overdue(self) -> None:
        """After a signal: start nothing more, and end what still runs when the grace is over, or after a second signal."""
        if self.stops and not self.said_stop:
            self.said_stop = True
            for supervisor in self.supervisors:
                supervisor.say({"stop": q.STOPPED})
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            self.stop_at = None
            for run in self.runs:
                self.end_run(run, q.STOPPED, now=self.stops > 1)

    # ------------------------------------------------------------------------------------------------------- verdicts

    def end(self, task: q.Task, verdict: Verdict, took: float = 0.0) -> None:
        if not self.done:
            self.record_at = time.monotonic() + GROUP_SECONDS
        self.done.append((task, verdict, took))

    def bury(self, task: q.Task, error: str, conn: q.Connection) -> tuple:
        return ("failed" if q.bury(conn, task, error=error) else None), error

    def put_back(self, task: q.Task, error: str, delay: float, conn: q.Connection) -> tuple:
        return ("put back" if q.release(conn, task, delay=delay, error=error) else None), error

    def report(self, task: q.Task, outcome: str | None, error: str | None, took: float) -> None:
        line = f"{task.queue} {task.task_type} {task.task_id} {outcome or 'lost'} attempt {task.attempts} {took:.2f} s"
        if outcome is None:
            error = "it was no longer this worker's: its lock file or the state was removed"
        if outcome != "put back" or f"{task.task_type} {error}" not in self.said:
            say(f"{line}: {error}" if error else line)
        if outcome == "put back":
            self.said.add(f"{task.task_type} {error}")

    def recovered(self, task: q.Task, outcome: str, error: str | None) -> None:
        say(
            f"{task.queue} {task.task_type} {task.task_id} {outcome} attempt {task.attempts}: {error or 'its handler ended without its worker'}"
        )

    # ------------------------------------------------------------------------------------------------------- database

    def exchange(self) -> None:
        """Claim and start what is next, then record what ended: handlers run while the disk is waited for.

        Trouble with the database is said once and tried again.
        """
        if time.monotonic() < self.retry_at:
            return
        try:
            conn, heard, self.heard = q.connect(self.state, create=False), self.heard, False
            if heard:
                self.take_in_spool()
                self.cancel_requested(conn)
            command_for = cache(self.command_for)
            for task in self.claim(conn):
                self.start(task, command_for)
            for supervisor in self.supervisors:
                self.hand_over(supervisor)
            reports = self.record(conn)
            if self.trouble:
                say("the database can be used again; going on")
            self.trouble, self.failures, self.retry_at = "", 0, 0.0
        except (q.QueueError, OSError) as error:
            if str(error) != self.trouble:
                say(f"trouble: {error}; trying again until it is mended")
            self.trouble = str(error)
            self.retry_at = time.monotonic() + RETRY_SECONDS[min(self.failures, len(RETRY_SECONDS) - 1)]
            self.failures += 1
            self.heard = True
            return
        for report in reports:
            self.report(*report)

    def take_in_spool(self) -> None:
        for complaint in set(q.take_in_spool(self.state)[1]) - self.said:
            self.said.add(complaint)
            say(f"spool: {complaint}")

    def claim(self, conn: q.Connection) -> list[q.Task]:
        """Claim a task for each free place, one of each queue in turn."""
        for queue in self.args.queues:
            q.ensure_queue(conn, queue)
        places = self.args.concurrency
        ahead = min(AHEAD, int(PREFETCH_SECONDS * places / self.seconds))
        free = 0 if self.stops else places + ahead - len(self.runs)
        if free <= ahead // 2:  # enough is at hand; to claim several costs little more than to claim one
            return []
        ready = [queue for queue in self.args.queues if queue in self.backlog or q.has_ready(conn, queue)]
        if not ready:
            return []
        tasks, owner = [], q.owner_name(self.state)
        how = {"max_attempts": self.args.max_attempts, "backoff": self.args.backoff, "then_queue": self.args.then}
        with q.transaction(conn, durable=False):
            while ready and free > 0:
                queue = ready.pop(0)
                limit = 1 if ready else free
                claimed = q.claim(conn, queue, owner, limit=limit, **how)
                tasks += claimed
                free -= len(claimed)
                if len(claimed) == limit:
                    ready.append(queue)
                    self.backlog.add(queue)
                else:
                    self.backlog.discard(queue)
        if tasks:  # the queue after the last one served is first next time
            turn = self.args.queues.index(tasks[-1].queue) + 1
            self.args.queues = self.args.queues[turn:] + self.args.queues[:turn]
        return tasks

    def cancel_requested(self, conn: q.Connection) -> None:
        for queue in {task.queue for task, _ in self.runs.values()}:
            cancelled = {row for (row,) in q.execute(conn, q.CANCEL_REQUESTED, queue, owner=q.owner_name(self.state))}
            for run, (task, _) in self.runs.items():
                if task.queue == queue and task.id in cancelled:
                    self.end_run(run, q.CANCELLED)

    def record(self, conn: q.Connection) -> list[tuple]:
        """Record how runs ended, in one transaction: what report() wants."""
        if not self.done or self.runs and time.monotonic() < self.record_at:
            return []
        with q.transaction(conn):
            outcomes = [verdict(conn) for _, verdict, _ in self.done]
        reports = [(task, *outcome, took) for (task, _, took), outcome in zip(self.done, outcomes, strict=True)]
        self.done = []
        completed = [task for task, outcome, *_ in reports if outcome == "completed"]
        if self.args.then and completed:
            q.wake(self.state)
        if hasattr(fcntl, "F_SETLEASE"):
            self.empties += (f"{self.logs}/{task.run_name}{ending}" for task in completed for ending in (".out", ".err"))
        return reports

    def serve(self) -> bool:
        """Hold the lock that says these queues have a worker: alone with --single, else with others. False if not had."""
        self.served_at = time.monotonic()
        for queue in self.args.queues:
            path, fd = q.make_private(self.state / "workers") / f"serving.{queue}", self.serving.get(queue)
            try:
                if fd is not None and os.stat(path).st_ino == os.fstat(fd).st_ino:
                    continue
            except OSError:
                pass
            fd = q.lock_file(path, shared=not self.args.single, patience=q.PROBE_SECONDS if self.args.single else 0)
            if fd is None:
                if self.args.single:
                    self.leave()
                return False
            if queue in self.serving:
                os.close(self.serving[queue])
            self.serving[queue] = fd
        return True

    def leave(self) -> None:
        for fd in self.serving.values():
            os.close(fd)
        self.serving.clear()

    # ------------------------------------------------------------------------------------------------ waiting, leaving

    def sleep(self) -> None:
        """Wait for an event: a handler's end, a commit, a signal; or for the next thing that is due."""
        now = time.monotonic()
        until = [now + q.SAFETY_TICK_SECONDS]
        if self.stop_at is not None:
            until.append(self.stop_at)
        if self.trouble:
            until.append(self.retry_at)
        elif self.done:
            until.append(self.record_at)
        else:
            try:
                if not self.stops and len(self.runs) < self.args.concurrency:
                    until.append(now + q.sleep_seconds(q.connect(self.state, create=False), self.args.queues))
            except q.QueueError:
                pass  # exchange() says so
        if self.args.idle_exit is not None:
            until.append(self.idle_since + self.args.idle_exit)
        if self.ear in dict(self.poll.poll(max(0.0, min(until) - now) * 1000)):
            os.read(self.ear, 65536)
            self.heard = True
        if now - self.served_at > q.SAFETY_TICK_SECONDS:
            self.tick()

    def tick(self) -> None:
        """Now and then: look whatever we hear, hold our locks on what is there, and keep the write-ahead log small."""
        self.heard = True
        try:
            if not self.serve() and self.args.single and not self.stops:
                say("another worker serves the queue by now; leaving (--single)")
                self.stop()
            exits = q.exits_file(self.state, q.owner_name(self.state))
            if not self.runs and not self.done and exits.exists():
                os.truncate(exits, 0)  # all is recorded
            wal = self.state / "tasks.db-wal"
            if wal.stat().st_size > q.WAL_BYTES:
                conn = q.connect(
                    self.state, create=False, busy_timeout_ms=50
                )  # writers wait while it waits for readers
                conn.execute("pragma wal_checkpoint(truncate)").fetchall()
                if wal.stat().st_size > WAL_WARN_BYTES and "wal" not in self.said:
                    self.said.add("wal")
                    say(f"{wal} has {wal.stat().st_size >> 20} MiB: a long read keeps it from being written back;"
                        f" find it with: fuser -v '{wal}'")  # fmt: skip
        except (q.QueueError, OSError, q.sqlite3.Error):
            pass  # exchange() says so

    def may_leave(self) -> bool:
        """Whether to end now."""
        if self.runs or self.done:
            self.idle_since = time.monotonic()
            return self.stops > 1 and not self.runs and bool(self.trouble)
        if self.stops:
            return True
        if self.trouble:  # without a database there is nothing to wait for; whoever makes one starts a worker
            return self.args.idle_exit is not None and time.monotonic() >= self.idle_since + self.args.idle_exit
        if not self.args.drain and self.args.idle_exit is None:
            return False
        try:
            conn = q.connect(self.state, create=False)
            if self.args.drain:
                return not any(self.busy(conn, queue) for queue in self.args.queues)
            if self.wanted(conn):
                self.idle_since = time.monotonic()
            elif time.monotonic() >= self.idle_since + self.args.idle_exit:
                self.leave()  # from here on, whoever enqueues starts another worker; so look once more
                if not self.wanted(conn) or not self.serve() and self.args.single:
                    say(f"idle for {self.args.idle_exit:g} s; leaving")
                    return True
                self.idle_since = time.monotonic()
        except q.QueueError:
            pass  # exchange() says so
        return False

    def wanted(self, conn: q.Connection) -> bool:
        """Whether anything waits, runs or is scheduled."""
        return any(self.busy(conn, queue) or q.next_due(conn, queue) for queue in self.args.queues)

    def waiting(self, conn: q.Connection, queue: str) -> bool:
        return q.has_ready(conn, queue) or bool(q.spooled_files(self.state / "spool" / queue))

    def busy(self, conn: q.Connection, queue: str) -> bool:
        """Whether anything waits or runs there, with this worker or another, or an orphan of one that died."""
        return self.waiting(conn, queue) or q.execute(conn, q.COUNT_CLAIMED, queue).fetchone()[0] > 0


if __name__ == "__main__":
    raise SystemExit(main())
