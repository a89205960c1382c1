#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["jinja2>=3.1,<4", "rich>=13,<16", "watchdog>=4,<8"]
# ///
"""See what waits, runs, failed and why, and act on it.

    tasks.py stats --watch                      counts, waiting and run times, as they change
    tasks.py list --status failed --since 1h    the dead letters of the last hour, newest first
    tasks.py retry --failed --queue approvals   put them all back
    tasks.py approve ID                         let a held task run; reject ID ends it
    tasks.py pause approvals --for 2h           hold a queue back for so long
    tasks.py wait ID --timeout 10m              until it has ended; prints its result
    tasks.py doctor                             what is wrong, and what to do about it

ID is a task's id, its beginning where only one task's id begins so, or a row's number in the list
that this terminal has shown last. DURATION is like 30, 90m, 5min, 1.5h or 2d. Every command has
--help, and --json for scripts. A status is pending, scheduled, held, blocked, in_progress,
handed_over, completed, failed, cancelled or expired. None but import makes a database where there
is none.

exit codes: 0 fine; 1 not found, not possible, or the database cannot be used; 64 usage; 65 lines of
an import were refused (they are named, the others are in); 75 the database is locked, try
again; 130 interrupted. Of wait: 0 all completed; 1 one ended otherwise; 64 an id that is not known,
or of several tasks; 75 the time-out. Of doctor: 1 something is wrong.
"""

import argparse
import heapq
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import queue_helpers as q
from taskqueue import backup, cli, database, jsonlines, service, serving, spool
from taskqueue import outcome as queue_outcome
from taskqueue import show as show_
from taskqueue.cli import EX_FAILED, EX_TEMPFAIL, EX_USAGE, Refused
from taskqueue.database import LIVE, STATUSES
from taskqueue.find import (
    FINISHED_ROW,
    LIVE_ROW,
    Found,
    Wanted,
    find,
    find_tasks,
    gather,
    history_ids,
    live_id,
    newest_of,
    newest_record,
    remember,
    source_of,
)
from taskqueue.remedies import as_typed, command
from taskqueue.text import pause_in_words, plural, seconds_of, short, span, visible, visible_lines

# How many rows list shows where there is no screen to fill.
ROWS = 50
POLL_SECONDS = 0.02
# wait says that nobody runs its tasks after this time.
STARTING_SECONDS = 2.0
RECOVER_SECONDS = 0.25
# A worker has made its run's output file by then.
CONSUMER_SECONDS = 1.0
CANCEL_SECONDS = 30.0

# A worker, or another machine, has these.
NOT_HERE = {"in_progress", "handed_over"}
# Words that people use for a status.
SAME = {"waiting": "pending", "running": "in_progress", "done": "completed"}
SORTS: dict[str, Callable[[dict], Any]] = {
    "newest": lambda row: -(seconds_of(row["completed_at"] or row["enqueued_at"]) or 0.0),
    "oldest": lambda row: seconds_of(row["completed_at"] or row["enqueued_at"]) or 0.0,
    "queue": lambda row: row["queue"],
    "type": lambda row: row["task_type"],
    "tries": lambda row: -row["attempts"],
}

# --------------------------------------------------------------------------------------- statements

CLAIMED_TASK = """
select status, {task} from "{queue}" where id = :id"""
REQUEST_CANCEL = """
update "{queue}" set cancel_requested = 1, rerun = null
where id = :id and owner is :owner and attempts = :attempts"""
# It may wait as long as it likes then.
START_NOW = """
update "{queue}" set status = 1, due_at = null, delayed_at = null, released_at = null, expires_at = null
where id = :id and status = 3 and due_at is not null"""
FAILED = """
select id, queue, task_id from task_history
where status = 'failed' and completed_at >= :since and (:queue is null or queue = :queue)
  and (:task_type is null or task_type = :task_type) order by completed_at, id"""
RETRYING = """
select id, coalesce(task_id, '{queue}-' || id) from "{queue}"
where status = 3 and released_at is not null and (:task_type is null or task_type = :task_type)
order by released_at, id"""
IS_DEAD_LETTER = """
select exists (select 1 from task_history where id = :id and queue = :queue and task_id = :task_id and status = 'failed')"""
STATUS = f"""
select {q.STATUS_WORD} from "{{queue}}" where id = :id"""

# A blocked task is put as a ready one: the other queue's groups decide.
MOVED = """
insert into "{queue}" (data, timestamp, status, priority, due_at, delayed_at, released_at, group_id, expires_at, attempts,
                       approved, rerun, error)
values (:data, :timestamp, :status, :priority, :due_at, :delayed_at, :released_at, :group_id, :expires_at, :attempts,
        :approved, :rerun, :error)"""
WAITING_ROW = """
select data, timestamp, iif(status = 4, 1, status) as status, priority, due_at, delayed_at, released_at, group_id,
       expires_at, attempts, approved, rerun, error, task_id, task_type
from "{queue}" where id = :id and status not in (2, 5)"""
WAITING_IDS = """
select id from "{queue}" where {{condition}} and (:task_type is null or task_type = :task_type)
  and (:before is null or timestamp <= :before)
order by id"""
FINISHED_IDS = """
select id, completed_at from task_history where status = :status and queue = :queue
  and (:before is null or completed_at <= :before) and (:task_type is null or task_type = :task_type)"""
