"""Bring a database to the present schema: one of an earlier version, or bare tables that bash made.

There is one way: each table is made anew, and its rows are copied. Loaded by queue_helpers when a
database needs it, and never otherwise.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time

import queue_helpers as q

# A rebuild of this many rows is worth a line.
TELL_FROM_ROWS = 50_000
LAST_ID = """
select max(id) from (
  select max(seq) as id from sqlite_sequence where name in (:queue, :queue || '.old')
  union all select max(id) from "{queue}.old")"""
# First what has its group's turn, then in order.
COPY = """
insert or ignore into {table} ({columns}) select {values} from {old} where {which} order by {order}"""
TURNS_FIRST = "status is not 2, released_at is null, id"
LEFT_OUT = f"""
select * from "{{queue}}.old" where id not in (select id from "{{queue}}") and case when {q.IS_OBJECT} then 1 end"""
HOLD = """
insert or ignore into "{queue}" (id, data, status, error) values (:id, :data, 3, :error)"""
BURY = """
insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)
select '{queue}', id, '{queue}-' || id, '{queue}', 'failed', coalesce(cast(data as text), ''),
       strftime('%Y-%m-%d %H:%M:%f', 'now'), :error
from "{queue}.old" where id not in (select id from "{queue}")"""
REFUSED = "was not a JSON object when its table was taken over, or another task had its task_id"
# Columns that had another name or form before.
RERUN_BEFORE = "iif(rerun_data is null, null, json_array(rerun_data, 1, null, priority, group_id, null, timestamp, null))"
# In version 1, a person had set these aside.
SET_ASIDE_BEFORE = {
    "status": "iif(status = 4, 3, status)",
    "due_at": "iif(status = 4, null, due_at)",
}
SHARED = ("task_history", "task_controls")
PAUSED_BEFORE = """
insert into task_controls (queue, paused_at, paused_by)
select queue, coalesce((julianday(paused_at) - 2440587.5) * 86400.0, 0.0), 'person' from task_paused"""
PAUSED_ODDLY = """
insert or ignore into task_controls (queue, paused_at, pause_reason, paused_by)
select queue, (julianday('now') - 2440587.5) * 86400.0, 'its pause or its slots could not be read', 'person'
from "task_controls.old" """


def check(conn: q.Connection, version: int) -> None:
    """Raise QueueUnavailable unless a database of another version can be brought to the present one."""
    db = conn.state / "tasks.db"
    if version > q.SCHEMA_VERSION:
        raise q.QueueUnavailable(
            f"{db} has schema version {version}, these scripts know {q.SCHEMA_VERSION}: update them"
        )
    tables = q.table_names(conn)
    is_ours = "task_history" in tables if version else any(is_bare(conn, name) for name in tables)
    if not is_ours:
        raise q.QueueUnavailable(f"{db} is not a task queue's database; check TASK_QUEUE_STATE")


def rebuild(conn: q.Connection) -> None:
    """Bring a database to the present schema, within a transaction."""
    queues, began = [queue for (queue,) in conn.execute(q.QUEUES)], time.monotonic()
    tables = q.table_names(conn)
    shared = [name for name in SHARED if name in tables]
    bare = [name for name in tables if is_bare(conn, name)]
    rows = sum(
        conn.execute(f'select count(*) from "{name}"').fetchone()[0] for name in queues + shared
    )
    tell = logging.getLogger(__name__).warning if rows >= TELL_FROM_ROWS else lambda *_: None
    tell(
        "bringing %s to schema version %d: %s rows are written anew, which takes a minute for some "
        "millions; it happens once, and what is enqueued meanwhile waits or goes to the spool",
        *(conn.state / "tasks.db", q.SCHEMA_VERSION, f"{rows:,}"),
    )
    conn.execute("drop view if exists task_queue")
    for table in shared:
        set_aside(conn, table)
    q.run_statements(conn, q.HISTORY_SCHEMA.format(last_second=q.LAST_SECOND))
    for queue in {*q.DEFAULT_QUEUES} - {*queues, *bare}:
        q.create_queue(conn, queue)
    for table in shared:
        copy(conn, table, "rowid")
    if "task_controls" in shared:
        conn.execute(PAUSED_ODDLY)
    for table in shared:
        conn.execute(f'drop table "{table}.old"')
    if "task_paused" in tables:
        conn.execute(PAUSED_BEFORE)
        conn.execute("drop table task_paused")
    for queue in (*queues, *bare):
        rebuild_queue(conn, queue)
    q.create_view(conn)
    tell("the rows are written anew after %.1f s", time.monotonic() - began)


def adopt(conn: q.Connection, queue: str) -> None:
    """Make the bare table that a hook made a queue's, within a transaction: rows and ids are kept.

    Raises QueueUnavailable when the table is none of ours.
    """
    if not is_bare(conn, queue):
        raise q.QueueUnavailable(
            f"table {queue} in {conn.state / 'tasks.db'} is not a queue: use another queue name"
        )
    rebuild_queue(conn, queue)


def is_bare(conn: q.Connection, table: str) -> bool:
    """Return whether a hook made this table before any Python ran: id and data, and a queue's name."""
    try:
        q.check_queue_name(table)
    except q.InvalidTask:
        return False
    return [row[1] for row in conn.execute(f'pragma table_info("{table}")')] == ["id", "data"]


