#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["rich>=13,<16"]
# ///
"""See what waits, runs, failed and why, and act on it.

    tasks.py stats --watch                      counts, waiting and run times, as they change
    tasks.py list --status failed --since 1h    the dead letters of the last hour, newest first
    tasks.py retry --failed --queue approvals   put them all back
    tasks.py doctor                             what is wrong, and what to do about it

ID is a task's id, or its beginning where only one task's id begins so. AGE is like 30, 90m, 5min,
1.5h or 2d. Every command has --help, and --json for scripts. A status is pending, scheduled, held,
blocked, in_progress, completed, failed, cancelled or expired. None but import makes a database
where there is none.

exit codes: 0 fine; 1 not found, not possible, or the database cannot be used; 64 usage; 65 lines or
files of an import were refused (they are named, the others are in); 75 the database is locked, try
again; 130 interrupted.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

import queue_cli as cli
import queue_helpers as q
import queue_stats as numbers_of
from queue_cli import EX_FAILED, EX_USAGE, LIVE, STATUSES, Refused
from queue_find import (
    FINISHED_ROW,
    LIVE_ROW,
    Found,
    Scan,
    find,
    find_tasks,
    history_ids,
    live_id,
    newest_life,
)

# `list --text` looks for so long, unless --all is given.
SCAN_SECONDS = 0.4
POLL_SECONDS = 0.02
RECOVER_SECONDS = 0.25
# A worker has made its run's output file by then.
CONSUMER_SECONDS = 1.0
CANCEL_SECONDS = 30.0
SPARK_MINUTES = 60
# The history keeps the output under these names.
KEPT = {"err": "log", "out": "result"}

# Commands that other scripts have.
HANDED_OVER = {
    "export": "Write tasks as JSON lines (transfer.py)",
    "import": "Take in an export, or the files of a file-based queue (transfer.py)",
    "backup": "Copy the database while workers go on (transfer.py)",
    "restore": "Put a backup into the place of the database (transfer.py)",
    "doctor": "Say what is wrong, each with its remedy (doctor.py)",
}
# Words that people use for a status.
SAME = {"waiting": "pending", "running": "in_progress", "done": "completed"}

# --------------------------------------------------------------------------------------- statements

CLAIMED_TASK = """
select status, {task} from "{queue}" where id = :id"""
REQUEST_CANCEL = """
update "{queue}" set cancel_requested = 1
where id = :id and status = 2 and owner is :owner and attempts = :attempts"""
START_NOW = """
update "{queue}" set status = 1, due_at = null, released_at = null where id = :id and status = 3"""
FAILED = """
select id, queue, task_id from task_history
where status = 'failed' and completed_at >= :since and (:queue is null or queue = :queue)
  and (:task_type is null or task_type = :task_type) order by completed_at, id"""

PAUSE = """
insert into task_controls (queue, paused_at, paused_by) values (:queue, :now, 'person')
on conflict (queue) do update
set paused_at = :now, paused_until = null, pause_reason = null, paused_by = 'person'
where paused_at is null or paused_until is not null"""
RESUME = """
update task_controls
set paused_at = null, paused_until = null, pause_reason = null, paused_by = null
where queue = :queue and paused_at is not null"""

# A blocked task is put as a ready one: the other queue's groups decide.
MOVED = """
insert into "{queue}" (data, timestamp, status, priority, due_at, group_id, expires_at, attempts, error)
values (:data, :timestamp, :status, :priority, :due_at, :group_id, :expires_at, :attempts, :error)"""
WAITING_ROW = """
select data, timestamp, iif(status = 4, 1, status) as status, priority, due_at, group_id, expires_at,
       attempts, error, task_id, task_type