DELETE_WAITING = """
delete from "{queue}" where id = :id and status not in (2, 5)"""
# What is no more as it was found, since a person approved or retried it while purge asked, stays.
DELETE_LIVE = """
delete from "{queue}" where id = :id and ({{condition}})"""
DELETE_FINISHED = """
delete from task_history where id = :id and queue = :queue and completed_at = :completed_at"""


# ------------------------------------------------------------------------------------- command line


def status(text: str) -> str:
    text = SAME.get(text, text)
    if text not in STATUSES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a status: {', '.join(STATUSES)}")
    return text


def slots(text: str) -> int | None:
    return None if text == "none" else cli.whole_number(text)


def some_text(text: str) -> str:
    text = cli.utf8(text)
    if not 0 < len(text) <= 1000:
        raise argparse.ArgumentTypeError("it is a text of 1 to 1000 characters")
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. A command is a function of this file, and an entry here that names its
    arguments.
    """
    parser = cli.make_parser("tasks.py", __doc__)
    commands = parser.add_subparsers(
        parser_class=cli.Parser, metavar="COMMAND", required=True, dest="command"
    )

    def command(run: Callable[..., int], **many: str) -> Callable[..., argparse.Action]:
        """The function that adds arguments; `many` names one argument that is given often."""
        entry = cli.add_command(commands, run)
        add = entry.add_argument
        for name, how_many in many.items():
            metavar = {"ids": "ID", "queues": "QUEUE"}[name]
            add(name, metavar=metavar, nargs=how_many, type=some_text)
            if name == "ids" and how_many == "+":
                add("--queue", metavar="QUEUE", type=cli.utf8, help=several)
        return add

    def of_type(add: Callable, help: str | None = None) -> None:
        add("--type", dest="task_type", metavar="TYPE", type=cli.utf8, help=help)

    def age(add: Callable, name: str, help: str) -> None:
        add(name, metavar="DURATION", type=cli.duration, help=help)

    several = "where several queues have that id"
    often = {"action": "append", "help": "may be given several times"}

    add = command(stats)
    add("--watch", action="store_true", help="redraw until Ctrl-C")
    add("--interval", metavar="DURATION", type=cli.duration, default=1.0, help="of --watch (1 s)")

    add = command(list_)
    add("--queue", dest="queues", metavar="QUEUE", type=cli.utf8, **often)
    add("--status", dest="statuses", metavar="STATUS", type=status, **often)
    of_type(add)
    age(add, "--since", "enqueued (finished tasks: finished) at most this long ago")
    age(add, "--before", "… at least this long ago")
    add("--text", type=some_text, help="in the task, its error or its output")
    add("--sort", choices=SORTS, help="(default: in the order of claims, then by the end)")
    add("--limit", metavar="N", type=cli.whole_number, help=f"(default: a screen, or {ROWS})")

    command(show, ids="+")

    add = command(logs)
    add("id", metavar="ID", type=some_text)
    add("--queue", help=several, type=cli.utf8)
    add("-f", "--follow", action="store_true", help="go on until the task is finished")

    age(command(wait, ids="+"), "--timeout", "give up after this time (default: never)")

    command(approve, ids="+")
    command(reject, ids="+")("--reason", type=some_text, help="why; the history keeps it")

    add = command(retry, ids="*")
    add("--failed", action="store_true", help="all dead letters, of --queue, --type and --since")
    add(
        "--scheduled",
        action="store_true",
        help="run now what failed and waits for its next attempt, of --queue and --type",
    )
    add("--queue", type=cli.utf8)
    of_type(add)
    age(add, "--since", "failed at most this long ago")

    add = command(cancel, ids="+")
    add(
        "--wait",
        metavar="DURATION",
        type=cli.duration,
        default=CANCEL_SECONDS,
        help=f"for a running task to end (default {CANCEL_SECONDS:g} s)",
    )

    add = command(pause, queues="+")
    add(
        "--for",
        dest="seconds",
        metavar="DURATION",
        type=cli.duration,
        help="it goes on by itself then (default: until resume)",
    )
    add("--reason", type=some_text, help="shown wherever the pause is")
    command(resume, queues="+")
    command(limit, queues="+")(
        "--slots", metavar="N", type=slots, required=True, help="a number, or none for any number"
    )

    add = command(move, ids="*")
    add("to", metavar="QUEUE", help="where to", type=cli.utf8)
    add(
        "--from",
        dest="source",
        metavar="QUEUE",
        type=cli.utf8,
        help="all that wait there, or where the IDs are",
    )
    of_type(add, "of these, only the tasks of this type")

    add = command(purge)
    add("queue", metavar="QUEUE", type=cli.utf8)
    add(
        "--status",
        dest="statuses",
        metavar="STATUS",
        action="append",
        type=status,
        help="(default: all that wait); may be given several times",
    )
    of_type(add)
    age(add, "--before", "enqueued, or finished, at least this long ago")
    add("--yes", action="store_true", help="do not ask")

    command(take_in)
    add = command(page)
    add("file", metavar="FILE", nargs="?", help="(default: page.html in the state directory)")
    add("--open", dest="open_it", action="store_true", help="show it in the browser")
    add("--watch", action="store_true", help="write it again after each change, until Ctrl-C")
    add(
        "--interval",
        metavar="DURATION",
        type=cli.duration,
        default=30.0,
        help="how often a browser reads it again with --watch (default 30 s)",
    )

    add = command(jsonlines.export)
    add("file", metavar="FILE", nargs="?", default="-", help="(default: stdout)")
    add("--queue", dest="queues", metavar="QUEUE", type=cli.utf8, **often)
    add("--history", action="store_true", help="finished tasks, too")
    command(jsonlines.import_)("file", metavar="FILE", help="of export; - for stdin")
    command(backup.backup)("file", metavar="FILE", type=Path)
    command(backup.restore)("file", metavar="FILE", type=Path, help="of backup")
    add = command(doctor)
    says = "a task that waits longer is a problem (default 10m)"
    add("--max-wait", metavar="DURATION", type=cli.duration, default="10m", help=says)

    says = "Have a worker started whenever there is work, by systemd or launchd"
    commands.add_parser("service", help=says, add_help=False)

    args = parser.parse_args(argv)
    fault = fault_in(args)
    if fault:
        cli.Parser(prog=f"tasks.py {args.command}").error(fault)
    return args


def fault_in(args: argparse.Namespace) -> str:
    """What is wrong with a command line whose words are each right; "" for nothing."""
    if args.run is retry and bool(args.ids) + args.failed + args.scheduled != 1:
        return "give the IDs to retry, or --failed, or --scheduled"
    if args.run is retry and args.since is not None and not args.failed:
        return "--since goes with --failed"
    if args.run is retry and args.ids and args.task_type:
        return "--type goes with --failed or --scheduled"
    if args.run is move and not args.ids and not args.source:
        return "give the IDs to move, or --from"
    if args.run is move and args.ids and args.task_type:
        return "--type goes with --from and no ID"
    if args.run is purge and "in_progress" in (args.statuses or ()):
        return f"a running task is not purged: {command('cancel ID')}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["service"]:
        from taskqueue import service

        return service.main(argv[1:])
    if argv[:1] == ["dashboard"]:
        return cli.complain(EX_USAGE, "tasks.py dashboard", f"{command('page --open')} replaced it")
    args = vars(parse(argv))
    run, name = args.pop("run"), args.pop("command")

    def work() -> int:
        # What hooks left before a restore is for the database that it puts in place; doctor changes nothing.
        if run not in (take_in, backup.restore, doctor):
            spool.take_in_first()
        return run(**args)

    return cli.run(f"tasks.py {name}", work)


def doctor(max_wait: float, as_json: bool) -> int:
    """Say what is wrong with the queue, and what mends it. It changes nothing, and exits 1 if
    something is wrong.
    """
    from taskqueue.doctor import examine

    return examine(max_wait, as_json)


def take_in(as_json: bool) -> int:
    """Take in what hooks have left. A shell that reads the tables itself runs this first."""
    taken, complaints = spool.take_in_spool()
    if as_json:
        cli.put_json({"taken_in": taken, "complaints": complaints})
    else:
        print(f"{plural(taken, 'task')} taken in")
    for complaint in () if as_json else complaints:
        cli.complain(EX_FAILED, "tasks.py take-in", complaint)
    return EX_FAILED if complaints else 0


# -------------------------------------------------------------------------------------------- stats


def stats(watch: bool, interval: float, as_json: bool) -> int:
    """Show how many tasks of each queue and type wait, run, and ended in the last hour and day, and
    how long they took.
    """
    conn = database.open_queue()
    if watch:
        return watch_stats(interval, as_json)
    numbers = gather(conn)
    if as_json:
        cli.put_json(numbers)
    else:
        show_.draw(show_.stats_drawing(numbers))
    return 0


def watch_stats(interval: float, as_json: bool) -> int:
    """Show the numbers again and again: in place on a terminal, below each other elsewhere."""

    def look() -> tuple[dict, float]:
        began = time.monotonic()
        numbers = gather(database.open_queue())
        # A big database is looked at less often: this must not become the load that it shows.
        return numbers, max(interval, 4 * (time.monotonic() - began))

    try:
        if as_json or not sys.stdout.isatty():
            while True:
                numbers, pause = look()
                if as_json:
                    cli.put_json(numbers, indent=None)
                else:
                    show_.draw(show_.stats_drawing(numbers))
                sys.stdout.flush()
                time.sleep(pause)
        from rich.live import Live

        with Live(console=show_.console(), auto_refresh=False) as live:
            while True:
                numbers, pause = look()
                live.update(show_.stats_drawing(numbers), refresh=True)
                time.sleep(pause)
    except KeyboardInterrupt:
        return 0


# --------------------------------------------------------------------------------------------- page


def page(file: str | None, open_it: bool, watch: bool, interval: float, as_json: bool) -> int:
    """Write all this as one HTML file, which a browser reads without a server, and print its path."""
    from taskqueue import page as page_of

    refresh = max(round(interval), 1) if watch else None
    return page_of.page(file, open_it, refresh, as_json)


# --------------------------------------------------------------------------- list, show, logs, wait


def list_(
    queues: list[str] | None,
    statuses: list[str] | None,
    task_type: str | None,
    since: float | None,
    before: float | None,
    text: str | None,
    sort: str | None,
    limit: int | None,
    as_json: bool,
) -> int:
    """List tasks: running ones, then waiting ones in the order of their claims, then finished ones,
    newest first.
    """
    conn, now = database.open_queue(), time.time()
    database.check_known(conn, queues or ())
    on_screen = sys.stdout.isatty() and not as_json
    limit = limit or (show_.rows_on_screen() if on_screen else ROWS)
    newest = math.inf if before is None else now - before
    oldest = -math.inf if since is None else now - since
    with database.snapshot(conn):
        wanted = Wanted(queues, statuses or STATUSES, task_type, oldest, newest, text)
        found = find_tasks(conn, wanted)
        key = SORTS.get(sort or "")
        # One more than are shown says whether there are more.
        rows = heapq.nsmallest(limit + 1, found, key=key) if key else first(limit + 1, found)
        controls = q.controls(conn)
    more, rows = len(rows) > limit, rows[:limit]
    if as_json:
        for row in rows:
            row["data"] = show_.payload(row["data"])
        cli.put_json(rows)
    elif rows:
        if on_screen and len(rows) > show_.rows_on_screen():
            # What runs would scroll away.
            rows.sort(key=lambda row: row["status"] == "in_progress")
        show_.draw(show_.list_table(rows, controls))
        if on_screen:
            remember(conn.state, rows)
    sys.stdout.flush()
    if not as_json:
        say_who_waits(conn, rows)
    if not rows:
        print("no task is like that", file=sys.stderr)
    if more:
        print(f"only the first {limit}; --limit N shows more", file=sys.stderr)
    return 0


def say_who_waits(conn: q.Connection, rows: Iterable[dict]) -> None:
    """Name on stderr what keeps waiting tasks from being run: no worker, or no handler."""
    waiting: dict[str, set[str]] = {}
    for row in rows:
        if row["status"] in serving.WAITING:
            waiting.setdefault(row["queue"], set()).add(row["task_type"])
    say_all(serving.remarks(conn, conn.state, waiting))


def say_all(lines: Iterable[str]) -> None:
    for line in lines:
        print(visible(line), file=sys.stderr, flush=True)


def first(number: int, rows: Iterable[dict]) -> list[dict]:
    return [row for row, _ in zip(rows, range(number), strict=False)]


def show(ids: list[str], queue: str | None, as_json: bool) -> int:
    """Show everything about a task: its fields, its data, its history and its output."""
    conn, shown = database.open_queue(), []
    for ident in ids:
        with database.snapshot(conn):
            shown.append(all_about(conn, find(conn, ident, queue)))
    if as_json:
        cli.put_json(shown[0] if len(shown) == 1 else shown)
        return 0
    for number, task in enumerate(shown):
        sys.stdout.write(f"{chr(10) if number else ''}{show_.task_text(task)}\n")
        if task["history"]:
            sys.stdout.write("\nbefore\n")
            show_.draw(show_.history_table(task["history"]))
        if task["runs"]:
            sys.stdout.write(f"\noutput files\n{show_.output_files(task['runs'])}")
    return 0


def all_about(conn: q.Connection, found: Found) -> dict:
    """A task as it is now, its records before, where it came from, what it led to, and its runs."""
    records = []
    if found.row_id is not None:
        records.append(database.as_dict(q.execute(conn, LIVE_ROW, found.queue, id=found.row_id)))
    for row_id in history_ids(conn, found):
        records.append(database.as_dict(conn.execute(FINISHED_ROW, {"id": row_id})))
    for record in records:
        record["data"] = show_.payload(record["data"])
    task = records[0]
    return task | {
        "came_from": source_of(conn, task["data"]),
        "history": records[1:],
        "runs": [run._asdict() for run in show_.runs_of(task)],
    }


def logs(id: str, queue: str | None, follow: bool, as_json: bool) -> int:
    """Print what the handler printed: its stdout on stdout, its stderr on stderr. Of the last
    attempt, or the running one.
    """
    conn = database.open_queue()
    found = find(conn, id, queue)
    if follow and not as_json:
        return show_.follow_logs(conn, found)
    record = newest_record(conn, found)
    runs = show_.runs_of(record)
    is_there = bool(runs) and runs[-1].attempt >= record["attempts"]
    if not is_there and not record["attempts"]:
        raise Refused(f"task {found.task_id} has not run yet ({record['status']}); -f waits for it")
    sources = {
        ending: show_.open_output(runs[-1].path if is_there else None, ending, record)
        for ending in show_.KEPT
    }
    if as_json:
        told = {"queue": found.queue, "task_id": found.task_id}
        told |= {"status": record["status"], "attempt": record["attempts"]}
        show_.print_as_json(told, sources)
    else:
        show_.print_outputs(sources)
    return 0


def wait(ids: list[str], queue: str | None, timeout: float | None, as_json: bool) -> int:
    """Wait until tasks have ended, and print their results. A task that is tried again has not
    ended.
    """
    conn, began = database.open_queue(), time.monotonic()
    try:
        tasks = [find(conn, ident, queue) for ident in ids]
    except Refused as error:
        return cli.complain(EX_USAGE, "tasks.py wait", error)
    # Set by the watch on the database whenever there is reason to look.
    changed = threading.Event()
    q.Watch.of(conn.state).listeners.add(changed)
    # A worker that was started a moment ago may still be starting.
    tell_at, told = began + STARTING_SECONDS, set()
    while True:
        changed.clear()
        conn = database.open_queue()
        with database.snapshot(conn):
            records = [newest_of(conn, found) for found in tasks]
        waiting = [record["task_id"] for record in records if record["completed_at"] is None]
        now = time.monotonic()
        left = math.inf if timeout is None else timeout - (now - began)
        if waiting and (now >= tell_at or left <= 0):
            lines = [] if as_json else why_waiting(conn, records)
            say_all(line for line in lines if line not in told)
            told.update(lines)
            tell_at = now + q.SAFETY_TICK_SECONDS
        if not waiting or left <= 0:
            break
        changed.wait(min(left, max(0.0, tell_at - now), threading.TIMEOUT_MAX))
    results = [result_of(record) for record in records]
    if as_json:
        cli.put_json(results[0] if len(results) == 1 else results)
    else:
        for record in records:
            if record["completed_at"] is not None:
                why = f": {record['error']}" if record["error"] else ""
                print(visible(f"{record['task_id']} {record['status']}{why}"))
                print(visible_lines(record["result"] or ""), end="")
    sys.stdout.flush()
    if waiting:
        total = plural(len(records), "task")
        names = f"{', '.join(waiting[:10])}{', …' if len(waiting) > 10 else ''}"
        error = f"{len(waiting)} of {total} had not ended after {span(timeout)}: {names}"
        return cli.complain(EX_TEMPFAIL, "tasks.py wait", error)
    return 0 if all(record["status"] == "completed" for record in records) else EX_FAILED


def why_waiting(conn: q.Connection, records: Sequence[dict]) -> list[str]:
    """Name what tasks wait for beside their turn: a person, the end of a pause, a worker."""
    lines, controls, waiting = [], q.controls(conn), {}
    for record in records:
        queue, control = record["queue"], controls.get(record["queue"])
        if record["status"] == "held":
            lines.append(f"{record['task_id']} is held: {command('approve')} {record['task_id']}")
        if record["status"] in serving.WAITING:
            waiting.setdefault(queue, set()).add(record["task_type"])
            if control and control.paused:
                lines.append(f"{queue} is {pause_in_words(control)}")
    return list(dict.fromkeys([*lines, *serving.remarks(conn, conn.state, waiting)]))


def result_of(record: dict) -> dict:
    names = ("queue", "task_id", "task_type", "status", "attempts", "exit_code", "error", "result")
    return {name: record.get(name) for name in names} | {
        "summary": show_.summary(record.get("result"))
    }


# --------------------------------------------------- approve, reject, retry, cancel, pause and slots


def tell(
    command: str, done: str, outcomes: list[dict], as_json: bool, total: str | None = None
) -> int:
    """Print what was done, and name the tasks that were left as they are; the exit code.

    Each outcome has queue and task_id, under `done` whether it was, and if not, why. A total is
    said in place of a line for each task.
    """
    number = sum(outcome[done] for outcome in outcomes)
    lines = [f"{done} {outcome['task_id']}" for outcome in outcomes if outcome[done]]
    lines = lines if total is None else [f"{done} {plural(number, 'task')}{total}"]
    if as_json or lines:
        value = outcomes if done == "cancelled" else {done: number, "tasks": outcomes}
        cli.report(as_json, value, "\n".join(lines))
    for outcome in outcomes:
        if not outcome[done]:
            error = f"task {outcome['task_id']} of {outcome['queue']} was not {done}"
            cli.complain(EX_FAILED, f"tasks.py {command}", f"{error}: {outcome['why']}")
    return 0 if number == len(outcomes) else EX_FAILED


def have_run(conn: q.Connection, queues: Iterable[str], as_json: bool) -> None:
    """Have the tasks that this command made ready run: start a worker, or say how to start one."""
    sys.stdout.flush()
    lines = service.have_run(conn, queues)
    say_all([] if as_json else lines)


def change_each(conn: q.Connection, done: str, items: Iterable, change: Callable) -> list[dict]:
    """The outcome of change(found), None or why not, for each task; who sleeps is woken."""
    outcomes = []

    def outcome(found: Found) -> dict:
        why = change(found)
        said = {} if why is None else {"why": why}
        return {"queue": found.queue, "task_id": found.task_id, done: why is None, **said}

    try:
        outcomes.extend(database.in_steps(conn, items, outcome))
    finally:
        q.wake(conn.state)
    return outcomes


def why_not_held(conn: q.Connection, found: Found) -> str:
    row = found.row_id and q.execute(conn, STATUS, found.queue, id=found.row_id).fetchone()
    return f"it is {row[0]}, not held" if row else "it has ended already"


def approve(ids: list[str], queue: str | None, as_json: bool) -> int:
    """Let held tasks run."""
    conn = database.open_queue()

    def let_run(found: Found) -> str | None:
        if found.row_id and queue_outcome.approve(conn, found.queue, found.row_id):
            return None
        return why_not_held(conn, found)

    wanted = [find(conn, ident, queue) for ident in ids]
    outcomes = change_each(conn, "approved", wanted, let_run)
    code = tell("approve", "approved", outcomes, as_json)
    have_run(conn, [task["queue"] for task in outcomes if task["approved"]], as_json)
    return code


def reject(ids: list[str], queue: str | None, reason: str | None, as_json: bool) -> int:
    """End held tasks as cancelled. The history keeps the reason."""
    conn, why = database.open_queue(), short(reason, 500)

    def end(found: Found) -> str | None:
        if found.row_id and queue_outcome.reject(conn, found.queue, found.row_id, why):
            return None
        return why_not_held(conn, found)

    wanted = [find(conn, ident, queue) for ident in ids]
    return tell("reject", "rejected", change_each(conn, "rejected", wanted, end), as_json)


def retry(
    ids: list[str],
    failed: bool,
    scheduled: bool,
    queue: str | None,
    task_type: str | None,
    since: float | None,
    as_json: bool,
) -> int:
    """Put finished tasks back into their queue, attempts at zero; a scheduled one becomes ready
    now. Neither expires any more. One that ended while it was held is held again.
    """
    conn = database.open_queue()
    if queue is not None:
        database.check_known(conn, [queue])
    ended: dict[Found, int] = {}
    which = {"queue": queue, "task_type": task_type}
    if failed:
        oldest = "" if since is None else q.utc(time.time() - since)
        for history_id, name, task_id in conn.execute(FAILED, {**which, "since": oldest}):
            ended[Found(name, task_id, None)] = history_id
        wanted = list(ended)
    elif scheduled:
        wanted = [
            Found(name, task_id, row_id)
            for name in ([queue] if queue else database.queues_of(conn))
            for row_id, task_id in q.execute(conn, RETRYING, name, task_type=task_type).fetchall()
        ]
    else:
        wanted = [find(conn, ident, queue) for ident in ids]

    def change(found: Found) -> str | None:
        return put_back(conn, found, ended.get(found))

    outcomes = change_each(conn, "retried", wanted, change)
    code = tell("retry", "retried", outcomes, as_json, None if ids else "")
    for found, outcome in zip(wanted, outcomes, strict=True):
        row_id = outcome["retried"] and live_id(conn, found.queue, found.task_id)
        row = row_id and q.execute(conn, STATUS, found.queue, id=row_id).fetchone()
        if row and row[0] == "held":
            held = f"task {found.task_id} is held again, as it was"
            print(f"{held}: {command('approve')} {found.task_id}", file=sys.stderr)
    have_run(conn, [task["queue"] for task in outcomes if task["retried"]], as_json)
    return code


def put_back(conn: q.Connection, found: Found, dead_letter: int | None) -> str | None:
    """None when the task is back in its queue, or ready now, else why not. `dead_letter` is the
    record that is to be retried; None for a task of any end, or one that waits.
    """
    if found.queue not in database.queues_of(conn):
        return "its queue is gone"
    row_id = live_id(conn, found.queue, found.task_id)
    if row_id is None:
        if found.row_id is not None:
            return "it has run or gone meanwhile"
        record = dead_letter or next(iter(history_ids(conn, found)), None)
        told = {"id": record, "queue": found.queue, "task_id": found.task_id}
        # Where somebody else was faster, its record is gone, and another's may have the id by now.
        if record is None or dead_letter and not conn.execute(IS_DEAD_LETTER, told).fetchone()[0]:
            return "it was retried already, purged or pruned"
        if q.redrive(conn, found.queue, record):
            return None
        why = "its data is no JSON object any more, or its row another task's"
        return f"{why}: {command('show')} {found.task_id}"
    if not dead_letter and q.execute(conn, START_NOW, found.queue, id=row_id).rowcount == 1:
        return None
    (word,) = q.execute(conn, STATUS, found.queue, id=row_id).fetchone()
    if word == "held":
        return f"it is held for a person: {command('approve')} {found.task_id}"
    return f"a task of this id is waiting or running already ({word})"


def cancel(ids: list[str], queue: str | None, wait: float, as_json: bool) -> int:
    """Cancel tasks: a waiting one at once, a running one by ending its process group. The history
    keeps them as cancelled.
    """
    conn = database.open_queue()
    outcomes = []
    for task in [find(conn, ident, queue) for ident in ids]:
        why = cancel_task(conn, task, time.monotonic() + wait)
        told = {"queue": task.queue, "task_id": task.task_id}
        outcomes.append({**told, "cancelled": why is None, "why": why})
    return tell("cancel", "cancelled", outcomes, as_json)


def cancel_task(conn: q.Connection, found: Found, deadline: float) -> str | None:
    """None when the task is cancelled, else why not."""
    if found.row_id is None:
        return f"it has ended already ({newest_record(conn, found)['status']})"
    asked, first_seen, recover_at = None, {}, 0.0
    while True:
        row = q.execute(conn, CLAIMED_TASK, found.queue, id=found.row_id).fetchone()
        if row is None:
            ended = newest_record(conn, found)["status"]
            return None if ended == "cancelled" else f"it ended before that ({ended})"
        task = q.Task.from_row(found.queue, row[1:])
        if row[0] == q.HANDED_OVER:
            with q.transaction(conn):
                told = {"id": task.id, "owner": task.owner, "attempts": task.attempts}
                q.execute(conn, REQUEST_CANCEL, task.queue, **told)
            q.wake(conn.state)
            return f"another machine has it; {as_typed('relay.py pull')} has that machine end it"
        if row[0] != q.CLAIMED:
            told = {"id": task.id, "owner": task.owner, "attempts": task.attempts}
            with q.transaction(conn):
                q.execute(conn, REQUEST_CANCEL, task.queue, **told)
                done = q.finish(conn, task, "cancelled", error="cancelled while it waited")
            if done:
                q.wake(conn.state)
                return None
            # Somebody claimed it at this moment.
            continue
        if time.monotonic() >= recover_at:
            recover_at = time.monotonic() + RECOVER_SECONDS
            if q.recover(conn.state)[0]:
                # Its worker was dead; now it waits, or has ended.
                continue
        seen = first_seen.setdefault(task.run_name, time.monotonic())
        has_run = (conn.state / "logs" / f"{task.run_name}.out").exists()
        if has_run and asked != task.run_name:
            ask_to_end(conn, task)
            asked = task.run_name
        if asked != task.run_name and time.monotonic() > seen + CONSUMER_SECONDS:
            return (
                f"process {(task.owner or q.NOBODY).split('-')[0]} claimed it itself, without a "
                "handler (get_ack_queue or the like): "
                "only that process can end it"
            )
        if time.monotonic() > deadline and asked == task.run_name:
            return why_not_ended(conn, task)
        time.sleep(POLL_SECONDS)


def ask_to_end(conn: q.Connection, task: q.Task) -> None:
    """Have the task's worker end its run."""
    told = {"id": task.id, "owner": task.owner, "attempts": task.attempts}
    with q.transaction(conn):
        q.execute(conn, REQUEST_CANCEL, task.queue, **told)
    q.wake(conn.state)


