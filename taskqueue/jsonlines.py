"""Write tasks as JSON lines, and take such lines in: one a task, with the columns of its row."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import queue_helpers as q
from taskqueue import cli, database
from taskqueue.backup import LAST_ID, check_target, use_ids, whole_file
from taskqueue.cli import EACH_QUEUE, EX_DATAERR, Refused, flag, option, takes
from taskqueue.database import FINISHED
from taskqueue.payload import as_payload
from taskqueue.progress import progress
from taskqueue.text import plural, short, visible

# An import reads and checks so many lines before it stores them, and stores at most so many, and
# bytes, in one statement.
LINES_AT_A_TIME, ROWS_AT_A_TIME, BYTES_AT_A_TIME = 300, 50, 65_536
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
       timestamp as enqueued_at, {{columns}}, {database.WAITS_FOR} as after, data
from "{{queue}}" order by id"""
INSERT = """
insert into "{table}" ({names}) select {values} where not ({known})"""

# A task comes in once: not while it waits or runs, nor when the history has this life of it, or a
# later one. A bare payload is called after its row, so that alone does not say that it is the same
# task.
SAME_DATA = """
case when json_valid(data) then json(as_json_text(data)) else data end =
case when json_valid(:came) then json(:came) else :came end"""
KNOWN_LIVE = """
exists (select 1 from "{queue}" where task_id = :task_id)
  or exists (select 1 from task_history where task_id = :task_id and +queue = '{queue}'
             and enqueued_at >= :enqueued)"""
KNOWN_BARE = f"""
exists (select 1 from "{{queue}}" where id = :id and task_id is null and {SAME_DATA})
  or exists (select 1 from task_history where task_id = :bare_id and +queue = '{{queue}}' and {SAME_DATA})
  or {KNOWN_LIVE}"""
KNOWN_FINISHED = f"""
exists (select 1 from "{{queue}}" where id = :id and coalesce(task_id, '{{queue}}-' || id) = :task_id and {SAME_DATA})
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
    on_terminal = out.isatty()
    with progress("export", None, "tasks") as shown:
        for task in exported_tasks(conn, queues, history):
            data = task.pop("data").split("\0")[0]
            head = json.dumps(task)[:-1]
            # The data goes in as it is stored, where it is JSON: no number is rounded.
            line = f'{head}, "data": {as_json_text(data)}}}\n'
            out.write((escaped(line) if on_terminal else line).encode("utf-8", "replace"))
            shown.advance()
        out.flush()
        return shown.done


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


class Ready(NamedTuple):
    """A checked line: the statement that stores its task, and the values."""

    number: int
    queue: str
    is_over: bool
    statement: str
    values: dict


def import_lines(conn: q.Connection, file: str, faults: list[str]) -> tuple[int, int]:
    """Import the lines; return how many were new, and how many known. `faults` get what was refused."""
    imported = known = 0
    columns: dict[str, list[str]] = {}

    def refuse(number: int, error: Exception) -> None:
        if not is_about_the_task(error, conn.state):
            raise error
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        faults.append(f"line {number} was refused: {short(why)}")

    def read(number: int, line: bytes) -> Iterator[Ready]:
        try:
            if line.strip():
                yield ready(conn, number, parse_line(conn, line), columns)
        except Exception as error:
            refuse(number, error)

    with (
        open(0, "rb", closefd=False) if file == "-" else open(file, "rb") as lines,
        progress("import", bytes_in(lines), "bytes") as shown,
    ):
        numbered = enumerate(lines, 1)
        while batch := list(islice(numbered, LINES_AT_A_TIME)):
            # Read outside of the transaction: that takes longer than storing.
            tasks = [task for number, line in batch for task in read(number, line)]
            refused = len(faults)
            storing = partial(store, conn, refuse)
            new = sum(database.in_steps(conn, parts(tasks), storing, durable=False))
            imported, known = imported + new, known + len(tasks) - new - (len(faults) - refused)
            q.wake(conn.state)
            shown.advance(sum(len(line) for _, line in batch))
    if columns:
        # What is reported as imported survives a power cut: the last commit syncs all before it.
        with q.transaction(conn):
            use_ids(conn, database.queues_of(conn)[0], 0)
    return imported, known


def bytes_in(file: BinaryIO) -> int | None:
    """Return a file's size, or None for a pipe or a device."""
    found = os.fstat(file.fileno())
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def parts(tasks: Sequence[Ready]) -> Iterator[list[Ready]]:
    """Yield tasks that one statement stores together."""
    part: list[Ready] = []
    room = BYTES_AT_A_TIME
    for task in tasks:
        if part and (
            room < 0 or len(part) == ROWS_AT_A_TIME or task.statement != part[0].statement
        ):
            yield part
            part, room = [], BYTES_AT_A_TIME
        part.append(task)
        room -= len(task.values["data"])
    if part:
        yield part


