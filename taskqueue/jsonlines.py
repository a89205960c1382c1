"""Write tasks as JSON lines, and take such lines in: one a task, with the columns of its row."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import queue_helpers as q
from taskqueue import cli, database
from taskqueue.backup import LAST_ID, check_target, use_ids, whole_file
from taskqueue.cli import EACH_QUEUE, EX_DATAERR, Refused, flag, option, takes
from taskqueue.database import FINISHED
from taskqueue.payload import as_payload
from taskqueue.text import plural, short, visible

# An import reads and checks so many lines before it stores them.
LINES_AT_A_TIME = 500
MOST_FAULTS_SHOWN = 20
MOST_ATTEMPTS = 1_000_000

# --------------------------------------------------------------------------------------- statements

# Columns that an export says in other words, and those that only the claimer's run is about.
NOT_EXPORTED = set(
    "id row_id queue data status task_id task_type timestamp owner claimed_at".split()
)
NOT_EXPORTED |= set("cancel_requested backoff chain then_queue then_hold budget_usd".split())

EXPORT_FINISHED = """
select queue, row_id as id, task_id, coalesce(nullif(task_type, ''), queue) as task_type, status, {columns}, data
from task_history where :queues is null or queue in (select value from json_each(:queues)) order by id"""
EXPORT_LIVE = f"""
select '{{queue}}' as queue, id, coalesce(task_id, '{{queue}}-' || id) as task_id,
       task_type, {q.STATUS_WORD} as status,
       timestamp as enqueued_at, {{columns}}, data
from "{{queue}}" order by id"""
INSERT = """
insert into "{table}" ({names}) values ({places})"""

# A task comes in once: not while it waits or runs, nor when the history has this life of it, or a
# later one. A bare payload is called after its row, so that alone does not say that it is the same
# task.
SAME_DATA = """
case when json_valid(data) then json(as_json_text(data)) else data end =
case when json_valid(:data) then json(:data) else :data end"""
KNOWN_LIVE = """
select exists (select 1 from "{queue}" where task_id = :task_id)
  or exists (select 1 from task_history where task_id = :task_id and +queue = '{queue}'
             and enqueued_at >= :enqueued)"""
KNOWN_BARE = f"""
select exists (select 1 from "{{queue}}" where id = :id and task_id is null and {SAME_DATA})
  or exists (select 1 from task_history where task_id = :task_id and +queue = '{{queue}}' and {SAME_DATA})"""
KNOWN_FINISHED = f"""
select exists (select 1 from "{{queue}}" where id = :id and coalesce(task_id, '{{queue}}-' || id) = :task_id and {SAME_DATA})
  or exists (select 1 from task_history where task_id = :task_id and +queue = '{{queue}}'
             and enqueued_at = :enqueued_at and completed_at = :completed_at)"""
DATA_OF = """
select json_extract(:line, '$.data')"""


def columns_of(conn: sqlite3.Connection, table: str) -> list[str]:
    """Return the columns of a table that move, export and import carry as they are."""
    names = [row[1] for row in conn.execute(f'pragma table_info("{table}")')]
    return [name for name in names if name not in NOT_EXPORTED]


# ------------------------------------------------------------------------------------------- export


@takes(
    option("file", metavar="FILE", nargs="?", default="-", help="(default: stdout)"),
    EACH_QUEUE,
    flag("--history", help="finished tasks, too"),
)
def export(file: str, queues: list[str] | None, history: bool, as_json: bool) -> int:
    """Write waiting and running tasks as JSON lines, for import; with --history the finished ones,
    too."""
    conn = database.open_queue()
    database.check_known(conn, queues or ())
    if file == "-" or os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
        exported = export_to_stream(conn, file, queues, history)
    else:
        check_target(Path(file), conn.state)
        with whole_file(Path(file)) as temporary, open(temporary, "wb") as out:
            exported = write_lines(conn, out, queues, history)
    says = f"exported {plural(exported, 'task')} to {file}"
    says = json.dumps({"exported": exported, "file": file}) if as_json else visible(says)
    print(says, file=sys.stderr if file == "-" else sys.stdout)
    return 0


def export_to_stream(conn: q.Connection, file: str, queues: list[str] | None, history: bool) -> int:
    """Export to standard output, a pipe or a device."""
    name = "standard output" if file == "-" else file
    try:
        if file == "-":
            sys.stdout.flush()
            return write_lines(conn, sys.stdout.buffer, queues, history)
        with open(file, "wb") as out:
            return write_lines(conn, out, queues, history)
    except BrokenPipeError:
        cli.mute(1)
        raise Refused("the export is not whole: its reader closed the pipe") from None
    except OSError as error:
        cli.mute(1)
        raise Refused(f"{name} was not written: {error.strerror}") from None


def write_lines(conn: q.Connection, out: BinaryIO, queues: list[str] | None, history: bool) -> int:
    """Write finished tasks first, by their end, so that import meets a task's lives in order."""
    exported, on_terminal = 0, out.isatty()
    for task in exported_tasks(conn, queues, history):
        data = task.pop("data").split("\0")[0]
        head = json.dumps(task)[:-1]
        # The data goes in as it is stored, where it is JSON: no number is rounded.
        line = f'{head}, "data": {as_json_text(data)}}}\n'
        out.write((escaped(line) if on_terminal else line).encode("utf-8", "replace"))
        exported += 1
    out.flush()
    return exported