from "{queue}" where id = :id and status <> 2"""
WAITING_IDS = """
select id from "{queue}" where {{condition}} and (:task_type is null or task_type = :task_type) and timestamp <= :before
order by id"""
FINISHED_IDS = """
select id from task_history where status = :status and queue = :queue and completed_at <= :before
  and (:task_type is null or task_type = :task_type)"""
DELETE_WAITING = """
delete from "{queue}" where id = :id and status <> 2"""


# ------------------------------------------------------------------------------------- command line


def status(text: str) -> str:
    text = SAME.get(text, text)
    if text not in STATUSES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a status: {', '.join(STATUSES)}")
    return text


def search_text(text: str) -> str:
    text = cli.utf8(text)
    if not 0 < len(text) <= 1000:
        raise argparse.ArgumentTypeError("a text to look for has 1 to 1000 characters")
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. A command is a function of this file, and an entry here that names its
    arguments.
    """
    parser = cli.make_parser("tasks.py", __doc__)
    commands = parser.add_subparsers(
        parser_class=cli.Parser, metavar="COMMAND", required=True, dest="command"
    )

    def command(run: Callable[..., int]) -> cli.Parser:
        says = " ".join((run.__doc__ or "").split())
        entry = commands.add_parser(
            run.__name__.rstrip("_"), help=says.split(". ")[0].rstrip("."), description=says
        )
        entry.add_argument("--json", dest="as_json", action="store_true", help="for scripts")
        entry.set_defaults(run=run)
        return entry

    def one_or_more_ids(entry: cli.Parser) -> None:
        entry.add_argument("ids", metavar="ID", nargs="+", type=cli.utf8)
        entry.add_argument("--queue", help="where several queues have that id", type=cli.utf8)

    entry = command(stats)
    entry.add_argument(
        "--watch",
        action="store_true",
        help="redraw until Ctrl-C, with the last hour as a sparkline",
    )
    entry.add_argument(
        "--interval",
        metavar="SECONDS",
        type=cli.seconds,
        default=1.0,
        help="of --watch (default 1)",
    )
    entry.add_argument("--prometheus", action="store_true", help="in Prometheus's text format")

    entry = command(list_)
    entry.add_argument(
        "--queue",
        dest="queues",
        metavar="QUEUE",
        action="append",
        help="may be given several times",
        type=cli.utf8,
    )
    entry.add_argument(
        "--status", dest="statuses", metavar="STATUS", action="append", type=status, help="the same"
    )
    entry.add_argument("--type", dest="task_type", metavar="TYPE", type=cli.utf8)
    entry.add_argument(
        "--since",
        metavar="AGE",
        type=cli.duration,
        help="enqueued (finished tasks: finished) at most this long ago",
    )
    entry.add_argument(
        "--before", metavar="AGE", type=cli.duration, help="… at least this long ago"
    )
    entry.add_argument("--text", type=search_text, help="in the task, its error or its output")
    entry.add_argument(
        "--all",
        dest="look_at_all",
        action="store_true",
        help=f"look for --text in every task, not only for {SCAN_SECONDS:g} s",
    )
    entry.add_argument(
        "--limit", metavar="N", type=cli.whole_number, default=50, help="(default 50)"
    )

    one_or_more_ids(command(show))

    entry = command(logs)
    entry.add_argument("id", metavar="ID", type=cli.utf8)
    entry.add_argument("--queue", help="where several queues have that id", type=cli.utf8)
    entry.add_argument(
        "-f", "--follow", action="store_true", help="go on until the task is finished"
    )

    entry = command(retry)
    entry.add_argument("ids", metavar="ID", nargs="*", type=cli.utf8)
    entry.add_argument(
        "--failed",
        action="store_true",
        help="all dead letters, of --queue, --type and --since if given",
    )
    entry.add_argument("--queue", type=cli.utf8)
    entry.add_argument("--type", dest="task_type", metavar="TYPE", type=cli.utf8)
    entry.add_argument(
        "--since", metavar="AGE", type=cli.duration, help="failed at most this long ago"
    )

    entry = command(cancel)
    one_or_more_ids(entry)
    entry.add_argument(
        "--wait",
        metavar="SECONDS",
        type=cli.seconds,
        default=CANCEL_SECONDS,
        help=f"for a running task to end (default {CANCEL_SECONDS:g})",
    )

    for run in (pause, resume):
        command(run).add_argument("queues", metavar="QUEUE", nargs="+", type=cli.utf8)

    entry = command(move)
    entry.add_argument("ids", metavar="ID", nargs="*", type=cli.utf8)
    entry.add_argument("to", metavar="QUEUE", help="where to", type=cli.utf8)
    entry.add_argument(
        "--from",
        dest="source",
        metavar="QUEUE",
        help="all that wait there, or where the IDs are",
        type=cli.utf8,
    )
    entry.add_argument(
        "--type",
        dest="task_type",
        metavar="TYPE",
        help="of these, only the tasks of this type",
        type=cli.utf8,
    )

    entry = command(purge)
    entry.add_argument("queue", metavar="QUEUE", type=cli.utf8)
    entry.add_argument(
        "--status",
        dest="statuses",
        metavar="STATUS",
        action="append",
        type=status,
        help="(default: all that wait); may be given several times",
    )
    entry.add_argument("--type", dest="task_type", metavar="TYPE", type=cli.utf8)
    entry.add_argument(
        "--before",
        metavar="AGE",
        type=cli.duration,
        help="enqueued, or finished, at least this long ago",
    )
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
        parser.exit(
            EX_USAGE, f"tasks.py {args.command}: {fault}; see tasks.py {args.command} --help\n"
        )
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