def store(conn: q.Connection, refuse: Callable, part: list[Ready]) -> int:
    """Store tasks, within a transaction; return how many are new. A refused one stops no other."""
    conn.execute("savepoint part")
    try:
        return store_all(conn, part)
    except Exception as error:
        conn.execute("rollback to part")
        if len(part) > 1:
            return sum(store(conn, refuse, [task]) for task in part)
        refuse(part[0].number, error)
        return 0
    finally:
        if conn.in_transaction:
            conn.execute("release part")


def store_all(conn: q.Connection, part: list[Ready]) -> int:
    queue = part[0].queue
    if part[0].is_over:
        # Row ids of their own: those that they had may be other tasks' here.
        last = conn.execute(LAST_ID, {"queue": queue}).fetchone()[0]
        for row_id, task in enumerate(part, last + 1):
            task.values["row_id"] = row_id
        use_ids(conn, queue, last + len(part))
        q.end_quiet(conn.state)
    return conn.executemany(part[0].statement, [task.values for task in part]).rowcount


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
    """Return the checked task of a line, with its data as text and, "stored", as an object; make its
    queue."""
    task = read_line(conn, line.decode("utf-8-sig").strip())
    if task["status"] not in database.STATUSES:
        raise q.InvalidTask(f"{task['status']!r} is not a status")
    queue = q.check_queue_name(task["queue"])
    is_over = task["status"] in FINISHED
    if not isinstance(task["stored"], dict) and not (is_over and isinstance(task["stored"], str)):
        raise q.InvalidTask("its data is not a JSON object")
    checks, required = (OF_ENDED, ENDED_NEEDS) if is_over else (OF_LIVE, LIVE_NEEDS)
    for name, value in task.items():
        is_right = checks.get(name)
        if is_right and not is_right(value):
            raise q.InvalidTask(f"its {name} is {short(repr(value), 40)}")
    for name in (*required, *(["due_at"] if task["status"] == "scheduled" else [])):
        if name not in task:
            raise KeyError(name)
    if not is_over:
        task.pop("completed_at", None)
        if task.get("after"):
            # Here the other task is not known by its row, and this one must not run before it.
            why = f"before its import it waited for {task['after']}"
            task |= {"status": "held", "error": why}
    task["task_type"] = task.get("task_type") or queue
    q.ensure_queue(conn, queue)
    return task


def read_line(conn: q.Connection, text: str) -> dict:
    """Return the object of a line without its nulls, its data as text and, "stored", as a value."""
    head, found, rest = text.partition(', "data": {')
    if found and rest.endswith("}"):
        # An export writes the data last. If both parts are JSON, so is the whole.
        with suppress(ValueError):
            data = "{" + rest[:-1]
            # Numbers that other readers could not read are in no field: each is checked.
            return without_nulls(json.loads(head + "}")) | {
                "data": data,
                "stored": q.parse_json(data),
            }
    task = q.parse_json(text)
    if not isinstance(task, dict):
        raise q.InvalidTask("it is not a JSON object")
    # SQLite gives the numbers as they stand; Python would round some.
    data = conn.execute(DATA_OF, {"line": text}).fetchone()[0]
    return without_nulls(task) | {"data": data, "stored": task["data"]}


def without_nulls(task: dict) -> dict:
    return {name: value for name, value in task.items() if value is not None}


def whole(least: int, most: int) -> Callable:
    return lambda value: type(value) is int and least <= value <= most


def is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= q.LAST_SECOND


SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(value: object) -> bool:
    """Tell whether a value is a text that UTF-8 can hold."""
    return isinstance(value, str) and (value.isascii() or not SURROGATE.search(value))


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


