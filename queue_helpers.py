"""The task queue: one SQLite database, one table per queue, no server.

    enqueue            claim                 ack
    ───────> ready ───────────> claimed ────────────> history: completed
      delay    ^                   │ nack, crash or timeout, attempts left (back-off)
      └> scheduled <───────────────┤
                                   └ attempts spent, or a permanent failure ──> history: failed
                                                                     (redrive puts it back)

A task is a row; its `data` is the envelope {"task_id", "task_type", "enqueued_at", "data"}, and any other JSON
object is taken as a bare payload (bash inserts those). A claimed row names its owner, and an owner is a lock file
in STATE_DIR/workers that the kernel frees the instant its process dies: whoever gets that lock may take the dead
owner's tasks back. Every change that leaves `claimed` names the owner and the attempt it expects, so a late or
foreign ack changes nothing.

This module reads from top to bottom: constants, the schema, the statements, tasks and errors, connections, then the
verbs in the order of a task's life, then who is alive, then how sleepers are woken, then the queue classes.
Enqueuing needs the standard library alone; persist-queue, watchdog and asyncio are imported where they are used.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import threading
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from weakref import WeakSet

_installed = Path(__file__).resolve().parent.parent.parent  # install.py's PREFIX, where this file lies in one
_default = _installed / "state" if (_installed / "installed.json").exists() else "~/.claude/automation/lychee/state"
STATE_DIR = Path(os.environ.get("TASK_QUEUE_STATE") or _default).expanduser().absolute()
QUEUE_DB = STATE_DIR / "tasks.db"
QUEUE_PATH = STATE_DIR  # what QueueWatcher and watchdog are given

TASK_QUEUE_NOTIFICATION = "notifications"
TASK_QUEUE_APPROVAL = "approvals"
TASK_QUEUE_COMPLETION = "completions"
DEFAULT_QUEUES = (TASK_QUEUE_NOTIFICATION, TASK_QUEUE_APPROVAL, TASK_QUEUE_COMPLETION)

SCHEMA_VERSION = 1
BUSY_TIMEOUT_MS = 5_000  # how long one wait for the write lock may take
MAX_ATTEMPTS = 4
BACKOFF_SECONDS = 1.0  # before the second attempt; doubles with each one after it
BACKOFF_CAP_SECONDS = 3_600
RETRY_AFTER_CAP_SECONDS = 30 * 86_400  # what a handler that exits 75 may ask for
MAX_DEPTH = 16  # tasks enqueued by handlers of tasks enqueued by handlers …
MAX_QUEUES = 200  # the view is one compound SELECT, which SQLite limits to 500 terms
OUTPUT_BYTES = 65_536  # of a handler's stdout and stderr, each, kept in the history
RESULT_BYTES = 16 * 2**20  # of a handler's stdout that may become the next task
WAL_BYTES = 16 * 2**20  # what is kept of the write-ahead log once it has been written back
SAFETY_TICK_SECONDS = 5.0  # look this often whatever the events say
PROBE_SECONDS = 0.2  # whoever wants a lock outwaits those who only look whether it is held

READY, CLAIMED, SCHEDULED, BLOCKED = 1, 2, 3, 4  # persist-queue also writes 0 for ready; it selects `status < 2`

EX_DATAERR, EX_TEMPFAIL = 65, 75  # exit codes of handlers (sysexits.h): never again; not now
STOPPED, CANCELLED = "its worker was stopped", "cancelled while it ran"  # why a run was ended; or else its timeout
NO_PLACE = "its worker had no place for it"  # and it was not even started

# ---------------------------------------------------------------------------------------------- schema and statements

HISTORY_SCHEMA = """
create table if not exists task_history (
  id            integer primary key,
  queue         text not null,
  row_id        integer not null,                -- the id it had in its queue; never used again there
  task_id       text not null,
  task_type     text not null,
  status        text not null check (status in ('completed', 'failed', 'cancelled')),
  data          text not null,
  priority      integer not null default 0,
  group_id      text,
  attempts      integer not null default 0,
  max_attempts  integer,
  enqueued_at   text not null,                   -- times are UTC: YYYY-MM-DD HH:MM:SS.SSS
  started_at    text,                            -- of the last attempt
  completed_at  text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
  exit_code     integer,                         -- of the handler; 128 + n for signal n
  result        text,                            -- the end of its stdout
  log           text,                            -- the end of its stderr
  error         text                             -- why it failed, in one line
);
create index if not exists "task_history.completed_at" on task_history (completed_at, queue, task_type, status);
create index if not exists "task_history.type" on task_history (queue, task_type, status, completed_at, started_at, enqueued_at);
create index if not exists "task_history.task_id" on task_history (task_id);
create index if not exists "task_history.failed" on task_history (queue, completed_at) where status = 'failed';
create table if not exists task_paused (
  queue         text primary key,
  paused_at     text not null default (strftime('%Y-%m-%d %H:%M:%f', 'now'))
);
create table if not exists task_spooled (
  file          text primary key                 -- taken in, and perhaps not yet removed
);
"""

# task_id and task_type are read out of data by SQLite itself, so that no writer, bash included, can forget or fake
# them. A bare payload has no task_id of its own (null, and nulls never collide): it is called <queue>-<id>.
QUEUE_SCHEMA = """
create table "{queue}" (
  id            integer primary key autoincrement,
  data          text not null constraint data_must_be_a_json_object
                check ({is_object}),
  timestamp     real not null default ((julianday('now') - 2440587.5) * 86400.0),  -- enqueued, Unix seconds
  status        integer not null default 1,      -- 0 and 1 ready, 2 claimed, 3 scheduled, 4 blocked
  priority      integer not null default 0,      -- higher first
  due_at        real,                            -- a scheduled task becomes ready then, Unix seconds
  group_id      text,                            -- tasks of one group run one at a time
  attempts      integer not null default 0,      -- counted at the claim
  owner         text,                            -- who claimed it: a file in STATE_DIR/workers
  claimed_at    real,                            -- Unix seconds
  max_attempts  integer,                         -- these three: what the claimer wants done when the run ends,
  backoff       real,                            --   whoever records that
  then_queue    text,
  cancel_requested integer not null default 0,   -- tasks.py cancel: the owner ends the run
  error         text,                            -- of the last failed attempt
  task_id       text generated always as (case when {is_envelope} then nullif(json_extract(data, '$.task_id'), '') end)
                virtual unique on conflict ignore,
  task_type     text generated always as (case when {is_envelope} then json_extract(data, '$.task_type')
                when json_type(data, '$.hook_event_name') = 'text' then json_extract(data, '$.hook_event_name')
                else '{queue}' end) virtual
);
create index "{queue}.ready" on "{queue}" (priority desc, id) where status < 2;
create index "{queue}.type" on "{queue}" (task_type, priority desc, id, timestamp) where status < 2;
create index "{queue}.claimed" on "{queue}" (owner) where status = 2;
create index "{queue}.scheduled" on "{queue}" (due_at) where status = 3;
create index "{queue}.blocked" on "{queue}" (group_id, id) where status = 4;
"""

IS_OBJECT = "typeof(data) = 'text' and instr(data, char(0)) = 0 and json_valid(data) and json_type(data) = 'object'"
IS_ENVELOPE = (
    "json_type(data, '$.data') = 'object' and json_type(data, '$.task_type') = 'text'"
    " and json_type(data, '$.task_id') = 'text'"
)

VIEW_SCHEMA = """
create view task_queue as
{arms}select queue, task_id, task_type, status, data, enqueued_at, started_at, completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, {max_attempts}) - 1 as max_retries, error as error_message
from task_history
"""
VIEW_ARM = """select '{queue}' as queue, coalesce(task_id, '{queue}-' || id) as task_id, task_type,
  case status when 2 then 'in_progress' when 3 then 'scheduled' when 4 then 'blocked' else 'pending' end as status, data,
  strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
  strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at,
  max(attempts - 1, 0) as retry_count, coalesce(max_attempts, {max_attempts}) - 1 as max_retries, error as error_message
