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
import sys
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
ORPHAN_TICK_SECONDS = 0.25  # the same while a handler outlives its worker
POLL_SECONDS = 0.05  # the same where the platform has no events to give
SLOW_COMMIT_SECONDS = 5.0  # how long a commit may take from its write to its being visible
OWNER_CLOSED_SECONDS = 0.3  # how long a closed lock file is news; longer than all the looks after an event
PROBE_SECONDS = 0.2  # whoever wants a lock outwaits those who only look whether it is held
LOOK_AGAIN_SECONDS = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)  # after an event; 127 ms in all
AFTER_A_CHANGE = 3  # which of these follows a change

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

LAST_ID = """
select max(id) from (
  select max(seq) as id from sqlite_sequence where name in (select value from json_each(:names))
  union all select max(id) from "{queue}.bare")"""

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
        is_ours = version > SCHEMA_VERSION or _is_ours(conn, version)
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
            _migrate(conn)
    except BaseException:
        conn.close()
        raise
    _connections.add(conn)
    return conn


def _is_ours(conn: Connection, version: int) -> bool:
    """Whether the database is a queue's, or empty, or has the bare table that a hook made."""
    tables = [name for (name,) in conn.execute("select name from sqlite_master where type = 'table'")]
    if version:
        return "task_history" in tables
    return all(name.startswith("sqlite_") for name in tables) or any(_is_bare_queue(conn, name) for name in tables)


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


def _migrate(conn: Connection) -> None:
    """Bring an older or empty database to SCHEMA_VERSION in one transaction; bare tables are adopted."""
    with transaction(conn):
        if conn.execute("pragma user_version").fetchone()[0] < SCHEMA_VERSION:  # not done while we waited for the lock
            for statement in HISTORY_SCHEMA.split(";\n"):
                conn.execute(statement)
            bare = conn.execute("select name from sqlite_master where type = 'table'").fetchall()
            for queue in sorted({*DEFAULT_QUEUES, *(name for (name,) in bare if _is_bare_queue(conn, name))}):
                _create_queue(conn, queue)
            _create_view(conn)
            conn.execute(f"pragma user_version = {SCHEMA_VERSION}")


def _is_bare_queue(conn: Connection, table: str) -> bool:
    """Whether a hook made this table before any Python ran: id and data, and a name that a queue may have."""
    try:
        check_queue_name(table)
    except InvalidTask:
        return False
    return [row[1] for row in conn.execute(f'pragma table_info("{table}")')] == ["id", "data"]


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
                    _create_queue(conn, queue)
                    _create_view(conn)
            conn.queues.add(queue)


def _create_queue(conn: Connection, queue: str) -> None:
    columns = [row[1] for row in conn.execute(f'pragma table_info("{queue}")')]
    if columns:
        if columns != ["id", "data"]:
            raise QueueUnavailable(f"table {queue} in {conn.state / 'tasks.db'} is not a queue: use another queue name")
        conn.execute(f'alter table "{queue}" rename to "{queue}.bare"')
    for statement in QUEUE_SCHEMA.format(queue=queue, is_object=IS_OBJECT, is_envelope=IS_ENVELOPE).split(";\n"):
        conn.execute(statement)
    if columns:
        conn.execute(f"""insert into "{queue}" (id, data) select id, data from "{queue}.bare"
                         where case when {IS_OBJECT} then 1 end order by id""")
        conn.execute(f"""insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)
                         select '{queue}', id, '{queue}-' || id, '{queue}', 'failed', coalesce(cast(data as text), ''),
                                strftime('%Y-%m-%d %H:%M:%f', 'now'), 'was not a JSON object when the table was adopted'
                         from "{queue}.bare" where case when {IS_OBJECT} then 0 else 1 end""")
        (last_id,) = conn.execute(
            LAST_ID.format(queue=queue), {"names": json.dumps([queue, f"{queue}.bare"])}
        ).fetchone()
        conn.execute(f'drop table "{queue}.bare"')
        conn.execute("delete from sqlite_sequence where name = ?", (queue,))
        conn.execute("insert into sqlite_sequence (name, seq) values (?, ?)", (queue, last_id or 0))


def _create_view(conn: Connection) -> None:
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