# -------------------------------------------------------------------------------------------- stats


def stats(watch: bool, interval: float, prometheus: bool, as_json: bool) -> int:
    """Show how many tasks of each queue and type wait, run, and ended in the last hour and day, and
    how long they took.
    """
    conn = cli.open_queue()
    if watch:
        return watch_stats(interval, as_json)
    numbers = numbers_of.gather(conn)
    if prometheus:
        sys.stdout.flush()
        sys.stdout.buffer.write(numbers_of.prometheus_text(numbers).encode())
    elif as_json:
        cli.put_json(numbers)
    else:
        cli.draw(stats_table(numbers))
    return 0


def stats_table(numbers: dict):
    """A line per queue, and below it one per type. It fits into 80 columns."""
    shown = [
        name
        for name in LIVE
        if name in ("pending", "in_progress") or any(n[name] for n in numbers["queues"].values())
    ]
    columns = [
        "*queue\n  type",
        *(f">{name.replace('_', chr(10))}" for name in shown),
        ">oldest\npending",
        ">completed\n1h/24h",
        ">failed\n1h/24h",
        ">waited\np50/p95",
        ">ran\np50/p95",
    ]
    rows, bold = [], set()

    def row(name: str, n: dict) -> list[str]:
        return [
            name,
            *(cli.amount(n[word]) for word in shown),
            cli.span(n["oldest_pending_seconds"]),
            *(
                f"{cli.amount(n[f'{word}_hour'])}/{cli.amount(n[f'{word}_day'])}"
                for word in ("completed", "failed")
            ),
            *(
                f"{cli.span(n[word]['median'])}/{cli.span(n[word]['p95'])}" if n[word] else "-"
                for word in ("wait_seconds", "run_seconds")
            ),
        ]

    for queue, total in numbers["queues"].items():
        bold.add(len(rows))
        rows.append(row(f"{queue} (paused)" if total["paused"] else queue, total))
        rows += [row(f"  {task_type}", of_type) for task_type, of_type in total["types"].items()]
    return cli.table(columns, rows, bold)


