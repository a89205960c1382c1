"""Find tasks, by an id or by conditions, and count them."""

from __future__ import annotations

import heapq
import json
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import queue_helpers as q
from taskqueue import costs, database, serving
from taskqueue.cli import Refused, Unknown
from taskqueue.control import Control, controls_of
from taskqueue.database import FINISHED, LIVE
from taskqueue.remedies import command

# The number of a row in a list.
ROW = r"[1-9]\d{0,3}"
# How many tasks the message about an ambiguous ID names.
MATCHES = 10
# How long a row number of a printed list is valid.
LISTED_SECONDS = 86_400.0

CLAIM_ORDER = {
    "in_progress": "claimed_at",
    "pending": "-priority",
    "scheduled": "due_at",
    "held": "id",
    "blocked": "id",
    "handed_over": "claimed_at",
}

# --------------------------------------------------------------------------------------- statements

LIST_LIVE = """
select id, {{match}} as matches, {{key}} from "{queue}"
where {{condition}} and {{in_time}} and {{of_type}}
order by {{order}}, id"""
LIVE_MATCHES = """
(data like :text escape '\\' or '{queue}-' || id like :text escape '\\' or coalesce(error, '') like :text escape '\\')"""
LIST_FINISHED = """
select id, {match} as matches from task_history
where completed_at >= :ended_since and completed_at <= :ended_before and +status in (select value from json_each(:statuses))
  and (:queues is null or +queue in (select value from json_each(:queues)))
  and (:task_type is null or +task_type = :task_type)
order by completed_at desc"""
COUNT_MATCHES = """
select count(*) from ({select}) where matches"""
FINISHED_MATCHES = """
(data like :text escape '\\' or task_id like :text escape '\\' or coalesce(error, '') like :text escape '\\'
  or coalesce(result, '') like :text escape '\\' or coalesce(log, '') like :text escape '\\')"""

LIVE_ROW = f"""
select '{{queue}}' as queue, id, coalesce(task_id, '{{queue}}-' || id) as task_id, coalesce(task_type, '{{queue}}') as task_type,
       {q.STATUS_WORD} as status,
       priority, group_id, attempts, max_attempts, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
       strftime('%Y-%m-%d %H:%M:%f', due_at, 'unixepoch') as due_at,
       strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at, owner,
       expires_at, cancel_requested, then_queue, error, asks,
       (select sum(cost_usd) {q.OF_TASK}) as cost_usd, (select coalesce(max(at_least), 0) {q.OF_TASK}) as cost_at_least, data,
       {database.WAITS_FOR} as after
from "{{queue}}" as task where id = :id"""
FINISHED_ROW = """
select queue, row_id as id, task_id, task_type, status, priority, group_id, attempts, max_attempts, enqueued_at,
       null as due_at, started_at, completed_at, exit_code, error, cost_usd, cost_at_least, result, log, data
from task_history where id = :id"""

LIVE_ID = """
select id from "{queue}" where task_id = :task_id
union all select id from "{queue}" where id = :row_id and task_id is null"""
LIVE_PREFIX = """
select task_id from "{queue}" where task_id >= :prefix and task_id < :prefix || char(1114111) limit :limit"""
BARE_PREFIX = """
select '{queue}-' || id from "{queue}" where task_id is null and substr(id, 1, length(:digits)) = :digits limit :limit"""
FINISHED_ID = """
select distinct queue from task_history where task_id = :task_id"""
FINISHED_PREFIX = """
select distinct queue, task_id from task_history
where task_id >= :prefix and task_id < :prefix || char(1114111) and (:queue is null or +queue = :queue) limit :limit"""
HISTORY_OF = """
select id from task_history where task_id = :task_id and +queue = :queue order by id desc"""


class Found(NamedTuple):
    """A task. `row_id` is None if it is in the history alone."""

    queue: str
    task_id: str
    row_id: int | None


