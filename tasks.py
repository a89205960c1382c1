#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=13,<16"]
# ///
"""See what waits, runs, failed and why, and act on it.

    tasks.py stats --watch                          counts, waiting and run times, redrawn as they change
    tasks.py list --status failed --since 1h        the dead letters of the last hour, newest first
    tasks.py retry --failed --queue approvals       put them all back
    tasks.py doctor                                 what is wrong with the queue, and what to do about it

ID is a task's id, or its beginning where only one task's id begins so. AGE is a number and s, m, h, d or w, like 90m.
Every command has --help, and --json for scripts. A status is pending, scheduled, blocked, in_progress, completed,
failed or cancelled. None but import makes a database where there is none.

exit codes: 0 fine; 1 not found, not possible, or the database cannot be used; 64 usage; 65 lines or files of an
import were refused (they are named, the others are in); 75 the database is locked, try again; 130 interrupted.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import queue_cli as cli
import queue_helpers as q
from queue_cli import EX_FAILED, EX_USAGE, FINISHED, LIVE, STATUSES, Refused

HOUR, DAY = 3_600, 86_400
SAMPLE = 2_000  # finished tasks of a queue, type and status, the newest, that medians and percentiles are made of
MATCHES = 10  # how many an ambiguous ID lists
SCAN_SECONDS = 0.4  # how long `list --text` looks, unless --all
POLL_SECONDS = 0.02
RECOVER_SECONDS = 0.25
CONSUMER_SECONDS = 1.0  # a worker has made its run's output file by then
CANCEL_SECONDS = 30.0
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_MINUTES = 60

CLAIM_ORDER = {"in_progress": "claimed_at", "pending": "-priority", "scheduled": "due_at", "blocked": "id"}
# Commands that other scripts have.
HANDED_OVER = {
    "export": "Write tasks as JSON lines (transfer.py)",
    "import": "Take in an export, or the files of a file-based queue (transfer.py)",
    "backup": "Copy the database while workers go on (transfer.py)",
    "restore": "Put a backup into the place of the database (transfer.py)",
    "doctor": "Say what is wrong, each with its remedy (doctor.py)",
}
SAME = {"waiting": "pending", "running": "in_progress", "done": "completed"}  # words that people use

# ---------------------------------------------------------------------------------------------------------- statements

COUNT_BY_TYPE = {status: f"""
select coalesce(task_type, '{{queue}}'), count(*), min(timestamp) from "{{queue}}" where {condition}
group by task_type""" for status, condition in LIVE.items()}  # fmt: skip
# The + keeps SQLite from picking an index by that column: the one wanted is the one that has the order.
COUNT_FINISHED = """
select queue, task_type, status, count(*), sum(completed_at >= :hour_ago) from task_history
where +completed_at >= :day_ago group by queue, task_type, status"""
NEWEST_TIMES = """
select completed_at, (julianday(started_at) - julianday(enqueued_at)) * 86400.0,
       (julianday(completed_at) - julianday(started_at)) * 86400.0
from task_history
where queue = :queue and task_type = :task_type and status = :status and completed_at >= :day_ago and started_at is not null
order by completed_at desc limit :sample"""
COUNT_BETWEEN = """
select count(*) from task_history where completed_at >= :since and completed_at < :until"""
PAUSED = """
select queue from task_paused"""

LIST_LIVE = """
select id, {{match}}, {{key}} from "{queue}"
where {{condition}} and timestamp >= :since and timestamp <= :before and {{of_type}}
order by {{order}}, id"""
LIVE_MATCHES = """
(data like :text escape '\\' or '{queue}-' || id like :text escape '\\' or coalesce(error, '') like :text escape '\\')"""
LIST_FINISHED = """
select id, {match} from task_history
where completed_at >= :since and completed_at <= :before and +status in (select value from json_each(:statuses))
  and (:queues is null or +queue in (select value from json_each(:queues)))
  and (:task_type is null or +task_type = :task_type)
order by completed_at desc"""
FINISHED_MATCHES = """
(data like :text escape '\\' or task_id like :text escape '\\' or coalesce(error, '') like :text escape '\\'
  or coalesce(result, '') like :text escape '\\' or coalesce(log, '') like :text escape '\\')"""

LIVE_ROW = f"""
select '{{queue}}' as queue, id, coalesce(task_id, '{{queue}}-' || id) as task_id, coalesce(task_type, '{{queue}}') as task_type,
       {cli.STATUS_WORD} as status,
       priority, group_id, attempts, max_attempts, strftime('%Y-%m-%d %H:%M:%f', timestamp, 'unixepoch') as enqueued_at,
       strftime('%Y-%m-%d %H:%M:%f', due_at, 'unixepoch') as due_at,
       strftime('%Y-%m-%d %H:%M:%f', claimed_at, 'unixepoch') as started_at, null as completed_at, owner,
       cancel_requested, then_queue, error, data
from "{{queue}}" where id = :id"""
FINISHED_ROW = """
select queue, row_id as id, task_id, task_type, status, priority, group_id, attempts, max_attempts, enqueued_at,
       null as due_at, started_at, completed_at, exit_code, error, result, log, data
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

CLAIMED_TASK = """
select status, task_id, task_type, data, timestamp, priority, attempts, max_attempts, backoff, then_queue, owner, claimed_at
from "{queue}" where id = :id"""
REQUEST_CANCEL = """
update "{queue}" set cancel_requested = 1 where id = :id and status = 2 and owner = :owner and attempts = :attempts"""
START_NOW = """
update "{queue}" set status = 1, due_at = null where id = :id and status = 3"""
FAILED = """
select id, queue, task_id from task_history
where status = 'failed' and completed_at >= :since and (:queue is null or queue = :queue)
  and (:task_type is null or task_type = :task_type) order by completed_at, id"""

PAUSE = """
insert or ignore into task_paused (queue) values (:queue)"""
RESUME = """
delete from task_paused where queue = :queue"""

