"""The command `tq every`: list, add, switch and remove recurring tasks; every.py fires them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import queue_helpers as q
from taskqueue import cli, database, every, serving, show
from taskqueue.arguments import Arguments, RunArguments, parse_object
from taskqueue.every import Due, next_time, row_of
from taskqueue.remedies import command
from taskqueue.text import ago, clock, short

# The options of `tq add` that each firing has.
TERMS = ("delay", "ttl", "timeout", "max_attempts", "priority", "group", "hold", "on_duplicate")
HELP = """\
usage: tq every                                            list what recurs
       tq every NAME CRON QUEUE TYPE [DATA] [options]      have a task recur, or change that
       tq every NAME --every 6h QUEUE TYPE [DATA] [options]
       tq every NAME CRON [--queue QUEUE] [options] -- COMMAND ...
       tq every NAME --off | --on | --now | --remove

CRON is like '0 9 * * 1-5': minute, hour, day, month, weekday, in local time. The task's id is NAME:
while one waits or runs, the next is a duplicate, unless --on-duplicate says otherwise. What a
sleeping machine missed runs once, when it wakes. A worker of the queue enqueues the task: without a
worker or the service, nothing recurs. The other options are those of `tq add`, without --at.

  --every DURATION  in the place of CRON: the task comes this often, for the first time after this
                    time
  --on, --off       let it come again, or not
  --now             enqueue it now, too
  --remove          forget it
  --json            print JSON