def watch_stats(interval: float, as_json: bool) -> int:
    minutes: dict[int, int] = {}
    waiting: list[int] = []

    def look() -> tuple[dict, float]:
        began = time.monotonic()
        conn = cli.open_queue()
        numbers = numbers_of.gather(conn)
        now = int(time.time()) // 60
        for minute in range(now - SPARK_MINUTES + 1, now + 1):
            if minute not in minutes or minute >= now - 1:
                between = {"since": q.utc(minute * 60), "until": q.utc(minute * 60 + 60)}
                minutes[minute] = conn.execute(numbers_of.COUNT_BETWEEN, between).fetchone()[0]
        waiting[:] = [*waiting, sum(queue["pending"] for queue in numbers["queues"].values())][
            -SPARK_MINUTES:
        ]
        # A big database is looked at less often: this must not become the load that it shows.
        return numbers, max(interval, 4 * (time.monotonic() - began))

    def drawing(numbers: dict):
        from rich.console import Group
        from rich.text import Text

        finished = [minutes[minute] for minute in sorted(minutes)[-SPARK_MINUTES:]]
        lines = [
            f"finished a minute, last hour  {cli.sparkline(finished)}  {sum(finished):,} in all, "
            f"{max(finished):,} at most",
            f"pending, since this began     {cli.sparkline(waiting)}  {waiting[-1]:,} now",
            f"{numbers['at'][:19]} UTC",
        ]
        return Group(stats_table(numbers), Text("\n".join(lines)))

    try:
        if as_json or not sys.stdout.isatty():
            while True:
                numbers, pause = look()
                cli.put_json(numbers, indent=None) if as_json else cli.draw(drawing(numbers))
                sys.stdout.flush()
                time.sleep(pause)
        from rich.live import Live

        with Live(console=cli.console(), auto_refresh=False) as live:
            while True:
                numbers, pause = look()
                live.update(drawing(numbers), refresh=True)
                time.sleep(pause)
    except KeyboardInterrupt:
        return 0


# --------------------------------------------------------------------------------- list, show, logs


def list_(
    queues: list[str] | None,
    statuses: list[str] | None,
    task_type: str | None,
    since: float | None,
    before: float | None,
    text: str | None,
    look_at_all: bool,
    limit: int,
    as_json: bool,
) -> int:
    """List tasks: running ones, then waiting ones in the order of their claims, then finished ones,
    newest first.
    """
    conn, now = cli.open_queue(), time.time()
    cli.check_known(conn, queues or ())
    scan = Scan(None if text is None or look_at_all else SCAN_SECONDS)
    like = None if text is None else "%" + re.sub(r"([\\%_])", r"\\\1", text) + "%"
    newest = math.inf if before is None else now - before
    oldest = -math.inf if since is None else now - since
    rows: list[dict] = []
    with cli.snapshot(conn):
        for read in find_tasks(
            conn, queues, statuses or STATUSES, task_type, oldest, newest, like, scan
        ):
            if len(rows) == limit:
                rows.append({})
                break
            rows.append(read)
    more = rows and not rows[-1]
    rows = rows[:limit]
    if as_json:
        for row in rows:
            row["data"] = cli.payload(row["data"])
        cli.put_json(rows)
    else:
        cli.draw(
            cli.table(
                ["status", "queue", "*id", "type", ">age", ">tries", "error, or the payload"],
                [
                    (
                        row["status"],
                        row["queue"],
                        row["task_id"],
                        row["task_type"],
                        cli.span(age_of(row)),
                        str(row["attempts"]),
                        cli.short(row["error"] or payload_text(row["data"])),
                    )
                    for row in rows
                ],
            )
        )
        sys.stdout.flush()
    if not rows and not scan.stopped:
        print("no task is like that", file=sys.stderr)
    if more:
        print(f"only the first {limit}; --limit N shows more", file=sys.stderr)
    elif scan.stopped:
        print(
            f"looked for the text in the first {scan.looked:,} tasks only ({SCAN_SECONDS:g} s); "
            "--all looks at every one",
            file=sys.stderr,
        )
    return 0


