"""`tq ask`: a person goes through the held tasks, and answers for each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import queue_helpers as q
from taskqueue import act, approval, database, edit, show
from taskqueue.approval import Held
from taskqueue.cli import EACH_QUEUE, Refused, takes
from taskqueue.text import plural, visible, visible_lines

HELD_IDS = """
select id from "{queue}" where status = 3 and due_at is null order by id"""
ANSWERS = "[y]es, [n]o, [s]kip, [e]dit, [q]uit? "
# A line of a payload has at most so many characters here; show has all of them.
LINE_CHARACTERS = 300


class Gone(Exception):
    """The person leaves: no answer comes any more."""


@takes(EACH_QUEUE)
def ask(queues: list[str] | None, as_json: bool) -> int:
    """Go through the held tasks: y lets one run, n ends it, s leaves it, e lets you edit its payload
    in $EDITOR and then run it, q leaves the rest. In a pipe, each line of stdin is an answer."""
    if as_json:
        raise Refused("ask talks with a person: list --status held --json has the held tasks")
    conn = database.open_queue()
    database.check_known(conn, queues or ())
    answered, freed = 0, []
    tasks = list(held_tasks(conn, queues))
    for number, held in enumerate(tasks, 1):
        print(f"{number} of {len(tasks)}: {visible_lines(description(held))}")
        try:
            done = answer(conn, held)
        except Gone:
            print()
            break
        print(visible(f"{done} {held.task.task_id}"))
        answered += not done.startswith("skipped")
        freed += [held.task.queue] if done == "approved" else []
    left = len(tasks) - answered
    print(f"{plural(left, 'task')} left" if tasks else "no task is held")
    act.have_run(conn, freed, False)
    return 0


def held_tasks(conn: q.Connection, queues: list[str] | None) -> Iterator[Held]:
    for queue in queues or database.queues_of(conn):
        for (row_id,) in q.execute(conn, HELD_IDS, queue).fetchall():
            held = approval.held(conn, queue, row_id)
            if held:
                yield held


def description(held: Held) -> str:
    """Return what a person should know about a held task."""
    task = held.task
    lines = [f"{task.task_id}, {task.task_type} in {task.queue}"]
    lines += [held.reason] if held.reason else []
    data = task.text if task.unreadable() else task.data
    for name, value in data.items() if isinstance(data, dict) else [("data", data)]:
        lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    lines = [
        line if len(line) <= LINE_CHARACTERS else f"{line[:LINE_CHARACTERS]}…" for line in lines
    ]
    stored = {"task_id": task.task_id, "data": data, "asks": held.asks}
    lines += [f"yes changes {line}" for line in show.changes_of(stored)]
    return "\n  ".join(lines)


def answer(conn: q.Connection, held: Held) -> str:
    """Ask until the answer can be obeyed; return what became of the task. Raises Gone."""
    while True:
        word = read_line().strip().lower()
        if word in ("s", "skip"):
            return "skipped"
        if word in ("q", "quit"):
            raise Gone
        try:
            if word in ("y", "yes"):
                return decided("approved", approve(conn, held, None))
            if word in ("n", "no"):
                with q.transaction(conn):
                    ended = approval.reject(conn, held.task.queue, held.task.id)
                return decided("rejected", ended)
            if word in ("e", "edit"):
                return decided("approved", approve(conn, held, edited(held)))
        except (q.InvalidTask, Refused) as refused:
            print(visible(str(refused)))


def decided(done: str, is_done: bool) -> str:
    return done if is_done else "skipped, since it is not held any more as it was shown:"


def approve(conn: q.Connection, held: Held, change: dict | None) -> bool:
    with q.transaction(conn):
        return approval.approve(conn, held.task.queue, held.task.id, change, held)


def read_line() -> str:
    """Return the next answer. Raises Gone at the end of stdin."""
    print(ANSWERS, end="", flush=True)
    line = sys.stdin.readline()
    if not line:
        raise Gone
    if not sys.stdin.isatty():
        print(visible(line.strip()))
    return line


def edited(held: Held) -> dict:
    """Let the person edit the payload as approval would make it; return the change. Raises Refused."""
    if why := held.task.unreadable():
        raise Refused(f"its {why}")
    before = held.task.data
    return edit.edited(before, approval.merged(before, held.asks or {}))
