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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import queue_helpers as q

EX_USAGE = 64
NO_HANDLER_SECONDS = 60.0  # a task without a handler is looked at again this often; it costs it no attempt
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # while the database cannot be used
GROUP_SECONDS = 0.005  # runs that end within this time of each other are recorded together: one wait for the disk
BUSY_TIMEOUT_MS = 1_000  # shorter than elsewhere: handlers' timeouts are watched between two tries
WAL_WARN_BYTES = 4 * q.WAL_BYTES

# Stands in front of each handler, in its process group, sharing its locked stdout: when the worker has died, the exit
# code is in the file by the time that lock is free. One file for all: ext4 is slow to make files where many were just
# removed. TERM is for the handler; this waits for it.
SHIM = 'trap : TERM INT HUP; exits=$1 run=$2; shift 2; "$@"; code=$?; echo "$run $code" >>"$exits"; exit $code'

# A handler must not take itself for a part of whoever started the worker, or for a part of the worker's own uv run.
SCRUBBED = ("CLAUDECODE", "CLAUDE_CODE_ENTRYPOINT", "CLAUDE_CODE_SSE_PORT", "CLAUDE_CODE_SESSION_ID", "CLAUDE_CODE_EXECPATH",
            "CLAUDE_PROJECT_DIR", "CLAUDE_ENV_FILE", "CLAUDE_PLUGIN_ROOT", "VIRTUAL_ENV", "UV_RUN_RECURSION_DEPTH")  # fmt: skip

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
    """Our environment without what would have a handler take itself for a part of something else."""
    env = {name: value for name, value in os.environ.items() if name not in SCRUBBED}
    if "VIRTUAL_ENV" in os.environ:  # uv run put its own bin first
        ours = os.path.join(os.environ["VIRTUAL_ENV"], "bin")
        env["PATH"] = os.pathsep.join(p for p in env.get("PATH", "").split(os.pathsep) if p != ours)
    return {os.fsencode(name): os.fsencode(value) for name, value in env.items()}