def why_not_ended(conn: q.Connection, task: q.Task) -> str:
    """What is known of a run that was to end, and has not."""
    from taskqueue import recovery as owners

    if owners.is_dead(conn.state, task.owner):
        return (
            "its worker is dead and its handler goes on; see who holds: fuser -v "
            f"'{conn.state}/logs/{task.run_name}.out'"
        )
    return f"its worker {task.owner} was told, and has not ended it yet; it will, unless it hangs"


def pause(queues: list[str], seconds: float | None, reason: str | None, as_json: bool) -> int:
    """Hold back claims of a queue, until resume or for a time. Running tasks go on, enqueuing
    works; a restart changes nothing."""
    until = None if seconds is None else time.time() + seconds
    why = None if reason is None else short(reason, 500)
    conn, changed = change_queues(
        queues, lambda conn, queue: q.pause(conn, queue, until, why, by="person")
    )
    controls, told, lines = q.controls(conn), [], []
    for queue in queues:
        holds = controls.get(queue)
        said = {
            "until": holds and holds.until and q.utc(holds.until),
            "reason": holds and holds.reason,
        }
        said = {name: value for name, value in said.items() if value}
        told.append({"queue": queue, "paused": True, "changed": changed[queue], **said})
        words = pause_in_words(holds) if holds else "paused"
        line = (
            f"{queue} is {words}" if changed[queue] else f"{queue} was paused already, {words[7:]}"
        )
        if seconds is not None and not changed[queue]:
            line += f"; to shorten that: {command('resume')} {queue}, then pause it again"
        lines.append(line)
    cli.report(as_json, told, "\n".join(lines))
    return 0


