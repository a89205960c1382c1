"""Retry, cancel, move and delete tasks, one at a time.

A function that changes one task returns None, or why the task was left as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import queue_helpers as q
from taskqueue import after, database, recovery
from taskqueue.database import LIVE
from taskqueue.find import Found, history_ids, live_id, newest_record
from taskqueue.jsonlines import columns_of, envelope_of
from taskqueue.remedies import as_typed, command
from taskqueue.text import sh

# How often cancel looks whether a run has ended.
POLL_SECONDS = 0.05
# A worker has made its run's output file by then; a consumer of the person's own makes none.
CONSUMER_SECONDS = 1.0
# A worker, or another machine, has these.
NOT_HERE = {"in_progress", "handed_over"}

# --------------------------------------------------------------------------------------- statements

CLAIMED_TASK = """
select status, {task} from "{queue}" where id = :id"""
STILL_RUNS = """
select exists (select 1 from "{queue}" where id = :id and status = 2 and owner is :owner and attempts = :attempts)"""
REQUEST_CANCEL = """
update "{queue}" set cancel_requested = 1, rerun = null
where id = :id and owner is :owner and attempts = :attempts"""
# It may wait as long as it likes then.
START_NOW = """
update "{queue}" set status = 1, due_at = null, delayed_at = null, released_at = null, expires_at = null
where id = :id and status = 3 and due_at is not null"""
FAILED = """
select id, queue, task_id from task_history
where status = 'failed' and completed_at >= :since and (:queue is null or queue = :queue)
  and (:task_type is null or task_type = :task_type) order by completed_at, id"""
RETRYING = """
select id, coalesce(task_id, '{queue}-' || id) from "{queue}"
where status = 3 and released_at is not null and due_at is not null and (:task_type is null or task_type = :task_type)
order by released_at, id"""
IS_DEAD_LETTER = """
select exists (select 1 from task_history where id = :id and queue = :queue and task_id = :task_id and status = 'failed')"""


WAITING_ROW = """
select task_id, task_type, timestamp, data from "{queue}" where id = :id and status not in (2, 5)"""
# A blocked task is put as a ready one: the other queue's groups decide.
MOVE = """
insert into "{{to}}" (data, timestamp, status, {{columns}})
select :data, timestamp, iif(status = 4, 1, status), {{columns}} from "{queue}" where id = :id"""
WAITING_IDS = """
select id, coalesce(task_id, '{queue}-' || id) from "{queue}"
where {{condition}} and (:task_type is null or task_type = :task_type) and (:before is null or timestamp <= :before)
order by id"""
FINISHED_IDS = """
select id, completed_at from task_history where status = :status and queue = :queue
  and (:before is null or completed_at <= :before) and (:task_type is null or task_type = :task_type)"""
DELETE_WAITING = """
delete from "{queue}" where id = :id and ({{condition}})"""
DELETE_FINISHED = """
delete from task_history where id = :id and queue = :queue and completed_at = :completed_at"""


def why_not_held(conn: q.Connection, found: Found) -> str:
    """Say that a task which was to be approved or rejected is not held."""
    status = database.status_of(conn, found.queue, found.row_id)
    return f"it is {status}, not held" if status else "it has ended already"


# -------------------------------------------------------------------------------------------- retry


def dead_letters(
    conn: q.Connection, queue: str | None, task_type: str | None, since: float | None
) -> dict[Found, int]:
    """Return the failed tasks and their history ids, of one queue and type where these are given.

    `since` is the Unix time after which they failed.
    """
    which = {"queue": queue, "task_type": task_type, "since": "" if since is None else q.utc(since)}
    rows = conn.execute(FAILED, which)
    return {Found(name, task_id, None): history_id for history_id, name, task_id in rows}


def waiting_for_retry(conn: q.Connection, queue: str | None, task_type: str | None) -> list[Found]:
    """Return the tasks that failed and wait for their next attempt."""
    queues = [queue] if queue else database.queues_of(conn)
    return [
        Found(name, task_id, row_id)
        for name in queues
        for row_id, task_id in q.execute(conn, RETRYING, name, task_type=task_type).fetchall()
    ]


def retry(conn: q.Connection, found: Found, dead_letter: int | None) -> str | None:
    """Put an ended task back into its queue, or make a scheduled one ready.

    `dead_letter` is the history id to retry; None stands for the task's last record.
    """
    if found.queue not in database.queues_of(conn):
        return "its queue is gone"
    row_id = live_id(conn, found.queue, found.task_id)
    if row_id is None:
        return retry_ended(conn, found, dead_letter)
    if not dead_letter and q.execute(conn, START_NOW, found.queue, id=row_id).rowcount == 1:
        return None
    status = database.status_of(conn, found.queue, row_id)
    if status == "held":
        return f"it is held for a person: {command('approve')} {found.task_id}"
    return f"a task of this id is waiting or running already ({status})"


def retry_ended(conn: q.Connection, found: Found, dead_letter: int | None) -> str | None:
    """Put a task that is in the history alone back into its queue."""
    if found.row_id is not None:
        return "it has run or gone meanwhile"
    record = dead_letter or next(iter(history_ids(conn, found)), None)
    key = {"id": record, "queue": found.queue, "task_id": found.task_id}
    # If another process was faster, the record is gone, and another task's may have its id by now.
    if record is None or dead_letter and not conn.execute(IS_DEAD_LETTER, key).fetchone()[0]:
        return "it was retried already, purged or pruned"
    if q.redrive(conn, found.queue, record):
        return None
    why = "its data is no JSON object any more, or its row another task's"
    return f"{why}: {command('show')} {found.task_id}"


# ------------------------------------------------------------------------------------------- cancel


def cancel(conn: q.Connection, found: Found, deadline: float) -> str | None:
    """Cancel a task; wait for a running one to end, until `deadline` (of time.monotonic)."""
    if found.row_id is None:
        return f"it has ended already ({newest_record(conn, found)['status']})"
    while row := q.execute(conn, CLAIMED_TASK, found.queue, id=found.row_id).fetchone():
        status, task = row[0], q.Task.from_row(found.queue, row[1:])
        if status == q.HANDED_OVER:
            request_cancel(conn, task)
            pull = as_typed("relay.py pull")
            return f"another machine has it; {pull} has that machine end it"
        if status != q.CLAIMED and end_waiting(conn, task):
            return None
        why = end_run(conn, task, deadline) if status == q.CLAIMED else None
        if why:
            return why
    ended = newest_record(conn, found)["status"]
    return None if ended == "cancelled" else f"it ended before that ({ended})"


def key_of(task: q.Task) -> dict:
    return {"id": task.id, "owner": task.owner, "attempts": task.attempts}


def request_cancel(conn: q.Connection, task: q.Task) -> None:
    """Have the task's owner end its run."""
    with q.transaction(conn):
        q.execute(conn, REQUEST_CANCEL, task.queue, **key_of(task))
    q.wake(conn.state)