def age_of(row: dict) -> float | None:
    return cli.seconds_since(row["completed_at"] or row["enqueued_at"])


def payload_text(text: str) -> str:
    """What the sender sent, without our envelope."""
    stored = cli.payload(text)
    inner = (
        stored.get("data")
        if isinstance(stored, dict) and {"task_id", "task_type"} <= stored.keys()
        else None
    )
    return (
        json.dumps(inner if isinstance(inner, dict) else stored, ensure_ascii=False)
        if isinstance(stored, dict)
        else text
    )


def show(ids: list[str], queue: str | None, as_json: bool) -> int:
    """Show everything about a task: its fields, its data, its history and its output."""
    conn, shown = cli.open_queue(), []
    for ident in ids:
        with cli.snapshot(conn):
            found = find(conn, ident, queue)
            lives = (
                []
                if found.row_id is None
                else [cli.as_dict(q.execute(conn, LIVE_ROW, found.queue, id=found.row_id))]
            )
            lives += [
                cli.as_dict(conn.execute(FINISHED_ROW, {"id": row_id}))
                for row_id in history_ids(conn, found)
            ]
        for life in lives:
            life["data"] = cli.payload(life["data"])
        shown.append(
            lives[0] | {"history": lives[1:], "runs": [run._asdict() for run in runs_of(lives[0])]}
        )
    if as_json:
        cli.put_json(shown[0] if len(shown) == 1 else shown)
        return 0
    for task in shown:
        show_task(task)
    return 0


def show_task(task: dict) -> None:
    history, runs = task.pop("history"), task.pop("runs")
    data, output = (
        task.pop("data"),
        {"stdout": task.pop("result", None), "stderr": task.pop("log", None)},
    )
    fields = [(name, str(value)) for name, value in task.items() if value is not None]
    lines = [f"{name:<17} {cli.printable(value)}" for name, value in fields]
    lines += [
        "",
        "data",
        cli.printable_lines(
            data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, indent=2)
        ),
    ]
    for name, text in output.items():
        if text:
            lines += ["", name, cli.printable_lines(text.rstrip("\n"))]
    sys.stdout.write("\n".join(lines) + "\n")
    if history:
        sys.stdout.write("\nbefore\n")
        cli.draw(
            cli.table(
                ["status", "started", "completed", ">attempts", ">exit", "error"],
                [
                    (
                        life["status"],
                        life["started_at"] or "-",
                        life["completed_at"],
                        str(life["attempts"]),
                        "-" if life["exit_code"] is None else str(life["exit_code"]),
                        cli.short(life["error"]),
                    )
                    for life in history
                ],
            )
        )
    files = [f"{run['path']}{ending}" for run in runs for ending in (".out", ".err")]
    if runs:
        there = "".join(f"{cli.printable(file)}\n" for file in files if os.path.exists(file))
        sys.stdout.write(f"\noutput files\n{there}")


class Run(NamedTuple):
    """One attempt's output: path with .out and .err added."""

    attempt: int
    path: str
    changed: float


def runs_of(life: dict) -> list[Run]:
    """What its attempts left in the logs, oldest first."""
    pattern, runs = re.compile(rf"({life['id']}-(\d+)-.+)\.(?:out|err)", re.DOTALL), {}
    try:
        with os.scandir(cli.logs_directory(q.STATE_DIR, life["queue"])) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                if match:
                    path = entry.path[: -len(".out")]
                    # Not the time of the last write: a file that served another run before keeps
                    # that one's while nothing is written.
                    changed = max(entry.stat().st_ctime, runs[path].changed if path in runs else 0)
                    runs[path] = Run(int(match[2]), path, changed)
    except OSError:
        pass
    return sorted(runs.values(), key=lambda run: (run.changed, run.attempt))