from "{queue}" union all
"""

QUEUES = """
select i.tbl_name from sqlite_master i where i.type = 'index' and i.name = i.tbl_name || '.ready' order by i.tbl_name"""

INSERT = """
insert into "{queue}" (data, status, due_at, priority) values (?, ?, ?, ?)"""
FINISHED_SINCE = """
select exists (select 1 from task_history where task_id = :task_id and queue = :queue and enqueued_at > :since)"""

HAS_READY = """
select (exists (select 1 from "{queue}" where status < 2)
        or exists (select 1 from "{queue}" where status = 3 and due_at <= :now))
   and not exists (select 1 from task_paused where queue = '{queue}')"""
COUNT_READY = """
select (select count(*) from "{queue}" where status < 2) + (select count(*) from "{queue}" where status = 3 and due_at <= :now)"""
COUNT_CLAIMED = """
select count(*) from "{queue}" where status = 2"""
NEXT_DUE = """
select min(due_at) from "{queue}" where status = 3 and not exists (select 1 from task_paused where queue = '{queue}')"""
IS_PAUSED = """
select exists (select 1 from task_paused where queue = :queue)"""

PROMOTE = """
update "{queue}" set status = 1, due_at = null where status = 3 and due_at <= :now"""
CLAIM = """
update "{queue}"
set status = 2, owner = :owner, claimed_at = :now, attempts = attempts + 1,
    max_attempts = :max_attempts, backoff = :backoff, then_queue = :then_queue
where id in (select id from "{queue}" where status < 2 order by priority desc, id limit :limit)
  and not exists (select 1 from task_paused where queue = '{queue}')
returning id, task_id, task_type, data, timestamp, priority, attempts, max_attempts, backoff, then_queue, owner, claimed_at"""
CLAIM_ROW = CLAIM.replace("order by priority desc, id limit :limit", "and id = :id")
CLAIMED_BY = """
select id, task_id, task_type, data, timestamp, priority, attempts, max_attempts, backoff, then_queue, owner, claimed_at
from "{queue}" where status = 2 and owner is :owner"""
CANCEL_REQUESTED = """
select id from "{queue}" where status = 2 and owner = :owner and cancel_requested"""
OWNERS = """
select distinct owner from "{queue}" where status = 2"""

SPOOLED = """
insert or ignore into task_spooled (file) values (:file)"""
UNSPOOLED = """
delete from task_spooled where file = :file"""

WHO_HOLDS = """
select owner, claimed_at, attempts from "{queue}" where id = :id"""
NEXT_AFTER = """
select coalesce((select min(id) from "{queue}" where status < 2 and id > :id), (select min(id) from "{queue}" where status < 2))"""
COUNT_FINISHED = """
select count(*) from task_history where queue = :queue and status = :status"""
CLEAR_FINISHED = """
delete from task_history where id in (
  select id from task_history where queue = :queue and (status = 'completed' or status = 'failed' and :failed)
  order by completed_at desc limit :limit offset :keep)"""

# owner and claimed_at are null unless claimed, so this is the fence: this row, this owner, this very claim.
FENCE = "where id = :id and owner is :owner and attempts = :attempts and claimed_at is :claimed_at"

ARCHIVE = f"""
insert into task_history (queue, row_id, task_id, task_type, status, data, priority, group_id, attempts, max_attempts,
                          enqueued_at, started_at, exit_code, result, log, error)
