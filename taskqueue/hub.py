"""The hub: a PostgreSQL database with Procrastinate's jobs, and beside them a ledger of handed-over tasks.

    relay_tasks       one row per handed-over task: whose it is, who runs it, how it ended
    relay_machines    when each machine was last heard

Procrastinate's own calls defer, fetch, finish, retry and cancel jobs; they run on our connection, so that
a job and its ledger row change in one transaction. Our own statements touch procrastinate_jobs in
three places, for which it has no call: HOLD_JOB locks a job while its end is recorded, ABANDONED locks
the jobs of silent machines, and LOCK_PRIORITIES gives the jobs of one lock one priority.
"""

from __future__ import annotations

import os
import re
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import queue_helpers as q
from taskqueue import cli

VERSION = "relay 2"
# Seconds that one answer of the hub may take, a connection or a lock included.
PATIENCE_SECONDS = 10
# SQLSTATE classes of values that PostgreSQL can never store: trying again does not help.
REFUSALS = ("22", "23", "54")
KEEP_JOB_DAYS, KEEP_ID_DAYS, KEEP_LOST_DAYS = 7, 30, 90
# PostgreSQL allows 63 bytes for a channel; Procrastinate's is procrastinate_queue_v1#QUEUE.
LONGEST_QUEUE = 40

# Each statement may run again: init brings an older hub up to date.
SCHEMA = f"""
create table if not exists relay_tasks (
  id          text primary key,       -- of the handing over; a task that is redriven gets another
  machine     text not null,          -- where it comes from; '' for a job that another program deferred
  queue       text not null,
  row_id      bigint not null,        -- of the task in its machine's queue
  task        text,                   -- what was enqueued; null once its machine knows the end
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
  reply       text,                   -- becomes a task in completions; null: nothing does
  reply_bytes bigint,                 -- larger than the reply where that was cut
  home_at     timestamptz             -- its machine knows
);
alter table relay_tasks
  add column if not exists max_attempts integer,                     -- null: the default
  add column if not exists tried integer not null default 0,         -- attempts of machines that lost it
  add column if not exists trying integer not null default 0,        -- attempts of its runner so far
  add column if not exists fetches integer not null default 0,       -- the fence: counts each fetch
  add column if not exists runner text;                              -- the machine that has it
create index if not exists relay_tasks_job on relay_tasks (job_id);
create index if not exists relay_tasks_ended on relay_tasks (machine, ended_at) where home_at is null;
create index if not exists relay_tasks_home on relay_tasks (home_at);
create index if not exists relay_tasks_runner on relay_tasks (runner) where ended_at is null;
create table if not exists relay_machines (
  machine   text,
  process   text,                     -- a machine is alive while one of its processes is
  heard_at  timestamptz not null default now(),
  primary key (machine, process)
);
create index if not exists relay_jobs_of_a_lock on procrastinate_jobs (lock, priority desc, id)
  where status in ('todo', 'doing');
comment on table relay_tasks is '{VERSION}'
"""
CHECK = """
select to_regclass('procrastinate_jobs') is not null,
  array(select proname::text from pg_proc where proname like 'procrastinate%'),
  to_regclass('relay_tasks') is not null, obj_description(to_regclass('relay_tasks'), 'pg_class'),
  coalesce(col_description(to_regclass('relay_tasks'), 1), '')"""
# A hub's name is random. Task ids begin with it, so that one hub never ends another's tasks.
NAME_HUB = "comment on column relay_tasks.id is '{name}'"
HEARD = """
insert into relay_machines (machine, process) values (%s, %s)
on conflict (machine, process) do update set heard_at = now()"""

# ---------------------------------------------------------------------------------- handing over

KNOWN = "select id from relay_tasks where id = any(%s)"
ARRIVE = """
insert into relay_tasks (id, machine, queue, row_id, task, job_id, max_attempts, expires_at)
values (%s, %s, %s, %s, %s, %s, %s, clock_timestamp() + make_interval(secs => %s::float))"""
LOCK_PRIORITIES = """
select lock, max(priority) from procrastinate_jobs where lock = any(%s) and status in ('todo', 'doing') group by lock"""

# ---------------------------------------------------------------------------------- fetching