IN_BOTH = {
    "id": whole(1, 2**53),
    "priority": whole(-1_000_000, 1_000_000),
    "attempts": whole(0, MOST_ATTEMPTS),
    "max_attempts": whole(1, MOST_ATTEMPTS),
    "exit_code": whole(-(2**31), 2**31),
    **dict.fromkeys(
        "task_id task_type group_id approval rerun asks after error result log".split(), is_text
    ),
}
OF_ENDED = IN_BOTH | dict.fromkeys(("enqueued_at", "completed_at", "started_at"), is_moment)
ENDED_NEEDS = ("id", "task_id", "enqueued_at", "completed_at")
MOMENTS = ("enqueued_at", "due_at", "expires_at", "delayed_at", "released_at")
OF_LIVE = IN_BOTH | {"approved": whole(0, 1)} | dict.fromkeys(MOMENTS, is_seconds)
LIVE_NEEDS = ("id", "task_id", "enqueued_at")


def ready(conn: q.Connection, number: int, task: dict, columns: dict[str, list[str]]) -> Ready:
    """Return a checked task as it is stored. `columns` remember those of the tables."""
    queue, is_over = task["queue"], "completed_at" in task
    table = "task_history" if is_over else queue
    if table not in columns:
        columns[table] = columns_of(conn, table)
    row = {name: task[name] for name in columns[table] if name in task}
    known, more = finished_row(task, row) if is_over else live_row(task, row)
    statement = insert_new(table, q.on_queue(known, queue), *row)
    return Ready(number, queue, is_over, statement, row | more)


@lru_cache
def insert_new(table: str, known: str, *names: str) -> str:
    """Return the statement that stores a row with these columns unless it is known."""
    quoted, values = (
        ", ".join(f'"{name}"' for name in names),
        ", ".join(f":{name}" for name in names),
    )
    return INSERT.format(table=table, names=quoted, values=values, known=known)


def finished_row(task: dict, row: dict) -> tuple[str, dict]:
    """Fill the row of a finished task; return when it is known, and what else that asks for."""
    row |= {name: task[name] for name in ("queue", "task_id", "task_type", "status", "data")}
    row["row_id"] = None
    return KNOWN_FINISHED, {"id": task["id"], "came": task["data"]}


def live_row(task: dict, row: dict) -> tuple[str, dict]:
    """Fill the row of a waiting task; return when it is known, and what else that asks for."""
    queue, data, task_id, known = task["queue"], task["data"], task["task_id"], KNOWN_LIVE
    stored = task["stored"]
    at = float(task["enqueued_at"])
    # The history's time of it; SQLite's strftime() rounds some of them otherwise.
    more = {"enqueued": q.utc(task["enqueued_at"])}
    if is_envelope(stored):
        # The database reads the id out of the data, and so do we.
        task_id = stored["task_id"]
    else:
        if task_id == f"{queue}-{task['id']}":
            known = KNOWN_BARE
            more |= {"id": task["id"], "bare_id": task_id, "came": data}
            # The row after which it is called is another task here.
            task_id += "-" + hashlib.sha256(data.encode()).hexdigest()[:12]
        data = envelope_of(task_id, task["task_type"], at, data)
    is_later = task["status"] in ("scheduled", "held")
    if task["status"] != "scheduled":
        row |= {name: None for name in ("due_at", "delayed_at") if name in row}
    if not is_later:
        row |= {name: None for name in ("released_at", "asks") if name in row}
    row |= {"data": data, "timestamp": at, "status": q.SCHEDULED if is_later else q.READY}
    return known, more | {"task_id": task_id}


def is_envelope(stored: dict) -> bool:
    names = ("task_id", "task_type")
    named = all(isinstance(stored.get(name), str) and stored[name] for name in names)
    return named and isinstance(stored.get("data"), dict)


def envelope_of(task_id: str, task_type: str, timestamp: float, text: str) -> str:
    """Return the envelope of a bare payload, whose JSON is `text`."""
    head = {"task_id": task_id, "task_type": task_type, "enqueued_at": q.utc(timestamp)}
    return f'{q.to_json(head)[:-1]}, "data": {text}}}'
