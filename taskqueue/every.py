"""Recurring tasks: `tq every NAME '0 9 * * 1-5' QUEUE TYPE`.

A row of task_every says what comes when. A worker of the queue enqueues the task once its time has
come, and writes the next time in the same transaction: two workers make one task, and a worker that
is killed loses none. That time is a row of its own, and no scheduled task, since a task that runs or
waits has the name's id then, and --on-duplicate decides between the two.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable
from datetime import UTC, datetime, tzinfo
from typing import NamedTuple

import queue_helpers as q
from taskqueue.times import parse_duration

# A clock that was set back by more is believed, and the next time follows from it. Else what fired
# already would fire once more.
STEP_SECONDS = 86_400
WHICH = "is_on and queue in (select value from json_each(:queues))"
STEPPED = f"set_at > :now + {STEP_SECONDS}"
NEXT = f"""
select min(iif({STEPPED}, 0, next_at)) from task_every where {WHICH}"""
DUE = f"""
select name, queue, task_type, data, schedule, terms, next_at, {STEPPED} from task_every
where {WHICH} and (next_at <= :now or {STEPPED})"""
TYPES = "select distinct queue, task_type from task_every where is_on"
FIRED = """
update task_every set next_at = :next, set_at = :now, last_at = iif(:fires, :now, last_at)
where name = :name and next_at = :seen and is_on"""


class Due(NamedTuple):
    """A recurring task whose time has come; `stepped`: only its next time is to be set anew."""

    name: str
    queue: str
    task_type: str
    data: str
    schedule: str
    terms: str
    next_at: float
    stepped: int


# ------------------------------------------------------------------------------------------ the times


def next_time(schedule: str, now: float, last: float | None = None) -> float:
    """Return when a schedule comes next after `now`, in Unix seconds.

    `last` is the time for which it came last: an interval keeps its beat. Raises ValueError.
    """
    if schedule[:1].isdigit() and len(schedule.split()) == 1:
        seconds = parse_duration(schedule)
        if seconds < 1:
            raise ValueError(f"{schedule!r} is less than a second")
        first = now if last is None else last
        return first + seconds * max(1, math.floor((now - first) / seconds) + 1)
    try:
        from cronsim import CronSim, CronSimError
    except ImportError:
        raise ValueError("the package cronsim is missing: uv brings it along") from None
    if len(schedule.split()) != 5:
        raise ValueError(f"{schedule!r} has not the five fields of cron, and is no duration")
    try:
        for moment in CronSim(schedule, datetime.fromtimestamp(now, local_zone())):
            # In the hour that comes twice, cronsim may name the first one again.
            if moment.timestamp() > now:
                return moment.timestamp()
    except CronSimError as error:
        raise ValueError(f"{schedule!r}: {error}") from None
    raise ValueError(f"{schedule!r} never comes")


def local_zone() -> tzinfo:
    """Return the local time zone with its rules; datetime alone knows the present offset only.

    Raises ValueError for a TZ that names no zone.
    """
    from zoneinfo import ZoneInfo

    name = os.environ.get("TZ", "").lstrip(":")
    try:
        if name and not os.path.isabs(name):
            return ZoneInfo(name)
        with open(name or "/etc/localtime", "rb") as file:
            return ZoneInfo.from_file(file)
    except (OSError, ValueError, LookupError):
        if name:
            raise ValueError(f"TZ={name!r} names no time zone, like Europe/Berlin") from None
        return UTC


# ----------------------------------------------------------------------------------------- the worker


def fire(conn: q.Connection, queues: Iterable[str]) -> float:
    """Enqueue the tasks of these queues whose time has come; return when the next one comes.

    The time is in Unix seconds; math.inf: never. Raises QueueError, and ValueError for a schedule
    that cannot be read; the others have fired then.
    """
    names = json.dumps(list(queues))
    if (found := next_of(conn, names)) > time.time():
        return found
    trouble = None
    for row in conn.execute(DUE, {"queues": names, "now": time.time()}).fetchall():
        due = Due(*row)
        try:
            fire_one(conn, due, time.time())
        except (ValueError, ImportError) as error:
            trouble = ValueError(f"every {due.name}: {error}")
    q.wake(conn.state)
    if trouble:
        raise trouble
    return next_of(conn, names)


def next_of(conn: q.Connection, names: str) -> float:
    """Return when the next task of these queues, a JSON list, comes; 0 after a step of the clock."""
    (found,) = conn.execute(NEXT, {"queues": names, "now": time.time()}).fetchone()
    return math.inf if found is None else found


def types(conn: sqlite3.Connection) -> dict[str, set[str]]:
    """Return the types of what recurs in each queue: {queue: types}."""
    found: dict[str, set[str]] = {}
    for queue, task_type in conn.execute(TYPES):
        found.setdefault(queue, set()).add(task_type)
    return found


def is_due(conn: q.Connection, queues: Iterable[str]) -> bool:
    """Return whether a recurring task of these queues has its time come."""
    return next_of(conn, json.dumps(list(queues))) <= time.time()


def fire_one(conn: q.Connection, due: Due, now: float) -> None:
    """Enqueue a recurring task and set its next time, unless another worker has done so."""
    next_at = next_time(due.schedule, now, None if due.stepped else due.next_at)
    told = {"name": due.name, "seen": due.next_at, "next": next_at, "now": now}
    q.ensure_queue(conn, due.queue)
    with q.transaction(conn):
        if conn.execute(FIRED, {**told, "fires": not due.stepped}).rowcount and not due.stepped:
            q.store(conn, due.queue, row_of(due))


def row_of(due: Due) -> q.Row:
    """Return the task of a firing. Raises InvalidTask."""
    terms = json.loads(due.terms)
    try:
        return q.new_row(due.task_type, json.loads(due.data), due.name, depth=0, **terms)
    except TypeError as error:
        raise q.InvalidTask(f"terms {due.terms}: {error}") from None