def temporary_file():
    """A file for a handler's stdin, in memory where that can be had. No pipe: nothing blocks that is not read."""
    return os.fdopen(os.memfd_create("task"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def say(line: str) -> None:
    """One line on stderr; a closed terminal is no reason to stop working."""
    if sys.stderr is None:
        return
    try:
        print(time.strftime("%Y-%m-%d %H:%M:%S ") + " ".join(line.split()), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads it any more: let nothing fail of it at the end


class Run:
    """A handler at work."""

    def __init__(self, task: q.Task, process: subprocess.Popen, timeout: float) -> None:
        self.task, self.process, self.started = task, process, time.monotonic()
        self.end_at = self.started + timeout if timeout else None  # when to send the next signal
        self.next_signal = signal.SIGTERM
        self.why: str | None = f"timed out after {timeout:g} s" if timeout else None  # holds once a signal was sent
        self.ended = False  # whether one was

    def end(self, why: str, *, now: bool = False) -> None:
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
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # gone; macOS says the latter of zombies
            pass


class Worker:
    """The loop: reap, end what is overdue, then one transaction that records what ended and claims what is next."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.state = q.STATE_DIR
        self.logs = f"{self.state}/logs"
        self.handlers = os.path.abspath(args.handlers)
        self.clean = clean_environment()
        self.shim: list[str] = []
        self.runs: list[Run] = []
        self.done: list[tuple[q.Task, Verdict, float]] = []  # ended, not yet recorded
        self.record_at = 0.0  # when they must be
        self.stops = 0  # signals received
        self.stop_at = 0.0
        self.idle_since = time.monotonic()
        self.trouble, self.failures, self.retry_at = "", 0, 0.0
        self.said: set[str] = set()
        self.serving: dict[str, int] = {}
        self.served_at = 0.0
        # One pipe wakes the loop: signals by their number, the watch by a 0.
        self.ear, self.mouth = os.pipe()
        self.poll = select.poll()
        self.poll.register(self.ear, select.POLLIN)
        os.set_blocking(self.ear, False)
        os.set_blocking(self.mouth, False)

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
        exits = q.exits_file(self.state, q.owner_name(self.state))
        self.shim = ["/bin/sh", "-c", SHIM, "sh", str(exits)]
        signal.set_wakeup_fd(self.mouth, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
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
            for run in self.runs:
                run.kill(signal.SIGKILL)
            if not self.runs and not self.done:
                exits.unlink(missing_ok=True)
            q.resign(self.state)
        return 0

    def stop(self, *_) -> None:
        self.stops += 1
        self.stop_at = time.monotonic() + self.args.grace

    # ------------------------------------------------------------------------------------------------------- handlers

    def start(self, task: q.Task) -> None:
        """Start the handler of a claimed task; what cannot be started gets its verdict at once."""
        try:
            envelope, command = task.envelope, self.command_for(task)
            data = envelope["data"]
        except (ValueError, RecursionError, TypeError, AttributeError) as error:
            return self.end(task, partial(self.bury, task, f"data is not a JSON object: {error}"))
        except LookupError as error:
            if "/" in task.task_type or task.task_type.startswith("."):
                return self.end(task, partial(self.bury, task, f"{error}, nor can there be one"))
            return self.end(task, partial(self.put_back, task, str(error), NO_HANDLER_SECONDS))
        workspace = data.get("workspace_path")
        workspace = (
            workspace
            if isinstance(workspace, str) and os.path.isdir(workspace) and os.access(workspace, os.X_OK)
            else None
        )
        run = f"{self.logs}/{task.run_name}"
        try:
            out = self.output(f"{run}.out")
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the handler and its heirs are gone
                err = self.output(f"{run}.err")
                try:
                    with temporary_file() as stdin:
                        stdin.write(json.dumps(envelope).encode())
                        stdin.seek(0)
                        process = subprocess.Popen([*self.shim, task.run_name, *command], cwd=workspace,
                                                   stdin=stdin, stdout=out, stderr=err, start_new_session=True,
                                                   env=self.environment(task, envelope))  # fmt: skip
                finally:
                    os.close(err)
            finally:
                os.close(out)
        except ValueError as error:  # a NUL, from a writer that checks nothing
            return self.end(task, partial(self.bury, task, f"its id or type cannot be passed on: {error}"))
        except OSError as error:  # the disk is full, too many processes, …: not the task's fault
            why = f"its handler could not be started: {error}"
            if error.errno == errno.E2BIG:
                return self.end(task, partial(self.bury, task, f"{why}; its id or type is too long"))
            return self.end(task, partial(self.put_back, task, why, RETRY_SECONDS[-1]))
        self.runs.append(Run(task, process, self.args.timeout))

    def output(self, path: str) -> int:
        """A new file for a handler's output."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileExistsError:  # from an attempt of ours that did not count
            os.unlink(path)
        except FileNotFoundError:
            q.make_private(Path(self.logs))
            q.make_private(Path(path).parent)
        return os.open(path, flags, 0o600)

    def command_for(self, task: q.Task) -> list[str]:
        """What to run. LookupError when there is no handler for the task's type."""
        if self.args.command is not None:
            return self.args.command
        handler = f"{self.handlers}/{task.task_type}"
        if "/" in task.task_type or task.task_type.startswith(".") or not os.path.isfile(handler):
            raise LookupError(f"no handler {task.task_type!r} in {self.handlers}")
        if not os.access(handler, os.X_OK):
            raise LookupError(f"{handler} is not executable: chmod +x it")
        return [handler]

    def environment(self, task: q.Task, envelope: dict) -> dict[bytes, bytes]:
        return self.clean | {
            b"TASK_ID": os.fsencode(task.task_id),
            b"TASK_TYPE": os.fsencode(task.task_type),
            b"TASK_QUEUE": task.queue.encode(),
            b"TASK_ATTEMPT": b"%d" % task.attempts,
            b"TASK_DEPTH": b"%d" % (q.depth_of(envelope) + 1),
            b"TASK_QUEUE_STATE": os.fsencode(self.state),
        }

    def reap(self) -> None:
        """Give each handler that has ended its verdict."""
        for run in [run for run in self.runs if run.process.poll() is not None]:
            self.runs.remove(run)
            code, task = run.process.returncode, run.task
            if run.ended or code < 0:
                run.kill(
                    signal.SIGKILL
                )  # whoever of its group is left; a daemon of a handler that ended well is let be
            code = 128 - code if code < 0 else code
            if run.why == "cancelled" and run.ended:
                verdict = partial(self.cancel, task)
            elif run.why == "stopped" and run.ended and code != 0:
                verdict = partial(self.put_back, task, "its worker was stopped", 0.0)
            else:
                verdict = partial(self.settle, task, code, run.why if run.ended and run.why != "stopped" else None)
            self.end(task, verdict, time.monotonic() - run.started)

    def end_overdue(self) -> None:
        """Send the signals that are due: timeouts, cancellations, the end of a stop's grace."""
        if self.stops:
            for run in self.runs:
                if self.stops > 1:
                    run.end("stopped", now=True)
                elif time.monotonic() >= self.stop_at:
                    run.end("stopped")
        for run in self.runs:
            run.signal_when_due(self.args.kill_after)

    # ------------------------------------------------------------------------------------------------------- verdicts

    def end(self, task: q.Task, verdict: Verdict, took: float = 0.0) -> None:
        if not self.done:
            self.record_at = time.monotonic() + GROUP_SECONDS
        self.done.append((task, verdict, took))

    def settle(self, task: q.Task, exit_code: int, error: str | None, conn: q.Connection) -> tuple:
        return q.settle(conn, task, exit_code, error=error)

    def bury(self, task: q.Task, error: str, conn: q.Connection) -> tuple:
        return ("failed" if q.bury(conn, task, error=error) else None), error

    def put_back(self, task: q.Task, error: str, delay: float, conn: q.Connection) -> tuple:
        return ("put back" if q.release(conn, task, delay=delay, error=error) else None), error

    def cancel(self, task: q.Task, conn: q.Connection) -> tuple:
        return ("cancelled" if q.finish(conn, task, "cancelled", error="cancelled while it ran") else None), None

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
            for task in self.claim():
                self.start(task)
            reports = self.record()
            if self.trouble:
                say("the database can be used again; going on")
            self.trouble, self.failures, self.retry_at = "", 0, 0.0
        except (q.QueueError, OSError) as error:
            if str(error) != self.trouble:
                say(f"trouble: {error}; trying again until it is mended")
            self.trouble = str(error)
            self.retry_at = time.monotonic() + RETRY_SECONDS[min(self.failures, len(RETRY_SECONDS) - 1)]
            self.failures += 1
            return
        for report in reports:
            self.report(*report)

    def claim(self) -> list[q.Task]:
        """Claim a task for each free place, one of each queue in turn; first the spool is taken in."""
        conn = q.connect(self.state, create=False)
        for complaint in set(q.take_in_spool(self.state)[1]) - self.said:
            self.said.add(complaint)
            say(f"spool: {complaint}")
        for queue in self.args.queues:
            q.ensure_queue(conn, queue)
        free = 0 if self.stops else self.args.concurrency - len(self.runs)
        ready = [queue for queue in self.args.queues if q.has_ready(conn, queue)] if free > 0 else []
        if not ready:
            return []
        tasks, owner = [], q.owner_name(self.state)
        how = {"max_attempts": self.args.max_attempts, "backoff": self.args.backoff, "then_queue": self.args.then}
        with q.transaction(conn, durable=False):
            while ready and free > 0:
                queue = ready.pop(0)
                if claimed := q.claim(conn, queue, owner, **how):
                    tasks += claimed
                    free -= 1
                    ready.append(queue)
        if tasks:  # the queue after the last one served is first next time
            turn = self.args.queues.index(tasks[-1].queue) + 1
            self.args.queues = self.args.queues[turn:] + self.args.queues[:turn]
        return tasks

    def record(self) -> list[tuple]:
        """Record how runs ended, in one transaction: what report() wants. Sees to requested cancellations, too."""
        conn = q.connect(self.state, create=False)
        for queue in {run.task.queue for run in self.runs}:
            cancelled = {row for (row,) in q.execute(conn, q.CANCEL_REQUESTED, queue, owner=q.owner_name(self.state))}
            for run in self.runs:
                if run.task.queue == queue and run.task.id in cancelled:
                    run.end("cancelled")
                    run.signal_when_due(self.args.kill_after)
        if not self.done or self.runs and time.monotonic() < self.record_at:
            return []
        with q.transaction(conn):
            outcomes = [verdict(conn) for _, verdict, _ in self.done]
        done, self.done = self.done, []
        if self.args.then and any(outcome == "completed" for outcome, _ in outcomes):
            q.wake(self.state)
        return [(task, *outcome, took) for (task, _, took), outcome in zip(done, outcomes)]

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
        until = [now + q.SAFETY_TICK_SECONDS, *(run.end_at for run in self.runs if run.end_at is not None)]
        if self.stops == 1 and self.runs and now < self.stop_at:
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
        self.poll.poll(max(0.0, min(until) - now) * 1000)
        try:
            while len(os.read(self.ear, 65536)) == 65536:
                pass
        except BlockingIOError:
            pass
        if now - self.served_at > q.SAFETY_TICK_SECONDS:
            self.tick()

    def tick(self) -> None:
        """Now and then: hold our locks on what is there now, and keep the write-ahead log small."""
        try:
            if not self.serve() and self.args.single and not self.stops:
                say("another worker serves the queue by now; leaving (--single)")
                self.stop()
            q.owner_name(self.state)
            exits = Path(self.shim[-1])
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
