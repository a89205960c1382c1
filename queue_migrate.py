"""Bringing a database to the present schema: bare tables that bash made, and databases of earlier versions.

Loaded by queue_helpers when a database needs it, and never otherwise.
"""

from __future__ import annotations

import json

import queue_helpers as q

LAST_ID = """
select max(id) from (
  select max(seq) as id from sqlite_sequence where name in (select value from json_each(:names))
  union all select max(id) from "{queue}.bare")"""


def has_bare_queue(conn: q.Connection) -> bool:
    """Whether a hook made one of the tables before any Python ran."""
    return any(is_bare_queue(conn, name) for name in q._tables(conn))


def migrate(conn: q.Connection) -> None:
    """Adopt the bare tables of a database that no Python has opened, within a transaction."""
    bare = [name for name in q._tables(conn) if is_bare_queue(conn, name)]
    for statement in q.HISTORY_SCHEMA.split(";\n"):
        conn.execute(statement)
    for queue in sorted({*q.DEFAULT_QUEUES, *bare}):
        if queue in bare:
            adopt(conn, queue)
        else:
            q.create_queue(conn, queue)
    q.create_view(conn)


def is_bare_queue(conn: q.Connection, table: str) -> bool:
    """Whether a hook made this table before any Python ran: id and data, and a name that a queue may have."""
    try:
        q.check_queue_name(table)
    except q.InvalidTask:
        return False
    return [row[1] for row in conn.execute(f'pragma table_info("{table}")')] == ["id", "data"]


def adopt(conn: q.Connection, queue: str) -> None:
    """Make the bare table that a hook made a queue's: rows and ids are kept.

    Rows that are no JSON object go to the history as failed. Raises QueueUnavailable when the table is none of ours.
    """
    if not is_bare_queue(conn, queue):
        raise q.QueueUnavailable(f"table {queue} in {conn.state / 'tasks.db'} is not a queue: use another queue name")
    conn.execute(f'alter table "{queue}" rename to "{queue}.bare"')
    q.create_queue(conn, queue)
    conn.execute(f"""insert into "{queue}" (id, data) select id, data from "{queue}.bare"
                     where case when {q.IS_OBJECT} then 1 end order by id""")
    conn.execute(f"""insert into task_history (queue, row_id, task_id, task_type, status, data, enqueued_at, error)
                     select '{queue}', id, '{queue}-' || id, '{queue}', 'failed', coalesce(cast(data as text), ''),
                            strftime('%Y-%m-%d %H:%M:%f', 'now'), 'was not a JSON object when the table was adopted'
                     from "{queue}.bare" where case when {q.IS_OBJECT} then 0 else 1 end""")
    names = json.dumps([queue, f"{queue}.bare"])
    (last_id,) = conn.execute(LAST_ID.format(queue=queue), {"names": names}).fetchone()
    conn.execute(f'drop table "{queue}.bare"')
    conn.execute("delete from sqlite_sequence where name = ?", (queue,))
    conn.execute("insert into sqlite_sequence (name, seq) values (?, ?)", (queue, last_id or 0))