MOVED = """
insert into "{queue}" (data, timestamp, status, priority, due_at, group_id, attempts, error)
values (:data, :timestamp, :status, :priority, :due_at, :group_id, :attempts, :error)"""
WAITING_ROW = """
select data, timestamp, status, priority, due_at, group_id, attempts, error, task_id, task_type
from "{queue}" where id = :id and status <> 2"""
WAITING_IDS = """
select id from "{queue}" where {{condition}} and (:task_type is null or task_type = :task_type) and timestamp <= :before
order by id"""
FINISHED_IDS = """
select id from task_history where status = :status and queue = :queue and completed_at <= :before
  and (:task_type is null or task_type = :task_type)"""
DELETE_WAITING = """
delete from "{queue}" where id = :id and status <> 2"""


# -------------------------------------------------------------------------------------------------------- command line


def status(text: str) -> str:
    text = SAME.get(text, text)
    if text not in STATUSES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a status: {', '.join(STATUSES)}")
    return text


def search_text(text: str) -> str:
    if not 0 < len(text) <= 1000:
        raise argparse.ArgumentTypeError("a text to look for has 1 to 1000 characters")
    return text


def count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. A command is a function of this file, and an entry here that names its arguments."""
    parser = cli.make_parser("tasks.py", __doc__)
    commands = parser.add_subparsers(parser_class=cli.Parser, metavar="COMMAND", required=True, dest="command")

    def command(run: Callable[..., int]) -> cli.Parser:
        says = " ".join(run.__doc__.split())
        entry = commands.add_parser(run.__name__.rstrip("_"), help=says.split(". ")[0].rstrip("."), description=says)
        entry.add_argument("--json", dest="as_json", action="store_true", help="for scripts")
        entry.set_defaults(run=run)
        return entry

    def one_or_more_ids(entry: cli.Parser) -> None:
        entry.add_argument("ids", metavar="ID", nargs="+")
        entry.add_argument("--queue", help="where several queues have that id")

    entry = command(stats)
    entry.add_argument("--watch", action="store_true", help="redraw until Ctrl-C, with the last hour as a sparkline")
    entry.add_argument("--interval", metavar="SECONDS", type=seconds, default=1.0, help="of --watch (default 1)")
    entry.add_argument("--prometheus", action="store_true", help="in Prometheus's text format")

    entry = command(list_)
    entry.add_argument("--queue", dest="queues", metavar="QUEUE", action="append", help="may be given several times")
    entry.add_argument("--status", dest="statuses", metavar="STATUS", action="append", type=status, help="the same")
    entry.add_argument("--type", dest="task_type", metavar="TYPE")
    entry.add_argument("--since", metavar="AGE", type=cli.duration, help="enqueued (finished tasks: finished) at most this long ago")
    entry.add_argument("--before", metavar="AGE", type=cli.duration, help="… at least this long ago")
    entry.add_argument("--text", type=search_text, help="in the task, its error or its output")
    entry.add_argument("--all", dest="look_at_all", action="store_true",
                       help=f"look for --text in every task, not only for {SCAN_SECONDS:g} s")  # fmt: skip
    entry.add_argument("--limit", metavar="N", type=count, default=50, help="(default 50)")

    one_or_more_ids(command(show))

    entry = command(logs)
    entry.add_argument("id", metavar="ID")
    entry.add_argument("--queue", help="where several queues have that id")
    entry.add_argument("-f", "--follow", action="store_true", help="go on until the task is finished")

    entry = command(retry)
    entry.add_argument("ids", metavar="ID", nargs="*")
    entry.add_argument("--failed", action="store_true", help="all dead letters, of --queue, --type and --since if given")
    entry.add_argument("--queue")
    entry.add_argument("--type", dest="task_type", metavar="TYPE")
    entry.add_argument("--since", metavar="AGE", type=cli.duration, help="failed at most this long ago")

    entry = command(cancel)
    one_or_more_ids(entry)
    entry.add_argument("--wait", metavar="SECONDS", type=seconds, default=CANCEL_SECONDS,
                       help=f"for a running task to end (default {CANCEL_SECONDS:g})")  # fmt: skip

    for run in (pause, resume):
        command(run).add_argument("queues", metavar="QUEUE", nargs="+")

    entry = command(move)
    entry.add_argument("ids", metavar="ID", nargs="*")
    entry.add_argument("to", metavar="QUEUE", help="where to")
    entry.add_argument("--from", dest="source", metavar="QUEUE", help="all that wait there, or where the IDs are")
    entry.add_argument("--type", dest="task_type", metavar="TYPE", help="of these, only the tasks of this type")

    entry = command(purge)
    entry.add_argument("queue", metavar="QUEUE")
    entry.add_argument("--status", dest="statuses", metavar="STATUS", action="append", type=status,
                       help="(default: pending, scheduled and blocked); may be given several times")  # fmt: skip
    entry.add_argument("--type", dest="task_type", metavar="TYPE")
    entry.add_argument("--before", metavar="AGE", type=cli.duration, help="enqueued, or finished, at least this long ago")
    entry.add_argument("--yes", action="store_true", help="do not ask")

    for name, says in HANDED_OVER.items():
        commands.add_parser(name, help=says, add_help=False)

    args = parser.parse_args(argv)
    fault = ""
    if args.run is retry and args.failed == bool(args.ids):
        fault = "give the IDs to retry, or --failed"
    elif args.run is retry and args.ids and (args.task_type or args.since is not None):
        fault = "--type and --since go with --failed"
    elif args.run is move and not args.ids and not args.source:
        fault = "give the IDs to move, or --from"
    elif args.run is move and args.ids and args.task_type:
        fault = "--type goes with --from and no ID"
    elif args.run is purge and "in_progress" in (args.statuses or ()):
        fault = "a running task is not purged: cancel it"
    elif args.run is stats and args.prometheus and (args.watch or args.as_json):
        fault = "--prometheus goes with neither --watch nor --json"
    if fault:
        parser.exit(EX_USAGE, f"tasks.py {args.command}: {fault}; see tasks.py {args.command} --help\n")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in HANDED_OVER:
        return hand_over(argv)
    args = vars(parse(argv))
    run, name = args.pop("run"), args.pop("command")
    return cli.run(f"tasks.py {name}", lambda: run(**args))


def hand_over(argv: list[str]) -> int:
    """Run doctor.py or transfer.py, which are scripts of their own."""
    if argv[0] == "doctor":
        import doctor

        return doctor.main(argv[1:])
    import transfer

    return transfer.main(argv)


# -------------------------------------------------------------------------------------------------------- finding a task


class Found(NamedTuple):
    """A task that an ID named. row_id is its row, None when it is in the history alone."""

    queue: str
    task_id: str
    row_id: int | None


def find(conn: q.Connection, ident: str, queue: str | None = None) -> Found:
    """The task of this id, or else the only one whose id begins so."""
    if queue is not None:
        cli.check_known(conn, [queue])
    queues = [queue] if queue else cli.queues_of(conn)
    matches = {(name, ident) for name in queues if live_id(conn, name, ident) is not None}
    matches |= {(name, ident) for (name,) in conn.execute(FINISHED_ID, {"task_id": ident}) if name in queues}
    if not matches:
        limit = {"limit": MATCHES + 1}
        for name in queues:
            matches |= {(name, found) for (found,) in q.execute(conn, LIVE_PREFIX, name, prefix=ident, **limit)}
            if f"{name}-".startswith(ident) or ident.startswith(f"{name}-"):
                digits = ident[len(name) + 1 :]
                matches |= {(name, found) for (found,) in q.execute(conn, BARE_PREFIX, name, digits=digits, **limit)}
        matches |= set(conn.execute(FINISHED_PREFIX, {"prefix": ident, "queue": queue, **limit}))
    if not matches:
        raise Refused(f"no task has the id {ident!r}, nor one that begins so; see: tasks.py list")
    if len(matches) > 1:
        named = [f"{found} ({name})" for name, found in sorted(matches)]
        named = named[:MATCHES] + (["…"] if len(named) > MATCHES else [])
        raise Refused(f"{ident!r} fits several tasks: {', '.join(named)}; give more of the id, or --queue")
    ((name, found),) = matches
    return Found(name, found, live_id(conn, name, found))


def live_id(conn: q.Connection, queue: str, task_id: str) -> int | None:
    """The row of a waiting or running task."""
    bare = re.fullmatch(rf"{queue}-(\d{{1,18}})", task_id)
    row = q.execute(conn, LIVE_ID, queue, task_id=task_id, row_id=int(bare[1]) if bare else None).fetchone()
    return row[0] if row else None



# -------------------------------------------------------------------------------------------------------------- output


def payload(text: str | None) -> object:
    """A task's data for --json: the object, or the text where that says more than JSON can."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
        return value
    except (TypeError, ValueError, RecursionError):
        return text


