#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["cronsim>=2.6,<3", "watchdog>=4,<8"]
# ///
"""Run the tasks of one or more queues.

    worker.py notifications --then completions              results become the next queue's tasks
    worker.py approvals --timeout 1800 -- claude -p         one command for every task type
    worker.py notifications approvals --concurrency 4 --drain

A task's handler is the executable in --handlers that has its task type's name. It gets the task's
envelope on stdin as JSON, and TASK_ID, TASK_TYPE, TASK_QUEUE, TASK_ATTEMPT, TASK_DEPTH and
TASK_QUEUE_STATE in its environment. It runs in a process group of its own, in data.workspace_path,
which must exist, or in the directory in which the worker was started. The worker never looks for a
program in a workspace. The handler's stdout is the task's result, its stderr the log; both are kept
in state/logs. Its exit code decides:

    0     done
    75    not now, uncounted; a last line {"retry_after": SECONDS} says when
    65    never: a dead letter
    else  a failed attempt, and so are a signal and the timeout: back-off, then a dead letter when
          --max-attempts are spent

SIGTERM or Ctrl-C: the worker claims no more, lets handlers finish for --grace seconds, then ends
them; their tasks go back uncounted. A second signal ends them at once.

exit codes: 0 stopped, drained, idle, updated, or others serve all its queues (--single); 1 the
database cannot be used; 64 usage: no such program, no such directory of handlers, a relative
TASK_QUEUE_STATE.
"""

import argparse
import importlib
import importlib.util
import math
import os
import select
import shlex
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import queue_helpers as q
from taskqueue import costs, environment, every, installation, notify, recovery, service
from taskqueue import outcome as outcomes
from taskqueue.cli import duration, make_parser
from taskqueue.control import Control, controls_of
from taskqueue.database import LIVE
from taskqueue.remedies import as_typed, remedies_as_typed
from taskqueue.running import (
    COSTS,
    TOLD,
    End,
    Handlers,
    resolve,
    say,
    start_clean,
    tidy_run,
    with_remedy,
)
from taskqueue.serving import ANY_TYPE, ServingLocks, default_handlers
from taskqueue.supervisor import wakeup_pipe
from taskqueue.text import ago, pause_in_words, visible
from taskqueue.times import parse_duration

SCRIPT = os.path.abspath(__file__)
# Seconds between two tries while the database cannot be used.
RETRY_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# Shorter than elsewhere: signals and handlers' ends are seen to between two tries.
BUSY_TIMEOUT_MS = 1_000
WAL_WARN_BYTES = 4 * q.WAL_BYTES

COUNT = """
select count(*), min(due_at) from "{{queue}}" where {}"""
# The states that the last line names.
LEFT = ("pending", "scheduled", "held", "blocked")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with 64 when one is wrong."""
    argv, command = sys.argv[1:] if argv is None else argv, None
    if "--" in argv:
        argv, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = make_parser("worker.py", __doc__)
    add_options(parser.add_argument)
    args = parser.parse_args(argv)
    try:
        if args.environment:
            environment.enter(args.environment, q.STATE_DIR)
        if q.state_complaint:
            raise ValueError(q.state_complaint)
        check(args, command)
    except ValueError as error:
        parser.error(visible(str(error)))
    return args


def check(args: argparse.Namespace, command: list[str] | None) -> None:
    """Set args.env, the handlers' environment, and resolve programs. Raises ValueError."""
    args.queues = list(dict.fromkeys(map(q.check_queue_name, args.queues)))
    # The hub's URL may hold a password.
    args.env = environment.handler_environment(
        os.environ, without=(*TOLD, *COSTS, "TASK_QUEUE_HUB", environment.TIMEOUT)
    )
    args.command = None if command is None else resolve(command, args.env["PATH"])
    args.concurrency = args.concurrency or len(args.queues)
    if command is None and not args.handlers.is_dir():
        raise ValueError(f"--handlers {args.handlers}: there is no such directory")
    if args.on_dead is not None:
        args.on_dead = resolve(shlex.split(args.on_dead), args.env["PATH"])
    check_notify(args)
    if args.timeout is None:
        args.timeout = default_timeout()
    if args.then:
        q.check_queue_name(args.then)
    elif args.then_hold:
        raise ValueError("--then-hold goes with --then")