def exported_tasks(conn: q.Connection, queues: list[str] | None, history: bool) -> Iterator[dict]:
    named = {"queues": json.dumps(queues) if queues else None}
    with database.snapshot(conn):
        statements = [EXPORT_FINISHED.format(columns=column_list(conn, "task_history"))]
        statements = statements if history else []
        for queue in queues or database.queues_of(conn):
            statements.append(EXPORT_LIVE.format(queue=queue, columns=column_list(conn, queue)))
        for statement in statements:
            rows = conn.execute(statement, named if ":queues" in statement else {})
            names = [column[0] for column in rows.description]
            yield from (dict(zip(names, row, strict=True)) for row in rows)


def column_list(conn: q.Connection, table: str) -> str:
    return ", ".join(f'"{name}"' for name in columns_of(conn, table))


def as_json_text(data: str) -> str:
    """Return stored data as one line of JSON; what is no object becomes a payload that has it as text.

    Between JSON's tokens a newline is a space, and inside its strings there is none.
    """
    try:
        is_object = isinstance(q.parse_json(data), dict)
    except (ValueError, RecursionError):
        is_object = False
    return re.sub("[\r\n]", " ", data) if is_object else q.to_json(as_payload(data.encode()))


def escaped(line: str) -> str:
    """Return a line of JSON in printable ASCII, for a terminal."""
    return re.sub(
        "[^\\x20-\\x7e\\n]",
        lambda found: json.dumps(found[0])[1:-1].replace("\x7f", "\\u007f"),
        line,
    )


# ------------------------------------------------------------------------------------------- import


@takes(option("file", metavar="FILE", help="of export; - for stdin"))
def import_(file: str, as_json: bool) -> int:
    """Take in an export. What came in before is not taken again."""
    if (q.STATE_DIR / "tasks.db").exists():
        database.open_queue()
    conn = q.connect()
    conn.create_function("as_json_text", 1, as_json_text, deterministic=True)
    faults: list[str] = []
    imported, known = import_lines(conn, file, faults)
    for line in faults[:MOST_FAULTS_SHOWN]:
        cli.complain(EX_DATAERR, "tasks.py import", line)
    if len(faults) > MOST_FAULTS_SHOWN:
        more = f"… and {len(faults) - MOST_FAULTS_SHOWN:,} more"
        cli.complain(EX_DATAERR, "tasks.py import", more)
    told = {"imported": imported, "already_there": known, "refused": faults}
    says = f"imported {plural(imported, 'task')}; {known:,} already there; {len(faults):,} refused"
    cli.report(as_json, told, says)
    return EX_DATAERR if faults else 0


