"""Bringing a database to the present schema: bare tables that bash made, and databases of earlier
versions.

Loaded by queue_helpers when a database needs it, and never otherwise.
"""

from __future__ import annotations

import json
import logging
import time

import queue_helpers as q

LAST_ID = """
select max(id) from (
  select max(seq) as id from sqlite_sequence where name in (select value from json_each(:names))
  union all select max(id) from "{queue}.old")"""
REFUSED = "was not a JSON object when its table was taken over, or another task had its task_id"


def has_bare_queue(conn: q.Connection) -> bool:
    """Whether a hook made one of the tables before any Python ran."""
    return any(is_bare_queue(conn, name) for name in q.table_names(conn))


def check(conn: q.Connection, version: int, may_migrate: bool) -> None:
    """Raise QueueUnavailable unless a database that is not of the present version can be brought to
    it.
    """
    db = conn.state / "tasks.db"
    if version > q.SCHEMA_VERSION:
        raise q.QueueUnavailable(
            f"{db} has schema version {version}, these scripts know {q.SCHEMA_VERSION}: update them"
        )
    tables = q.table_names(conn)
    if not (has_bare_queue(conn) if version == 0 else "task_history" in tables):
        raise q.QueueUnavailable(f"{db} is not a task queue's database; check TASK_QUEUE_STATE")
    if version and not may_migrate:
        raise q.QueueUnavailable(
            f"{db} has schema version {version}, and a hook does not wait for its migration to version "
            f"{q.SCHEMA_VERSION}: the next worker does it"
        )


def migrate(conn: q.Connection, version: int) -> None:
    """Bring a database to the present schema, within a transaction that has seen its version."""
    if version == 0:
        adopt_all(conn)
    else:
        from_1_to_2(conn)


def adopt_all(conn: q.Connection) -> None:
    """Adopt the bare tables of a database that no Python has opened."""
    bare = [name for name in q.table_names(conn) if is_bare_queue(conn, name)]
    q.create_all(conn, sorted({*q.DEFAULT_QUEUES} - {*bare}))
    for queue in bare:
        adopt(conn, queue)
    q.create_view(conn)


# What a queue's table of version 1 has, and how version 2 stores it. Version 1 checked none of
# these: a task whose time is none that can come, and one that somebody had set aside as blocked,
# are held, so that a person sees them.
COLUMNS_OF_1 = """id, data, timestamp, status, priority, due_at, group_id, attempts, owner, claimed_at,
  max_attempts, backoff, then_queue, cancel_requested, error"""
VALUES_OF_1 = f"""id, data, timestamp, iif(status = 4, 3, status),
  max(-1000000, min(1000000, cast(priority as integer))),
  iif(status <> 4 and typeof(due_at) = 'real' and due_at <= {q.LAST_SECOND}, max(due_at, 0.0), null),
  iif(typeof(group_id) = 'text' and length(group_id) between 1 and 500, group_id, null), attempts, owner,
  claimed_at, max_attempts, backoff, then_queue, cancel_requested, error"""
HISTORY_OF_1 = """id, queue, row_id, task_id, task_type, status, data, priority, group_id, attempts, max_attempts,
  enqueued_at, started_at, completed_at, exit_code, result, log, error"""
PAUSED_OF_1 = """
insert into task_controls (queue, paused_at, paused_by)
select queue, coalesce((julianday(paused_at) - 2440587.5) * 86400.0, 0.0), 'person' from task_paused"""
# A migration of this many rows is worth a line.
TELL_FROM_ROWS = 50_000


