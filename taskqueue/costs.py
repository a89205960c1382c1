"""What runs cost, in dollars, and a queue's bound on that.

A handler tells its cost in a line of JSON on stdout: {"cost_usd": 0.42, …}. Each attempt that cost
something is a row of `task_costs`, with the moment at which it ended: rows of the history may be
pruned or retried, and a task may go on for days. A queue with a bound starts nothing once the costs
of the last day (or hour, or week) have reached it. Each running task has reserved its share of the
rest in `budget_usd`, so runs at the same time keep to the bound together.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import queue_helpers as q
from taskqueue.text import dollars

PERIODS: dict[str, float] = {"hour": 3_600, "day": 86_400, "week": 7 * 86_400}
# No handler's number beyond this is believed.
MOST_USD = 1e6
# Costs stay so long; the longest period is a week.
KEEP_SECONDS = 31 * 86_400
# The days that stats and the page show.
DAYS = 7

LIMIT = """
insert into task_controls (queue, bound_usd, bound_seconds) values (:queue, :usd, :seconds)
on conflict (queue) do update set bound_usd = excluded.bound_usd, bound_seconds = excluded.bound_seconds"""
LEFT = f"""
select bound_usd - {q.COUNTED}, slots, (select count(*) from "{{queue}}" where status = 2)
from task_controls where queue = '{{queue}}'"""
RESERVE = """
update "{queue}" set budget_usd = :usd where id = :id"""
# The newest cost with which the bound was reached: when it is too old to count, the queue goes on.
REACHED_WITH = """
select max(ended_at) from (
  select ended_at, sum(cost_usd) over (order by ended_at desc, id desc rows unbounded preceding) as since_then
  from task_costs where queue = :queue and ended_at > :now - :seconds and ended_at < :now + :seconds)
where round(since_then, 6) >= :usd"""
SPENT = """
select total(cost_usd) from task_costs
where queue = :queue and ended_at > :now - :seconds and ended_at < :now + :seconds"""
TOLD_BEFORE = """
select total(told_usd) from task_costs where queue = :queue and row_id = :id and ended_at >= :since"""
RESERVED = f"""
select budget_usd from "{{queue}}" where id = :id and {q.HAS_BOUND}"""
RECORD = """
insert into task_costs (queue, row_id, ended_at, cost_usd, told_usd, at_least)
values (:queue, :id, :now, :cost, :told, :at_least)"""
PER_DAY = """
select queue, date(ended_at, 'unixepoch', 'localtime') as day, sum(cost_usd), max(at_least) from task_costs
where ended_at > :since group by 1, 2 order by 1, 2 desc"""
OLD = """
select id from task_costs where ended_at < :before limit :limit"""
PRUNE = f"""
delete from task_costs where id in ({OLD})"""


class Bound(NamedTuple):
    """What the runs of a queue may cost in so many seconds, and what they have cost."""

    usd: float
    seconds: float
    spent: float

    def __str__(self) -> str:
        return f"{dollars(self.spent)} of {dollars(self.usd)} {self.period} are spent"

    @property
    def period(self) -> str:
        names = {
            seconds: f"{'an' if name == 'hour' else 'a'} {name}"
            for name, seconds in PERIODS.items()
        }
        return names.get(self.seconds, f"in {self.seconds:g} s")


# ---------------------------------------------------------------------------------------- the bound


def parse(text: str) -> tuple[float, float] | None:
    """Return (dollars, seconds) of a bound like 20/day; None for "none". Raises ValueError."""
    if text == "none":
        return None
    found = re.fullmatch(r"\$?([0-9]+(?:\.[0-9]+)?|\.[0-9]+)/(hour|day|week)", text)
    usd = float(found[1]) if found else 0.0
    if not found or not 0 < usd <= MOST_USD:
        raise ValueError(f"{text!r} is not a bound like 20/day, 0.50/hour or 100/week, nor none")
    return usd, float(PERIODS[found[2]])


def limit(conn: q.Connection, queue: str, bound: tuple[float, float] | None) -> None:
    """Have a queue's runs cost at most so many dollars in so many seconds, within a transaction."""
    usd, seconds = bound or (None, None)
    conn.execute(LIMIT, {"queue": q.check_queue_name(queue), "usd": usd, "seconds": seconds})


def look(
    conn: sqlite3.Connection, queue: str, usd: float, seconds: float
) -> tuple[Bound, float | None]:
    """Return a queue's Bound, and when it goes on if the bound is reached (Unix seconds)."""
    which = {"queue": queue, "now": time.time(), "usd": usd, "seconds": seconds}
    (spent,) = conn.execute(SPENT, which).fetchone()
    (moment,) = conn.execute(REACHED_WITH, which).fetchone()
    return Bound(usd, seconds, spent), None if moment is None else moment + seconds