def find(
    conn: q.Connection, ident: str, queue: str | None = None, option: str = "--queue"
) -> Found:
    """Return the task that a person names.

    `ident` is its id, its row in the last list, or the beginning of its id if no other begins so; a
    number is never the beginning of an id. `option` is the command's option that names the queue. Raises Refused.
    """
    if queue is not None:
        database.check_known(conn, [queue])
    queues = [queue] if queue else database.queues_of(conn)
    matches = {(name, ident) for name in queues if live_id(conn, name, ident) is not None}
    matches |= {
        (name, ident) for (name,) in conn.execute(FINISHED_ID, {"task_id": ident}) if name in queues
    }
    numbered = listed(conn.state, ident)
    if numbered and queue not in (None, numbered.queue):
        numbered = None
    if numbered and matches - {numbered[:2]}:
        raise Unknown(
            f"{ident!r} names two tasks: {numbered.task_id} ({numbered.queue}), row {ident} of the list shown last, "
            f"and {', '.join(f'{found} ({name})' for name, found in sorted(matches))}, by its id: give the whole id "
            f"of the first; for the other, show a list whose row {ident} is that task: {command('list')}"
        )
    if numbered:
        matches = {numbered[:2]}
    if not matches and not re.fullmatch(ROW, ident):
        limit = {"limit": MATCHES + 1}
        for name in queues:
            matches |= {
                (name, found)
                for (found,) in q.execute(conn, LIVE_PREFIX, name, prefix=ident, **limit)
            }
            if f"{name}-".startswith(ident) or ident.startswith(f"{name}-"):
                digits = ident[len(name) + 1 :]
                matches |= {
                    (name, found)
                    for (found,) in q.execute(conn, BARE_PREFIX, name, digits=digits, **limit)
                }
        matches |= set(conn.execute(FINISHED_PREFIX, {"prefix": ident, "queue": queue, **limit}))
    if not matches:
        see = command("list")
        raise Unknown(f"no task has the id {ident!r}, nor one that begins so; see: {see}")
    if len(matches) > 1:
        named = [f"{found} ({name})" for name, found in sorted(matches)]
        named = named[:MATCHES] + (["…"] if len(named) > MATCHES else [])
        raise Unknown(
            f"{ident!r} fits several tasks: {', '.join(named)}; give more of the id, or {option}"
        )
    ((name, found),) = matches
    row_id = live_id(conn, name, found)
    if numbered and row_id is None and not history_ids(conn, Found(name, found, None)):
        raise Refused(f"task {found} of {name} is gone: it was purged, pruned or moved meanwhile")
    if numbered and row_id not in (None, numbered.row_id):
        raise Refused(
            f"row {ident} was task {found} of {name}, which has ended; a later task has its id now: "
            f"{command('show')} {found}"
        )
    return Found(name, found, row_id)


def remember(state: Path, rows: Sequence[dict]) -> None:
    """Note which task each row of a list names in this terminal. A failure is ignored."""
    with suppress(OSError):
        directory = q.make_private(state / "listed")
        for entry in os.scandir(directory):
            if time.time() - entry.stat().st_mtime > LISTED_SECONDS:
                os.unlink(entry.path)
        fd = os.open(
            directory / str(os.getsid(0)),
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
            0o600,
        )
        with open(fd, "w", encoding="utf-8") as file:
            json.dump([(row["queue"], row["task_id"], row["id"]) for row in rows], file)


def listed(state: Path, ident: str) -> Found | None:
    """Return the task of a row in the list that this terminal has shown last, or None."""
    if not re.fullmatch(ROW, ident):
        return None
    file = state / "listed" / str(os.getsid(0))
    try:
        if time.time() - file.stat().st_mtime > LISTED_SECONDS:
            return None
        queue, task_id, row_id = json.loads(file.read_text("utf-8"))[int(ident) - 1]
        return Found(q.check_queue_name(queue), task_id, row_id)
    except (OSError, ValueError, TypeError, LookupError):
        return None


def source_of(conn: q.Connection, data: object) -> list[dict]:
    """Return the task that a task came from, by its envelope: none or one."""
    source = data.get("source") if isinstance(data, dict) else None
    if not isinstance(source, dict) or not {"queue", "task_id"} <= source.keys():
        return []
    queue, task_id = str(source["queue"]), str(source["task_id"])
    found, status = None, "gone"
    if queue in database.queues_of(conn):
        found = Found(queue, task_id, live_id(conn, queue, task_id))
    if found:
        with suppress(Refused):
            status = newest_of(conn, found)["status"]
    return [{"queue": queue, "task_id": task_id, "status": status}]


def live_id(conn: q.Connection, queue: str, task_id: str) -> int | None:
    """Return the row of a waiting or running task, or None."""
    bare = re.fullmatch(rf"{queue}-(\d{{1,18}})", task_id)
    row = q.execute(
        conn, LIVE_ID, queue, task_id=task_id, row_id=int(bare[1]) if bare else None
    ).fetchone()
    return row[0] if row else None


def newest_record(conn: q.Connection, found: Found) -> dict:
    """Return the task as it is now: waiting, running, or as it last ended. Raises Refused."""
    with database.snapshot(conn):
        return newest_of(conn, found)