def logs(id: str, queue: str | None, follow: bool, as_json: bool) -> int:
    """Print what the handler printed: its stdout on stdout, its stderr on stderr. Of the last
    attempt, or the running one.
    """
    conn = cli.open_queue()
    found = find(conn, id, queue)
    if follow and not as_json:
        return follow_logs(conn, found)
    life = newest_life(conn, found)
    runs = runs_of(life)
    is_there = bool(runs) and runs[-1].attempt >= life["attempts"]
    if not is_there and not life["attempts"]:
        raise Refused(f"task {found.task_id} has not run yet ({life['status']}); -f waits for it")
    sources = {
        ending: open_output(runs[-1].path if is_there else None, ending, life) for ending in KEPT
    }
    if as_json:
        told = {
            "queue": found.queue,
            "task_id": found.task_id,
            "status": life["status"],
            "attempt": life["attempts"],
        }
        sys.stdout.write(json.dumps(told, indent=2)[:-2])
        for ending, name in (("out", "stdout"), ("err", "stderr")):
            sys.stdout.write(f',\n  "{name}": "')
            decode = codecs.getincrementaldecoder("utf-8")("replace").decode
            while piece := sources[ending].read(cli.PIECE_BYTES):
                sys.stdout.write(json.dumps(decode(piece))[1:-1])
            sys.stdout.write(json.dumps(decode(b"", True))[1:-1] + '"')
        sys.stdout.write("\n}\n")
    else:
        printers = cli.make_printers()
        for ending, source in sources.items():
            cli.copy(source, printers[ending])
    return 0


def open_output(path: str | None, ending: str, life: dict) -> BinaryIO:
    """A run's stderr or stdout, or what the history kept of it."""
    try:
        if path is not None and os.path.getsize(f"{path}.{ending}"):
            return open(f"{path}.{ending}", "rb")
    except OSError:
        pass
    return io.BytesIO((life.get(KEPT[ending]) or "").encode())


def follow_logs(conn: q.Connection, found: Found) -> int:
    """Print what is there, then what comes, attempt after attempt, until the task is finished."""
    files: dict[str, BinaryIO] = {}
    printers, waited = cli.make_printers(), False
    while True:
        # Looked at before the files are: what is written until then is read.
        life = newest_life(conn, found)
        runs = runs_of(life)
        for ending in KEPT if runs else ():
            follow_file(files, ending, f"{runs[-1].path}.{ending}", printers[ending])
        if life["completed_at"] is not None:
            for ending in () if files else KEPT:
                cli.copy(open_output(None, ending, life), printers[ending])
            return 0
        if not runs and not waited:
            waited = True
            task_id = cli.printable(found.task_id)
            print(
                f"task {task_id} has not run yet ({life['status']}); waiting for it",
                file=sys.stderr,
            )
        time.sleep(5 * POLL_SECONDS)


def follow_file(files: dict[str, BinaryIO], ending: str, path: str, printer: cli.Printer) -> None:
    """Print what is new in the file that is open, then go on to the next attempt's file."""
    if ending in files:
        cli.copy(files[ending], printer)
    try:
        there = os.stat(path)
        if ending not in files or os.fstat(files[ending].fileno()).st_ino != there.st_ino:
            files[ending] = open(path, "rb")  # noqa: SIM115
            cli.copy(files[ending], printer)
    except FileNotFoundError:
        # It was empty when the run ended, and was removed.
        pass


# ------------------------------------------------------------------ retry, cancel, pause and resume


