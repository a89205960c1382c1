#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "watchdog>=4,<8"]
# ///
"""Have tasks run on another machine: push them to a hub, fetch them there, pull the results home.

    relay.py init                      prepare the hub, once
    relay.py push builds               here: hand this queue's tasks over
    relay.py pull                      here: record how they ended; results go into completions
    relay.py fetch builds --reply      there: take tasks into that machine's own queue, for its worker
    relay.py status                    show both ends side by side
    relay.py machines                  list the machines, when each was last heard, what waits for it

The hub is a PostgreSQL database with Procrastinate's schema: --url postgresql://USER@HOST/DATABASE,
or TASK_QUEUE_HUB. Keep the password in ~/.pgpass: all users of a machine can see its arguments.

Hooks write to the local database, so nobody waits for a network. A pushed task is handed_over until
pull has recorded its end, and keeps its group's turn meanwhile. A fetched task is an ordinary task of
the machine that fetched it: worker.py runs it, and list, logs, cancel and pause work on it. While the
hub cannot be used, tasks wait where they are. push, pull and fetch run until SIGTERM or Ctrl-C; with
--drain, they end when there is nothing left to do.

machines forget NAME ends and deletes what a lost machine pushed, and gives its jobs to others.
adopt NAME takes over what a machine pushed, so that pull brings its results here.

exit codes: 0 done or stopped; 1 the hub or the database cannot be used; 64 usage; 75 the database
is locked.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import queue_helpers as q
from taskqueue import cli, hub, logs
from taskqueue import outcome as outcomes
from taskqueue import recovery as owners
from taskqueue.handlers import count, say, start_clean
from taskqueue.hub import Hub, HubRefused, Stopped
from taskqueue.supervisor import wakeup_pipe

# One transaction carries at most so many tasks, and so many bytes of them.
BATCH, BATCH_BYTES = 200, 8 * 2**20
# Seconds before the hub is tried again, doubling from the first to the last.
RETRY_SECONDS = (1.0, 60.0)
# Seconds between two lines about trouble that goes on.
TROUBLE_EVERY_SECONDS = 60.0
# Seconds between two looks, whatever the events say.
TICK_SECONDS = 5.0
# Seconds without a heartbeat after which another machine's jobs count as abandoned.
STALLED_SECONDS = 60.0
# How often pull looks for jobs that others ended, and for tasks that the hub lost; and how often fetch tidies.
SELDOM_SECONDS, TIDY_SECONDS = 30.0, 3_600.0
# A task that runs a shell command stays on its machine.
STAYS = "run"

# This machine's name on the hub is random: the hub need not know host names. task_hubs remembers
# which hub was last at each address.
LOCAL_SCHEMA = """
create table if not exists task_machine (id text not null);
create table if not exists task_hubs (name text primary key, address text not null)"""
# The row's owner is the id of the handing over: whoever ends the task later must name it. claimed_at
# is the time when the hub had the task; until then push sends it again, and the hub ignores what it knows.
TAKE = f"""
update "{{queue}}" set status = 5, owner = :prefix || lower(hex(randomblob(12))), claimed_at = null
where id in (select id from "{{queue}}" where status < 2 and coalesce(task_id, '') not glob 'hub-*' and task_type <> '{STAYS}'
             order by priority desc, id limit :limit)"""
# A delayed task of a group waits here: on the hub it would hold up its group.
TAKE_SCHEDULED = f"""
update "{{queue}}" set status = 5, owner = :prefix || lower(hex(randomblob(12))), claimed_at = null
where id in (select id from "{{queue}}" where status = 3 and due_at is not null and group_id is null
             and coalesce(task_id, '') not glob 'hub-*' and task_type <> '{STAYS}' order by due_at limit :limit)"""
CAN_TAKE = f"""
select (exists (select 1 from "{{queue}}" where status < 2) or {q.IS_OVERDUE}
    or exists (select 1 from "{{queue}}" where status = 3 and due_at is not null and group_id is null))
  and not {q.IS_PAUSED}"""
UNSENT = """
select {task}, group_id, due_at, expires_at, own_attempts from "{queue}" where status = 5 and claimed_at is null
order by priority desc, id"""
IS_UNSENT = """
select exists (select 1 from "{queue}" where status = 5 and claimed_at is null)"""
# What another hub does not have, this hub gets under an id of its own: what was never sent, and what
# was sent to a hub that is no longer at its address.
TAKE_OVER = """
update "{queue}" set owner = :prefix || lower(hex(randomblob(12))), claimed_at = null
where status = 5 and owner glob 'hub-*-*' and owner not glob :prefix || '*'
  and (claimed_at is null or exists (select 1 from task_hubs where address = :address and owner glob 'hub-' || name || '-*'))"""
SENT = """
update "{queue}" set claimed_at = :now where id = :id and owner = :owner and status = 5"""
UNWANTED = """
select owner from "{queue}" where status = 5 and cancel_requested"""
HANDED_OVER = """
select owner, id, cancel_requested from "{queue}"
where status = 5 and claimed_at is not null and owner is not null"""
COME_HOME = """
update "{queue}" set attempts = attempts + :attempts, claimed_at = :started_at
where id = :id and owner = :owner and status = 5 returning {task}"""
ADOPTED = """
insert into "{queue}" (data, status, owner, claimed_at) values (:data, 5, :owner, :now) returning id"""
IS_ADOPTED = """
select id from "{queue}" where status = 5 and owner = :owner"""
FETCHED = """
select task_id, id, status, attempts from "{queue}" where task_id glob 'hub-*'"""
FETCHED_END = """
select row_id, status, attempts, exit_code, result, log, error from task_history
where queue = :queue and task_id = :task_id order by id desc limit 1"""
SET_ATTEMPTS = """
update "{queue}" set own_attempts = :most where task_id = :task_id"""
CANCEL_RUNNING = """
update "{queue}" set cancel_requested = 1 where id = :id and status = 2"""
CANCEL_WAITING = """
select {task} from "{queue}" where id = :id and status not in (2, 5)"""
LOCAL_COUNTS = f"""
select {q.STATUS_WORD} as word, count(*) from "{{queue}}" group by 1"""


def machine_id(conn: q.Connection) -> str:
    """Return this machine's name on the hub, made when it is first wanted."""
    with owners.errors_explained(conn):
        if "task_hubs" not in q.table_names(conn):
            with q.transaction(conn):
                q.run_statements(conn, LOCAL_SCHEMA)
                if not conn.execute("select 1 from task_machine").fetchone():
                    conn.execute("insert into task_machine (id) values (?)", (os.urandom(8).hex(),))
        return conn.execute("select id from task_machine").fetchone()[0]