TAKEN = """
update relay_tasks set runner = %s, fetches = fetches + 1, trying = 0,
  started_at = case when expires_at < now() then null else now() end
where job_id = %s and outcome is null
returning id, fetches, task, tried, max_attempts, extract(epoch from expires_at - now())::float"""
# Another program deferred this job: it has no home, and its ledger row exists for its run alone.
STRAY = """
insert into relay_tasks (id, machine, queue, row_id, job_id) values (%s, '', %s, 0, %s)"""
NEXT_DUE = """
select extract(epoch from min(scheduled_at) - clock_timestamp())::float from procrastinate_jobs
where status = 'todo' and queue_name = any(%s) and scheduled_at > now()"""
HELD = """
select r.id, r.fetches, j.id, j.queue_name, j.abort_requested
from relay_tasks r join procrastinate_jobs j on j.id = r.job_id
where r.runner = %s and r.ended_at is null and j.status = 'doing' and j.queue_name = any(%s)"""
CONTENT = """
select j.task_name, j.args, j.priority, r.task, r.tried, r.max_attempts,
  extract(epoch from r.expires_at - now())::float
from relay_tasks r join procrastinate_jobs j on j.id = r.job_id where r.id = %s"""
TRYING = "update relay_tasks set trying = %s where id = %s and runner = %s and fetches = %s and trying <> %s"
HOLD_JOB = """
select j.id from procrastinate_jobs j join relay_tasks r on r.job_id = j.id
where r.id = %s and r.runner = %s and r.fetches = %s and r.outcome is null and j.status = 'doing' for update"""
ABANDONED = """
select j.id, r.id, r.runner, r.tried + greatest(r.trying, 1), coalesce(r.max_attempts, %s), j.abort_requested, now()
from procrastinate_jobs j join relay_tasks r on r.job_id = j.id
where j.status = 'doing' and r.outcome is null and j.queue_name = any(%s) and not exists (
  select 1 from relay_machines m where m.machine = r.runner and m.heard_at > now() - make_interval(secs => %s))
limit 100 for update of j, r skip locked"""
GIVEN_UP = "update relay_tasks set runner = null, tried = %s, trying = 0 where id = %s"
END = """
with ended as (
  update relay_tasks set outcome = %(outcome)s, ended_at = now(), attempts = tried + %(attempts)s,
    exit_code = %(exit_code)s, result = %(result)s, log = %(log)s, error = %(error)s,
    reply = %(reply)s, reply_bytes = %(reply_bytes)s, home_at = case when machine = '' then now() end
  where id = %(id)s and outcome is null returning machine)
select pg_notify('relay_' || machine, '') from ended"""
TIDY = (
    "delete from procrastinate_jobs j using relay_tasks r where r.job_id = j.id and j.status not in ('todo', 'doing')"
    f" and (r.home_at < now() - interval '{KEEP_JOB_DAYS} days' or r.ended_at < now() - interval '{KEEP_LOST_DAYS} days')",
    f"delete from relay_tasks where home_at < now() - interval '{KEEP_ID_DAYS} days'"
    f" or ended_at < now() - interval '{KEEP_LOST_DAYS} days'",
    f"delete from relay_machines where heard_at < now() - interval '{KEEP_LOST_DAYS} days'"
    " or exists (select 1 from relay_machines later where later.machine = relay_machines.machine"
    "  and later.heard_at > relay_machines.heard_at + interval '1 hour')",
)

# ---------------------------------------------------------------------------------- coming home

ENDED = """
select id, coalesce(octet_length(reply), 0) + coalesce(octet_length(result), 0) + coalesce(octet_length(log), 0)
from relay_tasks where machine = %s and home_at is null and ended_at is not null order by ended_at limit 200"""
# Somebody cancelled or deleted these jobs, or ran them by other means than relay.py.
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
IS_KNOWN_HERE = "select exists (select 1 from relay_tasks where machine = %s)"
KNOWN_AND_HOME = "select id, home_at is not null from relay_tasks where id = any(%s)"
UNWANTED_JOBS = "select job_id from relay_tasks where id = any(%s) and ended_at is null"
HOME = """
update relay_tasks set home_at = now(), task = null, result = null, log = null, reply = null where id = any(%s)"""

# ---------------------------------------------------------------------------------- looking and mending

COUNTS = """
select queue_name, status::text, count(*) from procrastinate_jobs where status in ('todo', 'doing', 'failed')
group by 1, 2"""
OF_MACHINE = """
select queue, count(*) filter (where ended_at is null), count(*) filter (where ended_at is not null)
from relay_tasks where machine = %s and home_at is null group by 1"""
MACHINES = """
with heard as (select machine, max(heard_at) as at from relay_machines group by 1),
  pushed as (select machine, count(*) filter (where ended_at is null) as waiting,
    count(*) filter (where ended_at is not null) as results from relay_tasks where home_at is null and machine <> '' group by 1),
  running as (select runner as machine, count(*) as jobs from relay_tasks where ended_at is null and runner is not null group by 1)
select machine, extract(epoch from now() - heard.at)::float, coalesce(waiting, 0), coalesce(results, 0), coalesce(jobs, 0)
from heard full join pushed using (machine) full join running using (machine) order by 1"""
OPEN_JOBS_OF = "select job_id from relay_tasks where machine = %s and ended_at is null"
RUN_BY = """
select j.id, r.id, r.tried + greatest(r.trying, 1) from relay_tasks r join procrastinate_jobs j on j.id = r.job_id
where r.runner = %s and r.ended_at is null and j.status = 'doing' for update"""
FORGET = (
    "delete from relay_tasks where machine = %s",
    "delete from relay_machines where machine = %s",
)
TO_ADOPT = """
select id, queue, task, coalesce(attempts, 0) from relay_tasks where machine = %s and home_at is null order by pushed_at"""
ADOPT = "update relay_tasks set machine = %s, row_id = %s where id = %s and machine = %s"