def retry(
    ids: list[str],
    failed: bool,
    queue: str | None,
    task_type: str | None,
    since: float | None,
    as_json: bool,
) -> int:
    """Put finished tasks back into their queue, attempts at zero; a scheduled one becomes ready
    now.
    """
    conn = cli.open_queue()
    if queue is not None:
        cli.check_known(conn, [queue])
    if failed:
        which = {
            "queue": queue,
            "task_type": task_type,
            "since": q.utc(time.time() - since) if since is not None else "",
        }
        wanted = [
            (history_id, Found(name, task_id, None))
            for history_id, name, task_id in conn.execute(FAILED, which)
        ]
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
        return outcome | {
            "retried": False,
            "why": "a task of this id is waiting or running, or it was retried already",
        }

    outcomes = []
    try:
        outcomes.extend(cli.in_steps(conn, wanted, put_back))
    finally:
        q.wake(conn.state)
    done = sum(outcome["retried"] for outcome in outcomes)
    lines = (
        [f"retried {cli.plural(done, 'task')}"]
        if failed
        else [f"retried {o['task_id']}" for o in outcomes if o["retried"]]
    )
    cli.report(as_json, {"retried": done, "tasks": outcomes}, "\n".join(lines))
    for outcome in outcomes:
        if not outcome["retried"]:
            cli.complain(
                EX_FAILED,
                "tasks.py retry",
                f"task {outcome['task_id']} of {outcome['queue']} was not retried: "
                f"{outcome['why']}",
            )
    return 0 if done == len(outcomes) else EX_FAILED


def cancel(ids: list[str], queue: str | None, wait: float, as_json: bool) -> int:
    """Cancel tasks: a waiting one at once, a running one by ending its process group. The history
    keeps them as cancelled.
    """
    conn = cli.open_queue()
    found = [find(conn, ident, queue) for ident in ids]
    outcomes = []
    for task in found:
        why = cancel_task(conn, task, time.monotonic() + wait)
        outcomes.append(
            {"queue": task.queue, "task_id": task.task_id, "cancelled": why is None, "why": why}
        )
        if why is not None:
            cli.complain(
                EX_FAILED,
                "tasks.py cancel",
                f"task {task.task_id} of {task.queue} was not cancelled: {why}",
            )
    text = "\n".join(
        f"cancelled {outcome['task_id']}" for outcome in outcomes if outcome["cancelled"]
    )
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
        task = q.Task.from_row(found.queue, row[1:])
        if row[0] != q.CLAIMED:
            with q.transaction(conn):
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
        has_run = cli.run_file(conn.state, task.run_name, "out").exists()
        if has_run and asked != task.run_name:
            with q.transaction(conn):
                q.execute(
                    conn,
                    REQUEST_CANCEL,
                    task.queue,
                    id=task.id,
                    owner=task.owner,
                    attempts=task.attempts,
                )
            q.wake(conn.state)
            asked = task.run_name
        if asked != task.run_name and time.monotonic() > seen + CONSUMER_SECONDS:
            return (
                f"process {(task.owner or q.NOBODY).split('-')[0]} claimed it itself, without a "
                "handler (get_ack_queue or the like): "
                "only that process can end it"
            )
        if time.monotonic() > deadline and asked == task.run_name:
            if not cli.owner_is_alive(conn.state, task.owner):
                return (
                    "its worker is dead and its handler goes on; see who holds: fuser -v "
                    f"'{conn.state}/logs/{task.run_name}.out'"
                )
            return (
                f"its worker {task.owner} was told, and has not ended it yet; it will, unless "
                "it hangs"
            )
        time.sleep(POLL_SECONDS)


def pause(queues: list[str], as_json: bool) -> int:
    """Hold back claims of a queue, until resume. Running tasks go on, enqueuing works; a restart
    changes nothing.
    """
    return set_paused(queues, PAUSE, "paused", as_json)


def resume(queues: list[str], as_json: bool) -> int:
    """Let a paused queue's tasks be claimed again."""
    return set_paused(queues, RESUME, "resumed", as_json)