def seconds_since(moment: str | None) -> float | None:
    """… a time of the database's."""
    if not moment:
        return None
    from calendar import timegm

    return time.time() - timegm(time.strptime(moment[:19], "%Y-%m-%d %H:%M:%S")) - float(f"0{moment[19:]}")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], bold: Iterable[int] = ()):
    """A rich table. Columns that begin with > are right-aligned; in a terminal the last is cut to what space there is,
    and one that begins with * is folded where even that is not enough.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    on_terminal, rows = sys.stdout.isatty(), [[cli.printable(cell) for cell in row] for row in rows]
    drawn = Table(box=box.SIMPLE_HEAD if on_terminal else None, show_edge=False, pad_edge=False,
                  padding=0 if on_terminal else (0, 2, 0, 0))  # fmt: skip
    left = console().width
    for number, name in enumerate(columns):
        head = name.lstrip(">*")
        widest = max(cell_len(cell) for cell in (*head.split("\n"), *(row[number] for row in rows)))
        room = max(8, left) if on_terminal and number == len(columns) - 1 else None
        drawn.add_column(head, justify="right" if name.startswith(">") else "left", no_wrap=not name.startswith("*"),
                         overflow="fold" if name.startswith("*") else "ellipsis", max_width=room,
                         min_width=min(widest, 12) if name.startswith("*") else None)  # fmt: skip
        left -= widest + 1
    for number, row in enumerate(rows):
        drawn.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row), style="bold" if number in bold else "")
    return drawn


COLOURS = {"failed": "red", "in_progress": "cyan", "completed": "green", "cancelled": "yellow", "scheduled": "blue"}


def console():
    from rich.console import Console

    # Into a pipe nothing is cut off or wrapped.
    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100_000)


def draw(*drawings: object) -> None:
    """Print; the text is made first and written by us, since rich has its own ideas of a closed pipe."""
    screen = console()
    with screen.capture() as captured:
        for drawing in drawings:
            screen.print(drawing)
    text = captured.get()
    if not sys.stdout.isatty():
        text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


# --------------------------------------------------------------------------------------------------------------- stats


def stats(watch: bool, interval: float, prometheus: bool, as_json: bool) -> int:
    """Show how many tasks of each queue and type wait, run, and ended in the last hour and day, and how long they took."""
    conn = cli.open_queue()
    if watch:
        return watch_stats(interval, as_json)
    numbers = gather(conn)
    if prometheus:
        sys.stdout.flush()
        sys.stdout.buffer.write(prometheus_text(numbers).encode())
    elif as_json:
        cli.put_json(numbers)
    else:
        draw(stats_table(numbers))
    return 0


def gather(conn: q.Connection) -> dict:
    """{"at", "queues": {queue: {…numbers, "paused", "types": {type: {…numbers}}}}}."""
    now = time.time()
    ago = {"hour_ago": q.utc(now - HOUR), "day_ago": q.utc(now - DAY)}
    types: dict[str, dict[str, dict]] = {}
    with cli.snapshot(conn):
        paused = {queue for (queue,) in conn.execute(PAUSED)}
        for queue in cli.queues_of(conn):
            types[queue] = {}
            for name, statement in COUNT_BY_TYPE.items():
                for task_type, tasks, oldest in q.execute(conn, statement, queue):
                    numbers = types[queue].setdefault(task_type, zeros())
                    numbers[name] += tasks
                    if name == "pending":
                        numbers["oldest_pending_seconds"] = round(max(now - oldest, 0), 3)
        samples: dict[tuple[str, str], list] = {}
        for queue, task_type, name, day, hour in conn.execute(COUNT_FINISHED, ago).fetchall():
            numbers = types.setdefault(queue, {}).setdefault(task_type, zeros())
            numbers[f"{name}_day"], numbers[f"{name}_hour"] = day, hour
            if name != "cancelled":
                which = {"queue": queue, "task_type": task_type, "status": name, "sample": SAMPLE, **ago}
                samples.setdefault((queue, task_type), []).extend(conn.execute(NEWEST_TIMES, which))
    queues = {}
    for queue in sorted(types):
        total, of_queue = zeros(), []
        for task_type, numbers in sorted(types[queue].items()):
            newest = sorted(samples.get((queue, task_type), ()), reverse=True)[:SAMPLE]
            numbers |= times(newest)
            of_queue += newest
            for name, value in numbers.items():
                if isinstance(value, int):
                    total[name] += value
        oldest = [n["oldest_pending_seconds"] for n in types[queue].values() if n["oldest_pending_seconds"] is not None]
        total["oldest_pending_seconds"] = max(oldest, default=None)
        total |= times(sorted(of_queue, reverse=True)[:SAMPLE])
        queues[queue] = {**total, "paused": queue in paused, "types": dict(sorted(types[queue].items()))}
    return {"at": q.utc(now), "queues": queues}


def zeros() -> dict:
    counts = {name: 0 for name in LIVE} | {f"{name}_{when}": 0 for name in FINISHED for when in ("hour", "day")}
    return counts | {"oldest_pending_seconds": None, "wait_seconds": None, "run_seconds": None}


def times(sample: list) -> dict:
    """Median and 95th percentile of the newest finished tasks' (completed_at, waited, ran)."""
    if not sample:
        return {}
    waited, ran = (sorted(max(0.0, row[column]) for row in sample) for column in (1, 2))
    return {name: {"median": percentile(values, 0.5), "p95": percentile(values, 0.95)}
            for name, values in (("wait_seconds", waited), ("run_seconds", ran))}  # fmt: skip