def newest_of(conn: q.Connection, found: Found) -> dict:
    """Return the same, within a snapshot."""
    row_id = live_id(conn, found.queue, found.task_id)
    if row_id is not None:
        return database.as_dict(q.execute(conn, LIVE_ROW, found.queue, id=row_id))
    finished = history_ids(conn, found)
    if not finished:
        raise Refused(f"task {found.task_id} is gone: it was purged, pruned or moved meanwhile")
    return database.as_dict(conn.execute(FINISHED_ROW, {"id": finished[0]}))


def history_ids(conn: q.Connection, found: Found) -> list[int]:
    """Return the history ids of a task, newest first."""
    return [
        row_id
        for (row_id,) in conn.execute(HISTORY_OF, {"task_id": found.task_id, "queue": found.queue})
    ]


def all_records(conn: q.Connection, found: Found) -> list[dict]:
    """Return the task as it is now, then its earlier records, newest first."""
    records = []
    if found.row_id is not None:
        records.append(database.as_dict(q.execute(conn, LIVE_ROW, found.queue, id=found.row_id)))
    ids = history_ids(conn, found)
    return records + [database.as_dict(conn.execute(FINISHED_ROW, {"id": id})) for id in ids]


class Wanted(NamedTuple):
    """Conditions of a list; `queues`, `task_type` and `text` are None for any.

    `oldest` and `newest` are Unix seconds of a finished task's end, else of its enqueueing.
    """

    queues: list[str] | None
    statuses: Sequence[str]
    task_type: str | None
    oldest: float
    newest: float
    text: str | None


def find_tasks(conn: q.Connection, wanted: Wanted) -> Iterator[dict]:
    """Yield matching tasks in the order of a list."""
    which = terms_of(wanted)
    for name in wanted.statuses:
        if name in LIVE:
            found = [
                in_order(queue, matches(conn.execute(select, which)))
                for queue, select in live_selects(conn, wanted, name)
            ]
            # Each is read only as far as needed.
            for _, row_id, queue in heapq.merge(*found):
                yield database.as_dict(q.execute(conn, LIVE_ROW, queue, id=row_id))
    if any(name in FINISHED for name in wanted.statuses):
        for row in matches(conn.execute(finished_select(wanted), which)):
            yield database.as_dict(conn.execute(FINISHED_ROW, {"id": row[0]}))


def count_tasks(conn: q.Connection, wanted: Wanted, seconds: float) -> int | None:
    """Return how many tasks match, or None if counting them takes longer than that."""
    selects = [
        select
        for name in wanted.statuses
        if name in LIVE
        for _, select in live_selects(conn, wanted, name)
    ]
    if any(name in FINISHED for name in wanted.statuses):
        selects.append(finished_select(wanted))
    which, until = terms_of(wanted), time.monotonic() + seconds
    conn.set_progress_handler(lambda: time.monotonic() > until, 10_000)
    try:
        counts = (conn.execute(COUNT_MATCHES.format(select=each), which) for each in selects)
        return sum(cursor.fetchone()[0] for cursor in counts)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname != "SQLITE_INTERRUPT":
            raise
        return None
    finally:
        conn.set_progress_handler(None, 0)


def terms_of(wanted: Wanted) -> dict:
    """Return the values of the conditions in the statements of a list."""
    _, _, task_type, oldest, newest, text = wanted
    like = None if text is None else "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%"
    return {
        **{"task_type": task_type, "since": oldest, "before": newest, "text": like},
        "statuses": json.dumps([name for name in wanted.statuses if name in FINISHED]),
        "queues": json.dumps(wanted.queues) if wanted.queues else None,
        "ended_since": q.utc(oldest) if math.isfinite(oldest) else "",
        # Behind any text.
        "ended_before": q.utc(newest) if math.isfinite(newest) else "\U0010ffff",
    }


def live_selects(conn: q.Connection, wanted: Wanted, status: str) -> Iterator[tuple[str, str]]:
    """Yield (queue, statement) for each queue: its tasks of a status in the order of claims."""
    is_bounded = math.isfinite(wanted.oldest) or math.isfinite(wanted.newest)
    key = CLAIM_ORDER[status]
    for queue in wanted.queues or database.queues_of(conn):
        parts = {
            "condition": LIVE[status],
            "key": key,
            # As the index has it.
            "order": "priority desc" if status == "pending" else key,
            "match": "1" if wanted.text is None else LIVE_MATCHES.format(queue=queue),
            "in_time": "timestamp between :since and :before" if is_bounded else "1",
            # One condition with an OR would use no index.
            "of_type": "1" if wanted.task_type is None else "task_type = :task_type",
        }
        yield queue, q.on_queue(LIST_LIVE, queue).format(**parts)