def resume(queues: list[str], as_json: bool) -> int:
    """Let a paused queue's tasks be claimed again."""
    conn, changed = change_queues(queues, q.resume, create=False)
    told = [{"queue": name, "paused": False, "changed": changed[name]} for name in queues]
    lines = [f"resumed {name}" if changed[name] else f"{name} was not paused" for name in queues]
    cli.report(as_json, told, "\n".join(lines))
    have_run(conn, queues, as_json)
    return 0


def limit(queues: list[str], slots: int | None, as_json: bool) -> int:
    """Let at most N tasks of a queue run at a time, whichever workers and consumers serve it."""
    change_queues(queues, lambda conn, queue: q.limit(conn, queue, slots))
    number = "any number" if slots is None else f"at most {slots}"
    lines = [f"{queue}: {number} of its tasks at a time" for queue in queues]
    cli.report(as_json, [{"queue": queue, "slots": slots} for queue in queues], "\n".join(lines))
    return 0


def change_queues(
    queues: list[str], change: Callable, create: bool = True
) -> tuple[q.Connection, dict]:
    """Call change(conn, queue) for each queue in one transaction, wake who sleeps, and return what it said.

    Before its first task a queue is made, so that the first one finds what holds it back.
    """
    conn = q.connect(create=create)
    if not create:
        database.check_known(conn, queues)
    with q.transaction(conn):
        for queue in queues:
            q.ensure_queue(conn, queue)
        changed = {queue: change(conn, queue) for queue in queues}
    q.wake(conn.state)
    return conn, changed