def goes_on(conn: q.Connection, queue: str) -> float | None:
    """Return when a queue goes on whose bound is reached; None where it is not."""
    bound = "select bound_usd, bound_seconds from task_controls where queue = ? and bound_usd > 0"
    row = conn.execute(bound, (queue,)).fetchone()
    return row and look(conn, queue, *row)[1]


# ----------------------------------------------------------------------------------------- the runs


def reserve(conn: q.Connection, queue: str, tasks: Sequence[q.Task], places: int) -> None:
    """Give each task that was just claimed its share of what is left, within that transaction.

    `places` is how many tasks the claimer has room for. A task's own budget may be smaller.
    """
    for task in tasks:
        q.execute(conn, RESERVE, queue, id=task.id, usd=None)
    left, slots, running = q.execute(conn, LEFT, queue, now=time.time()).fetchone()
    if slots is not None:
        places = min(places, slots - running + len(tasks))
    share = max(left, 0.0) / max(places, len(tasks))
    for task in tasks:
        q.execute(conn, RESERVE, queue, id=task.id, usd=min(share, left_of_own(conn, task)))


def left_of_own(conn: q.Connection, task: q.Task) -> float:
    """Return what earlier attempts have left of the task's own max_budget_usd; infinity without one."""
    own = None
    # To read all of a large payload costs more than this look.
    if '"max_budget_usd"' in task.text:
        # Bash may have stored JSON that Python finds too deep.
        with suppress(ValueError, RecursionError):
            own = number(task.data.get("max_budget_usd"))
    return math.inf if own is None else max(own - told_before(conn, task), 0.0)


def told_before(conn: q.Connection, task: q.Task) -> float:
    """Return what the task's earlier attempts said that they cost."""
    which = {"queue": task.queue, "id": task.id, "since": task.enqueued_at}
    return conn.execute(TOLD_BEFORE, which).fetchone()[0]


def environment(conn: q.Connection, task: q.Task) -> dict[str, str]:
    """Return the variables by which a handler knows what its run may cost, and what others did."""
    found = {}
    row = q.execute(conn, RESERVED, task.queue, id=task.id).fetchone()
    if row and row[0] is not None:
        found["TASK_BUDGET_USD"] = f"{row[0]:.9g}"
    if told := told_before(conn, task):
        found["TASK_SPENT_USD"] = f"{told:.9g}"
    return found


def record(conn: q.Connection, task: q.Task, result: str, log: str, exited: bool) -> None:
    """Record what an attempt cost, before its end is, within that transaction.

    `result` and `log` are the ends of its output; `exited` tells whether the handler ended by itself. One that did not, or that says
    {"cost_usd": null}, left no result: it counts its whole budget, else the last cost that it showed.
    """
    said = cost_in(result)
    if exited and said is None:
        return
    told = number((said or {}).get("cost_usd"))
    values = {"queue": task.queue, "id": task.id, "now": time.time(), "at_least": False}
    if told is not None and (exited or (said or {}).get("stopped") is True):
        conn.execute(RECORD, values | {"cost": told, "told": told})
        return
    if told is None:
        told = number((cost_in(log) or {}).get("cost_usd"))
    (reserved,) = q.execute(conn, RESERVED, task.queue, id=task.id).fetchone() or (None,)
    budget = left_of_own(conn, task)
    if budget < math.inf:
        budget = max(min(budget, math.inf if reserved is None else reserved), told or 0.0)
        conn.execute(RECORD, values | {"cost": budget, "told": told})
    elif told is not None:
        conn.execute(RECORD, values | {"cost": told, "told": told, "at_least": True})


def cost_in(printed: str) -> dict | None:
    """Return the last line that is a JSON object with a "cost_usd", or all of the text if it is one."""
    if '"cost_usd"' not in printed:
        return None
    for text in (*reversed(printed.splitlines()), printed):
        with suppress(ValueError, RecursionError):
            said = json.loads(text) if '"cost_usd"' in text else None
            if isinstance(said, dict) and "cost_usd" in said:
                return said
    return None


def number(value: object) -> float | None:
    """Return an amount of dollars, or None for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_USD:
        return float(value)
    return None


# --------------------------------------------------------------------------------------- the numbers


def per_day(conn: sqlite3.Connection) -> dict[str, list[dict]]:
    """Return the costs of each queue, a dict for each day that had some, the newest first."""
    days: dict[str, list[dict]] = {}
    midnight = time.mktime((*time.localtime()[:3], 0, 0, 0, 0, 0, -1))
    since = midnight - (DAYS - 1) * 86_400
    for queue, day, usd, at_least in conn.execute(PER_DAY, {"since": since}):
        told = {"day": day, "cost_usd": round(usd, 6), "at_least": bool(at_least)}
        days.setdefault(queue, []).append(told)
    return days