def finished_select(wanted: Wanted) -> str:
    return LIST_FINISHED.format(match="1" if wanted.text is None else FINISHED_MATCHES)


def matches(cursor: sqlite3.Cursor) -> Iterator[tuple]:
    """Yield the rows whose second column is true."""
    return (row for row in cursor if row[1])


def in_order(queue: str, rows: Iterator[tuple]) -> Iterator[tuple]:
    return ((key, row_id, queue) for row_id, _, key in rows)


# ----------------------------------------------------------------------------------------- counting

HOUR, DAY, MONTH = 3_600, 86_400, 30 * 86_400
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
ENDED_SINCE = """
select exists (select 1 from task_history where queue = :queue and +completed_at >= :since)"""
NEWEST_TIMES = """
select completed_at, (julianday(started_at) - julianday(enqueued_at)) * 86400.0,
       (julianday(completed_at) - julianday(started_at)) * 86400.0
from task_history
where queue = :queue and task_type = :task_type and status = :status and completed_at >= :day_ago and started_at is not null
order by completed_at desc limit :sample"""


def gather(conn: q.Connection | database.Reader, only: Sequence[str] | None = None) -> dict:
    """Count one state of the database, of all queues or of `only` these.

    Returns {"at", "serving": [queue, …], "remarks": [line, …],
    "queues": {queue: {…numbers, "paused", …, "types": {type: {…numbers}}}}}. "serving" are the queues that a worker serves; "remarks" name the waiting tasks that no worker
    will run. Raises sqlite3.Error.
    """
    with nullcontext() if conn.in_transaction else database.snapshot(conn):
        return _gather(conn, time.time(), only or database.queues_of(conn), bool(only))


def _gather(
    conn: q.Connection | database.Reader, now: float, wanted: Sequence[str], is_named: bool
) -> dict:
    ago = {"hour_ago": q.utc(now - HOUR), "day_ago": q.utc(now - DAY)}
    types: dict[str, dict[str, dict]] = {}
    controls = controls_of(conn)
    served = [queue for queue in wanted if serving.is_served(conn.state, queue)]
    for queue in wanted:
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
        if is_named and queue not in wanted:
            continue
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
    queues, days = {}, costs.per_day(conn)
    for queue in sorted(types):
        total, of_queue = zeros(), []
        for task_type, numbers in sorted(types[queue].items()):
            newest = known_times(samples.get((queue, task_type), []))
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
        total |= times(known_times(of_queue))
        ended = {"queue": queue, "since": q.utc(now - MONTH)}
        is_used = bool(types[queue]) or conn.execute(ENDED_SINCE, ended).fetchone()[0]
        queues[queue] = {
            **total,
            "unused": not is_used,
            **held_back(controls.get(queue)),
            "costs": days.get(queue, []),
            "types": dict(sorted(types[queue].items())),
        }
    waiting = {
        queue: [
            name for name, n in numbers["types"].items() if any(n[each] for each in serving.WAITING)
        ]
        for queue, numbers in queues.items()
    }
    remarks = serving.remarks(conn, conn.state, {k: v for k, v in waiting.items() if v})
    return {"at": q.utc(now), "serving": served, "remarks": remarks, "queues": queues}


def as_name(value: object) -> str:
    """Return a queue or task type as text: the history may hold a number."""
    return value if isinstance(value, str) else str(value)


def held_back(control: Control | None) -> dict:
    """Return the limits of a queue. `paused_until` is UTC text, None until a person resumes it."""
    paused, until, reason, by, slots, bound = control or Control(False, None, None, None, None)
    told = {"paused": paused, "paused_until": None if until is None else q.utc(until)}
    told |= {"pause_reason": reason, "paused_by": by, "slots": slots}
    return told | {"bound": bound and {**bound._asdict(), "spent": round(bound.spent, 6)}}


def zeros() -> dict:
    counts = {name: 0 for name in LIVE} | {
        f"{name}_{when}": 0 for name in FINISHED for when in ("hour", "day")
    }
    return counts | {"oldest_pending_seconds": None, "wait_seconds": None, "run_seconds": None}


def known_times(sample: list) -> list:
    """Return the newest (completed_at, waited, ran) whose times are known."""
    known = [row for row in sample if None not in row]
    return sorted(known, key=lambda row: str(row[0]), reverse=True)[:SAMPLE]


def times(sample: list) -> dict:
    """Return the medians and 95th percentiles of (completed_at, waited, ran)."""
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
