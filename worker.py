#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["watchdog>=4,<8"]
# ///
"""Run the tasks of one or more queues: each by the executable in --handlers that bears its task
type's name.

    worker.py notifications --then completions              results become the next queue's tasks
    worker.py approvals --timeout 1800 -- claude -p         one command for every task type
    worker.py notifications approvals --concurrency 4 --drain

A handler gets the task's envelope on stdin as JSON, and TASK_ID, TASK_TYPE, TASK_QUEUE,
TASK_ATTEMPT, TASK_DEPTH and TASK_QUEUE_STATE in its environment. It runs in data.workspace_path,
which must exist, or where the worker was started, in a process group of its own. A command, and
what PATH has, is looked for where the worker was started, and never in a workspace. What it prints
is the task's result; stdout and stderr are kept in state/logs. Its exit code decides:

    0 done    75 not now, does not count (a last line {"retry_after": SECONDS} says when)    65 never, dead letter
    anything else, a signal or the timeout: a failed attempt; back-off, then dead letter when --max-attempts are spent

SIGTERM or Ctrl-C: claim no more, let handlers finish for --grace seconds, then end them; their
tasks go back uncounted. A second one ends them at once.

exit codes: 0 stopped, drained, idle, or others serve all its queues (--single); 1 the database
cannot be used; 64 usage: no such program, no such directory of handlers, a relative
TASK_QUEUE_STATE.
"""

import argparse
import importlib.util
import json
import os
import select
import shlex
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import queue_helpers as q
from taskqueue import environment, runs, service, serving
from taskqueue import recovery as owners
from taskqueue.cli import duration, make_parser
from taskqueue.database import LIVE
from taskqueue.handlers import (
    Handlers,
    Unstarted,
    add_run_options,
    check_run_options,
    resolve,
    say,
    start_clean,
    stdin_file,
    with_remedy,
)
from taskqueue.remedies import as_typed, remedies_as_typed
from taskqueue.supervisor import RESET_SIGNALS, wakeup_pipe
from taskqueue.text import ago, pause_in_words, visible

SCRIPT = os.path.abspath(__file__)
# How long to wait between two tries while the database cannot be used.
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# --on-dead runs its command this often at most.
ON_DEAD_SECONDS = 60.0
# Runs that end within this time of each other are recorded together: one wait for the disk.
GROUP_SECONDS = 0.01
# Shorter than elsewhere, so that signals and handlers' ends are seen to between two tries.
BUSY_TIMEOUT_MS = 1_000
WAL_WARN_BYTES = 4 * q.WAL_BYTES

COUNT = """
select count(*), min(due_at) from "{{queue}}" where {}"""
# The states that the last line names.
LEFT = ("pending", "scheduled", "held", "blocked")

# Records how a run ended, in a transaction, and returns (outcome, error).
Verdict = Callable[[q.Connection], tuple]


def parse(argv: list[str] | None) -> argparse.Namespace:
    argv, command = sys.argv[1:] if argv is None else argv, None
    if "--" in argv:
        argv, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = make_parser("worker.py", __doc__)
    add_options(parser.add_argument)
    args = parser.parse_args(argv)
    try:
        if args.environment:
            environment.enter(args.environment, q.STATE_DIR)
        args.queues = list(dict.fromkeys(map(q.check_queue_name, args.queues)))
        check_run_options(args, command)
        if q.state_complaint:
            raise ValueError(q.state_complaint)
        if args.on_dead is not None:
            args.on_dead = resolve(shlex.split(args.on_dead), args.env["PATH"])
        if args.then:
            q.check_queue_name(args.then)
        elif args.then_hold:
            raise ValueError("--then-hold goes with --then")
    except ValueError as error:
        parser.error(visible(str(error)))
    return args