def import_lines(conn: q.Connection, file: str, faults: list[str]) -> tuple[int, int]:
    """Import the lines; return how many were new, and how many known. `faults` get what was refused."""
    imported = known = 0

    def refuse(number: int, error: Exception) -> None:
        if not is_about_the_task(error, conn.state):
            raise error
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        faults.append(f"line {number} was refused: {short(why)}")

    def store(item: tuple[int, dict]) -> bool | None:
        number, task = item
        conn.execute("savepoint line")
        try:
            return (
                import_finished(conn, task) if "completed_at" in task else import_live(conn, task)
            )
        except Exception as error:
            conn.execute("rollback to line")
            return refuse(number, error)
        finally:
            if conn.in_transaction:
                conn.execute("release line")

    with open(0, "rb", closefd=False) if file == "-" else open(file, "rb") as lines:
        numbered = enumerate(lines, 1)
        while batch := list(islice(numbered, LINES_AT_A_TIME)):
            # Read outside of the transaction: that takes longer than storing.
            parsed = []
            for number, line in batch:
                try:
                    if line.strip():
                        parsed.append((number, parse_line(conn, line)))
                except Exception as error:
                    refuse(number, error)
            results = list(database.in_steps(conn, parsed, store))
            imported, known = imported + results.count(True), known + results.count(False)
            q.wake(conn.state)
    return imported, known


def is_about_the_task(error: Exception, state: Path) -> bool:
    """Tell whether the line is at fault, and not the database or the disk."""
    if isinstance(error, sqlite3.Error) and not isinstance(
        error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)
    ):
        error = q.explain(error, state)
    if isinstance(error, q.QueueError):
        return isinstance(error, q.InvalidTask)
    return isinstance(
        error, (ValueError, TypeError, KeyError, RecursionError, OverflowError, sqlite3.Error)
    )


def parse_line(conn: q.Connection, line: bytes) -> dict:
    """Return the checked task of a line; make its queue."""
    text = line.decode("utf-8-sig").strip()
    task = q.parse_json(text)
    if not isinstance(task, dict):
        raise q.InvalidTask("it is not a JSON object")
    if task["status"] not in database.STATUSES:
        raise q.InvalidTask(f"{task['status']!r} is not a status")
    queue = q.check_queue_name(task["queue"])
    is_over = task["status"] in FINISHED
    if not isinstance(task["data"], dict) and not (is_over and isinstance(task["data"], str)):
        raise q.InvalidTask("its data is not a JSON object")
    check(task, "id", whole(1, 2**53), required=True)
    check(task, "task_id", is_text, required=True)
    for name in ("task_type", "group_id", "approval", "rerun", "asks", "error", "result", "log"):
        check(task, name, is_text)
    check(task, "priority", whole(-1_000_000, 1_000_000))
    check(task, "attempts", whole(0, MOST_ATTEMPTS))
    check(task, "max_attempts", whole(1, MOST_ATTEMPTS))
    check(task, "exit_code", whole(-(2**31), 2**31))
    check(task, "enqueued_at", is_moment if is_over else is_seconds, required=True)
    if is_over:
        check(task, "completed_at", is_moment, required=True)
        check(task, "started_at", is_moment)
    else:
        task.pop("completed_at", None)
        check(task, "due_at", is_seconds, required=task["status"] == "scheduled")
        check(task, "expires_at", is_seconds)
        check(task, "delayed_at", is_seconds)
        check(task, "released_at", is_seconds)
        check(task, "approved", whole(0, 1))
    task["task_type"] = task.get("task_type") or queue
    # SQLite gives the numbers as they stand; Python would round some.
    task["data"] = conn.execute(DATA_OF, {"line": text}).fetchone()[0]
    q.ensure_queue(conn, queue)
    return task