def set_paused(queues: list[str], statement: str, word: str, as_json: bool) -> int:
    conn = cli.open_queue()
    cli.check_known(conn, queues)
    with q.transaction(conn):
        told = [{"queue": queue, "now": time.time()} for queue in queues]
        changed = {one["queue"]: conn.execute(statement, one).rowcount == 1 for one in told}
    q.wake(conn.state)
    already = {"paused": "was paused already", "resumed": "was not paused"}[word]
    is_paused = word == "paused"
    told = [{"queue": name, "paused": is_paused, "changed": changed[name]} for name in queues]
    lines = [f"{word} {name}" if changed[name] else f"{name} {already}" for name in queues]
    cli.report(as_json, told, "\n".join(lines))
    return 0


# ----------------------------------------------------------------------------------- move and purge


def move(ids: list[str], to: str, source: str | None, task_type: str | None, as_json: bool) -> int:
    """Move waiting tasks to another queue, each under its own id."""
    conn = cli.open_queue()
    cli.check_known(conn, [to, *([source] if source else [])])
    if ids:
        wanted = []
        for found in (find(conn, ident, source, option="--from") for ident in ids):
            if found.row_id is None:
                raise Refused(f"task {found.task_id} has ended: retry it first, then move it")
            wanted.append(found)
    else:
        which = {"task_type": task_type, "before": math.inf}
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
    cli.report(
        as_json,
        {"moved": len(moved), "tasks": outcomes},
        f"moved {cli.plural(len(moved), 'task')} to {to}",
    )
    for outcome in outcomes:
        if not outcome["moved"]:
            cli.complain(
                EX_FAILED,
                "tasks.py move",
                f"task {outcome['task_id']} of {outcome['queue']} was not moved: {outcome['why']}",
            )
    return 0 if len(moved) == len(outcomes) else EX_FAILED


def move_task(conn: q.Connection, found: Found, to: str) -> dict:
    row = cli.as_dict(q.execute(conn, WAITING_ROW, found.queue, id=found.row_id))
    task_id = found.task_id or row.get("task_id") or f"{found.queue}-{found.row_id}"
    outcome = {"queue": found.queue, "task_id": task_id, "moved": False}
    if not row:
        return outcome | {"why": "it is running, or gone"}
    if row.pop("task_id") is None:
        # A bare payload is called after its queue: an envelope keeps its name.
        row["data"] = cli.envelope_of(
            task_id, row["task_type"] or found.queue, row["timestamp"], row["data"]
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
    """Delete waiting tasks of a queue, or finished ones with --status, for good. Asks first; never
    a running one.
    """
    conn = cli.open_queue()
    cli.check_known(conn, [queue])
    newest = time.time() - before if before is not None else math.inf
    wanted: list[tuple[str, int]] = []
    for name in statuses or [name for name in LIVE if name != "in_progress"]:
        if name in LIVE:
            statement = q.on_queue(WAITING_IDS, queue).format(condition=LIVE[name])
            found = conn.execute(statement, {"task_type": task_type, "before": newest})
        else:
            found = conn.execute(
                FINISHED_IDS,
                {
                    "task_type": task_type,
                    "before": q.utc(min(newest, q.LAST_SECOND)),
                    "status": name,
                    "queue": queue,
                },
            )
        wanted += [(name, row_id) for (row_id,) in found]
    if wanted and not yes:
        kinds = ", ".join(
            f"{sum(kind == name for kind, _ in wanted):,} {name}" for name in dict(wanted)
        )
        if as_json or not sys.stdin.isatty():
            raise Refused(
                f"this would delete {kinds} of {queue} for good; add --yes, there is nobody to ask"
            )
        print(f"Delete {kinds} of {queue} for good? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refused("nothing was deleted")

    def delete(item: tuple[str, int]) -> int:
        if item[0] in LIVE:
            return q.execute(conn, DELETE_WAITING, queue, id=item[1]).rowcount
        return conn.execute(q.FORGET, {"history_id": item[1]}).rowcount

    deleted = sum(cli.in_steps(conn, wanted, delete))
    cli.report(
        as_json,
        {"queue": queue, "deleted": deleted},
        f"deleted {cli.plural(deleted, 'task')} of {queue}",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