# ----------------------------------------------------------------------------------- move and purge


def move(ids: list[str], to: str, source: str | None, task_type: str | None, as_json: bool) -> int:
    """Move waiting tasks to another queue, each under its own id."""
    conn = database.open_queue()
    database.check_known(conn, [to, *([source] if source else [])])
    if ids:
        wanted = []
        for found in (find(conn, ident, source, option="--from") for ident in ids):
            if found.row_id is None:
                raise Refused(f"task {found.task_id} has ended: retry it first, then move it")
            wanted.append(found)
    else:
        which = {"task_type": task_type, "before": None}
        statement = q.on_queue(WAITING_IDS, source).format(condition="status not in (2, 5)")
        wanted = [Found(source, "", row_id) for (row_id,) in conn.execute(statement, which)]
    if any(found.queue == to for found in wanted):
        raise Refused(f"queue {to!r} is where it is already")
    outcomes = []
    try:
        outcomes.extend(database.in_steps(conn, wanted, lambda found: move_task(conn, found, to)))
    finally:
        q.wake(conn.state)
    code = tell("move", "moved", outcomes, as_json, f" to {to}")
    have_run(conn, [to] if any(task["moved"] for task in outcomes) else [], as_json)
    return code


def move_task(conn: q.Connection, found: Found, to: str) -> dict:
    row = database.as_dict(q.execute(conn, WAITING_ROW, found.queue, id=found.row_id))
    task_id = found.task_id or row.get("task_id") or f"{found.queue}-{found.row_id}"
    outcome = {"queue": found.queue, "task_id": task_id, "moved": False}
    if not row:
        return outcome | {"why": "it is running, handed over, or gone"}
    if row.pop("task_id") is None:
        # A bare payload is called after its queue: an envelope keeps its name.
        row["data"] = jsonlines.envelope_of(
            task_id, row["task_type"], row["timestamp"], row["data"]
        )
    del row["task_type"]
    if q.execute(conn, MOVED, to, **row).rowcount != 1:
        return outcome | {"why": f"a task of this id is waiting or running in {to}"}
    q.execute(conn, DELETE_WAITING, found.queue, id=found.row_id)
    return outcome | {"moved": True}