def end_waiting(conn: q.Connection, task: q.Task) -> bool:
    """End a waiting task as cancelled. Return False if a worker has claimed it meanwhile."""
    with q.transaction(conn):
        q.execute(conn, REQUEST_CANCEL, task.queue, **key_of(task))
        done = q.finish(conn, task, "cancelled", error="cancelled while it waited")
    if done:
        q.wake(conn.state)
    return done


def end_run(conn: q.Connection, task: q.Task, deadline: float) -> str | None:
    """Have a run ended, and wait for that. Return why it goes on, or None when it is over."""
    output = conn.state / "logs" / f"{task.run_name}.out"
    began, is_asked = time.monotonic(), False
    while q.execute(conn, STILL_RUNS, task.queue, **key_of(task)).fetchone()[0]:
        if not is_asked and output.exists():
            request_cancel(conn, task)
            is_asked = True
        now = time.monotonic()
        if not is_asked and now > began + CONSUMER_SECONDS:
            pid = (task.owner or q.NOBODY).split("-")[0]
            return (
                f"process {pid} claimed it itself, without a handler (get_ack_queue or the like): "
                "only that process can end it"
            )
        if is_asked and now > deadline:
            return why_not_ended(conn, task)
        # The task of a dead worker waits again then, or has ended.
        if not q.recover(conn.state)[0]:
            time.sleep(POLL_SECONDS)
    return None