select '{{queue}}', id, coalesce(task_id, '{{queue}}-' || id), coalesce(task_type, '{{queue}}'), :outcome, data, priority,
       group_id, attempts, max_attempts, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch'),
       strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch'), :exit_code, :result, :log, :error
from "{{queue}}" {FENCE}"""
REMOVE = f"""
delete from "{{queue}}" {FENCE}"""
RETURN = f"""
update "{{queue}}"
set status = case when :due_at is null then 1 else 3 end, due_at = :due_at, owner = null, claimed_at = null,
    cancel_requested = 0, attempts = attempts - :uncounted, error = coalesce(:error, error)
{FENCE}"""
REDRIVE = """
insert or ignore into "{queue}" (id, data, priority, group_id)
select row_id, data, priority, group_id from task_history where id = :history_id"""
FORGET = """
delete from task_history where id = :history_id"""


def check_queue_name(name: str) -> str:
    """Return name, which may now be put into SQL; raises InvalidTask. Every {queue} in a statement went through here."""
    reserved = isinstance(name, str) and name.startswith(("task_", "sqlite_"))
    if not isinstance(name, str) or reserved or not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", name):
        why = "is reserved" if reserved else "is not a queue name"
        raise InvalidTask(f"queue {name!r} {why}: use a lower-case letter, then up to 62 of a-z, 0-9 and _")
    return name


@lru_cache(4096)
def on_queue(statement: str, queue: str) -> str:
    """One of the statements above, for this queue's table."""
    return statement.format(queue=check_queue_name(queue))


def execute(conn: sqlite3.Connection, statement: str, queue: str, **values) -> sqlite3.Cursor:
    """Run one of the statements above on a queue's table. Raises QueueBusy, QueueUnavailable, InvalidTask."""
    with _ErrorsExplained(conn):
        return conn.execute(on_queue(statement, queue), values)


# --------------------------------------------------------------------------------------------------- tasks and errors


class Task(namedtuple("Task", "queue id task_id task_type text enqueued_at priority attempts max_attempts backoff "
                              "then_queue owner claimed_at")):  # fmt: skip
    """A claimed task. `id` is its row, `text` what was stored (JSON), times are Unix seconds.

    A named tuple, since importing dataclasses would cost a hook 8 ms.
    """

    __slots__ = ()

    @property
    def envelope(self) -> dict:
        """{"task_id", "task_type", "enqueued_at", "data", …}, whatever was stored. ValueError if that is not JSON."""
        stored = json.loads(self.text)
        is_envelope = isinstance(stored.get("data"), dict) and {"task_id", "task_type"} <= stored.keys()
        shell = stored if is_envelope and stored["task_id"] == self.task_id else {"data": stored}
        head = {"task_id": self.task_id, "task_type": self.task_type, "enqueued_at": utc(self.enqueued_at)}
        return {**head, **shell, "task_id": self.task_id, "task_type": self.task_type}

    @property
    def data(self) -> dict:
        """The payload."""
        return self.envelope["data"]

    @property
    def depth(self) -> int:
        """How many handlers stand between this task and the outside world; 0 for most."""
        return depth_of(self.envelope)

    @property
    def run_name(self) -> str:
        """What the files of this run in STATE_DIR/logs are called, before .out and .err."""
        return f"{self.queue}/{self.id}-{self.attempts}-{self.owner}-{int((self.claimed_at or 0) * 1e6)}"


def unreadable(task: Task) -> str | None:
    """Why the task's JSON cannot be read: SQLite takes some that Python does not, like numbers of 5,000 digits."""
    try:
        task.envelope  # noqa: B018
        return None
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        return f"data cannot be read: {error}"


def depth_of(envelope: dict) -> int:
    """What an envelope says of its task's depth; 0 for what is no depth."""
    depth = envelope.get("depth")
    return depth if type(depth) is int and depth > 0 else 0


class QueueError(Exception):
    """The queue could not do what was asked; the message says what, why and what to do."""


class InvalidTask(QueueError, ValueError):
    """The task, or the queue's name, was refused. Nothing was stored."""


class QueueBusy(QueueError):
    """The write lock was not had within BUSY_TIMEOUT_MS. Trying again may help."""


class QueueUnavailable(QueueError):
    """The database cannot be used as it is: missing, unreadable, full, damaged, or from a newer version."""


