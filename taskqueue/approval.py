"""Held tasks: a person approves or rejects them.

A task is held because it was enqueued so, or because its handler asks (exit 75 and a last line
{"hold": "reason", "data": {…}}). `asks` has the fields that approval puts into its payload; {} means
that the handler cannot say which, so that the person must. A task that asks keeps its group's turn:
`released_at` says since when.
"""

from __future__ import annotations

import json
import time
from typing import NamedTuple

import queue_helpers as q
from taskqueue.remedies import command
from taskqueue.text import sh

HELD_ROW = """
select {task}, asks, released_at, error from "{queue}" where id = :id and status = 3 and due_at is null"""
ASK = f"""
update "{{queue}}"
set status = 3, due_at = null, delayed_at = null, released_at = :now, owner = null, claimed_at = null, cancel_requested = 0,
    attempts = max(attempts - 1, 0), error = :reason, asks = :asks
{q.FENCE}"""
# An approved task is ready, or blocked where its group is busy: the triggers see to that.
APPROVE = """
update "{queue}" set status = 1, data = :data, asks = null, error = iif(released_at is null, error, null), released_at = null
where id = :id and status = 3 and due_at is null"""


class Held(NamedTuple):
    """A held task, and what its handler asks for: None where it does not ask."""

    task: q.Task
    asks: dict | None
    reason: str | None
    since: float | None

    @property
    def needs_fields(self) -> bool:
        """Return whether the person must say which fields to change."""
        return self.asks == {}


def ask(conn: q.Connection, task: q.Task, reason: str | None, asks: dict | None) -> bool:
    """Have a claimed task wait for a person, within a transaction; this attempt does not count.

    Returns False when the task's owner does not hold it any more.
    """
    held = q.execute(
        conn,
        ASK,
        task.queue,
        id=task.id,
        owner=task.owner,
        attempts=task.attempts,
        claimed_at=task.claimed_at,
        now=time.time(),
        reason=reason,
        asks=None if asks is None else q.to_json(asks),
    ).rowcount
    if held:
        # The report tells of it.
        q.end_quiet(conn.state)
    return held == 1


def held(conn: q.Connection, queue: str, row_id: int) -> Held | None:
    """Return a held task, None if it is not held."""
    row = q.execute(conn, HELD_ROW, queue, id=row_id).fetchone()
    if row is None:
        return None
    *task, asks, since, reason = row
    return Held(q.Task.from_row(queue, tuple(task)), asks and json.loads(asks), reason, since)


def approve(
    conn: q.Connection,
    queue: str,
    row_id: int,
    change: dict | None = None,
    seen: Held | None = None,
) -> bool:
    """Have a held task run in its turn, within a transaction. False when it is not held.

    `change` replaces top-level fields of the payload, instead of those that the task asks for; a field
    that becomes null goes. With `seen`, a task that is not as the person saw it is left alone. Raises
    InvalidTask where the person has to name the fields.
    """
    found = held(conn, queue, row_id)
    if found is None or seen not in (None, found):
        return False
    if change is None and found.needs_fields:
        how = f"{command('approve')} {sh(found.task.task_id)} --with '{{…}}'"
        raise q.InvalidTask(f"no exact rule allows what it wants, so name the fields: {how}")
    change = found.asks if change is None else change
    text = changed(found.task, change or {})
    return q.execute(conn, APPROVE, queue, id=row_id, data=text).rowcount == 1


def reject(conn: q.Connection, queue: str, row_id: int, reason: str | None = None) -> bool:
    """End a held task as cancelled, within a transaction. False when it is not held."""
    found = held(conn, queue, row_id)
    error = f"rejected: {reason}" if reason else "rejected"
    return found is not None and q.finish(conn, found.task, "cancelled", error=error)


def changed(task: q.Task, change: dict) -> str:
    """Return a task's data with other fields in its payload, as it is stored. Raises InvalidTask."""
    if not change:
        return task.text
    if why := task.unreadable():
        raise q.InvalidTask(f"its {why}, so no field can change")
    envelope = task.envelope
    envelope["data"] = merged(envelope["data"], change)
    if isinstance(envelope.get("granted"), dict):
        # A person grants what a hook's payload may not.
        envelope["granted"] = merged(envelope["granted"], change)
    return q.to_json(envelope)


def merged(fields: dict, change: dict) -> dict:
    gone = {name for name, value in change.items() if value is None}
    return {name: value for name, value in {**fields, **change}.items() if name not in gone}


def difference(before: dict, after: dict) -> dict:
    """Return the change that makes one payload the other."""
    gone = {name: None for name in before if name not in after}
    return gone | {name: value for name, value in after.items() if before.get(name) != value}


def lines_of(payload: dict, change: dict) -> list[str]:
    """Return what a change does, a line for each field: "model: "a" → "b"."""
    lines = []
    for name, value in change.items():
        before, after = (json.dumps(each, ensure_ascii=False) if each is not None else "not set"
                         for each in (payload.get(name), value))  # fmt: skip
        lines.append(f"{name}: {before} → {after}")
    return lines
