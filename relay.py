#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["procrastinate>=3.8,<4", "psycopg[binary]>=3.2,<4", "watchdog>=4,<8"]
# ///
"""Have tasks run on another machine: hand them over to a hub, run what is there, bring results
home.

    relay.py init                                    prepare the hub, once
    relay.py push notifications                      here: hand this queue's tasks over
    relay.py work notifications --reply -- claude -p     there: run them
    relay.py pull                                    here: how they ended, and results into completions
    relay.py status                                  both ends side by side

The hub is a PostgreSQL database with Procrastinate's schema: --url postgresql://USER@HOST/DATABASE,
or TASK_QUEUE_HUB. A password is better kept in ~/.pgpass: arguments can be seen by all of a
machine's users.

Hooks go on writing to the local database, so nobody waits for a network. A task that was pushed is
handed_over until pull has heard how it ended. While the hub cannot be used, tasks wait where they
are. push, pull and work go on until SIGTERM or Ctrl-C; with --drain, they end when there is nothing
left to do.

exit codes: 0 done or stopped; 1 the hub or the database cannot be used; 64 usage; 75 the database
is locked.
"""

import argparse
import json
import os
import re
import select
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import queue_helpers as q
from taskqueue import cli, runs
from taskqueue import outcome as outcomes
from taskqueue import recovery as owners
from taskqueue.handlers import (
    Handlers,
    Unstarted,
    add_run_options,
    check_run_options,
    say,
    start_clean,
)
from taskqueue.supervisor import wakeup_pipe

# Tasks, and bytes of them, that one transaction carries at most.
BATCH, BATCH_BYTES = 200, 8 * 2**20
# Before the hub is tried again, doubling from the first to the last.
RETRY_SECONDS = (1.0, 60.0)
# Sleepers look this often whatever they are told; more often when something is due.
TICK_SECONDS = 5.0
# How often a handler is looked at that outlives its worker.
ORPHAN_SECONDS = 0.5
# Before a job counts as abandoned: so long without a heartbeat of the machine that runs it.
STALLED_SECONDS = 60.0
# How often pull looks for jobs that ended without a word from relay.py; and for tasks that the hub
# does not have, and work for what can be deleted.
SELDOM_SECONDS, TIDY_SECONDS = 30.0, 3_600.0
# The payloads of jobs whose results are home are deleted, and later what is known of the handing
# over.
KEEP_JOB_DAYS, KEEP_ID_DAYS = 7, 30
# A channel's name in PostgreSQL has 63 bytes, and a queue's channel is
# procrastinate_queue_v1#QUEUE.
LONGEST_QUEUE = 40
# What PostgreSQL says of a value that it cannot store: no other try will help.
REFUSALS = ("22", "23", "54")

# --------------------------------------------------------------------------- the hub's statements

# What was handed over: the id is written in the transaction that defers the job, so that a task
# that is sent twice arrives once. Then how it ended, until its machine has fetched that.
HUB_VERSION = "relay 1"
HUB_SCHEMA = f"""
create table relay_tasks (
  id          text primary key,       -- of the handing over; a task that is redriven gets another
  machine     text not null,          -- where it comes from
  queue       text not null,
  row_id      bigint not null,        -- of the task in its machine's queue
  task        text,                   -- what was enqueued; null once its end is known there
  job_id      bigint not null,        -- in procrastinate_jobs, where it may have been deleted since
  pushed_at   timestamptz not null default now(),
  expires_at  timestamptz,            -- not started by then, it ends as expired
  started_at  timestamptz,            -- of the last attempt
  ended_at    timestamptz,
  outcome     text,                   -- completed, failed, cancelled, expired
  attempts    integer,
  exit_code   integer,
  result      text,
  log         text,
  error       text,
  reply       text,                   -- what becomes a task in completions; null: nothing does
  reply_bytes bigint,                 -- larger than the reply where that was cut
  home_at     timestamptz             -- its machine knows
);
create index on relay_tasks (job_id);
create index on relay_tasks (machine, ended_at) where home_at is null;
create index on relay_tasks (home_at);
comment on table relay_tasks is '{HUB_VERSION}'
"""
CHECK = """
select to_regclass('procrastinate_jobs') is not null,
  array(select proname::text from pg_proc where proname like 'procrastinate%'),
  to_regclass('relay_tasks') is not null, obj_description(to_regclass('relay_tasks'), 'pg_class'),
  coalesce(col_description(to_regclass('relay_tasks'), 1), '')"""
# A hub's name is random, too. It tells what another hub has from what this one has lost.
NAME_HUB = """
comment on column relay_tasks.id is '{name}'"""
KNOWN = """
select id from relay_tasks where id = any(%s)"""
ARRIVE = """
insert into relay_tasks (id, machine, queue, row_id, task, job_id, expires_at)
values (%s, %s, %s, %s, %s, %s, clock_timestamp() + make_interval(secs => %s::float))"""
BEGUN = """
update relay_tasks set started_at = case when expires_at < now() then null else now() end
where job_id = %s and outcome is null
returning task, expires_at is not null and expires_at < now()"""
NEXT_DUE = """
select extract(epoch from min(scheduled_at) - clock_timestamp())::float from procrastinate_jobs
where status = 'todo' and queue_name = any(%s) and scheduled_at > now()"""
HOLD_JOB = """
select abort_requested, now() from procrastinate_jobs
where id = %s and status = 'doing' and worker_id = %s and attempts = %s for update"""
UNCOUNT = """
update procrastinate_jobs set attempts = attempts - 1 where id = %s"""
END = """
with ended as (
  update relay_tasks set outcome = %(outcome)s, ended_at = now(), attempts = %(attempts)s, exit_code = %(exit_code)s,
    result = %(result)s, log = %(log)s, error = %(error)s, reply = %(reply)s, reply_bytes = %(reply_bytes)s
  where job_id = %(job_id)s and outcome is null returning machine)
select pg_notify('relay_' || machine, '') from ended"""
BEAT = """
update procrastinate_workers set last_heartbeat = now() where id = %s returning id"""
HELD = """
select id, queue_name, coalesce(args->'relay'->>'task_id', queue_name || '-' || id), task_name, attempts, abort_requested
from procrastinate_jobs where worker_id = %s and status = 'doing'"""
STALLED = """
select j.id, j.queue_name, coalesce(j.args->'relay'->>'task_id', j.queue_name || '-' || j.id), j.task_name, j.attempts,
  j.abort_requested, j.worker_id, now()
from procrastinate_jobs j left join procrastinate_workers w on w.id = j.worker_id
where j.status = 'doing' and j.queue_name = any(%s)
  and (w.id is null or w.last_heartbeat < now() - make_interval(secs => %s))
limit 100 for update of j skip locked"""
TIDY = (
    "delete from procrastinate_jobs j using relay_tasks r where r.job_id = j.id and j.status not in ('todo', 'doing')"
    f" and r.home_at < now() - interval '{KEEP_JOB_DAYS} days'",
    f"delete from relay_tasks where home_at < now() - interval '{KEEP_ID_DAYS} days'",
)
ENDED = """
select id, coalesce(octet_length(reply), 0) + coalesce(octet_length(result), 0) + coalesce(octet_length(log), 0)
from relay_tasks where machine = %s and home_at is null and ended_at is not null order by ended_at limit 200"""
# Jobs that somebody cancelled, deleted or ran by other means than relay.py.
ENDED_OTHERWISE = """
update relay_tasks r set ended_at = now(), outcome = case f.status when 'succeeded' then 'completed'
    when 'failed' then 'failed' else 'cancelled' end,
  error = case f.status when 'succeeded' then null else 'on the hub, its job ' ||
    case when f.status is null then 'was deleted' else 'is ' || f.status end end
from (select r.id, j.status::text from relay_tasks r left join procrastinate_jobs j on j.id = r.job_id
      where r.machine = %s and r.home_at is null and r.ended_at is null
        and (j.id is null or j.status not in ('todo', 'doing'))) f
where r.id = f.id"""
ENDINGS = """
select id, queue, row_id, outcome, coalesce(attempts, 0), extract(epoch from now() - started_at)::float,
  exit_code, result, log, error, reply, reply_bytes from relay_tasks where id = any(%s) order by ended_at"""
