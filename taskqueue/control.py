"""What holds a whole queue back: a pause, a number of slots, and a bound on its costs."""

from __future__ import annotations

import sqlite3
import time
from typing import TYPE_CHECKING, NamedTuple

import queue_helpers as q
from taskqueue import costs

if TYPE_CHECKING:
    from taskqueue.database import Reader

# The later end of two pauses wins; one without an end is later than any.
PAUSE = """
insert into task_controls (queue, paused_at, paused_until, pause_reason, paused_by)
values (:queue, :now, :until, :reason, :by)
on conflict (queue) do update set paused_at = excluded.paused_at, paused_until = excluded.paused_until,
  pause_reason = excluded.pause_reason, paused_by = excluded.paused_by
where paused_at is null or paused_until <= :now or 2 * paused_at - paused_until > :now + 1 or paused_until is not null
  and (excluded.paused_until is null or excluded.paused_until > paused_until)"""
RESUME = """
update task_controls set paused_at = null, paused_until = null, pause_reason = null, paused_by = null
where queue = :queue and paused_at is not null"""
LIMIT = """
insert into task_controls (queue, slots) values (:queue, :slots)
on conflict (queue) do update set slots = excluded.slots"""
CONTROLS = """
select queue, paused_at, paused_until, pause_reason, paused_by, slots, bound_usd, bound_seconds from task_controls"""


class Control(NamedTuple):
    """The pause, the slots and the bound of a queue; times are Unix seconds.

    A queue whose bound is reached is paused, too, `by` its "costs".
    """

    paused: bool
    until: float | None
    reason: str | None
    by: str | None
    slots: int | None
    bound: costs.Bound | None = None


def pause_queue(
    conn: q.Connection, queue: str, until: float | None, reason: str | None, *, by: str
) -> bool:
    """Hold back a queue's claims, within a transaction; return whether this pause holds.

    `until` is in Unix seconds, or None: until a person resumes the queue. `by` is "person" or
    "handler". A pause with a later end stays instead.
    """
    told = {"queue": q.check_queue_name(queue), "now": time.time(), "until": until}
    return conn.execute(PAUSE, {**told, "reason": reason or None, "by": by}).rowcount == 1


def resume_queue(conn: q.Connection, queue: str) -> bool:
    """End a queue's pause, within a transaction; return whether there was one."""
    return conn.execute(RESUME, {"queue": q.check_queue_name(queue)}).rowcount == 1


def limit_slots(conn: q.Connection, queue: str, slots: int | None) -> None:
    """Have at most `slots` of the queue's tasks run at a time, None for any number.

    Within a transaction. Raises InvalidTask.
    """
    if slots is not None and (type(slots) is not int or not 1 <= slots < 2**31):
        raise q.InvalidTask(f"slots {slots!r} was refused: it is a whole number from 1 on")
    conn.execute(LIMIT, {"queue": q.check_queue_name(queue), "slots": slots})


def controls_of(conn: q.Connection | Reader) -> dict[str, Control]:
    """Return the Control of each queue that is paused, or has slots or a bound."""
    now, found = time.time(), {}
    try:
        rows = conn.execute(CONTROLS).fetchall()
    except sqlite3.Error as error:
        raise q.explain(error, conn.state) from error
    for queue, paused_at, until, reason, by, slots, usd, seconds in rows:
        paused = paused_at is not None and (
            until is None or until > now and 2 * paused_at - until <= now + 1
        )
        told = (until, reason, by) if paused else (None, None, None)
        bound, goes_on = costs.look(conn, queue, usd, seconds) if usd else (None, None)
        if goes_on is not None and not paused:
            paused, told = True, (goes_on, str(bound), "costs")
        if paused or slots is not None or bound:
            found[queue] = Control(paused, *told, slots, bound)
    return found
