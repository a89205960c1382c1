"""Change a task that waits: its payload in an editor, or its priority."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile

import queue_helpers as q
from taskqueue import approval, cli, database
from taskqueue.cli import WHOSE, Refused, option, some_text, takes
from taskqueue.find import Found, find
from taskqueue.remedies import command
from taskqueue.text import sh, visible

WAITING_ROW = f"""
select {{task}}, {q.STATUS_WORD}, approved from "{{queue}}" where id = :id and status not in (2, 5)"""
# What a person approved was another payload: the task is held again.
EDIT = """
update "{queue}" set data = :data, status = iif(approved, 3, status), due_at = iif(approved, null, due_at), approved = 0
where id = :id and status not in (2, 5) and data = :before"""
SET_PRIORITY = """
update "{queue}" set priority = :priority where id = :id and status not in (2, 5)"""


def number(text: str) -> int:
    """Return a priority. Raises ArgumentTypeError."""
    if not re.fullmatch("-?[0-9]{1,6}|-?1000000", text):
        raise cli.argparse.ArgumentTypeError(f"{text!r} is no whole number within a million")
    return int(text)


@takes(
    option("ident", metavar="ID", type=some_text),
    WHOSE,
    option("--priority", metavar="N", type=number, help="set this, and leave the payload alone"),
)
def edit(ident: str, queue: str | None, priority: int | None, as_json: bool) -> int:
    """Change the payload of a waiting or held task in $EDITOR, or its priority. A task that was
    approved is held again when its payload changes."""
    conn = database.open_queue()
    found = find(conn, ident, queue)
    done = edit_payload(conn, found) if priority is None else set_priority(conn, found, priority)
    q.wake(conn.state)
    told = {"queue": found.queue, "task_id": found.task_id, "changed": done}
    cli.report(as_json, told, f"{found.task_id}: {done}")
    return 0


def set_priority(conn: q.Connection, found: Found, priority: int) -> str:
    with q.transaction(conn):
        told = {"id": found.row_id, "priority": priority}
        if q.execute(conn, SET_PRIORITY, found.queue, **told).rowcount != 1:
            raise Refused(why_not(conn, found))
    return f"priority {priority}"


def edit_payload(conn: q.Connection, found: Found) -> str:
    row = q.execute(conn, WAITING_ROW, found.queue, id=found.row_id).fetchone()
    if row is None:
        raise Refused(why_not(conn, found))
    *columns, status, approved = row
    task = q.Task.from_row(found.queue, tuple(columns))
    if why := task.unreadable():
        raise Refused(f"its {why}")
    change = edited(task.data, task.data)
    if not change:
        return "nothing changed"
    told = {"id": task.id, "before": task.text, "data": approval.changed(task, change)}
    with q.transaction(conn):
        if q.execute(conn, EDIT, found.queue, **told).rowcount != 1:
            raise Refused(f"task {task.task_id} has changed meanwhile: {why_not(conn, found)}")
    how = f"{command('approve')} {sh(task.task_id)}"
    return f"changed; it is held again: {how}" if approved else f"changed; it is {status}"


def why_not(conn: q.Connection, found: Found) -> str:
    """Say why a task cannot be changed."""
    status = database.status_of(conn, found.queue, found.row_id)
    if status is None:
        return f"task {found.task_id} has ended: {command('retry')} puts it back, then edit it"
    return f"task {found.task_id} is {status}: only one that waits can be changed"


def edited(before: dict, payload: dict) -> dict:
    """Let the person edit a payload; return the change from `before`. Raises Refused.

    A text that is no JSON object can be mended in a terminal; else its file is kept.
    """
    editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    fd, name = tempfile.mkstemp(suffix=".json")
    with open(fd, "w", encoding="utf-8") as file:
        file.write(json.dumps(payload, ensure_ascii=False, indent=2) + "\n")
    while True:
        try:
            code = subprocess.run([*editor, name]).returncode
        except OSError as error:
            raise Refused(f"{editor[0]}: {error.strerror}; set EDITOR") from None
        if code != 0:
            raise Refused(f"{editor[0]} ended with exit {code}, so nothing was changed")
        with open(name, encoding="utf-8", errors="replace") as written:
            text = written.read()
        try:
            change = approval.difference(before, cli.json_object(text))
        except cli.argparse.ArgumentTypeError as error:
            why = f"what you wrote is {error}"
        else:
            os.unlink(name)
            return change
        if not sys.stdin.isatty():
            raise Refused(f"{why}; it is kept in {name}")
        print(visible(f"{why}. Edit it again? [Y/n] "), end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
            raise Refused(f"nothing was changed; what you wrote is kept in {name}")