def settle(conn: Connection, task: Task, exit_code: int, *, why: str | None = None,
           delay: float | None = None) -> tuple[str | None, str | None]:  # fmt: skip
    """Record how a handler's run ended, from its exit code and its output files, within a transaction.

    Returns (outcome, error): "completed", "scheduled" (again), "failed", "cancelled", "put back", or None when the task
    was no longer held. `why` the run was ended, if it was: STOPPED, NO_PLACE, CANCELLED, or the error to record, with
    `delay` seconds until the next attempt (default: its back-off).
    """
    run = f"{conn.state}/logs/{task.run_name}"
    told = {"exit_code": exit_code, "result": tail(f"{run}.out", OUTPUT_BYTES), "log": tail(f"{run}.err", OUTPUT_BYTES)}
    if why == CANCELLED:
        return ("cancelled" if finish(conn, task, "cancelled", error=why, **told) else None), None
    if why in (STOPPED, NO_PLACE) and exit_code != 0:
        return ("put back" if release(conn, task, error=why) else None), why
    if why not in (None, STOPPED):
        return nack(conn, task, error=why, delay=delay, **told), why
    if exit_code == 0:
        if task.then_queue:
            try:
                row = _next_row(task, tail(f"{run}.out", RESULT_BYTES))
            except InvalidTask as refused:
                error = f"done, but the next task was refused: {refused}"
                return ("failed" if bury(conn, task, error=error, **told) else None), error
        if not ack(conn, task, **told):
            return None, None
        if task.then_queue:
            ensure_queue(conn, task.then_queue)
            insert(conn, task.then_queue, row)
        return "completed", None
    if exit_code == EX_TEMPFAIL:
        delay = _retry_after(told["result"])
        error = "not now (exit 75)"
        delay = backoff_delay(task) if delay is None else delay
        return ("scheduled" if release(conn, task, delay=delay, error=error) else None), error
    if exit_code == EX_DATAERR:
        error = "refused by its handler (exit 65)"
        return ("failed" if bury(conn, task, error=error, **told) else None), error
    error = f"killed by {signal_name(exit_code - 128)}" if exit_code > 128 else f"exit {exit_code}"
    last_words = told["log"].strip().rsplit("\n", 1)[-1][:200]
    error += f": {last_words}" if last_words else ""
    return nack(conn, task, error=error, **told), error


def _next_row(task: Task, stdout: str) -> Row:
    """The task that a result becomes: its payload is what the handler printed, if that is a JSON object."""
    try:
        data = json.loads(stdout)
    except (ValueError, RecursionError):
        data = None
    data = data if isinstance(data, dict) else {"result": stdout}
    source = {"queue": task.queue, "task_id": task.task_id}
    task_id = f"{task.task_id.encode()[:470].decode('utf-8', 'ignore')}.{task.id}"  # one per row: a second result does not drown in a waiting first
    return new_row(task.task_type, data, task_id, depth=task.depth + 1, source=source)


def _retry_after(stdout: str) -> float | None:
    """Seconds, where the last line is {"retry_after": SECONDS}."""
    try:
        seconds = json.loads(stdout.strip().rsplit("\n", 1)[-1])["retry_after"]
        return min(max(float(seconds), 0.0), RETRY_AFTER_CAP_SECONDS)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def tail(path: str, size: int) -> str:
    """The last size bytes of a file as text, "" where there is none."""
    try:
        length = os.stat(path).st_size
        if length == 0:
            return ""
        with open(path, "rb", buffering=0) as file:
            file.seek(max(0, length - size))
            return file.read(size).decode("utf-8", "replace").replace("\0", "\ufffd")
    except OSError:
        return ""


def signal_name(number: int) -> str:
    """SIGKILL for 9, and so on."""
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


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


