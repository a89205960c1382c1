"""How many tasks wait, run and ended, per queue and type, and how long they took."""

from __future__ import annotations

import time
from contextlib import nullcontext

import queue_helpers as q
from taskqueue import cli
from taskqueue import serving as serving_of
from taskqueue.cli import FINISHED, LIVE
from taskqueue.outcome import Control
from taskqueue.serving import WAITING

HOUR, DAY = 3_600, 86_400
# Medians and percentiles are made of so many finished tasks of a queue, type and status, the
# newest.
SAMPLE = 2_000

COUNT_BY_TYPE = {
    status: f"""
select coalesce(task_type, '{{queue}}'), count(*), min(timestamp) from "{{queue}}" where {condition}
group by task_type"""
    for status, condition in LIVE.items()
}
# The + keeps SQLite from picking an index by that column: the one wanted is the one that has the
# order.
COUNT_FINISHED = """
select queue, task_type, status, count(*), sum(completed_at >= :hour_ago) from task_history
where +completed_at >= :day_ago group by queue, task_type, status"""
NEWEST_TIMES = """
select completed_at, (julianday(started_at) - julianday(enqueued_at)) * 86400.0,
       (julianday(completed_at) - julianday(started_at)) * 86400.0
from task_history
where queue = :queue and task_type = :task_type and status = :status and completed_at >= :day_ago and started_at is not null
order by completed_at desc limit :sample"""


def gather(conn: q.Connection | cli.Reader) -> dict:
    """{"at", "serving": [queue, …], "remarks": [line, …], "queues": {queue: {…numbers, what holds it
    back, "types": {type: {…numbers}}}}}, of one state of the database.

    "serving" are the queues that a worker serves; "remarks" name the waiting tasks that nobody will
    run. Raises sqlite3.Error.
    """
    with nullcontext() if conn.in_transaction else cli.snapshot(conn):
        return _gather(conn, time.time())


def _gather(conn: q.Connection | cli.Reader, now: float) -> dict:
    ago = {"hour_ago": q.utc(now - HOUR), "day_ago": q.utc(now - DAY)}
    types: dict[str, dict[str, dict]] = {}
    controls = q.controls(conn)
    serving = cli.served(conn.state, cli.queues_of(conn))
    for queue in cli.queues_of(conn):
        types[queue] = {}
        for name, statement in COUNT_BY_TYPE.items():
            for task_type, tasks, oldest in conn.execute(q.on_queue(statement, queue)):
                numbers = types[queue].setdefault(as_name(task_type), zeros())
                numbers[name] += tasks
                if name == "pending" and isinstance(oldest, (int, float)):
                    age = min(max(now - oldest, 0.0), float(q.LAST_SECOND))
                    numbers["oldest_pending_seconds"] = round(age, 3)
    samples: dict[tuple[str, str], list] = {}
    for queue, task_type, name, day, hour in conn.execute(COUNT_FINISHED, ago).fetchall():
        numbers = types.setdefault(as_name(queue), {}).setdefault(as_name(task_type), zeros())
        numbers[f"{name}_day"], numbers[f"{name}_hour"] = day, hour
        if name in ("completed", "failed"):
            which = {
                "queue": queue,
                "task_type": task_type,
                "status": name,
                "sample": SAMPLE,
                **ago,
            }
            names = (as_name(queue), as_name(task_type))
            samples.setdefault(names, []).extend(conn.execute(NEWEST_TIMES, which))
    queues = {}
    for queue in sorted(types):
        total, of_queue = zeros(), []
        for task_type, numbers in sorted(types[queue].items()):
            newest = newest_of(samples.get((queue, task_type), []))
            numbers |= times(newest)
            of_queue += newest
            for name, value in numbers.items():
                if isinstance(value, int):
                    # A database may know an end that is not known here.
                    total[name] = total.get(name, 0) + value
        oldest = [
            n["oldest_pending_seconds"]
            for n in types[queue].values()
            if n["oldest_pending_seconds"] is not None
        ]
        total["oldest_pending_seconds"] = max(oldest, default=None)
        total |= times(newest_of(of_queue))
        queues[queue] = {
            **total,
            **held_back(controls.get(queue)),
            "types": dict(sorted(types[queue].items())),
        }
    waiting = {
        queue: [name for name, n in numbers["types"].items() if any(n[each] for each in WAITING)]
        for queue, numbers in queues.items()
    }
    remarks = serving_of.remarks(conn, conn.state, {k: v for k, v in waiting.items() if v})
    return {"at": q.utc(now), "serving": serving, "remarks": remarks, "queues": queues}


def as_name(value: object) -> str:
    """A queue or task type as text: a writer that checks nothing may have stored anything."""
    return value if isinstance(value, str) else str(value)


def held_back(control: Control | None) -> dict:
    """What holds a queue back; paused_until is UTC text, null where only a person resumes it."""
    paused, until, reason, by, slots = control or (False, None, None, None, None)
    told = {"paused": paused, "paused_until": None if until is None else q.utc(until)}
    return {**told, "pause_reason": reason, "paused_by": by, "slots": slots}


def zeros() -> dict:
    counts = {name: 0 for name in LIVE} | {
        f"{name}_{when}": 0 for name in FINISHED for when in ("hour", "day")
    }
    return counts | {"oldest_pending_seconds": None, "wait_seconds": None, "run_seconds": None}


def newest_of(sample: list) -> list:
    """The newest (completed_at, waited, ran), but those whose times are none: bash may have written
    them.
    """
    known = [row for row in sample if None not in row]
    return sorted(known, key=lambda row: str(row[0]), reverse=True)[:SAMPLE]


def times(sample: list) -> dict:
    """Median and 95th percentile of finished tasks' (completed_at, waited, ran)."""
    if not sample:
        return {}
    waited, ran = (sorted(max(0.0, row[column]) for row in sample) for column in (1, 2))
    return {
        name: {"median": percentile(values, 0.5), "p95": percentile(values, 0.95)}
        for name, values in (("wait_seconds", waited), ("run_seconds", ran))
    }


def percentile(ordered: list[float], share: float) -> float:
    place = (len(ordered) - 1) * share
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return round(low + (high - low) * (place - int(place)), 3)