def why_not_ended(conn: q.Connection, task: q.Task) -> str:
    """Say why a run that was told to end goes on."""
    if recovery.is_dead(conn.state, task.owner):
        output = sh(conn.state / "logs" / f"{task.run_name}.out")
        return f"its worker is dead and its handler goes on; see who holds: fuser -v {output}"
    return f"its worker {task.owner} was told, and has not ended it yet; it will, unless it hangs"


# ----------------------------------------------------------------------------------- move and purge


def waiting_in(conn: q.Connection, queue: str, task_type: str | None) -> list[Found]:
    """Return the waiting tasks of a queue, held and blocked ones among them."""
    which = {"task_type": task_type, "before": None}
    statement = q.on_queue(WAITING_IDS, queue).format(condition="status not in (2, 5)")
    return [Found(queue, task_id, row_id) for row_id, task_id in conn.execute(statement, which)]


def move(conn: q.Connection, found: Found, to: str) -> str | None:
    """Move a waiting task to another queue, with all that is set for it."""
    row = q.execute(conn, WAITING_ROW, found.queue, id=found.row_id).fetchone()
    if row is None:
        return "it is running, handed over, or gone"
    task_id, task_type, timestamp, data = row
    if task_id is None:
        # A bare payload is called after its queue: an envelope keeps that name.
        data = envelope_of(found.task_id, task_type, timestamp, data)
    columns = ", ".join(columns_of(conn, found.queue))
    statement = q.on_queue(MOVE, found.queue).format(to=to, columns=columns)
    inserted = conn.execute(statement, {"id": found.row_id, "data": data})
    if inserted.rowcount != 1:
        return f"a task of this id is waiting or running in {to}"
    after.moved(conn, found, to, inserted.lastrowid)
    statement = q.on_queue(DELETE_WAITING, found.queue).format(condition="status not in (2, 5)")
    conn.execute(statement, {"id": found.row_id})
    return None


class Doomed(NamedTuple):
    """A task to delete. `ended` is when a finished one completed, else None."""

    status: str
    row_id: int
    ended: str | None


def to_purge(
    conn: q.Connection,
    queue: str,
    statuses: Sequence[str],
    task_type: str | None,
    before: float | None,
) -> list[Doomed]:
    """Return the tasks of these statuses; `before` is the Unix time of their enqueueing or end."""
    doomed = []
    for status in statuses:
        which = {"task_type": task_type, "before": before, "status": status, "queue": queue}
        if status in LIVE:
            statement = q.on_queue(WAITING_IDS, queue).format(condition=LIVE[status])
            doomed += [Doomed(status, row_id, None) for row_id, _ in conn.execute(statement, which)]
        else:
            which["before"] = None if before is None else q.utc(before)
            doomed += [Doomed(status, *row) for row in conn.execute(FINISHED_IDS, which)]
    return doomed


def deletable(statuses: Sequence[str]) -> dict[str, str]:
    """Return, for each live status, the condition under which a task found in it may be deleted.

    A task that a person approved or retried meanwhile stays. A blocked one becomes pending when
    the one before it is deleted, so those statuses stand for each other.
    """
    fixed = [name for name in ("held", "handed_over") if name in statuses]
    others = [name for name in statuses if name in LIVE and name not in fixed]
    any_of = " or ".join(LIVE[name] for name in others)
    return dict.fromkeys(others, any_of) | {name: LIVE[name] for name in fixed}


def delete(conn: q.Connection, queue: str, doomed: Doomed, conditions: dict[str, str]) -> int:
    """Delete a task that is still as it was found; return how many that were."""
    if doomed.ended is not None:
        key = {"id": doomed.row_id, "queue": queue, "completed_at": doomed.ended}
        return conn.execute(DELETE_FINISHED, key).rowcount
    statement = q.on_queue(DELETE_WAITING, queue).format(condition=conditions[doomed.status])
    return conn.execute(statement, {"id": doomed.row_id}).rowcount