def check_notify(args: argparse.Namespace) -> None:
    """Set the command of --notify and the types of --notify-done. Raises ValueError.

    The environment may name them, too: then a command that is missing keeps no worker from its work.
    """
    args.notify_done += os.environ.get(notify.DONE_TYPES, "").replace(",", " ").split()
    if args.notify is not None:
        args.notify = notify.program(args.notify, args.env["PATH"])
    elif named := os.environ.get(notify.COMMAND):
        try:
            args.notify = notify.program(named, args.env["PATH"])
        except ValueError as error:
            say(f"nobody is told: {notify.COMMAND}={named}: {error}")


def default_timeout() -> float:
    """Return the seconds that the environment allows for an attempt; 0 if it does not say."""
    text = os.environ.get(environment.TIMEOUT, "0")
    try:
        return parse_duration(text)
    except ValueError as error:
        say(f"{environment.TIMEOUT}={text}: {error}; it is {environment.TIMEOUT_DEFAULT}")
        return parse_duration(environment.TIMEOUT_DEFAULT)


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1000:
        raise ValueError
    return value


# fmt: off
def add_options(add: Callable) -> None:
    """Add the options; a duration is a number of seconds, or 90m, 1.5h, 2d."""
    add("queues", metavar="QUEUE", nargs="+")
    add("--handlers", metavar="DIR", type=Path, default=default_handlers(__file__),
        help="executables named after task types (default: %(default)s)")
    add("--concurrency", metavar="N", type=count,
        help="tasks at a time, all queues together; each queue has a place of its own (default: one for each queue)")
    add("--max-attempts", metavar="N", type=count, default=q.MAX_ATTEMPTS,
        help="then it is a dead letter (default %(default)s)")
    add("--backoff", metavar="DURATION", type=duration, default=q.BACKOFF_SECONDS,
        help="before the second attempt, doubling with each one after, an hour at most (default %(default)s)")
    add("--timeout", metavar="DURATION", type=duration,
        help="for one attempt; a task's own may be shorter (default: $TASK_QUEUE_TIMEOUT, else 0, none)")
    add("--grace", metavar="DURATION", type=duration, default=10.0,
        help="for handlers to finish when stopped (default 10)")
    add("--kill-after", metavar="DURATION", type=duration, default=5.0,
        help="from TERM to KILL (default 5)")
    add("--then", metavar="QUEUE",
        help="make each result a task there, in the transaction that records the task as done")
    add("--then-hold", action="store_true",
        help="with --then: results wait until a person approves them")
    add("--chain", action="store_true",
        help="a result's last line may enqueue tasks: {\"enqueue\": [{\"queue\", \"task_type\", \"data\"}, …]}")
    add("--on-dead", metavar="COMMAND",
        help="run this after tasks became dead letters, once a minute at most; it gets them as JSON on stdin")
    add("--notify", metavar="COMMAND",
        help="run this when a task failed or is held, a queue is paused or goes on, once a minute at most, all of it as JSON on stdin")
    add("--notify-done", metavar="TYPE", action="append", default=[],
        help="tell --notify, too, when a task of this type is done; may be given several times")
    add("--crash-backoff", metavar="DURATION", type=duration, default=0.0,
        help="before a dead worker's task runs again (default 0: at once)")
    add("--drain", action="store_true",
        help="leave when nothing is ready or running")
    add("--idle-exit", metavar="DURATION", type=duration,
        help="leave when no task waited, ran or was scheduled for this long")
    add("--single", action="store_true",
        help="leave a queue to another worker that serves it; end at once if others serve all queues")
    add("--when-work", action="store_true",
        help="end at once if no task waits or is to be recovered; units use this")
    add("--environment", metavar="FILE", type=os.path.abspath,
        help="take every variable from this file, and none from the caller; hooks and units use this")
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
    """Become this worker under uv if the Python that a hook or a unit started has no watchdog."""
    uv = environment.find_uv(os.environ)
    if uv and importlib.util.find_spec("watchdog") is None:
        try:
            os.execv(uv, [uv, "run", "-q", "--no-config", "--script", SCRIPT, *argv])
        except OSError as error:
            raise q.QueueError(f"{uv} cannot be started: {error.strerror}") from None