def rebuild_queue(conn: q.Connection, queue: str) -> None:
    """Make a queue's table anew, rows and ids kept, and the next row's id, too.

    A row that breaks a CHECK is held, and its error says why; one that is no task goes to the history.
    """
    set_aside(conn, queue)
    q.create_queue(conn, queue)
    columns = copy(conn, queue, TURNS_FIRST, f"case when {q.IS_OBJECT} then 1 end")
    refused = conn.execute(LEFT_OUT.format(queue=queue))
    names = [column[0] for column in refused.description]
    for row in refused.fetchall():
        hold(conn, queue, columns, dict(zip(names, row, strict=True)))
    conn.execute(BURY.format(queue=queue), {"error": REFUSED})
    (last_id,) = conn.execute(LAST_ID.format(queue=queue), {"queue": queue}).fetchone()
    conn.execute(f'drop table "{queue}.old"')
    conn.execute("delete from sqlite_sequence where name = ?", (queue,))
    conn.execute("insert into sqlite_sequence (name, seq) values (?, ?)", (queue, last_id or 0))


def set_aside(conn: q.Connection, table: str) -> None:
    """Rename a table to TABLE.old, without its indexes and triggers, whose names are wanted."""
    parts = conn.execute(
        "select type, name from sqlite_master where tbl_name = ? and type in ('index', 'trigger') and sql is not null",
        (table,),
    ).fetchall()
    for kind, name in parts:
        conn.execute(f'drop {kind} "{name}"')
    conn.execute(f'alter table "{table}" rename to "{table}.old"')


def copy(conn: q.Connection, table: str, order: str, which: str = "true") -> dict[str, str]:
    """Copy the rows of TABLE.old, but what the schema refuses; {column: value} that was copied."""
    old = settable(conn, f"{table}.old")
    columns = {name: name for name in settable(conn, table) if name in old}
    if "rerun_data" in old:
        columns |= {"rerun": RERUN_BEFORE, "delayed_at": "released_at"}
    elif "status" in old and table not in SHARED and "released_at" not in old:
        columns |= SET_ASIDE_BEFORE
    # A column that the old table does not have orders nothing.
    order = ", ".join(part for part in order.split(", ") if part.split()[0] in {*old, "rowid"})
    parts = {"columns": ", ".join(columns), "values": ", ".join(columns.values()), "which": which}
    conn.execute(COPY.format(table=f'"{table}"', old=f'"{table}.old"', order=order, **parts))
    return columns


def settable(conn: q.Connection, table: str) -> list[str]:
    """Return the columns of a table but the generated ones."""
    return [row[1] for row in conn.execute(f'pragma table_xinfo("{table}")') if not row[6]]


def hold(conn: q.Connection, queue: str, columns: dict[str, str], row: dict) -> None:
    """Store a row that the schema refuses as a held task, if it is not a duplicate; its error says why."""
    names = [name for name in columns if name in row]
    statement = (
        f'insert into "{queue}" ({", ".join(names)}) values ({", ".join(f":{n}" for n in names)})'
    )
    try:
        conn.execute(statement, row)
    except sqlite3.IntegrityError as error:
        odd = {name: value for name, value in row.items() if value and name in names[2:]}
        why = f"held, since an earlier version stored what is refused now ({error}): {json.dumps(odd, default=repr)}"
        told = {"id": row["id"], "data": row["data"], "error": why}
        conn.execute(HOLD.format(queue=queue), told)