# fmt: off
def add_options(add: Callable) -> None:
    """The options; those with a number of seconds take fractions."""
    add("queues", metavar="QUEUE", nargs="+")
    add_run_options(add, __file__)
    add("--then", metavar="QUEUE",
        help="enqueue what a handler prints there, in the transaction that records it as done")
    add("--then-hold", action="store_true",
        help="with --then: results wait until a person approves them")
    add("--chain", action="store_true",
        help="a result's last line may enqueue tasks: {\"enqueue\": [{\"queue\", \"task_type\", \"data\"}, …]}")
    add("--on-dead", metavar="COMMAND",
        help="run this when tasks have become dead letters, once a minute at most, with all of them as JSON on stdin")
    add("--crash-backoff", metavar="DURATION", type=duration, default=0.0,
        help="before a dead worker's task runs again (default 0: at once)")
    add("--drain", action="store_true",
        help="leave when nothing is ready or running")
    add("--idle-exit", metavar="DURATION", type=duration,
        help="leave when nothing waited, ran or was scheduled for this long")
    add("--single", action="store_true",
        help="leave a queue to another worker while that one serves it; end at once if others serve all of them")
    add("--when-work", action="store_true",
        help="end at once where nothing waits and no dead worker's task is to be taken back; units say so")
    add("--environment", metavar="FILE", type=os.path.abspath,
        help="take every variable from this file, and none from the caller; hooks and units say so")
# fmt: on


def main(argv: list[str] | None = None) -> int:
    start_clean()
    args = parse(argv)
    try:
        if args.when_work and service.no_work(args.queues):
            return 0
        if args.environment:
            start_with_packages(sys.argv[1:] if argv is None else argv)
        return Worker(args).run()
    except (q.QueueError, OSError) as error:
        say(f"{as_typed('worker.py')}: {with_remedy(error, q.STATE_DIR)}")
        return 1


def start_with_packages(argv: list[str]) -> None:
    """Become this worker under uv, where the Python that a hook or a unit started has no watchdog."""
    uv = environment.find_uv(os.environ)
    if uv and importlib.util.find_spec("watchdog") is None:
        try:
            os.execv(uv, [uv, "run", "-q", "--no-config", "--script", SCRIPT, *argv])
        except OSError as error:
            raise q.QueueError(f"{uv} cannot be started: {error.strerror}") from None