# A person's backup may bring tasks back that were home already, and a hub may have been made anew.
IS_KNOWN_HERE = """
select exists (select 1 from relay_tasks where machine = %s)"""
KNOWN_AND_HOME = """
select id, home_at is not null from relay_tasks where id = any(%s)"""
UNWANTED_JOBS = """
select job_id from relay_tasks where id = any(%s) and ended_at is null"""
HOME = """
update relay_tasks set home_at = now(), task = null, result = null, log = null, reply = null where id = any(%s)"""
HUB_COUNTS = """
select queue_name, status::text, count(*) from procrastinate_jobs where status in ('todo', 'doing') or status = 'failed'
group by 1, 2"""
HUB_OF_MACHINE = """
select queue, count(*) filter (where ended_at is null), count(*) filter (where ended_at is not null)
from relay_tasks where machine = %s and home_at is null group by 1"""
HUB_WORKERS = """
select w.id, extract(epoch from now() - w.last_heartbeat)::float, count(j.id)
from procrastinate_workers w left join procrastinate_jobs j on j.worker_id = w.id and j.status = 'doing'
group by 1, 2 order by 1"""

# -------------------------------------------------------------------- the local database's statements

# This machine's name on the hub is random: a host's name would tell more than the hub needs to
# know.
MACHINE_SCHEMA = "create table if not exists task_machine (id text not null)"
# The id of a handing over is the row's owner: whoever ends the task later must name it. It begins
# with the hub's name. The time when the hub had the task is claimed_at; until then it is sent
# again, which the hub notices.
TAKE = """
update "{queue}" set status = 5, owner = :prefix || lower(hex(randomblob(12))), claimed_at = null
where id in (select id from "{queue}" where status < 2 order by priority desc, id limit :limit)"""
# Those of groups wait here for their time: on the hub they would hold up their group until then.
TAKE_SCHEDULED = """
update "{queue}" set status = 5, owner = :prefix || lower(hex(randomblob(12))), claimed_at = null
where id in (select id from "{queue}" where status = 3 and due_at is not null and group_id is null
             order by due_at limit :limit)"""
CAN_TAKE = f"""
select (exists (select 1 from "{{queue}}" where status < 2) or {q.IS_OVERDUE}
    or exists (select 1 from "{{queue}}" where status = 3 and due_at is not null and group_id is null))
  and not {q.IS_PAUSED}"""
UNSENT = """
select {task}, group_id, due_at, expires_at from "{queue}" where status = 5 and claimed_at is null
order by priority desc, id"""
IS_UNSENT = """
select exists (select 1 from "{queue}" where status = 5 and claimed_at is null)"""
# What was taken for another hub, and is not known to be there, is this hub's under a name of its own.
TAKE_OVER = """
update "{queue}" set owner = :prefix || lower(hex(randomblob(12)))
where status = 5 and claimed_at is null and owner glob 'hub-*-*' and owner not glob :prefix || '*'"""
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
LOCAL_COUNTS = f"""
select {q.STATUS_WORD} as word, count(*) from "{{queue}}" group by 1"""


class HubTrouble(q.QueueError):
    """The hub cannot be used now; the message says why."""


class HubRefused(q.QueueError):
    """The hub cannot store this, whenever it is asked."""


class Hub:
    """A connection to the hub, opened when it is wanted and again after trouble."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.conn: Any = None
        self.name = ""
        self.listens: tuple[str, ...] = ()

    @cached_property
    def queries(self) -> dict[str, str]:
        """Procrastinate's own statements."""
        from procrastinate import sql

        return dict(sql.queries)

    def connect(self) -> bool:
        """Have a connection to a hub that is prepared; whether it is a new one. Raises HubTrouble."""
        if self.conn is not None:
            return False
        self.open()
        try:
            with self.transaction() as conn:
                jobs, functions, relays, version, self.name = conn.execute(CHECK).fetchone()
                for channel in self.listens:
                    conn.execute(f'listen "{channel}"')
            wanted = set(
                re.findall(r"procrastinate_\w+_v\d+(?=\()", " ".join(self.queries.values()))
            )
            if not jobs or not relays:
                raise HubTrouble("the hub has no schema yet: run relay.py init")
            if wanted - set(functions):
                missing = ", ".join(sorted(wanted - set(functions)))
                raise HubTrouble(
                    f"the hub's Procrastinate schema is older than these scripts ({missing} missing):"
                    " apply the migrations of https://procrastinate.readthedocs.io"
                )
            if version != HUB_VERSION:
                raise HubTrouble(
                    f"the hub's table relay_tasks is of version {version!r}, these scripts know"
                    f" {HUB_VERSION!r}: use the same version on all machines"
                )
        except HubTrouble:
            self.close()
            raise
        return True

    def open(self) -> None:
        import psycopg

        # The end of a connection that nobody answers on is noticed within half a minute.
        patience: dict[str, Any] = dict(
            connect_timeout=10,
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=20_000,
        )
        with self.trouble():
            self.conn = psycopg.connect(
                self.url, autocommit=True, application_name="relay.py", **patience
            )

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """A transaction; raises HubTrouble, HubRefused."""
        with self.trouble(), self.conn.transaction():
            yield self.conn

    @contextmanager
    def trouble(self) -> Iterator[None]:
        """Have psycopg's and Procrastinate's errors raised as ours."""
        import psycopg
        from procrastinate import exceptions

        try:
            yield
        except (psycopg.Error, exceptions.ConnectorException) as error:
            cause = error if isinstance(error, psycopg.Error) else error.__cause__
            state = getattr(cause, "sqlstate", None) or ""
            words = " ".join(str(cause or error).split())
            is_unique = isinstance(error, exceptions.UniqueViolation) or state == "23505"
            if state.startswith(REFUSALS) and not is_unique and not self.conn.closed:
                raise HubRefused(f"the hub refuses it: {words}") from error
            self.close()
            raise HubTrouble(f"the hub cannot be used: {words}") from error

    @property
    def prefix(self) -> str:
        """How the ids of what is handed over to this hub begin."""
        return f"hub-{self.name}-"

    def told(self) -> list[str]:
        """What was told on the channels since the last time. Raises HubTrouble."""
        if self.conn is None:
            return []
        with self.trouble():
            return [told.payload for told in self.conn.notifies(timeout=0)]

    def run(self, conn: Any, query: str, **values) -> tuple | None:
        """Run one of Procrastinate's own statements; its first row."""
        return conn.execute(self.queries[query], values).fetchone()

    def close(self) -> None:
        conn, self.conn = self.conn, None
        if conn is not None:
            conn.close()