def percentile(ordered: list[float], share: float) -> float:
    place = (len(ordered) - 1) * share
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    return round(low + (high - low) * (place - int(place)), 3)


def stats_table(numbers: dict):
    """A line per queue, and below it one per type. It fits into 80 columns."""
    shown = [name for name in LIVE if name in ("pending", "in_progress") or any(n[name] for n in numbers["queues"].values())]
    columns = ["*queue\n  type", *(f">{name.replace('_', chr(10))}" for name in shown), ">oldest\npending",
               ">completed\n1h/24h", ">failed\n1h/24h", ">waited\np50/p95", ">ran\np50/p95"]  # fmt: skip
    rows, bold = [], set()

    def row(name: str, n: dict) -> list[str]:
        return [name, *(amount(n[word]) for word in shown), cli.span(n["oldest_pending_seconds"]),
                *(f"{amount(n[f'{word}_hour'])}/{amount(n[f'{word}_day'])}" for word in ("completed", "failed")),
                *(f"{cli.span(n[word]['median'])}/{cli.span(n[word]['p95'])}" if n[word] else "-"
                  for word in ("wait_seconds", "run_seconds"))]  # fmt: skip

    for queue, total in numbers["queues"].items():
        bold.add(len(rows))
        rows.append(row(f"{queue} (paused)" if total["paused"] else queue, total))
        rows += [row(f"  {task_type}", of_type) for task_type, of_type in total["types"].items()]
    return table(columns, rows, bold)


def amount(number: int) -> str:
    return f"{number:,}" if number < 10_000 else f"{number / 1000:,.0f}k" if number < 9_999_500 else f"{number / 1e6:,.0f}M"


def watch_stats(interval: float, as_json: bool) -> int:
    minutes: dict[int, int] = {}
    waiting: list[int] = []

    def look() -> tuple[dict, float]:
        began = time.monotonic()
        conn = cli.open_queue()
        numbers = gather(conn)
        now = int(time.time()) // 60
        for minute in range(now - SPARK_MINUTES + 1, now + 1):
            if minute not in minutes or minute >= now - 1:
                between = {"since": q.utc(minute * 60), "until": q.utc(minute * 60 + 60)}
                minutes[minute] = conn.execute(COUNT_BETWEEN, between).fetchone()[0]
        waiting[:] = [*waiting, sum(queue["pending"] for queue in numbers["queues"].values())][-SPARK_MINUTES:]
        # A big database is looked at less often: this must not become the load that it shows.
        return numbers, max(interval, 4 * (time.monotonic() - began))

    def drawing(numbers: dict):
        from rich.console import Group
        from rich.text import Text

        finished = [minutes[minute] for minute in sorted(minutes)[-SPARK_MINUTES:]]
        lines = [f"finished a minute, last hour  {sparkline(finished)}  {sum(finished):,} in all, {max(finished):,} at most",
                 f"pending, since this began     {sparkline(waiting)}  {waiting[-1]:,} now",
                 f"{numbers['at'][:19]} UTC"]  # fmt: skip
        return Group(stats_table(numbers), Text("\n".join(lines)))

    try:
        if as_json or not sys.stdout.isatty():
            while True:
                numbers, pause = look()
                cli.put_json(numbers, indent=None) if as_json else draw(drawing(numbers))
                sys.stdout.flush()
                time.sleep(pause)
        from rich.live import Live

        with Live(console=console(), auto_refresh=False) as live:
            while True:
                numbers, pause = look()
                live.update(drawing(numbers), refresh=True)
                time.sleep(pause)
    except KeyboardInterrupt:
        return 0