def from_1_to_2(conn: q.Connection) -> None:
    """Groups, expiry, held tasks, slots; task_id and task_type are stored, and fewer indexes."""
    queues, began = [queue for (queue,) in conn.execute(q.QUEUES)], time.monotonic()
    rows = sum(count_rows(conn, name) for name in (*queues, "task_history"))
    tell = logging.getLogger(__name__).warning if rows >= TELL_FROM_ROWS else lambda *_: None
    tell(
        "bringing %s to schema version 2: %s rows are written anew, which takes a minute for some "
        "millions; it happens once, and what is enqueued meanwhile waits or goes to the spool",
        conn.state / "tasks.db",
        f"{rows:,}",
    )
    conn.execute("drop view if exists task_queue")
    for index in ("completed_at", "type", "task_id", "failed"):
        conn.execute(f'drop index if exists "task_history.{index}"')
    conn.execute("alter table task_history rename to task_history_1")
    q.run_statements(conn, q.HISTORY_SCHEMA)
    conn.execute(f"""insert into task_history ({HISTORY_OF_1})
                     select {HISTORY_OF_1} from task_history_1 order by id""")
    conn.execute("drop table task_history_1")
    for queue in queues:
        rebuild_queue(conn, queue)
    conn.execute(PAUSED_OF_1)
    conn.execute("drop table task_paused")
    q.create_view(conn)
    tell("the rows are written anew after %.1f s", time.monotonic() - began)


def count_rows(conn: q.Connection, table: str) -> int:
    return conn.execute(f'select count(*) from "{table}"').fetchone()[0]


def rebuild_queue(conn: q.Connection, queue: str) -> None:
    """Copy a queue's table of version 1 into one of the present version."""
    for index in ("ready", "type", "claimed", "scheduled", "blocked"):
        conn.execute(f'drop index if exists "{queue}.{index}"')
    conn.execute(f'alter table "{queue}" rename to "{queue}.old"')
    q.create_queue(conn, queue)
    # First what runs: it has its group's turn.
    copy_rows(conn, queue, COLUMNS_OF_1, VALUES_OF_1, "status = 2")
    copy_rows(conn, queue, COLUMNS_OF_1, VALUES_OF_1, "status is not 2")
    drop_old(conn, queue)


def copy_rows(conn: q.Connection, queue: str, columns: str, values: str, which: str) -> None:
    """Copy rows of QUEUE.old into QUEUE, but what its constraints refuse: see drop_old()."""
    conn.execute(f"""insert or ignore into "{queue}" ({columns}) select {values} from "{queue}.old"
                     where {which} and case when {q.IS_OBJECT} then 1 end order by id""")


def drop_old(conn: q.Connection, queue: str) -> None:
    """Drop QUEUE.old, whose rows are copied; what is not in QUEUE goes to the history as failed.

    The next row's id follows the last one that the old table gave.
    """
    conn.execute(f"""insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)
                     select '{queue}', id, '{queue}-' || id, '{queue}', 'failed', coalesce(cast(data as text), ''),
                            strftime('%Y-%m-%d %H:%M:%f', 'now'), '{REFUSED}'
                     from "{queue}.old" where id not in (select id from "{queue}")""")
    names = json.dumps([queue, f"{queue}.old"])
    (last_id,) = conn.execute(LAST_ID.format(queue=queue), {"names": names}).fetchone()
    conn.execute(f'drop table "{queue}.old"')
    conn.execute("delete from sqlite_sequence where name = ?", (queue,))
    conn.execute("insert into sqlite_sequence (name, seq) values (?, ?)", (queue, last_id or 0))


def is_bare_queue(conn: q.Connection, table: str) -> bool:
    """Whether a hook made this table before any Python ran: id and data, and a name that a queue
    may have.
    """
    try:
        q.check_queue_name(table)
    except q.InvalidTask:
        return False
    return [row[1] for row in conn.execute(f'pragma table_info("{table}")')] == ["id", "data"]


def adopt(conn: q.Connection, queue: str) -> None:
    """Make the bare table that a hook made a queue's: rows and ids are kept.

    Rows that are no JSON object go to the history as failed. Raises QueueUnavailable when the table
    is none of ours.
    """
    if not is_bare_queue(conn, queue):
        raise q.QueueUnavailable(
            f"table {queue} in {conn.state / 'tasks.db'} is not a queue: use another queue name"
        )
    conn.execute(f'alter table "{queue}" rename to "{queue}.old"')
    q.create_queue(conn, queue)
    copy_rows(conn, queue, "id, data", "id, data", "true")
    drop_old(conn, queue)