class HubTrouble(q.QueueError):
    """The hub cannot be used now; the message says why."""


class Stopped(BaseException):
    """A signal ended a wait for the hub, or came before it."""


class HubRefused(q.QueueError):
    """The hub cannot store this, whenever it is asked."""


class WrongUrl(cli.Refused):
    """libpq does not read this URL as it was meant. The message repeats nothing of it."""

    exit_code = cli.EX_USAGE


def password_of(url: str) -> str:
    """Return the password in a connection URL or string, "" without one. Raises WrongUrl."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    # In a password that is not encoded, libpq takes "/" or "@" for the end of the host.
    is_plain = "//" not in url or "@" not in url or re.match("[a-z]+://[^/?@]*@[^@]*$", url)
    with suppress(psycopg.ProgrammingError):
        if is_plain:
            return str(conninfo_to_dict(url).get("password", ""))
    raise WrongUrl(
        "the hub's URL cannot be read: encode the special characters of its password, such as"
        " % as %25, / as %2F, @ as %40 and a space as %20"
    )


class Hub:
    """A connection to the hub, opened when it is wanted and again after trouble.

    `listens` names the channels to listen on. Every wait is bounded by PATIENCE_SECONDS, and stop()
    ends it at once.
    """

    def __init__(self, url: str) -> None:
        self.url, self.password = url, password_of(url)
        self.conn: Any = None
        self.name = ""
        self.listens: tuple[str, ...] = ()
        self.is_waiting = self.is_stopped = False

    @property
    def prefix(self) -> str:
        """The beginning of the ids of all tasks handed over to this hub."""
        return f"hub-{self.name}-"

    def stop(self) -> None:
        """End the present wait and all later ones, with Stopped: for signal handlers."""
        self.is_stopped = True
        if self.is_waiting:
            raise Stopped

    def connect(self) -> bool:
        """Connect to a prepared hub unless connected; return whether this is a new connection.

        Raises HubTrouble.
        """
        if self.conn is not None:
            return False
        self.open()
        try:
            with self.transaction() as conn:
                self._check(conn)
                for channel in self.listens:
                    conn.execute(f'listen "{channel}"')
        except HubTrouble:
            self.close()
            raise
        return True

    def _check(self, conn: Any) -> None:
        from procrastinate import sql

        jobs, functions, ledger, version, self.name = conn.execute(CHECK).fetchone()
        if not jobs or not ledger or not self.name:
            raise HubTrouble("the hub has no schema yet: run relay.py init")
        wanted = set(re.findall(r"procrastinate_\w+_v\d+(?=\()", " ".join(sql.queries.values())))
        if missing := ", ".join(sorted(wanted - set(functions))):
            raise HubTrouble(
                f"the hub's Procrastinate schema is older than these scripts ({missing} missing):"
                " apply the migrations of https://procrastinate.readthedocs.io"
            )
        if version != VERSION:
            raise HubTrouble(
                f"the hub's ledger is of version {version!r}, these scripts know {VERSION!r}: use the"
                " same version on all machines, then run relay.py init once more"
            )

    def open(self) -> None:
        import psycopg

        timeouts = f"-c statement_timeout={PATIENCE_SECONDS}s -c lock_timeout={PATIENCE_SECONDS}s"
        with self._trouble():
            self.conn = psycopg.connect(
                self.url,
                autocommit=True,
                application_name="relay.py",
                connect_timeout=PATIENCE_SECONDS,
                options=timeouts,
                tcp_user_timeout=1000 * PATIENCE_SECONDS,
                keepalives_idle=PATIENCE_SECONDS,
                keepalives_interval=5,
                keepalives_count=2,
            )
            self.jobs = job_manager(self.conn)

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """Run a transaction. Raises HubTrouble, HubRefused; whatever is raised closes the connection."""
        self.connect()
        with self._trouble():
            self.conn.execute("begin")
            yield self.conn
            self.conn.execute("commit")

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """Raise psycopg's and Procrastinate's errors as ours."""
        import psycopg
        from procrastinate import exceptions

        outermost, self.is_waiting = not self.is_waiting, True
        try:
            if self.is_stopped:
                raise Stopped
            yield
        except (psycopg.Error, exceptions.ConnectorException) as error:
            self.close()
            cause = error if isinstance(error, psycopg.Error) else error.__cause__ or error
            state = getattr(cause, "sqlstate", None) or ""
            words = self._without_password(" ".join(str(cause).split()))
            is_unique = state == "23505" or isinstance(error, exceptions.UniqueViolation)
            if state.startswith(REFUSALS) and not is_unique:
                raise HubRefused(f"the hub refuses it: {words}") from None
            raise HubTrouble(f"the hub cannot be used: {words}") from None
        except BaseException:
            # A rollback would wait for a server that may not answer; closing does not.
            self.close()
            raise
        finally:
            self.is_waiting = not outermost

    def _without_password(self, text: str) -> str:
        return text.replace(self.password, "***") if self.password else text

    def told(self) -> list[str]:
        """Return the payloads of the notifications since the last call. Raises HubTrouble."""
        if self.conn is None:
            return []
        with self._trouble():
            return [told.payload for told in self.conn.notifies(timeout=0)]

    def close(self) -> None:
        conn, self.conn = self.conn, None
        if conn is not None:
            conn.close()

    def prepare(self) -> bool:
        """Make or update the hub's schema; return whether Procrastinate's was made. Safe to call twice."""
        from procrastinate.schema import SchemaManager

        self.open()
        with self._trouble():
            self.conn.execute("begin")
            self.conn.execute("select pg_advisory_xact_lock(hashtext('relay.py init'))")
            jobs, *_, name = self.conn.execute(CHECK).fetchone()
            if not jobs:
                self.conn.execute(SchemaManager.get_schema())
            self.conn.execute(SCHEMA)
            if not name:
                self.conn.execute(NAME_HUB.format(name=os.urandom(4).hex()))
            self.conn.execute("commit")
        self.close()
        self.connect()
        return not jobs

    def give_up_job(self, job_id: int, id: str, tried: int, at: Any = None) -> None:
        """Put a job back whose machine lost it, within a transaction."""
        self.conn.execute(GIVEN_UP, (tried, id))
        at = at or self.conn.execute("select now()").fetchone()[0]
        self.jobs.retry_job_by_id(job_id, retry_at=at)

    def end_job(self, job_id: int, id: str, outcome: str, **told: Any) -> None:
        """Record the end of a job and of its ledger row, within a transaction."""
        from procrastinate.jobs import Status

        statuses = {"completed": Status.SUCCEEDED, "failed": Status.FAILED}
        status = statuses.get(outcome, Status.ABORTED)
        at_once(self.jobs.finish_job_by_id_async(job_id, status=status, delete_job=False))
        empty = dict.fromkeys(("exit_code", "result", "log", "error", "reply", "reply_bytes"))
        values = {**empty, "attempts": 0, **told, "id": id, "outcome": outcome}
        self.conn.execute(END, {name: clean(value) for name, value in values.items()})


def job_manager(conn: Any) -> Any:
    """Return Procrastinate's JobManager on a connection of ours: its calls join our transactions."""
    from procrastinate import SyncPsycopgConnector
    from procrastinate.manager import JobManager

    class OnConnection(SyncPsycopgConnector):
        def execute_query(self, query, **values):
            self.execute_query_all_with_connection(conn, query, **values)

        def execute_query_one(self, query, **values):
            return self.execute_query_one_with_connection(conn, query, **values)

        def execute_query_all(self, query, **values):
            return self.execute_query_all_with_connection(conn, query, **values)

        async def execute_query_async(self, query, **values):
            self.execute_query(query, **values)

        async def execute_query_one_async(self, query, **values):
            return self.execute_query_one(query, **values)

        async def execute_query_all_async(self, query, **values):
            return self.execute_query_all(query, **values)

    return JobManager(OnConnection())


def at_once(call: Coroutine) -> Any:
    """Return the result of a coroutine that never waits: OnConnection's do not."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("the call wants to wait")


def clean(value: Any) -> Any:
    """Return a text as PostgreSQL can store it; anything else unchanged."""
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\ufffd").encode("utf-8", "backslashreplace").decode()


def make_job(
    queue: str, task: q.Task, *, priority: int, group: str | None, delay: float, now: Any
) -> Any:
    """Return the job of a task. The ledger keeps the payload: jsonb would change it."""
    from datetime import timedelta

    from procrastinate.jobs import Job

    told = {"id": task.owner, "task_id": clean(task.task_id), "enqueued_at": task.enqueued_at}
    return Job(
        queue=queue,
        task_name=(clean(task.task_type) or queue)[:128],
        priority=priority,
        lock=group,
        queueing_lock=None,
        task_kwargs={"relay": told},
        scheduled_at=now + timedelta(seconds=delay) if delay > 0 else None,
    )