def sparkline(values: Sequence[int]) -> str:
    top = max(max(values, default=0), 1)
    return "".join(SPARKS[-(-value * (len(SPARKS) - 1) // top)] for value in values)  # rounded up: one is not none


def prometheus_text(numbers: dict) -> str:
    """The text format, version 0.0.4. All are gauges: finished tasks are pruned, so nothing here only grows."""
    families = {
        "task_queue_tasks": "Waiting and running tasks.",
        "task_queue_finished": "Tasks that ended within the window.",
        "task_queue_oldest_pending_seconds": "Age of the oldest pending task.",
        "task_queue_wait_seconds": "From enqueuing to the start of the last attempt, newest finished tasks of a day.",
        "task_queue_run_seconds": "From the start to the end of the last attempt, newest finished tasks of a day.",
        "task_queue_paused": "1 while claims of the queue are held back.",
    }
    samples: dict[str, list[str]] = {name: [] for name in families}

    def sample(family: str, value: float, **labels: str) -> None:
        escaped = {key: text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"') for key, text in labels.items()}
        inside = ",".join(f'{key}="{text}"' for key, text in escaped.items())
        samples[family].append(f"{family}{{{inside}}} {value}")

    for queue, total in numbers["queues"].items():
        sample("task_queue_paused", int(total["paused"]), queue=queue)
        for task_type, n in (total["types"] or {queue: zeros()}).items():
            which = {"queue": queue, "task_type": task_type}
            for name in LIVE:
                sample("task_queue_tasks", n[name], **which, status=name)
            for name in FINISHED:
                for window, when in (("1h", "hour"), ("24h", "day")):
                    sample("task_queue_finished", n[f"{name}_{when}"], **which, status=name, window=window)
            if n["oldest_pending_seconds"] is not None:
                sample("task_queue_oldest_pending_seconds", n["oldest_pending_seconds"], **which)
            for name in ("wait_seconds", "run_seconds"):
                for quantile, key in (("0.5", "median"), ("0.95", "p95")):
                    if n[name]:
                        sample(f"task_queue_{name}", n[name][key], **which, quantile=quantile)
    return "".join(f"# HELP {name} {says}\n# TYPE {name} gauge\n" + "".join(f"{line}\n" for line in samples[name])
                   for name, says in families.items())  # fmt: skip


# ----------------------------------------------------------------------------------------------------- list, show, logs


class Scan:
    """How far a search for text went."""

    def __init__(self, seconds: float | None) -> None:
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.looked, self.stopped = 0, False

    def matches(self, cursor: sqlite3.Cursor) -> Iterator[tuple]:
        """The rows whose second column says that they match, until the time is over."""
        for row in cursor:
            self.looked += 1
            if row[1]:
                yield row
            if self.deadline and self.looked % 256 == 0 and time.monotonic() > self.deadline:
                self.stopped = True
            if self.stopped:
                return


def list_(queues: list[str] | None, statuses: list[str] | None, task_type: str | None, since: float | None,
          before: float | None, text: str | None, look_at_all: bool, limit: int, as_json: bool) -> int:  # fmt: skip
    """List tasks: running ones, then waiting ones in the order of their claims, then finished ones, newest first."""
    conn, now = cli.open_queue(), time.time()
    cli.check_known(conn, queues or ())
    scan = Scan(None if text is None or look_at_all else SCAN_SECONDS)
    like = None if text is None else "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%"
    newest, oldest = 1e11 if before is None else now - before, 0.0 if since is None else now - since
    rows: list[dict] = []
    with cli.snapshot(conn):
        for read in find_tasks(conn, queues, statuses or STATUSES, task_type, oldest, newest, like, scan):
            if len(rows) == limit:
                rows.append({})
                break
            rows.append(read)
    more = rows and not rows[-1]
    rows = rows[:limit]
    if as_json:
        for row in rows:
            row["data"] = payload(row["data"])
        cli.put_json(rows)
    else:
        draw(table(["status", "queue", "*id", "type", ">age", ">tries", "error, or the payload"],
                   [(row["status"], row["queue"], row["task_id"], row["task_type"], cli.span(age_of(row)), str(row["attempts"]),
                     cli.short(row["error"] or payload_text(row["data"]))) for row in rows]))  # fmt: skip
        sys.stdout.flush()
    if more:
        print(f"only the first {limit}; --limit N shows more", file=sys.stderr)
    elif scan.stopped:
        print(f"looked for the text in the first {scan.looked:,} tasks only ({SCAN_SECONDS:g} s); --all looks at every one",
              file=sys.stderr)  # fmt: skip
    return 0


def find_tasks(conn: q.Connection, queues: list[str] | None, statuses: Sequence[str], task_type: str | None, oldest: float,
               newest: float, like: str | None, scan: Scan) -> Iterator[dict]:  # fmt: skip
    """Matching tasks in list's order, as they are found."""
    which = {"task_type": task_type, "since": oldest, "before": newest, "text": like}
    for name, condition in LIVE.items():
        if name not in statuses:
            continue
        found = []
        for queue in queues or cli.queues_of(conn):
            match = "1" if like is None else LIVE_MATCHES.format(queue=queue)
            key = CLAIM_ORDER[name]
            order = "priority desc" if name == "pending" else key  # as the index has it
            of_type = "1" if task_type is None else "task_type = :task_type"  # an OR would use no index
            parts = {"condition": condition, "key": key, "order": order, "match": match, "of_type": of_type}
            statement = q.on_queue(LIST_LIVE, queue).format(**parts)
            found.append(in_order(queue, scan.matches(conn.execute(statement, which))))
        for _, row_id, queue in heapq.merge(*found):  # each read only as far as needed
            yield cli.as_dict(q.execute(conn, LIVE_ROW, queue, id=row_id))
    finished = [name for name in FINISHED if name in statuses]
    if finished and not scan.stopped:
        which |= {"statuses": json.dumps(finished), "queues": json.dumps(queues) if queues else None,
                  "since": q.utc(max(oldest, 0)), "before": q.utc(newest)}  # fmt: skip
        statement = LIST_FINISHED.format(match="1" if like is None else FINISHED_MATCHES)
        for row in scan.matches(conn.execute(statement, which)):
            yield cli.as_dict(conn.execute(FINISHED_ROW, {"id": row[0]}))


def in_order(queue: str, rows: Iterator[tuple]) -> Iterator[tuple]:
    return ((key or 0, row_id, queue) for row_id, _, key in rows)


def age_of(row: dict) -> float | None:
    return seconds_since(row["completed_at"] or row["enqueued_at"])


def payload_text(text: str) -> str:
    """What the sender sent, without our envelope."""
    stored = payload(text)
    inner = stored.get("data") if isinstance(stored, dict) and {"task_id", "task_type"} <= stored.keys() else None
    return json.dumps(inner if isinstance(inner, dict) else stored, ensure_ascii=False) if isinstance(stored, dict) else text


def show(ids: list[str], queue: str | None, as_json: bool) -> int:
    """Show everything about a task: its fields, its data, its history and its output."""
    conn, shown = cli.open_queue(), []
    for ident in ids:
        with cli.snapshot(conn):
            found = find(conn, ident, queue)
            lives = [] if found.row_id is None else [cli.as_dict(q.execute(conn, LIVE_ROW, found.queue, id=found.row_id))]
            lives += [cli.as_dict(conn.execute(FINISHED_ROW, {"id": row_id})) for row_id in history_ids(conn, found)]
        for life in lives:
            life["data"] = payload(life["data"])
        shown.append(lives[0] | {"history": lives[1:], "runs": [run._asdict() for run in runs_of(lives[0])]})
    if as_json:
        cli.put_json(shown[0] if len(shown) == 1 else shown)
        return 0
    for task in shown:
        show_task(task)
    return 0


def history_ids(conn: q.Connection, found: Found) -> list[int]:
    """The finished lives of a task, newest first."""
    return [row_id for (row_id,) in conn.execute(HISTORY_OF, {"task_id": found.task_id, "queue": found.queue})]


def show_task(task: dict) -> None:
    history, runs = task.pop("history"), task.pop("runs")
    data, output = task.pop("data"), {"stdout": task.pop("result", None), "stderr": task.pop("log", None)}
    fields = [(name, str(value)) for name, value in task.items() if value is not None]
    lines = [f"{name:<17} {cli.printable(value)}" for name, value in fields]
    lines += ["", "data", cli.printable_lines(data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, indent=2))]
    for name, text in output.items():
        if text:
            lines += ["", name, cli.printable_lines(text.rstrip("\n"))]
    sys.stdout.write("\n".join(lines) + "\n")
    if history:
        sys.stdout.write("\nbefore\n")
        draw(table(["status", "started", "completed", ">attempts", ">exit", "error"],
                   [(life["status"], life["started_at"] or "-", life["completed_at"], str(life["attempts"]),
                     "-" if life["exit_code"] is None else str(life["exit_code"]), cli.short(life["error"])) for life in history]))  # fmt: skip
    if runs:
        sys.stdout.write("\noutput files\n" + "".join(f"{run['path']}{ending}\n" for run in runs for ending in (".out", ".err")
                                                      if os.path.exists(f"{run['path']}{ending}")))  # fmt: skip


class RunFiles(NamedTuple):
    """The output files of one attempt: path, and .out or .err."""

    attempt: int
    path: str
    changed: float


def runs_of(life: dict) -> list[RunFiles]:
    """What its attempts left in the logs, oldest first."""
    pattern, runs = re.compile(rf"({life['id']}-(\d+)-.+)\.(?:out|err)"), {}
    try:
        with os.scandir(cli.logs_directory(q.STATE_DIR, life["queue"])) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                if match:
                    path = entry.path[: -len(".out")]
                    # Not the mtime: a file that served another run before keeps that one's while nothing is written.
                    changed = max(entry.stat().st_ctime, runs[path].changed if path in runs else 0.0)
                    runs[path] = RunFiles(int(match[2]), path, changed)
    except OSError:
        pass
    return sorted(runs.values(), key=lambda run: (run.changed, run.attempt))


def logs(id: str, queue: str | None, follow: bool, as_json: bool) -> int:
    """Print what the handler printed: its stdout on stdout, its stderr on stderr. Of the last attempt, or the running one."""
    conn = cli.open_queue()
    found = find(conn, id, queue)
    if follow and not as_json:
        return follow_logs(conn, found)
    life = newest_life(conn, found)
    runs = runs_of(life)
    output = {"out": (life.get("result") or "").encode(), "err": (life.get("log") or "").encode()}
    if runs and runs[-1].attempt >= life["attempts"]:
        output = {ending: read_file(f"{runs[-1].path}.{ending}") or kept for ending, kept in output.items()}
    elif not life["attempts"]:
        raise Refused(f"task {found.task_id} has not run yet ({life['status']}); -f waits for it")
    if as_json:
        texts = {stream: output[ending].decode("utf-8", "replace") for stream, ending in (("stdout", "out"), ("stderr", "err"))}
        cli.put_json({"queue": found.queue, "task_id": found.task_id, "status": life["status"], "attempt": life["attempts"], **texts})
    else:
        write_output(output)
    return 0


def newest_life(conn: q.Connection, found: Found) -> dict:
    """The task as it is now: waiting or running, else as it last ended."""
    with cli.snapshot(conn):
        row_id = live_id(conn, found.queue, found.task_id)
        if row_id is not None:
            return cli.as_dict(q.execute(conn, LIVE_ROW, found.queue, id=row_id))
        finished = history_ids(conn, found)
        if not finished:
            raise Refused(f"task {found.task_id} is gone: purged or pruned meanwhile")
        return cli.as_dict(conn.execute(FINISHED_ROW, {"id": finished[0]}))


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def write_output(output: dict[str, bytes]) -> None:
    for ending, stream in (("err", sys.stderr), ("out", sys.stdout)):
        if output.get(ending):
            stream.flush()
            stream.buffer.write(output[ending])
            stream.buffer.flush()


def follow_logs(conn: q.Connection, found: Found) -> int:
    """Print what is there, then what comes, attempt after attempt, until the task is finished."""
    files: dict[str, BinaryIO] = {}
    waited = False
    while True:
        life = newest_life(conn, found)  # looked at before the files are: what is written until then is read
        runs = runs_of(life)
        for ending in ("out", "err") if runs else ():
            copy_new(files, ending)
            try:
                there = os.stat(f"{runs[-1].path}.{ending}")
                if ending not in files or os.fstat(files[ending].fileno()).st_ino != there.st_ino:  # the next attempt's
                    files[ending] = open(f"{runs[-1].path}.{ending}", "rb")  # noqa: SIM115
                    copy_new(files, ending)
            except FileNotFoundError:
                pass  # it was empty when the run ended, and serves another
        if life["completed_at"] is not None:
            if not files:
                write_output({"out": (life["result"] or "").encode(), "err": (life["log"] or "").encode()})
            return 0
        if not runs and not waited:
            waited = True
            print(f"task {cli.printable(found.task_id)} has not run yet ({life['status']}); waiting for it", file=sys.stderr)
        time.sleep(5 * POLL_SECONDS)


def copy_new(files: dict[str, BinaryIO], ending: str) -> None:
    while ending in files and (new := files[ending].read(2**20)):
        write_output({ending: new})


# --------------------------------------------------------------------------------------- retry, cancel, pause and resume


def retry(ids: list[str], failed: bool, queue: str | None, task_type: str | None, since: float | None, as_json: bool) -> int:
    """Put finished tasks back into their queue, attempts at zero; a scheduled one becomes ready now."""
    conn = cli.open_queue()
    if queue is not None:
        cli.check_known(conn, [queue])
    if failed:
        which = {"queue": queue, "task_type": task_type, "since": q.utc(time.time() - since) if since is not None else ""}
        wanted = [(history_id, Found(name, task_id, None)) for history_id, name, task_id in conn.execute(FAILED, which)]
    else:
        wanted = [(None, find(conn, ident, queue)) for ident in ids]

    def put_back(item: tuple[int | None, Found]) -> dict:
        history_id, found = item
        outcome = {"queue": found.queue, "task_id": found.task_id, "retried": True}
        row_id = live_id(conn, found.queue, found.task_id) if history_id is None else None
        if row_id is not None:
            if q.execute(conn, START_NOW, found.queue, id=row_id).rowcount == 1:
                return outcome
            return outcome | {"retried": False, "why": "it is waiting or running already"}
        if history_id is None:
            history_id = next(iter(history_ids(conn, found)), None)
        if history_id is not None and q.redrive(conn, found.queue, history_id):
            return outcome
        return outcome | {"retried": False, "why": "a task of this id is waiting or running, or it was retried already"}

    outcomes = []
    try:
        outcomes.extend(cli.in_steps(conn, wanted, put_back))
    finally:
        q.wake(conn.state)
    done = sum(outcome["retried"] for outcome in outcomes)
    lines = [f"retried {cli.plural(done, 'task')}"] if failed else [f"retried {o['task_id']}" for o in outcomes if o["retried"]]
    cli.report(as_json, {"retried": done, "tasks": outcomes}, "\n".join(lines))
    for outcome in outcomes:
        if not outcome["retried"]:
            cli.complain(EX_FAILED, "tasks.py retry", f"task {outcome['task_id']} of {outcome['queue']} was not retried: {outcome['why']}")
    return 0 if done == len(outcomes) else EX_FAILED


def cancel(ids: list[str], queue: str | None, wait: float, as_json: bool) -> int:
    """Cancel tasks: a waiting one at once, a running one by ending its process group. The history keeps them as cancelled."""
    conn = cli.open_queue()
    found = [find(conn, ident, queue) for ident in ids]
    outcomes = []
    for task in found:
        why = cancel_task(conn, task, time.monotonic() + wait)
        outcomes.append({"queue": task.queue, "task_id": task.task_id, "cancelled": why is None, "why": why})
        if why is not None:
            cli.complain(EX_FAILED, "tasks.py cancel", f"task {task.task_id} of {task.queue} was not cancelled: {why}")
    text = "\n".join(f"cancelled {outcome['task_id']}" for outcome in outcomes if outcome["cancelled"])
    if as_json or text:
        cli.report(as_json, outcomes, text)
    return 0 if all(outcome["cancelled"] for outcome in outcomes) else EX_FAILED


def cancel_task(conn: q.Connection, found: Found, deadline: float) -> str | None:
    """None when the task is cancelled, else why not."""
    if found.row_id is None:
        return f"it has ended already ({newest_life(conn, found)['status']})"
    asked, first_seen, recover_at = None, {}, 0.0
    while True:
        row = q.execute(conn, CLAIMED_TASK, found.queue, id=found.row_id).fetchone()
        if row is None:
            ended = newest_life(conn, found)["status"]
            return None if ended == "cancelled" else f"it ended before that ({ended})"
        task = q.Task(found.queue, found.row_id, found.task_id, row[2] or found.queue, *row[3:])
        if row[0] != q.CLAIMED:
            with q.transaction(conn):
                done = q.finish(conn, task, "cancelled", error="cancelled while it waited")
            if done:
                q.wake(conn.state)
                return None
            continue  # somebody claimed it at this moment
        if time.monotonic() >= recover_at:
            recover_at = time.monotonic() + RECOVER_SECONDS
            if q.recover(conn.state)[0]:
                continue  # its worker was dead; now it waits, or has ended
        seen = first_seen.setdefault(task.run_name, time.monotonic())
        has_run = cli.run_file(conn.state, task.run_name, "out").exists()
        if has_run and asked != task.run_name:
            with q.transaction(conn):
                q.execute(conn, REQUEST_CANCEL, task.queue, id=task.id, owner=task.owner, attempts=task.attempts)
            q.wake(conn.state)
            asked = task.run_name
        if asked != task.run_name and time.monotonic() > seen + CONSUMER_SECONDS:
            return (f"process {task.owner.split('-')[0]} claimed it itself, without a handler (get_ack_queue or the like): "
                    "only that process can end it")  # fmt: skip
        if time.monotonic() > deadline and asked == task.run_name:
            if not cli.owner_is_alive(conn.state, task.owner):
                return f"its worker is dead and its handler goes on; see who holds: fuser -v '{conn.state}/logs/{task.run_name}.out'"
            return f"its worker {task.owner} was told, and has not ended it yet; it will, unless it hangs"
        time.sleep(POLL_SECONDS)


def pause(queues: list[str], as_json: bool) -> int:
    """Hold back claims of a queue, until resume. Running tasks go on, enqueuing works; a restart changes nothing."""
    return set_paused(queues, PAUSE, "paused", as_json)


def resume(queues: list[str], as_json: bool) -> int:
    """Let a paused queue's tasks be claimed again."""
    return set_paused(queues, RESUME, "resumed", as_json)


def set_paused(queues: list[str], statement: str, word: str, as_json: bool) -> int:
    conn = cli.open_queue()
    cli.check_known(conn, queues)
    with q.transaction(conn):
        changed = {queue: conn.execute(statement, {"queue": queue}).rowcount == 1 for queue in queues}
    q.wake(conn.state)
    already = {"paused": "was paused already", "resumed": "was not paused"}[word]
    cli.report(as_json, [{"queue": queue, "paused": word == "paused", "changed": changed[queue]} for queue in queues],
           "\n".join(f"{word} {queue}" if changed[queue] else f"{queue} {already}" for queue in queues))  # fmt: skip
    return 0


# -------------------------------------------------------------------------------------------------------- move and purge


def move(ids: list[str], to: str, source: str | None, task_type: str | None, as_json: bool) -> int:
    """Move waiting tasks to another queue, each under its own id."""
    conn = cli.open_queue()
    cli.check_known(conn, [to, *([source] if source else [])])
    if ids:
        wanted = []
        for found in (find(conn, ident, source) for ident in ids):
            if found.row_id is None:
                raise Refused(f"task {found.task_id} has ended: retry it first, then move it")
            wanted.append(found)
    else:
        which = {"task_type": task_type, "before": 1e11}
        statement = q.on_queue(WAITING_IDS, source).format(condition="status <> 2")
        wanted = [Found(source, "", row_id) for (row_id,) in conn.execute(statement, which)]
    if any(found.queue == to for found in wanted):
        raise Refused(f"queue {to!r} is where it is already")
    outcomes = []
    try:
        outcomes.extend(cli.in_steps(conn, wanted, lambda found: move_task(conn, found, to)))
    finally:
        q.wake(conn.state)
    moved = [outcome for outcome in outcomes if outcome["moved"]]
    cli.report(as_json, {"moved": len(moved), "tasks": outcomes}, f"moved {cli.plural(len(moved), 'task')} to {to}")
    for outcome in outcomes:
        if not outcome["moved"]:
            cli.complain(EX_FAILED, "tasks.py move", f"task {outcome['task_id']} of {outcome['queue']} was not moved: {outcome['why']}")
    return 0 if len(moved) == len(outcomes) else EX_FAILED


def move_task(conn: q.Connection, found: Found, to: str) -> dict:
    row = cli.as_dict(q.execute(conn, WAITING_ROW, found.queue, id=found.row_id))
    task_id = found.task_id or (row and row["task_id"]) or f"{found.queue}-{found.row_id}"
    outcome = {"queue": found.queue, "task_id": task_id, "moved": False}
    if row is None:
        return outcome | {"why": "it is running, or gone"}
    if row.pop("task_id") is None:  # a bare payload is called after its queue: an envelope keeps its name
        row["data"] = cli.envelope_of(task_id, row["task_type"] or found.queue, row["timestamp"], row["data"])
    del row["task_type"]
    if q.execute(conn, MOVED, to, **row).rowcount != 1:
        return outcome | {"why": f"a task of this id is waiting or running in {to}"}
    q.execute(conn, DELETE_WAITING, found.queue, id=found.row_id)
    return outcome | {"moved": True}


def purge(queue: str, statuses: list[str] | None, task_type: str | None, before: float | None, yes: bool, as_json: bool) -> int:
    """Delete waiting tasks of a queue, or finished ones with --status, for good. Asks first; never a running one."""
    conn = cli.open_queue()
    cli.check_known(conn, [queue])
    newest = time.time() - before if before is not None else 1e11
    wanted: list[tuple[str, int]] = []
    for name in statuses or ("pending", "scheduled", "blocked"):
        if name in LIVE:
            statement = q.on_queue(WAITING_IDS, queue).format(condition=LIVE[name])
            found = conn.execute(statement, {"task_type": task_type, "before": newest})
        else:
            found = conn.execute(FINISHED_IDS, {"task_type": task_type, "before": q.utc(newest), "status": name, "queue": queue})
        wanted += [(name, row_id) for (row_id,) in found]
    if wanted and not yes:
        kinds = ", ".join(f"{sum(kind == name for kind, _ in wanted):,} {name}" for name in dict(wanted))
        if as_json or not sys.stdin.isatty():
            raise Refused(f"this would delete {kinds} of {queue} for good; add --yes, there is nobody to ask")
        print(f"Delete {kinds} of {queue} for good? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refused("nothing was deleted")

    def delete(item: tuple[str, int]) -> int:
        if item[0] in LIVE:
            return q.execute(conn, DELETE_WAITING, queue, id=item[1]).rowcount
        return conn.execute(q.FORGET, {"history_id": item[1]}).rowcount

    deleted = sum(cli.in_steps(conn, wanted, delete))
    cli.report(as_json, {"queue": queue, "deleted": deleted}, f"deleted {cli.plural(deleted, 'task')} of {queue}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