def address_of(url: str) -> str:
    """Return a digest of where a hub is: its host, port and database, without user and password."""
    import hashlib

    from psycopg.conninfo import conninfo_to_dict

    parts = conninfo_to_dict(url)
    where = [str(parts.get(name) or "") for name in ("host", "hostaddr", "port", "dbname")]
    return hashlib.sha256("\0".join(where).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------- the loops


class Relay:
    """The loop of push, pull and fetch: events wake it, and trouble is said and waited out."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.state, self.hub = args, q.STATE_DIR, Hub(args.url)
        self.wakeup, self.waker = wakeup_pipe()
        self.stops, self.is_idle = 0, False
        # Whether the local database may have changed since the last look.
        self.changed = True
        self.trouble, self.failures, self.retry_at, self.say_at = "", 0, 0.0, 0.0
        self.said: set[str] = set()
        self.locks: list[int] = []

    def set(self) -> None:
        """Wake the loop: the watch calls this after commits to the local database."""
        try:
            os.write(self.waker, b"\0")
        except BlockingIOError:
            # The pipe is full: the loop will wake.
            pass

    def run(self) -> int:
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        signals = [signal.SIGTERM, signal.SIGINT]
        # nohup has SIGHUP ignored, and so it stays.
        signals += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        for number in signals:
            signal.signal(number, partial(self.stop, signals))
        try:
            conn = q.connect(self.state)
            self.machine = machine_id(conn)
            watch = q.Watch.of(self.state)
            watch.on_deaf = say
            watch.listeners.add(self)
            self.begin(conn)
            while not self.stops and not (self.args.drain and self.is_idle):
                self.attempt()
                if self.trouble and self.args.drain:
                    return 1
                self.sleep()
        except Stopped:
            pass
        finally:
            self.end()
        return 0

    def stop(self, signals: list[int], *_) -> None:
        """Leave at the next chance; a second signal ends the process at once."""
        self.stops += 1
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        self.hub.stop()

    def attempt(self) -> None:
        """Do what is to be done now; after trouble, only when it is time to try again."""
        if time.monotonic() < self.retry_at:
            return
        try:
            if self.hub.connect():
                self.connected()
            self.step(q.connect(self.state))
            if self.trouble:
                say("going on: what was in the way is mended")
            self.trouble, self.failures, self.retry_at = "", 0, 0.0
        except (q.QueueError, OSError, sqlite3.Error) as error:
            now = time.monotonic()
            if not self.trouble or now >= self.say_at:
                why = cli.remedies_as_typed(str(error))
                say(f"{why}; tasks wait where they are until a later try succeeds")
                self.say_at = now + TROUBLE_EVERY_SECONDS
            self.trouble, self.is_idle = str(error), False
            first, last = RETRY_SECONDS
            self.retry_at = now + min(last, first * 2.0**self.failures)
            self.failures = min(self.failures + 1, 10)

    def sleep(self) -> None:
        """Wait for an event, or for the next thing that is due."""
        now = time.monotonic()
        until = self.retry_at if self.trouble else self.due_at(now)
        if self.args.drain and self.is_idle or self.stops:
            return
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        if self.hub.conn is not None and not self.trouble:
            poll.register(self.hub.conn.fileno(), select.POLLIN)
        ready = dict(poll.poll(max(0.0, until - now) * 1000))
        if self.wakeup in ready:
            os.read(self.wakeup, 65536)
            self.changed = True

    def complain(self, about: str) -> None:
        """Say, once, what is in the way of one thing that others need not wait for."""
        if about not in self.said:
            self.said.add(about)
            say(cli.remedies_as_typed(about))

    def lock(self, verb: str, queue: str) -> None:
        """Refuse a second process of the same kind for a queue. Raises Refused."""
        path = q.make_private(self.state / "workers") / f"relay.{verb}.{queue}"
        fd = q.lock_file(path, patience=q.PROBE_SECONDS)
        if fd is None:
            command = cli.as_typed(f"relay.py {verb}")
            raise cli.Refused(f"another {command} serves {queue}: one is enough")
        self.locks.append(fd)

    def heard(self) -> None:
        """Tell the hub that this machine lives."""
        process = f"{os.getpid()}-{self.locks_name}"
        with self.hub.transaction() as pg:
            pg.execute(hub.HEARD, (self.machine, process))

    locks_name = os.urandom(4).hex()

    def begin(self, conn: q.Connection) -> None:
        """Prepare, before the first step, whether the hub can be used or not."""

    def connected(self) -> None:
        """Forget what a former connection knew."""

    def step(self, conn: q.Connection) -> None:
        """Do all that can be done now, and set is_idle."""
        raise NotImplementedError

    def due_at(self, now: float) -> float:
        """Return when to step again if nothing wakes the loop, on the monotonic clock."""
        return now + TICK_SECONDS

    def end(self) -> None:
        """Clean up before the process ends."""
        self.hub.close()


class Push(Relay):
    """Hand the tasks of local queues over.

    A task first becomes the hub's in the local database, then it is sent, then marked as sent. Killed
    anywhere, the next push sends again what is not marked, and the hub ignores what it knows. A task
    of a group keeps the group's turn, so only the heads of groups are sent.
    """

    is_new_hub = True

    def begin(self, conn: q.Connection) -> None:
        for queue in self.args.queues:
            if q.ensure_queue(conn, queue):
                say(f"{queue} is a new queue")
            # Two of them would mix up the order within a group.
            self.lock("push", queue)
        say(f"push hands over {', '.join(self.args.queues)} as machine {self.machine}")

    def connected(self) -> None:
        self.is_new_hub = True

    def step(self, conn: q.Connection) -> None:
        self.hub.told()
        if self.changed:
            self.changed = False
            for complaint in q.take_in_spool(self.state)[1]:
                self.complain(complaint)
        if self.is_new_hub:
            self.take_over(conn)
        busy = True
        while busy and not self.stops:
            busy = any([self.push(conn, queue) for queue in self.args.queues])
        self.is_idle = True

    def take_over(self, conn: q.Connection) -> None:
        """Give this hub what no other hub has. One that was made anew has lost what it had."""
        self.heard()
        address = address_of(self.args.url)
        with q.transaction(conn):
            for queue in self.args.queues:
                told = {"prefix": self.hub.prefix, "address": address}
                q.execute(conn, TAKE_OVER, queue, **told)
            conn.execute("delete from task_hubs where address = ?", (address,))
            conn.execute(
                "insert or replace into task_hubs (name, address) values (?, ?)",
                (self.hub.name, address),
            )
        self.is_new_hub = False

    def push(self, conn: q.Connection, queue: str) -> int:
        """Take what is ready and send what is taken; return how many tasks that concerned."""
        if not q.execute(conn, IS_UNSENT, queue).fetchone()[0]:
            if not q.execute(conn, CAN_TAKE, queue, now=time.time()).fetchone()[0]:
                return 0
            self.take(conn, queue)
        tasks = list(self.unsent(conn, queue))
        if not tasks:
            return 0
        try:
            self.send(queue, tasks)
            sent = tasks
        except HubRefused:
            sent = self.send_one_by_one(conn, queue, tasks)
        now = time.time()
        with q.transaction(conn, durable=False):
            rows = [{"id": task.id, "owner": task.owner, "now": now} for task, *_ in sent]
            conn.executemany(q.on_queue(SENT, queue), rows)
        say(f"{queue}: {cli.plural(len(sent), 'task')} handed over")
        return len(tasks)

    def take(self, conn: q.Connection, queue: str) -> None:
        """Make tasks the hub's: durably, since what was sent must never run here as well."""
        now = time.time()
        with q.transaction(conn):
            q.expire(conn, queue, now)
            q.promote(conn, queue, now)
            told = {"prefix": self.hub.prefix}
            q.execute(conn, TAKE_SCHEDULED, queue, **told, limit=BATCH // 2)
            q.execute(conn, TAKE, queue, **told, limit=BATCH)

    def unsent(self, conn: q.Connection, queue: str) -> Iterator[tuple]:
        """Yield (task, group, due_at, expires_at, own_attempts) of the tasks to send next."""
        room = BATCH_BYTES
        with owners.errors_explained(conn):
            for row in conn.execute(q.on_queue(UNSENT, queue)).fetchmany(BATCH):
                room -= len(row[3])
                if room < 0 and room + len(row[3]) < BATCH_BYTES:
                    return
                yield q.Task.from_row(queue, row[:-4]), *row[-4:]

    def send(self, queue: str, tasks: list[tuple]) -> None:
        """Defer the jobs of these tasks and note their ids, in one transaction.

        Times are sent as seconds from now, since clocks differ.
        """
        with self.hub.transaction() as pg:
            ids = [task.owner for task, *_ in tasks]
            known = {id for (id,) in pg.execute(hub.KNOWN, (ids,))}
            new = [told for told in tasks if told[0].owner not in known]
            if not new:
                return
            (now,) = pg.execute("select clock_timestamp()").fetchone()
            here = time.time()
            locks = [hub.clean(f"{queue}/{group}") if group else None for _, group, *_ in new]
            # Machines that share a group must not overtake each other in it.
            priorities = dict(pg.execute(hub.LOCK_PRIORITIES, ([*filter(None, locks)],)).fetchall())
            jobs = [
                hub.make_job(
                    queue,
                    task,
                    priority=priorities.setdefault(lock, task.priority) if lock else task.priority,
                    group=lock,
                    delay=0.0 if due_at is None else due_at - here,
                    now=now,
                )
                for (task, _, due_at, *_), lock in zip(new, locks, strict=True)
            ]
            jobs = self.hub.jobs.batch_defer_jobs(jobs, connection=pg)
            rows = [
                (task.owner, self.machine, queue, task.id, hub.clean(task.text), job.id,
                 max(1, (most or q.MAX_ATTEMPTS) - task.attempts),
                 None if expires is None else expires - here)
                for (task, _, _, expires, most), job in zip(new, jobs, strict=True)
            ]  # fmt: skip
            with pg.cursor() as cursor:
                cursor.executemany(hub.ARRIVE, rows)

    def send_one_by_one(self, conn: q.Connection, queue: str, tasks: list[tuple]) -> list[tuple]:
        """Send tasks alone and bury those that the hub cannot store; return the others."""
        sent = []
        for told in tasks:
            try:
                self.send(queue, [told])
                sent.append(told)
            except HubRefused as error:
                with q.transaction(conn):
                    q.bury(conn, told[0], error=str(error))
                say(f"{queue} {told[0].task_type} {told[0].task_id} failed: {error}")
        return sent

    def due_at(self, now: float) -> float:
        return now + q.sleep_seconds(q.connect(self.state), self.args.queues, TICK_SECONDS)


class Pull(Relay):
    """Record here how this machine's tasks ended on others."""

    seldom_at = lost_at = 0.0

    def begin(self, conn: q.Connection) -> None:
        self.hub.listens = (f"relay_{self.machine}",)
        q.ensure_queue(conn, q.TASK_QUEUE_COMPLETION)
        say(f"pull brings home the results of machine {self.machine}")

    def connected(self) -> None:
        self.lost_at = 0.0

    def step(self, conn: q.Connection) -> None:
        self.hub.told()
        if self.changed:
            self.changed = False
            self.cancel(conn)
        if time.monotonic() >= self.seldom_at:
            self.heard()
            with self.hub.transaction() as pg:
                pg.execute(hub.ENDED_OTHERWISE, (self.machine,))
            self.seldom_at = time.monotonic() + SELDOM_SECONDS
        if time.monotonic() >= self.lost_at:
            self.end_lost(conn)
            self.lost_at = time.monotonic() + TIDY_SECONDS
        while not self.stops and self.pull(conn):
            pass
        self.is_idle = True

    def cancel(self, conn: q.Connection) -> None:
        """Have the hub end the jobs of tasks that somebody cancelled here."""
        ids = []
        for queue in cli.queues_of(conn):
            ids += [owner for (owner,) in q.execute(conn, UNWANTED, queue)]
        if ids:
            with self.hub.transaction() as pg:
                for (job_id,) in pg.execute(hub.UNWANTED_JOBS, (ids,)).fetchall():
                    self.hub.jobs.cancel_job_by_id(job_id, abort=True, connection=pg)
            self.seldom_at = 0.0

    def pull(self, conn: q.Connection) -> int:
        """Record a batch of ends here, then tell the hub; return how many."""
        with self.hub.transaction() as pg:
            ids, room = [], BATCH_BYTES
            for id, size in pg.execute(hub.ENDED, (self.machine,)).fetchall():
                room -= size
                if room < 0 and ids:
                    break
                ids.append(id)
            endings = pg.execute(hub.ENDINGS, (ids,)).fetchall() if ids else []
        if endings:
            self.bring_home(conn, endings)
            with self.hub.transaction() as pg:
                pg.execute(hub.HOME, (ids,))
        return len(endings)

    def end_lost(self, conn: q.Connection) -> None:
        """End the tasks that the hub has lost, or whose end it has told before.

        A backup brings back tasks whose ends came home; a hub's backup may lack tasks. What another hub
        may have is left alone.
        """
        here = {}
        for queue in cli.queues_of(conn):
            rows = q.execute(conn, HANDED_OVER, queue).fetchall()
            here |= {id: (queue, row_id, unwanted) for id, row_id, unwanted in rows}
        if not here:
            return
        with self.hub.transaction() as pg:
            known = dict(pg.execute(hub.KNOWN_AND_HOME, (list(here),)).fetchall())
            knows_us = pg.execute(hub.IS_KNOWN_HERE, (self.machine,)).fetchone()[0]
            home = [id for id, is_home in known.items() if is_home]
            endings = pg.execute(hub.ENDINGS, (home,)).fetchall() if home else []
        lost = here.keys() - known.keys()
        lost_here = {id for id in lost if knows_us and id.startswith(self.hub.prefix)}
        if lost - lost_here:
            queues = ", ".join(sorted({here[id][0] for id in lost - lost_here}))
            self.complain(
                f"this hub does not know tasks of {queues} that are handed over: another hub may"
                " have them. Check TASK_QUEUE_HUB; push sends them again to a hub that was made"
                " anew; or give them up with tasks.py purge QUEUE --status handed_over"
            )
        why = "the hub does not know it any more"
        for id in lost_here:
            queue, row_id, unwanted = here[id]
            outcome = "cancelled" if unwanted else "failed"
            endings.append((id, queue, row_id, outcome, 0, None, None, None, None, why, None, None))
        for at in range(0, len(endings), BATCH):
            self.bring_home(conn, endings[at : at + BATCH])

    def bring_home(self, conn: q.Connection, endings: list[tuple]) -> None:
        """End these tasks here, durably; nothing happens to those that ended before."""
        queues, lines = set(cli.queues_of(conn)), []
        with q.transaction(conn):
            for ending in endings:
                if ending[1] in queues:
                    lines += self.end_one(conn, *ending)
        q.wake(self.state)
        for line in lines:
            say(line)

    def end_one(
        self, conn, id, queue, row_id, outcome, attempts, age, code, result, log, error, reply, size
    ) -> list[str]:
        started_at = None if age is None else time.time() - age
        told = {"id": row_id, "owner": id, "attempts": attempts, "started_at": started_at}
        row = q.execute(conn, COME_HOME, queue, **told).fetchone()
        if row is None:
            return []
        task = q.Task.from_row(queue, row)
        how = {"exit_code": code, "result": result, "log": log}

        def finish(conn, outcome, error):
            if reply is not None and outcome == "completed":
                try:
                    follow_up = outcomes.next_row(task, reply, size)
                    q.insert(conn, q.TASK_QUEUE_COMPLETION, follow_up)
                except (q.InvalidTask, RecursionError) as refused:
                    outcome = "failed"
                    error = f"done, but what should follow was refused: {refused}"
            return outcome if q.finish(conn, task, outcome, error=error, **how) else None, error

        verdict = partial(finish, outcome=outcome, error=error)
        outcome, error = owners.verdict_alone(conn, task, verdict)
        line = f"{queue} {task.task_type} {task.task_id} {outcome} attempt {task.attempts}"
        return [f"{line}: {error}" if error else line]


@dataclass
class Held:
    """A job of the hub that this machine has."""

    id: str
    fetches: int
    job_id: int
    queue: str
    aborted: bool = False
    is_local: bool = False

    @property
    def task_id(self) -> str:
        """The id of its task in the local queue."""
        return f"{self.id}-{self.fetches}"


class Fetch(Relay):
    """Take the hub's jobs into this machine's own queue, and return how they ended.

    The hub's ledger names the machine that has a job, and counts how often it was fetched: that fences
    the job's end. A killed fetch loses nothing: the next one asks the hub what this machine holds,
    and the local queue and history what became of it.
    """

    def begin(self, conn: q.Connection) -> None:
        for queue in self.args.queues:
            if q.ensure_queue(conn, queue):
                say(f"{queue} is a new queue")
            self.lock("fetch", queue)
        channels = [f"procrastinate_queue_v1#{queue}" for queue in self.args.queues]
        self.hub.listens = tuple(channels)
        self.held: dict[str, Held] = {}
        self.looked, self.next_due = False, 0.0
        self.beat_at = self.sweep_at = self.tidy_at = 0.0
        say(f"fetch takes {', '.join(self.args.queues)} for machine {self.machine}")

    def connected(self) -> None:
        """Beat before sweeping: machines that lost the hub together get the time to show that they live."""
        self.worker_id: int | None = None
        self.beat_at, self.looked = 0.0, False
        self.sweep_at = time.monotonic() + self.args.stalled_after

    def step(self, conn: q.Connection) -> None:
        for told in self.hub.told():
            self.looked = False
            if "abort_job_requested" in told:
                self.beat_at = 0.0
        now = time.monotonic()
        if now >= self.beat_at:
            self.beat(conn)
        if self.changed:
            self.changed = False
            self.return_ends(conn)
        if now >= self.sweep_at:
            self.sweep()
        if now >= self.next_due:
            self.looked = False
        while not self.stops and not self.looked:
            self.fetch(conn)
        self.is_idle = not self.held

    def due_at(self, now: float) -> float:
        return min(now + TICK_SECONDS, self.beat_at, self.sweep_at, self.next_due)

    # ------------------------------------------------------------------------------- signs of life

    def beat(self, conn: q.Connection) -> None:
        """Show that this machine lives, and make the local queue agree with what the hub says it holds."""
        self.heard()
        self.beat_at = time.monotonic() + min(10.0, self.args.stalled_after / 4)
        with self.hub.transaction() as pg:
            if self.worker_id is None:
                self.worker_id = hub.at_once(self.hub.jobs.register_worker())
            hub.at_once(self.hub.jobs.update_heartbeat(self.worker_id))
            rows = pg.execute(hub.HELD, (self.machine, self.args.queues)).fetchall()
        self.held = {held.task_id: held for held in (Held(*row) for row in rows)}
        self.agree(conn)

    def agree(self, conn: q.Connection) -> None:
        """Cancel local copies of jobs that are not ours any more or not wanted; store what is missing."""
        tries = []
        for queue in self.args.queues:
            for task_id, row_id, status, attempts in q.execute(conn, FETCHED, queue).fetchall():
                held = self.held.get(task_id)
                if held is None:
                    why = "its job was given to another machine"
                    self.cancel_local(conn, queue, row_id, status, why)
                    continue
                held.is_local = True
                if held.aborted:
                    self.cancel_local(conn, queue, row_id, status, "cancelled where it came from")
                if attempts:
                    tries.append((attempts, held.id, self.machine, held.fetches, attempts))
        self.return_ends(conn)
        for held in [each for each in self.held.values() if not each.is_local]:
            # A fetch was killed before it stored this one.
            with self.hub.transaction() as pg:
                content = pg.execute(hub.CONTENT, (held.id,)).fetchone()
            self.store(conn, [(held, *content)])
        if tries:
            with self.hub.transaction() as pg, pg.cursor() as cursor:
                cursor.executemany(hub.TRYING, tries)

    def cancel_local(
        self, conn: q.Connection, queue: str, row_id: int, status: int, why: str
    ) -> None:
        """End a local copy: a running one by its worker."""
        with q.transaction(conn):
            if q.execute(conn, CANCEL_RUNNING, queue, id=row_id).rowcount:
                return
            row = q.execute(conn, CANCEL_WAITING, queue, id=row_id).fetchone()
            if row is not None:
                q.finish(conn, q.Task.from_row(queue, row), "cancelled", error=why)
        q.wake(self.state)

    # ------------------------------------------------------------------------------------- fetching

    def free(self, conn: q.Connection) -> dict[str, int]:
        """Return the free places of each queue that has some."""
        controls, places = outcomes.controls(conn), {}
        for queue in self.args.queues:
            control = controls.get(queue)
            most = self.args.at_most
            if control is not None:
                most = 0 if control.paused else min(most, control.slots or most)
            places[queue] = most - sum(held.queue == queue for held in self.held.values())
        return {queue: count for queue, count in places.items() if count > 0}

    def fetch(self, conn: q.Connection) -> None:
        """Take jobs for the free places in one transaction of the hub, then store them here."""
        taken, free = [], self.free(conn)
        with self.hub.transaction() as pg:
            while free and len(taken) < BATCH:
                call = self.hub.jobs.fetch_job(list(free), self.worker_id)
                job = hub.at_once(call)
                if job is None:
                    break
                held, *content = self.take(pg, job)
                free[job.queue] -= 1
                free = {queue: count for queue, count in free.items() if count > 0}
                taken.append((held, *content))
            self.looked = not taken
            if not taken:
                (due,) = pg.execute(hub.NEXT_DUE, (self.args.queues,)).fetchone()
                wait = TICK_SECONDS if due is None else max(due, 0.0)
                self.next_due = time.monotonic() + min(TICK_SECONDS, wait)
        self.held |= {held.task_id: held for held, *_ in taken}
        self.store(conn, taken)

    def take(self, pg: Any, job: Any) -> tuple:
        """Note in the ledger that this machine has a job; return it as Held, and its content."""
        row = pg.execute(hub.TAKEN, (self.machine, job.id)).fetchone()
        if row is None:
            # Another program deferred it; or its end is known, and somebody had the hub try it again.
            pg.execute(hub.STRAY, (f"{self.hub.prefix}job-{job.id}", job.queue, job.id))
            row = pg.execute(hub.TAKEN, (self.machine, job.id)).fetchone()
        id, fetches, text, tried, most, ttl = row
        held = Held(id, fetches, job.id, job.queue)
        return held, job.task_name, job.task_kwargs, job.priority, text, tried, most, ttl

    def store(self, conn: q.Connection, taken: list[tuple]) -> None:
        """Store fetched jobs in the local queue; end on the hub those that cannot be stored."""
        refused, rows = [], []
        for held, *content in taken:
            try:
                rows.append((held, *self.row_of(held, *content)))
            except (q.InvalidTask, ValueError, RecursionError) as error:
                refused.append((held, "failed", str(error)))
            except Expired:
                refused.append((held, "expired", "it was not started before its time was over"))
        if rows:
            with q.transaction(conn):
                for held, row, most in rows:
                    q.insert(conn, held.queue, row)
                    q.execute(conn, SET_ATTEMPTS, held.queue, most=most, task_id=held.task_id)
                    held.is_local = True
            q.wake(self.state)
            for queue, number in Counter(held.queue for held, *_ in rows).items():
                say(f"{queue}: {cli.plural(number, 'task')} fetched")
        for held, outcome, error in refused:
            self.end_job(held, outcome, error=error)

    def row_of(self, held, task_name, args, priority, text, tried, most, ttl) -> tuple[q.Row, int]:
        """Return the local row of a job, and how many attempts it has left. Raises InvalidTask, Expired."""
        if ttl is not None and ttl <= 0:
            raise Expired
        relay = args.get("relay") if isinstance(args, dict) else None
        task_id, task_type = f"{held.queue}-{held.job_id}", task_name
        if isinstance(relay, dict):
            if text is None:
                raise q.InvalidTask("its end is known where it came from: retry it there")
            task_id = str(relay.get("task_id"))
        else:
            # Another program deferred it: its arguments are the payload.
            text = q.to_json(args)
        blank = dict.fromkeys(q.Task._fields)
        told = {
            "queue": held.queue,
            "id": 0,
            "task_id": task_id,
            "task_type": task_type,
            "text": text,
        }
        task = q.Task(**{**blank, **told, "enqueued_at": time.time()})
        if task_type == STAYS:
            raise q.InvalidTask(f'a task of type "{STAYS}" runs on its own machine alone')
        source = {"queue": held.queue, "task_id": task_id}
        # The hub grants no rights, unless this machine trusts it.
        granted = task.envelope.get("granted") if self.args.trust else {}
        how = {
            "priority": priority,
            "depth": task.depth,
            "source": source,
            "granted": granted,
            "ttl": ttl,
        }
        row = q.new_row(task_type, task.data, held.task_id, **how)
        return row, max(1, (most or q.MAX_ATTEMPTS) - tried)

    # ------------------------------------------------------------------------------------ returning

    def return_ends(self, conn: q.Connection) -> None:
        """Tell the hub how local copies ended: the history keeps it until the hub knows."""
        for held in list(self.held.values()):
            told = {"queue": held.queue, "task_id": held.task_id}
            row = conn.execute(FETCHED_END, told).fetchone()
            if row is None:
                continue
            row_id, outcome, attempts, code, result, log, error = row
            how = dict(attempts=attempts, exit_code=code, result=result, log=log, error=error)
            if self.args.reply and outcome == "completed":
                how["reply"], how["reply_bytes"] = self.output_of(held.queue, row_id, result)
            self.end_job(held, outcome, **how)

    def output_of(self, queue: str, row_id: int, kept: str | None) -> tuple[str, int]:
        """Return what a handler printed, from its log where that is still there, and its whole size."""
        runs = logs.runs_of({"queue": queue, "id": row_id})
        if runs:
            text, size = outcomes.read_output(f"{runs[-1].path}.out", outcomes.RESULT_BYTES)
            if size:
                return text, size
        return kept or "", len((kept or "").encode())

    def end_job(self, held: Held, outcome: str, **how: Any) -> None:
        """End a job on the hub, if this machine still has it."""
        try:
            is_ours = self.end_on_hub(held, outcome, how)
        except HubRefused as error:
            why = f"its end could not be recorded: {error}"
            is_ours, outcome = self.end_on_hub(held, "failed", {"error": why}), "failed"
        self.held.pop(held.task_id, None)
        self.looked = False
        became = outcome if is_ours else "was given to another machine"
        error = f": {how['error']}" if how.get("error") else ""
        say(f"{held.queue} {held.task_id} {became}{error}")

    def end_on_hub(self, held: Held, outcome: str, how: dict) -> bool:
        with self.hub.transaction() as pg:
            fence = (held.id, self.machine, held.fetches)
            if pg.execute(hub.HOLD_JOB, fence).fetchone() is None:
                return False
            self.hub.end_job(held.job_id, held.id, outcome, **how)
            return True

    def end(self) -> None:
        if self.hub.conn is not None and self.worker_id is not None and not self.stops:
            try:
                with self.hub.transaction():
                    hub.at_once(self.hub.jobs.unregister_worker(self.worker_id))
            except q.QueueError:
                pass
        super().end()

    def sweep(self) -> None:
        """Give up the jobs of machines that the hub has not heard for --stalled-after."""
        self.sweep_at = time.monotonic() + self.args.stalled_after / 2
        silent = (q.MAX_ATTEMPTS, self.args.queues, self.args.stalled_after)
        with self.hub.transaction() as pg:
            for job_id, id, runner, tried, most, aborted, now in pg.execute(
                hub.ABANDONED, silent
            ).fetchall():
                error = f"its machine {runner} was silent for too long"
                if aborted or tried >= most:
                    outcome = "cancelled" if aborted else "failed"
                    self.hub.end_job(
                        job_id, id, outcome, error=f"{error} (attempt {tried} of {most})"
                    )
                else:
                    self.hub.give_up_job(job_id, id, tried, now)
                say(f"job {id}: {error}; it is given to another")
                self.looked = False
        if time.monotonic() >= self.tidy_at:
            self.tidy_at = time.monotonic() + TIDY_SECONDS
            with self.hub.transaction() as pg:
                for statement in hub.TIDY:
                    pg.execute(statement)
                hub.at_once(self.hub.jobs.prune_stalled_workers(3_600.0))


class Expired(Exception):
    """The task's time is over."""


# ------------------------------------------------------------------------------------ the commands


def init(args: argparse.Namespace) -> int:
    """Prepare the hub; safe to call twice."""
    there = Hub(args.url)
    made = there.prepare()
    there.close()
    cli.report(args.json, {"ready": True, "made": made}, "the hub is ready")
    return 0


def machines(args: argparse.Namespace) -> int:
    """List the machines, or forget one."""
    conn, there = q.connect(), Hub(args.url)
    me = machine_id(conn)
    if args.forget:
        return forget(there, args.forget, me, args.json)
    with there.transaction() as pg:
        rows = pg.execute(hub.MACHINES).fetchall()
    names = ("machine", "heard_seconds_ago", "waiting", "results", "running")
    told = [dict(zip(names, row, strict=True)) | {"is_this": row[0] == me} for row in rows]
    lines = [
        f"{each['machine']}  heard {cli.span(each['heard_seconds_ago'])} ago"
        f"  pushed: {each['waiting']} waiting, {each['results']} results to pull"
        f"  runs {cli.plural(each['running'], 'job')}{'  (this machine)' if each['is_this'] else ''}"
        for each in told
    ]
    cli.report(args.json, told, "\n".join(lines) or "the hub knows no machine yet")
    return 0


def forget(there: Hub, name: str, me: str, as_json: bool) -> int:
    """End and delete what a machine pushed, and give the jobs that it has to others."""
    if name == me:
        raise cli.Refused(f"{name} is this machine: its tasks end with tasks.py cancel")
    with there.transaction() as pg:
        jobs = [job_id for (job_id,) in pg.execute(hub.OPEN_JOBS_OF, (name,)).fetchall()]
        for job_id in jobs:
            there.jobs.cancel_job_by_id(job_id, abort=True, connection=pg)
        given_up = pg.execute(hub.RUN_BY, (name,)).fetchall()
        for job_id, id, tried in given_up:
            there.give_up_job(job_id, id, tried)
        gone = sum(pg.execute(statement, (name,)).rowcount for statement in hub.FORGET)
    if not gone:
        raise cli.Refused(f"the hub knows no machine {name}; see: relay.py machines")
    told = {"machine": name, "ended": len(jobs), "given_up": len(given_up)}
    text = f"{name} is forgotten: {cli.plural(len(jobs), 'task')} ended, {cli.plural(len(given_up), 'job')} given to others"
    cli.report(as_json, told, text)
    return 0


def adopt(args: argparse.Namespace) -> int:
    """Take over what a machine pushed: its tasks are handed over from here, and pull ends them here."""
    conn, there = q.connect(), Hub(args.url)
    me = machine_id(conn)
    if args.name == me:
        raise cli.Refused(f"{args.name} is this machine")
    with there.transaction() as pg:
        rows = pg.execute(hub.TO_ADOPT, (args.name,)).fetchall()
    if not rows:
        raise cli.Refused(f"machine {args.name} has nothing on this hub; see: relay.py machines")
    for queue in {queue for _, queue, *_ in rows}:
        q.ensure_queue(conn, queue)
    for id, queue, text, _ in rows:
        # Killed in between, the next adopt finds the row again.
        with q.transaction(conn):
            row = q.execute(conn, IS_ADOPTED, queue, owner=id).fetchone()
            told = {"data": text, "owner": id, "now": time.time()}
            row = row or q.execute(conn, ADOPTED, queue, **told).fetchone()
        if row is None:
            say(f"{queue}: a task with the id of {id} is here already; its result stays on the hub")
            continue
        with there.transaction() as pg:
            pg.execute(hub.ADOPT, (me, row[0], id, args.name))
    text = (
        f"{cli.plural(len(rows), 'task')} of {args.name} adopted: relay.py pull brings the results"
    )
    cli.report(args.json, {"machine": args.name, "adopted": len(rows)}, cli.remedies_as_typed(text))
    return 0


def status(args: argparse.Namespace) -> int:
    """Show both ends side by side."""
    conn, there, trouble = q.connect(), Hub(args.url), None
    machine = machine_id(conn)
    here = {}
    for queue in cli.queues_of(conn):
        here[queue] = dict(q.execute(conn, LOCAL_COUNTS, queue).fetchall())
    away: dict[str, dict] = {}
    try:
        with there.transaction() as pg:
            for queue, word, count in pg.execute(hub.COUNTS):
                away.setdefault(queue, {})[HUB_WORDS[word]] = count
            for queue, open_tasks, results in pg.execute(hub.OF_MACHINE, (machine,)):
                away.setdefault(queue, {}).update(from_here=open_tasks, results=results)
    except q.QueueError as error:
        trouble = str(error)
    queues = {
        name: {"here": here.get(name, {}), "hub": away.get(name, {})}
        for name in sorted(here.keys() | away.keys())
        if here.get(name) or away.get(name)
    }
    told = {"machine": machine, "trouble": trouble, "queues": queues}
    cli.report(args.json, told, "\n".join(in_words(told)))
    return 1 if trouble else 0


HUB_WORDS = {"todo": "waiting", "doing": "running", "failed": "failed"}


def in_words(told: dict) -> Iterator[str]:
    """Yield the lines of status for a person."""
    yield f"machine {told['machine']}"
    rows = [("queue", "here", "hub")]
    for name, ends in told["queues"].items():
        counts = [
            ", ".join(f"{count} {word}" for word, count in ends[end].items() if count) or "-"
            for end in ("here", "hub")
        ]
        rows.append((name, counts[0], "?" if told["trouble"] else counts[1]))
    wide = [max(len(row[at]) for row in rows) for at in (0, 1)]
    for name, here, away in rows:
        yield f"{name:{wide[0]}}  {here:{wide[1]}}  {away}".rstrip()
    if told["trouble"]:
        yield told["trouble"]


# fmt: off
def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("relay.py", __doc__)
    common = cli.Parser(add_help=False)
    common.add_argument("--url", default=os.environ.get("TASK_QUEUE_HUB"),
        help="of the hub: postgresql://USER@HOST/DATABASE (default: $TASK_QUEUE_HUB)")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=what, description=what)

    push = add("push", "hand the tasks of local queues over")
    pull = add("pull", "bring results home")
    fetch = add("fetch", "take tasks into this machine's own queue")
    for one in (push, fetch):
        one.add_argument("queues", metavar="QUEUE", nargs="+")
    for one in (push, pull, fetch):
        one.add_argument("--drain", action="store_true", help="end when there is nothing left to do")
    fetch.add_argument("--at-most", type=count, default=1, metavar="N",
        help="tasks of each queue at a time on this machine (default 1); slots and pauses count, too")
    fetch.add_argument("--reply", action="store_true",
        help="send what handlers print home, where it becomes tasks in completions")
    fetch.add_argument("--trust", action="store_true",
        help="keep the fields that grant rights, like permission_mode, of tasks from the hub")
    fetch.add_argument("--stalled-after", type=cli.duration, default=STALLED_SECONDS, metavar="DURATION",
        help="give up the jobs of a machine that was silent for so long (default %(default)g)")
    init, status = add("init", "prepare the hub, once"), add("status", "show both ends side by side")
    machines = add("machines", "list the machines; machines forget NAME ends what a lost one left")
    machines.add_argument("forget", nargs="*", metavar="forget NAME")
    adopt = add("adopt", "take over what a machine pushed: pull brings its results here")
    adopt.add_argument("name", metavar="NAME")
    for one in (init, status, machines, adopt):
        one.add_argument("--json", action="store_true", help="for scripts")
    return parser
# fmt: on


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.url:
        parser.error("which hub? Give --url postgresql://USER@HOST/DATABASE, or set TASK_QUEUE_HUB")
    # The message does not repeat it: a password may be in it.
    if not re.match(r"postgres(ql)?://|\w+ *=", args.url):
        parser.error("the hub's URL is not of the form postgresql://USER@HOST/DATABASE")
    if args.verb == "machines":
        words = args.forget
        if words and (len(words) != 2 or words[0] != "forget"):
            parser.error("give machines alone, or machines forget NAME")
        args.forget = words[1] if words else None
    try:
        args.queues = list(dict.fromkeys(map(q.check_queue_name, getattr(args, "queues", ()))))
        for queue in args.queues:
            if len(queue) > hub.LONGEST_QUEUE:
                most = hub.LONGEST_QUEUE
                raise ValueError(
                    f"queue {queue!r}: on the hub, a name has at most {most} characters"
                )
        if args.verb == "fetch" and args.stalled_after < 1:
            raise ValueError("--stalled-after is at least 1 second")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    start_clean()
    args = parse(argv)
    verbs = {"init": init, "status": status, "machines": machines, "adopt": adopt}
    loops = {"push": Push, "pull": Pull, "fetch": Fetch}
    if args.verb in verbs:
        return cli.run("relay.py", lambda: verbs[args.verb](args))
    return cli.run("relay.py", lambda: loops[args.verb](args).run())


if __name__ == "__main__":
    raise SystemExit(main())