class Worker:
    """The loop: hear what ended, claim and start what is next, then record what ended."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.state = q.STATE_DIR
        how = dict(command=args.command, timeout=args.timeout, kill_after=args.kill_after)
        self.handlers = Handlers(self.state, args.env, args.handlers, **how)
        self.supervisor, self.runs = self.handlers.supervisor, self.handlers.runs
        # What has ended and is not yet recorded, with the seconds it took; and when it must be
        # recorded.
        self.done: list[tuple[q.Task, Verdict, float]] = []
        self.record_at = 0.0
        # Whether a run among these may have paused its queue.
        self.may_pause = False
        # How many tasks ended how; how the last run ended of those that have not; and the dead
        # letters that --on-dead is yet to be told.
        self.counts: Counter[str] = Counter()
        self.unended: dict[tuple[str, int], str] = {}
        self.dead: list[dict] = []
        self.tell_dead_at = 0.0
        # Whether others may have changed the database or the spool since we looked.
        self.changed = True
        # The signals received, and when what still runs is to be ended.
        self.stops = 0
        self.stop_at: float | None = None
        self.idle_since = time.monotonic()
        self.trouble, self.failures, self.retry_at = "", 0, 0.0
        # Until when a queue is left alone that has trouble of its own.
        self.broken: dict[str, float] = {}
        self.said: set[str] = set()
        self.serving: dict[str, int] = {}
        self.served_at = 0.0
        # One pipe wakes the loop: signals by their number, the watch by a 0.
        self.wakeup, self.waker = wakeup_pipe()
        self.poll = select.poll()
        self.poll.register(self.wakeup, select.POLLIN)
        self.poll.register(self.supervisor.socket, select.POLLIN)

    def set(self) -> None:
        """Wake the loop; this makes us a listener of the watch."""
        try:
            os.write(self.waker, b"\0")
        # The pipe is full: the last signal has not been read yet.
        except BlockingIOError:
            pass

    def connect(self, create: bool = False) -> q.Connection:
        return q.connect(self.state, create=create, busy_timeout_ms=BUSY_TIMEOUT_MS)

    def run(self) -> int:
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, self.handlers.children_changed)
        conn = self.connect(create=True)
        for queue in (*self.args.queues, *([self.args.then] if self.args.then else [])):
            self.prepare(conn, queue)
        q.make_private(self.state / "logs")
        if not self.serve():
            say(f"another worker serves {' and '.join(self.args.queues)}; leaving (--single)")
            return 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # A process that was started by nohup ignores SIGHUP, and goes on doing so.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.stop)
        watch = q.Watch.of(self.state)
        watch.crash_backoff = self.args.crash_backoff
        watch.on_recovered = self.recovered
        watch.on_deaf = say
        watch.listeners.add(self)
        self.set()
        say(f"worker {q.owner_name(self.state)} serves {', '.join(self.usable())}")
        try:
            while not self.may_leave():
                self.sleep()
                self.reap()
                self.end_overdue()
                self.exchange()
                if self.dead and time.monotonic() >= self.tell_dead_at:
                    self.tell_dead()
            # A task that has just been taken back is no longer waited for, and yet to be counted.
            watch.leave()
            self.say_goodbye()
        finally:
            if self.dead:
                self.tell_dead()
            self.handlers.leave()
            q.resign(self.state)
        return 0

    def stop(self, *_) -> None:
        self.stops += 1
        self.stop_at = time.monotonic() + self.args.grace if self.stops == 1 else 0.0

    # ------------------------------------------------------------------------------------------------------- handlers

    def start(self, task: q.Task) -> None:
        """Start the handler of a claimed task; what cannot be started gets its verdict at once."""
        unstarted = self.handlers.start(task)
        if unstarted:
            self.end_unstarted(task, unstarted)
        else:
            say(f"{task.queue} {task.task_type} {task.task_id} started attempt {task.attempts}")

    def reap(self) -> None:
        """Give each handler that has ended its verdict."""
        try:
            ended = self.handlers.hear()
        except EOFError:
            self.start_afresh()
        for task, told in ended:
            if isinstance(told, Unstarted):
                self.end_unstarted(task, told)
                continue
            verdict = partial(q.settle, task=task, exit_code=told["code"], why=told["why"])
            self.end(task, verdict, told["seconds"])
            self.may_pause |= told["code"] == q.EX_TEMPFAIL

    def start_afresh(self) -> NoReturn:
        """The supervisor was killed; what this process had claimed is a dead owner's from here on."""
        if self.stops:
            say("the supervisor of handlers was killed; the next worker sees to their tasks")
            os._exit(1)
        if self.dead:
            self.tell_dead()
        self.handlers.start_afresh()

    def end_overdue(self) -> None:
        """After a signal: end what still runs when the grace is over, or after a second signal."""
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            self.stop_at = None
            self.handlers.end_all(q.STOPPED, now=self.stops > 1)

    # ------------------------------------------------------------------------------------------------------- verdicts

    def end(self, task: q.Task, verdict: Verdict, took: float = 0.0) -> None:
        if not self.done:
            self.record_at = time.monotonic() + GROUP_SECONDS
        self.done.append((task, verdict, took))

    def end_unstarted(self, task: q.Task, unstarted: Unstarted) -> None:
        """Have the end of a task recorded whose handler did not run."""
        do, error, delay = unstarted

        def verdict(conn: q.Connection) -> tuple:
            if do == "retry":
                return q.nack(conn, task, error=error, delay=delay), error
            if do == "bury":
                return ("failed" if q.bury(conn, task, error=error) else None), error
            held = q.release(conn, task, delay=delay or 0.0, error=error)
            return ("put back" if held else None), error

        self.end(task, verdict)

    def report(self, task: q.Task, outcome: str | None, error: str | None, took: float) -> None:
        self.count(task, outcome, error)
        line = f"{task.queue} {task.task_type} {task.task_id} {outcome or 'lost'} attempt {task.attempts} {took:.2f} s"
        if outcome is None:
            error = "it was no longer this worker's: its lock file or the state was removed"
        if outcome != "put back" or f"{task.task_type} {error}" not in self.said:
            say(f"{line}: {error}{self.pause_of(task.queue, error)}" if error else line)
        if outcome == "put back":
            self.said.add(f"{task.task_type} {error}")

    def pause_of(self, queue: str, told: str = "") -> str:
        """Say that a queue is paused now; without the reason where `told` has it."""
        try:
            control = q.controls(self.connect()).get(queue)
        except q.QueueError:
            return ""
        if not control or not control.paused:
            return ""
        reason = None if control.reason and control.reason in told else control.reason
        return f"; {queue} is {pause_in_words(control._replace(reason=reason))}"

    def count(self, task: q.Task, outcome: str | None, error: str | None) -> None:
        """Count a task that has ended, once, and remember a dead letter for --on-dead."""
        which = (task.queue, task.id)
        if outcome in ("completed", "failed", "cancelled"):
            self.unended.pop(which, None)
            self.counts[outcome] += 1
        else:
            self.unended[which] = outcome or "lost"
        if outcome == "failed" and self.args.on_dead:
            told = {"queue": task.queue, "task_id": task.task_id, "task_type": task.task_type}
            self.dead.append({**told, "attempts": task.attempts, "error": error})

    def tell_dead(self) -> None:
        """Run the command of --on-dead. Nobody waits for it; its trouble is one line."""
        letters, self.dead = self.dead, []
        self.tell_dead_at = time.monotonic() + ON_DEAD_SECONDS
        try:
            fd = stdin_file(json.dumps(letters).encode())
            try:
                files = [(os.POSIX_SPAWN_DUP2, fd, 0), (os.POSIX_SPAWN_DUP2, 2, 1)]
                command, env = self.args.on_dead, self.args.env
                os.posix_spawn(
                    command[0],
                    command,
                    env,
                    file_actions=files,
                    setsid=True,
                    setsigmask=(),
                    setsigdef=RESET_SIGNALS,
                )
            finally:
                os.close(fd)
        except OSError as error:
            say(f"--on-dead could not be run: {error}")

    def say_goodbye(self) -> None:
        """Say how many tasks ended how, and what is left in each queue."""
        words = {"completed": "done", "failed": "failed", "cancelled": "cancelled",
                 "scheduled": "to be tried again", "put back": "put back", "lost": "lost"}  # fmt: skip
        counts = self.counts + Counter(self.unended.values())
        ended = [f"{counts[outcome]} {word}" for outcome, word in words.items() if counts[outcome]]
        say("; ".join([", ".join(ended) or "no task was run", *self.left_behind()]))

    def left_behind(self) -> list[str]:
        """Name what waits in each queue, by its state."""
        left = []
        try:
            conn = self.connect()
            for queue in self.usable():
                found = {name: q.execute(conn, COUNT.format(LIVE[name]), queue).fetchone()
                         for name in LEFT}  # fmt: skip
                states = [f"{count} {name}" for name, (count, _) in found.items() if count]
                if not states:
                    continue
                due = found["scheduled"][1]
                when = "" if due is None else f", the next {ago(due)}"
                left.append(f"{', '.join(states)} in {queue}{when}{self.pause_of(queue)}")
        except q.QueueError:
            pass
        return left

    def recovered(self, task: q.Task, outcome: str, error: str | None) -> None:
        self.count(task, outcome, error)
        line = f"{task.queue} {task.task_type} {task.task_id} {outcome} attempt {task.attempts}"
        say(f"{line}: {error or 'its handler ended without its worker'}")

    # ------------------------------------------------------------------------------------------------------- database

    def leave_when_removed(self) -> None:
        """Claim no more when these scripts are gone: an update of the plugin has a directory of its
        own.

        What runs is let finish, and the next hook starts a worker that knows its handlers.
        """
        if not self.stops and not os.path.exists(SCRIPT):
            say(f"{SCRIPT} is gone: leaving")
            self.stops = 1

    def exchange(self) -> None:
        """Claim and start what is next, then record what ended: handlers run while the disk is
        waited for.

        Trouble with the database is said once and tried again.
        """
        if time.monotonic() < self.retry_at:
            return
        self.leave_when_removed()
        try:
            conn, changed, self.changed = self.connect(), self.changed, False
            if changed:
                self.take_in_spool()
                self.end_cancelled(conn)
            # A pause holds before the next claim of the worker whose handler asked for it.
            if self.may_pause:
                for report in self.record(conn):
                    self.report(*report)
            for task in self.claim(conn):
                self.start(task)
            reports = self.record(conn)
            if self.trouble:
                say("the database can be used again; going on")
            self.trouble, self.failures, self.retry_at = "", 0, 0.0
        except (q.QueueError, OSError) as error:
            if str(error) != self.trouble:
                say(f"trouble: {with_remedy(error, self.state)}; trying again until it is mended")
            self.trouble = str(error)
            pause = RETRY_SECONDS[min(self.failures, len(RETRY_SECONDS) - 1)]
            self.retry_at = time.monotonic() + pause
            self.failures += 1
            self.changed = True
            return
        for report in reports:
            self.report(*report)

    def complain(self, about: str) -> None:
        """Say what is in the way of something that others need not wait for; each thing once."""
        if about not in self.said:
            self.said.add(about)
            say(remedies_as_typed(about))

    def take_in_spool(self) -> None:
        """Take in what waits in the spool. Whatever happens there is no reason not to claim."""
        try:
            for complaint in q.take_in_spool(self.state)[1]:
                self.complain(f"spool: {complaint}")
        except q.QueueBusy:
            self.changed = True
        except Exception as error:
            self.complain(f"spool: {error}")

    def prepare(self, conn: q.Connection, queue: str) -> bool:
        """Have the queue's table made. A queue that has trouble of its own is left alone for a
        while: False.
        """
        if self.broken.get(queue, 0.0) > time.monotonic():
            return False
        try:
            if q.ensure_queue(conn, queue):
                say(f"{queue} is a new queue")
            self.broken.pop(queue, None)
            return True
        except q.QueueBusy:
            raise
        except q.QueueError as error:
            self.leave_alone(queue, error)
            return False

    def leave_alone(self, queue: str, error: q.QueueError) -> None:
        """Take a queue's trouble for its own, unless every other has some as well: then it is the
        database's.
        """
        self.broken[queue] = time.monotonic() + RETRY_SECONDS[-1]
        if all(self.broken.get(other, 0.0) > time.monotonic() for other in self.own()):
            self.broken.clear()
            raise error
        self.complain(f"queue {queue}: {error}; the other queues go on")

    def claim(self, conn: q.Connection) -> list[q.Task]:
        """Claim a task for each free place, one of each queue in turn."""
        free = 0 if self.stops else self.args.concurrency - len(self.runs)
        if free <= 0:
            return []
        queues = [queue for queue in self.own() if self.room(queue) and self.prepare(conn, queue)]
        ready = [queue for queue in queues if self.ask(conn, queue, q.has_ready)]
        if not ready:
            return []
        tasks, owner, args = [], q.owner_name(self.state), self.args
        how = dict(max_attempts=args.max_attempts, backoff=args.backoff, then_queue=args.then)
        how |= dict(then_hold=args.then_hold, chain=args.chain)
        with q.transaction(conn, durable=False):
            while ready:
                queue = ready.pop(0)
                room = self.room(queue, tasks)
                limit = min(room, 1 if ready else room)
                claimed = self.ask(conn, queue, q.claim, owner, limit=limit, **how) if room else []
                tasks += claimed or []
                if room and len(claimed or []) == limit:
                    ready.append(queue)
        # The queue after the last one served is first next time.
        if tasks:
            turn = self.args.queues.index(tasks[-1].queue) + 1
            self.args.queues = self.args.queues[turn:] + self.args.queues[:turn]
        return tasks

    def room(self, queue: str, claimed: Sequence[q.Task] = ()) -> int:
        """How many more tasks of a queue may start: a place is kept for each queue that has none
        running, so that no queue waits behind another. `claimed` is about to start.
        """
        running = Counter(task.queue for task in (*self.runs.values(), *claimed))
        places, queues = self.args.concurrency, self.own()
        kept = [other for other in queues if other != queue and not running[other]]
        # Where a person wants fewer places than queues, the queues take turns.
        kept = kept if places >= len(queues) else []
        return max(0, places - running.total() - len(kept))

    def ask(self, conn: q.Connection, queue: str, question: Callable, *args, **options):
        """What a function answers about one queue; None where the queue has trouble of its own."""
        try:
            return question(conn, queue, *args, **options)
        except q.QueueBusy:
            raise
        except q.QueueError as error:
            self.leave_alone(queue, error)
            return None

    def end_cancelled(self, conn: q.Connection) -> None:
        owner = q.owner_name(self.state)
        for queue in {task.queue for task in self.runs.values()}:
            rows = self.ask(conn, queue, owners.cancel_requested, owner) or ()
            for run, task in self.runs.items():
                if task.queue == queue and task.id in rows:
                    self.supervisor.end(run, q.CANCELLED)

    def record(self, conn: q.Connection) -> list[tuple]:
        """Record how runs ended, in one transaction: what report() wants."""
        is_soon = self.runs and not self.may_pause and time.monotonic() < self.record_at
        if not self.done or is_soon:
            return []
        with q.transaction(conn):
            reports = [
                (task, *owners.verdict_alone(conn, task, verdict), took)
                for task, verdict, took in self.done
            ]
        self.done, self.may_pause = [], False
        for task, *_ in reports:
            runs.tidy_run(self.state, task)
        if (self.args.then or self.args.chain) and any(
            outcome == "completed" for _, outcome, *_ in reports
        ):
            q.wake(self.state)
        return reports

    def serve(self) -> bool:
        """Hold the locks that say that these queues have a worker; with --single those that nobody
        else holds. False when there is none of these.
        """
        single = self.args.single
        self.served_at = time.monotonic()
        for queue in self.args.queues:
            q.make_private(self.state / "workers")
            path = serving.lock_file(self.state, queue)
            fd = self.serving.get(queue)
            try:
                if fd is not None and os.stat(path).st_ino == os.fstat(fd).st_ino:
                    continue
            except OSError:
                pass
            if fd is not None:
                os.close(self.serving.pop(queue))
            elif single and len(self.runs) >= self.args.concurrency:
                # Its tasks would wait here, while a hook that finds no worker starts one.
                continue
            # Whoever wants to be the only one outwaits those who only look whether the lock is
            # held. The locks that are still wanted are tried again anyway.
            patience = q.PROBE_SECONDS if single and not self.serving else 0
            fd = q.lock_file(path, shared=not single, patience=patience)
            if fd is not None:
                self.serving[queue] = fd
                # Whoever enqueues looks there for the handlers.
                names = (
                    serving.ANY_TYPE if self.args.command else os.path.abspath(self.args.handlers)
                )
                os.ftruncate(fd, 0)
                os.pwrite(fd, os.fsencode(names), 0)
        return bool(self.serving) or not single

    def own(self) -> list[str]:
        """The queues that this worker serves: all, but with --single those that others serve."""
        single = self.args.single
        return [queue for queue in self.args.queues if not single or queue in self.serving]

    def leave(self) -> None:
        for fd in self.serving.values():
            os.close(fd)
        self.serving.clear()

    # ------------------------------------------------------------------------------------------------ waiting, leaving

    def sleep(self) -> None:
        """Wait for an event: a handler's end, a commit, a signal; or for the next thing that is
        due.
        """
        now = time.monotonic()
        until = [now + q.SAFETY_TICK_SECONDS]
        if self.stop_at is not None:
            until.append(self.stop_at)
        if self.trouble:
            until.append(self.retry_at)
        elif self.done:
            until.append(self.record_at)
        elif not self.stops and len(self.runs) < self.args.concurrency:
            # Trouble here is what exchange() will meet, and say.
            try:
                conn = self.connect()
                queues = [queue for queue in self.usable() if self.room(queue)]
                until.append(now + q.sleep_seconds(conn, queues))
            except q.QueueError:
                pass
        if self.args.idle_exit is not None:
            until.append(self.idle_since + self.args.idle_exit)
        if self.dead:
            until.append(self.tell_dead_at)
        if self.wakeup in dict(self.poll.poll(max(0.0, min(until) - now) * 1000)):
            os.read(self.wakeup, 65536)
            self.changed = True
        if now - self.served_at > q.SAFETY_TICK_SECONDS:
            self.tick()

    def usable(self) -> list[str]:
        """The queues that have no trouble of their own."""
        return [queue for queue in self.own() if queue not in self.broken]

    def tick(self) -> None:
        """Now and then: look again, see that supervisor and locks are still there, and keep the WAL
        small.
        """
        self.changed = True
        self.supervisor.ask()
        # What is in the way here is met by exchange() as well, and said there.
        try:
            before = self.own()
            if not self.serve() and not self.stops:
                say("another worker serves the queue by now; leaving (--single)")
                self.stop()
            if more := set(self.own()).difference(before):
                say(f"serves {', '.join(sorted(more))} from now on: nobody else does")
            # Where the database is a symbolic link, the log lies beside its target.
            wal = f"{os.path.realpath(self.state / 'tasks.db')}-wal"
            if os.stat(wal).st_size > q.WAL_BYTES:
                # A short wait: writers wait while it waits for readers.
                conn = q.connect(self.state, create=False, busy_timeout_ms=50)
                conn.execute("pragma wal_checkpoint(truncate)").fetchall()
                if os.stat(wal).st_size > WAL_WARN_BYTES:
                    self.complain(
                        f"{wal} has over {WAL_WARN_BYTES >> 20} MiB: a long read keeps it from being"
                        f" written back; find it with: fuser -v '{wal}'"
                    )
        except (q.QueueError, OSError, sqlite3.Error):
            pass

    def may_leave(self) -> bool:
        """Whether to end now."""
        if self.runs or self.done:
            self.idle_since = time.monotonic()
            return self.stops > 1 and not self.runs and bool(self.trouble)
        if self.stops:
            return True
        idle = self.args.idle_exit
        # Without a database there is nothing to wait for; whoever makes one starts a worker.
        if self.trouble:
            return idle is not None and time.monotonic() >= self.idle_since + idle
        if not self.args.drain and idle is None:
            return False
        try:
            conn = self.connect()
            if self.args.drain:
                return not any(self.busy(conn, queue) for queue in self.usable())
            queues = self.usable()
            if self.wanted(conn, queues):
                self.idle_since = time.monotonic()
            elif time.monotonic() >= self.idle_since + idle:
                # From here on, whoever enqueues starts another worker; so look once more.
                self.leave()
                if not self.wanted(conn, queues) or not self.serve():
                    say(f"idle for {idle:g} s; leaving")
                    return True
                self.idle_since = time.monotonic()
        # exchange() says so.
        except q.QueueError:
            pass
        return False

    def wanted(self, conn: q.Connection, queues: list[str]) -> bool:
        """Whether anything waits, runs or is scheduled."""
        return any(self.busy(conn, queue) or q.next_due(conn, queue) for queue in queues)

    def waiting(self, conn: q.Connection, queue: str) -> bool:
        # What take_in_spool() complains of is not waited for.
        try:
            spooled = q.spooled_files(self.state / "spool" / queue)
        except OSError:
            spooled = []
        return bool(spooled) or q.has_ready(conn, queue)

    def busy(self, conn: q.Connection, queue: str) -> bool:
        """Whether anything waits or runs there, with this worker or another, or an orphan of one
        that died.
        """
        claimed = q.execute(conn, q.COUNT_CLAIMED, queue).fetchone()[0]
        return claimed > 0 or self.waiting(conn, queue)


if __name__ == "__main__":
    raise SystemExit(main())