def explain(error: sqlite3.Error, state: Path) -> QueueError:
    """The QueueError for what SQLite said."""
    db, text = state / "tasks.db", str(error)
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return QueueBusy(f"{db} is locked by another process: {text}; find who holds it with: fuser -v '{db}'")
    if name == "SQLITE_CONSTRAINT_CHECK" or "JSON" in text:  # "malformed JSON" comes from the generated columns
        return InvalidTask(f"the task was refused: {text}; data is a JSON object, nested 1000 deep at most")
    if name.startswith("SQLITE_TOOBIG"):
        return InvalidTask("the task was refused: it is larger than SQLite can store (1 GB)")
    if name.startswith("SQLITE_FULL"):
        return QueueUnavailable(f"{db}: the disk is full; free some space: df -h '{state}'")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return QueueUnavailable(
            f"{db} is damaged or not a database ({text}); move it away, or restore a backup over it"
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_IOERR")):
        return QueueUnavailable(f"{db} cannot be used ({text}); check that it exists and is yours: ls -la '{state}'")
    return QueueUnavailable(f"{db}: {text}")


def utc(seconds: float) -> str:
    """Unix seconds as YYYY-MM-DD HH:MM:SS.SSS, UTC: what the database holds, and what sorts."""
    seconds, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{_whole_seconds(seconds)}.{milliseconds:03d}"


@lru_cache(1)
def _whole_seconds(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_quote = json.encoder.encode_basestring  # a string, encoded so


def to_json(value: object) -> str:
    """JSON text for the database; raises InvalidTask for what JSON cannot say."""
    try:
        text = _encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidTask(f"the task was refused: {error}; data must be a JSON object") from None
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON as an escape, not in UTF-8
        text = json.dumps(value)
    return text


# -------------------------------------------------------------------------------------- connections and transactions


class Connection(sqlite3.Connection):
    """A connection that knows its state directory, its file, and the queues it has seen."""

    state: Path
    file: tuple[int, int]
    queues: set[str]
    durable: bool | None
    busy_timeout_ms: int


class _Connections(dict):
    """A thread's {state: Connection}, closed when the thread ends: Python's own end of a connection waits for gc."""

    def __init__(self) -> None:
        super().__init__()
        self.pid = os.getpid()

    def __del__(self) -> None:
        if self.pid == os.getpid():  # not a forked child's copy
            for conn in self.values():
                conn.close()


_thread = threading.local()  # .connections: _Connections
_connections: WeakSet[Connection] = WeakSet()


def connect(state: Path | None = None, create: bool = True, busy_timeout_ms: int | None = None) -> Connection:
    """This thread's connection to STATE_DIR/tasks.db, opened or reopened as needed, its schema made or adopted.

    A deleted or replaced database is noticed here. With create=False a missing one raises QueueUnavailable.
    """
    state = state or STATE_DIR
    busy_timeout_ms = BUSY_TIMEOUT_MS if busy_timeout_ms is None else busy_timeout_ms
    if not hasattr(_thread, "connections"):
        _thread.connections = _Connections()
    cache = _thread.connections
    conn, db = cache.get(state), f"{state}/tasks.db"
    try:
        found = os.stat(db)
        if conn is not None and conn.file == (found.st_dev, found.st_ino):
            if conn.busy_timeout_ms != busy_timeout_ms:
                conn.execute(f"pragma busy_timeout = {busy_timeout_ms}")
                conn.busy_timeout_ms = busy_timeout_ms
            return conn
    except OSError as error:
        if not create:
            raise QueueUnavailable(f"{db}: {error.strerror}; the next enqueue makes a new one") from None
    if conn is not None:
        close(conn)
    try:
        cache[state] = _open(state, db, busy_timeout_ms)
    except sqlite3.Error as error:
        raise explain(error, state) from error
    except OSError as error:
        raise QueueUnavailable(f"{state} cannot be made or read: {error.strerror}; check TASK_QUEUE_STATE") from error
    return cache[state]


def close(conn: Connection) -> None:
    """Close a connection that connect() returned. The next connect() opens another."""
    _thread.connections.pop(conn.state, None)
    _connections.discard(conn)
    conn.close()


def make_private(directory: Path, parents: bool = False) -> Path:
    """Make a directory for its owner only. Without parents none is made for a state that was moved away."""
    directory.mkdir(mode=0o700, parents=parents, exist_ok=True)
    return directory


def _open(state: Path, db: str, busy_timeout_ms: int) -> Connection:
    make_private(state, parents=True)
    conn = sqlite3.connect(db, timeout=busy_timeout_ms / 1000, isolation_level=None, check_same_thread=False,
                           factory=Connection)  # fmt: skip
    try:
        conn.state, conn.queues, conn.durable, conn.busy_timeout_ms = state, set(), None, busy_timeout_ms
        conn.execute(f"pragma journal_size_limit = {WAL_BYTES}")
        conn.execute("pragma cache_size = -16000")  # KiB; many tasks in one transaction stay in memory until its end
        conn.text_factory = lambda raw: raw.decode("utf-8", "replace")  # bash may have cast any bytes to text
        conn.execute("begin")  # one snapshot: another first open may be at work
        version = conn.execute("pragma user_version").fetchone()[0]
        tables = _tables(conn)
        is_ours = version > SCHEMA_VERSION or "task_history" in tables
        if version == 0:
            is_ours = not tables or _module("queue_migrate").has_bare_queue(conn)
        conn.execute("commit")
        if version > SCHEMA_VERSION:
            raise QueueUnavailable(
                f"{db} has schema version {version}, these scripts know {SCHEMA_VERSION}: update them"
            )
        if not is_ours:
            raise QueueUnavailable(f"{db} is not a task queue's database; check TASK_QUEUE_STATE")
        if version == 0:
            conn.execute("pragma auto_vacuum = incremental")  # before the first table; cleanup.py gives space back
        found = os.stat(db)
        conn.file = (found.st_dev, found.st_ino)
        if stat.S_IMODE(found.st_mode) & 0o077:  # chmod, not open: closing a descriptor would drop SQLite's locks
            for sidecar in ("", "-wal", "-shm"):
                if os.path.exists(f"{db}{sidecar}"):
                    os.chmod(f"{db}{sidecar}", 0o600)
        _switch_to_wal(conn)
        if version < SCHEMA_VERSION:
            _make_schema(conn)
    except BaseException:
        conn.close()
        raise
    _connections.add(conn)
    return conn


def _tables(conn: Connection) -> list[str]:
    found = conn.execute("select name from sqlite_master where type = 'table' and name not like 'sqlite@_%' escape '@'")
    return [name for (name,) in found]


def _make_schema(conn: Connection) -> None:
    """Make the schema in an empty database; what is not empty is queue_migrate's. In one transaction."""
    with transaction(conn):
        if conn.execute("pragma user_version").fetchone()[0] == SCHEMA_VERSION:
            return  # made while we waited for the lock
        if _tables(conn):
            _module("queue_migrate").migrate(conn)
        else:
            for statement in HISTORY_SCHEMA.split(";\n"):
                conn.execute(statement)
            for queue in DEFAULT_QUEUES:
                create_queue(conn, queue)
            create_view(conn)
        conn.execute(f"pragma user_version = {SCHEMA_VERSION}")


def _switch_to_wal(conn: Connection) -> None:
    """Turn WAL on, once in a database's life. This switch ignores SQLite's busy handler, hence the loop."""
    deadline = time.monotonic() + conn.busy_timeout_ms / 1000
    while True:
        try:
            if conn.execute("pragma journal_mode = wal").fetchone()[0] != "wal":
                raise QueueUnavailable(
                    f"{conn.state} is on a file system where SQLite cannot use WAL: use a local disk"
                )
            return
        except sqlite3.OperationalError as error:
            locked = (error.sqlite_errorname or "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
            if not locked or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def ensure_queue(conn: Connection, queue: str) -> None:
    """Create the queue's table, or adopt the bare one that a hook made: its rows and ids are kept."""
    check_queue_name(queue)
    if queue not in conn.queues:
        with _ErrorsExplained(conn):
            conn.queues = {name for (name,) in conn.execute(QUEUES)}
        if queue not in conn.queues:
            with nullcontext() if conn.in_transaction else transaction(conn):
                if queue not in {name for (name,) in conn.execute(QUEUES)}:
                    if len(conn.queues) >= MAX_QUEUES:
                        raise InvalidTask(f"queue {queue!r} would be number {MAX_QUEUES + 1}: use an existing one")
                    if queue in _tables(conn):
                        _module("queue_migrate").adopt(conn, queue)
                    else:
                        create_queue(conn, queue)
                    create_view(conn)
            conn.queues.add(queue)


def create_queue(conn: Connection, queue: str) -> None:
    """Make the queue's table and its indexes, within a transaction; create_view() has to follow."""
    for statement in QUEUE_SCHEMA.format(queue=queue, is_object=IS_OBJECT, is_envelope=IS_ENVELOPE).split(";\n"):
        conn.execute(statement)


def create_view(conn: Connection) -> None:
    queues = [name for (name,) in conn.execute(QUEUES)]
    arms = "".join(VIEW_ARM.format(queue=queue, max_attempts=MAX_ATTEMPTS) for queue in queues)
    conn.execute("drop view if exists task_queue")
    conn.execute(VIEW_SCHEMA.format(arms=arms, max_attempts=MAX_ATTEMPTS))


class _ErrorsExplained:
    """Has SQLite's errors on a Connection raised as QueueErrors. A class: contextmanager costs more than most statements."""

    __slots__ = ("conn",)

    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, sqlite3.Error) and isinstance(self.conn, Connection):
            raise explain(error, self.conn.state) from error


@contextmanager
def transaction(conn: Connection, durable: bool = True):
    """One transaction that has the write lock from its start, and is rolled back when its block raises.

    A durable one survives a power cut once it has ended (synchronous=FULL). Raises QueueBusy, QueueUnavailable.
    """
    with _ErrorsExplained(conn):
        if conn.durable is not durable:
            conn.execute(f"pragma synchronous = {'full' if durable else 'normal'}")
            conn.durable = durable
        conn.execute("begin immediate")
        try:
            yield conn
            conn.execute("commit")
        except BaseException:
            conn.queues = set()  # one of them may have been made here
            if conn.in_transaction:
                conn.execute("rollback")
            raise


# ------------------------------------------------------------------------------------------- the verbs, in life order


def enqueue_task(queue_name: str, task_type: str, data: dict, task_id: str | None = None, *, delay: float = 0.0,
                 priority: int = 0, window: float = 0.0) -> str:  # fmt: skip
    """Store a task and return its id, new or already there: it is on disk when this returns.

    Where a waiting or running task of the queue has this task_id, or one that was enqueued in the last `window`
    seconds and is finished, nothing is added. The task becomes ready after `delay` seconds; a higher `priority` is
    claimed first. Raises InvalidTask, QueueBusy, QueueUnavailable.
    """
    return enqueue_tasks(
        queue_name, [new_row(task_type, data, task_id, delay=delay, priority=priority, window=window)]
    )[0][0]


def enqueue_tasks(queue_name: str, tasks, *, state: Path | None = None) -> list[tuple[str, bool]]:
    """Store many tasks in one transaction, all or none; returns [(task_id, is_new), …] in their order.

    A task is a dict of enqueue_task's arguments: {"task_type": …, "data": …, "task_id": …}, or a new_row().
    """
    rows = [task if isinstance(task, Row) else new_row(**task) for task in tasks]
    conn = connect(state)
    ensure_queue(conn, queue_name)
    with transaction(conn):
        results = [(row.task_id, insert(conn, queue_name, row)) for row in rows]
    wake(conn.state)
    return results


Row = namedtuple("Row", "task_id data status due_at priority window")  # a task that has passed new_row()


def insert(conn: Connection, queue: str, row: Row) -> bool:
    """Insert a row within a transaction; False when its task_id is waiting, running, or finished within its window."""
    if row.window:
        known = {"queue": queue, "task_id": row.task_id, "since": utc(time.time() - row.window)}
        if conn.execute(FINISHED_SINCE, known).fetchone()[0]:
            return False
    return conn.execute(on_queue(INSERT, queue), row[1:5]).rowcount == 1


def new_row(task_type: str, data: dict, task_id: str | None = None, *, delay: float = 0.0, priority: int = 0,
            window: float = 0.0, depth: int | None = None, source: dict | None = None, text: str | None = None) -> Row:  # fmt: skip
    """Check a task and write its envelope; `text` is the JSON that data was read from, if any. Raises InvalidTask."""
    if not isinstance(data, dict):
        raise InvalidTask(f"the task was refused: data is a {type(data).__name__}; it must be a JSON object")
    task_id = os.urandom(8).hex() if task_id is None else _checked_name("task_id", task_id, 500)
    _check_task_type(task_type) if isinstance(task_type, str) else _checked_name("task_type", task_type, 200)
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 1_000_000:
        raise InvalidTask(f"priority {priority!r} was refused: it is a whole number from -1000000 to 1000000")
    for what, seconds in (("delay", delay), ("window", window)) if (delay, window) != (0.0, 0.0) else ():
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
            raise InvalidTask(f"{what} {seconds!r} was refused: it is a number of seconds")
    depth = task_depth() if depth is None else depth
    if depth > MAX_DEPTH:
        raise InvalidTask(f"the task was refused: its chain of handlers is more than {MAX_DEPTH} deep (TASK_DEPTH)")
    now = time.time()
    head = f'"task_id": {_quote(task_id)}, "task_type": {_quote(task_type)}, "enqueued_at": "{utc(now)}"'
    if depth:
        head += f', "depth": {depth}'
    if source:
        head += f', "source": {_encode(source)}'
    envelope = f'{{{head}, "data": {to_json(data) if text is None else text}}}'
    return Row(task_id, envelope, SCHEDULED if delay else READY, now + delay if delay else None, priority, window)


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _checked_name(what: str, value: object, longest: int) -> str:
    """A task_id or task_type: text that fits into an environment variable, a log line and a file name."""
    if not isinstance(value, str) or not 0 < len(value.encode("utf-8", "surrogatepass")) <= longest:
        raise InvalidTask(f"{what} {str(value)[:40]!r} was refused: it is a text of 1 to {longest} bytes")
    if _UNPRINTABLE.search(value):
        raise InvalidTask(f"{what} {value!r} was refused: it has control characters or lone surrogates")
    return value


@lru_cache(256)
def _check_task_type(task_type: str) -> None:
    if "/" in _checked_name("task_type", task_type, 200) or task_type[0] in ".-":
        raise InvalidTask(f"task_type {task_type!r} was refused: it names a handler, so no / and no leading . or -")


def task_depth() -> int:
    """TASK_DEPTH: 0 outside handlers; a handler's is one more than its task's."""
    text = os.environ.get("TASK_DEPTH")
    return int(text) if text and text.isdecimal() else 0


def wake(state: Path) -> None:
    """Tell sleeping consumers to look, after a commit. Best effort: they also hear the write-ahead log."""
    try:
        fd = os.open(state / "wake", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.utime(fd)  # what macOS reports; Linux reports the close
        os.close(fd)
    except OSError:
        pass


def has_ready(conn: Connection, queue: str) -> bool:
    """Whether a claim would find something."""
    return bool(execute(conn, HAS_READY, queue, now=time.time()).fetchone()[0])


def is_paused(conn: Connection, queue: str) -> bool:
    """Whether claims of this queue are held back (tasks.py pause)."""
    return bool(conn.execute(IS_PAUSED, {"queue": queue}).fetchone()[0])


def next_due(conn: Connection, queue: str) -> float | None:
    """When the queue's next scheduled task becomes ready, Unix seconds; None when there is none, or it is paused."""
    return execute(conn, NEXT_DUE, queue).fetchone()[0]


def claim(conn: Connection, queue: str, owner: str, *, limit: int = 1, row_id: int | None = None,
          max_attempts: int = MAX_ATTEMPTS, backoff: float = BACKOFF_SECONDS, then_queue: str | None = None) -> list[Task]:  # fmt: skip
    """Claim up to `limit` ready tasks, or one given row, for owner; [] when nothing is ready or the queue is paused.

    Within a transaction. What max_attempts, backoff (seconds) and then_queue say is kept with the task, so that
    whoever has to end it (this process, or another that finds this one dead) does the same.
    """
    now = time.time()
    execute(conn, PROMOTE, queue, now=now)
    values = {"owner": owner, "now": now, "max_attempts": max_attempts, "backoff": backoff, "then_queue": then_queue}
    if row_id is None:
        rows = execute(conn, CLAIM, queue, limit=limit, **values).fetchall()
    else:
        rows = execute(conn, CLAIM_ROW, queue, id=row_id, **values).fetchall()
    return sorted((_task(queue, row) for row in rows), key=lambda task: (-task.priority, task.id))


def _task(queue: str, row: tuple) -> Task:
    task_id, task_type = row[1] or f"{queue}-{row[0]}", row[2] or queue
    return Task(queue, row[0], task_id, task_type, *row[3:])


def ack(conn: Connection, task: Task, *, exit_code: int | None = None, result: str | None = None,
        log: str | None = None) -> bool:  # fmt: skip
    """Record the claimed task as completed. False when its owner no longer holds it; nothing changes then."""
    return finish(conn, task, "completed", exit_code=exit_code, result=result, log=log)


def nack(conn: Connection, task: Task, *, error: str, delay: float | None = None, exit_code: int | None = None,
         result: str | None = None, log: str | None = None) -> str | None:  # fmt: skip
    """Record a failed attempt: "scheduled" again after delay seconds (default: its back-off), or, with its attempts
    spent, "failed" for good. None when its owner no longer holds it; nothing changes then.
    """
    if task.attempts >= (task.max_attempts or MAX_ATTEMPTS):
        error = f"{error} (attempt {task.attempts} of {task.max_attempts})"
        return "failed" if bury(conn, task, error=error, exit_code=exit_code, result=result, log=log) else None
    delay = backoff_delay(task) if delay is None else delay
    return "scheduled" if _put_back(conn, task, delay=delay, error=error) else None


def bury(conn: Connection, task: Task, *, error: str, exit_code: int | None = None, result: str | None = None,
         log: str | None = None) -> bool:  # fmt: skip
    """Record the claimed task as failed for good, a dead letter. False when its owner no longer holds it."""
    return finish(conn, task, "failed", exit_code=exit_code, result=result, log=log, error=error)


def release(conn: Connection, task: Task, *, delay: float = 0.0, error: str | None = None) -> bool:
    """Put the claimed task back as if it had not been claimed: this attempt does not count. False when not held."""
    return _put_back(conn, task, delay=delay, error=error, uncounted=1)


def finish(conn: Connection, task: Task, outcome: str, *, exit_code: int | None = None, result: str | None = None,
           log: str | None = None, error: str | None = None) -> bool:  # fmt: skip
    """Move the task to the history as completed, failed or cancelled, within a transaction. False when not held."""
    fence = _fence(task)
    told = {"outcome": outcome, "exit_code": exit_code, "result": result, "log": log, "error": error}
    if execute(conn, ARCHIVE, task.queue, **fence, **told).rowcount != 1:
        return False
    execute(conn, REMOVE, task.queue, **fence)
    return True


def _fence(task: Task) -> dict:
    """The values of FENCE."""
    return {"id": task.id, "owner": task.owner, "attempts": task.attempts, "claimed_at": task.claimed_at}


def _put_back(conn: Connection, task: Task, *, delay: float, error: str | None, uncounted: int = 0) -> bool:
    due_at = time.time() + delay if delay > 0 else None
    return execute(conn, RETURN, task.queue, **_fence(task), due_at=due_at, error=error, uncounted=uncounted).rowcount == 1


def redrive(conn: Connection, queue: str, history_id: int) -> bool:
    """Put a finished task back into its queue, attempts at zero, under its old id. False when the same task_id is
    waiting or running already; the history is kept then.
    """
    if execute(conn, REDRIVE, queue, history_id=history_id).rowcount != 1:
        return False
    conn.execute(FORGET, {"history_id": history_id})
    return True


def backoff_delay(task: Task) -> float:
    """Seconds until the next attempt: doubling from the task's base, capped, less up to half at random."""
    import random

    base = BACKOFF_SECONDS if task.backoff is None else task.backoff
    return min(BACKOFF_CAP_SECONDS, base * 2.0 ** min(task.attempts - 1, 32)) * random.uniform(0.5, 1.0)


# ---------------------------------------------------------------------------------------------------------- the spool


def spool(queue: str, text: str, state: Path | None = None) -> Path:
    """Write a task that could not reach the database to state/spool/QUEUE: on disk when this returns. OSError if not.

    `text` is what would be a row's data. A shell can do the same: write a file elsewhere on the disk, mv it there.
    """
    directory = (state or STATE_DIR) / "spool" / check_queue_name(queue)
    make_private(directory, parents=True)
    name = f"{time.time_ns()}-{os.urandom(4).hex()}.json"
    fd = os.open(directory / f".{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
        os.rename(directory / f".{name}", directory / name)
    except BaseException:
        os.unlink(directory / f".{name}")
        raise
    directory_fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)
    wake(state or STATE_DIR)
    return directory / name


# --------------------------------------------------------------------------------------------- who is alive, recovery

NOBODY = "nobody"  # a row that was marked as claimed by hand has no owner

_owners: dict[Path, tuple[str, int]] = {}  # {state: (name, descriptor)}
_owners_lock = threading.Lock()


def lock_file(path: Path | str, *, shared: bool = False, probe: bool = False, patience: float = 0.0) -> int | None:
    """A descriptor that holds the flock on path, None when somebody else holds it (for `patience` seconds).

    A probe opens for reading and creates nothing: closing a descriptor that was open for writing is what tells
    everybody that an owner has died. It raises FileNotFoundError.
    """
    import fcntl

    flags = os.O_RDONLY if probe else os.O_RDWR | os.O_CREAT
    deadline = time.monotonic() + patience
    while True:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            mine, there = os.fstat(fd), os.stat(path)
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return fd
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(fd)
                return None
            time.sleep(0.005)
        except FileNotFoundError:
            if probe:
                os.close(fd)
                raise
        os.close(fd)  # somebody removed the file between open and flock: the lock is on nothing


def owner_name(state: Path | None = None) -> str:
    """This process as an owner of tasks: its lock file in state/workers exists and is held when this returns."""
    state = state or STATE_DIR
    with _owners_lock:
        name, fd = _owners.get(state, (None, None))
        if fd is not None:
            try:
                if os.stat(f"{state}/workers/{name}").st_ino == os.fstat(fd).st_ino:
                    return name
            except OSError:
                pass
            os.close(fd)  # removed under us, by hand: what we hold is lost unless the file is back in time
        path = state / "workers" / (name or f"{os.getpid()}-{os.urandom(4).hex()}")
        try:
            make_private(path.parent)
            fd = lock_file(path, patience=PROBE_SECONDS)
        except OSError as error:
            raise QueueUnavailable(f"{path} cannot be made: {error.strerror}; check the permissions") from error
        if fd is None:
            raise QueueUnavailable(f"{path} is locked by another process; it is this process's own: remove it")
        _owners[state] = (path.name, fd)
        return path.name


def resign(state: Path | None = None) -> None:
    """Give up this process's ownership: nothing of its is claimed any more."""
    state = state or STATE_DIR
    with _owners_lock:
        name, fd = _owners.pop(state, (None, None))
        if fd is not None:
            try:
                os.unlink(state / "workers" / name)
            except OSError:
                pass
            os.close(fd)



_inherited: list[Connection] = []  # a child must not close its parent's connections: that would shut the parent's log


def close_before_fork(conn: Connection | None) -> None:
    """Close a connection unless a transaction of its is under way: a child would take SQLite's locks for its own."""
    if conn in _connections and not conn.in_transaction:
        conn.file = None  # has connect() open another
        _connections.discard(conn)
        conn.close()


def _before_fork() -> None:
    """Close the forking thread's connections; they are opened again when wanted.

    Connections of other threads are left as they are: a program that uses the queue in threads should fork before
    that, or use subprocess.
    """
    for conn in list(_thread.__dict__.get("connections", {}).values()):
        close_before_fork(conn)
    _inherited.extend(_connections)


def _after_fork_in_child() -> None:
    """A child opens its own connections, and owns nothing of its parent's."""
    global _thread, _connections, _owners_lock
    _thread, _connections, _owners_lock = threading.local(), WeakSet(), threading.Lock()
    for _, fd in _owners.values():
        os.close(fd)
    _owners.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_inherited.clear,
    after_in_child=_after_fork_in_child,
)



def claim_ready(conn: Connection, queue: str, **how) -> list[Task]:
    """Claim for this process, in a transaction of its own. A look that finds nothing takes no lock."""
    if not has_ready(conn, queue):
        return []
    owner = owner_name(conn.state)
    with transaction(conn, durable=False):
        return claim(conn, queue, owner, **how)


def not_held(conn: Connection, task: Task, verb: str = "acknowledged") -> None:
    """Say that a task was not ours to end."""
    import logging

    row = execute(conn, WHO_HOLDS, task.queue, id=task.id).fetchone()
    if row is None:
        why = "it is finished or gone"
    elif row[0] is None:
        why = "it is waiting again"
    else:
        why = f"{row[0]} holds it since {utc(row[1])} UTC, attempt {row[2]}"
    message = 'queue "%s": task %s was not %s: %s (this process lost it when its lock file or the state was removed)'
    logging.getLogger(__name__).warning(message, task.queue, task.id, verb, why)


# ------------------------------------------------------------------------------------------------ the modules beside it

_LATER = {
    name: module
    for module, names in {
        "queue_owners": "settle tail signal_name spool_directories spooled_files take_in_spool recover exits_file",
        "queue_wake": "Watch WakeEvent QueueWatcher look_again data_version is_wake sleep_seconds",
        "queue_persist": "get_queue get_ack_queue dequeue_task SQLiteQueue SQLiteAckQueue Empty",
        "queue_asyncio": "consume Delivery",
    }.items()
    for name in names.split()
}


def _module(name: str):
    """One of the modules beside this file. Raises ImportError that names it where somebody took this file alone."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        here = os.path.dirname(os.path.abspath(__file__))
        raise ImportError(f"{name}.py is missing in {here}: put it beside queue_helpers.py", name=name) from None


def __getattr__(name: str):
    """The names of the modules beside this one, which are loaded when first asked for: their libraries are heavy."""
    if name in _LATER:
        value = getattr(_module(_LATER[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