"""
PUT = """
insert into task_every (name, queue, task_type, data, schedule, terms, next_at, set_at)
values (:name, :queue, :task_type, :data, :schedule, :terms, :next, :now)
on conflict (name) do update set queue = excluded.queue, task_type = excluded.task_type, data = excluded.data,
  schedule = excluded.schedule, terms = excluded.terms, next_at = excluded.next_at, set_at = excluded.set_at, is_on = 1"""
ALL = """
select name, queue, task_type, data, schedule, terms, is_on, next_at, last_at from task_every order by name"""
SWITCH = """
update task_every set is_on = :is_on, next_at = :next, set_at = :now where name = :name"""
REMOVE = "delete from task_every where name = ?"
LAST_END = """
select status, error, result from task_history where task_id = :name and queue = :queue order by id desc limit 1"""
LIVE = f"""
select {q.STATUS_WORD} from "{{queue}}" where task_id = :name"""


class EveryArguments(RunArguments):
    """The command line of `tq every`: the words of `tq add`, or behind -- a command."""

    flags = (*Arguments.flags, "json", "on", "off", "now", "remove")
    options = {**RunArguments.options, "every": str}
    every: str | None = None
    json = on = off = now = remove = False
    name: str | None = None

    def take_words(self, words: list[str]) -> None:
        if self.task_id is not None:
            raise ValueError("a recurring task's id is its NAME: leave out --task-id")
        self.name, words = (words[0] if words else None), words[1:]
        switches = [name for name in ("on", "off", "now", "remove") if getattr(self, name)]
        if not self.name or switches:
            if len(switches) > (self.name is not None) or words:
                raise ValueError("give a NAME and one of --on, --off, --now and --remove")
            self.queue = ""
            return
        if self.every is None:
            if not words:
                raise ValueError(f"say when {self.name} comes, like '0 9 * * 1-5' or --every 6h")
            self.every, words = words[0], words[1:]
        if self.hook or self.jsonl or self.at is not None or self.after or self.after_any:
            raise ValueError("--at, --after, --hook and --jsonl do not go with tq every")
        if self.command:
            super().take_words(words)
        else:
            Arguments.take_words(self, words)


def main(argv: Sequence[str]) -> int:
    try:
        args = EveryArguments(list(argv))
        if args.every is not None:
            next_time(args.every, time.time())
    except ValueError as error:
        return cli.complain(
            cli.EX_USAGE, "tasks.py every", f"{error}; see {command('every')} --help"
        )
    if args.help:
        print(HELP, end="")
        return 0
    return cli.run("tasks.py every", lambda: run(args))


def run(args: EveryArguments) -> int:
    if args.name is None:
        return list_all(args)
    if args.every is not None:
        return put(args, args.name, args.every)
    conn = database.open_queue()
    known = {row["name"]: row for row in rows(conn)}
    if args.name not in known:
        others = f"; there are: {', '.join(known)}" if known else ""
        raise cli.Refused(f"nothing comes by the name {args.name!r}{others}")
    return change(conn, args, known[args.name])


def put(args: EveryArguments, name: str, schedule: str) -> int:
    """Add a recurring task, or change the one of this name."""
    q.check_text("the name", name, 200)
    terms = args.terms()
    terms = {key: terms[key] for key in TERMS if terms[key] != getattr(Arguments, key)}
    terms |= {"window": args.window} if args.window else {}
    if args.command:
        data, terms["argv"] = args.payload(), args.command
    else:
        text = (args.data or "{}").encode("utf-8", "surrogateescape")
        data = parse_object(sys.stdin.buffer.read() if text == b"-" else text)[0]
    q.new_row(args.task_type or "", data, name, **terms)
    q.check_queue_name(args.queue)
    conn, now = q.connect(), time.time()
    q.ensure_queue(conn, args.queue)
    told = {"name": name, "queue": args.queue, "task_type": args.task_type, "now": now}
    told |= {"data": q.to_json(data), "terms": q.to_json(terms), "schedule": schedule}
    with q.transaction(conn):
        conn.execute(PUT, {**told, "next": next_time(schedule, now)})
    q.wake(conn.state)
    return tell(conn, args, name)


def change(conn: q.Connection, args: EveryArguments, row: dict) -> int:
    """Switch a recurring task on or off, remove it, or enqueue it now."""
    name, now = row["name"], time.time()
    if args.now:
        q.ensure_queue(conn, row["queue"])
        due = Due(**{key: row[key] for key in row if key in Due._fields}, stepped=0)
        with q.transaction(conn):
            stored = q.store(conn, due.queue, row_of(due))
        said = "queued" if stored.is_new else "updated" if stored.is_updated else "duplicate"
        q.wake(conn.state)
        cli.report(args.json, {"name": name, said: True}, f"{said} {name}")
        return 0
    with q.transaction(conn):
        if args.remove:
            conn.execute(REMOVE, (name,))
        else:
            told = {"name": name, "is_on": args.on, "now": now}
            conn.execute(SWITCH, {**told, "next": next_time(row["schedule"], now)})
    q.wake(conn.state)
    if args.remove:
        cli.report(args.json, {"name": name, "removed": True}, f"{name} comes no more")
        return 0
    return tell(conn, args, name)


def tell(conn: q.Connection, args: EveryArguments, name: str) -> int:
    """Say when a recurring task comes next, and whether anybody will see to it."""
    [row] = [row for row in rows(conn) if row["name"] == name]
    when = f"next at {clock(row['next_at'])}, {ago(row['next_at'])}" if row["is_on"] else "off"
    cli.report(args.json, as_json(row), f"{name}: {when}")
    if not args.json:
        cli.say_all(remarks(conn))
    return 0


def rows(conn: q.Connection) -> list[dict]:
    """Return all recurring tasks, with what came of the last one."""
    cursor = conn.execute(ALL)
    names = [column[0] for column in cursor.description]
    found = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    queues = database.queues_of(conn)
    for row in found:
        live = (
            row["queue"] in queues
            and q.execute(conn, LIVE, row["queue"], name=row["name"]).fetchone()
        )
        ended = conn.execute(LAST_END, {"name": row["name"], "queue": row["queue"]}).fetchone()
        status, error, result = (live[0], None, None) if live else ended or (None, None, None)
        row["last"] = status and {"status": status, "error": error, "result": result}
    return found


def as_json(row: dict) -> dict:
    """Return a recurring task as --json prints it."""
    return {**row, "data": json.loads(row["data"]), "terms": json.loads(row["terms"])}


def list_all(args: EveryArguments) -> int:
    conn = database.open_queue()
    found = rows(conn)
    if args.json:
        cli.put_json([as_json(row) for row in found])
        return 0
    if not found:
        cli.say_all([f"nothing recurs; {command('every')} --help says how"])
        return 0
    lines = []
    for row in found:
        last = row["last"] or {"status": "", "error": None, "result": None}
        came = f"{last['status']}{': ' if last['error'] or last['result'] else ''}"
        came += last["error"] or show.summary(last["result"])
        fired = ago(row["last_at"]) if row["last_at"] else "-"
        coming = ago(row["next_at"]) if row["is_on"] else "off"
        lines.append(
            (
                row["name"],
                row["schedule"],
                row["queue"],
                row["task_type"],
                coming,
                fired,
                short(came),
            )
        )
    show.draw(
        show.table(("name", "when", "queue", "type", "next", "last", "what came of it"), lines)
    )
    cli.say_all(remarks(conn))
    return 0


def remarks(conn: q.Connection) -> list[str]:
    """Return a line for each queue whose recurring tasks nobody will enqueue."""
    found = []
    for queue in every.types(conn):
        kind = serving.runner_of(conn, conn.state, queue).kind
        if kind not in ("worker", "service"):
            start = f"{command('work')} {queue}, or {command('service')} --enable --queue {queue}"
            found.append(f"without a worker nothing recurs in {queue}: {start}")
    return found