def clean(text: str | None) -> str | None:
    """Text as PostgreSQL can store it."""
    if text is None:
        return None
    return text.replace("\0", "\ufffd").encode("utf-8", "backslashreplace").decode()


def machine_id(conn: q.Connection) -> str:
    """This machine's name on the hub, made when it is first wanted."""
    with owners.errors_explained(conn):
        if "task_machine" not in q.table_names(conn):
            with q.transaction(conn):
                conn.execute(MACHINE_SCHEMA)
                if not conn.execute("select 1 from task_machine").fetchone():
                    conn.execute("insert into task_machine (id) values (?)", (os.urandom(8).hex(),))
        return conn.execute("select id from task_machine").fetchone()[0]


# -------------------------------------------------------------------------------------- the loops


class Relay:
    """What push, pull and work share: a loop that is woken, and trouble that is said once and
    waited out.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.state, self.hub = args, q.STATE_DIR, Hub(args.url)
        self.wakeup, self.waker = wakeup_pipe()
        self.stops, self.is_idle = 0, False
        # When what still runs is to be ended, after a signal; and whether anything runs.
        self.stop_at: float | None = None
        self.is_busy = False
        # Whether the local database may have changed since we looked.
        self.changed = True
        self.trouble, self.failures, self.retry_at = "", 0, 0.0
        self.said: set[str] = set()

    def set(self) -> None:
        """Wake the loop; this makes us a listener of the watch."""
        try:
            os.write(self.waker, b"\0")
        # The pipe is full: the last signal has not been read yet.
        except BlockingIOError:
            pass

    def watch(self) -> None:
        """Be woken by commits to the local database."""
        watch = q.Watch.of(self.state)
        watch.on_deaf = say
        watch.listeners.add(self)

    def run(self) -> int:
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # A process that was started by nohup ignores SIGHUP, and goes on doing so.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.stop)
        try:
            self.begin(q.connect(self.state))
            while not self.may_leave():
                self.attempt()
                if self.trouble and self.args.drain and not self.is_busy:
                    return 1
                self.sleep()
        finally:
            self.end()
        return 0

    def stop(self, *_) -> None:
        self.stops += 1

    def attempt(self) -> None:
        """Do what is to be done now. Trouble is said once, and tried again at growing intervals."""
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
            if not self.trouble:
                why = cli.remedies_as_typed(str(error))
                say(f"{why}; tasks wait where they are, and it is tried again until that is mended")
            self.trouble, self.is_idle = str(error), False
            first, last = RETRY_SECONDS
            self.retry_at = time.monotonic() + min(last, first * 2.0**self.failures)
            self.failures = min(self.failures + 1, 10)

    def sleep(self) -> None:
        """Wait for an event, or for the next thing that is due."""
        now = time.monotonic()
        try:
            until = self.retry_at if self.trouble else self.due_at(now)
        # attempt() meets it as well, and says so.
        except q.QueueError:
            until = now + TICK_SECONDS
        if self.stop_at is not None:
            until = min(until, self.stop_at)
        if self.args.drain and self.is_idle or self.stops and self.may_leave():
            return
        poll = select.poll()
        for fd in self.files():
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(max(0.0, until - now) * 1000))
        if self.wakeup in ready:
            os.read(self.wakeup, 65536)
            self.changed = True

    def files(self) -> list[int]:
        """What wakes the loop. The hub does not while it is not listened to."""
        listens = self.hub.conn is not None and not self.trouble
        return [self.wakeup, *([self.hub.conn.fileno()] if listens else [])]

    def complain(self, about: str) -> None:
        """Say what is in the way of something that others need not wait for; each thing once."""
        if about not in self.said:
            self.said.add(about)
            say(cli.remedies_as_typed(about))

    # What each of the three does for itself.

    def begin(self, conn: q.Connection) -> None:
        """Before the first step, whether there is a hub or not."""

    def connected(self) -> None:
        """With each new connection to the hub."""

    def step(self, conn: q.Connection) -> None:
        """Do all that can be done now, and set is_idle."""
        raise NotImplementedError

    def due_at(self, now: float) -> float:
        """When to step again if nothing wakes us."""
        return now + TICK_SECONDS

    def may_leave(self) -> bool:
        return bool(self.stops) or self.args.drain and self.is_idle

    def end(self) -> None:
        """Before the process ends."""
        self.hub.close()


class Push(Relay):
    """Hands the tasks of local queues over.

    A task is first made the hub's, in the local database, then sent, then marked as sent. Killed
    anywhere, the next push sends again what is not marked, and the hub knows what it has.
    """

    is_new_hub = True

    def begin(self, conn: q.Connection) -> None:
        self.machine = machine_id(conn)
        for queue in self.args.queues:
            if q.ensure_queue(conn, queue):
                say(f"{queue} is a new queue")
            path = q.make_private(self.state / "workers") / f"relay.{queue}"
            # Two of them would mix up the order within a group.
            fd = q.lock_file(path, patience=q.PROBE_SECONDS)
            if fd is None:
                raise cli.Refused(
                    f"another {cli.as_typed('relay.py push')} serves {queue}: one is enough"
                )
            self.locks = [*getattr(self, "locks", []), fd]
        self.job_manager = make_job_manager()
        self.watch()
        say(f"push hands over {', '.join(self.args.queues)} as machine {self.machine}")

    def step(self, conn: q.Connection) -> None:
        self.hub.told()
        if self.changed:
            self.changed = False
            self.take_in_spool()
        if self.is_new_hub:
            self.take_over(conn)
        busy = True
        while busy and not self.stops:
            busy = False
            for queue in self.args.queues:
                busy = self.push(conn, queue) > 0 or busy
        self.is_idle = True

    def connected(self) -> None:
        """The hub may be another one than that for which tasks were taken."""
        self.is_new_hub = True

    def take_over(self, conn: q.Connection) -> None:
        with q.transaction(conn):
            for queue in self.args.queues:
                q.execute(conn, TAKE_OVER, queue, prefix=self.hub.prefix)
        self.is_new_hub = False

    def take_in_spool(self) -> None:
        for complaint in q.take_in_spool(self.state)[1]:
            self.complain(f"spool: {complaint}")

    def push(self, conn: q.Connection, queue: str) -> int:
        """Take what is ready, and send what is taken; how many were seen to."""
        if not q.execute(conn, IS_UNSENT, queue).fetchone()[0]:
            if not q.execute(conn, CAN_TAKE, queue, now=time.time()).fetchone()[0]:
                return 0
            self.take(conn, queue)
        tasks = list(self.unsent(conn, queue))
        if not tasks:
            return 0
        handled = len(tasks)
        try:
            self.send(queue, tasks)
        except HubRefused:
            tasks = self.send_one_by_one(conn, queue, tasks)
        now = time.time()
        with q.transaction(conn, durable=False):
            rows = [{"id": task.id, "owner": task.owner, "now": now} for task, *_ in tasks]
            conn.executemany(q.on_queue(SENT, queue), rows)
        say(f"{queue}: {cli.plural(len(tasks), 'task')} handed over")
        return handled

    def take(self, conn: q.Connection, queue: str) -> None:
        """Make tasks the hub's: durably, since what was sent must never run here as well."""
        now = time.time()
        with q.transaction(conn):
            q.expire(conn, queue, now)
            q.promote(conn, queue, now)
            prefix = self.hub.prefix
            taken = q.execute(conn, TAKE_SCHEDULED, queue, prefix=prefix, limit=BATCH // 2).rowcount
            left = BATCH - taken
            # What is taken makes the next one of its group ready.
            while left > 0:
                taken = q.execute(conn, TAKE, queue, prefix=prefix, limit=left).rowcount
                left = left - taken if taken else 0

    def unsent(self, conn: q.Connection, queue: str) -> Iterator[tuple]:
        """(task, its group, when it is due, when it expires) of those to be sent next."""
        room = BATCH_BYTES
        with owners.errors_explained(conn):
            for row in conn.execute(q.on_queue(UNSENT, queue)).fetchmany(BATCH):
                room -= len(row[3])
                if room < 0 and room + len(row[3]) < BATCH_BYTES:
                    return
                yield q.Task.from_row(queue, row[:-3]), *row[-3:]

    def send(self, queue: str, tasks: list[tuple]) -> None:
        """Have the hub know these tasks: one transaction writes their ids down and defers their
        jobs.

        Times are sent as so many seconds from now, since clocks differ.
        """
        with self.hub.transaction() as conn:
            known = {id for (id,) in conn.execute(KNOWN, ([task.owner for task, *_ in tasks],))}
            new = [told for told in tasks if told[0].owner not in known]
            if not new:
                return
            (now,) = conn.execute("select clock_timestamp()").fetchone()
            jobs = [make_job(queue, *told[:3], now) for told in new]
            jobs = self.job_manager.batch_defer_jobs(jobs, connection=conn)
            here = time.time()
            rows = [
                (
                    task.owner,
                    self.machine,
                    queue,
                    task.id,
                    clean(task.text),
                    job.id,
                    None if expires is None else expires - here,
                )
                for (task, _, _, expires), job in zip(new, jobs, strict=True)
            ]
            with conn.cursor() as cursor:
                cursor.executemany(ARRIVE, rows)

    def send_one_by_one(self, conn: q.Connection, queue: str, tasks: list[tuple]) -> list[tuple]:
        """Bury those that the hub cannot store: the others, which are returned, need not wait for
        them.
        """
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


def make_job_manager() -> Any:
    """Procrastinate's, for a connection of ours."""
    from procrastinate import SyncPsycopgConnector, manager

    return manager.JobManager(SyncPsycopgConnector())


def make_job(queue: str, task: q.Task, group: str | None, due_at: float | None, now: Any) -> Any:
    """The job of a task. The payload is not in it: jsonb would not keep it as it is, and is slow to
    send.
    """
    from datetime import timedelta

    from procrastinate import jobs

    told = {
        "id": task.owner,
        "task_id": clean(task.task_id),
        "task_type": clean(task.task_type),
        "enqueued_at": task.enqueued_at,
    }
    delay = 0.0 if due_at is None else due_at - time.time()
    return jobs.Job(
        queue=queue,
        task_name=(clean(task.task_type) or queue)[:128],
        priority=task.priority,
        lock=None if group is None else clean(f"{queue}/{group}"),
        queueing_lock=None,
        task_kwargs={"relay": told},
        scheduled_at=now + timedelta(seconds=delay) if delay > 0 else None,
    )


class Pull(Relay):
    """Brings home how this machine's tasks ended."""

    seldom_at = lost_at = 0.0

    def begin(self, conn: q.Connection) -> None:
        self.machine = machine_id(conn)
        self.hub.listens = (f"relay_{self.machine}",)
        q.ensure_queue(conn, q.TASK_QUEUE_COMPLETION)
        # Somebody may cancel what was handed over.
        self.watch()
        say(f"pull brings home the results of machine {self.machine}")

    def step(self, conn: q.Connection) -> None:
        self.hub.told()
        if self.changed:
            self.changed = False
            self.cancel(conn)
        if time.monotonic() >= self.seldom_at:
            with self.hub.transaction() as hub:
                hub.execute(ENDED_OTHERWISE, (self.machine,))
            self.seldom_at = time.monotonic() + SELDOM_SECONDS
        if time.monotonic() >= self.lost_at:
            self.end_lost(conn)
            self.lost_at = time.monotonic() + TIDY_SECONDS
        while not self.stops and self.pull(conn):
            pass
        self.is_idle = True

    def connected(self) -> None:
        self.lost_at = 0.0

    def end_lost(self, conn: q.Connection) -> None:
        """End the tasks that wait here for a word which the hub will not say: it has said it, or
        lost them. What another hub may have is left alone.
        """
        here = {}
        for queue in cli.queues_of(conn):
            rows = q.execute(conn, HANDED_OVER, queue).fetchall()
            here |= {id: (queue, row_id, is_unwanted) for id, row_id, is_unwanted in rows}
        if not here:
            return
        with self.hub.transaction() as hub:
            known = dict(hub.execute(KNOWN_AND_HOME, (list(here),)).fetchall())
            knows_us = hub.execute(IS_KNOWN_HERE, (self.machine,)).fetchone()[0]
            home = [id for id, is_home in known.items() if is_home]
            endings = hub.execute(ENDINGS, (home,)).fetchall() if home else []
        lost = here.keys() - known.keys()
        if knows_us and self.hub.name:
            lost_here = {id for id in lost if id.startswith(self.hub.prefix)}
        else:
            lost_here = set()
        if lost - lost_here:
            queues = ", ".join(sorted({here[id][0] for id in lost - lost_here}))
            self.complain(
                f"this hub does not know tasks of {queues} that are handed over: another hub may"
                " have them. Check TASK_QUEUE_HUB, or give them up with tasks.py purge QUEUE"
                " --status handed_over"
            )
        endings += [lost_ending(id, *here[id]) for id in lost_here]
        for at in range(0, len(endings), BATCH):
            with q.transaction(conn):
                reports = [self.bring_home(conn, *told) for told in endings[at : at + BATCH]]
            q.wake(self.state)
            for line in sum(reports, []):
                say(line)

    def cancel(self, conn: q.Connection) -> None:
        """Have those jobs ended on the hub whose tasks tasks.py cancel was told to end."""
        ids = []
        for queue in cli.queues_of(conn):
            ids += [owner for (owner,) in q.execute(conn, UNWANTED, queue)]
        if ids:
            with self.hub.transaction() as hub:
                for (job_id,) in hub.execute(UNWANTED_JOBS, (ids,)).fetchall():
                    self.hub.run(hub, "cancel_job", job_id=job_id, abort=True, delete_job=False)
            self.seldom_at = 0.0

    def pull(self, conn: q.Connection) -> int:
        """End the tasks here whose ends the hub knows, then tell the hub; how many."""
        with self.hub.transaction() as hub:
            ids, room = [], BATCH_BYTES
            for id, size in hub.execute(ENDED, (self.machine,)).fetchall():
                room -= size
                if room < 0 and ids:
                    break
                ids.append(id)
            endings = hub.execute(ENDINGS, (ids,)).fetchall() if ids else []
        if not endings:
            return 0
        reports = []
        # Durable: the hub forgets what is told next.
        with q.transaction(conn):
            for ending in endings:
                reports += self.bring_home(conn, *ending)
        q.wake(self.state)
        with self.hub.transaction() as hub:
            hub.execute(HOME, (ids,))
        for report in reports:
            say(report)
        return len(endings)

    def bring_home(
        self,
        conn,
        id,
        queue,
        row_id,
        outcome,
        attempts,
        age,
        exit_code,
        result,
        log,
        error,
        reply,
        size,
    ) -> list[str]:
        """End one task, within a transaction; nothing happens where that was done before."""
        if queue not in {name for (name,) in conn.execute(q.QUEUES)}:
            return []
        started_at = None if age is None else time.time() - age
        told = {"id": row_id, "owner": id, "attempts": attempts, "started_at": started_at}
        row = q.execute(conn, COME_HOME, queue, **told).fetchone()
        if row is None:
            return []
        task = q.Task.from_row(queue, row)
        how = {"exit_code": exit_code, "result": result, "log": log}
        verdict = partial(
            self.finish, task=task, outcome=outcome, error=error, how=how, reply=reply, size=size
        )
        outcome, error = owners.verdict_alone(conn, task, verdict)
        line = f"{queue} {task.task_type} {task.task_id} {outcome} attempt {task.attempts}"
        return [f"{line}: {error}" if error else line]

    def finish(self, conn, *, task, outcome, error, how, reply, size) -> tuple:
        """Record how a task ended; a result becomes the next queue's task, as with worker.py
        --then.
        """
        if reply is not None and outcome == "completed":
            try:
                q.insert(conn, q.TASK_QUEUE_COMPLETION, outcomes.next_row(task, reply, size))
            except (q.InvalidTask, RecursionError) as refused:
                outcome, error = "failed", f"done, but what should follow was refused: {refused}"
        return outcome if q.finish(conn, task, outcome, error=error, **how) else None, error


def lost_ending(id: str, queue: str, row_id: int, is_unwanted: int) -> tuple:
    """The end of a task that its hub has no more, as a row of ENDINGS."""
    outcome = "cancelled" if is_unwanted else "failed"
    why = "the hub does not know it any more"
    return id, queue, row_id, outcome, 0, None, None, None, None, why, None, None


class Job(q.Task):
    """A job of the hub as a task of this machine; its row id is the job's."""

    __slots__ = ()

    @property
    def run_name(self) -> str:
        """Apart from the tasks of a local queue of the same name, whose row ids are others."""
        return f"relay.{super().run_name}"


class Work(Relay):
    """Runs the hub's jobs by handlers, under the contract of worker.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        how = dict(command=args.command, timeout=args.timeout, kill_after=args.kill_after)
        # A process of its own: before there are connections and threads.
        self.handlers = Handlers(self.state, args.env, args.handlers, **how)
        self.runs = self.handlers.runs
        self.hub.listens = tuple(f"procrastinate_queue_v1#{queue}" for queue in args.queues)
        self.worker_id: int | None = None
        # What has ended and is not yet recorded: (task, verdict, how it ended).
        self.done: list[tuple[q.Task, outcomes.Verdict, dict, float]] = []
        # Whether the hub has nothing for us, as far as we know; and whether we hold a queue back.
        self.looked, self.next_due, self.holds_back = False, 0.0, False
        self.beat_at = self.sweep_at = self.adopt_at = self.tidy_at = 0.0

    def begin(self, conn: q.Connection) -> None:
        signal.signal(signal.SIGCHLD, self.handlers.children_changed)
        q.make_private(self.state / "logs")
        self.owner = q.owner_name(self.state)
        # A pause may end, and the tasks of this machine's dead workers are taken back.
        self.watch()
        say(f"work {self.owner} serves {', '.join(self.args.queues)}")

    def stop(self, *_) -> None:
        self.stops += 1
        self.stop_at = time.monotonic() + self.args.grace if self.stops == 1 else 0.0

    def connected(self) -> None:
        """Let others who lost the hub, too, show that they live before their jobs are taken for
        abandoned.
        """
        self.beat_at = self.adopt_at = 0.0
        self.sweep_at = time.monotonic() + self.args.stalled_after
        self.looked = False

    def files(self) -> list[int]:
        return [*super().files(), self.handlers.supervisor.socket.fileno()]

    def attempt(self) -> None:
        """Hear what ended even while the hub cannot be used."""
        self.reap()
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            self.stop_at = None
            self.handlers.end_all(q.STOPPED, now=self.stops > 1)
        super().attempt()
        self.is_busy = bool(self.runs or self.done)

    def reap(self) -> None:
        try:
            ended = self.handlers.hear()
        except EOFError:
            self.handlers.start_afresh()
        for task, told in ended:
            if isinstance(told, Unstarted):
                self.done.append((task, outcomes.Verdict(*told), {}, 0.0))
            else:
                how = {"exit_code": told["code"], **outcomes.output_of(self.state, task)}
                verdict = outcomes.judge(told["code"], how, why=told["why"])
                self.done.append((task, verdict, how, told["seconds"]))

    def step(self, conn: q.Connection) -> None:
        for told in self.hub.told():
            self.looked = False
            if "abort_job_requested" in told:
                self.beat_at = 0.0
        now = time.monotonic()
        if now >= self.beat_at:
            self.beat()
        self.record(conn)
        if now >= self.adopt_at:
            orphans = self.adopt()
            self.adopt_at = now + (ORPHAN_SECONDS if orphans else TICK_SECONDS)
        if now >= self.sweep_at:
            self.sweep_at = now + self.args.stalled_after / 2
            self.sweep()
        self.fetch(conn)
        self.record(conn)
        self.is_idle = not self.runs and not self.done and self.looked

    def due_at(self, now: float) -> float:
        until = [now + TICK_SECONDS, self.beat_at, self.sweep_at, self.adopt_at]
        if not self.stops and self.free():
            until.append(self.next_due)
        if self.done and not self.trouble:
            until.append(now)
        return min(until)

    def may_leave(self) -> bool:
        if self.runs or self.done:
            # What cannot be recorded is on record here: the next one sees to it.
            return bool(self.stops) and not self.runs and bool(self.trouble)
        return super().may_leave()

    def end(self) -> None:
        self.handlers.leave()
        if (
            self.hub.conn is not None
            and self.worker_id is not None
            and not self.runs
            and not self.done
        ):
            try:
                with self.hub.transaction() as hub:
                    self.hub.run(hub, "unregister_worker", worker_id=self.worker_id)
                (self.run_directory / "hub").unlink(missing_ok=True)
                os.rmdir(self.run_directory)
            except (q.QueueError, OSError):
                pass
        q.resign(self.state)
        super().end()

    # ---------------------------------------------------------------------------------- signs of life

    @property
    def run_directory(self) -> Path:
        return Path(runs.run_directory(self.state, self.owner))

    def beat(self) -> None:
        """Show that we live, and end runs that are ours no more, or that somebody wants ended."""
        self.handlers.supervisor.ask()
        self.beat_at = time.monotonic() + min(10.0, self.args.stalled_after / 4)
        with self.hub.transaction() as hub:
            if self.worker_id is None or not hub.execute(BEAT, (self.worker_id,)).fetchone():
                (self.worker_id,) = self.hub.run(hub, "register_worker") or (None,)
                self.write_down_who()
            held = {row[0]: row[-1] for row in hub.execute(HELD, (self.worker_id,)).fetchall()}
        for run, task in self.runs.items():
            if task.id not in held:
                self.handlers.supervisor.end(run, "its job was given to another machine", now=True)
            elif held[task.id]:
                self.handlers.supervisor.end(run, q.CANCELLED)

    def write_down_who(self) -> None:
        """Who we are on the hub: whoever finds this process dead needs that to see to its jobs."""
        q.make_private(self.run_directory.parent)
        q.make_private(self.run_directory)
        (self.run_directory / "hub").write_text(str(self.worker_id))

    # ------------------------------------------------------------------------------------- fetching

    def free(self) -> int:
        return self.args.concurrency - len(self.runs)

    def fetch(self, conn: q.Connection) -> None:
        """Take jobs for the free places, and start their handlers."""
        if time.monotonic() >= self.next_due or self.changed and self.holds_back:
            self.looked = False
        self.changed = False
        # Signs of life come first, however much there is to do.
        while (
            not self.stops
            and self.free() > 0
            and not self.looked
            and time.monotonic() < self.beat_at
        ):
            queues = self.open_queues(conn)
            task, unstarted = self.fetch_one(queues) if queues else (None, None)
            if task is None:
                self.looked = True
                with self.hub.transaction() as hub:
                    (due,) = hub.execute(NEXT_DUE, (self.args.queues,)).fetchone()
                wait = TICK_SECONDS if due is None else max(due, 0.0)
                self.next_due = time.monotonic() + min(TICK_SECONDS, wait)
                return
            unstarted = unstarted or self.handlers.start(task)
            if unstarted:
                self.done.append((task, outcomes.Verdict(*unstarted), {}, 0.0))
                self.record(conn)

    def open_queues(self, conn: q.Connection) -> list[str]:
        """The queues that nothing on this machine holds back: neither a pause nor a number of
        slots.
        """
        controls, queues = outcomes.controls(conn), []
        for queue in self.args.queues:
            control = controls.get(queue)
            running = sum(task.queue == queue for task in self.runs.values())
            if (
                control is None
                or not control.paused
                and (control.slots is None or running < control.slots)
            ):
                queues.append(queue)
        self.holds_back = len(queues) < len(self.args.queues)
        return queues

    def fetch_one(self, queues: list[str]) -> tuple[q.Task | None, Unstarted | None]:
        """(the next job as a task, why it is not to be started)."""
        with self.hub.transaction() as hub:
            # Losing a claim means that the job is fetched again.
            hub.execute("set local synchronous_commit = off")
            row = self.hub.run(hub, "fetch_job", queues=queues, worker_id=self.worker_id)
            if row is None or row[0] is None:
                return None, None
            text, expired = hub.execute(BEGUN, (row[0],)).fetchone() or (None, False)
        task = self.task_of(text, *row)
        if expired:
            return task, Unstarted("expire", "it was not started before its time was over")
        if text is None and task.text == "":
            return task, Unstarted("bury", "its end is known where it came from: retry it there")
        return task, None

    def task_of(
        self,
        text,
        id,
        status,
        name,
        priority,
        lock,
        queueing_lock,
        args,
        due,
        queue,
        attempts,
        worker,
    ) -> q.Task:
        """A job as a task. The arguments of one that relay.py did not push are its payload."""
        task_id, task_type, enqueued_at = f"{queue}-{id}", name, time.time()
        relay = args.get("relay") if isinstance(args, dict) else None
        if isinstance(relay, dict):
            task_id, task_type = str(relay.get("task_id")), str(relay.get("task_type"))
            enqueued_at, text = relay.get("enqueued_at"), text or ""
        else:
            text = json.dumps(args)
        terms = (self.args.max_attempts, self.args.backoff, None, 0, 0)
        return Job(
            queue,
            id,
            task_id,
            task_type,
            text,
            enqueued_at,
            priority,
            attempts + 1,
            *terms,
            self.owner,
            time.time(),
        )

    # ------------------------------------------------------------------------------------ recording

    def record(self, conn: q.Connection | None) -> None:
        """Record how runs ended: each in a transaction that ends the job and writes its machine
        what to know.
        """
        while self.done:
            task, verdict, how, took = self.done[0]
            try:
                outcome, verdict = self.settle(task, verdict, how, self.worker_id)
            except HubRefused as error:
                error = f"its end could not be recorded: {error}"
                outcome, verdict = self.settle(
                    task, outcomes.Verdict("bury", error), {}, self.worker_id
                )
            self.done.pop(0)
            runs.tidy_run(self.state, task)
            self.looked = False
            if verdict.pause and conn is not None:
                self.pause(conn, task.queue, *verdict.pause)
            self.report(task, outcome, verdict.error, took)

    def pause(
        self, conn: q.Connection, queue: str, seconds: float | None, reason: str | None
    ) -> None:
        """Hold the queue back on this machine, as worker.py does; tasks.py resume ends that."""
        with q.transaction(conn):
            until = None if seconds is None else time.time() + seconds
            outcomes.pause(conn, queue, until, reason, by="handler")

    def report(self, task: q.Task, outcome: str | None, error: str | None, took: float) -> None:
        line = f"{task.queue} {task.task_type} {task.task_id} {outcome or 'lost'} attempt {task.attempts} {took:.2f} s"
        if outcome is None:
            error = "its job was given to another machine, or changed on the hub"
        if outcome == "put back":
            return self.complain(f"{task.queue} {task.task_type} put back: {error}")
        say(f"{line}: {error}" if error else line)

    def settle(
        self, task, verdict: outcomes.Verdict, how: dict, worker_id
    ) -> tuple[str | None, outcomes.Verdict]:
        """End or retry a job that this worker holds: (outcome, verdict); None when it holds it no
        more.
        """
        with self.hub.transaction() as hub:
            row = hub.execute(HOLD_JOB, (task.id, worker_id, task.attempts - 1)).fetchone()
            return self.carry_out(hub, task, verdict, how, *row) if row else (None, verdict)

    def carry_out(
        self, hub: Any, task: q.Task, verdict: outcomes.Verdict, how: dict, aborted: bool, now: Any
    ) -> tuple[str, outcomes.Verdict]:
        """End or retry a job that is locked: (outcome, the verdict that holds)."""
        most = task.max_attempts or q.MAX_ATTEMPTS
        if aborted and verdict.do in ("retry", "put back"):
            verdict = outcomes.Verdict("cancel", outcomes.in_words(q.CANCELLED))
        elif verdict.do == "retry" and task.attempts >= most:
            error = f"{verdict.error} (attempt {task.attempts} of {most})"
            verdict = outcomes.Verdict("bury", error)
        if verdict.do in ("retry", "put back"):
            return self.try_again(hub, task, verdict, now), verdict
        return self.end_job(hub, task, verdict, how), verdict

    def try_again(self, hub: Any, task: q.Task, verdict: outcomes.Verdict, now: Any) -> str:
        from datetime import timedelta

        delay = verdict.delay
        if delay is None:
            delay = q.backoff_delay(task) if verdict.do == "retry" else 0.0
        told = dict(
            retry_at=now + timedelta(seconds=delay),
            new_priority=None,
            new_queue_name=None,
            new_lock=None,
        )
        self.hub.run(hub, "retry_job", job_id=task.id, **told)
        if verdict.do == "put back":
            hub.execute(UNCOUNT, (task.id,))
        return "scheduled" if delay or verdict.do == "retry" else "put back"

    def end_job(self, hub: Any, task: q.Task, verdict: outcomes.Verdict, how: dict) -> str:
        outcome, status = OUTCOMES[verdict.do]
        self.hub.run(hub, "finish_job", job_id=task.id, status=status, delete_job=False)
        told = {**q.ENDING, **how, "reply": None, "reply_bytes": None}
        if self.args.reply and verdict.do == "complete":
            path = f"{self.state}/logs/{task.run_name}.out"
            told["reply"], told["reply_bytes"] = outcomes.read_output(path, outcomes.RESULT_BYTES)
        told = {
            name: clean(value) if isinstance(value, str) else value for name, value in told.items()
        }
        told |= {
            "error": clean(verdict.error),
            "outcome": outcome,
            "job_id": task.id,
            "attempts": task.attempts,
        }
        if verdict.do == "expire":
            told["attempts"] = 0
        hub.execute(END, told)
        return outcome

    # ---------------------------------------------------------------------------- others' jobs

    def sweep(self) -> None:
        """See to the jobs of machines that send no heartbeat. Procrastinate leaves those alone."""
        reports = []
        with self.hub.transaction() as hub:
            abandoned = (self.args.queues, self.args.stalled_after)
            for *job, aborted, worker_id, now in hub.execute(STALLED, abandoned).fetchall():
                task, error = (
                    self.job_as_task(*job),
                    f"its machine sent no heartbeat (worker {worker_id})",
                )
                verdict = outcomes.Verdict("retry", error, 0.0)
                reports.append((task, *self.carry_out(hub, task, verdict, {}, aborted, now)))
        for task, outcome, verdict in reports:
            self.report(task, outcome, verdict.error, 0.0)
            self.looked = False
        if time.monotonic() >= self.tidy_at:
            self.tidy_at = time.monotonic() + TIDY_SECONDS
            with self.hub.transaction() as hub:
                for statement in TIDY:
                    hub.execute(statement)
                long = max(3_600.0, 10 * self.args.stalled_after)
                self.hub.run(hub, "prune_stalled_workers", seconds_since_heartbeat=long)

    def job_as_task(
        self, id, queue, task_id, name, attempts, owner: str = "", micros: int = 0
    ) -> q.Task:
        """A job of which only this is known."""
        terms = (self.args.max_attempts, self.args.backoff, None, 0, 0)
        # Half of a microsecond more, so that run_name gets the same number.
        claimed_at = (micros + 0.5) / 1e6
        return Job(queue, id, task_id, name, "{}", 0.0, 0, attempts + 1, *terms, owner, claimed_at)

    def adopt(self) -> int:
        """See to the jobs of this machine's processes that died; how many of their handlers still
        run.
        """
        orphans = 0
        for noted in self.state.glob("runs/*/hub"):
            owner = noted.parent.name
            if owner == self.owner:
                continue
            with owners.dead(self.state, owner) as is_dead:
                left = self.adopt_from(noted) if is_dead else 0
                if is_dead and not left:
                    self.forget(noted.parent)
            orphans += left
        return orphans

    def adopt_from(self, noted: Path) -> int:
        """See to the jobs of one dead process; how many of its handlers still run."""
        try:
            worker_id = int(noted.read_text())
        except (OSError, ValueError):
            return 0
        with self.hub.transaction() as hub:
            held = hub.execute(HELD, (worker_id,)).fetchall()
        left = 0
        for *job, aborted in held:
            task, run, goes_on = self.find_run(noted.parent, *job, aborted=aborted)
            if goes_on:
                owners.end_orphan(runs.run_file(self.state, task), run, aborted)
                left += 1
                continue
            verdict, how = self.verdict_on(task, run)
            outcome, verdict = self.settle(task, verdict, how, worker_id)
            runs.tidy_run(self.state, task)
            self.report(task, outcome, verdict.error or "its handler ended without its worker", 0.0)
            self.looked = False
        if left:
            # The handlers live, so that their machine does.
            with self.hub.transaction() as hub:
                hub.execute(BEAT, (worker_id,))
        return left

    def find_run(self, directory: Path, *job, aborted: bool) -> tuple[q.Task, dict, bool]:
        """(the task of a dead process's job, what is on record about its run, whether that goes
        on).
        """
        task = self.job_as_task(*job, directory.name)
        whose = f"relay.{task.queue}.{task.id}-{task.attempts}-{directory.name}"
        for path in directory.glob(f"{whose}-*"):
            micros = path.name.rpartition("-")[2]
            if micros.isdecimal():
                task = self.job_as_task(*job, directory.name, int(micros))
                return task, *owners.look_at_run(self.state, task, aborted)
        return task, {}, False

    def verdict_on(self, task: q.Task, run: dict) -> tuple[outcomes.Verdict, dict]:
        """What the record of a run means whose worker died."""
        code, why = run.get("code"), run.get("why")
        if code is None and why is None:
            return outcomes.Verdict("retry", f"its worker died ({task.owner})", 0.0), {}
        # Nobody saw the end of one that has no code, but it was sent a signal.
        code = 128 + signal.SIGKILL if code is None else code
        how = {"exit_code": code, **outcomes.output_of(self.state, task)}
        return outcomes.judge(code, how, why=why, delay=0.0), how

    def forget(self, directory: Path) -> None:
        """Remove what a dead process leaves."""
        shutil.rmtree(directory, ignore_errors=True)
        (self.state / "workers" / directory.name).unlink(missing_ok=True)


# What is recorded of a verdict, and the job's status with it.
OUTCOMES = {
    "complete": ("completed", "succeeded"),
    "bury": ("failed", "failed"),
    "cancel": ("cancelled", "aborted"),
    "expire": ("expired", "aborted"),
}


# ------------------------------------------------------------------------------------ the commands


def init(args: argparse.Namespace) -> int:
    """Prepare the hub. Doing it again changes nothing."""
    from procrastinate.schema import SchemaManager

    hub = Hub(args.url)
    hub.open()
    with hub.transaction() as conn:
        conn.execute("select pg_advisory_xact_lock(hashtext('relay.py init'))")
        jobs, _, relays, _, name = conn.execute(CHECK).fetchone()
        if not jobs:
            conn.execute(SchemaManager.get_schema())
        if not relays:
            conn.execute(HUB_SCHEMA)
        if not name:
            conn.execute(NAME_HUB.format(name=os.urandom(4).hex()))
    hub.close()
    hub.connect()
    cli.report(args.json, {"ready": True, "made": not jobs}, "the hub is ready")
    return 0


def status(args: argparse.Namespace) -> int:
    """Both ends side by side."""
    conn, hub, trouble = q.connect(), Hub(args.url), None
    machine = machine_id(conn)
    here = {}
    for queue in cli.queues_of(conn):
        here[queue] = dict(q.execute(conn, LOCAL_COUNTS, queue).fetchall())
    there: dict[str, dict] = {}
    workers = []
    try:
        hub.connect()
        with hub.transaction() as pg:
            for queue, word, count in pg.execute(HUB_COUNTS):
                there.setdefault(queue, {})[HUB_WORDS[word]] = count
            for queue, open_tasks, results in pg.execute(HUB_OF_MACHINE, (machine,)):
                there.setdefault(queue, {}).update(from_here=open_tasks, results=results)
            workers = [
                {"id": id, "seen_seconds_ago": ago, "running": count}
                for id, ago, count in pg.execute(HUB_WORKERS)
            ]
    except q.QueueError as error:
        trouble = str(error)
    queues = {
        name: {"here": here.get(name, {}), "hub": there.get(name, {})}
        for name in sorted(here.keys() | there.keys())
        if here.get(name) or there.get(name)
    }
    told = {"machine": machine, "trouble": trouble, "queues": queues, "workers": workers}
    cli.report(args.json, told, "\n".join(in_words(told)))
    return 1 if trouble else 0


HUB_WORDS = {"todo": "waiting", "doing": "running", "failed": "failed"}


def in_words(told: dict) -> Iterator[str]:
    """What status says to a person."""
    yield f"machine {told['machine']}"
    rows = [
        (
            name,
            *(
                ", ".join(f"{count} {word}" for word, count in ends[end].items() if count) or "-"
                for end in ("here", "hub")
            ),
        )
        for name, ends in told["queues"].items()
    ]
    wide = [max(len(row[at]) for row in [("queue", "here", ""), *rows]) for at in (0, 1)]
    for name, here, there in [("queue", "here", "hub"), *rows]:
        yield f"{name:{wide[0]}}  {here:{wide[1]}}  {there if not told['trouble'] else '?'}".rstrip()
    for worker in told["workers"]:
        yield (
            f"worker {worker['id']}: {cli.plural(worker['running'], 'job')} running,"
            f" seen {cli.span(worker['seen_seconds_ago'])} ago"
        )
    if told["trouble"]:
        yield told["trouble"]


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("relay.py", __doc__)
    common = cli.Parser(add_help=False)
    common.add_argument(
        "--url",
        default=os.environ.get("TASK_QUEUE_HUB"),
        help="of the hub: postgresql://USER@HOST/DATABASE (default: $TASK_QUEUE_HUB)",
    )
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=what, description=what)

    push, pull = (
        add("push", "hand the tasks of local queues over"),
        add("pull", "bring results home"),
    )
    work = add("work", "run what was handed over; after --, the command that runs every task type")
    for one in (push, work):
        one.add_argument("queues", metavar="QUEUE", nargs="+")
    for one in (push, pull, work):
        one.add_argument(
            "--drain", action="store_true", help="end when there is nothing left to do"
        )
    add_run_options(work.add_argument, __file__)
    work.add_argument(
        "--reply",
        action="store_true",
        help="send what handlers print home, where it becomes tasks in completions",
    )
    work.add_argument(
        "--stalled-after",
        type=cli.duration,
        default=STALLED_SECONDS,
        metavar="DURATION",
        help="give another machine's jobs up after so long without a heartbeat"
        " (default %(default)g)",
    )
    for one in (add("init", "prepare the hub, once"), add("status", "both ends side by side")):
        one.add_argument("--json", action="store_true", help="for scripts")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    argv, command = list(sys.argv[1:] if argv is None else argv), None
    if "--" in argv:
        argv, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = make_parser()
    args = parser.parse_args(argv)
    if command is not None and args.verb != "work":
        parser.error("only work takes a command after --")
    if not args.url:
        parser.error("which hub? Give --url postgresql://USER@HOST/DATABASE, or set TASK_QUEUE_HUB")
    # What is refused is not shown: it may have a password in it.
    if not re.match(r"postgres(ql)?://|\w+ *=", args.url):
        parser.error("the hub's URL is not of the form postgresql://USER@HOST/DATABASE")
    try:
        args.queues = list(dict.fromkeys(map(q.check_queue_name, getattr(args, "queues", ()))))
        for queue in args.queues:
            if len(queue) > LONGEST_QUEUE:
                raise ValueError(
                    f"queue {queue!r}: on the hub, a name has at most {LONGEST_QUEUE} characters"
                )
        if args.verb == "work":
            check_run_options(args, command, without=["TASK_QUEUE_HUB"])
            if args.stalled_after < 1:
                raise ValueError("--stalled-after is at least 1 second")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    start_clean()
    args = parse(argv)
    verbs = {"init": init, "status": status}
    loops = {"push": Push, "pull": Pull, "work": Work}
    if args.verb in verbs:
        return cli.run("relay.py", lambda: verbs[args.verb](args))
    return cli.run("relay.py", lambda: loops[args.verb](args).run())


if __name__ == "__main__":
    raise SystemExit(main())
