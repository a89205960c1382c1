"""Have tasks wait for the end of others (`tq add --after ID`).

A row of task_after is a task that waits: its status is 6, or it is held. When the other one ends, a
trigger notes there how; settle() then releases or cancels the one that waits, in the same transaction.
"""

from __future__ import annotations

import queue_helpers as q

if q.TYPE_CHECKING:
    from taskqueue.find import Found

# A task without an id of its own is called QUEUE-ROW.
ROW_ID = """
select id from "{queue}" where task_id = :task_id or id = :number and task_id is null"""
LAST_END = """
select status || coalesce(': ' || error, '') from task_history where queue = :queue and task_id = :task_id order by id desc limit 1"""
WAIT = """
insert or ignore into task_after (after_queue, after_id, after_task, queue, row_id, whatever)
values (:after_queue, :after_id, :after_task, :queue, :row_id, :whatever)"""
HOLD_BACK = """
update "{queue}" set status = 6 where id = :id and (status <> 3 or due_at is not null)
  and exists (select 1 from task_after where queue = '{queue}' and row_id = :id)"""
MOVED = (
    "update task_after set queue = :to, row_id = :new where queue = :queue and row_id = :id",
    "update task_after set after_queue = :to, after_id = :new where after_queue = :queue and after_id = :id",
)
GONE = """
from task_after where after_queue = '{queue}' and ended is null and not exists (select 1 from "{queue}" where id = after_id)"""
IS_GONE = f"select exists (select 1 {GONE})"
NOTE_GONE = f"""
update task_after set ended = 'deleted' where (after_queue, after_id, queue, row_id) in
  (select after_queue, after_id, queue, row_id {GONE} limit {q.AT_ONCE})"""
NEXT_ENDED = """
select after_queue, after_id, after_task, queue, row_id, whatever, ended from task_after where ended is not null limit 1"""
FORGET = """
delete from task_after where after_queue = ? and after_id = ? and queue = ? and row_id = ?"""
WAITING = """
select {task} from "{queue}" where id = :id and (status = 6 or status = 3 and due_at is null)"""
# One with a time becomes due in its turn, and the triggers see to its group.
RELEASE = """
update "{queue}" set status = iif(due_at is null, 1, 3) where id = :id and status = 6
  and not exists (select 1 from task_after where queue = '{queue}' and row_id = :id)"""


class NothingToWaitFor(q.InvalidTask):
    """There is no task to wait for, or its end forbids this one."""

    exit_code = 64


def store(conn: q.Connection, queue: str, row: q.Row) -> q.Stored:
    """Store a task that waits for others, within a transaction. Raises NothingToWaitFor."""
    named = [*((ident, False) for ident in row.after), *((ident, True) for ident in row.after_any)]
    links = [link_to(conn, ident, whatever) for ident, whatever in named]
    stored = q.store(conn, queue, row._replace(after=(), after_any=()))
    if stored.is_new:
        row_id = row_of(conn, queue, row.task_id)
        for link in filter(None, links):
            conn.execute(WAIT, {**link, "queue": queue, "row_id": row_id})
        q.execute(conn, HOLD_BACK, queue, id=row_id)
    return stored


def row_of(conn: q.Connection, queue: str, task_id: str) -> int | None:
    """Return the row of a task that has not ended."""
    number = task_id.removeprefix(f"{queue}-")
    told = {"task_id": task_id, "number": int(number) if number.isdecimal() else None}
    return (q.execute(conn, ROW_ID, queue, **told).fetchone() or [None])[0]


def link_to(conn: q.Connection, ident: str, whatever: bool) -> dict | None:
    """Return the task to wait for, as WAIT takes it, or None if it has ended as it should.

    `ident` is its id, or QUEUE/ID. Raises NothingToWaitFor.
    """
    queues = [name for (name,) in conn.execute(q.QUEUES)]
    of_queue, slash, task_id = ident.partition("/")
    if slash and of_queue in queues:
        queues = [of_queue]
    else:
        task_id = ident
    found = []
    for queue in queues:
        row_id = row_of(conn, queue, task_id)
        ended = conn.execute(LAST_END, {"queue": queue, "task_id": task_id}).fetchone()
        if row_id or ended:
            found.append((queue, row_id, ended))
    if len(found) != 1:
        several = ", ".join(f"{queue}/{task_id}" for queue, *_ in found)
        why = f"several tasks have this id: give {several}" if found else "no task has this id"
        raise NothingToWaitFor(f"after {ident}: {why}")
    queue, row_id, ended = found[0]
    if row_id:
        return {"after_queue": queue, "after_id": row_id, "after_task": task_id} | {
            "whatever": whatever
        }
    if whatever or ended[0].startswith("completed"):
        return None
    anyway = "with --after-any this task runs all the same"
    raise NothingToWaitFor(f"after {ident}: that task has ended as {ended[0]}; {anyway}")


def moved(conn: q.Connection, found: Found, to: str, row_id: int | None) -> None:
    """Follow a task that moves to another queue, within a transaction: those that wait still do."""
    for statement in MOVED:
        conn.execute(statement, {"queue": found.queue, "id": found.row_id, "to": to, "new": row_id})
    q.execute(conn, HOLD_BACK, to, id=row_id)


def settle(conn: q.Connection) -> int:
    """Release or cancel tasks whose predecessor has ended, AT_ONCE at most, within a transaction.

    Returns how many. sweep() sees to the rest.
    """
    for number in range(q.AT_ONCE):
        link = conn.execute(NEXT_ENDED).fetchone()
        if link is None:
            return number
        after_queue, after_id, after_task, queue, row_id, whatever, ended = link
        conn.execute(FORGET, (after_queue, after_id, queue, row_id))
        if whatever or ended == "completed":
            q.execute(conn, RELEASE, queue, id=row_id)
            continue
        waiting = q.execute(conn, WAITING, queue, id=row_id).fetchone()
        if waiting:
            error = f"not run: task {after_task} of {after_queue} {ended}"
            q.finish(conn, q.Task.from_row(queue, waiting), "cancelled", error=error, settles=False)
    return q.AT_ONCE


def sweep(conn: q.Connection) -> None:
    """Settle the tasks whose predecessor was deleted, and those that one transaction left over."""
    names = [name for (name,) in conn.execute("select distinct after_queue from task_after")]
    gone = [name for name in names if q.execute(conn, IS_GONE, name).fetchone()[0]]
    more = gone or names and conn.execute(NEXT_ENDED).fetchone()
    while more:
        with q.transaction(conn):
            noted = sum(q.execute(conn, NOTE_GONE, name).rowcount for name in gone)
            more = settle(conn) or noted
    if gone:
        q.wake(conn.state)