class Worker:
    """The loop: hear which handlers ended, start the next ones, then record the ends."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.state = q.STATE_DIR
        how = dict(command=args.command, timeout=args.timeout, kill_after=args.kill_after)
        self.handlers = Handlers(self.state, args.env, args.handlers, **how)
        self.runs = self.handlers.runs
        # The ends that are not yet recorded.
        self.ended: list[End] = []
        # How many tasks ended how, and how the last run ended of those that have not.
        self.counts: Counter[str] = Counter()
        self.unended: dict[tuple[str, int], str] = {}
        self.on_dead = notify.Teller("--on-dead", args.on_dead, args.env)
        self.news = notify.Teller("--notify", args.notify, args.env)
        # The pauses that were there at the last look; none was looked for yet.
        self.pauses: dict[str, Control] | None = None
        # Whether others may have changed the database or the spool since the last look.
        self.changed = True
        # How many signals came, and when to end what still runs.
        self.stops = 0
        self.stop_at: float | None = None
        self.idle_since = time.monotonic()
        self.trouble, self.failures, self.retry_at = "", 0, 0.0
        # Queues with trouble of their own, and when to try them again.
        self.broken: dict[str, float] = {}
        self.said: set[str] = set()
        handlers = ANY_TYPE if args.command else os.path.abspath(args.handlers)
        self.serving = ServingLocks(self.state, handlers, args.single)
        self.update, self.is_outdated = installation.Update(Path(SCRIPT).parent), False
        self.tick_at = 0.0
        # When the next recurring task comes, Unix seconds.
        self.every_at = math.inf
        # One pipe wakes the loop: signals write their number, the watch writes a 0.
        self.wakeup, self.waker = wakeup_pipe()
        self.poll = select.poll()
        self.poll.register(self.wakeup, select.POLLIN)
        self.poll.register(self.handlers.supervisor.socket, select.POLLIN)

    def set(self) -> None:
        """Wake the loop; the watch calls this."""
        # The pipe is full while the last wake-ups were not read.
        with suppress(BlockingIOError):
            os.write(self.waker, b"\0")

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
        # Later, "uv cache clean" may have removed it.
        with suppress(ImportError):
            importlib.import_module("cronsim")
        self.listen()
        self.fire(conn)
        say(f"worker {q.owner_name(self.state)} serves {', '.join(self.usable())}")
        try:
            while not self.may_leave():
                self.sleep()
                self.hear()
                self.end_overdue()
                self.exchange()
                self.tell()
            # A task that is being taken back just now is still to be counted.
            q.Watch.of(self.state).leave()
            self.say_goodbye()
            self.hand_over()
        finally:
            self.tell(now=True)
            self.handlers.leave()
            q.resign(self.state)
        return 0

    def listen(self) -> None:
        """Have signals and the watch wake the loop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup has its process ignore SIGHUP.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.stop)
        watch = q.Watch.of(self.state)
        watch.crash_backoff = self.args.crash_backoff
        watch.on_recovered = self.recovered
        watch.on_deaf = say
        watch.listeners.add(self)
        self.set()

    def stop(self, *_) -> None:
        self.stops += 1
        self.stop_at = time.monotonic() + self.args.grace if self.stops == 1 else 0.0

    # ------------------------------------------------------------------------------- handlers' ends

    def hear(self) -> None:
        """Hear which handlers have ended."""
        try:
            self.ended += self.handlers.hear()
        except EOFError:
            self.start_afresh()

    def start_afresh(self) -> NoReturn:
        """Begin anew after the supervisor was killed: recovery takes back what this one claimed."""
        if self.stops:
            say("the supervisor of handlers was killed; the next worker sees to their tasks")
            os._exit(1)
        self.tell(now=True)
        self.handlers.start_afresh()

    def end_overdue(self) -> None:
        """End what still runs when the grace after a signal is over, or after a second signal."""
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            self.stop_at = None
            self.handlers.end_all(outcomes.STOPPED, now=self.stops > 1)

    def record(self, conn: q.Connection) -> None:
        """Record in one transaction how runs ended, then say it."""
        if not self.ended:
            return
        with q.transaction(conn):
            recorded = [outcomes.record(conn, end.task, end.code, end.why) for end in self.ended]
        ended, self.ended = self.ended, []
        for end, outcome in zip(ended, recorded, strict=True):
            tidy_run(self.state, end.task)
            self.report(end, outcome)
        if self.args.then or self.args.chain:
            q.wake(self.state)

    def report(self, end: End, outcome: outcomes.Outcome) -> None:
        """Say how a run ended; what keeps all tasks from starting is said once for each type."""
        task, error = end.task, outcome.error
        self.count(task, outcome)
        if end.code is None and outcome.status == "put back":
            if f"{task.task_type} {error}" in self.said:
                return
            self.said.add(f"{task.task_type} {error}")
        why = f": {error}{self.pause_of(task.queue, error)}" if error else ""
        say(f"{line_of(task, outcome)} {end.seconds:.2f} s{why}")

    def recovered(self, task: q.Task, outcome: outcomes.Outcome) -> None:
        """Say and count what became of a dead owner's task; the watch calls this."""
        self.count(task, outcome)
        say(f"{line_of(task, outcome)}: {outcome.error or 'its handler ended without its worker'}")

    def pause_of(self, queue: str, told: str = "") -> str:
        """Say that a queue is paused now; without the reason if `told` has it."""
        try:
            control = controls_of(self.connect()).get(queue)
        # The loop meets this trouble, and says it.
        except q.QueueError:
            return ""
        if not control or not control.paused:
            return ""
        reason = None if control.reason and control.reason in told else control.reason
        return f"; {queue} is {pause_in_words(control._replace(reason=reason))}"

    def count(self, task: q.Task, outcome: outcomes.Outcome) -> None:
        """Count a task that has ended, once, and remember what is to be told."""
        which, status = (task.queue, task.id), outcome.status
        if status in ("completed", "failed", "cancelled"):
            self.unended.pop(which, None)
            self.counts[status] += 1
        else:
            self.unended[which] = status
        told = {"queue": task.queue, "task_id": task.task_id, "task_type": task.task_type}
        told |= {"attempts": task.attempts, "error": outcome.error}
        if status == "failed":
            self.on_dead.add(**told)
        if self.args.notify:
            self.news.news += notify.news_of(told, outcome, self.args.notify_done)

    def tell(self, now: bool = False) -> None:
        """Run the commands of --on-dead and --notify when they are due."""
        self.on_dead.tell(now)
        self.news.tell(now)

    def look_at_pauses(self, conn: q.Connection) -> None:
        """Tell --notify which queues were paused or go on since the last look."""
        if not self.args.notify:
            return
        controls, before = controls_of(conn), self.pauses
        self.pauses = {
            queue: controls[queue]
            for queue in self.own()
            if queue in controls and controls[queue].paused
        }
        # A pause that was there when this worker started is no news.
        for queue in () if before is None else before.keys() ^ self.pauses.keys():
            is_paused = queue in self.pauses
            reason = pause_in_words(self.pauses[queue]) if is_paused else "its tasks run again"
            self.news.add(event="paused" if is_paused else "resumed", queue=queue, reason=reason)

    def say_goodbye(self) -> None:
        """Say how many tasks ended how, and what is left in each queue."""
        words = {"completed": "done", "failed": "failed", "cancelled": "cancelled",
                 "scheduled": "to be tried again", "held": "held", "put back": "put back",
                 "lost": "lost"}  # fmt: skip
        counts = self.counts + Counter(self.unended.values())
        ended = [f"{counts[outcome]} {word}" for outcome, word in words.items() if counts[outcome]]
        say("; ".join([", ".join(ended) or "no task was run", *self.left_behind()]))

    def left_behind(self) -> list[str]:
        """Return how many tasks wait in each queue, by their state."""
        left = []
        # A worker also leaves when the database is gone.
        with suppress(q.QueueError):
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
        return left

    # ------------------------------------------------------------------------------------ database

    def exchange(self) -> None:
        """Claim and start what is next, then record what ended: that waits for the disk.

        Trouble with the database is said once, and tried again with growing pauses.
        """
        if time.monotonic() < self.retry_at:
            return
        self.leave_when_replaced()
        try:
            conn, changed, self.changed = self.connect(), self.changed, False
            may_be_news = changed or bool(self.ended)
            if changed:
                self.take_in_spool()
                self.end_cancelled(conn)
            # A handler may have paused its queue, which holds for the next claim.
            if any(end.code == outcomes.EX_TEMPFAIL for end in self.ended):
                self.record(conn)
            if changed or time.time() >= self.every_at:
                self.fire(conn)
            for task, told in self.claim(conn):
                self.start(task, told)
            # Meanwhile handlers run.
            self.record(conn)
            if may_be_news:
                self.look_at_pauses(conn)
        except (q.QueueError, OSError) as error:
            error = self.root_of(error)
            if str(error) != self.trouble:
                say(f"trouble: {with_remedy(error, self.state)}; trying again until it is mended")
            self.trouble, self.changed = str(error), True
            pause = RETRY_SECONDS[min(self.failures, len(RETRY_SECONDS) - 1)]
            self.retry_at = time.monotonic() + pause
            self.failures += 1
            return
        if self.trouble:
            say("the database can be used again; going on")
        self.trouble, self.failures, self.retry_at = "", 0, 0.0

    def root_of(self, error: q.QueueError | OSError) -> q.QueueError | OSError:
        """Return why the database cannot be used, if it cannot; else the trouble that was met."""
        try:
            self.connect()
        except (q.QueueError, OSError) as root:
            return root
        return error

    def leave_when_replaced(self) -> None:
        """Claim no more when these scripts are gone or were updated; handlers that run may finish.

        An updated plugin has a new directory, and its next hook starts a worker of the new version.
        """
        if self.stops:
            return
        if not os.path.exists(SCRIPT):
            say(f"{SCRIPT} is gone: leaving")
            self.stops = 1
        elif self.update.has_come():
            how = "" if self.args.environment else "; start it again for the new version"
            say(f"the scripts were updated: leaving when nothing runs{how}")
            self.stops, self.is_outdated = 1, True

    def hand_over(self) -> None:
        """Have a worker of the new version run what waits, if a hook has started this one.

        A unit starts it within a minute, and a worker of a terminal is its person's.
        """
        if self.is_outdated and self.args.environment and not self.args.when_work:
            queues = [queue for queue in self.own() if self.wanted([queue])]
            self.serving.release()
            for queue in queues:
                service.start_worker(queue)

    def complain(self, about: str) -> None:
        """Say each trouble once that need not hold up the rest."""
        if about not in self.said:
            self.said.add(about)
            say(remedies_as_typed(about))

    def take_in_spool(self) -> None:
        """Take in the spool; trouble with it keeps no task from being claimed."""
        try:
            for complaint in q.take_in_spool(self.state)[1]:
                self.complain(f"spool: {complaint}")
        except q.QueueBusy:
            self.changed = True
        except (q.QueueError, OSError) as error:
            self.complain(f"spool: {error}")

    def fire(self, conn: q.Connection) -> None:
        """Enqueue the recurring tasks whose time has come."""
        try:
            self.every_at = every.fire(conn, () if self.stops else self.own())
        except ValueError as error:
            self.every_at = time.time() + RETRY_SECONDS[-1]
            self.complain(str(error))

    def end_cancelled(self, conn: q.Connection) -> None:
        """End the handlers of tasks that were cancelled."""
        owner = q.owner_name(self.state)
        for queue in {task.queue for task in self.runs.values()}:
            rows = self.ask(conn, queue, recovery.cancel_requested, owner) or ()
            for run, task in self.runs.items():
                if task.queue == queue and task.id in rows:
                    self.handlers.supervisor.end(run, outcomes.CANCELLED)

    def ask(self, conn: q.Connection, queue: str, question: Callable, *args, **options):
        """Call `question` for a queue and return its answer, or None if the queue is broken.

        A broken queue is left alone for a while. Where all are broken, the database is: raises.
        """
        try:
            return question(conn, queue, *args, **options)
        except q.QueueBusy:
            raise
        except q.QueueError as error:
            now = time.monotonic()
            self.broken[queue] = now + RETRY_SECONDS[-1]
            if all(self.broken.get(other, 0.0) > now for other in self.own()):
                self.broken.clear()
                raise
            self.complain(f"queue {queue}: {error}; the other queues go on")
            return None

    def prepare(self, conn: q.Connection, queue: str) -> bool:
        """Make the queue's table if it is missing. Return whether the queue can be used."""
        if self.broken.get(queue, 0.0) > time.monotonic():
            return False
        is_new = self.ask(conn, queue, q.ensure_queue)
        if is_new:
            say(f"{queue} is a new queue")
        if is_new is not None:
            self.broken.pop(queue, None)
        return is_new is not None

    def claim(self, conn: q.Connection) -> list[tuple[q.Task, dict[str, str]]]:
        """Claim a task for each free place, one of each queue in turn; with what handlers are told."""
        if self.stops or len(self.runs) >= self.args.concurrency:
            return []
        queues = [queue for queue in self.own() if self.room(queue) and self.prepare(conn, queue)]
        ready = [queue for queue in queues if self.ask(conn, queue, q.has_ready)]
        if not ready:
            return []
        tasks, owner, args = [], q.owner_name(self.state), self.args
        terms = dict(max_attempts=args.max_attempts, backoff=args.backoff, then_queue=args.then)
        terms |= dict(then_hold=args.then_hold, chain=args.chain)
        with q.transaction(conn, durable=False):
            while ready:
                queue = ready.pop(0)
                # All that there is room for, once no other queue has anything ready.
                room = self.room(queue, tasks)
                limit = min(room, 1 if ready else args.concurrency)
                if not limit:
                    continue
                how = dict(limit=limit, places=room, **terms)
                claimed = self.ask(conn, queue, q.claim, owner, **how) or []
                tasks += claimed
                if len(claimed) == limit:
                    ready.append(queue)
            told = [costs.environment(conn, task) for task in tasks]
        # The queue after the last one served is first next time.
        if tasks:
            turn = args.queues.index(tasks[-1].queue) + 1
            args.queues = args.queues[turn:] + args.queues[:turn]
        return list(zip(tasks, told, strict=True))

    def room(self, queue: str, claimed: Sequence[q.Task] = ()) -> int:
        """Return how many more tasks of a queue may start; `claimed` are about to.

        A place is kept for each queue that has none running, so that no queue waits behind another.
        Where --concurrency is less than the number of queues, they take turns.
        """
        running = Counter(task.queue for task in (*self.runs.values(), *claimed))
        places, queues = self.args.concurrency, self.own()
        kept = [other for other in queues if other != queue and not running[other]]
        kept = kept if places >= len(queues) else []
        return max(0, places - running.total() - len(kept))

    def start(self, task: q.Task, told: dict[str, str]) -> None:
        """Start the handler of a claimed task; `told` are variables of its own."""
        end = self.handlers.start(task, told)
        if end:
            self.ended.append(end)
        else:
            say(f"{task.queue} {task.task_type} {task.task_id} started attempt {task.attempts}")

    def serve(self) -> bool:
        """Hold the serving locks. Return False if --single leaves all queues to other workers."""
        return self.serving.take(self.args.queues, full=len(self.runs) >= self.args.concurrency)

    def own(self) -> list[str]:
        """Return the queues to serve: all, but with --single not those that others serve."""
        return [queue for queue in self.args.queues if self.serving.serves(queue)]

    def usable(self) -> list[str]:
        """Return the queues to serve that have no trouble of their own."""
        return [queue for queue in self.own() if queue not in self.broken]

    # ------------------------------------------------------------------------------------- waiting

    def sleep(self) -> None:
        """Wait for a handler's end, a commit or a signal, or for the next thing that is due."""
        now = time.monotonic()
        until = [self.next_look(now)]
        if self.stop_at is not None:
            until.append(self.stop_at)
        if self.args.idle_exit is not None:
            until.append(self.idle_since + self.args.idle_exit)
        until += [teller.due_at for teller in (self.on_dead, self.news) if teller.news]
        if self.wakeup in dict(self.poll.poll(max(0.0, min(until) - now) * 1000)):
            os.read(self.wakeup, 65536)
            self.changed = True
        if now >= self.tick_at:
            self.tick_at = now + q.SAFETY_TICK_SECONDS
            self.tick()

    def next_look(self, now: float) -> float:
        """Return when to look at the database again, whatever the events say."""
        if self.trouble:
            return self.retry_at
        if self.ended:
            return now
        # Trouble here is what exchange() meets, and says.
        with suppress(q.QueueError):
            if not self.stops and len(self.runs) < self.args.concurrency:
                queues = [queue for queue in self.usable() if self.room(queue)]
                seconds = q.sleep_seconds(self.connect(), queues)
                return now + min(seconds, max(0.0, self.every_at - time.time()))
        return now + q.SAFETY_TICK_SECONDS

    def tick(self) -> None:
        """Look again every few seconds, see that the locks are still there, and shrink the log."""
        self.changed = True
        # Trouble here is what exchange() meets, and says.
        with suppress(q.QueueError, OSError, sqlite3.Error):
            before = self.own()
            if not self.serve() and not self.stops:
                say("another worker serves the queue by now; leaving (--single)")
                self.stop()
            if more := set(self.own()).difference(before):
                say(f"serves {', '.join(sorted(more))} from now on: nobody else does")
            self.shrink_log()

    def shrink_log(self) -> None:
        """Have a large write-ahead log written back and truncated."""
        # Where the database is a symbolic link, the log lies beside its target.
        wal = f"{os.path.realpath(self.state / 'tasks.db')}-wal"
        if os.stat(wal).st_size <= q.WAL_BYTES:
            return
        # A short wait: writers wait while this waits for readers.
        conn = q.connect(self.state, create=False, busy_timeout_ms=50)
        conn.execute("pragma wal_checkpoint(truncate)").fetchall()
        if os.stat(wal).st_size > WAL_WARN_BYTES:
            self.complain(
                f"{wal} has over {WAL_WARN_BYTES >> 20} MiB: a long read keeps it from being"
                f" written back; find it with: fuser -v '{wal}'"
            )

    # ------------------------------------------------------------------------------------- leaving

    def may_leave(self) -> bool:
        """Return whether to end now."""
        if self.runs or self.ended:
            self.idle_since = time.monotonic()
            return self.stops > 1 and not self.runs and bool(self.trouble)
        if self.stops:
            return True
        idle = self.args.idle_exit
        is_over = idle is not None and time.monotonic() >= self.idle_since + idle
        # Without a database nothing waits; whoever makes one starts a worker.
        if self.trouble:
            return is_over
        # Trouble here is what exchange() meets, and says.
        with suppress(q.QueueError):
            if self.args.drain:
                return not any(self.busy(queue) for queue in self.usable())
            if idle is None:
                return False
            queues = self.usable()
            if self.wanted(queues):
                self.idle_since = time.monotonic()
            elif is_over:
                # From here on, whoever enqueues starts another worker; so look once more.
                self.serving.release()
                if not self.wanted(queues) or not self.serve():
                    say(f"idle for {idle:g} s; leaving")
                    return True
                self.idle_since = time.monotonic()
        return False

    def wanted(self, queues: list[str]) -> bool:
        """Return whether a task waits, runs or is scheduled."""
        return any(self.busy(queue) or q.next_due(self.connect(), queue) for queue in queues)

    def busy(self, queue: str) -> bool:
        """Return whether a task waits or runs, with this or another worker, or as an orphan."""
        conn = self.connect()
        claimed = q.execute(conn, q.COUNT_CLAIMED, queue).fetchone()[0]
        if claimed or q.has_ready(conn, queue):
            return True
        # take_in_spool() complains of a directory that cannot be read; nobody waits for it.
        with suppress(OSError):
            return bool(q.spooled_files(self.state / "spool" / queue))
        return False


def line_of(task: q.Task, outcome: outcomes.Outcome) -> str:
    name = f"{task.queue} {task.task_type} {task.task_id}"
    return f"{name} {outcome.status} attempt {task.attempts}"


if __name__ == "__main__":
    raise SystemExit(main())