def spool_directories(state: Path) -> list[Path]:
    """The state's spool/QUEUE directories."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(state / "spool") if entry.is_dir())
    except OSError:
        return []


def spooled_files(directory: Path) -> list[tuple[int, str, int]]:
    """The tasks in a spool/QUEUE directory, oldest first: (mtime in ns, name, inode)."""
    files = []
    try:
        for entry in os.scandir(directory):
            if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                found = entry.stat(follow_symlinks=False)
                files.append((found.st_mtime_ns, entry.name, found.st_ino))
    except FileNotFoundError:
        pass
    return sorted(files)


def take_in_spool(state: Path | None = None) -> tuple[int, list[str]]:
    """Move spooled tasks into the database, oldest first, each exactly once: (how many, complaints).

    A file's identity is stored in the transaction that stores its task, and forgotten after the file is removed: a
    crash in between, or another worker at the same time, takes nothing in twice. What is not a JSON object is moved
    to spool/QUEUE/malformed and named in the complaints.
    """
    state, taken, complaints = state or STATE_DIR, 0, []
    for directory in spool_directories(state):
        files = spooled_files(directory)
        if not files:
            continue
        try:
            queue = check_queue_name(directory.name)
        except InvalidTask as error:
            complaints.append(f"{directory}: {error}")
            continue
        conn = connect(state)
        ensure_queue(conn, queue)
        for mtime, name, inode in files:
            path, identity = directory / name, f"{queue}/{name}:{inode}:{mtime}"
            try:
                text = path.read_bytes().decode("utf-8-sig")
                with transaction(conn):
                    if path.stat().st_ino != inode:
                        raise FileNotFoundError(path)
                    if conn.execute(SPOOLED, {"file": identity}).rowcount == 1:
                        conn.execute(on_queue(INSERT, queue), (text, READY, None, 0))
                        taken += 1
                path.unlink(missing_ok=True)
                with _ErrorsExplained(conn):
                    conn.execute(UNSPOOLED, {"file": identity})
            except FileNotFoundError:
                continue  # another worker took it
            except OSError as error:
                complaints.append(
                    f"{path}: {error.strerror}; it cannot be taken in, or not removed: check the permissions"
                )
            except (InvalidTask, UnicodeDecodeError) as error:
                aside = make_private(directory / "malformed") / f"{inode}-{name}"
                path.rename(aside)
                complaints.append(f"{aside}: {error}")
    if taken:
        wake(state)
    return taken, complaints


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


def recover(state: Path | None = None, *, crash_backoff: float = 0.0) -> tuple[list, int]:
    """Take back the tasks of dead owners. Returns ([(task, outcome, error), …], how many handlers outlive them).

    An owner is dead when its lock is free. While a handler of its still runs (it holds its output file's lock), its
    task is left alone; one that ended left its exit status, which counts. Otherwise the task is ready again after
    crash_backoff seconds, or buried when its attempts are spent.
    """
    conn, recovered, orphans = connect(state, create=False), [], 0
    with _ErrorsExplained(conn):
        claims = [(owner, queue) for (queue,) in conn.execute(QUEUES).fetchall()
                  for (owner,) in execute(conn, OWNERS, queue)]  # fmt: skip
    mine = _owners.get(conn.state, (None, None))[0]
    for owner in {owner for owner, _ in claims if owner != mine}:
        path, fd = conn.state / "workers" / os.path.basename(owner or NOBODY), None
        try:
            fd = lock_file(path, probe=True)
            if fd is None:
                continue  # alive
        except FileNotFoundError:
            pass  # nobody can hold what is not there
        except OSError:
            continue
        try:
            left = 0
            with transaction(conn):
                for queue in [queue for name, queue in claims if name == owner]:
                    for row in execute(conn, CLAIMED_BY, queue, owner=owner).fetchall():
                        done = _recover_task(conn, _task(queue, row), crash_backoff)
                        left += done is None
                        recovered += [done] if done else []
            orphans += left
            if not left:
                exits_file(conn.state, owner).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        finally:
            if fd is not None:
                os.close(fd)
    if recovered:
        wake(conn.state)
    return recovered, orphans


@lru_cache(64)
def exits_file(state: Path, owner: str | None) -> Path:
    """Where an owner's supervisor appends a line `run_name exit_code` as handlers end, and why if they were ended."""
    return state / "logs" / f"{os.path.basename(owner or NOBODY)}.exits"


def _recover_task(conn: Connection, task: Task, crash_backoff: float) -> tuple[Task, str, str | None] | None:
    """(task, outcome, error) of a dead owner's task, None while its handler runs."""
    run = f"{conn.state / 'logs' / task.run_name}"
    try:
        fd = lock_file(f"{run}.out", probe=True)
        if fd is None:
            return None
        os.close(fd)
    except OSError:
        pass  # it never started one
    exits = tail(str(exits_file(conn.state, task.owner)), RESULT_BYTES)  # complete: the lock is free
    end = re.search(rf"^{re.escape(task.run_name)} ([0-9]+)(?: (.+))?$", exits, re.MULTILINE)
    if end and (int(end[1]) <= 128 or end[2]):
        outcome, error = settle(conn, task, int(end[1]), why=end[2])
    elif end:  # it was killed: fell with its worker
        error = f"its worker died ({task.owner}), and its handler was killed by {signal_name(int(end[1]) - 128)}"
        outcome, error = settle(conn, task, int(end[1]), why=error, delay=crash_backoff)
    else:
        error = f"its worker died ({task.owner})"
        outcome = nack(conn, task, error=error, delay=crash_backoff)
    return task, outcome or "lost", error


_inherited: list[Connection] = []  # a child must not close its parent's connections: that would shut the parent's log


def _before_fork() -> None:
    """Close what can be closed: SQLite in a child would take its parent's locks on the same file for its own.

    That is the forking thread's connections and the watches'; they are opened again when wanted. Connections of other
    threads are left as they are: a program that uses the queue in threads should fork before that, or use subprocess.
    """
    for watch in list(Watch.instances.values()):
        watch._looking.acquire()
    idle = [*_thread.__dict__.get("connections", {}).values(), *(watch._conn for watch in Watch.instances.values())]
    for conn in idle:
        if conn in _connections and not conn.in_transaction:
            conn.file = None  # has connect() open another
            _connections.discard(conn)
            conn.close()
    _inherited.extend(_connections)


def _after_fork_in_parent() -> None:
    _inherited.clear()
    for watch in list(Watch.instances.values()):
        watch._looking.release()


def _after_fork_in_child() -> None:
    """A child opens its own connections, owns nothing of its parent's, and has no threads to wake it."""
    global _thread, _connections, _owners_lock, _making
    _thread, _connections, _owners_lock = threading.local(), WeakSet(), threading.Lock()
    _claims.clear()
    _making = threading.RLock()
    for _, fd in _owners.values():
        os.close(fd)
    _owners.clear()
    Watch.instances, Watch.lock = {}, threading.Lock()
    inotify = sys.modules.get("watchdog.observers.inotify_c")
    if hasattr(inotify, "InotifyFD"):  # watchdog 7 has one reader thread per process, and the child has not
        inotify.InotifyFD._instance, inotify.InotifyFD._global_lock = None, threading.Lock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


# ------------------------------------------------------------------------------------------------- waking the sleepers


def look_again(heard: threading.Event, look, pauses=LOOK_AGAIN_SECONDS) -> None:
    """Call look() at growing intervals until they have all passed without an event and without a change.

    Where one change follows the other, AFTER_A_CHANGE is where the intervals start: each look costs a reader's locks.

    watchdog reports the write to the write-ahead log, but that comes before the commit can be seen (write, fsync,
    then the shared index): whoever looks once per event misses one task in ten until the next event. An event that no
    change has followed is waited for longer: the disk may be slow.
    """
    step, owed_until = 0, 0.0
    while step < len(pauses) or time.monotonic() < owed_until:
        if heard.wait(pauses[min(step, len(pauses) - 1)]):
            heard.clear()
            step, owed_until = 0, time.monotonic() + SLOW_COMMIT_SECONDS
        else:
            step += 1
        if look():
            step, owed_until = AFTER_A_CHANGE, 0.0


def data_version(conn: Connection) -> tuple:
    """A value that changes whenever another connection's commit becomes visible."""
    return conn.file, conn.execute("pragma data_version").fetchone()[0]


def is_wake(path: str) -> bool:
    """Whether a write at this path may mean a commit."""
    return os.path.basename(path) in ("tasks.db-wal", "wake")


class Watch(threading.Thread):
    """Tells its listeners when another connection has changed the database; one per process and state directory.

    Listeners are objects with a set() method, held weakly. It also takes back the tasks of dead owners, the moment
    their lock files are closed, and notices a deleted or replaced state directory. Without file events it polls.
    """

    instances: dict[Path, Watch] = {}
    lock = threading.Lock()

    @classmethod
    def of(cls, state: Path | None = None) -> Watch:
        """The running watch of this process on state."""
        state = state or STATE_DIR
        with cls.lock:
            if state not in cls.instances:
                cls.instances[state] = cls(state)
                cls.instances[state].start()
            return cls.instances[state]

    def __init__(self, state: Path) -> None:
        super().__init__(name=f"watch {state}", daemon=True)
        self.state = state
        self.listeners: WeakSet = WeakSet()
        self.crash_backoff = 0.0  # seconds, for recover()
        self.on_recovered = lambda task, outcome, error: None
        self.on_deaf = lambda message: None  # file events cannot be had; called once
        self._heard = threading.Event()
        self._owner_closed_at = time.monotonic()  # so that the first looks recover
        self._recovered_at = 0.0
        self._orphans = 0
        self._seen, self._written = None, None
        self._looking, self._conn = threading.RLock(), None  # so that a fork does not take our connection along
        self._observer, self._watching, self._ear, self._deaf = None, None, None, False

    def notify(self) -> None:
        """Have every listener look."""
        for listener in list(self.listeners):
            listener.set()

    def dispatch(self, event) -> None:
        """Hear of a write; this makes us a handler of watchdog's."""
        path = os.fsdecode(event.dest_path or event.src_path)
        directory = os.path.dirname(path)
        if os.path.basename(directory) == "workers":
            self._owner_closed_at = time.monotonic()
            self._heard.set()
        elif is_wake(path) or os.path.basename(os.path.dirname(directory)) == "spool":
            self._heard.set()

    def run(self) -> None:
        while True:
            tick = SAFETY_TICK_SECONDS
            try:
                # While there is work, looking is cheaper than having watchdog report each write; the ears open again
                # once all has been quiet, and then we look as long again for what was written before they did.
                self._listen(False)
                look_again(self._heard, self._look, LOOK_AGAIN_SECONDS[:6])
                self._listen(True)
                quiet = self._seen
                look_again(self._heard, self._look)
                if self._observer is None:
                    continue
                while self._seen == quiet and not self._heard.wait(ORPHAN_TICK_SECONDS if self._orphans else tick):
                    self._refresh()
                    self.notify()
                    self._look()
            except Exception as error:
                if not isinstance(error, (QueueError, sqlite3.Error, OSError)):
                    self._report(error)
                self._stop_observing()  # the state directory is gone or in trouble: its users find out when they look
                self._seen = None
                self.notify()
                time.sleep(POLL_SECONDS)

    def _report(self, error: Exception) -> None:
        """Say what should not have happened: waking and recovery must outlive it."""
        import logging

        logging.getLogger(__name__).error("watching %s", self.state, exc_info=error)

    def _look(self) -> bool:
        """Pass on what can be seen now; whether there was anything."""
        with self._looking:
            self._conn = connect(self.state, create=False)
            version = data_version(self._conn)
        changed = version != self._seen
        if changed:
            self._seen = version
            self.notify()
        try:
            written = os.stat(f"{self.state}/tasks.db-wal").st_mtime_ns
        except OSError:
            written = None
        if written != self._written and not changed:
            self._heard.set()  # as if watchdog had said so: it is not listened to all the time
        self._written = written
        # The event of a dead owner's file comes a little before its lock is free; hence again for a while.
        now, tick = time.monotonic(), ORPHAN_TICK_SECONDS if self._orphans else SAFETY_TICK_SECONDS
        if now < self._owner_closed_at + OWNER_CLOSED_SECONDS or now > self._recovered_at + tick:
            recovered, self._orphans = recover(self.state, crash_backoff=self.crash_backoff)
            self._recovered_at = time.monotonic()
            for report in recovered:
                self.on_recovered(*report)
            if recovered:
                self.notify()
        return changed

    def _listen(self, wanted: bool) -> None:
        """Have the state directory watched, or not; workers and the spool always are. Without file events: wait."""
        self._refresh()
        if self._observer is None:
            time.sleep(POLL_SECONDS)
        elif wanted and self._ear is None:
            from watchdog.events import FileClosedEvent, FileModifiedEvent

            self._ear = self._observer.schedule(
                self, str(self.state), event_filter=[FileClosedEvent, FileModifiedEvent]
            )
        elif not wanted and self._ear is not None:
            self._observer.unschedule(self._ear)
            self._ear = None

    def _refresh(self) -> None:
        """Start to observe; anew when one of the directories was made, removed or replaced."""
        found = {}
        for directory in (self.state, make_private(self.state / "workers"), *spool_directories(self.state)):
            there = os.stat(directory)
            found[str(directory)] = (there.st_dev, there.st_ino)
        if found == self._watching:
            return
        self._stop_observing()
        self._watching = found
        try:
            from watchdog.events import FileClosedEvent, FileMovedEvent
            from watchdog.observers import Observer

            observer = Observer()
            for directory in found.keys() - {str(self.state)}:
                observer.schedule(self, directory, event_filter=[FileClosedEvent, FileMovedEvent])
            observer.daemon = True
            observer.start()
            self._observer = observer
        except (ImportError, OSError) as error:
            if not self._deaf:
                self.on_deaf(f"no file events ({error}): looking every {POLL_SECONDS * 1000:.0f} ms instead")
            self._deaf = True

    def _stop_observing(self) -> None:
        observer, self._observer, self._watching, self._ear = self._observer, None, None, None
        if observer is not None:
            observer.stop()


class WakeEvent:
    """What persist-queue's blocking get() waits on: a threading.Event that other processes set, too.

    clear() does nothing: persist-queue clears after it has looked, and would lose what came in between. Instead each
    thread remembers how far it has heard, and wait() returns at once when there was more.
    """

    def __init__(self, queue: str, state: Path) -> None:
        self._queue, self._state = queue, state
        self._changed, self._count = threading.Condition(), 0
        self._heard = threading.local()

    def set(self) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def clear(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> bool:
        """True when there is reason to look, False after timeout seconds."""
        Watch.of(self._state).listeners.add(self)
        timeout = sleep_seconds(connect(self._state), [self._queue], timeout)
        with self._changed:
            woken = self._changed.wait_for(lambda: self._count != getattr(self._heard, "count", -1), timeout)
            self._heard.count = self._count
            return woken


def sleep_seconds(conn: Connection, queues, longest: float | None = None) -> float:
    """How long a consumer may sleep if no event wakes it: until the next scheduled task, SAFETY_TICK_SECONDS at most."""
    now = time.time()
    due = [max(0.0, when - now) for when in (next_due(conn, queue) for queue in queues) if when is not None]
    return min([SAFETY_TICK_SECONDS if longest is None else longest, *due])


# -------------------------------------------------------------------------------------------------- the queue classes


def get_queue(queue_name: str, **options):
    """A persistqueue.SQLiteQueue whose get() hands a task over and finishes it: at most once.

    Options are persist-queue's; those that would break the shared table are ignored.
    """
    return _lazy("SQLiteQueue")(str(STATE_DIR), check_queue_name(queue_name), **options)


def get_ack_queue(queue_name: str, **options):
    """A persistqueue.SQLiteAckQueue: get() -> (id, json_text), then ack(id), nack(id) or ack_failed(id).

    Options: max_attempts (default 4), backoff (seconds, default 1), and persist-queue's.
    """
    return _lazy("SQLiteAckQueue")(str(STATE_DIR), name=check_queue_name(queue_name), **options)


def dequeue_task(queue_name: str, timeout: float | None = None) -> dict | None:
    """Take the next task and finish it: its envelope, or None when there is none.

    Waits up to timeout seconds for one; without a timeout it does not wait.
    """
    queue = get_queue(queue_name)
    try:
        task = queue.get_task(block=timeout is not None, timeout=timeout)
    except _lazy("Empty"):
        return None
    return task.envelope


async def _to_its_end(function, *args, **options):
    """(what a thread makes of a call, whether we were cancelled meanwhile): the call is never left half done."""
    import asyncio
    from functools import partial

    running = asyncio.get_running_loop().run_in_executor(None, partial(function, *args, **options))
    cancelled = False
    while True:
        try:
            return await asyncio.shield(running), cancelled
        except asyncio.CancelledError:
            if running.cancelled():
                raise
            cancelled = True


class Delivery:
    """A task that consume() hands out, with the fields of Task.

    Asking for the next one acks it. `async with` decides earlier: the block's end acks, an exception in it nacks and
    is logged, and the loop goes on.
    """

    def __init__(self, task: Task, conn_state: Path) -> None:
        self.task, self._state, self._settled = task, conn_state, False

    def __getattr__(self, name):
        return getattr(self.task, name)

    async def __aenter__(self) -> Delivery:
        return self

    async def __aexit__(self, kind, error, traceback) -> bool:
        import asyncio

        if kind is not None and not issubclass(kind, Exception):  # cancelled: not this task's fault
            self.settle_now(release)
            return False
        if error is not None:
            import logging

            logging.getLogger(__name__).error("queue %r: task %s failed", self.queue, self.task_id, exc_info=error)
            _, cancelled = await _to_its_end(self.settle, nack, error=f"{kind.__name__}: {error}")
        else:
            _, cancelled = await _to_its_end(self.settle, ack)
        if cancelled:
            raise asyncio.CancelledError
        return error is not None

    def settle_now(self, verb, **told) -> None:
        """settle(), without holding up the caller for longer than one wait for the lock; a thread tries again."""
        try:
            self.settle(verb, patient=False, **told)
        except QueueBusy:
            threading.Thread(target=self.settle, args=(verb,), kwargs=told, daemon=True).start()

    def settle(self, verb, patient: bool = True, **told) -> None:
        """Ack, nack or release, once; for as long as it takes, since nobody else may while this process lives."""
        while not self._settled:
            conn = connect(self._state)
            try:
                if self.task.owner != owner_name(self._state):
                    done = False  # a forked child's copy
                else:
                    with transaction(conn):
                        done = verb(conn, self.task, **told)
            except QueueBusy:
                if not patient:
                    raise
                continue
            self._settled = True
            if not done:
                not_held(conn, self.task)
            wake(self._state)


async def consume(queue_name: str, *, max_attempts: int = MAX_ATTEMPTS, backoff: float = BACKOFF_SECONDS):
    """Yield the queue's tasks for ever, as they come: `async for task in consume("approvals")`.

    Asking for the next task acks the one before; leaving the loop (an exception, break, cancellation) nacks it.
    Usable from many coroutines at once: each task goes to one.
    """
    import asyncio

    check_queue_name(queue_name)
    state, loop = STATE_DIR, asyncio.get_running_loop()
    heard = _LoopEvent(loop)
    Watch.of(state).listeners.add(heard)

    def next_task() -> tuple[Task | None, float]:
        conn = connect(state)
        ensure_queue(conn, queue_name)
        tasks = claim_ready(conn, queue_name, limit=1, max_attempts=max_attempts, backoff=backoff)
        return (tasks[0], 0.0) if tasks else (None, sleep_seconds(conn, [queue_name]))

    while True:
        heard.event.clear()
        (task, pause), cancelled = await _to_its_end(next_task)
        if cancelled:
            if task:
                Delivery(task, state).settle_now(release)
            raise asyncio.CancelledError
        if task is None:
            try:
                await asyncio.wait_for(heard.event.wait(), pause)
            except TimeoutError:
                pass
            continue
        delivery = Delivery(task, state)
        try:
            yield delivery
        except BaseException:
            delivery.settle_now(nack, error="its consumer left the loop")
            raise
        _, cancelled = await _to_its_end(delivery.settle, ack)
        if cancelled:
            raise asyncio.CancelledError


class _LoopEvent:
    """An asyncio.Event that the watch's thread may set."""

    def __init__(self, loop) -> None:
        import asyncio

        self.event, self._loop = asyncio.Event(), loop

    def set(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self.event.set)
        except RuntimeError:
            pass  # the loop is closed


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


_claims: dict[tuple[Path, str, int], Task] = {}  # of this process's ack queues: {(state, queue, row): task}


def _persistqueue_classes() -> dict:
    import persistqueue

    class JsonObjects:
        """persist-queue's serializer: JSON text in, the same text out."""

        @staticmethod
        def dumps(item, sort_keys: bool = False) -> str:
            if isinstance(item, (bytes, bytearray)):
                item = item.decode()
            if isinstance(item, str):
                return item  # the database checks it
            if not isinstance(item, dict):
                raise InvalidTask(f"a {type(item).__name__} was refused: put() takes a dict, or JSON text of an object")
            return to_json(item)

        @staticmethod
        def loads(text: str) -> str:
            return text

    class SharedTable:
        """What both classes do differently from persist-queue: the table is shared, and the database is asked.

        Counts are the database's; a claim is one transaction; connections belong to threads.
        """

        _KEY_COLUMN = "id"
        _SQL_INSERT = "insert into {table_name} (data, timestamp) values (?, ?)"

        def __init__(self, path=None, name: str = "default", multithreading: bool = True, timeout: float | None = None,
                     auto_commit: bool = True, serializer=None, db_file_name=None, **options) -> None:  # fmt: skip
            # multithreading, auto_commit, serializer and db_file_name are as the shared table needs them.
            self.state = Path(path or STATE_DIR).expanduser().absolute()
            check_queue_name(name)
            self.max_attempts = options.pop("max_attempts", MAX_ATTEMPTS)
            self.backoff = options.pop("backoff", BACKOFF_SECONDS)
            timeout = BUSY_TIMEOUT_MS / 1000 if timeout is None else timeout  # seconds, for the write lock
            super().__init__(path=str(self.state), name=name, multithreading=True, timeout=timeout,
                             serializer=JsonObjects, db_file_name="tasks.db", **options)  # fmt: skip

        def _init(self) -> None:
            self.tran_lock, self.action_lock = threading.Lock(), threading.Lock()
            ensure_queue(self._conn, self.name)
            self.put_event = WakeEvent(self.name, self.state)

        # persist-queue keeps two connections and a count; here a connection is the thread's, a count the database's.
        _conn = _getter = _putter = property(
            lambda self: connect(self.state, busy_timeout_ms=int(self.timeout * 1000)), lambda self, value: None
        )
        total = property(lambda self: self._count(), lambda self, value: None)

        @property
        def _table_name(self) -> str:
            return f'"{check_queue_name(self.name)}"'

        def _count(self) -> int:
            return execute(self._conn, COUNT_READY, self.name, now=time.time()).fetchone()[0]

        def empty(self) -> bool:
            return not has_ready(self._conn, self.name)

        def put(self, item, block: bool = True) -> int | None:
            """Store a dict or JSON text of an object; the row's id, None when its task_id is waiting or running."""
            conn, text = self._conn, self._serializer.dumps(item)
            ensure_queue(conn, self.name)
            with transaction(conn):
                cursor = conn.execute(on_queue(INSERT, self.name), (text, READY, None, 0))
                row_id = cursor.lastrowid if cursor.rowcount == 1 else None
            wake(self.state)
            return row_id

        put_nowait = put

        def get_task(self, block: bool = True, timeout: float | None = None) -> Task:
            """get(), as a Task."""
            self._as_task.wanted = True
            try:
                return self.get(block=block, timeout=timeout)
            finally:
                self._as_task.wanted = False

        _as_task = threading.local()

        def _hand_over(self, task: Task | None, raw: bool):
            if task is None or getattr(self._as_task, "wanted", False):
                return task
            if raw:
                return {"pqid": task.id, "data": task.text, "timestamp": task.enqueued_at}
            return self._plain(task)

        def close(self) -> None:
            """Nothing to close: connections are the threads', shared by their queues."""

        def __del__(self) -> None:
            pass

    class SQLiteQueue(SharedTable, persistqueue.SQLiteQueue):
        """persist-queue's SQLiteQueue on the shared table: get() hands the JSON text over and finishes the task."""

        def _plain(self, task: Task) -> str:
            return task.text

        def _pop(self, rowid: int | None = None, raw: bool = False):
            conn = self._conn
            if not has_ready(conn, self.name):
                return None
            with transaction(conn):
                while tasks := claim(conn, self.name, "get", row_id=rowid):
                    error = unreadable(tasks[0]) if getattr(self._as_task, "wanted", False) else None
                    if error is None:
                        ack(conn, tasks[0])
                        break
                    bury(conn, tasks[0], error=error)
            return self._hand_over(tasks[0] if tasks else None, raw)

    class SQLiteAckQueue(SharedTable, persistqueue.SQLiteAckQueue):
        """persist-queue's SQLiteAckQueue on the shared table: get() -> (id, json_text), then ack, nack or ack_failed.

        The row is this process's until then; if it dies, the task goes to another. nack() backs off, and a task whose
        attempts are spent goes to the history as failed.
        """

        def __init__(self, path=None, auto_resume: bool = True, **options) -> None:
            super().__init__(path, auto_resume=auto_resume, **options)

        def _plain(self, task: Task) -> tuple[int, str]:
            return task.id, task.text

        def resume_unack_tasks(self) -> None:
            """Take back the tasks of dead processes; those of living ones are theirs."""
            recover(self.state)

        def _pop(self, rowid: int | None = None, next_in_order: bool = False, raw: bool = False):
            conn = self._conn
            if next_in_order:
                row = execute(conn, NEXT_AFTER, self.name, id=rowid).fetchone()
                rowid = row[0] if row else None
            tasks = claim_ready(conn, self.name, row_id=rowid, max_attempts=self.max_attempts, backoff=self.backoff)
            for task in tasks:
                _claims[self.state, self.name, task.id], self._unack_cache[task.id] = task, task.text
            return self._hand_over(tasks[0] if tasks else None, raw)

        def _leave(self, verb, item, id, **told) -> int | bool:
            """The row's id; False when this process no longer holds it, or never did. Nothing changes then."""
            item, search = self._check_id(item, id)
            if isinstance(item, tuple) and len(item) == 2:
                item = item[0]
            row_id = item if isinstance(item, int) else self._find_item_id(item, search)
            conn, task = self._conn, _claims.get((self.state, self.name, row_id))
            if task is None:
                task = Task(self.name, row_id, None, None, None, None, 0, -1, None, None, None, "nobody", None)
            with transaction(conn):
                done = verb(conn, task, **told)
            _claims.pop((self.state, self.name, row_id), None)  # not before: it may have been busy, and is tried again
            self._unack_cache.pop(row_id, None)
            if not done:
                not_held(conn, task)
                return False
            wake(self.state)
            return row_id

        def ack(self, item=None, id: int | None = None) -> int | bool:
            return self._leave(ack, item, id)

        def nack(self, item=None, id: int | None = None, error: str = "nack") -> int | bool:
            return self._leave(nack, item, id, error=error)

        def ack_failed(self, item=None, id: int | None = None, error: str = "ack_failed") -> int | bool:
            return self._leave(bury, item, id, error=error)

        def unack_count(self) -> int:
            return execute(self._conn, COUNT_CLAIMED, self.name).fetchone()[0]

        def ready_count(self) -> int:
            return self._count()

        def acked_count(self) -> int:
            return self._conn.execute(COUNT_FINISHED, {"queue": self.name, "status": "completed"}).fetchone()[0]

        def ack_failed_count(self) -> int:
            return self._conn.execute(COUNT_FINISHED, {"queue": self.name, "status": "failed"}).fetchone()[0]

        def clear_acked_data(
            self, max_delete: int = 1000, keep_latest: int = 1000, clear_ack_failed: bool = False
        ) -> int:
            """Delete finished tasks of this queue from the history, all but the latest; how many."""
            values = {
                "queue": self.name,
                "failed": clear_ack_failed,
                "limit": max_delete or -1,
                "keep": keep_latest or 0,
            }
            with transaction(self._conn):
                return self._conn.execute(CLEAR_FINISHED, values).rowcount

    return {"SQLiteQueue": SQLiteQueue, "SQLiteAckQueue": SQLiteAckQueue, "Empty": persistqueue.Empty}


def _watchdog_classes() -> dict:
    from watchdog.events import FileSystemEventHandler

    class QueueWatcher(FileSystemEventHandler):
        """A watchdog handler that calls back when the queue has changed: QueueWatcher(QUEUE_PATH, callback).

        The callback takes nothing and drains the queue: several tasks may come with one call, and a call may find
        none. A coroutine function runs in the event loop in which this was made; made outside of one, in a loop of
        its own. Calls do not overlap.
        """

        def __init__(self, queue_path, callback) -> None:
            self.queue_path, self.callback = Path(queue_path).absolute(), callback
            connect(self.queue_path)  # so that there is something to watch
            self._heard, self._thread, self._seen, self._loop = threading.Event(), None, None, None
            if sys.modules.get("asyncio"):
                try:
                    self._loop = sys.modules["asyncio"].get_running_loop()
                except RuntimeError:
                    pass

        def on_modified(self, event) -> None:
            if is_wake(os.fsdecode(event.src_path)):
                self._heard.set()
                if self._thread is None:  # watchdog calls from one thread
                    self._thread = threading.Thread(
                        target=self._run, name=f"QueueWatcher {self.queue_path}", daemon=True
                    )
                    self._thread.start()

        on_closed = on_modified

        def _run(self) -> None:
            while self._heard.wait():
                look_again(self._heard, self._look)

        def _look(self) -> bool:
            try:
                version = data_version(connect(self.queue_path, create=False))
                changed = version != self._seen
                self._seen = version
                if changed:
                    self._call()
                return changed
            except QueueUnavailable:
                return False  # the database was removed; whoever makes the next one is heard
            except Exception:
                import logging

                logging.getLogger(__name__).exception("QueueWatcher(%s)", self.queue_path)
                return False

        def _call(self) -> None:
            result = self.callback()
            if hasattr(result, "__await__"):
                import asyncio

                async def whole():
                    return await result

                if self._loop is None or self._loop.is_closed():
                    asyncio.run(whole())
                else:
                    asyncio.run_coroutine_threadsafe(whole(), self._loop).result()

    return {"QueueWatcher": QueueWatcher}


_making = threading.RLock()


def _lazy(name: str):
    with _making:
        if name not in globals():
            globals().update(_watchdog_classes() if name == "QueueWatcher" else _persistqueue_classes())
        return globals()[name]


def __getattr__(name: str):
    """SQLiteQueue, SQLiteAckQueue, Empty and QueueWatcher, made when first asked for: their libraries are heavy."""
    if name in ("SQLiteQueue", "SQLiteAckQueue", "Empty", "QueueWatcher"):
        return _lazy(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