def check(task: dict, name: str, is_right: Callable, required: bool = False) -> None:
    """Raise InvalidTask unless a field is right, or missing and not required."""
    value = task[name] if required else task.get(name)
    if value is None and not required:
        task.pop(name, None)
    elif not is_right(value):
        raise q.InvalidTask(f"its {name} is {short(repr(value), 40)}")


def whole(least: int, most: int) -> Callable:
    return lambda value: type(value) is int and least <= value <= most


def is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= q.LAST_SECOND


def is_text(value: object) -> bool:
    """Tell whether a value is a text that UTF-8 can hold."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_moment(value: object) -> bool:
    """Tell whether a value is a UTC time as the history has them."""
    if not isinstance(value, str) or not re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{1,6})?", value
    ):
        return False
    try:
        datetime.fromisoformat(value[:19])
    except ValueError:
        return False
    return True


def import_finished(conn: q.Connection, task: dict) -> bool:
    """Store a finished task, within a transaction. Return False if it is known already."""
    queue = task["queue"]
    if conn.execute(q.on_queue(KNOWN_FINISHED, queue), task).fetchone()[0]:
        return False
    row = {name: task[name] for name in columns_of(conn, "task_history") if name in task}
    row |= {name: task[name] for name in ("queue", "task_id", "task_type", "status", "data")}
    # A row id of its own: the one it had may be another task's here.
    row["row_id"] = conn.execute(LAST_ID, {"queue": queue}).fetchone()[0] + 1
    use_ids(conn, queue, row["row_id"])
    insert(conn, "task_history", row)
    q.end_quiet(conn.state)
    return True


def import_live(conn: q.Connection, task: dict) -> bool:
    """Store a waiting task, within a transaction. Return False if it is known already."""
    queue = task["queue"]
    # The history's time of it; SQLite's strftime() rounds some of them otherwise.
    task["enqueued"] = q.utc(task["enqueued_at"])
    stored = json.loads(task["data"])
    if is_envelope(stored):
        # The database reads the id out of the data, and so do we.
        task["task_id"] = stored["task_id"]
    else:
        if task["task_id"] == f"{queue}-{task['id']}":
            if conn.execute(q.on_queue(KNOWN_BARE, queue), task).fetchone()[0]:
                return False
            # The row after which it is called is another task here.
            task["task_id"] += "-" + hashlib.sha256(task["data"].encode()).hexdigest()[:12]
        at = float(task["enqueued_at"])
        task["data"] = envelope_of(task["task_id"], task["task_type"], at, task["data"])
    if conn.execute(q.on_queue(KNOWN_LIVE, queue), task).fetchone()[0]:
        return False
    row = {name: task[name] for name in columns_of(conn, queue) if name in task}
    is_later = task["status"] in ("scheduled", "held")
    if task["status"] != "scheduled":
        row |= {name: None for name in ("due_at", "delayed_at") if name in row}
    if not is_later:
        row |= {name: None for name in ("released_at", "asks") if name in row}
    row |= {"data": task["data"], "timestamp": float(task["enqueued_at"])}
    row["status"] = q.SCHEDULED if is_later else q.READY
    return insert(conn, queue, row) == 1


def is_envelope(stored: dict) -> bool:
    names = ("task_id", "task_type")
    named = all(isinstance(stored.get(name), str) and stored[name] for name in names)
    return named and isinstance(stored.get("data"), dict)


def insert(conn: q.Connection, table: str, row: dict) -> int:
    names, places = ", ".join(f'"{name}"' for name in row), ", ".join(f":{name}" for name in row)
    return conn.execute(INSERT.format(table=table, names=names, places=places), row).rowcount


def envelope_of(task_id: str, task_type: str, timestamp: float, text: str) -> str:
    """Return the envelope of a bare payload, whose JSON is `text`."""
    head = {"task_id": task_id, "task_type": task_type, "enqueued_at": q.utc(timestamp)}
    return f'{q.to_json(head)[:-1]}, "data": {text}}}'