def purge(
    queue: str,
    statuses: list[str] | None,
    task_type: str | None,
    before: float | None,
    yes: bool,
    as_json: bool,
) -> int:
    """Delete waiting tasks of a queue, or with --status finished or handed over ones, for good.
    Asks first; never a running one."""
    conn = database.open_queue()
    database.check_known(conn, [queue])
    newest = None if before is None else time.time() - before
    statuses = list(dict.fromkeys(statuses or [name for name in LIVE if name not in NOT_HERE]))
    wanted: list[tuple] = []
    for name in statuses:
        which = {"task_type": task_type, "before": newest}
        if name in LIVE:
            statement = q.on_queue(WAITING_IDS, queue).format(condition=LIVE[name])
        else:
            statement = FINISHED_IDS
            which |= {"status": name, "queue": queue}
            which["before"] = None if newest is None else q.utc(newest)
        wanted += [(name, *row) for row in conn.execute(statement, which)]
    kinds = Counter(name for name, *_ in wanted)
    if "handed_over" in kinds:
        print("another machine may still run what is handed over", file=sys.stderr)
    if wanted and not yes:
        these = ", ".join(f"{number:,} {name}" for name, number in kinds.items())
        if as_json or not sys.stdin.isatty():
            raise Refused(
                f"this would delete {these} of {queue} for good; add --yes, there is nobody to ask"
            )
        print(f"Delete {these} of {queue} for good? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refused("nothing was deleted")

    # A blocked task becomes pending when the one before it is deleted.
    others = [name for name in statuses if name in LIVE and name not in ("held", "handed_over")]
    still = {name: " or ".join(LIVE[each] for each in others) for name in others}
    still |= {name: LIVE[name] for name in ("held", "handed_over")}

    def delete(item: tuple) -> int:
        name, row_id, *ended = item
        if ended:
            # Another task may have its record's id by now.
            told = {"id": row_id, "queue": queue, "completed_at": ended[0]}
            return conn.execute(DELETE_FINISHED, told).rowcount
        statement = q.on_queue(DELETE_LIVE, queue).format(condition=still[name])
        return conn.execute(statement, {"id": row_id}).rowcount

    deleted = sum(database.in_steps(conn, wanted, delete))
    cli.report(
        as_json,
        {"queue": queue, "deleted": deleted},
        f"deleted {plural(deleted, 'task')} of {queue}",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
